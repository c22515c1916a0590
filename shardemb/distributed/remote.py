"""A distributed store as its users hold it: the names and the meaning of `Store` and `Table`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb import initializers
from shardemb.bags import Bags
from shardemb.base import validation
from shardemb.compute import plan, pooling
from shardemb.distributed import work
from shardemb.distributed.link import Link
from shardemb.distributed.routing import Summed
from shardemb.distributed.transport import Wire
from shardemb.dtypes import Wanted
from shardemb.engine.bags import Form, Pooling
from shardemb.errors import ShardEmbError, StoreClosedError, TableExistsError, TableNotFoundError
from shardemb.format.spec import check_name, check_shape, normalized
from shardemb.session.table_catalog import TableRequest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from numpy.typing import ArrayLike, NDArray

    from shardemb.bags import Mode
    from shardemb.commits.verify import Damage
    from shardemb.distributed.head import Coordinator
    from shardemb.distributed.link import Members
    from shardemb.distributed.work import TableFacts
    from shardemb.dtypes import Dtype, DtypeLike, RoundingLike
    from shardemb.format.manifest import Commit
    from shardemb.optim import Optimizer

_NO_FLOATS = np.empty(0, np.float32)
_NO_WINNERS = np.empty((0, 0), np.int32)


class DistributedTable:
    """A table whose rows are spread over the partitions of a `DistributedStore`; found there by name.

    Results have the bits of a `Table` of one local store, for any number of partitions and owners. Ids are made
    distinct, and the gradients of equal ones summed, before they are sent. Pickled as a handle, like its store.

    Thread safety: lookups may run in any number of threads; changes of one process wait for each other. Several
    processes may train a table at the same time; the order of their updates is then not defined.
    """

    def __init__(self, store: DistributedStore, name: str) -> None:
        self._store, self._name = store, name

    # ---- what it is

    @property
    def facts(self) -> TableFacts:
        """What this process knows of the table."""
        return self._store.facts(self._name)

    @property
    def store(self) -> DistributedStore:
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
        bags = self._bags(Bags(ids, offsets, mode, weights, padding_idx, include_last_offset))
        return self._pooled(bags, _NO_WINNERS)

    # ---- changing

    def update(
        self,
        ids: ArrayLike,
        grads: ArrayLike,
        *,
        padding_idx: int | None = None,
        check_finite: bool = True,
    ) -> None:
        """Take one optimizer step on the rows in `ids`; see `Table.update`.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.
        grads : array_like of float, shape ``ids.shape + (embedding_dim,)``
            Those of duplicate ids are summed first, in the order of the batch.
        padding_idx : int, optional
            Gradients of this row are dropped. By default the table's `padding_idx`.
        check_finite : bool
            Refuse NaN and infinity.

        Raises
        ------
        TypeError, ValueError, RowIdError
            As `Table.update`; nothing was changed.
        OwnerLostError, EraEndedError
            See `DistributedStore`.

        Notes
        -----
        Safe from any thread. All owners take part, also those without a row of it: they count the step.
        """
        facts = self._require_optimizer()
        checked = validation.row_ids(ids, facts.num_embeddings, facts.name)
        shape = (*checked.shape, facts.embedding_dim)
        values = validation.rows(grads, shape, what="gradients", table=facts.name, check_finite=check_finite)
        padding = self._padding(padding_idx)
        flat = checked.flat
        if padding is not None and (flat == padding).any():
            kept = np.flatnonzero(flat != padding)
            flat, values = flat[kept], values[kept]
        self._step(flat, values)

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
        check_finite: bool = True,
    ) -> None:
        """Take one optimizer step on the rows of bags, given the gradient by the result of `lookup_bag`.

        See `Table.update_bag`.

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
        facts = self._require_optimizer()
        bags = self._bags(Bags(ids, offsets, mode, weights, padding_idx, include_last_offset))
        shape = (bags.count, facts.embedding_dim)
        form = "(bags, embedding_dim)"
        values = validation.rows(
            grads, shape, what="gradients", table=facts.name, check_finite=check_finite, form=form
        )
        if check_finite and bags.weights.size:
            validation.require_finite(bags.weights, f"table {facts.name!r}: weights")
        grouped = plan.group(bags.ids, facts.num_embeddings)
        if not grouped.rows.size:
            self._step(bags.ids, np.empty((0, facts.embedding_dim), np.float32))
            return
        summed = np.empty((grouped.rows.size, facts.embedding_dim), np.float32)
        self._sum_of_bags(bags, grouped, values, summed)
        self._store.link.change(work.Update((facts.name,)), [(grouped.rows, summed)])

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

    def _padding(self, padding_idx: int | None) -> int | None:
        facts = self.facts
        if padding_idx is None:
            return facts.padding_idx
        return validation.padding_row(padding_idx, facts.num_embeddings, facts.name)

    def _require_optimizer(self) -> TableFacts:
        facts = self.facts
        if facts.optimizer is None:
            msg = f"table {facts.name!r} has no optimizer: give create_table one, or set rows with write()"
            raise ValueError(msg)
        return facts

    def _step(self, ids: NDArray[np.int64], values: NDArray[np.float32]) -> None:
        """Send gradients: each row's sum, unless rows count how often they are in a batch."""
        facts = self.facts
        if not facts.counters and ids.size:
            summed = Summed.of(plan.group(ids, facts.num_embeddings), values)
            ids, values = summed.ids, summed.gradients
        self._store.link.change(work.Update((facts.name,)), [(ids, values)])

    def _bags(self, given: Bags) -> Pooling:
        facts = self.facts
        if facts.dtype == "raw":
            msg = f"table {facts.name!r} holds raw bytes, which cannot be pooled: look up its rows with lookup()"
            raise ValueError(msg)
        ids = validation.row_ids(given.ids, facts.num_embeddings, facts.name)
        form = Form.of(given, ids.shape, facts.name)
        found = Pooling(ids.flat, form.bounds, form.weights, form.mode, None, None, ids.shape)
        padding = self._padding(given.padding_idx)
        return found if padding is None else found.without(padding)

    def _pooled(self, bags: Pooling, winners: NDArray[np.int32]) -> NDArray[np.float32]:
        out = np.empty((bags.count, self.embedding_dim), np.float32)
        out[bags.bounds[1:] == bags.bounds[:-1]] = 0
        if bags.ids.size:
            rows, _, places = self.lookup_unique(bags.ids)
            bags.pool(out, winners, rows, places, 0)
        return out

    def _sum_of_bags(
        self, bags: Pooling, grouped: plan.Grouped, values: NDArray[np.float32], out: NDArray[np.float32]
    ) -> None:
        """Write the gradient of each distinct row, with the bits of a local update."""
        if bags.divisors.size:
            with np.errstate(divide="ignore", invalid="ignore"):
                values = values / bags.divisors[:, np.newaxis]
            values[bags.divisors == 0] = 0
        if bags.mode == "max":
            winners = np.empty(out.shape if not bags.count else (bags.count, self.embedding_dim), np.int32)
            self._pooled(bags, winners)
            begins, columns = np.zeros(bags.ids.size + 2, np.int64), np.empty(winners.size, np.int32)
            pooling.list_won(winners, bags.bounds, begins, columns)
            given = values, bags.bag_of, bags.weights, begins, columns
            pooling.sum_won(*given, grouped.starts, grouped.order, out, 0, grouped.rows.size)
        elif bags.weights.size:
            of, factors = bags.bag_of.take(grouped.order), bags.weights.take(grouped.order)
            pooling.add(values, of, factors, grouped.starts, _NO_FLOATS, out, 0, 0)
        else:
            order = bags.bag_of.take(grouped.order)
            out[:] = Summed.of(plan.Grouped(grouped.rows, grouped.starts, order), values).gradients

    def __repr__(self) -> str:
        rows, dim = self.shape
        return f"DistributedTable {self.name!r}: {rows:,} x {dim} {self.dtype}, {self.optimizer}"

    def __len__(self) -> int:
        return self.num_embeddings

    def __getitem__(self, ids: ArrayLike) -> NDArray[Any]:
        return self.lookup(ids)


