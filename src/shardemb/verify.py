"""Compares the files of committed tables with what they should be: documents, sizes, and the checksum of every block.

::

    scan      all files, without a lock, beside training: what may be wrong
    confirm   only that, again, while no fold is under way or with what the log holds left out
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb import checks, files, folders, layout, plan, progress, scheduler, shards
from shardemb.errors import FormatError
from shardemb.report import Damage
from shardemb.spec import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from shardemb.arrays import Int64Array
    from shardemb.progress import Progress
    from shardemb.replay import Replay
    from shardemb.spec import TableSpec

STRETCH_BYTES = 4 * 2**20
CONFIRMATIONS = 3
"""How often what seems damaged is looked at, before it is said so."""


class Target(NamedTuple):
    """A table to verify."""

    name: str
    spec: TableSpec
    directory: Path


class Suspect(NamedTuple):
    """Blocks of a file that are not what they should be, unless somebody writes them just now."""

    target: Target
    file: checks.File
    blocks: Int64Array


def scan(targets: Sequence[Target], threads: int, shown: Progress) -> tuple[list[Damage], list[Suspect]]:
    """Look at every file; return what is wrong for certain, and what may be.

    Bounded memory: one stretch a task. What a function given as `shown` raises ends the scan.
    """
    damage, sound = [], []
    for target in targets:
        found = list(_structure(target))
        damage += found
        names = {each.path for each in found}
        if not names & {str(target.directory), str(checks.path_of(target.directory))}:
            sound += [
                (target, file)
                for file in checks.all_files(target.spec, target.directory)
                if str(file.path) not in names
            ]
    stretches = [
        (target, file, start, min(start + STRETCH_BYTES, file.nbytes))
        for target, file in sound
        for start in range(0, file.nbytes, STRETCH_BYTES)
    ]
    total = sum(stop - start for *_, start, stop in stretches)
    stop = threading.Event()
    number = min(2 * threads, len(stretches))
    with progress.track(total, "verifying, bytes", progress=shown) as advance:

        def some(task: int) -> list[Suspect]:
            memory, suspects = files.AddressRange(STRETCH_BYTES), []
            memory.map_zeros(0, STRETCH_BYTES)
            for target, file, begin, end in stretches[task::number]:
                if stop.is_set():
                    break
                blocks = _wrong(target, file, begin, end, memory)
                suspects += [Suspect(target, file, blocks)] if blocks.size else []
                advance(end - begin)
            return suspects

        results = scheduler.run([partial(some, task) for task in range(number)], threads, stop)
    return damage, [suspect for result in results for suspect in result]


def confirm(suspects: Sequence[Suspect], newest: Callable[[], Replay]) -> list[Damage]:
    """Look at what may be wrong once more, but for the blocks that the log says anew; a fold may come between."""
    damage: list[Damage] = []
    for _ in range(CONFIRMATIONS):
        damage = [each for suspect in suspects for each in _confirmed(suspect, newest())]
        if not damage:
            break
    return damage


def _confirmed(suspect: Suspect, newer: Replay) -> Iterator[Damage]:
    target, file, blocks = suspect
    memory = files.AddressRange(PAGE)
    memory.map_zeros(0, PAGE)
    left = np.setdiff1d(blocks, _in_log(target.spec, newer))
    starts = [(int(block) - file.first) * PAGE for block in left]
    wrong = [_wrong(target, file, start, start + PAGE, memory) for start in starts]
    blocks = np.concatenate([np.empty(0, np.int64), *wrong])
    for first, last in plan.runs(blocks):
        start, stop = file.rows_of(int(blocks[first]))[0], file.rows_of(int(blocks[last - 1]))[1]
        if start < stop:  # and not behind the last row
            begin, end = ((int(blocks[each]) - file.first) * PAGE for each in (first, last - 1))
            what = f"is not what was written, from byte {begin} to {end + PAGE}"
            yield Damage(target.name, file.number, (start, stop), str(file.path), what)


def _structure(target: Target) -> Iterator[Damage]:
    name, spec, directory = target
    try:
        layout.table_spec(folders.documents(directory))
    except FormatError as error:
        yield Damage(name, None, None, str(directory), str(error))
        return
    of_path = {file.path: file for file in checks.all_files(spec, directory)}
    for path, nbytes in shards.expected_files(spec, directory):
        found = files.size(path)
        if found != nbytes:
            what = "is missing" if found is None else f"has {found} bytes instead of {nbytes}"
            file = of_path.get(path)
            number, rows = (file.number, file.rows) if file else (None, (0, spec.num_embeddings))
            yield Damage(name, number, rows, str(path), what)


def _wrong(
    target: Target, file: checks.File, start: int, stop: int, memory: files.AddressRange
) -> Int64Array:
    try:
        return checks.wrong_blocks(file, target.directory, start, stop, memory)
    except OSError:  # a sector that cannot be read, or the file has gone meanwhile
        return file.first + np.arange(start // PAGE, stop // PAGE)


def _in_log(spec: TableSpec, newer: Replay) -> Int64Array:
    ids = newer.images(spec).ids
    presence = spec.num_shards * spec.shard_bytes // PAGE + plan.pages(ids // 8, 1)
    return np.concatenate([plan.pages(ids, spec.record_bytes), presence])
