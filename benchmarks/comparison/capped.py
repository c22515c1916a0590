"""Training if the table is larger than memory (W4), and if the next batch is read ahead (W7)."""

import mmap
import shutil
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM

from . import memory, peers
from .data import make_values, remove
from .processes import MIB, Capped, alone
from .racing import Contender, drop_caches, race, same_bytes
from .reading import LARGE
from .results import Arm, Case, at_most, faster
from .torches import numpy_rowwise_adagrad
from .training import BATCH, make_batches, step_of

OPTIMIZER = "RowWiseAdagrad"
RECORD_BYTES = 4 * (DIM + 1)
STORE = "row-wise"

# ---- W4: a quarter of the table in memory -------------------------------------------------------------------------

COMMIT_EVERY = 100
SEED = 11
COMPARED = 2
"""The step whose lookups are checked; each arm takes at least this many steps."""

LEAST_CAP = 256 * MIB
"""Memory that a process needs for itself and its batches, even with the small table of a smoke test."""

BUDGET_SHARE = 2 / 5
"""The fraction of the limit that is our memory budget; batches, and pages that are only read, need the rest."""

OURS = "shardemb with commits"


@dataclass(frozen=True)
class Job:
    """What every arm does: as many steps as fit in the time, at least `COMPARED`, at most `steps`."""

    rows: int
    batch: int
    steps: int
    seconds: float = float("inf")


@dataclass(frozen=True)
class Trained:
    """Seconds of each step, and the rows that step `COMPARED` looked up."""

    seconds: tuple[float, ...]
    looked_up: Any


@dataclass(frozen=True)
class Contestant:
    """An arm: how its data is created, and how it is trained in the child process."""

    name: str
    make: Callable[[], Path]
    train: Callable
    arguments: tuple


