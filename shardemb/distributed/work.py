"""What an owner is asked to do with the store of a partition: plain data, each with the call that it is.

Rows are numbers within the partition. A read changes nothing. A change is made in every partition, also in those that
have no row of it, so that all of them count the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from shardemb.distributed import routing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from shardemb.commits.verify import Damage
    from shardemb.dtypes import Dtype, DtypeLike
    from shardemb.format.manifest import Commit
    from shardemb.initializers import Initializer
    from shardemb.optim import Optimizer
    from shardemb.session.display import StoreInfo
    from shardemb.session.table_catalog import TableRequest
    from shardemb.store.partition import Partition


@dataclass(frozen=True)
class TableFacts:
    """What everyone who uses a table knows of it; see `Table`.

    Attributes
    ----------
    name : str
    num_embeddings, embedding_dim : int
    dtype : str or Dtype
    optimizer : Optimizer or None
        As it was when the table was created or last looked at.
    initializer : Initializer
    padding_idx : int or None
    row_bytes : int
        As how many bytes ``dtype="raw"`` has the weights of a row; 0 in a table of float32.
    counters : bool
        Whether rows count how often they were in a batch, so that equal ids must not be brought together before.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    dtype: str | Dtype
    optimizer: Optimizer | None
    initializer: Initializer
    row_bytes: int
    padding_idx: int | None = None
    counters: bool = False


class Read(Protocol):
    """What changes nothing."""

    def read(self, partition: Partition, rows: Sequence[NDArray[np.int64]]) -> list[NDArray[Any]]:
        """Return for each array of rows an array with one entry for each."""


class Change(Protocol):
    """What is made once in every partition, as a whole or not at all."""

    def change(self, partition: Partition, part: int, arrays: Sequence[NDArray[Any]]) -> None:
        """Make it in partition number `part`, of whose rows the arrays are."""


class Question(Protocol):
    """What is asked of each partition about itself."""

    def answer(self, partition: Partition) -> Any:  # noqa: ANN401
        """Return something that can be pickled."""


# ---- reads


@dataclass(frozen=True)
class Lookup:
    """See `Table.lookup`, for one table or several."""

    tables: tuple[str, ...]
    dtype: str | None = None

    def read(self, partition: Partition, rows: Sequence[NDArray[np.int64]]) -> list[NDArray[Any]]:
        """See `Read`."""
        if self.dtype is None and len(self.tables) > 1:
            found = partition.store.lookup(dict(zip(self.tables, rows, strict=True)))
            return [found[name] for name in self.tables]
        each = zip(self.tables, rows, strict=True)
        return [partition.store[name].lookup(some, dtype=self.dtype) for name, some in each]


@dataclass(frozen=True)
class State:
    """See `Table.state`."""

    table: str
    column: str

    def read(self, partition: Partition, rows: Sequence[NDArray[np.int64]]) -> list[NDArray[Any]]:
        """See `Read`."""
        return [partition.store[self.table].state(self.column, some) for some in rows]


@dataclass(frozen=True)
class Prefetch:
    """See `Table.prefetch`."""

    table: str
    for_update: bool

    def read(self, partition: Partition, rows: Sequence[NDArray[np.int64]]) -> list[NDArray[Any]]:
        """See `Read`; what is returned means nothing."""
        for some in rows:
            partition.store[self.table].prefetch(some, for_update=self.for_update)
        return [np.zeros(some.size, np.bool_) for some in rows]


# ---- changes


@dataclass(frozen=True)
class Update:
    """See `Store.update`: rows and gradients of each table, which were checked by whoever asks.

    Without any row, it is still a step.
    """

    tables: tuple[str, ...]

    def change(self, partition: Partition, part: int, arrays: Sequence[NDArray[Any]]) -> None:
        """See `Change`."""
        batches = {
            name: (rows, gradients)
            for name, rows, gradients in zip(self.tables, arrays[::2], arrays[1::2], strict=True)
        }
        partition.store.update(batches, check_finite=False)


