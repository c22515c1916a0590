"""The files of the index of keys. Each holds the pairs of hash and row whose hashes begin with the same bits.

Such a file, called a *part*, never changes. A merge replaces it by a newer part, or by several whose hashes share more
bits. An interrupted merge leaves a mix of old and new parts, and their union is still a valid index. Layout of a
part::

    page 0      JSON, padded with blanks: format_version, uuid, bits, number, pairs, homes, entries, coverage,
                checksum of the entries, crc32
    entries     uint64 (entries, 2): hash, row; the row is -1 in a gap between pairs (``index_kernels.py``)
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb.base.sizes import PAGE, round_up
from shardemb.errors import FormatError
from shardemb.format import documents
from shardemb.format.documents import (
    FORMAT_VERSION,
    crc32,
    field,
    int_field,
    parse_json,
    require_version,
    uuid_field,
)
from shardemb.storage import address_space, files
from shardemb.vocabulary import index_kernels

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

PAGE_ENTRIES = PAGE // 16
_MOST_BITS = 24


@dataclass(frozen=True)
class Coverage:
    """What an index is sure to know: every row below `rows` that had a key at a commit, unless reassigned since.

    Attributes
    ----------
    commit : int
        Number of the commit; 0 before the first.
    rows : int
        Number of rows that the vocabulary had ever assigned by then.
    head : int
        How many freed rows it had reassigned by then.
    """

    commit: int = 0
    rows: int = 0
    head: int = 0

    def is_within(self, other: Coverage) -> bool:
        """Return whether the other covers all that this one does."""
        return self.commit <= other.commit and self.rows <= other.rows and self.head <= other.head


@dataclass(frozen=True)
class Part:
    """One file of the index, as its header describes it.

    Attributes
    ----------
    bits, number : int
        How many first bits its hashes share, and the number that these bits form: the prefix of the part.
    pairs, homes, entries : int
        How many pairs, buckets and entries it has. The code calls buckets what the header, on disk, calls homes.
    coverage : Coverage
        What the index covered when the part was written.
    checksum : int
        Checksum of the entries.
    """

    bits: int
    number: int
    pairs: int
    homes: int
    entries: int
    coverage: Coverage
    checksum: int

    @property
    def name(self) -> str:
        """Name of the file, from the prefix."""
        return f"{self.bits:02}-{self.number:x}"

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return PAGE + 16 * self.entries

    def prefixes(self, bits: int) -> range:
        """List the prefixes of `bits` bits that its hashes have; `bits` is no less than its own."""
        more = bits - self.bits
        return range(self.number << more, (self.number + 1) << more)

    def header(self, identity: str) -> bytes:
        """Return the first page of the file."""
        header: dict[str, object] = {"format_version": FORMAT_VERSION, "uuid": identity}
        header |= vars(self) | {"coverage": vars(self.coverage)}
        header["crc32"] = crc32(header)
        return json.dumps(header).encode().ljust(PAGE)


class Level(NamedTuple):
    """Parts that together cover all hashes, mapped as one array.

    Attributes
    ----------
    spans, entries, bits
        The arrays that ``index_kernels.py`` describes, and how many bits of a hash select a span.
    pairs : int
        Number of pairs; while a merge replaces parts, no less than that.
    by_prefix : tuple of Part
        For each prefix of `bits` bits, the part that holds its hashes.
    """

    spans: Int64Array
    entries: NDArray[np.uint64]
    bits: int
    pairs: int
    by_prefix: tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts, each of them once."""
        return tuple(dict.fromkeys(self.by_prefix))

    @property
    def coverage(self) -> Coverage:
        """What all parts cover."""
        known = [part.coverage for part in self.parts] or [Coverage()]
        return Coverage(*(min(getattr(each, name) for each in known) for name in ("commit", "rows", "head")))

    def buckets(self, hashes: NDArray[np.uint64]) -> Int64Array:
        """Return the entries at which the searches for hashes begin."""
        found = np.empty(hashes.size, np.int64)
        index_kernels.entry_buckets(self.spans, self.bits, np.ascontiguousarray(hashes), found)
        return found

    def between(self, first: np.uint64, last: np.uint64) -> NDArray[np.uint64]:
        """Return the entries from hash `first` to hash `last`, both of one part and included."""
        bounds = np.empty(2, np.int64)
        index_kernels.entries_between(self.spans, self.entries, self.bits, first, last, bounds)
        return self.entries[slice(*bounds.tolist())]

    def first_prefix(self, part: Part) -> int:
        """Return the first prefix whose hashes are in a part. Newer parts may have replaced it for others."""
        return next(n for n in part.prefixes(self.bits) if self.by_prefix[n] is part)

    def has_header(self, part: Part, identity: str) -> bool:
        """Return whether the file of a part has the header of that part."""
        begin = self.spans[self.first_prefix(part), 0]
        return self.entries[begin - PAGE_ENTRIES : begin].tobytes() == part.header(identity)

    def is_sound(self, part: Part, identity: str) -> bool:
        """Return whether the file of a part is what was written."""
        begin, _, end, _ = self.spans[self.first_prefix(part)].tolist()
        return self.has_header(part, identity) and checksum(self.entries[begin:end]) == part.checksum


