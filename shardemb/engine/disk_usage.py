"""What a table takes on disk, shard by shard: rows that were written, and bytes that the file system allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.storage import checksums, files

if TYPE_CHECKING:
    from shardemb.base.validation import Int64Array
    from shardemb.engine.shards import Shards
    from shardemb.format.table_files import File


@dataclass(frozen=True)
class Usage:
    """What a table takes on disk.

    Attributes
    ----------
    rows_written : ndarray of int64, shape (num_shards,)
        For each shard, the number of rows that hold more than their initial values; it includes dirty rows.
    bytes_allocated : ndarray of int64, shape (num_shards,)
        For each shard, the disk space of its file.
    """

    rows_written: Int64Array
    bytes_allocated: Int64Array


def measure(shards: Shards) -> Usage:
    """Measure all files of a table. The caller holds the store's lock."""
    spec = shards.spec
    every = [shards.location.shard(number) for number in range(spec.num_shards)]
    count = _rows_with_bit if spec.has_presence else _rows_of_blocks
    rows = np.array([count(shards, file) for file in every], np.int64)
    dirty = shards.overlay.dirty_rows()
    if spec.has_presence:
        dirty = dirty[~shards.were_written(dirty)]
    rows += np.bincount(dirty // spec.rows_per_shard, minlength=spec.num_shards)
    most = np.array([file.rows[1] - file.rows[0] for file in every])
    return Usage(np.minimum(rows, most), np.array([files.allocated(file.path) for file in every], np.int64))


def _rows_with_bit(shards: Shards, file: File) -> int:
    total = 0
    for chunk, start, stop in shards.location.presence_of(file.rows):
        with files.opened(chunk.path, os.O_RDONLY) as descriptor:
            for begin, end in files.data(descriptor, start, stop):
                data = files.read_at(descriptor, end - begin, begin, chunk.path)
                total += int.from_bytes(data, "little").bit_count()
    return total


def _rows_of_blocks(shards: Shards, file: File) -> int:
    """Count the rows in blocks that were ever written, for a table without a bitmap that says which rows were."""
    path, start = shards.location.checksums_path, 8 * file.first
    written = 0
    with files.opened(path, os.O_RDONLY) as descriptor:
        for begin, end in files.data(descriptor, start, start + 8 * file.nbytes // PAGE):
            sums = np.frombuffer(files.read_at(descriptor, end - begin, begin, path), np.uint64)
            written += int(np.count_nonzero(sums != checksums.NEVER_WRITTEN))
    return written * PAGE // shards.spec.record_bytes
