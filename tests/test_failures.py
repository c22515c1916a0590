"""Every operation on files fails once, in every way: the error has a name, and no acknowledged commit is lost.

A workload runs with one call of ``files`` failing, at every position one after the other. Whatever it raises is one of
shardemb's errors or an `OSError`; afterwards the store opens at the last acknowledged commit, or at the one under way.
"""

import contextlib
import errno
import os
import random
import resource
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import close_quietly
from test_power_loss import NOTHING, contents, scratch

import shardemb
from shardemb import files, fold, log, plan
from shardemb.errors import DiskFullError, PoisonedError, ShardEmbError
from shardemb.initializers import Uniform
from shardemb.optim import SGD, Adam

WORKLOADS = int(os.environ.get("SHARDEMB_FAILING_WORKLOADS", "5"))
ROWS, DIM = 120, 16
KINDS = ["full", "error", "short"]
CALLS = (
    "write", "sync", "sync_data", "sync_tree", "sync_directory", "rename", "remove", "create_sparse",
    "make_directory", "allocate", "opened", "open_direct", "open_scratch", "read_at", "read_into",
)  # fmt: skip


class Failing:
    """Lets the call of a number fail, in one of three ways."""

    def __init__(self, at=None, kind="full"):
        self.at, self.kind, self.count, self.paused, self.failed = at, kind, 0, False, None

    def on(self):
        real = {name: getattr(files, name) for name in CALLS}

        def wrapped(name):
            def call(*arguments, **options):
                if self.paused:
                    return real[name](*arguments, **options)
                self.count += 1
                if self.count == self.at:
                    self.failed = (
                        f"{name} of {next(str(a) for a in reversed(arguments) if isinstance(a, Path))}"
                    )
                    self._fail(name, real[name], arguments)
                return real[name](*arguments, **options)

            return call

        patch = pytest.MonkeyPatch()
        for name in CALLS:
            patch.setattr(files, name, wrapped(name))
        return contextlib.closing(_Undo(patch))

    def _fail(self, name, real, arguments):
        if name == "write" and self.kind == "short":
            descriptor, data, offset, path = arguments
            data = memoryview(data).cast("B")
            real(descriptor, data[: len(data) // 2 // 4096 * 4096], offset, path)
        full = self.kind == "full" and not name.startswith(("sync", "read"))
        if full:
            raise DiskFullError(errno.ENOSPC, "no room left on the disk")
        raise OSError(errno.ENOSPC if self.kind == "full" else errno.EIO, "it failed")

    @contextlib.contextmanager
    def off(self):
        self.paused = True
        yield
        self.paused = False


class _Undo:
    def __init__(self, patch):
        self.close = patch.undo


def train(path, seed, failing):
    """Train, page, commit, fold, change tables, roll back; return what may be found afterwards."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    allowed, poisoned = [NOTHING], False
    store = shardemb.open(
        path, memory_budget=chance.choice([0, 2**30]), log_bytes=chance.choice([1, 10**9]), threads=1
    )

    def attempt(call, *arguments, **options):
        nonlocal poisoned
        try:
            call(*arguments, **options)
        except PoisonedError:
            poisoned = True
        except (ShardEmbError, OSError) as error:
            assert str(error), repr(error)
            return False
        return not poisoned

    def new(name):
        optimizer = chance.choice([SGD(lr=0.5), Adam(lr=0.1)])
        more = chance.choice([{}, {"initializer": Uniform(-1, 1, seed=1)}])
        store.create_table(
            name, num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=64, optimizer=optimizer, **more
        )

    def commit(step):
        nonlocal allowed
        with failing.off():
            if poisoned or store._runtime.poisoned:
                return
            last = store.last_commit
            future = ((last.id if last else 0) + 1, step, ()), contents(store)[1]
        allowed = [future] if attempt(store.commit, step=step) else [*allowed, future]

    attempt(new, "a")
    attempt(new, "b")
    commit(1)
    for step in (2, 3):
        for name in tuple(store):
            ids = rng.integers(0, ROWS, 40)
            attempt(store[name].update, ids, rng.normal(size=(40, DIM)).astype(np.float32))
        commit(10 * step)
        attempt(store.lookup, {name: [1, 2, 100] for name in store})
        for name in tuple(store):
            attempt(store[name].write, [1, 5], np.full((2, DIM), step, np.float32))
        attempt(chance.choice([store.rollback, store.checkpoint, store.has_changes.__bool__]))
        if step == 2 and "a" in store:
            attempt(store.drop_table, "a")
            attempt(store.rename_table, "b", "a") if "b" in store else None
            attempt(new, "c")
        commit(10 * step + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt(store.close)
        with failing.off():
            close_quietly(store)
    return allowed


def check(path, allowed, what):
    try:
        store = shardemb.open(path)
    except ShardEmbError as error:
        raise AssertionError(f"{what}: does not open") from error
    with store:
        found = contents(store)
        assert found in allowed, f"{what}: opens at {found[0]}, not at {[each[0] for each in allowed]}"
        assert store.verify() == [], what


def fail_everywhere(seed):
    """Return which operations failed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "FIRST_SEGMENT", 32_768)
        patch.setattr(log, "STAGE_BYTES", 65_536)
        patch.setattr(plan, "WINDOW_BLOCKS", 4)
        patch.setattr(fold, "DIRECT_BLOCKS", 2)
        with scratch() as folder:
            failing = Failing()
            with failing.on():
                allowed = train(Path(folder) / "store", seed, failing)
            assert len(allowed) == 1
            check(Path(folder) / "store", allowed, "nothing failed")
        failed = set()
        # A fold in its thread makes the number vary a little.
        for position in range(1, failing.count + 1):
            with scratch() as folder:
                one = Failing(position, KINDS[(position + seed) % 3])
                path = Path(folder) / "store"
                with one.on():
                    try:
                        allowed = train(path, seed, one)
                    except (ShardEmbError, OSError):
                        allowed = [NOTHING]  # the first opening
                check(path, allowed, f"seed {seed}, call {position}, {one.kind}, {one.failed}")
                failed.add(str(one.failed).split()[0])
        return failed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_operation_fails_once(seed, side_by_side):
    assert {"write", "sync", "sync_data", "rename", "opened"} <= side_by_side(fail_everywhere)


@pytest.mark.filterwarnings("ignore:the changes of")
def test_a_limit_on_the_size_of_files_is_an_error_and_no_signal(tmp_path, in_fork):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = shardemb.open(tmp_path / "s", memory_budget=0)
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=64)
        table.write([1], np.ones((1, DIM), np.float32))
        store.commit(step=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="File too large"):
            store.create_table("large", num_embeddings=10**6, embedding_dim=DIM)
        table.write(np.arange(ROWS), np.ones((ROWS, DIM), np.float32))
        for step in range(2, 300):
            table.write([2], np.full((1, DIM), step, np.float32))
            try:
                store.commit(step=step)
            except OSError:
                break
        os._exit(0)

    in_fork(limited)
    with shardemb.open(tmp_path / "s") as store:
        assert store.verify() == []
        step = store.last_commit.step
        assert step >= 1
        assert store["t"].lookup(2)[0] == (step if step > 1 else 0)


def test_address_space_that_is_not_to_be_had_is_an_error(tmp_path, in_fork):
    with shardemb.open(tmp_path / "s") as store:
        store.create_table("t", num_embeddings=10**6, embedding_dim=DIM)
        store.commit()

    def limited():
        with shardemb.open(tmp_path / "s") as store:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
            with pytest.raises(OSError, match="cannot map"):
                store.create_table("large", num_embeddings=10**9, embedding_dim=64)
            assert list(store) == ["t"]
            store["t"].write([1], np.ones((1, DIM), np.float32))
            store.commit(step=1)

    in_fork(limited)
    with shardemb.open(tmp_path / "s") as store:
        assert store.last_commit.step == 1
