"""Operations on files that fail while keys are added and removed."""

import contextlib
import random
import warnings

import numpy as np
import pytest

import shardemb
from shardemb.commits import log_writer
from shardemb.errors import PoisonedError, ShardEmbError
from shardemb.optim import SGD
from shardemb.vocabulary import hash_index
from support import failures, inside
from support.failures import KINDS, every_position, every_site
from support.power_loss import NOTHING, contents, keys_that_are_wrong
from support.small import make_small, pool_of
from support.stores import close_quietly

WORKLOADS, DIM = 4, 4
DEPTH = 1
"""Lines of the package that make a call site: calls on keys go through many layers, in every order."""


def train(path, seed, failing):
    """Add, remove and evict keys, commit, fold, roll back, drop; return what may be found afterwards."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    allowed, poisoned = [NOTHING], False
    options = {
        "memory_budget": chance.choice([0, 2**30]),
        "log_bytes": chance.choice([1, 10**9]),
        "threads": 1,
    }
    key_type = ["int64", "string"][seed % 2]
    pool = pool_of(key_type, rng)[:300]
    store = shardemb.open(path, **options)

    def attempt(call, *arguments, **more):
        nonlocal poisoned
        before = inside.runtime(store).poisoned
        try:
            call(*arguments, **more)
        except PoisonedError:
            poisoned = True
        except (ShardEmbError, OSError) as error:
            assert str(error), repr(error)
            if not (
                before
                or inside.runtime(store).closed
                or inside.runtime(store).poisoned
                or inside.runtime(store).half_done
            ):
                with failing.off():
                    assert keys_that_are_wrong(store, more=False) is None, (
                        f"after {call} failed with {error!r}"
                    )
            return False
        return not poisoned

    def commit(step):
        nonlocal allowed
        with failing.off():
            if poisoned or inside.runtime(store).poisoned:
                return
            last = store.last_commit
            future = ((last.id if last else 0) + 1, step, ()), contents(store)[1]
        allowed = [future] if attempt(store.commit, step=step) else [*allowed, future]

    def some(most):
        return [pool[i] for i in rng.integers(0, len(pool), most).tolist()]

    attempt(store.create_vocabulary, "v", key_type=key_type)
    if "v" in store.vocabularies:
        attempt(
            store.create_table,
            "t",
            vocabulary="v",
            embedding_dim=DIM,
            rows_per_shard=64,
            optimizer=SGD(lr=1.0),
            counters=True,
        )
    for step in range(1, 5):
        words = store.vocabularies.get("v")
        if words is not None:
            attempt(words.add, some(120))
            attempt(words.lookup, some(50))
            attempt(words.keys, [0])
            attempt(words.remove, some(80))
        if "t" in store:
            attempt(store["t"].update, some(60), np.ones((60, DIM), np.float32), missing="skip")
            attempt(store["t"].evict, keep=chance.randrange(20, 100))
        commit(10 * step)
        if words is not None and step == 2:
            attempt(words.add, some(30))
            attempt(chance.choice([store.rollback, store.checkpoint]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt(store.close)
        with failing.off():
            close_quietly(store)
    return allowed


def check(path, allowed, what):
    for _ in range(2):  # the first may have made an index that the second takes up
        try:
            store = shardemb.open(path)
        except ShardEmbError as error:
            raise AssertionError(f"{what}: does not open") from error
        with store:
            found = contents(store)
            assert found in allowed, f"{what}: opens at {found[0]}, not at {[each[0] for each in allowed]}"
            assert store.verify() == [], what
            assert (keys_that_are_wrong(store, more=True), what) == (None, what)
            store.rollback()


@contextlib.contextmanager
def small(seed):
    """Let few keys and small logs meet what many do."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch, random.Random(seed))
        patch.setattr(hash_index, "OPEN_PAIRS", (40, 40))
        patch.setattr(hash_index, "_STALE", 30)
        patch.setattr(log_writer, "FIRST_SEGMENT", 32_768)
        patch.setattr(log_writer, "STAGE_BYTES", 65_536)
        yield


def trained(seed):
    """Return the calls of a workload in which none fails."""
    with small(seed):
        return failures.trained(seed, train, check, depth=DEPTH)


def fail_everywhere(seed):
    """Let every call of a workload fail; return which operations did."""
    return fail_each(seed, every_position(trained(seed).count, seed))


def fail_every_site(seed):
    """Let each call site of some workloads fail, one workload's share; return which operations did.

    A write fails in each way, all else in one: the workloads of rows go through the others.
    """
    sites = [trained(each).sites for each in range(WORKLOADS)]
    return fail_each(
        seed,
        every_site(sites, seed, DEPTH, lambda name: KINDS if name == "write" else [KINDS[len(name) % 2]]),
    )


def fail_some(seed, most):
    """Let some calls of a workload fail, all over it; return which operations did."""
    every = every_position(trained(seed).count, seed)
    return fail_each(seed, random.Random(seed).sample(every, min(most, len(every))))


def fail_each(seed, every):
    """Return which operations failed, one in each run of a workload."""
    with small(seed):
        return failures.fail_each(seed, every, train, check)
