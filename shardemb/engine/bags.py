"""Bags of rows: lookups that return one row a bag, and changes by the gradients of these.

::

    lookup    cut into tasks at the beginnings of bags -> find the places of the rows -> add them up
    change    group by row -> as any change; a row's gradient is summed from those of its bags within the step

Nothing here is as large as all rows of the batch. Rows are added up where they are, in the records; where some of a
task are not in any record, because they were never written or stand in for others, or are not float32, `few_rows` are
copied, drawn or decoded into a scratch at a time, and added up from that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np

from shardemb import dtypes
from shardemb.bags import Bags
from shardemb.base import validation
from shardemb.compute import plan, pooling
from shardemb.engine import batch
from shardemb.engine.planned import Change, Target, few_rows, memory_now
from shardemb.engine.training import Scaling, is_checked

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

    from shardemb.bags import Mode
    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.format.spec import TableSpec

RowGradients: TypeAlias = "Callable[[Float32Array, int, int], None]"

OutOfRange: TypeAlias = 'Literal["raise", "clip"] | ArrayLike'
"""What a lookup does with ids that are not rows; see `Table.lookup`."""

ITSELF, DEFAULT = -1, -2
"""What `StandIns.which` says of a position: the row of its id, or the default row."""

_FLOAT32 = np.dtype(np.float32)
_NO_FLOATS, _NO_WINNERS = np.empty(0, np.float32), np.empty((0, 0), np.int32)


class Named(Target, Protocol):
    """A table as checks see it."""

    runtime: Runtime

    @property
    def name(self) -> str:
        """Its name, for messages."""

    @property
    def spec(self) -> TableSpec:
        """What is fixed about it."""


class Trained(Named, Protocol):
    """A table as checks of updates see it."""

    def check_values(
        self, values: ArrayLike, shape: tuple[int, ...], what: str, *, check_finite: bool, form: str
    ) -> Float32Array:
        """See `TableState.check_values`."""


class StandIns(NamedTuple):
    """What is used at positions whose id only stands in for a row that there is not.

    Attributes
    ----------
    which : ndarray of int64, shape (n,)
        For each position `ITSELF`, `DEFAULT`, or a row, whose initial value is used.
    row : ndarray of float32, shape (embedding_dim,)
        The default row.
    """

    which: Int64Array
    row: Float32Array

    def fill(self, shards: Shards, rows: Float32Array, start: int, stop: int) -> None:
        """Overwrite those of the rows at positions ``start:stop`` that ids stand in for."""
        which = self.which[start:stop]
        rows[which == DEFAULT] = self.row
        if (drawn := np.flatnonzero(which >= 0)).size:
            rows[drawn] = shards.initial_values(which[drawn], "float32")


@dataclass(frozen=True, eq=False)
class Pooling:
    """Checked bags of the rows of one table, without padding.

    Attributes
    ----------
    ids : ndarray of int64, shape (n,)
    bounds : ndarray of int64, shape (bags + 1,)
        Bag ``b`` has the positions ``bounds[b]:bounds[b + 1]``.
    weights : ndarray of float32, shape (n,) or (0,)
    mode : Mode
    stand_ins : StandIns or None
    kept : ndarray of bool or None
        Which of the given positions these are, if some were padding.
    shape : tuple of int
        That of the given ids.
    """

    ids: Int64Array
    bounds: Int64Array
    weights: Float32Array
    mode: Mode
    stand_ins: StandIns | None
    kept: NDArray[np.bool_] | None
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of bags."""
        return self.bounds.size - 1

    @cached_property
    def divisors(self) -> Float32Array:
        """What the sum of each bag is divided by; nothing if it is not."""
        if self.mode in ("sum", "max"):
            return _NO_FLOATS
        found: Float32Array = pooling.divisors(self.weights, self.bounds, self.mode == "sqrtn")
        return found

    @cached_property
    def bag_of(self) -> Int64Array:
        """The bag of each position."""
        return np.repeat(np.arange(self.count), np.diff(self.bounds))

    def begin_at(self, position: int) -> bool:
        """Whether a bag begins at a position."""
        return bool(self.bounds[np.searchsorted(self.bounds, position)] == position)

    def pool(
        self,
        out: Float32Array,
        winners: NDArray[np.int32],
        records: Float32Array,
        places: Int64Array,
        start: int,
    ) -> None:
        """Take the rows at `places`, which belong to the positions from `start` on, into the results of their bags."""
        bag = int(np.searchsorted(self.bounds, start, "right")) - 1
        if self.mode == "max":
            pooling.maximise(records, places, self.bounds, out, winners, bag, start)
        else:
            pooling.add(records, places, self.weights, self.bounds, self.divisors, out, bag, start)

    def without(self, padding: int) -> Pooling:
        """Return the same bags without the rows of an id."""
        kept = self.ids != padding
        if self.stand_ins is not None:
            kept |= self.stand_ins.which != ITSELF
        if kept.all():
            return self
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
        weights = self.weights[kept] if self.weights.size else self.weights
        stand_ins = self.stand_ins and StandIns(self.stand_ins.which[kept], self.stand_ins.row)
        return replace(
            self,
            ids=self.ids[kept],
            bounds=before[self.bounds],
            weights=weights,
            stand_ins=stand_ins,
            kept=kept,
        )


