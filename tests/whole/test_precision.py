"""Tables of every precision, against NumPy and the types of the package ml_dtypes."""

import contextlib
import itertools
import json
import shutil
import threading
import time

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import encodings, inside
from support.threads import Threads

import shardemb
from shardemb.commits import rewrite
from shardemb.dtypes import BlockScaled, ScaledInt8, Stochastic
from shardemb.engine import batch as engine_batch
from shardemb.engine.shards import Shards
from shardemb.engine.table_state import TableState
from shardemb.initializers import Constant, Uniform
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad

pytestmark = pytest.mark.filterwarnings("ignore:the changes of")

ROWS, DIM = 300, 6

every_dtype = pytest.mark.parametrize("dtype", encodings.EVERY, ids=lambda dtype: dtype.label)


class Model:
    """What a table should hold: the bytes of its rows, and those of the last commit."""

    def __init__(self, dtype, initial):
        self.dtype = dtype
        self.rows = encodings.encode(dtype, np.full((ROWS, DIM), initial, np.float32))
        self.committed = self.rows.copy()

    def values(self):
        return encodings.decode(self.dtype, self.rows, DIM)

    def write(self, ids, values):
        for row, value in zip(ids, values, strict=True):
            self.rows[row] = encodings.encode(self.dtype, value[None])[0]


IDS = st.lists(st.integers(0, ROWS - 1) | st.integers(0, 3), min_size=1, max_size=6)
STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "update", "raw"]), IDS, st.integers(0, 2**32 - 1))
    | st.sampled_from(["commit", "rollback", "reopen", "checkpoint"]),
    max_size=10,
)


@every_dtype
@given(steps=STEPS, initial=st.sampled_from([0.0, 0.3]), small=st.booleans())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_table_holds_what_the_model_holds(dtype, steps, initial, small, tmp_path):
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    model, options = Model(dtype, initial), {"memory_budget": 0} if small else {}
    store = shardemb.open(tmp_path / "s", **options)
    store.create_table(
        "t", num_embeddings=ROWS, embedding_dim=DIM, dtype=dtype, optimizer=SGD(lr=0.5),
        initializer=Constant(initial), rows_per_shard=1,
    )  # fmt: skip
    store.commit()
    for step in steps:
        table = store["t"]
        if step == "commit":
            store.commit()
            model.committed = model.rows.copy()
        elif step == "rollback":
            store.rollback()
            model.rows = model.committed.copy()
        elif step == "checkpoint":
            store.checkpoint()
        elif step == "reopen":
            store.commit()
            model.committed = model.rows.copy()
            store.close()
            store = shardemb.open(tmp_path / "s", **options)
        else:
            what, ids, seed = step
            values = np.random.default_rng(seed).uniform(-3, 3, (len(ids), DIM)).astype(np.float32)
            if what == "write":
                table.write(ids, values)
                model.write(ids, values)
            elif what == "update":
                # Of ids that occur once: what LLVM makes of the formula may be fused.
                ids = list(dict.fromkeys(ids))
                grads = np.round(values[: len(ids)] * 4) / 4
                before = model.values()[ids]
                table.update(ids, grads)
                model.write(ids, before - np.float32(0.5) * grads)
            else:
                data = encodings.encode(dtype, values)
                table.write(ids, data)
                for row, some in zip(ids, data, strict=True):
                    model.rows[row] = some
        table = store["t"]
        np.testing.assert_array_equal(table.lookup(np.arange(ROWS), dtype="raw"), model.rows)
        np.testing.assert_array_equal(table.lookup(np.arange(ROWS)), model.values())
    assert store.verify() == []
    store.rollback()
    store.close()
    with shardemb.open(tmp_path / "s", mode="r") as store:
        np.testing.assert_array_equal(store["t"].lookup(np.arange(ROWS), dtype="raw"), model.committed)


# ---- training ---------------------------------------------------------------------------------------------------

OPTIMIZERS = [
    SGD(lr=0.3),
    Adam(lr=0.1),
    Adagrad(lr=0.5, initial_accumulator_value=0.3),
    RowWiseAdagrad(lr=0.5),
]


def new(store, name="t", **options):
    """A table of some rows, whose weights are random."""
    return store.create_table(
        name,
        **({"num_embeddings": ROWS, "embedding_dim": DIM, "initializer": Uniform(-1, 1, seed=3)} | options),
    )


