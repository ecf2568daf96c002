"""The primary claims of a study, each with a verdict in plain words and the numbers that it rests on.

Only what was declared beforehand gets a verdict. Holm's procedure over these keeps the rate of false statements of each kind
(holds, does not hold) to 5 % a study.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ddpkit.analysis import arms, speed
from ddpkit.analysis.blocks import Study
from ddpkit.analysis.endpoints import Evidence, evidence, units
from ddpkit.analysis.plan import DISTANCE, FEWEST, FORCE_ERROR, MARGINS, TIME, Declared
from ddpkit.analysis.statistics import LEVEL, Test, equivalence, holm, most_that_deviate
from ddpkit.analysis.tables import number, span

HOLDS = "holds"
FAILS = "does not hold"
OPEN = "cannot be told from these runs"

_ORDER_ALONE = frozenset({"strategy", "options", "comm", "nccl_algo"})
_LOSSLESS = frozenset({"standard", "custom", "overlap", "emulated"})


@dataclass(frozen=True)
class Claim:
    """A claim and what the runs say of it.

    Attributes:
        claim: one sentence, with ranks, seeds or launches, and length.
        published: what the paper's figures are.
        verdict: `holds`, `does not hold`, or `cannot be told from these runs: WHY`.
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
class Weighed:
    """A declared claim of a study of numerics with its evidence, before Holm's procedure.

    Attributes:
        declared: the claim.
        evidence: what the seeds say.
        test: its p-values.
        untested: why there is no test; empty where there is one.
    """

    declared: Declared
    evidence: Evidence
    test: Test
    untested: str


def numerics_claims(study: Study) -> list[Claim]:
    """Verdicts on what the study declared."""
    weighed = [weigh(study, claim) for claim in study.plan.primary if claim.endpoint in MARGINS]
    inside, outside = (holm([getattr(one.test, side) for one in weighed]) for side in ("inside", "outside"))
    return [_numerics_claim(study, one, p_in, p_out) for one, p_in, p_out in zip(weighed, inside, outside, strict=True)]


def weigh(study: Study, claim: Declared) -> Weighed:
    """What the runs say of one claim, without regard to the others."""
    seen = evidence(study, claim.endpoint, claim.arm)
    untested = _untested(study, claim, seen)
    test = equivalence(seen.values, margin(claim.endpoint), two_sided=claim.endpoint == FORCE_ERROR)
    if untested:
        test = Test(test.estimate, 1.0, 1.0)
    elif seen.failed or seen.baseline_failed:
        test = Test(test.estimate, 1.0, test.outside)
    return Weighed(claim, seen, test, untested)


def margin(endpoint: str) -> float:
    """The declared margin, as a logarithm of a ratio."""
    return float(np.log1p(MARGINS[endpoint]))


def says_nothing(study: Study, arm: str) -> bool:
    """Whether an arm differs from the baseline in the order of sums over at most two ranks, which have one order."""
    run = next((run for _, run in study.members(arm)), None)
    if run is None or (run.world_size or 3) > 2:
        return False
    mine, its = arms.settings(run), arms.settings(study.baseline)
    lossless = {mine.strategy, its.strategy} <= _LOSSLESS and "reduce_dtype" not in dict(mine.options + its.options)
    return set(mine.differing(its)) <= _ORDER_ALONE and mine.mode == "eager" and lossless


def _untested(study: Study, claim: Declared, seen: Evidence) -> str:
    fewest, seeds = FEWEST[claim.endpoint], len(study.blocks)
    if not any(study.members(claim.arm)):
        return f"there is no run of {claim.arm}"
    if says_nothing(study, claim.arm):
        return "on two ranks a sum of gradients has one order, so bucketed and flat cannot differ and nothing is tested"
    if seeds < fewest:
        return f"there {'is 1 seed' if seeds == 1 else f'are {seeds} seeds'}, and a test needs {fewest}"
    if study.missing:
        return f"{len(study.missing)} of {len(study.plan.runs)} planned runs are not there"
    if seen.missing:
        what = "validation errors" if claim.endpoint == FORCE_ERROR else "reruns and distances"
        return f"{seen.missing} of {seeds} seeds lack complete runs with {what}"
    return ""


