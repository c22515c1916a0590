"""Half-open ranges of rows: ascending, apart from each other, none of them empty."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from shardemb.base.validation import Int64Array

Ranges = tuple[tuple[int, int], ...]


def united(ranges: Ranges, start: int, stop: int) -> Ranges:
    """Add a range.

    Examples
    --------
    >>> united(((0, 2), (5, 7)), 2, 6)
    ((0, 7),)
    """
    apart = [each for each in ranges if each[1] < start or each[0] > stop]
    near = [each for each in ranges if each not in apart]
    merged = (min([start, *(each[0] for each in near)]), max([stop, *(each[1] for each in near)]))
    return tuple(sorted([*apart, merged])) if start < stop else ranges


def without(ranges: Ranges, start: int, stop: int) -> Ranges:
    """Take a range away.

    Examples
    --------
    >>> without(((0, 7),), 2, 5)
    ((0, 2), (5, 7))
    """
    left = [
        piece for first, last in ranges for piece in ((first, min(last, start)), (max(first, stop), last))
    ]
    return tuple(piece for piece in left if piece[0] < piece[1])


def first_within(ranges: Ranges, rows: Int64Array) -> int | None:
    """Return the first of ascending rows that is in one of the ranges; None if there is none.

    Examples
    --------
    >>> first_within(((0, 2), (5, 7)), np.array([3, 6, 9]))
    6
    """
    for start, stop in ranges:
        at = int(np.searchsorted(rows, start))
        if at < rows.size and rows[at] < stop:
            return int(rows[at])
    return None
