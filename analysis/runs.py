"""Run folders, read as they are: half-finished, of different length, one or hundreds of them."""

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ddpkit.errors import InputError

NDArray = np.ndarray[Any, np.dtype[Any]]

_STRATEGY_OF_CLASS = {
    "StandardSync": "standard",
    "FlatSync": "custom",
    "InGraphSync": "ingraph",
    "OverlapSync": "overlap",
    "NoSync": "none",
    "EmulatedSync": "emulated",
}
# What the studies vary, and where a run reads, writes and stops, may differ; all else must be equal.
_VARIED = frozenset({"strategy", "compile", "seed", "deterministic", "comm", "run_dir", "resume", "experiment"})
_HARMLESS = re.compile(r"^(max_.*|.*_every|tensorboard|timeout|turns|cache|.*workers|prefetch.*|projection)$")
_REPEAT = re.compile(r"^(?P<arm>.*?)_(?P<number>\d+)$")
_LIGHTNING_LOSSES = ("train_loss_step/weighted_sum", "train_loss_step", "train_loss", "loss")


def stem_of(label: str) -> str:
    """A label without its number: `standard` for `standard_2`."""
    found = _REPEAT.match(label)
    return found["arm"] if found else label


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        label: the folder's name, e.g. `standard_2`.
        config: the resolved configuration (`config.yaml`).
        steps: `steps.csv`, one row a logged step, sorted, each step once.
        epochs: `epochs.csv`.
        summary: `summary.json`.
        environment: `environment.json`.
        projection: `projection.csv`, the trajectory of the parameters; None where it was not recorded.
        starts: how often the study started it, resumptions included.
    """

    label: str
    config: Mapping[str, Any]
    steps: pd.DataFrame
    epochs: pd.DataFrame
    summary: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    projection: pd.DataFrame | None = None
    starts: int = 1

    @property
    def stem(self) -> str:
        """The label without its number: `standard` for `standard_2`."""
        return stem_of(self.label)

    @property
    def repeat(self) -> int:
        """The label's number: 2 for `standard_2`, 1 for `standard`."""
        found = _REPEAT.match(self.label)
        return int(found["number"]) if found else 1

    @cached_property
    def strategy(self) -> str:
        """Name of the gradient synchronisation: `standard`, `custom`, ... or the class of a user's own."""
        return _strategy_name(self.config.get("strategy"))

    @property
    def compiled(self) -> bool:
        """Whether the step was compiled."""
        return bool(self.config.get("compile", False))

    @property
    def deterministic(self) -> bool:
        """Whether deterministic kernels were asked for."""
        return bool(self.config.get("deterministic", False))

    @property
    def eager_share(self) -> float:
        """Share of the steps that ran eagerly although the run was to be compiled."""
        eager, steps = self.summary.get("eager_steps") or 0, self.summary.get("steps") or self.last
        return float(eager) / max(1, int(steps))

    @property
    def code(self) -> str | None:
        """Digest of the code that was compiled; runs of equal digests ran the same code."""
        found = self.summary.get("code")
        return None if found is None else str(found)

    @property
    def seed(self) -> Any:
        """Seed of the weights."""
        return self.config.get("seed")

    @property
    def data_seed(self) -> Any:
        """Seed of split and order of the frames."""
        data = self.config.get("data")
        return data.get("seed") if isinstance(data, Mapping) else None

    @property
    def last(self) -> int:
        """The last logged step; 0 without one."""
        return int(self.steps["step"].max()) if len(self.steps) else 0

    @property
    def comm(self) -> str:
        """What carried the all-reduce: `torch` or `mpi`."""
        return str(self.config.get("comm") or "torch")

    @property
    def world_size(self) -> int | None:
        """Number of ranks, those that were emulated on one process included."""
        strategy = self.config.get("strategy")
        if self.strategy == "emulated" and isinstance(strategy, Mapping):
            return int(strategy.get("ranks", 0)) or None
        size = self.environment.get("world_size")
        return None if size is None else int(size)

    @property
    def ranks(self) -> str:
        """Their number, for captions: `2 ranks`, `64 emulated ranks`."""
        size = self.world_size
        kind = "emulated rank" if self.strategy == "emulated" else "rank"
        return f"an unknown number of {kind}s" if size is None else f"{size} {kind}{'s' * (size != 1)}"

    @property
    def machine(self) -> str:
        """What they ran on: the device, and what carried the gradients."""
        known = (self.environment.get(key) for key in ("device", "backend"))
        return ", ".join(str(value) for value in known if value) or "not told"

    @property
    def parameters(self) -> int | None:
        """Number of trainable parameters."""
        count = self.summary.get("parameters")
        return None if count is None else int(count)

    @property
    def type_embedding_dim(self) -> int | None:
        """Width of NequIP's type embedding, the knob of the paper's inflation test."""
        model = self.config.get("model")
        width = model.get("type_embedding_dim") if isinstance(model, Mapping) else None
        return None if width is None else int(width)

    @property
    def turns(self) -> str | None:
        """What it took turns in, an epoch at a time after a first one that warmed up; None where it ran by itself.

        Runs that name the same ran side by side.
        """
        train = self.config.get("train")
        turns = train.get("turns") if isinstance(train, Mapping) else None
        return None if turns is None else str(turns)

    @property
    def status(self) -> str:
        """`finished`, `running`, `failed`, or `unknown` where the summary does not tell."""
        return str(self.summary.get("status", "unknown"))


