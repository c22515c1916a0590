"""Writes committed images into the shards, and makes them durable. Nothing else writes to the shards of a table.

Images overwrite whatever is there, also where it looks the same: after a write-back that failed, what is in the page
cache can be right and what is on the disk wrong.
"""

from __future__ import annotations

import os
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb import files, kernels, layout, plan, scheduler
from shardemb.spec import PAGE, ROWS_PER_BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from shardemb.replay import Images
    from shardemb.spec import TableSpec

BUFFER_BYTES = 8 * 2**20


class _Piece(NamedTuple):
    """Images ``start:stop`` of a table, all of one file."""

    spec: TableSpec
    directory: Path
    images: Images
    file: int
    start: int
    stop: int


def write(tables: Sequence[tuple[TableSpec, Path, Images]], threads: int) -> None:
    """Write the images of all tables, each file within one task, and sync every file that was written to.

    Raises
    ------
    DiskFullError
        There is no room. Any part of it may have been written; it can be done again.
    """
    rows = [piece for table in tables for piece in _pieces(*table, table[0].rows_per_shard)]
    bits = [
        piece
        for table in tables
        if table[0].has_presence
        for piece in _pieces(*table, table[0].presence_chunk_bytes * 8)
    ]
    work = [partial(_write_rows, piece) for piece in rows] + [partial(_write_bits, piece) for piece in bits]

    def some(task: int, step: int) -> None:
        for each in work[task::step]:
            each()

    tasks = min(2 * threads, len(work))
    scheduler.run([partial(some, task, tasks) for task in range(tasks)], threads)


def _pieces(spec: TableSpec, directory: Path, images: Images, rows_per_file: int) -> Iterator[_Piece]:
    cuts = np.flatnonzero(np.diff(images.ids // rows_per_file)) + 1
    edges = [0, *cuts.tolist(), images.ids.size] if images.ids.size else []
    for start, stop in pairwise(edges):
        yield _Piece(spec, directory, images, int(images.ids[start]) // rows_per_file, start, stop)


def _write_rows(piece: _Piece) -> None:
    spec, images = piece.spec, piece.images
    path = piece.directory / layout.ROWS / layout.shard_key(piece.file)
    step = max(1, BUFFER_BYTES // spec.record_bytes)
    buffer = np.empty(min(step, piece.stop - piece.start) * spec.record_bytes, np.uint8)
    with files.opened(path, os.O_WRONLY) as descriptor:
        for start in range(piece.start, piece.stop, step):
            stop = min(start + step, piece.stop)
            kernels.gather_images(images.addresses, spec.record_bytes, buffer.ctypes.data, start, stop)
            ids = images.ids[start:stop] - piece.file * spec.rows_per_shard
            for first, last in plan.runs(ids):
                part = buffer[first * spec.record_bytes : last * spec.record_bytes]
                files.write(descriptor, part.data, int(ids[first]) * spec.record_bytes, path)
        files.sync_data(descriptor, path)


def _write_bits(piece: _Piece) -> None:
    path = piece.directory / layout.PRESENT / layout.presence_key(piece.file)
    begin = piece.file * piece.spec.presence_chunk_bytes * 8
    ids = piece.images.ids[piece.start : piece.stop]
    blocks = (ids - begin) // ROWS_PER_BLOCK
    with files.opened(path, os.O_RDWR) as descriptor:
        for block in np.unique(blocks).tolist():
            bits = np.frombuffer(files.read_at(descriptor, PAGE, block * PAGE, path), np.uint8)
            kernels.set_present(bits, ids[blocks == block], begin + block * ROWS_PER_BLOCK)
            files.write(descriptor, bits.data, block * PAGE, path)
        files.sync_data(descriptor, path)
