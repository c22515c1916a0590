"""How a batch runs: the way from checked ids to kernels, for one table or several at once.

::

    read     (cold: group by row, ask for all pages) -> cut into tasks -> gather
    change   group by row -> (cold: ask for all pages) -> cut into tasks, each row in one -> bring in, step

Everything here has been checked by the caller, so nothing is refused any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from shardemb import kernels, plan, scheduler
from shardemb.shards import PAGED_ROWS
from shardemb.spec import PAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from shardemb.arrays import Float32Array, Int64Array
    from shardemb.optim import Optimizer
    from shardemb.plan import Grouped, Piece
    from shardemb.runtime import Runtime
    from shardemb.shards import Shards

SAMPLES = 32
"""Rows of a batch that are looked for in memory, to tell whether it is cold."""

PREFETCH_ROWS = 4096
"""Rows whose pages a prefetch copies while it holds the lock once."""


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


@dataclass(frozen=True)
class Read:
    """A lookup in one table: ``out[i]`` becomes the column of row ``ids[i]``."""

    shards: Shards
    column: str
    ids: Int64Array
    out: Float32Array


@dataclass(frozen=True)
class Change:
    """A change of one table: gradients for a step of its optimizer; weights to overwrite where `training` is None."""

    shards: Shards
    batch: Grouped
    values: Float32Array
    training: Training | None


def read(runtime: Runtime, reads: Sequence[Read]) -> None:
    """Carry out lookups in one or several tables, together.

    Warm batches are gathered as they are: no sort, no system call a row. What is cold is grouped first, and the
    pages of *all* of it are asked for before the first is waited for: the disk sees as many requests as it can take.
    """
    runtime.check_fresh()
    _without_lock(runtime, reads, _gather)
    runtime.check_fresh()


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
    """Gather without the lock; again with it, where pages are out or went out meanwhile."""
    versions = [each.shards.pages.version for each in reads]
    if None not in versions:
        gather(runtime, reads)
        if [each.shards.pages.version for each in reads] == versions:
            return
    for each in reads:
        _gather_paged(runtime, each)


def _gather(runtime: Runtime, reads: Sequence[Read]) -> None:
    samples = _samples(len(reads))
    cold = [each for each in reads if each.shards.is_cold(each.ids, samples)]
    _read_ahead(runtime, [(c.shards, plan.group(c.ids, c.shards.spec.num_embeddings)) for c in cold])

    def gather(pieces: list[Piece]) -> None:
        for which, start, stop in pieces:
            read = reads[which]
            read.shards.gather(read.column, read.ids, read.out, start, stop)

    tasks = _cut(runtime, [read.ids.size for read in reads], [4 * read.out.shape[1] for read in reads])
    scheduler.run([partial(gather, task) for task in tasks], runtime.threads)


def _gather_range(runtime: Runtime, reads: Sequence[Read]) -> None:
    for read in reads:
        if read.shards.is_cold(read.ids, SAMPLES):
            read.shards.read_ahead(read.ids, 0, read.ids.size)
        read.shards.gather(read.column, read.ids, read.out, 0, read.ids.size)


def _gather_paged(runtime: Runtime, read: Read) -> None:
    """Bring pages back that are out, those of a part of the batch at a time."""
    shards = read.shards
    for start in range(0, read.ids.size, PAGED_ROWS):
        stop = min(start + PAGED_ROWS, read.ids.size)
        rows = np.unique(read.ids[start:stop])
        with runtime.changing():
            runtime.room.make_room(shards.pages.count_out(rows))
            shards.pages.bring_back(rows, to_change=False)
            shards.gather(read.column, read.ids, read.out, start, stop)


def change(runtime: Runtime, changes: Sequence[Change]) -> None:
    """Carry out changes of one or several tables, together: all of them or none.

    Each distinct row belongs to one task. Up to the inner ``with`` anything may fail and nothing has changed; within
    it nothing can.
    """
    with runtime.changing():
        _make_room(runtime, changes)
        runtime.check_open()  # others may have come while it waited
        runtime.check_sound()
        for each in changes:
            each.shards.pages.bring_back(each.batch.rows, to_change=True)
        samples = _samples(len(changes))
        _read_ahead(
            runtime, [(c.shards, c.batch) for c in changes if c.shards.is_cold(c.batch.rows, samples)]
        )
        work = [_work(change) for change in changes]

        def change_rows(pieces: list[Piece]) -> None:
            for piece in pieces:
                work[piece.which](*plan.align(changes[piece.which].batch, piece))

        pieces = _cut(
            runtime, [c.batch.order.size for c in changes], [c.shards.spec.record_bytes for c in changes]
        )
        tasks = [partial(change_rows, task) for task in pieces]
        with runtime.all_or_nothing("an update or write"):
            for each in changes:
                each.shards.mark(each.batch.rows)
            scheduler.run(tasks, runtime.threads)
            for each in changes:
                if each.training is not None:
                    each.training.step += 1


def prefetch(runtime: Runtime, shards: Shards, rows: Int64Array, *, for_update: bool) -> None:
    """Read the pages of ascending rows, and copy them where an update is to come."""
    shards.read_ahead(rows, 0, rows.size)
    if not for_update:
        return
    for start in range(0, rows.size, PREFETCH_ROWS):
        with runtime.lock:  # for a moment at a time
            if runtime.closed:
                return
            pages, some = shards.pages, rows[start : start + PREFETCH_ROWS]
            runtime.room.make_room(pages.count_new(some))
            if not runtime.closed:
                pages.copy(some)


def _make_room(runtime: Runtime, changes: Sequence[Change]) -> None:
    batches = [(each.shards.pages, each.batch.rows) for each in changes]
    if not runtime.room.has_room(sum(pages.at_most(rows) for pages, rows in batches)):  # spares the counting
        runtime.room.make_room(sum(pages.count_new(rows) for pages, rows in batches))


def _work(change: Change) -> Callable[[int, int], None]:
    """Return the function that changes the distinct rows ``start:stop`` of a batch."""
    shards, batch, values = change.shards, change.batch, change.values

    def overwrite(start: int, stop: int) -> None:
        shards.bring_in(batch.rows, start, stop)
        kernels.scatter(shards.records, batch.rows, batch.starts, batch.order, values, start, stop)

    if change.training is None or change.training.optimizer is None:
        return overwrite
    step = kernels.step(type(change.training.optimizer))
    scalars = np.array(change.training.optimizer.scalars(change.training.step + 1), np.float32)

    def take_step(start: int, stop: int) -> None:
        scratch = np.empty(values.shape[1], np.float32)
        shards.bring_in(batch.rows, start, stop)
        step(shards.records, batch.rows, batch.starts, batch.order, values, scalars, scratch, start, stop)

    return take_step


def _samples(tables: int) -> int:
    """How many rows of each of several tables are looked for in memory, at 2 us each."""
    return max(SAMPLES // 4, SAMPLES // tables) if tables else 0


def _read_ahead(runtime: Runtime, batches: Sequence[tuple[Shards, Grouped]]) -> None:
    if not batches:
        return

    def ask(pieces: list[Piece]) -> None:
        for which, start, stop in pieces:
            shards, batch = batches[which]
            shards.read_ahead(batch.rows, start, stop)

    # A row costs a system call and a page, however short it is.
    tasks = _cut(runtime, [b.rows.size for _, b in batches], [PAGE] * len(batches))
    scheduler.run([partial(ask, task) for task in tasks], runtime.threads)


def _cut(runtime: Runtime, lengths: Sequence[int], row_bytes: Sequence[int]) -> list[list[Piece]]:
    nbytes = sum(length * width for length, width in zip(lengths, row_bytes, strict=True))
    return plan.cut(lengths, plan.num_tasks(nbytes, runtime.threads))
