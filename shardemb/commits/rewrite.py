"""Rewrites a table into a new folder: with other rows, other shards, or another optimizer; or into several.

The rewritten table gets a new folder and a new uuid, and keeps its name and the stream of its initial values. To a
commit and to recovery it is a new table that replaces a dropped one. Nothing here changes the old folder. Blocks are
compared with their checksums before new checksums are computed, so that damage is not passed off as valid data.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base.progress import track
from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks
from shardemb.errors import FormatError
from shardemb.format import store_paths, zarr_metadata
from shardemb.format.spec import shard_rows_multiple
from shardemb.format.table_files import TableLocation
from shardemb.precision.records import converted
from shardemb.storage import checksums, files, folders, table_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.progress import Advance, Progress
    from shardemb.format.spec import TableSpec
    from shardemb.format.table_files import File

OPEN_SHARDS = 128
"""How many tables are written at the same time; with more, the old files are read again."""


# ---- another number of rows -----------------------------------------------------------------------------------


def resized(spec: TableSpec, num_embeddings: int) -> TableSpec:
    """Return the spec of a table with another number of rows."""
    padding = spec.padding_idx
    if padding is not None and padding >= num_embeddings:
        padding = None  # the row is dropped
    return replace(spec, uuid=str(uuid.uuid4()), num_embeddings=num_embeddings, padding_idx=padding)


def resize(old: TableLocation, new: TableLocation) -> None:
    """Make the folder of `new`, which has the rows of `old` but another number of them.

    Shards that keep all of their rows are not copied: they get a second name (a hard link). Nothing is durable yet.

    Raises
    ------
    FormatError
        A block that has to be copied is damaged. The new folder is removed.
    DiskFullError, OSError
        The disk is full, or fails. The new folder is removed.
    """
    spec, rows = new.spec, min(old.spec.num_embeddings, new.spec.num_embeddings)
    # Shards to link. If the table grows, its last one is among them: the new rows in it were never written.
    whole = old.spec.num_shards if rows == old.spec.num_embeddings else rows // spec.rows_per_shard
    table_folder.check_mappings(spec)
    try:
        table_folder.write_documents(new.directory, folders.new_documents(spec, old.directory))
        linked = {new.shard(number).path for number in range(whole)}
        for path, nbytes in new.expected_files():
            if path not in linked:
                files.create_sparse(path, nbytes)
        for number in range(whole):
            source, target = old.shard(number), new.shard(number)
            if not files.link(source.path, target.path):
                files.create_sparse(target.path, spec.shard_bytes)
                folders.copy_data(source.path, target.path, spec.shard_bytes)
        sums = whole * spec.shard_bytes // PAGE * 8
        folders.copy_data(old.checksums_path, new.checksums_path, sums)
        if whole < spec.num_shards and rows < old.spec.num_embeddings:  # the table shrinks within a shard
            cut = (rows - whole * spec.rows_per_shard) * spec.record_bytes
            _copy_checked(old, old.shard(whole), new.shard(whole), cut)
            checksums.write_file_sums(new, new.shard(whole))
        _copy_presence(old, new, rows)
        folders.carry(folders.foreign_of_table(old, new), share=True)
    except BaseException:
        files.remove_tree(new.directory)
        raise


def _copy_presence(old: TableLocation, new: TableLocation, rows: int) -> None:
    for number in range(min(old.spec.num_presence_chunks, new.spec.num_presence_chunks)):
        source = old.presence_chunk(number)
        target = new.presence_chunk(number)
        bits = min(8 * min(source.nbytes, target.nbytes), rows - target.rows[0])
        _copy_checked(old, source, target, -(-bits // 8))
        if bits % 8:
            _clear_after(target.path, bits)
        checksums.write_file_sums(new, target)


def _copy_checked(old: TableLocation, source: File, target: File, nbytes: int) -> None:
    """Copy the beginning of a file, after comparing it with its checksums. Writes no checksums of the copy."""
    with files.opened(source.path, os.O_RDONLY) as descriptor:
        for start, stop in folders.windows(descriptor, -(-nbytes // PAGE) * PAGE):
            _read_intact(old, source, descriptor, start, stop)
    folders.copy_data(source.path, target.path, nbytes)


def _clear_after(path: Path, bits: int) -> None:
    """Clear the bits of dropped rows in the byte that they share with the last rows that stay."""
    with files.opened(path, os.O_RDWR) as descriptor:
        last = files.read_at(descriptor, 1, bits // 8, path)[0]
        if last >> bits % 8:  # do not write to a hole for nothing
            files.write(descriptor, bytes([last & ((1 << bits % 8) - 1)]), bits // 8, path)


# ---- other shards, another optimizer --------------------------------------------------------------------------


def reshaped(
    store: Path, old: TableLocation, spec: TableSpec, *, keep_state: bool, progress: Progress
) -> Path:
    """Copy a table as `reshape` does, into a parked folder, where it waits for the next commit; return the folder."""
    table_folder.check_mappings(spec)
    new, parked = (
        TableLocation(spec, store_paths.rebuilt(store) / spec.uuid),
        store_paths.parked(store, spec.uuid),
    )
    folders.keep_rebuilt(store, spec.uuid)
    if files.is_directory(parked):  # the copy was completed before, but not committed
        files.make_directory(new.directory.parent)
        files.rename(parked, new.directory)
    with track(spec.num_embeddings, "resharding", progress=progress) as advance:
        reshape(old, new, keep_state=keep_state, advance=advance)
    files.make_directory(parked.parent)
    files.rename(new.directory, parked)
    return parked


def reshape(old: TableLocation, new: TableLocation, *, keep_state: bool, advance: Advance) -> None:
    """Copy the written rows of a table into the folder of `new`, shard by shard.

    After an interruption, another call continues with the first unfinished shard: a shard gets its name only when it,
    its bits and its checksums are durable. The folder as a whole is not durable when this returns.

    Parameters
    ----------
    old, new : TableLocation
        `old` must not change meanwhile.
    keep_state : bool
        Whether the state of the optimizer is copied too; otherwise it is freshly initialised.
    advance : callable
        Called with the number of rows that were completed.

    Raises
    ------
    FormatError
        A block is damaged.
    DiskFullError, OSError
        The disk is full, or fails. Completed shards stay.
    """
    begin(old, new)
    for number in range(new.spec.num_shards):
        file = new.shard(number)
        if files.size(file.path) is None:
            _fill(old, new, file, keep_state=keep_state)
        advance(file.rows[1] - file.rows[0])
    complete(new)


def begin(old: TableLocation, new: TableLocation) -> None:
    """Make all files except the shards. The table's document comes last: if it exists, the others are complete."""
    document = new.directory / zarr_metadata.DOCUMENT
    if files.size(document) is not None:
        return
    files.remove_tree(new.directory)
    documents = folders.new_documents(new.spec, old.directory)
    table_folder.write_documents(
        new.directory, {name: each for name, each in documents.items() if name != zarr_metadata.DOCUMENT}
    )
    for path, nbytes in new.expected_files():
        if path.parent.name != zarr_metadata.ROWS:
            files.create_sparse(path, nbytes)
    folders.carry(folders.foreign_of_table(old, new), share=True)
    files.sync_tree(new.directory)
    files.replace(document, documents[zarr_metadata.DOCUMENT])


