"""The blocks of a file that a fold writes: which ones, and kernels that fill in records and bits of the bitmap.

Bit r of the presence bitmap, in little bit order, says whether the files hold a record of row r. A block is a page of a
file; the blocks that are being written are contiguous in memory, wherever they are in the file.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb.base.sizes import PAGE, round_up
from shardemb.compute.compiler import kernel
from shardemb.compute.intrinsics import copy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array


@kernel
def patch_bits(bits: Int64Array, blocks: Int64Array, target: NDArray[np.uint8]) -> None:
    """Set ascending bits in blocks of a bitmap, which are contiguous in memory. Bits of other blocks are skipped."""
    k = 0  # bits and blocks both ascend, so one pass over each is enough
    for i in range(bits.size):
        block = bits[i] // (8 * PAGE)
        while k < blocks.size and blocks[k] < block:
            k += 1
        if k < blocks.size and blocks[k] == block:
            at = bits[i] - block * 8 * PAGE
            target[k * PAGE + (at >> 3)] |= np.uint8(1 << (at & 7))


@kernel
def count_bytes(ids: Int64Array, record_bytes: int, blocks: Int64Array, counts: Int64Array) -> None:
    """Count how many bytes of each block the records of ascending rows cover. They lie in no other blocks."""
    k = 0
    for i in range(ids.size):
        begin, end = ids[i] * record_bytes, (ids[i] + 1) * record_bytes
        while begin < end:  # a record may lie in several blocks
            block = begin // PAGE
            while blocks[k] < block:
                k += 1
            stop = min(end, (block + 1) * PAGE)
            counts[k] += stop - begin
            begin = stop


@kernel
def _first_from(ids: Int64Array, row: int) -> int:
    """Do what `numpy.searchsorted` does, which takes longer to compile than all else here."""
    low, high = 0, ids.size
    while low < high:
        middle = (low + high) // 2
        if ids[middle] < row:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def patch(
    addresses: Int64Array, ids: Int64Array, record_bytes: int, blocks: Int64Array, target: NDArray[np.uint8]
) -> None:
    """Copy records of ascending rows into blocks, which are contiguous in memory. What lies elsewhere is skipped."""
    k, first = 0, target.ctypes.data
    # Begin with the first row that reaches into the first block; end after the last block.
    for i in range(_first_from(ids, blocks[0] * PAGE // record_bytes), ids.size):
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


def set_ranges(ranges: Int64Array, blocks: Int64Array, target: NDArray[np.uint8]) -> None:
    """Set ranges of bits, of shape (n, 2), in ascending blocks of a bitmap, which are contiguous in memory."""
    held, size = target.reshape(-1, PAGE), 8 * PAGE
    for start, stop in ranges.tolist():
        first, last = np.searchsorted(blocks, [start // size, -(-stop // size)]).tolist()
        for k in range(first, last):
            block = int(blocks[k])
            begin, end = max(start - block * size, 0), min(stop - block * size, size)
            if end - begin == size:
                held[k] = 255
            elif begin < end:
                here = np.zeros(size, np.bool_)
                here[begin:end] = True
                held[k] |= np.packbits(here, bitorder="little")


WINDOW_BLOCKS = 64
"""Blocks of a window, the unit in which much of a file is read and written."""

READ_SHARE, WRITE_SHARE = 3 / 8, 3 / 4
"""From which share of changed blocks on a window is read, and written, as a whole."""


def runs(numbers: Int64Array) -> Iterator[tuple[int, int]]:
    """Yield where runs of consecutive numbers begin and end, as indices.

    Examples
    --------
    >>> list(runs(np.array([3, 4, 5, 9])))
    [(0, 3), (3, 4)]
    """
    cuts = (np.flatnonzero(np.diff(numbers) != 1) + 1).tolist()
    yield from pairwise([0, *cuts, numbers.size] if numbers.size else [])


def pages(rows: Int64Array, record_bytes: int) -> Int64Array:
    """Return the pages that hold the records of ascending rows: ascending, each once.

    Examples
    --------
    >>> pages(np.array([0, 1, 2, 100]), 3000).tolist()
    [0, 1, 2, 73]
    """
    low, high = rows * record_bytes // PAGE, ((rows + 1) * record_bytes - 1) // PAGE
    counts = high - low + 1
    # Every page of every record, without a loop: low, low + 1, ..., high for each.
    ends = np.cumsum(counts)
    all_of_each: Int64Array = np.repeat(low - ends + counts, counts) + np.arange(ends[-1] if ends.size else 0)
    return all_of_each[np.diff(all_of_each, prepend=-1) > 0]


class Widened(NamedTuple):
    """What a fold reads and writes of a file, see `widen`.

    Attributes
    ----------
    held : ndarray of int64
        The blocks to hold in memory, ascending.
    written : ndarray of bool
        Which of these to write: all that change, and some more.
    """

    held: Int64Array
    written: NDArray[np.bool_]


def widen(blocks: Int64Array, has_data: NDArray[np.bool_]) -> Widened:
    """Add unchanged blocks to those that change, because a few long requests cost less than many short ones.

    A block between two that change is written with them if it takes disk space already. A window of which much changes
    is read as a whole; one of which most changes is written as a whole too, unless it would then take more than twice
    the disk space.

    Parameters
    ----------
    blocks : ndarray of int64, shape (n,)
        Blocks of a file that change, ascending.
    has_data : ndarray of bool
        For every block of the file, whether it takes disk space.

    Examples
    --------
    >>> held, written = widen(np.array([0, 2, 3, 9]), np.ones(100, np.bool_))
    >>> held[written].tolist()
    [0, 1, 2, 3, 9]
    """
    changed, taken = np.zeros((2, round_up(has_data.size, WINDOW_BLOCKS)), np.bool_)
    changed[blocks], taken[: has_data.size] = True, has_data
    taken |= changed
    written = changed.copy()
    between = blocks[:-1][np.diff(blocks) == 2] + 1
    written[between[taken[between]]] = True
    changes = changed.reshape(-1, WINDOW_BLOCKS).sum(axis=1)
    much, most = (changes >= share * WINDOW_BLOCKS for share in (READ_SHARE, WRITE_SHARE))
    written |= np.repeat(most, WINDOW_BLOCKS) & taken
    held: Int64Array = np.flatnonzero((written | np.repeat(much, WINDOW_BLOCKS))[: has_data.size])
    return Widened(held, written[held])
