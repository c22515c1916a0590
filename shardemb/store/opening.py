"""Opening a store: what each mode allows, who may write, what is created, and what is refused."""

from __future__ import annotations

import errno
import logging
import math
import os
import time
import uuid
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import numpy as np

from shardemb.base import paths, validation
from shardemb.base.sizes import PAGE
from shardemb.commits import copies, fills, fold, log_reader, rewrite, tags, undo
from shardemb.compute import scheduler
from shardemb.engine.runtime import Runtime
from shardemb.engine.warming import Warming
from shardemb.errors import (
    DiskFullError,
    FormatError,
    ReadOnlyError,
    StaleReaderError,
    StoreExistsError,
    StoreLockedError,
    StoreNotFoundError,
)
from shardemb.format import store_paths, zarr_metadata
from shardemb.format.manifest import Manifest
from shardemb.format.spec import normalized
from shardemb.format.table_files import TableLocation
from shardemb.memory import memory_budget as memory
from shardemb.memory.hidden_rows import HiddenRows
from shardemb.memory.past_blocks import PastBlocks
from shardemb.session.session import Reader, Session
from shardemb.storage import address_space, files, folders, table_folder
from shardemb.store.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

_log = logging.getLogger("shardemb")

Mode: TypeAlias = Literal["r", "r+", "a", "w", "w-"]

RETRY_PAUSES_S = (0.0, *(0.001 * 2**n for n in range(8)))
"""Pauses of a reader next to a writer before it reports an error: half a second in all."""

