"""How a process that uses a distributed store speaks with the owners of its partitions, within one era."""

from __future__ import annotations

import threading
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.distributed.owner import Ask, Make, Query, RefusedError
from shardemb.distributed.routing import Route
from shardemb.distributed.transport import Call, UnreachableError, Wire
from shardemb.errors import EraEndedError, OwnerLostError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from shardemb.distributed.owner import Era
    from shardemb.distributed.transport import Answer
    from shardemb.distributed.work import Change, Question, Read, TableFacts

_NO_ROWS = np.empty(0, np.int64)


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
        Seconds that a call may take.
    last : str
        Which commit the era began at, for messages.
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


@dataclass
class Link:
    """One process's side of an era. Changes are made one at a time, in the same order at all owners.

    Attributes
    ----------
    members : Members
    wire : Wire
    tables : dict of str to TableFacts
    trainer : str
        Names this process among those that make changes. It is never used in two eras.
    ended : str or None
        Why nothing more can be done in this era, once that is known.
    """

    members: Members
    wire: Wire
    tables: dict[str, TableFacts]
    trainer: str = field(default_factory=lambda: str(uuid.uuid4()))
    ended: str | None = None

    def __post_init__(self) -> None:
        self._lock, self._sequence = threading.Lock(), 0

    def read(self, what: Read, ids: NDArray[np.int64]) -> NDArray[Any]:
        """Return what a read gives for rows of a whole table, in their order.

        Raises
        ------
        OwnerLostError, EraEndedError
            The first call that notices names what happened.
        ShardEmbError, ValueError, OSError
            What an owner raises.
        """
        route = Route.of(ids, self.members.parts)
        asked = {
            address: parts
            for address, parts in self.members.owned().items()
            if sum(route.counts(parts)) or not ids.size
        }
        if not ids.size:  # one tells the shape and the dtype
            asked = dict([next(iter(asked.items()))])
        calls = {
            address: Call(
                Ask(self.members.head, self.members.era, parts, tuple(route.counts(parts)), what),
                [route.rows[route.positions(parts)]],
            )
            for address, parts in asked.items()
        }
        answers = self._call(calls)
        return route.gathered({parts: answers[address].arrays[0] for address, parts in asked.items()})

    def change(self, what: Change, ids: NDArray[np.int64] = _NO_ROWS, values: NDArray[Any] | None = None) -> None:
        """Make a change at all owners.

        Raises
        ------
        OwnerLostError, EraEndedError
            As `read`. It may have been made in some partitions: the era is over.
        """
        members = self.members
        with self._lock:
            self._sequence += 1
            route = Route.of(ids, members.parts)
            calls = {}
            for address, parts in members.owned().items():
                places = route.positions(parts)
                request = Make(
                    members.head, members.era, self.trainer, self._sequence, parts, tuple(route.counts(parts)), what
                )
                arrays = [route.rows[places]]
                if values is not None:
                    arrays.append(values[route.order[places]])
                calls[address] = Call(request, arrays)
            try:
                self._call(calls)
            except AllRefusedError as refused:
                raise refused.why from None
            except BaseException as error:
                self.ended = self.ended or f"a change was not made everywhere ({type(error).__name__}: {error})"
                raise

    def ask(self, what: Question, parts: Iterable[int] | None = None) -> dict[int, Any]:
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

    def ask_owners(self, request: Any) -> dict[str, Any]:  # noqa: ANN401
        """Send one request of ``owner`` to all owners; return their results by address."""
        calls = {address: Call(request) for address in self.members.owned()}
        return {address: answer.result for address, answer in self._call(calls).items()}

    def _call(self, calls: dict[str, Call]) -> dict[str, Answer]:
        if self.ended is not None:
            raise EraEndedError(self._over(self.ended))
        answers, errors = self.wire.call(calls, self.members.deadline_s)
        for address, error in errors.items():
            if isinstance(error, UnreachableError):
                self.ended = f"the owner at {address} was lost"
                raise OwnerLostError(self._lost(address, error)) from error
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

    def _lost(self, address: str, error: Exception) -> str:
        parts = ", ".join(map(str, self.members.owned()[address]))
        return (
            f"{error}: it has the partitions {parts} of the store {self.members.path}. Nothing was committed since "
            f"{self.members.last}; go on from there, once the process is back"
        )

    def _over(self, why: str) -> str:
        return (
            f"the store {self.members.path} is no more as this handle knows it: {why}. Go on from its last commit, with "
            f"a new handle"
        )
