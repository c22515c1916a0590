"""The base class of all optimizers: the options that all of them have, and the contract of a formula."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from shardemb.base import serialization, validation
from shardemb.base.serialization import optional
from shardemb.errors import LearningRateError
from shardemb.optim import schedules
from shardemb.optim.options import (
    CONSTRAINTS,
    UNIT_NORM,
    Options,
    clip_gradient,
    constrain,
    set_kept,
    sum_of_squares,
    take_step,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array
    from shardemb.optim.schedules import LearningRate, Steps

LAST_STEP = "last_step"
"""The state column of an optimizer that is equivalent to a dense one: the step that a row has been brought to."""

ROW_STEP = "step"
"""The state column of an optimizer that corrects its bias by the row's own count of steps."""

_AT_REST = 1e-7
"""What is left of the way that a row's momentum still moves it, relative to the first step of it, counts as nothing."""

_NEGLIGIBLE = 2.0**-26
"""A power of a beta below this makes no difference to 1 in float32."""

_MOST_COUNTS = 2**18
"""Counts of a row for which the bias correction is tabulated, at most: enough for a beta of 0.99993."""

Scalar = Any
"""A float64, or an array of them, one for each step that was asked for."""


@dataclass(frozen=True, repr=False)
class Optimizer(ABC):
    """Base class of all optimizers; use one of its subclasses.

    They have these options in common, all of them keyword-only. A step does what they say in the order in which they
    are listed, on the sum of the row's gradients.

    Parameters
    ----------
    maximize : bool
        Take the gradient's other direction.
    clip_value : float, optional
        Limit each value of the gradient to ``[-clip_value, clip_value]``.
    clip_norm : float, optional
        Scale a row's gradient down to this Euclidean norm if it is longer. (`Store.update` clips by the norm of all
        rows together.)
    l1 : float
        Add ``l1 * sign(w)`` to the gradient: the regularizer of Keras.
    weight_decay : float
        Add ``weight_decay * w`` to the gradient (L2, so the optimizer's statistics see it). Keras' ``L2(l2)`` is
        ``weight_decay=2 * l2``.
    decoupled_weight_decay : bool
        Multiply the weight by ``1 - lr * weight_decay`` before the step instead, as AdamW does.
    max_norm : float, optional
        Scale the weight down to this Euclidean norm after the step, if it is longer.
    constraint : {"non_neg", "unit_norm"}, optional
        Set negative weights to zero after the step, or scale the weight to norm 1; as Keras has them.
    rowwise_bias_correction : bool
        Correct the bias of moments by the number of steps of the row and not of the table; for optimizers that correct
        one. It takes a state column ``step``, one number per row.
    dense_equivalent : bool
        Let rows that are not in a batch be what a dense optimizer would make of them, to which their gradients are
        zero: they are caught up when they are next read or changed. It takes a state column ``last_step``, one number
        per row. Where an optimizer cannot do this with some option, it says so. Rows and state have to be float32.

    Examples
    --------
    >>> shardemb.optim.Adagrad(lr=0.1, clip_norm=1.0, weight_decay=1e-5)
    Adagrad(lr=0.1, lr_decay=0.0, eps=1e-10, initial_accumulator_value=0.0, clip_norm=1.0, weight_decay=1e-05)
    """

    has_bias_correction: ClassVar[bool] = False
    """Whether ``rowwise_bias_correction`` is an option."""

    decay_is_own: ClassVar[bool] = False
    """Whether `row_step` itself adds a weight decay that is not decoupled; `scalars` has it then."""

    never_rests: ClassVar[str] = "there is no closed form of its steps with a gradient of zeros"
    """Why there is no `after_rest`."""

    row_helpers: ClassVar[tuple[Callable[..., None], ...]] = ()
    """Functions of its module that `row_step` calls, by their names; these may call `sum_of_squares`."""

    overwrites_gradient: ClassVar[bool] = False
    """Whether `row_step` uses the gradient's memory, so that it needs a copy."""

    maximize: bool = optional(False)
    clip_value: float | None = optional(None)
    clip_norm: float | None = optional(None)
    l1: float = optional(0.0)
    weight_decay: float = optional(0.0)
    decoupled_weight_decay: bool = optional(False)
    max_norm: float | None = optional(None)
    constraint: str | None = optional(None)
    rowwise_bias_correction: bool = optional(False)
    dense_equivalent: bool = optional(False)

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "bool":
                value = validation.flag(value, each.name)
            elif each.name == "lr":
                value = schedules.checked(value)
            elif each.type == "float" or (each.type == "float | None" and value is not None):
                value = validation.number(value, each.name, minimum=0.0)  # JSON cannot hold scalars of NumPy
            object.__setattr__(self, each.name, value)
        if self.constraint is not None and self.constraint not in CONSTRAINTS:
            msg = f"constraint must be one of {', '.join(map(repr, CONSTRAINTS))} or None, got {self.constraint!r}"
            raise ValueError(msg)
        if self.constraint == UNIT_NORM and self.max_norm is not None:
            msg = "constraint='unit_norm' sets the norm of each row, so there can be no max_norm"
            raise ValueError(msg)
        if self.rowwise_bias_correction and not self.has_bias_correction:
            msg = f"{type(self).__name__} has no bias correction, so rowwise_bias_correction is not an option"
            raise ValueError(msg)
        if self.dense_equivalent:
            self.check_dense_equivalent()

    def __repr__(self) -> str:
        shown = serialization.stored_fields(self).items()
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown)})"

    # ---- what a subclass defines

    @abstractmethod
    def own_columns(self, embedding_dim: int) -> dict[str, int]:
        """Return name and width (values per row) of each state column of the formula, in the order of the record."""

    @abstractmethod
    def scalars(self, lr: Scalar, step: Steps) -> tuple[Scalar, ...]:
        """Return the numbers that `row_step` reads, for update number `step` (1 for the first), or for several.

        They are computed in float64, and rounded to float32 once. `step` is the table's, or the row's own with
        ``rowwise_bias_correction``.
        """

    @staticmethod
    @abstractmethod
    def row_step(
        weight: Float32Array, state: Float32Array, gradient: Float32Array, scalars: Float32Array
    ) -> None:
        """Take one step on one row, in place.

        `weight` and `gradient` have shape (dim,). `state` holds all state columns of the row, one after the other.
        """

    def initial_state(self) -> dict[str, float]:
        """Return the initial value of each state column; columns that are not named start from zero."""
        return {}

    def after_rest(self) -> Rest:
        """Return what steps with a gradient of zeros do to a row, for ``dense_equivalent``.

        Raises
        ------
        ValueError
            They never come to rest, so there is no bound on how many would have to be taken.
        """
        msg = f"{type(self).__name__} cannot be dense_equivalent: {self.never_rests}"
        raise ValueError(msg)

    # ---- what follows from it

    take_step = staticmethod(take_step)
    around_step = clip_gradient, constrain
    sum_of_squares = staticmethod(sum_of_squares)
    set_kept = staticmethod(set_kept)

    def state_columns(self, embedding_dim: int) -> dict[str, int]:
        """Return name and width (values per row) of each state column, in the order of the record.

        Examples
        --------
        >>> shardemb.optim.Adam(rowwise_bias_correction=True).state_columns(embedding_dim=64)
        {'exp_avg': 64, 'exp_avg_sq': 64, 'step': 1}
        """
        columns = self.own_columns(embedding_dim)
        if self.rowwise_bias_correction:
            columns[ROW_STEP] = 1
        if self.dense_equivalent:
            columns[LAST_STEP] = 1
        return columns

    def check_dense_equivalent(self) -> None:
        """Refuse ``dense_equivalent`` where rows cannot be caught up.

        Raises
        ------
        ValueError
            They cannot be with one of the options, or with none.
        """
        self.after_rest()
        lr = self.lr  # type: ignore[attr-defined]
        reasons = {
            "rowwise_bias_correction counts the steps of a row alone": self.rowwise_bias_correction,
            "l1 moves a row in every step": self.l1,
            "a constraint to the unit norm undoes every decay": self.constraint == UNIT_NORM,
            "its learning rate is a function that a store cannot keep; use one of optim.schedules": (
                callable(lr) and not isinstance(lr, schedules.Schedule)
            ),
            "weight_decay without decoupled_weight_decay is a gradient that its statistics see": (
                self.weight_decay and not (self.decoupled_weight_decay or self.decay_is_a_factor)
            ),
        }
        highest = getattr(lr, "lr", lr)
        if not callable(highest):
            reasons["lr * weight_decay is 1 or more"] = highest * self.weight_decay >= 1
        found = [reason for reason, holds in reasons.items() if holds]
        if found:
            msg = f"{self!r} cannot be dense_equivalent: {found[0]}"
            raise ValueError(msg)

    def require_known_lr(self, where: str) -> None:
        """Refuse an update if the learning rate is a function that has to be set again.

        Raises
        ------
        LearningRateError
            It is; the message begins with `where`.
        """
        if isinstance(self.lr, schedules.Unknown):  # type: ignore[attr-defined]
            msg = (
                f"{where}: the learning rate is a function of the step, which a store cannot keep; set it again: "
                f"table.set_optimizer(dataclasses.replace(table.optimizer, lr=function))"
            )
            raise LearningRateError(msg)

    def lr_at(self, step: int) -> float:
        """Return the learning rate of update number `step`, 1 for the first.

        Raises
        ------
        LearningRateError
            It is a function that has to be set again, or that gave something else than a number of at least 0.

        Examples
        --------
        >>> shardemb.optim.SGD(lr=0.5).lr_at(1)
        0.5
        """
        lr: LearningRate = self.lr  # type: ignore[attr-defined]
        if not callable(lr):
            return lr
        value = lr(step)
        try:
            return validation.number(np.asarray(value).item(), "lr", minimum=0.0)
        except (TypeError, ValueError) as error:
            msg = f"the learning rate of step {step} is {value!r}: {error}"
            raise LearningRateError(msg) from error

    def scalars_of(self, step: int) -> Float32Array:
        """Return the scalars of update number `step`, float32, shape (n, k).

        There is one row, or, with ``rowwise_bias_correction``, one for each count that a row may have: row ``n - 1``
        for count ``n``, the last for all that are higher.
        """
        lr = self.lr_at(step)
        return (
            _counted_scalars(self, lr) if self.rowwise_bias_correction else _as_rows(self.scalars(lr, step))
        )

    @property
    def changes_fresh_rows(self) -> bool:
        """Whether a row that was never in a batch changes in the steps of a dense optimizer."""
        return bool(self.weight_decay or self.max_norm is not None or self.constraint is not None)

    @property
    def decay_is_a_factor(self) -> bool:
        """Whether a weight decay that is not decoupled multiplies the weight by the same as one that is."""
        return False

    def decays_until(self, step: int, embedding_dim: int) -> Decays:
        """Return what catching up reads, for all updates up to number `step`, or more."""
        return _decays(self, max(1024, 1 << max(step - 1, 0).bit_length()), embedding_dim)

    @property
    def has_options(self) -> bool:
        """Whether a step is more than `row_step` on the gradient as it is."""
        limits = self.clip_value, self.clip_norm, self.max_norm, self.constraint
        decays = self.weight_decay and (self.decoupled_weight_decay or not self.decay_is_own)
        own = self.rowwise_bias_correction or self.overwrites_gradient
        return bool(own or decays or self.maximize or self.l1) or any(each is not None for each in limits)

    def options_of(self, step: int, embedding_dim: int, factor: float = 1.0) -> Float32Array:
        """Return what `take_step` reads besides the scalars, for gradients that are multiplied by `factor` first."""
        decay = self.weight_decay
        own = sum(self.own_columns(embedding_dim).values())
        options = Options(
            factor=-factor if self.maximize else factor,
            clip_value=math.inf if self.clip_value is None else self.clip_value,
            clip_norm=math.inf if self.clip_norm is None else self.clip_norm,
            l1=self.l1,
            l2=0.0 if self.decoupled_weight_decay or self.decay_is_own else decay,
            kept=1 - self.lr_at(step) * decay if self.decoupled_weight_decay else 1.0,
            max_norm=math.inf if self.max_norm is None else self.max_norm,
            constraint=0 if self.constraint is None else 1 + CONSTRAINTS.index(self.constraint),
            counter=own if self.rowwise_bias_correction else -1,
        )
        return np.array(options, np.float32)


