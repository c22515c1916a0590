"""The hot loops over rows: gathering, filling, overwriting, and an optimizer's step.

A kernel works on the half-open range ``start:stop`` of a batch, so one call is one task, and tasks over different
ranges write different rows. The place of a row is its index among the records, files first, then slots;
`row_index.place_of` finds it. ``compiler.py`` compiles kernels, including those around the formulas of optimizers and
initializers.

Random rows are not in the processor's caches. Much of what looks odd here lets their cache misses overlap: no branches
in the loops, one memcpy per row instead of a loop over its values, prefetches some rows ahead.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import sampling
from shardemb.base.sizes import MAX_COUNT
from shardemb.compute.compiler import formula, inlined, kernel, specialised
from shardemb.compute.intrinsics import STREAMED, add_to_eight, copy, fence, prefetch, stream, sum_of_eights
from shardemb.compute.row_index import places_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array


# For each byte: the indices of its set bits, padded to eight, and how many there are.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little")
_SET_BITS, _NUM_SET = (
    np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.int32),
    _BITS.sum(axis=1, dtype=np.int64),
)
# A product with this gathers the lowest bits of eight bytes in the last byte.
_TO_BITS, _LAST_BYTE = np.uint64(0x0102040810204080), np.uint64(56)


def nonzero(flags: NDArray[np.uint8], places: NDArray[np.uint32]) -> int:
    """Do what `sampling.nonzero` does, eight flags at a time and without branches, which would be mispredicted."""
    eights, target, source, count = flags.view(np.uint64), places.ctypes.data, _SET_BITS.ctypes.data, 0
    for k in range(eights.size):
        byte = np.int64((eights[k] * _TO_BITS) >> _LAST_BYTE)  # the first flag is the lowest bit
        # Always writes eight indices; the next write begins after those that count.
        add_to_eight(target + 4 * count, source + 32 * byte, 8 * k)
        count += _NUM_SET[byte]
    return count


_CACHE_LINE = 64
_AHEAD = 8
"""How many rows ahead to prefetch: makes a step two to three times as fast on rows that are not in the cache.

Gradients are prefetched twice as far ahead, because they are a third as long as a record with Adam's state.
"""

_PREFETCHED_BYTES = 512
"""How much of a row a copy prefetches; for the rest, the processor recognises the sequential access."""

_STREAMED_BYTES = 2**20
"""The size from which a result is written past the caches, which are too small for it.

Gathering 40,960 random rows of 256 bytes then takes four fifths of the time, also if the rows are summed up afterwards.
"""


@inlined
def _prefetch_bytes(address: int, nbytes: int) -> None:
    """Prefetch `nbytes` bytes, a cache line at a time."""
    for line in range(0, nbytes, _CACHE_LINE):
        prefetch(address + line)


# ---- reading --------------------------------------------------------------------------------------------------


@kernel
def _lowest(places: Int64Array) -> int:
    """Return the lowest of places, or 0 if that is lower. `numpy.min` takes a second longer to compile."""
    lowest = 0
    for place in places:
        lowest = min(lowest, place)
    return lowest


@kernel
def copy_from(source: int, record_bytes: int, places: Int64Array, target: int, row_bytes: int) -> None:
    """Copy the first `row_bytes` bytes of the records at `places`, contiguously; a place below 0 leaves a gap.

    With prefetches, 40,960 random rows of 256 bytes take 1.0 ms instead of 1.25.
    """
    # Large enough, aligned, and without gaps: only then can it be streamed.
    if (
        places.size * row_bytes >= _STREAMED_BYTES
        and (target | row_bytes) % STREAMED == 0
        and _lowest(places) >= 0
    ):
        _stream_from(source, record_bytes, places, target, row_bytes)
        return
    for i in range(places.size):
        if i + _AHEAD < places.size:
            _prefetch_bytes(source + places[i + _AHEAD] * record_bytes, min(row_bytes, _PREFETCHED_BYTES))
        if places[i] >= 0:
            copy(target + i * row_bytes, source + places[i] * record_bytes, row_bytes)


@kernel
def _stream_from(source: int, record_bytes: int, places: Int64Array, target: int, row_bytes: int) -> None:
    """Do what `copy_from` does, past the caches and without gaps: a condition in the loop would cost all the gain."""
    ahead_bytes = min(row_bytes, _PREFETCHED_BYTES)
    for i in range(places.size):
        if i + _AHEAD < places.size:
            _prefetch_bytes(source + places[i + _AHEAD] * record_bytes, ahead_bytes)
        record, row = source + places[i] * record_bytes, target + i * row_bytes
        for start in range(0, row_bytes, STREAMED):
            stream(row + start, record + start)
    fence()  # another core may read the result as soon as this returns


@kernel
def gather(
    records: Float32Array,
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    slots: int,
    column: int,
    ids: Int64Array,
    out: Float32Array,
    start: int,
    stop: int,
) -> None:
    """Set ``out[i]`` to row ``ids[i]``, the columns from `column` on.

    First it finds all places, then it copies the rows. In one loop, the reads of the index would delay those of the
    rows (65,536 random rows of 256 bytes: 8.0 ms instead of 4.3).
    """
    row_bytes, record_bytes = 4 * out.shape[1], 4 * records.shape[1]
    source, target = records.ctypes.data + 4 * column, out.ctypes.data + start * row_bytes
    if directory.size == 0:
        copy_from(source, record_bytes, ids[start:stop], target, row_bytes)
    else:
        places = places_of(directory, branches, leaves, slots, ids, start, stop)
        copy_from(source, record_bytes, places, target, row_bytes)


def _fill_rows(out: Float32Array, places: Any, rows: Any, key: Any, parameters: Any) -> None:  # noqa: ANN401
    """Hold the place of an initializer's function in the kernels below."""


