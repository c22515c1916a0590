"""Taking times: arms take turns with fresh input, and results are kept. Also, making files cold and checking it."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, pagecache

from .processes import CannotRun
from .results import Arm

SETTLE_S = 0.02
"""Seconds of rest before each call: threads of the last one may still spin on the cores."""

TOUCHED = 256 * 2**20
"""Bytes of free memory that are touched before each call: more than any call needs."""

DROP = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class Contender:
    """One arm of a race: a function that takes the input and returns the result."""

    name: str
    call: Callable[[Any], Any]
    size: int | None = None
    """Rows per call; by default, those of the race. Slow arms get fewer, because rates are compared."""
    repetitions: int | None = None
    prepare: Callable[[], None] = lambda: None
    """Called before each call, and not timed."""

    def note(self, size, repetitions):
        """Say if it was given less to do than the others."""
        less = [f"{self.size:,} rows a call"] if self.size not in (None, size) else []
        few = self.repetitions is not None and self.repetitions < repetitions
        return ", ".join([*less, *[f"{self.repetitions} repetitions"] * few])


def race(contenders, make_input, size, repetitions, *, between=lambda: None, keep=True):
    """Time the contenders in turns, in alternating order; return arms by name.

    `make_input(rows)` is called before each call. Results are kept to the end, so that no arm can reuse memory of an
    earlier result.
    """
    seconds: dict[str, list[float]] = {each.name: [] for each in contenders}
    kept = []
    for repetition in range(repetitions):
        between()
        for each in contenders[:: 1 if repetition % 2 else -1]:
            if repetition >= (each.repetitions or repetitions):
                continue
            given = make_input(each.size or size)
            each.prepare()
            memory = touched_memory()
            time.sleep(SETTLE_S)
            release(memory)
            start = time.perf_counter()
            result = each.call(given)
            seconds[each.name].append(time.perf_counter() - start)
            if keep:
                kept.append(result)
    return {
        each.name: Arm(each.name, each.size or size, tuple(seconds[each.name]), each.note(size, repetitions))
        for each in contenders
    }


def touched_memory():
    """Return memory that was written to, for `release` when the call begins.

    A virtual machine returns free memory to its host within seconds, and then the first touch of a page takes ten times
    as long as usual. Without this, arms that allocate much memory would be slower through no fault of theirs.
    """
    memory = [np.empty(TOUCHED, np.uint8) for _ in os.sched_getaffinity(0)]
    for each in memory:
        each[::4096] = 1
    return memory


def release(memory):
    """Free a part of the memory on each core: the kernel keeps it for the next allocations of this core."""
    cores = os.sched_getaffinity(0)
    try:
        for core in cores:
            os.sched_setaffinity(0, {core})  # of this thread
            memory.pop()
    finally:
        os.sched_setaffinity(0, cores)


def all_equal(contenders, make_input, size, expected):
    """Check that every contender returns the expected bytes; one that does not is named, and ends the workload."""
    for each in contenders:
        ids = make_input(each.size or size)
        each.prepare()
        if not same_bytes(each.call(ids), expected(ids)):
            raise AssertionError(f"{each.name} returned other bytes")
    return True


def same_bytes(found, expected):
    """Compare two float32 arrays bit by bit."""
    found, expected = np.asarray(found), np.asarray(expected)
    return found.shape == expected.shape and np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def drop_caches(*paths):
    """Drop files, or all files of folders, from the page cache, and check that they are gone.

    It first drops each file by itself, which leaves the rest of the machine alone, and the whole cache only if that is
    not enough.
    """
    files = [file for path in paths for file in _files(Path(path))]
    for file in files:
        pagecache._drop(file)
    if _resident(files) and os.access(DROP, os.W_OK):
        os.sync()
        DROP.write_text("1")
    warm = _resident(files)
    if warm:
        raise CannotRun(f"pages stay in the page cache: {warm}")


class Reopened:
    """A store that is opened again and again, with nothing of it in memory."""

    def __init__(self, path):
        self.path, self.store = path, None

    def close(self):
        if self.store is not None:
            self.store.close()
            self.store = None

    def make_cold(self):
        """Close the store, drop its files from memory, and open it."""
        self.close()
        drop_caches(self.path)
        self.store = common.open_store(self.path, warm=False)


def read_files(path):
    """Read a file, or all files of a folder, into the page cache.

    A virtual machine may page out what was not used for seconds, so an arm that follows slow ones would not be warm.
    """
    buffer = bytearray(4 * 2**20)
    for each in _files(Path(path)):
        with each.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _files(path):
    return [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]


def _resident(files):
    return {file.name: pages for file in files if (pages := pagecache.resident_pages(file))}