def read_runs(folder: Path, layout: str = "ddpkit") -> tuple[list[Run], list[str]]:
    """Reads every run folder directly inside `folder`, in natural order of the labels.

    Args:
        folder: holds one sub-folder a run.
        layout: `ddpkit`, or `lightning` for the logs of Lightning's `CSVLogger` (nequip writes these).

    Returns:
        The runs, and one sentence for each sub-folder that could not serve.

    Raises:
        InputError: the folder is missing, holds no run, or a file in it cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder whose sub-folders are run folders")
    if (folder / "steps.csv").is_file():
        raise InputError(
            f"{folder} is itself a run folder; give the folder that holds it beside the runs to compare with"
        )
    read = _read_lightning if layout == "lightning" else _read_ddpkit
    runs, notes = [], []
    for path in sorted((p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=_natural):
        run = read(path)
        if isinstance(run, str):
            notes.append(run)
        elif run is not None:
            runs.append(run)
    if not runs:
        expected = "metrics.csv" if layout == "lightning" else "config.yaml and steps.csv"
        reason = f": {notes[0]}" if notes else ""
        raise InputError(f"{folder} holds no run: none of its sub-folders has {expected} with logged steps{reason}")
    return runs, notes


def read_run(folder: Path) -> Run:
    """Reads one run folder.

    Raises:
        InputError: it is none, or has logged no step.
    """
    run = _read_ddpkit(folder)
    if not isinstance(run, Run):
        raise InputError(f"{folder} is no run folder with logged steps: give one that `ddpkit-run` made")
    return run


def holds_runs(folder: Path) -> bool:
    """Whether any sub-folder looks like a run folder."""
    return folder.is_dir() and any(
        (p / "config.yaml").is_file() or (p / "steps.csv").is_file() for p in folder.iterdir()
    )


def common(one: Run, other: Run, column: str = "loss") -> tuple[NDArray, NDArray, NDArray]:
    """The steps that two runs logged, and a column of each there; a logged loss may be NaN."""
    steps, mine, its = np.intersect1d(one.steps["step"], other.steps["step"], assume_unique=True, return_indices=True)
    return steps, one.steps[column].to_numpy(float)[mine], other.steps[column].to_numpy(float)[its]


def require_equal(runs: Sequence[Run], *, free: Sequence[str] = ()) -> None:
    """Refuses runs that did not train the same model on the same data in the same order on the same machine.

    Every setting must be equal but those that the studies vary (strategy, compile, seed, deterministic, comm) and those
    that tell where a run reads, writes, logs and stops; so must the device and the number of ranks and of threads.

    Args:
        runs: the runs that are to be compared.
        free: dotted keys that may differ, e.g. `model` for the study of embedding widths.

    Raises:
        InputError: names the first two runs that differ, and in what.
    """
    first = runs[0]
    for other in runs[1:]:
        of_first, of_other = _must_equal(first), _must_equal(other)
        for key in sorted({*of_first, *of_other}):
            if any(key == f or key.startswith(f"{f}.") for f in free):
                continue
            if key.startswith("environment.") and not (key in of_first and key in of_other):
                continue  # a folder that lost its environment.json is not refused for that
            if of_first.get(key) != of_other.get(key):
                raise InputError(
                    f"runs {first.label} and {other.label} cannot be compared: {key} is {_show(of_first, key)} in the one and "
                    f"{_show(of_other, key)} in the other; keep runs that differ in it in folders of their own"
                )


def require_same_frames(runs: Sequence[Run]) -> None:
    """Refuses runs whose global batches held other frames at the same step, as their atoms and edges tell.

    Raises:
        InputError: names the two runs, the step and the counts.
    """
    for column in ("atoms", "edges"):
        usable = [run for run in runs if column in run.steps and run.steps[column].notna().any()]
        for other in usable[1:]:
            steps, counts, counts_of_other = common(usable[0], other, column)
            differs = np.isfinite(counts) & np.isfinite(counts_of_other) & (counts != counts_of_other)
            if differs.any():
                at = int(np.argmax(differs))
                raise InputError(
                    f"runs {usable[0].label} and {other.label} cannot be compared: their batches differ at step {steps[at]} "
                    f"({counts[at]:.0f} and {counts_of_other[at]:.0f} {column}); compare runs with the same data and data.seed"
                )


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _must_equal(run: Run) -> dict[str, Any]:
    flat = flatten({key: value for key, value in run.config.items() if key not in _VARIED})
    flat = {key: value for key, value in flat.items() if not _HARMLESS.match(key.rsplit(".", 1)[-1])}
    known = {key: run.environment.get(key) for key in ("world_size", "device", "threads_per_rank")}
    return flat | {f"environment.{key}": value for key, value in known.items() if value is not None}


def _show(flat: Mapping[str, Any], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _strategy_name(strategy: Any) -> str:
    if isinstance(strategy, Mapping):
        if strategy.get("name"):
            return str(strategy["name"])
        class_name = str(strategy.get("_target_", "unknown")).rsplit(".", 1)[-1]
        return _STRATEGY_OF_CLASS.get(class_name, class_name)
    return "unknown" if strategy is None else str(strategy)


def _read_ddpkit(path: Path) -> Run | str | None:
    config, steps = path / "config.yaml", path / "steps.csv"
    if not config.is_file() and not steps.is_file():
        return None
    if not config.is_file():
        return f"{path.name} is left out: it has no config.yaml yet, so what the run was cannot be told"
    table, summary = _read_csv(steps, required=("step", "loss")), _read_json(path / "summary.json")
    if table is None and summary.get("status") == "failed":
        table = pd.DataFrame(
            {"step": np.empty(0, int), "loss": np.empty(0)}
        )  # it failed before its first step, as evidence
    if table is None:
        return f"{path.name} is left out: it has logged no step yet"
    table = table.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
    projection = _read_csv(path / "projection.csv", required=("step",))
    epochs = _read_csv(path / "epochs.csv", required=("epoch", "seconds", "steps"))
    return Run(
        label=path.name,
        config=_read_config(config),
        steps=table,
        epochs=pd.DataFrame(columns=["epoch", "seconds", "steps"]) if epochs is None else epochs,
        summary=summary,
        environment=_read_json(path / "environment.json"),
        projection=None if projection is None else projection.drop_duplicates("step", keep="last", ignore_index=True),
        starts=int(_read_json(path / "study.json").get("starts", 1)),
    )


def _read_csv(path: Path, required: Sequence[str]) -> pd.DataFrame | None:
    """A CSV, or its `.gz`, without the half-written row of a killed run, floats read to the last bit; None without a row."""
    packed = path.with_name(f"{path.name}.gz")
    if path.is_file():
        text = path.read_text(errors="replace")
    elif packed.is_file():
        text = gzip.decompress(packed.read_bytes()).decode(errors="replace")
    else:
        return None
    whole = text[: text.rfind("\n") + 1]
    if not whole.strip():
        return None
    try:
        table = pd.read_csv(StringIO(whole), float_precision="round_trip")
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(
            f"{path} is not a table that can be read ({str(error).strip()}); remove it or repair it"
        ) from None
    missing = [name for name in required if name not in table]
    if missing:
        raise InputError(f"{path} lacks the column {missing[0]!r}; it is not the log of a run")
    if table.empty:
        return None
    for name in required:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise InputError(
                f"{path} holds something other than numbers in column {name!r}; remove the run or repair it"
            )
    return table


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError:
        raise InputError(f"{path} is not valid YAML; remove the run or repair it") from None
    if not isinstance(config, Mapping):
        raise InputError(f"{path} holds no configuration; remove the run or repair it")
    return config


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text())
    except json.JSONDecodeError:
        raise InputError(f"{path} is not valid JSON; remove the run or repair it") from None
    return value if isinstance(value, Mapping) else {}


_CONFIG_OF_LABEL: Mapping[str, Mapping[str, Any]] = {
    "baseline": {"strategy": "custom", "compile": False},
    "custom": {"strategy": "custom", "compile": False},
    "rerun": {"strategy": "custom", "compile": False},
    "new_seed": {"strategy": "custom", "compile": False, "seed": "new"},
    "standard": {"strategy": "standard", "compile": False},
    "compiled": {"strategy": "custom", "compile": True},
    "standard_compiled": {"strategy": "standard", "compile": True},
    "ingraph": {"strategy": "ingraph", "compile": True},
    "overlap": {"strategy": "overlap", "compile": False},
}


def _read_lightning(path: Path) -> Run | str | None:
    logs = sorted(path.rglob("metrics.csv"), key=lambda p: _natural(p.parent))
    if not logs:
        return None
    if len(logs) > 1:
        return f"{path.name} is left out: it holds {len(logs)} metrics.csv; keep one version in each run's folder"
    table = _read_csv(logs[0], required=("step",))
    if table is None:
        return f"{path.name} is left out: it has logged no step yet"
    loss = next((name for name in _LIGHTNING_LOSSES if name in table), None)
    if loss is None:
        raise InputError(f"{logs[0]} has no training loss; log one of {', '.join(_LIGHTNING_LOSSES)} on each step")
    rows = table[table[loss].notna()]
    if rows.empty:
        return f"{path.name} is left out: it has logged no training loss yet"
    # Lightning counts steps from 0, a run folder from 1.
    steps = pd.DataFrame({"step": rows["step"].to_numpy(int) + 1, "loss": rows[loss].to_numpy(float)})
    steps = steps.drop_duplicates("step", keep="last").sort_values("step", ignore_index=True)
    run = Run(label=path.name, config={}, steps=steps, epochs=pd.DataFrame(columns=["epoch", "seconds", "steps"]))
    told = _lightning_config(_hyperparameters(logs[0].with_name("hparams.yaml")))
    config = {"seed": "same", **_CONFIG_OF_LABEL.get(run.stem, {}), **told}
    if "strategy" not in config:
        known = ", ".join(_CONFIG_OF_LABEL)
        raise InputError(
            f"{path} does not tell its strategy: name the folder one of {known} (repeats: standard_2, ...)"
        )
    return Run(label=run.label, config=config, steps=steps, epochs=run.epochs)


def _hyperparameters(path: Path) -> Mapping[str, Any]:
    """Lightning's hparams.yaml where it is plain; it may be missing, empty or hold Python objects."""
    try:
        found = yaml.safe_load(path.read_text()) if path.is_file() else None
    except yaml.YAMLError:
        found = None
    return found if isinstance(found, Mapping) else {}


def _lightning_config(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """What nequip's hyperparameters tell: `SimpleDDPStrategy` is custom DDP, `DDPStrategy` is standard DDP."""
    told: dict[str, Any] = {}
    info = hyperparameters.get("info_dict")
    if isinstance(info, Mapping):
        told["data"] = info.get("data")
        trainer = info.get("trainer")
        strategy = trainer.get("strategy") if isinstance(trainer, Mapping) else None
        name = str(strategy.get("_target_", "") if isinstance(strategy, Mapping) else strategy or "").rsplit(".", 1)[-1]
        if name == "SyncStrategy" and isinstance(strategy, Mapping):
            told["strategy"] = str(strategy.get("sync", "custom"))
        elif name == "SimpleDDPStrategy":
            told["strategy"] = "custom"
        elif name == "DDPStrategy" or name.startswith("ddp"):
            told["strategy"] = "standard"
    model = hyperparameters.get("model")
    if isinstance(model, Mapping):
        told["model"] = {k: v for k, v in model.items() if k not in {"seed", "compile_mode"}}
        if "compile_mode" in model:
            told["compile"] = model["compile_mode"] == "compile"
        if "seed" in model:
            told["seed"] = model["seed"]
    return told
