"""Numbered slots for records: which row each one holds, whether the files hold the same, and which to evict first.

The state of a slot is a byte of bits:

- `CHANGED`: its record differs from the last commit. A changed slot is always `UNFOLDED` as well.
- `UNFOLDED`: the files do not hold its record, and no fold that runs now will write it.
- `FOLDING`: it was unfolded when the fold that runs now began. Until this ends, the files may or may not hold its
  record.
- `FROZEN`: its record is part of a commit under way, which has not packed it yet. Such a slot is `UNFOLDED` as well.
- `TOUCHED`: it was used since the clock hand last passed it, see `Slots.choose`.

A slot is *dirty* if it is unfolded or folding: its record must not be lost, because the files may not hold it.
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

USED, UNFOLDED, FOLDING, CHANGED, TOUCHED, _CHOSEN, FROZEN = (np.uint8(1 << bit) for bit in range(7))
DIRTY = UNFOLDED | FOLDING
"""The bits of which a dirty slot has at least one."""

_CHANGING = CHANGED | UNFOLDED | TOUCHED

_AHEAD = 16
"""How many slots ahead a state is prefetched: one pass that prefetches takes half the time of two that do not."""

_EACH_BYTE = np.uint64(0x0101010101010101)
"""Times a byte, this is a word that repeats the byte eight times."""


class Slots:
    """Slots of one table. Callers hold the store's lock.

    Parameters
    ----------
    capacity : int
        The largest number of slots.

    Attributes
    ----------
    owner : ndarray of int64
        The row that each slot holds.
    state : ndarray of uint8
        The bits of each slot; 0 if it is free.
    end : int
        One past the last slot that was ever in use; 0 again once no slot is.
    count, dirty, changed : int
        How many slots are in use, how many of these are dirty, and how many differ from the last commit.
    """

    def __init__(self, capacity: int) -> None:
        self.owner: NDArray[np.int64]
        self._words: NDArray[np.uint64]
        self.owner, self._words = address_space.zeros_together(
            [(np.int64, capacity), (np.uint64, -(-capacity // 8))]
        )
        self.state: NDArray[np.uint8] = self._words.view(np.uint8)[:capacity]
        self._free_slots = np.empty(0, np.int64)
        self.end: int = 0
        self.count: int = 0
        self.dirty: int = 0
        self.changed: int = 0
        self._hand = 0

    def next_end(self, count: int) -> int:
        """Return what `end` will be after `count` more slots are allocated."""
        return self.end + max(0, count - self._free_slots.size)

    def allocate(self, rows: Int64Array) -> Int64Array:
        """Allocate a slot for each row; return them, ascending. Slots that were freed last are used first."""
        left = max(0, self._free_slots.size - rows.size)
        slots = np.concatenate(
            [np.sort(self._free_slots[left:], kind="stable"), np.arange(self.end, self.next_end(rows.size))]
        )
        self.end, self._free_slots = self.next_end(rows.size), self._free_slots[:left]
        self.owner[slots], self.state[slots] = rows, USED | TOUCHED
        self.count += slots.size
        return slots

    def flags_of(self, slots: Int64Array) -> NDArray[np.uint8]:
        """Return the flags that follow the records of slots to wherever they move, see `set_flags`."""
        flags: NDArray[np.uint8] = self.state[slots] & (DIRTY | CHANGED | FROZEN)
        return flags

    def set_flags(self, slots: Int64Array, flags: NDArray[np.uint8]) -> None:
        """Give slots the flags of the records that were moved to them."""
        self.state[slots] |= flags
        self.dirty += int(np.count_nonzero(flags & DIRTY))
        self.changed += int(np.count_nonzero(flags & CHANGED))

    def free(self, slots: Int64Array, *, end: int | None = None) -> None:
        """Free slots.

        To undo the last `allocate`, pass as `end` what it was before: slots from there on are then as never used.
        """
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
        """Note that slots are about to hold committed records that the files do not hold."""
        self.dirty += _set_bits(self.state, slots, UNFOLDED | TOUCHED, DIRTY)

    def mark_changed(self, slots: Int64Array) -> None:
        """Note that the records of slots are about to differ from the last commit."""
        new = np.zeros(2, np.int64)
        _mark_changed(self.state, slots, new)
        self.dirty, self.changed = self.dirty + int(new[0]), self.changed + int(new[1])

    def changed_slots(self) -> Int64Array:
        """List the slots that differ from the last commit, ascending."""
        return self._with_bits(CHANGED, self.changed)

    def dirty_slots(self) -> Int64Array:
        """List the dirty slots, ascending."""
        return self._with_bits(DIRTY, self.dirty)

    def clear_changes(self) -> None:
        """Note that no slot differs from the last commit: all changes were undone."""
        if self.changed:
            self.state[: self.end] &= ~CHANGED
            self.changed = 0

    def freeze(self) -> Int64Array:
        """Freeze the slots that differ from the last commit, and return them, ascending; none differs any more."""
        slots = self.changed_slots()
        if slots.size:
            state = self.state[: self.end]
            changed = state & CHANGED
            state ^= changed
            state |= changed * (FROZEN // CHANGED)
            self.changed = 0
        return slots

    def are_frozen(self, slots: Int64Array) -> NDArray[np.bool_]:
        """Return which slots are frozen."""
        frozen: NDArray[np.bool_] = self.state[slots] & FROZEN != 0
        return frozen

    def take_frozen(self, entries: NDArray[np.int32]) -> tuple[Int64Array, Int64Array]:
        """Unfreeze the slots that positive entries of the index lead to; return which entries did, and these slots."""
        which, slots = np.empty(entries.size, np.int64), np.empty(entries.size, np.int64)
        count = _take_frozen(self.state, entries, which, slots)
        return which[:count], slots[:count]

    def unfreeze(self, slots: Int64Array) -> None:
        """Freeze slots no more."""
        self.state[slots] &= ~FROZEN

    def mark_touched(self, slots: Int64Array) -> None:
        """Note that slots are in use, so that `choose` passes them over once."""
        _set_bits(self.state, slots, TOUCHED, TOUCHED)

    def begin_fold(self) -> None:
        """Note that the unfolded slots are being folded.

        Slots with uncommitted changes stay unfolded too: the fold writes the last commit's records, not theirs.
        """
        _begin_fold(self.state[: self.end])

    def compact(self) -> tuple[Int64Array, Int64Array]:
        """Make the slots in use contiguous, from slot 0 on; return those that moved, from where and to where.

        The caller moves their records.
        """
        source = self.count + np.flatnonzero(self.state[self.count : self.end])
        target = np.sort(self._free_slots[self._free_slots < self.count])
        self.owner[target], self.state[target] = self.owner[source], self.state[source]
        self.state[source] = 0
        self.end, self._free_slots = self.count, np.empty(0, np.int64)
        return source, target

    def end_fold(self, *, folded: bool) -> None:
        """Note that the fold has ended; unless `folded`, the slots that it was to write are unfolded again."""
        self.dirty = _end_fold(self.state[: self.end], UNFOLDED if folded else DIRTY)

    def choose(self, limit: int, *, exclude: np.uint8) -> Int64Array:
        """Choose up to `limit` slots in use that have none of the bits `exclude`, ascending.

        This is the clock algorithm of virtual memory: a hand goes round and round over the slots. It passes over a slot
        that was touched since it last came by, clears that bit, and chooses the slot the next time round.
        """
        if self.count == 0 or limit <= 0:
            return np.empty(0, np.int64)
        chosen = _choose(self.state[: self.end], min(limit, self.count), self._hand % self.end, exclude)
        self.state[chosen] &= ~_CHOSEN
        if chosen.size:
            self._hand = int(chosen[-1]) + 1
        chosen.sort(kind="stable")  # at most a few ascending runs, which this sort merges
        return chosen

    def _with_bits(self, bits: np.uint8, count: int) -> Int64Array:
        """List the `count` slots that have any of the bits, ascending."""
        slots: Int64Array = _with_bits(self.state, self._words[: -(-self.end // 8)], np.uint64(bits), count)
        return slots


@kernel
def _set_bits(state: NDArray[np.uint8], slots: Int64Array, bits: np.uint8, counted: np.uint8) -> int:
    """Set bits of slots; return how many slots had none of the bits `counted` before."""
    new = 0
    for i in range(slots.size):
        new += (state[slots[i]] & counted) == 0
        state[slots[i]] |= bits
    return new


@kernel
def _mark_changed(state: NDArray[np.uint8], slots: Int64Array, new: Int64Array) -> None:
    """Set the bits of slots that change; add to `new` how many of them were not dirty, and how many not changed."""
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
def _take_frozen(
    state: NDArray[np.uint8], entries: NDArray[np.int32], which: Int64Array, slots: Int64Array
) -> int:
    count = 0
    for i in range(entries.size):
        slot = entries[i] - 1
        if slot >= 0 and state[slot] & FROZEN:
            state[slot] &= ~FROZEN
            which[count], slots[count] = i, slot
            count += 1
    return count


@kernel
def _with_bits(
    state: NDArray[np.uint8], words: NDArray[np.uint64], bits: np.uint64, count: int
) -> Int64Array:
    """List the `count` slots that have any of the bits. `words` are the states of 8 slots each."""
    slots = np.empty(count, np.int64)
    k, mask = 0, bits * _EACH_BYTE
    for word in range(words.size):
        if words[word] & mask:  # usually few slots have the bits, so most words can be skipped
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
            if not state[slot] & (CHANGED | FROZEN):  # what is being committed belongs to the next fold
                state[
                    slot
                ] &= ~UNFOLDED  # a change from now on sets it again, so the end of the fold spares it


@kernel
def _end_fold(state: NDArray[np.uint8], unfolded: np.uint8) -> int:
    """Let slots with any of the bits `unfolded` be unfolded, and none be folding; return how many are dirty now."""
    dirty = 0
    for slot in range(state.size):
        if state[slot] & unfolded:
            state[slot] |= UNFOLDED
            dirty += 1
        state[slot] &= ~FOLDING
    return dirty


@kernel
def _choose(state: NDArray[np.uint8], limit: int, hand: int, exclude: np.uint8) -> Int64Array:
    chosen = np.empty(limit, np.int64)
    count = 0
    slot = hand - 1
    for _ in range(2 * state.size):  # the first round may do nothing but clear TOUCHED
        if count == limit:
            break
        slot = slot + 1 if slot + 1 < state.size else 0
        if not state[slot] & USED or state[slot] & (exclude | _CHOSEN):
            continue
        if state[slot] & TOUCHED:
            state[slot] &= ~TOUCHED
            continue
        state[slot] |= _CHOSEN  # so that the second round does not choose it again
        chosen[count] = slot
        count += 1
    return chosen[:count].copy()
