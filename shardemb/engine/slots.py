"""Numbered places for records: which row each holds, whether the files hold the same, and which may be given up first.

A slot is *newer* while it holds what the files do not: changes that are not committed, which makes it *changed* too, or
committed ones that no fold has brought into the files. While a fold runs, `FOLDING` are those that were newer when it
began.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from shardemb.compute.compiler import kernel
from shardemb.compute.intrinsics import prefetch
from shardemb.storage import address_space

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

USED, UNFOLDED, FOLDING, CHANGED, TOUCHED, _CHOSEN = (np.uint8(1 << bit) for bit in range(6))
DIRTY = UNFOLDED | FOLDING
"""What the files do not hold, or may not hold yet."""

_CHANGING = CHANGED | UNFOLDED | TOUCHED

_AHEAD = 16
"""How many slots ahead the processor is asked for a state: in one pass, half the time of two that do not ask."""

_EACH_BYTE = np.uint64(0x0101010101010101)


class Slots:
    """Slots of one table. Everything is under the store's lock.

    Parameters
    ----------
    most : int
        How many there may be.

    Attributes
    ----------
    owner : ndarray of int64
        The row that a slot holds.
    state : ndarray of uint8
        Bits of a slot; 0 where it is free.
    end : int
        One past the last slot that was ever used, until none is.
    count, dirty, changed : int
        How many are used; how many of these hold what the files do not, or may not yet; and how many differ from the
        last commit.
    """

    def __init__(self, most: int) -> None:
        self.owner: NDArray[np.int64] = address_space.zeros(np.int64, most)
        self._words: NDArray[np.uint64] = address_space.zeros(np.uint64, -(-most // 8))
        self.state: NDArray[np.uint8] = self._words.view(np.uint8)[:most]
        self._free_slots = np.empty(0, np.int64)
        self.end: int = 0
        self.count: int = 0
        self.dirty: int = 0
        self.changed: int = 0
        self._hand = 0

    def next_end(self, count: int) -> int:
        """Tell what `end` will be once so many more are taken."""
        return self.end + max(0, count - self._free_slots.size)

    def allocate(self, rows: Int64Array) -> Int64Array:
        """Take slots for rows; return them, ascending."""
        left = max(0, self._free_slots.size - rows.size)
        slots = np.concatenate(
            [np.sort(self._free_slots[left:], kind="stable"), np.arange(self.end, self.next_end(rows.size))]
        )
        self.end, self._free_slots = self.next_end(rows.size), self._free_slots[:left]
        self.owner[slots], self.state[slots] = rows, USED | TOUCHED
        self.count += slots.size
        return slots

    def flags_of(self, slots: Int64Array) -> NDArray[np.uint8]:
        """Tell what has to be known of slots where others take their records, see `set_flags`."""
        flags: NDArray[np.uint8] = self.state[slots] & (DIRTY | CHANGED)
        return flags

    def set_flags(self, slots: Int64Array, flags: NDArray[np.uint8]) -> None:
        """Take over what was known of records that lay elsewhere."""
        self.state[slots] |= flags
        self.dirty += int(np.count_nonzero(flags & DIRTY))
        self.changed += int(np.count_nonzero(flags & CHANGED))

    def free(self, slots: Int64Array, *, end: int | None = None) -> None:
        """Give slots up; `end` as it was before, where those that were taken last go first."""
        self.dirty -= int(np.count_nonzero(self.state[slots] & DIRTY))
        self.changed -= int(np.count_nonzero(self.state[slots] & CHANGED))
        self.state[slots] = 0
        self.count -= slots.size
        self._free_slots = np.concatenate([self._free_slots, slots])
        if self.count == 0:
            end = 0
        if end is not None:
            self.end, self._free_slots = end, self._free_slots[self._free_slots < end]

    def mark_dirty(self, slots: Int64Array) -> None:
        """Note that slots are about to hold what the files do not."""
        self.dirty += _set_bits(self.state, slots, UNFOLDED | TOUCHED, DIRTY)

    def mark_changed(self, slots: Int64Array) -> None:
        """Note that slots are about to differ from the last commit."""
        new = np.zeros(2, np.int64)
        _mark_changed(self.state, slots, new)
        self.dirty, self.changed = self.dirty + int(new[0]), self.changed + int(new[1])

    def changed_slots(self) -> Int64Array:
        """List the slots that differ from the last commit, ascending."""
        return self._with_bits(CHANGED, self.changed)

    def dirty_slots(self) -> Int64Array:
        """List the slots that hold what the files do not, or may not yet, ascending."""
        return self._with_bits(DIRTY, self.dirty)

    def clear_changes(self) -> None:
        """Let no slot differ from the last commit any more."""
        if self.changed:
            self.state[: self.end] &= ~CHANGED
            self.changed = 0

    def touch(self, slots: Int64Array) -> None:
        """Let slots be the last to be chosen."""
        _set_bits(self.state, slots, TOUCHED, TOUCHED)

    def begin_fold(self) -> None:
        """Note which slots are folded now: those that are newer. What has changed since stays newer all the same."""
        _begin_fold(self.state[: self.end])

    def compact(self) -> tuple[Int64Array, Int64Array]:
        """Let the slots in use lie side by side at the beginning; return those that moved, from where and to where."""
        source = self.count + np.flatnonzero(self.state[self.count : self.end])
        target = np.sort(self._free_slots[self._free_slots < self.count])
        self.owner[target], self.state[target] = self.owner[source], self.state[source]
        self.state[source] = 0
        self.end, self._free_slots = self.count, np.empty(0, np.int64)
        return source, target

    def end_fold(self, *, folded: bool) -> None:
        """Forget the note of `begin_fold`; or take it back, where the files do not hold those rows."""
        self.dirty = _end_fold(self.state[: self.end], UNFOLDED if folded else DIRTY)

    def choose(self, most: int, *, exclude: np.uint8) -> Int64Array:
        """Choose up to `most` slots in use without certain bits, ascending.

        They are looked for round and round, as the clock of virtual memory does: those are passed over once that were
        touched since the last time.
        """
        if self.count == 0 or most <= 0:
            return np.empty(0, np.int64)
        chosen = _choose(self.state[: self.end], min(most, self.count), self._hand % self.end, exclude)
        self.state[chosen] &= ~_CHOSEN
        if chosen.size:
            self._hand = int(chosen[-1]) + 1
        chosen.sort(kind="stable")  # few runs that ascend: these it merges
        return chosen

    def _with_bits(self, bits: np.uint8, count: int) -> Int64Array:
        """List the slots, of which there are so many, that have any of the bits, ascending."""
        slots: Int64Array = _with_bits(self.state, self._words[: -(-self.end // 8)], np.uint64(bits), count)
        return slots


@kernel
def _set_bits(state: NDArray[np.uint8], slots: Int64Array, bits: np.uint8, counted: np.uint8) -> int:
    """Set bits of slots; return how many had none of those that are counted."""
    new = 0
    for i in range(slots.size):
        new += (state[slots[i]] & counted) == 0
        state[slots[i]] |= bits
    return new


@kernel
def _mark_changed(state: NDArray[np.uint8], slots: Int64Array, new: Int64Array) -> None:
    """Set the bits of slots that change; add to `new` how many were not kept before, and how many not changed."""
    not_dirty, not_changed, last = 0, 0, slots.size - 1
    for i in range(slots.size):
        prefetch(state.ctypes.data + slots[min(i + _AHEAD, last)])
        before = state[slots[i]]
        not_dirty += (before & DIRTY) == 0
        not_changed += (before & CHANGED) == 0
        state[slots[i]] = before | _CHANGING
    new[0] += not_dirty
    new[1] += not_changed


@kernel
def _with_bits(
    state: NDArray[np.uint8], words: NDArray[np.uint64], bits: np.uint64, count: int
) -> Int64Array:
    """List the slots, of which there are so many, that have any of the bits; `words` is their state, 8 at a time."""
    slots = np.empty(count, np.int64)
    k, mask = 0, bits * _EACH_BYTE
    for word in range(words.size):
        if words[word] & mask:  # of few slots among many, most words have none
            for slot in range(8 * word, 8 * word + 8):
                if k < count and state[slot] & bits:
                    slots[k] = slot
                    k += 1
    return slots


@kernel
def _begin_fold(state: NDArray[np.uint8]) -> None:
    for slot in range(state.size):
        if state[slot] & UNFOLDED:
            state[slot] |= FOLDING
            if not state[slot] & CHANGED:
                state[slot] &= ~UNFOLDED


@kernel
def _end_fold(state: NDArray[np.uint8], still: np.uint8) -> int:
    dirty = 0
    for slot in range(state.size):
        if state[slot] & still:
            state[slot] |= UNFOLDED
            dirty += 1
        state[slot] &= ~FOLDING
    return dirty


@kernel
def _choose(state: NDArray[np.uint8], most: int, hand: int, exclude: np.uint8) -> Int64Array:
    chosen = np.empty(most, np.int64)
    count = 0
    slot = hand - 1
    for _ in range(2 * state.size):
        if count == most:
            break
        slot = slot + 1 if slot + 1 < state.size else 0
        if not state[slot] & USED or state[slot] & (exclude | _CHOSEN):
            continue
        if state[slot] & TOUCHED:
            state[slot] &= ~TOUCHED
            continue
        state[slot] |= _CHOSEN
        chosen[count] = slot
        count += 1
    return chosen[:count].copy()
