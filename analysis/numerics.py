"""How far training trajectories lie apart: the paper's Table 3, and what makes it robust.

The difference of two runs is the difference of their logged losses at each common step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ddpkit.analysis.published import published_numerics
from ddpkit.analysis.runs import NDArray, Run, align, logged, require_equal, require_same_frames
from ddpkit.errors import InputError

CUT = 0.020
"""Boundary of the paper's histograms of loss differences."""

COLUMNS = (
    "run", "steps", "mae", "rmse", "max_abs", "median_abs", "mae_within", "outside", "outside_mean_abs",
    "relative_mae", "relative_median", "mae_first_third", "mae_last_third", "bitwise", "nonfinite",
    "strategy", "compile", "seed", "deterministic", "status", "published_mae", "published_rmse",
)  # fmt: skip
_PAPER_ORDER = ("standard", "compiled", "rerun", "new_seed", "standard_compiled", "overlap", "ingraph")


@dataclass(frozen=True)
class Study:
    """All runs of a numerics study on one axis of steps.

    Attributes:
        baseline: the run that the others are compared with.
        runs: all runs, the baseline first.
        steps: `[steps]`, the union of what was logged.
        losses: `[runs, steps]`, NaN where nothing was logged.
        present: `[runs, steps]`, whether a run logged that step.
    """

    baseline: Run
    runs: tuple[Run, ...]
    steps: NDArray
    losses: NDArray
    present: NDArray

    def differences(self, run: int) -> tuple[NDArray, NDArray]:
        """Steps common to run and baseline, and the run's loss minus the baseline's there."""
        common = self.present[0] & self.present[run]
        return self.steps[common], self.losses[run, common] - self.losses[0, common]

    def arms(self) -> dict[str, list[int]]:
        """Numbers of the runs of each arm but the baseline, in the order of the table."""
        arms: dict[str, list[int]] = {}
        for number, run in enumerate(self.runs[1:], start=1):
            arms.setdefault(run.arm, []).append(number)
        return arms


def study(runs: Sequence[Run], baseline: str = "baseline") -> Study:
    """Puts runs on one axis, after checking that they may be compared.

    Args:
        runs: the runs, any number of them.
        baseline: label of the run to compare with.

    Raises:
        InputError: no such baseline, nothing to compare, or runs that differ in what must be equal.
    """
    labels = [run.label for run in runs]
    if baseline not in labels:
        raise InputError(f"no run is called {baseline!r} among {_some(labels)}; name one with --baseline")
    if len(runs) < 2:
        raise InputError(f"{baseline} is the only run, so there is nothing to compare; add runs beside it")
    require_equal(runs)
    require_same_frames(runs)
    _require_same_arm(runs)
    first = runs[labels.index(baseline)]
    ordered = (first, *sorted((run for run in runs if run is not first), key=_place))
    steps, losses = align(ordered)
    return Study(first, ordered, steps, losses, logged(ordered, steps))


