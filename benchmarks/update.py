"""Changes in memory: optimizer steps and writes. Nothing is committed."""

from . import common
from .common import DISTRIBUTIONS, LARGE, ROWS

OPTIMIZERS = ["SGD", "Adagrad", "RowWiseAdagrad", "Adam"]


class _Change(common.Timed):
    param_names = ["rows", "ids"]

    def setup_cache(self):
        tables = {
            name: {"num_embeddings": ROWS, "initializer": common.INITIAL, "optimizer": common.optimizer(name)}
            for name in OPTIMIZERS
        }
        return common.build("update.zarr", **tables)

    def make_batch(self, rows, distribution):
        self.ids = common.make_ids(distribution, rows, LARGE)
        self.values = common.make_values(LARGE)


class Update(_Change):
    """One step on rows that were updated before: the steady state of training."""

    params = [[ROWS], DISTRIBUTIONS, OPTIMIZERS]
    param_names = ["rows", "ids", "optimizer"]

    def setup(self, path, rows, distribution, optimizer):
        self.table = common.trained_table(path, optimizer)
        self.make_batch(rows, distribution)

    def time_update(self, *_):
        self.table.update(self.ids, self.values)


class FirstUpdate(_Change):
    """One step on rows that were never written: each gets its initial values, and each page is copied."""

    params = [[ROWS], DISTRIBUTIONS]

    def setup(self, path, rows, distribution):
        self.table = common.store(path)["Adam"]
        self.table.update([0], common.make_values(1))
        common.roll_back(path)
        self.make_batch(rows, distribution)

    def teardown(self, path, *_):
        common.roll_back(path)

    def time_update(self, *_):
        self.table.update(self.ids, self.values)


class Write(_Change):
    """Overwriting the weights of rows that were written before."""

    params = [[ROWS], DISTRIBUTIONS]

    def setup(self, path, rows, distribution):
        self.table = common.trained_table(path, "SGD")
        self.make_batch(rows, distribution)
        self.table.write(self.ids[:1], self.values[:1])

    def time_write(self, *_):
        self.table.write(self.ids, self.values)
