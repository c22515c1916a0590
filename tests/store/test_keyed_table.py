"""Tables by key: what unknown keys get, which keys are evicted, and that everything else equals access by row id."""

import pickle

import numpy as np
import pytest
from support import inside
from support.model import KeyedModel, assert_same_bits

import shardemb
from shardemb.engine import table_state
from shardemb.errors import ReadOnlyError, RowIdError, StoreClosedError, TableNotFoundError, UnknownKeyError
from shardemb.initializers import Constant, Normal, Uniform
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad

DIM = 4
OPTIMIZERS = [
    SGD(lr=0.5),
    Adagrad(lr=0.1, initial_accumulator_value=0.5),
    RowWiseAdagrad(lr=0.1),
    Adam(lr=0.1),
]
WORDS = ["to", "be", "or", "not"]


def new_table(store, *, key_type="string", reserved=0, admission=None, **arguments):
    store.create_vocabulary("v", key_type=key_type, reserved=reserved, admission=admission)
    return store.create_table(
        "t", **({"vocabulary": "v", "embedding_dim": DIM, "rows_per_shard": 64} | arguments)
    )


def ones(*shape):
    return np.ones((*shape, DIM), np.float32)


# ---- rows by key ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("counters", [False, True])
@pytest.mark.parametrize("initializer", [Constant(0.0), Uniform(-1, 1, seed=2)], ids=["zeros", "drawn"])
def test_updates_by_key_are_those_by_row(store, optimizer, counters, initializer):
    """Counters follow the optimizer's state in a record, and must not be mistaken for it."""
    arguments = {"optimizer": optimizer, "initializer": initializer, "counters": counters}
    table = new_table(store, key_type="int64", **arguments)
    model = KeyedModel.new("t", num_embeddings=200, embedding_dim=DIM, **arguments)
    rng = np.random.default_rng(0)
    table.vocabulary.add(np.arange(1000, 1150))
    for turn in range(6):
        rows = rng.zipf(1.3, 60) % 150
        rows = rows[~np.isin(rows, [3, 7])] if turn > 3 else rows
        gradients = rng.normal(size=(rows.size, DIM)).astype(np.float32)
        table.update(rows + 1000, gradients)
        model.update(rows, gradients)
        table.write([1001, 1001], np.stack([gradients[0], gradients[1]]))
        model.write([1, 1], gradients[:2])
        if turn == 3:
            store.commit()
            table.vocabulary.remove([1007, 1003])
            model.reset([7, 3])
    keys, rows = np.array([1000, 1149, 1001]), [0, 149, 1]
    assert_same_bits(table.lookup(keys), model.lookup(rows))
    for name, values in model.state.items():
        assert_same_bits(table.state(name, keys).reshape(3, -1), values[rows])
    if counters:
        assert_same_bits(table.state("count", keys), model.counts[rows])
        assert_same_bits(table.state("last_step", [[1000], [1149]]), model.last_steps[[[0], [149]]])
        assert table.stats()["updates"] == int(model.counts.sum())


def test_properties_stats_and_repr(store):
    table = new_table(store, optimizer=SGD(lr=0.5), initializer=Constant(1.0), counters=True)
    assert (table.name, table.embedding_dim, table.optimizer) == ("t", DIM, SGD(lr=0.5))
    assert (table.num_embeddings, table.shape, len(table)) == (0, (0, DIM), 0)
    assert table.initializer == Constant(1.0)
    table.vocabulary.add(WORDS)
    table.vocabulary.remove(["be"])
    assert (table.num_embeddings, table.shape, len(table)) == (4, (4, DIM), 3)
    table.update(["to", "to"], ones(2))
    assert table.step == table.rows.step == 1
    assert repr(table) == "KeyedTable 't': 3 string keys x 4 float32, SGD(lr=0.5), step 1"
    stats = table.stats()
    assert (stats["vocabulary"]["keys"], stats["updates"]) == (3, 2)
    assert "KeyedTable 't'" in repr(store)


