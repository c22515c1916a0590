"""The image log: what makes a commit durable, and what a crash is healed from.

A log is a sequence of segment files. A commit appends the *images* of the rows that it changed, their whole records,
and then one commit record that carries the new `Manifest`; one sync makes all of it count. Reading gives the newest
committed image of every row since the base, wherever the power went: images whose commit record is missing are
ignored, and what was once synced but cannot be read any more is damage.

::

    segment   header block, then records; every record begins at a multiple of 4,096 bytes
    header    magic, version, epoch, number, first sequence number, size, store's uuid, salt, checksum
    record    magic, type, length, epoch, sequence number, highest synced one, attempt, count, table's uuid,
              checksum of the payload, checksum of all this with the store's uuid and the segment's salt; payload
    images    payload: `count` row ids as int64, then as many records
    commit    payload: the manifest; `count` says how many rows' images the attempt wrote
    end       no payload, and no number of its own: the next segment exists
"""

from __future__ import annotations

import errno
import os
import struct
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from shardemb import files, plan
from shardemb.errors import FormatError, LogDamagedError
from shardemb.manifest import Manifest
from shardemb.spec import FORMAT_VERSION, PAGE, TableSpec, round_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from shardemb.arrays import Int64Array

FIRST_SEGMENT = 64 * 2**10
"""Bytes of a store's first segment, so that opening writes little; the others double up to the usual size."""

SEGMENT_BYTES = 64 * 2**20
STAGE_BYTES = 8 * 2**20
"""Bytes that are put together in memory before they are written."""

_MAGIC, _RECORD_MAGIC = b"shardlog", b"srec"
_HEADER = struct.Struct("<8sQQQQQ16s16sQ")
_RECORD = struct.Struct("<4sIQQQQQQ16sQQ")
_IMAGES, _COMMIT, _END = 1, 2, 3
_NO_TABLE = bytes(16)
_SUFFIX = ".log"


class Images(NamedTuple):
    """Committed images of rows of one table: the newest of each.

    Attributes
    ----------
    ids : ndarray of int64, shape (n,)
        Rows, ascending.
    addresses : ndarray of int64, shape (n,)
        Where in memory the record of each lies.
    """

    ids: Int64Array
    addresses: Int64Array


class _Run(NamedTuple):
    ids: Int64Array
    address: int
    record_bytes: int


@dataclass
class Replay:
    """What a log holds.

    Attributes
    ----------
    manifest : Manifest
        As of the last commit in the log; the base's own where there is none.
    sequence, attempt : int
        Lowest numbers that were not used yet.
    """

    manifest: Manifest
    sequence: int
    attempt: int
    _runs: dict[str, list[_Run]] = field(default_factory=dict)
    _memory: list[files.AddressRange] = field(default_factory=list)  # what the images lie in

    def images(self, spec: TableSpec) -> Images:
        """Return the images of a table, which are there as long as this object.

        Raises
        ------
        LogDamagedError
            They are not of the table's rows.
        """
        runs = self._runs.get(spec.uuid, [])
        if not runs:
            return Images(np.empty(0, np.int64), np.empty(0, np.int64))
        ids = np.concatenate([run.ids for run in runs])
        if any(run.record_bytes != spec.record_bytes for run in runs) or not (
            0 <= int(ids.min()) and int(ids.max()) < spec.num_embeddings
        ):
            msg = f"the log holds rows that table {spec.uuid} cannot have"
            raise LogDamagedError(msg)
        addresses = np.concatenate(
            [run.address + np.arange(run.ids.size) * run.record_bytes for run in runs]
        )
        grouped = plan.group(ids, spec.num_embeddings)
        return Images(grouped.rows, addresses[grouped.order[grouped.starts[1:] - 1]])


# ---- writing --------------------------------------------------------------------------------------------------


