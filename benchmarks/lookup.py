"""Lookups in memory: warm rows, optimizer state, rows that were never written."""

import numpy as np

from shardemb.initializers import Constant, Normal, TruncatedNormal, Uniform

from . import common
from .common import DIM, DISTRIBUTIONS, LARGE, MEDIUM, ROWS, SMALL

CALLS = 1000
SHARDS = [1, 64, 1024]

UNTOUCHED = {
    "untouched, constant": Constant(0.5),
    "untouched, uniform": Uniform(-0.05, 0.05, seed=0),
    "untouched, normal": Normal(0.0, 0.05, seed=0),
    "untouched, truncated": TruncatedNormal(0.0, 0.05, seed=0),
}
WRITTEN = "written, uniform"


class _Lookup(common.Timed):
    param_names = ["rows", "ids", "batch"]

    def setup_cache(self):
        return common.build(
            "lookup.zarr", rows={"num_embeddings": ROWS, "initializer": common.make_values(ROWS)}
        )

    def setup(self, path, rows, distribution, batch):
        self.table = common.warm_table(path, "rows")
        self.ids = common.make_ids(distribution, rows, batch)
        self.out = np.ones((batch, DIM), np.float32)  # not np.empty, so that its pages exist
        self.table.lookup_unique(self.ids[:1])


class Lookup(_Lookup):
    """One batch of warm rows."""

    params = [[ROWS], DISTRIBUTIONS, [MEDIUM, LARGE]]

    def time_lookup(self, *_):
        self.table.lookup(self.ids)

    def time_lookup_out(self, *_):
        self.table.lookup(self.ids, out=self.out)


class LookupSmall(common.Timed):
    """Many batches of 16 ids: what a call costs, however many files the table has.

    A single call after `setup` would be timed with other data in the processor's caches.
    """

    params = [[ROWS], SHARDS]
    param_names = ["rows", "shards"]

    def setup_cache(self):
        return common.build(
            "small.zarr",
            **{
                f"of-{shards}": {"num_embeddings": ROWS, "rows_per_shard": -(-ROWS // shards)}
                for shards in SHARDS
            },
        )

    def setup(self, path, rows, shards):
        self.table = common.warm_table(path, f"of-{shards}")
        self.batches = list(common.make_ids("uniform", rows, (CALLS, SMALL)))
        self.out = np.ones((SMALL, DIM), np.float32)

    def time_1000_lookups(self, *_):
        for ids in self.batches:
            self.table.lookup(ids)

    def time_1000_lookups_out(self, *_):
        for ids in self.batches:
            self.table.lookup(ids, out=self.out)


class LookupUnique(_Lookup):
    """Each distinct row once."""

    params = [[ROWS], DISTRIBUTIONS, [LARGE]]

    def time_lookup_unique(self, *_):
        self.table.lookup_unique(self.ids)


class LookupMemory(_Lookup):
    """Peak resident memory of the process, including the touched pages of the table."""

    params = [[ROWS], ["uniform"], [LARGE]]

    def setup(self, path, rows, distribution, batch):
        self.table = common.store(path)["rows"]  # not warmed, because that would map all of it
        self.ids = common.make_ids(distribution, rows, batch)

    def peakmem_lookup(self, *_):
        self.table.lookup(self.ids)

    def peakmem_lookup_unique(self, *_):
        self.table.lookup_unique(self.ids)


class LookupState(common.Timed):
    """A state column of rows that have been trained."""

    params = [[ROWS], DISTRIBUTIONS, [LARGE]]
    param_names = ["rows", "ids", "batch"]

    def setup_cache(self):
        return common.build(
            "state.zarr",
            rows={
                "num_embeddings": ROWS,
                "initializer": common.INITIAL,
                "optimizer": common.optimizer("Adam"),
            },
        )

    def setup(self, path, rows, distribution, batch):
        self.table = common.trained_table(path, "rows")
        self.ids = common.make_ids(distribution, rows, batch)
        self.table.state("exp_avg", self.ids[:1])

    def time_state(self, *_):
        self.table.state("exp_avg", self.ids)


class LookupPresence(common.Timed):
    """Tables with a presence bitmap: rows that were never written are computed, the others are copied."""

    params = [[ROWS], [*UNTOUCHED, WRITTEN]]
    param_names = ["rows", "table"]

    def setup_cache(self):
        tables = {**UNTOUCHED, WRITTEN: common.INITIAL}
        path = common.build(
            "presence.zarr",
            **{
                _table_name(key): {"num_embeddings": ROWS, "initializer": value}
                for key, value in tables.items()
            },
        )
        _write_all(path, _table_name(WRITTEN))
        return path

    def setup(self, path, rows, table):
        self.table = common.warm_table(path, _table_name(table))
        self.ids = common.make_ids("uniform", rows, LARGE)

    def time_lookup(self, *_):
        self.table.lookup(self.ids)


def _table_name(parameter):
    return parameter.replace(", ", "-")


def _write_all(path, name):
    table = common.store(path)[name]
    for ids in common.blocks(ROWS):
        table.write(ids, common.make_values(ids.size))
    common.store(path).commit()
    common.close(path)
