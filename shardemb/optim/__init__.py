"""Optimizers: one plain function over one row, and the names of its state columns.

An optimizer is a frozen dataclass of its hyper-parameters. It defines:

- `own_columns`: the names (those of torch) and widths of the numbers that it stores next to each row;
- `scalars`: everything in its formula that is the same for all rows of one step, computed in float64;
- `row_step`: the formula, a function of one row's weight, state, gradient and those scalars.

``compute/row_kernels.py`` compiles `row_step` into the loop over rows, with what ``options.py`` does around it if the
optimizer has such options. To add an optimizer, add a module here with its class, add the class to `OPTIMIZERS`, and
write its test.

If a row occurs several times in a batch, its gradients are summed in the order of the batch before `row_step` is
called. All arithmetic on rows is float32. `step` counts the updates of the whole table, as in torch, not those of a
row; it begins with 1. Rows that are not in a batch do not change, and neither does their state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardemb.base import serialization
from shardemb.optim import schedules
from shardemb.optim.adagrad import Adagrad, RowWiseAdagrad
from shardemb.optim.adam import Adam, Adamax, AdamW, AMSGrad, NAdam, PartialRowWiseAdam
from shardemb.optim.base import Optimizer
from shardemb.optim.ftrl import FTRL
from shardemb.optim.lamb import LAMB, PartialRowWiseLAMB
from shardemb.optim.rmsprop import Adadelta, RMSprop, RowWiseRMSprop
from shardemb.optim.sgd import LARS, SGD, Lion

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "FTRL",
    "LAMB",
    "LARS",
    "SGD",
    "AMSGrad",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "NAdam",
    "Optimizer",
    "PartialRowWiseAdam",
    "PartialRowWiseLAMB",
    "RMSprop",
    "RowWiseAdagrad",
    "RowWiseRMSprop",
    "schedules",
]  # fmt: skip

OPTIMIZERS: dict[str, type[Optimizer]] = {
    cls.__name__: cls
    for cls in (
        SGD, Adagrad, RowWiseAdagrad, Adam, AdamW, PartialRowWiseAdam, AMSGrad, Adamax, NAdam, RMSprop, RowWiseRMSprop,
        Adadelta, LAMB, PartialRowWiseLAMB, LARS, FTRL, Lion,
    )
}  # fmt: skip


def same_columns(one: Optimizer | None, other: object) -> bool:
    """Whether two optimizers are of one kind and have the same state columns; None has none."""
    if one is None or not isinstance(other, Optimizer):
        return one is other
    return type(one) is type(other) and one.state_columns(1) == other.state_columns(1)


def may_replace(one: Optimizer, other: object) -> bool:
    """Whether another optimizer can go on with the state of one: `same_columns`, and the same initial values."""
    same = isinstance(other, Optimizer) and same_columns(one, other)
    return same and one.initial_state() == other.initial_state()  # type: ignore[attr-defined]


def to_json(optimizer: Optimizer) -> dict[str, object]:
    """Describe an optimizer; of a learning rate that is no schedule but another function, only that it is one."""
    document = serialization.to_json(optimizer)
    return document | {"lr": schedules.to_json(document["lr"])}  # type: ignore[arg-type]


def from_json(document: Mapping[str, object]) -> Optimizer:
    """Build the optimizer that `to_json` described.

    Raises
    ------
    FormatError
        This version does not know the optimizer or its schedule, or refuses its hyper-parameters.
    """
    lr = {"lr": schedules.from_json(document["lr"])} if "lr" in document else {}
    return serialization.from_json("optimizer", OPTIMIZERS, {**document, **lr})
