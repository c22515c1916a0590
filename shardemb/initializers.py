"""What a row holds before it is first written: a pure function of (seed, table, row, column).

The value never depends on the shard size, the batch, the threads or the machine, and costs no disk. The random
ones come from a counter-based generator, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011): the counter is (row, block of four columns), the key is `stream_key` of the seed and the table.

Each initializer is a frozen dataclass with its `parameters` and `fill_rows`, a plain function that writes rows.
``kernels.py`` compiles it. Only operations that IEEE 754 rounds correctly are used (no call into libm), so every
machine gets the same bits.

Their loops are written so that a compiler does many columns at a time: each takes one step of the way for all columns
of a row, has a body without branches, and passes what it made on in memory. What few columns need is put off until
many rows have some.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from shardemb import arrays, persisted
from shardemb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import ArrayLike, NDArray

    from shardemb.arrays import Float32Array, Int64Array

__all__ = [
    "Constant",
    "GlorotNormal",
    "GlorotUniform",
    "HeNormal",
    "HeUniform",
    "Initializer",
    "Normal",
    "TruncatedNormal",
    "Uniform",
    "VarianceScaling",
]

_MASK = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)
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
    """Natural logarithm of a normal positive float32 below 1, by + - * / alone (relative error below 3e-7)."""
    exponent = np.float32(0.0)
    while x < _ROOT_HALF:  # doubling is exact
        x += x
        exponent -= _ONE
    return log_scaled(x, exponent)


def log_scaled(x: np.float32, exponent: np.float32) -> np.float32:
    """Natural logarithm of x times two to the power of `exponent`, for x from sqrt(1/2) to sqrt(2)."""
    z = (x - _ONE) / (x + _ONE)
    w = z * z
    # log(x) = 2 atanh(z) with |z| < 0.172: five terms of its series reach float32.
    series = (((_SERIES[0] * w + _SERIES[1]) * w + _SERIES[2]) * w + _SERIES[3]) * w + _SERIES[4]
    return exponent * _LOG_2 + (z + z) * series


_SQUARE, _SHIFT = np.float32(0.180625), np.float32(1.6)
_A = tuple(map(np.float32, (59.10937472, 159.29113202, 50.434271938, 3.3871327179)))
_B = tuple(map(np.float32, (67.187563600, 78.757757664, 17.895169469, 1.0)))
_C = tuple(map(np.float32, (0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777)))
_D = tuple(map(np.float32, (0.12021132975, 0.73700164250, 1.0)))


def middle_quantile(q: np.float32) -> np.float32:
    """`normal_quantile` of 1/2 + q, for q from -0.425 to 0.425."""
    r = _SQUARE - q * q
    top = ((_A[0] * r + _A[1]) * r + _A[2]) * r + _A[3]
    bottom = ((_B[0] * r + _B[1]) * r + _B[2]) * r + _B[3]
    return q * top / bottom


def tail_quantile(log_p: np.float32) -> np.float32:
    """`normal_quantile` of p below 0.075 with its sign turned, from the logarithm of p."""
    r = np.sqrt(-log_p) - _SHIFT
    top = ((_C[0] * r + _C[1]) * r + _C[2]) * r + _C[3]
    quantile: np.float32 = top / ((_D[0] * r + _D[1]) * r + _D[2])
    return quantile


def normal_quantile(p: float) -> np.float32:
    """Inverse of the standard normal distribution (M. J. Wichura, algorithm AS 241, PPND7: about 5e-7).

    For p from 1e-10 to 1 - 1e-10, which no value of `unit` leaves: the algorithm's third interval is not needed. It is
    made for float32, in which a processor works out twice as many values at once as in float64; the probability itself,
    or what is missing to 1, needs float64 before it is rounded.
    """
    q = p - 0.5
    if abs(q) <= 0.425:
        return middle_quantile(np.float32(q))
    return -tail_quantile(log(np.float32(p))) if q < 0 else tail_quantile(log(np.float32(1.0 - p)))


_SMALLEST = 2.0**-33
"""The smallest value of `unit`."""


def normal_cdf(x: float) -> float:
    """Distribution function of the standard normal one at x <= 0, by `normal_quantile`, not below `_SMALLEST`.

    By bisection, because the same steps give the same bits everywhere, as ``math.erf`` does not.
    """
    below, above = _SMALLEST, 0.5
    if normal_quantile(below) >= x:
        return below
    for _ in range(64):  # from some step on the middle is one of the two
        middle = 0.5 * (below + above)
        if normal_quantile(middle) < x:
            below = middle
        else:
            above = middle
    return above


_TOGETHER = 2048
"""How many values, about, are worked out together: steps of one wait for each other, not for others."""


def fill_normal(
    out: Float32Array,
    places: Int64Array,
    rows: Int64Array,
    key: np.uint64,
    start: float,
    width: float,
    parameters: NDArray[np.float64],
) -> None:
    """Write rows of ``mean + std * normal_quantile(start + width * u)``, nothing of it outside ``[low, high]``.

    All values as if they were in the middle of the distribution, as most are; then those in its tails, which need a
    logarithm, again.
    """
    mean, std = np.float32(parameters[2]), np.float32(parameters[3])
    low, high = np.float32(parameters[4]), np.float32(parameters[5])
    offset, span = np.uint64(2**32 - int(parameters[6])), np.uint32(parameters[7])
    dim = out.shape[1]
    together = max(1, min(_TOGETHER // dim, places.size))
    size = (together * dim + 7) // 8 * 8
    words, flags, tails = np.zeros(size, np.uint32), np.zeros(size, np.uint8), np.zeros(size + 8, np.uint32)
    values, of_tails = words.view(np.float32), np.empty(size, np.float32)
    for begin in range(0, places.size, together):
        some = min(together, places.size - begin)
        for k in range(some):
            draw(words[k * dim : (k + 1) * dim], np.uint64(rows[begin + k]), key)
        for j in range(some * dim):
            flags[j] = np.uint32((np.uint64(words[j]) + offset) & _MASK) > span
        flags[some * dim :] = 0
        count = nonzero(flags, tails)
        # Whole vectors: items behind the last mean nothing.
        fill_tails(of_tails, words, tails[: (count + 7) // 8 * 8], start, width, parameters)
        for j in range(some * dim):
            value = mean + std * middle_quantile(np.float32(start + width * unit(words[j]) - 0.5))
            value = value if value > low else low
            values[j] = value if value < high else high
        for k in range(count):
            values[tails[k]] = of_tails[k]
        for k in range(some):
            line, first = out[places[begin + k]], k * dim
            for j in range(dim):
                line[j] = values[first + j]


def nonzero(flags: NDArray[np.uint8], places: NDArray[np.uint32]) -> int:
    """Write the places of the ones among `flags`, which are all 0 or 1, and return how many there are.

    Whole eights of `flags`; up to eight items of `places` behind those written mean nothing.
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
    """``out[k]`` becomes the value of ``words[tails[k]]``, which lies in a tail."""
    mean, std = np.float32(parameters[2]), np.float32(parameters[3])
    low, high = np.float32(parameters[4]), np.float32(parameters[5])
    ends, factors, exponents = np.empty((3, tails.size), np.float32)
    bits = ends.view(np.int32)
    for k in range(tails.size):
        p = start + width * unit(words[tails[k]])
        ends[k] = np.float32(p if p < 0.5 else 1.0 - p)  # the probability from the end it is near
        factors[k] = -std if p < 0.5 else std
    for k in range(tails.size):  # as `log` does, but by the bits: a number in [1/2, 1) and its exponent
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
    """Return the first word for which ``start + width * u`` lies in no tail, and how many more there are behind it.

    There are such words: at least a tenth of the distribution is drawn from, and no tail has as much.
    """

    def q(word: int) -> float:
        return start + width * unit(np.uint64(word)) - 0.5

    # Both conditions turn true once as the word grows.
    first = bisect_left(range(2**32), True, key=lambda word: q(word) >= -0.425)
    behind = bisect_left(range(2**32), True, key=lambda word: q(word) > 0.425)
    return float(first), float(behind - 1 - first)


