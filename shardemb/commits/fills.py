"""Fills: rows that are written straight to their place in the shards, before the commit that makes them count.

::

    announce    name the blocks in a note, durably, and tell readers -> the blocks may be written
    commit      sync the blocks -> the log gets their checksums with the commit record -> one sync of the log
    settle      the note forgets what was committed or undone, durably -> a fold may begin
    undo        make holes of the blocks again, durably

Only blocks that were never written, and that are zeros, are filled, so a hole is what they were before. The note names
all blocks that a writer may have written without a commit, and maybe more. After a crash, those of them that the log
has no fill for and that have no checksum become holes again. Until then, readers show their rows as never written.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks
from shardemb.errors import FormatError
from shardemb.format import store_paths
from shardemb.format.fill_records import Note
from shardemb.storage import checksums, files, folders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.format.fill_records import Fill, Filled
    from shardemb.format.manifest import Manifest
    from shardemb.format.table_files import File, TableLocation

COUNTER = 8
"""Where in the file of the epoch the number of announcements is, for readers."""

ZEROED_BYTES = 2**20
"""Bytes of zeros that are written at a time where a file system cannot make holes."""


class Announcements:
    """The note of a writer: which fills it has begun that no commit may have. Callers hold the store's lock.

    Parameters
    ----------
    store : Path
        The store's folder.
    epoch : int
        The writer's epoch. Notes of other epochs mean nothing.
    unfinished : callable
        Returns the fills that no commit has, of all tables.
    """

    def __init__(self, store: Path, epoch: int, unfinished: Callable[[], Iterable[Fill]]) -> None:
        self._path, self._epoch_path = store_paths.fills(store), store_paths.epoch(store)
        self._epoch, self._list = epoch, unfinished
        self._named: set[Fill] = set()  # what the note on the disk may name
        self._durable: tuple[Fill, ...] = ()  # what it names for certain
        self._count = 0

    def cover(self, begun: Iterable[Fill]) -> bool:
        """Return whether the note names fills already: then their blocks may be written."""
        return all(
            any(
                each.table == fill.table and each.first <= fill.first <= fill.stop <= each.stop
                for each in self._durable
            )
            for fill in begun
        )

    def announce(self, begun: Sequence[Fill]) -> None:
        """Name fills that begin, durably, and let readers know; then their blocks may be written.

        They may be larger than what is written, by blocks that were never written either.

        Raises
        ------
        DiskFullError, OSError
            They must not be written.
        """
        self._replace([*self._list(), *begun])
        self._count += 1
        with files.opened(self._epoch_path, os.O_WRONLY | os.O_CREAT) as descriptor:
            files.write(descriptor, self._count.to_bytes(8, "little"), COUNTER, self._epoch_path)

    def settle(self) -> None:
        """Forget what was committed or undone, durably, before a fold drops what proves it, or writes there.

        Raises
        ------
        DiskFullError, OSError
            No fold may begin.
        """
        unfinished = list(self._list())
        if not self._named <= set(unfinished):
            self._replace(unfinished)

    def unfinished(self) -> tuple[Fill, ...]:
        """Return the fills that no commit has."""
        return tuple(self._list())

    def withdraw(self) -> None:
        """Remove a note that means nothing any more."""
        files.remove(self._path)
        self._named, self._durable = set(), ()

    def _replace(self, fills: Sequence[Fill]) -> None:
        # Where that fails, either note may be there.
        self._named, self._durable = self._named | set(fills), ()
        files.replace(self._path, Note(self._epoch, tuple(fills)).to_bytes())
        self._named, self._durable = set(fills), tuple(fills)


def read_note(store: Path, base: Manifest) -> Note:
    """Read the note of the writer that published a base; empty if it has left none.

    Raises
    ------
    FormatError
        The note is damaged.
    """
    path = store_paths.fills(store)
    nothing = Note(base.epoch)
    if base.clean:
        return nothing
    try:
        note = Note.from_bytes(files.read(path, 2**30))
    except FileNotFoundError:
        return nothing
    except (OSError, ValueError) as error:
        msg = f"{path}: {error}"
        raise FormatError(msg) from error
    return note if note.epoch == base.epoch else nothing


def undo_unfinished(table: TableLocation, named: Iterable[Fill], committed: Iterable[Filled]) -> None:
    """Make holes of the blocks of a table that a note names and no commit has. They are durable when this returns.

    Raises
    ------
    FormatError
        The note names blocks that the table cannot have.
    """
    for fill in named:
        if fill.stop * PAGE > table.spec.num_shards * table.spec.shard_bytes:
            msg = f"the note of fills names blocks that the table in {table.directory} cannot have"
            raise FormatError(msg)
        # One with a checksum was written by a fold since: the note may name more than was filled.
        left = checksums.read_sums(table.checksums_path, fill.first, fill.stop - fill.first)
        left = left == checksums.NEVER_WRITTEN
        for each in committed:
            left[each.fill.within(fill.first)] = False
        blocks = fill.first + np.flatnonzero(left)
        for first, last in file_blocks.runs(blocks):
            punch(table, int(blocks[first]), int(blocks[last - 1]) + 1)


def punch(table: TableLocation, first: int, stop: int) -> None:
    """Make holes of a range of a table's blocks, durably."""
    for file, begin, end in parts(table, first, stop):
        with files.opened(file.path, os.O_WRONLY) as descriptor:
            if not files.punch(descriptor, begin, end - begin, file.path):
                for start in range(begin, end, ZEROED_BYTES):
                    zeros = bytes(min(ZEROED_BYTES, end - start))
                    files.write(descriptor, zeros, start, file.path)
            files.sync(descriptor, file.path)


