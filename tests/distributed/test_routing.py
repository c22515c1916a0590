"""Where rows lie, against arithmetic on single ids."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardemb.compute import plan

pytest.importorskip("distributed.client", reason="distributed is not installed")

from shardemb.distributed.routing import Route, Summed, local_rows

IDS = st.lists(st.integers(0, 999), max_size=50).map(lambda ids: np.array(ids, np.int64))
PARTS = st.integers(1, 20)


@given(st.integers(0, 100), PARTS)
def test_all_rows_of_a_table_are_in_its_partitions(count, parts):
    assert sum(local_rows(count, part, parts) for part in range(parts)) == count


@given(IDS, PARTS)
def test_each_row_goes_to_its_partition_and_keeps_its_place_among_others(ids, parts):
    route = Route.of(ids, parts)
    for part in range(parts):
        here = slice(*route.bounds[part : part + 2])
        assert route.rows[here].tolist() == [int(each) // parts for each in ids if each % parts == part]
        assert route.order[here].tolist() == [k for k, each in enumerate(ids) if each % parts == part]


@given(IDS, PARTS, st.integers(1, 4))
def test_values_of_several_owners_come_back_in_the_order_of_the_batch(ids, parts, owners):
    route = Route.of(ids, parts)
    asked = [tuple(range(owner, parts, owners)) for owner in range(owners)]
    blocks = {}
    for some in asked:
        part_of = np.repeat(np.array(some, np.int64), route.counts(some))
        blocks[some] = route.rows[route.positions(some)] * parts + part_of
    assert route.gathered(blocks).tolist() == ids.tolist()


def test_rows_of_several_numbers_come_back_whole():
    route = Route.of(np.array([1, 0]), 2)
    blocks = {(0,): np.array([[1.0, 2.0]]), (1,): np.array([[3.0, 4.0]])}
    assert route.gathered(blocks).tolist() == [[3.0, 4.0], [1.0, 2.0]]


@given(IDS.filter(len))
def test_gradients_of_equal_ids_are_added_in_the_order_of_the_batch(ids):
    gradients = np.random.default_rng(7).normal(size=(ids.size, 3)).astype(np.float32)
    summed = Summed.of(plan.group(ids, 1000), gradients)
    assert summed.ids.tolist() == sorted(set(ids.tolist()))
    for row, found in zip(summed.ids, summed.gradients, strict=True):
        expected, *others = gradients[ids == row]
        for each in others:
            expected = expected + each
        assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("ids", [[3], [3, 3]])
def test_a_sum_of_negative_zeros_is_one(ids):
    gradients = np.full((len(ids), 1), -0.0, np.float32)
    assert np.signbit(Summed.of(plan.group(np.array(ids), 10), gradients).gradients).all()
