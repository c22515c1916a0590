"""A world for the machines of a distributed store: disks, processes, a network, whatever can happen to them, a checker.

Owners (one partition each, with a log on a disk), coordinators (with a head on a disk), trainers, and a network that
delays, loses, doubles and reorders messages. Processes are killed, also between two effects, lose power, are paused and
go on later; disks are full; heads and partitions are copied; owners come up without their disk. What they do is
decided by the machines of `shardemb.protocol` alone. A state is the tuple of the updates that it contains, in order.

Checked: every acknowledged commit holds exactly the updates acknowledged before it, each once, in all partitions; reads
of its era were right; no commit is decided twice, or without all owners. After the end of all processes one coordinator
comes up with all partitions at one commit, the last acknowledged one or a later one, to the update.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

from shardemb.protocol import messages as say
from shardemb.protocol.coordination import Coordinator
from shardemb.protocol.era import Owner, Trainer

PARTS, TRAINERS = 3, 2
HEAD = "head"
START = (0, None)


class WrongError(Exception):
    """An acknowledged commit is lost or mixed, or was read as it never was."""


class StuckError(Exception):
    """It does not come up any more, though nothing is lost."""


@dataclass(frozen=True)
class Rules:
    """What runs in the world; a mutant has other machines, or breaks something of the I/O around them.

    Attributes
    ----------
    owner, coordinator : type
        The machines.
    broken : frozenset of str
        What the world does wrong, by the names that it asks for.
    copies : {None, "heads", "partitions", "neither"}
        What is copied in each history; None leaves it to chance. Never both: an old copy of a head and an old copy of a
        partition at once are not survived.
    """

    owner: type = Owner
    coordinator: type = Coordinator
    broken: frozenset = frozenset()
    copies: str | None = None


# ---- disks


class Disk:
    """A partition's folder."""

    def __init__(self, part, known=True):
        self.part, self.known = part, known
        self.base = START, ()
        self.log, self.synced, self.locked = [], 0, None

    def copy(self):
        new = Disk(self.part, self.known)
        new.base, new.log = self.base, self.log[: self.synced]
        new.sync()
        return new

    def sync(self):
        self.synced = len(self.log)

    def lose_power(self, r):
        self.log = self.log[: r.randint(self.synced, len(self.log))]
        self.sync()

    def replay(self):
        """Return the last commit, its state, what is prepared and the state of that."""
        (last, state), prepared, images = self.base, None, None
        for kind, attempt, its_state in self.log:
            if kind == "prepared":
                prepared, images = attempt, its_state
            elif prepared == attempt:
                last, state, prepared = attempt, images, None
        return last, state, prepared, images

    def fold(self, broken):
        """Move what is committed into the files and let the log before go; L1: nothing prepared, nothing lost."""
        last, state, prepared, images = self.replay()
        keep = [] if prepared is None or "recycle-prepared" in broken else [("prepared", prepared, images)]
        if prepared is not None and "fold-prepared" in broken:
            last, state, keep = prepared, images, []
        self.base, self.log = (last, state), keep
        self.sync()


class HeadDisk:
    """The coordinator's folder: epoch and last commit, replaced as a whole; what a crash leaves, and what is read."""

    def __init__(self, durable=(0, START)):
        self.durable = self.cached = durable
        self.locked = None

    def sync(self):
        self.durable = self.cached

    def lose_power(self, r):
        self.cached = self.durable = r.choice((self.durable, self.cached))


# ---- what trainers and coordinators say to each other


@dataclass(frozen=True)
class AskEra:
    pass


@dataclass(frozen=True)
class TheEra:
    era: tuple
    owners: dict
    coordinator: str


@dataclass(frozen=True)
class EndEra:
    era: tuple


@dataclass(frozen=True)
class CallCommit:
    era: tuple
    cut: tuple


@dataclass(frozen=True)
class Acknowledged:
    era: tuple
    attempt: tuple
    cut: tuple


@dataclass(frozen=True)
class NotCommitted:
    era: tuple


@dataclass(frozen=True)
class StoreRefused:
    """The store has refused a change, and is as before."""

    part: int
    change: say.Change


@dataclass(frozen=True)
class Rows:
    era: tuple
    part: int
    rows: tuple
    asked: tuple


# ---- processes: the I/O around the machines


class DiskFullError(Exception):
    pass


class ChangeError(Exception):
    pass


