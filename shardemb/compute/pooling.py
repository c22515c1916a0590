"""The hot loops over bags of rows: their sums and maxima, and the gradients of these.

A *bag* is a range of a batch's positions, ``bounds[bag]:bounds[bag + 1]``, whose rows become one row of the result. A
kernel works on any range of positions, also one that begins or ends within a bag: the sum so far is in the result
then. So a bag is summed in the order of its positions, whatever the pieces of the batch are, which decides the bits.

`locate` finds the places of rows, and says so where some of them are not in any record. `add` and `maximise` take rows
from places, in the records of a table or in a scratch of a few rows that were copied or drawn before.

Rows are prefetched across the ends of bags, and as many columns of a sum as possible stay in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.compute.compiler import kernel
from shardemb.compute.intrinsics import add_rows, max_rows, prefetch
from shardemb.compute.row_index import places_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array

_AHEAD = 12
"""How many rows ahead to prefetch."""

WIDE, NARROW = 64, 16
"""Columns that are added up at a time; those that are left over at the end of a row one by one."""


# ---- bags -----------------------------------------------------------------------------------------------------


@kernel
def locate(
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    slots: int,
    present: NDArray[np.uint8],
    ids: Int64Array,
    start: int,
    stop: int,
) -> Int64Array:
    """Return the places of ``ids[start:stop]``; none at all if the record of one is spilled or was never written.

    For each row the place is found before its bit is read, because a row in a slot exists whatever the bit says.
    """
    places = places_of(directory, branches, leaves, slots, ids, start, stop)
    lost = False
    for i in range(places.size):
        if present.size:
            row, ahead = ids[start + i], ids[min(start + i + 2 * _AHEAD, stop - 1)]
            prefetch(present.ctypes.data + (ahead >> 3))
            lost |= places[i] == row and not (present[row >> 3] >> (row & 7)) & 1
        lost |= places[i] < 0
    return np.empty(0, np.int64) if lost else places


@kernel
def divisors(weights: Float32Array, bounds: Int64Array, squared: bool) -> Float32Array:
    """Return the sum of each bag's weights, or the root of the sum of their squares; without weights, all are 1."""
    found = np.empty(bounds.size - 1, np.float32)
    for bag in range(found.size):
        total = 0.0
        if not weights.size:
            total += bounds[bag + 1] - bounds[bag]
        else:
            for i in range(bounds[bag], bounds[bag + 1]):
                weight = np.float64(weights[i])
                total += weight * weight if squared else weight
        found[bag] = np.sqrt(total) if squared else total
    return found


@kernel
def _add_some(
    records: Float32Array,
    places: Int64Array,
    weights: Float32Array,
    total: Float32Array,
    first: int,
    last: int,
    start: int,
) -> None:
    """Add the rows at ``places[first:last]`` to `total`; `start` is the position of the first of all places."""
    dim, record_bytes, source, here = (
        total.size,
        4 * records.shape[1],
        records.ctypes.data,
        places.ctypes.data,
    )
    count, known, here, column = last - first, places.size - first, here + 8 * first, 0
    factors = weights.ctypes.data + 4 * (start + first)
    while column + NARROW <= dim:
        target, row = total.ctypes.data + 4 * column, source + 4 * column
        if column + WIDE <= dim:
            if weights.size:
                add_rows(WIDE, target, row, here, record_bytes, count, known, factors)
            else:
                add_rows(WIDE, target, row, here, record_bytes, count, known, 0)
            column += WIDE
        else:
            if weights.size:
                add_rows(NARROW, target, row, here, record_bytes, count, known, factors)
            else:
                add_rows(NARROW, target, row, here, record_bytes, count, known, 0)
            column += NARROW
    if column < dim:
        for k in range(first, last):
            prefetch(source + places[min(k + _AHEAD, places.size - 1)] * record_bytes + 4 * column)
            weight = weights[start + k] if weights.size else np.float32(1)
            for j in range(column, dim):
                total[j] += weight * records[places[k], j]


