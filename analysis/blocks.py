"""A study of numerics as blocks: in each, all runs share the seeds of weights and data order with one baseline.

Runs of one seed describe one trajectory, so that the block is the unit of every test.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ddpkit.analysis import arms, plan
from ddpkit.analysis.arms import NEW_ORDER, NEW_SEED, RERUN, Settings
from ddpkit.analysis.outcomes import Outcome, outcome
from ddpkit.analysis.runs import NDArray, Run, common, require_equal, require_same_frames, stem_of
from ddpkit.errors import InputError

VARIED = ("data.seed", "compiler", "nccl_algo", "tf32", "cuda_graphs")
"""What a study of numerics varies besides what every study does."""
EXACT = 2.0**-46
"""Reruns count as exact where they differ by no more of the loss (or of the parameters): rounding in float64."""
SINGLE = 2.0**-24
"""Rounding in float32."""
_PAPER = ("standard", "compiled", RERUN, NEW_SEED, NEW_ORDER, "standard compiled", "overlap", "ingraph")


@dataclass(frozen=True)
class Block:
    """The runs of one pair of seeds.

    Attributes:
        baseline: what the others are compared with.
        arms: the other runs by arm; further runs of an arm after its first.
    """

    baseline: Run
    arms: dict[str, list[Run]]

    @property
    def runs(self) -> list[Run]:
        """All of them, the baseline first."""
        return [self.baseline, *(run for runs in self.arms.values() for run in runs)]

    @property
    def seed(self) -> str:
        """The seeds, for tables."""
        weights, order = self.baseline.seed, self.baseline.data_seed
        return str(weights) if weights == order or order is None else f"{weights}/{order}"


@dataclass(frozen=True)
class Study:
    """Blocks of runs that may be compared.

    Attributes:
        blocks: in the order of their baselines' labels.
        plan: what was declared.
        left_out: what was left out, and why.
    """

    blocks: Sequence[Block]
    plan: plan.Plan
    left_out: Sequence[str]

    @cached_property
    def notes(self) -> list[str]:
        """What a reader must know of the runs."""
        return [*self.left_out, *_notes(self)]

    @cached_property
    def runs(self) -> list[Run]:
        """All runs, the first block's baseline first."""
        return [
            run for block in self.blocks for run in (block.baseline, *(r for rs in block.arms.values() for r in rs))
        ]

    @cached_property
    def names(self) -> list[str]:
        """Arms in the order of tables: the paper's first."""
        found = dict.fromkeys(name for block in self.blocks for name in block.arms)
        return sorted(found, key=lambda n: _PAPER.index(n) if n in _PAPER else len(_PAPER))

    @cached_property
    def steps(self) -> int:
        """How long the runs were to be: the longest."""
        return max(run.last for run in self.runs)

    @cached_property
    def by_projection(self) -> bool:
        """Whether distances are taken between projections of the parameters: all runs that ended well recorded them."""
        return all(run.projection is not None for run in self.runs if self.outcomes[run.label].kind == "complete")

    @property
    def baseline(self) -> Run:
        """The first block's."""
        return self.blocks[0].baseline

    @cached_property
    def scope(self) -> str:
        """Ranks, seeds and length, for captions and claims."""
        seeds = len(self.blocks)
        return f"{self.baseline.ranks}, {seeds} seed{'s' * (seeds != 1)}, {self.steps} steps"

    @cached_property
    def not_begun(self) -> list[str]:
        """Planned arms of which no run is there, but for further reruns, which belong to an arm that is."""
        return sorted({stem_of(label) for label in self.plan.runs} - {run.stem for run in self.runs} - {plan.SPREAD})

    @cached_property
    def missing(self) -> list[str]:
        """Planned runs that are not there, of arms that have been begun."""
        absent = set(self.plan.runs) - {run.label for run in self.runs}
        return sorted(label for label in absent if stem_of(label) not in self.not_begun)

    def members(self, arm: str) -> Iterator[tuple[Block, Run]]:
        """All runs of an arm with their blocks."""
        for block in self.blocks:
            for run in block.arms.get(arm, ()):
                yield block, run

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        """How each run ended, by label."""
        return {run.label: outcome(run, block.baseline, self.steps) for block in self.blocks for run in block.runs}

    def failures(self, arm: str) -> list[tuple[Run, Outcome]]:
        """The runs of an arm that failed of themselves; of the baselines for `baseline`."""
        runs = [(b, b.baseline) for b in self.blocks] if arm == "baseline" else list(self.members(arm))
        ended = [(run, self.outcomes[run.label]) for _, run in runs]
        return [(run, how) for run, how in ended if how.kind == "failed"]

    def distance(self, one: Run, other: Run, *others: Run) -> float:
        """How far apart two trajectories lie, in units of the loss, or of the parameters.

        Of projections at the last step that all given runs recorded; otherwise the mean |loss difference| over the steps that
        all of them logged.
        """
        if self.by_projection:
            last = _last(one, other, *others)
            return np.nan if last is None else float(np.linalg.norm(_at(one, last) - _at(other, last)))
        steps, mine, its = common(one, other)
        for run in others:
            kept = np.isin(steps, run.steps["step"])
            steps, mine, its = steps[kept], mine[kept], its[kept]
        return float(np.mean(np.abs(mine - its))) if len(steps) else np.nan

    def size(self, run: Run) -> float:
        """What distances are relative to: the mean loss of a run, or the length of its last projection."""
        if not self.by_projection:
            return float(run.steps["loss"].abs().mean())
        last = _last(run)
        return np.nan if last is None else float(np.linalg.norm(_at(run, last)))


