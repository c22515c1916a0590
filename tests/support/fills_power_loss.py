"""A workload on the simulated disk that fills tables: most of it is written before its commit."""

import contextlib
import os
import random

import numpy as np
import pytest

import shardemb
from shardemb.engine import filling
from shardemb.initializers import Uniform
from shardemb.optim import SGD, Adam
from shardemb.storage import files
from support.power_loss import (
    NOTHING,
    OTHER_REASONS,
    SITES,
    contents,
    explore,
    found_without,
    is_about_fills,
    leaving_out,
    slow_commits,
)
from support.stores import close_quietly
from support.witnesses import WITNESSES

STATES = int(os.environ.get("SHARDEMB_STATES", "1500")) // 3


WORKLOADS = 6


ROWS, DIM = 1300, 12


def lower_limits(patch, chance):
    """Let a block be enough to fill, and a few blocks be more than one piece."""
    patch.setattr(filling, "LEAST_BYTES", chance.choice([4096, 16_384]))
    patch.setattr(filling, "PIECE_BYTES", chance.choice([4096, 20_480]))
    patch.setattr(filling, "TAKEN_BACK_ROWS", 100)


def work(path, seed, recording):
    """Fill, change, fail, commit, roll back, fold, change tables, reopen; record what each commit holds."""
    with pytest.MonkeyPatch.context() as patch:
        chance = random.Random(seed)
        lower_limits(patch, chance)
        _work(path, chance, np.random.default_rng(seed), recording)


def work_behind(path, seed, recording):
    """As `work`, with commits in the background, beside which tables are filled."""
    with pytest.MonkeyPatch.context() as patch:
        chance = random.Random(seed)
        lower_limits(patch, chance)
        slow_commits(patch)
        _work(path, chance, np.random.default_rng(seed), recording, behind=True)


def _work(path, chance, rng, recording, *, behind=False):
    options = {
        "log_bytes": chance.choice([1, 100_000, 2**30]),
        "memory_budget": chance.choice([0, 2**30]),
        "warm": chance.choice([True, False]),
        "threads": 1,
    }
    store = shardemb.open(path, **options)
    recording.acknowledged.append((len(recording.operations), NOTHING))

    def commit(step):
        expected, before = contents(store)[1], store.last_commit
        future = ((before.id if before else 0) + 1, step, ()), expected
        recording.acknowledged.append((None, future))  # from here on a crash may leave this commit
        if behind:
            pending = store.commit(step=step, wait=False)
            for table in chance.sample(list(store.values()), chance.randint(0, len(store))):
                fill(table)
            pending.result()
        else:
            store.commit(step=step)
        recording.acknowledged.append((len(recording.operations), future))

    def new(name):
        store.create_table(
            name,
            num_embeddings=ROWS,
            embedding_dim=DIM,
            rows_per_shard=chance.choice([256, 512]),
            initializer=chance.choice([None, Uniform(-1, 1, seed=1)]),
            optimizer=chance.choice([None, SGD(lr=0.5), Adam(lr=0.1)]),
        )

    def fill(table):
        start = chance.randrange(table.num_embeddings)
        ids = np.arange(start, min(start + chance.choice([20, 200, 700]), table.num_embeddings))
        table.write(ids, rng.normal(size=(ids.size, DIM)).astype(np.float32))

    new("a")
    new("b")
    if chance.random() < 0.3:  # tables that no commit has yet
        fill(store["a"])
        fill(store["b"])
    commit(0)
    for step in range(1, 7):
        for table in store.values():
            for _ in range(chance.choice([1, 1, 3])):
                fill(table)
            if chance.random() < 0.5:
                ids = rng.integers(0, table.num_embeddings, chance.choice([1, 20]))
                table.write(ids, rng.normal(size=(ids.size, DIM)).astype(np.float32))
        what = chance.choice(WHAT)
        if what == "rollback":
            store.rollback()
            fill(store[chance.choice(list(store))])
        elif what == "checkpoint":
            commit(step)
            for table in store.values():
                fill(table)
            store.checkpoint()
        elif what == "fail":
            with failing(chance):
                fill(store[chance.choice(list(store))])
        elif what == "resize":
            store[chance.choice(list(store))].resize(chance.choice([600, ROWS + 500]), drop_rows=True)
        elif what == "drop" and len(store) > 1:
            store.drop_table(chance.choice(list(store)))
            new(f"t{step}")
        elif what == "rename":
            store.rename_table(chance.choice(list(store)), f"r{step}")
        elif what == "reopen":
            close_quietly(store)
            store = shardemb.open(path, **options)
        if chance.random() < 0.8:
            commit(step)
    close_quietly(store)


WHAT = ["", "", "rollback", "rollback", "checkpoint", "fail", "resize", "drop", "rename", "reopen"]


@contextlib.contextmanager
def failing(chance):
    """Let a write to a shard fail in the block, so that the call in it raises, if there is any."""
    real, left = files.write, [chance.randrange(3)]

    def write(descriptor, data, offset, path):
        if "/rows/" in str(path):
            left[0] -= 1
            if left[0] < 0:
                raise shardemb.DiskFullError(28, "no space left, for a test")
        real(descriptor, data, offset, path)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(shardemb.DiskFullError):
        patch.setattr(files, "write", write)
        yield


def explore_fills(seed):
    return explore(seed, STATES // WORKLOADS, work=work, readers=True)


def explore_fills_behind(seed):
    return explore(seed, STATES // WORKLOADS, work=work_behind, readers=True)


def power(witness=None):
    """Cut the power at random moments of these workloads; return what is wrong, or None."""
    for seed in range(60) if witness is None else (witness, *range(60)):
        try:
            explore(seed, 60, again=0.5, kill=0.3, work=work, readers=True)
        except (AssertionError, shardemb.ShardEmbError, OSError) as error:
            return str(error) or repr(error)
    return None


NEEDED = [each for each in SITES if is_about_fills(each) and each not in OTHER_REASONS]


def found_without_call(site, **more):
    more = {"witness": WITNESSES.get(site)} | more
    return found_without(leaving_out(site), kill=0.3, work=work, **more)
