"""The two declared endpoints of a study of numerics, one number for each seed.

Final validation force error of an arm over the baseline's; and its distance from the baseline over that of a rerun. Both are
logarithms of ratios. A run that failed of itself counts as infinitely far.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ddpkit.analysis.arms import NEW_SEED, RERUN
from ddpkit.analysis.blocks import EXACT, SINGLE, Block, Study
from ddpkit.analysis.plan import DISTANCE, FORCE_ERROR
from ddpkit.analysis.runs import NDArray, Run
from ddpkit.analysis.statistics import Estimate, mean_interval


@dataclass(frozen=True)
class Evidence:
    """What the seeds say of one arm at one endpoint.

    Attributes:
        values: `[seeds]` logarithms of ratios; infinite where the arm failed and the baseline did not.
        seeds: whose they are.
        failed: labels of runs of the arm that failed of themselves.
        baseline_failed: labels of baselines (and reruns) that failed, whose seeds cannot be used.
        missing: number of seeds that lack a complete run.
        exact: whether the reruns agree with their baselines to rounding in float64, for every seed.
        identical: whether the arm does.
    """

    values: NDArray
    seeds: Sequence[str]
    failed: Sequence[str]
    baseline_failed: Sequence[str]
    missing: int
    exact: bool = False
    identical: bool = False

    @property
    def estimate(self) -> Estimate:
        """Mean of the logarithms with a 95 % interval."""
        return mean_interval(self.values)


@dataclass(frozen=True)
class Units:
    """An arm's distance in units that need no rerun, means over seeds.

    Attributes:
        relative: of the loss, or of the parameters.
        roundings: the same in roundings of float32.
        of_new_seed: of the distance of a new seed; NaN where there is none.
    """

    relative: float
    roundings: float
    of_new_seed: float


def evidence(study: Study, endpoint: str, arm: str) -> Evidence:
    """What the seeds say; `endpoint` is `force_error` or `distance`."""
    values, seeds, exact, identical = [], [], [], []
    failed, baseline_failed, missing = [], [], 0
    for block in study.blocks:
        runs = block.arms.get(arm, [])
        compared = [block.baseline, *(block.arms.get(RERUN, []) if endpoint == DISTANCE and arm != RERUN else [])]
        ended = [study.outcomes[run.label].kind for run in runs]
        compared_ended = [study.outcomes[run.label].kind for run in compared]
        failed += [run.label for run, kind in zip(runs, ended, strict=True) if kind == "failed"]
        baseline_failed += [run.label for run, kind in zip(compared, compared_ended, strict=True) if kind == "failed"]
        lacks_rerun = endpoint == DISTANCE and len(compared) < 2
        if not runs or lacks_rerun or "interrupted" in (*ended, *compared_ended):
            missing += 1
        elif "failed" in compared_ended:
            continue
        elif "failed" in ended:
            values.append(np.inf)
            seeds.append(block.seed)
        else:
            measured = (
                _force_error(block, runs) if endpoint == FORCE_ERROR else _distances(study, block, runs, compared[1:])
            )
            if measured is None:
                missing += 1
                continue
            values.append(measured[0])
            exact.append(measured[1])
            identical.append(measured[2])
            seeds.append(block.seed)
    whole = len(values) == len(exact) > 0
    return Evidence(
        np.array(values), seeds, failed, baseline_failed, missing,
        exact=whole and all(exact), identical=whole and all(identical),
    )  # fmt: skip


def table(study: Study) -> pd.DataFrame:
    """Both endpoints of every arm, a row an arm.

    Columns: `arm`, `seeds`, `failed` (runs); `force_percent` (final validation force error over the baseline's) and `distance`
    (from the baseline over that of a rerun; NaN where reruns are exact), each with `_low` and `_high` of its 95 % interval over
    seeds; `exact` (reruns are, to rounding in float64) and `identical` (the arm is); and the distance as in `Units`.
    """
    rows = []
    for arm in study.names:
        error, far, sizes = evidence(study, FORCE_ERROR, arm), evidence(study, DISTANCE, arm), units(study, arm)
        force, ratio = error.estimate.percent(), far.estimate.map(np.exp)
        if far.exact or arm == RERUN:
            ratio = Estimate(np.nan, np.nan, np.nan, 0)
        row = {
            "arm": arm,
            "seeds": sum(arm in block.arms for block in study.blocks),
            "failed": len(study.failures(arm)),
        }
        row |= {"force_percent": force.value, "force_low": force.low, "force_high": force.high}
        row |= {"distance": ratio.value, "distance_low": ratio.low, "distance_high": ratio.high}
        row |= {"exact": far.exact, "identical": far.identical}
        rows.append(row | {"relative": sizes.relative, "roundings": sizes.roundings, "of_new_seed": sizes.of_new_seed})
    return pd.DataFrame(rows)


def file_name(study: str) -> str:
    """What the table is called of a study in this folder: `endpoints.csv` of `numerics`."""
    return f"{study.replace('numerics', 'endpoints', 1) if 'numerics' in study else f'{study}-endpoints'}.csv"


def force_error(run: Run) -> float:
    """The validation force RMSE after the last epoch that was validated, eV/Å; NaN without one."""
    if "val_forces_rmse" not in run.epochs:
        return np.nan
    known = run.epochs["val_forces_rmse"].dropna()
    return float(known.iloc[-1]) if len(known) else np.nan


def units(study: Study, arm: str) -> Units:
    """How far an arm lies from its baselines, without a ratio to reruns."""
    relative, of_new_seed = [], []
    for block in study.blocks:
        runs = _complete(study, block, arm)
        far = [study.distance(block.baseline, run) for run in _complete(study, block, NEW_SEED)]
        for run in runs:
            distance = study.distance(block.baseline, run)
            relative.append(distance / study.size(block.baseline))
            of_new_seed += [distance / np.mean(far)] if far else []
    mean = float(np.mean(relative)) if relative else np.nan
    return Units(mean, mean / SINGLE, float(np.mean(of_new_seed)) if of_new_seed else np.nan)


def spread(study: Study) -> tuple[Block, NDArray] | None:
    """The block with most reruns, if it has three, and their distances from its baseline."""
    block = max(study.blocks, key=lambda b: len(_complete(study, b, RERUN)))
    runs = _complete(study, block, RERUN)
    if len(runs) < 3:
        return None
    return block, np.array([study.distance(block.baseline, run) for run in runs])


def _complete(study: Study, block: Block, arm: str) -> list[Run]:
    return [run for run in block.arms.get(arm, []) if study.outcomes[run.label].kind == "complete"]


def _force_error(block: Block, runs: Sequence[Run]) -> tuple[float, bool, bool] | None:
    base, errors = force_error(block.baseline), [force_error(run) for run in runs]
    if not (base > 0 and all(error > 0 for error in errors)):
        return None
    ratio = float(np.mean(np.log(errors)) - np.log(base))
    return ratio, False, all(error == base for error in errors)


def _distances(
    study: Study, block: Block, runs: Sequence[Run], reruns: Sequence[Run]
) -> tuple[float, bool, bool] | None:
    everyone = (*runs, *reruns)
    of_runs, of_reruns = (
        np.array([study.distance(block.baseline, run, *everyone) for run in rs]) for rs in (runs, reruns)
    )
    floor = EXACT * study.size(block.baseline)
    if not (np.isfinite(of_runs).all() and np.isfinite(of_reruns).all() and floor > 0):
        return None
    logs = [float(np.mean(np.log(np.maximum(distances, floor)))) for distances in (of_runs, of_reruns)]
    return logs[0] - logs[1], bool((of_reruns <= floor).all()), bool((of_runs <= floor).all())
