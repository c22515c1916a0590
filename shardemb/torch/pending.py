"""What forward passes looked up: leaves, which are remembered from the moment on when backward leaves a gradient."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from shardemb.store.keyed_table import KeyedTable
    from shardemb.store.table import Table


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows of one table that a forward pass handed to autograd, and that backward has left a gradient at.

    Attributes
    ----------
    table : Table or KeyedTable
        Where they are from.
    ids : ndarray or list
        Whose rows, in the shape in which they were given.
    leaf : torch.Tensor
        The rows, or what the bags were pooled to.
    """

    table: Table | KeyedTable
    ids: Any
    leaf: torch.Tensor


class TableModule(nn.Module):
    """A module whose rows are in tables: it has no parameters, and remembers the gradients until the next step.

    Attributes
    ----------
    pending : list of Lookup
        Those whose leaves got gradients since the last step, in the order in which they got them.
    on_gradient : callable, optional
        Called with each that is added to `pending`.
    taken : int
        How often `pending` was taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pending: list[Lookup] = []
        self.on_gradient: Callable[[Lookup], None] | None = None
        self.taken = 0

    def remember(self, table: Table | KeyedTable, ids: Any, leaf: torch.Tensor) -> None:  # noqa: ANN401
        """Add a lookup to `pending` as soon as backward leaves a gradient at its leaf.

        So a forward pass that no backward follows costs nothing once its result is gone, a forward pass that is run
        again for its gradients counts once, and gradients may be zeroed between forward and backward.
        """
        # Neither the module nor the leaf is held by the leaf: there would be cycles through memory of torch.
        owner, added = weakref.ref(self), -1

        def arrived(leaf: torch.Tensor) -> None:
            nonlocal added
            module = owner()
            if module is not None and added != module.taken:  # a second backward adds to the same gradient
                added = module.taken
                module.add(Lookup(table, ids, leaf))

        leaf.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def add(self, lookup: Lookup) -> None:
        """Add a lookup that has got a gradient."""
        self.pending.append(lookup)
        if self.on_gradient is not None:
            self.on_gradient(lookup)

    def take_pending(self) -> list[Lookup]:
        """Return what has got gradients since the last call, and forget it."""
        taken, self.pending = self.pending, []
        self.taken += 1
        return taken

    def named_tables(self) -> dict[str, Any]:
        """Return the tables that a forward pass looks up: those of a collection by feature, or a single one by ""."""
        table = getattr(self, "table", None)
        return {} if table is None else {"": table}
