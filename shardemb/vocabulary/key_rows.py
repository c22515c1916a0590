"""The keys of one vocabulary: which row a key has, which rows new keys get, and which rows are free again.

What a commit makes durable is in tables of the store, so that recovery, rollback, checksums and copies need no code of
their own. ``NAME@keys`` holds the key of each row, ``NAME@bytes`` the bytes of strings, ``NAME@freed`` a ring of rows
that lost their key, ``NAME@sketch`` the counters of keys without a row. The counts in the `VocabularyEntry` say which
records of these tables are in use. ``hash_index.py`` finds the rows with which a key is compared.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from shardemb.base import validation
from shardemb.base.forks import usable_in_child
from shardemb.base.interrupts import signals_deferred
from shardemb.engine import batch
from shardemb.errors import FormatError, RowIdError, VocabularyNotFoundError
from shardemb.storage import files
from shardemb.vocabulary import hashing, index_kernels, key_kernels, key_records, keys
from shardemb.vocabulary.hash_index import KeyIndex, new_salt
from shardemb.vocabulary.index_files import Coverage
from shardemb.vocabulary.key_tables import KeyTables, grow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from shardemb.admission import Admission
    from shardemb.base.validation import Int64Array
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.table_state import TableState
    from shardemb.format.manifest import VocabularyEntry
    from shardemb.vocabulary.hash_index import View
    from shardemb.vocabulary.keys import Keys, KeysLike, KeyType

T = TypeVar("T")

SLICE_ROWS = 2**18
"""How many rows are read or written in one step."""

BATCH_ROWS = 65_536
"""Most rows of an Arrow batch."""


class KeyRows:
    """The state and the work of one vocabulary. Users hold a `Vocabulary`, which has the contracts.

    Reading needs no lock. Changes take `lock`, then the store's lock.

    Parameters
    ----------
    runtime : Runtime
    entry : VocabularyEntry
        What the last commit says about the vocabulary, or what a new one begins with.
    tables : mapping of str to TableState
        The tables that hold its keys, by kind.
    path : Path
        Folder of the index.

    Attributes
    ----------
    lock : RLock
        Held by everything that changes the vocabulary. Taken before the store's lock, because that is released while
        a change waits for a fold to free memory.
    entry : VocabularyEntry
        What a commit would say about the vocabulary now.
    tables : KeyTables
    reassigned : int
        Changes whenever a key loses its row, once before and once after that: it is odd meanwhile. So if it was even
        and has not changed, a row that was found for a key is still the row of that key.
    """

    def __init__(
        self,
        runtime: Runtime,
        entry: VocabularyEntry,
        tables: Mapping[str, TableState],
        path: Path,
    ) -> None:
        self.lock = threading.RLock()
        self.entry = self._first = entry
        self._runtime = runtime
        self.tables = KeyTables(runtime, tables)
        self._bound_to: Callable[[str], Sequence[TableState]] = _no_tables
        self._path = path
        self._secret = hashing.secret_of(entry.uuid)
        self._index = self._new_index()
        self._dropped = False
        self.reassigned = 0

    # ---- what it is

    @property
    def key_type(self) -> KeyType:
        """``"int64"``, ``"string"`` or ``"bytes"``."""
        key_type: KeyType = self.entry.key_type  # type: ignore[assignment]
        return key_type

    def __len__(self) -> int:
        """Return the number of keys that have a row."""
        entry = self.entry
        return entry.rows - entry.reserved - (entry.tail - entry.head)

    def stats(self) -> dict[str, int]:
        """Return what `Vocabulary.stats` returns."""
        self.check_live()
        memory, disk = self._index.nbytes
        return {
            "keys": len(self),
            "rows": self.entry.rows,
            "rows_free": self.entry.tail - self.entry.head,
            "sightings": self.entry.sightings,
            "pairs": len(self._index),
            "index_bytes_in_memory": memory,
            "index_bytes_on_disk": disk,
            "bytes_on_disk": self.tables.bytes_allocated,
        }

    def check_live(self) -> None:
        """Raise `StoreClosedError` or `VocabularyNotFoundError` if the vocabulary cannot be used any more."""
        self._runtime.check_open()
        if self._dropped:
            msg = f"vocabulary {self.entry.name!r} is no longer in the store {self._runtime.path}"
            raise VocabularyNotFoundError(msg)

    # ---- reading

    def lookup(self, given: KeysLike, *, missing: int = -1) -> Int64Array:
        """Return the rows of keys, in their shape; `missing` for keys that have none."""
        self.check_live()
        missing = validation.count(missing, "missing", minimum=-(2**63), maximum=2**63 - 1)
        checked, hashes = self._checked(given)
        rows = self._find(checked, hashes)
        if missing != -1:
            rows[rows < 0] = missing
        return rows.reshape(checked.shape)

    def checked(self, given: KeysLike) -> Keys:
        """Check keys; see `keys.checked`."""
        return keys.checked(given, self.key_type, self.entry.name)

    def keys_of(self, row_ids: ArrayLike) -> NDArray[Any]:
        """Return the keys of rows, in their shape."""
        self.check_live()
        name = self.entry.name
        checked = validation.row_ids(row_ids, max(self.entry.rows, 1), name)
        words = self.tables.records(checked.flat)
        bad = np.flatnonzero(~key_records.are_live(words))
        if bad.size:
            msg = f"row {int(checked.flat[bad[0]])} of vocabulary {name!r} has no key ({bad.size} such rows)"
            raise RowIdError(msg)
        found = self.tables.keys_in(words)
        return keys.restored(replace(found, shape=checked.shape), self.key_type)

    def as_arrow(self, given: KeysLike) -> pa.Array:
        """Return keys as a flat Arrow array."""
        return keys.as_arrow(self.checked(given), self.key_type)

    def arrow_keys(self, rows: Int64Array) -> tuple[NDArray[np.bool_], pa.Array]:
        """Return which of some rows have a key, and the keys of those."""
        self.check_live()
        words = self.tables.records(rows)
        live = key_records.are_live(words)
        return live, keys.as_arrow(self.tables.keys_in(words[live]), self.key_type)

    def key_bytes(self, rows: Int64Array) -> Int64Array:
        """Return how many bytes the keys of rows have, 0 for rows without one. Reads no key."""
        self.check_live()
        words = self.tables.records(rows)
        return np.where(key_records.are_live(words), key_records.lengths_of(words), 0)

    def arrow_batches(self) -> Iterator[pa.RecordBatch]:
        """Iterate over rows and their keys in the order of the rows, in bounded memory."""
        import pyarrow as pa

        from shardemb.exports import arrow

        for begin in range(self.entry.reserved, self.entry.rows, BATCH_ROWS):
            nbytes = self.key_bytes(np.arange(begin, min(begin + BATCH_ROWS, self.entry.rows)))
            for start, stop in arrow.cut_by_bytes(begin, nbytes, arrow.MAX_BYTES):
                rows = np.arange(start, stop)
                live, found = self.arrow_keys(rows)
                if live.any():
                    yield pa.record_batch([pa.array(rows[live]), found], ["row", "key"])

    def live_rows(self, start: int, stop: int) -> Int64Array:
        """List those of the rows ``start:stop`` that have a key."""
        entry = self.entry
        rows = np.arange(max(start, entry.reserved), stop)
        if entry.head == entry.tail and stop <= entry.rows:  # no row is free
            return rows
        return rows[key_records.are_live(self.tables.records(rows))]

    def have_keys(self, rows: Int64Array) -> NDArray[np.bool_]:
        """Return which of some rows have a key."""
        return key_records.are_live(self.tables.records(rows))

    def future_rows(self, given: KeysLike, which: Int64Array) -> Int64Array:
        """Return the rows that the keys number `which` of a batch would get next. None of them has a row."""
        checked, hashes = self._checked(given)
        firsts, inverse = _first_of_each(checked.take(which), hashes[which])
        return self._next_rows(firsts.size)[inverse]

    # ---- changing

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the locks for a change of the vocabulary, in a store that is sound and writable."""
        with self.lock, self._runtime.writing():
            self.check_live()
            yield

    def add(self, given: KeysLike, approve: Callable[[tuple[int, ...]], None] | None = None) -> Int64Array:
        """Return the rows of keys, and give new keys the next rows; -1 for keys that are not admitted yet.

        ``approve(shape)`` is called with the shape of the keys before anything changes, and may raise.
        """
        checked, hashes = self._checked(given)
        with self.changing():
            if approve is not None:
                approve(checked.shape)
            rows = self._find(checked, hashes)
            new = np.flatnonzero(rows < 0)
            if new.size:
                some = checked if new.size == checked.size else checked.take(new)
                rows[new] = self._assign_rows(some, hashes[new])
        return rows.reshape(checked.shape)

    def remove_keys(self, given: KeysLike) -> Int64Array:
        """Remove keys; return the rows that they had, -1 for keys that had none."""
        checked, hashes = self._checked(given)
        with self.changing():
            rows = self._find(checked, hashes)
            self.free_rows(np.unique(rows[rows >= 0]))
        return rows.reshape(checked.shape)

    def free_rows(self, rows: Int64Array) -> Keys:
        """Remove the keys of ascending rows, which all have one; return the keys. Called within `changing`."""
        # The ring keeps the rows that were free at the last commit, and those that were reassigned after the files of
        # the index were written, because an opening completes the index with these.
        known, entry, committed = self._index.coverage, self.entry, self._committed
        low = min(known.head, committed.head) if known.rows else committed.head
        self.tables.reserve_freed(low, entry.tail, rows.size)
        words = self.tables.records(rows)
        changes = [
            self.tables.forget(rows, words),
            self.tables.free(entry.tail, rows),
            *(table.plan_reset(rows) for table in self._bound()),
        ]
        found = self.tables.keys_in(words)
        if rows.size:
            with signals_deferred(), self.reassigning():
                batch.change(self._runtime, changes)
                self.entry = replace(entry, tail=entry.tail + rows.size)
        return found

    @contextlib.contextmanager
    def reassigning(self) -> Iterator[None]:
        """Announce to lookups that keys lose their rows within the block. Called within `lock`."""
        self.reassigned += 1
        try:
            yield
        finally:
            self.reassigned += 1

    # ---- its life within the store, under the store's lock

    def join(self, runtime: Runtime, bound_to: Callable[[str], Sequence[TableState]]) -> None:
        """Join an opening of a store; `bound_to` returns the tables that are bound to the vocabulary with a uuid."""
        self._runtime, self._bound_to = runtime, bound_to
        self.tables.join(runtime)

    def load_index(self) -> None:
        """Open the files of the index, and index what the last commit has in addition.

        Raises
        ------
        FormatError
            What the commit says about the vocabulary cannot be.
        """
        self.tables.check(self.entry)
        self._index.load(self._coverage())
        known = self._index.coverage
        if self._coverage().head - known.head > self.tables.ring_size:
            known = Coverage()  # the ring does not say any more which rows were reassigned since
        self._index_new(self._index, known)

    def renew_index(self) -> None:
        """Rebuild the index if it is damaged or most of its pairs are useless. Called between commits.

        Callers do not defer signals, because this reads all keys of the vocabulary. If it is interrupted, the index
        stays as it was.
        """
        if not self._index.is_stale(len(self)) or not self.lock.acquire(blocking=False):
            return  # a thread that holds the lock may be about to add pairs to this index
        if self.entry != self._committed:  # a rebuilt index would lack keys that were added since
            self.lock.release()
            return
        fresh = self._index.empty_copy()
        try:
            self._index_new(fresh, Coverage())
            if self._index.has_files:  # without files, the next opening would have to index all keys
                fresh.merge(self._coverage())
            with signals_deferred():
                fresh.relocate(self._index.retire())
                self._index = fresh
        except (OSError, FormatError):  # no space for its files: the old index finds all keys, too
            fresh.remove_files()
        finally:
            self.lock.release()

    def retire_index(self) -> None:
        """Remove the files of the index, durably: after the next commit they would miss keys, or find others.

        Raises
        ------
        OSError
            Some may be left.
        """
        folder = self._index.retire()
        if files.is_directory(folder.parent):
            files.sync_directory(folder.parent)

    def reindex(self) -> None:
        """Index all keys of the last commit, after `retire_index`."""
        fresh = self._new_index()
        self._index_new(fresh, Coverage())
        self._index = fresh

    def checkpoint(self) -> None:
        """Write pairs that only the memory of the index has to files, if an opening would take long to index them."""
        with self.lock, self._runtime.writing():
            if not self._dropped:
                self._index.checkpoint(self._coverage())

    def check_index(self) -> bool:
        """Return whether the files of the index are what was written, and lead to the row of every key."""
        if not self._index.check():
            return False
        rows = range(self.entry.reserved, self.entry.rows, SLICE_ROWS)
        return all(self._are_found(start, start + SLICE_ROWS) for start in rows)

    def _are_found(self, start: int, stop: int) -> bool:
        """Return whether the keys of the rows ``start:stop`` are found in these rows."""
        with self.lock:  # so that no row gets another key in between
            rows = self.live_rows(start, min(stop, self.entry.rows))
            found = self.tables.keys_in(self.tables.records(rows))
            return np.array_equal(self._find(found, self._hashes(found)), rows)

    def restore(self, entry: VocabularyEntry) -> None:
        """Go back to `entry`, which the last commit says. The index keeps pairs that came later."""
        self.entry, self._dropped = entry, False

    def adopt(self, newer: KeyRows) -> KeyRows:
        """Take over the state of the same vocabulary from a newer opening of the store; return self."""
        self.entry, self._index, self._dropped = newer.entry, newer.index, False
        return self

    def drop(self) -> None:
        """Refuse every call from now on, unless a rollback brings the vocabulary back."""
        self._dropped = True

    def detach_in_child(self) -> None:
        """Be readable in a forked child. A removal of keys that another thread was at is not there: it had to wait."""
        self.lock = usable_in_child(self.lock)
        self.reassigned += self.reassigned % 2

    def release(self) -> None:
        """Release the index and its files. Lookups that are still running keep them until they end."""
        self._index = self._new_index()

    @property
    def index(self) -> KeyIndex:
        """The index, from hashes of keys to rows that may hold them."""
        return self._index

    # ---- within: finding

    def _checked(self, given: KeysLike) -> tuple[Keys, NDArray[np.uint64]]:
        checked = self.checked(given)
        return checked, self._hashes(checked)

    def _hashes(self, checked: Keys) -> NDArray[np.uint64]:
        hashes = np.empty(checked.size, np.uint64)
        self._run(checked.hasher(self._secret, hashes), checked.size)
        return hashes

    def _run(self, function: Callable[[int, int], None], length: int) -> None:
        batch.run_pieces(self._runtime, [function], [length], [batch.MIN_ROW_BYTES])

    def _find(self, checked: Keys, hashes: NDArray[np.uint64]) -> Int64Array:
        """Return the rows of keys, -1 for keys that have none."""
        # The counts are read before the index, which has a pair of each row before the counts include the row. All
        # rounds use one view of the index, because they continue in its order.
        end, index = self.entry.rows, self._index
        view = index.view
        self.check_live()  # once the store is closed, the index is empty
        rows = self._candidates(view, hashes, 0, end)
        if checked.integers is not None and self._is_exact(index):
            return rows
        which: Int64Array | None = None
        # Each round compares one more candidate of those keys whose candidate before held another key.
        for skip in count(1):
            some = rows if which is None else self._candidates(view, hashes[which], skip - 1, end)
            if which is None:
                others = self.tables.drop_others(checked, hashes, some)
            else:
                others = self.tables.drop_others(checked.take(which), hashes[which], some)
                rows[which] = some
            left = np.flatnonzero(others)
            if not left.size:
                return rows
            which = left if which is None else which[left]
        raise AssertionError

    def _candidates(self, view: View, hashes: NDArray[np.uint64], skip: int, end: int) -> Int64Array:
        rows = np.empty(hashes.size, np.int64)
        view.read_ahead(hashes)
        self._run(lambda start, stop: view.probe(hashes, skip, end, rows, start, stop), hashes.size)
        return rows

    def _is_exact(self, index: KeyIndex) -> bool:
        """Return whether all pairs of an index belong to keys.

        If so, the row found for an integer is that of the integer, because different ones have different hashes.
        """
        keys = len(self)  # before the pairs: keys that are added in between must not hide useless pairs
        return len(index) == keys and index is self._index

    # ---- within: assigning rows

    def _assign_rows(self, new: Keys, hashes: NDArray[np.uint64]) -> Int64Array:
        """Assign rows to keys that have none; return the row of each, -1 for keys that are not admitted."""
        firsts, inverse = _first_of_each(new, hashes)
        if self.entry.admission is not None:
            admitted = self._count(self.entry.admission, hashes[firsts], inverse)
            number = np.where(admitted, np.cumsum(admitted) - 1, -1)
            firsts, inverse = firsts[admitted], number[inverse]
        rows = self._next_rows(firsts.size)
        if firsts.size:
            some = new if firsts.size == new.size else new.take(firsts)
            self._enter(some, hashes[firsts], rows)
        return np.append(rows, -1)[inverse]

    def _count(
        self, admission: Admission, hashes: NDArray[np.uint64], occurrences: Int64Array
    ) -> NDArray[np.bool_]:
        """Count occurrences of keys without a row, as positions in `hashes`; return which keys have earned one."""
        counters = admission.counters(hashes, self._secret)
        counts, change = self.tables.count(counters, occurrences)
        with signals_deferred():
            batch.change(self._runtime, [change])
            self.entry = replace(self.entry, sightings=self.entry.sightings + occurrences.size)
        return counts >= admission.after

    def _next_rows(self, number: int) -> Int64Array:
        """Return the rows of the next `number` new keys: first those that were freed before the last commit."""
        entry = self.entry
        reused = min(number, self._committed.tail - entry.head)
        freed = self.tables.freed(entry.head, entry.head + reused)
        return np.concatenate([freed, np.arange(entry.rows, entry.rows + number - reused)])

    def _enter(self, new: Keys, hashes: NDArray[np.uint64], rows: Int64Array) -> None:
        """Enter new keys and their rows, reused rows first: like all changes, in memory until the next commit."""
        before, reused = self.entry, int(np.count_nonzero(rows < self.entry.rows))
        after = replace(before, rows=before.rows + rows.size - reused, head=before.head + reused)
        for table in self._bound():
            grow(table, after.rows)
        self.tables.reserve(after.rows)
        self._index.add(hashes, rows, self._coverage())
        # New rows, written first and in slices, belong to no key until the counts include them. Reused rows change
        # together with the counts.
        for start in range(reused, rows.size, SLICE_ROWS):
            some = np.arange(start, min(start + SLICE_ROWS, rows.size))
            changes, text_bytes = self.tables.enter(
                new.take(some), hashes[some], rows[some], after.text_bytes, fresh=before.rows
            )
            batch.change(self._runtime, changes)
            after = replace(after, text_bytes=text_bytes)
        some = np.arange(reused)
        changes, text_bytes = self.tables.enter(
            new.take(some), hashes[some], rows[some], after.text_bytes, fresh=before.rows
        )
        with signals_deferred():
            if reused:
                batch.change(self._runtime, changes)
            self.entry = replace(after, text_bytes=text_bytes)

    def _bound(self) -> Sequence[TableState]:
        return self._bound_to(self.entry.uuid)

    # ---- within: the index

    @property
    def _committed(self) -> VocabularyEntry:
        """What the last commit says about the vocabulary; for one that is new since, what it began with."""
        return self._runtime.committed.vocabulary(self.entry.uuid) or self._first

    def _new_index(self) -> KeyIndex:
        run = partial(batch.run_concurrently, self._runtime)
        return KeyIndex(self._path, self.entry.uuid, run, writable=self._runtime.writable)

    def _coverage(self) -> Coverage:
        """Return what the index covers, which is all of the last commit."""
        commit, committed = self._runtime.committed.commit, self._committed
        return Coverage(commit.id if commit else 0, committed.rows, committed.head)

    def _index_new(self, index: KeyIndex, known: Coverage) -> None:
        """Add what an index does not cover: the keys of rows that came later, and of rows that were reassigned."""
        now = self._coverage()
        # If the index is merged on the way, its files must claim no more than it covers by then. If it covered no rows,
        # the first loop finds the reassigned ones, too.
        known = replace(known, commit=now.commit, head=known.head if known.rows else now.head)
        for start in range(max(known.rows, self.entry.reserved), now.rows, SLICE_ROWS):
            stop = min(start + SLICE_ROWS, now.rows)
            self._index_rows(index, np.arange(start, stop), replace(known, rows=start))
        for start in range(known.head, now.head, SLICE_ROWS):
            rows = np.unique(self.tables.freed(start, min(start + SLICE_ROWS, now.head)))
            self._index_rows(index, rows, replace(now, head=start))

    def _index_rows(self, index: KeyIndex, rows: Int64Array, known: Coverage) -> None:
        words = self.tables.records(rows)
        live = key_records.are_live(words)
        if self.key_type == "int64":
            hashes = self._hashes(self.tables.keys_in(words[live]))
        else:
            hashes = key_records.hashes_of(words[live])
        rows = rows[live]
        # The files may have some of these pairs: a merge includes pairs that are not committed yet. An index that has a
        # pair twice is never exact.
        new = self._candidates(index.view, hashes, 0, self.entry.rows) != rows
        index.add(hashes[new], rows[new], known)


