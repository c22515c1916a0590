"""Memory for large results, which is used again once the caller has released them.

Fresh memory costs more than what is written to it: the kernel has to find and clear each page, which takes 0.5 ms a
megabyte if two threads do it, whereas a gather of a megabyte takes 0.2 ms. (The C library keeps memory too, see
`address_space.keep_freed_memory`, but returns the end of its heap to the kernel.) A training loop releases the rows of
one step before it gets those of the next, so it keeps working in the same memory.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base.sizes import round_up
from shardemb.storage import address_space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_FLOAT32 = np.dtype(np.float32)

MIN_BYTES, MAX_BYTES = 2**20, 2**26
"""Results of fewer or of more bytes are left to the C library; free memory of at most `MAX_BYTES` in all is kept."""

ALIGNED = 64
"""Arrays in one block of memory begin at multiples of that many bytes, which is a cache line."""


class OutputPool:
    """Makes the arrays that lookups return; safe from any thread.

    It has no lock, because garbage collection may release an array at any point, also within these methods, and
    `put_back` would then wait for a lock that its own thread holds. Instead, each step is one atomic operation on a
    list.
    """

    def __init__(self) -> None:
        self._free: list[address_space.AddressRange] = []
        self._closed = False
        address_space.keep_freed_memory()  # what is not made here: the temporary arrays of batches

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any] = _FLOAT32) -> NDArray[Any]:
        """Make an uninitialised array, whose memory is its own until the last view of it is gone."""
        nbytes = dtype.itemsize * math.prod(shape)
        if not MIN_BYTES <= nbytes <= MAX_BYTES:
            return np.empty(shape, dtype)
        memory = self._reuse(nbytes) or _new(nbytes)
        # The interface that a lease offers knows no dtypes of other packages.
        return np.asarray(_Lease(self, memory, nbytes)).view(dtype).reshape(shape)

    def empty_together(self, wanted: Sequence[tuple[tuple[int, ...], np.dtype[Any]]]) -> list[NDArray[Any]]:
        """Make several arrays as `empty` does, in one block of memory, so that they share its huge pages."""
        sizes = [dtype.itemsize * math.prod(shape) for shape, dtype in wanted]
        ends = list(accumulate(round_up(size, ALIGNED) for size in sizes))
        if not ends or not MIN_BYTES <= ends[-1] <= MAX_BYTES:
            return [self.empty(*each) for each in wanted]
        block = self.empty((ends[-1],), np.dtype(np.uint8))
        return [
            block[start : start + size].view(dtype).reshape(shape)
            for start, size, (shape, dtype) in zip([0, *ends], sizes, wanted, strict=False)
        ]

    def close(self) -> None:
        """Release all free memory, and from now on whatever is put back."""
        self._closed = True
        self._free.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of free memory that are kept for later arrays."""
        return sum(each.nbytes for each in self._free[:])

    def _reuse(self, nbytes: int) -> address_space.AddressRange | None:
        # The smallest that is large enough. Of equal ones the newest, which may still be in the processor's cache.
        newest_first = self._free[::-1]
        for memory in sorted(newest_first, key=lambda each: each.nbytes):
            if memory.nbytes >= nbytes:
                try:
                    self._free.remove(memory)
                except ValueError:  # another thread was faster
                    continue
                return memory
        return None

    def put_back(self, memory: address_space.AddressRange) -> None:
        """Keep memory for a later array; release the oldest while more than `MAX_BYTES` are kept."""
        self._free.append(memory)
        while self.nbytes > MAX_BYTES or (self._closed and self._free):
            del self._free[:1]


class _Lease:
    """What NumPy needs to make an array over memory; the memory is put back when the last of its arrays is gone."""

    def __init__(self, pool: OutputPool, memory: address_space.AddressRange, nbytes: int) -> None:
        self._pool, self._memory = pool, memory
        self.__array_interface__ = {
            "data": (memory.address, False),
            "typestr": np.dtype(np.uint8).str,
            "shape": (nbytes,),
            "version": 3,
        }

    def __del__(self) -> None:
        self._pool.put_back(self._memory)


def _new(nbytes: int) -> address_space.AddressRange:
    memory = address_space.AddressRange(round_up(nbytes, address_space.HUGE_PAGE))
    memory.map_zeros(0, memory.nbytes)
    memory.prefer_huge_pages(0, memory.nbytes)
    return memory
