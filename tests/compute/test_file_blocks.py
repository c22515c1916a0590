import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks


def int64(values):
    return np.array(values, np.int64).reshape(-1)


ROWS_PER_BLOCK = 8 * PAGE


def set_bits(words):
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


some_bits = st.sets(st.integers(0, 255))


@given(some_bits, st.integers(0, 6))
def test_patch_bits_sets_those_that_lie_in_the_blocks_given(bits, most):
    """There are bits in eight blocks, of which only some are in memory."""
    bits = sorted(bit * PAGE for bit in bits if bit < 64)
    blocks = sorted({bit // ROWS_PER_BLOCK for bit in bits})[:most]
    memory = np.zeros(len(blocks) * PAGE, np.uint8)
    file_blocks.patch_bits(int64(bits), int64(blocks), memory)
    expected = {
        blocks.index(bit // ROWS_PER_BLOCK) * ROWS_PER_BLOCK + bit % ROWS_PER_BLOCK
        for bit in bits
        if bit // ROWS_PER_BLOCK in blocks
    }
    assert set_bits(memory) == expected


some_ranges = st.lists(
    st.tuples(st.integers(0, 4 * ROWS_PER_BLOCK), st.integers(0, 2 * ROWS_PER_BLOCK)), max_size=3
)


@given(some_ranges, st.sets(st.integers(0, 6)).map(sorted))
def test_set_ranges_sets_exactly_the_bits_of_the_blocks_that_it_is_given(ranges, blocks):
    memory = np.zeros(len(blocks) * PAGE, np.uint8)
    ranges = [(start, start + length) for start, length in ranges if length]
    file_blocks.set_ranges(int64(ranges).reshape(-1, 2), int64(blocks), memory)
    expected = np.zeros(7 * ROWS_PER_BLOCK, np.bool_)
    for start, stop in ranges:
        expected[start:stop] = True
    held = expected.reshape(7, -1)[blocks].reshape(-1) if blocks else expected[:0]
    assert np.array_equal(np.unpackbits(memory, bitorder="little"), held)


some_blocks = st.sets(st.integers(0, 299), max_size=299)


@given(some_blocks, some_blocks, st.sampled_from([1, 4, 64]))
def test_widen_completes_windows_and_gaps_of_one_block(changed, data, window):
    has_data = np.zeros(300, np.bool_)
    has_data[list(data)] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_blocks, "WINDOW_BLOCKS", window)
        held, written = file_blocks.widen(int64(sorted(changed)), has_data)
    expected = changed | {each for each in data if {each - 1, each + 1} <= changed}
    expected_held = set()
    for start in range(0, 300, window):
        every = set(range(start, start + window))
        if 8 * len(every & changed) >= 3 * window:
            expected_held |= every
        if 4 * len(every & changed) >= 3 * window:
            expected |= every & (changed | data)
    assert held[written].tolist() == sorted(each for each in expected if each < 300)
    assert held.tolist() == sorted(each for each in expected | expected_held if each < 300)


def test_half_of_scattered_blocks_are_not_written_twice_over():
    """Half of the blocks change, at random: one in eight is alone between two of them."""
    changed = np.flatnonzero(np.random.default_rng(0).random(64_000) < 0.5)
    held, written = file_blocks.widen(changed, np.ones(64_000, np.bool_))
    assert 0.6 < written.sum() / 64_000 < 0.65
    assert held.size > 0.9 * 64_000
