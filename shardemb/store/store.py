"""A store: several tables with one commit point. Open, create, commit, roll back, close.

Changes live in memory until `commit` hands them to the journal, which makes them durable in the log and moves them
into the shards later.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from shardemb import (
    arrays,
    batch,
    files,
    folders,
    forks,
    initializers,
    keyed,
    rebuild,
    report,
    shards,
    verify,
)
from shardemb.batch import Training
from shardemb.errors import (
    FormatError,
    ReadOnlyError,
    ShardEmbError,
    TableNotFoundError,
)
from shardemb.journal import Journal
from shardemb.manifest import Commit, Manifest, TableRecord, check_metadata, new_record
from shardemb.runtime import Runtime, signals_deferred
from shardemb.spec import check_name, is_internal, new_spec
from shardemb.table import Table
from shardemb.tables import Tables
from shardemb.vocabularies import Vocabularies

if TYPE_CHECKING:
    import os
    from types import TracebackType

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from shardemb.admission import Admission
    from shardemb.beside import Beside
    from shardemb.keyed import KeyedTable
    from shardemb.keys import KeyType
    from shardemb.optim import Optimizer
    from shardemb.progress import Progress
    from shardemb.replay import Replay
    from shardemb.vocabulary import Vocabulary


class Store(Mapping[str, "Table | KeyedTable"]):
    """Tables by name, with one commit for all of them. Made by `shardemb.open`; a context manager.

    Examples
    --------
    >>> import shardemb
    >>> with shardemb.open(tmp / "words.zarr") as store:
    ...     table = store.create_table("tokens", num_embeddings=1000, embedding_dim=8)
    ...     table.write([1], np.ones((1, 8), np.float32))
    ...     commit = store.commit(step=100, metadata={"loss": 0.3})
    >>> store = shardemb.open(tmp / "words.zarr", mode="r")
    >>> store.last_commit
    Commit(id=1, step=100, metadata={'loss': 0.3})
    >>> list(store)
    ['tokens']
    >>> store.close()
    """

    def __init__(
        self,
        runtime: Runtime,
        manifest: Manifest,
        lock: int | None,
        *,
        may_miss: bool,
        newer: Replay | None = None,
        beside: Beside | None = None,
    ) -> None:
        self._runtime = runtime
        self._manifest = manifest
        self._lock = lock
        self._beside = beside
        self._opened = False
        self._written_before = files.counters.bytes_written, files.counters.syncs
        self._tables = Tables()
        self._vocabularies = Vocabularies(runtime, self._tables)
        self._journal: Journal | None = None
        directories = folders.locate(runtime.path, manifest.tables)
        for record in manifest.tables:
            table = self._open_table(record, directories[record.uuid], may_miss=may_miss)
            if newer is not None:
                table._mapped.place(newer.images(table._spec), runtime.room)
            self._tables.now[record.name] = table
        self._tables.settle()
        self._vocabularies.take_up(manifest)
        if runtime.writable:
            self._journal = runtime.room = Journal(runtime, manifest, self._tables.mapped)
            try:
                self._journal.begin()
            except BaseException:
                self._journal.abandon()
                raise
        self._opened = True
        forks.watch(self)

    def __eq__(self, other: object) -> bool:
        return self is other  # and not what a Mapping compares, its tables

    def __hash__(self) -> int:
        return id(self)

    # ---- tables

    def __getitem__(self, name: str) -> Table | KeyedTable:
        self._runtime.check_open()
        if name in self._tables.now and not is_internal(name):
            return self._vocabularies.keyed(self._tables.now[name])
        names = ", ".join(map(repr, self._shown())) or "none"
        msg = f"the store {self._runtime.path} has no table {name!r}; its tables: {names}"
        raise TableNotFoundError(msg)

    def _table(self, name: str) -> Table:
        """Return a table by row id."""
        return self._tables.now[self[name].name]

    def __iter__(self) -> Iterator[str]:
        self._runtime.check_open()
        return iter(self._shown())

    def __len__(self) -> int:
        self._runtime.check_open()
        return len(self._shown())

    def _shown(self) -> dict[str, Table | KeyedTable]:
        """Return the tables of now, without those of vocabularies."""
        now = tuple(self._tables.now.items())
        return {name: self._vocabularies.keyed(table) for name, table in now if not is_internal(name)}

    def create_table(
        self,
        name: str,
        *,
        num_embeddings: int | None = None,
        embedding_dim: int,
        vocabulary: str | None = None,
        counters: bool = False,
        initializer: initializers.Initial | None = None,
        optimizer: Optimizer | None = None,
        rows_per_shard: int | None = None,
        progress: Progress = None,
    ) -> Table | KeyedTable:
        """Create a table; it becomes part of the store with the next commit. Rows cost no disk until written.

        Parameters
        ----------
        name : str
            Letters, digits, ``_``, ``-`` and ``.``; the table's folder in the store.
        num_embeddings, embedding_dim : int
            Rows, and values in a row. No number of rows with a vocabulary, with which the table grows.
        vocabulary : str, optional
            One of the store's vocabularies, which gives out the rows: the table is used by keys, a `KeyedTable`.
        counters : bool
            Keep beside each row how often it was updated (``count``) and in which of the table's steps last
            (``last_step``), as state columns. Both are float32: exact up to 16,777,216, where ``count`` stays.
        initializer : Initializer, VarianceScaling, array_like or callable, optional
            What rows hold before they are written; zeros by default. An array of shape ``(num_embeddings,
            embedding_dim)`` is copied into the table, block by block, so that one of zarr or h5py or a
            ``np.memmap`` is never in memory as a whole. So is what a function ``f(start, stop)`` returns, of shape
            ``(stop - start, embedding_dim)``: it is called for consecutive ranges of rows until all are covered.
        optimizer : Optimizer, optional
            How `Table.update` moves rows. Without one, rows change by `Table.write` alone.
        rows_per_shard : int, optional
            Rows in a file, rounded up so that files are whole pages. By default files of 64 to 512 MiB.
        progress : bool or callable, optional
            How far the copying of an array or function is: True for a bar, or a function ``progress(done, total)``
            of rows.

        Returns
        -------
        Table or KeyedTable

        Raises
        ------
        TableExistsError, VocabularyNotFoundError
            There is a table of that name; there is no such vocabulary.
        TypeError, ValueError
            A name, size, array, initializer or optimizer that cannot be.
        ReadOnlyError, StoreClosedError, PoisonedError, DiskFullError
            Nothing was created.

        Examples
        --------
        >>> table = store.create_table(
        ...     "users", num_embeddings=10**6, embedding_dim=16, optimizer=shardemb.optim.Adam(),
        ...     initializer=shardemb.initializers.Uniform(-0.05, 0.05, seed=0),
        ... )
        >>> table.shape
        (1000000, 16)
        """
        with self._vocabularies.at_rest() if vocabulary else self._runtime.changing():
            self._runtime.check_sound()
            self._tables.require_free(check_name(name), self.path)
            bound = None if vocabulary is None else self._vocabularies.find(vocabulary)
            shape, rows_per_shard = keyed.first_shape(bound, num_embeddings, embedding_dim, rows_per_shard)
            kind, rows = initializers.resolve(initializer, shape)
            spec = new_spec(
                self._tables.free_stream(name),
                shape,
                initializer=kind,
                optimizer=optimizer,
                counters=counters,
                rows_per_shard=rows_per_shard,
                max_shards=files.MAX_MAPPINGS - files.counters.mappings,
            )
            identity = None if bound is None else bound._record().uuid
            made = self._tables.create(
                self._runtime, name, spec, rows=rows, progress=progress, vocabulary=identity
            )
            return self._vocabularies.keyed(made)

    def drop_table(self, name: str) -> None:
        """Drop a table, with the next commit; until then `rollback` brings it back.

        Parameters
        ----------
        name : str
            One of the store's tables.

        Raises
        ------
        TableNotFoundError, ReadOnlyError, StoreClosedError, PoisonedError
            Nothing was changed.

        Examples
        --------
        >>> store.drop_table("tokens")
        """
        with self._runtime.writing():
            self._tables.drop(self[name].name)

    def rename_table(self, name: str, new_name: str) -> None:
        """Rename a table, with the next commit. Its initial values stay what they were.

        Parameters
        ----------
        name, new_name : str
            One of the store's tables, and a name that none has.

        Raises
        ------
        TableNotFoundError, TableExistsError, ReadOnlyError, StoreClosedError, PoisonedError
            Nothing was changed.

        Examples
        --------
        >>> store.rename_table("tokens", "words")
        """
        with self._runtime.writing():
            table = self._table(name)
            self._tables.require_free(check_name(new_name), self.path)
            self._tables.give_name(table, new_name)

    def reshard(
        self,
        name: str,
        *,
        rows_per_shard: int | None = None,
        optimizer: Optimizer | Literal["keep"] | None = "keep",
        progress: Progress = None,
    ) -> Commit:
        """Copy a table into shards of another size, or without its optimizer's state, and commit that.

        Memory stays bounded, and rows that were never written take no disk. The store keeps its lock meanwhile:
        lookups go on, everything else waits. Cut short by Ctrl-C or a crash, the table is what it was, and the same
        call goes on where it stopped, as long as no other commit came between.

        Parameters
        ----------
        name : str
            One of the store's tables.
        rows_per_shard : int, optional
            As in `create_table`; by default as many as now, rounded up to whole pages of the new records.
        optimizer : Optimizer, "keep" or None
            ``"keep"``: state and steps stay to the bit. Another one, or None: weights stay, its state and the
            table's step count begin anew.
        progress : bool or callable, optional
            True for a bar; or a function that is called with the rows done and the rows in all.

        Returns
        -------
        Commit
            With the step and metadata of the last one.

        Raises
        ------
        ShardEmbError
            There are changes that are not committed; the shards would be too many.
        TableNotFoundError, TypeError, ValueError, ReadOnlyError, StoreClosedError, PoisonedError
            Nothing was changed.
        FormatError, DiskFullError
            A block of the table is damaged; there is no room for the copy. The table is what it was.

        Examples
        --------
        >>> commit = store.commit()
        >>> commit = store.reshard("tokens", rows_per_shard=4096, optimizer=None)
        >>> store["tokens"].optimizer is None
        True
        """
        with self._runtime.writing():
            table, journal = self._table(name), self._writing()
            journal.drain()
            if self._differs() or self._manifest.commit is None:
                msg = f"the store {self.path} has changes that are not committed; call commit() or rollback() first"
                raise ShardEmbError(msg)
            commit = self._manifest.commit

            def is_committed() -> bool:
                return self._manifest.commit is not commit

            with table._reshaped(str(commit.id), optimizer, rows_per_shard, progress, is_committed):
                return self.commit(commit.step, commit.metadata)

    def copy(self, path: str | os.PathLike[str], *, progress: Progress = None) -> None:
        """Copy the last commit into a new store, holes as holes.

        Lookups, updates and commits go on meanwhile, but the shards stand still: a commit that the log has no room
        for, an update beyond the memory budget, and a commit that creates or drops tables wait.

        Parameters
        ----------
        path : path-like
            A new folder.
        progress : bool or callable, optional
            True for a bar; or a function that is called with the bytes done and the bytes in all, holes included.

        Raises
        ------
        StoreExistsError
            Something is there.
        DiskFullError, OSError
            There is no room, here or there; nothing is left behind.
        ReadOnlyError, StoreClosedError, PoisonedError
            Only a store that is open for writing can be copied: nobody else changes it then.

        Examples
        --------
        >>> store.copy(tmp / "copy.zarr")
        >>> with shardemb.open(tmp / "copy.zarr", mode="r") as copied:
        ...     copied.last_commit == store.last_commit
        True
        """
        target = Path(path).absolute()
        rebuild.require_nothing(target)
        with self._runtime.writing():
            self._writing().hold_folds()
            manifest, tables = self._manifest, self._tables.places()
        try:
            rebuild.copy_store(manifest, tables, target, progress)
        finally:
            self._writing().release_folds()

    # ---- vocabularies

    @property
    def vocabularies(self) -> Mapping[str, Vocabulary]:
        """The store's vocabularies by name."""
        self._runtime.check_open()
        return MappingProxyType(self._vocabularies.now)

    def create_vocabulary(
        self, name: str, *, key_type: KeyType, admission: Admission | None = None, reserved: int = 0
    ) -> Vocabulary:
        """Create a vocabulary, which gives rows to keys; it becomes part of the store with the next commit.

        Parameters
        ----------
        name : str
            As for `create_table`; a table may have the same name.
        key_type : {"int64", "string", "bytes"}
            What keys are.
        admission : Admission, optional
            When a key earns its row; at once by default.
        reserved : int
            Rows at the beginning that no key gets: for padding, for all unknown keys together.

        Returns
        -------
        Vocabulary

        Raises
        ------
        VocabularyExistsError
            There is one of that name.
        TypeError, ValueError
            A name, type, admission or number that cannot be.
        ReadOnlyError, StoreClosedError, PoisonedError, DiskFullError
            Nothing was created.

        Examples
        --------
        >>> words = store.create_vocabulary("words", key_type="string")
        >>> words.add(["to", "be"])
        array([0, 1])
        """
        with self._runtime.writing():
            record = new_record(check_name(name), key_type, admission, reserved)
            return self._vocabularies.create(record, files.MAX_MAPPINGS - files.counters.mappings)

    def drop_vocabulary(self, name: str) -> None:
        """Drop a vocabulary to which no table is bound, with the next commit; until then `rollback` brings it back.

        Parameters
        ----------
        name : str
            One of the store's vocabularies.

        Raises
        ------
        VocabularyNotFoundError
            There is none of that name.
        ShardEmbError
            Tables are bound to it: drop them first.
        ReadOnlyError, StoreClosedError, PoisonedError
            Nothing was changed.

        Examples
        --------
        >>> words = store.create_vocabulary("words", key_type="string")
        >>> store.drop_vocabulary("words")
        """
        with self._runtime.writing():
            self._vocabularies.drop(name)

    # ---- many tables at once

    def lookup(self, ids: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.float32]]:
        """Look up rows of several tables together, which costs about as much as one lookup of the same size.

        Parameters
        ----------
        ids : mapping of str to array_like of int
            Row ids by table.

        Returns
        -------
        dict of str to ndarray of float32, shape ``ids.shape + (embedding_dim,)``
            The caller's own memory. Results of one call may share a block of it, which goes with the last of them:
            copy what is to be kept for long.

        Raises
        ------
        TableNotFoundError, TypeError, RowIdError, StoreClosedError
            As `Table.lookup`.

        Examples
        --------
        >>> rows = store.lookup({"tokens": [1, 2]})
        >>> rows["tokens"].shape
        (2, 4)
        """
        wanted = {name: self[name]._plan_read("weight", each) for name, each in ids.items()}
        results = self._runtime.results.empty_together([each.shape for each in wanted.values()])
        reads = [each.into(rows) for each, rows in zip(wanted.values(), results, strict=True)]
        batch.read(self._runtime, reads)
        return dict(zip(wanted, results, strict=True))

    def update(
        self, batches: Mapping[str, tuple[ArrayLike, ArrayLike]], *, check_finite: bool = True
    ) -> None:
        """Take one optimizer step in several tables together; all of them are checked before any row changes.

        Parameters
        ----------
        batches : mapping of str to (ids, grads)
            As for `Table.update`, by table.
        check_finite : bool
            Refuse NaN and infinity.

        Raises
        ------
        TableNotFoundError, TypeError, ValueError, RowIdError, ReadOnlyError, StoreClosedError
            As `Table.update`; no table was changed.

        Examples
        --------
        >>> store.update({"tokens": ([1, 2], np.ones((2, 4), np.float32))})
        """
        self._runtime.check_open()
        changes = [
            self[name]._plan_change(ids, grads, "gradients", check_finite=check_finite)
            for name, (ids, grads) in batches.items()
        ]
        batch.change(self._runtime, changes)

    # ---- commits

    @property
    def last_commit(self) -> Commit | None:
        """The last commit, None before the first."""
        commit = self._manifest.commit
        return None if commit is None else replace(commit, metadata=check_metadata(commit.metadata))

    @property
    def has_changes(self) -> bool:
        """Whether rows, steps, hyper-parameters or the set of tables differ from the last commit."""
        self._runtime.check_open()
        return self._differs()

    def commit(self, step: int | None = None, metadata: Mapping[str, Any] | None = None) -> Commit:
        """Make every change since the last commit durable.

        Images of the changed rows, and one record for all tables, are appended to the log and synced: when the call
        returns they are on the disk, and a crash at any moment leaves this commit or the one before, exactly. The
        shards follow in the background.

        Parameters
        ----------
        step : int, optional
            The job's own step; the last commit's by default.
        metadata : dict, optional
            The job's own small JSON: data position, random state, anything that must never disagree with the rows.

        Returns
        -------
        Commit

        Raises
        ------
        TypeError, ValueError
            A step or metadata that cannot be.
        DiskFullError
            There is no room: the last commit stands, and so do the changes in memory. Make room and call again.
        PoisonedError
            A write or sync failed before: close and reopen. Or an update broke off half way: roll back.
        ReadOnlyError, StoreClosedError
            Nothing was written.

        Examples
        --------
        >>> store.commit(step=100, metadata={"loss": 0.3})
        Commit(id=1, step=100, metadata={'loss': 0.3})
        """
        metadata = check_metadata(metadata)
        with self._runtime.writing():
            journal = self._writing()
            tables = [table._mapped for table in self._tables.now.values()]
            journal.wait_for_room(tables)
            self._runtime.check_open()  # others may have come while it waited
            self._runtime.check_sound()
            last = self._manifest.commit
            number = arrays.count(step, "step", minimum=0) if step is not None else last.step if last else 0
            commit = Commit(last.id + 1 if last else 1, number, metadata)
            journal.commit(
                replace(
                    self._manifest,
                    commit=commit,
                    tables=self._tables.records(),
                    vocabularies=self._vocabularies.records(),
                ),
                [table._mapped for table in self._tables.now.values()],
                self._settled,
            )
            return replace(commit, metadata=check_metadata(metadata))

    def rollback(self) -> None:
        """Go back to the last commit: rows, state, steps, hyper-parameters and the set of tables.

        Raises
        ------
        PoisonedError
            A write or sync failed before: close and reopen.
        DiskFullError, OSError
            It broke off, as where pages have to leave memory and have no room. Make room and call it again; until
            then changes and commits are refused.
        ReadOnlyError, StoreClosedError
            Nothing was changed.

        Examples
        --------
        >>> store.rollback()
        """
        with self._vocabularies.at_rest(), self._runtime.all_or_nothing("a rollback"):
            self._runtime.half_done = None
            self._runtime.check_sound()
            self._tables.restore(self._manifest, self._writing().images(), self._runtime.room)
            self._vocabularies.restore(self._manifest.vocabularies)

    def checkpoint(self) -> None:
        """Bring what is committed into the shards, where other readers of zarr see it, and wait for it.

        Commits nothing. Other threads may go on meanwhile. The next opening has less to do: nothing of the log is to be
        read, and few keys of vocabularies are to be learnt again.

        Raises
        ------
        DiskFullError
            There is no room for rows that were never written before. The log keeps them; make room and call again.
        PoisonedError
            A write or sync failed: close and reopen.
        ReadOnlyError, StoreClosedError
            The store cannot be written.

        Examples
        --------
        >>> store.checkpoint()
        """
        with self._runtime.writing():
            problem = self._writing().settle()
        if problem is not None:
            raise problem
        self._vocabularies.checkpoint()

    def refresh(self) -> None:
        """Move a store that was opened for reading on to the newest commit. Its tables stay the same objects.

        Raises
        ------
        ReadOnlyError
            The store was opened for writing: it is the newest there is.
        StoreClosedError, FormatError
            Nothing was changed.

        Examples
        --------
        >>> with shardemb.open(store.path, mode="r") as reader:
        ...     reader.refresh()
        """
        self._runtime.check_open()
        if self._beside is None:
            msg = f'the store {self._runtime.path} is open for writing; only one opened with mode "r" is refreshed'
            raise ReadOnlyError(msg)
        with signals_deferred(), self._runtime.lock:
            fresh = self._beside.reopen()
            self._tables.adopt(fresh._tables)
            self._vocabularies.adopt(fresh._vocabularies)
            for table in self._tables.now.values():
                table._runtime = self._runtime
            self._manifest = fresh._manifest
            self._lock, fresh._lock = fresh._lock, self._lock
            self._runtime.fresh = fresh._runtime.fresh
            fresh.close()

    def verify(
        self, tables: Sequence[str] | None = None, *, progress: Progress = None
    ) -> list[report.Damage]:
        """Compare the files of committed tables with their checksums: every block that a fold has written.

        Reads from the disk, in bounded memory; training and lookups go on. What the log holds has checksums of its
        own, which are compared whenever it is read.

        Parameters
        ----------
        tables : sequence of str, optional
            Names of tables; all of the last commit by default.
        progress : bool or callable, optional
            True for a bar; or a function that is called with the bytes done and the bytes in all.

        Returns
        -------
        list of Damage
            What is wrong, by table, file and rows; empty if nothing is. Rows that another program has written
            into the shards are not what was written either.

        Raises
        ------
        TableNotFoundError
            No commit knows that table.
        DiskFullError
            There is no room to fold what is in the log.
        StoreClosedError
            The store was closed.

        Examples
        --------
        >>> store.verify()
        []
        """
        self._runtime.check_open()
        targets = {
            uuid: verify.Target(kept.table.name, kept.shards.spec, kept.shards.directory)
            for uuid, kept in self._tables.chosen(tables, self.path).items()
        }
        return [
            *verify.damage(targets, self._runtime.threads, progress, self._steady),
            *self._vocabularies.damage(tables),
        ]

    @contextlib.contextmanager
    def _steady(self, suspected: bool) -> Iterator[tuple[dict[str, Path], Callable[[], Replay]]]:
        """Tell where the tables lie now, and what the log says anew; nothing moves here before this is left."""
        if self._beside is not None:
            with self._beside.steady(self._places()) as seen:
                yield seen
            return
        with self._runtime.changing():
            if suspected and (problem := self._writing().settle()) is not None:
                raise problem
            yield self._places(), self._writing().images

    def _places(self) -> dict[str, Path]:
        return {uuid: place.directory for uuid, place in self._tables.places().items()}

    def info(self) -> report.StoreInfo:
        """Tell what the store holds and the disk space that it takes; looks at every file.

        Returns
        -------
        StoreInfo
            A frozen dataclass: path, uuid, commit, bytes_on_disk, tables.

        Raises
        ------
        StoreClosedError
            The store was closed.

        Examples
        --------
        >>> store.info().tables[0].name
        'tokens'
        """
        self._runtime.check_open()
        with self._runtime.lock:
            return report.StoreInfo(
                path=str(self.path),
                uuid=self._manifest.uuid,
                commit=self.last_commit,
                bytes_on_disk=files.allocated(self.path),
                tables=tuple(table._facts(measured=True) for table in self.values()),
                vocabularies=self._vocabularies.facts(),
            )

    def stats(self) -> dict[str, int]:
        """Bytes written to files and syncs made by this process since the store was opened.

        Returns
        -------
        dict of str to int
            Those of all stores of the process together.

        Examples
        --------
        >>> sorted(store.stats())
        ['bytes_written', 'syncs']
        """
        written, syncs = self._written_before
        now = files.counters
        return {"bytes_written": now.bytes_written - written, "syncs": now.syncs - syncs}

    # ---- closing

    def close(self) -> None:
        """Close the store and its tables. Never commits: uncommitted changes are gone, with a warning.

        A second call does nothing. Later use of the store or its tables raises `StoreClosedError`.

        Examples
        --------
        >>> store.close()
        """
        if self._runtime.closed:
            return
        with signals_deferred():  # or the lock would stay behind
            self._runtime.close()
            with self._runtime.lock:
                try:
                    if self._runtime.owned and self._runtime.writable:
                        self._leave()
                finally:
                    if self._journal is not None:
                        self._journal.release()
                    self._vocabularies.release()
                    if self._lock is not None:
                        files.close(self._lock)

    def __enter__(self) -> Store:
        self._runtime.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # The names of this module are gone when the interpreter ends; so is the lock, soon after.
        if _finalizing() or not getattr(self, "_opened", False):
            return
        if not self._runtime.closed:
            msg = f"the store {self._runtime.path} was not closed"
            warnings.warn(msg, ResourceWarning, stacklevel=2, source=self)
            self._runtime.closed = True
            if self._journal is not None:
                self._journal.release()
            if self._lock is not None:
                files.close(self._lock)

    def __reduce__(self) -> NoReturn:
        msg = (
            f"the store {self._runtime.path} cannot be pickled: it is memory and a lock of this process; "
            f'in the other process call shardemb.open({str(self._runtime.path)!r}, mode="r")'
        )
        raise TypeError(msg)

    # ---- at a glance

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._runtime.path

    def __repr__(self) -> str:
        shown = *self._shown().values(), *self._vocabularies.now.values()
        return "\n  ".join([self._headline(), *map(repr, shown)])

    def _repr_html_(self) -> str:
        return report.html_table([table._facts() for table in self._shown().values()], self._headline())

    def _headline(self) -> str:
        state = "" if self._runtime.writable else "read only"
        state = "closed" if self._runtime.closed else "changes not committed" if self._differs() else state
        return report.headline(self.path, len(self._shown()), self._manifest.commit, state)

    # ---- the way down

    def _open_table(self, record: TableRecord, directory: Path, *, may_miss: bool) -> Table:
        with shards.naming(record.name, directory):
            mapped = shards.open_existing(directory, may_miss=may_miss, may_create=self._runtime.writable)
            if type(mapped.spec.optimizer) is not type(record.optimizer):
                msg = f"it was created for {mapped.spec.optimizer}, but the commit says {record.optimizer}"
                raise FormatError(msg)
        training = Training(record.optimizer, record.step)
        return Table(self._runtime, record.name, mapped, training, record.vocabulary)

    def _differs(self) -> bool:
        with self._runtime.lock:
            records = self._vocabularies.records()
            return records != self._manifest.vocabularies or self._tables.differ(self._manifest)

    def _writing(self) -> Journal:
        assert self._journal is not None
        return self._journal

    def _settled(self, manifest: Manifest) -> None:
        """Take a commit as what memory is compared with."""
        self._manifest = manifest
        self._tables.settle()
        self._vocabularies.settle(manifest.commit.id if manifest.commit else 0)

    def _leave(self) -> None:
        if self._runtime.poisoned:
            return  # what is on disk may be ahead of memory: the next opening sees to it
        lost = self._differs()
        self._tables.abandon_new()
        problem = self._writing().close()
        if problem is not None:
            warnings.warn(report.not_folded(self.path, problem), RuntimeWarning, stacklevel=3)
        if lost:
            warnings.warn(report.lost(self.path, self._manifest.commit), RuntimeWarning, stacklevel=3)

    def _leave_to_parent(self) -> None:
        """In a fork: keep neither the lock nor the log open, and let the parent see to everything."""
        self._opened = False
        if self._journal is not None:
            self._journal.abandon()
            self._journal = None
        if self._lock is not None:
            files.close(self._lock)
            self._lock = None
