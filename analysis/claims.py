"""The paper's claims, each with a verdict in plain words and the numbers that it rests on."""

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ddpkit.analysis import speed
from ddpkit.analysis.equivalence import MARGIN, MOST, PLANNED, RatioTest, distances, ratio_test
from ddpkit.analysis.numerics import Study
from ddpkit.analysis.runs import NDArray, Run
from ddpkit.analysis.tables import number, span

HOLDS = "holds"
FAILS = "does not hold"
OPEN = "cannot be told from these runs"
_NO_SPREAD = f"{OPEN}, in which reruns agree to the last bit"
_ELSEWHERE = "there is no spread of reruns to hold this against: runs where reruns differ must answer it"


@dataclass(frozen=True)
class Claim:
    """A claim and what the runs say of it.

    Attributes:
        claim: one sentence.
        published: what the paper's figures are.
        verdict: `holds`, `does not hold`, or `cannot be told from these runs: about N more are needed`.
        reason: the measured numbers behind it.
    """

    claim: str
    published: str
    verdict: str
    reason: str

    @property
    def kind(self) -> str:
        """`holds`, `fails` or `open`."""
        return "holds" if self.verdict.startswith(HOLDS) else "fails" if self.verdict.startswith(FAILS) else "open"


@dataclass(frozen=True)
class Comparison:
    """A ratio test between arms, for the table of tests, and the same with medians over the steps for means."""

    name: str
    test: RatioTest
    by_median: RatioTest
    margin: float


@dataclass(frozen=True)
class Trajectories:
    """The runs of a numerics study that can serve in tests, in arms told by their configurations.

    Attributes:
        study: the study.
        members: numbers of the runs of each arm; `custom` holds the baseline and its reruns.
        left_out: labels of runs that are too short for the tests.
    """

    study: Study
    members: dict[str, list[int]]
    left_out: tuple[str, ...]

    @cached_property
    def steps(self) -> NDArray:
        """The steps common to all of them."""
        used = [number for arm in self.members.values() for number in arm]
        common = self.study.present[used].all(axis=0)
        return np.asarray(common)

    @cached_property
    def pairwise(self) -> NDArray:
        """Mean absolute differences `[runs, runs]` over the common steps; NaN for runs outside the tests."""
        return self._distances(np.mean)

    @cached_property
    def pairwise_median(self) -> NDArray:
        """Median absolute differences `[runs, runs]`, which single spikes do not move."""
        return self._distances(np.median)

    @cached_property
    def loss(self) -> float:
        """Mean loss of the baseline over the common steps."""
        return float(np.nanmean(self.study.losses[0, self.steps]))

    def test(self, top: tuple[str, str], below: tuple[str, str], *, by_median: bool = False) -> RatioTest | None:
        """The ratio test of the distances between two pairs of arms; None where an arm has no run."""
        arms = [self.members.get(name, []) for name in (*top, *below)]
        if not all(arms):
            return None
        pairwise = self.pairwise_median if by_median else self.pairwise
        return ratio_test(pairwise, (arms[0], arms[1]), (arms[2], arms[3]))

    def _distances(self, over_steps: Callable[..., NDArray]) -> NDArray:
        count = len(self.study.runs)
        used = np.array(sorted(number for arm in self.members.values() for number in arm))
        result = np.full((count, count), np.nan)
        result[np.ix_(used, used)] = distances(self.study.losses[np.ix_(used, np.flatnonzero(self.steps))], over_steps)
        return result


def trajectories(study: Study) -> Trajectories:
    """Sorts the runs that share the baseline's kernels into arms; runs of less than half the median length stay out."""
    ends = [int(run.steps["step"].max()) for run in study.runs]
    enough = 0.5 * float(np.median(ends))
    members: dict[str, list[int]] = {}
    left_out = []
    for number_, run in enumerate(study.runs):
        name = _arm(run, study.baseline)
        if name is None:
            continue
        if ends[number_] < enough:
            left_out.append(run.label)
        else:
            members.setdefault(name, []).append(number_)
    return Trajectories(study, members, tuple(left_out))


def comparisons(data: Trajectories) -> list[Comparison]:
    """Every arm's distance to the baseline's arm over the distance of reruns to each other, and new seed over standard."""
    rerun = ("custom", "custom")
    wanted = [(f"{name} / rerun", (name, "custom"), rerun, MARGIN) for name in data.members if name != "custom"]
    wanted.append(("new seed / standard", ("new seed", "custom"), ("standard", "custom"), 1.0))
    found = []
    for name, top, below, margin in wanted:
        test, by_median = data.test(top, below), data.test(top, below, by_median=True)
        if test and by_median:
            found.append(Comparison(name, test, by_median, margin))
    return found