def copy(old: TableLocation, new: TableLocation, filled: Filled) -> bool:
    """Copy those blocks of a fill that have no checksum in the copy of a table; return whether there were any.

    Blocks to which a fold has written since are marked as in flux in the copy.
    """
    path, first = new.checksums_path, filled.fill.first
    missing = checksums.read_sums(path, first, filled.sums.size) == checksums.NEVER_WRITTEN
    blocks = first + np.flatnonzero(missing)
    with files.opened(path, os.O_WRONLY) as noting:
        for begin, end in file_blocks.runs(blocks):
            for source, start, stop in parts(old, int(blocks[begin]), int(blocks[end - 1]) + 1):
                for low in range(start, stop, folders.WINDOW_BYTES):
                    high = min(low + folders.WINDOW_BYTES, stop)
                    found = _copy_window(source, new.shard(source.number), low, high)
                    block = source.first + low // PAGE
                    known = filled.sums[block - first : block - first + found.size]
                    held = np.where(found == known, known, found | np.uint64(checksums.IN_FLUX))
                    files.write(noting, held.data, 8 * block, path)
    return bool(missing.any())


def _copy_window(source: File, target: File, start: int, stop: int) -> NDArray[np.uint64]:
    """Copy a range of whole blocks from file to file; return the checksums of what was copied."""
    with (
        files.opened(source.path, os.O_RDONLY) as reading,
        files.opened(target.path, os.O_WRONLY) as writing,
    ):
        data = memoryview(files.read_at(reading, stop - start, start, source.path))
        files.write(writing, data, start, target.path)
    return checksums.block_sums(data)


def parts(table: TableLocation, first: int, stop: int) -> Iterator[tuple[File, int, int]]:
    """Yield the shards that a range of blocks lies in, each with its half-open range of bytes there."""
    nbytes = table.spec.shard_bytes
    for number in range(first * PAGE // nbytes, -(-stop * PAGE // nbytes)):
        begin = number * nbytes
        yield table.shard(number), max(first * PAGE - begin, 0), min(stop * PAGE - begin, nbytes)