def capped_training(settings):
    """W4: each arm in its own process under a memory limit of the kernel, from a cold start."""
    data = settings.data(LARGE)
    batch = settings.batch(BATCH, data.rows)
    cap = max(LEAST_CAP, data.rows * RECORD_BYTES // 4)
    arms, equal, notes = {}, True, []
    for arm in _arms(settings, data, batch, cap):
        try:
            trained = _under(cap, arm)
        except BrokenProcessPool:
            notes.append(f"{arm.name}: killed, most likely for its memory")
            continue
        job = arm.arguments[0]
        equal &= np.allclose(trained.looked_up, _expected(job), 1e-4, 1e-5)
        arms[arm.name] = _rated(arm.name, job.batch, trained)
    bars = (
        faster(arms, OURS, "np.memmap", 30.0),
        faster(arms, OURS, "np.memmap MADV_RANDOM", 4.0),
        faster(arms, OURS, "RocksDB", 10.0),
    )
    notes += [
        f"limit {cap / MIB:,.0f} MiB, page cache included; table {data.rows * RECORD_BYTES / MIB:,.0f} MiB",
        "the interpreter and its libraries lie outside of the limit, for every arm",
        "ours: total time with commits; the others never commit: the later half of their steps",
        "RocksDB keeps the optimizer's sums in memory, in its favour",
        f"np.memmap has {batch // 8:,} ids a step; lookups of step {COMPARED} are right within 1e-5",
    ]
    case = Case("zipf, row-wise Adagrad", tuple(arms.values()), bars, equal, notes=tuple(notes))
    work = memory.Work(data.rows, batch, "zipf", 20, optimizer=OPTIMIZER, commit_every=10)
    return [case, memory.check("W4", work, settings)]


def _arms(settings, data, batch, cap):
    whole = settings.scale >= 0.2
    every = COMMIT_EVERY if whole else 5
    slow = Job(data.rows, batch, 40 if whole else 2 * COMPARED, 25.0 if whole else 5.0)
    slowest = replace(slow, batch=batch // 8)
    yield Contestant(
        OURS,
        lambda: data.store(STORE, common.optimizer(OPTIMIZER)),
        _train_ours,
        (Job(data.rows, batch, 2 * every, 120.0), cap * BUDGET_SHARE, every),
    )
    yield Contestant("np.memmap", lambda: _copy(data), _train_map, (slowest, False))
    yield Contestant("np.memmap MADV_RANDOM", lambda: _copy(data), _train_map, (slow, True))
    if peers.has("RocksDB"):
        yield Contestant(
            "RocksDB", lambda: peers.RocksDB(data, mapped=False).path, _train_rocksdb, (slow, data)
        )


def _under(cap, arm):
    """Create the arm's data, train it from a cold start in a child process under the limit, and delete the data."""
    path = arm.make()
    drop_caches(path)
    try:
        with Capped(f"compare-{id(arm)}", cap) as group:
            return alone(arm.train, path, *arm.arguments, first=group.join)
    finally:
        remove(path)


def _rated(name, batch, trained):
    seconds, steps = trained.seconds, len(trained.seconds)
    if name == OURS:
        return Arm(name, batch, (sum(seconds) / steps,), f"{steps} steps")
    later = seconds[steps // 2 :]
    return Arm(name, batch, (sum(later) / len(later),), f"{steps} steps")


def _copy(data):
    def build(path):
        path.mkdir()
        shutil.copyfile(data.raw_file, path / "weights")
        np.zeros(data.rows, np.float32).tofile(path / "sums")

    return data.made("mapped", build)


def _expected(job):
    """Return the rows that step `COMPARED` looks up, computed from only the rows of the first steps."""
    common.random = np.random.default_rng(SEED)
    make = make_batches("zipf", job.rows)
    taken = [make(job.batch) for _ in range(COMPARED)]
    ids, places = np.unique(np.concatenate([each for each, _ in taken]), return_inverse=True)
    weights, sums = make_values(ids), np.zeros(ids.size, np.float32)
    for place, (_, grads) in zip(np.split(places, COMPARED), taken, strict=True):
        rows = numpy_rowwise_adagrad(weights, sums, place, grads)
    return rows


# ---- in the child process


def _run(job, step):
    """Take steps on the same batches as every other arm."""
    common.random = np.random.default_rng(SEED)
    make = make_batches("zipf", job.rows)
    seconds, looked_up = [], None
    while len(seconds) < job.steps and (len(seconds) < COMPARED or sum(seconds) < job.seconds):
        ids, grads = make(job.batch)
        start = time.perf_counter()
        rows = step(ids, grads)
        seconds.append(time.perf_counter() - start)
        if len(seconds) == COMPARED:
            looked_up = np.array(rows)
    return Trained(tuple(seconds), looked_up)


def _train_ours(path, job, budget, every):
    with shardemb.open(path, memory_budget=int(budget)) as store:
        train, taken = step_of(store["rows"]), []

        def step(ids, grads):
            rows = train((ids, grads))
            taken.append(None)
            if len(taken) % every == 0:
                store.commit(step=len(taken))
            return rows

        trained = _run(job, step)
        start = time.perf_counter()
        store.commit(step=len(taken))  # the time may have been up before the next commit
        return replace(
            trained, seconds=(*trained.seconds[:-1], trained.seconds[-1] + time.perf_counter() - start)
        )


def _train_map(path, job, advise):
    weights = np.memmap(path / "weights", np.float32, "r+", shape=(job.rows, DIM))
    sums = np.memmap(path / "sums", np.float32, "r+", shape=(job.rows,))
    if advise:
        weights._mmap.madvise(mmap.MADV_RANDOM)
        sums._mmap.madvise(mmap.MADV_RANDOM)
    return _run(job, lambda ids, grads: numpy_rowwise_adagrad(weights, sums, ids, grads))


def _train_rocksdb(_, job, data):
    peer, sums = peers.RocksDB(data, mapped=False), np.zeros(job.rows, np.float32)
    peer.open()

    def step(ids, grads):
        unique, inverse = np.unique(ids, return_inverse=True)
        weights = np.array(peer.read(unique))
        rows = weights[inverse]
        old = sums[unique]
        numpy_rowwise_adagrad(weights, old, inverse, grads)
        sums[unique] = old
        peer.write(unique, weights, sync=False)
        return rows

    trained = _run(job, step)
    peer.close()
    return trained


# ---- W7: look-ahead -----------------------------------------------------------------------------------------------

COMPUTE_S = 0.05
AHEAD_BATCH, AHEAD_STEPS = 8192, 20


def look_ahead(settings):
    """W7: cold lookups and updates with computation in between, during which the next batch is prefetched."""
    data = settings.data(LARGE)
    size, steps = settings.batch(AHEAD_BATCH, data.rows), AHEAD_STEPS if settings.scale >= 0.2 else 4
    path = data.store(STORE, common.optimizer(OPTIMIZER))
    make = make_batches("uniform", data.rows)
    opened = []

    def cold():
        _close(opened)
        drop_caches(path)
        opened.append(common.open_store(path, warm=False))

    def loop(compute, ahead):
        return lambda inputs: _loop(opened[0]["rows"], inputs, compute, ahead)

    contenders = [
        Contender("prefetch of the next batch", loop(COMPUTE_S, ahead=True), prepare=cold),
        Contender("no prefetch", loop(COMPUTE_S, ahead=False), prepare=cold),
        Contender("I/O alone", loop(0.0, ahead=False), prepare=cold),
    ]
    inputs, looked_up = [make(size) for _ in range(4)], []
    for each in contenders[:2]:
        cold()
        looked_up.append(each.call(inputs))
    arms = race(contenders, lambda _: [make(size) for _ in range(steps)], size * steps, settings.times(5))
    _close(opened)
    step_s = {name: arm.median / steps for name, arm in arms.items()}
    floor = max(COMPUTE_S, step_s["I/O alone"])
    ratio = step_s["prefetch of the next batch"] / floor
    notes = (
        f"{steps} steps a run of {size:,} ids; {1e3 * COMPUTE_S:.0f} ms of time.sleep stand for a step on a GPU",
        *(f"{name}: {1e3 * value:.1f} ms a step" for name, value in step_s.items()),
    )
    bar = at_most("step with prefetch vs max(compute, I/O alone)", ratio, 1.05, "x")
    return [Case("uniform", tuple(arms.values()), (bar,), same_bytes(*looked_up), notes=notes, facts=step_s)]


def _loop(table, inputs, compute, ahead):
    for (ids, grads), following in zip(inputs, [*inputs[1:], None], strict=True):
        table.lookup(ids)
        if ahead and following is not None:
            table.prefetch(following[0], for_update=True)
        if compute:
            time.sleep(compute)
        table.update(ids, grads)
    return table.lookup(inputs[0][0])


def _close(opened):
    for store in opened:
        store.rollback()
        store.close()
    opened.clear()
