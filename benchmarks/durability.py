"""Folds, paging and recovery: what commits and a memory budget cost later."""

import shutil
from pathlib import Path

import numpy as np

import shardemb

from . import common
from .common import LARGE, ROWS

BATCHES = 4
RECORD_BYTES = 3 * common.ROW_BYTES
"""A row with the two columns of Adam's state."""

ROW_BYTES = 800
"""Memory that a row of 768 bytes takes."""


def _table():
    return {
        "rows": {"num_embeddings": ROWS, "optimizer": common.optimizer("Adam"), "rows_per_shard": ROWS // 8}
    }


def _train(store, batches):
    """Update uniform rows; return how many distinct ones."""
    rows = [common.make_ids("uniform", ROWS, LARGE // BATCHES) for _ in range(batches)]
    for ids in rows:
        store["rows"].update(ids, common.make_values(ids.size))
    return np.unique(np.concatenate(rows)).size


class Fold(common.Timed):
    """`checkpoint` after a commit of uniform rows of eight shards."""

    def setup_cache(self):
        return common.build("fold.zarr", **_table())

    def setup(self, path):
        self.store = common.store(path)
        self.store.checkpoint()
        self.rows = _train(self.store, BATCHES)
        self.store.commit()

    def time_checkpoint(self, _):
        self.store.checkpoint()

    def track_bytes_per_changed_row(self, _):
        """Bytes that a fold writes to shards and checksums, per changed row of 768 bytes."""
        before = self.store.stats()["bytes_written"]
        self.store.checkpoint()
        return (self.store.stats()["bytes_written"] - before) / self.rows

    track_bytes_per_changed_row.unit = "bytes"

    def track_syncs(self, _):
        before = self.store.stats()["syncs"]
        self.store.checkpoint()
        return self.store.stats()["syncs"] - before

    track_syncs.unit = "syncs"


class FoldOfCommits(common.Timed):
    """`checkpoint` after thirteen commits of 1 % of the rows each: most blocks that it writes hold one changed row."""

    num_rows = (
        40_000  # at every scale: a fold writes blocks, and how many rows share one is a matter of the share
    )
    commits = 13

    def setup_cache(self):
        shape = {"num_embeddings": self.num_rows, "rows_per_shard": self.num_rows // 8}
        rows = _table()["rows"] | shape | {"initializer": common.make_values(self.num_rows)}
        return common.build("commits.zarr", rows=rows)

    def setup(self, path):
        self.store = common.store(path)
        self.store.checkpoint()
        chosen = np.random.default_rng(5)  # its own: what ran before must not change the number
        changed = []
        for _ in range(self.commits):
            changed.append(chosen.choice(self.num_rows, self.num_rows // 100, replace=False))
            self.store["rows"].update(changed[-1], common.make_values(changed[-1].size))
            self.store.commit()
        self.nbytes = np.unique(np.concatenate(changed)).size * RECORD_BYTES

    def track_bytes_per_changed_byte(self, _):
        """Bytes that the fold writes to shards and checksums, per byte of the records that changed; 1 is ideal."""
        before = self.store.stats()["bytes_written"]
        self.store.checkpoint()
        return (self.store.stats()["bytes_written"] - before) / self.nbytes

    track_bytes_per_changed_byte.unit = "bytes per byte"


class Paging(common.Timed):
    """Updates of uniform rows with a memory budget of one batch: most rows are spilled and reloaded."""

    def setup_cache(self):
        return common.build("paging.zarr", **_table())

    def setup(self, path):
        self.store = shardemb.open(path, memory_budget=LARGE // BATCHES * ROW_BYTES)
        _train(self.store, 2 * BATCHES)

    def teardown(self, _):
        self.store.rollback()
        self.store.close()

    def time_update(self, _):
        _train(self.store, 1)

    def track_bytes_written_per_row(self, _):
        """Bytes written to the spill file, per updated row."""
        before = self.store.stats()["bytes_written"]
        _train(self.store, BATCHES)
        return (self.store.stats()["bytes_written"] - before) / LARGE

    track_bytes_written_per_row.unit = "bytes"


class Recovery(common.Timed):
    """Opening a store that was killed with a log of `LARGE` rows."""

    def setup_cache(self):
        path = common.build("killed.zarr", **_table())
        with shardemb.open(path) as store:
            _train(store, BATCHES)
            store.commit()
            shutil.copytree(path, "crashed.zarr")
        return str(Path("crashed.zarr").absolute())

    def setup(self, path):
        shutil.rmtree("again.zarr", ignore_errors=True)
        shutil.copytree(path, "again.zarr")

    def time_open_for_writing(self, _):
        shardemb.open("again.zarr").close()

    def time_open_for_reading(self, path):
        shardemb.open(path, mode="r").close()

    def time_verify(self, path):
        with shardemb.open(path, mode="r") as store:
            assert store.verify() == []
            np.asarray(store["rows"].lookup([0]))
