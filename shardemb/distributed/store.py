"""A distributed store as its users hold it: the names and the meaning of `Store`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb import initializers
from shardemb.bags import Bags
from shardemb.base import validation
from shardemb.compute import plan
from shardemb.distributed import batches, work
from shardemb.distributed.batches import Step, scaled
from shardemb.distributed.link import Link
from shardemb.distributed.table import DistributedTable
from shardemb.distributed.transport import Wire
from shardemb.dtypes import Wanted
from shardemb.engine.bags import as_bags, with_gradients
from shardemb.engine.training import NO_PADDING, Scaling, is_checked
from shardemb.errors import ShardEmbError, StoreClosedError, TableExistsError, TableNotFoundError
from shardemb.format.spec import check_name, check_shape, normalized
from shardemb.session.table_catalog import TableRequest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from numpy.typing import ArrayLike, NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.commits.verify import Damage
    from shardemb.distributed.head import Coordinator
    from shardemb.distributed.link import Members
    from shardemb.distributed.work import TableFacts
    from shardemb.dtypes import DtypeLike, RoundingLike
    from shardemb.engine.bags import Pooling
    from shardemb.format.manifest import Commit
    from shardemb.optim import Optimizer
    from shardemb.session.display import StoreInfo
    from shardemb.vocabulary.keyed_rows import Missing, MissingChange


class DistributedStore(Mapping[str, DistributedTable]):
    """Tables whose rows are spread over owners on several machines, with one commit point. Made by `open`.

    The process that opened it commits, creates and drops tables. Others get a pickled handle, by which they look rows
    up and train tables: a task on a worker speaks with the owners directly.

    If an owner is lost, the first call that notices raises `OwnerLostError`, and the era is over: what was not
    committed is gone in all partitions. The next call of the process that opened the store begins a new era, as soon as
    the owners are back. Handles of the old era raise `EraEndedError`: pickle a new one.
    So does a task that dask runs again in the same era, as its first run may have changed rows: `rollback` begins
    another.

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
            self._link = Link.of_task(self._members, Wire(), self._facts)
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
        )
        self.link.change(work.CreateTable(wanted, (dtype, state_dtype), self.partitions))
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

    # ---- rows of several tables

    def lookup(
        self,
        ids: Mapping[str, ArrayLike],
        *,
        missing: Missing = "error",
        create: bool = False,
    ) -> dict[str, NDArray[np.float32]]:
        """Look up rows of several tables in one round trip; see `Store.lookup`.

        Parameters
        ----------
        ids : mapping of str to array_like of int
            For each table, row ids of any shape.
        missing, create : optional
            Taken as `Store.lookup` takes them; they say something about tables by key alone, and here are none.

        Returns
        -------
        dict of str to ndarray of float32, shape ``ids.shape + (embedding_dim,)``

        Raises
        ------
        TableNotFoundError, TypeError, ValueError, RowIdError
            As `Store.lookup`.
        OwnerLostError, EraEndedError
            See the class.

        Notes
        -----
        Safe from any thread.
        """
        checked = {name: self._checked_ids(name, each) for name, each in ids.items()}
        found = self._rows({name: each.flat for name, each in checked.items()})
        return {
            name: rows.take(places, axis=0).reshape(*checked[name].shape, -1)
            for name, (rows, places) in found.items()
        }

    def lookup_bag(
        self,
        bags: Mapping[str, Any],
        *,
        missing: Missing = "error",
        create: bool = False,
    ) -> dict[str, NDArray[np.float32]]:
        """Look up bags of rows of several tables in one round trip; see `Store.lookup_bag`.

        Parameters
        ----------
        bags : mapping of str to ids, (ids, offsets) or Bags
            As for `Store.lookup_bag`.
        missing, create : optional
            As for `lookup`.

        Returns
        -------
        dict of str to ndarray of float32, shape (bags, embedding_dim)

        Raises
        ------
        TableNotFoundError, TypeError, ValueError, RowIdError
            As `Store.lookup_bag`.
        OwnerLostError, EraEndedError
            See the class.

        Notes
        -----
        Safe from any thread.
        """
        checked = {name: batches.checked_bags(self.facts(name), as_bags(each)) for name, each in bags.items()}
        found = self._rows({name: each.ids for name, each in checked.items()})
        return {
            name: batches.pooled(self.facts(name), checked[name], rows, places)
            for name, (rows, places) in found.items()
        }

    def update(
        self,
        batches: Mapping[str, tuple[Any, ArrayLike]],
        *,
        missing: MissingChange | Mapping[str, MissingChange] = "error",
        create: bool = False,
        max_norm: float | None = None,
        extra_norm_sq: float = 0.0,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """Take one optimizer step in each of several tables, in one round trip; see `Store.update`.

        Parameters
        ----------
        batches : mapping of str to (ids, grads) or (Bags, grads)
            As for `Store.update`.
        missing, create : optional
            As for `lookup`.
        max_norm, extra_norm_sq, scale, check_finite : optional
            As for `Store.update`.

        Returns
        -------
        float or None
            With `max_norm` or `scale`, the norm of all gradients. If it is infinite or NaN, the step was skipped.

        Raises
        ------
        TableNotFoundError, TypeError, ValueError, RowIdError
            As `Store.update`; nothing was changed.
        OwnerLostError, EraEndedError
            See the class.

        Notes
        -----
        Safe from any thread; waits for other changes of this process.
        """
        scaling = Scaling.of(scale, max_norm, extra_norm_sq)
        finite = is_checked(scaling, check_finite=check_finite)
        return self.take_steps(self._steps(batches, scaling, check_finite=finite), scaling)

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
        """Take one optimizer step in each of several tables by the gradients of bags; see `Store.update_bag`.

        Parameters
        ----------
        batches : mapping of str to (ids, grads), (ids, offsets, grads) or (Bags, grads)
            As for `Store.update_bag`.
        missing, create : optional
            As for `lookup`.
        scale_grad_by_freq, max_norm, extra_norm_sq, scale, check_finite : optional
            As for `Store.update_bag`.

        Returns
        -------
        float or None
            As `update`.

        Raises
        ------
        TableNotFoundError, TypeError, ValueError, RowIdError, OwnerLostError, EraEndedError
            As `update`.

        Notes
        -----
        Safe from any thread; waits for other changes of this process.
        """
        scaling = Scaling.of(scale, max_norm, extra_norm_sq)
        finite = is_checked(scaling, check_finite=check_finite)
        given = {name: with_gradients(each, name) for name, each in batches.items()}
        steps = self._steps(given, scaling, check_finite=finite, scale_grad_by_freq=scale_grad_by_freq)
        return self.take_steps(steps, scaling)

    def gradient_norm(
        self,
        batches: Mapping[str, tuple[Any, ArrayLike]],
        *,
        missing: MissingChange | Mapping[str, MissingChange] = "error",
    ) -> float:
        """Return the norm of gradients that `update` would take, and change nothing; see `Store.gradient_norm`.

        Raises
        ------
        TableNotFoundError, TypeError, ValueError, RowIdError, OwnerLostError, EraEndedError
            As `update`, but for gradients that are not finite.

        Notes
        -----
        Safe from any thread.
        """
        scaling = Scaling(scale=1.0)
        return scaled(self._steps(batches, scaling, check_finite=False), scaling)[1]

    def take_steps(self, steps: Sequence[Step], scaling: Scaling | None) -> float | None:
        """Send checked updates of tables; see `update`."""
        norm = None
        if scaling is not None:
            steps, norm = scaled(steps, scaling)
        if steps:
            names = tuple(each.table for each in steps)
            self.link.change(work.Update(names), [(each.ids, each.gradients) for each in steps])
        return norm

    def _steps(
        self,
        given: Mapping[str, tuple[Any, ArrayLike]],
        scaling: Scaling | None,
        *,
        check_finite: bool,
        scale_grad_by_freq: bool = False,
    ) -> list[Step]:
        """Check updates of several tables, all before the first row is looked up."""
        pools: dict[str, tuple[TableFacts, Pooling, Float32Array]] = {}
        waiting: list[str | Step] = []
        for name, (what, gradients) in given.items():
            facts = self.facts(name)
            batches.require_step(facts, scaling)
            if isinstance(what, Bags):
                bags = batches.checked_bags(facts, what)
                values = batches.bag_gradients(facts, bags, gradients, check_finite=check_finite)
                pools[name] = facts, bags, values
                waiting.append(name)
            else:
                waiting.append(
                    batches.step_of_rows(facts, what, gradients, NO_PADDING, check_finite=check_finite)
                )
        maxima = {name: bags.ids for name, (_, bags, _) in pools.items() if bags.mode == "max"}
        found = self._rows(maxima)

        def step(name: str) -> Step:
            facts, bags, values = pools[name]

            def winners() -> NDArray[np.int32]:
                won = np.empty((bags.count, facts.embedding_dim), np.int32)
                batches.pooled(facts, bags, *found[name], won)
                return won

            return batches.step_of_bags(facts, bags, values, winners, scale_grad_by_freq=scale_grad_by_freq)

        return [step(each) if isinstance(each, str) else each for each in waiting]

    def _checked_ids(self, name: str, ids: ArrayLike) -> validation.Ids:
        facts = self.facts(name)
        return validation.row_ids(ids, facts.num_embeddings, facts.name)

    def _rows(self, ids: Mapping[str, Int64Array]) -> dict[str, tuple[NDArray[Any], Int64Array]]:
        """Fetch distinct rows of several tables; return them, and the place of each position among them."""
        if not ids:
            return {}
        facts = {name: self.facts(name) for name in ids}
        distinct = {name: plan.distinct(each, facts[name].num_embeddings) for name, each in ids.items()}
        names = tuple(each.name for each in facts.values())
        rows = self.link.read(work.Lookup(names), [some for some, _ in distinct.values()])
        return {name: (found, distinct[name][1]) for name, found in zip(ids, rows, strict=True)}

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

    def info(self) -> dict[int, StoreInfo]:
        """Return the facts about each partition, which its owner gathers: tables, bytes on disk; see `Store.info`.

        Raises
        ------
        OwnerLostError, EraEndedError
            See `DistributedStore`.

        Notes
        -----
        Safe from any thread.
        """
        return self.link.ask(work.Info())

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
