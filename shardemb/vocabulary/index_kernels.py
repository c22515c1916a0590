"""Hot loops of the index from hashes to rows (``hash_index.py``): sorted entries on disk, and a hash table in memory.

*Entries* are pairs ``(hash, row)``, sorted by hash, with gaps between them. Each pair has a *bucket*, a position in
proportion to its hash, and lies there, or as little behind it as the pairs before it allow. A lookup therefore reads
the cache line of the bucket, sometimes the next one, and nothing else. An entry that fills a gap has the row -1 and
repeats the hash before it, so that the hashes ascend throughout.

Entries are divided into *parts*. A part holds the hashes that begin with the same bits, and its number of buckets is in
proportion to its pairs. An array of *spans*, indexed by the first bits of a hash, describes the part of that hash:
where it begins, how many buckets it has, where it ends, and how many first bits its hashes share.

The *hash table* uses linear probing. Its buckets hold ``(hash, row + 1)``, or zeros if they are empty; a pair lies in
its own bucket or behind it. Buckets ascend with hashes, so that the table, read in order, is nearly sorted. Anyone who
knows the secret of a vocabulary can construct keys that share a bucket. If a pair would lie too far from its bucket
because of that, the table is rebuilt with a *salt*, a random number that nobody knows. Buckets then depend on the salt,
and no longer ascend with hashes.

*Filters* have one byte for each bucket, a sixteenth of the table's memory. They rule out hashes that are not in the
table: of the hashes that are in the files only, nine in ten need no look at the buckets.
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
"""How many hashes ahead memory is prefetched, as many cache misses as a processor has in flight; and the length of the
ring buffers for these hashes, the next power of two."""

MAX_DISTANCE = 1024
"""How many buckets, beginning with its own, a pair may be in if there is no salt. Random hashes never come so far."""

SLACK = 2
"""How many meaningless entries `merge` may write behind the last one. Few gaps between pairs are longer."""

_SCANNED = 8
"""Entries that a search scans one by one, from the bucket on. Only hashes that cluster lie farther from theirs."""


@kernel
def bucket_of(value: Any, capacity: Any, salt: Any) -> Any:  # noqa: ANN401
    """Return the bucket of a hash in a table of `capacity` buckets: if the salt is 0, by the first bits of the hash."""
    if salt:
        value = (value ^ salt) * _M1
        value = (value ^ (value >> _32)) * _M2
    return np.int64(((value >> _32) * np.uint64(capacity)) >> _32)


@kernel
def first_bits(value: Any, bits: Any) -> Any:  # noqa: ANN401
    """Return the first `bits` bits of a hash, as a number."""
    # A shift by all 64 bits is undefined.
    return np.int64(value >> (_64 - np.uint64(bits))) if bits else np.int64(0)


@kernel
def _bucket_in_part(value: Any, bits: Any, bucket_count: Any) -> Any:  # noqa: ANN401
    """Return the bucket of a hash, counted from the beginning of its part: by the bits after the first `bits`."""
    return np.int64((((value << np.uint64(bits)) >> _32) * np.uint64(bucket_count)) >> _32)


@inlined
def entry_bucket(spans: Any, span: Any, value: Any) -> Any:  # noqa: ANN401
    """Return the bucket of a hash among the entries, given the span of its part; at most the end of the part."""
    # The last pairs may lie before their part's last bucket, and a damaged header may say anything about buckets.
    return min(spans[span, 0] + _bucket_in_part(value, spans[span, 3], spans[span, 1]), spans[span, 2])


@kernel
def entry_buckets(spans: Int64Array, bits: int, hashes: NDArray[np.uint64], out: Int64Array) -> None:
    """Set ``out[i]`` to the bucket of ``hashes[i]``, or to the last entry of its part if that comes before."""
    for i in range(hashes.size):
        span = first_bits(hashes[i], bits)
        out[i] = min(entry_bucket(spans, span, hashes[i]), spans[span, 2] - 1)


@inlined
def _lower_bound(entries: Any, low: Any, end: Any, value: Any) -> Any:  # noqa: ANN401
    """Return the first of the entries ``low:end`` whose hash is at least `value`, by its number; `end` if none is."""
    # Scan, then gallop and bisect: keys that were constructed to cluster can fill any number of entries.
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
    """Set ``out`` to begin and end of the entries from hash `first` to hash `last`, both of one part and included."""
    span = first_bits(first, bits)
    end = spans[span, 2]
    begin = _lower_bound(entries, entry_bucket(spans, span, first), end, first)
    if end > begin and entries[end - 1, 0] > last:
        end = _lower_bound(entries, entry_bucket(spans, span, last), end, last + _1)
    out[0], out[1] = begin, end


@inlined
def _free_bucket(buckets: Any, salt: Any, value: Any, first: Any, last: Any) -> Any:  # noqa: ANN401
    """Return the first empty bucket from that of a hash on; -1 if it is too far, or outside ``first:last``."""
    capacity = buckets.shape[0]
    at, steps = bucket_of(value, capacity, salt), 0
    while buckets[at, 1] != 0:
        steps += 1
        at += 1
        if at == last and last - first == capacity:  # the whole table: wrap around
            at = 0
        if at == last or (steps == MAX_DISTANCE and not salt):
            return -1
    return at


@kernel
def _filter_bit(value: Any) -> Any:  # noqa: ANN401
    """Return the bit that a hash sets in the filter of its bucket: chosen by its last bits, the bucket by its first."""
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
    """Put the pairs whose buckets are among ``first:last`` into a table that has space for them.

    ``left[i]`` becomes true for a pair that would lie too far from its bucket, or outside ``first:last``. Other threads
    may fill other ranges of the table concurrently, and readers may probe it.
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
            # In this order: readers see a pair once its row is there.
            filters[own] |= _filter_bit(hashes[i])
            buckets[at, 0] = hashes[i]
            buckets[at, 1] = np.uint64(rows[i] + 1)


