"""The hot loops over rows that are not float32: looking up, encoding, and an optimizer's step.

As in ``compute/row_kernels.py``, a kernel works on a part of a batch, and is compiled around formulas: those of a
codec, and that of an optimizer. A row is decoded into a few hundred bytes that stay in the processor's first cache, so
that all that is slow is its way from and to memory.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.compute.compiler import formula, inlined, specialised
from shardemb.compute.intrinsics import STREAMED, copy, fence, prefetch, stream
from shardemb.compute.row_kernels import MAX_COUNT
from shardemb.dtypes import Plain
from shardemb.precision import codecs

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.dtypes import Dtype

    Bytes = NDArray[np.uint8]
    Words = NDArray[np.uint32]

_CACHE_LINE = 64
_AHEAD = 8
_PREFETCHED_BYTES = 768
_STREAMED_BYTES = 2**20
"""As in ``compute/row_kernels.py``."""


@inlined
def _prefetch_bytes(address: int, nbytes: int) -> None:
    """Prefetch `nbytes` bytes, a cache line at a time."""
    for line in range(0, nbytes, _CACHE_LINE):
        prefetch(address + line)


def _decode(source: Any, target: Any, block: Any) -> None:  # noqa: ANN401
    """Hold the place of a codec's function in the kernels below."""


def _encode(source: Any, target: Any, words: Any, block: Any) -> None:  # noqa: ANN401
    """Hold the place of a codec's function in the kernels below."""


def _draw(words: Any, row: Any, key: Any, step: Any) -> None:  # noqa: ANN401
    """Hold the place of what draws random words for rounding."""


# ---- reading --------------------------------------------------------------------------------------------------


def _gather(
    records: Bytes,
    places: Int64Array,
    first: int,
    nbytes: int,
    values: int,
    block: int,
    out: Bytes,
    start: int,
) -> None:
    """Set ``out[start + i]`` to `values` numbers of the record at ``places[i]``; a place below 0 leaves a gap.

    They are the `nbytes` bytes from byte `first` on, as they are decoded, and encoded again as `out` has them.
    """
    row, coded, none = np.empty(values, np.float32), np.empty(out.shape[1], np.uint8), np.empty(0, np.uint32)
    row_bytes, record_bytes = out.shape[1], records.shape[1]
    source, target = records.ctypes.data + first, out.ctypes.data + start * row_bytes
    streamed = places.size * row_bytes >= _STREAMED_BYTES and (target | row_bytes) % STREAMED == 0
    ahead_bytes = min(nbytes, _PREFETCHED_BYTES)
    for i in range(places.size):
        if i + _AHEAD < places.size:
            _prefetch_bytes(source + places[i + _AHEAD] * record_bytes, ahead_bytes)
        if places[i] < 0:
            continue
        _decode(records[places[i], first : first + nbytes], row, block)
        _encode(row, coded, none, 0)
        if streamed:
            for at in range(0, row_bytes, STREAMED):
                stream(target + i * row_bytes + at, coded.ctypes.data + at)
        else:
            copy(target + i * row_bytes, coded.ctypes.data, row_bytes)
    if streamed:
        fence()  # another core may read the result as soon as this returns


# ---- changing -------------------------------------------------------------------------------------------------


def _encode_rows(
    values: Float32Array,
    out: Bytes,
    rows: Int64Array,
    key: np.uint64,
    step: int,
    block: int,
    start: int,
    stop: int,
) -> None:
    """Set ``out[i]`` to the bytes of ``values[i]``, which are those of row ``rows[i]``."""
    words = np.empty(values.shape[1], np.uint32)
    for i in range(start, stop):
        _draw(words, rows[i], key, step)
        _encode(values[i], out[i], words, block)


def _row_step(weight: Any, state: Any, gradient: Any, scalars: Any) -> None:  # noqa: ANN401
    """Hold the place of an optimizer's function in the kernel below."""


def _state_of(record: Any, columns: Any, scratch: Any) -> Any:  # noqa: ANN401
    """Hold the place of what returns the state of a record as float32."""


def _keep_state(scratch: Any, record: Any, columns: Any, words: Any) -> None:  # noqa: ANN401
    """Hold the place of what puts the state back into its record."""


def _step(
    records: Bytes,
    places: Int64Array,
    rows: Int64Array,
    starts: Int64Array,
    order: Int64Array,
    gradients: Float32Array,
    scalars: Float32Array,
    columns: Int64Array,
    weight_bytes: int,
    block: int,
    key: np.uint64,
    number: int,
    counting: int,
    start: int,
    stop: int,
) -> None:
    """Take one optimizer step, the table's `number`-th, on the distinct rows at `places`.

    As ``row_kernels.step`` does, on records that are bytes. `columns` has the first byte, the number of values and the
    bytes of a value of each column of state, one after the other.
    """
    dim, state_values = gradients.shape[1], 0
    for k in range(0, columns.size, 3):
        state_values += columns[k + 1]
    weight, summed = np.empty(dim, np.float32), np.empty(dim, np.float32)
    state_scratch, words = np.empty(state_values, np.float32), np.empty(dim + state_values, np.uint32)
    row_bytes, record_bytes = 4 * dim, records.shape[1]
    source, target, end = gradients.ctypes.data, records.ctypes.data, order.size - 1
    for u in range(start, stop):
        first, last = starts[u], starts[u + 1]
        if u + _AHEAD < stop:
            _prefetch_bytes(target + places[u + _AHEAD] * record_bytes, record_bytes)
        _prefetch_bytes(source + order[min(first + 2 * _AHEAD, end)] * row_bytes, row_bytes)
        record = records[places[u]]
        if counting:
            counters = record[record_bytes - 8 :].view(np.float32)
            counters[0] = min(counters[0] + np.float32(last - first), MAX_COUNT)
            counters[1] = np.float32(counting)
        gradient = gradients[order[first]]
        if last - first > 1:
            # The order of these additions is part of the contract: it decides the bits.
            for j in range(dim):
                summed[j] = gradient[j]
            for k in range(first + 1, last):
                _prefetch_bytes(source + order[min(k + 2 * _AHEAD, end)] * row_bytes, row_bytes)
                more = gradients[order[k]]
                for j in range(dim):
                    summed[j] += more[j]
            gradient = summed
        _decode(record[:weight_bytes], weight, block)
        state = _state_of(record, columns, state_scratch)
        _row_step(weight, state, gradient, scalars)
        _draw(words, rows[u], key, number)
        _encode(weight, record[:weight_bytes], words[:dim], block)
        _keep_state(state, record, columns, words[dim:])


