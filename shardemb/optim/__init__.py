"""Optimizers: one plain function over one row, plus the names of its state columns.

An optimizer is a frozen dataclass of its hyper-parameters with three facts about itself:

- `state_columns`: the names (torch's) and widths of the numbers it keeps beside each row;
- `scalars`: everything in its formula that is the same for all rows of one step, computed in float64;
- `row_step`: the formula, a function of one row's weight, state, gradient and those scalars.

``kernels.py`` compiles `row_step` into the loop over rows. To add an optimizer, add a class here and its test.

A row's gradient has its duplicates summed already, in the order of the batch. All arithmetic on rows is float32;
`step` counts the updates of the whole table, beginning with 1, as torch does, and not those of a row. Rows that
are not in a batch do not move, and neither does their state.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np

from shardemb import arrays, persisted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardemb.arrays import Float32Array

__all__ = ["SGD", "Adagrad", "Adam", "Optimizer", "RowWiseAdagrad"]


@dataclass(frozen=True)
class Optimizer(ABC):
    """What every optimizer has; use one of its subclasses."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.type == "float":  # NumPy's scalars become what JSON can hold
                value = arrays.number(getattr(self, each.name), each.name, minimum=0.0)
                object.__setattr__(self, each.name, value)

    @abstractmethod
    def state_columns(self, embedding_dim: int) -> dict[str, int]:
        """Name and width (values per row) of each state column, in the order of the record."""

    @abstractmethod
    def scalars(self, step: int) -> tuple[float, ...]:
        """Return the numbers that `row_step` reads, for the `step`-th update (1 for the first)."""

    @staticmethod
    @abstractmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place: `weight` and `gradient` of shape (dim,), all of its state in a row."""

    def initial_state(self) -> dict[str, float]:
        """Value that a state column starts from; columns not named start from zero."""
        return {}


@dataclass(frozen=True)
class SGD(Optimizer):
    """Plain stochastic gradient descent: ``w -= lr * g``.

    Parameters
    ----------
    lr : float
        Learning rate, at least 0.

    Notes
    -----
    Formula of ``torch.optim.SGD`` without momentum. No state.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.SGD(lr=0.1).state_columns(embedding_dim=64)
    {}
    """

    lr: float = 1e-2

    def state_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {}

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: D102
        return (self.lr,)

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        lr = scalars[0]
        for j in range(weight.size):
            weight[j] -= lr * gradient[j]


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad: each value divides its step by the root of its summed squared gradients.

    ``sum += g*g;  w -= lr_t * g / (sqrt(sum) + eps)`` with ``lr_t = lr / (1 + (step - 1) * lr_decay)``.

    Parameters
    ----------
    lr, lr_decay, eps : float
        Learning rate, its decay, and the number that keeps the division finite. At least 0.
    initial_accumulator_value : float
        What ``sum`` starts from. At least 0.

    Notes
    -----
    Formula and defaults of ``torch.optim.Adagrad`` for sparse gradients. State column ``sum``, shape (dim,).

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.Adagrad(lr=0.1).state_columns(embedding_dim=64)
    {'sum': 64}
    """

    lr: float = 1e-2
    lr_decay: float = 0.0
    eps: float = 1e-10
    initial_accumulator_value: float = 0.0

    def state_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"sum": embedding_dim}

    def initial_state(self) -> dict[str, float]:  # noqa: D102
        return {"sum": self.initial_accumulator_value}

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: D102
        return (self.lr / (1 + (step - 1) * self.lr_decay), self.eps)

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        lr, eps = scalars[0], scalars[1]
        for j in range(weight.size):
            state[j] += gradient[j] * gradient[j]
            weight[j] -= lr * (gradient[j] / (math.sqrt(state[j]) + eps))


