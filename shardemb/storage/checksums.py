"""Checksums of the blocks of a table's files, by which damage on the disk is found.

A block is a page, 4,096 bytes. The checksums of all blocks of a table are in one file, in the order of the shards and
then of the chunks of the presence bitmap; 0 stands for a block that was never written and is all zero bytes. A writer
first marks blocks as *in flux*, durably, then writes the blocks, and writes the new checksums once the blocks are
durable. A crash in between leaves blocks in flux, and never raises a false alarm; recovery writes these blocks again.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks
from shardemb.format import documents
from shardemb.storage import address_space, files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.format.table_files import File, TableLocation

NEVER_WRITTEN, IN_FLUX, DAMAGED = 0, 1, 2
"""Real checksums are even and larger than these. `IN_FLUX` is added to the checksum of a block that is being written.
`DAMAGED` takes the place of the checksum of a block that was damaged when a part of it was rewritten."""

WINDOW_BYTES = 4 * 2**20
_PER_PAGE = PAGE // 8


def block_sums(data: memoryview, which: Int64Array | None = None) -> NDArray[np.uint64]:
    """Return the checksums of the blocks of `data`, or only of the blocks `which`."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, PAGE)
    found = documents.checksums(blocks if which is None else [blocks[block] for block in which.tolist()])
    sums: NDArray[np.uint64] = np.maximum(found & ~np.uint64(IN_FLUX), np.uint64(DAMAGED + 2))
    return sums


def block_sum(data: memoryview) -> int:
    """Return the checksum of one block."""
    return max(documents.checksum(data) & ~IN_FLUX, DAMAGED + 2)


ZEROS = block_sum(memoryview(bytes(PAGE)))
"""Checksum of a block of zero bytes."""


def differing(
    known: NDArray[np.uint64],
    content: NDArray[np.uint8],
    which: Int64Array,
    new_bits: Callable[[Int64Array], NDArray[np.uint8]],
) -> NDArray[np.bool_]:
    """Return which of n blocks are damaged: they differ from their checksums, and the log does not explain it.

    Parameters
    ----------
    known : ndarray of uint64, shape (n,)
        The checksums of the blocks.
    content : ndarray of uint8, shape (m, PAGE)
    which : ndarray of int64, shape (n,)
        The index in `content` of each block.
    new_bits : callable
        ``new_bits(i)`` returns an array of uint8, shape (i.size, PAGE), for the blocks with indices `i` among the n. It
        has those bits set for which the log holds new values, so that a fold may have written them already.
    """
    never, in_flux = known == NEVER_WRITTEN, (known & IN_FLUX == IN_FLUX) & (known != DAMAGED + IN_FLUX)
    differs = np.zeros(known.size, np.bool_)
    certain = np.flatnonzero(~(never | in_flux))
    differs[certain] = block_sums(content.reshape(-1).data, which[certain]) != known[certain]
    # A block without a checksum is zeros, but for what a fold has written. Few are not zeros, so `new_bits` is cheap.
    never = np.flatnonzero(never)
    never = never[content.view(np.uint64)[which[never]].any(axis=1)]
    differs[never] = (content[which[never]] & ~new_bits(never)).any(axis=1)
    # A crash can leave a block in flux in any state. That is fine if recovery writes it again, from the log.
    in_flux = np.flatnonzero(in_flux)
    differs[in_flux] = ~new_bits(in_flux).any(axis=1)
    return differs


def of_copy(before: NDArray[np.uint64], after: NDArray[np.uint64], data: memoryview) -> NDArray[np.uint64]:
    """Return the checksums that copies of blocks get, given those of the original before and after they were read.

    A copy that does not match is in flux if the original may have been, and damaged if not.
    """
    found = block_sums(data)
    steady = (before == after) & (before & IN_FLUX == 0)
    differing = np.where(steady, np.uint64(DAMAGED), found | np.uint64(IN_FLUX))
    copied = np.where(found == content_sums(before), before, differing)
    return np.where(is_damaged(before), np.uint64(DAMAGED), copied)