def test_unknown_keys_are_an_error_that_names_the_first(store):
    table = new_table(store, optimizer=SGD(lr=1.0))
    table.lookup(WORDS, create=True)
    message = r"key 'that' at position \(1, 0\) has no row in vocabulary 'v' \(2 such keys\): add them with"
    asked = [["to", "be"], ["that", "is"]]
    for call in (
        lambda: table.lookup(asked),
        lambda: table.update(asked, ones(2, 2)),
        lambda: table.write(asked, ones(2, 2)),
        lambda: store.lookup({"t": asked}),
        lambda: store.update({"t": (asked, ones(2, 2))}),
    ):
        with pytest.raises(UnknownKeyError, match=message):
            call()
    with pytest.raises(UnknownKeyError, match="key 'x' at position 0 has no row in vocabulary 'v': add"):
        table.lookup(["x"])
    with pytest.raises(UnknownKeyError, match="key 'x' at position"):
        table.lookup("x")
    with pytest.raises(ValueError, match="no state column"):
        table.state("count", WORDS)
    assert table.step == 0
    assert table.lookup([]).shape == (0, DIM)


@pytest.mark.parametrize("initializer", [Constant(3.0), Normal(seed=4)], ids=["constant", "drawn"])
def test_what_unknown_keys_get(store, initializer):
    table = new_table(store, reserved=2, initializer=initializer, optimizer=SGD(lr=1.0))
    fresh = KeyedModel.new("t", num_embeddings=100, embedding_dim=DIM, initializer=initializer).weights
    assert_same_bits(table.lookup(["x"], missing="initial"), fresh[[2]])
    table.vocabulary.add(WORDS)
    table.update(WORDS, ones(4))
    asked = ["new", "be", "other", "new", "to"]
    known = table.lookup(["be", "to"])
    zeros = table.lookup(asked, missing="zeros")
    assert_same_bits(zeros[[1, 4]], known)
    assert not zeros[[0, 2, 3]].any()
    # The rows that they would get, in the order of first appearance.
    assert_same_bits(
        table.lookup(asked, missing="initial"), np.stack([fresh[6], known[0], fresh[7], fresh[6], known[1]])
    )
    table.rows.write([1], 7 * ones(1))
    assert_same_bits(table.lookup(asked, missing=1)[[0, 2, 3]], 7 * ones(3))
    out = np.empty((5, DIM), np.float32)
    assert table.lookup(asked, missing="zeros", out=out) is out
    assert_same_bits(out, zeros)
    assert_same_bits(table.lookup("new", missing="initial"), fresh[6])
    assert table.lookup("new", missing="zeros").tolist() == [0] * DIM
    # After a commit, freed rows are given out first.
    store.commit()
    table.vocabulary.remove(["not", "to"])
    assert_same_bits(table.lookup(["new"], missing="initial"), fresh[[6]])
    store.commit()
    assert_same_bits(table.lookup(["a", "b", "c"], missing="initial"), fresh[[2, 5, 6]])
    assert table.vocabulary.lookup(["a"]) == -1
    assert_same_bits(table.lookup(["a", "b", "c"], create=True), fresh[[2, 5, 6]])


NO_ROW_ID = [
    0.5, None, True, [0, 1], [0], (), np.array([0]), np.array(0.0), {"row": 0}, b"error",
    np.ma.masked, np.float64(0), slice(None),
]  # fmt: skip


def test_invalid_values_of_missing(store):
    table = new_table(store, optimizer=SGD(lr=1.0))
    table.vocabulary.add(["a"])
    store.commit()
    for known in (
        ["b"],
        ["a"],
    ):  # also where no key needs it: a call that is wrong is so whatever the keys are
        with pytest.raises(
            ValueError,
            match="table 't': missing must be 'error', 'initial', 'zeros' or one row id, got 'skip'",
        ):
            table.lookup(known, missing="skip", create=True)
        for word in ("zeros", "initial", "", "skipped"):
            for change in (table.update, table.write):
                with pytest.raises(
                    ValueError, match=r"'t': missing must be 'error', 'skip' or one row id, got"
                ):
                    change(known, ones(1), missing=word)
        cases = [
            (1, RowIdError),
            (-1, RowIdError),
            (2**70, RowIdError),
            *((each, TypeError) for each in NO_ROW_ID),
        ]
        for row, error in cases:
            with pytest.raises(error, match="'t'"):
                table.lookup(known, missing=row, create=True)
            with pytest.raises(error, match="'t'"):
                table.lookup(known, missing=row)
            with pytest.raises(error, match="'t'"):
                table.update(known, ones(1), missing=row)
    for row in [*NO_ROW_ID, "zeros"]:
        with pytest.raises(TypeError, match="missing must be an integer"):
            table.vocabulary.lookup(["b", "c"], missing=row)
    with pytest.raises(ValueError, match="missing must be between"):
        table.vocabulary.lookup(["b"], missing=2**63)
    assert not store.has_changes
    assert list(table.vocabulary) == ["a"]


