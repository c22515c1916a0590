"""LAMB: Adam's step, scaled to the norm of the row's weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from shardemb.optim.adam import MomentOptimizer
from shardemb.optim.options import sum_of_squares

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from shardemb.base.validation import Float32Array
    from shardemb.optim.base import Rest, Scalar
    from shardemb.optim.schedules import Steps


def step_as_long_as_weight(weight: Float32Array, direction: Float32Array, lr: np.float32) -> None:
    """Take a step of the weight's norm, times the learning rate; of the direction's where either norm is zero."""
    norm, length = math.sqrt(sum_of_squares(weight)), math.sqrt(sum_of_squares(direction))
    rate = lr * norm / length if norm > 0 and length > 0 else lr
    for j in range(weight.size):
        weight[j] -= rate * direction[j]


@dataclass(frozen=True, repr=False)
class LAMB(MomentOptimizer):
    """LAMB: Adam whose step has the norm of the row's weight.

    With `Adam`'s moments, bias-corrected, ``r = m / (sqrt(v) + eps) + weight_decay * w;  w -= lr * norm(w) / norm(r) *
    r``. Where either norm is zero, their quotient counts as 1, because a row of zeros would never move otherwise.

    Parameters
    ----------
    lr, betas, eps, rowwise_bias_correction : see `Adam`

    Notes
    -----
    You et al. 2020, "Large Batch Optimization for Deep Learning"; formula and defaults of FBGEMM's LAMB, but for rows
    of zeros. The option ``weight_decay`` is part of the formula, unless it is decoupled, as Keras has it. State columns
    ``exp_avg`` and ``exp_avg_sq``, shape (dim,) each. The options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.LAMB().state_columns(embedding_dim=64)
    {'exp_avg': 64, 'exp_avg_sq': 64}
    """

    decay_is_own: ClassVar[bool] = True
    overwrites_gradient: ClassVar[bool] = True
    row_helpers: ClassVar[tuple[Callable[..., None], ...]] = (step_as_long_as_weight,)
    never_rests: ClassVar[str] = (
        "its steps have the length of the weight, however small the momentum has become"
    )

    def after_rest(self) -> Rest:  # noqa: D102
        return super(MomentOptimizer, self).after_rest()

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        b1, b2 = self.betas
        first, root = self.corrected(step)
        decay = 0.0 if self.decoupled_weight_decay else self.weight_decay
        return (1 - b1, 1 - b2, root / first, self.eps * root, lr, decay)

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        one_minus_b1, one_minus_b2, correction, eps, decay = (
            scalars[0], scalars[1], scalars[2], scalars[3], scalars[5],
        )  # fmt: skip
        dim = weight.size
        exp_avg, exp_avg_sq = state[:dim], state[dim : 2 * dim]
        for j in range(dim):
            g = gradient[j]
            exp_avg[j] += one_minus_b1 * (g - exp_avg[j])
            exp_avg_sq[j] += one_minus_b2 * (g * g - exp_avg_sq[j])
            # From here on the direction is needed, and the gradient no more.
            gradient[j] = correction * (exp_avg[j] / (math.sqrt(exp_avg_sq[j]) + eps)) + decay * weight[j]
        step_as_long_as_weight(weight, gradient, scalars[4])


@dataclass(frozen=True, repr=False)
class PartialRowWiseLAMB(LAMB):
    """LAMB with one second moment per row: ``v += (1 - b2) * (mean(g*g) - v)``.

    Parameters
    ----------
    lr, betas, eps, rowwise_bias_correction : see `Adam`

    Notes
    -----
    Formula and defaults of FBGEMM's partial row-wise LAMB; see `LAMB`. State columns ``exp_avg``, shape (dim,), and
    ``exp_avg_sq``, one number per row. The options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.PartialRowWiseLAMB().state_columns(embedding_dim=64)
    {'exp_avg': 64, 'exp_avg_sq': 1}
    """

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"exp_avg": embedding_dim, "exp_avg_sq": 1}

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        one_minus_b1, decay, dim = scalars[0], scalars[5], weight.size
        state[dim] += scalars[1] * (sum_of_squares(gradient) / weight.dtype.type(dim) - state[dim])
        factor = scalars[2] / (math.sqrt(state[dim]) + scalars[3])
        for j in range(dim):
            state[j] += one_minus_b1 * (gradient[j] - state[j])
            gradient[j] = factor * state[j] + decay * weight[j]
        step_as_long_as_weight(weight, gradient, scalars[4])
