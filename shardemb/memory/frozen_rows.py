"""The rows of one table that a commit under way makes durable, while changes go on.

A commit *freezes* the rows that differ from the last one: as they are at that moment, they are part of it. It packs
their records piece by piece, and other calls may change rows in between. A frozen row that is about to change is *kept*
first, that is, its record is copied; the commit packs the copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.compute import row_kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.memory.overlay import InPieces, Overlay


class FrozenRows:
    """The frozen rows of one table. Callers hold the store's lock.

    Parameters
    ----------
    overlay : Overlay
        All of its rows that differ from the last commit are frozen.
    record_bytes : int
        Bytes of a record.

    Attributes
    ----------
    count : int
        How many rows there are, packed or not.
    """

    def __init__(self, overlay: Overlay, record_bytes: int) -> None:
        self._overlay, self._record_bytes = overlay, record_bytes
        self._rows = overlay.freeze()
        self.count: int = self._rows.size
        self._next = 0  # of `_rows`, those before it are packed or kept
        self._kept: list[tuple[Int64Array, NDArray[np.uint8]]] = []

    def keep(
        self,
        rows: Int64Array,
        places: Int64Array,
        empty: Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]],
        run: InPieces,
    ) -> None:
        """Copy the records of those of the rows that are frozen, because they are about to change.

        ``empty(shape, dtype)`` makes the array for the copies; `run` is as in `Overlay.pack_frozen`.

        Raises
        ------
        MemoryError, OSError
            There is no memory, or the spill file cannot be read; nothing was changed.
        """
        frozen = self._overlay.frozen_among(rows, places)
        if frozen.size:
            records = empty((frozen.size, self._record_bytes), np.dtype(np.uint8))
            self._overlay.pack_frozen(frozen, records.ctypes.data, run)
            self._kept.append((frozen, records))
            self._overlay.kept_bytes += records.nbytes

    def fill(self, ids: Int64Array, address: int) -> None:
        """Take the next rows: write their ids to `ids` and their records to an address, contiguously.

        In all, `count` rows can be taken, each once. Copies come first, so that their memory is released.

        Raises
        ------
        OSError
            The spill file cannot be read.
        """
        filled = 0
        while filled < ids.size:
            most, to = ids.size - filled, address + filled * self._record_bytes
            some = self._fill_with_copies(most, to) if self._kept else self._fill_with_rows(most, to)
            ids[filled : filled + some.size] = some
            filled += some.size

    def _fill_with_copies(self, most: int, address: int) -> Int64Array:
        rows, records = self._kept.pop()
        if rows.size > most:
            self._kept.append((rows[most:], records[most:]))
        row_kernels.pack(records, np.arange(min(rows.size, most)), address)
        self._overlay.kept_bytes -= min(rows.size, most) * self._record_bytes
        return rows[:most]

    def _fill_with_rows(self, most: int, address: int) -> Int64Array:
        some = self._rows[self._next : self._next + most]
        packed = self._overlay.pack_frozen(some, address)  # the others were kept
        self._next += some.size
        return packed

    def release(self, *, committed: bool) -> None:
        """End the commit; unless it has `committed` them, all of its rows differ from the last commit again."""
        if not committed:
            self._overlay.unfreeze(self._rows)
        self._kept.clear()
        self._overlay.kept_bytes = 0
