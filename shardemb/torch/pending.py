"""What forward passes looked up: leaves, which are remembered from the moment on when backward leaves a gradient."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, TypeAlias

import torch
from torch import nn

from shardemb import references
from shardemb.errors import ShardEmbError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.bags import Bags

AnyTable: TypeAlias = Any
"""A `Table` or a `KeyedTable`, or what is used like one of them: it may be in another process."""

Missing: TypeAlias = 'Literal["error", "initial", "zeros"] | int'
"""What a lookup returns for a key without a row; see `KeyedTable.lookup`."""

DTYPES = {each: str(each).removeprefix("torch.") for each in (torch.float32, torch.float16, torch.bfloat16)}
"""What rows can be looked up as, and their names; other floats are made of float32."""

_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows or bags of one table that a forward pass handed to autograd, and that backward has left a gradient at.

    Attributes
    ----------
    table : Table or KeyedTable
        Where they are from.
    ids : ndarray or Bags
        Whose rows, or which bags of rows. Nobody else has the array.
    leaf : torch.Tensor
        The rows, or what the bags were pooled to.
    padding_idx : int, str, bytes or None
        Gradients of this row or key are dropped, if the table has no padding, which drops them. Bags have theirs.
    scale_grad_by_freq : bool
        Whether gradients are divided by how often the id of their row occurs among the ids.
    missing : {"error", "initial", "zeros"} or int
        What keys without a row were looked up as.
    number : int
        Lookups of all modules are numbered in the order of the forward passes.
    """

    table: AnyTable
    ids: NDArray[Any] | Bags
    leaf: torch.Tensor
    padding_idx: Any = None
    scale_grad_by_freq: bool = False
    missing: Missing = "error"
    number: int = 0


