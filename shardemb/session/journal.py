"""The writer's side of durability: commits go into the log, and folds move them into the shards.

::

    commit    wait if the log is full -> append images and the commit record -> one sync
    fold      close the segments (lock) -> write their images into the shards -> new base (lock) -> remove segments

A fold runs in a thread of its own and reads images from the log only, so training continues meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from shardemb.base.interrupts import signals_deferred
from shardemb.base.sizes import PAGE
from shardemb.commits import fills, fold, log_reader, log_writer
from shardemb.errors import DiskFullError, PoisonedError, ShardEmbError
from shardemb.format import store_paths
from shardemb.storage import files, folders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from shardemb.base.validation import Int64Array
    from shardemb.commits import rewrite
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.format.fill_records import Filled
    from shardemb.format.manifest import Manifest, TableEntry
    from shardemb.format.spec import TableSpec

    _Changed = tuple[TableSpec, Int64Array, Callable[[int, int, int], None]]
    _Filled = tuple[TableSpec, Filled]

_log = logging.getLogger("shardemb")

LOG_BYTES = 2**30
"""The least that the log may take if nothing was said, whatever the tables and the disk have."""

LOG_TABLES, LOG_PART = 3, 8
"""If nothing was said, the log may take this many times what the tables map, but one such part of the free space.

