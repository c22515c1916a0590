"""One opening of a store: its tables and vocabularies, what makes them durable, and closing."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from shardemb.base import paths
from shardemb.base.interrupts import signals_deferred
from shardemb.commits import copies, log_reader, verify
from shardemb.errors import PoisonedError, ReadOnlyError, ShardEmbError, StaleReaderError, StoreClosedError
from shardemb.format import store_paths
from shardemb.format.manifest import Commit, Manifest, check_metadata, check_step, new_entry
from shardemb.format.spec import check_name, normalized
from shardemb.session import display, forking
from shardemb.session.journal import Journal
from shardemb.session.partition_journal import PartitionJournal
from shardemb.session.table_catalog import TableCatalog
from shardemb.session.vocabulary_catalog import VocabularyCatalog, check_optimizer, first_spec
from shardemb.storage import files, folders
from shardemb.vocabulary import keyed_rows

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb import dtypes
    from shardemb.base.progress import Progress
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.table_state import TableState
    from shardemb.engine.training import Training
    from shardemb.format.manifest import AttemptId, TagEntry
    from shardemb.format.spec import TableSpec
    from shardemb.optim import Optimizer
    from shardemb.session.attempt import Attempt
    from shardemb.session.pending_commit import PendingCommit
    from shardemb.session.table_catalog import TableRequest
    from shardemb.vocabulary.key_rows import KeyRows
    from shardemb.vocabulary.keyed_rows import KeyedRows, Missing
    from shardemb.vocabulary.keys import KeysLike


class Reader(NamedTuple):
    """How a store that is open for reading sees what a writer has changed meanwhile.

    Attributes
    ----------
    newest : callable
        Reads the images that are newer than the shards.
    reopen : callable
        Opens the store once more and returns the session.
    follow : callable
        Lets a copy follow the store until it holds the newest commit.
    store : Path
        The store's folder, also where a tag is read, which has its own.
    """

    newest: Callable[[], log_reader.Replay]
    reopen: Callable[[], Session]
    follow: Callable[[copies.StoreCopy], None]
    store: Path


class Session:
    """A store as it is open in this process. Users hold a `Store`, which has the contracts.

    Everything that changes the store runs under ``runtime.lock``. Lookups take it only while rows are spilled.

    Parameters
    ----------
    runtime : Runtime
    manifest : Manifest
        As of the last commit.
    lock : int or None
        The descriptor that holds the store's lock; None in a reader.
    may_miss : bool
        See `table_folder.open_existing`.
    replay : Replay, optional
        Images that a reader shows in place of the files' records, because no fold has written them yet.
    reader : Reader, optional
        Given if the store is open for reading.

    Attributes
    ----------
    runtime : Runtime
        Its `committed` is the one place that says which commit is the last.
    tables : TableCatalog
    vocabularies : VocabularyCatalog
    """

    def __init__(
        self,
        runtime: Runtime,
        manifest: Manifest,
        lock: int | None,
        *,
        may_miss: bool,
        replay: log_reader.Replay | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.runtime = runtime
        runtime.committed = replace(manifest, tags=())  # which are no part of a commit
        self.tables = TableCatalog(runtime)
        self.vocabularies = VocabularyCatalog(runtime, self.tables)
        self._lock = lock
        self._reader = reader
        self._counters_at_opening = files.counters.bytes_written, files.counters.syncs
        self._journal: Journal | None = None
        self.tables.load(replay, may_miss=may_miss)
        self.vocabularies.load()
        if runtime.writable:
            kind = Journal if manifest.partition is None else PartitionJournal
            self._journal = kind(runtime, manifest, self.tables.memory)
            runtime.become_writer(self._journal, self.tables.overlays)
            try:
                self._journal.begin()
            except BaseException:
                self._journal.close_log()
                raise
        forking.watch(self)

    @property
    def journal(self) -> Journal:
        """The base, the log and the folds of a store that is open for writing."""
        assert self._journal is not None
        return self._journal

    # ---- tables

    def shown_tables(self) -> dict[str, TableState]:
        """Return the tables by name, without those that hold keys."""
        self.runtime.check_open()
        return self.tables.visible()

    def find(self, name: str) -> TableState:
        """Return the table of a name; see `TableCatalog.find`."""
        self.runtime.check_open()
        return self.tables.find(name)

    def create_table(self, wanted: TableRequest, progress: Progress, origin: str | None = None) -> TableState:
        """Create a table; see `Store.create_table`.

        With an `origin`, a description of where its rows come from, a call that was interrupted is continued by the
        next one of the same store, as long as there is no commit in between.
        """
        name, vocabulary = check_name(wanted.name), wanted.vocabulary
        # A vocabulary must not give out rows while it is decided how many the table begins with.
        with self.settled(self.vocabularies.all_locked if vocabulary else self.runtime.changing):
            self.runtime.check_publishable()
            self.require_free(name)
            bound = None if vocabulary is None else self.vocabularies.find(vocabulary)
            spec, rows = first_spec(bound, wanted, name, self.tables.unused_stream(name))
            if (partition := self.runtime.committed.partition) is not None:
                spec = replace(spec, first=partition.number, stride=partition.count)
            uuid = None if bound is None else bound.entry.uuid
            return self.tables.create(
                name, spec, rows=rows, progress=progress, vocabulary=uuid, origin=origin
            )

    def adopt_table(self, name: str, spec: TableSpec, training: Training) -> None:
        """Add a table whose files are complete, among those that are being rebuilt; see `TableCatalog.take_in`."""
        with self.settled(self.runtime.changing):
            self.runtime.check_publishable()
            self.require_free(name)
            self.tables.take_in(name, spec, training)

    def drop_table(self, name: str) -> None:
        """Drop a table; see `Store.drop_table`."""
        # A vocabulary must not give out rows meanwhile, because its tables grow with it.
        with self.settled(self.vocabularies.all_locked):
            self.runtime.check_publishable()
            self.tables.drop(self.find(name).name)

    def rename_table(self, name: str, new_name: str) -> None:
        """Rename a table; see `Store.rename_table`."""
        with self.settled(self.runtime.writing):
            table = self.find(name)
            new_name = check_name(new_name)
            self.require_free(new_name)
            self.tables.set_name(table, new_name)

    def require_free(self, name: str) -> None:
        """Raise `TableExistsError` or `ValueError` if no table can get a name: what is refused here fails no commit."""
        self.tables.require_free(name)
        folders.require_free(self.runtime.path, name, self.journal.base.is_own)

    def reshard(
        self,
        name: str,
        rows_per_shard: int | None,
        optimizer: Optimizer | Literal["keep"] | None,
        dtype: dtypes.DtypeLike | None,
        progress: Progress,
    ) -> Commit:
        """Copy a table into other shards and commit that; see `Store.reshard`."""
        self.runtime.check_whole()
        with self.settled(self.vocabularies.all_locked):
            self.runtime.check_publishable()
            self.journal.drain()
            table = self.find(name)  # not before: it may have been dropped or renamed meanwhile
            if table.vocabulary is not None:
                check_optimizer(optimizer, name)
            commit, path = self.runtime.committed.commit, self.runtime.path
            if self._differs() or commit is None:
                msg = f"the store {path} has changes that are not committed; call commit() or rollback()"
                raise ShardEmbError(msg)
            with table.reshaped(optimizer, rows_per_shard, dtype, progress):
                return self.commit(commit.step, commit.metadata)

    # ---- vocabularies

    def create_vocabulary(self, name: str, key_type: object, admission: object, reserved: object) -> KeyRows:
        """Create a vocabulary; see `Store.create_vocabulary`."""
        with self.settled(self.runtime.writing):
            entry = new_entry(check_name(name), key_type, admission, reserved)
            for kind in entry.table_kinds:
                folders.require_free(self.runtime.path, f"{entry.name}@{kind}", self.journal.base.is_own)
            return self.vocabularies.create(entry)

    def rename_vocabulary(self, name: str, new_name: str) -> None:
        """Rename a vocabulary; see `Store.rename_vocabulary`."""
        with self.settled(self.vocabularies.all_locked):
            self.runtime.check_publishable()
            new_name = check_name(new_name)
            vocabulary = self.vocabularies.find(name)
            for kind in vocabulary.entry.table_kinds:
                folders.require_free(self.runtime.path, f"{new_name}@{kind}", self.journal.base.is_own)
            self.vocabularies.set_name(vocabulary, new_name)

    def drop_vocabulary(self, name: str) -> None:
        """Drop a vocabulary; see `Store.drop_vocabulary`."""
        with self.settled(self.vocabularies.all_locked):
            self.runtime.check_publishable()
            self.vocabularies.drop(name)

    # ---- batches of several tables

    def lookup(
        self, ids: Mapping[str, KeysLike], *, missing: Missing, create: bool
    ) -> dict[str, NDArray[Any]]:
        """Look up rows of several tables together; see `Store.lookup`."""
        targets = self.batch_targets(ids)
        return keyed_rows.read_many(self.runtime, targets, ids, missing=missing, create=create)

    def batch_targets(self, names: Iterable[str]) -> dict[str, TableState | KeyedRows]:
        """Return what takes batches for tables: a table itself, or, if it is used by key, its `KeyedRows`."""
        tables = {name: self.find(name) for name in names}
        return {name: self.vocabularies.keyed(table) or table for name, table in tables.items()}

    # ---- commits

    @property
    def last_commit(self) -> Commit | None:
        """The last commit, with a copy of its metadata."""
        commit = self.runtime.committed.commit
        return None if commit is None else replace(commit, metadata=check_metadata(commit.metadata))

    def has_changes(self) -> bool:
        """Return whether anything differs from the last commit; see `Store.has_changes`."""
        self.runtime.check_open()
        return self._differs()

    def _differs(self) -> bool:
        with self.runtime.lock:
            entries = self.vocabularies.entries()
            is_committing = self._journal is not None and self._journal.is_committing
            return is_committing or entries != self.runtime.committed.vocabularies or self.tables.differ()

    def commit(self, step: int | None, metadata: Mapping[str, Any] | None) -> Commit:
        """Make every change since the last commit durable; see `Store.commit`."""
        step, metadata = check_step(step), check_metadata(metadata)
        with self.runtime.changing():
            self.runtime.check_whole()
            self.runtime.check_sound()
            self.journal.prepare([table.shards for table in self.tables.current.values()])
            attempt, commit = self.attempt(step, metadata)
            self.journal.commit(attempt)
            self.vocabularies.rebuild_stale_indexes()
            return replace(commit, metadata=check_metadata(metadata))

    def commit_behind(self, step: int | None, metadata: Mapping[str, Any] | None) -> PendingCommit:
        """Make every change so far durable in the background; see `Store.commit`."""
        step, metadata = check_step(step), check_metadata(metadata)
        with self.runtime.changing():
            self.runtime.check_whole()
            self.runtime.check_sound()
            self.journal.settle()
            attempt, _ = self.attempt(step, metadata)
            return self.journal.commit_behind(attempt, self._after_commit)

    def attempt(
        self, step: int | None, metadata: dict[str, Any], decision: AttemptId | None = None
    ) -> tuple[Attempt, Commit]:
        """Plan the next commit. The waits before it have released the lock, so everything is looked at here."""
        self.runtime.check_open()
        self.runtime.check_sound()  # whether the store is still in place, the journal looks
        last = self.runtime.committed.commit
        previous = last.step if last else 0
        commit = Commit(last.id + 1 if last else 1, previous if step is None else step, metadata)
        manifest = replace(
            self.runtime.committed,
            commit=commit,
            tables=self.tables.entries(),
            vocabularies=self.vocabularies.entries(),
            decision=decision,
        )
        tables, vocabularies = self.tables.snapshot(), self.vocabularies.snapshot()

        def mark_committed() -> None:
            self.runtime.committed = manifest
            self.tables.mark_committed(tables)
            self.vocabularies.mark_committed(vocabularies)

        shards = [table.shards for table in self.tables.current.values()]
        return self.journal.attempt(manifest, shards, mark_committed), commit

    def _after_commit(self) -> None:
        with contextlib.suppress(StoreClosedError), self.runtime.changing():
            self.vocabularies.rebuild_stale_indexes()

    @contextlib.contextmanager
    def settled(self, holding: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        """Hold locks as ``holding()`` does, while no commit is under way.

        What changes the set of tables, or their form, does not happen beside one.
        """
        while True:
            with holding():
                if self._journal is None or not self._journal.is_committing:
                    yield
                    return
            self.journal.settle()  # with none of the locks, so that nothing is locked which is not checked again

    def rollback(self) -> None:
        """Go back to the last commit; see `Store.rollback`."""
        with self.settled(self.vocabularies.all_locked), self.runtime.all_or_nothing("a rollback"):
            self.runtime.half_done = None
            self.runtime.check_publishable()
            with self.vocabularies.reassigning():
                self.tables.restore(self.journal.images())
                self.vocabularies.restore()

    def checkpoint(self) -> None:
        """Fold everything that is committed into the shards; see `Store.checkpoint`."""
        with self.runtime.writing():
            problem = self.journal.fold_all()
        if problem is not None:
            raise problem
        self.vocabularies.checkpoint()

    def copy(self, path: str | os.PathLike[str], progress: Progress, *, update: bool) -> None:
        """Copy the last commit into a new store, or bring an older copy up to date; see `Store.copy`."""
        self.runtime.check_open()
        if self._reader is None:
            self.runtime.check_writable()  # it is not in a fork, which has no journal
        follow = self._reader.follow if self._reader else self.journal.follow
        older = update and files.is_directory(paths.local_path(path, "the copy of a store"))
        place = copies.older_place(path, self.runtime.committed.uuid) if older else copies.new_place(path)
        with place as target:
            copying = copies.StoreCopy(self.runtime.path, target, self.runtime.threads, progress)
            follow(copying)
            copying.complete()

    def refresh(self) -> None:
        """Move to the newest commit; see `Store.refresh`."""
        runtime = self.runtime
        runtime.check_open()
        if self._reader is None:
            msg = f'the store {runtime.path} is open for writing; only one opened with mode "r" is refreshed'
            raise ReadOnlyError(msg)
        with signals_deferred(), self.vocabularies.none_changing(), self.vocabularies.reassigning():
            # Take over what the new opening has mapped.
            fresh = self._reader.reopen()
            if fresh.runtime.committed.uuid != runtime.committed.uuid:
                fresh.close()
                msg = f"another store is at {runtime.path} now; open that with shardemb.open"
                raise StaleReaderError(msg)
            self.tables.adopt(fresh.tables)
            self.vocabularies.adopt(fresh.vocabularies)
            runtime.committed, runtime.fresh = fresh.runtime.committed, fresh.runtime.fresh
            runtime.hidden, runtime.past = fresh.runtime.hidden, fresh.runtime.past
            runtime.path = fresh.runtime.path  # another one if a tag was moved
            fresh.close()

    # ---- tags

    def tag_entries(self) -> tuple[TagEntry, ...]:
        """Return the tags of the store."""
        if self._journal is not None:
            return self._journal.base.manifest.tags
        return Manifest.from_bytes(files.read(store_paths.manifest(self._store))).tags

    def tag_facts(self) -> tuple[display.TagFacts, ...]:
        """Return what is shown about the tags."""
        return display.tag_facts(self._store, self.tag_entries())

    @property
    def _store(self) -> Path:
        return self.runtime.path if self._reader is None else self._reader.store

    # ---- looking at it

    def verify(self, names: Sequence[str] | None, progress: Progress) -> list[verify.Damage]:
        """Compare the files of committed tables with their checksums; see `Store.verify`."""
        self.runtime.check_open()
        names = None if names is None else [normalized(name) for name in names]
        targets = {
            uuid: verify.Target(each.table.name, each.shards.location)
            for uuid, each in self.tables.select(names).items()
        }
        return [
            *verify.damage(targets, self.runtime.threads, progress, self._stable_view),
            *self.vocabularies.damage(names),
        ]

    @contextlib.contextmanager
    def _stable_view(
        self, suspected: bool
    ) -> Iterator[tuple[dict[str, Path], Callable[[], log_reader.Replay]]]:
        """Yield the folders of the tables and a reader of the log. Of this store, nothing moves within the block."""
        if self._reader is not None:
            yield self._newest_directories(), self._reader.newest
            return
        with self.settled(self.runtime.changing):
            if suspected and (problem := self.journal.fold_all()) is not None:
                raise problem
            yield self.directories(), self.journal.images

    def _newest_directories(self) -> dict[str, Path]:
        """Return the folders of the tables as the concurrent writer has them now, if they can be read."""
        assert self._reader is not None
        try:
            with contextlib.closing(self._reader.reopen()) as newest:
                return newest.directories()
        except ShardEmbError:  # damaged, and so not moved
            return self.directories()

    def directories(self) -> dict[str, Path]:
        """Return the folders of the tables of the last commit, by uuid."""
        return {uuid: location.directory for uuid, location in self.tables.locations().items()}

    def info(self) -> display.StoreInfo:
        """Return what the store holds; see `Store.info`."""
        self.runtime.check_open()
        with self.runtime.lock:
            return display.StoreInfo(
                path=str(self.runtime.path),
                uuid=self.runtime.committed.uuid,
                commit=self.last_commit,
                bytes_on_disk=files.allocated(self.runtime.path),
                tables=tuple(self.facts(table, measured=True) for table in self.tables.visible().values()),
                vocabularies=self.vocabularies.facts(),
                abandoned_exports=display.abandoned_exports(self.runtime.path),
                tags=self.tag_facts(),
                partition=self.runtime.committed.partition,
            )

    def facts(self, table: TableState, *, measured: bool = False) -> display.Facts:
        """Return what is shown about a table, by row or by key."""
        keyed = self.vocabularies.keyed(table)
        if keyed is None:
            return display.facts(table, measured=measured)
        return display.keyed_facts(keyed, measured=measured)

    def headline(self) -> str:
        """Describe the store and the state that it is in, in one line."""
        runtime = self.runtime
        state = "" if runtime.writable else "read only"
        state = "closed" if runtime.closed else "changes not committed" if self._differs() else state
        return display.headline(runtime.path, len(self.tables.visible()), runtime.committed.commit, state)

    def as_html(self) -> str:
        """Describe the tables as an HTML table."""
        shown = self.tables.visible().values()
        return display.html_table([self.facts(table) for table in shown], self.headline())

    def stats(self) -> dict[str, int]:
        """Return bytes and syncs since the store was opened; see `Store.stats`."""
        written, syncs = self._counters_at_opening
        now = files.counters
        return {"bytes_written": now.bytes_written - written, "syncs": now.syncs - syncs}

    # ---- closing

    def close(self, *, shown: bool = False) -> None:
        """Close the store; see `Store.close`."""
        if self.runtime.closed:
            return
        with signals_deferred():  # Ctrl-C half way would leave the lock held
            self.runtime.close()  # before taking the lock, for which the background work that this waits for may wait
            with self.runtime.lock:
                try:
                    if self.runtime.owned and self.runtime.writable:
                        self._finish_writing(shown)
                finally:
                    if self._journal is not None:
                        self._journal.release()
                    self.vocabularies.release()
                    if self._lock is not None:
                        files.close(self._lock)

    def finalize(self) -> None:
        """Release the log and the lock of a store that was garbage-collected without being closed."""
        lock, self._lock = self._lock, None
        with (
            self.runtime.lock
        ):  # nobody else uses the store, except a fold, which takes the lock for a moment
            self.runtime.closed = True
            if self._journal is not None:
                self._journal.abandon(lock)
            elif lock is not None:
                files.close(lock)

    def detach_in_child(self) -> None:
        """Drop lock and log in a child process: they belong to its parent."""
        if self._journal is not None:
            self._journal.close_log()
            self._journal = None
        if self._lock is not None:
            files.close(self._lock)
            self._lock = None
        self.runtime.detach_in_child()
        self.tables.detach_in_child()
        self.vocabularies.detach_in_child()

    def _finish_writing(self, shown: bool) -> None:
        """Fold what is committed, discard the rest, and warn of what is lost."""
        if isinstance(self.journal, PartitionJournal) and self.journal.leave_prepared():
            return  # in doubt, until the next opening is told
        self.journal.settle()
        if self.runtime.poisoned:
            return  # the disk may be ahead of memory: the next opening recovers it
        lost, path = self._differs(), self.runtime.path
        self.tables.discard_new()
        problem = self.tables.undo_fills() or self.journal.close(shown=shown)
        # Not from a failed fold, whose commits would be safe in the log.
        if isinstance(problem, PoisonedError):
            warnings.warn(str(problem), RuntimeWarning, stacklevel=4)
        elif problem is not None:
            warnings.warn(display.not_folded(path, problem), RuntimeWarning, stacklevel=4)
        if lost:
            warnings.warn(display.lost(path, self.runtime.committed.commit), RuntimeWarning, stacklevel=4)
