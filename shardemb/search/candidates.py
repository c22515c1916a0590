"""Which rows a search looks at, in blocks whose limits depend on nothing but the table's shape."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import validation
from shardemb.base.arrays import as_array

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import ArrayLike, NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.engine.shards import Shards
    from shardemb.engine.table_state import TableState

_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Excluded:
    """Rows that are no answer: to any query, or to one.

    Attributes
    ----------
    ids : ndarray of int64
        Rows that are left out for all queries, ascending.
    pairs, queries : ndarray of int64, shape (n,)
        Ascending rows, and the query that each is left out for.
    """

    ids: Int64Array = field(default_factory=lambda: _NONE)
    pairs: Int64Array = field(default_factory=lambda: _NONE)
    queries: Int64Array = field(default_factory=lambda: _NONE)

    @classmethod
    def checked(cls, given: Any, num_queries: int, to_rows: Callable[[Any], Int64Array]) -> Excluded:  # noqa: ANN401
        """Check what a caller leaves out: rows for all queries, or a list of rows for each query.

        Raises
        ------
        ValueError
            Lists for another number of queries.
        """
        if given is None:
            return cls()
        if not _is_nested(given):
            return cls(np.unique(to_rows(given).reshape(-1)))
        if len(given) != num_queries:
            msg = f"exclude has {len(given)} lists for {num_queries} queries; pass one for each, or one flat list"
            raise ValueError(msg)
        return cls.by_query([to_rows(each).reshape(-1) if len(each) else _NONE for each in given])

    @classmethod
    def by_query(cls, lists: Iterable[Int64Array]) -> Excluded:
        """Leave rows out, which are given for each query."""
        parts = [(rows, np.full(rows.size, query)) for query, rows in enumerate(lists)]
        rows = np.concatenate([_NONE, *(each for each, _ in parts)])
        queries = np.concatenate([_NONE, *(each for _, each in parts)])
        order = np.argsort(rows, kind="stable")
        return cls(_NONE, rows[order], queries[order])

    def leave_out(self, scores: NDArray[np.float32], ids: Int64Array, first: int) -> None:
        """Set scores of ascending rows for queries from `first` on to minus infinity where a query leaves one out."""
        if not self.pairs.size or not ids.size:
            return
        some = slice(*np.searchsorted(self.pairs, [ids[0], ids[-1] + 1]).tolist())
        at, queries = np.searchsorted(ids, self.pairs[some]), self.queries[some] - first
        here = (ids[at] == self.pairs[some]) & (queries >= 0) & (queries < scores.shape[1])
        scores[at[here], queries[here]] = -np.inf

    def part(self, start: int, stop: int) -> Excluded:
        """Return the same for the queries ``start:stop``."""
        which = (self.queries >= start) & (self.queries < stop)
        return replace(self, pairs=self.pairs[which], queries=self.queries[which] - start)


NOTHING = Excluded()
"""No row is left out."""


def _is_nested(given: Any) -> bool:  # noqa: ANN401
    """Return whether there is a list for each query."""
    if isinstance(given, list | tuple):
        return bool(given) and not any(np.ndim(each) == 0 for each in given)
    return bool(np.ndim(given) > 1)


@dataclass(frozen=True)
class Candidates:
    """Rows to look at, and which of them may be an answer.

    Attributes
    ----------
    start, stop : int
        The rows from `start` up to `stop`, or
    chosen : ndarray of int64, or None
        some of them, ascending.
    live : callable, optional
        Returns for ascending rows which of them may be an answer.
    """

    start: int
    stop: int
    chosen: Int64Array | None = None
    live: Callable[[Int64Array], NDArray[np.bool_]] | None = None

    @classmethod
    def checked(cls, table: TableState, rows: Any) -> Candidates:  # noqa: ANN401
        """Check which rows a caller wants to search: a tuple (start, stop), ids, or None for all.

        Raises
        ------
        ValueError, TypeError, RowIdError
            No such range or rows.
        """
        count = table.live().spec.num_embeddings
        if rows is None:
            return cls(0, count)
        if not isinstance(rows, tuple):
            return cls.of(validation.row_ids(rows, count, table.name).flat)
        whole = len(rows) == 2 and all(hasattr(row, "__index__") for row in rows)
        if not whole or not 0 <= rows[0] <= rows[1] <= count:
            msg = (
                f"table {table.name!r}: rows must be a tuple (start, stop), 0 <= start <= stop <= {count}, "
                f"or an array or list of row ids, got {rows!r:.80}"
            )
            raise ValueError(msg)
        return cls(int(rows[0]), int(rows[1]))

    @classmethod
    def of(cls, ids: Int64Array) -> Candidates:
        """Look at some rows."""
        chosen = np.unique(ids)
        return cls(0, 0, chosen) if not chosen.size else cls(int(chosen[0]), int(chosen[-1]) + 1, chosen)

    @property
    def count(self) -> int:
        """The number of rows, whether they may be an answer or not."""
        return self.stop - self.start if self.chosen is None else self.chosen.size

    def blocks(self, size: int) -> range:
        """Return the numbers of the blocks of `size` rows: of all rows of a table, or of the chosen ones."""
        if self.chosen is not None:
            return range(-(-self.chosen.size // size))
        return range(self.start // size, -(-self.stop // size)) if self.count else range(0)

    def ids(self, block: int, size: int) -> Int64Array:
        """Return the rows of a block, ascending."""
        if self.chosen is not None:
            return self.chosen[block * size : (block + 1) * size]
        return np.arange(max(self.start, block * size), min(self.stop, (block + 1) * size))

    def allowed(self, ids: Int64Array, excluded: Excluded) -> NDArray[np.bool_]:
        """Return which of ascending rows may be an answer."""
        allowed = np.ones(ids.size, np.bool_) if self.live is None else self.live(ids)
        if excluded.ids.size:
            at = np.searchsorted(excluded.ids, ids)
            allowed &= excluded.ids[np.minimum(at, excluded.ids.size - 1)] != ids
        return allowed


def hold_values(shards: Shards, rows: Int64Array) -> NDArray[np.bool_]:
    """Return for each row whether it was ever written, in memory or in the files; see `Shards.were_written`."""
    # In this order: a row that a fold takes out of its slot in between has its bit by then.
    dirty = shards.overlay.are_dirty(rows)
    return dirty | shards.were_written(rows)


def checked_queries(queries: ArrayLike, dim: int, table: str, *, metric: str) -> NDArray[np.float32]:
    """Check queries, and bring them to float32.

    Parameters
    ----------
    queries : array_like of float, shape (q, dim), or (dim,)

    Returns
    -------
    ndarray of float32, shape (q, dim)
        May be the caller's own memory.

    Raises
    ------
    TypeError, ValueError
        Another dtype or shape; NaN or infinity; for cosines, a query of zeros.
    """
    array = as_array(queries, f"table {table!r}: queries")
    if array.dtype.kind in "iu":
        array = array.astype(np.float32)
    if array.ndim not in (1, 2) or array.shape[-1] != dim:
        msg = f"table {table!r}: queries must have shape (q, {dim}), or ({dim},) for one, got {array.shape}"
        raise ValueError(msg)
    form = "(q, embedding_dim)"
    found = validation.rows(array, array.shape, what="queries", table=table, check_finite=False, form=form)
    validation.require_finite(found, f"table {table!r}: queries", "; leave such a query out")
    zeros = np.flatnonzero(~found.any(axis=1)) if metric == "cosine" else _NONE
    if zeros.size:
        msg = (
            f"table {table!r}: query {int(zeros[0])} is all zeros, which have no direction; "
            f'leave it out, or compare by metric="dot" or "l2"'
        )
        raise ValueError(msg)
    return found
