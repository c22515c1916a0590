"""Rows that are not float32, against those that are: bfloat16 (B4), and float8 with scales (B5)."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM
from shardemb.dtypes import BlockScaled

from . import machine
from .data import ids_of, make_values, remove, warm
from .processes import CannotRun
from .racing import Contender, Reopened, race
from .reading import FULL, LARGE
from .results import Bar, Case, faster
from .training import make_batches, step_of

BATCH = 40_960
WIDE, BLOCK = 256, 32
WIDE_BYTES = WIDE + WIDE // BLOCK
"""Values of a row of float8, how many share a scale, and bytes of a row."""

LLM_BATCH = 65_536


def short_rows(settings):
    """B4: the same table as float32 and as bfloat16: lookups as either, and steps of Adam."""
    rows = settings.rows(FULL)
    batch, folder = settings.batch(BATCH, rows), settings.folder / "short.zarr"
    make_ids = ids_of("uniform", rows)
    with shardemb.open(folder, mode="w") as store:
        for name, dtype in (("float32", "float32"), ("bfloat16", "bfloat16")):
            for kind, optimizer in (("rows", None), ("trained", common.optimizer("Adam"))):
                _create(store, f"{name}-{kind}", rows, DIM, dtype=dtype, optimizer=optimizer)
        store.commit()
        store.checkpoint()
        long, short = store["float32-rows"], store["bfloat16-rows"]
        contenders = [
            Contender("float32", long.lookup, prepare=partial(warm, long)),
            Contender("bfloat16", partial(short.lookup, dtype="bfloat16"), prepare=partial(warm, short)),
            Contender("bfloat16 as float32", short.lookup, prepare=partial(warm, short)),
        ]
        ids = make_ids(batch)
        expected = make_values(ids).astype(shardemb.dtypes.numpy_dtype("bfloat16"))
        equal = np.array_equal(contenders[1].call(ids), expected)
        equal &= np.array_equal(contenders[2].call(ids), expected.astype(np.float32))
        arms = race(contenders, make_ids, batch, settings.times(15))
        bars = (
            faster(arms, "bfloat16", "float32", 1.4),
            faster(arms, "bfloat16 as float32", "float32", 0.9),
        )
        lookups = Case("lookup", tuple(arms.values()), bars, bool(equal))
        return [lookups, _steps(settings, store, batch)]


def _steps(settings, store, batch):
    long, short = store["float32-trained"], store["bfloat16-trained"]
    warm(long)
    warm(short)
    contenders = [
        Contender("float32: lookup + Adam", step_of(long)),
        Contender("bfloat16: lookup + Adam", step_of(short)),
    ]
    make = make_batches("uniform", long.num_embeddings)
    given = make(batch)
    for each in contenders:
        each.call(given)
    # One step of the same size; each number of the shorter type is within 2**-8 of what it stands for.
    equal = np.allclose(long.lookup(given[0]), short.lookup(given[0]), rtol=2**-7, atol=2**-8)
    arms = race(contenders, make, batch, settings.times(30))
    bar = faster(arms, "bfloat16: lookup + Adam", "float32: lookup + Adam", 0.9)
    store.rollback()
    return Case("step", tuple(arms.values()), (bar,), bool(equal))


def scaled_rows(settings):
    """B5: rows of 264 bytes, float8 with a scale for 32 values, looked up as bfloat16: warm and cold."""
    case = _scaled_warm(settings)
    try:
        return [case, _scaled_cold(settings)]
    except CannotRun as reason:
        return [replace(case, notes=(f"not cold: {reason}",))]


def _scaled_warm(settings):
    """Against rows of 256 bytes of float32."""
    rows = settings.rows(FULL) // 2
    batch = settings.batch(LLM_BATCH, rows)
    make_ids = ids_of("uniform", rows)
    with ExitStack() as stack:
        store = stack.enter_context(shardemb.open(settings.folder / "scaled.zarr", mode="w"))
        _create(store, "float32", rows, DIM)
        _create(store, "float8", rows, WIDE, dtype=BlockScaled("float8_e4m3fn", BLOCK))
        store.commit()
        store.checkpoint()
        long, scaled = store["float32"], store["float8"]
        contenders = [
            Contender("float32, 256 bytes", long.lookup, prepare=partial(warm, long)),
            Contender(
                "float8 as bfloat16, 264 bytes",
                partial(scaled.lookup, dtype="bfloat16"),
                prepare=partial(warm, scaled),
            ),
            Contender(
                "float8 as they are, 264 bytes",
                partial(scaled.lookup, dtype="raw"),
                prepare=partial(warm, scaled),
            ),
        ]
        ids = make_ids(batch)
        found, values = contenders[1].call(ids).astype(np.float32), _wide(ids)
        # Of a number, 3 bits after the first are kept; the smallest of a block lose more.
        equal = np.allclose(found, values, rtol=2**-4, atol=2**-10)
        arms = race(contenders, make_ids, batch, settings.times(15))
        bar = faster(arms, "float8 as bfloat16, 264 bytes", "float32, 256 bytes", 1.0)
        return Case("lookup", tuple(arms.values()), (bar,), bool(equal))


def _scaled_cold(settings):
    """Against random reads of 4 KiB from the same files; nothing of them is in memory, which is checked each time."""
    rows = settings.rows(LARGE) // 2
    batch = settings.batch(LLM_BATCH, rows)
    make_ids, path = ids_of("uniform", rows), settings.folder / "cold.zarr"
    with shardemb.open(path, mode="w") as store:
        _create(store, "float8", rows, WIDE, dtype=BlockScaled("float8_e4m3fn", BLOCK))
        store.commit()
    largest, reads = max(path.rglob("*"), key=lambda each: each.stat().st_size), []

    def read_pages():
        reads.append(machine.random_reads(largest, 1.5 if settings.scale >= 0.2 else 0.3)[0])

    cold = Reopened(path)
    ours = Contender(
        "cold", lambda ids: cold.store["float8"].lookup(ids, dtype="bfloat16"), prepare=cold.make_cold
    )
    cold.make_cold()
    ids = make_ids(batch)
    equal = np.allclose(ours.call(ids).astype(np.float32), _wide(ids), rtol=2**-4, atol=2**-10)
    arms = race([ours], make_ids, batch, settings.times(7), between=read_pages)
    cold.close()
    remove(path)
    pages = np.mean([_pages_of(make_ids(batch)) for _ in range(5)])
    iops, pages_per_s = float(np.median(reads)), arms["cold"].rate * pages / batch
    bar = Bar("distinct pages/s vs random 4 KiB reads/s", pages_per_s / iops, 0.9)
    notes = (
        f"device measured between the calls, {settings.machine.reader}: {iops:,.0f} reads/s, at best {max(reads):,.0f}",
        f"lookup: {pages_per_s:,.0f} distinct pages/s, {pages / batch:.2f} a row",
    )
    return Case("cold", tuple(arms.values()), (bar,), bool(equal), iops * batch / pages, notes)


def _pages_of(ids):
    """Return the number of distinct pages that hold some rows of 264 bytes."""
    first = ids * WIDE_BYTES
    return np.unique(np.concatenate([first, first + WIDE_BYTES - 1]) // machine.PAGE).size


def _wide(ids):
    return np.concatenate([make_values(ids)] * (WIDE // DIM), axis=1)


def _create(store, name, rows, dim, **options):
    make = make_values if dim == DIM else _wide
    store.create_table(
        name,
        num_embeddings=rows,
        embedding_dim=dim,
        initializer=lambda start, stop: make(np.arange(start, stop)),
        **options,
    )
