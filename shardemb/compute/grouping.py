"""The hot loops that group equal ids.

A batch is sorted as *words*: each has 64 bits, with an id in the upper ones and its position in the batch in the lower
ones. Sorting words takes half as long as sorting pairs of numbers, and one more pass over the sorted words gives
everything that callers need to know about the groups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.compute.compiler import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array

WORD_BITS, POSITION_BITS = 64, 32
"""Bits for an id and a position together, and for a position alone."""

_DIGIT_BITS = 12
"""Bits that one pass sorts by, at most: the counters of a pass must fit in the first-level cache."""


@kernel
def sort_rows(ids: Int64Array, position_bits: int, id_bits: int) -> NDArray[np.uint64]:
    """Return the words of a batch, sorted: LSD radix sort, which counts a digit while it sorts by the one before.

    All numbers are unsigned, because numba checks at every use whether a signed index is negative.
    """
    # As few passes as possible, and then digits as short as these passes allow.
    passes = max(1, -(-id_bits // _DIGIT_BITS))
    bits, low = np.uint64(-(-id_bits // passes)), np.uint64(position_bits)
    mask, one = (np.uint64(1) << bits) - np.uint64(1), np.uint32(1)
    # For each pass: how often a digit occurs, later the position of the next word with that digit.
    counters = np.zeros((passes, np.int64(mask) + 1), np.uint32)
    words, others = np.empty(ids.size, np.uint64), np.empty(ids.size, np.uint64)
    counter = counters[0]
    for i in range(ids.size):
        number = np.uint64(ids[i])
        words[i] = (number << low) | np.uint64(i)
        counter[number & mask] += one
    for k in range(passes):
        counter, following, total = counters[k], counters[min(k + 1, passes - 1)], np.uint32(0)
        for digit in range(counter.size):  # counts become positions
            count = counter[digit]
            counter[digit] = total
            total += count
        for i in range(words.size):
            digit = (words[i] >> low) & mask
            others[np.uint64(counter[digit])] = words[i]
            counter[digit] += one
            if k + 1 < passes:  # while the word is at hand, instead of in a pass of its own
                following[(words[i] >> low + bits) & mask] += one
        low += bits
        words, others = others, words
    return words


@kernel
def list_groups(
    words: NDArray[np.uint64], position_bits: int, rows: Int64Array, starts: Int64Array, order: Int64Array
) -> int:
    """Fill in the arrays of a ``plan.Grouped`` from sorted words; return how many distinct rows there are.

    There is no branch in the loop, because random ids would make it mispredict: each word writes its row and the end of
    its group, over what its predecessor wrote if both are in the same group.
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
        starts[group + one] = i + 1  # the last word of the group writes the value that stays
        order[i] = words[i] & ((one << low) - one)
    return int(np.int64(group)) + 1


@kernel
def list_inverse(words: NDArray[np.uint64], position_bits: int, rows: Int64Array, inverse: Int64Array) -> int:
    """Fill in the distinct rows, and for each position the index of its row; return how many rows there are."""
    low, one = np.uint64(position_bits), np.uint64(1)
    if words.size == 0:
        return 0
    group, last = np.uint64(0), words[0] >> low
    for i in range(words.size):
        row = words[i] >> low
        group += np.uint64(row != last)
        last = row
        rows[group] = row  # written again by each word of the group, which costs less than a branch
        inverse[words[i] & ((one << low) - one)] = group
    return int(np.int64(group)) + 1


@kernel
def sum_groups(values: Float32Array, starts: Int64Array, order: Int64Array, out: Float32Array) -> None:
    """Set ``out[k]`` to the sum of the values at the positions of group `k`, added in the order of the batch.

    The first is copied, as in an optimizer's step, so that both give the same bits: ``0.0 + -0.0`` is not ``-0.0``.
    """
    dim = values.shape[1]
    for k in range(starts.size - 1):
        first, total = values[order[starts[k]]], out[k]
        for j in range(dim):
            total[j] = first[j]
        for i in range(starts[k] + 1, starts[k + 1]):
            another = values[order[i]]
            for j in range(dim):
                total[j] += another[j]
