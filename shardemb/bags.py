"""Bags of rows as users give them: plain data, which costs nothing to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Mode = Literal["sum", "mean", "max", "sqrtn"]
"""How the rows of a bag become one; see `Table.lookup_bag`."""


@dataclass(frozen=True, eq=False)
class Bags:
    """Bags of rows of one table, for calls that take those of several: `Store.lookup_bag` and `Store.update_bag`.

    Parameters
    ----------
    ids, offsets, mode, weights, padding_idx, include_last_offset : optional but for the first
        As for `Table.lookup_bag`, or, for a table that is used by key, `KeyedTable.lookup_bag`, where `padding_idx` is
        a key.

    Examples
    --------
    >>> import shardemb
    >>> shardemb.Bags([1, 2, 3], offsets=[0, 2], mode="mean")
    Bags(ids=[1, 2, 3], offsets=[0, 2], mode='mean', weights=None, padding_idx=None, include_last_offset=False)
    """

    ids: Any
    offsets: ArrayLike | None = None
    mode: Mode = "sum"
    weights: ArrayLike | None = None
    padding_idx: Any = None
    include_last_offset: bool = False
