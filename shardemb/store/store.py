"""A store as its users hold it: several tables with one commit point.

Contracts only: each method is one call of `Session`, which does the work.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, overload
from weakref import WeakValueDictionary

from shardemb import keyed_bags
from shardemb.dtypes import Wanted
from shardemb.engine.training import Scaling
from shardemb.format.spec import normalized
from shardemb.imports.blocks import ReadOptions
from shardemb.session.table_catalog import TableRequest
from shardemb.store import tagging
from shardemb.store.keyed_table import KeyedTable
from shardemb.store.table import Table
from shardemb.store.vocabulary import Vocabulary

if TYPE_CHECKING:
    import os
    from pathlib import Path
    from types import TracebackType

    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from shardemb import initializers
    from shardemb.admission import Admission
    from shardemb.bags import Bags
    from shardemb.base.progress import Progress
    from shardemb.commits.verify import Damage
    from shardemb.dtypes import DtypeLike, RoundingLike
    from shardemb.engine.table_state import TableState
    from shardemb.format.manifest import Commit
    from shardemb.imports.blocks import UnicodeErrors
    from shardemb.optim import Optimizer
    from shardemb.session import display
    from shardemb.session.pending_commit import PendingCommit
    from shardemb.session.session import Session
    from shardemb.session.vocabulary_catalog import VocabularyCatalog
    from shardemb.store.importing import Duplicates, ImportReport
    from shardemb.store.tagging import KeyChanges
    from shardemb.vocabulary.key_rows import KeyRows
    from shardemb.vocabulary.keyed_rows import Missing, MissingChange
    from shardemb.vocabulary.keys import KeysLike, KeyType


class Store(Mapping[str, "Table | KeyedTable"]):
    """A store: tables by name, and one commit point for all of them. Made by `shardemb.open`; a context manager.

    A store is a mapping of its tables, in the order in which they were created. ``store[name]`` raises
    `TableNotFoundError` if there is no such table. It returns the same object as long as the caller holds one, also
    after `rollback`, `reshard` and `refresh`. Iterating takes a snapshot of the names: tables may be created and
    dropped meanwhile. A store equals only itself.

    A store that nobody holds any more is closed, with a `ResourceWarning`. Its tables and vocabularies hold it, so
    ``shardemb.open(path, mode="r")["tokens"]`` can be used for as long as it is kept.

    Thread safety: lookups may run in any number of threads, also concurrently with changes. Everything that changes the
    store waits for other changes. A fork of the process may read the store but not change it.

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
        return self is other  # a Mapping would compare the tables

    def __hash__(self) -> int:
        return id(self)

    # ---- tables

    def __getitem__(self, name: str) -> Table | KeyedTable:
        return self._table(self._session.find(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._session.shown_tables())

    def __len__(self) -> int:
        return len(self._session.shown_tables())

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
        padding_idx: int | None = None,
        dtype: DtypeLike = "float32",
        state_dtype: str = "float32",
        rounding: RoundingLike = "nearest",
        progress: Progress = None,
    ) -> Table | KeyedTable:
        """Create a table. It becomes part of the store with the next commit.

        Rows take no disk space until they are written.

        Parameters
        ----------
        name : str
            1 to 64 letters, digits, ``_``, ``-`` and ``.`` of any script, at most 192 bytes in UTF-8, beginning with a
            letter, a digit or ``_``. It is stored in the Unicode form NFC, and is also the name of the table's folder
            in the store.
        num_embeddings, embedding_dim : int
            Number of rows, and of values in a row. Leave `num_embeddings` out with a vocabulary: the table grows with
            it.
        vocabulary : str, optional
            Name of the vocabulary that gives out the table's rows. The table is then used by key, as a `KeyedTable`.
        counters : bool
            Keep two more state columns for each row: how often it was updated or written (``count``), and the table's
            step when that was last done (``last_step``). Both are float32, exact up to 16,777,216, where ``count``
            stays.
        initializer : Initializer, VarianceScaling, array_like or callable, optional
            What rows hold before they are first written; zeros by default. An array of shape
            ``(num_embeddings, embedding_dim)`` is copied into the table block by block, so an array of zarr or h5py or
            a ``np.memmap`` is never in memory as a whole. With a vocabulary, it has as many rows as were given out,
            ``vocabulary.num_rows``, in their order. Tensors are taken as well, with a gradient or without; masked
            arrays only if nothing is masked. A function ``f(start, stop)`` returns rows of shape
            ``(stop - start, embedding_dim)``; it is called for consecutive ranges until all rows are covered, and what
            it returns is copied too.
        optimizer : Optimizer, optional
            How `Table.update` changes rows. Without one, only `Table.write` does.
        rows_per_shard : int, optional
            Rows in one file, rounded up so that a file is a whole number of pages. By default a file has 64 to 512 MiB,
            or less if the table is small.
        padding_idx : int, optional
            The row of padding, as for `torch.nn.Embedding`; it is counted from the end if it is negative. It reads as
            zeros until something is written to it, unless `initializer` is an array or a function. Updates drop its
            gradients, and bags leave it out. With a vocabulary, one of the rows that this reserves.
        dtype : str or a type of `shardemb.dtypes`
            What a row is stored as: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"float8_e4m3fn"`` or
            ``"float8_e5m2"``; ``ScaledInt8`` or ``BlockScaled`` of `shardemb.dtypes`; or ``"raw"``, bytes that nothing
            here interprets, `embedding_dim` of them a row. Whatever it is, the arithmetic is float32: what is written
            is rounded, and lookups return float32 unless asked for something else.
        state_dtype : {"float32", "bfloat16"}
            What the optimizer's state is stored as. Columns with one number a row stay float32.
        rounding : {"nearest", "stochastic"} or Stochastic
            How numbers are rounded to the dtype: to nearest, ties to even; or up or down at random, with 0 as the seed
            or that of `shardemb.dtypes.Stochastic`. Initial values are rounded to nearest.
        progress : bool or callable, optional
            Reports the copying of an array or function: True shows a bar; a function is called as
            ``progress(done, total)``, in rows.

        Returns
        -------
        Table or KeyedTable
            A `KeyedTable` if `vocabulary` was given.

        Raises
        ------
        TableExistsError, VocabularyNotFoundError
            There is a table of that name, or something foreign in the place of its folder; there is no such vocabulary.
        TypeError, ValueError
            The name, a size, the array, the initializer, the optimizer or `padding_idx` is invalid; a dtype is unknown,
            or does not go with the rest, such as an optimizer with raw bytes, or one that is ``dense_equivalent`` with
            anything else than float32.
        ShardEmbError
            The table has more files than this process can map: choose larger shards, or close another store.
        ReadOnlyError, StoreClosedError, PoisonedError, DiskFullError
            Nothing was created. What a function given as `initializer` or `progress` raises passes through, with the
            same effect.

        Notes
        -----
        Safe from any thread. Other changes wait until the table is there.

        Examples
        --------
        >>> table = store.create_table(
        ...     "users", num_embeddings=10**6, embedding_dim=16, optimizer=shardemb.optim.Adam(),
        ...     initializer=shardemb.initializers.Uniform(-0.05, 0.05, seed=0),
        ... )
        >>> table.shape
        (1000000, 16)
        """
        wanted = TableRequest(
            name=name,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            vocabulary=vocabulary,
            counters=counters,
            initializer=initializer,
            optimizer=optimizer,
            rows_per_shard=rows_per_shard,
            padding_idx=padding_idx,
            precision=Wanted(dtype, state_dtype, rounding),
        )
        return self._table(self._session.create_table(wanted, progress))

    def import_table(
        self,
        name: str,
        source: object,
        format: str | None = None,
        *,
        member: str | None = None,
        columns: str | Sequence[str] = (),
        tokens: object = None,
        limit: int | None = None,
        duplicates: Duplicates = "first",
        unicode_errors: UnicodeErrors = "strict",
        dtype: DtypeLike | None = None,
        optimizer: Optimizer | None = None,
        rows_per_shard: int | None = None,
        counters: bool = False,
        progress: Progress = None,
    ) -> ImportReport:
        r"""Create a table from a file of another program. It becomes part of the store with the next commit.

        Rows are streamed: memory stays bounded, whatever the file holds or its header claims, and nothing is unpickled.
        Tokens become a vocabulary of the same name, with the same commit. Compressed files (gzip, bz2, zstd) are read
        as they are. Rows go straight to their place on the disk. An import of a file without keys whose rows lie at
        known places (.npy, safetensors, GGUF, HDF5, zarr, torch) that was interrupted is continued by the same call,
        unless the file or the last commit has changed.

        Parameters
        ----------
        name : str
            The new table's name, as for `create_table`, and that of its vocabulary, if it gets one.
        source : path-like or object
            A file or folder; or anything with the C stream interface of Arrow, such as tables and readers of pyarrow,
            relations of duckdb, frames of polars and datasets of Hugging Face.
        format : str, optional
            ``"word2vec-text"``, ``"word2vec-binary"``, ``"glove"``, ``"fasttext-text"``, ``"fasttext-binary"``,
            ``"npy"``, ``"safetensors"``, ``"gguf"``, ``"parquet"``, ``"arrow"``, ``"torch"``, ``"hdf5"`` or ``"zarr"``.
            By default it is guessed from the first bytes and the name.
        member : str, optional
            Which array or tensor, in a file that has several: a name, in HDF5 and zarr a path. ``*`` stands for a
            number: parts of one table, in the order of these numbers. ``"input"`` of a fastText model is its matrix of
            words and buckets, without keys.
        columns : str or sequence of str
            In parquet and Arrow: the column of vectors; or that of keys, then that of vectors. By default the only
            column of lists, and a column of text or integers by one of the usual names.
        tokens : path-like or sequence of str, optional
            Keys for rows that have none: a text file with one token a line, or strings.
        limit : int, optional
            Import at most so many rows, the first ones.
        duplicates : {"first", "error"}
            What becomes of rows whose key has come before: they are left out and counted, as gensim does; or nothing is
            imported.
        unicode_errors : {"strict", "replace", "ignore"}
            What becomes of tokens that are not UTF-8, which some tools write; see `bytes.decode`.
        dtype : str or a type of `shardemb.dtypes`, optional
            As in `create_table`. By default what the source has, and float32 for what is no dtype of a table.
        optimizer : Optimizer, optional
            As in `create_table`.
        rows_per_shard : int, optional
            As in `create_table`.
        counters : bool
            As in `create_table`.
        progress : bool or callable, optional
            True shows a bar; a function is called as ``progress(done, total)``, in rows, or in bytes while keys are
            read.

        Returns
        -------
        ImportReport
            How many rows the table has, and how many were left out.

        Raises
        ------
        SourceError
            The source is not what it claims to be, or its format has to be named. The message says where.
        FileNotFoundError, TypeError, ValueError
            There is no such file; an argument is invalid, or a value is not finite.
        ImportError
            The format needs a library that is not installed; the message says which.
        TableExistsError, VocabularyExistsError
            The name is taken.
        ReadOnlyError, StoreClosedError, PoisonedError, DiskFullError
            As `create_table`. After any error there is no table, and no vocabulary.

        Notes
        -----
        Safe from any thread. Others may use the store meanwhile; if they commit, keys without a table may be part of it
        for a while. The keys of a file are read before its rows, so such a file is read twice; the rows of a stream go
        through a temporary file next to the store.

        Examples
        --------
        >>> path = tmp / "vectors.txt"
        >>> _ = path.write_text("2 3\nthe 0.5 1 -1\nof 0.25 0 2\n")
        >>> store.import_table("glove", path)
        ImportReport(table='glove', format='word2vec-text', num_rows=2, embedding_dim=3, duplicates=0)
        >>> store["glove"].lookup(["of"])
        array([[0.25, 0.  , 2.  ]], dtype=float32)
        """
        from shardemb.store import importing  # with pyarrow, which others need not load

        self._session.require_free(name)
        wanted = importing.ImportRequest(name, tokens, duplicates, dtype, optimizer, rows_per_shard, counters)
        columns = (columns,) if isinstance(columns, str) else tuple(columns)
        options = ReadOptions(limit, member, columns, unicode_errors)
        return importing.import_table(self._session, source, format, wanted, options, progress)

    def drop_table(self, name: str) -> None:
        """Drop a table with the next commit. Until then `rollback` restores it.

        From now on, objects of the table refuse lookups and changes with `TableNotFoundError`.

        Parameters
        ----------
        name : str
            One of the store's tables.

        Raises
        ------
        TableNotFoundError, ReadOnlyError, StoreClosedError, PoisonedError
            Nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes.

        Examples
        --------
        >>> store.drop_table("tokens")
        """
        self._session.drop_table(name)

    def rename_table(self, name: str, new_name: str) -> None:
        """Rename a table with the next commit. Its initial values stay the same.

        Parameters
        ----------
        name, new_name : str
            One of the store's tables, and a name that no table has.

        Raises
        ------
        TypeError, ValueError
            `new_name` cannot be the name of a table; see `create_table`.
        TableNotFoundError, TableExistsError, ReadOnlyError, StoreClosedError, PoisonedError
            Nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes.

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
        dtype: DtypeLike | None = None,
        progress: Progress = None,
    ) -> Commit:
        """Copy a table into shards of another size, replace its optimizer, or convert its rows, and commit that.

        Memory stays bounded, and rows that were never written take no disk space in the copy. The store holds its lock
        meanwhile: lookups continue, everything else waits. If the call is interrupted by Ctrl-C or a crash, the table
        is unchanged, and the same call continues where it stopped, unless another commit came in between.

        Parameters
        ----------
        name : str
            One of the store's tables.
        rows_per_shard : int, optional
            As in `create_table`; by default as many as now, rounded up to whole pages of the new records.
        optimizer : Optimizer, "keep" or None
            ``"keep"`` copies the optimizer's state bit for bit and keeps the step count. Another optimizer, or None,
            keeps only the weights: state and step count start again.
        dtype : str or a type of `shardemb.dtypes`, optional
            What rows are stored as from then on, as in `create_table`; by default as now. Weights are decoded and
            rounded to nearest. State keeps its dtype. Raw bytes are neither made nor converted.
        progress : bool or callable, optional
            True shows a bar; a function is called as ``progress(done, total)``, in rows.

        Returns
        -------
        Commit
            The new commit, with the step and metadata of the last one.

        Raises
        ------
        ShardEmbError
            There are uncommitted changes or no commit yet, or the new shards would be too many.
        TableNotFoundError, TypeError, ValueError, ReadOnlyError, StoreClosedError, PoisonedError
            Nothing was changed.
        FormatError, DiskFullError
            A block of the table is damaged, or the disk has no space for the copy. The table is unchanged.

        Notes
        -----
        Safe from any thread. Objects of the table stay valid and continue with the new shards.

        Examples
        --------
        >>> commit = store.commit()
        >>> commit = store.reshard("tokens", rows_per_shard=4096, optimizer=None)
        >>> store["tokens"].optimizer is None
        True
        """
        return self._session.reshard(name, rows_per_shard, optimizer, dtype, progress)

    def copy(self, path: str | os.PathLike[str], *, update: bool = False, progress: Progress = None) -> None:
        """Copy the last commit into a new store. What takes no space on disk takes none in the copy.

        With `update`, an older copy of this store is brought up to date: only blocks whose checksums differ are read
        and written, so that a copy every night costs what the day has changed, and reading 8 bytes for each 4 KiB.

        In a writer, lookups, updates and commits continue meanwhile, but nothing is folded into the shards. So these
        calls wait: a commit that the log has no space for, a commit that creates or drops tables, and an update that
        would exceed the memory budget.

        From a reader, a writer in another process is not kept waiting. The copy is the newest commit by the time that
        it is complete, which may be later than the one that the reader sees. What the writer folds meanwhile is copied
        again.

        From a reader of a tag, the copy is the commit of the tag, exactly. Tags themselves are not copied.

        Parameters
        ----------
        path : path-like
            A new folder, on a local disk.
        update : bool
            Take the copy that is at `path`, if there is anything. It is no store meanwhile: opening it fails, and who
            has it open for reading gets a `StaleReaderError`. If this is interrupted, it stays so until the same call
            has completed it. Tables that grew keep their rows; those that were resharded or shrunk are copied again.
        progress : bool or callable, optional
            True shows a bar; a function is called as ``progress(done, total)``, in bytes, holes included.

        Raises
        ------
        TypeError, ValueError
            `path` is not a local path.
        StoreExistsError
            Something exists at `path`; with `update`, something else than a copy of this store, or one that was opened
            for writing since.
        StoreLockedError
            The copy is open for writing, or is being brought up to date.
        DiskFullError, OSError
            There is not enough space for the fold before the copy, or for the copy itself. Nothing is left at `path`,
            unless it is an older copy.
        ShardEmbError
            A writer folds so often that a reader cannot finish a copy. As above.
        StoreClosedError, PoisonedError, ReadOnlyError, StaleReaderError
            The store was closed; a write has failed; this is a fork of the writer; another store is in the place of the
            one that was opened for reading.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> store.copy(tmp / "copy.zarr")
        >>> with shardemb.open(tmp / "copy.zarr", mode="r") as copied:
        ...     copied.last_commit == store.last_commit
        True
        """
        self._session.copy(path, progress, update=update)

    # ---- vocabularies

    @property
    def vocabularies(self) -> Mapping[str, Vocabulary]:
        """The store's vocabularies by name: a read-only view, which follows the store."""
        self._session.runtime.check_open()
        return _Vocabularies(self._session.vocabularies, self._vocabulary)

    def create_vocabulary(
        self, name: str, *, key_type: KeyType, admission: Admission | None = None, reserved: int = 0
    ) -> Vocabulary:
        """Create a vocabulary, which gives rows to keys. It becomes part of the store with the next commit.

        Parameters
        ----------
        name : str
            As for `create_table`. A table may have the same name.
        key_type : {"int64", "string", "bytes"}
            Type of the keys.
        admission : Admission, optional
            When a new key earns its row; immediately by default.
        reserved : int
            Number of rows at the beginning that no key gets, for example one for padding and one for all unknown keys.

        Returns
        -------
        Vocabulary

        Raises
        ------
        VocabularyExistsError, TableExistsError
            There is a vocabulary of that name; something foreign is in the place of a folder of its keys.
        TypeError, ValueError
            The name, type, admission or number is invalid.
        ShardEmbError
            The vocabulary has more files than this process can map.
        ReadOnlyError, StoreClosedError, PoisonedError, DiskFullError
            Nothing was created.

        Notes
        -----
        Safe from any thread; waits for other changes.

        Examples
        --------
        >>> words = store.create_vocabulary("words", key_type="string")
        >>> words.add(["to", "be"])
        array([0, 1])
        """
        return self._vocabulary(self._session.create_vocabulary(name, key_type, admission, reserved))

    def rename_vocabulary(self, name: str, new_name: str) -> None:
        """Rename a vocabulary with the next commit. Its keys keep their rows.

        Parameters
        ----------
        name, new_name : str
            One of the store's vocabularies, and a name that no vocabulary has.

        Raises
        ------
        TypeError, ValueError
            `new_name` cannot be the name of a vocabulary.
        VocabularyNotFoundError, VocabularyExistsError, TableExistsError
            There is no vocabulary of the old name; there is one of the new name, or something foreign in the place of
            its folders.
        ReadOnlyError, StoreClosedError, PoisonedError
            Nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes.

        Examples
        --------
        >>> words = store.create_vocabulary("words", key_type="string")
        >>> store.rename_vocabulary("words", "tokens")
        >>> words
        Vocabulary 'tokens': 0 string keys
        """
        self._session.rename_vocabulary(name, new_name)

    def drop_vocabulary(self, name: str) -> None:
        """Drop a vocabulary that no table is bound to, with the next commit. Until then `rollback` restores it.

        Parameters
        ----------
        name : str
            One of the store's vocabularies.

        Raises
        ------
        VocabularyNotFoundError
            There is no vocabulary of that name.
        ShardEmbError
            Tables are bound to it: drop them first.
        ReadOnlyError, StoreClosedError, PoisonedError
            Nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes.

        Examples
        --------
        >>> words = store.create_vocabulary("words", key_type="string")
        >>> store.drop_vocabulary("words")
        """
        self._session.drop_vocabulary(name)

    # ---- many tables at once

    def lookup(
        self, ids: Mapping[str, KeysLike], *, missing: Missing = "error", create: bool = False
    ) -> dict[str, NDArray[np.float32]]:
        """Look up rows of several tables in one call, which costs about as much as one lookup of the same size.

        Parameters
        ----------
        ids : mapping of str to array_like
            For each table its row ids, as for `Table.lookup`, or, for a `KeyedTable`, keys.
        missing : {"error", "initial", "zeros"} or int
            What keys without a row get, as for `KeyedTable.lookup`; the same in all tables.
        create : bool
            Give new keys rows first, as for `KeyedTable.lookup`.

        Returns
        -------
        dict of str to ndarray of float32 (of uint8 for raw bytes), shape ``ids.shape + (embedding_dim,)``
            The caller's own memory. Results of one call may share a block of memory, which is freed with the last of
            them: copy what you keep for long.

        Raises
        ------
        TableNotFoundError, TypeError, RowIdError, StoreClosedError, StaleReaderError, DiskFullError, OSError
            As `Table.lookup` and `KeyedTable.lookup`. All ids and keys are checked before the first key is added.
        UnknownKeyError, ValueError
            A key has no row; a key is missing (null).

        Notes
        -----
        Safe from any thread, also concurrently with changes. With `create` the call waits for other changes.

        Examples
        --------
        >>> rows = store.lookup({"tokens": [1, 2]})
        >>> rows["tokens"].shape
        (2, 4)
        """
        return self._session.lookup(ids, missing=missing, create=create)

    def update(
        self,
        batches: Mapping[str, tuple[KeysLike | Bags, ArrayLike]],
        *,
        missing: MissingChange | Mapping[str, MissingChange] = "error",
        create: bool = False,
        max_norm: float | None = None,
        extra_norm_sq: float = 0.0,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """Take one optimizer step in each of several tables: in all of them or in none.

        Parameters
        ----------
        batches : mapping of str to (ids, grads) or (Bags, grads)
            For each table the arguments of `Table.update`, or, for a `KeyedTable`, of `KeyedTable.update`; or bags of
            rows or keys, and the gradient by what they are pooled to, as for `update_bag`. All batches are checked
            before the first key is added and any row changes.
        missing : {"error", "skip"} or int, or mapping of str to these
            What becomes of gradients of keys without a row, as for `KeyedTable.update`: the same in all tables, or for
            each table its own, and ``"error"`` in those that the mapping leaves out.
        create : bool
            Give new keys rows first, as for `KeyedTable.update`.
        max_norm : float, optional
            Clip by the global norm: if the norm of all gradients together is more, multiply them by
            ``max_norm / (norm + 1e-6)``, as ``torch.nn.utils.clip_grad_norm_`` does. The gradients of a row that occurs
            several times are summed first.
        extra_norm_sq : float
            Added to the square of that norm: the square of the norm of the dense part of a model, which the caller
            clips by the same factor.
        scale : float, optional
            Divide the gradients by this number first, and skip the step in all tables if any is not finite then; see
            `Table.update`.
        check_finite : bool
            Refuse NaN and infinity, unless there is a `scale`.

        Returns
        -------
        float or None
            With `max_norm` or `scale`, the norm of all gradients, including the extra, after the division and before
            clipping. If it is infinite or NaN, the step was skipped.

        Raises
        ------
        TableNotFoundError, TypeError, ValueError, RowIdError, UnknownKeyError
            As `Table.update` and `KeyedTable.update`; or the norm is not finite, there is a `max_norm` and no `scale`;
            `padding_idx` names a table that has no batch. No table was changed.
        FrozenRowError, LearningRateError
            As `Table.update`; no table was changed.
        ReadOnlyError, StoreClosedError, PoisonedError, DiskFullError
            No table was changed.

        Notes
        -----
        Safe from any thread; waits for other changes. In memory only until `commit`.

        Examples
        --------
        >>> store.update({"tokens": ([1, 2], np.ones((2, 4), np.float32))})
        >>> store.update({"tokens": (shardemb.Bags([[1, 2]], mode="mean"), np.ones((1, 4), np.float32))})
        """
        session = self._session
        return keyed_bags.update_many(
            session.runtime,
            session.batch_targets(batches),
            batches,
            missing=missing,
            create=create,
            scaling=Scaling.of(scale, max_norm, extra_norm_sq),
            check_finite=check_finite,
        )

    def gradient_norm(
        self,
        batches: Mapping[str, tuple[KeysLike | Bags, ArrayLike]],
        *,
        missing: MissingChange | Mapping[str, MissingChange] = "error",
    ) -> float:
        """Return the norm of gradients that `update` would take, and change nothing.

        To clip, `update` needs no other call: it has `max_norm`. This is for those who have more to scale by the norm
        before the step.

        Parameters
        ----------
        batches : mapping of str to (ids, grads) or (Bags, grads)
            As for `update`.
        missing : {"error", "skip"} or int, or mapping of str to these
            As for `update`.

        Returns
        -------
        float
            The Euclidean norm of the gradients of all rows together, those of a row that occurs several times summed
            first. Infinite or NaN if one of them is.

        Raises
        ------
        TableNotFoundError, TypeError, ValueError, RowIdError, UnknownKeyError
            As `update`, but for gradients that are not finite.
        StoreClosedError
            The store was closed.

        Notes
        -----
        Safe from any thread. Scaling the gradients by ``min(1, max_norm / (norm + 1e-6))`` is what `update` does with
        ``max_norm``.

        Examples
        --------
        >>> store.gradient_norm({"tokens": ([1, 1], np.ones((2, 4), np.float32))})
        4.0
        """
        session = self._session
        return keyed_bags.gradient_norm(
            session.runtime, session.batch_targets(batches), batches, missing=missing
        )

    def lookup_bag(
        self, bags: Mapping[str, Any], *, missing: Missing = "error", create: bool = False
    ) -> dict[str, NDArray[np.float32]]:
        """Look up bags of rows of several tables in one call, which costs about as much as one of the same size.

        Parameters
        ----------
        bags : mapping of str to ids, (ids, offsets) or Bags
            For each table ids of two dimensions, each row a bag; or a tuple of ids and offsets; or a `Bags`, which says
            the rest: mode, weights and so on. For a `KeyedTable`, keys in place of the ids. (Two-dimensional ids in
            nested tuples would be taken for ids and offsets: use lists or an array.)
        missing : {"error", "initial", "zeros"} or int
            What is taken for keys without a row, as for `KeyedTable.lookup_bag`; the same in all tables.
        create : bool
            Give new keys rows first, as for `KeyedTable.lookup`.

        Returns
        -------
        dict of str to ndarray of float32, shape (bags, embedding_dim)
            The caller's own memory, shared as for `lookup`.

        Raises
        ------
        TableNotFoundError, TypeError, ValueError, RowIdError, UnknownKeyError
            As `Table.lookup_bag` and `KeyedTable.lookup_bag`. All bags are checked before the first key is added.
        StoreClosedError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread, also concurrently with changes. With `create` the call waits for other changes.

        Examples
        --------
        >>> found = store.lookup_bag({"tokens": ([1, 2, 3], [0, 2])})
        >>> found["tokens"].shape
        (2, 4)
        >>> found = store.lookup_bag({"tokens": shardemb.Bags([[1, 2], [3, 0]], mode="mean", padding_idx=0)})
        """
        session = self._session
        targets = session.batch_targets(bags)
        return keyed_bags.read_many(session.runtime, targets, bags, missing=missing, create=create)

    def update_bag(
        self,
        batches: Mapping[str, tuple[Any, ...]],
        *,
        missing: MissingChange = "error",
        create: bool = False,
        scale_grad_by_freq: bool = False,
        max_norm: float | None = None,
        extra_norm_sq: float = 0.0,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """Take one optimizer step in each of several tables by the gradients of bags: in all of them or in none.

        Parameters
        ----------
        batches : mapping of str to (ids, grads), (ids, offsets, grads) or (Bags, grads)
            For each table its bags, as for `lookup_bag`, and the gradient by its result, shape (bags, embedding_dim).
            All of them are checked before any row changes.
        missing : {"error", "skip"} or int
            What becomes of gradients of keys without a row, as for `KeyedTable.update_bag`; the same in all tables.
        create : bool
            Give new keys rows first, as for `KeyedTable.lookup`.
        scale_grad_by_freq : bool
            As for `Table.update_bag`.
        max_norm, extra_norm_sq, scale : float, optional
            Clip by the norm of the gradients of all rows, and divide by a scale; see `update`.
        check_finite : bool
            Refuse NaN and infinity, unless there is a `scale`.

        Returns
        -------
        float or None
            With `max_norm` or `scale`, the norm of the gradients of all rows; see `update`.

        Raises
        ------
        TableNotFoundError, TypeError, ValueError, RowIdError, UnknownKeyError
            As `Table.update_bag` and `KeyedTable.update_bag`; no table was changed.
        ReadOnlyError, StoreClosedError, PoisonedError, DiskFullError
            No table was changed.

        Notes
        -----
        Safe from any thread; waits for other changes. In memory only until `commit`.

        Examples
        --------
        >>> store.update_bag({"tokens": ([1, 2, 3], [0, 2], np.ones((2, 4), np.float32))})
        """
        session = self._session
        return keyed_bags.change_many(
            session.runtime,
            session.batch_targets(batches),
            batches,
            missing=missing,
            create=create,
            scale_grad_by_freq=scale_grad_by_freq,
            scaling=Scaling.of(scale, max_norm, extra_norm_sq),
            check_finite=check_finite,
        )

    # ---- commits

    @property
    def last_commit(self) -> Commit | None:
        """The last commit, or None before the first. A copy: changing its metadata does not change the store."""
        return self._session.last_commit

    @property
    def has_changes(self) -> bool:
        """Whether rows, steps, hyper-parameters, vocabularies or the set of tables differ from the last commit."""
        return self._session.has_changes()

    @overload
    def commit(
        self,
        step: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        *,
        wait: Literal[True] = True,
    ) -> Commit: ...
    @overload
    def commit(
        self, step: int | None = None, metadata: Mapping[str, Any] | None = None, *, wait: Literal[False]
    ) -> PendingCommit: ...
    @overload
    def commit(
        self, step: int | None = None, metadata: Mapping[str, Any] | None = None, *, wait: bool
    ) -> Commit | PendingCommit: ...
    def commit(
        self, step: int | None = None, metadata: Mapping[str, Any] | None = None, *, wait: bool = True
    ) -> Commit | PendingCommit:
        """Make every change since the last commit durable.

        The images of all changed rows and one record for all tables are appended to the log and synced. When the call
        returns, they are on the disk. A crash at any moment leaves exactly this commit or the one before. The shards
        are updated in the background.

        Parameters
        ----------
        step : int, optional
            The job's own step, at most 2**63 - 1; by default that of the last commit, 0 for the first.
        metadata : dict, optional
            The job's own small JSON, at most 1 MiB: data position, random state, anything that must never disagree with
            the rows. Empty by default. NumPy's scalars become Python's; its arrays are refused.
        wait : bool, optional
            Whether to return only when the commit is durable, which is the default. Otherwise it is made durable in
            the background: it has everything that was changed before the call, and later changes belong to the next
            commit. A row that changes again before it is written is copied first, which takes memory of the budget.

        Returns
        -------
        Commit
            With a copy of the metadata.
        PendingCommit
            Without `wait`: tells when the commit is durable, and whether it failed.

        Raises
        ------
        TypeError, ValueError
            The step or the metadata is invalid; nothing was written.
        FormatError
            Something that is not the store's stands where the folder of a table belongs. The last commit stands, and so
            do the changes in memory.
        DiskFullError
            There is no space on the disk. The last commit stands, and so do the changes in memory. Free some space and
            call again.
        OSError
            Writing or syncing failed. Only the next opening can say whether the commit is on the disk; until then the
            store refuses commits.
        PoisonedError
            A write or sync failed earlier: close the store and open it again. Or an update failed half way: roll back.
        ReadOnlyError, StoreClosedError
            Nothing was written.

        Notes
        -----
        Safe from any thread; waits for other changes, and for a fold if the log is full.

        One commit is under way at a time, so a commit waits for one before it, and then begins. So do `rollback`,
        `checkpoint`, `close`, copies, and whatever creates, drops, renames or resizes tables or vocabularies. Lookups,
        updates and writes go on. If a commit without `wait` fails, its changes are changes still, which the next
        commit takes; the error is raised by `PendingCommit.result` and logged. `last_commit` is the previous one until
        the new one is durable.

        Examples
        --------
        >>> store.commit(step=100, metadata={"loss": 0.3})
        Commit(id=1, step=100, metadata={'loss': 0.3})
        >>> pending = store.commit(step=200, wait=False)
        >>> pending.result()
        Commit(id=2, step=200, metadata={})
        """
        return self._session.commit(step, metadata) if wait else self._session.commit_behind(step, metadata)

    @property
    def tags(self) -> Mapping[str, Commit]:
        """The commits that are kept, by the name of their tag: a snapshot, in the order in which they were tagged."""
        self._session.runtime.check_open()
        return {each.name: each.commit for each in self._session.tag_facts()}

    def tag(self, name: str, *, replace: bool = False) -> Commit:
        """Keep the last commit under a name, until `untag`: it can be read meanwhile, and restored.

        The files of the tables get second names (hard links), so this copies nothing but checksums: 0.2 % of the bytes.
        What is overwritten from now on is kept first, block by block: each block of 4,096 bytes takes that much disk
        space, once for each tag. Tables that are dropped, resized or resharded lose nothing of it.

        Parameters
        ----------
        name : str
            As for a table.
        replace : bool
            Whether a tag of this name may exist, which is then moved, in one instant.

        Returns
        -------
        Commit
            The commit that is kept.

        Raises
        ------
        TagExistsError
            There is such a tag.
        TypeError, ValueError
            The name is invalid.
        ShardEmbError
            Nothing was committed yet, or the file system has no hard links.
        DiskFullError, OSError, PoisonedError
            A write or sync failed; there is no new tag.
        ReadOnlyError, StoreClosedError
            Nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes, and folds what is committed. Changes without a commit stay, and
        are no part of it. While there are tags, older versions of shardemb refuse the store, many new rows are written
        through the log instead of straight to their place, and `copy` copies no tag.

        Examples
        --------
        >>> store.commit(step=100, metadata={"loss": 0.3})
        Commit(id=1, step=100, metadata={'loss': 0.3})
        >>> store.tag("best").step
        100
        >>> with shardemb.open(store.path, mode="r", commit="best") as best:
        ...     best.last_commit.metadata
        {'loss': 0.3}
        >>> list(store.tags)
        ['best']
        """
        return tagging.tag(self._session, name, replaces=replace)

    def changed_rows(self, table: str, since: str) -> NDArray[np.int64]:
        """List the rows of a table whose vectors are not what they were in a tag.

        Only blocks that were overwritten since are compared, so this costs what has changed. A row that was changed and
        changed back is not listed; one that only its optimizer's state has changed is not either.

        Parameters
        ----------
        table : str
            One of the store's tables.
        since : str
            One of `tags`.

        Returns
        -------
        ndarray of int64, shape (n,)
            Row ids, ascending; the caller's own memory. Of a table that the tag has not, or had in another form, such
            as before a reshard: all rows. Rows by which it has grown are among them.

        Raises
        ------
        TableNotFoundError, TagNotFoundError
            There is no such table or tag.
        FormatError, OSError
            Something of the tag is lost, or cannot be read.
        DiskFullError, StoreClosedError, PoisonedError
            In a writer, the fold before failed; the store is closed; a write has failed.

        Notes
        -----
        Safe from any thread. In a writer it waits for other changes, and folds what is committed.

        Examples
        --------
        >>> _ = store.commit()
        >>> _ = store.tag("exported")
        >>> store["tokens"].write([3, 5], np.ones((2, 4), np.float32))
        >>> store.changed_rows("tokens", "exported")
        array([3, 5])
        >>> store.rollback()
        """
        return tagging.changed_rows(self._session, self._session.find(table), since)

    def changed_keys(self, vocabulary: str, since: str) -> KeyChanges:
        """List what a vocabulary has gained and lost since a tag: rows with another key, and keys that are gone.

        Only blocks that were overwritten since are compared, so this costs what has changed, whether it is committed
        yet or not.

        Parameters
        ----------
        vocabulary : str
            One of the store's vocabularies.
        since : str
            One of `tags`.

        Returns
        -------
        KeyChanges
            A frozen dataclass: rows, removed. A key that was removed and came back is not among the removed ones; its
            row is among the rows, unless it is the same. Of a vocabulary that the tag has not: all rows that have a
            key, and no removed keys. So keys of one that was dropped since are in neither.

        Raises
        ------
        VocabularyNotFoundError, TagNotFoundError
            There is no such vocabulary or tag.
        FormatError, DiskFullError, OSError, StoreClosedError, PoisonedError
            As `changed_rows`.

        Notes
        -----
        Safe from any thread. In a writer it waits for other changes, and folds what is committed.

        Examples
        --------
        >>> words = store.create_vocabulary("words", key_type="string")
        >>> words.add(["the", "of"])
        array([0, 1])
        >>> _ = store.commit()
        >>> _ = store.tag("exported", replace=True)
        >>> _ = words.remove(["the"])
        >>> _ = words.add(["and"])
        >>> store.changed_keys("words", "exported")
        KeyChanges(rows=array([2]), removed=array(['the'], dtype=object))
        >>> store.rollback()
        """
        return tagging.changed_keys(self._session, self._session.vocabularies.find(vocabulary), since)

    def untag(self, name: str) -> None:
        """Keep a commit no longer. What was kept for it alone leaves the disk.

        Whoever reads it gets `StaleReaderError` from now on.

        Parameters
        ----------
        name : str
            One of `tags`.

        Raises
        ------
        TagNotFoundError
            There is no such tag.
        OSError, PoisonedError, ReadOnlyError, StoreClosedError
            The tag may still be there.

        Notes
        -----
        Safe from any thread; waits for other changes, and for a fold.

        Examples
        --------
        >>> _ = store.commit(), store.tag("best")
        >>> store.untag("best")
        >>> len(store.tags)
        0
        """
        tagging.untag(self._session, name)

    def restore(self, name: str) -> Commit:
        """Go back to a commit that is kept, and commit that. Changes without a commit are discarded, as by `rollback`.

        Rows, optimizer state, counters, steps, hyper-parameters, frozen rows, names, the set of tables and vocabularies
        are what they were, to the bit. Only rows in blocks that were overwritten since are read and compared, and those
        that differ are committed like any others. A table that was resharded or dropped since is copied from the tag.

        Parameters
        ----------
        name : str
            One of `tags`. It stays.

        Returns
        -------
        Commit
            The new commit: the next id, and step and metadata of the commit that was kept; ``metadata["restored"]``
            says which that was.

        Raises
        ------
        TagNotFoundError
            There is no such tag.
        FormatError
            The tag is damaged. The store is at the last commit.
        DiskFullError
            There is no space. The store is at the last commit, or goes back to it with `rollback`.
        OSError, PoisonedError
            A write or sync failed: close the store and open it again.
        ReadOnlyError, StoreClosedError
            Nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes. All or nothing: a crash leaves the commit before or this one.
        Objects of tables and vocabularies stay valid if their table exists in both commits.

        Examples
        --------
        >>> _ = store.commit(step=100), store.tag("best")
        >>> _ = store.commit(step=200)
        >>> store.restore("best")
        Commit(id=3, step=100, metadata={'restored': {'tag': 'best', 'commit': 1}})
        """
        return tagging.restore(self._session, name)

    def rollback(self) -> None:
        """Go back to the last commit: rows, state, steps, hyper-parameters, vocabularies and the set of tables.

        Raises
        ------
        PoisonedError
            A write or sync failed earlier: close the store and open it again.
        DiskFullError, OSError
            The rollback failed half way, for example because rows have to be spilled and the disk is full. Free some
            space and call it again. Until then, changes and commits are refused.
        ReadOnlyError, StoreClosedError
            Nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes. Tables created since the last commit are gone: their
        objects refuse lookups and changes with `TableNotFoundError`.

        Examples
        --------
        >>> store.rollback()
        """
        self._session.rollback()

    def checkpoint(self) -> None:
        """Fold everything that is committed into the shards, where other readers of zarr see it, and wait for that.

        Commits nothing. Other threads may train and commit meanwhile. The next opening has less to do: it has no log to
        read, and few keys of vocabularies to index again.

        Raises
        ------
        DiskFullError
            There is no space for rows that were never written before. The log keeps them; free some space and call
            again.
        OSError, PoisonedError
            A write or sync failed, in this fold or earlier: close the store and open it again.
        ReadOnlyError, StoreClosedError
            The store cannot be written.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> store.checkpoint()
        """
        self._session.checkpoint()

    def refresh(self) -> None:
        """Move a store that was opened for reading to the newest commit. Its tables stay the same objects.

        Objects of tables that the newest commit no longer has raise `TableNotFoundError`.

        Raises
        ------
        ReadOnlyError
            The store was opened for writing, so it is the newest there is.
        StoreClosedError, FormatError
            Nothing was changed.

        Notes
        -----
        Safe from any thread. Lookups that run meanwhile may still return rows of the commit before.

        Examples
        --------
        >>> with shardemb.open(store.path, mode="r") as reader:
        ...     reader.refresh()
        """
        self._session.refresh()

    def verify(self, tables: Sequence[str] | None = None, *, progress: Progress = None) -> list[Damage]:
        """Compare the files of committed tables with their checksums: every block that a fold has written.

        Reads from the disk, in bounded memory, while training and lookups continue. The log has checksums of its own,
        which are compared whenever it is read.

        Parameters
        ----------
        tables : sequence of str, optional
            Names of tables; by default all tables of the last commit.
        progress : bool or callable, optional
            True shows a bar; a function is called as ``progress(done, total)``, in bytes.

        Returns
        -------
        list of Damage
            What is wrong, by table, file and rows; empty if nothing is. Rows that another program has written into the
            shards are reported too.

        Raises
        ------
        TableNotFoundError
            The last commit has no such table.
        DiskFullError
            There is no space to fold what is in the log.
        StoreClosedError
            The store was closed.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> store.verify()
        []
        """
        return self._session.verify(tables, progress)

    def info(self) -> display.StoreInfo:
        """Return what the store holds and how much disk space it takes. Looks at every file.

        Returns
        -------
        StoreInfo
            A frozen dataclass: path, uuid, commit, bytes_on_disk, tables, vocabularies, tags.

        Raises
        ------
        StoreClosedError
            The store was closed.

        Notes
        -----
        Safe from any thread; changes wait meanwhile.

        Examples
        --------
        >>> store.info().tables[0].name
        'tokens'
        """
        return self._session.info()

    def stats(self) -> dict[str, int]:
        """Return what this process has written since the store was opened.

        Returns
        -------
        dict of str to int
            ``bytes_written`` to files, and ``syncs`` made, by all stores of the process together.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> sorted(store.stats())
        ['bytes_written', 'syncs']
        """
        return self._session.stats()

    # ---- closing

    def close(self, *, progress: bool = False) -> None:
        """Close the store and its tables. Never commits: uncommitted changes are lost, with a `RuntimeWarning`.

        What is committed but not in the shards yet is folded first. If that fails, the log keeps it, and the next
        opening continues; a `RuntimeWarning` says so. A second call does nothing. Any later use of the store or its
        tables raises `StoreClosedError`.

        Parameters
        ----------
        progress : bool
            Show on stderr how far the fold is. It takes as long as the disk needs for what is in the log.

        Notes
        -----
        Safe from any thread. Lookups that still run keep their memory until they end.

        Examples
        --------
        >>> store.close()
        """
        self._session.close(shown=progress)

    def __enter__(self) -> Store:
        self._session.runtime.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self, _finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # At interpreter exit, names of this module may be gone already, hence the default argument. The lock is
        # released with the process then.
        if _finalizing() or not hasattr(self, "_session"):
            return
        runtime = self._session.runtime
        if not runtime.closed and runtime.owned:
            self._session.finalize()  # first: the warning may be an error
            warnings.warn(
                f"the store {runtime.path} was not closed", ResourceWarning, stacklevel=2, source=self
            )

    def __reduce__(self) -> NoReturn:
        msg = (
            f"the store {self._session.runtime.path} cannot be pickled: it is memory and a lock of this process; "
            f'in the other process call shardemb.open({str(self._session.runtime.path)!r}, mode="r")'
        )
        raise TypeError(msg)

    # ---- at a glance

    @property
    def path(self) -> Path:
        """The store's folder, as an absolute path."""
        return self._session.runtime.path

    @property
    def uuid(self) -> str:
        """Identity of the store, whatever its path; a copy has another."""
        return self._session.runtime.committed.uuid

    def __repr__(self) -> str:
        session = self._session
        tables = map(self._table, session.tables.visible().values())
        vocabularies = map(self._vocabulary, tuple(session.vocabularies.current.values()))
        return "\n  ".join([session.headline(), *map(repr, tables), *map(repr, vocabularies)])

    def _repr_html_(self) -> str:
        return self._session.as_html()

    # ---- one object a table and vocabulary, for as long as anyone holds it

    def _table(self, state: TableState) -> Table | KeyedTable:
        found = self._tables.get(state)
        if found is None:
            found, keyed = Table(state, self), self._session.vocabularies.keyed(state)
            if keyed is not None:
                found = KeyedTable(keyed, found, self._vocabulary(keyed.keys))
            found = self._tables.setdefault(state, found)
        return found

    def _vocabulary(self, rows: KeyRows) -> Vocabulary:
        found = self._vocabularies.get(rows)
        return self._vocabularies.setdefault(rows, Vocabulary(rows, self)) if found is None else found


class _Vocabularies(Mapping[str, Vocabulary]):
    """A read-only view of a store's vocabularies by name, which follows the store."""

    def __init__(self, catalog: VocabularyCatalog, shown: Callable[[KeyRows], Vocabulary]) -> None:
        self._catalog, self._shown = catalog, shown

    def __getitem__(self, name: str) -> Vocabulary:
        return self._shown(self._catalog.current[normalized(name)])

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._catalog.current))

    def __len__(self) -> int:
        return len(self._catalog.current)

    def __repr__(self) -> str:
        return repr(dict(self))
