"""The spill file: an unlinked file for changed rows that exceed the memory budget.

It is gone once the table is closed or the process has ended. It is written in long stretches, read record by record,
and neither synced nor recovered. Each record that is read is compared with a checksum in memory, because the kernel may
drop a page that it could not write.
"""

from __future__ import annotations

import errno
import os
import weakref
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE, round_up
from shardemb.compute import file_blocks, row_kernels
from shardemb.format.documents import checksum
from shardemb.memory.slots import Slots
from shardemb.storage import address_space, files

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

STAGE_BYTES = 4 * 2**20
"""Bytes that are collected in memory before they are written."""


class SpillFile:
    """Spilled records of one table. Callers hold the store's lock.

    Parameters
    ----------
    folder : Path
        Where the file is created; it has no name there.
    record_bytes, capacity : int
        Bytes of a record, and the largest number of records.

    Attributes
    ----------
    slots : Slots
        The slots of the file: slot ``k`` is at offset ``k * record_bytes``.
    """

    def __init__(self, folder: Path, record_bytes: int, capacity: int) -> None:
        self._path = folder / "(spill file)"  # for error messages alone
        self._pid = os.getpid()
        self._record_bytes = record_bytes
        self._descriptor = files.open_unnamed(folder)
        weakref.finalize(self, files.close, self._descriptor).atexit = False
        self.slots = Slots(capacity)
        self._checksums: NDArray[np.uint64] = address_space.zeros(np.uint64, capacity)
        self._step = max(1, STAGE_BYTES // record_bytes)
        self._stage = address_space.AddressRange(round_up(self._step * record_bytes, PAGE))
        self._stage.map_zeros(0, self._stage.nbytes)

    def write(self, rows: Int64Array, addresses: Int64Array) -> Int64Array:
        """Write the records of rows, which are at the given addresses; return their slots.

        Raises
        ------
        DiskFullError, OSError
            The disk is full, or the file cannot be written; none of the records is stored.
        """
        end, size = self.slots.end, self._record_bytes
        slots = self.slots.allocate(rows)
        try:
            for start in range(0, slots.size, self._step):
                some = slots[start : start + self._step]
                row_kernels.gather_images(addresses, size, self._stage.address, start, start + some.size)
                stage = self._stage.bytes(0, some.size * size)
                for first, last in file_blocks.runs(some):
                    files.write(
                        self._descriptor,
                        stage[first * size : last * size],
                        int(some[first]) * size,
                        self._path,
                    )
                self._checksums[some] = [checksum(stage[i : i + size]) for i in range(0, len(stage), size)]
        except BaseException:
            # The part that was written must not keep space on a disk that may be full.
            self.slots.free(slots, end=end)
            files.truncate(self._descriptor, self.slots.end * size)
            raise
        return slots

    def read(self, slots: Int64Array, addresses: Int64Array) -> None:
        """Copy the records in slots to addresses; the slots stay allocated.

        Raises
        ------
        OSError
            A record cannot be read, or is not what was written.
        """
        order, size = np.argsort(slots), self._record_bytes
        slots, addresses = slots[order], addresses[order]
        runs = [
            (first + part, min(first + part + self._step, last))
            for first, last in file_blocks.runs(slots)
            for part in range(0, last - first, self._step)
        ]
        for first, last in runs:  # request all of it before the first read waits
            files.will_need(self._descriptor, int(slots[first]) * size, (last - first) * size)
        for first, last in runs:
            view = self._stage.bytes(0, (last - first) * size)
            files.read_into(self._descriptor, view, int(slots[first]) * size, self._path)
            for i in range(last - first):
                if checksum(view[i * size : (i + 1) * size]) != self._checksums[slots[first + i]]:
                    what = "call store.rollback()"
                    if os.getpid() != self._pid:
                        what = f"process {self._pid} has changed it since this one was forked: open the store here"
                    msg = f"{self._path} does not hold what was written to it; {what}"
                    raise OSError(errno.EIO, msg)
            row_kernels.scatter_images(self._stage.address, size, addresses, first, last)

    def release(self, slots: Int64Array) -> None:
        """Free slots; once none is in use, the file takes no disk space. A forked child leaves the file as it is."""
        self.slots.free(slots)
        if self.slots.count == 0 and os.getpid() == self._pid:
            files.truncate(self._descriptor, 0)
