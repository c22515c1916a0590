"""How a key lies in the record of its row, in words of 32 bits.

Integers: the key in two words, then `LIVE`. Strings: their hash in two words, where their bytes begin among those of
all keys in two (with `LIVE` as the topmost bit), their length, and the bytes that are theirs. A row without a key has
none of the bits of `LIVE`; that of a string keeps its bytes, for the next key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

    Words = NDArray[np.uint32]

LIVE = np.uint32(1 << 31)
"""Bit of the word behind a key that says there is one."""

INTEGER_WORDS, STRING_WORDS = 3, 6
CELL_BYTES, CELL_COUNTERS = 64, 16
"""What a record of ``@bytes`` and of ``@sketch`` holds."""


def integer_records(keys: Int64Array) -> Words:
    """Make the records of integer keys."""
    words = np.empty((keys.size, INTEGER_WORDS), np.uint32)
    words[:, :2] = keys.view(np.uint32).reshape(-1, 2)
    words[:, 2] = LIVE
    return words


def string_records(
    hashes: NDArray[np.uint64], begins: Int64Array, lengths: Int64Array, capacities: Int64Array
) -> Words:
    """Make the records of strings."""
    words = np.empty((hashes.size, STRING_WORDS), np.uint32)
    words[:, :2] = hashes.view(np.uint32).reshape(-1, 2)
    words[:, 2:4] = begins.view(np.uint32).reshape(-1, 2)
    words[:, 3] |= LIVE
    words[:, 4], words[:, 5] = lengths, capacities
    return words


def without_key(words: Words) -> Words:
    """Return the records that rows have once their keys are gone."""
    words = words.copy()
    if words.shape[1] == INTEGER_WORDS:
        words[:] = 0
    else:
        words[:, :2], words[:, 4] = 0, 0
        words[:, 3] &= ~LIVE
    return words


def are_live(words: Words) -> NDArray[np.bool_]:
    """Tell which rows have a key."""
    mark = words[:, 2] if words.shape[1] == INTEGER_WORDS else words[:, 3]
    live: NDArray[np.bool_] = (mark & LIVE) != 0
    return live


def integers_of(words: Words) -> Int64Array:
    """Read integer keys out of their records."""
    return np.ascontiguousarray(words[:, :2]).view(np.int64).reshape(-1)


def hashes_of(words: Words) -> NDArray[np.uint64]:
    """Read the hashes of strings out of their records."""
    return np.ascontiguousarray(words[:, :2]).view(np.uint64).reshape(-1)


def spans_of(words: Words) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Read out of records where the bytes of strings begin, how many there are, and for how many there is room."""
    begins = words[:, 2:4].copy()  # that of a single record is contiguous as it is
    begins[:, 1] &= ~LIVE
    return begins.view(np.int64).reshape(-1), words[:, 4].astype(np.int64), words[:, 5].astype(np.int64)
