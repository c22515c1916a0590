"""Any source of rows as a stream of Arrow record batches."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from shardemb.base.progress import track
from shardemb.errors import ShardEmbError
from shardemb.exports import targets
from shardemb.exports.selection import Query
from shardemb.exports.targets import ExportReport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from shardemb.base.progress import Progress
    from shardemb.base.validation import Int64Array
    from shardemb.exports.selection import RowSet, RowSource

T = TypeVar("T")

MAX_ROWS = 65_536
"""Maximum number of rows in a batch, and so in a row group."""

MAX_BYTES = 32 * 2**20
"""Maximum bytes of values in a batch, and of keys, unless a single row has more."""

MAX_READ_AHEAD = 4
"""Batches that a stream reads concurrently: keeps an NVMe disk busy, and bounds memory on large machines."""


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
    chosen = Selection.of(source, columns, Query(rows).of(source))
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


def export_arrow(
    source: RowSource, path: object, rows: RowSet, *, columns: Sequence[str] = (), progress: Progress = None
) -> ExportReport:
    """Write rows to an Arrow IPC file: the format of ``.arrow`` files, and of Feather since its second version.

    The file is not compressed, so that a reader can map it.
    """
    chosen = Selection.of(source, columns, rows)
    target = targets.checked(path, source.name, folder=False)
    with (
        track(chosen.num_rows, f"export {source.name}", progress=progress) as advance,
        targets.staged(target, []) as temporary,
        targets.new_file(temporary) as sink,
        pa.ipc.new_file(sink, chosen.schema) as writer,
    ):
        written = 0
        for batch in chosen.stream():
            writer.write_batch(batch)
            sink.begin_write_back()
            advance(batch.num_rows)
            written += batch.num_rows
    return ExportReport.of([target], written)


@dataclass(frozen=True)
class Selection:
    """Checked columns and rows, cut into batches.

    Rows are numbered by their position in the selection. If they are a range, the table is a sequence of periods: one
    shard each, or several small ones. Each period is cut into the same number of batches of equal size, so that a batch
    lies within one shard or consists of whole ones. Other rows are cut into batches of equal size. Cuts are computed
    when they are needed: a list of them would grow with the table.

    Attributes
    ----------
    source : RowSource
    schema : pyarrow.Schema
    rows : RowSet
    start : int
        Where the selection begins in the first period.
    period : int
        Rows in a period.
    batches : int
        Batches in a period.
    """

    source: RowSource
    schema: pa.Schema
    rows: RowSet
    start: int
    period: int
    batches: int

    @classmethod
    def of(
        cls,
        source: RowSource,
        columns: Sequence[str],
        rows: RowSet,
        *,
        parts: int = 1,
        most_bytes: int | None = None,
    ) -> Selection:
        """Check columns, and choose batches so small that each of several `parts` has at least four."""
        fields = schema(source, columns)
        width = source.embedding_dim + sum(source.columns[name] for name in columns)
        # With at least four batches in each part, parts have about equal sizes.
        part_rows = rows.num_rows // parts // 4 if parts > 1 else MAX_ROWS
        most = max(1, min(MAX_ROWS, (most_bytes or MAX_BYTES) // (4 * width), part_rows))
        if not rows.is_range:
            return cls(source, fields, rows, 0, most, 1)
        # Periods are whole shards: a batch that is part of a shard never reads from another one too.
        period = max(1, most // source.rows_per_shard) * source.rows_per_shard
        return cls(source, fields, rows, rows.span[0], period, -(-period // most))

    @property
    def num_rows(self) -> int:
        """How many rows are selected; of these, some may have no key."""
        return self.rows.num_rows

    def __len__(self) -> int:
        last = self.start + self.num_rows - 1
        return self._batch_of(last) - self._batch_of(self.start) + 1 if self.num_rows else 0

    def ranges(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
        """Iterate over the positions of some batches. A batch with many bytes of keys is cut further."""
        before = self._batch_of(self.start)
        for batch in range(before + first, before + (len(self) if last is None else last)):
            start = max(self._start_of(batch) - self.start, 0)
            stop = min(self._start_of(batch + 1) - self.start, self.num_rows)
            if self.source.keys is None:
                yield start, stop
            else:
                yield from cut_by_bytes(start, self.source.keys.nbytes(self.rows.ids(start, stop)), MAX_BYTES)

    def read(self, first: int, last: int) -> pa.RecordBatch:
        """Read one of the `ranges`; rows without a key are left out. Safe from several threads."""
        row_keys, ids = self.source.keys, self.rows.ids(first, last)
        first_state = 2 if row_keys is None else 3
        read = partial(self._read_columns, ids, self.schema.names[first_state:])
        if row_keys is None:
            arrays, columns = read(), [pa.array(ids)]
        else:
            arrays, (with_key, keys) = row_keys.steadily(lambda: (read(), row_keys.read(ids)))
            columns = [pa.array(ids[with_key]), keys]
            arrays = [array[with_key] for array in arrays]
        self._release(ids)
        for array, kind in zip(arrays, self.schema.types[first_state - 1 :], strict=True):
            columns.append(_column(array, kind))
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def read_vectors(self, form: str, first: int, last: int) -> tuple[NDArray[Any], pa.Array | None]:
        """Read the vectors of one of the `ranges`, and their keys. Safe from several threads.

        Raises
        ------
        ShardEmbError
            A key was removed since the rows were selected.
        """
        row_keys, ids = self.source.keys, self.rows.ids(first, last)
        read = partial(self.source.read_vectors, ids, form)
        if row_keys is None:
            vectors, keys = read(), None
        else:
            vectors, (with_key, keys) = row_keys.steadily(lambda: (read(), row_keys.read(ids)))
            if not with_key.all():
                msg = (
                    f"table {self.source.name!r}: keys were removed while it was exported; export it again, or from a "
                    f'store that is opened with mode="r"'
                )
                raise ShardEmbError(msg)
        self._release(ids)
        return vectors, keys

    def in_order(self, task: Callable[[int, int], T]) -> Iterator[T]:
        """Call ``task(first, last)`` for all `ranges`, several concurrently; yield the results in order."""
        ahead = min(self.source.threads, MAX_READ_AHEAD)
        ranges = self.ranges()
        while some := list(islice(ranges, ahead)):
            results = self.source.run([partial(task, *each) for each in some])
            while results:
                yield results.pop(0)  # keep no reference: the consumer decides how long a result lives

    def stream(self) -> Iterator[pa.RecordBatch]:
        """Read the batches in order, several concurrently."""
        return filter(attrgetter("num_rows"), self.in_order(self.read))  # a loop would keep a reference

    def _read_columns(self, ids: Int64Array, columns: Sequence[str]) -> list[NDArray[Any]]:
        if self.rows.is_range:
            return self.source.read_rows(int(ids[0]), int(ids[-1]) + 1, columns)
        return self.source.read_ids(ids, columns)

    def _release(self, ids: Int64Array) -> None:
        """Leave the page cache to others: an export reads each row once."""
        if self.rows.is_range:
            self.source.release_pages(int(ids[0]), int(ids[-1]) + 1)

    def _start_of(self, batch: int) -> int:
        periods, batch = divmod(batch, self.batches)
        return periods * self.period + batch * self.period // self.batches

    def _batch_of(self, row: int) -> int:
        periods, row = divmod(row, self.period)  # the inverse of `_start_of`, rounded down
        return periods * self.batches + ((row + 1) * self.batches - 1) // self.period
