"""`save` and `load`: all of a model and its training, of which the store has the rows, and a file the rest.

::

    save    file, synced -> commit of the store, whose metadata names the file: this is the checkpoint -> older files go
    load    the file that the last commit names

So there is no moment at which the two disagree, whatever dies: until the commit, the one before counts, whose file is
still there. A file that no commit names is removed by the next `save`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardemb.base import paths
from shardemb.errors import FormatError, ShardEmbError
from shardemb.references import paired_with_a_commit
from shardemb.storage import files
from shardemb.torch.pending import TableModule

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from shardemb.format.manifest import Commit

    Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]

KEY = "shardemb.torch"
"""Where the metadata of a commit names the file."""

_METHODS = (("state_dict", "load_state_dict"), ("get_state", "set_state"))
"""How objects that are saved tell their state, and how they take it back: the second ones are those of generators."""


def save(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: Optimizers,
    store: Any,  # noqa: ANN401
    step: int | None = None,
    *,
    others: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Commit:
    """Commit the store, together with everything of the training that is not in it.

    Parameters
    ----------
    path : path-like
        A folder on a local disk, for the parameters and the rest: one file, which replaces the one before.
    model : torch.nn.Module
        The model, with rows in tables of the store or without.
    optimizer : torch.optim.Optimizer or sequence of these
        All optimizers: those of the parameters, and `shardemb.torch.Optimizer`.
    store : Store
        What is committed.
    step : int, optional
        The job's own step, as for `Store.commit`.
    others : mapping of str to object, optional
        What else has a state: schedulers, gradient scalers, loaders (``state_dict`` and ``load_state_dict``), random
        generators (``get_state`` and ``set_state``).
    metadata : dict, optional
        As for `Store.commit`. The name of the file is added, under ``"shardemb.torch"``.

    Returns
    -------
    Commit
        The commit that names the file.

    Raises
    ------
    TypeError, ValueError
        The path is none; something in `others` has no state; a table of the model is in another store; the step or the
        metadata is invalid. Nothing was saved.
    DiskFullError, OSError, PoisonedError, ReadOnlyError, StoreClosedError
        As `Store.commit`. The checkpoint before still counts.

    Notes
    -----
    The states of the random generators of torch, of Python's ``random`` and of NumPy are part of the file, so training
    that is resumed gives the same bits as if it had not been interrupted, if its data do. The file has to fit into
    memory a second time.

    With `Ranks` as the store, all ranks make this call and that of `load`, whose folder all of them see. The owner
    writes the file; its parameters, random generators and others are those that are saved.

    If a process dies within the call, the last commit is the one before, or this one with its file. A commit that is
    made without this function names no file, so nothing can be loaded with it. The store keeps only its last commit: to
    keep an older checkpoint, copy the store (`Store.copy`) and the folder before the next call.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> def build(store):
    ...     return torch.nn.Sequential(shardemb.torch.Embedding(store["words"]), torch.nn.Linear(4, 1))
    >>> with shardemb.open(tmp / "words.zarr") as store:
    ...     table = store.create_table("words", num_embeddings=9, embedding_dim=4, optimizer=shardemb.optim.Adam())
    ...     model = build(store)
    ...     optimizers = [torch.optim.AdamW(model.parameters()), shardemb.torch.Optimizer(model)]
    ...     commit = shardemb.torch.save(tmp / "rest", model, optimizers, store, step=100)
    >>> with shardemb.open(tmp / "words.zarr") as store:
    ...     model = build(store)
    ...     optimizers = [torch.optim.AdamW(model.parameters()), shardemb.torch.Optimizer(model)]
    ...     shardemb.torch.load(tmp / "rest", model, optimizers, store).step
    100
    """
    folder = _folder(path)
    others = {} if others is None else others
    _require_tables_in(model, store)
    saved = {name: getattr(each, _methods(name, each)[0])() for name, each in others.items()}
    document: dict[str, Any] = {"others": saved, "random": _random_state()}
    with paired_with_a_commit():
        document["model"] = model.state_dict()
        document["optimizers"] = [each.state_dict() for each in _listed(optimizer)]
    if not getattr(store, "is_owner", True):
        commit: Commit = store.commit(step)  # another rank has the store, and writes the file
        return commit
    buffer = io.BytesIO()
    torch.save(document, buffer)
    prefix = f"{store.uuid[:8]}-"
    # A name of its own for each attempt: the file that the last commit names must not change.
    name = f"{prefix}{uuid.uuid4().hex}.pt"
    entry = _write(folder / name, buffer.getbuffer())
    commit = store.commit(step, {**(metadata or {}), KEY: entry})
    with contextlib.suppress(OSError):  # they are removed the next time
        for each in files.entries(folder):
            if each.name.startswith(prefix) and each.name != name:
                files.remove(each)
    return commit


def _write(file: Path, data: memoryview) -> dict[str, Any]:
    """Write a new file durably; return what its commit says about it."""
    files.make_directory(file.parent)
    files.sync_directory(file.parent.parent)
    files.replace(file, data)
    return {"file": file.name, "bytes": len(data), "blake2b": _digest(data)}


def load(
    path: str | os.PathLike[str],
    model: torch.nn.Module,
    optimizer: Optimizers,
    store: Any,  # noqa: ANN401
    *,
    others: Mapping[str, Any] | None = None,
    random_state: bool = True,
) -> Commit:
    """Go on where `save` was called last: bring a model and its training to the last commit of the store.

    Parameters
    ----------
    path : path-like
        The folder that `save` was given.
    model : torch.nn.Module
        A model like the one that was saved, with the store's tables.
    optimizer : torch.optim.Optimizer or sequence of these
        As many optimizers, in the same order.
    store : Store
        The store, as it is in its last commit.
    others : mapping of str to object, optional
        Objects for all that was saved under these names.
    random_state : bool
        Whether to set the random generators too.

    Returns
    -------
    Commit
        The last commit, with the job's step and metadata.

    Raises
    ------
    ShardEmbError
        The store has no commit, has changed since the last one, or that was not made by `save`; the file is of another
        model, or lacks something.
    FileNotFoundError, FormatError
        The file is not there; it is damaged.
    TypeError, ValueError, RuntimeError
        The path is none; something in `others` has no state; what `load_state_dict` of torch raises.

    Notes
    -----
    If it raises, some of the parameters may have been loaded; no rows have changed. The file is read with torch's
    ``weights_only=True``, so it runs no code.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "words.zarr")
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> commit = shardemb.torch.save(tmp / "rest", model, optimizer, store, step=100)
    >>> shardemb.torch.load(tmp / "rest", model, optimizer, store).step
    100
    >>> commit = store.commit(step=200)
    >>> shardemb.torch.load(tmp / "rest", model, optimizer, store)
    Traceback (most recent call last):
    ...
    shardemb.errors.ShardEmbError: commit 2 (step 200) of the store ... was not made by shardemb.torch.save, ...
    >>> store.close()
    """
    folder = _folder(path)
    others = {} if others is None else others
    commit, entry = _last_entry(store)
    document = _read(folder, entry)
    optimizers = _listed(optimizer)
    if len(document["optimizers"]) != len(optimizers):
        msg = (
            f"{len(document['optimizers'])} optimizers were saved, and {len(optimizers)} were given: pass them all, in "
            f"the order in which they were saved"
        )
        raise ShardEmbError(msg)
    if document["others"].keys() != others.keys():
        msg = (
            f"others: {sorted(document['others'])} were saved, and {sorted(others)} were given: pass them all"
        )
        raise ShardEmbError(msg)
    setters = {name: getattr(each, _methods(name, each)[1]) for name, each in others.items()}
    with paired_with_a_commit():
        model.load_state_dict(document["model"])
        for each, state in zip(optimizers, document["optimizers"], strict=True):
            each.load_state_dict(state)
    for name, state in document["others"].items():
        setters[name](state)
    if random_state and getattr(store, "is_owner", True):  # ranks differ in what they draw
        _set_random_state(document["random"])
    return commit


def _folder(path: str | os.PathLike[str]) -> Path:
    return paths.local_path(path, "the folder of checkpoints").resolve()


def _listed(optimizer: Optimizers) -> list[torch.optim.Optimizer]:
    return [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)


def _methods(name: str, value: object) -> tuple[str, str]:
    for methods in _METHODS:
        if all(hasattr(value, each) for each in methods):
            return methods
    msg = (
        f"others[{name!r}] has no state to save, it is {value!r:.80}: pass objects with state_dict() and "
        f"load_state_dict(), and put plain values into metadata"
    )
    raise TypeError(msg)


def _require_tables_in(model: torch.nn.Module, store: object) -> None:
    for module in model.modules():
        for table in module.tables if isinstance(module, TableModule) else ():
            if table.store is not store:
                msg = (
                    f"table {table.name!r} of the model is in another store, {table.store.path}, and one commit can "
                    f"only be of one store: put all tables that train together into one"
                )
                raise ValueError(msg)


def _last_entry(store: Any) -> tuple[Commit, dict[str, Any]]:  # noqa: ANN401
    """Return the last commit, and what it says about the file."""
    commit: Commit | None = store.last_commit
    if commit is None:
        msg = f"there is no checkpoint: the store {store.path} has no commit"
        raise ShardEmbError(msg)
    if store.has_changes:
        msg = (
            f"the store {store.path} has changed since its last commit, {commit.id} (step {commit.step}): call "
            f"store.rollback() to go back to that, and load again"
        )
        raise ShardEmbError(msg)
    entry = commit.metadata.get(KEY)
    if not isinstance(entry, dict):
        msg = (
            f"commit {commit.id} (step {commit.step}) of the store {store.path} was not made by shardemb.torch.save, "
            f"so no file has the parameters that go with it: use save() in the place of store.commit()"
        )
        raise ShardEmbError(msg)
    return commit, entry


def _read(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Read the file that a commit names."""
    file = folder / entry["file"]
    found = files.size(file)
    if found is None:
        msg = (
            f"{file} is not there, which has the parameters that go with the last commit: pass the folder that "
            f"shardemb.torch.save was given; if another process has saved since, call store.refresh()"
        )
        raise FileNotFoundError(msg)
    data = files.read(file, entry["bytes"]) if found == entry["bytes"] else b""
    if _digest(data) != entry["blake2b"]:
        msg = f"{file} is damaged: it is not what was saved with the last commit; take it from a backup"
        raise FormatError(msg)
    document: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return document


def _digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# ---- random numbers -----------------------------------------------------------------------------------------------


def _random_state() -> dict[str, Any]:
    """Return the states of the random generators that programs share, as numbers and tensors."""
    kind, keys, *rest = np.random.get_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {
        "torch": torch.get_rng_state(),
        "cuda": gpus,
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
