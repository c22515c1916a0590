"""The hot loops that bring equal ids together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.kernels import kernel

if TYPE_CHECKING:
    from shardemb.arrays import Int64Array

_RADIX_BITS = 11
_RADIX = 1 << _RADIX_BITS
_WORD_BITS = 63


@kernel
def _bits_of(number: int) -> int:
    """How many bits a number takes."""
    bits = 0
    while number >> bits:
        bits += 1
    return bits


@kernel
def _sort_words(words: Int64Array, others: Int64Array, first_bit: int, num_bits: int) -> bool:
    """Sort by some bits, stably: LSD radix sort. Return whether the result stands in `others`."""
    passes = -(-num_bits // _RADIX_BITS)
    places = np.zeros((passes, _RADIX + 1), np.int64)
    for i in range(words.size):
        for k in range(passes):
            places[k, ((words[i] >> (first_bit + k * _RADIX_BITS)) & (_RADIX - 1)) + 1] += 1
    for k in range(passes):
        place = places[k]
        for digit in range(_RADIX):
            place[digit + 1] += place[digit]
        for i in range(words.size):
            digit = (words[i] >> (first_bit + k * _RADIX_BITS)) & (_RADIX - 1)
            others[place[digit]] = words[i]
            place[digit] += 1
        words, others = others, words
    return passes % 2 == 1


@kernel
def sort_rows(keys: Int64Array, order: Int64Array, other_keys: Int64Array, num_bits: int) -> bool:
    """Sort `keys` of `num_bits` significant bits, stably; ``order[i]`` becomes where the i-th of them stood.

    Key and position are sorted as one word, which takes half as long as two; `other_keys`, of the same size, is room.
    Return False, with nothing changed, where that has no room for both.
    """
    low = _bits_of(keys.size - 1) if keys.size else 0
    if low + num_bits > _WORD_BITS:
        return False
    for i in range(keys.size):
        keys[i] = (keys[i] << low) | i
    found = other_keys if _sort_words(keys, other_keys, low, num_bits) else keys
    for i in range(keys.size):
        order[i] = found[i] & ((1 << low) - 1)
        keys[i] = found[i] >> low
    return True


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
