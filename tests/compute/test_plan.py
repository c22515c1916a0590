import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardemb.compute import grouping, plan
from shardemb.compute.plan import Piece, align, cut, distinct, group, num_tasks


@st.composite
def batches(draw):
    """Ids in a table: hot rows, neighbours in one word, and rows far apart."""
    num_rows = draw(
        st.sampled_from([1, 64, 65, 1000, 10**6, 2**62])
    )  # in the last, ids take all bits of a word
    row = st.integers(0, num_rows - 1)
    near = st.integers(0, min(num_rows - 1, 200))
    hot = st.just(draw(row))
    return np.array(draw(st.lists(row | near | hot, max_size=80)), np.int64), num_rows


tasks = st.integers(1, 12)


# ---- group ------------------------------------------------------------------------------------------------------


@given(batches())
@example((np.array([], np.int64), 2**62))
def test_group_brings_equal_ids_together(batch):
    ids, num_rows = batch
    grouped = group(ids, num_rows)
    rows = np.unique(ids)
    np.testing.assert_array_equal(grouped.rows, rows)
    assert grouped.starts.tolist()[-1] == ids.size
    for k, row in enumerate(rows):
        positions = grouped.order[grouped.starts[k] : grouped.starts[k + 1]]
        np.testing.assert_array_equal(positions, np.flatnonzero(ids == row))
    assert {each.dtype for each in (grouped.rows, grouped.starts, grouped.order)} == {np.dtype(np.int64)}


@given(batches())
def test_distinct_is_np_unique(batch):
    ids, num_rows = batch
    for found, expected in zip(distinct(ids, num_rows), np.unique(ids, return_inverse=True), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.int64
        assert (
            found.base is None or found.base.nbytes == found.nbytes
        )  # a caller who keeps it keeps nothing else


@pytest.mark.parametrize("num_rows", [2**51, 2**51 + 1])  # 51 or 52 bits for the id, and 13 for the position
def test_words_are_taken_where_64_bits_hold_id_and_position(num_rows, monkeypatch):
    sort_rows, sorted_by_words = grouping.sort_rows, []
    monkeypatch.setattr(grouping, "sort_rows", lambda *args: sorted_by_words.append(1) or sort_rows(*args))
    ids = np.array([2**51 - 1, 0, 2**51 - 1, 7] * 2**11)
    grouped = group(ids, num_rows)
    assert grouped.rows.tolist() == [0, 7, 2**51 - 1]
    assert grouped.order[:3].tolist() == [1, 5, 9]
    assert bool(sorted_by_words) == (num_rows == 2**51)


# ---- cut --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), max_size=6), tasks)
def test_cut_covers_every_element_once_and_in_order(lengths, tasks):
    pieces = list(itertools.chain.from_iterable(cut(lengths, tasks)))
    covered = [(which, k) for which, start, stop in pieces for k in range(start, stop)]
    assert covered == [(which, k) for which, length in enumerate(lengths) for k in range(length)]


@given(st.lists(st.integers(0, 50), max_size=6), tasks)
def test_cut_makes_at_most_that_many_tasks_of_equal_size(lengths, tasks):
    stretches = cut(lengths, tasks)
    sizes = [sum(stop - start for _, start, stop in pieces) for pieces in stretches]
    assert len(sizes) == min(tasks, sum(lengths))
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert all(start < stop for pieces in stretches for _, start, stop in pieces)


def test_cut_of_a_table_that_is_small_next_to_another():
    assert cut([1, 0, 9], 2) == [[Piece(0, 0, 1), Piece(2, 0, 4)], [Piece(2, 4, 9)]]


# ---- align ------------------------------------------------------------------------------------------------------


def aligned(grouped, tasks):
    return [align(grouped, piece) for pieces in cut([grouped.order.size], tasks) for piece in pieces]


@given(batches(), tasks)
def test_every_row_is_in_exactly_one_task(batch, tasks):
    grouped = group(*batch)
    ranges = aligned(grouped, tasks)
    assert len(ranges) <= tasks
    assert [k for start, stop in ranges for k in range(start, stop)] == list(range(grouped.rows.size))


@given(batches(), tasks)
@example((np.array([63, 64, 64, 64, 128]), 1000), 5)
def test_no_task_has_much_more_than_its_share(batch, tasks):
    """It exceeds its share only by the row at the end of it, which cannot be divided."""
    grouped = group(*batch)
    share = -(-grouped.order.size // tasks)
    work = np.diff(grouped.starts)
    for start, stop in aligned(grouped, tasks):
        assert work[start:stop].sum() <= share + work[max(start, stop - 1) : stop].sum()


def test_rows_are_divided_evenly():
    grouped = group(np.arange(1000), 1000)
    assert aligned(grouped, 4) == [(0, 250), (250, 500), (500, 750), (750, 1000)]


# ---- num_tasks --------------------------------------------------------------------------------------------------


def test_a_small_batch_is_one_task_and_no_batch_more_than_two_a_core():
    assert num_tasks(0, 4) == 1
    assert num_tasks(2 * plan.TASK_BYTES - 1, 4) == 1
    assert num_tasks(2 * plan.TASK_BYTES, 4) == 2
    assert num_tasks(2**60, 4) == 8
    assert num_tasks(2**60, 1) == 2


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
def test_cores_share_a_batch_evenly(cores):
    found = [num_tasks(k * plan.TASK_BYTES, cores) for k in range(5 * cores)]
    assert set(found) == {*range(1, cores + 1), 2 * cores}
    assert found == sorted(found)


@pytest.mark.parametrize("count", [0, 1, 10**6])
def test_a_plan_of_any_size_has_no_more_parts_than_tasks(count):
    assert len(cut([count], 8)) <= 8


def test_group_also_works_if_row_and_position_do_not_fit_in_a_word():
    ids = np.array([2**62 - 1, 5, 2**62 - 1, 0], np.int64)
    grouped = group(ids, 2**62)
    assert grouped.rows.tolist() == [0, 5, 2**62 - 1]
    assert grouped.starts.tolist() == [0, 1, 2, 4]
    assert grouped.order.tolist() == [3, 1, 0, 2]
