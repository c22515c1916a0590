"""A process for each workload, so that its memory, threads and crashes do not affect others."""

import contextlib
import ctypes
import multiprocessing
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

MIB = 2**20

_PR_SET_PDEATHSIG = 1


def alone(function, *arguments, first=None):
    """Call a function in a fresh process, after `first()` if given; return what it returns."""
    context = multiprocessing.get_context("spawn")  # peers have threads, which would not survive a fork
    with ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(first,)) as pool:
        return pool.submit(function, *arguments).result()


def _begin(first):
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # do not outlive a command that was killed
    if first is not None:
        first()


def anonymous_bytes():
    """Return the anonymous memory of this process: heap and copied pages, not the pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


class CannotRun(Exception):
    """This machine lacks something that a workload needs: a page cache that can be dropped, a memory limit."""


class Watch:
    """Follows the process's anonymous memory during a ``with`` block; `growth` is its peak growth."""

    def __enter__(self):
        self._before = self._peak = anonymous_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    @property
    def peak(self):
        """Bytes, with what the process had before."""
        return self._peak

    @property
    def growth(self):
        """Bytes."""
        return self._peak - self._before

    def _follow(self):
        while not self._end.wait(0.01):
            self._peak = max(self._peak, anonymous_bytes())


# ---- a memory limit of the kernel ---------------------------------------------------------------------------------

V1, V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")


class Capped:
    """A control group with a memory limit, which includes the page cache."""

    def __init__(self, name, nbytes):
        old = (V1 / "cgroup.procs").exists()
        self.path = (V1 if old else V2) / name
        self._limit = "memory.limit_in_bytes" if old else "memory.max"
        self._nbytes = nbytes

    def __enter__(self):
        try:
            self.path.mkdir(exist_ok=True)
            (self.path / self._limit).write_text(str(self._nbytes))
        except OSError as problem:
            raise CannotRun(f"no memory limit for a process here: {problem}") from problem
        return self

    def __exit__(self, *_):
        for _ in range(50):  # the kernel may need a moment after the last process
            with contextlib.suppress(OSError):
                self.path.rmdir()
                break
            time.sleep(0.1)

    def join(self):
        """Subject this process to the limit."""
        (self.path / "cgroup.procs").write_text("0")
