"""Where a row lies: row `id` of a table is row ``id // P`` of partition ``id % P``. Pure arithmetic.

Ids are made distinct by whoever asks, before they are sent: the most frequent id of a batch would otherwise keep its
owner busier than all the others. The remainder balances what a range would not: vocabularies are in order of frequency.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.compute import grouping

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.compute import plan


def local_rows(count: int, part: int, parts: int) -> int:
    """Return how many of the rows ``0:count`` are in a partition.

    Examples
    --------
    >>> [local_rows(10, part, 4) for part in range(4)]
    [3, 3, 2, 2]
    """
    return len(range(part, count, parts))


@dataclass(frozen=True)
class Route:
    """Rows, sorted by the partitions that they are in.

    Attributes
    ----------
    rows : ndarray of int64, shape (n,)
        Numbers within their partitions.
    order : ndarray of int64, shape (n,)
        The positions that they had before, ascending within each partition.
    bounds : ndarray of int64, shape (P + 1,)
        Partition ``p`` has ``rows[bounds[p]:bounds[p + 1]]``.
    """

    rows: Int64Array
    order: Int64Array
    bounds: Int64Array

    @staticmethod
    def of(ids: Int64Array, parts: int) -> Route:
        """Sort row ids by partition, and keep their order within each.

        Examples
        --------
        >>> route = Route.of(np.array([4, 5, 8, 9]), 4)
        >>> route.rows, route.order, route.bounds
        (array([1, 2, 1, 2]), array([0, 2, 1, 3]), array([0, 2, 4, 4, 4]))
        """
        part = (ids % parts).astype(np.uint16)
        order = np.argsort(part, kind="stable")
        bounds = np.zeros(parts + 1, np.int64)
        np.cumsum(np.bincount(part, minlength=parts), out=bounds[1:])
        return Route((ids // parts)[order], order, bounds)

    def positions(self, parts: Sequence[int]) -> Int64Array:
        """Return the places, among `rows`, of the rows of some partitions, one partition after the other."""
        ranges = [np.arange(self.bounds[part], self.bounds[part + 1]) for part in parts]
        return np.concatenate(ranges) if ranges else np.empty(0, np.int64)

    def counts(self, parts: Sequence[int]) -> list[int]:
        """Return how many rows each of some partitions has."""
        return [int(self.bounds[part + 1] - self.bounds[part]) for part in parts]

    def gathered(self, blocks: Mapping[tuple[int, ...], NDArray[Any]]) -> NDArray[Any]:
        """Bring values of the rows into the order that these had before.

        Parameters
        ----------
        blocks : mapping of tuple of int to ndarray
            For partitions that were asked together, the values of their rows, as `positions` lists them. Together they
            have every partition once.
        """
        first = next(iter(blocks.values()))
        out = np.empty((self.order.size, *first.shape[1:]), first.dtype)
        for parts, block in blocks.items():
            out[self.order[self.positions(parts)]] = block
        return out


@dataclass(frozen=True)
class Summed:
    """The gradients of an update, one for each distinct row.

    Attributes
    ----------
    ids : ndarray of int64, shape (u,)
        Ascending.
    gradients : ndarray of float32, shape (u, dim)
    """

    ids: Int64Array
    gradients: Float32Array

    @staticmethod
    def of(grouped: plan.Grouped, gradients: Float32Array) -> Summed:
        """Add up the gradients of equal ids in the order of the batch, with the bits of a local update."""
        if grouped.rows.size == grouped.order.size:
            return Summed(grouped.rows, gradients.take(grouped.order, axis=0))
        if not gradients.flags.carray:  # for any other layout, the kernel would be compiled once more
            gradients = gradients.copy()
        out = np.empty((grouped.rows.size, gradients.shape[1]), np.float32)
        grouping.sum_groups(gradients, grouped.starts, grouped.order, out)
        return Summed(grouped.rows, out)
