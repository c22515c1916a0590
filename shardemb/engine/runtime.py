"""What all tables of an open store share: its lock, its limits, and whether it may be used and changed.

Settings that last as long as this opening of the store live here; what lasts as long as the files is in
``spec.py``, and what lasts for one call is an argument of that call.
"""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from shardemb.base.interrupts import signals_deferred
from shardemb.engine.memory_budget import MemoryBudget, NoFolds
from shardemb.engine.output_pool import OutputPool
from shardemb.errors import PoisonedError, ReadOnlyError, StaleReaderError, StoreClosedError
from shardemb.format import store_paths
from shardemb.format.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from shardemb.engine.memory_budget import Folds
    from shardemb.engine.overlay import Overlay


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
    log_bytes : int
        Bytes that the log may take before it is folded.
    lock : RLock
        Held by everything that changes rows, moves rows or changes the set of tables. Lookups do without.
    fresh : callable, optional
        In a reader that was opened beside a writer: whether that writer is still the last one.
    committed : Manifest
        As of the last commit: the one place that says which that is.
    budget : MemoryBudget
        Keeps changed rows within `memory_budget`.
    folds : Folds
        Moves committed rows into the files.
    outputs : OutputPool
        Where lookups get the arrays that they return.
    """

    path: Path
    writable: bool
    threads: int
    memory_budget: int
    log_bytes: int
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    fresh: Callable[[], bool] | None = None
    committed: Manifest = field(default=Manifest(uuid=""), repr=False)
    budget: MemoryBudget = field(default_factory=MemoryBudget, repr=False)
    folds: Folds = field(default_factory=NoFolds, repr=False)
    outputs: OutputPool = field(default_factory=OutputPool, repr=False)
    closed: bool = False
    poisoned: str | None = None
    half_done: str | None = None
    pid: int = field(default_factory=os.getpid)
    _background: ThreadPoolExecutor | None = field(default=None, repr=False)
    _background_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def become_writer(self, folds: Folds, overlays: Callable[[], Sequence[Overlay]]) -> None:
        """Keep the rows in memory of all tables within the memory budget from now on."""
        self.folds = folds
        self.budget = MemoryBudget(self.memory_budget, overlays, folds, store_paths.private(self.path))

    def check_open(self) -> None:
        """Raise `StoreClosedError` once the store is closed."""
        if self.closed:
            msg = f"the store {self.path} is closed; open it again with shardemb.open({str(self.path)!r})"
            raise StoreClosedError(msg)

    def check_fresh(self) -> None:
        """Raise `StaleReaderError` in a reader beside whose writer another one has come."""
        if self.fresh is not None and not self.fresh():
            msg = f"another writer has opened the store {self.path} since it was read; call store.refresh()"
            raise StaleReaderError(msg)

    def check_sound(self) -> None:
        """Raise `PoisonedError` if memory may not be what its callers believe, so that nothing of it is kept."""
        if self.poisoned:
            msg = f"the store {self.path} cannot commit any more: {self.poisoned}; close it and open it again"
            raise PoisonedError(msg)
        if self.half_done:
            msg = f"{self.half_done} broke off half way; call store.rollback() before anything else"
            raise PoisonedError(msg)

    def check_writable(self) -> None:
        """Raise `ReadOnlyError` in a store that was opened for reading."""
        if not self.owned:
            msg = f"the store {self.path} belongs to process {self.pid}, of which this is a fork; change it there"
            raise ReadOnlyError(msg)
        if not self.writable:
            msg = f'the store {self.path} was opened with mode "r"; open it with mode "r+" to change it'
            raise ReadOnlyError(msg)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock, in a store that is open and may be written."""
        with self.lock:
            self.check_open()
            self.check_writable()
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """As `changing`, where memory is what its callers believe."""
        with self.changing():
            self.check_sound()
            yield

    @property
    def owned(self) -> bool:
        """Whether this is the process that opened the store, and no fork of it."""
        return os.getpid() == self.pid

    def in_background(self, work: Callable[[], None]) -> None:
        """Run something that nobody waits for, after what was given before; dropped if the store closes first."""
        with self._background_lock:
            self.check_open()
            if self._background is None:
                self._background = ThreadPoolExecutor(1, thread_name_prefix="shardemb")
            self._background.submit(work)

    def close(self) -> None:
        """Take no more calls and wait for the background to end."""
        with self._background_lock:
            self.closed = True
            background, self._background = self._background, None
        if background is not None:
            background.shutdown(cancel_futures=True)
        self.outputs.close()

    @contextlib.contextmanager
    def all_or_nothing(self, what: str) -> Iterator[None]:
        """Run the part of a change that must not stop half way.

        Ctrl-C takes effect at its end. Should anything break all the same, commits are refused until rollback.
        """
        with signals_deferred():
            try:
                yield
            except BaseException:
                self.half_done = what
                raise