class OwnerProcess:
    def __init__(self, world, disk):
        self.w, self.disk, self.id = world, disk, world.fresh("o")
        self.alive, self.paused = True, False
        disk.locked = self.id
        self.last, self.committed, prepared, images = disk.replay()
        if prepared is not None:
            world.seen["openings in doubt"] += 1
        if prepared is not None and "commit-alone" in world.broken:
            disk.log.append(("decided", prepared, None))
            self.last, self.committed, prepared = prepared, images, None
        if "abort-alone" in world.broken:
            prepared = None
        self.now, self.dirty, self.images = self.committed, (), None
        known = disk.known or "empty-disk" in world.broken
        identity = (HEAD, disk.part, PARTS) if known else None
        self.machine = world.rules.owner(disk.part, self.id, identity, say.Status(self.last, prepared))

    @property
    def part(self):
        return self.disk.part

    def handle(self, sender, request):
        effects = list(self.machine.handle(request))
        first = True
        while effects:
            if not first and self.w.strikes():
                self.w.kill(self)
                return
            first, effect = False, effects.pop(0)
            try:
                self.carry_out(sender, effect)
            except DiskFullError:
                self.images = None
                effects = list(self.machine.fail_to_prepare("the disk is full"))
            except ChangeError:
                self.machine.take_back(effect.change)
                self.w.send(self.id, sender, StoreRefused(self.part, effect.change))
                return

    def carry_out(self, sender, effect):
        match effect:
            case say.Open(decided):
                _, _, prepared, self.images = self.disk.replay()
                if prepared == decided:
                    self.decide_images(prepared)
                self.now, self.dirty, self.images = self.committed, (), None
            case say.Rollback():
                self.now, self.dirty = self.committed, ()
            case say.PrepareImages(attempt):
                self.prepare_images(attempt)
            case say.DecideImages():
                self.decide_images(self.machine.status.last)
            case say.AbandonImages():
                self.images = None
            case say.Apply(change):
                if "?" in change.what and self.w.r.random() < 0.8:
                    raise ChangeError
                self.now += (change.what,)
                self.dirty += (change.what,)
            case say.Serve(read):
                self.w.send(self.id, sender, Rows(read.era, self.part, self.now, read.what))
            case say.Wait(request):
                self.w.put(sender, self.id, request)
            case say.Reply(answer):
                self.w.send(self.id, sender, answer)

    def prepare_images(self, attempt):
        state = self.committed + self.dirty
        full = self.w.strikes()
        if not full or self.w.r.random() < 0.5:
            self.disk.log.append(("prepared", attempt, state))
            self.w.proposed.setdefault(attempt, {})[self.part] = state
        if full:
            self.w.seen["full disks"] += 1
            raise DiskFullError
        if "vote-before-sync" not in self.w.broken:
            self.disk.sync()
        self.images = state

    def decide_images(self, attempt):
        """P4: not synced, for the head knows; and exactly what was packed counts as changed no more."""
        self.disk.log.append(("decided", attempt, None))
        packed = len(self.images) - len(self.committed)
        kept = () if "all-marks-cleared" in self.w.broken else self.dirty[packed:]
        self.committed, self.dirty, self.images = self.images, kept, None


