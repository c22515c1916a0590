"""Copies of stores: new ones, and old ones that are brought up to date. Nothing here changes the store.

A copy is made, or brought up to date, by comparing checksums: the file of checksums of a table in the copy always tells
what the copy holds, so only the blocks that differ are read and written.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import uuid
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base import paths
from shardemb.base.progress import track
from shardemb.base.sizes import PAGE
from shardemb.commits import fills, fold, rewrite
from shardemb.compute import file_blocks, scheduler
from shardemb.errors import FormatError, ShardEmbError, StoreExistsError, StoreLockedError
from shardemb.format import documents, store_paths, zarr_metadata
from shardemb.format.manifest import Manifest
from shardemb.format.table_files import TableLocation
from shardemb.storage import checksums, files, folders, table_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.progress import Progress
    from shardemb.commits.log_reader import Images, Replay
    from shardemb.format.manifest import TableEntry
    from shardemb.format.table_files import File

    _Pair = tuple[TableLocation, TableLocation]  # a table, and its copy

ROUNDS = 50
"""How often a copy begins another round because the store was folded meanwhile."""


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


@contextlib.contextmanager
def older_place(path: str | os.PathLike[str], store: str) -> Iterator[Path]:
    """Take an older copy of the store with a uuid, and yield its folder, which is no store until it is complete again.

    Readers of the copy notice. If the block raises, or the process dies, this can be called again.

    Raises
    ------
    StoreExistsError
        There is something else, or the copy was changed since it was made.
    StoreLockedError
        It is open for writing, or being brought up to date.
    """
    target = paths.local_path(path, "the copy of a store").absolute().resolve()
    _require_copy(target, store)
    lock = files.lock(store_paths.lock(target), shared=False)
    if lock is None:
        msg = f"{target} is open for writing, or being brought up to date; try again when that has ended"
        raise StoreLockedError(msg)
    try:
        _require_copy(target, store)
        epoch = store_paths.epoch(target)
        known = int.from_bytes(files.read(epoch)[:8], "little") if files.size(epoch) is not None else 0
        files.overwrite(epoch, (known + 1).to_bytes(8, "little").ljust(PAGE, b"\0"))
        files.remove(store_paths.manifest(target))
        files.sync_directory(store_paths.private(target))
        yield target
    finally:
        files.close(lock)


def _require_copy(target: Path, store: str) -> None:
    """Raise `StoreExistsError` unless a folder is an unchanged copy of a store, or one that was left unfinished."""
    way_out = "remove it, or copy to another folder"
    try:
        origin = documents.uuid_field(documents.parse_json(files.read(store_paths.origin(target))))
    except (OSError, FormatError) as error:
        msg = f"{target} is not known as a copy of a store ({error}); {way_out}"
        raise StoreExistsError(msg) from error
    if origin != store:
        msg = f"{target} is a copy of another store; {way_out}"
        raise StoreExistsError(msg)
    manifest = store_paths.manifest(target)
    if files.size(manifest) is not None and Manifest.from_bytes(files.read(manifest)).epoch:
        msg = f"{target} was opened for writing since it was copied, so it may have changes of its own; {way_out}"
        raise StoreExistsError(msg)


class StoreCopy:
    """A copy of a store in the making. Other programs may read the store meanwhile, and one may write to it.

    ::

        follow      copy the blocks whose checksums differ from those of the copy; then read the log
                copy the blocks of fills, which have no checksum but in the log; then read the log again
        again       if the store's base has changed meanwhile, which the caller finds out
        complete    lay the images of the log over the blocks, and make the copy a store

    The file of checksums of the copy always tells what the copy holds: blocks that were copied while they were written
    are *in flux*, and the next round copies them again, or the images replace what is new in them. A row that a fold
    has written since the base is in the log, so if the base stays the same, the copy is exactly one commit. What an
    older copy holds of the tables stays, as far as it is still so; before a block of it changes, it is durably in flux.

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
        path = self._path
        group = files.read(self._store / zarr_metadata.DOCUMENT)
        identity = _identity(path)
        for name, document in zarr_metadata.store_documents(identity, group).items():
            files.replace(path / name, document)
        if files.size(store_paths.lock(path)) is None:
            files.write_new(store_paths.lock(path), b"")
        origin = {"uuid": zarr_metadata.store_uuid(group)}
        files.replace(store_paths.origin(path), json.dumps(origin).encode())
        files.sync_tree(path)
        fresh = Manifest(
            uuid=identity,
            clean=True,
            commit=self._replay.manifest.commit,
            tables=self._replay.manifest.tables,
            vocabularies=self._replay.manifest.vocabularies,
            partition=self._replay.manifest.partition,
            decision=self._replay.manifest.decision,
        )
        files.replace(store_paths.manifest(path), fresh.to_bytes())
        files.sync_directory(path.parent)

    @property
    def pairs(self) -> Sequence[tuple[TableLocation, TableLocation]]:
        """The tables, each with its copy, in the order of the manifest."""
        return self._pairs

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
        """Begin with the tables that are there, and empty ones besides; return what other programs have added."""
        held = {new.directory for _, new in self._pairs if _take_over(new)}
        keep = {*held, store_paths.private(self._path), self._path / zarr_metadata.DOCUMENT}
        own = {store_paths.lock(self._path), store_paths.epoch(self._path), store_paths.origin(self._path)}
        for path in (*files.entries(self._path), *files.entries(store_paths.private(self._path))):
            if path not in keep | own:
                files.remove_tree(path)
        # The copy may be a folder within the store. A writer that was killed may have left dropped tables.
        own = {self._path, *(old.directory for old, _ in self._pairs)}
        own |= folders.holding(self._store, {each.uuid for each in dropped})
        root = folders.foreign_to_store(self._store, own)
        foreign = folders.walked(((each, self._path / each.name) for each in root), without=self._path)
        files.make_directory(store_paths.private(self._path))
        for old, new in self._pairs:
            for path in folders.foreign_to_table(new.directory) if new.directory in held else ():
                files.remove_tree(path)
            foreign += folders.foreign_of_table(old, new)
            if new.directory not in held:
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


