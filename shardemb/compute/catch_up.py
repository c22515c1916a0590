"""Brings rows that were left out of steps to where a dense optimizer would have them.

To a dense optimizer, a row that is not in a batch has a gradient of zeros: weights decay, moments decay, and a momentum
goes on moving the weight. An optimizer says after how many such steps nothing is left but decay. So many are taken one
by one, with its own formula; the rest is one multiplication.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.compute.compiler import formula, specialised

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array


def _take_step(weight: Any, state: Any, gradient: Any, scalars: Any, options: Any, work: Any) -> None:  # noqa: ANN401
    """Hold the place of an optimizer's function."""


def _catch_up(
    records: Float32Array,
    dim: int,
    places: Int64Array,
    scalars: Float32Array,
    options: Float32Array,
    log_kept: NDArray[np.float64],
    log_state: NDArray[np.float64],
    replayed: int,
    step: int,
    mark: int,
    start: int,
    stop: int,
) -> None:
    """Bring the records at ``places[start:stop]`` to a step, in place.

    The last value of a record is the step that the row has been brought to; it becomes `mark`. `scalars` and `options`
    are those of each step; for the others see ``optim.base.Decays``.
    """
    zeros, work = np.zeros(dim, np.float32), np.empty(dim, np.float32)
    for i in range(start, stop):
        record = records[places[i]]
        weight, state = record[:dim], record[dim:]
        last = np.int64(record[record.size - 1])
        record[record.size - 1] = np.float32(max(last, np.int64(mark)))
        if last >= step:  # also where an update in another thread was faster than a lookup
            continue
        middle = min(last + np.int64(replayed), np.int64(step))
        for k in range(last, middle):  # the steps that are numbered from `last` + 1 on
            _take_step(weight, state, zeros, scalars[k], options[k], work)
        if middle < step:
            kept = np.float32(np.exp(log_kept[step] - log_kept[middle]))
            for j in range(dim):
                weight[j] *= kept
            for j in range(log_state.size):
                if log_state[j] != 0:
                    state[j] *= np.float32(np.exp(log_state[j] * (step - middle)))


@cache
def catch_up(optimizer: type[Any]) -> Callable[..., None]:
    """Return `_catch_up` compiled for one class of optimizers."""
    squares = formula(optimizer.sum_of_squares)
    own = formula(optimizer.row_step, sum_of_squares=squares)
    clip, constrain = (formula(each, sum_of_squares=squares) for each in optimizer.around_step)
    whole = formula(optimizer.take_step, _row_step=own, clip_gradient=clip, constrain=constrain)
    return specialised(_catch_up, f"catch_up_{optimizer.__name__}", _take_step=whole)
