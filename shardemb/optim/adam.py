"""Adam for sparse gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base import validation
from shardemb.optim.base import Optimizer

if TYPE_CHECKING:
    from shardemb.base.validation import Float32Array


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam, applied only to the rows of the batch ("lazy" Adam).

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
    each. The powers of the betas are computed in float64.

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
        # JSON gives back lists. With a tuple, the dataclass is hashable and equal to the original.
        given = self.betas if np.iterable(self.betas) else ()
        betas = tuple(validation.number(beta, "betas", minimum=0.0) for beta in given)
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
