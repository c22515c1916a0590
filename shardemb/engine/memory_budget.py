"""The memory budget of a store: how much memory rows may take that were changed, and what leaves when it is exceeded.

Rows leave in this order: copies of what the files hold are evicted; committed rows are folded into the files and then
evicted; what is left is spilled to a file.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from shardemb.base.interrupts import signals_deferred
from shardemb.errors import DiskFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from shardemb.base.validation import Int64Array
    from shardemb.engine.overlay import Overlay
    from shardemb.format.spec import TableSpec


class Folds(Protocol):
    """Moves committed rows from the log into the files. Each call may release the store's lock while it waits."""

    def wait(self) -> None:
        """Wait for a fold that is running.

        Raises
        ------
        StoreClosedError
            The store was closed meanwhile.
        """

    def drain(self) -> None:
        """Fold until the files hold the last commit of all tables.

        Raises
        ------
        DiskFullError, OSError, PoisonedError
            They cannot.
        """

    def try_to_drain(self) -> None:
        """As `drain`, once; errors of the fold are left to whoever commits next.

        Raises
        ------
        StoreClosedError
            The store was closed meanwhile.
        """

    def supplement(self, spec: TableSpec, ids: Int64Array, pack: Callable[[int, int, int], None]) -> None:
        """Log records that say no more than the last commit did, then `drain`.

        Raises
        ------
        ShardEmbError
            The table is not part of the last commit.
        DiskFullError, OSError, PoisonedError
            The files cannot take them.
        """


class NoFolds:
    """The folds of a store that is open for reading, in which nothing is ever committed."""

    def wait(self) -> None:
        """Nothing is running."""

    def drain(self) -> None:
        """The files hold what they should."""

    def try_to_drain(self) -> None:
        """The files hold what they should."""

    def supplement(self, spec: TableSpec, ids: Int64Array, pack: Callable[[int, int, int], None]) -> None:
        """Nobody asks for it."""


class MemoryBudget:
    """Keeps the rows in memory of all tables of a store within a number of bytes. Used under the store's lock.

    Parameters
    ----------
    nbytes : int
        The budget.
    overlays : callable
        Returns the rows in memory of all tables.
    folds : Folds
    spill_folder : Path, optional
        Where spilled rows go.
    """

    def __init__(
        self,
        nbytes: int = 2**63,
        overlays: Callable[[], Sequence[Overlay]] = tuple,
        folds: Folds | None = None,
        spill_folder: Path | None = None,
    ) -> None:
        self._nbytes = nbytes
        self._overlays = overlays
        self._folds = folds or NoFolds()
        self._spill_folder = spill_folder

    def has_room(self, nbytes: int) -> bool:
        """Whether so many more bytes are within the budget."""
        return self._excess(nbytes) <= 0

    def make_room(self, nbytes: int) -> None:
        """Make room for so many bytes; may release the store's lock while it waits for a fold.

        Raises
        ------
        DiskFullError, OSError
            Rows would have to be spilled, and cannot be.
        StoreClosedError
            The store was closed meanwhile.
        """
        if self.evict(nbytes):
            return
        self._folds.wait()
        if self.evict(nbytes):
            return
        self._folds.try_to_drain()
        self.spill(nbytes)

    def evict(self, nbytes: int) -> bool:
        """Evict copies of what the files hold, if need be; return whether there is room for so many bytes then."""
        overlays = self._overlays()
        with signals_deferred():
            if self._excess(nbytes) > 0:
                copies = {each: each.slots.count - each.slots.dirty for each in overlays}
                # A little more than is needed, so that it has to be done less often.
                for each, count in _shares(self._excess(nbytes) + self._nbytes // 32, copies):
                    each.evict(count)
            idle = sum(each.idle_bytes for each in overlays)
            if idle > self._nbytes // 2 and self._excess(nbytes + idle) > 0:
                for each in overlays:
                    each.compact()
        return self._excess(nbytes) <= 0

    def spill(self, nbytes: int) -> None:
        """As `make_room`, without a fold: the lock stays held."""
        if not self.evict(nbytes):
            try:
                self._spill(self._excess(nbytes) + self._nbytes // 4)
            except DiskFullError:  # more than is needed, so that it has to be done less often
                self._spill(self._excess(nbytes))

    @property
    def needs_fold(self) -> bool:
        """Whether rows that have to stay until they are folded take over half, so that others may soon have no room."""
        kept = sum((each.slots.dirty + each.spilled) * each.row_bytes for each in self._overlays())
        return bool(2 * kept > self._nbytes)

    def _spill(self, nbytes: int) -> None:
        assert self._spill_folder is not None
        with signals_deferred():
            for each, count in _shares(nbytes, {each: each.slots.count for each in self._overlays()}):
                each.spill(count, self._spill_folder)

    def _excess(self, nbytes: int) -> int:
        return nbytes + sum(each.nbytes for each in self._overlays()) - self._nbytes


def _shares(nbytes: int, rows: Mapping[Overlay, int]) -> list[tuple[Overlay, int]]:
    """Divide up how many of each table's rows have to leave memory so that so many bytes do."""
    most = sum(count * each.slot_bytes for each, count in rows.items())
    share = min(1.0, nbytes / most) if most else 0.0
    return [(each, math.ceil(count * share)) for each, count in rows.items() if count]