class Rest(NamedTuple):
    """What steps with a gradient of zeros do to a row.

    Attributes
    ----------
    replayed : int
        So many steps have to be taken one by one; what later ones would do besides decay is less than float32 shows.
    decays : dict of str to float
        What a step leaves of the state columns that it changes.
    """

    replayed: int
    decays: dict[str, float]


def steps_to_rest(ratio: float) -> int:
    """Return after how many steps what is left of a geometric series is less than 1e-7 of its first term.

    Raises
    ------
    ValueError
        Its terms do not become smaller.
    """
    if ratio >= 1:
        msg = "cannot be dense_equivalent with these betas: steps with a gradient of zeros do not become shorter"
        raise ValueError(msg)
    return 0 if ratio == 0 else math.ceil(math.log(_AT_REST * (1 - ratio)) / math.log(ratio))


class Decays(NamedTuple):
    """What catching up needs to know of an optimizer, for some number of steps.

    Attributes
    ----------
    scalars : ndarray of float32, shape (steps, 1, k)
    options : ndarray of float32, shape (m,)
        `Options`, but for what a step leaves of a weight.
    kept : ndarray of float32, shape (steps,)
        What each step leaves of a weight.
    log_kept : ndarray of float64, shape (steps + 1,)
        The sum, over the steps so far, of the logarithm of what a step leaves of a weight.
    log_state : ndarray of float64, shape (width of the state,)
        The logarithm of what a step leaves of each value of the state; 0 if it leaves it as it is.
    replayed : int
        See `Rest`.
    """

    scalars: Float32Array
    options: Float32Array
    kept: Float32Array
    log_kept: NDArray[np.float64]
    log_state: NDArray[np.float64]
    replayed: int


