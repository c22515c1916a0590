"""Checks the files of committed tables: their documents, their sizes, and the checksum of every block.

::

    scan      read all files without a lock, while training may continue: finds what may be damaged
    confirm   read only that again, while no fold runs, or ignoring what a fold may be writing from the log
    repeat    if a table has moved in between
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb.base import progress
from shardemb.base.sizes import PAGE
from shardemb.commits import fold
from shardemb.compute import file_blocks, scheduler
from shardemb.errors import FormatError
from shardemb.format import zarr_metadata
from shardemb.format.table_files import TableLocation
from shardemb.storage import address_space, checksums, files, folders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import TypeAlias

    from numpy.typing import NDArray

    from shardemb.base.progress import Progress
    from shardemb.base.validation import Int64Array
    from shardemb.commits.log_reader import Replay
    from shardemb.format.fill_records import Fill
    from shardemb.format.table_files import File

    Steady: TypeAlias = Callable[
        [bool], AbstractContextManager[tuple[Mapping[str, Path], Callable[[], Replay]]]
    ]

STRETCH_BYTES = 4 * 2**20
CONFIRMATIONS = 3
"""How often apparent damage is read again before it is reported."""


@dataclass(frozen=True)
class Damage:
    """Damage found by `Store.verify`. Prints as one line.

    Attributes
    ----------
    table : str
    shard : int or None
        Number of the shard or of the chunk of the presence bitmap; None if the damage concerns the whole table.
    rows : tuple of int or None
        Half-open range ``(start, stop)`` of the rows that may be wrong; None if no row of the table can be trusted.
    path : str
        The file, or the table's folder.
    problem : str
    """

    table: str
    shard: int | None
    rows: tuple[int, int] | None
    path: str
    problem: str

    def __str__(self) -> str:
        rows = f"rows {self.rows[0]} to {self.rows[1]}" if self.rows else "all rows"
        return f"table {self.table!r}, {rows}: {self.path} {self.problem}"


class Target(NamedTuple):
    """A table to verify."""

    name: str
    table: TableLocation


class Suspect(NamedTuple):
    """Blocks of a file that are damaged, unless they are just being written."""

    target: Target
    file: File
    blocks: Int64Array


def damage(targets: Mapping[str, Target], threads: int, shown: Progress, steady: Steady) -> list[Damage]:
    """Find the damage in tables, given by uuid. If tables move meanwhile, they are all checked again.

    ``steady(suspected)``, called with whether any block is suspect, is a context manager that yields the folders of the
    tables by uuid, and a function that reads the newest images. In a writer, no table moves and no fold runs within it.
    """
    while True:
        found, suspects = scan(list(targets.values()), threads, shown)
        if not found and not suspects:
            return []
        with steady(bool(suspects)) as (directories, newest):
            if all(directories.get(uuid) == target.table.directory for uuid, target in targets.items()):
                return found + confirm(suspects, newest)
        # A table that does not exist any more was dropped: that is no damage.
        targets = {
            uuid: Target(target.name, TableLocation(target.table.spec, directories[uuid]))
            for uuid, target in targets.items()
            if uuid in directories
        }


def scan(targets: Sequence[Target], threads: int, shown: Progress) -> tuple[list[Damage], list[Suspect]]:
    """Read every file; return what is certainly damaged, and what may be.

    Memory is bounded: each task holds one stretch. An exception raised by a function given as `shown` ends the scan.
    """
    damage, readable = [], []
    for target in targets:
        found = list(_structure(target))
        damage += found
        names = {each.path for each in found}
        if not names & {str(target.table.directory), str(target.table.checksums_path)}:
            readable += [(target, file) for file in target.table.files() if str(file.path) not in names]
    stretches = [
        (target, file, start, min(start + STRETCH_BYTES, file.nbytes))
        for target, file in readable
        for start in range(0, file.nbytes, STRETCH_BYTES)
    ]
    total = sum(stop - start for *_, start, stop in stretches)
    stop = threading.Event()
    number = min(2 * threads, len(stretches))
    with progress.track(total, "verifying", unit="byte", progress=shown) as advance:

        def some(task: int) -> list[Suspect]:
            memory, suspects = address_space.AddressRange(STRETCH_BYTES), []
            memory.map_zeros(0, STRETCH_BYTES)
            for target, file, begin, end in stretches[task::number]:
                if stop.is_set():
                    break
                blocks = _differing(target.table, file, begin, end, memory)
                suspects += [Suspect(target, file, blocks)] if blocks.size else []
                advance(end - begin)
            return suspects

        results = scheduler.run([partial(some, task) for task in range(number)], threads, stop)
    return damage, [suspect for result in results for suspect in result]


def confirm(suspects: Sequence[Suspect], newest: Callable[[], Replay]) -> list[Damage]:
    """Read suspect blocks several times more, and return those that stay damaged.

    A block that the log has new values for is not damaged: a concurrent fold may be writing it. Nor is one without a
    checksum that was filled, whether or not that is committed.
    """
    left = list(suspects)
    for _ in range(CONFIRMATIONS):
        confirmed = (Suspect(each.target, each.file, _still_damaged(each, newest())) for each in left)
        left = [each for each in confirmed if each.blocks.size]
    return [damage for each in left for damage in _damage(each)]


def _still_damaged(suspect: Suspect, newest: Replay) -> Int64Array:
    (_, table), file, blocks = suspect
    images = newest.images(table.spec)
    blocks = _without_kept(table, blocks, newest)
    blocks = _without_filled(table, blocks, [*newest.unfinished, *(each.fill for each in images.fills)])
    patches = fold.patches(table, images)
    patch = next((each for each in patches if each.file.path == file.path), None)
    memory = address_space.AddressRange(PAGE)
    memory.map_zeros(0, PAGE)
    damaged = [block for block in blocks.tolist() if _is_damaged(table, file, block, patch, memory)]
    return np.array(damaged, np.int64)


def _without_kept(table: TableLocation, blocks: Int64Array, newest: Replay) -> Int64Array:
    """Return those of ascending blocks of a tag that are not kept elsewhere, as they were written."""
    kept, sums = newest.kept.get(table.spec.uuid, (np.empty(0, np.int64), np.empty(0, np.uint64)))
    _, here, there = np.intersect1d(blocks, kept, assume_unique=True, return_indices=True)
    known = checksums.read_sums(table.checksums_path, 0, table.spec.num_blocks)[blocks[here]]
    return np.delete(blocks, here[checksums.content_sums(known) == sums[there]])


def _without_filled(table: TableLocation, blocks: Int64Array, fills: Sequence[Fill]) -> Int64Array:
    """Return those of ascending blocks that were not filled, or that a fold has a checksum of by now."""
    filled = np.zeros(blocks.size, np.bool_)
    for each in fills:
        if each.table == table.spec.uuid:
            filled |= (blocks >= each.first) & (blocks < each.stop)
    if filled.any():
        first, stop = int(blocks[filled][0]), int(blocks[filled][-1]) + 1
        sums = checksums.read_sums(table.checksums_path, first, stop - first)
        filled[filled] = sums[blocks[filled] - first] == checksums.NEVER_WRITTEN
    return blocks[~filled]


def _damage(suspect: Suspect) -> Iterator[Damage]:
    target, file, blocks = suspect
    for first, last in file_blocks.runs(blocks):
        start, stop = file.rows_of(int(blocks[first]))[0], file.rows_of(int(blocks[last - 1]))[1]
        if start < stop:  # otherwise the blocks are after the last row
            begin, end = ((int(blocks[each]) - file.first) * PAGE for each in (first, last - 1))
            what = f"is not what was written, from byte {begin} to {end + PAGE}"
            yield Damage(target.name, file.number, (start, stop), str(file.path), what)


def _is_damaged(
    table: TableLocation,
    file: File,
    block: int,
    patch: fold.FilePatch | None,
    memory: address_space.AddressRange,
) -> bool:
    content, path = memory.array(np.uint8, (1, PAGE)), table.checksums_path
    inside = np.array([block - file.first])
    try:
        known = checksums.read_sums(path, block, 1)
        with files.opened_direct(file.path) as descriptor:
            files.read_into(descriptor, memory.bytes(0, PAGE), int(inside[0]) * PAGE, file.path)
        steady = known == checksums.read_sums(path, block, 1)
    except OSError:
        return True

    def new_bits(which: Int64Array) -> NDArray[np.uint8]:
        return np.zeros((which.size, PAGE), np.uint8) if patch is None else patch.new_bits(inside[which])

    return bool(steady[0] and checksums.differing(known, content, np.zeros(1, np.int64), new_bits)[0])


def _structure(target: Target) -> Iterator[Damage]:
    name, table = target
    try:
        zarr_metadata.table_spec(folders.documents(table.directory))
    except FormatError as error:
        yield Damage(name, None, None, str(table.directory), str(error))
        return
    of_path = {file.path: file for file in table.files()}
    for path, nbytes in table.expected_files():
        found = files.size(path)
        if found != nbytes:
            what = "is missing" if found is None else f"has {found} bytes instead of {nbytes}"
            file = of_path.get(path)
            number, rows = (file.number, file.rows) if file else (None, (0, table.spec.num_embeddings))
            yield Damage(name, number, rows, str(path), what)


def _differing(
    table: TableLocation, file: File, start: int, stop: int, memory: address_space.AddressRange
) -> Int64Array:
    try:
        return checksums.differing_blocks(table, file, start, stop, memory)
    except OSError:  # a bad sector, or the file was removed meanwhile: confirm it
        return file.first + np.arange(start // PAGE, stop // PAGE)
