"""The coordinator: it has the head open, whose commit is that of all partitions, and begins the eras.

It lives in the process that opened the store, which may be a client: all calls go outward from here, so nobody has to
reach it. Trainers on workers need it for nothing but a commit, and that is made when they have returned.

The head is an ordinary small store without tables. The metadata of its commit says which attempt is decided, where each
partition is, and what is known of the tables as a whole.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from shardemb.distributed import owner, work
from shardemb.distributed.link import Link, Members
from shardemb.distributed.transport import Call, UnreachableError
from shardemb.errors import FormatError, OwnerLostError, PartitionError, StoreLockedError
from shardemb.format.manifest import Commit, check_metadata, check_step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardemb.distributed.transport import Answer, Wire
    from shardemb.distributed.work import TableFacts
    from shardemb.store.partition import Decided, PartitionStatus
    from shardemb.store.store import Store

Places: TypeAlias = tuple[tuple[str, str], ...]
"""For each partition the owner, which is the name, address or host of a worker, and the folder there."""

KEY = "shardemb.distributed"
"""Where the metadata of the head's commit has what this module knows."""

PAUSE_S = 0.1
"""Between two looks for owners that are not there yet."""


@dataclass(frozen=True)
class Record:
    """What the head's commit says.

    Attributes
    ----------
    places : Places
    decided : Decided
        The last commit of all partitions.
    openings : int
        How often the head was opened to write.
    complete : bool
        Whether all partitions have been created. From then on, one that is missing is an error.
    tables : dict of str to dict
        For each table of the last commit ``num_embeddings``, ``padding_idx`` and ``counters``.
    step : int
    metadata : dict
        As given to `DistributedStore.commit`.
    """

    places: Places
    decided: Decided = (0, None)
    openings: int = 0
    complete: bool = False
    tables: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as metadata of a commit."""
        return {KEY: asdict(self)}

    @staticmethod
    def of(head: Store) -> Record:
        """Read that of a store's last commit.

        Raises
        ------
        FormatError
            The store is none that is distributed.
        """
        commit = head.last_commit
        found = None if commit is None else commit.metadata.get(KEY)
        if found is None:
            msg = f"{head.path} is a store of one machine: open it with shardemb.open"
            raise FormatError(msg)
        places = tuple((name, folder) for name, folder in found.pop("places"))
        return Record(places, decided_of(found.pop("decided")), **found)


def decided_of(found: Any) -> Decided:  # noqa: ANN401
    """Return a decided attempt, as it was before it became JSON."""
    commit, attempt = found
    return commit, None if attempt is None else tuple(attempt)


class Coordinator:
    """The process that has the head open.

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
        Seconds for one call, and for all owners to come back when an era begins.
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
        self._places = places or record.places
        self._record = replace(record, openings=record.openings + 1)
        # Never used again, also if an old copy of the head counts the same openings a second time.
        self._id = (self._record.openings, str(uuid.uuid4()))
        self._eras = self._attempts = 0
        self._claimed: set[str] = set()
        self._tables: dict[str, Any] = dict(record.tables)
        self._write()
        try:
            self.link = self.begin()
        except BaseException:
            self._release()
            raise

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

    # ---- eras

    def begin(self) -> Link:
        """Go to the last commit in all partitions, and begin an era there (C1 to C3, E2, S1).

        Raises
        ------
        OwnerLostError
            An owner is not there, or does not answer, and has not come back in time.
        PartitionError
            A partition is missing, or belongs elsewhere, or is at another commit.
        EraEndedError
            Another process has opened the store.
        """
        until = time.monotonic() + self._recover_s
        addresses, statuses = self._claim(until)
        self._decide_at_takeover(statuses)
        decided = self._record.decided
        for part, status in sorted(statuses.items()):
            self._require_at(part, status, decided)
        self._eras += 1
        era = (*self._id, self._eras)
        begin = owner.Begin(self._head.uuid, era, decided)
        self._call({address: Call(begin) for address in set(addresses)}, self._deadline_s)
        last = "its creation" if decided[0] == 0 else f"commit {decided[0]} (step {self._record.step})"
        members = Members(
            self._head.uuid, str(self._head.path), era, addresses, self._deadline_s, last
        )
        self.link = Link(members, self._wire, {})
        self._learn_decided()
        self._tables = dict(self._record.tables)
        self.link.tables = self.describe(self.link)
        return self.link

    def _claim(self, until: float) -> tuple[tuple[str, ...], dict[int, PartitionStatus]]:
        """Claim all owners; wait for those that are being restarted. Their answers are of after the claim (C2)."""
        while True:
            problem: Exception
            try:
                addresses = self._addresses()
                self._claimed |= set(addresses)
                calls = {address: Call(self._hold(addresses, address)) for address in set(addresses)}
                answers = self._call(calls, min(self._deadline_s, max(until - time.monotonic(), PAUSE_S)))
            except (OwnerLostError, StoreLockedError) as error:  # of a process that is ending
                problem = error
            else:
                found = {part: each for answer in answers.values() for part, each in answer.result.items()}
                self._note_places()
                return addresses, found
            if time.monotonic() > until:
                raise problem
            time.sleep(PAUSE_S)

    def _hold(self, addresses: tuple[str, ...], address: str) -> owner.Hold:
        places = {
            part: folder
            for part, (_, folder) in enumerate(self._places)
            if addresses[part] == address
        }
        return owner.Hold(
            self._head.uuid, self._id, places, len(addresses), may_create=not self._record.complete
        )

    def _addresses(self) -> tuple[str, ...]:
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

    def _decide_at_takeover(self, statuses: Mapping[int, PartitionStatus]) -> None:
        """Decide what all partitions together say is decided; write it to the head first (C3)."""
        known = [self._record.decided, *((each.commit, each.attempt) for each in statuses.values())]
        decided = max(known, key=lambda each: each[0])  # the head's, where it is as new as any
        prepared = {each.prepared for each in statuses.values()}
        if len(prepared) == 1 and (only := next(iter(prepared))) is not None and only[0] == decided[0] + 1:
            decided = only
        if decided != self._record.decided:
            self._record = replace(self._record, decided=decided)
            self._write()

    def _learn_decided(self) -> None:
        """Learn step and metadata of a commit that was decided when the head was taken over."""
        if self._record.decided[0] == 0:
            return
        (found,) = self.link.ask(work.LastCommit(), [0]).values()
        known = {"tables": found.metadata["tables"], "step": found.step, "metadata": found.metadata["metadata"]}
        record = replace(self._record, **known)
        if record != self._record:
            self._record = record
            self._write()

    def _require_at(self, part: int, status: PartitionStatus, decided: Decided) -> None:
        """Refuse a partition that cannot be brought to the last commit (S1)."""
        if (status.commit, status.attempt) == decided or status.prepared == decided:
            return
        name, folder = self._places[part]
        msg = (
            f"partition {part} of {len(self._places)} of the store {self._head.path}, in {folder} of {name}, is "
            f"at commit {status.commit}, but the last commit of the store is {decided[0]}: bring back the folder, or a "
            f"copy of it at that commit"
        )
        raise PartitionError(msg)

    def _note_places(self) -> None:
        found = replace(self._record, complete=True, places=self._places)
        if self._record != found:
            self._record = found
            self._write()

    # ---- commits

    def commit(self, link: Link, step: int | None, metadata: Mapping[str, Any] | None) -> Commit:
        """Prepare everywhere, decide in the head, and let the owners follow (P1, P3, P4).

        Raises
        ------
        OwnerLostError, EraEndedError
            Nothing was committed. But if all owners have prepared, a new era begins with this commit.
        """
        checked, given = check_step(step), check_metadata(metadata)
        step = self._record.step if checked is None else checked
        self._attempts += 1
        decided: Decided = (self._record.decided[0] + 1, (*self._id, self._attempts))
        members = link.members
        document = {"tables": self._tables, "metadata": given}
        try:
            cuts = link.ask_owners(owner.GetCut(members.head, members.era))
            cut = next(iter(cuts.values()))
            link.ask_owners(owner.Prepare(members.head, members.era, decided, cut, step, document))
            self._record = replace(
                self._record, decided=decided, tables=dict(self._tables), step=step, metadata=given
            )
            self._write()  # P3: with this sync, it is committed
        except BaseException as error:
            link.ended = link.ended or f"a commit failed ({type(error).__name__}: {error})"
            raise
        with contextlib.suppress(OwnerLostError):  # it follows when it is back; the next call notices
            link.ask_owners(owner.Decide(members.head, members.era, decided))
        link.members = replace(members, last=f"commit {decided[0]} (step {step})")
        return Commit(decided[0], step, check_metadata(given))

    # ---- the end

    def close(self) -> bool:
        """Close all partitions, then the head; return whether changes were lost that no commit has.

        An owner that does not answer closes its own as it ends.
        """
        try:
            return self._release() and self.link.ended is None  # else whoever uses the store knows
        finally:
            self._head.close()

    def _release(self) -> bool:
        """Close all partitions that were claimed; return whether changes were lost."""
        release = owner.Release(self._head.uuid, self._id)
        answers, _ = self._wire.call({each: Call(release) for each in self._claimed}, self._deadline_s)
        return any(each.result for each in answers.values())

    def _write(self) -> None:
        self._head.commit(step=self._record.step, metadata=self._record.to_json())

    def _call(self, calls: Mapping[str, Call], deadline_s: float) -> dict[str, Answer]:
        answers, errors = self._wire.call(calls, deadline_s)
        for error in errors.values():
            if isinstance(error, UnreachableError):
                msg = f"{error}: it has partitions of the store {self._head.path}"
                raise OwnerLostError(msg) from error
        for error in errors.values():
            raise error
        return answers

