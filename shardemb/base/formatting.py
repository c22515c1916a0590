"""Counts and sizes as a person reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def plural(count: int, noun: str) -> str:
    """Write a count and its noun: ``1 shard``, ``1,024 shards``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(nbytes: float) -> str:
    """Write a number of bytes.

    Examples
    --------
    >>> size(0), size(1536), size(204_800_000)
    ('0 B', '1.5 KiB', '195.3 MiB')
    """
    unit = 0
    while nbytes >= 1024 and unit < len(_UNITS) - 1:
        nbytes, unit = nbytes / 1024, unit + 1
    return f"{nbytes:.0f} B" if unit == 0 else f"{nbytes:.1f} {_UNITS[unit]}"


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
