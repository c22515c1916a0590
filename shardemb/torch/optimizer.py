"""`Optimizer`: one step of all tables of a model, of the shape of `torch.optim.Optimizer`; and `clip_grad_norm_`."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from shardemb.base import validation
from shardemb.torch.merging import merged
from shardemb.torch.pending import TableModule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from shardemb.torch.merging import Step
    from shardemb.torch.pending import AnyTable, Lookup

    Modules = torch.nn.Module | Iterable[torch.nn.Module]
    Groups = list[dict[str, Any]]

_OWN = "lr_is_the_table_s"
"""The key of a group that says whether its learning rate is that of its table, and follows it."""


class Optimizer(torch.optim.Optimizer):
    """Take the steps of all tables of a model together, in the place of a `torch.optim.Optimizer`.

    What a step does to a row is up to the optimizer of its table: `Table.optimizer`, which `Store.create_table` is
    given. This class collects the gradients that backward left, and updates all tables of a store in one call. The
    parameters of the model, which rows are not, have an optimizer of their own.

    Parameters
    ----------
    modules : torch.nn.Module or iterable of torch.nn.Module
        A model, or some of its modules: everything in them that has its rows in tables takes part.
    lr : float, optional
        The learning rate of all tables. By default each table keeps its own, which may be a schedule, until the
        learning rate of its group is set.
    fused : bool
        Take the step of a table within backward, as soon as a gradient is there, and free that at once. Each lookup is
        a step of its own then, so gradients can neither be accumulated nor clipped nor unscaled, and `step` has nothing
        left to do.

    Raises
    ------
    TypeError, ValueError
        There is no module with tables; a table has no optimizer; `lr` is no number of at least 0.
    LearningRateError
        The learning rate of a table is a function that has to be set again.

    Notes
    -----
    ``param_groups`` has one group for each table, in the order of the modules. Its ``"lr"`` shows the learning rate of
    the next step; once a scheduler of `torch.optim.lr_scheduler` or the user sets another, that is the table's from the
    next step on, in place of its own schedule. In a table that is ``dense_equivalent``, a changed learning rate costs a
    pass over all of its rows: let `shardemb.optim.schedules` change that.

    Gradients stay until they are taken by a step, or dropped by `zero_grad`. The groups' ``"params"`` are the tensors
    that have them, so ``scaler.step(optimizer)`` and ``scaler.unscale_(optimizer)`` of `torch.amp.GradScaler` work as
    for any optimizer. Other groups cannot be added.

    Not for several threads at once. Nothing is durable before `Store.commit`.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "steps.zarr")
    >>> table = store.create_table("t", num_embeddings=9, embedding_dim=2, optimizer=shardemb.optim.SGD(lr=1.0))
    >>> words = shardemb.torch.Embedding(table)
    >>> optimizer = shardemb.torch.Optimizer(words, lr=0.5)
    >>> scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    >>> for _ in range(2):
    ...     words(torch.tensor([3])).sum().backward()
    ...     optimizer.step()
    ...     scheduler.step()
    >>> table.lookup(3)
    array([-0.75, -0.75], dtype=float32)
    >>> table.optimizer
    SGD(lr=0.25)
    >>> commit = store.commit()
    >>> store.close()
    """

    def __init__(self, modules: Modules, lr: float | None = None, *, fused: bool = False) -> None:
        self._modules = _modules_of(modules)
        self._tables = _tables_of(self._modules)
        self._fused, self._has_warned = fused, False
        self._groups: Groups = []
        self._shows_leaves, self._is_complete = False, False
        # What each group showed last: something else in it was set by somebody.
        self._shown = [math.nan if lr is not None else _next_lr(table) for table in self._tables]
        groups = [
            {
                "params": [],
                "table": table.name,
                "lr": shown if lr is None else validation.number(lr, "lr", minimum=0.0),
                _OWN: lr is None,
            }
            for table, shown in zip(self._tables, self._shown, strict=True)
        ]
        super().__init__(groups, {"lr": lr})
        self._shows_leaves = self._is_complete = True
        for module in self._modules:
            module.on_gradient = partial(self._push, module) if fused else None

    # ---- groups

    @property
    def param_groups(self) -> Groups:
        """One group for each table; ``"params"`` are the tensors that have gradients for the next step."""
        if self._shows_leaves:
            leaves: dict[Any, list[torch.Tensor]] = {_key(table): [] for table in self._tables}
            for each in _pending(self._modules):
                leaves.setdefault(_key(each.table), []).append(each.leaf)
            for table, group in zip(self._tables, self._groups, strict=True):
                group["params"] = leaves[_key(table)]
        return self._groups

    @param_groups.setter
    def param_groups(self, groups: Groups) -> None:
        self._groups = groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse it: the groups are the tables.

        Parameters
        ----------
        param_group : dict
            What would be added.

        Raises
        ------
        TypeError
            Always.
        """
        if self._is_complete:
            msg = (
                "the groups of this optimizer are the tables of its modules, so none can be added: make another "
                "shardemb.torch.Optimizer for other modules, and one of torch.optim for parameters"
            )
            raise TypeError(msg)
        super().add_param_group(param_group)

    # ---- steps

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        grad_scale: float | torch.Tensor | None = None,
    ) -> float | None:
        """Update the rows that have gradients: all tables of a store in one call, all or nothing.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model and returns the loss, with gradients enabled.
        grad_scale : float or torch.Tensor, optional
            Divide the gradients by this number, for those who scale the loss by hand. If any of them is not finite
            then, the step of all tables is skipped, and `skipped` is True. (With a `torch.amp.GradScaler`, call
            ``scaler.step(optimizer)`` instead.)

        Returns
        -------
        float or None
            What `closure` returned.

        Raises
        ------
        ValueError
            A gradient is not finite, and there is no `grad_scale`; `grad_scale` is not greater than 0, or the
            optimizer is fused.
        FrozenRowError, LearningRateError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError,
        DiskFullError, UnknownKeyError, OSError
            As `Store.update`.

        Notes
        -----
        If it raises, no table of that store has changed, and the gradients stay, until `zero_grad`. A model with tables
        of several stores takes one step in each, in turn. After Ctrl-C, a store has taken the step or not, and the
        gradients are gone or still there accordingly.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = None if grad_scale is None else float(grad_scale)
        if scale is not None and self._fused:
            msg = (
                "a fused optimizer has taken its steps within backward, with gradients as they were; make it without "
                "fused=True to divide them by a scale"
            )
            raise ValueError(msg)
        steps = merged(_pending(self._modules))
        # What is skipped in one store is skipped in all; a single one finds out by itself.
        self.skipped = scale is not None and len(steps) > 1 and not math.isfinite(_norm(steps))
        for each in [] if self.skipped else steps:
            self.skipped = not math.isfinite(self._take(each, scale) or 0.0)
            self._forget(each.store)
        if self.skipped:
            self.zero_grad()
        return loss

    skipped = False
    """Whether the last step was skipped, because a gradient was not finite."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients that no step has taken.

        Parameters
        ----------
        set_to_none : bool
            Without meaning here: they are freed.
        """
        for module in self._modules:
            for each in module.take_pending():
                each.leaf.grad = None

    def _take(self, step: Step, scale: float | None) -> float | None:
        """Update the tables of one store; return the norm of the gradients if there is a scale."""
        self._notice_rates()
        for table, group in zip(self._tables, self._groups, strict=True):
            if table.store is step.store and table.name in step.batches:
                self._set_lr(table, group)
        tables = [each for each in self._tables if each.store is step.store and each.name in step.batches]
        before = [each.step for each in tables]
        try:
            norm: float | None = step.store.update(step.batches, missing=step.missing, scale=scale)
        except BaseException:
            # An interrupt that came while rows changed is raised once all of them have.
            if [each.step for each in tables] != before:
                self._forget(step.store)
            raise
        self._show_rates()
        return norm

    def _push(self, module: TableModule, lookup: Lookup) -> None:
        """Take the step of one lookup within backward."""
        try:
            for each in merged([lookup]):
                self._take(each, None)
        finally:
            lookup.leaf.grad = None
            module.take_pending()

    def _forget(self, store: object) -> None:
        """Drop the gradients of the tables of a store."""
        for module in self._modules:
            kept = []
            for each in module.take_pending():
                if each.table.store is store:
                    each.leaf.grad = None
                else:
                    kept.append(each)
            module.pending.extend(kept)

    # ---- learning rates

    def _notice_rates(self) -> None:
        """Notice where somebody has set a learning rate in the place of the table's own."""
        for group, shown in zip(self._groups, self._shown, strict=True):
            group[_OWN] = group[_OWN] and float(group["lr"]) == shown

    def _set_lr(self, table: AnyTable, group: dict[str, Any]) -> None:
        """Give a table the learning rate of its group, if that is not the table's own."""
        lr = float(group["lr"])
        if group[_OWN] or table.optimizer.lr == lr:
            return
        if table.optimizer.dense_equivalent and not self._has_warned and table.step:
            self._has_warned = True
            msg = (
                f"table {table.name!r} is dense_equivalent, so each change of its learning rate is a pass over all of "
                f"its rows; give its optimizer a schedule of shardemb.optim.schedules, in place of a scheduler"
            )
            warnings.warn(msg, UserWarning, stacklevel=2)
        table.set_optimizer(replace(table.optimizer, lr=lr))

    def _show_rates(self) -> None:
        """Let groups show the learning rates of tables that have their own."""
        for i, (table, group) in enumerate(zip(self._tables, self._groups, strict=True)):
            if group[_OWN]:
                group["lr"] = self._shown[i] = _next_lr(table)

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return the learning rates; rows and their optimizer state are in the store.

        Returns
        -------
        dict
            With ``"state"``, which is empty, and ``"param_groups"``: numbers and names only.
        """
        self._notice_rates()
        with self._leaves_hidden():
            return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the learning rates of a state; they become those of the tables with the next step.

        Parameters
        ----------
        state_dict : dict
            What `state_dict` returned.

        Raises
        ------
        ValueError
            It is of an optimizer of other tables.
        """
        groups = state_dict["param_groups"]
        found, expected = [each.get("table") for each in groups], [each.name for each in self._tables]
        if found != expected:
            msg = (
                f"the state is of an optimizer of the tables {found}, and this one is of {expected}: make it with the "
                f"same modules in the same order"
            )
            raise ValueError(msg)
        with self._leaves_hidden():
            super().load_state_dict(state_dict)
        self._show_rates()

    @contextlib.contextmanager
    def _leaves_hidden(self) -> Iterator[None]:
        """Let groups not show the tensors that have gradients, which are no part of a state."""
        self._shows_leaves = False
        for each in self._groups:
            each["params"] = []
        try:
            yield
        finally:
            self._shows_leaves = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        groups = state.pop("param_groups")
        super().__setstate__(state)
        self._groups = groups


