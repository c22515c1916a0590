"""Rows that are not float32, with everything that optimizers, bags, rows of padding and moves of rows do to them.

What a table should hold is what a twin of float32 holds that had the same numbers: decode, change, encode.
"""

from dataclasses import replace

import numpy as np
import pytest
from support import encodings

import shardemb
from shardemb import optim
from shardemb.dtypes import BlockScaled, Plain, ScaledInt8, Stochastic
from shardemb.format.spec import TableSpec
from shardemb.initializers import Uniform
from shardemb.optim import Adam, RowWiseAdagrad

pytestmark = pytest.mark.filterwarnings("ignore:the changes of")

ROWS, DIM, PADDING = 120, 6, 3
EVERY = np.arange(ROWS)

DTYPES = [Plain("bfloat16"), Plain("float8_e4m3fn"), ScaledInt8(), BlockScaled(block=4)]
TRAINED = [
    Adam(lr=0.1),
    RowWiseAdagrad(lr=0.5, weight_decay=0.01, clip_norm=1.0),
    Adam(lr=0.1, rowwise_bias_correction=True),
]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.label)


def new(store, dtype, name="t", **options):
    given = {"num_embeddings": ROWS, "embedding_dim": DIM, "initializer": Uniform(-1, 1, seed=3)}
    return store.create_table(name, **(given | {"dtype": dtype} | options))


def twins(store, dtype, **options):
    """A table, and one of float32 with the same numbers."""
    table, twin = new(store, dtype, **options), new(store, "float32", "twin", **options)
    twin.write(EVERY, table.lookup(EVERY))
    return table, twin


def batch(seed, size=50):
    rng = np.random.default_rng(seed)
    return rng.integers(0, ROWS, size), rng.normal(size=(size, DIM)).astype(np.float32)