def batch(seed, size=40):
    rng = np.random.default_rng(seed)
    return rng.integers(0, ROWS, size), rng.normal(size=(size, DIM)).astype(np.float32)


def step_by_hand(table, optimizer, number, ids, grads, encode_state):
    """What a table holds after an update: each row decoded, changed by the optimizer's own function, encoded again."""
    rows = np.unique(ids)
    weights, states = table.lookup(rows), []
    names = list(optimizer.state_columns(DIM))
    for name in names:
        states.append(table.state(name, rows).reshape(rows.size, -1))
    scalars = optimizer.scalars_of(number)[0]
    expected = []
    for k, row in enumerate(rows):
        total, *more = grads[ids == row]
        total = total.copy()
        for each in more:
            total += each
        state = np.concatenate([np.empty(0, np.float32), *(each[k] for each in states)])
        weight = weights[k].copy()
        optimizer.row_step(weight, state, total, scalars)
        parts = np.split(state, np.cumsum([each.shape[1] for each in states])[:-1]) if states else []
        expected.append((weight, [encode_state(each) for each in parts]))
    return rows, names, expected


def short_state(values):
    return values.astype(ml_dtypes.bfloat16).astype(np.float32) if values.size > 1 else values


# Each takes seconds to compile, so not every pair.
TRAINED = [(optimizer, "bfloat16", state) for optimizer in OPTIMIZERS for state in ("float32", "bfloat16")]
TRAINED += [(each, BlockScaled(block=4), "float32") for each in (Adam(lr=0.1), RowWiseAdagrad(lr=0.5))]
TRAINED += [(Adam(lr=0.1), ScaledInt8(), "bfloat16"), (Adam(lr=0.1), "float32", "bfloat16")]


@pytest.mark.parametrize(("optimizer", "dtype", "state_dtype"), TRAINED, ids=str)
def test_a_step_is_decode_step_encode(tmp_path, optimizer, dtype, state_dtype):
    encode_state = short_state if state_dtype == "bfloat16" else lambda values: values
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype=dtype, state_dtype=state_dtype, optimizer=optimizer, counters=True)
        for number in range(1, 4):
            ids, grads = batch(number)
            rows, names, expected = step_by_hand(table, optimizer, number, ids, grads, encode_state)
            table.update(ids, grads)
            weights = np.stack([weight for weight, _ in expected])
            np.testing.assert_array_equal(table.lookup(rows, dtype="raw"), encodings.encode(dtype, weights))
            for k, name in enumerate(names):
                found = table.state(name, rows).reshape(rows.size, -1)
                np.testing.assert_array_equal(found, np.stack([states[k] for _, states in expected]))
            np.testing.assert_array_equal(table.state("last_step", rows), number)
        counts = sum(np.bincount(batch(number)[0], minlength=ROWS) for number in range(1, 4))
        np.testing.assert_array_equal(table.state("count", np.arange(ROWS)), counts)


def train(path, *, threads=1, rows_per_shard=None, dtype="bfloat16", crash=False):
    """Train with stochastic rounding; return all bytes of the table."""
    options = {
        "dtype": dtype,
        "state_dtype": "bfloat16",
        "rounding": Stochastic(seed=7),
        "optimizer": Adam(lr=0.1),
    }
    store = shardemb.open(path, threads=threads)
    table = new(store, rows_per_shard=rows_per_shard, num_embeddings=70_000, **options)
    store.commit()
    for number in range(4):
        if crash and number == 2:
            table.update(*batch(99))  # what was not committed is lost
            store.close()
            store = shardemb.open(path, threads=threads)
            table = store["t"]
        rng = np.random.default_rng(number)
        ids = rng.integers(0, 70_000, 9000)
        table.update(ids, rng.normal(size=(ids.size, DIM)).astype(np.float32))
        table.write(ids[:50], rng.normal(size=(50, DIM)).astype(np.float32))
        store.commit()
    ids = np.arange(70_000)
    found = table.lookup(ids, dtype="raw").tobytes() + table.state("exp_avg", ids).tobytes()
    store.close()
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", ScaledInt8()], ids=str)
def test_stochastic_rounding_repeats_bit_for_bit(tmp_path, dtype):
    """For any number of threads and shards, and after a crash."""
    once = train(tmp_path / "a", dtype=dtype)
    assert train(tmp_path / "b", dtype=dtype, threads=8) == once
    assert train(tmp_path / "c", dtype=dtype, rows_per_shard=1024) == once
    assert train(tmp_path / "d", dtype=dtype, crash=True) == once