def _gather_or_fill(
    records: Float32Array,
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    slots: int,
    present: NDArray[np.uint8],
    column: int,
    ids: Int64Array,
    out: Float32Array,
    key: np.uint64,
    parameters: NDArray[np.float64],
    first: int,
    stride: int,
    start: int,
    stop: int,
) -> None:
    """Do what `gather` does; rows that were never written get their initial value, without touching their page.

    That is a function of the key and of ``first + row * stride``.

    For each row the place is found before its bit is read, because a row in a slot exists whatever the bit says. The
    bit is set once the files hold the record, and the slot is released only after that.
    """
    places = places_of(directory, branches, leaves, slots, ids, start, stop)
    fresh, rows, count = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64), 0
    for i in range(start, stop):
        row, ahead = ids[i], min(i + 2 * _AHEAD, stop - 1)
        # The bit matters only if the row is in the files.
        if places[ahead - start] == ids[ahead]:
            prefetch(present.ctypes.data + (ids[ahead] >> 3))
        # A row that is computed leaves a gap in the copy.
        if places[i - start] == row and not (present[row >> 3] >> (row & 7)) & 1:
            places[i - start] = -1
            fresh[count], rows[count] = i, first + row * stride
            count += 1
    row_bytes, record_bytes = 4 * out.shape[1], 4 * records.shape[1]
    source, target = records.ctypes.data + 4 * column, out.ctypes.data + start * row_bytes
    copy_from(source, record_bytes, places, target, row_bytes)
    _fill_rows(out, fresh[:count], rows[:count], key, parameters)


def _fill(
    ids: Int64Array,
    out: Float32Array,
    key: np.uint64,
    parameters: NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """Set ``out[i]`` to the initial weight of row ``ids[i]``, which need not be in any file."""
    _fill_rows(out[start:stop], np.arange(stop - start), ids[start:stop], key, parameters)


# ---- changing -------------------------------------------------------------------------------------------------


def _copy_or_fill(
    records: Float32Array,
    present: NDArray[np.uint8],
    ids: Int64Array,
    places: Int64Array,
    initial_state: Float32Array,
    key: np.uint64,
    parameters: NDArray[np.float64],
    first: int,
    stride: int,
    start: int,
    stop: int,
) -> None:
    """Do what `copy_rows` does; rows that were never written get their initial record, as in `_gather_or_fill`."""
    base, record_bytes = records.ctypes.data, 4 * records.shape[1]
    dim = records.shape[1] - initial_state.size
    fresh, rows, count = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64), 0
    for i in range(start, stop):
        row = ids[i]
        if (present[row >> 3] >> (row & 7)) & 1:
            copy(base + places[i] * record_bytes, base + row * record_bytes, record_bytes)
            continue
        # The weights follow below, for all such rows in one call.
        for j in range(initial_state.size):
            records[places[i], dim + j] = initial_state[j]
        fresh[count], rows[count] = places[i], first + row * stride
        count += 1
    _fill_rows(records[:, :dim], fresh[:count], rows[:count], key, parameters)


