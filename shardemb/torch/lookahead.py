"""Reading the rows of the next batches while one computes.

::

    loader -> batches t + 1 .. t + depth wait here, their rows are read in the background -> batch t, as in a plain loop

No thread is needed for this: batches are taken from the loader where the loop asks for one, in its thread and in its
order, and `Table.prefetch` returns before the rows are read. So the loop, the loader and everything random in them run
as without this, and there is nothing to stop when the loop ends, however it does.

Rows are copied to where an update changes them, not to where a lookup returns them: a row that changes before its batch
comes is right without further ado.
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

import torch

from shardemb.errors import ReadOnlyError, ShardEmbError
from shardemb.torch.pending import TableModule
from shardemb.torch.tensors import array_of_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Ids: TypeAlias = "Callable[[Any], Mapping[Any, Any]]"
    Loss: TypeAlias = "Callable[[torch.nn.Module, Any], tuple[torch.Tensor, Any]]"

Batch = TypeVar("Batch")

_WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before names


def prefetching(
    loader: Iterable[Batch], model: torch.nn.Module, depth: int = 2, *, ids: Ids | None = None
) -> Prefetching[Batch]:
    """Yield the batches of a loader, while the rows of the next ones are read.

    Batches come as from the loader alone, and training gives the same bits. What is gained is the time that lookups and
    updates wait for the disk: while a batch computes, a thread of the store reads the rows of the `depth` next ones.

    Parameters
    ----------
    loader : iterable
        Where batches come from: a `DataLoader` or any other iterable. Each batch has to be an object of its own, as it
        waits here while the next ones are made.
    model : torch.nn.Module
        Whose tables are read. In training mode with gradients enabled, rows are also copied to where updates change
        them.
    depth : int
        How many batches are read ahead.
    ids : callable, optional
        Says which rows a batch will look up: ``ids(batch)`` returns a mapping to row ids or keys (tensors, arrays,
        lists) from modules, tables, names of modules within the model, or features of its collections. By default: if
        the model has one table, the first tensor of integers in the batch, which may be a tuple or list; otherwise the
        batch, or what is in it, is a mapping with such names as keys, or a `KeyedJaggedTensor` with such features.

    Returns
    -------
    Prefetching
        An iterable with a new iterator for each loop, and with the ``len()`` of the loader. It also has the
        ``state_dict()`` and ``load_state_dict()`` of a loader that has them: the state counts what was yielded, not
        what was read ahead.

    Raises
    ------
    TypeError, ValueError
        The model has no tables, or `depth` is not positive. While iterating: the default does not know the ids of a
        batch, or they are no ids; raised in the place of that batch.

    Notes
    -----
    Not for several threads at once, as loaders are not. Batches are taken from the loader earlier than by a plain loop:
    something random in a loader without worker processes, which draws from the same generator as the loop, has other
    numbers then; give it a generator of its own.

    Memory is that of `depth` batches, and of their rows within the store's memory budget; rows that do not fit into it
    are not copied ahead. What the loader raises is raised in the place of the batch that it did not return. Errors of
    shardemb while reading ahead are left to the lookup, which meets them again.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "ahead.zarr")
    >>> table = store.create_table(
    ...     "words", num_embeddings=100, embedding_dim=4, optimizer=shardemb.optim.SGD(lr=0.5)
    ... )
    >>> words = shardemb.torch.Embedding(table)
    >>> optimizer = shardemb.torch.Optimizer(words)
    >>> loader = torch.utils.data.DataLoader(torch.arange(100), batch_size=25)
    >>> for batch in shardemb.torch.prefetching(loader, words):
    ...     words(batch).sum().backward()
    ...     optimizer.step()
    >>> table.step
    4
    >>> commit = store.commit(step=4)
    >>> store.close()
    """
    return Prefetching(loader, Reader(model, ids, depth))


class Prefetching(Generic[Batch]):
    """The batches of a loader, whose rows are read ahead; made by `prefetching`."""

    def __init__(self, loader: Iterable[Batch], reader: Reader) -> None:
        self.loader, self._reader = loader, reader
        self._current: _Ahead[Batch] | None = None

    def __len__(self) -> int:
        """Return the length of the loader."""
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        """Begin as the loader does; what is an iterator itself goes on, with what was read ahead of it."""
        source = iter(self.loader)
        if source is not self.loader or self._current is None:
            state_of = getattr(self.loader, "state_dict", None)
            self._current = _Ahead(self._reader, source, state_of)
        return self._current

    def state_dict(self) -> Any:  # noqa: ANN401
        """Return the state of the loader as it was when the last batch that was yielded had been taken from it.

        Raises
        ------
        TypeError
            The loader has no state.
        """
        if self._current is not None and self._current.is_amid:
            return copy.deepcopy(self._current.state)
        return self._stateful("state_dict")()

    def load_state_dict(self, state: Any) -> None:  # noqa: ANN401
        """Give a state to the loader, from which the next loop goes on.

        Raises
        ------
        TypeError
            The loader has no state.
        """
        self._stateful("load_state_dict")(state)
        self._current = None  # what it read ahead is of another place

    def _stateful(self, name: str) -> Any:  # noqa: ANN401
        method = getattr(self.loader, name, None)
        if method is None:
            kind = type(self.loader).__name__
            msg = f"a {kind} has no {name}(), so its place cannot be kept: use torchdata's StatefulDataLoader"
            raise TypeError(msg)
        return method


@dataclass
class _Waiting:
    """What the loader gave: a batch, and its state then; or an error, its own or that of the ids of the batch."""

    batch: Any = None
    state: Any = None
    error: Exception | None = None


class _Ahead(Iterator[Batch]):
    """The batches of one iterator, some of which wait here.

    The iterator is not kept alive by what waits of it: `Pipeline` forgets this once nobody else holds the iterator.
    """

    def __init__(
        self,
        reader: Reader,
        source: Iterator[Batch] | None = None,
        state_of: Callable[[], Any] | None = None,
    ) -> None:
        self._reader, self._source, self._state_of = reader, source, state_of
        self._waiting: deque[_Waiting] = deque()
        self._ended = False
        self.state: Any = None
        self.is_amid = False
        """Whether `state` is that of the batch which was yielded last, and the iterator has not come to its end."""

    def __next__(self) -> Batch:
        assert self._source is not None
        return self.after(self._source)

    def after(self, source: Iterator[Batch]) -> Batch:
        """Return the next batch, after taking others from the iterator."""
        self._fill(source)
        if not self._waiting:
            self.is_amid = False
            raise StopIteration
        given = self._waiting.popleft()
        if given.error is not None:
            try:
                raise given.error
            finally:
                del given  # the error refers to this frame, and so to itself
        self.state, self.is_amid = given.state, self._state_of is not None
        batch: Batch = given.batch
        return batch

    def _fill(self, source: Iterator[Batch]) -> None:
        while not self._ended and len(self._waiting) <= self._reader.depth:
            if self._waiting and self._waiting[-1].error is not None:
                return  # a loop may end by it, or go on after it
            try:
                self._waiting.append(self._take(source))
            except StopIteration:
                self._ended = True

    def _take(self, source: Iterator[Batch]) -> _Waiting:
        try:
            given = _Waiting(next(source))
            if self._state_of is not None:
                # A copy: a loader may go on with the state that it has shown.
                given.state = copy.deepcopy(self._state_of())
            self._reader.read_ahead(given.batch)
        except StopIteration:
            raise
        except Exception as error:  # raised again in the place of the batch
            return _Waiting(error=error)
        return given


# ---- which rows a batch will look up --------------------------------------------------------------------------


class Reader:
    """Reads ahead the rows that the next `depth` batches will look up."""

    def __init__(self, model: torch.nn.Module, ids: Ids | None, depth: int) -> None:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            msg = f"depth is the number of batches whose rows are read ahead, at least 1, got {depth!r}"
            raise ValueError(msg)
        self.depth, self._model, self._ids = depth, model, ids
        self._named: dict[str, Any] = {}
        for name, module in model.named_modules():
            if isinstance(module, TableModule):
                self._named |= {
                    feature or _bare(name): each for feature, each in module.named_tables().items()
                }
        self._tables = list({id(each): each for each in self._named.values()}.values())
        self._read_only = False
        if not self._tables:
            msg = (
                f"prefetching: the model, a {type(model).__name__}, has no tables, so there is nothing to read ahead; "
                f"pass the model that has the modules of shardemb.torch"
            )
            raise TypeError(msg)

    def read_ahead(self, batch: object) -> None:
        """Start to read the rows of a batch."""
        changes = self._model.training and torch.is_grad_enabled() and not self._read_only
        for table, ids in self._wanted(batch):
            with contextlib.suppress(ShardEmbError):  # the lookup meets it again, at its time
                try:
                    table.prefetch(ids, for_update=changes)
                except ReadOnlyError:
                    self._read_only = True
                    table.prefetch(ids)

    def _wanted(self, batch: object) -> list[tuple[Any, Any]]:
        if self._ids is not None:
            return [(self._table(key), _as_ids(ids)) for key, ids in self._ids(batch).items()]
        parts = _parts(batch)
        found = [(self._named[name], _as_ids(ids)) for each in parts for name, ids in self._by_name(each)]
        if not found and len(self._tables) == 1:
            tensors = [each for each in parts if isinstance(each, torch.Tensor) and _are_integers(each)]
            found = [(self._tables[0], _as_ids(ids)) for ids in tensors[:1]]
        if not found:
            msg = (
                f"prefetching does not know which rows a batch of type {type(batch).__name__} looks up in the tables "
                f"of the model, where it knows the names {sorted(filter(None, self._named))}: pass "
                f"ids=lambda batch: {{module: ids}}, with the ids for each module or table"
            )
            raise TypeError(msg)
        return found

    def _by_name(self, part: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
        if isinstance(part, Mapping):
            yield from ((name, ids) for name, ids in part.items() if name in self._named)
        elif _is_keyed_jagged(part):
            names, lengths = list(part.keys()), part.lengths()
            counts = lengths.reshape(len(names), -1).sum(1).tolist() if names else []
            for name, ids in zip(names, torch.split(part.values(), counts), strict=True):
                if name in self._named:
                    yield name, ids

    def _table(self, key: Any) -> Any:  # noqa: ANN401
        if isinstance(key, str) and key in self._named:
            return self._named[key]
        found = key.named_tables().get("") if isinstance(key, TableModule) else key
        if not hasattr(found, "prefetch"):
            msg = (
                f"prefetching: ids returned {key!r:.80} as a key, which is no table, no module of one table, and none "
                f"of the names {sorted(filter(None, self._named))}"
            )
            raise TypeError(msg)
        return found


def _bare(name: str) -> str:
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _parts(batch: Any) -> list[Any]:  # noqa: ANN401
    """Return a batch, and what it is made of: items of a tuple or list, fields of an object, mappings in a mapping."""
    if isinstance(batch, torch.Tensor) or _is_keyed_jagged(batch):
        return [batch]
    if isinstance(batch, Mapping):
        inner = [each for each in batch.values() if isinstance(each, Mapping) or _is_keyed_jagged(each)]
        return [batch, *inner]
    if isinstance(batch, Sequence) and not isinstance(batch, str | bytes):
        return list(batch)
    return list(vars(batch).values()) if hasattr(batch, "__dict__") else [batch]


def _is_keyed_jagged(part: object) -> bool:
    return all(callable(getattr(part, name, None)) for name in ("keys", "values", "lengths"))


def _are_integers(tensor: torch.Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype is torch.bool)


def _as_ids(given: Any) -> Any:  # noqa: ANN401
    """Return ids as tables take them. Of bags, or of what is jagged, they are the values."""
    if isinstance(given, torch.Tensor):
        return array_of_ids(given)
    if isinstance(given, tuple) and given and isinstance(given[0], torch.Tensor):
        return array_of_ids(given[0])  # ids and offsets
    if callable(getattr(given, "values", None)):
        return array_of_ids(given.values())
    return getattr(given, "ids", given)


# ---- the loop itself ------------------------------------------------------------------------------------------


class Pipeline:
    """A training loop whose batches are read ahead, of the shape of TorchRec's pipelines.

    Parameters
    ----------
    model : torch.nn.Module
        Called with a batch, it returns ``(losses, output)``, unless `loss` says otherwise.
    optimizer : torch.optim.Optimizer or sequence of them
        Whose steps are taken: that of the rows, `shardemb.torch.Optimizer`, and those of the dense part.
    loader : iterable, optional
        Where `progress` takes batches from if it is not given an iterator.
    depth : int
        As for `prefetching`.
    loss : callable, optional
        ``loss(model, batch)`` returns ``(losses, output)`` in the place of the model; for evaluation, `losses` may be
        None.
    ids : callable, optional
        As for `prefetching`.

    Raises
    ------
    TypeError, ValueError
        As for `prefetching`.

    Examples
    --------
    >>> import torch
    >>> import shardemb.torch
    >>> store = shardemb.open(tmp / "piped.zarr")
    >>> table = store.create_table(
    ...     "words", num_embeddings=100, embedding_dim=4, optimizer=shardemb.optim.SGD(lr=0.5)
    ... )
    >>> words = shardemb.torch.Embedding(table)
    >>> def squares(model, batch):
    ...     rows = model(batch)
    ...     return (rows**2).sum(), rows
    >>> loader = torch.utils.data.DataLoader(torch.arange(100), batch_size=25)
    >>> pipeline = shardemb.torch.Pipeline(words, shardemb.torch.Optimizer(words), loader, loss=squares)
    >>> pipeline.progress().shape
    torch.Size([25, 4])
    >>> table.step
    1
    >>> batches = iter([torch.tensor([1, 2]), torch.tensor([2, 3])])
    >>> pipeline.progress(batches).shape
    torch.Size([2, 4])
    >>> commit = store.commit(step=table.step)
    >>> store.close()
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        loader: Iterable[Any] | None = None,
        depth: int = 2,
        *,
        loss: Loss | None = None,
        ids: Ids | None = None,
    ) -> None:
        self._model, self._loss, self._loader = model, loss, loader
        self._optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
        self._reader = Reader(model, ids, depth)
        self._ahead: WeakKeyDictionary[Any, _Ahead[Any]] = WeakKeyDictionary()
        self._kept: dict[int, tuple[Any, _Ahead[Any]]] = {}
        self._own: Iterator[Any] | None = None

    def progress(self, iterator: Iterator[Any] | None = None) -> Any:  # noqa: ANN401
        """Take a step with the next batch: forward, backward, and the steps of the optimizers.

        If the model is not in training mode, only forward.

        Parameters
        ----------
        iterator : iterator, optional
            Where batches come from, for this call and those that read ahead. Several iterators may take turns, such as
            one for training and one for evaluation. By default an iterator of the loader; after its end, the next call
            begins another.

        Returns
        -------
        output
            What the model, or `loss`, returned as its output.

        Raises
        ------
        StopIteration
            There are no more batches.
        TypeError
            There is neither an iterator nor a loader; the iterator is none; or what was returned is no pair.
        Exception
            Whatever loader, model and optimizers raise.

        Notes
        -----
        Not for several threads at once. As in TorchRec's pipelines, the loss of a step is the sum of `losses`.
        """
        batch = self._next(iterator)
        training = self._model.training
        if training:
            for each in self._optimizers:
                each.zero_grad()
        returned = self._model(batch) if self._loss is None else self._loss(self._model, batch)
        if not isinstance(returned, tuple) or len(returned) != 2:
            msg = (
                f"Pipeline: a step returns (losses, output), got a {type(returned).__name__}: let the model return "
                f"both, or pass loss=lambda model, batch: (losses, output)"
            )
            raise TypeError(msg)
        losses, output = returned
        if training:
            torch.sum(losses).backward()  # type: ignore[no-untyped-call]
            for each in self._optimizers:
                each.step()
        return output

    def _next(self, iterator: Iterator[Any] | None) -> Any:  # noqa: ANN401
        source: Any = self._begun() if iterator is None else iterator
        if not isinstance(source, Iterator):
            msg = f"Pipeline: progress takes an iterator, such as iter(loader), got a {type(source).__name__}"
            raise TypeError(msg)
        try:
            return self._queue(source).after(source)
        except StopIteration:
            self._kept.pop(id(source), None)
            if source is self._own:
                self._own = None
            raise

    def _begun(self) -> Iterator[Any]:
        if self._own is None:
            if self._loader is None:
                msg = "Pipeline: pass a loader when you make it, or an iterator to progress"
                raise TypeError(msg)
            self._own = iter(self._loader)
        return self._own

    def _queue(self, source: Iterator[Any]) -> _Ahead[Any]:
        """Return what was read ahead of an iterator; forget it with the iterator, or at its end."""
        if id(source) in self._kept:
            return self._kept[id(source)][1]
        try:
            return self._ahead.setdefault(source, _Ahead(self._reader))
        except TypeError:  # that of a list cannot be referred to weakly
            return self._kept.setdefault(id(source), (source, _Ahead(self._reader)))[1]
