"""Lookups: warm and cold, large and small, of many tables (W1, W2, W3, W11, W12)."""

import mmap
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM, ROW_BYTES

from . import machine, memory, peers, torches
from .data import batches, ids_of, make_values, warm
from .racing import Contender, all_equal, drop_caches, race, read_files, same_bytes
from .results import Arm, Bar, Case, at_most, faster

FULL, LARGE = 4_000_000, 16_000_000
SLOW_CALLS = {
    "zarr": (8192, 2),
    "lmdb": (None, 3),
    "RocksDB": (None, 3),
    "Lance": (None, 3),
    "h5py": (1024, 1),
}
"""Ids per call, and repetitions, of engines that are slow even if everything is in memory."""

COPY = "copy bandwidth"


# ---- W1, W2: warm -------------------------------------------------------------------------------------------------


def warm_uniform(settings):
    """W1: warm lookups of uniform ids."""
    return _warm(settings, "W1", "uniform", 40_960)


def warm_zipf(settings):
    """W2: the same with hot rows, and with each distinct row once."""
    return _warm(settings, "W2", "zipf", 106_496)


def _warm(settings, workload, distribution, full_batch):
    data = settings.data(FULL)
    batch = settings.batch(full_batch, data.rows)
    make_ids = ids_of(distribution, data.rows)
    cases = []
    with ExitStack() as stack:
        store = stack.enter_context(shardemb.open(data.store(), mode="r"))
        table = store["rows"]
        warm(table)
        contenders = [*_ours(table, batch), *_in_memory(data, batch), *_engines(data, batch, stack)]
        # Without the values in memory the case could not be told from one that reads them from there.
        equal = all_equal(contenders, make_ids, batch, make_values)
        arms = race(contenders, make_ids, batch, settings.times(15))
        limit = settings.machine.copy_bytes_per_s / ROW_BYTES
        cases.append(Case(distribution, tuple(arms.values()), _warm_bars(arms), equal, limit))
        if distribution == "zipf":
            cases.append(_unique(table, data, make_ids, batch, settings))
    work = memory.Work(data.rows, batch, distribution, 10, store=str(data.store()), unique=workload == "W2")
    return [*cases, memory.check(workload, work, settings)]


def _ours(table, batch):
    out, prepare = np.zeros((batch, DIM), np.float32), partial(warm, table)

    def prepare_out():
        warm(table)
        out.fill(0)

    return [
        Contender("lookup", table.lookup, prepare=prepare),
        Contender("lookup(out=)", lambda ids: table.lookup(ids, out=out), prepare=prepare_out),
    ]


def _in_memory(data, batch):
    array, out = data.array, np.zeros((batch, DIM), np.float32)

    def prepare():
        array.max()
        out.fill(0)

    found = [
        Contender("numpy a[ids] in RAM", array.__getitem__, prepare=prepare),
        Contender(
            "numpy take(out=, clip) in RAM",
            lambda ids: np.take(array, ids, 0, out=out, mode="clip"),
            prepare=prepare,
        ),
    ]
    if peers.has("torch"):
        fresh, into = torches.embedding(array, out)
        found.append(Contender("torch embedding in RAM", fresh, prepare=prepare))
        found.append(Contender("torch index_select(out=) in RAM", into, prepare=prepare))
    return found


def _engines(data, batch, stack):
    """Open the engines on disk, and warm them up."""
    found = []
    for name, (size, repetitions) in SLOW_CALLS.items():
        if peers.has(name):
            peer = peers.ENGINES[name](data)
            peer.open()
            stack.callback(peer.close)
            prepare = partial(read_files, peer.path)
            found.append(Contender(name, peer.read, min(size or batch, batch), repetitions, prepare))
    return found


def _warm_bars(arms):
    return (
        faster(arms, "lookup", "torch embedding in RAM", 1.0, stretch=1.3),
        faster(arms, "lookup(out=)", "torch embedding in RAM", 1.0, stretch=1.3),
        faster(arms, "lookup", "numpy a[ids] in RAM", 2.0),
        *(
            faster(arms, ours, name, 50.0)
            for name in ("zarr", "lmdb", "RocksDB", "Lance")
            for ours in ("lookup", "lookup(out=)")
        ),
    )


