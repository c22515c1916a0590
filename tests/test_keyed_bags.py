"""Bags of keys, and of several tables: the same as bags of the rows that the keys have."""

import numpy as np
import pytest
from support.model import assert_same_bits

import shardemb
from shardemb import Bags
from shardemb.errors import UnknownKeyError
from shardemb.initializers import Uniform
from shardemb.optim import SGD

DIM = 3
KEYS = {"int64": [10, -5, 7, 99], "string": ["a", "bc", "", "zz"]}


@pytest.fixture(params=list(KEYS))
def keys(request):
    """Four keys of one type; the last one never gets a row unless it is created."""
    return KEYS[request.param]


@pytest.fixture
def table(store, keys):
    """A table with rows for the first three keys."""
    kind = "string" if isinstance(keys[0], str) else "int64"
    store.create_vocabulary("v", key_type=kind, reserved=2)
    table = store.create_table(
        "t",
        vocabulary="v",
        embedding_dim=DIM,
        optimizer=SGD(lr=1.0),
        initializer=Uniform(-1, 1, seed=1),
        padding_idx=0,
    )
    table.vocabulary.add(keys[:3])
    return table


def bag(keys, *which):
    return [keys[i] for i in which]


def test_bags_of_keys_are_bags_of_their_rows(table, keys):
    given, offsets = bag(keys, 0, 1, 1, 2), [0, 3]
    ids = table.vocabulary.lookup(given)
    for mode in ("sum", "mean", "max", "sqrtn"):
        weights = None if mode == "max" else [1.0, 2.0, 3.0, 4.0]
        one = table.lookup_bag(given, offsets, mode=mode, weights=weights)
        assert_same_bits(one, table.rows.lookup_bag(ids, offsets, mode=mode, weights=weights))
        before, grads = table.lookup(given), np.random.default_rng(1).normal(size=(2, DIM))
        if mode != "max":
            gradient = table.bag_weight_gradient(given, offsets, grads, mode=mode, weights=weights)
            rows = table.rows.bag_weight_gradient(ids, offsets, grads, mode=mode, weights=weights)
            assert_same_bits(gradient, rows)
        table.update_bag(given, offsets, grads, mode=mode, weights=weights)
        by_key = table.lookup(given)
        table.write(given, before)
        table.rows.update_bag(ids, offsets, grads, mode=mode, weights=weights)
        assert_same_bits(by_key, table.lookup(given))
    np.testing.assert_array_equal(table.lookup_bag([given[:2], given[2:]]).shape, (2, DIM))


def test_keys_without_a_row_are_refused_zeros_initial_or_another_row(table, keys):
    given = bag(keys, 0, 3, 1)
    known = table.lookup(bag(keys, 0, 1))
    with pytest.raises(UnknownKeyError, match=r"at position 1 has no row.*missing="):
        table.lookup_bag(given, [0])
    zeros = table.lookup_bag(given, [0], mode="mean", missing="zeros")
    np.testing.assert_allclose(zeros[0], known.sum(axis=0) / 3, rtol=1e-6)
    initial = table.lookup(bag(keys, 3), missing="initial")
    assert initial.any()
    found = table.lookup_bag(given, [0], missing="initial")
    np.testing.assert_allclose(found[0], known.sum(axis=0) + initial[0], rtol=1e-6)
    # Row 0 is padding, which does not count.
    padded = table.lookup_bag(given, [0], mode="mean", missing=0)
    np.testing.assert_allclose(padded[0], known.mean(axis=0), rtol=1e-6)
    other = table.lookup_bag(given, [0], missing=1)
    np.testing.assert_allclose(other[0], known.sum(axis=0) + table.rows.lookup([1])[0], rtol=1e-6)
    assert table.vocabulary.lookup(bag(keys, 3)) == -1
    assert_same_bits(table.lookup_bag(given, [0], create=True)[0], table.lookup_bag(given, [0])[0])


def test_gradients_of_keys_without_a_row_are_dropped(table, keys):
    given, known = bag(keys, 0, 3, 1), bag(keys, 0, 1)
    before = table.lookup(known)
    with pytest.raises(UnknownKeyError):
        table.update_bag(given, [0], np.ones((1, DIM)))
    table.update_bag(given, [0], np.ones((1, DIM)), mode="mean", missing="skip")
    np.testing.assert_allclose(table.lookup(known), before - np.float32(1) / 3, rtol=1e-6)
    table.update_bag(given, [0], np.ones((1, DIM)), create=True)
    assert table.vocabulary.lookup(bag(keys, 3)) >= 0
    table.write(known, -np.ones((2, DIM)))
    table.vocabulary.remove(bag(keys, 3))
    table.update_bag(given, [0], np.ones((1, DIM)), mode="max", missing="skip")  # the greatest are the zeros
    assert (table.lookup(known) == -1).all()


