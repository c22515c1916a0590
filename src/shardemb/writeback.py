"""Writes changed pages into the files of their tables, and makes them durable.

Space is secured for all of it before the first byte is written, so a full disk is met while nothing has changed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
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
    try:
        _each_file(_secure_file, changes, threads)
    except BaseException:
        _each_file(_release_file, changes, threads)
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


def _secure_file(changes: FileChanges) -> None:
    with files.opened(changes.path, os.O_WRONLY) as descriptor:
        for start, stop in changes.stretches.tolist():
            files.allocate(descriptor, start, stop - start, changes.path)


def _release_file(changes: FileChanges) -> None:
    with files.opened(changes.path, os.O_WRONLY) as descriptor:
        for start, stop in changes.stretches.tolist():
            files.release(descriptor, start, stop - start, changes.path)


def _write_file(changes: FileChanges) -> None:
    with files.opened(changes.path, os.O_WRONLY) as descriptor:
        for start, stop in changes.stretches.tolist():
            files.write(descriptor, changes.memory[start:stop], start, changes.path)
        files.sync(descriptor, changes.path)
