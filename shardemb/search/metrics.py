"""How rows are compared with queries. Here a higher score is better; `Metric.shown` is what users see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np

from shardemb.search import kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array

MetricName: TypeAlias = Literal["cosine", "dot", "l2"]

SLACK = 32
"""More rows than asked for that are compared by their exact distance, because the product of matrices rounds."""


class Metric(Protocol):
    """How rows are compared with given queries.

    Attributes
    ----------
    name : str
    queries : ndarray of float32, shape (q, dim + 1)
        What rows as `fill` makes them are multiplied with.
    slack : int
        How many more rows than wanted have to be scored again, by `score`.
    """

    @property
    def name(self) -> MetricName:
        """What users call it."""

    @property
    def queries(self) -> Float32Array:
        """The queries, with a last column of ones."""

    @property
    def slack(self) -> int:
        """How many more are scored again."""

    def fill(self, rows: Float32Array, allowed: NDArray[np.bool_], out: Float32Array) -> None:
        """Make rows ready for a product, shape (at least the rows, dim + 1); see `kernels.unit_rows`."""

    def score(self, rows: Float32Array, places: Int64Array, first: int) -> Float32Array:
        """Score query ``first + i`` and the rows at ``places[i]`` exactly; minus infinity for places below 0."""

    def shown(self, scores: Float32Array) -> Float32Array:
        """Return scores as users see them."""


def with_ones(queries: Float32Array) -> Float32Array:
    """Return queries with a last column of ones, which takes part in the bias of rows."""
    return np.column_stack([queries, np.ones(len(queries), np.float32)])


class _ByProduct:
    """What metrics have in common whose score is a product."""

    queries: Float32Array
    slack = 0

    def fill(self, rows: Float32Array, allowed: NDArray[np.bool_], out: Float32Array) -> None:
        """See `Metric`."""
        kernels.plain_rows(rows, allowed, out)

    def score(self, rows: Float32Array, places: Int64Array, first: int) -> Float32Array:
        """See `Metric`."""
        ready = np.empty((len(rows), rows.shape[1] + 1), np.float32)
        self.fill(rows, np.ones(len(rows), np.bool_), ready)
        return _scored(kernels.dots, self.queries[first : first + len(places)], ready, places)

    def shown(self, scores: Float32Array) -> Float32Array:
        """See `Metric`."""
        return scores


@dataclass(frozen=True)
class Cosine(_ByProduct):
    """The cosine of the angle between a row and a query; -1 for a row of zeros."""

    queries: Float32Array
    name: MetricName = "cosine"

    @classmethod
    def of(cls, queries: Float32Array) -> Cosine:
        """Compare rows with queries, none of which is zeros."""
        ready = np.empty((len(queries), queries.shape[1] + 1), np.float32)
        kernels.unit_rows(queries, np.ones(len(queries), np.bool_), ready)
        ready[:, -1] = 1
        return cls(ready)

    def fill(self, rows: Float32Array, allowed: NDArray[np.bool_], out: Float32Array) -> None:
        """See `Metric`."""
        kernels.unit_rows(rows, allowed, out)


@dataclass(frozen=True)
class Dot(_ByProduct):
    """The product of a row and a query."""

    queries: Float32Array
    name: MetricName = "dot"

    @classmethod
    def of(cls, queries: Float32Array) -> Dot:
        """Compare rows with queries."""
        return cls(with_ones(queries))


@dataclass(frozen=True)
class L2:
    """The squared distance of a row and a query.

    In the product of matrices, ``q * x - x * x / 2`` stands for it. Of large numbers that differ little, nothing would
    be left, so the mean of the queries is subtracted from both. Of a few more rows than wanted, distances are computed.
    """

    given: Float32Array
    origin: Float32Array
    queries: Float32Array
    name: MetricName = "l2"
    slack: int = SLACK

    @classmethod
    def of(cls, queries: Float32Array) -> L2:
        """Compare rows with queries."""
        origin = queries.sum(axis=0, dtype=np.float64) / max(1, len(queries))
        origin = origin.astype(np.float32)
        return cls(queries, origin, with_ones(queries - origin))

    def fill(self, rows: Float32Array, allowed: NDArray[np.bool_], out: Float32Array) -> None:
        """See `Metric`."""
        kernels.shifted_rows(rows, allowed, out, self.origin)

    def score(self, rows: Float32Array, places: Int64Array, first: int) -> Float32Array:
        """See `Metric`."""
        return _scored(kernels.distances, self.given[first : first + len(places)], rows, places)

    def shown(self, scores: Float32Array) -> Float32Array:
        """See `Metric`."""
        return -scores + np.float32(0)  # no -0.0


def _scored(
    kernel: Callable[..., None], queries: Float32Array, rows: Float32Array, places: Int64Array
) -> Float32Array:
    out = np.full(places.shape, -np.inf, np.float32)
    kernel(queries, rows, places, out)
    return out


METRICS: dict[MetricName, Callable[[Float32Array], Metric]] = {
    "cosine": Cosine.of,
    "dot": Dot.of,
    "l2": L2.of,
}
