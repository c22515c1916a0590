"""The loops of the index against lists and dicts: with hashes at random, all alike, at both ends, and far too close."""

from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shardemb import probing

LAST = 2**64 - 1
PLAIN, SALTED = np.uint64(0), np.uint64(0x123456789ABCDEF1)
NO_LEVEL = np.zeros(2, np.int64), np.empty((0, 2), np.uint64), 0

few = st.sampled_from([0, 1, 5 << 60, (5 << 60) + 1, LAST - 1, LAST])
at_the_end = st.integers(LAST - 2**40, LAST)  # their homes are the last slots, so that they go round
hashes_ = few | at_the_end | st.integers(0, LAST)
pairs_ = st.lists(st.tuples(hashes_, st.integers(0, 9)), max_size=48)
salts = st.sampled_from([PLAIN, SALTED])


def uint64(values):
    return np.array(values, np.uint64).reshape(-1)


def empty(capacity):
    """Slots and their marks."""
    return np.zeros((capacity, 2), np.uint64), np.zeros(capacity, np.uint8)


def filled(pairs, capacity=64, salt=PLAIN):
    slots = empty(capacity)
    rows = np.array([row for _, row in pairs], np.int64)
    assert probing.insert(*slots, salt, uint64([value for value, _ in pairs]), rows) == len(pairs)
    return slots


def level(pairs, bits):
    """Directory, entries and bits of pairs."""
    entries = np.array(sorted(pairs), np.uint64).reshape(-1, 2)
    firsts = [value >> (64 - bits) if bits else 0 for value, _ in sorted(pairs)]
    return np.array([bisect_left(firsts, bucket) for bucket in range(2**bits + 1)], np.int64), entries, bits


def probe(slots, hashes, skip=0, end=2**62, salt=PLAIN, level=NO_LEVEL, start=0, stop=None):
    out = np.full(len(hashes), -7, np.int64)
    stop = len(hashes) if stop is None else stop
    probing.probe(*slots, salt, *level, uint64(hashes), skip, end, out, start, stop)
    return out.tolist()


def all_rows(slots, value, **options):
    """The rows of a hash, as `skip` lists them."""
    found = []
    while (row := probe(slots, [value], len(found), **options)[0]) >= 0:
        found.append(row)
    assert row == -1
    return found


# ---- homes ------------------------------------------------------------------------------------------------------


@given(st.lists(hashes_, min_size=1), st.integers(1, 2**31))
def test_homes_ascend_with_hashes_and_lie_among_the_slots(values, capacity):
    homes = [probing.home(np.uint64(value), capacity, PLAIN) for value in sorted(values)]
    assert homes == [(value >> 32) * capacity >> 32 for value in sorted(values)]
    assert homes == sorted(homes)
    assert 0 <= homes[0] <= homes[-1] < capacity


def test_a_salt_spreads_hashes_that_begin_alike():
    values = [np.uint64((7 << 40) + n) for n in range(4096)]
    assert len({int(probing.home(value, 64, PLAIN)) for value in values}) == 1
    homes = [probing.home(value, 64, SALTED) for value in values]
    assert np.bincount(homes, minlength=64).min() > 64 - 5 * 8
    assert homes != [probing.home(value, 64, np.uint64(3)) for value in values]


# ---- slots ------------------------------------------------------------------------------------------------------


@given(pairs_, salts, st.integers(0, 10))
@example([(LAST, row) for row in range(10)], PLAIN, 10)  # nine of ten behind the end, at the beginning
def test_probe_lists_the_pairs_in_slots_as_they_came(pairs, salt, end):
    slots = filled(pairs, salt=salt)
    for value in {value for value, _ in pairs} | {0, LAST}:
        expected = [row for each, row in pairs if each == value and row < end]
        assert all_rows(slots, value, salt=salt, end=end) == expected


@given(pairs_, salts, st.integers(49, 300))
def test_other_slots_hold_the_same_pairs(pairs, salt, capacity):
    moved = empty(capacity)
    assert probing.insert_all(*moved, salt, filled(pairs)[0])
    for value in {value for value, _ in pairs}:
        assert sorted(all_rows(moved, value, salt=salt)) == sorted(
            row for each, row in pairs if each == value
        )