def is_damaged(sums: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which blocks are known to be damaged, also while they are written."""
    damaged: NDArray[np.bool_] = sums & ~np.uint64(IN_FLUX) == DAMAGED
    return damaged


def mark_in_flux(path: Path, blocks: Int64Array) -> NDArray[np.uint64]:
    """Mark blocks, in ascending order, as in flux, durably; return their checksums so far. One thread at a time.

    Raises
    ------
    DiskFullError, OSError
        Any part of the marks may have been written.
    """
    before = np.empty(blocks.size, np.uint64)

    def change(words: NDArray[np.uint64], part: slice) -> NDArray[np.uint64]:
        before[part] = words
        return np.where(words == NEVER_WRITTEN, words, words | np.uint64(IN_FLUX))

    _update(path, blocks, change)
    return before


def write_sums(path: Path, blocks: Int64Array, sums: NDArray[np.uint64]) -> None:
    """Write the checksums of blocks, in ascending order, durably. One thread at a time.

    Raises
    ------
    DiskFullError, OSError
        Any part of the checksums may have been written.
    """
    _update(path, blocks, lambda words, part: sums[part])


def add_sums(path: Path, blocks: Int64Array, sums: NDArray[np.uint64]) -> None:
    """As `write_sums`, but only those of blocks that have none yet.

    Raises
    ------
    DiskFullError, OSError
        Any part of the checksums may have been written.
    """

    def change(words: NDArray[np.uint64], part: slice) -> NDArray[np.uint64]:
        return np.where(words == NEVER_WRITTEN, sums[part], words)

    _update(path, blocks, change)


def _update(
    path: Path, blocks: Int64Array, change: Callable[[NDArray[np.uint64], slice], NDArray[np.uint64]]
) -> None:
    pages = blocks // _PER_PAGE
    starts = np.flatnonzero(np.diff(pages, prepend=-1))
    edges = [*starts.tolist(), blocks.size]
    with files.opened(path, os.O_RDWR) as descriptor:
        # Contiguous pages of checksums in one read and one write, but at most a window.
        for first, last in file_blocks.runs(pages[starts]):
            for some in range(first, last, WINDOW_BYTES // PAGE):
                end = min(some + WINDOW_BYTES // PAGE, last)
                offset = int(pages[edges[some]]) * PAGE
                words = np.frombuffer(files.read_at(descriptor, (end - some) * PAGE, offset, path), np.uint64)
                part = slice(edges[some], edges[end])
                at = blocks[part] - offset // 8
                words[at] = change(words[at], part)
                files.write(descriptor, words.data, offset, path)
        files.sync_data(descriptor, path)


def write_file_sums(table: TableLocation, file: File) -> None:
    """Compute and write the checksums of a new file, all of which were `NEVER_WRITTEN`. Not synced.

    Holes and blocks of zeros keep `NEVER_WRITTEN`.
    """
    path = table.checksums_path
    with files.opened(file.path, os.O_RDONLY) as source, files.opened(path, os.O_WRONLY) as target:
        for offset in range(0, file.nbytes, WINDOW_BYTES):
            end = min(offset + WINDOW_BYTES, file.nbytes)
            if next(files.data(source, offset, end), None) is None:
                continue
            data = files.read_at(source, end - offset, offset, file.path)
            sums = block_sums(memoryview(data))
            sums[sums == ZEROS] = NEVER_WRITTEN
            files.write(target, sums.data, (file.first + offset // PAGE) * 8, path)


def differing_blocks(
    table: TableLocation, file: File, start: int, stop: int, memory: address_space.AddressRange
) -> Int64Array:
    """Compare a stretch of a file with its checksums; return the table-wide numbers of the blocks that differ.

    Reads from the disk into `memory`, bypassing the page cache if the file system supports that. A concurrent fold
    makes no difference: a block whose checksum changes meanwhile may have changed too, and is not reported.

    Raises
    ------
    OSError
        The file or its checksums cannot be read.
    """
    first, count = file.first + start // PAGE, (stop - start) // PAGE
    path = table.checksums_path
    with files.opened(path, os.O_RDONLY) as sums, files.opened_direct(file.path) as descriptor:
        known = _read_sums(sums, first, count, path)
        if next(files.holes(descriptor, start, stop), None) == (start, stop):
            found = np.full(count, ZEROS, np.uint64)
        else:
            view = memory.bytes(0, stop - start)
            files.read_into(descriptor, view, start, file.path)
            found = block_sums(view)
        steady = known == _read_sums(sums, first, count, path)
    return first + np.flatnonzero(steady & (found != content_sums(known)))


def are_intact(table: TableLocation, file: File, start: int, data: memoryview) -> bool:
    """Whether whole blocks of a file, from `start` on, match their checksums. Nothing may write to them meanwhile."""
    known = read_sums(table.checksums_path, file.first + start // PAGE, len(data) // PAGE)
    return bool((block_sums(data) == content_sums(known)).all())


def content_sums(known: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the checksums that the content of blocks must have, given those in the file of checksums."""
    return np.where(known == NEVER_WRITTEN, np.uint64(ZEROS), known)


def read_sums(path: Path, first: int, count: int) -> NDArray[np.uint64]:
    """Read the checksums of `count` blocks of a table from its file of checksums."""
    with files.opened(path, os.O_RDONLY) as sums:
        return _read_sums(sums, first, count, path)


def _read_sums(descriptor: int, first: int, count: int, path: Path) -> NDArray[np.uint64]:
    return np.frombuffer(files.read_at(descriptor, 8 * count, 8 * first, path), np.uint64)
