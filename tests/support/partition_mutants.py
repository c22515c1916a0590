"""The rules of a distributed store, each undone in its simplest way: the model has to notice.

Most mutants are subclasses of the real machines with one method changed; the rest break the I/O around them.
"""

from dataclasses import dataclass, replace

from shardemb.protocol import messages as say
from shardemb.protocol.coordination import Coordinator
from shardemb.protocol.era import Owner
from support.partition_model import START, Rules, StuckError, World, WrongError

# ---- owners


class WithoutCut(Owner):
    def _prepare(self, prepare):
        return super()._prepare(replace(prepare, cut=self.cut))


class TakesLatePrepares(Owner):
    def _prepare(self, prepare):
        self._tried = (0, "", 0)
        return super()._prepare(prepare)


class ChangesWhilePrepared(Owner):
    def _change(self, change):
        prepared, self._prepared = self._prepared, None
        try:
            return super()._change(change)
        finally:
            self._prepared = prepared


class DecidesByNumber(Owner):
    def _begin(self, begin):
        if self._prepared is not None and self._prepared[0] == begin.decided[0]:
            begin = replace(begin, decided=self._prepared)
        return super()._begin(begin)


class ServesAnyEra(Owner):
    """Makes changes of other eras as if they were the next ones of this."""

    def handle(self, request):
        if not isinstance(request, say.Change | say.Read) or self._era in (None, request.era):
            return super().handle(request)
        name = request.trainer[0] if isinstance(request, say.Change) else None
        if name is not None and self._applied.get(name, ("", 0))[1] < request.number:
            self._applied[name] = request.trainer[1], request.after
        return self._serve(request)


class DoesNotRollBack(Owner):
    def _begin(self, begin):
        return tuple(effect for effect in super()._begin(begin) if effect != say.Rollback())


class BeginsAgain(Owner):
    def _begin(self, begin):
        self._era = None
        return super()._begin(begin)


class LetsTrainersJoinAgain(Owner):
    def _change(self, change):
        name, life = change.trainer
        if name in self._applied:
            self._applied[name] = life, self._applied[name][1]
        return super()._change(change)


class AppliesAgain(Owner):
    def _change(self, change):
        effects = super()._change(change)
        again = len(effects) == 1 and isinstance(effects[0], say.Reply)
        again = again and isinstance(effects[0].answer, say.Applied) and self._prepared is None
        again = again and "?" not in change.what  # the world would refuse it, and take it back twice
        return (say.Apply(change), *effects) if again else effects


class ObeysAnybody(Owner):
    def _be_claimed(self, claim):
        return (say.Reply(say.Claimed(self.part, self.incarnation, claim.era, self.status)),)

    def _begin(self, begin):
        if self._era is None or begin.era >= self._era:
            self._claim = begin.era
        return super()._begin(begin)


class ObeysAnybodyInAnyEra(ObeysAnybody, ServesAnyEra):
    pass


class StartsFromAnything(Owner):
    def _begin(self, begin):
        return super()._begin(begin if self.status.has(begin.decided) else replace(begin, decided=self._last))


# ---- coordinators


class TellsFirst(Coordinator):
    def _go_on(self):
        return tuple(sorted(super()._go_on(), key=lambda effect: isinstance(effect, say.WriteHead)))


class DecidesWithoutOne(Coordinator):
    def handle(self, answer):
        effects = super().handle(answer)
        return (*effects, *self._go_on()) if self.preparing and len(self._waiting) == 1 else effects


class CountsAnyVote(Coordinator):
    def handle(self, answer):
        if isinstance(answer, say.Vote) and self.preparing and answer.attempt[0] == self.request.attempt[0]:
            mine = self._owners.get(answer.part, answer.incarnation)
            answer = replace(answer, attempt=self.request.attempt, incarnation=mine)
        return super().handle(answer)


class TakesAnyCommit(Coordinator):
    def commit(self, era, cut, step=None, metadata=None):
        return super().commit(self.era, cut, step, metadata)


class BelievesTheFirstStatus(Coordinator):
    def handle(self, answer):
        if isinstance(answer, say.Present):
            self.first = {**getattr(self, "first", {}), answer.incarnation: answer.status}
        if isinstance(answer, say.Claimed) and answer.incarnation in self.first:
            answer = replace(answer, status=self.first[answer.incarnation])
        return super().handle(answer)


class BelievesTheHead(Coordinator):
    def _last_commit(self):
        return self.decided


class TellsFirstAndBelievesTheHead(TellsFirst, BelievesTheHead):
    pass


class DropsAtTakeOver(Coordinator):
    def _last_commit(self):
        if any(not status.has(self.decided) for status in self._statuses.values()):
            return self.decided
        return min((status.last for status in self._statuses.values()), key=lambda last: last[0])


class TakesAnyPartition(Coordinator):
    """Takes partitions at any commit; with `empty`, only those that have nothing at all."""

    empty = False

    def _is_usable(self, status):
        return super()._is_usable(status) or not self.empty or status.last == START

    def _conclude(self):
        decided = self._last_commit()
        for part, status in self._statuses.items():
            if not status.has(decided) and (not self.empty or status.last == START):
                self._statuses[part] = say.Status(decided)
        return super()._conclude()


class TakesEmptyPartitions(TakesAnyPartition):
    empty = True


# ---- all of them


@dataclass(frozen=True)
class Mutant:
    """A rule undone.

    Attributes
    ----------
    rule : str
    rules : Rules
    histories : int
        Within so many it has to be noticed, from seed 0.
    unless : str
        What makes it good, so that it need not be noticed in random histories.
    """

    rule: str
    rules: Rules
    histories: int
    unless: str = ""


