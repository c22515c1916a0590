"""Adagrad, with one accumulator per value or one per row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardemb.optim.base import Optimizer

if TYPE_CHECKING:
    from shardemb.base.validation import Float32Array


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """Adagrad: the step of each value is divided by the root of the sum of its squared gradients.

    ``sum += g*g;  w -= lr_t * g / (sqrt(sum) + eps)`` with ``lr_t = lr / (1 + (step - 1) * lr_decay)``.

    Parameters
    ----------
    lr, lr_decay, eps : float
        Learning rate, its decay, and the number that keeps the division finite. At least 0.
    initial_accumulator_value : float
        Initial value of ``sum``. At least 0.

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
    """Adagrad with one accumulator per row: the mean of the squared gradient over the row.

    ``sum += mean(g*g);  w -= lr / (sqrt(sum) + eps) * g``.

    Parameters
    ----------
    lr, eps : float
        Learning rate, and the number that keeps the division finite. At least 0.

    Notes
    -----
    Formula and defaults of FBGEMM's exact row-wise Adagrad without weight decay. State column ``sum``, one number per
    row. The mean is computed from eight interleaved partial sums, which are added pairwise.

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
        # Eight sums, because in a single one each addition would wait for the last. Their order is fixed too.
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
