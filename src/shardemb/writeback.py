"""Writes changed pages into the files of their tables, and makes them durable.

Space is secured for all of it before the first byte is written, so a full disk is met while nothing has changed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from shardemb import files, scheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class FileRange:
    """A stretch of a file, and the memory that it is to be written from."""

    path: Path
    offset: int
    data: memoryview


def secure(ranges: Sequence[FileRange], threads: int) -> None:
    """Secure the disk space of every stretch.

    Raises
    ------
    DiskFullError
        There is no room; nothing was changed.
    """
    _each_file(_secure_file, ranges, threads)


def write(ranges: Sequence[FileRange], threads: int) -> None:
    """Write every stretch and make it durable, each file within one task."""
    _each_file(_write_file, ranges, threads)


def _each_file(work: Callable[[list[FileRange]], None], ranges: Sequence[FileRange], threads: int) -> None:
    by_file = [list(group) for _, group in groupby(ranges, key=lambda stretch: stretch.path)]
    tasks = min(2 * threads, len(by_file))
    scheduler.run([partial(_all, work, by_file[task::tasks]) for task in range(tasks)], threads)


def _all(work: Callable[[list[FileRange]], None], by_file: list[list[FileRange]]) -> None:
    for ranges in by_file:
        work(ranges)


def _secure_file(ranges: list[FileRange]) -> None:
    path = ranges[0].path
    with files.opened(path, os.O_WRONLY) as descriptor:
        for stretch in ranges:
            files.allocate(descriptor, stretch.offset, stretch.data.nbytes, path)


def _write_file(ranges: list[FileRange]) -> None:
    path = ranges[0].path
    with files.opened(path, os.O_WRONLY) as descriptor:
        for stretch in ranges:
            files.write(descriptor, stretch.data, stretch.offset, path)
        files.sync(descriptor, path)
