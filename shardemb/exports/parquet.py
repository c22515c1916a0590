"""A table as parquet files.

How do the rows of a table of any size get out of it, in memory that does not depend on that size?

1. Rows are cut into batches of at most `arrow.MAX_ROWS` rows, `arrow.MAX_BYTES` bytes of values and as many of keys. A
   batch lies within one row-shard, or consists of whole ones if they are small.
2. A batch is read into arrays of its own, which Arrow takes over, and the page cache of these rows is released.
3. A batch becomes one row group. Encoding takes most of the time: one file is encoded by one thread, while the next
   batch is read; parts are encoded by as many threads as there are workers.
4. Everything is written and synced under a temporary name, then renamed: see ``targets.py``. Where there are no
renames,
   a manifest is written last: see ``remote.py``.

No column is nullable, and values keep their bits. By default they are PLAIN, which every reader knows.
BYTE_STREAM_SPLIT puts similar bytes together, so that zstd can compress the signs and exponents of vectors. Mantissas
do not compress, and a dictionary would be as large as the values. Statistics help queries only on ``id``; the page
index leads to a single row.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from shardemb.base.paths import local_path
from shardemb.base.progress import track
from shardemb.exports import arrow, remote, targets
from shardemb.exports.arrow import Selection
from shardemb.exports.selection import Query, RowSet
from shardemb.exports.targets import ExportReport
from shardemb.format.documents import checksum
from shardemb.storage import files

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.progress import Advance, Progress
    from shardemb.exports.remote import Parts
    from shardemb.exports.selection import RowSource

    Write = Callable[[pa.RecordBatch], None]

Encoding: TypeAlias = Literal["plain", "byte_stream_split"]
"""How the values of vectors and states are stored."""

PartitionBy: TypeAlias = 'Literal["shard"] | tuple[Literal["hash"], int] | None'
"""What the folders of a partitioned export are made by."""

BUFFERED_BYTES = 256 * 2**20
"""How many bytes of values wait, over all buckets, until they are enough for a row group."""

_FNV_BASIS, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)


@dataclass(frozen=True)
class Layout:
    """How rows are spread over files.

    Attributes
    ----------
    parts : int, optional
        So many files of about equal size, in a folder.
    partition_by : {"shard", ("hash", n)}, optional
        A folder for each row-shard, or for each of n buckets of keys.
    resume : bool
        Continue an interrupted export, and leave what is complete if this one is interrupted.
    encoding : {"plain", "byte_stream_split"}
        How values are stored.
    """

    parts: int | None = None
    partition_by: PartitionBy = None
    resume: bool = False
    encoding: Encoding = "plain"

    def check(self, table: str) -> None:
        """Raise `ValueError` for what cannot be."""
        # File names have five digits, so that sorting the names sorts the rows.
        if self.parts is not None and not 1 <= self.parts <= 100_000:
            msg = f"table {table!r}: parts must be 1 to 100000, or None for one file, got {self.parts}"
            raise ValueError(msg)
        if self.encoding not in get_args(Encoding):
            msg = f'table {table!r}: encoding must be "plain" or "byte_stream_split", got {self.encoding!r}'
            raise ValueError(msg)
        if self.partition_by not in (None, "shard") and not self.buckets:
            need = f'partition_by must be "shard" or ("hash", n) with n from 1 to 1000, got {self.partition_by!r}'
            msg = f"table {table!r}: {need}"
            raise ValueError(msg)
        if self.partition_by is not None and self.parts is not None:
            msg = f"table {table!r}: partition_by makes the files, so leave parts out, got {self.parts}"
            raise ValueError(msg)
        if self.resume and (self.buckets or not (self.parts or self.partition_by)):
            msg = (
                f"table {table!r}: what can be continued are parts that are written one after the other: pass parts=n "
                f'or partition_by="shard"'
            )
            raise ValueError(msg)

    @property
    def buckets(self) -> int:
        """How many buckets there are; 0 without."""
        by = self.partition_by
        if not (isinstance(by, tuple) and len(by) == 2 and by[0] == "hash" and hasattr(by[1], "__index__")):
            return 0
        return int(by[1]) if 1 <= by[1] <= 1000 else 0


@dataclass(frozen=True)
class _Part:
    """A file, and the batches that it has."""

    name: str
    chosen: Selection
    first: int
    last: int

    @property
    def ranges(self) -> Iterator[tuple[int, int]]:
        return self.chosen.ranges(self.first, self.last)


def export_parquet(
    source: RowSource,
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] = (),
    rows: tuple[int, int] | None = None,
    parts: int | None = None,
    encoding: Encoding = "plain",
    progress: Progress = None,
) -> ExportReport:
    """Write rows to a parquet file, or to a folder of them.

    Parameters
    ----------
    source, columns, rows
        As for `to_arrow_batches`. An empty range writes only the schema.
    path : path-like
        The file, or with `parts` the folder. What an earlier export has left there (any ``part-00000.parquet`` and so
        on) is replaced atomically; a folder with anything else in it is refused. An empty folder may be a mount point,
        and hold ``lost+found``; then its files appear one by one once all are written, the first one last. The folder
        above it must exist.
    parts : int, optional
        Write exactly this many files, ``part-00000.parquet`` and so on, of about equal size, several at a time.
    encoding : {"plain", "byte_stream_split"}
        How values are stored. Every reader knows the first one. The second one makes files of vectors about a tenth
        smaller; some readers refuse it.
    progress : bool or callable, optional
        As for `track`, in rows: reported for each row group, from the thread that wrote it.

    Returns
    -------
    ExportReport
        What was written. (A process that is killed leaves ``.shardemb-*.tmp`` next to the target, or in it if it is a
        folder that existed. The next export to the same target removes it.)

    Raises
    ------
    TypeError, ValueError
        The path is not a local one, or the columns, the range, the number of parts or the encoding is invalid.
    FileNotFoundError, FileExistsError
        The target's folder is missing, or what exists under the target's name must not be replaced.
    DiskFullError
        The disk is full.

    Examples
    --------
    >>> import tempfile
    >>> from types import SimpleNamespace as Source
    >>> source = Source(
    ...     name="tokens", num_embeddings=5, embedding_dim=1, rows_per_shard=64, columns={}, keys=None, describe=dict,
    ...     threads=1, run=list, form="float32")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = export_parquet(source, f"{folder}/nothing.parquet", rows=(2, 2))
    >>> report.num_rows, report.path.name
    (0, 'nothing.parquet')
    """
    layout = Layout(parts=parts, encoding=encoding)
    layout.check(source.name)
    target = targets.checked(path, source.name, folder=parts is not None)
    return write_parquet(source, target, Query(rows).of(source), layout, columns=columns, progress=progress)


def write_parquet(
    source: RowSource,
    path: object,
    rows: RowSet,
    layout: Layout,
    *,
    columns: Sequence[str] = (),
    progress: Progress = None,
) -> ExportReport:
    """Write rows to parquet files of a checked layout, below a local path or a URL; see `export_parquet`."""
    chosen = Selection.of(source, columns, rows, parts=layout.parts or 1)
    is_file = layout.parts is None and layout.partition_by is None and not remote.is_url(path)
    names = [f"bucket={bucket}/part-00000.parquet" for bucket in range(layout.buckets)]
    parts = [] if names or is_file else list(_parts(chosen, columns, layout))
    names = names or [part.name for part in parts]
    place: Any = path if remote.is_url(path) else targets.checked(path, source.name, folder=not is_file)
    with track(chosen.num_rows, f"export {source.name}", progress=progress) as advance:
        new_file = partial(_parquet_file, columns=chosen.schema, encoding=layout.encoding, advance=advance)
        if is_file:
            return _write_file(chosen, place, new_file)
        with _destination(place, names, chosen, layout) as destination:
            if layout.buckets:
                _write_buckets(chosen, names, new_file, destination)
            else:
                _write_parts(parts, new_file, destination, advance)
        report = destination.report(place, names)
    if remote.is_url(path):
        return report
    # They were reported where they were written.
    return ExportReport.of([place / name for name in names], report.num_rows, place)


def _parts(chosen: Selection, columns: Sequence[str], layout: Layout) -> Iterator[_Part]:
    """Yield the parts of a layout, ascending."""
    if layout.partition_by is None:
        count = layout.parts or 1
        # Part k has the batches cuts[k] to cuts[k + 1].
        cuts = [len(chosen) * part // count for part in range(count + 1)]
        for part in range(count):
            yield _Part(f"part-{part:05d}.parquet", chosen, cuts[part], cuts[part + 1])
        return
    source = chosen.source
    start, stop = chosen.rows.span
    for shard in range(start // source.rows_per_shard, -(-stop // source.rows_per_shard)):
        rows = chosen.rows & RowSet.of_range(
            shard * source.rows_per_shard, (shard + 1) * source.rows_per_shard
        )
        if rows.num_rows:
            some = Selection.of(source, columns, rows)
            yield _Part(f"shard={shard}/part-00000.parquet", some, 0, len(some))
    if not chosen.num_rows:
        yield _Part("part-00000.parquet", chosen, 0, 0)


def _facts(chosen: Selection, layout: Layout) -> dict[str, object]:
    """Return what determines the bytes of the parts, as JSON values."""
    rows = np.concatenate([chosen.rows.starts, chosen.rows.stops])
    return {
        "table": chosen.source.name,
        "uuid": chosen.source.describe()["uuid"],
        "commit": chosen.source.commit,
        "selection": f"{checksum(rows.tobytes()):016x}",
        "layout": str([layout.parts, layout.partition_by, layout.encoding, *chosen.schema.names]),
    }


@contextlib.contextmanager
def _destination(place: Any, names: Sequence[str], chosen: Selection, layout: Layout) -> Iterator[Parts]:  # noqa: ANN401
    """Yield where parts are written, and publish them at the end of the block."""
    if not (layout.resume or remote.is_url(place)):
        with targets.staged(place, names) as temporary:
            local = remote.LocalFolder(temporary)
            yield remote.Parts(local)
            local.sync()
        return
    at_url = remote.is_url(place)
    if not at_url:
        files.make_directory(place)
    folder = remote.folder_at(place, chosen.source.name) if at_url else remote.LocalFolder(place)
    with remote.parts_in_place(folder, _facts(chosen, layout), resume=layout.resume) as parts:
        yield parts


def _write_file(chosen: Selection, target: Path, new_file: Callable[[Any], Any]) -> ExportReport:
    with (
        targets.staged(target, []) as temporary,
        targets.new_file(temporary) as sink,
        new_file(sink) as write,
    ):
        num_rows = 0
        ranges = chosen.ranges()
        first = next(ranges, None)
        batch = None if first is None else chosen.read(*first)
        # One thread encodes a file, the slowest step. Meanwhile another reads the next batch.
        while batch is not None:
            num_rows += batch.num_rows
            following = next(ranges, None)
            reads = [] if following is None else [partial(chosen.read, *following)]
            done = chosen.source.run([partial(write, batch), *reads])
            batch = done[1] if reads else None
    return ExportReport.of([target], num_rows)


def _write_parts(
    parts: Sequence[_Part], new_file: Callable[[Any], Any], destination: Parts, advance: Advance
) -> None:
    source = parts[0].chosen.source if parts else None
    stop = threading.Event()

    def write_part(part: _Part) -> None:
        if part.name in destination.complete:
            advance(sum(last - first for first, last in part.ranges))
            return
        num_rows = 0
        with destination.folder.sink(part.name) as sink:
            with new_file(sink) as write:
                for first, last in part.ranges:
                    if stop.is_set():
                        return
                    batch = part.chosen.read(first, last)
                    write(batch)
                    num_rows += batch.num_rows
            nbytes = sink.tell()
        destination.record(part.name, num_rows, nbytes)

    def write_every(first: int, workers: int) -> None:
        for part in parts[first::workers]:
            if stop.is_set():
                return
            write_part(part)

    if source is not None:
        workers = min(source.threads, len(parts))
        source.run([partial(write_every, first, workers) for first in range(workers)], stop=stop)


@dataclass
class _Bucket:
    """A file with the rows of one bucket, and those that wait to be written to it."""

    write: Write
    sink: Any
    batches: list[pa.RecordBatch] = field(default_factory=list)
    rows: int = 0
    waiting: int = 0
    nbytes: int = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self.batches.append(batch)
        self.rows, self.waiting = self.rows + batch.num_rows, self.waiting + batch.num_rows
        self.nbytes += batch.nbytes

    def flush(self) -> None:
        """Write what waits as one row group."""
        if self.batches:
            self.write(pa.Table.from_batches(self.batches).combine_chunks().to_batches()[0])
        self.batches, self.waiting, self.nbytes = [], 0, 0

    @property
    def is_full(self) -> bool:
        return self.waiting >= arrow.MAX_ROWS or self.nbytes >= arrow.MAX_BYTES


def _write_buckets(
    chosen: Selection, names: Sequence[str], new_file: Callable[[Any], Any], destination: Parts
) -> None:
    with contextlib.ExitStack() as sinks:
        with contextlib.ExitStack() as writers:
            buckets = []
            for name in names:
                sink = sinks.enter_context(destination.folder.sink(name))
                buckets.append(_Bucket(writers.enter_context(new_file(sink)), sink))
            for batch in chosen.stream():
                _distribute(batch, buckets)
                crowded = sum(bucket.nbytes for bucket in buckets) > BUFFERED_BYTES
                chosen.source.run([bucket.flush for bucket in buckets if bucket.is_full or crowded])
            chosen.source.run([bucket.flush for bucket in buckets])
        for name, bucket in zip(names, buckets, strict=True):
            destination.record(name, bucket.rows, bucket.sink.tell())


def _distribute(batch: pa.RecordBatch, buckets: Sequence[_Bucket]) -> None:
    """Give each bucket its rows of a batch, in their order."""
    which = hash_keys(batch.column("key" if "key" in batch.schema.names else "id")) % np.uint64(len(buckets))
    order = np.argsort(which, kind="stable")
    by_bucket = batch.take(pa.array(order))
    edges = np.searchsorted(which[order], np.arange(len(buckets) + 1)).tolist()
    for bucket, first, last in zip(buckets, edges, edges[1:], strict=False):
        if first < last:
            bucket.add(by_bucket.slice(first, last - first))


@contextlib.contextmanager
def removed_keys(table: str, path: object, suffixes: Sequence[str], keys: pa.Array) -> Iterator[Path | str]:
    """Write keys that are gone beside an export, which runs in the block; yield where they will be.

    ``changes.parquet`` and a folder ``changes`` get ``changes.removed.parquet``, with one column, ``key``. If the block
    raises, no file of that name has changed, but at a URL: there it comes first, because ``_SUCCESS`` of the rows says
    that all is there.

    Raises
    ------
    ValueError
        A URL has no folder above its own.
    OSError
        As for other exports.
    """
    content = pa.table({"key": keys})
    if remote.is_url(path):
        above, name = remote.parent_of(str(path), table)
        folder, name = remote.folder_at(above, table), _removed_name(name, suffixes)
        with folder.sink(name) as stream:
            parquet.write_table(content, stream)
        yield folder.place(name)
        return
    rows = local_path(path, f"table {table!r}: the target of an export").resolve()
    target = targets.checked(rows.with_name(_removed_name(rows.name, suffixes)), table, folder=False)
    with targets.staged(target, []) as temporary:
        with targets.new_file(temporary) as sink:
            parquet.write_table(content, sink)
        yield target


def _removed_name(name: str, suffixes: Sequence[str]) -> str:
    stem = next((name.removesuffix(each) for each in suffixes if name.endswith(each)), name)
    return f"{stem}.removed.parquet"


def hash_keys(keys: pa.Array) -> NDArray[np.uint64]:
    """Return the 64-bit FNV-1a hash of each key: of the bytes of a string, or the 8 bytes of a little-endian integer.

    Examples
    --------
    >>> [hex(each) for each in hash_keys(pa.array([b"", b"foobar"]))]
    ['0xcbf29ce484222325', '0x85944171f73967e8']
    """
    if pa.types.is_integer(keys.type):
        data = np.ascontiguousarray(keys.to_numpy(), np.int64).view(np.uint8)
        bounds = np.arange(0, data.size + 1, 8)
    else:
        wide = keys.cast(pa.large_binary())
        bounds = np.frombuffer(wide.buffers()[1], np.int64)[wide.offset : wide.offset + len(wide) + 1]
        data = np.frombuffer(wide.buffers()[2] or b"", np.uint8)
    lengths = np.diff(bounds)
    order = np.argsort(-lengths, kind="stable")
    begins, lengths = bounds[:-1][order], lengths[order]
    hashes = np.full(lengths.size, _FNV_BASIS)
    # Byte by byte of all keys at once; those that have ended are at the back.
    for position in range(int(lengths[0]) if lengths.size else 0):
        going = int(np.searchsorted(-lengths, -position, side="left"))
        hashes[:going] = (hashes[:going] ^ data[begins[:going] + position]) * _FNV_PRIME
    found = np.empty_like(hashes)
    found[order] = hashes
    return found


@contextlib.contextmanager
def _parquet_file(sink: Any, columns: pa.Schema, encoding: Encoding, advance: Advance) -> Iterator[Write]:  # noqa: ANN401
    """Make a parquet file of what is written to an open file; yield a function that writes one row group."""
    nested = {field.name: ".list.element" * pa.types.is_fixed_size_list(field.type) for field in columns}
    encodings = {name + suffix: encoding.upper() for name, suffix in nested.items()}
    if "key" in encodings:
        encodings["key"] = "PLAIN"

    def write(batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            writer.write_batch(batch, row_group_size=batch.num_rows)
            if isinstance(sink, targets.Sink):
                sink.begin_write_back()
        advance(batch.num_rows)

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
    # Arrow's allocator would keep the memory of the encoder, 60 MB a thread.
    pa.default_memory_pool().release_unused()
