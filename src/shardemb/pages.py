"""Which pages of a private mapping are copies, which of these hold what the files do not, and which have no room.

A page of the mapping shows its file until it is written to; the kernel makes a copy then (`private`). A copy whose
rows all are in the file can be dropped. Others are *newer*: they hold changes that are not committed, or committed ones
that no fold has brought into the files. To make room these go *out*: the scratch file keeps them, and in memory their
place shows the older content of the file, where nobody may look.

``newer`` and ``_folding`` tell apart what changed since the running fold began, and before.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

import numpy as np

from shardemb import bitmaps, files, kernels, plan
from shardemb.scratch import Scratch
from shardemb.spec import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.arrays import Int64Array

_NO_BITMAP = np.empty(0, np.uint8)
_NO_PAGES = np.empty(0, np.int64)


class Room(Protocol):
    """Who keeps the copies of all tables of a store within its memory budget."""

    def has_room(self, pages: int) -> bool:
        """Whether so many more copies are within the budget."""

    def make_room(self, pages: int) -> None:
        """Make room for so many copies; may let go of the store's lock to wait for a fold.

        Raises
        ------
        DiskFullError, OSError
            There is none, nor in the scratch file.
        """

    def spill(self, pages: int) -> None:
        """As `make_room`, without a fold: the lock stays held."""


class Unlimited(Room):
    """Room for all, in a store that makes no copies but of committed rows."""

    def has_room(self, pages: int) -> bool:
        """There always is."""
        return True

    def make_room(self, pages: int) -> None:
        """Nothing has to be done."""

    def spill(self, pages: int) -> None:
        """Nothing has to be done."""


class Pages:
    """The pages of one mapping. Everything is under the store's lock.

    Parameters
    ----------
    memory : AddressRange
        The mapping.
    record_bytes : int
        Bytes of a row, the first of which begins where the mapping does.

    Attributes
    ----------
    count, out : int
        Pages that are copies in memory, and pages that are out.
    """

    def __init__(self, memory: files.AddressRange, record_bytes: int) -> None:
        self._memory = memory
        self._record_bytes = record_bytes
        self._total = memory.nbytes // PAGE
        self.private = self._bitmap()
        self.newer = self._bitmap()
        self._folding = self._bitmap()
        self._scratch: Scratch | None = None
        self._hand = 0
        self.count = self.out = self._changes = 0
        self._rewinding = False

    @property
    def version(self) -> int | None:
        """A number that is the same as long as memory shows all that the table holds; None while it does not.

        A lookup without the store's lock compares it before and after.
        """
        return None if self.out or self._rewinding else self._changes

    # ---- copies

    def mark(self, rows: Int64Array) -> None:
        """Note that rows are about to change."""
        self.count += bitmaps.mark_private(rows, self._record_bytes, self.private)
        bitmaps.mark_private(rows, self._record_bytes, self.newer)

    def copy(self, rows: Int64Array) -> None:
        """Copy the pages of ascending rows, so that an update finds them ready."""
        self.bring_back(rows, to_change=False)
        self._advise(rows, self._record_bytes, files.MADV_POPULATE_WRITE)
        self.count += bitmaps.mark_private(rows, self._record_bytes, self.private)

    def drop(self, first: int, last: int) -> None:
        """Let pages ``first:last`` show what the files hold."""
        pages = np.arange(first, last)
        if self._scratch is not None:
            self._forget(first + np.flatnonzero(self._scratch.slots[first:last]))
        self._memory.advise(first * PAGE, (last - first) * PAGE, files.MADV_DONTNEED)
        self.count -= bitmaps.clear_bits(self.private, pages)

    def drop_clean(self, first: int, last: int) -> None:
        """Let pages ``first:last`` leave memory, if none of those beside them holds what the files do not."""
        words = slice(first // 64, -(-last // 64))
        if not (self.newer[words].any() or self._folding[words].any()):
            self.drop(first, last)

    @contextlib.contextmanager
    def rewinding(self) -> Iterator[None]:
        """Tell lookups to wait for the lock, while pages are dropped and put together anew."""
        self._changes += 1
        self._rewinding = True
        yield
        self._rewinding = False  # unless it broke off

    # ---- folds

    def begin_fold(self, changed: Int64Array) -> None:
        """Note which pages hold what is folded now; those with uncommitted changes (runs) stay newer all the same."""
        self._folding, self.newer = self.newer, self._bitmap()
        bitmaps.set_runs(self.newer, changed)

    def end_fold(self, *, folded: bool) -> None:
        """Forget the note of `begin_fold`; or take it back, where the files do not hold those pages."""
        if not folded:
            words = np.flatnonzero(self._folding)
            self.newer[words] |= self._folding[words]
        self._folding = self._bitmap()

    def drop_folded(self) -> None:
        """Let go of the copies of which the files hold every row, in memory and in the scratch file."""
        if self._scratch is not None:
            self._forget(bitmaps.idle_pages(self._scratch.kept, self.newer, self._folding))
        self._leave(bitmaps.idle_pages(self.private, self.newer, self._folding))

    # ---- room

    def at_most(self, rows: Int64Array) -> int:
        """Pages that rows lie on, or more."""
        return rows.size * (2 + (self._record_bytes - 2) // PAGE)

    def count_new(self, rows: Int64Array) -> int:
        """Count the pages of ascending rows that are no copies in memory yet."""
        return int(np.count_nonzero(~self._in_memory(plan.pages(rows, self._record_bytes))))

    def count_out(self, rows: Int64Array) -> int:
        """Count the pages of ascending rows that are out."""
        return self._kept(rows)[1].size

    def page_out(self, count: int, folder: Path) -> None:
        """Let `count` copies leave memory for the scratch file, those first that were passed over longest.

        Raises
        ------
        DiskFullError, OSError
            They stay in memory.
        """
        pages = bitmaps.list_bits(self.private, self._hand, count)
        pages = np.union1d(pages, bitmaps.list_bits(self.private, 0, count - pages.size))
        if self._scratch is None:
            self._scratch = Scratch(folder, self._memory)
        self._scratch.write(pages[self._scratch.slots[pages] == 0])
        self._hand = int(pages[-1] + 1) % self._total if pages.size else 0
        self.take_out(pages)

    def take_out(self, pages: Int64Array) -> None:
        """Let copies leave memory that the scratch file keeps."""
        if pages.size == 0:
            return
        self._changes += 1  # before the first is gone
        self.out += pages.size
        self._leave(pages)

    def bring_back(self, rows: Int64Array, *, to_change: bool) -> Int64Array:
        """Bring those pages of ascending rows back that are out, and return them.

        The scratch file keeps them all the same, unless they are about to change.

        Raises
        ------
        OSError
            The scratch file cannot be read. The pages stay out.
        """
        if self._scratch is None:
            return _NO_PAGES
        kept, pages = self._kept(rows)
        self._scratch.read(pages)
        self.count += bitmaps.mark_private(pages, PAGE, self.private)
        self.out -= pages.size
        if to_change:
            self._scratch.release(kept)
        return pages

    # ---- within

    def _bitmap(self) -> NDArray[np.uint64]:
        return files.zeros(np.uint64, -(-self._total // 64))

    def _leave(self, pages: Int64Array) -> None:
        """Let pages leave memory."""
        self._advise(pages, PAGE, files.MADV_DONTNEED)
        self.count -= bitmaps.clear_bits(self.private, pages)

    def _forget(self, pages: Int64Array) -> None:
        """Let go of what the scratch file keeps of pages."""
        if self._scratch is not None:
            self.out -= int(np.count_nonzero(~self._in_memory(pages)))
            self._scratch.release(pages)

    def _kept(self, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
        """List the pages of ascending rows that the scratch file keeps, and those of them that are out."""
        if self._scratch is None:
            return _NO_PAGES, _NO_PAGES
        pages = plan.pages(rows, self._record_bytes)
        kept: Int64Array = pages[self._scratch.slots[pages] != 0]
        return kept, kept[~self._in_memory(kept)]

    def _in_memory(self, pages: Int64Array) -> NDArray[np.bool_]:
        bits: NDArray[np.bool_] = (self.private[pages >> 6] >> (pages & 63).astype(np.uint64)) % 2 == 1
        return bits

    def _advise(self, rows: Int64Array, row_bytes: int, advice: int) -> None:
        kernels.advise(self._memory.address, row_bytes, _NO_BITMAP, rows, advice, 0, rows.size)
