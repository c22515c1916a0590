"""From float32 to the bytes of a row and back: plain functions that ``compute/compiler.py`` compiles into kernels.

A codec is a pair of functions over one row: ``decode(data, codes, target, block)`` from its bytes to float32, and
``encode(source, data, codes, words, block)`` back. The bytes are in memory of the kernel, and `codes` is that memory as
the type's integers: to take a part of an array, or another view of it, costs more than all the arithmetic of a row.

Loops over values have no branches, so that they are vectorised. Numbers are rounded to nearest, ties to even; what is
too large becomes infinity, or NaN in a type without infinity, as NumPy's `astype` has it with the types of the package
ml_dtypes.

Each `encode` has a twin that rounds stochastically: of the two neighbours of a number, the upper is chosen with a
probability of its distance to the lower, by one random word for each value. What is too large is rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import sampling
from shardemb.compute.compiler import formula
from shardemb.compute.intrinsics import CONVERTED, float8_to_bfloat16
from shardemb.dtypes import ITEM_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array
    from shardemb.dtypes import Dtype

    Bytes = NDArray[np.uint8]
    Words = NDArray[np.uint32]

_SIGN, _MAGNITUDE, _INFINITY = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_QUIET_NAN = np.uint32(0x7FC00000)


# ---- one value ------------------------------------------------------------------------------------------------


def bfloat16_value(code: np.uint16) -> np.float32:
    """Return the number of a bfloat16, which is the upper half of a float32."""
    return np.uint32(np.uint32(code) << np.uint32(16)).view(np.float32)


def bfloat16_code(value: np.float32) -> np.uint16:
    """Round a number to bfloat16."""
    bits = np.float32(value).view(np.uint32)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
    nan = np.uint32((bits & _SIGN) | _QUIET_NAN)
    chosen = nan if np.uint32(bits & _MAGNITUDE) > _INFINITY else rounded
    return np.uint16(np.uint32(chosen) >> np.uint32(16))


def bfloat16_drawn(value: np.float32, word: np.uint32) -> np.uint16:
    """Round a number to bfloat16 stochastically."""
    bits = np.float32(value).view(np.uint32)
    magnitude = np.uint32(bits & _MAGNITUDE)
    nearest = np.uint32(np.uint32(0x7FFF) + np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1)))
    added = np.uint32(word >> np.uint32(16)) if magnitude <= np.uint32(0x7F7F0000) else nearest
    nan = np.uint32((bits & _SIGN) | _QUIET_NAN)
    chosen = nan if magnitude > _INFINITY else np.uint32(bits + added)
    return np.uint16(np.uint32(chosen) >> np.uint32(16))


def _number(code: Any, mantissa: int, bias: int, width: int, infinity: int) -> Any:  # noqa: ANN401
    """Return the number of a code of `width` bits: sign, exponent, and `mantissa` bits.

    `infinity` is the code of infinity; 0 in a type that has none, in which the largest code is NaN.
    """
    # Sign and magnitude where float32 has them.
    placed = np.int32(np.int32(np.int32(code) << (32 - width)) >> (9 - width + mantissa))
    sign = np.int32(placed & np.int32(-0x80000000))
    magnitude = np.int32(placed & np.int32(((1 << (width - 1)) - 1) << (23 - mantissa)))
    normal = np.int32(magnitude + np.int32((127 - bias) << 23)).view(np.float32)
    # One exponent more, and the leading bit taken off again: exact, and no arithmetic with denormal numbers.
    lowest = np.int32((128 - bias) << 23)
    small = np.float32(np.int32(magnitude + lowest).view(np.float32) - np.int32(lowest).view(np.float32))
    value = small if magnitude < np.int32(1 << 23) else normal
    if infinity:
        special = np.int32(magnitude | np.int32(0x7F800000))
        at = np.int32(infinity << (23 - mantissa))
        bits = special if magnitude >= at else np.float32(value).view(np.int32)
    else:
        nan = np.int32(((1 << (width - 1)) - 1) << (23 - mantissa))
        bits = np.int32(0x7FC00000) if magnitude == nan else np.float32(value).view(np.int32)
    return np.int32(np.int32(bits) | sign).view(np.float32)


def _code(value: Any, word: Any, most: int, mantissa: int, bias: int, top: int, nan: int) -> Any:  # noqa: ANN401
    """Round a number to a code without its sign, which `_signed` adds.

    `top` is the code of what is too large, `nan` that of NaN. Numbers up to the bits of `most` are rounded by the
    random `word`; if that is 0, all are rounded to nearest.
    """
    magnitude: Any = np.int64(np.float32(value).view(np.uint32) & _MAGNITUDE)
    exponent, lowest = max(magnitude >> 23, 1), 128 - bias
    leading = 0x800000 if magnitude >= 0x800000 else 0
    significand = (magnitude & 0x7FFFFF) | leading
    # A number below the smallest normal one loses more bits. From 32 on, they are cut off before.
    shift = 23 - mantissa + max(lowest - exponent, 0)
    significand >>= min(max(shift - 31, 0), 24)
    shift = min(shift, 31)
    added = (np.int64(1) << (shift - 1)) - 1 + ((significand >> shift) & 1)
    if most:
        drawn = word & ((np.int64(1) << shift) - 1)
        added = drawn if magnitude <= most else added
    code = ((significand + added) >> shift) + (max(exponent - lowest, 0) << mantissa)
    code = min(code, top)
    return nan if magnitude > 0x7F800000 else code


def float16_value(code: np.uint16) -> Any:  # noqa: ANN401
    """Return the number of a float16."""
    return _number(code, 10, 15, 16, 0x7C00)


def float16_code(value: np.float32) -> np.uint16:
    """Round a number to float16."""
    sign = (np.float32(value).view(np.uint32) >> 16) & 0x8000
    return np.uint16(_code(value, 0, 0, 10, 15, 0x7C00, 0x7E00) | sign)


def float16_drawn(value: np.float32, word: np.uint32) -> np.uint16:
    """Round a number to float16 stochastically."""
    sign = (np.float32(value).view(np.uint32) >> 16) & 0x8000
    return np.uint16(_code(value, np.int64(word), 0x477FE000, 10, 15, 0x7C00, 0x7E00) | sign)


def float8_e5m2_value(code: np.uint8) -> Any:  # noqa: ANN401
    """Return the number of a float8_e5m2."""
    return _number(code, 2, 15, 8, 0x7C)


def float8_e5m2_code(value: np.float32) -> np.uint8:
    """Round a number to float8_e5m2."""
    sign = (np.float32(value).view(np.uint32) >> 24) & 0x80
    return np.uint8(_code(value, 0, 0, 2, 15, 0x7C, 0x7E) | sign)


def float8_e5m2_drawn(value: np.float32, word: np.uint32) -> np.uint8:
    """Round a number to float8_e5m2 stochastically."""
    sign = (np.float32(value).view(np.uint32) >> 24) & 0x80
    return np.uint8(_code(value, np.int64(word), 0x47600000, 2, 15, 0x7C, 0x7E) | sign)


def float8_e4m3fn_value(code: np.uint8) -> Any:  # noqa: ANN401
    """Return the number of a float8_e4m3fn, which has no infinity."""
    return _number(code, 3, 7, 8, 0)


def float8_e4m3fn_code(value: np.float32) -> np.uint8:
    """Round a number to float8_e4m3fn."""
    sign = (np.float32(value).view(np.uint32) >> 24) & 0x80
    return np.uint8(_code(value, 0, 0, 3, 7, 0x7F, 0x7F) | sign)


def float8_e4m3fn_drawn(value: np.float32, word: np.uint32) -> np.uint8:
    """Round a number to float8_e4m3fn stochastically."""
    sign = (np.float32(value).view(np.uint32) >> 24) & 0x80
    return np.uint8(_code(value, np.int64(word), 0x43E00000, 3, 7, 0x7F, 0x7F) | sign)


def _value(code: Any) -> Any:  # noqa: ANN401
    """Hold the place of one of the functions that return the number of a code."""


def _rounded(value: Any) -> Any:  # noqa: ANN401
    """Hold the place of one of the functions that round to nearest."""


def _drawn(value: Any, word: Any) -> Any:  # noqa: ANN401
    """Hold the place of one of the functions that round stochastically."""


# ---- one row --------------------------------------------------------------------------------------------------
#
# `data` is memory for the bytes of one row, and `codes` the same memory as the integers of a type, or as float32.


def bytes_as_codes(data: Bytes) -> Bytes:
    """Return the bytes of a row as they are."""
    return data


def bytes_as_words(data: Bytes) -> NDArray[np.uint16]:
    """Return the bytes of a row as integers of 16 bits."""
    return data.view(np.uint16)


def bytes_as_floats(data: Bytes) -> Float32Array:
    """Return the bytes of a row as float32."""
    return data.view(np.float32)


def decode(data: Bytes, codes: Any, target: Float32Array, block: int) -> None:  # noqa: ANN401
    """Decode values."""
    for j in range(target.size):
        target[j] = _value(codes[j])


def encode(source: Float32Array, data: Bytes, codes: Any, words: Words, block: int) -> None:  # noqa: ANN401
    """Encode values."""
    for j in range(source.size):
        codes[j] = _rounded(source[j])


def encode_drawn(source: Float32Array, data: Bytes, codes: Any, words: Words, block: int) -> None:  # noqa: ANN401
    """Encode values, rounded stochastically."""
    for j in range(source.size):
        codes[j] = _drawn(source[j], words[j])


def same(value: Any) -> Any:  # noqa: ANN401
    """Return a value: float32 is neither decoded nor encoded."""
    return value


def same_drawn(value: Any, word: Any) -> Any:  # noqa: ANN401
    """Return a value: float32 is not rounded."""
    return value


def _float_at(data: Bytes, at: int) -> np.float32:
    """Return the float32 of four bytes, which may begin anywhere."""
    bits = np.uint32(data[at]) | np.uint32(np.uint32(data[at + 1]) << np.uint32(8))
    bits |= np.uint32(np.uint32(data[at + 2]) << np.uint32(16)) | np.uint32(
        np.uint32(data[at + 3]) << np.uint32(24)
    )
    return np.uint32(bits).view(np.float32)


def _set_float(data: Bytes, at: int, value: np.float32) -> None:
    """Write a float32 to four bytes, which may begin anywhere."""
    bits = np.float32(value).view(np.uint32)
    for k in range(4):
        data[at + k] = np.uint8((bits >> np.uint32(8 * k)) & np.uint32(255))


# ---- one row, a scale for all of it ---------------------------------------------------------------------------

_RANDOM_UNIT = np.float32(2.0**-24)
_TINIEST = np.float32(2.0**-100)


def _ends(values: Float32Array) -> tuple[np.float32, np.float32]:
    """Return the least and the largest of finite values; NaN for both if one is not finite."""
    # As integers in the order of the numbers: LLVM does not vectorise a minimum of floats, because of NaN.
    bits = values.view(np.int32)
    least, largest = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for j in range(bits.size):
        ordered = np.int32(bits[j] ^ np.int32(np.int32(bits[j] >> 31) & np.int32(0x7FFFFFFF)))
        least, largest = min(least, ordered), max(largest, ordered)
    low = np.int32(least ^ np.int32(np.int32(least >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    high = np.int32(largest ^ np.int32(np.int32(largest >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    if not (np.isfinite(low) and np.isfinite(high)):
        return np.float32(np.nan), np.float32(np.nan)
    return low, high


def decode_biased(data: Bytes, codes: Bytes, target: Float32Array, block: int) -> None:
    """Decode a row of FBGEMM's fused 8-bit layout: uint8, then scale and bias."""
    dim = target.size
    scale, bias = _float_at(data, dim), _float_at(data, dim + 4)
    for j in range(dim):
        target[j] = np.float32(codes[j]) * scale + bias