def state_view(record: Bytes, columns: Int64Array, scratch: Float32Array) -> Float32Array:
    """Return the state of a record where it lies: all of it is float32, without gaps."""
    return record[columns[0] : columns[0] + 4 * scratch.size].view(np.float32)


def state_stays(scratch: Float32Array, record: Bytes, columns: Int64Array, words: Words) -> None:
    """Do nothing: the state was changed where it lies."""


def state_copy(record: Bytes, columns: Int64Array, scratch: Float32Array) -> Float32Array:
    """Decode the state of a record, in columns of bfloat16 and of float32."""
    done = 0
    for k in range(0, columns.size, 3):
        first, count, width = columns[k], columns[k + 1], columns[k + 2]
        if width == 4:
            values = record[first : first + 4 * count].view(np.float32)
            for j in range(count):
                scratch[done + j] = values[j]
        else:
            codes = record[first : first + 2 * count].view(np.uint16)
            for j in range(count):
                scratch[done + j] = _value(codes[j])
        done += count
    return scratch


def state_kept(scratch: Float32Array, record: Bytes, columns: Int64Array, words: Words) -> None:
    """Encode the state of a record, rounded to nearest."""
    done = 0
    for k in range(0, columns.size, 3):
        first, count, width = columns[k], columns[k + 1], columns[k + 2]
        if width == 4:
            values = record[first : first + 4 * count].view(np.float32)
            for j in range(count):
                values[j] = scratch[done + j]
        else:
            codes = record[first : first + 2 * count].view(np.uint16)
            for j in range(count):
                codes[j] = _rounded(scratch[done + j])
        done += count


def state_kept_drawn(scratch: Float32Array, record: Bytes, columns: Int64Array, words: Words) -> None:
    """Encode the state of a record, rounded stochastically."""
    done = 0
    for k in range(0, columns.size, 3):
        first, count, width = columns[k], columns[k + 1], columns[k + 2]
        if width == 4:
            values = record[first : first + 4 * count].view(np.float32)
            for j in range(count):
                values[j] = scratch[done + j]
        else:
            codes = record[first : first + 2 * count].view(np.uint16)
            for j in range(count):
                codes[j] = _drawn(scratch[done + j], words[done + j])
        done += count


def _value(code: Any) -> Any:  # noqa: ANN401
    """Hold the place of what returns the number of a bfloat16."""


def _rounded(value: Any) -> Any:  # noqa: ANN401
    """Hold the place of what rounds to bfloat16."""


def _drawn(value: Any, word: Any) -> Any:  # noqa: ANN401
    """Hold the place of what rounds to bfloat16 stochastically."""


# ---- one kernel for each type ---------------------------------------------------------------------------------


@cache
def gather(stored: Dtype, wanted: str) -> Callable[..., None]:
    """Return `_gather` compiled for rows that are stored as one type and wanted as another."""
    name = f"gather_{_label(stored)}_as_{wanted}"
    encode = codecs.encoder(Plain(wanted), drawn=False)
    return specialised(_gather, name, _decode=codecs.decoder(stored), _encode=encode)


@cache
def encode_rows(stored: Dtype, *, drawn: bool) -> Callable[..., None]:
    """Return `_encode_rows` compiled for one type, which rounds stochastically if random words are `drawn`."""
    name = f"encode_{_label(stored)}{'_drawn' * drawn}"
    return specialised(
        _encode_rows, name, _encode=codecs.encoder(stored, drawn=drawn), _draw=codecs.drawing(drawn=drawn)
    )


@cache
def step(optimizer: type[Any], stored: Dtype, state: str, *, drawn: bool) -> Callable[..., None]:
    """Return `_step` compiled for one class of optimizers and one type of rows and of their state."""
    if state == "float32":
        state_of, keep_state = formula(state_view), formula(state_stays)
    else:
        state_of = formula(state_copy, _value=formula(codecs.bfloat16_value))
        keep_state = (
            formula(state_kept_drawn, _drawn=formula(codecs.bfloat16_drawn))
            if drawn
            else formula(state_kept, _rounded=formula(codecs.bfloat16_code))
        )
    return specialised(
        _step,
        f"step_{optimizer.__name__}_{_label(stored)}_{state}{'_drawn' * drawn}",
        _decode=codecs.decoder(stored),
        _encode=codecs.encoder(stored, drawn=drawn),
        _draw=codecs.drawing(drawn=drawn),
        _row_step=formula(optimizer.row_step),
        _state_of=state_of,
        _keep_state=keep_state,
    )


def _label(stored: Dtype) -> str:
    """Return what names a type in the name of a kernel."""
    return "_".join(
        [stored.columns(1)["weight"][0], *list(stored.columns(1))[1:], *["blocks"] * bool(stored.block_size)]
    )
