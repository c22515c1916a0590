"""The hot loops over rows that are not float32: looking up, encoding, and an optimizer's step.

As in ``compute/row_kernels.py``, a kernel works on a part of a batch, and is compiled around formulas: those of a
codec, and that of an optimizer. A row is decoded into a few hundred bytes that stay in the processor's first cache, so
that all that is slow is its way from and to memory.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base.sizes import MAX_COUNT
from shardemb.compute.compiler import formula, inlined, specialised
from shardemb.compute.intrinsics import CONVERTED, STREAMED, copy, fence, prefetch, stream
from shardemb.compute.row_kernels import step_formula
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


def _view(data: Any) -> Any:  # noqa: ANN401
    """Hold the place of what returns the bytes of a row as the codes of a type, in the kernels below."""


def _out_view(data: Any) -> Any:  # noqa: ANN401
    """Hold the place of the same for the type that is wanted."""


def _decode(data: Any, codes: Any, target: Any, block: Any) -> None:  # noqa: ANN401
    """Hold the place of a codec's function."""


def _encode(source: Any, data: Any, codes: Any, words: Any, block: Any) -> None:  # noqa: ANN401
    """Hold the place of a codec's function."""


def _convert(data: Any, codes: Any, row: Any, target: Any, block: Any) -> None:  # noqa: ANN401
    """Hold the place of a function from one type to another; see `codecs.converter`."""


def _draw(words: Any, row: Any, key: Any, step: Any) -> None:  # noqa: ANN401
    """Hold the place of what draws random words for rounding."""


