"""The rows that a concurrent writer has filled: a reader shows them as never written, as they are in its commit."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.forks import usable_in_child

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.format.fill_records import Fill, Filled
    from shardemb.format.spec import TableSpec


class HiddenRows:
    """What a writer may have filled since the commit that a reader sees. Safe from any thread.

    A writer counts up a number after it has named a fill and before it writes the first byte of it. Once a fill is
    known, its rows stay hidden: whatever becomes of them, the reader's commit does not have them.

    Parameters
    ----------
    count : callable
        Returns that number now.
    read : callable
        Returns the fills that the writer names now.
    """

    def __init__(self, count: Callable[[], int], read: Callable[[], Iterable[Fill]]) -> None:
        self._count, self._read = count, read
        self._lock = threading.RLock()
        self._seen: int | None = None
        self._fills: dict[str, set[Fill]] = {}
        self._committed: dict[str, tuple[Filled, ...]] = {}

    def show(self, spec: TableSpec, committed: tuple[Filled, ...]) -> None:
        """Do not hide what the reader's commit has of a table."""
        self._committed[spec.uuid] = committed

    def look(self, spec: TableSpec) -> tuple[int | None, int]:
        """Learn what the writer has begun meanwhile; return what changes when there is anything new about a table."""
        with self._lock:
            now = self._count()
            if now != self._seen:
                for each in self._read():
                    self._fills.setdefault(each.table, set()).add(each)
                self._seen = now
            return self._seen, len(self._fills.get(spec.uuid, ()))

    def contain(self, spec: TableSpec, rows: Int64Array) -> NDArray[np.bool_]:
        """Return for each row of a table whether it is hidden, unless it is in a slot."""
        found = np.zeros(rows.size, np.bool_)
        for fills, hidden in (
            (tuple(self._fills.get(spec.uuid, ())), True),
            ([each.fill for each in self._committed.get(spec.uuid, ())], False),
        ):
            for each in fills:
                start, stop = each.rows(spec.record_bytes)
                found[(rows >= start) & (rows < stop)] = hidden
        return found

    def detach_in_child(self) -> None:
        """Be usable in a forked child, whatever other threads did in its parent."""
        self._lock = usable_in_child(self._lock)
