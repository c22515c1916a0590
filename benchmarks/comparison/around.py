"""Not about rows: export, a huge table, the first seconds of a process (W9, W10, W13)."""

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM, ROW_BYTES

from .data import batches, remove
from .machine import CORES
from .processes import MIB, Watch
from .racing import Contender, race, same_bytes
from .reading import FULL
from .results import Arm, Case, at_most, faster

# ---- W9: export ---------------------------------------------------------------------------------------------------

ROW_GROUP = 65_536
PARQUET = {
    "compression": "zstd",
    "use_dictionary": False,
    "column_encoding": {
        "embedding.list.element": "BYTE_STREAM_SPLIT",
        "id": "DELTA_BINARY_PACKED",
    },
    "write_statistics": ["id"],
    "write_page_index": True,
}
"""The options that `export_parquet` uses with its compact encoding."""


def export(settings):
    """W9: the whole table, into as many files as there are cores, and into one."""
    return [_export(settings, CORES), _export(settings, None)]


def _export(settings, parts):
    data = settings.data(FULL)
    target, theirs = data.folder / "ours.parquet", data.folder / "theirs.parquet"
    growth = []
    with shardemb.open(data.store(), mode="r") as store:
        table = store["rows"]

        def ours(_):
            with Watch() as watch:
                table.export_parquet(target, parts=parts, encoding="byte_stream_split")
            growth.append(watch.growth / MIB)

        chunks = _record_batches(data, parts or 1)

        def peer(_):
            theirs.mkdir()
            with ThreadPoolExecutor(len(chunks)) as pool:
                list(pool.map(_write_parquet, (theirs / f"{k}.parquet" for k in range(len(chunks))), chunks))

        arms = race(
            [
                Contender("export_parquet", ours, prepare=lambda: remove(target)),
                Contender("pyarrow, arrays in RAM", peer, prepare=lambda: remove(theirs)),
            ],
            lambda _: None,
            data.rows,
            settings.times(3),
        )
    equal = _exported(target, data)
    remove(target)
    remove(theirs)
    bars = (
        faster(arms, "export_parquet", "pyarrow, arrays in RAM", 0.9),
        at_most("anonymous memory", max(growth), 512.0, "MiB"),
    )
    limit = settings.machine.write_bytes_per_s / (ROW_BYTES + 8)
    return Case(f"{parts or 1} files", tuple(arms.values()), bars, equal, limit)


def _record_batches(data, parts):
    import pyarrow as pa

    item = pa.field("element", pa.float32(), nullable=False)
    kinds = {"id": pa.int64(), "embedding": pa.list_(item, DIM)}
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])
    made = []
    for ids in batches(data.rows, ROW_GROUP):
        values = pa.array(data.array[ids[0] : ids[-1] + 1].reshape(-1))
        rows = pa.FixedSizeListArray.from_arrays(values, type=kinds["embedding"])
        made.append(pa.RecordBatch.from_arrays([pa.array(ids), rows], schema=schema))
    cuts = [len(made) * part // parts for part in range(parts + 1)]
    return [made[start:stop] for start, stop in itertools.pairwise(cuts) if stop > start]


def _write_parquet(path, chunk):
    from pyarrow import parquet

    with path.open("wb") as file:
        with parquet.ParquetWriter(
            file, chunk[0].schema, sorting_columns=[parquet.SortingColumn(0)], **PARQUET
        ) as writer:
            for batch in chunk:
                writer.write_batch(batch, row_group_size=batch.num_rows)
        file.flush()
        os.fsync(file.fileno())


def _exported(path, data):
    """Return whether the files hold the table, as read by pyarrow."""
    from pyarrow import parquet

    at = 0
    for file in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        for batch in parquet.ParquetFile(file).iter_batches(columns=["embedding"]):
            rows = batch["embedding"].flatten().to_numpy().reshape(-1, DIM)
            if not same_bytes(rows, data.array[at : at + len(rows)]):
                return False
            at += len(rows)
    return at == data.rows


# ---- W10: a huge table --------------------------------------------------------------------------------------------


def huge(settings):
    """W10: a billion rows with Adam, which are 768 GB of records that were never written."""
    rows = max(10**6, settings.rows(10**9))
    path = settings.folder / "huge.zarr"
    created, opened = [], []
    for _ in range(settings.times(5)):
        remove(path)
        start = time.perf_counter()
        with shardemb.open(path, mode="w") as store:
            how = {"optimizer": common.optimizer("Adam"), "initializer": common.INITIAL}
            store.create_table("rows", num_embeddings=rows, embedding_dim=DIM, **how)
            store.commit()
            created.append(time.perf_counter() - start)
        start = time.perf_counter()
        store = shardemb.open(path)
        opened.append(time.perf_counter() - start)
        equal = bool(np.isfinite(store["rows"].lookup([0, rows - 1])).all())
        store.close()
    disk = sum(file.lstat().st_blocks * 512 for file in [path, *path.rglob("*")]) / 1e6
    remove(path)
    bars = (
        at_most("create and commit", float(np.median(created)), 1.0, "s"),
        at_most("open", float(np.median(opened)), 0.2, "s"),
        at_most("disk", disk, 8.0, "MB"),
    )
    return [Case(f"{rows:,} rows", (), bars, equal, facts={"disk_mb": disk})]


# ---- W13: the first seconds ---------------------------------------------------------------------------------------

FIRST_LOOKUP = """
import sys, shardemb
with shardemb.open(sys.argv[1], mode="r") as store:
    assert store["rows"].lookup([1, 2, 2]).shape == (3, 64)
"""


def first_use(settings):
    """W13: a process imports, opens and looks up, first with numba's cache empty, then filled."""
    path = settings.folder / "first.zarr"
    with shardemb.open(path, mode="w") as store:
        table = store.create_table("rows", num_embeddings=10_000, embedding_dim=DIM)
        table.write(np.arange(10_000), common.make_values(10_000))
        store.commit()
    first, again = [], []
    for _ in range(settings.times(3)):
        with tempfile.TemporaryDirectory(dir=settings.folder) as cache:
            first.append(_process(path, cache))
            again += [_process(path, cache) for _ in range(3)]
    shutil.rmtree(path)
    seconds = {"empty cache": tuple(first), "filled cache": tuple(again)}
    arms = tuple(Arm(name, 3, times) for name, times in seconds.items())
    bars = (
        at_most("the whole process, empty numba cache", arms[0].median, 3.0, "s"),
        at_most("again", arms[1].median, 1.0, "s"),
    )
    return [Case("a process that looks up three rows", arms, bars)]


def _process(path, cache):
    start = time.perf_counter()
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
    subprocess.run([sys.executable, "-c", FIRST_LOOKUP, str(path)], env=environment, check=True)
    return time.perf_counter() - start
