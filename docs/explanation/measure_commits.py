"""Measures what ``durability.md`` says of time: commits, folds beside training, opening, verifying.

Takes a folder on a local disk (default: the one for temporary files), 6 GB of it, and some minutes.
"""

import contextlib
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

import shardemb

ROWS, DIM, BATCH = 4_000_000, 64, 65_536
LOG_BYTES = [2**27, 2**28, 2**29, 2**30, 2**31]
random = np.random.default_rng(0)
adam = shardemb.optim.Adam(lr=1e-3)


@contextlib.contextmanager
def timed(times):
    """Append the seconds that the block takes."""
    start = time.perf_counter()
    yield
    times.append(time.perf_counter() - start)


def spread(times):
    """Write median, and the slowest of a hundred, in milliseconds."""
    return f"{1e3 * median(times):>8.2f} ms, slowest 1 % {1e3 * float(np.quantile(times, 0.99)):>8.1f}"


def small_commits(folder):
    """Write 1,000 random warm rows and commit them, again and again."""
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


def training(folder, log_bytes):
    """Train with Adam and a commit every 20 steps; print what the size of the log changes."""
    with shardemb.open(folder / f"log{log_bytes}.zarr", log_bytes=log_bytes) as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, optimizer=adam)
        store.commit()
        gradients = random.standard_normal((BATCH, DIM), np.float32)
        alone, beside, commits, changed, largest = [], [], [], 0, 0
        start = time.perf_counter()
        for step in range(1, 401):
            ids = random.zipf(1.05, BATCH) * 2_654_435_761 % ROWS
            folding = store._journal._folding
            with timed(beside if folding else alone):
                table.lookup(ids)
                table.update(ids, gradients)
            if step % 20 == 0:
                changed += table._mapped.changes
                with timed(commits):
                    store.commit(step=step)
                largest = max(
                    largest, sum(f.stat().st_size for f in (store.path / ".shardemb/log").iterdir())
                )
        seconds = time.perf_counter() - start
        written = store.stats()["bytes_written"] / changed
        slower = f"{median(beside) / median(alone):.2f} x" if len(beside) > 4 and len(alone) > 4 else "-"
        print(
            f"  {log_bytes / 2**20:>6.0f} MiB{seconds:>8.1f} s{1e3 * median(alone or beside):>9.1f} ms{slower:>9}"
            f"{1e3 * median(commits):>9.0f} ms{1e3 * max(commits):>9.0f} ms{largest / 2**20:>8.0f} MiB"
            f"{written / 768:>7.2f} x"
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
        print("Adam, 400 steps of 65,536 Zipf ids, a commit every 20")
        print(
            "  log_bytes    total     step   beside a fold   commit  slowest  log at most  written a record"
        )
        for log_bytes in LOG_BYTES:
            training(folder, log_bytes)
        opening_and_verifying(folder)


if __name__ == "__main__":
    main()
