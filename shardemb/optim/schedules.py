"""Learning rates that depend on the step. An optimizer takes one of these, or a number, as its ``lr``.

Step 1 is the first update of a table, as everywhere in this package. A schedule is stored with the table's optimizer.
Any other function of the step may be an ``lr`` too, but a store cannot keep it: it has to be set again with
`Table.set_optimizer` after the store is opened.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import serialization, validation

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    Steps = float | NDArray[np.float64]
    """One step, or several at once."""

    LearningRate = float | Callable[[Any], Any]


@dataclass(frozen=True)
class Schedule(ABC):
    """Base class of all schedules; use one of its subclasses. Calling one with a step returns its learning rate."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type == "int":
                value = validation.count(value, each.name, minimum=0 if each.name == "warmup_steps" else 1)
            else:
                value = validation.number(value, each.name, minimum=0.0)
            object.__setattr__(self, each.name, value)

    @abstractmethod
    def __call__(self, step: Steps) -> Any:  # noqa: ANN401
        """Return the learning rate of a step, or of an array of steps; the first step is 1."""


def _together(function: Callable[[Any], Any], values: Any) -> Any:  # noqa: ANN401
    """Apply a function of NumPy to some numbers, or to one as if it were among others.

    Of a single number, NumPy computes powers and cosines with other instructions than of an array, on some processors,
    and rounds them otherwise. A step has to have the same learning rate whether it is asked for alone or not.
    """
    return function(np.atleast_1d(values)).reshape(np.shape(values))


def _warmed_up(step: Steps, warmup_steps: int) -> Any:  # noqa: ANN401
    """Return the share of the learning rate that a linear warm-up has reached: 1 from step `warmup_steps` on."""
    return np.minimum(step / max(warmup_steps, 1), 1.0)


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    """A learning rate that rises linearly, and is constant from then on: ``lr * min(1, step / warmup_steps)``.

    Parameters
    ----------
    lr : float
        The final learning rate, at least 0.
    warmup_steps : int
        The step at which it is reached; 0 for a constant learning rate.

    Examples
    --------
    >>> schedule = shardemb.optim.schedules.LinearWarmup(lr=0.1, warmup_steps=4)
    >>> [round(float(schedule(step)), 3) for step in (1, 2, 4, 100)]
    [0.025, 0.05, 0.1, 0.1]
    """

    lr: float
    warmup_steps: int = 0

    def __call__(self, step: Steps) -> Any:  # noqa: ANN401, D102
        return self.lr * _warmed_up(step, self.warmup_steps)


@dataclass(frozen=True)
class StepDecay(Schedule):
    """A learning rate that is multiplied by `gamma` every `step_size` steps, after a linear warm-up if there is one.

    ``lr * gamma ** ((step - 1) // step_size) * min(1, step / warmup_steps)``.

    Parameters
    ----------
    lr : float
        The first learning rate, at least 0.
    step_size : int
        Steps between two changes, at least 1.
    gamma : float
        At least 0.
    warmup_steps : int
        Steps of the warm-up; 0 for none.

    Notes
    -----
    Without warm-up, ``torch.optim.lr_scheduler.StepLR`` whose ``step`` is called after each update.

    Examples
    --------
    >>> schedule = shardemb.optim.schedules.StepDecay(lr=1.0, step_size=10, gamma=0.5)
    >>> [float(schedule(step)) for step in (1, 10, 11, 21)]
    [1.0, 1.0, 0.5, 0.25]
    """

    lr: float
    step_size: int
    gamma: float = 0.1
    warmup_steps: int = 0

    def __call__(self, step: Steps) -> Any:  # noqa: ANN401, D102
        exponents = (np.asarray(step, np.float64) - 1) // self.step_size
        decayed = self.lr * _together(lambda each: self.gamma**each, exponents)
        return decayed * _warmed_up(step, self.warmup_steps)


