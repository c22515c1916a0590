"""The hot loops over rows, and how numba makes machine code of them (those over bitmaps: ``bitmaps.py``).

A kernel releases the GIL, raises nothing and is compiled once, into a cache on disk. It works on the half-open range
``start:stop`` of a batch, so that one call is one task; tasks over different ranges write different rows. It returns
nothing, a number or one array: where a signal is pending while numba makes a *tuple* for Python, the process crashes.

The formulas of optimizers and initializers are plain Python in their own modules. `_specialise` compiles a kernel
around each of them: the same code with other global names, so that numba sees a direct call which it can inline
and cache. (A kernel that takes a function as an argument is never found in the cache again.)
"""

from __future__ import annotations

import types
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from numba import njit
from numba import types as nb

from shardemb import initializers, optim
from shardemb.intrinsics import STREAMED, add_to_eight, copy, fence, prefetch, stream
from shardemb.spec import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.arrays import Float32Array, Int64Array

F = TypeVar("F", bound="Callable[..., Any]")


def kernel(function: F) -> F:
    """Compile a function, with its machine code kept on disk for the next process."""
    # "numpy": a division by zero gives infinity, as in NumPy; raising could stop an update half way.
    return cast(F, njit(nogil=True, cache=True, error_model="numpy")(function))


def inlined(function: F) -> F:
    """Make a function part of each kernel that calls it.

    A call of a compiled one counts references of the arrays that it is given, which takes 5 to 10 ns: two in three of
    what it takes to find a row.
    """
    return cast(F, njit(inline="always", error_model="numpy")(function))


def _once(function: F) -> F:
    return cast(F, cache(function))


_madvise = nb.ExternalFunction("madvise", nb.int32(nb.uintp, nb.uintp, nb.int32))
_mincore = nb.ExternalFunction("mincore", nb.int32(nb.uintp, nb.uintp, nb.uintp))


_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, np.newaxis], axis=1, bitorder="little")
_SET_BITS, _NUM_SET = (
    np.argsort(1 - _BITS, axis=1, kind="stable").astype(np.int32),
    _BITS.sum(axis=1, dtype=np.int64),
)
_TO_BITS, _LAST_BYTE = np.uint64(0x0102040810204080), np.uint64(56)


def nonzero(flags: NDArray[np.uint8], places: NDArray[np.uint32]) -> int:
    """As `initializers.nonzero`: eight flags at once, without a branch that nobody could foresee."""
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

NODE_BITS = 4
"""Entries of a node of the index of rows in memory, as a power of two: a node is one cache line."""

_WITHIN = (1 << NODE_BITS) - 1
"""The bits of a row that tell its place within a node."""


@inlined
def _ask(address: int, nbytes: int) -> None:
    """Ask for so many bytes, from the beginning of a cache line on."""
    for line in range(0, nbytes, _CACHE_LINE):
        prefetch(address + line)


# ---- reading --------------------------------------------------------------------------------------------------


@inlined
def entry_of(
    directory: NDArray[np.int32], branches: NDArray[np.int32], leaves: NDArray[np.int32], row: int
) -> int:
    """Return what the index of rows in memory says of a row, 0 where it says nothing; see ``overlay.py``.

    Branch 0 and leaf 0 are never used and all zeros, so that nothing has to be asked on the way down.
    """
    branch = int(directory[row >> 2 * NODE_BITS]) << NODE_BITS
    leaf = int(branches[branch | ((row >> NODE_BITS) & _WITHIN)]) << NODE_BITS
    return int(leaves[leaf | (row & _WITHIN)])


@inlined
def place_of(
    directory: NDArray[np.int32], branches: NDArray[np.int32], leaves: NDArray[np.int32], first: int, row: int
) -> int:
    """Return the place of a row among the records: its own, in the files, or its slot's, which lie from `first` on.

    An empty directory says that all rows are in the files. A row that is in neither has a negative entry, and no place:
    -1.
    """
    if directory.size:
        entry = entry_of(directory, branches, leaves, row)
        if entry != 0:
            return first + entry - 1 if entry > 0 else -1
    return row


@kernel
def places_of(
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    first: int,
    ids: Int64Array,
    start: int,
    stop: int,
) -> Int64Array:
    """`place_of` each of ``ids[start:stop]``.

    No level of a large table's index is in the cache: each is asked for some rows before the next one needs it.
    """
    places = np.empty(stop - start, np.int64)
    if directory.size == 0:
        for i in range(start, stop):  # numba takes 1.7 s to compile what would copy a slice
            places[i - start] = ids[i]
        return places
    for i in range(start, stop):
        if i + 3 * _AHEAD < stop:
            prefetch(directory.ctypes.data + 4 * (ids[i + 3 * _AHEAD] >> 2 * NODE_BITS))
        if i + 2 * _AHEAD < stop:
            branch = int(directory[ids[i + 2 * _AHEAD] >> 2 * NODE_BITS]) << NODE_BITS
            prefetch(branches.ctypes.data + 4 * branch)
        if i + _AHEAD < stop:
            row = ids[i + _AHEAD]
            branch = int(directory[row >> 2 * NODE_BITS]) << NODE_BITS
            leaf = int(branches[branch | ((row >> NODE_BITS) & _WITHIN)]) << NODE_BITS
            prefetch(leaves.ctypes.data + 4 * leaf)
        places[i - start] = place_of(directory, branches, leaves, first, ids[i])
    return places


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


