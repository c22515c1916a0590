"""The writer's end of the image log, which makes commits durable.

The log is a sequence of segment files with the layout given in ``log_reader.py``. A commit appends *images* of the rows
that it changed, which are their whole records; a record for each *fill*, whose rows are in the shards already; and then
one commit record with the new `Manifest`. One sync makes all of it durable. A commit lies within one segment, so a
segment never ends in the middle of an attempt to commit.

In a partition of a distributed store a *prepared* record comes between: with it, the sync makes the attempt durable,
but it is no commit until the commit record follows, or until who opens the store is told that it was decided.
"""

from __future__ import annotations

import errno
import threading
import uuid
from bisect import insort
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.interrupts import signals_deferred
from shardemb.base.sizes import PAGE, round_up
from shardemb.commits.log_reader import segments
from shardemb.format import fill_records
from shardemb.format.documents import checksum
from shardemb.format.log_records import (
    COMMIT,
    END,
    FILL,
    HEADER,
    IMAGES,
    LOG_VERSION,
    MAGIC,
    NO_TABLE,
    PARTITION_LOG_VERSION,
    PREPARED,
    RECORD,
    RECORD_MAGIC,
    SUFFIX,
)
from shardemb.storage import address_space, files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from shardemb.base.validation import Int64Array
    from shardemb.format.fill_records import Filled
    from shardemb.format.manifest import Manifest

FIRST_SEGMENT = 64 * 2**10
"""Bytes of the first segment after opening, or after a fold: few, so that these write little. Later ones are larger."""

SEGMENT_BYTES = 64 * 2**20
LARGE_COMMIT = 4 * 2**20
"""Bytes of a commit from which on it makes no difference to the sync if the segment was only allocated before."""

STAGE_BYTES = 8 * 2**20
"""Bytes of records that are assembled in memory before they are written."""