def test_a_row_is_rounded_the_same_whatever_else_is_in_the_batch(tmp_path):
    ids, grads = np.unique(batch(1)[0]), batch(2)[1]
    with shardemb.open(tmp_path / "s") as store:
        options = {
            "dtype": "bfloat16",
            "state_dtype": "bfloat16",
            "rounding": "stochastic",
            "optimizer": Adam(lr=0.1),
        }
        table = new(store, **options)
        store.commit()
        table.update(ids, grads[: ids.size])
        together = table.lookup(ids[3:7]), table.state("exp_avg", ids[3:7])
        store.rollback()
        table.update(ids[3:7][::-1], grads[3:7][::-1])
        np.testing.assert_array_equal(table.lookup(ids[3:7]), together[0])
        np.testing.assert_array_equal(table.state("exp_avg", ids[3:7]), together[1])


def test_small_steps_are_lost_to_nearest_and_not_stochastically(tmp_path):
    found = {}
    with shardemb.open(tmp_path / "s") as store:
        for rounding in ("nearest", "stochastic"):
            table = new(
                store,
                rounding,
                dtype="bfloat16",
                rounding=rounding,
                optimizer=SGD(lr=1e-3),
                initializer=Constant(1.0),
            )
            for _ in range(100):
                table.update(np.arange(ROWS), np.ones((ROWS, DIM), np.float32))
            found[rounding] = table.lookup(np.arange(ROWS)).mean()
    assert found["nearest"] == 1.0
    # The standard deviation of one value after 100 steps is below 0.02, so that of the mean of 1,800 below 0.0005.
    assert abs(found["stochastic"] - 0.9) < 0.0025


# ---- rows that were never written -------------------------------------------------------------------------------


@every_dtype
def test_initial_values_are_rounded_to_nearest_wherever_they_are_seen(tmp_path, dtype):
    ids = np.arange(ROWS)
    with shardemb.open(tmp_path / "plain") as store:
        expected = encodings.encode(dtype, new(store).lookup(ids))
        store.commit()
    with shardemb.open(tmp_path / "s") as store:
        new(store, dtype=dtype, counters=True)
        store.commit()
    with shardemb.open(tmp_path / "s") as store:
        table = store["t"]
        fresh = table.lookup(ids, dtype="raw")
        np.testing.assert_array_equal(fresh, expected)
        table.prefetch([1, 2, 3], for_update=True)
        table.write([5], np.zeros((1, DIM)))
        table.reset_rows([5, 6])
        np.testing.assert_array_equal(table.lookup(ids, dtype="raw"), fresh)
        store.commit()
        table.materialize()
        np.testing.assert_array_equal(table.lookup(ids, dtype="raw"), fresh)
        np.testing.assert_array_equal(zarr.open(tmp_path / "s")["t/rows"][:, : fresh.shape[1]], fresh)


@every_dtype
def test_an_array_as_initial_rows(tmp_path, dtype):
    values = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype=dtype, initializer=values, optimizer=Adagrad(initial_accumulator_value=0.5))
        np.testing.assert_array_equal(
            table.lookup(np.arange(ROWS), dtype="raw"), encodings.encode(dtype, values)
        )
        assert (table.state("sum", [0, ROWS - 1]) == 0.5).all()


# ---- ways to look up --------------------------------------------------------------------------------------------


@every_dtype
def test_lookups_as_every_type(tmp_path, dtype):
    values = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype=dtype, initializer=values)
        stored = encodings.decode(dtype, encodings.encode(dtype, values), DIM)
        ids = np.array([[5, 0], [5, 7]])
        for name, kind in encodings.FLOATS.items():
            found = table.lookup(ids, dtype=name)
            assert found.dtype == kind
            np.testing.assert_array_equal(found, stored[ids].astype(kind))
            out = np.zeros_like(found)
            assert table.lookup(ids, dtype=kind, out=out) is out
            np.testing.assert_array_equal(out, found)
            rows, unique, inverse = table.lookup_unique(ids, dtype=name)
            np.testing.assert_array_equal(rows[inverse], found)
            assert unique.tolist() == [0, 5, 7]
            assert table.lookup([], dtype=name).shape == (0, DIM)
        np.testing.assert_array_equal(store.lookup({"t": ids})["t"], stored[ids])
        np.testing.assert_array_equal(np.asarray(table), stored)
        np.testing.assert_array_equal(table[3:9], stored[3:9])
        np.testing.assert_array_equal(table.to_dask_array().compute(), stored)
        assert table.dtype in (dtype, getattr(dtype, "kind", None))