@kernel
def add(
    records: Float32Array,
    places: Int64Array,
    weights: Float32Array,
    bounds: Int64Array,
    divisors: Float32Array,
    out: Float32Array,
    bag: int,
    start: int,
) -> None:
    """Add the rows at `places`, which belong to the positions from `start` on, to the sums of their bags.

    `bag` is that of the first position, or an empty one before it. Rows are multiplied by `weights`, and complete sums
    divided by `divisors`, if there are any; a sum that would be divided by 0 becomes 0.
    """
    dim, i = out.shape[1], 0
    while i < places.size:
        while bounds[bag + 1] <= start + i:  # an empty one, or the one before
            bag += 1
        total, end = out[bag], min(bounds[bag + 1] - start, places.size)
        if start + i == bounds[bag]:
            for j in range(dim):
                total[j] = 0
        _add_some(records, places, weights, total, i, end, start)
        if divisors.size and start + end == bounds[bag + 1]:
            divisor = divisors[bag]
            for j in range(dim):
                total[j] = total[j] / divisor if divisor != 0 else np.float32(0)
        i = end


@kernel
def _max_some(
    records: Float32Array,
    places: Int64Array,
    greatest: Float32Array,
    winner: NDArray[np.int32],
    first: int,
    last: int,
    within: int,
) -> None:
    """Take the rows at ``places[first:last]`` into the maxima; `within` is the position in its bag of the first one."""
    dim, record_bytes, source, here = (
        greatest.size,
        4 * records.shape[1],
        records.ctypes.data,
        places.ctypes.data,
    )
    count, known, here, column = last - first, places.size - first, here + 8 * first, 0
    while column + NARROW <= dim:
        target, row, wins = (
            greatest.ctypes.data + 4 * column,
            source + 4 * column,
            winner.ctypes.data + 4 * column,
        )
        if column + WIDE <= dim:
            if winner.size:
                max_rows(WIDE, target, row, here, record_bytes, count, known, wins, within)
            else:
                max_rows(WIDE, target, row, here, record_bytes, count, known, 0, within)
            column += WIDE
        else:
            if winner.size:
                max_rows(NARROW, target, row, here, record_bytes, count, known, wins, within)
            else:
                max_rows(NARROW, target, row, here, record_bytes, count, known, 0, within)
            column += NARROW
    for k in range(first, last if column < dim else first):
        prefetch(source + places[min(k + _AHEAD, places.size - 1)] * record_bytes + 4 * column)
        for j in range(column, dim):
            value = records[places[k], j]
            if value > greatest[j]:
                greatest[j] = value
                if winner.size:
                    winner[j] = within + k - first


@kernel
def maximise(
    records: Float32Array,
    places: Int64Array,
    bounds: Int64Array,
    out: Float32Array,
    winners: NDArray[np.int32],
    bag: int,
    start: int,
) -> None:
    """Take the rows at `places` into the maxima of their bags, as `add` does for sums; the first maximum wins.

    If `winners` has rows, ``winners[bag, j]`` becomes the position in its bag that value ``j`` comes from.
    """
    i = 0
    while i < places.size:
        while bounds[bag + 1] <= start + i:
            bag += 1
        greatest, end, within = out[bag], min(bounds[bag + 1] - start, places.size), start + i - bounds[bag]
        winner = winners[bag] if winners.size else winners.reshape(-1)
        if within == 0:
            for j in range(greatest.size):
                greatest[j] = records[places[i], j]
            for j in range(winner.size):
                winner[j] = 0
        _max_some(records, places, greatest, winner, i, end, within)
        i = end


# ---- their gradients ------------------------------------------------------------------------------------------


