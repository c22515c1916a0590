"""Sums over one row in a fixed order, for the formulas of optimizers; kernels compile them with these.

A single sum would make each addition wait for the one before. So there are eight interleaved partial sums, which are
added pairwise; the values after the last whole eight are added one by one. This order decides the bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from shardemb.base.validation import Float32Array


def sum_of_squares(values: Float32Array) -> np.float32:
    """Return the sum of the squares of a row's values, in the values' own precision.

    Examples
    --------
    >>> float(sum_of_squares(np.arange(10, dtype=np.float32)))
    285.0
    """
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = values.dtype.type(0)
    whole = values.size - values.size % 8
    for j in range(0, whole, 8):
        s0 += values[j] * values[j]
        s1 += values[j + 1] * values[j + 1]
        s2 += values[j + 2] * values[j + 2]
        s3 += values[j + 3] * values[j + 3]
        s4 += values[j + 4] * values[j + 4]
        s5 += values[j + 5] * values[j + 5]
        s6 += values[j + 6] * values[j + 6]
        s7 += values[j + 7] * values[j + 7]
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for j in range(whole, values.size):
        total += values[j] * values[j]
    return total
