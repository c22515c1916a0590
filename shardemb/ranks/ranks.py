"""`Ranks`: a store that one process owns and all processes of a group use, as if each had it."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from shardemb.bags import Bags
from shardemb.errors import ShardEmbError, StoreClosedError, TableNotFoundError
from shardemb.ranks import calls
from shardemb.ranks.calls import Call, Facts
from shardemb.ranks.tables import RankKeyedTable, RankTable, part_of
from shardemb.ranks.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from shardemb.format.manifest import Commit
    from shardemb.ranks.parts import Part

_MINUTES_30 = 1800.0


@dataclass(frozen=True)
class _Request:
    """What a rank sends: a call with its parts, or why it could not make one."""

    call: Call | None
    parts: dict[str, Part] = field(default_factory=dict)
    error: Exception | None = None


@dataclass(frozen=True)
class StoreFacts:
    """What every rank knows of the store; see `Store`."""

    path: Path
    uuid: str
    last_commit: Commit | None
    has_changes: bool


@dataclass(frozen=True)
class _Answer:
    """What a rank gets: a result or an error, and what has changed of what it knows."""

    result: Any = None
    error: Exception | None = None
    facts: dict[str, Facts] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    store: StoreFacts | None = None


class Ranks(Mapping[str, RankTable]):
    """A store that one rank of a process group owns and all of them use.

    ``ranks["name"]`` is a table on every rank, for the modules and the optimizer of `shardemb.torch`. All ranks make
    the same calls in the same order, as with `torch.distributed` itself. In each call, the owner gets the ids and
    gradients of all ranks, in the order of their numbers, makes one call of its store, and sends each rank its rows. So
    a step of all ranks is one step of the optimizer and, if it is asked for, one commit, and gives what a single
    process gives with the batches one after the other. The dense part of the model is not touched: wrap the model into
    `DistributedDataParallel` as ever, which sees no parameters here.

    Parameters
    ----------
    store : Store, optional
        The store, on its owner; None on the other ranks.
    group : ProcessGroup, optional
        Whose ranks these are; of a backend for memory of the CPU, such as gloo. By default a new one of gloo with all
        ranks.
    owner : int
        Rank in the group that has the store.
    reduce : {"mean", "sum"}
        Whether the gradients of the ranks are divided by the number of ranks, as `DistributedDataParallel` divides
        those of the dense part, or added up as they are.
    timeout : float
        Seconds after which a rank that does not answer counts as lost.

    Raises
    ------
    RuntimeError
        `torch.distributed` is not initialised.
    TypeError, ValueError
        `owner`, `reduce` or `timeout` is invalid, or not the same on all ranks; the owner has no store, or another rank
        has one.
    ShardEmbError
        A rank did not answer in time, or has ended.

    Notes
    -----
    One thread at a time. An error of a call is raised on all ranks, and nothing was changed; a rank that ends or that
    does not answer within `timeout` lets the others raise a `ShardEmbError`, after which all have to be started again.

    Whatever all ranks have to pass alike, such as a mode, is compared. Metadata of commits is that of the owner.

    Modules with ``max_norm`` write rows only when some are too long, which need not be so on all ranks: they are for
    one process.

    Examples
    --------
    In a program that ``torchrun`` starts, each process runs this; here, there is one:

    >>> import torch
    >>> import torch.distributed as dist
    >>> import shardemb.torch
    >>> dist.init_process_group("gloo", init_method=f"file://{tmp}/meeting", rank=0, world_size=1)
    >>> store = shardemb.open(tmp / "shared.zarr") if dist.get_rank() == 0 else None
    >>> if store is not None:
    ...     table = store.create_table(
    ...         "words", num_embeddings=100, embedding_dim=4, optimizer=shardemb.optim.SGD(lr=0.5)
    ...     )
    >>> with shardemb.torch.Ranks(store) as ranks:
    ...     words = shardemb.torch.Embedding(ranks["words"])
    ...     optimizer = shardemb.torch.Optimizer(words)
    ...     words(torch.tensor([1, 2])).sum().backward()
    ...     optimizer.step()
    ...     ranks.commit(step=1)
    Commit(id=1, step=1, metadata={})
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        store: Any = None,  # noqa: ANN401
        group: dist.ProcessGroup | None = None,
        *,
        owner: int = 0,
        reduce: Literal["mean", "sum"] = "mean",
        timeout: float = _MINUTES_30,
    ) -> None:
        if not dist.is_initialized():
            msg = (
                "Ranks needs torch.distributed: call torch.distributed.init_process_group() first and start the "
                "program with torchrun, or use the store itself in a single process"
            )
            raise RuntimeError(msg)
        self._made = dist.new_group(backend="gloo") if group is None else None
        self._transport = Transport(group or self._made, owner, timeout)  # type: ignore[arg-type]
        self._store, self._averaged = store, reduce == "mean"
        self._facts: dict[str, Facts] = {}
        self._told: dict[str, Facts] = {}
        self._known: StoreFacts | None = None
        self._closed = False
        self._call(_Begin(owner, reduce), lambda: self._checked(store, owner, reduce))

    def _checked(self, store: object, owner: int, reduce: str) -> dict[str, Part]:
        transport = self._transport
        if reduce not in ("mean", "sum"):
            msg = f'reduce must be "mean" or "sum", got {reduce!r}'
            raise ValueError(msg)
        if (store is not None) != self.is_owner:
            have = "has one" if store is not None else "has none"
            msg = (
                f"the store belongs to rank {owner} alone, but rank {transport.rank} {have}: pass the store there and "
                f"None elsewhere"
            )
            raise ValueError(msg)
        return {}

    # ---- what it is

    @property
    def is_owner(self) -> bool:
        """Whether this rank has the store."""
        return self._transport.rank == self._transport.owner

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return self._transport.rank

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._transport.size

    @property
    def last_commit(self) -> Commit | None:
        """The last commit, as of the last call."""
        return None if self._known is None else self._known.last_commit

    @property
    def has_changes(self) -> bool:
        """Whether there are changes since, as of the last call; see `Store.has_changes`."""
        return self._known is not None and self._known.has_changes

    @property
    def path(self) -> Path | None:
        """The store's folder, on the machine of its owner."""
        return None if self._known is None else self._known.path

    @property
    def uuid(self) -> str | None:
        """Identity of the store."""
        return None if self._known is None else self._known.uuid

    def facts(self, name: str) -> Facts:
        """Return what this rank knows of a table, as of the last call.

        Raises
        ------
        TableNotFoundError
            The store had no such table then.
        """
        if name not in self._facts:
            known = ", ".join(map(repr, self._facts)) or "none"
            msg = f"the store has no table {name!r}, only {known}; after it was created, call refresh() on all ranks"
            raise TableNotFoundError(msg)
        return self._facts[name]

    def __getitem__(self, name: str) -> RankTable:
        return (RankKeyedTable if self.facts(name).is_keyed else RankTable)(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._facts))

    def __len__(self) -> int:
        return len(self._facts)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    # ---- calls of all ranks

    def lookup(
        self,
        ids: Mapping[str, Any],
        *,
        missing: Any = "error",  # noqa: ANN401
        create: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """See `Store.lookup`."""
        return self._named(calls.Lookup(missing, create), ids)

    def lookup_bag(
        self,
        bags: Mapping[str, Any],
        *,
        missing: Any = "error",  # noqa: ANN401
        create: bool = False,
    ) -> dict[str, NDArray[Any]]:
        """See `Store.lookup_bag`."""
        return self._named(
            calls.Lookup(missing, create), {name: _as_bags(each) for name, each in bags.items()}
        )

    def update(
        self,
        batches: Mapping[str, tuple[Any, Any]],
        *,
        missing: Any = "error",  # noqa: ANN401
        create: bool = False,
        max_norm: float | None = None,
        extra_norm_sq: float = 0.0,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """See `Store.update`; the gradients are reduced over the ranks first, and the norm is that of the result."""
        call = calls.Update(
            self._averaged, missing, create, False, max_norm, extra_norm_sq, scale, check_finite
        )
        norm: float | None = self.call(call, batches)
        return norm

    def update_bag(
        self,
        batches: Mapping[str, tuple[Any, ...]],
        *,
        missing: Any = "error",  # noqa: ANN401
        create: bool = False,
        scale_grad_by_freq: bool = False,
        max_norm: float | None = None,
        extra_norm_sq: float = 0.0,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """See `Store.update_bag`; the gradients are reduced over the ranks first."""
        call = calls.Update(
            self._averaged, missing, create, scale_grad_by_freq, max_norm, extra_norm_sq, scale, check_finite
        )
        given = {name: (_as_bags(each[:-1]), each[-1]) for name, each in batches.items()}
        norm: float | None = self.call(call, given)
        return norm

    def gradient_norm(self, batches: Mapping[str, tuple[Any, Any]], *, missing: Any = "error") -> float:  # noqa: ANN401
        """See `Store.gradient_norm`; the gradients are reduced over the ranks first."""
        norm: float = self.call(calls.GradientNorm(self._averaged, missing), batches)
        return norm

    def commit(self, step: int | None = None, metadata: Mapping[str, Any] | None = None) -> Commit:
        """See `Store.commit`: one commit of the owner, whose metadata counts; it is returned on all ranks."""
        made: Commit = self.call(calls.MakeCommit(step, metadata if self.is_owner else None), {})
        return made

    def rollback(self) -> None:
        """See `Store.rollback`."""
        self.call(calls.Rollback(), {})

    def refresh(self) -> None:
        """Tell all ranks which tables the store has now, after the owner has created or dropped some."""
        self.call(calls.Refresh(), {})

    def close(self) -> None:
        """Close the store; further calls are refused. The process group is left to whoever made it."""
        if self._closed:
            return
        try:
            self.call(calls.Close(), {})
        finally:
            self._end()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the store; after an error only here, as the other ranks may be anywhere."""
        if error is None:
            self.close()
            return
        with contextlib.suppress(ShardEmbError):
            self._end()
        if self._store is not None:
            self._store.__exit__(kind, error, traceback)

    def _end(self) -> None:
        self._closed = True
        self._transport.close()
        if self._made is not None:
            dist.destroy_process_group(self._made)
            self._made = None

    # ---- how a call is made

    def call(self, call: Call, given: Mapping[str, tuple[Any, Any]]) -> Any:  # noqa: ANN401
        """Make a call with all other ranks; `given` has for each table ids or bags, and gradients or None.

        Raises
        ------
        Exception
            Whatever a rank, or the owner's store, raises: on all ranks.
        """
        return self._call(call, lambda: self._parts(given))

    def tell(self, call: Call, given: Mapping[str, tuple[Any, Any]]) -> None:
        """Make a call that has no answer, with all other ranks. What it raises is raised on the owner."""
        self._require_open()
        request = self._request(call, lambda: self._parts(given))
        if not self.is_owner:
            self._transport.tell(request)
            return
        self._carry_out(self._transport.requests(request))

    def _call(self, call: Call, parts: Callable[[], dict[str, Part]]) -> Any:  # noqa: ANN401
        self._require_open()
        request = self._request(call, parts)
        transport = self._transport
        answer: _Answer
        answer = self._serve(transport.requests(request)) if self.is_owner else transport.ask(request)
        self._facts = {
            name: each for name, each in (self._facts | answer.facts).items() if name not in answer.dropped
        }
        if answer.error is not None:
            raise answer.error
        self._known = answer.store or self._known
        return answer.result

    def _parts(self, given: Mapping[str, tuple[Any, Any]]) -> dict[str, Part]:
        return {name: part_of(self.facts(name), ids, grads) for name, (ids, grads) in given.items()}

    def _named(self, call: Call, given: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = self.call(call, {name: (each, None) for name, each in given.items()})
        return found

    @staticmethod
    def _request(call: Call, parts: Callable[[], dict[str, Part]]) -> _Request:
        try:
            return _Request(call, parts())
        except Exception as error:  # the others wait for this rank, so they have to know
            return _Request(call, error=_portable(error))

    def _require_open(self) -> None:
        if self._closed:
            msg = "these ranks are closed; make Ranks again, on all of them"
            raise StoreClosedError(msg)

    # ---- on the owner

    def _serve(self, requests: Sequence[_Request]) -> _Answer:
        """Carry out a call for all ranks, and answer them, whatever happens."""
        try:
            results = self._carry_out(requests)
        except Exception as error:
            answer = self._told_now(error=_portable(error))
            self._transport.answer([answer] * self._transport.size)
            return _Answer(error=error, facts=answer.facts, dropped=answer.dropped)
        except BaseException as error:  # Ctrl-C, which is meant for this rank, but ends the others' call too
            interrupted = ShardEmbError(
                f"the rank that owns the store was interrupted ({type(error).__name__})"
            )
            self._transport.answer([_Answer(error=interrupted)] * self._transport.size)
            raise
        now = self._told_now()
        answers = [_Answer(each, None, now.facts, now.dropped, now.store) for each in results]
        self._transport.answer(answers)
        return answers[self._transport.rank]

    def _carry_out(self, requests: Sequence[_Request]) -> list[Any]:
        for rank, each in enumerate(requests):
            if each.error is not None:
                if rank != self.rank:
                    each.error.add_note(f"raised on rank {rank}")
                raise each.error
        first = requests[0].call
        for rank, each in enumerate(requests):
            if each.call != first:
                msg = (
                    f"rank {rank} called {_said(each.call)} while rank 0 called {_said(first)}: all ranks have to make "
                    f"the same calls in the same order, with the same options"
                )
                raise ShardEmbError(msg)
        assert first is not None
        return first.carry_out(self._store, [each.parts for each in requests])

    def _told_now(self, error: Exception | None = None) -> _Answer:
        """Return what the ranks do not know yet of the tables."""
        store = self._store
        try:
            now = {name: Facts.of(table) for name, table in store.items()}
            known = StoreFacts(store.path, store.uuid, store.last_commit, store.has_changes)
        except (ShardEmbError, AttributeError):  # it is closed, or there is none
            return _Answer(error=error)
        changed = {name: each for name, each in now.items() if self._told.get(name) != each}
        dropped = tuple(self._told.keys() - now.keys())
        self._told = now
        return _Answer(None, error, changed, dropped, known)


@dataclass(frozen=True)
class _Begin(Call):
    """The first call: whether the ranks agree."""

    owner: int
    reduce: str

    @property
    def name(self) -> str:
        """See `Call`."""
        return "Ranks"

    def carry_out(self, store: Any, parts: calls.Parts) -> calls.Results:  # noqa: ANN401
        """See `Call`."""
        return [None] * len(parts)


def _said(call: Call | None) -> str:
    return "nothing" if call is None else str(call)


def _as_bags(given: Any) -> Bags:  # noqa: ANN401
    """Return bags as they may be given to a store: as `Bags`, a tuple of ids and offsets, or ids of two dimensions."""
    if isinstance(given, Bags):
        return given
    if not isinstance(given, tuple):
        return Bags(given)
    return given[0] if len(given) == 1 and isinstance(given[0], Bags) else Bags(*given[:2])


def _portable(error: Exception) -> Exception:
    """Return an error as it can be sent: itself, or one that says the same."""
    try:
        return error if type(pickle.loads(pickle.dumps(error))) is type(error) else _stand_in(error)
    except Exception:  # errors may have any arguments
        return _stand_in(error)


def _stand_in(error: Exception) -> ShardEmbError:
    return ShardEmbError(f"{type(error).__name__}: {error}")
