import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shardemb import bitmaps
from shardemb.spec import PAGE, ROWS_PER_BLOCK


def int64(values):
    return np.array(values, np.int64).reshape(-1)


NUM_BLOCKS = 3
NUM_ROWS = NUM_BLOCKS * ROWS_PER_BLOCK

record_sizes = st.sampled_from([4, 12, 100, 256, 4092, 4096, 4100, 5000, 8192, 10_004])
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


def pages_of(rows, record_bytes):
    return {
        page
        for row in rows
        for page in range(row * record_bytes // PAGE, ((row + 1) * record_bytes - 1) // PAGE + 1)
    }


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


@given(some_rows, record_sizes)
def test_dirty_pages_are_the_pages_of_dirty_rows_in_runs_apart(rows, record_bytes):
    runs = bitmaps.dirty_pages(*marked(rows), record_bytes).tolist()
    assert {page for first, last in runs for page in range(first, last)} == pages_of(rows, record_bytes)
    assert all(first < last for first, last in runs)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(runs))


def test_dirty_pages_of_many_runs():
    rows = int64(range(0, NUM_ROWS, 3 * PAGE // 4))
    assert bitmaps.dirty_pages(*marked(rows), 4).tolist() == [[3 * k, 3 * k + 1] for k in range(len(rows))]


@given(some_rows, some_rows, record_sizes)
def test_mark_private_counts_pages_that_were_none_before(first, second, record_bytes):
    private = np.zeros(NUM_ROWS * record_bytes // PAGE // 64 + 1, np.uint64)
    before = pages_of(first, record_bytes)
    assert bitmaps.mark_private(int64(first), record_bytes, private) == len(before)
    both = before | pages_of(second, record_bytes)
    assert bitmaps.mark_private(int64(second), record_bytes, private) == len(both) - len(before)
    assert set_bits(private) == both


some_bits = st.sets(st.integers(0, 255))


def words_of(bits):
    return np.packbits([bit in bits for bit in range(256)], bitorder="little").view(np.uint64)


@given(some_bits, some_bits)
def test_clear_bits_clears_and_counts(bits, some):
    words = words_of(bits)
    assert bitmaps.clear_bits(words, int64(sorted(some))) == len(bits & some)
    assert set_bits(words) == bits - some


@given(some_bits, some_bits, some_bits)
def test_idle_pages_are_held_for_no_reason(held, newer, folding):
    pages = bitmaps.idle_pages(*map(words_of, (held, newer, folding)))
    assert pages.tolist() == sorted(held - newer - folding)


@given(some_bits, st.integers(0, 255), st.integers(0, 300))
def test_list_bits_lists_the_first_ones(bits, start, most):
    assert (
        bitmaps.list_bits(words_of(bits), start, most).tolist()
        == sorted(b for b in bits if b >= start)[:most]
    )


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
def test_set_runs_and_set_present_set_bits(bits, others):
    words = words_of(bits)
    bitmaps.set_runs(
        words, np.array([[bit, min(bit + 3, 256)] for bit in sorted(others)], np.int64).reshape(-1, 2)
    )
    assert set_bits(words) == bits | {b for bit in others for b in range(bit, min(bit + 3, 256))}
    present = words_of(bits).view(np.uint8)
    bitmaps.set_present(present, int64([bit + 1000 for bit in others]), 1000)
    assert set_bits(present) == bits | others
