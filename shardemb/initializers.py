"""What a row holds before it is first written: a pure function of (seed, table, row, column).

The value does not depend on the shard size, the batch, the threads or the machine, and takes no disk space. Random
values come from a counter-based generator, Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
2011). Its counter is (row, block of four columns); its key is `stream_key` of the seed and the table.

Each initializer is a frozen dataclass with its `parameters` and `fill_rows`, a plain function that writes rows.
``compute/row_kernels.py`` compiles it. It uses only operations that IEEE 754 rounds correctly (no call into libm), so
every machine computes the same bits.

Their loops are written so that a compiler can vectorise them: each does one step of the computation for all columns of
a row, has a body without branches, and leaves its results in memory for the next one. What only few columns need is
deferred until many rows have such columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from shardemb.base import serialization, validation
from shardemb.base.sampling import draw, fill_normal, middle_words, normal_cdf, unit
from shardemb.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import ArrayLike, NDArray

    from shardemb.base.validation import Float32Array, Int64Array

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


@dataclass(frozen=True)
class Initializer(ABC):
    """Base class of all initializers; use one of its subclasses."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            # Scalars of NumPy become floats and ints, which JSON can hold.
            if each.type in ("float", "float | None"):
                object.__setattr__(self, each.name, validation.number(value, each.name))
            else:
                object.__setattr__(
                    self, each.name, validation.count(value, each.name, minimum=0, maximum=2**64 - 1)
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
        """Set ``out[places[k]]`` to the initial weight of row ``rows[k]``, for each k."""


@dataclass(frozen=True)
class Constant(Initializer):
    """Every value of a row that was never written is `value`.

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
        validation.number(self.high - self.low, "high - low")
        if not np.float32(self.low) < np.float32(self.high):
            msg = f"Uniform: low must be less than high in float32, got {self.low} and {self.high}"
            raise ValueError(msg)

    def parameters(self) -> tuple[float, ...]:  # noqa: D102
        # Rounding to float32 could yield high, so values are limited to the largest float32 below it.
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
    mean, std = validation.number(given.mean, "mean"), validation.number(given.std, "std")
    validation.number(abs(mean) + 7 * std, "abs(mean) + 7 * std")
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
    By inversion of the distribution function at one of 2**32 points, so no value is more than 6.34 `std` from `mean`.

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
        # Constants, so that the compiler removes the arithmetic: x + -0.0 is x, whatever x is. With 0.0 it could not,
        # because -0.0 + 0.0 is 0.0.
        fill_normal(out, places, rows, key, -0.0, 1.0, parameters)


@dataclass(frozen=True)
class TruncatedNormal(Initializer):
    """Normal distribution, truncated to ``[low, high]``.

    Parameters
    ----------
    mean, std : float
        Mean and standard deviation before truncation; ``std > 0``.
    low, high : float, optional
        Bounds of the values themselves (torch's `a` and `b`), ``low < high`` in float32. By default two `std` below
        and above `mean`, as in keras. At least a tenth of the distribution must lie between them.
    seed : int
        0 to 2**64 - 1. Two tables of different names draw different values from the same seed.

    Notes
    -----
    By inversion of the distribution function, so no value has to be drawn again. Truncated at two `std`, the values
    have a standard deviation of 0.88 `std`.

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
        """Return the probability below the lower bound, that between the bounds, and the sign of the values.

        If both bounds are above the mean, they are mirrored at it: small probabilities are more exact.
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


# ---- recipes, which depend on the table's shape ---------------------------------------------------------------

Fan: TypeAlias = Literal["fan_in", "fan_out", "fan_avg"]
Distribution: TypeAlias = Literal["truncated_normal", "normal", "uniform"]

_STD_WITHIN_TWO = 0.87962566103423978
"""Standard deviation of a standard normal distribution truncated to [-2, 2], as in keras."""


@dataclass(frozen=True)
class VarianceScaling:
    """A distribution around 0 of variance ``scale / fan``, which depends on the table's shape at creation, as in keras.

    `Store.create_table` turns it into a `TruncatedNormal`, `Normal` or `Uniform`. That is what the table stores and
    `Table.initializer` returns, so initial values do not change when the table grows.

    Parameters
    ----------
    scale : float
        Greater than 0.
    fan : {"fan_in", "fan_out", "fan_avg"}
        What to divide by: the number of embeddings, the embedding dim, or their mean. (This is how keras counts for a
        matrix of shape ``(num_embeddings, embedding_dim)``. The functions of ``torch.nn.init`` regard the same matrix
        as that of a linear layer, which is transposed: their ``fan_in`` is the embedding dim, and their ``fan_out`` the
        number of embeddings.)
    distribution : {"truncated_normal", "normal", "uniform"}
        The first is truncated at two standard deviations of the normal distribution; the variance is that after
        truncation.
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
        object.__setattr__(self, "scale", validation.number(self.scale, "scale"))
        object.__setattr__(self, "seed", validation.count(self.seed, "seed", minimum=0, maximum=2**64 - 1))
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


def GlorotUniform(seed: int = 0) -> VarianceScaling:  # noqa: N802 users know these as classes
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


# ---- what a table is created with, and what it stores ---------------------------------------------------------


Initial: TypeAlias = (
    "Initializer | VarianceScaling | ArrayLike | validation.Sliceable | Callable[[int, int], ArrayLike]"
)
"""What the argument `initializer` of a new table may be."""


def resolve(
    given: object, shape: tuple[int, int], count: int
) -> tuple[Initializer, validation.FirstRows | None]:
    """Return the initializer of a new table of a shape, and its first `count` rows if these are given.

    Raises
    ------
    TypeError, ValueError
        `given` is neither an initializer, nor an array of so many rows, nor a function of two numbers. (Errors in the
        *rows* of an array or function are found when they are read.)
    """
    if given is None:
        return Constant(0.0), None
    if isinstance(given, VarianceScaling):
        return given.for_shape(*shape), None
    if isinstance(given, Initializer):
        return given, None
    return Constant(0.0), validation.FirstRows(count, validation.initial_rows(given, (count, shape[1])))


def from_json(document: Mapping[str, object]) -> Initializer:
    """Build the initializer that `serialization.to_json` described.

    Raises
    ------
    FormatError
        This version does not know the initializer, or refuses its parameters.
    """
    if None in document.values():  # `TruncatedNormal` accepts it, but no version writes it
        msg = f"initializer {document.get('name')!r} has a field without a value"
        raise FormatError(msg)
    return serialization.from_json("initializer", INITIALIZERS, document)