def _identity(copy: Path) -> str:
    """Return the uuid that a copy has, or a new one."""
    try:
        return zarr_metadata.store_uuid(files.read(copy / zarr_metadata.DOCUMENT))
    except (OSError, FormatError):
        return str(uuid.uuid4())


def _take_over(new: TableLocation) -> bool:
    """Return whether the folder of a table in a copy has the table, after it was given the table's number of rows."""
    spec, directory = new.spec, new.directory
    try:
        found = table_folder.spec_of(directory, may_miss=False)
    except (OSError, FormatError):
        return False
    if found == spec:
        return True
    same = replace(found, uuid=spec.uuid, num_embeddings=spec.num_embeddings, padding_idx=spec.padding_idx)
    if same != spec or found.num_embeddings > spec.num_embeddings:
        return False
    grown = directory.with_name(f"{directory.name}.tmp")
    files.remove_tree(grown)
    try:
        rewrite.resize(TableLocation(found, directory), TableLocation(spec, grown))
    except FormatError:  # it is damaged
        return False
    files.remove_tree(directory)
    files.rename(grown, directory)
    return True


def _copy_changed(old: TableLocation, new: TableLocation, source: File, target: File) -> None:
    """Copy the blocks of a file whose checksums are not those of the copy; mark those that do not match as in flux."""
    if files.size(source.path) is None:
        return  # all zeros, as it was when an older copy was made
    count, sums = source.nbytes // PAGE, new.checksums_path
    known = checksums.read_sums(old.checksums_path, source.first, count)
    # What is damaged has no checksum that would tell that it changed.
    before = checksums.read_sums(sums, source.first, count)
    blocks = np.flatnonzero((known != before) | checksums.is_damaged(known))
    if not blocks.size:
        return
    replaced = blocks[before[blocks] != checksums.NEVER_WRITTEN]
    with (
        files.opened(source.path, os.O_RDONLY) as reading,
        files.opened(target.path, os.O_WRONLY) as writing,
        files.opened(sums, os.O_WRONLY) as noting,
    ):

        def note(values: NDArray[np.uint64], start: int) -> None:
            files.write(noting, values.data, 8 * (source.first + start), sums)

        for first, last in file_blocks.runs(replaced):
            start, stop = int(replaced[first]), int(replaced[last - 1]) + 1
            note(before[start:stop] | np.uint64(checksums.IN_FLUX), start)
        if replaced.size:
            files.sync_data(noting, sums)
        held = []
        for first, last in file_blocks.runs(blocks):
            end = int(blocks[last - 1]) + 1
            for start in range(int(blocks[first]), end, folders.WINDOW_BYTES // PAGE):
                stop = min(start + folders.WINDOW_BYTES // PAGE, end)
                data = memoryview(files.read_at(reading, (stop - start) * PAGE, start * PAGE, source.path))
                files.write(writing, data, start * PAGE, target.path)
                after = checksums.read_sums(old.checksums_path, source.first + start, stop - start)
                held.append((checksums.of_copy(known[start:stop], after, data), start))
        if replaced.size:
            files.sync_data(
                writing, target.path
            )  # a checksum of an older copy must not run ahead of its block
        for values, start in held:
            note(values, start)


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
