"""A graph of codes, one byte a number, that finds rows which are probably near: usearch's HNSW.

All comparisons become distances of vectors of bytes. Rows are compared by cosine as vectors of length 1. Products
become distances with one more number, by which all rows get the same length (Bachrach et al., 2014).
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.search.metrics import MetricName

LARGEST = 127
"""The largest number of a code."""

CLIPPED = 1e-3
"""The share of numbers that are too large for their code, so that the others have finer ones."""


@dataclass(frozen=True)
class Encoder:
    """From rows to codes.

    Attributes
    ----------
    metric : str
    origin : tuple of float
        Subtracted from rows that are compared by their distance.
    scale : float
        What numbers are multiplied with.
    longest : float
        The length that all rows get that are compared by products.
    """

    metric: MetricName
    origin: tuple[float, ...]
    scale: float
    longest: float

    @classmethod
    def of(cls, sample: Float32Array, metric: MetricName) -> Encoder:
        """Choose the scale by a sample of rows."""
        if not len(sample):
            sample = np.zeros((1, sample.shape[1]), np.float32)
        origin = sample.mean(axis=0, dtype=np.float64) if metric == "l2" else np.zeros(sample.shape[1])
        longest = float(np.linalg.norm(sample, axis=1).max(initial=1e-30))
        first = cls(metric, tuple(origin.tolist()), 1.0, longest)
        numbers = np.abs(first.comparable(sample))
        largest = float(np.quantile(numbers, 1 - CLIPPED)) if numbers.size else 1.0
        return cls(metric, first.origin, LARGEST / max(largest, 1e-30), longest)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Encoder:
        """Make one of what `to_json` returned."""
        return cls(**{**document, "origin": tuple(document["origin"])})

    def to_json(self) -> dict[str, Any]:
        """Return the attributes."""
        return asdict(self)

    @property
    def dim(self) -> int:
        """The length of codes."""
        return len(self.origin) + (self.metric == "dot")

    def comparable(self, rows: Float32Array) -> NDArray[np.float64]:
        """Return vectors whose distances are in the order of the metric."""
        found: NDArray[np.float64] = rows.astype(np.float64)
        if self.metric == "cosine":
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-38)
            return found
        if self.metric == "l2":
            return found - self.origin
        rest = self.longest**2 - (found**2).sum(axis=1, keepdims=True)
        return np.hstack([found, np.sqrt(np.maximum(rest, 0))])

    def rows(self, rows: Float32Array) -> NDArray[np.int8]:
        """Encode rows."""
        return self._rounded(self.comparable(rows))

    def queries(self, queries: Float32Array) -> NDArray[np.int8]:
        """Encode queries."""
        if self.metric != "dot":
            return self.rows(queries)
        lengths = np.maximum(np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True), 1e-38)
        return self._rounded(np.pad(queries / lengths * self.longest, ((0, 0), (0, 1))))

    def _rounded(self, vectors: NDArray[np.float64]) -> NDArray[np.int8]:
        codes: NDArray[np.int8] = np.clip(np.rint(vectors * self.scale), -LARGEST, LARGEST).astype(np.int8)
        return codes


def require_usearch() -> Any:  # noqa: ANN401
    """Return the module.

    Raises
    ------
    ModuleNotFoundError
        It is not installed.
    """
    try:
        import usearch.index
    except ModuleNotFoundError as error:
        msg = "an index of neighbours needs usearch: pip install 'shardemb[ann]'"
        raise ModuleNotFoundError(msg, name="usearch") from error
    return usearch.index


class Graph:
    """Codes of rows, each linked to near ones.

    Parameters
    ----------
    inner : usearch.index.Index
    """

    def __init__(self, inner: Any) -> None:  # noqa: ANN401
        self._inner = inner
        self._lock = (
            threading.Lock()
        )  # searches use scratch memory of the graph, one part for each of their threads

    @classmethod
    def empty(cls, dim: int, links: int, effort: int) -> Graph:
        """Make a graph in memory: so many links a row, of as many candidates as `effort`."""
        usearch = require_usearch()
        inner = usearch.Index(
            ndim=dim, metric="l2sq", dtype="i8", connectivity=links, expansion_add=effort, multi=False
        )
        return cls(inner)

    @classmethod
    def view(cls, path: Path) -> Graph:
        """Map a graph from the beginning of a file; its pages are read as searches need them.

        Raises
        ------
        FormatError
            It is none.
        """
        try:
            inner = require_usearch().Index.restore(str(path), view=True)
        except (RuntimeError, ValueError) as error:
            msg = f"{path} does not hold a graph that this usearch can read ({error}); build the index again"
            raise FormatError(msg) from error
        if inner is None:
            msg = f"{path} does not hold a graph that this usearch can read; build the index again"
            raise FormatError(msg)
        return cls(inner)

    def __len__(self) -> int:
        return len(self._inner)

    def add(self, ids: Int64Array, codes: NDArray[np.int8], threads: int) -> None:
        """Add codes of rows."""
        if ids.size:
            self._inner.add(ids.astype(np.uint64), codes, threads=threads)

    def write_to(self, path: Path) -> None:
        """Write the graph to a file."""
        self._inner.save(str(path))

    def search(self, codes: NDArray[np.int8], count: int, threads: int) -> Int64Array:
        """Find so many rows that are probably nearest to codes, shape (q, count); -1 where there are fewer."""
        count = min(count, len(self))
        if not count or not len(codes):
            return np.empty((len(codes), 0), np.int64)
        with self._lock:
            found = self._inner.search(codes, count, threads=threads)
        if len(codes) == 1:
            keys = np.asarray(found.keys).reshape(1, -1).astype(np.int64)
            return np.pad(keys, ((0, 0), (0, count - keys.size)), constant_values=-1)
        ids: Int64Array = found.keys.astype(np.int64)
        ids[np.arange(count) >= np.asarray(found.counts)[:, np.newaxis]] = -1
        return ids
