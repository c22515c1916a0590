"""What a table costs by its size if only a few rows were ever written: nothing should depend on the size."""

import re
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

import shardemb

from . import common
from .common import DIM

SIZES = [10**6, 10**7, 10**8, 10**9]
"""Rows. Not scaled; see `opening`."""

WRITTEN = BATCH = 16_384 if common.SCALE else 2_048
BUDGET = 256 * 2**20


def anonymous_bytes():
    """Return the anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) * 1024


class Scale(common.Timed):
    """An Adam table with random initial values, after 16,384 random rows were updated and committed."""

    params = [SIZES]
    param_names = ["rows"]
    timeout = 300

    def setup(self, rows):
        self.folder = tempfile.mkdtemp()
        self.path = Path(self.folder) / "s.zarr"
        self.before = anonymous_bytes()
        self.store = shardemb.open(self.path, memory_budget=BUDGET)
        started = time.perf_counter()
        self.table = self.store.create_table(
            "t",
            num_embeddings=rows,
            embedding_dim=DIM,
            initializer=common.INITIAL,
            optimizer=common.optimizer("Adam"),
        )
        self.seconds_to_create = time.perf_counter() - started
        self.written = common.make_ids("uniform", rows, WRITTEN)
        self.table.update(self.written, common.make_values(WRITTEN))
        self.store.commit()
        others = common.make_ids("uniform", rows, BATCH // 2)
        self.ids = common.random.permutation(np.concatenate([self.written[: BATCH // 2], others]))
        self.out = np.empty((BATCH, DIM), np.float32)
        self.table.lookup(self.ids, out=self.out)

    def teardown(self, _):
        self.store.close()
        shutil.rmtree(self.folder)

    def time_lookup(self, _):
        """Half of the rows were written, the other half never."""
        self.table.lookup(self.ids, out=self.out)

    def track_create_seconds(self, _):
        """Until the table exists; a commit makes it durable."""
        return self.seconds_to_create

    track_create_seconds.unit = "s"

    def track_open_seconds(self, _):
        self.store.close()
        started = time.perf_counter()
        self.store = shardemb.open(self.path)
        return time.perf_counter() - started

    track_open_seconds.unit = "s"

    def track_anonymous_bytes(self, _):
        """Growth of memory since before the store was opened, including the updated rows."""
        return anonymous_bytes() - self.before

    track_anonymous_bytes.unit = "bytes"

    def track_bytes_on_disk_per_row(self, _):
        """Disk space of the shards, per row that was written; a page is 4,096 bytes."""
        self.store.checkpoint()
        stats = self.table.stats()
        return stats["bytes_allocated"] / stats["rows_written"]

    track_bytes_on_disk_per_row.unit = "bytes"