EMPTY_LEVEL = Level(np.zeros((1, 4), np.int64), np.empty((0, 2), np.uint64), 0, 0, ())


def checksum(entries: NDArray[np.uint64]) -> int:
    """Return the checksum of entries."""
    return documents.checksum(entries.data.cast("B")) if entries.size else 0


def stage(folder: Path, identity: str, part: Part, content: NDArray[np.uint64]) -> None:
    """Write a part, without publishing it. `content` is its entries, behind space for the header."""
    content[:PAGE_ENTRIES].data.cast("B")[:] = part.header(identity)
    path = files.staged(folder / part.name)
    with files.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        # In one call, so that the page cache holds it in large pages, which makes lookups faster.
        files.write(descriptor, content.data.cast("B"), 0, path)
        files.begin_write_back(descriptor, 0, content.nbytes)


def read_ahead(folder: Path, part: Part) -> None:
    """Start to read a whole part, which will be needed soon."""
    path = folder / part.name
    with files.opened(path, os.O_RDONLY) as descriptor:
        files.will_need(descriptor, 0, part.nbytes)


def remove_others(folder: Path, names: Collection[str]) -> bool:
    """Remove everything from a folder except the files with some names; return whether there was anything."""
    others = [path for path in files.entries(folder) if path.name not in names]
    for path in others:
        files.remove_tree(path)
    return bool(others)


def read(folder: Path, identity: str, now: Coverage) -> Level:
    """Map the parts in a folder, trusting nothing that they say about themselves.

    Parts that know more than the commit `now` are ignored.

    Raises
    ------
    FormatError, OSError
        The parts do not cover all hashes, or one of them was removed or replaced meanwhile.
    """
    parts = []
    for path in files.entries(folder):
        with contextlib.suppress(FormatError, OSError):  # anything but a part is ignored
            parts.append(_read(path, identity))
    parts = [part for part in parts if part.coverage.is_within(now)]
    by_prefix = assign_prefixes(parts)
    if by_prefix is None:
        msg = f"{folder}: parts of the index are missing"
        raise FormatError(msg)
    level = map_parts(folder, by_prefix)
    if not all(level.has_header(part, identity) for part in level.parts):
        msg = f"{folder}: a part was replaced while it was opened"  # by a concurrent writer
        raise FormatError(msg)
    return level


def assign_prefixes(parts: Iterable[Part]) -> tuple[Part, ...] | None:
    """Return for each prefix the part with the most bits that has it; None if a prefix is in no part.

    The prefixes have as many bits as the part with the most.
    """
    ordered = sorted(parts, key=lambda part: part.bits)
    found: list[Part | None] = [None] * 2 ** ordered[-1].bits if ordered else [None]
    for part in ordered:
        prefixes = part.prefixes(ordered[-1].bits)
        found[prefixes.start : prefixes.stop] = [part] * len(prefixes)
    whole = tuple(part for part in found if part is not None)
    return whole if len(whole) == len(found) else None


def map_parts(folder: Path, by_prefix: tuple[Part, ...]) -> Level:
    """Map parts, given for each prefix, as one array.

    Raises
    ------
    OSError
        A file was removed.
    """
    begins, nbytes = {}, 0
    for part in dict.fromkeys(by_prefix):
        begins[part], nbytes = nbytes, nbytes + round_up(part.nbytes, address_space.HUGE_PAGE)
    memory = address_space.AddressRange(nbytes)
    for part, begin in begins.items():
        memory.map_file(begin, folder / part.name, round_up(part.nbytes, PAGE))
    memory.advise(0, nbytes, address_space.MADV_RANDOM)
    firsts = {part: begin // 16 + PAGE_ENTRIES for part, begin in begins.items()}
    spans = [(firsts[part], part.homes, firsts[part] + part.entries, part.bits) for part in by_prefix]
    entries = memory.array(np.uint64, (nbytes // 16, 2))
    pairs = sum(part.pairs for part in begins)
    return Level(np.array(spans), entries, (len(by_prefix) - 1).bit_length(), pairs, by_prefix)


def _read(path: Path, identity: str) -> Part:
    """Read the header of a file, trusting nothing of it."""
    with files.opened(path, os.O_RDONLY) as descriptor:
        page = bytes(files.read_at(descriptor, PAGE, 0, path))
    header = parse_json(page.rstrip())
    require_version(header)
    bits = int_field(header, "bits", _MOST_BITS, minimum=0)
    number = int_field(header, "number", 2**bits - 1, minimum=0)
    pairs, homes, entries = (
        int_field(header, name, 2**40, minimum=0) for name in ("pairs", "homes", "entries")
    )
    coverage = field(header, "coverage", dict)
    known = Coverage(
        **{name: int_field(coverage, name, 2**62, minimum=0) for name in ("commit", "rows", "head")}
    )
    total = int_field(header, "checksum", 2**64 - 1, minimum=0)
    part = Part(bits, number, pairs, homes, entries, known, total)
    if uuid_field(header) != identity or part.header(identity) != page or part.name != path.name:
        msg = f"{path} is not a part of this index"
        raise FormatError(msg)
    if files.size(path) != part.nbytes or pairs > entries:
        msg = f"{path} has {files.size(path)} bytes instead of {part.nbytes}"
        raise FormatError(msg)
    return part
