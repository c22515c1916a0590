"""Training in torch under a memory limit of an eighth of the table (T4): memory stays flat; torch alone is killed."""

import contextlib
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter

import numpy as np

from benchmarks import common
from benchmarks.common import DIM

from . import peers
from .capped import OPTIMIZER, RECORD_BYTES, STORE
from .processes import MIB, CannotRun, Capped, alone, anonymous_bytes
from .racing import drop_caches
from .results import Arm, Bar, Case, at_most
from .training import BATCH, make_batches

OURS, TORCH = "shardemb.torch with commits", "torch.nn.Embedding, SparseAdam"
SEED = 17

ROWS = 24_000_000
"""6.2 GB of records, so that an eighth has room for what torch takes itself."""

LEAST_CAP = 768 * MIB
"""What a process with torch needs, even with the small table of a smoke test."""

BUDGET_SHARE = 1 / 4
"""The fraction of the limit that is our memory budget: torch, batches and pages that are read need the rest."""


@dataclass(frozen=True)
class Job:
    """What is trained: so many steps of so many ids, with a commit after each tenth of them."""

    rows: int
    batch: int
    steps: int
    distribution: str = "uniform"


def memory(settings):
    """T4: the anonymous memory of training steps under a limit of an eighth of the table, at first and later."""
    if peers.missing(("torch",)):
        raise CannotRun("torch is missing")
    data = settings.data(ROWS)
    table = data.rows * RECORD_BYTES
    cap = max(LEAST_CAP, table // 8)
    path = data.store(STORE, common.optimizer(OPTIMIZER))
    steps = 100 if settings.scale >= 0.2 else 20
    cases = []
    for distribution in ("uniform", "zipf"):
        job = Job(data.rows, settings.batch(BATCH, data.rows), steps, distribution)
        drop_caches(path)
        times, grown = _under(cap, _train, path, job, int(cap * BUDGET_SHARE))
        half = len(grown) // 2
        first, later = max(grown[:half]), max(grown[half:])
        killed = None if table <= cap or distribution != "uniform" else _is_killed(cap, job)
        bars = (
            at_most("peak memory in the later half of the steps vs the first", later / first, 1.1, "x"),
            Bar("torch is killed", None if killed is None else float(killed), 1.0, "yes"),
        )
        notes = (
            f"limit {cap / MIB:,.0f} MiB, page cache included; table {table / MIB:,.0f} MiB, {table / cap:.1f}x",
            f"peak of anonymous memory: {first / MIB:,.0f} MiB, later {later / MIB:,.0f} MiB",
            "the interpreter and the libraries that it has loaded before lie outside of the limit",
        )
        cases.append(Case(distribution, (Arm(OURS, job.batch, times),), bars, notes=notes))
    return cases


def _under(cap, function, *arguments):
    """Call a function in a child process under the limit."""
    with Capped("compare-tight", cap) as group:
        return alone(function, *arguments, first=partial(_join, group))


def _join(group):
    """Load the libraries, which are to lie outside of the limit, and then subject this process to it."""
    import shardemb.torch  # noqa: F401

    group.join()


def _is_killed(cap, job):
    try:
        _under(cap, _train_torch, job)
    except BrokenProcessPool:  # the kernel has ended it, which is how a limit is kept
        return True
    return False


# ---- in the child process


def _batches(job):
    common.random = np.random.default_rng(SEED)
    make = make_batches(job.distribution, job.rows)
    return (make(job.batch) for _ in range(job.steps))


def _train(path, job, budget):
    """Return the seconds of steps, and the anonymous memory after each, beyond that before the first."""
    import torch

    import shardemb.torch

    with contextlib.closing(common.open_store(path, memory_budget=budget, warm=False)) as store:
        rows = shardemb.torch.Embedding(store["rows"])
        optimizer = shardemb.torch.Optimizer(rows)
        ends, grown, before = [perf_counter()], [], anonymous_bytes()
        for number, (ids, grads) in enumerate(_batches(job), 1):
            rows(torch.from_numpy(ids)).backward(torch.from_numpy(grads))
            optimizer.step()
            grown.append(anonymous_bytes() - before)
            if number % (job.steps // 10) == 0:
                store.commit(step=number)
            ends.append(perf_counter())
    return tuple(end - start for start, end in pairwise(ends)), grown


def _train_torch(job):
    import torch

    rows = torch.nn.Embedding(job.rows, DIM, sparse=True)
    optimizer = torch.optim.SparseAdam(rows.parameters(), lr=common.LEARNING_RATE)
    for ids, grads in _batches(job):
        rows(torch.from_numpy(ids)).backward(torch.from_numpy(grads))
        optimizer.step()
        optimizer.zero_grad()
