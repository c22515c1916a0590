"""An attempt to commit, from its plan to its end: what it is about to make durable."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardemb.commits import fills, log_writer
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from threading import RLock

    from shardemb.base.validation import Int64Array
    from shardemb.engine.shards import Shards
    from shardemb.format.fill_records import Filled
    from shardemb.format.manifest import Manifest
    from shardemb.format.spec import TableSpec

    Fill = Callable[[Int64Array, int], None]


@dataclass(frozen=True)
class Images:
    """Images that go into the log: those of `count` rows of a table, which `fill` takes; see `Log.append_images`."""

    spec: TableSpec
    count: int
    fill: Fill


def changed_bytes(table: Shards) -> int:
    """Return about how many bytes a commit of a table's changes would append to the log."""
    filled = sum(8 * each.sums.size for each in table.filled.uncommitted)
    return table.overlay.changes * (8 + table.spec.record_bytes) + filled


def append(
    log: log_writer.Log,
    images: Sequence[Images],
    filled: Sequence[tuple[TableSpec, Filled]],
    manifest_bytes: int,
    manifests: int,
) -> None:
    """Append images and fills to the log, with space for the records of the manifest that follow.

    Raises
    ------
    DiskFullError
        There is no space; nothing was changed.
    OSError
        A write failed.
    """
    sizes = [(each.count, each.spec.record_bytes) for each in images]
    needed = log_writer.needed_bytes(sizes, manifest_bytes)
    needed += (manifests - 1) * log_writer.needed_bytes((), manifest_bytes)
    needed += sum(log_writer.needed_for_fill(each, spec.record_bytes) for spec, each in filled)
    log.begin(needed)
    for spec, fill in filled:
        log.append_fill(fill, spec.record_bytes)
    for each in images:
        log.append_images(each.spec.uuid, each.count, each.spec.record_bytes, each.fill)


class Attempt:
    """An attempt to commit. Callers hold the store's lock, unless a method says otherwise.

    Parameters
    ----------
    manifest : Manifest
        The manifest that it makes the last one.
    tables : iterable of Shards
        All tables; those with changes take part.
    new_set : bool
        Whether tables were created, dropped or renamed.
    mark_committed : callable
        Called once it is durable, before anything else can happen.

    Attributes
    ----------
    appends : bool
        Whether it has begun to append to the log; then no fold may begin.
    prepared : bool
        Whether it is durable in a partition, and waits for the decision of others.
    """

    def __init__(
        self,
        manifest: Manifest,
        tables: Iterable[Shards],
        *,
        new_set: bool,
        mark_committed: Callable[[], None],
    ) -> None:
        self.manifest = manifest
        self.payload = manifest.to_bytes()
        self.new_set = new_set
        self.appends = self.prepared = False
        self._tables = [each for each in tables if each.changes]
        self._mark_committed = mark_committed

    @property
    def nbytes(self) -> int:
        """About how many bytes it appends to the log."""
        frozen = [(each.spec, each.frozen) for each in self._tables]
        images = sum(rows.count * (8 + spec.record_bytes) for spec, rows in frozen if rows is not None)
        return images + sum(8 * each.sums.size for _, each in self.fills)

    @property
    def fills(self) -> list[tuple[TableSpec, Filled]]:
        """What was filled, with its tables; no lock needed once it is frozen."""
        return [(table.spec, each) for table in self._tables for each in table.filled.attempted]

    @property
    def filled_rows(self) -> int:
        """How many rows were filled."""
        ranges = [filled.fill.rows(spec.record_bytes) for spec, filled in self.fills]
        return sum(stop - start for start, stop in ranges)

    def sync_fills(self) -> None:
        """Make what was filled durable in the shards. No lock needed.

        Raises
        ------
        OSError
            The disk has failed.
        """
        paths = {
            file.path
            for table in self._tables
            for filled in table.filled.attempted
            for file, *_ in fills.parts(table.location, filled.fill.first, filled.fill.stop)
        }
        for path in sorted(paths):
            with files.opened(path, os.O_RDONLY) as descriptor:
                files.sync_data(descriptor, path)

    def freeze(self) -> None:
        """Let everything that differs from the last commit be part of this attempt, and nothing that changes later."""
        for each in self._tables:
            each.freeze()

    def images(self, lock: RLock) -> Sequence[Images]:
        """Return the images to append; the lock is taken while some of them are copied from memory."""

        def under_lock(fill: Fill) -> Fill:
            def locked(ids: Int64Array, address: int) -> None:
                with lock:
                    fill(ids, address)

            return locked

        frozen = [(each.spec, each.frozen) for each in self._tables]
        return [Images(spec, rows.count, under_lock(rows.fill)) for spec, rows in frozen if rows is not None]

    def succeed(self) -> None:
        """Note that it is durable."""
        for each in self._tables:
            each.end_commit(committed=True)
        self._mark_committed()

    def fail(self) -> None:
        """Let what it has not made durable count as changed again."""
        for each in self._tables:
            each.end_commit(committed=False)