def bags(seed, count=20):
    """Ids, offsets, gradients and weights of bags; some bags are empty."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 5, count)
    ids, offsets = rng.integers(0, ROWS, sizes.sum()), np.cumsum(sizes) - sizes
    grads, weights = rng.normal(size=(count, DIM)), rng.normal(size=ids.size)
    return ids, offsets, grads.astype(np.float32), weights.astype(np.float32)


def states_of(table, rows=EVERY):
    names = list(table.optimizer.state_columns(DIM)) if table.optimizer else []
    return {name: table.state(name, rows) for name in names}


def contents(table, rows=EVERY):
    """Everything in some rows: the bytes of the weights, and the numbers of the state."""
    return {"weight": table.lookup(rows, dtype="raw"), **states_of(table, rows)}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def in_bags(table, store, seed, **options):
    ids, offsets, grads, weights = bags(seed)
    if options.pop("weighted", False):
        options["weights"] = weights
    table.update_bag(ids, offsets, grads, **options)


CHANGES = {
    "rows": lambda table, store, seed: table.update(*batch(seed)),
    "clipped": lambda table, store, seed: store.update({table.name: batch(seed)}, max_norm=0.5),
    "scaled": lambda table, store, seed: table.update(*batch(seed), scale=8.0),
    "by frequency": lambda table, store, seed: table.update(*batch(seed), scale_grad_by_freq=True),
    "sums": lambda table, store, seed: in_bags(table, store, seed),
    "means": lambda table, store, seed: in_bags(table, store, seed, mode="mean", scale_grad_by_freq=True),
    "weighted": lambda table, store, seed: in_bags(table, store, seed, weighted=True),
    "maxima": lambda table, store, seed: in_bags(table, store, seed, mode="max"),
}


OF_ROWS = {"rows", "clipped", "scaled", "by frequency"}


def check_steps(store, dtype, optimizer):
    """Each kind of update leaves what a step of float32 on the decoded rows leaves, encoded."""
    table, twin = twins(store, dtype, optimizer=optimizer, padding_idx=PADDING)
    for seed, (name, change) in enumerate(CHANGES.items()):
        expected = table.lookup(EVERY, dtype="raw")
        change(table, store, seed)
        change(twin, store, seed)
        ids = batch(seed)[0] if name in OF_ROWS else bags(seed)[0]
        changed = ids[ids != PADDING]
        expected[changed] = encodings.encode(dtype, twin.lookup(changed))
        np.testing.assert_array_equal(table.lookup(EVERY, dtype="raw"), expected)
        assert_same(states_of(table), states_of(twin))
        twin.write(EVERY, table.lookup(EVERY))
    assert table.step == twin.step == len(CHANGES)
    assert not table.lookup(PADDING).any()


@every_dtype
@pytest.mark.parametrize("optimizer", TRAINED, ids=str)
def test_a_step_is_decode_step_encode(tmp_path, dtype, optimizer):
    with shardemb.open(tmp_path / "s") as store:
        check_steps(store, dtype, optimizer)


OTHERS = [kind for name, kind in optim.OPTIMIZERS.items() if name not in ("Adam", "RowWiseAdagrad")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_every_optimizer_trains_short_rows(tmp_path, kind):
    options = {"l1": 0.01, "weight_decay": 0.01, "clip_value": 0.5, "max_norm": 2.0, "maximize": True}
    with shardemb.open(tmp_path / "s") as store:
        check_steps(store, Plain("bfloat16"), kind(lr=0.01, **options))


def test_the_state_is_rounded_where_it_is_short(tmp_path):
    optimizer = Adam(lr=0.1, weight_decay=0.01, rowwise_bias_correction=True)
    with shardemb.open(tmp_path / "s") as store:
        table, twin = twins(store, Plain("bfloat16"), optimizer=optimizer)
        short = new(store, "bfloat16", "short", optimizer=optimizer, state_dtype="bfloat16")
        short.write(EVERY, table.lookup(EVERY))
        for each in (twin, short):
            each.update(*batch(1))
        np.testing.assert_array_equal(
            short.lookup(EVERY, dtype="raw"), encodings.encode("bfloat16", twin.lookup(EVERY))
        )
        for name, values in states_of(twin).items():
            rounded = encodings.decode(
                "bfloat16", encodings.encode("bfloat16", values.reshape(ROWS, -1)), DIM
            )
            expected = values if name == "step" else rounded
            np.testing.assert_array_equal(short.state(name, EVERY), expected)


@every_dtype
def test_counters_count_what_they_count_in_float32(tmp_path, dtype):
    with shardemb.open(tmp_path / "s") as store:
        # Three bytes a row, so that the counters have to be aligned.
        options = {"optimizer": RowWiseAdagrad(lr=0.5), "counters": True, "padding_idx": PADDING}
        table, twin = new(store, dtype, **options), new(store, "float32", "twin", **options)
        for seed, change in enumerate(CHANGES.values()):
            for each in (table, twin):
                change(each, store, seed)
                each.write([1, 1, 5], np.ones((3, DIM)))
        for column in ("count", "last_step"):
            np.testing.assert_array_equal(table.state(column, EVERY), twin.state(column, EVERY))
        assert table.state("count", EVERY).max() > 10


# ---- stochastic rounding -------------------------------------------------------------------------------------


def test_gradients_that_were_summed_before_are_rounded_like_those_of_rows(tmp_path):
    many = 20_000  # summed in several parts
    ids = np.random.default_rng(0).permutation(many)
    grads = np.random.default_rng(1).normal(size=(many, DIM)).astype(np.float32)
    options = {
        "num_embeddings": many,
        "optimizer": Adam(lr=0.1, weight_decay=0.01),
        "rounding": Stochastic(seed=5),
        "state_dtype": "bfloat16",
    }
    found = []
    for number, threads in enumerate((1, 2, 1)):
        with shardemb.open(tmp_path / f"s{number}", threads=threads) as store:
            table = new(store, "bfloat16", **options)
            if number:
                table.update_bag(ids[:, np.newaxis], None, grads / 2, weights=np.full((many, 1), 2.0))
            else:
                table.update(ids, grads)
            found.append(contents(table, np.arange(many)))
    for each in found[1:]:
        assert_same(each, found[0])


# ---- bags ----------------------------------------------------------------------------------------------------


MODES = [("sum", False), ("sum", True), ("mean", False), ("mean", True), ("sqrtn", True), ("max", False)]


@every_dtype
@pytest.mark.parametrize("budget", [None, 0])
def test_bags_are_pooled_from_what_lookups_return(tmp_path, dtype, budget):
    options = {} if budget is None else {"memory_budget": budget}
    with shardemb.open(tmp_path / "s", **options) as store:
        table = new(store, dtype, padding_idx=PADDING, optimizer=Adam(lr=0.1))
        for part in range(3):  # rows that were never written, in slots, and in files
            twin = new(store, "float32", f"twin{part}", padding_idx=PADDING)
            twin.write(EVERY, table.lookup(EVERY))
            check_bags(table, twin, part)
            table.write(EVERY[: 40 * (part + 1)], batch(part, 40 * (part + 1))[1])
            store.commit()
            store.checkpoint()
            table.update(*batch(part + 9))
        assert table.lookup_bag([[1, 2]]).dtype == np.float32


def check_bags(table, twin, seed):
    ids, offsets, grads, weights = bags(seed)
    beyond = np.where(ids % 7 == 0, -1, ids)
    for mode, weighted in MODES:
        named = {"mode": mode, "weights": weights if weighted else None}
        found, expected = (each.lookup_bag(ids, offsets, **named) for each in (table, twin))
        np.testing.assert_array_equal(found, expected)
        row = np.full(DIM, 0.3)
        found, expected = (
            each.lookup_bag(beyond, offsets, out_of_range=row, **named) for each in (table, twin)
        )
        np.testing.assert_array_equal(found, expected)
        if mode != "max":
            found, expected = (
                each.bag_weight_gradient(ids, offsets, grads, **named) for each in (table, twin)
            )
            np.testing.assert_array_equal(found, expected)


def test_bags_of_several_tables_are_looked_up_and_trained_together(tmp_path):
    with shardemb.open(tmp_path / "s") as store:
        tables = [
            new(store, dtype, f"t{number}", optimizer=RowWiseAdagrad(lr=0.5))
            for number, dtype in enumerate(["float32", *DTYPES])
        ]
        together = store.lookup_bag({table.name: [[1, 2], [3, 4]] for table in tables})
        for table in tables:
            np.testing.assert_array_equal(together[table.name], table.lookup_bag([[1, 2], [3, 4]]))
        before = [table.lookup([5]) for table in tables]
        grads = np.ones((1, DIM))
        norm = store.update_bag({table.name: ([[5, 5]], None, grads) for table in tables}, max_norm=1.0)
        assert norm == pytest.approx(2 * np.sqrt(len(tables) * DIM))
        assert all((table.lookup([5]) < rows).any() for table, rows in zip(tables, before, strict=True))


@every_dtype
def test_bags_of_keys(tmp_path, dtype):
    with shardemb.open(tmp_path / "s") as store:
        store.create_vocabulary("words", key_type="string", reserved=1)
        options = {"vocabulary": "words", "embedding_dim": DIM, "optimizer": Adam(lr=0.1), "padding_idx": 0}
        options |= {"initializer": Uniform(-1, 1)}
        table = store.create_table("t", dtype=dtype, **options)
        twin = store.create_table("twin", **options)
        words = [["a", "b"], ["c", "a"], ["d", "d"]]
        table.lookup_bag(words, create=True, missing="initial")
        known = ["a", "b", "c", "d"]
        twin.write(known, table.lookup(known))
        for missing in ("zeros", 0):
            some = [["a", "x"], ["y", "z"]]
            found, expected = (each.lookup_bag(some, missing=missing) for each in (table, twin))
            np.testing.assert_array_equal(found, expected)
        for each in (table, twin):
            each.update_bag(words, None, np.ones((3, DIM)), mode="mean")
        expected = encodings.encode(dtype, twin.lookup(known))
        np.testing.assert_array_equal(table.lookup(known, dtype="raw"), expected)
        future = table.lookup(["x", "y"], missing="initial")
        np.testing.assert_array_equal(table.lookup_bag([["x"], ["y"]], missing="initial"), future)
        before = contents_of_keys(table, known)
        table.swap_rows(["a"], ["b"])
        table.copy_rows(["c"], ["d"])
        after = contents_of_keys(table, known)
        for name, values in before.items():
            np.testing.assert_array_equal(after[name], values[[1, 0, 2, 2]])


def contents_of_keys(table, keys):
    columns = {name: table.state(name, keys) for name in table.optimizer.state_columns(DIM)}
    return {"weight": table.lookup(keys, dtype="raw"), **columns}


# ---- rows that move, rows of padding, frozen rows ------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("counters", [False, True])
def test_rows_move_as_they_are_stored(tmp_path, dtype, counters):
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype, optimizer=Adam(lr=0.1, rowwise_bias_correction=True), counters=counters)
        initial = contents(table)
        table.update(*batch(1))
        store.commit()
        table.update(*batch(2))
        expected = contents(table)
        table.swap_rows([1, 2], [10, 119])
        for values in expected.values():
            values[[1, 10, 2, 119]] = values[[10, 1, 119, 2]]
        assert_same(contents(table), expected)
        table.copy_rows([5, 6, 10], [6, 7, 20])
        for values in expected.values():
            values[[6, 7, 20]] = values[[5, 6, 10]]
        assert_same(contents(table), expected)
        table.reset_rows([5, 20, 60])
        for name, values in expected.items():
            values[[5, 20, 60]] = initial[name][[5, 20, 60]]
        assert_same(contents(table), expected)
        table.resize(ROWS + 50)
        store.commit()
        assert_same(contents(table), expected)
        assert store.verify() == []
    with shardemb.open(tmp_path / "s", "r") as store:
        assert_same(contents(store["t"]), expected)


@every_dtype
@pytest.mark.parametrize("initializer", [Uniform(-1, 1), None])
def test_the_row_of_padding_is_zeros_until_it_is_written(tmp_path, dtype, initializer):
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype, padding_idx=-1, optimizer=RowWiseAdagrad(lr=0.5), initializer=initializer)
        assert table.padding_idx == ROWS - 1
        assert not table.lookup(-1, out_of_range="clip").any() or initializer is not None
        table.update([5, ROWS - 1], np.ones((2, DIM)))
        assert not table.lookup([ROWS - 1]).any()
        store.commit()
    with shardemb.open(tmp_path / "s") as store:
        table = store["t"]
        assert table.padding_idx == ROWS - 1
        assert not table.lookup([ROWS - 1]).any()
        store.reshard("t", dtype="float16")
        assert store["t"].padding_idx == ROWS - 1
        assert not store["t"].lookup([ROWS - 1]).any()


@every_dtype
def test_frozen_rows_take_no_gradients(tmp_path, dtype):
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype, optimizer=Adam(lr=0.1))
        table.freeze_rows(10, 20)
        before = contents(table)
        for update in (
            lambda: table.update([9, 10], np.ones((2, DIM))),
            lambda: table.update_bag([[9, 10]], None, np.ones((1, DIM)), weights=[[1.0, 2.0]]),
        ):
            with pytest.raises(shardemb.FrozenRowError, match="row 10 "):
                update()
        assert_same(contents(table), before)
        store.commit()
        store.reshard("t", rows_per_shard=64)
        assert store["t"].frozen_rows == ((10, 20),)
        table.update([9], np.ones((1, DIM)))


@every_dtype
def test_a_step_with_gradients_that_are_not_finite_is_skipped(tmp_path, dtype):
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype, optimizer=Adam(lr=0.1))
        table.update(*batch(1))
        before, (ids, grads) = contents(table), batch(2)
        grads[7, 2] = np.inf
        assert table.update(ids, grads, scale=2.0) == np.inf
        assert table.step == 1
        assert_same(contents(table), before)


# ---- lookups -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [Plain("float32"), *DTYPES], ids=lambda dtype: dtype.label)
def test_rows_that_stand_in_have_the_dtype_of_the_lookup(tmp_path, dtype):
    row = np.linspace(-2, 2, DIM)
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, dtype)
        for name, kind in encodings.FLOATS.items():
            found = table.lookup([[1, -1], [ROWS, 2]], dtype=name, out_of_range=row)
            assert found.dtype == kind
            expected = row.astype(np.float32).astype(kind)
            np.testing.assert_array_equal(found[[0, 1], [1, 0]].view(np.uint8), [expected.view(np.uint8)] * 2)
            rows = table.lookup([1, 2], dtype=name)
            np.testing.assert_array_equal(found[[0, 1], [0, 1]].view(np.uint8), rows.view(np.uint8))
            out = np.empty((2, DIM), kind)
            assert table.lookup([-1, ROWS], dtype=name, out=out, out_of_range="clip") is out
            ends = table.lookup([0, ROWS - 1], dtype=name)
            np.testing.assert_array_equal(out.view(np.uint8), ends.view(np.uint8))
        clipped = table.lookup([-5], dtype="raw", out_of_range="clip")
        np.testing.assert_array_equal(clipped, table.lookup([0], dtype="raw"))
        with pytest.raises(
            ValueError, match=r"out_of_range is a row of numbers, and the lookup returns bytes"
        ):
            table.lookup([-5], dtype="raw", out_of_range=row)


def test_raw_bytes_are_not_pooled(tmp_path):
    with shardemb.open(tmp_path / "s") as store:
        table = store.create_table("t", num_embeddings=10, embedding_dim=4, dtype="raw")
        store.create_vocabulary("words", key_type="int64")
        keyed = store.create_table("k", vocabulary="words", embedding_dim=4, dtype="raw")
        ones = np.ones((1, 4))
        for call in (
            lambda: table.lookup_bag([[1, 2]]),
            lambda: table.lookup_bag([[1, 99]], out_of_range=np.zeros(4)),
            lambda: table.update_bag([[1, 2]], None, ones),
            lambda: table.bag_weight_gradient([[1, 2]], None, ones),
            lambda: keyed.lookup_bag([[1, 2]], create=True),
            lambda: store.lookup_bag({"t": [[1, 2]]}),
        ):
            with pytest.raises(ValueError, match="holds raw bytes, which cannot be pooled"):
                call()
        assert len(keyed.vocabulary) == 0
        table.write([1, 2], np.arange(8, dtype=np.uint8).reshape(2, 4))
        table.swap_rows([1], [5])
        table.copy_rows([2], [1])
        table.reset_rows([2])
        expected = [[4, 5, 6, 7], [0, 0, 0, 0], [0, 1, 2, 3]]
        np.testing.assert_array_equal(table.lookup([1, 2, 5]), expected)


# ---- rows caught up ------------------------------------------------------------------------------------------


RESTING = Adam(lr=0.1, dense_equivalent=True)


def test_rows_that_are_caught_up_are_float32(tmp_path):
    with shardemb.open(tmp_path / "s") as store:
        for options in ({"dtype": "bfloat16"}, {"dtype": "float32", "state_dtype": "bfloat16"}):
            with pytest.raises(ValueError, match=r"dense_equivalent has float32 rows .* leave these out"):
                new(store, options.pop("dtype"), optimizer=RESTING, **options)
        new(store, "float32", optimizer=RESTING)
        new(store, "bfloat16", "short", optimizer=Adam())
        store.commit()
        for options in ({"name": "t", "dtype": "float16"}, {"name": "short", "optimizer": RESTING}):
            with pytest.raises(ValueError, match="dense_equivalent has float32 rows"):
                store.reshard(**options)
        store.reshard("t", dtype="float16", optimizer=None)
        assert store["t"].dtype == "float16"


def test_a_document_of_short_rows_that_are_caught_up_is_refused(tmp_path):
    with shardemb.open(tmp_path / "s") as store:
        spec = new(store, "bfloat16", optimizer=Adam())._state.spec
        document = replace(spec, optimizer=RESTING).to_json()
        with pytest.raises(shardemb.FormatError, match="dense_equivalent has float32 rows"):
            TableSpec.from_json(document)


@pytest.mark.parametrize("counters", [False, True])
def test_rows_that_are_caught_up_are_looked_up_as_anything(tmp_path, counters):
    with shardemb.open(tmp_path / "s") as store:
        table = new(store, "float32", optimizer=RESTING, counters=counters)
        table.update([1, 2], np.ones((2, DIM)))
        table.update([2], np.ones((1, DIM)))
        rows = table.lookup(EVERY)
        for name, kind in encodings.FLOATS.items():
            found = table.lookup(EVERY, dtype=name)
            np.testing.assert_array_equal(found.view(np.uint8), rows.astype(kind).view(np.uint8))
        np.testing.assert_array_equal(table.lookup(EVERY, dtype="raw"), rows.view(np.uint8))


# ---- what a store keeps --------------------------------------------------------------------------------------


@every_dtype
def test_what_was_committed_is_there_again(tmp_path, dtype):
    with shardemb.open(tmp_path / "s", memory_budget=0) as store:
        table = new(store, dtype, optimizer=TRAINED[2], padding_idx=PADDING, counters=True)
        for seed, change in enumerate(CHANGES.values()):
            change(table, store, seed)
            store.commit()
        table.swap_rows([1], [2])
        store.commit()
        store.checkpoint()
        expected, optimizer, step = contents(table), table.optimizer, table.step
        table.update(*batch(99))
        store.rollback()
        assert_same(contents(table), expected)
        table.update(*batch(99))
        wanted = contents(table)
        store.rollback()
    with shardemb.open(tmp_path / "s") as store:
        table = store["t"]
        assert_same(contents(table), expected)
        assert (table.optimizer, table.step) == (optimizer, step)
        assert store.verify() == []
        table.update(*batch(99))
        assert_same(contents(table), wanted)
        store.commit()
        store.reshard("t", rows_per_shard=64)
        assert_same(contents(store["t"]), wanted)
        store["t"].materialize()  # rows that were never written would be drawn as float32
        store.commit()
        store.reshard("t", dtype="float32")
        assert_same(states_of(store["t"]), {name: wanted[name] for name in states_of(table)})
        np.testing.assert_array_equal(
            store["t"].lookup(EVERY), encodings.decode(dtype, wanted["weight"], DIM)
        )
