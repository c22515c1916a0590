"""From the hash of a key to the rows that may be its own: a hint, which can be lost and made anew.

What a vocabulary *says* lies in its tables, which commits protect: the key of each row. The index only tells where to
look. It may name rows that hold another key, or none, by now: whoever asks compares. It never leaves out a row that
holds the key. So nothing is taken out of it, by removals or rollbacks, until it is made anew.

Most of it is a file that never changes, sorted by hash (``probing.py``). New pairs go into slots in memory; when those
are many, file and slots are merged into the next file, one part of the hashes after the other. The file says which
commit it knows the rows of: opening adds those that came later. ::

    page 0      JSON, padded with blanks: format_version, uuid, pairs, entries, parts, coverage, crc32
    spans       int64 (2**parts + 1, 2): the first entry of each part, and how many homes it has
    entries     uint64 (entries, 2): hash, row; -1 where there is none
    sums        uint64 (1 + 2**parts): checksums of the spans, and of the entries of each part
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardemb import files, kernels, probing, replay
from shardemb.errors import FormatError
from shardemb.spec import (
    FORMAT_VERSION,
    PAGE,
    crc32,
    field,
    int_field,
    parse_json,
    require_version,
    round_up,
    uuid_field,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.arrays import Int64Array

    Between = Callable[[np.uint64, np.uint64], NDArray[np.uint64]]
    Run = Callable[[Sequence[Callable[[], None]]], None]

PART_BITS = 18
"""Pairs of a part, on average, as a power of two: 5 MiB are merged and written at once."""

OPEN_PAIRS = 2**20, 2**23
"""Pairs that slots hold before they are merged: half of those in the file, within these."""

_FIRST_SLOTS = 1024
_FULL = 0.75
"""Share of the slots that may be taken, and share of the homes of a part that are."""

SAMPLES = 32
"""Hashes of a batch whose pages are looked for in memory, to tell whether to ask for all of them."""

_STALE = 2**16
"""Pairs of no use that an index may have beside as many as those of use."""


@dataclass(frozen=True)
class Coverage:
    """What an index knows for certain: every live row below `rows` of a commit, but those given away anew since.

    Attributes
    ----------
    commit : int
        Number of the commit; 0 before the first.
    rows : int
        Rows that the vocabulary had ever given out by then.
    head : int
        How many freed rows it had given out again.
    """

    commit: int = 0
    rows: int = 0
    head: int = 0


class Slots(NamedTuple):
    """What lies in memory, as `probing` has it."""

    pairs: NDArray[np.uint64]
    marks: NDArray[np.uint8]
    salt: np.uint64


class Level(NamedTuple):
    """What lies in the file, mapped."""

    spans: Int64Array
    entries: NDArray[np.uint64]
    parts: int
    pairs: int
    sums: NDArray[np.uint64]

    def homes(self, hashes: NDArray[np.uint64]) -> Int64Array:
        """Where among the entries hashes belong."""
        found = np.empty(hashes.size, np.int64)
        probing.entry_homes(self.spans, self.entries, self.parts, np.ascontiguousarray(hashes), found)
        return found


NOTHING = Level(np.zeros((2, 2), np.int64), np.empty((0, 2), np.uint64), 0, 0, np.empty(0, np.uint64))


class View(NamedTuple):
    """What an index holds: all that it held when this was taken, in an order that stays."""

    slots: Slots
    level: Level

    def probe(
        self, hashes: NDArray[np.uint64], skip: int, end: int, out: Int64Array, start: int, stop: int
    ) -> None:
        """Set ``out[i]`` to a row below `end` that may hold the key of ``hashes[i]``, the `skip`-th of them, or -1."""
        slots, level = self
        probing.probe(*slots, level.spans, level.entries, level.parts, hashes, skip, end, out, start, stop)

    def read_ahead(self, hashes: NDArray[np.uint64]) -> None:
        """Ask for the pages of the file in which hashes are looked for, unless a sample finds them in memory."""
        level = self.level
        if not level.entries.size or not hashes.size:
            return
        last = level.entries.shape[0] - 1
        if not _are_resident(
            level.entries, np.minimum(level.homes(hashes[:: max(1, hashes.size // SAMPLES)]), last)
        ):
            _ask(level.entries, np.sort(np.minimum(level.homes(hashes), last)))


class KeyIndex:
    """The index of one vocabulary. Reading needs no lock; everything else is under the store's.

    Parameters
    ----------
    path : Path
        Its file, which need not exist.
    identity : str
        The vocabulary's uuid.
    run : callable
        Runs functions side by side.
    writable : bool
        Whether the file may be replaced; otherwise all that it does not hold stays in memory.

    Attributes
    ----------
    coverage : Coverage
        Of the file.
    """

    def __init__(self, path: Path, identity: str, run: Run, *, writable: bool) -> None:
        self._path, self._identity, self._run, self._writable = path, identity, run, writable
        self.coverage = Coverage()
        self._level, self._damaged = NOTHING, False
        self._slots, self._open = _no_pairs(_FIRST_SLOTS, np.uint64(0)), 0

    def take_up(self, now: Coverage) -> None:
        """Take up the file, if it is one of this vocabulary and knows no more than the commit `now`."""
        with contextlib.suppress(FormatError, OSError):
            level, coverage = _read(self._path, self._identity)
            if coverage.commit <= now.commit and coverage.rows <= now.rows and coverage.head <= now.head:
                self._level, self.coverage = level, coverage
        if self._writable and not self.has_file and files.size(self._path) is not None:
            files.remove(self._path)  # or a later commit might believe it
            files.sync_directory(self._path.parent)

    # ---- reading

    def __len__(self) -> int:
        """Return the number of pairs, those of no use included; at least that, while they are added."""
        opened = self._open  # before the level, which takes them over
        return self._level.pairs + opened

    @property
    def has_file(self) -> bool:
        """Whether there is a file that it has taken up, or written."""
        return self._level is not NOTHING

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes in memory and on disk."""
        slots = self._slots
        return slots.pairs.nbytes + slots.marks.nbytes, files.allocated(self._path) if self.has_file else 0

    @property
    def view(self) -> View:
        """What to look for hashes in."""
        slots = self._slots  # first: what is merged meanwhile is in both then, and not in none
        return View(slots, self._level)

    # ---- changing

    def add(self, hashes: NDArray[np.uint64], rows: Int64Array, coverage: Coverage) -> None:
        """Add pairs. `coverage` is what is known without them.

        Where the file is damaged, there is no next one: it would be sound, and say less than it knows.

        Raises
        ------
        DiskFullError, OSError
            There is no room for the next file. Some of the pairs are there, which does no harm.
        """
        most = self._limit()
        start = 0
        while start < hashes.size:
            stop = min(start + most - self._open, hashes.size)
            self._reserve(self._open + stop - start)
            self._open += stop - start  # before they are there, for those who count meanwhile
            done = probing.insert(*self._slots, hashes[start:stop], rows[start:stop])
            self._open -= stop - start - done
            start += done
            if start < stop:
                self._move(self._slots.pairs.shape[0], new_salt())
            if self._open >= most:
                self._damaged = not self.check()
                if not self._damaged:
                    self.merge(coverage)
                most = self._limit()

    def is_stale(self, live: int) -> bool:
        """Whether the index should be made anew: it is damaged, or so many pairs are of no use."""
        return self._damaged or len(self) > 2 * live + _STALE

    def merge(self, coverage: Coverage) -> None:
        """Write the next file: that of now, and the slots.

        Raises
        ------
        DiskFullError, OSError
            There is no room; nothing has changed.
        """
        staged = files.staged(self._path)
        files.make_directory(self._path.parent)
        files.remove(staged)
        try:
            with files.opened(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
                self._write_next(descriptor, staged, coverage)
                files.sync(descriptor, staged)
            files.publish(self._path)
        except BaseException:
            files.remove(staged)
            raise
        self._level, self.coverage = _read(self._path, self._identity)
        self._slots, self._open = _no_pairs(_FIRST_SLOTS, np.uint64(0)), 0

    def _write_next(self, descriptor: int, path: Path, coverage: Coverage) -> None:
        parts = max(0, (max(len(self), 1) - 1).bit_length() - PART_BITS)
        spans, pairs = np.zeros((2**parts + 1, 2), np.int64), np.zeros(2**parts, np.int64)
        begin, sums = PAGE + round_up(spans.nbytes, PAGE), np.zeros(1 + 2**parts, np.uint64)
        between = _between(self._slots)
        rest, at = np.empty((0, 2), np.uint64), begin
        for part in range(0, 2**parts, 2):  # two at a time, side by side
            both = range(part, min(part + 2, 2**parts))
            done = [rest] * len(both)

            def merge_one(number: int, done: list[NDArray[np.uint64]] = done, part: int = part) -> None:
                run = self._merged(number, parts, between)
                pairs[number] = run.shape[0]
                spans[number, 1] = homes = int(run.shape[0] / _FULL)
                done[number - part] = entries = _spread(run, number, parts, homes)
                sums[1 + number] = replay.checksum(entries.data.cast("B")) if entries.size else 0

            self._run([partial(merge_one, number) for number in both])
            for number, each in zip(both, done, strict=True):
                spans[number + 1, 0] = spans[number, 0] + each.shape[0]
            whole = np.concatenate([rest, *done])
            # What is written in whole huge pages lies in such in memory, where a lookup finds it sooner.
            size = (at + whole.nbytes) // files.HUGE_PAGE * files.HUGE_PAGE - at
            size = whole.nbytes if both.stop == 2**parts else max(size, 0)
            self._put(descriptor, path, whole[: size // 16], at)
            rest, at = whole[size // 16 :], at + size
        entries = int(spans[-1, 0])
        sums[0] = replay.checksum(spans.data.cast("B"))
        files.write(descriptor, spans.data.cast("B"), PAGE, path)
        files.write(descriptor, sums.data.cast("B"), begin + round_up(16 * entries, PAGE), path)
        header: dict[str, object] = {
            "format_version": FORMAT_VERSION,
            "uuid": self._identity,
            "pairs": int(pairs.sum()),
            "entries": entries,
            "parts": parts,
            "coverage": asdict(coverage),
        }
        header["crc32"] = crc32(header)
        files.write(descriptor, json.dumps(header).encode().ljust(PAGE), 0, path)

    def _merged(self, part: int, parts: int, between: Between) -> NDArray[np.uint64]:
        """Merge the pairs of one part."""
        level, width = self._level, 64 - parts
        first, last = np.uint64(part << width), np.uint64(((part + 1) << width) - 1)
        begin = probing.lower_bound(level.spans, level.entries, level.parts, first)
        end = (
            level.entries.shape[0]
            if part + 1 == 2**parts
            else probing.lower_bound(level.spans, level.entries, level.parts, last + np.uint64(1))
        )
        old, new = level.entries[begin:end], between(first, last)
        out = np.empty((old.shape[0] + new.shape[0], 2), np.uint64)
        return out[: probing.merge(new, old, out)]

    def _put(self, descriptor: int, path: Path, entries: NDArray[np.uint64], at: int) -> None:
        """Write entries at a place in the file, on both cores."""
        data = entries.data.cast("B") if entries.size else memoryview(b"")
        middle = max(at, (at + len(data) // 2) // files.HUGE_PAGE * files.HUGE_PAGE)

        def put(start: int, stop: int) -> None:
            files.write(descriptor, data[start - at : stop - at], start, path)
            files.begin_write_back(descriptor, start, stop - start)

        halves = (at, middle), (middle, at + len(data))
        self._run([partial(put, start, stop) for start, stop in halves if start < stop])

    def check(self) -> bool:
        """Whether the file is what was written."""
        level = self._level
        if level is NOTHING:
            return True
        if replay.checksum(level.spans.data.cast("B")) != int(level.sums[0]):
            return False  # and where the parts begin is not known
        edges = level.spans[:, 0].tolist()
        stretches = [level.entries[begin:end] for begin, end in pairwise(edges)]
        found = [replay.checksum(each.data.cast("B")) if each.size else 0 for each in stretches]
        return bool(found == level.sums[1:].tolist())

    # ---- within

    def _limit(self) -> int:
        if not self._writable or self._damaged:
            return 2**62
        least, most = OPEN_PAIRS
        return max(least, min(self._level.pairs // 2, most))

    def _reserve(self, pairs: int) -> None:
        size = self._slots.pairs.shape[0]
        if pairs <= _FULL * size:
            return
        while pairs > _FULL * size:
            size *= 4  # to move the pairs costs more than the memory, which is not touched before
        limit = int(self._limit() / _FULL) + 1  # no more than can ever be in use
        self._move(max(min(size, limit), int(pairs / _FULL) + 1), self._slots.salt)

    def _move(self, capacity: int, salt: np.uint64) -> None:
        """Have the pairs in other slots, by a new salt if they lie too far from their homes there."""
        moved = _no_pairs(capacity, salt)
        if probing.insert_all(*moved, self._slots.pairs):
            self._slots = moved
        else:
            self._move(capacity, new_salt())


def new_salt() -> np.uint64:
    """Draw a number, not 0, that nobody else knows."""
    return np.uint64(secrets.randbits(64) | 1)


def _spread(run: NDArray[np.uint64], part: int, parts: int, homes: int) -> NDArray[np.uint64]:
    """Lay out the entries of a part."""
    out = np.empty((homes + run.shape[0], 2), np.uint64)
    return out[: probing.spread(run, np.uint64(part << (64 - parts)), parts, homes, out)]


def _no_pairs(capacity: int, salt: np.uint64) -> Slots:
    return Slots(np.zeros((capacity, 2), np.uint64), np.zeros(capacity, np.uint8), salt)


def _between(slots: Slots) -> Between:
    """Return the function that lists the pairs in slots whose hashes lie between two, ascending."""
    if slots.salt:
        pairs = slots.pairs[slots.pairs[:, 1] != 0] - np.array([0, 1], np.uint64)
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]

    def between(first: np.uint64, last: np.uint64) -> NDArray[np.uint64]:
        if slots.salt:
            begin, end = np.searchsorted(pairs[:, 0], first), np.searchsorted(pairs[:, 0], last, "right")
            found: NDArray[np.uint64] = pairs[begin:end]
            return found
        out = np.empty((probing.count_between(slots.pairs, first, last), 2), np.uint64)
        probing.take_between(slots.pairs, first, last, out)
        return out

    return between


_NO_SLOTS = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32), 0, np.empty(0, np.uint8)
"""What tells the kernels that all rows are in the file."""


def _are_resident(array: NDArray[Any], places: Int64Array) -> bool:
    """Whether most of some items of an array over a file are in memory, or the kernel does not tell."""
    found = kernels.sample_resident(array.ctypes.data, array.strides[0], *_NO_SLOTS, places, places.size)
    return not 0 <= int(found) < 0.9 * places.size


def _ask(array: NDArray[Any], places: Int64Array) -> None:
    """Ask for the pages of items, ascending, of an array over a file."""
    address, nbytes = array.ctypes.data, array.strides[0]
    first = address % PAGE // nbytes
    pages = files.ADVISED // PAGE
    kernels.advise(
        address - address % PAGE,
        nbytes,
        *_NO_SLOTS,
        places + first,
        files.MADV_WILLNEED,
        pages,
        0,
        places.size,
    )


def _read(path: Path, identity: str) -> tuple[Level, Coverage]:
    """Map an index's file, believing nothing of what it says about itself.

    Raises
    ------
    FormatError, OSError
        It is not that.
    """
    with files.opened(path, os.O_RDONLY) as descriptor:
        page = bytes(files.read_at(descriptor, PAGE, 0, path))
    header = parse_json(page.rstrip())
    require_version(header)
    if header.get("crc32") != crc32(header) or uuid_field(header) != identity:
        msg = f"{path}: it is not the index of this vocabulary"
        raise FormatError(msg)
    pairs, entries = (int_field(header, name, 2**48, minimum=0) for name in ("pairs", "entries"))
    parts = int_field(header, "parts", 48, minimum=0)
    coverage = field(header, "coverage", dict)
    known = Coverage(
        **{name: int_field(coverage, name, 2**62, minimum=0) for name in ("commit", "rows", "head")}
    )
    begins = PAGE + round_up((2**parts + 1) * 16, PAGE)
    ends = begins + round_up(16 * entries, PAGE)
    nbytes = ends + 8 * (1 + 2**parts)
    if files.size(path) != nbytes or pairs > entries:
        msg = f"{path}: it has {files.size(path)} bytes instead of {nbytes}"
        raise FormatError(msg)
    memory = files.AddressRange(round_up(nbytes, PAGE))
    memory.map_file(0, path, memory.nbytes)
    memory.advise(0, memory.nbytes, files.MADV_RANDOM)
    words = memory.array(np.uint64, (memory.nbytes // 8,))
    if words[: PAGE // 8].tobytes() != page:
        msg = f"{path}: it was replaced while it was opened"  # by a writer beside this reader
        raise FormatError(msg)
    level = Level(
        words[PAGE // 8 :][: 2 * (2**parts + 1)].view(np.int64).reshape(-1, 2),
        words[begins // 8 :][: 2 * entries].reshape(-1, 2),
        parts,
        pairs,
        words[ends // 8 :][: 1 + 2**parts],
    )
    return level, known
