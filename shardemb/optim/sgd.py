"""Plain stochastic gradient descent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardemb.optim.base import Optimizer

if TYPE_CHECKING:
    from shardemb.base.validation import Float32Array


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
