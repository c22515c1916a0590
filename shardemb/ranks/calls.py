"""The calls that all ranks make together, and how the owner of the store carries each out for all of them.

A call is what all ranks have to say alike; what each of them adds of its own, such as ids and gradients, is in a `Part`
for each table. What no rank has to repeat, like metadata, is the owner's and not compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from shardemb.bags import Bags
from shardemb.ranks.parts import Joined, Part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardemb.format.manifest import Commit
    from shardemb.optim import Optimizer

Parts: TypeAlias = "Sequence[Mapping[str, Part]]"
"""For each rank, what it asks of each table."""

Results: TypeAlias = "list[Any]"
"""What is returned to each rank."""


@dataclass(frozen=True)
class Facts:
    """What every rank knows of a table."""

    name: str
    is_keyed: bool
    num_embeddings: int
    embedding_dim: int
    dtype: Any
    padding_idx: int | None
    optimizer: Optimizer | None
    initializer: Any
    step: int

    @staticmethod
    def of(table: Any) -> Facts:  # noqa: ANN401
        """Return those of a table now."""
        is_keyed = hasattr(table, "vocabulary")
        rows = table.rows if is_keyed else table
        return Facts(
            table.name,
            is_keyed,
            table.num_embeddings,
            table.embedding_dim,
            table.dtype,
            rows.padding_idx,
            table.optimizer,
            table.initializer,
            table.step,
        )


class Call(ABC):
    """A call of all ranks."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return type(self).__name__.lower()

    @abstractmethod
    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """Do it in the owner's store, and return what each rank gets."""


@dataclass(frozen=True)
class Lookup(Call):
    """`Store.lookup`, `Store.lookup_bag`, or, with the options that only these have, those of one table."""

    missing: Any = "error"
    create: bool = False
    dtype: Any = None
    out_of_range: Any = field(default="raise", compare=False)
    one: str | None = None

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        joined = _joined(
            store, parts, checked=isinstance(self.out_of_range, str) and self.out_of_range == "raise"
        )
        found = self._one(store, joined) if self.one is not None else self._many(store, joined)
        return _cut({name: joined[name].cut(rows) for name, rows in found.items()}, len(parts))

    def _many(self, store: Any, joined: dict[str, Joined]) -> dict[str, Any]:  # noqa: ANN401
        given = {name: each.what for name, each in joined.items()}
        bags = {name: each for name, each in given.items() if isinstance(each, Bags)}
        rows = {name: each for name, each in given.items() if name not in bags}
        found: dict[str, Any] = {}
        if rows:
            found |= store.lookup(rows, missing=self.missing, create=self.create)
        if bags:
            found |= store.lookup_bag(bags, missing=self.missing, create=self.create)
        return found

    def _one(self, store: Any, joined: dict[str, Joined]) -> dict[str, Any]:  # noqa: ANN401
        assert self.one is not None
        table, given = store[self.one], joined[self.one].what
        if hasattr(table, "vocabulary"):
            rows = table.lookup(given, missing=self.missing, create=self.create, dtype=self.dtype)
        elif isinstance(given, Bags):
            rows = table.lookup_bag(
                given.ids,
                given.offsets,
                mode=given.mode,
                weights=given.weights,
                padding_idx=given.padding_idx,
                out_of_range=self.out_of_range,
            )
        else:
            rows = table.lookup(given, dtype=self.dtype, out_of_range=self.out_of_range)
        return {self.one: rows}


@dataclass(frozen=True)
class WeightGradient(Call):
    """`Table.bag_weight_gradient`."""

    one: str
    missing: Any = "error"

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        joined = _joined(store, parts)[self.one]
        table, given, grads = store[self.one], joined.what, joined.gradients(1)
        if hasattr(table, "vocabulary"):
            found = table.bag_weight_gradient(
                given.ids,
                given.offsets,
                grads,
                mode=given.mode,
                weights=given.weights,
                padding_key=given.padding_idx,
                missing=self.missing,
            )
        else:
            found = table.bag_weight_gradient(
                given.ids,
                given.offsets,
                grads,
                mode=given.mode,
                weights=given.weights,
                padding_idx=given.padding_idx,
            )
        return _cut({self.one: joined.cut_by_id(found)}, len(parts))