@dataclass(frozen=True)
class CosineDecay(Schedule):
    """A learning rate that falls along half a cosine to `min_lr`, and stays there.

    ``min_lr + (lr - min_lr) * (1 + cos(pi * x)) / 2`` with ``x = min(1, (step - 1 - warmup_steps) / decay_steps)``;
    during the warm-up, ``lr * step / warmup_steps``.

    Parameters
    ----------
    lr : float
        The first learning rate, at least 0.
    decay_steps : int
        Steps of the half cosine, at least 1.
    min_lr : float
        The last learning rate, at least 0.
    warmup_steps : int
        Steps of the linear warm-up before it; 0 for none.

    Notes
    -----
    Without warm-up, ``torch.optim.lr_scheduler.CosineAnnealingLR(T_max=decay_steps)`` whose ``step`` is called after
    each update, except that the learning rate does not rise again after ``decay_steps``.

    Examples
    --------
    >>> schedule = shardemb.optim.schedules.CosineDecay(lr=1.0, decay_steps=100)
    >>> [round(float(schedule(step)), 3) for step in (1, 51, 101, 500)]
    [1.0, 0.5, 0.0, 0.0]
    """

    lr: float
    decay_steps: int
    min_lr: float = 0.0
    warmup_steps: int = 0

    def __call__(self, step: Steps) -> Any:  # noqa: ANN401, D102
        x = np.clip((np.asarray(step, np.float64) - 1 - self.warmup_steps) / self.decay_steps, 0.0, 1.0)
        decayed = self.min_lr + (self.lr - self.min_lr) * (1 + _together(np.cos, np.pi * x)) / 2
        rising = np.asarray(step) <= self.warmup_steps
        return np.where(rising, self.lr * _warmed_up(step, self.warmup_steps), decayed)


@dataclass(frozen=True)
class InverseSquareRoot(Schedule):
    """A learning rate that rises linearly, and then falls with the root of the step.

    ``lr * min(step / warmup_steps, sqrt(warmup_steps / step))``.

    Parameters
    ----------
    lr : float
        The highest learning rate, at least 0.
    warmup_steps : int
        The step at which it is reached, at least 1; the learning rate falls from then on. 0 counts as 1.

    Notes
    -----
    Vaswani et al. 2017, "Attention Is All You Need", section 5.3, with ``lr`` for its ``(d * warmup_steps) ** -0.5``.

    Examples
    --------
    >>> schedule = shardemb.optim.schedules.InverseSquareRoot(lr=1.0, warmup_steps=4)
    >>> [float(schedule(step)) for step in (1, 4, 16)]
    [0.25, 1.0, 0.5]
    """

    lr: float
    warmup_steps: int = 1

    def __call__(self, step: Steps) -> Any:  # noqa: ANN401, D102
        warmup = max(self.warmup_steps, 1)
        return self.lr * np.minimum(_warmed_up(step, warmup), np.sqrt(warmup / np.asarray(step, np.float64)))


@dataclass(frozen=True)
class Unknown:
    """Stands for a function that the store could not keep, until it is set again."""

    def __call__(self, step: Steps) -> float:
        """Return no number: `Optimizer.require_known_lr` refuses updates before."""
        return math.nan


SCHEDULES: dict[str, type[Schedule]] = {
    cls.__name__: cls for cls in (LinearWarmup, StepDecay, CosineDecay, InverseSquareRoot)
}

_FUNCTION = {"name": "function"}


def checked(lr: object) -> LearningRate:
    """Check a learning rate given by the user: a number, a schedule, or another function of the step.

    Raises
    ------
    TypeError, ValueError
        It is none of these, or a number that is negative or not finite in float32.
    """
    if isinstance(lr, Unknown | Schedule):
        return lr
    if callable(lr) and not isinstance(lr, type):
        return lr
    return validation.number(lr, "lr", minimum=0.0)


def to_json(lr: LearningRate) -> object:
    """Return a learning rate as JSON has it; of other functions than schedules, only that it is one."""
    if isinstance(lr, Schedule):
        return serialization.to_json(lr)
    return dict(_FUNCTION) if callable(lr) else lr


def from_json(document: object) -> object:
    """Return what `to_json` described; a function that is no schedule becomes `Unknown`.

    Raises
    ------
    FormatError
        This version does not know the schedule, or refuses its parameters.
    """
    if not isinstance(document, dict):
        return document
    if document == _FUNCTION:
        return Unknown()
    described: Mapping[str, object] = document
    return serialization.from_json("schedule", SCHEDULES, described)
