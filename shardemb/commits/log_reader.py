"""Reads the image log, from which it learns the newest committed image of every row since the base.

After a loss of power at any point, images without their commit record are ignored, and a record that was synced but
cannot be read is damage. The reader trusts nothing, and allocates nothing for a number that the files do not back.

::

    segment   header block, then records; every record begins at a multiple of 4,096 bytes
    header    magic, version, epoch, number, first sequence number, size, store's uuid, salt, checksum
    record    magic, type, length, epoch, sequence number, highest synced one, attempt, count, table's uuid,
              checksum of the payload, checksum of all this with the store's uuid and the segment's salt; payload
    images    payload: `count` row ids as int64, then the records of these rows
    fill      payload: the first of `count` blocks that are in the shards already, then their checksums
    commit    payload: the manifest; `count` is the number of images and blocks that the attempt wrote
    prepared  as a commit; but it is one only after a commit record of the same attempt, or by a decision elsewhere
    end       no payload, no sequence number of its own: says that the next segment exists
"""

from __future__ import annotations

import errno
import os
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from shardemb.base.sizes import PAGE, round_up
from shardemb.compute import plan
from shardemb.errors import FormatError, LogDamagedError
from shardemb.format import fill_records
from shardemb.format.documents import checksum
from shardemb.format.fill_records import Filled
from shardemb.format.log_records import (
    COMMIT,
    END,
    FILL,
    HEADER,
    IMAGES,
    MAGIC,
    PARTITION_LOG_VERSION,
    PREPARED,
    RECORD,
    RECORD_MAGIC,
    SUFFIX,
)
from shardemb.format.manifest import Manifest
from shardemb.storage import address_space, files

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.format.fill_records import Fill
    from shardemb.format.manifest import Decided
    from shardemb.format.spec import TableSpec


class Images(NamedTuple):
    """What was committed of one table: the newest images of its rows, and the fills, which images are newer than.

    Attributes
    ----------
    ids : ndarray of int64, shape (n,)
        Row ids, ascending.
    addresses : ndarray of int64, shape (n,)
        Memory address of the record of each row.
    fills : tuple of Filled
        What is in the shards already.
    """

    ids: Int64Array
    addresses: Int64Array
    fills: tuple[Filled, ...] = ()


class Run(NamedTuple):
    """The images of one record of the log: row ids, and the address of their records, which are contiguous."""

    ids: Int64Array
    address: int
    record_bytes: int


@dataclass
class Replay:
    """What a log holds, and the memory that holds the images.

    Attributes
    ----------
    manifest : Manifest
        As of the last commit in the log, or the base if the log has no commit.
    sequence, attempt : int
        The lowest numbers that are not used yet.
    prepared : (int, (int, str, int)) or None
        The attempt that the log ends with, if that is prepared and neither committed nor followed by another.
    unfinished : tuple of Fill
        What a writer may have written to the shards without a commit, where the caller has looked.
    kept : dict of str to two arrays
        In a tag, by the uuid of a table: the blocks whose content is kept elsewhere, and the checksums of that.
    """

    manifest: Manifest
    sequence: int
    attempt: int
    prepared: Decided | None = None
    unfinished: tuple[Fill, ...] = ()
    kept: dict[str, tuple[Int64Array, NDArray[np.uint64]]] = field(default_factory=dict)
    _runs: dict[str, list[Run]] = field(default_factory=dict)
    _fills: dict[str, list[Filled]] = field(default_factory=dict)
    _memory: list[address_space.AddressRange] = field(default_factory=list)  # that the images are in

    def keep_mapped(self, memory: address_space.AddressRange) -> None:
        """Keep memory that holds images mapped."""
        self._memory.append(memory)

    def add(self, table: str, run: Run) -> None:
        """Add committed images of a table, which are newer than all added before."""
        self._runs.setdefault(table, []).append(run)

    def add_fill(self, filled: Filled) -> None:
        """Add a committed fill; all images of its rows are newer."""
        self._fills.setdefault(filled.fill.table, []).append(filled)

    def fills(self, spec: TableSpec) -> tuple[Filled, ...]:
        """Return the committed fills of a table.

        Raises
        ------
        LogDamagedError
            The table does not have such blocks.
        """
        fills = tuple(self._fills.get(spec.uuid, ()))
        if any(each.fill.stop * PAGE > spec.num_shards * spec.shard_bytes for each in fills):
            msg = f"the log holds blocks that table {spec.uuid} cannot have"
            raise LogDamagedError(msg)
        return fills

    def images(self, spec: TableSpec) -> Images:
        """Return the images of a table, and its fills. They are valid as long as this object exists.

        Raises
        ------
        LogDamagedError
            The images cannot be of rows of the table.
        """
        runs = self._runs.get(spec.uuid, [])
        if not runs:
            return Images(np.empty(0, np.int64), np.empty(0, np.int64), self.fills(spec))
        ids = np.concatenate([run.ids for run in runs])
        if any(run.record_bytes != spec.record_bytes for run in runs) or not (
            int(ids.min()) >= 0 and int(ids.max()) < spec.num_embeddings
        ):
            msg = f"the log holds rows that table {spec.uuid} cannot have"
            raise LogDamagedError(msg)
        addresses = np.concatenate([run.address + np.arange(run.ids.size) * run.record_bytes for run in runs])
        grouped = plan.group(ids, spec.num_embeddings)
        newest = grouped.order[grouped.starts[1:] - 1]  # the last of each row's images
        return Images(grouped.rows, addresses[newest], self.fills(spec))


