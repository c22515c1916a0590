"""How a batch runs: the way from checked ids to kernels, for one table or several at once.

::

    read     (cold: group by row, ask for all pages) -> cut into tasks -> gather
    change   group by row -> (cold: ask for all pages) -> copy new rows into slots
             -> cut into tasks, each row in one -> step

Everything here has been checked by the caller, so nothing is refused any more.
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
    from collections.abc import Sequence


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.compute.plan import Grouped, Piece
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.optim import Optimizer

SAMPLES = 32
"""Rows of a batch that are looked for in memory, to tell whether it is cold."""

MIN_ROW_BYTES = 128
"""What a row that is looked up costs at least, however short it is: two cache lines, its own and one of the index."""

DRAWN_WORK = 3
"""How many times as long it takes to draw a row's initial values as to copy the row: 1.4 (uniform) to 2.8 (normal)."""

PREFETCH_ROWS = 4096
"""Rows that a prefetch copies into slots while it holds the lock once."""


@dataclass
class Training:
    """What changes about a table besides its rows.

    Attributes
    ----------
    optimizer : Optimizer or None
        With the hyper-parameters of the next update.
    step : int
        Updates so far.
    """

    optimizer: Optimizer | None
    step: int


class PlannedRead(NamedTuple):
    """A lookup in one table that was checked: what it asks for, and the shape of the result."""

    shards: Shards
    column: str
    ids: Int64Array
    shape: tuple[int, ...]

    def into(self, result: Float32Array) -> Read:
        """Say where it goes: an array of that shape, C-contiguous."""
        # A subclass of ndarray, such as a memmap, would be another type to the kernels.
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
    """A change of one table: gradients for a step of its optimizer; weights to overwrite where `training` is None.

    The latter may also be as wide as whole records.
    """

    shards: Shards
    batch: Grouped
    values: Float32Array
    training: Training | None


@dataclass(frozen=True)
class Explanation:
    """What a lookup of a batch meets, see `Table.explain`; prints as a few lines.

    Attributes
    ----------
    ids, rows : int
        Ids of the batch, and the distinct rows among them.
    rows_in_memory, rows_out, rows_never_written : int
        Of these, rows that changed and lie in memory; that changed and are in the scratch file; and that get their
        initial value without a look at the disk.
    shards, pages, pages_resident : int
        All others are read from so many shards, on so many pages of 4,096 bytes, of which so many are in memory now.
    bytes_useful, bytes_read : int
        Bytes of the result that come from these pages, each row once; and bytes that the disk has to read for them.
    path : {"warm", "cold", "paged"}
        Gathered as it is; sorted, and all pages asked for ahead; or brought back from the scratch file part by part.
    tasks : int
        Pieces that the gathering is cut into.
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
            f"{self.rows_in_memory:,} changed and in memory, {self.rows_out:,} in the scratch file, "
            f"{self.rows_never_written:,} never written",
            f"the rest lies in {plural(self.shards, 'shard')}, on {plural(self.pages, 'page')}, "
            f"{self.pages_resident:,} of them in memory",
            f"{size(self.bytes_useful)} of them are asked for; to read {size(self.bytes_read)} ({read})",
            f"{self.path}, in {plural(self.tasks, 'task')}",
        ]
        return "\n".join(lines)


def read(runtime: Runtime, reads: Sequence[Read]) -> None:
    """Carry out lookups in one or several tables, together.

    Warm batches are gathered as they are: no sort, no system call a row. What is cold is grouped first, and the
    pages of *all* of it are asked for before the first is waited for: the disk sees as many requests as it can take.
    """
    runtime.check_fresh()
    _without_lock(runtime, reads, _gather)
    runtime.check_fresh()
    for each in reads:
        each.shards.totals.add_lookup(each.ids.size)


def explain(runtime: Runtime, shards: Shards, ids: Int64Array) -> Explanation:
    """Tell what a lookup of the weights of a batch meets."""
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
    """Copy a column of rows ``start:stop`` in the calling thread, which may be a task."""
    first, last = shards.spec.columns[column]
    ids = np.arange(start, stop, dtype=np.int64)
    out = np.empty((stop - start, last - first), np.float32)
    _without_lock(runtime, [Read(shards, column, ids, out)], _gather_range)
    return out


def _without_lock(
    runtime: Runtime, reads: Sequence[Read], gather: Callable[[Runtime, Sequence[Read]], None]
) -> None:
    """Gather without the lock; again with it, where rows are out or left their slots meanwhile."""
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
    """Bring rows back that are out, those of a part of the batch at a time."""
    shards = read.shards
    for start in range(0, read.ids.size, PAGED_ROWS):
        stop = min(start + PAGED_ROWS, read.ids.size)
        rows = np.unique(read.ids[start:stop])
        with runtime.changing():
            runtime.budget.make_room(shards.overlay.count_spilled(rows) * shards.overlay.row_bytes)
            with signals_deferred():
                shards.overlay.reload(rows)
            if shards.is_cold(rows, SAMPLES):
                shards.read_ahead(rows, 0, rows.size)
            shards.gather(read.column, read.ids, read.out, start, stop)


def change(runtime: Runtime, changes: Sequence[Change]) -> None:
    """Carry out changes of one or several tables, together: all of them or none.

    Each distinct row belongs to one task. Up to the inner ``with`` anything may fail and nothing has changed; within
    it nothing can.
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
            for each, slots in zip(changes, places, strict=True):
                each.shards.overlay.mark_changed(slots)
            scheduler.run(tasks, runtime.threads)
            for each in changes:
                each.shards.totals.changes += 1
                each.shards.totals.rows_changed += each.batch.rows.size
                if each.training is not None:
                    each.training.step += 1


