"""A table for whoever consumes the vectors: a stream of Arrow record batches, or parquet.

How do the rows of a table of any size leave it, in memory that does not depend on the size?

1. Rows are cut into batches of at most `MAX_ROWS` rows and `MAX_BYTES` bytes. A batch lies within one
   row-shard, or consists of whole ones where they are small.
2. A batch is read into arrays of its own, which Arrow takes over, and the table's pages are given back.
3. A batch becomes one row group. Encoding is what takes the time: one file is encoded by one thread, while
   the next batch is read; parts are encoded by as many threads as there are workers.
4. All is written and synced under a temporary name in the target's folder, then renamed. Whatever goes wrong
   before that, Ctrl-C included, leaves the target as it was.

No column is nullable, and values keep their bits. BYTE_STREAM_SPLIT puts similar bytes together, so that zstd
finds the signs and exponents of vectors; mantissas do not compress, and a dictionary would be as large as the
values. Statistics help queries on ``id`` alone; the page index leads to a single row.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from shardemb import files
from shardemb.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from shardemb.arrays import Float32Array
    from shardemb.progress import Advance, Progress

MAX_ROWS = 65_536
"""Most rows of a batch, and so of a row group."""

MAX_BYTES = 32 * 2**20
"""Most bytes of values in a batch, unless a single row has more."""

MAX_READ_AHEAD = 4
"""Batches that a stream reads side by side: keeps an NVMe disk busy, and bounds memory on large machines."""


class Run(Protocol):
    """Runs tasks side by side, see `scheduler.run`: none of them is still running when it returns or raises."""

    def __call__(
        self, tasks: Sequence[Callable[[], Any]], *, stop: threading.Event | None = None
    ) -> list[Any]:
        """Run `tasks` and return their results in order."""


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
    keys: RowKeys | None

    @property
    def columns(self) -> Mapping[str, int]:
        """The state columns and their widths in values a row."""

    def read_rows(self, start: int, stop: int, columns: Sequence[str]) -> list[Float32Array]:
        """Read the vectors of rows ``[start, stop)``, then each state column; safe from several threads.

        The arrays have shape (stop - start, width) and are the caller's own.
        """

    def give_back(self, start: int, stop: int) -> None:
        """Let the pages of rows ``[start, stop)`` leave memory. A hint."""

    def describe(self) -> Mapping[str, object]:
        """Give a few facts about the table, as JSON has them."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote: file or folder, symbolic links followed, and its files in the order of rows."""

    path: Path
    files: tuple[Path, ...]
    num_rows: int
    nbytes: int


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
    run: Run,
    workers: int,
) -> pa.RecordBatchReader:
    """Stream rows as Arrow record batches; nothing is read before the first is asked for.

    Parameters
    ----------
    source, columns : RowSource, sequence of str
        The table, and the state columns to stream after its vectors.
    rows : (int, int), optional
        Half-open range of row ids; all by default.
    run, workers : callable, int
        Runs the tasks; how many of them really run side by side.

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
    ...     read_rows=lambda start, stop, columns: [np.ones((stop - start, 1), np.float32)], give_back=print)
    >>> for batch in to_arrow_batches(source, rows=(1, 4), run=lambda tasks: [tasks[0]()], workers=1):
    ...     batch.num_rows
    1 4
    3
    """
    chosen = _Selection.of(source, columns, rows)
    batches = chosen.stream(run, min(workers, MAX_READ_AHEAD))
    return pa.RecordBatchReader.from_batches(chosen.schema, batches)


def export_parquet(
    source: RowSource,
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] = (),
    rows: tuple[int, int] | None = None,
    parts: int | None = None,
    progress: Progress = None,
    run: Run,
    workers: int,
) -> ExportReport:
    """Write rows to a parquet file, or to a folder of them.

    Parameters
    ----------
    source, columns, rows, run, workers
        As for `to_arrow_batches`. An empty range writes the schema alone.
    path : path-like
        The file; one that exists is replaced, in one instant. With `parts`, the folder: new or empty, because
        one with content cannot be replaced in one instant. The folder above it must exist.
    parts : int, optional
        Write exactly so many files, ``part-00000.parquet`` and on, of about equal size, several at a time.
    progress : bool or callable, optional
        As for `track`. Steps are rows, reported by the row group from the thread that wrote it.

    Returns
    -------
    ExportReport
        What was written. (A process that is killed leaves ``.shardemb-*.tmp`` beside the target.)

    Raises
    ------
    ValueError
        The columns, the range or the number of parts make no sense.
    FileNotFoundError, FileExistsError
        The target's folder is missing, or what has the target's name is not to be replaced.
    DiskFullError
        The disk has no room.

    Examples
    --------
    >>> import tempfile
    >>> from types import SimpleNamespace as Source
    >>> source = Source(
    ...     name="tokens", num_embeddings=5, embedding_dim=1, rows_per_shard=64, columns={}, keys=None, describe=dict)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = export_parquet(source, f"{folder}/nothing.parquet", rows=(2, 2), run=list, workers=1)
    >>> report.num_rows, report.path.name
    (0, 'nothing.parquet')
    """
    if parts is not None and not 1 <= parts <= 100_000:  # names have five digits, so sorting them sorts rows
        msg = f"table {source.name!r}: parts must be 1 to 100000, or None for one file, got {parts}"
        raise ValueError(msg)
    chosen = _Selection.of(source, columns, rows, parts=parts or 1)
    target = _checked_target(path, source.name, folder=parts is not None)
    names = [] if parts is None else [f"part-{k:05d}.parquet" for k in range(parts)]
    # Not made from the target's name, which may be as long as a name can be.
    temporary = target.with_name(f".shardemb-{secrets.token_hex(8)}.tmp")
    try:
        with track(chosen.num_rows, f"export {source.name}", progress=progress) as advance:
            if parts is None:
                _write_file(chosen, temporary, run, advance)
            else:
                _write_parts(chosen, [temporary / name for name in names], run, advance, workers)
            files.rename(temporary, target)
            files.sync_directory(target.parent)
    except BaseException:
        files.remove_tree(temporary)
        raise
    written = tuple(target / name for name in names) or (target,)
    num_rows = chosen.num_rows
    if source.keys is not None:
        num_rows = sum(parquet.read_metadata(file).num_rows for file in written)
    return ExportReport(target, written, num_rows, sum(file.stat().st_size for file in written))