def _set_biased(data: Bytes, dim: int, low: np.float32, high: np.float32) -> None:
    """Write scale and bias of a row."""
    _set_float(data, dim, np.float32(high - low) / np.float32(255))
    _set_float(data, dim + 4, low + np.float32(0))  # no negative zero


def encode_biased(source: Float32Array, data: Bytes, codes: Bytes, words: Words, block: int) -> None:
    """Encode a row in FBGEMM's fused 8-bit layout, by its formula."""
    low, high = _ends(source)
    inverse = np.float32(255) / np.float32(np.float32(high - low) + np.float32(1e-8))
    _set_biased(data, source.size, low, high)
    for j in range(source.size):
        scaled = np.float32(np.float32(source[j] - low) * inverse)
        scaled = np.float32(255) if scaled > np.float32(255) else scaled
        codes[j] = np.uint8(np.int32(np.rint(scaled if scaled >= np.float32(0) else np.float32(0))))


def encode_biased_drawn(source: Float32Array, data: Bytes, codes: Bytes, words: Words, block: int) -> None:
    """Do what `encode_biased` does, rounded stochastically."""
    low, high = _ends(source)
    inverse = np.float32(255) / np.float32(np.float32(high - low) + np.float32(1e-8))
    _set_biased(data, source.size, low, high)
    for j in range(source.size):
        unit = np.float32(np.int32(words[j] >> np.uint32(8))) * _RANDOM_UNIT
        scaled = np.float32(np.float32(source[j] - low) * inverse) + unit
        scaled = np.float32(255) if scaled > np.float32(255) else scaled
        codes[j] = np.uint8(np.int32(np.floor(scaled if scaled >= np.float32(0) else np.float32(0))))