class Form(NamedTuple):
    """What is said about bags besides their ids: mode, bounds and weights; see `Pooling`."""

    mode: Mode
    bounds: Int64Array
    weights: Float32Array

    @staticmethod
    def of(bags: Bags, shape: tuple[int, ...], table: str) -> Form:
        """Check it for ids of a shape.

        Raises
        ------
        TypeError, ValueError
            See `Table.lookup_bag`.
        """
        mode = validation.choice(bags.mode, ("sum", "mean", "max", "sqrtn"), "mode", table)
        bounds = validation.bag_bounds(
            bags.offsets, shape, table, include_last_offset=bags.include_last_offset
        )
        weights = _NO_FLOATS
        if bags.weights is not None:
            weights = validation.bag_weights(bags.weights, shape, mode, table)
        return Form(mode, bounds, weights)


# ---- reading --------------------------------------------------------------------------------------------------


def visit(
    shards: Shards,
    bags: Pooling,
    start: int,
    stop: int,
    use: Callable[[Float32Array, Int64Array, int], None],
) -> None:
    """Call ``use(records, places, first)`` for consecutive ranges of the positions ``start:stop``.

    A bag that begins at `start` may be begun once more: `use` begins it anew.
    """
    if start == stop:
        return
    hidden, begins = shards.hidden, bags.begin_at(start)
    seen = None if hidden is None else hidden.look(shards.spec)
    stored = bags.stand_ins is None and not (shards.spec.is_caught_up or shards.spec.precision.is_coded)
    if stored and (seen is None or (begins and not seen[1])):
        index = shards.overlay.index
        if index[0].size or shards.present.size:
            places = pooling.locate(*index, shards.present, bags.ids, start, stop)
        else:  # all rows are where they are in the files
            places = bags.ids[start:stop]
        if places.size:
            use(shards.records, places, start)
            # A writer may have begun to fill rows that this reader must not see.
            if hidden is None or hidden.look(shards.spec) == seen:
                return
    for first, last in few_rows(start, stop, shards.spec.embedding_dim):
        rows = np.empty((last - first, shards.spec.embedding_dim), np.float32)
        shards.gather("weight", bags.ids[first:last], rows, 0, last - first)
        if bags.stand_ins is not None:
            bags.stand_ins.fill(shards, rows, first, last)
        use(rows, np.arange(last - first), first)


class PooledRead(NamedTuple):
    """A lookup of bags: ``out[b]`` becomes what bag ``b`` is pooled to.

    If `winners` has rows, they become the positions within the bags that the values of a maximum come from.
    """

    table: Target
    shards: Shards
    bags: Pooling
    out: Float32Array
    winners: NDArray[np.int32] = _NO_WINNERS
    column: str = "weight"

    @property
    def ids(self) -> Int64Array:
        """The rows."""
        return self.bags.ids

    def gather(self, start: int, stop: int) -> None:
        """See `Reading`: bags are not divided."""
        bounds = self.bags.bounds
        first, last = bounds[np.searchsorted(bounds[:-1], [start, stop])].tolist()
        self.gather_part(first, last)

    def gather_part(self, start: int, stop: int) -> None:
        """See `Reading`."""
        visit(self.shards, self.bags, start, stop, partial(self.bags.pool, self.out, self.winners))

    def renewed(self) -> PooledRead:
        """See `Reading`."""
        now = memory_now(self.table, self.shards, self.ids)
        return self if now is self.shards else self._replace(shards=now)


