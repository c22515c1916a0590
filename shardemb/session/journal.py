"""The writer's side of durability: commits go into the log, and folds move them into the shards.

::

    commit    wait if the log is full -> freeze (lock) -> append images (lock for each piece) and the commit record
              -> one sync -> remember (lock)
    fold      close the segments (lock) -> write their images into the shards -> new base (lock) -> remove segments

A fold runs in a thread of its own and reads images from the log only, so training continues meanwhile. So may a
commit: what was changed when it was called is what it makes durable. One commit is under way at a time, and no fold
begins while it appends to the log.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from shardemb.base.interrupts import signals_deferred
from shardemb.base.sizes import PAGE
from shardemb.commits import fills, fold, log_limit, log_reader, log_writer
from shardemb.engine.runtime import in_thread
from shardemb.errors import DiskFullError, PoisonedError, ShardEmbError
from shardemb.format import store_paths
from shardemb.session.attempt import Attempt, Images, append, changed_bytes
from shardemb.session.base import Base
from shardemb.session.pending_commit import PendingCommit
from shardemb.storage import files, folders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from shardemb.base.validation import Int64Array
    from shardemb.commits import copies
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.format.fill_records import Filled
    from shardemb.format.manifest import Manifest
    from shardemb.format.spec import TableSpec


_log = logging.getLogger("shardemb")

SEGMENTS = 16
"""Number of segments in a full log of the least size."""


class Journal:
    """Base, log and folds of a store that is open for writing.

    All methods are called with the store's lock held, except `follow` and `settle`, which take it. Those that wait for
    a fold or for a commit release the lock while they wait. Implements `memory.memory_budget.Folds`.

    Parameters
    ----------
    runtime : Runtime
    base : Manifest
        What the shards hold. It is not published yet; `begin` does that.
    tables : callable
        Returns all tables of the store by uuid, also those that no commit has yet.

    Attributes
    ----------
    base : Base
    """

    def __init__(self, runtime: Runtime, base: Manifest, tables: Callable[[], Mapping[str, Shards]]) -> None:
        self._runtime = runtime
        self._tables = tables
        self.base = Base(runtime, base, tables)
        files.make_directory(store_paths.log(runtime.path))
        files.sync_directory(store_paths.private(runtime.path))
        self._log = log_writer.Log(
            store_paths.log(runtime.path),
            base,
            (runtime.log_bytes or log_limit.LOG_BYTES) // SEGMENTS,
            SEGMENTS,
        )
        self._announcements = fills.Announcements(
            runtime.path,
            base.epoch,
            lambda: [each for table in self._tables().values() for each in table.filled.unfinished()],
        )
        runtime.announcements = self._announcements
        self._limit = log_limit.LogLimit(
            runtime.path,
            runtime.log_bytes,
            runtime.memory_budget,
            lambda: sum(each.spec.num_shards * each.spec.shard_bytes for each in tables().values()),
        )
        self._condition = threading.Condition(runtime.lock)
        self._folding = False
        self._folding_bytes = 0
        self._unfolded_bytes = 0  # that a failed fold has left
        self._attempt: Attempt | None = None  # that is under way
        self._hurry = threading.Event()
        self._shown = False
        self._problem: Exception | None = None
        self._thread: threading.Thread | None = None
        self._released = False
        self._abandoned: Callable[[], None] | None = None

    @property
    def is_committing(self) -> bool:
        """Whether a commit is under way."""
        return self._attempt is not None

    @property
    def is_folding(self) -> bool:
        """Whether a fold is running, or folds are paused."""
        return self._folding

    # ---- commits

    def begin(self) -> None:
        """Publish the base, announce this writer to readers, and remove the log before it."""
        epoch = self.base.manifest.epoch.to_bytes(8, "little").ljust(PAGE, b"\0")
        files.overwrite(store_paths.epoch(self._runtime.path), epoch)
        self.base.publish(self.base.manifest)
        self._announcements.withdraw()
        log_writer.clear(store_paths.log(self._runtime.path), self.base.manifest.segment)

    def attempt(
        self, manifest: Manifest, tables: Iterable[Shards], mark_committed: Callable[[], None]
    ) -> Attempt:
        """Plan to make the changes of tables durable under a new manifest; `commit` or `commit_behind` does it.

        ``mark_committed()`` is called once they are durable, before anything else can happen.

        Raises
        ------
        FormatError
            Something foreign stands where the folder of a table belongs; nothing was changed.
        """
        self.base.check_in_place()
        last = self._runtime.committed.tables
        new_set = [(each.uuid, each.name) for each in manifest.tables] != [
            (each.uuid, each.name) for each in last
        ]
        # All that can be refused is refused before the first byte is appended.
        if new_set:
            folders.check_locations(self._runtime.path, manifest.tables, self.base.dropped(manifest))
        return Attempt(manifest, tables, new_set=new_set, mark_committed=mark_committed)

    def commit(self, attempt: Attempt) -> None:
        """Make the changes of an attempt durable.

        Raises
        ------
        DiskFullError
            There is no space; nothing was changed.
        OSError
            A write or sync failed: the store is poisoned.
        """
        try:
            with signals_deferred():
                self._freeze(attempt)
            self._complete(attempt)
        except BaseException:
            self._give_up(attempt)
            raise
        self._fold_if_due(attempt)

    def commit_behind(self, attempt: Attempt, afterwards: Callable[[], None]) -> PendingCommit:
        """Make the changes of an attempt durable in a thread of its own; then call ``afterwards()`` there.

        What changes from now on belongs to the next commit.
        """
        assert attempt.manifest.commit is not None
        pending = PendingCommit(self._runtime.path, attempt.manifest.commit)
        work = partial(self._commit_behind, attempt, pending, afterwards)
        with signals_deferred():
            self._freeze(attempt)
            in_thread("shardemb-commit", work)
        return pending

    def _commit_behind(
        self, attempt: Attempt, pending: PendingCommit, afterwards: Callable[[], None]
    ) -> None:
        runtime = self._runtime
        try:
            with runtime.lock:
                self._make_space(attempt)
            self._complete(attempt, partial(pending.end, None))
        except BaseException as error:
            _log.warning("the commit of %s failed: %s", runtime.path, str(error))
            self._give_up(attempt, partial(pending.end, error))
            return
        with runtime.lock:
            if not runtime.closed:
                self._fold_if_due(attempt)
        if not runtime.closed:
            afterwards()

    def _freeze(self, attempt: Attempt) -> None:
        self._attempt = attempt
        attempt.freeze()

    def _complete(self, attempt: Attempt, ended: Callable[[], None] | None = None) -> None:
        """Append an attempt to the log; call ``ended()`` before anybody goes on who waits for its end.

        The lock is needed only while memory is looked at.
        """
        runtime, manifest = self._runtime, attempt.manifest
        rows = self._append_attempt(attempt)
        with signals_deferred():  # memory must agree with the log, also after Ctrl-C
            self._append_record(self._log.append_commit, attempt.payload)
            with runtime.lock:
                attempt.succeed()
                self._end_attempt(ended)
        assert manifest.commit is not None
        _log.info("committed %s: step %d, %d rows", runtime.path, manifest.commit.step, rows)

    def _append_attempt(self, attempt: Attempt, manifests: int = 1) -> int:
        """Append all of an attempt but the records with its manifest that end it; return the number of rows."""
        runtime, manifest = self._runtime, attempt.manifest
        if {each.uuid for each in manifest.tables} - {each.uuid for each in runtime.committed.tables}:
            with self._poisoned_by_errors():  # files must be durable before a commit record names them
                files.sync_tree(store_paths.parked(runtime.path, ""))
        attempt.appends = True
        images, filled = attempt.images(runtime.lock), attempt.fills
        with self._poisoned_by_errors():
            attempt.sync_fills()
        self._append(images, attempt.payload, filled, manifests)
        return sum(each.count for each in images) + attempt.filled_rows

    def _give_up(self, attempt: Attempt, ended: Callable[[], None] | None = None) -> None:
        """Let what an attempt has not made durable count as changed again; for `ended` see `_complete`."""
        with signals_deferred(), self._runtime.lock:
            if self._attempt is attempt:
                attempt.fail()
                self._end_attempt(ended)
            elif ended is not None:
                ended()

    def _end_attempt(self, ended: Callable[[], None] | None) -> None:
        self._attempt = None
        if ended is not None:
            ended()
        self._condition.notify_all()
        if self._abandoned is not None and not self._folding:
            self._abandoned()

    def _fold_if_due(self, attempt: Attempt) -> None:
        if self._limit.is_exceeded(4 * self._in_log // 3, self._in_log):
            self._hurry.set()  # soon a commit will wait
        if attempt.new_set:
            self.fold_all()
        elif self._attempt is None and (  # or the commit after this one looks
            self._limit.is_exceeded(2 * (self._in_log - self._folding_bytes), self._in_log)
            or self._runtime.budget.needs_fold
            or self._problem is not None
        ):
            self._start()

    def settle(self) -> None:
        """Wait until no commit is under way. Called with or without the lock, which it releases meanwhile."""
        with self._runtime.lock:
            while self._attempt is not None:
                self._condition.wait()

    def prepare(self, tables: Sequence[Shards]) -> None:
        """Wait until no commit is under way and the log has space for the changes of tables, by folding what it holds.

        Raises
        ------
        DiskFullError
            The shards have no space for that.
        """
        self.settle()
        nbytes = sum(map(changed_bytes, tables))
        if self._lacks_space(nbytes):
            self._wait()  # a fold that is running may be enough; the next is better begun with more to fold
        if self._lacks_space(nbytes):
            _raise_if_full(self.fold_all())
        self.settle()  # again, because others may have begun one while a fold ran

    def _make_space(self, attempt: Attempt) -> None:
        """As `prepare`, for the attempt that is under way and has appended nothing."""
        if self._lacks_space(attempt.nbytes):
            self._wait_for_fold()
        if self._lacks_space(attempt.nbytes):
            _raise_if_full(self._fold_once())

    def _lacks_space(self, nbytes: int) -> bool:
        in_log = self._in_log
        return in_log > 0 and self._limit.is_exceeded(in_log + nbytes, in_log)

    @property
    def _in_log(self) -> int:
        return self._log.nbytes + self._folding_bytes + self._unfolded_bytes

    def images(self) -> log_reader.Replay:
        """Read the images that are newer than the base."""
        replay = log_reader.read(store_paths.log(self._runtime.path), self.base.manifest, self._log.end)
        replay.unfinished = self._announcements.unfinished()
        return replay

    # ---- folds

    def wait(self) -> None:
        """Wait for a commit that is under way, and for a fold that is running; see `Folds`."""
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
            if not self._in_log and self._attempt is None:
                return

    def supplement(self, spec: TableSpec, ids: Int64Array, pack: Callable[[int, int, int], None]) -> None:
        """Write records into the files that only repeat what the last commit says; see `Folds`.

        They go through the log, under the manifest of the last commit. So if this is interrupted anywhere, all of them
        are there or none.
        """
        if spec.uuid not in {each.uuid for each in self._runtime.committed.tables}:
            msg = "the table is not part of the last commit; call store.commit() first"
            raise ShardEmbError(msg)
        assert self._attempt is None
        payload = self._runtime.committed.to_bytes()
        self._append([Images(spec, ids.size, log_writer.in_order(ids, pack))], payload)
        with signals_deferred():
            self._append_record(self._log.append_commit, payload)
        self.drain()

    def follow(self, copying: copies.StoreCopy) -> None:
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
        return self._fold_once()

    def _fold_once(self) -> Exception | None:
        """As `fold_all`, also while a commit is under way that has not appended anything yet."""
        self._wait_for_fold()
        if not self._runtime.poisoned:  # not even by the fold that this waited for
            self._problem = None
            self._start()
            self._wait_for_fold()
        return self._problem

    def _wait(self) -> None:
        """Wait for a commit that is under way, and for a fold that is running."""
        while self._attempt is not None or self._folding:
            self.settle()
            self._wait_for_fold()

    def _wait_for_fold(self) -> None:
        while self._folding:
            self._hurry.set()
            self._condition.wait()

    def _start(self) -> None:
        """Start a fold, unless one is running or there is nothing to fold."""
        if self._folding or self._runtime.poisoned or self._released or not self._in_log:
            return
        assert self._attempt is None or not self._attempt.appends
        live: list[Shards] = []
        try:
            self.base.check_in_place()
            self._announcements.settle()
            with signals_deferred():
                end = self._log.end
                closed = self._log.close_segments()
                committed = self._log.followed(self._runtime.committed)
                base = replace(committed, dropped=self.base.dropped(committed))
                # Until the new base is published, the closed segments still count against `log_bytes`.
                self._folding, self._folding_bytes = True, self._log.nbytes + self._unfolded_bytes
                self._log.nbytes = self._unfolded_bytes = 0
                tables = self._tables()
                self._hurry.clear()  # a caller that waits for this fold sets it again
                # With the lock held: what is committed later belongs to the next fold.
                live += [tables[each.uuid] for each in base.tables]
                for each in live:
                    each.begin_fold()
                work = partial(self._fold, base, end, closed, live)
                self._thread = in_thread("shardemb-fold", work) or self._thread
        except Exception as error:  # returned by the calls that wait for the fold
            self._end(live, error)

    def _fold(self, base: Manifest, end: tuple[int, int], closed: list[Path], live: list[Shards]) -> None:
        runtime, problem, begun = self._runtime, None, time.monotonic()
        _log.info("folding %s: %d bytes of log", runtime.path, self._folding_bytes)
        try:
            newer = log_reader.read(store_paths.log(runtime.path), self.base.manifest, end)
            images = [(each.location, newer.images(each.spec)) for each in live]
            pace = fold.Pace(lambda: sum(each.totals.cold_lookups for each in live), self._hurry)
            fold.write(images, runtime.threads, runtime.undo, self._shown, pace)
        except Exception as error:  # raised or returned by the calls that wait for the fold
            problem = error
        with runtime.lock:
            try:
                if problem is None:
                    self.base.publish(base)
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
                self._unfolded_bytes += self._folding_bytes
                if not isinstance(problem, DiskFullError | PoisonedError):
                    self._poison(problem)
            self._folding_bytes = 0
            self._problem = problem
            self._folding = False
            self._condition.notify_all()
            if self._abandoned is not None and self._attempt is None:
                self._abandoned()

    def close(self, *, shown: bool) -> Exception | None:
        """Fold everything and remove the log; return the error if that failed, in which case the log stays."""
        self._shown = shown
        try:
            problem = self.fold_all()
            if problem is None and not self._runtime.poisoned:
                number, base = self._log.number, self._log.followed(self.base.manifest)
                self.base.publish(replace(base, clean=True, segment=number + 1, dropped=()))
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
        """Close the log, and then the descriptor that holds the store's lock: when a fold and a commit have ended.

        For a store that was garbage-collected, maybe in the thread of one of them, so this does not wait.
        """

        def close() -> None:
            self._released = True
            self._log.close()
            if lock is not None:
                files.close(lock)

        if self._folding or self._attempt is not None:
            self._abandoned = close
        else:
            close()

    # ---- within

    def _append(
        self,
        images: Sequence[Images],
        payload: bytes,
        filled: Sequence[tuple[TableSpec, Filled]] = (),
        manifests: int = 1,
    ) -> None:
        """Append images and fills of an attempt to commit; see `append`."""
        with self._poisoned_by_errors():
            append(self._log, images, filled, len(payload), manifests)

    def _append_record(self, append: Callable[[bytes], None], payload: bytes) -> None:
        """Append a record with the manifest `payload`; the store is poisoned if that fails."""
        if self._runtime.poisoned:  # by a fold, meanwhile
            self._runtime.check_sound()
        try:
            append(payload)
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

    def _poison(self, error: BaseException) -> None:
        self._runtime.poisoned = f"writing failed ({error})"


def _raise_if_full(problem: Exception | None) -> None:
    if isinstance(problem, DiskFullError):
        raise problem
