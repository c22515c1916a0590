"""From a source of vectors to a table: first the keys, then the rows, straight into the files of the new table.

::

    rows without keys, whose number is known      read once
    a source that can be read again               its keys, then, once their number is known, its rows
    a stream                                      once, its rows through a file without a name next to the store

Each way ends in `Store.create_table` with a function that returns consecutive rows. So the rows are written once, to
their place, at the disk's rate; memory holds a few blocks, and one bit a row; and a table is there as a whole or not at
all.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shardemb.base.progress import track
from shardemb.format import store_paths
from shardemb.imports import formats, text
from shardemb.imports.blocks import block_rows, refuse
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from shardemb.base.progress import Progress
    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.dtypes import DtypeLike
    from shardemb.imports.blocks import Block, KeyBlock, ReadOptions, VectorSource
    from shardemb.optim import Optimizer
    from shardemb.store.vocabulary import Vocabulary

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


def import_table(
    store: Any,  # noqa: ANN401 -- a Store, whose module is above this one
    source: object,
    format: str | None,
    wanted: ImportRequest,
    options: ReadOptions,
    progress: Progress,
) -> ImportReport:
    """Create a table from a source; see `Store.import_table`."""
    wanted.check()
    tokens = None if wanted.tokens is None else text.read_tokens(wanted.tokens, options)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(formats.open_source(source, format, options))
        keys, rows, count = None, (block.rows for block in opened.blocks()), opened.num_rows
        try:
            if tokens is not None or opened.key_type is not None:
                vocabulary = store.create_vocabulary(wanted.name, key_type=opened.key_type or "string")
                keys = _Keys(vocabulary, opened.name, wanted.duplicates)
            if keys is not None and (tokens is not None or opened.repeatable):
                keys.read(opened, tokens, progress)
                # A source is read once; what has given its keys is opened again for its rows.
                again = opened if tokens is not None else formats.open_source(source, format, options)
                rows = keys.rows_of(stack.enter_context(again).blocks())
            elif keys is not None or count is None:
                spool = stack.enter_context(_Spool(store_paths.private(store.path), opened.dim))
                rows, count = spool.through(opened, keys, progress), spool.count
            count = count if keys is None else keys.count
            if not count:
                raise refuse(opened.name, "", "there are no rows in it")
            consecutive = stack.enter_context(_Consecutive(rows, opened.dim, opened.name))
            store.create_table(
                wanted.name,
                num_embeddings=count if keys is None else None,
                vocabulary=None if keys is None else wanted.name,
                embedding_dim=opened.dim,
                initializer=consecutive,
                optimizer=wanted.optimizer,
                rows_per_shard=wanted.rows_per_shard,
                counters=wanted.counters,
                dtype=opened.dtype if wanted.dtype is None else wanted.dtype,
                progress=progress,
            )
        except BaseException:
            if keys is not None:
                store.drop_vocabulary(wanted.name)
            raise
        return ImportReport(
            wanted.name, opened.format, count, opened.dim, 0 if keys is None else keys.dropped
        )


class _Keys:
    """The keys of a source, entered into a vocabulary, and which rows come with a key that has come before.

    Attributes
    ----------
    count : int
        Different keys so far, which is the number of rows of the table.
    """

    def __init__(self, vocabulary: Vocabulary, source: str, duplicates: Duplicates) -> None:
        self._vocabulary, self._source, self._duplicates = vocabulary, source, duplicates
        self._seen = 0
        self._repeated: list[Int64Array] = []
        self.count = 0

    @property
    def dropped(self) -> int:
        """The number of rows whose key had come before."""
        return self._seen - self.count

    def read(self, source: VectorSource, tokens: Iterator[KeyBlock] | None, progress: Progress) -> None:
        """Enter the keys of a source, or those that are given for its rows."""
        blocks = source.key_blocks() if tokens is None else tokens
        with track(
            source.total, f"reading keys of {source.name}", unit=source.unit, progress=progress
        ) as advance:
            for keys, consumed in blocks:
                self.add(keys)
                advance(consumed)
        if tokens is not None and source.num_rows is not None and source.num_rows != self._seen:
            raise refuse(source.name, "", f"{source.num_rows} rows, but {self._seen} tokens for them")

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
    """A file without a name for the rows of a stream, until their number is known. A context manager."""

    def __init__(self, folder: Path, dim: int) -> None:
        self._path = folder / "(rows of a stream)"  # for error messages alone
        self._dim, self.count = dim, 0
        self._descriptor = files.open_unnamed(folder)

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        files.close(self._descriptor)

    def through(self, source: VectorSource, keys: _Keys | None, progress: Progress) -> Iterator[Float32Array]:
        """Take in all rows of a source, or those of its keys that are to be kept; return them."""
        with track(source.total, f"reading {source.name}", unit=source.unit, progress=progress) as advance:
            for block in source.blocks():
                rows = block.rows
                if keys is not None:
                    kept = keys.add(block.keys)
                    rows = rows if kept.size == len(rows) else rows[kept]
                files.write(self._descriptor, rows.reshape(-1).view(np.uint8).data, self._end, self._path)
                self.count += len(rows)
                advance(block.consumed)
        return self._rows()

    @property
    def _end(self) -> int:
        return self.count * 4 * self._dim

    def _rows(self) -> Iterator[Float32Array]:
        step = block_rows(self._dim)
        for start in range(0, self.count, step):
            stop = min(start + step, self.count)
            data = files.read_at(
                self._descriptor, (stop - start) * 4 * self._dim, start * 4 * self._dim, self._path
            )
            yield np.frombuffer(data, np.float32).reshape(-1, self._dim)


class _Consecutive:
    """What `Store.create_table` calls for consecutive ranges of rows. The next block is read while one is written."""

    def __init__(self, blocks: Iterator[Float32Array], dim: int, source: str) -> None:
        self._blocks, self._source = blocks, source
        self._rest = np.empty((0, dim), np.float32)
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="shardemb-import")
        self._next: Future[Float32Array | None] = self._ahead.submit(next, blocks, None)

    def __enter__(self) -> Callable[[int, int], Float32Array]:
        return self._read

    def __exit__(self, *_: object) -> None:
        self._ahead.shutdown(cancel_futures=True)

    def _read(self, start: int, stop: int) -> Float32Array:
        out = np.empty((stop - start, self._rest.shape[1]), np.float32)
        done = 0
        while done < len(out):
            if not len(self._rest):
                block = self._next.result()
                if block is None:
                    raise refuse(
                        self._source, f"row {start + done}", "it ends here, and had more rows before"
                    )
                self._rest, self._next = block, self._ahead.submit(next, self._blocks, None)
            count = min(len(self._rest), len(out) - done)
            out[done : done + count] = self._rest[:count]
            self._rest, done = self._rest[count:], done + count
        return out
