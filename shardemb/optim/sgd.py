"""Stochastic gradient descent, plain or with momentum, with a rate for each row (LARS), or by signs alone (Lion)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from shardemb.base.serialization import optional
from shardemb.optim.base import Optimizer, Rest, Scalar, below_one, beta_pair, steps_to_rest
from shardemb.optim.options import sum_of_squares

if TYPE_CHECKING:
    from shardemb.base.validation import Float32Array
    from shardemb.optim.schedules import LearningRate, Steps


@dataclass(frozen=True, repr=False)
class SGD(Optimizer):
    """Stochastic gradient descent: ``w -= lr * g``, or with momentum.

    With momentum: ``buf = momentum * buf + (1 - dampening) * g;  w -= lr * buf``; with `nesterov`,
    ``w -= lr * (g + momentum * buf)``. There is no dampening in the first step of the table.

    Parameters
    ----------
    lr : float or function of the step
        Learning rate, at least 0.
    momentum, dampening : float
        In [0, 1).
    nesterov : bool
        It needs a momentum and no dampening.
    lr_in_momentum : bool
        ``buf = momentum * buf + lr * (1 - dampening) * g;  w -= buf``, as Keras has it: the same as long as the
        learning rate does not change.

    Notes
    -----
    Formula of ``torch.optim.SGD``. State column ``momentum_buffer``, shape (dim,), if there is a momentum. The options
    of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.SGD(lr=0.1).state_columns(embedding_dim=64)
    {}
    >>> shardemb.optim.SGD(lr=0.1, momentum=0.9).state_columns(embedding_dim=64)
    {'momentum_buffer': 64}
    """

    lr: float | LearningRate = 1e-2
    momentum: float = optional(0.0)
    dampening: float = optional(0.0)
    nesterov: bool = optional(False)
    lr_in_momentum: bool = optional(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one(self.momentum, "momentum")
        below_one(self.dampening, "dampening")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            msg = f"nesterov needs a momentum and no dampening, got {self!r}"
            raise ValueError(msg)

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"momentum_buffer": embedding_dim} if self.momentum else {}

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        share = np.where(np.asarray(step) == 1, 1.0, 1 - self.dampening)
        if self.lr_in_momentum:
            return (1.0, self.momentum, lr * share, lr if self.nesterov else 0.0, self.nesterov)
        return (lr, self.momentum, share, 1.0, self.nesterov)

    @property
    def decay_is_a_factor(self) -> bool:  # noqa: D102
        return self.momentum == 0

    def after_rest(self) -> Rest:  # noqa: D102
        if self.momentum == 0:
            return Rest(0, {})
        return Rest(steps_to_rest(self.momentum), {"momentum_buffer": self.momentum})

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        lr, momentum, share, ahead = scalars[0], scalars[1], scalars[2], scalars[3]
        if momentum == 0:
            rate = lr * share
            for j in range(weight.size):
                weight[j] -= rate * gradient[j]
        elif scalars[4] != 0:
            for j in range(weight.size):
                state[j] = momentum * state[j] + share * gradient[j]
                weight[j] -= lr * (ahead * gradient[j] + momentum * state[j])
        else:
            for j in range(weight.size):
                state[j] = momentum * state[j] + share * gradient[j]
                weight[j] -= lr * state[j]


@dataclass(frozen=True, repr=False)
class LARS(Optimizer):
    """SGD with momentum whose rate is proportional to the norm of the row's weight.

    ``a = lr * eta * norm(w) / (norm(g) + weight_decay * norm(w));  buf = momentum * buf + a * (g + weight_decay * w);``
    ``w -= buf``. Where either norm is zero, ``a = lr``, because a row of zeros would never move otherwise.

    Parameters
    ----------
    lr : float or function of the step
        Learning rate, at least 0.
    momentum : float
        In [0, 1).
    eta : float
        The "trust coefficient", at least 0.

    Notes
    -----
    You, Gitman and Ginsburg 2017, "Large Batch Training of Convolutional Networks"; formula and defaults of FBGEMM's
    LARS-SGD. The option ``weight_decay`` is part of the formula, unless it is decoupled. State column
    ``momentum_buffer``, shape (dim,). The options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.LARS(lr=0.1).state_columns(embedding_dim=64)
    {'momentum_buffer': 64}
    """

    decay_is_own: ClassVar[bool] = True

    lr: float | LearningRate = 1e-2
    momentum: float = 0.9
    eta: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        below_one(self.momentum, "momentum")

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"momentum_buffer": embedding_dim}

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        decay = 0.0 if self.decoupled_weight_decay else self.weight_decay
        return (lr, self.momentum, self.eta, decay)

    def after_rest(self) -> Rest:  # noqa: D102
        return Rest(steps_to_rest(self.momentum), {"momentum_buffer": self.momentum})

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        rate, momentum, decay = scalars[0], scalars[1], scalars[3]
        norm, gradient_norm = math.sqrt(sum_of_squares(weight)), math.sqrt(sum_of_squares(gradient))
        if norm > 0 and gradient_norm > 0:
            rate *= scalars[2] * norm / (gradient_norm + decay * norm)
        for j in range(weight.size):
            state[j] = momentum * state[j] + rate * (gradient[j] + decay * weight[j])
            weight[j] -= state[j]


@dataclass(frozen=True, repr=False)
class Lion(Optimizer):
    """Lion: ``w -= lr * sign(b1 * m + (1 - b1) * g);  m = b2 * m + (1 - b2) * g``.

    Parameters
    ----------
    lr : float or function of the step
        Learning rate, at least 0.
    betas : tuple of two floats
        Share of the momentum in a step, and decay of the momentum, in [0, 1).

    Notes
    -----
    Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"; formula and defaults of
    ``keras.optimizers.Lion``. Its weight decay is ``decoupled_weight_decay=True``. State column ``exp_avg``, shape
    (dim,). The options of all optimizers are described at `Optimizer`.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.optim.Lion().state_columns(embedding_dim=64)
    {'exp_avg': 64}
    """

    never_rests: ClassVar[str] = "its steps keep their length, however small the momentum has become"

    lr: float | LearningRate = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "betas", beta_pair(self.betas))

    def own_columns(self, embedding_dim: int) -> dict[str, int]:  # noqa: D102
        return {"exp_avg": embedding_dim}

    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:  # noqa: D102
        b1, b2 = self.betas
        return (lr, 1 - b1, 1 - b2)

    @staticmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place."""
        lr, one_minus_b1, one_minus_b2 = scalars[0], scalars[1], scalars[2]
        for j in range(weight.size):
            g, m = gradient[j], state[j]
            weight[j] -= lr * np.sign(m + one_minus_b1 * (g - m))
            state[j] = m + one_minus_b2 * (g - m)