@dataclass(frozen=True)
class Write:
    """See `Table.write`."""

    table: str

    def change(self, partition: Partition, part: int, arrays: Sequence[NDArray[Any]]) -> None:
        """See `Change`."""
        rows, values = arrays
        if rows.size:
            partition.store[self.table].write(rows, values, check_finite=False)


@dataclass(frozen=True)
class CreateTable:
    """See `Store.create_table`; the request is that of the whole table, with dtypes of weights and state."""

    wanted: TableRequest
    precision: tuple[DtypeLike, str]
    parts: int

    def change(self, partition: Partition, part: int, arrays: Sequence[NDArray[Any]]) -> None:
        """See `Change`. A table of fewer rows than partitions has one row that no id leads to in some of them."""
        wanted, precision = self.wanted, self.precision
        assert wanted.num_embeddings is not None
        padding = wanted.padding_idx
        mine = None if padding is None or padding % self.parts != part else padding // self.parts
        count = max(1, routing.local_rows(wanted.num_embeddings, part, self.parts))
        partition.store.create_table(
            wanted.name,
            num_embeddings=count,
            embedding_dim=wanted.embedding_dim,
            initializer=wanted.initializer,
            counters=wanted.counters,
            optimizer=wanted.optimizer,
            rows_per_shard=wanted.rows_per_shard,
            padding_idx=mine,
            dtype=precision[0],
            state_dtype=precision[1],
        )


@dataclass(frozen=True)
class DropTable:
    """See `Store.drop_table`."""

    table: str

    def change(self, partition: Partition, part: int, arrays: Sequence[NDArray[Any]]) -> None:
        """See `Change`."""
        partition.store.drop_table(self.table)


@dataclass(frozen=True)
class SetOptimizer:
    """See `Table.set_optimizer`."""

    table: str
    optimizer: Optimizer

    def change(self, partition: Partition, part: int, arrays: Sequence[NDArray[Any]]) -> None:
        """See `Change`."""
        partition.store[self.table].set_optimizer(self.optimizer)


# ---- questions


@dataclass(frozen=True)
class DescribeTables:
    """What the tables of a partition are, with its own numbers of rows."""

    def answer(self, partition: Partition) -> dict[str, TableFacts]:
        """See `Question`."""
        return {name: _facts(name, table) for name, table in partition.store.items()}


def _facts(name: str, table: Any) -> TableFacts:  # noqa: ANN401
    return TableFacts(
        name=name,
        num_embeddings=table.num_embeddings,
        embedding_dim=table.embedding_dim,
        dtype=table.dtype,
        optimizer=table.optimizer,
        initializer=table.initializer,
        row_bytes=0 if table.dtype == "float32" else table.lookup([0], dtype="raw").shape[-1],
    )


@dataclass(frozen=True)
class Step:
    """See `Table.step`."""

    table: str

    def answer(self, partition: Partition) -> int:
        """See `Question`."""
        step: int = partition.store[self.table].step
        return step


@dataclass(frozen=True)
class LastCommit:
    """See `Store.last_commit`."""

    def answer(self, partition: Partition) -> Commit | None:
        """See `Question`."""
        found: Commit | None = partition.store.last_commit
        return found


@dataclass(frozen=True)
class Verify:
    """See `Store.verify`."""

    tables: tuple[str, ...] | None

    def answer(self, partition: Partition) -> list[Damage]:
        """See `Question`."""
        found: list[Damage] = partition.store.verify(self.tables)
        return found


@dataclass(frozen=True)
class Stats:
    """See `Store.stats`."""

    def answer(self, partition: Partition) -> Mapping[str, int]:
        """See `Question`."""
        found: Mapping[str, int] = partition.store.stats()
        return found


@dataclass(frozen=True)
class Info:
    """See `Store.info`."""

    def answer(self, partition: Partition) -> StoreInfo:
        """See `Question`."""
        return partition.store.info()


@dataclass(frozen=True)
class HasChanges:
    """See `Store.has_changes`."""

    def answer(self, partition: Partition) -> bool:
        """See `Question`."""
        return bool(partition.store.has_changes)
