"""The coordinator: it has the head open, whose commit is that of all partitions, and begins the eras.

It lives in the process that opened the store, which may be a client: all calls go outward from here, so nobody has to
reach it. Trainers on workers need it for nothing but a commit, and that is made when they have returned.

The head is an ordinary small store without tables. The metadata of its commit says which attempt is decided, where each
partition is, and what is known of the tables as a whole.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from shardemb.distributed import clusters, owner, work
from shardemb.distributed.link import Link, Members
from shardemb.distributed.transport import Call, UnreachableError
from shardemb.errors import (
    EraEndedError,
    OwnerLostError,
    PartitionError,
    PoisonedError,
    StoreLockedError,
)
from shardemb.format.manifest import Commit, PartitionIdentity, check_metadata, check_step
from shardemb.protocol import coordination, messages

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shardemb.distributed.transport import Wire
    from shardemb.distributed.work import TableFacts
    from shardemb.protocol.record import Places, Record
    from shardemb.store.store import Store

PAUSE_S = 0.1
"""Between two looks for owners that are not there yet."""


class Coordinator:
    """The process that has the head open. What is decided, and when, says the machine `coordination.Coordinator`.

    Parameters
    ----------
    head : Store
        Open for writing.
    wire : Wire
    record : Record
        As the head has it.
    places : Places, optional
        Where partitions are now. The head remembers it once all were found there.
    deadline_s, recover_s : float
        Seconds for a sign of life, and for all owners to come back when an era begins.

    Raises
    ------
    OwnerLostError, PartitionError, EraEndedError
        As `begin`.
    """

    def __init__(
        self,
        head: Store,
        wire: Wire,
        record: Record,
        places: Places | None,
        *,
        deadline_s: float,
        recover_s: float,
    ) -> None:
        self._head, self._wire = head, wire
        self._deadline_s, self._recover_s = deadline_s, recover_s
        self._record, self._places = record, places or record.places
        self._machine = coordination.Coordinator(
            head.uuid, len(self._places), str(uuid.uuid4()), record.openings, record.decided
        )
        self._opening, self._lock = True, threading.RLock()
        self._addresses: tuple[str, ...] = ()
        self._claimed: set[str] = set()
        self._present: dict[int, messages.Present] = {}
        self._tables: dict[str, Any] = dict(record.tables)
        self._next: Record | None = None  # what the head says with the commit that is under way
        self._broken: Exception | None = None
        try:
            self._carry_out(self._machine.start())
            self.link = self.begin("the store was opened")
        except BaseException:
            self._release()
            raise
        self._opening = False

    # ---- what it knows

    @property
    def last_commit(self) -> Commit | None:
        """The last commit of all partitions."""
        number, record = self._record.decided[0], self._record
        return None if number == 0 else Commit(number, record.step, check_metadata(record.metadata))

    def note_table(self, name: str, num_embeddings: int, padding_idx: int | None, *, counters: bool) -> None:
        """Remember what no partition knows of a new table."""
        self._tables[name] = {
            "num_embeddings": num_embeddings,
            "padding_idx": padding_idx,
            "counters": counters,
        }

    def forget_table(self, name: str) -> None:
        """Forget it again."""
        del self._tables[name]

    def describe(self, link: Link) -> dict[str, TableFacts]:
        """Ask one owner what the tables are, and return what is known of them as a whole."""
        (found,) = link.ask(work.DescribeTables(), [0]).values()
        return {name: replace(facts, **self._tables[name]) for name, facts in found.items()}

    def complaints(self) -> list[str]:
        """Return what is wrong with how the owners were started; nothing of it makes results wrong."""
        calls = {address: Call(owner.Describe(self._head.uuid)) for address in set(self._addresses)}
        answers, _ = self._wire.call(calls, self._deadline_s)
        settings = {address: each.result for address, each in answers.items()}
        return list(clusters.complaints(self._wire.workers(), settings))

    # ---- eras

    def begin(self, why: str) -> Link:
        """Go to the last commit in all partitions, and begin an era there.

        Raises
        ------
        OwnerLostError
            An owner is not there, or does not answer, and has not come back in time.
        PartitionError
            A partition is missing, or belongs elsewhere, or is at another commit.
        EraEndedError
            Another process has opened the store.
        """
        with self._lock:
            self._require_whole()
            with contextlib.suppress(OwnerLostError):  # it may come back
                self._carry_out(self._machine.end(self._machine.era, why))
            until = time.monotonic() + self._recover_s
            while not self._machine.serving:
                problem = self._seek_owners()
                if problem is not None and time.monotonic() > until:
                    raise problem
                if problem is not None:
                    time.sleep(PAUSE_S)
            return self._serve()

    def _seek_owners(self) -> Exception | None:
        """Have all partitions held, and ask what is to be asked; return what is in the way."""
        try:
            self._addresses = self._find()
            self._claimed |= set(self._addresses)
            calls = {address: Call(self._hold(address)) for address in set(self._addresses)}
            answers, errors = self._wire.call(calls, self._deadline_s)
        except OwnerLostError as error:
            return error
        for problem in errors.values():
            if isinstance(problem, UnreachableError):
                return OwnerLostError(f"{problem}: it has partitions of the store {self._head.path}")
            if not isinstance(problem, StoreLockedError):  # of a process that is ending
                raise problem
            return problem
        effects: coordination.Effects = ()
        for answer in answers.values():
            for present in answer.result:
                self._present[present.part] = present
                effects += self._machine.handle(present)
        try:
            self._carry_out(effects or self._machine.again())
        except OwnerLostError as error:
            return error
        if self._machine.serving:
            return None
        return OwnerLostError(f"owners of the store {self._head.path} come and go, so that no era begins")

    def _serve(self) -> Link:
        found = replace(self._record, complete=True, places=self._places)
        if self._record != found:
            self._write(found)
        era, decided = self._machine.era, self._machine.decided
        last = "its creation" if decided[0] == 0 else f"commit {decided[0]}"
        members = Members(self._head.uuid, str(self._head.path), era, self._addresses, self._deadline_s, last)
        self.link = Link(members, self._wire, {})
        self._learn_decided()
        self._tables = dict(self._record.tables)
        self.link.tables = self.describe(self.link)
        if decided[0]:
            self.link.members = replace(members, last=f"{last} (step {self._record.step})")
        return self.link

    def _learn_decided(self) -> None:
        """Learn step and metadata of a commit that was decided when its coordinator was gone."""
        if self._record.decided[0] == 0:
            return
        (found,) = self.link.ask(work.LastCommit(), [0]).values()
        known = {
            "tables": found.metadata["tables"],
            "step": found.step,
            "metadata": found.metadata["metadata"],
        }
        record = replace(self._record, **known)
        if record != self._record:
            self._write(record)

    def _hold(self, address: str) -> owner.Hold:
        places = {
            part: folder for part, (_, folder) in enumerate(self._places) if self._addresses[part] == address
        }
        return owner.Hold(self._head.uuid, places, len(self._addresses), may_create=not self._record.complete)

    def _find(self) -> tuple[str, ...]:
        """Return the address of the worker that owns each partition."""
        workers = self._wire.workers()
        return tuple(self._address(name, part, workers) for part, (name, _) in enumerate(self._places))

    def _address(self, name: str, part: int, workers: Mapping[str, Mapping[str, Any]]) -> str:
        named = [address for address, each in workers.items() if name in (str(each["name"]), address)]
        found = named or [address for address, each in workers.items() if each["host"] == name]
        if len(found) == 1:
            return found[0]
        known = ", ".join(f"{each['name']!r} on {each['host']}" for each in workers.values()) or "none"
        if found:
            msg = f"{len(found)} workers run on the host {name!r}: give owners the names of workers; there are {known}"
            raise PartitionError(msg)
        last = self._record.decided[0]
        msg = (
            f"no worker {name!r}, which owns partition {part} of {len(self._places)} of the store "
            f"{self._head.path}, last commit {last} (step {self._record.step}); the workers are: {known}"
        )
        raise OwnerLostError(msg)

    # ---- commits

    def commit(self, link: Link, step: int | None, metadata: Mapping[str, Any] | None) -> Commit:
        """Prepare everywhere, decide in the head, and let the owners follow.

        Raises
        ------
        OwnerLostError, EraEndedError
            Nothing was committed. But if all owners have prepared, the next era begins with this commit.
        DiskFullError, OSError
            An owner could not make its changes durable. Nothing was committed, and they are still there.
        """
        checked, given = check_step(step), check_metadata(metadata)
        step = self._record.step if checked is None else checked
        with self._lock:
            self._require_whole()
            era, before = link.members.era, self._record.decided
            (cut,) = link.ask(None, [0]).values()
            self._next = replace(self._record, tables=dict(self._tables), step=step, metadata=given)
            document = {"tables": self._tables, "metadata": given}
            try:
                self._carry_out(self._machine.commit(era, cut, step, document))
            except _VoteError as vote:  # nothing has changed, and the era goes on
                raise vote.why from None
            except BaseException as error:
                link.ended = link.ended or f"a commit failed ({type(error).__name__}: {error})"
                if self._record.decided == before or not isinstance(error, OwnerLostError):
                    raise
            finally:
                self._next = None
            if self._record.decided == before:
                msg = "the owners have not made the same changes: one was made in some partitions only"
                link.ended = link.ended or msg
                raise EraEndedError(f"{msg}. Go on from the last commit of {self._head.path}")
            number = self._record.decided[0]
            link.members = replace(link.members, last=f"commit {number} (step {step})")
            return Commit(number, step, check_metadata(given))

    # ---- what the machine wants done

    def _carry_out(self, effects: coordination.Effects) -> None:
        """Do what the machine says, and tell it what owners answer, until it wants nothing more."""
        problem: Exception | None = None
        waiting = list(effects)
        while waiting:
            sends = [each for each in waiting if isinstance(each, messages.Send)]
            for effect in waiting:
                problem = self._do(effect) or problem
            # Those of a request that was replaced since are answers to nothing.
            current = [each.part for each in sends if each.request == self._machine.request]
            waiting, error = self._send(current) if current else ([], None)
            problem = error or problem
        if isinstance(problem, _VoteError) or (problem is not None and not self._machine.serving):
            raise problem

    def _do(self, effect: messages.CoordinatorEffect) -> Exception | None:
        match effect:
            case messages.WriteHead(epoch, decided):
                record = self._record if decided == self._record.decided else self._next or self._record
                self._write(replace(record, openings=epoch, decided=decided))
            case messages.RefusedPartition(part):
                return PartitionError(self._unfit(part))
            case messages.Overtaken(by) if self._opening:
                self._carry_out(self._machine.outbid(by))
            case messages.Overtaken():
                self._broken = EraEndedError(
                    f"another process has opened the store {self._head.path} since; this one can only close it"
                )
                return self._broken
        return None

    def _send(self, parts: Sequence[int]) -> tuple[list[messages.CoordinatorEffect], Exception | None]:
        """Ask owners what the machine asks; return what it says to their answers, and what went wrong."""
        request, owners = self._machine.request, self._machine.owners
        assert request is not None
        calls: dict[str, Call] = {}
        for address in {self._addresses[part] for part in parts}:
            theirs = tuple(part for part in parts if self._addresses[part] == address)
            calls[address] = Call(owner.Tell(self._head.uuid, theirs, request))
        answers, errors = self._wire.call(calls, self._deadline_s)
        effects: list[messages.CoordinatorEffect] = []
        problem: Exception | None = None
        for address, error in errors.items():
            theirs = calls[address].request.parts
            problem = self._lost(address, error)
            for part in theirs:
                effects += self._machine.lose(part, owners[part], str(error))
        for each in answers.values():
            for answer, error in each.result:
                if error is not None:
                    problem = problem or _VoteError(error)  # what was lost weighs more
                effects += self._machine.handle(answer)
        return effects, problem

    def _lost(self, address: str, error: Exception) -> Exception:
        if not isinstance(error, UnreachableError | EraEndedError):
            return error
        parts = ", ".join(str(part) for part, there in enumerate(self._addresses) if there == address)
        last = f"commit {self._record.decided[0]} (step {self._record.step})"
        msg = (
            f"{error}: it has the partitions {parts} of the store {self._head.path}. Its last commit is {last}; go on "
            f"from there, once the process is back"
        )
        return OwnerLostError(msg)

    def _unfit(self, part: int) -> str:
        """Say why a partition cannot be used (S1)."""
        name, folder = self._places[part]
        count, present = len(self._places), self._present[part]
        wanted = PartitionIdentity(self._head.uuid, part, count)
        if present.identity != (wanted.head, part, count):
            there = PartitionIdentity(*present.identity) if present.identity is not None else "no partition"
            return f"{folder} of {name} is {there}, where {wanted} should be"
        return (
            f"partition {part} of {count} of the store {self._head.path}, in {folder} of {name}, is at commit "
            f"{present.status.last[0]}, but the last commit of the store is {self._machine.decided[0]}: bring back the "
            f"folder, or a copy of it at that commit"
        )

    def _write(self, record: Record) -> None:
        """Make it durable in the head. If that fails, nobody knows what the head says until it is opened again."""
        try:
            self._head.commit(step=record.step, metadata=record.to_json())
        except BaseException as error:
            msg = f"the head {self._head.path} could not be written: close the store and open it again"
            self._broken = PoisonedError(msg)
            self._broken.__cause__ = error
            raise
        self._record = record

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise self._broken

    # ---- the end

    def close(self) -> bool:
        """Close all partitions, then the head; return whether changes were lost that no commit has.

        An owner that does not answer closes its own as it ends.
        """
        with self._lock:
            try:
                return self._release() and self.link.ended is None  # else whoever uses the store knows
            finally:
                self._head.close()

    def _release(self) -> bool:
        """Close all partitions that were claimed; return whether changes were lost."""
        release = owner.Release(self._head.uuid, self._machine.era[:2])
        answers, _ = self._wire.call({each: Call(release) for each in self._claimed}, self._deadline_s)
        return any(each.result for each in answers.values())


class _VoteError(Exception):
    """An owner could not prepare.

    Attributes
    ----------
    why : Exception
    """

    def __init__(self, why: Exception) -> None:
        super().__init__(why)
        self.why = why
