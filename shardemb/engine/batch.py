"""How a batch runs: from checked ids to kernels, for one table or several together.

::

    read     (if cold: group by row, request all pages) -> cut into tasks -> gather
    change   group by row -> (if cold: request all pages) -> copy new rows into slots
             -> cut into tasks, each row in one of them -> step

The caller has checked all arguments, so nothing here refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shardemb.base.formatting import plural, size
from shardemb.base.interrupts import signals_deferred
from shardemb.base.sizes import PAGE
from shardemb.compute import file_blocks, plan, row_kernels, scheduler
from shardemb.engine.shards import PAGED_ROWS
from shardemb.errors import ShardEmbError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.compute.plan import Grouped, Piece
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.optim import Optimizer

SAMPLES = 32
"""Rows of a batch whose pages are searched in memory, to decide whether it is cold."""

MIN_ROW_BYTES = 128
"""The least cost of a lookup of one row, however short it is: two cache lines, its own and one of the index."""

DRAWN_WORK = 3
"""Time to draw a row's initial values, in times of copying a row: it was measured as 1.4 (uniform) to 2.8 (normal)."""

PREFETCH_ROWS = 4096
"""Rows that a prefetch copies into slots each time that it holds the lock."""


@dataclass
class Training:
    """The mutable state of a table besides its rows.

    Attributes
    ----------
    optimizer : Optimizer or None
        It has the hyper-parameters of the next update.
    step : int
        Updates so far.
    """

    optimizer: Optimizer | None
    step: int


class PlannedRead(NamedTuple):
    """A checked lookup in one table, and the shape of its result."""

    shards: Shards
    column: str
    ids: Int64Array
    shape: tuple[int, ...]

    def into(self, result: Float32Array) -> Read:
        """Add the array that the result goes to; it has that shape and is C-contiguous."""
        # To kernels, a subclass of ndarray such as memmap would be another type.
        flat = np.asarray(result).reshape(-1, self.shape[-1])
        return Read(self.shards, self.column, self.ids, flat)


class Read(NamedTuple):
    """A lookup in one table: ``out[i]`` becomes the column of row ``ids[i]``."""

    shards: Shards
    column: str
    ids: Int64Array
    out: Float32Array


@dataclass(frozen=True)
class Change:
    """A change of one table: gradients for a step of its optimizer, or, if `training` is None, weights to write.

    In the second case, `values` may also be as wide as whole records.
    """

    shards: Shards
    batch: Grouped
    values: Float32Array
    training: Training | None


@dataclass(frozen=True)
class Explanation:
    """What a lookup of a batch involves, see `Table.explain`; prints as a few lines.

    Attributes
    ----------
    ids, rows : int
        Ids of the batch, and the distinct rows among them.
    rows_in_memory, rows_out, rows_never_written : int
        How many of these rows changed and are in memory, changed and are in the spill file, and were never written. The
        last get their initial values without any access to the disk.
    shards, pages, pages_resident : int
        All other rows are read from that many shards, on that many pages of 4,096 bytes, of which `pages_resident` are
        in memory now.
    bytes_useful, bytes_read : int
        Bytes of the result that come from these pages, counting each row once, and bytes that have to be read from disk
        for them.
    path : {"warm", "cold", "paged"}
        Warm batches are gathered as they are. Cold ones are sorted, and all of their pages are requested ahead. While
        the table has rows in the spill file, a batch is processed part by part, and the rows of each are reloaded.
    tasks : int
        Tasks that the gathering is cut into.
    """

    ids: int
    rows: int
    rows_in_memory: int
    rows_out: int
    rows_never_written: int
    shards: int
    pages: int
    pages_resident: int
    bytes_useful: int
    bytes_read: int
    path: str
    tasks: int

    def __str__(self) -> str:
        read = (
            f"{self.bytes_read / self.bytes_useful:.1f} x as much" if self.bytes_useful else "nothing to read"
        )
        lines = [
            f"{plural(self.ids, 'id')}, {plural(self.rows, 'distinct row')}: "
            f"{self.rows_in_memory:,} changed and in memory, {self.rows_out:,} in the spill file, "
            f"{self.rows_never_written:,} never written",
            f"the rest is in {plural(self.shards, 'shard')}, on {plural(self.pages, 'page')}, "
            f"{self.pages_resident:,} of them in memory",
            f"{size(self.bytes_useful)} of them are needed; to read {size(self.bytes_read)} ({read})",
            f"{self.path}, in {plural(self.tasks, 'task')}",
        ]
        return "\n".join(lines)


