"""Kernels over bitmaps: which rows changed, which rows were ever written.

Bit i of a bitmap of words stands for row i. A bitmap of rows that changed has a byte beside it for every 32,768
rows, `blocks`, which says whether any of them did.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.kernels import kernel, trailing_zeros
from shardemb.spec import PAGE, ROWS_PER_BLOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.arrays import Int64Array


@kernel
def mark_dirty(ids: Int64Array, dirty: NDArray[np.uint64], blocks: NDArray[np.uint8]) -> int:
    """Note that rows are about to change; return how many had not changed before."""
    rows = 0
    for i in range(ids.size):
        row = ids[i]
        bit = np.uint64(1) << np.uint64(row & 63)
        rows += (dirty[row >> 6] & bit) == 0
        dirty[row >> 6] |= bit
        blocks[row // ROWS_PER_BLOCK] = 1
    return rows


@kernel
def clear_dirty(dirty: NDArray[np.uint64], blocks: NDArray[np.uint8]) -> None:
    """Count no row as changed any more."""
    words = ROWS_PER_BLOCK // 64
    for block in range(blocks.size):
        if blocks[block]:
            dirty[block * words : (block + 1) * words] = 0
            blocks[block] = 0


@kernel
def dirty_rows(dirty: NDArray[np.uint64], blocks: NDArray[np.uint8], most: int) -> Int64Array:
    """List the rows whose bits are set, of which there are at most so many, ascending."""
    rows = np.empty(most, np.int64)
    words = ROWS_PER_BLOCK // 64
    count = 0
    for block in range(blocks.size):
        if not blocks[block]:
            continue
        for w in range(block * words, min((block + 1) * words, dirty.size)):
            word = dirty[w]
            while word:
                rows[count] = w * 64 + trailing_zeros(word)
                count += 1
                word &= word - np.uint64(1)
    return rows[:count]


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
def set_present(present: NDArray[np.uint8], ids: Int64Array, first: int) -> None:
    """Set the presence bits of rows in a stretch of the bitmap that begins with row `first`."""
    for i in range(ids.size):
        row = ids[i] - first
        present[row >> 3] |= np.uint8(1 << (row & 7))
