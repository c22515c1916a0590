"""`Embedding`: one row for each id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from shardemb.torch.pending import DTYPES, TableModule, is_keyed
from shardemb.torch.tensors import Alias, array_of_ids, tensor_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.torch.pending import AnyTable, Missing

_ROWS_AT_ONCE = 2**16
"""How many rows are checked for their norm in one piece."""


class OfOneTable(TableModule):
    """A module whose rows are in one table; see `TableModule`.

    Attributes
    ----------
    table : Table or KeyedTable
    """

    def __init__(self, table: AnyTable, missing: Missing, dtype: torch.dtype, *, create: bool) -> None:
        super().__init__((table,), missing, dtype, create=create)
        self.table = table

    @property
    def num_embeddings(self) -> int:
        """Number of rows of the table now."""
        return int(self.table.num_embeddings)

    @property
    def embedding_dim(self) -> int:
        """Number of values in a row."""
        return int(self.table.embedding_dim)


class Embedding(OfOneTable):
    """Rows of a table in the place of `torch.nn.Embedding`.

    It has no parameters. `shardemb.torch.Optimizer` takes the steps.

    Parameters
    ----------
    table : Table or KeyedTable
        Whose rows are looked up.
    padding_idx : int, optional
        The row, or, in a table that is used by key, the key, that takes no gradients; a row is counted from the end if
        it is negative. By default the table's `padding_idx`, and that alone if it has one. It is looked up like any
        other.
    max_norm : float, optional
        Rows whose norm is larger are shortened to it when they are looked up: in the table, also in evaluation.
    norm_type : float
        The p of that norm.
    scale_grad_by_freq : bool
        Divide gradients by how often the id of their row is in the batch.
    dtype : torch.dtype
        Of the results: float32, float64, float16 or bfloat16, whatever rows are stored as.
    missing : {"error", "initial", "zeros"} or int
        What keys without a row are looked up as, as for `KeyedTable.lookup`. Only those that an int, the id of a row,
        is given for have gradients, which are those of that row.
    create : bool
        Give new keys rows, in training.

    Raises
    ------
    TypeError, ValueError
        The table is none, or holds raw bytes; `padding_idx` is no row; `missing` or `create` without keys; the dtype
        is none of these.

    Notes
    -----
    A module may be called several times before a step, and several modules may share a table: all gradients of a table
    take part in one step. In evaluation (``module.eval()``) and without gradients (`torch.no_grad`), nothing is kept.
    Rows that changed between forward and backward are not noticed.

    Forward may run in several threads.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "words.zarr")
    >>> table = store.create_table("words", num_embeddings=100, embedding_dim=4, optimizer=shardemb.optim.Adam())
    >>> words = shardemb.torch.Embedding(table, padding_idx=0)
    >>> words(torch.tensor([[1, 2], [3, 0]])).shape
    torch.Size([2, 2, 4])
    >>> words
    Embedding(100, 4, padding_idx=0)
    >>> commit = store.commit()
    >>> store.close()
    """

    def __init__(
        self,
        table: AnyTable,
        padding_idx: Any = None,  # noqa: ANN401
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        *,
        dtype: torch.dtype = torch.float32,
        missing: Missing = "error",
        create: bool = False,
    ) -> None:
        super().__init__(table, missing, dtype, create=create)
        self.padding_idx = padding_of(table, padding_idx)
        self.max_norm, self.norm_type = max_norm, norm_type
        self.scale_grad_by_freq = scale_grad_by_freq

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Look up the row of each id.

        Parameters
        ----------
        input : torch.Tensor of int, or array_like of int, str or bytes
            Ids or keys of any shape, of any integer dtype and on any device.

        Returns
        -------
        torch.Tensor of `dtype`, shape ``input.shape + (embedding_dim,)``
            On the device of `input`; the caller's own memory.

        Raises
        ------
        TypeError, RowIdError, UnknownKeyError, StoreClosedError, TableNotFoundError
            As `Table.lookup` and `KeyedTable.lookup`.
        ReadOnlyError
            A row is longer than `max_norm`, and the store cannot be written.
        """
        if torch.compiler.is_compiling():
            from shardemb.torch.pending import uncompiled

            result: torch.Tensor = uncompiled(self._look_up, input)
            return result
        return self._look_up(input)

    def _look_up(self, input: Any) -> torch.Tensor:  # noqa: ANN401
        remembers, creates = self.remembers, self.creates
        ids = array_of_ids(input, own=remembers)
        device = input.device if isinstance(input, torch.Tensor) else torch.device("cpu")
        if self.max_norm is not None:
            renormalise(self, self.table, ids, self.max_norm, self.norm_type)
            creates = False  # they have been
        rows = rows_of(self, self.table, ids, DTYPES.get(self.dtype, "float32"), creates=creates)
        leaf = tensor_of(rows, device, self.dtype)
        if not remembers:
            return leaf
        padding = None if is_padding_of(self.table, self.padding_idx) else self.padding_idx
        self.remember(self.table, ids, leaf, padding_idx=padding, scale_grad_by_freq=self.scale_grad_by_freq)
        result: torch.Tensor = Alias.apply(leaf)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        """Describe it as `torch.nn.Embedding` is described."""
        return described(self, f"{self.num_embeddings}, {self.embedding_dim}", ("padding_idx",))