@kernel
def sample_resident(
    base: int,
    record_bytes: int,
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    slots: int,
    present: NDArray[np.uint8],
    ids: Int64Array,
    samples: int,
) -> int:
    """Of `samples` ids spread over the batch, count those whose page is in memory; -1 if the kernel won't tell.

    Rows in slots, and those that `present` says were never written, need no page.
    """
    answer = np.zeros(1, np.uint8)
    resident = 0
    for k in range(samples):
        row = ids[k * ids.size // samples]
        if (present.size and not (present[row >> 3] >> (row & 7)) & 1) or place_of(
            directory, branches, leaves, slots, row
        ) != row:
            resident += 1
            continue
        page = (base + row * record_bytes) & -PAGE
        if _mincore(page, PAGE, answer.ctypes.data) != 0:
            return -1
        resident += answer[0] & 1
    return resident


@kernel
def _advise_pages(base: int, start: int, stop: int, advice: int, most_pages: int) -> int:
    failed = 0
    for first in range(start, stop, most_pages):
        pages = min(most_pages, stop - first)
        failed += _madvise(base + first * PAGE, pages * PAGE, advice) != 0
    return failed


@kernel
def advise(
    base: int,
    record_bytes: int,
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    slots: int,
    present: NDArray[np.uint8],
    sorted_ids: Int64Array,
    advice: int,
    most_pages: int,
    start: int,
    stop: int,
) -> int:
    """Give `advice` on the pages of ascending ids, up to `most_pages` a call; return the calls that failed.

    Rows in slots, and those that `present` says were never written, are passed over; an empty `present` says nothing.
    """
    first, last, failed = np.int64(0), np.int64(-2), 0
    for i in range(start, stop):
        row = sorted_ids[i]
        if present.size and not (present[row >> 3] >> (row & 7)) & 1:
            continue
        if place_of(directory, branches, leaves, slots, row) != row:
            continue
        low, high = row * record_bytes // PAGE, ((row + 1) * record_bytes - 1) // PAGE
        if low > last + 1:
            failed += _advise_pages(base, int(first), int(last) + 1, advice, most_pages)
            first = low
        last = max(last, high)
    return failed + _advise_pages(base, int(first), int(last) + 1, advice, most_pages)


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

# numba notices a changed kernels.py by itself, but not a changed formula: that goes into the name.
_FORMULAS = zlib.crc32(b"".join(Path(str(m.__file__)).read_bytes() for m in (optim, initializers)))


def _specialise(function: Callable[..., Any], name: str, **helpers: object) -> Callable[..., Any]:
    """Return a function's code with `helpers` in place of global names, under a name that no other code has.

    The name becomes the symbol of the compiled code. Were two functions called the same and loaded from the cache
    into one process, the linker would take the first for both.
    """
    name = f"{name}_{_FORMULAS:08x}"
    copy = types.FunctionType(function.__code__, {**function.__globals__, **helpers}, name)
    copy.__qualname__ = name
    return copy


def _helper(function: Callable[..., Any], **helpers: object) -> Callable[..., Any]:
    """Compile a formula for use within a kernel.

    It is inlined whatever its size: LLVM makes no vector code of a loop that calls something.
    """
    name = function.__qualname__.replace(".", "_")
    compile_ = njit(nogil=True, error_model="numpy", forceinline=True)
    return cast("Callable[..., Any]", compile_(_specialise(function, name, **helpers)))


@_once
def _fill_helpers(initializer: type[initializers.Initializer]) -> dict[str, Callable[..., Any]]:
    draw = _helper(initializers.draw, philox=_helper(initializers.philox))
    unit = _helper(initializers.unit)
    scaled, tail = _helper(initializers.log_scaled), _helper(initializers.tail_quantile)
    normal = _helper(
        initializers.fill_normal,
        draw=draw,
        unit=unit,
        nonzero=_helper(nonzero),
        middle_quantile=_helper(initializers.middle_quantile),
        fill_tails=_helper(initializers.fill_tails, unit=unit, log_scaled=scaled, tail_quantile=tail),
    )
    return {"_fill_rows": _helper(initializer.fill_rows, draw=draw, unit=unit, fill_normal=normal)}


@_once
def gather_or_fill(initializer: type[initializers.Initializer]) -> Callable[..., None]:
    """`_gather_or_fill` for one kind of initial value."""
    name = f"gather_or_fill_{initializer.__name__}"
    return kernel(_specialise(_gather_or_fill, name, **_fill_helpers(initializer)))


@_once
def fill(initializer: type[initializers.Initializer]) -> Callable[..., None]:
    """`_fill` for one kind of initial value."""
    return kernel(_specialise(_fill, f"fill_{initializer.__name__}", **_fill_helpers(initializer)))


@_once
def copy_or_fill(initializer: type[initializers.Initializer]) -> Callable[..., None]:
    """`_copy_or_fill` for one kind of initial value."""
    name = f"copy_or_fill_{initializer.__name__}"
    return kernel(_specialise(_copy_or_fill, name, **_fill_helpers(initializer)))


@_once
def step(optimizer: type[optim.Optimizer]) -> Callable[..., None]:
    """`_step` for one optimizer."""
    return kernel(_specialise(_step, f"step_{optimizer.__name__}", _row_step=_helper(optimizer.row_step)))
