"""A table as exports see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from shardemb import optim
from shardemb.base import serialization
from shardemb.compute import scheduler

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.engine.table_state import TableState

T = TypeVar("T")


class TableSource:
    """A table as exports see it (`shardemb.exports.selection.RowSource`): all of its rows, or the first `num_rows`.

    It holds `owner`, which keeps the store open.
    """

    def __init__(
        self,
        table: TableState,
        owner: object,
        num_rows: int | None = None,
        keys: Any = None,  # noqa: ANN401
    ) -> None:
        spec = table.live().spec
        self._table, self._owner = table, owner
        self.name = table.name
        self.num_embeddings = spec.num_embeddings if num_rows is None else num_rows
        self.embedding_dim = spec.embedding_dim
        self.rows_per_shard = spec.rows_per_shard
        self.threads = table.runtime.threads
        self.keys = keys
        self.columns = {name: spec.parts[name].count for name in spec.states}
        self.form = spec.precision.exported
        plain = isinstance(spec.precision.public_dtype, str)
        self.stored = str(spec.precision.public_dtype) if plain else "float32"

    @property
    def commit(self) -> int | None:
        """The number of the last commit, if no row was changed after it."""
        last = self._table.runtime.committed.commit
        return None if self._table.changed_rows or last is None else last.id

    def read_rows(self, start: int, stop: int, columns: Sequence[str]) -> list[NDArray[Any]]:
        """Read the weights of a range of rows, then each state column."""
        states = [self._table.read_range(column, start, stop) for column in columns]
        return [self._table.read_range("weight", start, stop, self.form), *states]

    def read_ids(self, ids: Int64Array, columns: Sequence[str] = ()) -> list[NDArray[Any]]:
        """Read the weights of ascending rows, then each state column."""
        states = [self._table.read_here(column, ids) for column in columns]
        return [self._table.read_here("weight", ids, self.form), *states]

    def read_vectors(self, ids: Int64Array, form: str) -> NDArray[Any]:
        """Read the weights of ascending rows in some form."""
        return self._table.read_here("weight", ids, form)

    def read_column(self, column: str, ids: Int64Array) -> NDArray[np.float32]:
        """Read a state column with one number a row."""
        return self._table.read_here(column, ids)[:, 0]

    def run(self, tasks: Sequence[Callable[[], T]], stop: threading.Event | None = None) -> list[T]:
        """Run tasks, as many concurrently as a batch of the table may use threads."""
        return scheduler.run(tasks, self.threads, stop)

    def release_pages(self, start: int, stop: int) -> None:
        """Release the pages of a range of rows from memory; not in a reader of a tag, whose pages may be its own."""
        if self._table.runtime.past is not None:
            return
        with self._table.runtime.lock:
            self._table.live().release_pages(start, stop)

    def describe(self) -> Mapping[str, object]:
        """Return a few facts about the table, as JSON has them."""
        spec, training = self._table.spec, self._table.training
        return {
            "uuid": spec.uuid,
            "step": training.step,
            "optimizer": optim.to_json(training.optimizer) if training.optimizer else None,
            "initializer": serialization.to_json(spec.initializer),
        }
