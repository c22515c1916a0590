"""One table: lookup, update, write. Read this first.

A batch goes down through the rooms once: `arrays` checks it, `plan` groups and cuts it, `batch` hands the pieces to
`scheduler`, which runs them on threads, and `kernels` moves the numbers, in memory that `shards` has mapped over the
files. `_plan_read` and `_plan_change` are the checked half of that, so that a store can check many tables before it
changes any.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from shardemb import arrays, batch, files, folders, persisted, plan, rebuild, report, scheduler, usage
from shardemb.errors import ShardEmbError, TableNotFoundError
from shardemb.progress import track
from shardemb.shards import Shards
from shardemb.spec import MAX_ROWS, reshaped_spec

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import dask.array
    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from shardemb.arrays import Float32Array, Int64Array
    from shardemb.batch import Training
    from shardemb.export import ExportReport, RowKeys
    from shardemb.initializers import Initializer
    from shardemb.optim import Optimizer
    from shardemb.progress import Progress
    from shardemb.runtime import Runtime


MATERIALIZED_BYTES = 32 * 2**20
"""Bytes of records that `Table.materialize` brings into the shards at once, through the log."""


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

    def __init__(
        self, runtime: Runtime, name: str, shards: Shards, training: Training, vocabulary: str | None = None
    ) -> None:
        self._runtime = runtime
        self._vocabulary = vocabulary
        self._name = name
        self._shards: Shards | None = shards
        self._spec = shards.spec
        self._training = training
        self._dropped = False

    # ---- what it is

    @property
    def name(self) -> str:
        """Name of the table within its store."""
        return self._name

    @property
    def num_embeddings(self) -> int:
        """Number of rows; row ids run from 0 to one less."""
        return self._spec.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Number of values in a row's weight."""
        return self._spec.embedding_dim

    @property
    def shape(self) -> tuple[int, int]:
        """``(num_embeddings, embedding_dim)``."""
        return self.num_embeddings, self.embedding_dim

    @property
    def rows_per_shard(self) -> int:
        """Rows in a row-shard, which is one file and one zarr chunk."""
        return self._spec.rows_per_shard

    @property
    def nbytes(self) -> int:
        """Bytes of all rows with their optimizer state, whether they take disk yet or not."""
        return self._spec.nbytes

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer with its hyper-parameters, or None."""
        return self._training.optimizer

    @property
    def initializer(self) -> Initializer:
        """What rows hold before they are first written."""
        return self._spec.initializer

    @property
    def step(self) -> int:
        """Number of updates so far, which Adam's bias correction uses."""
        return self._training.step

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
        return self._read("weight", ids, out)

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
        count = self._live().spec.num_embeddings
        checked = arrays.row_ids(ids, count, self.name)
        unique_ids, inverse = plan.distinct(checked.flat, count)
        rows = self._read("weight", unique_ids, None)
        return rows, unique_ids, inverse.reshape(checked.shape)

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
        self._live()
        states = list(self._spec.columns)[1:]
        if column not in states:
            msg = f"table {self.name!r} has no state column {column!r}; it has {', '.join(states) or 'none'}"
            raise ValueError(msg)
        rows = self._read(column, ids, None)
        return rows[..., 0] if self._spec.is_row_wise(column) else rows

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
        shards = self._live()
        checked = arrays.row_ids(ids, shards.spec.num_embeddings, self.name)
        rows = plan.group(checked.flat, shards.spec.num_embeddings).rows
        if for_update:
            self._runtime.check_writable()
        self._runtime.in_background(
            partial(batch.prefetch, self._runtime, shards, rows, for_update=for_update)
        )

    def explain(self, ids: ArrayLike) -> report.Explanation:
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
        shards = self._live()
        checked = arrays.row_ids(ids, shards.spec.num_embeddings, self.name)
        return batch.explain(self._runtime, shards, checked.flat)

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
        shards = self._live()
        with self._runtime.lock:
            on_disk = usage.measure(shards)
        by_shard = zip(on_disk.rows_written.tolist(), on_disk.bytes_allocated.tolist(), strict=True)
        totals, overlay = shards.totals, shards.overlay
        return {
            "lookups": totals.lookups,
            "rows_looked_up": totals.rows_looked_up,
            "cold_lookups": totals.cold_lookups,
            "changes": totals.changes,
            "rows_changed": totals.rows_changed,
            "rows_copied": totals.rows_copied,
            "rows_in_memory": overlay.slots.count,
            "bytes_in_memory": overlay.nbytes,
            "rows_out": overlay.out,
            "bytes_mapped": self._spec.num_shards * self._spec.shard_bytes,
            "rows_written": int(on_disk.rows_written.sum()),
            "bytes_allocated": int(on_disk.bytes_allocated.sum()),
            "shards": [{"rows_written": rows, "bytes_allocated": nbytes} for rows, nbytes in by_shard],
        }

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
        change = self._plan_change(ids, grads, "gradients", check_finite=check_finite)
        batch.change(self._runtime, [change])

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
        change = self._plan_change(ids, rows, "rows", check_finite=check_finite)
        batch.change(self._runtime, [change])

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
        shards = self._live()
        checked = arrays.row_ids(ids, shards.spec.num_embeddings, self.name)
        rows = plan.group(checked.flat, shards.spec.num_embeddings).rows
        batch.change(self._runtime, [self._plan_reset(rows, shards)])

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
        with self._runtime.changing():
            self._live()
            now = self.optimizer
            if (
                now is None
                or type(optimizer) is not type(now)
                or optimizer.initial_state() != now.initial_state()
            ):
                msg = (
                    f"table {self.name!r} has the optimizer {now}; set_optimizer changes its hyper-parameters, "
                    f"not its kind nor what its state starts from, got {optimizer!r}"
                )
                raise ValueError(msg)
            self._training.optimizer = optimizer

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
        count = arrays.count(num_embeddings, "num_embeddings", maximum=MAX_ROWS)
        with self._runtime.writing():
            self._live()
            self._runtime.room.drain()
            old = self._live()
            if count < self.num_embeddings and self._vocabulary is not None:
                msg = f"table {self.name!r} is as large as its vocabulary needs; remove keys instead"
                raise ShardEmbError(msg)
            if count < self.num_embeddings and not drop_rows:
                msg = (
                    f"table {self.name!r} has {self.num_embeddings} rows; "
                    f"resize({count}, drop_rows=True) drops those from {count} on"
                )
                raise ValueError(msg)
            if count != self.num_embeddings:
                self._become(self._resized(old, count), self._training)

    def _grow(self, count: int, ids: Int64Array, records: Float32Array) -> None:
        """Have more rows, and other records in some of them: both or neither. For vocabularies."""
        with self._runtime.writing():
            self._runtime.room.drain()
            self._become(self._resized(self._live(), count, ids, records), self._training)

    def _resized(
        self, old: Shards, count: int, ids: Int64Array | None = None, records: Float32Array | None = None
    ) -> Shards:
        spec = rebuild.resized(old.spec, count)
        directory = folders.parked(self._runtime.path, spec.uuid)
        rebuild.resize(rebuild.Place(old.spec, old.directory), rebuild.Place(spec, directory))
        try:
            new = Shards(spec, directory)
            new.take_changes(old, self._runtime.room)
            if ids is not None and records is not None:
                new.take(ids, records, self._runtime.room)
        except BaseException:
            files.remove_tree(directory)
            raise
        return new

    @contextlib.contextmanager
    def _reshaped(
        self,
        instant: str,
        optimizer: Optimizer | Literal["keep"] | None,
        rows_per_shard: int | None,
        progress: Progress,
        is_committed: Callable[[], bool],
    ) -> Iterator[None]:
        """Go on with a copy that has other shards or another optimizer, if the body commits it. For `Store`."""
        old, keep, before = self._mapped, optimizer == "keep", replace(self._training)
        spec = reshaped_spec(
            old.spec,
            optimizer=old.spec.optimizer if keep else optimizer,
            rows_per_shard=rows_per_shard,
            max_shards=files.MAX_MAPPINGS - files.counters.mappings,
            instant=instant,
        )
        new = rebuild.reshaped(self._runtime.path, old, spec, keep_state=keep, progress=progress)
        self._become(new, before if keep else batch.Training(spec.optimizer, 0))
        try:
            yield
        except BaseException:
            # Unless it is made, or may have been: the next opening tells then.
            if not is_committed() and not self._runtime.poisoned:
                self._become(old, before)
            raise

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
        self._live()
        count = self.num_embeddings if self._spec.has_presence else 0
        step = max(1, MATERIALIZED_BYTES // self._spec.record_bytes)
        with track(count, "materializing", progress=progress) as advance:
            for start in range(0, count, step):
                with self._runtime.writing():
                    shards = self._live()
                    stop = min(start + step, count, self.num_embeddings)
                    ids = shards.never_written(start, stop)
                    if ids.size:
                        self._runtime.room.supplement(shards.spec, ids, partial(shards.pack_first, ids))
                advance(min(step, count - start))

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
        read = partial(_read_weights, self)
        self._live()
        return scheduler.as_array(read, self.num_embeddings, self.embedding_dim, self.rows_per_shard)

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
        from shardemb import export

        self._live()
        return export.to_arrow_batches(
            Source(self),
            columns=columns,
            rows=rows,
            run=partial(scheduler.run, threads=self._runtime.threads),
            workers=self._runtime.threads,
        )

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
        from shardemb import export

        self._live()
        return export.export_parquet(
            Source(self),
            path,
            columns=columns,
            rows=rows,
            parts=parts,
            progress=progress,
            run=partial(scheduler.run, threads=self._runtime.threads),
            workers=self._runtime.threads,
        )

    # ---- at a glance

    def __repr__(self) -> str:
        return report.one_line(self._facts())

    def _repr_html_(self) -> str:
        return report.html_table([self._facts()])

    def __len__(self) -> int:
        return self.num_embeddings

    def __reduce__(self) -> NoReturn:
        msg = (
            f"table {self.name!r} cannot be pickled: it is memory of this process; in the other process call "
            f'shardemb.open({str(self._runtime.path)!r}, mode="r")[{self.name!r}]'
        )
        raise TypeError(msg)

    def _facts(self, *, measured: bool = False) -> report.Facts:
        """Return what is told about the table at a glance, with the disk space that it takes where it is measured."""
        changed = self._shards.changes if self._shards and not self._runtime.closed else None
        return report.Facts(
            name=self.name,
            num_embeddings=self.num_embeddings,
            embedding_dim=self.embedding_dim,
            optimizer=repr(self.optimizer) if self.optimizer else "no optimizer",
            initializer=repr(self.initializer),
            step=self.step,
            state_columns=tuple(self._spec.columns)[1:],
            rows_per_shard=self.rows_per_shard,
            num_shards=self._spec.num_shards,
            nbytes=self.nbytes,
            changed_rows=changed,
            bytes_on_disk=files.allocated(self._mapped.directory) if measured else None,
        )

    # ---- the way down

    def _plan_read(self, column: str, ids: ArrayLike) -> batch.Wanted:
        """Check a lookup. For `Store`."""
        # Of what is read, and not of what the table may become meanwhile: ids past its end would be read from nowhere.
        shards = self._live()
        checked = arrays.row_ids(ids, shards.spec.num_embeddings, self.name)
        first, last = shards.spec.columns[column]
        return batch.Wanted(shards, column, checked.flat, (*checked.shape, last - first))

    def _plan_change(
        self, ids: ArrayLike, values: ArrayLike, what: str, *, check_finite: bool
    ) -> batch.Change:
        """Check an update (`what` is "gradients") or a write ("rows") and group its ids. For `Store`."""
        shards = self._live()
        if what == "gradients" and self.optimizer is None:
            msg = f"table {self.name!r} has no optimizer: give create_table one, or set rows with write()"
            raise ValueError(msg)
        checked = arrays.row_ids(ids, shards.spec.num_embeddings, self.name)
        shape = (*checked.shape, self.embedding_dim)
        rows = arrays.rows(values, shape, what=what, table=self.name, check_finite=check_finite)
        grouped = plan.group(checked.flat, shards.spec.num_embeddings)
        return batch.Change(shards, grouped, rows, self._training if what == "gradients" else None)

    def _plan_reset(self, rows: Int64Array, shards: Shards | None = None) -> batch.Change:
        """Plan to make ascending rows as new, those that have a record. For vocabularies."""
        shards = shards or self._live()
        rows = rows[shards.were_written(rows) | (shards.overlay.places(rows) != rows)]
        grouped = plan.Grouped(rows, np.arange(rows.size + 1), np.arange(rows.size))
        return batch.Change(shards, grouped, shards.first_records(rows), None)

    @property
    def _mapped(self) -> Shards:
        """The table's memory, as long as the store is open. For `Store`."""
        assert self._shards is not None
        return self._shards

    def _release(self) -> None:
        """Let go of the table's memory: it is unmapped once the last lookup that still runs has ended."""
        self._shards = None

    def _adopt(self, newer: Table) -> Table:
        """Become what a newer opening of the same table is."""
        self._name, self._spec, self._shards = newer._name, newer._spec, newer._shards
        self._training, self._dropped = newer._training, False
        return self

    def _become(self, shards: Shards, training: Training) -> None:
        """Go on with other memory, of a table with other rows, shards or state. Under the store's lock."""
        if self._shards is not None:
            self._shards.successor = shards
        shards.successor = None
        self._shards, self._spec = shards, shards.spec
        self._training.optimizer, self._training.step = training.optimizer, training.step

    def _restore(self, name: str, shards: Shards, training: Training) -> None:
        self._name, self._dropped = name, False
        self._become(shards, training)

    def _live(self) -> Shards:
        self._runtime.check_open()
        if self._shards is None or self._dropped:
            msg = f"table {self.name!r} is no longer in the store {self._runtime.path}"
            raise TableNotFoundError(msg)
        return self._shards

    def _read(self, column: str, ids: ArrayLike, out: NDArray[np.float32] | None) -> Float32Array:
        wanted = self._plan_read(column, ids)
        made, shape = self._runtime.results, wanted.shape
        result = made.empty(shape) if out is None else arrays.output(out, shape)
        batch.read(self._runtime, [wanted.into(result)])
        return result


def _read_weights(table: Table, start: int, stop: int) -> Float32Array:
    return batch.read_range(table._runtime, table._live(), "weight", start, stop)


class Source:
    """A table as `export` sees it."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self.name = table.name
        self.num_embeddings = table.num_embeddings
        self.embedding_dim = table.embedding_dim
        self.rows_per_shard = table.rows_per_shard
        self.keys: RowKeys | None = None
        spec = table._spec
        self.columns = {
            name: last - first for name, (first, last) in spec.columns.items() if name != "weight"
        }

    def read_rows(self, start: int, stop: int, columns: Sequence[str]) -> list[Float32Array]:  # noqa: D102
        runtime, shards = self._table._runtime, self._table._live()
        return [batch.read_range(runtime, shards, column, start, stop) for column in ("weight", *columns)]

    def give_back(self, start: int, stop: int) -> None:  # noqa: D102
        runtime = self._table._runtime
        with runtime.lock:
            self._table._live().give_back(start, stop)

    def describe(self) -> Mapping[str, object]:  # noqa: D102
        spec, optimizer = self._table._spec, self._table.optimizer
        return {
            "uuid": spec.uuid,
            "step": self._table.step,
            "optimizer": persisted.to_json(optimizer) if optimizer else None,
            "initializer": persisted.to_json(spec.initializer),
        }