@lru_cache(maxsize=16)
def _decays(optimizer: Optimizer, steps: int, embedding_dim: int) -> Decays:
    numbers = np.arange(1.0, steps + 1)
    lr = optimizer.lr  # type: ignore[attr-defined]
    rates = np.broadcast_to(np.asarray(lr(numbers) if callable(lr) else lr, np.float64), numbers.shape)
    scalars = _as_rows(
        tuple(np.broadcast_to(each, numbers.shape) for each in optimizer.scalars(rates, numbers))
    )
    left = 1 - rates * optimizer.weight_decay
    options = optimizer.options_of(1, embedding_dim)
    kept = np.ones(steps, np.float32)
    if optimizer.decoupled_weight_decay:
        kept[:] = left
    log_kept = np.concatenate([[0.0], np.cumsum(np.log(left))])
    rest = optimizer.after_rest()
    with np.errstate(divide="ignore"):  # what does not last at all has a logarithm of minus infinity
        widths = [
            np.full(width, np.log(rest.decays.get(name, 1.0)))
            for name, width in optimizer.own_columns(embedding_dim).items()
        ]
    log_state = np.concatenate([np.empty(0), *widths])
    replayed = rest.replayed
    if optimizer.max_norm is not None or optimizer.constraint is not None:
        replayed = max(replayed, 1)  # rows may not have been held to it before
    return Decays(scalars[:, np.newaxis], options, kept, log_kept, log_state, replayed)