class TableModule(nn.Module):
    """A module whose rows are in tables: it has no parameters, and remembers the gradients until the next step.

    Attributes
    ----------
    tables : tuple of Table or KeyedTable
        Those that it looks up rows in.
    pending : list of Lookup
        Those whose leaves got gradients since the last step, in the order in which they got them.
    on_gradient : callable, optional
        Called with each that is added to `pending`.
    taken : int
        How often `pending` was taken.
    missing, create : see `KeyedTable.lookup`
        What becomes of keys without a row; keys are created in training only.
    dtype : torch.dtype
        Of the results.
    trains : bool
        Whether rows get gradients; see `requires_grad_`.
    """

    def __init__(
        self, tables: tuple[AnyTable, ...], missing: Missing, dtype: torch.dtype, *, create: bool
    ) -> None:
        super().__init__()
        for table in tables:
            _require_rows(table)
        if (create or missing != "error") and not any(map(is_keyed, tables)):
            names = ", ".join(repr(each.name) for each in tables)
            msg = f"table {names} is used by row id: missing= and create= are for tables with a vocabulary"
            raise ValueError(msg)
        if not isinstance(dtype, torch.dtype) or (dtype not in DTYPES and dtype is not torch.float64):
            msg = f"dtype must be torch.float32, float64, float16 or bfloat16, got {dtype!r}"
            raise (ValueError if isinstance(dtype, torch.dtype) else TypeError)(msg)
        self.tables = tables
        self.missing, self.create, self.dtype = missing, create, dtype
        self.pending: list[Lookup] = []
        self.on_gradient: Callable[[Lookup], None] | None = None
        self.taken = 0
        self.trains = True

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Let rows get gradients or not, as for parameters. It has to be called on this module, not on one around it.

        Parameters
        ----------
        requires_grad : bool
            Whether they do.

        Returns
        -------
        TableModule
            The module itself.
        """
        self.trains = requires_grad
        return self

    # ---- between forward and step

    @property
    def remembers(self) -> bool:
        """Whether a forward pass now is one whose gradients a step may take: in training, with gradients enabled."""
        return self.training and self.trains and torch.is_grad_enabled()

    @property
    def creates(self) -> bool:
        """Whether a forward pass now gives new keys rows."""
        return self.create and self.training

    def remember(
        self,
        table: AnyTable,
        ids: NDArray[Any] | Bags,
        leaf: torch.Tensor,
        *,
        padding_idx: Any = None,  # noqa: ANN401
        scale_grad_by_freq: bool = False,
    ) -> None:
        """Add a lookup to `pending` as soon as backward leaves a gradient at its leaf.

        So a forward pass that no backward follows costs nothing once its result is gone, a forward pass that is run
        again for its gradients counts once, and gradients may be zeroed between forward and backward.
        """
        make = partial(
            Lookup,
            table,
            ids,
            padding_idx=padding_idx,
            scale_grad_by_freq=scale_grad_by_freq,
            missing=self.missing,
            number=next(_numbers),
        )
        # Neither the module nor the leaf is held by the leaf: there would be cycles through memory of torch.
        owner, added = weakref.ref(self), -1

        def arrived(leaf: torch.Tensor) -> None:
            nonlocal added
            module = owner()
            if module is not None and added != module.taken:  # a second backward adds to the same gradient
                added = module.taken
                module.add(make(leaf=leaf))

        leaf.requires_grad_().register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

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

    def named_tables(self) -> dict[str, AnyTable]:
        """Return the tables that a forward pass looks up: those of a collection by feature, or a single one by ""."""
        return {"": self.tables[0]}

    # ---- states

    def get_extra_state(self) -> list[dict[str, Any]]:
        """Return what `state_dict` has of the module: no rows, but which commit of which store has them.

        Returns
        -------
        list of dict
            One for each table: numbers and strings only.
        """
        return [references.reference(table) for table in self.tables]

    def set_extra_state(self, state: list[dict[str, Any]]) -> None:
        """Refuse a state whose rows are not those that the tables have now.

        Parameters
        ----------
        state : list of dict
            What `get_extra_state` returned.

        Raises
        ------
        TypeError, ShardEmbError
            It is no such state; it is of another store, table or commit, or the store has changed since.
        """
        given = state if isinstance(state, list) else [state]
        if len(given) != len(self.tables):
            msg = f"the state is of {len(given)} tables, and this module has {len(self.tables)}"
            raise ShardEmbError(msg)
        for each, table in zip(given, self.tables, strict=True):
            references.require(each, table)

    # ---- what a module with parameters could do, and this cannot

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name == "weight":
            names = ", ".join(repr(each.name) for each in self.tables)
            msg = (
                f"{type(self).__name__} has no weight in memory: its rows are in table {names}; read some with "
                f"table.lookup(ids), or all with numpy.asarray(table)"
            )
            raise AttributeError(msg)
        return super().__getattr__(name)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        names = ", ".join(repr(each.name) for each in self.tables)
        msg = (
            f"{type(self).__name__} cannot be copied or pickled: its rows are in table {names} of a store on disk, "
            f"which a copy would share. Save model.state_dict() and commit the store instead of pickling the model; "
            f"for a second model, or in another process, open the store and make a new module"
        )
        raise TypeError(msg)

    def _replicate_for_data_parallel(self) -> NoReturn:
        msg = (
            f"{type(self).__name__} does not work in torch.nn.DataParallel, which copies modules: use "
            f"torch.nn.parallel.DistributedDataParallel"
        )
        raise RuntimeError(msg)


def is_keyed(table: AnyTable) -> bool:
    """Return whether a table is used by key."""
    return hasattr(table, "vocabulary")


def _require_rows(table: AnyTable) -> None:
    if not hasattr(table, "lookup_bag") or not hasattr(table, "store"):
        msg = f"table must be a table of a store, which store[name] returns, got {table!r:.80}"
        raise TypeError(msg)
    if table.dtype == "raw":
        msg = f"table {table.name!r} holds raw bytes, which are no numbers to train: look them up with table.lookup()"
        raise ValueError(msg)
    if not is_keyed(table) and is_keyed(getattr(table.store, "get", {}.get)(table.name)):
        # A step goes through the store, which would take row ids for keys.
        msg = f"table {table.name!r} is used by key: give the module store[{table.name!r}], not its rows"
        raise TypeError(msg)


# ---- torch.compile ----------------------------------------------------------------------------------------------


def _call(function: Callable[..., Any], *arguments: Any) -> Any:  # noqa: ANN401
    return function(*arguments)


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Make ``uncompiled``, which calls a function outside of compiled graphs, when it is first asked for.

    ``torch.compiler.disable`` loads the compiler, which takes seconds. Only programs that compile need it.
    """
    if name != "uncompiled":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    globals()[name] = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]
    return globals()[name]
