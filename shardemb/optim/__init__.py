"""Optimizers: one plain function over one row, plus the names of its state columns.

An optimizer is a frozen dataclass of its hyper-parameters with three facts about itself:

- `state_columns`: the names (torch's) and widths of the numbers it keeps beside each row;
- `scalars`: everything in its formula that is the same for all rows of one step, computed in float64;
- `row_step`: the formula, a function of one row's weight, state, gradient and those scalars.

``compute/row_kernels.py`` compiles `row_step` into the loop over rows. To add an optimizer, add a module here with its
class, its name to `OPTIMIZERS`, and its test.

A row's gradient has its duplicates summed already, in the order of the batch. All arithmetic on rows is float32;
`step` counts the updates of the whole table, beginning with 1, as torch does, and not those of a row. Rows that
are not in a batch do not move, and neither does their state.
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
    """Build the optimizer that `persisted.to_json` described.

    Raises
    ------
    FormatError
        Not one that this version knows, or hyper-parameters that it refuses.
    """
    return serialization.from_json("optimizer", OPTIMIZERS, document)
