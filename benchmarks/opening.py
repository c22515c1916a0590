"""Opening and creating: a store of any size opens immediately and takes no disk space."""

import shutil
import tempfile
from pathlib import Path

import shardemb

from . import common

SIZES = [10**3, 10**6, 10**9]
"""Rows. Not scaled: a table that was never written to takes no disk space and no time, which is what is measured."""

BLOCK = 512  # the unit of st_blocks


def _table(rows):
    return {"num_embeddings": rows, "initializer": common.INITIAL, "optimizer": common.optimizer("Adam")}


class Open(common.Timed):
    """A store with one Adam table that was never written to."""

    params = [SIZES]
    param_names = ["rows"]

    def setup_cache(self):
        return {rows: common.build(f"{rows}.zarr", rows=_table(rows)) for rows in SIZES}

    def setup(self, paths, rows):
        self.path = paths[rows]
        self.open_and_look_up(rows)

    def open_and_look_up(self, rows):
        with shardemb.open(self.path) as store:
            store["rows"].lookup([0, rows - 1])

    def time_open_and_close(self, *_):
        shardemb.open(self.path).close()

    def time_open_and_look_up(self, _, rows):
        self.open_and_look_up(rows)

    def track_disk_bytes(self, *_):
        """Disk space of the store: all its files and folders together."""
        return sum(path.lstat().st_blocks for path in self.found()) * BLOCK

    def track_files(self, *_):
        """Files and folders of the store."""
        return len(self.found())

    def found(self):
        return [Path(self.path), *Path(self.path).rglob("*")]

    track_disk_bytes.unit = "bytes"
    track_files.unit = "files"


class Create(common.Timed):
    """Creating a store and its table, until they are durable."""

    params = [SIZES]
    param_names = ["rows"]

    def setup(self, *_):
        self.folder = tempfile.mkdtemp()
        self.create("first.zarr", SIZES[0])

    def teardown(self, *_):
        shutil.rmtree(self.folder)

    def create(self, name, rows):
        common.build(Path(self.folder, name), rows=_table(rows))

    def time_create_and_commit(self, rows):
        self.create("timed.zarr", rows)