def _latest(change: Change) -> Change:
    """Return a change of what its table is by now: it may have been resized, or resharded, since the ids were checked.

    Raises
    ------
    ShardEmbError
        The change is not one of that table any more.
    """
    shards = change.shards
    while shards.successor is not None:
        shards = shards.successor
    gone = change.batch.rows.size and change.batch.rows[-1] >= shards.spec.num_embeddings
    if gone or (change.training is not None and change.training.optimizer is None):
        msg = f"the table in {shards.directory} lost rows or its optimizer while this waited; nothing was changed"
        raise ShardEmbError(msg)
    return replace(change, shards=shards)


def prefetch(runtime: Runtime, shards: Shards, rows: Int64Array, *, for_update: bool) -> None:
    """Read the pages of ascending rows; copy the rows into slots where an update is to come."""
    shards.read_ahead(rows, 0, rows.size)
    if not for_update:
        return
    for start in range(0, rows.size, PREFETCH_ROWS):
        with runtime.lock:  # for a moment at a time
            if runtime.closed:
                return
            some = rows[start : start + PREFETCH_ROWS]
            if not runtime.budget.evict(shards.overlay.count_new(some) * shards.overlay.row_bytes):
                return  # a guess is not worth a fold, nor that others go out
            _fill_slots(runtime, [(shards, some)])


def load(runtime: Runtime, batches: Sequence[tuple[Shards, Int64Array]]) -> list[Int64Array]:
    """Bring ascending rows of tables into slots, with the records that they have; return their places.

    The lock may be let go at first, while a fold makes room; not once the first row is here.

    Raises
    ------
    StoreClosedError
        The store was closed meanwhile.
    DiskFullError, OSError
        There is no room.
    """
    _make_room(runtime, batches)
    runtime.check_open()
    with signals_deferred():  # the books of slots are whole or wrong
        return _fill_slots(runtime, batches)


def _fill_slots(runtime: Runtime, batches: Sequence[tuple[Shards, Int64Array]]) -> list[Int64Array]:
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
            partial(shards.copy, rows, slots) for (shards, rows), slots in zip(new, reserved, strict=True)
        ]
        run_pieces(runtime, copies, [rows.size for _, rows in new], [s.spec.record_bytes for s, _ in new])
    except BaseException:
        for (shards, _), slots in zip(new, reserved, strict=False):
            shards.overlay.unreserve(slots)
        raise
    for i, (shards, rows) in enumerate(new):
        shards.overlay.publish(rows, reserved[i])
        shards.totals.rows_copied += rows.size
        places[i][in_files[i]] = reserved[i]
    return places


def _make_room(runtime: Runtime, batches: Sequence[tuple[Shards, Int64Array]]) -> None:
    budget = runtime.budget
    if budget.has_room(sum(rows.size * shards.overlay.row_bytes for shards, rows in batches)):
        return  # spares the counting
    for shards, rows in batches:
        shards.overlay.touch(rows)
    budget.make_room(
        sum(shards.overlay.count_new(rows) * shards.overlay.row_bytes for shards, rows in batches)
    )


def _work(change: Change, places: Int64Array) -> Callable[[int, int], None]:
    """Return the function that changes the distinct rows ``start:stop`` of a batch, which lie in slots."""
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
    """How many rows of each of several tables are looked for in memory, at 2 us each."""
    return max(SAMPLES // 4, SAMPLES // tables) if tables else 0


def _row_bytes(shards: Shards, column: str, ids: Int64Array) -> int:
    """Return what it costs to look up a row of a batch, as bytes that are copied."""
    first, last = shards.spec.columns[column]
    copied = max(4 * (last - first), MIN_ROW_BYTES)
    if ids.size * copied * DRAWN_WORK < 2 * plan.TASK_BYTES:  # one task in any case
        return copied
    return round(copied * (1 + (DRAWN_WORK - 1) * shards.share_drawn(column, ids, SAMPLES)))


def _read_ahead(runtime: Runtime, batches: Sequence[tuple[Shards, Int64Array]]) -> None:
    """Ask for the pages of ascending rows."""
    asks = [partial(shards.read_ahead, rows) for shards, rows in batches]
    # A row costs a system call and a page, however short it is.
    run_pieces(runtime, asks, [rows.size for _, rows in batches], [PAGE] * len(batches))


def run_pieces(
    runtime: Runtime,
    functions: Sequence[Callable[[int, int], None]],
    lengths: Sequence[int],
    row_bytes: Sequence[int],
) -> None:
    """Call each function for all of a range of that length, piece by piece in balanced tasks."""

    def run(pieces: list[Piece]) -> None:
        for which, start, stop in pieces:
            functions[which](start, stop)

    scheduler.run([partial(run, task) for task in _cut(runtime, lengths, row_bytes)], runtime.threads)


def run_concurrently(runtime: Runtime, functions: Sequence[Callable[[], None]]) -> None:
    """Call functions on as many threads as a batch may use, and one more, as one waits for the disk meanwhile."""
    scheduler.run(functions, runtime.threads + 1 if runtime.threads > 1 else 1)


def _cut(runtime: Runtime, lengths: Sequence[int], row_bytes: Sequence[int]) -> list[list[Piece]]:
    nbytes = sum(map(mul, lengths, row_bytes))
    return plan.cut(lengths, plan.num_tasks(nbytes, runtime.threads))
