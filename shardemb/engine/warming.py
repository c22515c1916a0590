"""Warming: a table that fits into free memory is read into it in the background, once batches find it cold.

The reads of a cold batch are random, one page each. To read all pages of a table that way takes several times as long
as one pass over its files in order (4,000,000 rows of 768 bytes: 10 s in a hundred batches, against 2 s). So once
batches have read a part of a table (`BEGIN_PART`), and what is missing of it takes no more than `FREE_SHARE` of the
free memory, a thread reads the shards in order. Of a table that does not fit, nothing is read but what batches ask for.

Batches and that thread take turns, since both are slower while the disk does both. The thread waits while a batch
reads; in return, the next batch waits until the thread has had `TURN` times as long as the batches before it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from shardemb.base.formatting import size
from shardemb.base.progress import track
from shardemb.base.sizes import PAGE
from shardemb.errors import ShardEmbError
from shardemb.memory import memory_budget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from shardemb.base.progress import Advance, Progress
    from shardemb.base.validation import Int64Array

BEGIN_PART = 64
"""The thread begins once batches have read one part in so many of a table: a few lookups are not worth the whole."""

FREE_SHARE = 0.5
"""How much of the memory that is free may be filled."""

TURN = 2.0
"""How long the thread reads, in times of what batches took for their own reads."""

PIECE_BYTES = 8 * 2**20
"""Bytes that the thread waits for at a time; a batch that comes meanwhile shares the disk with it."""

PIECES_AHEAD = 2
"""Pieces that are requested before they are waited for, so that the disk always has enough to do."""

SAMPLES = 4096
"""Pages that are searched in memory to estimate how much of a table is there."""

WARMED_ROWS = 8192
"""Rows whose pages `warm` waits for at a time."""

_log = logging.getLogger("shardemb")


class Requests(Protocol):
    """Counts of what was asked of a table's files."""

    bytes_requested: int


