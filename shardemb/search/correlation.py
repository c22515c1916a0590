"""Correlation of two samples, with the probability that unrelated ones correlate as much."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class Correlation(NamedTuple):
    """A coefficient of correlation.

    Attributes
    ----------
    statistic : float
        Between -1 and 1; NaN if a sample is constant.
    pvalue : float
        The two-sided probability of a coefficient at least as far from 0, if the samples are normal and independent.
    """

    statistic: float
    pvalue: float


def pearson(one: Sequence[float], other: Sequence[float]) -> Correlation:
    """Return Pearson's coefficient: how linear the relation is.

    Examples
    --------
    >>> round(pearson([1, 2, 3, 4], [1, 2, 3, 5]).statistic, 4)
    0.9827
    """
    x, y = (np.asarray(each, np.float64) - np.mean(each) for each in (one, other))
    lengths = float(np.linalg.norm(x) * np.linalg.norm(y))
    if x.size < 2 or lengths == 0:
        return Correlation(math.nan, math.nan)
    statistic = float(np.clip(x @ y / lengths, -1, 1))
    if x.size == 2:
        return Correlation(statistic, 1.0)
    freedom = x.size - 2
    # Student's t with this freedom: its distribution is an incomplete beta function of 1 / (1 + t * t / freedom).
    return Correlation(statistic, incomplete_beta(freedom / 2, 0.5, 1 - statistic * statistic))


def spearman(one: Sequence[float], other: Sequence[float]) -> Correlation:
    """Return Spearman's coefficient: how monotonic the relation is.

    Examples
    --------
    >>> round(spearman([1, 2, 3], [1, 20, 300]).statistic, 6)
    1.0
    """
    return pearson(*(_ranks(np.asarray(each, np.float64)).tolist() for each in (one, other)))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each value; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: NDArray[np.float64] = (ends - (counts - 1) / 2)[inverse.reshape(-1)]
    return ranks


def incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function, by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the other side converges faster
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny, c, d = 1e-300, 1.0, 1 / (1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d, c = 1 + term * d, 1 + term / c
            d, c = 1 / (d or tiny), c or tiny
            result *= c * d
            change = c * d
        if abs(change - 1) < 1e-15:
            break
    return front * result / a
