"""Tables against a plain NumPy model: lookup, lookup_unique, state, write, update, and who owns the results."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.model import STATE_COLUMNS, TableModel, assert_same_bits

import shardemb
from shardemb.errors import RowIdError
from shardemb.initializers import Constant, Normal, Uniform
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad

INTEGERS = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">u8"]
OPTIMIZERS = [
    SGD(lr=0.5),
    Adagrad(lr=0.1, lr_decay=0.01),
    Adagrad(lr=0.1, initial_accumulator_value=0.25),
    RowWiseAdagrad(lr=0.1),
    Adam(lr=0.05),
    Adam(lr=0.05, betas=(0.5, 0.9), eps=1e-3),
]
INITIALIZERS = [
    None,
    Constant(0.0),
    Constant(-0.0),
    Constant(2.5),
    Uniform(-1, 1, seed=3),
    Normal(std=0.1, seed=4),
]


def by_repr(values):
    return [pytest.param(value, id=repr(value)) for value in values]


@st.composite
def tables(draw, optimizers=(None, *OPTIMIZERS)):
    """Arguments of create_table, for one row up to several shards (of 64 to 1,024 rows, depending on the record)."""
    num_embeddings = draw(st.sampled_from([1, 2, 63, 64, 65, 130, 500, 2100]))
    return {
        "num_embeddings": num_embeddings,
        "embedding_dim": draw(st.sampled_from([1, 3, 64, 130])),
        "rows_per_shard": draw(st.sampled_from([None, 1, 64, 128, num_embeddings])),
        "initializer": draw(st.sampled_from(INITIALIZERS)),
        "optimizer": draw(st.sampled_from(optimizers)),
    }


@st.composite
def batches(draw, num_embeddings, *, max_size=60):
    """Ids of any integer dtype, shape and memory order, or as a nested list; duplicates are likely."""
    shape = draw(st.sampled_from([(), (0,), (1,), (7,), (3, 0), (2, 3), (2, 3, 4), (max_size,)]))
    count = int(np.prod(shape))
    some = st.integers(0, num_embeddings - 1)
    ids = np.array(draw(st.lists(some, min_size=count, max_size=count)), np.int64).reshape(shape)
    form = draw(st.sampled_from(["list", "strided", "fortran", "read-only", *INTEGERS]))
    if form == "list":
        return ids.tolist()
    if form == "strided":
        return np.repeat(ids[..., None], 2, axis=-1)[..., 0]
    if form == "fortran":
        return np.asfortranarray(ids)
    if form == "read-only":
        ids.flags.writeable = False
        return ids
    assume(count == 0 or ids.max() <= np.iinfo(form).max)
    return ids.astype(form)


@st.composite
def values(draw, ids, dim):
    """Gradients or rows for some ids: of any float dtype and all magnitudes, with zeros of both signs."""
    seed, dtype = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from(["f2", "f4", "f8", ">f4"]))
    rng = np.random.default_rng(seed)
    shape = (*np.shape(ids), dim)
    numbers = rng.normal(size=shape) * 10.0 ** rng.integers(-4, 4, shape)
    numbers[rng.random(shape) < 0.1] = 0.0
    numbers[rng.random(shape) < 0.1] *= -1
    array = numbers.astype(dtype)
    return draw(st.sampled_from([array, np.asfortranarray(array), array.tolist()])) if array.size else array


def create(store, arguments, name="t"):
    """Create a table and its model."""
    return store.create_table(name, **arguments), TableModel.new(name, **arguments)


# ---- lookup ---------------------------------------------------------------------------------------------------


@given(data=st.data(), arguments=tables())
def test_lookup_returns_rows_of_any_integer_ids_in_their_shape(new_store, data, arguments):
    with new_store() as store:
        table, model = create(store, arguments)
        some = data.draw(batches(table.num_embeddings))
        table.write(
            some, rows := np.random.default_rng(0).normal(size=(*np.shape(some), table.embedding_dim))
        )
        model.write(some, rows)
        ids = data.draw(batches(table.num_embeddings))
        assert_same_bits(table.lookup(ids), model.lookup(ids))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_of_every_integer_dtype_reach_the_last_row_that_it_can_name(store, dtype):
    table, model = create(store, {"num_embeddings": 300, "embedding_dim": 3, "initializer": Uniform(0, 1)})
    last = min(299, np.iinfo(dtype).max)
    ids = np.array([[0, last], [last, 1]], dtype)
    assert_same_bits(table.lookup(ids), model.lookup(ids))
    table.write(ids, np.ones((2, 2, 3)))
    assert table.lookup(last).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "ids", [[], [[]], [[], []], (), np.empty((0, 5), np.int32), np.empty((2, 0), np.uint8)]
)
def test_empty_ids_are_fine_everywhere(store, ids):
    table = store.create_table("t", num_embeddings=5, embedding_dim=3, optimizer=Adam())
    store.commit()
    shape = np.shape(ids)
    assert table.lookup(ids).shape == (*shape, 3)
    assert table.state("exp_avg", ids).shape == (*shape, 3)
    rows, unique_ids, inverse = table.lookup_unique(ids)
    assert (rows.shape, unique_ids.shape, inverse.shape) == ((0, 3), (0,), shape)
    table.write(ids, np.empty((*shape, 3)))
    assert not store.has_changes
    table.update(ids, np.empty((*shape, 3)))
    assert table.step == 1  # every call counts, even an empty one
    table.prefetch(ids, for_update=True)


@given(data=st.data(), arguments=tables())
def test_lookup_unique_returns_each_row_once_by_ascending_id(new_store, data, arguments):
    with new_store() as store:
        table, model = create(store, arguments)
        ids = data.draw(batches(table.num_embeddings))
        rows, unique_ids, inverse = table.lookup_unique(ids)
        expected = np.unique(np.asarray(ids).astype(np.int64))
        assert (unique_ids.dtype, inverse.dtype) == (np.int64, np.int64)
        assert unique_ids.tolist() == expected.tolist()
        assert_same_bits(rows, model.lookup(expected))
        assert inverse.shape == np.shape(ids)
        assert_same_bits(rows[inverse], model.lookup(ids))


def test_out_is_filled_and_returned(store):
    table, model = create(store, {"num_embeddings": 100, "embedding_dim": 3, "initializer": Uniform(0, 1)})
    buffer = np.full((4, 2, 3), np.nan, np.float32)
    ids = [[1, 2], [2, 99]]
    assert table.lookup(ids, out=buffer[1:3]).base is buffer
    assert_same_bits(buffer[1:3], model.lookup(ids))
    assert np.isnan(buffer[[0, 3]]).all()
    whole = np.empty((2, 2, 3), np.float32)
    assert table.lookup(ids, out=whole) is whole
    assert table.lookup(5, out=np.empty(3, np.float32)).tolist() == model.lookup(5).tolist()


def test_out_may_be_a_memory_mapped_file(store, tmp_path):
    table, model = create(store, {"num_embeddings": 100, "embedding_dim": 3, "initializer": Uniform(0, 1)})
    buffer = np.memmap(tmp_path / "buffer", np.float32, mode="w+", shape=(2, 3))
    assert table.lookup([7, 8], out=buffer) is buffer
    assert_same_bits(np.asarray(buffer), model.lookup([7, 8]))


# ---- who owns the memory --------------------------------------------------------------------------------------


def results(table):
    rows, unique_ids, inverse = table.lookup_unique([3, 5, 3])
    batch = table.to_arrow_batches(rows=(0, 10)).read_all()["embedding"].combine_chunks().values.to_numpy()
    return {
        "lookup": table.lookup([3, 5]),
        "lookup of one": table.lookup(3),
        "lookup_unique": rows,
        "unique_ids": unique_ids,
        "inverse": inverse,
        "state": table.state("exp_avg", [3, 5]),
        "store.lookup": None,
        "to_dask_array": table.to_dask_array()[:10].compute(),
        "to_arrow_batches": batch,
    }


def test_results_are_the_callers_own_memory(store):
    arguments = {
        "num_embeddings": 100,
        "embedding_dim": 4,
        "optimizer": Adam(lr=1.0),
        "initializer": Constant(1.0),
    }
    table, model = create(store, arguments)
    table.update([3, 5], np.ones((2, 4)))
    model.update([3, 5], np.ones((2, 4)))
    found = results(table) | {"store.lookup": store.lookup({"t": [3, 5]})["t"]}
    before = copy.deepcopy(found)
    table.update([3, 5], np.full((2, 4), 9.0))
    store.commit()
    table.write([3, 5], np.full((2, 4), 7.0))
    for name in found:
        assert np.array_equal(found[name], before[name]), f"{name} changed with the table"
    store.rollback()
    model.update([3, 5], np.full((2, 4), 9.0))
    for name, array in found.items():
        if name != "to_arrow_batches":  # Arrow's memory is read-only
            array[...] = -1
    model.assert_matches(table)


def test_arguments_are_neither_kept_nor_changed(store):
    table, model = create(store, {"num_embeddings": 100, "embedding_dim": 4, "optimizer": SGD(lr=1.0)})
    ids, values = np.array([3, 5, 3]), np.arange(12, dtype=np.float32).reshape(3, 4)
    table.update(ids, values)
    table.write(ids[:2], values[:2])
    assert ids.tolist() == [3, 5, 3]
    assert values.tolist() == np.arange(12).reshape(3, 4).tolist()
    model.update(ids, values)
    model.write(ids[:2], values[:2])
    ids[:], values[:] = 7, 100
    model.assert_matches(table)


def test_an_array_initializer_is_copied(store):
    array = np.arange(12.0).reshape(4, 3)
    table = store.create_table("t", num_embeddings=4, embedding_dim=3, initializer=array)
    array[:] = -1
    assert table.lookup(range(4)).tolist() == np.arange(12).reshape(4, 3).tolist()


# ---- write ----------------------------------------------------------------------------------------------------


@given(data=st.data(), arguments=tables())
def test_write_sets_weights_and_nothing_else(new_store, data, arguments):
    with new_store() as store:
        table, model = create(store, arguments)
        if table.optimizer is not None:
            trained = data.draw(batches(table.num_embeddings))
            gradients = data.draw(values(trained, table.embedding_dim))
            table.update(trained, gradients)
            model.update(trained, gradients)
        for _ in range(2):
            ids = data.draw(batches(table.num_embeddings))
            rows = data.draw(values(ids, table.embedding_dim))
            table.write(ids, rows)
            model.write(ids, np.asarray(rows).astype(np.float32))
        model.assert_matches(table)


def test_the_last_of_duplicate_ids_wins(store):
    table = store.create_table("t", num_embeddings=200, embedding_dim=1)
    ids = np.random.default_rng(0).integers(0, 200, 5000)
    table.write(ids, np.arange(5000.0)[:, None])
    expected = np.zeros(200)
    expected[ids] = np.arange(5000)
    assert table.lookup(range(200))[:, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0, 1e-45, np.float32(3.4e38)])
def test_write_keeps_every_bit(store, value):
    table = store.create_table("t", num_embeddings=10, embedding_dim=3, initializer=Constant(1.0))
    rows = np.full((2, 3), value, np.float32)
    table.write([1, 2], rows, check_finite=False)
    store.commit()
    assert_same_bits(table.lookup([1, 2]), rows)


def test_a_row_written_as_zeros_stays_zeros(store, path):
    table = store.create_table("t", num_embeddings=10, embedding_dim=3, initializer=Constant(1.0))
    table.write([4], np.zeros((1, 3)))
    assert table.lookup([3, 4]).tolist() == [[1, 1, 1], [0, 0, 0]]
    store.commit()
    store.close()
    with shardemb.open(path) as again:
        assert again["t"].lookup([3, 4]).tolist() == [[1, 1, 1], [0, 0, 0]]


# ---- update ---------------------------------------------------------------------------------------------------


@given(data=st.data(), arguments=tables(optimizers=OPTIMIZERS))
def test_update_is_the_optimizers_formula_bit_for_bit(new_store, data, arguments):
    with new_store() as store:
        table, model = create(store, arguments)
        for _ in range(3):
            ids = data.draw(batches(table.num_embeddings))
            gradients = data.draw(values(ids, table.embedding_dim))
            table.update(ids, gradients)
            model.update(ids, np.asarray(gradients))
        model.assert_matches(table)


@pytest.mark.parametrize("optimizer", by_repr(OPTIMIZERS))
def test_rows_that_are_not_in_the_batch_do_not_change(store, optimizer):
    arguments = {"num_embeddings": 300, "embedding_dim": 5, "optimizer": optimizer, "initializer": Normal()}
    table, _ = create(store, arguments)
    everything, rng = np.arange(300), np.random.default_rng(1)
    table.update(everything, rng.normal(size=(300, 5)))
    columns = STATE_COLUMNS[type(optimizer)]
    weights, state = table.lookup(everything), {name: table.state(name, everything) for name in columns}
    touched = np.unique(rng.integers(0, 300, 100))
    table.update(touched, rng.normal(size=(touched.size, 5)))
    others = np.setdiff1d(everything, touched)
    assert others.size > 100
    assert_same_bits(table.lookup(others), weights[others])
    assert not np.array_equal(table.lookup(touched), weights[touched])
    for name in columns:
        assert_same_bits(table.state(name, others), state[name][others])
        assert not np.array_equal(table.state(name, touched), state[name][touched])


@pytest.mark.parametrize("optimizer", by_repr(OPTIMIZERS))
def test_gradients_of_duplicate_ids_are_summed_before_one_step(store, optimizer):
    arguments = {"num_embeddings": 10, "embedding_dim": 3, "optimizer": optimizer}
    (together, _), (apart, _) = create(store, arguments, "together"), create(store, arguments, "apart")
    gradients = np.array([[1, 2, 3], [10, 20, 30], [100, 200, 300]], np.float32)
    together.update([4, 4, 4], gradients)
    apart.update([4], gradients.sum(axis=0, keepdims=True))
    assert_same_bits(together.lookup(range(10)), apart.lookup(range(10)))
    assert together.step == apart.step == 1


def test_duplicates_are_added_in_the_order_of_the_batch(store):
    # In float32 the order matters: 1 is lost next to 1e8, unless the large ones cancel first.
    table = store.create_table("t", num_embeddings=10, embedding_dim=1, optimizer=SGD(lr=1.0))
    table.update([1, 2, 1, 2, 1, 2], [[1.0], [1e8], [1e8], [-1e8], [-1e8], [1.0]])
    assert table.lookup([1, 2])[:, 0].tolist() == [0, -1]


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_gradients_are_converted_to_float32_before_they_are_summed(store, dtype):
    table = store.create_table("t", num_embeddings=10, embedding_dim=1, optimizer=SGD(lr=1.0))
    tenth = np.array([[0.1], [0.1], [0.1]], dtype)
    table.update([1, 1, 1], tenth)
    f = np.float32(np.dtype(dtype).type(0.1))
    assert table.lookup(1)[0] == -(f + f + f)


def test_update_continues_from_rows_that_were_written(store):
    table, model = create(
        store, {"num_embeddings": 9, "embedding_dim": 2, "optimizer": Adam(), "initializer": Normal()}
    )
    for each in (table, model):
        each.update([1, 2], np.ones((2, 2), np.float32))
        each.write([2, 3], np.full((2, 2), 5.0, np.float32))
        each.update([2, 3, 4], np.ones((3, 2), np.float32))
    model.assert_matches(table)


def test_every_update_counts_one_step_of_its_table(store):
    first, second = (
        store.create_table(name, num_embeddings=9, embedding_dim=2, optimizer=SGD()) for name in ("a", "b")
    )
    for _ in range(3):
        first.update([1, 1, 2], np.ones((3, 2)))
    first.write([1], np.ones((1, 2)))
    assert (first.step, second.step) == (3, 0)


@given(data=st.data())
@settings(max_examples=20)
def test_hyper_parameters_can_change_between_updates(new_store, data):
    optimizer = data.draw(st.sampled_from(OPTIMIZERS))
    with new_store() as store:
        arguments = {
            "num_embeddings": 70,
            "embedding_dim": 3,
            "optimizer": optimizer,
            "initializer": Normal(),
        }
        table, model = create(store, arguments)
        for lr in data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=4)):
            ids = data.draw(batches(70))
            gradients = np.asarray(data.draw(values(ids, 3)))
            table.set_optimizer(replace(optimizer, lr=lr))
            model.optimizer = replace(optimizer, lr=lr)
            table.update(ids, gradients)
            model.update(ids, gradients)
        model.assert_matches(table)


# ---- initial values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initializer", by_repr(INITIALIZERS[1:]))
def test_initial_values_depend_only_on_seed_name_row_and_column(path, initializer):
    everything = np.arange(300)
    expected = None
    for number, (threads, rows_per_shard) in enumerate([(1, None), (2, 64), (5, 128), (1, 300)]):
        with shardemb.open(f"{path}{number}", threads=threads) as store:
            table = store.create_table(
                "t",
                num_embeddings=300,
                embedding_dim=7,
                initializer=initializer,
                rows_per_shard=rows_per_shard,
            )
            store.create_table("before", num_embeddings=10, embedding_dim=1)
            store.commit()
            order = np.random.default_rng(number).permutation(300)
            rows = np.empty((300, 7), np.float32)
            for part in np.array_split(order, 1 + number):
                rows[part] = table.lookup(part)
            expected = rows if expected is None else expected
            assert_same_bits(rows, expected)
            assert_same_bits(table.lookup(everything), expected)
    assert_same_bits(
        expected, TableModel.new("t", num_embeddings=300, embedding_dim=7, initializer=initializer).weights
    )


def test_uniform_values_stay_below_high_however_close_it_is(store):
    high = np.nextafter(np.float32(1), np.float32(2))
    table = store.create_table(
        "t", num_embeddings=100, embedding_dim=4, initializer=Uniform(1.0, float(high))
    )
    assert (table.lookup(range(100)) == 1).all()  # plain rounding would make every second value `high`


def test_a_longer_table_begins_with_the_same_values_and_a_wider_one_too(store):
    wide = store.create_table("wide", num_embeddings=300, embedding_dim=9, initializer=Uniform(0, 1))
    assert_same_bits(
        wide.lookup(range(300))[:100, :5],
        TableModel.new("wide", num_embeddings=100, embedding_dim=5, initializer=Uniform(0, 1)).weights,
    )


def test_tables_of_one_seed_differ_by_name_and_tables_of_one_name_by_seed(path):
    def rows(number, name, seed):
        with shardemb.open(f"{path}{number}") as store:
            table = store.create_table(
                name, num_embeddings=50, embedding_dim=4, initializer=Normal(seed=seed)
            )
            store.commit()
            return table.lookup(range(50)).tobytes()

    a, again, other_name, other_seed = rows(1, "a", 0), rows(2, "a", 0), rows(3, "b", 0), rows(4, "a", 1)
    assert a == again
    assert len({a, other_name, other_seed}) == 3


def test_a_renamed_table_keeps_its_initial_values(store, path):
    before = store.create_table("old", num_embeddings=50, embedding_dim=4, initializer=Normal(seed=1)).lookup(
        range(50)
    )
    store.commit()
    store.rename_table("old", "new")
    store.commit()
    assert_same_bits(store["new"].lookup(range(50)), before)
    store.close()
    with shardemb.open(path) as again:
        assert_same_bits(again["new"].lookup(range(50)), before)


def test_a_table_created_under_the_freed_name_of_another_draws_other_values(store):
    # Initial values depend on the seed and the table, not on its current name.
    arguments = {"num_embeddings": 50, "embedding_dim": 4, "initializer": Normal(seed=1)}
    first = store.create_table("words", **arguments)
    store.commit()
    store.rename_table("words", "old_words")
    second = store.create_table("words", **arguments)
    assert first.lookup(range(50)).tobytes() != second.lookup(range(50)).tobytes()


def test_lookups_write_nothing_and_leave_no_change(store):
    table = store.create_table("t", num_embeddings=1000, embedding_dim=4, initializer=Normal())
    store.commit()
    written = store.stats()["bytes_written"]
    table.lookup(range(1000))
    table.lookup_unique(range(1000))
    table.prefetch(range(1000))
    assert not store.has_changes
    assert store.stats()["bytes_written"] == written


# ---- prefetch, facts, dask ------------------------------------------------------------------------------------


@pytest.mark.parametrize("for_update", [False, True])
@pytest.mark.parametrize("initializer", by_repr([None, Normal()]))
def test_prefetch_changes_nothing(path, for_update, initializer):
    arguments = {"num_embeddings": 9000, "embedding_dim": 5, "optimizer": Adam(), "initializer": initializer}
    with shardemb.open(path) as store:
        table, model = create(store, arguments)
        for each in (table, model):
            each.update(range(0, 9000, 3), np.ones((3000, 5), np.float32))
        store.commit()
        table.prefetch(np.arange(9000), for_update=for_update)
        model.assert_matches(table)
    with shardemb.open(path) as store:
        table = store["t"]
        table.prefetch([[1, 2], [8999, 1]], for_update=for_update)
        table.prefetch(np.arange(9000), for_update=for_update)
        assert not store.has_changes
        for each in (table, model):
            each.update([1, 2, 8999], np.ones((3, 5), np.float32))
        model.assert_matches(table)
        store.rollback()
        assert table.step == 1


def test_facts_about_a_table(store):
    optimizer, initializer = Adam(lr=0.1), Uniform(0, 1)
    table = store.create_table(
        "t",
        num_embeddings=1000,
        embedding_dim=6,
        optimizer=optimizer,
        initializer=initializer,
        rows_per_shard=100,
    )
    assert table.name == "t"
    assert table.shape == (1000, 6)
    assert (table.num_embeddings, table.embedding_dim, len(table)) == (1000, 6, 1000)
    assert (table.optimizer, table.initializer, table.step) == (optimizer, initializer, 0)
    assert table.nbytes == 1000 * (6 + 6 + 6) * 4
    assert table.rows_per_shard >= 100
    assert table.rows_per_shard % 64 == 0
    assert table.rows_per_shard * 18 * 4 % 4096 == 0


@pytest.mark.parametrize(
    ("optimizer", "shapes"),
    [
        (SGD(), {}),
        (Adagrad(), {"sum": (2, 3, 5)}),
        (RowWiseAdagrad(), {"sum": (2, 3)}),
        (Adam(), {"exp_avg": (2, 3, 5), "exp_avg_sq": (2, 3, 5)}),
    ],
)
def test_state_has_the_shape_of_the_ids_and_one_number_or_a_row_of_them(store, optimizer, shapes):
    table = store.create_table("t", num_embeddings=10, embedding_dim=5, optimizer=optimizer)
    ids = [[1, 2, 3], [4, 5, 6]]
    assert {name: table.state(name, ids).shape for name in STATE_COLUMNS[type(optimizer)]} == shapes


def test_state_of_width_one_is_a_row_where_the_embedding_has_one_value(store):
    # ids.shape + (dim,), or ids.shape if the column has one number a row.
    adam = store.create_table("adam", num_embeddings=10, embedding_dim=1, optimizer=Adam())
    row_wise = store.create_table("row_wise", num_embeddings=10, embedding_dim=1, optimizer=RowWiseAdagrad())
    assert adam.state("exp_avg", [1, 2]).shape == (2, 1)
    assert row_wise.state("sum", [1, 2]).shape == (2,)


@pytest.mark.parametrize("rows_per_shard", [64, 128, None])
def test_to_dask_array_equals_lookups(store, rows_per_shard):
    arguments = {
        "num_embeddings": 300,
        "embedding_dim": 5,
        "initializer": Normal(),
        "rows_per_shard": rows_per_shard,
    }
    table, model = create(store, arguments)
    array = table.to_dask_array()
    assert (array.shape, array.dtype) == ((300, 5), np.float32)
    assert max(array.chunks[0]) <= table.rows_per_shard
    assert_same_bits(array.compute(), model.weights)
    table.write([299], np.ones((1, 5)))
    assert_same_bits(array[[299, 3]].compute(), np.stack([np.ones(5, np.float32), model.weights[3]]))
    store.commit()
    assert_same_bits(
        array.mean(axis=0).compute(scheduler="sync"), array.mean(axis=0).compute(scheduler="threads")
    )


def test_dask_arrays_of_two_tables_can_be_combined(store):
    a, b = (
        store.create_table(name, num_embeddings=100, embedding_dim=2, initializer=np.full((100, 2), value))
        for name, value in [("a", 1.0), ("b", 3.0)]
    )
    assert (a.to_dask_array() - b.to_dask_array()).compute().tolist() == [[-2, -2]] * 100
    before = a.to_dask_array()
    a.write([0], [[5.0, 5.0]])
    assert a.to_dask_array().sum().compute() == before.sum().compute() == 208


def test_exporting_shows_changes_and_keeps_them(store):
    arguments = {
        "num_embeddings": 140_000,
        "embedding_dim": 3,
        "optimizer": Adam(),
        "initializer": Normal(seed=1),
    }
    table, model = create(store, arguments)
    for ids in (np.arange(0, 140_000, 11), np.array([5, 40_000, 139_999])):
        for each in (table, model):
            each.update(ids, np.ones((ids.size, 3), np.float32))
        if ids.size > 3:
            store.commit()
    exported = table.to_arrow_batches(rows=(3, 139_998), columns=["exp_avg"]).read_all()
    assert exported["id"].to_numpy().tolist() == list(range(3, 139_998))
    weights = exported["embedding"].combine_chunks().values.to_numpy().reshape(-1, 3)
    assert_same_bits(weights, model.weights[3:139_998])
    assert store.has_changes
    model.assert_matches(table)
    store.commit()
    model.assert_matches(table)


# ---- explained --------------------------------------------------------------------------------------------------


def test_explain_counts_rows_by_where_they_are(tmp_path):
    """With records of 1,024 bytes, a page has four rows; a shard has 64."""
    with shardemb.open(tmp_path / "s", memory_budget=0) as store:
        arguments = {"num_embeddings": 300, "embedding_dim": 256, "rows_per_shard": 64}
        table = store.create_table("t", initializer=Uniform(-1, 1), **arguments)
        table.write([0, 1, 70, 130], np.ones((4, 256)))
        store.commit()
        store.checkpoint()
        table.write([10, 11], np.ones((2, 256)))
        table.write([12], np.ones((1, 256)))
        found = table.explain([[0, 1, 70], [130, 130, 10], [11, 12, 299]])
        assert (found.ids, found.rows, found.rows_never_written) == (9, 8, 1)
        assert (found.rows_in_memory, found.rows_out) == (1, 2)
        assert (found.shards, found.pages) == (3, 3)
        assert found.bytes_useful == 4 * 1024
        assert found.bytes_read == 4096 * (3 - found.pages_resident)
        assert found.path == "paged"
        assert found.tasks == 1
        assert "9 ids, 8 distinct rows: 1 changed and in memory, 2 in the spill file, 1 never written" in str(
            found
        )
        store.commit()
        store.checkpoint()
        table.lookup(np.arange(300))
        found = table.explain([0, 10, 11])
        assert (found.rows_in_memory, found.rows_out, found.pages, found.pages_resident) == (0, 0, 2, 2)
        assert (found.path, found.bytes_read) == ("warm", 0)
        assert table.explain([]).bytes_useful == 0
        assert "nothing to read" in str(table.explain([299]))
        with pytest.raises(RowIdError):
            table.explain([300])


def test_explain_of_a_cold_batch(tmp_path):
    with shardemb.open(tmp_path / "s", warm=False) as store:
        table = store.create_table(
            "t", num_embeddings=20_000, embedding_dim=64, initializer=np.ones((20_000, 64))
        )
        store.commit()
        found = table.explain(np.arange(0, 20_000, 100))
        if found.pages_resident == found.pages:
            pytest.skip("this file system keeps its pages in memory (tmpfs)")
        assert found.path == "cold"
        assert found.bytes_read == 200 * 4096
        assert "16.0 x as much" in str(found)
        assert table.explain(np.arange(0, 20_000, 100)) == found  # the first call has read nothing


def since(table):
    """Return the stats that count since the table was opened, and those of its memory."""
    return {name: each for name, each in table.stats().items() if name not in ON_DISK}


ON_DISK = "bytes_mapped", "rows_written", "bytes_allocated", "shards"


@pytest.mark.parametrize("initializer", [None, shardemb.initializers.Constant(1.0)])
def test_stats_count_written_rows_by_shard(tmp_path, initializer):
    with shardemb.open(tmp_path / "s") as store:
        table = store.create_table(
            "t", num_embeddings=5000, embedding_dim=16, rows_per_shard=2048, initializer=initializer
        )
        stats = table.stats()
        assert (stats["bytes_mapped"], stats["rows_written"], stats["bytes_allocated"]) == (
            3 * 2048 * 64,
            0,
            0,
        )
        table.write([0, 1, 63, 2048, 4999], np.ones((5, 16)))
        table.prefetch([7], for_update=True)
        expected = [3, 1, 1]
        assert [shard["rows_written"] for shard in table.stats()["shards"]] == expected
        store.commit()  # the first commit of a table folds it
        stats = table.stats()
        # Without a bitmap, whole blocks of 64 rows are counted, up to the last row.
        written = expected if initializer else [64, 64, 64]
        assert [shard["rows_written"] for shard in stats["shards"]] == written
        assert [shard["bytes_allocated"] for shard in stats["shards"]] == [4096] * 3
        assert (stats["rows_written"], stats["bytes_allocated"]) == (sum(written), 3 * 4096)
        table.write([1, 2], np.ones((2, 16)))
        if initializer:
            assert table.stats()["rows_written"] == 6
        store.rollback()


def test_stats_count_since_the_table_was_opened(tmp_path):
    with shardemb.open(tmp_path / "s") as store:
        table = store.create_table("t", num_embeddings=100, embedding_dim=4, optimizer=SGD())
        assert set(since(table).values()) == {0}
        table.update([1, 2, 2], np.ones((3, 4)))
        table.write([2, 3], np.ones((2, 4)))
        store.lookup({"t": [1, 2, 3]})
        table.lookup([[5]])
        expected = {"lookups": 2, "rows_looked_up": 4, "changes": 2, "rows_changed": 4, "rows_copied": 2}
        assert table.stats().items() >= (expected | {"rows_in_memory": 3, "rows_out": 0}).items()
        assert table.stats()["bytes_in_memory"] == 3 * (16 + 16) + 2 * 64
        store.commit()
    with shardemb.open(tmp_path / "s") as store:
        assert set(since(store["t"]).values()) == {0}