def test_a_float32_table_returns_other_types_too(tmp_path):
    values = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, initializer=values)
        assert table.dtype == "float32"
        np.testing.assert_array_equal(
            table.lookup([1, 2], dtype="bfloat16"), values[1:3].astype(ml_dtypes.bfloat16)
        )
        np.testing.assert_array_equal(table.lookup([1, 2], dtype="raw"), values[1:3].view(np.uint8))


def test_large_lookups_of_some_threads(tmp_path):
    values = np.random.default_rng(0).normal(size=(20_000, 64)).astype(np.float32)
    stored = values.astype(ml_dtypes.bfloat16)
    ids = np.random.default_rng(1).integers(0, 20_000, 60_000)
    with shardemb.open(tmp_path / "s", threads=2) as store:
        table = store.create_table(
            "t", num_embeddings=20_000, embedding_dim=64, dtype="bfloat16", initializer=values
        )
        np.testing.assert_array_equal(table.lookup(ids, dtype="bfloat16"), stored[ids])
        np.testing.assert_array_equal(table.lookup(ids), stored[ids].astype(np.float32))


def test_rows_by_key(tmp_path):
    with shardemb.open(tmp_path / "s") as store:
        store.create_vocabulary("v", key_type="string")
        table = store.create_table(
            "t", vocabulary="v", embedding_dim=DIM, dtype="bfloat16", optimizer=SGD(lr=1.0), counters=True,
            initializer=Uniform(-1, 1, seed=2),
        )  # fmt: skip
        assert table.dtype == "bfloat16"
        fresh = table.lookup(["a", "b"], missing="initial", dtype="bfloat16")
        zeros = table.lookup(["a"], missing="zeros", dtype="bfloat16")
        assert fresh.dtype == zeros.dtype == ml_dtypes.bfloat16
        assert not zeros.astype(np.float32).any()
        np.testing.assert_array_equal(table.lookup(["a", "b"], create=True, dtype="bfloat16"), fresh)
        np.testing.assert_array_equal(
            store.lookup({"t": ["b", "c"]}, missing="initial")["t"][:1], fresh[1:].astype(np.float32)
        )
        table.update(["a", "c"], np.ones((2, DIM)), create=True)
        expected = (fresh[0].astype(np.float32) - 1).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(table.lookup("a", dtype="bfloat16"), expected)
        table.evict(keep=1, by="lfu")
        store.commit()
        assert table.state("count", list(table)).tolist() == [1.0]


# ---- bulk, copies, readers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", BlockScaled(block=32)], ids=str)
@pytest.mark.parametrize("counters", [False, True])
def test_a_large_write_fills_the_shards(tmp_path, dtype, counters):
    count = 100_000
    values = np.random.default_rng(0).normal(size=(count, 64)).astype(np.float32)
    expected = encodings.encode(dtype, values[::997])
    with shardemb.open(tmp_path / "s") as store:
        table = store.create_table(
            "t", num_embeddings=count + 10, embedding_dim=64, dtype=dtype, counters=counters,
            initializer=Constant(0.5),
        )  # fmt: skip
        store.commit()
        table.write(np.arange(3, count + 3), values)
        assert inside.state(table).live().filled.changes > 0
        np.testing.assert_array_equal(table.lookup(np.arange(3, count + 3)[::997], dtype="raw"), expected)
        with shardemb.open(tmp_path / "s", mode="r") as reader:  # does not see what is not committed
            assert (reader["t"].lookup([50_000]) == 0.5).all()
            store.commit()
            store.checkpoint()
            reader.refresh()
            np.testing.assert_array_equal(
                reader["t"].lookup(np.arange(3, count + 3)[::997], dtype="raw"), expected
            )
        if counters:
            assert table.state("count", [0, 3, count]).tolist() == [0, 1, 1]
        assert store.verify() == []
        store.copy(tmp_path / "copy")
    with shardemb.open(tmp_path / "copy", mode="r") as store:
        np.testing.assert_array_equal(
            store["t"].lookup(np.arange(3, count + 3)[::997], dtype="raw"), expected
        )


