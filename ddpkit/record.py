"""The run folder: what a run was and what it did, readable while it runs and after it was killed."""

import csv
import json
import math
import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ddpkit.errors import InputError
from ddpkit.launch import Environment

STEP_COLUMNS = (
    "step", "epoch", "loss", "loss_energy", "loss_forces", "loss_stress", "lr", "grad_norm", "atoms", "edges",
    "seconds", "seconds_data", "seconds_compute", "seconds_sync", "seconds_optimizer",
)  # fmt: skip
EPOCH_COLUMNS = (
    "epoch", "seconds", "steps", "train_loss", "val_loss", "val_energy_rmse", "val_energy_mae", "val_forces_rmse",
    "val_forces_mae", "lr",
)  # fmt: skip


class CsvLog:
    """A CSV file of fixed columns, one flushed row at a time.

    Floats are written in the shortest form that reads back the same bits; `None` is left empty. A file that exists is
    continued.
    """

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._path, self._columns = path, columns
        starts = not path.exists() or path.stat().st_size == 0
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        if starts:
            self._writer.writerow(columns)
            self._file.flush()

    def write(self, row: Mapping[str, float | int | None]) -> None:
        """Appends one row; columns that the row lacks stay empty."""
        with _writing(self._path):
            self._writer.writerow([_shortest(row.get(column)) for column in self._columns])
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with _writing(self._path):
            self._file.close()


def _shortest(value: float | None) -> str:
    return "" if value is None else repr(value)


def drop_rows_after(path: Path, column: str, last: int) -> None:
    """Removes the rows of a CSV whose `column` is greater than `last`, and a torn last row, atomically."""
    if not path.exists():
        return
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    if not rows:
        return
    header = rows[0]
    where = header.index(column)
    kept = [row for row in rows[1:] if len(row) == len(header) and row[where].isdigit() and int(row[where]) <= last]
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *kept])
    temporary.replace(path)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file so that readers see the old one or the new one, never half of one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def record_failure(path: Path, error: str) -> None:
    """Has the `summary.json` of a run that is said to be running tell that it failed, and why. Any rank may do this."""
    summary = path / "summary.json"
    try:
        facts = json.loads(summary.read_text())
    except (OSError, ValueError):
        return
    if facts.get("status") != "running":
        return
    text = json.dumps(facts | {"status": "failed", "error": error}, indent=2) + "\n"
    try:
        write_atomically(summary, text)
    except OSError:  # on a full disk there is still the room that the file has
        with suppress(OSError), summary.open("r+") as file:
            file.write(text)
            file.truncate()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Names what could not be written."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} could not be written ({error.strerror or error}): free some space or choose another run_dir; what was "
            "written before is kept."
        ) from error


class RunFolder:
    """Writes one run's folder. Only rank 0 holds one.

    Args:
        path: the folder; made where it is missing.
        resume_from: the step to continue after; rows beyond it are dropped. 0 starts afresh.
        resume_epoch: the number of whole epochs before that step.
        tensorboard: log the rows to `tensorboard/` too.

    Raises:
        InputError: the folder cannot be written, or holds another run's results that would be lost.
    """

    def __init__(self, path: Path, *, resume_from: int = 0, resume_epoch: int = 0, tensorboard: bool = False) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        if not resume_from and _has_results(path):
            raise InputError(f"{path} holds a run already: go on with resume={path}, or choose another run_dir.")
        with _writing(path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            drop_rows_after(path / "steps.csv", "step", resume_from)
            drop_rows_after(path / "epochs.csv", "epoch", resume_epoch)
            self._steps = CsvLog(path / "steps.csv", STEP_COLUMNS)
            self._epochs = CsvLog(path / "epochs.csv", EPOCH_COLUMNS)
        self._board = _board(path / "tensorboard", resume_from) if tensorboard else None
        self._summary: dict[str, Any] = {}

    def write_step(self, row: Mapping[str, float | int | None]) -> None:
        """Logs one row of `steps.csv`."""
        self._steps.write(row)
        self._show("step", row, row["step"])

    def write_epoch(self, row: Mapping[str, float | int | None]) -> None:
        """Logs one row of `epochs.csv`."""
        self._epochs.write(row)
        self._show("epoch", row, row["epoch"])

    def _show(self, kind: str, row: Mapping[str, float | int | None], at: float | None) -> None:
        if self._board is not None:
            for name, value in row.items():
                if value is not None and name != kind:
                    self._board.add_scalar(f"{kind}/{name}", value, at)

    def describe(self, config_yaml: str, environment: Mapping[str, Any]) -> None:
        """Writes `config.yaml` and `environment.json`."""
        with _writing(self.path):
            write_atomically(self.path / "config.yaml", config_yaml)
            write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def summarize(self, **facts: Any) -> None:
        """Updates `summary.json` with these facts."""
        self._summary.update(facts)
        with _writing(self.path):
            write_atomically(self.path / "summary.json", json.dumps(self._summary, indent=2) + "\n")

    def close(self) -> None:
        """Closes the logs."""
        self._steps.close()
        self._epochs.close()
        if self._board is not None:
            self._board.close()


def _has_results(path: Path) -> bool:
    """Whether a run has left something there that a new one would destroy."""
    if (path / "checkpoints" / "last.pt").exists():
        return True
    try:
        return bool(json.loads((path / "summary.json").read_text())["status"] == "finished")
    except (OSError, ValueError, KeyError):
        return False


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
    versions = {name: _version(name) for name in ("ddpkit", "torch", "e3nn", "numpy", "mpi4py", "openequivariance")}
    return {
        "versions": {
            "python": platform.python_version(),
            **{k: v for k, v in versions.items() if v},
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
