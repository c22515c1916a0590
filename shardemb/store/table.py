"""One table as its users hold it: lookup, update, write. Read this first.

Contracts only: each method is one call of `TableState`, which leads down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from shardemb.engine.table_state import TableSource
from shardemb.store import display

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    import dask.array
    import numpy as np
    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from shardemb.base.progress import Progress
    from shardemb.engine.batch import Explanation
    from shardemb.engine.table_state import TableState
    from shardemb.initializers import Initializer
    from shardemb.io.parquet import ExportReport
    from shardemb.optim import Optimizer


class Table:
    """Rows of float32 on disk, looked up and trained by row id. Made by `Store.create_table`, found by name.

    Lookups may run in any number of threads, also beside an update; a lookup beside an update may see a row half
    old and half new. Updates, writes and commits wait for each other. A table cannot be pickled: open the store in
    the other process, with ``mode="r"`` where it only reads.

    Examples
    --------
    >>> import shardemb
    >>> store = shardemb.open(tmp / "words.zarr")
    >>> table = store.create_table(
    ...     "tokens", num_embeddings=400_000, embedding_dim=4, optimizer=shardemb.optim.SGD(lr=0.5)
    ... )
    >>> table.update([7, 7], [[1, 0, 0, 0.0], [1, 0, 0, 2.0]])
    >>> table.lookup([[7], [8]])
    array([[[-1.,  0.,  0., -1.]],
    <BLANKLINE>
           [[ 0.,  0.,  0.,  0.]]], dtype=float32)
    >>> table
    Table 'tokens': 400,000 x 4 float32, SGD(lr=0.5), step 1, 1 shard, 1 changed row not committed
    >>> store.commit(step=1)
    Commit(id=1, step=1, metadata={})
    >>> store.close()
    """

    def __init__(self, state: TableState) -> None:
        self._state = state

    # ---- what it is

    @property
    def name(self) -> str:
        """Name of the table within its store."""
        return self._state.name

    @property
    def num_embeddings(self) -> int:
        """Number of rows; row ids run from 0 to one less."""
        return self._state.spec.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Number of values in a row's weight."""
        return self._state.spec.embedding_dim

    @property
    def shape(self) -> tuple[int, int]:
        """``(num_embeddings, embedding_dim)``."""
        return self.num_embeddings, self.embedding_dim

    @property
    def rows_per_shard(self) -> int:
        """Rows in a row-shard, which is one file and one zarr chunk."""
        return self._state.spec.rows_per_shard

    @property
    def nbytes(self) -> int:
        """Bytes of all rows with their optimizer state, whether they take disk yet or not."""
        return self._state.spec.nbytes

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer with its hyper-parameters, or None."""
        return self._state.training.optimizer

    @property
    def initializer(self) -> Initializer:
        """What rows hold before they are first written."""
        return self._state.spec.initializer

    @property
    def step(self) -> int:
        """Number of updates so far, which Adam's bias correction uses."""
        return self._state.training.step

    # ---- reading

    def lookup(self, ids: ArrayLike, *, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Copy rows out of the table.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape; lists too, empty ones too.
        out : ndarray of float32, shape ``ids.shape + (embedding_dim,)``, optional
            C-contiguous and writable; filled and returned.

        Returns
        -------
        ndarray of float32, shape ``ids.shape + (embedding_dim,)``
            The caller's own memory, never a view of the table.

        Raises
        ------
        TypeError, ValueError
            The ids are not integers; `out` does not fit.
        RowIdError
            An id is negative or past the end.
        StoreClosedError, TableNotFoundError
            The store was closed; the table was dropped.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.lookup([[0, 2], [1, 2]]).shape
        (2, 2, 4)
        """
        return self._state.read("weight", ids, out)

    def lookup_unique(
        self, ids: ArrayLike
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Copy each distinct row once.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.

        Returns
        -------
        rows : ndarray of float32, shape (u, embedding_dim)
            The distinct rows, by ascending id; the caller's own memory.
        unique_ids : ndarray of int64, shape (u,)
            Their ids.
        inverse : ndarray of int64, shape ``ids.shape``
            ``rows[inverse]`` is what `lookup` returns.

        Raises
        ------
        TypeError, RowIdError, StoreClosedError, TableNotFoundError
            As `lookup`.

        Examples
        --------
        >>> rows, unique_ids, inverse = table.lookup_unique([5, 3, 5])
        >>> unique_ids, inverse
        (array([3, 5]), array([1, 0, 1]))
        """
        return self._state.read_unique(ids)

    def state(self, column: str, ids: ArrayLike) -> NDArray[np.float32]:
        """Copy optimizer state of rows.

        Parameters
        ----------
        column : str
            One of the optimizer's state columns, for example ``"exp_avg"``.
        ids : array_like of int
            Row ids of any integer dtype and any shape.

        Returns
        -------
        ndarray of float32, shape ``ids.shape + (embedding_dim,)``, or ``ids.shape``
            The latter where the column is one number a row. The caller's own memory.

        Raises
        ------
        ValueError
            The table has no such column.
        TypeError, RowIdError, StoreClosedError, TableNotFoundError
            As `lookup`.

        Examples
        --------
        >>> table.state("exp_avg", [0, 1]).shape
        (2, 4)
        """
        return self._state.read_state(column, ids)

    def prefetch(self, ids: ArrayLike, *, for_update: bool = False) -> None:
        """Start to read rows into memory, in the background.

        Parameters
        ----------
        ids : array_like of int
            Row ids that a later lookup or update will ask for.
        for_update : bool
            Also copy the rows to where an update changes them, which it would do otherwise.

        Raises
        ------
        TypeError, RowIdError, StoreClosedError, TableNotFoundError
            As `lookup`; `ReadOnlyError` with `for_update` in a read-only store.

        Examples
        --------
        >>> table.prefetch([1, 2, 3], for_update=True)
        """
        self._state.prefetch(ids, for_update=for_update)

    def explain(self, ids: ArrayLike) -> Explanation:
        """Tell what a lookup of a batch meets, to see why it is slow: where its rows lie, and what has to be read.

        Looks at every page of the batch, and reads none.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.

        Returns
        -------
        Explanation
            A frozen dataclass; prints as a few lines. True of this moment only.

        Raises
        ------
        TypeError, RowIdError, StoreClosedError, TableNotFoundError
            As `lookup`.

        Examples
        --------
        >>> table.explain([1, 2, 2]).rows
        2
        """
        return self._state.explain(ids)

    def stats(self) -> dict[str, Any]:
        """Tell what was done with the table since it was opened, and what it takes in memory and on disk.

        Looks at every file of the table: about a millisecond for a hundred shards.

        Returns
        -------
        dict
            Since it was opened: ``lookups``, ``rows_looked_up`` and ``cold_lookups``; ``changes`` (updates and writes)
            and their distinct ``rows_changed``; ``rows_copied`` from the files into memory before they changed. Now:
            ``rows_in_memory`` and the ``bytes_in_memory`` that they take, which count against the memory budget;
            ``rows_out``, which are in the scratch file; ``bytes_mapped`` of address space for the files, which costs
            nothing; ``rows_written``, and the ``bytes_allocated`` for them on the disk. These two also by shard:
            ``shards`` is a list of dicts. Where rows start from zeros alone, no bitmap says which were written, and
            ``rows_written`` counts all rows of the blocks of 4,096 bytes that were.

        Raises
        ------
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Examples
        --------
        >>> before = table.stats()["rows_looked_up"]
        >>> rows = table.lookup([1, 2, 2])
        >>> table.stats()["rows_looked_up"] - before
        3
        """
        return self._state.stats()

    # ---- changing

    def update(self, ids: ArrayLike, grads: ArrayLike, *, check_finite: bool = True) -> None:
        """Take one optimizer step on the rows in `ids`; all of it or nothing.

        Gradients of duplicate ids are summed first, in the order of the batch, so the result has the same bits for
        any number of threads and shards. Rows that are not in `ids` do not move. In memory only until `Store.commit`.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.
        grads : array_like of float, shape ``ids.shape + (embedding_dim,)``
            float16, float32 or float64; computed in float32.
        check_finite : bool
            Refuse NaN and infinity.

        Raises
        ------
        TypeError, ValueError
            Wrong dtype or shape; NaN or infinity; the table has no optimizer.
        RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError
            Nothing was changed.

        Examples
        --------
        >>> table.update([0, 1], np.ones((2, 4), np.float32))
        """
        self._state.change(ids, grads, "gradients", check_finite=check_finite)

    def write(self, ids: ArrayLike, rows: ArrayLike, *, check_finite: bool = True) -> None:
        """Overwrite weights; optimizer state stays. In memory only until `Store.commit`.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape; of duplicates the last wins.
        rows : array_like of float, shape ``ids.shape + (embedding_dim,)``
            float16, float32 or float64; kept as float32.
        check_finite : bool
            Refuse NaN and infinity.

        Raises
        ------
        TypeError, ValueError
            Wrong dtype or shape; NaN or infinity.
        RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError
            Nothing was changed.

        Examples
        --------
        >>> table.write([3], [[1.0, 2.0, 3.0, 4.0]])
        >>> table.lookup(3)
        array([1., 2., 3., 4.], dtype=float32)
        """
        self._state.change(ids, rows, "rows", check_finite=check_finite)

    def reset_rows(self, ids: ArrayLike) -> None:
        """Make rows as new: their initial values, and fresh state. In memory only until `Store.commit`.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.

        Raises
        ------
        TypeError, RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError
            Nothing was changed.

        Examples
        --------
        >>> table.reset_rows([3])
        """
        self._state.reset(ids)

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Change hyper-parameters, from the next update on; part of the next commit.

        Parameters
        ----------
        optimizer : Optimizer
            Of the same class as the table's and with the same initial state, so that records stay what they are.

        Raises
        ------
        ValueError
            Not an optimizer, or one with other state.
        ReadOnlyError, StoreClosedError, TableNotFoundError
            Nothing was changed.

        Examples
        --------
        >>> table.set_optimizer(shardemb.optim.Adam(lr=1e-4))
        """
        self._state.set_optimizer(optimizer)

    def resize(self, num_embeddings: int, *, drop_rows: bool = False) -> None:
        """Change the number of rows; part of the next commit, and undone by a rollback.

        New rows hold their initial values, the same as if the table had been created so large; the shards that are
        there stay as they are. Takes a fold, and on the disk what the new rows take: nothing until they are written.

        Parameters
        ----------
        num_embeddings : int
            Rows from now on.
        drop_rows : bool
            Allow fewer than now. Those behind the end are gone with the next commit: should the table grow again, they
            hold their initial values.

        Raises
        ------
        TypeError, ValueError
            No such number; fewer rows than now, without `drop_rows`.
        ShardEmbError
            There would be too many shards: `Store.reshard` makes them larger.
        DiskFullError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError
            Nothing was changed.

        Examples
        --------
        >>> table.resize(500_000)
        >>> table.num_embeddings
        500000
        """
        self._state.resize(num_embeddings, drop_rows=drop_rows)

    def materialize(self, *, progress: Progress = None) -> None:
        """Write initial values of all rows that were never written into the shards, for readers that know only zarr.

        No value changes, so it is no part of a commit. Lookups and updates go on meanwhile. Cut short, it goes on
        where it stopped when it is called again. Rows with changes that are not committed are left to their commit.

        Parameters
        ----------
        progress : bool or callable, optional
            True for a bar; or a function that is called with the rows done and the rows in all.

        Raises
        ------
        ShardEmbError
            The table is not part of a commit yet.
        DiskFullError
            There is no room; what is written stays.
        ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError
            Nothing was written.

        Notes
        -----
        The table takes `nbytes` on the disk then. One whose rows start from zeros alone needs none of it: holes of
        its files read as zeros.

        Examples
        --------
        >>> small = store.create_table(
        ...     "small", num_embeddings=100, embedding_dim=2, initializer=shardemb.initializers.Constant(1.0)
        ... )
        >>> commit = store.commit()
        >>> small.materialize()
        """
        self._state.materialize(progress)

    # ---- leaving

    def to_dask_array(self) -> dask.array.Array:
        """Make a dask array of the weights, one chunk a row-shard, read when it is computed.

        Returns
        -------
        dask.array.Array of float32, shape (num_embeddings, embedding_dim)
            Shows the rows as they are when a chunk is computed, changes that are not committed included. For
            schedulers of this process; from other processes open ``TABLE/rows`` with `dask.array.from_zarr`.

        Raises
        ------
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Examples
        --------
        >>> float(table.to_dask_array()[:100].sum().compute())
        0.0
        """
        return self._state.as_dask_array()

    def to_arrow_batches(
        self, *, columns: Sequence[str] = (), rows: tuple[int, int] | None = None
    ) -> pa.RecordBatchReader:
        """Stream the table as Arrow record batches, in bounded memory.

        Parameters
        ----------
        columns : sequence of str
            Optimizer state columns to add.
        rows : tuple of two int, optional
            ``(start, stop)``, a half-open range of row ids; all rows by default.

        Returns
        -------
        pyarrow.RecordBatchReader
            ``id: int64``, ``embedding: FixedSizeList<float32>``, then the state columns; at most 65,536 rows a
            batch. duckdb, polars, lance and others take it as it is. Read it before the store is closed.

        Raises
        ------
        ValueError
            No such column, or no such range.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Examples
        --------
        >>> table.to_arrow_batches(rows=(10, 20)).read_all().num_rows
        10
        """
        from shardemb.io import arrow

        return arrow.to_arrow_batches(TableSource(self._state), columns=columns, rows=rows)

    def export_parquet(
        self,
        path: str | os.PathLike[str],
        *,
        columns: Sequence[str] = (),
        rows: tuple[int, int] | None = None,
        parts: int | None = None,
        progress: Progress = None,
    ) -> ExportReport:
        """Write the table to a parquet file, or to a folder of them, in bounded memory.

        Parameters
        ----------
        path : path-like
            The file; one that exists is replaced, in one instant. With `parts`, the folder: new or empty.
        columns : sequence of str
            Optimizer state columns to add.
        rows : tuple of two int, optional
            ``(start, stop)``, a half-open range of row ids; all rows by default.
        parts : int, optional
            Write this many files, several at a time, which is faster on several cores.
        progress : bool or callable, optional
            True for a bar; or a function that is called with the rows done and the rows in all.

        Returns
        -------
        ExportReport
            Path, files, rows and bytes.

        Raises
        ------
        TypeError, ValueError
            No such column, no such range, or a number of parts below 1.
        FileNotFoundError, FileExistsError, DiskFullError
            About `path`; what was there before is as it was.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        ``id: int64``, ``embedding: FixedSizeList<float32>`` and the state columns, none of them nullable; zstd,
        BYTE_STREAM_SPLIT, row groups of at most 65,536 rows. Rows are exported as a lookup sees them, changes that
        are not committed included.

        Examples
        --------
        >>> report = table.export_parquet(tmp / "tokens.parquet", rows=(0, 100))
        >>> report.num_rows
        100
        """
        from shardemb.io import parquet

        return parquet.export_parquet(
            TableSource(self._state), path, columns=columns, rows=rows, parts=parts, progress=progress
        )

    # ---- at a glance

    def __repr__(self) -> str:
        return display.one_line(display.facts(self._state))

    def _repr_html_(self) -> str:
        return display.html_table([display.facts(self._state)])

    def __len__(self) -> int:
        return self.num_embeddings

    def __reduce__(self) -> NoReturn:
        path = str(self._state.runtime.path)
        msg = (
            f"table {self.name!r} cannot be pickled: it is memory of this process; in the other process call "
            f'shardemb.open({path!r}, mode="r")[{self.name!r}]'
        )
        raise TypeError(msg)
