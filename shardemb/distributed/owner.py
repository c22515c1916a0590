"""An owner: the process that has partitions open, as a plugin of a worker of dask.distributed.

Calls come in as messages of the worker's own server. They are carried out in a thread that each store has here, never
in the event loop, one after the other. The rules (P1 and so on) are those of docs/explanation/partitions.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from distributed.diagnostics.plugin import WorkerPlugin

from shardemb.distributed import transport
from shardemb.errors import EraEndedError, PartitionError, ShardEmbError, StoreExistsError, StoreNotFoundError
from shardemb.format.manifest import PartitionIdentity
from shardemb.store.partition import Partition

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import distributed
    from numpy.typing import NDArray

    from shardemb.distributed.work import Change, Question, Read
    from shardemb.store.partition import Decided, PartitionStatus

Era: TypeAlias = tuple[int, str, int]
"""Openings of the head before, the coordinator's id, and its count of eras."""

Cut: TypeAlias = tuple[tuple[str, int], ...]
"""The trainers of an era, and the number of the last change of each."""

WAIT_S = 0.005
"""Pause of a change that waits for a decision."""


# ---- what an owner is asked


@dataclass(frozen=True)
class Hold:
    """Hold partitions, and obey this coordinator from now on (C1). Those that are to be created may be missing."""

    head: str
    coordinator: tuple[int, str]
    places: Mapping[int, str]
    count: int
    may_create: bool


@dataclass(frozen=True)
class Begin:
    """Be at this decided attempt, and begin an era (E2)."""

    head: str
    era: Era
    decided: Decided


@dataclass(frozen=True)
class Prepare:
    """Make everything durable that was changed, and vote (P1)."""

    head: str
    era: Era
    decided: Decided
    cut: Cut
    step: int | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Decide:
    """What was prepared as this attempt is committed (P4)."""

    head: str
    era: Era
    decided: Decided


@dataclass(frozen=True)
class GetCut:
    """Say which changes are part of the partitions."""

    head: str
    era: Era


@dataclass(frozen=True)
class Ask:
    """Read rows; `counts` says how many of them each partition has."""

    head: str
    era: Era
    parts: tuple[int, ...]
    counts: tuple[int, ...]
    what: Read


@dataclass(frozen=True)
class Make:
    """Make a change, once, however often it is sent (E4)."""

    head: str
    era: Era
    trainer: str
    sequence: int
    parts: tuple[int, ...]
    counts: tuple[int, ...]
    what: Change


@dataclass(frozen=True)
class Query:
    """Ask partitions about themselves."""

    head: str
    era: Era
    parts: tuple[int, ...]
    what: Question


@dataclass(frozen=True)
class Release:
    """Close the partitions of a store, unless another coordinator has claimed them since."""

    head: str
    coordinator: tuple[int, str]


class RefusedError(ShardEmbError):
    """A change was refused, and this owner's partitions are as before.

    Attributes
    ----------
    why : Exception
        What the store of a partition has raised.
    """

    def __init__(self, why: Exception) -> None:
        super().__init__(why)
        self.why = why


class _Undecided(Exception):  # noqa: N818 -- no error: the call waits
    """Something is prepared, so nothing may change until that is decided (P2)."""


# ---- how an owner does it


