"""Records of keys, read and written word by word, as FORMAT.md describes them."""

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from shardemb.vocabulary import key_records

integers = st.sampled_from([0, 1, -1, 2**31, -(2**31), 2**32, 2**63 - 1, -(2**63)]) | st.integers(
    -(2**63), 2**63 - 1
)
strings = st.tuples(
    st.integers(0, 2**64 - 1), st.integers(0, 2**63 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)
)
LIVE = 1 << 31


def halves(number):
    """Return the two words of a 64-bit number, the lower one first."""
    return [number % 2**32, number % 2**64 >> 32]


def made(spans):
    columns = zip(*spans, strict=True) if spans else [[]] * 4
    hashes, *others = (np.array(column, kind) for column, kind in zip(columns, "Qqqq", strict=True))
    return key_records.string_records(hashes, *others)


@given(st.lists(integers))
def test_integers(keys):
    words = key_records.integer_records(np.array(keys, np.int64))
    assert words.dtype == np.uint32
    assert words.tolist() == [[*halves(key), LIVE] for key in keys]
    assert key_records.integers_of(words).tolist() == keys
    assert key_records.integers_of(np.repeat(words, 2, 0)[::2]).tolist() == keys
    assert key_records.are_live(words).tolist() == [True] * len(keys)
    gone = key_records.without_key(words)
    assert not gone.any()
    assert key_records.are_live(gone).tolist() == [False] * len(keys)
    assert key_records.integers_of(words).tolist() == keys  # the argument is unchanged


@given(st.lists(strings))
@example([(2**64 - 1, 2**63 - 1, 2**32 - 1, 2**32 - 1), (0, 0, 0, 0)])
def test_strings(spans):
    words = made(spans)
    assert words.tolist() == [
        [*halves(value), begin % 2**32, begin >> 32 | LIVE, length, capacity]
        for value, begin, length, capacity in spans
    ]
    assert key_records.hashes_of(words).tolist() == [value for value, *_ in spans]
    assert list(zip(*map(np.ndarray.tolist, key_records.spans_of(words)), strict=True)) == [
        span[1:] for span in spans
    ]
    assert key_records.are_live(words).tolist() == [True] * len(spans)


@given(st.lists(strings))
def test_a_string_that_is_removed_leaves_its_capacity(spans):
    words = made(spans)
    gone = key_records.without_key(words)
    assert key_records.are_live(gone).tolist() == [False] * len(spans)
    begins, lengths, capacities = key_records.spans_of(gone)
    assert list(zip(begins.tolist(), capacities.tolist(), strict=True)) == [
        (begin, capacity) for _, begin, _, capacity in spans
    ]
    assert not lengths.any()
    assert not key_records.hashes_of(gone).any()
    assert key_records.are_live(words).all()  # the argument is unchanged


def test_a_record_that_was_never_written_has_no_key():
    for width in (key_records.INTEGER_WORDS, key_records.STRING_WORDS):
        assert not key_records.are_live(np.zeros((3, width), np.uint32)).any()
