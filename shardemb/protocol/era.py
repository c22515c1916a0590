"""What owners and trainers remember within an era. Pure: no I/O, no clock, no randomness.

The rules that are named here are those of docs/explanation/partitions.md.
"""

from __future__ import annotations

from shardemb.protocol.messages import (
    AbandonImages,
    Abort,
    Applied,
    Apply,
    AttemptId,
    Begin,
    Begun,
    Change,
    Claim,
    Claimed,
    Cut,
    Decide,
    Decided,
    DecideImages,
    Era,
    Identity,
    Open,
    Outbid,
    OwnerEffect,
    Prepare,
    PrepareImages,
    Present,
    Read,
    Refused,
    Reply,
    Request,
    Rollback,
    Serve,
    Status,
    Told,
    TrainerId,
    Vote,
    Wait,
    Who,
)

Effects = tuple[OwnerEffect, ...]


class Owner:
    """One incarnation of one partition: what it has promised, and which era it serves.

    `handle` says what to do about a request, as effects that are carried out in their order. The answer to the request
    is among them. If an effect raises, and neither `take_back` nor `fail_to_prepare` is meant for it, then close the
    partition: the next opening is another incarnation.

    Thread safety: one thread at a time, effects included.

    Parameters
    ----------
    part : int
        Number of the partition.
    incarnation : str
        Never used before.
    identity : Identity or None
        What the partition's files say that it is.
    status : Status
        What is in its files, and durable.
    """

    def __init__(self, part: int, incarnation: str, identity: Identity | None, status: Status) -> None:
        self.part, self.incarnation, self._identity = part, incarnation, identity
        self._last, self._prepared = status.last, status.prepared
        self._open = False
        # C1: the claim is forgotten with the incarnation; votes and answers are those of an incarnation as well.
        self._claim: Era = (0, "", 0)
        self._era: Era | None = None
        self._tried: AttemptId = (0, "", 0)
        self._no: Vote | None = None
        self._applied: dict[str, tuple[str, int]] = {}

    @property
    def status(self) -> Status:
        """What it has; what it was told is part of that, also if it is not durable here."""
        return Status(self._last, self._prepared)

    @property
    def era(self) -> Era | None:
        """The era that it serves."""
        return self._era

    @property
    def cut(self) -> Cut:
        """Which changes were made in this era."""
        return tuple(sorted(((name, life), number) for name, (life, number) in self._applied.items()))

    def handle(self, request: Request) -> Effects:
        """Return what is to be done about a request."""
        match request:
            case Who():
                return (Reply(Present(self.part, self.incarnation, self._identity, self.status)),)
            case Claim():
                return self._be_claimed(request)
            case Begin():
                return self._begin(request)
        if request.era != self._era:  # E1
            return self._refuse(request, f"the era {request.era} is over; {self._era} is served")
        return self._serve(request)

    def _serve(self, request: Prepare | Decide | Abort | Change | Read) -> Effects:
        match request:
            case Prepare():
                return self._prepare(request)
            case Decide():
                return self._decide(request)
            case Abort():
                return self._abort(request)
            case Change():
                return self._change(request)
            case Read():
                return (Serve(request),)

    def take_back(self, change: Change) -> None:
        """Forget the change that was just to be made: it was refused, and the partition is as before."""
        name, life = change.trainer
        if self._applied[name] != (life, change.number):
            msg = f"change {change.number} of {change.trainer} is not the last one"
            raise ValueError(msg)
        if change.after == 0:
            del self._applied[name]
        else:
            self._applied[name] = life, change.after

    def fail_to_prepare(self, why: str) -> Effects:
        """Vote no: what was just to be prepared was not, and counts as changed."""
        attempt, self._prepared = self._prepared, None
        if attempt is None:
            msg = "nothing is prepared"
            raise ValueError(msg)
        self._no = Vote(self.part, self.incarnation, attempt, yes=False, why=why)
        return (Reply(self._no),)

    # ---- coordinators and eras

    def _be_claimed(self, claim: Claim) -> Effects:
        if claim.era < self._claim:  # C1: the highest one is obeyed
            return (Reply(Outbid(self.part, self.incarnation, claim.era, self._claim)),)
        self._claim = claim.era
        if claim.era != self._era:
            self._era = None  # C1: and nothing of an older era is served any more
        return (Reply(Claimed(self.part, self.incarnation, claim.era, self.status)),)

    def _begin(self, begin: Begin) -> Effects:
        begun = Reply(Begun(self.part, self.incarnation, begin.era))
        if begin.era != self._claim:  # P5, C1: only who has claimed it says what is decided
            return self._refuse(begin, f"the partition is claimed for the era {self._claim}")
        if begin.era == self._era:  # E2: the same again does nothing
            return (begun,)
        if not self.status.has(begin.decided):  # S1
            return self._refuse(begin, f"the partition has {self.status}, not {begin.decided}")
        effects = self._go_to(begin.decided)
        self._era, self._applied = begin.era, {}
        return (*effects, begun)

    def _go_to(self, decided: Decided) -> Effects:
        """Commit what is prepared if it is this very attempt, drop it otherwise (P5), and roll back (E2)."""
        prepared, self._prepared = self._prepared, None
        self._last = decided
        if not self._open:
            self._open = True
            return (Open(decided),)
        if prepared is None:
            return (Rollback(),)
        return (DecideImages() if prepared == decided else AbandonImages(), Rollback())

    # ---- commits

    def _prepare(self, prepare: Prepare) -> Effects:
        yes = Reply(Vote(self.part, self.incarnation, prepare.attempt, yes=True))
        if self._prepared == prepare.attempt:  # P1: the same again gets the same vote
            return (yes,)
        if self._no is not None and self._no.attempt == prepare.attempt:
            return (Reply(self._no),)
        # P1: it may not have heard of that decision yet
        effects = self._commit() if self._prepared == prepare.decided else ()
        number, attempt = prepare.attempt
        if attempt is None or attempt <= self._tried or number != self._last[0] + 1:  # P1
            return (*effects, *self._refuse(prepare, f"{attempt} comes after {self._tried}, {self._last}"))
        self._tried = attempt
        if self._prepared is not None:  # P5: this coordinator has given it up, for it tries anew
            self._prepared = None
            effects = (*effects, AbandonImages())
        if prepare.cut != self.cut:  # P1
            why = f"partition {self.part} has the changes {self.cut}, not {prepare.cut}"
            self._no = Vote(self.part, self.incarnation, prepare.attempt, yes=False, why=why)
            return (*effects, Reply(self._no))
        self._prepared = prepare.attempt
        # P1: it votes when that is durable
        return (*effects, PrepareImages(prepare.attempt, prepare.step, prepare.metadata), yes)

    def _commit(self) -> Effects:
        assert self._prepared is not None
        self._last, self._prepared = self._prepared, None
        return (DecideImages(),)

    def _decide(self, decide: Decide) -> Effects:
        told = Reply(Told(self.part, self.incarnation, decide.attempt))
        if self._prepared == decide.attempt:  # P5: this very attempt
            return (*self._commit(), told)
        if self._last == decide.attempt:
            return (told,)
        return self._refuse(decide, f"the partition has {self.status}")

    def _abort(self, abort: Abort) -> Effects:
        told = Reply(Told(self.part, self.incarnation, abort.attempt))
        if self._prepared != abort.attempt:
            return (told,)
        self._prepared = None
        return (AbandonImages(), told)

    # ---- changes

    def _change(self, change: Change) -> Effects:
        name, life = change.trainer
        known, before = self._applied.get(name, (life, 0))
        if known != life:  # E5
            return self._refuse(change, f"trainer {name} was started again, and needs a new era")
        applied = Reply(Applied(self.part, self.incarnation, change.era, change.trainer, change.number))
        if change.number <= before:  # E4: once, and acknowledged again
            return (applied,)
        if change.after != before:  # E4: in order
            why = f"change {change.number} of trainer {name} comes after {change.after}, and {before} was the last"
            return self._refuse(change, why)
        if self._prepared is not None:  # P2
            return (Wait(change),)
        self._applied[name] = life, change.number
        return (Apply(change), applied)

    def _refuse(self, request: Request, why: str) -> Effects:
        return (Reply(Refused(self.part, self.incarnation, request, why)),)


