"""Filling: many consecutive rows that were never written go straight to their place in the shards; see ``fills.py``.

::

    plan     which blocks lie in the rows as a whole, were never written, and are zeros
    written  announce them -> assemble, sum and write pieces, on several threads -> let lookups see them
             (after an error: make holes of them again)

The rows at the edges of the blocks, and those of blocks that do not qualify, are changed as others are.
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardemb.base.interrupts import signals_deferred
from shardemb.base.sizes import MAX_COUNT, PAGE, round_up
from shardemb.commits import fills
from shardemb.compute import file_blocks, scheduler
from shardemb.format.fill_records import Fill, Filled
from shardemb.storage import address_space, checksums, files, table_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.format.table_files import File

LEAST_BYTES = 4 * 2**20
"""Bytes of blocks from which on it pays to write them at once: a fill costs a few syncs, as a small commit does."""

PIECE_BYTES = 4 * 2**20
"""Bytes that are assembled, summed and written at a time."""

AHEAD_BYTES = 2**30
"""Most bytes of blocks that are named ahead."""

WHAT = "a write"

TAKEN_BACK_ROWS = 4096
"""Rows that are brought into slots at a time."""


@dataclass(frozen=True)
class Filling:
    """Rows of a table to write, and the fills that take most of them.

    Attributes
    ----------
    shards : Shards
    fills : tuple of Fill
    rows : ndarray of int64
        The rows of the change, ascending and without gaps.
    values : ndarray
        Weights, or whole records, as the elements of these.
    positions : ndarray of int64
        Where in `values` each row is.
    counters : tuple of ndarray and int, optional
        How often each row is written, and the step of the table: what goes into the last two columns.
    """

    shards: Shards
    fills: tuple[Fill, ...]
    rows: Int64Array
    values: NDArray[Any]
    positions: Int64Array
    counters: tuple[Int64Array, int] | None = None
    done: list[Filled] = field(default_factory=list)

    def assemble(self, fill: Fill, start: int, stop: int, target: NDArray[Any]) -> None:
        """Write the records of rows ``start:stop`` to memory; those that are not of the fill are zeros."""
        spec = self.shards.spec
        first, last = fill.rows(spec.record_bytes)
        begin, end = max(start, first), max(min(stop, last), start, first)
        target[: begin - start] = 0
        target[end - start :] = 0
        which = slice(begin - int(self.rows[0]), end - int(self.rows[0]))
        width, records = self.values.shape[1], target[begin - start : end - start]
        records[:, :width] = self.values[_as_slice(self.positions[which])]
        records[:, width:] = spec.initial_state[width - spec.weight_width :]
        if self.counters is not None:
            counts, step = self.counters
            numbers = records.view(np.float32)
            numbers[:, -2] = np.minimum(counts[which], MAX_COUNT)
            numbers[:, -1] = step


def _as_slice(positions: Int64Array) -> slice | Int64Array:
    """Return positions as a slice if they follow on each other, which is copied much faster."""
    first = int(positions[0]) if positions.size else 0
    if np.array_equal(positions, np.arange(first, first + positions.size)):
        return slice(first, first + positions.size)
    return positions


# ---- what can be filled -----------------------------------------------------------------------------------------


def plan(shards: Shards, rows: Int64Array) -> tuple[Fill, ...]:
    """Return what can be filled of ascending rows that are to be written. The caller holds the store's lock.

    Raises
    ------
    OSError
        The files cannot be read.
    """
    nbytes = shards.spec.record_bytes
    if rows.size * nbytes < LEAST_BYTES or int(rows[-1]) - int(rows[0]) >= rows.size:
        return ()
    first, stop = -(-int(rows[0]) * nbytes // PAGE), (int(rows[-1]) + 1) * nbytes // PAGE
    free = _free(shards, first, stop) if (stop - first) * PAGE >= LEAST_BYTES else np.zeros(0, np.bool_)
    found = []
    numbers = np.flatnonzero(free)
    for begin, end in file_blocks.runs(numbers):
        fill = Fill(shards.spec.uuid, first + int(numbers[begin]), first + int(numbers[end - 1]) + 1)
        start, last = fill.rows(nbytes)
        if (end - begin) * PAGE >= LEAST_BYTES and start < last:
            found.append(fill)
    return tuple(found)


def _free(shards: Shards, first: int, stop: int) -> NDArray[np.bool_]:
    """Return which of a range of blocks were never written, and have no row that is dirty."""
    nbytes = shards.spec.record_bytes
    sums = checksums.read_sums(shards.location.checksums_path, first, stop - first)
    free: NDArray[np.bool_] = sums == checksums.NEVER_WRITTEN
    if not free.any():
        return free
    shards.filled.take_blocks(first, free)
    rows = np.arange(first * PAGE // nbytes, min(-(-stop * PAGE // nbytes), shards.spec.num_embeddings))
    for some in (_dirty(shards, rows), _present(shards, rows)):
        blocks = file_blocks.pages(some, nbytes) - first
        free[blocks[(blocks >= 0) & (blocks < free.size)]] = False
    _require_zeros(shards, first, free)
    return free


def _ahead(shards: Shards, fills: Sequence[Fill]) -> list[Fill]:
    """Extend the last of some fills by blocks that could be filled next, about as many as were filled since the commit.

    So the note is replaced a few times while a table is filled from one end to the other, and not once for each call.
    """
    last, spec = fills[-1], shards.spec
    blocks = sum(each.sums.size for each in shards.filled.uncommitted)
    blocks = min(blocks + last.stop - last.first, AHEAD_BYTES // PAGE)
    stop = min(last.stop + blocks, spec.num_embeddings * spec.record_bytes // PAGE)
    if stop == last.stop:
        return list(fills)
    free = _free(shards, last.stop, stop)
    more = free.size if free.all() else int(np.argmin(free))
    return [*fills[:-1], replace(last, stop=last.stop + more)]


def _dirty(shards: Shards, rows: Int64Array) -> Int64Array:
    overlay = shards.overlay
    if not overlay.slots.count and not overlay.spilled:
        return rows[:0]
    return rows[overlay.are_dirty(rows)]


def _present(shards: Shards, rows: Int64Array) -> Int64Array:
    if not shards.spec.has_presence:
        return rows[:0]
    return rows[shards.were_written(rows)]


def _require_zeros(shards: Shards, first: int, free: NDArray[np.bool_]) -> None:
    """Take blocks out of `free` that are not zeros, or whose file has another name.

    Another program may have written values of rows. They count, though no checksum knows of them.
    """
    numbers = np.flatnonzero(free)
    for begin, end in file_blocks.runs(numbers):
        for file, start, stop in fills.parts(
            shards.location, first + int(numbers[begin]), first + int(numbers[end - 1]) + 1
        ):
            here = file.first - first
            if files.names(file.path)[0] > 1:
                free[max(start // PAGE + here, 0) : stop // PAGE + here] = False
                continue
            with files.opened(file.path, os.O_RDONLY) as descriptor:
                for low, high in _windows(descriptor, start, stop):
                    data = files.read_at(descriptor, high - low, low, file.path)
                    used = np.frombuffer(data, np.uint64).reshape(-1, PAGE // 8).any(axis=1)
                    free[low // PAGE + here : high // PAGE + here] &= ~used


def _windows(descriptor: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range of a file that are not holes, as whole blocks, a piece at a time."""
    for begin, end in files.data(descriptor, start, stop):
        low, high = begin // PAGE * PAGE, round_up(end, PAGE)
        for window in range(low, high, PIECE_BYTES):
            yield window, min(window + PIECE_BYTES, high)


