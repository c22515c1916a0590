"""The loops of the index against lists and dicts, with hashes that are random, equal, extreme, or clustered."""

from bisect import bisect_left, bisect_right

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.index_pairs import LAST, bucket_in, first_bits, level

from shardemb.vocabulary import index_kernels

PLAIN, SALTED = np.uint64(0), np.uint64(0x123456789ABCDEF1)
NO_LEVEL = np.zeros((1, 4), np.int64), np.empty((0, 2), np.uint64), 0

few = st.sampled_from([0, 1, 5 << 60, (5 << 60) + 1, LAST - 1, LAST])
at_the_end = st.integers(LAST - 2**40, LAST)  # their buckets are the last ones, so that they wrap around
hashes_ = few | at_the_end | st.integers(0, LAST)
pairs_ = st.lists(st.tuples(hashes_, st.integers(0, 9)), max_size=48)
salts = st.sampled_from([PLAIN, SALTED])


def uint64(values):
    return np.array(values, np.uint64).reshape(-1)


def empty(capacity):
    """Return the buckets of an empty table, and their filters."""
    return np.zeros((capacity, 2), np.uint64), np.zeros(capacity, np.uint8)


def filled(pairs, capacity=64, salt=PLAIN):
    table = empty(capacity)
    rows = np.array([row for _, row in pairs], np.int64)
    assert not insert(table, salt, uint64([value for value, _ in pairs]), rows).any()
    return table


def insert(table, salt, values, rows, first=0, last=None):
    left = np.zeros(values.size, np.bool_)
    index_kernels.insert(*table, salt, values, rows, left, first, table[1].size if last is None else last)
    return left


def probe(table, hashes, skip=0, end=2**62, salt=PLAIN, level=NO_LEVEL, start=0, stop=None):
    out = np.full(len(hashes), -7, np.int64)
    stop = len(hashes) if stop is None else stop
    index_kernels.probe(*table, salt, *level, uint64(hashes), skip, end, out, start, stop)
    return out.tolist()


def between(spans, entries, bits, first, last):
    out = np.full(2, -7)
    index_kernels.entries_between(spans, entries, bits, np.uint64(first), np.uint64(last), out)
    return tuple(out.tolist())


def all_rows(table, value, **options):
    """The rows of a hash, as `skip` lists them."""
    found = []
    while (row := probe(table, [value], len(found), **options)[0]) >= 0:
        found.append(row)
    assert row == -1
    return found


# ---- buckets ----------------------------------------------------------------------------------------------------


@given(st.lists(hashes_, min_size=1), st.integers(1, 2**31))
def test_buckets_ascend_with_hashes_and_lie_in_the_table(values, capacity):
    buckets = [index_kernels.bucket_of(np.uint64(value), capacity, PLAIN) for value in sorted(values)]
    assert buckets == [(value >> 32) * capacity >> 32 for value in sorted(values)]
    assert buckets == sorted(buckets)
    assert 0 <= buckets[0] <= buckets[-1] < capacity


def test_a_salt_spreads_hashes_that_begin_alike():
    values = [np.uint64((7 << 40) + n) for n in range(4096)]
    assert len({int(index_kernels.bucket_of(value, 64, PLAIN)) for value in values}) == 1
    buckets = [index_kernels.bucket_of(value, 64, SALTED) for value in values]
    assert np.bincount(buckets, minlength=64).min() > 64 - 5 * 8
    assert buckets != [index_kernels.bucket_of(value, 64, np.uint64(3)) for value in values]


# ---- the hash table ---------------------------------------------------------------------------------------------


@given(pairs_, salts, st.integers(0, 10))
@example([(LAST, row) for row in range(10)], PLAIN, 10)  # nine of ten wrap around to the beginning
def test_probe_lists_the_pairs_of_a_table_in_the_order_of_insertion(pairs, salt, end):
    table = filled(pairs, salt=salt)
    for value in {value for value, _ in pairs} | {0, LAST}:
        expected = [row for each, row in pairs if each == value and row < end]
        assert all_rows(table, value, salt=salt, end=end) == expected


