"""Tables of a store as each rank has them: each call is one of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardemb.bags import Bags
from shardemb.ranks import calls
from shardemb.ranks.parts import Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    from shardemb.bags import Mode
    from shardemb.optim import Optimizer
    from shardemb.ranks.calls import Call, Facts


class RankTable:
    """A table that is used by row id, on every rank; with those methods of `Table` that training needs.

    Every call is made by all ranks, in the same order, each with its own ids and gradients.
    """

    def __init__(self, ranks: Any, name: str) -> None:  # noqa: ANN401
        self._ranks, self._name = ranks, name

    # ---- what it is

    @property
    def facts(self) -> Facts:
        """What this rank knows of the table; from the owner, and as of the last call."""
        found: Facts = self._ranks.facts(self._name)
        return found

    @property
    def store(self) -> Any:  # noqa: ANN401
        """The `Ranks` that it is of."""
        return self._ranks

    @property
    def name(self) -> str:
        """See `Table.name`."""
        return self._name

    @property
    def num_embeddings(self) -> int:
        """See `Table.num_embeddings`."""
        return self.facts.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """See `Table.embedding_dim`."""
        return self.facts.embedding_dim

    @property
    def shape(self) -> tuple[int, int]:
        """See `Table.shape`."""
        return self.num_embeddings, self.embedding_dim

    @property
    def dtype(self) -> Any:  # noqa: ANN401
        """See `Table.dtype`."""
        return self.facts.dtype

    @property
    def padding_idx(self) -> int | None:
        """See `Table.padding_idx`."""
        return self.facts.padding_idx

    @property
    def optimizer(self) -> Optimizer | None:
        """See `Table.optimizer`."""
        return self.facts.optimizer

    @property
    def initializer(self) -> Any:  # noqa: ANN401
        """See `Table.initializer`."""
        return self.facts.initializer

    @property
    def step(self) -> int:
        """See `Table.step`."""
        return self.facts.step

    def __repr__(self) -> str:
        rows, dim = self.shape
        return f"RankTable {self._name!r}: {rows:,} x {dim}, {self.optimizer}, step {self.step}, on all ranks"

    # ---- calls

    def lookup(
        self,
        ids: Any,  # noqa: ANN401
        *,
        dtype: Any = None,  # noqa: ANN401
        out: NDArray[Any] | None = None,
        out_of_range: Any = "raise",  # noqa: ANN401
    ) -> NDArray[Any]:
        """See `Table.lookup`."""
        call = calls.Lookup(dtype=dtype, out_of_range=out_of_range, one=self._name)
        return _into(out, self._found(call, ids))

    def lookup_bag(
        self,
        ids: Any,  # noqa: ANN401
        offsets: ArrayLike | None = None,
        *,
        mode: Mode = "sum",
        weights: ArrayLike | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        out_of_range: Any = "raise",  # noqa: ANN401
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """See `Table.lookup_bag`."""
        bags = Bags(ids, offsets, mode, weights, padding_idx, include_last_offset)
        call = calls.Lookup(out_of_range=out_of_range, one=self._name)
        return _into(out, self._found(call, bags))

    def bag_weight_gradient(
        self,
        ids: Any,  # noqa: ANN401
        offsets: ArrayLike | None,
        grads: ArrayLike,
        *,
        mode: Any = "sum",  # noqa: ANN401
        weights: ArrayLike | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> NDArray[Any]:
        """See `Table.bag_weight_gradient`."""
        bags = Bags(ids, offsets, mode, weights, padding_idx, include_last_offset)
        found: NDArray[Any] = self._found(calls.WeightGradient(self._name), bags, grads)
        return found

    def update(
        self,
        ids: Any,  # noqa: ANN401
        grads: ArrayLike,
        *,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """See `Table.update`."""
        found: float | None = self._ranks.update(
            {self._name: (ids, grads)}, scale=scale, check_finite=check_finite
        )
        return found

    def update_bag(
        self,
        ids: Any,  # noqa: ANN401
        offsets: ArrayLike | None,
        grads: ArrayLike,
        *,
        mode: Mode = "sum",
        weights: ArrayLike | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        scale_grad_by_freq: bool = False,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """See `Table.update_bag`."""
        bags = Bags(ids, offsets, mode, weights, padding_idx, include_last_offset)
        found: float | None = self._ranks.update_bag(
            {self._name: (bags, grads)},
            scale_grad_by_freq=scale_grad_by_freq,
            scale=scale,
            check_finite=check_finite,
        )
        return found

    def write(self, ids: Any, rows: ArrayLike, *, check_finite: bool = True) -> None:  # noqa: ANN401
        """See `Table.write`; of a row that several ranks write, the last one counts."""
        self._found_none(calls.Write(self._name, check_finite=check_finite), ids, rows)

    def prefetch(self, ids: Any, *, for_update: bool = False) -> None:  # noqa: ANN401
        """See `Table.prefetch`. Also a call of all ranks, but none waits for the owner's answer."""
        self._ranks.tell(calls.Prefetch(self._name, for_update), {self._name: (ids, None)})

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """See `Table.set_optimizer`; all ranks pass the same."""
        self._ranks.call(calls.SetOptimizer(self._name, optimizer), {})

    def _found_none(self, call: Call, given: Any, rows: ArrayLike) -> None:  # noqa: ANN401
        self._ranks.call(call, {self._name: (given, rows)})

    def _found(self, call: Call, given: Any, grads: ArrayLike | None = None) -> Any:  # noqa: ANN401
        return self._ranks.call(call, {self._name: (given, grads)})[self._name]