def _numerics_claim(study: Study, one: Weighed, inside: float, outside: float) -> Claim:
    by_error = one.declared.endpoint == FORCE_ERROR
    arm = one.declared.arm
    sentence = (
        f"Arm {arm!r} ends with the baseline's validation force error, within 5 %"
        if by_error
        else f"Arm {arm!r} lies no further from the baseline than a rerun does, within a factor of 1.5"
    )
    if one.untested:
        verdict = f"{OPEN}: {one.untested}"
    elif inside <= LEVEL:
        verdict = f"{HOLDS}: identical" if one.evidence.identical else HOLDS
    elif outside <= LEVEL:
        verdict = FAILS
    elif one.evidence.failed or one.evidence.baseline_failed:
        verdict = f"{OPEN}: runs failed"
    else:
        verdict = f"{OPEN}: the interval reaches over the margin"
    said = [*_failures_said(study, one), _force_said(one) if by_error else _distance_said(study, one)]
    if not one.untested and (p := min(inside, outside)) < 1:
        said.append(f"p = {number(p, 2)} after Holm over the {len(study.plan.primary)} primary claims")
    return Claim(
        f"{sentence} ({study.scope}).", _published(arm, by_error=by_error), verdict, "; ".join(filter(None, said))
    )


def _failures_said(study: Study, one: Weighed) -> list[str]:
    said = []
    of_arm = sum(1 for _ in study.members(one.declared.arm))
    if one.evidence.failed:
        said.append(
            f"{len(one.evidence.failed)} of {of_arm} runs of {one.declared.arm} failed ({', '.join(one.evidence.failed)})"
        )
    if one.evidence.baseline_failed:
        said.append(f"of the runs to compare with {', '.join(one.evidence.baseline_failed)} failed")
    return said


def _force_said(one: Weighed) -> str:
    seen = one.evidence
    usable = seen.values[np.isfinite(seen.values)]
    if not len(usable):
        return "no seed has both validation errors"
    if seen.identical:
        return f"the validation force errors are equal to the last bit (seeds: {len(usable)})"
    percent = 100 * np.expm1(usable)
    others = "of the others, " if seen.failed else ""
    text = f"{others}validation force RMSE {100 * np.expm1(usable.mean()):+.3g} % against the baseline's"
    return text + _seeds_said(one, percent, 100 * np.expm1(margin(FORCE_ERROR)), "%")


def _distance_said(study: Study, one: Weighed) -> str:
    seen, arm = one.evidence, one.declared.arm
    usable = seen.values[np.isfinite(seen.values)]
    sizes = units(study, arm)
    apart = f"{number(sizes.relative)} of the {'parameters' if study.by_projection else 'loss'}"
    apart += f" ({number(sizes.roundings)} roundings of float32"
    apart += f", {number(sizes.of_new_seed)} of a new seed's distance)" if np.isfinite(sizes.of_new_seed) else ")"
    if seen.exact and seen.identical:
        return (
            f"reruns are exact, and {arm} agrees with its baselines too, to rounding in float64 (seeds: {len(usable)})"
        )
    if seen.exact:
        return f"reruns are exact, so there is no ratio: {arm} differs by {apart}"
    if not len(usable):
        return "no seed has both distances" + (f"; {arm} differs by {apart}" if np.isfinite(sizes.relative) else "")
    others = "of the others, " if seen.failed else ""
    text = f"{others}distance {number(float(np.exp(usable.mean())))} times a rerun's"
    return text + _seeds_said(one, np.exp(usable), float(np.exp(margin(DISTANCE))), "times") + f"; it is {apart}"


def _seeds_said(one: Weighed, values: np.ndarray, limit: float, unit: str) -> str:  # type: ignore[type-arg]
    """The interval, the range of single seeds, and how many of all seeds may deviate unseen."""
    test, count = one.test, len(one.evidence.values)
    text = ""
    if np.isfinite(test.estimate.low):
        bounds = (test.estimate.low, test.estimate.high)
        low, high = (100 * np.expm1(x) if unit == "%" else np.exp(x) for x in bounds)
        text = (
            f", 90 % interval [{low:+.3g}, {high:+.3g}]"
            if unit == "%"
            else f", 90 % interval [{number(low)}, {number(high)}]"
        )
    text += (
        f" over {count} seed{'s' * (count != 1)} (single ones {number(values.min())} to {number(values.max())} {unit})"
    )
    beyond = int((np.abs(values) > limit).sum()) + count - len(values)
    if count >= 2 and not beyond:
        text += f"; none beyond the margin, so at most {most_that_deviate(count):.0%} of all seeds are"
    elif beyond:
        text += f"; {beyond} of {count} beyond the margin"
    return text


