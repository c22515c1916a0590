"""A workload with keys on the simulated disk."""

import os
import random

import numpy as np

import shardemb
from shardemb.initializers import Uniform
from shardemb.optim import SGD, Adam
from support.power_loss import NOTHING, SITES, contents, explore, found_without, is_about_keys, leaving_out
from support.small import pool_of
from support.stores import close_quietly
from support.witnesses import WITNESSES

STATES = int(os.environ.get("SHARDEMB_STATES", "1500")) // 5


WORKLOADS = 4


DIM = 8


def work(path, seed, recording, how=None):
    """Add, remove and evict keys, train their rows, commit, roll back, reopen; record what each commit holds.

    `how` says how rows are stored.
    """
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    options = {
        "log_bytes": chance.choice([1, 60_000, 2**30]),
        "memory_budget": chance.choice([0, 2**30]),
        "threads": 1,
    }
    store = shardemb.open(path, **options)
    recording.acknowledged.append((len(recording.operations), NOTHING))
    pools = {}

    def commit(step):
        expected, before = contents(store)[1], store.last_commit
        future = ((before.id if before else 0) + 1, step, ()), expected
        recording.acknowledged.append((None, future))  # from here on a crash may leave this commit
        store.commit(step=step)
        recording.acknowledged.append((len(recording.operations), future))

    def new(name, key_type, **more):
        store.create_vocabulary(name, key_type=key_type, **more)
        pools[name] = pool_of(key_type, rng)[:400]
        for table, optimizer in (f"{name}-a", Adam(lr=0.1)), (f"{name}-b", SGD(lr=0.5)):
            store.create_table(
                table,
                vocabulary=name,
                embedding_dim=DIM,
                rows_per_shard=64,
                optimizer=optimizer,
                counters=table.endswith("a"),
                initializer=chance.choice([None, Uniform(-1, 1, seed=1)]),
                **(how or {}),
            )

    def some(name, most):
        return [pools[name][i] for i in rng.integers(0, len(pools[name]), chance.randrange(1, most)).tolist()]

    new("n", "int64", reserved=1)
    commit(0)
    for step in range(1, 8):
        for name, words in store.vocabularies.items():
            words.add(some(name, 150))
            if chance.random() < 0.7:
                words.remove(some(name, 100))
            for table in (store[f"{name}-a"], store[f"{name}-b"]):
                keys = some(name, 60)
                table.update(keys, rng.normal(size=(len(keys), DIM)).astype(np.float32), missing="skip")
        what = chance.choice(["", "", "rollback", "reopen", "checkpoint", "evict", "words", "drop"])
        if what == "rollback":
            store.rollback()
        elif what == "reopen":
            close_quietly(store)
            store = shardemb.open(path, **options)
        elif what == "checkpoint":
            store.checkpoint()
        elif what == "evict" and "n-a" in store:
            store["n-a"].evict(keep=chance.randrange(60))
        elif what == "words" and "s" not in store.vocabularies:
            admission = chance.choice([None, shardemb.Admission(after=2, width=1024, depth=2)])
            new("s", chance.choice(["string", "bytes"]), admission=admission)
        elif what == "drop" and "s" in store.vocabularies:
            store.drop_table("s-a")
            store.drop_table("s-b")
            store.drop_vocabulary("s")
        commit(step)
    close_quietly(store)


def work_short(path, seed, recording):
    """Do the same on rows of bfloat16, which are rounded stochastically."""
    work(path, seed, recording, {"dtype": "bfloat16", "state_dtype": "bfloat16", "rounding": "stochastic"})


def explore_keys(seed):
    return explore(seed, STATES // WORKLOADS, work=work)


def explore_short_rows(seed):
    return explore(seed, STATES // WORKLOADS, work=work_short)


# Calls that can be left out without a wrong state after a loss of power, and why they are made.
OTHER_REASONS = {
    "index_files.stage:write": "it writes the header, too: without it, the file is no part, and the index is rebuilt",
    "hash_index._publish:rename": "it replaces a part by a newer one, but the older one is valid, too",
    "hash_index._publish:sync_directory": "older parts are removed after it: without either, the index is rebuilt",
    "hash_index.relocate:rename": "without a folder, the index is rebuilt",
    "hash_index.load:sync_directory": "after files from elsewhere, which know more than the last commit, are removed",
    "hash_index.load:sync_directory:2": "the same",
    "key_rows.retire_index:sync_directory": "before a tag is restored, which no workload with keys does",
    "hash_index.relocate:sync_directory": "only after many reassignments; test_lost_index.py makes them",
}


NEEDED = [each for each in SITES if is_about_keys(each) and each not in OTHER_REASONS]


def found_without_call(site, **more):
    more = {"witness": WITNESSES.get(site)} | more
    return found_without(leaving_out(site), kill=0.3, work=work, **more)
