"""The keys of one vocabulary: which row a key has, the next row for a new one, and rows that are free again.

What a commit keeps lies in tables of the store, so recovery, rollback, checksums and copies need nothing of their own:
``NAME@keys`` holds the key of each row, ``NAME@bytes`` the bytes of strings, ``NAME@freed`` a ring of rows without a
key, ``NAME@sketch`` the counters of keys without a row. The counts that give them a meaning are the `VocabularyEntry`.
``hash_index.py`` finds the rows to compare a key with.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import validation
from shardemb.base.interrupts import signals_deferred
from shardemb.engine import batch
from shardemb.errors import FormatError, RowIdError, VocabularyNotFoundError
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

SLICE_ROWS = 2**18
"""Rows that are read or written at once."""

BATCH_ROWS = 65_536
"""Rows of an Arrow batch."""


class KeyRows:
    """A vocabulary as the rooms of a store see it; users hold a `Vocabulary`, which has the contracts.

    Reading needs no lock. Changes take `lock`, then the store's lock.

    Parameters
    ----------
    runtime : Runtime
    entry : VocabularyEntry
        What the last commit says about it, or what a new one begins with.
    tables : mapping of str to TableState
        The tables that hold its keys, by what they are for.
    path : Path
        Folder of the index.

    Attributes
    ----------
    lock : RLock
        Held by everything that changes the vocabulary. Taken before the store's lock, which is released while a fold
        makes room for a change.
    entry : VocabularyEntry
        What a commit would say about it now.
    tables : KeyTables
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
        """Return what `Vocabulary.stats` does."""
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
        """Find the rows of keys, in their shape; `missing` for keys that have none."""
        self.check_live()
        checked, hashes = self._checked(given)
        rows = self._find(checked, hashes)
        if missing != -1:
            rows[rows < 0] = missing
        return rows.reshape(checked.shape)

    def keys_of(self, row_ids: ArrayLike) -> NDArray[Any]:
        """Find the keys of rows, in their shape."""
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

    def arrow_keys(self, start: int, stop: int) -> tuple[NDArray[np.bool_], pa.Array]:
        """Tell which of rows ``start:stop`` have a key, and the keys of those."""
        self.check_live()
        words = self.tables.records(np.arange(start, stop))
        live = key_records.are_live(words)
        return live, keys.as_arrow(self.tables.keys_in(words[live]), self.key_type)

    def arrow_batches(self) -> Iterator[pa.RecordBatch]:
        """Iterate over the keys in the order of their rows: ``row`` (int64) and ``key``, in bounded memory."""
        import pyarrow as pa

        for start in range(self.entry.reserved, self.entry.rows, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, self.entry.rows)
            live, found = self.arrow_keys(start, stop)
            if live.any():
                yield pa.record_batch([pa.array(np.arange(start, stop)[live]), found], ["row", "key"])

    def live_rows(self, start: int, stop: int) -> Int64Array:
        """List which of rows ``start:stop`` have a key."""
        rows = np.arange(start, stop)
        return rows[key_records.are_live(self.tables.records(rows))]

    def future_rows(self, given: KeysLike, which: Int64Array) -> Int64Array:
        """Tell which rows some keys of a batch would get, none of which has one."""
        checked, hashes = self._checked(given)
        firsts, inverse = _first_of_each(checked.take(which), hashes[which])
        return self._next_rows(firsts.size)[inverse]

    # ---- changing

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Keep others from changing the vocabulary, in a store that is sound and may be written."""
        with self.lock, self._runtime.writing():
            self.check_live()
            yield

    def add(self, given: KeysLike) -> Int64Array:
        """Find the rows of keys, and give new keys the next ones; -1 for keys that are not admitted yet."""
        checked, hashes = self._checked(given)
        with self.changing():
            rows = self._find(checked, hashes)
            new = np.flatnonzero(rows < 0)
            if new.size:
                some = checked if new.size == checked.size else checked.take(new)
                rows[new] = self._assign_rows(some, hashes[new])
        return rows.reshape(checked.shape)

    def remove_keys(self, given: KeysLike) -> Int64Array:
        """Take the rows of keys away; return the rows that they had, -1 for keys that had none."""
        checked, hashes = self._checked(given)
        with self.changing():
            rows = self._find(checked, hashes)
            self.free_rows(np.unique(rows[rows >= 0]))
        return rows.reshape(checked.shape)

    def free_rows(self, rows: Int64Array) -> Keys:
        """Take rows that have keys, ascending, away from them; return the keys. Within `changing`."""
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
            with signals_deferred():
                batch.change(self._runtime, changes)
                self.entry = replace(entry, tail=entry.tail + rows.size)
        return found

    # ---- its life within the store, under the store's lock

    def join(self, runtime: Runtime, bound_to: Callable[[str], Sequence[TableState]]) -> None:
        """Belong to an opening of a store, which tells by a vocabulary's uuid the tables that are bound to it."""
        self._runtime, self._bound_to = runtime, bound_to
        self.tables.join(runtime)

    def load_index(self) -> None:
        """Open the index's files, and index what they do not know of the last commit."""
        self._index.load(self._coverage())
        self._index_new(self._index, self._index.coverage)

    def renew_index(self) -> None:
        """Rebuild the index if it is damaged, or most of it is of no use. To be called between commits.

        Not with signals deferred: it reads all keys of the vocabulary. Interrupted, the index stays what it was.
        """
        if not self._index.is_stale(len(self)) or not self.lock.acquire(blocking=False):
            return  # or some thread is about to add pairs to this index
        if self.entry != self._committed:  # a rebuilt index would lack keys that were added since
            self.lock.release()
            return
        fresh = self._index.empty_copy()
        try:
            self._index_new(fresh, Coverage())
            if self._index.has_files:  # they must not be opened again: they know less by now than they say
                fresh.merge(self._coverage())
            with signals_deferred():
                fresh.relocate(self._index.retire())
                self._index = fresh
        except (OSError, FormatError):  # no room for its files: the old one is as good
            fresh.remove_files()
        finally:
            self.lock.release()

    def checkpoint(self) -> None:
        """Write down what only the memory of the index knows, where an opening would take long to index it again."""
        with self.lock, self._runtime.writing():
            if not self._dropped:
                self._index.checkpoint(self._coverage())

    def check_index(self) -> bool:
        """Whether the files of the index are what was written."""
        return self._index.check()

    def restore(self, entry: VocabularyEntry) -> None:
        """Go back to the last commit. The index may continue to know more."""
        self.entry, self._dropped = entry, False

    def adopt(self, newer: KeyRows) -> KeyRows:
        """Become what a newer opening of the same vocabulary is."""
        self.entry, self._index, self._dropped = newer.entry, newer.index, False
        return self

    def drop(self) -> None:
        """Refuse every use from now on, unless a rollback brings it back."""
        self._dropped = True

    def release(self) -> None:
        """Release the index and its files; lookups that still run have theirs."""
        self._index = self._new_index()

    @property
    def index(self) -> KeyIndex:
        """From hashes of keys to rows that may be theirs."""
        return self._index

    # ---- within: finding

    def _checked(self, given: KeysLike) -> tuple[Keys, NDArray[np.uint64]]:
        checked = keys.checked(given, self.key_type, self.entry.name)
        return checked, self._hashes(checked)

    def _hashes(self, checked: Keys) -> NDArray[np.uint64]:
        hashes = np.empty(checked.size, np.uint64)
        self._run(checked.hasher(self._secret, hashes), checked.size)
        return hashes

    def _run(self, function: Callable[[int, int], None], length: int) -> None:
        batch.run_pieces(self._runtime, [function], [length], [batch.MIN_ROW_BYTES])

    def _find(self, checked: Keys, hashes: NDArray[np.uint64]) -> Int64Array:
        """Return the rows of keys, -1 where there is none."""
        # Before the index, which knows of every row by the time that the counts do; and one view of it for all.
        end, index = self.entry.rows, self._index
        view = index.view
        self.check_live()  # or it is that of no file any more
        rows = self._candidates(view, hashes, 0, end)
        if checked.integers is not None and self._is_exact(index):
            return rows
        which: Int64Array | None = None
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
        """Whether all pairs that were found in an index by now are those of keys; other integers have other hashes."""
        keys = len(self)  # first: pairs added meanwhile must not make up for those of no use
        return len(index) == keys and index is self._index

    # ---- within: giving rows out

    def _assign_rows(self, new: Keys, hashes: NDArray[np.uint64]) -> Int64Array:
        """Give rows to keys that have none; return the row of each, -1 where it is not admitted."""
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
        """Count sightings of keys without a row, given by their places among `hashes`; tell who has earned one."""
        counters = admission.counters(hashes, self._secret)
        counts, change = self.tables.count(counters, occurrences)
        with signals_deferred():
            batch.change(self._runtime, [change])
            self.entry = replace(self.entry, sightings=self.entry.sightings + occurrences.size)
        return counts >= admission.after

    def _next_rows(self, number: int) -> Int64Array:
        """Return the rows that so many new keys get: freed ones first, as long as their removal is committed."""
        entry = self.entry
        again = min(number, self._committed.tail - entry.head)
        freed = self.tables.freed(entry.head, entry.head + again)
        return np.concatenate([freed, np.arange(entry.rows, entry.rows + number - again)])

    def _enter(self, new: Keys, hashes: NDArray[np.uint64], rows: Int64Array) -> None:
        """Note new keys and their rows: in memory, until the next commit, as all changes."""
        before, again = self.entry, int(np.count_nonzero(rows < self.entry.rows))
        after = replace(before, rows=before.rows + rows.size - again, head=before.head + again)
        for table in self._bound():
            grow(table, after.rows)
        self.tables.reserve(after.rows)
        self._index.add(hashes, rows, self._coverage())
        # Rows that come after all others are nobody's before the counts say so; freed ones change with them at once.
        for start in range(again, rows.size, SLICE_ROWS):
            some = np.arange(start, min(start + SLICE_ROWS, rows.size))
            changes, text_bytes = self.tables.enter(
                new.take(some), hashes[some], rows[some], after.text_bytes, fresh=before.rows
            )
            batch.change(self._runtime, changes)
            after = replace(after, text_bytes=text_bytes)
        some = np.arange(again)
        changes, text_bytes = self.tables.enter(
            new.take(some), hashes[some], rows[some], after.text_bytes, fresh=before.rows
        )
        with signals_deferred():
            if again:
                batch.change(self._runtime, changes)
            self.entry = replace(after, text_bytes=text_bytes)

    def _bound(self) -> Sequence[TableState]:
        return self._bound_to(self.entry.uuid)

    # ---- within: the index

    @property
    def _committed(self) -> VocabularyEntry:
        """What the last commit says about the vocabulary; of a new one, what it began with."""
        return self._runtime.committed.vocabulary(self.entry.uuid) or self._first

    def _new_index(self) -> KeyIndex:
        run = partial(batch.run_concurrently, self._runtime)
        return KeyIndex(self._path, self.entry.uuid, run, writable=self._runtime.writable)

    def _coverage(self) -> Coverage:
        """Return what the last commit says, of which the index knows everything."""
        commit, committed = self._runtime.committed.commit, self._committed
        return Coverage(commit.id if commit else 0, committed.rows, committed.head)

    def _index_new(self, index: KeyIndex, known: Coverage) -> None:
        """Add what an index does not know: keys of rows that came later, and of rows that were given out anew."""
        now = self._coverage()
        # On the way the index may be merged into files, which must say no more than it knows by then.
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
        # The files may have them: they were written with pairs that were not committed yet. Twice, none would be exact.
        new = self._candidates(index.view, hashes, 0, self.entry.rows) != rows
        index.add(hashes[new], rows[new], known)


def _no_tables(identity: str) -> tuple[TableState, ...]:
    return ()


def _first_of_each(new: Keys, hashes: NDArray[np.uint64]) -> tuple[Int64Array, Int64Array]:
    """Return where each distinct key stands first, ascending, and for each key which of these it is."""
    table = np.full(max(16, 2 * hashes.size), -1)
    leader = index_kernels.first_of_each(hashes, new_salt(), table)
    if new.integers is None and key_kernels.detach_unequal(new.bounds, new.data, leader):
        leader = _leaders_by_bytes(new)
    is_first = leader == np.arange(leader.size)
    return np.flatnonzero(is_first), (np.cumsum(is_first) - 1)[leader]


def _leaders_by_bytes(new: Keys) -> Int64Array:
    """As the hashes would tell if different keys never had the same."""
    first: dict[bytes, int] = {}
    bounds, data = new.bounds.tolist(), new.data.tobytes()
    return np.array([first.setdefault(data[bounds[i] : bounds[i + 1]], i) for i in range(new.size)], np.int64)
