"""A hundred steps that begin cold (W14), or right after the table was created (W15), against the same steps warm."""

from functools import partial

import numpy as np

import shardemb
from benchmarks import common, pagecache
from benchmarks.common import DIM

from . import peers, torches
from .data import remove, warm
from .processes import CannotRun
from .racing import Contender, drop_caches, race, read_files, same_bytes
from .reading import FULL
from .results import Case, at_most, faster
from .training import BATCH, make_steps, step_of

STEPS = 100
COMPARED = 4096
"""Rows of the last step that all arms look up in the end: they are in memory then, so this takes a millisecond."""

WARM, COLD, READ, CREATED = (
    "warm: 100 steps",
    "cold: open + 100 steps",
    "one sequential read of the files",
    "after creation: 100 steps",
)
TORCH = "torch.load + 100 SparseAdam steps"
SAVED = "saved-cold.pt"

# ---- W14: a table of which nothing is in memory -------------------------------------------------------------------


def cold_start(settings):
    """W14: opening a cold table and a hundred steps, against reading its files once and the same steps warm."""
    data = settings.data(FULL)
    inputs = _inputs(settings, data)
    opening = _Opening(data.store("train-Adam", common.optimizer("Adam")))
    contenders = [
        Contender(COLD, opening.open_and_train, prepare=opening.make_cold),
        Contender(WARM, partial(opening.train, WARM), prepare=opening.make_warm),
        Contender(READ, opening.read, prepare=opening.make_cold),
    ]
    if peers.has("torch"):
        saved, found = _saved_by_torch(data), opening.found
        theirs = partial(_load_and_train, saved, found)
        contenders.append(Contender(TORCH, theirs, prepare=partial(drop_caches, saved)))
    arms = race(contenders, lambda _: inputs, _ids(inputs), settings.times(3), keep=False)
    opening.close()
    remove(data.folder / SAVED)
    floor = arms[READ].median + arms[WARM].median
    bars = (
        at_most("cold vs a sequential read + warm", arms[COLD].median / floor, 1.3, "x", stretch=1.1),
        faster(arms, COLD, TORCH, 1.0),
    )
    notes = (
        f"{len(inputs)} steps a run, of the same ids in every run; each step has other ids",
        f"a sequential read + warm: {floor:.2f} s",
        f"the cold arm read {opening.read_cold / 2**20:,.0f} MiB, of {opening.nbytes / 2**20:,.0f} MiB",
    )
    equal = _agree(opening.found, {TORCH})
    return [Case("zipf", tuple(arms.values()), bars, equal, _ids(inputs) / floor, notes)]


class _Opening:
    """Opens one store again and again, of which all or nothing is in memory."""

    def __init__(self, path):
        self.path, self.store = path, None
        self.found = {}
        """What each arm looked up in the end."""
        self.read_cold = 0

    @property
    def nbytes(self):
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def close(self):
        if self.store is not None:
            self.store.rollback()
            self.store.close()
            self.store = None

    def make_cold(self):
        self.close()
        drop_caches(self.path)

    def make_warm(self):
        self.make_cold()  # pages that were read or written one by one are slower for long after
        read_files(self.path)
        self.store = shardemb.open(self.path)
        warm(self.store["rows"])
        require_warm(self.path)

    def open_and_train(self, inputs):
        before = pagecache.bytes_read()
        self.store = common.open_store(self.path, warm=True)
        self.train(COLD, inputs)
        self.read_cold = pagecache.bytes_read() - before

    def train(self, name, inputs):
        self.found[name] = train(self.store["rows"], inputs)

    def read(self, _):
        before = pagecache.bytes_read()
        read_files(self.path)
        if pagecache.bytes_read() - before < 0.9 * self.nbytes:
            raise CannotRun("the kernel does not say that it read the files: is this file system in memory?")


def _saved_by_torch(data):
    def build(path):
        peer = torches.TorchAdam(np.array(data.raw))
        peer.make_state()
        peer.save(path)

    return data.made(SAVED, build)


def _load_and_train(saved, found, inputs):
    peer = torches.TorchAdam.load(saved)
    for batch in inputs:
        peer.step(batch)
    found[TORCH] = peer.rows(_compared(inputs))


# ---- W15: a table that was just created ---------------------------------------------------------------------------


def first_steps(settings):
    """W15: a hundred steps as soon as a table was created from an array, against the same steps warm."""
    data = settings.data(FULL)
    inputs = _inputs(settings, data)
    made = _Creation(data)
    contenders = [
        Contender(CREATED, partial(made.train, CREATED), prepare=made.create),
        Contender(WARM, partial(made.train, WARM), prepare=made.make_warm),
    ]
    arms = race(contenders, lambda _: inputs, _ids(inputs), settings.times(3), keep=False)
    made.remove()
    ratio = arms[CREATED].median / arms[WARM].median
    bars = (at_most("after creation vs warm", ratio, 1.15, "x"),)
    notes = (f"{len(inputs)} steps a run; creation and its commit are not part of it",)
    return [Case("zipf", tuple(arms.values()), bars, _agree(made.found), notes=notes)]


class _Creation(_Opening):
    """Creates the store again and again, with a table from an array in memory, and leaves it open."""

    def __init__(self, data):
        super().__init__(data.folder / "created.zarr")
        self.array = data.array

    def create(self):
        self.remove()
        self.store = shardemb.open(self.path, mode="w")
        shape = {"num_embeddings": len(self.array), "embedding_dim": DIM}
        optimizer = common.optimizer("Adam")
        self.store.create_table("rows", **shape, initializer=self.array, optimizer=optimizer)
        self.store.commit()

    def make_warm(self):
        if self.store is None:
            self.create()
        super().make_warm()

    def remove(self):
        self.close()
        remove(self.path)


# ---- both ---------------------------------------------------------------------------------------------------------


def train(table, inputs):
    """Take the steps; return some rows that the last one has changed."""
    step = step_of(table)
    for batch in inputs:
        step(batch)
    return table.lookup(_compared(inputs))


def require_warm(path):
    """Check that the table's rows are in memory; the end of a shard may be empty, and then nobody reads it."""
    pages = np.concatenate([pagecache.residency(file) for file in path.glob("rows/rows/c.*")])
    if pages.mean() < 0.99:
        raise CannotRun(f"only {pages.mean():.0%} of the table's pages stay in the page cache")


def _inputs(settings, data):
    steps = STEPS if settings.scale >= 0.2 else STEPS // 5
    return make_steps("zipf", data.rows, settings.batch(BATCH, data.rows), steps)


def _ids(inputs):
    return sum(ids.size for ids, _ in inputs)


def _compared(inputs):
    return inputs[-1][0][:COMPARED]


def _agree(found, others=frozenset()):
    """Return whether all arms of ours found the same bytes, and other libraries the same within 1e-5."""
    expected = found[WARM]
    return all(
        np.allclose(rows, expected, 1e-4, 1e-5) if name in others else same_bytes(rows, expected)
        for name, rows in found.items()
    )
