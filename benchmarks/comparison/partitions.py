"""A store over several processes of dask.distributed on this machine, against one local store (D1 to D8)."""

import contextlib
import os
import signal
import statistics
import time
from dataclasses import dataclass
from functools import partial

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM

from . import peers
from .data import ids_of, make_values, remove
from .processes import CannotRun
from .racing import Contender, race, same_bytes
from .results import Arm, Bar, Case, at_most

ROWS, BATCH, CHANGED = 400_000, 65_536, 20_000
PARTITIONS = 4
LOCAL = "local store"


def one_owner(settings):
    """D1 and D4: lookups and updates through one owner, and a call that does nothing."""
    with _both(settings, 1) as (local, table, _):
        return [*_calls(settings, local, table, 3, 2), _empty(settings, table)]


def two_owners(settings):
    """D2 and D6: the same through two owners, and a commit of both."""
    with _both(settings, 2) as (local, table, _):
        return [*_calls(settings, local, table, 3.5, 2.2), _commits(settings, local, table)]


def recovery(settings):
    """D7: an owner is killed; how long until rows can be looked up again."""
    times = settings.times(5)
    with _both(settings, 2) as (local, table, cluster):
        ids, seconds, equal = ids_of("uniform", table.num_embeddings)(1000), [], True
        for _ in range(times):
            os.kill(cluster.workers[0].pid, signal.SIGKILL)
            start = time.perf_counter()
            found = _until_served(table, ids)
            seconds.append(time.perf_counter() - start)
            equal &= same_bytes(found, local.lookup(ids))
        arms = {"killed": Arm("killed", 1, tuple(seconds))}
        bar = at_most("kill -9 to serving again", arms["killed"].median, 8.0, "s")
        return [Case("an owner is killed", tuple(arms.values()), (bar,), bool(equal))]


def _until_served(table, ids):
    while True:
        try:
            return table.lookup(ids)
        except (shardemb.OwnerLostError, shardemb.EraEndedError):
            time.sleep(0.05)


@contextlib.contextmanager
def _both(settings, owners):
    """Yield a table of a local store, the same in a store with as many owners, and their cluster."""
    if not peers.has("dask.distributed"):
        raise CannotRun("distributed is not installed")
    import distributed

    import shardemb.distributed

    folder, rows = settings.folder / "partitions", settings.rows(ROWS)
    adam = common.optimizer("Adam")
    with contextlib.ExitStack() as stack:
        stack.callback(remove, folder)
        cluster = stack.enter_context(shardemb.distributed.local_cluster(owners, threads_per_worker=2))
        client = stack.enter_context(distributed.Client(cluster))
        store = stack.enter_context(shardemb.open(folder / "local.zarr", threads=1))
        whole = stack.enter_context(
            shardemb.distributed.open(
                client,
                folder / "head.zarr",
                owners={str(number): folder / f"owner-{number}" for number in range(owners)},
                partitions=PARTITIONS,
            )
        )
        for each in (store, whole):
            table = each.create_table("rows", num_embeddings=rows, embedding_dim=DIM, optimizer=adam)
            for start in range(0, rows, BATCH):
                ids = np.arange(start, min(start + BATCH, rows))
                table.write(ids, make_values(ids))
            each.commit()
        yield store["rows"], whole["rows"], cluster
        for each in (store, whole):
            each.rollback()


def _calls(settings, local, table, most_lookup, most_update):
    """Lookups and updates, in turns with those of the local store, which runs on one thread as an owner does."""
    rows = table.num_embeddings
    batch, make_ids = settings.batch(BATCH, rows), ids_of("uniform", rows)
    arms = race(
        [Contender(LOCAL, local.lookup), Contender("owners", table.lookup)],
        make_ids,
        batch,
        settings.times(25),
    )
    ids = make_ids(batch)
    equal = same_bytes(table.lookup(ids), local.lookup(ids))
    lookup = Case("lookup", tuple(arms.values()), (_slower(arms, "owners", most_lookup),), equal)
    grads = np.random.default_rng(0).normal(size=(batch, DIM)).astype(np.float32)
    given = [make_ids(batch) for _ in range(settings.times(25))]
    turns = {name: iter(given) for name in (LOCAL, "owners")}  # both get the same, so that they stay equal
    arms = race(
        [
            Contender(name, lambda _, each=each, name=name: each.update(next(turns[name]), grads))
            for name, each in ((LOCAL, local), ("owners", table))
        ],
        make_ids, batch, len(given),
    )  # fmt: skip
    equal = same_bytes(table.lookup(ids), local.lookup(ids))
    return [lookup, Case("update", tuple(arms.values()), (_slower(arms, "owners", most_update),), equal)]


