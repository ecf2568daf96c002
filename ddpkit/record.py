"""The run folder: what a run was and what it did, readable while it runs and after it was killed."""

import csv
import json
import logging
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ddpkit.errors import InputError, writing
from ddpkit.lock import FolderLock
from ddpkit.ranks.group import Environment
from ddpkit.summary import record_failure as record_failure  # noqa: PLC0414  (part of what this module offers)
from ddpkit.summary import write_atomically

_log = logging.getLogger(__name__)

STEP_COLUMNS = (
    "step", "epoch", "loss", "loss_energy", "loss_forces", "loss_stress", "lr", "grad_norm", "atoms", "edges",
    "seconds", "seconds_data", "seconds_compute", "seconds_sync", "seconds_optimizer",
)  # fmt: skip
EPOCH_COLUMNS = (
    "epoch", "seconds", "steps", "train_loss", "val_loss", "val_energy_rmse", "val_energy_mae", "val_forces_rmse",
    "val_forces_mae", "lr",
)  # fmt: skip


# What a run leaves behind, all of which is moved aside together.
_OF_A_RUN = (
    "config.yaml", "environment.json", "steps.csv", "epochs.csv", "projection.csv", "summary.json", "checkpoints",
    "tensorboard", "evaluation", "profile",
)  # fmt: skip


class CsvLog:
    """A CSV file of fixed columns, one flushed row at a time.

    Floats are written in the shortest form that reads back the same bits; `None` is left empty. A file that exists is
    continued; one with other columns (of another version) is rewritten first, so that every value stands under its name.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._path, self._columns = path, columns
        if path.exists() and path.stat().st_size:
            header, rows = _read_rows(path)
            self._columns = (*columns, *(name for name in header if name not in columns))
            if header != list(self._columns):
                named = [dict(zip(header, row, strict=True)) for row in rows]
                _write_rows(path, self._columns, [[row.get(name, "") for name in self._columns] for row in named])
        else:
            _write_rows(path, columns, [])
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def write(self, row: Mapping[str, float | int | None]) -> None:
        """Appends one row; columns that the row lacks stay empty."""
        with writing(self._path):
            self._writer.writerow([_shortest(row.get(column)) for column in self._columns])
            self._file.flush()

    def to_disk(self) -> None:
        """Has the rows so far survive a host that goes down."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with writing(self._path):
            self._file.close()


def _shortest(value: float | None) -> str:
    return "" if value is None else repr(value)