@pytest.mark.parametrize("key_type", ["string", "int64"])
@pytest.mark.parametrize(
    "out",
    [
        np.empty((2, DIM)),
        np.empty((3, DIM), np.float32),
        np.empty((2, 2 * DIM), np.float32)[:, ::2],
        [[0.0] * DIM] * 2,
        np.ma.masked_array(np.empty((2, DIM), np.float32)),
    ],
    ids=["dtype", "shape", "layout", "list", "mask"],
)
def test_a_lookup_that_fails_creates_no_keys(store, key_type, out):
    table = new_table(store, key_type=key_type, admission=shardemb.Admission(after=2, width=64))
    store.commit()
    keys = ["a", "b"] if key_type == "string" else [5, 7]
    for _ in range(3):
        with pytest.raises((TypeError, ValueError), match="out"):
            table.lookup(keys, create=True, missing="zeros", out=out)
    assert len(table.vocabulary) == 0
    assert not store.has_changes
    good = np.full((2, DIM), 7, np.float32)
    assert table.lookup(keys, create=True, missing="zeros", out=good) is good
    assert good.tolist() == [[0] * DIM] * 2


def test_a_dropped_table_creates_no_keys(store):
    table = new_table(store)
    words = table.vocabulary
    store.commit()
    store.drop_table("t")
    with pytest.raises(TableNotFoundError):
        table.lookup(["a"], create=True)
    assert len(words) == 0


def test_masked_keys_and_values_are_refused(store):
    table = new_table(store, key_type="int64", optimizer=SGD(lr=1.0))
    masked = np.ma.masked_array([1, 2], [False, True])
    rows = np.ma.masked_array(ones(2), np.eye(2, DIM))
    for keys in (masked, [masked]):
        for call in (table.vocabulary.add, table.vocabulary.lookup, table.vocabulary.remove, table.prefetch):
            with pytest.raises(ValueError, match="vocabulary 'v'.*(masked|missing)"):
                call(keys)
    table.vocabulary.add([1])
    store.commit()
    for missing in ("skip", 0):
        with pytest.raises(ValueError, match="table 't': gradients: 2 of 8 values are masked"):
            table.update([1, 2], rows, missing=missing)
    assert not store.has_changes
    unmasked = np.ma.masked_array([1, 2], [False, False])
    assert table.vocabulary.add(unmasked).tolist() == [0, 1]


def test_keys_that_are_looked_up_may_be_created(store):
    table = new_table(store, initializer=Uniform(-1, 1, seed=1))
    fresh = KeyedModel.new(
        "t", num_embeddings=100, embedding_dim=DIM, initializer=Uniform(-1, 1, seed=1)
    ).weights
    found = table.lookup([["be", "to"], ["be", "or"]], create=True)
    assert_same_bits(found, fresh[[[0, 1], [0, 2]]])
    assert list(table.vocabulary) == ["be", "to", "or"]
    for _ in range(3):  # the table grows in whole shards
        table.lookup([f"{i}" for i in range(200)], create=True)
        assert table.rows.num_embeddings >= table.num_embeddings
    assert table.num_embeddings == 203


def test_keys_that_are_not_admitted_yet_get_what_missing_says(store):
    table = new_table(store, admission=shardemb.Admission(after=2, width=64))
    with pytest.raises(UnknownKeyError):
        table.lookup(["a"], create=True)
    assert table.lookup(["b", "a"], create=True, missing="zeros").tolist() == [[0] * DIM] * 2
    assert list(table.vocabulary) == ["a"]
    assert table.lookup(["b"], create=True).shape == (1, DIM)