@kernel
def insert_all(
    buckets: NDArray[np.uint64], filters: NDArray[np.uint8], salt: np.uint64, old: NDArray[np.uint64]
) -> bool:
    """Put the pairs of the buckets `old` into an empty table; return whether none would lie too far from its bucket."""
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
    """Return the row of the ``skip + 1``-th pair of a hash; if there are fewer, -1 less the number still to skip."""
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
    """Do what `_in_table` does, in the entries ``low:last``."""
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
    """Set ``out[i]`` to the row of the ``skip + 1``-th pair with the hash ``hashes[i]``, or to -1 if there are fewer.

    Pairs in the table, which are newer, come before those in the entries. Pairs whose row is not below `end` do not
    count.
    """
    capacity = buckets.shape[0]
    lows, lasts = np.empty(_RING, np.int64), np.empty(_RING, np.int64)
    ats, may_hold = np.empty(_RING, np.int64), np.empty(_RING, np.bool_)
    # A pipeline of three stages, so that no hash waits for memory: prefetch the filter and the entries of a hash; half
    # the distance later, prefetch its bucket unless the filter rules it out; at the end, search.
    for asked in range(start, stop + _AHEAD):
        if asked < stop:
            k = asked & _RING - 1
            span = first_bits(hashes[asked], bits)
            lows[k], lasts[k] = entry_bucket(spans, span, hashes[asked]), spans[span, 2]
            ats[k] = bucket_of(hashes[asked], capacity, salt)
            prefetch(entries.ctypes.data + 16 * lows[k])
            prefetch(entries.ctypes.data + 16 * lows[k] + 48)  # the fourth may be in the next line
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
    """Count the pairs of a table without a salt whose hashes lie between two, both included."""
    capacity = buckets.shape[0]
    at, end, count = bucket_of(first, capacity, _0), bucket_of(last, capacity, _0), 0
    for step in range(capacity):
        if buckets[at, 1] == 0:
            # Behind the bucket of the last hash, an empty one ends all that may have been pushed there.
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
    """Copy the pairs that `count_between` counts into `out`, as ``(hash, row)``, sorted by hash."""
    capacity, at, found = buckets.shape[0], bucket_of(first, buckets.shape[0], _0), 0
    while found < out.shape[0]:
        if buckets[at, 1] != 0 and first <= buckets[at, 0] <= last:
            value, row = buckets[at, 0], buckets[at, 1] - _1
            k = found  # insertion sort: the table is nearly sorted
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
    """Return whether a pair is among the entries before `at`, which are sorted and have no hash above `value`."""
    while at > 0 and out[at - 1, 0] == value:
        at -= 1
        if out[at, 1] == row:
            return True
    return False


@inlined
def _put(out: Any, at: Any, bucket: Any, before: Any, value: Any, row: Any) -> Any:  # noqa: ANN401
    """Write a pair to its bucket, or to `at` if that lies behind the bucket; fill the gap; return where the pair is."""
    # Needed or not: a branch on it would be mispredicted as often as not.
    for k in range(SLACK):
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
    """Merge new pairs and old entries, both sorted by hash, into the entries of a part, which get each pair once.

    Parameters
    ----------
    new, old : ndarray of uint64, shape (n, 2)
        Pairs ``(hash, row)`` without gaps, and entries.
    first, bits : uint64, int
        The least hash of the part, and how many first bits its hashes share.
    bucket_count : int
        How many buckets the part gets.
    out : ndarray of uint64, shape (n, 2)
        Space for as many entries as there are pairs and buckets, and `SLACK` more.
    counts : ndarray of int64, shape (2,)
        Set to the number of entries, and to how many of them are pairs.
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
        # A gap is written like a pair, and the next entry overwrites it: this saves a branch, too.
        is_pair = int(np.int64(row) >= 0)
        place = _put(out, at, _bucket_in_part(value, bits, bucket_count), before, value, row)
        at += int(place + 1 - at) * is_pair
        pairs, before = pairs + is_pair, max(before, value)
    counts[0], counts[1] = at, pairs


@kernel
def first_of_each(hashes: NDArray[np.uint64], salt: np.uint64, table: Int64Array) -> Int64Array:
    """Return for each hash the position of the first equal one; `table` is scratch memory, longer and -1 throughout."""
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
