"""Bags of rows, against torch and FBGEMM in memory: lookups (B1), training steps (B2), many tables (B3)."""

from functools import partial

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM, ROW_BYTES

from . import peers, torches
from .data import ids_of, make_values, warm
from .racing import Contender, race
from .reading import FULL
from .results import Case, at_most, faster

BAGS, LONGEST = 8192, 100
"""Bags of a batch, of 1 to that many ids each: 412,695 in all."""

TORCH = "torch embedding_bag in RAM"


def make_bags(distribution, rows, *, weighted=False):
    """Make a function that returns so many bags of ids: ids, offsets, and weights or None."""
    make_ids, lengths = ids_of(distribution, rows), np.random.default_rng(0)

    def make(bags):
        counts = lengths.integers(1, LONGEST + 1, bags)
        ids = make_ids(int(counts.sum()))
        offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])
        return ids, offsets, common.make_values(ids.size)[:, 0].copy() if weighted else None

    return make


def _mean_ids(bags):
    return bags * (LONGEST + 1) / 2


# ---- B1: lookups --------------------------------------------------------------------------------------------------

KINDS = {"sum": ("sum", False), "mean": ("mean", False), "weighted": ("sum", True), "max": ("max", False)}
TARGETS = {"sum": (1.0, 1.2), "mean": (1.0, 1.2), "weighted": (1.0, 1.2), "max": (10.0, 20.0)}


def lookups(settings):
    """B1: warm lookups of bags, in each mode."""
    data = settings.data(FULL)
    bags = max(16, int(settings.batch(BAGS, data.rows)))
    cases = []
    with shardemb.open(data.store(), mode="r") as store:
        table = store["rows"]
        warm(table)
        array = data.array
        for distribution in ("uniform", "zipf"):
            for kind in KINDS:
                cases.append(_lookups(settings, table, array, bags, distribution, kind))
    return cases


def _lookups(settings, table, array, bags, distribution, kind):
    mode, weighted = KINDS[kind]

    def ours(given):
        ids, offsets, weights = given
        return table.lookup_bag(ids, offsets, mode=mode, weights=weights)

    make = make_bags(distribution, table.num_embeddings, weighted=weighted)
    contenders, given = [Contender("lookup_bag", ours, prepare=partial(warm, table))], make(bags)
    equal = np.allclose(ours(given), _plainly(mode, given), 1e-4, 1e-4)
    if peers.has("torch"):
        theirs = torches.embedding_bag(array, mode)
        contenders.append(Contender(TORCH, theirs, prepare=array.max))
        equal = equal and np.allclose(ours(given), theirs(given), 1e-4, 1e-4)
    arms = race(contenders, make, bags, settings.times(15))
    limit = settings.machine.copy_bytes_per_s / (_mean_ids(1) * ROW_BYTES)
    target, stretch = TARGETS[kind]
    bars = (faster(arms, "lookup_bag", TORCH, target, stretch=stretch),)
    note = f"rows are bags, of {_mean_ids(1):.1f} ids on average"
    return Case(f"{distribution}, {kind}", tuple(arms.values()), bars, bool(equal), limit, (note,))


def _plainly(mode, given):
    """Pool the same values with NumPy, a bag at a time."""
    ids, offsets, weights = given
    bags = []
    for start, stop in zip(offsets, [*offsets[1:], ids.size], strict=True):
        rows = make_values(ids[start:stop])
        if weights is not None:
            rows *= weights[start:stop, None]
        bags.append({"sum": rows.sum, "mean": rows.mean, "max": rows.max}[mode](axis=0))
    return np.stack(bags)


# ---- B2: training steps -------------------------------------------------------------------------------------------

STEPS_BEFORE = 30


def steps(settings):
    """B2: a step on bags: the lookup, and the update by the gradient of its result."""
    data = settings.data(FULL)
    return [
        _steps(settings, data, "Adam", "torch", 6.0, 10.0),
        _steps(settings, data, "RowWiseAdagrad", "FBGEMM", 1.5, 2.0),
    ]


def _steps(settings, data, optimizer, peer, target, stretch):
    kind = {"torch": torches.TorchBagAdam, "FBGEMM": torches.FbgemmBagAdagrad}[peer]
    bags = max(16, int(settings.batch(BAGS, data.rows)))
    make_zipf = make_bags("zipf", data.rows)

    def make(bags):
        ids, offsets, _ = make_zipf(bags)
        return ids, offsets, common.make_values(bags) - np.float32(0.5)

    path = data.store(f"train-{optimizer}", common.optimizer(optimizer))
    with shardemb.open(path) as store:
        table = store["rows"]
        warm(table)

        def step(given):
            ids, offsets, grads = given
            pooled = table.lookup_bag(ids, offsets)
            table.update_bag(ids, offsets, grads)
            return pooled

        contenders = [Contender(f"lookup_bag + {optimizer} update_bag", step)]
        if peers.missing(("torch", peer)) == ():
            contenders.append(Contender(kind.name, kind(np.array(data.raw)).step))
        given = make(bags)
        expected = _plainly("sum", (*given[:2], None))
        equal = all(np.allclose(np.asarray(each.call(given)), expected, 1e-4, 1e-4) for each in contenders)
        for _ in range(STEPS_BEFORE if settings.scale >= 0.2 else 3):
            for each in contenders:
                each.call(given := make(bags))
        arms = race(contenders, make, bags, settings.times(20))
        store.rollback()
    bars = (faster(arms, contenders[0].name, kind.name, target, stretch=stretch),)
    return Case(f"zipf, {contenders[0].name}", tuple(arms.values()), bars, equal)


# ---- B3: many tables ----------------------------------------------------------------------------------------------

TABLES, LARGEST, INPUTS = 26, 40_000_000, 8


def many_tables(settings):
    """B3: bags of 26 tables, of one to forty million rows, in one call, against one table with all of the bags."""
    sizes = np.geomspace(1, settings.rows(LARGEST), TABLES).astype(np.int64)
    each = max(16, settings.batch(BAGS // 8, settings.rows(FULL)))
    with shardemb.open(settings.folder / "bags.zarr", mode="w") as store:
        for number, rows in enumerate(sizes):
            store.create_table(f"t{number}", num_embeddings=int(rows), embedding_dim=DIM)
        store.create_table("all", num_embeddings=int(sizes.sum()), embedding_dim=DIM)
        store.commit()
        make = [make_bags("zipf", int(rows)) for rows in (*sizes, sizes.sum())]
        many = [{f"t{number}": make[number](each)[:2] for number in range(TABLES)} for _ in range(INPUTS)]
        one = [{"all": make[-1](each * TABLES)[:2]} for _ in range(INPUTS)]
        turns = {"26 tables": many, "one table": one}
        for inputs in turns.values():  # read the pages in
            for given in inputs:
                store.lookup_bag(given)
        contenders = [
            Contender(name, lambda number, inputs=inputs: store.lookup_bag(inputs[number]))
            for name, inputs in turns.items()
        ]
        numbers = iter(np.arange(10**6) // 2 % INPUTS)
        arms = race(contenders, lambda _: int(next(numbers)), each * TABLES, settings.times(24))
        found = store.lookup_bag(many[0])
        equal = all(
            np.array_equal(rows, store[name].lookup_bag(*many[0][name])) for name, rows in found.items()
        )
    ratio = arms["26 tables"].median / arms["one table"].median
    return [Case("zipf", tuple(arms.values()), (at_most("26 tables vs one", ratio, 1.2, "x"),), equal)]
