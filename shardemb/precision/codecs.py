"""From float32 to the bytes of a row and back: plain functions that ``compute/compiler.py`` compiles into kernels.

A codec is a pair of functions over one row, ``decode(source, target, block)`` and ``encode(source, target, words,
block)``: bytes to float32, and back. Loops over values have no branches, so that they are vectorised. Numbers are
rounded to nearest, ties to even; what is too large becomes infinity, or NaN in a type without infinity, as NumPy's
`astype` has it with the types of the package ml_dtypes.

Each `encode` has a twin that rounds stochastically: of the two neighbours of a number, the upper is chosen with a
probability of its distance to the lower, by one random word for each value. What is too large is rounded to nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import sampling
from shardemb.compute.compiler import formula
from shardemb.dtypes import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

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
    magnitude = np.uint32(code & ((1 << (width - 1)) - 1))
    sign = np.uint32(np.uint32(code >> (width - 1)) << np.uint32(31))
    shifted = np.uint32(magnitude << np.uint32(23 - mantissa))
    normal = np.uint32(shifted + np.uint32((127 - bias) << 23)).view(np.float32)
    # One exponent more, and the leading bit taken off again: exact, and no arithmetic with denormal numbers.
    lowest = np.uint32(np.uint32(128 - bias) << np.uint32(23))
    small = np.float32(np.uint32(shifted + lowest).view(np.float32) - np.uint32(lowest).view(np.float32))
    value = small if magnitude < np.uint32(1 << mantissa) else normal
    if infinity:
        special = np.uint32(_INFINITY | np.uint32(shifted & np.uint32(0x7FFFFF)))
        bits = special if magnitude >= np.uint32(infinity) else np.float32(value).view(np.uint32)
    else:
        bits = _QUIET_NAN if magnitude == np.uint32((1 << (width - 1)) - 1) else np.float32(value).view(np.uint32)
    return np.uint32(np.uint32(bits) | sign).view(np.float32)


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


def decode_float32(source: Bytes, target: Float32Array, block: int) -> None:
    """Copy float32."""
    values = source.view(np.float32)
    for j in range(target.size):
        target[j] = values[j]


def encode_float32(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Copy float32, which loses nothing."""
    values = target.view(np.float32)
    for j in range(source.size):
        values[j] = source[j]


def decode_16(source: Bytes, target: Float32Array, block: int) -> None:
    """Decode values of two bytes."""
    codes = source.view(np.uint16)
    for j in range(target.size):
        target[j] = _value(codes[j])


