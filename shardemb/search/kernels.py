"""The hot loops of a search: rows made ready for a product with queries, the best scores kept, pairs scored again.

A product of matrices gives the scores of many rows and queries. What else a score needs is one more column: each row
has a number in it, its *bias*, and each query a one. A bias of minus infinity leaves a row out.

Sums are made in an order that depends on nothing but the number of columns. So equal rows have equal scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.compute.compiler import inlined, kernel
from shardemb.compute.intrinsics import sum_of_eights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array

_LEFT_OUT = np.float32(-np.inf)

_SMALLEST = 1e-38
"""The smallest length of a row that has a direction: float32 can still hold the inverse."""

# ---- rows ready for a product -----------------------------------------------------------------------------------


@inlined
def _square_sum(address: int, row: Float32Array) -> float:
    """Sum the squares of a row, which is at an address: eight at a time in float32, unless they are large or small.

    The double precision of the others takes eight times as long.
    """
    eights = row.size // 8
    total = np.float64(sum_of_eights(address, eights))
    for j in range(8 * eights, row.size):
        total += np.float64(row[j]) * np.float64(row[j])
    if not 1e-30 < total < 1e30:
        total = np.float64(0)
        for j in range(row.size):
            total += np.float64(row[j]) * np.float64(row[j])
    return total


@inlined
def _leave_out(out: Float32Array, i: int) -> None:
    """Let row `i` have no score that counts."""
    out[i, :] = np.float32(0)
    out[i, -1] = _LEFT_OUT


@kernel
def unit_rows(rows: Float32Array, allowed: NDArray[np.bool_], out: Float32Array) -> None:
    """Set ``out[i]`` to row `i` divided by its length, and a bias of 0; rows of `out` past the last one are left out.

    A row of zeros stays that, with a bias of -1, which is its cosine. Rows with NaN or infinity are left out.
    """
    dim, source = rows.shape[1], rows.ctypes.data
    for i in range(out.shape[0]):
        length = np.inf
        if i < rows.shape[0] and allowed[i]:
            length = np.sqrt(_square_sum(source + 4 * dim * i, rows[i]))
        if not length < np.inf:
            _leave_out(out, i)
        elif length < _SMALLEST:
            out[i, :] = np.float32(0)
            out[i, dim] = np.float32(-1)
        else:
            inverse = np.float32(1 / length)
            for j in range(dim):
                out[i, j] = rows[i, j] * inverse
            out[i, dim] = np.float32(0)


@kernel
def plain_rows(rows: Float32Array, allowed: NDArray[np.bool_], out: Float32Array) -> None:
    """Do what `unit_rows` does, but leave rows as they are."""
    dim, source = rows.shape[1], rows.ctypes.data
    for i in range(out.shape[0]):
        if not (i < rows.shape[0] and allowed[i] and _square_sum(source + 4 * dim * i, rows[i]) < np.inf):
            _leave_out(out, i)
            continue
        for j in range(dim):
            out[i, j] = rows[i, j]
        out[i, dim] = np.float32(0)


@kernel
def shifted_rows(
    rows: Float32Array, allowed: NDArray[np.bool_], out: Float32Array, origin: Float32Array
) -> None:
    """Do what `unit_rows` does, but subtract `origin`, and let the bias be half of the negative squared length."""
    dim, target = rows.shape[1], out.ctypes.data
    for i in range(out.shape[0]):
        if not (i < rows.shape[0] and allowed[i]):
            _leave_out(out, i)
            continue
        for j in range(dim):
            out[i, j] = rows[i, j] - origin[j]
        squares = _square_sum(target + 4 * (dim + 1) * i, out[i, :dim])
        if squares < 1e38:
            out[i, dim] = np.float32(-0.5 * squares)
        else:
            _leave_out(out, i)


# ---- the best -----------------------------------------------------------------------------------------------------


@inlined
def _is_worse(score: float, row: int, other: float, other_row: int) -> bool:
    return score < other or (score == other and row > other_row)


@inlined
def _replace_worst(scores: Float32Array, rows: Int64Array, score: float, row: int) -> None:
    """Replace the first entry of a heap, which is its worst, and restore the order."""
    at, child = 0, 1
    while child < scores.size:
        if child + 1 < scores.size and _is_worse(
            scores[child + 1], rows[child + 1], scores[child], rows[child]
        ):
            child += 1
        if not _is_worse(scores[child], rows[child], score, row):
            break
        scores[at], rows[at] = scores[child], rows[child]
        at, child = child, 2 * child + 1
    scores[at], rows[at] = score, row


@kernel
def keep_best(scores: Float32Array, ids: Int64Array, best: Float32Array, best_ids: Int64Array) -> None:
    """Keep the best of the scores so far: those of query `j` in the heap ``best[j]``, worst first.

    ``scores[i, j]`` is the score of row ``ids[i]`` for query `j`. Rows ascend, from call to call too, so that a row
    never takes the place of an equal one. NaN is left out. For most rows, no score is better than the worst kept.
    """
    worst = best[:, 0].copy()
    for i in range(ids.size):
        row, better = scores[i], 0
        for j in range(worst.size):
            better += row[j] > worst[j]
        if better == 0:
            continue
        for j in range(worst.size):
            if row[j] > worst[j]:
                _replace_worst(best[j], best_ids[j], row[j], ids[i])
                worst[j] = best[j, 0]


# ---- pairs --------------------------------------------------------------------------------------------------------


@kernel
def dots(queries: Float32Array, rows: Float32Array, places: Int64Array, out: Float32Array) -> None:
    """Set ``out[i, j]`` to the product of query `i` and row ``places[i, j]``; places below 0 are passed over."""
    for i in range(places.shape[0]):
        for j in range(places.shape[1]):
            if places[i, j] < 0:
                continue
            query, row, a, b = queries[i], rows[places[i, j]], 0.0, 0.0
            half = row.size // 2
            for k in range(half):  # two sums, because each addition waits for the one before
                a += np.float64(query[k]) * np.float64(row[k])
                b += np.float64(query[half + k]) * np.float64(row[half + k])
            for k in range(2 * half, row.size):
                a += np.float64(query[k]) * np.float64(row[k])
            out[i, j] = np.float32(a + b)


@kernel
def distances(queries: Float32Array, rows: Float32Array, places: Int64Array, out: Float32Array) -> None:
    """Set ``out[i, j]`` to minus the squared distance of query `i` and row ``places[i, j]``; see `dots`."""
    for i in range(places.shape[0]):
        for j in range(places.shape[1]):
            if places[i, j] < 0:
                continue
            row, total = rows[places[i, j]], 0.0
            for k in range(row.size):
                difference = np.float64(queries[i, k]) - np.float64(row[k])
                total += difference * difference
            out[i, j] = np.float32(-total)
