"""Processes that are killed at random times: what opens is a commit, the last acknowledged one or the next."""

import random
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import shardemb
from shardemb.optim import SGD

ROWS, DIM = 64, 3
IDS = np.arange(ROWS)


class Model:
    """What the table may hold: what was acknowledged, and what an attempt to commit might have made of it."""

    def __init__(self):
        self.commits = {0: None}
        self.acknowledged = 0
        self.rows = np.zeros((ROWS, DIM), np.float32)

    def require(self, store):
        """Compare a store that was just opened, or went back, with it; go on from there."""
        last = 0 if store.last_commit is None else store.last_commit.id
        assert last in (self.acknowledged, self.acknowledged + 1)
        self.acknowledged, self.rows = last, self.commits[last]
        if last:
            np.testing.assert_array_equal(store["t"].lookup(IDS), self.rows)
            assert store.last_commit.step == last * 10

    def train(self, store, generator):
        """Take some steps, and commit them."""
        for _ in range(generator.integers(1, 4)):
            ids = generator.integers(0, ROWS, generator.integers(1, 50))
            gradients = generator.integers(-9, 9, (ids.size, DIM)).astype(np.float32)  # sums are exact
            store["t"].update(ids, gradients)
            rows = self.rows.copy()
            np.subtract.at(rows, ids, gradients)
            self.rows = rows
        self.commits[self.acknowledged + 1] = self.rows
        store.commit(step=(self.acknowledged + 1) * 10)
        self.acknowledged += 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_owners_that_are_killed_at_any_time(new_store, cluster, seed):
    lives(new_store, cluster, seed, 10)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.timeout(3600)
def test_owners_that_are_killed_at_any_time_for_long(new_store, cluster, seed):
    lives(new_store, cluster, seed, 50)


def lives(new_store, cluster, seed, count):
    """Kill an owner at a random moment of each life of the store's era."""
    model, generator, chance = Model(), np.random.default_rng(seed), random.Random(seed)
    store = new_store()
    store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, optimizer=SGD(lr=1.0))
    model.train(store, generator)
    for _ in range(count):
        worker, before = chance.randrange(2), []
        killer = threading.Timer(
            chance.uniform(0, 0.3), lambda worker=worker, before=before: before.append(cluster.kill(worker))
        )
        killer.start()
        try:
            while not before:
                model.train(store, generator)
            model.train(
                store, generator
            )  # fine if it was killed after it had voted: all are at that commit again
        except (shardemb.OwnerLostError, shardemb.EraEndedError):
            killer.join()
        cluster.wait_for(worker, before[0])
        if chance.random() < 0.3:
            store.close()
            store = new_store()
        else:
            store.rollback()
        model.require(store)
    assert model.acknowledged > 2


PROGRAM = """
import itertools, sys, distributed, numpy as np, shardemb.distributed
with distributed.Client(sys.argv[1]) as client:
    store = shardemb.distributed.open(client, sys.argv[2])
    for number in itertools.count(1 + store.last_commit.id):
        store["t"].update(np.arange(64), np.full((64, 3), float(number)))
        store.commit(step=number)
        print(number, flush=True)
"""


def test_coordinators_that_are_killed_at_any_time(new_store, cluster, tmp_path):
    store = new_store()
    store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, optimizer=SGD(lr=1.0))
    store.commit(step=1)
    store.close()
    chance, acknowledged = random.Random(1), 1
    for _ in range(3):
        command = [
            sys.executable,
            "-c",
            PROGRAM,
            cluster.client.scheduler.address,
            str(tmp_path / "head.zarr"),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            acknowledged = int(process.stdout.readline())
            time.sleep(chance.uniform(0, 0.2))
            process.kill()
            acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
        with new_store() as store:
            last = store.last_commit.id
            assert last in (acknowledged, acknowledged + 1)
            assert (store["t"].lookup(IDS) == -sum(range(2, last + 1))).all()