def rows_of(
    module: TableModule,
    table: AnyTable,
    ids: NDArray[Any],
    dtype: str,
    *,
    creates: bool,
) -> NDArray[Any]:
    """Look up rows by id or key, as the module does it."""
    if is_keyed(table):
        found: NDArray[Any] = table.lookup(ids, missing=module.missing, create=creates, dtype=dtype)
    else:
        found = table.lookup(ids, dtype=dtype)
    return found


def renormalise(
    module: TableModule,
    table: AnyTable,
    ids: NDArray[Any],
    max_norm: float,
    norm_type: float,
) -> None:
    """Shorten rows in the table whose norm is more than `max_norm`, as `torch.embedding_renorm_` does."""
    flat = ids.reshape(-1)
    for start in range(0, flat.size, _ROWS_AT_ONCE):
        some = flat[start : start + _ROWS_AT_ONCE]
        rows = rows_of(module, table, some, "float32", creates=module.creates)
        norms = np.linalg.norm(rows, norm_type, axis=1)
        long = np.flatnonzero(norms > max_norm)
        if not long.size:
            continue
        shortened = rows[long] * np.float32(max_norm / (norms[long, np.newaxis] + 1e-7))
        if is_keyed(table):
            skipped = "skip" if module.missing in ("initial", "zeros") else module.missing
            table.write(some[long], shortened, missing=skipped)
        else:
            table.write(some[long], shortened)


def padding_of(table: AnyTable, padding_idx: Any) -> Any:  # noqa: ANN401
    """Return the row of padding that is counted from the start, or the key of padding; by default the table's row.

    Raises
    ------
    TypeError, ValueError
        It is no row of the table.
    """
    if isinstance(padding_idx, torch.Tensor) and padding_idx.numel() == 1:
        padding_idx = padding_idx.item()
    if is_keyed(table):
        return _key_of_padding(table, padding_idx)
    if padding_idx is None:
        return table.padding_idx
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int | np.integer):
        msg = f"table {table.name!r}: padding_idx must be one row id, got {padding_idx!r:.80}"
        raise TypeError(msg)
    count = table.num_embeddings
    if not -count <= padding_idx < count:
        msg = f"table {table.name!r}: padding_idx must be within num_embeddings, {count}, got {padding_idx}"
        raise ValueError(msg)
    if table.padding_idx not in (None, int(padding_idx) % count):
        _refuse_padding(table, table.padding_idx, padding_idx)
    return int(padding_idx) % count


def _refuse_padding(table: AnyTable, own: int, given: Any) -> NoReturn:  # noqa: ANN401
    msg = f"table {table.name!r} has the row {own} for padding, so padding_idx cannot be {given!r:.80}; leave it out"
    raise ValueError(msg)


def _key_of_padding(table: AnyTable, key: Any) -> Any:  # noqa: ANN401
    key_type = table.vocabulary.key_type
    kinds = {"int64": int | np.integer, "string": str, "bytes": bytes}
    if key is not None and (isinstance(key, bool) or not isinstance(key, kinds[key_type])):
        msg = f"table {table.name!r}: padding_idx must be one key, of type {key_type}, got {key!r:.80}"
        raise TypeError(msg)
    if key is not None and table.rows.padding_idx is not None:
        _refuse_padding(table, table.rows.padding_idx, key)
    return key


def is_padding_of(table: AnyTable, padding_idx: Any) -> bool:  # noqa: ANN401
    """Return whether the table itself drops the gradients of a row."""
    return padding_idx is not None and not is_keyed(table) and bool(padding_idx == table.padding_idx)


def described(module: Any, begin: str, first: tuple[str, ...] = (), last: tuple[str, ...] = ()) -> str:  # noqa: ANN401
    """Describe a module by those of its arguments that differ from their defaults."""
    defaults = {"norm_type": 2.0, "scale_grad_by_freq": False, "missing": "error", "create": False}
    defaults["dtype"] = torch.float32
    names = (*first, "max_norm", "norm_type", "scale_grad_by_freq", *last, "missing", "create", "dtype")
    given = ((name, getattr(module, name)) for name in names)
    return ", ".join([begin, *(f"{name}={value!r}" for name, value in given if value != defaults.get(name))])
