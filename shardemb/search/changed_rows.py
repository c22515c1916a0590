"""Which rows of a table may differ from what its files held at an earlier time, told by the checksums of their blocks.

A fold changes the checksum of a block before the block itself, and forgets that a row waits for it after both. So who
asks in that order, first for the rows that wait and then for the checksums, misses none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.storage import checksums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.engine.shards import Shards
    from shardemb.engine.table_state import TableState

WINDOW = 2**19
"""Blocks whose checksums are in memory at a time: 4 MiB, for 2 GiB of rows."""


def num_blocks(shards: Shards) -> int:
    """Return how many blocks the rows of a table have."""
    return shards.spec.num_shards * shards.spec.shard_bytes // PAGE


def windows(shards: Shards) -> Iterator[tuple[int, int]]:
    """Cut the blocks of a table into pieces, first and count."""
    total = num_blocks(shards)
    for first in range(0, total, WINDOW):
        yield first, min(WINDOW, total - first)


def sums(shards: Shards, first: int, count: int) -> NDArray[np.uint64]:
    """Read the checksums of blocks as they are now."""
    return checksums.read_sums(shards.location.checksums_path, first, count)


class ChangedRows:
    """Lists the rows that may have changed since some checksums of a table's blocks. Safe from any thread.

    In a writer, checksums are compared once after each fold: what changes in between waits for the next one, and is
    listed as such. Another process does not learn of folds, and compares each time.

    Parameters
    ----------
    table : TableState
    then : callable
        ``then(first, count)`` returns what the checksums of blocks were.
    """

    def __init__(self, table: TableState, then: Callable[[int, int], NDArray[np.uint64]]) -> None:
        self._table, self._then = table, then
        self._known: tuple[object, Int64Array] | None = None

    def list(self) -> Int64Array:
        """List the rows, ascending; all rows of a block that has changed count as changed.

        Raises
        ------
        OSError
            The checksums cannot be read.
        """
        runtime = self._table.runtime
        with runtime.lock:
            shards = self._table.live()
            fold = shards.last_fold
            filled = [np.arange(start, stop) for start, stop in shards.filled.ranges()]
            waiting = np.unique(np.concatenate([shards.overlay.dirty_rows(), *filled]))
        known = self._known
        if known is None or known[0] is not fold or not (runtime.writable and runtime.owned):
            # A fold that ends meanwhile has a new mark, so this is not taken for what is known after it.
            self._known = known = fold, self._in_files(shards)
        changed = np.union1d(waiting, known[1])
        return changed[changed < shards.spec.num_embeddings]

    def _in_files(self, shards: Shards) -> Int64Array:
        """List the rows in blocks whose checksums differ."""
        blocks = [
            first + np.flatnonzero(sums(shards, first, count) != self._then(first, count))
            for first, count in windows(shards)
        ]
        return rows_of(np.concatenate([np.empty(0, np.int64), *blocks]), shards.spec.record_bytes)


def rows_of(blocks: Int64Array, record_bytes: int) -> Int64Array:
    """List the rows of which a part is in blocks, ascending.

    Examples
    --------
    >>> rows_of(np.array([0, 2]), 3000)
    array([0, 1, 2, 3, 4])
    """
    first = blocks * PAGE // record_bytes
    counts = ((blocks + 1) * PAGE - 1) // record_bytes + 1 - first
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if ends.size else 0) - np.repeat(ends - counts, counts)
    return np.unique(np.repeat(first, counts) + within)
