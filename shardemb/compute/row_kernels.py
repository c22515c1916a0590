"""The hot loops over rows: gathering, filling, overwriting, and an optimizer's step.

A kernel works on the half-open range ``start:stop`` of a batch, so that one call is one task; tasks over different
ranges write different rows. How kernels are compiled, also around the formulas of optimizers and initializers, is in
``compiler.py``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import sampling
from shardemb.compute.compiler import formula, inlined, kernel, specialised
from shardemb.compute.intrinsics import STREAMED, add_to_eight, copy, fence, prefetch, stream
from shardemb.compute.row_index import places_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array


_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little")
_SET_BITS, _NUM_SET = (
    np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.int32),
    _BITS.sum(axis=1, dtype=np.int64),
)
_TO_BITS, _LAST_BYTE = np.uint64(0x0102040810204080), np.uint64(56)


def nonzero(flags: NDArray[np.uint8], places: NDArray[np.uint32]) -> int:
    """As `sampling.nonzero`: eight flags at once, without a branch that nobody could foresee."""
    eights, target, source, count = flags.view(np.uint64), places.ctypes.data, _SET_BITS.ctypes.data, 0
    for k in range(eights.size):
        byte = np.int64((eights[k] * _TO_BITS) >> _LAST_BYTE)  # the first flag is the lowest bit
        add_to_eight(target + 4 * count, source + 32 * byte, 8 * k)
        count += _NUM_SET[byte]
    return count


_CACHE_LINE = 64
_AHEAD = 8
"""How many rows ahead a step asks for: makes it two to three times as fast on rows that are not in the cache.

Of gradients, which are three times as short as a record of Adam's, twice as many.
"""

_ASKED_BYTES = 512
"""How much of a row a copy asks for; the processor finds out about the rest by itself."""

_STREAMED_BYTES = 2**20
"""From which size on a result is written past the caches, which have no room for it.

Gathering 40,960 random rows of 256 bytes takes four fifths of the time, and so does gathering them and adding them up.
"""

_MOST_COUNTED = np.float32(2**24)
"""Where the count of a row's updates stays: float32 knows no next whole number."""


@inlined
def _ask(address: int, nbytes: int) -> None:
    """Ask for so many bytes, from the beginning of a cache line on."""
    for line in range(0, nbytes, _CACHE_LINE):
        prefetch(address + line)


# ---- reading --------------------------------------------------------------------------------------------------


@kernel
def _copy_from(source: int, record_bytes: int, places: Int64Array, target: int, row_bytes: int) -> None:
    """Copy the first `row_bytes` of the records at places, one behind the other; a place below 0 leaves a gap.

    Asked for ahead, 40,960 random rows of 256 bytes take 1.0 ms instead of 1.25.
    """
    if (
        places.size * row_bytes >= _STREAMED_BYTES
        and (target | row_bytes) % STREAMED == 0
        and places.min() >= 0
    ):
        _stream_from(source, record_bytes, places, target, row_bytes)
        return
    for i in range(places.size):
        if i + _AHEAD < places.size:
            _ask(source + places[i + _AHEAD] * record_bytes, min(row_bytes, _ASKED_BYTES))
        if places[i] >= 0:
            copy(target + i * row_bytes, source + places[i] * record_bytes, row_bytes)


@kernel
def _stream_from(source: int, record_bytes: int, places: Int64Array, target: int, row_bytes: int) -> None:
    """As `_copy_from`, past the caches; without gaps, as with any question in the loop all of this is lost again."""
    asked = min(row_bytes, _ASKED_BYTES)
    for i in range(places.size):
        if i + _AHEAD < places.size:
            _ask(source + places[i + _AHEAD] * record_bytes, asked)
        record, row = source + places[i] * record_bytes, target + i * row_bytes
        for start in range(0, row_bytes, STREAMED):
            stream(row + start, record + start)
    fence()


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
    """``out[i]`` becomes the columns from `column` on of row ``ids[i]``, which `place_of` finds.

    All places first, then the rows: in one loop the reads of the index hold those of the rows up (65,536 random rows of
    256 bytes: 8.0 ms instead of 4.3).
    """
    row_bytes, record_bytes = 4 * out.shape[1], 4 * records.shape[1]
    source, target = records.ctypes.data + 4 * column, out.ctypes.data + start * row_bytes
    if directory.size == 0:
        _copy_from(source, record_bytes, ids[start:stop], target, row_bytes)
    else:
        places = places_of(directory, branches, leaves, slots, ids, start, stop)
        _copy_from(source, record_bytes, places, target, row_bytes)