def test_updates_skip_unknown_keys_or_use_a_given_row(store):
    table = new_table(store, reserved=1, optimizer=SGD(lr=1.0), counters=True)
    table.vocabulary.add(["a", "b"])
    gradients = np.arange(12, dtype=np.float32).reshape(3, DIM)
    table.update(["x", "b", "y"], gradients, missing="skip")
    assert_same_bits(table.lookup(["a", "b"]), np.stack([np.zeros(DIM, np.float32), -gradients[1]]))
    assert table.rows.lookup([0]).tolist() == [[0] * DIM]
    table.update([["x"], ["b"], ["x"]], gradients.reshape(3, 1, DIM), missing=0)
    assert_same_bits(table.rows.lookup([0]), -(gradients[0] + gradients[2])[None])
    assert table.rows.state("count", [0, 1, 2]).tolist() == [2, 0, 2]
    table.write(["x", "a"], gradients[:2], missing="skip")
    assert_same_bits(table.lookup(["a"]), gradients[[1]])
    table.update(["x"], gradients[:1], missing="skip")
    assert table.step == 3
    with pytest.raises(ValueError, match="shape"):
        table.update(["x", "b"], gradients, missing="skip")
    with pytest.raises(ValueError):
        table.update(["b"], np.full((1, DIM), np.nan, np.float32), missing="skip")
    table.update("b", gradients[0], missing="skip")
    table.update("z", gradients[0], missing="skip")
    assert table.step == 5


def test_gradients_of_a_key_of_padding_are_dropped(store):
    table = new_table(store, optimizer=SGD(lr=1.0), reserved=1, padding_idx=0)
    table.vocabulary.add(WORDS)
    given = ["to", "be", "to", "or"]
    table.update(given, ones(4), padding_key="be", scale_grad_by_freq=True)
    np.testing.assert_array_equal(table.lookup(WORDS), -ones(4) * [[1], [0], [1], [0]])
    table.update(given, ones(4), padding_key="to")
    np.testing.assert_array_equal(table.lookup(WORDS), -ones(4) * [[1], [1], [2], [0]])
    table.update(given, ones(4), scale_grad_by_freq=True)
    np.testing.assert_array_equal(table.lookup(WORDS), -ones(4) * [[2], [2], [3], [0]])
    # By default the table's own row of padding, which no key has.
    for more in ({}, {"padding_key": "be"}):
        table.update(["x", "be"], ones(2), missing=0, **more)
        assert table.rows.lookup(0).any() == bool(more)
    np.testing.assert_array_equal(table.lookup(["be"]), -3 * ones(1))


def test_a_key_of_padding_has_a_row(store):
    table = new_table(store, optimizer=SGD(lr=1.0))
    table.vocabulary.add(WORDS)
    with pytest.raises(UnknownKeyError, match="key 'x' .* has no row"):
        table.update(["to"], ones(1), padding_key="x")
    table.update(["x"], ones(1), padding_key="x", create=True)
    assert not table.lookup([*WORDS, "x"]).any()
    with pytest.raises(TypeError):
        table.update(["to"], ones(1), padding_key=3)
    assert table.step == 1


def test_a_prefetch_ignores_unknown_keys(store):
    table = new_table(store)
    table.vocabulary.add(["a"])
    table.prefetch(["a", "b"], for_update=True)
    table.prefetch([])
    with pytest.raises(TypeError):
        table.prefetch([1])


def test_rows_are_reset(store):
    table = new_table(store, key_type="int64", optimizer=Adam(), initializer=Normal(seed=1), counters=True)
    table.vocabulary.add(np.arange(6))
    before = table.lookup(np.arange(6))
    table.update(np.arange(6), ones(6))
    after = table.lookup(np.arange(6))
    table.rows.reset_rows([[4], [2], [4]])
    assert_same_bits(table.lookup([2, 4]), before[[2, 4]])
    assert_same_bits(table.lookup([0, 1, 3, 5]), after[[0, 1, 3, 5]])
    for column in "exp_avg", "exp_avg_sq", "count", "last_step":
        assert (table.state(column, np.arange(6)).reshape(6, -1).any(axis=1) == [1, 1, 0, 1, 0, 1]).all()
    for wrong, error in (([table.rows.num_embeddings], RowIdError), ([-1], RowIdError), ([0.5], TypeError)):
        with pytest.raises(error):
            table.rows.reset_rows(wrong)
    table.rows.reset_rows([])
    store.commit()
    table.rows.reset_rows([2, 4])  # the commit has given them records
    assert store.has_changes


def test_resetting_rows_that_were_never_written_changes_nothing(store):
    table = new_table(store, key_type="int64", initializer=Normal(seed=1))
    table.vocabulary.add(np.arange(6))
    store.commit()
    table.rows.reset_rows([1, 2])
    assert not store.has_changes


# ---- eviction ---------------------------------------------------------------------------------------------------