class Log:
    """The writer's end of the log. Everything is under the store's lock but `discard`.

    Parameters
    ----------
    folder : Path
        Where the segments lie.
    manifest : Manifest
        Whose `segment`, `sequence`, `attempt` and `epoch` the log begins with; its first segment is made.
    segment_bytes : int
        Usual size of a segment.

    Raises
    ------
    DiskFullError
        There is no room for the first segment.
    """

    def __init__(self, folder: Path, manifest: Manifest, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._folder = folder
        self._usual_bytes = max(round_up(segment_bytes, PAGE), FIRST_SEGMENT)
        self._store = uuid.UUID(manifest.uuid).bytes
        self._epoch = manifest.epoch
        self.number = manifest.segment - 1
        self.sequence = manifest.sequence
        self.attempt = manifest.attempt
        self._synced = manifest.sequence - 1
        self._count = 0
        self._stage = files.AddressRange(STAGE_BYTES)
        self._stage.map_zeros(0, STAGE_BYTES)
        self._staged = 0
        self._descriptor: int | None = None
        self._spares: list[Path] = []
        self.nbytes = 0
        """Bytes that were appended since the base."""
        self._begin_segment(FIRST_SEGMENT)

    @property
    def end(self) -> tuple[int, int]:
        """Segment and position up to which the log was written."""
        return self.number, self._position

    def begin(self, nbytes: int) -> None:
        """Begin an attempt to commit, in a segment that has room for `nbytes` of records.

        Raises
        ------
        DiskFullError
            There is none; nothing was changed.
        """
        self._staged = 0  # an attempt before may have broken off
        if self._position + nbytes + PAGE > self._size:
            self._next_segment(nbytes)
        self.attempt += 1
        self._count = 0

    def append_images(
        self, table: str, ids: Int64Array, record_bytes: int, pack: Callable[[int, int, int], None]
    ) -> None:
        """Append images of rows; ``pack(start, stop, address)`` puts the records of ``ids[start:stop]`` there."""
        step = images_per_record(record_bytes)
        for start in range(0, ids.size, step):
            stop = min(start + step, ids.size)
            offset = self._place(_images_bytes(stop - start, record_bytes))
            payload = self._stage.bytes(offset + _RECORD.size, (stop - start) * (8 + record_bytes))
            payload[: (stop - start) * 8] = ids[start:stop].data.cast("B")
            pack(start, stop, self._stage.address + offset + _RECORD.size + (stop - start) * 8)
            self._seal(offset, _IMAGES, payload, stop - start, uuid.UUID(table).bytes)
            self._count += stop - start

    def append_commit(self, manifest: Manifest) -> None:
        """Append the record that makes the attempt count, and make all of it durable."""
        data = manifest.to_bytes()
        offset = self._place(_RECORD.size + len(data))
        payload = self._stage.bytes(offset + _RECORD.size, len(data))
        payload[:] = data
        self._seal(offset, _COMMIT, payload, self._count)
        self._flush()
        self._sync()

    def close_segments(self) -> list[Path]:
        """Go on in a new segment; return those before, which are closed.

        Raises
        ------
        DiskFullError
            There is no room for it; nothing was changed.
        """
        self._staged = 0
        number = self.number
        self._next_segment(0)
        return [self._path(each) for each in segments(self._folder) if each <= number]

    def discard(self, closed: Sequence[Path]) -> None:
        """Let go of closed segments, which the base has passed; some are used again."""
        for path in closed:
            if files.size(path) == self._usual_bytes and len(self._spares) < 4:
                spare = path.with_suffix(".spare")
                files.rename(path, spare)
                self._spares.append(spare)
            else:
                files.remove(path)

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            files.close(self._descriptor)
            self._descriptor = None

    # ---- within

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}{_SUFFIX}"

    def _next_segment(self, nbytes: int) -> None:
        """Begin a segment that has room for `nbytes`; the one before is all durable by then."""
        self._sync()
        before, position, sequence = self._descriptor, self._position, self.sequence
        salt = self._salt
        self._begin_segment(max(min(2 * self._size, self._usual_bytes), round_up(nbytes, PAGE) + 2 * PAGE))
        # Says that the next segment is there, so that its loss is noticed.
        assert before is not None
        path = self._path(self.number - 1)
        self._put_record(0, _END, b"", 0, _NO_TABLE, sequence - 1, salt, sequence)
        files.write(before, self._stage.bytes(0, PAGE), position, path)
        files.sync_data(before, path)
        files.close(before)

    def _begin_segment(self, nbytes: int) -> None:
        number, salt = self.number + 1, os.urandom(16)
        temporary = self._path(number).with_suffix(".new")
        descriptor = None
        try:
            if nbytes == self._usual_bytes and self._spares:
                files.rename(self._spares.pop(), temporary)
            else:
                files.write_new(temporary, b"")
            descriptor = files.open_direct(temporary)
            self._fill(descriptor, nbytes, temporary)
            header = _HEADER.pack(
                _MAGIC, FORMAT_VERSION, self._epoch, number, self.sequence, nbytes, self._store, salt, 0
            )
            block = self._stage.bytes(0, PAGE)
            block[: _HEADER.size] = header
            block[_HEADER.size - 8 : _HEADER.size] = _checksum(header[:-8]).to_bytes(8, "little")
            files.write(descriptor, block, 0, temporary)
            files.sync(descriptor, temporary)
            # Under its name a segment has a header: one that has none is damaged and not new.
            files.rename(temporary, self._path(number))
            files.sync_directory(self._folder)
        except BaseException:
            if descriptor is not None:
                files.close(descriptor)
            files.remove(temporary)
            raise
        self._descriptor, self._size, self._salt, self.number = descriptor, nbytes, salt, number
        self._position = PAGE

    def _fill(self, descriptor: int, nbytes: int, path: Path) -> None:
        """Secure the space of a segment: later appends to blocks that were written once need one cheap sync."""
        if (files.size(path) or 0) >= nbytes:
            return
        if nbytes > self._usual_bytes:  # for one commit: writing it twice would cost more
            files.allocate(descriptor, 0, nbytes, path)
            files.write(descriptor, _zeros(self._stage, PAGE), nbytes - PAGE, path)
            return
        for offset in range(0, nbytes, STAGE_BYTES):
            length = min(STAGE_BYTES, nbytes - offset)
            files.write(descriptor, _zeros(self._stage, length), offset, path)

    def _place(self, nbytes: int) -> int:
        """Find room for a record in the stage."""
        length = round_up(nbytes, PAGE)
        if self._staged + length > self._stage.nbytes:
            self._flush()
        if length > self._stage.nbytes:
            self._stage = files.AddressRange(length)
            self._stage.map_zeros(0, length)
        offset = self._staged
        self._stage.bytes(offset, length)[nbytes:] = bytes(length - nbytes)
        self._staged += length
        return offset

    def _seal(
        self, offset: int, kind: int, payload: memoryview | bytes, count: int, table: bytes = _NO_TABLE
    ) -> None:
        self._put_record(offset, kind, payload, count, table, self._synced, self._salt, self.sequence)
        self.sequence += 1

    def _put_record(
        self,
        offset: int,
        kind: int,
        payload: memoryview | bytes,
        count: int,
        table: bytes,
        synced: int,
        salt: bytes,
        sequence: int,
    ) -> None:
        header = _RECORD.pack(
            _RECORD_MAGIC,
            kind,
            len(payload),
            self._epoch,
            sequence,
            synced,
            self.attempt,
            count,
            table,
            _checksum(payload),
            0,
        )
        crc = _checksum(self._store + salt + header[:-8]).to_bytes(8, "little")
        self._stage.bytes(offset, _RECORD.size)[:] = header[:-8] + crc

    def _flush(self) -> None:
        assert self._descriptor is not None
        files.write(
            self._descriptor, self._stage.bytes(0, self._staged), self._position, self._path(self.number)
        )
        self._position += self._staged
        self.nbytes += self._staged
        self._staged = 0

    def _sync(self) -> None:
        assert self._descriptor is not None
        files.sync_data(self._descriptor, self._path(self.number))
        self._synced = self.sequence - 1


