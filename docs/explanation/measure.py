"""Measure the figures in ``numbers.md``.

Takes a folder on a local disk (by default the one for temporary files), 15 GB of space in it, and a few minutes.
"""

import contextlib
import mmap
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import zarr

import shardemb

LARGE, ROWS, DIM, BATCH, REPEATS = 16_000_000, 4_000_000, 64, 65_536, 9
random = np.random.default_rng(0)


def batches(rows, size=BATCH):
    """Make one batch of random ids for each repetition."""
    return [random.integers(0, rows, size) for _ in range(REPEATS)]


def measure(what, function, arguments, before=lambda: None):
    """Call `function` once with each argument; print the median time, the range, and rows per second."""
    times = []
    for argument in arguments:
        before()
        start = time.perf_counter()
        function(argument)
        times.append(time.perf_counter() - start)
    print(f"{what:<58}{spread(times)}   {BATCH / median(times) / 1e3:,.0f} krows/s")


def spread(times):
    """Format median, minimum and maximum."""
    low, middle, high = (1e3 * value for value in (min(times), median(times), max(times)))
    return f"{middle:>9.1f} ms   {low:.1f} to {high:.1f}"


def lookups(folder):
    """Compare warm and cold lookups with NumPy and zarr."""
    values = random.standard_normal((LARGE, DIM), np.float32)
    with shardemb.open(folder / "one.zarr") as store:
        # One shard, so that np.memmap can read the same file.
        shape = {"num_embeddings": LARGE, "embedding_dim": DIM, "rows_per_shard": LARGE}
        table = store.create_table("t", **shape, initializer=values)
        store.commit()
        print(f"\nWarm: {BATCH:,} random rows of {4 * DIM} bytes, table of {table.nbytes / 1e9:.1f} GB")
        warm(table, values, folder / "one.zarr/t/rows")
    del values
    print("\nCold: the same, nothing of the table in the page cache")
    cold(folder / "one.zarr")


def warm(table, values, rows):
    """Measure with everything in memory."""
    table.lookup(np.arange(LARGE))
    out = np.empty((BATCH, DIM), np.float32)
    ids = batches(LARGE)
    measure("values[ids], an array in memory", values.__getitem__, ids)
    measure(
        "np.take(values, ids, 0, out=out, mode='clip')", lambda ids: np.take(values, ids, 0, out, "clip"), ids
    )
    measure("table.lookup(ids)", table.lookup, ids)
    measure("table.lookup(ids, out=out)", lambda ids: table.lookup(ids, out=out), ids)
    array = zarr.open_array(rows, mode="r")
    measure("zarr: array.oindex[ids]", array.oindex.__getitem__, ids[:2])


def cold(store):
    """Measure with nothing in memory, from a new mapping each time: mapped pages are not evicted."""
    file = store / "t/rows/c.0.0"

    def memmap():
        return np.memmap(file, np.float32, "r", shape=(LARGE, DIM)).__getitem__

    def advised():
        array = np.memmap(file, np.float32, "r", shape=(LARGE, DIM))
        array._mmap.madvise(mmap.MADV_RANDOM)
        return array.__getitem__

    with contextlib.ExitStack() as stack:

        def opened():
            stack.close()
            return stack.enter_context(shardemb.open(store, mode="r"))["t"].lookup

        for what, make in {
            "np.memmap": memmap,
            "np.memmap with MADV_RANDOM": advised,
            "table.lookup(ids)": opened,
        }.items():
            cold_case(what, file, make)


def cold_case(what, file, make):
    """Evict the file, make a new function, and time its first call."""
    functions = []

    def before():
        functions.clear()
        evict(file)
        functions.append(make())

    def call(ids):
        functions[0](ids)

    measure(what, call, batches(LARGE)[:5], before)


