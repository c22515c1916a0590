"""From what users give to what is sent: distinct rows, and one gradient for each of them. Pure.

Gradients of equal ids are summed here, in the order of the batch, and bags of rows are pooled here: with the kernels,
and so the bits, of a local store.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import validation
from shardemb.compute import plan, pooling, row_kernels
from shardemb.distributed.routing import Summed
from shardemb.engine.bags import Form, Pooling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import ArrayLike, NDArray

    from shardemb.bags import Bags
    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.distributed.work import TableFacts
    from shardemb.engine.training import Padding, Scaling

_NO_FLOATS = np.empty(0, np.float32)

NO_WINNERS = np.empty((0, 0), np.int32)
"""For a pooling whose maxima are not asked where they come from."""


@dataclass(frozen=True)
class Step:
    """A checked update of one table.

    Attributes
    ----------
    table : str
    ids : ndarray of int64, shape (u,)
        Ascending, and distinct unless the table has counters.
    gradients : ndarray of float32, shape (u, dim)
    repeated : ndarray of bool, shape (u,), or None
        Which rows' gradients are sums; None if all are more than that. The order of a norm depends on it.
    """

    table: str
    ids: Int64Array
    gradients: Float32Array
    repeated: NDArray[np.bool_] | None = None

    def sum_of_squares(self) -> float:
        """Return that of all gradients, added in the order of a local store."""
        squares = np.empty(self.ids.size)
        row_kernels.sum_squares(self.gradients, squares, 0, squares.size)
        if self.repeated is None:
            return float(squares.sum())
        single = squares[~self.repeated]
        one_by_one = np.arange(single.size + 1)
        return float(squares[self.repeated].sum()) + row_kernels.sum_of_single(one_by_one, one_by_one, single)

    def times(self, factor: float) -> Step:
        """Multiply the gradients, as an optimizer does first of all."""
        return self if factor == 1 else replace(self, gradients=self.gradients * np.float32(factor))


def scaled(steps: Iterable[Step], scaling: Scaling) -> tuple[list[Step], float]:
    """Return steps with scaled and clipped gradients, and the norm before.

    Raises
    ------
    ValueError
        The norm is not finite, and the step cannot be skipped.
    """
    steps = list(steps)
    norm = scaling.norm(math.fsum(each.sum_of_squares() for each in steps))
    if not math.isfinite(norm):
        if scaling.scale is None:
            way_out = "with scale=1.0, such a step is skipped"
            msg = f"the norm of the gradients is {norm}, so they cannot be clipped ({way_out})"
            raise ValueError(msg)
        return [], norm
    factor = scaling.factor(norm)
    return [each.times(factor) for each in steps], norm


def require_step(facts: TableFacts, scaling: Scaling | None) -> None:
    """Raise `ValueError` if a table takes no steps, or none that are scaled."""
    if facts.optimizer is None:
        msg = f"table {facts.name!r} has no optimizer: give create_table one, or set rows with write()"
        raise ValueError(msg)
    if facts.counters and scaling is not None:
        msg = f"table {facts.name!r} has counters; gradients of such a distributed table are not scaled or clipped"
        raise ValueError(msg)


def step_of_rows(
    facts: TableFacts, ids: ArrayLike, gradients: ArrayLike, padding: Padding, *, check_finite: bool
) -> Step:
    """Check an update by row id, and sum the gradients of equal ids; see `Table.update`."""
    checked = validation.row_ids(ids, facts.num_embeddings, facts.name)
    shape = (*checked.shape, facts.embedding_dim)
    values = validation.rows(gradients, shape, what="gradients", table=facts.name, check_finite=check_finite)
    row, flat = padding_of(facts, padding.padding_idx), checked.flat
    if row is not None and (flat == row).any():
        kept = np.flatnonzero(flat != row)
        flat, values = flat[kept], values[kept]
    grouped = plan.group(flat, facts.num_embeddings)
    if padding.scale_grad_by_freq and flat.size:
        everywhere = np.arange(flat.size)
        return _weighed(facts, grouped, values, everywhere, _frequencies(grouped, _NO_FLOATS, flat.size))
    return _summed(facts, grouped, values, flat)


def checked_bags(facts: TableFacts, given: Bags) -> Pooling:
    """Check bags of rows; see `Table.lookup_bag`."""
    if facts.dtype == "raw":
        msg = f"table {facts.name!r} holds raw bytes, which cannot be pooled: look up its rows with lookup()"
        raise ValueError(msg)
    ids = validation.row_ids(given.ids, facts.num_embeddings, facts.name)
    form = Form.of(given, ids.shape, facts.name)
    found = Pooling(ids.flat, form.bounds, form.weights, form.mode, None, None, ids.shape)
    padding = padding_of(facts, given.padding_idx)
    return found if padding is None else found.without(padding)


def pooled(
    facts: TableFacts,
    bags: Pooling,
    rows: Float32Array,
    places: Int64Array,
    winners: NDArray[np.int32] = NO_WINNERS,
) -> Float32Array:
    """Pool rows, of which each position has its place among `rows`; see `Pooling.pool`."""
    out = np.empty((bags.count, facts.embedding_dim), np.float32)
    out[bags.bounds[1:] == bags.bounds[:-1]] = 0
    if bags.ids.size:
        bags.pool(out, winners, rows, places, 0)
    return out


def bag_gradients(
    facts: TableFacts, bags: Pooling, gradients: ArrayLike, *, check_finite: bool
) -> Float32Array:
    """Check the gradients by what bags are pooled to."""
    form, shape = "(bags, embedding_dim)", (bags.count, facts.embedding_dim)
    values = validation.rows(
        gradients, shape, what="gradients", table=facts.name, check_finite=check_finite, form=form
    )
    if check_finite and bags.weights.size:
        validation.require_finite(bags.weights, f"table {facts.name!r}: weights")
    return values


def step_of_bags(
    facts: TableFacts,
    bags: Pooling,
    values: Float32Array,
    winners: Callable[[], NDArray[np.int32]],
    *,
    scale_grad_by_freq: bool,
) -> Step:
    """Return the gradient of each distinct row of bags; see `Table.update_bag`."""
    if bags.divisors.size:
        with np.errstate(divide="ignore", invalid="ignore"):
            values = values / bags.divisors[:, np.newaxis]
        values[bags.divisors == 0] = 0
    grouped, coefficients = plan.group(bags.ids, facts.num_embeddings), bags.weights
    if not bags.ids.size:
        return Step(facts.name, bags.ids, np.empty((0, facts.embedding_dim), np.float32))
    if scale_grad_by_freq:
        coefficients = _frequencies(grouped, coefficients, bags.ids.size)
    if bags.mode == "max":
        _require_no_counters(facts)
        won = winners()
        begins, columns = np.zeros(bags.ids.size + 2, np.int64), np.empty(won.size, np.int32)
        pooling.list_won(won, bags.bounds, begins, columns)
        out = np.empty((grouped.rows.size, facts.embedding_dim), np.float32)
        given = values, bags.bag_of, coefficients, begins, columns
        pooling.sum_won(*given, grouped.starts, grouped.order, out, 0, grouped.rows.size)
        return Step(facts.name, grouped.rows, out)
    if coefficients.size:
        return _weighed(facts, grouped, values, bags.bag_of, coefficients)
    of_bags = plan.Grouped(grouped.rows, grouped.starts, bags.bag_of.take(grouped.order))
    return _summed(facts, of_bags, values, bags.ids)


def weight_gradient(
    facts: TableFacts, bags: Pooling, gradients: Float32Array, rows: Float32Array, places: Int64Array
) -> Float32Array:
    """Return the gradient by the weights of bags; see `Table.bag_weight_gradient`."""
    products = np.empty(bags.ids.size, np.float32)
    if bags.ids.size:
        pooling.dot(rows, places, bags.bag_of, gradients, products, 0)
    if bags.divisors.size:
        weights = bags.weights if bags.weights.size else np.ones(bags.ids.size, np.float32)
        pooling.weigh(products, weights, bags.bounds, bags.divisors, bags.mode == "sqrtn")
    if bags.kept is not None:
        every = np.zeros(bags.kept.size, np.float32)
        every[bags.kept] = products
        products = every
    return products.reshape(bags.shape)


def padding_of(facts: TableFacts, padding_idx: Any) -> int | None:  # noqa: ANN401
    """Return the row of padding: that of a call, checked, or else that of the table."""
    if padding_idx is None:
        return facts.padding_idx
    return validation.padding_row(padding_idx, facts.num_embeddings, facts.name)


def _summed(facts: TableFacts, grouped: plan.Grouped, values: Float32Array, ids: Int64Array) -> Step:
    """Return the sum of each row's gradients; in a table with counters, all that there are, in their order."""
    if not ids.size:
        return Step(facts.name, ids, np.empty((0, facts.embedding_dim), np.float32))
    if facts.counters:
        return Step(
            facts.name, grouped.rows.repeat(np.diff(grouped.starts)), values.take(grouped.order, axis=0)
        )
    summed = Summed.of(grouped, values)
    return Step(facts.name, summed.ids, summed.gradients, np.diff(grouped.starts) > 1)


def _frequencies(grouped: plan.Grouped, weights: Float32Array, count: int) -> Float32Array:
    """Divide the weights of `count` positions, or ones, by how often the row of each occurs in the batch."""
    counts = np.diff(grouped.starts)
    coefficients = np.ones(count, np.float32)
    coefficients[grouped.order] = np.repeat(np.float32(1) / counts.astype(np.float32), counts)
    return coefficients * weights if weights.size else coefficients


def _weighed(
    facts: TableFacts,
    grouped: plan.Grouped,
    values: Float32Array,
    value_of: Int64Array,
    coefficients: Float32Array,
) -> Step:
    """Add up each row's gradients, each times the coefficient of its position."""
    _require_no_counters(facts)
    out = np.empty((grouped.rows.size, facts.embedding_dim), np.float32)
    of, factors = value_of.take(grouped.order), coefficients.take(grouped.order)
    pooling.add(values, of, factors, grouped.starts, _NO_FLOATS, out, 0, 0)
    return Step(facts.name, grouped.rows, out)


def _require_no_counters(facts: TableFacts) -> None:
    if facts.counters:
        msg = (
            f"table {facts.name!r} has counters; such a distributed table takes plain sums of gradients only"
        )
        raise ValueError(msg)
