"""Becoming the writer of a store: its lock, what is created, what the log says, and recovery from that."""

from __future__ import annotations

import errno
import logging
import os
import time
import uuid
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from shardemb.base.sizes import PAGE
from shardemb.commits import fills, fold, log_reader, rewrite, tags
from shardemb.errors import FormatError, PartitionError, ReadOnlyError, StoreLockedError
from shardemb.format import store_paths, zarr_metadata
from shardemb.format.manifest import Manifest
from shardemb.format.table_files import TableLocation
from shardemb.session.session import Session
from shardemb.storage import files, folders, table_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from shardemb.engine.runtime import Runtime
    from shardemb.format.manifest import Decided, PartitionIdentity

T = TypeVar("T")

_log = logging.getLogger("shardemb")

LOCK_PAUSES_S = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
"""Pauses of a writer that finds the lock taken: a reader that met an error may hold it for a moment."""


class Held:
    """A store whose lock this process holds, and in which nothing was changed yet. A context manager.

    Its end releases the lock, unless `session` has handed it over to a session.

    Parameters
    ----------
    runtime : Runtime
    lock : int
        The descriptor that holds the lock.
    """

    def __init__(self, runtime: Runtime, lock: int) -> None:
        self._lock: int | None = lock
        self.use(runtime)

    @classmethod
    def take(cls, runtime: Runtime) -> Held:
        """Take the lock of a store, or of a folder in which one can be created.

        Raises
        ------
        StoreLockedError, ReadOnlyError
            It is open elsewhere; it may not be written.
        """
        path = runtime.path
        try:
            files.make_directory(store_paths.private(path))
            folders.refuse_links(path)
            lock = _take_lock(path)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            raise _not_writable(path, error.errno) from error
        try:
            files.overwrite_text(lock, f"{os.getpid()}\n", store_paths.lock(path))
        except BaseException:
            files.close(lock)
            raise
        return cls(runtime, lock)

    def use(self, runtime: Runtime) -> None:
        """Use other settings for the opening that follows."""
        assert self._lock is not None
        self.runtime = runtime
        runtime.in_place = partial(files.is_open_file, store_paths.lock(runtime.path), self._lock)

    def __enter__(self) -> Held:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def create(self, *, anew: bool = False, partition: PartitionIdentity | None = None) -> None:
        """Create the store if there is none, or `anew` after deleting what the one that is there owns.

        Raises
        ------
        PartitionError
            That one is a partition, without which the others would be worth nothing.
        """
        path = self.runtime.path
        if anew and files.size(store_paths.manifest(path)) is not None:
            _clear(path)
        if files.size(store_paths.manifest(path)) is None:
            _create(path, partition)

    def read(self) -> log_reader.Replay:
        """Read what was committed and what is prepared, and make it durable: others will rely on it."""
        base, folder = read_manifest(self.runtime.path), store_paths.log(self.runtime.path)
        if not base.clean:
            log_reader.sync(folder, base)
        return log_reader.read(folder, base)

    def session(self, decided: Decided | None = None) -> Session:
        """Recover the store and open it, whose session has the lock from now on.

        Raises
        ------
        PartitionError
            It is a partition, and nobody says what was `decided`.
        """
        base = read_manifest(self.runtime.path)
        if base.partition is not None and decided is None:
            raise PartitionError(_not_alone(self.runtime.path, base.partition))
        session = Session(
            self.runtime, _recover(self.runtime, base, decided), self._lock, may_miss=base.clean
        )
        self._lock = None
        return session

    def release(self) -> None:
        """Release the lock, unless a session has it."""
        lock, self._lock = self._lock, None
        if lock is not None:
            files.close(lock)


def _not_alone(path: Path, partition: PartitionIdentity) -> str:
    return (
        f"{path} is {partition}; it is written by opening that store, with shardemb.distributed.open, and read here "
        f'with mode "r"'
    )


def _not_writable(path: Path, code: int) -> ReadOnlyError:
    reason = "its file system is read-only" if code == errno.EROFS else "this user may not write there"
    exists = store_paths.manifest(path).is_file()
    way_out = f'open it with mode "r", or copy the folder {path}' if exists else "choose another path"
    return ReadOnlyError(code, f"{path} cannot be opened for writing, because {reason}; {way_out}")


def _recover(runtime: Runtime, base: Manifest, decided: Decided | None) -> Manifest:
    """Bring the shards to the last commit; return the next base. If interrupted, it can be done again.

    What is prepared in a partition is committed if it is `decided`, and dropped otherwise.
    """
    folder = store_paths.log(runtime.path)
    _keep_tags(runtime, base)
    log_reader.sync(folder, base)
    replay = _resolve(runtime.path, base, log_reader.read(folder, base), decided)
    directories = folders.locate(runtime.path, replay.manifest.tables)
    images = []
    for record in replay.manifest.tables:
        directory = directories[record.uuid]
        with table_folder.naming(record.name, directory):
            spec = table_folder.spec_of(directory, may_miss=base.clean)
            images.append((TableLocation(spec, directory), replay.images(spec)))
    rewrite.unshare(runtime.path, [location for location, _ in images])
    # Before the images are written: some may be of rows that the note still names.
    note = fills.read_note(runtime.path, base)
    for location, some in images:
        named = [each for each in note.fills if each.table == location.spec.uuid]
        fills.undo_unfinished(location, named, some.fills)
    # Every image, even where the files look right: after a failed write-back, only the page cache may be.
    fold.write(images, runtime.threads, runtime.undo)
    current = {table.uuid for table in replay.manifest.tables}
    rows = sum(each.ids.size for _, each in images)
    if rows:
        _log.info("recovered %s: %d rows of the log folded", runtime.path, rows)
    return replace(
        replay.manifest,
        epoch=base.epoch + 1,
        clean=False,
        # Above every number that was ever used, so that nothing left of the old log can be taken for the new one.
        segment=max(base.segment - 1, *log_reader.segments(folder), 0) + 1,
        sequence=replay.sequence,
        attempt=replay.attempt + 1,
        dropped=(*base.dropped, *(table for table in base.tables if table.uuid not in current)),
        tags=base.tags,
        resolved=None,
    )


