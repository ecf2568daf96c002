"""What each strategy costs: the paper's Table 4, with intervals and with compute and communication told apart.

Times are compared in pairs, so that drift of the machine cancels in the ratio: epochs of runs that took turns, one epoch at a
time, or repeats of equal number, which ran one soon after the other.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from ddpkit.analysis.published import published_speed
from ddpkit.analysis.runs import NDArray, Run, require_equal
from ddpkit.errors import InputError

COLUMNS = (
    "parameters", "strategy", "compile", "seconds_per_epoch", "relative_percent",
    "relative_low", "relative_high", "seconds_low", "seconds_high", "runs", "epochs", "steps_per_epoch", "seconds_per_step",
    "data_per_step", "compute_per_step", "sync_per_step", "optimizer_per_step", "logging_per_row", "seconds_compile",
    "gradient_bytes_per_step",
    "type_embedding_dim", "comm", "world_size", "published_seconds", "published_relative_percent",
)  # fmt: skip
CONFIDENCE = 0.95
FEWEST_REPEATS = 3
"""From this many paired repeats on, the repeat is the unit of the intervals; below it, the epoch is. Epochs settle a claim only
where the runs took turns: otherwise whatever slowed the machine down during one run counts as that run's."""
SPLITS = ("data", "compute", "sync", "optimizer")


@dataclass(frozen=True, order=True)
class Cell:
    """One configuration of the study."""

    parameters: int
    strategy: str
    compiled: bool
    comm: str = "torch"

    @property
    def name(self) -> str:
        """For tables and figures: `custom`, `custom compiled`, `custom over mpi`."""
        over = "" if self.comm == "torch" else f" over {self.comm}"
        return f"{self.strategy}{' compiled' if self.compiled else ''}{over}"


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; NaN bounds where there are too few measurements for one."""

    value: float
    low: float
    high: float
    count: int

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero."""
        return bool(np.isfinite(self.low)) and not self.low <= 0 <= self.high

    def more(self) -> int | None:
        """About how many more measurements would make the interval exclude zero; None where this cannot be told."""
        if not np.isfinite(self.low) or self.value == 0:
            return None
        spread = (self.high - self.low) / 2 / stats.t.ppf((1 + CONFIDENCE) / 2, self.count - 1) * np.sqrt(self.count)
        for n in range(self.count + 1, 1001):
            # 80 % power: the interval's half width and the value's own scatter both fit into the value.
            reach = (stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) + stats.norm.ppf(0.8)) * spread / np.sqrt(n)
            if reach < abs(self.value):
                return n - self.count
        return None


@dataclass(frozen=True)
class Study:
    """Epoch times of every cell.

    Attributes:
        times: seconds of each epoch, by cell, then by (repeat, epoch).
        runs: the runs of each cell.
        used: the epochs that count, by the label of the run.
        unit: `repeat` or `epoch`: what the intervals are taken over.
        in_turns: whether all runs of a repeat took turns with one another, so that epochs of equal number are pairs.
        steps: steps of an epoch.
        notes: what was left out and why.
    """

    times: Mapping[Cell, Mapping[tuple[int, int], float]]
    runs: Mapping[Cell, Sequence[Run]]
    used: Mapping[str, Sequence[int]]
    unit: str
    in_turns: bool
    steps: int
    notes: tuple[str, ...]

    @property
    def is_paired(self) -> bool:
        """Whether the units are pairs in which drift of the machine cancels."""
        return self.in_turns or self.unit == "repeat"

    def reference(self, cell: Cell) -> Cell:
        """Standard eager with the same number of parameters."""
        return Cell(cell.parameters, "standard", False)

    def units(self, *cells: Cell) -> NDArray:
        """Seconds of an epoch `[cells, units]`, for the repeats (or epochs) that all the cells have."""
        common = sorted(set.intersection(*(set(self.times[cell]) for cell in cells)))
        if self.unit == "epoch":
            return np.array([[self.times[cell][key] for key in common] for cell in cells]).reshape(len(cells), -1)
        repeats = sorted({repeat for repeat, _ in common})
        return np.array(
            [[np.mean([self.times[cell][k] for k in common if k[0] == r]) for r in repeats] for cell in cells]
        ).reshape(len(cells), -1)


