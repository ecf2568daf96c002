"""What each strategy costs: the paper's Table 4, with intervals and with compute and communication told apart.

The unit is the launch. The runs of a block are launched together and take turns, an epoch at a time, so that drift of the machine
cancels in their ratio; epochs of one launch resemble each other and are averaged. Intervals are over blocks.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from ddpkit.analysis import arms
from ddpkit.analysis.plan import FEWEST, TIME, Plan
from ddpkit.analysis.published import published_speed
from ddpkit.analysis.runs import NDArray, Run, require_equal
from ddpkit.analysis.statistics import CONFIDENCE, Estimate, mean_interval
from ddpkit.errors import InputError

COLUMNS = (
    "parameters", "strategy", "compile", "seconds_per_epoch", "relative_percent",
    "relative_low", "relative_high", "between_percent", "within_percent", "launches", "epochs", "steps_per_epoch",
    "seconds_per_step", "data_per_step", "compute_per_step", "sync_per_step", "optimizer_per_step", "logging_per_row",
    "seconds_compile", "gradient_bytes_per_step",
    "type_embedding_dim", "comm", "again", "captured", "world_size", "published_seconds", "published_relative_percent",
)  # fmt: skip
BESIDE_COLUMNS = (
    "parameters", "strategy", "compile", "captured", "peer", "peer_compile", "ratio", "ratio_low", "ratio_high", "launches",
    "in_turns",
)  # fmt: skip
PEERS = frozenset({"nequip ddp", "nequip simple"})
"""Strategies of runs of nequip's own trainer, which stand beside ours and in no claim."""
SPLITS = ("data", "compute", "sync", "optimizer")
RESOLUTION = 0.01
"""What a study with a pilot aims to tell apart: one per cent of an epoch."""
MOST_PAIRS = 24
_RECORDED_AFTER = 36
"""Steps in which steps are still being recorded: the optimizer's settings have to stand for 20, and sizes to come once more."""


@dataclass(frozen=True, order=True)
class Cell:
    """One configuration of the study.

    `again` is a second launch of the same one in a block, which checks calibration; `captured` one that replays recorded steps.
    """

    parameters: int
    strategy: str
    compiled: bool
    comm: str = "torch"
    again: bool = False
    captured: bool = False

    @property
    def name(self) -> str:
        """For tables and figures: `custom`, `custom compiled`, `custom captured`, `custom over mpi`, `standard again`."""
        over = "" if self.comm == "torch" else f" over {self.comm}"
        how = " captured" if self.captured else " compiled" if self.compiled else ""
        return f"{self.strategy}{how}{over}{' again' if self.again else ''}"

    @property
    def is_peer(self) -> bool:
        """Whether it is nequip's own trainer."""
        return self.strategy in PEERS


Block = tuple[int, str | None]  # the number in the labels, and what the runs took turns in
Times = Mapping[Block, Mapping[int, float]]


