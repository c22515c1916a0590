"""The hot loops of the index from hashes to rows (``keyindex.py``): a sorted level on disk, and an open one in memory.

*Entries* are pairs ``(hash, row)``, ascending by hash, with room between them: each lies at its home, or as little
behind it as the pairs before it allow. So a hash is found in the cache line of its home or in the next, and nothing
else is looked at. What fills the room has the hash before it, so that all ascends, and the row -1. They lie in *parts*,
each of the hashes that begin with the same bits, with homes in proportion to its pairs. *Spans* tell, by a hash's first
bits, of its part: where it begins, how many homes it has, where it ends, and how many bits its hashes have in common.
*Slots* are an open hash table of ``(hash, row + 1)`` with zeros where it is empty, in which a pair lies at its home or
behind it; homes ascend with hashes, so that slots in their order are nearly sorted. Whoever knows the secret can make
keys whose homes are the same. Where a pair would lie too far from its home for that, homes are drawn anew, by a *salt*
that nobody knows, and have no order. *Marks*, a byte for each home, tell in a sixteenth of the memory which hashes are
in no slot: of those that are in the file alone, nine of ten need no look at the buckets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.compute.compiler import inlined, kernel
from shardemb.compute.intrinsics import prefetch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

_0, _1, _7, _32, _64 = np.uint64(0), np.uint64(1), np.uint64(7), np.uint64(32), np.uint64(64)
NO_ROW = np.uint64(2**64 - 1)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_AHEAD, _RING = 24, 32
"""How many hashes ahead their memory is asked for: as many as a processor waits for at once."""

MAX_DISTANCE = 1024
"""Slots from its home within which a pair lies, where there is no salt; random hashes never come so far."""

SLACK = 2
"""Entries behind the last that `merge` may write, which mean nothing; few gaps between pairs are longer."""

_SCANNED = 8
"""Entries that are looked at one by one; only where hashes fall together one lies farther from its home."""


@kernel
def bucket_of(value: Any, capacity: Any, salt: Any) -> Any:  # noqa: ANN401
    """Where in a table of slots a hash belongs; by its first bits, where the salt is 0."""
    if salt:
        value = (value ^ salt) * _M1
        value = (value ^ (value >> _32)) * _M2
    return np.int64(((value >> _32) * np.uint64(capacity)) >> _32)


@kernel
def first_bits(value: Any, bits: Any) -> Any:  # noqa: ANN401
    """First bits of a hash."""
    return np.int64(value >> (_64 - np.uint64(bits))) if bits else np.int64(0)


@kernel
def _bucket_in_part(value: Any, bits: Any, bucket_count: Any) -> Any:  # noqa: ANN401
    """Which of the homes of its part is that of a hash."""
    return np.int64((((value << np.uint64(bits)) >> _32) * np.uint64(bucket_count)) >> _32)


@inlined
def entry_bucket(spans: Any, span: Any, value: Any) -> Any:  # noqa: ANN401
    """Where among the entries a hash belongs, by the span of its part."""
    return min(spans[span, 0] + _bucket_in_part(value, spans[span, 3], spans[span, 1]), spans[span, 2])


@kernel
def entry_buckets(spans: Int64Array, bits: int, hashes: NDArray[np.uint64], out: Int64Array) -> None:
    """``out[i]`` becomes the home of ``hashes[i]``, or what lies before the end of its part."""
    for i in range(hashes.size):
        span = first_bits(hashes[i], bits)
        out[i] = min(entry_bucket(spans, span, hashes[i]), spans[span, 2] - 1)


@inlined
def _lower_bound(entries: Any, low: Any, end: Any, value: Any) -> Any:  # noqa: ANN401
    """Return the number of the first of the entries ``low:end`` whose hash is at least `value`."""
    for _ in range(_SCANNED):
        if low == end or entries[low, 0] >= value:
            return low
        low += 1
    step = _SCANNED
    while low + step < end and entries[low + step, 0] < value:
        low += step
        step *= 2
    high = min(low + step, end)
    while low < high:
        middle = (low + high) >> 1
        if entries[middle, 0] < value:
            low = middle + 1
        else:
            high = middle
    return low


@kernel
def entries_between(
    spans: Int64Array,
    entries: NDArray[np.uint64],
    bits: int,
    first: np.uint64,
    last: np.uint64,
    out: Int64Array,
) -> None:
    """``out[0]`` and ``out[1]`` become begin and end of the entries of two hashes of one part, and all between."""
    span = first_bits(first, bits)
    end = spans[span, 2]
    begin = _lower_bound(entries, entry_bucket(spans, span, first), end, first)
    if end > begin and entries[end - 1, 0] > last:
        end = _lower_bound(entries, entry_bucket(spans, span, last), end, last + _1)
    out[0], out[1] = begin, end


@inlined
def _free_bucket(buckets: Any, salt: Any, value: Any, first: Any, last: Any) -> Any:  # noqa: ANN401
    """Return the first empty slot from the home of a hash on; -1 where it is too far, or not among ``first:last``."""
    capacity = buckets.shape[0]
    at, steps = bucket_of(value, capacity, salt), 0
    while buckets[at, 1] != 0:
        steps += 1
        at += 1
        if at == last and last - first == capacity:
            at = 0
        if at == last or (steps == MAX_DISTANCE and not salt):
            return -1
    return at


@kernel
def _filter_bit(value: Any) -> Any:  # noqa: ANN401
    """Return the bit of a hash in the byte of its home."""
    return np.uint8(_1 << (value & _7))


@kernel
def insert(
    buckets: NDArray[np.uint64],
    filters: NDArray[np.uint8],
    salt: np.uint64,
    hashes: NDArray[np.uint64],
    rows: Int64Array,
    left: NDArray[np.bool_],
    first: int,
    last: int,
) -> None:
    """Put pairs into slots that have room for them, those whose homes are among ``first:last``.

    ``left[i]`` becomes true for one that would lie too far, or beyond. Others may do the same with other slots
    meanwhile, and readers look on: a row comes after its hash, and after its mark.
    """
    for i in range(hashes.size):
        ahead = bucket_of(hashes[min(i + _AHEAD, hashes.size - 1)], filters.size, salt)
        if first <= ahead < last:
            prefetch(buckets.ctypes.data + 16 * ahead)
            prefetch(filters.ctypes.data + ahead)
        own = bucket_of(hashes[i], filters.size, salt)
        if first <= own < last:
            at = _free_bucket(buckets, salt, hashes[i], first, last)
            if at < 0:
                left[i] = True
                continue
            filters[own] |= _filter_bit(hashes[i])
            buckets[at, 0] = hashes[i]
            buckets[at, 1] = np.uint64(rows[i] + 1)


@kernel
def insert_all(
    buckets: NDArray[np.uint64], filters: NDArray[np.uint8], salt: np.uint64, old: NDArray[np.uint64]
) -> bool:
    """Put what lies in other slots into empty ones; return whether nothing would lie too far."""
    for i in range(old.shape[0]):
        if old[i, 1] != 0:
            at = _free_bucket(buckets, salt, old[i, 0], 0, buckets.shape[0])
            if at < 0:
                return False
            filters[bucket_of(old[i, 0], filters.size, salt)] |= _filter_bit(old[i, 0])
            buckets[at, 0], buckets[at, 1] = old[i, 0], old[i, 1]
    return True


@inlined
def _in_table(buckets: Any, salt: Any, value: Any, skip: Any, end: Any) -> Any:  # noqa: ANN401
    """Return the row of the ``skip + 1``-th pair in slots; -1, less what is left to skip, where there is none."""
    capacity = buckets.shape[0]
    at = bucket_of(value, capacity, salt)
    for _ in range(capacity if salt else min(capacity, MAX_DISTANCE)):
        row = np.int64(buckets[at, 1]) - 1
        if row < 0:
            break
        if buckets[at, 0] == value and row < end:
            if skip == 0:
                return row
            skip -= 1
        at += 1
        if at == capacity:
            at = 0
    return -1 - skip


@inlined
def _in_entries(entries: Any, low: Any, last: Any, value: Any, skip: Any, end: Any) -> Any:  # noqa: ANN401
    """As `_in_table`, of the entries ``low:last``."""
    low = _lower_bound(entries, low, last, value)
    while low < last and entries[low, 0] == value:
        row = np.int64(entries[low, 1])
        if 0 <= row < end:
            if skip == 0:
                return row
            skip -= 1
        low += 1
    return -1 - skip


@kernel
def probe(
    buckets: NDArray[np.uint64],
    filters: NDArray[np.uint8],
    salt: np.uint64,
    spans: Int64Array,
    entries: NDArray[np.uint64],
    bits: int,
    hashes: NDArray[np.uint64],
    skip: int,
    end: int,
    out: Int64Array,
    start: int,
    stop: int,
) -> None:
    """``out[i]`` becomes the row of the ``skip + 1``-th pair with the hash ``hashes[i]``, -1 where there is none.

    Those in memory, newer, come first. Pairs whose row is not below `end` do not count.
    """
    capacity = buckets.shape[0]
    lows, lasts = np.empty(_RING, np.int64), np.empty(_RING, np.int64)
    ats, may_hold = np.empty(_RING, np.int64), np.empty(_RING, np.bool_)
    # A hash's memory is asked for a while before it is looked at: of its mark and its entry first, then of its slot.
    for asked in range(start, stop + _AHEAD):
        if asked < stop:
            k = asked & _RING - 1
            span = first_bits(hashes[asked], bits)
            lows[k], lasts[k] = entry_bucket(spans, span, hashes[asked]), spans[span, 2]
            ats[k] = bucket_of(hashes[asked], capacity, salt)
            prefetch(entries.ctypes.data + 16 * lows[k])
            prefetch(entries.ctypes.data + 16 * lows[k] + 48)
            prefetch(filters.ctypes.data + ats[k])
        i = asked - _AHEAD // 2
        if start <= i < stop:
            k = i & _RING - 1
            may_hold[k] = filters[ats[k]] & _filter_bit(hashes[i]) != 0
            if may_hold[k]:
                prefetch(buckets.ctypes.data + 16 * ats[k])
        i = asked - _AHEAD
        if i >= start:
            k = i & _RING - 1
            row = _in_table(buckets, salt, hashes[i], skip, end) if may_hold[k] else -1 - skip
            if row < 0:
                row = _in_entries(entries, lows[k], lasts[k], hashes[i], -1 - row, end)
            out[i] = max(row, -1)


@kernel
def count_between(buckets: NDArray[np.uint64], first: np.uint64, last: np.uint64) -> int:
    """Count the pairs in slots without a salt whose hashes lie between two, both included."""
    capacity = buckets.shape[0]
    at, end, count = bucket_of(first, capacity, _0), bucket_of(last, capacity, _0), 0
    for step in range(capacity):
        if buckets[at, 1] == 0:
            if step >= end - bucket_of(first, capacity, _0):
                break
        elif first <= buckets[at, 0] <= last:
            count += 1
        at += 1
        if at == capacity:
            at = 0
    return count


@kernel
def take_between(
    buckets: NDArray[np.uint64], first: np.uint64, last: np.uint64, out: NDArray[np.uint64]
) -> None:
    """Copy those pairs, ``(hash, row)``, ascending by hash."""
    capacity, at, found = buckets.shape[0], bucket_of(first, buckets.shape[0], _0), 0
    while found < out.shape[0]:
        if buckets[at, 1] != 0 and first <= buckets[at, 0] <= last:
            value, row = buckets[at, 0], buckets[at, 1] - _1
            k = found
            while k > 0 and out[k - 1, 0] > value:
                out[k, 0], out[k, 1] = out[k - 1, 0], out[k - 1, 1]
                k -= 1
            out[k, 0], out[k, 1] = value, row
            found += 1
        at += 1
        if at == capacity:
            at = 0


@inlined
def _is_there(out: Any, at: Any, value: Any, row: Any) -> Any:  # noqa: ANN401
    """Whether a pair is among the entries before some place, which ascend and have no hash above."""
    while at > 0 and out[at - 1, 0] == value:
        at -= 1
        if out[at, 1] == row:
            return True
    return False


@inlined
def _put(out: Any, at: Any, bucket: Any, before: Any, value: Any, row: Any) -> Any:  # noqa: ANN401
    """Put a pair at its home, or at `at` if that lies behind it; return where it is."""
    for k in range(SLACK):  # needed or not: a branch would go as often one way as the other
        out[at + k, 0], out[at + k, 1] = before, NO_ROW
    for k in range(at + SLACK, bucket):
        out[k, 0], out[k, 1] = before, NO_ROW
    at = max(at, bucket)
    out[at, 0], out[at, 1] = value, row
    return at


@kernel
def merge(
    new: NDArray[np.uint64],
    old: NDArray[np.uint64],
    first: np.uint64,
    bits: int,
    bucket_count: int,
    out: NDArray[np.uint64],
    counts: Int64Array,
) -> None:
    """Merge pairs ``(hash, row)`` with entries, both ascending by hash, into the entries of a part, each pair once.

    Parameters
    ----------
    first, bits : uint64, int
        The least hash that belongs to the part, and how many bits all of them have in common.
    bucket_count : int
        How many it gets.
    out : ndarray of uint64, shape (n, 2)
        Room for as many entries as there are pairs and homes, and `SLACK` more.
    counts : ndarray of int64, shape (2,)
        Becomes how many entries there are, and how many of them are pairs.
    """
    i, at, pairs, before, recent = 0, 0, 0, first, _0
    for j in range(old.shape[0] + 1):
        rest = j == old.shape[0]
        value, row = (_0, _0) if rest else (old[j, 0], old[j, 1])
        while i < new.shape[0] and (rest or new[i, 0] <= value):
            recent = new[i, 0]
            if not _is_there(out, at, recent, new[i, 1]):
                at = 1 + _put(out, at, _bucket_in_part(recent, bits, bucket_count), before, recent, new[i, 1])
                pairs, before = pairs + 1, recent
            i += 1
        if rest or (value == recent and _is_there(out, at, value, row)):
            continue
        # What is no pair is put too, and overwritten by the next: no branch for it either.
        is_pair = int(np.int64(row) >= 0)
        place = _put(out, at, _bucket_in_part(value, bits, bucket_count), before, value, row)
        at += int(place + 1 - at) * is_pair
        pairs, before = pairs + is_pair, max(before, value)
    counts[0], counts[1] = at, pairs


@kernel
def first_of_each(hashes: NDArray[np.uint64], salt: np.uint64, table: Int64Array) -> Int64Array:
    """For each hash, the position of the first that is the same; `table` is room, -1 throughout."""
    leader = np.empty(hashes.size, np.int64)
    capacity = table.size
    for i in range(hashes.size):
        at = bucket_of(hashes[i], capacity, salt)
        while table[at] >= 0 and hashes[table[at]] != hashes[i]:
            at += 1
            if at == capacity:
                at = 0
        if table[at] < 0:
            table[at] = i
        leader[i] = table[at]
    return leader