def _unique(table, data, make_ids, batch, settings):
    """Look up each distinct row once, with the inverse."""
    array = data.array

    def theirs(ids):
        unique, inverse = np.unique(ids, return_inverse=True)
        return np.take(array, unique, axis=0), unique, inverse

    ours = Contender("lookup_unique", table.lookup_unique, prepare=partial(warm, table))
    contenders = [ours, Contender("numpy unique + take", theirs, prepare=array.max)]
    ids = make_ids(batch)
    pairs = zip(table.lookup_unique(ids), theirs(ids), strict=True)
    equal = all(np.array_equal(one, other) for one, other in pairs)
    arms = race(contenders, make_ids, batch, settings.times(15))
    bar = faster(arms, "lookup_unique", "numpy unique + take", 3.0, stretch=5.0)
    share = np.unique(ids).size / batch
    limit = settings.machine.copy_bytes_per_s / ROW_BYTES / share
    notes = (f"{share:.0%} of a batch is distinct",)
    return Case("zipf, distinct rows and inverse", tuple(arms.values()), (bar,), equal, limit, notes)


# ---- W3: cold -----------------------------------------------------------------------------------------------------


def cold_uniform(settings):
    """W3: none of the table is in memory, which is checked before every call."""
    data = settings.data(LARGE)
    batch = settings.batch(65_536, data.rows)
    make_ids = ids_of("uniform", data.rows)
    cold = _Cold(data)
    ours = Contender("lookup", cold.lookup, prepare=cold.open_store)
    small = min(4096, batch)
    maps = [
        Contender("np.memmap", cold.map, repetitions=3, prepare=cold.open_plain),
        Contender("np.memmap MADV_RANDOM", cold.map, repetitions=3, prepare=cold.open_advised),
        # Read-ahead loads most of the table by the end of a large batch, but nothing useful for a small one.
        Contender("np.memmap, small batch", cold.map, small, 3, prepare=cold.open_plain),
        Contender("lookup, small batch", cold.lookup, small, prepare=cold.open_store),
    ]
    reads = []

    def read_pages():
        reads.append(machine.random_reads(data.raw_file, 1.5 if settings.scale >= 0.2 else 0.3)[0])

    all_equal([ours, *maps[:2]], make_ids, small, make_values)
    arms = race([ours, *maps], make_ids, batch, settings.times(7), between=read_pages)
    for name in ("Lance", "lmdb", "RocksDB"):
        if peers.has(name):
            _race_cold_engine(name, data, ours, make_ids, batch, settings, arms)
    cold.close()
    pages = _mean_pages(make_ids, batch)
    iops = float(np.median(reads))
    pages_per_s = arms["lookup"].rate * pages / batch
    small_ratio = arms["lookup, small batch"].rate / arms["np.memmap, small batch"].rate
    bars = (
        Bar("distinct pages/s vs random 4 KiB reads/s", pages_per_s / iops, 0.7, stretch=0.9),
        faster(arms, "lookup", "np.memmap", 50.0),
        faster(arms, "lookup", "np.memmap MADV_RANDOM", 8.0),
        faster(arms, "lookup", "Lance", 2.5),
        faster(arms, "lookup", "lmdb", 8.0),
        faster(arms, "lookup", "RocksDB", 8.0),
    )
    facts = {"read_pages_per_s": iops, "best_read_pages_per_s": max(reads), "lookup_pages_per_s": pages_per_s}
    notes = (
        f"device measured between the calls, {settings.machine.reader}: {iops:,.0f} reads/s, "
        f"at best {max(reads):,.0f}",
        f"lookup: {pages_per_s:,.0f} distinct pages/s",
        f"a batch of {small:,}: lookup is {small_ratio:.1f} times np.memmap",
    )
    case = Case("uniform", tuple(arms.values()), bars, True, iops * batch / pages, notes, facts)
    work = memory.Work(data.rows, batch, "uniform", 5, store=str(data.store()))
    return [case, memory.check("W3", work, settings)]


class _Cold:
    """Opens what is to be read, each time after its files were dropped from memory."""

    def __init__(self, data):
        self.data, self.store, self.array = data, None, None
        self.path, self.raw_file = data.store(), data.raw_file

    def open_store(self):
        self.close()
        drop_caches(self.path)
        self.store = common.open_store(self.path, warm=False, mode="r")

    def open_plain(self):
        self.array = None
        drop_caches(self.raw_file)
        self.array = self.data.raw

    def open_advised(self):
        self.open_plain()
        self.array._mmap.madvise(mmap.MADV_RANDOM)

    def lookup(self, ids):
        return self.store["rows"].lookup(ids)

    def map(self, ids):
        return np.asarray(self.array[ids])

    def close(self):
        if self.store is not None:
            self.store.close()
            self.store = None


def _race_cold_engine(name, data, ours, make_ids, batch, settings, arms):
    """Create one engine's data, race it against ours, and delete it: all engines together would fill the disk."""
    how = {"mapped": False} if name == "RocksDB" else {}
    peer = peers.ENGINES[name](data, **how)
    peer.open()

    def reopen():
        peer.close()
        drop_caches(peer.path)
        peer.open()

    theirs = Contender(name, peer.read, prepare=reopen)
    all_equal([theirs], make_ids, min(1024, batch), make_values)
    again = race([ours, theirs], make_ids, batch, 3 if name == "Lance" else 2)
    arms[name] = again[name]
    arms[f"lookup beside {name}"] = Arm(f"lookup beside {name}", batch, again["lookup"].seconds)
    peer.remove()