def counted(store, **more):
    table = new_table(store, key_type="int64", optimizer=SGD(lr=1.0), counters=True, **more)
    table.vocabulary.add(np.arange(10, 20))
    for keys in [10, 11, 12], [11, 11, 13], [10, 14], [15]:  # steps 1 to 4
        table.update(keys, ones(len(keys)))
    return table


@pytest.mark.parametrize(
    ("how", "gone"),
    [
        ({"older_than": 0}, [*range(10, 20)]),
        ({"older_than": 1}, [10, 11, 12, 13, 14, 16, 17, 18, 19]),
        ({"older_than": 2}, [11, 12, 13, 16, 17, 18, 19]),
        ({"older_than": 3}, [12, 16, 17, 18, 19]),
        ({"older_than": 4}, [16, 17, 18, 19]),
        ({"older_than": 5}, []),
        ({"keep": 10}, []),
        ({"keep": 100}, []),
        ({"keep": 0}, [*range(10, 20)]),
        ({"keep": 3}, [11, 12, 13, 16, 17, 18, 19]),
        ({"keep": 2, "by": "lru"}, [11, 12, 13, 14, 16, 17, 18, 19]),
        ({"keep": 1, "by": "lfu"}, [10, *range(12, 20)]),
        ({"keep": 3, "by": "lfu"}, [*range(13, 20)]),
        ({"keep": 7, "by": "lfu"}, [17, 18, 19]),
    ],
)
def test_which_keys_are_evicted(store, how, gone):
    table = counted(store)
    other = store.create_table("u", vocabulary="v", embedding_dim=2, initializer=Constant(1.0))
    other.write(np.arange(10, 20), np.zeros((10, 2), np.float32))
    rows = table.vocabulary.lookup(gone)
    assert table.evict(**how).tolist() == gone
    assert table.vocabulary.lookup(gone).tolist() == [-1] * len(gone)
    assert len(table) == 10 - len(gone)
    assert (other.rows.lookup(rows) == 1).all()
    assert not table.rows.lookup(rows).any()
    assert not table.rows.state("count", rows).any()
    assert table.evict(**how).tolist() == []


def test_eviction_ignores_reserved_and_freed_rows(store):
    table = counted(store, reserved=3)
    table.vocabulary.remove([10, 19])
    table.rows.update([0, 1], ones(2))
    assert table.evict(keep=2).tolist() == [11, 12, 13, 16, 17, 18]
    assert table.rows.state("count", [0, 1]).tolist() == [1, 1]
    store.commit()
    assert table.vocabulary.add([50]).tolist() == [3]
    assert table.evict(older_than=1).tolist() == [50, 14, 15]  # in the order of their rows


@pytest.mark.parametrize("how", [{}, {"keep": 1, "older_than": 1}, {"keep": 1, "by": "age"}, {"by": "lru"}])
def test_ambiguous_evictions_are_refused(store, how):
    table = counted(store)
    with pytest.raises(ValueError, match="pass either older_than or keep"):
        table.evict(**how)


def test_invalid_evictions_are_refused(store):
    table = counted(store)
    for how, error in (
        ({"keep": -1}, ValueError),
        ({"older_than": -1}, ValueError),
        ({"keep": 1.5}, TypeError),
        ({"older_than": "x"}, TypeError),
    ):
        with pytest.raises(error):
            table.evict(**how)
    plain = store.create_table("plain", vocabulary="v", embedding_dim=2)
    with pytest.raises(
        ValueError, match="table 'plain' does not count updates: create it with counters=True"
    ):
        plain.evict(keep=1)
    assert len(table) == 10


def test_counters_stay_where_float32_ends(store):
    table = counted(store)
    table.rows.write([0], ones(1))  # now the row has a slot
    shards = inside.shards(table.rows)
    last = shards.spec.columns["count"][0]
    for keys in [10], [10, 10, 10]:
        shards.records[shards.overlay.places(np.array([0]))[0], last] = 2**24 - 1
        for _ in range(2):
            table.update(keys, ones(len(keys)))
            assert table.state("count", [10]) == 2**24


# ---- dropped, closed, read-only, resharded -----------------------------------------------------------------------


