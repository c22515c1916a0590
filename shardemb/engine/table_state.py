"""One table of an open store: its memory, its mutable state, and the plans of its batches.

A batch passes through the folders once, downward: `validation` checks it, `plan` groups and cuts it, `batch` hands the
pieces to `scheduler`, which runs them on threads, and `row_kernels` moves the numbers, in memory that `Shards` has
mapped over the files. `plan_read` and `plan_change` are the first half, which only checks, so that a store can check
the batches of many tables before it changes any.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shardemb import dtypes, optim
from shardemb.base import validation
from shardemb.base.formatting import size
from shardemb.base.progress import track
from shardemb.commits import rewrite
from shardemb.compute import plan, scheduler
from shardemb.engine import bags, batch, filling, planned, warming
from shardemb.engine.planned import Change, PlannedRead, require_rows
from shardemb.engine.shards import Shards
from shardemb.engine.training import NO_PADDING, Padding, Scaling, Training
from shardemb.errors import ShardEmbError, TableNotFoundError
from shardemb.format import ranges, store_paths
from shardemb.format.manifest import TableEntry
from shardemb.format.spec import MAX_ROWS, reshaped_spec
from shardemb.format.table_files import TableLocation
from shardemb.storage import address_space, files

if TYPE_CHECKING:
    from collections.abc import Iterator

    import dask.array
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from shardemb.base.progress import Progress
    from shardemb.base.validation import Int64Array
    from shardemb.engine.bags import OutOfRange
    from shardemb.engine.runtime import Runtime
    from shardemb.optim import Optimizer

ARRAY_BYTES = 2**30
"""The largest table that `numpy.asarray` makes an array of: more is hardly meant."""

MATERIALIZED_BYTES = 32 * 2**20
"""Bytes of records that `TableState.materialize` sends through the log at a time."""


class TableState:
    """A table as the other modules see it. Users hold a `Table`, which documents the contracts.

    Parameters
    ----------
    runtime : Runtime
    name : str
    shards : Shards
    training : Training
    vocabulary : str, optional
        The uuid of the vocabulary that assigns its rows to keys.

    Attributes
    ----------
    runtime, name, training, vocabulary
        As the parameters.
    spec : TableSpec
        The fixed properties of the table; it stays when the store is closed.
    dropped : bool
        Whether the table was dropped, so that every use is refused until a rollback brings it back.
    """

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        shards: Shards,
        training: Training,
        vocabulary: str | None = None,
    ) -> None:
        self.runtime = runtime
        self.name = name
        self.spec = shards.spec
        self.training = training
        self.vocabulary = vocabulary
        self.dropped = False
        self._shards: Shards | None = shards
        shards.training = training

    # ---- what it is

    @property
    def shards(self) -> Shards:
        """The table's memory, while the store is open."""
        assert self._shards is not None
        return self._shards

    @property
    def memory(self) -> Shards | None:
        """The table's memory; None once it is released."""
        return self._shards

    @property
    def entry(self) -> TableEntry:
        """The entry that a commit now would write about the table."""
        training = self.training
        of_update = training.step, training.optimizer
        return TableEntry(self.spec.uuid, self.name, *of_update, self.vocabulary, training.frozen)

    @property
    def changed_rows(self) -> int | None:
        """The number of rows that differ from the last commit; None once the table is closed."""
        return None if self._shards is None or self.runtime.closed else self._shards.changes

    def live(self) -> Shards:
        """Return the table's memory.

        Raises
        ------
        StoreClosedError, TableNotFoundError
            The store was closed; the table was dropped.
        """
        self.runtime.check_open()
        if self._shards is None or self.dropped:
            msg = f"table {self.name!r} is no longer in the store {self.runtime.path}"
            raise TableNotFoundError(msg)
        return self._shards

    def stats(self) -> dict[str, Any]:
        """Return what `Table.stats` does."""
        shards = self.live()
        with self.runtime.lock:
            rows, allocated = shards.rows_written(), shards.bytes_allocated()
        by_shard = zip(rows.tolist(), allocated.tolist(), strict=True)
        totals, overlay = shards.totals, shards.overlay
        return {
            "lookups": totals.lookups,
            "rows_looked_up": totals.rows_looked_up,
            "cold_lookups": totals.cold_lookups,
            "changes": totals.changes,
            "rows_changed": totals.rows_changed,
            "rows_copied": totals.rows_copied,
            "bytes_requested": totals.bytes_requested,
            "bytes_warmed": totals.bytes_warmed,
            "rows_in_memory": overlay.slots.count,
            "bytes_in_memory": overlay.nbytes,
            "rows_out": overlay.spilled,
            "bytes_mapped": self.spec.num_shards * self.spec.shard_bytes,
            "rows_written": int(rows.sum()),
            "bytes_allocated": int(allocated.sum()),
            "shards": [{"rows_written": count, "bytes_allocated": nbytes} for count, nbytes in by_shard],
        }

    # ---- reading

    def form(self, dtype: object) -> str:
        """Check as what a lookup of weights is to return them: the name of a float type, or ``"raw"``."""
        return dtypes.checked_form(dtype, self.live().spec.precision.dtype, self.name)

    def plan_read(self, column: str, ids: ArrayLike, form: str = "float32") -> PlannedRead:
        """Check a lookup."""
        # Checked against the memory that will be read, not against the table, which may be resized in between.
        shards = self.live()
        checked = validation.row_ids(ids, shards.spec.num_embeddings, self.name)
        width, dtype = shards.codec.shape_of(column, form)
        return PlannedRead(self, shards, column, checked.flat, (*checked.shape, width), form, dtype)

    def read(
        self, column: str, ids: ArrayLike, out: NDArray[Any] | None = None, form: str = "float32"
    ) -> NDArray[Any]:
        """Copy a column of rows into `out`, or into a new array."""
        return self.carry_out(self.plan_read(column, ids, form), out)

    def carry_out(self, planned: PlannedRead, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Carry out a lookup that `plan_read` has checked."""
        shape, dtype = planned.shape, planned.dtype
        new = self.runtime.outputs.empty
        result = new(shape, dtype) if out is None else validation.output(out, shape, dtype)
        batch.read(self.runtime, [planned.into(result)])
        planned.finish(result)
        return result

    def read_any(
        self, ids: ArrayLike, out: NDArray[Any] | None, dtype: object, out_of_range: OutOfRange
    ) -> NDArray[Any]:
        """Copy weights, where ids may be out of range; see `Table.lookup`."""
        form = self.form(dtype)
        if isinstance(out_of_range, str) and out_of_range == "raise":
            return self.read("weight", ids, out, form)
        given, stand_ins = bags.in_range(ids, self, out_of_range, form)
        planned = self.plan_read("weight", given, form)

        def replace_unknown(rows: NDArray[Any]) -> None:
            if stand_ins is not None:
                stand_ins.fill(planned.shards, rows.reshape(-1, rows.shape[-1]), 0, planned.ids.size)

        return self.carry_out(planned.replacing(replace_unknown), out)

    def read_unique(
        self, ids: ArrayLike, dtype: object = None
    ) -> tuple[NDArray[Any], Int64Array, Int64Array]:
        """Copy each distinct row once; return also the ids of these rows, and the inverse."""
        form = self.form(dtype)
        count = self.live().spec.num_embeddings
        checked = validation.row_ids(ids, count, self.name)
        unique_ids, inverse = plan.distinct(checked.flat, count)
        return self.read("weight", unique_ids, form=form), unique_ids, inverse.reshape(checked.shape)

    def read_items(self, items: ArrayLike | slice) -> NDArray[Any]:
        """Copy the rows of ids, or of a range of them."""
        if isinstance(items, slice):
            items = np.arange(*items.indices(self.live().spec.num_embeddings))
        return self.read("weight", items, form=self.form(None))

    def as_numpy(
        self, rows: Int64Array | None, dtype: DTypeLike | None, *, copy: bool | None
    ) -> NDArray[Any]:
        """Copy all rows, or some, in answer to `numpy.asarray`.

        Raises
        ------
        ValueError
            They are more than `ARRAY_BYTES`, or no copy is allowed.
        """
        spec = self.live().spec
        count = spec.num_embeddings if rows is None else rows.size
        if copy is False:
            msg = f"table {self.name!r} cannot become an array without a copy: its rows are on disk"
            raise ValueError(msg)
        nbytes = dtypes.numpy_dtype(self.form(None)).itemsize * count * spec.embedding_dim
        if nbytes > ARRAY_BYTES:
            msg = (
                f"table {self.name!r} has {size(nbytes)}, too much to become an array unasked; "
                f"use lookup() for some rows, to_dask_array() for lazy ones, or lookup(np.arange({count})) for all"
            )
            raise ValueError(msg)
        found = self.read("weight", np.arange(count) if rows is None else rows, form=self.form(None))
        return found if dtype is None else found.astype(dtype, copy=False)

    def read_state(self, column: str, ids: ArrayLike) -> NDArray[Any]:
        """Copy a state column of rows; without its last axis if it has one number a row."""
        self.live()
        states = self.spec.states
        if column not in states:
            msg = f"table {self.name!r} has no state column {column!r}; it has {', '.join(states) or 'none'}"
            raise ValueError(msg)
        rows = self.read(column, ids)
        return rows[..., 0] if self.spec.is_row_wise(column) else rows

    def read_range(self, column: str, start: int, stop: int, form: str = "float32") -> NDArray[Any]:
        """Copy a column of rows ``start:stop`` in the calling thread."""
        return self.read_here(column, np.arange(start, stop), form)

    def read_here(self, column: str, ids: Int64Array, form: str = "float32") -> NDArray[Any]:
        """Copy a column of ascending rows in the calling thread."""
        return batch.read_here(self.runtime, self, column, form, ids)

    def prefetch(self, ids: ArrayLike, *, for_update: bool) -> None:
        """Start to read rows into memory, in the background."""
        rows = self._distinct(ids)
        if for_update:
            self.runtime.check_writable()
        self.runtime.in_background(partial(batch.prefetch, self.runtime, self, rows, for_update=for_update))

    def warm(self, ids: ArrayLike | None, progress: Progress) -> None:
        """Read the table into memory, or the pages of rows, and wait for it."""
        rows = None if ids is None else self._distinct(ids)
        warming.warm(self.live(), self.name, rows, progress)

    def as_dask_array(self, owner: object) -> dask.array.Array:
        """Make a dask array of the weights, one chunk a shard; it holds `owner`, which keeps the store open."""
        rows, dim, form = self.live().spec.num_embeddings, self.spec.embedding_dim, self.form(None)

        def read(start: int, stop: int, _owner: object = owner) -> NDArray[Any]:
            return self.read_range("weight", start, stop, form)

        return scheduler.as_array(read, rows, dim, self.spec.rows_per_shard, dtypes.numpy_dtype(form))

    # ---- changing rows

    def plan_change(self, ids: ArrayLike, values: ArrayLike, what: str, *, check_finite: bool) -> Change:
        """Check an update (`what` is "gradients") or a write ("rows"), and group its ids."""
        if what == "gradients":
            return self.plan_update(ids, values, check_finite=check_finite)
        shards = self.live()
        checked = validation.row_ids(ids, shards.spec.num_embeddings, self.name)
        rows = self.check_values(values, checked.shape, what, check_finite=check_finite)

        def renew() -> Change | None:
            now = self.memory  # a table that was converted meanwhile has other bytes for the same rows
            if now is None or now.spec.precision == shards.spec.precision:
                return None
            return self.plan_change(ids, values, what, check_finite=check_finite)

        grouped = plan.group(checked.flat, shards.spec.num_embeddings)
        return Change(self, grouped, self._encoded(shards, rows, checked.flat), takes_step=False, renew=renew)

    def _encoded(self, shards: Shards, rows: NDArray[Any], ids: Int64Array) -> NDArray[Any]:
        """Return rows as the elements of records, rounded as the table rounds."""
        if rows.dtype == shards.spec.element:
            return rows
        out = np.empty((len(rows), shards.spec.weight_width), shards.spec.element)
        encode = partial(shards.codec.encode, rows, out, ids, self.training.step)
        batch.run_pieces(self.runtime, [encode], [len(rows)], [rows.itemsize * rows.shape[1]])
        return out

    def plan_update(
        self,
        ids: ArrayLike,
        grads: ArrayLike,
        padding: Padding = NO_PADDING,
        *,
        check_finite: bool,
    ) -> Change:
        """Check an update, and group its ids."""
        spec = self.live().spec
        checked = validation.row_ids(ids, spec.num_embeddings, self.name)
        rows = self.check_values(grads, checked.shape, "gradients", check_finite=check_finite)
        row = bags.padding_of(self, padding.padding_idx)
        kept = None if row is None else np.flatnonzero(checked.flat != row)
        change = Change(self, bags.grouped_at(checked.flat, kept, spec.num_embeddings), rows, takes_step=True)
        return bags.by_frequency(change) if padding.scale_grad_by_freq else change

    def check_values(
        self,
        values: ArrayLike,
        shape: tuple[int, ...],
        what: str,
        *,
        check_finite: bool,
        form: str = "ids.shape + (embedding_dim,)",
    ) -> NDArray[Any]:
        """Check the values of an update or a write for ids of a shape; return them flattened over the ids.

        Rows of a table that is not float32 may also be given as its bytes, which are uint8.
        """
        spec = self.live().spec
        if what == "gradients" and self.training.optimizer is None:
            msg = f"table {self.name!r} has no optimizer: give create_table one, or set rows with write()"
            raise ValueError(msg)
        if what == "gradients" and self.training.optimizer is not None:
            self.training.optimizer.require_known_lr(f"table {self.name!r}")
        if (
            what == "rows"
            and spec.precision.is_coded
            and validation.is_raw(values, raw=spec.precision.is_raw)
        ):
            return validation.raw_rows(values, (*shape, spec.weight_width), table=self.name)
        shape = (*shape, spec.embedding_dim)
        return validation.rows(
            values, shape, what=what, table=self.name, check_finite=check_finite, form=form
        )

    def plan_reset(self, rows: Int64Array) -> Change:
        """Plan to give ascending rows their initial records again; rows that were never changed are left out."""
        shards = require_rows(self, rows)

        def changed() -> Int64Array:
            if shards.spec.is_caught_up and self.training.step:
                return rows  # steps have changed them all
            some: Int64Array = rows[shards.were_written(rows) | (shards.overlay.places(rows) != rows)]
            return some

        def renew() -> Change | None:
            # Rows that were left out may have changed meanwhile.
            same = self.memory is shards and np.array_equal(changed(), some)
            return None if same else self.plan_reset(rows)

        some = changed()
        records = shards.initial_records(some)
        if shards.spec.is_caught_up:
            records[:, -1] = self.training.step  # they are not what steps would have made of initial ones
        return Change(self, plan.each_once(some), records, takes_step=False, renew=renew)

    def change(self, ids: ArrayLike, values: ArrayLike, what: str, *, check_finite: bool) -> None:
        """Carry out a write; see `plan_change`."""
        self.apply(self.plan_change(ids, values, what, check_finite=check_finite))

    def apply(self, change: Change, scaling: Scaling | None = None) -> float | None:
        """Carry out a planned change; see `batch.change`."""
        return batch.change(self.runtime, [change], scaling)

    def reset(self, ids: ArrayLike) -> None:
        """Give rows their initial records again."""
        self.apply(self.plan_reset(self._distinct(ids)))

    def clear(self, row: int) -> None:
        """Set the weight of a row that was never written to zeros, without counting that."""
        shards = self.live()
        if not shards.spec.has_presence:
            return  # it is zeros
        record = shards.initial_records(np.array([row]))
        zeros = np.zeros((1, shards.spec.embedding_dim), np.float32)
        record[:, : shards.spec.weight_width] = shards.codec.encoded(zeros)
        self.apply(Change(self, plan.each_once(np.array([row])), record, takes_step=False))

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Change hyper-parameters, from the next update on."""
        with self.runtime.changing():
            self.live()
            now = self.training.optimizer
            if now is None or not optim.may_replace(now, optimizer):
                msg = (
                    f"table {self.name!r} has the optimizer {now}; set_optimizer changes its hyper-parameters, but "
                    f"neither its kind nor its state columns and their initial values, got {optimizer!r}; "
                    f"store.reshard({self.name!r}, optimizer=...) does"
                )
                raise ValueError(msg)
            step = -1 if self.spec.is_caught_up and optimizer != now else self.training.step
            while step != self.training.step:  # there may be others, while room is made for rows
                step = self.training.step
                for change in planned.catch_up(self, MATERIALIZED_BYTES // self.spec.record_bytes):
                    self.apply(change)
            self.training.optimizer = optimizer

    def freeze(self, start: int, stop: int | None, *, frozen: bool) -> None:
        """Freeze a range of rows, or unfreeze it."""
        with self.runtime.changing():
            self.training.freeze(start, stop, self.live().spec.num_embeddings, frozen=frozen)

    def _distinct(self, ids: ArrayLike) -> Int64Array:
        """Check row ids; return the distinct ones, ascending."""
        count = self.live().spec.num_embeddings
        return plan.group(validation.row_ids(ids, count, self.name).flat, count).rows

    # ---- changing the table

    def resize(self, num_embeddings: int, *, drop_rows: bool = False) -> None:
        """Change the number of rows."""
        count = validation.count(num_embeddings, "num_embeddings", maximum=MAX_ROWS)
        with self.runtime.writing():
            self.live()
            # The files are copied, so they have to hold the last commit. The fold may release the lock meanwhile.
            self.runtime.folds.drain()
            old = self.live()
            rows = self.spec.num_embeddings
            if count < rows and self.vocabulary is not None:
                msg = f"table {self.name!r} is as large as its vocabulary needs; remove keys instead"
                raise ShardEmbError(msg)
            if count < rows and not drop_rows:
                msg = (
                    f"table {self.name!r} has {rows} rows; "
                    f"resize({count}, drop_rows=True) drops those from {count} on"
                )
                raise ValueError(msg)
            if count != rows:
                self.become(self._resized(old, count), self.training)

    def resize_and_write(self, count: int, ids: Int64Array, records: NDArray[Any]) -> None:
        """Change the number of rows and write the records of some of them: both or neither."""
        with self.runtime.writing():
            self.runtime.folds.drain()
            self.become(self._resized(self.live(), count, ids, records), self.training)

    def _resized(
        self, old: Shards, count: int, ids: Int64Array | None = None, records: NDArray[Any] | None = None
    ) -> Shards:
        filling.take_back(self.runtime, old)  # the folders share files, and a hole is a hole in both
        spec = rewrite.resized(old.spec, count)
        directory = store_paths.parked(self.runtime.path, spec.uuid)
        rewrite.resize(old.location, TableLocation(spec, directory))
        try:
            new = Shards(spec, directory)
            new.adopt_changes(old, self.runtime.budget)
            if ids is not None and records is not None:
                new.adopt_records(ids, records, self.runtime.budget)
        except BaseException:
            files.remove_tree(directory)
            raise
        return new

    @contextlib.contextmanager
    def reshaped(
        self,
        optimizer: Optimizer | Literal["keep"] | None,
        rows_per_shard: int | None,
        dtype: object,
        progress: Progress,
    ) -> Iterator[None]:
        """Continue with a copy that has another form, if the body of the ``with`` commits it.

        All changes have to be committed before. If the copy is interrupted, the next call for the same commit
        continues it.
        """
        commit = self.runtime.committed.commit
        assert commit is not None
        old, keep, before = self.shards, optimizer == "keep", replace(self.training)
        spec = reshaped_spec(
            old.spec,
            optimizer=old.spec.optimizer if keep else optimizer,
            rows_per_shard=rows_per_shard,
            max_shards=address_space.mappings_left(),
            commit_id=str(commit.id),
            precision=dtypes.converted(old.spec.precision, dtype, optimizer, self.name),
        )
        directory = rewrite.reshaped(
            self.runtime.path, old.location, spec, keep_state=keep, progress=progress
        )
        self.become(Shards(spec, directory), before if keep else Training(spec.optimizer, 0, before.frozen))
        try:
            yield
        except BaseException:
            # But not if it was committed, or if it may have been, which the next opening finds out.
            if self.runtime.committed.commit is commit and not self.runtime.poisoned:
                self.become(old, before)
            raise

    def materialize(self, progress: Progress) -> None:
        """Write the initial records of all rows that were never written into the shards."""
        self.live()
        count = self.spec.num_embeddings if self.spec.has_presence else 0
        step = max(1, MATERIALIZED_BYTES // self.spec.record_bytes)
        with track(count, "materializing", progress=progress) as advance:
            for start in range(0, count, step):
                with self.runtime.writing():
                    self.runtime.folds.wait()  # for a commit under way too: it may write some of these rows
                    shards = self.live()
                    stop = min(start + step, count, self.spec.num_embeddings)
                    ids = shards.never_written(start, stop)
                    if ids.size:
                        self.runtime.folds.supplement(shards.spec, ids, partial(shards.pack_initial, ids))
                advance(min(step, count - start))

    # ---- its life within the store, under the store's lock

    def become(self, shards: Shards, training: Training) -> None:
        """Continue with other memory, after the number of rows, the shards or the optimizer changed."""
        self._shards, self.spec, shards.training = shards, shards.spec, self.training
        self.training.optimizer, self.training.step = training.optimizer, training.step
        self.training.frozen = ranges.without(training.frozen, self.spec.num_embeddings, MAX_ROWS)

    def restore(self, name: str, shards: Shards, training: Training) -> None:
        """Go back to what the table was at the last commit."""
        self.name, self.dropped = name, False
        self.become(shards, training)

    def adopt(self, newer: TableState) -> TableState:
        """Take over everything from a newer opening of the same table; return this table."""
        self.name, self.spec, self._shards = newer.name, newer.spec, newer.shards
        self.training, self.dropped = newer.training, False
        return self

    def release(self) -> None:
        """Release the table's memory; it is unmapped when the last lookup that uses it has ended."""
        self._shards = None