def decode_symmetric(data: Bytes, codes: Bytes, target: Float32Array, block: int) -> None:
    """Decode a row of int8 with a scale."""
    dim = target.size
    scale = _float_at(data, dim)
    for j in range(dim):
        target[j] = np.float32(np.int8(codes[j])) * scale


def _set_symmetric(source: Float32Array, data: Bytes) -> np.float32:
    """Write the scale of a row; return by what its values are multiplied."""
    low, high = _ends(source)
    most = np.float32(max(-low, high))
    scale = np.float32(0) if most < _TINIEST else most / np.float32(127)
    _set_float(data, source.size, scale)
    return np.float32(127) / most if most >= _TINIEST else np.float32(0)


def encode_symmetric(source: Float32Array, data: Bytes, codes: Bytes, words: Words, block: int) -> None:
    """Encode a row as int8 with a scale."""
    inverse = _set_symmetric(source, data)
    for j in range(source.size):
        scaled = np.float32(source[j] * inverse)
        number = np.int32(np.rint(scaled if abs(scaled) <= np.float32(128) else np.float32(0)))
        codes[j] = np.uint8(number & 255)


def encode_symmetric_drawn(source: Float32Array, data: Bytes, codes: Bytes, words: Words, block: int) -> None:
    """Do what `encode_symmetric` does, rounded stochastically."""
    inverse = _set_symmetric(source, data)
    for j in range(source.size):
        unit = np.float32(np.int32(words[j] >> np.uint32(8))) * _RANDOM_UNIT
        scaled = np.floor(np.float32(source[j] * inverse) + unit)
        scaled = np.float32(127) if scaled > np.float32(127) else scaled
        codes[j] = np.uint8(np.int32(scaled if scaled >= np.float32(-127) else np.float32(0)) & 255)


