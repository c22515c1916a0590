"""Writes changed pages into the files of their tables, and makes them durable.

Space is secured for all of it before the first byte is written, so a full disk is met while nothing has changed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from shardemb import files, scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from shardemb.arrays import Int64Array


@dataclass(frozen=True)
class FileChanges:
    """What is to be written into one file.

    Attributes
    ----------
    path : Path
        The file.
    memory : memoryview
        Where the whole file is mapped: what to write, and where, have the same offset.
    stretches : ndarray of int64, shape (n, 2)
        First byte and one past the last of each stretch that changed, ascending and apart.
    """

    path: Path
    memory: memoryview
    stretches: Int64Array


def secure(changes: Sequence[FileChanges], threads: int) -> None:
    """Secure the disk space of every stretch.

    Raises
    ------
    DiskFullError
        There is no room; nothing was changed, and what was secured is given back.
    """
    taken: list[tuple[Path, int, int]] = []
    try:
        _each_file(partial(_secure_file, taken), changes, threads)
    except BaseException:
        _give_back(taken)
        raise


def write(changes: Sequence[FileChanges], threads: int) -> None:
    """Write every stretch and make it durable, each file within one task."""
    _each_file(_write_file, changes, threads)


def _each_file(work: Callable[[FileChanges], None], changes: Sequence[FileChanges], threads: int) -> None:
    def some(changes: Sequence[FileChanges]) -> None:
        for each in changes:
            work(each)

    tasks = min(2 * threads, len(changes))
    scheduler.run([partial(some, changes[task::tasks]) for task in range(tasks)], threads)


def _secure_file(taken: list[tuple[Path, int, int]], changes: FileChanges) -> None:
    path = changes.path
    with files.opened(path, os.O_WRONLY) as descriptor:
        for start, stop in changes.stretches.tolist():
            for hole, end in files.holes(descriptor, start, stop):
                taken.append((path, hole, end))  # before: a call that fails may have taken a part of it
                files.allocate(descriptor, hole, end - hole, path)


def _give_back(taken: list[tuple[Path, int, int]]) -> None:
    for path, stretches in groupby(sorted(taken), key=itemgetter(0)):
        with files.opened(path, os.O_WRONLY) as descriptor:
            for _, hole, end in stretches:
                files.punch(descriptor, hole, end - hole, path)


def _write_file(changes: FileChanges) -> None:
    with files.opened(changes.path, os.O_WRONLY) as descriptor:
        for start, stop in changes.stretches.tolist():
            files.write(descriptor, changes.memory[start:stop], start, changes.path)
        files.sync(descriptor, changes.path)