def _fill_rows(out: Float32Array, places: Any, rows: Any, key: Any, parameters: Any) -> None:  # noqa: ANN401
    """Stand for an initializer's function in the kernels below."""


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
    start: int,
    stop: int,
) -> None:
    """As `gather`; rows never written get their initial value without a look at their page.

    Of each row the place first: what lies in a slot is there, whatever its bit says. The files' bit follows when they
    hold the record, and the slot goes after that.
    """
    places = places_of(directory, branches, leaves, slots, ids, start, stop)
    fresh, rows, count = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64), 0
    for i in range(start, stop):
        row, ahead = ids[i], min(i + 2 * _AHEAD, stop - 1)
        if places[ahead - start] == ids[ahead]:
            prefetch(present.ctypes.data + (ids[ahead] >> 3))
        if places[i - start] == row and not (present[row >> 3] >> (row & 7)) & 1:
            places[i - start] = -1
            fresh[count], rows[count] = i, row
            count += 1
    row_bytes, record_bytes = 4 * out.shape[1], 4 * records.shape[1]
    source, target = records.ctypes.data + 4 * column, out.ctypes.data + start * row_bytes
    _copy_from(source, record_bytes, places, target, row_bytes)
    _fill_rows(out, fresh[:count], rows[:count], key, parameters)


def _fill(
    ids: Int64Array,
    out: Float32Array,
    key: np.uint64,
    parameters: NDArray[np.float64],
    start: int,
    stop: int,
) -> None:
    """``out[i]`` becomes the initial weight of row ``ids[i]``, which need not be in any file."""
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
    start: int,
    stop: int,
) -> None:
    """As `copy_rows`; rows never written get their initial record."""
    base, record_bytes = records.ctypes.data, 4 * records.shape[1]
    dim = records.shape[1] - initial_state.size
    fresh, rows, count = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64), 0
    for i in range(start, stop):
        row = ids[i]
        if (present[row >> 3] >> (row & 7)) & 1:
            copy(base + places[i] * record_bytes, base + row * record_bytes, record_bytes)
            continue
        for j in range(initial_state.size):
            records[places[i], dim + j] = initial_state[j]
        fresh[count], rows[count] = places[i], row
        count += 1
    _fill_rows(records[:, :dim], fresh[:count], rows[:count], key, parameters)


@kernel
def scatter(
    records: Float32Array,
    places: Int64Array,
    starts: Int64Array,
    order: Int64Array,
    values: Float32Array,
    start: int,
    stop: int,
) -> None:
    """Overwrite the weights of distinct rows, by their places; of a row's values the last in the batch wins."""
    source, target = values.ctypes.data, records.ctypes.data
    row_bytes, record_bytes = 4 * values.shape[1], 4 * records.shape[1]
    for u in range(start, stop):
        last = order[starts[u + 1] - 1]
        copy(target + places[u] * record_bytes, source + last * row_bytes, row_bytes)


def _row_step(weight: Any, state: Any, gradient: Any, scalars: Any) -> None:  # noqa: ANN401
    """Stand for an optimizer's function in the kernel below."""


