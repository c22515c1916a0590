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


def log(x: float) -> float:
    """Natural logarithm of a normal positive float64 below 1, by + - * / alone (error below 1e-15)."""
    exponent = 0.0
    while x < 0.7071067811865476:  # halving and doubling are exact
        x *= 2.0
        exponent -= 1.0
    return log_scaled(x, exponent)


def log_scaled(x: float, exponent: float) -> float:
    """Natural logarithm of x times two to the power of `exponent`, for x from sqrt(1/2) to sqrt(2)."""
    z = (x - 1.0) / (x + 1.0)
    w = z * z
    # log(x) = 2 atanh(z) with |z| < 0.172: eleven terms of its series reach float64.
    series = 0.0
    for k in range(21, 0, -2):
        series = series * w + 1.0 / k
    return exponent * 0.6931471805599453 + 2.0 * z * series


def middle_quantile(q: float) -> float:
    """`normal_quantile` of 1/2 + q, for q from -0.425 to 0.425."""
    r = 0.180625 - q * q
    top = ((59.10937472 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179
    bottom = ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0
    return q * top / bottom


def tail_quantile(log_p: float) -> float:
    """`normal_quantile` of p below 0.075 with its sign turned, from the logarithm of p."""
    r = math.sqrt(-log_p) - 1.6
    top = ((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777
    bottom = (0.12021132975 * r + 0.73700164250) * r + 1.0
    return top / bottom


def normal_quantile(p: float) -> float:
    """Inverse of the standard normal distribution (M. J. Wichura, algorithm AS 241, PPND7: about 1e-7).

    For p from 1e-10 to 1 - 1e-10, which no value of `unit` leaves: the algorithm's third interval is not needed.
    """
    q = p - 0.5
    if abs(q) <= 0.425:
        return middle_quantile(q)
    return -tail_quantile(log(p)) if q < 0 else tail_quantile(log(1.0 - p))


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


_PUT_OFF = 128
"""How many values in the tails, at least, are worked out together: steps of one wait for each other, not for others."""


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

    All columns as if they were in the middle of the distribution, as most are; then those in its tails, which need a
    logarithm, again. `notes` keeps of each of these the row in `out`, the column and the word.
    """
    mean, std, low, high = parameters[2], parameters[3], np.float32(parameters[4]), np.float32(parameters[5])
    first, span = np.int64(parameters[6]), np.int64(parameters[7])
    notes = np.empty((3, _PUT_OFF + out.shape[1] + 8), np.uint64)
    room = np.empty((4, notes.shape[1]))
    count = 0
    for k in range(places.size):
        if count >= _PUT_OFF:
            fill_tails(out, notes, count, start, width, parameters, room)
            count = 0
        line = out[places[k]]
        words = line.view(np.uint32)
        draw(words, np.uint64(rows[k]), key)
        for begin in range(0, line.size, 64):
            mask, part = np.uint64(0), words[begin : begin + 64]
            for j in range(part.size):
                is_tail = (np.int64(part[j]) - first) & _WORD > span
                mask |= np.uint64(is_tail) << np.uint64(j)
            while mask:
                column = np.uint64(begin + trailing_zeros(mask))
                mask &= mask - _1
                # An unsigned index is not looked at for counting from the end.
                notes[0, count], notes[1, count], notes[2, count] = (
                    np.uint64(places[k]),
                    column,
                    words[column],
                )
                count += 1
        for j in range(line.size):
            value = np.float32(mean + std * middle_quantile(start + width * unit(words[j]) - 0.5))
            value = value if value > low else low
            line[j] = value if value < high else high
    fill_tails(out, notes, count, start, width, parameters, room)


def fill_tails(
    out: Float32Array,
    notes: NDArray[np.uint64],
    count: int,
    start: float,
    width: float,
    parameters: NDArray[np.float64],
    room: NDArray[np.float64],
) -> None:
    """Write the `count` values in the tails of which `fill_normal` has taken note."""
    mean, std, low, high = parameters[2], parameters[3], np.float32(parameters[4]), np.float32(parameters[5])
    lines, columns, words = notes[0], notes[1], notes[2]
    ends, factors, exponents, values = room[0], room[1], room[2], room[3].view(np.float32)
    bits = ends.view(np.int64)
    padded = (count + 7) // 8 * 8  # whole vectors
    words[count:padded] = 0
    for k in range(padded):
        p = start + width * unit(words[k])
        ends[k] = p if p < 0.5 else 1.0 - p  # the probability from the end it is near
        factors[k] = -std if p < 0.5 else std
    for k in range(padded):  # as `log` does, but by the bits: a number in [1/2, 1) and its exponent
        exponents[k] = (bits[k] >> 52) - 1022
        bits[k] = (bits[k] & _FRACTION) | _ONE_HALF
    for k in range(padded):
        small = ends[k] < 0.7071067811865476
        x = ends[k] * 2.0 if small else ends[k]
        exponent = exponents[k] - 1.0 if small else exponents[k]
        value = np.float32(mean + factors[k] * tail_quantile(log_scaled(x, exponent)))
        value = value if value > low else low
        values[k] = value if value < high else high
    for k in range(count):
        out[lines[k], columns[k]] = values[k]


_1, _WORD = np.uint64(1), np.int64(2**32 - 1)
_FRACTION, _ONE_HALF = np.int64(2**52 - 1), np.int64(1022 << 52)


def trailing_zeros(word: np.uint64) -> int:
    """Position of the lowest set bit of a word, which has one."""
    return int(word & (~word + _1)).bit_length() - 1


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