def read_steadily(vocabularies: Sequence[KeyRows], read: Callable[[], T]) -> T:
    """Return what `read` returns, which looks rows up by key, if no key has lost its row meanwhile.

    Otherwise it is called again, because the row may belong to another key by now; if that happens several times, then
    while no vocabulary can change.
    """
    for _ in range(3):
        seen = [each.reassigned for each in vocabularies]
        if any(number % 2 for number in seen):
            break
        result = read()
        if [each.reassigned for each in vocabularies] == seen:
            return result
    with contextlib.ExitStack() as stack:
        for each in sorted(vocabularies, key=lambda each: each.entry.uuid):
            stack.enter_context(each.lock)
        return read()


def _no_tables(identity: str) -> tuple[TableState, ...]:
    return ()


def _first_of_each(new: Keys, hashes: NDArray[np.uint64]) -> tuple[Int64Array, Int64Array]:
    """Return where each distinct key occurs first, ascending; and for each key, which of these keys it is."""
    table = np.full(max(16, 2 * hashes.size), -1)
    leader = index_kernels.first_of_each(hashes, new_salt(), table)
    if new.integers is None and key_kernels.detach_unequal(new.bounds, new.data, leader):
        leader = _leaders_by_bytes(new)
    is_first = leader == np.arange(leader.size)
    return np.flatnonzero(is_first), (np.cumsum(is_first) - 1)[leader]


def _leaders_by_bytes(new: Keys) -> Int64Array:
    """Return for each key the position of the first equal one, without hashes: some different keys share theirs."""
    first: dict[bytes, int] = {}
    bounds, data = new.bounds.tolist(), new.data.tobytes()
    return np.array([first.setdefault(data[bounds[i] : bounds[i + 1]], i) for i in range(new.size)], np.int64)
