"""Sizes of pages, the largest count, and rounding up to a multiple."""

from __future__ import annotations

import numpy as np

PAGE = 4096
"""Bytes of a page: the unit in which the kernel reads, copies and drops memory, and to which shards are aligned."""

HUGE_PAGE = 2 * 2**20
"""Bytes of a large page: the processor remembers where few pages are, and looks up those of random rows otherwise."""

MAX_COUNT = np.float32(2**24)
"""The most that anything is counted to in float32, which does not have the next whole number."""


def round_up(value: int, multiple: int) -> int:
    """Round `value` up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple
