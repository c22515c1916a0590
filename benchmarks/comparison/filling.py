"""Filling a table with as much as possible of the disk's speed (W17)."""

import os

import numpy as np

import shardemb
from benchmarks.common import DIM, ROW_BYTES

from .data import make_values, remove
from .processes import MIB, Watch
from .racing import Contender, race, same_bytes
from .reading import LARGE
from .results import Bar, Case, at_most

BLOCK = 262_144
OURS, PLAIN = "write + commit + checkpoint", "a plain file, synced"


def fill(settings):
    """W17: all rows in ascending order, a block at a time, then a commit and a checkpoint."""
    rows = settings.rows(LARGE)
    filling = _Filling(settings.folder, rows, settings.batch(BLOCK, rows))
    contenders = [
        Contender(OURS, filling.ours, prepare=filling.create),
        Contender(PLAIN, filling.plain, prepare=filling.clean),
    ]
    arms = race(contenders, lambda _: None, rows, settings.times(3))
    filling.clean()
    share = arms[OURS].rate / arms[PLAIN].rate
    bars = (
        Bar("of the rate of a plain file", share, 0.6, stretch=0.8),
        at_most("anonymous memory", max(filling.growth) / MIB, 512.0, "MiB"),
    )
    speeds = [f"{name}: {arm.rate * ROW_BYTES / 1e9:.2f} GB/s" for name, arm in arms.items()]
    notes = (
        f"{rows * ROW_BYTES / 1e9:.1f} GB in blocks of {filling.block:,} rows; {', '.join(speeds)}",
        f"with the interpreter and the values that are written: {max(filling.peaks) / MIB:,.0f} MiB",
        f"bytes written, of the rows: {max(filling.written):.2f} times",
    )
    facts = {"written": max(filling.written), "peak_mib": max(filling.peaks) / MIB}
    return [Case("ascending", tuple(arms.values()), bars, True, notes=notes, facts=facts)]


class _Filling:
    """A new table and a new file, and what it takes to fill them; the values of a block are used again and again."""

    def __init__(self, folder, rows, block):
        self.path, self.file, self.rows, self.block = folder / "filled.zarr", folder / "filled", rows, block
        self.values = make_values(np.arange(block))
        self.store = None
        self.growth, self.peaks, self.written = [], [], []

    def clean(self):
        """Close and delete both; the disk has nothing left to do afterwards."""
        if self.store is not None:
            self.check()
            self.store.close()
            self.store = None
        remove(self.path)
        remove(self.file)
        os.sync()

    def create(self):
        self.clean()
        self.store = shardemb.open(self.path, mode="w")
        self.store.create_table("rows", num_embeddings=self.rows, embedding_dim=DIM)
        self.store.commit()

    def blocks(self):
        starts = range(0, self.rows, self.block)
        return ((start, min(start + self.block, self.rows)) for start in starts)

    def ours(self, _):
        before = self.store.stats()["bytes_written"]
        with Watch() as watch:
            table = self.store["rows"]
            for start, stop in self.blocks():
                table.write(np.arange(start, stop), self.values[: stop - start])
            self.store.commit()
            self.store.checkpoint()
        self.growth.append(watch.growth)
        self.peaks.append(watch.peak)
        self.written.append((self.store.stats()["bytes_written"] - before) / (self.rows * ROW_BYTES))

    def plain(self, _):
        with self.file.open("wb", buffering=0) as file:
            for start, stop in self.blocks():
                file.write(self.values[: stop - start])
            os.fsync(file.fileno())

    def check(self):
        """Read rows of every block as another reader sees them."""
        ids = np.concatenate([np.linspace(start, stop - 1, 64, dtype=int) for start, stop in self.blocks()])
        with shardemb.open(self.path, mode="r") as reader:
            if not same_bytes(reader["rows"].lookup(ids), self.values[ids % self.block]):
                raise AssertionError("other bytes than were written")
