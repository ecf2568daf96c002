"""How far the losses of runs lie from their baseline's: the paper's Table 3, and what makes it robust.

The difference of two runs is the difference of their logged losses at each common step.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from ddpkit.analysis.arms import NEW_ORDER
from ddpkit.analysis.blocks import Block, Study
from ddpkit.analysis.published import published_numerics
from ddpkit.analysis.runs import NDArray, Run, common

CUT = 0.020
"""Boundary of the paper's histograms of loss differences."""

COLUMNS = (
    "run", "steps", "mae", "rmse", "max_abs", "median_abs", "mae_within", "outside", "outside_mean_abs",
    "relative_mae", "relative_median", "mae_first_third", "mae_last_third", "bitwise", "nonfinite",
    "arm", "baseline", "strategy", "compile", "seed", "data_seed", "deterministic", "ranks", "status", "outcome", "starts",
    "code", "published_mae", "published_rmse",
)  # fmt: skip


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
    """One row for each run against the baseline of its block, arm by arm, columns `COLUMNS`."""
    rows = [_row(data, block, arm, run) for arm in data.names for block, run in data.members(arm)]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(data: Study, block: Block, arm: str, run: Run) -> dict[str, object]:
    _, losses, baseline = differences(arm, block, run)
    values = published_numerics(run, block.baseline)
    ended = data.outcomes[run.label]
    return {
        "run": run.label,
        **summarize(losses - baseline, baseline),
        "arm": arm,
        "baseline": block.baseline.label,
        "strategy": run.strategy,
        "compile": run.compiled,
        "seed": run.seed,
        "data_seed": run.data_seed,
        "deterministic": run.deterministic,
        "ranks": run.world_size,
        "status": run.status,
        "outcome": ended.kind,
        "starts": run.starts,
        "code": run.code,
        "published_mae": values[0] if values else np.nan,
        "published_rmse": values[1] if values else np.nan,
    }


def differences(arm: str, block: Block, run: Run) -> tuple[NDArray, NDArray, NDArray]:
    """Common steps of a run and its baseline and both losses; none where the order of the data, and so each batch, is another."""
    if arm.startswith(NEW_ORDER):
        return np.empty(0), np.empty(0), np.empty(0)
    return common(run, block.baseline)


def pooled(data: Study, arm: str) -> NDArray:
    """Finite loss differences of all runs of an arm from their baselines."""
    found = [mine - its for _, mine, its in (differences(arm, block, run) for block, run in data.members(arm))]
    both = np.concatenate([*found, np.empty(0)])
    return both[np.isfinite(both)]


def same_code(data: Study) -> Iterator[str]:
    """What the digests of compiled code tell: equal ones are reruns, however often they were compiled."""
    for arm in data.names:
        runs = [run for _, run in data.members(arm)]
        codes = {run.code for run in runs}
        if len(runs) > 1 and None not in codes:
            said = "one code: compiled anew it is a rerun" if len(codes) == 1 else f"{len(codes)} different codes"
            yield f"{arm}: {len(runs)} runs of {said} ({', '.join(sorted(map(str, codes)))})."


def _mean(values: NDArray) -> float:
    return float(values.mean()) if len(values) else np.nan
