"""The index of keys: from the hash of a key to rows that may hold it. It is a hint, which can be lost and rebuilt.

What a vocabulary *says*, the key of each row, is in its tables, which commits protect. The index only says where to
look. It may name rows that hold another key or none, so callers compare. It never omits a row that holds the key.
Removals and rollbacks therefore take no pair out of it; only a rebuild does.

Most pairs are in files that never change (``index_files.py``). New pairs go into a hash table in memory. When that has
many, it is merged with the files into new files, a few parts at a time. A file says which commit it knows all rows of;
opening the index adds those that came later.
"""

from __future__ import annotations

import contextlib
import secrets
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.compute import residency
from shardemb.errors import FormatError
from shardemb.storage import address_space, files
from shardemb.vocabulary import index_files, index_kernels
from shardemb.vocabulary.index_files import EMPTY_LEVEL, PAGE_ENTRIES, Coverage, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.vocabulary.index_files import Level

    Between = Callable[[np.uint64, np.uint64], NDArray[np.uint64]]
    Run = Callable[[Sequence[Callable[[], None]]], None]

PART_BITS = 19
"""Most pairs of a part, as a power of two: each core merges and writes 11 MiB in one call."""

PARTS_PER_ROUND = 16
"""Parts that are merged while those of the round before reach the disk and replace older ones. The next round uses
their memory again: other memory may be slow to get, because a virtual machine may have returned it to its host."""

OPEN_PAIRS = 2**20, 12 * 2**20
"""How many pairs the hash table holds before it is merged: half as many as the files, but within these limits."""

_FIRST_BUCKETS = 1024
_LOAD_FACTOR = 0.75
"""Largest share of the buckets of the hash table that may be taken, and share of the buckets of a part that are."""

PARALLEL_PAIRS = 2**13
"""From this many pairs on, two threads insert them, each into half of the table. Fewer are not worth waking one."""

SAMPLES = 32
"""Hashes of a batch whose pages are checked to be in memory, to decide whether to read the pages of all ahead."""

_QUICKLY_INDEXED = 2**16
"""Pairs that an opening indexes in no time."""

_TRIES = 10
"""How often a reader tries to open files that a writer may be replacing meanwhile."""

_STALE = 2**16
"""How many useless pairs an index may have in addition to as many as there are useful ones."""


class HashTable(NamedTuple):
    """The pairs in memory, in the arrays that ``index_kernels.py`` describes."""

    buckets: NDArray[np.uint64]
    filters: NDArray[np.uint8]
    salt: np.uint64


