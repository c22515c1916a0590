"""Where pages go that hold uncommitted changes and have no room in memory: an unlinked file, gone with the process.

It is written from the front and in long stretches, read page by page, and neither synced nor recovered. What comes
back is compared with a checksum kept in memory, because the kernel may drop a page that it could not write.
"""

from __future__ import annotations

import errno
import weakref
from typing import TYPE_CHECKING

import numpy as np

from shardemb import bitmaps, files, kernels, plan
from shardemb.replay import checksum
from shardemb.spec import PAGE

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.arrays import Int64Array

STAGE_PAGES = 1024
"""Pages that are put together in memory before they are written."""


class Scratch:
    """Pages of one mapping, kept in a file.

    Parameters
    ----------
    folder : Path
        Where the file is made; it never has a name there.
    memory : AddressRange
        Whose pages are kept.

    Attributes
    ----------
    slots : ndarray of uint32
        For every page, one more than the place in the file that holds its content; 0 where none does.
    kept : ndarray of uint64
        Bit p: page p has a slot.
    """

    def __init__(self, folder: Path, memory: files.AddressRange) -> None:
        self._path = folder / "(scratch)"
        self._memory = memory
        self._descriptor = files.open_scratch(folder)
        weakref.finalize(self, files.close, self._descriptor).atexit = False
        self.slots: NDArray[np.uint32] = files.zeros(np.uint32, memory.nbytes // PAGE)
        self.kept: NDArray[np.uint64] = files.zeros(np.uint64, -(-self.slots.size // 64))
        self._checksums: NDArray[np.uint64] = files.zeros(np.uint64, memory.nbytes // PAGE)
        self._stage = files.AddressRange(STAGE_PAGES * PAGE)
        self._stage.map_zeros(0, self._stage.nbytes)
        self._free = np.empty(0, np.int64)
        self._end = 0

    def write(self, pages: Int64Array) -> None:
        """Keep the content of pages, which have no slot, ascending.

        Raises
        ------
        DiskFullError, OSError
            There is no room, or the file cannot be written; a part of the pages may be kept.
        """
        addresses = self._memory.address + pages * PAGE
        for start in range(0, pages.size, STAGE_PAGES):
            some = pages[start : start + STAGE_PAGES]
            kernels.gather_images(addresses, PAGE, self._stage.address, start, start + some.size)
            slots = self._take(some.size)
            try:
                for first, last in plan.runs(slots):
                    part = self._stage.bytes(first * PAGE, (last - first) * PAGE)
                    files.write(self._descriptor, part, int(slots[first]) * PAGE, self._path)
            except BaseException:
                self._give(slots)
                raise
            stage = self._stage.bytes(0, some.size * PAGE)
            self._checksums[some] = [checksum(stage[i : i + PAGE]) for i in range(0, len(stage), PAGE)]
            self.slots[some] = slots + 1
            bitmaps.mark_private(some, PAGE, self.kept)

    def read(self, pages: Int64Array) -> None:
        """Put the content of pages, which have slots, back into memory; the slots stay theirs.

        Raises
        ------
        OSError
            It cannot be read, or is not what was written.
        """
        slots = self.slots[pages].astype(np.int64) - 1
        order = np.argsort(slots)
        pages, slots = pages[order], slots[order]
        for first, last in plan.runs(slots):
            files.expect(self._descriptor, int(slots[first]) * PAGE, (last - first) * PAGE)
        memory = self._memory.bytes(0, self._memory.nbytes)
        for first, last in plan.runs(slots):
            data = memoryview(
                files.read_at(self._descriptor, (last - first) * PAGE, int(slots[first]) * PAGE, self._path)
            )
            for i, page in enumerate(pages[first:last].tolist()):
                content = data[i * PAGE : (i + 1) * PAGE]
                if checksum(content) != self._checksums[page]:
                    msg = f"{self._path} does not hold what was written to it; call store.rollback()"
                    raise OSError(errno.EIO, msg)
                memory[page * PAGE : (page + 1) * PAGE] = content

    def release(self, pages: Int64Array) -> None:
        """Give up the slots of pages, which have some."""
        slots = self.slots[pages].astype(np.int64) - 1
        self.slots[pages] = 0
        bitmaps.clear_bits(self.kept, pages)
        self._give(slots)

    def _take(self, count: int) -> Int64Array:
        """Take free slots, ascending: the first ones, so that the file stays short."""
        taken, self._free = self._free[:count], self._free[count:]
        new = count - taken.size
        taken = np.concatenate([taken, np.arange(self._end, self._end + new)])
        self._end += new
        return taken

    def _give(self, slots: Int64Array) -> None:
        if slots.size == 0:
            return
        self._free = np.sort(np.concatenate([self._free, slots]))
        if self._free.size == self._end:  # nothing is kept any more
            files.shorten(self._descriptor, 0)
            self._free, self._end = np.empty(0, np.int64), 0