# ---- one row, a power of two as the scale of each block -------------------------------------------------------


def _scale_value(code: np.uint8) -> np.float32:
    """Return the number of a float8_e8m0fnu: ``2**(code - 127)``, NaN for 255."""
    bits = np.uint32(np.uint32(code) << np.uint32(23)) if code else np.uint32(0x400000)
    chosen = _QUIET_NAN if code == 255 else bits
    return np.uint32(chosen).view(np.float32)


def _scale_code(values: Float32Array, start: int, stop: int, exponent: int) -> Any:  # noqa: ANN401
    """Return the least scale with which the largest of some values is at most ``1.75 * 2**exponent``; 255 for NaN."""
    most = np.int32(0)
    for j in range(np.uint64(start), np.uint64(stop)):
        most = max(most, np.int32(np.float32(values[j]).view(np.int32) & np.int32(0x7FFFFFFF)))
    if most >= 0x7F800000:
        return 255
    scale = (most >> 23) - exponent + (1 if (most & 0x7FFFFF) > 0x600000 else 0)
    return max(scale, 0)


def _largest_exponent() -> int:
    """Hold the place of the exponent of the largest number of a type, whose significand is 1.75."""
    return 0


def _e4m3fn_exponent() -> int:
    return 8


def _e5m2_exponent() -> int:
    return 15