@dataclass(frozen=True)
class Initializer(ABC):
    """What every initializer has; use one of its subclasses."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            # NumPy's scalars become what JSON can hold.
            if each.type in ("float", "float | None"):
                object.__setattr__(self, each.name, arrays.number(value, each.name))
            else:
                object.__setattr__(
                    self, each.name, arrays.count(value, each.name, minimum=0, maximum=2**64 - 1)
                )

    @abstractmethod
    def parameters(self) -> tuple[float, ...]:
        """Return the numbers that `fill_rows` reads."""

    @staticmethod
    @abstractmethod
    def fill_rows(
        out: Float32Array,
        places: Int64Array,
        rows: Int64Array,
        key: np.uint64,
        parameters: NDArray[np.float64],
    ) -> None:
        """``out[places[k]]`` becomes the weight of row ``rows[k]``, for each k."""


@dataclass(frozen=True)
class Constant(Initializer):
    """Every value of an untouched row is `value`.

    Parameters
    ----------
    value : float
        Rounded to float32.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.initializers.Constant(0.5)
    Constant(value=0.5)
    """

    value: float = 0.0

    def parameters(self) -> tuple[float, ...]:  # noqa: D102
        return (self.value,)

    @staticmethod
    def fill_rows(
        out: Float32Array,
        places: Int64Array,
        rows: Int64Array,
        key: np.uint64,
        parameters: NDArray[np.float64],
    ) -> None:
        """Write rows."""
        value = np.float32(parameters[0])
        for k in range(places.size):
            out[places[k], :] = value


@dataclass(frozen=True)
class Uniform(Initializer):
    """Uniform on ``[low, high)``.

    Parameters
    ----------
    low, high : float
        ``low < high``; both, and their difference, finite in float32.
    seed : int
        0 to 2**64 - 1. Two tables of different names draw different values from the same seed.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.initializers.Uniform(-0.05, 0.05, seed=1)
    Uniform(low=-0.05, high=0.05, seed=1)
    """

    low: float
    high: float
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        arrays.number(self.high - self.low, "high - low")
        if not np.float32(self.low) < np.float32(self.high):
            msg = f"Uniform: low must be less than high in float32, got {self.low} and {self.high}"
            raise ValueError(msg)

    def parameters(self) -> tuple[float, ...]:  # noqa: D102
        # Rounding to float32 could reach high: the largest float32 below it is the largest value.
        last = np.nextafter(np.float32(self.high), np.float32(self.low))
        return (self.low, self.high - self.low, float(last))

    @staticmethod
    def fill_rows(
        out: Float32Array,
        places: Int64Array,
        rows: Int64Array,
        key: np.uint64,
        parameters: NDArray[np.float64],
    ) -> None:
        """Write rows."""
        low, width, last = parameters[0], parameters[1], np.float32(parameters[2])
        for k in range(places.size):
            line = out[places[k]]
            words = line.view(np.uint32)
            draw(words, np.uint64(rows[k]), key)
            for j in range(line.size):
                value = np.float32(low + width * unit(words[j]))
                line[j] = value if value < last else last


def _check_normal(given: Normal | TruncatedNormal) -> None:
    mean, std = arrays.number(given.mean, "mean"), arrays.number(given.std, "std")
    arrays.number(abs(mean) + 7 * std, "abs(mean) + 7 * std")
    if not std > 0:
        msg = f"{type(given).__name__}: std must be greater than 0, got {std}"
        raise ValueError(msg)


@dataclass(frozen=True)
class Normal(Initializer):
    """Normal distribution.

    Parameters
    ----------
    mean, std : float
        Mean and standard deviation; ``std > 0``.
    seed : int
        0 to 2**64 - 1. Two tables of different names draw different values from the same seed.

    Notes
    -----
    By inversion of the distribution function at one of 2**32 points, so no value is further out than 6.34 `std`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.initializers.Normal(std=0.02, seed=1)
    Normal(mean=0.0, std=0.02, seed=1)
    """

    mean: float = 0.0
    std: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_normal(self)

    def parameters(self) -> tuple[float, ...]:  # noqa: D102
        return (0.0, 1.0, self.mean, self.std, -math.inf, math.inf, *middle_words(0.0, 1.0))

    @staticmethod
    def fill_rows(
        out: Float32Array,
        places: Int64Array,
        rows: Int64Array,
        key: np.uint64,
        parameters: NDArray[np.float64],
    ) -> None:
        """Write rows."""
        # Constants that a compiler sees through; what is added to -0.0 stays what it is, as not with 0.0.
        fill_normal(out, places, rows, key, -0.0, 1.0, parameters)


@dataclass(frozen=True)
class TruncatedNormal(Initializer):
    """Normal distribution, of which nothing lies outside ``[low, high]``.

    Parameters
    ----------
    mean, std : float
        Mean and standard deviation before the cut; ``std > 0``.
    low, high : float, optional
        Bounds, as the values have them (torch's `a` and `b`), ``low < high`` in float32. By default two `std` below
        and above `mean`, as in keras. At least a tenth of the distribution must lie between them.
    seed : int
        0 to 2**64 - 1. Two tables of different names draw different values from the same seed.

    Notes
    -----
    By inversion of the distribution function: none is drawn again. Cut at two `std`, values have a standard deviation
    of 0.88 `std`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.initializers.TruncatedNormal(std=0.5, seed=1)
    TruncatedNormal(mean=0.0, std=0.5, low=-1.0, high=1.0, seed=1)
    """

    mean: float = 0.0
    std: float = 1.0
    low: float | None = None
    high: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_normal(self)
        if self.low is None:
            object.__setattr__(self, "low", self.mean - 2 * self.std)
        if self.high is None:
            object.__setattr__(self, "high", self.mean + 2 * self.std)
        super().__post_init__()
        first, last = self._float32_bounds()
        if not first < last:
            msg = f"TruncatedNormal: low must be less than high in float32, got {self.low} and {self.high}"
            raise ValueError(msg)
        if not self._cut()[1] >= 0.1:
            msg = (
                f"TruncatedNormal: less than a tenth of the normal distribution of mean {self.mean} and "
                f"std {self.std} lies between low {self.low} and high {self.high}; use wider bounds, or Uniform"
            )
            raise ValueError(msg)

    def parameters(self) -> tuple[float, ...]:  # noqa: D102
        start, width, sign = self._cut()
        bounds = self._float32_bounds()
        return (start, width, self.mean, sign * self.std, *bounds, *middle_words(start, width))

    @staticmethod
    def fill_rows(
        out: Float32Array,
        places: Int64Array,
        rows: Int64Array,
        key: np.uint64,
        parameters: NDArray[np.float64],
    ) -> None:
        """Write rows."""
        fill_normal(out, places, rows, key, parameters[0], parameters[1], parameters)

    def _bounds(self) -> tuple[float, float]:
        assert self.low is not None
        assert self.high is not None
        return self.low, self.high

    def _float32_bounds(self) -> tuple[float, float]:
        """Return the smallest and the largest float32 within the bounds."""
        low, high = self._bounds()
        first, last = np.float32(low), np.float32(high)
        if float(first) < low:
            first = np.nextafter(first, np.float32(np.inf))
        if float(last) > high:
            last = np.nextafter(last, np.float32(-np.inf))
        return float(first), float(last)

    def _cut(self) -> tuple[float, float, float]:
        """Return where the part between the bounds begins among all probabilities, its size, and the sign of values.

        A part above the mean is turned over to below it, where probabilities are small and so more exact.
        """
        low, high = ((bound - self.mean) / self.std for bound in self._bounds())
        sign = 1.0
        if low > 0:
            low, high, sign = -high, -low, -1.0
        start = normal_cdf(low)
        stop = normal_cdf(high) if high <= 0 else 1.0 - normal_cdf(-high)
        return start, stop - start, sign


INITIALIZERS: dict[str, type[Initializer]] = {
    cls.__name__: cls for cls in (Constant, Uniform, Normal, TruncatedNormal)
}


# ---- recipes, which ask for the table's shape -----------------------------------------------------------------

Fan: TypeAlias = Literal["fan_in", "fan_out", "fan_avg"]
Distribution: TypeAlias = Literal["truncated_normal", "normal", "uniform"]

_STD_WITHIN_TWO = 0.87962566103423978
"""Standard deviation of a standard normal distribution cut at -2 and 2, as keras has it."""


@dataclass(frozen=True)
class VarianceScaling:
    """A distribution around 0 whose variance is ``scale / fan``, by the table's shape at creation, as in keras.

    `Store.create_table` makes a `TruncatedNormal`, `Normal` or `Uniform` of it, which is what the table keeps and
    `Table.initializer` shows: values do not change when a table grows.

    Parameters
    ----------
    scale : float
        Greater than 0.
    fan : {"fan_in", "fan_out", "fan_avg"}
        What to divide by: the number of embeddings, the embedding dim, or their mean. (So keras counts for a matrix of
        shape ``(num_embeddings, embedding_dim)``. The functions of ``torch.nn.init`` take the same matrix for that
        of a linear layer, transposed: their ``fan_in`` is the embedding dim, ``fan_out`` the number of embeddings.)
    distribution : {"truncated_normal", "normal", "uniform"}
        The first is cut at two standard deviations of the uncut one, and has the variance after the cut.
    seed : int
        0 to 2**64 - 1. Two tables of different names draw different values from the same seed.

    Notes
    -----
    Glorot's and He's initializers are `GlorotUniform`, `GlorotNormal`, `HeUniform` and `HeNormal`.

    Examples
    --------
    >>> import shardemb
    >>> recipe = shardemb.initializers.VarianceScaling(3.0, "fan_out", "uniform", seed=1)
    >>> recipe.for_shape(num_embeddings=1000, embedding_dim=4)
    Uniform(low=-1.5, high=1.5, seed=1)
    """

    scale: float = 1.0
    fan: Fan = "fan_avg"
    distribution: Distribution = "truncated_normal"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", arrays.number(self.scale, "scale"))
        object.__setattr__(self, "seed", arrays.count(self.seed, "seed", minimum=0, maximum=2**64 - 1))
        if not self.scale > 0:
            msg = f"VarianceScaling: scale must be greater than 0, got {self.scale}"
            raise ValueError(msg)
        for name, known in (
            ("fan", ("fan_in", "fan_out", "fan_avg")),
            ("distribution", ("truncated_normal", "normal", "uniform")),
        ):
            if getattr(self, name) not in known:
                msg = f"VarianceScaling: {name} must be one of {known}, got {getattr(self, name)!r}"
                raise ValueError(msg)

    def for_shape(self, num_embeddings: int, embedding_dim: int) -> Initializer:
        """Return the initializer of a table of that shape.

        Parameters
        ----------
        num_embeddings, embedding_dim : int
            The table's.

        Returns
        -------
        TruncatedNormal, Normal or Uniform
        """
        fans = {
            "fan_in": num_embeddings,
            "fan_out": embedding_dim,
            "fan_avg": (num_embeddings + embedding_dim) / 2,
        }
        variance = self.scale / max(1.0, fans[self.fan])
        if self.distribution == "uniform":
            limit = math.sqrt(3.0 * variance)
            return Uniform(-limit, limit, seed=self.seed)
        if self.distribution == "normal":
            return Normal(0.0, math.sqrt(variance), seed=self.seed)
        return TruncatedNormal(0.0, math.sqrt(variance) / _STD_WITHIN_TWO, seed=self.seed)


def GlorotUniform(seed: int = 0) -> VarianceScaling:  # noqa: N802 these are known by names of classes
    """Draw uniformly within ``sqrt(6 / (num_embeddings + embedding_dim))`` of 0 (Glorot and Bengio, 2010; "Xavier").

    Parameters
    ----------
    seed : int
        As `VarianceScaling`.

    Examples
    --------
    >>> shardemb.initializers.GlorotUniform(seed=1)
    VarianceScaling(scale=1.0, fan='fan_avg', distribution='uniform', seed=1)
    """
    return VarianceScaling(1.0, "fan_avg", "uniform", seed)


def GlorotNormal(seed: int = 0) -> VarianceScaling:  # noqa: N802
    """Draw from a truncated normal of variance ``2 / (num_embeddings + embedding_dim)`` (Glorot and Bengio, 2010).

    Parameters
    ----------
    seed : int
        As `VarianceScaling`.

    Examples
    --------
    >>> shardemb.initializers.GlorotNormal(seed=1)
    VarianceScaling(scale=1.0, fan='fan_avg', distribution='truncated_normal', seed=1)
    """
    return VarianceScaling(1.0, "fan_avg", "truncated_normal", seed)


def HeUniform(seed: int = 0) -> VarianceScaling:  # noqa: N802
    """Draw uniformly within ``sqrt(6 / num_embeddings)`` of 0 (He et al., 2015; "Kaiming").

    Parameters
    ----------
    seed : int
        As `VarianceScaling`.

    Examples
    --------
    >>> shardemb.initializers.HeUniform(seed=1)
    VarianceScaling(scale=2.0, fan='fan_in', distribution='uniform', seed=1)
    """
    return VarianceScaling(2.0, "fan_in", "uniform", seed)


def HeNormal(seed: int = 0) -> VarianceScaling:  # noqa: N802
    """Draw from a truncated normal distribution of variance ``2 / num_embeddings`` (He et al., 2015; "Kaiming").

    Parameters
    ----------
    seed : int
        As `VarianceScaling`.

    Examples
    --------
    >>> shardemb.initializers.HeNormal(seed=1)
    VarianceScaling(scale=2.0, fan='fan_in', distribution='truncated_normal', seed=1)
    """
    return VarianceScaling(2.0, "fan_in", "truncated_normal", seed)


# ---- what a table is created with, and kept with --------------------------------------------------------------


Initial: TypeAlias = (
    "Initializer | VarianceScaling | ArrayLike | arrays.Sliceable | Callable[[int, int], ArrayLike]"
)
"""What a table can be created with."""


def resolve(given: object, shape: tuple[int, int]) -> tuple[Initializer, arrays.Rows | None]:
    """Tell what fresh rows of a new table hold from the rows that it is filled with at once.

    Raises
    ------
    TypeError, ValueError
        Neither an initializer, nor an array of that shape, nor a function of two numbers. (What is wrong with
        *rows* of the last two is seen when they are read.)
    """
    if given is None:
        return Constant(0.0), None
    if isinstance(given, VarianceScaling):
        return given.for_shape(*shape), None
    if isinstance(given, Initializer):
        return given, None
    return Constant(0.0), arrays.initial_rows(given, shape)


def stream_key(seed: int, stream: str) -> int:
    """Key of a table's generator: the first 8 bytes (little-endian) of BLAKE2b over the seed and the stream.

    The stream is the name under which the table was created, fixed from then on: two tables with one seed differ,
    a renamed table keeps its values, and the same program gives the same values in every store it makes.
    """
    message = seed.to_bytes(8, "little") + stream.encode()
    return int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")


def from_json(document: Mapping[str, object]) -> Initializer:
    """Build the initializer that `persisted.to_json` described.

    Raises
    ------
    FormatError
        Not one that this version knows, or parameters that it refuses.
    """
    if None in document.values():  # for `TruncatedNormal` that is a default, and a file has none
        msg = f"initializer {document.get('name')!r} has a field without a value"
        raise FormatError(msg)
    return persisted.from_json("initializer", INITIALIZERS, document)
