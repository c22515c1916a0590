"""The memory budget of a store: how much memory the rows in slots may take, and what happens when they take more.

Then memory is freed in this order: clean rows, of which the files hold the same, are evicted; committed rows are folded
into the files and then evicted; the rest is spilled to a file.

How much memory there is, and how much of it is free, the kernel says of the machine (``/proc/meminfo``) and of each
control group that the process is in, of either version.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from shardemb.base.interrupts import signals_deferred
from shardemb.errors import DiskFullError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from shardemb.base.validation import Int64Array
    from shardemb.format.spec import TableSpec
    from shardemb.memory.overlay import Overlay


_log = logging.getLogger("shardemb")


def total_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process can have at most: the machine's, or the limit of a control group.

    `root` is where ``proc`` and ``sys`` are.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(group.limit for group in _control_groups(root))])


def available_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process can still have, counting what holds copies of files; 0 if nothing says so.

    `root` is as in `total_bytes`.
    """
    machine = 1024 * _numbers(root / "proc/meminfo").get("MemAvailable:", 0)
    return max(0, min([machine, *(group.limit - group.used for group in _control_groups(root))]))


class _ControlGroup(NamedTuple):
    """Limits the memory of some processes. What holds copies of files does not count as used."""

    limit: int
    used: int


def _control_groups(root: Path) -> Iterator[_ControlGroup]:
    """Yield the groups with a limit that this process is in, with those around them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, kinds, path = line.split(":", 2)
        if number == "0" and not kinds:
            top, names, cached = root / "sys/fs/cgroup", _VERSION_2, ("active_file", "inactive_file")
        elif "memory" in kinds.split(","):
            top, names = root / "sys/fs/cgroup/memory", _VERSION_1
            cached = ("total_active_file", "total_inactive_file")
        else:
            continue
        # In a container, the path may be that outside of it; then only the top is found.
        inner = top / path.strip("/")
        for folder in (inner, *(each for each in inner.parents if each.is_relative_to(top))):
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
            except (OSError, ValueError):
                continue  # there is no such group, or it has no limit ("max")
            statistics = _numbers(folder / "memory.stat")
            yield _ControlGroup(limit, used - sum(statistics.get(each, 0) for each in cached))


_VERSION_1, _VERSION_2 = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ("memory.max", "memory.current"),
)


def _numbers(path: Path) -> dict[str, int]:
    """Read a file of the kernel whose lines are names and numbers."""
    try:
        lines = (line.split() for line in path.read_text().splitlines())
        return {words[0]: int(words[1]) for words in lines if len(words) > 1}
    except (OSError, ValueError):
        return {}


class Folds(Protocol):
    """Moves committed rows from the log into the files. Each call may release the store's lock while it waits."""

    def wait(self) -> None:
        """Wait for a commit that is under way, and for a fold that is running.

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
            The fold failed.
        """

    def try_to_drain(self) -> None:
        """As `drain`, but fold only once; an error of the fold is left to the next commit.

        Raises
        ------
        StoreClosedError
            The store was closed meanwhile.
        """

    def supplement(self, spec: TableSpec, ids: Int64Array, pack: Callable[[int, int, int], None]) -> None:
        """Log records that are what the last commit has implicitly, then `drain`.

        Raises
        ------
        ShardEmbError
            The table is not part of the last commit.
        DiskFullError, OSError, PoisonedError
            They could not be logged or folded.
        """


class NoFolds:
    """The folds of a store that is open for reading, in which nothing is ever committed."""

    def wait(self) -> None:
        """Do nothing: no fold ever runs."""

    def drain(self) -> None:
        """Do nothing: there is nothing to fold."""

    def try_to_drain(self) -> None:
        """Do nothing: there is nothing to fold."""

    def supplement(self, spec: TableSpec, ids: Int64Array, pack: Callable[[int, int, int], None]) -> None:
        """Do nothing: only writers call this."""


