"""How trajectories part: growth of their distance along a run, where it saturates, and single steps that stand out."""

from dataclasses import dataclass

import numpy as np

from ddpkit.analysis.arms import NEW_SEED
from ddpkit.analysis.blocks import EXACT, SINGLE, Block, Study
from ddpkit.analysis.numerics import differences
from ddpkit.analysis.plan import WINDOW
from ddpkit.analysis.runs import NDArray, Run
from ddpkit.analysis.statistics import Estimate, mean_interval

SATURATED = 0.5
"""A distance has saturated that is this share of a new seed's."""
SPIKE = 20.0
"""A spike is a loss difference of so many times the median of its neighbours'."""
_NEIGHBOURS = 25  # steps on each side


@dataclass(frozen=True)
class Spikes:
    """Single-step spikes of the loss difference from the baseline.

    Attributes:
        count: how many.
        steps: among how many logged steps.
        largest: the largest, in units of the loss; 0 without one.
        runs: in how many runs.
    """

    count: int
    steps: int
    largest: float
    runs: int


@dataclass(frozen=True)
class Divergence:
    """How an arm parts from its baselines.

    Attributes:
        growth: exponent p of distance ~ step^p over the declared window, over seeds; None without projections.
        saturates: the median step at which the distance is half that of a new seed; None where it is never.
        probe: relative difference of the loss on the fixed batch after the last step, mean of absolute values.
        spikes: of the losses.
    """

    growth: Estimate | None
    saturates: float | None
    probe: float
    spikes: Spikes


def divergence(study: Study, arm: str) -> Divergence:
    """How an arm parts from its baselines."""
    growths, saturated, probes = [], [], []
    for block in study.blocks:
        runs = [run for run in block.arms.get(arm, []) if study.outcomes[run.label].kind == "complete"]
        exponents = [growth(*curve(block.baseline, run), study.steps) for run in runs]
        exponents = [g for g in exponents if np.isfinite(g)]
        growths += [float(np.mean(exponents))] if exponents else []
        for run in runs:
            saturated.append(_saturates(block, run))
            probes.append(_probe(block.baseline, run))
    known = [step for step in saturated if step is not None]
    return Divergence(
        mean_interval(np.array(growths)) if growths else None,
        float(np.median(known)) if 2 * len(known) > len(saturated) else None,
        float(np.nanmean(probes)) if np.isfinite(probes).any() else np.nan,
        spikes(study, arm),
    )


def curve(baseline: Run, run: Run) -> tuple[NDArray, NDArray]:
    """Distance of the projections at the steps that both recorded; empty where one did not record any."""
    if baseline.projection is None or run.projection is None:
        return np.empty(0), np.empty(0)
    one, other = (r.projection.set_index("step") for r in (baseline, run))  # type: ignore[union-attr]
    numbers = [name for name in one.columns if name.startswith("p") and name[1:].isdigit()]
    steps = one.index.intersection(other.index)
    difference = one.loc[steps, numbers].to_numpy(float) - other.loc[steps, numbers].to_numpy(float)
    distance = np.linalg.norm(difference, axis=1)
    floor = EXACT * np.linalg.norm(one.loc[steps, numbers].to_numpy(float), axis=1)
    return steps.to_numpy(float), np.where(distance > floor, distance, 0.0)


def growth(steps: NDArray, distance: NDArray, length: int) -> float:
    """Exponent p of distance ~ step^p by least squares of logarithms in the window; NaN with fewer than three points."""
    inside = (steps >= max(1, WINDOW[0] * length)) & (steps <= WINDOW[1] * length) & (distance > 0)
    if inside.sum() < 3:
        return np.nan
    return float(np.polyfit(np.log(steps[inside]), np.log(distance[inside]), 1)[0])


def spikes(study: Study, arm: str) -> Spikes:
    """Steps whose loss difference stands out from those before and after, and from rounding in float32."""
    count, total, largest, runs = 0, 0, 0.0, 0
    for block, run in study.members(arm):
        _, losses, baseline = differences(arm, block, run)
        steps = spike_steps(losses - baseline, baseline)
        size = np.abs(losses - baseline)[steps]
        count, total, runs = count + len(size), total + len(losses), runs + bool(len(size))
        largest = max(largest, float(size.max(initial=0.0)))
    return Spikes(count, total, largest, runs)


def spike_steps(difference: NDArray, loss: NDArray) -> NDArray:
    """Places of spikes in `[steps]` differences: `SPIKE` times the median of the 50 neighbours, and more than rounding."""
    size = np.where(np.isfinite(difference), np.abs(difference), 0.0)
    if not len(size):
        return np.empty(0, dtype=int)
    padded = np.pad(size, _NEIGHBOURS, mode="reflect" if len(size) > _NEIGHBOURS else "edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * _NEIGHBOURS + 1)
    around = np.median(np.delete(windows, _NEIGHBOURS, axis=1), axis=1)
    return np.flatnonzero((size > SPIKE * around) & (size > 8 * SINGLE * np.abs(loss)))


def _saturates(block: Block, run: Run) -> float | None:
    steps, distance = curve(block.baseline, run)
    far = [dict(zip(*curve(block.baseline, other), strict=True)) for other in block.arms.get(NEW_SEED, [])]
    for step, size in zip(steps, distance, strict=True):
        apart = [one[step] for one in far if step in one]
        if step > 0 and apart and size >= SATURATED * np.mean(apart):
            return float(step)
    return None


def _probe(baseline: Run, run: Run) -> float:
    if baseline.projection is None or run.projection is None or "probe_loss" not in run.projection:
        return np.nan
    one, other = (r.projection.set_index("step")["probe_loss"] for r in (baseline, run))  # type: ignore[union-attr]
    steps = one.index.intersection(other.index)
    return float(abs(other[steps[-1]] / one[steps[-1]] - 1)) if len(steps) else np.nan