def summarize(difference: NDArray, reference: NDArray) -> dict[str, float]:
    """Paper's and robust measures of a loss difference.

    Args:
        difference: `[steps]` loss minus the baseline's, in the order of the steps.
        reference: `[steps]` the baseline's loss.

    Returns:
        `mae`, `rmse`, `max_abs`; `median_abs`; `mae_within` of the points within ±0.020, number (`outside`) and mean
        size (`outside_mean_abs`) of those outside; `relative_mae` and `relative_median` of |difference| / |reference|;
        MAE of the first and of the last third of the steps; `bitwise`: whether every loss agrees to the last bit;
        `nonfinite`: steps left out because one of the two losses is NaN or infinite; `steps`: those that were used.
    """
    finite = np.isfinite(difference)
    size = np.abs(difference[finite])
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = size / np.abs(reference[finite])
    outside = size > CUT
    third = max(1, len(size) // 3)
    return {
        "steps": len(size),
        "mae": _mean(size),
        "rmse": float(np.sqrt(_mean(size**2))),
        "max_abs": float(size.max()) if len(size) else np.nan,
        "median_abs": float(np.median(size)) if len(size) else np.nan,
        "mae_within": _mean(size[~outside]),
        "outside": int(outside.sum()),
        "outside_mean_abs": _mean(size[outside]),
        "relative_mae": _mean(relative),
        "relative_median": float(np.median(relative)) if len(size) else np.nan,
        "mae_first_third": _mean(size[:third]),
        "mae_last_third": _mean(size[-third:]) if len(size) else np.nan,
        "bitwise": bool(len(size) and len(size) == len(difference) and not size.any()),
        "nonfinite": int((~finite).sum()),
    }


def table(data: Study) -> pd.DataFrame:
    """One row for each run against the baseline, columns `COLUMNS`."""
    rows = []
    for number, run in enumerate(data.runs[1:], start=1):
        common = data.present[0] & data.present[number]
        values = published_numerics(run, data.baseline)
        rows.append(
            {
                "run": run.label,
                **summarize(data.losses[number, common] - data.losses[0, common], data.losses[0, common]),
                "strategy": run.strategy,
                "compile": run.compiled,
                "seed": run.seed,
                "deterministic": run.deterministic,
                "status": run.status,
                "published_mae": values[0] if values else np.nan,
                "published_rmse": values[1] if values else np.nan,
            }
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def notes(data: Study) -> list[str]:
    """What a reader must know of these runs before reading the table."""
    said = []
    for status in ("running", "failed"):
        unfinished = [run for run in data.runs if run.status == status]
        if len(unfinished) == 1:
            said.append(f"{unfinished[0].label} is {status} at step {_last(unfinished[0])}: its logged steps are used.")
        elif unfinished:
            said.append(
                f"{_some([run.label for run in unfinished])} are {status} at steps {min(map(_last, unfinished))} to "
                f"{max(map(_last, unfinished))}: their logged steps are used."
            )
    for number, run in enumerate(data.runs):
        bad = int((~np.isfinite(data.losses[number, data.present[number]])).sum())
        if bad:
            said.append(f"{run.label} logged a loss that is not finite at {bad} steps; these are left out of its row.")
        if number and not (data.present[0] & data.present[number]).any():
            said.append(f"{run.label} shares no logged step with {data.baseline.label}: its row is empty.")
    rates = _learning_rates_part(data.runs)
    if rates:
        said.append(rates)
    lengths = {_last(run) for run in data.runs}
    if len(lengths) > 1:
        said.append(
            f"The runs end between step {min(lengths)} and {max(lengths)}: each row uses the steps that its run and the "
            "baseline both logged, and differences grow with the steps."
        )
    return said


def divergence(data: Study, arm: Sequence[int], points: int = 30) -> tuple[NDArray, NDArray]:
    """|difference| against step, as the mean over an arm's runs and over equal stretches of steps.

    Returns:
        the middle step of each stretch `[points]` and the mean absolute difference there.
    """
    pairs = [data.differences(number) for number in arm]
    steps = np.concatenate([s for s, _ in pairs])
    size = np.abs(np.concatenate([d for _, d in pairs]))
    keep = np.isfinite(size)
    steps, size = steps[keep], size[keep]
    if not len(steps):
        return np.empty(0), np.empty(0)
    edges = np.linspace(steps.min(), steps.max() + 1, min(points, len(np.unique(steps))) + 1)
    where = np.clip(np.digitize(steps, edges) - 1, 0, len(edges) - 2)
    count = np.bincount(where, minlength=len(edges) - 1)
    filled = count > 0
    middle = np.bincount(where, steps, minlength=len(count))[filled] / count[filled]
    return middle, np.bincount(where, size, minlength=len(count))[filled] / count[filled]


def _learning_rates_part(runs: Sequence[Run]) -> str | None:
    """A note where the schedule, which may follow the validation loss, took other rates in some runs."""
    usable = [run for run in runs if "lr" in run.steps and run.steps["lr"].notna().any()]
    if len(usable) < 2:
        return None
    steps, rates = align(usable, "lr")
    known = np.isfinite(rates)
    largest = np.where(known, rates, -np.inf).max(axis=0)
    parted = known.any(axis=0) & (largest != np.where(known, rates, np.inf).min(axis=0))
    if not parted.any():
        return None
    return f"Learning rates part at step {steps[parted][0]:.0f}: from there on the schedule adds to the differences."


def _place(run: Run) -> tuple[bool, int]:
    """The paper's order first, then the order of the labels; runs under deterministic kernels last."""
    known = _PAPER_ORDER.index(run.arm) if run.arm in _PAPER_ORDER else len(_PAPER_ORDER)
    return run.deterministic, known


def _require_same_arm(runs: Sequence[Run]) -> None:
    first: dict[str, Run] = {}
    for run in runs:
        mine = first.setdefault(run.arm, run)
        for name in ("strategy", "compiled", "deterministic", "comm"):
            if getattr(mine, name) != getattr(run, name):
                raise InputError(
                    f"runs {mine.label} and {run.label} carry one name but differ in {name} "
                    f"({getattr(mine, name)} and {getattr(run, name)}); rename one of the folders"
                )


def _last(run: Run) -> int:
    """The last logged step."""
    return int(run.steps["step"].max())


def _mean(values: NDArray) -> float:
    return float(values.mean()) if len(values) else np.nan


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:8]) + (f" and {len(labels) - 8} more" if len(labels) > 8 else "")