@dataclass(frozen=True)
class Study:
    """Epoch times of every cell.

    Attributes:
        times: seconds of each epoch, by cell, block and epoch.
        runs: the runs of each cell.
        used: the epochs that count, by the label of the run.
        plan: what was declared.
        steps: steps of an epoch.
        notes: what was left out and why.
    """

    times: Mapping[Cell, Times]
    runs: Mapping[Cell, Sequence[Run]]
    used: Mapping[str, Sequence[int]]
    plan: Plan
    steps: int
    notes: tuple[str, ...]

    @property
    def scope(self) -> str:
        """Ranks, launches and length, for captions and claims."""
        launches = {block for times in self.times.values() for block in times}
        run = next(iter(self.runs.values()))[0]
        count = len(launches)
        return f"{run.ranks}, {count} launch{'es' * (count != 1)}, epochs of {self.steps} steps"

    @property
    def in_turns(self) -> bool:
        """Whether the runs of each block took turns."""
        return all(turns is not None for times in self.times.values() for _, turns in times)

    def reference(self, cell: Cell) -> Cell:
        """Standard eager with the same number of parameters."""
        return Cell(cell.parameters, "standard", False)

    def again(self, cell: Cell) -> Cell:
        """Its second launch in a block."""
        return replace(self.reference(cell), again=True)

    def blocks(self, *cells: Cell) -> list[Block]:
        """Those that all the cells have; without the pilot where a claim is about these cells."""
        shared = sorted(set.intersection(*(set(self.times.get(cell, ())) for cell in cells)), key=str)
        primary = {"standard", *(claim.arm for claim in self.plan.primary if claim.endpoint == TIME)}
        if all(replace(cell, again=False).name in primary for cell in cells):
            shared = [block for block in shared if block[0] not in self.plan.pilot]
        return shared

    def epochs(self, block: Block, *cells: Cell) -> NDArray:
        """Seconds `[cells, epochs]` of the epochs that all the cells have in a block."""
        shared = sorted(set.intersection(*(set(self.times[cell][block]) for cell in cells)))
        return np.array([[self.times[cell][block][epoch] for epoch in shared] for cell in cells])

    def units(self, *cells: Cell) -> NDArray:
        """Mean seconds of an epoch `[cells, blocks]`, over the epochs that all the cells have in a block."""
        found = [self.epochs(block, *cells) for block in self.blocks(*cells)]
        means = [epochs.mean(axis=1) for epochs in found if epochs.shape[1]]
        return np.array(means).reshape(-1, len(cells)).T


@dataclass(frozen=True)
class Relative:
    """An arm's epoch time relative to standard eager.

    Attributes:
        estimate: logarithm of the ratio, over launches.
        p: two-sided p-value of "there is no difference".
        between: standard deviation of the ratio between launches, beyond what epochs scatter, per cent.
        within: of the ratio between epochs of one launch, per cent; None where epochs are no pairs.
    """

    estimate: Estimate
    p: float
    between: float
    within: float | None


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


@dataclass(frozen=True)
class Beside:
    """One of our configurations beside one of nequip's own trainer, of the same size.

    Attributes:
        cell: ours.
        peer: nequip's.
        ratio: epoch time of ours over that of nequip's, over launches.
        in_turns: whether the two took turns in every launch, an epoch at a time; they followed one another otherwise.
    """

    cell: Cell
    peer: Cell
    ratio: Estimate
    in_turns: bool


def study(runs: Sequence[Run], declared: Plan, warmup: int | None = None) -> Study:
    """Sorts runs into cells and blocks, after checking that they may be compared.

    Args:
        runs: the runs; what each was is read from its configuration.
        declared: the study's plan.
        warmup: number of epochs to leave out at the start of each run; by default the one that warms up a run that takes turns,
            or one of nequip's.

    Raises:
        InputError: no epoch is complete, no standard eager run, or runs that differ in what must be equal.
    """
    usable, notes = _usable(runs, warmup)
    require_equal(usable, free=("model", "cuda_graphs"))
    for size in {_parameters(run) for run in usable}:
        require_equal([run for run in usable if _parameters(run) == size], free=("cuda_graphs",))
    steps = max(int(run.epochs["steps"].max()) for run in usable)
    times: dict[Cell, dict[Block, dict[int, float]]] = {}
    members: dict[Cell, list[Run]] = {}
    used: dict[str, list[int]] = {}
    for run in usable:
        whole = run.epochs[run.epochs["steps"] == steps].iloc[_warmup(run, warmup) :]
        if len(whole) < len(run.epochs) - _warmup(run, warmup):
            notes.append(f"{run.label}: epochs of fewer than {steps} steps are left out.")
        if whole.empty:
            continue
        cell = Cell(_parameters(run), run.strategy, run.compiled, run.comm, captured=_captured(run))
        block = run.repeat, run.turns
        if block in times.get(cell, {}) and cell == Cell(cell.parameters, "standard", False):
            cell = replace(cell, again=True)
        if block in times.get(cell, {}):
            other = next(r.label for r in members[cell] if (r.repeat, r.turns) == block)
            notes.append(
                f"{run.label} is left out: {other} is the same in the same block; number it as another launch."
            )
            continue
        times.setdefault(cell, {})[block] = {
            int(e): float(s) for e, s in zip(whole["epoch"], whole["seconds"], strict=True)
        }
        members.setdefault(cell, []).append(run)
        used[run.label] = [int(epoch) for epoch in whole["epoch"]]
    if not any(not cell.compiled and cell.strategy == "standard" for cell in times):
        raise InputError(
            "no run with strategy standard and without compilation has a complete epoch; add one to compare with"
        )
    ordered = sorted(times, key=_order)
    found = Study({c: times[c] for c in ordered}, {c: members[c] for c in ordered}, used, declared, steps, ())
    return replace(found, notes=(*notes, *_notes(found)))


