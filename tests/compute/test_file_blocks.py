import numpy as np
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
