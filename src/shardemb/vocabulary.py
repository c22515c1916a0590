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

from shardemb import arrays, batch, hashing, keys, plan, probing, records
from shardemb.errors import RowIdError, ShardEmbError, VocabularyNotFoundError
from shardemb.keyindex import Coverage, KeyIndex
from shardemb.runtime import signals_deferred
from shardemb.spec import INTERNAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from shardemb.admission import Admission
    from shardemb.arrays import Int64Array
    from shardemb.keys import Keys, KeysLike, KeyType
    from shardemb.manifest import VocabularyRecord
    from shardemb.records import Words
    from shardemb.runtime import Runtime
    from shardemb.table import Table

SLICE_ROWS = 2**18
"""Rows that are read or written at once."""

SLICE_BYTES = 2**25
"""Bytes of strings that are compared at once."""

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
        self._tables = dict(tables)
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
            "bytes_on_disk": sum(table.stats()["bytes_allocated"] for table in self._tables.values()),
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
        words = self._records(checked.flat)
        bad = np.flatnonzero(~records.are_live(words))
        if bad.size:
            msg = f"row {int(checked.flat[bad[0]])} of vocabulary {self.name!r} has no key ({bad.size} such rows)"
            raise RowIdError(msg)
        found = self._keys_in(words)
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
            live, found = self.arrow_keys(start, stop)
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
        with self.changing():
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
        >>> words.remove(["is", "unheard"])
        array([ 5, -1])
        """
        checked, hashes = self._checked(keys)
        with self.changing():
            rows = self._find(checked, hashes)
            self.free_rows(np.unique(rows[rows >= 0]))
        return rows.reshape(checked.shape)

    # ---- for tables that are bound to it

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold what keeps others from changing the vocabulary, in a store that is sound and may be written."""
        with self._lock, self._runtime.changing():
            self._runtime.check_sound()
            self._live()
            yield

    def free_rows(self, rows: Int64Array) -> Keys:
        """Take rows that have keys, ascending, away from them; return the keys. While `changing`."""
        self._reserve_ring(rows.size)
        state, freed = self._state, self._tables["freed"]
        words = self._records(rows)
        positions = np.arange(state.tail, state.tail + rows.size) % freed.num_embeddings
        order = np.argsort(positions)
        changes = [
            self._change("keys", rows, records.without_key(words)),
            self._change("freed", positions[order], rows[order].view(np.uint32).reshape(-1, 2)),
            *(table._plan_reset(rows) for table in self._bound()),
        ]
        found = self._keys_in(words)
        if rows.size:
            with signals_deferred():
                batch.change(self._runtime, changes)
                self._become(state, replace(state, tail=state.tail + rows.size))
        return found

    def rows_to_be(self, given: KeysLike, which: Int64Array) -> Int64Array:
        """Tell which rows some keys of a batch would get, none of which has one."""
        checked, hashes = self._checked(given)
        firsts, inverse = _first_of_each(checked.take(which), hashes[which])
        return self._next_rows(firsts.size)[inverse]

    def live_rows(self, start: int, stop: int) -> Int64Array:
        """List which of rows ``start:stop`` have a key."""
        rows = np.arange(start, stop)
        return rows[records.are_live(self._records(rows))]

    def arrow_keys(self, start: int, stop: int) -> tuple[NDArray[np.bool_], pa.Array]:
        """Tell which of rows ``start:stop`` have a key, and the keys of those."""
        self._live()
        words = self._records(np.arange(start, stop))
        live = records.are_live(words)
        return live, keys.as_arrow(self._keys_in(words[live]), self.key_type)

    def bind(self, bound_to: Callable[[str], Sequence[Table]]) -> None:
        """Have the vocabulary ask, by its uuid, for the tables whose rows it gives out."""
        self._bound_to = bound_to

    # ---- for the store

    def record(self) -> VocabularyRecord:
        """Return what a commit would say about it."""
        return self._state

    def settle(self, commit: int) -> None:
        """Take its state as that of the last commit."""
        self._committed, self._commit = self._state, commit
        if not self._index.is_stale(len(self)) or not self._lock.acquire(blocking=False):
            return  # some thread is about to add pairs to this index
        try:
            fresh = self._new_index()
            self._learn(fresh, Coverage())
            self._index = fresh
        except OSError:
            pass  # no room for its file: the old one is as good
        finally:
            self._lock.release()

    def restore(self, record: VocabularyRecord) -> None:
        """Go back to the last commit. The index may go on to know more."""
        self._state = self._committed = record
        self._dropped = False

    def adopt(self, newer: Vocabulary) -> Vocabulary:
        """Become what a newer opening of the same vocabulary is."""
        self._state, self._committed, self._commit = newer._state, newer._committed, newer._commit
        self._index, self._dropped = newer._index, False
        return self

    def open(self, commit: int) -> None:
        """Take up the index's file, and learn what it does not know of the last commit."""
        self._commit = commit
        self._index.load(self._coverage())
        self._learn(self._index, self._index.coverage)

    def drop(self) -> None:
        """Refuse every use from now on, unless a rollback brings it back."""
        self._dropped = True

    def check_index(self) -> bool:
        """Whether the file of the index is what was written."""
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
        # Pairs as many as keys are those of the keys, and different integers have different hashes.
        exact = checked.integers is not None and len(self._index) == len(self)
        rows = self._candidates(hashes, 0)
        if exact:
            return rows
        which: Int64Array | None = None
        for skip in count(1):
            some = rows if which is None else self._candidates(hashes[which], skip - 1)
            again = self._mismatches(checked if which is None else checked.take(which), some, hashes, which)
            if which is not None:
                rows[which] = some
            left = np.flatnonzero(again)
            if not left.size:
                return rows
            which = left if which is None else which[left]
        raise AssertionError

    def _candidates(self, hashes: NDArray[np.uint64], skip: int) -> Int64Array:
        index, end, rows = self._index, self._state.rows, np.empty(hashes.size, np.int64)
        index.read_ahead(hashes)
        self._run(lambda start, stop: index.probe(hashes, skip, end, rows, start, stop), hashes.size)
        return rows

    def _mismatches(
        self, checked: Keys, rows: Int64Array, hashes: NDArray[np.uint64], which: Int64Array | None
    ) -> NDArray[np.bool_]:
        """Set rows that hold another key to -1, and tell which those were."""
        again = np.zeros(rows.size, np.bool_)
        words = self._records(np.maximum(rows, 0))
        if checked.integers is not None:
            records.match_integers(words, checked.integers, rows, again)
            return again
        some = hashes if which is None else hashes[which]
        records.match_hashes(words, some, checked.lengths, rows, again)
        found = np.flatnonzero(rows >= 0)
        begins, lengths, _ = records.spans_of(words[found])
        for first, last in _slices(lengths):
            cells, at = self._cells(begins[first:last], lengths[first:last])
            records.match_bytes(cells, at, found[first:last], checked.bounds, checked.data, rows, again)
        return again

    def _records(self, rows: Int64Array) -> Words:
        """Read the records of rows."""
        return self._words("keys", rows)

    def _words(self, which: str, rows: Int64Array) -> Words:
        shards = self._tables[which]._mapped
        out = np.empty((rows.size, shards.spec.embedding_dim), np.float32)
        batch.read(self._runtime, [batch.Read(shards, "weight", rows, out)])
        return out.view(np.uint32)

    def _cells(self, begins: Int64Array, lengths: Int64Array) -> tuple[NDArray[np.uint8], Int64Array]:
        """Read the cells of strings, those of each on its own; return also where each begins in what was read."""
        first, last = begins // records.CELL_BYTES, -(-(begins + lengths) // records.CELL_BYTES)
        counts = last - first
        ends = np.cumsum(counts)
        rows = np.repeat(first - ends + counts, counts) + np.arange(ends[-1] if ends.size else 0)
        cells = self._words("bytes", rows).view(np.uint8).reshape(-1)
        return cells, (ends - counts) * records.CELL_BYTES + begins % records.CELL_BYTES

    def _keys_in(self, words: Words) -> Keys:
        """Read the keys that records are about."""
        if self.key_type == "int64":
            integers = records.integers_of(words)
            return keys.Keys(integers.shape, integers)
        begins, lengths, _ = records.spans_of(words)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        data = np.empty(offsets[-1], np.uint8)
        for first, last in _slices(lengths):
            cells, at = self._cells(begins[first:last], lengths[first:last])
            records.take_bytes(cells, at, offsets[first : last + 1], data)
        return keys.Keys(lengths.shape, None, offsets, data)

    # ---- within: giving rows out

    def _give(self, new: Keys, hashes: NDArray[np.uint64]) -> Int64Array:
        """Give rows to keys that have none; return the row of each, -1 where it is not admitted."""
        firsts, inverse = _first_of_each(new, hashes)
        if self._state.admission is not None:
            admitted = self._admitted(hashes[firsts], inverse)
            number = np.full(firsts.size, -1)
            number[admitted] = np.arange(np.count_nonzero(admitted))
            firsts = firsts[admitted]
            inverse = number[inverse]
        rows = self._next_rows(firsts.size)
        if firsts.size:
            some = new if firsts.size == new.size else new.take(firsts)
            self._enter(some, hashes[firsts], rows)
        return np.append(rows, -1)[inverse]

    def _next_rows(self, number: int) -> Int64Array:
        """Return the rows that so many new keys get: freed ones first, as long as their removal is committed."""
        state = self._state
        again = min(number, self._committed.tail - state.head)
        freed = self._ring(state.head, state.head + again)
        return np.concatenate([freed, np.arange(state.rows, state.rows + number - again)])

    def _ring(self, start: int, stop: int) -> Int64Array:
        """Read some of the rows that were freed, by how many were freed before them."""
        table = self._tables["freed"]
        words = self._words("freed", np.arange(start, stop) % table.num_embeddings)
        return words.view(np.int64).reshape(-1)

    def _enter(self, new: Keys, hashes: NDArray[np.uint64], rows: Int64Array) -> None:
        """Note new keys and their rows: in memory, until the next commit, as all changes."""
        before, again = self._state, int(np.count_nonzero(rows < self._state.rows))
        after = replace(before, rows=before.rows + rows.size - again, head=before.head + again)
        for table in self._bound():
            _grow(table, after.rows)
        _grow(self._tables["keys"], after.rows)
        self._index.add(hashes, rows, self._coverage())
        # Rows that come after all others are nobody's before the counts say so; freed ones change with them at once.
        for start in range(again, rows.size, SLICE_ROWS):
            which = np.arange(start, min(start + SLICE_ROWS, rows.size))
            changes, text_bytes = self._entries(new, hashes, rows, which, after.text_bytes)
            batch.change(self._runtime, changes)
            after = replace(after, text_bytes=text_bytes)
        changes, text_bytes = self._entries(new, hashes, rows, np.arange(again), after.text_bytes)
        with signals_deferred():
            if again:
                batch.change(self._runtime, changes)
            self._become(before, replace(after, text_bytes=text_bytes))

    def _entries(
        self, new: Keys, hashes: NDArray[np.uint64], rows: Int64Array, which: Int64Array, text_bytes: int
    ) -> tuple[list[batch.Change], int]:
        """Plan to write some of new keys; return also where the next bytes go."""
        which = which[np.argsort(rows[which], kind="stable")]
        some, rows = new.take(which), rows[which]
        if some.integers is not None:
            return [self._change("keys", rows, records.integer_records(some.integers))], text_bytes
        begins, _, rooms = records.spans_of(self._records(rows))
        rooms[rows >= self._state.rows] = 0  # of an attempt that broke off
        moved = rooms < some.lengths
        # One that had bytes gets twice as many as it needs: the next key of the row may fit.
        needed = some.lengths[moved]
        wanted = np.where(rooms[moved] > 0, 2 * needed, needed)
        ends = text_bytes + np.cumsum(wanted)
        begins[moved], rooms[moved] = ends - wanted, wanted
        text_bytes = int(ends[-1]) if ends.size else text_bytes
        words = records.string_records(hashes[which], begins, some.lengths, rooms)
        return [self._change("keys", rows, words), *self._bytes_change(some, begins, text_bytes)], text_bytes

    def _bytes_change(self, new: Keys, begins: Int64Array, text_bytes: int) -> list[batch.Change]:
        _grow(self._tables["bytes"], -(-text_bytes // records.CELL_BYTES) + 1)
        first, last = begins // records.CELL_BYTES, -(-(begins + new.lengths) // records.CELL_BYTES)
        counts = last - first
        ends = np.cumsum(counts)
        rows = np.unique(np.repeat(first - ends + counts, counts) + np.arange(ends[-1] if ends.size else 0))
        if not rows.size:
            return []
        cells = self._words("bytes", rows).view(np.uint8)
        at = np.searchsorted(rows, first) * records.CELL_BYTES + begins % records.CELL_BYTES
        records.place_bytes(cells.reshape(-1), at, new.bounds, new.data)
        return [self._change("bytes", rows, cells.view(np.uint32))]

    def _change(self, which: str, rows: Int64Array, words: Words) -> batch.Change:
        """Plan to write records of ascending rows."""
        grouped = plan.Grouped(rows, np.arange(rows.size + 1), np.arange(rows.size))
        return batch.Change(self._tables[which]._mapped, grouped, words.view(np.float32), None)

    def _reserve_ring(self, more: int) -> None:
        """Have room in the ring of freed rows for so many more."""
        table, state = self._tables["freed"], self._state
        low = min(self._index.coverage.head, self._committed.head)
        size = table.num_embeddings
        if state.tail + more - low <= size:
            return
        positions = np.arange(low, state.tail)
        rows = self._ring(low, state.tail)
        _grow(table, 2 * max(size, state.tail + more - low))
        places = positions % table.num_embeddings
        order = np.argsort(places)
        change = self._change("freed", places[order], rows[order].view(np.uint32).reshape(-1, 2))
        batch.change(self._runtime, [change])

    def _bound(self) -> Sequence[Table]:
        return self._bound_to(self._state.uuid)

    def _become(self, before: VocabularyRecord, after: VocabularyRecord) -> None:
        if self._state is not before:
            msg = f"vocabulary {self.name!r}: the store was rolled back while this waited for room; nothing was changed"
            raise ShardEmbError(msg)
        self._state = after

    # ---- within: admission

    def _admitted(self, hashes: NDArray[np.uint64], sightings: Int64Array) -> NDArray[np.bool_]:
        """Count sightings of keys without a row, given by their places among `hashes`; tell who has earned one."""
        admission = self._state.admission
        assert admission is not None
        places = self._counters(hashes)
        cells = np.unique(places // 16)
        counters = self._words("sketch", cells)
        at = np.searchsorted(cells, places // 16) * 16 + places % 16
        counts = np.zeros(hashes.size, np.uint32)
        records.count_seen(counters.reshape(-1), at, sightings, counts)
        with signals_deferred():
            before = self._state
            batch.change(self._runtime, [self._change("sketch", cells, counters)])
            self._become(before, replace(before, sightings=before.sightings + sightings.size))
        return counts >= admission.after

    def _counters(self, hashes: NDArray[np.uint64]) -> Int64Array:
        """Choose a counter of each row of the sketch for keys, shape (n, depth)."""
        admission = self._state.admission
        assert admission is not None
        rows = np.arange(admission.depth, dtype=np.int64)
        mixed = np.empty(hashes.size * admission.depth, np.uint64)
        salted = (hashes[:, None] ^ (rows.astype(np.uint64) << np.uint64(56))).reshape(-1).view(np.int64)
        hashing.hash_integers(salted, self._secret.second, self._secret.first, mixed, 0, mixed.size)
        columns = (mixed % np.uint64(admission.width)).astype(np.int64).reshape(-1, admission.depth)
        return columns + rows * admission.width

    # ---- within: the index

    def _new_index(self) -> KeyIndex:
        run = partial(batch.run_side_by_side, self._runtime)
        return KeyIndex(self._path, self._state.uuid, run, writable=self._runtime.writable)

    def _coverage(self) -> Coverage:
        """Return what the last commit says, of which the index knows everything."""
        return Coverage(self._commit, self._committed.rows, self._committed.head)

    def _learn(self, index: KeyIndex, known: Coverage) -> None:
        """Add what an index does not know: keys of rows that came later, and of rows that were given out anew."""
        for start in range(known.rows, self._state.rows, SLICE_ROWS):
            self._learn_rows(index, np.arange(start, min(start + SLICE_ROWS, self._state.rows)))
        for start in range(known.head if known.rows else self._state.head, self._state.head, SLICE_ROWS):
            self._learn_rows(index, np.unique(self._ring(start, min(start + SLICE_ROWS, self._state.head))))

    def _learn_rows(self, index: KeyIndex, rows: Int64Array) -> None:
        words = self._records(rows)
        live = records.are_live(words)
        if self.key_type == "int64":
            hashes = self._hashes(self._keys_in(words[live]))
        else:
            hashes = records.hashes_of(words[live])
        index.add(hashes, rows[live], self._coverage())


def _no_tables(identity: str) -> tuple[Table, ...]:
    return ()


def table_shapes(record: VocabularyRecord) -> dict[str, tuple[int, int, int]]:
    """Rows, values and rows of a shard of the tables that a new vocabulary needs, by what they are for."""
    words = records.INTEGER_WORDS if record.key_type == "int64" else records.STRING_WORDS
    shapes = {"keys": (2**24, words, 2**24), "freed": (2**20, 2, 2**20)}
    if record.key_type != "int64":
        shapes["bytes"] = (2**22, records.CELL_BYTES // 4, 2**22)
    if record.admission is not None:
        cells = record.admission.width * record.admission.depth // 16
        shapes["sketch"] = (cells, 16, cells)
    assert set(shapes) <= set(INTERNAL)
    return shapes


def _first_of_each(new: Keys, hashes: NDArray[np.uint64]) -> tuple[Int64Array, Int64Array]:
    """Return where each distinct key stands first, ascending, and for each key which of these it is."""
    table = np.full(max(16, 2 * hashes.size), -1)
    leader = probing.first_of_each(hashes, table)
    if new.integers is None and records.same_bytes(new.bounds, new.data, leader):
        leader = _leaders_by_bytes(new)
    is_first = leader == np.arange(leader.size)
    return np.flatnonzero(is_first), (np.cumsum(is_first) - 1)[leader]


def _leaders_by_bytes(new: Keys) -> Int64Array:
    """As the hashes would tell if different keys never had the same."""
    first: dict[bytes, int] = {}
    bounds, data = new.bounds.tolist(), new.data.tobytes()
    return np.array([first.setdefault(data[bounds[i] : bounds[i + 1]], i) for i in range(new.size)], np.int64)


def _grow(table: Table, rows: int) -> None:
    """Have a table hold at least so many rows: twice as many as now, in whole shards."""
    if rows > table.num_embeddings:
        wanted = max(rows, 2 * table.num_embeddings)
        table.resize(-(-wanted // table.rows_per_shard) * table.rows_per_shard)


def _slices(lengths: Int64Array) -> Iterator[tuple[int, int]]:
    """Cut strings into stretches of about `SLICE_BYTES`."""
    ends = np.cumsum(lengths + 2 * records.CELL_BYTES)
    cuts = np.searchsorted(ends, np.arange(SLICE_BYTES, int(ends[-1]) if ends.size else 0, SLICE_BYTES)) + 1
    edges = np.unique([0, *cuts.tolist(), lengths.size])
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
