"""Any source of rows as a stream of Arrow record batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

T = TypeVar("T")

MAX_ROWS = 65_536
"""Maximum number of rows in a batch, and so in a row group."""

MAX_BYTES = 32 * 2**20
"""Maximum bytes of values in a batch, and of keys, unless a single row has more."""

MAX_READ_AHEAD = 4
"""Batches that a stream reads concurrently: keeps an NVMe disk busy, and bounds memory on large machines."""


class RowKeys(NamedTuple):
    """How to read the keys of rows, for sources that have keys.

    Attributes
    ----------
    kind : pyarrow.DataType
        Arrow's type of the keys.
    read : callable
        ``read(start, stop)`` returns which of these rows have a key, bool, shape (stop - start,), and the keys of
        those.
    nbytes : callable
        ``nbytes(start, stop)`` returns how many bytes the key of each row has, int64, shape (stop - start,), without
        reading the keys.
    steadily : callable
        ``steadily(function)`` returns what the function returns, and calls it again if a row has lost its key
        meanwhile: rows and keys that are read one after the other then belong together.
    """

    kind: pa.DataType
    read: Callable[[int, int], tuple[NDArray[np.bool_], pa.Array]]
    nbytes: Callable[[int, int], Int64Array]
    steadily: Callable[[Callable[[], Any]], Any]


class RowSource(Protocol):
    """Rows to export, as a table offers them. If it has `keys`, rows without a key are left out."""

    name: str
    num_embeddings: int
    embedding_dim: int
    rows_per_shard: int
    threads: int
    keys: RowKeys | None
    form: str

    @property
    def columns(self) -> Mapping[str, int]:
        """The state columns, and how many values each has in a row."""

    def read_rows(self, start: int, stop: int, columns: Sequence[str]) -> list[NDArray[Any]]:
        """Read the vectors of rows ``[start, stop)``, then each state column. Safe from several threads.

        The arrays have shape (stop - start, width) and belong to the caller. State is float32; vectors are as the
        `form` says: ``"float32"``, ``"float16"``, or ``"raw"``, which is uint8.
        """

    def run(self, tasks: Sequence[Callable[[], T]], stop: threading.Event | None = None) -> list[T]:
        """Run tasks, `threads` of them concurrently; see `scheduler.run`."""

    def release_pages(self, start: int, stop: int) -> None:
        """Let the kernel reclaim the page cache of rows ``[start, stop)``. A hint."""

    def describe(self) -> Mapping[str, object]:
        """Return a few facts about the table, as JSON values."""


def schema(source: RowSource, columns: Sequence[str] = ()) -> pa.Schema:
    """Describe the exported columns.

    Parameters
    ----------
    source : RowSource
        The table.
    columns : sequence of str
        State columns to export after ``id`` (int64) and ``embedding`` (lists of fixed size, of float32 or float16; or
        bytes), in this order.
        They are lists of float32, or plain float32 if the state is one number a row.

    Returns
    -------
    pyarrow.Schema
        Its metadata has one key, ``shardemb``: a JSON object with the table's name, shape and description.

    Raises
    ------
    ValueError
        `columns` are not distinct names of state columns.

    Examples
    --------
    >>> from types import SimpleNamespace as Source
    >>> source = Source(name="tokens", num_embeddings=5, embedding_dim=2, columns={"sum": 1}, keys=None,
    ...     form="float32", describe=dict)
    >>> schema(source, ["sum"]).names
    ['id', 'embedding', 'sum']
    """
    known = set(source.columns) - {"id", "key", "embedding"}
    if isinstance(columns, str) or len(set(columns)) < len(columns) or not known.issuperset(columns):
        msg = (
            f"table {source.name!r}: columns must be a list of different names out of "
            f"{sorted(known)}, got {columns!r}; the weight is always exported"
        )
        raise ValueError(msg)
    # Parquet calls the items of a list "element"; under another name they would come back changed.
    item = pa.field("element", pa.float32(), nullable=False)
    types = {"id": pa.int64()} | ({} if source.keys is None else {"key": source.keys.kind})
    short = pa.field("element", pa.float16(), nullable=False)
    binary = source.form == "raw"
    types["embedding"] = (
        pa.binary(source.embedding_dim)
        if binary
        else pa.list_(short if source.form == "float16" else item, source.embedding_dim)
    )
    for name in columns:
        width = source.columns[name]
        types[name] = pa.float32() if width == 1 else pa.list_(item, width)
    shape = {"num_embeddings": source.num_embeddings, "embedding_dim": source.embedding_dim}
    facts = {**source.describe(), "table": source.name, **shape}
    fields = [pa.field(name, kind, nullable=False) for name, kind in types.items()]
    return pa.schema(fields, metadata={"shardemb": json.dumps(facts)})


def to_arrow_batches(
    source: RowSource,
    *,
    columns: Sequence[str] = (),
    rows: tuple[int, int] | None = None,
) -> pa.RecordBatchReader:
    """Stream rows as Arrow record batches. Nothing is read before the first batch is requested.

    Parameters
    ----------
    source : RowSource
        The table.
    columns : sequence of str
        State columns to stream after the vectors.
    rows : (int, int), optional
        Half-open range of row ids; all by default.

    Returns
    -------
    pyarrow.RecordBatchReader
        Non-empty batches, by ascending id. Each owns its memory; up to `MAX_READ_AHEAD` are read ahead. Rows are as
        they are when their batch is read: this is not a snapshot of a table that is being changed.

    Raises
    ------
    ValueError
        The table has no such columns or no such range. Errors of reading are raised by the reader.

    Examples
    --------
    >>> from types import SimpleNamespace as Source
    >>> source = Source(
    ...     name="tokens", num_embeddings=5, embedding_dim=1, rows_per_shard=64, columns={}, keys=None, describe=dict,
    ...     form="float32", release_pages=print, threads=1, run=lambda tasks: [tasks[0]()],
    ...     read_rows=lambda start, stop, columns: [np.ones((stop - start, 1), np.float32)])
    >>> for batch in to_arrow_batches(source, rows=(1, 4)):
    ...     batch.num_rows
    1 4
    3
    """
    chosen = Selection.of(source, columns, rows)
    batches = chosen.stream()
    return pa.RecordBatchReader.from_batches(chosen.schema, batches)


def cut_by_bytes(start: int, nbytes: Int64Array, most: int) -> Iterator[tuple[int, int]]:
    """Cut rows, numbered from `start` and given by their bytes, into ranges of at most so many bytes, or of one row.

    Examples
    --------
    >>> list(cut_by_bytes(10, np.array([1, 2, 7, 1, 1]), 3))
    [(10, 12), (12, 13), (13, 15)]
    """
    ends = np.cumsum(nbytes)
    first, done = 0, 0
    while first < nbytes.size:
        last = max(first + 1, int(np.searchsorted(ends, done + most, side="right")))
        yield start + first, start + last
        first, done = last, int(ends[last - 1])


def _column(array: NDArray[Any], kind: pa.DataType) -> pa.Array:
    """Return rows as an array of Arrow, of lists or bytes or numbers."""
    if pa.types.is_fixed_size_binary(kind):
        return pa.FixedSizeBinaryArray.from_buffers(kind, len(array), [None, pa.py_buffer(array)])
    values = pa.array(array.reshape(-1))
    nested = pa.types.is_fixed_size_list(kind)
    return pa.FixedSizeListArray.from_arrays(values, type=kind) if nested else values


@dataclass(frozen=True)
class Selection:
    """Checked columns and rows, cut into batches.

    The table is a sequence of periods: one shard each, or several small ones. Each period is cut into the same number
    of batches of equal size, so that a batch lies within one shard or consists of whole ones. Cuts are computed when
    they are needed: a list of them would grow with the table.

    Attributes
    ----------
    source : RowSource
    schema : pyarrow.Schema
    start, num_rows : int
        The selected rows.
    period : int
        Rows in a period.
    batches : int
        Batches in a period.
    """

    source: RowSource
    schema: pa.Schema
    start: int
    num_rows: int
    period: int
    batches: int

    @classmethod
    def of(
        cls, source: RowSource, columns: Sequence[str], rows: tuple[int, int] | None, *, parts: int = 1
    ) -> Selection:
        """Check columns and rows, and choose batches so small that each of several `parts` has at least four."""
        fields = schema(source, columns)
        rows = (0, source.num_embeddings) if rows is None else rows
        # Only a tuple: range(2, 4) would unpack too, but mean rows 2 and 3.
        pair = isinstance(rows, tuple) and len(rows) == 2 and all(hasattr(row, "__index__") for row in rows)
        if not pair or not 0 <= rows[0] <= rows[1] <= source.num_embeddings:
            need = f"rows must be a tuple (start, stop), 0 <= start <= stop <= {source.num_embeddings}"
            msg = f"table {source.name!r}: {need}, got {rows!r}"
            raise ValueError(msg)
        width = source.embedding_dim + sum(source.columns[name] for name in columns)
        num_rows = int(rows[1] - rows[0])
        # With at least four batches in each part, parts have about equal sizes.
        part_rows = num_rows // parts // 4 if parts > 1 else MAX_ROWS
        most = max(1, min(MAX_ROWS, MAX_BYTES // (4 * width), part_rows))
        # Periods are whole shards: a batch that is part of a shard never reads from another one too.
        period = max(1, most // source.rows_per_shard) * source.rows_per_shard
        return cls(source, fields, int(rows[0]), num_rows, period, -(-period // most))

    def __len__(self) -> int:
        last = self.start + self.num_rows - 1
        return self._batch_of(last) - self._batch_of(self.start) + 1 if self.num_rows else 0

    def ranges(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """Iterate over the rows of some batches, as start and stop. A batch with many bytes of keys is cut further."""
        before = self._batch_of(self.start)
        for batch in range(before + first, before + (len(self) if last is None else last)):
            start = max(self._start_of(batch), self.start)
            stop = min(self._start_of(batch + 1), self.start + self.num_rows)
            if self.source.keys is None:
                yield start, stop
            else:
                yield from cut_by_bytes(start, self.source.keys.nbytes(start, stop), MAX_BYTES)

    def read(self, start: int, stop: int) -> pa.RecordBatch:
        """Read one of the `ranges`. Safe from several threads."""
        row_keys = self.source.keys
        first_state = 2 if row_keys is None else 3
        read = partial(self.source.read_rows, start, stop, self.schema.names[first_state:])
        if row_keys is None:
            arrays = read()
        else:
            arrays, (with_key, keys) = row_keys.steadily(lambda: (read(), row_keys.read(start, stop)))
        self.source.release_pages(
            start, stop
        )  # an export reads each row once: leave the page cache to others
        ids = np.arange(start, stop, dtype=np.int64)
        columns = [pa.array(ids)]
        if row_keys is not None:
            columns = [pa.array(ids[with_key]), keys]
            arrays = [array[with_key] for array in arrays]
        for array, kind in zip(arrays, self.schema.types[first_state - 1 :], strict=True):
            columns.append(_column(array, kind))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def stream(self) -> Iterator[pa.RecordBatch]:
        """Read the batches in order, several concurrently."""
        ahead = min(self.source.threads, MAX_READ_AHEAD)
        ranges = self.ranges()
        while some := list(islice(ranges, ahead)):
            batches = self.source.run([partial(self.read, *each) for each in some])
            batches = [batch for batch in batches if batch.num_rows]
            while batches:
                yield batches.pop(0)  # keep no reference: the consumer decides how long a batch lives

    def _start_of(self, batch: int) -> int:
        periods, batch = divmod(batch, self.batches)
        return periods * self.period + batch * self.period // self.batches

    def _batch_of(self, row: int) -> int:
        periods, row = divmod(row, self.period)  # the inverse of `_start_of`, rounded down
        return periods * self.batches + ((row + 1) * self.batches - 1) // self.period
