"""The paired t-test of two networks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

__all__ = ["PairedTest", "paired_test"]


@dataclass(frozen=True)
class PairedTest:
    """Result of a two-tailed paired t-test of the differences a - b.

    Attributes
    ----------
    mean_difference, ci_low, ci_high : float
        Mean of a - b and its 95 % confidence interval, which in a family of tests is simultaneous.
    p : float
        Two-tailed, of this test alone.
    effect_size : float
        Cohen's d_z, the mean difference in standard deviations of the differences.
    """

    n: int
    mean_difference: float
    ci_low: float
    ci_high: float
    t: float
    p: float
    effect_size: float


def paired_test(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, n_tests: int = 1) -> PairedTest:
    """Two-tailed paired t-test of scores of the same volumes under two networks; ValueError if the lengths differ.

    Volumes where either score is NaN or None are left out. In a family of `n_tests`, all intervals hold together with
    95 % (Bonferroni). With fewer than two pairs, or if all differences are equal, all but n and the mean difference is
    NaN.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"paired scores must be two lists of equal length, not shapes {first.shape}, {second.shape}")
    both = np.isfinite(first) & np.isfinite(second)
    first, second = first[both], second[both]
    difference = first - second
    n, mean = len(difference), float(difference.mean()) if len(difference) else math.nan
    if n < 2 or np.ptp(difference) <= 1e-12 * np.abs(difference).max():  # nothing but rounding
        return PairedTest(n, mean, *[math.nan] * 5)
    test = stats.ttest_rel(first, second)
    effect_size = mean / difference.std(ddof=1)
    values = (*test.confidence_interval(1 - 0.05 / n_tests), test.statistic, test.pvalue, effect_size)
    return PairedTest(n, mean, *map(float, values))
