"""An owner: the process that has partitions open, as a plugin of a worker of dask.distributed.

Calls come in as messages of the worker's own server. They are carried out in a thread that each store has here, never
in the event loop, one after the other. What is allowed says a machine for each partition, `protocol.era.Owner`; here is
what it cannot do itself: files, threads and arrays.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed.diagnostics.plugin import WorkerPlugin

from shardemb.distributed import clusters, transport
from shardemb.errors import (
    EraEndedError,
    PartitionError,
    PoisonedError,
    ShardEmbError,
    StoreExistsError,
    StoreNotFoundError,
)
from shardemb.format.manifest import PartitionIdentity
from shardemb.protocol import era, messages
from shardemb.store.partition import Partition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import distributed
    from numpy.typing import NDArray

    from shardemb.distributed.work import Change, Question, Read

WAIT_S = 0.005
"""Pause of a change that waits for a decision."""

VERSION = version("shardemb")
"""Processes of one store say the same things only if they have the same version."""


# ---- what an owner is asked


@dataclass(frozen=True)
class Hold:
    """Hold partitions, and say what they have. Those that are to be created may be missing."""

    head: str
    places: Mapping[int, str]
    count: int
    may_create: bool
    version: str = VERSION


@dataclass(frozen=True)
class Tell:
    """Pass a request of the coordinator on to the machines of partitions."""

    head: str
    parts: tuple[int, ...]
    request: messages.Request


@dataclass(frozen=True)
class Ask:
    """Read rows of one table or several; `counts` says for each how many of them each partition has."""

    head: str
    era: messages.Era
    parts: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    what: Read


@dataclass(frozen=True)
class Make:
    """Make a change, once, however often it is sent (E4)."""

    head: str
    change: messages.Change
    parts: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    what: Change


@dataclass(frozen=True)
class Query:
    """Ask partitions about themselves; with no question, which changes they have."""

    head: str
    era: messages.Era
    parts: tuple[int, ...]
    what: Question | None


@dataclass(frozen=True)
class Describe:
    """Say how the allocator of this process was set up."""

    head: str


@dataclass(frozen=True)
class Release:
    """Close the partitions of a store that obey this coordinator."""

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


@dataclass
class Held:
    """One partition that is held here, and what its machine has promised.

    Attributes
    ----------
    path : str
    partition : Partition
    machine : era.Owner
    obeys : (int, str) or None
        The coordinator that has claimed it.
    error : Exception or None
        Why the last preparation failed.
    """

    path: str
    partition: Partition
    machine: era.Owner
    obeys: tuple[int, str] | None = None
    error: Exception | None = field(default=None, repr=False)

    @staticmethod
    def of(path: str, part: int, partition: Partition) -> Held:
        """Begin an incarnation of a partition."""
        there, status = partition.identity, partition.status
        identity = there.head, there.number, there.count
        has = messages.Status(status.decided, status.prepared)
        return Held(path, partition, era.Owner(part, str(uuid.uuid4()), identity, has))

    def handle(
        self, request: messages.Request, act: Callable[[], None] | None = None
    ) -> messages.Answer | None:
        """Carry out what the machine says about a request, and return its answer; `act` changes or reads rows."""
        for effect in self.machine.handle(request):
            match effect:
                case messages.Reply(answer):
                    if isinstance(answer, messages.Claimed):
                        self.obeys = answer.era[:2]
                    return answer
                case messages.Wait():
                    raise _Undecided
                case messages.Apply() | messages.Serve():
                    assert act is not None
                    act()
                case messages.PrepareImages(attempt, step, metadata):
                    try:
                        self.partition.prepare(attempt, step, metadata)
                    except Exception as error:  # the vote is no
                        self.error = error
                        (reply,) = self.machine.fail_to_prepare(f"{type(error).__name__}: {error}")
                        assert isinstance(reply, messages.Reply)
                        return reply.answer
                case _:
                    self._do(effect)
        return None

    def _do(self, effect: messages.OwnerEffect) -> None:
        match effect:
            case messages.Open(decided):
                self.partition.open(decided)
            case messages.Rollback():
                self.partition.store.rollback()
            case messages.DecideImages():
                self.partition.decide()
            case messages.AbandonImages():
                self.partition.abandon()

    def close(self) -> bool:
        """Close the partition; what is prepared stays in doubt. Return whether changes were lost."""
        lost = False
        with contextlib.suppress(PartitionError):  # it was not opened
            lost = self.partition.status.prepared is None and self.partition.store.has_changes
        if lost:
            self.partition.store.rollback()  # whoever opened the whole is told, and not each partition's standard error
        self.partition.close()
        return lost


class Holding:
    """The partitions that this process has of one store.

    Parameters
    ----------
    worker : str
        The address of this worker, for messages.
    """

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self.thread = ThreadPoolExecutor(1, "shardemb-owner")
        self._held: dict[int, Held] = {}

    # ---- the coordinator

    def hold(self, asked: Hold) -> list[messages.Present]:
        """Hold partitions, and return what they have.

        Raises
        ------
        PartitionError
            Who asks has another version of shardemb. Nothing was held.
        """
        if asked.version != VERSION:
            msg = (
                f"the worker {self._worker} has shardemb {VERSION}, and who opens the store has {asked.version}: "
                f"install the same version on all machines"
            )
            raise PartitionError(msg)
        for part, path in asked.places.items():
            if part in self._held and self._held[part].path != path:
                self._held.pop(part).close()
            if part not in self._held:
                self._held[part] = Held.of(path, part, self._take(asked, part, path))
        found = [self._held[part].handle(messages.Who()) for part in asked.places]
        return [each for each in found if isinstance(each, messages.Present)]

    def _take(self, asked: Hold, part: int, path: str) -> Partition:
        identity = PartitionIdentity(asked.head, part, asked.count)
        if asked.may_create:
            with contextlib.suppress(StoreExistsError):
                return Partition.create(path, identity)
        try:
            return Partition.hold(path)
        except StoreNotFoundError as error:
            msg = f"{identity} is missing: there is none at {path} of the worker {self._worker}; bring the folder back"
            raise PartitionError(msg) from error

    def tell(self, asked: Tell) -> list[tuple[messages.Answer, Exception | None]]:
        """Pass a request on to the machines of partitions; return their answers, and why they vote no."""
        return [self._tell(part, asked.request) for part in asked.parts]

    def _tell(self, part: int, request: messages.Request) -> tuple[messages.Answer, Exception | None]:
        held = self._of(part)
        held.error = None
        try:
            answer = held.handle(request)
        except BaseException:  # what it has now is not known: the next opening is another incarnation
            del self._held[part]
            held.partition.close()
            raise
        assert answer is not None
        return answer, held.error

    # ---- rows

    def read(self, asked: Ask, rows: Sequence[NDArray[np.int64]]) -> list[NDArray[Any]]:
        """Return what a read gives, for the rows of one partition after the other."""
        found: list[list[NDArray[Any]]] = [[] for _ in rows]
        for part, some in _cut(asked, rows):
            if part != asked.parts[0] and not any(map(len, some)):
                continue
            held = self._of(part)

            def act(held: Held = held, some: Sequence[Any] = some) -> None:
                for blocks, block in zip(found, asked.what.read(held.partition, some), strict=True):
                    blocks.append(block)

            _require(held.handle(messages.Read(asked.era), act))
        return [_joined(blocks) for blocks in found]

    def make(self, asked: Make, arrays: Sequence[NDArray[Any]]) -> list[messages.Answer]:
        """Make a change in all partitions, unless it was made before."""
        answers = []
        for part, given in _cut(asked, arrays):
            held = self._of(part)

            def act(held: Held = held, part: int = part, given: Sequence[Any] = given) -> None:
                try:
                    asked.what.change(held.partition, part, given)
                except PoisonedError:  # it is not as before
                    raise
                except Exception as error:
                    held.machine.take_back(asked.change)
                    if part == asked.parts[0]:
                        raise RefusedError(error) from error
                    raise

            answers.append(_require(held.handle(asked.change, act)))
        return [each for each in answers if each is not None]

    def query(self, asked: Query) -> dict[int, Any]:
        """Ask partitions about themselves."""
        found: dict[int, Any] = {}
        for part in asked.parts:
            held = self._of(part)

            def act(held: Held = held, part: int = part) -> None:
                what = asked.what
                found[part] = held.machine.cut if what is None else what.answer(held.partition)

            _require(held.handle(messages.Read(asked.era), act))
        return found

    # ---- the end

    def release(self, asked: Release) -> bool:
        """Close all partitions that obey the coordinator which asks, or nobody; return whether changes were lost."""
        parts = [part for part, held in self._held.items() if held.obeys in (None, asked.coordinator)]
        lost = [self._held.pop(part).close() for part in parts]
        return any(lost)

    def close(self) -> None:
        """Close all partitions."""
        while self._held:
            self._held.popitem()[1].close()

    def _of(self, part: int) -> Held:
        held = self._held.get(part)
        if held is None:
            msg = f"partition {part} is not open in this process any more"
            raise EraEndedError(msg)
        return held


def _require(answer: messages.Answer | None) -> messages.Answer | None:
    if isinstance(answer, messages.Refused):
        raise EraEndedError(answer.why)
    return answer


def _joined(blocks: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Bring blocks of rows together, of which all may be empty."""
    some = [block for block in blocks if len(block)] or blocks[:1]
    return some[0] if len(some) == 1 else np.concatenate(some)


