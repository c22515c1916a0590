"""How one commit is made of all partitions, and an era begun: the coordinator's side. Pure, as `era`.

The rules that are named here are those of docs/explanation/partitions.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardemb.protocol.messages import (
    Abort,
    AttemptId,
    Begin,
    Begun,
    Claim,
    Claimed,
    CommitFailed,
    Committed,
    CoordinatorEffect,
    Cut,
    Decide,
    Decided,
    Era,
    Outbid,
    Overtaken,
    Prepare,
    Present,
    Refused,
    RefusedPartition,
    Request,
    Send,
    Served,
    Status,
    Told,
    Vote,
    WriteHead,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shardemb.protocol.messages import Answer

Effects = tuple[CoordinatorEffect, ...]


class Coordinator:
    """The process that has the head open: it claims all owners, begins eras, and commits.

    All owners are asked the same thing at the same time: `request`, which `waiting` have not answered. Effects are
    carried out in their order, before the machine is used again. If the head cannot be written, nobody knows what it
    says: the machine is of no use any more, and the next opening of the head finds out.

    Thread safety: one thread at a time, effects included.

    Parameters
    ----------
    head : str
        The uuid of the head.
    parts : int
        Number of partitions.
    name : str
        Never used before, so that no attempt and no era is, even if an old copy of a head counts the same openings.
    epoch : int
        How often the head was opened before, as the head says.
    decided : Decided
        The last commit, as the head says. The opening has made that durable (H1).
    """

    def __init__(self, head: str, parts: int, name: str, epoch: int, decided: Decided) -> None:
        self._head, self._parts, self._name = head, parts, name
        self._epoch, self._eras, self._attempts = epoch + 1, 0, 0
        self.decided = decided
        self._owners: dict[int, str] = {}
        self._statuses: dict[int, Status] = {}
        self.request: Request | None = None
        self._waiting: set[int] = set()
        self._serving = False

    @property
    def era(self) -> Era:
        """The era that it serves, or is about to begin."""
        return self._epoch, self._name, self._eras

    @property
    def owners(self) -> dict[int, str]:
        """The registered incarnation of each partition."""
        return dict(self._owners)

    @property
    def missing(self) -> tuple[int, ...]:
        """Partitions without an owner. With any, there is no era."""
        return tuple(part for part in range(self._parts) if part not in self._owners)

    @property
    def waiting(self) -> tuple[int, ...]:
        """Partitions that have not answered `request`."""
        return tuple(sorted(self._waiting))

    @property
    def serving(self) -> bool:
        """Whether the era has begun at all owners."""
        return self._serving

    @property
    def preparing(self) -> bool:
        """Whether a commit is under way."""
        return self._serving and isinstance(self.request, Prepare)

    def start(self) -> Effects:
        """Count this opening of the head. Then have `handle` hear who is present."""
        return (WriteHead(self._epoch, self.decided),)

    def handle(self, answer: Answer) -> Effects:
        """Return what is to be done about the answer of an owner."""
        if isinstance(answer, Present):
            return self._register(answer)
        awaited = self._owners.get(answer.part) == answer.incarnation and answer.part in self._waiting
        if not awaited or not self._answers(answer):
            return ()
        match answer:
            case Refused():  # it obeys somebody else
                return self.lose(answer.part, answer.incarnation, answer.why)
            case Outbid():
                return self._stop(f"the owners obey {answer.by}", (Overtaken(answer.by),))
            case Vote(yes=False):
                return self.give_up(answer.why)
            case Claimed():
                self._statuses[answer.part] = answer.status  # C2
        self._waiting.discard(answer.part)
        return () if self._waiting else self._go_on()

    def again(self) -> Effects:
        """Ask again who has not answered."""
        if self.request is None:
            return ()
        return tuple(Send(part, self._owners[part], self.request) for part in sorted(self._waiting))

    def lose(self, part: int, incarnation: str, why: str) -> Effects:
        """Take an owner for lost; it may well be alive (E2)."""
        if self._owners.get(part) != incarnation:
            return ()
        del self._owners[part]
        return self._new_era(f"the owner of partition {part} was lost: {why}")

    def end(self, era: Era, why: str) -> Effects:
        """Go back to the last commit, and begin another era, if this one is served (E2)."""
        return self._new_era(why) if self._serving and era == self.era else ()

    def outbid(self, by: Era) -> Effects:
        """Claim the owners that obey another coordinator."""
        if by[:2] < (self._epoch, self._name):
            return ()
        self._epoch = by[0] + 1
        return (WriteHead(self._epoch, self.decided), *self._new_era("another coordinator is outbid"))

    def commit(
        self, era: Era, cut: Cut, step: int | None = None, metadata: Mapping[str, Any] | None = None
    ) -> Effects:
        """Begin to commit what `cut` names. `Committed` or `CommitFailed` follows, here or later.

        Parameters
        ----------
        era : Era
            That of who asks.
        cut : Cut
            What the trainers say that they have made, not what owners have.
        step : int, optional
        metadata : Mapping, optional
            Passed through.
        """
        if not self._serving or era != self.era:  # E3
            return (CommitFailed(era, f"the era {era} is over"),)
        if self.preparing:
            return (CommitFailed(era, "another commit is under way"),)
        self._attempts += 1
        attempt: AttemptId = (self._epoch, self._name, self._attempts)
        number = self.decided[0] + 1
        return self._ask(Prepare(era, (number, attempt), cut, self.decided, step, metadata or {}))

    def give_up(self, why: str) -> Effects:
        """Abort the commit that is under way."""
        if not (self._serving and isinstance(self.request, Prepare)):
            return ()
        failed = CommitFailed(self.era, why)
        return (failed, *self._ask(Abort(self.era, self.request.attempt)))

    # ---- how an era begins

    def _register(self, present: Present) -> Effects:
        part = present.part
        if self._owners.get(part) == present.incarnation:
            return ()
        if present.identity != (self._head, part, self._parts):  # S1
            return (RefusedPartition(part, f"it is {present.identity}"),)
        if not self._is_usable(present.status):
            return (RefusedPartition(part, f"it has {present.status}, the store is at {self.decided}"),)
        self._owners[part] = present.incarnation
        return self._new_era(f"partition {part} has another owner")

    def _is_usable(self, status: Status) -> bool:
        """Whether it is at the last commit, has prepared it, or proves a newer one (S1, C3)."""
        return status.has(self.decided) or status.last[0] > self.decided[0]

    def _new_era(self, why: str) -> Effects:
        effects = self._stop(why, ())
        self._eras += 1
        return effects if self.missing else (*effects, *self._ask(Claim(self.era)))

    def _stop(self, why: str, effects: Effects) -> Effects:
        if self.preparing:
            effects = (CommitFailed(self.era, why), *effects)
        self.request, self._serving = None, False
        self._waiting.clear()
        self._statuses.clear()
        return effects

    def _conclude(self) -> Effects:
        decided = self._last_commit()
        unfit = [part for part, status in sorted(self._statuses.items()) if not status.has(decided)]
        if not unfit:
            return (*self._decide(decided), *self._ask(Begin(self.era, decided)))
        refused = tuple(
            RefusedPartition(part, f"it has {self._statuses[part]}, the store is at {decided}")
            for part in unfit
        )
        for part in unfit:  # S1
            del self._owners[part]
        return (*refused, *self._new_era("partitions were refused"))

    def _last_commit(self) -> Decided:
        """Work it out from the head, and from what all owners have answered to the claim (C3)."""
        statuses = self._statuses.values()
        decided = max([self.decided, *(status.last for status in statuses)], key=lambda each: each[0])
        prepared, *others = {status.prepared for status in statuses}
        if prepared is None or others or any(status.last != decided for status in statuses):
            return decided  # anything else that is prepared is dead
        return prepared if prepared[0] == decided[0] + 1 else decided

    # ---- how a commit is made

    def _decide(self, decided: Decided) -> Effects:
        """Write to the head what is decided, before anybody is told (P3, C3)."""
        if decided == self.decided:
            return ()
        self.decided = decided
        return (WriteHead(self._epoch, decided),)

    def _go_on(self) -> Effects:
        """Everybody has answered."""
        match self.request:
            case Claim():
                return self._conclude()
            case Begin():
                self._serving = True
                return (Served(self.era, self.decided),)
            case Prepare(attempt=attempt):  # P3: the votes of all, for this very attempt
                written = self._decide(attempt)
                return (*written, Committed(self.era, attempt), *self._ask(Decide(self.era, attempt)))
        return ()

    # ---- requests

    def _ask(self, request: Request) -> Effects:
        self.request, self._waiting = request, set(self._owners)
        return self.again()

    def _answers(self, answer: Answer) -> bool:
        """Whether it is an answer to `request`, and not to an earlier one."""
        request = self.request
        match answer:
            case Claimed() | Outbid():
                return isinstance(request, Claim) and answer.era == request.era
            case Begun():
                return isinstance(request, Begin) and answer.era == request.era
            case Vote():
                return isinstance(request, Prepare) and answer.attempt == request.attempt
            case Told():
                return isinstance(request, Decide | Abort) and answer.attempt == request.attempt
            case Refused():
                return answer.request == request
        return False
