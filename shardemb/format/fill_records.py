"""Fills as data: stretches of the shards that were written before their commit, the note of them, their log records.

A fill is a range of blocks of a table's shards. The blocks of all shards are numbered one after the other, so block `b`
begins with byte ``b * 4096`` of all records laid end to end. The rows of a fill are those whose records lie in it as a
whole; what lies in it of any other record is zeros.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.errors import FormatError
from shardemb.format.documents import (
    FORMAT_VERSION,
    crc32,
    field,
    int_field,
    parse_json,
    require_version,
    uuid_field,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from numpy.typing import NDArray

_MOST = 2**62


@dataclass(frozen=True)
class Fill:
    """A range of blocks of a table's shards.

    Attributes
    ----------
    table : str
        The table's uuid.
    first, stop : int
        Half-open range of blocks.
    """

    table: str
    first: int
    stop: int

    def rows(self, record_bytes: int) -> tuple[int, int]:
        """Return the half-open range of the rows that lie in it as a whole.

        Examples
        --------
        >>> Fill("", 1, 3).rows(3000)
        (2, 4)
        """
        start = -(-self.first * PAGE // record_bytes)
        return start, max(start, self.stop * PAGE // record_bytes)

    def within(self, first: int) -> slice:
        """Return where its blocks are in an array about the blocks from `first` on."""
        return slice(max(self.first - first, 0), max(self.stop - first, 0))


class Filled(NamedTuple):
    """A fill with the checksum of each of its blocks."""

    fill: Fill
    sums: NDArray[np.uint64]

    def cut(self, record_bytes: int, most: int) -> Iterator[Filled]:
        """Cut into fills of at most `most` blocks, or of as few more as it takes for no row to be cut."""
        whole = record_bytes // gcd(record_bytes, PAGE)  # so many blocks hold whole records
        step = max(1, most // whole) * whole
        first, stop = self.fill.first, self.fill.stop
        for begin, end in pairwise([first, *range((first // step + 1) * step, stop, step), stop]):
            yield Filled(Fill(self.fill.table, begin, end), self.sums[begin - first : end - first])


def joined(fills: Iterable[Fill], record_bytes: int) -> Iterator[Fill]:
    """Join ascending fills of one table where one begins with the row after the last of the one before."""
    last: Fill | None = None
    for each in fills:
        if last is not None and last.stop == each.first and each.first * PAGE % record_bytes == 0:
            last = Fill(last.table, last.first, each.stop)
            continue
        if last is not None:
            yield last
        last = each
    if last is not None:
        yield last


# ---- the note ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Note:
    """The fills that a writer has begun and that no commit may have.

    Attributes
    ----------
    epoch : int
        The epoch of the writer.
    fills : tuple of Fill
    """

    epoch: int
    fills: tuple[Fill, ...] = ()

    def to_bytes(self) -> bytes:
        """Write the document."""
        document: dict[str, object] = {
            "format_version": FORMAT_VERSION,
            "epoch": self.epoch,
            "fills": [{"table": each.table, "blocks": [each.first, each.stop]} for each in self.fills],
        }
        return json.dumps({**document, "crc32": crc32(document)}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Note:
        """Read the document.

        Raises
        ------
        FormatError
            It is damaged, or of a newer version.
        """
        document = parse_json(data)
        require_version(document)
        if document.get("crc32") != crc32(document):
            msg = "it is damaged: its checksum does not match"
            raise FormatError(msg)
        epoch = int_field(document, "epoch", _MOST, minimum=0)
        return cls(epoch, tuple(map(_from_json, field(document, "fills", list))))


def _from_json(document: Any) -> Fill:  # noqa: ANN401
    blocks = field(document, "blocks", list) if isinstance(document, dict) else None
    if (
        blocks is None
        or [type(each) for each in blocks] != [int, int]
        or not 0 <= blocks[0] < blocks[1] <= _MOST
    ):
        msg = f"a fill is {document!r}"
        raise FormatError(msg)
    return Fill(uuid_field(document, "table"), *blocks)


# ---- a record of the log ----------------------------------------------------------------------------------------


def payload_bytes(blocks: int) -> int:
    """Return how many bytes the payload of a fill's record has."""
    return 8 + 8 * blocks


def pack(filled: Filled, payload: memoryview) -> None:
    """Write the payload of a fill's record: its first block, then the checksum of each block."""
    payload[:8] = filled.fill.first.to_bytes(8, "little")
    payload[8:] = filled.sums.data.cast("B")


def unpack(table: str, count: int, payload: bytes) -> Filled | None:
    """Read the payload of a fill's record, which says that it has so many blocks; None if that cannot be."""
    first = int.from_bytes(payload[:8], "little")
    if not count or len(payload) != payload_bytes(count) or first > _MOST:
        return None
    return Filled(Fill(table, first, first + count), np.frombuffer(payload, np.uint64, offset=8))
