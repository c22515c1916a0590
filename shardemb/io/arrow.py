"""Any source of rows as a stream of Arrow record batches."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array


T = TypeVar("T")

MAX_ROWS = 65_536
"""Most rows of a batch, and so of a row group."""


MAX_BYTES = 32 * 2**20
"""Most bytes of values in a batch, unless a single row has more."""


MAX_READ_AHEAD = 4
"""Batches that a stream reads side by side: keeps an NVMe disk busy, and bounds memory on large machines."""


class RowKeys(NamedTuple):
    """Keys of rows, where these have any: what Arrow calls their type, and how to read them.

    ``read(start, stop)`` tells which of the rows have a key, bool, shape (stop - start,), and the keys of those.
    """

    kind: pa.DataType
    read: Callable[[int, int], tuple[NDArray[np.bool_], pa.Array]]


class RowSource(Protocol):
    """Rows to export, as a table offers them; where they have `keys`, those that have none are left out."""

    name: str
    num_embeddings: int
    embedding_dim: int
    rows_per_shard: int
    threads: int
    keys: RowKeys | None

    @property
    def columns(self) -> Mapping[str, int]:
        """The state columns and their widths in values a row."""

    def read_rows(self, start: int, stop: int, columns: Sequence[str]) -> list[Float32Array]:
        """Read the vectors of rows ``[start, stop)``, then each state column; safe from several threads.

        The arrays have shape (stop - start, width) and are the caller's own.
        """

    def run(self, tasks: Sequence[Callable[[], T]], stop: threading.Event | None = None) -> list[T]:
        """Run tasks, `threads` of them concurrently; see `scheduler.run`."""

    def release_pages(self, start: int, stop: int) -> None:
        """Let the pages of rows ``[start, stop)`` leave memory. A hint."""

    def describe(self) -> Mapping[str, object]:
        """Give a few facts about the table, as JSON has them."""


def schema(source: RowSource, columns: Sequence[str] = ()) -> pa.Schema:
    """Describe the exported columns.

    Parameters
    ----------
    source : RowSource
        The table.
    columns : sequence of str
        State columns to export after ``id`` (int64) and ``embedding`` (float32 lists of fixed size), in this
        order: such lists too, or plain float32 where the state is one number a row.

    Returns
    -------
    pyarrow.Schema
        Its metadata has one key, ``shardemb``: a JSON object with the table's name, shape and description.

    Raises
    ------
    ValueError
        `columns` are not different names of state columns.

    Examples
    --------
    >>> from types import SimpleNamespace as Source
    >>> source = Source(name="tokens", num_embeddings=5, embedding_dim=2, columns={"sum": 1}, keys=None,
    ...     describe=dict)
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
    types["embedding"] = pa.list_(item, source.embedding_dim)
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
    """Stream rows as Arrow record batches; nothing is read before the first is asked for.

    Parameters
    ----------
    source, columns : RowSource, sequence of str
        The table, and the state columns to stream after its vectors.
    rows : (int, int), optional
        Half-open range of row ids; all by default.

    Returns
    -------
    pyarrow.RecordBatchReader
        Non-empty batches, ids ascending. Each owns its memory; `MAX_READ_AHEAD` at most wait to be taken.
        Rows are as they are when their batch is read: no snapshot of a table that is being changed.

    Raises
    ------
    ValueError
        The columns or the range are not the table's. What reading raises comes out of the reader.

    Examples
    --------
    >>> from types import SimpleNamespace as Source
    >>> source = Source(
    ...     name="tokens", num_embeddings=5, embedding_dim=1, rows_per_shard=64, columns={}, keys=None, describe=dict,
    ...     read_rows=lambda start, stop, columns: [np.ones((stop - start, 1), np.float32)], release_pages=print,
    ...     threads=1, run=lambda tasks: [tasks[0]()])
    >>> for batch in to_arrow_batches(source, rows=(1, 4)):
    ...     batch.num_rows
    1 4
    3
    """
    chosen = Selection.of(source, columns, rows)
    batches = chosen.stream()
    return pa.RecordBatchReader.from_batches(chosen.schema, batches)


@dataclass(frozen=True)
class Selection:
    """Checked columns and rows; each `period` (a shard or several small ones) is cut into equal `batches`.

    Cuts are computed when needed: a list of them would grow with the table.
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
        fields = schema(source, columns)
        rows = (0, source.num_embeddings) if rows is None else rows
        # Only a tuple: range(2, 4) would unpack too, and mean something else.
        pair = isinstance(rows, tuple) and len(rows) == 2 and all(hasattr(row, "__index__") for row in rows)
        if not pair or not 0 <= rows[0] <= rows[1] <= source.num_embeddings:
            need = f"rows must be a tuple (start, stop), 0 <= start <= stop <= {source.num_embeddings}"
            msg = f"table {source.name!r}: {need}, got {rows!r}"
            raise ValueError(msg)
        width = source.embedding_dim + sum(source.columns[name] for name in columns)
        num_rows = int(rows[1] - rows[0])
        # Parts of at least four batches each are of about equal size.
        part_rows = num_rows // parts // 4 if parts > 1 else MAX_ROWS
        most = max(1, min(MAX_ROWS, MAX_BYTES // (4 * width), part_rows))
        period = max(1, most // source.rows_per_shard) * source.rows_per_shard
        return cls(source, fields, int(rows[0]), num_rows, period, -(-period // most))

    def __len__(self) -> int:
        last = self.start + self.num_rows - 1
        return self._batch_of(last) - self._batch_of(self.start) + 1 if self.num_rows else 0

    def read(self, index: int) -> pa.RecordBatch:
        first = self._batch_of(self.start) + index
        start = max(self._start_of(first), self.start)
        stop = min(self._start_of(first + 1), self.start + self.num_rows)
        row_keys = self.source.keys
        first_state = 2 if row_keys is None else 3
        arrays = self.source.read_rows(start, stop, self.schema.names[first_state:])
        self.source.release_pages(start, stop)
        ids = np.arange(start, stop, dtype=np.int64)
        columns = [pa.array(ids)]
        if row_keys is not None:
            with_key, keys = row_keys.read(start, stop)
            columns = [pa.array(ids[with_key]), keys]
            arrays = [array[with_key] for array in arrays]
        for array, kind in zip(arrays, self.schema.types[first_state - 1 :], strict=True):
            values = pa.array(array.reshape(-1))
            nested = not pa.types.is_float32(kind)
            columns.append(pa.FixedSizeListArray.from_arrays(values, type=kind) if nested else values)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def stream(self) -> Iterator[pa.RecordBatch]:
        """Read batches, several at a time."""
        ahead = min(self.source.threads, MAX_READ_AHEAD)
        for first in range(0, len(self), ahead):
            batches = self.source.run(
                [partial(self.read, k) for k in range(first, min(first + ahead, len(self)))]
            )
            batches = [batch for batch in batches if batch.num_rows]
            while batches:
                yield batches.pop(0)  # nothing here holds on to what the consumer has

    def _start_of(self, batch: int) -> int:
        periods, batch = divmod(batch, self.batches)
        return periods * self.period + batch * self.period // self.batches

    def _batch_of(self, row: int) -> int:
        periods, row = divmod(row, self.period)  # the inverse of _start_of, rounded down
        return periods * self.batches + ((row + 1) * self.batches - 1) // self.period
