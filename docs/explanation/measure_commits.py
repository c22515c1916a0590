"""Measure what durability costs: commits, folds while training goes on, opening, verifying.

Takes a folder on a local disk (by default the one for temporary files), 6 GB of space in it, and a few minutes.
It reaches into the package for what the public names do not tell: whether a fold is running, and how many rows differ.
"""

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

import shardemb
from shardemb.compute import file_blocks

ROWS, DIM, BATCH, STEPS = 4_000_000, 64, 65_536, 200
LOG_BYTES = [2**28, 2**29, 2**30, 2**31]
random = np.random.default_rng(0)
adam = shardemb.optim.Adam(lr=1e-3)


@contextlib.contextmanager
def timed(times):
    """Append the number of seconds that the block takes."""
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def spread(times):
    """Format the median and the 99th percentile, in milliseconds."""
    return f"{1e3 * median(times):>8.2f} ms, slowest 1 % {1e3 * float(np.quantile(times, 0.99)):>8.1f}"


def small_commits(folder):
    """Write 1,000 random warm rows and commit them, repeatedly."""
    with shardemb.open(folder / "small.zarr") as store:
        values = random.standard_normal((ROWS, DIM), np.float32)
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, initializer=values)
        store.commit()
        for start in range(0, ROWS, 100_000):
            table.lookup(np.arange(start, start + 100_000))
        writes, commits = [], []
        for _ in range(300):
            ids, rows = random.integers(0, ROWS, 1000), random.standard_normal((1000, DIM), np.float32)
            table.lookup(ids)
            with timed(writes):
                table.write(ids, rows)
            with timed(commits):
                store.commit()
        both = [sum(each) for each in zip(writes, commits, strict=True)]
        print(f"1,000 warm rows of {ROWS:,}")
        for what, times in {"write": writes, "commit": commits, "write and commit": both}.items():
            print(f"  {what:<20}{spread(times)}")


def zipf():
    """Draw ids with Zipf exponent 1.05, scattered over the table; about a third of them are distinct."""
    ranks = (1 - random.random(BATCH) * (1 - float(ROWS) ** -0.05)) ** -20
    return (ranks.astype(np.int64) - 1).clip(0, ROWS - 1) * 2_654_435_761 % ROWS


def folds(folder):
    """Fold rows scattered over a table of 3 GB, block by block and in long stretches."""
    widen = file_blocks.widen
    with shardemb.open(folder / "folds.zarr", log_bytes=2**34, memory_budget=2**34) as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, optimizer=adam)
        table.write(np.arange(ROWS), np.zeros((ROWS, DIM), np.float32))
        store.commit()
        store.checkpoint()
        for rows in (20_000, 500_000):
            for what, blocks in {
                "block by block": lambda blocks, has_data: (blocks, np.ones(blocks.size, np.bool_)),
                "in stretches": widen,
            }.items():
                times, cores, written = [], [], []
                for _ in range(3):
                    ids = random.permutation(ROWS)[:rows]
                    table.update(ids, random.standard_normal((rows, DIM), np.float32))
                    store.commit()
                    file_blocks.widen, before, start = (
                        blocks,
                        store.stats()["bytes_written"],
                        time.process_time(),
                    )
                    with timed(times):
                        store.checkpoint()
                    cores.append(time.process_time() - start)
                    written.append(store.stats()["bytes_written"] - before)
                file_blocks.widen = widen
                print(
                    f"fold of {rows:>9,} rows {what:<16}{median(times):>7.2f} s, of a core {median(cores):>6.2f} s,"
                    f" {median(written) / 2**20:>6.0f} MiB written"
                )


def training(folder, log_bytes):
    """Train with Adam and a commit every 20 steps; print the effect of the size of the log."""
    with shardemb.open(folder / f"log{log_bytes}.zarr", log_bytes=log_bytes, memory_budget=2**34) as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, optimizer=adam)
        gradients = random.standard_normal((BATCH, DIM), np.float32)
        for start in range(0, ROWS, 100_000):
            table.write(np.arange(start, start + 100_000), np.zeros((100_000, DIM), np.float32))
        store.commit()
        store.checkpoint()
        written = store.stats()["bytes_written"]
        alone, beside, commits, changed, largest = [], [], [], 0, 0
        start = time.perf_counter()
        for step in range(1, STEPS + 1):
            ids = zipf()
            with timed(beside if store._session.journal.is_folding else alone):
                table.lookup(ids)
                table.update(ids, gradients)
            if step % 20 == 0:
                changed += table._state.shards.changes
                with timed(commits):
                    store.commit(step=step)
                largest = max(
                    largest, sum(f.stat().st_size for f in (store.path / ".shardemb/log").iterdir())
                )
        seconds = time.perf_counter() - start
        store.checkpoint()
        written = (store.stats()["bytes_written"] - written) / changed / table._state.spec.record_bytes
        share = len(beside) / STEPS
        times = [f"{1e3 * median(each):>7.1f} ms" if each else f"{'-':>10}" for each in (alone, beside)]
        print(
            f"{log_bytes / 2**20:>6.0f} MiB{seconds:>8.1f} s{times[0]}{times[1]}{share:>8.0%}"
            f"{1e3 * median(commits):>9.0f} ms{1e3 * max(commits):>8.0f} ms{largest / 2**20:>7.0f} MiB{written:>7.1f} x"
        )


def opening_and_verifying(folder):
    """Open a store of ten tables, and verify one of 3 GB."""
    with shardemb.open(folder / "ten.zarr") as store:
        for number in range(10):
            store.create_table(f"t{number}", num_embeddings=1_000_000, embedding_dim=DIM, optimizer=adam)
        store.commit()
    times = []
    for _ in range(20):
        with timed(times):
            store = shardemb.open(folder / "ten.zarr")
        store.close()
    print(f"open, ten tables, empty log{spread(times)}")
    with shardemb.open(folder / f"log{LOG_BYTES[0]}.zarr") as store:
        times = []
        with timed(times):
            assert store.verify() == []
        print(f"verify 3 GB: {store['t'].nbytes / times[0] / 1e9:.2f} GB/s")


def main():
    """Measure everything."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = Path(name)
        small_commits(folder)
        folds(folder)
        print(f"Adam, {STEPS} steps of 65,536 Zipf ids, a commit every 20")
        print(
            "log_bytes     total      step  beside a fold, steps   commit slowest log at most written a record"
        )
        for log_bytes in LOG_BYTES:
            training(folder, log_bytes)
        opening_and_verifying(folder)


if __name__ == "__main__":
    main()