def test_a_reader_of_zeros_beside_a_writer_that_fills(tmp_path):
    with shardemb.open(tmp_path / "s") as store:
        table = store.create_table("t", num_embeddings=100_000, embedding_dim=64, dtype="float16")
        store.commit()
        table.write(np.arange(100_000), np.ones((100_000, 64), np.float32))
        with shardemb.open(tmp_path / "s", mode="r") as reader:
            assert not reader["t"].lookup(np.arange(0, 100_000, 99)).any()
            assert not reader["t"].lookup(np.arange(0, 100_000, 99), dtype="raw").any()


@every_dtype
def test_resizing_and_other_shards(tmp_path, dtype):
    ids, values = batch(1)
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype=dtype, optimizer=Adam(), rounding="stochastic")
        table.write(ids, values)
        table.resize(ROWS + 5000)
        table.write([ROWS + 4000], np.ones((1, DIM)))
        store.commit()
        before = table.lookup(np.arange(ROWS + 5000), dtype="raw")
        store.reshard("t", rows_per_shard=1)
        np.testing.assert_array_equal(table.lookup(np.arange(ROWS + 5000), dtype="raw"), before)
        store.reshard("t", optimizer=RowWiseAdagrad())
        np.testing.assert_array_equal(table.lookup(np.arange(ROWS + 5000), dtype="raw"), before)
        table.resize(ROWS, drop_rows=True)
        store.commit()
        np.testing.assert_array_equal(table.lookup(np.arange(ROWS), dtype="raw"), before[:ROWS])
        assert store.verify() == []


# ---- conversions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", [None, Uniform(-1, 1, seed=3)])
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_table_is_converted(tmp_path, initializer, state_dtype):
    ids, values = batch(1)
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, optimizer=Adam(), initializer=initializer, state_dtype=state_dtype)
        table.update(ids, values)
        store.commit()
        now = table.lookup(np.arange(ROWS))
        state = table.state("exp_avg", np.arange(ROWS))
        for dtype in ("bfloat16", BlockScaled(block=4), ScaledInt8(), "float32"):
            store.reshard("t", dtype=dtype)
            data = encodings.encode(dtype, now)
            if initializer is not None:  # rows that were never written keep their first value, rounded once
                fresh = np.setdiff1d(np.arange(ROWS), ids)
                data[fresh] = table.lookup(fresh, dtype="raw")
            np.testing.assert_array_equal(table.lookup(np.arange(ROWS), dtype="raw"), data)
            now = encodings.decode(dtype, data, DIM)
            np.testing.assert_array_equal(table.state("exp_avg", np.arange(ROWS)), state)
            assert table.step == 1
        assert store.verify() == []
        table.update(ids, values)


def test_an_interrupted_conversion_is_continued(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(5000, DIM)).astype(np.float32)
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, num_embeddings=5000, initializer=values, rows_per_shard=1024)
        store.commit()
        real, done = rewrite._fill, []

        def fill(old, fresh, file, *, keep_state):
            if file.number == 2 and len(done) == 2:
                done.append("stopped")
                raise KeyboardInterrupt
            done.append(file.number)
            real(old, fresh, file, keep_state=keep_state)

        monkeypatch.setattr(rewrite, "_fill", fill)
        with pytest.raises(KeyboardInterrupt):
            store.reshard("t", rows_per_shard=2048, dtype="float16")
        assert table.dtype == "float32"
        store.reshard("t", rows_per_shard=2048, dtype="float16")
        assert done == [0, 1, "stopped", 2]
        np.testing.assert_array_equal(
            table.lookup(np.arange(5000), dtype="float16"), values.astype(np.float16)
        )


@pytest.mark.parametrize(
    ("before", "after"), [("float32", "bfloat16"), ("bfloat16", ScaledInt8()), ("float16", "float32")]
)
@pytest.mark.parametrize("keyed", [False, True])
def test_a_table_is_converted_while_a_write_waits(tmp_path, monkeypatch, before, after, keyed):
    """What was encoded for the type that the table had must not be taken for bytes of the one that it has then."""
    values = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)
    with shardemb.open(tmp_path / "s") as store:
        if keyed:
            store.create_vocabulary("v", key_type="int64").add(np.arange(5))
            table = store.create_table("t", vocabulary="v", embedding_dim=DIM, dtype=before)
        else:
            table = new(store, dtype=before)
        store.commit()
        state, plan_change = inside.state(getattr(table, "rows", table)), TableState.plan_change

        def late(self, *arguments, **options):
            planned = plan_change(self, *arguments, **options)
            monkeypatch.undo()
            store.reshard("t", dtype=after)
            return planned

        monkeypatch.setattr(TableState, "plan_change", late)
        table.write(np.arange(5), values)
        assert state.spec.precision.public_dtype == after
        expected = encodings.encode(after, values)
        np.testing.assert_array_equal(table.lookup(np.arange(5), dtype="raw"), expected)


