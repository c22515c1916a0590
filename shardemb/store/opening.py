"""Opening a store: what each mode allows, who may write, what is created, and what is refused."""

from __future__ import annotations

import errno
import os
import time
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import numpy as np

from shardemb.base import validation
from shardemb.base.sizes import PAGE
from shardemb.compute import scheduler
from shardemb.engine.runtime import Runtime
from shardemb.errors import (
    FormatError,
    ReadOnlyError,
    StoreExistsError,
    StoreLockedError,
    StoreNotFoundError,
)
from shardemb.format import store_paths, zarr_metadata
from shardemb.format.manifest import Manifest
from shardemb.format.table_files import TableLocation
from shardemb.storage import address_space, files, fold, folders, log_reader, table_folder
from shardemb.store.session import Reader, Session
from shardemb.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

Mode: TypeAlias = Literal["r", "r+", "a", "w", "w-"]

RETRY_PAUSES_S = (0.0, *(0.001 * 2**n for n in range(8)))
"""Pauses of a reader next to a writer before it reports an error: half a second in all."""

RETRY_LIMIT_S = 60.0
"""How long such a reader starts over because the writer has changed the store meanwhile."""

MODES = ("r", "r+", "a", "w", "w-")


def open(
    path: str | os.PathLike[str],
    mode: Mode = "a",
    *,
    memory_budget: int | None = None,
    log_bytes: int = 2**30,
    threads: int | None = None,
) -> Store:
    """Open a store, or create one.

    Parameters
    ----------
    path : path-like
        The store's folder.
    mode : {"r", "r+", "a", "w", "w-"}
        As in zarr. ``"r"`` reads an existing store; ``"r+"`` reads and writes an existing one; ``"a"`` does the same
        and creates a missing one; ``"w"`` creates a new one, after deleting an existing *store* with everything in its
        folder; ``"w-"`` creates a new one and refuses an existing one.
    memory_budget : int, optional
        Bytes of memory for changed rows. Above it, committed rows are folded into the shards and evicted, and
        uncommitted rows are spilled to a file. One batch may exceed the budget by its own rows. By default half of the
        machine's memory, or of the limit of the process's cgroup.
    log_bytes : int
        Size limit of the commit log in bytes. At half of it, a fold into the shards begins in the background. A commit
        that would exceed it waits until the log is folded.
    threads : int, optional
        Number of cores that a batch may use; by default all that the process has.

    Returns
    -------
    Store
        Close it, or use it as a context manager.

    Raises
    ------
    TypeError, ValueError
        An option is invalid; nothing was created.
    StoreNotFoundError
        Nothing is at `path`, or something that is not a store, or a link that leads nowhere.
    ReadOnlyError
        The mode allows writing, but the file system or the permissions do not.
    StoreExistsError
        There is a store, and the mode is ``"w-"``.
    StoreLockedError
        The mode allows writing, and the store is open elsewhere: in another process, or a second time in this one.
    FormatError
        The store has a newer format version, or its files are damaged.
    ShardEmbError
        The tables have more files than this process can map: close another store.
    DiskFullError
        There is no space for the log, or for what recovery writes. Mode ``"r"`` needs none.

    Notes
    -----
    One opening at a time may write. A store that is only open for reading cannot be opened for writing. A store that is
    open for writing can be opened for reading as well; later commits may then show through as they are folded.

    Safe from any thread.

    Keep stores on a disk. On a tmpfs, a table takes the memory of all its rows when it is created, written or not: a
    hole that is read there takes memory too, and a full tmpfs would kill the process (SIGBUS). This happens to a store
    that was copied to a tmpfs with its holes (``cp --sparse``, ``rsync -S``).

    Examples
    --------
    >>> import shardemb
    >>> with shardemb.open(tmp / "words.zarr") as store:
    ...     print(store.last_commit)
    None
    """
    if mode not in MODES:
        msg = f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}"
        raise ValueError(msg)
    runtime = Runtime(
        path=Path(path).absolute(),
        writable=mode != "r",
        threads=scheduler.CORES if threads is None else validation.count(threads, "threads", maximum=1024),
        memory_budget=_half_of_memory()
        if memory_budget is None
        else validation.count(memory_budget, "memory_budget", minimum=0, maximum=2**62),
        log_bytes=validation.count(log_bytes, "log_bytes", maximum=2**62),
    )
    exists = store_paths.manifest(runtime.path).is_file()
    if not exists:
        _require_creatable(runtime.path, mode)
    elif mode == "w-":
        msg = f'{runtime.path} is a store already; open it with mode "r+", or replace it with mode "w"'
        raise StoreExistsError(msg)
    if mode == "r":
        return Store(_open_reader(runtime))
    return Store(_open_writer(runtime, new=mode == "w"))