def _slower(arms, name, target):
    return at_most(f"{name} / {LOCAL}", arms[name].median / arms[LOCAL].median, target, "x")


def _empty(settings, table):
    nothing = np.empty(0, np.int64)
    arms = race(
        [Contender("empty call", lambda _: table.lookup(nothing))], lambda size: None, 1, settings.times(50)
    )
    bar = at_most("empty call", 1e3 * arms["empty call"].median, 1.2, "ms")
    return Case("a call that does nothing", tuple(arms.values()), (bar,))


def _commits(settings, local, table):
    count = settings.batch(CHANGED, table.num_embeddings)
    make_ids, steps = ids_of("uniform", table.num_embeddings), settings.times(15)
    grads = np.ones((count, DIM), np.float32)

    def change(each):
        each.update(make_ids(count), grads)

    arms = race(
        [
            Contender(name, lambda _, each=each: each.store.commit() and None, prepare=partial(change, each))
            for name, each in ((LOCAL, local), ("owners", table))
        ],
        lambda size: None, count, steps,
    )  # fmt: skip
    return Case("commit", tuple(arms.values()), (_slower(arms, "owners", 1.2),))


# ---- what more machines would give


def scaling(settings):
    """D8: how efficient four machines would be, each owner and trainer: computed from what is measured here."""
    with _both(settings, 1) as (local, table, _):
        rows, times = table.num_embeddings, settings.times(15)
        ids = np.unique(ids_of("zipf", rows)(settings.batch(BATCH, rows)))
        values = np.zeros((ids.size, DIM), np.float32)
        step = _median(times, lambda: (local.lookup_unique(ids), local.update(ids, values)))
        call = _median(times, lambda: table.lookup(ids[:16]))
        transfer = (
            _median(times, lambda: table.lookup(ids)) - _median(times, lambda: local.lookup(ids)) - call
        )
    megabytes = values.nbytes / 1e6
    costs = Costs(step, call, max(0.0, transfer) / megabytes, megabytes)
    bars = tuple(
        Bar(f"efficiency, {what}", costs.efficiency(4, dense), target)
        for what, dense, target in (
            ("out of core", OUT_OF_CORE_S - step, 0.9),
            ("40 ms of dense work", 0.04, 0.8),
        )
    )
    notes = (
        f"a step {1e3 * step:.1f} ms, a call {1e3 * call:.2f} ms, {1e3 * costs.per_megabyte:.2f} ms a MB, "
        f"{megabytes:.1f} MB of distinct rows a step",
        ", ".join(f"{count} machines alone: {costs.efficiency(count, 0):.2f}" for count in (2, 4, 8, 16)),
    )
    return [Case("four machines, computed", (), bars, notes=notes)]


OUT_OF_CORE_S = 0.18
"""Seconds of a step with a quarter of the table in memory, as W4 measures it."""


@dataclass(frozen=True)
class Costs:
    """What a step costs in seconds: by itself, a call, a MB of rows there or back, and how many MB its rows have."""

    step: float
    call: float
    per_megabyte: float
    megabytes: float

    def efficiency(self, machines, dense):
        """Return the speed of each of several machines, compared with one that has all rows.

        Each asks all others twice, for rows and with gradients; ``(machines - 1) / machines`` of the rows are theirs.
        A machine's one event loop sends and receives, for it and for others; a network of 10 Gb/s is faster.
        """
        others = machines - 1
        loop = others * self.call + self.megabytes * others / machines * self.per_megabyte
        alone = self.step + dense
        return alone / (alone + 2 * loop)


def _median(times, call):
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
