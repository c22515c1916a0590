"""The same work within a memory budget: the same bits, and no more anonymous memory than allowed."""

import hashlib
import tempfile
from dataclasses import dataclass

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM

from .processes import MIB, Watch, alone
from .results import Bar, Case, at_most

ALLOWANCE = 300 * MIB
"""Memory that a process may take in addition to the budget: compiled kernels, batches, results."""


@dataclass(frozen=True)
class Work:
    """What to do within the budget: lookups in an existing store, or training or writing in a new one."""

    rows: int
    batch: int
    distribution: str
    steps: int
    optimizer: str | None = None
    store: str | None = None
    commit_every: int = 0
    unique: bool = False


def check(workload, work, settings):
    """Do the work with the default budget and with a quarter of the table's size; return a case."""
    with tempfile.TemporaryDirectory(dir=settings.folder) as folder:
        width = DIM if work.optimizer is None else DIM + _state(work.optimizer)
        budget = work.rows * width * 4 // 4
        free, _ = alone(_run, work, f"{folder}/free.zarr", None)
        tight, growth = alone(_run, work, f"{folder}/tight.zarr", budget)
    allowed = budget + ALLOWANCE
    what = f"anonymous memory, budget {budget / MIB:,.0f} MiB + 300"
    return Case(
        f"{workload} with a budget of a quarter of the table",
        bars=(
            at_most(what, growth / MIB, allowed / MIB, "MiB"),
            Bar("same bits as with the default budget", float(free == tight), 1.0, "yes"),
        ),
        equal=free == tight,
    )


def _state(optimizer):
    return sum(common.optimizer(optimizer).state_columns(DIM).values())


def _run(work, fresh, budget):
    """Return a digest of every result and of the final rows, and the growth of anonymous memory."""
    common.random = np.random.default_rng(7)
    digest = hashlib.blake2b(digest_size=16)
    with Watch() as watch, _opened(work, fresh, budget) as store:
        table = store["rows"]
        for step in range(1, work.steps + 1):
            ids = common.make_ids(work.distribution, work.rows, work.batch)
            rows = table.lookup_unique(ids)[0] if work.unique else table.lookup(ids)
            digest.update(rows)
            if work.optimizer:
                table.update(ids, common.make_values(work.batch))
            elif work.commit_every:
                table.write(ids, common.make_values(work.batch))
            if work.commit_every and step % work.commit_every == 0:
                store.commit(step=step)
        for ids in common.blocks(work.rows) if work.store is None else ():
            digest.update(table.lookup(ids))
        if store.last_commit is not None and work.store is None:
            store.rollback()
    return digest.hexdigest(), watch.growth


def _opened(work, fresh, budget):
    if work.store is not None:
        return shardemb.open(work.store, mode="r", memory_budget=budget)
    store = shardemb.open(fresh, mode="w", memory_budget=budget)
    store.create_table(
        "rows",
        num_embeddings=work.rows,
        embedding_dim=DIM,
        initializer=common.INITIAL,
        optimizer=common.optimizer(work.optimizer) if work.optimizer else None,
    )
    store.commit()
    return store