def segments(folder: Path) -> list[int]:
    """Return the numbers of the segments in the log's folder, ascending."""
    names = [path.stem for path in files.entries(folder) if path.suffix == SUFFIX]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def sync(folder: Path, base: Manifest) -> None:
    """Make the segments since the base durable. After the death of a writer they may be only in the page cache."""
    for number in segments(folder):
        if number >= base.segment:
            files.sync_file(folder / f"{number:08d}{SUFFIX}")


def read(
    folder: Path,
    base: Manifest,
    end: tuple[int, int] | None = None,
    *,
    private: bool = False,
) -> Replay:
    """Read what was committed since the base.

    An attempt that the log ends with, prepared, is committed if it is what `base` says was `resolved`. Otherwise its
    images are no part of what is read.

    Parameters
    ----------
    folder : Path
        The folder of the segments.
    base : Manifest
        Its `segment` is the first that is read. A clean base has no log.
    end : (int, int), optional
        Segment and position at which reading ends, for the log of a running writer.
    private : bool
        Read the segments into memory, so that the images stay what they are when a writer uses a segment again. Mapped
        otherwise.

    Raises
    ------
    LogDamagedError
        Something that was durable is missing or cannot be read.
    """
    replay = Replay(base, base.sequence, base.attempt)
    if base.clean:
        return replay
    numbers = [number for number in segments(folder) if number >= base.segment]
    if not numbers or numbers[0] != base.segment:
        msg = f"{folder}: segment {base.segment} of the log is missing; restore it from a copy of the store"
        raise LogDamagedError(msg)
    reader = _Reader(replay, uuid.UUID(base.uuid).bytes, base.epoch, private=private)
    while numbers:
        number = numbers.pop(0)
        if end is not None and number > end[0]:
            break
        path = folder / f"{number:08d}{SUFFIX}"
        try:
            follows = reader.read_segment(path, number, end[1] if end and number == end[0] else None)
        except OSError as error:
            msg = f"{path} cannot be read ({error})"
            raise LogDamagedError(msg) from error
        if not follows:
            break
        if reader.required and not numbers:  # a writer may have begun it after the folder was listed
            numbers = [each for each in segments(folder) if each > number]
    reader.finish(folder)
    return replay


