"""Adam for sparse gradients, and its relatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shardemb.base.serialization import optional
from shardemb.optim.base import Optimizer, Rest, Scalar, beta_pair, steps_to_rest
from shardemb.optim.options import sum_of_squares

if TYPE_CHECKING:
    from shardemb.base.validation import Float32Array
    from shardemb.optim.schedules import LearningRate, Steps


@dataclass(frozen=True, repr=False)
class MomentOptimizer(Optimizer):
    """What optimizers with two moments have in common: decays in [0, 1), and a bias that is corrected."""

    has_bias_correction: ClassVar[bool] = True

    lr: float | LearningRate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        # JSON gives back lists. With a tuple, the dataclass is hashable and equal to the original.
        object.__setattr__(self, "betas", beta_pair(self.betas))

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"exp_avg": embedding_dim, "exp_avg_sq": embedding_dim}

    def corrected(self, step: Steps) -> tuple[Scalar, Scalar]:
        """Return by what the first moment is divided, and by what the root of the second is."""
        b1, b2 = self.betas
        return 1 - b1**step, np.sqrt(1 - b2**step)

    def after_rest(self) -> Rest:  # noqa: D102
        b1, b2 = self.betas
        # A step is the first moment by the root of the second.
        ratio = b1 / math.sqrt(b2) if b2 > 0 else 1.0 if b1 > 0 else 0.0
        return Rest(steps_to_rest(ratio), {"exp_avg": b1, "exp_avg_sq": b2})


@dataclass(frozen=True, repr=False)
class Adam(MomentOptimizer):
    """Adam, applied only to the rows of the batch ("lazy" Adam).

    ``m += (1 - b1) * (g - m);  v += (1 - b2) * (g*g - v);``
    ``w -= lr * sqrt(1 - b2**step) / (1 - b1**step) * (m / (sqrt(v) + eps))``.

    Parameters
    ----------
    lr : float or function of the step
        Learning rate, at least 0.
    betas : tuple of two floats
        Decay of the first and of the second moment, in [0, 1).
    eps : float
        Keeps the division finite. At least 0.
    eps_after_correction : bool
        Add ``eps`` to the root of the bias-corrected second moment, as ``torch.optim.Adam`` does:
        ``eps * sqrt(1 - b2**step)`` in the formula above.
    rowwise_bias_correction : bool
        Let ``step`` be the number of steps of the row and not of the table: the row's first step is as long as the
        table's. It takes a state column ``step``, one number per row.

    Notes
    -----
    Formula and defaults of ``torch.optim.SparseAdam``; with ``eps=1e-7`` that of Keras. State columns ``exp_avg`` and
    ``exp_avg_sq``, shape (dim,) each. The powers of the betas are computed in float64. The options of all optimizers
    are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.Adam(lr=1e-3).state_columns(embedding_dim=64)
    {'exp_avg': 64, 'exp_avg_sq': 64}
    """

    eps_after_correction: bool = optional(False)

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        b1, b2 = self.betas
        first, root = self.corrected(step)
        return (1 - b1, 1 - b2, lr * root / first, self.eps * root if self.eps_after_correction else self.eps)

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


@dataclass(frozen=True, repr=False)
class AdamW(Adam):
    """Adam with decoupled weight decay: ``w *= 1 - lr * weight_decay``, and then a step of `Adam`.

    Parameters
    ----------
    lr, betas, eps, rowwise_bias_correction : see `Adam`
    eps_after_correction : bool
        As for `Adam`, but True by default.
    weight_decay : float
        At least 0.
    decoupled_weight_decay : bool
        False makes it `Adam` with a decay that its moments see.

    Notes
    -----
    Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization"; formula and defaults of ``torch.optim.AdamW``,
    applied only to the rows of the batch: they decay, the others do not. The options of all optimizers are described at
    `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.AdamW(lr=1e-3).weight_decay
    0.01
    """

    weight_decay: float = field(default=1e-2, kw_only=True)
    decoupled_weight_decay: bool = optional(True)
    eps_after_correction: bool = optional(True)


@dataclass(frozen=True, repr=False)
class AMSGrad(Adam):
    """Adam whose step is divided by the root of the largest second moment so far: ``vmax = max(vmax, v)``.

    Parameters
    ----------
    lr, betas, eps, rowwise_bias_correction : see `Adam`
    eps_after_correction : bool
        As for `Adam`, but True by default.

    Notes
    -----
    Reddi, Kale and Kumar 2018, "On the Convergence of Adam and Beyond"; formula and defaults of
    ``torch.optim.Adam(amsgrad=True)``. State columns ``exp_avg``, ``exp_avg_sq`` and ``max_exp_avg_sq``, shape (dim,)
    each. The options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.AMSGrad().state_columns(embedding_dim=64)
    {'exp_avg': 64, 'exp_avg_sq': 64, 'max_exp_avg_sq': 64}
    """

    eps_after_correction: bool = optional(True)

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return super().own_columns(embedding_dim) | {"max_exp_avg_sq": embedding_dim}

    def after_rest(self) -> Rest:  # noqa: D102
        b1, b2 = self.betas
        return Rest(steps_to_rest(b1), {"exp_avg": b1, "exp_avg_sq": b2})

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        one_minus_b1, one_minus_b2, step_size, eps = scalars[0], scalars[1], scalars[2], scalars[3]
        dim = weight.size
        exp_avg, exp_avg_sq, largest = state[:dim], state[dim : 2 * dim], state[2 * dim : 3 * dim]
        for j in range(dim):
            g = gradient[j]
            exp_avg[j] += one_minus_b1 * (g - exp_avg[j])
            exp_avg_sq[j] += one_minus_b2 * (g * g - exp_avg_sq[j])
            largest[j] = max(largest[j], exp_avg_sq[j])
            weight[j] -= step_size * (exp_avg[j] / (math.sqrt(largest[j]) + eps))


@dataclass(frozen=True, repr=False)
class PartialRowWiseAdam(Adam):
    """Adam with one second moment per row: ``v += (1 - b2) * (mean(g*g) - v)``.

    Parameters
    ----------
    lr, betas, eps, rowwise_bias_correction : see `Adam`
    eps_after_correction : bool
        As for `Adam`, but True by default.

    Notes
    -----
    Formula and defaults of FBGEMM's partial row-wise Adam; its weight decay is ``decoupled_weight_decay=True``. State
    columns ``exp_avg``, shape (dim,), and ``exp_avg_sq``, one number per row. The options of all optimizers are
    described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.PartialRowWiseAdam().state_columns(embedding_dim=64)
    {'exp_avg': 64, 'exp_avg_sq': 1}
    """

    eps_after_correction: bool = optional(True)

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"exp_avg": embedding_dim, "exp_avg_sq": 1}

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        one_minus_b1, dim = scalars[0], weight.size
        state[dim] += scalars[1] * (sum_of_squares(gradient) / weight.dtype.type(dim) - state[dim])
        factor = scalars[2] / (math.sqrt(state[dim]) + scalars[3])
        for j in range(dim):
            state[j] += one_minus_b1 * (gradient[j] - state[j])
            weight[j] -= factor * state[j]


@dataclass(frozen=True, repr=False)
class Adamax(MomentOptimizer):
    """Adam with the largest gradient, which decays, in place of the second moment.

    ``m += (1 - b1) * (g - m);  u = max(b2 * u, abs(g) + eps);  w -= lr / (1 - b1**step) * m / u``.

    Parameters
    ----------
    lr, betas, rowwise_bias_correction : see `Adam`
    eps : float
        Keeps the division finite. At least 0.
    eps_outside_maximum : bool
        ``u = max(b2 * u, abs(g))`` and ``m / (u + eps)``, as Keras has it (with ``eps=1e-7``).

    Notes
    -----
    Kingma and Ba 2015, "Adam", section 7.1; formula and defaults of ``torch.optim.Adamax``. State columns ``exp_avg``
    and ``exp_inf``, shape (dim,) each. The options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.Adamax().state_columns(embedding_dim=64)
    {'exp_avg': 64, 'exp_inf': 64}
    """

    lr: float | LearningRate = 2e-3
    eps_outside_maximum: bool = optional(False)

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"exp_avg": embedding_dim, "exp_inf": embedding_dim}

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        b1, b2 = self.betas
        inside, outside = (0.0, self.eps) if self.eps_outside_maximum else (self.eps, 0.0)
        return (1 - b1, b2, lr / (1 - b1**step), inside, outside)

    def after_rest(self) -> Rest:  # noqa: D102
        b1, b2 = self.betas
        ratio = b1 / b2 if b2 > 0 else 1.0 if b1 > 0 else 0.0
        return Rest(steps_to_rest(ratio), {"exp_avg": b1, "exp_inf": b2})

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        one_minus_b1, b2, step_size, inside, outside = (
            scalars[0], scalars[1], scalars[2], scalars[3], scalars[4],
        )  # fmt: skip
        dim = weight.size
        exp_avg, exp_inf = state[:dim], state[dim : 2 * dim]
        for j in range(dim):
            exp_avg[j] += one_minus_b1 * (gradient[j] - exp_avg[j])
            exp_inf[j] = max(b2 * exp_inf[j], abs(gradient[j]) + inside)
            weight[j] -= step_size * (exp_avg[j] / (exp_inf[j] + outside))


@dataclass(frozen=True, repr=False)
class NAdam(MomentOptimizer):
    """Adam with Nesterov's momentum, which grows with the step.

    ``mu(t) = b1 * (1 - 0.96**(t * momentum_decay) / 2)``, and ``P`` is the product of all of them up to the step ``t``.
    With `Adam`'s moments, ``w -= lr * ((1 - mu(t)) / (1 - P) * g + mu(t + 1) / (1 - P * mu(t + 1)) * m) /
    (sqrt(v / (1 - b2**t)) + eps)``.

    Parameters
    ----------
    lr, betas, eps, rowwise_bias_correction : see `Adam`
    momentum_decay : float
        At least 0; 1 for Keras (with ``lr=1e-3, eps=1e-7``).

    Notes
    -----
    Dozat 2016, "Incorporating Nesterov Momentum into Adam"; formula and defaults of ``torch.optim.NAdam``. State
    columns ``exp_avg`` and ``exp_avg_sq``, shape (dim,) each; the product is computed from the step. The options of all
    optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.NAdam().state_columns(embedding_dim=64)
    {'exp_avg': 64, 'exp_avg_sq': 64}
    """

    lr: float | LearningRate = 2e-3
    momentum_decay: float = 4e-3

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        b1, b2 = self.betas
        _, root = self.corrected(step)
        now, following, product = self._momentum(step), self._momentum(step + 1), self._product(step)
        of_gradient = lr * (1 - now) / (1 - product) * root
        of_moment = lr * following / (1 - product * following) * root
        return (1 - b1, 1 - b2, of_gradient, of_moment, self.eps * root)

    def _momentum(self, step: Steps) -> Scalar:
        return self.betas[0] * (1 - 0.5 * 0.96 ** (step * self.momentum_decay))

    def _product(self, step: Steps) -> Scalar:
        """Return the product of the momenta of all steps so far; once 1 minus it is 1, it does not matter any more."""
        if self.betas[0] == 0:
            return 0.0 * np.asarray(step, np.float64)
        most = min(int(np.max(step)), math.ceil(math.log(1e-18) / math.log(self.betas[0])))
        products = np.cumprod(self._momentum(np.arange(1.0, most + 1)))
        found: Scalar = products[np.minimum(np.asarray(step, np.int64), most) - 1]
        return found

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        one_minus_b1, one_minus_b2, of_gradient, of_moment, eps = (
            scalars[0], scalars[1], scalars[2], scalars[3], scalars[4],
        )  # fmt: skip
        dim = weight.size
        exp_avg, exp_avg_sq = state[:dim], state[dim : 2 * dim]
        for j in range(dim):
            g = gradient[j]
            exp_avg[j] += one_minus_b1 * (g - exp_avg[j])
            exp_avg_sq[j] += one_minus_b2 * (g * g - exp_avg_sq[j])
            weight[j] -= (of_gradient * g + of_moment * exp_avg[j]) / (math.sqrt(exp_avg_sq[j]) + eps)
