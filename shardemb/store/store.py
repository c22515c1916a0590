"""A store as its users hold it: several tables with one commit point.

Contracts only: each method is one call of `Session`, which leads down.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn
from weakref import WeakValueDictionary

from shardemb import initializers
from shardemb.store import display
from shardemb.store.keyed_table import KeyedTable
from shardemb.store.table import Table
from shardemb.store.vocabulary import Vocabulary

if TYPE_CHECKING:
    import os
    from types import TracebackType

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from shardemb.admission import Admission
    from shardemb.base.progress import Progress
    from shardemb.engine.table_state import TableState
    from shardemb.format.manifest import Commit
    from shardemb.optim import Optimizer
    from shardemb.storage.verify import Damage
    from shardemb.store.session import Session
    from shardemb.store.vocabulary_catalog import VocabularyCatalog
    from shardemb.vocabulary.key_rows import KeyRows
    from shardemb.vocabulary.keys import KeyType


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

    def __init__(self, session: Session) -> None:
        self._session = session
        self._tables: WeakValueDictionary[TableState, Table | KeyedTable] = WeakValueDictionary()
        self._vocabularies: WeakValueDictionary[KeyRows, Vocabulary] = WeakValueDictionary()

    def __eq__(self, other: object) -> bool:
        return self is other  # and not what a Mapping compares, its tables

    def __hash__(self) -> int:
        return id(self)

    # ---- tables

    def __getitem__(self, name: str) -> Table | KeyedTable:
        return self._table(self._session.find(name))

    def __iter__(self) -> Iterator[str]:
        self._session.runtime.check_open()
        return iter(self._session.tables.shown())

    def __len__(self) -> int:
        self._session.runtime.check_open()
        return len(self._session.tables.shown())

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
        created = self._session.create_table(
            name,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            vocabulary=vocabulary,
            counters=counters,
            initializer=initializer,
            optimizer=optimizer,
            rows_per_shard=rows_per_shard,
            progress=progress,
        )
        return self._table(created)

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
        self._session.drop_table(name)

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
        self._session.rename_table(name, new_name)

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
        return self._session.reshard(name, rows_per_shard, optimizer, progress)

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
        self._session.copy(Path(path).absolute(), progress)

    # ---- vocabularies

    @property
    def vocabularies(self) -> Mapping[str, Vocabulary]:
        """The store's vocabularies by name."""
        self._session.runtime.check_open()
        return _Vocabularies(self._session.vocabularies, self._vocabulary)

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
        return self._vocabulary(self._session.create_vocabulary(name, key_type, admission, reserved))

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
        self._session.drop_vocabulary(name)

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
        return self._session.lookup(ids)

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
        self._session.update(batches, check_finite=check_finite)

    # ---- commits

    @property
    def last_commit(self) -> Commit | None:
        """The last commit, None before the first."""
        return self._session.last_commit

    @property
    def has_changes(self) -> bool:
        """Whether rows, steps, hyper-parameters or the set of tables differ from the last commit."""
        self._session.runtime.check_open()
        return self._session.differs()

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
        return self._session.commit(step, metadata)

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
        self._session.rollback()

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
        self._session.checkpoint()

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
        self._session.refresh()

    def verify(self, tables: Sequence[str] | None = None, *, progress: Progress = None) -> list[Damage]:
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
        return self._session.verify(tables, progress)

    def info(self) -> display.StoreInfo:
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
        return self._session.info()

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
        return self._session.stats()

    # ---- closing

    def close(self) -> None:
        """Close the store and its tables. Never commits: uncommitted changes are gone, with a warning.

        A second call does nothing. Later use of the store or its tables raises `StoreClosedError`.

        Examples
        --------
        >>> store.close()
        """
        self._session.close()

    def __enter__(self) -> Store:
        self._session.runtime.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # The names of this module are gone when the interpreter ends; so is the lock, soon after.
        if _finalizing() or not hasattr(self, "_session"):
            return
        runtime = self._session.runtime
        if not runtime.closed and runtime.owned:
            warnings.warn(
                f"the store {runtime.path} was not closed", ResourceWarning, stacklevel=2, source=self
            )
            self._session.give_up()

    def __reduce__(self) -> NoReturn:
        msg = (
            f"the store {self._session.runtime.path} cannot be pickled: it is memory and a lock of this process; "
            f'in the other process call shardemb.open({str(self._session.runtime.path)!r}, mode="r")'
        )
        raise TypeError(msg)

    # ---- at a glance

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._session.runtime.path

    def __repr__(self) -> str:
        tables = map(self._table, self._session.tables.shown().values())
        vocabularies = map(self._vocabulary, tuple(self._session.vocabularies.now.values()))
        return "\n  ".join([self._headline(), *map(repr, tables), *map(repr, vocabularies)])

    def _repr_html_(self) -> str:
        shown = self._session.tables.shown().values()
        return display.html_table([self._session.facts(table) for table in shown], self._headline())

    def _headline(self) -> str:
        session = self._session
        state = "" if session.runtime.writable else "read only"
        state = (
            "closed" if session.runtime.closed else "changes not committed" if session.differs() else state
        )
        commit = session.runtime.committed.commit
        return display.headline(self.path, len(session.tables.shown()), commit, state)

    # ---- the same objects for as long as anyone holds them

    def _table(self, state: TableState) -> Table | KeyedTable:
        found = self._tables.get(state)
        if found is None:
            found, keyed = Table(state), self._session.vocabularies.keyed(state)
            if keyed is not None:
                found = KeyedTable(keyed, found, self._vocabulary(keyed.keys))
            found = self._tables.setdefault(state, found)
        return found

    def _vocabulary(self, rows: KeyRows) -> Vocabulary:
        found = self._vocabularies.get(rows)
        return self._vocabularies.setdefault(rows, Vocabulary(rows)) if found is None else found


class _Vocabularies(Mapping[str, Vocabulary]):
    """The vocabularies of now by name, also of those that are created later."""

    def __init__(self, catalog: VocabularyCatalog, shown: Callable[[KeyRows], Vocabulary]) -> None:
        self._catalog, self._shown = catalog, shown

    def __getitem__(self, name: str) -> Vocabulary:
        return self._shown(self._catalog.now[name])

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._catalog.now))

    def __len__(self) -> int:
        return len(self._catalog.now)

    def __repr__(self) -> str:
        return repr(dict(self))