def read(runtime: Runtime, reads: Sequence[Read]) -> None:
    """Carry out lookups in one or several tables, together.

    Warm batches are gathered as they are, without a sort or a system call for each row. Cold ones are grouped first,
    and the pages of *all* of them are requested before the first is waited for, so that the disk always has as many
    requests as it can take.

    Raises
    ------
    StaleReaderError
        Another writer has opened the store; see `Runtime.check_fresh`.
    """
    runtime.check_fresh()
    _without_lock(runtime, reads, _gather)
    runtime.check_fresh()  # a new writer may have changed the files while they were read
    for each in reads:
        each.shards.totals.add_lookup(each.ids.size)


def explain(runtime: Runtime, shards: Shards, ids: Int64Array) -> Explanation:
    """Describe what a lookup of the weights of a batch involves."""
    rows = plan.group(ids, shards.spec.num_embeddings).rows
    with runtime.lock:
        places = shards.overlay.places(rows)
        path = "paged" if shards.overlay.spilled else "cold" if shards.is_cold(ids, SAMPLES) else "warm"
    in_files, written = places == rows, shards.were_written(rows)
    read = rows[in_files & written]
    pages = file_blocks.pages(read, shards.spec.record_bytes)
    resident, row_bytes = shards.count_resident(pages), 4 * shards.spec.embedding_dim
    return Explanation(
        ids=ids.size,
        rows=rows.size,
        rows_in_memory=int(np.count_nonzero(places > rows)),
        rows_out=int(np.count_nonzero(places < 0)),
        rows_never_written=int(np.count_nonzero(in_files & ~written)),
        shards=np.unique(read // shards.spec.rows_per_shard).size,
        pages=pages.size,
        pages_resident=resident,
        bytes_useful=read.size * row_bytes,
        bytes_read=(pages.size - resident) * PAGE,
        path=path,
        tasks=len(_cut(runtime, [ids.size], [_row_bytes(shards, "weight", ids)])),
    )


def read_range(runtime: Runtime, shards: Shards, column: str, start: int, stop: int) -> Float32Array:
    """Copy a column of rows ``start:stop``, all in the calling thread: this may be called from a task."""
    first, last = shards.spec.columns[column]
    ids = np.arange(start, stop, dtype=np.int64)
    out = np.empty((stop - start, last - first), np.float32)
    _without_lock(runtime, [Read(shards, column, ids, out)], _gather_range)
    return out


def _without_lock(
    runtime: Runtime, reads: Sequence[Read], gather: Callable[[Runtime, Sequence[Read]], None]
) -> None:
    """Gather without the lock; if rows are spilled or leave their slots meanwhile, start over under the lock.

    Under the lock nothing moves rows, so the second attempt is always right.
    """
    versions = [each.shards.overlay.version for each in reads]
    if None not in versions:
        gather(runtime, reads)
        if [each.shards.overlay.version for each in reads] == versions:
            return
    for each in reads:
        _gather_paged(runtime, each)


def _gather(runtime: Runtime, reads: Sequence[Read]) -> None:
    samples = _samples(len(reads))
    cold = [each for each in reads if each.shards.is_cold(each.ids, samples)]
    for each in cold:
        each.shards.totals.add_cold()
    if cold:
        _read_ahead(runtime, [(c.shards, plan.group(c.ids, c.shards.spec.num_embeddings).rows) for c in cold])
    gathers = [partial(read.shards.gather, read.column, read.ids, read.out) for read in reads]
    run_pieces(
        runtime,
        gathers,
        [read.ids.size for read in reads],
        [_row_bytes(read.shards, read.column, read.ids) for read in reads],
    )


def _gather_range(runtime: Runtime, reads: Sequence[Read]) -> None:
    for read in reads:
        if read.shards.is_cold(read.ids, SAMPLES):
            read.shards.read_ahead(read.ids, 0, read.ids.size)
        read.shards.gather(read.column, read.ids, read.out, 0, read.ids.size)


def _gather_paged(runtime: Runtime, read: Read) -> None:
    """Gather under the lock, part by part, and reload the spilled rows of each part first.

    So a lookup exceeds the memory budget by one part at most, and others get the lock between parts.
    """
    shards = read.shards
    for start in range(0, read.ids.size, PAGED_ROWS):
        stop = min(start + PAGED_ROWS, read.ids.size)
        rows = np.unique(read.ids[start:stop])
        with runtime.changing():
            # This may release the lock, and spill rows of the part: they are searched again by `reload`.
            runtime.budget.make_room(shards.overlay.count_spilled(rows) * shards.overlay.row_bytes)
            with signals_deferred():
                shards.overlay.reload(rows)
            if shards.is_cold(rows, SAMPLES):
                shards.read_ahead(rows, 0, rows.size)
            shards.gather(read.column, read.ids, read.out, start, stop)


def change(runtime: Runtime, changes: Sequence[Change]) -> None:
    """Carry out changes of one or several tables, together: all of them or none.

    Each distinct row belongs to one task. Until the inner ``with``, anything may fail, and nothing has changed; within
    it, nothing is expected to fail.

    Raises
    ------
    StoreClosedError, ReadOnlyError, PoisonedError
        The store cannot be changed.
    ShardEmbError
        The table lost rows or its optimizer after the change was checked.
    DiskFullError, OSError
        There is no space for the rows.
    """
    with runtime.changing():
        changes = [_latest(each) for each in changes]
        places = load(runtime, [(each.shards, each.batch.rows) for each in changes])
        runtime.check_sound()
        work = [_work(*each) for each in zip(changes, places, strict=True)]

        def change_rows(pieces: list[Piece]) -> None:
            for piece in pieces:
                work[piece.which](*plan.align(changes[piece.which].batch, piece))

        pieces = _cut(
            runtime, [c.batch.order.size for c in changes], [c.shards.spec.record_bytes for c in changes]
        )
        tasks = [partial(change_rows, task) for task in pieces]
        with runtime.all_or_nothing("an update or write"):
            # Marked before they change: should the change fail half way, a rollback has to find all of its rows.
            for each, changed in zip(changes, places, strict=True):
                each.shards.overlay.mark_changed(changed)
            scheduler.run(tasks, runtime.threads)
            for each in changes:
                each.shards.totals.changes += 1
                each.shards.totals.rows_changed += each.batch.rows.size
                if each.training is not None:
                    each.training.step += 1


def _latest(change: Change) -> Change:
    """Return the change for what its table is now, which may have been resized or resharded since the ids were checked.

    Raises
    ------
    ShardEmbError
        The table does not have the rows or the optimizer any more.
    """
    shards = change.shards
    while shards.successor is not None:
        shards = shards.successor
    gone = change.batch.rows.size and change.batch.rows[-1] >= shards.spec.num_embeddings
    if gone or (change.training is not None and change.training.optimizer is None):
        msg = (
            f"the table in {shards.directory} lost rows or its optimizer while this change waited; "
            f"nothing was changed"
        )
        raise ShardEmbError(msg)
    return replace(change, shards=shards)


def prefetch(runtime: Runtime, shards: Shards, rows: Int64Array, *, for_update: bool) -> None:
    """Read the pages of ascending rows; copy the rows into slots too if an update is to follow."""
    shards.read_ahead(rows, 0, rows.size)
    if not for_update:
        return
    for start in range(0, rows.size, PREFETCH_ROWS):
        with runtime.lock:  # each time for a moment, as nobody should wait for a prefetch
            if runtime.closed:
                return
            some = rows[start : start + PREFETCH_ROWS]
            if not runtime.budget.evict(shards.overlay.count_new(some) * shards.overlay.row_bytes):
                return  # the rows may never be used: not worth a fold, or spilling others
            _fill_slots(runtime, [(shards, some)])


def load(runtime: Runtime, batches: Sequence[tuple[Shards, Int64Array]]) -> list[Int64Array]:
    """Load ascending rows of tables into slots; return their places.

    The lock may be released at the beginning, while a fold frees memory, but not once the first row is loaded: places
    are valid only as long as the caller holds the lock.

    Raises
    ------
    StoreClosedError
        The store was closed meanwhile.
    DiskFullError, OSError
        There is no space.
    """
    _make_room(runtime, batches)
    runtime.check_open()  # the lock may have been released
    with signals_deferred():  # an interrupt half way would leave the counts of slots wrong
        return _fill_slots(runtime, batches)


def _fill_slots(runtime: Runtime, batches: Sequence[tuple[Shards, Int64Array]]) -> list[Int64Array]:
    """Load ascending rows into slots without making room for them; return their places."""
    for shards, rows in batches:
        shards.overlay.reload(rows)
    places = [shards.overlay.places(rows) for shards, rows in batches]
    in_files = [found == rows for found, (_, rows) in zip(places, batches, strict=True)]
    new = [(shards, rows[which]) for (shards, rows), which in zip(batches, in_files, strict=True)]
    samples = _samples(len(new))
    _read_ahead(runtime, [(shards, rows) for shards, rows in new if shards.is_cold(rows, samples)])
    reserved: list[Int64Array] = []
    try:
        for shards, rows in new:
            reserved.append(shards.overlay.reserve(rows))
        copies = [
            partial(shards.copy, rows, targets) for (shards, rows), targets in zip(new, reserved, strict=True)
        ]
        run_pieces(runtime, copies, [rows.size for _, rows in new], [s.spec.record_bytes for s, _ in new])
    except BaseException:
        for (shards, _), targets in zip(new, reserved, strict=False):
            shards.overlay.unreserve(targets)
        raise
    # Not before the copies are complete: a lookup without the lock reads a slot as soon as the index leads to it.
    for i, (shards, rows) in enumerate(new):
        shards.overlay.publish(rows, reserved[i])
        shards.totals.rows_copied += rows.size
        places[i][in_files[i]] = reserved[i]
    return places


def _make_room(runtime: Runtime, batches: Sequence[tuple[Shards, Int64Array]]) -> None:
    """Make room for the rows of batches that are not in memory; the lock may be released meanwhile."""
    budget = runtime.budget
    if budget.has_room(sum(rows.size * shards.overlay.row_bytes for shards, rows in batches)):
        return  # there is room even if all of them are new, so they need not be counted
    for shards, rows in batches:
        shards.overlay.mark_touched(rows)  # or those of the batch that are in memory could be evicted
    budget.make_room(
        sum(shards.overlay.count_new(rows) * shards.overlay.row_bytes for shards, rows in batches)
    )


def _work(change: Change, places: Int64Array) -> Callable[[int, int], None]:
    """Return the function that changes the distinct rows ``start:stop`` of a batch, given the places of their slots."""
    shards, batch, values = change.shards, change.batch, change.values

    def overwrite(start: int, stop: int) -> None:
        row_kernels.scatter(shards.records, places, batch.starts, batch.order, values, start, stop)

    if change.training is None or change.training.optimizer is None:
        return overwrite
    step = row_kernels.step(type(change.training.optimizer))
    number = change.training.step + 1
    scalars = np.array(change.training.optimizer.scalars(number), np.float32)
    counting = number if shards.spec.counters else 0

    def take_step(start: int, stop: int) -> None:
        scratch = np.empty(values.shape[1], np.float32)
        step(
            shards.records, places, batch.starts, batch.order, values, scalars, scratch, counting, start, stop
        )

    return take_step


def _samples(tables: int) -> int:
    """Return how many rows of each of several tables to sample for `Shards.is_cold`, at 2 us each."""
    return max(SAMPLES // 4, SAMPLES // tables) if tables else 0


def _row_bytes(shards: Shards, column: str, ids: Int64Array) -> int:
    """Return the cost of looking up one row of a batch, as the bytes that could be copied in that time."""
    first, last = shards.spec.columns[column]
    copied = max(4 * (last - first), MIN_ROW_BYTES)
    if ids.size * copied * DRAWN_WORK < 2 * plan.TASK_BYTES:
        return copied  # one task even if all rows are drawn, so the sample can be spared
    return round(copied * (1 + (DRAWN_WORK - 1) * shards.share_drawn(column, ids, SAMPLES)))


def _read_ahead(runtime: Runtime, batches: Sequence[tuple[Shards, Int64Array]]) -> None:
    """Request the pages of ascending rows."""
    requests = [partial(shards.read_ahead, rows) for shards, rows in batches]
    # However short a row is, it costs a system call and a page.
    run_pieces(runtime, requests, [rows.size for _, rows in batches], [PAGE] * len(batches))


def run_pieces(
    runtime: Runtime,
    functions: Sequence[Callable[[int, int], None]],
    lengths: Sequence[int],
    row_bytes: Sequence[int],
) -> None:
    """Call each function for the whole range of its length, in pieces that are spread over balanced tasks."""

    def run(pieces: list[Piece]) -> None:
        for which, start, stop in pieces:
            functions[which](start, stop)

    scheduler.run([partial(run, task) for task in _cut(runtime, lengths, row_bytes)], runtime.threads)


def run_concurrently(runtime: Runtime, functions: Sequence[Callable[[], None]]) -> None:
    """Call functions concurrently, on one thread more than a batch may use, as one of them waits for the disk.

    If batches may use one thread only, so do these.
    """
    scheduler.run(functions, runtime.threads + 1 if runtime.threads > 1 else 1)


def _cut(runtime: Runtime, lengths: Sequence[int], row_bytes: Sequence[int]) -> list[list[Piece]]:
    nbytes = sum(map(mul, lengths, row_bytes))
    return plan.cut(lengths, plan.num_tasks(nbytes, runtime.threads))
