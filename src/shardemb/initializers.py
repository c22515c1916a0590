"""What a row holds before it is first written: a pure function of (seed, table, row, column).

The value never depends on the shard size, the batch, the threads or the machine, and costs no disk. The random
ones come from a counter-based generator, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", 2011): the counter is (row, block of four columns), the key is `stream_key` of the seed and the table.

Each initializer is a frozen dataclass with its `parameters` and `fill_row`, a plain function that writes one row.
``kernels.py`` compiles it. Only operations that IEEE 754 rounds correctly are used (no call into libm), so every
machine gets the same bits.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from shardemb import arrays, persisted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from shardemb.arrays import Float32Array

__all__ = ["Constant", "Initializer", "Normal", "Uniform"]

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


def unit(word: np.uint64) -> float:
    """Map a 32-bit word to the middle of its cell in (0, 1): never 0, never 1, symmetric about 1/2."""
    return (np.float64(word) + 0.5) * 2.0**-32


def log(x: float) -> float:
    """Natural logarithm of a normal positive float64 below 1, by + - * / alone (error below 1e-15)."""
    exponent = 0.0
    while x < 0.7071067811865476:  # halving and doubling are exact
        x *= 2.0
        exponent -= 1.0
    z = (x - 1.0) / (x + 1.0)
    w = z * z
    # log(x) = 2 atanh(z) with |z| < 0.172: eleven terms of its series reach float64.
    series = 0.0
    for k in range(21, 0, -2):
        series = series * w + 1.0 / k
    return exponent * 0.6931471805599453 + 2.0 * z * series


def normal_quantile(p: float) -> float:
    """Inverse of the standard normal distribution (M. J. Wichura, algorithm AS 241, PPND7: about 1e-7).

    For p from 1e-10 to 1 - 1e-10, which no value of `unit` leaves: the algorithm's third interval is not needed.
    """
    q = p - 0.5
    if abs(q) <= 0.425:
        r = 0.180625 - q * q
        top = ((59.10937472 * r + 159.29113202) * r + 50.434271938) * r + 3.3871327179
        bottom = ((67.187563600 * r + 78.757757664) * r + 17.895169469) * r + 1.0
        return q * top / bottom
    r = math.sqrt(-log(p if q < 0 else 1.0 - p))
    r -= 1.6
    top = ((0.17023821103 * r + 1.3067284816) * r + 2.7568153900) * r + 1.4234372777
    bottom = (0.12021132975 * r + 0.73700164250) * r + 1.0
    return -top / bottom if q < 0 else top / bottom


@dataclass(frozen=True)
class Initializer(ABC):
    """What every initializer has; use one of its subclasses."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            # NumPy's scalars become what JSON can hold.
            if each.type == "float":
                object.__setattr__(self, each.name, arrays.number(value, each.name))
            else:
                object.__setattr__(
                    self, each.name, arrays.count(value, each.name, minimum=0, maximum=2**64 - 1)
                )

    @abstractmethod
    def parameters(self) -> tuple[float, ...]:
        """Return the numbers that `fill_row` reads."""

    @staticmethod
    @abstractmethod
    def fill_row(out: Float32Array, row: np.uint64, key: np.uint64, parameters: NDArray[np.float64]) -> None:
        """Write one row."""


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
    def fill_row(out: Float32Array, row: np.uint64, key: np.uint64, parameters: NDArray[np.float64]) -> None:
        """Write one row."""
        value = np.float32(parameters[0])
        for j in range(out.size):
            out[j] = value


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
    def fill_row(out: Float32Array, row: np.uint64, key: np.uint64, parameters: NDArray[np.float64]) -> None:
        """Write one row."""
        low, width, last = parameters[0], parameters[1], np.float32(parameters[2])
        for block in range((out.size + 3) // 4):
            words = philox(row, np.uint64(block), key)
            for lane in range(min(4, out.size - 4 * block)):
                out[4 * block + lane] = min(np.float32(low + width * unit(words[lane])), last)


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
        arrays.number(abs(self.mean) + 7 * self.std, "abs(mean) + 7 * std")
        if not self.std > 0:
            msg = f"Normal: std must be greater than 0, got {self.std}"
            raise ValueError(msg)

    def parameters(self) -> tuple[float, ...]:  # noqa: D102
        return (self.mean, self.std)

    @staticmethod
    def fill_row(out: Float32Array, row: np.uint64, key: np.uint64, parameters: NDArray[np.float64]) -> None:
        """Write one row."""
        mean, std = parameters[0], parameters[1]
        for block in range((out.size + 3) // 4):
            words = philox(row, np.uint64(block), key)
            for lane in range(min(4, out.size - 4 * block)):
                out[4 * block + lane] = np.float32(mean + std * normal_quantile(unit(words[lane])))


INITIALIZERS: dict[str, type[Initializer]] = {cls.__name__: cls for cls in (Constant, Uniform, Normal)}


def resolve(given: object, shape: tuple[int, int]) -> tuple[Initializer, Float32Array | None]:
    """Tell what fresh rows of a new table hold from the rows that it is filled with at once.

    Raises
    ------
    TypeError, ValueError
        Neither an initializer nor an array of that shape.
    """
    if given is None:
        return Constant(0.0), None
    if isinstance(given, Initializer):
        return given, None
    if callable(given):
        msg = f"initializer must be one of shardemb.initializers or an array, got {given!r}"
        raise TypeError(msg)
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
    return persisted.from_json("initializer", INITIALIZERS, document)
