"""The rows of a table that lie in memory, over its files: those that changed, and copies of those that are about to.

The newest record of a row is in one of three places: in the files; in a slot, which is memory of this process; or
*out*, in the scratch file, where changed rows go that have no room in memory. An index tells which: a directory with
one number for every 256 rows leads to a branch, with one number for every 16 of these, and that to a leaf of 16
entries. All of it takes memory only where rows are in slots: a table of a billion rows costs what its changed rows do.

Lookups follow the index without the store's lock. What they may meet: a row that comes into a slot is copied before its
entry is set; where one has left before its slot is used again, `Overlay.version` tells, and they look again.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE, round_up
from shardemb.compute import row_index, row_kernels
from shardemb.compute.row_index import NODE
from shardemb.engine.slots import DIRTY, Slots
from shardemb.engine.spill_file import SpillFile
from shardemb.storage import address_space

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array

SLOT_BYTES, NODE_BYTES = 16, 64
"""What a slot takes besides its record, and what the index takes for a branch or a leaf."""

_MAX_SLOTS = 2**31 - 2
_NO_ROWS = np.empty(0, np.int64)
_NO_INDEX = np.empty(0, np.int32)


class Overlay:
    """The rows of one table that lie in memory. Everything is under the store's lock, but what says otherwise.

    Parameters
    ----------
    memory : AddressRange
        Holds the table's files, and behind them as much address space for slots.
    records : ndarray of float32, shape (twice the rows of the files, width)
        The same, as records: rows of the files first, then slots.

    Attributes
    ----------
    slots : Slots
        Slots in memory.
    spilled : int
        Rows that are in the scratch file.
    slot_bytes, row_bytes : int
        What a row takes in memory at least and at most.
    """

    def __init__(self, memory: address_space.AddressRange, records: Float32Array) -> None:
        self._memory = memory
        self._records = records
        self.first_slot = len(records) // 2
        self._record_bytes: int = 4 * records.shape[1]
        self.slot_bytes: int = self._record_bytes + SLOT_BYTES
        self.row_bytes: int = self.slot_bytes + 2 * NODE_BYTES
        self._max_slots = min(self.first_slot, _MAX_SLOTS)
        self.slots = Slots(self._max_slots)
        leaves = -(-self.first_slot // NODE)
        branches = -(-leaves // NODE)
        self._directory: NDArray[np.int32] = address_space.zeros(np.int32, branches)
        self._branches = _Nodes(min(branches, _MAX_SLOTS))
        self._leaves = _Nodes(min(leaves, _MAX_SLOTS))
        self._spill_file: SpillFile | None = None
        self._mapped_bytes = 0
        self._version = 0
        self._rewinding = False

    @property
    def spilled(self) -> int:
        """Rows that are in the scratch file."""
        return 0 if self._spill_file is None else self._spill_file.slots.count

    @property
    def nbytes(self) -> int:
        """Bytes of memory that rows in slots take, with the index."""
        nodes = sum(min(self.slots.count, nodes.used) for nodes in (self._branches, self._leaves))
        return self.slots.count * self.slot_bytes + nodes * NODE_BYTES

    @property
    def idle_bytes(self) -> int:
        """Bytes of memory that slots take which no row is in."""
        return (self.slots.end - self.slots.count) * self._record_bytes

    @property
    def version(self) -> int | None:
        """A number that is the same as long as no row leaves its slot; None while some are not in memory.

        A lookup without the store's lock compares it before and after.
        """
        return None if self.spilled or self._rewinding else self._version

    # ---- where rows are; needs no lock

    @property
    def index(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], int]:
        """What `kernels.place_of` follows, the first slot's place at the end; empty where no row is in a slot."""
        if self.slots.count == 0:
            return _NO_INDEX, _NO_INDEX, _NO_INDEX, self.first_slot
        return self._directory, self._branches.entries, self._leaves.entries, self.first_slot

    def places(self, rows: Int64Array) -> Int64Array:
        """Return the places of rows among all records: their own for rows of the files, -1 for those that are out."""
        if not self.slots.count and not self.spilled:
            return rows.copy()
        directory, branches, leaves = self._directory, self._branches.entries, self._leaves.entries
        return row_index.places_of(directory, branches, leaves, self.first_slot, rows, 0, rows.size)

    # ---- into memory

    def count_new(self, rows: Int64Array) -> int:
        """Count the rows that are not in a slot."""
        return int(np.count_nonzero(self._entries(rows) <= 0))

    def count_spilled(self, rows: Int64Array) -> int:
        """Count the rows that are out."""
        return int(np.count_nonzero(self._entries(rows) < 0))

    def reserve(self, rows: Int64Array) -> Int64Array:
        """Take slots for rows of the files, and return their places, which are to be filled before `publish`.

        Raises
        ------
        OSError
            There is no more memory.
        """
        empty, needed = self.slots.count == 0, self.slots.next_end(rows.size)
        if needed > self._max_slots:
            msg = f"more than {self._max_slots} rows of a table cannot lie in memory at once; commit before"
            raise MemoryError(msg)
        self._map(needed * self._record_bytes)
        slots = self.slots.allocate(rows)
        if empty:
            self._version += 1  # a lookup that found no index at all must look again
        return self.first_slot + slots

    def publish(self, rows: Int64Array, places: Int64Array) -> None:
        """Let rows be found in slots that hold their records."""
        self._set_entries(rows, places - self.first_slot + 1)

    def unreserve(self, places: Int64Array) -> None:
        """Give slots back that were not published."""
        self.slots.free(places - self.first_slot)

    def mark_dirty(self, places: Int64Array) -> None:
        """Note that slots are about to hold committed records that the files do not."""
        self.slots.mark_dirty(places - self.first_slot)

    def mark_changed(self, places: Int64Array) -> None:
        """Note that rows in slots are about to differ from the last commit."""
        self.slots.mark_changed(places - self.first_slot)

    def touch(self, rows: Int64Array) -> None:
        """Let those of the rows that are in slots be the last to leave."""
        entries = self._entries(rows)
        self.slots.touch(entries[entries > 0].astype(np.int64) - 1)

    # ---- changes

    @property
    def changes(self) -> int:
        """How many rows differ from the last commit."""
        return sum(slots.changed for slots in self._all_slots())

    def changed_rows(self) -> Int64Array:
        """List the rows that differ from the last commit, in the order of their slots, those that are out last."""
        return np.concatenate([slots.owner[slots.changed_slots()] for slots in self._all_slots()])

    def are_dirty(self, rows: Int64Array) -> NDArray[np.bool_]:
        """Tell which rows have a record here that the files do not hold, or may not hold yet."""
        entries = self._entries(rows).astype(np.int64)
        dirty: NDArray[np.bool_] = self.slots.state[np.maximum(entries - 1, 0)] & DIRTY != 0
        return ((entries > 0) & dirty) | (entries < 0)

    def dirty_rows(self) -> Int64Array:
        """List the rows that `are_dirty`."""
        return np.concatenate([slots.owner[slots.dirty_slots()] for slots in self._all_slots()])

    def clear_changes(self) -> None:
        """Let no row differ from the last commit any more."""
        for slots in self._all_slots():
            slots.clear_changes()

    # ---- folds

    def begin_fold(self) -> None:
        """Note which rows are folded now; those with changes that are not committed stay newer all the same."""
        # A lookup that found a row in no slot before this must not take its record from the files, half written.
        self._version += 1
        for slots in self._all_slots():
            slots.begin_fold()

    def end_fold(self, *, folded: bool) -> None:
        """Forget the note of `begin_fold`; or take it back, where the files do not hold those rows.

        What the scratch file keeps of rows that the files now hold is given up.
        """
        for slots in self._all_slots():
            slots.end_fold(folded=folded)
        if self._spill_file is not None:
            slots = self._spill_file.slots
            self._drop_spilled(slots.choose(slots.count, exclude=DIRTY))

    # ---- out of memory

    def evict(self, count: int) -> None:
        """Let up to `count` rows leave memory that the files hold, those first that were not touched for long."""
        if self.slots.count > self.slots.dirty:
            slots = self.slots.choose(count, exclude=DIRTY)
            if slots.size:
                self._drop_slots(slots)

    def spill(self, count: int, folder: Path) -> None:
        """Let up to `count` rows leave memory for the scratch file.

        Raises
        ------
        DiskFullError, OSError
            They stay in memory.
        """
        if self._spill_file is None:
            self._spill_file = SpillFile(folder, self._record_bytes, self._max_slots)
        slots = self.slots.choose(count, exclude=np.uint8(0))
        if slots.size == 0:
            return
        rows = self.slots.owner[slots]
        spilled = self._spill_file.write(rows, self._addresses(slots))
        self._spill_file.slots.set_flags(spilled, self.slots.flags_of(slots))
        self._set_entries(rows, -(spilled + 1))
        self._free_slots(slots)

    def compact(self) -> None:
        """Move rows into slots that are free, so that those in use lie side by side, and give the other memory back."""
        source, target = self.slots.compact()
        if source.size:
            row_kernels.copy_rows(
                self._records, self.first_slot + source, self.first_slot + target, 0, source.size
            )
            self._set_entries(self.slots.owner[target], target + 1)
            self._version += 1  # as in `_free_slots`
        used = round_up(self.slots.end * self._record_bytes, PAGE)
        self._memory.release(self._start + used, self._mapped_bytes - used)

    def reload(self, rows: Int64Array) -> None:
        """Bring those of the rows, distinct, into memory that are out.

        Raises
        ------
        OSError
            The scratch file cannot be read. They stay out.
        """
        if self._spill_file is None or not self.spilled:
            return
        entries = self._entries(rows)
        rows, spilled = rows[entries < 0], -entries[entries < 0].astype(np.int64) - 1
        if rows.size == 0:
            return
        places = self.reserve(rows)
        slots = places - self.first_slot
        try:
            self._spill_file.read(spilled, self._addresses(slots))
        except BaseException:
            self.unreserve(places)
            raise
        self.slots.set_flags(slots, self._spill_file.slots.flags_of(spilled))
        self.publish(rows, places)
        self._spill_file.release(spilled)

    def drop(self, rows: Int64Array) -> None:
        """Let the files hold the newest record of rows."""
        entries = self._entries(rows)
        self._drop_slots(entries[entries > 0].astype(np.int64) - 1)
        if self._spill_file is not None:
            self._drop_spilled(-entries[entries < 0].astype(np.int64) - 1)

    @contextlib.contextmanager
    def rewinding(self) -> Iterator[None]:
        """Tell lookups to wait for the lock, while rows are forgotten and put together anew."""
        self._version += 1
        self._rewinding = True
        yield
        self._rewinding = False  # unless it broke off

    def read_spilled(self, rows: Int64Array, target: int) -> None:
        """Copy the records of those rows that are out to where they belong in a row of records at an address.

        Raises
        ------
        OSError
            The scratch file cannot be read.
        """
        if self._spill_file is not None and self.spilled:
            entries = self._entries(rows)
            at = np.flatnonzero(entries < 0)
            self._spill_file.read(-entries[at].astype(np.int64) - 1, target + at * self._record_bytes)

    # ---- within

    def _all_slots(self) -> list[Slots]:
        return [self.slots] if self._spill_file is None else [self.slots, self._spill_file.slots]

    def _addresses(self, slots: Int64Array) -> Int64Array:
        addresses: Int64Array = self._records.ctypes.data + (self.first_slot + slots) * self._record_bytes
        return addresses

    def _entries(self, rows: Int64Array) -> NDArray[np.int32]:
        entries = np.zeros(rows.size, np.int32)
        if self.slots.count or self.spilled:
            row_index.entries_of(self._directory, self._branches.entries, self._leaves.entries, rows, entries)
        return entries

    def _set_entries(self, rows: Int64Array, entries: Int64Array) -> None:
        branches, leaves = self._branches, self._leaves
        row_index.set_entries(
            self._directory,
            branches.entries,
            branches.free_list,
            leaves.entries,
            leaves.free_list,
            rows,
            entries,
        )

    def _drop_slots(self, slots: Int64Array) -> None:
        """Give up slots, of whose rows the files shall hold the newest."""
        self._set_entries(self.slots.owner[slots], np.zeros(slots.size, np.int64))
        self._free_slots(slots)

    def _free_slots(self, slots: Int64Array) -> None:
        """Give up slots that the index does not lead to any more."""
        # A lookup that began before this may have found one there, and must not find it used for another row.
        self._version += 1
        self.slots.free(slots)
        if self.slots.count == 0:
            self._memory.release(self._start, self._mapped_bytes)

    def _drop_spilled(self, slots: Int64Array) -> None:
        """Give up what the scratch file keeps, of which the files hold the same."""
        assert self._spill_file is not None
        self._set_entries(self._spill_file.slots.owner[slots], np.zeros(slots.size, np.int64))
        self._spill_file.release(slots)

    @property
    def _start(self) -> int:
        return self._memory.nbytes // 2

    def _map(self, nbytes: int) -> None:
        """Map memory for slots, at least so many bytes in all."""
        if nbytes <= self._mapped_bytes:
            return
        wanted = min(round_up(max(nbytes, 2 * self._mapped_bytes), address_space.HUGE_PAGE), self._start)
        self._memory.map_zeros(self._start + self._mapped_bytes, wanted - self._mapped_bytes)
        if self._mapped_bytes:  # few rows shall not take a huge page
            self._memory.prefer_huge_pages(self._start + self._mapped_bytes, wanted - self._mapped_bytes)
        self._mapped_bytes = wanted


class _Nodes:
    """Branches or leaves: entries, 16 a node; and how many were ever used, how many of them are free now, and which."""

    def __init__(self, most: int) -> None:
        self.entries: NDArray[np.int32] = address_space.zeros(np.int32, (most + 1) * NODE)
        self.free_list: NDArray[np.int32] = address_space.zeros(np.int32, most + 2)

    @property
    def used(self) -> int:
        """How many are in use."""
        return int(self.free_list[0] - self.free_list[1])
