"""From lookups that have gradients to one change a table: all that a step takes from one table is one batch.

Rows stay rows and bags of one form stay bags, one after the other. What is mixed becomes bags of the mode ``"sum"``: a
row is a bag of one, and the gradient of a mean is divided by the number of its rows, as the store does it. For maxima
among others, the rows that they came from are looked up again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch

from shardemb.bags import Bags
from shardemb.torch.pending import is_keyed
from shardemb.torch.tensors import gradient_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from shardemb.torch.pending import AnyTable, Lookup, Missing

Float32Array: TypeAlias = "NDArray[np.float32]"


class Step(NamedTuple):
    """What `Store.update` of one store is called with.

    Attributes
    ----------
    store : Store
    batches : dict of str to (ids or Bags, gradients)
    missing : dict of str to ({"error", "skip"} or int)
        What becomes of gradients of keys without a row, in each table that is used by key.
    """

    store: Any
    batches: dict[str, tuple[Any, Float32Array]]
    missing: dict[str, Any]


def merged(lookups: Iterable[Lookup]) -> list[Step]:
    """Return the step of each store for lookups of any of its tables.

    Gradients are added up in the order of the forward passes, whatever order they arrived in.

    Raises
    ------
    ValueError
        Lookups of a table differ in what keys without a row are.
    """
    stores: dict[int, dict[str, list[Lookup]]] = {}
    for each in sorted(lookups, key=lambda lookup: lookup.number):
        stores.setdefault(id(each.table.store), {}).setdefault(each.table.name, []).append(each)
    steps = []
    for tables in stores.values():
        for some in tables.values():
            _require_alike(some)
        first = [some[0] for some in tables.values()]
        missing = {each.table.name: in_changes(each.missing) for each in first if is_keyed(each.table)}
        batches = {name: _batch(some) for name, some in tables.items()}
        steps.append(Step(first[0].table.store, batches, missing))
    return steps


def in_changes(missing: Missing) -> Any:  # noqa: ANN401
    """Return what becomes of gradients of keys without a row, given what these were looked up as."""
    return "skip" if missing in ("initial", "zeros") else missing


def _require_alike(lookups: Sequence[Lookup]) -> None:
    first = lookups[0]
    for each in lookups:
        if in_changes(each.missing) != in_changes(first.missing):
            msg = (
                f"modules of table {first.table.name!r} differ in what becomes of keys without a row: "
                f"missing={each.missing!r} and missing={first.missing!r}; choose one"
            )
            raise ValueError(msg)


# ---- one table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """Gradients of rows, one for each id."""

    ids: NDArray[Any]
    gradients: Float32Array

    def as_sums(self) -> _Sums:
        return _Sums(self.ids, np.ones(self.ids.size, np.int64), None, self.gradients)


@dataclass(frozen=True)
class _Sums:
    """Gradients of weighted sums of rows. `counts` are the numbers of rows of the bags."""

    ids: NDArray[Any]
    counts: NDArray[np.int64]
    weights: Float32Array | None
    gradients: Float32Array


def _batch(lookups: Sequence[Lookup]) -> tuple[Any, Float32Array]:
    """Return all gradients of one table, with the rows or bags that they belong to."""
    bags = [_bags_of(each) for each in lookups]
    alike = [each for each in bags if each is not None and _form(each) == _form(bags[0])]
    if len(alike) == len(lookups) and not any(each.scale_grad_by_freq for each in lookups):
        return _joined_bags(alike), _stacked([gradient_of(each.leaf) for each in lookups])
    parts = [_as_rows(each) if _is_of_rows(each) else _as_sums(each) for each in lookups]
    if all(isinstance(each, _Rows) for each in parts):
        return _joined([each.ids for each in parts]), _stacked([each.gradients for each in parts])
    sums = [each.as_sums() if isinstance(each, _Rows) else each for each in parts]
    weights = None
    if any(each.weights is not None for each in sums):
        filled = [
            np.ones(each.ids.size, np.float32) if each.weights is None else each.weights for each in sums
        ]
        weights = np.concatenate(filled)
    offsets = _bounds(np.concatenate([each.counts for each in sums]))
    ids = _joined([each.ids for each in sums])
    bags_of_all = Bags(ids, offsets, "sum", weights, None, include_last_offset=True)
    return bags_of_all, _stacked([each.gradients for each in sums])


def _bags_of(lookup: Lookup) -> Bags | None:
    return lookup.ids if isinstance(lookup.ids, Bags) else None


def _is_of_rows(lookup: Lookup) -> bool:
    """Whether the gradient becomes one for each id: that of rows, and that of maxima, which no sum has."""
    bags = _bags_of(lookup)
    return bags is None or bags.mode == "max"


def _form(bags: Bags | None) -> tuple[Any, ...] | None:
    """Return what bags have in common that can be joined."""
    return None if bags is None else (bags.mode, bags.weights is None, bags.padding_idx)


def _joined_bags(bags: Sequence[Bags]) -> Bags:
    """Return bags of one form, one after the other."""
    first = bags[0]
    if len(bags) == 1:
        return first
    counts = np.concatenate([_counts(each) for each in bags])
    weights = None
    if first.weights is not None:
        weights = np.concatenate([np.reshape(np.asarray(each.weights), -1) for each in bags])
    ids = _joined([each.ids for each in bags])
    return replace(first, ids=ids, offsets=_bounds(counts), weights=weights, include_last_offset=True)


def _joined(ids: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([each.reshape(-1) for each in ids]) if len(ids) > 1 else ids[0].reshape(-1)


def _stacked(gradients: Sequence[Float32Array]) -> Float32Array:
    flat = [each.reshape(-1, each.shape[-1]) for each in gradients]
    return np.concatenate(flat) if len(flat) > 1 else flat[0]


def _counts(bags: Bags) -> NDArray[np.int64]:
    """Return the number of ids of each bag."""
    if bags.offsets is None:
        return np.full(bags.ids.shape[0], bags.ids.shape[1], np.int64)
    offsets = np.asarray(bags.offsets, np.int64)
    return np.diff(offsets) if bags.include_last_offset else np.diff(offsets, append=bags.ids.size)


def _bounds(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])


# ---- one lookup ---------------------------------------------------------------------------------------------------


def _as_rows(lookup: Lookup) -> _Rows:
    if isinstance(lookup.ids, Bags):
        ids, gradients = _rows_of_maxima(lookup, lookup.ids)
    else:
        ids, gradients = lookup.ids.reshape(-1), gradient_of(lookup.leaf)
        gradients = gradients.reshape(-1, gradients.shape[-1])
    if lookup.padding_idx is not None:
        kept = ids != lookup.padding_idx
        if not kept.all():
            ids, gradients = ids[kept], gradients[kept]
    if lookup.scale_grad_by_freq:
        gradients = gradients / _frequencies(ids)[:, np.newaxis]
    return _Rows(ids, gradients)


def _as_sums(lookup: Lookup) -> _Sums:
    bags = lookup.ids
    assert isinstance(bags, Bags)
    ids, counts, weights = _without_padding(lookup, bags)
    gradients = gradient_of(lookup.leaf)
    if bags.mode == "mean":
        gradients = gradients / np.maximum(counts, 1).astype(np.float32)[:, np.newaxis]
    if lookup.scale_grad_by_freq:
        frequencies = _frequencies(ids)
        weights = (np.float32(1) if weights is None else weights) / frequencies
    return _Sums(ids, counts, weights, gradients)


def _without_padding(
    lookup: Lookup, bags: Bags
) -> tuple[NDArray[Any], NDArray[np.int64], Float32Array | None]:
    """Return ids, the number of ids of each bag, and weights, without padding."""
    ids, counts = bags.ids.reshape(-1), _counts(bags)
    weights = None if bags.weights is None else np.reshape(np.asarray(bags.weights, np.float32), -1)
    kept = _kept(lookup, ids, bags.padding_idx)
    if kept is None or kept.all():
        return ids, counts, weights
    before = _bounds(kept.astype(np.int64))  # so many are kept before a position
    counts = np.diff(before[_bounds(counts)])
    return ids[kept], counts, None if weights is None else weights[kept]


def _kept(lookup: Lookup, ids: NDArray[Any], padding_idx: Any) -> NDArray[np.bool_] | None:  # noqa: ANN401
    """Return which ids are not padding, as the store sees it; None if none is."""
    table: AnyTable = lookup.table
    if padding_idx is not None:
        return np.asarray(ids != padding_idx)
    if not is_keyed(table):
        return None if table.padding_idx is None else np.asarray(ids != table.padding_idx)
    padding = table.rows.padding_idx
    if padding is None or lookup.missing != padding:
        return None
    return np.asarray(table.vocabulary.lookup(ids) >= 0)  # the others stand for the row of padding


def _rows_of_maxima(lookup: Lookup, bags: Bags) -> tuple[NDArray[Any], Float32Array]:
    """Give the gradients of maxima to the rows that these are from, as these rows are now; 0 to the others."""
    table: AnyTable = lookup.table
    ids, counts, _ = _without_padding(lookup, bags)
    found = table.lookup(ids, missing=lookup.missing) if is_keyed(table) else table.lookup(ids)
    rows = torch.from_numpy(found).requires_grad_()
    with torch.enable_grad():
        pooled = torch.nn.functional.embedding_bag(
            torch.arange(ids.size), rows, torch.from_numpy(_bounds(counts)[:-1]), mode="max"
        )
    pooled.backward(torch.from_numpy(gradient_of(lookup.leaf)))  # type: ignore[no-untyped-call]
    return ids, gradient_of(rows)


def _frequencies(ids: NDArray[Any]) -> Float32Array:
    """Return for each id how often it occurs."""
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return counts.astype(np.float32)[inverse.reshape(-1)]
