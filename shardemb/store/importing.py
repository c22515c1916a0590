"""From a source of vectors to a table: first the keys, then the rows, straight into the files of the new table.

::

    any rows at any time, without keys            read in the order of the shards, and continued if interrupted
    rows whose number is known                    read once
    keys that can be read without the rows        first, then the rows, once their number is known
    all else                                      read once, the rows through a file without a name next to the store

Each way ends in `Session.create_table` with a function that returns consecutive rows. So the rows are written once, to
their place, at the disk's rate; memory holds a few blocks, and 8 bytes for each row that is left out; and a table is
there as a whole or not at all.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from shardemb.base.progress import track
from shardemb.dtypes import Wanted
from shardemb.format import store_paths
from shardemb.imports import formats, text
from shardemb.imports.blocks import RowReader, ahead_of, block_rows, refuse
from shardemb.session.table_catalog import TableRequest
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from concurrent.futures import Future
    from contextlib import AbstractContextManager
    from pathlib import Path

    from shardemb.base.progress import Progress
    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.dtypes import DtypeLike
    from shardemb.imports.blocks import Block, ReadOptions, VectorSource
    from shardemb.optim import Optimizer
    from shardemb.session.session import Session
    from shardemb.vocabulary.key_rows import KeyRows

    ReadRows = Callable[[int, int], Float32Array]

T = TypeVar("T")

Duplicates = Literal["first", "error"]


@dataclass(frozen=True)
class ImportReport:
    """What was imported.

    Attributes
    ----------
    table, format : str
        Its name, and the format that the source was read as.
    num_rows, embedding_dim : int
        The shape of the table.
    duplicates : int
        Rows that were left out because their key had come before.
    """

    table: str
    format: str
    num_rows: int
    embedding_dim: int
    duplicates: int


@dataclass(frozen=True)
class ImportRequest:
    """The arguments of `Store.import_table` about the new table, none of them checked yet."""

    name: str
    tokens: object
    duplicates: Duplicates
    dtype: DtypeLike | None
    optimizer: Optimizer | None
    rows_per_shard: int | None
    counters: bool

    def check(self) -> None:
        """Raise `ValueError` for what no source could satisfy."""
        if self.duplicates not in ("first", "error"):
            msg = f'duplicates must be "first" or "error", got {self.duplicates!r}'
            raise ValueError(msg)

    def table(self, source: VectorSource, count: int, read: ReadRows, *, keyed: bool) -> TableRequest:
        """Return the table to create, with so many rows of a source."""
        return TableRequest(
            name=self.name,
            num_embeddings=None if keyed else count,
            embedding_dim=source.dim,
            vocabulary=self.name if keyed else None,
            counters=self.counters,
            initializer=read,
            optimizer=self.optimizer,
            rows_per_shard=self.rows_per_shard,
            padding_idx=None,
            precision=Wanted(source.dtype if self.dtype is None else self.dtype),
        )


def import_table(
    session: Session,
    source: object,
    format: str | None,
    wanted: ImportRequest,
    options: ReadOptions,
    progress: Progress,
) -> ImportReport:
    """Create a table from a source; see `Store.import_table`."""
    wanted.check()
    tokens = None if wanted.tokens is None else text.read_tokens(wanted.tokens, options.unicode_errors)
    with formats.open_source(source, format, options) as opened, contextlib.ExitStack() as stack:
        key_type = opened.key_type if tokens is None else "string"
        keys = None
        if key_type is not None:
            vocabulary = session.create_vocabulary(wanted.name, key_type, None, 0)
            stack.callback(session.drop_vocabulary, wanted.name)  # unless all goes well
            keys = _Keys(vocabulary, opened.name, wanted.duplicates)
        with _Spool(store_paths.private(session.runtime.path), opened.dim) as spool:
            rows: AbstractContextManager[ReadRows]
            if keys is None and isinstance(opened, RowReader):  # any rows at any time: it can be continued
                count, rows = opened.num_rows, _Ranges(opened)
                origin = formats.origin_of(source, opened.format, options)
            else:
                count, blocks = _counted(opened, keys, tokens, spool, progress)
                rows, origin = _Consecutive(blocks, opened.dim, opened.name), None
            if not count:
                raise refuse(opened.name, "", "there are no rows in it")
            with rows as read:
                session.create_table(
                    wanted.table(opened, count, read, keyed=keys is not None), progress, origin
                )
        stack.pop_all()
        dropped = 0 if keys is None else keys.dropped
        return ImportReport(wanted.name, opened.format, count, opened.dim, dropped)


def _counted(
    source: VectorSource,
    keys: _Keys | None,
    tokens: Iterator[Any] | None,
    spool: _Spool,
    progress: Progress,
) -> tuple[int, Iterator[Float32Array]]:
    """Return how many rows a source has for its table, and these rows; enter the keys."""
    if keys is None and source.num_rows is not None:
        return source.num_rows, (block.rows for block in source.blocks())
    if keys is not None and tokens is None:
        tokens = source.key_blocks()
    if keys is not None and tokens is not None:
        keys.read(source, tokens, progress)
        return keys.count, keys.rows_of(source.blocks())
    spool.take(source, keys, progress)
    return spool.count, spool.rows()


class _Keys:
    """The keys of a source, entered into a vocabulary, and which rows come with a key that has come before.

    Attributes
    ----------
    count : int
        Different keys so far, which is the number of rows of the table.
    """

    def __init__(self, vocabulary: KeyRows, source: str, duplicates: Duplicates) -> None:
        self._vocabulary, self._source, self._duplicates = vocabulary, source, duplicates
        self._seen = 0
        self._repeated: list[Int64Array] = []
        self.count = 0

    @property
    def dropped(self) -> int:
        """The number of rows whose key had come before."""
        return self._seen - self.count

    def read(self, source: VectorSource, blocks: Iterator[Any], progress: Progress) -> None:
        """Enter the keys of all rows of a source."""
        with track(0, f"reading keys of {source.name}", progress=progress) as advance:
            for keys in blocks:
                self.add(keys)
                advance(len(keys))
        if source.num_rows is not None and source.num_rows != self._seen:
            raise refuse(source.name, "", f"{source.num_rows:,} rows, and {self._seen:,} tokens for them")

    def add(self, keys: Any) -> Int64Array:  # noqa: ANN401 -- whatever a vocabulary takes
        """Enter the keys of the next rows; return which of these rows are to be kept."""
        rows = self._vocabulary.add(keys)
        # New keys get ascending rows, so the first row of a key is above all before it.
        before = np.maximum.accumulate(np.concatenate([[self.count - 1], rows]))[:-1]
        repeated = np.flatnonzero(rows <= before)
        if repeated.size and self._duplicates == "error":
            key = keys[int(repeated[0])]
            msg = f"the key {key} has come before; duplicates='first' would leave such rows out"
            raise refuse(self._source, f"row {self._seen + int(repeated[0])}", msg)
        if repeated.size:
            self._repeated.append(self._seen + repeated)
        self._seen += rows.size
        self.count += rows.size - repeated.size
        return np.flatnonzero(rows > before)

    def rows_of(self, blocks: Iterator[Block]) -> Iterator[Float32Array]:
        """Return the rows of blocks without those whose key has come before."""
        repeated = np.concatenate([np.empty(0, np.int64), *self._repeated])
        for block in blocks:
            first, last = np.searchsorted(repeated, [block.first, block.first + len(block.rows)])
            yield (
                np.delete(block.rows, repeated[first:last] - block.first, axis=0)
                if first < last
                else block.rows
            )


class _Spool:
    """A file without a name for the rows of a stream, until their number is known. A context manager.

    Attributes
    ----------
    count : int
        Rows in it.
    """

    def __init__(self, folder: Path, dim: int) -> None:
        self._folder, self._path = folder, folder / "(rows of a stream)"  # for error messages alone
        self._row_bytes, self.count = 4 * dim, 0
        self._descriptor: int | None = None

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            files.close(self._descriptor)

    def take(self, source: VectorSource, keys: _Keys | None, progress: Progress) -> None:
        """Take in all rows of a source, or those whose key comes for the first time."""
        self._descriptor = files.open_unnamed(self._folder)
        with track(source.total, f"reading {source.name}", unit=source.unit, progress=progress) as advance:
            for block in _ahead(source.blocks()):
                rows = block.rows
                if keys is not None:
                    kept = keys.add(block.keys)
                    rows = rows if kept.size == len(rows) else rows[kept]
                files.write(self._descriptor, rows.data, self.count * self._row_bytes, self._path)
                self.count += len(rows)
                advance(block.consumed)

    def rows(self) -> Iterator[Float32Array]:
        """Read the rows again."""
        assert self._descriptor is not None
        step = block_rows(self._row_bytes // 4)
        for start in range(0, self.count, step):
            nbytes = min(step, self.count - start) * self._row_bytes
            data = files.read_at(self._descriptor, nbytes, start * self._row_bytes, self._path)
            yield np.frombuffer(data, np.float32).reshape(-1, self._row_bytes // 4)


class _Ranges:
    """What `Store.create_table` calls for ranges of rows of a source that has any at any time; a context manager.

    The next range is read while the caller uses one.
    """

    def __init__(self, source: RowReader) -> None:
        self._source = source
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shardemb-import")
        self._ahead: tuple[int, int, Future[Float32Array]] | None = None

    def __enter__(self) -> ReadRows:
        return self._read

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _read(self, start: int, stop: int) -> Float32Array:
        ahead, last = self._ahead, min(2 * stop - start, self._source.num_rows)
        known = ahead is not None and ahead[:2] == (start, stop)
        rows = ahead[2].result() if ahead is not None and known else self._source.read(start, stop)
        self._ahead = stop, last, self._pool.submit(self._source.read, stop, last)
        return rows


class _Consecutive:
    """What `Store.create_table` calls for consecutive ranges of rows; a context manager."""

    def __init__(self, blocks: Iterator[Float32Array], dim: int, source: str) -> None:
        self._blocks, self._source = _ahead(blocks), source
        self._rest = np.empty((0, dim), np.float32)

    def __enter__(self) -> ReadRows:
        return self._read

    def __exit__(self, *_: object) -> None:
        self._blocks.close()

    def _read(self, start: int, stop: int) -> Float32Array:
        out = np.empty((stop - start, self._rest.shape[1]), np.float32)
        done = 0
        while done < len(out):
            while not len(self._rest):
                block = next(self._blocks, None)
                if block is None:
                    problem = "it ends here, and had more rows before"
                    raise refuse(self._source, f"row {start + done}", problem)
                self._rest = block
            count = min(len(self._rest), len(out) - done)
            out[done : done + count] = self._rest[:count]
            self._rest, done = self._rest[count:], done + count
        return out


def _ahead(items: Iterator[T]) -> Generator[T]:
    """Iterate, and make the next item in another thread while the caller uses one."""
    tasks = repeat(partial(next, items, None))
    with (
        ThreadPoolExecutor(1, thread_name_prefix="shardemb-import") as pool,
        contextlib.closing(ahead_of(pool, tasks, 2)) as made,
    ):
        for item in made:
            if item is None:
                return
            yield item