def test_a_table_is_converted_while_it_is_looked_up(tmp_path, monkeypatch):
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype="float8_e5m2")
        store.commit()
        expected = {form: table.lookup([1, 2], dtype=form) for form in ("raw", "float8_e5m2", "float32")}
        gather, converted = Shards.gather, iter([ScaledInt8(), "bfloat16", "float32"])

        def late(self, *arguments, **options):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Shards, "gather", gather)
                store.reshard("t", dtype=next(converted))
            gather(self, *arguments, **options)

        for form, rows in expected.items():
            monkeypatch.setattr(Shards, "gather", late)
            found = table.lookup([1, 2], dtype=form)
            monkeypatch.undo()
            if form == "raw":
                np.testing.assert_array_equal(found, rows)
            assert found.shape[0] == 2
            assert np.isfinite(found.astype(np.float32)).all()


OPTIMIZED = {"optimizer": Adam(lr=0.1)}
CHANGES = {
    "copied": lambda store, table: table.copy_rows([1, 2, 7], [2, 3, 4]),
    "swapped": lambda store, table: table.swap_rows([1, 2], [5, 6]),
    "reset": lambda store, table: table.reset_rows([1, 9]),
    "clipped": lambda store, table: store.update({"t": batch(3)}, max_norm=0.5),
    "in bags": lambda store, table: table.update_bag([[1, 2], [2, 5]], None, np.ones((2, DIM)), mode="mean"),
}
CONVERTED = [
    (*pair, change) for pair in (("float32", "bfloat16"), ("bfloat16", "float32")) for change in CHANGES
]
CONVERTED += [("bfloat16", ScaledInt8(), change) for change in ("copied", "swapped", "reset")]


@pytest.mark.parametrize(("before", "after", "change"), CONVERTED)
def test_a_table_is_converted_between_the_plan_of_a_change_and_the_change(
    tmp_path, monkeypatch, before, after, change
):
    """It becomes what it becomes in a table that was converted before."""

    def made(name):
        store = shardemb.open(tmp_path / name)
        table = new(store, dtype=before, **OPTIMIZED)
        table.update(*batch(1))
        store.commit()
        return store, table

    def contents(table):
        rows = np.arange(ROWS)
        states = [table.state(name, rows) for name in ("exp_avg", "exp_avg_sq")]
        return [table.step, *(each.tobytes() for each in (table.lookup(rows, dtype="raw"), *states))]

    carry_out = engine_batch.change

    def late(*arguments):
        monkeypatch.undo()
        thread = threading.Thread(target=store.reshard, args=("t",), kwargs={"dtype": after})
        thread.start()
        thread.join()
        return carry_out(*arguments)

    expected, table = made("expected")
    with expected:
        expected.reshard("t", dtype=after)
        CHANGES[change](expected, table)
        known = contents(table)
    store, table = made("found")
    with store:
        monkeypatch.setattr(engine_batch, "change", late)
        CHANGES[change](store, table)
        assert inside.state(table).spec.precision.public_dtype == after
        assert contents(table) == known


def test_rows_move_and_change_while_their_table_is_converted(tmp_path):
    """Small integers are the same numbers in all of these types."""
    rng, types = np.random.default_rng(0), itertools.cycle(["bfloat16", "float16", "float32"])
    model = rng.integers(0, 8, (ROWS, DIM)).astype(np.float32)
    converted = []

    def convert():
        store.commit()
        with contextlib.suppress(shardemb.ShardEmbError):  # there are changes again
            store.reshard("t", dtype=next(types))
            converted.append(1)

    with shardemb.open(tmp_path / "s") as store:
        table = new(store, optimizer=SGD(lr=1.0), initializer=model)
        store.commit()
        with Threads(convert):
            for _ in range(40):
                one, other = rng.permutation(ROWS)[:20].reshape(2, 10)
                table.copy_rows(one[:5], other[:5])
                model[other[:5]] = model[one[:5]]
                table.swap_rows(one, other)
                model[[*one, *other]] = model[[*other, *one]]
                grads = rng.integers(-1, 2, (10, DIM)).astype(np.float32)
                assert store.update({"t": (one, grads)}, max_norm=1e6) == pytest.approx(np.linalg.norm(grads))
                model[one] -= grads
                table.write(other, model[one])
                model[other] = model[one]
                np.testing.assert_array_equal(table.lookup(np.arange(ROWS)), model)
                time.sleep(0.01)  # so that the other thread finds no changes now and then
        assert len(converted) > 2
        assert store.verify() == []


