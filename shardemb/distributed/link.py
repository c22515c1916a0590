"""How a process that uses a distributed store speaks with the owners of its partitions, within one era."""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from shardemb.distributed.owner import Ask, Make, Query, RefusedError
from shardemb.distributed.routing import Route
from shardemb.distributed.transport import Call, UnreachableError, Wire
from shardemb.errors import EraEndedError, OwnerLostError
from shardemb.protocol.era import Trainer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.distributed.transport import Answer
    from shardemb.distributed.work import Change, Question, Read, TableFacts
    from shardemb.protocol.messages import Era


_of_tasks: WeakValueDictionary[tuple[Era, str, int], Link] = WeakValueDictionary()
_of_tasks_lock = threading.Lock()


class AllRefusedError(RefusedError):
    """All owners have refused a change, so that they are as before."""


@dataclass(frozen=True)
class Members:
    """Who has what in one era.

    Attributes
    ----------
    head : str
        The uuid of the store.
    path : str
        The folder of the head, for messages.
    era : Era
    addresses : tuple of str
        That of each partition's owner.
    deadline_s : float
        Seconds that a call may take without a sign of life.
    last : str
        Which commit the era is at, for messages.
    """

    head: str
    path: str
    era: Era
    addresses: tuple[str, ...]
    deadline_s: float
    last: str

    @property
    def parts(self) -> int:
        """Number of partitions."""
        return len(self.addresses)

    def owned(self) -> dict[str, tuple[int, ...]]:
        """Return the partitions of each owner, by address."""
        found: dict[str, tuple[int, ...]] = {}
        for part, address in enumerate(self.addresses):
            found[address] = (*found.get(address, ()), part)
        return found


@dataclass(eq=False)
class Link:
    """One process's side of an era. Changes are made one at a time, in the same order at all owners.

    Attributes
    ----------
    members : Members
    wire : Wire
    tables : dict of str to TableFacts
    name : str
        Names whoever makes changes: a task, which has the same name if it runs again, or this process.
    ended : str or None
        Why nothing more can be done in this era, once that is known.
    """

    members: Members
    wire: Wire
    tables: dict[str, TableFacts]
    name: str = field(default_factory=lambda: str(uuid.uuid4()))
    ended: str | None = None

    @staticmethod
    def of_task(members: Members, wire: Wire, tables: dict[str, TableFacts]) -> Link:
        """Return the link of the task that this thread runs: all handles that came to it share one.

        If dask runs the task again, that is another life of the same name: its changes are refused in this era, or
        those of the first run would be made twice (E5).
        """
        if wire.task is None:
            return Link(members, wire, tables)
        key = (members.era, *wire.task)
        with _of_tasks_lock:
            found = _of_tasks.get(key)
            if found is None:
                found = _of_tasks[key] = Link(members, wire, tables, name=f"task {wire.task[0]}")
            return found

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._trainer = Trainer((self.name, str(uuid.uuid4())), self.members.era, self.members.parts)

    def read(self, what: Read, ids: Sequence[Int64Array]) -> list[NDArray[Any]]:
        """Return what a read gives for rows of whole tables, for each of them in their order.

        Raises
        ------
        OwnerLostError, EraEndedError
            The first call that notices names what happened.
        ShardEmbError, ValueError, OSError
            What an owner raises.
        """
        members = self.members
        routes = [Route.of(some, members.parts) for some in ids]
        asked = {
            address: parts
            for address, parts in members.owned().items()
            if any(sum(route.counts(parts)) for route in routes)
        } or dict([next(iter(members.owned().items()))])  # one tells shape and dtype
        calls = {}
        for address, parts in asked.items():
            counts = tuple(tuple(route.counts(parts)) for route in routes)
            rows = [route.rows[route.positions(parts)] for route in routes]
            calls[address] = Call(Ask(members.head, members.era, parts, counts, what), rows)
        answers = self._call(calls)
        return [
            route.gathered({parts: answers[address].arrays[k] for address, parts in asked.items()})
            for k, route in enumerate(routes)
        ]

    def change(self, what: Change, batches: Sequence[tuple[Int64Array, NDArray[Any]]] = ()) -> None:
        """Make a change at all owners, of rows of whole tables with a value for each.

        Raises
        ------
        OwnerLostError, EraEndedError
            As `read`. It may have been made in some partitions: the era is over.
        """
        members = self.members
        with self._lock:
            if self.ended is not None:
                raise EraEndedError(self._over(self.ended))
            change = self._trainer.change(None)
            routes = [Route.of(ids, members.parts) for ids, _ in batches]
            calls = {}
            for address, parts in members.owned().items():
                arrays, counts = [], []
                for route, (_, values) in zip(routes, batches, strict=True):
                    places = route.positions(parts)
                    arrays += [route.rows[places], values[route.order[places]]]
                    counts += [tuple(route.counts(parts))] * 2
                calls[address] = Call(Make(members.head, change, parts, tuple(counts), what), arrays)
            self._make(calls)

    def _make(self, calls: dict[str, Call]) -> None:
        try:
            for answer in self._call(calls).values():
                for applied in answer.result:
                    self._trainer.handle(applied)
        except AllRefusedError as refused:
            self._trainer.take_back()
            raise refused.why from None
        except BaseException as error:
            self.ended = self.ended or f"a change was not made everywhere ({type(error).__name__}: {error})"
            raise

    def ask(self, what: Question | None, parts: Iterable[int] | None = None) -> dict[int, Any]:
        """Return what partitions, by default all, answer to a question."""
        wanted = set(range(self.members.parts) if parts is None else parts)
        calls = {}
        for address, owned in self.members.owned().items():
            some = tuple(part for part in owned if part in wanted)
            if some:
                calls[address] = Call(Query(self.members.head, self.members.era, some, what))
        found: dict[int, Any] = {}
        for answer in self._call(calls).values():
            found |= answer.result
        return dict(sorted(found.items()))

    def _call(self, calls: dict[str, Call]) -> dict[str, Answer]:
        if self.ended is not None:
            raise EraEndedError(self._over(self.ended))
        answers, errors = self.wire.call(calls, self.members.deadline_s)
        for address, error in errors.items():
            if isinstance(error, UnreachableError):
                self.ended = f"the owner at {address} was lost"
                raise OwnerLostError(self.lost(address, error)) from error
        for error in errors.values():
            if isinstance(error, EraEndedError):
                self.ended = str(error)
                raise EraEndedError(self._over(str(error))) from error
        refused = [each.why for each in errors.values() if isinstance(each, RefusedError)]
        if len(refused) == len(calls):
            raise AllRefusedError(refused[0])
        for error in errors.values():
            raise error.why if isinstance(error, RefusedError) else error
        return answers

    def lost(self, address: str, error: object) -> str:
        """Say that an owner is lost, and what follows."""
        parts = ", ".join(map(str, self.members.owned()[address]))
        return (
            f"{error}: it has the partitions {parts} of the store {self.members.path}. Nothing was committed since "
            f"{self.members.last}; go on from there, once the process is back"
        )

    def _over(self, why: str) -> str:
        return (
            f"the store {self.members.path} is no more as this handle knows it: {why}. Go on from its last commit, "
            f"with a new handle"
        )