class Holding:
    """The partitions that this process has of one store, which share a coordinator and an era.

    Parameters
    ----------
    worker : str
        The address of this worker, for messages.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self.thread = ThreadPoolExecutor(1, "shardemb-owner")
        self._partitions: dict[int, Partition] = {}
        self._opened: set[int] = set()
        self._coordinator: tuple[int, str] | None = None
        self._era: Era | None = None
        self._applied: dict[str, int] = {}
        self._prepared: Decided | None = None

    # ---- coordinators and eras

    def hold(self, asked: Hold) -> dict[int, PartitionStatus]:
        """Hold partitions, and return what they have."""
        if self._coordinator is not None and asked.coordinator < self._coordinator:
            msg = "another process has opened the store since; this one can only close it"
            raise EraEndedError(msg)
        if asked.coordinator != self._coordinator:
            self._coordinator, self._era = asked.coordinator, None  # C1: it serves nothing of an older era
        for part in set(self._partitions) - set(asked.places):
            self._opened.discard(part)
            self._partitions.pop(part).close()
        for part, path in asked.places.items():
            if part not in self._partitions:
                self._partitions[part] = self._take(asked, part, path)
        return {part: each.status for part, each in self._partitions.items()}

    def _take(self, asked: Hold, part: int, path: str) -> Partition:
        identity = PartitionIdentity(asked.head, part, asked.count)
        if asked.may_create:
            with contextlib.suppress(StoreExistsError):
                return Partition.create(path, identity)
        try:
            held = Partition.hold(path)
        except StoreNotFoundError as error:
            msg = f"{identity} is missing: there is none at {path} of the worker {self._worker}; bring the folder back"
            raise PartitionError(msg) from error
        if held.identity != identity:  # S1
            held.close()
            msg = f"{path} of the worker {self._worker} is {held.identity}, where {identity} should be"
            raise PartitionError(msg)
        return held

    def begin(self, asked: Begin) -> None:
        """Go to a decided attempt in all partitions, and begin an era there; the same again does nothing (E2)."""
        if asked.era[:2] != self._coordinator or (self._era is not None and asked.era < self._era):
            self._refuse_era()
        if asked.era == self._era:
            return
        self._era = None
        for part in self._partitions:
            self._resolve(part, asked.decided)
        self._era, self._applied, self._prepared = asked.era, {}, None

    def _resolve(self, part: int, decided: Decided) -> None:
        partition = self._partitions[part]
        if part not in self._opened:
            partition.open(decided)
            self._opened.add(part)
            return
        if partition.status.prepared == decided:  # P5: it is this very attempt
            partition.decide()
        elif partition.status.prepared is not None:
            partition.abandon()
        partition.store.rollback()

    # ---- commits

    def cut(self, asked: GetCut) -> Cut:
        """Return the changes that were made in this era."""
        self._require(asked.era)
        return tuple(sorted(self._applied.items()))

    def prepare(self, asked: Prepare) -> None:
        """Vote: return if all partitions have prepared what is asked, raise otherwise (P1)."""
        self._require(asked.era)
        if self._prepared == asked.decided:
            return  # the same again: the same vote
        if self._prepared is not None:
            msg = f"attempt {self._prepared} is not decided yet"
            raise ShardEmbError(msg)
        if asked.cut != tuple(sorted(self._applied.items())):
            msg = "the owners have not applied the same changes: one was made in some partitions only"
            raise EraEndedError(msg)
        self._prepared = asked.decided  # from here on nothing changes, even if this fails half way
        for partition in self._partitions.values():
            partition.prepare(asked.decided, asked.step, asked.metadata)

    def decide(self, asked: Decide) -> None:
        """Count what was prepared as committed."""
        self._require(asked.era)
        if self._prepared == asked.decided:
            for partition in self._partitions.values():
                partition.decide()
            self._prepared = None

    # ---- rows

    def read(self, asked: Ask, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return what a read gives, for the rows of one partition after the other."""
        self._require(asked.era)
        found = [asked.what.read(self._partitions[part], some) for part, some in _cut(asked, rows) if some.size]
        if not found:
            return asked.what.read(self._partitions[asked.parts[0]], rows)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def make(self, asked: Make, rows: NDArray[np.int64], values: NDArray[Any] | None) -> None:
        """Make a change in all partitions, unless it was made before."""
        self._require(asked.era)
        before = self._applied.get(asked.trainer, 0)
        if asked.sequence <= before:
            return
        if asked.sequence != before + 1:
            msg = f"change {asked.sequence} of a process came after {before}: one between them was lost"
            raise EraEndedError(msg)
        if self._prepared is not None:
            raise _Undecided
        self._applied[asked.trainer] = asked.sequence
        parts = zip(_cut(asked, rows), _cut(asked, values), strict=True)
        for number, ((part, some), (_, their)) in enumerate(parts):
            try:
                asked.what.change(self._partitions[part], part, some, their)
            except Exception as error:
                if not number:
                    raise RefusedError(error) from error
                self._era = None  # some partitions have changed, this one has not
                raise

    def query(self, asked: Query) -> dict[int, Any]:
        """Ask partitions about themselves."""
        self._require(asked.era)
        return {part: asked.what.answer(self._partitions[part]) for part in asked.parts}

    # ---- the end

    def release(self, asked: Release) -> bool:
        """Close all partitions, if it is their coordinator that asks; return whether changes were lost."""
        return asked.coordinator == self._coordinator and self.close()

    def close(self) -> bool:
        """Close all partitions; what is prepared stays in doubt. Return whether changes were lost."""
        lost = False
        while self._partitions:
            part, partition = self._partitions.popitem()
            if part in self._opened and partition.status.prepared is None and partition.store.has_changes:
                lost = True
                partition.store.rollback()  # whoever opened the whole is told, and not each partition's standard error
            partition.close()
        self._era = self._coordinator = None
        self._opened.clear()
        return lost

    def _require(self, era: Era) -> None:
        if era != self._era:  # E1
            self._refuse_era()

    def _refuse_era(self) -> None:
        msg = "its owners went back to the last commit, or another process has opened it"
        raise EraEndedError(msg)