class Shards(Protocol):
    """The files of a table, as `engine.shards.Shards` maps them, which documents the methods."""

    directory: Path

    @property
    def totals(self) -> Requests:
        """What batches have asked for."""

    def count_resident(self, pages: Int64Array) -> int:
        """Count pages in memory."""

    def pages_bytes(self, rows: Int64Array) -> int:
        """Count the bytes of the pages of rows."""

    def written_pieces(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield the parts that were written."""

    def request(self, offset: int, nbytes: int) -> None:
        """Request a part."""

    def read_in(self, offset: int, nbytes: int) -> None:
        """Wait for a part."""

    def read_in_rows(self, rows: Int64Array) -> None:
        """Request the pages of rows, and wait for them."""


class Warming:
    """The background reader of an open store. All methods are safe from any thread.

    Parameters
    ----------
    enabled : bool
        Whether anything is read in the background at all.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._turns = threading.Condition(threading.RLock())
        self._batches = 0  # that are reading now
        self._owed = 0.0  # seconds that the thread has not had yet
        self._due: weakref.WeakKeyDictionary[Shards, int] = weakref.WeakKeyDictionary()
        self._waiting: list[weakref.ref[Shards]] = []
        self._thread: threading.Thread | None = None
        self._now: tuple[weakref.ref[Shards], float] | None = None
        self._closed = False

    def progress(self, shards: Shards) -> float | None:
        """Return which share of a table the thread has been through; None if it is not at work on it."""
        now = self._now
        return now[1] if now is not None and now[0]() is shards else None

    def has_room(self, nbytes: int) -> bool:
        """Return whether that much may stay in memory once it is written."""
        return self.enabled and nbytes <= FREE_SHARE * memory_budget.available_bytes()

    @contextlib.contextmanager
    def batch_reads(self, tables: Sequence[Shards]) -> Iterator[None]:
        """Take turns with the thread while the block reads pages of cold tables; afterwards, begin to warm them."""
        if not self.enabled or not tables:
            yield
            return
        with self._turns:
            self._turns.wait_for(lambda: self._thread is None or self._owed <= 0)
            self._batches += 1
        begun = time.monotonic()
        try:
            yield
        finally:
            with self._turns:
                self._batches -= 1
                if self._thread is not None:
                    self._owed += TURN * (time.monotonic() - begun)
                self._turns.notify_all()
        for each in tables:
            self._consider(each)

    def close(self) -> None:
        """Stop, and wait for the piece that is being read."""
        with self._turns:
            self._closed, thread = True, self._thread
            self._turns.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def detach_in_child(self) -> None:
        """Read nothing in a forked child, whatever the thread did in its parent."""
        self.enabled, self._thread, self._now = False, None, None
        self._turns = threading.Condition(threading.RLock())

    def _consider(self, shards: Shards) -> None:
        """Warm a table if batches have read a part of it since the last look, and if it fits."""
        requested = shards.totals.bytes_requested
        with self._turns:
            if self._closed or requested < self._due.get(shards, 1):
                return
            written = Written.of(shards)
            part = max(1, written.nbytes // BEGIN_PART)
            first = shards not in self._due
            if first and requested < part:
                self._due[shards] = part
                return
            # Rarer and rarer, so that batches of a table that never fits do not pay for it.
            self._due[shards] = requested + max(part, requested // 4)
            if any(each() is shards for each in self._waiting) or not is_worth_it(shards, written):
                return
            self._waiting.append(weakref.ref(shards))
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        # It holds nothing of the store but one table at a time, so a store that nobody holds can be collected.
        self._owed, self._thread = 0.0, threading.Thread(target=self._run, name="shardemb-warm", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # too many threads, or the interpreter is about to exit
            self._thread, self._waiting = None, []

    def _run(self) -> None:
        while True:
            with self._turns:
                if self._closed or not self._waiting:
                    self._thread, self._now, self._owed = None, None, 0.0
                    self._turns.notify_all()
                    return
                reference = self._waiting[0]
            try:
                self._warm(reference)
            except Exception as error:  # whatever it is, batches do not wait for this thread any more
                _log.warning("warming stopped: %s", error)
            with self._turns:
                self._waiting.pop(0)

    def _warm(self, reference: weakref.ref[Shards]) -> None:
        shards, done, begun = reference(), 0, time.monotonic()
        if shards is None:
            return
        pieces, directory = list(shards.written_pieces(PIECE_BYTES)), shards.directory
        total = sum(nbytes for _, nbytes in pieces)
        _log.info("warming %s: %d bytes", directory, total)
        del shards

        def request(offset: int, nbytes: int) -> None:
            if (shards := reference()) is not None:
                shards.request(offset, nbytes)

        for offset, nbytes in _requested_ahead(pieces, request):
            shards = reference()
            if self._closed or shards is None:
                return
            self._read_in_turn(shards, offset, nbytes)
            del shards
            done += nbytes
            self._now = reference, done / total
        _log.info("warmed %s in %.1f s", directory, time.monotonic() - begun)

    def _read_in_turn(self, shards: Shards, offset: int, nbytes: int) -> None:
        with self._turns:
            self._turns.wait_for(lambda: self._batches == 0 or self._closed)
        begun = time.monotonic()
        shards.read_in(offset, nbytes)
        with self._turns:
            self._owed -= time.monotonic() - begun
            if self._owed <= 0:
                self._owed = 0.0
                self._turns.notify_all()


class Written(NamedTuple):
    """The parts of a table's files that were ever written: where they begin in its memory, and their bytes."""

    starts: Int64Array
    sizes: Int64Array

    @classmethod
    def of(cls, shards: Shards) -> Written:
        """Look at the files of a table."""
        parts = list(shards.written_pieces(2**62))
        return cls(*(np.array([part[k] for part in parts], np.int64) for k in range(2)))

    @property
    def nbytes(self) -> int:
        """All of their bytes."""
        return int(self.sizes.sum())

    def sample(self) -> Int64Array:
        """Return up to `SAMPLES` pages, evenly spread."""
        ends = np.cumsum(self.sizes // PAGE)
        count = int(ends[-1]) if ends.size else 0
        chosen = np.arange(min(SAMPLES, count)) * count // max(1, min(SAMPLES, count))
        which = np.searchsorted(ends, chosen, side="right")
        pages: Int64Array = self.starts[which] // PAGE + chosen - (ends - self.sizes // PAGE)[which]
        return pages


def is_worth_it(shards: Shards, written: Written) -> bool:
    """Return whether enough of a table is missing in memory, and that fits into `FREE_SHARE` of what is free."""
    free = memory_budget.available_bytes()
    if written.nbytes > free:
        return False
    sample = written.sample()
    there = written.nbytes * shards.count_resident(sample) / max(1, sample.size)
    missing = written.nbytes - there
    return written.nbytes / BEGIN_PART < missing <= FREE_SHARE * (free - there)


def warm(shards: Shards, name: str, rows: Int64Array | None, progress: Progress) -> None:
    """Read a table into memory, or the pages of ascending rows, and wait for it.

    Raises
    ------
    ShardEmbError
        There is not enough memory for it.
    OSError
        The files cannot be read.
    """
    pieces = list(shards.written_pieces(PIECE_BYTES)) if rows is None else []
    nbytes = sum(each for _, each in pieces) if rows is None else shards.pages_bytes(rows)
    free = memory_budget.available_bytes()
    if nbytes > free:
        msg = (
            f"table {name!r}: {size(nbytes)} are to be read into memory, but only {size(free)} are free, and what was "
            f"read first would be gone at the end; give warm() fewer rows"
        )
        raise ShardEmbError(msg)
    with track(nbytes, f"warming {name!r}", unit="byte", progress=progress) as advance:
        if rows is None:
            _warm_all(shards, pieces, advance)
        else:
            _warm_rows(shards, rows, advance)


def _requested_ahead(
    pieces: Iterable[tuple[int, int]], request: Callable[[int, int], None]
) -> Iterator[tuple[int, int]]:
    """Request pieces and yield them, each once `PIECES_AHEAD` are on their way or there is no other."""
    ahead: deque[tuple[int, int]] = deque()
    for piece in pieces:
        request(*piece)
        ahead.append(piece)
        if len(ahead) == PIECES_AHEAD:
            yield ahead.popleft()
    yield from ahead


def _warm_all(shards: Shards, pieces: Iterable[tuple[int, int]], advance: Advance) -> None:
    for offset, nbytes in _requested_ahead(pieces, shards.request):
        shards.read_in(offset, nbytes)
        advance(nbytes)


def _warm_rows(shards: Shards, rows: Int64Array, advance: Advance) -> None:
    for start in range(0, rows.size, WARMED_ROWS):
        some = rows[start : start + WARMED_ROWS]
        shards.read_in_rows(some)
        advance(shards.pages_bytes(some))
