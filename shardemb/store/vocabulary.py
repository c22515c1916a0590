"""Keys that have rows: which row a key has, the next row for a new one, and rows that become free again.

What a commit keeps lies in tables of the store, so that recovery, rollback, checksums and copies need nothing of their
own: ``NAME@keys`` holds the key of each row, ``NAME@bytes`` the bytes of strings, ``NAME@freed`` a ring of rows without
a key, ``NAME@sketch`` the counters of keys without a row. The counts that give them a meaning are the
`VocabularyRecord`. ``keyindex.py`` finds the rows to compare a key with.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb import arrays, batch, hashing, keys, matching, probing, records
from shardemb.errors import FormatError, RowIdError, VocabularyNotFoundError
from shardemb.keyindex import KeyIndex, new_salt
from shardemb.keyparts import Coverage
from shardemb.keystore import KeyStore, grow
from shardemb.runtime import signals_deferred

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from shardemb.admission import Admission
    from shardemb.arrays import Int64Array
    from shardemb.keyindex import View
    from shardemb.keys import Keys, KeysLike, KeyType
    from shardemb.manifest import VocabularyRecord
    from shardemb.runtime import Runtime
    from shardemb.table import Table

SLICE_ROWS = 2**18
"""Rows that are read or written at once."""

BATCH_ROWS = 65_536
"""Rows of an Arrow batch."""


class Vocabulary:
    """Keys by row and rows by key; made by `Store.create_vocabulary`, found in `Store.vocabularies`.

    A new key gets the next row, in the order of first appearance, so that keys that came early, which are those that
    come often, lie together. Changes are part of the next commit, with those of the tables. Lookups may run in any
    number of threads; changes wait for each other.

    Examples
    --------
    >>> import shardemb
    >>> store = shardemb.open(tmp / "words.zarr")
    >>> words = store.create_vocabulary("words", key_type="string")
    >>> words.add(["to", "be", "or", "not", "to", "be"])
    array([0, 1, 2, 3, 0, 1])
    >>> words.lookup([["be"], ["that"]])
    array([[ 1],
           [-1]])
    >>> words.keys([3, 0])
    array(['not', 'to'], dtype=object)
    >>> words
    Vocabulary 'words': 4 string keys
    >>> commit = store.commit()
    >>> store.close()
    """

    def __init__(
        self, runtime: Runtime, record: VocabularyRecord, tables: Mapping[str, Table], path: Path
    ) -> None:
        self._runtime = runtime
        self._state = self._committed = record
        self._stored = KeyStore(runtime, tables)
        self._bound_to: Callable[[str], Sequence[Table]] = _no_tables
        self._path = path
        self._secret = hashing.secret_of(record.uuid)
        # Taken before the store's, which others may have while a fold makes room for a change.
        self._lock = threading.RLock()
        self._commit = 0
        self._index = self._new_index()
        self._dropped = False

    # ---- what it is

    @property
    def name(self) -> str:
        """Name of the vocabulary within its store."""
        return self._state.name

    @property
    def key_type(self) -> KeyType:
        """``"int64"``, ``"string"`` or ``"bytes"``."""
        key_type: KeyType = self._state.key_type  # type: ignore[assignment]
        return key_type

    @property
    def admission(self) -> Admission | None:
        """When a key earns its row; None: at once."""
        return self._state.admission

    @property
    def reserved(self) -> int:
        """Rows at the beginning that no key gets."""
        return self._state.reserved

    @property
    def num_rows(self) -> int:
        """Rows given out so far, those of no key by now included; all row ids lie below."""
        return self._state.rows

    def __len__(self) -> int:
        """Return the number of keys that have a row."""
        state = self._state
        return state.rows - state.reserved - (state.tail - state.head)

    def __contains__(self, key: object) -> bool:
        """Tell whether one key has a row."""
        return bool(self.lookup([key])[0] >= 0)

    def __repr__(self) -> str:
        return f"Vocabulary {self.name!r}: {len(self):,} {self.key_type} keys"

    def stats(self) -> dict[str, int]:
        """Tell what the vocabulary takes in memory and on disk.

        Returns
        -------
        dict of str to int
            ``keys``; ``rows`` given out so far and those ``rows_free``; ``sightings`` of keys without a row;
            ``index_bytes_in_memory`` and ``index_bytes_on_disk``; ``pairs`` of the index, old ones included;
            ``bytes_on_disk`` of the keys and what belongs to them, without the index.

        Examples
        --------
        >>> words.stats()["keys"]
        4
        """
        self._live()
        memory, disk = self._index.nbytes
        return {
            "keys": len(self),
            "rows": self._state.rows,
            "rows_free": self._state.tail - self._state.head,
            "sightings": self._state.sightings,
            "pairs": len(self._index),
            "index_bytes_in_memory": memory,
            "index_bytes_on_disk": disk,
            "bytes_on_disk": self._stored.bytes_allocated,
        }

    # ---- reading

    def lookup(self, keys: KeysLike, *, missing: int = -1) -> NDArray[np.int64]:
        """Find the rows of keys.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            By the type of the vocabulary, in any shape: a NumPy or Arrow array, a (nested) list, a single key.
        missing : int
            What stands for keys that have no row.

        Returns
        -------
        ndarray of int64, shape ``keys.shape``

        Raises
        ------
        TypeError, ValueError
            Keys of another type, or missing ones (null).
        StoreClosedError, VocabularyNotFoundError
            The store was closed; the vocabulary was dropped.

        Examples
        --------
        >>> words.lookup(["be", "that"], missing=0)
        array([1, 0])
        """
        self._live()
        checked, hashes = self._checked(keys)
        rows = self._find(checked, hashes)
        if missing != -1:
            rows[rows < 0] = missing
        return rows.reshape(checked.shape)

    def keys(self, row_ids: ArrayLike) -> NDArray[Any]:
        """Find the keys of rows.

        Parameters
        ----------
        row_ids : array_like of int
            In any shape.

        Returns
        -------
        ndarray of int64, or of str or bytes objects, shape ``row_ids.shape``

        Raises
        ------
        RowIdError
            A row has no key: it was never given out, was freed, or is reserved.
        TypeError, StoreClosedError, VocabularyNotFoundError
            As `lookup`.

        Examples
        --------
        >>> words.keys([[2]])
        array([['or']], dtype=object)
        """
        self._live()
        checked = arrays.row_ids(row_ids, max(self._state.rows, 1), self.name)
        words = self._stored.records(checked.flat)
        bad = np.flatnonzero(~records.are_live(words))
        if bad.size:
            msg = f"row {int(checked.flat[bad[0]])} of vocabulary {self.name!r} has no key ({bad.size} such rows)"
            raise RowIdError(msg)
        found = self._stored.keys_in(words)
        return keys.restored(replace(found, shape=checked.shape), self.key_type)

    def to_arrow_batches(self) -> Iterator[pa.RecordBatch]:
        """Iterate over the keys in the order of their rows: ``row`` (int64) and ``key``, in bounded memory.

        Yields
        ------
        pyarrow.RecordBatch
            At most 65,536 rows, those without a key left out.

        Examples
        --------
        >>> next(words.to_arrow_batches()).column("key").to_pylist()
        ['to', 'be', 'or', 'not']
        """
        import pyarrow as pa

        for start in range(self._state.reserved, self._state.rows, BATCH_ROWS):
            stop = min(start + BATCH_ROWS, self._state.rows)
            live, found = self._arrow_keys(start, stop)
            if live.any():
                yield pa.record_batch([pa.array(np.arange(start, stop)[live]), found], ["row", "key"])

    def __iter__(self) -> Iterator[Any]:
        for each in self.to_arrow_batches():
            yield from each.column("key").to_pylist()

    # ---- changing

    def add(self, keys: KeysLike) -> NDArray[np.int64]:
        """Find the rows of keys, and give new keys the next ones, in the order of first appearance.

        Rows of removed keys are given out first, once the removal is committed. With an `Admission`, a call is one
        sighting of each key for each time that it stands there, and those that have not earned a row yet get none.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `lookup`; the same key may stand there several times.

        Returns
        -------
        ndarray of int64, shape ``keys.shape``
            -1 for keys that are not admitted yet.

        Raises
        ------
        TypeError, ValueError, ReadOnlyError, StoreClosedError, VocabularyNotFoundError, DiskFullError
            No key was added.

        Examples
        --------
        >>> words.add(["that", "is"])
        array([4, 5])
        """
        checked, hashes = self._checked(keys)
        with self._changing():
            rows = self._find(checked, hashes)
            new = np.flatnonzero(rows < 0)
            if new.size:
                some = checked if new.size == checked.size else checked.take(new)
                rows[new] = self._give(some, hashes[new])
        return rows.reshape(checked.shape)

    def remove(self, keys: KeysLike) -> NDArray[np.int64]:
        """Take the rows of keys away; other keys get them after the next commit.

        In the tables that are bound to the vocabulary these rows are as new: initial values, fresh state.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `lookup`.

        Returns
        -------
        ndarray of int64, shape ``keys.shape``
            The rows that they had; -1 for keys that had none.

        Raises
        ------
        TypeError, ValueError, ReadOnlyError, StoreClosedError, VocabularyNotFoundError, DiskFullError
            No key was removed.

        Examples
        --------
        >>> words.remove(["not", "unheard"])
        array([ 3, -1])
        """
        checked, hashes = self._checked(keys)
        with self._changing():
            rows = self._find(checked, hashes)
            self._free_rows(np.unique(rows[rows >= 0]))
        return rows.reshape(checked.shape)

    # ---- for tables that are bound to it

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold what keeps others from changing the vocabulary, in a store that is sound and may be written."""
        with self._lock, self._runtime.writing():
            self._live()
            yield

    def _free_rows(self, rows: Int64Array) -> Keys:
        """Take rows that have keys, ascending, away from them; return the keys. While `changing`."""
        known, state = self._index.coverage, self._state
        low = min(known.head, self._committed.head) if known.rows else self._committed.head
        self._stored.reserve_freed(low, state.tail, rows.size)
        words = self._stored.records(rows)
        changes = [
            self._stored.forget(rows, words),
            self._stored.free(state.tail, rows),
            *(table._plan_reset(rows) for table in self._bound()),
        ]
        found = self._stored.keys_in(words)
        if rows.size:
            with signals_deferred():
                batch.change(self._runtime, changes)
                self._state = replace(state, tail=state.tail + rows.size)
        return found

    def _rows_to_be(self, given: KeysLike, which: Int64Array) -> Int64Array:
        """Tell which rows some keys of a batch would get, none of which has one."""
        checked, hashes = self._checked(given)
        firsts, inverse = _first_of_each(checked.take(which), hashes[which])
        return self._next_rows(firsts.size)[inverse]

    def _live_rows(self, start: int, stop: int) -> Int64Array:
        """List which of rows ``start:stop`` have a key."""
        rows = np.arange(start, stop)
        return rows[records.are_live(self._stored.records(rows))]

    def _arrow_keys(self, start: int, stop: int) -> tuple[NDArray[np.bool_], pa.Array]:
        """Tell which of rows ``start:stop`` have a key, and the keys of those."""
        self._live()
        words = self._stored.records(np.arange(start, stop))
        live = records.are_live(words)
        return live, keys.as_arrow(self._stored.keys_in(words[live]), self.key_type)

    def _join(self, runtime: Runtime, bound_to: Callable[[str], Sequence[Table]]) -> None:
        """Be one of a store's; it tells, by the vocabulary's uuid, the tables whose rows this gives out."""
        self._runtime, self._bound_to = runtime, bound_to
        self._stored.join(runtime)

    # ---- for the store

    def _record(self) -> VocabularyRecord:
        """Return what a commit would say about it."""
        return self._state

    def _settle(self, commit: int) -> None:
        """Take its state as that of the last commit."""
        self._committed, self._commit = self._state, commit
        if not self._index.is_stale(len(self)) or not self._lock.acquire(blocking=False):
            return  # some thread is about to add pairs to this index
        fresh = self._index.anew()
        try:
            self._learn(fresh, Coverage())
            if self._index.has_files:  # they must not be taken up again: they know less by now than they say
                fresh.merge(self._coverage())
            fresh.take_place_of(self._index)
            self._index = fresh
        except (OSError, FormatError):  # no room for its files: the old one is as good
            fresh.remove_files()
        finally:
            self._lock.release()

    def _restore(self, record: VocabularyRecord) -> None:
        """Go back to the last commit. The index may go on to know more."""
        self._state = self._committed = record
        self._dropped = False

    def _adopt(self, newer: Vocabulary) -> Vocabulary:
        """Become what a newer opening of the same vocabulary is."""
        self._state, self._committed, self._commit = newer._state, newer._committed, newer._commit
        self._index, self._dropped = newer._index, False
        return self

    def _take_up(self, commit: int) -> None:
        """Take up the index's files, and learn what it does not know of the last commit."""
        self._commit = commit
        self._index.take_up(self._coverage())
        self._learn(self._index, self._index.coverage)

    def _drop(self) -> None:
        """Refuse every use from now on, unless a rollback brings it back."""
        self._dropped = True

    def _checkpoint(self) -> None:
        """Write down what only the memory of the index knows, where an opening would take long to learn it again."""
        with self._lock, self._runtime.writing():
            if not self._dropped:
                self._index.checkpoint(self._coverage())

    def _release(self) -> None:
        """Let go of the index and its files; lookups that still run have theirs."""
        self._index = self._new_index()

    def _check_index(self) -> bool:
        """Whether the files of the index are what was written."""
        return self._index.check()

    # ---- within: finding

    def _live(self) -> None:
        self._runtime.check_open()
        if self._dropped:
            msg = f"vocabulary {self.name!r} is no longer in the store {self._runtime.path}"
            raise VocabularyNotFoundError(msg)

    def _checked(self, given: KeysLike) -> tuple[Keys, NDArray[np.uint64]]:
        checked = keys.checked(given, self.key_type, self.name)
        return checked, self._hashes(checked)

    def _hashes(self, checked: Keys) -> NDArray[np.uint64]:
        hashes = np.empty(checked.size, np.uint64)
        self._run(checked.hasher(self._secret, hashes), checked.size)
        return hashes

    def _run(self, function: Callable[[int, int], None], length: int) -> None:
        batch.run_pieces(self._runtime, [function], [length], [batch.LEAST_ROW_BYTES])

    def _find(self, checked: Keys, hashes: NDArray[np.uint64]) -> Int64Array:
        """Return the rows of keys, -1 where there is none."""
        # Before the index, which knows of every row by the time that the counts do; and one view of it for all.
        end, index = self._state.rows, self._index
        view = index.view
        self._live()  # or it is that of no file any more
        rows = self._candidates(view, hashes, 0, end)
        if checked.integers is not None and self._is_exact(index):
            return rows
        which: Int64Array | None = None
        for skip in count(1):
            some = rows if which is None else self._candidates(view, hashes[which], skip - 1, end)
            if which is None:
                others = self._stored.drop_others(checked, hashes, some)
            else:
                others = self._stored.drop_others(checked.take(which), hashes[which], some)
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

    def _give(self, new: Keys, hashes: NDArray[np.uint64]) -> Int64Array:
        """Give rows to keys that have none; return the row of each, -1 where it is not admitted."""
        firsts, inverse = _first_of_each(new, hashes)
        if self._state.admission is not None:
            admitted = self._count(self._state.admission, hashes[firsts], inverse)
            number = np.where(admitted, np.cumsum(admitted) - 1, -1)
            firsts, inverse = firsts[admitted], number[inverse]
        rows = self._next_rows(firsts.size)
        if firsts.size:
            some = new if firsts.size == new.size else new.take(firsts)
            self._enter(some, hashes[firsts], rows)
        return np.append(rows, -1)[inverse]

    def _count(
        self, admission: Admission, hashes: NDArray[np.uint64], sightings: Int64Array
    ) -> NDArray[np.bool_]:
        """Count sightings of keys without a row, given by their places among `hashes`; tell who has earned one."""
        counters = admission.counters(hashes, self._secret)
        counts, change = self._stored.count(counters, sightings)
        with signals_deferred():
            batch.change(self._runtime, [change])
            self._state = replace(self._state, sightings=self._state.sightings + sightings.size)
        return counts >= admission.after

    def _next_rows(self, number: int) -> Int64Array:
        """Return the rows that so many new keys get: freed ones first, as long as their removal is committed."""
        state = self._state
        again = min(number, self._committed.tail - state.head)
        freed = self._stored.freed(state.head, state.head + again)
        return np.concatenate([freed, np.arange(state.rows, state.rows + number - again)])

    def _enter(self, new: Keys, hashes: NDArray[np.uint64], rows: Int64Array) -> None:
        """Note new keys and their rows: in memory, until the next commit, as all changes."""
        before, again = self._state, int(np.count_nonzero(rows < self._state.rows))
        after = replace(before, rows=before.rows + rows.size - again, head=before.head + again)
        for table in self._bound():
            grow(table, after.rows)
        self._stored.reserve(after.rows)
        self._index.add(hashes, rows, self._coverage())
        # Rows that come after all others are nobody's before the counts say so; freed ones change with them at once.
        for start in range(again, rows.size, SLICE_ROWS):
            some = np.arange(start, min(start + SLICE_ROWS, rows.size))
            changes, text_bytes = self._stored.enter(
                new.take(some), hashes[some], rows[some], after.text_bytes, fresh=before.rows
            )
            batch.change(self._runtime, changes)
            after = replace(after, text_bytes=text_bytes)
        some = np.arange(again)
        changes, text_bytes = self._stored.enter(
            new.take(some), hashes[some], rows[some], after.text_bytes, fresh=before.rows
        )
        with signals_deferred():
            if again:
                batch.change(self._runtime, changes)
            self._state = replace(after, text_bytes=text_bytes)

    def _bound(self) -> Sequence[Table]:
        return self._bound_to(self._state.uuid)

    # ---- within: the index

    def _new_index(self) -> KeyIndex:
        run = partial(batch.run_side_by_side, self._runtime)
        return KeyIndex(self._path, self._state.uuid, run, writable=self._runtime.writable)

    def _coverage(self) -> Coverage:
        """Return what the last commit says, of which the index knows everything."""
        return Coverage(self._commit, self._committed.rows, self._committed.head)

    def _learn(self, index: KeyIndex, known: Coverage) -> None:
        """Add what an index does not know: keys of rows that came later, and of rows that were given out anew."""
        now = self._coverage()
        # On the way the index may be merged into files, which must say no more than it knows by then.
        known = replace(known, commit=now.commit, head=known.head if known.rows else now.head)
        for start in range(max(known.rows, self.reserved), now.rows, SLICE_ROWS):
            stop = min(start + SLICE_ROWS, now.rows)
            self._learn_rows(index, np.arange(start, stop), replace(known, rows=start))
        for start in range(known.head, now.head, SLICE_ROWS):
            rows = np.unique(self._stored.freed(start, min(start + SLICE_ROWS, now.head)))
            self._learn_rows(index, rows, replace(now, head=start))

    def _learn_rows(self, index: KeyIndex, rows: Int64Array, known: Coverage) -> None:
        words = self._stored.records(rows)
        live = records.are_live(words)
        if self.key_type == "int64":
            hashes = self._hashes(self._stored.keys_in(words[live]))
        else:
            hashes = records.hashes_of(words[live])
        rows = rows[live]
        # The files may have them: they were written with pairs that were not committed yet. Twice, none would be exact.
        new = self._candidates(index.view, hashes, 0, self._state.rows) != rows
        index.add(hashes[new], rows[new], known)


def _no_tables(identity: str) -> tuple[Table, ...]:
    return ()


def _first_of_each(new: Keys, hashes: NDArray[np.uint64]) -> tuple[Int64Array, Int64Array]:
    """Return where each distinct key stands first, ascending, and for each key which of these it is."""
    table = np.full(max(16, 2 * hashes.size), -1)
    leader = probing.first_of_each(hashes, new_salt(), table)
    if new.integers is None and matching.same_bytes(new.bounds, new.data, leader):
        leader = _leaders_by_bytes(new)
    is_first = leader == np.arange(leader.size)
    return np.flatnonzero(is_first), (np.cumsum(is_first) - 1)[leader]


def _leaders_by_bytes(new: Keys) -> Int64Array:
    """As the hashes would tell if different keys never had the same."""
    first: dict[bytes, int] = {}
    bounds, data = new.bounds.tolist(), new.data.tobytes()
    return np.array([first.setdefault(data[bounds[i] : bounds[i + 1]], i) for i in range(new.size)], np.int64)
