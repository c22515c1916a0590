"""Writes committed images into the shards, and makes them durable. Nothing else writes to the shards of a table.

Whole blocks are written: read, changed in memory, and written with their new checksum (see ``checks.py``), in long
stretches past the page cache where many of them lie close together and the page cache has them not, one by one where
they are few. Images overwrite
whatever is there, also where it looks the same: after a write-back that failed, what is in the page cache can be right
and what is on the disk wrong.

::

    say that all blocks are in flux, synced -> write the blocks, synced file by file -> note their checksums, synced

Blocks of the presence bitmap come after those of the shards: a row whose bit is set has its record, also for whoever
looks it up meanwhile, and where a fold has broken off.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks, scheduler
from shardemb.format import table_files
from shardemb.storage import address_space, checksums, files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.format.spec import TableSpec
    from shardemb.storage.log_reader import Images

BUFFER_BLOCKS = 2048
"""Blocks that a task holds in memory."""

DIRECT_BLOCKS = 16
"""Blocks in a row that are worth a read and a write past the page cache."""


class FilePatch(NamedTuple):
    """What is new in one file.

    Attributes
    ----------
    file : checks.File
    blocks : ndarray of int64
        Within the file, ascending.
    whole : ndarray of bool
        Whether nothing of a block remains as it was.
    change, mark : callable
        ``change(blocks, memory)`` puts what is new into blocks that lie one behind the other; `mark` sets the bits of
        all that is new instead.
    """

    file: table_files.File
    blocks: Int64Array
    whole: NDArray[np.bool_]
    apply: Callable[[Int64Array, NDArray[np.uint8]], None]
    set_bits: Callable[[Int64Array, NDArray[np.uint8]], None]

    def new_bits(self, blocks: Int64Array) -> NDArray[np.uint8]:
        """Return blocks in which the bits are set of all that is new, shape (blocks, PAGE)."""
        marks = np.zeros(blocks.size * PAGE, np.uint8)
        if blocks.size:
            self.set_bits(blocks, marks)
        return marks.reshape(-1, PAGE)


@dataclass
class _Task:
    """What is new in one file, with the table's checksums: their file, those before, and room for those after."""

    patch: FilePatch
    checksums_path: Path
    known: NDArray[np.uint64]
    sums: NDArray[np.uint64]

    def run(self) -> None:
        """Write the blocks, and what is worth to be written along with them, and sync the file."""
        file = self.patch.file
        has_data = (
            checksums.read_sums(self.checksums_path, file.first, file.nbytes // PAGE)
            != checksums.NEVER_WRITTEN
        )
        blocks = file_blocks.fill_windows(self.patch.blocks, has_data)
        memory = address_space.AddressRange(min(BUFFER_BLOCKS, blocks.size) * PAGE)
        memory.map_zeros(0, memory.nbytes)
        with (
            files.opened(file.path, os.O_RDWR) as cached,
            files.opened_direct(file.path, os.O_RDWR) as direct,
        ):
            for start in range(0, blocks.size, BUFFER_BLOCKS):
                self._write(blocks[start : start + BUFFER_BLOCKS], cached, direct, memory)
            files.sync_data(cached, file.path)

    def _write(
        self, blocks: Int64Array, cached: int, direct: int, memory: address_space.AddressRange
    ) -> None:
        path, offsets = self.patch.file.path, (blocks * PAGE).tolist()
        some = slice(*np.searchsorted(self.patch.blocks, [blocks[0], blocks[-1] + 1]).tolist())
        new, whole, known = self.patch.blocks[some], self.patch.whole[some], self.known[some]
        at = np.searchsorted(blocks, new)
        complete = np.zeros(blocks.size, np.bool_)
        complete[at] = whole
        view = memory.bytes(0, blocks.size * PAGE)
        stretches = []
        for first, last in file_blocks.runs(blocks):
            place, offset = slice(first * PAGE, last * PAGE), offsets[first]
            is_long = last - first >= DIRECT_BLOCKS
            # What is in the page cache is read and written there: a table that is warm stays so.
            past = is_long and address_space.cached_share(cached, offset, place.stop - place.start) < 0.5
            stretches.append((direct if past else cached, place, offset))
        read = [
            each for each in stretches if not complete[each[1].start // PAGE : each[1].stop // PAGE].all()
        ]
        for descriptor, place, offset in read:
            if descriptor == cached:
                files.will_need(descriptor, offset, place.stop - place.start)
        for descriptor, place, offset in read:
            files.read_into(descriptor, view[place], offset, path)
        # A block that was damaged stays marked as damaged, although a part of it is rewritten.
        content = memory.array(np.uint8, (blocks.size, PAGE))
        kept = np.flatnonzero(~whole)
        damaged = np.zeros(new.size, np.bool_)
        damaged[kept] = checksums.differing(
            known[kept], content, at[kept], lambda i: self.patch.new_bits(new[kept[i]])
        )
        self.patch.apply(blocks, content.reshape(-1))
        self.sums[some] = np.where(damaged, np.uint64(checksums.DAMAGED), checksums.block_sums(view, at))
        for descriptor, place, offset in stretches:
            files.write(descriptor, view[place], offset, path)


def write(tables: Sequence[tuple[TableSpec, Path, Images]], threads: int) -> None:
    """Write the images of all tables, each file within one task, and sync every file that was written to.

    Raises
    ------
    DiskFullError
        The disk is full. Any part may have been written; the call can be repeated.
    """
    records: list[_Task] = []
    bits: list[_Task] = []
    sums = []
    for spec, directory, images in tables:
        changed = list(patches(spec, directory, images))
        if not changed:
            continue
        blocks = np.concatenate([patch.file.first + patch.blocks for patch in changed])
        path, new = table_files.checksums_path(directory), np.empty(blocks.size, np.uint64)
        known = checksums.mark_in_flux(path, blocks)
        sums.append((path, blocks, new))
        stop = 0
        for patch in changed:
            start, stop = stop, stop + patch.blocks.size
            task = _Task(patch, path, known[start:stop], new[start:stop])
            (bits if patch.file.row_bits == 1 else records).append(task)
    for tasks in (records, bits):
        _run(tasks, threads)
    for path, blocks, new in sums:
        checksums.write_sums(path, blocks, new)


def _run(tasks: Sequence[_Task], threads: int) -> None:
    def some(task: int, step: int) -> None:
        for each in tasks[task::step]:
            each.run()

    number = min(2 * threads, len(tasks))
    scheduler.run([partial(some, task, number) for task in range(number)], threads)


def patches(spec: TableSpec, directory: Path, images: Images) -> Iterator[FilePatch]:
    """List what is new, file by file, in the order of their blocks."""
    ones = np.full(spec.record_bytes, 255, np.uint8)
    for number, some in _by_file(images, spec.rows_per_shard):
        ids = some.ids - number * spec.rows_per_shard
        blocks = file_blocks.pages(ids, spec.record_bytes)
        covered = np.zeros(blocks.size, np.int64)
        file_blocks.count_bytes(ids, spec.record_bytes, blocks, covered)
        same = np.full(ids.size, ones.ctypes.data)
        yield FilePatch(
            table_files.shard(spec, directory, number),
            blocks,
            covered == PAGE,
            partial(file_blocks.patch, some.addresses, ids, spec.record_bytes),
            partial(_keeping, ones, partial(file_blocks.patch, same, ids, spec.record_bytes)),
        )
    if spec.has_presence:
        for number, some in _by_file(images, 8 * spec.presence_chunk_bytes):
            bits = some.ids - number * 8 * spec.presence_chunk_bytes
            blocks = file_blocks.pages(bits // 8, 1)
            change = partial(file_blocks.patch_bits, bits)
            whole = np.zeros(blocks.size, np.bool_)
            yield FilePatch(
                table_files.presence_chunk(spec, directory, number), blocks, whole, change, change
            )


def _keeping(
    ones: NDArray[np.uint8],  # keeps alive the memory whose address `set_bits` holds
    set_bits: Callable[[Int64Array, NDArray[np.uint8]], None],
    blocks: Int64Array,
    memory: NDArray[np.uint8],
) -> None:
    set_bits(blocks, memory)


def _by_file(images: Images, rows_per_file: int) -> Iterator[tuple[int, Images]]:
    numbers = images.ids // rows_per_file
    edges = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), images.ids.size]
    for start, stop in pairwise(edges):
        yield int(numbers[start]), type(images)(images.ids[start:stop], images.addresses[start:stop])
