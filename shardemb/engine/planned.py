"""Checked lookups and changes of one table each, of which batches are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from shardemb.errors import FrozenRowError, ShardEmbError
from shardemb.format import ranges

if TYPE_CHECKING:
    from collections.abc import Callable

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.compute.plan import Grouped
    from shardemb.engine.shards import Shards
    from shardemb.engine.training import Training


class Target(Protocol):
    """A table as a batch sees it. Its memory is replaced when it is resized or resharded, and when that is undone."""

    training: Training

    @property
    def memory(self) -> Shards | None:
        """Its memory now; None once it is released."""

    def live(self) -> Shards:
        """Return its memory now.

        Raises
        ------
        StoreClosedError, TableNotFoundError
            The store was closed; the table was dropped.
        """


class PlannedRead(NamedTuple):
    """A checked lookup in one table, and the shape of its result.

    Where ids only stand in for rows that there are not, `replace` is called with the result and fills in what it is.
    """

    table: Target
    shards: Shards
    column: str
    ids: Int64Array
    shape: tuple[int, ...]
    replace: Callable[[Float32Array], None] | None = None

    def replacing(self, replace: Callable[[Float32Array], None]) -> PlannedRead:
        """Return the same lookup, whose result `replace` completes."""
        return self._replace(replace=replace)

    def finish(self, result: Float32Array) -> None:
        """Complete a result that has been read."""
        if self.replace is not None:
            self.replace(result)

    def into(self, result: Float32Array) -> Read:
        """Add the array that the result goes to; it has that shape and is C-contiguous."""
        # To kernels, a subclass of ndarray such as memmap would be another type.
        flat = np.asarray(result).reshape(-1, self.shape[-1])
        return Read(self.table, self.shards, self.column, self.ids, flat)


class Read(NamedTuple):
    """A lookup in one table: ``out[i]`` becomes the column of row ``ids[i]``. The ids were checked against `shards`."""

    table: Target
    shards: Shards
    column: str
    ids: Int64Array
    out: Float32Array

    def renewed(self) -> Read:
        """Return the lookup in the memory that the table has now; itself if that is still the same."""
        now = self.table.memory
        if now is None or now is self.shards:
            return self
        if self.ids.size and int(self.ids.max()) >= now.spec.num_embeddings:
            return self  # the table lost rows: the lookup sees them as they were when it began
        return self._replace(shards=now)


@dataclass(frozen=True)
class Change:
    """A change of one table: gradients for a step of its optimizer, or weights to write.

    Attributes
    ----------
    table : Target
        Its memory is looked up when the change is carried out, and not before.
    batch : Grouped
        The rows.
    values : ndarray of float32
        Gradients or weights. Weights may also be as wide as whole records.
    takes_step : bool
        Whether the optimizer takes a step with the gradients.
    factor : float
        The gradients are multiplied by this first.
    renew : callable, optional
        Returns the change as it has to be now, if what it was planned from has changed, otherwise None. It is called
        with the store's lock held, again after every wait.
    """

    table: Target
    batch: Grouped
    values: Float32Array
    takes_step: bool
    factor: float = 1.0
    renew: Callable[[], Change | None] | None = None

    def overwritten(self, shards: Shards) -> Int64Array | None:
        """Where in `values` the new record of each row is; None if what the rows hold so far matters."""
        if self.takes_step or self.values.shape[1] != shards.spec.width:
            return None
        return self.last_positions()

    def last_positions(self) -> Int64Array:
        """Where in `values` each row is given last, which counts."""
        last: Int64Array = self.batch.order[self.batch.starts[1:] - 1]
        return last

    def renewed(self) -> Change:
        """Return the change as it has to be now; itself if nothing that it was planned from has changed.

        Raises
        ------
        StoreClosedError, TableNotFoundError
            The store was closed; the table was dropped.
        ShardEmbError
            The table does not have the rows or the optimizer any more.
        FrozenRowError
            It is an update of a frozen row.
        """
        change = (self.renew() if self.renew else None) or self
        require_rows(change.table, change.batch.rows, takes_step=change.takes_step)
        return change


def require_rows(table: Target, rows: Int64Array, *, takes_step: bool = False) -> Shards:
    """Return a table's memory, if it still has ascending rows that a change was planned for, and an optimizer.

    Raises
    ------
    StoreClosedError, TableNotFoundError
        The store was closed; the table was dropped.
    ShardEmbError
        The table does not have them any more.
    FrozenRowError
        One of them is frozen, and `takes_step`.
    """
    shards = table.live()
    if takes_step and (frozen := ranges.first_within(table.training.frozen, rows)) is not None:
        msg = (
            f"row {frozen} of the table in {shards.directory} is frozen, so it takes no gradients; leave them out, or "
            f"call unfreeze_rows({frozen}, {frozen + 1}); nothing was changed"
        )
        raise FrozenRowError(msg)
    gone = rows.size and rows[-1] >= shards.spec.num_embeddings
    if gone or (takes_step and table.training.optimizer is None):
        msg = (
            f"the table in {shards.directory} lost rows or its optimizer while this change waited; "
            f"nothing was changed"
        )
        raise ShardEmbError(msg)
    return shards