def left_over(rows: Int64Array, fills: Sequence[Fill], record_bytes: int) -> NDArray[np.bool_]:
    """Return which of ascending rows without gaps no fill takes."""
    left = np.ones(rows.size, np.bool_)
    for each in fills:
        start, stop = each.rows(record_bytes)
        left[start - int(rows[0]) : stop - int(rows[0])] = False
    return left


def count_rows(shards: Shards, fillings: Sequence[Filling]) -> int:
    """Count the rows of a table that fills take."""
    ranges = [
        fill.rows(shards.spec.record_bytes)
        for each in fillings
        if each.shards is shards
        for fill in each.fills
    ]
    return sum(stop - start for start, stop in ranges)


# ---- writing ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written(runtime: Runtime, fillings: Sequence[Filling]) -> Iterator[None]:
    """Write fills for the length of a with block that completes the change. If it fails, nothing is left of them.

    Raises
    ------
    DiskFullError, OSError
        The rows are what they were before.
    """
    if not fillings:
        yield
        return
    assert runtime.announcements is not None
    runtime.check_in_place()
    if not runtime.announcements.cover(fill for each in fillings for fill in each.fills):
        runtime.announcements.announce(
            [fill for each in fillings for fill in _ahead(each.shards, each.fills)]
        )
    try:
        # Whatever comes in between, a rollback finds all of it, and nothing is committed before.
        runtime.half_done = WHAT
        for each in fillings:
            _write(runtime, each)
        runtime.half_done = None
        yield
    except BaseException:
        with runtime.all_or_nothing(WHAT):
            for each in fillings:
                undo(each.shards, each.done)
            if runtime.half_done == WHAT:
                runtime.half_done = None
        raise


