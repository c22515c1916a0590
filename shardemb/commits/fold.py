"""Writes committed images into the shards and makes them durable. Only fills write to the shards of a table besides.

A fold writes whole blocks: it reads a block, changes it in memory, and writes it and its new checksum (see
``checksums.py``). Where many of its blocks are close together and not in the page cache, it writes long stretches past
the page cache; where they are few, it writes them one by one. Images are written even where the file seems to hold the
same: after a failed write-back the page cache can be right and the disk wrong.

::

    write the checksums of fills, sync
    mark all blocks as in flux, sync -> write the blocks, sync each file -> write their checksums, sync

The rows of a fill are in the shards already, and durable. Their blocks get the checksums that the log has, but only
where they have none: an interrupted fold may have written images to them since.

Blocks of the presence bitmap are written after those of the shards. So a row whose bit is set has its record, also for
a concurrent lookup, and after an interrupted fold.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb.base.progress import track
from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks, scheduler
from shardemb.storage import address_space, checksums, files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.progress import Advance
    from shardemb.base.validation import Int64Array
    from shardemb.commits.log_reader import Images
    from shardemb.commits.undo import Undo
    from shardemb.format.fill_records import Filled
    from shardemb.format.table_files import File, TableLocation

BUFFER_BLOCKS = 2048
"""Most blocks that a task holds in memory."""

DIRECT_BLOCKS = 16
"""Fewest contiguous blocks for which reading and writing past the page cache pays off."""


REST = 0.5
"""How long a fold rests after a piece of work beside cold lookups, as a multiple of the time that the piece took."""

RECENT_S = 2.0
"""For how many seconds after the last cold lookup began a fold gives way to the next one."""


class Pace:
    """Lets a fold give way to lookups that read from the same disk, unless somebody waits for the fold.

    Beside them, it does one piece at a time, waits until the disk has it, and rests.

    Parameters
    ----------
    cold_lookups : callable
        Returns how many lookups so far have found pages that were not in memory.
    hurry : threading.Event
        Set while the fold must not rest; that ends a rest too.
    """

    def __init__(self, cold_lookups: Callable[[], int], hurry: threading.Event) -> None:
        self._cold_lookups, self._hurry = cold_lookups, hurry
        self._seen, self._recent = cold_lookups(), -RECENT_S
        self._turn = threading.Lock()

    def gives_way(self) -> bool:
        """Return whether there are cold lookups to give way to."""
        count, now = self._cold_lookups(), time.monotonic()
        if count != self._seen:
            self._seen, self._recent = count, now
        return now - self._recent < RECENT_S and not self._hurry.is_set()

    @contextlib.contextmanager
    def piece(self) -> Iterator[bool]:
        """Do a piece of work in a with block, and rest after it if the fold gives way, which is what this yields."""
        if self.gives_way():
            with self._turn:
                if self.gives_way():  # still, after others had their turn
                    begun = time.monotonic()
                    yield True
                    self._hurry.wait(REST * (time.monotonic() - begun))
                    return
        yield False


class FilePatch(NamedTuple):
    """The new content of one file.

    Attributes
    ----------
    file : File
    blocks : ndarray of int64
        Numbers, within the file, of the blocks that change; ascending.
    whole : ndarray of bool
        Whether a block is replaced entirely, so that its old content does not matter.
    apply, set_bits : callable
        ``apply(blocks, memory)`` writes the new content of some blocks to memory that holds these blocks contiguously.
        ``set_bits(blocks, memory)`` sets to 1 every bit that `apply` would write.
    """

    file: File
    blocks: Int64Array
    whole: NDArray[np.bool_]
    apply: Callable[[Int64Array, NDArray[np.uint8]], None]
    set_bits: Callable[[Int64Array, NDArray[np.uint8]], None]

    def new_bits(self, blocks: Int64Array) -> NDArray[np.uint8]:
        """Return for some blocks which of their bits are new: those are 1, in an array of shape (blocks, PAGE)."""
        bits = np.zeros(blocks.size * PAGE, np.uint8)
        if blocks.size:
            self.set_bits(blocks, bits)
        return bits.reshape(-1, PAGE)


class _Stretch(NamedTuple):
    """Contiguous blocks, which are read in one call and written in one call."""

    descriptor: int
    offset: int  # in the file
    first: int  # first and one past the last block, in the buffer
    last: int

    @property
    def buffer(self) -> slice:
        """Where the blocks are in the buffer, in bytes."""
        return slice(self.first * PAGE, self.last * PAGE)


class _Descriptors(NamedTuple):
    """One file, opened twice."""

    cached: int
    direct: int  # past the page cache


@dataclass
class _Task:
    """A patch to write, with the checksums of its blocks before, and an array for the checksums after."""

    patch: FilePatch
    checksums_path: Path
    known: NDArray[np.uint64]
    sums: NDArray[np.uint64]

    def run(self, advance: Advance, pace: Pace) -> None:
        """Write the blocks, and unchanged blocks between them where that is cheaper; sync the file."""
        file = self.patch.file
        sums = checksums.read_sums(self.checksums_path, file.first, file.nbytes // PAGE)
        blocks, written = file_blocks.widen(self.patch.blocks, sums != checksums.NEVER_WRITTEN)
        memory = address_space.AddressRange(min(BUFFER_BLOCKS, blocks.size) * PAGE)
        memory.map_zeros(0, memory.nbytes)
        with (
            files.opened(file.path, os.O_RDWR) as cached,
            files.opened_direct(file.path, os.O_RDWR) as direct,
        ):
            for start in range(0, blocks.size, BUFFER_BLOCKS):
                part = slice(start, start + BUFFER_BLOCKS)
                with pace.piece() as gives_way:
                    self._write(blocks[part], written[part], _Descriptors(cached, direct), memory)
                    if gives_way:  # else the sync would be one long piece
                        begin, end = int(blocks[part][0]) * PAGE, (int(blocks[part][-1]) + 1) * PAGE
                        address_space.write_back(cached, begin, end - begin, file.path)
                within = self._within(blocks[part])
                advance((within.stop - within.start) * PAGE)
            files.sync_data(cached, file.path)

    def _within(self, blocks: Int64Array) -> slice:
        """Return which of the blocks that change are among contiguous ones of the file."""
        return slice(*np.searchsorted(self.patch.blocks, [blocks[0], blocks[-1] + 1]).tolist())

    def _write(
        self,
        blocks: Int64Array,
        written: NDArray[np.bool_],
        descriptors: _Descriptors,
        memory: address_space.AddressRange,
    ) -> None:
        """Read some blocks, check and change those of the patch, write them and those between."""
        patch, path = self.patch, self.patch.file.path
        some = self._within(blocks)
        changed, whole, known = patch.blocks[some], patch.whole[some], self.known[some]
        at = np.searchsorted(blocks, changed)
        view, content = memory.bytes(0, blocks.size * PAGE), memory.array(np.uint8, (blocks.size, PAGE))
        needs_read = written.copy()
        needs_read[at] = ~whole
        _read(_stretches(blocks, np.arange(blocks.size), descriptors), needs_read, view, descriptors, path)
        # A new checksum must not hide damage in the old part of a block: such a block stays marked as damaged.
        partly = np.flatnonzero(~whole)
        damaged = np.zeros(changed.size, np.bool_)
        damaged[partly] = checksums.differing(
            known[partly], content, at[partly], lambda i: patch.new_bits(changed[partly[i]])
        )
        patch.apply(blocks, content.reshape(-1))
        self.sums[some] = np.where(damaged, np.uint64(checksums.DAMAGED), checksums.block_sums(view, at))
        for each in _stretches(blocks, np.flatnonzero(written), descriptors):
            files.write(each.descriptor, view[each.buffer], each.offset, path)


def _read(
    stretches: list[_Stretch],
    needed: NDArray[np.bool_],
    view: memoryview,
    descriptors: _Descriptors,
    path: Path,
) -> None:
    """Read the stretches of which something is needed."""
    wanted = [each for each in stretches if needed[each.first : each.last].any()]
    for each in wanted:
        if (
            each.descriptor == descriptors.cached
        ):  # so that the disk works on all of them while the first is read
            files.will_need(each.descriptor, each.offset, (each.last - each.first) * PAGE)
    for each in wanted:
        files.read_into(each.descriptor, view[each.buffer], each.offset, path)


def _stretches(blocks: Int64Array, which: Int64Array, descriptors: _Descriptors) -> list[_Stretch]:
    """Cut ``blocks[which]`` into contiguous stretches, and choose for each whether it bypasses the page cache."""
    stretches = []
    for first, last in file_blocks.runs(blocks[which]):
        begin, count = int(which[first]), last - first
        offset, nbytes = int(blocks[begin]) * PAGE, count * PAGE
        # A stretch that the page cache holds is read and written there, so that a warm table stays warm.
        is_direct = (
            count >= DIRECT_BLOCKS and address_space.cached_share(descriptors.cached, offset, nbytes) < 0.5
        )
        stretches.append(
            _Stretch(descriptors.direct if is_direct else descriptors.cached, offset, begin, begin + count)
        )
    return stretches


def write(
    tables: Sequence[tuple[TableLocation, Images]],
    threads: int,
    undo: Undo | None = None,
    shown: bool = False,
    pace: Pace | None = None,
) -> None:
    """Write the images of all tables, each file in one task, and sync every file that was written.

    What tags have of the blocks is kept in `undo` first. With `shown`, a bar or lines on stderr show how far it is.
    With a `pace`, it gives way to lookups.

    Raises
    ------
    DiskFullError
        The disk is full. Any part may have been written; the call can be repeated.
    """
    pace = pace or Pace(lambda: 0, threading.Event())
    records: list[_Task] = []
    bits: list[_Task] = []
    sums = []
    every = [(table, images, list(patches(table, images))) for table, images in tables]
    if undo is not None:
        undo.keep([(patch.file.path, patch.blocks) for *_, changed in every for patch in changed])
    for table, images, changed in every:
        if images.fills:
            _register(table, images.fills)
        if not changed:
            continue
        path = table.checksums_path
        blocks = np.concatenate([patch.file.first + patch.blocks for patch in changed])
        known, new = checksums.mark_in_flux(path, blocks), np.empty(blocks.size, np.uint64)
        sums.append((path, blocks, new))
        stop = 0
        for patch in changed:
            start, stop = stop, stop + patch.blocks.size
            task = _Task(patch, path, known[start:stop], new[start:stop])
            (bits if patch.file.row_bits == 1 else records).append(task)
    total = sum(new.size for _, _, new in sums) * PAGE
    with track(total, "folding the log", unit="byte", progress=shown) as advance:
        for tasks in (records, bits):
            _run(tasks, threads, advance, pace)
    for path, blocks, new in sums:
        checksums.write_sums(path, blocks, new)


def _register(table: TableLocation, fills: Sequence[Filled]) -> None:
    """Give blocks of fills the checksums that the log has, unless they have one."""
    ascending = sorted(fills, key=lambda each: each.fill.first)
    blocks = np.concatenate([np.arange(fill.first, fill.stop) for fill, _ in ascending])
    checksums.add_sums(table.checksums_path, blocks, np.concatenate([sums for _, sums in ascending]))


def _run(tasks: Sequence[_Task], threads: int, advance: Advance, pace: Pace) -> None:
    def some(task: int, step: int) -> None:
        for each in tasks[task::step]:
            each.run(advance, pace)

    number = min(2 * threads, len(tasks))
    scheduler.run([partial(some, task, number) for task in range(number)], threads)


def patches(table: TableLocation, images: Images) -> Iterator[FilePatch]:
    """Yield what the images of a table change in each of its files, in the order of their blocks."""
    spec = table.spec
    ones = np.full(spec.record_bytes, 255, np.uint8)
    for number, some in _by_file(images, spec.rows_per_shard):
        ids = some.ids - number * spec.rows_per_shard
        blocks = file_blocks.pages(ids, spec.record_bytes)
        covered = np.zeros(blocks.size, np.int64)
        file_blocks.count_bytes(ids, spec.record_bytes, blocks, covered)
        same = np.full(ids.size, ones.ctypes.data)  # each record is "copied" from the ones
        yield FilePatch(
            table.shard(number),
            blocks,
            covered == PAGE,
            partial(file_blocks.patch, some.addresses, ids, spec.record_bytes),
            partial(_keeping, ones, partial(file_blocks.patch, same, ids, spec.record_bytes)),
        )
    if spec.has_presence:
        yield from _presence_patches(table, images)


def _presence_patches(table: TableLocation, images: Images) -> Iterator[FilePatch]:
    """Yield what images and fills change in the presence bitmap; a fold only ever sets bits in it."""
    rows_per_chunk = 8 * table.spec.presence_chunk_bytes
    ids = dict(_by_file(images, rows_per_chunk))
    none = type(images)(*np.empty((2, 0), np.int64))
    rows = [each.fill.rows(table.spec.record_bytes) for each in images.fills]
    numbers = {
        number
        for start, stop in rows
        for number in range(start // rows_per_chunk, -(-stop // rows_per_chunk))
    }
    for number in sorted(numbers | ids.keys()):
        first = number * rows_per_chunk
        bits = ids.get(number, none).ids - first
        ranges = np.clip(np.array(rows, np.int64).reshape(-1, 2) - first, 0, rows_per_chunk)
        ranges = ranges[ranges[:, 0] < ranges[:, 1]]
        pages = [
            np.arange(start // 8 // PAGE, (stop - 1) // 8 // PAGE + 1) for start, stop in ranges.tolist()
        ]
        blocks = np.unique(np.concatenate([file_blocks.pages(bits // 8, 1), *pages]))
        set_bits = partial(_set_bits, bits, ranges)
        yield FilePatch(
            table.presence_chunk(number), blocks, np.zeros(blocks.size, np.bool_), set_bits, set_bits
        )


def _set_bits(bits: Int64Array, ranges: Int64Array, blocks: Int64Array, memory: NDArray[np.uint8]) -> None:
    file_blocks.patch_bits(bits, blocks, memory)
    file_blocks.set_ranges(ranges, blocks, memory)


def _keeping(
    ones: NDArray[np.uint8],  # the memory whose address `set_bits` holds, kept alive by this argument
    set_bits: Callable[[Int64Array, NDArray[np.uint8]], None],
    blocks: Int64Array,
    memory: NDArray[np.uint8],
) -> None:
    set_bits(blocks, memory)


def _by_file(images: Images, rows_per_file: int) -> Iterator[tuple[int, Images]]:
    """Split images by the number of the file that their rows belong to."""
    numbers = images.ids // rows_per_file
    edges = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), images.ids.size]
    for start, stop in pairwise(edges):
        yield int(numbers[start]), type(images)(images.ids[start:stop], images.addresses[start:stop])