class RankKeyedTable(RankTable):
    """A table that is used by key, on every rank; with those methods of `KeyedTable` that training needs."""

    @property
    def vocabulary(self) -> RankVocabulary:
        """The vocabulary, which finds keys."""
        return RankVocabulary(self._ranks, self._name)

    @property
    def rows(self) -> Facts:
        """What this rank knows of the rows; see `KeyedTable.rows`."""
        return self.facts

    def write(
        self,
        keys: Any,  # noqa: ANN401
        rows: ArrayLike,
        *,
        missing: Any = "error",  # noqa: ANN401
        create: bool = False,
        check_finite: bool = True,
    ) -> None:
        """See `KeyedTable.write`; of a row that several ranks write, the last one counts."""
        self._found_none(calls.Write(self._name, missing, create, check_finite), keys, rows)

    def lookup(  # type: ignore[override]
        self,
        keys: Any,  # noqa: ANN401
        *,
        missing: Any = "error",  # noqa: ANN401
        create: bool = False,
        dtype: Any = None,  # noqa: ANN401
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """See `KeyedTable.lookup`."""
        return _into(out, self._found(calls.Lookup(missing, create, dtype, one=self._name), keys))

    def lookup_bag(  # type: ignore[override]
        self,
        keys: Any,  # noqa: ANN401
        offsets: ArrayLike | None = None,
        *,
        mode: Mode = "sum",
        weights: ArrayLike | None = None,
        padding_key: Any = None,  # noqa: ANN401
        include_last_offset: bool = False,
        missing: Any = "error",  # noqa: ANN401
        create: bool = False,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """See `KeyedTable.lookup_bag`."""
        bags = Bags(keys, offsets, mode, weights, padding_key, include_last_offset)
        return _into(out, self._found(calls.Lookup(missing, create), bags))

    def bag_weight_gradient(  # type: ignore[override]
        self,
        keys: Any,  # noqa: ANN401
        offsets: ArrayLike | None,
        grads: ArrayLike,
        *,
        mode: Any = "sum",  # noqa: ANN401
        weights: ArrayLike | None = None,
        padding_key: Any = None,  # noqa: ANN401
        include_last_offset: bool = False,
        missing: Any = "error",  # noqa: ANN401
    ) -> NDArray[Any]:
        """See `KeyedTable.bag_weight_gradient`."""
        bags = Bags(keys, offsets, mode, weights, padding_key, include_last_offset)
        found: NDArray[Any] = self._found(calls.WeightGradient(self._name, missing), bags, grads)
        return found

    def update(
        self,
        keys: Any,  # noqa: ANN401
        grads: ArrayLike,
        *,
        missing: Any = "error",  # noqa: ANN401
        create: bool = False,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """See `KeyedTable.update`."""
        batches: Mapping[str, Any] = {self._name: (keys, grads)}
        found: float | None = self._ranks.update(
            batches, missing=missing, create=create, scale=scale, check_finite=check_finite
        )
        return found

    def update_bag(  # type: ignore[override]
        self,
        keys: Any,  # noqa: ANN401
        offsets: ArrayLike | None,
        grads: ArrayLike,
        *,
        mode: Mode = "sum",
        weights: ArrayLike | None = None,
        padding_key: Any = None,  # noqa: ANN401
        include_last_offset: bool = False,
        scale_grad_by_freq: bool = False,
        missing: Any = "error",  # noqa: ANN401
        create: bool = False,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """See `KeyedTable.update_bag`."""
        bags = Bags(keys, offsets, mode, weights, padding_key, include_last_offset)
        found: float | None = self._ranks.update_bag(
            {self._name: (bags, grads)},
            missing=missing,
            create=create,
            scale_grad_by_freq=scale_grad_by_freq,
            scale=scale,
            check_finite=check_finite,
        )
        return found


class RankVocabulary:
    """The vocabulary of a table, on every rank."""

    def __init__(self, ranks: Any, table: str) -> None:  # noqa: ANN401
        self._ranks, self._table = ranks, table

    def lookup(self, keys: Any, *, missing: int = -1) -> NDArray[Any]:  # noqa: ANN401
        """See `Vocabulary.lookup`; also a call of all ranks."""
        found: Mapping[str, Any] = self._ranks.call(
            calls.FindKeys(self._table, missing), {self._table: (keys, None)}
        )
        rows: NDArray[Any] = found[self._table]
        return rows


def part_of(facts: Facts, given: Any, grads: ArrayLike | None) -> Part:  # noqa: ANN401
    """Check what a rank passes for a table, as far as it can."""
    return Part.of(facts.name, given, grads, facts.embedding_dim)


def _into(out: NDArray[Any] | None, rows: NDArray[Any]) -> NDArray[Any]:
    if out is None:
        return rows
    if out.shape != rows.shape or out.dtype != rows.dtype:
        msg = f"out is {out.dtype} of shape {out.shape}, but the result is {rows.dtype} of shape {rows.shape}"
        raise ValueError(msg)
    out[...] = rows
    return out
