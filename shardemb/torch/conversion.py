"""Moving in and out: rows and optimizer state of modules of torch into tables, and back."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardemb import optim
from shardemb.base import paths
from shardemb.torch.embedding import Embedding
from shardemb.torch.embedding_bag import EmbeddingBag
from shardemb.torch.pending import is_keyed

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from shardemb.dtypes import DtypeLike
    from shardemb.torch.pending import AnyTable

_ROWS_AT_ONCE = 2**16
"""How many rows are copied in one piece."""


def from_module(
    module: torch.nn.Module,
    store: Any,  # noqa: ANN401
    name: str,
    *,
    optimizer: optim.Optimizer | None = None,
    optimizer_state: torch.optim.Optimizer | None = None,
    dtype: DtypeLike = "float32",
) -> Embedding | EmbeddingBag:
    """Move an embedding of torch into a new table of a store, and return the module that takes its place.

    Parameters
    ----------
    module : torch.nn.Embedding or torch.nn.EmbeddingBag
        Whose rows are copied, on any device; its options become those of the new module.
    store : Store
        Gets the table.
    name : str
        The table's name, as for `Store.create_table`.
    optimizer : Optimizer, optional
        How the table is trained. By default like `optimizer_state`; without that, it cannot be trained.
    optimizer_state : torch.optim.Optimizer, optional
        The optimizer that has trained the module; the table goes on with its state. It is a ``SparseAdam``, ``Adam``,
        ``AdamW``, ``Adagrad`` or ``SGD``.
    dtype : str or a type of `shardemb.dtypes`
        What rows are stored as, as for `Store.create_table`.

    Returns
    -------
    Embedding or EmbeddingBag
        Of the new table, which is part of the store with the next commit. It does not train if the module does not.

    Raises
    ------
    TypeError, ValueError
        The module or the optimizer is none of these, it does not train the module, or it has an option that the table
        cannot have; `optimizer` has other state.
    TableExistsError, ReadOnlyError, StoreClosedError, PoisonedError, DiskFullError
        As `Store.create_table`. No table was created.

    Notes
    -----
    The optimizers of torch for dense gradients change all rows in each step. Made by default, the table's optimizer
    does what they do: it is ``dense_equivalent``. Pass `optimizer` for one that leaves alone what no batch has.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> words = torch.nn.Embedding(100, 4, sparse=True)
    >>> adam = torch.optim.SparseAdam(words.parameters(), lr=0.01)
    >>> words(torch.tensor([1, 2])).sum().backward()
    >>> adam.step()
    >>> store = shardemb.open(tmp / "words.zarr")
    >>> moved = shardemb.torch.from_module(words, store, "words", optimizer_state=adam)
    >>> moved.table.optimizer, moved.table.step
    (Adam(lr=0.01, betas=(0.9, 0.999), eps=1e-08), 1)
    >>> bool((moved(torch.arange(100)) == words.weight).all())
    True
    >>> commit = store.commit()
    >>> store.close()
    """
    if not isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag):
        msg = f"pass a torch.nn.Embedding or a torch.nn.EmbeddingBag, got {type(module).__name__}"
        raise TypeError(msg)
    state: dict[str, Any] = {}
    if optimizer_state is not None:
        group, state = _trained_by(optimizer_state, module.weight)
        optimizer = _like(optimizer_state, group) if optimizer is None else optimizer
    trains = module.weight.requires_grad and optimizer is not None
    table = _new_table(store, name, module.weight.detach(), optimizer, dtype)
    try:
        if state:
            _take_over(table, state)
    except BaseException:
        store.drop_table(name)
        raise
    options = {
        each: getattr(module, each) for each in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    }
    moved: Embedding | EmbeddingBag
    if isinstance(module, torch.nn.Embedding):
        moved = Embedding(table, **options)
    else:
        mode: Any = module.mode
        moved = EmbeddingBag(table, mode=mode, include_last_offset=module.include_last_offset, **options)
    return moved.train(module.training).requires_grad_(trains)


def to_module(module: torch.nn.Module) -> torch.nn.Embedding | torch.nn.EmbeddingBag:
    """Copy all rows of a table into an embedding of torch, for tools that need a parameter.

    Parameters
    ----------
    module : Embedding or EmbeddingBag
        Of a table that is used by row id.

    Returns
    -------
    torch.nn.Embedding or torch.nn.EmbeddingBag
        With the rows as they are now, as float32 in memory, and the options of the module.

    Raises
    ------
    TypeError
        It is none of these, or of a table that is used by key, which torch does not know.
    StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
        As `Table.lookup`.

    Notes
    -----
    The table stays as it is. State of its optimizer is read with `Table.state`.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "words.zarr")
    >>> table = store.create_table("words", num_embeddings=100, embedding_dim=4)
    >>> shardemb.torch.to_module(shardemb.torch.EmbeddingBag(table, mode="sum"))
    EmbeddingBag(100, 4, mode='sum')
    >>> commit = store.commit()
    >>> store.close()
    """
    if not isinstance(module, Embedding | EmbeddingBag):
        msg = f"pass an Embedding or EmbeddingBag of shardemb.torch, got {type(module).__name__}"
        raise TypeError(msg)
    table = module.table
    if is_keyed(table):
        msg = (
            f"table {table.name!r} is used by key, and modules of torch by row id: pass "
            f"shardemb.torch.Embedding(table.rows), and map keys to rows with table.vocabulary.lookup"
        )
        raise TypeError(msg)
    weight = torch.empty(table.num_embeddings, table.embedding_dim)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        some = weight[start : start + _ROWS_AT_ONCE].numpy()
        table.lookup(np.arange(start, start + len(some)), out=some)
    options = {
        "padding_idx": module.padding_idx,
        "max_norm": module.max_norm,
        "norm_type": module.norm_type,
        "scale_grad_by_freq": module.scale_grad_by_freq,
        "_weight": weight,
    }
    if isinstance(module, EmbeddingBag):
        options |= {"mode": module.mode, "include_last_offset": module.include_last_offset}
    kind = torch.nn.EmbeddingBag if isinstance(module, EmbeddingBag) else torch.nn.Embedding
    made: torch.nn.Embedding | torch.nn.EmbeddingBag = kind(*weight.shape, **options)
    return made.train(module.training).requires_grad_(module.trains)


def from_pretrained(
    embeddings: torch.Tensor | ArrayLike | str | os.PathLike[str],
    store: Any,  # noqa: ANN401
    name: str,
    freeze: bool = True,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    *,
    optimizer: optim.Optimizer | None = None,
) -> Embedding:
    """Make a new table of given rows, and return its module; as ``torch.nn.Embedding.from_pretrained``.

    Parameters
    ----------
    embeddings : torch.Tensor, array_like or path-like
        The rows, shape (num_embeddings, embedding_dim); or a local file: ``.npy``, or one of `torch.save` that has a
        tensor. A file is not read into memory as a whole.
    store, name : Store and str
        As for `from_module`.
    freeze : bool
        Whether the rows stay as they are. Otherwise there has to be an `optimizer`.
    padding_idx, max_norm, norm_type : optional
        As for `Embedding`.
    optimizer : Optimizer, optional
        How the table is trained.

    Returns
    -------
    Embedding
        Of the new table, which is part of the store with the next commit.

    Raises
    ------
    TypeError, ValueError
        They are no rows; `freeze` is False without an `optimizer`; the file has something else.
    TableExistsError, ReadOnlyError, StoreClosedError, PoisonedError, DiskFullError, OSError
        As `Store.create_table`. No table was created.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "vectors.zarr")
    >>> vectors = shardemb.torch.from_pretrained(torch.tensor([[1.0, 2.3, 3.0], [4.0, 5.1, 6.3]]), store, "vectors")
    >>> vectors(torch.tensor([1]))
    tensor([[4.0000, 5.1000, 6.3000]])
    >>> commit = store.commit()
    >>> store.close()
    """
    if not freeze and optimizer is None:
        msg = f"table {name!r}: rows that are not frozen need an optimizer, for example optimizer=shardemb.optim.Adam()"
        raise ValueError(msg)
    rows: Any = _file(embeddings) if isinstance(embeddings, str | os.PathLike) else embeddings
    if len(shape := np.shape(rows)) != 2:
        msg = (
            f"embeddings must have two dimensions, (num_embeddings, embedding_dim), got shape {tuple(shape)}"
        )
        raise ValueError(msg)
    table = _new_table(store, name, rows, optimizer, "float32")
    return Embedding(table, padding_idx, max_norm, norm_type).requires_grad_(not freeze)


def _file(path: str | os.PathLike[str]) -> Any:  # noqa: ANN401
    """Map the rows in a file of NumPy or torch."""
    file = paths.local_path(path, "the file of embeddings")
    if file.suffix == ".npy":
        return np.load(file, mmap_mode="r")
    found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(found, torch.Tensor):
        names = ", ".join(map(repr, found)) if isinstance(found, dict) else type(found).__name__
        msg = f"{file} has no tensor but {names}: load it with torch.load, and pass the tensor of the rows"
        raise ValueError(msg)
    return found


def _new_table(
    store: Any,  # noqa: ANN401
    name: str,
    rows: Any,  # noqa: ANN401
    optimizer: optim.Optimizer | None,
    dtype: DtypeLike,
) -> AnyTable:
    count, dim = rows.shape if hasattr(rows, "shape") else np.shape(rows)
    if isinstance(rows, torch.Tensor):
        rows = _pieces(rows)
    return store.create_table(
        name, num_embeddings=count, embedding_dim=dim, initializer=rows, optimizer=optimizer, dtype=dtype
    )


def _pieces(rows: torch.Tensor) -> Any:  # noqa: ANN401
    """Return a function that copies a range of rows to the memory of the CPU."""

    def piece(start: int, stop: int) -> Any:  # noqa: ANN401
        return rows[start:stop].detach().to("cpu", torch.float32).numpy()

    return piece


# ---- optimizers -----------------------------------------------------------------------------------------------------


def _trained_by(
    optimizer: torch.optim.Optimizer, weight: torch.Tensor
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the group of a parameter and its state.

    Raises
    ------
    ValueError
        The optimizer does not train it.
    """
    for group in optimizer.param_groups:
        if any(each is weight for each in group["params"]):
            return group, dict(optimizer.state.get(weight, {}))
    msg = "optimizer_state does not train the module's weight: pass the optimizer that was given module.parameters()"
    raise ValueError(msg)


