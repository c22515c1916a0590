"""The hot loops that bring equal ids together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.kernels import kernel

if TYPE_CHECKING:
    from shardemb.arrays import Int64Array

_RADIX_BITS = 11
_RADIX = 1 << _RADIX_BITS


@kernel
def sort_rows(
    keys: Int64Array, order: Int64Array, other_keys: Int64Array, other_order: Int64Array, num_bits: int
) -> None:
    """Sort `keys` in place, stably, and `order` along with them: LSD radix sort of `num_bits` significant bits.

    The others are room to work in, of the same size.
    """
    n = keys.size
    swapped = False
    for shift in range(0, num_bits, _RADIX_BITS):
        place = np.zeros(_RADIX + 1, np.int64)
        for i in range(n):
            place[((keys[i] >> shift) & (_RADIX - 1)) + 1] += 1
        for digit in range(_RADIX):
            place[digit + 1] += place[digit]
        for i in range(n):
            digit = (keys[i] >> shift) & (_RADIX - 1)
            at = place[digit]
            place[digit] = at + 1
            other_keys[at], other_order[at] = keys[i], order[i]
        keys, other_keys = other_keys, keys
        order, other_order = other_order, order
        swapped = not swapped
    if swapped:  # the result stands in what was room to work in
        other_keys[:] = keys
        other_order[:] = order


@kernel
def group_starts(sorted_ids: Int64Array) -> Int64Array:
    """Return where the run of each distinct id begins, with the length at the end."""
    n = sorted_ids.size
    count = 0
    for i in range(n):
        count += i == 0 or sorted_ids[i] != sorted_ids[i - 1]
    starts = np.empty(count + 1, np.int64)
    u = 0
    for i in range(n):
        if i == 0 or sorted_ids[i] != sorted_ids[i - 1]:
            starts[u] = i
            u += 1
    starts[count] = n
    return starts


@kernel
def invert(order: Int64Array, starts: Int64Array) -> Int64Array:
    """For each position of the batch, which distinct id it holds."""
    inverse = np.empty(order.size, np.int64)
    for u in range(starts.size - 1):
        for k in range(starts[u], starts[u + 1]):
            inverse[order[k]] = u
    return inverse
