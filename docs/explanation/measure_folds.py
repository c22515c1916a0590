"""Measure what a fold writes and reads, and what it leaves to cold lookups beside it.

Takes a folder on a local disk (by default the one for temporary files), 3 GB of space in it, and four minutes. What is
compared runs by turns in one process, so that only ratios depend little on what else the disk does. It reaches into the
package to start a fold that nobody waits for, to drop pages from memory, and to fold as before.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

import shardemb
from shardemb.base.sizes import PAGE
from shardemb.commits import fold
from shardemb.compute import file_blocks
from shardemb.storage import files

ROWS, DIM, RECORD, BATCH = 500_000, 64, 768, 1024
random = np.random.default_rng(0)
adam = shardemb.optim.Adam(lr=1e-3)


def written_and_read():
    """Return how many bytes this process has written to disks and read from them."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return np.array([int(found["write_bytes"]), int(found["read_bytes"])])


def change(store, rows, commits=1):
    """Update some random rows of the table, and commit them; repeatedly."""
    gradients = np.ones((rows, DIM), np.float32)
    for _ in range(commits):
        store["t"].update(random.permutation(ROWS)[:rows], gradients)
        store.commit()


def drop(table):
    """Drop the files of a table from memory."""
    shards = table._state.shards
    shards.release_pages(0, table.num_embeddings)
    for path in files.walk(shards.directory):
        with files.opened(path, os.O_RDONLY) as descriptor:
            files.drop_cached(descriptor)


def windows(blocks, has_data):
    """Add every block of a window of which a quarter changes, as before."""
    window, changed = file_blocks.WINDOW_BLOCKS, np.zeros(has_data.size, np.bool_)
    changed[blocks] = True
    starts = np.arange(0, changed.size, window)
    dense = 4 * np.add.reduceat(changed, starts) >= window
    held = np.flatnonzero(changed | np.repeat(dense, window)[: changed.size])
    return held, np.ones(held.size, np.bool_)


def sizes(store):
    """Fold some rows scattered over a table, as it is and as before."""
    ways = {"windows of which a quarter changes": windows, "as it is": file_blocks.widen}
    for commits, share in ((13, 0.01), (1, 0.05), (1, 0.02)):
        rows = int(ROWS * share)
        times, moved = {name: [] for name in ways}, {name: [] for name in ways}
        for _ in range(4):
            for name, file_blocks.widen in ways.items():
                drop(store["t"])
                before = written_and_read()
                change(store, rows, commits)
                drop(store["t"])
                start = time.perf_counter()
                store.checkpoint()
                times[name].append(time.perf_counter() - start)
                moved[name].append((written_and_read() - before) / (commits * rows * RECORD))
        print(f"{commits} commits of {share:.0%} of {ROWS:,} rows, and one fold")
        first = next(iter(times.values()))
        for name in ways:
            ratio = median(b / a for a, b in zip(first, times[name], strict=True))
            written, read = np.median(moved[name], axis=0)
            print(f"  {name:<36}{written:>6.1f} x written{read:>6.1f} x read   time {ratio:.2f}")


class Lookups:
    """Lookups of rows whose pages are not in memory."""

    def __init__(self, table):
        self.table = table
        self.begin()

    def begin(self):
        """Forget which pages were read."""
        drop(self.table)
        pages = random.permutation(self.table.num_embeddings * RECORD // PAGE - 1)
        self.rows, self.at = (pages * PAGE + PAGE - 1) // RECORD, 0  # each from a page of its own

    def rate(self, go_on):
        """Look up as long as `go_on` says; return the rows per second."""
        seconds, found = 0.0, 0
        while go_on() or not found:
            if self.at + BATCH > self.rows.size:
                self.begin()
            ids = self.rows[self.at : self.at + BATCH]
            start = time.perf_counter()
            self.table.lookup(ids)
            seconds, found, self.at = seconds + time.perf_counter() - start, found + BATCH, self.at + BATCH
        return found / seconds

    def rate_for(self, seconds):
        """Look up for some seconds; return the rows per second."""
        end = time.perf_counter() + seconds
        return self.rate(lambda: time.perf_counter() < end)


def beside(store):
    """Look up rows of another table while a fold runs that nobody waits for."""
    journal, lookups = store._session.journal, Lookups(store["cold"])
    ways = {"at full speed": lambda pace: False, "giving way": fold.Pace.gives_way}
    kept, took = {name: [] for name in ways}, {name: [] for name in ways}
    for _ in range(5):
        for name, fold.Pace.gives_way in ways.items():
            change(store, int(0.12 * ROWS))
            drop(store["t"])
            alone = lookups.rate_for(1.5)
            lookups.begin()
            start = time.perf_counter()
            with journal._runtime.lock:
                journal._start()
            during = lookups.rate(lambda: journal.is_folding)
            took[name].append(time.perf_counter() - start)
            lookups.begin()
            kept[name].append(2 * during / (alone + lookups.rate_for(1.5)))
    for name in ways:
        print(
            f"cold lookups beside a fold {name:<14} keep {median(kept[name]):.0%} of their rate"
            f" ({min(kept[name]):.0%} to {max(kept[name]):.0%}); it takes {median(took[name]):.1f} s"
        )


def main():
    """Measure everything."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        options = {"memory_budget": 2**34}
        with shardemb.open(Path(name) / "store.zarr", **options) as store:
            for table, rows in (("t", ROWS), ("cold", 2 * ROWS)):
                new = store.create_table(table, num_embeddings=rows, embedding_dim=DIM, optimizer=adam)
                for start in range(0, rows, 100_000):
                    new.write(np.arange(start, start + 100_000), np.zeros((100_000, DIM), np.float32))
                store.commit()
        with shardemb.open(Path(name) / "store.zarr", **options) as store:  # without the rows in memory
            sizes(store)
            beside(store)


if __name__ == "__main__":
    main()
