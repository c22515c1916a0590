"""The tables that all arms hold, in memory, in a file or in a store. Values are a function of row and column."""

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM

from .machine import Machine

BLOCK = 65_536

_MULTIPLIERS = np.uint32(2_654_435_761), np.uint32(2_246_822_519)
_ONE = np.uint32(0x3F800000)


@dataclass(frozen=True)
class Settings:
    """The options of a run, and the machine that it is on."""

    folder: Path
    scale: float
    machine: Machine

    def rows(self, full):
        """Return the number of rows of a table at this scale."""
        return max(4096, int(full * self.scale))

    def batch(self, full, rows):
        """Return the size of a batch: as at full scale, but not too large a part of a small table."""
        return min(full, max(64, rows // 16))

    def times(self, full):
        """Return the number of repetitions: few in a smoke test."""
        return full if self.scale >= 0.2 else min(full, 3)

    def data(self, full):
        """Return the table with that many rows, which is created at its first use."""
        return Data(self.folder, self.rows(full))


def make_values(ids):
    """Return the values of rows: random bits in the mantissa, always the same for the same row."""
    bits = np.asarray(ids, np.uint32)[..., None] * np.uint32(DIM) + np.arange(DIM, dtype=np.uint32)
    bits *= _MULTIPLIERS[0]
    bits ^= bits >> np.uint32(15)
    bits *= _MULTIPLIERS[1]
    bits ^= bits >> np.uint32(13)
    bits >>= np.uint32(9)
    bits |= _ONE
    values = bits.view(np.float32)
    values -= np.float32(1.5)
    return values


def batches(rows, size=BLOCK):
    """Return all ids of a table, a block at a time."""
    return (np.arange(start, min(start + size, rows)) for start in range(0, rows, size))


class Data:
    """One table's values, in several forms below a folder."""

    def __init__(self, folder, rows):
        self.rows = rows
        self.folder = Path(folder) / f"rows-{rows}"
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def raw_file(self):
        """The values as one raw file, for `np.memmap` and as the source of everything else."""
        return self.made("values.raw", self._write_raw)

    @property
    def raw(self):
        """That file, as a read-only memory map."""
        return np.memmap(self.raw_file, np.float32, "r", shape=(self.rows, DIM))

    @cached_property
    def array(self):
        """The values in memory."""
        return np.fromfile(self.raw_file, np.float32).reshape(self.rows, DIM)

    def store(self, name="store", optimizer=None, **how):
        """Return the path of a store with the values in its table `rows`."""

        def build(path):
            with shardemb.open(path, mode="w") as store:
                shape = {"num_embeddings": self.rows, "embedding_dim": DIM}
                store.create_table("rows", **shape, initializer=self.raw, optimizer=optimizer, **how)
                store.commit()

        return self.made(f"{name}.zarr", build)

    def made(self, name, build):
        """Return the path of what `build(path)` creates, once; an incomplete result is never used."""
        path = self.folder / name
        if not path.exists():
            half = self.folder / f"half-{name}"
            remove(half)
            build(half)
            half.rename(path)
            os.sync()  # else writing it back would disturb what is timed next
        return path

    def remove(self):
        """Delete all forms."""
        remove(self.folder)

    def _write_raw(self, path):
        with path.open("wb") as file:
            for ids in batches(self.rows):
                file.write(make_values(ids))


def remove(path):
    """Delete a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def ids_of(distribution, rows):
    """Make a function that returns a given number of fresh ids."""
    return lambda size: common.make_ids(distribution, rows, size)


def warm(table):
    """Touch every page of a table."""
    for ids in batches(table.num_embeddings):
        table.lookup(ids)
