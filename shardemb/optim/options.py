"""What a step does besides the optimizer's own formula: clipping, weight decay, constraints, a row's own count.

`take_step` is plain Python on one row. ``compute/row_kernels.py`` compiles it around the formula of an optimizer, for
those that have such options; the others do without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardemb.base.sizes import MAX_COUNT

if TYPE_CHECKING:
    from shardemb.base.validation import Float32Array

CONSTRAINTS = NON_NEG, UNIT_NORM = "non_neg", "unit_norm"
"""What weights may be held to after each step."""


class Options(NamedTuple):
    """The options of one step, which kernels see as an array of float32 in this order.

    Attributes
    ----------
    factor : float
        Gradients are multiplied by this first.
    clip_value, clip_norm : float
        Limits of a gradient's values and of its norm; infinity for none.
    l1, l2 : float
        Added to the gradient, times the sign of the weight and times the weight.
    kept : float
        The share of the weight that is left before the step.
    max_norm : float
        Limit of the weight's norm after the step; infinity for none.
    constraint : float
        0, or the position in `CONSTRAINTS` from 1 on.
    counter : float
        Where in the state the row's own count of steps is; -1 if it has none.
    """

    factor: float
    clip_value: float
    clip_norm: float
    l1: float
    l2: float
    kept: float
    max_norm: float
    constraint: float
    counter: float


def set_kept(options: Float32Array, kept: np.float32) -> None:
    """Set `Options.kept` in an array of options."""
    options[5] = kept


def sum_of_squares(values: Float32Array) -> np.float32:
    """Return the sum of the squares of a row's values, in the values' own precision and in a fixed order.

    A single sum would make each addition wait for the one before. So there are eight interleaved partial sums, which
    are added pairwise; the values after the last whole eight are added one by one. This order decides the bits.

    Examples
    --------
    >>> from shardemb.optim.options import sum_of_squares
    >>> float(sum_of_squares(np.arange(10, dtype=np.float32)))
    285.0
    """
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = values.dtype.type(0)
    whole = values.size - values.size % 8
    for j in range(0, whole, 8):
        s0 += values[j] * values[j]
        s1 += values[j + 1] * values[j + 1]
        s2 += values[j + 2] * values[j + 2]
        s3 += values[j + 3] * values[j + 3]
        s4 += values[j + 4] * values[j + 4]
        s5 += values[j + 5] * values[j + 5]
        s6 += values[j + 6] * values[j + 6]
        s7 += values[j + 7] * values[j + 7]
    total = ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7))
    for j in range(whole, values.size):
        total += values[j] * values[j]
    return total


def _row_step(weight: Any, state: Any, gradient: Any, scalars: Any) -> None:  # noqa: ANN401
    """Hold the place of an optimizer's function."""


def clip_gradient(gradient: Float32Array, clip_value: float, clip_norm: float) -> None:
    """Limit a row's gradient, in place."""
    if clip_value < math.inf:
        for j in range(gradient.size):
            gradient[j] = min(max(gradient[j], -clip_value), clip_value)
    if clip_norm < math.inf:
        norm = math.sqrt(sum_of_squares(gradient))
        if norm > clip_norm:
            scale = clip_norm / norm
            for j in range(gradient.size):
                gradient[j] *= scale


def constrain(weight: Float32Array, max_norm: float, constraint: float) -> None:
    """Hold a row's weight to what is asked of it, in place."""
    if constraint == 1:
        for j in range(weight.size):
            weight[j] = max(weight[j], weight.dtype.type(0))
    if max_norm < math.inf or constraint == 2:
        norm = math.sqrt(sum_of_squares(weight))
        limit = weight.dtype.type(1) if constraint == 2 else max_norm
        if norm > limit or (constraint == 2 and norm > 0):
            scale = limit / norm
            for j in range(weight.size):
                weight[j] *= scale


def take_step(
    weight: Float32Array,
    state: Float32Array,
    gradient: Float32Array,
    scalars: Float32Array,
    options: Float32Array,
    work: Float32Array,
) -> None:
    """Take one step on one row, in place, with all options.

    Parameters
    ----------
    weight, state, gradient : ndarray of float32
        As for `Optimizer.row_step`; the gradient is not changed, unless it is `work`.
    scalars : ndarray of float32, shape (n, k)
        For each count of the row, or for all.
    options : ndarray of float32
        `Options`.
    work : ndarray of float32, shape (dim,)
        Scratch memory.
    """
    factor, clip_value, clip_norm, l1, l2, kept = (
        options[0], options[1], options[2], options[3], options[4], options[5],
    )  # fmt: skip
    for j in range(weight.size):
        work[j] = factor * gradient[j]
    clip_gradient(work, clip_value, clip_norm)
    if l1 != 0:
        for j in range(weight.size):
            work[j] += l1 * np.sign(weight[j])
    if l2 != 0:
        for j in range(weight.size):
            work[j] += l2 * weight[j]
    if kept != 1:
        for j in range(weight.size):
            weight[j] *= kept
    which = 0
    if options[8] >= 0:
        count = int(options[8])
        state[count] = min(state[count] + 1, MAX_COUNT)
        which = min(int(state[count]), scalars.shape[0]) - 1
    _row_step(weight, state, work, scalars[which])
    constrain(weight, options[6], options[7])