def test_slots_without_an_empty_one_are_searched_once_around():
    slots = filled([(5 << 60, row) for row in range(16)], capacity=16)
    assert all_rows(slots, 5 << 60) == list(range(16))
    assert all_rows(slots, 0) == []


def test_only_a_part_of_the_hashes_is_looked_up():
    values = list(range(0, 2**63, 2**57))  # more than are asked for at once
    slots = filled([(value, row) for row, value in enumerate(values)], capacity=128)
    assert probe(slots, values, start=3, stop=50) == [-7] * 3 + list(range(3, 50)) + [-7] * 14
    assert probe(slots, values) == list(range(64))


def test_where_a_pair_would_lie_too_far_nothing_is_put_without_a_salt():
    far, capacity = probing.FAR, 8 * probing.FAR
    values, rows = uint64(range(2 * far)), np.arange(2 * far)
    slots = empty(capacity)
    assert probing.insert(*slots, PLAIN, values, rows) == far
    assert probe(slots, values.tolist()) == [*range(far), *[-1] * far]
    assert probing.insert(*slots, PLAIN, values[far:], rows[far:]) == 0
    salted = empty(capacity)
    assert probing.insert_all(*salted, SALTED, slots[0])
    assert probing.insert(*salted, SALTED, values[far:], rows[far:]) == far
    assert probe(salted, values.tolist(), salt=SALTED) == rows.tolist()
    assert not probing.insert_all(*empty(capacity), PLAIN, salted[0])


def test_random_hashes_never_come_too_far():
    rng = np.random.default_rng(0)
    values = rng.integers(0, LAST, 1_500_000, np.uint64)
    slots = empty(2_000_000)
    assert probing.insert(*slots, PLAIN, values, np.arange(values.size)) == values.size


@given(pairs_, salts, st.lists(hashes_, max_size=20))
def test_a_hash_without_its_mark_is_in_no_slot(pairs, salt, others):
    _, marks = filled(pairs, salt=salt)
    for value in uint64([value for value, _ in pairs] + others):
        marked = marks[probing.home(value, marks.size, salt)] & probing._mark(value) != 0
        assert marked >= (int(value) in [each for each, _ in pairs])


def test_few_hashes_have_a_mark_that_is_not_theirs():
    rng = np.random.default_rng(0)
    values, others = rng.integers(0, LAST, (2, 40_000), np.uint64)
    _, marks = filled([(int(value), 0) for value in values], capacity=64_000)
    marked = [marks[probing.home(value, marks.size, PLAIN)] & probing._mark(value) != 0 for value in others]
    assert 0.05 < np.mean(marked) < 0.1


# ---- slots over entries -----------------------------------------------------------------------------------------


@given(pairs_, pairs_, st.integers(0, 6), st.integers(0, 10))
@example([], [(3, row) for row in range(40)], 4, 30)  # a bucket that is searched by halves
@example([(3, 1)], [(LAST, row) for row in range(40)], 0, 40)
def test_pairs_in_memory_come_before_those_in_the_file(new, old, bits, end):
    slots, old = filled(new), sorted(set(old))
    for value in {value for value, _ in new + old} | {0, 2, LAST}:
        expected = [[row for each, row in pairs if each == value and row < end] for pairs in (new, old)]
        assert all_rows(slots, value, end=end, level=level(old, bits)) == expected[0] + expected[1]


@given(pairs_, st.integers(0, 6), hashes_)
def test_lower_bound_is_bisect(pairs, bits, value):
    pairs = sorted(pairs)
    expected = bisect_left([each for each, _ in pairs], value)
    assert probing.lower_bound(*level(pairs, bits), np.uint64(value)) == expected


