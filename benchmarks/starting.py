"""The first seconds of a process: its import, and kernels that are compiled or found in numba's cache."""

import json
import os
import shutil
import subprocess
import sys
import tempfile

from . import common

HEAVY = ["zarr", "numba", "dask", "pyarrow"]

JOB = """
import json, sys
import shardemb
with shardemb.open(sys.argv[1], mode="w") as store:
    table = store.create_table("rows", num_embeddings=1000, embedding_dim=8, optimizer=shardemb.optim.Adam(),
                               initializer=shardemb.initializers.Uniform(-1, 1, seed=0))
    rows = table.lookup([1, 2, 2])
    if "all" in sys.argv:
        table.lookup_unique([1, 2, 2])
        table.update([1, 2, 2], rows)
        table.write([1], rows[:1])
        store.commit()
        list(table.to_arrow_batches(rows=(0, 10)))
        table.update([1], rows[:1])
    store.rollback()
from numba.core.dispatcher import Dispatcher
import gc
stats = [found.stats for found in gc.get_objects() if isinstance(found, Dispatcher)]
print(json.dumps({"hits": sum(sum(s.cache_hits.values()) for s in stats),
                  "misses": sum(sum(s.cache_misses.values()) for s in stats)}))
"""


def timeraw_import():
    """Import in a process of its own, as for all `timeraw` benchmarks."""
    return "import shardemb"


timeraw_import.number = 1
timeraw_import.repeat = 5


def track_heavy_imports():
    """Count which of zarr, numba, dask and pyarrow `import shardemb` loads."""
    code = f"import sys, shardemb; print(sum(name in sys.modules for name in {HEAVY}))"
    return int(_python("-c", code))


track_heavy_imports.unit = "modules"


class Start(common.Timed):
    """A process that opens a new store and looks up its first rows, with an empty or filled cache of numba."""

    params = [["empty cache", "filled cache"]]
    param_names = ["numba"]
    repeat = (2, 5, 10.0)

    def setup(self, cache):
        self.folder = tempfile.mkdtemp()
        if cache == "filled cache":
            self.run_job()

    def teardown(self, *_):
        shutil.rmtree(self.folder)

    def time_first_lookup(self, *_):
        self.run_job()

    def run_job(self):
        _run_job(self.folder, NUMBA_CACHE_DIR=os.path.join(self.folder, "numba"))


class SecondStart:
    """What numba does in the second process that makes every kind of call, with the cache that the package uses."""

    def setup_cache(self):
        with tempfile.TemporaryDirectory() as folder:
            _run_job(folder, "all")
            return _run_job(folder, "all")

    def track_kernels_compiled(self, counts):
        return counts["misses"]

    def track_kernels_found(self, counts):
        """Fewer is better here too, because each takes milliseconds to load."""
        return counts["hits"]

    track_kernels_compiled.unit = track_kernels_found.unit = "kernels"


def _run_job(folder, *arguments, **environment):
    return json.loads(_python("-c", JOB, os.path.join(folder, "made.zarr"), *arguments, **environment))


def _python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
