import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardemb import bitmaps
from shardemb.spec import PAGE, ROWS_PER_BLOCK


def int64(values):
    return np.array(values, np.int64).reshape(-1)


NUM_BLOCKS = 3
NUM_ROWS = NUM_BLOCKS * ROWS_PER_BLOCK

some_rows = st.lists(
    st.integers(0, NUM_ROWS - 1)
    | st.sampled_from([0, 63, 64, ROWS_PER_BLOCK - 1, ROWS_PER_BLOCK, 2 * ROWS_PER_BLOCK - 1, NUM_ROWS - 1])
    | st.integers(1000, 1100),
    max_size=60,
)


def marked(rows):
    dirty, blocks = np.zeros(NUM_ROWS // 64, np.uint64), np.zeros(NUM_BLOCKS, np.uint8)
    bitmaps.mark_dirty(int64(rows), dirty, blocks)
    return dirty, blocks


def set_bits(words):
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


@given(some_rows)
def test_changed_rows_are_marked_counted_listed_and_forgotten(rows):
    dirty, blocks = marked(rows)
    assert set_bits(dirty) == set(rows)
    assert set(np.flatnonzero(blocks).tolist()) == {row // ROWS_PER_BLOCK for row in rows}
    assert bitmaps.dirty_rows(dirty, blocks, len(set(rows))).tolist() == sorted(set(rows))
    assert bitmaps.mark_dirty(int64(rows), dirty, blocks) == 0
    fresh = np.zeros_like(dirty), np.zeros_like(blocks)
    assert bitmaps.mark_dirty(int64(rows), *fresh) == len(set(rows))
    bitmaps.clear_dirty(dirty, blocks)
    assert not dirty.any()
    assert not blocks.any()


some_bits = st.sets(st.integers(0, 255))


def words_of(bits):
    return np.packbits([bit in bits for bit in range(256)], bitorder="little").view(np.uint64)


@given(some_bits, st.integers(0, 6))
def test_patch_bits_sets_those_that_lie_in_the_blocks_given(bits, most):
    """Bits of eight blocks; of the blocks only some are in memory."""
    bits = sorted(bit * PAGE for bit in bits if bit < 64)
    blocks = sorted({bit // ROWS_PER_BLOCK for bit in bits})[:most]
    memory = np.zeros(len(blocks) * PAGE, np.uint8)
    bitmaps.patch_bits(int64(bits), int64(blocks), memory)
    expected = {
        blocks.index(bit // ROWS_PER_BLOCK) * ROWS_PER_BLOCK + bit % ROWS_PER_BLOCK
        for bit in bits
        if bit // ROWS_PER_BLOCK in blocks
    }
    assert set_bits(memory) == expected


@given(some_bits, some_bits)
def test_set_present_sets_bits(bits, others):
    present = words_of(bits).view(np.uint8)
    bitmaps.set_present(present, int64([bit + 1000 for bit in others]), 1000)
    assert set_bits(present) == bits | others