@dataclass(frozen=True)
class _Selection:
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
    ) -> _Selection:
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
        self.source.give_back(start, stop)
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

    def stream(self, run: Run, ahead: int) -> Iterator[pa.RecordBatch]:
        for first in range(0, len(self), ahead):
            batches = run([partial(self.read, k) for k in range(first, min(first + ahead, len(self)))])
            batches = [batch for batch in batches if batch.num_rows]
            while batches:
                yield batches.pop(0)  # nothing here holds on to what the consumer has

    def _start_of(self, batch: int) -> int:
        periods, batch = divmod(batch, self.batches)
        return periods * self.period + batch * self.period // self.batches

    def _batch_of(self, row: int) -> int:
        periods, row = divmod(row, self.period)  # the inverse of _start_of, rounded down
        return periods * self.batches + ((row + 1) * self.batches - 1) // self.period


def _write_file(chosen: _Selection, path: Path, run: Run, advance: Advance) -> None:
    with _parquet_file(path, chosen.schema, advance) as write:
        batch = chosen.read(0) if len(chosen) else None
        for following in range(1, len(chosen) + 1):
            tasks = [partial(write, batch)]
            if following < len(chosen):
                tasks.append(partial(chosen.read, following))
            batch = run(tasks)[-1]


def _write_parts(chosen: _Selection, paths: list[Path], run: Run, advance: Advance, workers: int) -> None:
    files.make_directory(paths[0].parent)
    stop = threading.Event()
    cuts = [len(chosen) * part // len(paths) for part in range(len(paths) + 1)]

    def write_every(first: int) -> None:
        for part in range(first, len(paths), workers):
            with _parquet_file(paths[part], chosen.schema, advance) as write:
                for index in range(cuts[part], cuts[part + 1]):
                    if stop.is_set():
                        return
                    write(chosen.read(index))

    run([partial(write_every, first) for first in range(min(workers, len(paths)))], stop=stop)
    files.sync_directory(paths[0].parent)


@contextlib.contextmanager
def _parquet_file(
    path: Path, columns: pa.Schema, advance: Advance
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    nested = {field.name: ".list.element" * pa.types.is_fixed_size_list(field.type) for field in columns}
    encodings = {name + suffix: "BYTE_STREAM_SPLIT" for name, suffix in nested.items()}
    if "key" in encodings:
        encodings["key"] = "PLAIN"

    def write(batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            writer.write_batch(batch, row_group_size=batch.num_rows)
            sink.begin_write_back()
        advance(batch.num_rows)

    with files.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        sink = _Sink(descriptor, path)
        with parquet.ParquetWriter(
            sink,
            columns,
            compression="zstd",
            use_dictionary=False,
            column_encoding=encodings | {"id": "DELTA_BINARY_PACKED"},
            write_statistics=["id"],
            write_page_index=True,
            sorting_columns=[parquet.SortingColumn(0)],
        ) as writer:
            yield write
        # Arrow's allocator would keep what the encoding took, 60 MB a thread.
        pa.default_memory_pool().release_unused()
        files.sync(descriptor, path)


class _Sink:
    """An open file, as Arrow writes to it."""

    closed = False

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path, self._position, self._begun = descriptor, path, 0, 0

    def write(self, data: bytes) -> None:
        files.write(self._descriptor, data, self._position, self._path)
        self._position += len(data)

    def begin_write_back(self) -> None:
        """Let the disk begin with what was written since the last time, beside the encoding of the next."""
        files.begin_write_back(self._descriptor, self._begun, self._position - self._begun)
        self._begun = self._position


def _checked_target(path: str | os.PathLike[str], table: str, *, folder: bool) -> Path:
    target = Path(path).resolve()
    what = f"table {table!r}: cannot export to {target}"
    if not target.parent.is_dir():
        msg = f"{what}: there is no folder {target.parent}; create it first"
        raise FileNotFoundError(msg)
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not (empty if folder else target.is_file()):
        need = "parts need a new or an empty folder" if folder else "that is a folder or no regular file"
        msg = f"{what}: {need}; choose another name, or remove what is there"
        raise FileExistsError(msg)
    return target
