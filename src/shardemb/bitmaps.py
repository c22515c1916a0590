"""Kernels over the presence bitmap: bit r, in little bit order, says whether the files hold a record of row r."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

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
