"""Is one arm as close to another as reruns are to each other? Tested on runs, not on steps.

Steps of one run are no independent sample: differences grow and stay. The unit is the run. The distance of two runs is
the mean absolute difference of their losses over the steps common to all runs of the test, and the statistic is the
ratio of two mean pairwise distances. Its logarithm is jackknifed by run within each arm, and the interval takes
Student's t with the degrees of freedom of the smaller arm. (A bootstrap by run was tried: at three to six runs it
declares equivalence up to five times more often than its level allows, for it resamples too few distinct pairs.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ddpkit.analysis.runs import NDArray

MARGIN = 1.5
"""Declared before any run: a ratio of mean pairwise distances below this counts as equal."""
LEVEL = 0.05
"""Error rate of each one-sided statement."""
POWER = 0.80
"""Wanted probability of a verdict, for the number of runs that is advised."""
FEWEST = 3
"""Runs an arm must have before its spread can be told at all."""
PLANNED = 6
"""Runs an arm is planned with where there are too few to plan from: a baseline and five reruns."""
MOST = 200
"""Where this many runs an arm would not do, no number is advised."""


@dataclass(frozen=True)
class RatioTest:
    """Outcome of a test on a ratio of mean pairwise distances.

    Attributes:
        numerator: mean distance above the line, in units of the loss.
        denominator: mean distance below the line.
        lower, upper: one-sided 95 % bounds of the ratio each (together a two-sided 90 % interval); NaN where there are
            too few runs.
        standard_error: of the logarithm of the ratio.
        freedom: degrees of freedom of Student's t.
        runs: number of runs in each arm involved, smallest first.
        identical: every distance below the line is zero to the last bit, so that there is nothing to test.
    """

    numerator: float
    denominator: float
    lower: float
    upper: float
    standard_error: float
    freedom: int
    runs: tuple[int, ...]
    identical: bool

    @property
    def ratio(self) -> float:
        """The ratio of the two mean distances."""
        if self.denominator > 0:
            return self.numerator / self.denominator
        return math.inf if self.numerator > 0 else math.nan

    def below(self, margin: float = MARGIN) -> bool:
        """Whether the ratio is below the margin at the declared level."""
        return self.upper < margin

    def above(self, margin: float = MARGIN) -> bool:
        """Whether the ratio is above the margin at the declared level."""
        return self.lower > margin

    def power(self, margin: float = MARGIN, true_ratio: float = 1.0) -> float:
        """Probability that runs like these show the ratio to lie on its side of the margin; NaN if it cannot be told."""
        return _power(self.standard_error, self.freedom, margin, true_ratio)

    def more_runs(self, margin: float = MARGIN) -> int | None:
        """About how many more runs, over all arms, would give a verdict; None if more than `MOST` an arm.

        Where the spread is known, enough for a power of 80 % if the measured ratio is the true one; with fewer than
        three runs in an arm, what it takes to reach the planned number.
        """
        if not math.isfinite(self.standard_error):
            return sum(max(0, PLANNED - n) for n in self.runs)
        smallest = min(self.runs)
        for n in range(smallest + 1, MOST + 1):
            shrunk = self.standard_error * math.sqrt(smallest / n)
            if _power(shrunk, n - 1, margin, self.ratio) >= POWER:
                return sum(max(0, n - have) for have in self.runs)
        return None


def distances(losses: NDArray, over_steps: Callable[..., NDArray] = np.mean) -> NDArray:
    """Mean absolute difference of every pair of runs.

    Args:
        losses: `[runs, steps]`; steps where any loss is not finite are left out.
        over_steps: what to take over the steps; `numpy.median` gives the distance that single spikes do not move.

    Returns:
        `[runs, runs]`, symmetric with zero diagonal; the mean is zero elsewhere only where two runs agree to the last bit.
    """
    used = losses[:, np.isfinite(losses).all(axis=0)]
    count = len(used)
    result = np.zeros((count, count))
    if used.shape[1] == 0:
        return result + np.where(np.eye(count), 0.0, np.nan)
    for i in range(count - 1):
        result[i, i + 1 :] = over_steps(np.abs(used[i + 1 :] - used[i]), axis=1)
    return result + result.T


def ratio_test(
    pairwise: NDArray, numerator: tuple[Sequence[int], Sequence[int]], denominator: tuple[Sequence[int], Sequence[int]]
) -> RatioTest:
    """Jackknifed ratio of the mean distances between two pairs of arms.

    Args:
        pairwise: `[runs, runs]` distances.
        numerator: numbers of the runs of the two arms above the line; the same arm twice means all pairs within it.
        denominator: likewise below the line.
    """
    arms = [set(arm) for arm in dict.fromkeys(tuple(sorted(a)) for a in (*numerator, *denominator))]
    above, below = _mean_distance(pairwise, *numerator), _mean_distance(pairwise, *denominator)
    sizes = tuple(sorted(len(arm) for arm in arms))
    identical = below == 0
    error, freedom = math.nan, sizes[0] - 1
    if sizes[0] >= FEWEST and above > 0 and below > 0:
        variance = 0.0
        for arm in arms:
            left_out = []
            for run in arm:
                tops = [[i for i in group if i != run] for group in numerator]
                bottoms = [[i for i in group if i != run] for group in denominator]
                with np.errstate(divide="ignore", invalid="ignore"):
                    left_out.append(
                        np.log(_mean_distance(pairwise, tops[0], tops[1]))
                        - np.log(_mean_distance(pairwise, bottoms[0], bottoms[1]))
                    )
            values = np.array(left_out)
            variance += (len(arm) - 1) / len(arm) * float(((values - values.mean()) ** 2).sum())
        error = math.sqrt(variance) if math.isfinite(variance) else math.nan
    if math.isfinite(error):
        reach = float(stats.t.ppf(1 - LEVEL, freedom)) * error
        centre = math.log(above / below)
        lower, upper = math.exp(centre - reach), math.exp(centre + reach)
    else:
        lower = upper = math.nan
    return RatioTest(above, below, lower, upper, error, freedom, sizes, identical)


def _mean_distance(pairwise: NDArray, one: Sequence[int], other: Sequence[int]) -> float:
    if not len(one) or not len(other):
        return math.nan
    block = pairwise[np.ix_(list(one), list(other))]
    pairs = np.asarray(one)[:, None] != np.asarray(other)[None, :]
    return float(block[pairs].mean()) if pairs.any() else math.nan


def _power(error: float, freedom: int, margin: float, true_ratio: float) -> float:
    if not math.isfinite(error) or error <= 0 or not math.isfinite(true_ratio) or true_ratio <= 0:
        return math.nan
    away = abs(math.log(margin / true_ratio)) / error
    # Far beyond the quantile the noncentral t loses its digits, and the power is 1.
    return 1.0 if away > 30 else float(stats.nct.sf(stats.t.ppf(1 - LEVEL, freedom), freedom, away))