# ---- other programs ---------------------------------------------------------------------------------------------


def test_other_programs_see_bytes_and_where_each_column_is(tmp_path):
    ids, values = np.arange(ROWS), np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype="bfloat16", optimizer=Adam(), counters=True, initializer=values)
        table.update(ids, values)
        store.commit()
        expected, state = table.lookup(ids, dtype="bfloat16"), table.state("exp_avg_sq", ids)
    attributes = json.loads((tmp_path / "s/t/zarr.json").read_text())["attributes"]["shardemb"]
    assert attributes["format_version"] == 2
    assert attributes["dtype"] == "bfloat16"
    assert attributes["columns"] == {
        "weight": {"offset": 0, "dtype": "bfloat16", "count": 6},
        "exp_avg": {"offset": 12, "dtype": "float32", "count": 6},
        "exp_avg_sq": {"offset": 36, "dtype": "float32", "count": 6},
        "count": {"offset": 60, "dtype": "float32", "count": 1},
        "last_step": {"offset": 64, "dtype": "float32", "count": 1},
    }
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "s/t/rows")}}
    for rows in (zarr.open(tmp_path / "s")["t/rows"][:], tensorstore.open(spec).result().read().result()):
        assert (rows.dtype, rows.shape) == (np.uint8, (ROWS, 68))
        np.testing.assert_array_equal(rows[:, :12].copy().view(ml_dtypes.bfloat16), expected)
        np.testing.assert_array_equal(rows[:, 36:60].copy().view(np.float32), state)


@pytest.mark.parametrize(
    ("dtype", "dim", "nbytes"),
    [
        (BlockScaled("float8_e4m3fn", 32), 256, 264),
        ("float8_e4m3fn", 160, 160),
        ("raw", 264, 264),
        (ScaledInt8(), 64, 72),
        (ScaledInt8(bias=False), 64, 68),
        (BlockScaled("float8_e5m2", 32), 33, 35),
    ],
)
def test_a_record_without_state_is_exactly_the_row(tmp_path, dtype, dim, nbytes):
    with shardemb.open(tmp_path / "s") as store:
        store.create_table("t", num_embeddings=100, embedding_dim=dim, dtype=dtype)
        store.commit()
        assert f"{nbytes:,} bytes each" in shardemb.session.display.describe(store.info())
    assert zarr.open(tmp_path / "s")["t/rows"].shape == (100, nbytes)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float16", "halffloat"), ("bfloat16", "float"), (ScaledInt8(), "float"), ("raw", None)],
)
@pytest.mark.parametrize("encoding", ["plain", "byte_stream_split"])
def test_exports(tmp_path, dtype, kind, encoding):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    if dtype == "raw":
        values = rng.integers(0, 256, (ROWS, DIM), np.uint8)
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype=dtype, initializer=values, counters=True)
        table.export_parquet(tmp_path / "t.parquet", columns=["count"], encoding=encoding)
        found = pq.read_table(tmp_path / "t.parquet")
        expected = table.lookup(np.arange(ROWS))
        assert found.equals(table.to_arrow_batches(columns=["count"]).read_all())
    field = found.schema.field("embedding").type
    column = found["embedding"].combine_chunks()
    if kind is None:
        assert str(field) == f"fixed_size_binary[{DIM}]"
        assert b"".join(column.to_pylist()) == values.tobytes()
    else:
        assert str(field.value_type) == kind
        np.testing.assert_array_equal(np.stack(column.to_numpy(zero_copy_only=False)), expected)


# ---- raw bytes --------------------------------------------------------------------------------------------------


