"""A workload on the simulated disk of one partition, whose commits are decided by a head that loses nothing."""

import contextlib
import os
import random
from pathlib import Path

import numpy as np
import pytest

import shardemb
from shardemb.engine import filling
from shardemb.format.manifest import PartitionIdentity
from shardemb.initializers import Uniform
from shardemb.optim import SGD, Adam
from shardemb.store.partition import Partition
from support.power_loss import (
    NOTHING,
    SITES,
    Disk,
    Recording,
    contents,
    digest,
    is_about_partitions,
    leaving_out,
    lower_limits,
    materialise,
    scratch,
)
from support.witnesses import WITNESSES

STATES = int(os.environ.get("SHARDEMB_STATES", "1500")) // 5

WORKLOADS = 4

ROWS, DIM = 200, 16

IDENTITY = PartitionIdentity("0b5f4a2e-54b1-4a52-8f0c-0d2b8f3c1e11", number=1, count=3)

ENDS = ["decided"] * 4 + ["abandoned", "rolled back", "in doubt", "in doubt, decided", "reopened"]
"""What becomes of what is prepared."""


def work(path, seed, recording):
    """Train, prepare, and let the head decide or not; note when it decides what, and what each commit would hold."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    options = {
        "log_bytes": chance.choice([1, 60_000, 2**30]),
        "memory_budget": chance.choice([0, 2**30]),
        "threads": 1,
    }
    recording.expected = {(0, None): NOTHING}
    part = Partition.create(path, IDENTITY)
    last = 0, None
    store = part.open(last, **options)
    recording.acknowledged.append((len(recording.operations), last))

    def new(name):
        more = chance.choice([{}, {"initializer": Uniform(-1, 1, seed=1)}])
        optimizer = chance.choice([SGD(lr=0.5), Adam(lr=0.1)])
        store.create_table(
            name, num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=64, optimizer=optimizer, **more
        )

    new("a")
    for step in range(1, 10):
        change(store, new, step, chance, rng)
        following = last[0] + 1, (1, "head", step)
        recording.expected[following] = (following[0], step, ()), contents(store)[1]
        part.prepare(following, step)
        end = chance.choice(ENDS)
        if end in ("decided", "in doubt, decided", "reopened"):
            last = following
            recording.acknowledged.append((len(recording.operations), last))
        if end in ("decided", "reopened"):
            part.decide()
        elif end in ("abandoned", "rolled back"):
            part.abandon()
            if end == "rolled back":
                store.rollback()
        if end in ("in doubt", "in doubt, decided", "reopened"):
            part.close()
            part = Partition.hold(path)
            store = part.open(last, **options)
            assert contents(store) == recording.expected[last]
    with pytest.warns(RuntimeWarning) if store.has_changes else contextlib.nullcontext():
        part.close()


def change(store, new, step, chance, rng):
    """Change rows and tables; fold what is committed, now and then."""
    for table in store.values():
        ids = rng.integers(0, table.num_embeddings, chance.choice([1, 20, 100]))
        table.update(ids, rng.normal(size=(ids.size, DIM)).astype(np.float32))
    what = chance.choice(["", "", "fold", "new", "drop", "resize", "fill"])
    if what == "fold":
        store.checkpoint()
    elif what == "new" or not len(store):
        new(f"n{step}")
    elif what == "drop":
        store.drop_table(chance.choice(list(store)))
    elif what == "resize":
        store[chance.choice(list(store))].resize(chance.choice([100, 260]), drop_rows=True)
    elif what == "fill":
        new(f"f{step}")
        store[f"f{step}"].write(np.arange(ROWS), rng.random((ROWS, DIM), np.float32))


def decided_at(recording, point, chance):
    """Return what the head has decided when the power goes before operation `point`; None before there is a partition.

    At the very moment of a decision, it may be either.
    """
    before = [(when, each) for when, each in recording.acknowledged if when <= point]
    if len(before) > 1 and before[-1][0] == point and chance.random() < 0.5:
        before.pop()
    return before[-1][1] if before else None


def explore(seed, number_of_states, *, again=0.3, kill=0.3, skip=lambda call, path: False):
    """Crash the workload at random points; the first bad state is an `AssertionError`. Return how many there were."""
    chance, seen = random.Random(seed), set()
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        lower_limits(patch, seed)
        patch.setattr(filling, "LEAST_BYTES", 4096)
        (Path(folder) / "store").mkdir()
        disk, done = (
            Disk.of(folder),
            0,
        )  # no file system of the simulation syncs the name of the store's own folder
        recording = Recording(folder, skip)
        with recording.on():
            work(Path(folder) / "store", seed, recording)
        votes = [when for when, _ in recording.acknowledged]
        points = recording.points(chance, number_of_states - number_of_states // 3)
        for point in sorted(points + chance.choices(votes, k=number_of_states // 3)):
            for operation in recording.operations[done:point]:
                disk.apply(*operation)
            done = point
            decided = decided_at(recording, point, chance)
            try:
                crash(disk, decided, recording.expected, chance, seen, skip, chance.random() < again, kill)
            except Exception as error:
                raise AssertionError(f"seed {seed}, operation {point}: {error!r}") from error
    return len(seen)


def crash(disk, decided, expected, chance, seen, skip, again, kill):
    """Let the power go, or the process be killed, and look at what there is; then maybe again, within the opening."""
    killed = chance.random() < kill
    state, numbers = disk.killed() if killed else (disk.crash(chance), None)
    numbers = numbers or {name: disk.found[name] for name, data in state.items() if data is not None}
    seen.add(digest(state))
    with scratch() as folder:
        materialise(state, folder, numbers)
        left = disk.moved(numbers, folder) if killed else Disk.of(folder)
        recording = Recording(folder, skip)
        with recording.on() if again or killed else contextlib.nullcontext():
            relied_on = look(Path(folder) / "store", decided, expected, chance, recording)
        if relied_on is None or not (again or killed):
            return
        decided, since = relied_on
        for operation in recording.operations[: chance.randrange(since, len(recording.operations) + 1)]:
            left.apply(*operation)
        with scratch() as other:
            state = left.crash(chance)
            materialise(state, other, {n: left.found[n] for n, data in state.items() if data is not None})
            look(Path(other) / "store", decided, expected, chance, None)


def look(path, decided, expected, chance, recording):
    """Open a partition at what was decided, compare it, and go on with it.

    Returns what is decided by then, and from which operation on: who has prepared the next commit may learn that all
    others have too, so that it is decided.
    """
    if decided is None and not (path / ".shardemb" / "manifest.json").exists():
        return None
    acknowledged, decided = decided, decided or (0, None)
    with shardemb.open(path, "r", threads=1) as reader:
        read = contents(reader)
    with Partition.hold(path) as part:
        status = part.status
        assert read == expected[status.decided], "a reader sees what is not committed"
        assert decided in (status.decided, status.prepared), f"{decided} is lost: {status}"
        since = 0
        if status.prepared is not None and status.prepared[0] == decided[0] + 1 and chance.random() < 0.5:
            decided, since = status.prepared, len(recording.operations) if recording else 0
        store = part.open(decided, threads=1)
        assert contents(store) == expected[decided], f"opens at {store.last_commit}, and not at {decided}"
        assert store.verify() == []
        if recording is None:  # others may have gone on from here already
            for table in store.values():
                ids = np.arange(table.num_embeddings)
                table.write(ids, np.full((ids.size, DIM), chance.random()))
            part.prepare((decided[0] + 1, (2, "next", 1)))
            part.decide()
            store.checkpoint()
            assert store.verify() == []
    return acknowledged and decided, since


def explore_partitions(seed):
    return explore(seed, STATES // WORKLOADS)


NEEDED = [each for each in SITES if is_about_partitions(each)]


def found_without_call(site):
    """Return what is wrong where one call is left out, as if the disk never got it."""
    return power(WITNESSES.get(site), skip=leaving_out(site))


def power(witness=None, **more):
    """Cut the power at random moments of these workloads; return what is wrong, or None."""
    for seed in range(30) if witness is None else (witness, *range(30)):
        try:
            explore(seed, 40, **more)
        except (AssertionError, shardemb.ShardEmbError) as error:
            return repr(error)
    return None
