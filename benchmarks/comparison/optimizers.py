"""A step of each optimizer, against one of Adam (B6), and clipping by the global norm (B7)."""

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM
from shardemb import optim

from .data import ids_of
from .racing import Contender, race
from .results import Case, at_most

ROWS, BATCH, ROUNDS = 1_000_000, 65_536, 9
"""All rows of a table are in memory, and its records are larger than any cache: more rows would change nothing."""

WITH_MOMENTUM = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}}
"""Options under which an optimizer has all of its state."""


def _table(store, name, optimizer, rows):
    table = store.create_table(name, num_embeddings=rows, embedding_dim=DIM, optimizer=optimizer)
    ids = np.arange(rows)
    for start in range(0, rows, BATCH):
        some = ids[start : start + BATCH]
        table.update(some, common.make_values(some.size))
    return table


def _batches(rows):
    make_ids = ids_of("uniform", rows)
    return lambda size: (make_ids(size), common.make_values(size) - np.float32(0.5))


def each_optimizer(settings):
    """B6: the step of each optimizer on 65,536 uniform ids, in turns with Adam's."""
    rows, rounds = settings.rows(ROWS), settings.times(ROUNDS)
    cases = []
    with shardemb.open(settings.folder / "optimizers", "w") as store:
        adam = _table(store, "Adam", optim.Adam(), rows)
        variants = [(name, cls()) for name, cls in optim.OPTIMIZERS.items() if name != "Adam"]
        variants += [
            (f"{name}, momentum", optim.OPTIMIZERS[name](**more)) for name, more in WITH_MOMENTUM.items()
        ]
        for number, (name, optimizer) in enumerate(variants):
            table = _table(store, f"other{number}", optimizer, rows)
            contenders = [
                Contender(each, lambda given, table=table: table.update(*given, check_finite=False))
                for each, table in (("Adam", adam), (name, table))
            ]
            size = settings.batch(BATCH, rows)
            arms = race(contenders, _batches(rows), size, rounds)
            record, of_adam = (
                4 * DIM + 4 * sum(each.optimizer.state_columns(DIM).values()) for each in (table, adam)
            )
            ratio = arms[name].median / arms["Adam"].median
            per_byte = ratio * of_adam / record
            bar = at_most(
                f"time per byte of record, of {record:,} bytes, to Adam's", per_byte, 1.5, "x", stretch=1.2
            )
            facts = {"step to Adam's": ratio, "state bytes": record - 4 * DIM}
            moved = table.lookup(_batches(rows)(size)[0])
            equal = bool(np.isfinite(moved).all() and moved.any())
            cases.append(Case(name, tuple(arms.values()), (bar,), equal, facts=facts))
            store.drop_table(f"other{number}")
        store.rollback()
    return cases


def clipping(settings):
    """B7: Adam's step, with the gradients clipped by their norm and without."""
    rows = settings.rows(ROWS)
    size = settings.batch(BATCH, rows)
    with shardemb.open(settings.folder / "clipping", "w") as store:
        _table(store, "plain", optim.Adam(), rows)
        _table(store, "clipped", optim.Adam(), rows)
        contenders = [
            Contender("update", lambda given: store.update({"plain": given})),
            Contender("clipped", lambda given: store.update({"clipped": given}, max_norm=1.0)),
        ]
        norm = store.update({"clipped": _batches(rows)(size)}, max_norm=1.0)  # compiles its kernel
        arms = race(contenders, _batches(rows), size, settings.times(4 * ROUNDS))
        store.rollback()
    bar = at_most("clipped to plain", arms["clipped"].median / arms["update"].median, 1.15, "x")
    return [Case("uniform, Adam", tuple(arms.values()), (bar,), equal=norm > 1.0)]
