"""Writes committed images into the shards and makes them durable. Nothing else writes to the shards of a table.

A fold writes whole blocks: it reads a block, changes it in memory, and writes it and its new checksum (see
``checksums.py``). Where many of its blocks are close together and not in the page cache, it writes long stretches past
the page cache; where they are few, it writes them one by one. Images are written even where the file seems to hold the
same: after a failed write-back the page cache can be right and the disk wrong.

::

    mark all blocks as in flux, sync -> write the blocks, sync each file -> write their checksums, sync

Blocks of the presence bitmap are written after those of the shards. So a row whose bit is set has its record, also for
a concurrent lookup, and after an interrupted fold.
"""

from __future__ import annotations

import os
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
    from shardemb.format.table_files import File, TableLocation
    from shardemb.storage.log_reader import Images

BUFFER_BLOCKS = 2048
"""Most blocks that a task holds in memory."""

DIRECT_BLOCKS = 16
"""Fewest contiguous blocks for which reading and writing past the page cache pays off."""


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


@dataclass
class _Task:
    """A patch to write, with the checksums of its blocks before, and an array for the checksums after."""

    patch: FilePatch
    checksums_path: Path
    known: NDArray[np.uint64]
    sums: NDArray[np.uint64]

    def run(self, advance: Advance) -> None:
        """Write the blocks, and unchanged blocks between them where that is cheaper; sync the file."""
        file = self.patch.file
        sums = checksums.read_sums(self.checksums_path, file.first, file.nbytes // PAGE)
        blocks = file_blocks.fill_windows(self.patch.blocks, sums != checksums.NEVER_WRITTEN)
        memory = address_space.AddressRange(min(BUFFER_BLOCKS, blocks.size) * PAGE)
        memory.map_zeros(0, memory.nbytes)
        with (
            files.opened(file.path, os.O_RDWR) as cached,
            files.opened_direct(file.path, os.O_RDWR) as direct,
        ):
            for start in range(0, blocks.size, BUFFER_BLOCKS):
                self._write(blocks[start : start + BUFFER_BLOCKS], cached, direct, memory, advance)
            files.sync_data(cached, file.path)

    def _write(
        self,
        blocks: Int64Array,
        cached: int,
        direct: int,
        memory: address_space.AddressRange,
        advance: Advance,
    ) -> None:
        """Read some blocks, check and change those of the patch, write all of them."""
        patch, path = self.patch, self.patch.file.path
        some = slice(*np.searchsorted(patch.blocks, [blocks[0], blocks[-1] + 1]).tolist())
        changed, whole, known = patch.blocks[some], patch.whole[some], self.known[some]
        at = np.searchsorted(blocks, changed)
        needs_read = np.ones(blocks.size, np.bool_)
        needs_read[at] = ~whole
        view, content = memory.bytes(0, blocks.size * PAGE), memory.array(np.uint8, (blocks.size, PAGE))
        stretches = _stretches(blocks, cached, direct)
        read = [each for each in stretches if needs_read[each.first : each.last].any()]
        for each in read:
            if each.descriptor == cached:  # so that the disk works on all of them while the first is read
                files.will_need(cached, each.offset, (each.last - each.first) * PAGE)
        for each in read:
            files.read_into(each.descriptor, view[each.buffer], each.offset, path)
        # A new checksum must not hide damage in the old part of a block: such a block stays marked as damaged.
        partly = np.flatnonzero(~whole)
        damaged = np.zeros(changed.size, np.bool_)
        damaged[partly] = checksums.differing(
            known[partly], content, at[partly], lambda i: patch.new_bits(changed[partly[i]])
        )
        patch.apply(blocks, content.reshape(-1))
        self.sums[some] = np.where(damaged, np.uint64(checksums.DAMAGED), checksums.block_sums(view, at))
        for each in stretches:
            files.write(each.descriptor, view[each.buffer], each.offset, path)
        advance(changed.size * PAGE)


def _stretches(blocks: Int64Array, cached: int, direct: int) -> list[_Stretch]:
    """Cut blocks into contiguous stretches, and choose for each whether it bypasses the page cache."""
    stretches = []
    for first, last in file_blocks.runs(blocks):
        offset, nbytes = int(blocks[first]) * PAGE, (last - first) * PAGE
        # A stretch that the page cache holds is read and written there, so that a warm table stays warm.
        is_direct = last - first >= DIRECT_BLOCKS and address_space.cached_share(cached, offset, nbytes) < 0.5
        stretches.append(_Stretch(direct if is_direct else cached, offset, first, last))
    return stretches


def write(tables: Sequence[tuple[TableLocation, Images]], threads: int, shown: bool = False) -> None:
    """Write the images of all tables, each file in one task, and sync every file that was written.

    With `shown`, a bar or lines on stderr show how far it is.

    Raises
    ------
    DiskFullError
        The disk is full. Any part may have been written; the call can be repeated.
    """
    records: list[_Task] = []
    bits: list[_Task] = []
    sums = []
    for table, images in tables:
        changed = list(patches(table, images))
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
            _run(tasks, threads, advance)
    for path, blocks, new in sums:
        checksums.write_sums(path, blocks, new)


def _run(tasks: Sequence[_Task], threads: int, advance: Advance) -> None:
    def some(task: int, step: int) -> None:
        for each in tasks[task::step]:
            each.run(advance)

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
        for number, some in _by_file(images, 8 * spec.presence_chunk_bytes):
            bits = some.ids - number * 8 * spec.presence_chunk_bytes
            blocks = file_blocks.pages(bits // 8, 1)
            set_bits = partial(file_blocks.patch_bits, bits)  # a fold only ever sets bits in a bitmap
            whole = np.zeros(blocks.size, np.bool_)
            yield FilePatch(table.presence_chunk(number), blocks, whole, set_bits, set_bits)


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