@kernel
def list_won(
    winners: NDArray[np.int32], bounds: Int64Array, begins: Int64Array, columns: NDArray[np.int32]
) -> None:
    """List which values of the maxima come from each position: ``columns[begins[i]:begins[i + 1]]``, ascending.

    `begins` has two numbers more than there are positions and is zeros; `columns` has room for all values of `winners`.
    """
    for bag in range(winners.shape[0]):
        for j in range(winners.shape[1] if bounds[bag] < bounds[bag + 1] else 0):
            begins[bounds[bag] + winners[bag, j] + 2] += 1
    for i in range(2, begins.size):  # now ``begins[i + 1]`` is where those of position ``i`` begin
        begins[i] += begins[i - 1]
    for bag in range(winners.shape[0]):
        for j in range(winners.shape[1] if bounds[bag] < bounds[bag + 1] else 0):
            after = bounds[bag] + winners[bag, j] + 1
            columns[begins[after]] = j
            begins[after] += 1


@kernel
def sum_won(
    gradients: Float32Array,
    bags: Int64Array,
    coefficients: Float32Array,
    begins: Int64Array,
    columns: NDArray[np.int32],
    starts: Int64Array,
    order: Int64Array,
    out: Float32Array,
    start: int,
    stop: int,
) -> None:
    """Set ``out[u - start]`` to the gradient by each of the distinct rows ``start:stop`` of a batch, of maxima.

    A row gets, for each of its positions in the order of the batch, the gradients of the values that it has won there
    (`list_won`), multiplied by the position's coefficient if there are any.
    """
    for u in range(start, stop):
        total = out[u - start]
        for j in range(total.size):
            total[j] = 0
        for k in range(starts[u], starts[u + 1]):
            position = order[k]
            coefficient = coefficients[position] if coefficients.size else np.float32(1)
            for i in range(begins[position], begins[position + 1]):
                total[columns[i]] += coefficient * gradients[bags[position], columns[i]]


@kernel
def dot(
    records: Float32Array,
    places: Int64Array,
    bags: Int64Array,
    gradients: Float32Array,
    out: Float32Array,
    start: int,
) -> None:
    """Set ``out[i]`` to the product of a row with its bag's gradient, for the positions from `start` on.

    Each product is summed in eight interleaved parts, which are added pairwise: one sum would wait for itself.
    """
    dim, last = gradients.shape[1], places.size - 1
    base, record_bytes = records.ctypes.data, 4 * records.shape[1]
    parts = np.empty(8, np.float32)
    for i in range(places.size):
        ahead = base + places[min(i + _AHEAD, last)] * record_bytes
        for line in range(0, min(4 * dim, 512), 64):
            prefetch(ahead + line)
        row, gradient = records[places[i]], gradients[bags[start + i]]
        parts[:] = 0
        for j in range(0, dim - dim % 8, 8):
            for part in range(8):
                parts[part] += row[j + part] * gradient[j + part]
        for j in range(dim - dim % 8, dim):
            parts[j % 8] += row[j] * gradient[j]
        total = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + (
            (parts[4] + parts[5]) + (parts[6] + parts[7])
        )
        out[start + i] = total


@kernel
def weigh(
    products: Float32Array, weights: Float32Array, bounds: Int64Array, divisors: Float32Array, squared: bool
) -> None:
    """Make of the products of rows with their bag's gradient the gradients of the weights, in place.

    With the weights ``w``, the products ``p`` and the divisor ``d``, the gradient of weight ``k`` is
    ``(p[k] - sum(w * p) / d) / d`` for a mean, whose divisor is ``sum(w)``, and
    ``(p[k] - sum(w * p) / d * w[k] / d) / d`` where the divisor is the root of the sum of squares; 0 if it is 0.
    """
    for bag in range(bounds.size - 1):
        first, last, divisor = bounds[bag], bounds[bag + 1], np.float64(divisors[bag])
        pooled = 0.0
        for i in range(first, last):
            pooled += np.float64(weights[i]) * np.float64(products[i])
        pooled = pooled / divisor if divisor != 0 else 0.0
        for i in range(first, last):
            share = np.float64(weights[i]) / divisor if squared else 1.0
            products[i] = (np.float64(products[i]) - pooled * share) / divisor if divisor != 0 else 0.0