class ProductRead(NamedTuple):
    """A lookup that returns for each position the product of its row and the gradient of its bag."""

    table: Target
    shards: Shards
    bags: Pooling
    gradients: Float32Array
    out: Float32Array
    column: str = "weight"

    @property
    def ids(self) -> Int64Array:
        """The rows."""
        return self.bags.ids

    def gather(self, start: int, stop: int) -> None:
        """See `Reading`: rows do not depend on each other."""

        def multiply(records: Float32Array, places: Int64Array, first: int) -> None:
            pooling.dot(records, places, self.bags.bag_of, self.gradients, self.out, first)

        visit(self.shards, self.bags, start, stop, multiply)

    def gather_part(self, start: int, stop: int) -> None:
        """See `Reading`."""
        self.gather(start, stop)

    def renewed(self) -> ProductRead:
        """See `Reading`."""
        now = memory_now(self.table, self.shards, self.ids)
        return self if now is self.shards else self._replace(shards=now)


class PlannedBags(NamedTuple):
    """A checked lookup of bags in one table."""

    table: Named
    shards: Shards
    bags: Pooling

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of its result."""
        return self.bags.count, self.shards.spec.embedding_dim

    def into(self, result: Float32Array, winners: NDArray[np.int32] = _NO_WINNERS) -> PooledRead:
        """Add the array that the result goes to; it has that shape and is C-contiguous."""
        flat = np.asarray(result)  # to kernels, a subclass of ndarray would be another type
        flat[self.bags.bounds[1:] == self.bags.bounds[:-1]] = 0
        return PooledRead(self.table, self.shards, self.bags, flat, winners)

    def read(self, out: NDArray[np.float32] | None = None) -> Float32Array:
        """Carry out the lookup."""
        runtime = self.table.runtime
        result = runtime.outputs.empty(self.shape) if out is None else validation.output(out, self.shape)
        batch.read(runtime, [self.into(result)])
        return result

    def winners(self) -> NDArray[np.int32]:
        """Return the positions within each bag that the values of the maximum come from, as the rows are now."""
        winners = np.empty(self.shape, np.int32)
        batch.read(self.table.runtime, [self.into(np.empty(self.shape, np.float32), winners)])
        return winners

    # ---- gradients

    def weight_gradient(self, gradients: ArrayLike) -> Float32Array:
        """Return the gradient of the weights, given those of the results, in the shape of the ids.

        Raises
        ------
        TypeError, ValueError
            The gradients have another dtype or shape; the mode has no weights.
        """
        bags, name = self.bags, self.table.name
        if bags.mode == "max":
            msg = f'table {name!r}: the mode "max" has no weights; choose "sum", "mean" or "sqrtn"'
            raise ValueError(msg)
        given = validation.rows(
            gradients,
            self.shape,
            what="gradients",
            table=name,
            check_finite=False,
            form="(bags, embedding_dim)",
        )
        products = np.empty(bags.ids.size, np.float32)
        batch.read(self.table.runtime, [ProductRead(self.table, self.shards, bags, given, products)])
        if bags.divisors.size:
            weights = bags.weights if bags.weights.size else np.ones(bags.ids.size, np.float32)
            pooling.weigh(products, weights, bags.bounds, bags.divisors, bags.mode == "sqrtn")
        if bags.kept is not None:
            every = np.zeros(bags.kept.size, np.float32)
            every[bags.kept] = products
            products = every
        return products.reshape(bags.shape)

    def change(self, gradients: Float32Array, *, scale_grad_by_freq: bool) -> Change:
        """Plan a step of the optimizer with the gradients of the results."""
        bags = self.bags
        if bags.divisors.size:
            with np.errstate(divide="ignore", invalid="ignore"):
                scaled = gradients / bags.divisors[:, np.newaxis]
            scaled[bags.divisors == 0] = 0
        else:
            scaled = gradients
        positions = None
        if bags.stand_ins is not None:
            positions = np.flatnonzero(bags.stand_ins.which == ITSELF)
        grouped = grouped_at(bags.ids, positions, self.shards.spec.num_embeddings)
        change = Change(self.table, grouped, scaled, takes_step=True)
        coefficients = bags.weights
        if scale_grad_by_freq:
            coefficients = _frequencies(grouped, coefficients, bags.ids.size)
        if bags.mode == "max":
            return self.change_of_maximum(change, coefficients)
        if not coefficients.size:  # a row's gradient is the sum of those of its bags
            return replace(change, batch=replace(grouped, order=bags.bag_of.take(grouped.order)))
        return replace(change, row_gradients=_weighed(change, bags.bag_of, coefficients))

    def change_of_maximum(self, change: Change, coefficients: Float32Array) -> Change:
        """Complete a change by where the maxima come from, which is looked up again if any row has changed since."""
        before = self.shards.totals.changes
        bags, grouped, winners = self.bags, change.batch, self.winners()
        begins, columns = np.zeros(bags.ids.size + 2, np.int64), np.empty(winners.size, np.int32)
        pooling.list_won(winners, bags.bounds, begins, columns)

        def row_gradients(out: Float32Array, start: int, stop: int) -> None:
            given = change.values, bags.bag_of, coefficients, begins, columns
            pooling.sum_won(*given, grouped.starts, grouped.order, out, start, stop)

        def renew() -> Change | None:
            now = memory_now(self.table, self.shards, bags.ids)
            if now is self.shards and now.totals.changes == before:
                return None
            return self._replace(shards=now).change_of_maximum(change, coefficients)

        return replace(change, row_gradients=row_gradients, renew=renew)


def grouped_at(ids: Int64Array, positions: Int64Array | None, num_embeddings: int) -> plan.Grouped:
    """Group the ids at some ascending positions, or all; the order tells positions among all of the ids."""
    if positions is None or positions.size == ids.size:
        return plan.group(ids, num_embeddings)
    grouped = plan.group(ids[positions], num_embeddings)
    return replace(grouped, order=positions[grouped.order])


def by_frequency(change: Change) -> Change:
    """Return a change that divides the gradients of each row by how often the row occurs in the batch."""
    count = len(change.values)
    coefficients = _frequencies(change.batch, _NO_FLOATS, count)
    return replace(change, row_gradients=_weighed(change, np.arange(count), coefficients))


def _frequencies(grouped: plan.Grouped, weights: Float32Array, count: int) -> Float32Array:
    """Divide the weights of `count` positions, or ones, by how often the row of each occurs in the batch."""
    counts = np.diff(grouped.starts)
    coefficients = np.ones(count, np.float32)
    coefficients[grouped.order] = np.repeat(np.float32(1) / counts.astype(np.float32), counts)
    return coefficients * weights if weights.size else coefficients


def _weighed(change: Change, bag_of: Int64Array, coefficients: Float32Array) -> RowGradients:
    """Return what writes the gradients of rows: those of their bags, each times the coefficient of its position.

    They are added up like the rows of bags: the bags are what is added, and the positions of a row make one of them.
    """
    grouped = change.batch
    bags, factors = bag_of.take(grouped.order), coefficients.take(grouped.order)

    def row_gradients(out: Float32Array, start: int, stop: int) -> None:
        bounds = grouped.starts[start : stop + 1]
        some = slice(int(bounds[0]), int(bounds[-1]))
        pooling.add(change.values, bags[some], factors[some], bounds - bounds[0], _NO_FLOATS, out, 0, 0)

    return row_gradients


# ---- from what users give -------------------------------------------------------------------------------------


def plan_read(
    bags: Bags, table: Named, stand_ins: StandIns | None = None, form: Form | None = None
) -> PlannedBags:
    """Check a lookup of bags, or its ids alone if the rest has been checked."""
    shards = require_numbers(table)
    ids = validation.row_ids(bags.ids, shards.spec.num_embeddings, table.name)
    form = Form.of(bags, ids.shape, table.name) if form is None else form
    found = Pooling(ids.flat, form.bounds, form.weights, form.mode, stand_ins, None, ids.shape)
    padding = padding_of(table, bags.padding_idx)
    return PlannedBags(table, shards, found if padding is None else found.without(padding))


def require_numbers(table: Named) -> Shards:
    """Return a table's memory; refuse bags of rows that are bytes which nothing here interprets.

    Raises
    ------
    ValueError
        They are.
    """
    shards = table.live()
    if shards.spec.precision.is_raw:
        msg = f"table {table.name!r} holds raw bytes, which cannot be pooled: look up its rows with lookup()"
        raise ValueError(msg)
    return shards


def padding_of(table: Named, padding_idx: Any) -> int | None:  # noqa: ANN401
    """Return the row of padding: that of a call, checked, or else that of the table."""
    spec = table.live().spec
    if padding_idx is None:
        return spec.padding_idx
    return validation.padding_row(padding_idx, spec.num_embeddings, table.name)


def read(bags: Bags, table: Named, out: NDArray[np.float32] | None, out_of_range: OutOfRange) -> Float32Array:
    """Look up bags of rows; see `Table.lookup_bag`."""
    require_numbers(table)
    ids, stand_ins = in_range(bags.ids, table, out_of_range)
    return plan_read(replace(bags, ids=ids), table, stand_ins).read(out)


def plan_change(
    table: Trained, bags: Bags, gradients: ArrayLike, *, scale_grad_by_freq: bool, check_finite: bool
) -> Change:
    """Check an update by the gradients of bags, and group its ids; see `Table.update_bag`."""
    planned = plan_read(bags, table)
    values = checked_gradients(
        table, gradients, planned.bags.count, planned.bags.weights, check_finite=check_finite
    )
    return planned.change(values, scale_grad_by_freq=scale_grad_by_freq)


def update(
    table: Trained,
    bags: Bags,
    gradients: ArrayLike,
    *,
    scale_grad_by_freq: bool,
    scaling: Scaling | None,
    check_finite: bool,
) -> float | None:
    """Carry out an update by the gradients of bags; see `Table.update_bag`."""
    finite = is_checked(scaling, check_finite=check_finite)
    change = plan_change(table, bags, gradients, scale_grad_by_freq=scale_grad_by_freq, check_finite=finite)
    return batch.change(table.runtime, [change], scaling)


def checked_gradients(
    table: Trained, gradients: ArrayLike, count: int, weights: Float32Array, *, check_finite: bool
) -> Float32Array:
    """Check the gradients of so many bags for an update; the weights, whose form was checked, must be finite too."""
    form = "(bags, embedding_dim)"
    values = table.check_values(gradients, (count,), "gradients", check_finite=check_finite, form=form)
    if check_finite and weights.size:
        validation.require_finite(weights, f"table {table.name!r}: weights")
    return values


def in_range(
    ids: ArrayLike, table: Named, out_of_range: OutOfRange, form: str = "float32"
) -> tuple[ArrayLike, StandIns | None]:
    """Return ids that are all rows of a table, and what is used instead of rows for those that were not.

    Raises
    ------
    TypeError, ValueError
        The ids are not integers; `out_of_range` is invalid, or a row of numbers although bytes are looked up.
    """
    if isinstance(out_of_range, str):
        validation.choice(out_of_range, ("raise", "clip"), "out_of_range", table.name)
        if out_of_range == "raise":
            return ids, None
    spec = table.live().spec
    if form == dtypes.RAW and not isinstance(out_of_range, str):
        msg = (
            f"table {table.name!r}: out_of_range is a row of numbers, and the lookup returns bytes; "
            f'choose out_of_range="clip", or another dtype'
        )
        raise ValueError(msg)
    checked = validation.any_ids(ids, table.name)
    if isinstance(out_of_range, str):
        return np.clip(checked.flat, 0, spec.num_embeddings - 1).reshape(checked.shape), None
    row = validation.rows(
        out_of_range,
        (spec.embedding_dim,),
        what="the values of out_of_range",
        table=table.name,
        check_finite=False,
        form="(embedding_dim,)",
    )[0]
    outside = (checked.flat < 0) | (checked.flat >= spec.num_embeddings)
    inside = np.where(outside, 0, checked.flat).reshape(checked.shape)
    return inside, StandIns(np.where(outside, DEFAULT, ITSELF), row) if outside.any() else None


def as_bags(given: Any) -> Bags:  # noqa: ANN401
    """Return what `Store.lookup_bag` is given for a table as bags: ids, or a tuple of ids and offsets."""
    if isinstance(given, Bags):
        return given
    return Bags(*given) if isinstance(given, tuple) and len(given) == 2 else Bags(given)


def with_gradients(given: Any, table: str) -> tuple[Bags, ArrayLike]:  # noqa: ANN401
    """Return what `Store.update_bag` is given for a table as bags and gradients.

    Raises
    ------
    TypeError
        It is neither bags and gradients, nor ids, offsets and gradients.
    """
    if not isinstance(given, tuple) or len(given) not in (2, 3):
        msg = (
            f"table {table!r}: pass a tuple of bags and gradients, or of ids, offsets and gradients, "
            f"got {given!r:.80}"
        )
        raise TypeError(msg)
    return as_bags(given[0] if len(given) == 2 else given[:2]), given[-1]


def read_many(runtime: Runtime, wanted: dict[str, PlannedBags]) -> dict[str, Float32Array]:
    """Carry out lookups of bags in several tables together."""
    # One block of memory for all results: alone, each would take whole huge pages.
    results = runtime.outputs.empty_together([(each.shape, _FLOAT32) for each in wanted.values()])
    batch.read(runtime, [each.into(rows) for each, rows in zip(wanted.values(), results, strict=True)])
    return dict(zip(wanted, results, strict=True))