def _step(
    records: Float32Array,
    places: Int64Array,
    starts: Int64Array,
    order: Int64Array,
    gradients: Float32Array,
    scalars: Float32Array,
    scratch: Float32Array,
    counting: int,
    start: int,
    stop: int,
) -> None:
    """One optimizer step on distinct rows, by their places; a row's gradients are summed first, in batch order.

    Unless `counting` is 0, it is the number of the step, which the last two values of a record are to keep.
    """
    dim = gradients.shape[1]
    row_bytes, record_bytes = 4 * dim, 4 * records.shape[1]
    source, target, end = gradients.ctypes.data, records.ctypes.data, order.size - 1
    for u in range(start, stop):
        first, last = starts[u], starts[u + 1]
        if u + _AHEAD < stop:
            _ask(target + places[u + _AHEAD] * record_bytes, record_bytes)
        _ask(source + order[min(first + 2 * _AHEAD, end)] * row_bytes, row_bytes)
        record = records[places[u]]
        if counting:
            record[record.size - 2] = min(record[record.size - 2] + np.float32(last - first), _MOST_COUNTED)
            record[record.size - 1] = np.float32(counting)
        if last - first == 1:
            _row_step(record[:dim], record[dim:], gradients[order[first]], scalars)
            continue
        for j in range(dim):
            scratch[j] = gradients[order[first], j]
        for k in range(first + 1, last):
            _ask(source + order[min(k + 2 * _AHEAD, end)] * row_bytes, row_bytes)
            gradient = gradients[order[k]]
            for j in range(dim):
                scratch[j] += gradient[j]
        _row_step(record[:dim], record[dim:], scratch, scalars)


# ---- images ---------------------------------------------------------------------------------------------------


@kernel
def pack(records: Float32Array, places: Int64Array, target: int) -> None:
    """Copy the records at places, one behind the other, to an address; a place below 0 leaves a gap."""
    record_bytes = 4 * records.shape[1]
    _copy_from(records.ctypes.data, record_bytes, places, target, record_bytes)


@kernel
def copy_rows(records: Float32Array, source: Int64Array, target: Int64Array, start: int, stop: int) -> None:
    """Copy records from places ``source[start:stop]`` to others."""
    base, record_bytes = records.ctypes.data, 4 * records.shape[1]
    for i in range(start, stop):
        copy(base + target[i] * record_bytes, base + source[i] * record_bytes, record_bytes)


@kernel
def gather_images(addresses: Int64Array, record_bytes: int, target: int, start: int, stop: int) -> None:
    """Copy the records that lie at ``addresses[start:stop]``, one behind the other, to an address."""
    for i in range(start, stop):
        copy(target + (i - start) * record_bytes, addresses[i], record_bytes)


@kernel
def scatter_images(source: int, record_bytes: int, addresses: Int64Array, start: int, stop: int) -> None:
    """Copy records that lie one behind the other to ``addresses[start:stop]``."""
    for i in range(start, stop):
        copy(addresses[i], source + (i - start) * record_bytes, record_bytes)


@kernel
def place_images(records: Float32Array, places: Int64Array, addresses: Int64Array) -> None:
    """Copy the records that lie at addresses to their places."""
    target, record_bytes = records.ctypes.data, 4 * records.shape[1]
    for i in range(places.size):
        copy(target + places[i] * record_bytes, addresses[i], record_bytes)


# ---- one kernel for each formula ------------------------------------------------------------------------------


def _fill_helpers(initializer: type[Any]) -> dict[str, Callable[..., Any]]:
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
    """`_gather_or_fill` for one class of initializers, which has a `fill_rows`."""
    return specialised(
        _gather_or_fill, f"gather_or_fill_{initializer.__name__}", **_fill_helpers(initializer)
    )


@cache
def fill(initializer: type[Any]) -> Callable[..., None]:
    """`_fill` for one class of initializers, which has a `fill_rows`."""
    return specialised(_fill, f"fill_{initializer.__name__}", **_fill_helpers(initializer))


@cache
def copy_or_fill(initializer: type[Any]) -> Callable[..., None]:
    """`_copy_or_fill` for one class of initializers, which has a `fill_rows`."""
    return specialised(_copy_or_fill, f"copy_or_fill_{initializer.__name__}", **_fill_helpers(initializer))


@cache
def step(optimizer: type[Any]) -> Callable[..., None]:
    """`_step` for one class of optimizers, which has a `row_step`."""
    return specialised(_step, f"step_{optimizer.__name__}", _row_step=formula(optimizer.row_step))