@kernel
def scatter(
    records: NDArray[Any],
    places: Int64Array,
    starts: Int64Array,
    order: Int64Array,
    values: NDArray[Any],
    start: int,
    stop: int,
) -> None:
    """Overwrite the weights of the distinct rows at `places`; a row gets the last of its values in the batch."""
    source, target = values.ctypes.data, records.ctypes.data
    row_bytes, record_bytes = values.itemsize * values.shape[1], records.itemsize * records.shape[1]
    for u in range(start, stop):
        last = order[starts[u + 1] - 1]  # positions of a row ascend
        copy(target + places[u] * record_bytes, source + last * row_bytes, row_bytes)


def _row_step(weight: Any, state: Any, gradient: Any, scalars: Any) -> None:  # noqa: ANN401
    """Hold the place of an optimizer's function in `_without_options`."""


def _without_options(
    weight: Float32Array,
    state: Float32Array,
    gradient: Float32Array,
    scalars: Float32Array,
    options: Float32Array,
    work: Float32Array,
) -> None:
    """Take the step of an optimizer without options on one row; that of one with options has the same arguments."""
    _row_step(weight, state, gradient, scalars[0])


def _take_step(weight: Any, state: Any, gradient: Any, scalars: Any, options: Any, work: Any) -> None:  # noqa: ANN401
    """Hold the place of either in the kernels below."""


def _step(
    records: Float32Array,
    places: Int64Array,
    starts: Int64Array,
    order: Int64Array,
    gradients: Float32Array,
    scalars: Float32Array,
    options: Float32Array,
    scratch: Float32Array,
    counting: int,
    start: int,
    stop: int,
) -> None:
    """Take one optimizer step on the distinct rows at `places`. A row's gradients are summed first, in batch order.

    If `counting` is not 0, records have counters: their last two values become the number of updates and `counting`,
    which is the number of the step.
    """
    dim = gradients.shape[1]
    row_bytes, record_bytes = 4 * dim, 4 * records.shape[1]
    source, target, end = gradients.ctypes.data, records.ctypes.data, order.size - 1
    for u in range(start, stop):
        first, last = starts[u], starts[u + 1]
        if u + _AHEAD < stop:
            _prefetch_bytes(target + places[u + _AHEAD] * record_bytes, record_bytes)
        # By positions, not rows: however often rows occur, the next gradients are on their way.
        _prefetch_bytes(source + order[min(first + 2 * _AHEAD, end)] * row_bytes, row_bytes)
        record = records[places[u]]
        if counting:
            record[record.size - 2] = min(record[record.size - 2] + np.float32(last - first), MAX_COUNT)
            record[record.size - 1] = np.float32(counting)
        if last - first == 1:  # most rows occur once: no copy of their gradient
            _take_step(record[:dim], record[dim:], gradients[order[first]], scalars, options, scratch)
            continue
        # The order of these additions is part of the contract: it decides the bits.
        for j in range(dim):
            scratch[j] = gradients[order[first], j]
        for k in range(first + 1, last):
            _prefetch_bytes(source + order[min(k + 2 * _AHEAD, end)] * row_bytes, row_bytes)
            gradient = gradients[order[k]]
            for j in range(dim):
                scratch[j] += gradient[j]
        _take_step(record[:dim], record[dim:], scratch, scalars, options, scratch)


def _set_kept(options: Any, kept: Any) -> None:  # noqa: ANN401
    """Hold the place of what sets the share of a weight that a step leaves, among its options."""


# ---- catching up ----------------------------------------------------------------------------------------------
#
# To a dense optimizer, a row that is not in a batch has a gradient of zeros: weights decay, moments decay, and a
# momentum goes on moving the weight. An optimizer says after how many such steps nothing is left but decay. So many are
# taken one by one, with its own formula; the rest is one multiplication.


