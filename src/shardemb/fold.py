"""Writes committed images into the shards, and makes them durable. Nothing else writes to the shards of a table.

Whole blocks are written: read, changed in memory, and written with their new checksum (see ``checks.py``). Images
overwrite whatever is there, also where it looks the same: after a write-back that failed, what is in the page cache can
be right and what is on the disk wrong.

::

    say that all blocks are in flux, synced -> write the blocks, synced file by file -> note their checksums, synced
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb import bitmaps, checks, files, kernels, plan, scheduler
from shardemb.spec import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.arrays import Int64Array
    from shardemb.replay import Images
    from shardemb.spec import TableSpec

BUFFER_BLOCKS = 2048


class Part(NamedTuple):
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

    file: checks.File
    blocks: Int64Array
    whole: NDArray[np.bool_]
    change: Callable[[Int64Array, NDArray[np.uint8]], None]
    mark: Callable[[Int64Array, NDArray[np.uint8]], None]

    def anew(self, blocks: Int64Array) -> NDArray[np.uint8]:
        """Return blocks in which the bits are set of all that is new, shape (blocks, PAGE)."""
        marks = np.zeros(blocks.size * PAGE, np.uint8)
        if blocks.size:
            self.mark(blocks, marks)
        return marks.reshape(-1, PAGE)


@dataclass
class _Task:
    """Blocks ``start:stop`` of a table's, all of one part."""

    part: Part
    known: NDArray[np.uint64]
    sums: NDArray[np.uint64]

    def run(self) -> None:
        """Write the blocks and sync the file."""
        file, blocks = self.part.file, self.part.blocks
        memory = files.AddressRange(min(BUFFER_BLOCKS, blocks.size) * PAGE)
        memory.map_zeros(0, memory.nbytes)
        with files.opened(file.path, os.O_RDWR) as descriptor:
            for start in range(0, blocks.size, BUFFER_BLOCKS):
                some = slice(start, start + BUFFER_BLOCKS)
                self._write(descriptor, memory, some)
            files.sync_data(descriptor, file.path)

    def _write(self, descriptor: int, memory: files.AddressRange, some: slice) -> None:
        path, blocks = self.part.file.path, self.part.blocks[some]
        array = memory.array(np.uint8, (blocks.size * PAGE,))
        view = array.data
        kept = np.flatnonzero(~self.part.whole[some])
        for first, last in plan.runs(blocks[kept]):
            at, end = int(kept[first]), int(kept[last - 1]) + 1
            files.read_into(descriptor, view[at * PAGE : end * PAGE], int(blocks[at]) * PAGE, path)
        # What was damaged stays so, though a part of it is written anew.
        damaged = np.zeros(blocks.size, np.bool_)
        for block, anew in zip(kept.tolist(), self.part.anew(blocks[kept]), strict=True):
            content = array[block * PAGE : (block + 1) * PAGE]
            damaged[block] = checks.is_wrong(int(self.known[some][block]), content, anew)
        self.part.change(blocks, array)
        for first, last in plan.runs(blocks):
            files.write(descriptor, view[first * PAGE : last * PAGE], int(blocks[first]) * PAGE, path)
        self.sums[some] = np.where(damaged, np.uint64(checks.DAMAGED), checks.block_sums(view))


def write(tables: Sequence[tuple[TableSpec, Path, Images]], threads: int) -> None:
    """Write the images of all tables, each file within one task, and sync every file that was written to.

    Raises
    ------
    DiskFullError
        There is no room. Any part of it may have been written; it can be done again.
    """
    tasks, sums = [], []
    for spec, directory, images in tables:
        changed = list(parts(spec, directory, images))
        if not changed:
            continue
        blocks = np.concatenate([part.file.first + part.blocks for part in changed])
        known, new = checks.begin(checks.path_of(directory), blocks), np.empty(blocks.size, np.uint64)
        sums.append((directory, blocks, new))
        stop = 0
        for part in changed:
            start, stop = stop, stop + part.blocks.size
            tasks.append(_Task(part, known[start:stop], new[start:stop]))

    def some(task: int, step: int) -> None:
        for each in tasks[task::step]:
            each.run()

    number = min(2 * threads, len(tasks))
    scheduler.run([partial(some, task, number) for task in range(number)], threads)
    for directory, blocks, new in sums:
        checks.note(checks.path_of(directory), blocks, new)


def parts(spec: TableSpec, directory: Path, images: Images) -> Iterator[Part]:
    """List what is new, file by file, in the order of their blocks."""
    ones = np.full(spec.record_bytes, 255, np.uint8)
    for number, some in _by_file(images, spec.rows_per_shard):
        ids = some.ids - number * spec.rows_per_shard
        blocks = plan.pages(ids, spec.record_bytes)
        covered = np.zeros(blocks.size, np.int64)
        kernels.count_bytes(ids, spec.record_bytes, blocks, covered)
        same = np.full(ids.size, ones.ctypes.data)
        yield Part(
            checks.shard(spec, directory, number),
            blocks,
            covered == PAGE,
            partial(kernels.patch, some.addresses, ids, spec.record_bytes),
            partial(_mark, ones, partial(kernels.patch, same, ids, spec.record_bytes)),
        )
    if spec.has_presence:
        for number, some in _by_file(images, 8 * spec.presence_chunk_bytes):
            bits = some.ids - number * 8 * spec.presence_chunk_bytes
            blocks = plan.pages(bits // 8, 1)
            change = partial(bitmaps.patch_bits, bits)
            whole = np.zeros(blocks.size, np.bool_)
            yield Part(checks.presence_chunk(spec, directory, number), blocks, whole, change, change)


def _mark(
    ones: NDArray[np.uint8],  # which the addresses of `mark` are those of
    mark: Callable[[Int64Array, NDArray[np.uint8]], None],
    blocks: Int64Array,
    memory: NDArray[np.uint8],
) -> None:
    mark(blocks, memory)


def _by_file(images: Images, rows_per_file: int) -> Iterator[tuple[int, Images]]:
    numbers = images.ids // rows_per_file
    edges = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), images.ids.size]
    for start, stop in pairwise(edges):
        yield int(numbers[start]), type(images)(images.ids[start:stop], images.addresses[start:stop])
