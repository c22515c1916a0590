"""What coordinator, owners and trainers say to each other, and what their machines want done.

All of it is data: frozen dataclasses of integers, strings and tuples. The rules that are named here and in the machines
(P1 and so on) are those of docs/explanation/partitions.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping

AttemptId: TypeAlias = tuple[int, str, int]
"""One try to commit: the epoch and the id of its coordinator, and which try of this coordinator it is. Never reused."""

Decided: TypeAlias = tuple[int, AttemptId | None]
"""Number of a commit, and the attempt that makes it; (0, None) before the first."""

Era: TypeAlias = tuple[int, str, int]
"""The epoch and the id of a coordinator, and its count of eras. Eras are ordered, and a later one ends those before."""

TrainerId: TypeAlias = tuple[str, str]
"""The name of a trainer, and an id of one life of it: who is started again has the same name and another life (E5)."""

Cut: TypeAlias = tuple[tuple[TrainerId, int], ...]
"""Which changes are meant: each trainer that made any, and the number of its last one. Sorted."""

Identity: TypeAlias = tuple[str, int, int]
"""The uuid of the head, the number of the partition, and how many there are."""


@dataclass(frozen=True)
class Status:
    """What a partition has.

    Attributes
    ----------
    last : Decided
        Its last commit.
    prepared : Decided or None
        The attempt that it has voted for and not heard of since.
    """

    last: Decided
    prepared: Decided | None = None

    def has(self, decided: Decided) -> bool:
        """Whether it can be brought to that commit."""
        return decided in (self.last, self.prepared)


# ---- what an owner is asked


@dataclass(frozen=True)
class Who:
    """Say which partition you have. Anybody may ask, and nothing changes."""


@dataclass(frozen=True)
class Claim:
    """Obey this coordinator from now on, and serve nothing of an older era (C1)."""

    era: Era


@dataclass(frozen=True)
class Begin:
    """Go to this commit, and serve the era (E2)."""

    era: Era
    decided: Decided


@dataclass(frozen=True)
class Prepare:
    """Make what was changed durable, and vote (P1).

    Attributes
    ----------
    era : Era
    attempt : Decided
        What is to be prepared.
    cut : Cut
        What it is to contain.
    decided : Decided
        The last commit.
    step : int or None
    metadata : Mapping
        As given to the commit; passed through.
    """

    era: Era
    attempt: Decided
    cut: Cut
    decided: Decided
    step: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Decide:
    """What was prepared is committed (P4)."""

    era: Era
    attempt: Decided


@dataclass(frozen=True)
class Abort:
    """What was prepared will never be committed; it counts as changed again."""

    era: Era
    attempt: Decided


@dataclass(frozen=True)
class Change:
    """Make a change of a trainer, once, in its order, however often it is sent (E4). All owners get it.

    Attributes
    ----------
    era : Era
    trainer : TrainerId
    number : int
        Counts the changes of this trainer in this era, from 1.
    after : int
        Number of its last change that was made, 0 before the first. One between them was refused by all owners.
    what : object
        The change itself; passed through.
    """

    era: Era
    trainer: TrainerId
    number: int
    after: int
    what: Any = None


@dataclass(frozen=True)
class Read:
    """Read rows."""

    era: Era
    what: Any = None


Request: TypeAlias = Who | Claim | Begin | Prepare | Decide | Abort | Change | Read

# ---- what an owner answers


@dataclass(frozen=True)
class Answer:
    """What all answers have.

    Attributes
    ----------
    part : int
        Number of the partition.
    incarnation : str
        One opening of it by one process; never reused.
    """

    part: int
    incarnation: str


@dataclass(frozen=True)
class Present(Answer):
    """To `Who`; also what an owner may say of itself when it starts."""

    identity: Identity | None
    status: Status


@dataclass(frozen=True)
class Claimed(Answer):
    """To `Claim`. The status is of after the claim (C2)."""

    era: Era
    status: Status


@dataclass(frozen=True)
class Outbid(Answer):
    """To `Claim`, by an owner that obeys a later era."""

    era: Era
    by: Era


@dataclass(frozen=True)
class Begun(Answer):
    """To `Begin`."""

    era: Era


@dataclass(frozen=True)
class Vote(Answer):
    """To `Prepare`. `why` says what was wrong, and is empty in a vote of yes."""

    attempt: Decided
    yes: bool
    why: str = ""


@dataclass(frozen=True)
class Told(Answer):
    """To `Decide` and `Abort`."""

    attempt: Decided


@dataclass(frozen=True)
class Applied(Answer):
    """To `Change`."""

    era: Era
    trainer: TrainerId
    number: int


@dataclass(frozen=True)
class Refused(Answer):
    """To anything: it was not done, and nothing changed."""

    request: Request
    why: str


# ---- what the I/O around a machine has to do, in this order


@dataclass(frozen=True)
class Open:
    """Open the partition at this commit; what is prepared is committed if it is this very attempt, or dropped (P5)."""

    decided: Decided


@dataclass(frozen=True)
class Rollback:
    """Go back to the last commit."""


@dataclass(frozen=True)
class PrepareImages:
    """Append images and a prepared record, and sync. If that fails, call `Owner.fail_to_prepare`."""

    attempt: Decided
    step: int | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class DecideImages:
    """Append a commit record for what is prepared; a sync is not needed (P4)."""


@dataclass(frozen=True)
class AbandonImages:
    """What is prepared counts as changed again."""


@dataclass(frozen=True)
class Apply:
    """Make the change."""

    change: Change


@dataclass(frozen=True)
class Serve:
    """Read the rows."""

    read: Read


@dataclass(frozen=True)
class Wait:
    """Ask the machine again later: something is prepared, so nothing may change (P2)."""

    request: Request


@dataclass(frozen=True)
class Reply:
    """Send the answer to who asked."""

    answer: Answer


OwnerEffect: TypeAlias = (
    Open | Rollback | PrepareImages | DecideImages | AbandonImages | Apply | Serve | Wait | Reply
)


@dataclass(frozen=True)
class Send:
    """Send a request to an owner."""

    part: int
    incarnation: str
    request: Request


@dataclass(frozen=True)
class WriteHead:
    """Make this durable in the head before anything that follows. With a new commit, this is the commit (P3)."""

    epoch: int
    decided: Decided


@dataclass(frozen=True)
class Served:
    """An era has begun at all owners."""

    era: Era
    decided: Decided


@dataclass(frozen=True)
class Committed:
    """The commit that was asked for in this era is made."""

    era: Era
    decided: Decided


@dataclass(frozen=True)
class CommitFailed:
    """There is no commit so far. If all owners have prepared, it is made when the next era begins."""

    era: Era
    why: str


@dataclass(frozen=True)
class RefusedPartition:
    """A partition cannot be used (S1)."""

    part: int
    why: str


@dataclass(frozen=True)
class Overtaken:
    """Owners obey a later coordinator. Give up, or call `Coordinator.outbid`."""

    by: Era


CoordinatorEffect: TypeAlias = (
    Send | WriteHead | Served | Committed | CommitFailed | RefusedPartition | Overtaken
)
