"""Rewrites a table into a new folder: with other rows, other shards, another optimizer, or in another place.

The rewritten table gets a new folder and a new uuid, and keeps its name and the stream of its initial values. To a
commit and to recovery it is a new table that replaces a dropped one. Nothing here changes the old folder. Blocks are
compared with their checksums before new checksums are computed, so that damage is not passed off as valid data.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import paths
from shardemb.base.progress import track
from shardemb.base.sizes import PAGE
from shardemb.commits import fills, fold
from shardemb.compute import file_blocks, scheduler
from shardemb.errors import FormatError, ShardEmbError, StoreExistsError
from shardemb.format import store_paths, zarr_metadata
from shardemb.format.manifest import Manifest
from shardemb.format.spec import shard_rows_multiple
from shardemb.format.table_files import TableLocation
from shardemb.precision.records import converted
from shardemb.storage import checksums, files, folders, table_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.progress import Advance, Progress
    from shardemb.commits.log_reader import Images, Replay
    from shardemb.format.manifest import TableEntry
    from shardemb.format.spec import TableSpec
    from shardemb.format.table_files import File

    _Pair = tuple[TableLocation, TableLocation]  # a table, and its copy

ROUNDS = 50
"""How often a copy begins another round because the store was folded meanwhile."""


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
    paths = [path for table in tables for path, _ in table.expected_files() if files.size(path) is not None]
    shared = [path for path in paths if files.names(path)[0] > 1]
    if not shared:
        return
    # A table that was resized shares files with what it was before, until a commit and a fold have removed that.
    own = {*(table.directory for table in tables), *folders.tables(store)}
    own |= {*files.entries(store_paths.parked(store, "")), *files.entries(store_paths.rebuilt(store))}
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


# ---- another place --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_place(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make the folder for a copy, and yield its path, from which links are resolved. An exception removes the folder.

    Raises
    ------
    StoreExistsError
        Something exists there.
    """
    target = paths.local_path(path, "the copy of a store").absolute()
    files.make_directory(target.parent)
    target = target.parent.resolve() / target.name
    try:
        files.make_new_directory(target)
    except FileExistsError as error:
        msg = f"{target} exists; a copy needs a new folder"
        raise StoreExistsError(msg) from error
    try:
        yield target
    except BaseException:
        files.remove_tree(target)
        raise


class StoreCopy:
    """A copy of a store in the making. Other programs may read the store meanwhile, and one may write to it.

    ::

        follow      copy the blocks whose checksums differ from those of the copy; then read the log
                copy the blocks of fills, which have no checksum but in the log; then read the log again
        again       if the store's base has changed meanwhile, which the caller finds out
        complete    lay the images of the log over the blocks, and make the copy a store

    The file of checksums of the copy always tells what the copy holds: blocks that were copied while they were written
    are *in flux*, and the next round copies them again, or the images replace what is new in them. A row that a fold
    has written since the base is in the log, so if the base stays the same, the copy is exactly one commit.

    What other programs have put into the folders of the store and its tables is copied too. Rows that were never
    written take no space.
    """

    def __init__(self, store: Path, path: Path, threads: int, progress: Progress) -> None:
        self._store, self._path, self._threads = store, path, threads
        self._progress = progress  # of the first round, which copies most
        # Names and uuids of the tables of which there are copies.
        self._made: list[tuple[str, str]] | None = None
        self._pairs: list[_Pair] = []
        self._replay: Replay | None = None
        self._rounds = 0

    def follow(self, base: Manifest, read_log: Callable[[], Replay]) -> None:
        """Make the copy what the store is by now. It is, if `base` is still the store's base at the end.

        Raises
        ------
        FormatError, OSError
            The store's files are damaged, or have moved meanwhile.
        DiskFullError
            There is no space for the copy.
        ShardEmbError
            This was called too often: the store changes faster than it can be copied.
        """
        self._rounds += 1
        if self._rounds > ROUNDS:
            msg = f"{self._store} is folded more often than it can be copied; call copy() in the process that writes it"
            raise ShardEmbError(msg)
        manifest, entries = base, None
        while entries != (entries := _entries(manifest)):  # the log may add or drop tables
            self._pairs = self._located(manifest, may_miss=base.clean)
            self._replay = None  # its memory
            foreign: list[folders.Carried] = []
            if entries != self._made:  # a round that failed half way does not count
                self._made = None
                foreign = self._start_over(base.dropped)
            self._copy(foreign)
            self._made = entries
            self._replay = read_log()
            while self._copy_fills(self._replay):
                # A fold may have written newer images over them meanwhile. By now, the log has those.
                self._replay = read_log()
            manifest = self._replay.manifest

    def complete(self) -> None:
        """Lay the images of the log over the copied blocks, and make the copy a store."""
        assert self._replay is not None
        images = [(new, self._replay.images(new.spec)) for _, new in self._pairs]
        for table, some in images:
            _give_up_in_flux(table, some)
        fold.write(images, self._threads)
        store, path, identity = self._store, self._path, str(uuid.uuid4())
        group = files.read(store / zarr_metadata.DOCUMENT)
        for name, document in zarr_metadata.store_documents(identity, group).items():
            files.write_new(path / name, document)
        files.write_new(store_paths.lock(path), b"")
        files.sync_tree(path)
        fresh = Manifest(
            uuid=identity,
            clean=True,
            commit=self._replay.manifest.commit,
            tables=self._replay.manifest.tables,
            vocabularies=self._replay.manifest.vocabularies,
        )
        files.replace(store_paths.manifest(path), fresh.to_bytes())
        files.sync_directory(path.parent)

    def _located(self, manifest: Manifest, *, may_miss: bool) -> list[_Pair]:
        """Return the tables of a manifest where they are now, each with its place in the copy."""
        directories, pairs = folders.locate(self._store, manifest.tables), []
        for entry in manifest.tables:
            directory = directories[entry.uuid]
            with table_folder.naming(entry.name, directory):
                spec = table_folder.spec_of(directory, may_miss=may_miss)
            pairs.append((TableLocation(spec, directory), TableLocation(spec, self._path / entry.name)))
        return pairs

    def _start_over(self, dropped: Iterable[TableEntry]) -> list[folders.Carried]:
        """Begin anew, with empty tables; return what other programs have added."""
        for path in files.entries(self._path):
            files.remove_tree(path)
        # The copy may be a folder within the store. A writer that was killed may have left dropped tables.
        own = {self._path, *(old.directory for old, _ in self._pairs)}
        own |= folders.holding(self._store, {each.uuid for each in dropped})
        root = folders.foreign_to_store(self._store, own)
        foreign = folders.walked(((each, self._path / each.name) for each in root), without=self._path)
        for old, new in self._pairs:
            foreign += folders.foreign_of_table(old, new)
        files.make_directory(store_paths.private(self._path))
        for old, new in self._pairs:
            table_folder.write_documents(new.directory, folders.new_documents(old.spec, old.directory))
            for path, nbytes in new.expected_files():
                files.create_sparse(path, nbytes)
        return foreign

    def _copy(self, foreign: Sequence[folders.Carried]) -> None:
        """Copy the blocks that are not in the copy yet, in several threads, and what other programs have added."""
        tasks = [
            (old, new, *both)
            for old, new in self._pairs
            for both in zip(old.files(), new.files(), strict=True)
        ]
        number, stop = min(2 * self._threads, len(tasks)), threading.Event()
        total = sum(source.nbytes for *_, source, _ in tasks) + sum(
            files.size(each) or 0 for each, _ in foreign
        )
        shown, self._progress = self._progress, None
        with track(total, "copying", unit="byte", progress=shown) as advance:

            def some(task: int) -> None:
                for old, new, source, target in tasks[task::number]:
                    if stop.is_set():
                        break
                    _copy_changed(old, new, source, target)
                    advance(source.nbytes)

            scheduler.run([partial(some, task) for task in range(number)], self._threads, stop)
            folders.carry(foreign, share=False, advance=advance)

    def _copy_fills(self, replay: Replay) -> bool:
        """Copy the blocks of committed fills that have no checksum in the copy yet; return whether there were any."""
        tasks = [
            partial(fills.copy, old, new, filled)
            for old, new in self._pairs
            for filled in replay.fills(old.spec)
        ]
        return any(scheduler.run(tasks, self._threads))