class _Reader:
    """Reads segments in order, and decides whether an unreadable record is a torn end or damage."""

    def __init__(self, replay: Replay, store: bytes, epoch: int, *, private: bool) -> None:
        self.replay = replay
        self._private = private
        self._store = store
        self._epoch = epoch
        # Images and fills of an attempt whose commit record may follow.
        self._pending: list[tuple[str, Run | Filled]] = []
        self._pending_attempt = 0
        self._prepared: Manifest | None = None  # that ended the attempt which is pending
        self._resolved = replay.manifest.resolved
        self.required: int | None = None  # number of the segment that must come next
        self._last = 0

    def read_segment(self, path: Path, number: int, end: int | None) -> bool:
        """Read a segment; return whether the segments after it belong to the same log."""
        nbytes = files.size(path) or 0
        memory = address_space.AddressRange(max(round_up(nbytes, PAGE), PAGE))
        if nbytes < PAGE:
            self._damaged(path, "it has no header")
        if self._private:
            memory.map_zeros(0, memory.nbytes)
            with files.opened(path, os.O_RDONLY) as descriptor:
                files.read_into(descriptor, memory.bytes(0, nbytes), 0, path)
        else:
            memory.map_file(0, path, nbytes)
        salt, stop = self._header(path, memory, number, nbytes)
        if not salt:
            return False
        if self._last and number != self._last + 1:
            self._damaged(path, f"the preceding segment {self._last + 1} is missing")
        self._last, self.required = number, None
        self.replay.keep_mapped(memory)
        position = PAGE
        stop = stop if end is None else end
        while position < stop:
            length = self._record(path, memory, position, stop, salt)
            if not length and end is not None:
                self._damaged(path, f"record {self.replay.sequence} cannot be read")
            if not length:
                self._require_torn(path, memory, position + PAGE, stop, salt)
                break
            position += length
        return True

    def finish(self, folder: Path) -> None:
        """Commit what is prepared if that was decided; raise `LogDamagedError` if a segment is missing at the end."""
        if self._prepared is not None:
            if self._resolved is None:
                self.replay.prepared = self._prepared.decided
            elif self._prepared.decided == self._resolved:
                self._commit(self._prepared)
        if self.required is not None:
            msg = f"{folder}: segment {self.required} of the log is missing; restore it from a copy of the store"
            raise LogDamagedError(msg)

    def _header(
        self, path: Path, memory: address_space.AddressRange, number: int, nbytes: int
    ) -> tuple[bytes, int]:
        """Check the header of a segment; return its salt, or nothing if the segment is to be ignored, and its size."""
        _populate(memory, 0, PAGE)
        block = bytes(memory.bytes(0, HEADER.size))
        magic, version, epoch, own, first, size, store, salt, found = HEADER.unpack(block)
        if magic != MAGIC or found != checksum(block[:-8]):
            self._damaged(path, "its header is damaged")
        if version > PARTITION_LOG_VERSION:
            msg = f"{path}: format version {version} is newer than {PARTITION_LOG_VERSION}; upgrade shardemb"
            raise FormatError(msg)
        if store != self._store or own != number:
            self._damaged(path, "it belongs elsewhere")
        if epoch > self._epoch:
            # Its writer stopped before it replaced the base, so the segment holds no commit.
            return b"", 0
        if epoch != self._epoch or size > nbytes or size % PAGE:
            self._damaged(path, "it was truncated or replaced")
        if first != self.replay.sequence:
            self._damaged(path, f"the preceding record {self.replay.sequence} is missing")
        return salt, size

    def _record(
        self, path: Path, memory: address_space.AddressRange, position: int, stop: int, salt: bytes
    ) -> int:
        """Read a record; return the number of bytes that it fills, or 0 if there is no valid record."""
        head = self._record_header(memory, position, salt)
        if head is None:
            return 0
        _, kind, length, epoch, sequence, _, attempt, count, table, found, _ = head
        filled = round_up(RECORD.size + length, PAGE)
        if sequence != self.replay.sequence or epoch != self._epoch or position + filled > stop:
            return 0
        _populate(memory, position, filled)
        payload = memory.bytes(position + RECORD.size, length)
        if found != checksum(payload):
            return 0
        if kind == END:
            self.required = self._last + 1
            return filled
        self.replay.sequence += 1
        self.replay.attempt = max(self.replay.attempt, attempt)
        if kind == IMAGES:
            self._read_images(path, memory, position + RECORD.size, length, count, table, attempt)
        elif kind == FILL:
            self._read_fill(path, bytes(payload), count, table, attempt)
        elif kind == COMMIT:
            self._commit(self._read_manifest(path, bytes(payload), count, attempt))
        elif kind == PREPARED:
            self._prepared = self._read_manifest(path, bytes(payload), count, attempt)
        else:
            self._damaged(path, f"record {sequence} is of an unknown type")
        return filled

    def _record_header(
        self, memory: address_space.AddressRange, position: int, salt: bytes
    ) -> tuple[bytes, int, int, int, int, int, int, int, bytes, int, int] | None:
        """Return the fields of the record header at a position; None if there is no valid header."""
        _populate(memory, position, PAGE)
        block = bytes(memory.bytes(position, RECORD.size))
        if block[:4] != RECORD_MAGIC:
            return None
        head = RECORD.unpack(block)
        return head if head[-1] == checksum(self._store + salt + block[:-8]) else None

    def _read_images(
        self,
        path: Path,
        memory: address_space.AddressRange,
        offset: int,
        length: int,
        count: int,
        table: bytes,
        attempt: int,
    ) -> None:
        if not count or length % count or length // count <= 8:
            self._damaged(path, "a record of images has an impossible size")
        # The images stay in the mapped file until a fold or a reader uses them: nothing is copied here.
        ids = np.frombuffer(memory.bytes(offset, count * 8), np.int64)
        run = Run(ids, memory.address + offset + count * 8, length // count - 8)
        self._add_pending(attempt, str(uuid.UUID(bytes=table)), run)

    def _read_fill(self, path: Path, payload: bytes, count: int, table: bytes, attempt: int) -> None:
        name = str(uuid.UUID(bytes=table))
        filled = fill_records.unpack(name, count, payload)
        if filled is None:
            self._damaged(path, "a record of a fill has an impossible size")
        self._add_pending(attempt, name, filled)

    def _add_pending(self, attempt: int, table: str, written: Run | Filled) -> None:
        self._begin_attempt(attempt)
        self._pending.append((table, written))

    def _begin_attempt(self, attempt: int) -> None:
        """Drop what is of another attempt, which has failed."""
        if self._pending_attempt != attempt:
            self._pending, self._prepared, self._pending_attempt = [], None, attempt

    def _read_manifest(self, path: Path, payload: bytes, count: int, attempt: int) -> Manifest:
        """Read the manifest that ends an attempt, of which nothing may be missing."""
        self._begin_attempt(attempt)
        # The commit record counts its images and blocks, so that a lost record is noticed.
        if (
            sum(each.sums.size if isinstance(each, Filled) else each.ids.size for _, each in self._pending)
            != count
        ):
            self._damaged(path, "images of a commit are missing")
        manifest = Manifest.from_bytes(payload)
        if uuid.UUID(manifest.uuid).bytes != self._store:
            self._damaged(path, "a commit belongs to another store")
        return manifest

    def _commit(self, manifest: Manifest) -> None:
        """Let the manifest of the attempt be the last commit."""
        self.replay.manifest = manifest
        for table, each in self._pending:
            if isinstance(each, Filled):
                self.replay.add_fill(each)
            else:
                self.replay.add(table, each)
        self._pending, self._prepared = [], None

    def _require_torn(
        self, path: Path, memory: address_space.AddressRange, position: int, stop: int, salt: bytes
    ) -> None:
        """Check that a record that cannot be read was never synced.

        It was if the header of a later record in the segment says so: that is damage. Otherwise the log ends here, at a
        record that a crash has torn.
        """
        _populate(memory, 0, stop)
        words = np.frombuffer(memory.bytes(0, stop), np.uint32)[:: PAGE // 4]
        magic = np.frombuffer(RECORD_MAGIC, np.uint32)[0]
        for block in np.flatnonzero(words[position // PAGE :] == magic).tolist():
            head = self._record_header(memory, position + block * PAGE, salt)
            if head is not None and head[5] >= self.replay.sequence:
                self._damaged(path, f"record {self.replay.sequence} was synced and cannot be read")

    def _damaged(self, path: Path, why: str) -> NoReturn:
        msg = f"{path}: {why}; the log lost what it had made durable. Restore the store from a copy"
        raise LogDamagedError(msg)


def _populate(memory: address_space.AddressRange, offset: int, nbytes: int) -> None:
    """Read mapped pages ahead of use, so that a bad sector raises an error and does not kill the process (SIGBUS)."""
    first = offset // PAGE * PAGE
    try:
        memory.advise(first, round_up(offset + nbytes, PAGE) - first, address_space.MADV_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:  # kernels before 5.14
            raise