class MemoryBudget:
    """Keeps the rows in slots of all tables of a store within a number of bytes. Callers hold the store's lock.

    Parameters
    ----------
    nbytes : int
        The budget.
    overlays : callable
        Returns the overlays of all tables.
    folds : Folds, optional
        None in a store that is open for reading.
    spill_folder : Path, optional
        Where spill files are created. Needed once the budget is exceeded.
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
        self._unused = 0

    def has_room(self, nbytes: int) -> bool:
        """Return whether `nbytes` more are within the budget. If so, the caller may take them."""
        # To sum over thousands of tables takes longer than a small update. So what was left at the last sum is granted
        # piece by piece: less is left, as callers rarely take as much as they ask for, but never more.
        if nbytes > self._unused:
            self._unused = -self._excess(0)
        self._unused -= nbytes
        return self._unused >= 0

    def make_room(self, nbytes: int) -> None:
        """Free memory until `nbytes` more are within the budget; may release the store's lock to wait for a fold.

        A fold needs the lock when it ends, so to wait for one is to release the lock, however often it is held. When
        this returns, other threads may have committed, moved rows or changed tables: callers look at them again.

        Raises
        ------
        DiskFullError, OSError
            Rows have to be spilled, and cannot be.
        StoreClosedError
            The store was closed meanwhile.
        """
        # The cheapest first. A fold that is running may free enough, so no second one is begun before it has ended.
        if self.evict(nbytes):
            return
        self._folds.wait()
        if self.evict(nbytes):
            return
        self._folds.try_to_drain()
        self.spill(nbytes)

    def evict(self, nbytes: int) -> bool:
        """Evict clean rows if need be; return whether `nbytes` more are within the budget then."""
        overlays, self._unused = self._overlays(), 0
        with signals_deferred():
            if self._excess(nbytes) > 0:
                clean = {each: each.slots.count - each.slots.dirty for each in overlays}
                # A little more than is needed, so that it is done less often.
                for each, count in _shares(self._excess(nbytes) + self._nbytes // 32, clean):
                    each.evict(count)
            # The memory of free slots between used ones is not released, and not counted above. Moving rows to release
            # it is worth the time once it is over half of the budget, and the budget is exceeded with it.
            idle = sum(each.idle_bytes for each in overlays)
            if idle > self._nbytes // 2 and self._excess(nbytes + idle) > 0:
                for each in overlays:
                    each.compact()
        return self._excess(nbytes) <= 0

    def spill(self, nbytes: int) -> None:
        """As `make_room`, but without waiting for a fold: the lock stays held."""
        if not self.evict(nbytes):
            try:  # more than is needed, so that it is done less often
                self._spill(self._excess(nbytes) + self._nbytes // 4)
            except DiskFullError:
                self._spill(self._excess(nbytes))

    @property
    def needs_fold(self) -> bool:
        """Whether dirty rows, which cannot be evicted before a fold, would take over half of the budget."""
        dirty = sum((each.slots.dirty + each.spilled) * each.row_bytes for each in self._overlays())
        return bool(2 * dirty > self._nbytes)

    def _spill(self, nbytes: int) -> None:
        assert self._spill_folder is not None
        with signals_deferred():
            for each, count in _shares(nbytes, {each: each.slots.count for each in self._overlays()}):
                each.spill(count, self._spill_folder)
        _log.info("spilled %d bytes of rows of %s to disk", nbytes, self._spill_folder.parent)

    def _excess(self, nbytes: int) -> int:
        return nbytes + sum(each.nbytes for each in self._overlays()) - self._nbytes


def _shares(nbytes: int, rows: Mapping[Overlay, int]) -> list[tuple[Overlay, int]]:
    """Return how many of each table's `rows` to remove from memory to free `nbytes`: the same share of each table."""
    most = sum(count * each.slot_bytes for each, count in rows.items())
    share = min(1.0, nbytes / most) if most else 0.0
    return [(each, math.ceil(count * share)) for each, count in rows.items() if count]
