"""The files of the index of keys: in each, the pairs of hash and row whose hashes begin with the same bits.

Such a *part* never changes. A newer one takes its place, or several do that know more bits each: their union is what
counts, wherever that is interrupted. ::

    page 0      JSON, padded with blanks: format_version, uuid, bits, number, pairs, homes, entries, coverage,
                checksum of the entries, crc32
    entries     uint64 (entries, 2): hash, row; -1 where there is none (``probing.py``)
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

    def is_within(self, other: Coverage) -> bool:
        """Whether the other knows all that this does."""
        return self.commit <= other.commit and self.rows <= other.rows and self.head <= other.head


@dataclass(frozen=True)
class Part:
    """One file.

    Attributes
    ----------
    bits, number : int
        With how many bits its hashes begin, and with which.
    pairs, homes, entries : int
        How many it has.
    coverage : Coverage
        What the index knew when it was written.
    checksum : int
        Of the entries.
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
        """Name of the file."""
        return f"{self.bits:02}-{self.number:x}"

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return PAGE + 16 * self.entries

    def prefixes(self, bits: int) -> range:
        """With what its hashes begin, where that many bits of them are told, at least its own."""
        more = bits - self.bits
        return range(self.number << more, (self.number + 1) << more)

    def header(self, identity: str) -> bytes:
        """First page of the file."""
        header: dict[str, object] = {"format_version": FORMAT_VERSION, "uuid": identity}
        header |= vars(self) | {"coverage": vars(self.coverage)}
        header["crc32"] = crc32(header)
        return json.dumps(header).encode().ljust(PAGE)


class Level(NamedTuple):
    """Parts that hold all hashes between them, mapped as one array.

    Attributes
    ----------
    spans, entries, bits
        As `probing` has them.
    pairs : int
        How many there are; at least that, while parts are being replaced by others.
    by_prefix : tuple of Part
        For all of so many bits with which hashes can begin, in which part they lie.
    """

    spans: Int64Array
    entries: NDArray[np.uint64]
    bits: int
    pairs: int
    by_prefix: tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Each part once."""
        return tuple(dict.fromkeys(self.by_prefix))

    @property
    def coverage(self) -> Coverage:
        """What all parts know."""
        known = [part.coverage for part in self.parts] or [Coverage()]
        return Coverage(*(min(getattr(each, name) for each in known) for name in ("commit", "rows", "head")))

    def buckets(self, hashes: NDArray[np.uint64]) -> Int64Array:
        """Where among the entries hashes are looked for."""
        found = np.empty(hashes.size, np.int64)
        index_kernels.entry_buckets(self.spans, self.bits, np.ascontiguousarray(hashes), found)
        return found

    def between(self, first: np.uint64, last: np.uint64) -> NDArray[np.uint64]:
        """Return the entries of two hashes of one part, and all between them."""
        bounds = np.empty(2, np.int64)
        index_kernels.entries_between(self.spans, self.entries, self.bits, first, last, bounds)
        return self.entries[slice(*bounds.tolist())]

    def first_prefix(self, part: Part) -> int:
        """Tell with which bits the first hashes begin that lie in a part; newer ones may hold others of its own."""
        return next(n for n in part.prefixes(self.bits) if self.by_prefix[n] is part)

    def has_header(self, part: Part, identity: str) -> bool:
        """Whether the file of a part says that it is that."""
        begin = self.spans[self.first_prefix(part), 0]
        return self.entries[begin - PAGE_ENTRIES : begin].tobytes() == part.header(identity)

    def is_sound(self, part: Part, identity: str) -> bool:
        """Whether the file of a part is what was written."""
        begin, _, end, _ = self.spans[self.first_prefix(part)].tolist()
        return self.has_header(part, identity) and checksum(self.entries[begin:end]) == part.checksum


EMPTY_LEVEL = Level(np.zeros((1, 4), np.int64), np.empty((0, 2), np.uint64), 0, 0, ())


def checksum(entries: NDArray[np.uint64]) -> int:
    """Checksum of entries."""
    return documents.checksum(entries.data.cast("B")) if entries.size else 0


def stage(folder: Path, identity: str, part: Part, content: NDArray[np.uint64]) -> None:
    """Write a part, which is not one of the folder's yet; `content` is its entries behind room for the header."""
    content[:PAGE_ENTRIES].data.cast("B")[:] = part.header(identity)
    path = files.staged(folder / part.name)
    with files.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as descriptor:
        # At once, so that it lies in huge pages in memory, where a lookup finds it sooner.
        files.write(descriptor, content.data.cast("B"), 0, path)
        files.begin_write_back(descriptor, 0, content.nbytes)


def read_ahead(folder: Path, part: Part) -> None:
    """Ask for all of a part, which will soon be read."""
    path = folder / part.name
    with files.opened(path, os.O_RDONLY) as descriptor:
        files.will_need(descriptor, 0, part.nbytes)


def remove_others(folder: Path, names: Collection[str]) -> None:
    """Remove whatever else is in a folder."""
    for path in folder.iterdir():
        if path.name not in names:
            files.remove_tree(path)


def read(folder: Path, identity: str, now: Coverage) -> Level:
    """Map the parts in a folder, believing nothing of what they say about themselves.

    Those do not count that know more than the commit `now`.

    Raises
    ------
    FormatError, OSError
        They do not hold all hashes, or one is gone meanwhile.
    """
    parts = []
    for path in sorted(folder.iterdir()):
        with contextlib.suppress(FormatError, OSError):  # what is no part counts for nothing
            parts.append(_read(path, identity))
    parts = [part for part in parts if part.coverage.is_within(now)]
    by_prefix = assign_prefixes(parts)
    if by_prefix is None:
        msg = f"{folder}: parts of the index are missing"
        raise FormatError(msg)
    level = map_parts(folder, by_prefix)
    if not all(level.has_header(part, identity) for part in level.parts):
        msg = f"{folder}: a part was replaced while it was opened"  # by a writer beside this reader
        raise FormatError(msg)
    return level


def assign_prefixes(parts: Iterable[Part]) -> tuple[Part, ...] | None:
    """List for all the bits with which hashes can begin the part that knows most of them; None where one has none."""
    ordered = sorted(parts, key=lambda part: part.bits)
    found: list[Part | None] = [None] * 2 ** ordered[-1].bits if ordered else [None]
    for part in ordered:
        prefixes = part.prefixes(ordered[-1].bits)
        found[prefixes.start : prefixes.stop] = [part] * len(prefixes)
    whole = tuple(part for part in found if part is not None)
    return whole if len(whole) == len(found) else None


def map_parts(folder: Path, by_prefix: tuple[Part, ...]) -> Level:
    """Map parts, those of each of the bits with which hashes can begin.

    Raises
    ------
    OSError
        A file is gone.
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
    """Read what a file says about itself, believing nothing of it."""
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
        msg = f"{path}: it is not a part of this index"
        raise FormatError(msg)
    if files.size(path) != part.nbytes or pairs > entries:
        msg = f"{path}: it has {files.size(path)} bytes instead of {part.nbytes}"
        raise FormatError(msg)
    return part
