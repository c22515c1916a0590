"""Every operation on files fails once while tables are filled: what is acknowledged stays, and nothing else counts."""

import contextlib
import random
import warnings

import numpy as np
import pytest
from support import inside
from support.failures import every_site, fail_each, small, trained
from support.fills_power_loss import lower_limits
from support.power_loss import NOTHING, contents
from support.stores import close_quietly

import shardemb
from shardemb.errors import PoisonedError, ShardEmbError
from shardemb.initializers import Uniform
from shardemb.optim import SGD

ROWS, DIM = 1300, 12
WORKLOADS = 2


def train(path, seed, failing):
    """Fill, commit, roll back, fold, resize; return what may be found afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        lower_limits(patch, random.Random(seed))
        return _train(path, seed, failing)


def _train(path, seed, failing):
    rng, allowed = np.random.default_rng(seed), [NOTHING]
    store = shardemb.open(path, warm=seed % 2 == 0, threads=1)

    def attempt(call, *arguments, **options):
        """Call something; if it fails, nothing has changed, unless memory and disk may disagree."""
        with failing.off():
            before = contents(store)
        try:
            call(*arguments, **options)
        except (ShardEmbError, OSError) as error:
            assert str(error), repr(error)
            with failing.off():
                runtime = inside.runtime(store)
                if not (isinstance(error, PoisonedError) or runtime.poisoned or runtime.half_done):
                    assert contents(store) == before, error
                elif runtime.half_done and not runtime.poisoned:
                    store.rollback()

    def commit(step):
        nonlocal allowed
        with failing.off():
            last = store.last_commit
            future = ((last.id if last else 0) + 1, step, ()), contents(store)[1]
        try:
            store.commit(step=step)
        except (ShardEmbError, OSError):
            allowed = [*allowed, future]
        else:
            allowed = [future]

    def fill(name, start, count):
        rows = rng.random((count, DIM), np.float32)
        if name in store:
            attempt(store[name].write, np.arange(start, start + count), rows)

    for name, more in (("a", {}), ("b", {"initializer": Uniform(-1, 1, seed=1), "optimizer": SGD(lr=0.5)})):
        shape = {"num_embeddings": ROWS, "embedding_dim": DIM, "rows_per_shard": 512}
        attempt(store.create_table, name, **shape, **more)
    commit(1)
    for step in range(2, 5):
        for name in ("a", "b"):
            fill(name, 400 * step - 800, 350)
            fill(name, 400 * step - 700, 20)
        if step == 2:
            attempt(store.rollback)
            fill("b", 0, 300)
        commit(step)
        if step == 3:
            fill("a", 900, 400)
            attempt(store.checkpoint)
            if "a" in store:
                attempt(store["a"].resize, ROWS + 200)
    fill("b", 1200, 100)
    leave(store, failing)
    return allowed


def leave(store, failing):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ShardEmbError, OSError):
            store.close()
    with failing.off():
        close_quietly(store)


def check(path, allowed, what):
    with contextlib.suppress(shardemb.StoreNotFoundError), shardemb.open(path, "r") as reader:
        assert contents(reader) in allowed, f"{what}: to a reader"
    with shardemb.open(path) as store:
        assert contents(store) in allowed, what
        assert store.verify() == [], what


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_operation_fails_once(seed):
    with small():
        sites = [trained(each, train, check).sites for each in range(WORKLOADS)]
        assert {"write", "sync", "punch"} <= {site[0] for each in sites for site in each}
        chosen = every_site(sites, seed)  # of each call site in one of the workloads
        assert fail_each(seed, chosen, train, check).keys() == {each.site[0] for each in chosen}