def _open_reader(runtime: Runtime) -> Session:
    """Open for reading. Next to a writer, start over if a commit changed the tables meanwhile."""
    lock = _shared_lock(runtime.path)
    if lock is not None:  # there is no writer, and none can come
        try:
            return _open_at_last_commit(runtime, read_manifest(runtime.path), lock)
        except BaseException:
            files.close(lock)
            raise

    def open_once(manifest: Manifest) -> Session:
        directories = folders.locate(runtime.path, manifest.tables)
        watching = replace(runtime, fresh=_epoch_check(runtime.path, manifest.epoch))
        session = _open_at_last_commit(watching, manifest, None)
        # The writer may have moved folders, or published another base, between the calls above.
        if (
            folders.locate(runtime.path, manifest.tables) != directories
            or read_manifest(runtime.path) != manifest
        ):
            session.close()
            raise FormatError(f"{runtime.path} keeps changing while it is opened; try again")
        return session

    return _read_next_to_writer(runtime.path, open_once)


def _read_next_to_writer(path: Path, read: Callable[[Manifest], T]) -> T:
    """Read what a writer may be changing: again whenever the base has changed meanwhile.

    If it has not, an error may still come from a write in progress, so the call retries a few times before it raises.
    """
    until = time.monotonic() + RETRY_LIMIT_S
    pauses = iter(RETRY_PAUSES_S)
    while True:
        base = None
        try:
            base = read_manifest(path)
            return read(base)
        except (FormatError, OSError):
            if not _base_has_changed(path, base):
                pause_s = next(pauses, None)
                if pause_s is None:
                    raise
                time.sleep(pause_s)
            if time.monotonic() > until:
                raise


def _base_has_changed(path: Path, base: Manifest | None) -> bool:
    try:
        return read_manifest(path) != base
    except (FormatError, OSError):
        return False


def _open_at_last_commit(runtime: Runtime, base: Manifest, lock: int | None) -> Session:
    """Open the files, with the newer images of the log over them in memory."""
    replay = log_reader.read(store_paths.log(runtime.path), base)
    return Session(
        runtime,
        replay.manifest,
        lock,
        may_miss=base.clean,
        replay=replay,
        reader=Reader(
            newest=lambda: _read_next_to_writer(
                runtime.path, partial(log_reader.read, store_paths.log(runtime.path))
            ),
            reopen=lambda: _open_reader(replace(runtime, fresh=None)),
        ),
    )


def _epoch_check(path: Path, epoch: int) -> Callable[[], bool]:
    """Return a function that returns whether the writer of an epoch is still the last one."""
    if files.size(store_paths.epoch(path)) is None:  # a copy that was never opened for writing
        return lambda: files.size(store_paths.epoch(path)) is None
    memory = address_space.AddressRange(PAGE)
    memory.map_file(0, store_paths.epoch(path), PAGE)
    now = memory.array(np.int64, (1,))
    return lambda: int(now[0]) == epoch


def _open_writer(runtime: Runtime, *, new: bool) -> Session:
    path = runtime.path
    try:
        files.make_directory(store_paths.private(path))
        lock = files.lock(store_paths.lock(path), shared=False)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise _not_writable(path, error.errno) from error
    if lock is None:
        raise _lock_error(path)
    try:
        files.overwrite_text(lock, f"{os.getpid()}\n", store_paths.lock(path))
        if new and store_paths.manifest(path).is_file():
            _clear(path)
        if not store_paths.manifest(path).is_file():
            _create(path)
        base = read_manifest(path)
        return Session(runtime, _recover(runtime, base), lock, may_miss=base.clean)
    except BaseException:
        files.close(lock)
        raise


def _not_writable(path: Path, code: int) -> ReadOnlyError:
    reason = "its file system is read-only" if code == errno.EROFS else "this user may not write there"
    exists = store_paths.manifest(path).is_file()
    way_out = f'open it with mode "r", or copy the folder {path}' if exists else "choose another path"
    return ReadOnlyError(code, f"{path} cannot be opened for writing, because {reason}; {way_out}")


