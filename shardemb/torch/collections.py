"""`EmbeddingCollection` and `EmbeddingBagCollection`: the features of a batch, each looked up in its table.

Features come as TorchRec's ``KeyedJaggedTensor``, which is known by its methods, or as a dict. All tables of a store
are looked up in one call.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from shardemb.bags import Bags
from shardemb.torch.embedding_bag import array_of_weights, pooled_of
from shardemb.torch.pending import TableModule
from shardemb.torch.tensors import array_of_ids, tensor_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from shardemb.torch.pending import AnyTable, Missing


class KeyedTensor:
    """Pooled features side by side, of the shape of TorchRec's ``KeyedTensor``. Made by `EmbeddingBagCollection`.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> pooled = shardemb.torch.KeyedTensor({"user": torch.zeros(3, 2), "item": torch.ones(3, 4)})
    >>> pooled.values().shape, pooled["item"].shape
    (torch.Size([3, 6]), torch.Size([3, 4]))
    """

    def __init__(self, features: Mapping[str, torch.Tensor]) -> None:
        self._features = dict(features)
        self._values: torch.Tensor | None = None

    def keys(self) -> list[str]:
        """Return the names of the features."""
        return list(self._features)

    def values(self) -> torch.Tensor:
        """Return all features next to each other, shape (bags, sum of their dims)."""
        if self._values is None:
            self._values = torch.cat(list(self._features.values()), dim=1)
        return self._values

    def length_per_key(self) -> list[int]:
        """Return the dim of each feature."""
        return [each.shape[1] for each in self._features.values()]

    def to_dict(self) -> dict[str, torch.Tensor]:
        """Return each feature by its name, shape (bags, dim)."""
        return dict(self._features)

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._features[key]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name!r}: {tuple(each.shape)}" for name, each in self._features.items())
        return f"KeyedTensor({{{shapes}}})"


@dataclass(frozen=True, eq=False)
class JaggedTensor:
    """Rows in groups of different lengths, of the shape of TorchRec's ``JaggedTensor``. Made by `EmbeddingCollection`.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> rows = shardemb.torch.JaggedTensor(torch.zeros(3, 2), torch.tensor([0, 2, 3]))
    >>> rows.lengths()
    tensor([2, 1])
    """

    rows: torch.Tensor
    bounds: torch.Tensor

    def values(self) -> torch.Tensor:
        """Return all rows, shape (ids, dim)."""
        return self.rows

    def offsets(self) -> torch.Tensor:
        """Return where each group begins, and the number of rows: int64, shape (groups + 1,)."""
        return self.bounds

    def lengths(self) -> torch.Tensor:
        """Return the number of rows of each group: int64, shape (groups,)."""
        return self.bounds.diff()


# ---- what is given --------------------------------------------------------------------------------------------


class _Given(NamedTuple):
    """The ids of one feature: group ``i`` has ``ids[bounds[i]:bounds[i + 1]]``."""

    ids: NDArray[Any]
    bounds: NDArray[np.int64]
    weights: torch.Tensor | None
    device: torch.device


def _is_keyed_jagged(given: object) -> bool:
    return not isinstance(given, Mapping) and all(
        callable(getattr(given, name, None)) for name in ("keys", "values", "offsets")
    )


def _of_keyed_jagged(given: Any, *, own: bool) -> Iterator[tuple[str, _Given]]:  # noqa: ANN401
    """Take a ``KeyedJaggedTensor`` apart: its groups are ordered by feature, then by sample."""
    keys, values, weights = list(given.keys()), given.values(), given.weights_or_none()
    every = array_of_ids(given.offsets()).astype(np.int64)
    if (every.size - 1) != len(keys) * given.stride():
        msg = (
            f"a KeyedJaggedTensor of {len(keys)} features and stride {given.stride()} must have "
            f"{len(keys) * given.stride()} lengths, got {every.size - 1}; batch sizes may not vary by feature"
        )
        raise ValueError(msg)
    ids = array_of_ids(values, own=own)
    for number, key in enumerate(keys):
        bounds = every[number * given.stride() : (number + 1) * given.stride() + 1]
        first, last = (int(bounds[0]), int(bounds[-1])) if bounds.size else (0, 0)
        some = None if weights is None else weights[first:last]
        yield key, _Given(ids[first:last], bounds - first, some, values.device)


def _of_one(name: str, given: Any, *, own: bool) -> _Given:  # noqa: ANN401
    """Take what a dict has for a feature: ids of one or two dimensions, ids and offsets, or a ``JaggedTensor``."""
    weights = None
    if callable(getattr(given, "values", None)) and callable(getattr(given, "offsets", None)):
        weights = given.weights_or_none() if hasattr(given, "weights_or_none") else None
        given = (given.values(), given.offsets()[:-1])
    elif isinstance(given, tuple) and len(given) == 3:
        given, weights = given[:2], given[2]
    if isinstance(given, tuple) and len(given) == 2:
        ids, begins = array_of_ids(given[0], own=own), array_of_ids(given[1]).astype(np.int64)
        if ids.ndim != 1 or begins.ndim != 1:
            msg = (
                f"feature {name!r}: ids and offsets must have one dimension, got {ids.ndim} and {begins.ndim}"
            )
            raise ValueError(msg)
        bounds = np.append(begins, ids.size)
        first = given[0]
    else:
        ids, first = array_of_ids(given, own=own), given
        if ids.ndim not in (1, 2):
            msg = (
                f"feature {name!r}: pass ids of one dimension, one for each sample, of two, a row for each sample, or "
                f"a tuple (ids, offsets); got {ids.ndim} dimensions"
            )
            raise ValueError(msg)
        bounds = np.arange(ids.shape[0] + 1, dtype=np.int64) * (ids.shape[1] if ids.ndim == 2 else 1)
        weights = weights.reshape(-1) if weights is not None else None
    device = first.device if isinstance(first, torch.Tensor) else torch.device("cpu")
    return _Given(ids.reshape(-1), bounds, weights, device)


# ---- collections ----------------------------------------------------------------------------------------------


class _Collection(TableModule):
    """Features and their tables."""

    def __init__(
        self,
        tables: Mapping[str, AnyTable] | Sequence[AnyTable],
        features: Mapping[str, str] | None,
        missing: Missing,
        dtype: torch.dtype,
        *,
        create: bool,
    ) -> None:
        named = dict(tables) if isinstance(tables, Mapping) else {each.name: each for each in tables}
        super().__init__(tuple(named.values()), missing, dtype, create=create)
        self.features = {name: name for name in named} if features is None else dict(features)
        if unknown := sorted(set(self.features.values()) - set(named)):
            msg = f"features name the tables {unknown}, which are not among the tables {sorted(named)}"
            raise ValueError(msg)
        if len({(id(each.store), each.name) for each in named.values()}) < len(tables):
            msg = "a table occurs twice: name it once, and let features={feature: table} say what is looked up in it"
            raise ValueError(msg)
        self._named = named

    def named_tables(self) -> dict[str, AnyTable]:
        """Return the table of each feature."""
        return {feature: self._named[name] for feature, name in self.features.items()}

    def features_by_store(self) -> Iterator[tuple[Any, dict[str, list[str]]]]:
        """Iterate over stores, with the features of each of its tables that has some, by their names here."""
        stores: dict[int, tuple[Any, dict[str, list[str]]]] = {}
        for feature, name in self.features.items():
            store = self._named[name].store
            _, tables = stores.setdefault(id(store), (store, {}))
            tables.setdefault(name, []).append(feature)
        yield from stores.values()

    def given(self, features: Any, *, own: bool) -> dict[str, _Given]:  # noqa: ANN401
        """Take a batch apart into its features.

        Raises
        ------
        KeyError
            A feature is missing.
        """
        if _is_keyed_jagged(features):
            found = dict(_of_keyed_jagged(features, own=own))
        elif isinstance(features, Mapping):
            found = {
                name: _of_one(name, each, own=own) for name, each in features.items() if name in self.features
            }
        else:
            msg = f"pass a dict of features or a KeyedJaggedTensor, got {type(features).__name__}"
            raise TypeError(msg)
        if absent := [name for name in self.features if name not in found]:
            msg = f"the batch has no feature {absent[0]!r}; it has {sorted(map(str, found))}"
            raise KeyError(msg)
        return found

    def extra_repr(self) -> str:
        """Describe the tables and their features."""
        return "\n".join(
            f"{name}: {table.num_embeddings}, {table.embedding_dim}, for "
            f"{', '.join(feature for feature, of in self.features.items() if of == name)}"
            for name, table in self._named.items()
        )


class EmbeddingBagCollection(_Collection):
    """Pooled features of tables in the place of TorchRec's ``EmbeddingBagCollection``.

    It has no parameters. `shardemb.torch.Optimizer` takes the steps.

    Parameters
    ----------
    tables : mapping of str to Table or KeyedTable, or sequence of these
        The tables by name; those of a sequence have the names that they have in their stores.
    features : mapping of str to str, optional
        The name of the table of each feature; several may share one. By default each table is for the feature of its
        name.
    mode : {"sum", "mean", "max"}, or mapping of str to these
        What a bag becomes, in all tables or by the name of the table.
    is_weighted : bool
        Whether weights of the ids are used, which is for the mode ``"sum"``. They may require gradients.
    dtype, missing, create : optional
        As for `Embedding`; the same for all tables that are used by key.

    Raises
    ------
    TypeError, ValueError
        As `Embedding`; a table occurs twice; a feature names no table; a mode is none of these.

    Notes
    -----
    See `Embedding`. The row of padding of each table, `Table.padding_idx`, is left out of bags.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "bags.zarr")
    >>> sgd = shardemb.optim.SGD(lr=0.5)
    >>> users = store.create_table("users", num_embeddings=100, embedding_dim=4, optimizer=sgd)
    >>> items = store.create_table("items", num_embeddings=100, embedding_dim=2, optimizer=sgd)
    >>> features = {"user": "users", "seen": "items", "bought": "items"}
    >>> bags = shardemb.torch.EmbeddingBagCollection([users, items], features)
    >>> pooled = bags(
    ...     {
    ...         "user": torch.tensor([1, 2]),
    ...         "seen": (torch.tensor([5, 6, 7]), torch.tensor([0, 2])),
    ...         "bought": torch.tensor([[5, 6], [8, 9]]),
    ...     }
    ... )
    >>> pooled
    KeyedTensor({'user': (2, 4), 'seen': (2, 2), 'bought': (2, 2)})
    >>> pooled.values().shape
    torch.Size([2, 8])
    >>> commit = store.commit()
    >>> store.close()
    """

    def __init__(
        self,
        tables: Mapping[str, AnyTable] | Sequence[AnyTable],
        features: Mapping[str, str] | None = None,
        *,
        mode: str | Mapping[str, str] = "sum",
        is_weighted: bool = False,
        dtype: torch.dtype = torch.float32,
        missing: Missing = "error",
        create: bool = False,
    ) -> None:
        super().__init__(tables, features, missing, dtype, create=create)
        self.is_weighted = is_weighted
        self.modes = {name: mode if isinstance(mode, str) else mode.get(name, "sum") for name in self._named}
        for name, each in self.modes.items():
            if each not in ("sum", "mean", "max") or (is_weighted and each != "sum"):
                only = 'of weighted bags must be "sum"' if is_weighted else 'must be "sum", "mean" or "max"'
                msg = f"table {name!r}: the mode {only}, got {each!r:.80}"
                raise ValueError(msg)

    def forward(self, features: Any) -> KeyedTensor:  # noqa: ANN401
        """Look up the bags of all features, and pool each to one row.

        Parameters
        ----------
        features : KeyedJaggedTensor, or mapping of str to ids
            For each feature: ids of two dimensions, each row a bag; ids of one, each a bag of its own; a tuple
            ``(ids, offsets)``, or ``(ids, offsets, weights)``; or a ``JaggedTensor``. Ids are tensors of integers, or
            arrays or lists of keys. Other features are passed over.

        Returns
        -------
        KeyedTensor
            Of `dtype`, in the order of `features`.

        Raises
        ------
        KeyError
            The batch has not all features.
        TypeError, ValueError
            The batch is neither; features have different numbers of bags; weights are missing; as `Table.lookup_bag`.
        RowIdError, UnknownKeyError, StoreClosedError, TableNotFoundError
            As `Embedding.forward`.
        """
        if torch.compiler.is_compiling():
            from shardemb.torch.pending import uncompiled

            result: KeyedTensor = uncompiled(self._look_up, features)
            return result
        return self._look_up(features)

    def _look_up(self, features: Any) -> KeyedTensor:  # noqa: ANN401
        given = self.given(features, own=self.remembers)
        sizes = {name: given[name].bounds.size - 1 for name in self.features}
        if len(set(sizes.values())) > 1:
            msg = f"all features must have as many bags, got {sizes}"
            raise ValueError(msg)
        found: dict[str, torch.Tensor] = {}
        for store, tables in self.features_by_store():
            some = {name: [given[feature] for feature in each] for name, each in tables.items()}
            bags = {self._named[name].name: self._bags(name, each) for name, each in some.items()}
            pooled = store.lookup_bag(bags, missing=self.missing, create=self.creates)
            for name, each in tables.items():
                table = self._named[name]
                leaf = tensor_of(pooled[table.name], some[name][0].device, self.dtype)
                if self.is_weighted:
                    weights = _joined_weights(some[name])
                    leaf = pooled_of(self, leaf, table, bags[table.name], weights, scale_grad_by_freq=False)
                elif self.remembers:
                    self.remember(table, bags[table.name], leaf)
                found |= zip(each, _divided(leaf, [sizes[feature] for feature in each]), strict=True)
        return KeyedTensor({name: found[name] for name in self.features})

    def _bags(self, name: str, given: list[_Given]) -> Bags:
        weights = None
        if self.is_weighted:
            if any(each.weights is None for each in given):
                msg = f"table {name!r}: bags are weighted (is_weighted=True), and the batch has no weights for them"
                raise ValueError(msg)
            weights = array_of_weights(_joined_weights(given))
        ids, bounds = _joined(given)
        return Bags(ids, bounds, self.modes[name], weights, include_last_offset=True)  # type: ignore[arg-type]


class EmbeddingCollection(_Collection):
    """Rows of features in the place of TorchRec's ``EmbeddingCollection``: one for each id.

    It has no parameters. `shardemb.torch.Optimizer` takes the steps.

    Parameters
    ----------
    tables, features : mapping or sequence, optional
        As for `EmbeddingBagCollection`.
    dtype, missing, create : optional
        As for `Embedding`; the same for all tables that are used by key.

    Raises
    ------
    TypeError, ValueError
        As `EmbeddingBagCollection`.

    Notes
    -----
    See `Embedding`.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "rows.zarr")
    >>> words = store.create_table("words", num_embeddings=100, embedding_dim=4)
    >>> rows = shardemb.torch.EmbeddingCollection([words], {"title": "words", "text": "words"}).eval()
    >>> found = rows({"title": torch.tensor([[1, 2]]), "text": (torch.tensor([3, 4, 5]), torch.tensor([0]))})
    >>> found["text"].values().shape, found["text"].lengths()
    (torch.Size([3, 4]), tensor([3]))
    >>> commit = store.commit()
    >>> store.close()
    """

    def __init__(
        self,
        tables: Mapping[str, AnyTable] | Sequence[AnyTable],
        features: Mapping[str, str] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        missing: Missing = "error",
        create: bool = False,
    ) -> None:
        super().__init__(tables, features, missing, dtype, create=create)

    def forward(self, features: Any) -> dict[str, JaggedTensor]:  # noqa: ANN401
        """Look up the rows of all features.

        Parameters
        ----------
        features : KeyedJaggedTensor, or mapping of str to ids
            As for `EmbeddingBagCollection.forward`; weights are passed over.

        Returns
        -------
        dict of str to JaggedTensor
            For each feature its rows, of `dtype`, and their groups.

        Raises
        ------
        KeyError, TypeError, ValueError, RowIdError, UnknownKeyError, StoreClosedError, TableNotFoundError
            As `EmbeddingBagCollection.forward`.
        """
        if torch.compiler.is_compiling():
            from shardemb.torch.pending import uncompiled

            result: dict[str, JaggedTensor] = uncompiled(self._look_up, features)
            return result
        return self._look_up(features)

    def _look_up(self, features: Any) -> dict[str, JaggedTensor]:  # noqa: ANN401
        given = self.given(features, own=self.remembers)
        found: dict[str, torch.Tensor] = {}
        for store, tables in self.features_by_store():
            ids = {
                self._named[name].name: _joined([given[feature] for feature in each])[0]
                for name, each in tables.items()
            }
            rows = store.lookup(ids, missing=self.missing, create=self.creates)
            for name, each in tables.items():
                table = self._named[name]
                leaf = tensor_of(rows[table.name], given[each[0]].device, self.dtype)
                if self.remembers:
                    self.remember(table, ids[table.name], leaf)
                found |= zip(each, _divided(leaf, [given[feature].ids.size for feature in each]), strict=True)
        return {
            name: JaggedTensor(found[name], torch.from_numpy(given[name].bounds).to(given[name].device))
            for name in self.features
        }


def _joined(given: Sequence[_Given]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the ids of several features, one after the other, and where groups begin among them."""
    if len(given) == 1:
        return given[0].ids, given[0].bounds
    begins = np.cumsum([0, *(each.ids.size for each in given)])
    bounds = [each.bounds[:-1] + begin for each, begin in zip(given, begins, strict=False)]
    return np.concatenate([each.ids for each in given]), np.concatenate([*bounds, begins[-1:]])


def _joined_weights(given: Sequence[_Given]) -> torch.Tensor:
    weights = [each.weights for each in given if each.weights is not None]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def _divided(rows: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """Divide rows among features."""
    return (rows,) if len(sizes) == 1 else torch.split(rows, sizes)
