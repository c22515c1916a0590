"""Kernels over the blocks that a fold writes: bits of the presence bitmap, records, and how much of a block they cover.

Bit r of the bitmap, in little bit order, says whether the files hold a record of row r.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE, round_up
from shardemb.compute.compiler import kernel
from shardemb.compute.intrinsics import copy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array


@kernel
def patch_bits(bits: Int64Array, blocks: Int64Array, target: NDArray[np.uint8]) -> None:
    """Set bits, ascending, of blocks of a bitmap, which lie one behind the other in memory; others are left out."""
    k = 0
    for i in range(bits.size):
        block = bits[i] // (8 * PAGE)
        while k < blocks.size and blocks[k] < block:
            k += 1
        if k < blocks.size and blocks[k] == block:
            at = bits[i] - block * 8 * PAGE
            target[k * PAGE + (at >> 3)] |= np.uint8(1 << (at & 7))


@kernel
def count_bytes(ids: Int64Array, record_bytes: int, blocks: Int64Array, counts: Int64Array) -> None:
    """Count how many bytes of each block the records of ascending rows take; none lies elsewhere."""
    k = 0
    for i in range(ids.size):
        begin, end = ids[i] * record_bytes, (ids[i] + 1) * record_bytes
        while begin < end:
            block = begin // PAGE
            while blocks[k] < block:
                k += 1
            stop = min(end, (block + 1) * PAGE)
            counts[k] += stop - begin
            begin = stop


@kernel
def patch(
    addresses: Int64Array, ids: Int64Array, record_bytes: int, blocks: Int64Array, target: NDArray[np.uint8]
) -> None:
    """Copy records of ascending rows into blocks, which lie one behind the other in memory; others are left out."""
    k, first = 0, target.ctypes.data
    for i in range(np.searchsorted(ids, blocks[0] * PAGE // record_bytes), ids.size):
        begin, end, source = ids[i] * record_bytes, (ids[i] + 1) * record_bytes, addresses[i]
        while begin < end:
            block = begin // PAGE
            while k < blocks.size and blocks[k] < block:
                k += 1
            if k == blocks.size:
                return
            stop = min(end, (block + 1) * PAGE)
            if blocks[k] == block:
                copy(first + k * PAGE + begin - block * PAGE, source, stop - begin)
            source += stop - begin
            begin = stop


WINDOW_BLOCKS = 64
"""Blocks of a file of which some or all are written."""


def runs(numbers: Int64Array) -> Iterator[tuple[int, int]]:
    """List where runs of consecutive numbers begin and end.

    Examples
    --------
    >>> list(runs(np.array([3, 4, 5, 9])))
    [(0, 3), (3, 4)]
    """
    cuts = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
    yield from pairwise([0, *cuts, numbers.size] if numbers.size else [])


def pages(rows: Int64Array, record_bytes: int) -> Int64Array:
    """List the pages that the records of ascending rows lie on, ascending, each once.

    Examples
    --------
    >>> pages(np.array([0, 1, 2, 100]), 3000).tolist()
    [0, 1, 2, 73]
    """
    low, high = rows * record_bytes // PAGE, ((rows + 1) * record_bytes - 1) // PAGE
    counts = high - low + 1
    ends = np.cumsum(counts)
    all_of_each: Int64Array = np.repeat(low - ends + counts, counts) + np.arange(ends[-1] if ends.size else 0)
    return all_of_each[np.diff(all_of_each, prepend=-1) > 0]


def along(blocks: Int64Array, has_data: NDArray[np.bool_]) -> Int64Array:
    """Add to the blocks of a file that change those that are written along, because long stretches cost less.

    All of a window is written where a quarter of it changes; but not where that would take twice the disk space.

    Parameters
    ----------
    blocks : ndarray of int64, shape (n,)
        Ascending.
    has_data : ndarray of bool
        Of every block of the file, whether it takes disk.

    Examples
    --------
    >>> along(np.arange(0, 64, 4), np.ones(100, np.bool_)).size
    64
    >>> along(np.arange(0, 64, 4), np.zeros(100, np.bool_)).size
    16
    """
    changed, taken = np.zeros((2, round_up(has_data.size, WINDOW_BLOCKS)), np.bool_)
    changed[blocks], taken[: has_data.size] = True, has_data
    taken |= changed
    changes, takes = (each.reshape(-1, WINDOW_BLOCKS).sum(axis=1) for each in (changed, taken))
    dense = (4 * changes >= WINDOW_BLOCKS) & (2 * takes >= WINDOW_BLOCKS)
    every: Int64Array = np.flatnonzero((changed | np.repeat(dense, WINDOW_BLOCKS))[: has_data.size])
    return every
