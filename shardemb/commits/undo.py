"""What folds overwrite of files that a tag has too: the old content of each block, kept before its first byte changes.

A tag holds links to files of tables, so what is written to these files changes the tag as well. Before a block of such
a file is written for the first time since, its content is appended to the tag's *undo file*, durably. Then the count at
the beginning of that file goes up, which readers of the tag have mapped: one that finds it changed after it has read
rows reads the new records, and the rows again.

::

    undo file   a page with the count of records that are durable, then the records
    record      checksum of the rest, table, block; the 4,096 bytes of the block

A record holds what the tag has of a block, whenever it was written; so one that is there twice, or was not counted,
does no harm. Where one cannot be read, the file ends, unless it was counted: then that is damage.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks
from shardemb.errors import FormatError
from shardemb.format import documents, store_paths
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.format.table_files import TableLocation

    Change = tuple[Path, Int64Array]  # a file, and ascending numbers of blocks in it that are about to change

RECORD = np.dtype([("sum", "<u8"), ("table", "<u8"), ("block", "<u8"), ("content", "u1", (PAGE,))])
"""`table` is the position of the table in the tag's manifest, `block` a number among all blocks of the table."""

COUNT = 0
"""Where in the file the count is, as int64."""

RELEASED = -1
"""What the count says once nothing is kept any more."""

WINDOW = 1024
"""Records that are read or written at a time."""


def create(tag: Path) -> None:
    """Create the undo file of a tag. Not synced."""
    files.write_new(store_paths.undo(tag), bytes(PAGE))


def read(tag: Path, start: int = 0) -> Iterator[NDArray[np.void]]:
    """Read the records of a tag from number `start` on, some at a time.

    Yields
    ------
    ndarray of RECORD

    Raises
    ------
    FormatError
        A record that was durable cannot be read: what the tag has of its block is lost.
    OSError
        There is no undo file, or it cannot be read.
    """
    path = store_paths.undo(tag)
    with files.opened(path, os.O_RDONLY) as descriptor:
        count = _count(descriptor, path)
        if count < 0:
            msg = f"{path}: the tag was released, or is lost; make another"
            raise FormatError(msg)
        total = ((files.size(path) or 0) - PAGE) // RECORD.itemsize
        end = start
        for first in range(start, total, WINDOW):
            records = _read(descriptor, first, min(first + WINDOW, total), path)
            valid = _sums(records) == records["sum"]
            records = records if valid.all() else records[: int(np.argmin(valid))]
            end = first + records.size
            yield records
            if end < min(first + WINDOW, total):
                break
        if end < count:
            msg = f"{path} is damaged: a part of the tag is lost; release it, and make another"
            raise FormatError(msg)


def _count(descriptor: int, path: Path) -> int:
    if (files.size(path) or 0) < PAGE:
        msg = f"{path} was cut off: the tag is lost; release it, and make another"
        raise FormatError(msg)
    return int.from_bytes(files.read_at(descriptor, 8, COUNT, path), "little", signed=True)


def _read(descriptor: int, first: int, stop: int, path: Path) -> NDArray[np.void]:
    nbytes, offset = (stop - first) * RECORD.itemsize, PAGE + first * RECORD.itemsize
    return np.frombuffer(files.read_at(descriptor, nbytes, offset, path), RECORD)


def _sums(records: NDArray[np.void]) -> NDArray[np.uint64]:
    found = np.ascontiguousarray(records).view(np.uint8).reshape(-1, RECORD.itemsize)
    return documents.checksums(list(found[:, 8:]))


class _Kept:
    """A file that a tag has: which of its blocks are kept."""

    def __init__(self, table: int, first: int, blocks: int) -> None:
        self.table, self.first = table, first
        self.blocks: NDArray[np.bool_] = np.zeros(blocks, np.bool_)


