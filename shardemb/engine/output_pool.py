"""Memory of large results, used again once the caller has let them go.

Fresh memory costs more than what is put there: the kernel has to find and clear each page, which takes 0.5 ms a
megabyte where two threads ask for it, and a gather of as much 0.2 ms. (The C library keeps memory too, but gives the
end of its heap back.) A training loop lets the rows of one step go before those of the next, so it works in the same
memory.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import round_up
from shardemb.storage import address_space

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shardemb.base.validation import Float32Array

LEAST_BYTES, MOST_BYTES = 2**20, 2**26
"""A result of fewer bytes is left to the C library; of all the others, so many bytes are kept."""

ALIGNED = 16
"""Arrays in one block of memory begin at whole cache lines of so many numbers."""


class OutputPool:
    """Makes the arrays that lookups return; safe from any thread.

    It has no lock: an array may go wherever Python collects garbage, within this class too. Each step is one operation
    of a list.
    """

    def __init__(self) -> None:
        self._kept: list[address_space.AddressRange] = []
        self._closed = False

    def empty(self, shape: tuple[int, ...]) -> Float32Array:
        """Make an array of float32 that holds anything; nobody else has its memory until the last view of it goes."""
        nbytes = 4 * math.prod(shape)
        if not LEAST_BYTES <= nbytes <= MOST_BYTES:
            return np.empty(shape, np.float32)
        memory = self._take(nbytes) or _new(nbytes)
        return np.asarray(_Lease(self, memory, shape))

    def empty_together(self, shapes: Sequence[tuple[int, ...]]) -> list[Float32Array]:
        """Make several arrays as `empty` does, in one block of memory: alone, each would take whole huge pages."""
        sizes = [math.prod(shape) for shape in shapes]
        ends = list(accumulate(round_up(size, ALIGNED) for size in sizes))
        if not ends or not LEAST_BYTES <= 4 * ends[-1] <= MOST_BYTES:
            return [self.empty(shape) for shape in shapes]
        block = self.empty((ends[-1],))
        return [
            block[start : start + size].reshape(shape)
            for start, size, shape in zip([0, *ends], sizes, shapes, strict=False)
        ]

    def close(self) -> None:
        """Keep nothing any more."""
        self._closed = True
        self._kept.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that are kept, and in no array."""
        return sum(each.nbytes for each in self._kept[:])

    def _take(self, nbytes: int) -> address_space.AddressRange | None:
        newest_first = self._kept[::-1]  # whose memory may still be in the processor's cache
        for memory in sorted(newest_first, key=lambda each: each.nbytes):
            if memory.nbytes >= nbytes:
                try:
                    self._kept.remove(memory)
                except ValueError:  # another thread has it by now
                    continue
                return memory
        return None

    def give(self, memory: address_space.AddressRange) -> None:
        """Keep memory for a later array, unless enough is kept."""
        self._kept.append(memory)
        while self.nbytes > MOST_BYTES or (self._closed and self._kept):
            del self._kept[:1]


class _Lease:
    """What NumPy needs to know to make an array over memory, which goes back with the last of its arrays."""

    def __init__(self, pool: OutputPool, memory: address_space.AddressRange, shape: tuple[int, ...]) -> None:
        self._pool, self._memory = pool, memory
        self.__array_interface__ = {
            "data": (memory.address, False),
            "typestr": np.dtype(np.float32).str,
            "shape": shape,
            "version": 3,
        }

    def __del__(self) -> None:
        self._pool.give(self._memory)


def _new(nbytes: int) -> address_space.AddressRange:
    memory = address_space.AddressRange(round_up(nbytes, address_space.HUGE_PAGE))
    memory.map_zeros(0, memory.nbytes)
    memory.prefer_huge_pages(0, memory.nbytes)
    return memory