class Log:
    """The writer's end of the log.

    One thread at a time may call its methods; only `discard` may be called meanwhile.

    Parameters
    ----------
    folder : Path
        The folder of the segments.
    manifest : Manifest
        The log begins with its `segment`, `sequence`, `attempt` and `epoch`. The first segment is created.
    segment_bytes : int
        Usual size of a segment.
    spares : int
        Most discarded segments, of that size or smaller, that are kept for reuse; the largest are.

    Raises
    ------
    DiskFullError
        The disk has no space for the first segment.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, segment_bytes: int = SEGMENT_BYTES, spares: int = 4
    ) -> None:
        self._folder = folder
        self._usual_bytes = max(round_up(segment_bytes, PAGE), FIRST_SEGMENT)
        self._store = uuid.UUID(manifest.uuid).bytes
        self._epoch = manifest.epoch
        self._version = LOG_VERSION if manifest.partition is None else PARTITION_LOG_VERSION
        self.number = manifest.segment - 1
        self.sequence = manifest.sequence
        self.attempt = manifest.attempt
        self._next_on_disk = manifest.sequence  # of the first record that is not in the file
        self._synced = manifest.sequence - 1  # of the last record that is known to be synced
        self._count = 0
        self._stage = address_space.AddressRange(STAGE_BYTES)
        self._stage.map_zeros(0, STAGE_BYTES)
        self._staged = 0
        self._descriptor: int | None = None
        self._spares_lock = threading.Lock()
        self._spares: list[tuple[int, Path]] = []  # sizes and paths, ascending
        self._most_spares = spares
        self.nbytes = 0
        """Bytes appended since the base."""
        self._begin_segment(FIRST_SEGMENT)

    @property
    def end(self) -> tuple[int, int]:
        """Segment and position up to which the log was written."""
        return self.number, self._position

    def begin(self, nbytes: int) -> None:
        """Begin an attempt to commit, in a segment into which `nbytes` of records fit.

        Raises
        ------
        DiskFullError
            The disk has no space for such a segment; nothing was changed.
        """
        self._drop_staged()
        if self._position + nbytes + PAGE > self._size:
            needed = round_up(nbytes, PAGE) + 2 * PAGE
            size = max(needed, min(2 * self._size, self._usual_bytes))
            with signals_deferred():
                self._next_segment(needed if self._has_spare(needed) else size, zeros=needed < LARGE_COMMIT)
        self.attempt += 1
        self._count = 0

    def append_images(
        self, table: str, count: int, record_bytes: int, fill: Callable[[Int64Array, int], None]
    ) -> None:
        """Append images of `count` rows of a table.

        ``fill(ids, address)`` takes the next rows: it writes their ids to `ids` and their records, contiguously, to an
        address.
        """
        step = images_per_record(record_bytes)
        for start in range(0, count, step):
            rows = min(step, count - start)
            offset = self._reserve(_images_bytes(rows, record_bytes)) + RECORD.size
            payload = self._stage.bytes(offset, rows * (8 + record_bytes))
            fill(np.frombuffer(payload[: rows * 8], np.int64), self._stage.address + offset + rows * 8)
            self._seal(offset - RECORD.size, IMAGES, payload, rows, uuid.UUID(table).bytes)
            self._count += rows

    def append_fill(self, filled: Filled, record_bytes: int) -> None:
        """Append what is in the shards already, and is durable there."""
        for part in filled.cut(record_bytes, _fill_blocks()):
            nbytes = fill_records.payload_bytes(part.sums.size)
            offset = self._reserve(RECORD.size + nbytes)
            payload = self._stage.bytes(offset + RECORD.size, nbytes)
            fill_records.pack(part, payload)
            self._seal(offset, FILL, payload, part.sums.size, uuid.UUID(part.fill.table).bytes)
            self._count += part.sums.size

    def append_commit(self, manifest: bytes) -> None:
        """Append the commit record, which makes all records of the attempt valid, and make all of it durable."""
        self._append_manifest(COMMIT, manifest)
        self._sync()

    def append_prepared(self, manifest: bytes) -> None:
        """Append the prepared record, which ends an attempt that is not decided yet, and make all of it durable.

        The commit record comes by `append_decision`, or never; space for it must have been part of what `begin` got.
        """
        self._append_manifest(PREPARED, manifest)
        self._sync()

    def append_decision(self, manifest: bytes) -> None:
        """Append the commit record of the attempt that is prepared, not synced: who lost it is told the decision."""
        self._append_manifest(COMMIT, manifest)

    def close_segments(self) -> list[Path]:
        """Continue in a new segment; return the earlier ones, which are closed.

        Raises
        ------
        DiskFullError
            The disk has no space for the new segment; nothing was changed.
        """
        self._drop_staged()
        number = self.number
        with signals_deferred():
            # A small one, if there is none to use again: maybe nothing follows, and zeros would be for nothing.
            self._next_segment(FIRST_SEGMENT)
        return [self._path(each) for each in segments(self._folder) if each <= number]

    def followed(self, manifest: Manifest) -> Manifest:
        """Return a manifest that says where the log goes on from here."""
        return replace(manifest, segment=self.number, sequence=self.sequence, attempt=self.attempt + 1)

    def discard(self, closed: Sequence[Path]) -> None:
        """Remove closed segments that the base no longer needs, or keep them for reuse."""
        for path in closed:
            nbytes = files.size(path) or 0
            if nbytes > self._usual_bytes:
                files.remove(path)
                continue
            spare = path.with_suffix(".spare")
            with self._spares_lock:
                files.rename(path, spare)
                insort(self._spares, (nbytes, spare))
        with self._spares_lock:
            while len(self._spares) > self._most_spares:
                files.remove(self._spares.pop(0)[1])

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            files.close(self._descriptor)
            self._descriptor = None

    # ---- internal

    def _append_manifest(self, kind: int, manifest: bytes) -> None:
        """Append a record with a manifest, which counts the images and blocks of the attempt."""
        offset = self._reserve(RECORD.size + len(manifest))
        payload = self._stage.bytes(offset + RECORD.size, len(manifest))
        payload[:] = manifest
        self._seal(offset, kind, payload, self._count)
        self._flush()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}{SUFFIX}"

    def _has_spare(self, nbytes: int) -> bool:
        """Return whether a discarded segment of `nbytes` or more can be used again."""
        return bool(self._spares) and self._spares[-1][0] >= nbytes

    def _next_segment(self, nbytes: int, *, zeros: bool = True) -> None:
        """Begin a segment of `nbytes`, after making the previous one durable."""
        self._sync()
        before, position, sequence = self._descriptor, self._position, self.sequence
        salt = self._salt
        self._begin_segment(nbytes, zeros=zeros)
        # The END record says that the next segment exists, so that its loss is noticed.
        assert before is not None
        path = self._path(self.number - 1)
        self._put_record(0, END, b"", 0, NO_TABLE, sequence - 1, salt, sequence)
        try:
            files.write(before, self._stage.bytes(0, PAGE), position, path)
            files.sync_data(before, path)
        except OSError as error:
            # No DiskFullError, even on a full disk: the next segment exists, and this one does not say so.
            raise OSError(errno.EIO, f"the END record of {path} cannot be written ({error})") from error
        finally:
            files.close(before)

    def _begin_segment(self, nbytes: int, *, zeros: bool = True) -> None:
        """Create a segment under a temporary name; give it its name once its space and header are durable.

        It takes the largest discarded one if that has `nbytes`.
        """
        number, salt = self.number + 1, uuid.uuid4().bytes  # a new salt invalidates what a reused file holds
        temporary = self._path(number).with_suffix(".new")
        files.remove(temporary)  # left by a writer that died while creating it
        descriptor = None
        try:
            with self._spares_lock:
                spare = None
                if self._has_spare(nbytes):
                    nbytes, spare = self._spares.pop()
                    files.rename(spare, temporary)
            if spare is None:
                files.write_new(temporary, b"")
            descriptor = files.open_direct(temporary)
            self._fill(descriptor, nbytes, temporary, zeros=zeros)
            header = HEADER.pack(
                MAGIC, self._version, self._epoch, number, self.sequence, nbytes, self._store, salt, 0
            )
            block = self._stage.bytes(0, PAGE)
            block[: HEADER.size] = header
            block[HEADER.size - 8 : HEADER.size] = checksum(header[:-8]).to_bytes(8, "little")
            files.write(descriptor, block, 0, temporary)
            files.sync(descriptor, temporary)
            # A segment gets its name after its header, so one without a header is damaged and not just new.
            files.rename(temporary, self._path(number))
        except BaseException:
            if descriptor is not None:
                files.close(descriptor)
            files.remove(temporary)
            raise
        try:
            files.sync_directory(self._folder)
        except BaseException as error:
            files.close(descriptor)
            # No DiskFullError: appending to the old segment after a retry would contradict the new one.
            raise OSError(errno.EIO, f"{self._folder} cannot be synced ({error})") from error
        self._descriptor, self._size, self._salt, self.number = descriptor, nbytes, salt, number
        self._position = PAGE

    def _fill(self, descriptor: int, nbytes: int, path: Path, *, zeros: bool) -> None:
        """Allocate the disk space of a segment.

        If it is filled with `zeros`, appends change no metadata of the file, and need only one cheap sync each.
        """
        if (files.size(path) or 0) >= nbytes:
            return
        if not zeros:  # a large commit writes the segment itself soon: writing it twice would cost more
            files.allocate(descriptor, 0, nbytes, path)
            files.write(descriptor, _zeros(self._stage, PAGE), nbytes - PAGE, path)
            return
        for offset in range(0, nbytes, STAGE_BYTES):
            length = min(STAGE_BYTES, nbytes - offset)
            files.write(descriptor, _zeros(self._stage, length), offset, path)

    def _reserve(self, nbytes: int) -> int:
        """Reserve space for a record in the stage; return its offset."""
        length = round_up(nbytes, PAGE)
        if self._staged + length > self._stage.nbytes:
            self._flush()
        if length > self._stage.nbytes:  # a commit record with a very large manifest
            self._stage = address_space.AddressRange(length)
            self._stage.map_zeros(0, length)
        offset = self._staged
        # Only the padding is cleared: the caller writes the rest.
        self._stage.bytes(offset, length)[nbytes:] = bytes(length - nbytes)
        self._staged += length
        return offset

    def _seal(
        self, offset: int, kind: int, payload: memoryview | bytes, count: int, table: bytes = NO_TABLE
    ) -> None:
        """Complete a staged record with its header, which takes the next sequence number."""
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
        """Write the header of a record to the stage."""
        header = RECORD.pack(
            RECORD_MAGIC,
            kind,
            len(payload),
            self._epoch,
            sequence,
            synced,
            self.attempt,
            count,
            table,
            checksum(payload),
            0,
        )
        crc = checksum(self._store + salt + header[:-8]).to_bytes(8, "little")
        self._stage.bytes(offset, RECORD.size)[:] = header[:-8] + crc

    def _flush(self) -> None:
        """Write the stage to the file. Not synced."""
        assert self._descriptor is not None
        with signals_deferred():  # a signal in between would leave the position behind what the file holds
            path = self._path(self.number)
            files.write(self._descriptor, self._stage.bytes(0, self._staged), self._position, path)
            self._position += self._staged
            self.nbytes += self._staged
            self._staged, self._next_on_disk = 0, self.sequence

    def _drop_staged(self) -> None:
        """Drop what a failed attempt has staged, and reuse its sequence numbers, which are not in the file."""
        self._staged, self.sequence = 0, self._next_on_disk

    def _sync(self) -> None:
        assert self._descriptor is not None
        files.sync_data(self._descriptor, self._path(self.number))
        self._synced = self.sequence - 1


def images_per_record(record_bytes: int) -> int:
    """Return how many rows' images one record may hold."""
    return (STAGE_BYTES - PAGE) // (8 + record_bytes)