def encode_16(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Encode values of two bytes."""
    codes = target.view(np.uint16)
    for j in range(source.size):
        codes[j] = _rounded(source[j])


def encode_16_drawn(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Encode values of two bytes, rounded stochastically."""
    codes = target.view(np.uint16)
    for j in range(source.size):
        codes[j] = _drawn(source[j], words[j])


def decode_8(source: Bytes, target: Float32Array, block: int) -> None:
    """Decode values of one byte."""
    for j in range(target.size):
        target[j] = _value(source[j])


def encode_8(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Encode values of one byte."""
    for j in range(source.size):
        target[j] = _rounded(source[j])


def encode_8_drawn(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Encode values of one byte, rounded stochastically."""
    for j in range(source.size):
        target[j] = _drawn(source[j], words[j])


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


def decode_biased(source: Bytes, target: Float32Array, block: int) -> None:
    """Decode a row of FBGEMM's fused 8-bit layout: uint8, then scale and bias."""
    dim = target.size
    scales = source[dim : dim + 8].view(np.float32)
    scale, bias = scales[0], scales[1]
    for j in range(dim):
        target[j] = np.float32(source[j]) * scale + bias


def encode_biased(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Encode a row in FBGEMM's fused 8-bit layout, by its formula."""
    dim = source.size
    low, high = _ends(source)
    scales, span = target[dim : dim + 8].view(np.float32), np.float32(high - low)
    scales[0], scales[1] = span / np.float32(255), low + np.float32(0)  # no negative zero
    inverse = np.float32(255) / np.float32(span + np.float32(1e-8))
    for j in range(dim):
        scaled = np.float32(np.float32(source[j] - low) * inverse)
        scaled = np.float32(255) if scaled > np.float32(255) else scaled
        target[j] = np.uint8(np.int32(np.rint(scaled if scaled >= np.float32(0) else np.float32(0))))


def encode_biased_drawn(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Do what `encode_biased` does, rounded stochastically."""
    dim = source.size
    low, high = _ends(source)
    scales, span = target[dim : dim + 8].view(np.float32), np.float32(high - low)
    scales[0], scales[1] = span / np.float32(255), low + np.float32(0)  # no negative zero
    inverse = np.float32(255) / np.float32(span + np.float32(1e-8))
    for j in range(dim):
        unit = np.float32(np.int32(words[j] >> np.uint32(8))) * _RANDOM_UNIT
        scaled = np.float32(np.float32(source[j] - low) * inverse) + unit
        scaled = np.float32(255) if scaled > np.float32(255) else scaled
        target[j] = np.uint8(np.int32(np.floor(scaled if scaled >= np.float32(0) else np.float32(0))))


def decode_symmetric(source: Bytes, target: Float32Array, block: int) -> None:
    """Decode a row of int8 with a scale."""
    dim = target.size
    values, scale = source[:dim].view(np.int8), source[dim : dim + 4].view(np.float32)[0]
    for j in range(dim):
        target[j] = np.float32(values[j]) * scale


def encode_symmetric(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Encode a row as int8 with a scale."""
    dim = source.size
    low, high = _ends(source)
    most = np.float32(max(-low, high))
    target[dim : dim + 4].view(np.float32)[0] = (
        most / np.float32(127) if not most < _TINIEST else np.float32(0)
    )
    inverse = np.float32(127) / most if most >= _TINIEST else np.float32(0)
    values = target[:dim].view(np.int8)
    for j in range(dim):
        scaled = np.float32(source[j] * inverse)
        values[j] = np.int8(np.int32(np.rint(scaled if abs(scaled) <= np.float32(128) else np.float32(0))))


def encode_symmetric_drawn(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Do what `encode_symmetric` does, rounded stochastically."""
    dim = source.size
    low, high = _ends(source)
    most = np.float32(max(-low, high))
    target[dim : dim + 4].view(np.float32)[0] = (
        most / np.float32(127) if not most < _TINIEST else np.float32(0)
    )
    inverse = np.float32(127) / most if most >= _TINIEST else np.float32(0)
    values = target[:dim].view(np.int8)
    for j in range(dim):
        unit = np.float32(np.int32(words[j] >> np.uint32(8))) * _RANDOM_UNIT
        scaled = np.floor(np.float32(source[j] * inverse) + unit)
        scaled = np.float32(127) if scaled > np.float32(127) else scaled
        values[j] = np.int8(np.int32(scaled if scaled >= np.float32(-127) else np.float32(0)))


# ---- one row, a power of two as the scale of each block -------------------------------------------------------


def _scale_value(code: np.uint8) -> np.float32:
    """Return the number of a float8_e8m0fnu: ``2**(code - 127)``, NaN for 255."""
    bits = np.uint32(np.uint32(code) << np.uint32(23)) if code else np.uint32(0x400000)
    chosen = _QUIET_NAN if code == 255 else bits
    return np.uint32(chosen).view(np.float32)


def _scale_code(values: Float32Array, exponent: int) -> Any:  # noqa: ANN401
    """Return the least scale with which the largest of values is at most ``1.75 * 2**exponent``; 255 if one is NaN."""
    bits: Any = values.view(np.int32)
    most = np.int32(0)
    for j in range(bits.size):
        most = max(most, np.int32(bits[j] & np.int32(0x7FFFFFFF)))
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


def decode_blocks(source: Bytes, target: Float32Array, block: int) -> None:
    """Decode values of one byte, whose blocks have scales."""
    dim = target.size
    for k in range((dim + block - 1) // block):
        start, stop = k * block, min((k + 1) * block, dim)
        scale = _scale_value(source[dim + k])
        for j in range(start, stop):
            target[j] = np.float32(_value(source[j])) * scale


def encode_blocks(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Encode values of one byte, whose blocks have scales."""
    dim = source.size
    for k in range((dim + block - 1) // block):
        start, stop = k * block, min((k + 1) * block, dim)
        code = _scale_code(source[start:stop], _largest_exponent())
        target[dim + k] = np.uint8(code)
        inverse = np.uint32((254 - min(code, 254)) << 23).view(np.float32)
        for j in range(start, stop):
            target[j] = _rounded(np.float32(source[j] * inverse))


def encode_blocks_drawn(source: Float32Array, target: Bytes, words: Words, block: int) -> None:
    """Do what `encode_blocks` does, rounded stochastically."""
    dim = source.size
    for k in range((dim + block - 1) // block):
        start, stop = k * block, min((k + 1) * block, dim)
        code = _scale_code(source[start:stop], _largest_exponent())
        target[dim + k] = np.uint8(code)
        inverse = np.uint32((254 - min(code, 254)) << 23).view(np.float32)
        for j in range(start, stop):
            target[j] = _drawn(np.float32(source[j] * inverse), words[j])


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


_VALUES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "bfloat16": (bfloat16_value, bfloat16_code, bfloat16_drawn),
    "float16": (float16_value, float16_code, float16_drawn),
    "float8_e4m3fn": (float8_e4m3fn_value, float8_e4m3fn_code, float8_e4m3fn_drawn),
    "float8_e5m2": (float8_e5m2_value, float8_e5m2_code, float8_e5m2_drawn),
}
_EXPONENTS = {"float8_e4m3fn": _e4m3fn_exponent, "float8_e5m2": _e5m2_exponent}

# Decoding, rounding to nearest, rounding stochastically.
_PLAIN: dict[int, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    1: (decode_8, encode_8, encode_8_drawn),
    2: (decode_16, encode_16, encode_16_drawn),
}
_BLOCKS = decode_blocks, encode_blocks, encode_blocks_drawn
_ROWS: dict[bool, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    True: (decode_biased, encode_biased, encode_biased_drawn),
    False: (decode_symmetric, encode_symmetric, encode_symmetric_drawn),
}


def decoder(dtype: Dtype) -> Callable[..., Any]:
    """Return `decode` of a type, compiled."""
    columns = dtype.columns(1)
    kind = columns["weight"][0]
    if kind == "float32":
        return formula(decode_float32)
    if kind not in _VALUES:
        return formula(_ROWS["bias" in columns][0])
    helpers = {} if kind == "bfloat16" else {"_number": formula(_number)}
    value = formula(_VALUES[kind][0], **helpers)
    if dtype.block_size:
        return formula(_BLOCKS[0], _value=value, _scale_value=formula(_scale_value))
    return formula(_PLAIN[ITEM_BYTES[kind]][0], _value=value)


def encoder(dtype: Dtype, *, drawn: bool) -> Callable[..., Any]:
    """Return `encode` of a type, compiled: the one that rounds stochastically if the words are `drawn`."""
    columns = dtype.columns(1)
    kind, which = columns["weight"][0], 2 if drawn else 1
    if kind == "float32":
        return formula(encode_float32)
    if kind not in _VALUES:
        return formula(_ROWS["bias" in columns][which], _ends=formula(_ends))
    helpers = {} if kind == "bfloat16" else {"_code": formula(_code)}
    one = {"_drawn" if drawn else "_rounded": formula(_VALUES[kind][which], **helpers)}
    if not dtype.block_size:
        return formula(_PLAIN[ITEM_BYTES[kind]][which], **one)
    largest = formula(_EXPONENTS[kind])
    return formula(_BLOCKS[which], **one, _scale_code=formula(_scale_code), _largest_exponent=largest)