def test_a_dropped_or_closed_table_refuses_every_use(path):
    store = shardemb.open(path)
    table = new_table(store, optimizer=SGD(lr=1.0), counters=True)
    table.vocabulary.add(WORDS)
    store.commit()
    store.drop_table("t")
    calls = (
        lambda: table.lookup(WORDS),
        lambda: table.lookup(WORDS, missing="initial"),
        lambda: table.update(WORDS, ones(4)),
        lambda: table.write(WORDS, ones(4)),
        lambda: table.state("count", WORDS),
        lambda: table.prefetch(WORDS),
        lambda: table.evict(keep=1),
        lambda: table.to_arrow_batches(),
    )
    for call in calls:
        with pytest.raises(TableNotFoundError, match="table 't' is no longer in the store"):
            call()
    assert len(table.vocabulary) == 4
    store.rollback()
    assert store["t"] is table
    assert table.lookup(WORDS).shape == (4, DIM)
    store.close()
    for call in calls:
        with pytest.raises(StoreClosedError):
            call()


def test_a_reader_looks_keys_up_and_changes_none(path):
    with shardemb.open(path) as store:
        table = new_table(store, optimizer=SGD(lr=1.0), initializer=Constant(2.0), counters=True)
        table.vocabulary.add(WORDS)
        table.update(["to"], ones(1))
        store.commit()
    with shardemb.open(path, "r") as store:
        table = store["t"]
        assert table.lookup(["to", "x"], missing="initial").tolist() == [[1] * DIM, [2] * DIM]
        for call in (
            lambda: table.update(["to"], ones(1)),
            lambda: table.update(["x"], ones(1), missing="skip"),
            lambda: table.evict(older_than=0),
            lambda: table.lookup(["x"], create=True),
        ):
            with pytest.raises(ReadOnlyError):
                call()


def test_resharding_keeps_keys_and_counters(path):
    with shardemb.open(path) as store:
        table = counted(store)
        store.commit()
        before = table.lookup(np.arange(10, 20))
        store.reshard("t", rows_per_shard=128)
        assert_same_bits(table.lookup(np.arange(10, 20)), before)
        assert table.state("count", [11, 19]).tolist() == [3, 0]
        store.reshard("t", optimizer=Adam())
        assert_same_bits(table.lookup(np.arange(10, 20)), before)
        assert table.step == 0
        assert not table.state("exp_avg", np.arange(10, 20)).any()
        assert table.vocabulary.add([99]).tolist() == [10]
        store.commit()
    with shardemb.open(path) as store:
        assert store["t"].lookup([99]).shape == (1, DIM)
        assert store.verify() == []


# ---- as people expect of a table by key ------------------------------------------------------------------------


