"""Search by a comparison of the queries with every row, in one pass over the table.

The pass reads blocks of rows, a few MiB each, on several threads. Each block is multiplied with the queries a tile at a
time, so that its scores stay in the caches, and only what is better than the worst of the best so far is kept. Scores
have the same bits for any number of threads and shards, because blocks and tiles do not depend on these.

While a block is computed, the pages of the next one are requested. Those of a table that does not fit into memory are
released behind the pass.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from shardemb.base import validation
from shardemb.base.sizes import round_up
from shardemb.compute import scheduler
from shardemb.engine import batch
from shardemb.memory import memory_budget
from shardemb.search.candidates import NOTHING, Candidates, Excluded, checked_queries, hold_values
from shardemb.search.kernels import keep_best
from shardemb.search.metrics import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.engine.table_state import TableState
    from shardemb.search.metrics import Metric, MetricName

BLOCK_BYTES = 4 * 2**20
"""Bytes of the rows that are read at a time."""

TILE_BYTES = 2**20
"""Bytes of the rows that are made ready at a time, and have their scores in the caches."""

PRODUCT, MOST_QUERIES = 2**18, 64
"""Most multiplications of one product of matrices, and most queries in it, of at least `LEAST_QUERIES`.

OpenBLAS computes larger products on several threads, which wait for each other: while other processes work, each for
longer than the product takes. Small ones also need no copies of their operands, and run twice as fast.
"""

LANES, LEAST_QUERIES = 16, 4
"""What the number of rows in a product is a multiple of, and the fewest queries.