@dataclass(frozen=True)
class Growth:
    """How an epoch grows with the number of parameters, in percent of the same strategy's epoch at the smaller size.

    Attributes:
        cell: the configuration at the larger size.
        total: growth of the epoch.
        compute: growth of `none`, which sends nothing; None where it was not run.
        communication: growth of what the strategy takes beyond `none`; compute and communication add up to the total.
    """

    cell: Cell
    total: Estimate | None
    compute: Estimate | None
    communication: Estimate | None


def study(runs: Sequence[Run], warmup: int | None = None) -> Study:
    """Sorts runs into cells, after checking that they may be compared.

    Args:
        runs: the runs; what each was is read from its configuration.
        warmup: number of epochs to leave out at the start of each run; by default the one that warms up a run that takes turns.

    Raises:
        InputError: no epoch is complete, no standard eager run, or runs that differ in what must be equal.
    """
    usable, notes = _usable(runs, warmup)
    require_equal(usable, free=("model",))
    by_size = itertools.groupby(sorted(usable, key=_parameters), key=_parameters)
    for _, same_size in by_size:
        require_equal(list(same_size))
    steps = max(int(run.epochs["steps"].max()) for run in usable)
    times: dict[Cell, dict[tuple[int, int], float]] = {}
    members: dict[Cell, list[Run]] = {}
    used: dict[str, list[int]] = {}
    for run in usable:
        whole = run.epochs[run.epochs["steps"] == steps].iloc[_warmup(run, warmup) :]
        if len(whole) < len(run.epochs) - _warmup(run, warmup):
            notes.append(f"{run.label}: epochs of fewer than {steps} steps are left out.")
        if whole.empty:
            continue
        cell = Cell(_parameters(run), run.strategy, run.compiled, run.comm)
        mine = times.setdefault(cell, {})
        repeat = run.repeat
        while any(key[0] == repeat for key in mine):
            repeat += 1
        members.setdefault(cell, []).append(run)
        used[run.label] = [int(epoch) for epoch in whole["epoch"]]
        mine |= {(repeat, int(e)): float(s) for e, s in zip(whole["epoch"], whole["seconds"], strict=True)}
    sizes = {cell.parameters for cell in times}
    if not any(Cell(size, "standard", False) in times for size in sizes):
        raise InputError(
            "no run with strategy standard and without compilation has a complete epoch; add one to compare with"
        )
    repeats = [len({repeat for repeat, _ in keys}) for keys in times.values()]
    unit = "repeat" if min(repeats) >= FEWEST_REPEATS else "epoch"
    ordered = sorted(times, key=_order)
    together = {(run.repeat, run.turns) for run in usable}
    in_turns = all(turns for _, turns in together) and len(together) == len({repeat for repeat, _ in together})
    if not in_turns and (late := _slow_start(times)):
        notes.append(late)
    return Study(
        {c: times[c] for c in ordered}, {c: members[c] for c in ordered}, used, unit, in_turns, steps, tuple(notes)
    )