@pytest.mark.parametrize("mode", ["sum", "mean", "max", "sqrtn"])
def test_gradients_of_keys_without_a_row_reach_no_other_row(store, keys, mode):
    """Not even the first one, whose key is not in the bag, in a table without a row of padding."""
    store.create_vocabulary("v", key_type="string" if isinstance(keys[0], str) else "int64")
    table = store.create_table("t", vocabulary="v", embedding_dim=DIM, optimizer=SGD(lr=1.0))
    assert table.vocabulary.add(keys[:3]).tolist() == [0, 1, 2]
    table.write(keys[:3], np.ones((3, DIM), np.float32))
    table.update_bag(bag(keys, 3, 1, 3, 2), [0, 2], np.ones((2, DIM)), mode=mode, missing="skip")
    changed = (table.lookup(keys[:3]) != 1).any(axis=1)
    assert changed.tolist() == [False, True, True]


def test_a_key_may_be_padding(table, keys):
    given = bag(keys, 0, 2, 1)
    found = table.lookup_bag(given, [0], mode="mean", padding_key=keys[2])
    np.testing.assert_allclose(found[0], table.lookup(bag(keys, 0, 1)).mean(axis=0), rtol=1e-6)
    with pytest.raises(UnknownKeyError):
        table.lookup_bag(given, [0], padding_key=keys[3])


def test_nothing_is_added_if_a_call_is_refused(table, keys):
    given = bag(keys, 0, 3)
    for wrong in (
        {"offsets": [1]},
        {"offsets": [0], "mode": "min"},
        {"offsets": [0], "weights": [1.0]},
        {"offsets": [0], "out": np.empty((2, DIM), np.float32)},
        {"offsets": [0], "missing": "nothing"},
    ):
        with pytest.raises(ValueError):
            table.lookup_bag(given, **wrong, create=True)
    for grads in (np.ones((2, DIM)), np.full((1, DIM), np.nan)):
        with pytest.raises(ValueError):
            table.update_bag(given, [0], grads, create=True)
    assert table.vocabulary.lookup(bag(keys, 3)) == -1
    assert table.step == 0


def test_keys_that_move_meanwhile_are_looked_up_again(store, table, keys):
    """A plan is made again if a key has lost its row since: the row may be another key's by now."""
    from shardemb import keyed_bags
    from shardemb.engine import batch

    given = Bags(bag(keys, 0, 1), [0], "max")
    checked = keyed_bags.CheckedChange.of(table._keyed, given, np.ones((1, DIM)), "skip", check_finite=True)
    change = checked.plan(create=False, scale_grad_by_freq=False)
    store.commit()
    table.vocabulary.remove(bag(keys, 0))
    freed = table.rows.lookup(np.arange(2, 5))
    batch.change(store._session.runtime, [change])
    row = int(table.vocabulary.lookup(bag(keys, 1))[0])
    expected = freed.copy()
    expected[row - 2] -= freed[row - 2] >= 0  # the other key counts as zeros now
    np.testing.assert_allclose(table.rows.lookup(np.arange(2, 5)), expected, rtol=1e-6)


# ---- several tables ---------------------------------------------------------------------------------------------


def test_several_tables_in_one_call_are_each_alone(store, table, keys):
    plain = store.create_table("plain", num_embeddings=20, embedding_dim=2, optimizer=SGD(lr=1.0))
    plain.write(np.arange(20), np.arange(40.0).reshape(20, 2))
    bags = {"plain": ([1, 2, 3], [0, 1]), "t": Bags([bag(keys, 0, 1)], mode="mean")}
    found = store.lookup_bag(bags)
    assert list(found) == ["plain", "t"]
    assert_same_bits(found["plain"], plain.lookup_bag([1, 2, 3], [0, 1]))
    assert_same_bits(found["t"], table.lookup_bag([bag(keys, 0, 1)], mode="mean"))
    assert_same_bits(
        store.lookup_bag({"plain": [[1, 2], [3, 4]]})["plain"], plain.lookup_bag([[1, 2], [3, 4]])
    )

    before = plain.lookup([1, 2, 3]), table.lookup(bag(keys, 0, 1))
    store.update_bag({"plain": (*bags["plain"], np.ones((2, 2))), "t": (bags["t"], np.ones((1, DIM)))})
    assert_same_bits(plain.lookup([1, 2, 3]), before[0] - 1)
    np.testing.assert_allclose(table.lookup(bag(keys, 0, 1)), before[1] - 0.5, rtol=1e-6)
    assert (plain.step, table.step) == (1, 1)
    assert store.lookup_bag({}) == {}
    store.update_bag({})


