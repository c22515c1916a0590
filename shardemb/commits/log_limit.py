"""How much of the disk the log of a store may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

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
    path : Path
        The store's folder.
    log_bytes : int or None
        What the opening says.
    memory_budget : int
        Bytes.
    mapped_bytes : callable
        Returns how many bytes all tables of the store map.
    """

    def __init__(
        self, path: Path, log_bytes: int | None, memory_budget: int, mapped_bytes: Callable[[], int]
    ) -> None:
        self._path, self._log_bytes = path, log_bytes
        self._memory_budget, self._mapped_bytes = memory_budget, mapped_bytes

    def is_exceeded(self, nbytes: int, in_log: int) -> bool:
        """Return whether a log of that many bytes would be too large, if it has `in_log` bytes now."""
        if self._log_bytes is not None or nbytes <= LOG_BYTES:
            return nbytes > (self._log_bytes or LOG_BYTES)
        free = files.free_space(self._path) + in_log
        most = min(LOG_TABLES * self._mapped_bytes(), free // LOG_PART, self._memory_budget)
        return nbytes > max(LOG_BYTES, most)
