"""How many dask tasks a batch is cut into: none for a small one, a few for a large one, never one per shard."""

import time

import numpy as np
from dask.callbacks import Callback

import shardemb

from . import common
from .common import DIM, LARGE, MEDIUM, ROW_BYTES, ROWS, SMALL, Timed

CORES = 2
NUM_SHARDS = 64


class Tasks:
    """A table of 64 shards on two cores, however many the machine has."""

    params = [[ROWS], [SMALL, MEDIUM, LARGE]]
    param_names = ["rows", "batch"]

    def setup_cache(self):
        rows = {
            "num_embeddings": ROWS,
            "optimizer": common.optimizer("SGD"),
            "rows_per_shard": ROWS // NUM_SHARDS,
        }
        return common.build("tasks.zarr", rows=rows)

    def setup(self, path, rows, batch):
        self.store = shardemb.open(path, threads=CORES)
        self.ids = common.make_ids("uniform", rows, batch)
        self.values = common.make_values(batch)
        self.store["rows"].lookup(self.ids)  # warm, because a cold batch is read ahead in separate tasks

    def teardown(self, *_):
        self.store.rollback()
        self.store.close()

    def track_lookup_tasks(self, *_):
        with _Counter() as counter:
            self.store["rows"].lookup(self.ids)
        return counter.tasks

    def track_update_tasks(self, *_):
        with _Counter() as counter:
            self.store["rows"].update(self.ids, self.values)
        return counter.tasks

    track_lookup_tasks.unit = track_update_tasks.unit = "tasks"


class Rested(Timed):
    """The size from which a lookup in memory is worth two tasks; `plan.TASK_BYTES` is based on this."""

    params = [[2, 4, 8, 16], [1, 2], [0.0, 0.02]]
    param_names = ["MiB", "tasks", "seconds of sleep before"]

    def setup_cache(self):
        rows = {"num_embeddings": ROWS, "optimizer": common.optimizer("SGD")}
        return common.build("rested.zarr", rows=rows)

    def setup(self, path, mib, tasks, rest_s):
        # Here, because older packages have it elsewhere and can run the rest.
        from shardemb.compute import plan

        self.table = common.warm_table(path, "rows")
        self.plan, self.least, plan.TASK_BYTES = plan, plan.TASK_BYTES, mib * 2**20 // tasks
        size = mib * 2**20 // ROW_BYTES
        self.ids, self.out = common.make_ids("uniform", ROWS, size), np.zeros((size, DIM), np.float32)
        self.table.lookup(self.ids, out=self.out)
        time.sleep(rest_s)

    def teardown(self, *_):
        self.plan.TASK_BYTES = self.least

    def time_lookup(self, *_):
        self.table.lookup(self.ids, out=self.out)


class _Counter(Callback):
    tasks = 0

    def _posttask(self, *_):
        self.tasks += 1