class CoordinatorProcess:
    def __init__(self, world, disk):
        self.w, self.disk, self.id = world, disk, world.fresh("c")
        self.alive, self.paused = True, False
        disk.locked = self.id
        if "head-not-synced" not in world.broken:
            disk.sync()  # H1
            world.decide(disk.durable[1])
        self.machine = world.rules.coordinator(HEAD, PARTS, self.id, *disk.cached)
        self.call, self.by, self.effects, self.writing = None, None, [], False
        world.seen["coordinators"] += 1
        self.do(self.machine.start())

    @property
    def busy(self):
        """Whether a write of the head is under way: the machine is not used until that is durable."""
        return self.writing

    def do(self, effects):
        self.effects += effects
        while self.effects and self.alive and not self.writing:
            if self.w.strikes(0.2):
                self.w.kill(self)
                return
            self.carry_out(self.effects.pop(0))

    def carry_out(self, effect):
        match effect:
            case say.Send(_, incarnation, request):
                self.w.send(self.id, incarnation, request)
            case say.WriteHead(epoch, decided):
                opened = decided == self.disk.cached[1]
                self.disk.cached = epoch, decided
                if not (opened and "head-not-synced" in self.w.broken):
                    self.writing = True
                    if self.w.settling or self.w.r.random() < 0.3:
                        self.finish_write()
            case say.Served(era, decided):
                self.w.bases[era] = decided
                self.w.seen["eras"] += 1
            case say.Committed(_, attempt):
                (sender, call), self.call = self.call, None
                self.w.send(self.id, sender, Acknowledged(call.era, attempt, call.cut))
            case say.CommitFailed():
                if self.call is not None:
                    (sender, call), self.call = self.call, None
                    self.w.send(self.id, sender, NotCommitted(call.era))
            case say.RefusedPartition():
                self.w.seen["partitions refused"] += 1
            case say.Overtaken(by):
                self.by = by
                if self.w.settling:
                    self.outbid()

    def finish_write(self):
        self.disk.sync()
        self.w.decide(self.disk.durable[1])
        self.writing = False

    def outbid(self):
        by, self.by = self.by, None
        self.do(self.machine.outbid(by))

    def handle(self, sender, message):
        match message:
            case AskEra():
                if self.machine.serving:
                    self.w.send(self.id, sender, TheEra(self.machine.era, self.machine.owners, self.id))
            case EndEra(era):
                self.do(self.machine.end(era, "a trainer was lost"))
            case CallCommit(era, cut):
                if self.machine.preparing or not self.machine.serving:
                    return
                self.call = sender, message
                attempt = self.machine.commit(era, cut)
                self.w.seen["attempts"] += isinstance(attempt[0], say.Send)
                self.do(attempt)
            case say.Answer():
                before = self.machine.decided
                effects = self.machine.handle(message)
                if self.machine.decided != before and isinstance(message, say.Claimed):
                    self.w.seen["commits decided at take-over"] += 1
                self.do(effects)

    def tick(self):
        r, machine = self.w.r, self.machine
        if self.writing:
            self.finish_write()
            self.do(())
        elif self.by is not None:
            if r.random() < 0.5:
                self.outbid()
        elif machine.preparing and r.random() < 0.08:
            self.do(machine.give_up("it takes too long"))
        elif machine.owners and r.random() < 0.01:
            self.w.seen["suspicions"] += 1
            part = r.choice(sorted(machine.owners))
            self.do(machine.lose(part, machine.owners[part], "no answer"))
        else:
            self.ask_again()

    def ask_again(self):
        if self.machine.missing:
            for owner in self.w.owners:
                if owner.alive and (self.w.settling or self.w.r.random() < 0.7):
                    self.w.send(self.id, owner.id, say.Who())
        self.do(self.machine.again())