@dataclass(frozen=True)
class RowWiseAdagrad(Optimizer):
    """Adagrad with one accumulator a row: the mean of the squared gradient over the row.

    ``sum += mean(g*g);  w -= lr / (sqrt(sum) + eps) * g``.

    Parameters
    ----------
    lr, eps : float
        Learning rate, and the number that keeps the division finite. At least 0.

    Notes
    -----
    Formula and defaults of FBGEMM's exact row-wise Adagrad without weight decay. State column ``sum``, one number
    a row. The mean is taken over eight interleaved partial sums, added pairwise.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.RowWiseAdagrad(lr=0.1).state_columns(embedding_dim=64)
    {'sum': 1}
    """

    lr: float = 1e-2
    eps: float = 1e-8

    def state_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"sum": 1}

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: D102
        return (self.lr, self.eps)

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        lr, eps = scalars[0], scalars[1]
        dim = weight.size
        # One running sum would wait for each addition before the next; the order of these is fixed all the same.
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = state.dtype.type(0)
        whole = dim - dim % 8
        for j in range(0, whole, 8):
            s0 += gradient[j] * gradient[j]
            s1 += gradient[j + 1] * gradient[j + 1]
            s2 += gradient[j + 2] * gradient[j + 2]
            s3 += gradient[j + 3] * gradient[j + 3]
            s4 += gradient[j + 4] * gradient[j + 4]
            s5 += gradient[j + 5] * gradient[j + 5]
            s6 += gradient[j + 6] * gradient[j + 6]
            s7 += gradient[j + 7] * gradient[j + 7]
        total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
        for j in range(whole, dim):
            total += gradient[j] * gradient[j]
        state[0] += total / weight.dtype.type(dim)
        factor = lr / (math.sqrt(state[0]) + eps)
        for j in range(dim):
            weight[j] -= factor * gradient[j]


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam on the rows of the batch alone ("lazy" Adam).

    ``m += (1 - b1) * (g - m);  v += (1 - b2) * (g*g - v);``
    ``w -= lr * sqrt(1 - b2**step) / (1 - b1**step) * (m / (sqrt(v) + eps))``.

    Parameters
    ----------
    lr : float
        Learning rate, at least 0.
    betas : tuple of two floats
        Decay of the first and of the second moment, in [0, 1).
    eps : float
        Keeps the division finite; not bias-corrected. At least 0.

    Notes
    -----
    Formula and defaults of ``torch.optim.SparseAdam``. State columns ``exp_avg`` and ``exp_avg_sq``, shape (dim,)
    each. The powers of the betas are taken in float64.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.Adam(lr=1e-3).state_columns(embedding_dim=64)
    {'exp_avg': 64, 'exp_avg_sq': 64}
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        # Lists are what JSON gives back; as a tuple the dataclass compares equal and hashes.
        given = self.betas if np.iterable(self.betas) else ()
        betas = tuple(arrays.number(beta, "betas", minimum=0.0) for beta in given)
        if len(betas) != 2 or max(betas) >= 1:
            msg = f"betas must be two numbers in [0, 1), got {self.betas!r}"
            raise ValueError(msg)
        object.__setattr__(self, "betas", betas)

    def state_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"exp_avg": embedding_dim, "exp_avg_sq": embedding_dim}

    def scalars(self, step: int) -> tuple[float, ...]:  # noqa: D102
        b1, b2 = self.betas
        step_size = self.lr * math.sqrt(1 - b2**step) / (1 - b1**step)
        return (1 - b1, 1 - b2, step_size, self.eps)

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        one_minus_b1, one_minus_b2, step_size, eps = scalars[0], scalars[1], scalars[2], scalars[3]
        dim = weight.size
        exp_avg, exp_avg_sq = state[:dim], state[dim:]
        for j in range(dim):
            g = gradient[j]
            exp_avg[j] += one_minus_b1 * (g - exp_avg[j])
            exp_avg_sq[j] += one_minus_b2 * (g * g - exp_avg_sq[j])
            weight[j] -= step_size * (exp_avg[j] / (math.sqrt(exp_avg_sq[j]) + eps))


OPTIMIZERS: dict[str, type[Optimizer]] = {cls.__name__: cls for cls in (SGD, Adagrad, RowWiseAdagrad, Adam)}


def from_json(document: Mapping[str, object]) -> Optimizer:
    """Build the optimizer that `persisted.to_json` described.

    Raises
    ------
    FormatError
        Not one that this version knows, or hyper-parameters that it refuses.
    """
    return persisted.from_json("optimizer", OPTIMIZERS, document)