@given(pairs_, salts, st.integers(49, 300))
def test_a_rehashed_table_holds_the_same_pairs(pairs, salt, capacity):
    moved = empty(capacity)
    assert index_kernels.insert_all(*moved, salt, filled(pairs)[0])
    for value in {value for value, _ in pairs}:
        assert sorted(all_rows(moved, value, salt=salt)) == sorted(
            row for each, row in pairs if each == value
        )


def test_a_table_without_an_empty_bucket_is_searched_once_around():
    table = filled([(5 << 60, row) for row in range(16)], capacity=16)
    assert all_rows(table, 5 << 60) == list(range(16))
    assert all_rows(table, 0) == []


def test_only_a_range_of_the_hashes_is_looked_up():
    values = list(range(0, 2**63, 2**57))  # more than are prefetched ahead
    table = filled([(value, row) for row, value in enumerate(values)], capacity=128)
    assert probe(table, values, start=3, stop=50) == [-7] * 3 + list(range(3, 50)) + [-7] * 14
    assert probe(table, values) == list(range(64))


def test_pairs_that_would_lie_too_far_from_their_bucket_need_a_salt():
    far, capacity = index_kernels.MAX_DISTANCE, 8 * index_kernels.MAX_DISTANCE
    values, rows = uint64(range(2 * far)), np.arange(2 * far)
    table = empty(capacity)
    assert np.flatnonzero(insert(table, PLAIN, values, rows)).tolist() == list(range(far, 2 * far))
    assert probe(table, values.tolist()) == [*range(far), *[-1] * far]
    assert insert(table, PLAIN, values[far:], rows[far:]).all()
    salted = empty(capacity)
    assert index_kernels.insert_all(*salted, SALTED, table[0])
    assert not insert(salted, SALTED, values[far:], rows[far:]).any()
    assert probe(salted, values.tolist(), salt=SALTED) == rows.tolist()
    assert not index_kernels.insert_all(*empty(capacity), PLAIN, salted[0])


def test_random_hashes_never_lie_too_far_from_their_bucket():
    rng = np.random.default_rng(0)
    values = rng.integers(0, LAST, 1_500_000, np.uint64)
    table = empty(2_000_000)
    assert not insert(table, PLAIN, values, np.arange(values.size)).any()