LOCK_PAUSES_S = (0.0, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
"""Pauses of a writer that finds the lock taken: a reader that met an error may hold it for a moment."""

RETRY_LIMIT_S = 60.0
"""How long such a reader starts over because the writer has changed the store meanwhile."""

MODES = ("r", "r+", "a", "w", "w-")


def open(
    path: str | os.PathLike[str],
    mode: Mode = "a",
    *,
    memory_budget: int | None = None,
    log_bytes: int | None = None,
    threads: int | None = None,
    warm: bool = True,
    commit: str | None = None,
) -> Store:
    """Open a store, or create one.

    Parameters
    ----------
    path : path-like
        The store's folder, on a local disk. URLs are refused, and so are mappings and stores of other libraries.
    mode : {"r", "r+", "a", "w", "w-"}
        As in zarr. ``"r"`` reads an existing store; ``"r+"`` reads and writes an existing one; ``"a"`` does the same
        and creates a missing one; ``"w"`` creates a new one, after deleting the tables and vocabularies of an existing
        *store*, but nothing else in its folder; ``"w-"`` creates a new one and refuses an existing one.
    memory_budget : int, optional
        Bytes of memory for changed rows. Above it, committed rows are folded into the shards and evicted, and
        uncommitted rows are spilled to a file. One batch may exceed the budget by its own rows. By default half of the
        machine's memory, or of the limit of the process's cgroup.
    log_bytes : int, optional
        Size limit of the commit log in bytes. At half of it, a fold into the shards begins in the background. A commit
        that would exceed it waits until the log is folded. By default three times the size of all tables, so that even
        commits of whole tables rarely wait, but at most an eighth of the free disk space and the memory budget, and
        1 GiB in any case. What is in the log after a crash takes the next opening about as long as it takes to read.
    threads : int, optional
        Number of cores that a batch may use; by default all that the process has.
    warm : bool
        Whether tables are read into memory in the background. That begins once cold batches have read a small part of a
        table, and only if what is missing of it fits into half of the memory that is free, within the limits of control
        groups; `Table.warm` does it at once. A table that was created from rows stays in memory on the same condition.
    commit : str, optional
        Name of a tag, see `Store.tag`: read the commit that it keeps, exactly, whatever a writer does meanwhile. The
        mode is ``"r"``, or left out.

    Returns
    -------
    Store
        Close it, or use it as a context manager.

    Raises
    ------
    TypeError, ValueError
        The path or an option is invalid; nothing was created.
    StoreNotFoundError
        Nothing is at `path`, or something that is not a store, or a link that leads nowhere.
    TagNotFoundError
        The store has no such tag.
    ReadOnlyError
        The mode allows writing, but the file system or the permissions do not.
    StoreExistsError
        There is a store, and the mode is ``"w-"``.
    StoreLockedError
        The mode allows writing, and the store is open elsewhere: in another process, or a second time in this one.
    FormatError
        The store has a newer format version, or its files are damaged; or some of them are links, which are not
        followed.
    ShardEmbError
        The tables have more files than this process can map: close another store.
    DiskFullError
        There is no space for the log, or for what recovery writes. Mode ``"r"`` needs none.

    Notes
    -----
    One opening at a time may write. Any number may read, at the same time and whether or not one writes; they never
    keep a writer waiting. A reader sees the commit at which it opened the store. Later commits may show through as they
    are folded, and once another writer has opened the store, lookups raise `StaleReaderError` until `Store.refresh`.

    If the folder is moved, removed or replaced while a writer has it open, its next commit raises `PoisonedError`, and
    nothing is written to what is in that place now.

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
    if commit is not None and mode not in ("r", "a"):
        msg = f'commit={commit!r} is only read, so mode must be "r", got {mode!r}; store.restore() goes back to a tag'
        raise ValueError(msg)
    mode = "r" if commit is not None else mode
    runtime = Runtime(
        path=_resolved(path),
        writable=mode != "r",
        threads=scheduler.CORES if threads is None else validation.count(threads, "threads", maximum=1024),
        memory_budget=memory.total_bytes() // 2
        if memory_budget is None
        else validation.count(memory_budget, "memory_budget", minimum=0, maximum=2**62),
        log_bytes=None if log_bytes is None else validation.count(log_bytes, "log_bytes", maximum=2**62),
        warming=Warming(enabled=warm),
    )
    exists = files.size(store_paths.manifest(runtime.path)) is not None
    if not exists:
        _require_creatable(runtime.path, mode)
    elif mode == "w-":
        msg = f'{runtime.path} is a store already; open it with mode "r+", or replace it with mode "w"'
        raise StoreExistsError(msg)
    if commit is not None:
        return Store(_open_tag(runtime, normalized(commit)))
    if mode == "r":
        return Store(_open_reader(runtime))
    return Store(_open_writer(runtime, new=mode == "w"))


def _open_reader(runtime: Runtime) -> Session:
    """Open for reading: without the lock, so start over if a writer changed the tables meanwhile."""

    def open_once(manifest: Manifest) -> Session:
        directories = folders.locate(runtime.path, manifest.tables)
        fresh, count = _watch(runtime.path)
        hidden = HiddenRows(count, lambda: fills.read_note(runtime.path, manifest).fills)
        watching = replace(runtime, fresh=fresh, hidden=hidden)
        session = _open_at_last_commit(watching, manifest)
        # The writer may have moved folders, or published another base, between the calls above.
        if (
            folders.locate(runtime.path, manifest.tables) != directories
            or read_manifest(runtime.path) != manifest
        ):
            session.close()
            raise FormatError(f"{runtime.path} keeps changing while it is opened; try again")
        return session

    return _read_next_to_writer(runtime.path, open_once)


def _open_tag(runtime: Runtime, name: str) -> Session:
    """Open a tag for reading: its files, with what was overwritten since over them in memory."""

    def open_once(base: Manifest) -> Session:
        folder = store_paths.tag(runtime.path, tags.find(runtime.path, base.tags, name).uuid)
        held = tags.read_manifest(folder)
        past = PastBlocks(_watch_undo(folder), partial(undo.read, folder), name)
        reader = Reader(
            newest=lambda: _kept(folder, held),
            reopen=lambda: _open_tag(runtime.again(), name),
            follow=partial(_follow_tag, folder, held),
            store=runtime.path,
        )
        within = replace(runtime, path=folder, past=past)
        replay = log_reader.Replay(held, 0, 0)
        return Session(within, held, None, may_miss=False, replay=replay, reader=reader)

    return _read_next_to_writer(runtime.path, open_once)


def _kept(folder: Path, held: Manifest) -> log_reader.Replay:
    """Return what is known about blocks of a tag that were overwritten: that is no damage."""
    kept = {held.tables[number].uuid: found for number, found in tags.kept_sums(folder).items()}
    return log_reader.Replay(held, 0, 0, kept=kept)


def _follow_tag(folder: Path, held: Manifest, copying: copies.StoreCopy) -> None:
    """Let a copy be what a tag has. Whatever it takes over that was overwritten is kept by then, and put back."""
    copying.follow(held, lambda: log_reader.Replay(held, 0, 0))
    tags.put_back(folder, dict(enumerate(copying.pairs)))


def _read_next_to_writer(path: Path, read: Callable[[Manifest], T], limit_s: float = RETRY_LIMIT_S) -> T:
    """Read what a writer may be changing: again whenever the base has changed meanwhile.

    If it has not, an error may still come from a write in progress. So while a writer lives, the call retries a few
    times before it raises.
    """
    until = time.monotonic() + limit_s
    pauses = iter(RETRY_PAUSES_S)
    while True:
        base = None
        try:
            base = read_manifest(path)
            return read(base)
        except DiskFullError:  # of a copy
            raise
        except (FormatError, OSError):
            written = _is_being_written(path)  # first: a writer that ends in between has changed the base
            if not _base_has_changed(path, base):
                pause_s = next(pauses, None) if written else None
                if pause_s is None:
                    raise
                time.sleep(pause_s)
            else:
                pauses = iter(RETRY_PAUSES_S)
            if time.monotonic() > until:
                raise


def _follow(path: Path, identity: str, copying: copies.StoreCopy) -> None:
    """Let a copy follow the store with a uuid until the base stays the same while it does."""

    def follow_once(base: Manifest) -> None:
        if base.uuid != identity:
            raise StaleReaderError(f"another store is at {path} now; open that with shardemb.open")
        copying.follow(base, partial(log_reader.read, store_paths.log(path), base, private=True))
        if read_manifest(path) != base:
            raise FormatError(f"{path} keeps changing while it is copied; try again")

    _read_next_to_writer(path, follow_once, limit_s=math.inf)


def _base_has_changed(path: Path, base: Manifest | None) -> bool:
    try:
        return read_manifest(path) != base
    except (FormatError, OSError):
        return False


def _open_at_last_commit(runtime: Runtime, base: Manifest) -> Session:
    """Open the files, with the newer images of the log over them in memory."""
    replay = log_reader.read(store_paths.log(runtime.path), base)
    return Session(
        runtime,
        replay.manifest,
        None,
        may_miss=base.clean,
        replay=replay,
        reader=Reader(
            newest=lambda: _read_next_to_writer(runtime.path, partial(_newest, runtime.path)),
            reopen=lambda: _open_reader(runtime.again()),
            follow=partial(_follow, runtime.path, base.uuid),
            store=runtime.path,
        ),
    )


def _newest(path: Path, base: Manifest) -> log_reader.Replay:
    """Read what a writer may have added to the shards: without a commit, which comes first, and in the log."""
    unfinished = fills.read_note(path, base).fills
    # A private copy: the writer may use the segments again while the caller looks at the images.
    replay = log_reader.read(store_paths.log(path), base, private=True)
    replay.unfinished = unfinished
    return replay


def _watch(path: Path) -> tuple[Callable[[], bool], Callable[[], int]]:
    """Return functions that return whether no writer has opened the store since, and how often one announced fills.

    A writer announces itself before it publishes its base. If it dies in between, the file is ahead of the manifest;
    so what counts is not whether the two agree, but whether the file changes.
    """
    file = store_paths.epoch(path)
    if (files.size(file) or 0) < 8:  # no writer has opened this copy of a store yet, or the file was cut off
        return lambda: (files.size(file) or 0) < 8, lambda: 0
    memory = address_space.AddressRange(PAGE)
    memory.map_file(0, file, PAGE)
    now = memory.array(np.int64, (2,))
    epoch = int(now[0])
    return lambda: int(now[0]) == epoch, lambda: int(now[fills.COUNTER // 8])


def _watch_undo(folder: Path) -> Callable[[], int]:
    """Return a function that returns how often blocks of a tag were kept, see `PastBlocks`."""
    memory = address_space.AddressRange(PAGE)
    memory.map_file(0, store_paths.undo(folder), PAGE)
    now = memory.array(np.int64, (1,), undo.COUNT)
    return lambda: int(now[0])


def _open_writer(runtime: Runtime, *, new: bool) -> Session:
    path = runtime.path
    try:
        files.make_directory(store_paths.private(path))
        folders.refuse_links(path)
        lock = _take_lock(path)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise
        raise _not_writable(path, error.errno) from error
    runtime.in_place = partial(files.is_open_file, store_paths.lock(path), lock)
    try:
        files.overwrite_text(lock, f"{os.getpid()}\n", store_paths.lock(path))
        if new and files.size(store_paths.manifest(path)) is not None:
            _clear(path)
        if files.size(store_paths.manifest(path)) is None:
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
    _keep_tags(runtime, base)
    log_reader.sync(folder, base)
    replay = log_reader.read(folder, base)
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
    )


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


def _create(path: Path) -> None:
    # First: the removal of an old manifest must be durable before there is a group that it does not belong to.
    files.sync_directory(store_paths.private(path))
    identity = str(uuid.uuid4())
    for name, document in zarr_metadata.store_documents(identity).items():
        files.replace(path / name, document)
    # Last: without a manifest, the folder counts as empty.
    manifest = Manifest(uuid=identity, clean=True, epoch=_last_epoch(path))
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
    """Delete what is a store's own, except its lock, and nothing else in its folder.

    If interrupted, it leaves an empty store, or a folder to create one in.
    """
    try:
        old = _parse(store_paths.manifest(path), Manifest.from_bytes)
    except FormatError:
        old = Manifest(uuid=str(uuid.uuid4()))
    dropped = (*old.tables, *old.dropped)
    empty = replace(old, clean=True, commit=None, tables=(), vocabularies=(), dropped=dropped, tags=())
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


def _require_creatable(path: Path, mode: str) -> None:
    for place in (path, *path.parents):
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


def _resolved(path: str | os.PathLike[str]) -> Path:
    """Check a path given by the user; return where it leads, so that none of its parts is a link."""
    given = paths.local_path(path, "the store").absolute()
    for place in (given, *given.parents):
        if place.is_symlink() and not place.exists():
            msg = f"{place} is a link to {place.readlink()}, where nothing is; make that folder, or choose another path"
            raise StoreNotFoundError(msg)
    return given.resolve()


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


def _is_being_written(path: Path) -> bool:
    """Return whether a writer has the store open."""
    try:
        lock = files.lock(store_paths.lock(path), shared=True)
    except (OSError, FormatError):  # there is none, or it cannot be locked (a read-only copy)
        return False
    if lock is not None:
        files.close(lock)
    return lock is None


def _lock_error(path: Path) -> StoreLockedError:
    try:
        holder = f"process {int(files.read(store_paths.lock(path), 64))}"
    except (OSError, ValueError):
        holder = "another process"
    mine = " (this one)" if holder == f"process {os.getpid()}" else ""
    msg = f'{path} is being written by {holder}{mine}; close it there, or open it here with mode "r"'
    return StoreLockedError(msg)
