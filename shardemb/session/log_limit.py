"""How much of the disk the log of a store may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards

LOG_BYTES = 2**30
"""The least that the log may take if nothing was said, whatever the tables and the disk have."""

LOG_TABLES, LOG_PART = 3, 8
"""If nothing was said, the log may take this many times what the tables map, but one such part of the free space.

So two commits of a whole table do not wait for a fold, and a fold that begins at half of it writes most blocks once.
Nor may it take more than the memory budget, because a reader of a crashed store has all of it in memory.
"""


class LogLimit:
    """How much the log may take: what the opening says, or a share of what tables, disk and memory have.

    Parameters
    ----------
    runtime : Runtime
        Has `log_bytes`, the memory budget, and the store's path.
    tables : callable
        Returns all tables of the store by uuid.
    """

    def __init__(self, runtime: Runtime, tables: Callable[[], Mapping[str, Shards]]) -> None:
        self._runtime, self._tables = runtime, tables

    def is_exceeded(self, nbytes: int, in_log: int) -> bool:
        """Return whether a log of that many bytes would be too large, if it has `in_log` bytes now."""
        runtime = self._runtime
        if runtime.log_bytes is not None or nbytes <= LOG_BYTES:
            return nbytes > (runtime.log_bytes or LOG_BYTES)
        mapped = sum(each.spec.num_shards * each.spec.shard_bytes for each in self._tables().values())
        free = files.free_space(runtime.path) + in_log
        return nbytes > max(LOG_BYTES, min(LOG_TABLES * mapped, free // LOG_PART, runtime.memory_budget))
