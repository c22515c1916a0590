"""Runs tasks through dask, the only room that imports it.

The tasks of a batch work on memory mapped into this process, so they run on threads here: dask's threaded
scheduler, or what ``dask.config`` asks for if that runs in this process too (the synchronous one, or an executor
of threads). An active distributed client and the process scheduler are not used.
"""

from __future__ import annotations

import os
from concurrent.futures import Executor, ProcessPoolExecutor
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


def run(tasks: Sequence[Callable[[], T]], threads: int) -> list[T]:
    """Run tasks and return their results in order, once all have ended.

    A single task runs in the calling thread, and so do all tasks in a forked process. Should tasks raise, the first
    one's error is raised, also after all have ended: nothing goes on behind the caller's back.
    """
    if len(tasks) < 2 or os.getpid() != _PID:  # the threads of a pool do not survive a fork
        return [task() for task in tasks]
    # A plain dict graph: dask.compute on delayed objects costs five times as much.
    graph = {("shardemb", k): (_guarded, task) for k, task in enumerate(tasks)}
    outcomes = _get(threads)(graph, list(graph))
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


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


def _guarded(task: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return task(), None
    except BaseException as error:
        return None, error


def _get(threads: int) -> Callable[..., Any]:
    choice = dask.config.get("scheduler", None)
    if isinstance(choice, str):
        choice = dask.base.named_schedulers.get(choice.lower())
    if isinstance(choice, Executor) and not isinstance(choice, ProcessPoolExecutor):
        return partial(dask.local.get_async, choice.submit, getattr(choice, "_max_workers", threads))
    if choice in (dask.get, dask.local.get_sync):
        return partial(dask.local.get_sync)
    return partial(dask.threaded.get, num_workers=threads)
