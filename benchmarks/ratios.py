"""Lookups and training steps against NumPy in RAM, in one process: on a noisy machine, ratios say more than times."""

import time
from concurrent.futures import ThreadPoolExecutor

import dask
import dask.system
import numpy as np

from . import common
from .common import DIM, DISTRIBUTIONS, LARGE, ROWS
from .comparison.torches import numpy_rowwise_adagrad
from .lookup import UNTOUCHED, _Lookup

PAIRS = 15
"""Repetitions. Ours and the peer take turns, so both meet the same noise."""


class LookupRatio(_Lookup):
    """Time of a warm `Table.lookup` of a table on disk, as a multiple of the peer's on an array in RAM.

    Below 1 is faster than RAM. asv counts a growing number as a regression, which it is.
    """

    params = [[ROWS], DISTRIBUTIONS, [LARGE]]

    def setup(self, path, rows, distribution, batch):
        super().setup(path, rows, distribution, batch)
        self.array = np.concatenate([self.table.lookup(ids) for ids in common.blocks(rows)])
        self.fresh = lambda: common.make_ids(distribution, rows, batch)

    def track_lookup_out_vs_take(self, *_):
        """Both into an existing array; with `mode="clip"`, `np.take` does not buffer it."""
        theirs = np.zeros((LARGE, DIM), np.float32)
        return _ratio(
            self.fresh,
            lambda ids: self.table.lookup(ids, out=self.out),
            lambda ids: np.take(self.array, ids, axis=0, out=theirs, mode="clip"),
        )

    def track_lookup_vs_index(self, *_):
        """Both into new memory."""
        return _ratio(self.fresh, self.table.lookup, lambda ids: self.array[ids])

    def track_lookup_out_vs_pool(self, *_):
        """Both ours; the other runs all its tasks on a pool from dask's configuration, as dask itself would."""
        with ThreadPoolExecutor(dask.system.CPU_COUNT) as pool:

            def pooled(ids):
                with dask.config.set(scheduler=pool):
                    return self.table.lookup(ids, out=self.out)

            return _ratio(self.fresh, lambda ids: self.table.lookup(ids, out=self.out), pooled)

    track_lookup_out_vs_take.unit = track_lookup_vs_index.unit = "times the peer"
    track_lookup_out_vs_pool.unit = "times the pool's"


class TrainingRatio(common.Timed):
    """Time of a lookup and a row-wise Adagrad update, as a multiple of NumPy's on arrays in RAM."""

    params = [[ROWS], DISTRIBUTIONS, [LARGE]]
    param_names = ["rows", "ids", "batch"]

    def setup_cache(self):
        rows = {
            "num_embeddings": ROWS,
            "initializer": common.INITIAL,
            "optimizer": common.optimizer("RowWiseAdagrad"),
        }
        return common.build("training.zarr", rows=rows)

    def setup(self, path, rows, distribution, batch):
        self.table = common.trained_table(path, "rows")
        self.weights = np.concatenate([self.table.lookup(ids) for ids in common.blocks(rows)])
        self.sums = np.zeros(rows, np.float32)
        self.values = common.make_values(batch)
        self.fresh = lambda: common.make_ids(distribution, rows, batch)

    def ours(self, ids):
        rows = self.table.lookup(ids)
        self.table.update(ids, self.values)
        return rows

    def theirs(self, ids):
        return numpy_rowwise_adagrad(self.weights, self.sums, ids, self.values)

    def track_step_vs_numpy(self, *_):
        """Both read and change all rows of the batch."""
        return _ratio(self.fresh, self.ours, self.theirs)

    track_step_vs_numpy.unit = "times the peer"


class UntouchedRatio(common.Timed):
    """Time of a lookup of rows all or half of which were never written, as a multiple of that after writing them."""

    params = [[ROWS], list(UNTOUCHED), ["all", "every other row"]]
    param_names = ["rows", "table", "never written"]

    def setup_cache(self):
        # Values depend on the table's name, so there are several stores with the same tables.
        tables = {
            type(each).__name__: {"num_embeddings": ROWS, "initializer": each} for each in UNTOUCHED.values()
        }
        first_written = {"none": 0, "every other row": 1, "all": None}
        return {
            share: self.write(common.build(f"untouched-{number}.zarr", **tables), first)
            for number, (share, first) in enumerate(first_written.items())
        }

    def write(self, path, first):
        """Write every row, or every second one, with its own values."""
        for table in common.store(path).values() if first is not None else ():
            for block in common.blocks(ROWS):
                ids = block[first :: first + 1]
                table.write(ids, table.lookup(ids))
        common.store(path).commit()
        common.close(path)
        return path

    def setup(self, paths, rows, table, share):
        name = type(UNTOUCHED[table]).__name__
        self.written = common.warm_table(paths["none"], name)
        self.table = common.warm_table(paths[share], name)
        self.out, self.other_out = np.ones((2, LARGE, DIM), np.float32)
        self.fresh = lambda: common.make_ids("uniform", rows, LARGE)

    def track_untouched_vs_written(self, *_):
        """Both into an existing array."""
        return _ratio(
            self.fresh,
            lambda ids: self.table.lookup(ids, out=self.out),
            lambda ids: self.written.lookup(ids, out=self.other_out),
        )

    track_untouched_vs_written.unit = "times written rows"


REST_S = 0.02
"""Pause before each call: a real job has other work between two batches, and threads fall asleep."""


def _ratio(make_ids, ours, theirs):
    """Return our median time over theirs, with fresh ids each time; both must return the same bytes."""
    times = {ours: [], theirs: []}
    for repetition in range(PAIRS):
        ids = make_ids()
        if repetition == 0 and not np.array_equal(ours(ids), theirs(ids)):
            raise AssertionError("the peer returned other rows")
        for call in (ours, theirs) if repetition % 2 else (theirs, ours):
            ids = make_ids()  # else the second would find the rows of the first in the CPU's cache
            time.sleep(REST_S)
            start = time.perf_counter()
            call(ids)
            times[call].append(time.perf_counter() - start)
    return float(np.median(times[ours]) / np.median(times[theirs]))
