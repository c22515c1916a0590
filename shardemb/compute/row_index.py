"""The index of rows in memory: it leads from a row to the slot that holds it.

It is a tree of three levels. The directory has a number for every 256 rows, that of a branch; a branch has 16 numbers
of leaves; a leaf has 16 entries, one for each row. An entry is ``slot + 1`` for a slot in memory, ``-(slot + 1)`` for
one of the spill file, or 0 if the row is only in the files. ``memory/overlay.py`` owns the arrays.

A free list keeps track of the branches, and another one of the leaves. Its first number is how many were ever used, the
second how many of these are free now; the numbers of the free ones follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.compute.compiler import inlined, kernel
from shardemb.compute.intrinsics import prefetch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array


NODE_BITS = 4
"""Entries of a branch or leaf, as a power of two: a node is one cache line."""

NODE = 1 << NODE_BITS
"""Entries of a branch or leaf."""

_WITHIN = NODE - 1
"""The bits of a row that select its entry within a leaf."""

_AHEAD = 8
"""How many rows ahead of its use `places_of` prefetches a level of the index."""


@inlined
def entry_of(
    directory: NDArray[np.int32], branches: NDArray[np.int32], leaves: NDArray[np.int32], row: int
) -> int:
    """Return the index's entry of a row, 0 if it has none.

    Branch 0 and leaf 0 are never used and hold only zeros, so nothing has to be checked on the way down.
    """
    branch = int(directory[row >> 2 * NODE_BITS]) << NODE_BITS
    leaf = int(branches[branch | ((row >> NODE_BITS) & _WITHIN)]) << NODE_BITS
    return int(leaves[leaf | (row & _WITHIN)])


@inlined
def place_of(
    directory: NDArray[np.int32], branches: NDArray[np.int32], leaves: NDArray[np.int32], first: int, row: int
) -> int:
    """Return the place of a row among the records: its own in the files, or that of its slot. Slots begin at `first`.

    If the directory is empty, all rows are in the files. The place of a row that is spilled, so has a negative entry,
    is -1.
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
    """Return `place_of` for each of ``ids[start:stop]``.

    The index of a large table is in no cache, so each level is prefetched some rows before the next one needs it.
    """
    places = np.empty(stop - start, np.int64)
    if directory.size == 0:
        for i in range(start, stop):  # a copy of the slice would take numba 1.7 s to compile
            places[i - start] = ids[i]
        return places
    # A pipeline of three prefetches: when a level is read, it was prefetched `_AHEAD` rows ago.
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
    """Write `entry_of` for each of the rows."""
    for i in range(rows.size):
        entries[i] = entry_of(directory, branches, leaves, rows[i])


@kernel
def _take_node(free_list: NDArray[np.int32]) -> int:
    """Return the number of a node that is not in use: the one freed last, or else the next new one."""
    if free_list[1]:
        free_list[1] -= 1
        return int(free_list[2 + free_list[1]])
    free_list[0] += 1  # before it is returned, because node 0 is never used
    return int(free_list[0])


@kernel
def _free_if_empty(node: int, entries: NDArray[np.int32], free_list: NDArray[np.int32]) -> bool:
    """Free a node if all of its entries are 0; return whether it was freed."""
    if entries[node << NODE_BITS : (node + 1) << NODE_BITS].any():
        return False
    free_list[2 + free_list[1]] = node
    free_list[1] += 1
    return True


@kernel
def set_entries(
    directory: NDArray[np.int32],
    branches: NDArray[np.int32],
    free_branches: NDArray[np.int32],
    leaves: NDArray[np.int32],
    free_leaves: NDArray[np.int32],
    rows: Int64Array,
    entries: Int64Array,
) -> None:
    """Set the entries of rows, 0 to remove them. Branches and leaves that become empty are freed.

    Numbers are written from the leaf up, so that a lookup without the lock never follows one to a node that is not
    filled in. It may still meet a node that was freed and is used for other rows now, and so read another row's
    entry; then `Overlay.version` has changed.
    """
    for i in range(rows.size):
        row, low = rows[i], NODE - 1
        branch = int(directory[row >> 2 * NODE_BITS])
        at = (row >> NODE_BITS) & low
        leaf = int(branches[(branch << NODE_BITS) | at])
        if entries[i] == 0 and leaf == 0:  # nothing to remove: do not take nodes for it
            continue
        if leaf == 0:
            leaf = _take_node(free_leaves)
        leaves[(leaf << NODE_BITS) | (row & low)] = entries[i]
        if branch == 0:
            branch = _take_node(free_branches)
        branches[(branch << NODE_BITS) | at] = leaf
        directory[row >> 2 * NODE_BITS] = branch
        if entries[i] == 0 and _free_if_empty(leaf, leaves, free_leaves):
            branches[(branch << NODE_BITS) | at] = 0
            if _free_if_empty(branch, branches, free_branches):
                directory[row >> 2 * NODE_BITS] = 0