def _resolve(
    path: Path, base: Manifest, replay: log_reader.Replay, decided: Decided | None
) -> log_reader.Replay:
    """Record durably what becomes of something that is prepared; return what is committed by that.

    From the first image in the shards on, everybody has to take it for committed; and from the first hole where it had
    filled rows, nobody may.
    """
    if replay.prepared is None:
        return replay
    base = replace(base, resolved=decided)
    files.replace(store_paths.manifest(path), base.to_bytes())
    return log_reader.read(store_paths.log(path), base)


def _keep_tags(runtime: Runtime, base: Manifest) -> None:
    """Keep what tags have of the files, from now on. One that is damaged is lost, which says whoever reads it."""
    tags.sweep(runtime.path, base.tags)
    for each in base.tags:
        try:
            runtime.undo.add(each.uuid, tags.keeper(runtime.path, each))
        except (FormatError, FileNotFoundError) as error:
            _log.warning("the tag %r of %s is lost: %s", each.name, runtime.path, str(error))
            tags.release(store_paths.tag(runtime.path, each.uuid))


def read_manifest(path: Path) -> Manifest:
    """Read a store's manifest and check that the zarr group belongs to it.

    Raises
    ------
    FormatError
        Either is missing or damaged, or they belong to two stores.
    """
    manifest = _parse(store_paths.manifest(path), Manifest.from_bytes)
    found = _parse(path / zarr_metadata.DOCUMENT, zarr_metadata.store_uuid)
    if found != manifest.uuid:
        msg = (
            f"{path}: zarr.json and the manifest belong to two different stores ({found} and {manifest.uuid})"
        )
        raise FormatError(msg)
    return manifest


def _parse(path: Path, parse: Callable[[bytes], T]) -> T:
    try:
        return parse(files.read(path))
    except (OSError, ValueError) as error:
        msg = f"{path}: {error}"
        raise FormatError(msg) from error


def _create(path: Path, partition: PartitionIdentity | None) -> None:
    # First: the removal of an old manifest must be durable before there is a group that it does not belong to.
    files.sync_directory(store_paths.private(path))
    identity = str(uuid.uuid4())
    for name, document in zarr_metadata.store_documents(identity).items():
        files.replace(path / name, document)
    # Last: without a manifest, the folder counts as empty.
    manifest = Manifest(uuid=identity, clean=True, epoch=_last_epoch(path), partition=partition)
    files.replace(store_paths.manifest(path), manifest.to_bytes())
    files.sync_directory(path.parent)


def _last_epoch(path: Path) -> int:
    """Return the epoch that readers know, of the store that was here before: none is used twice."""
    file = store_paths.epoch(path)
    if (files.size(file) or 0) < PAGE:
        return 0
    with files.opened(file, os.O_RDONLY) as descriptor:
        return min(abs(int.from_bytes(files.read_at(descriptor, 8, 0, file), "little", signed=True)), 2**61)


def _clear(path: Path) -> None:
    """Delete what is a store's own, except its lock, and nothing else in its folder; but refuse a partition.

    If interrupted, it leaves an empty store, or a folder to create one in.
    """
    try:
        old = _parse(store_paths.manifest(path), Manifest.from_bytes)
    except FormatError:
        old = Manifest(uuid=str(uuid.uuid4()))
    if old.partition is not None:
        raise PartitionError(_not_alone(path, old.partition))
    dropped = (*old.tables, *old.dropped)
    empty = replace(
        old,
        clean=True,
        commit=None,
        tables=(),
        vocabularies=(),
        dropped=dropped,
        tags=(),
    )
    files.replace(store_paths.manifest(path), empty.to_bytes())
    folders.arrange(path, (), dropped)
    for directory in folders.tables(path):  # those that a damaged manifest did not name
        files.remove_tree(directory)
    tags.sweep(path, ())
    files.remove_tree(store_paths.tags(path))
    files.remove_tree(store_paths.private(path) / "tables")
    files.remove_tree(store_paths.private(path) / "vocabularies")
    files.remove_tree(store_paths.rebuilt(path))
    files.remove_tree(store_paths.log(path))
    files.remove(store_paths.fills(path))
    files.remove(store_paths.manifest(path))


def _take_lock(path: Path) -> int:
    """Become the writer of a store; return the descriptor that holds the lock."""
    file = store_paths.lock(path)
    for pause_s in LOCK_PAUSES_S:
        time.sleep(pause_s)
        lock = files.lock(file, shared=False)
        if lock is None:
            continue
        if not files.is_open_file(file, lock):  # it was replaced meanwhile
            files.close(lock)
            continue
        if files.names(file)[0] == 1:
            return lock
        # It is also the lock of a copy whose files are links to these. With it held, make one for this store alone.
        try:
            files.replace(file, b"")
        finally:
            files.close(lock)
    raise _lock_error(path)


def _lock_error(path: Path) -> StoreLockedError:
    try:
        holder = f"process {int(files.read(store_paths.lock(path), 64))}"
    except (OSError, ValueError):
        holder = "another process"
    mine = " (this one)" if holder == f"process {os.getpid()}" else ""
    msg = f'{path} is being written by {holder}{mine}; close it there, or open it here with mode "r"'
    return StoreLockedError(msg)
