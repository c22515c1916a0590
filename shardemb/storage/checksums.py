"""Checksums of the blocks of a table's files, so that what the disk has changed is found.

A block is a page, 4,096 bytes. The checksums of all blocks of a table lie in one file, in the order of the shards and
then of the chunks of the presence bitmap; 0 stands for a block that was never written and is all zero bytes. Whoever
writes blocks says so first, durably, and notes the new checksums when the blocks are durable: a crash in between leaves
blocks *in flux*, never a false alarm, and recovery writes those again.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks
from shardemb.format.documents import checksum
from shardemb.format.table_files import File, checksums_path
from shardemb.storage import address_space, files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

NEVER_WRITTEN, IN_FLUX, DAMAGED = 0, 1, 2
"""Checksums are even and larger than these. `IN_FLUX` is added to that of a block which is being written;
`DAMAGED` stands for that of a block which was damaged when a part of it was written anew."""

WINDOW_BYTES = 4 * 2**20
_PER_PAGE = PAGE // 8


def block_sums(data: memoryview, which: Int64Array | None = None) -> NDArray[np.uint64]:
    """Checksums of the blocks that `data` consists of, or of some of them."""
    blocks = range(len(data) // PAGE) if which is None else which.tolist()
    return np.array([block_sum(data[block * PAGE : (block + 1) * PAGE]) for block in blocks], np.uint64)


def block_sum(data: memoryview) -> int:
    """Checksum of one block."""
    return max(checksum(data) & ~IN_FLUX, DAMAGED + 2)


ZEROS = block_sum(memoryview(bytes(PAGE)))
"""Checksum of a block of zero bytes."""


def differing(
    known: NDArray[np.uint64],
    content: NDArray[np.uint8],
    which: Int64Array,
    new_bits: Callable[[Int64Array], NDArray[np.uint8]],
) -> NDArray[np.bool_]:
    """Whether blocks differ from what they should be.

    Parameters
    ----------
    known : ndarray of uint64, shape (n,)
        Their checksums.
    content : ndarray of uint8, shape (m, PAGE)
    which : ndarray of int64, shape (n,)
        Where in `content` they lie.
    anew : callable
        ``new_bits(i)``, shape (i.size, PAGE): for blocks `i` of the n, the bits set that the log says anew, so that a fold
        may have changed them.
    """
    never, in_flux = known == NEVER_WRITTEN, (known & IN_FLUX == IN_FLUX) & (known != DAMAGED + IN_FLUX)
    differs = np.zeros(known.size, np.bool_)
    noted = np.flatnonzero(~(never | in_flux))
    differs[noted] = block_sums(content.reshape(-1).data, which[noted]) != known[noted]
    never = np.flatnonzero(never)
    never = never[content.view(np.uint64)[which[never]].any(axis=1)]  # few, so that the rest is cheap
    differs[never] = (content[which[never]] & ~new_bits(never)).any(axis=1)
    # A crash can have left it in any state; what is anew is written again.
    in_flux = np.flatnonzero(in_flux)
    differs[in_flux] = ~new_bits(in_flux).any(axis=1)
    return differs


def mark_in_flux(path: Path, blocks: Int64Array) -> NDArray[np.uint64]:
    """Say durably that blocks, ascending, are in flux; return their checksums before. By one thread at a time.

    Raises
    ------
    DiskFullError, OSError
        Any part may have been written.
    """
    before = np.empty(blocks.size, np.uint64)

    def change(words: NDArray[np.uint64], part: slice) -> NDArray[np.uint64]:
        before[part] = words
        return np.where(words == NEVER_WRITTEN, words, words | np.uint64(IN_FLUX))

    _update(path, blocks, change)
    return before


def write_sums(path: Path, blocks: Int64Array, sums: NDArray[np.uint64]) -> None:
    """Note the checksums of blocks, ascending, durably. By one thread at a time.

    Raises
    ------
    DiskFullError, OSError
        Any part may have been written.
    """
    _update(path, blocks, lambda words, part: sums[part])


def _update(
    path: Path, blocks: Int64Array, change: Callable[[NDArray[np.uint64], slice], NDArray[np.uint64]]
) -> None:
    pages = blocks // _PER_PAGE
    starts = np.flatnonzero(np.diff(pages, prepend=-1))
    edges = [*starts.tolist(), blocks.size]
    with files.opened(path, os.O_RDWR) as descriptor:
        # Runs of neighbouring pages at once, but not more than a window.
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


def write_file_sums(file: File, directory: Path) -> None:
    """Note the checksums of a file that was written in one go, where they were all `NEVER_WRITTEN`; not durable."""
    path = checksums_path(directory)
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
    file: File, directory: Path, start: int, stop: int, memory: address_space.AddressRange
) -> Int64Array:
    """Compare a stretch of a file with its checksums; return the numbers of the blocks that differ.

    Reads from the disk, past the page cache where the file system can, into `memory`. A fold that comes between is no
    difference: where the checksum has changed meanwhile, so may have the block.

    Raises
    ------
    OSError
        It cannot be read.
    """
    first, count = file.first + start // PAGE, (stop - start) // PAGE
    path = checksums_path(directory)
    with files.opened(path, os.O_RDONLY) as sums, files.opened_direct(file.path) as descriptor:
        known = _read_sums(sums, first, count, path)
        if next(files.holes(descriptor, start, stop), None) == (start, stop):
            found = np.full(count, ZEROS, np.uint64)
        else:
            view = memory.bytes(0, stop - start)
            files.read_into(descriptor, view, start, file.path)
            found = block_sums(view)
        steady = known == _read_sums(sums, first, count, path)
    return first + np.flatnonzero(steady & (found != _content_sums(known)))


def are_intact(file: File, directory: Path, start: int, data: memoryview) -> bool:
    """Whether whole blocks of a file that nobody writes to, from a position on, are what their checksums say."""
    known = read_sums(checksums_path(directory), file.first + start // PAGE, len(data) // PAGE)
    return bool((block_sums(data) == _content_sums(known)).all())


def _content_sums(known: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the checksums that blocks have if they are what is noted of them."""
    return np.where(known == NEVER_WRITTEN, np.uint64(ZEROS), known)


def read_sums(path: Path, first: int, count: int) -> NDArray[np.uint64]:
    """Return what is noted of blocks of a table."""
    with files.opened(path, os.O_RDONLY) as sums:
        return _read_sums(sums, first, count, path)


def _read_sums(descriptor: int, first: int, count: int, path: Path) -> NDArray[np.uint64]:
    return np.frombuffer(files.read_at(descriptor, 8 * count, 8 * first, path), np.uint64)