def _cut(asked: Ask | Make, arrays: Sequence[NDArray[Any]]) -> Iterator[tuple[int, list[NDArray[Any]]]]:
    """Iterate over partitions, and what is theirs of arrays that have it one after the other."""
    starts = [0] * len(arrays)
    for number, part in enumerate(asked.parts):
        given: list[NDArray[Any]] = []
        for k, (array, counts) in enumerate(zip(arrays, asked.counts, strict=True)):
            end = starts[k] + counts[number]
            given.append(array[starts[k] : end])
            starts[k] = end
        yield part, given


# ---- how it is asked


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
        holding = self._stores.get(asked.head)
        if holding is None:  # of a store's first call alone: it has a thread
            holding = self._stores[asked.head] = Holding(self._address)
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
    holding: Holding,
    asked: Any,  # noqa: ANN401
    arrays: Sequence[NDArray[Any]],
) -> tuple[Any, list[NDArray[Any]]]:
    """Do what is asked; return an object and arrays."""
    if isinstance(asked, Ask):
        return None, holding.read(asked, arrays)
    if isinstance(asked, Make):
        return holding.make(asked, arrays), []
    if isinstance(asked, Describe):
        return clusters.allocator(), []
    calls: dict[type, Any] = {
        Query: holding.query,
        Hold: holding.hold,
        Tell: holding.tell,
        Release: holding.release,
    }
    return calls[type(asked)](asked), []