def numerics_claims(data: Trajectories) -> list[Claim]:
    """Verdicts on the claims of the paper's numerics section."""
    same = "changes the training trajectory no more than rerunning the job does."
    extensions = [name for name in ("standard compiled", "overlap", "ingraph") if name in data.members]
    return [
        _equivalent(data, "standard", f"Standard DDP {same}", "MAE 0.00073 for standard against 0.00079 for the rerun"),
        _deviates(data),
        _new_seed(data),
        *(_equivalent(data, name, f"Strategy {name} {same}", "not run") for name in extensions),
    ]


def speed_claims(data: speed.Study) -> list[Claim]:
    """Verdicts on the claims of the paper's speed section."""
    claims = []
    sizes = sorted({cell.parameters for cell in data.times})
    published = {sizes[-1]: ("+5.0 %", "-7.5 %"), sizes[0]: ("+0.7 %", "-8.5 %")}
    for size in dict.fromkeys((sizes[0], sizes[-1])):
        where = f"with {size:,} parameters"
        costs, gains = (speed.Cell(size, "custom", compiled) for compiled in (False, True))
        slower = f"Custom DDP costs time against standard DDP {where}."
        faster = f"Custom DDP with compilation is faster than standard eager DDP {where}."
        claims += [
            _sign(data, costs, 1, slower, published[size][0]),
            _sign(data, gains, -1, faster, published[size][1]),
        ]
    return [*claims, _growing(data, len(sizes))]


def needed(more: int | None, what: str = "") -> str:
    """The verdict that leaves a claim open, with the number of further measurements that would settle it."""
    about = f"more than {MOST}" if more is None else f"about {more}"
    return f"{OPEN}: {about} more {what}{'is' if more == 1 else 'are'} needed"


def _arm(run: Run, baseline: Run) -> str | None:
    if run.deterministic != baseline.deterministic or run.comm != baseline.comm:
        return None
    if (run.strategy, run.compiled) == (baseline.strategy, baseline.compiled):
        return "custom" if run.seed == baseline.seed else "new seed"
    if run.seed != baseline.seed:
        return None
    if run.strategy == "custom":
        return "compiled"
    return f"{run.strategy}{' compiled' if run.compiled and run.strategy != 'ingraph' else ''}"


def _measured(test: RatioTest, margin: float) -> str:
    text = (
        f"ratio of mean pairwise distances {number(test.ratio)} ({number(test.numerator)} / {number(test.denominator)})"
    )
    if math.isfinite(test.lower):
        text += f", 90 % interval [{number(test.lower)}, {number(test.upper)}] against the margin {margin:g}"
    counts = " and ".join(str(n) for n in test.runs)
    return f"{text}; {counts} runs an arm"


def _power_said(test: RatioTest) -> str:
    power = test.power()
    if not math.isfinite(power):
        return ""
    return f"; if the arms were truly equal, runs like these would show it with probability {power:.2f}"


def _robustly(data: Trajectories, arm: str) -> str:
    """The ratio of medians over the steps, for a reader who wonders whether single spikes made the ratio of means."""
    test = data.test((arm, "custom"), ("custom", "custom"), by_median=True)
    if test is None or not math.isfinite(test.ratio):
        return ""
    interval = f" [{number(test.lower)}, {number(test.upper)}]" if math.isfinite(test.lower) else ""
    return f"; with the median over the steps, which spikes do not move, the ratio is {number(test.ratio)}{interval}"


def _size(data: Trajectories, test: RatioTest) -> str:
    return f"{number(test.numerator)} on average, {number(test.numerator / data.loss)} of the loss"


def _missing(claim: str, published: str, what: str, more: int) -> Claim:
    return Claim(claim, published, needed(more), f"there is no {what}")


def _equivalent(data: Trajectories, arm: str, claim: str, published: str) -> Claim:
    test = data.test((arm, "custom"), ("custom", "custom"))
    if test is None:
        return _missing(claim, published, f"run of {arm}", _absent(data, arm))
    if test.identical and test.numerator == 0:
        reason = f"{arm} and all reruns agree to the last bit, so nothing is tested"
        return Claim(claim, published, f"{HOLDS}: identical", reason)
    if test.identical:
        return Claim(claim, published, _NO_SPREAD, f"{arm} differs from them by {_size(data, test)}; {_ELSEWHERE}")
    reason = _measured(test, MARGIN) + _power_said(test) + _robustly(data, arm)
    verdict = HOLDS if test.below() else FAILS if test.above() else needed(test.more_runs())
    return Claim(claim, published, verdict, reason)


