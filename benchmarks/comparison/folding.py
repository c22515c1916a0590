"""Lookups from the disk while a fold writes to it (W18)."""

import threading
import time

import numpy as np

from benchmarks import common, pagecache
from benchmarks.common import PAGE, ROW_BYTES

from .data import make_values, remove
from .processes import CannotRun
from .racing import Reopened, same_bytes
from .reading import LARGE
from .results import OURS, Arm, Bar, Case

BATCH = 4096
SHARE = 100
"""One row in so many changes before each fold."""

ROUNDS, LOOKUPS = 3, 20
"""How often the arms take turns, and how many lookups each takes in its turn; beside folds at least so many."""

MOST_FOLDS = 30
ALONE, BESIDE = "lookup alone", "lookup beside a fold"


def beside_fold(settings):
    """W18: rows whose pages are not in memory, looked up while a fold runs, against without it."""
    data = settings.data(LARGE)
    batch = min(BATCH, data.rows // 256)
    lookups = LOOKUPS if settings.scale >= 0.2 else 3
    table = _Folded(data, batch)
    seconds, counts = {ALONE: [], BESIDE: []}, {ALONE: 0, BESIDE: 0}
    for number in range(ROUNDS):
        turns = [(ALONE, table.look_up_alone), (BESIDE, table.look_up_beside)]
        for name, look_up in turns[:: -1 if number % 2 else 1]:
            taken = look_up(lookups)
            seconds[name].append(
                sum(taken) / len(taken)
            )  # the phases of a fold differ, and all of them count
            counts[name] += len(taken)
    table.close()
    remove(table.path)
    arms = {name: Arm(name, batch, tuple(each)) for name, each in seconds.items()}
    bars = (Bar("beside a fold vs alone", arms[BESIDE].rate / arms[ALONE].rate, 0.5, stretch=0.7),)
    notes = (
        f"{len(table.folds)} folds of {data.rows // SHARE:,} random rows, {np.median(table.folds):.2f} s each; "
        f"only lookups that a fold outlasted count: {counts[BESIDE]}, and {counts[ALONE]} alone",
        "the figure is a lookup's share of one turn",
        "before each lookup, mincore finds none of its pages; what is folded is in memory if the writes left it there",
    )
    return [Case("uniform", (arms[BESIDE], arms[ALONE]), bars, True, notes=notes)]


class _Folded(Reopened):
    """A table of which rows change, are committed and folded again and again, and others are looked up."""

    def __init__(self, data, batch):
        super().__init__(data.store("folded"))
        self.rows, self.batch = data.rows, batch
        self.changed = np.zeros(self.rows, bool)
        self.folds = []
        """Seconds of each."""

    def make_cold(self):
        """Open a table with nothing in memory, and commit changes that wait to be folded."""
        super().make_cold()
        table = self.store["rows"]
        self.shard_rows = table.rows_per_shard
        ids = np.unique(common.make_ids("uniform", self.rows, self.rows // SHARE * 5 // 4))
        ids = common.random.permutation(ids)[: self.rows // SHARE]
        self.changed[ids] = True
        table.write(ids, common.make_values(ids.size))
        self.store.commit()

    def look_up_alone(self, count):
        """Return the seconds of that many lookups."""
        self.make_cold()
        return [self.look_up(self.choose()) for _ in range(count)]

    def look_up_beside(self, count):
        """Return the seconds of at least that many lookups, from the beginning of folds to their end."""
        seconds = []
        for _ in range(MOST_FOLDS):
            self.make_cold()
            with _Fold(self.store) as fold:
                while fold.running:
                    elapsed = self.look_up(self.choose())
                    if fold.running:
                        seconds.append(elapsed)
            self.folds.append(fold.seconds)
            if len(seconds) >= count:
                return seconds
        raise CannotRun("folds end before a lookup does")

    def look_up(self, ids):
        start = time.perf_counter()
        rows = self.store["rows"].lookup(ids)
        elapsed = time.perf_counter() - start
        if not same_bytes(rows, make_values(ids)):
            raise AssertionError(f"{OURS} returned other bytes beside a fold")
        return elapsed

    def choose(self):
        """Return rows that never changed, and whose pages are not in memory at this moment."""
        shards = sorted(self.path.glob("rows/rows/c.*"), key=lambda file: int(file.name.split(".")[1]))
        pages = [pagecache.residency(shard) for shard in shards]
        first = np.cumsum([0, *(each.size for each in pages)])
        ids = common.make_ids("uniform", self.rows, 16 * self.batch)
        page = first[ids // self.shard_rows] + ids % self.shard_rows * ROW_BYTES // PAGE
        ids = ids[~np.concatenate(pages)[page] & ~self.changed[ids]]
        if ids.size < self.batch:
            raise CannotRun("too much of the table is in memory")
        return ids[: self.batch]


class _Fold:
    """Folds what was committed, in another thread, during a ``with`` block."""

    def __init__(self, store):
        self.store = store
        self.seconds = 0.0
        self._problem = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self.before = self.store.stats()["bytes_written"]
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        rows = self.store["rows"].num_embeddings // SHARE
        if self.store.stats()["bytes_written"] - self.before < rows * ROW_BYTES:
            raise AssertionError("the fold wrote less than was changed")

    @property
    def running(self):
        """Whether it has begun and not ended."""
        return self._thread.is_alive()

    def _run(self):
        start = time.perf_counter()
        try:
            self.store.checkpoint()
        except Exception as problem:  # raised where the block ends
            self._problem = problem
        self.seconds = time.perf_counter() - start
