"""The rows of a table that are in memory, over its files: rows that changed, and copies of rows that are about to.

The newest record of a row is in the files; or in a slot, which is memory of this process; or *spilled*, that is, in the
spill file, where changed rows go that exceed the memory budget. An index says which, see ``compute/row_index.py``. It
takes memory only around the rows that it holds: a table of a billion rows costs what its changed rows cost.

Whatever moves rows holds the store's lock, but lookups follow the index without it. Two orders of steps make that safe:

- A record is complete before the index leads to it: a reserved slot is filled first and published afterwards. So a
  lookup finds the whole record, whether it looks before or after that.
- Before a slot is used again, the index stops leading to it, and then `Overlay.version` changes. A lookup that began
  earlier may still read that slot, and find another row there. So it compares the version before with the version
  after, and starts over under the lock if they differ.

A fold writes into the files that lookups read. Every row that it writes is in a slot or spilled until the fold ends, so
a lookup that begins during the fold does not read such a row from the files. One that began earlier may, if it found
the row in no slot; this is why the version changes when a fold begins, too.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE, round_up
from shardemb.compute import row_index, row_kernels
from shardemb.compute.row_index import NODE
from shardemb.memory.slots import DIRTY, Slots
from shardemb.memory.spill_file import SpillFile
from shardemb.storage import address_space

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

    InPieces = Callable[[Callable[[int, int], None], int], None]

SLOT_BYTES, NODE_BYTES = 16, 64
"""Bytes of a slot besides its record, and bytes of a branch or a leaf of the index."""

AHEAD_BYTES = 32 * 2**20
"""Most memory that is touched ahead of the slots in use."""

_MAX_SLOTS = 2**31 - 2
"""As many as an entry of the index can tell apart: it is an int32, ``slot + 1`` or ``-(slot + 1)``."""

_NO_INDEX = np.empty(0, np.int32)


def at_once(function: Callable[[int, int], None], count: int) -> None:
    """Call ``function(start, stop)`` for all of a range, in one call."""
    function(0, count)


class Overlay:
    """The rows of one table that are in memory. Callers hold the store's lock, except where a method says otherwise.

    Parameters
    ----------
    memory : AddressRange
        Holds the table's files, and after them as much address space for slots.
    records : ndarray of uint8, shape (twice the rows of the files, bytes of a record)
        The same memory as records: the rows of the files first, then the slots. A *place* is an index into it.

    Attributes
    ----------
    slots : Slots
        The slots in memory.
    first_slot : int
        The place of slot 0.
    slot_bytes, row_bytes : int
        The least and the most memory that a row in a slot takes, with its share of the index.
    kept_bytes : int
        Bytes of copies that `FrozenRows` keeps of this table's rows.
    """

    def __init__(self, memory: address_space.AddressRange, records: NDArray[np.uint8]) -> None:
        self._memory = memory
        self._records = records
        self.first_slot = len(records) // 2
        self._record_bytes: int = records.shape[1]
        self.slot_bytes: int = self._record_bytes + SLOT_BYTES
        self.row_bytes: int = self.slot_bytes + 2 * NODE_BYTES
        self._max_slots = min(self.first_slot, _MAX_SLOTS)
        self.slots = Slots(self._max_slots)
        leaves = -(-self.first_slot // NODE)
        branches = -(-leaves // NODE)
        nodes = min(branches, _MAX_SLOTS), min(leaves, _MAX_SLOTS)
        self._directory: NDArray[np.int32]
        self._directory, *arrays = address_space.zeros_together(
            [(np.int32, branches), *((np.int32, size) for each in nodes for size in _Nodes.sizes(each))]
        )
        self._branches, self._leaves = _Nodes(*arrays[:2]), _Nodes(*arrays[2:])
        self.kept_bytes = 0
        self._spill_file: SpillFile | None = None
        self._mapped_bytes = self._touched_bytes = 0
        self._version = 0
        self._rewinding = False

    @property
    def spilled(self) -> int:
        """The number of rows in the spill file."""
        return 0 if self._spill_file is None else self._spill_file.slots.count

    @property
    def nbytes(self) -> int:
        """Bytes of memory that rows in slots take, with their index, and copies of rows."""
        if not self.slots.count:  # of thousands of tables, few have any
            return self.kept_bytes
        nodes = sum(min(self.slots.count, nodes.used) for nodes in (self._branches, self._leaves))
        return self.slots.count * self.slot_bytes + nodes * NODE_BYTES + self.kept_bytes

    @property
    def idle_bytes(self) -> int:
        """Bytes of memory that free slots take."""
        return (self.slots.end - self.slots.count) * self._record_bytes

    @property
    def version(self) -> int | None:
        """A number that changes before a lookup without the lock could find a wrong record; None while each one could.

        Such a lookup compares it before and after. It is None while any row is spilled, since only the holder of the
        lock can reload rows, and while `rewinding`.
        """
        return None if self.spilled or self._rewinding else self._version

    # ---- where rows are; no lock needed

    @property
    def index(self) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], int]:
        """What `row_index.place_of` needs to find rows; the arrays are empty if no row is in a slot."""
        if self.slots.count == 0:
            return _NO_INDEX, _NO_INDEX, _NO_INDEX, self.first_slot
        return self._directory, self._branches.entries, self._leaves.entries, self.first_slot

    def places(self, rows: Int64Array) -> Int64Array:
        """Return the place of each row: that of its slot; its own if only the files have it; -1 if it is spilled."""
        if not self.slots.count and not self.spilled:
            return rows.copy()
        directory, branches, leaves = self._directory, self._branches.entries, self._leaves.entries
        return row_index.places_of(directory, branches, leaves, self.first_slot, rows, 0, rows.size)

    # ---- into memory

    def count_new(self, rows: Int64Array) -> int:
        """Count the rows that are not in a slot."""
        return int(np.count_nonzero(self._entries(rows) <= 0))

    def count_spilled(self, rows: Int64Array) -> int:
        """Count the rows that are spilled."""
        return int(np.count_nonzero(self._entries(rows) < 0))

    def reserve(self, rows: Int64Array) -> Int64Array:
        """Allocate slots for rows that are only in the files; return their places, ascending.

        The caller fills these, then calls `publish`, or `unreserve` if it cannot fill them.

        Raises
        ------
        OSError
            There is no more memory.
        """
        empty, needed = self.slots.count == 0, self.slots.next_end(rows.size)
        if needed > self._max_slots:
            msg = f"a table can have at most {self._max_slots} rows in memory at once; commit first"
            raise MemoryError(msg)
        self._map(needed * self._record_bytes)
        slots = self.slots.allocate(rows)
        if empty:
            # A lookup that is running was given the empty index, so it will read all of its rows from the files.
            self._version += 1
        return self.first_slot + slots

    def touch_ahead(self, most: int) -> Callable[[], None] | None:
        """Return what touches memory for the slots that come next, in any thread; None if enough was touched.

        The first touch of a page costs more than all else that an update does with the rows in it: the kernel clears
        it, and in a virtual machine the host may have to find one before. At most a quarter of what the slots take is
        touched ahead, and at most `most` bytes.
        """
        used = self.slots.end * self._record_bytes
        ahead = min(AHEAD_BYTES, most, used // 4)
        if ahead < 2 * address_space.HUGE_PAGE or used + ahead // 2 <= self._touched_bytes:
            return None
        start = round_up(max(used, self._touched_bytes), address_space.HUGE_PAGE)
        try:
            self._map(min(used + ahead, self._start))
        except OSError:
            return None  # those that need it will tell
        stop = self._touched_bytes = min(round_up(used + ahead, address_space.HUGE_PAGE), self._mapped_bytes)

        def touch() -> None:
            # A huge page at a time: whoever maps a file meanwhile waits for one.
            for offset in range(start, stop, address_space.HUGE_PAGE):
                nbytes = min(address_space.HUGE_PAGE, stop - offset)
                with contextlib.suppress(OSError):  # an older kernel
                    self._memory.advise(self._start + offset, nbytes, address_space.MADV_POPULATE_WRITE)

        return touch

    def publish(self, rows: Int64Array, places: Int64Array) -> None:
        """Let the index lead to slots, once they hold the records of their rows."""
        self._set_entries(rows, places - self.first_slot + 1)

    def replace(self, rows: Int64Array, places: Int64Array) -> None:
        """As `publish`, for rows that may be spilled: what the spill file holds of them is dropped."""
        entries = self._entries(rows)
        spilled = -entries[entries < 0].astype(np.int64) - 1
        self.publish(rows, places)
        if self._spill_file is not None and spilled.size:
            with contextlib.suppress(OSError):  # only the space on the disk is not released
                self._spill_file.release(spilled)

    def unreserve(self, places: Int64Array) -> None:
        """Free reserved slots that were not published. No lookup can know of them, so the version stays."""
        self.slots.free(places - self.first_slot)

    def mark_dirty(self, places: Int64Array) -> None:
        """Note that slots are about to hold committed records that the files do not hold."""
        self.slots.mark_dirty(places - self.first_slot)

    def mark_changed(self, places: Int64Array) -> None:
        """Note that rows in slots are about to differ from the last commit."""
        self.slots.mark_changed(places - self.first_slot)

    def mark_touched(self, rows: Int64Array) -> None:
        """Note that rows are in use, so that those in slots are evicted last."""
        entries = self._entries(rows)
        self.slots.mark_touched(entries[entries > 0].astype(np.int64) - 1)

    # ---- changes

    @property
    def changes(self) -> int:
        """How many rows differ from the last commit."""
        return sum(slots.changed for slots in self._all_slots())

    def changed_rows(self) -> Int64Array:
        """List the rows that differ from the last commit, in the order of their slots, spilled rows last."""
        return np.concatenate([slots.owner[slots.changed_slots()] for slots in self._all_slots()])

    def are_dirty(self, rows: Int64Array) -> NDArray[np.bool_]:
        """Return for each row whether it is dirty: in a dirty slot, or spilled."""
        entries = self._entries(rows).astype(np.int64)
        dirty: NDArray[np.bool_] = self.slots.state[np.maximum(entries - 1, 0)] & DIRTY != 0
        return ((entries > 0) & dirty) | (entries < 0)

    def dirty_rows(self) -> Int64Array:
        """List the dirty rows."""
        return np.concatenate([slots.owner[slots.dirty_slots()] for slots in self._all_slots()])

    def clear_changes(self) -> None:
        """Note that no row differs from the last commit: all changes were undone."""
        for slots in self._all_slots():
            slots.clear_changes()

    # ---- commits under way

    def freeze(self) -> Int64Array:
        """Freeze the rows that differ from the last commit; return them in the order in which `pack` is fastest.

        None differs any more. Until they are unfrozen, no fold takes them for rows that it writes.
        """
        return np.concatenate([slots.owner[slots.freeze()] for slots in self._all_slots()])

    def frozen_among(self, rows: Int64Array, places: Int64Array) -> Int64Array:
        """Return those of the rows that are frozen. Their places, as `places` returns them, save a search."""
        # While rows are spilled, one that is about to leave the spill file may have a new place already.
        entries = self._entries(rows) if self.spilled else np.maximum(places - self.first_slot + 1, 0)
        return rows[self._are_frozen(entries)]

    def pack_frozen(self, rows: Int64Array, address: int, run: InPieces = at_once) -> Int64Array:
        """Copy the records of those of the rows that are frozen to an address, contiguously, and unfreeze them.

        Returns these rows. ``run(function, count)`` calls ``function(start, stop)`` for all of a range.

        Raises
        ------
        OSError
            The spill file cannot be read; the rows stay frozen.
        """
        entries = self._entries(rows)
        if self.spilled:
            which = np.flatnonzero(self._are_frozen(entries))
            places = self.first_slot - 1 + entries[which].astype(np.int64)
            places[entries[which] < 0] = -1
        else:  # nothing can fail below
            which, slots = self.slots.take_frozen(entries)
            places = self.first_slot + slots

        def pack(start: int, stop: int) -> None:
            row_kernels.pack(self._records, places[start:stop], address + start * self._record_bytes)

        run(pack, which.size)
        if self.spilled:
            self._read_spilled(entries[which], address)
            for file, _, numbers in self._by_file(entries[which]):
                file.unfreeze(numbers)
        return rows if which.size == rows.size else rows[which]

    def unfreeze(self, rows: Int64Array) -> None:
        """Freeze rows no more: they differ from the last commit again."""
        for slots, _, numbers in self._by_file(self._entries(rows)):
            slots.unfreeze(numbers)
            slots.mark_changed(numbers)

    # ---- folds

    def begin_fold(self) -> None:
        """Note that the fold of all dirty rows begins. Rows with uncommitted changes will still be dirty after it."""
        # A lookup that found a row in no slot before it was changed may read that row from the files, half written.
        self._version += 1
        for slots in self._all_slots():
            slots.begin_fold()

    def end_fold(self, *, folded: bool) -> None:
        """Note that the fold has ended; unless `folded`, the files may not hold the rows and they stay dirty.

        Spilled rows that the files now hold are dropped from the spill file.
        """
        for slots in self._all_slots():
            slots.end_fold(folded=folded)
        if self._spill_file is not None:
            slots = self._spill_file.slots
            self._drop_spilled(slots.choose(slots.count, exclude=DIRTY))

    # ---- out of memory

    def evict(self, count: int) -> None:
        """Evict up to `count` rows that the files hold, first those that were not touched for long."""
        if self.slots.count > self.slots.dirty:
            slots = self.slots.choose(count, exclude=DIRTY)
            if slots.size:
                self._drop_slots(slots)

    def spill(self, count: int, folder: Path) -> None:
        """Move up to `count` rows, clean or dirty, from memory to the spill file.

        Raises
        ------
        DiskFullError, OSError
            The rows stay in memory.
        """
        if self._spill_file is None:
            self._spill_file = SpillFile(folder, self._record_bytes, self._max_slots)
        slots = self.slots.choose(count, exclude=np.uint8(0))
        if slots.size == 0:
            return
        rows = self.slots.owner[slots]
        # From here on, until all of them are reloaded, `version` is None: lookups that are running will start over.
        spilled = self._spill_file.write(rows, self._addresses(slots))
        self._spill_file.slots.set_flags(spilled, self.slots.flags_of(slots))
        self._set_entries(rows, -(spilled + 1))
        self._free_slots(slots)

    def compact(self) -> None:
        """Move rows so that the slots in use are contiguous, and release the rest of the memory."""
        source, target = self.slots.compact()
        if source.size:
            row_kernels.copy_rows(
                self._records, self.first_slot + source, self.first_slot + target, 0, source.size
            )
            self._set_entries(self.slots.owner[target], target + 1)
            self._version += 1  # before the old slots are released, as in `_free_slots`
        used = round_up(self.slots.end * self._record_bytes, PAGE)
        self._memory.release(self._start + used, self._mapped_bytes - used)
        self._touched_bytes = used

    def reload(self, rows: Int64Array) -> None:
        """Bring those of the distinct rows that are spilled back into memory.

        Raises
        ------
        OSError
            The spill file cannot be read. The rows stay spilled.
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
        """Drop whatever slots and the spill file hold of rows: their newest record is that of the files from now on."""
        entries = self._entries(rows)
        self._drop_slots(entries[entries > 0].astype(np.int64) - 1)
        if self._spill_file is not None:
            self._drop_spilled(-entries[entries < 0].astype(np.int64) - 1)

    @contextlib.contextmanager
    def rewinding(self) -> Iterator[None]:
        """Make lookups take the lock, while rows are dropped and committed images are loaded in their stead."""
        self._version += 1  # for lookups that began before this and end after it
        self._rewinding = True
        yield
        self._rewinding = False  # after an error, lookups take the lock until a later rewind succeeds

    def pack(self, rows: Int64Array, address: int) -> None:
        """Copy the records of rows to an address, contiguously.

        Raises
        ------
        OSError
            The spill file cannot be read.
        """
        row_kernels.pack(self._records, self.places(rows), address)
        if self.spilled:
            self._read_spilled(self._entries(rows), address)

    # ---- within

    def _all_slots(self) -> list[Slots]:
        return [self.slots] if self._spill_file is None else [self.slots, self._spill_file.slots]

    def _by_file(self, entries: NDArray[np.signedinteger]) -> Iterator[tuple[Slots, Int64Array, Int64Array]]:
        """Yield slots in memory and those of the spill file: which entries lead there, and to which numbers."""
        if not self.spilled:  # nearly always
            which = np.flatnonzero(entries)
            yield self.slots, which, entries[which].astype(np.int64) - 1
            return
        for slots, sign in zip(self._all_slots(), (1, -1), strict=False):
            which = np.flatnonzero(entries > 0 if sign > 0 else entries < 0)
            if which.size:
                yield slots, which, sign * entries[which].astype(np.int64) - 1

    def _are_frozen(self, entries: NDArray[np.signedinteger]) -> NDArray[np.bool_]:
        frozen = np.zeros(entries.size, np.bool_)
        for slots, which, numbers in self._by_file(entries):
            frozen[which] = slots.are_frozen(numbers)
        return frozen

    def _read_spilled(self, entries: NDArray[np.int32], address: int) -> None:
        """Copy the records of those rows that are spilled to an address, where row ``i`` has the ``i``-th record."""
        at = np.flatnonzero(entries < 0)
        if self._spill_file is not None and at.size:
            self._spill_file.read(-entries[at].astype(np.int64) - 1, address + at * self._record_bytes)

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
        """Remove slots from the index and free them: the files hold the newest record of their rows from now on."""
        self._set_entries(self.slots.owner[slots], np.zeros(slots.size, np.int64))
        self._free_slots(slots)

    def _free_slots(self, slots: Int64Array) -> None:
        """Free slots that the index does not lead to any more."""
        # The order matters. If the version changed before the index does, a lookup that begins in between would see the
        # new version and the old slot. If it changed only after the slot's memory is released or used again, a lookup
        # that reads the slot could end in between and take what it read for the row.
        self._version += 1
        self.slots.free(slots)
        if self.slots.count == 0:
            self._memory.release(self._start, self._mapped_bytes)
            self._touched_bytes = 0

    def _drop_spilled(self, slots: Int64Array) -> None:
        """As `_drop_slots`, for slots of the spill file."""
        assert self._spill_file is not None
        self._set_entries(self._spill_file.slots.owner[slots], np.zeros(slots.size, np.int64))
        self._spill_file.release(slots)

    @property
    def _start(self) -> int:
        return self._memory.nbytes // 2

    def _map(self, nbytes: int) -> None:
        """Map memory for slots, at least `nbytes` in all; twice as much as before, so that it is rarely done."""
        if nbytes <= self._mapped_bytes:
            return
        wanted = min(round_up(max(nbytes, 2 * self._mapped_bytes), address_space.HUGE_PAGE), self._start)
        self._memory.map_zeros(self._start + self._mapped_bytes, wanted - self._mapped_bytes)
        if self._mapped_bytes:  # not the first time, or a few rows would take a whole huge page
            self._memory.prefer_huge_pages(self._start + self._mapped_bytes, wanted - self._mapped_bytes)
        self._mapped_bytes = wanted


class _Nodes:
    """The branches or the leaves of the index: 16 entries a node, and a free list as ``row_index.py`` describes it."""

    def __init__(self, entries: NDArray[np.int32], free_list: NDArray[np.int32]) -> None:
        self.entries, self.free_list = entries, free_list

    @staticmethod
    def sizes(capacity: int) -> tuple[int, int]:
        """Return the lengths of the arrays, which begin as zeros, for a number of nodes."""
        return (capacity + 1) * NODE, capacity + 2

    @property
    def used(self) -> int:
        """The number of nodes in use."""
        return int(self.free_list[0] - self.free_list[1])