def _mean_pages(make_ids, batch):
    """Return the mean number of distinct pages that hold the rows of a batch, if records are only weights."""
    return float(np.mean([np.unique(make_ids(batch) * ROW_BYTES // machine.PAGE).size for _ in range(5)]))


# ---- W11: small batches -------------------------------------------------------------------------------------------

SHARDS = (1, 64, 1024, 8192)
CALLS = 500


def small_batches(settings):
    """W11: what a call costs, however many files there are."""
    rows = max(SHARDS[-1] * 64, settings.rows(1_048_576))
    with shardemb.open(settings.folder / "small.zarr", mode="w") as store:
        values = make_values(np.arange(rows))
        for shards in SHARDS:
            shape = {"num_embeddings": rows, "embedding_dim": DIM, "rows_per_shard": rows // shards}
            store.create_table(f"s{shards}", **shape, initializer=values)
        store.commit()
        tables = {shards: store[f"s{shards}"] for shards in SHARDS}
        for table in tables.values():
            warm(table)
        ids = ids_of("uniform", rows)
        contenders = [Contender(f"{shards:,} shards", _calls(table)) for shards, table in tables.items()]
        first = ids(16)
        equal = all(np.array_equal(table.lookup(first), values[first]) for table in tables.values())
        arms = race(contenders, lambda size: list(ids((size // 16, 16))), 16 * CALLS, settings.times(21))
    per_call = {name: 1e6 * arm.median / CALLS for name, arm in arms.items()}
    names = list(per_call)
    bars = [at_most(f"one call, {name}", value, 50.0, "us") for name, value in per_call.items()]
    growth = per_call[names[-1]] / per_call[names[0]]
    bars.append(at_most(f"{names[-1]} vs {names[0]}", growth, 1.5, "x"))
    return [Case("16 ids", tuple(arms.values()), tuple(bars), equal, notes=(f"{CALLS} calls at a time",))]


def _calls(table):
    return lambda many: [table.lookup(ids) for ids in many]


# ---- W12: many tables ---------------------------------------------------------------------------------------------

TABLES = 26


def many_tables(settings):
    """W12: 26 tables in one call against one table of the same size."""
    each = settings.rows(FULL) // TABLES
    size = settings.batch(4096, each)
    sizes = {f"t{number}": each for number in range(TABLES)} | {"all": TABLES * each}
    how = {
        "embedding_dim": DIM,
        "initializer": common.INITIAL,
        "optimizer": common.optimizer("RowWiseAdagrad"),
    }
    with shardemb.open(settings.folder / "many.zarr", mode="w") as store:
        for name, rows in sizes.items():
            store.create_table(name, num_embeddings=rows, **how)
        store.commit()
        for table in store.values():
            for ids in batches(table.num_embeddings):
                table.update(ids, np.zeros((ids.size, DIM), np.float32))
        equal = _one_by_one(
            store, {name: common.make_ids("uniform", rows, size) for name, rows in sizes.items()}
        )
        cases = [
            _many(settings, "lookup", store.lookup, sizes, size, with_grads=False),
            _many(settings, "update", store.update, sizes, size, with_grads=True),
        ]
        cases = [replace(case, equal=equal) for case in cases]
        store.rollback()
    return cases


def _one_by_one(store, ids):
    """Return whether one call for all tables returns what separate calls do, also after an update."""
    store.update({name: (each, common.make_values(each.size)) for name, each in ids.items()})
    together = store.lookup(ids)
    return all(same_bytes(rows, store[name].lookup(ids[name])) for name, rows in together.items())


def _many(settings, name, call, sizes, size, *, with_grads):
    names = [table for table in sizes if table != "all"]

    def make(rows):
        ids = common.make_ids("uniform", rows, size if rows != sizes["all"] else size * TABLES)
        return (ids, common.make_values(ids.size)) if with_grads else ids

    def one(_):
        return call(inputs["one"])

    def many(_):
        return call(inputs["many"])

    inputs = {}

    def between():
        inputs["many"] = {table: make(sizes[table]) for table in names}
        inputs["one"] = {"all": make(sizes["all"])}
        time.sleep(0.02)

    contenders = [Contender("26 tables", many), Contender("one table", one)]
    arms = race(contenders, lambda size: size, size * TABLES, settings.times(21), between=between)
    ratio = arms["26 tables"].median / arms["one table"].median
    bar = at_most("26 tables vs one", ratio, 1.3, "x")
    return Case(f"store.{name}", tuple(arms.values()), (bar,))
