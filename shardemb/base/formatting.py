"""Counts and sizes as people read them."""

from __future__ import annotations


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: ``1 shard``, ``1,024 shards``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(nbytes: float) -> str:
    """Format a number of bytes.

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