At its edges, a product may use other instructions, and equal rows would get unequal scores.
"""

KEPT_BYTES = 2**28
"""Most memory for the best rows so far, of which each part of a search keeps its own."""

SCORED_BYTES = 32 * 2**20
"""Bytes of rows that are looked up at a time to be scored again."""


class SearchResult(NamedTuple):
    """The rows that a search has found, best first; of equal ones, that with the smaller id first.

    Attributes
    ----------
    ids : ndarray of int64, shape (q, k)
        Row ids; -1 where there are fewer than k rows.
    scores : ndarray of float32, shape (q, k)
        Cosines or products, descending, and minus infinity where the id is -1; or squared distances, ascending, and
        infinity there.
    """

    ids: Int64Array
    scores: Float32Array


class Receiver(Protocol):
    """What is done with scores. It is called from one thread at a time, with ascending rows."""

    def __call__(self, ids: Int64Array, scores: Float32Array, first: int) -> None:
        """Take the scores of rows, the first ones of `scores`, each for the queries from `first` on."""


class Best:
    """The best rows so far, of the rows that this is called with (a `Receiver`).

    Parameters
    ----------
    queries, k : int
        Number of queries, and of rows that are kept for each.
    excluded : Excluded
    """

    def __init__(self, queries: int, k: int, excluded: Excluded) -> None:
        self.scores = np.full((queries, k), -np.inf, np.float32)
        self.ids = np.full((queries, k), -1, np.int64)
        self._excluded = excluded

    def __call__(self, ids: Int64Array, scores: Float32Array, first: int) -> None:
        """See `Receiver`."""
        self._excluded.leave_out(scores, ids, first)
        some = slice(first, first + scores.shape[1])
        keep_best(scores, ids, self.scores[some], self.ids[some])


def ranked(ids: Int64Array, scores: Float32Array, k: int) -> SearchResult:
    """Return the best k of each row of ids and scores, of which a higher one is better, padded if they are fewer."""
    order = np.lexsort((ids, -scores), axis=-1)[:, :k]
    ids, scores = np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)
    missing = (0, 0), (0, k - ids.shape[1])
    return SearchResult(
        np.pad(ids, missing, constant_values=-1), np.pad(scores, missing, constant_values=-np.inf)
    )


# ---- one pass -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One pass over the candidates, which scores all of them.

    Attributes
    ----------
    table : TableState
    metric : Metric
    candidates : Candidates
    excluded : Excluded
        What is left out for all queries; a `Receiver` leaves out the rest.
    """

    table: TableState
    metric: Metric
    candidates: Candidates
    excluded: Excluded = NOTHING

    @cached_property
    def groups(self) -> list[Float32Array]:
        """The queries as columns, as many at a time as are multiplied at a time."""
        queries = self.metric.queries
        missing = max(0, LEAST_QUERIES - len(queries))
        padded = np.pad(queries, ((0, missing), (0, 0)), constant_values=1)
        most = max(LEAST_QUERIES, min(MOST_QUERIES, PRODUCT // (LANES * queries.shape[1])))
        return [np.ascontiguousarray(each.T) for each in np.array_split(padded, -(-len(padded) // most))]

    @cached_property
    def lanes(self) -> int:
        """Rows that are multiplied at a time."""
        return max(1, PRODUCT // (self.groups[0].size * LANES)) * LANES

    @property
    def tile_rows(self) -> int:
        """Rows that are made ready at a time."""
        width: int = self.metric.queries.shape[1]
        return max(1, TILE_BYTES // (4 * width * self.lanes)) * self.lanes

    @property
    def block_rows(self) -> int:
        """Rows that are read at a time."""
        return self.tile_rows * max(1, BLOCK_BYTES // TILE_BYTES)

    @property
    def parts(self) -> int:
        """How many receivers can be at work at the same time."""
        blocks = len(self.candidates.blocks(self.block_rows))
        return max(1, min(blocks, self.table.runtime.threads))

    def run(self, receivers: Sequence[Receiver]) -> None:
        """Hand the scores to receivers, each of which gets a part of the blocks.

        Raises
        ------
        StaleReaderError, StoreClosedError, TableNotFoundError
            As lookups.
        """
        runtime, stop = self.table.runtime, threading.Event()
        runtime.check_fresh()
        tasks = [
            partial(self._run_part, receiver, part, len(receivers), stop)
            for part, receiver in enumerate(receivers)
        ]
        scheduler.run(tasks, runtime.threads, stop)
        runtime.check_fresh()

    def _run_part(self, receiver: Receiver, part: int, parts: int, stop: threading.Event) -> None:
        tile = np.empty((self.tile_rows, self.metric.queries.shape[1]), np.float32)
        memory = np.empty(self.tile_rows * self.groups[0].shape[1], np.float32)
        blocks = [*self.candidates.blocks(self.block_rows)[part::parts], None]
        with np.errstate(all="ignore"):  # products of large numbers, and what is left out
            for block, coming in pairwise(blocks):
                if stop.is_set():
                    return
                if coming is not None:
                    batch.request(self.table, self._ids(coming))
                self._score(self._ids(block), receiver, tile, memory)

    def _ids(self, block: int) -> Int64Array:
        ids = self.candidates.ids(block, self.block_rows)
        return ids[ids < self.table.live().spec.num_embeddings]  # another thread may make the table shorter

    def _score(self, ids: Int64Array, receiver: Receiver, tile: Float32Array, memory: Float32Array) -> None:
        """Hand the scores of a block to a receiver."""
        if not ids.size:
            return
        rows = self.table.read_here("weight", ids)
        allowed = self.candidates.allowed(ids, self.excluded)
        for start in range(0, ids.size, self.tile_rows):
            some = slice(start, start + self.tile_rows)
            ready = tile[: round_up(min(self.tile_rows, ids.size - start), self.lanes)]
            self.metric.fill(rows[some], allowed[some], ready)
            stacked, first = ready.reshape(-1, self.lanes, tile.shape[1]), 0
            for group in self.groups:
                count = group.shape[1]
                scores = memory[: len(ready) * count].reshape(-1, self.lanes, count)
                np.matmul(stacked, group, out=scores)
                receiver(ids[some], scores.reshape(len(ready), count), first)
                first += count
        if self._releases:
            self.table.live().release_pages(int(ids[0]), int(ids[-1]) + 1)

    @cached_property
    def _releases(self) -> bool:
        """Whether pages are released behind the pass, because the table does not fit into memory."""
        nbytes = self.candidates.count * self.table.live().spec.record_bytes
        return nbytes > memory_budget.available_bytes()


# ---- a search -----------------------------------------------------------------------------------------------------


def search(
    table: TableState,
    queries: ArrayLike,
    k: int,
    *,
    metric: MetricName,
    rows: tuple[int, int] | ArrayLike | None,
    exclude: Any,  # noqa: ANN401
) -> SearchResult:
    """Find the rows that are nearest to queries; see `Table.search`."""
    asked = Asked.checked(table, queries, k, metric)

    def to_rows(ids: ArrayLike) -> Int64Array:
        return validation.row_ids(ids, table.live().spec.num_embeddings, table.name).flat

    excluded = Excluded.checked(exclude, len(asked.queries), to_rows)
    return asked.shaped(find(table, asked.by, asked.k, written(table, rows), excluded))


@dataclass(frozen=True)
class Asked:
    """What a caller wants to know, checked: queries, how many rows, by which metric."""

    queries: Float32Array
    k: int
    metric: MetricName
    is_one: bool

    @classmethod
    def checked(cls, table: TableState, queries: ArrayLike, k: int, metric: MetricName) -> Asked:
        """Check queries.

        Raises
        ------
        TypeError, ValueError
            They are no vectors as the table has them, or its rows are no vectors; no such metric.
        """
        spec, name = table.live().spec, table.name
        if spec.precision.is_raw:
            msg = f"table {name!r} holds raw bytes, which cannot be compared: look up its rows with lookup()"
            raise ValueError(msg)
        metric = validation.choice(metric, tuple(METRICS), "metric", name)
        found = checked_queries(queries, spec.embedding_dim, name, metric=metric)
        k = validation.count(k, f"table {name!r}: k", maximum=2**31 - 1)
        return cls(found, k, metric, np.ndim(queries) == 1)

    @property
    def by(self) -> Metric:
        """What compares rows with the queries."""
        return METRICS[self.metric](self.queries)

    def shaped(self, found: SearchResult) -> SearchResult:
        """Return what was found in the shape of the queries."""
        return SearchResult(found.ids[0], found.scores[0]) if self.is_one else found


def written(table: TableState, rows: Any) -> Candidates:  # noqa: ANN401
    """Return those of a caller's rows that were ever written."""
    return replace(Candidates.checked(table, rows), live=lambda ids: hold_values(table.live(), ids))


def find(
    table: TableState, metric: Metric, k: int, candidates: Candidates, excluded: Excluded
) -> SearchResult:
    """Find the k candidates with the best scores."""
    kept = min(k + metric.slack, candidates.count)
    scan = Pass(table, metric, candidates, excluded)
    most = max(1, KEPT_BYTES // (12 * max(1, kept * len(metric.queries))))
    best = [Best(len(metric.queries), kept, excluded) for _ in range(min(scan.parts, most))]
    if len(metric.queries):
        scan.run(best)
    found = ranked(np.hstack([each.ids for each in best]), np.hstack([each.scores for each in best]), kept)
    if metric.slack:
        found = score_again(table, metric, found.ids)
    return shown(metric, found, k)


def shown(metric: Metric, found: SearchResult, k: int) -> SearchResult:
    """Return k of the rows that were found, with scores as users see them."""
    found = ranked(found.ids, found.scores, k)
    return SearchResult(found.ids, metric.shown(found.scores))


def score_again(table: TableState, metric: Metric, ids: Int64Array) -> SearchResult:
    """Look up rows that were found for each query, each of them once, and score them exactly; -1 is no row."""
    scores = np.full(ids.shape, -np.inf, np.float32)
    width = max(1, ids.shape[1] * table.live().spec.embedding_dim)
    step = max(1, SCORED_BYTES // (4 * width))
    for start in range(0, len(ids), step):
        some = ids[start : start + step]
        rows, _, places = table.read_unique(np.maximum(some, 0))
        scores[start : start + step] = metric.score(rows, np.where(some < 0, -1, places), start)
    return SearchResult(ids, scores)
