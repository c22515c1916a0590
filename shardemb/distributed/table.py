"""A distributed table as its users hold it: the names and the meaning of `Table`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np

from shardemb import optim
from shardemb.bags import Bags
from shardemb.base import serialization, validation
from shardemb.compute import plan, scheduler
from shardemb.distributed import batches, work
from shardemb.engine.training import Padding, Scaling, is_checked

if TYPE_CHECKING:
    import os
    import threading
    from collections.abc import Callable, Mapping, Sequence

    import dask.array
    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from shardemb import initializers
    from shardemb.bags import Mode
    from shardemb.base.progress import Progress
    from shardemb.base.validation import Int64Array
    from shardemb.distributed.batches import Step
    from shardemb.distributed.link import Link
    from shardemb.distributed.work import TableFacts
    from shardemb.dtypes import Dtype
    from shardemb.exports.parquet import Encoding
    from shardemb.exports.selection import RowKeys
    from shardemb.exports.targets import ExportReport
    from shardemb.optim import Optimizer


T = TypeVar("T")

CHUNK_BYTES = 2**24
"""About the size of what is looked up at once of a whole table."""


class Connected(Protocol):
    """What a table needs of its store."""

    @property
    def link(self) -> Link:
        """See `DistributedStore.link`."""

    def facts(self, name: str) -> TableFacts:
        """See `DistributedStore.facts`."""

    def look_again(self) -> None:
        """See `DistributedStore.look_again`."""

    def take_steps(self, steps: Sequence[Step], scaling: Scaling | None) -> float | None:
        """See `DistributedStore.take_steps`."""

    def lookup_bag(self, bags: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        """See `DistributedStore.lookup_bag`."""

    def update_bag(
        self,
        batches: Mapping[str, tuple[Any, ...]],
        *,
        scale_grad_by_freq: bool = False,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """See `DistributedStore.update_bag`."""


class DistributedTable:
    """A table whose rows are spread over the partitions of a `DistributedStore`; found there by name.

    Results have the bits of a `Table` of one local store, for any number of partitions and owners. Ids are made
    distinct, and the gradients of equal ones summed, before they are sent. Pickled as a handle, like its store.

    Thread safety: lookups may run in any number of threads; changes of one process wait for each other. Several
    processes may train a table at the same time; the order of their updates is then not defined.
    """

    def __init__(self, store: Connected, name: str) -> None:
        self._store, self._name = store, name

    # ---- what it is

    @property
    def facts(self) -> TableFacts:
        """What this process knows of the table."""
        return self._store.facts(self._name)

    @property
    def store(self) -> Any:  # noqa: ANN401 -- a `DistributedStore`, which imports this module
        """The store that the table is in."""
        return self._store

    @property
    def name(self) -> str:
        """See `Table.name`."""
        return self._name

    @property
    def num_embeddings(self) -> int:
        """See `Table.num_embeddings`."""
        return self.facts.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """See `Table.embedding_dim`."""
        return self.facts.embedding_dim

    @property
    def shape(self) -> tuple[int, int]:
        """``(num_embeddings, embedding_dim)``."""
        return self.num_embeddings, self.embedding_dim

    @property
    def dtype(self) -> str | Dtype:
        """See `Table.dtype`."""
        return self.facts.dtype

    @property
    def optimizer(self) -> Optimizer | None:
        """See `Table.optimizer`."""
        return self.facts.optimizer

    @property
    def initializer(self) -> initializers.Initializer:
        """See `Table.initializer`."""
        return self.facts.initializer

    @property
    def padding_idx(self) -> int | None:
        """See `Table.padding_idx`."""
        return self.facts.padding_idx

    @property
    def step(self) -> int:
        """Number of updates so far, asked of an owner."""
        (step,) = self._store.link.ask(work.Step(self.facts.name), [0]).values()
        return int(step)

    # ---- reading

    def lookup(
        self, ids: ArrayLike, *, dtype: str | None = None, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Copy rows out of the table; see `Table.lookup`.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.
        dtype : str, optional
            As for `Table.lookup`.
        out : ndarray of that dtype, shape ``ids.shape + (embedding_dim,)``, optional
            Array to fill and return.

        Returns
        -------
        ndarray of float32 or of `dtype`, shape ``ids.shape + (embedding_dim,)``

        Raises
        ------
        TypeError, ValueError, RowIdError
            As `Table.lookup`.
        OwnerLostError, EraEndedError
            See `DistributedStore`.

        Notes
        -----
        Safe from any thread.
        """
        rows, _, inverse = self.lookup_unique(ids, dtype=dtype)
        if out is None:
            return rows.take(inverse, axis=0)
        checked = validation.output(out, (*inverse.shape, rows.shape[-1]), rows.dtype)
        rows.take(inverse, axis=0, out=checked, mode="clip")  # which spares NumPy a copy; all are within
        return out

    def lookup_unique(
        self, ids: ArrayLike, *, dtype: str | None = None
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """Copy each distinct row once; what crosses the network anyway. See `Table.lookup_unique`.

        Returns
        -------
        rows : ndarray of float32 or of `dtype`, shape (u, embedding_dim)
        unique_ids : ndarray of int64, shape (u,)
            Ascending.
        inverse : ndarray of int64, shape ``ids.shape``

        Raises
        ------
        TypeError, ValueError, RowIdError, OwnerLostError, EraEndedError
            As `lookup`.

        Notes
        -----
        Safe from any thread.
        """
        distinct, inverse, shape = self._distinct(ids)
        (rows,) = self._store.link.read(work.Lookup((self.facts.name,), dtype), [distinct])
        return rows, distinct, inverse.reshape(shape)

    def state(self, column: str, ids: ArrayLike) -> NDArray[np.float32]:
        """Copy a column of optimizer state; see `Table.state`.

        Raises
        ------
        TypeError, ValueError, RowIdError, OwnerLostError, EraEndedError
            As `lookup`; the table has no such column.

        Notes
        -----
        Safe from any thread.
        """
        distinct, inverse, shape = self._distinct(ids)
        (found,) = self._store.link.read(work.State(self.facts.name, column), [distinct])
        return found.take(inverse, axis=0).reshape(*shape, *found.shape[1:])

    def prefetch(self, ids: ArrayLike, *, for_update: bool = False) -> None:
        """Have owners read rows into their memory, in the background; see `Table.prefetch`.

        Raises
        ------
        TypeError, ValueError, RowIdError, OwnerLostError, EraEndedError
            As `lookup`.

        Notes
        -----
        Safe from any thread.
        """
        distinct, _, _ = self._distinct(ids)
        if distinct.size:
            self._store.link.read(work.Prefetch(self.facts.name, for_update), [distinct])

    def lookup_bag(
        self,
        ids: ArrayLike,
        offsets: ArrayLike | None = None,
        *,
        mode: Mode = "sum",
        weights: ArrayLike | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> NDArray[np.float32]:
        """Look up bags of rows, and return one row for each bag; see `Table.lookup_bag`.

        Distinct rows are fetched, and pooled here.

        Raises
        ------
        TypeError, ValueError, RowIdError, OwnerLostError, EraEndedError
            As `Table.lookup_bag` and `lookup`.

        Notes
        -----
        Safe from any thread.
        """
        given = Bags(ids, offsets, mode, weights, padding_idx, include_last_offset)
        return self._store.lookup_bag({self.name: given})[self.name]

    def bag_weight_gradient(
        self,
        ids: ArrayLike,
        offsets: ArrayLike | None,
        grads: ArrayLike,
        *,
        mode: Literal["sum", "mean", "sqrtn"] = "sum",
        weights: ArrayLike | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> NDArray[np.float32]:
        """Return the gradient of a loss by the weights of `lookup_bag`; see `Table.bag_weight_gradient`.

        Raises
        ------
        TypeError, ValueError, RowIdError, OwnerLostError, EraEndedError
            As `Table.bag_weight_gradient` and `lookup`.

        Notes
        -----
        Safe from any thread.
        """
        facts = self.facts
        validation.choice(mode, ("sum", "mean", "sqrtn"), "mode", facts.name)
        bags = batches.checked_bags(
            facts, Bags(ids, offsets, mode, weights, padding_idx, include_last_offset)
        )
        values = batches.bag_gradients(facts, bags, grads, check_finite=False)
        rows, _, places = self.lookup_unique(bags.ids)
        return batches.weight_gradient(facts, bags, values, rows, places)

    # ---- changing

    def update(
        self,
        ids: ArrayLike,
        grads: ArrayLike,
        *,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """Take one optimizer step on the rows in `ids`; see `Table.update`.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.
        grads : array_like of float, shape ``ids.shape + (embedding_dim,)``
            Those of duplicate ids are summed first, in the order of the batch.
        padding_idx, scale_grad_by_freq, scale, check_finite : optional
            As for `Table.update`.

        Returns
        -------
        float or None
            With `scale`, the norm of the gradients; see `Table.update`.

        Raises
        ------
        TypeError, ValueError, RowIdError
            As `Table.update`; or the table has counters, and there is a `scale` or `scale_grad_by_freq`. Nothing was
            changed.
        OwnerLostError, EraEndedError
            See `DistributedStore`.

        Notes
        -----
        Safe from any thread. All owners take part, also those without a row of it: they count the step.
        """
        facts, scaling = self.facts, Scaling.of(scale)
        batches.require_step(facts, scaling)
        padding = Padding(padding_idx, scale_grad_by_freq)
        finite = is_checked(scaling, check_finite=check_finite)
        step = batches.step_of_rows(facts, ids, grads, padding, check_finite=finite)
        return self._store.take_steps([step], scaling)

    def update_bag(
        self,
        ids: ArrayLike,
        offsets: ArrayLike | None,
        grads: ArrayLike,
        *,
        mode: Mode = "sum",
        weights: ArrayLike | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        scale_grad_by_freq: bool = False,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """Take one optimizer step on the rows of bags, given the gradient by the result of `lookup_bag`.

        See `Table.update_bag`.

        Returns
        -------
        float or None
            With `scale`, the norm of the gradients of the rows.

        Raises
        ------
        TypeError, ValueError, RowIdError
            As `Table.update_bag`; nothing was changed.
        OwnerLostError, EraEndedError
            See `DistributedStore`.

        Notes
        -----
        Safe from any thread. With ``"max"``, the rows are looked up first, to see which ones were the greatest.
        """
        given = Bags(ids, offsets, mode, weights, padding_idx, include_last_offset)
        return self._store.update_bag(
            {self.name: (given, grads)},
            scale_grad_by_freq=scale_grad_by_freq,
            scale=scale,
            check_finite=check_finite,
        )

    def write(self, ids: ArrayLike, rows: ArrayLike, *, check_finite: bool = True) -> None:
        """Overwrite weights; optimizer state stays. See `Table.write`.

        Raises
        ------
        TypeError, ValueError, RowIdError
            As `Table.write`; nothing was changed.
        OwnerLostError, EraEndedError
            See `DistributedStore`.

        Notes
        -----
        Safe from any thread.
        """
        facts = self.facts
        checked = validation.row_ids(ids, facts.num_embeddings, facts.name)
        values: NDArray[Any]
        if facts.row_bytes and validation.is_raw(rows, raw=facts.dtype == "raw"):
            values = validation.raw_rows(rows, (*checked.shape, facts.row_bytes), table=facts.name)
        else:
            shape = (*checked.shape, facts.embedding_dim)
            values = validation.rows(rows, shape, what="rows", table=facts.name, check_finite=check_finite)
        self._store.link.change(work.Write(facts.name), [(checked.flat, values)])

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Change the optimizer's hyper-parameters for the following updates; see `Table.set_optimizer`.

        Raises
        ------
        ValueError
            It is of another class; nothing was changed.
        OwnerLostError, EraEndedError
            See `DistributedStore`.

        Notes
        -----
        Safe from any thread.
        """
        if type(optimizer) is not type(self.optimizer):
            msg = f"table {self.name!r} has the optimizer {self.optimizer}, so it cannot go on with {optimizer!r}"
            raise ValueError(msg)
        self._store.link.change(work.SetOptimizer(self.facts.name, optimizer))
        self._store.look_again()

    # ---- how it is done

    def _distinct(self, ids: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[int, ...]]:
        facts = self.facts
        checked = validation.row_ids(ids, facts.num_embeddings, facts.name)
        return (*plan.distinct(checked.flat, facts.num_embeddings), checked.shape)

    # ---- leaving

    def to_dask_array(self) -> dask.array.Array:
        """Make a dask array of the weights, in chunks of consecutive rows that are looked up when they are computed.

        Returns
        -------
        dask.array.Array of float32, or uint8 if the table holds raw bytes, shape (num_embeddings, embedding_dim)
            Shows the rows as they are when a chunk is computed, uncommitted changes included. It can be computed by the
            cluster of the store, whose workers ask the owners directly, and in this process. Chunks that are computed
            in another era raise `EraEndedError`.

        Raises
        ------
        TableNotFoundError, StoreClosedError
            The table was dropped; the store was closed.

        Notes
        -----
        Safe from any thread.
        """
        facts = self.facts
        form = "raw" if facts.dtype == "raw" else "float32"
        rows = max(1, CHUNK_BYTES // (4 * facts.embedding_dim))
        read = partial(_read_rows, self)
        return scheduler.as_array(
            read,
            facts.num_embeddings,
            facts.embedding_dim,
            rows,
            np.dtype("uint8" if form == "raw" else form),
        )

    def to_arrow_batches(
        self, *, columns: Sequence[str] = (), rows: tuple[int, int] | None = None
    ) -> pa.RecordBatchReader:
        """Stream the table as Arrow record batches, in bounded memory; see `Table.to_arrow_batches`.

        Raises
        ------
        ValueError
            There is no such column or no such range.
        OwnerLostError, EraEndedError
            See `DistributedStore`; also raised by the reader.

        Notes
        -----
        Safe from any thread; one thread at a time may read from a reader.
        """
        from shardemb.exports import arrow

        return arrow.to_arrow_batches(RemoteRows(self), columns=columns, rows=rows)

    def export_parquet(
        self,
        path: str | os.PathLike[str],
        *,
        columns: Sequence[str] = (),
        rows: tuple[int, int] | None = None,
        parts: int | None = None,
        encoding: Encoding = "plain",
        progress: Progress = None,
    ) -> ExportReport:
        """Write the table to a parquet file, or to a folder of them, on this machine; see `Table.export_parquet`.

        The rows come from the owners, a batch at a time. With `rows`, tasks on several workers write a range each.

        Raises
        ------
        TypeError, ValueError, FileNotFoundError, FileExistsError, DiskFullError
            As `Table.export_parquet`.
        OwnerLostError, EraEndedError
            See `DistributedStore`. What was at `path` before is unchanged.

        Notes
        -----
        Safe from any thread. Updates may run concurrently; rows are as they are when their row group is read.
        """
        from shardemb.exports import parquet

        return parquet.export_parquet(
            RemoteRows(self),
            path,
            columns=columns,
            rows=rows,
            parts=parts,
            encoding=encoding,
            progress=progress,
        )

    def __repr__(self) -> str:
        rows, dim = self.shape
        return f"DistributedTable {self.name!r}: {rows:,} x {dim} {self.dtype}, {self.optimizer}"

    def __len__(self) -> int:
        return self.num_embeddings

    def __getitem__(self, ids: ArrayLike) -> NDArray[Any]:
        return self.lookup(ids)


class RemoteRows:
    """A distributed table as exports see it (`shardemb.exports.selection.RowSource`)."""

    keys: RowKeys | None = None

    def __init__(self, table: DistributedTable) -> None:
        facts = table.facts
        self._table, self._facts = table, facts
        self.name, self.num_embeddings, self.embedding_dim = facts.name, *table.shape
        self.rows_per_shard = max(1, CHUNK_BYTES // (4 * facts.embedding_dim))
        self.threads = 2  # one reads while another encodes
        self.stored = facts.dtype if isinstance(facts.dtype, str) else "float32"
        self.form = self.stored if self.stored in ("float16", "raw") else "float32"
        columns = {} if facts.optimizer is None else facts.optimizer.state_columns(facts.embedding_dim)
        self.columns = dict(columns)

    @property
    def commit(self) -> int | None:
        """None: whether rows were changed since a commit is not looked at."""
        return None

    def read_rows(self, start: int, stop: int, columns: Sequence[str]) -> list[NDArray[Any]]:
        """Read the weights of a range of rows, then each state column."""
        return self.read_ids(np.arange(start, stop), columns)

    def read_ids(self, ids: Int64Array, columns: Sequence[str] = ()) -> list[NDArray[Any]]:
        """Read the weights of ascending rows, then each state column."""
        return [self.read_vectors(ids, self.form), *(self._table.state(column, ids) for column in columns)]

    def read_vectors(self, ids: Int64Array, form: str) -> NDArray[Any]:
        """Read the weights of ascending rows in some form."""
        return self._table.lookup(ids, dtype=form)

    def read_column(self, column: str, ids: Int64Array) -> NDArray[np.float32]:
        """Read a state column with one number a row."""
        return self._table.state(column, ids)

    def run(self, tasks: Sequence[Callable[[], T]], stop: threading.Event | None = None) -> list[T]:
        """Run tasks, two at a time."""
        return scheduler.run(tasks, self.threads, stop)

    def release_pages(self, start: int, stop: int) -> None:
        """Do nothing: the pages are the owners'."""

    def describe(self) -> Mapping[str, object]:
        """Return a few facts about the table, as JSON has them."""
        optimizer = self._facts.optimizer
        return {
            "uuid": self._table.store.uuid,
            "step": self._table.step,
            "optimizer": None if optimizer is None else optim.to_json(optimizer),
            "initializer": serialization.to_json(self._facts.initializer),
        }


def _read_rows(table: DistributedTable, start: int, stop: int) -> NDArray[Any]:
    """Read a chunk of a dask array, in any process."""
    return table.lookup(np.arange(start, stop))
