"""The page size, and rounding up to a multiple."""

from __future__ import annotations

PAGE = 4096
"""Bytes of a page: the unit in which the kernel reads, copies and drops memory, and to which shards are aligned."""


def round_up(value: int, multiple: int) -> int:
    """Round `value` up to a multiple of `multiple`."""
    return -(-value // multiple) * multiple
