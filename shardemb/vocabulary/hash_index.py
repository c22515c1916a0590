"""From the hash of a key to the rows that may be its own: a hint, which can be lost and made anew.

What a vocabulary *says* lies in its tables, which commits protect: the key of each row. The index only tells where to
look. It may name rows that hold another key, or none, by now: whoever asks compares. It never leaves out a row that
holds the key. So nothing is taken out of it, by removals or rollbacks, until it is made anew.

Most of it lies in files that never change (``keyparts.py``). New pairs go into slots in memory; when those are many,
files and slots are merged into the next files, a few parts of the hashes after the others. A file says which commit it
knows the rows of: opening adds those that came later.
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
"""Pairs of a part, at most, as a power of two: 11 MiB are merged and written at once, by each core."""

PARTS_PER_ROUND = 16
"""Parts that are merged while those before them reach the disk, and take the place of older ones. The memory of these
is that of the next: where the kernel has to find other, a virtual machine may have given it back to its host."""

OPEN_PAIRS = 2**20, 12 * 2**20
"""Pairs that slots hold before they are merged: half of those in the files, within these."""

_FIRST_BUCKETS = 1024
_LOAD_FACTOR = 0.75
"""Share of the slots that may be taken, and share of the homes of a part that are."""

PARALLEL_PAIRS = 2**13
"""Pairs that are put into slots by two threads, each in half of them; fewer are not worth waking one."""

SAMPLES = 32
"""Hashes of a batch whose pages are looked for in memory, to tell whether to ask for all of them."""

_QUICKLY_INDEXED = 2**16
"""Pairs that an opening learns in no time."""

_TRIES = 10
"""How often files are looked for that a writer beside this reader may be replacing."""

_STALE = 2**16
"""Pairs of no use that an index may have beside as many as those of use."""


class HashTable(NamedTuple):
    """What lies in memory, as `probing` has it."""

    buckets: NDArray[np.uint64]
    filters: NDArray[np.uint8]
    salt: np.uint64


class View(NamedTuple):
    """What an index holds: all that it held when this was taken, in an order that stays."""

    table: HashTable
    level: Level

    def probe(
        self, hashes: NDArray[np.uint64], skip: int, end: int, out: Int64Array, start: int, stop: int
    ) -> None:
        """Set ``out[i]`` to a row below `end` that may hold the key of ``hashes[i]``, the `skip`-th of them, or -1."""
        table, level = self
        index_kernels.probe(
            *table, level.spans, level.entries, level.bits, hashes, skip, end, out, start, stop
        )

    def read_ahead(self, hashes: NDArray[np.uint64]) -> None:
        """Ask for the pages of the files in which hashes are looked for, unless a sample finds them in memory."""
        level = self.level
        if not level.entries.size or not hashes.size:
            return
        if not _are_resident(level.entries, level.buckets(hashes[:: max(1, hashes.size // SAMPLES)])):
            _ask(level.entries, np.sort(level.buckets(hashes)))


class _Merging(NamedTuple):
    """What all parts that are merged have in common."""

    bits: int
    between: Between
    coverage: Coverage
    buffers: list[NDArray[np.uint64]]

    def buffer(self, entries: int) -> NDArray[np.uint64]:
        """Take room for a header and entries, used again: its first touch would cost more than the merging."""
        entries += PAGE_ENTRIES
        try:
            buffer = self.buffers.pop()
        except IndexError:
            buffer = EMPTY_LEVEL.entries
        return buffer if buffer.shape[0] >= entries else np.empty((entries + entries // 8, 2), np.uint64)


class KeyIndex:
    """The index of one vocabulary. Reading needs no lock; everything else is under the store's.

    Parameters
    ----------
    folder : Path
        Of its files, which need not exist.
    identity : str
        The vocabulary's uuid.
    run : callable
        Runs functions side by side.
    writable : bool
        Whether the files may be replaced; otherwise all that they do not hold stays in memory.

    """

    def __init__(self, folder: Path, identity: str, run: Run, *, writable: bool) -> None:
        self._folder, self._identity, self._run, self._writable = folder, identity, run, writable
        self._level, self._damaged = EMPTY_LEVEL, False
        self._files: dict[str, Part] = {}
        self._table, self._open_pairs = _empty_table(_FIRST_BUCKETS, np.uint64(0)), 0

    def load(self, now: Coverage) -> None:
        """Open the files, if they are those of this vocabulary and know no more than the commit `now`."""
        for _ in range(1 if self._writable else _TRIES):
            with contextlib.suppress(FormatError, OSError):
                self._level = index_files.read(self._folder, self._identity, now)
                break
        if not self._writable:
            return
        if self.has_files:
            self._files = {part.name: part for part in self._level.parts}
            index_files.remove_others(self._folder, self._files)
        elif self._folder.exists():
            files.remove_tree(self._folder)  # or a later commit might believe it
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
            Some files may be left. The index has to be rebuilt some time.
        """
        self._damaged = True
        files.remove_tree(self._folder)
        return self._folder

    def relocate(self, folder: Path) -> None:
        """Move the files to where no folder is."""
        if self.has_files:
            files.rename(self._folder, folder)
        self._folder = folder

    def remove_files(self) -> None:
        """Remove its files, if that can be; it is not used any more."""
        with contextlib.suppress(OSError):
            files.remove_tree(self._folder)

    # ---- reading

    def __len__(self) -> int:
        """Return the number of pairs, those of no use included; at least that, while they are added."""
        opened = self._open_pairs  # before the level, which takes them over
        return self._level.pairs + opened

    @property
    def has_files(self) -> bool:
        """Whether there are files that it has taken up, or written."""
        return self._level is not EMPTY_LEVEL

    @property
    def coverage(self) -> Coverage:
        """What the files know."""
        return self._level.coverage

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes in memory and on disk."""
        table = self._table
        return table.buckets.nbytes + table.filters.nbytes, files.allocated(
            self._folder
        ) if self.has_files else 0

    @property
    def view(self) -> View:
        """What to look for hashes in."""
        table = self._table  # first: what is merged meanwhile is in both then, and not in none
        return View(table, self._level)

    # ---- changing

    def add(self, hashes: NDArray[np.uint64], rows: Int64Array, coverage: Coverage) -> None:
        """Add pairs. `coverage` is what is known without them.

        Where a file is damaged, there is no next one: it would be sound, and say less than it knows.

        Raises
        ------
        DiskFullError, OSError
            There is no room for the next files. Some of the pairs are there, which does no harm.
        """
        most = self._open_limit()
        start = 0
        while start < hashes.size:
            stop = min(start + most - self._open_pairs, hashes.size)
            self._reserve(self._open_pairs + stop - start)
            self._open_pairs += stop - start  # before they are there, for those who count meanwhile
            self._insert(hashes[start:stop], rows[start:stop])
            start = stop
            if self._open_pairs >= most:
                self._try_to_merge(coverage)
                most = self._open_limit()

    def checkpoint(self, coverage: Coverage) -> None:
        """Merge already what would take as long to be learnt at an opening; raises as `add`."""
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
        """Whether the index should be made anew: it is damaged, or so many pairs are of no use."""
        return self._damaged or len(self) > 2 * live + _STALE

    def merge(self, coverage: Coverage) -> None:
        """Write the next files: what those of now hold, and the slots.

        Raises
        ------
        DiskFullError, OSError
            There is no room. Some files may be the next ones, and others those of before: all that was known is.
        FormatError
            A file is damaged; as before.
        """
        if not self.has_files:
            files.remove_tree(self._folder)
            self._files = {}
        files.make_directory(self._folder)
        bits = max(self._level.bits, (max(len(self), 1) - 1).bit_length() - PART_BITS)
        merging = _Merging(bits, _range_reader(self._table), coverage, [])
        written: list[Part] = []
        try:
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
        """Merge the pairs of one part."""
        level, bits = self._level, merging.bits
        first, last = (np.uint64(n) for n in (number << 64 - bits, (number + 1 << 64 - bits) - 1))
        new, old = merging.between(first, last), EMPTY_LEVEL.entries
        pairs = new.shape[0]
        if level.by_prefix:
            source = level.by_prefix[number >> (bits - level.bits)]
            index_files.read_ahead(self._folder, source)
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
        """Let parts that are staged take the place of older ones."""
        if not parts:
            return
        for part in parts:
            files.sync_file(files.staged(self._folder / part.name))
        for part in parts:
            files.rename(files.staged(self._folder / part.name), self._folder / part.name)
            self._files[part.name] = part
        files.sync_directory(self._folder)
        by_prefix = index_files.assign_prefixes(self._files.values())
        if by_prefix:
            self._level = index_files.map_parts(self._folder, by_prefix)
            for name in self._files.keys() - {part.name for part in by_prefix}:
                files.remove(self._folder / name)
                del self._files[name]

    def check(self) -> bool:
        """Whether the files are what was written."""
        return all(self._level.is_sound(part, self._identity) for part in self._level.parts)

    # ---- within

    def _insert(self, hashes: NDArray[np.uint64], rows: Int64Array) -> None:
        """Put pairs into slots, which have room for them."""
        remaining = np.zeros(hashes.size, np.bool_)
        capacity = self._table.filters.size
        middle = capacity // 2
        ranges = ((0, middle), (middle, capacity)) if hashes.size >= PARALLEL_PAIRS else ((0, capacity),)
        insert = partial(index_kernels.insert, *self._table, hashes, rows, remaining)
        self._run([partial(insert, *bounds) for bounds in ranges])
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
            size *= 8  # to move the pairs costs more than the memory, which is not touched before
        limit = int(self._open_limit() / _LOAD_FACTOR) + 1  # no more than can ever be in use
        self._rehash(max(min(size, limit), int(pairs / _LOAD_FACTOR) + 1), self._table.salt)

    def _rehash(self, capacity: int, salt: np.uint64) -> None:
        """Have the pairs in other slots, by a new salt if they lie too far from their homes there."""
        moved = _empty_table(capacity, salt)
        if index_kernels.insert_all(*moved, self._table.buckets):
            self._table = moved
        else:
            self._rehash(capacity, new_salt())


def new_salt() -> np.uint64:
    """Draw a number, not 0, that nobody else knows."""
    return np.uint64(secrets.randbits(64) | 1)


def _empty_table(capacity: int, salt: np.uint64) -> HashTable:
    return HashTable(np.zeros((capacity, 2), np.uint64), np.zeros(capacity, np.uint8), salt)


def _range_reader(table: HashTable) -> Between:
    """Return the function that lists the pairs in slots whose hashes lie between two, ascending."""
    if table.salt:
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
"""What tells the kernels that all rows are in the file."""


def _are_resident(array: NDArray[Any], places: Int64Array) -> bool:
    """Whether most of some items of an array over a file are in memory, or the kernel does not tell."""
    found = residency.sample_resident(array.ctypes.data, array.strides[0], *_NO_SLOTS, places, places.size)
    return not 0 <= int(found) < 0.9 * places.size


def _ask(array: NDArray[Any], places: Int64Array) -> None:
    """Ask for the pages of items, ascending, of an array over a file."""
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
