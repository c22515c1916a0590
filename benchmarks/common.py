"""What the benchmarks share: sizes, ids, and stores that stay open as long as their process.

asv runs `setup` before *every* timed call. A table opened there would be mapped again each time, and a warm lookup
would pay for page faults. So stores are opened once per process, here, and `setup` only makes fresh ids.
"""

import atexit
import importlib
import inspect
import os
import sys
from pathlib import Path

import numpy as np

import shardemb

SCALE = float(os.environ.get("SHARDEMB_BENCH_SCALE", "0.05"))
"""1 is the size at which numbers are quoted: 4,000,000 rows of 64 values, 1 GB."""

DIM = 64
ROW_BYTES = 4 * DIM
PAGE = 4096

SMALL, MEDIUM, LARGE = 16, 4096, 65_536

DISTRIBUTIONS = ["uniform", "zipf", "sorted"]
ZIPF_EXPONENT = 1.05
_SCATTER = 2_654_435_761  # a prime, so multiplying by it permutes the ids of any smaller table

LEARNING_RATE = 1e-3
INITIAL = shardemb.initializers.Uniform(-0.05, 0.05, seed=0)

_LEAST_ROWS = 4096

random = np.random.default_rng(20)


def scaled(rows):
    """Return the number of rows of a table at this scale."""
    return max(_LEAST_ROWS, int(rows * SCALE))


ROWS = scaled(4_000_000)


class Timed:
    """Base of all timed benchmarks: one call after each `setup`, because a second call would find another state."""

    number = 1
    warmup_time = 0.0
    repeat = (5, 50, 2.0)


# ---- ids and values -------------------------------------------------------------------------------------------


def make_ids(distribution, rows, size):
    """Draw ids: uniform; Zipf with the hot rows scattered; or a run of neighbours in ascending order."""
    if distribution == "uniform":
        return random.integers(0, rows, size)
    if distribution == "zipf":
        return _zipf_ranks(rows, size) * _SCATTER % rows
    return np.sort((random.integers(0, rows) + np.arange(size)) % rows)


def _zipf_ranks(rows, size):
    # Inversion of the continuous distribution, which needs no table and allows any number of rows.
    power = 1 - ZIPF_EXPONENT
    ranks = (1 - random.random(size) * (1 - float(rows) ** power)) ** (1 / power)
    return np.clip(ranks.astype(np.int64) - 1, 0, rows - 1)


def make_values(size, dim=DIM):
    """Draw rows or gradients."""
    return random.random((size, dim), dtype=np.float32)


def optimizer(name):
    """Create an optimizer of `shardemb.optim` by its name."""
    return getattr(shardemb.optim, name)(lr=LEARNING_RATE)


def blocks(rows):
    """Return all ids of a table, a large batch at a time."""
    return (np.arange(start, min(start + LARGE, rows)) for start in range(0, rows, LARGE))


# ---- processes ------------------------------------------------------------------------------------------------


def _load_heavy():
    """Import what the first store would import, once for all processes that asv forks, but not the package itself.

    A process that was forked after the package had loaded its scheduler runs every batch on one thread.
    """
    for name in ("dask.threaded", "numba", "zarr"):
        importlib.import_module(name)


def _note_fork():
    if "shardemb.compute.scheduler" in sys.modules:
        _forked_late.append(os.getpid())


_forked_late = []
_load_heavy()
os.register_at_fork(after_in_child=_note_fork)


# ---- stores ---------------------------------------------------------------------------------------------------

_open = {}
_prepared = set()


def build(name, **tables):
    """Create a store in the current folder with the given tables (arguments of `create_table`); return its path."""
    path = str(Path(name).absolute())
    with shardemb.open(path, mode="w") as made:
        for table, arguments in tables.items():
            made.create_table(table, **{"embedding_dim": DIM, **arguments})
        made.commit()
    return path


def open_store(path, *, warm, **how):
    """Open a store; `warm` is whether its tables may be read in the background, where the package can do that.

    Without this, a lookup that is to be cold would become a warm one while it is measured. Older packages have no such
    option, and are measured too.
    """
    if "warm" in inspect.signature(shardemb.open).parameters:
        how["warm"] = warm
    return shardemb.open(path, **how)


def store(path, *, warm=True):
    """Open a store, unless this process already has it open."""
    if os.getpid() in _forked_late:
        raise RuntimeError(
            "the package was loaded before asv forked this process: it would measure one thread"
        )
    if path not in _open:
        _open[path] = open_store(path, warm=warm)
    return _open[path]


def warm_table(path, name):
    """Return a table whose pages are all in memory and mapped."""
    return _prepare(path, name, lambda table, ids: table.lookup(ids))


def trained_table(path, name):
    """Return a table whose rows were all updated, so none has to be copied or initialised any more."""
    return _prepare(path, name, lambda table, ids: table.update(ids, np.zeros((ids.size, DIM), np.float32)))


def _prepare(path, name, touch):
    table = store(path)[name]
    if (path, name) not in _prepared:
        for ids in blocks(table.num_embeddings):
            touch(table, ids)
        _prepared.add((path, name))
    return table


def roll_back(path):
    """Roll a store back to its last commit; its tables have to be prepared again."""
    store(path).rollback()
    _prepared.difference_update([key for key in _prepared if key[0] == path])


def close(path):
    """Close a store if this process has it open; nothing is committed."""
    if path in _open:
        roll_back(path)  # else close() would warn about lost changes
        _open.pop(path).close()


@atexit.register
def close_all():
    """Close every store of this process."""
    for path in list(_open):
        close(path)