def _deviates(data: Trajectories) -> Claim:
    claim = "Compiled training deviates notably more than a rerun does."
    published = "MAE 0.00280 against 0.00079, RMSE 0.0264 against 0.00175"
    test = data.test(("compiled", "custom"), ("custom", "custom"))
    if test is None:
        return _missing(claim, published, "compiled run", _absent(data, "compiled"))
    if test.identical and test.numerator == 0:
        reason = "compiled and all reruns agree to the last bit, so nothing is tested"
        return Claim(claim, published, f"{FAILS}: identical", reason)
    if test.identical:
        return Claim(claim, published, _NO_SPREAD, f"compiled differs from them by {_size(data, test)}; {_ELSEWHERE}")
    reason = _measured(test, MARGIN) + _robustly(data, "compiled")
    verdict = HOLDS if test.above() else FAILS if test.below() else needed(test.more_runs())
    return Claim(claim, published, verdict, reason)


def _new_seed(data: Trajectories) -> Claim:
    claim = "A new seed changes the losses more than the choice between standard and custom DDP does."
    published = "MAE 0.00410 for the new seed against 0.00073 for standard"
    test = data.test(("new seed", "custom"), ("standard", "custom"))
    if test is None:
        absent = "new seed" if "new seed" not in data.members else "standard"
        return _missing(claim, published, f"run of {absent}", _absent(data, "new seed") + _absent(data, "standard"))
    if test.identical and test.numerator == 0:
        return Claim(claim, published, FAILS, "runs with a new seed agree with the baseline to the last bit")
    if test.identical:
        reason = f"standard agrees with custom to the last bit; a new seed differs by {_size(data, test)}"
        return Claim(claim, published, HOLDS, reason)
    verdict = HOLDS if test.above(1.0) else FAILS if test.below(1.0) else needed(test.more_runs(1.0))
    return Claim(claim, published, verdict, _measured(test, 1.0))


def _absent(data: Trajectories, arm: str) -> int:
    return max(0, PLANNED - len(data.members.get(arm, [])))


def _sign(data: speed.Study, cell: speed.Cell, sign: int, claim: str, published: str) -> Claim:
    missing = [c.name for c in (cell, data.reference(cell)) if c not in data.times]
    if missing:
        return Claim(claim, published, needed(speed.FEWEST_REPEATS), f"there is no run of {missing[0]} at this size")
    return _signed(claim, published, speed.relative_percent(data, cell), sign, data, "%")


def _growing(data: speed.Study, sizes: int) -> Claim:
    claim = "The cost of custom DDP against standard DDP grows with the number of parameters."
    published = "from +0.7 % at 32.1 M to +5.0 % at 114 M"
    estimate = speed.cost_growth(data, "custom", False)
    if estimate is None:
        reason = (
            "custom and standard eager runs at two sizes are needed" if sizes > 1 else "there is one model size only"
        )
        return Claim(claim, published, needed(2 * speed.FEWEST_REPEATS), reason)
    return _signed(claim, published, estimate, 1, data, "percentage points")


def _signed(claim: str, published: str, estimate: speed.Estimate, sign: int, data: speed.Study, measure: str) -> Claim:
    what, unit = f"{estimate.value:+.1f} {measure}", data.unit
    if not data.is_paired:
        runs = min(len(runs) for runs in data.runs.values())
        reason = (
            f"{what}, but the runs followed one another and did not take turns, so that drift of the machine is not told from "
            "the difference"
        )
        return Claim(claim, published, needed(speed.FEWEST_REPEATS - runs, "runs of each configuration "), reason)
    if not np.isfinite(estimate.low):
        return Claim(
            claim, published, needed(speed.FEWEST_REPEATS - 1, f"{unit}s "), f"{what}, from one {unit}: no interval"
        )
    reason = f"{what}, 95 % interval {span(estimate.low, estimate.high)} over {estimate.count} paired {unit}s"
    if estimate.resolved:
        return Claim(claim, published, HOLDS if estimate.value * sign > 0 else FAILS, reason)
    return Claim(
        claim, published, needed(estimate.more(), f"{unit}s "),
        f"{reason}; it covers zero, so this hardware and these runs do not resolve the difference",
    )  # fmt: skip


def summary(claims: Sequence[Claim]) -> str:
    """The verdicts as text, one claim after the other."""
    lines = []
    for claim in claims:
        lines.append(f"- {claim.claim}")
        lines.append(_indented(f"{claim.verdict}."))
        lines.append(_indented(_sentence(claim.reason)))
    return "\n".join(lines)


def _indented(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