So two commits of a whole table do not wait for a fold, and a fold that begins at half of it writes most blocks once.
Nor may it take more than the memory budget, because a reader of a crashed store has all of it in memory.
"""

SEGMENTS = 16
"""Number of segments in a full log of the least size."""


class Journal:
    """Base, log and folds of a store that is open for writing.

    All methods are called with the store's lock held, except `follow`, which takes it. Those that wait for a fold
    release the lock while they wait. Implements `memory.memory_budget.Folds`.

    Parameters
    ----------
    runtime : Runtime
    base : Manifest
        What the shards hold. It is not published yet; `begin` does that.
    tables : callable
        Returns all tables of the store by uuid, also those that no commit has yet.
    """

    def __init__(self, runtime: Runtime, base: Manifest, tables: Callable[[], Mapping[str, Shards]]) -> None:
        self._runtime = runtime
        self._tables = tables
        self._base = base
        files.make_directory(store_paths.log(runtime.path))
        files.sync_directory(store_paths.private(runtime.path))
        self._log = log_writer.Log(
            store_paths.log(runtime.path), base, (runtime.log_bytes or LOG_BYTES) // SEGMENTS, SEGMENTS
        )
        self._announcements = fills.Announcements(
            runtime.path,
            base.epoch,
            lambda: [each for table in self._tables().values() for each in table.filled.unfinished()],
        )
        runtime.announcements = self._announcements
        self._condition = threading.Condition(runtime.lock)
        self._folding = False
        self._folding_bytes = 0
        self._hurry = threading.Event()
        self._shown = False
        self._problem: Exception | None = None
        self._thread: threading.Thread | None = None
        self._released = False
        self._abandoned: Callable[[], None] | None = None
        self._manifest_path = store_paths.manifest(runtime.path)
        self._manifest = files.names(self._manifest_path)[1]

    @property
    def is_folding(self) -> bool:
        """Whether a fold is running, or folds are paused."""
        return self._folding

    # ---- commits

    def begin(self) -> None:
        """Publish the base, announce this writer to readers, and remove the log before it."""
        epoch = self._base.epoch.to_bytes(8, "little").ljust(PAGE, b"\0")
        files.overwrite(store_paths.epoch(self._runtime.path), epoch)
        self.publish(self._base)
        self._announcements.withdraw()
        log_writer.clear(store_paths.log(self._runtime.path), self._base.segment)

    def commit(
        self, manifest: Manifest, tables: Iterable[Shards], mark_committed: Callable[[Manifest], None]
    ) -> None:
        """Make the changes of tables durable under a new manifest, and clear their marks as changed.

        ``mark_committed(manifest)`` is called once they are durable, before anything else can happen.

        Raises
        ------
        FormatError
            Something foreign stands where the folder of a table belongs; nothing was changed.
        DiskFullError
            There is no space; nothing was changed.
        OSError
            A write or sync failed: the store is poisoned.
        """
        self._check_in_place()
        runtime, last = self._runtime, self._runtime.committed.tables
        changes = [(table, table.changed_rows()) for table in tables if table.changes]
        created = {each.uuid for each in manifest.tables} - {each.uuid for each in last}
        new_set = [(each.uuid, each.name) for each in manifest.tables] != [
            (each.uuid, each.name) for each in last
        ]
        payload = manifest.to_bytes()
        # All that can be refused is refused before the first byte is appended.
        if new_set:
            folders.check_locations(runtime.path, manifest.tables, self._dropped(manifest))
        if created:  # their files must be durable before a commit record names them
            with self._poisoned_by_errors():
                files.sync_tree(store_paths.parked(runtime.path, ""))
        filled = self._synced_fills([table for table, _ in changes])
        images = [(table.spec, ids, partial(table.pack, ids)) for table, ids in changes]
        self._append_images(images, payload, filled)
        with signals_deferred():  # memory must agree with the log, also after Ctrl-C
            self._append_commit(payload)
            for table, _ in changes:
                table.clear_changes()
            mark_committed(manifest)
        assert manifest.commit is not None
        rows = sum(ids.size for _, ids in changes) + sum(map(_filled_rows, filled))
        _log.info("committed %s: step %d, %d rows", runtime.path, manifest.commit.step, rows)
        if self.exceeds_limit(4 * (self._log.nbytes + self._folding_bytes) // 3):
            self._hurry.set()  # soon a commit will wait
        if new_set:
            self.fold_all()
        elif (
            self.exceeds_limit(2 * self._log.nbytes) or runtime.budget.needs_fold or self._problem is not None
        ):
            self._start()

    def wait_for_space(self, tables: Sequence[Shards]) -> None:
        """Wait until the log has space for the changes of tables, by folding what it holds.

        Raises
        ------
        DiskFullError
            The shards have no space for that.
        """
        if self._lacks_space(tables):
            self._wait()  # a fold that is running may be enough; the next one is better begun with more to fold
        if self._lacks_space(tables):
            problem = self.fold_all()
            if isinstance(problem, DiskFullError):
                raise problem

    def exceeds_limit(self, nbytes: int) -> bool:
        """Return whether a log of that many bytes would be too large."""
        if self._runtime.log_bytes is not None or nbytes <= LOG_BYTES:
            return nbytes > (self._runtime.log_bytes or LOG_BYTES)
        mapped = sum(each.spec.num_shards * each.spec.shard_bytes for each in self._tables().values())
        free = files.free_space(self._runtime.path) + self._log.nbytes + self._folding_bytes
        return nbytes > max(
            LOG_BYTES, min(LOG_TABLES * mapped, free // LOG_PART, self._runtime.memory_budget)
        )

    def _lacks_space(self, tables: Sequence[Shards]) -> bool:
        in_log = self._log.nbytes + self._folding_bytes
        return in_log > 0 and self.exceeds_limit(in_log + sum(map(_image_bytes, tables)))

    def images(self) -> log_reader.Replay:
        """Read the images that are newer than the base."""
        replay = log_reader.read(store_paths.log(self._runtime.path), self._base, self._log.end)
        replay.unfinished = self._announcements.unfinished()
        return replay

    # ---- folds

    def wait(self) -> None:
        """Wait for a fold that is running; see `Folds`."""
        self._wait()
        self._runtime.check_open()  # the wait released the lock

    def try_to_drain(self) -> None:
        """Fold once; see `Folds`."""
        self.fold_all()
        self._runtime.check_open()

    def drain(self) -> None:
        """Fold until the files hold the last commit of all tables; see `Folds`."""
        while True:
            problem = self.fold_all()
            if problem is not None:
                raise problem
            self._runtime.check_open()  # waiting released the lock: others may have closed, or committed more
            self._runtime.check_sound()
            if not self._log.nbytes:
                return

    def supplement(self, spec: TableSpec, ids: Int64Array, pack: Callable[[int, int, int], None]) -> None:
        """Write records into the files that only repeat what the last commit says; see `Folds`.

        They go through the log, under the manifest of the last commit. So if this is interrupted anywhere, all of them
        are there or none.
        """
        if spec.uuid not in {each.uuid for each in self._runtime.committed.tables}:
            msg = "the table is not part of the last commit; call store.commit() first"
            raise ShardEmbError(msg)
        payload = self._runtime.committed.to_bytes()
        self._append_images([(spec, ids, pack)], payload)
        with signals_deferred():
            self._append_commit(payload)
        self.drain()

    def follow(self, copying: rewrite.StoreCopy) -> None:
        """Let a copy take over the last commit. Called without the lock: commits continue, but nothing is folded.

        Raises
        ------
        DiskFullError, OSError, PoisonedError
            The fold before failed, or the copy.
        """
        paused = False
        try:
            with self._runtime.writing():
                self.drain()
                committed = self._runtime.committed
                paused = self._folding = True
            copying.follow(committed, lambda: log_reader.Replay(committed, 0, 0))
        finally:
            if paused:
                with self._runtime.lock:
                    self._folding = False
                    self._condition.notify_all()

    def fold_all(self) -> Exception | None:
        """Fold everything that is committed and wait for it; return the error if that failed."""
        self._wait()
        if not self._runtime.poisoned:  # not even by the fold that this waited for
            self._problem = None
            self._start()
            self._wait()
        return self._problem

    def _wait(self) -> None:
        while self._folding:
            self._hurry.set()
            self._condition.wait()

    def _start(self) -> None:
        """Start a fold, unless one is running or there is nothing to fold."""
        if self._folding or self._runtime.poisoned or self._released or not self._log.nbytes:
            return
        live: list[Shards] = []
        try:
            self._check_in_place()
            self._announcements.settle()
            with signals_deferred():
                end = self._log.end
                closed = self._log.close_segments()
                base = replace(
                    self._runtime.committed,
                    segment=self._log.number,
                    sequence=self._log.sequence,
                    attempt=self._log.attempt + 1,
                    dropped=self._dropped(self._runtime.committed),
                )
                # Until the new base is published, the closed segments still count against `log_bytes`.
                self._folding, self._folding_bytes, self._log.nbytes = True, self._log.nbytes, 0
                tables = self._tables()
                self._hurry.clear()  # a caller that waits for this fold sets it again
                # With the lock held: what is committed later belongs to the next fold.
                live += [tables[each.uuid] for each in base.tables]
                for each in live:
                    each.begin_fold()
                thread = threading.Thread(
                    target=self._fold, args=(base, end, closed, live), name="shardemb-fold"
                )
                try:
                    thread.start()
                    self._thread = thread
                except RuntimeError:  # too many threads, or the interpreter is about to exit
                    self._fold(base, end, closed, live)
        except Exception as error:  # returned by the calls that wait for the fold
            self._end(live, error)

    def _fold(self, base: Manifest, end: tuple[int, int], closed: list[Path], live: list[Shards]) -> None:
        runtime, problem, begun = self._runtime, None, time.monotonic()
        _log.info("folding %s: %d bytes of log", runtime.path, self._folding_bytes)
        try:
            newer = log_reader.read(store_paths.log(runtime.path), self._base, end)
            fold.write(
                [(each.location, newer.images(each.spec)) for each in live],
                runtime.threads,
                self._shown,
                fold.Pace(lambda: sum(each.totals.cold_lookups for each in live), self._hurry),
            )
        except Exception as error:  # raised or returned by the calls that wait for the fold
            problem = error
        with runtime.lock:
            try:
                if problem is None:
                    self.publish(base)
                    self._log.discard(closed)
            except Exception as error:
                problem = error
            self._end(live, problem)
        if problem is None:
            _log.info("folded %s in %.1f s", runtime.path, time.monotonic() - begun)
        else:
            # Only the text: a handler that keeps the error would keep the memory of its traceback.
            _log.warning("the fold of %s failed: %s", runtime.path, str(problem))

    def _end(self, live: list[Shards], problem: Exception | None) -> None:
        """End a fold, or one that could not begin, whatever has happened to it: others wait for this."""
        try:
            for each in live:
                each.end_fold(folded=problem is None)
            self._runtime.budget.evict(0)
        except Exception as error:
            problem = problem or error
        finally:
            if problem is not None:
                self._log.nbytes += self._folding_bytes
                if not isinstance(problem, DiskFullError | PoisonedError):
                    self._poison(problem)
            self._folding_bytes = 0
            self._problem = problem
            self._folding = False
            self._condition.notify_all()
            if self._abandoned is not None:
                self._abandoned()

    def publish(self, base: Manifest) -> None:
        """Record durably what the shards hold, then move the folders of tables to where that says."""
        self._check_in_place()
        path, tables = self._runtime.path, self._tables()
        try:
            files.replace(self._manifest_path, base.to_bytes())
        finally:  # the new one is there also if only the sync of its folder has failed
            self._manifest = files.names(self._manifest_path)[1]
        self._base = base
        try:
            self._update_directories(folders.arrange(path, base.tables, base.dropped, keep=tables.keys()))
        except OSError:  # some folders have moved already
            self._update_directories(folders.locate(path, base.tables))
            raise
        self._base = replace(base, dropped=())  # their folders are gone

    def _update_directories(self, directories: Mapping[str, Path]) -> None:
        """Tell the tables where their folders are now."""
        tables = self._tables()
        for uuid in directories.keys() & tables.keys():
            tables[uuid].directory = directories[uuid]

    def close(self, *, shown: bool) -> Exception | None:
        """Fold everything and remove the log; return the error if that failed, in which case the log stays."""
        self._shown = shown
        try:
            problem = self.fold_all()
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
                self._announcements.withdraw()
                log_writer.clear(store_paths.log(self._runtime.path), number + 1)
        except (OSError, PoisonedError) as error:
            problem = error
        return problem

    def release(self) -> None:
        """Wait for a fold that is running, and close the log."""
        self._wait()
        if self._thread is not None:
            self._thread.join()
        self._released = True
        self._log.close()

    def close_log(self) -> None:
        """Close the log's file, and nothing else."""
        self._log.close()

    def abandon(self, lock: int | None) -> None:
        """Close the log, and then the descriptor that holds the store's lock: when a fold that is running has ended.

        For a store that was garbage-collected, maybe in the thread of that fold, so this does not wait.
        """

        def close() -> None:
            self._released = True
            self._log.close()
            if lock is not None:
                files.close(lock)

        if self._folding:
            self._abandoned = close
        else:
            close()

    # ---- within

    def is_own(self, uuid: str) -> bool:
        """Return whether a table is the store's, or was: then its folder is removed, or moved, by the next fold."""
        return uuid in self._tables() or any(
            each.uuid == uuid for each in (*self._base.tables, *self._base.dropped)
        )

    def _dropped(self, manifest: Manifest) -> tuple[TableEntry, ...]:
        """List the tables whose folders go once `manifest` is the base."""
        named = {each.uuid for each in manifest.tables}
        gone = tuple(each for each in self._base.tables if each.uuid not in named)
        return (*self._base.dropped, *gone)

    def _synced_fills(self, tables: Iterable[Shards]) -> list[_Filled]:
        """Make the rows durable that tables have in their files before a commit, and return their fills."""
        filled = [(table, each) for table in tables for each in table.filled.uncommitted]
        paths = {
            file.path
            for table, (fill, _) in filled
            for file, *_ in fills.parts(table.location, fill.first, fill.stop)
        }
        with self._poisoned_by_errors():
            for path in sorted(paths):
                with files.opened(path, os.O_RDONLY) as descriptor:
                    files.sync_data(descriptor, path)
        return [(table.spec, each) for table, each in filled]

    def _append_images(
        self, changes: Iterable[_Changed], payload: bytes, filled: Sequence[_Filled] = ()
    ) -> None:
        """Append images and fills of an attempt to commit. The commit record `payload` will complete it."""
        changes = list(changes)
        sizes = [(ids.size, spec.record_bytes) for spec, ids, _ in changes]
        needed = log_writer.needed_bytes(sizes, len(payload))
        needed += sum(log_writer.needed_for_fill(each, spec.record_bytes) for spec, each in filled)
        with self._poisoned_by_errors():
            self._log.begin(needed)
            for spec, each in filled:
                self._log.append_fill(each, spec.record_bytes)
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
        """Poison the store if the disk fails, unless it is only full."""
        try:
            yield
        except DiskFullError:
            raise
        except OSError as error:
            self._poison(error)
            raise

    def _check_in_place(self) -> None:
        """As `Runtime.check_in_place`, and check that no other program has replaced the manifest."""
        self._runtime.check_in_place()
        try:
            found = files.names(self._manifest_path)[1]
        except FileNotFoundError:
            found = None
        if found != self._manifest:
            self._runtime.poisoned = "its manifest was replaced by another program while it was open"
            self._runtime.check_sound()

    def _poison(self, error: BaseException) -> None:
        self._runtime.poisoned = f"writing failed ({error})"


def _filled_rows(filled: _Filled) -> int:
    spec, (fill, _) = filled
    first, last = fill.rows(spec.record_bytes)
    return last - first


def _image_bytes(table: Shards) -> int:
    filled = sum(8 * each.sums.size for each in table.filled.uncommitted)
    return table.overlay.changes * (8 + table.spec.record_bytes) + filled