def _recover(runtime: Runtime, base: Manifest) -> Manifest:
    """Bring the shards to the last commit; return the next base. If interrupted, it can be done again."""
    folder = store_paths.log(runtime.path)
    log_reader.sync(folder, base)
    replay = log_reader.read(folder, base)
    directories = folders.locate(runtime.path, replay.manifest.tables)
    images = []
    for record in replay.manifest.tables:
        directory = directories[record.uuid]
        with table_folder.naming(record.name, directory):
            spec = table_folder.spec_of(directory, may_miss=base.clean)
            images.append((TableLocation(spec, directory), replay.images(spec)))
    # Every image, even where the files look right: after a failed write-back, only the page cache may be.
    fold.write(images, runtime.threads)
    current = {table.uuid for table in replay.manifest.tables}
    return replace(
        replay.manifest,
        epoch=base.epoch + 1,
        clean=False,
        # Above every number that was ever used, so that nothing left of the old log can be taken for the new one.
        segment=max(base.segment - 1, *log_reader.segments(folder), 0) + 1,
        sequence=replay.sequence,
        attempt=replay.attempt + 1,
        dropped=(*base.dropped, *(table for table in base.tables if table.uuid not in current)),
    )


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


def _create(path: Path) -> None:
    # First: the removal of an old manifest must be durable before there is a group that it does not belong to.
    files.sync_directory(store_paths.private(path))
    identity = str(uuid.uuid4())
    for name, document in zarr_metadata.store_documents(identity).items():
        files.replace(path / name, document)
    # Last: without a manifest, the folder counts as empty.
    files.replace(store_paths.manifest(path), Manifest(uuid=identity, clean=True).to_bytes())
    files.sync_directory(path.parent)


def _clear(path: Path) -> None:
    """Delete a store except its lock. If interrupted, it leaves an empty store, or a folder to create one in."""
    try:
        old = _parse(store_paths.manifest(path), Manifest.from_bytes)
    except FormatError:
        old = Manifest(uuid=str(uuid.uuid4()))
    dropped = (*old.tables, *old.dropped)
    empty = replace(old, clean=True, commit=None, tables=(), vocabularies=(), dropped=dropped)
    files.replace(store_paths.manifest(path), empty.to_bytes())
    folders.arrange(path, (), dropped)
    for entry in path.iterdir():
        if entry not in (store_paths.private(path), path / zarr_metadata.DOCUMENT):
            files.remove_tree(entry)
    files.remove_tree(store_paths.private(path) / "tables")
    files.remove_tree(store_paths.rebuilt(path))
    files.remove_tree(store_paths.log(path))
    files.remove(store_paths.manifest(path))


def _require_creatable(path: Path, mode: str) -> None:
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            msg = f"{place} is a link to {place.readlink()}, where nothing is; make that folder, or choose another path"
            raise StoreNotFoundError(msg)
        if place.exists():
            break
    if not place.is_dir():
        of_it = "" if place == path else f", so {path} cannot be one"
        msg = f"{place} is a file; a store is a folder{of_it}, choose another path"
        raise StoreNotFoundError(msg)
    names = folders.foreign(path)
    if names:
        more = ", ..." if len(names) > 3 else ""
        msg = (
            f"{path} is a folder but not a shardemb store (it holds {', '.join(names[:3])}{more}, and no manifest); "
            f"choose a new or empty folder"
        )
        raise StoreNotFoundError(msg)
    if mode in ("r", "r+"):
        msg = f'there is no store at {path}; create one with mode "a"'
        raise StoreNotFoundError(msg)


def _shared_lock(path: Path) -> int | None:
    """Take the lock as a reader; None if a writer has it, or the file cannot be locked (a read-only copy)."""
    try:
        return files.lock(store_paths.lock(path), shared=True)
    except OSError:
        return None


def _lock_error(path: Path) -> StoreLockedError:
    reader = _shared_lock(path)
    if reader is not None:
        files.close(reader)
        msg = f'{path} is open for reading elsewhere; close that, or open it with mode "r" too'
        return StoreLockedError(msg)
    try:
        holder = f"process {int(files.read(store_paths.lock(path), 64))}"
    except (OSError, ValueError):
        holder = "another process"
    mine = " (this one)" if holder == f"process {os.getpid()}" else ""
    msg = f'{path} is being written by {holder}{mine}; close it there, or open it here with mode "r"'
    return StoreLockedError(msg)


def _half_of_memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            memory = min(memory, int(Path(limit).read_text()))
        except (OSError, ValueError):
            continue  # no such cgroup, or no limit ("max")
    return memory // 2