class DistributedStore(Mapping[str, DistributedTable]):
    """Tables whose rows are spread over owners on several machines, with one commit point. Made by `open`.

    The process that opened it commits, creates and drops tables. Others get a pickled handle, by which they look rows
    up and train tables: a task on a worker speaks with the owners directly.

    If an owner is lost, the first call that notices raises `OwnerLostError`, and the era is over: what was not
    committed is gone in all partitions. The next call of the process that opened the store begins a new era, as soon as
    the owners are back. Handles of the old era raise `EraEndedError`: pickle a new one.

    Thread safety: as `Store`.
    """

    def __init__(
        self, members: Members, tables: dict[str, TableFacts], coordinator: Coordinator | None = None
    ) -> None:
        self._members, self._facts, self._coordinator = members, tables, coordinator
        self._link: Link | None = None if coordinator is None else coordinator.link
        self._closed = False

    # ---- what it is

    @property
    def link(self) -> Link:
        """The connections to the owners; of a new era, if the last one is over and this process opened the store."""
        if self._closed:
            msg = f"the store {self._members.path} was closed; open it again"
            raise StoreClosedError(msg)
        if self._link is None:  # unpickled
            self._link = Link(self._members, Wire(), self._facts)
        if self._link.ended is not None and self._coordinator is not None:
            self._adopt(self._coordinator.begin(self._link.ended))
        return self._link

    def _adopt(self, link: Link) -> None:
        self._link, self._members, self._facts = link, link.members, link.tables

    @property
    def uuid(self) -> str:
        """Identity of the store."""
        return self._members.head

    @property
    def path(self) -> str:
        """The folder of the head."""
        return self._members.path

    @property
    def partitions(self) -> int:
        """Number of partitions."""
        return self._members.parts

    @property
    def last_commit(self) -> Commit | None:
        """The last commit of all partitions together; only for the process that opened the store."""
        return self._opened("last_commit").last_commit

    @property
    def has_changes(self) -> bool:
        """Whether anything differs from the last commit; see `Store.has_changes`."""
        return any(self.link.ask(work.HasChanges()).values())

    def facts(self, name: str) -> TableFacts:
        """Return what this process knows of a table.

        Raises
        ------
        TableNotFoundError
            The store had no such table when this handle was made.
        """
        found = self._facts.get(normalized(name))
        if found is None:
            names = ", ".join(map(repr, self._facts)) or "none"
            msg = f"the store {self.path} has no table {name!r}; its tables: {names}"
            raise TableNotFoundError(msg)
        return found

    def __getitem__(self, name: str) -> DistributedTable:
        return DistributedTable(self, self.facts(name).name)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._facts))

    def __len__(self) -> int:
        return len(self._facts)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    # ---- tables

    def create_table(
        self,
        name: str,
        *,
        num_embeddings: int,
        embedding_dim: int,
        counters: bool = False,
        initializer: initializers.Initializer | initializers.VarianceScaling | None = None,
        optimizer: Optimizer | None = None,
        rows_per_shard: int | None = None,
        padding_idx: int | None = None,
        dtype: DtypeLike = "float32",
        state_dtype: str = "float32",
        rounding: RoundingLike = "nearest",
    ) -> DistributedTable:
        """Create a table. It becomes part of the store with the next commit. See `Store.create_table`.

        Parameters
        ----------
        name, num_embeddings, embedding_dim, counters, optimizer, padding_idx, dtype, state_dtype : optional
            As for `Store.create_table`.
        initializer : Initializer or VarianceScaling, optional
            What rows hold before they are first written. Arrays and functions are not taken: use `write`.
        rows_per_shard : int, optional
            Rows in one file of a partition.
        rounding : {"nearest"}
            Stochastic rounding draws by row, and so differs from that of a local store: it is refused.

        Raises
        ------
        TypeError, ValueError, TableExistsError
            As `Store.create_table`; nothing was created.
        OwnerLostError, EraEndedError
            See `DistributedStore`.
        """
        coordinator = self._opened("create_table")
        name, (rows, dim) = check_name(name), check_shape(num_embeddings, embedding_dim)
        if name in self._facts:
            msg = f"the store {self.path} already has a table {name!r}; use store[{name!r}], or drop it first"
            raise TableExistsError(msg)
        kind, given = initializers.resolve(initializer, (rows, dim), rows)
        if given is not None:
            msg = "a distributed table begins with an initializer of shardemb.initializers; set rows with write()"
            raise TypeError(msg)
        if rounding != "nearest":
            msg = f'rounding must be "nearest" in a distributed store, got {rounding!r}'
            raise ValueError(msg)
        Wanted(dtype, state_dtype, rounding).checked(trains=optimizer is not None)
        padding = None if padding_idx is None else validation.padding_row(padding_idx, rows, name)
        wanted = TableRequest(
            name=name,
            num_embeddings=rows,
            embedding_dim=dim,
            vocabulary=None,
            counters=counters,
            initializer=kind,
            optimizer=optimizer,
            rows_per_shard=rows_per_shard,
            padding_idx=padding,
            precision=Wanted(dtype, state_dtype, rounding),
        )
        self.link.change(work.CreateTable(wanted, self.partitions))
        coordinator.note_table(name, rows, padding, counters=counters)
        self.look_again()
        return self[name]

    def drop_table(self, name: str) -> None:
        """Drop a table; see `Store.drop_table`.

        Raises
        ------
        TableNotFoundError
            There is none of that name.
        OwnerLostError, EraEndedError
            See `DistributedStore`.
        """
        coordinator, facts = self._opened("drop_table"), self.facts(name)
        self.link.change(work.DropTable(facts.name))
        coordinator.forget_table(facts.name)
        self.look_again()

    def look_again(self) -> None:
        """Ask what the tables are now; only the process that opened the store has to, after a change of them."""
        if self._coordinator is not None:
            self._facts = self.link.tables = self._coordinator.describe(self.link)

    # ---- commits

    def commit(self, step: int | None = None, metadata: Mapping[str, Any] | None = None) -> Commit:
        """Make every change since the last commit durable, in all partitions or in none; see `Store.commit`.

        Call it when the tasks that train have returned: it takes whatever they have changed by then.

        Raises
        ------
        OwnerLostError, EraEndedError
            Nothing was committed, or it is not known: `last_commit` tells, once the store has a new era.
        """
        coordinator, link = self._opened("commit"), self.link
        return coordinator.commit(link, step, metadata)

    def rollback(self) -> None:
        """Go back to the last commit, in all partitions; a new era begins. See `Store.rollback`."""
        coordinator = self._opened("rollback")
        self._adopt(coordinator.begin("it was rolled back"))

    # ---- looking at it

    def verify(self, tables: Sequence[str] | None = None) -> dict[int, list[Damage]]:
        """Compare the files of committed tables with their checksums, where they lie; see `Store.verify`.

        Returns
        -------
        dict of int to list of Damage
            By partition; only those in which something is wrong.
        """
        named = None if tables is None else tuple(self.facts(name).name for name in tables)
        return {part: found for part, found in self.link.ask(work.Verify(named)).items() if found}

    def stats(self) -> dict[int, Mapping[str, int]]:
        """Return bytes and syncs of each partition since it was opened; see `Store.stats`."""
        return self.link.ask(work.Stats())

    # ---- the end

    def close(self) -> None:
        """Close the store, with a warning if changes are lost that no commit has. Again: no effect.

        A handle that was unpickled only forgets its connections.
        """
        if self._closed:
            return
        self._closed = True
        if self._coordinator is not None and self._coordinator.close():
            msg = f"the changes of {self.path} since its last commit are lost: close() never commits; call commit()"
            warnings.warn(msg, RuntimeWarning, stacklevel=2)

    def __enter__(self) -> DistributedStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self, call: str) -> Coordinator:
        if self._closed:
            msg = f"the store {self._members.path} was closed; open it again"
            raise StoreClosedError(msg)
        if self._coordinator is None:
            msg = f"{call} belongs to the process that opened the store {self.path}: call it there"
            raise ShardEmbError(msg)
        return self._coordinator

    def __repr__(self) -> str:
        names = ", ".join(map(repr, self._facts)) or "none"
        return f"DistributedStore {self.path}: {self.partitions} partitions, tables: {names}"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._coordinator is not None:
            self._adopt(self.link)  # of a new era, if the last one is over
        return DistributedStore, (self._members, self._facts)