def clip_grad_norm_(
    modules: Modules,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """Clip the gradients of all parameters and rows of a model by their norm together.

    As `torch.nn.utils.clip_grad_norm_`, between backward and the steps: if the norm is more than `max_norm`, all
    gradients are multiplied by ``max_norm / (norm + 1e-6)``. The gradients of a row that occurs several times are
    summed before its norm is taken, as they are for the parameter of a `torch.nn.Embedding`.

    Parameters
    ----------
    modules : torch.nn.Module or iterable of torch.nn.Module
        A model, or some of its modules; not their parameters, which rows are not.
    max_norm : float
        The most that the norm may be.
    norm_type : float
        Must be 2 if rows have gradients.
    error_if_nonfinite : bool
        Refuse a norm that is not finite, and change nothing.
    foreach : bool, optional
        As for torch: how the parameters are computed on.

    Returns
    -------
    torch.Tensor
        The norm before clipping; one number.

    Raises
    ------
    TypeError, ValueError
        `modules` are no modules; `norm_type` is not 2; one of the modules has a
        fused optimizer, which has taken its step.
    RuntimeError
        The norm is not finite, and `error_if_nonfinite`.

    Notes
    -----
    Not for several threads at once. With a `torch.amp.GradScaler`, call ``scaler.unscale_`` of all optimizers before.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "clipped.zarr")
    >>> table = store.create_table("t", num_embeddings=9, embedding_dim=4, optimizer=shardemb.optim.SGD(lr=1.0))
    >>> model = torch.nn.ModuleDict({"rows": shardemb.torch.Embedding(table)})
    >>> model["rows"](torch.tensor([3, 3])).sum().backward()
    >>> shardemb.torch.clip_grad_norm_(model, max_norm=2.0)
    tensor(4.)
    >>> shardemb.torch.Optimizer(model).step()
    >>> table.lookup(3).round(4)
    array([-1., -1., -1., -1.], dtype=float32)
    >>> commit = store.commit()
    >>> store.close()
    """
    given = _modules_in(modules)
    parameters = list({id(each): each for one in given for each in one.parameters()}.values())
    tables = [each for each in given if isinstance(each, TableModule)]
    if any(each.on_gradient is not None for each in tables):
        msg = "gradients of a fused optimizer cannot be clipped: they were applied within backward; use fused=False"
        raise ValueError(msg)
    lookups = _pending(tables)
    if not lookups:
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    if float(norm_type) != 2.0:
        msg = f"the norm of rows is Euclidean, so norm_type must be 2, got {norm_type!r}"
        raise ValueError(msg)
    gradients = [each.grad for each in parameters if each.grad is not None]
    dense = torch.nn.utils.get_total_norm(gradients, 2.0, foreach=foreach)
    norm = torch.hypot(dense, torch.as_tensor(_norm(merged(lookups)), dtype=dense.dtype, device=dense.device))
    if error_if_nonfinite and not math.isfinite(norm.item()):
        msg = (
            "the norm of the gradients is not finite, so they cannot be clipped; with error_if_nonfinite=False they "
            "are scaled by it anyway"
        )
        raise RuntimeError(msg)
    clipped = [*parameters, *(each.leaf for each in lookups)]
    torch.nn.utils.clip_grads_with_norm_(clipped, max_norm, norm, foreach)
    return norm


def _norm(steps: Sequence[Step]) -> float:
    """Return the norm of the gradients of steps in several stores."""
    return math.hypot(*(each.store.gradient_norm(each.batches, missing=each.missing) for each in steps))


def _modules_in(given: Modules) -> list[torch.nn.Module]:
    """List all modules in some, each once.

    Raises
    ------
    TypeError
        They are no modules.
    """
    roots: list[Any] = [given] if isinstance(given, torch.nn.Module) else list(given)
    found: dict[torch.nn.Module, None] = {}
    for each in roots:
        if not isinstance(each, torch.nn.Module):
            msg = f"pass the model itself, or some of its modules: rows are no parameters, got {type(each).__name__}"
            raise TypeError(msg)
        found |= dict.fromkeys(each.modules())
    if not found:
        msg = "pass the model itself, or some of its modules, not its parameters; there are none"
        raise TypeError(msg)
    return list(found)


def _modules_of(given: Modules) -> list[TableModule]:
    """List the modules in some that have their rows in tables.

    Raises
    ------
    TypeError, ValueError
        They are no modules; none has tables that it trains.
    """
    found = [each for each in _modules_in(given) if isinstance(each, TableModule) and each.trains]
    if not found:
        msg = "none of the modules trains rows of a table: pass a model that has modules of shardemb.torch"
        raise ValueError(msg)
    return found


def _tables_of(modules: Iterable[TableModule]) -> list[AnyTable]:
    """List the tables of modules, each once.

    Raises
    ------
    ValueError
        A table has no optimizer.
    """
    tables = list({_key(table): table for each in modules for table in each.tables}.values())
    for table in tables:
        if table.optimizer is None:
            msg = (
                f"table {table.name!r} has no optimizer, so it takes no steps: give it one with "
                f"store.reshard({table.name!r}, optimizer=...), or let it rest with module.requires_grad_(False)"
            )
            raise ValueError(msg)
    return tables


def _key(table: AnyTable) -> tuple[int, str]:
    """Tell a table from others, whatever object it is used by."""
    return id(table.store), table.name


def _pending(modules: Iterable[TableModule]) -> list[Lookup]:
    """List the lookups that have gradients, each once."""
    return list({id(lookup.leaf): lookup for each in modules for lookup in each.pending}.values())


def _next_lr(table: AnyTable) -> float:
    lr: float = table.optimizer.lr_at(table.step + 1)
    return lr
