"""What the forward passes since the last step looked up: the leaves in which backward collects gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch

    from shardemb.store.keyed_table import KeyedTable
    from shardemb.store.table import Table


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows of one table that a forward pass handed to autograd.

    Attributes
    ----------
    table : Table or KeyedTable
        Where they are from.
    ids : ndarray or list
        Whose rows, in the shape in which they were given.
    leaf : torch.Tensor
        The rows. Its gradient is None until backward has reached it.
    """

    table: Table | KeyedTable
    ids: Any
    leaf: torch.Tensor


class TableModule(nn.Module):
    """A module whose rows are in tables: it has no parameters, and remembers what is looked up until the next step."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: list[Lookup] = []

    def take_pending(self) -> list[Lookup]:
        """Return what was looked up since the last call, and forget it."""
        taken, self.pending = self.pending, []
        return taken