def test_a_table_is_a_collection_of_its_keys(store):
    table = new_table(store)
    rows = np.arange(3 * DIM, dtype=np.float32).reshape(3, DIM)
    table.write(["to", "be", "or"], rows, create=True)
    assert list(table) == ["to", "be", "or"]
    assert len(table) == 3
    assert "be" in table
    assert "not" not in table
    assert_same_bits(table[["or", "to"]], rows[[2, 0]])
    assert_same_bits(table["be"], rows[1])
    assert_same_bits(np.asarray(table), rows)
    table.vocabulary.remove(["be"])
    assert_same_bits(np.asarray(table), rows[[0, 2]])
    assert np.asarray(table, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(table, copy=False)


def test_a_large_table_does_not_become_an_array_unasked(store, monkeypatch):
    table = new_table(store)
    table.lookup(WORDS, create=True)
    monkeypatch.setattr(table_state, "ARRAY_BYTES", 4 * DIM * 4)
    assert np.asarray(table).shape == (4, DIM)
    table.lookup(["more"], create=True)
    for each in (table, table.rows):
        with pytest.raises(ValueError, match=r"too much to become an array unasked; use lookup\(\)"):
            np.asarray(each)


@pytest.mark.parametrize("key_type", ["int64", "string"])
def test_each_distinct_key_once(store, key_type):
    table = new_table(store, key_type=key_type, initializer=Uniform(-1, 1, seed=1))
    keys = np.array([[7, 5], [7, 9]]) if key_type == "int64" else [["b", "a"], ["b", "c"]]
    with pytest.raises(UnknownKeyError):
        table.lookup_unique(keys)
    assert len(table) == 0
    rows, unique_keys, inverse = table.lookup_unique(keys, create=True)
    assert unique_keys.tolist() == list(table)
    assert_same_bits(rows[inverse], table.lookup(keys))
    assert unique_keys[inverse].tolist() == np.asarray(keys).tolist()


def test_the_optimizer_of_a_table_by_key_can_change(store):
    table = new_table(store, optimizer=SGD(lr=1.0))
    table.update(["to"], ones(1), create=True)
    table.set_optimizer(SGD(lr=3.0))
    table.update(["to"], ones(1))
    assert table["to"].tolist() == [-4.0] * DIM
    assert table.optimizer == SGD(lr=3.0)


def test_a_notebook_shows_the_rows_that_were_given_out(store):
    table = new_table(store)
    table.lookup(WORDS, create=True)
    assert "<td>4</td>" in table._repr_html_()
    assert "<td>64</td>" in table.rows._repr_html_()


# ---- changes that create keys ----------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["update", "write"])
def test_a_change_may_create_keys(store, change):
    table = new_table(store, optimizer=SGD(lr=1.0), reserved=1)
    getattr(table, change)([["a"], ["b"]], ones(2, 1), create=True)
    assert table.vocabulary.lookup(["a", "b"]).tolist() == [1, 2]
    assert table.lookup(["a", "b"]).tolist() == [[-1.0 if change == "update" else 1.0] * DIM] * 2
    for bad in (ones(1), np.full((2, DIM), np.nan), "text"):
        with pytest.raises((TypeError, ValueError)):
            getattr(table, change)(["c", "d"], bad, create=True)
    with pytest.raises(RowIdError):
        getattr(table, change)(["c"], ones(1), create=True, missing=-5)
    assert list(table) == ["a", "b"]


def test_keys_that_are_not_admitted_yet_are_missing(store):
    table = new_table(store, optimizer=SGD(lr=1.0), admission=shardemb.Admission(after=2))
    with pytest.raises(UnknownKeyError):
        table.update(["a"], ones(1), create=True)
    table.update(["a", "b"], ones(2), create=True, missing="skip")
    assert list(table) == ["a"]
    assert table["a"].tolist() == [-1.0] * DIM


def test_what_is_skipped_may_be_anything(store):
    table = new_table(store, optimizer=SGD(lr=1.0))
    table.update(["a"], ones(1), create=True)
    values = ones(2)
    values[1] = np.nan
    table.update(["a", "b"], values, missing="skip")
    with pytest.raises(ValueError, match="nan"):
        table.update(["a", "a"], values, missing="skip")
    with pytest.raises(ValueError, match="nan"):
        store.update({"t": (["a", "a"], values)}, missing="skip")
    store.update({"t": (["a", "b"], values)}, missing="skip")
    assert table["a"].tolist() == [-3.0] * DIM


def test_writes_count_as_changes(store):
    table = new_table(store, optimizer=SGD(lr=1.0), counters=True)
    table.update(["a", "b"], ones(2), create=True)
    table.update(["b"], ones(1))
    table.write(["a", "a", "c"], ones(3), create=True)
    assert table.state("count", ["a", "b", "c"]).tolist() == [3, 2, 1]
    assert table.state("last_step", ["a", "b", "c"]).tolist() == [2, 2, 2]
    table.update(["b"], ones(1))
    assert table.evict(older_than=1).tolist() == ["a", "c"]


# ---- many tables in one call -----------------------------------------------------------------------------------


def features(store, count=26):
    for number in range(count):
        key_type = "int64" if number % 2 else "string"
        store.create_vocabulary(f"f{number}", key_type=key_type)
        store.create_table(f"f{number}", vocabulary=f"f{number}", embedding_dim=2, optimizer=SGD(lr=1.0))
    return {f"f{number}": [number, 70] if number % 2 else [f"{number}", "70"] for number in range(count)}


def test_features_of_a_recommender_in_one_call(store):
    keys = features(store)
    store.create_table("plain", num_embeddings=5, embedding_dim=3)
    rows = store.lookup(keys | {"plain": [1]}, create=True)
    assert list(rows) == [*keys, "plain"]
    assert all(rows[name].tolist() == [[0, 0], [0, 0]] for name in keys)
    store.update({name: (some, np.ones((2, 2))) for name, some in keys.items()})
    others = {name: some[:1] * 2 for name, some in keys.items()}
    assert all((each == -1).all() for each in store.lookup(others).values())
    new = {name: ["new"] if isinstance(some[0], str) else [-1] for name, some in keys.items()}
    with pytest.raises(UnknownKeyError, match="create=True"):
        store.lookup(new)
    assert all((each == 0).all() for each in store.lookup(new, missing="zeros").values())
    assert all((each == -1).all() for each in store.lookup(new, missing=0).values())
    store.update({name: (some, np.ones((1, 2))) for name, some in new.items()}, missing="skip")
    assert [len(each) for each in store.vocabularies.values()] == [2] * 26
    store.update({name: (some, np.ones((1, 2))) for name, some in new.items()}, create=True)
    assert [len(each) for each in store.vocabularies.values()] == [3] * 26


def test_if_any_of_many_tables_is_given_nonsense_no_key_is_added(store):
    keys = features(store, 3)
    store.create_table("plain", num_embeddings=5, embedding_dim=2, optimizer=SGD(lr=1.0))
    for bad in ({"f2": [None]}, {"f2": [1.5]}, {"plain": [99]}, {"nothing": [1]}):
        with pytest.raises((TypeError, ValueError, LookupError)):
            store.lookup(keys | bad, create=True)
        with pytest.raises((TypeError, ValueError, LookupError)):
            store.update({n: (k, np.ones((len(k), 2))) for n, k in (keys | bad).items()}, create=True)
    with pytest.raises(RowIdError):
        store.lookup(keys, create=True, missing=3)
    for bad in (np.ones((2, 3)), np.full((2, 2), np.inf)):
        with pytest.raises(ValueError, match="table 'f2'"):
            store.update(
                {n: (k, bad if n == "f2" else np.ones((2, 2))) for n, k in keys.items()}, create=True
            )
    assert [len(each) for each in store.vocabularies.values()] == [0, 0, 0]
    assert not any(table.step for table in store.values())


# ---- rows that are there when a table is created ---------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, Adagrad(initial_accumulator_value=0.5)])
@pytest.mark.parametrize("given", ["array", "function"])
def test_an_array_gives_the_rows_of_the_keys_that_are_there(path, optimizer, given):
    rows = np.arange(100 * DIM, dtype=np.float32).reshape(100, DIM)
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="int64", reserved=1).add(np.arange(99) + 1000)
        table = store.create_table(
            "t",
            vocabulary="v",
            embedding_dim=DIM,
            rows_per_shard=64,
            initializer=rows if given == "array" else lambda start, stop: rows[start:stop],
            optimizer=optimizer,
        )
        assert table.rows.stats()["rows_written"] == (100 if optimizer else 128)
        assert_same_bits(np.asarray(table), rows[1:])
        table.lookup([5], create=True)
        store.commit()
    with shardemb.open(path, mode="r") as store:
        table = store["t"]
        assert store.verify() == []
        assert_same_bits(table.rows.lookup(range(100)), rows)
        assert table[5].tolist() == [0.0] * DIM
        if optimizer:
            assert (table.state("sum", [5, 1000]) == 0.5).all()