class TrainerProcess:
    def __init__(self, world, number):
        self.w, self.name, self.id = world, f"trainer {number}", f"t{number}"
        self.alive, self.paused = True, False
        self.forget()

    def forget(self):
        """Start again, without what it knew."""
        self.machine, self.owners, self.coordinator = None, {}, None
        self.flying, self.refused = None, set()

    @property
    def era(self):
        return None if self.machine is None else self.machine.era

    def step(self):
        w, r = self.w, self.w.r
        if self.machine is None:
            alive = [each for each in w.coordinators if each.alive]
            if alive:
                w.send(self.id, r.choice(alive).id, AskEra())
            return
        if self.machine.waiting:
            self.send_change()
            return
        x = r.random()
        if x < 0.45:
            self.flying = self.machine.change(w.fresh("u?" if r.random() < 0.1 else "u"))
            self.refused = set()
            self.send_change()
        elif x < 0.6:
            read = say.Read(self.era, (self.machine.trainer, self.machine.made))
            w.send(self.id, self.owners[r.randrange(PARTS)], read)
        elif x < 0.8:
            self.call_commit()
        elif x < 0.83:
            self.forget()  # it died, with a change made in some partitions perhaps

    def call_commit(self):
        w, r = self.w, self.w.r
        machines = [each.machine for each in w.trainers]
        if any(machine is None or machine.era != self.era for machine in machines):
            return
        barrier = (
            "no-barrier" not in w.broken and r.random() < 0.8
        )  # now and then it is left out, and owners notice
        if barrier and any(machine.waiting for machine in machines):
            return
        cut = tuple(sorted((machine.trainer, machine.made) for machine in machines if machine.made))
        w.send(self.id, self.coordinator, CallCommit(self.era, cut))

    def send_change(self):
        for part, owner in self.owners.items():
            if part in self.machine.waiting and self.w.r.random() < 0.8:
                self.w.send(self.id, owner, self.flying)

    def handle(self, sender, message):
        match message:
            case TheEra(era, owners, coordinator):
                if self.machine is None:
                    self.machine = Trainer((self.name, self.w.fresh("l")), era, PARTS)
                    self.owners, self.coordinator = owners, coordinator
            case _ if self.machine is None:
                pass
            case say.Applied() | say.Refused():
                self.take(message)
            case StoreRefused(part, change) if change == self.flying:
                self.take_refusal(part)
            case Rows(era, part, rows, (trainer, made)) if trainer == self.machine.trainer:
                base = self.w.state_of(self.w.bases[era], part)
                own = self.w.acked_until(era, trainer, made)
                self.w.reads.setdefault(era, []).append(rows[: len(base)] == base and set(own) <= set(rows))
            case Acknowledged(era, attempt, cut) if era == self.era:
                self.w.acknowledge(era, attempt, cut)
            case NotCommitted(era) if era == self.era and self.w.r.random() < 0.3:
                self.w.send(self.id, self.coordinator, EndEra(era))

    def take_refusal(self, part):
        """Take the change back if all have refused it; if some have made it, the era is over."""
        self.refused.add(part)
        if len(self.refused) == PARTS == len(self.machine.waiting):
            self.machine.take_back()
            self.w.seen["changes taken back"] += 1
        elif self.machine.waiting and self.machine.waiting <= self.refused:
            self.w.send(self.id, self.coordinator, EndEra(self.era))
            self.forget()

    def take(self, answer):
        made, machine = self.machine.made, self.machine
        machine.handle(answer)
        if machine.made > made:
            self.w.acked.setdefault((self.era, machine.trainer), []).append((machine.made, self.flying.what))
        elif machine.ended is not None:
            self.w.send(self.id, self.coordinator, EndEra(self.era))
            self.forget()


# ---- the world


@dataclass
class Envelope:
    sender: str
    to: str
    message: object
    at: int