def test_a_bucket_of_many_is_searched_by_halves():
    """And nobody falls between them: each hash, and those beside it."""
    pairs = [(3 * row, row) for row in range(100)]
    found = [probing.lower_bound(*level(pairs, 0), np.uint64(value)) for value in range(300)]
    assert found == [-(-value // 3) for value in range(300)]
    found = probe(empty(16), range(300), level=level(pairs, 0))
    assert found == [-1 if value % 3 else value // 3 for value in range(300)]


@given(pairs_, st.integers(0, 3), st.data())
def test_a_damaged_directory_leads_nowhere_but_to_the_entries(pairs, bits, data):
    """Beyond them lies what can be told from them, and what cannot be read at all."""
    directory, entries, _ = level(pairs, bits)
    around = np.full((entries.shape[0] + 2, 2), 77, np.uint64)
    around[1:-1] = entries
    anywhere = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 50)
    at = data.draw(st.integers(0, directory.size - 1))
    directory[at] = data.draw(anywhere)
    found = probe(empty(16), [77, *range(0, 2**64, 2**61)], level=(directory, around[1:-1], bits))
    assert found[0] == -1 or 77 in entries[:, 0]
    assert set(found) <= {-1, *entries[:, 1].tolist()}
    for value in range(0, 2**64, 2**61):
        assert 0 <= probing.lower_bound(directory, around[1:-1], bits, np.uint64(value)) <= entries.shape[0]


def test_rows_that_are_none_do_not_count():
    """As damage in the file could make them."""
    entries = np.array([[9, LAST], [9, 2**63], [9, 4]], np.uint64)
    assert all_rows(empty(16), 9, level=(np.array([0, 3]), entries, 0)) == [4]


# ---- merging ----------------------------------------------------------------------------------------------------


@given(pairs_, hashes_, hashes_)
@example([(LAST, row) for row in range(10)], 0, LAST)
@example([(LAST, row) for row in range(10)], 0, 5)  # those at the beginning belong to the end
def test_take_between_sorts_the_pairs_of_a_range(pairs, first, last):
    first, last = sorted([first, last])
    (slots, _), bounds = filled(pairs), (np.uint64(first), np.uint64(last))
    expected = [pair for pair in pairs if first <= pair[0] <= last]
    assert probing.count_between(slots, *bounds) == len(expected)
    out = np.empty((len(expected), 2), np.uint64)
    probing.take_between(slots, *bounds, out)
    assert sorted(map(tuple, out.tolist())) == sorted(expected)
    assert out[:, 0].tolist() == sorted(out[:, 0].tolist())


@given(pairs_, st.integers(0, 6))
def test_ranges_side_by_side_share_out_all_pairs(pairs, bits):
    slots, _ = filled(pairs)
    found = [
        probing.count_between(
            slots, np.uint64(part << (64 - bits)), np.uint64(((part + 1) << (64 - bits)) - 1)
        )
        for part in range(2**bits)
    ]
    assert sum(found) == len(pairs)


@given(pairs_, pairs_, st.integers(1, 6), st.data())
def test_merge_takes_each_pair_once_and_counts_buckets(new, old, bits, data):
    """Of one half of the hashes, as of a part."""
    half = data.draw(st.integers(0, 1))
    new, old = ([pair for pair in pairs if pair[0] >> 63 == half] for pairs in (new, old))
    new, old = sorted(new, key=lambda pair: pair[0]), sorted(set(old))
    base = half << (bits - 1)
    counts, out = np.zeros(2 ** (bits - 1), np.int64), np.empty((len(new) + len(old), 2), np.uint64)
    made = [np.array(pairs, np.uint64).reshape(-1, 2) for pairs in (new, old)]
    total = probing.merge(*made, base, bits, counts, out)
    found = list(map(tuple, out[:total].tolist()))
    assert sorted(found) == sorted(set(new + old))
    assert [value for value, _ in found] == sorted(value for value, _ in found)
    assert counts.tolist() == [
        sum(value >> (64 - bits) == base + bucket for value, _ in found) for bucket in range(counts.size)
    ]


# ---- equal keys of a batch --------------------------------------------------------------------------------------


@given(st.lists(hashes_, max_size=60), salts)
def test_first_of_each_is_where_a_dict_has_it(values, salt):
    first = {}
    expected = [first.setdefault(value, at) for at, value in enumerate(values)]
    table = np.full(max(16, 2 * len(values)), -1)
    assert probing.first_of_each(uint64(values), salt, table).tolist() == expected


@pytest.mark.parametrize("salt", [PLAIN, SALTED])
def test_first_of_each_goes_round_at_the_end(salt):
    values = [LAST - n for n in range(16)]
    assert probing.first_of_each(uint64(values), salt, np.full(16, -1)).tolist() == list(range(16))
