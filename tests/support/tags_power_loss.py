"""A workload on the simulated disk that keeps commits under names, goes on, and goes back to them."""

import contextlib
import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import shardemb
from shardemb.commits import undo
from shardemb.initializers import Uniform
from shardemb.optim import SGD, Adam
from support.power_loss import (
    NOTHING,
    OTHER_REASONS,
    SITES,
    Disk,
    Recording,
    allowed_at,
    contents,
    digest,
    leaving_out,
    lower_limits,
    materialise,
    scratch,
)
from support.stores import close_quietly
from support.witnesses import WITNESSES

STATES = int(os.environ.get("SHARDEMB_STATES", "1500")) // 5


WORKLOADS = 4


ROWS, DIM = 300, 16


def tags_of(store):
    """What each tag of a store holds, for readers that begin now; they find no damage."""
    found = {}
    for name in store.tags:
        with shardemb.open(store.path, "r", commit=name, threads=1) as reader:
            assert reader.verify() == [], f"damage to the tag {name!r}"
            found[name] = contents(reader)
    return found


def work(path, seed, recording):
    """Train, commit, fold, keep, go back, give up, change tables, reopen; note what the store and each tag hold."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    options = {"log_bytes": chance.choice([1, 60_000, 2**30]), "threads": 1}
    store = shardemb.open(path, **options)
    tags = {}

    def acknowledge(what, now):
        recording.acknowledged.append((None, now))  # from here on it may be found
        what()
        recording.acknowledged.append((len(recording.operations), now))

    def new(name):
        more = chance.choice([{}, {"initializer": Uniform(-1, 1, seed=1)}])
        optimizer = chance.choice([SGD(lr=0.5), Adam(lr=0.1)])
        store.create_table(
            name, num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=64, optimizer=optimizer, **more
        )

    def commit(step):
        last = store.last_commit
        future = ((last.id if last else 0) + 1, step, ()), contents(store)[1]
        acknowledge(lambda: store.commit(step=step), (future, dict(tags)))

    def restore(name):
        last, (commit, tables) = store.last_commit, tags[name]
        metadata = (*commit[2], ("restored", {"tag": name, "commit": commit[0]}))
        metadata = tuple(dict(metadata).items())
        acknowledge(lambda: store.restore(name), (((last.id + 1, commit[1], metadata), tables), dict(tags)))

    def keep(name):
        tags[name] = contents(store)
        acknowledge(lambda: store.tag(name, replace=True), (tags[name], dict(tags)))

    recording.acknowledged.append((len(recording.operations), (NOTHING, {})))
    new("a")
    new("b")
    commit(0)
    keep("t0")
    for step in range(1, 7):
        for table in store.values():
            ids = rng.integers(0, table.num_embeddings, chance.choice([5, 60]))
            table.update(ids, rng.normal(size=(ids.size, DIM)).astype(np.float32))
        what = chance.choice(WHAT)
        if what == "resize":
            store[chance.choice(list(store))].resize(chance.choice([200, ROWS, 400]), drop_rows=True)
        elif what in ("drop", "drop and restore"):
            store.drop_table(chance.choice(list(store)))
            new(f"n{step}")
        commit(step)
        if what == "fold":
            store.checkpoint()
        elif what == "keep":
            keep(f"t{chance.randrange(3)}")
        elif what == "untag" and tags:
            name = chance.choice(sorted(tags))
            del tags[name]
            acknowledge(partial(store.untag, name), (contents(store), dict(tags)))
        elif what in ("restore", "drop and restore") and tags:
            restore(chance.choice(sorted(tags)))
        elif what == "reopen":
            close_quietly(store)
            store = shardemb.open(path, **options)
    close_quietly(store)


WHAT = [
    "fold",
    "fold",
    "keep",
    "keep",
    "untag",
    "restore",
    "restore",
    "resize",
    "drop",
    "drop and restore",
    "reopen",
]


def explore(seed, number_of_states, *, again=0.2, kill=0.2, skip=lambda call, path: False):
    """Crash the workload at random points; the first bad state is an `AssertionError`. Return how many there were."""
    chance, seen = random.Random(seed), set()
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        lower_limits(patch, seed)
        patch.setattr(undo, "WINDOW", chance.choice([3, 1024]))
        recording = Recording(folder, skip)
        with recording.on():
            work(Path(folder) / "store", seed, recording)
        disk, done = Disk(), 0
        for point in sorted(recording.points(chance, number_of_states)):
            for operation in recording.operations[done:point]:
                disk.apply(*operation)
            done = point
            allowed = allowed_at(recording, point)
            allowed = [(NOTHING, {}) if each == NOTHING else each for each in allowed]
            try:
                crash(
                    disk,
                    allowed,
                    chance,
                    seen,
                    skip=skip,
                    again=chance.random() < again,
                    kill=chance.random() < kill,
                )
            except Exception as error:
                raise AssertionError(f"seed {seed}, operation {point}: {error!r}") from error
    return len(seen)


def crash(disk, allowed, chance, seen, *, skip, again, kill):
    """Let the power go, or the process be killed, and look at what there is; then maybe again, within recovery."""
    state, numbers = disk.killed() if kill else (disk.crash(chance), None)
    numbers = numbers or {name: disk.found[name] for name, data in state.items() if data is not None}
    key = digest(state)
    if key in seen and not kill:
        return
    seen.add(key)
    with scratch() as folder:
        materialise(state, folder, numbers)
        left = disk.moved(numbers, folder) if kill else Disk.of(folder)
        recording = Recording(folder, skip)
        with recording.on() if again or kill else contextlib.nullcontext():
            look(Path(folder) / "store", allowed, chance)
        if again or kill:
            for operation in recording.operations[: recording.points(chance, 1)[0]]:
                left.apply(*operation)
            with scratch() as other:
                state = left.crash(chance)
                materialise(state, other, {n: left.found[n] for n, data in state.items() if data is not None})
                look(Path(other) / "store", allowed, chance, after=True)


def look(path, allowed, chance, *, after=False):
    """Open a store, compare it and its tags, and go on with it; `after` others may have gone on already."""
    with shardemb.open(path, threads=1) as store:
        found = contents(store), tags_of(store)
        if after:
            assert found[1] in [tags for _, tags in allowed], "the tags opens at others"
        else:
            assert found in allowed, f"opens at {found[0][0]} with {list(found[1])}, not at {allowed}"
        for table in store.values():
            table.write(
                np.arange(table.num_embeddings), np.full((table.num_embeddings, DIM), chance.random())
            )
        store.commit(step=77)
        store.checkpoint()
        assert tags_of(store) == found[1]
        assert store.verify() == []
        for name, (_, tables) in found[1].items():
            store.restore(name)
            assert contents(store)[1] == tables


def explore_tags(seed):
    return explore(seed, STATES // WORKLOADS)


def power(witness=None):
    """Cut the power at random moments of these workloads; return what is wrong, or None."""
    for seed in range(60) if witness is None else (witness, *range(60)):
        try:
            explore(seed, 40, again=0.3, kill=0.3)
        except AssertionError as error:
            return str(error)
    return None


NEEDED = [
    each for each in SITES if each.startswith(("undo.", "tags.", "tagging.")) and each not in OTHER_REASONS
]


def found_without_call(site):
    """Return what is wrong where one call is left out, as if the disk never got it."""
    witness = WITNESSES.get(site)
    for seed in range(100) if witness is None else (witness, *range(100)):
        try:
            explore(seed, 40, again=0.3, kill=0.4, skip=leaving_out(site))
        except AssertionError as error:
            return str(error)
    return None