def complete(new: TableLocation) -> None:
    """Write what is missing once all shards are there: the checksums of the presence bits."""
    for number in range(new.spec.num_presence_chunks):
        checksums.write_file_sums(new, new.presence_chunk(number))


def _fill(old: TableLocation, new: TableLocation, file: File, *, keep_state: bool) -> None:
    """Write a shard, the bits of its rows and its checksums."""
    begin, end = file.rows
    step = window_rows(new.spec)
    with ShardWriter(new, file) as shard:
        for start in range(begin, end, step):
            records, written = read_rows(old, start, min(start + step, end))
            if written.any():
                made = converted(old.spec, new.spec, records, written, keep_state=keep_state)
                shard.write(start, made, written)


def window_rows(spec: TableSpec, tables: int = 1) -> int:
    """Return how many rows of each of some tables are rewritten at once: some MiB, and whole blocks of each table."""
    multiple = shard_rows_multiple(spec.record_bytes)
    return max(1, folders.WINDOW_BYTES // (multiple * spec.record_bytes * tables)) * multiple


class ShardWriter:
    """Writes a shard of a new table, the bits of its rows and their checksums: a context manager.

    At its end all of that is durable, and the shard gets its name.

    Parameters
    ----------
    new : TableLocation
        What has all files but the shards.
    file : File
        The shard.
    """

    def __init__(self, new: TableLocation, file: File) -> None:
        self._new, self._file, self._staged = new, file, files.staged(file.path)
        self._multiple = shard_rows_multiple(new.spec.record_bytes)

    def __enter__(self) -> ShardWriter:
        files.remove(self._staged)
        files.create_sparse(self._staged, self._file.nbytes)
        with contextlib.ExitStack() as stack:
            self._target = stack.enter_context(files.opened(self._staged, os.O_WRONLY))
            self._sums = stack.enter_context(files.opened(self._new.checksums_path, os.O_WRONLY))
            self._stack = stack.pop_all()
        return self

    def write(self, start: int, records: NDArray[Any], written: NDArray[np.bool_]) -> None:
        """Write rows from `start` on, which begin a block. Those that are not `written` are zeros, and stay holes."""
        if not written.any():
            return
        spec = self._new.spec
        memory = np.zeros((-(-len(records) // self._multiple) * self._multiple, spec.width), spec.element)
        memory[: len(records)] = records
        blocks = memory.reshape(-1).view(np.uint64).reshape(-1, PAGE // 8)
        offset = (start - self._file.rows[0]) * spec.record_bytes
        filled = np.flatnonzero(blocks.any(axis=1))
        for begins, ends in file_blocks.runs(filled):
            first, last = int(filled[begins]), int(filled[ends - 1]) + 1
            stretch = memory.reshape(-1).view(np.uint8)[first * PAGE : last * PAGE]
            files.write(self._target, stretch.data, offset + first * PAGE, self._staged)
            sums = checksums.block_sums(stretch.data)
            at = (self._file.first + offset // PAGE + first) * 8
            files.write(self._sums, sums.data, at, self._new.checksums_path)
        if spec.has_presence:
            _write_presence(self._new, start, written)

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        with self._stack:
            if kind is not None:
                return
            files.sync(self._target, self._staged)
            files.drop_cached(self._target)
            files.sync_data(self._sums, self._new.checksums_path)
        files.publish(self._file.path)


def _write_presence(new: TableLocation, start: int, written: NDArray[np.bool_]) -> None:
    """Write the presence bits of rows from `start` on, which is a multiple of 8, durably."""
    bits, done = np.packbits(written, bitorder="little").data, 0
    for file, begin, end in new.presence_of((start, start + written.size)):
        with files.opened(file.path, os.O_WRONLY) as descriptor:
            files.write(descriptor, bits[done : done + end - begin], begin, file.path)
            files.sync_data(descriptor, file.path)
        done += end - begin


def read_rows(old: TableLocation, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Read the records of rows ``start:stop``, and whether each row was ever written."""
    spec = old.spec
    records = np.zeros((stop - start, spec.width), spec.element)
    for number in range(start // spec.rows_per_shard, (stop - 1) // spec.rows_per_shard + 1):
        file = old.shard(number)
        begin, end = max(start, file.rows[0]), min(stop, file.rows[1])
        first, last = ((row - file.rows[0]) * spec.record_bytes for row in (begin, end))
        low, high = first // PAGE * PAGE, -(-last // PAGE) * PAGE
        with files.opened(file.path, os.O_RDONLY) as descriptor:
            if next(files.data(descriptor, low, high), None) is not None:
                data = _read_intact(old, file, descriptor, low, high)[first - low : last - low]
                records[begin - start : end - start] = np.frombuffer(data, spec.element).reshape(
                    -1, spec.width
                )
    if not spec.has_presence:
        return records, np.logical_or.reduce(records.view(np.uint8) != 0, axis=1)
    return records, _written(old, start, stop)


def _written(old: TableLocation, start: int, stop: int) -> NDArray[np.bool_]:
    """Read the presence bits of rows ``start:stop``."""
    parts = []
    for file, begin, end in old.presence_of((start, stop)):
        low, high = begin // PAGE * PAGE, -(-end // PAGE) * PAGE
        with files.opened(file.path, os.O_RDONLY) as descriptor:
            data = _read_intact(old, file, descriptor, low, high)
        parts.append(data[begin - low : end - low])
    bits = np.unpackbits(np.frombuffer(b"".join(parts), np.uint8), bitorder="little")
    written: NDArray[np.bool_] = bits[start % 8 :][: stop - start] == 1
    return written


# ---- several tables, one for each partition of a store ----------------------------------------------------------


def spread(old: TableLocation, new: Sequence[TableLocation], advance: Advance) -> None:
    """Copy the written rows of a table into the folders of several. Those are not durable as a whole yet.

    Parameters
    ----------
    old : TableLocation
        Must not change meanwhile.
    new : sequence of TableLocation
        Their records are those of `old`, their shards have one size. Of more tables than rows, some have one row that
        no id leads to.
    advance : callable
        Called with the number of rows that were completed.

    Raises
    ------
    FormatError
        A block is damaged.
    DiskFullError, OSError
        The disk is full, or fails. Completed shards stay.
    """
    for each in new:
        _begin_checked(old, each)
    total = old.spec.num_embeddings
    for number in range(max(each.spec.num_shards for each in new)):
        missing = [part for part, each in enumerate(new) if _is_missing(each, number)]
        for first in range(0, len(missing), OPEN_SHARDS):
            _spread_shards(old, new, number, missing[first : first + OPEN_SHARDS])
        rows = len(new) * new[0].spec.rows_per_shard
        advance(min((number + 1) * rows, total) - min(number * rows, total))
    for each in new:
        complete(each)


def _spread_shards(
    old: TableLocation, new: Sequence[TableLocation], number: int, parts: Sequence[int]
) -> None:
    """Write one shard of some of the tables."""
    spec, total = new[0].spec, old.spec.num_embeddings
    begin, step = number * spec.rows_per_shard, window_rows(spec, min(len(new), OPEN_SHARDS))
    with contextlib.ExitStack() as stack:
        shards = {
            part: stack.enter_context(ShardWriter(new[part], new[part].shard(number))) for part in parts
        }
        end = max(new[part].shard(number).rows[1] for part in parts)
        for start in range(begin, end, step):
            stop = min(start + step, end)
            low, high = start * len(new), min(stop * len(new), total)
            if low >= high:
                break
            records, written = read_rows(old, low, high)
            for part, shard in shards.items():
                shard.write(start, records[part :: len(new)], written[part :: len(new)])


def gather(old: Sequence[TableLocation], new: TableLocation, advance: Advance) -> None:
    """Copy the written rows of several tables into the folder of one: the reverse of `spread`.

    Raises
    ------
    FormatError, DiskFullError, OSError
        As `spread`.
    """
    _begin_checked(old[0], new)
    step = window_rows(new.spec)
    for number in range(new.spec.num_shards):
        file = new.shard(number)
        begin, end = file.rows
        if _is_missing(new, number):
            with ShardWriter(new, file) as shard:
                for start in range(begin, end, step):
                    shard.write(start, *_interleaved(old, start, min(start + step, end)))
        advance(end - begin)
    complete(new)


def _interleaved(
    old: Sequence[TableLocation], start: int, stop: int
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Read the rows ``start:stop`` of the whole from the tables that have them."""
    spec, count = old[0].spec, len(old)
    records, written = np.zeros((stop - start, spec.width), spec.element), np.zeros(stop - start, np.bool_)
    for part, each in enumerate(old):
        first = (part - start) % count
        if start + first < stop:
            low = (start + first) // count
            some = slice(first, None, count)
            records[some], written[some] = read_rows(each, low, low + len(range(first, stop - start, count)))
    return records, written


def _begin_checked(old: TableLocation, new: TableLocation) -> None:
    table_folder.check_mappings(new.spec)
    begin(old, new)


def _is_missing(table: TableLocation, number: int) -> bool:
    return number < table.spec.num_shards and files.size(table.shard(number).path) is None


# ---- files of its own -----------------------------------------------------------------------------------------


def unshare(store: Path, tables: Sequence[TableLocation]) -> None:
    """Give a store files of its own in place of those that have a name elsewhere too, as after ``cp -al``.

    What is written to a file changes it under all of its names. If this is interrupted, it can be called again.

    Raises
    ------
    DiskFullError, OSError
        There is no space for the copies.
    """
    epoch = store_paths.epoch(store)
    if (files.size(epoch) is not None) and files.names(epoch)[0] > 1:
        files.remove(epoch)
    tags = files.entries(store_paths.tags(store))
    paths = [path for table in tables for path, _ in table.expected_files()] + [
        store_paths.undo(each) for each in tags
    ]
    paths = [path for path in paths if files.size(path) is not None]
    shared = [path for path in paths if files.names(path)[0] > 1]
    if not shared:
        return
    # A table that was resized shares files with what it was before, until a commit and a fold have removed that. Tags
    # share files with tables too.
    own = {*(table.directory for table in tables), *folders.tables(store)}
    own |= {*files.entries(store_paths.parked(store, "")), *files.entries(store_paths.rebuilt(store)), *tags}
    inside = Counter(files.names(path)[1] for folder in own for path in files.walk(folder))
    shared = [path for path in shared if files.names(path)[0] > inside[files.names(path)[1]]]
    total = sum(files.size(path) or 0 for path in shared)
    with track(
        total, "copying files that are part of another folder too", unit="byte", progress=None
    ) as advance:
        for path in shared:
            staged, nbytes = files.staged(path), files.size(path) or 0
            files.remove(staged)
            files.create_sparse(staged, nbytes)
            folders.copy_data(path, staged, nbytes)
            files.sync_file(staged)
            files.publish(path)
            advance(nbytes)


# ---- reading --------------------------------------------------------------------------------------------------


def _read_intact(table: TableLocation, file: File, descriptor: int, start: int, stop: int) -> bytearray:
    """Read whole blocks of a file and compare them with their checksums.

    Raises
    ------
    FormatError
        A block does not match.
    """
    data = files.read_at(descriptor, stop - start, start, file.path)
    if not checksums.are_intact(table, file, start, memoryview(data)):
        msg = f"{file.path} is damaged; store.verify() lists the rows, restore them from a copy of the store"
        raise FormatError(msg)
    return data
