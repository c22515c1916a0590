"""Kernels over bitmaps: which rows changed, which pages are copies, which rows were ever written.

Bit i of a bitmap of words stands for row or page i. A bitmap of rows that changed has a byte beside it for every 32,768
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
def mark_private(ids: Int64Array, record_bytes: int, private: NDArray[np.uint64]) -> int:
    """Note that the pages of rows become copies; return how many were none before."""
    pages = 0
    for i in range(ids.size):
        for page in range(ids[i] * record_bytes // PAGE, ((ids[i] + 1) * record_bytes - 1) // PAGE + 1):
            bit = np.uint64(1) << np.uint64(page & 63)
            pages += (private[page >> 6] & bit) == 0
            private[page >> 6] |= bit
    return pages


@kernel
def clear_bits(words: NDArray[np.uint64], bits: Int64Array) -> int:
    """Clear bits of a bitmap; return how many were set."""
    cleared = 0
    for i in range(bits.size):
        bit = np.uint64(1) << np.uint64(bits[i] & 63)
        cleared += (words[bits[i] >> 6] & bit) != 0
        words[bits[i] >> 6] &= ~bit
    return cleared


@kernel
def dirty_pages(dirty: NDArray[np.uint64], blocks: NDArray[np.uint8], record_bytes: int) -> Int64Array:
    """List the runs of pages that hold changed rows, ascending and apart: (first, one past the last), (runs, 2)."""
    runs = np.empty((16, 2), np.int64)
    count = 0
    words = ROWS_PER_BLOCK // 64
    for block in np.flatnonzero(blocks):
        first = int(block) * words
        for w in range(first, min(first + words, dirty.size)):
            word = dirty[w]
            while word:
                row = w * 64 + trailing_zeros(word)
                word &= word - np.uint64(1)
                low, high = row * record_bytes // PAGE, ((row + 1) * record_bytes - 1) // PAGE + 1
                if count and low <= runs[count - 1, 1]:
                    runs[count - 1, 1] = high
                    continue
                if count == runs.shape[0]:
                    larger = np.empty((2 * count, 2), np.int64)
                    larger[:count] = runs
                    runs = larger
                runs[count, 0], runs[count, 1] = low, high
                count += 1
    return runs[:count].copy()


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
def idle_pages(
    held: NDArray[np.uint64], newer: NDArray[np.uint64], folding: NDArray[np.uint64]
) -> Int64Array:
    """List the pages that are held, but neither newer nor folding, ascending."""
    pages = np.empty(16, np.int64)
    count = 0
    for w in range(held.size):
        word = held[w] & ~(newer[w] | folding[w])
        if word == 0:
            continue
        if count + 64 > pages.size:
            larger = np.empty(2 * pages.size + 64, np.int64)
            larger[:count] = pages[:count]
            pages = larger
        while word:
            pages[count] = w * 64 + trailing_zeros(word)
            count += 1
            word &= word - np.uint64(1)
    return pages[:count].copy()


@kernel
def list_bits(words: NDArray[np.uint64], start: int, most: int) -> Int64Array:
    """List set bits of a bitmap, ascending: the first `most` from bit `start` on."""
    bits = np.empty(most, np.int64)
    count = 0
    for w in range(start >> 6, words.size):
        if words[w] == 0:
            continue
        for bit in range(max(w * 64, start), w * 64 + 64):
            if count < most and (words[w] >> np.uint64(bit & 63)) & np.uint64(1):
                bits[count] = bit
                count += 1
        if count == most:
            break
    return bits[:count].copy()


@kernel
def set_runs(words: NDArray[np.uint64], runs: Int64Array) -> None:
    """Set the bits of runs of pages."""
    for k in range(runs.shape[0]):
        for page in range(runs[k, 0], runs[k, 1]):
            words[page >> 6] |= np.uint64(1) << np.uint64(page & 63)


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