def beta_pair(betas: object) -> tuple[float, float]:
    """Check the decays of two moments.

    Raises
    ------
    TypeError, ValueError
        They are not two numbers in [0, 1).
    """
    given: Any = betas if np.iterable(betas) else ()
    pair = tuple(validation.number(beta, "betas", minimum=0.0) for beta in given)
    if len(pair) != 2 or max(pair) >= 1:
        msg = f"betas must be two numbers in [0, 1), got {betas!r}"
        raise ValueError(msg)
    return pair[0], pair[1]


def below_one(value: float, name: str) -> None:
    """Check a decay.

    Raises
    ------
    ValueError
        It is not in [0, 1).
    """
    if validation.number(value, name, minimum=0.0) >= 1:
        msg = f"{name} must be in [0, 1), got {value!r}"
        raise ValueError(msg)


def _as_rows(scalars: tuple[Scalar, ...]) -> Float32Array:
    columns = np.broadcast_arrays(*(np.atleast_1d(np.asarray(each, np.float64)) for each in scalars))
    return np.ascontiguousarray(np.stack(columns, axis=1), np.float32)


@lru_cache(maxsize=16)
def _counted_scalars(optimizer: Optimizer, lr: float) -> Float32Array:
    """Return the scalars of each count, up to the one from which on they do not change in float32."""
    betas: NDArray[np.float64] = np.array(getattr(optimizer, "betas"))  # noqa: B009
    slowest = max(float(betas.max()), 0.5)
    counts = min(math.ceil(math.log(_NEGLIGIBLE) / math.log(slowest)), _MOST_COUNTS)
    return _as_rows(optimizer.scalars(lr, np.arange(1.0, counts + 1)))
