"""Writes committed images into the shards, and makes them durable. Nothing else writes to the shards of a table.

Whole blocks are written: read, changed in memory, and written with their new checksum (see ``checks.py``). Images
overwrite whatever is there, also where it looks the same: after a write-back that failed, what is in the page cache can
be right and what is on the disk wrong.

::

    forget the checksums of all blocks, synced -> write the blocks, synced file by file -> note their checksums, synced
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


class _Part(NamedTuple):
    """What is new in one file.

    Attributes
    ----------
    file : checks.File
    blocks : ndarray of int64
        Within the file, ascending.
    whole : ndarray of bool
        Whether nothing of a block remains as it was.
    change : callable
        ``change(blocks, memory)`` puts what is new into blocks that lie one behind the other.
    """

    file: checks.File
    blocks: Int64Array
    whole: NDArray[np.bool_]
    change: Callable[[Int64Array, NDArray[np.uint8]], None]


@dataclass
class _Task:
    """Blocks ``start:stop`` of a table's, all of one part."""

    part: _Part
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
        known, damaged = self.known[some], np.zeros(blocks.size, np.bool_)
        for block in kept[known[kept] != checks.UNKNOWN].tolist():
            damaged[block] = checks.block_sum(view[block * PAGE : (block + 1) * PAGE]) != known[block]
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
    changed = [(directory, list(_parts(*table))) for table in tables for directory in (table[1],)]
    changed = [(directory, parts) for directory, parts in changed if parts]
    tasks, sums = [], []
    for directory, parts in changed:
        blocks = np.concatenate([part.file.first + part.blocks for part in parts])
        known = checks.exchange(
            checks.path_of(directory), blocks, np.full(blocks.size, checks.UNKNOWN, np.uint64)
        )
        new = np.empty(blocks.size, np.uint64)
        sums.append((directory, blocks, new))
        stop = 0
        for part in parts:
            start, stop = stop, stop + part.blocks.size
            tasks.append(_Task(part, known[start:stop], new[start:stop]))

    def some(task: int, step: int) -> None:
        for each in tasks[task::step]:
            each.run()

    number = min(2 * threads, len(tasks))
    scheduler.run([partial(some, task, number) for task in range(number)], threads)
    for directory, blocks, new in sums:
        checks.exchange(checks.path_of(directory), blocks, new)


def _parts(spec: TableSpec, directory: Path, images: Images) -> Iterator[_Part]:
    for number, some in _by_file(images, spec.rows_per_shard):
        ids = some.ids - number * spec.rows_per_shard
        blocks = plan.pages(ids, spec.record_bytes)
        covered = np.zeros(blocks.size, np.int64)
        kernels.count_bytes(ids, spec.record_bytes, blocks, covered)
        change = partial(kernels.patch, some.addresses, ids, spec.record_bytes)
        yield _Part(checks.shard(spec, directory, number), blocks, covered == PAGE, change)
    if spec.has_presence:
        for number, some in _by_file(images, 8 * spec.presence_chunk_bytes):
            bits = some.ids - number * 8 * spec.presence_chunk_bytes
            blocks = plan.pages(bits // 8, 1)
            yield _Part(
                checks.presence_chunk(spec, directory, number),
                blocks,
                np.zeros(blocks.size, np.bool_),
                partial(bitmaps.patch_bits, bits),
            )


def _by_file(images: Images, rows_per_file: int) -> Iterator[tuple[int, Images]]:
    numbers = images.ids // rows_per_file
    edges = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), images.ids.size]
    for start, stop in pairwise(edges):
        yield int(numbers[start]), type(images)(images.ids[start:stop], images.addresses[start:stop])
