"""What a step of a table is taken with: its optimizer and step number, and what happens to all gradients alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base import validation
from shardemb.format import ranges

if TYPE_CHECKING:
    from shardemb.format.ranges import Ranges
    from shardemb.optim import Optimizer


@dataclass
class Training:
    """The mutable state of a table besides its rows.

    Attributes
    ----------
    optimizer : Optimizer or None
        It has the hyper-parameters of the next update.
    step : int
        Updates so far.
    frozen : tuple of (int, int)
        The ranges of rows that no update changes.
    """

    optimizer: Optimizer | None
    step: int
    frozen: Ranges = ()

    def freeze(self, start: int, stop: int | None, count: int, *, frozen: bool) -> None:
        """Freeze a range of the rows of a table that has so many, or unfreeze it.

        Raises
        ------
        TypeError, ValueError
            It is no range of these.
        """
        first = validation.count(start, "start", minimum=0, maximum=count)
        last = count if stop is None else validation.count(stop, "stop", minimum=first, maximum=count)
        self.frozen = (ranges.united if frozen else ranges.without)(self.frozen, first, last)


@dataclass(frozen=True)
class Scaling:
    """What happens to all gradients of a step alike.

    Attributes
    ----------
    scale : float or None
        Divides the gradients; the step is skipped if their norm is not finite.
    max_norm : float or None
        The most that the norm of all gradients together may be.
    extra_norm_sq : float
        The square of the norm of gradients that the caller has besides.
    """

    scale: float | None = None
    max_norm: float | None = None
    extra_norm_sq: float = 0.0

    @classmethod
    def of(cls, scale: object, max_norm: object = None, extra_norm_sq: object = 0.0) -> Scaling | None:
        """Check what an update is given; return None if nothing is to be scaled.

        Raises
        ------
        TypeError, ValueError
            `scale` is not a number above 0, or one of the others not one of at least 0.
        """
        if scale is None and max_norm is None:
            return None
        checked = None if scale is None else validation.number(scale, "scale", minimum=0.0)
        if checked == 0:
            msg = "scale divides the gradients, so it must be greater than 0"
            raise ValueError(msg)
        if isinstance(extra_norm_sq, float | np.floating) and not np.isfinite(extra_norm_sq):
            extra = float(extra_norm_sq)  # what a step with a scale is skipped for
        else:
            extra = validation.number(extra_norm_sq, "extra_norm_sq", minimum=0.0)
        most = None if max_norm is None else validation.number(max_norm, "max_norm", minimum=0.0)
        return cls(checked, most, extra)

    def norm(self, sum_of_squares: float) -> float:
        """Return the norm of all gradients, divided by the scale, from the sum of their squares before."""
        squares = sum_of_squares / (self.scale or 1.0) ** 2 + self.extra_norm_sq
        return math.sqrt(squares) if squares >= 0 else math.nan

    def factor(self, norm: float) -> float:
        """Return what gradients of this norm are multiplied by; as ``torch.nn.utils.clip_grad_norm_`` has it."""
        clipped = 1.0 if self.max_norm is None else min(1.0, self.max_norm / (norm + 1e-6))
        return clipped / (self.scale or 1.0)


@dataclass(frozen=True)
class Padding:
    """What becomes of the gradients of an update before they are summed.

    Attributes
    ----------
    padding_idx : int, str, bytes or None
        Gradients of this row are dropped, or of this key's; None stands for the table's own row of padding.
    scale_grad_by_freq : bool
        Divide the gradients of each row by how often it is in the batch.
    """

    padding_idx: Any = None
    scale_grad_by_freq: bool = False


NO_PADDING = Padding()


def is_checked(scaling: Scaling | None, *, check_finite: bool) -> bool:
    """Whether the gradients of an update have to be checked: with a scaling, their norm tells if all are finite."""
    return check_finite and scaling is None
