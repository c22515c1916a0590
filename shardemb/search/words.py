"""Search by key, with the names and the meaning that it has in gensim's ``KeyedVectors``.

A key stands for the direction of its row. Positions, such as `clip_start`, number the keys in the order of their rows.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from shardemb.base import validation
from shardemb.search.candidates import NOTHING, Candidates, Excluded, checked_queries, hold_values
from shardemb.search.exact import Asked, Best, Pass, find, ranked
from shardemb.search.metrics import Cosine, with_ones
from shardemb.vocabulary.key_rows import read_steadily

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.search.exact import Receiver
    from shardemb.search.metrics import MetricName
    from shardemb.vocabulary.keyed_rows import KeyedRows
    from shardemb.vocabulary.keys import KeysLike

T = TypeVar("T")

Words: TypeAlias = Any
"""A key or a vector, or a list of these, each also with a weight, ``(key, weight)``."""

NO_DIVISION_BY_ZERO = np.float32(1e-6)
"""What `most_similar_cosmul` adds to what it divides by, as Levy and Goldberg (2014) do."""

_log = logging.getLogger("shardemb")


class KeySearchResult(NamedTuple):
    """The keys that a search has found, best first; of equal rows, that with the smaller id first.

    Attributes
    ----------
    keys : ndarray of int64, or of str or bytes objects, shape (q, k)
        0 or None where there are fewer than k keys.
    scores : ndarray of float32, shape (q, k)
        As `SearchResult.scores`.
    ids : ndarray of int64, shape (q, k)
        The rows of the keys; -1 where there are fewer.
    """

    keys: NDArray[Any]
    scores: Float32Array
    ids: Int64Array


def search(
    keyed: KeyedRows,
    queries: ArrayLike,
    k: int,
    *,
    metric: MetricName,
    keys: KeysLike | None,
    exclude: Any,  # noqa: ANN401
) -> KeySearchResult:
    """Find the keys whose rows are nearest to queries; see `KeyedTable.search`."""
    asked = Asked.checked(keyed.table, queries, k, metric)

    def look() -> KeySearchResult:
        excluded = Excluded.checked(exclude, len(asked.queries), keyed.known)
        rows = every_key(keyed) if keys is None else Candidates.of(keyed.known(keys).reshape(-1))
        found = asked.shaped(find(keyed.table, asked.by, asked.k, written(keyed, rows), excluded))
        return KeySearchResult(_keys_of(keyed, found.ids), found.scores, found.ids)

    return read_steadily([keyed.keys], look)


def _keys_of(keyed: KeyedRows, ids: Int64Array) -> NDArray[Any]:
    """Return the keys of rows, 0 or None for -1."""
    known = ids >= 0
    found = keyed.keys.keys_of(ids[known])
    keys = np.zeros(ids.shape, found.dtype) if found.dtype != object else np.full(ids.shape, None)
    keys[known] = found
    return keys


# ---- rows ---------------------------------------------------------------------------------------------------------


def every_key(keyed: KeyedRows, start: int = 0, stop: int | None = None) -> Candidates:
    """Return the rows of the keys at positions ``start:stop``, among rows that may have no key."""
    entry = keyed.keys.entry
    first = entry.reserved
    if entry.head == entry.tail:  # no row was freed
        end = entry.rows if stop is None else min(first + stop, entry.rows)
        return Candidates(min(first + start, end), end)
    return Candidates.of(keyed.keys.live_rows(first, entry.rows)[start:stop])


def written(keyed: KeyedRows, candidates: Candidates) -> Candidates:
    """Return those of the candidates that have a key, and were ever written."""

    def live(ids: Int64Array) -> NDArray[np.bool_]:
        return hold_values(keyed.table.live(), ids) & keyed.keys.have_keys(ids)

    return replace(candidates, live=live)


# ---- what keys and vectors stand for ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terms:
    """Keys and vectors of a question, with weights.

    Attributes
    ----------
    vectors : ndarray of float64, shape (n, dim)
        Vectors as given, and the rows of keys divided by their lengths.
    weights : ndarray of float64, shape (n,)
    rows : ndarray of int64
        Those of the keys.
    """

    vectors: NDArray[np.float64]
    weights: NDArray[np.float64]
    rows: Int64Array

    @classmethod
    def of(cls, keyed: KeyedRows, given: Words, weight: float) -> Terms:
        """Look up what a caller gave, each with a weight if it has none of its own.

        Raises
        ------
        UnknownKeyError
            A key has no row.
        TypeError, ValueError
            A key or a vector of another type or shape.
        """
        items = [each if isinstance(each, tuple) else (each, weight) for each in _listed(given)]
        is_key = np.array([np.ndim(each) == 0 for each, _ in items], np.bool_)
        keys = [each for (each, _), one in zip(items, is_key, strict=True) if one]
        rows = keyed.known(keys) if keys else np.empty(0, np.int64)
        dim, name = keyed.table.spec.embedding_dim, keyed.table.name
        vectors = np.empty((len(items), dim))
        vectors[is_key] = unit_vectors(keyed, rows)
        for at in np.flatnonzero(~is_key).tolist():
            vectors[at] = checked_queries(items[at][0], dim, name, metric="dot")
        return cls(vectors, np.array([float(each) for _, each in items], np.float64), rows)

    def joined(self, other: Terms) -> Terms:
        """Return both."""
        return Terms(
            *(np.concatenate(each) for each in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def _listed(given: Words) -> list[Any]:
    if given is None:
        return []
    if isinstance(given, str | bytes | int | np.integer) or (
        isinstance(given, np.ndarray) and given.ndim == 1
    ):
        return [given]
    return list(given)


def unit_vectors(keyed: KeyedRows, rows: Int64Array) -> NDArray[np.float64]:
    """Look up rows, and divide each by its length, unless that is 0."""
    return _unit(keyed.table.read("weight", rows))


def _unit(vectors: NDArray[Any]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = vectors.astype(np.float64)
    lengths = np.linalg.norm(found, axis=-1, keepdims=True)
    return found / np.where(lengths == 0, 1, lengths)


# ---- gensim's questions ---------------------------------------------------------------------------------------------


def most_similar(
    keyed: KeyedRows, positive: Words, negative: Words, topn: int | None, clip: tuple[int, int | None]
) -> list[tuple[Any, float]] | Float32Array:
    """Find the keys nearest to a sum; see `KeyedTable.most_similar`."""

    def look() -> list[tuple[Any, float]] | Float32Array:
        terms = Terms.of(keyed, positive, 1.0).joined(Terms.of(keyed, negative, -1.0))
        metric = Cosine.of(_sum_of(keyed, terms))
        return _answer(keyed, metric, topn, clip, terms.rows)

    return _asked(keyed, topn, look)


def most_similar_cosmul(
    keyed: KeyedRows, positive: Words, negative: Words, topn: int | None, clip: tuple[int, int | None]
) -> list[tuple[Any, float]] | Float32Array:
    """Find the keys with the greatest product of similarities; see `KeyedTable.most_similar_cosmul`."""

    def look() -> list[tuple[Any, float]] | Float32Array:
        above, below = Terms.of(keyed, positive, 1.0), Terms.of(keyed, negative, 1.0)
        if not above.weights.size:
            msg = f"table {keyed.table.name!r}: most_similar_cosmul needs a positive key or vector"
            raise ValueError(msg)
        both = above.joined(below)
        metric = Cosine(with_ones(both.vectors.astype(np.float32)))
        return _answer(keyed, metric, topn, clip, both.rows, above.weights.size)

    return _asked(keyed, topn, look)


def _asked(keyed: KeyedRows, topn: int | None, look: Callable[[], T]) -> T | list[Any]:
    if topn is not None and validation.count(topn, "topn", minimum=-(2**31), maximum=2**31) < 1:
        return []
    return read_steadily([keyed.keys], look)


def _sum_of(keyed: KeyedRows, terms: Terms) -> Float32Array:
    if not terms.weights.size:
        msg = (
            f"table {keyed.table.name!r}: nothing to be similar to; pass positive or negative keys or vectors"
        )
        raise ValueError(msg)
    total = terms.weights @ terms.vectors
    if not total.any():
        msg = f"table {keyed.table.name!r}: the keys and vectors add up to zeros, which have no direction"
        raise ValueError(msg)
    return _unit(total[np.newaxis]).astype(np.float32)


def _answer(
    keyed: KeyedRows,
    metric: Cosine,
    topn: int | None,
    clip: tuple[int, int | None],
    inputs: Int64Array,
    factors: int | None = None,
) -> list[tuple[Any, float]] | Float32Array:
    """Return the best keys but the inputs, with their scores; without a `topn` the scores of all keys."""
    rows = every_key(keyed, *_checked_clip(clip))
    queries = len(metric.queries)
    if topn is None:
        every = Every(1 if factors else queries, _ids_of(keyed, rows))
        _run(keyed, metric, rows, [every if factors is None else Multiplied(every, factors, queries)])
        all_scores: Float32Array = every.scores[0]
        return all_scores
    rows, excluded = written(keyed, rows), Excluded(np.unique(inputs))
    if factors is None:
        found = find(keyed.table, metric, topn, rows, excluded)
    else:
        scan = Pass(keyed.table, metric, rows, excluded)
        best = [Best(1, min(topn, rows.count), NOTHING) for _ in range(scan.parts)]
        scan.run([Multiplied(each, factors, queries) for each in best])
        ids, scores = ([getattr(each, name) for each in best] for name in ("ids", "scores"))
        found = ranked(np.hstack(ids), np.hstack(scores), topn)
    some = found.ids[0] >= 0
    keys = keyed.keys.keys_of(found.ids[0][some]).tolist()
    return list(zip(keys, found.scores[0][some].tolist(), strict=True))


def _checked_clip(clip: tuple[int, int | None]) -> tuple[int, int | None]:
    start = validation.count(clip[0], "clip_start", minimum=0)
    return start, validation.count(clip[1], "clip_end or restrict_vocab", minimum=0) if clip[1] else None


def _ids_of(keyed: KeyedRows, candidates: Candidates) -> Int64Array:
    """List the rows with keys among candidates."""
    if candidates.chosen is not None:
        return candidates.chosen
    return keyed.keys.live_rows(candidates.start, candidates.stop)


def _run(keyed: KeyedRows, metric: Cosine, candidates: Candidates, receivers: Sequence[Receiver]) -> None:
    live = replace(candidates, live=keyed.keys.have_keys)
    Pass(keyed.table, metric, live).run(receivers)


class Every:
    """All scores, of the rows that this is called with (a `Receiver`), in the order of `rows`."""

    def __init__(self, queries: int, rows: Int64Array) -> None:
        self.scores = np.empty((queries, rows.size), np.float32)
        self._rows = rows

    def __call__(self, ids: Int64Array, scores: Float32Array, first: int) -> None:
        """See `Receiver`."""
        at = np.searchsorted(self._rows, ids)
        known = self._rows[np.minimum(at, self._rows.size - 1)] == ids
        self.scores[first : first + scores.shape[1], at[known]] = scores[: ids.size][known].T[
            : len(self.scores)
        ]


class Multiplied:
    """A `Receiver` that makes one score of the cosines of several queries, and hands that on.

    Each cosine is moved to between 0 and 1. The score is the product of the first `factors`, divided by that of the
    others.
    """

    def __init__(self, to: Receiver, factors: int, queries: int) -> None:
        self._to, self._factors, self._queries = to, factors, queries
        self._above = self._below = np.empty(0, np.float32)

    def __call__(self, ids: Int64Array, scores: Float32Array, first: int) -> None:
        """See `Receiver`."""
        some = (1 + scores[: ids.size].T) / 2
        if first == 0:
            self._above, self._below = np.ones((2, ids.size), np.float32)
        above = max(0, self._factors - first)
        last = self._queries - first  # more are there only to fill the product up
        self._above = self._above * some[:above].prod(axis=0)
        self._below = self._below * some[above:last].prod(axis=0)
        if len(some) >= last:
            product = self._above / (self._below + NO_DIVISION_BY_ZERO)
            product[np.isinf(some[0])] = -np.inf  # what is left out
            self._to(ids, product[:, np.newaxis].astype(np.float32), 0)


def cosines(keyed: KeyedRows, given: Any) -> tuple[Float32Array, Int64Array]:  # noqa: ANN401
    """Return the cosines of a key or a vector with the rows of all keys, and these rows."""
    (vector,) = Terms.of(keyed, [given], 1.0).vectors
    dim, name = keyed.table.spec.embedding_dim, keyed.table.name
    metric = Cosine.of(checked_queries(vector.astype(np.float32), dim, name, metric="cosine"))
    rows = every_key(keyed)
    every = Every(1, _ids_of(keyed, rows))
    _run(keyed, metric, rows, [every])
    return every.scores[0], _ids_of(keyed, rows)


def distances(keyed: KeyedRows, given: Any, others: KeysLike) -> Float32Array:  # noqa: ANN401
    """Return one minus the cosines with other keys, or with all; see `KeyedTable.distances`."""

    def look() -> Float32Array:
        if others is None or not len(others):
            return 1 - cosines(keyed, given)[0]
        (vector,) = Terms.of(keyed, [given], 1.0).vectors
        rows = unit_vectors(keyed, keyed.known(others).reshape(-1))
        found = np.where(rows.any(axis=1), rows @ _unit(vector), -1)
        return (1 - found).astype(np.float32)

    return read_steadily([keyed.keys], look)


def closer_than(keyed: KeyedRows, key: Any, other: Any) -> list[Any]:  # noqa: ANN401
    """List the keys that are closer to a key than another one is; see `KeyedTable.closer_than`."""

    def look() -> list[Any]:
        own, reference = keyed.known([key, other]).tolist()
        found, rows = cosines(keyed, key)
        closer = rows[found > found[np.searchsorted(rows, reference)]]
        keys: list[Any] = keyed.keys.keys_of(closer[closer != own]).tolist()
        return keys

    return read_steadily([keyed.keys], look)


def similarity(keyed: KeyedRows, some: Sequence[Any], others: Sequence[Any]) -> float:
    """Return the cosine of the means of two sets of keys; see `KeyedTable.n_similarity`."""
    if not len(some) or not len(others):
        msg = f"table {keyed.table.name!r}: n_similarity needs at least one key on each side"
        raise ValueError(msg)

    def look() -> float:
        one, other = (
            _unit(keyed.table.read("weight", keyed.known(each).reshape(-1)).mean(axis=0, dtype=np.float64))
            for each in (some, others)
        )
        return float(one @ other)

    return read_steadily([keyed.keys], look)


def doesnt_match(keyed: KeyedRows, given: Sequence[Any]) -> Any:  # noqa: ANN401
    """Return the key that is farthest from the mean of all; see `KeyedTable.doesnt_match`."""

    def look() -> Any:  # noqa: ANN401
        keys = list(given)
        rows = keyed.keys.lookup(keys).reshape(-1)
        if (rows < 0).any():
            unknown = [key for key, row in zip(keys, rows, strict=True) if row < 0]
            _log.warning("doesnt_match: these keys have no row, and are left out: %r", unknown)
        if not (rows >= 0).any():
            msg = f"table {keyed.table.name!r}: none of the keys of doesnt_match has a row"
            raise ValueError(msg)
        known = [key for key, row in zip(keys, rows, strict=True) if row >= 0]
        vectors = unit_vectors(keyed, rows[rows >= 0])
        scores = vectors @ _unit(vectors.mean(axis=0))
        return min(zip(scores.tolist(), known, strict=True))[1]

    return read_steadily([keyed.keys], look)