def _cut(asked: Ask | Make, values: NDArray[Any] | None) -> Iterator[tuple[int, Any]]:
    """Iterate over partitions, and what is theirs of an array that has it one after the other."""
    start = 0
    for part, count in zip(asked.parts, asked.counts, strict=True):
        yield part, None if values is None else values[start : start + count]
        start += count


class Owner(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """What makes a worker an owner. Registered once for all workers, also those that come later."""

    name = transport.PLUGIN
    idempotent = True

    def setup(self, worker: distributed.Worker) -> None:
        """Listen to calls."""
        self._stores: dict[str, Holding] = {}
        self._under_way: set[str] = set()
        self._address = worker.address
        worker.handlers[transport.CALL] = self.handle
        worker.handlers[transport.IS_UNDER_WAY] = self.is_under_way

    async def teardown(self, worker: distributed.Worker) -> None:
        """Close what is open, as the worker ends."""
        for name in (transport.CALL, transport.IS_UNDER_WAY):
            worker.handlers.pop(name, None)
        for holding in self._stores.values():
            await asyncio.get_running_loop().run_in_executor(holding.thread, holding.close)
            holding.thread.shutdown()

    async def handle(self, number: str, request: bytes, arrays: Sequence[NDArray[Any]]) -> dict[str, Any]:
        """Answer a call."""
        self._under_way.add(number)
        try:
            return await transport.answered(self._answer, request, arrays)
        finally:
            self._under_way.discard(number)

    def is_under_way(self, number: str) -> bool:
        """Return whether a call of this number is being carried out; a sign of life."""
        return number in self._under_way

    async def _answer(self, asked: Any, arrays: Sequence[NDArray[Any]]) -> tuple[Any, list[NDArray[Any]]]:  # noqa: ANN401
        holding = self._stores.setdefault(asked.head, Holding(self._address))
        loop = asyncio.get_running_loop()
        until = time.monotonic() + transport.WAIT_LIMIT_S
        while True:
            try:
                return await loop.run_in_executor(holding.thread, carry_out, holding, asked, arrays)
            except _Undecided:
                if time.monotonic() > until:
                    msg = f"a commit was not decided for {transport.WAIT_LIMIT_S:g} s"
                    raise ShardEmbError(msg) from None
                await asyncio.sleep(WAIT_S)


def carry_out(
    holding: Holding, asked: Any, arrays: Sequence[NDArray[Any]]  # noqa: ANN401
) -> tuple[Any, list[NDArray[Any]]]:
    """Do what is asked; return an object and arrays."""
    if isinstance(asked, Ask):
        return None, [holding.read(asked, arrays[0])]
    if isinstance(asked, Make):
        return holding.make(asked, arrays[0], arrays[1] if len(arrays) > 1 else None), []
    calls: dict[type, Any] = {
        Query: holding.query,
        Hold: holding.hold,
        Begin: holding.begin,
        GetCut: holding.cut,
        Prepare: holding.prepare,
        Decide: holding.decide,
        Release: holding.release,
    }
    return calls[type(asked)](asked), []
