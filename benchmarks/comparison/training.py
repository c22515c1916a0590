"""Training steps in memory, against torch and FBGEMM (W6a)."""

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM, ROW_BYTES

from . import memory, peers, torches
from .data import batches, ids_of
from .racing import Contender, race, same_bytes
from .reading import FULL
from .results import Case, faster

BATCH = 65_536


def make_batches(distribution, rows):
    """Make a function from a number to that many ids with gradients."""
    ids = ids_of(distribution, rows)
    return lambda size: (ids(size), common.make_values(size) - np.float32(0.5))


def step_of(table):
    """Make our training step: lookup, then update."""

    def step(batch):
        ids, grads = batch
        rows = table.lookup(ids)
        table.update(ids, grads)
        return rows

    return step


def settle(table):
    """Bring a table to its steady state: every page copied, so that no step pays for it."""
    for ids in batches(table.num_embeddings):
        table.update(ids, np.zeros((ids.size, DIM), np.float32))


# ---- W6a: steady state, without commits ---------------------------------------------------------------------------


def warm_steps(settings):
    """W6a."""
    data = settings.data(FULL)
    batch = settings.batch(BATCH, data.rows)
    adam = _against(settings, data, batch, "Adam", "torch", {"uniform": 2.5, "zipf": 3.0})
    row_wise = _against(settings, data, batch, "RowWiseAdagrad", "FBGEMM", {"uniform": 2.0, "zipf": 2.0})
    work = memory.Work(data.rows, batch, "zipf", 20, optimizer="Adam", commit_every=10)
    return [*adam, *row_wise, memory.check("W6a", work, settings)]


def _against(settings, data, batch, optimizer, peer, targets):
    """Race our step with one peer's, a case for each distribution of ids."""
    kind = {"torch": torches.TorchAdam, "FBGEMM": torches.FbgemmAdagrad}[peer]
    theirs = kind(np.array(data.raw)) if peers.missing(("torch", peer)) == () else None
    with shardemb.open(data.store(f"train-{optimizer}", common.optimizer(optimizer))) as store:
        table = store["rows"]
        settle(table)
        contenders = [Contender(f"lookup + {optimizer} update", step_of(table))]
        if theirs is not None:
            _meet(contenders[0].call, theirs, data, batch)
            contenders.append(Contender(kind.name, theirs.step))
        cases = [
            _steps(settings, table, contenders, distribution, batch, target, kind.name)
            for distribution, target in targets.items()
        ]
        store.rollback()
    return cases


def _meet(ours, theirs, data, batch):
    """Before the first step both return the same bytes; torch makes its state in it."""
    given = make_batches("uniform", data.rows)(batch)
    if not same_bytes(ours(given), theirs.step(given).numpy()):
        raise AssertionError(f"{theirs.name} returned other bytes")


def _steps(settings, table, contenders, distribution, batch, target, peer):
    make = make_batches(distribution, table.num_embeddings)
    arms = race(contenders, make, batch, settings.times(15))
    ours = contenders[0].name
    distinct = np.unique(make(batch)[0]).size / batch
    record = table.nbytes / table.num_embeddings
    # Rows out, gradients in, and each distinct record read and written.
    moved = 2 * ROW_BYTES + distinct * record
    return Case(
        f"{distribution}, {contenders[0].name}",
        tuple(arms.values()),
        (faster(arms, ours, peer, target),),
        True if len(contenders) > 1 else None,
        settings.machine.copy_bytes_per_s / moved,
        (f"{distinct:.0%} of a batch is distinct",),
    )