@dataclass(frozen=True)
class Update(Call):
    """`Store.update`, or `Store.update_bag` if that is needed for `scale_grad_by_freq`.

    With `averaged`, the gradients are divided by the number of ranks.
    """

    averaged: bool
    missing: Any = "error"
    create: bool = False
    scale_grad_by_freq: bool = False
    max_norm: float | None = None
    extra_norm_sq: float = field(default=0.0, compare=False)
    scale: float | None = None
    check_finite: bool = True

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        batches = _batches(store, parts, len(parts) if self.averaged else 1)
        if self.scale_grad_by_freq:
            norm = store.update_bag(
                batches,
                missing=self.missing,
                create=self.create,
                scale_grad_by_freq=True,
                max_norm=self.max_norm,
                extra_norm_sq=self.extra_norm_sq,
                scale=self.scale,
                check_finite=self.check_finite,
            )
        else:
            norm = store.update(
                batches,
                missing=self.missing,
                create=self.create,
                max_norm=self.max_norm,
                extra_norm_sq=self.extra_norm_sq,
                scale=self.scale,
                check_finite=self.check_finite,
            )
        return [norm] * len(parts)


@dataclass(frozen=True)
class Write(Call):
    """`Table.write`, of the ranks one after the other; the rows are in the place of gradients."""

    one: str
    missing: Any = "error"
    create: bool = False
    check_finite: bool = True

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        joined, table = _joined(store, parts)[self.one], store[self.one]
        rows = joined.gradients(1)
        if hasattr(table, "vocabulary"):
            table.write(
                joined.what, rows, missing=self.missing, create=self.create, check_finite=self.check_finite
            )
        else:
            table.write(joined.what, rows, check_finite=self.check_finite)
        return [None] * len(parts)


@dataclass(frozen=True)
class GradientNorm(Call):
    """`Store.gradient_norm`, of the gradients that `Update` would take."""

    averaged: bool
    missing: Any = "error"

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        batches = _batches(store, parts, len(parts) if self.averaged else 1)
        return [store.gradient_norm(batches, missing=self.missing)] * len(parts)


@dataclass(frozen=True)
class Prefetch(Call):
    """`Table.prefetch`; ranks do not wait for an answer."""

    one: str
    for_update: bool

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        store[self.one].prefetch(_joined(store, parts)[self.one].what, for_update=self.for_update)
        return []


@dataclass(frozen=True)
class FindKeys(Call):
    """`Vocabulary.lookup` of the vocabulary of a table."""

    one: str
    missing: int = -1

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        joined = _joined(store, parts)[self.one]
        found = store[self.one].vocabulary.lookup(joined.what, missing=self.missing)
        return _cut({self.one: joined.cut_by_id(found)}, len(parts))


@dataclass(frozen=True)
class SetOptimizer(Call):
    """`Table.set_optimizer`."""

    one: str
    optimizer: Any

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        store[self.one].set_optimizer(self.optimizer)
        return [None] * len(parts)


@dataclass(frozen=True)
class MakeCommit(Call):
    """`Store.commit`, with the metadata of the owner."""

    step: int | None
    metadata: Any = field(compare=False)

    @property
    def name(self) -> str:
        """See `Call`."""
        return "commit"

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        made: Commit = store.commit(self.step, self.metadata)
        return [made] * len(parts)


@dataclass(frozen=True)
class Rollback(Call):
    """`Store.rollback`."""

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        store.rollback()
        return [None] * len(parts)


@dataclass(frozen=True)
class Refresh(Call):
    """Nothing is done: the answer tells all ranks what the store holds now."""

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        return [None] * len(parts)


@dataclass(frozen=True)
class Close(Call):
    """`Store.close`."""

    def carry_out(self, store: Any, parts: Parts) -> Results:  # noqa: ANN401
        """See `Call`."""
        store.close()
        return [None] * len(parts)


def _joined(store: Any, parts: Parts, *, checked: bool = True) -> dict[str, Joined]:  # noqa: ANN401
    names = dict.fromkeys(name for each in parts for name in each)
    joined = {name: Joined(name, [each.get(name) for each in parts]) for name in names}
    for name, each in joined.items():
        if checked and not hasattr(table := store[name], "vocabulary"):
            each.require_rows(table.num_embeddings, name)
    return joined


def _batches(store: Any, parts: Parts, divisor: int) -> dict[str, tuple[Any, Any]]:  # noqa: ANN401
    joined = _joined(store, parts)
    return {name: (each.what, each.gradients(divisor)) for name, each in joined.items()}


def _cut(results: dict[str, list[Any]], ranks: int) -> Results:
    return [
        {name: each[rank] for name, each in results.items() if each[rank] is not None}
        for rank in range(ranks)
    ]
