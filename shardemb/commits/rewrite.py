"""Rewrites a table into a new folder: with other rows, other shards, or another optimizer.

The rewritten table gets a new folder and a new uuid, and keeps its name and the stream of its initial values. To a
commit and to recovery it is a new table that replaces a dropped one. Nothing here changes the old folder. Blocks are
compared with their checksums before new checksums are computed, so that damage is not passed off as valid data.
"""

from __future__ import annotations

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
    _begin(old, new)
    for number in range(new.spec.num_shards):
        file = new.shard(number)
        if files.size(file.path) is None:
            staged = files.staged(file.path)
            files.remove(staged)
            files.create_sparse(staged, file.nbytes)
            _fill(old, new, file, staged, keep_state=keep_state)
            files.publish(file.path)
        advance(file.rows[1] - file.rows[0])
    for number in range(new.spec.num_presence_chunks):
        checksums.write_file_sums(new, new.presence_chunk(number))


def _begin(old: TableLocation, new: TableLocation) -> None:
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


def _fill(old: TableLocation, new: TableLocation, file: File, staged: Path, *, keep_state: bool) -> None:
    """Write a shard under the name `staged`, the bits of its rows and its checksums, and make them durable."""
    spec, (begin, end) = new.spec, file.rows
    multiple = shard_rows_multiple(spec.record_bytes)
    step = max(1, folders.WINDOW_BYTES // (multiple * spec.record_bytes)) * multiple
    sums_path = new.checksums_path
    with (
        files.opened(staged, os.O_WRONLY) as target,
        files.opened(sums_path, os.O_WRONLY) as sums,
    ):
        for start in range(begin, end, step):
            stop = min(start + step, end)
            records, written = _read(old, start, stop)
            if not written.any():
                continue
            memory = np.zeros((-(-(stop - start) // multiple) * multiple, spec.width), spec.element)
            memory[: stop - start] = converted(old.spec, spec, records, written, keep_state=keep_state)
            blocks = memory.reshape(-1).view(np.uint64).reshape(-1, PAGE // 8)
            offset = (start - begin) * spec.record_bytes
            filled = np.flatnonzero(blocks.any(axis=1))  # blocks of zeros stay holes
            for begins, ends in file_blocks.runs(filled):
                first, last = int(filled[begins]), int(filled[ends - 1]) + 1
                stretch = memory.reshape(-1).view(np.uint8)[first * PAGE : last * PAGE]
                files.write(target, stretch.data, offset + first * PAGE, staged)
                found = checksums.block_sums(stretch.data)
                files.write(sums, found.data, (file.first + offset // PAGE + first) * 8, sums_path)
            if spec.has_presence:
                _write_presence(new, start, written)
        files.sync(target, staged)
        files.drop_cached(target)
        files.sync_data(sums, sums_path)


def _write_presence(new: TableLocation, start: int, written: NDArray[np.bool_]) -> None:
    """Write the presence bits of rows from `start` on, which is a multiple of 8, durably."""
    bits, done = np.packbits(written, bitorder="little").data, 0
    for file, begin, end in new.presence_of((start, start + written.size)):
        with files.opened(file.path, os.O_WRONLY) as descriptor:
            files.write(descriptor, bits[done : done + end - begin], begin, file.path)
            files.sync_data(descriptor, file.path)
        done += end - begin


def _read(old: TableLocation, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
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
