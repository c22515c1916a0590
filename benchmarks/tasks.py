"""Into how many tasks for dask a batch is cut: none for a small one, a few for a large one, never one a shard."""

from dask.callbacks import Callback

import shardemb

from . import common
from .common import LARGE, MEDIUM, ROWS, SMALL

CORES = 2
NUM_SHARDS = 64


class Tasks:
    """A table of 64 shards on two cores, whatever the machine has."""

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
        self.store["rows"].lookup(self.ids)  # warm: a cold batch is read ahead in tasks of its own

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


class _Counter(Callback):
    tasks = 0

    def _posttask(self, *_):
        self.tasks += 1
