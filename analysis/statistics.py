"""Intervals and tests over independent units: seeds in a study of numerics, launches in one of speed.

Steps of one run and epochs of one process are no independent sample, so they are never the unit. Student's t is exact where the
logarithms scatter normally, and conservative with heavy tails; where they are as skewed as the logarithm of a gamma variable of
shape 4, a rate of 5 % is one of 7 %.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ddpkit.analysis.runs import NDArray

LEVEL = 0.05
"""Rate of false statements over all primary claims of a study, for each kind of statement (holds, does not hold)."""
CONFIDENCE = 0.95
"""Of the intervals of estimates."""


@dataclass(frozen=True)
class Estimate:
    """A value with an interval; NaN bounds where there are too few units for one."""

    value: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero."""
        return bool(np.isfinite(self.low)) and not self.low <= 0 <= self.high

    @property
    def reach(self) -> float:
        """Half the interval: what these units can tell apart."""
        return (self.high - self.low) / 2

    def map(self, function: "np.ufunc") -> "Estimate":
        """The same on another, increasing scale."""
        value, low, high = (float(function(x)) for x in (self.value, self.low, self.high))
        return Estimate(value, low, high, self.count)

    def percent(self) -> "Estimate":
        """An estimate of a logarithm of a ratio as per cent of a change."""
        found = self.map(np.expm1)
        return Estimate(100 * found.value, 100 * found.low, 100 * found.high, found.count)


@dataclass(frozen=True)
class Test:
    """Whether the mean of values, such as logarithms of ratios, lies inside a margin about zero.

    Attributes:
        estimate: the mean and its 90 % interval (two one-sided bounds of 95 %).
        inside: p-value of "it lies outside the margin"; small values show equivalence.
        outside: p-value of "it lies inside"; small values show a difference.
    """

    estimate: Estimate
    inside: float
    outside: float


def mean_interval(values: NDArray, confidence: float = CONFIDENCE) -> Estimate:
    """Mean of `[units]` with Student's interval."""
    count = len(values)
    if not count:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = float(np.mean(values))
    if count < 2 or not np.isfinite(values).all():
        return Estimate(mean, math.nan, math.nan, count)
    reach = float(stats.t.ppf((1 + confidence) / 2, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Estimate(mean, mean - reach, mean + reach, count)


def t_values(values: NDArray, margin: float) -> tuple[NDArray, NDArray]:
    """One-sided p-values, by Student's t, of "the mean is at least `margin`" and of "it is at most `margin`".

    Args:
        values: `[..., units]`, at least two, finite and not all equal.
        margin: a number.

    Returns:
        Two arrays `[...]`.
    """
    count = values.shape[-1]
    t = (values.mean(-1) - margin) / (values.std(-1, ddof=1) / math.sqrt(count))
    return stats.t.cdf(t, count - 1), stats.t.sf(t, count - 1)


def sign_value(values: NDArray, margin: float) -> float:
    """p-value, by signs, of "at most half of such units lie above the margin"; takes infinities."""
    above = int((values > margin).sum())
    return float(stats.binom.sf(above - 1, len(values), 0.5))


def equivalence(values: NDArray, margin: float, *, two_sided: bool) -> Test:
    """Two one-sided t-tests (Schuirmann 1987) on `[units]`; with `two_sided=False` of the upper margin alone.

    Where units are infinite, as those of runs that failed, nothing shows equivalence and signs alone a difference. Where all
    units are equal there is no spread, and the p-value is that of as many coins.
    """
    values = np.asarray(values, dtype=float)
    count = len(values)
    estimate = mean_interval(values, 1 - 2 * LEVEL)
    if count < 2:
        return Test(estimate, 1.0, 1.0)
    if not np.isfinite(values).all():
        return Test(estimate, 1.0, min(1.0, (1 + two_sided) * sign_value(values, margin)))
    if np.ptp(values) == 0:
        beyond = abs(values[0]) > margin if two_sided else values[0] > margin
        coins = 0.5**count
        return Test(estimate, 1.0 if beyond else coins, coins if beyond else 1.0)
    below, above = (float(p) for p in t_values(values, margin))
    if not two_sided:
        return Test(estimate, below, above)
    under, over = (float(p) for p in t_values(-values, margin))
    return Test(estimate, max(below, under), min(1.0, 2 * min(above, over)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): those up to a level are false together at that rate at most."""
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for done, number in enumerate(sorted(range(len(p_values)), key=lambda n: p_values[n])):
        largest = max(largest, min(1.0, (len(p_values) - done) * p_values[number]))
        adjusted[number] = largest
    return adjusted


def most_that_deviate(count: int) -> float:
    """The largest share of units that may deviate, 95 %, where none of `count` did."""
    return 1 - (1 - CONFIDENCE) ** (1 / count)
