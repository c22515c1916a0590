"""The writer's side of durability: commits go into the log, and folds move them into the shards.

::

    commit    wait where the log is full -> append images and the commit record -> one sync
    fold      close the segments (lock) -> write their images into the shards -> new base (lock) -> let segments go

A fold runs in a thread of its own and reads images from the log only, so training goes on beside it.
"""

from __future__ import annotations

import contextlib
import math
import threading
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from shardemb import files, fold, folders, log, replay
from shardemb.errors import DiskFullError, ShardEmbError
from shardemb.runtime import signals_deferred
from shardemb.spec import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from shardemb.arrays import Int64Array
    from shardemb.manifest import Manifest, TableRecord
    from shardemb.overlay import Overlay
    from shardemb.runtime import Runtime
    from shardemb.shards import Shards
    from shardemb.spec import TableSpec

    _Changed = tuple[TableSpec, Int64Array, Callable[[int, int, int], None]]

SEGMENTS = 16
"""Segments that make a full log."""


class Journal:
    """Base, log and fold of a store that is open for writing. Everything is under the store's lock.

    Parameters
    ----------
    runtime : Runtime
    base : Manifest
        What the shards hold. It is not published yet; `publish` does that.
    tables : callable
        Returns all tables of the store by uuid, those that no commit knows yet too.

    Attributes
    ----------
    manifest : Manifest
        As of the last commit.
    """

    def __init__(self, runtime: Runtime, base: Manifest, tables: Callable[[], Mapping[str, Shards]]) -> None:
        self._runtime = runtime
        self._tables = tables
        self.manifest = base
        self._base = base
        files.make_directory(folders.log(runtime.path))
        files.sync_directory(folders.private(runtime.path))
        self._log = log.Log(folders.log(runtime.path), base, runtime.log_bytes // SEGMENTS, SEGMENTS)
        self._condition = threading.Condition(runtime.lock)
        self._folding = False
        self._folding_bytes = 0
        self._problem: Exception | None = None
        self._thread: threading.Thread | None = None
        self._released = False

    # ---- commits

    def begin(self) -> None:
        """Publish the base, tell readers, and forget the log before it."""
        epoch = self._base.epoch.to_bytes(8, "little").ljust(PAGE, b"\0")
        files.overwrite(folders.epoch(self._runtime.path), epoch)
        self.publish(self._base)
        log.clear(folders.log(self._runtime.path), self._base.segment)

    def commit(
        self, manifest: Manifest, tables: Iterable[Shards], settled: Callable[[Manifest], None]
    ) -> None:
        """Make the changes of tables durable under a new manifest, and count them as changed no more.

        ``settled(manifest)`` is called once they are, before anything else can happen.

        Raises
        ------
        DiskFullError
            There is no room; nothing was changed.
        """
        runtime = self._runtime
        changes = [(table, table.changed_rows()) for table in tables if table.changes]
        created = {each.uuid for each in manifest.tables} - {each.uuid for each in self.manifest.tables}
        new_set = [(each.uuid, each.name) for each in manifest.tables] != [
            (each.uuid, each.name) for each in self.manifest.tables
        ]
        payload = manifest.to_bytes()
        if new_set:
            folders.require_places(runtime.path, manifest.tables, self._dropped(manifest))
        if created:
            with self._poisoned_by_errors():
                files.sync_tree(folders.parked(runtime.path, ""))
        self._append_images([(table.spec, ids, partial(table.pack, ids)) for table, ids in changes], payload)
        with signals_deferred():
            self._append_commit(payload)
            self.manifest = manifest
            for table, _ in changes:
                table.clear_changes()
            settled(manifest)
        if new_set:
            self.settle()
        elif self._log.nbytes > runtime.log_bytes // 2 or self._much_newer() or self._problem is not None:
            self._start()

    def wait_for_room(self, tables: Sequence[Shards]) -> None:
        """Wait until the log can take the changes of tables, by folding what it holds.

        Raises
        ------
        DiskFullError
            The shards have no room for that.
        """
        in_log = self._log.nbytes + self._folding_bytes
        if in_log and in_log + sum(map(_image_bytes, tables)) > self._runtime.log_bytes:
            problem = self.settle()
            if isinstance(problem, DiskFullError):
                raise problem

    def images(self) -> replay.Replay:
        """Read the images that are newer than the base."""
        return replay.read(folders.log(self._runtime.path), self._base, self._log.end)

    # ---- room

    def has_room(self, nbytes: int) -> bool:
        """Whether so many more bytes are within the memory budget."""
        return self._excess(nbytes) <= 0

    def make_room(self, nbytes: int) -> None:
        """Make room for so many bytes; see `Room`.

        What the files hold can leave. Where that is not enough, what is committed is folded first; the rest goes out.
        """
        if not self.spare(nbytes):
            self._wait()
            self._runtime.check_open()  # others may have come while it waited
            if not self.spare(nbytes):
                self.settle()
                self._runtime.check_open()
                self.spill(nbytes)

    def spill(self, nbytes: int) -> None:
        """As `make_room`, without a fold."""
        if not self.spare(nbytes):
            try:
                self._spill(self._excess(nbytes) + self._runtime.memory_budget // 4)
            except DiskFullError:  # more than is needed, so that it has to be done less often
                self._spill(self._excess(nbytes))

    def _spill(self, nbytes: int) -> None:
        with signals_deferred():
            for each, count in _shares(nbytes, {each: each.slots.count for each in self._overlays()}):
                each.spill(count, folders.private(self._runtime.path))

    def spare(self, nbytes: int) -> bool:
        """Let copies of what the files hold leave; return whether there is room for so many bytes then."""
        overlays = self._overlays()
        with signals_deferred():
            if self._excess(nbytes) > 0:
                copies = {each: each.slots.count - each.slots.kept for each in overlays}
                for each, count in _shares(self._excess(nbytes) + self._runtime.memory_budget // 32, copies):
                    each.evict(count)
            idle = sum(each.idle_bytes for each in overlays)
            if idle > self._runtime.memory_budget // 2 and self._excess(nbytes + idle) > 0:
                for each in overlays:
                    each.compact()
        return self._excess(nbytes) <= 0

    def _excess(self, nbytes: int) -> int:
        return nbytes + sum(each.nbytes for each in self._overlays()) - self._runtime.memory_budget

    # ---- folds

    def drain(self) -> None:
        """Fold until the files hold the last commit of all tables; see `Room`."""
        while True:
            problem = self.settle()
            if problem is not None:
                raise problem
            self._runtime.check_open()  # others may have come while it waited
            self._runtime.check_sound()
            if not self._log.nbytes:
                return

    def supplement(self, spec: TableSpec, ids: Int64Array, pack: Callable[[int, int, int], None]) -> None:
        """Bring records into the files that say no more than the last commit did; see `Room`.

        Through the log, under the last commit's manifest again: cut short anywhere, all of it is there or nothing.
        """
        if spec.uuid not in {each.uuid for each in self.manifest.tables}:
            msg = "the table is not part of the last commit; call store.commit() first"
            raise ShardEmbError(msg)
        payload = self.manifest.to_bytes()
        self._append_images([(spec, ids, pack)], payload)
        with signals_deferred():
            self._append_commit(payload)
        self.drain()

    def hold_folds(self) -> None:
        """Bring everything into the files, and let no fold begin until `release_folds`. Commits go on.

        Raises
        ------
        DiskFullError, OSError, PoisonedError
            It cannot be brought there.
        """
        self.drain()
        self._folding = True

    def release_folds(self) -> None:
        """End what `hold_folds` began."""
        with self._runtime.lock:
            self._folding = False
            self._condition.notify_all()

    def settle(self) -> Exception | None:
        """Fold all that is committed and wait for it; return what prevented it."""
        self._wait()
        if not self._runtime.poisoned:  # by the fold that this waited for
            self._problem = None
            self._start()
            self._wait()
        return self._problem

    def _wait(self) -> None:
        while self._folding:
            self._condition.wait()

    def _start(self) -> None:
        """Begin a fold, unless one is under way or there is nothing to do."""
        if self._folding or self._runtime.poisoned or self._released or not self._log.nbytes:
            return
        try:
            with signals_deferred():
                end = self._log.end
                closed = self._log.close_segments()
                self._folding_bytes, self._log.nbytes = self._log.nbytes, 0
                base = replace(
                    self.manifest,
                    segment=self._log.number,
                    sequence=self._log.sequence,
                    attempt=self._log.attempt + 1,
                    dropped=self._dropped(self.manifest),
                )
                tables = self._tables()
                live = [tables[each.uuid] for each in base.tables]
                for each in live:
                    each.begin_fold()
                self._folding = True
                arguments = base, end, closed, live
                self._thread = threading.Thread(target=self._fold, args=arguments, name="shardemb-fold")
                self._thread.start()
        except OSError as error:
            self._problem = error
            if not isinstance(error, DiskFullError):
                self._poison(error)

    def _fold(self, base: Manifest, end: tuple[int, int], closed: list[Path], live: list[Shards]) -> None:
        runtime, problem = self._runtime, None
        try:
            newer = replay.read(folders.log(runtime.path), self._base, end)
            fold.write(
                [(each.spec, each.directory, newer.images(each.spec)) for each in live], runtime.threads
            )
        except Exception as error:  # told by whoever waits for the fold
            problem = error
        with runtime.lock:
            try:
                if problem is None:
                    self.publish(base)
                    self._log.discard(closed)
            except Exception as error:
                problem = error
            try:
                for each in live:
                    each.overlay.end_fold(folded=problem is None)
                self.spare(0)
            except Exception as error:  # nobody may wait for this fold for ever
                problem = problem or error
            if problem is not None:
                self._log.nbytes += self._folding_bytes
                if not isinstance(problem, DiskFullError):
                    self._poison(problem)
            self._folding_bytes = 0
            self._problem = problem
            self._folding = False
            self._condition.notify_all()

    def publish(self, base: Manifest) -> None:
        """Say durably what the shards hold, and let the folders follow."""
        path, tables = self._runtime.path, self._tables()
        files.replace(folders.manifest(path), base.to_bytes())
        self._base = base
        try:
            self._follow(folders.arrange(path, base.tables, base.dropped, keep=tables.keys()))
        except OSError:  # some have moved
            self._follow(folders.locate(path, base.tables))
            raise
        self._base = replace(base, dropped=())  # they are gone

    def _follow(self, directories: Mapping[str, Path]) -> None:
        tables = self._tables()
        for uuid in directories.keys() & tables.keys():
            tables[uuid].directory = directories[uuid]

    def close(self) -> Exception | None:
        """Fold everything and leave no log behind; return what prevented it, in which case the log stays."""
        try:
            problem = self.settle()
            if problem is None and not self._runtime.poisoned:
                number, base = self._log.number, self._base
                base = replace(
                    base,
                    clean=True,
                    segment=number + 1,
                    sequence=self._log.sequence,
                    attempt=self._log.attempt + 1,
                    dropped=(),
                )
                self.publish(base)
                log.clear(folders.log(self._runtime.path), number + 1)
        except OSError as error:
            problem = error
        return problem

    def release(self) -> None:
        """Wait for a fold that is under way, and close the log."""
        self._wait()
        if self._thread is not None:
            self._thread.join()
        self._released = True
        self._log.close()

    def abandon(self) -> None:
        """Close the log and leave everything else as it is."""
        self._log.close()

    # ---- within

    def _dropped(self, manifest: Manifest) -> tuple[TableRecord, ...]:
        kept = {each.uuid for each in manifest.tables}
        gone = tuple(each for each in self._base.tables if each.uuid not in kept)
        return (*self._base.dropped, *gone)

    def _overlays(self) -> list[Overlay]:
        return [each.overlay for each in self._tables().values()]

    def _much_newer(self) -> bool:
        """Whether so many rows must stay in memory until they are folded that there may soon be no room for others."""
        kept = sum((each.slots.kept + each.out) * each.row_bytes for each in self._overlays())
        return bool(2 * kept > self._runtime.memory_budget)

    def _append_images(self, changes: Iterable[_Changed], payload: bytes) -> None:
        """Append the images of an attempt to commit, which the commit record `payload` is to end."""
        changes = list(changes)
        sizes = [(ids.size, spec.record_bytes) for spec, ids, _ in changes]
        with self._poisoned_by_errors():
            self._log.begin(log.needed_bytes(sizes, len(payload)))
            for spec, ids, pack in changes:
                self._log.append_images(spec.uuid, ids, spec.record_bytes, pack)

    def _append_commit(self, payload: bytes) -> None:
        try:
            self._log.append_commit(payload)
        except BaseException as error:
            self._poison(error)
            raise

    @contextlib.contextmanager
    def _poisoned_by_errors(self) -> Iterator[None]:
        """Let the store commit no more after an error of the disk, other than that it is full."""
        try:
            yield
        except DiskFullError:
            raise
        except OSError as error:
            self._poison(error)
            raise

    def _poison(self, error: BaseException) -> None:
        self._runtime.poisoned = f"writing broke off ({error})"


def _shares(nbytes: int, rows: Mapping[Overlay, int]) -> list[tuple[Overlay, int]]:
    """Share out how many of each table's rows shall leave memory so that so many bytes do."""
    most = sum(count * each.slot_bytes for each, count in rows.items())
    share = min(1.0, nbytes / most) if most else 0.0
    return [(each, math.ceil(count * share)) for each, count in rows.items() if count]


def _image_bytes(table: Shards) -> int:
    return table.changes * (8 + table.spec.record_bytes)
