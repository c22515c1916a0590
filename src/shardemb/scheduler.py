"""Runs tasks through dask, the only room that imports it.

The tasks of a batch work on memory mapped into this process, so they run on threads here: dask's threaded
scheduler, or what ``dask.config`` asks for if that runs in this process too (the synchronous one, or an executor
of threads). An active distributed client and the process scheduler are not used.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import dask
import dask.base
import dask.local
import dask.system
import dask.threaded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from dask.array import Array
    from numpy.typing import NDArray

T = TypeVar("T")

_PID = os.getpid()

CORES: int = dask.system.CPU_COUNT
"""Cores that this process may use, as dask counts them (affinity and cgroup limits included)."""


def run(tasks: Sequence[Callable[[], T]], threads: int, stop: threading.Event | None = None) -> list[T]:
    """Run tasks so that none of them is still running when this returns or raises.

    A Ctrl-C comes to the thread that waits, and those that do the work know nothing of it: they are waited for.

    Parameters
    ----------
    tasks : sequence of callable
        What to run. A task that takes long looks at `stop` now and then, and returns early if it is set. A single
        task runs in the calling thread, and so do all tasks in a forked process.
    threads : int
        How many run side by side.
    stop : threading.Event, optional
        Set as soon as a task fails or the waiting is interrupted. Tasks that have not begun by then never will.

    Returns
    -------
    list
        The tasks' results, in order. Should tasks raise, the first error is raised instead.

    Examples
    --------
    >>> run([lambda: 1, lambda: 2], threads=2)
    [1, 2]
    """
    if len(tasks) < 2 or os.getpid() != _PID:  # the threads of a pool do not survive a fork
        return [task() for task in tasks]
    stop = stop or threading.Event()
    begun: list[Future[None]] = [Future() for _ in tasks]

    def guarded(future: Future[None], task: Callable[[], T]) -> T | None:
        if not future.set_running_or_notify_cancel():
            return None
        try:
            return task()
        except BaseException:
            stop.set()
            raise
        finally:
            future.set_result(None)

    # A plain dict graph: dask.compute on delayed objects costs five times as much.
    graph = {
        ("shardemb", k): (guarded, future, task)
        for k, (future, task) in enumerate(zip(begun, tasks, strict=True))
    }
    try:
        return list(_get(threads)(graph, list(graph)))
    except BaseException:
        stop.set()
        wait([future for future in begun if not future.cancel()])
        raise


def as_array(
    read: Callable[[int, int], NDArray[np.float32]], num_rows: int, width: int, rows_per_chunk: int
) -> Array:
    """Make a dask array whose chunks call ``read(start, stop)`` when they are computed."""
    import dask.array as da
    import numpy as np

    full, rest = divmod(num_rows, rows_per_chunk)
    rows = (rows_per_chunk,) * full + ((rest,) if rest else ())

    def block(block_info: dict[None, Any]) -> NDArray[np.float32]:
        (start, stop), _ = block_info[None]["array-location"]
        return read(start, stop)

    return da.map_blocks(block, chunks=(rows, (width,)), dtype=np.float32, meta=np.empty((0, 0), np.float32))


def _get(threads: int) -> Callable[..., Any]:
    choice = dask.config.get("scheduler", None)
    if isinstance(choice, str):
        choice = dask.base.named_schedulers.get(choice.lower())
    # No subclass: an executor of processes or interpreters does not share this memory.
    if type(choice) in (ThreadPoolExecutor, dask.local.SynchronousExecutor):
        return partial(dask.local.get_async, choice.submit, getattr(choice, "_max_workers", threads))
    if choice in (dask.get, dask.local.get_sync):
        return partial(dask.local.get_sync)
    return partial(dask.threaded.get, num_workers=threads)