def _like(given: torch.optim.Optimizer, group: dict[str, Any]) -> optim.Optimizer:
    """Return the optimizer of a table that does what one of torch does.

    Raises
    ------
    TypeError, ValueError
        There is none.
    """
    kind, lr, maximize = type(given).__name__, float(group["lr"]), bool(group.get("maximize", False))
    decay = float(group.get("weight_decay", 0.0))
    if kind == "SparseAdam":
        return optim.Adam(lr=lr, betas=group["betas"], eps=group["eps"], maximize=maximize)
    if kind in ("Adam", "AdamW") and not group["amsgrad"]:
        decoupled = kind == "AdamW" or bool(group.get("decoupled_weight_decay", False))
        return (optim.AdamW if decoupled else optim.Adam)(
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            eps_after_correction=True,
            weight_decay=decay,
            maximize=maximize,
            dense_equivalent=True,
        )
    if kind == "Adagrad" and decay == 0:
        return optim.Adagrad(
            lr=lr,
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            initial_accumulator_value=group["initial_accumulator_value"],
            maximize=maximize,
        )
    if kind == "SGD":
        return optim.SGD(
            lr=lr,
            momentum=group["momentum"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            weight_decay=decay,
            maximize=maximize,
            dense_equivalent=bool(group["momentum"] or decay),
        )
    options = {each: value for each, value in group.items() if each != "params" and value}
    msg = f"no optimizer of a table is known to do what {kind} of torch does with {options}: pass optimizer="
    raise (ValueError if kind in ("Adam", "AdamW", "Adagrad") else TypeError)(msg)


def _take_over(table: AnyTable, state: dict[str, Any]) -> None:
    """Give a table the state of a parameter.

    Raises
    ------
    ValueError
        It lacks something.
    """
    optimizer = table.optimizer
    columns = [each for each in optimizer.state_columns(table.embedding_dim) if each != "last_step"]
    lacking = [each for each in columns if not isinstance(state.get(each), torch.Tensor)]
    if lacking:
        msg = (
            f"optimizer_state has {', '.join(state)}, but the table's optimizer, {optimizer!r}, also needs "
            f"{', '.join(lacking)}: pass an optimizer of the same kind, or none"
        )
        raise ValueError(msg)
    # Only the first step of SGD differs from the others; torch does not count them.
    table.set_step(int(state.get("step", 1)))
    pieces = {each: _pieces(state[each].to_dense()) for each in columns}
    for start in range(0, table.num_embeddings, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, table.num_embeddings)
        found = {each: piece(start, stop) for each, piece in pieces.items()}
        table.write_state(np.arange(start, stop), found)