def table(data: Study) -> pd.DataFrame:
    """One row for each cell, columns `COLUMNS`; percentages relative to standard eager of the same size."""
    rows = []
    for cell, times in data.times.items():
        measured = relative(data, cell)
        change = measured.estimate.percent()
        runs = data.runs[cell]
        seconds = [s for epochs in times.values() for s in epochs.values()]
        values = published_row(data, cell) or {}
        rows.append(
            {
                "parameters": cell.parameters,
                "strategy": cell.strategy,
                "compile": cell.compiled,
                "seconds_per_epoch": float(np.mean(seconds)),
                "relative_percent": change.value,
                "relative_low": change.low,
                "relative_high": change.high,
                "between_percent": measured.between,
                "within_percent": np.nan if measured.within is None else measured.within,
                "launches": len(times),
                "epochs": len(seconds),
                "steps_per_epoch": data.steps,
                "seconds_per_step": float(np.mean(seconds)) / data.steps,
                **{f"{split}_per_step": _split(data, runs, split) for split in SPLITS},
                "logging_per_row": _mean_of(runs, "seconds_logging_per_row"),
                "seconds_compile": _mean_of(runs, "seconds_compile"),
                "gradient_bytes_per_step": _gradient_bytes(cell, runs),
                "type_embedding_dim": runs[0].type_embedding_dim,
                "comm": cell.comm,
                "again": cell.again,
                "captured": cell.captured,
                "world_size": runs[0].world_size,
                "published_seconds": values.get("seconds_per_epoch", np.nan),
                "published_relative_percent": values.get("relative_percent", np.nan),
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def relative(data: Study, cell: Cell) -> Relative:
    """Epoch time relative to standard eager of the same size, over the blocks that have both."""
    reference = data.reference(cell)
    nothing = Relative(Estimate(np.nan, np.nan, np.nan, 0), 1.0, np.nan, None)
    if reference not in data.times or cell not in data.times:
        return nothing
    mine, its = data.units(cell, reference)
    if cell == reference:
        return replace(nothing, estimate=Estimate(0.0, np.nan, np.nan, len(mine)))
    logs = np.log(mine / its)
    within = _within(data, cell, reference)
    between = float(np.std(logs, ddof=1)) if len(logs) > 1 else np.nan
    if within is not None:
        count = np.mean([data.epochs(block, cell, reference).shape[1] for block in data.blocks(cell, reference)])
        between = math.sqrt(max(0.0, between**2 - within**2 / count)) if np.isfinite(between) else np.nan
    p = float(stats.ttest_1samp(logs, 0.0).pvalue) if len(logs) > 1 and np.ptp(logs) else 1.0
    return Relative(mean_interval(logs), p, 100 * between, None if within is None else 100 * within)


def pairs_needed(data: Study, cell: Cell) -> int:
    """How many pairs of launches tell `RESOLUTION` apart, from the spread of a pilot; as many as a claim needs at least."""
    mine, its = data.units(cell, data.reference(cell))
    spread = float(np.std(np.log(mine / its), ddof=1)) if len(mine) > 1 else math.inf
    for pairs in range(FEWEST[TIME], MOST_PAIRS):
        if reach(spread, pairs) <= RESOLUTION:
            return pairs
    return MOST_PAIRS


def reach(spread: float, pairs: int) -> float:
    """Half of the 95 % interval of so many pairs whose logarithms have this standard deviation."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, pairs - 1)) * spread / math.sqrt(pairs)


def published_row(data: Study, cell: Cell) -> Mapping[str, float] | None:
    """The paper's figures at this number of parameters, or embedding width; it has none of recorded steps."""
    if cell not in data.runs or cell.captured:
        return None
    return published_speed(cell.parameters, data.runs[cell][0].type_embedding_dim, cell.strategy, cell.compiled)


def published_percent(data: Study, cell: Cell) -> float | None:
    """The paper's change from standard eager at this number of parameters, or embedding width."""
    row = published_row(data, cell)
    return None if row is None else float(row["relative_percent"])


def _within(data: Study, cell: Cell, reference: Cell) -> float | None:
    """Standard deviation of the logarithm of paired epochs' ratios about the mean of their launch."""
    if not data.in_turns:
        return None
    found = [data.epochs(block, cell, reference) for block in data.blocks(cell, reference)]
    logs = [np.log(epochs[0] / epochs[1]) for epochs in found if epochs.shape[1] > 1]
    freedom = sum(len(x) - 1 for x in logs)
    return math.sqrt(sum(float(((x - x.mean()) ** 2).sum()) for x in logs) / freedom) if freedom else None


def _notes(data: Study) -> Iterator[str]:
    ended = [run for runs in data.runs.values() for run in runs]
    for status in ("failed", "stopped"):
        if labels := [run.label for run in ended if run.status == status]:
            yield f"{status.capitalize()}, with complete epochs that are used: {', '.join(labels)}."
    if not data.in_turns:
        yield "The runs of a block followed one another and did not take turns: drift of the machine adds to the spread."
        if late := _slow_start(data.times):
            yield late
    if data.plan.pilot and (missing := sorted(set(data.plan.runs) - set(data.used))):
        yield f"The plan has {len(missing)} launches that are not there or not complete: {', '.join(missing[:8])}."


def beside(data: Study) -> list[Beside]:
    """Ours beside nequip's own trainer: every strategy that averages gradients, eager beside eager and compiled beside compiled.

    The ratio is the geometric mean over the launches that both are in.
    """
    found = []
    for peer in filter(lambda cell: cell.is_peer, data.times):
        for cell in data.times:
            alike = cell.parameters == peer.parameters and cell.compiled == peer.compiled
            if cell.is_peer or cell.again or cell.strategy == "none" or not alike:
                continue
            blocks = data.blocks(cell, peer)
            if blocks:
                logs = np.log(data.units(cell, peer))
                ratio = mean_interval(logs[0] - logs[1]).map(np.exp)
                found.append(Beside(cell, peer, ratio, all(turns is not None for _, turns in blocks)))
    return found


def beside_table(data: Study) -> pd.DataFrame:
    """One row for each pair of `beside`, columns `BESIDE_COLUMNS`."""
    rows = [
        {
            "parameters": one.cell.parameters,
            "strategy": one.cell.strategy,
            "compile": one.cell.compiled,
            "captured": one.cell.captured,
            "peer": one.peer.strategy,
            "peer_compile": one.peer.compiled,
            "ratio": one.ratio.value,
            "ratio_low": one.ratio.low,
            "ratio_high": one.ratio.high,
            "launches": one.ratio.count,
            "in_turns": one.in_turns,
        }
        for one in beside(data)
    ]
    return pd.DataFrame(rows, columns=list(BESIDE_COLUMNS))


def interaction(data: Study) -> list[tuple[Cell, Estimate]]:
    """How much more (or less) compilation wins under a strategy than under standard, in percent of the epoch time.

    100 ((strategy compiled / strategy eager) / (standard compiled / standard eager) - 1), the mean of paired logarithms;
    zero where the two act independently.
    """
    interactions = []
    for cell in data.times:
        if not cell.compiled or cell.captured or cell.is_peer or cell.strategy == "standard":
            continue
        cells = (cell, _with(cell, compiled=False), _with(data.reference(cell), compiled=True), data.reference(cell))
        estimate = _contrast(data, cells, lambda t: np.log(t[0] / t[1]) - np.log(t[2] / t[3]))
        if estimate:
            interactions.append((cell, estimate.percent()))
    return interactions


def exposed_communication(data: Study) -> list[tuple[Cell, Estimate]]:
    """Seconds of an epoch that a strategy takes beyond `none`, which computes the same and sends nothing."""
    exposed = []
    for cell in data.times:
        silent = Cell(cell.parameters, "none", cell.compiled, captured=cell.captured)
        if cell.strategy != "none" and not cell.again and not cell.is_peer and silent in data.times:
            estimate = _contrast(data, (cell, silent), lambda t: t[0] - t[1])
            if estimate:
                exposed.append((cell, estimate))
    return exposed


def growth(data: Study) -> list[Growth]:
    """Growth of every strategy's epoch from the smallest to the largest number of parameters, and of its two parts."""
    sizes = sorted({cell.parameters for cell in data.times})
    if len(sizes) < 2:
        return []
    small, large = sizes[0], sizes[-1]
    grown = []
    for cell in data.times:
        before = _with(cell, parameters=small)
        if cell.parameters != large or cell.again or before not in data.times:
            continue
        total = _contrast(data, (cell, before), lambda t: 100 * (t[0] / t[1] - 1))
        silent = tuple(Cell(size, "none", cell.compiled, captured=cell.captured) for size in (large, small))
        compute = communication = None
        if cell.strategy != "none" and not cell.is_peer and all(s in data.times for s in silent):
            cells = (cell, before, *silent)
            compute = _contrast(data, cells, lambda t: 100 * (t[2] - t[3]) / t[1])
            communication = _contrast(data, cells, lambda t: 100 * ((t[0] - t[2]) - (t[1] - t[3])) / t[1])
        grown.append(Growth(cell, total, compute, communication))
    return grown


def _contrast(data: Study, cells: Sequence[Cell], of: Callable[[NDArray], NDArray]) -> Estimate | None:
    if any(cell not in data.times for cell in cells):
        return None
    times = data.units(*cells)
    return mean_interval(of(times)) if times.shape[1] else None


def _with(cell: Cell, *, parameters: int | None = None, compiled: bool | None = None) -> Cell:
    return Cell(
        cell.parameters if parameters is None else parameters,
        cell.strategy,
        cell.compiled if compiled is None else compiled,
        cell.comm,
        captured=cell.captured and compiled is None,
    )


def _warmup(run: Run, given: int | None) -> int:
    if given is not None:
        return given
    first = int(run.turns is not None or run.strategy in PEERS)  # nequip compiles and builds kernels in its first step
    if _captured(run) and len(run.epochs):
        return max(first, math.ceil(_RECORDED_AFTER / float(run.epochs["steps"].max())))
    return first


def _usable(runs: Sequence[Run], warmup: int | None) -> tuple[list[Run], list[str]]:
    usable, notes = [], []
    for run in runs:
        if run.parameters is None:
            notes.append(f"{run.label} is left out: its summary.json does not tell the number of parameters yet.")
        elif len(run.epochs) <= (out := _warmup(run, warmup)):
            notes.append(f"{run.label} is left out: it has no complete epoch{' after the warm-up' * (out > 0)} yet.")
        elif arms.mode(run) == "partly compiled":
            notes.append(
                f"{run.label} is left out: {run.eager_share:.1%} of its steps ran eagerly, so it is not compiled."
            )
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


def _captured(run: Run) -> bool:
    """Whether most of its steps were replayed."""
    return 2 * int(run.summary.get("captured_steps") or 0) > int(run.summary.get("steps") or run.last)


def _order(cell: Cell) -> tuple[int, int, str, bool, bool, str, bool]:
    known = ("standard", "custom", "overlap", "ingraph", "none")
    return (
        cell.parameters,
        known.index(cell.strategy) if cell.strategy in known else len(known),
        cell.strategy,
        cell.compiled,
        cell.captured,
        cell.comm,
        cell.again,
    )


def _slow_start(times: Mapping[Cell, Times]) -> str | None:
    """A note where first epochs are slower than later ones throughout, which tells of a warm-up inside the timing."""
    ratios = []
    for block in (block for blocks in times.values() for block in blocks.values()):
        first, *later = (seconds for _, seconds in sorted(block.items()))
        ratios += [first / float(np.mean(later))] if later else []
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