def evict(file):
    """Take a file out of the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def training(folder):
    """Measure commits, and updates of new and of existing rows."""
    adam, uniform = shardemb.optim.Adam(), shardemb.initializers.Uniform(-0.05, 0.05)
    gradients = random.standard_normal((BATCH, DIM), np.float32)
    with shardemb.open(folder / "train.zarr") as store:
        shape = {"num_embeddings": ROWS, "embedding_dim": DIM}
        table = store.create_table("t", **shape, initializer=uniform, optimizer=adam)
        table.update(np.arange(10), gradients[:10])  # compiles the kernels, unless that was done before
        print(f"\nTraining: {BATCH:,} random ids, dim {DIM}, Adam, table of {table.nbytes / 1e9:.1f} GB")
        print("new rows:")
        measure("table.lookup(ids), rows never written", table.lookup, batches(ROWS))
        measure(
            "table.update(ids, gradients), first touch",
            lambda ids: table.update(ids, gradients),
            batches(ROWS),
        )
        hot = batches(ROWS // 8)
        for ids in hot:
            table.update(ids, gradients)
        print(f"rows updated before ({ROWS // 8:,} of them):")
        measure("table.update(ids, gradients)", lambda ids: table.update(ids, gradients), hot)
        measure("the same formula in NumPy, arrays in memory", numpy_adam(ROWS // 8, gradients), hot)
        store.commit()
        print("\nCommits, Adam, records of 768 bytes")
        commits(store, gradients[:1000])
        commits(store, gradients)


def commits(store, gradients):
    """Measure commits of one row per gradient."""
    table, times, written = store["t"], [], []
    for ids in batches(ROWS, len(gradients)):
        table.update(ids, gradients)
        before = store.stats()["bytes_written"]
        start = time.perf_counter()
        store.commit()
        times.append(time.perf_counter() - start)
        written.append((store.stats()["bytes_written"] - before) / np.unique(ids).size)
    what = f"commit of {len(gradients):,} random rows in {-(-ROWS // table.rows_per_shard)} shards"
    print(f"{what:<58}{spread(times)}   {median(written):,.0f} bytes written a row")


def numpy_adam(rows, gradients):
    """Return a function that takes one step of torch's SparseAdam."""
    weight, exp_avg, exp_avg_sq = (np.zeros((rows, DIM), np.float32) for _ in range(3))

    def step(ids):
        unique, inverse = np.unique(ids, return_inverse=True)
        summed = np.zeros((unique.size, DIM), np.float32)
        np.add.at(summed, inverse, gradients)
        m, v = exp_avg[unique], exp_avg_sq[unique]
        m += np.float32(0.1) * (summed - m)
        v += np.float32(0.001) * (summed * summed - v)
        exp_avg[unique], exp_avg_sq[unique] = m, v
        weight[unique] -= np.float32(1e-3) * (m / (np.sqrt(v) + np.float32(1e-8)))

    return step


def exports(folder):
    """Measure the export of a table that was created from an array."""
    with shardemb.open(folder / "one.zarr", mode="r") as store:
        table = store["t"]
        print(f"\nExport to parquet: {LARGE:,} rows of dim {DIM}, normal random float32, byte_stream_split")
        for parts in (None, 2):
            start = time.perf_counter()
            path = folder / f"t{parts}.parquet"
            report = table.export_parquet(path, parts=parts, encoding="byte_stream_split")
            elapsed = time.perf_counter() - start
            speed, ratio = table.nbytes / elapsed / 1e6, report.nbytes / table.nbytes
            what = f"export_parquet(parts={parts})"
            print(f"{what:<58}{elapsed:>9.1f} s    {speed:,.0f} MB/s, file of {ratio:.2f} x the size")


def main():
    """Measure everything."""
    cores, linux = len(os.sched_getaffinity(0)), os.uname().release
    print(f"Python {sys.version.split()[0]}, NumPy {np.__version__}, {cores} cores, Linux {linux}")
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        lookups(Path(folder))
        training(Path(folder))
        exports(Path(folder))


if __name__ == "__main__":
    main()
