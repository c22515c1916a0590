"""The loops over the keys of rows, against plain Python."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardemb.vocabulary import key_kernels, key_records

# Few different bytes and many lengths, so that some are equal and some have a common beginning.
texts = st.text("ab\0", max_size=6).map(str.encode) | st.binary(max_size=20)
integers = st.sampled_from([0, 1, -1, 2**32, 2**63 - 1, -(2**63)])


def flat(strings):
    """Return the bounds and the bytes of contiguous strings."""
    return np.cumsum([0, *map(len, strings)]), np.frombuffer(b"".join(strings), np.uint8).copy()


def scattered(strings, gap=3):
    """Return where strings begin that have gaps between them, and memory for them. Nothing may write to the gaps."""
    begins = np.array([gap + sum(map(len, strings[:i])) + gap * i for i in range(len(strings))], np.int64)
    return begins, np.full(sum(map(len, strings)) + gap * (len(strings) + 1), 0xEE, np.uint8)


def candidates(kind):
    """Draw what a row holds (or None), the key that it is compared with, and whether there is such a row."""
    return st.lists(st.tuples(st.none() | kind, kind, st.booleans()), max_size=20)


def assert_drops(drop, batch, same):
    """Assert that `drop` keeps the rows that hold the given key, and notes those that do not."""
    rows = np.where([there for *_, there in batch], np.arange(len(batch)) + 5, -1).astype(np.int64)
    dropped = np.zeros(rows.size, np.bool_)
    count = drop(rows, dropped)
    kept = [there and same(held, key) for held, key, there in batch]
    assert rows.tolist() == [at + 5 if each else -1 for at, each in enumerate(kept)]
    assert dropped.tolist() == [there and not each for (*_, there), each in zip(batch, kept, strict=True)]
    assert count == dropped.sum()


@given(candidates(integers))
def test_integers_are_compared_whole(batch):
    words = key_records.integer_records(np.array([held or 0 for held, *_ in batch], np.int64))
    words[[held is None for held, *_ in batch]] = 0
    keys = np.array([key for _, key, _ in batch], np.int64)
    assert_drops(
        lambda rows, dropped: key_kernels.match_integers(words, keys, rows, dropped),
        batch,
        lambda held, key: held is not None and held == key,
    )


def weak_hash(text):
    return (text[0] % 16 if text else 0) << 60


@given(candidates(texts))
def test_strings_are_compared_by_hash_and_length_first(batch):
    held = [each or b"" for each, *_ in batch]
    lengths = np.array([len(each) for each in held], np.int64)
    hashes = np.array([weak_hash(each) for each in held], np.uint64)
    words = key_records.string_records(hashes, np.full(len(batch), 2**40), lengths, lengths)
    none = np.array([each is None for each, *_ in batch], np.bool_)
    words[none] = key_records.without_key(words[none])
    wanted = np.array([weak_hash(key) for _, key, _ in batch], np.uint64)
    sizes = np.array([len(key) for _, key, _ in batch], np.int64)
    assert_drops(
        lambda rows, dropped: key_kernels.match_hashes(words, wanted, sizes, rows, dropped),
        batch,
        lambda held, key: held is not None and (len(held), weak_hash(held)) == (len(key), weak_hash(key)),
    )


@given(st.lists(st.tuples(texts, st.none() | texts, st.booleans()), max_size=20))
def test_strings_of_one_length_are_compared_byte_by_byte(batch):
    """Only those that are asked for are compared; what the others hold is ignored."""
    cut = [
        (key if other is None else other[: len(key)].ljust(len(key), b"b"), key, there)
        for key, other, there in batch
    ]
    begins, cells = scattered([held for held, *_ in cut])
    for begin, (held, *_) in zip(begins.tolist(), cut, strict=True):
        cells[begin : begin + len(held)] = np.frombuffer(held, np.uint8)
    which = np.array([at for at, (*_, there) in enumerate(cut) if there], np.int64)
    offsets, data = flat([key for _, key, _ in cut])
    assert_drops(
        lambda rows, dropped: key_kernels.match_bytes(
            cells, begins[which], which, offsets, data, rows, dropped
        ),
        cut,
        lambda held, key: held == key,
    )


@given(st.lists(texts, max_size=20), st.data())
def test_strings_that_differ_from_their_leader_are_counted(strings, data):
    leader = np.array([data.draw(st.integers(0, at)) for at in range(len(strings))], np.int64)
    differ = [strings[first] != each for first, each in zip(leader.tolist(), strings, strict=True)]
    expected = np.where(differ, np.arange(leader.size), leader)
    assert key_kernels.detach_unequal(*flat(strings), leader) == sum(differ)
    assert leader.tolist() == expected.tolist()


@given(st.lists(texts, max_size=20))
def test_bytes_go_where_they_belong_and_come_back(strings):
    offsets, data = flat(strings)
    begins, cells = scattered(strings)
    key_kernels.place_bytes(cells, begins, offsets, data)
    inside = np.zeros(cells.size, np.bool_)
    for begin, each in zip(begins.tolist(), strings, strict=True):
        assert cells[begin : begin + len(each)].tobytes() == each
        inside[begin : begin + len(each)] = True
    assert (cells[~inside] == 0xEE).all()
    found = np.zeros_like(data)
    key_kernels.take_bytes(cells, begins, offsets, found)
    assert found.tobytes() == b"".join(strings)


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=6),
    st.lists(st.integers(0, 2**32), max_size=30),
    st.sampled_from([0, 2**32 - 3]),
)
def test_the_smallest_counters_of_a_key_are_raised(cells, occurrences, start):
    """A conservative update, as in its paper: counters below the least plus one are raised to it; none overflows."""
    occurrences = [each % len(cells) for each in occurrences]
    model, counts = [[start] * 4, [start] * 4], [0] * len(cells)
    for key in occurrences:
        least = min(model[row][column] for row, column in enumerate(cells[key]))
        count = min(least + 1, 2**32 - 1)
        for row, column in enumerate(cells[key]):
            model[row][column] = max(model[row][column], count)
        counts[key] = count
    counters, found = np.full(8, start, np.uint32), np.zeros(len(cells), np.uint32)
    key_kernels.count_seen(
        counters, np.array(cells) + np.array([0, 4]), np.array(occurrences, np.int64), found
    )
    assert counters.tolist() == [*model[0], *model[1]]
    assert found.tolist() == counts
