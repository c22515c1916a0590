"""One opening of a store: its tables and vocabularies, what makes them durable, forks, and how it ends.

A fork's stores are read-only and hold neither lock nor log: the parent keeps these. Every store's lock is held while the
process forks, so that the child finds none in the middle of a change.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from shardemb import initializers
from shardemb.base import validation
from shardemb.base.interrupts import signals_deferred
from shardemb.engine import batch
from shardemb.errors import ReadOnlyError, ShardEmbError
from shardemb.format.manifest import Commit, check_metadata, new_entry
from shardemb.format.spec import check_name, new_spec
from shardemb.storage import address_space, files, log_reader, rewrite, verify
from shardemb.store import display
from shardemb.store.journal import Journal
from shardemb.store.table_catalog import TableCatalog
from shardemb.store.vocabulary_catalog import VocabularyCatalog
from shardemb.vocabulary import keyed_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import ArrayLike

    from shardemb.base.progress import Progress
    from shardemb.base.validation import Float32Array
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.table_state import TableState
    from shardemb.format.manifest import Manifest
    from shardemb.optim import Optimizer
    from shardemb.vocabulary.key_rows import KeyRows
    from shardemb.vocabulary.keyed_rows import KeyedRows


class Reader(NamedTuple):
    """How a store that is open for reading sees what a writer has changed meanwhile.

    Attributes
    ----------
    newest : callable
        Reads the images that are newer than the shards.
    reopen : callable
        Opens the store once more.
    """

    newest: Callable[[], log_reader.Replay]
    reopen: Callable[[], Session]


class Session:
    """A store as it is open in this process; users hold a `Store`, which has the contracts.

    Parameters
    ----------
    runtime : Runtime
    manifest : Manifest
        As of the last commit.
    lock : int or None
        The descriptor that holds the store's lock.
    may_miss : bool
        See `shards.open_existing`.
    newer : Replay, optional
        What a reader has to place over the files.
    reader : Reader, optional
        In a store that is open for reading.

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
        newer: log_reader.Replay | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.runtime = runtime
        runtime.committed = manifest
        self.tables = TableCatalog(runtime)
        self.vocabularies = VocabularyCatalog(runtime, self.tables)
        self._lock = lock
        self._reader = reader
        self._written_before = files.counters.bytes_written, files.counters.syncs
        self._journal: Journal | None = None
        self.tables.load(newer, may_miss=may_miss)
        self.vocabularies.load()
        if runtime.writable:
            self._journal = Journal(runtime, manifest, self.tables.memory)
            runtime.become_writer(self._journal, self.tables.overlays)
            try:
                self._journal.begin()
            except BaseException:
                self._journal.abandon()
                raise
        _open_sessions.add(self)

    @property
    def journal(self) -> Journal:
        """The base, log and folds of a store that is open for writing."""
        assert self._journal is not None
        return self._journal

    # ---- tables

    def find(self, name: str) -> TableState:
        """Return the table of a name; see `TableCatalog.find`."""
        self.runtime.check_open()
        return self.tables.find(name)

    def addressed(self, name: str) -> TableState | KeyedRows:
        """Return a table as batches address it: by row id or by key."""
        table = self.find(name)
        return self.vocabularies.keyed(table) or table

    def create_table(
        self,
        name: str,
        *,
        num_embeddings: int | None,
        embedding_dim: int,
        vocabulary: str | None,
        counters: bool,
        initializer: initializers.Initial | None,
        optimizer: Optimizer | None,
        rows_per_shard: int | None,
        progress: Progress,
    ) -> TableState:
        """Create a table; see `Store.create_table`."""
        with self.vocabularies.at_rest() if vocabulary else self.runtime.changing():
            self.runtime.check_sound()
            self.tables.require_free(check_name(name))
            bound = None if vocabulary is None else self.vocabularies.find(vocabulary)
            shape, rows_per_shard = keyed_rows.first_shape(
                bound, num_embeddings, embedding_dim, rows_per_shard
            )
            kind, rows = initializers.resolve(initializer, shape)
            spec = new_spec(
                self.tables.free_stream(name),
                shape,
                initializer=kind,
                optimizer=optimizer,
                counters=counters,
                rows_per_shard=rows_per_shard,
                max_shards=address_space.mappings_left(),
            )
            identity = None if bound is None else bound.entry.uuid
            return self.tables.create(name, spec, rows=rows, progress=progress, vocabulary=identity)

    def drop_table(self, name: str) -> None:
        """Drop a table; see `Store.drop_table`."""
        with self.runtime.writing():
            self.tables.drop(self.find(name).name)

    def rename_table(self, name: str, new_name: str) -> None:
        """Rename a table; see `Store.rename_table`."""
        with self.runtime.writing():
            table = self.find(name)
            self.tables.require_free(check_name(new_name))
            self.tables.set_name(table, new_name)

    def reshard(
        self,
        name: str,
        rows_per_shard: int | None,
        optimizer: Optimizer | Literal["keep"] | None,
        progress: Progress,
    ) -> Commit:
        """Copy a table into other shards and commit that; see `Store.reshard`."""
        with self.runtime.writing():
            table = self.find(name)
            self.journal.drain()
            commit, path = self.runtime.committed.commit, self.runtime.path
            if self.differs() or commit is None:
                msg = (
                    f"the store {path} has changes that are not committed; call commit() or rollback() first"
                )
                raise ShardEmbError(msg)
            with table.reshaped(optimizer, rows_per_shard, progress):
                return self.commit(commit.step, commit.metadata)

    # ---- vocabularies

    def create_vocabulary(self, name: str, key_type: object, admission: object, reserved: object) -> KeyRows:
        """Create a vocabulary; see `Store.create_vocabulary`."""
        with self.runtime.writing():
            return self.vocabularies.create(new_entry(check_name(name), key_type, admission, reserved))

    def drop_vocabulary(self, name: str) -> None:
        """Drop a vocabulary; see `Store.drop_vocabulary`."""
        with self.runtime.writing():
            self.vocabularies.drop(name)

    # ---- batches of several tables

    def lookup(self, ids: Mapping[str, ArrayLike]) -> dict[str, Float32Array]:
        """Look up rows of several tables together; see `Store.lookup`."""
        wanted = {name: self.addressed(name).plan_read("weight", each) for name, each in ids.items()}
        results = self.runtime.outputs.empty_together([each.shape for each in wanted.values()])
        reads = [each.into(rows) for each, rows in zip(wanted.values(), results, strict=True)]
        batch.read(self.runtime, reads)
        return dict(zip(wanted, results, strict=True))

    def update(self, batches: Mapping[str, tuple[ArrayLike, ArrayLike]], *, check_finite: bool) -> None:
        """Take one optimizer step in several tables together; see `Store.update`."""
        self.runtime.check_open()
        changes = [
            self.addressed(name).plan_change(ids, grads, "gradients", check_finite=check_finite)
            for name, (ids, grads) in batches.items()
        ]
        batch.change(self.runtime, changes)

    # ---- commits

    @property
    def last_commit(self) -> Commit | None:
        """The last commit, with metadata that nobody else holds."""
        commit = self.runtime.committed.commit
        return None if commit is None else replace(commit, metadata=check_metadata(commit.metadata))

    def differs(self) -> bool:
        """Whether anything differs from the last commit."""
        with self.runtime.lock:
            entries = self.vocabularies.entries()
            return entries != self.runtime.committed.vocabularies or self.tables.differ()

    def commit(self, step: int | None, metadata: Mapping[str, Any] | None) -> Commit:
        """Make every change since the last commit durable; see `Store.commit`."""
        metadata = check_metadata(metadata)
        with self.runtime.writing():
            journal = self.journal
            journal.wait_for_room([table.shards for table in self.tables.now.values()])
            self.runtime.check_open()  # the lock was released while it waited
            self.runtime.check_sound()
            last = self.runtime.committed.commit
            number = last.step if last else 0
            if step is not None:
                number = validation.count(step, "step", minimum=0)
            commit = Commit(last.id + 1 if last else 1, number, metadata)
            manifest = replace(
                self.runtime.committed,
                commit=commit,
                tables=self.tables.entries(),
                vocabularies=self.vocabularies.entries(),
            )
            shards = [table.shards for table in self.tables.now.values()]
            journal.commit(manifest, shards, self._mark_committed)
            self.vocabularies.renew_indexes()
            return replace(commit, metadata=check_metadata(metadata))

    def rollback(self) -> None:
        """Go back to the last commit; see `Store.rollback`."""
        with self.vocabularies.at_rest(), self.runtime.all_or_nothing("a rollback"):
            self.runtime.half_done = None
            self.runtime.check_sound()
            self.tables.restore(self.journal.images())
            self.vocabularies.restore()

    def checkpoint(self) -> None:
        """Bring what is committed into the shards; see `Store.checkpoint`."""
        with self.runtime.writing():
            problem = self.journal.fold_all()
        if problem is not None:
            raise problem
        self.vocabularies.checkpoint()

    def copy(self, target: Path, progress: Progress) -> None:
        """Copy the last commit into a new store; see `Store.copy`."""
        rewrite.require_absent(target)
        with self.runtime.writing():
            self.journal.hold_folds()
            manifest, tables = self.runtime.committed, self.tables.locations()
        try:
            rewrite.copy_store(manifest, tables, target, progress)
        finally:
            self.journal.release_folds()

    def refresh(self) -> None:
        """Move on to the newest commit; see `Store.refresh`."""
        runtime = self.runtime
        runtime.check_open()
        if self._reader is None:
            msg = f'the store {runtime.path} is open for writing; only one opened with mode "r" is refreshed'
            raise ReadOnlyError(msg)
        with signals_deferred(), runtime.lock:
            fresh = self._reader.reopen()
            self.tables.adopt(fresh.tables)
            self.vocabularies.adopt(fresh.vocabularies)
            runtime.committed, runtime.fresh = fresh.runtime.committed, fresh.runtime.fresh
            self._lock = fresh.exchange_lock(self._lock)
            fresh.close()

    def exchange_lock(self, other: int | None) -> int | None:
        """Hold another lock; return the one that was held."""
        mine, self._lock = self._lock, other
        return mine

    def _mark_committed(self, manifest: Manifest) -> None:
        """Take a commit as what memory is compared with."""
        self.runtime.committed = manifest
        self.tables.mark_committed()
        self.vocabularies.mark_committed()

    # ---- looking at it

    def verify(self, names: Sequence[str] | None, progress: Progress) -> list[verify.Damage]:
        """Compare the files of committed tables with their checksums; see `Store.verify`."""
        self.runtime.check_open()
        targets = {
            uuid: verify.Target(kept.table.name, kept.shards.spec, kept.shards.directory)
            for uuid, kept in self.tables.chosen(names).items()
        }
        return [
            *verify.damage(targets, self.runtime.threads, progress, self._steady),
            *self.vocabularies.damage(names),
        ]

    @contextlib.contextmanager
    def _steady(self, suspected: bool) -> Iterator[tuple[dict[str, Path], Callable[[], log_reader.Replay]]]:
        """Tell where the tables lie now, and what the log says; nothing moves here before this is left."""
        if self._reader is not None:
            yield self._newest_directories(), self._reader.newest
            return
        with self.runtime.changing():
            if suspected and (problem := self.journal.fold_all()) is not None:
                raise problem
            yield self.directories(), self.journal.images

    def _newest_directories(self) -> dict[str, Path]:
        """Return where the tables lie now beside a writer, if that can be told."""
        assert self._reader is not None
        try:
            with contextlib.closing(self._reader.reopen()) as newest:
                return newest.directories()
        except ShardEmbError:  # damaged, then, and not moved
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
                tables=tuple(self.facts(table, measured=True) for table in self.tables.shown().values()),
                vocabularies=self.vocabularies.facts(),
            )

    def facts(self, table: TableState, *, measured: bool = False) -> display.Facts:
        """Return what is shown about a table: of one by keys, with the rows that were given out."""
        facts, keyed = display.facts(table, measured=measured), self.vocabularies.keyed(table)
        if keyed is None:
            return facts
        return replace(facts, num_embeddings=keyed.num_rows, nbytes=keyed.num_rows * table.spec.record_bytes)

    def stats(self) -> dict[str, int]:
        """Return bytes and syncs since the store was opened; see `Store.stats`."""
        written, syncs = self._written_before
        now = files.counters
        return {"bytes_written": now.bytes_written - written, "syncs": now.syncs - syncs}

    # ---- the end

    def close(self) -> None:
        """Close the store; see `Store.close`."""
        if self.runtime.closed:
            return
        with signals_deferred():  # or the lock would stay behind
            self.runtime.close()
            with self.runtime.lock:
                try:
                    if self.runtime.owned and self.runtime.writable:
                        self._leave()
                finally:
                    if self._journal is not None:
                        self._journal.release()
                    self.vocabularies.release()
                    if self._lock is not None:
                        files.close(self._lock)

    def give_up(self) -> None:
        """Release the log and the lock of a store that nobody closed, and nobody holds any more."""
        self.runtime.closed = True
        if self._journal is not None:
            self._journal.release()
        if self._lock is not None:
            files.close(self._lock)

    def leave_to_parent(self) -> None:
        """In a fork: keep neither the lock nor the log open."""
        if self._journal is not None:
            self._journal.abandon()
            self._journal = None
        if self._lock is not None:
            files.close(self._lock)
            self._lock = None

    def _leave(self) -> None:
        if self.runtime.poisoned:
            return  # what is on disk may be ahead of memory: the next opening recovers it
        lost, path = self.differs(), self.runtime.path
        self.tables.abandon_new()
        problem = self.journal.close()
        if problem is not None:
            warnings.warn(display.not_folded(path, problem), RuntimeWarning, stacklevel=4)
        if lost:
            warnings.warn(display.lost(path, self.runtime.committed.commit), RuntimeWarning, stacklevel=4)


# ---- forks

_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_held: list[Session] = []


def _before_fork() -> None:
    _held[:] = [session for session in _open_sessions if not session.runtime.closed]
    for session in _held:
        session.runtime.lock.acquire()


def _after_fork(*, child: bool) -> None:
    for session in _held:
        if child:
            session.leave_to_parent()
        session.runtime.lock.release()
    _held.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=partial(_after_fork, child=False),
    after_in_child=partial(_after_fork, child=True),
)
