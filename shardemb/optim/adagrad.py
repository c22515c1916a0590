"""Adagrad, with one accumulator per value or one per row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardemb.base.serialization import optional
from shardemb.optim.base import Optimizer, Rest, Scalar
from shardemb.optim.options import sum_of_squares

if TYPE_CHECKING:
    from shardemb.base.validation import Float32Array
    from shardemb.optim.schedules import LearningRate, Steps


@dataclass(frozen=True, repr=False)
class Adagrad(Optimizer):
    """Adagrad: the step of each value is divided by the root of the sum of its squared gradients.

    ``sum += g*g;  w -= lr_t * g / (sqrt(sum) + eps)`` with ``lr_t = lr / (1 + (step - 1) * lr_decay)``.

    Parameters
    ----------
    lr : float or function of the step
        Learning rate, at least 0.
    lr_decay, eps : float
        Decay of the learning rate, and the number that keeps the division finite. At least 0.
    initial_accumulator_value : float
        Initial value of ``sum``. At least 0.
    eps_inside_root : bool
        ``sqrt(sum + eps)``, as Keras has it (with ``eps=1e-7, initial_accumulator_value=0.1``).

    Notes
    -----
    Formula and defaults of ``torch.optim.Adagrad`` for sparse gradients. State column ``sum``, shape (dim,). The
    options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.Adagrad(lr=0.1).state_columns(embedding_dim=64)
    {'sum': 64}
    """

    lr: float | LearningRate = 1e-2
    lr_decay: float = 0.0
    eps: float = 1e-10
    initial_accumulator_value: float = 0.0
    eps_inside_root: bool = optional(False)

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"sum": embedding_dim}

    def initial_state(self) -> dict[str, float]:  # noqa: D102
        return {"sum": self.initial_accumulator_value}

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        return (lr / (1 + (step - 1) * self.lr_decay), *outside_and_inside(self.eps, self.eps_inside_root))

    def after_rest(self) -> Rest:  # noqa: D102
        return Rest(0, {})

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        lr, eps, inside = scalars[0], scalars[1], scalars[2]
        for j in range(weight.size):
            state[j] += gradient[j] * gradient[j]
            weight[j] -= lr * (gradient[j] / (math.sqrt(state[j] + inside) + eps))


@dataclass(frozen=True, repr=False)
class RowWiseAdagrad(Optimizer):
    """Adagrad with one accumulator per row: the mean of the squared gradient over the row.

    ``sum += mean(g*g);  w -= lr_t / (sqrt(sum) + eps) * g`` with ``lr_t = lr / (1 + (step - 1) * lr_decay)``.

    Parameters
    ----------
    lr : float or function of the step
        Learning rate, at least 0.
    eps : float
        Keeps the division finite. At least 0.
    lr_decay, initial_accumulator_value : float
        As for `Adagrad`; TorchRec's ``RowWiseAdagrad`` has them.
    eps_inside_root : bool
        ``sqrt(sum + eps)``.

    Notes
    -----
    Formula and defaults of FBGEMM's exact row-wise Adagrad; its weight decay ``L2`` is ``weight_decay``, and
    ``DECOUPLE`` is ``decoupled_weight_decay=True``. State column ``sum``, one number per row. The mean is computed from
    eight interleaved partial sums, which are added pairwise. The options of all optimizers are described at
    `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.RowWiseAdagrad(lr=0.1).state_columns(embedding_dim=64)
    {'sum': 1}
    """

    lr: float | LearningRate = 1e-2
    eps: float = 1e-8
    lr_decay: float = optional(0.0)
    initial_accumulator_value: float = optional(0.0)
    eps_inside_root: bool = optional(False)

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"sum": 1}

    def initial_state(self) -> dict[str, float]:  # noqa: D102
        return {"sum": self.initial_accumulator_value}

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        return (lr / (1 + (step - 1) * self.lr_decay), *outside_and_inside(self.eps, self.eps_inside_root))

    def after_rest(self) -> Rest:  # noqa: D102
        return Rest(0, {})

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        state[0] += sum_of_squares(gradient) / weight.dtype.type(weight.size)
        factor = scalars[0] / (math.sqrt(state[0] + scalars[2]) + scalars[1])
        for j in range(weight.size):
            weight[j] -= factor * gradient[j]


def outside_and_inside(eps: float, inside: bool) -> tuple[float, float]:
    """Return what to add to a root, and what to add below it."""
    return (0.0, eps) if inside else (eps, 0.0)
