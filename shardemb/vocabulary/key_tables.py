"""What a vocabulary keeps in tables of the store: the key of each row, freed rows, and counts of keys without a row.

A `KeyTables` reads these tables and plans changes of them, which `batch.change` carries out. What the changes mean is
the business of ``key_rows.py``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import round_up
from shardemb.compute import plan
from shardemb.engine import batch
from shardemb.engine.planned import Change, Read
from shardemb.errors import FormatError
from shardemb.format.spec import BYTES, FREED, KEYS, SKETCH
from shardemb.vocabulary import key_kernels, key_records, keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.table_state import TableState
    from shardemb.format.manifest import VocabularyEntry
    from shardemb.vocabulary.key_records import Words
    from shardemb.vocabulary.keys import Keys

SLICE_BYTES = 2**25
"""How many bytes of strings are read and compared in one step."""


class KeyTables:
    """The tables of one vocabulary.

    Parameters
    ----------
    runtime : Runtime
    tables : mapping of str to TableState
        The tables by kind; see `VocabularyEntry.table_kinds`.
    """

    def __init__(self, runtime: Runtime, tables: Mapping[str, TableState]) -> None:
        self._runtime = runtime
        self._tables = dict(tables)

    def are(self, tables: Mapping[str, TableState]) -> bool:
        """Return whether these are the tables, by kind."""
        return self._tables.keys() == tables.keys() and all(
            self._tables[kind] is table for kind, table in tables.items()
        )

    def join(self, runtime: Runtime) -> None:
        """Use the runtime of another opening of the store."""
        self._runtime = runtime

    def check(self, entry: VocabularyEntry) -> None:
        """Compare what a commit says about the vocabulary with the sizes of its tables.

        Raises
        ------
        FormatError
            It cannot be: to believe it would mean to read records that are not there, or to read without end.
        """
        rows = {kind: table.spec.num_embeddings for kind, table in self._tables.items()}
        free, cells, sketch = (
            entry.tail - entry.head,
            rows.get(BYTES, 0),
            table_shapes(entry).get(SKETCH, (0,))[0],
        )
        wrong = {
            # Rows that no key ever gets need no record.
            f"rows {entry.rows}, of which the table of keys has {rows[KEYS]}": entry.rows
            > max(rows[KEYS], entry.reserved),
            f"admission {entry.admission}, but has {rows.get(SKETCH, 0)} cells of counters": rows.get(
                SKETCH, 0
            )
            < sketch,
            f"reserved {entry.reserved} of {entry.rows} rows": entry.reserved > entry.rows,
            f"{free} free rows of {entry.rows}": not 0 <= free <= entry.rows - entry.reserved,
            f"{free} free rows, in a ring of {rows[FREED]}": free > rows[FREED],
            f"text_bytes {entry.text_bytes} in {cells} cells": entry.text_bytes
            > cells * key_records.CELL_BYTES,
        }
        for problem in (problem for problem, found in wrong.items() if found):
            msg = f"vocabulary {entry.name!r} says {problem}: restore the store from a copy"
            raise FormatError(msg)

    @property
    def ring_size(self) -> int:
        """How many freed rows are remembered, the last ones."""
        return self._tables[FREED].spec.num_embeddings

    @property
    def bytes_allocated(self) -> int:
        """Bytes that the tables take on disk."""
        return sum(table.stats()["bytes_allocated"] for table in self._tables.values())

    # ---- keys by row

    def records(self, rows: Int64Array) -> Words:
        """Read the records of rows."""
        return self._words(KEYS, rows)

    def keys_in(self, words: Words) -> Keys:
        """Read the keys of records."""
        return keys_in(words, partial(self._words, BYTES))

    def drop_others(self, given: Keys, hashes: NDArray[np.uint64], rows: Int64Array) -> NDArray[np.bool_]:
        """Set the `rows` to -1 that do not hold the given key; return which of them that were."""
        dropped = np.zeros(rows.size, np.bool_)
        words = self.records(np.maximum(rows, 0))
        if given.integers is not None:
            key_kernels.match_integers(words, given.integers, rows, dropped)
            return dropped
        key_kernels.match_hashes(words, hashes, given.lengths, rows, dropped)
        # Only strings whose hash and length match are worth reading.
        found = np.flatnonzero(rows >= 0)
        begins, lengths, _ = key_records.spans_of(words[found])
        for first, last in _slices(lengths):
            cells, at = _read_cells(begins[first:last], lengths[first:last], partial(self._words, BYTES))
            key_kernels.match_bytes(cells, at, found[first:last], given.bounds, given.data, rows, dropped)
        return dropped

    def enter(
        self, new: Keys, hashes: NDArray[np.uint64], rows: Int64Array, text_bytes: int, *, fresh: int
    ) -> tuple[list[Change], int]:
        """Plan to write keys to the records of rows; return also where the bytes of the next string go.

        Rows from `fresh` on were never assigned: what their records say is ignored.
        """
        order = np.argsort(rows, kind="stable")
        rows, hashes, new = rows[order], hashes[order], new.take(order)
        if new.integers is not None:
            return [self.change(KEYS, rows, key_records.integer_records(new.integers))], text_bytes
        begins, _, capacities = key_records.spans_of(self.records(rows))
        capacities[rows >= fresh] = 0
        moved = capacities < new.lengths
        # A row that had bytes gets twice as many as it needs, so that its next key may fit.
        wanted = np.where(capacities[moved] > 0, 2, 1) * new.lengths[moved]
        ends = text_bytes + np.cumsum(wanted)
        begins[moved], capacities[moved] = ends - wanted, wanted
        text_bytes = int(ends[-1]) if ends.size else text_bytes
        words = key_records.string_records(hashes, begins, new.lengths, capacities)
        return [self.change(KEYS, rows, words), *self._enter_bytes(new, begins, text_bytes)], text_bytes

    def forget(self, rows: Int64Array, words: Words) -> Change:
        """Plan to remove the keys of ascending rows, whose records are `words`."""
        return self.change(KEYS, rows, key_records.without_key(words))

    def reserve(self, rows: int) -> None:
        """Make the tables large enough for the keys of that many rows."""
        grow(self._tables[KEYS], rows)

    # ---- rows that became free

    def freed(self, start: int, stop: int) -> Int64Array:
        """Read the freed rows number ``start:stop``, in the order in which they were freed."""
        return self._words(FREED, self._cells_of_ring(start, stop)).view(np.int64).reshape(-1)

    def free(self, start: int, rows: Int64Array) -> Change:
        """Plan to record that rows were freed, after `start` others."""
        cells = self._cells_of_ring(start, start + rows.size)
        order = np.argsort(cells)
        return self.change(FREED, cells[order], rows[order].view(np.uint32).reshape(-1, 2))

    def reserve_freed(self, low: int, tail: int, more: int) -> None:
        """Make the ring large enough for `more` rows after the freed ones ``low:tail``, which stay in it."""
        table = self._tables[FREED]
        if tail + more - low > table.spec.num_embeddings:
            rows, size = self.freed(low, tail), whole_shards(table, 2 * (tail + more - low))
            # The size of the ring determines where the rows are. Both change in one step: a commit in between would
            # make a ring durable whose rows are in the wrong places.
            cells = np.arange(low, tail) % size
            table.resize_and_write(size, cells, rows.view(np.float32).reshape(-1, 2))

    def _cells_of_ring(self, start: int, stop: int) -> Int64Array:
        """Return where in the ring the freed rows number ``start:stop`` are."""
        return np.arange(start, stop) % self._tables[FREED].spec.num_embeddings

    # ---- counts of keys that have no row

    def count(self, counters: Int64Array, occurrences: Int64Array) -> tuple[NDArray[np.uint32], Change]:
        """Plan to count occurrences of keys.

        Parameters
        ----------
        counters : ndarray of int64, shape (n, depth)
            The counters of each key.
        occurrences : ndarray of int64
            The keys that occur, as positions in `counters`, in their order.

        Returns
        -------
        counts : ndarray of uint32, shape (n,)
            The count of each key after its last occurrence.
        change : Change
        """
        cells = np.unique(counters // key_records.CELL_COUNTERS)
        words = self._words(SKETCH, cells)
        firsts = np.searchsorted(cells, counters // key_records.CELL_COUNTERS) * key_records.CELL_COUNTERS
        counts = np.zeros(counters.shape[0], np.uint32)
        key_kernels.count_seen(
            words.reshape(-1), firsts + counters % key_records.CELL_COUNTERS, occurrences, counts
        )
        return counts, self.change(SKETCH, cells, words)

    # ---- within

    def change(self, which: str, rows: Int64Array, words: Words) -> Change:
        """Plan to write records of ascending rows."""
        return Change(self._tables[which], plan.each_once(rows), words.view(np.float32), takes_step=False)

    def _words(self, which: str, rows: Int64Array) -> Words:
        table = self._tables[which]
        shards = table.live()
        last = shards.spec.num_embeddings - 1
        out = np.empty((rows.size, shards.spec.embedding_dim), np.float32)
        batch.read(self._runtime, [Read(table, shards, "weight", np.minimum(rows, last), out)])
        # A lookup without a lock may ask for rows that do not exist: after a concurrent rollback, or because it saw a
        # record that was half written.
        out[rows > last] = 0
        return out.view(np.uint32)

    def _enter_bytes(self, new: Keys, begins: Int64Array, text_bytes: int) -> list[Change]:
        grow(self._tables[BYTES], -(-text_bytes // key_records.CELL_BYTES) + 1)
        rows = np.unique(_cells_of(begins, new.lengths)[0])
        if not rows.size:
            return []
        cells = self._words(BYTES, rows).view(np.uint8)
        at = np.searchsorted(rows, begins // key_records.CELL_BYTES) * key_records.CELL_BYTES
        key_kernels.place_bytes(cells.reshape(-1), at + begins % key_records.CELL_BYTES, new.bounds, new.data)
        return [self.change(BYTES, rows, cells.view(np.uint32))]


def keys_in(words: Words, read: Callable[[Int64Array], Words]) -> Keys:
    """Read the keys of records.

    Parameters
    ----------
    words : ndarray of uint32
        The records.
    read : callable
        ``read(rows)`` returns these rows of the table of the strings' bytes.
    """
    if words.shape[1] == key_records.INTEGER_WORDS:
        integers = key_records.integers_of(words)
        return keys.Keys(integers.shape, integers)
    begins, lengths, _ = key_records.spans_of(words)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    data = np.empty(offsets[-1], np.uint8)
    for first, last in _slices(lengths):
        cells, at = _read_cells(begins[first:last], lengths[first:last], read)
        key_kernels.take_bytes(cells, at, offsets[first : last + 1], data)
    return keys.Keys(lengths.shape, None, offsets, data)


def table_shapes(entry: VocabularyEntry) -> dict[str, tuple[int, int, int]]:
    """Return rows, values in a row, and rows in a shard of the tables that a new vocabulary needs, by kind."""
    words = key_records.INTEGER_WORDS if entry.key_type == "int64" else key_records.STRING_WORDS
    admission = entry.admission
    cells = admission.width * admission.depth // key_records.CELL_COUNTERS if admission else 0
    shapes = {
        KEYS: (2**24, words, 2**24),
        BYTES: (2**22, key_records.CELL_BYTES // 4, 2**22),
        FREED: (2**20, 2, 2**20),
        SKETCH: (cells, key_records.CELL_COUNTERS, cells),
    }
    return {kind: shapes[kind] for kind in entry.table_kinds}


def grow(table: TableState, rows: int) -> None:
    """Make a table hold at least `rows` rows. One that is too small gets at least twice its size, in whole shards."""
    if rows > table.spec.num_embeddings:
        table.resize(whole_shards(table, max(rows, 2 * table.spec.num_embeddings)))


def whole_shards(table: TableState, rows: int) -> int:
    """Round rows up to whole shards of a table."""
    return round_up(rows, table.spec.rows_per_shard)


def _read_cells(
    begins: Int64Array, lengths: Int64Array, read: Callable[[Int64Array], Words]
) -> tuple[NDArray[np.uint8], Int64Array]:
    """Read the cells of strings, separately for each string; return also where each string begins in the result."""
    rows, ends = _cells_of(begins, lengths)
    cells = read(rows).view(np.uint8).reshape(-1)
    firsts = np.concatenate([[0], ends[:-1]])[: ends.size]
    return cells, firsts * key_records.CELL_BYTES + begins % key_records.CELL_BYTES


def _cells_of(begins: Int64Array, lengths: Int64Array) -> tuple[Int64Array, Int64Array]:
    """List the cells of strings, string by string; return also where those of each string end in the list."""
    first, last = begins // key_records.CELL_BYTES, -(-(begins + lengths) // key_records.CELL_BYTES)
    counts = last - first
    ends = np.cumsum(counts)
    return np.repeat(first - ends + counts, counts) + np.arange(ends[-1] if ends.size else 0), ends


def _slices(lengths: Int64Array) -> Iterator[tuple[int, int]]:
    """Split strings into ranges of about `SLICE_BYTES` bytes."""
    ends = np.cumsum(lengths + 2 * key_records.CELL_BYTES)
    cuts = np.searchsorted(ends, np.arange(SLICE_BYTES, int(ends[-1]) if ends.size else 0, SLICE_BYTES)) + 1
    edges = np.unique([0, *cuts.tolist(), lengths.size])
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