@dataclass
class World:
    seed: int
    rules: Rules = field(default_factory=Rules)
    trace: bool = False

    def __post_init__(self):
        self.r = r = random.Random(self.seed)
        self.broken = self.rules.broken
        self.number, self.time, self.net, self.settling = 0, 0, [], False
        self.seen, self.parts = Counter(), {}
        self.proposed, self.decisions, self.reads, self.bases = {}, {}, {}, {}
        self.acked = {}
        self.acknowledged = START
        self.disks = [[Disk(part)] for part in range(PARTS)]
        self.heads = [HeadDisk()]
        self.owners, self.coordinators = [], []
        self.trainers = [TrainerProcess(self, number) for number in range(TRAINERS)]
        by_chance = r.choices(("heads", "partitions", "neither"), (35, 35, 30))[0]
        self.copies = self.rules.copies or by_chance
        self.faults = r.choice((0.005, 0.015, 0.04))
        self.slow, self.loss, self.double = (
            r.choice((0, 0.1, 0.25)),
            r.choice((0, 0.05, 0.2)),
            r.choice((0, 0.1, 0.3)),
        )

    def fresh(self, kind):
        self.number += 1
        return f"{kind}{self.number:05d}"

    def say(self, *words):
        if self.trace:
            print(self.time, *words)

    def strikes(self, share=0.3):
        """Whether something fails just now."""
        return not self.settling and self.r.random() < self.faults * share

    # ---- the network

    def send(self, sender, to, message):
        if self.settling:
            self.put(sender, to, message)
            return
        if self.r.random() >= self.loss:
            self.put(sender, to, message)
            if self.r.random() < self.double:
                self.put(sender, to, message)

    def put(self, sender, to, message):
        slow = not self.settling and self.r.random() < self.slow
        self.net.append(Envelope(sender, to, message, self.time + (self.r.randint(5, 90) if slow else 0)))

    def deliver(self):
        for _ in range(3):
            if not self.net:
                return
            at = self.r.randrange(len(self.net)) if self.r.random() < 0.6 else 0
            if self.settling or self.net[at].at <= self.time:
                break
        else:
            return
        letter = self.net.pop(at)
        process = self.addressee(letter.to)
        if process is None:
            return
        if process.paused or getattr(process, "busy", False):
            self.net.append(letter)
            return
        self.say(process.id, "<-", letter.sender, letter.message)
        process.handle(letter.sender, letter.message)

    def addressee(self, name):
        """The process of that name; or another owner of the same partition, which got its address."""
        everybody = [each for each in (*self.owners, *self.coordinators, *self.trainers) if each.alive]
        for each in everybody:
            if each.id == name:
                return each
        if self.r.random() < 0.3:
            for owner in self.owners:
                if owner.alive and owner.part == self.parts.get(name):
                    return owner
        return None

    # ---- what is checked

    def state_of(self, decided, part):
        return () if decided == START else self.proposed[decided].get(part, ())

    def decide(self, decided):
        if decided == START:
            return
        if self.decisions.setdefault(decided[0], decided) != decided:
            raise WrongError(
                f"commit {decided[0]} was decided twice: {self.decisions[decided[0]]} and {decided}"
            )
        if len(self.proposed.get(decided, ())) < PARTS:
            raise WrongError(f"commit {decided} was decided without all owners")

    def acked_until(self, era, trainer, made):
        return [update for number, update in self.acked.get((era, trainer), ()) if number <= made]

    def acknowledge(self, era, attempt, cut):
        self.seen["acknowledged commits"] += 1
        states = [self.state_of(attempt, part) for part in range(PARTS)]
        for trainer, made in cut:
            for update in self.acked_until(era, trainer, made):
                if any(state.count(update) != 1 for state in states):
                    raise WrongError(f"acknowledged commit {attempt} has {update} {states} times")
        if len({tuple(sorted(state)) for state in states}) > 1:
            raise WrongError(f"acknowledged commit {attempt} is mixed: {states}")
        for right in self.reads.pop(era, ()):
            self.seen["reads checked"] += 1
            if not right:
                raise WrongError(f"a read in the era {era} of commit {attempt} was stale")
        self.acknowledged = max(self.acknowledged, attempt, key=lambda each: each[0])

    def check(self, machine):
        """All owners are at one commit, the last acknowledged one or a later one, with exactly what it was to hold."""
        decided, last = machine.decided, self.acknowledged
        if decided[0] < last[0] or (decided[0] == last[0] and decided != last):
            raise WrongError(f"opened at {decided}, acknowledged was {last}")
        owners = {
            each.part: each for each in self.owners if each.alive and machine.owners.get(each.part) == each.id
        }
        found = {part: self.state_of(decided, part) for part in range(PARTS)}
        for part, owner in sorted(owners.items()):
            at, state, prepared, images = owner.disk.replay()
            if decided not in (at, prepared):
                raise WrongError(f"partition {part} is at {at}, not at {decided}")
            held = {images if at != decided else state, owner.committed, owner.now}
            if held != {found[part]}:
                raise WrongError(f"partition {part} holds {held}, commit {decided} had {found[part]}")
            acked = self.state_of(last, part)
            if found[part][: len(acked)] != acked:
                raise WrongError(f"partition {part} lost what commit {last} had")
            if len(set(found[part])) < len(found[part]):
                raise WrongError(f"partition {part} has an update twice")
            if set(found[part]) != set(found[0]):
                raise WrongError(
                    f"an update is in partition {part} or 0 only: {set(found[part]) ^ set(found[0])}"
                )
        if len(owners) < PARTS:
            raise WrongError("an owner is missing")

    # ---- what happens

    def start_owner(self, disk):
        if disk.locked is not None and "no-lock" not in self.broken:
            return  # S2
        owner = OwnerProcess(self, disk)
        self.parts[owner.id] = owner.part
        self.owners = [each for each in self.owners if each.alive] + [owner]
        self.say("owner", owner.id, "of", disk.part, "opens", owner.machine.status)
        for each in self.coordinators:
            if each.alive:
                owner.handle(each.id, say.Who())

    def start_coordinator(self, head):
        if head.locked is not None and "no-head-lock" not in self.broken:
            return
        process = CoordinatorProcess(self, head)
        self.coordinators = [each for each in self.coordinators if each.alive] + [process]
        self.say("coordinator", process.id, "opens", process.machine.decided)
        if process.alive and not process.busy:
            process.ask_again()

    def kill(self, process):
        power = self.r.random() < 0.5
        self.seen["power losses" if power else "kills"] += 1
        self.say("power loss" if power else "kill", process.id)
        process.alive = False
        if process.disk.locked == process.id:
            process.disk.locked = None
        if power:
            process.disk.lose_power(self.r)

    def fault(self):
        r, x = self.r, self.r.random()
        owners = [each for each in self.owners if each.alive]
        coordinators = [each for each in self.coordinators if each.alive]
        if x < 0.25 and owners:
            self.kill(r.choice(owners))
        elif x < 0.40 and coordinators:
            self.kill(r.choice(coordinators))
        elif x < 0.60 and owners + coordinators:
            process = r.choice(owners + coordinators)
            process.paused = not process.paused
            self.seen["pauses"] += process.paused
        elif x < 0.75 and owners:
            owner = r.choice(owners)
            if not owner.paused:
                owner.disk.fold(self.broken)
                self.seen["folds"] += 1
        elif x < 0.90 and self.copies == "heads" and len(self.heads) < 3:
            self.heads.append(HeadDisk(r.choice(self.heads).durable))
            self.seen["copies of heads"] += 1
        elif x < 0.97 and self.copies == "partitions":
            disks = r.choice(self.disks)
            if len(disks) < 3:
                disks.append(r.choice(disks).copy())
                self.seen["copies of partitions"] += 1
        else:
            self.start_owner(Disk(r.randrange(PARTS), known=False))
            self.seen["openings without disk"] += 1

    def run(self, steps=400):
        r = self.r
        self.start_coordinator(self.heads[0])
        for disks in self.disks:
            self.start_owner(disks[0])
        for self.time in range(steps):
            x = r.random()
            if x < self.faults:
                self.fault()
            elif x < self.faults + 0.10:
                self.restart()
            elif x < self.faults + 0.25:
                process = r.choice(self.coordinators)
                if process.alive and not process.paused:
                    process.tick()
            elif x < self.faults + 0.45:
                r.choice(self.trainers).step()
            else:
                for _ in range(r.choice((1, 2, 4, 8))):
                    self.deliver()
        self.settle()
        self.seen["histories"] += 1
        return self.seen

    def restart(self):
        r = self.r
        for process in (*self.owners, *self.coordinators):
            if process.paused and r.random() < 0.3:
                process.paused = False
        if not any(each.alive for each in self.coordinators) or r.random() < (
            0.2 if self.copies == "heads" else 0.05
        ):
            self.start_coordinator(r.choice(self.heads))
        part = r.randrange(PARTS)
        served = any(each.alive and each.part == part and each.disk.known for each in self.owners)
        if not served or r.random() < (0.4 if "no-lock" in self.broken else 0.03):
            self.start_owner(r.choice(self.disks[part]))

    def settle(self):
        """End all processes, start one coordinator and all copies of partitions, and see where it comes to."""
        for process in (*self.owners, *self.coordinators):
            if process.alive:
                self.kill(process)
        self.settling, self.owners, self.coordinators, self.net = True, [], [], []
        for trainer in self.trainers:
            trainer.forget()
        self.start_coordinator(self.r.choice(self.heads))
        (process,) = self.coordinators
        machine = process.machine
        everything = [disk for disks in self.disks for disk in disks]
        self.r.shuffle(everything)
        for turn in range(60):
            for disk in everything:
                self.let_come(disk, machine)
            if machine.serving:
                self.check(machine)
                return
            process.ask_again()
            self.deliver_all()
            if machine.missing and turn % 3 == 2:  # other copies get their turn
                for owner in self.owners:
                    if owner.alive and machine.owners.get(owner.part) != owner.id:
                        self.kill(owner)
                self.r.shuffle(everything)
        held = [(disk.part, disk.replay()) for disk in everything]
        raise StuckError(
            f"it does not come up: {machine.decided}, {machine.request}, {machine.owners}, {held}"
        )

    def let_come(self, disk, machine):
        """Open a copy of a partition that has no owner; close it if another copy has been taken."""
        have = machine.owners.get(disk.part)
        opened = [each for each in self.owners if each.alive and each.disk is disk]
        if have is None and not opened:
            self.start_owner(disk)
        elif have is not None and opened and have != opened[0].id:
            self.kill(opened[0])
        self.deliver_all()

    def deliver_all(self):
        for _ in range(10_000):
            if not self.net:
                return
            self.deliver()
        raise StuckError("messages without end")
