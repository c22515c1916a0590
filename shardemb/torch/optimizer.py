"""`Optimizer`: one step of all tables of a model, of the shape of `torch.optim.Optimizer`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from shardemb.torch.pending import Lookup, TableModule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray


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
        for table in {each.table for each in lookups}:
            table.update(*_joined([each for each in lookups if each.table is table]))
        for each in lookups:
            each.leaf.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients since the last step."""
        for module in self._modules:
            for each in module.take_pending():
                each.leaf.grad = None


def _joined(lookups: list[Lookup]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    ids = np.concatenate([each.ids.reshape(-1) for each in lookups])
    grads = [
        each.leaf.grad.reshape(-1, each.leaf.shape[-1]) for each in lookups if each.leaf.grad is not None
    ]
    return ids, torch.cat(grads).cpu().numpy()
