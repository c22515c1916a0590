"""What all tables of an open store share: its lock, its limits, and whether it may be used and changed.

A setting that lasts as long as this opening of the store is here. What lasts as long as the files is in
``format/spec.py``, and what lasts for one call is an argument of that call.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardemb.base.forks import usable_in_child
from shardemb.base.interrupts import signals_deferred
from shardemb.commits.undo import Undo
from shardemb.engine.warming import Warming
from shardemb.errors import PartitionError, PoisonedError, ReadOnlyError, StaleReaderError, StoreClosedError
from shardemb.format import store_paths
from shardemb.format.manifest import Manifest
from shardemb.memory.memory_budget import MemoryBudget, NoFolds
from shardemb.memory.output_pool import OutputPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from shardemb.commits.fills import Announcements
    from shardemb.memory.hidden_rows import HiddenRows
    from shardemb.memory.memory_budget import Folds
    from shardemb.memory.overlay import Overlay
    from shardemb.memory.past_blocks import PastBlocks


@dataclass
class Runtime:
    """The state of one opening of a store.

    Attributes
    ----------
    path : Path
        The store's folder.
    writable : bool
        False for mode ``"r"``.
    threads : int
        Cores that a batch may use.
    memory_budget : int
        Bytes of changed rows that may stay in memory.
    log_bytes : int or None
        Bytes that the log may take before it is folded; None to choose by the size of the tables and the disk.
    lock : RLock
        Held by everything that changes rows, moves rows or changes the set of tables. Lookups do not need it.
    fresh : callable, optional
        For a reader that was opened while a writer was open: returns whether no other writer has come since.
    in_place : callable, optional
        In a writer: returns whether the lock that it holds is still the one that is in the store's folder.
    committed : Manifest
        The manifest of the last commit. Nothing else says which commit is the last.
    budget : MemoryBudget
        Keeps changed rows within `memory_budget`.
    folds : Folds
        Moves committed rows into the files.
    announcements : Announcements or None
        In a writer: names what is written to the files before a commit.
    hidden : HiddenRows or None
        In a reader: what a writer has announced.
    past : PastBlocks or None
        In a reader of a tag: what was overwritten since.
    undo : Undo
        In a writer: keeps what tags have of files, before it is overwritten.
    outputs : OutputPool
        Makes the arrays that lookups return.
    warming : Warming
        Reads tables that fit into memory in the background.
    closed : bool
        Whether the store takes no more calls.
    poisoned : str or None
        Why nothing can be committed until the store is opened again.
    half_done : str or None
        The change that failed half way, so that nothing can be committed before a rollback.
    pid : int
        The process that opened the store.
    """

    path: Path
    writable: bool
    threads: int
    memory_budget: int
    log_bytes: int | None
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    fresh: Callable[[], bool] | None = None
    in_place: Callable[[], bool] | None = field(default=None, repr=False)
    committed: Manifest = field(default=Manifest(uuid=""), repr=False)
    budget: MemoryBudget = field(default_factory=MemoryBudget, repr=False)
    folds: Folds = field(default_factory=NoFolds, repr=False)
    announcements: Announcements | None = field(default=None, repr=False)
    hidden: HiddenRows | None = field(default=None, repr=False)
    past: PastBlocks | None = field(default=None, repr=False)
    undo: Undo = field(default_factory=Undo, repr=False)
    outputs: OutputPool = field(default_factory=OutputPool, repr=False)
    warming: Warming = field(default_factory=Warming, repr=False)
    closed: bool = False
    poisoned: str | None = None
    half_done: str | None = None
    pid: int = field(default_factory=os.getpid)
    _background: ThreadPoolExecutor | None = field(default=None, repr=False)
    _background_lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def again(self) -> Runtime:
        """Return the settings of this opening for another one, which shares nothing with it but the lock."""
        return Runtime(
            self.path,
            self.writable,
            self.threads,
            self.memory_budget,
            self.log_bytes,
            lock=self.lock,
            warming=Warming(enabled=self.warming.enabled),
        )

    def become_writer(self, folds: Folds, overlays: Callable[[], Sequence[Overlay]]) -> None:
        """Keep the rows in memory of all tables within the memory budget, and spill and fold for it, from now on."""
        self.folds = folds
        self.budget = MemoryBudget(self.memory_budget, overlays, folds, store_paths.private(self.path))

    def detach_in_child(self) -> None:
        """Be readable in a forked child. Journal, spill file and background thread stay with the parent."""
        self.folds, self.budget = NoFolds(), MemoryBudget()
        self._background, self._background_lock = None, usable_in_child(self._background_lock)
        self.warming.detach_in_child()
        for reading in (self.hidden, self.past):
            if reading is not None:
                reading.detach_in_child()

    def check_open(self) -> None:
        """Raise `StoreClosedError` once the store is closed."""
        if self.closed:
            msg = f"the store {self.path} is closed; open it again with shardemb.open({str(self.path)!r})"
            raise StoreClosedError(msg)

    def check_fresh(self) -> None:
        """Raise `StaleReaderError` in a reader if another writer has opened the store since."""
        fresh = self.fresh  # another thread may close the store
        if fresh is not None and not fresh():
            msg = f"another writer has opened the store {self.path} since it was read; call store.refresh()"
            raise StaleReaderError(msg)

    def steadily(self, read: Callable[[], None]) -> None:
        """Read rows; in a reader of a tag, again until nothing was overwritten meanwhile, see `PastBlocks`."""
        before = self._moment()
        while True:
            read()
            if before == (before := self._moment()):
                return

    def _moment(self) -> object:
        past = self.past  # another thread may close or refresh the store
        return None if past is None else (past, past.look())

    def check_sound(self) -> None:
        """Raise `PoisonedError` if a failure has left memory or the disk in a state that must not be committed."""
        if self.poisoned:
            msg = f"the store {self.path} cannot commit any more: {self.poisoned}; close it and open it again"
            raise PoisonedError(msg)
        if self.half_done:
            msg = f"{self.half_done} failed half way; call store.rollback() before anything else"
            raise PoisonedError(msg)

    def check_publishable(self) -> None:
        """As `check_sound`, and as `check_in_place`."""
        self.check_sound()
        self.check_in_place()

    def check_in_place(self) -> None:
        """Raise `PoisonedError` in a writer whose folder was moved, removed or replaced.

        Everything is written by path, so this is called before anything is published: what is there now is not its own.
        """
        if self.in_place is not None and not self.in_place():
            self.poisoned = "its folder was moved, removed or replaced while it was open"
            self.check_sound()

    def check_whole(self) -> None:
        """Raise `PartitionError` in a partition, which commits only together with the others."""
        partition = self.committed.partition
        if partition is not None:
            msg = (
                f"{self.path} is {partition}, and a partition does not commit alone; commit that store with its own "
                f"commit()"
            )
            raise PartitionError(msg)

    def check_writable(self) -> None:
        """Raise `ReadOnlyError` in a store that was opened for reading."""
        if not self.owned:
            msg = f"the store {self.path} belongs to process {self.pid}, and this is a fork of it; change it there"
            raise ReadOnlyError(msg)
        if not self.writable:
            msg = f'the store {self.path} was opened with mode "r"; open it with mode "r+" to change it'
            raise ReadOnlyError(msg)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock, and check that the store is open and may be written."""
        with self.lock:
            self.check_open()
            self.check_writable()
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """As `changing`, and check that nothing stands in the way of files to write, see `check_publishable`."""
        with self.changing():
            self.check_publishable()
            yield

    @property
    def owned(self) -> bool:
        """Whether this process opened the store, rather than a fork of it."""
        return os.getpid() == self.pid

    def in_background(self, work: Callable[[], None]) -> None:
        """Run work in a background thread, in the order of the calls; it is dropped if the store closes first.

        Where no thread can be started, run it in this one.
        """
        with self._background_lock:
            self.check_open()
            if self._background is None:
                self._background = ThreadPoolExecutor(1, thread_name_prefix="shardemb")
            with contextlib.suppress(RuntimeError):  # no thread can be started, for want of memory or at exit
                self._background.submit(work)
                return
        work()

    def touch_ahead(self, overlays: Iterable[Overlay]) -> None:
        """Touch memory for the slots that come next, in the background; see `Overlay.touch_ahead`."""
        for each in overlays:
            touch = each.touch_ahead(self.memory_budget // 32)
            if touch is not None:
                self.in_background(touch)

    def close(self) -> None:
        """Take no more calls, and wait for the work that runs in the background."""
        with self._background_lock:
            self.closed = True
            background, self._background = self._background, None
        self.fresh = self.hidden = self.past = None  # keep a file mapped
        self.warming.close()
        if background is not None:
            background.shutdown(cancel_futures=True)
        self.outputs.close()

    @contextlib.contextmanager
    def all_or_nothing(self, what: str) -> Iterator[None]:
        """Run the part of a change that must not stop half way.

        Ctrl-C takes effect at its end. If it fails nevertheless, commits are refused until a rollback.
        """
        with signals_deferred():
            try:
                yield
            except BaseException:
                self.half_done = what
                raise


def in_thread(name: str, work: Callable[[], None]) -> threading.Thread | None:
    """Run work in a thread of its own, and return that; where none can be started, run it in this one."""
    thread = threading.Thread(target=work, name=name)
    try:
        thread.start()
    except RuntimeError:  # too many threads, or the interpreter is about to exit
        work()
        return None
    return thread