def images_per_record(record_bytes: int) -> int:
    """Rows whose images one record may hold."""
    return (STAGE_BYTES - PAGE) // (8 + record_bytes)


def needed_bytes(counts: Sequence[tuple[int, int]], manifest: Manifest) -> int:
    """Bytes that a commit appends: ``(rows, record bytes)`` of each table, and the record with the manifest."""
    total = round_up(_RECORD.size + len(manifest.to_bytes()), PAGE)
    for rows, record_bytes in counts:
        full, rest = divmod(rows, images_per_record(record_bytes))
        total += full * round_up(_images_bytes(images_per_record(record_bytes), record_bytes), PAGE)
        total += round_up(_images_bytes(rest, record_bytes), PAGE) if rest else 0
    return total


def _images_bytes(rows: int, record_bytes: int) -> int:
    return _RECORD.size + rows * (8 + record_bytes)


def _zeros(memory: files.AddressRange, nbytes: int) -> memoryview:
    view = memory.bytes(0, nbytes)
    view[:] = bytes(nbytes)
    return view


def _checksum(data: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


# ---- reading --------------------------------------------------------------------------------------------------


def segments(folder: Path) -> list[int]:
    """Numbers of the segments that there are, ascending."""
    if not folder.is_dir():
        return []
    names = [path.stem for path in folder.iterdir() if path.suffix == _SUFFIX]
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def sync(folder: Path, base: Manifest) -> None:
    """Make the segments since the base durable: what is about to be relied on may be in the page cache alone."""
    for number in segments(folder):
        if number >= base.segment:
            files.sync_file(folder / f"{number:08d}{_SUFFIX}")


def clear(folder: Path, first: int) -> None:
    """Remove the segments before `first`, and everything else that is no segment."""
    files.make_directory(folder)
    for path in list(folder.iterdir()):
        if not (path.suffix == _SUFFIX and path.stem.isdigit() and int(path.stem) >= first):
            files.remove(path)


def read(folder: Path, base: Manifest, end: tuple[int, int] | None = None) -> Replay:
    """Read what was committed since the base.

    Parameters
    ----------
    folder : Path
        Where the segments lie.
    base : Manifest
        Its `segment` is the first that is read. A clean one has no log.
    end : (int, int), optional
        Segment and position at which reading ends, in the log of a living writer.

    Raises
    ------
    LogDamagedError
        Something that was durable is missing or cannot be read.
    """
    replay = Replay(base, base.sequence, base.attempt)
    if base.clean:
        return replay
    there = [number for number in segments(folder) if number >= base.segment]
    if not there or there[0] != base.segment:
        msg = f"{folder}: segment {base.segment} of the log is missing; restore it from a copy of the store"
        raise LogDamagedError(msg)
    reader = _Reader(replay, uuid.UUID(base.uuid).bytes, base.epoch)
    for number in there:
        if end is not None and number > end[0]:
            break
        path = folder / f"{number:08d}{_SUFFIX}"
        try:
            follows = reader.read_segment(path, number, end[1] if end and number == end[0] else None)
        except OSError as error:
            msg = f"{path} cannot be read ({error})"
            raise LogDamagedError(msg) from error
        if not follows:
            break
    reader.finish(folder)
    return replay


class _Reader:
    """Reads segments one after the other, and judges what is torn and what is damaged."""

    def __init__(self, replay: Replay, store: bytes, epoch: int) -> None:
        self.replay = replay
        self._store = store
        self._epoch = epoch
        self._pending: list[tuple[str, _Run]] = []
        self._pending_attempt = 0
        self._expect: int | None = None  # number of the segment that must follow
        self._last = 0

    def read_segment(self, path: Path, number: int, end: int | None) -> bool:
        """Read a segment; return whether those after it belong to the same log."""
        nbytes = files.size(path) or 0
        memory = files.AddressRange(max(round_up(nbytes, PAGE), PAGE))
        if nbytes < PAGE:
            self._damaged(path, "it has no header")
        memory.map_file(0, path, nbytes)
        salt, stop = self._header(path, memory, number, nbytes)
        if not salt:
            return False
        if self._last and number != self._last + 1:
            self._damaged(path, f"segment {self._last + 1} before it is missing")
        self._last, self._expect = number, None
        self.replay._memory.append(memory)
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
        """Judge what is not there."""
        if self._expect is not None:
            msg = f"{folder}: segment {self._expect} of the log is missing; restore it from a copy of the store"
            raise LogDamagedError(msg)

    def _header(self, path: Path, memory: files.AddressRange, number: int, nbytes: int) -> tuple[bytes, int]:
        _populate(memory, 0, PAGE)
        block = bytes(memory.bytes(0, _HEADER.size))
        magic, version, epoch, own, first, size, store, salt, checksum = _HEADER.unpack(block)
        if magic != _MAGIC or checksum != _checksum(block[:-8]):
            self._damaged(path, "its header is damaged")
        if version > FORMAT_VERSION:
            msg = f"{path}: format version {version} is newer than {FORMAT_VERSION}; upgrade shardemb"
            raise FormatError(msg)
        if store != self._store or own != number:
            self._damaged(path, "it belongs elsewhere")
        if epoch > self._epoch:
            return b"", 0  # of an opening that did not come to its base: it holds nothing
        if epoch != self._epoch or size > nbytes or size % PAGE:
            self._damaged(path, "it was cut short or exchanged")
        if first != self.replay.sequence:
            self._damaged(path, f"record {self.replay.sequence} before it is missing")
        return salt, size

    def _record(self, path: Path, memory: files.AddressRange, position: int, stop: int, salt: bytes) -> int:
        """Take a record in; return the bytes that it fills, 0 where there is none."""
        head = self._record_header(memory, position, salt)
        if head is None:
            return 0
        _, kind, length, epoch, sequence, _, attempt, count, table, checksum, _ = head
        filled = round_up(_RECORD.size + length, PAGE)
        if sequence != self.replay.sequence or epoch != self._epoch or position + filled > stop:
            return 0
        _populate(memory, position, filled)
        payload = memory.bytes(position + _RECORD.size, length)
        if checksum != _checksum(payload):
            return 0
        if kind == _END:
            self._expect = self._last + 1
            return filled
        self.replay.sequence += 1
        self.replay.attempt = max(self.replay.attempt, attempt)
        if kind == _IMAGES:
            self._take_images(path, memory, position + _RECORD.size, length, count, table, attempt)
        elif kind == _COMMIT:
            self._take_commit(path, bytes(payload), count, attempt)
        else:
            self._damaged(path, f"record {sequence} is of an unknown type")
        return filled

    def _record_header(
        self, memory: files.AddressRange, position: int, salt: bytes
    ) -> tuple[bytes, int, int, int, int, int, int, int, bytes, int, int] | None:
        _populate(memory, position, PAGE)
        block = bytes(memory.bytes(position, _RECORD.size))
        if block[:4] != _RECORD_MAGIC:
            return None
        head = _RECORD.unpack(block)
        return head if head[-1] == _checksum(self._store + salt + block[:-8]) else None

    def _take_images(
        self,
        path: Path,
        memory: files.AddressRange,
        offset: int,
        length: int,
        count: int,
        table: bytes,
        attempt: int,
    ) -> None:
        if not count or length % count or length // count <= 8:
            self._damaged(path, "a record of images has an impossible size")
        if self._pending and self._pending_attempt != attempt:
            self._pending = []  # an attempt that broke off
        self._pending_attempt = attempt
        ids = np.frombuffer(memory.bytes(offset, count * 8), np.int64)
        run = _Run(ids, memory.address + offset + count * 8, length // count - 8)
        self._pending.append((str(uuid.UUID(bytes=table)), run))

    def _take_commit(self, path: Path, payload: bytes, count: int, attempt: int) -> None:
        pending = self._pending if self._pending and self._pending_attempt == attempt else []
        if sum(run.ids.size for _, run in pending) != count:
            self._damaged(path, "images of a commit are missing")
        manifest = Manifest.from_bytes(payload)
        if uuid.UUID(manifest.uuid).bytes != self._store:
            self._damaged(path, "a commit belongs to another store")
        self.replay.manifest = manifest
        for table, run in pending:
            self.replay._runs.setdefault(table, []).append(run)
        self._pending = []

    def _require_torn(
        self, path: Path, memory: files.AddressRange, position: int, stop: int, salt: bytes
    ) -> None:
        """Check that nothing behind a bad record says that it had been synced."""
        _populate(memory, 0, stop)
        words = np.frombuffer(memory.bytes(0, stop), np.uint32)[:: PAGE // 4]
        magic = np.frombuffer(_RECORD_MAGIC, np.uint32)[0]
        for block in np.flatnonzero(words[position // PAGE :] == magic).tolist():
            head = self._record_header(memory, position + block * PAGE, salt)
            if head is not None and head[5] >= self.replay.sequence:
                self._damaged(path, f"record {self.replay.sequence} was synced and cannot be read")

    def _damaged(self, path: Path, why: str) -> None:
        msg = f"{path}: {why}; the log lost what it had made durable. Restore the store from a copy"
        raise LogDamagedError(msg)


def _populate(memory: files.AddressRange, offset: int, nbytes: int) -> None:
    """Read pages so that a bad sector is an error and not the end of the process."""
    first = offset // PAGE * PAGE
    try:
        memory.advise(first, round_up(offset + nbytes, PAGE) - first, files.MADV_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:  # kernels before 5.14
            raise
