"""The hot loops that bring equal ids together.

A batch is sorted as *words*: an id in the upper bits of 64, its position in the lower ones. Sorting one word takes half
as long as sorting two numbers, and one more pass over the words reads off all that is asked of the groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.compute.compiler import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

WORD_BITS, POSITION_BITS = 64, 32
"""Bits that an id and a position have together, and a position alone."""

_DIGIT_BITS = 12
"""Bits sorted by in one pass, at most: the counters of a pass are to stay in the processor's first cache."""


@kernel
def sort_rows(ids: Int64Array, position_bits: int, id_bits: int) -> NDArray[np.uint64]:
    """Return the ascending words of a batch: LSD radix sort, which counts a digit while it sorts by the one before.

    All numbers are unsigned: of a signed index numba asks each time whether it is negative.
    """
    passes = max(1, -(-id_bits // _DIGIT_BITS))
    bits, low = np.uint64(-(-id_bits // passes)), np.uint64(position_bits)
    mask, one = (np.uint64(1) << bits) - np.uint64(1), np.uint32(1)
    places = np.zeros((passes, np.int64(mask) + 1), np.uint32)
    words, others = np.empty(ids.size, np.uint64), np.empty(ids.size, np.uint64)
    place = places[0]
    for i in range(ids.size):
        number = np.uint64(ids[i])
        words[i] = (number << low) | np.uint64(i)
        place[number & mask] += one
    for k in range(passes):
        place, following, total = places[k], places[min(k + 1, passes - 1)], np.uint32(0)
        for digit in range(place.size):
            count = place[digit]
            place[digit] = total
            total += count
        for i in range(words.size):
            digit = (words[i] >> low) & mask
            others[np.uint64(place[digit])] = words[i]
            place[digit] += one
            if k + 1 < passes:
                following[(words[i] >> low + bits) & mask] += one
        low += bits
        words, others = others, words
    return words


@kernel
def list_groups(
    words: NDArray[np.uint64], position_bits: int, rows: Int64Array, starts: Int64Array, order: Int64Array
) -> int:
    """Read off ``plan.Grouped`` from sorted words; return how many distinct rows there are.

    Without a branch: each word writes its row and the end of its group, over those that its predecessor wrote if they
    are of the same group.
    """
    low, one = np.uint64(position_bits), np.uint64(1)
    starts[0] = 0
    if words.size == 0:
        return 0
    group, last = np.uint64(0), words[0] >> low
    for i in range(words.size):
        row = words[i] >> low
        group += np.uint64(row != last)
        last = row
        rows[group] = row
        starts[group + one] = i + 1
        order[i] = words[i] & ((one << low) - one)
    return int(np.int64(group)) + 1


@kernel
def list_inverse(words: NDArray[np.uint64], position_bits: int, rows: Int64Array, inverse: Int64Array) -> int:
    """Read off the distinct rows, and for each position which of them it holds; return how many there are."""
    low, one = np.uint64(position_bits), np.uint64(1)
    if words.size == 0:
        return 0
    group, last = np.uint64(0), words[0] >> low
    for i in range(words.size):
        row = words[i] >> low
        group += np.uint64(row != last)
        last = row
        rows[group] = row
        inverse[words[i] & ((one << low) - one)] = group
    return int(np.int64(group)) + 1
