"""Many tables in one call, as in a recommender, against one table of the same size."""

from . import common
from .common import MEDIUM, ROWS

NUM_TABLES = 26
TABLES = {"26 tables": [f"t{k}" for k in range(NUM_TABLES)], "one table": ["all"]}


class ManyTables(common.Timed):
    """26 x 4,096 ids, spread over the tables of one store."""

    params = [[ROWS], list(TABLES)]
    param_names = ["rows in all", "tables"]

    def setup_cache(self):
        sizes = {name: ROWS // len(names) for names in TABLES.values() for name in names}
        how = {"initializer": common.INITIAL, "optimizer": common.optimizer("RowWiseAdagrad")}
        return common.build(
            "many.zarr", **{name: {"num_embeddings": size, **how} for name, size in sizes.items()}
        )

    def setup(self, path, rows, tables):
        names = TABLES[tables]
        for name in names:
            common.trained_table(path, name)
        self.store = common.store(path)
        size = NUM_TABLES * MEDIUM // len(names)
        self.ids = {name: common.make_ids("uniform", rows // len(names), size) for name in names}
        self.store.lookup({name: ids[:1] for name, ids in self.ids.items()})
        self.batches = {name: (ids, common.make_values(size)) for name, ids in self.ids.items()}

    def time_lookup(self, *_):
        self.store.lookup(self.ids)

    def time_update(self, *_):
        self.store.update(self.batches)