# Unsigned positions: numba would look at each of the others whether it counts from the end.


def decode_blocks(data: Bytes, codes: Bytes, target: Float32Array, block: int) -> None:
    """Decode values of one byte, whose blocks have scales."""
    dim = target.size
    for j in range(dim):
        target[j] = _value(codes[j])
    for k in range((dim + block - 1) // block):
        scale = _scale_value(codes[dim + k])
        for j in range(np.uint64(k * block), np.uint64(min((k + 1) * block, dim))):
            target[j] *= scale


def encode_blocks(source: Float32Array, data: Bytes, codes: Bytes, words: Words, block: int) -> None:
    """Encode values of one byte, whose blocks have scales."""
    dim = source.size
    for k in range((dim + block - 1) // block):
        start, stop = k * block, min((k + 1) * block, dim)
        scale = _scale_code(source, start, stop, _largest_exponent())
        codes[dim + k] = np.uint8(scale)
        inverse = np.uint32((254 - min(scale, 254)) << 23).view(np.float32)
        for j in range(np.uint64(start), np.uint64(stop)):
            codes[j] = _rounded(np.float32(source[j] * inverse))


def encode_blocks_drawn(source: Float32Array, data: Bytes, codes: Bytes, words: Words, block: int) -> None:
    """Do what `encode_blocks` does, rounded stochastically."""
    dim = source.size
    for k in range((dim + block - 1) // block):
        start, stop = k * block, min((k + 1) * block, dim)
        scale = _scale_code(source, start, stop, _largest_exponent())
        codes[dim + k] = np.uint8(scale)
        inverse = np.uint32((254 - min(scale, 254)) << 23).view(np.float32)
        for j in range(np.uint64(start), np.uint64(stop)):
            codes[j] = _drawn(np.float32(source[j] * inverse), words[j])


# ---- from one type to another ---------------------------------------------------------------------------------


def decode_only(data: Bytes, codes: Any, row: Float32Array, target: Float32Array, block: int) -> None:  # noqa: ANN401
    """Decode values to where they are wanted as float32; `row` is not needed."""
    _decode(data, codes, target, block)


def decode_and_round(data: Bytes, codes: Any, row: Float32Array, target: Any, block: int) -> None:  # noqa: ANN401
    """Decode values to the scratch `row`, and round them to the type that is wanted."""
    _decode(data, codes, row, block)
    for j in range(target.size):
        target[j] = _rounded(row[j])


def _decode(data: Any, codes: Any, target: Any, block: Any) -> None:  # noqa: ANN401
    """Hold the place of one of the functions above that decode a row."""


# A float8 becomes a bfloat16 without becoming a float32, `CONVERTED` of them at a time. Where fewer are left, those
# that follow are converted too: they get their own scale later, and after the last there is memory for so many.


def _to_bfloat16(target: Any, codes: Any, start: Any, stop: Any, scale: Any) -> None:  # noqa: ANN401
    """Hold the place of one of the two functions that follow."""


def e4m3fn_to_bfloat16(target: Any, codes: Bytes, start: int, stop: int, scale: int) -> None:  # noqa: ANN401
    """Convert float8_e4m3fn times a scale that `e4m3fn_range` has."""
    for j in range(start, stop, CONVERTED):
        float8_to_bfloat16(3, target.ctypes.data + 2 * j, codes.ctypes.data + j, (scale - 7) << 7)


def e5m2_to_bfloat16(target: Any, codes: Bytes, start: int, stop: int, scale: int) -> None:  # noqa: ANN401
    """Convert float8_e5m2 times a scale that `e5m2_range` has."""
    for j in range(start, stop, CONVERTED):
        float8_to_bfloat16(2, target.ctypes.data + 2 * j, codes.ctypes.data + j, (scale - 15) << 7)


def e4m3fn_range(scale: int) -> bool:
    """Whether no float8_e4m3fn becomes too small or too large for a normal bfloat16 by a scale."""
    return 10 <= scale <= 246


def e5m2_range(scale: int) -> bool:
    """Whether no float8_e5m2 becomes too small or too large for a normal bfloat16 by a scale."""
    return 17 <= scale <= 239


def _in_range(scale: Any) -> Any:  # noqa: ANN401
    """Hold the place of one of them."""


_ONE = 127
"""The scale that means 1."""


def to_bfloat16(data: Bytes, codes: Bytes, row: Float32Array, target: Any, block: int) -> None:  # noqa: ANN401
    """Convert float8 to bfloat16."""
    _to_bfloat16(target, codes, 0, target.size, _ONE)


def blocks_to_bfloat16(data: Bytes, codes: Bytes, row: Float32Array, target: Any, block: int) -> None:  # noqa: ANN401
    """Convert float8, whose blocks have scales, to bfloat16."""
    dim, start, last = target.size, 0, target.size
    while start < dim:
        scale, stop = np.int64(codes[last]), min(start + block, dim)
        if _in_range(scale):
            _to_bfloat16(target, codes, start, stop, scale)
        else:
            factor = _scale_value(codes[last])
            for j in range(np.uint64(start), np.uint64(stop)):
                target[j] = _rounded(np.float32(_value(codes[j]) * factor))
        start, last = stop, last + 1


# ---- the codecs of types --------------------------------------------------------------------------------------


def draw_words(words: Words, row: int, key: np.uint64, step: int) -> None:
    """Fill `words` with the random words of a row and a step."""
    high = np.uint64(step) << np.uint64(32)
    for block in range((words.size + 3) // 4):
        four = _philox(np.uint64(row), high | np.uint64(block), key)
        first, rest = 4 * block, words.size - 4 * block
        words[first] = four[0]
        if rest > 1:
            words[first + 1] = four[1]
        if rest > 2:
            words[first + 2] = four[2]
        if rest > 3:
            words[first + 3] = four[3]


def draw_nothing(words: Words, row: int, key: np.uint64, step: int) -> None:
    """Leave `words` as they are: rounding to nearest needs none."""


def _philox(row: Any, block: Any, key: Any) -> Any:  # noqa: ANN401
    """Hold the place of `sampling.philox`."""


def drawing(*, drawn: bool) -> Callable[..., Any]:
    """Return the compiled function that fills the words for rounding, or leaves them as they are."""
    return formula(draw_words, _philox=formula(sampling.philox)) if drawn else formula(draw_nothing)


_Functions = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]

# The number of a code, and rounding to nearest and stochastically.
_VALUES: dict[str, _Functions] = {
    "float32": (same, same, same_drawn),
    "bfloat16": (bfloat16_value, bfloat16_code, bfloat16_drawn),
    "float16": (float16_value, float16_code, float16_drawn),
    "float8_e4m3fn": (float8_e4m3fn_value, float8_e4m3fn_code, float8_e4m3fn_drawn),
    "float8_e5m2": (float8_e5m2_value, float8_e5m2_code, float8_e5m2_drawn),
}
_EXPONENTS = {"float8_e4m3fn": _e4m3fn_exponent, "float8_e5m2": _e5m2_exponent}
_VIEWS = {1: bytes_as_codes, 2: bytes_as_words, 4: bytes_as_floats}

_SHORT = {
    "float8_e4m3fn": (e4m3fn_to_bfloat16, e4m3fn_range),
    "float8_e5m2": (e5m2_to_bfloat16, e5m2_range),
}

# Decoding a row, and encoding it to nearest and stochastically.
_PLAIN: _Functions = (decode, encode, encode_drawn)
_BLOCKS: _Functions = (decode_blocks, encode_blocks, encode_blocks_drawn)
_BIASED: _Functions = (decode_biased, encode_biased, encode_biased_drawn)
_SYMMETRIC: _Functions = (decode_symmetric, encode_symmetric, encode_symmetric_drawn)


def viewer(dtype: Dtype) -> Callable[..., Any]:
    """Return the compiled function from the bytes of a row to the same memory as `codes`."""
    return formula(_VIEWS[ITEM_BYTES[dtype.columns(1)["weight"][0]]])


def decoder(dtype: Dtype) -> Callable[..., Any]:
    """Return ``decode(data, codes, target, block)`` of a type, compiled."""
    columns = dtype.columns(1)
    kind = columns["weight"][0]
    if kind not in _VALUES:
        floats = formula(_float_at)
        return formula((_BIASED if "bias" in columns else _SYMMETRIC)[0], _float_at=floats)
    value = number(kind)
    if dtype.block_size:
        return formula(_BLOCKS[0], _value=value, _scale_value=formula(_scale_value))
    return formula(_PLAIN[0], _value=value)


def encoder(dtype: Dtype, *, drawn: bool) -> Callable[..., Any]:
    """Return ``encode(source, data, codes, words, block)`` of a type, compiled.

    It rounds stochastically if the words are `drawn`.
    """
    columns = dtype.columns(1)
    kind, which = columns["weight"][0], 2 if drawn else 1
    if kind not in _VALUES:
        ends, floats = formula(_ends), formula(_set_float)
        if "bias" in columns:
            return formula(_BIASED[which], _ends=ends, _set_biased=formula(_set_biased, _set_float=floats))
        both = formula(_set_symmetric, _ends=ends, _set_float=floats)
        return formula(_SYMMETRIC[which], _set_symmetric=both)
    one = {"_drawn" if drawn else "_rounded": rounding(kind, drawn=drawn)}
    if not dtype.block_size:
        return formula(_PLAIN[which], **one)
    largest = formula(_EXPONENTS[kind])
    return formula(_BLOCKS[which], **one, _scale_code=formula(_scale_code), _largest_exponent=largest)


def converter(stored: Dtype, wanted: str) -> Callable[..., Any]:
    """Return ``convert(data, codes, row, target, block)`` from a type to the values of another, compiled.

    `row` is float32, and as long as `target`.
    """
    kind = stored.columns(1)["weight"][0]
    if wanted == "bfloat16" and kind in _SHORT:
        convert, in_range = _SHORT[kind]
        many = {"_to_bfloat16": formula(convert)}
        if not stored.block_size:
            return formula(to_bfloat16, **many)
        exactly = {"_scale_value": formula(_scale_value), "_rounded": formula(bfloat16_code)}
        exactly |= {"_value": number(kind), "_in_range": formula(in_range)}
        return formula(blocks_to_bfloat16, **many, **exactly)
    if wanted == "float32":
        return formula(decode_only, _decode=decoder(stored))
    return formula(decode_and_round, _decode=decoder(stored), _rounded=rounding(wanted, drawn=False))


def number(kind: str) -> Callable[..., Any]:
    """Return the compiled function from a code of a float type to its number."""
    helpers = {} if kind in ("float32", "bfloat16") else {"_number": formula(_number)}
    return formula(_VALUES[kind][0], **helpers)


def rounding(kind: str, *, drawn: bool) -> Callable[..., Any]:
    """Return the compiled function that rounds a number to a float type."""
    helpers = {} if kind in ("float32", "bfloat16") else {"_code": formula(_code)}
    return formula(_VALUES[kind][2 if drawn else 1], **helpers)