def _catch_up(
    records: Float32Array,
    dim: int,
    places: Int64Array,
    scalars: Float32Array,
    options: Float32Array,
    kept: Float32Array,
    log_kept: NDArray[np.float64],
    log_state: NDArray[np.float64],
    replayed: int,
    step: int,
    mark: int,
    start: int,
    stop: int,
) -> None:
    """Bring the records at ``places[start:stop]`` to a step, in place.

    The last value of a record is the step that the row has been brought to; it becomes `mark`. For what is known of the
    optimizer see ``optim.base.Decays``.
    """
    zeros, work, options = np.zeros(dim, np.float32), np.empty(dim, np.float32), options.copy()
    for i in range(start, stop):
        record = records[places[i]]
        weight, state = record[:dim], record[dim:]
        last = np.int64(record[record.size - 1])
        record[record.size - 1] = np.float32(max(last, np.int64(mark)))
        if last >= step:  # also where an update in another thread was faster than a lookup
            continue
        middle = min(last + np.int64(replayed), np.int64(step))
        for k in range(last, middle):  # the steps that are numbered from `last` + 1 on
            _set_kept(options, kept[k])
            _take_step(weight, state, zeros, scalars[k], options, work)
        if middle < step:
            left = np.float32(np.exp(log_kept[step] - log_kept[middle]))
            for j in range(dim):
                weight[j] *= left
            for j in range(log_state.size):
                if log_state[j] != 0:
                    state[j] *= np.float32(np.exp(log_state[j] * (step - middle)))


# ---- whole records, of any elements, as the log and the spill file have them -----------------------------------


@kernel
def pack(records: NDArray[Any], places: Int64Array, target: int) -> None:
    """Copy the records at `places` to an address, contiguously; a place below 0 leaves a gap."""
    record_bytes = records.itemsize * records.shape[1]
    # As signed as in `gather`, so that it is compiled once.
    copy_from(int(np.int64(records.ctypes.data)), record_bytes, places, target, record_bytes)


@kernel
def copy_rows(records: NDArray[Any], source: Int64Array, target: Int64Array, start: int, stop: int) -> None:
    """Copy records from places ``source[start:stop]`` to places ``target[start:stop]``."""
    base, record_bytes = records.ctypes.data, records.itemsize * records.shape[1]
    for i in range(start, stop):
        copy(base + target[i] * record_bytes, base + source[i] * record_bytes, record_bytes)


@kernel
def gather_images(addresses: Int64Array, record_bytes: int, target: int, start: int, stop: int) -> None:
    """Copy the records at ``addresses[start:stop]`` to an address, contiguously."""
    for i in range(start, stop):
        copy(target + (i - start) * record_bytes, addresses[i], record_bytes)


@kernel
def scatter_images(source: int, record_bytes: int, addresses: Int64Array, start: int, stop: int) -> None:
    """Copy contiguous records to ``addresses[start:stop]``."""
    for i in range(start, stop):
        copy(addresses[i], source + (i - start) * record_bytes, record_bytes)


@kernel
def place_images(records: NDArray[Any], places: Int64Array, addresses: Int64Array) -> None:
    """Copy the records at `addresses` to `places`."""
    target, record_bytes = records.ctypes.data, records.itemsize * records.shape[1]
    for i in range(places.size):
        copy(target + places[i] * record_bytes, addresses[i], record_bytes)


# ---- one kernel for each formula ------------------------------------------------------------------------------


def _fill_helpers(initializer: type[Any]) -> dict[str, Callable[..., Any]]:
    """Compile an initializer's `fill_rows` with everything that it may call."""
    draw = formula(sampling.draw, philox=formula(sampling.philox))
    unit = formula(sampling.unit)
    scaled, tail = formula(sampling.log_scaled), formula(sampling.tail_quantile)
    normal = formula(
        sampling.fill_normal,
        draw=draw,
        unit=unit,
        nonzero=formula(nonzero),
        middle_quantile=formula(sampling.middle_quantile),
        fill_tails=formula(sampling.fill_tails, unit=unit, log_scaled=scaled, tail_quantile=tail),
    )
    return {"_fill_rows": formula(initializer.fill_rows, draw=draw, unit=unit, fill_normal=normal)}


@cache
def gather_or_fill(initializer: type[Any]) -> Callable[..., None]:
    """Return `_gather_or_fill` compiled for one class of initializers, which has a `fill_rows`."""
    return specialised(
        _gather_or_fill, f"gather_or_fill_{initializer.__name__}", **_fill_helpers(initializer)
    )


@cache
def fill(initializer: type[Any]) -> Callable[..., None]:
    """Return `_fill` compiled for one class of initializers, which has a `fill_rows`."""
    return specialised(_fill, f"fill_{initializer.__name__}", **_fill_helpers(initializer))


@cache
def copy_or_fill(initializer: type[Any]) -> Callable[..., None]:
    """Return `_copy_or_fill` compiled for one class of initializers, which has a `fill_rows`."""
    return specialised(_copy_or_fill, f"copy_or_fill_{initializer.__name__}", **_fill_helpers(initializer))


