"""Parquet export: its time, and its memory, which must not grow with the table."""

import shutil
from pathlib import Path

from . import common
from .common import ROWS

PARTS = {"one file": None, "4 parts": 4}
TARGET = Path("exported")


class Export(common.Timed):
    """The whole table, after all of its rows were written."""

    params = [[ROWS], list(PARTS)]
    param_names = ["rows", "into"]
    repeat = (2, 10, 10.0)

    def setup_cache(self):
        return common.build(
            "export.zarr", rows={"num_embeddings": ROWS, "initializer": common.make_values(ROWS)}
        )

    def setup(self, path, rows, into):
        self.table = common.store(path)["rows"]
        self.parts = PARTS[into]
        self.table.export_parquet(TARGET, rows=(0, 1))  # loads pyarrow
        _remove(TARGET)

    def teardown(self, *_):
        _remove(TARGET)

    def time_export(self, *_):
        self.table.export_parquet(TARGET, parts=self.parts)

    def peakmem_export(self, *_):
        self.table.export_parquet(TARGET, parts=self.parts)

    def track_anonymous_growth(self, *_):
        """Peak growth of the process's anonymous memory during the export."""
        before = _anonymous_bytes()
        seen = [before]
        self.table.export_parquet(
            TARGET, parts=self.parts, progress=lambda *_: seen.append(_anonymous_bytes())
        )
        return max(seen) - before

    track_anonymous_growth.unit = "bytes"


def _anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def _remove(target):
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
