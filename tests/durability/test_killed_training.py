"""A training job that is killed with ``kill -9`` again and again ends with the bits of one that never was."""

import os
import random
import signal
import time
import warnings

import numpy as np
import pytest
from support.model import assert_same_bits
from support.stores import close_quietly

import shardemb
from shardemb.initializers import Uniform
from shardemb.optim import Adam, RowWiseAdagrad

KILLS = int(os.environ.get("SHARDEMB_KILLS", "50"))
ROWS, DIM, STEPS, COMMIT_EVERY = 3000, 8, 400, 3


def batch_of(step):
    """A function of the step alone."""
    rng = np.random.default_rng([7, step])
    return rng.zipf(1.2, 300) % ROWS, rng.normal(size=(300, DIM)).astype(np.float32)


def train(path, last_step, **options):
    """Train from the last commit to a step; return all that was learnt."""
    store = shardemb.open(path, threads=1, **options)
    if store.last_commit is None:
        for name, optimizer in {"adam": Adam(lr=0.1), "adagrad": RowWiseAdagrad(lr=0.1)}.items():
            store.create_table(
                name,
                num_embeddings=ROWS,
                embedding_dim=DIM,
                optimizer=optimizer,
                initializer=Uniform(-1, 1, seed=1),
                rows_per_shard=512,
            )
        store.commit(step=0, metadata={"seen": 0})
    seen = store.last_commit.metadata["seen"]
    for step in range(store.last_commit.step + 1, last_step + 1):
        ids, gradients = batch_of(step)
        store.update(dict.fromkeys(store, (ids, gradients)))
        seen += len(ids)
        if step % COMMIT_EVERY == 0 or step == last_step:
            store.commit(step=step, metadata={"seen": seen})
    everything = np.arange(ROWS)
    found = [table.lookup(everything) for table in store.values()]
    found += [store["adam"].state(column, everything) for column in ("exp_avg", "exp_avg_sq")]
    assert store.last_commit.metadata["seen"] == last_step * 300
    close_quietly(store)
    return found


def killed_after(seconds, path, options):
    """Train in a fork and kill it; return whether it was still at it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            train(path, STEPS, **options)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


@pytest.mark.slow
@pytest.mark.parametrize("log_bytes", [1, 300_000, 2**30])
def test_training_that_is_killed_ends_with_the_same_bits(tmp_path, log_bytes):
    chance = random.Random(log_bytes)
    straight = train(tmp_path / "straight", STEPS)
    path = tmp_path / "killed"
    options = {"log_bytes": log_bytes}
    killed, steps = 0, [-1]
    for _ in range(KILLS // 3 + 1):
        killed += killed_after(chance.uniform(0.0, 0.15), path, options)
        if not path.exists() or not (path / ".shardemb" / "manifest.json").exists():
            continue
        with shardemb.open(path, "r") as store:
            steps.append(store.last_commit.step if store.last_commit else -1)
            assert steps[-1] in {-1, STEPS, *range(0, STEPS, COMMIT_EVERY)}
    assert killed > 0
    assert steps == sorted(steps)
    for found, expected in zip(train(path, STEPS, **options), straight, strict=True):
        assert_same_bits(found, expected)