class Keeper:
    """Keeps what a tag has, in the process that writes to the store. One thread at a time.

    Parameters
    ----------
    tag : Path
        The tag's folder.
    tables : sequence of TableLocation
        The tables in it, in the order of its manifest.
    """

    def __init__(self, tag: Path, tables: Sequence[TableLocation]) -> None:
        self._path = store_paths.undo(tag)
        # By what tells files apart: tables in the store may have them under any name, or several.
        self._files: dict[tuple[int, int], _Kept] = {}
        self._count = 0
        of_table = []
        for number, table in enumerate(tables):
            kept = []
            for file in table.files():
                kept.append(_Kept(number, file.first, file.nbytes // PAGE))
                self._files[files.names(file.path)[1]] = kept[-1]
            of_table.append(kept)
        with files.opened(self._path, os.O_RDONLY) as descriptor:
            self._lost = _count(descriptor, self._path) < 0
            # What a writer that was killed has appended may be in the page cache alone, and counts as kept from now on.
            files.sync_data(descriptor, self._path)
        self._load(tag, of_table)

    def _load(self, tag: Path, of_table: Sequence[Sequence[_Kept]]) -> None:
        firsts = [np.array([each.first for each in kept]) for kept in of_table]
        try:
            for records in read(tag):
                self._count += records.size
                for table in np.unique(records["table"]).tolist():
                    blocks = records["block"][records["table"] == table].astype(np.int64)
                    which = np.searchsorted(firsts[table], blocks, side="right") - 1
                    for number in np.unique(which).tolist():
                        kept = of_table[table][number]
                        kept.blocks[blocks[which == number] - kept.first] = True
        except (FormatError, IndexError):  # readers of the tag are told; there is nothing left to keep
            self._lost = True

    def keep(self, changes: Sequence[Change]) -> None:
        """Keep those blocks of changes that the tag has and that are not kept yet. They may change after this.

        Raises
        ------
        DiskFullError, OSError
            They must not change. The call can be repeated.
        """
        wanted = [(path, self._files.get(files.names(path)[1]), blocks) for path, blocks in changes]
        missing = [
            (path, kept, blocks[~kept.blocks[blocks]]) for path, kept, blocks in wanted if kept is not None
        ]
        if self._lost or not any(blocks.size for *_, blocks in missing):
            return
        count = self._count
        with files.opened(self._path, os.O_WRONLY) as target:
            for path, kept, blocks in missing:
                for start in range(0, blocks.size, WINDOW):
                    some = blocks[start : start + WINDOW]
                    self._append(target, count, _contents(path, some), kept, some)
                    count += some.size
            files.sync_data(target, self._path)
            for _, kept, blocks in missing:
                kept.blocks[blocks] = True
            self._count = count
            files.write(target, count.to_bytes(8, "little"), COUNT, self._path)

    def _append(
        self, target: int, count: int, content: NDArray[np.uint8], kept: _Kept, blocks: Int64Array
    ) -> None:
        records: NDArray[Any] = np.empty(blocks.size, RECORD)
        records["table"], records["block"], records["content"] = kept.table, kept.first + blocks, content
        records["sum"] = _sums(records)
        offset = PAGE + count * RECORD.itemsize
        files.write(target, records.view(np.uint8).data, offset, self._path)


def _contents(path: Path, blocks: Int64Array) -> NDArray[np.uint8]:
    """Read ascending blocks of a file, shape (blocks, PAGE); all are requested before the first is waited for."""
    content = np.empty((blocks.size, PAGE), np.uint8)
    stretches = [
        (first, int(blocks[first]) * PAGE, (last - first) * PAGE) for first, last in file_blocks.runs(blocks)
    ]
    with files.opened(path, os.O_RDONLY) as source:
        for _, offset, nbytes in stretches:
            files.will_need(source, offset, nbytes)
        for first, offset, nbytes in stretches:
            files.read_into(source, content[first : first + nbytes // PAGE].reshape(-1).data, offset, path)
    return content


class Undo:
    """The tags of a store that is open for writing, and what keeps them. Tags come and go while nothing is folded."""

    def __init__(self) -> None:
        self._keepers: dict[str, Keeper] = {}

    def add(self, uuid: str, keeper: Keeper) -> None:
        """Keep what the tag with a uuid has, from now on."""
        self._keepers[uuid] = keeper

    def retain(self, uuids: Collection[str]) -> None:
        """Keep nothing more but for the tags with some uuids."""
        self._keepers = {uuid: each for uuid, each in self._keepers.items() if uuid in uuids}

    def keep(self, changes: Sequence[Change]) -> None:
        """Keep for every tag what it has of blocks that are about to change; raises what `Keeper.keep` raises."""
        for keeper in self._keepers.values():
            keeper.keep(changes)
