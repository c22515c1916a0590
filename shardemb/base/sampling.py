"""How initial values are drawn: a counter-based generator, and the normal distribution in float32.

The functions are plain Python that ``compute/compiler.py`` compiles. They use only operations that IEEE 754 rounds
correctly, in an order that is fixed, so every machine computes the same bits.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array


# The constants of Philox: two multipliers, and what a round adds to either half of the key.
_MASK, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLY_0, _MULTIPLY_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_BUMP_0, _BUMP_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)


def philox(
    row: np.uint64, block: np.uint64, key: np.uint64
) -> tuple[np.uint64, np.uint64, np.uint64, np.uint64]:
    """Philox4x32-10: four random 32-bit words for the counter (row, block) under a 64-bit key."""
    c0, c1, c2, c3 = row & _MASK, row >> _32, block & _MASK, block >> _32
    k0, k1 = key & _MASK, key >> _32
    for _ in range(10):
        p0, p1 = _MULTIPLY_0 * c0, _MULTIPLY_1 * c2
        c0, c1, c2, c3 = (p1 >> _32) ^ c1 ^ k0, p1 & _MASK, (p0 >> _32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _BUMP_0) & _MASK, (k1 + _BUMP_1) & _MASK
    return c0, c1, c2, c3


def draw(words: NDArray[np.uint32], row: np.uint64, key: np.uint64) -> None:
    """Fill `words` with the random words of a row, one for each column."""
    # Word j of block b belongs to column 4 * b + j, however wide the row is.
    whole = words.size // 4
    for block in range(whole):
        four = philox(row, np.uint64(block), key)
        words[4 * block], words[4 * block + 1], words[4 * block + 2], words[4 * block + 3] = four
    if words.size % 4:
        four = philox(row, np.uint64(whole), key)
        for j in range(4 * whole, words.size):
            words[j] = four[j % 4]


def unit(word: np.uint64 | np.uint32) -> float:
    """Map a 32-bit word to the middle of its cell in (0, 1): never 0, never 1, symmetric about 1/2."""
    return (np.float64(word) + 0.5) * 2.0**-32


_ONE, _ROOT_HALF, _LOG_2 = np.float32(1.0), np.float32(0.7071067811865476), np.float32(0.6931471805599453)
_SERIES = tuple(np.float32(1 / k) for k in (9, 7, 5, 3, 1))


def log(x: np.float32) -> np.float32:
    """Natural logarithm of a normal positive float32 below 1, with only + - * / (relative error below 3e-7)."""
    exponent = np.float32(0.0)
    while x < _ROOT_HALF:  # doubling is exact
        x += x
        exponent -= _ONE
    return log_scaled(x, exponent)


def log_scaled(x: np.float32, exponent: np.float32) -> np.float32:
    """Natural logarithm of ``x * 2**exponent``, for x from sqrt(1/2) to sqrt(2)."""
    z = (x - _ONE) / (x + _ONE)
    w = z * z
    # log(x) = 2 atanh(z) with |z| < 0.172: five terms of the series are enough for float32.
    series = (((_SERIES[0] * w + _SERIES[1]) * w + _SERIES[2]) * w + _SERIES[3]) * w + _SERIES[4]
    return exponent * _LOG_2 + (z + z) * series


# The coefficients of PPND7, see `normal_quantile`: A / B for the middle of the distribution, C / D for its tails.
_SQUARE, _SHIFT = np.float32(0.180625), np.float32(1.6)
_A = tuple(map(np.float32, (59.10937472, 159.29113202, 50.434271938, 3.3871327179)))
_B = tuple(map(np.float32, (67.187563600, 78.757757664, 17.895169469, 1.0)))
_C = tuple(map(np.float32, (0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777)))
_D = tuple(map(np.float32, (0.12021132975, 0.73700164250, 1.0)))


def middle_quantile(q: np.float32) -> np.float32:
    """Return the `normal_quantile` of 1/2 + q, for q from -0.425 to 0.425."""
    r = _SQUARE - q * q
    top = ((_A[0] * r + _A[1]) * r + _A[2]) * r + _A[3]
    bottom = ((_B[0] * r + _B[1]) * r + _B[2]) * r + _B[3]
    return q * top / bottom


def tail_quantile(log_p: np.float32) -> np.float32:
    """Return minus the `normal_quantile` of p, for p below 0.075, from the logarithm of p."""
    r = np.sqrt(-log_p) - _SHIFT
    top = ((_C[0] * r + _C[1]) * r + _C[2]) * r + _C[3]
    quantile: np.float32 = top / ((_D[0] * r + _D[1]) * r + _D[2])
    return quantile


def normal_quantile(p: float) -> np.float32:
    """Inverse of the standard normal distribution (M. J. Wichura, algorithm AS 241, PPND7: about 5e-7).

    For p from 1e-10 to 1 - 1e-10. All values of `unit` lie in there, so the algorithm's third interval is not needed.
    It works in float32, of which a vector register holds twice as many values as of float64. Only p itself, or 1 - p in
    the upper tail, has to be computed in float64 before it is rounded.
    """
    q = p - 0.5
    if abs(q) <= 0.425:
        return middle_quantile(np.float32(q))
    return -tail_quantile(log(np.float32(p))) if q < 0 else tail_quantile(log(np.float32(1.0 - p)))


_SMALLEST = 2.0**-33
"""The smallest value of `unit`."""


def normal_cdf(x: float) -> float:
    """Invert `normal_quantile`: the standard normal distribution function at x <= 0, at least `_SMALLEST`.

    By bisection: unlike ``math.erf``, its steps give the same bits on every machine.
    """
    below, above = _SMALLEST, 0.5
    if normal_quantile(below) >= x:
        return below
    for _ in range(64):  # enough for float64: in the end the middle is one of the two bounds
        middle = 0.5 * (below + above)
        if normal_quantile(middle) < x:
            below = middle
        else:
            above = middle
    return above


_BLOCK_VALUES = 2048
"""About how many values are computed as one block. The steps for one value depend on each other; values do not."""


def fill_normal(
    out: Float32Array,
    places: Int64Array,
    rows: Int64Array,
    key: np.uint64,
    start: float,
    width: float,
    parameters: NDArray[np.float64],
) -> None:
    """Write rows of ``mean + std * normal_quantile(start + width * u)``, clipped to ``[low, high]``.

    First it computes every value as if it were in the middle of the distribution, as most are. The values in the tails,
    which need a logarithm, are then computed again.
    """
    mean, std = np.float32(parameters[2]), np.float32(parameters[3])
    low, high = np.float32(parameters[4]), np.float32(parameters[5])
    offset, span = np.uint64(2**32 - int(parameters[6])), np.uint32(parameters[7])
    dim = out.shape[1]
    rows_per_block = max(1, min(_BLOCK_VALUES // dim, places.size))
    size = (rows_per_block * dim + 7) // 8 * 8  # whole eights, for `nonzero`
    # The words of a block are replaced by their values in place.
    words, flags, tails = np.zeros(size, np.uint32), np.zeros(size, np.uint8), np.zeros(size + 8, np.uint32)
    values, tail_values = words.view(np.float32), np.empty(size, np.float32)
    for begin in range(0, places.size, rows_per_block):
        count = min(rows_per_block, places.size - begin)
        for k in range(count):
            draw(words[k * dim : (k + 1) * dim], np.uint64(rows[begin + k]), key)
        # One unsigned comparison tells whether a word is below or above those of the middle.
        for j in range(count * dim):
            flags[j] = np.uint32((np.uint64(words[j]) + offset) & _MASK) > span
        flags[count * dim :] = 0
        num_tails = nonzero(flags, tails)
        # Rounded up to whole vectors; what is computed for items after the last is ignored.
        fill_tails(tail_values, words, tails[: (num_tails + 7) // 8 * 8], start, width, parameters)
        for j in range(count * dim):
            value = mean + std * middle_quantile(np.float32(start + width * unit(words[j]) - 0.5))
            value = value if value > low else low
            values[j] = value if value < high else high
        for k in range(num_tails):
            values[tails[k]] = tail_values[k]
        for k in range(count):
            line, first = out[places[begin + k]], k * dim
            for j in range(dim):
                line[j] = values[first + j]


def nonzero(flags: NDArray[np.uint8], places: NDArray[np.uint32]) -> int:
    """Write the indices of the ones among `flags`, which are all 0 or 1, and return how many there are.

    The size of `flags` is a multiple of eight. Up to eight items of `places` after the indices may be overwritten.
    """
    found = np.flatnonzero(flags)
    places[: found.size] = found
    return int(found.size)


def fill_tails(
    out: Float32Array,
    words: NDArray[np.uint32],
    tails: NDArray[np.uint32],
    start: float,
    width: float,
    parameters: NDArray[np.float64],
) -> None:
    """Set ``out[k]`` to the value of ``words[tails[k]]``, which lies in a tail.

    In several loops without branches, so that each of them is vectorised.
    """
    mean, std = np.float32(parameters[2]), np.float32(parameters[3])
    low, high = np.float32(parameters[4]), np.float32(parameters[5])
    ends, factors, exponents = np.empty((3, tails.size), np.float32)
    bits = ends.view(np.int32)
    for k in range(tails.size):
        p = start + width * unit(words[tails[k]])
        ends[k] = np.float32(p if p < 0.5 else 1.0 - p)  # probability, counted from the nearer end
        factors[k] = -std if p < 0.5 else std
    for k in range(tails.size):  # as `log`, but by the bits: a mantissa in [1/2, 1) and its exponent
        exponents[k] = (bits[k] >> 23) - 126
        bits[k] = (bits[k] & _FRACTION) | _ONE_HALF
    for k in range(tails.size):
        small = ends[k] < _ROOT_HALF
        x = ends[k] + ends[k] if small else ends[k]
        exponent = exponents[k] - _ONE if small else exponents[k]
        value = mean + factors[k] * tail_quantile(log_scaled(x, exponent))
        value = value if value > low else low
        out[k] = value if value < high else high


_FRACTION, _ONE_HALF = np.int32(2**23 - 1), np.int32(126 << 23)


def middle_words(start: float, width: float) -> tuple[float, float]:
    """Return the first word for which ``start + width * u`` lies in no tail, and how many more follow it.

    There always are such words: at least a tenth of the distribution is drawn from, and a tail is less than that.
    """

    def q(word: int) -> float:
        return start + width * unit(np.uint64(word)) - 0.5

    # Both conditions are false for small words and true for large ones, so bisection finds where they change.
    first = bisect_left(range(2**32), True, key=lambda word: q(word) >= -0.425)
    after = bisect_left(range(2**32), True, key=lambda word: q(word) > 0.425)
    return float(first), float(after - 1 - first)


def stream_key(seed: int, stream: str) -> int:
    """Key of a table's generator: the first 8 bytes (little-endian) of BLAKE2b over the seed and the stream.

    The stream is the name under which the table was created. It never changes after that, so two tables with one seed
    differ, a renamed table keeps its values, and a program gets the same values in every store that it creates.
    """
    message = seed.to_bytes(8, "little") + stream.encode()
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
