"""The blocks that were overwritten since a tag was made: a reader of the tag has their old content in memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from shardemb.base.forks import usable_in_child
from shardemb.base.sizes import PAGE
from shardemb.errors import StaleReaderError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.format.spec import TableSpec

    Records = NDArray[np.void]


def put_back(
    spec: TableSpec,
    records: NDArray[np.uint8],
    present: NDArray[np.uint8],
    blocks: Int64Array,
    content: NDArray[np.uint8],
) -> None:
    """Let blocks of a table have another content than its files, in this process.

    Parameters
    ----------
    spec : TableSpec
    records, present : ndarray of uint8
        The files, mapped privately.
    blocks : ndarray of int64, shape (n,)
        Numbers among all blocks of the table.
    content : ndarray of uint8, shape (n, PAGE)
    """
    first = spec.num_shards * spec.shard_bytes // PAGE  # of the presence bitmap
    in_rows = blocks < first
    records.reshape(-1)[: first * PAGE].reshape(-1, PAGE)[blocks[in_rows]] = content[in_rows]
    if not in_rows.all():
        present.reshape(-1, PAGE)[blocks[~in_rows] - first] = content[~in_rows]


class PastBlocks:
    """What a reader of a tag puts over the files. Safe from any thread.

    A writer keeps the old content of blocks, then counts up a number, then overwrites them. So rows that were read
    between two equal numbers are those of the tag. Each block that was overwritten takes 4,096 bytes of memory.

    Parameters
    ----------
    count : callable
        Returns that number now; negative once the tag was released.
    read : callable
        ``read(start)`` yields the records of kept blocks from number `start` on, some at a time.
    name : str
        The tag, for errors.
    """

    def __init__(self, count: Callable[[], int], read: Callable[[int], Iterator[Records]], name: str) -> None:
        self._count, self._read, self._name = count, read, name
        self._lock = threading.RLock()
        self._seen: int | None = None
        self._records = 0
        self._put: Callable[[Records], None] | None = None

    def show(self, put: Callable[[Records], None]) -> None:
        """Begin to put blocks over the files: ``put(records)`` does it."""
        self._put = put
        self.look()

    def look(self) -> int:
        """Learn what was overwritten meanwhile; return what changes when anything is.

        Raises
        ------
        StaleReaderError
            The tag was released.
        FormatError, OSError
            What was kept cannot be read.
        """
        now = self._count()
        if now == self._seen:
            return now
        with self._lock:
            now = self._count()
            if now < 0:
                msg = (
                    f"the tag {self._name!r} was released or moved since it was opened; call store.refresh()"
                )
                raise StaleReaderError(msg)
            if self._put is not None:
                for records in self._read(self._records):
                    self._put(records)
                    self._records += records.size
                self._seen = now
            return now

    def detach_in_child(self) -> None:
        """Be usable in a forked child, whatever other threads did in its parent."""
        self._lock = usable_in_child(self._lock)
