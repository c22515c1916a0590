"""The records of keys: how the key of a row is stored, in 32-bit words.

For an integer: the key in two words, then `LIVE`. For a string: its hash in two words; in two more, where its bytes
begin among those of all keys, with `LIVE` as the topmost bit; its length; and its capacity, the number of bytes that
belong to the row. `LIVE` is not set in the record of a row without a key. A row keeps its capacity when its string is
removed, for the next one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

    Words = NDArray[np.uint32]

LIVE = np.uint32(1 << 31)
"""The bit that says that a record has a key."""

INTEGER_WORDS, STRING_WORDS = 3, 6
CELL_BYTES, CELL_COUNTERS = 64, 16
"""How many bytes a record of ``@bytes`` has, and how many counters one of ``@sketch``."""


def integer_records(keys: Int64Array) -> Words:
    """Return the records of integer keys."""
    words = np.empty((keys.size, INTEGER_WORDS), np.uint32)
    words[:, :2] = keys.view(np.uint32).reshape(-1, 2)
    words[:, 2] = LIVE
    return words


def string_records(
    hashes: NDArray[np.uint64], begins: Int64Array, lengths: Int64Array, capacities: Int64Array
) -> Words:
    """Return the records of strings."""
    words = np.empty((hashes.size, STRING_WORDS), np.uint32)
    words[:, :2] = hashes.view(np.uint32).reshape(-1, 2)
    words[:, 2:4] = begins.view(np.uint32).reshape(-1, 2)
    words[:, 3] |= LIVE
    words[:, 4], words[:, 5] = lengths, capacities
    return words


def without_key(words: Words) -> Words:
    """Return what becomes of records when their keys are removed."""
    words = words.copy()
    if words.shape[1] == INTEGER_WORDS:
        words[:] = 0
    else:
        words[:, :2], words[:, 4] = 0, 0
        words[:, 3] &= ~LIVE
    return words


def are_live(words: Words) -> NDArray[np.bool_]:
    """Return which records have a key."""
    mark = words[:, 2] if words.shape[1] == INTEGER_WORDS else words[:, 3]
    live: NDArray[np.bool_] = (mark & LIVE) != 0
    return live


def have_equal_keys(words: Words, others: Words) -> NDArray[np.bool_]:
    """Return which records of keys have the same key as the other one, told by the hash and the length of a string."""
    told = [0, 1] if words.shape[1] == INTEGER_WORDS else [0, 1, 4]
    equal: NDArray[np.bool_] = (words[:, told] == others[:, told]).all(axis=1)
    return equal


def integers_of(words: Words) -> Int64Array:
    """Read the integer keys of records."""
    return np.ascontiguousarray(words[:, :2]).view(np.int64).reshape(-1)


def hashes_of(words: Words) -> NDArray[np.uint64]:
    """Read the hashes of the strings of records."""
    return np.ascontiguousarray(words[:, :2]).view(np.uint64).reshape(-1)


def lengths_of(words: Words) -> Int64Array:
    """Read from records how many bytes their keys have."""
    return np.full(len(words), 8) if words.shape[1] == INTEGER_WORDS else words[:, 4].astype(np.int64)


def spans_of(words: Words) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Read from the records of strings where their bytes begin, their lengths and their capacities."""
    begins = words[:, 2:4].copy()  # not np.ascontiguousarray, which returns a view of a single record
    begins[:, 1] &= ~LIVE
    return begins.view(np.int64).reshape(-1), words[:, 4].astype(np.int64), words[:, 5].astype(np.int64)
