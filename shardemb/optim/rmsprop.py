"""RMSprop, with one average per value or one per row, and Adadelta."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardemb.base.serialization import optional
from shardemb.optim.adagrad import outside_and_inside
from shardemb.optim.base import Optimizer, Rest, Scalar, below_one, steps_to_rest
from shardemb.optim.options import sum_of_squares

if TYPE_CHECKING:
    from shardemb.base.validation import Float32Array
    from shardemb.optim.schedules import LearningRate, Steps


@dataclass(frozen=True, repr=False)
class RMSprop(Optimizer):
    """RMSprop: the step of each value is divided by the root of a running average of its squared gradients.

    ``v = alpha * v + (1 - alpha) * g*g;  w -= lr * g / (sqrt(v) + eps)``. If `centered`, ``a`` is a running average of
    ``g``, and the root is that of ``v - a*a``. With momentum, ``buf = momentum * buf + g / (sqrt(v) + eps);
    w -= lr * buf``.

    Parameters
    ----------
    lr : float or function of the step
        Learning rate, at least 0.
    alpha : float
        Decay of the averages, in [0, 1).
    eps : float
        Keeps the division finite. At least 0.
    momentum : float
        In [0, 1).
    centered : bool
        Divide by an estimate of the standard deviation.
    eps_inside_root : bool
        ``sqrt(v + eps)``, as Keras has it (with ``alpha=0.9, eps=1e-7, lr=1e-3``).
    lr_in_momentum : bool
        ``buf = momentum * buf + lr * g / (sqrt(v) + eps);  w -= buf``, as Keras has it: the same as long as the
        learning rate does not change.

    Notes
    -----
    Formula and defaults of ``torch.optim.RMSprop``. State columns ``square_avg``, ``grad_avg`` if centered and
    ``momentum_buffer`` if there is a momentum, shape (dim,) each. ``v - a*a`` counts as 0 where rounding makes it
    negative. The options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.RMSprop(momentum=0.9).state_columns(embedding_dim=64)
    {'square_avg': 64, 'momentum_buffer': 64}
    """

    lr: float | LearningRate = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    eps_inside_root: bool = optional(False)
    lr_in_momentum: bool = optional(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one(self.alpha, "alpha")
        below_one(self.momentum, "momentum")

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        names = ["square_avg", *["grad_avg"] * self.centered, *["momentum_buffer"] * (self.momentum > 0)]
        return dict.fromkeys(names, embedding_dim)

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        eps, inside = outside_and_inside(self.eps, self.eps_inside_root)
        before, after = (lr, 1.0) if self.lr_in_momentum else (1.0, lr)
        return (1 - self.alpha, eps, inside, self.momentum, self.centered, before, after)

    def after_rest(self) -> Rest:  # noqa: D102
        decays = {"square_avg": self.alpha, "grad_avg": self.alpha, "momentum_buffer": self.momentum}
        return Rest(steps_to_rest(self.momentum), decays)

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        one_minus_alpha, eps, inside, momentum, before, after = (
            scalars[0], scalars[1], scalars[2], scalars[3], scalars[5], scalars[6],
        )  # fmt: skip
        dim = weight.size
        if scalars[4] == 0 and momentum == 0:
            rate = before * after
            for j in range(dim):
                g = gradient[j]
                state[j] += one_minus_alpha * (g * g - state[j])
                weight[j] -= rate * (g / (math.sqrt(state[j] + inside) + eps))
        elif scalars[4] == 0:
            square, buffer = state[:dim], state[dim : 2 * dim]
            for j in range(dim):
                g = gradient[j]
                square[j] += one_minus_alpha * (g * g - square[j])
                buffer[j] = momentum * buffer[j] + before * (g / (math.sqrt(square[j] + inside) + eps))
                weight[j] -= after * buffer[j]
        else:
            square, average, zero = state[:dim], state[dim : 2 * dim], weight.dtype.type(0)
            for j in range(dim):
                g = gradient[j]
                square[j] += one_minus_alpha * (g * g - square[j])
                average[j] += one_minus_alpha * (g - average[j])
                variance = max(square[j] - average[j] * average[j], zero)
                moved = before * (g / (math.sqrt(variance + inside) + eps))
                if momentum != 0:
                    moved += momentum * state[2 * dim + j]
                    state[2 * dim + j] = moved
                weight[j] -= after * moved


@dataclass(frozen=True, repr=False)
class RowWiseRMSprop(Optimizer):
    """RMSprop with one average per row: ``v = alpha * v + (1 - alpha) * mean(g*g);  w -= lr / (sqrt(v) + eps) * g``.

    Parameters
    ----------
    lr, alpha, eps, eps_inside_root : see `RMSprop`

    Notes
    -----
    `RMSprop` with the statistic of FBGEMM's row-wise RMSprop, without its decay of rows that were not touched. State
    column ``square_avg``, one number per row. The options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.RowWiseRMSprop().state_columns(embedding_dim=64)
    {'square_avg': 1}
    """

    lr: float | LearningRate = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    eps_inside_root: bool = optional(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one(self.alpha, "alpha")

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"square_avg": 1}

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        return (lr, 1 - self.alpha, *outside_and_inside(self.eps, self.eps_inside_root))

    def after_rest(self) -> Rest:  # noqa: D102
        return Rest(0, {"square_avg": self.alpha})

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        dim = weight.dtype.type(weight.size)
        state[0] += scalars[1] * (sum_of_squares(gradient) / dim - state[0])
        factor = scalars[0] / (math.sqrt(state[0] + scalars[3]) + scalars[2])
        for j in range(weight.size):
            weight[j] -= factor * gradient[j]


@dataclass(frozen=True, repr=False)
class Adadelta(Optimizer):
    """Adadelta: the step of each value is scaled by the root of a running average of its squared steps.

    ``v = rho * v + (1 - rho) * g*g;  d = g * sqrt(u + eps) / sqrt(v + eps);  u = rho * u + (1 - rho) * d*d;
    w -= lr * d``.

    Parameters
    ----------
    lr : float or function of the step
        Learning rate, at least 0.
    rho : float
        Decay of the averages, in [0, 1); Keras has 0.95.
    eps : float
        Keeps the division finite, and the first steps above zero; Keras has 1e-7. At least 0.

    Notes
    -----
    Zeiler 2012, "ADADELTA"; formula and defaults of ``torch.optim.Adadelta``. State columns ``square_avg`` and
    ``acc_delta``, shape (dim,) each. The options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.Adadelta().state_columns(embedding_dim=64)
    {'square_avg': 64, 'acc_delta': 64}
    """

    lr: float | LearningRate = 1.0
    rho: float = 0.9
    eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one(self.rho, "rho")

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"square_avg": embedding_dim, "acc_delta": embedding_dim}

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        return (lr, 1 - self.rho, self.eps)

    def after_rest(self) -> Rest:  # noqa: D102
        return Rest(0, {"square_avg": self.rho, "acc_delta": self.rho})

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        lr, one_minus_rho, eps, dim = scalars[0], scalars[1], scalars[2], weight.size
        square, moved = state[:dim], state[dim : 2 * dim]
        for j in range(dim):
            g = gradient[j]
            square[j] += one_minus_rho * (g * g - square[j])
            delta = g * math.sqrt(moved[j] + eps) / math.sqrt(square[j] + eps)
            moved[j] += one_minus_rho * (delta * delta - moved[j])
            weight[j] -= lr * delta
