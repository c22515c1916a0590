"""Lookups from disk: before every call, the table's pages are dropped from memory."""

import resource
import time

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
        self.table = common.store(path, warm=False)["rows"]

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


class WholeRowWrite(_Cold):
    """A batch of whole rows, and a commit of them, while nothing of the table is in memory: no old row is needed."""

    params = [[ROWS], ["uniform"], [MEDIUM]]

    def setup(self, path, rows, distribution, batch):
        if not self.has_run:
            self.open_cold(path)
            self.write(common.make_ids(distribution, rows, batch))  # This loads the kernels.
            self.has_run = True
        self.open_cold(path)
        self.ids = common.make_ids(distribution, rows, batch)

    def write(self, ids):
        self.table.write(ids, common.make_values(ids.size))
        self.store.commit()

    def open_cold(self, path):
        super().open_cold(path)
        self.store = common.store(path)

    def track_bytes_read(self, *_):
        """Bytes read from the disk for it; 0 is ideal."""
        before = pagecache.bytes_read()
        self.write(self.ids)
        return pagecache.bytes_read() - before

    track_bytes_read.unit = "bytes"


class Warming(_Cold):
    """A table that a training begins with while none of it is in memory, and that is read as a whole meanwhile."""

    params = [[ROWS], ["uniform"], [MEDIUM]]
    calls = 16

    def setup(self, path, rows, distribution, batch):
        super().setup(path, rows, distribution, batch)
        common.close(path)
        pagecache.require_cold(path)
        self.batches = [common.make_ids(distribution, rows, batch) for _ in range(self.calls)]

    def track_bytes_read_per_byte(self, path, *_):
        """Bytes read until all of it is in memory, per byte of it; above 1, some of it was read twice."""
        before = pagecache.bytes_read()
        table = common.store(path)["rows"]
        for ids in self.batches:
            table.lookup(ids)
        if hasattr(table, "warm"):
            table.warm()
        else:
            for ids in common.blocks(table.num_embeddings):
                table.lookup(ids)
        return (pagecache.bytes_read() - before) / table.nbytes

    track_bytes_read_per_byte.unit = "bytes per byte"


def _bytes_read_per_page(table, ids):
    before = pagecache.bytes_read()
    table.lookup(ids)
    return (pagecache.bytes_read() - before) / (_num_pages(ids) * PAGE)


def _num_pages(ids):
    return np.unique(ids * ROW_BYTES // PAGE).size


def _major_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
