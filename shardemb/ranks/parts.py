"""What ranks ask of a table, joined into one batch in the order of the ranks, and its result cut up again."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.bags import Bags
from shardemb.base import validation
from shardemb.base.arrays import as_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from shardemb.bags import Mode
    from shardemb.vocabulary.keys import KeysLike

_NO_IDS = np.empty(0, np.int64)


@dataclass(frozen=True)
class BagForm:
    """What is said about bags besides their ids."""

    offsets: NDArray[np.int64] = field(compare=False)
    mode: Mode
    weights: NDArray[np.float32] | None = field(compare=False)
    padding_idx: Any


@dataclass(frozen=True)
class Part:
    """What one rank asks of one table: rows or bags of rows, and gradients if it is an update.

    Attributes
    ----------
    ids : ndarray of int64, shape (n,), or list of keys
    shape : tuple of int
        That in which the ids were given.
    bags : BagForm or None
        None for rows.
    grads : ndarray of float32, shape (rows or bags, dim), or None
    """

    ids: NDArray[np.int64] | list[Any]
    shape: tuple[int, ...]
    bags: BagForm | None = None
    grads: NDArray[np.float32] | None = None

    @staticmethod
    def of(table: str, given: KeysLike | Bags, grads: ArrayLike | None, dim: int) -> Part:
        """Check what a rank was given as far as it can be told without the table."""
        if not isinstance(given, Bags):
            ids, shape = _flat(given, table)
            return Part(ids, shape, None, _gradients(grads, (*shape, dim), table))
        ids, shape = _flat(given.ids, table)
        bounds = validation.bag_bounds(
            given.offsets, shape, table, include_last_offset=given.include_last_offset
        )
        weights = None
        if given.weights is not None:
            weights = validation.bag_weights(given.weights, shape, given.mode, table)
        form = BagForm(bounds[:-1], given.mode, weights, given.padding_idx)
        return Part(ids, shape, form, _gradients(grads, (bounds.size - 1, dim), table))

    @property
    def num_results(self) -> int:
        """Rows or bags that a lookup returns."""
        return math.prod(self.shape) if self.bags is None else self.bags.offsets.size

    def result(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Bring the rows of a lookup into the shape in which the ids were given."""
        return rows if self.bags is not None else rows.reshape(*self.shape, rows.shape[-1])


def _flat(given: Any, table: str) -> tuple[Any, tuple[int, ...]]:  # noqa: ANN401
    array = as_array(given, f"table {table!r}: ids")
    if array.dtype.kind in "iu" or not array.size:
        checked = validation.any_ids(array if array.size else array.astype(np.int64), table)
        return checked.flat, checked.shape
    return array.reshape(-1).tolist(), array.shape


def _gradients(grads: ArrayLike | None, shape: tuple[int, ...], table: str) -> Any:  # noqa: ANN401
    if grads is None:
        return None
    given = validation.rows(grads, shape, what="gradients", table=table, check_finite=False)
    return np.ascontiguousarray(given)


class Joined:
    """The parts of all ranks for one table. A rank that asks nothing of it has None.

    Raises
    ------
    ValueError
        Ranks have rows and bags of it, or bags of different kinds.
    """

    def __init__(self, table: str, parts: Sequence[Part | None]) -> None:
        self._parts = parts
        self._given = [each for each in parts if each is not None]
        forms = [each.bags for each in self._given]
        if any(form != forms[0] for form in forms):
            said = [
                "rows" if form is None else f"bags ({form.mode!r}, padding {form.padding_idx!r})"
                for form in forms
            ]
            msg = (
                f"table {table!r}: ranks ask for {', '.join(dict.fromkeys(said))} in one call; all have to ask for "
                f"the same kind"
            )
            raise ValueError(msg)
        self._form = forms[0]

    @property
    def what(self) -> Any:  # noqa: ANN401
        """Ids or keys, or `Bags`, as the methods of tables and stores take them."""
        ids = self._ids()
        if self._form is None:
            return ids
        return Bags(ids, self._offsets(), self._form.mode, self._weights(), self._form.padding_idx)

    def gradients(self, divisor: int) -> NDArray[np.float32]:
        """Return the gradients one after the other, each divided, as `DistributedDataParallel` averages its own."""
        given = [each.grads for each in self._given if each.grads is not None]
        joined = np.empty((sum(map(len, given)), given[0].shape[-1]), np.float32)
        start = 0
        for each in given:
            np.divide(each, np.float32(divisor), out=joined[start : start + len(each)])
            start += len(each)
        # Rows are given in the shape of their ids, which is flat here.
        return joined

    def cut(self, rows: NDArray[Any]) -> list[NDArray[Any] | None]:
        """Cut a result into those of the ranks, which are views."""
        counts = [0 if each is None else each.num_results for each in self._parts]
        return [
            None if part is None else part.result(rows[start:stop])
            for part, (start, stop) in zip(self._parts, pairwise(accumulate(counts, initial=0)), strict=True)
        ]

    def cut_by_id(self, values: NDArray[Any]) -> list[NDArray[Any] | None]:
        """Cut what has one value for each id of bags into the parts of the ranks."""
        counts = [0 if each is None else len(each.ids) for each in self._parts]
        return [
            None if part is None else values[start:stop].reshape(part.shape)
            for part, (start, stop) in zip(self._parts, pairwise(accumulate(counts, initial=0)), strict=True)
        ]

    def require_rows(self, num_embeddings: int, table: str) -> None:
        """Check the row ids of each rank by itself, so that the error names its position there.

        Raises
        ------
        TypeError, RowIdError
            With a note that says whose ids they are.
        """
        for rank, part in enumerate(self._parts):
            if part is not None:
                try:
                    validation.row_ids(np.asarray(part.ids).reshape(part.shape), num_embeddings, table)
                except Exception as error:
                    error.add_note(f"these are the ids of rank {rank}")
                    raise

    def _ids(self) -> Any:  # noqa: ANN401
        given = [each.ids for each in self._given if len(each.ids)]
        if any(isinstance(each, list) for each in given):
            return [key for each in given for key in each]
        return np.concatenate(given) if given else _NO_IDS

    def _offsets(self) -> NDArray[np.int64]:
        starts = accumulate((len(each.ids) for each in self._given), initial=0)
        return np.concatenate(
            [
                each.bags.offsets + start
                for each, start in zip(self._given, starts, strict=False)
                if each.bags is not None
            ]
        )

    def _weights(self) -> NDArray[np.float32] | None:
        pairs = [(len(each.ids), each.bags.weights) for each in self._given if each.bags is not None]
        if all(weights is None for _, weights in pairs):
            return None
        return np.concatenate(
            [np.ones(count, np.float32) if weights is None else weights for count, weights in pairs]
        )