def table(data: Study) -> pd.DataFrame:
    """One row for each cell, columns `COLUMNS`; percentages relative to standard eager of the same size."""
    rows = []
    for cell, times in data.times.items():
        seconds = mean_interval(data.units(cell)[0])
        relative = relative_percent(data, cell)
        runs = data.runs[cell]
        values = published_speed(cell.parameters, runs[0].type_embedding_dim, cell.strategy, cell.compiled) or {}
        rows.append(
            {
                "parameters": cell.parameters,
                "strategy": cell.strategy,
                "compile": cell.compiled,
                "seconds_per_epoch": float(np.mean(list(times.values()))),
                "relative_percent": relative.value,
                "relative_low": relative.low,
                "relative_high": relative.high,
                "seconds_low": seconds.low,
                "seconds_high": seconds.high,
                "runs": len(runs),
                "epochs": len(times),
                "steps_per_epoch": data.steps,
                "seconds_per_step": float(np.mean(list(times.values()))) / data.steps,
                **{f"{split}_per_step": _split(data, runs, split) for split in SPLITS},
                "logging_per_row": _mean_of(runs, "seconds_logging_per_row"),
                "seconds_compile": _mean_of(runs, "seconds_compile"),
                "gradient_bytes_per_step": _gradient_bytes(cell, runs),
                "type_embedding_dim": runs[0].type_embedding_dim,
                "comm": cell.comm,
                "world_size": runs[0].world_size,
                "published_seconds": values.get("seconds_per_epoch", np.nan),
                "published_relative_percent": values.get("relative_percent", np.nan),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def mean_interval(values: NDArray) -> Estimate:
    """Mean with Student's 95 % interval."""
    count = len(values)
    if count == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    mean = float(np.mean(values))
    if count < 2:
        return Estimate(mean, np.nan, np.nan, count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return Estimate(mean, mean - reach, mean + reach, count)


def ratio_interval(values: NDArray, reference: NDArray) -> Estimate:
    """Ratio of two means of paired values, with the 95 % interval of the ratio estimator (Cochran 1977, section 6.4)."""
    if len(values) == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    ratio = float(values.mean() / reference.mean())
    residual = mean_interval((values - ratio * reference) / reference.mean())
    return Estimate(ratio, ratio + residual.low, ratio + residual.high, len(values))


def relative_percent(data: Study, cell: Cell) -> Estimate:
    """Epoch time relative to standard eager of the same size, in percent, over the repeats or epochs that both have."""
    reference = data.reference(cell)
    if reference not in data.times:
        return Estimate(np.nan, np.nan, np.nan, 0)
    mine, its = data.units(cell, reference)
    if cell == reference:
        return Estimate(0.0, np.nan, np.nan, len(mine))
    found = ratio_interval(mine, its)
    return Estimate(100 * (found.value - 1), 100 * (found.low - 1), 100 * (found.high - 1), found.count)


def interaction(data: Study) -> list[tuple[Cell, Estimate]]:
    """How much more (or less) compilation wins under a strategy than under standard, in percent of the epoch time.

    100 ((strategy compiled / strategy eager) / (standard compiled / standard eager) - 1), the mean of paired logarithms;
    zero where the two act independently.
    """
    found = []
    for cell in data.times:
        if not cell.compiled or cell.strategy == "standard":
            continue
        cells = (cell, _with(cell, compiled=False), _with(data.reference(cell), compiled=True), data.reference(cell))
        estimate = _contrast(data, cells, lambda t: np.log(t[0] / t[1]) - np.log(t[2] / t[3]))
        if estimate:
            found.append((cell, _as_percent(estimate)))
    return found


def exposed_communication(data: Study) -> list[tuple[Cell, Estimate]]:
    """Seconds of an epoch that a strategy takes beyond `none`, which computes the same and sends nothing."""
    found = []
    for cell in data.times:
        silent = Cell(cell.parameters, "none", cell.compiled)
        if cell.strategy != "none" and silent in data.times:
            estimate = _contrast(data, (cell, silent), lambda t: t[0] - t[1])
            if estimate:
                found.append((cell, estimate))
    return found


def growth(data: Study) -> list[Growth]:
    """Growth of every strategy's epoch from the smallest to the largest number of parameters, and of its two parts."""
    sizes = sorted({cell.parameters for cell in data.times})
    if len(sizes) < 2:
        return []
    small, large = sizes[0], sizes[-1]
    found = []
    for cell in data.times:
        before = _with(cell, parameters=small)
        if cell.parameters != large or before not in data.times:
            continue
        total = _contrast(data, (cell, before), lambda t: 100 * (t[0] / t[1] - 1))
        silent = (Cell(large, "none", cell.compiled), Cell(small, "none", cell.compiled))
        compute = communication = None
        if cell.strategy != "none" and all(s in data.times for s in silent):
            cells = (cell, before, *silent)
            compute = _contrast(data, cells, lambda t: 100 * (t[2] - t[3]) / t[1])
            communication = _contrast(data, cells, lambda t: 100 * ((t[0] - t[2]) - (t[1] - t[3])) / t[1])
        found.append(Growth(cell, total, compute, communication))
    return found


def cost_growth(data: Study, strategy: str, compiled: bool) -> Estimate | None:
    """By how many percentage points a strategy's cost relative to standard eager grows from the small to the large model."""
    sizes = sorted({cell.parameters for cell in data.times})
    if len(sizes) < 2:
        return None
    small, large = Cell(sizes[0], strategy, compiled), Cell(sizes[-1], strategy, compiled)
    cells = (large, data.reference(large), small, data.reference(small))
    return _contrast(data, cells, lambda t: 100 * (t[0] / t[1] - t[2] / t[3]))


def _contrast(data: Study, cells: Sequence[Cell], of: Callable[[NDArray], NDArray]) -> Estimate | None:
    if any(cell not in data.times for cell in cells):
        return None
    times = data.units(*cells)
    return mean_interval(of(times)) if times.shape[1] else None


def _as_percent(estimate: Estimate) -> Estimate:
    value, low, high = (100 * float(np.expm1(x)) for x in (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high, estimate.count)


def _with(cell: Cell, *, parameters: int | None = None, compiled: bool | None = None) -> Cell:
    return Cell(
        cell.parameters if parameters is None else parameters,
        cell.strategy,
        cell.compiled if compiled is None else compiled,
        cell.comm,
    )


def _warmup(run: Run, given: int | None) -> int:
    return int(run.turns is not None) if given is None else given


def _usable(runs: Sequence[Run], warmup: int | None) -> tuple[list[Run], list[str]]:
    usable, notes = [], []
    for run in runs:
        if run.parameters is None:
            notes.append(f"{run.label} is left out: its summary.json does not tell the number of parameters yet.")
        elif len(run.epochs) <= (out := _warmup(run, warmup)):
            notes.append(f"{run.label} is left out: it has no complete epoch{' after the warm-up' * (out > 0)} yet.")
        else:
            usable.append(run)
    if not usable:
        raise InputError(
            f"none of the {len(runs)} runs has a complete epoch in its epochs.csv and the number of parameters in its "
            "summary.json; let them finish an epoch"
        )
    return usable, notes


def _parameters(run: Run) -> int:
    return run.parameters or 0


def _order(cell: Cell) -> tuple[int, int, str, bool, str]:
    known = ("standard", "custom", "overlap", "ingraph", "none")
    return (
        cell.parameters,
        known.index(cell.strategy) if cell.strategy in known else len(known),
        cell.strategy,
        cell.compiled,
        cell.comm,
    )


def _slow_start(times: Mapping[Cell, Mapping[tuple[int, int], float]]) -> str | None:
    """A note where first epochs are slower than later ones throughout, which tells of a warm-up inside the timing."""
    ratios = []
    for cell in times.values():
        for repeat in {repeat for repeat, _ in cell}:
            epochs = [seconds for (r, _), seconds in sorted(cell.items()) if r == repeat]
            if len(epochs) > 1:
                ratios.append(epochs[0] / float(np.mean(epochs[1:])))
    if ratios and np.median(ratios) > 1.05:
        return (
            f"The first epoch of a run takes {100 * (np.median(ratios) - 1):.0f} % longer than its later ones (median): "
            "--warmup 1 leaves it out."
        )
    return None


def _split(data: Study, runs: Sequence[Run], split: str) -> float:
    """Mean seconds of a step in the epochs that count, each logged row weighted with the steps since the row before."""
    column = f"seconds_{split}"
    seconds, weights = [], []
    for run in runs:
        if column not in run.steps:
            continue
        values = run.steps[column].to_numpy(float)
        since = np.diff(run.steps["step"].to_numpy(float), prepend=0.0)
        known = np.isfinite(values) & run.steps["epoch"].isin(data.used[run.label]).to_numpy()
        seconds.append(values[known])
        weights.append(since[known])
    if not seconds or not sum(map(len, seconds)):
        return np.nan
    return float(np.average(np.concatenate(seconds), weights=np.concatenate(weights)))


def _mean_of(runs: Sequence[Run], fact: str) -> float:
    values = [float(run.summary[fact]) for run in runs if run.summary.get(fact) is not None]
    return float(np.mean(values)) if values else np.nan


def _gradient_bytes(cell: Cell, runs: Sequence[Run]) -> int:
    """Bytes of gradients that each rank puts into the all-reduce of a step: as the run counted, or all of them."""
    if cell.strategy == "none" or runs[0].world_size == 1:
        return 0
    counted = _mean_of(runs, "bytes_per_step")
    width = 8 if runs[0].config.get("precision") == "float64" else 4
    return int(counted) if np.isfinite(counted) else width * cell.parameters