@pytest.mark.parametrize(
    ("wrong", "error", "match"),
    [
        (([1], [0], np.full((1, 2), np.nan)), ValueError, "nan"),
        (([20], [0], np.ones((1, 2))), shardemb.RowIdError, "past the end"),
        (([1], [0], np.ones((2, 2))), ValueError, r"shape \(2, 2\)"),
        (([1], [0, 9], np.ones((2, 2))), ValueError, "past the ids"),
        ([[1]], TypeError, "tuple of bags and gradients"),
    ],
)
def test_all_tables_change_or_none(store, table, keys, wrong, error, match):
    plain = store.create_table("plain", num_embeddings=20, embedding_dim=2, optimizer=SGD(lr=1.0))
    before = table.lookup(bag(keys, 0, 1))
    with pytest.raises(error, match=match):
        store.update_bag({"t": ([bag(keys, 0, 3)], np.ones((1, DIM))), "plain": wrong}, create=True)
    assert_same_bits(table.lookup(bag(keys, 0, 1)), before)
    assert (table.step, plain.step) == (0, 0)
    assert table.vocabulary.lookup(bag(keys, 3)) == -1


def test_padding_of_a_table_by_key_is_a_reserved_row(store):
    store.create_vocabulary("w", key_type="int64", reserved=1)
    for row in (1, -1):
        with pytest.raises(ValueError, match="rows that vocabulary 'w' reserves"):
            store.create_table("u", vocabulary="w", embedding_dim=2, padding_idx=row)
    assert "u" not in store


# ---- rows and bags in one step --------------------------------------------------------------------------------


def test_a_step_takes_gradients_of_rows_and_of_bags(store, table, keys):
    plain = {
        name: store.create_table(name, num_embeddings=9, embedding_dim=2, optimizer=SGD(lr=1.0))
        for name in ("rows", "bags")
    }
    given, before = bag(keys, 0, 1), table.lookup(bag(keys, 0, 1))
    norm = store.update(
        {
            "bags": (Bags([1, 2, 3], [0, 2], mode="mean"), [[2.0, 4.0], [1.0, 1.0]]),
            "t": (Bags([given]), np.ones((1, DIM))),
            "rows": ([4, 4], np.ones((2, 2))),
        },
        max_norm=1e9,
    )
    assert plain["bags"][1:4].tolist() == [[-1, -2], [-1, -2], [-1, -1]]
    assert plain["rows"][4:5].tolist() == [[-2, -2]]
    np.testing.assert_allclose(table.lookup(given), before - 1, rtol=1e-6)
    assert norm == pytest.approx(np.sqrt(5 + 5 + 2 + 4 + 4 + 2 * DIM))
    assert [each.step for each in (table, *plain.values())] == [1, 1, 1]
    assert table.store is table.rows.store is plain["rows"].store is store


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ((Bags([1], [1]), np.ones((1, 2))), ValueError),
        ((Bags([99], [0]), np.ones((1, 2))), shardemb.RowIdError),
        (([99], np.ones((1, 2))), shardemb.RowIdError),
        ((Bags([1], [0]), np.ones((2, 2))), ValueError),
        ((Bags([1], [0]), np.full((1, 2), np.nan)), ValueError),
    ],
)
def test_a_step_that_is_refused_adds_no_key(store, table, keys, wrong, error):
    store.create_table("plain", num_embeddings=9, embedding_dim=2, optimizer=SGD(lr=1.0))
    for batch in ((Bags([bag(keys, 3)]), np.ones((1, DIM))), (bag(keys, 3), np.ones((1, DIM)))):
        for batches in ({"t": batch, "plain": wrong}, {"plain": wrong, "t": batch}):
            with pytest.raises(error):
                store.update(batches, create=True)
    assert table.vocabulary.lookup(bag(keys, 3)) == -1
    assert table.step == 0