def study(runs: Sequence[Run], declared: plan.Plan, baseline: str = "baseline") -> Study:
    """Sorts runs into blocks and arms by their configurations, after checking that they may be compared.

    Args:
        runs: the runs, any number of them.
        declared: the study's plan.
        baseline: label of the runs to compare with, without the number: `baseline_2` is that of another block.

    Raises:
        InputError: no such baseline, nothing to compare, or runs that differ in what must be equal.
    """
    named = [run for run in runs if baseline in (run.label, run.stem)]
    if not named:
        raise InputError(
            f"no run is called {baseline!r} among {some([run.label for run in runs])}; name one with --baseline"
        )
    if len(runs) < 2:
        raise InputError(f"{baseline} is the only run, so there is nothing to compare; add runs beside it")
    require_equal(runs, free=VARIED)
    blocks: dict[tuple[object, object], Block] = {}
    reference = arms.settings(named[0])
    for run in named:
        if arms.settings(run) != reference:
            differs = ", ".join(arms.settings(run).differing(reference))
            raise InputError(
                f"runs {named[0].label} and {run.label} are both baselines but differ in {differs}: rename one of the folders"
            )
        blocks.setdefault((run.seed, run.data_seed), Block(run, {}))
    left_out = []
    taken = {block.baseline.label for block in blocks.values()}
    for run in runs:
        if run.label in taken:
            continue
        block, name = _place(run, blocks, reference)
        if block is None:
            left_out.append(f"{run.label} is left out: no baseline has its seeds ({run.seed}, data {run.data_seed}).")
        else:
            block.arms.setdefault(name, []).append(run)
    for block in blocks.values():
        same = [run for name, rs in block.arms.items() if name != NEW_ORDER for run in rs]
        require_same_frames([block.baseline, *same])
    _require_one_arm_a_label(blocks.values())
    return Study(tuple(blocks.values()), declared, tuple(left_out))


def _place(run: Run, blocks: dict[tuple[object, object], Block], reference: Settings) -> tuple[Block | None, str]:
    name = arms.name(arms.settings(run), reference)
    if (block := blocks.get((run.seed, run.data_seed))) is not None:
        return block, name
    for place, own, relation in ((1, run.data_seed, NEW_SEED), (0, run.seed, NEW_ORDER)):
        for seeds, block in blocks.items():
            if seeds[place] == own:
                return block, relation if name == RERUN else f"{relation}, {name}"
    return None, name


def _require_one_arm_a_label(blocks: Iterable[Block]) -> None:
    first: dict[str, tuple[str, str]] = {}
    for block in blocks:
        for name, runs in block.arms.items():
            for run in runs:
                label, before = first.setdefault(run.stem, (run.label, name))
                if before != name:
                    raise InputError(
                        f"runs {label} and {run.label} carry one name but differ: the one is {before!r}, the other {name!r}; "
                        "rename one of the folders"
                    )


def _notes(data: Study) -> list[str]:
    said = []
    for run in data.runs:
        how = data.outcomes[run.label]
        if how.kind == "failed":
            said.append(f"{run.label} {how.why}: this counts against its arm.")
        elif how.kind == "interrupted":
            said.append(f"{run.label} is {how.why}: give the study's command again to go on; until then it is missing.")
        if run.starts > 1:
            said.append(f"{run.label} was interrupted and resumed or replaced: it was started {run.starts} times.")
        if arms.mode(run) == "partly compiled":
            said.append(
                f"{run.label} was to be compiled, but {run.eager_share:.1%} of its steps ran eagerly: it is not called "
                "compiled."
            )
    if data.missing:
        said.append(f"The plan has {len(data.missing)} runs that are not there: {some(data.missing)}.")
    if data.not_begun:
        said.append(f"Planned and not run, so nothing is known of them: {', '.join(data.not_begun)}.")
    lengths = {run.last for run in data.runs}
    if len(lengths) > 1:
        said.append(
            f"The runs end between step {min(lengths)} and {max(lengths)}: each row uses the steps that its run and the "
            "baseline both logged, and differences grow with the steps."
        )
    for block in data.blocks:
        if rates := _rates(block):
            said.append(rates)
            break
    return said


def _rates(block: Block) -> str | None:
    """A note where the schedule, which may follow the validation loss, took other rates in some run."""
    if "lr" not in block.baseline.steps:
        return None
    parted = []
    for run in (r for name, rs in block.arms.items() if name != NEW_ORDER for r in rs):
        if "lr" in run.steps:
            steps, mine, its = common(block.baseline, run, "lr")
            differs = np.isfinite(mine) & np.isfinite(its) & (mine != its)
            parted += [int(steps[np.argmax(differs)])] if differs.any() else []
    if not parted:
        return None
    return f"Learning rates part at step {min(parted)}: from there on the schedule adds to the differences."


def _last(*runs: Run) -> int | None:
    """The last step that all runs recorded; None without one."""
    recorded = [set() if run.projection is None else set(run.projection["step"]) for run in runs]
    return max(set.intersection(*recorded), default=None)


def _at(run: Run, step: int) -> NDArray:
    """A run's projection at a step, `[64]`."""
    table = run.projection
    assert table is not None
    row = table[table["step"] == step].iloc[-1]
    return np.array([row[name] for name in table.columns if name.startswith("p") and name[1:].isdigit()], dtype=float)


def some(labels: Sequence[str]) -> str:
    """The first few of many."""
    return ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
