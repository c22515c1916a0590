"""The kernels over bags, against plain NumPy: any piece of a batch does its part, whatever there is beside it."""

import numpy as np
import pytest
from support import bag_model
from support.model import assert_same_bits

from shardemb.compute import pooling

ROWS = 40
DIMS = [1, 16, 21, 64, 64 + 2 * 16 + 3]
"""Some have columns in wide and in narrow registers, and some in none."""

NOTHING = np.empty(0, np.float32)
NO_INDEX = *[np.empty(0, np.int32)] * 3, 0
NO_WINNERS = np.empty((0, 0), np.int32)


def batch(seed, dim, count=60, bags=17):
    rng = np.random.default_rng(seed)
    records = rng.normal(size=(ROWS, dim + 2)).astype(np.float32)
    ids = rng.integers(0, ROWS, count)
    bounds = np.sort(np.concatenate([[0, count], rng.integers(0, count + 1, bags - 1)]))
    return records, ids, bounds, rng.normal(size=count).astype(np.float32)


def pieces(rng, count):
    """Cut a range of positions anywhere, also within bags."""
    cuts = np.sort(np.concatenate([[0, count], rng.integers(0, count + 1, 6)]))
    return [(a, b) for a, b in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True) if a < b]


def bag_at(bounds, position):
    return int(np.searchsorted(bounds, position, "right")) - 1


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("mode", ["sum", "mean", "sqrtn"])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_are_those_of_a_loop_wherever_the_batch_is_cut(dim, mode, weighted):
    for seed in range(3):
        records, ids, bounds, weights = batch(seed, dim)
        given = weights if weighted else NOTHING
        divisors = NOTHING if mode == "sum" else pooling.divisors(given, bounds, mode == "sqrtn")
        out = np.zeros((bounds.size - 1, dim), np.float32)
        out[np.diff(bounds) > 0] = np.nan  # what was there is overwritten; empty bags are the caller's
        for start, stop in pieces(np.random.default_rng(seed), ids.size):
            pooling.add(records, ids[start:stop], given, bounds, divisors, out, bag_at(bounds, start), start)
        expected, _ = bag_model.pool(records[ids, :dim], ids, bounds, mode, weights if weighted else None)
        assert_same_bits(out, expected)


def test_a_sum_is_not_divided_by_zero():
    records, out = np.ones((3, 2), np.float32), np.empty((1, 2), np.float32)
    weights, bounds = np.array([1, -1], np.float32), np.array([0, 2])
    divisors = pooling.divisors(weights, bounds, False)
    pooling.add(records, np.array([0, 1]), weights, bounds, divisors, out, 0, 0)
    assert_same_bits(out, np.zeros((1, 2), np.float32))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("with_winners", [False, True])
def test_the_first_of_equal_maxima_wins_wherever_the_batch_is_cut(dim, with_winners):
    for seed in range(3):
        records, ids, bounds, _ = batch(seed, dim)
        records = np.round(records)  # many are equal
        out = np.zeros((bounds.size - 1, dim), np.float32)
        winners = np.full(out.shape, -1, np.int32) if with_winners else NO_WINNERS
        for start, stop in pieces(np.random.default_rng(seed), ids.size):
            pooling.maximise(records, ids[start:stop], bounds, out, winners, bag_at(bounds, start), start)
        expected, where = bag_model.pool(records[ids, :dim], ids, bounds, "max")
        assert_same_bits(out, expected)
        if with_winners:
            filled = np.diff(bounds) > 0
            np.testing.assert_array_equal((winners + bounds[:-1, np.newaxis])[filled], where[filled])


def test_it_is_said_where_rows_are_in_no_record():
    ids, none = np.array([3, 9, 1]), np.empty(0, np.uint8)
    assert pooling.locate(*NO_INDEX, none, ids, 1, 3).tolist() == [9, 1]
    present = np.array([0b00001010, 0b10], np.uint8)  # rows 1, 3 and 9
    assert pooling.locate(*NO_INDEX, present, ids, 0, 3).tolist() == [3, 9, 1]
    assert pooling.locate(*NO_INDEX, present, np.array([3, 4]), 0, 2).size == 0
    directory, branches, leaves = np.ones(1, np.int32), np.ones(32, np.int32), np.zeros(32, np.int32)
    leaves[16 + 4] = 7  # row 4 is in a slot, whatever the bit says
    assert pooling.locate(directory, branches, leaves, 100, present, np.array([3, 4]), 0, 2).tolist() == [
        3,
        106,
    ]
    leaves[16 + 4] = -7  # spilled
    assert pooling.locate(directory, branches, leaves, 100, none, np.array([3, 4]), 0, 2).size == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_a_row_gets_the_gradients_that_it_has_won(weighted):
    records, ids, bounds, weights = batch(1, 5)
    grads = np.random.default_rng(2).normal(size=(bounds.size - 1, 5)).astype(np.float32)
    _, where = bag_model.pool(records[ids, :5], ids, bounds, "max")
    bags = np.repeat(np.arange(bounds.size - 1), np.diff(bounds))
    order = np.argsort(ids, kind="stable")
    rows, starts = np.unique(ids[order], return_index=True)
    starts = np.append(starts, ids.size)
    winners = (where - bounds[:-1, np.newaxis]).astype(np.int32)
    out = np.empty((4, 5), np.float32)
    coefficients = weights if weighted else NOTHING
    begins, columns = np.zeros(ids.size + 2, np.int64), np.empty(winners.size, np.int32)
    pooling.list_won(winners, bounds, begins, columns)
    pooling.sum_won(grads, bags, coefficients, begins, columns, starts, order, out, 3, 7)
    given = weights if weighted else None
    expected = bag_model.row_gradients(ids, bounds, grads, "max", given, winners=where)
    np.testing.assert_allclose(out, [expected[int(row)] for row in rows[3:7]], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 7, 8, 19])
def test_products_are_those_of_rows_and_gradients(dim):
    rng = np.random.default_rng(dim)
    records, grads = (rng.normal(size=(9, dim)).astype(np.float32) for _ in range(2))
    bags, places, out = np.array([0, 0, 3, 8]), np.array([5, 5, 1]), np.full(4, np.nan, np.float32)
    pooling.dot(records, places, bags, grads, out, 1)
    assert np.isnan(out[0])
    np.testing.assert_allclose(out[1:], (records[places] * grads[bags[1:]]).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("squared", [False, True])
def test_weights_that_add_up_to_nothing_have_no_gradient(squared):
    """Their bag is zeros whatever its rows are; the bags beside it have theirs."""
    weights = np.array([0, 0, 1, 1] if squared else [1, -1, 1, 1], np.float32)
    bounds = np.array([0, 2, 4])
    products = np.array([3, 5, 3, 5], np.float32)
    pooling.weigh(products, weights, bounds, pooling.divisors(weights, bounds, squared), squared)
    divisor = 2**0.5 if squared else 2
    np.testing.assert_allclose(products, [0, 0, -1 / divisor, 1 / divisor], rtol=1e-6)
