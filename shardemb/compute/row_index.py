"""The index of rows in memory: from a row to the slot that holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.compute.intrinsics import prefetch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
from typing import TYPE_CHECKING

from shardemb.compute.compiler import inlined, kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array


NODE_BITS = 4
"""Entries of a node of the index of rows in memory, as a power of two: a node is one cache line."""

NODE = 1 << NODE_BITS


_WITHIN = (1 << NODE_BITS) - 1
"""The bits of a row that tell its place within a node."""

_AHEAD = 8
"""How many rows ahead `places_of` asks for the next level of the index."""


@inlined
def entry_of(
    directory: NDArray[np.int32], branches: NDArray[np.int32], leaves: NDArray[np.int32], row: int
) -> int:
    """Return what the index of rows in memory says of a row, 0 where it says nothing; see ``overlay.py``.

    Branch 0 and leaf 0 are never used and all zeros, so that nothing has to be asked on the way down.
    """
    branch = int(directory[row >> 2 * NODE_BITS]) << NODE_BITS
    leaf = int(branches[branch | ((row >> NODE_BITS) & _WITHIN)]) << NODE_BITS
    return int(leaves[leaf | (row & _WITHIN)])


@inlined
def place_of(
    directory: NDArray[np.int32], branches: NDArray[np.int32], leaves: NDArray[np.int32], first: int, row: int
) -> int:
    """Return the place of a row among the records: its own, in the files, or its slot's, which lie from `first` on.

    An empty directory says that all rows are in the files. A row that is in neither has a negative entry, and no place:
    -1.
    """
    if directory.size:
        entry = entry_of(directory, branches, leaves, row)
        if entry != 0:
            return first + entry - 1 if entry > 0 else -1
    return row


@kernel
def places_of(
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    first: int,
    ids: Int64Array,
    start: int,
    stop: int,
) -> Int64Array:
    """`place_of` each of ``ids[start:stop]``.

    No level of a large table's index is in the cache: each is asked for some rows before the next one needs it.
    """
    places = np.empty(stop - start, np.int64)
    if directory.size == 0:
        for i in range(start, stop):  # numba takes 1.7 s to compile what would copy a slice
            places[i - start] = ids[i]
        return places
    for i in range(start, stop):
        if i + 3 * _AHEAD < stop:
            prefetch(directory.ctypes.data + 4 * (ids[i + 3 * _AHEAD] >> 2 * NODE_BITS))
        if i + 2 * _AHEAD < stop:
            branch = int(directory[ids[i + 2 * _AHEAD] >> 2 * NODE_BITS]) << NODE_BITS
            prefetch(branches.ctypes.data + 4 * branch)
        if i + _AHEAD < stop:
            row = ids[i + _AHEAD]
            branch = int(directory[row >> 2 * NODE_BITS]) << NODE_BITS
            leaf = int(branches[branch | ((row >> NODE_BITS) & _WITHIN)]) << NODE_BITS
            prefetch(leaves.ctypes.data + 4 * leaf)
        places[i - start] = place_of(directory, branches, leaves, first, ids[i])
    return places


@kernel
def entries_of(
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    rows: Int64Array,
    entries: NDArray[np.int32],
) -> None:
    """`entry_of` each of the rows."""
    for i in range(rows.size):
        entries[i] = entry_of(directory, branches, leaves, rows[i])


@kernel
def _take_node(books: NDArray[np.int32]) -> int:
    if books[1]:
        books[1] -= 1
        return int(books[2 + books[1]])
    books[0] += 1
    return int(books[0])


@kernel
def _give_if_empty(node: int, entries: NDArray[np.int32], books: NDArray[np.int32]) -> bool:
    if entries[node << NODE_BITS : (node + 1) << NODE_BITS].any():
        return False
    books[2 + books[1]] = node
    books[1] += 1
    return True


@kernel
def set_entries(
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    branch_books: NDArray[np.int32],
    leaves: NDArray[np.int32],
    leaf_books: NDArray[np.int32],
    rows: Int64Array,
    entries: Int64Array,
) -> None:
    """Set the entries of rows, 0 to forget them. Branches and leaves that are empty then are free.

    From below, so that a lookup without the lock never follows a number before there is something behind it. One that
    meets a node which is used for other rows by now reads what is none of its own, and `Overlay.version` tells.
    """
    for i in range(rows.size):
        row, low = rows[i], NODE - 1
        branch = int(directory[row >> 2 * NODE_BITS])
        at = (row >> NODE_BITS) & low
        leaf = int(branches[(branch << NODE_BITS) | at])
        if entries[i] == 0 and leaf == 0:
            continue
        if leaf == 0:
            leaf = _take_node(leaf_books)
        leaves[(leaf << NODE_BITS) | (row & low)] = entries[i]
        if branch == 0:
            branch = _take_node(branch_books)
        branches[(branch << NODE_BITS) | at] = leaf
        directory[row >> 2 * NODE_BITS] = branch
        if entries[i] == 0 and _give_if_empty(leaf, leaves, leaf_books):
            branches[(branch << NODE_BITS) | at] = 0
            if _give_if_empty(branch, branches, branch_books):
                directory[row >> 2 * NODE_BITS] = 0
