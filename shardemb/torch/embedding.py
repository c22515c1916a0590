"""`Embedding`: one row for each id."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from shardemb.torch.pending import TableModule
from shardemb.torch.tensors import array_of_ids, leaf_of

if TYPE_CHECKING:
    from shardemb.store.keyed_table import KeyedTable
    from shardemb.store.table import Table


class Embedding(TableModule):
    """Rows of a table in the place of `torch.nn.Embedding`.

    Parameters
    ----------
    table : Table or KeyedTable
        Whose rows are looked up.
    """

    def __init__(self, table: Table | KeyedTable) -> None:
        super().__init__()
        self.table = table

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the row of each id; shape ``input.shape + (embedding_dim,)``, float32, on the device of `input`."""
        ids = array_of_ids(input)
        leaf = leaf_of(self.table.lookup(ids), input.device)
        if not torch.is_grad_enabled():
            return leaf.detach()
        self.remember(self.table, ids, leaf)
        return leaf