def test_an_array_of_another_length_than_the_vocabulary_is_refused(store):
    store.create_vocabulary("v", key_type="int64").add([1, 2, 3])
    with pytest.raises(ValueError, match=r"has shape \(4, 4\), but the table has .* = \(3, 4\)"):
        store.create_table("t", vocabulary="v", embedding_dim=DIM, initializer=ones(4))
    assert list(store) == []


# ---- odds and ends of several tables ---------------------------------------------------------------------------


def test_values_are_checked_before_a_key_is_added(store):
    tables = []
    for name in "ab":
        store.create_vocabulary(name, key_type="int64")
        tables.append(store.create_table(name, vocabulary=name, embedding_dim=2, optimizer=SGD(lr=1.0)))
    good, bad = np.ones((1, 2), np.float32), np.full((1, 2), np.nan, np.float32)
    for missing in ("error", "skip"):
        with pytest.raises(ValueError, match="finite|NaN"):
            store.update({"a": ([1], good), "b": ([2], bad)}, create=True, missing=missing)
        assert [len(each) for each in tables] == [0, 0]


def test_neither_table_nor_vocabulary_can_be_pickled_and_both_say_so(store):
    store.create_vocabulary("v", key_type="int64")
    table = store.create_table("t", vocabulary="v", embedding_dim=2)
    for each in (table, table.vocabulary):
        with pytest.raises(TypeError, match=r"cannot be pickled: it is memory of this process"):
            pickle.dumps(each)


@pytest.mark.parametrize("several", [[1], (1,), np.array([1])])
def test_one_key_is_looked_for_with_in(store, several):
    store.create_vocabulary("v", key_type="int64").add([1])
    table = store.create_table("t", vocabulary="v", embedding_dim=2)
    assert 1 in table
    with pytest.raises(TypeError, match="takes one key"):
        several in table  # noqa: B015
