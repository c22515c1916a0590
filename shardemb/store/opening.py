"""Opening a store: what each mode allows, who may write, what is created, and what is refused."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

import numpy as np

from shardemb.base import paths, validation
from shardemb.base.sizes import PAGE
from shardemb.commits import copies, fills, log_reader, tags, undo
from shardemb.compute import scheduler
from shardemb.engine.runtime import Runtime
from shardemb.engine.warming import Warming
from shardemb.errors import (
    DiskFullError,
    FormatError,
    StaleReaderError,
    StoreExistsError,
    StoreNotFoundError,
)
from shardemb.format import store_paths
from shardemb.format.spec import normalized
from shardemb.memory import memory_budget as memory
from shardemb.memory.hidden_rows import HiddenRows
from shardemb.memory.past_blocks import PastBlocks
from shardemb.session.session import Reader, Session
from shardemb.storage import address_space, files, folders
from shardemb.store import writer
from shardemb.store.store import Store

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

    from shardemb.format.manifest import Manifest

T = TypeVar("T")

_log = logging.getLogger("shardemb")

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
    PartitionError
        The mode allows writing, and it is a partition of a distributed store, which is opened as a whole.
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
    runtime = checked_runtime(
        resolved(path),
        writable=mode != "r",
        memory_budget=memory_budget,
        log_bytes=log_bytes,
        threads=threads,
        warm=warm,
    )
    _require(runtime.path, mode)
    if commit is not None:
        return Store(_open_tag(runtime, normalized(commit)))
    if mode == "r":
        return Store(_open_reader(runtime))
    return Store(_open_writer(runtime, mode))


def open_session(path: str | os.PathLike[str], mode: Literal["a", "r+", "w-"]) -> Session:
    """Open a store for writing, and return what is behind a `Store`; see `open`."""
    runtime = checked_runtime(
        resolved(path), writable=True, memory_budget=None, log_bytes=None, threads=None, warm=True
    )
    _require(runtime.path, mode)
    return _open_writer(runtime, mode)


def _require(path: Path, mode: str) -> None:
    """Raise if a mode asks for a store where there is none, or for none where there is one."""
    if files.size(store_paths.manifest(path)) is None:
        require_creatable(path, mode)
    elif mode == "w-":
        msg = f'{path} is a store already; open it with mode "r+", or replace it with mode "w"'
        raise StoreExistsError(msg)


def _open_writer(runtime: Runtime, mode: str) -> Session:
    with writer.Held.take(runtime) as held:
        held.create(anew=mode == "w")
        return held.session()


def checked_runtime(
    path: Path,
    *,
    writable: bool,
    memory_budget: int | None,
    log_bytes: int | None,
    threads: int | None,
    warm: bool,
) -> Runtime:
    """Check the options of an opening; see `open`.

    Raises
    ------
    TypeError, ValueError
        One is invalid.
    """
    return Runtime(
        path=path,
        writable=writable,
        threads=scheduler.CORES if threads is None else validation.count(threads, "threads", maximum=1024),
        memory_budget=memory.total_bytes() // 2
        if memory_budget is None
        else validation.count(memory_budget, "memory_budget", minimum=0, maximum=2**62),
        log_bytes=None if log_bytes is None else validation.count(log_bytes, "log_bytes", maximum=2**62),
        warming=Warming(enabled=warm),
    )


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
            or writer.read_manifest(runtime.path) != manifest
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
            base = writer.read_manifest(path)
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
        if writer.read_manifest(path) != base:
            raise FormatError(f"{path} keeps changing while it is copied; try again")

    _read_next_to_writer(path, follow_once, limit_s=math.inf)


def _base_has_changed(path: Path, base: Manifest | None) -> bool:
    try:
        return writer.read_manifest(path) != base
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


def require_creatable(path: Path, mode: str) -> None:
    """Raise `StoreNotFoundError` if no store is, or can be created, in a folder without one."""
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


def resolved(path: str | os.PathLike[str]) -> Path:
    """Check a path given by the user; return where it leads, so that none of its parts is a link."""
    given = paths.local_path(path, "the store").absolute()
    for place in (given, *given.parents):
        if place.is_symlink() and not place.exists():
            msg = f"{place} is a link to {place.readlink()}, where nothing is; make that folder, or choose another path"
            raise StoreNotFoundError(msg)
    return given.resolve()


def _is_being_written(path: Path) -> bool:
    """Return whether a writer has the store open."""
    try:
        lock = files.lock(store_paths.lock(path), shared=True)
    except (OSError, FormatError):  # there is none, or it cannot be locked (a read-only copy)
        return False
    if lock is not None:
        files.close(lock)
    return lock is None
