"""Commits and rollbacks: how long they take, what they write, how often they wait for the disk."""

import numpy as np

from . import common
from .common import DISTRIBUTIONS, LARGE, ROWS

CHANGED = [1, 1000, LARGE]
NUM_SHARDS = 8


class _Changed(common.Timed):
    def setup_cache(self):
        rows = {
            "num_embeddings": ROWS,
            "initializer": common.make_values(ROWS),
            "rows_per_shard": ROWS // NUM_SHARDS,
        }
        return common.build("commit.zarr", rows=rows)

    def change(self, path, ids):
        self.store = common.store(path)
        self.store["rows"].write(ids, common.make_values(ids.size))


class Commit(_Changed):
    """A commit or a rollback, after a batch of uniform ids was written into a table of eight shards."""

    params = [[ROWS], CHANGED]
    param_names = ["rows", "changed"]

    def setup(self, path, rows, changed):
        first = np.zeros(1, np.int64)
        self.change(path, first)
        self.store.commit()
        self.change(path, first)
        self.store.rollback()
        self.change(path, common.make_ids("uniform", rows, changed))

    def teardown(self, path, *_):
        common.roll_back(path)

    def time_commit(self, *_):
        self.store.commit()

    def time_rollback(self, *_):
        self.store.rollback()


class CommitBytes(_Changed):
    """What a commit writes."""

    params = [[ROWS], DISTRIBUTIONS]
    param_names = ["rows", "ids"]

    def setup(self, path, rows, distribution):
        self.ids = common.make_ids(distribution, rows, LARGE)
        for _ in range(2):  # until a segment of the log is large enough, as after a while of training
            self.change(path, self.ids)
            self.store.commit()
        self.change(path, self.ids)

    def track_bytes_per_changed_row(self, *_):
        """Bytes written to files within `commit`, per changed row of 256 bytes."""
        before = self.store.stats()["bytes_written"]
        self.store.commit()
        return (self.store.stats()["bytes_written"] - before) / np.unique(self.ids).size

    track_bytes_per_changed_row.unit = "bytes"


class CommitSyncs(_Changed):
    """How often a commit waits for the disk, after rows of all eight shards changed."""

    params = [[ROWS]]
    param_names = ["rows"]

    def setup(self, path, rows):
        self.change(path, np.linspace(0, rows - 1, 1000).astype(np.int64))

    def track_syncs(self, *_):
        before = self.store.stats()["syncs"]
        self.store.commit()
        return self.store.stats()["syncs"] - before

    track_syncs.unit = "syncs"
