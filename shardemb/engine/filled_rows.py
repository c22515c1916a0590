"""The rows of a table that were filled, which is: written to the files before a commit, or before a fold knows of them.

In a table with a presence bitmap, their bits are set in this process's memory alone until a fold has set them in the
files. A page of the bitmap in which that was done is private: it does not show what others write to the file. So after
each fold what the file has is added to it, and it is given back once no filled row needs it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.commits import fills
from shardemb.format.fill_records import joined
from shardemb.storage import address_space, files

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.format.fill_records import Fill, Filled
    from shardemb.format.spec import TableSpec
    from shardemb.format.table_files import TableLocation


class FilledRows:
    """What was filled in one table. All methods are called with the store's lock held.

    Parameters
    ----------
    spec : TableSpec
    memory : AddressRange
        The presence bitmap, mapped privately; empty if the table has none.

    Attributes
    ----------
    uncommitted, attempted, committed : list of Filled
        Fills that no commit has; those of a commit under way; those that a commit has, and that no fold has been
        through.
    """

    def __init__(self, spec: TableSpec, memory: address_space.AddressRange) -> None:
        self._spec, self._memory = spec, memory
        self._present: NDArray[np.uint8] = memory.array(np.uint8, (memory.nbytes,))
        self.uncommitted: list[Filled] = []
        self.attempted: list[Filled] = []
        self.committed: list[Filled] = []
        self._folding = 0
        self._private: set[int] = set()  # pages of the bitmap

    # ---- what there is

    @property
    def changes(self) -> int:
        """How many rows are in fills that no commit has, not even one under way."""
        return sum(stop - start for start, stop in self._rows(self.uncommitted))

    def unfinished(self) -> Iterator[Fill]:
        """Yield the fills that no commit has, as few as possible."""
        begun = (each.fill for each in (*self.uncommitted, *self.attempted))
        fills = sorted(begun, key=lambda fill: fill.first)
        yield from joined(fills, self._spec.record_bytes)

    def contain(self, rows: Int64Array) -> NDArray[np.bool_]:
        """Return for each row whether it is in a fill that no commit has, not even one under way."""
        found = np.zeros(rows.size, np.bool_)
        for start, stop in self._rows(self.uncommitted):
            found |= (rows >= start) & (rows < stop)
        return found

    def take_blocks(self, first: int, free: NDArray[np.bool_]) -> None:
        """Note in `free`, which is about blocks from `first` on, that those of fills are not free."""
        for each in self._all():
            free[each.fill.within(first)] = False

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the rows of each fill that no fold has been through, as start and stop."""
        yield from self._rows(self._all())

    def count_by_shard(self) -> Int64Array:
        """Count for each shard the rows in fills that no fold has been through."""
        counts, size = np.zeros(self._spec.num_shards, np.int64), self._spec.rows_per_shard
        for start, stop in self.ranges():
            for shard in range(start // size, -(-stop // size)):
                counts[shard] += min(stop, (shard + 1) * size) - max(start, shard * size)
        return counts

    # ---- changes

    def add(self, filled: Filled) -> None:
        """Note a fill that is about to be written."""
        self.uncommitted.append(filled)

    def show(self, filled: Filled) -> None:
        """Let lookups see the rows of a fill that was written."""
        self._show(filled, shown=True)

    def show_committed(self, filled: Iterable[Filled]) -> None:
        """Let lookups of a reader see the rows of fills that are committed, and that no fold has been through."""
        for each in filled:
            self.committed.append(each)
            self._show(each, shown=True)

    def freeze(self) -> None:
        """Let all fills that no commit has be part of a commit that begins."""
        self.attempted, self.uncommitted = self.uncommitted, []

    def end_commit(self, *, committed: bool) -> None:
        """End a commit; unless it has `committed` them, no commit has its fills."""
        if committed:
            self.committed += self.attempted
        else:
            self.uncommitted = self.attempted + self.uncommitted
        self.attempted = []

    def undo(self, table: TableLocation, done: Iterable[Filled]) -> None:
        """Make holes of fills that no commit has, durably, and forget them. No lookup runs without the lock.

        Raises
        ------
        OSError
            Some are left, and this can be called again.
        """
        for filled in done:
            fills.punch(table, filled.fill.first, filled.fill.stop)
            self._show(filled, shown=False)
            self.uncommitted = [each for each in self.uncommitted if each is not filled]
        self._refresh(table)

    # ---- folds

    def begin_fold(self) -> None:
        """Note that a fold of all that is committed begins."""
        self._folding = len(self.committed)

    def end_fold(self, table: TableLocation, *, folded: bool) -> None:
        """Note that the fold has ended. Rows that it wrote must not leave their slots before.

        Raises
        ------
        OSError
            The presence bitmap cannot be read.
        """
        if folded:
            del self.committed[: self._folding]
        self._folding = 0
        self._refresh(table)

    # ---- the presence bitmap

    def _show(self, filled: Filled, *, shown: bool) -> None:
        start, stop = filled.fill.rows(self._spec.record_bytes)
        if not self._present.size or start == stop:
            return
        first, last = start // 8, -(-stop // 8)
        rows = np.arange(8 * first, 8 * last)
        bits = np.packbits((rows >= start) & (rows < stop), bitorder="little")
        if shown:
            self._private |= set(range(first // PAGE, -(-last // PAGE)))
            self._present[first:last] |= bits
        else:
            self._present[first:last] &= ~bits

    def _refresh(self, table: TableLocation) -> None:
        """Add what the files have to private pages, and give back those that no fill needs."""
        rows = self._rows(self._all())
        needed = {
            page for start, stop in rows for page in range(start // 8 // PAGE, (stop - 1) // 8 // PAGE + 1)
        }
        per_chunk = self._spec.presence_chunk_bytes // PAGE
        for page in sorted(self._private):
            file = table.presence_chunk(page // per_chunk)
            with files.opened(file.path, os.O_RDONLY) as descriptor:
                data = files.read_at(descriptor, PAGE, page % per_chunk * PAGE, file.path)
            # Bits are only ever added, so that a lookup which does not hold the lock finds each row that is there.
            self._present[page * PAGE : (page + 1) * PAGE] |= np.frombuffer(data, np.uint8)
            if page not in needed:
                try:
                    self._memory.advise(page * PAGE, PAGE, address_space.MADV_DONTNEED)
                except OSError:  # it is locked, and stays private
                    continue
                self._private.discard(page)

    def _all(self) -> list[Filled]:
        return [*self.uncommitted, *self.attempted, *self.committed]

    def _rows(self, filled: Iterable[Filled]) -> Iterator[tuple[int, int]]:
        for each in filled:
            start, stop = each.fill.rows(self._spec.record_bytes)
            if start < stop:
                yield start, stop
