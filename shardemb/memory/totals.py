"""Counts of what was done with a table since it was opened."""

from __future__ import annotations

import threading

from shardemb.base.forks import usable_in_child


class Totals:
    """Counts of what was done with a table since it was opened.

    The methods are safe from any thread; the counts of changes and copied rows are added to under the store's lock.

    Attributes
    ----------
    lookups, rows_looked_up, cold_lookups : int
        Lookups, the ids in them, and how many lookups were cold.
    changes, rows_changed : int
        Updates and writes, and their distinct rows.
    rows_copied : int
        Rows that were copied into slots.
    bytes_requested : int
        Bytes of the pages that cold batches and prefetches asked for, whether or not some were in memory.
    bytes_warmed : int
        Bytes that were not in memory and were read to warm the table.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.lookups = self.rows_looked_up = self.cold_lookups = 0
        self.changes = self.rows_changed = self.rows_copied = 0
        self.bytes_requested = self.bytes_warmed = 0

    def detach_in_child(self) -> None:
        """Be usable in a forked child, whatever other threads did in its parent."""
        self._lock = usable_in_child(self._lock)

    def add_lookup(self, rows: int) -> None:
        """Count a lookup of that many ids."""
        with self._lock:
            self.lookups += 1
            self.rows_looked_up += rows

    def add_cold(self) -> None:
        """Count a lookup some of whose pages were not in memory."""
        with self._lock:
            self.cold_lookups += 1

    def add_bytes(self, *, requested: int = 0, warmed: int = 0) -> None:
        """Count bytes that were requested from the files, or read to warm the table."""
        with self._lock:
            self.bytes_requested += requested
            self.bytes_warmed += warmed
