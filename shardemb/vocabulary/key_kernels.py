"""Hot loops over the keys of rows: to compare them, to copy their bytes, to count their occurrences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.compute.compiler import kernel
from shardemb.vocabulary.key_records import LIVE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.vocabulary.key_records import Words

_32 = np.uint64(32)


@kernel
def match_integers(records: Words, keys: Int64Array, rows: Int64Array, dropped: NDArray[np.bool_]) -> int:
    """Set ``rows[i]`` to -1, and ``dropped[i]`` to true, where the record holds another key or none; count these."""
    count = 0
    for i in range(rows.size):
        if rows[i] < 0:
            continue
        key = (np.uint64(records[i, 1]) << _32) | np.uint64(records[i, 0])
        if records[i, 2] != LIVE or key != np.uint64(keys[i]):
            rows[i] = -1
            dropped[i] = True
            count += 1
    return count


@kernel
def match_hashes(
    records: Words,
    hashes: NDArray[np.uint64],
    lengths: Int64Array,
    rows: Int64Array,
    dropped: NDArray[np.bool_],
) -> int:
    """Do what `match_integers` does for strings, but compare only their hashes and lengths."""
    count = 0
    for i in range(rows.size):
        if rows[i] < 0:
            continue
        value = (np.uint64(records[i, 1]) << _32) | np.uint64(records[i, 0])
        if not records[i, 3] & LIVE or value != hashes[i] or np.int64(records[i, 4]) != lengths[i]:
            rows[i] = -1
            dropped[i] = True
            count += 1
    return count


@kernel
def match_bytes(
    cells: NDArray[np.uint8],
    begins: Int64Array,
    which: Int64Array,
    offsets: Int64Array,
    data: NDArray[np.uint8],
    rows: Int64Array,
    dropped: NDArray[np.bool_],
) -> int:
    """Do what `match_integers` does for the bytes of strings ``which[k]``, which begin at ``begins[k]`` in `cells`."""
    count = 0
    for k in range(which.size):
        i, at = which[k], begins[k]
        for j in range(offsets[i], offsets[i + 1]):
            if cells[at] != data[j]:
                rows[i] = -1
                dropped[i] = True
                count += 1
                break
            at += 1
    return count


@kernel
def detach_unequal(offsets: Int64Array, data: NDArray[np.uint8], leader: Int64Array) -> int:
    """Make each string of a batch that differs from its leader a leader of its own; return how many those are."""
    count = 0
    for i in range(leader.size):
        first = leader[i]
        if first == i:
            continue
        begin, other, length = offsets[i], offsets[first], offsets[i + 1] - offsets[i]
        same = offsets[first + 1] - other == length
        j = 0
        while same and j < length:
            same = data[begin + j] == data[other + j]
            j += 1
        if not same:
            leader[i] = i
            count += 1
    return count


@kernel
def place_bytes(
    cells: NDArray[np.uint8], begins: Int64Array, offsets: Int64Array, data: NDArray[np.uint8]
) -> None:
    """Copy strings to where they begin in `cells`."""
    for i in range(begins.size):
        for j in range(offsets[i + 1] - offsets[i]):
            cells[begins[i] + j] = data[offsets[i] + j]


@kernel
def take_bytes(
    cells: NDArray[np.uint8], begins: Int64Array, offsets: Int64Array, data: NDArray[np.uint8]
) -> None:
    """Copy strings from where they begin in `cells`, and make them contiguous."""
    for i in range(begins.size):
        for j in range(offsets[i + 1] - offsets[i]):
            data[offsets[i] + j] = cells[begins[i] + j]


@kernel
def count_seen(
    counters: NDArray[np.uint32], cells: Int64Array, keys: Int64Array, counts: NDArray[np.uint32]
) -> None:
    """Count occurrences of keys in order: raise the smallest of the counters ``cells[keys[i]]``; set the key's count.

    Counters stop at the largest number that they can hold.
    """
    for i in range(keys.size):
        k = keys[i]
        least = counters[cells[k, 0]]
        for j in range(1, cells.shape[1]):
            least = min(least, counters[cells[k, j]])
        if least < np.uint32(0xFFFFFFFF):
            least += np.uint32(1)
        for j in range(cells.shape[1]):
            counters[cells[k, j]] = max(counters[cells[k, j]], least)
        counts[k] = max(counts[k], least)