def test_raw_bytes(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (ROWS, 11), np.uint8)
    with shardemb.open(tmp_path / "s") as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=11, dtype="raw", initializer=rows)
        other = store.create_table("u", num_embeddings=ROWS, embedding_dim=11, dtype="raw", counters=True)
        other.write(np.arange(ROWS), rows)
        for each in (table, other):
            for found in (
                each.lookup(np.arange(ROWS)),
                np.asarray(each),
                each[:],
                each.to_dask_array().compute(),
            ):
                assert found.dtype == np.uint8
                np.testing.assert_array_equal(found, rows)
        found = store.lookup({"t": [1], "u": [2, 3]})
        np.testing.assert_array_equal(found["u"], rows[2:4])
        store.commit()
    with shardemb.open(tmp_path / "s") as store:
        np.testing.assert_array_equal(store["t"].lookup([7]), rows[7:8])
        store["t"].write([7], rows[:1])
        store.rollback()
        np.testing.assert_array_equal(store["t"].lookup([7]), rows[7:8])


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float64"}, ValueError, "dtype must be one of float32, .*got 'float64'"),
        ({"dtype": "int8"}, ValueError, "without a scale, int8 cannot hold weights"),
        ({"dtype": 3}, TypeError, "dtype must be one of"),
        ({"dtype": np.float64}, TypeError, "dtype must be one of"),
        ({"dtype": None}, TypeError, "dtype must be one of"),
        ({"state_dtype": "float16"}, ValueError, "state_dtype must be one of float32, bfloat16"),
        ({"state_dtype": "bfloat16"}, ValueError, "there is no state; leave it out"),
        ({"rounding": "up", "dtype": "float16"}, ValueError, 'rounding must be "nearest"'),
        ({"rounding": 3, "dtype": "float16"}, TypeError, 'rounding must be "nearest"'),
        ({"rounding": "stochastic"}, ValueError, "rounds nothing"),
        ({"dtype": "raw", "optimizer": SGD()}, ValueError, "bytes that are not numbers"),
        ({"dtype": "raw", "rounding": "stochastic"}, ValueError, "bytes that are not numbers"),
        ({"dtype": "raw", "initializer": Uniform(0, 1)}, ValueError, "begin as zero bytes"),
        ({"dtype": "raw", "initializer": np.full((ROWS, DIM), 256)}, ValueError, "no bytes"),
    ],
)
def test_tables_that_cannot_be(tmp_path, options, error, message):
    with shardemb.open(tmp_path / "s") as store:
        with pytest.raises(error, match=message):
            store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, **options)
        assert not store
        assert not store.has_changes


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: BlockScaled("float16"), ValueError),
        (lambda: BlockScaled(block=0), ValueError),
        (lambda: BlockScaled(block=2.0), TypeError),
        (lambda: ScaledInt8(bias=1), TypeError),
        (lambda: Stochastic(seed=-1), ValueError),
        (lambda: Stochastic(seed="a"), TypeError),
    ],
)
def test_types_that_cannot_be(call, error):
    with pytest.raises(error, match="BlockScaled|ScaledInt8|Stochastic"):
        call()


def test_calls_that_are_refused_change_nothing(tmp_path):
    with shardemb.open(tmp_path / "s") as store:
        table, raw = new(store, dtype="bfloat16"), new(store, "raw", dtype="raw", initializer=None)
        store.commit()
        with pytest.raises(ValueError, match="a lookup returns float32, .*got 'int8'"):
            table.lookup([1], dtype="int8")
        with pytest.raises(TypeError, match="a lookup returns"):
            table.lookup([1], dtype=np.int32)
        with pytest.raises(TypeError, match="out must be a NumPy array of bfloat16, got dtype float32"):
            table.lookup([1], dtype="bfloat16", out=np.empty((1, DIM), np.float32))
        with pytest.raises(ValueError, match="raw bytes: look them up with dtype='raw'"):
            raw.lookup([1], dtype="float32")
        with pytest.raises(ValueError, match="no optimizer"):
            raw.update([1], np.ones((1, DIM)))
        with pytest.raises(TypeError, match="raw rows must be uint8"):
            raw.write([1], np.ones((1, DIM)))
        with pytest.raises(ValueError, match="raw rows have shape"):
            table.write([1], np.ones((1, DIM), np.uint8))
        for name, dtype in (("raw", "bfloat16"), ("t", "raw")):
            with pytest.raises(ValueError, match="raw bytes are neither made nor converted"):
                store.reshard(name, dtype=dtype)
        with pytest.raises(ValueError, match="no optimizer can train"):
            store.reshard("raw", optimizer=SGD())
        assert not store.has_changes
        assert store.last_commit.id == 1
