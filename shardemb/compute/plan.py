"""From a batch of ids to pieces of work: pure data, computed before any I/O.

`group` puts equal ids together in ascending order, which is also the order of shards and pages. `cut` splits the work
of one or several tables into a given number of balanced tasks, never one task per shard or row. `align` moves the cuts
of a grouped batch so that two tasks never share a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb.compute import grouping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

TASK_BYTES = 4 * 2**20
"""Least work of a task, in bytes of records. A batch of less than two tasks runs in the calling thread.

Gathering this many bytes from memory takes 0.5 to 2 ms. Handing two tasks to dask takes 0.2-0.4 ms, and up to as much
again if the second core has to wake from sleep. ``benchmarks/tasks.py`` measures both sides.
"""


@dataclass(frozen=True)
class Grouped:
    """A batch whose equal ids are together.

    Attributes
    ----------
    rows : ndarray of int64, shape (u,)
        The distinct ids, ascending.
    starts : ndarray of int64, shape (u + 1,)
        ``order[starts[k]:starts[k + 1]]`` are the positions of ``rows[k]`` in the batch, ascending.
    order : ndarray of int64, shape (n,)
        All positions of the batch, grouped by row.
    """

    rows: Int64Array
    starts: Int64Array
    order: Int64Array

    def part(self, which: NDArray[np.bool_]) -> Grouped:
        """Return the same for some of the rows.

        Examples
        --------
        >>> group(np.array([7, 8, 7]), 10).part(np.array([True, False])).order.tolist()
        [0, 2]
        """
        counts = np.diff(self.starts)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts[which])])
        return Grouped(self.rows[which], starts, self.order[np.repeat(which, counts)])


class Piece(NamedTuple):
    """A half-open range of one of the sequences that `cut` was given."""

    which: int
    start: int
    stop: int


def group(ids: Int64Array, num_embeddings: int) -> Grouped:
    """Group equal ids; O(n) whatever the size of the table."""
    words = _sort(ids, num_embeddings)
    if words is None:  # a huge table: slower, and equally right
        order = np.argsort(ids, kind="stable")
        rows, starts = np.unique(ids[order], return_index=True)
        return Grouped(rows, np.append(starts, ids.size), order)
    rows, starts, order = np.empty_like(ids), np.empty(ids.size + 1, np.int64), np.empty_like(ids)
    count = grouping.list_groups(words, _position_bits(ids), rows, starts, order)
    return Grouped(rows[:count], starts[: count + 1], order)


def each_once(rows: Int64Array) -> Grouped:
    """Return a batch in which each of ascending rows occurs once.

    Examples
    --------
    >>> each_once(np.array([7, 9])).order.tolist()
    [0, 1]
    """
    numbers = np.arange(rows.size + 1)
    return Grouped(rows, numbers, numbers[:-1])


def distinct(ids: Int64Array, num_embeddings: int) -> tuple[Int64Array, Int64Array]:
    """Return the distinct ids, ascending, and for each position of the batch the index of its id; O(n) too."""
    words = _sort(ids, num_embeddings)
    if words is None:
        return np.unique(ids, return_inverse=True)
    rows, inverse = np.empty_like(ids), np.empty_like(ids)
    count = grouping.list_inverse(words, _position_bits(ids), rows, inverse)
    return rows[
        :count
    ].copy(), inverse  # a copy, so that a caller who keeps it does not keep the whole buffer


def _position_bits(ids: Int64Array) -> int:
    return max(ids.size - 1, 0).bit_length()


def _sort(ids: Int64Array, num_embeddings: int) -> NDArray[np.uint64] | None:
    """Return a batch as sorted words, or None if a word is too short for an id and a position."""
    low, high = _position_bits(ids), (num_embeddings - 1).bit_length()
    if low > grouping.POSITION_BITS or low + high > grouping.WORD_BITS:
        return None
    words: NDArray[np.uint64] = grouping.sort_rows(ids, low, high)
    return words


def num_tasks(nbytes: int, cores: int) -> int:
    """Return how many tasks a batch of that many bytes of records is worth: up to one per core, or two per core.

    Numbers in between would let some cores do twice as much as others. Two per core let other cores do part of the work
    of a core that is held up, which pays only if there is much work.

    Examples
    --------
    >>> [num_tasks(nbytes * 2**20, cores=2) for nbytes in (1, 8, 16, 32)]
    [1, 2, 2, 4]
    """
    worth = max(1, nbytes // TASK_BYTES)
    return 2 * cores if worth >= 4 * cores else min(worth, cores)


def cut(lengths: Sequence[int], tasks: int) -> list[list[Piece]]:
    """Cut sequences, laid end to end, into at most `tasks` stretches of equal length.

    Returns
    -------
    list of list of Piece
        The pieces of each task; empty pieces and empty tasks are left out.

    Examples
    --------
    >>> cut([3, 5], tasks=2)
    [[Piece(which=0, start=0, stop=3), Piece(which=1, start=0, stop=1)], [Piece(which=1, start=1, stop=5)]]
    """
    if tasks == 1:
        whole = [Piece(which, 0, length) for which, length in enumerate(lengths) if length]
        return [whole] if whole else []
    total = sum(lengths)
    stretches: list[list[Piece]] = []
    for task in range(tasks):
        # Both in terms of all sequences laid end to end.
        first, last = total * task // tasks, total * (task + 1) // tasks
        pieces, begin = [], 0
        for which, length in enumerate(lengths):
            start, stop = max(first - begin, 0), min(last - begin, length)
            if start < stop:
                pieces.append(Piece(which, start, stop))
            begin += length
        if pieces:
            stretches.append(pieces)
    return stretches


def align(grouped: Grouped, piece: Piece) -> tuple[int, int]:
    """Turn a piece of a grouped batch's positions into the range of its distinct rows that begin within the piece.

    Examples
    --------
    >>> grouped = group(np.array([7, 7, 7, 8]), 10)
    >>> align(grouped, Piece(0, 0, 2)), align(grouped, Piece(0, 2, 4))
    ((0, 1), (1, 2))
    """
    start, stop = np.searchsorted(grouped.starts, piece[1:]).tolist()
    return start, stop