def _entries(manifest: Manifest) -> list[tuple[str, str]]:
    return [(entry.name, entry.uuid) for entry in manifest.tables]


def _copy_changed(old: TableLocation, new: TableLocation, source: File, target: File) -> None:
    """Copy the blocks of a file whose checksums are not those of the copy; mark those that do not match as in flux."""
    if files.size(source.path) is None:
        return  # all zeros
    count, sums = source.nbytes // PAGE, new.checksums_path
    known = checksums.read_sums(old.checksums_path, source.first, count)
    # What is damaged has no checksum that would tell that it changed.
    differs = known != checksums.read_sums(sums, source.first, count)
    blocks = np.flatnonzero(differs | checksums.is_damaged(known))
    if not blocks.size:
        return
    with (
        files.opened(source.path, os.O_RDONLY) as reading,
        files.opened(target.path, os.O_WRONLY) as writing,
        files.opened(sums, os.O_WRONLY) as noting,
    ):
        for first, last in file_blocks.runs(blocks):
            end = int(blocks[last - 1]) + 1
            for start in range(int(blocks[first]), end, folders.WINDOW_BYTES // PAGE):
                stop = min(start + folders.WINDOW_BYTES // PAGE, end)
                data = memoryview(files.read_at(reading, (stop - start) * PAGE, start * PAGE, source.path))
                files.write(writing, data, start * PAGE, target.path)
                after = checksums.read_sums(old.checksums_path, source.first + start, stop - start)
                held = checksums.of_copy(known[start:stop], after, data)
                files.write(noting, held.data, 8 * (source.first + start), sums)


def _give_up_in_flux(table: TableLocation, images: Images) -> None:
    """Mark blocks of a copy as damaged that are in flux though the log has nothing for them."""
    replaced = [patch.file.first + patch.blocks for patch in fold.patches(table, images)]
    for file in table.files():
        sums = checksums.read_sums(table.checksums_path, file.first, file.nbytes // PAGE)
        in_flux = file.first + np.flatnonzero(sums & checksums.IN_FLUX == checksums.IN_FLUX)
        damaged = np.setdiff1d(
            in_flux, np.concatenate([np.empty(0, np.int64), *replaced]), assume_unique=True
        )
        if damaged.size:
            marks = np.full(damaged.size, checksums.DAMAGED, np.uint64)
            checksums.write_sums(table.checksums_path, damaged, marks)


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