@inlined
def _scratch(nbytes: int) -> Bytes:
    """Make memory for a row, so much that it can be seen as numbers of any size."""
    return np.empty((nbytes + 7) // 8 * 8, np.uint8)


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

    They are in the `nbytes` bytes from byte `first` on, and converted to what `out` has.
    """
    # Some conversions write, and read, a register of values beyond the last.
    data, made = _scratch(nbytes + CONVERTED), _scratch(out.shape[1] + 2 * CONVERTED)
    row = np.empty(values, np.float32)
    codes, made_codes = _view(data), _out_view(made)[:values]
    row_bytes, record_bytes = out.shape[1], records.shape[1]
    source, target = records.ctypes.data + first, out.ctypes.data + start * row_bytes
    streamed = places.size * row_bytes >= _STREAMED_BYTES and (target | row_bytes) % STREAMED == 0
    ahead_bytes = min(nbytes, _PREFETCHED_BYTES)
    for i in range(places.size):
        if i + _AHEAD < places.size:
            _prefetch_bytes(source + places[i + _AHEAD] * record_bytes, ahead_bytes)
        if places[i] < 0:
            continue
        copy(data.ctypes.data, source + places[i] * record_bytes, nbytes)
        _convert(data, codes, row, made_codes, block)
        if streamed:
            for at in range(0, row_bytes, STREAMED):
                stream(target + i * row_bytes + at, made.ctypes.data + at)
        else:
            copy(target + i * row_bytes, made.ctypes.data, row_bytes)
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
    dim, row_bytes = values.shape[1], out.shape[1]
    row, words, data = np.empty(dim, np.float32), np.empty(dim, np.uint32), _scratch(row_bytes)
    codes, source, target = _view(data), values.ctypes.data, out.ctypes.data
    for i in range(start, stop):
        copy(row.ctypes.data, source + i * 4 * dim, 4 * dim)
        _draw(words, rows[i], key, step)
        _encode(row, data, codes, words, block)
        copy(target + i * row_bytes, data.ctypes.data, row_bytes)


def _take_step(weight: Any, state: Any, gradient: Any, scalars: Any, options: Any, work: Any) -> None:  # noqa: ANN401
    """Hold the place of an optimizer's step in the kernel below; see `row_kernels.step_formula`."""


def _state_of(record: Any, floats: Any, scratch: Any, state: Any, columns: Any) -> Any:  # noqa: ANN401
    """Hold the place of what returns the state of a record as float32."""


def _keep_state(record: Any, scratch: Any, state: Any, columns: Any, words: Any, first: Any) -> None:  # noqa: ANN401
    """Hold the place of what puts the state back into its record."""


def _step(
    records: Bytes,
    places: Int64Array,
    rows: Int64Array,
    starts: Int64Array,
    order: Int64Array,
    gradients: Float32Array,
    scalars: Float32Array,
    options: Float32Array,
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
    dim, record_bytes = gradients.shape[1], records.shape[1]
    row_bytes, values = 4 * dim, 0
    for k in range(0, columns.size, 3):
        values += columns[k + 1]
    # Where nothing of a record is float32, it may have any number of bytes.
    floats = records.view(np.float32) if record_bytes % 4 == 0 else np.empty((1, 1), np.float32)
    scratch, data = _scratch(record_bytes), _scratch(weight_bytes)
    codes, at = _view(data), record_bytes // 4 - 2
    weight, summed = np.empty(dim, np.float32), np.empty(dim, np.float32)
    decoded, words = np.empty(values, np.float32), np.empty(dim + values, np.uint32)
    source, target, end = gradients.ctypes.data, records.ctypes.data, order.size - 1
    for u in range(start, stop):
        first, last, place = starts[u], starts[u + 1], places[u]
        record = target + place * record_bytes
        if u + _AHEAD < stop:
            _prefetch_bytes(target + places[u + _AHEAD] * record_bytes, record_bytes)
        _prefetch_bytes(source + order[min(first + 2 * _AHEAD, end)] * row_bytes, row_bytes)
        if counting:
            floats[place, at] = min(floats[place, at] + np.float32(last - first), MAX_COUNT)
            floats[place, at + 1] = np.float32(counting)
        gradient = gradients[order[first]]
        if last - first > 1:  # most rows occur once: no copy of their gradient
            copy(summed.ctypes.data, source + order[first] * row_bytes, row_bytes)
            # The order of these additions is part of the contract: it decides the bits.
            for k in range(first + 1, last):
                _prefetch_bytes(source + order[min(k + 2 * _AHEAD, end)] * row_bytes, row_bytes)
                another = gradients[order[k]]
                for j in range(dim):
                    summed[j] += another[j]
            gradient = summed
        copy(data.ctypes.data, record, weight_bytes)
        _decode(data, codes, weight, block)
        state = _state_of(record, floats[place], scratch, decoded, columns)
        _take_step(weight, state, gradient, scalars, options, summed)
        _draw(words, rows[u], key, number)
        _encode(weight, data, codes, words, block)
        copy(record, data.ctypes.data, weight_bytes)
        _keep_state(record, scratch, state, columns, words, dim)


def state_in_place(
    record: int, floats: Float32Array, scratch: Bytes, state: Float32Array, columns: Int64Array
) -> Float32Array:
    """Return the state where it lies: all of it is float32, without gaps."""
    first = columns[0] // 4
    return floats[first : first + state.size] if state.size else state


def state_stays(
    record: int, scratch: Bytes, state: Float32Array, columns: Int64Array, words: Words, first: int
) -> None:
    """Do nothing: the state was changed where it lies."""


def decode_columns(
    record: int, floats: Float32Array, scratch: Bytes, state: Float32Array, columns: Int64Array
) -> Float32Array:
    """Decode the state of a record, in columns of bfloat16 and of float32."""
    copy(scratch.ctypes.data, record, columns[-3] + columns[-2] * columns[-1])
    done, codes = 0, scratch.view(np.uint16)
    for k in range(0, columns.size, 3):
        at, count = columns[k], columns[k + 1]
        if columns[k + 2] == 4:
            copy(state.ctypes.data + 4 * done, scratch.ctypes.data + at, 4 * count)
        else:
            for j in range(np.uint64(count)):
                state[np.uint64(done) + j] = _value(codes[np.uint64(at // 2) + j])
        done += count
    return state


def encode_columns(
    record: int, scratch: Bytes, state: Float32Array, columns: Int64Array, words: Words, first: int
) -> None:
    """Put the state back; what is bfloat16 is rounded to nearest."""
    done, codes = 0, scratch.view(np.uint16)
    for k in range(0, columns.size, 3):
        at, count = columns[k], columns[k + 1]
        if columns[k + 2] == 4:
            copy(scratch.ctypes.data + at, state.ctypes.data + 4 * done, 4 * count)
        else:
            for j in range(np.uint64(count)):
                codes[np.uint64(at // 2) + j] = _rounded(state[np.uint64(done) + j])
        done += count
    end = columns[-3] + columns[-2] * columns[-1]
    copy(record + columns[0], scratch.ctypes.data + columns[0], end - columns[0])


def encode_columns_drawn(
    record: int, scratch: Bytes, state: Float32Array, columns: Int64Array, words: Words, first: int
) -> None:
    """Put the state back; what is bfloat16 is rounded stochastically, with the words from `first` on."""
    done, codes = 0, scratch.view(np.uint16)
    for k in range(0, columns.size, 3):
        at, count = columns[k], columns[k + 1]
        if columns[k + 2] == 4:
            copy(scratch.ctypes.data + at, state.ctypes.data + 4 * done, 4 * count)
        else:
            for j in range(np.uint64(count)):
                word = words[np.uint64(first + done) + j]
                codes[np.uint64(at // 2) + j] = _drawn(state[np.uint64(done) + j], word)
        done += count
    end = columns[-3] + columns[-2] * columns[-1]
    copy(record + columns[0], scratch.ctypes.data + columns[0], end - columns[0])


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
    return specialised(
        _gather,
        f"gather_{_label(stored)}_as_{wanted}",
        _view=codecs.viewer(stored),
        _out_view=codecs.viewer(Plain(wanted)),
        _convert=codecs.converter(stored, wanted),
    )


@cache
def encode_rows(stored: Dtype, *, drawn: bool) -> Callable[..., None]:
    """Return `_encode_rows` compiled for one type, which rounds stochastically if random words are `drawn`."""
    return specialised(
        _encode_rows,
        f"encode_{_label(stored)}{'_drawn' * drawn}",
        _view=codecs.viewer(stored),
        _encode=codecs.encoder(stored, drawn=drawn),
        _draw=codecs.drawing(drawn=drawn),
    )


@cache
def step(
    optimizer: type[Any], stored: Dtype, state: str, *, drawn: bool, with_options: bool
) -> Callable[..., None]:
    """Return `_step` compiled for one class of optimizers and one type of rows and of their state."""
    if state == "float32":
        state_of, keep_state = formula(state_in_place), formula(state_stays)
    else:
        state_of = formula(decode_columns, _value=codecs.number(state))
        one = {"_drawn" if drawn else "_rounded": codecs.rounding(state, drawn=drawn)}
        keep_state = formula(encode_columns_drawn if drawn else encode_columns, **one)
    return specialised(
        _step,
        f"step_{optimizer.__name__}_{_label(stored)}_{state}{'_drawn' * drawn}{'_with_options' * with_options}",
        _view=codecs.viewer(stored),
        _decode=codecs.decoder(stored),
        _encode=codecs.encoder(stored, drawn=drawn),
        _draw=codecs.drawing(drawn=drawn),
        _take_step=step_formula(optimizer, with_options=with_options),
        _state_of=state_of,
        _keep_state=keep_state,
    )


def _label(stored: Dtype) -> str:
    """Return what names a type in the name of a kernel."""
    return "_".join(
        [stored.columns(1)["weight"][0], *list(stored.columns(1))[1:], *["blocks"] * bool(stored.block_size)]
    )