class View(NamedTuple):
    """A snapshot of an index: all pairs that it held when this was taken, in an order that does not change."""

    table: HashTable
    level: Level

    def probe(
        self, hashes: NDArray[np.uint64], skip: int, end: int, out: Int64Array, start: int, stop: int
    ) -> None:
        """Set ``out[i]`` to the ``skip + 1``-th row below `end` that may hold the key of ``hashes[i]``, or to -1."""
        table, level = self
        index_kernels.probe(
            *table, level.spans, level.entries, level.bits, hashes, skip, end, out, start, stop
        )

    def read_ahead(self, hashes: NDArray[np.uint64]) -> None:
        """Start to read the pages in which lookups of `hashes` search, unless a sample finds them in memory."""
        level = self.level
        if not level.entries.size or not hashes.size:
            return
        if not _are_resident(level.entries, level.buckets(hashes[:: max(1, hashes.size // SAMPLES)])):
            _read_ahead(level.entries, np.sort(level.buckets(hashes)))


class _Merging(NamedTuple):
    """What the parts of one merge have in common."""

    bits: int
    between: Between
    coverage: Coverage
    buffers: list[NDArray[np.uint64]]

    def buffer(self, entries: int) -> NDArray[np.uint64]:
        """Return a buffer for a header and entries, reusing one if possible: new memory costs more than the merging."""
        entries += PAGE_ENTRIES
        try:
            buffer = self.buffers.pop()
        except IndexError:
            buffer = EMPTY_LEVEL.entries
        return buffer if buffer.shape[0] >= entries else np.empty((entries + entries // 8, 2), np.uint64)


class KeyIndex:
    """The index of one vocabulary. Reading needs no lock; callers of everything else hold the store's lock.

    Parameters
    ----------
    folder : Path
        Folder of its files. It need not exist.
    identity : str
        The vocabulary's uuid.
    run : callable
        Runs functions concurrently.
    writable : bool
        Whether the files may be replaced. Otherwise all pairs that they do not hold stay in memory.
    """

    def __init__(self, folder: Path, identity: str, run: Run, *, writable: bool) -> None:
        self._folder, self._identity, self._run, self._writable = folder, identity, run, writable
        self._level, self._damaged = EMPTY_LEVEL, False
        self._files: dict[str, Part] = {}
        self._table, self._open_pairs = _empty_table(_FIRST_BUCKETS, np.uint64(0)), 0

    def load(self, now: Coverage) -> None:
        """Open the files, if they belong to this vocabulary and know no more than the commit `now`."""
        for _ in range(1 if self._writable else _TRIES):
            with contextlib.suppress(FormatError, OSError):
                self._level = index_files.read(self._folder, self._identity, now)
                break
        if not self._writable:
            return
        if self.has_files:
            self._files = {part.name: part for part in self._level.parts}
            # A later commit may reach what they claim to know, as below.
            if index_files.remove_others(self._folder, self._files):
                files.sync_directory(self._folder)
        elif files.is_directory(self._folder) or files.size(self._folder) is not None:
            files.remove_tree(self._folder)  # a later commit may reach what it claims to know, and trust it
            files.sync_directory(self._folder.parent)

    def empty_copy(self) -> KeyIndex:
        """Return an empty index of the same vocabulary, with a folder of its own."""
        folder = self._folder.with_name(self._folder.name + ".new")
        return KeyIndex(folder, self._identity, self._run, writable=self._writable)

    def retire(self) -> Path:
        """Remove the files and write no others; return the folder where they were.

        Raises
        ------
        OSError
            Some files may be left. The index must be rebuilt at some later time.
        """
        self._damaged = (
            True  # if some files stay, nothing may be merged with them, and the index must be rebuilt
        )
        files.remove_tree(self._folder)
        return self._folder

    def relocate(self, folder: Path) -> None:
        """Move the files to a path where there is no folder, and make that durable.

        Callers may then forget which rows were reassigned before the new files were written. Should the old files come
        back after a loss of power, an opening could not complete them.

        Raises
        ------
        OSError
            It may not be durable. The old index must be kept in use.
        """
        if self.has_files:
            files.rename(self._folder, folder)
        if files.is_directory(folder.parent):
            files.sync_directory(folder.parent)
        self._folder = folder

    def remove_files(self) -> None:
        """Remove the files of an index that is no longer used, if that is possible."""
        with contextlib.suppress(OSError):
            files.remove_tree(self._folder)

    # ---- reading

    def __len__(self) -> int:
        """Return the number of pairs, useless ones included; while pairs are added or merged, no less than that."""
        opened = self._open_pairs  # before the level: a merge moves them there
        return self._level.pairs + opened

    @property
    def has_files(self) -> bool:
        """Whether the index has files, opened or written."""
        return self._level is not EMPTY_LEVEL

    @property
    def coverage(self) -> Coverage:
        """What the files are known to cover."""
        return self._level.coverage

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes in memory and on disk."""
        table = self._table
        on_disk = files.allocated(self._folder) if self.has_files else 0
        return table.buckets.nbytes + table.filters.nbytes, on_disk

    @property
    def view(self) -> View:
        """A snapshot for lookups."""
        # The table before the level: pairs that are merged in between are then in both, rather than in neither.
        table = self._table
        return View(table, self._level)

    # ---- changing

    def add(self, hashes: NDArray[np.uint64], rows: Int64Array, coverage: Coverage) -> None:
        """Add pairs. `coverage` is what the index covers without them.

        If a file is damaged, no new ones are written: they would look sound, and lack pairs that they claim to have.

        Raises
        ------
        DiskFullError, OSError
            There is no space for new files. Some of the pairs were added, which does no harm.
        """
        most = self._open_limit()
        start = 0
        while start < hashes.size:
            stop = min(start + most - self._open_pairs, hashes.size)
            self._reserve(self._open_pairs + stop - start)
            self._open_pairs += stop - start  # before the pairs are there: `len` may be read concurrently
            self._insert(hashes[start:stop], rows[start:stop])
            start = stop
            if self._open_pairs >= most:
                self._try_to_merge(coverage)
                most = self._open_limit()

    def checkpoint(self, coverage: Coverage) -> None:
        """Merge now, if an opening would take long to index what is in memory only; raises what `add` raises."""
        if (
            self._writable
            and not self._damaged
            and self._open_pairs > max(_QUICKLY_INDEXED, self._level.pairs // 16)
        ):
            self._try_to_merge(coverage)

    def _try_to_merge(self, coverage: Coverage) -> None:
        try:
            self.merge(coverage)
        except FormatError:
            self._damaged = True

    def is_stale(self, live: int) -> bool:
        """Return whether the index should be rebuilt: it is damaged, or too few of its pairs belong to `live` keys."""
        return self._damaged or len(self) > 2 * live + _STALE

    def merge(self, coverage: Coverage) -> None:
        """Write new files with the pairs of the present ones and of the hash table.

        Raises
        ------
        DiskFullError, OSError
            There is no space. Some files may be new and others old; no pair is lost.
        FormatError
            A file is damaged. Otherwise as above.
        """
        if not self.has_files:
            files.remove_tree(self._folder)
            self._files = {}
        files.make_directory(self._folder)
        bits = max(self._level.bits, (max(len(self), 1) - 1).bit_length() - PART_BITS)
        merging = _Merging(bits, _range_reader(self._table), coverage, [])
        written: list[Part] = []
        try:
            # One round more than there are parts to merge: it publishes the last ones.
            for start in range(0, 2**bits + PARTS_PER_ROUND, PARTS_PER_ROUND):
                numbers = range(start, min(start + PARTS_PER_ROUND, 2**bits))
                before, written = written, []
                writing = [partial(self._write, merging, number, written) for number in numbers]
                self._run([partial(self._publish, before), *writing])
        except BaseException:
            index_files.remove_others(self._folder, self._files)
            raise
        self._table, self._open_pairs = _empty_table(_FIRST_BUCKETS, np.uint64(0)), 0

    def _write(self, merging: _Merging, number: int, written: list[Part]) -> None:
        """Merge the pairs of one part, and stage its file."""
        level, bits = self._level, merging.bits
        first, last = (np.uint64(n) for n in (number << 64 - bits, (number + 1 << 64 - bits) - 1))
        new, old = merging.between(first, last), EMPTY_LEVEL.entries
        pairs = new.shape[0]
        if level.by_prefix:
            source = level.by_prefix[number >> (bits - level.bits)]
            index_files.read_ahead(self._folder, source)
            # Several new parts may come from one old part, which the first of them checks.
            is_first = level.first_prefix(source) << (bits - level.bits) == number
            if is_first and not level.is_sound(source, self._identity):
                msg = f"{self._folder / source.name} is not what was written"
                raise FormatError(msg)
            old = level.between(first, last)
            pairs += (
                source.pairs
                if source.bits == bits
                else int(np.count_nonzero(old[:, 1] != index_kernels.NO_ROW))
            )
        buckets = int(pairs / _LOAD_FACTOR)
        buffer = merging.buffer(buckets + pairs + index_kernels.SLACK)
        entries = buffer[PAGE_ENTRIES:]
        counts = np.empty(2, np.int64)
        index_kernels.merge(new, old, first, bits, buckets, entries, counts)
        stop, pairs = counts.tolist()
        total = index_files.checksum(entries[:stop])
        part = Part(bits, number, pairs, buckets, stop, merging.coverage, total)
        index_files.stage(self._folder, self._identity, part, buffer[: PAGE_ENTRIES + stop])
        merging.buffers.append(buffer)
        written.append(part)

    def _publish(self, parts: Sequence[Part]) -> None:
        """Put staged parts in the place of older ones."""
        if not parts:
            return
        for part in parts:
            files.sync_file(files.staged(self._folder / part.name))
        for part in parts:
            files.rename(files.staged(self._folder / part.name), self._folder / part.name)
            self._files[part.name] = part
        # Before any older part is removed: a loss of power must leave one of both.
        files.sync_directory(self._folder)
        by_prefix = index_files.assign_prefixes(self._files.values())
        if by_prefix:  # the first files of an index are incomplete until the last round
            self._level = index_files.map_parts(self._folder, by_prefix)
            for name in self._files.keys() - {part.name for part in by_prefix}:
                files.remove(self._folder / name)
                del self._files[name]

    def check(self) -> bool:
        """Return whether the files are what was written."""
        return all(self._level.is_sound(part, self._identity) for part in self._level.parts)

    # ---- within

    def _insert(self, hashes: NDArray[np.uint64], rows: Int64Array) -> None:
        """Put pairs into the hash table, which has space for them."""
        remaining = np.zeros(hashes.size, np.bool_)
        capacity = self._table.filters.size
        middle = capacity // 2
        ranges = ((0, middle), (middle, capacity)) if hashes.size >= PARALLEL_PAIRS else ((0, capacity),)
        insert = partial(index_kernels.insert, *self._table, hashes, rows, remaining)
        self._run([partial(insert, *bounds) for bounds in ranges])
        # Pairs that would lie behind the end of their half, or too far from their bucket, come in one range; those that
        # would still lie too far come after a rehash with a salt.
        while remaining.any():
            hashes, rows = hashes[remaining], rows[remaining]
            remaining = np.zeros(hashes.size, np.bool_)
            index_kernels.insert(*self._table, hashes, rows, remaining, 0, capacity)
            if remaining.any():
                self._rehash(capacity, new_salt())

    def _open_limit(self) -> int:
        if not self._writable or self._damaged:
            return 2**62
        least, most = OPEN_PAIRS
        return max(least, min(self._level.pairs // 2, most))

    def _reserve(self, pairs: int) -> None:
        size = self._table.buckets.shape[0]
        if pairs <= _LOAD_FACTOR * size:
            return
        while pairs > _LOAD_FACTOR * size:
            size *= 8  # moving pairs costs more than memory, of which only touched pages are allocated
        limit = int(self._open_limit() / _LOAD_FACTOR) + 1  # no more than can ever be used before a merge
        self._rehash(max(min(size, limit), int(pairs / _LOAD_FACTOR) + 1), self._table.salt)

    def _rehash(self, capacity: int, salt: np.uint64) -> None:
        """Move the pairs to a new table, with a new salt if one of them would lie too far from its bucket there."""
        moved = _empty_table(capacity, salt)
        if index_kernels.insert_all(*moved, self._table.buckets):
            self._table = moved
        else:
            self._rehash(capacity, new_salt())


def new_salt() -> np.uint64:
    """Draw a secret random number other than 0."""
    return np.uint64(secrets.randbits(64) | 1)


def _empty_table(capacity: int, salt: np.uint64) -> HashTable:
    return HashTable(np.zeros((capacity, 2), np.uint64), np.zeros(capacity, np.uint8), salt)


def _range_reader(table: HashTable) -> Between:
    """Return the function that lists the pairs of a table whose hashes lie between two, sorted by hash."""
    if table.salt:  # buckets do not ascend with hashes, so sort all pairs once
        pairs = table.buckets[table.buckets[:, 1] != 0] - np.array([0, 1], np.uint64)
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]

    def between(first: np.uint64, last: np.uint64) -> NDArray[np.uint64]:
        if table.salt:
            begin, end = np.searchsorted(pairs[:, 0], first), np.searchsorted(pairs[:, 0], last, "right")
            found: NDArray[np.uint64] = pairs[begin:end]
            return found
        out = np.empty((index_kernels.count_between(table.buckets, first, last), 2), np.uint64)
        index_kernels.take_between(table.buckets, first, last, out)
        return out

    return between


_NO_SLOTS = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32), 0, np.empty(0, np.uint8)
"""What tells the kernels of rows that all items are in the file, and none in a slot."""


def _are_resident(array: NDArray[Any], places: Int64Array) -> bool:
    """Return whether most of some items of a mapped array are in memory, or the kernel does not say."""
    found = residency.sample_resident(array.ctypes.data, array.strides[0], *_NO_SLOTS, places, places.size)
    return not 0 <= int(found) < 0.9 * places.size


def _read_ahead(array: NDArray[Any], places: Int64Array) -> None:
    """Start to read the pages of some items, ascending, of a mapped array."""
    address, nbytes = array.ctypes.data, array.strides[0]
    first = address % PAGE // nbytes
    pages = files.ADVISED // PAGE
    residency.advise(
        address - address % PAGE,
        nbytes,
        *_NO_SLOTS,
        places + first,
        address_space.MADV_WILLNEED,
        pages,
        0,
        places.size,
    )