def needed_bytes(counts: Sequence[tuple[int, int]], manifest_bytes: int) -> int:
    """Return the bytes that a commit appends, given ``(rows, record bytes)`` of each table and the manifest's bytes."""
    total = round_up(RECORD.size + manifest_bytes, PAGE)
    for rows, record_bytes in counts:
        full, rest = divmod(rows, images_per_record(record_bytes))
        total += full * round_up(_images_bytes(images_per_record(record_bytes), record_bytes), PAGE)
        total += round_up(_images_bytes(rest, record_bytes), PAGE) if rest else 0
    return total


def in_order(ids: Int64Array, pack: Callable[[int, int, int], None]) -> Callable[[Int64Array, int], None]:
    """Return what `Log.append_images` calls to take rows in order.

    ``pack(start, stop, address)`` copies the records of ``ids[start:stop]`` to an address.
    """
    taken = 0

    def fill(target: Int64Array, address: int) -> None:
        nonlocal taken
        start, taken = taken, taken + target.size
        target[:] = ids[start:taken]
        pack(start, taken, address)

    return fill


def needed_for_fill(filled: Filled, record_bytes: int) -> int:
    """Return the bytes that a commit appends for a fill."""
    parts = filled.cut(record_bytes, _fill_blocks())
    return sum(round_up(RECORD.size + fill_records.payload_bytes(part.sums.size), PAGE) for part in parts)


def _fill_blocks() -> int:
    return (STAGE_BYTES - PAGE) // 8


def _images_bytes(rows: int, record_bytes: int) -> int:
    return RECORD.size + rows * (8 + record_bytes)


def _zeros(memory: address_space.AddressRange, nbytes: int) -> memoryview:
    view = memory.bytes(0, nbytes)
    view[:] = bytes(nbytes)
    return view


def clear(folder: Path, first: int) -> None:
    """Remove the segments before `first`, and everything else in the folder that is not a segment."""
    files.make_directory(folder)
    for path in files.entries(folder):
        if not (path.suffix == SUFFIX and path.stem.isdigit() and int(path.stem) >= first):
            files.remove(path)
