"""Follow the regularized leader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shardemb.optim.base import Optimizer, Rest, Scalar

if TYPE_CHECKING:
    from shardemb.base.validation import Float32Array
    from shardemb.optim.schedules import LearningRate, Steps


@dataclass(frozen=True, repr=False)
class FTRL(Optimizer):
    """FTRL-proximal: with `l1_strength`, weights become exactly zero and stay so until their gradients add up.

    ``n' = n + g*g;  z += g + 2 * l2_shrinkage * w - (sqrt(n') - sqrt(n)) / lr * w;  n = n';``
    ``w = (clip(z, -l1_strength, l1_strength) - z) / ((beta + sqrt(n)) / lr + 2 * l2_strength)``.

    Parameters
    ----------
    lr : float or function of the step
        Learning rate, greater than 0.
    initial_accumulator_value : float
        Initial value of ``n``. At least 0.
    l1_strength, l2_strength : float
        Strength of the regularization that the weights minimise. At least 0.
    l2_shrinkage : float
        Strength of one that only the gradients see. At least 0.
    beta : float
        Added to the root. At least 0.

    Notes
    -----
    McMahan et al. 2013, "Ad Click Prediction: a View from the Trenches"; formula and defaults of
    ``keras.optimizers.Ftrl`` with ``learning_rate_power=-0.5``. A weight that is 0 / 0 counts as 0. State columns
    ``accumulator`` and ``linear``, shape (dim,) each. The options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.FTRL().state_columns(embedding_dim=64)
    {'accumulator': 64, 'linear': 64}
    """

    lr: float | LearningRate = 1e-3
    initial_accumulator_value: float = 0.1
    l1_strength: float = 0.0
    l2_strength: float = 0.0
    l2_shrinkage: float = 0.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr == 0:
            msg = "FTRL divides by its learning rate, so lr must be greater than 0"
            raise ValueError(msg)

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"accumulator": embedding_dim, "linear": embedding_dim}

    def initial_state(self) -> dict[str, float]:  # noqa: D102
        return {"accumulator": self.initial_accumulator_value}

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        constant = self.beta / lr + 2 * self.l2_strength
        return (1 / lr, constant, self.l1_strength, 2 * self.l2_shrinkage)

    @property
    def changes_fresh_rows(self) -> bool:  # noqa: D102
        return True  # its first step computes each weight anew

    def after_rest(self) -> Rest:  # noqa: D102
        if callable(self.lr) or self.l2_shrinkage or self.decoupled_weight_decay:
            msg = "FTRL cannot be dense_equivalent with a schedule, l2_shrinkage or decoupled_weight_decay"
            raise ValueError(msg)
        return Rest(1, {})  # the first step computes the weight anew, and others compute the same

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        inverse, constant, l1, shrinkage, dim = scalars[0], scalars[1], scalars[2], scalars[3], weight.size
        accumulator, linear = state[:dim], state[dim : 2 * dim]
        for j in range(dim):
            g, before = gradient[j], np.sqrt(accumulator[j])
            accumulator[j] += g * g
            after = np.sqrt(accumulator[j])
            linear[j] += g + shrinkage * weight[j] - inverse * (after - before) * weight[j]
            divisor = inverse * after + constant
            clipped = min(max(linear[j], -l1), l1)
            # Where nothing was ever added, both are zero.
            weight[j] = (clipped - linear[j]) / divisor if divisor > 0 else weight.dtype.type(0)
