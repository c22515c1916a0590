"""A table as parquet files.

How do the rows of a table of any size get out of it, in memory that does not depend on that size?

1. Rows are cut into batches of at most `arrow.MAX_ROWS` rows, `arrow.MAX_BYTES` bytes of values and as many of keys. A
   batch lies within one row-shard, or consists of whole ones if they are small.
2. A batch is read into arrays of its own, which Arrow takes over, and the page cache of these rows is released.
3. A batch becomes one row group. Encoding takes most of the time: one file is encoded by one thread, while the next
   batch is read; parts are encoded by as many threads as there are workers.
4. Everything is written and synced under a temporary name, then renamed: see ``targets.py``.

No column is nullable, and values keep their bits. By default they are PLAIN, which every reader knows.
BYTE_STREAM_SPLIT puts similar bytes together, so that zstd can compress the signs and exponents of vectors. Mantissas
do not compress, and a dictionary would be as large as the values. Statistics help queries only on ``id``; the page
index leads to a single row.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import pyarrow as pa
from pyarrow import parquet

from shardemb.base.progress import track
from shardemb.exports import targets
from shardemb.exports.arrow import RowSource, Selection
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from shardemb.base.progress import Advance, Progress

    NewFile = contextlib.AbstractContextManager[Callable[[pa.RecordBatch], None]]
    """A file to be made; yields a function that writes one row group."""

Encoding: TypeAlias = Literal["plain", "byte_stream_split"]
"""How the values of vectors and states are stored."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes
    ----------
    path : Path
        The file or folder, with symbolic links resolved.
    files : tuple of Path
        Its files, in the order of the rows.
    num_rows, nbytes : int
        Rows in these files, and the size of the files in bytes.
    """

    path: Path
    files: tuple[Path, ...]
    num_rows: int
    nbytes: int


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
    # File names have five digits, so that sorting the names sorts the rows.
    if parts is not None and not 1 <= parts <= 100_000:
        msg = f"table {source.name!r}: parts must be 1 to 100000, or None for one file, got {parts}"
        raise ValueError(msg)
    if encoding not in get_args(Encoding):
        msg = f'table {source.name!r}: encoding must be "plain" or "byte_stream_split", got {encoding!r}'
        raise ValueError(msg)
    target = targets.checked(path, source.name, folder=parts is not None)
    chosen = Selection.of(source, columns, rows, parts=parts or 1)
    names = [] if parts is None else [f"part-{k:05d}.parquet" for k in range(parts)]
    with (
        track(chosen.num_rows, f"export {source.name}", progress=progress) as advance,
        targets.staged(target, names) as temporary,
    ):
        new_file = partial(_parquet_file, columns=chosen.schema, encoding=encoding, advance=advance)
        if parts is None:
            _write_file(chosen, new_file(temporary))
        else:
            _write_parts(chosen, new_file, [temporary / name for name in names])
    written = tuple(target / name for name in names) or (target,)
    num_rows = chosen.num_rows
    if source.keys is not None:
        num_rows = sum(parquet.read_metadata(file).num_rows for file in written)
    return ExportReport(target, written, num_rows, sum(file.stat().st_size for file in written))


def _write_file(chosen: Selection, file: NewFile) -> None:
    with file as write:
        ranges = chosen.ranges()
        first = next(ranges, None)
        batch = None if first is None else chosen.read(*first)
        # One thread encodes a file, the slowest step. Meanwhile another reads the next batch.
        while batch is not None:
            following = next(ranges, None)
            reads = [] if following is None else [partial(chosen.read, *following)]
            done = chosen.source.run([partial(write, batch), *reads])
            batch = done[1] if reads else None


def _write_parts(chosen: Selection, new_file: Callable[[Path], NewFile], paths: list[Path]) -> None:
    stop, workers = threading.Event(), chosen.source.threads
    # Part k has the batches cuts[k] to cuts[k + 1]. Each worker writes every `workers`-th part, one after another.
    cuts = [len(chosen) * part // len(paths) for part in range(len(paths) + 1)]

    def write_every(first: int) -> None:
        for part in range(first, len(paths), workers):
            with new_file(paths[part]) as write:
                for start, end in chosen.ranges(cuts[part], cuts[part + 1]):
                    if stop.is_set():
                        return
                    write(chosen.read(start, end))

    chosen.source.run([partial(write_every, first) for first in range(min(workers, len(paths)))], stop=stop)
    files.sync_directory(paths[0].parent)


@contextlib.contextmanager
def _parquet_file(
    path: Path, columns: pa.Schema, encoding: Encoding, advance: Advance
) -> Iterator[Callable[[pa.RecordBatch], None]]:
    nested = {field.name: ".list.element" * pa.types.is_fixed_size_list(field.type) for field in columns}
    encodings = {name + suffix: encoding.upper() for name, suffix in nested.items()}
    if "key" in encodings:
        encodings["key"] = "PLAIN"

    def write(batch: pa.RecordBatch) -> None:
        if batch.num_rows:
            writer.write_batch(batch, row_group_size=batch.num_rows)
            sink.begin_write_back()
        advance(batch.num_rows)

    with files.opened(path, os.O_WRONLY | os.O_CREAT) as descriptor:
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
        # Arrow's allocator would keep the memory of the encoder, 60 MB a thread.
        pa.default_memory_pool().release_unused()
        files.sync(descriptor, path)


class _Sink:
    """An open file, with the methods that Arrow writes through."""

    closed = False

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path, self._position, self._begun = descriptor, path, 0, 0

    def write(self, data: bytes) -> None:
        files.write(self._descriptor, data, self._position, self._path)
        self._position += len(data)

    def begin_write_back(self) -> None:
        """Start to write back what came since the last call, while the next row group is encoded."""
        files.begin_write_back(self._descriptor, self._begun, self._position - self._begun)
        self._begun = self._position
