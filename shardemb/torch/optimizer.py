"""`Optimizer`: one step of all tables of a model, of the shape of `torch.optim.Optimizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shardemb.torch.merging import merged
from shardemb.torch.pending import TableModule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


class Optimizer(torch.optim.Optimizer):
    """Take the steps of all tables of a model together.

    Parameters
    ----------
    modules : torch.nn.Module or iterable of torch.nn.Module
        A model, or some of its modules: everything in them that has its rows in tables.
    """

    def __init__(self, modules: torch.nn.Module | Iterable[torch.nn.Module]) -> None:
        given = [modules] if isinstance(modules, torch.nn.Module) else list(modules)
        self._modules = [each for one in given for each in one.modules() if isinstance(each, TableModule)]
        super().__init__([{"params": []}], {"lr": 1.0})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the rows that were looked up since the last step, by their gradients."""
        loss = closure() if closure is not None else None
        lookups = [each for module in self._modules for each in module.take_pending()]
        for step in merged(lookups):
            step.store.update(step.batches, missing=step.missing)
        for each in lookups:
            each.leaf.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients since the last step."""
        for module in self._modules:
            for each in module.take_pending():
                each.leaf.grad = None
