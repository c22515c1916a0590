"""Optimizers: one plain function over one row, and the names of its state columns.

An optimizer is a frozen dataclass of its hyper-parameters. It defines:

- `state_columns`: the names (those of torch) and widths of the numbers that it stores next to each row;
- `scalars`: everything in its formula that is the same for all rows of one step, computed in float64;
- `row_step`: the formula, a function of one row's weight, state, gradient and those scalars.

``compute/row_kernels.py`` compiles `row_step` into the loop over rows. To add an optimizer, add a module here with its
class, add the class to `OPTIMIZERS`, and write its test.

If a row occurs several times in a batch, its gradients are summed in the order of the batch before `row_step` is
called. All arithmetic on rows is float32. `step` counts the updates of the whole table, as in torch, not those of a
row; it begins with 1. Rows that are not in a batch do not change, and neither does their state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardemb.base import serialization
from shardemb.optim.adagrad import Adagrad, RowWiseAdagrad
from shardemb.optim.adam import Adam
from shardemb.optim.base import Optimizer
from shardemb.optim.sgd import SGD

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["SGD", "Adagrad", "Adam", "Optimizer", "RowWiseAdagrad"]

OPTIMIZERS: dict[str, type[Optimizer]] = {cls.__name__: cls for cls in (SGD, Adagrad, RowWiseAdagrad, Adam)}


def from_json(document: Mapping[str, object]) -> Optimizer:
    """Build the optimizer that `serialization.to_json` described.

    Raises
    ------
    FormatError
        This version does not know the optimizer, or refuses its hyper-parameters.
    """
    return serialization.from_json("optimizer", OPTIMIZERS, document)