def _write(runtime: Runtime, filling: Filling) -> None:
    shards = filling.shards
    spec = shards.spec
    stays = runtime.warming.has_room(spec.num_shards * spec.shard_bytes)
    with signals_deferred():
        for fill in filling.fills:
            filling.done.append(Filled(fill, np.zeros(fill.stop - fill.first, np.uint64)))
            shards.filled.add(filling.done[-1])
    for fill in filling.fills if shards.overlay.slots.count else ():
        # Copies of what the files hold: the files are about to hold something else.
        shards.overlay.drop(np.arange(*fill.rows(spec.record_bytes)))
    pieces = [piece for filled in filling.done for piece in _pieces(filling, filled)]
    number, stop = min(2 * runtime.threads, len(pieces)), threading.Event()

    def some(task: int) -> None:
        lead = round_up(spec.record_bytes, PAGE)
        memory = address_space.AddressRange(PIECE_BYTES + 2 * lead)
        memory.map_zeros(0, memory.nbytes)
        for piece in pieces[task::number]:
            if stop.is_set():
                return
            piece.write(memory, lead, stays_cached=stays)

    scheduler.run([partial(some, task) for task in range(number)], runtime.threads, stop)
    with signals_deferred():
        for filled in filling.done:
            shards.filled.show(filled)


class _Piece(NamedTuple):
    """A part of a fill, within one shard."""

    filling: Filling
    filled: Filled
    file: File
    start: int  # bytes in the file
    stop: int

    def write(self, memory: address_space.AddressRange, lead: int, *, stays_cached: bool) -> None:
        """Assemble the records in memory, after `lead` bytes; note the checksums of their blocks, and write them."""
        spec, path = self.filling.shards.spec, self.file.path
        nbytes, size = self.stop - self.start, spec.record_bytes
        begin = self.file.first * PAGE + self.start
        rows = begin // size, -(-(begin + nbytes) // size)
        records = memory.array(spec.element, (rows[1] - rows[0], spec.width), lead + rows[0] * size - begin)
        # A copy also where none is needed: another thread may change the values between their sum and the write.
        self.filling.assemble(self.filled.fill, *rows, records)
        data = memory.bytes(lead, nbytes)
        first = begin // PAGE - self.filled.fill.first
        self.filled.sums[first : first + nbytes // PAGE] = checksums.block_sums(data)
        with (
            files.opened(path, os.O_RDWR)
            if stays_cached
            else files.opened_direct(path, os.O_RDWR) as descriptor
        ):
            if stays_cached:
                table_folder.prepare_to_stay(spec, descriptor, self.start, nbytes)
            files.write(descriptor, data, self.start, path)
            if stays_cached:  # or the commit would wait for all of it
                address_space.begin_write_back(descriptor, self.start, nbytes)


def _pieces(filling: Filling, filled: Filled) -> Iterator[_Piece]:
    fill = filled.fill
    for file, begin, end in fills.parts(filling.shards.location, fill.first, fill.stop):
        for start in range(begin, end, PIECE_BYTES):
            yield _Piece(filling, filled, file, start, min(start + PIECE_BYTES, end))


def undo(shards: Shards, done: Sequence[Filled]) -> None:
    """Make holes of fills that no commit has, durably. Lookups wait for that.

    Raises
    ------
    OSError
        Some are left, so that this can be called again.
    """
    if not done:
        return
    with shards.overlay.rewinding():
        shards.filled.undo(shards.location, done)


def take_back(runtime: Runtime, shards: Shards) -> None:
    """Bring the rows of fills that no commit has into slots, as changed rows, and undo the fills.

    Raises
    ------
    DiskFullError, OSError
        There is no space for them. Rows are in slots, in fills, or in both.
    """
    for filled in tuple(shards.filled.uncommitted):
        start, stop = filled.fill.rows(shards.spec.record_bytes)
        for begin in range(start, stop, TAKEN_BACK_ROWS):
            rows = np.arange(begin, min(begin + TAKEN_BACK_ROWS, stop))
            rows = rows[~shards.overlay.are_dirty(rows)]
            records = np.empty((rows.size, shards.spec.width), shards.spec.element)
            shards.overlay.pack(rows, records.ctypes.data)
            shards.adopt_records(rows, records, runtime.budget)
        undo(shards, [filled])
