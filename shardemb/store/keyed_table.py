"""A table that is used by keys, as its users hold it.

Contracts only: each method is one call of `KeyedRows`, which leads down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    import numpy as np
    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from shardemb.base.progress import Progress
    from shardemb.initializers import Initializer
    from shardemb.io.parquet import ExportReport
    from shardemb.optim import Optimizer
    from shardemb.store.table import Table
    from shardemb.store.vocabulary import Vocabulary
    from shardemb.vocabulary.keyed_rows import KeyedRows, Missing
    from shardemb.vocabulary.keys import KeysLike


class KeyedTable:
    """Rows of float32 by key. Made by `Store.create_table` with a vocabulary, found by name.

    The vocabulary, which several tables may share, gives out rows; the table grows with it. `rows` is the same table by
    row id. Threads may do what they may do with a `Table`.

    Examples
    --------
    >>> import shardemb
    >>> store = shardemb.open(tmp / "model.zarr")
    >>> users = store.create_vocabulary("users", key_type="int64")
    >>> table = store.create_table(
    ...     "users", vocabulary="users", embedding_dim=2, optimizer=shardemb.optim.SGD(lr=0.5), counters=True
    ... )
    >>> table.lookup([1234567890123, -5], create=True)
    array([[0., 0.],
           [0., 0.]], dtype=float32)
    >>> table.update([-5], [[1.0, 2.0]])
    >>> table.lookup([-5, 99], missing="zeros")
    array([[-0.5, -1. ],
           [ 0. ,  0. ]], dtype=float32)
    >>> table
    KeyedTable 'users': 2 int64 keys x 2 float32, SGD(lr=0.5), step 1
    >>> commit = store.commit()
    >>> store.close()
    """

    def __init__(self, keyed: KeyedRows, rows: Table, vocabulary: Vocabulary) -> None:
        self._keyed = keyed
        self._rows = rows
        self._vocabulary = vocabulary

    # ---- what it is

    @property
    def rows(self) -> Table:
        """The same table by row id. It has more rows than were given out, so that it grows rarely."""
        return self._rows

    @property
    def vocabulary(self) -> Vocabulary:
        """What tells which key has which row."""
        return self._vocabulary

    @property
    def name(self) -> str:
        """Name of the table within its store."""
        return self._rows.name

    @property
    def num_embeddings(self) -> int:
        """Rows given out so far, those of no key by now included."""
        return self._keyed.num_rows

    @property
    def embedding_dim(self) -> int:
        """Number of values in a row's weight."""
        return self._rows.embedding_dim

    @property
    def shape(self) -> tuple[int, int]:
        """``(num_embeddings, embedding_dim)``."""
        return self.num_embeddings, self.embedding_dim

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer with its hyper-parameters, or None."""
        return self._rows.optimizer

    @property
    def initializer(self) -> Initializer:
        """What rows hold before they are first written."""
        return self._rows.initializer

    @property
    def step(self) -> int:
        """Number of updates so far."""
        return self._rows.step

    def __len__(self) -> int:
        return len(self._vocabulary)

    def __repr__(self) -> str:
        kind = f"{len(self):,} {self._vocabulary.key_type} keys"
        state = f"{self.optimizer or 'no optimizer'}, step {self.step}"
        return f"KeyedTable {self.name!r}: {kind} x {self.embedding_dim} float32, {state}"

    def stats(self) -> dict[str, Any]:
        """Tell what was done with the table and what it takes; see `Table.stats`.

        Returns
        -------
        dict
            That of `rows`, and ``vocabulary``, that of `Vocabulary.stats`; with counters also ``updates``, the sum of
            all counts.

        Examples
        --------
        >>> table.stats()["vocabulary"]["keys"]
        2
        """
        return self._keyed.stats()

    # ---- reading

    def lookup(
        self,
        keys: KeysLike,
        *,
        missing: Missing = "error",
        create: bool = False,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Copy rows out of the table.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `Vocabulary.lookup`.
        missing : {"error", "initial", "zeros"} or int
            For keys that have no row: raise; the initial value of the row that the key would get; zeros; or what the
            row of this id holds, which may be reserved for that.
        create : bool
            Give new keys rows first, as `Vocabulary.add` does: what `missing` says is for those not admitted then.
        out : ndarray of float32, shape ``keys.shape + (embedding_dim,)``, optional
            As for `Table.lookup`.

        Returns
        -------
        ndarray of float32, shape ``keys.shape + (embedding_dim,)``
            The caller's own memory.

        Raises
        ------
        UnknownKeyError
            A key has no row.
        TypeError, ValueError, RowIdError, StoreClosedError, TableNotFoundError
            As `Vocabulary.lookup` and `Table.lookup`; with `create` also what `Vocabulary.add` raises.

        Examples
        --------
        >>> table.lookup([[-5], [7]], missing="initial").shape
        (2, 1, 2)
        """
        return self._keyed.read(keys, missing=missing, create=create, out=out)

    def state(self, column: str, keys: KeysLike) -> NDArray[np.float32]:
        """Copy optimizer state, or counters, of rows; see `Table.state`.

        Raises
        ------
        UnknownKeyError
            A key has no row.
        TypeError, ValueError, StoreClosedError, TableNotFoundError
            As `lookup`.

        Examples
        --------
        >>> table.state("count", [-5])
        array([1.], dtype=float32)
        """
        return self._keyed.read_state(column, keys)

    def prefetch(self, keys: KeysLike, *, for_update: bool = False) -> None:
        """Start to read the rows of keys that have one; see `Table.prefetch`.

        Examples
        --------
        >>> table.prefetch([-5, 99])
        """
        self._keyed.prefetch(keys, for_update=for_update)

    # ---- changing

    def update(
        self,
        keys: KeysLike,
        grads: ArrayLike,
        *,
        missing: Literal["error", "skip"] | int = "error",
        check_finite: bool = True,
    ) -> None:
        """Take one optimizer step on the rows of keys; see `Table.update`.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `lookup`.
        grads : array_like of float, shape ``keys.shape + (embedding_dim,)``
        missing : {"error", "skip"} or int
            For keys that have no row: raise; leave their gradients out; or take them as those of the row of this id.
        check_finite : bool
            Refuse NaN and infinity.

        Raises
        ------
        UnknownKeyError, TypeError, ValueError, RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError
            Nothing was changed.

        Examples
        --------
        >>> table.update([-5, 99], np.ones((2, 2), np.float32), missing="skip")
        """
        self._keyed.change(keys, grads, "gradients", missing=missing, check_finite=check_finite)

    def write(
        self,
        keys: KeysLike,
        rows: ArrayLike,
        *,
        missing: Literal["error", "skip"] | int = "error",
        check_finite: bool = True,
    ) -> None:
        """Overwrite the weights of keys that have rows; see `update` and `Table.write`.

        Examples
        --------
        >>> table.write([-5], [[1.0, 2.0]])
        """
        self._keyed.change(keys, rows, "rows", missing=missing, check_finite=check_finite)

    def evict(
        self, *, older_than: int | None = None, keep: int | None = None, by: Literal["lru", "lfu"] = "lru"
    ) -> NDArray[Any]:
        """Take rows away from keys that are of little use; other keys get them after the next commit.

        All tables of the vocabulary have these rows as new then. A row that was never updated is the oldest and the
        least frequent.

        Parameters
        ----------
        older_than : int, optional
            Those that were not updated in the last so many steps of this table.
        keep : int, optional
            All but so many.
        by : {"lru", "lfu"}
            Which are kept: those that were updated last, or most often. Of equal ones the lower row ids.

        Returns
        -------
        ndarray of int64, or of str or bytes objects, shape (n,)
            The keys that lost their rows, in the order of these.

        Raises
        ------
        ValueError
            The table has no counters; not exactly one of `older_than` and `keep`.
        ReadOnlyError, StoreClosedError, TableNotFoundError, DiskFullError
            Nothing was changed.

        Examples
        --------
        >>> table.evict(keep=1, by="lfu")
        array([1234567890123])
        """
        return self._keyed.evict(older_than=older_than, keep=keep, by=by)

    # ---- leaving

    def to_arrow_batches(
        self, *, columns: Sequence[str] = (), rows: tuple[int, int] | None = None
    ) -> pa.RecordBatchReader:
        """Stream the rows that have keys as Arrow record batches, in bounded memory; see `Table.to_arrow_batches`.

        Parameters
        ----------
        columns : sequence of str
            Optimizer state columns and counters to add.
        rows : tuple of two int, optional
            ``(start, stop)``, a half-open range of row ids; all rows by default.

        Returns
        -------
        pyarrow.RecordBatchReader
            ``id: int64``, ``key`` (int64, large_string or large_binary), ``embedding: FixedSizeList<float32>``, then
            the other columns, in the order of the rows.

        Raises
        ------
        ValueError, StoreClosedError, TableNotFoundError
            As `Table.to_arrow_batches`.

        Examples
        --------
        >>> table.to_arrow_batches(columns=["count"]).read_all().column_names
        ['id', 'key', 'embedding', 'count']
        """
        from shardemb.io import arrow

        return arrow.to_arrow_batches(self._keyed.source(), columns=columns, rows=rows)

    def export_parquet(
        self,
        path: str | os.PathLike[str],
        *,
        columns: Sequence[str] = (),
        rows: tuple[int, int] | None = None,
        parts: int | None = None,
        progress: Progress = None,
    ) -> ExportReport:
        """Write the rows that have keys to a parquet file, or to a folder of them; see `Table.export_parquet`.

        Parameters
        ----------
        path, columns, rows, parts, progress
            As for `Table.export_parquet`.

        Returns
        -------
        ExportReport
            Path, files, rows and bytes.

        Raises
        ------
        TypeError, ValueError, FileNotFoundError, FileExistsError, DiskFullError
            As `Table.export_parquet`.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Examples
        --------
        >>> table.export_parquet(tmp / "users.parquet").num_rows
        2
        """
        from shardemb.io import parquet

        return parquet.export_parquet(
            self._keyed.source(), path, columns=columns, rows=rows, parts=parts, progress=progress
        )