@given(pairs_, salts, st.integers(48, 80), st.data())
@example([(LAST, row) for row in range(9)] + [(LAST // 2, 3)] * 9, PLAIN, 48, None)
def test_ranges_of_a_table_are_filled_separately_in_any_order(pairs, salt, capacity, data):
    """Pairs of other ranges, or that would lie beyond the range, are left out; in the end every pair is there."""
    middle = capacity // 2 if data is None else data.draw(st.integers(0, capacity))
    table, rows = empty(capacity), np.array([row for _, row in pairs], np.int64)
    values = uint64([value for value, _ in pairs])
    buckets = np.array([index_kernels.bucket_of(value, capacity, salt) for value in values], np.int64)
    beyond = np.zeros(len(pairs), np.bool_)
    for first, last in ((middle, capacity), (0, middle)):
        before = [each.copy() for each in table]
        left = insert(table, salt, values, rows, first, last)
        own = (buckets >= first) & (buckets < last)
        assert not left[~own].any()
        changed = np.flatnonzero((table[0] != before[0]).any(axis=1) | (table[1] != before[1]))
        assert ((changed >= first) & (changed < last)).all()
        assert np.count_nonzero(table[0][:, 1]) - np.count_nonzero(before[0][:, 1]) == (own & ~left).sum()
        beyond |= left
    assert not insert(table, salt, values[beyond], rows[beyond]).any()
    for value in {value for value, _ in pairs}:
        found = all_rows(table, value, salt=salt)
        assert sorted(found) == sorted(row for each, row in pairs if each == value)


@given(pairs_, salts, st.lists(hashes_, max_size=20))
def test_a_hash_that_its_filter_rules_out_is_not_in_the_table(pairs, salt, others):
    _, filters = filled(pairs, salt=salt)
    for value in uint64([value for value, _ in pairs] + others):
        marked = (
            filters[index_kernels.bucket_of(value, filters.size, salt)] & index_kernels._filter_bit(value)
            != 0
        )
        assert marked >= (int(value) in [each for each, _ in pairs])


def test_filters_let_few_other_hashes_pass():
    rng = np.random.default_rng(0)
    values, others = rng.integers(0, LAST, (2, 40_000), np.uint64)
    _, filters = filled([(int(value), 0) for value in values], capacity=64_000)
    marked = [
        filters[index_kernels.bucket_of(value, filters.size, PLAIN)] & index_kernels._filter_bit(value) != 0
        for value in others
    ]
    assert 0.05 < np.mean(marked) < 0.1


# ---- table and entries ------------------------------------------------------------------------------------------


deep_ = st.sets(st.integers(0, 31))


@given(pairs_, pairs_, st.integers(0, 6), st.integers(0, 10), deep_)
@example([], [(3, row) for row in range(40)], 4, 30, set())  # more in one bucket than are scanned one by one
@example([(3, 1)], [(LAST, row) for row in range(40)], 0, 40, set())
def test_pairs_in_memory_come_before_those_in_the_file(new, old, bits, end, deep):
    table, old = filled(new), sorted(set(old))
    found = level(old, bits, deep=deep)
    for value in {value for value, _ in new + old} | {0, 2, LAST}:
        expected = [[row for each, row in pairs if each == value and row < end] for pairs in (new, old)]
        assert all_rows(table, value, end=end, level=found) == expected[0] + expected[1]


@given(pairs_, st.integers(0, 6), hashes_, hashes_, st.floats(0.1, 1), deep_)
def test_entries_between_two_hashes_are_those_that_bisect_finds(pairs, bits, first, last, share, deep):
    spans, entries, _ = level(pairs, bits, share, deep)
    begin, _, end, own = spans[first_bits(first, bits)].tolist()
    low = first_bits(first, own) << 64 - own
    first, last = sorted([first, low | last % 2 ** (64 - own)])  # of one part
    values = entries[begin:end, 0].tolist()
    found = between(spans, entries, bits, first, last)
    assert found == (begin + bisect_left(values, first), begin + bisect_right(values, last))


@pytest.mark.parametrize("many", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 1000])
def test_clustered_hashes_are_found_by_bisection(many):
    """No hash gets lost at the edges of a step: each of them is looked up, and its neighbours."""
    pairs = [(3 * row, row) for row in range(many)]
    spans, entries, _ = level(pairs, 0)
    bounds = [between(spans, entries, 0, value, value) for value in range(3 * many)]
    assert bounds == [(-(-value // 3), value // 3 + 1) for value in range(3 * many)]
    found = probe(empty(16), range(3 * many), level=(spans, entries, 0))
    assert found == [-1 if value % 3 else value // 3 for value in range(3 * many)]


@given(pairs_, st.integers(0, 3), st.data())
def test_damaged_entries_lead_only_to_rows_of_the_same_part(pairs, bits, data):
    """Memory beyond the part belongs to others, or cannot be read at all."""
    spans, entries, _ = level(pairs, bits, deep=range(8))
    anywhere = st.integers(0, LAST)
    if entries.size:
        at = data.draw(st.integers(0, entries.size - 1))
        entries.reshape(-1)[at] = data.draw(anywhere)
    for value in range(0, 2**64, 2**61):
        begin, _, end, _ = spans[first_bits(value, bits)].tolist()
        own = entries[begin:end, 1].tolist()
        assert set(probe(empty(16), [value], level=(spans, entries, bits))) <= {-1, *own}
        low, high = between(spans, entries, bits, value, value)
        assert begin <= low <= end
        assert begin <= high <= end


def test_negative_rows_do_not_count():
    """They are gaps between pairs, or damage in the file."""
    entries = np.array([[9, LAST], [9, 2**63], [9, 4]], np.uint64)
    assert all_rows(empty(16), 9, level=(np.array([[0, 3, 3, 0]]), entries, 0)) == [4]


@given(st.lists(hashes_, max_size=200), st.integers(0, 4), deep_)
def test_buckets_among_entries_are_those_of_the_parts(values, bits, deep):
    spans = level([(value, 1) for value in values], bits, deep=deep)[0]
    found = np.empty(len(values), np.int64)
    index_kernels.entry_buckets(spans, bits, uint64(values), found)
    for value, at in zip(values, found.tolist(), strict=True):
        begin, buckets, end, own = spans[first_bits(value, bits)].tolist()
        assert at == min(begin + bucket_in(value, own, buckets), end - 1)


def test_few_pairs_lie_far_from_their_buckets():
    values = np.sort(np.random.default_rng(0).integers(0, LAST, 100_000, np.uint64))
    spans, entries, _ = level([(int(value), 1) for value in values], 3)
    buckets = np.empty(values.size, np.int64)
    index_kernels.entry_buckets(spans, 3, values, buckets)
    far = np.flatnonzero(entries[:, 1] == 1) - buckets
    assert far.min() == 0
    assert far.mean() < 2
    assert np.mean(far < index_kernels._SCANNED) > 0.97


# ---- merging ----------------------------------------------------------------------------------------------------


@given(pairs_, hashes_, hashes_)
@example([(LAST, row) for row in range(10)], 0, LAST)
@example([(LAST, row) for row in range(10)], 0, 5)  # pairs at the beginning of the table have wrapped around
def test_take_between_sorts_the_pairs_of_a_range(pairs, first, last):
    first, last = sorted([first, last])
    (table, _), bounds = filled(pairs), (np.uint64(first), np.uint64(last))
    expected = [pair for pair in pairs if first <= pair[0] <= last]
    assert index_kernels.count_between(table, *bounds) == len(expected)
    out = np.empty((len(expected), 2), np.uint64)
    index_kernels.take_between(table, *bounds, out)
    assert sorted(map(tuple, out.tolist())) == sorted(expected)
    assert out[:, 0].tolist() == sorted(out[:, 0].tolist())


@given(pairs_, st.integers(0, 6))
def test_adjacent_ranges_of_hashes_have_all_pairs_between_them(pairs, bits):
    table, _ = filled(pairs)
    found = [
        index_kernels.count_between(
            table, np.uint64(part << (64 - bits)), np.uint64(((part + 1) << (64 - bits)) - 1)
        )
        for part in range(2**bits)
    ]
    assert sum(found) == len(pairs)


@given(pairs_, pairs_, st.integers(0, 6), st.data())
def test_merge_makes_a_part_of_pairs_and_entries_each_pair_once(new, old, bits, data):
    number, old_bits = data.draw(st.integers(0, 2**bits - 1)), data.draw(st.integers(0, bits))
    new = sorted(new, key=lambda pair: pair[0])  # pairs of one hash stay in their order
    _, old_entries, _ = level(set(old), old_bits)
    first, last = number << (64 - bits), (number + 1 << 64 - bits) - 1
    own, others = (
        np.array([pair for pair in pairs if first <= pair[0] <= last], np.uint64).reshape(-1, 2)
        for pairs in (new, old_entries.tolist())
    )
    expected = {pair for pair in [*new, *old] if first <= pair[0] <= last}
    buckets = int(len(expected) / 0.75)
    out = np.full((buckets + own.shape[0] + others.shape[0] + index_kernels.SLACK, 2), 7, np.uint64)
    counts = np.full(2, -7)
    index_kernels.merge(own, others, np.uint64(first), bits, buckets, out, counts)
    stop, pairs = counts.tolist()
    spans, entries, _ = level(expected, bits, deep=range(64))
    begin, _, end, _ = spans[number].tolist()
    assert pairs == len(expected)
    assert out[:stop, 0].tolist() == entries[begin:end, 0].tolist()
    assert sorted(map(tuple, out[:stop].tolist())) == sorted(map(tuple, entries[begin:end].tolist()))


# ---- equal keys of a batch --------------------------------------------------------------------------------------


@given(st.lists(hashes_, max_size=60), salts)
def test_first_of_each_is_where_a_dict_has_it(values, salt):
    first = {}
    expected = [first.setdefault(value, at) for at, value in enumerate(values)]
    table = np.full(max(16, 2 * len(values)), -1)
    assert index_kernels.first_of_each(uint64(values), salt, table).tolist() == expected


@pytest.mark.parametrize("salt", [PLAIN, SALTED])
def test_first_of_each_wraps_around_at_the_end(salt):
    values = [LAST - n for n in range(16)]
    assert index_kernels.first_of_each(uint64(values), salt, np.full(16, -1)).tolist() == list(range(16))
