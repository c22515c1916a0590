"""Kernels over the blocks that a fold writes: bits of the presence bitmap, records, and how much of a block they cover.

Bit r of the bitmap, in little bit order, says whether the files hold a record of row r.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.intrinsics import copy
from shardemb.kernels import kernel
from shardemb.spec import PAGE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.arrays import Int64Array


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