def _published(arm: str, *, by_error: bool) -> str:
    if by_error:
        return "not given"
    return {
        "standard": "MAE of the loss 0.00073 for standard against 0.00079 for the rerun, one run each",
        "compiled": "MAE of the loss 0.00280 for compiled against 0.00079 for the rerun, one run each",
    }.get(arm, "not run")


def speed_claims(data: speed.Study) -> list[Claim]:
    """Verdicts on what the study declared of times: arms against standard eager at the smallest and the largest size."""
    sizes = sorted({cell.parameters for cell in data.times})
    cells = [
        speed.Cell(size, *_cell(claim.arm))
        for claim in data.plan.primary
        if claim.endpoint == TIME
        for size in dict.fromkeys((sizes[0], sizes[-1]))
    ]
    measured = [speed.relative(data, cell) for cell in cells]
    untested = [_untimed(data, cell, one.estimate.count) for cell, one in zip(cells, measured, strict=True)]
    p_values = holm([1.0 if why else one.p for one, why in zip(measured, untested, strict=True)])
    return [_speed_claim(data, *each) for each in zip(cells, measured, untested, p_values, strict=True)]


def _cell(arm: str) -> tuple[str, bool]:
    strategy, _, rest = arm.partition(" ")
    return strategy, rest == "compiled"


def _untimed(data: speed.Study, cell: speed.Cell, launches: int) -> str:
    for needed in (cell, data.reference(cell)):
        if needed not in data.times:
            return f"there is no run of {needed.name} at this size"
    if launches < FEWEST[TIME]:
        return f"there {'is 1 pair' if launches == 1 else f'are {launches} pairs'} of launches, and a test needs {FEWEST[TIME]}"
    if not data.in_turns and not data.plan.declared:
        return "the runs followed one another in an order that no plan has drawn, so that drift of the machine may look like it"
    if (again := speed.relative(data, data.again(cell)).estimate).excludes_zero:
        return f"two launches of the same thing differ ({span(again.low, again.high)} %), so these times are not calibrated"
    return ""


def _speed_claim(data: speed.Study, cell: speed.Cell, one: speed.Relative, untested: str, p: float) -> Claim:
    paper = speed.published_percent(data, cell)
    published = "not given" if paper is None else f"{paper:+.1f} %"
    estimate = one.estimate.percent()
    text = f"{estimate.value:+.1f} %"
    if np.isfinite(estimate.low):
        text += f", 95 % interval {span(estimate.low, estimate.high)} over {estimate.count} pairs of launches"
    if one.within is not None:
        launches = f"{one.between:.1f} % between launches, " if np.isfinite(one.between) else ""
        text += f"; spread {launches}{one.within:.1f} % between epochs of one launch"
    if untested:
        verdict = f"{OPEN}: {untested}"
    elif p <= LEVEL:
        verdict = HOLDS if estimate.value > 0 else FAILS
    else:
        verdict = f"{OPEN}: the difference lies between {estimate.low:+.1f} and {estimate.high:+.1f} %"
    if not untested:
        text += f"; p = {number(p, 2)} after Holm"
    claim = (
        f"{cell.name[0].upper()}{cell.name[1:]} takes longer than standard eager with {cell.parameters:,} parameters"
    )
    return Claim(f"{claim} ({data.scope}).", published, verdict, text)


def summary(claims: Sequence[Claim]) -> str:
    """The verdicts as text, one claim after the other."""
    lines = []
    for claim in claims:
        lines.append(textwrap.fill(f"- {claim.claim}", 100, subsequent_indent="  "))
        lines.append(_indented(f"{claim.verdict}."))
        lines.append(_indented(_sentence(claim.reason)))
    return "\n".join(lines)


def _indented(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ")


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
