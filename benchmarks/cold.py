"""Lookups from disk: before every call, the table's pages are dropped from memory."""

import resource
import time
from pathlib import Path

import numpy as np

from . import common, pagecache
from .common import LARGE, MEDIUM, PAGE, ROW_BYTES

ROWS = common.scaled(16_000_000)


class _Cold(common.Timed):
    has_run = False
    param_names = ["rows", "ids", "batch"]

    def setup_cache(self):
        return common.build(
            "cold.zarr", rows={"num_embeddings": ROWS, "initializer": common.make_values(ROWS)}
        )

    def setup(self, path, rows, distribution, batch):
        if not self.has_run:
            self.open_cold(path)
            # This loads the kernels of a cold lookup.
            self.table.lookup(common.make_ids(distribution, rows, batch))
            self.has_run = True
        self.open_cold(path)
        self.ids = common.make_ids(distribution, rows, batch)

    def open_cold(self, path):
        common.close(path)  # mapped pages cannot be dropped
        pagecache.require_cold(path)
        self.table = common.store(path)["rows"]

    def teardown(self, path, *_):
        common.close(path)


class ColdLookup(_Cold):
    """One batch of a table with no page in memory. Skipped where the page cache cannot be dropped."""

    params = [[ROWS], ["uniform", "zipf"], [MEDIUM, LARGE]]

    def time_lookup(self, *_):
        self.table.lookup(self.ids)


class ColdReads(_Cold):
    """What the kernel does for a batch."""

    params = [[ROWS], ["uniform", "zipf"], [MEDIUM]]

    def track_bytes_read_per_page(self, *_):
        """Bytes read from the device, per byte of the pages that hold the batch's rows; 1 is ideal."""
        return _bytes_read_per_page(self.table, self.ids)

    track_bytes_read_per_page.unit = "bytes per byte"

    def track_major_faults_per_page(self, *_):
        """Pages that the gather had to wait for, although the whole batch was read ahead."""
        before = _major_faults()
        self.table.lookup(self.ids)
        return (_major_faults() - before) / _num_pages(self.ids)

    track_major_faults_per_page.unit = "faults per page"


class Prefetch(_Cold):
    """A lookup whose pages were prefetched, with enough time to arrive."""

    params = [[ROWS], ["uniform", "zipf"], [MEDIUM]]

    def setup(self, path, rows, distribution, batch):
        super().setup(path, rows, distribution, batch)
        self.table.prefetch(self.ids)
        time.sleep(0.2)

    def time_lookup(self, *_):
        self.table.lookup(self.ids)

    def track_bytes_read_per_page(self, *_):
        """Bytes that are still read, per byte of the pages that hold the batch's rows; 0 is ideal."""
        return _bytes_read_per_page(self.table, self.ids)

    track_bytes_read_per_page.unit = "bytes per byte"


def _bytes_read_per_page(table, ids):
    before = _bytes_read()
    table.lookup(ids)
    return (_bytes_read() - before) / (_num_pages(ids) * PAGE)


def _num_pages(ids):
    return np.unique(ids * ROW_BYTES // PAGE).size


def _major_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _bytes_read():
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))