class Trainer:
    """One life of a trainer in one era: it makes one change at a time, and knows which were made everywhere.

    It never joins a second era, nor this one twice (E5): another one is made then, with another life.

    Parameters
    ----------
    trainer : TrainerId
        The life was never used before.
    era : Era
    parts : int
        Number of partitions.
    """

    def __init__(self, trainer: TrainerId, era: Era, parts: int) -> None:
        self.trainer, self.era, self._parts = trainer, era, parts
        self._number = self._made = 0
        self._waiting = frozenset[int]()
        self.ended: str | None = None

    @property
    def waiting(self) -> frozenset[int]:
        """Partitions that have not acknowledged the last change."""
        return self._waiting

    @property
    def made(self) -> int:
        """Number of the last change that was made in all partitions; 0 before the first. A cut names it."""
        return self._made

    def change(self, what: object) -> Change:
        """Return the next change, for all partitions.

        Raises
        ------
        RuntimeError
            The era is over, or the last change is not made everywhere yet.
        """
        if self.ended is not None or self._waiting:
            msg = self.ended or f"change {self._number} is not made in the partitions {sorted(self._waiting)}"
            raise RuntimeError(msg)
        self._number += 1
        self._waiting = frozenset(range(self._parts))
        return Change(self.era, self.trainer, self._number, self._made, what)

    def take_back(self) -> None:
        """Go on without the last change: all owners have refused it, and are as before (see `Owner.take_back`).

        Its number is not used again. If it still arrives somewhere and is made there, then the next one is refused.

        Raises
        ------
        RuntimeError
            Some have made it.
        """
        if len(self._waiting) != self._parts:
            msg = f"change {self._number} is made in some partitions"
            raise RuntimeError(msg)
        self._waiting = frozenset()

    def handle(self, answer: Applied | Refused) -> None:
        """Take an owner's answer to a change or a read."""
        if isinstance(answer, Refused):
            if isinstance(answer.request, Change | Read) and answer.request.era == self.era:
                self.ended = answer.why
        elif self._waiting and (answer.era, answer.trainer, answer.number) == (
            self.era,
            self.trainer,
            self._number,
        ):
            self._waiting -= {answer.part}
            self._made = self._made if self._waiting else self._number
