"""The hot loops over bags of rows: their sums and maxima, and the gradients of these.

A *bag* is a range of a batch's positions, ``bounds[bag]:bounds[bag + 1]``, whose rows become one row of the result. A
kernel works on any range of positions, also one that begins or ends within a bag: the sum so far is in the result
then. So a bag is summed in the order of its positions, whatever the pieces of the batch are, which decides the bits.

`locate` finds the places of rows, and says so where some of them are not in any record. `add` and `maximise` take rows
from places, in the records of a table or in a scratch of a few rows that were copied or drawn before.

Rows are prefetched across the ends of bags. The loops over the values of a row are as plain as LLVM needs to vectorise
them; a row of a thousand bytes stays in the first-level cache as the sum of its bag, where adding to it costs nothing
beside the cache misses of the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.compute.compiler import inlined, kernel
from shardemb.compute.intrinsics import prefetch
from shardemb.compute.row_index import places_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array

_AHEAD = 12
"""How many rows ahead to prefetch: one takes less time here than in a gather, as it is not written anywhere."""

_CACHE_LINE, _PREFETCHED_BYTES = 64, 512
"""How much of a row is prefetched; for the rest, the processor recognises the sequential access."""


@inlined
def _prefetch_row(address: int, nbytes: int) -> None:
    """Prefetch the first bytes of a row, a cache line at a time."""
    for line in range(0, min(nbytes, _PREFETCHED_BYTES), _CACHE_LINE):
        prefetch(address + line)


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
        total = np.float64(bounds[bag + 1] - bounds[bag])
        if weights.size:
            total = 0.0
            for i in range(bounds[bag], bounds[bag + 1]):
                weight = np.float64(weights[i])
                total += weight * weight if squared else weight
        found[bag] = np.sqrt(total) if squared else total
    return found


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
    dim, stop, last = out.shape[1], start + places.size, places.size - 1
    base, record_bytes = records.ctypes.data, 4 * records.shape[1]
    i = start
    while i < stop:
        while bounds[bag + 1] <= i:  # an empty one, or the one before
            bag += 1
        total, end = out[bag], min(bounds[bag + 1], stop)
        if i == bounds[bag]:
            for j in range(dim):
                total[j] = 0
        for k in range(i, end):
            _prefetch_row(base + places[min(k - start + _AHEAD, last)] * record_bytes, 4 * dim)
            row = records[places[k - start]]
            if weights.size:
                weight = weights[k]
                for j in range(dim):
                    total[j] += weight * row[j]
            else:
                for j in range(dim):
                    total[j] += row[j]
        if divisors.size and end == bounds[bag + 1]:
            divisor = divisors[bag]
            for j in range(dim):
                total[j] = total[j] / divisor if divisor != 0 else np.float32(0)
        i = end


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
    dim, stop, last = out.shape[1], start + places.size, places.size - 1
    base, record_bytes = records.ctypes.data, 4 * records.shape[1]
    i = start
    while i < stop:
        while bounds[bag + 1] <= i:
            bag += 1
        greatest, end = out[bag], min(bounds[bag + 1], stop)
        for k in range(i, end):
            _prefetch_row(base + places[min(k - start + _AHEAD, last)] * record_bytes, 4 * dim)
            row, within = records[places[k - start]], np.int32(k - bounds[bag])
            if winners.size:
                winner = winners[bag]
                for j in range(dim):
                    wins = within == 0 or row[j] > greatest[j]
                    greatest[j] = row[j] if wins else greatest[j]
                    winner[j] = within if wins else winner[j]
            elif within == 0:
                for j in range(dim):
                    greatest[j] = row[j]
            else:
                for j in range(dim):
                    greatest[j] = row[j] if row[j] > greatest[j] else greatest[j]
        i = end


# ---- their gradients ------------------------------------------------------------------------------------------


@kernel
def sum_gradients(
    gradients: Float32Array,
    bags: Int64Array,
    bounds: Int64Array,
    coefficients: Float32Array,
    winners: NDArray[np.int32],
    starts: Int64Array,
    order: Int64Array,
    out: Float32Array,
    start: int,
    stop: int,
) -> None:
    """Set ``out[u - start]`` to the summed gradient of each of the distinct rows ``start:stop`` of a grouped batch.

    A row gets, for each of its positions in the order of the batch, the coefficient of the position times the gradient
    of the bag; of a maximum, only those values that come from this position.
    """
    dim = gradients.shape[1]
    for u in range(start, stop):
        total = out[u - start]
        for j in range(dim):
            total[j] = 0
        for k in range(starts[u], starts[u + 1]):
            position = order[k]
            bag = bags[position]
            gradient, coefficient = gradients[bag], np.float32(1)
            if coefficients.size:
                coefficient = coefficients[position]
            if winners.size:
                winner, within = winners[bag], np.int32(position - bounds[bag])
                for j in range(dim):
                    total[j] += coefficient * gradient[j] if winner[j] == within else np.float32(0)
            else:
                for j in range(dim):
                    total[j] += coefficient * gradient[j]


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
        _prefetch_row(base + places[min(i + _AHEAD, last)] * record_bytes, 4 * dim)
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