def io(*broken, **more):
    return Rules(broken=frozenset(broken), **more)


MUTANTS = {
    "vote before sync": Mutant(
        "P1: the vote leaves before the record is durable", io("vote-before-sync"), 1_000
    ),
    "no cut": Mutant("P1: it votes whatever it has applied", io("no-barrier", owner=WithoutCut), 100),
    "late prepare": Mutant("P1: an attempt older than one that it has seen", Rules(TakesLatePrepares), 4_000),
    "changes while prepared": Mutant(
        "P2: changes go on, and the decision clears all marks",
        io("all-marks-cleared", owner=ChangesWhilePrepared),
        1_000,
    ),
    "one vote too few": Mutant("P3: one vote too few is enough", Rules(coordinator=DecidesWithoutOne), 200),
    "any vote": Mutant("P3: votes of any attempt and incarnation", Rules(coordinator=CountsAnyVote), 4_000),
    "told first": Mutant(
        "P3: told before it is durable",
        Rules(coordinator=TellsFirst, copies="partitions"),
        4_000,
    ),
    "abort alone": Mutant("P5: who comes up in doubt drops what it prepared", io("abort-alone"), 1_000),
    "commit alone": Mutant("P5: who comes up in doubt commits what it prepared", io("commit-alone"), 1_000),
    "by number": Mutant(
        "P5: an attempt is decided by its number alone",
        Rules(DecidesByNumber),
        4_000,
        "P1: who votes for an attempt drops the ones before, so there is no other of that number",
    ),
    "no claim": Mutant(
        "C1: owners obey any coordinator",
        Rules(ObeysAnybody, copies="heads"),
        4_000,
    ),
    "no claim, any era": Mutant(
        "C1 and E1",
        Rules(ObeysAnybodyInAnyEra, copies="heads"),
        4_000,
        "P1: the cut names the lives of trainers in this era",
    ),
    "two coordinators": Mutant(
        "S2 and C1: two on one head, owners obey both", io("no-head-lock", owner=ObeysAnybody), 10_000
    ),
    "status before claim": Mutant(
        "C2: what owners said before the claim counts",
        Rules(coordinator=BelievesTheFirstStatus, copies="heads"),
        4_000,
    ),
    "head alone": Mutant("C3: only the head counts", Rules(coordinator=BelievesTheHead), 1_000),
    "dropped at take-over": Mutant(
        "C3: what is prepared is dropped", Rules(coordinator=DropsAtTakeOver), 200
    ),
    "any era": Mutant(
        "E1: owners serve requests of any era",
        Rules(ServesAnyEra),
        4_000,
        "P1: the cut names the lives of trainers in this era",
    ),
    "no rollback": Mutant("E2: an era begins without going back", Rules(DoesNotRollBack), 200),
    "begin again": Mutant(
        "E2: a begin that comes twice rolls back twice",
        Rules(BeginsAgain),
        4_000,
        "P1: the cut, for the owner has forgotten its changes",
    ),
    "stale commit": Mutant(
        "E3: a commit of an older era is taken",
        Rules(coordinator=TakesAnyCommit, copies="heads"),
        4_000,
        "P1: the cut names the lives of trainers in their era",
    ),
    "applied again": Mutant("E4: an update that is sent again is applied again", Rules(AppliesAgain), 100),
    "joined again": Mutant(
        "E5: a trainer joins the era in which it had died", Rules(LetsTrainersJoinAgain), 1_000
    ),
    "old copy": Mutant(
        "S1: a partition at another commit is taken",
        Rules(StartsFromAnything, TakesAnyPartition, copies="partitions"),
        200,
    ),
    "empty disk": Mutant(
        "S1: an owner without its disk begins with an empty one",
        io("empty-disk", owner=StartsFromAnything, coordinator=TakesEmptyPartitions),
        1_000,
    ),
    "no lock": Mutant(
        "S2: two processes have one partition open",
        io("no-lock", copies="partitions"),
        10_000,
    ),
    "folded prepared": Mutant("L1: a fold takes images that are not decided", io("fold-prepared"), 1_000),
    "log let go": Mutant("L1: a fold lets the log of what is prepared go", io("recycle-prepared"), 1_000),
    "head not synced": Mutant(
        "H1: the opening does not sync what it relies on",
        io("head-not-synced", copies="partitions"),
        4_000,
        "C3: the partitions have it",
    ),
    "told first, head alone": Mutant(
        "P3 and C3", Rules(coordinator=TellsFirstAndBelievesTheHead, copies="neither"), 1_000
    ),
    "head not synced, head alone": Mutant(
        "H1 and C3",
        io("head-not-synced", coordinator=BelievesTheHead, copies="neither"),
        4_000,
    ),
}


@dataclass
class Noticed:
    """What became of the histories of a mutant."""

    histories: int = 0
    wrong: int = 0
    stuck: int = 0
    first: str = ""

    def __str__(self):
        return f"wrong {self.wrong:5,} stuck {self.stuck:5,} of {self.histories:6,}  {self.first[:110]}"


def tried(name, histories, first_seed=0, enough=None):
    """Run a mutant until `enough` histories are wrong or stuck."""
    found = Noticed()
    for seed in range(first_seed, first_seed + histories):
        found.histories += 1
        try:
            World(seed, MUTANTS[name].rules).run()
        except (WrongError, StuckError) as error:
            found.wrong += isinstance(error, WrongError)
            found.stuck += isinstance(error, StuckError)
            found.first = found.first or f"{seed}: {error}"
            if enough is not None and found.wrong + found.stuck >= enough:
                break
    return found