def _read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and whole rows of a CSV: without a last line that does not end, and without torn ones."""
    text, _, _ = path.read_text(errors="replace").rpartition("\n")
    header, *rows = csv.reader(text.split("\n"))
    return header, [row for row in rows if len(row) == len(header)]


def _write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def drop_rows_after(path: Path, column: str, last: int) -> int:
    """Removes the rows of a CSV whose `column` is greater than `last`, and a torn last row, atomically.

    Returns:
        The last row's `column`; 0 where there is none.

    Raises:
        InputError: the file has no such column.
    """
    if not path.exists() or not path.stat().st_size:
        return 0
    header, rows = _read_rows(path)
    if column not in header:
        raise InputError(f"{path} has no column {column!r}, so it is not the log of a run: repair it or move it away.")
    where = header.index(column)
    kept = [row for row in rows if row[where].isdigit() and int(row[where]) <= last]
    _write_rows(path, header, kept)
    return int(kept[-1][where]) if kept else 0


class RunFolder:
    """Writes one run's folder. Only rank 0 holds one.

    Nothing that was logged is overwritten: a folder that another process writes into, or that holds a checkpoint or a finished
    run, is refused; what a run without a checkpoint logged is moved into `previous-1`, `previous-2` ... first.

    Args:
        path: the folder; made where it is missing.
        resume_from: the step to continue after; rows beyond it are dropped. 0 starts afresh.
        resume_epoch: the number of whole epochs before that step.
        tensorboard: log the rows to `tensorboard/` too.
        lock: held already on this folder; released by `close()`.
        log_every: steps between rows.

    Raises:
        InputError: the folder cannot be written, is in use, or holds another run's results.
    """

    def __init__(
        self,
        path: Path,
        *,
        resume_from: int = 0,
        resume_epoch: int = 0,
        tensorboard: bool = False,
        lock: FolderLock | None = None,
        log_every: int = 1,
    ) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = lock or FolderLock(path)
        self._summary: dict[str, Any] = _json(path / "summary.json") if resume_from else {}
        self._description: tuple[str, Mapping[str, Any]] | None = None
        self._starts_after = resume_from, resume_epoch
        self._log_every, self._with_board = log_every, tensorboard
        self._has_begun = False
        if resume_from:
            return
        try:
            with writing(path):
                _refuse_results(path)
                _move_aside(path)
            self.begin()
        except BaseException:
            self._lock.release()
            raise

    def begin(self) -> None:
        """Begins to write. A new run has; one that goes on does when all is ready, until which the folder stays as it was."""
        if self._has_begun:
            return
        path, (step, epoch) = self.path, self._starts_after
        with writing(path):
            self.checkpoints.mkdir(exist_ok=True)
            for pattern in ("*.csv.part", "*.json.*.part", "config.yaml.*.part", "checkpoints/*.pt.part"):
                for torn in path.glob(pattern):
                    torn.unlink()
            last = drop_rows_after(path / "steps.csv", "step", step)
            drop_rows_after(path / "epochs.csv", "epoch", epoch)
            if last + self._log_every <= step:
                _log.warning(
                    "%s ends at step %d, but the checkpoint is of step %d: the rows between are lost.",
                    path / "steps.csv", last, step,
                )  # fmt: skip
            self._steps = CsvLog(path / "steps.csv", STEP_COLUMNS)
            self._epochs = CsvLog(path / "epochs.csv", EPOCH_COLUMNS)
        self._board = _board(path / "tensorboard", step) if self._with_board else None
        self._has_begun = True
        if self._description is not None:
            self.describe(*self._description)
        if self._summary:
            self.summarize()

    def write_step(self, row: Mapping[str, float | int | None]) -> None:
        """Logs one row of `steps.csv`."""
        self._lock.require()
        self._steps.write(row)
        self._show("step", row, row["step"])

    def write_epoch(self, row: Mapping[str, float | int | None]) -> None:
        """Logs one row of `epochs.csv`."""
        self._lock.require()
        self._epochs.write(row)
        self._show("epoch", row, row["epoch"])

    def _show(self, kind: str, row: Mapping[str, float | int | None], at: float | None) -> None:
        if self._board is not None:
            for name, value in row.items():
                if value is not None and name != kind:
                    self._board.add_scalar(f"{kind}/{name}", value, at)

    def to_disk(self) -> None:
        """Has all rows so far survive a host that goes down, as a checkpoint written after this does."""
        self._lock.require()
        self._steps.to_disk()
        self._epochs.to_disk()

    def describe(self, config_yaml: str, environment: Mapping[str, Any]) -> None:
        """Writes `config.yaml` and `environment.json`; a resumed run keeps what it ran on before under `earlier`."""
        if not self._has_begun:
            self._description = config_yaml, environment
            return
        target = self.path / "environment.json"
        before = _json(target) if self._starts_after[0] else {}
        if before:
            environment = {**environment, "earlier": [*before.pop("earlier", []), before]}
        with writing(self.path):
            write_atomically(self.path / "config.yaml", config_yaml)
            write_atomically(target, json.dumps(environment, indent=2) + "\n")

    def summarize(self, **facts: Any) -> None:
        """Updates `summary.json` with these facts."""
        self._lock.require()
        self._summary.update(facts)
        if not self._has_begun:
            return
        with writing(self.path):
            write_atomically(self.path / "summary.json", json.dumps(self._summary, indent=2) + "\n")

    def close(self) -> None:
        """Closes the logs and lets others into the folder."""
        try:
            if self._has_begun:
                self._steps.close()
                self._epochs.close()
                if self._board is not None:
                    self._board.close()
        finally:
            self._lock.release()


def _refuse_results(path: Path) -> None:
    """Refuses a folder with results that a new run would destroy."""
    if (path / "checkpoints" / "last.pt").exists():
        raise InputError(f"{path} holds a run already: go on with resume={path}, or choose another run_dir.")
    left = sorted(p.name for p in path.glob("checkpoints/*.pt"))
    if _json(path / "summary.json").get("status") == "finished" or left:
        what = f"the checkpoint {left[0]} of a run" if left else "a finished run"
        raise InputError(f"{path} holds {what} already: choose another run_dir.")


def _move_aside(path: Path) -> None:
    """Makes room for a new run, where one without a checkpoint has logged something."""
    logs = (path / name for name in ("steps.csv", "epochs.csv", "projection.csv"))
    if not any(log.is_file() and log.read_bytes().count(b"\n") > 1 for log in logs):
        return
    number = 1
    while (path / f"previous-{number}").exists():
        number += 1
    target = path / f"previous-{number}"
    target.mkdir()
    for name in _OF_A_RUN:
        if (path / name).exists():
            (path / name).rename(target / name)
    _log.warning("%s held a run that ended without a checkpoint: its files are in %s now.", path, target)


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where it cannot be read."""
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _board(path: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError(
            "train.tensorboard=true needs the package tensorboard: pip install 'ddpkit[tensorboard]'."
        ) from error
    return SummaryWriter(str(path), purge_step=step + 1)


def describe_environment(here: Environment, *, comm: str, seeds: Mapping[str, int]) -> dict[str, Any]:
    """What a reader needs to repeat or judge a run: versions, hosts, devices, commit, command."""
    packages = "ddpkit", "torch", "e3nn", "numpy", "mpi4py", "openequivariance"
    return {
        "versions": {
            "python": platform.python_version(),
            **versions(packages),
            "cuda": torch.version.cuda,
        },
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(here.device)
        if here.device.type == "cuda"
        else platform.processor() or "cpu",
        "cpu_count": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "world_size": here.world_size,
        "local_size": here.local_size,
        "launcher": here.launcher,
        "backend": here.backend,
        "comm": comm,
        "git_commit": _git_commit(),
        "command": sys.argv,
        "seeds": dict(seeds),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The releases of those packages that are installed."""
    return {name: found for name in packages if (found := _version(name))}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the working tree that this package runs from, where it runs from one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def finite(value: float) -> float | None:
    """The value, or None where it is not a number."""
    return value if math.isfinite(value) else None
