"""`EmbeddingBag`: one row for each bag of ids, pooled where the rows are."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardemb.bags import Bags
from shardemb.torch.embedding import OfOneTable, described, padding_of, renormalise
from shardemb.torch.pending import is_keyed
from shardemb.torch.tensors import array_of_ids, tensor_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from numpy.typing import NDArray

    from shardemb.torch.pending import AnyTable, Missing, TableModule


class EmbeddingBag(OfOneTable):
    """Bags of rows of a table in the place of `torch.nn.EmbeddingBag`.

    It has no parameters. `shardemb.torch.Optimizer` takes the steps. Nothing is ever as large as all rows of a batch.

    Parameters
    ----------
    table : Table or KeyedTable
        Whose rows are pooled.
    max_norm, norm_type, scale_grad_by_freq : optional
        As for `Embedding`. (With `scale_grad_by_freq`, gradients are those of `torch.nn.functional.embedding`, whose
        rows are pooled: on CPUs, ``embedding_bag`` of torch 2.13 divides by the counts of other ids.)
    mode : {"mean", "sum", "max"}
        What a bag becomes.
    include_last_offset : bool
        Whether offsets have one number more, where the last bag ends.
    padding_idx : int, optional
        The row, or, in a table that is used by key, the key, that is left out of bags; a row is counted from the end
        if it is negative. By default the table's `padding_idx`, and that alone if it has one.
    dtype, missing, create : optional
        As for `Embedding`.

    Raises
    ------
    TypeError, ValueError
        As `Embedding`; or the mode is none of these.

    Notes
    -----
    See `Embedding`. The gradient of ``per_sample_weights`` is computed with the rows as they are in the backward pass.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "sums.zarr")
    >>> table = store.create_table("words", num_embeddings=100, embedding_dim=4, optimizer=shardemb.optim.Adam())
    >>> sums = shardemb.torch.EmbeddingBag(table, mode="sum")
    >>> sums(torch.tensor([1, 2, 3]), torch.tensor([0, 2])).shape
    torch.Size([2, 4])
    >>> sums
    EmbeddingBag(100, 4, mode='sum')
    >>> commit = store.commit()
    >>> store.close()
    """

    def __init__(
        self,
        table: AnyTable,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: Literal["mean", "sum", "max"] = "mean",
        include_last_offset: bool = False,
        padding_idx: Any = None,  # noqa: ANN401
        *,
        dtype: torch.dtype = torch.float32,
        missing: Missing = "error",
        create: bool = False,
    ) -> None:
        super().__init__(table, missing, dtype, create=create)
        if mode not in ("mean", "sum", "max"):
            msg = f'table {table.name!r}: mode must be "mean", "sum" or "max", got {mode!r:.80}'
            raise ValueError(msg)
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq = scale_grad_by_freq
        self.mode = mode
        self.include_last_offset = include_last_offset
        self.padding_idx = padding_of(table, padding_idx)

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Look up bags of rows, and pool each to one row.

        Parameters
        ----------
        input : torch.Tensor of int, or array_like of int, str or bytes, shape (n,) or (bags, n)
            Ids or keys. With two dimensions, each row is a bag. A nested tensor of layout `torch.jagged` has its
            bags of any length.
        offsets : torch.Tensor of int, shape (bags,), optional
            Where each bag begins, if the input has one dimension.
        per_sample_weights : torch.Tensor of float, shape ``input.shape``, optional
            Weights of the rows, for the mode ``"sum"``. They may require gradients.

        Returns
        -------
        torch.Tensor of `dtype`, shape (bags, embedding_dim)
            On the device of `input`; the caller's own memory. Bags without rows give zeros.

        Raises
        ------
        TypeError, ValueError
            Input, offsets and weights do not go together; see `Table.lookup_bag`.
        NotImplementedError
            Weights with another mode.
        RowIdError, UnknownKeyError, StoreClosedError, TableNotFoundError, ReadOnlyError
            As `Embedding.forward`.
        """
        if torch.compiler.is_compiling():
            from shardemb.torch.pending import uncompiled

            result: torch.Tensor = uncompiled(self._look_up, input, offsets, per_sample_weights)
            return result
        return self._look_up(input, offsets, per_sample_weights)

    def _look_up(
        self,
        input: Any,  # noqa: ANN401
        offsets: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        device = input.device if isinstance(input, torch.Tensor) else torch.device("cpu")
        bags = self._bags(input, offsets, weights)
        creates = self.creates
        if self.max_norm is not None:
            renormalise(self, self.table, bags.ids, self.max_norm, self.norm_type)
            creates = False  # they have been
        name = self.table.name
        pooled = self.table.store.lookup_bag({name: bags}, missing=self.missing, create=creates)[name]
        return pooled_of(
            self, tensor_of(pooled, device, self.dtype), self.table, bags, weights, self.scale_grad_by_freq
        )

    def _bags(self, input: Any, offsets: Any, weights: torch.Tensor | None) -> Bags:  # noqa: ANN401
        include_last_offset = self.include_last_offset
        if isinstance(input, torch.Tensor) and input.is_nested:
            weights = weights.values() if weights is not None and weights.is_nested else weights
            input, offsets, include_last_offset = input.values(), input.offsets(), True
        ids = array_of_ids(input, own=self.remembers)
        _check_shapes(ids.shape, offsets, weights, self.mode)
        return Bags(
            ids,
            None if offsets is None else array_of_ids(offsets, own=True),
            self.mode,
            None if weights is None else array_of_weights(weights),
            self.padding_idx,
            include_last_offset,
        )

    def extra_repr(self) -> str:
        """Describe it as `torch.nn.EmbeddingBag` is described."""
        return described(self, f"{self.num_embeddings}, {self.embedding_dim}", (), ("mode", "padding_idx"))


def _check_shapes(shape: tuple[int, ...], offsets: Any, weights: Any, mode: str) -> None:  # noqa: ANN401
    if len(shape) not in (1, 2):
        msg = f"input has to be 1D or 2D Tensor, but got Tensor of dimension {len(shape)}"
        raise ValueError(msg)
    if len(shape) == 2 and offsets is not None:
        msg = "input is 2D, each row a bag, so offsets has to be None; flatten the input to give offsets"
        raise ValueError(msg)
    if len(shape) == 1 and offsets is None:
        msg = "input is 1D, so offsets has to be a 1D Tensor: where each bag begins"
        raise ValueError(msg)
    if weights is not None and mode != "sum":
        msg = f'per_sample_weights are only for mode="sum", and this module has mode={mode!r}'
        raise NotImplementedError(msg)
    if weights is not None and tuple(weights.shape) != shape:
        msg = (
            f"per_sample_weights have shape {tuple(weights.shape)}, but must have that of the input, {shape}"
        )
        raise ValueError(msg)


# ---- pooled results in autograd -----------------------------------------------------------------------------------


def array_of_weights(weights: torch.Tensor) -> NDArray[np.float32]:
    """Return weights as float32 in memory of their own: an optimizer may change the tensor before the step."""
    return np.array(weights.detach().to("cpu", torch.float32).numpy())


def pooled_of(
    module: TableModule,
    leaf: torch.Tensor,
    table: AnyTable,
    bags: Bags,
    weights: torch.Tensor | None,
    scale_grad_by_freq: bool,
) -> torch.Tensor:
    """Return what bags are pooled to as a tensor that passes gradients to a leaf, and to the weights."""
    weighs = weights is not None and weights.requires_grad and torch.is_grad_enabled()
    if module.remembers:
        module.remember(table, bags, leaf, scale_grad_by_freq=scale_grad_by_freq)
    elif not weighs:
        return leaf

    backward = partial(_weight_gradient, table, bags, module.missing) if weighs else None
    result: torch.Tensor = _Pooled.apply(leaf, weights, backward)  # type: ignore[no-untyped-call]
    return result


def _weight_gradient(
    table: AnyTable, bags: Bags, missing: Missing, gradient: NDArray[np.float32]
) -> NDArray[np.float32]:
    last = bags.include_last_offset
    if is_keyed(table):
        found: NDArray[np.float32] = table.bag_weight_gradient(
            bags.ids,
            bags.offsets,
            gradient,
            padding_key=bags.padding_idx,
            include_last_offset=last,
            missing=missing,
        )
    else:
        found = table.bag_weight_gradient(
            bags.ids, bags.offsets, gradient, padding_idx=bags.padding_idx, include_last_offset=last
        )
    return found


class _Pooled(torch.autograd.Function):
    """What bags are pooled to, in a tensor that may be changed in place; differentiable by leaf and weights."""

    @staticmethod
    def forward(
        context: Any,  # noqa: ANN401
        leaf: torch.Tensor,
        weights: torch.Tensor | None,
        weight_gradient: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None,
    ) -> torch.Tensor:
        context.weight_gradient = weight_gradient
        context.like = None if weights is None else (weights.shape, weights.device, weights.dtype)
        return leaf.detach()

    @staticmethod
    def backward(
        context: Any,  # noqa: ANN401
        *gradients: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_weights = None
        if context.needs_input_grad[1]:
            shape, device, dtype = context.like
            given = gradients[0].detach().to("cpu", torch.float32).contiguous().numpy()
            of_weights = tensor_of(context.weight_gradient(given), device, dtype).reshape(shape)
        return gradients[0] if context.needs_input_grad[0] else None, of_weights, None
