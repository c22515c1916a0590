"""Runs tasks through dask. No other module imports it.

The tasks of a batch work on memory that is mapped into this process, so they run on its threads: by dask's local
scheduler on the calling thread and its helper threads, or by what ``dask.config`` asks for if that runs in this process
too (the synchronous scheduler, or an executor of threads). An active distributed client and the process scheduler are
not used.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import dask
import dask.base
import dask.local
import dask.system

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from dask.array import Array
    from numpy.typing import NDArray

T = TypeVar("T")

_PID = os.getpid()
_THIS_THREAD = 0
_getcpu = ctypes.CDLL(None).sched_getcpu

REST_S = 0.001
"""After this many seconds without work, helpers may be asleep, and their cores too."""

CORES: int = dask.system.CPU_COUNT
"""Cores that this process may use, as dask counts them: within its affinity and cgroup limits."""


def run(tasks: Sequence[Callable[[], T]], threads: int, stop: threading.Event | None = None) -> list[T]:
    """Run tasks; none of them is still running when this returns or raises.

    A Ctrl-C interrupts only the calling thread. The others do not notice it, so this waits for them.

    Parameters
    ----------
    tasks : sequence of callable
        What to run. A long task should check `stop` now and then, and return early if it is set. A single task runs in
        the calling thread, and so do all tasks in a forked process.
    threads : int
        How many tasks run concurrently. The calling thread is one of these threads: with two tasks it runs one itself,
        which saves waking a second thread and being woken by it.
    stop : threading.Event, optional
        Set as soon as a task fails or the waiting is interrupted. Tasks that have not begun by then never run.

    Returns
    -------
    list
        The tasks' results, in order. If tasks raise, the first error is raised instead.

    Examples
    --------
    >>> run([lambda: 1, lambda: 2], threads=2)
    [1, 2]
    """
    if len(tasks) < 2 or os.getpid() != _PID:  # the threads of a pool do not survive a fork
        return [task() for task in tasks]
    stop = stop or threading.Event()
    # A task that begins in another thread marks its future as running. After an error, the others are cancelled.
    begun: list[Future[None]] = [Future() for _ in tasks]
    caller = threading.get_ident()

    def guarded(future: Future[None], task: Callable[[], T]) -> T | None:
        elsewhere = threading.get_ident() != caller  # else nobody has to wait for it
        if stop.is_set() or (elsewhere and not future.set_running_or_notify_cancel()):
            return None
        try:
            return task()
        except BaseException:
            stop.set()
            raise
        finally:
            if elsewhere:
                future.set_result(None)

    # A plain dict as the graph: dask.compute on delayed objects costs five times as much.
    graph = {
        ("shardemb", k): (guarded, future, task)
        for k, (future, task) in enumerate(zip(begun, tasks, strict=True))
    }
    try:
        return list(_get(len(tasks), threads)(graph, list(graph)))
    except BaseException:
        stop.set()
        wait([future for future in begun if not future.cancel()])
        raise


def as_array(
    read: Callable[[int, int], NDArray[Any]],
    num_rows: int,
    width: int,
    rows_per_chunk: int,
    dtype: np.dtype[Any],
) -> Array:
    """Make a dask array whose chunks call ``read(start, stop)`` when they are computed."""
    import dask.array as da
    import numpy as np

    full, rest = divmod(num_rows, rows_per_chunk)
    rows = (rows_per_chunk,) * full + ((rest,) if rest else ())

    def block(block_info: dict[None, Any]) -> NDArray[Any]:
        (start, stop), _ = block_info[None]["array-location"]
        return read(start, stop)

    return da.map_blocks(block, chunks=(rows, (width,)), dtype=dtype, meta=np.empty((0, 0), dtype))


def _get(tasks: int, threads: int) -> Callable[..., Any]:
    choice = dask.config.get("scheduler", None) or dask.config.get("pool", None)
    if isinstance(choice, str):
        choice = dask.base.named_schedulers.get(choice.lower())
    # Not a subclass: an executor of processes or interpreters would not share this memory.
    if type(choice) in (ThreadPoolExecutor, dask.local.SynchronousExecutor):
        return partial(dask.local.get_async, choice.submit, getattr(choice, "_max_workers", threads))
    if choice in (dask.get, dask.local.get_sync):
        return partial(dask.local.get_sync)
    return partial(dask.local.get_async, _Shared(tasks, threads).submit, tasks, chunksize=1)


class _Helpers:
    """Threads that work for one calling thread, on other cores than its own."""

    def __init__(self, threads: int) -> None:
        self._ids: list[int] = []
        note = partial(
            _note_thread, self._ids
        )  # not a method: threads that refer to this object would never end
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="helper", initializer=note)
        self._idle_since = 0.0
        self._cores: set[int] = set()

    def keep_off(self) -> None:
        """Make threads that sleep wake on other cores than that of the calling thread, which is about to work too.

        Linux wakes a thread on the core of its waker if no core seems to be idle, and moves it milliseconds later. A
        sleeping core of a virtual machine does not count as idle (``vcpu_is_preempted``), so after a rest a whole batch
        would run on one core. Once awake, a thread may run on every core that the calling thread may.
        """
        self._cores = set()
        if time.monotonic() - self._idle_since > REST_S:
            self._cores = os.sched_getaffinity(0)
            others = self._cores - {_getcpu()}
            for thread in self._ids:
                _keep_to(thread, others)

    def submit(self, work: Callable[[], None]) -> None:
        """Let one of the threads do some work."""
        self._pool.submit(self._do, work, self._cores)

    def _do(self, work: Callable[[], None], cores: set[int]) -> None:
        if cores:
            _keep_to(_THIS_THREAD, cores)
        work()
        self._idle_since = time.monotonic()


class _Workers(threading.local):
    """The helpers of this thread, which end after it. One thread's long tasks could fill a shared pool."""

    def __init__(self) -> None:
        self._helpers: dict[int, _Helpers] = {}

    def helpers(self, threads: int) -> _Helpers:
        if threads not in self._helpers:
            self._helpers[threads] = _Helpers(threads)
        self._helpers[threads].keep_off()
        return self._helpers[threads]


_workers = _Workers()


def _note_thread(ids: list[int]) -> None:
    ids.append(threading.get_native_id())


def _keep_to(thread: int, cores: set[int]) -> None:
    with contextlib.suppress(OSError):  # no core, or none that it may use any more: it stays where it is
        os.sched_setaffinity(thread, cores)


class _Shared:
    """Work that the calling thread shares with others. Its `submit` is what dask expects of an executor.

    The last `submit` does tasks itself, and returns when none is left to begin.

    Parameters
    ----------
    tasks : int
        How many will be submitted.
    threads : int
        How many tasks run concurrently, one of them in the calling thread.
    """

    def __init__(self, tasks: int, threads: int) -> None:
        self._to_come = tasks
        self._others = min(threads, tasks) - 1
        self._helpers = _workers.helpers(threads - 1) if self._others else None
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:  # noqa: ANN401
        future: Future[Any] = Future()
        self._waiting.append((future, partial(function, *arguments)))
        self._to_come -= 1
        if self._helpers is not None and self._others:
            self._others -= 1
            # Where no thread can be started, for want of memory or at exit, the calling thread does all of it.
            with contextlib.suppress(RuntimeError):
                self._helpers.submit(self._work)
        if self._to_come == 0:
            self._work()
        return future

    def _work(self) -> None:
        """Do tasks that wait, until none does."""
        while True:
            try:
                future, task = self._waiting.popleft()
            except IndexError:
                return
            try:
                result = task()
            except BaseException as error:  # raised again where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(result)