def _own_step(optimizer: type[Any]) -> Callable[..., None]:
    """Compile an optimizer's own formula, with what it may call."""
    squares = formula(optimizer.sum_of_squares)
    helpers = {each.__name__: formula(each, sum_of_squares=squares) for each in optimizer.row_helpers}
    return formula(optimizer.row_step, sum_of_squares=squares, **helpers)


def _whole_step(optimizer: type[Any]) -> Callable[..., None]:
    """Compile an optimizer's step with everything that its options may ask for."""
    squares = formula(optimizer.sum_of_squares)
    own = _own_step(optimizer)
    clip, constrain = (formula(each, sum_of_squares=squares) for each in optimizer.around_step)
    return formula(optimizer.take_step, _row_step=own, clip_gradient=clip, constrain=constrain)


def step_formula(optimizer: type[Any], *, with_options: bool) -> Callable[..., None]:
    """Compile what takes the step of an optimizer on one row, with options or without."""
    if with_options:
        return _whole_step(optimizer)
    return formula(_without_options, _row_step=_own_step(optimizer))


@cache
def step(optimizer: type[Any], *, with_options: bool) -> Callable[..., None]:
    """Return `_step` compiled for one class of optimizers, which has a `row_step` and a `take_step` with options."""
    label = f"step_{optimizer.__name__}{'_with_options' * with_options}"
    return specialised(_step, label, _take_step=step_formula(optimizer, with_options=with_options))


@cache
def catch_up(optimizer: type[Any]) -> Callable[..., None]:
    """Return `_catch_up` compiled for one class of optimizers."""
    label = f"catch_up_{optimizer.__name__}"
    whole, set_kept = _whole_step(optimizer), formula(optimizer.set_kept)
    return specialised(_catch_up, label, _take_step=whole, _set_kept=set_kept)


# ---- the norm of gradients ----------------------------------------------------------------------------------------


@inlined
def _exact_sum(values: Float32Array) -> float:
    """Return the sum of the squares of a row's values, in float64 if it overflows otherwise."""
    eights = values.size // 8
    total = sum_of_eights(values.ctypes.data, eights)
    for j in range(8 * eights, values.size):
        total += values[j] * values[j]
    exact: float = np.float64(total)
    if not np.isfinite(exact):
        exact = 0.0
        for j in range(values.size):
            exact += np.float64(values[j]) * np.float64(values[j])
    return exact


@kernel
def sum_squares(gradients: Float32Array, squares: NDArray[np.float64], start: int, stop: int) -> None:
    """Set ``squares[i]`` to the sum of the squares of the gradient at position ``i`` of a batch.

    In the order of the batch, because random ones would have to come from memory: a quarter of the time.
    """
    for i in range(start, stop):
        squares[i] = _exact_sum(gradients[i])


@kernel
def sum_squares_of_repeated(
    starts: Int64Array,
    order: Int64Array,
    gradients: Float32Array,
    repeated: Int64Array,
    sums: NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """Set ``sums[k]`` to the sum of the squares of row ``repeated[k]``'s gradient, the sum of several."""
    dim, row_bytes = gradients.shape[1], 4 * gradients.shape[1]
    source, end = gradients.ctypes.data, order.size - 1
    summed = np.empty(dim, np.float32)
    for k in range(start, stop):
        first, last = starts[repeated[k]], starts[repeated[k] + 1]
        following = starts[repeated[min(k + _AHEAD, stop - 1)]]
        _prefetch_bytes(source + order[following] * row_bytes, row_bytes)
        _prefetch_bytes(source + order[following + 1] * row_bytes, row_bytes)
        copy(summed.ctypes.data, source + order[first] * row_bytes, row_bytes)
        for i in range(first + 1, last):
            _prefetch_bytes(source + order[min(i + _AHEAD, end)] * row_bytes, row_bytes)
            another = gradients[order[i]]
            for j in range(dim):
                summed[j] += another[j]
        sums[k] = _exact_sum(summed)


@kernel
def sum_of_single(starts: Int64Array, order: Int64Array, squares: NDArray[np.float64]) -> float:
    """Add up the squares of those rows that have one position, which several rows may share."""
    total = 0.0
    for u in range(starts.size - 1):
        if starts[u + 1] - starts[u] == 1:
            total += squares[order[starts[u]]]
    return total
