"""How a batch runs: from checked ids to kernels, for one table or several together.

::

    read     (if cold: group by row, request all pages) -> cut into tasks -> gather
    change   group by row -> (if cold: request all pages) -> copy new rows into slots
             -> cut into tasks, each row in one of them -> step

A row that is overwritten whole is not copied first, and nothing of it is read: its slot is filled with the new record
before the index leads to it. Most of many consecutive rows that were never written take no slots; see ``filling.py``.

The caller has checked all arguments, so nothing here refuses them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardemb.base.interrupts import signals_deferred
from shardemb.base.sizes import MAX_COUNT, PAGE
from shardemb.compute import plan, row_kernels, scheduler
from shardemb.engine import filling
from shardemb.engine.planned import Change, Read, Reading, Target, norm_of
from shardemb.engine.shards import PAGED_ROWS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.compute.plan import Piece
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.engine.training import Scaling
    from shardemb.format.fill_records import Fill
    from shardemb.optim import Optimizer
    from shardemb.precision.records import TakeStep

SAMPLES = 32
"""Rows of a batch whose pages are searched in memory, to decide whether it is cold."""

MIN_ROW_BYTES = 128
"""The least cost of a lookup of one row, however short it is: two cache lines, its own and one of the index."""

DRAWN_WORK = 3
"""Time to draw a row's initial values, in times of copying a row: it was measured as 1.4 (uniform) to 2.8 (normal)."""

PREFETCH_ROWS = 4096
"""Rows that a prefetch copies into slots each time that it holds the lock."""

PREFETCH_SAMPLES = 256
"""Rows whose pages a prefetch searches in memory: it notices one row in a hundred that is not there nine times in ten.

To request the pages of all rows took half of the time of a prefetch of rows that are in memory.
"""


class Loading(NamedTuple):
    """Ascending rows of a table that are to be in slots.

    Where they are overwritten whole, `values` has their new records, that of row ``i`` at ``positions[i]``.
    """

    shards: Shards
    rows: Int64Array
    values: NDArray[Any] | None = None
    positions: Int64Array | None = None

    def part(self, which: NDArray[np.bool_]) -> Loading:
        """Return the same for some of the rows."""
        positions = None if self.positions is None else self.positions[which]
        return Loading(self.shards, self.rows[which], self.values, positions)


class Loaded:
    """Rows in slots.

    Attributes
    ----------
    shards : Shards
    places : ndarray of int64
        The place of each row; valid only as long as the caller holds the store's lock.
    unpublished : tuple of two ndarrays of int64
        Rows that are overwritten whole, and the places of new slots with their new records; no lookup knows of these.
    """

    def __init__(
        self, shards: Shards, places: Int64Array, unpublished: tuple[Int64Array, Int64Array]
    ) -> None:
        self.shards, self.places, self.unpublished = shards, places, unpublished

    @property
    def are_new(self) -> bool:
        """Whether all of the rows have their new records already."""
        return self.unpublished[0].size == self.places.size

    def mark_changed(self) -> None:
        """Mark all of the rows as changed, and let lookups find the new records."""
        self.shards.overlay.mark_changed(self.places)
        if self.unpublished[0].size:
            self.shards.overlay.replace(*self.unpublished)
            self.unpublished = _NO_ROWS, _NO_ROWS

    def abandon(self) -> None:
        """Free the slots that no lookup knows of."""
        self.shards.overlay.unreserve(self.unpublished[1])


_NO_ROWS = np.empty(0, np.int64)


def read(runtime: Runtime, reads: Sequence[Reading]) -> None:
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
    runtime.steadily(partial(_without_lock, runtime, reads, _gather))
    runtime.check_fresh()  # a new writer may have changed the files while they were read
    for each in reads:
        each.shards.totals.add_lookup(each.ids.size)


def count_tasks(runtime: Runtime, shards: Shards, ids: Int64Array) -> int:
    """Count the tasks that a lookup of weights is cut into."""
    return len(_cut(runtime, [ids.size], [_row_bytes(shards, "weight", ids)]))


def read_here(runtime: Runtime, table: Target, column: str, form: str, ids: Int64Array) -> NDArray[Any]:
    """Copy a column of ascending rows, all in the calling thread: this may be called from a task."""
    shards = table.live()
    width, dtype = shards.codec.shape_of(column, form)
    out = np.empty((ids.size, width), dtype)
    into = out if form == "float32" else out.view(np.uint8)
    reads = [Read(table, shards, column, ids, into, form)]
    runtime.steadily(partial(_without_lock, runtime, reads, _gather_here))
    return out


def request(table: Target, ids: Int64Array) -> None:
    """Request the pages of ascending rows, if they are not in memory; the kernel reads them in the background."""
    shards = table.live()
    if shards.is_cold(ids, SAMPLES):
        shards.read_ahead(ids, 0, ids.size)


def _without_lock(
    runtime: Runtime, reads: Sequence[Reading], gather: Callable[[Runtime, Sequence[Reading]], None]
) -> None:
    """Gather without the lock; if rows are spilled or leave their slots meanwhile, start over under the lock.

    Under the lock nothing moves rows, so the second attempt is always right. A table that got other memory meanwhile is
    read again from that: the two may share files, and only the version of the new one tells what is written to them.
    """
    while None not in (versions := [each.shards.overlay.version for each in reads]):
        gather(runtime, reads)
        if [each.shards.overlay.version for each in reads] != versions:
            break
        if all(each.table.memory is each.shards for each in reads):  # nearly always
            return
        renewed = [each.renewed() for each in reads]
        if all(new is old for new, old in zip(renewed, reads, strict=True)):
            return
        reads = renewed
    for each in reads:
        _gather_paged(runtime, each)


def _gather(runtime: Runtime, reads: Sequence[Reading]) -> None:
    samples = _samples(len(reads))
    cold = [each for each in reads if each.shards.is_cold(each.ids, samples)]
    if not cold:
        _gather_all(runtime, reads)
        return
    for each in cold:
        each.shards.totals.add_cold()
    with runtime.warming.batch_reads([each.shards for each in cold]):
        _read_ahead(runtime, [(c.shards, plan.group(c.ids, c.shards.spec.num_embeddings).rows) for c in cold])
        _gather_all(runtime, reads)


def _gather_all(runtime: Runtime, reads: Sequence[Reading]) -> None:
    run_pieces(
        runtime,
        [read.gather for read in reads],
        [read.ids.size for read in reads],
        [_row_bytes(read.shards, read.column, read.ids) for read in reads],
    )


def _gather_here(runtime: Runtime, reads: Sequence[Reading]) -> None:
    for read in reads:
        if read.shards.is_cold(read.ids, SAMPLES):
            read.shards.read_ahead(read.ids, 0, read.ids.size)
        read.gather(0, read.ids.size)


def _gather_paged(runtime: Runtime, read: Reading) -> None:
    """Gather under the lock, part by part, and reload the spilled rows of each part first.

    So a lookup exceeds the memory budget by one part at most, and others get the lock between parts.
    """
    for start in range(0, read.ids.size, PAGED_ROWS):
        stop = min(start + PAGED_ROWS, read.ids.size)
        rows = np.unique(read.ids[start:stop])
        with runtime.lock:
            runtime.check_open()
            while True:
                read = read.renewed()
                overlay = read.shards.overlay
                if spilled := overlay.count_spilled(rows):
                    # This may release the lock, and then the table may get other memory, so look once more.
                    runtime.budget.make_room(spilled * overlay.row_bytes)
                if read.renewed() is read:
                    break
            shards = read.shards
            with signals_deferred():
                shards.overlay.reload(rows)
            if shards.is_cold(rows, SAMPLES):
                shards.read_ahead(rows, 0, rows.size)
            read.gather_part(start, stop)


def change(runtime: Runtime, changes: Sequence[Change], scaling: Scaling | None = None) -> float | None:
    """Carry out changes of one or several tables, together: all of them or none.

    With a `scaling`, return the norm of all gradients; if it is not finite, nothing was changed.

    Each distinct row belongs to one task. Until `_carry_out` marks the rows as changed, anything may fail, and nothing
    has changed; after that, nothing is expected to fail.

    Raises
    ------
    StoreClosedError, ReadOnlyError, PoisonedError
        The store cannot be changed.
    ShardEmbError
        The table lost rows or its optimizer after the change was checked.
    FrozenRowError, LearningRateError, ValueError
        A row is frozen; the learning rate is not known; the norm of the gradients is not finite, and it has to be.
    DiskFullError, OSError
        There is no space for the rows.
    """
    with runtime.changing():
        planned = _with_room(runtime, changes)
        runtime.check_sound()
        changes, fillings = [each.rest for each in planned], [each.filling for each in planned if each.fills]
        norm = None
        if scaling is not None:
            norm = norm_of(changes, scaling, partial(run_pieces, runtime))
            if not math.isfinite(norm):
                return norm
            changes = [replace(each, factor=scaling.factor(norm)) for each in changes]
        loaded: list[Loaded] = []
        try:
            load(
                runtime,
                [_loading(each, one.shards) for each, one in zip(changes, planned, strict=True)],
                loaded,
            )
            _keep(runtime, changes, loaded)
            with filling.written(runtime, fillings):
                _carry_out(runtime, changes, loaded, fillings)
        except BaseException:  # also Ctrl-C, which takes effect at the end of `load`
            for loading in loaded:
                loading.abandon()
            raise
        return norm


def _keep(runtime: Runtime, changes: Sequence[Change], loaded: Sequence[Loaded]) -> None:
    """Keep the records of rows that are about to change, where a commit under way still needs them."""
    for each, rows in zip(changes, loaded, strict=True):
        shards = rows.shards
        if shards.frozen is None:
            continue

        def run(function: Callable[[int, int], None], count: int, shards: Shards = shards) -> None:
            run_pieces(runtime, [function], [count], [shards.spec.record_bytes])

        with signals_deferred():  # an interrupt half way would lose some
            shards.frozen.keep(each.batch.rows, rows.places, runtime.outputs.empty, run)


def _loading(change: Change, shards: Shards) -> Loading:
    positions = change.overwritten(shards)
    return Loading(shards, change.batch.rows, None if positions is None else change.values, positions)


def _carry_out(
    runtime: Runtime, changes: Sequence[Change], loaded: Sequence[Loaded], fillings: Sequence[filling.Filling]
) -> None:
    """Change rows that are in slots."""
    work = [_work(*each) for each in zip(changes, loaded, strict=True)]

    def change_rows(pieces: list[Piece]) -> None:
        for piece in pieces:
            work[piece.which](*plan.align(changes[piece.which].batch, piece))

    pairs = list(zip(changes, loaded, strict=True))
    pieces = _cut(
        runtime,
        [0 if rows.are_new else each.batch.order.size for each, rows in pairs],
        [rows.shards.spec.record_bytes for rows in loaded],
    )
    tasks = [partial(change_rows, task) for task in pieces]
    with runtime.all_or_nothing("an update or write"):
        # Marked before they change: should the change fail half way, a rollback has to find all of its rows.
        for rows in loaded:
            rows.mark_changed()
        scheduler.run(tasks, runtime.threads)
        for each, rows in pairs:
            rows.shards.totals.changes += 1
            rows.shards.totals.rows_changed += each.batch.rows.size + filling.count_rows(
                rows.shards, fillings
            )
            each.table.training.step += each.takes_step


class _Planned(NamedTuple):
    """A change, what it fills in the memory that its table has now, and the change of the other rows."""

    change: Change
    shards: Shards
    fills: tuple[Fill, ...]
    rest: Change

    @classmethod
    def of(cls, change: Change, *, fills: bool) -> _Planned:
        """Plan a change; it fills nothing unless `fills`."""
        shards, grouped = change.table.live(), change.batch
        stale = (
            shards.spec.is_caught_up and change.table.training.step > 0
        )  # new records do not begin at step 0
        fills = fills and not change.takes_step and not stale
        found = filling.plan(shards, grouped.rows) if fills else ()
        if not found:
            return cls(change, shards, (), change)
        left = filling.left_over(grouped.rows, found, shards.spec.record_bytes)
        return cls(change, shards, found, replace(change, batch=grouped.part(left)))

    @property
    def filling(self) -> filling.Filling:
        """What it fills, and with what."""
        change, spec = self.change, self.shards.spec
        counts = None
        if spec.counters and change.values.shape[1] == spec.weight_width:
            counts = np.diff(change.batch.starts), change.table.training.step
        rows, positions = change.batch.rows, change.last_positions()
        return filling.Filling(self.shards, self.fills, rows, change.values, positions, counts)


def _with_room(runtime: Runtime, changes: Sequence[Change]) -> list[_Planned]:
    """Make room for changes, and plan them as they have to be now.

    To make room may release the lock. Other threads may then resize or drop a table, or take a key's row away. So
    nothing that was looked up before a wait is used after it: this begins again until nothing has changed meanwhile.
    """
    fills = len({id(each.table) for each in changes}) == len(
        changes
    )  # otherwise the order of changes matters
    while True:
        changes = [each.renewed() for each in changes]
        planned = [_Planned.of(each, fills=fills) for each in changes]
        _make_room(runtime, [(each.shards, each.rest.batch.rows) for each in planned])
        runtime.check_open()
        now = [_Planned.of(each.renewed(), fills=fills) for each in changes]
        if all(
            new.change is old.change and new.shards is old.shards and new.fills == old.fills
            for new, old in zip(now, planned, strict=True)
        ):
            return planned


def prefetch(runtime: Runtime, table: Target, rows: Int64Array, *, for_update: bool) -> None:
    """Read the pages of ascending rows; copy the rows into slots too if an update is to follow."""
    shards = table.memory
    if shards is None:
        return
    if rows.size <= PREFETCH_SAMPLES or shards.is_cold(rows, PREFETCH_SAMPLES):
        shards.read_ahead(rows, 0, rows.size)
    if not for_update:
        return
    for start in range(0, rows.size, PREFETCH_ROWS):
        with runtime.lock:  # each time for a moment, as nobody should wait for a prefetch
            if runtime.closed or table.memory is not shards:
                return  # the rows would be copied into memory that nobody looks at any more
            some = rows[start : start + PREFETCH_ROWS]
            if not runtime.budget.evict(shards.overlay.count_new(some) * shards.overlay.row_bytes):
                return  # the rows may never be used: not worth a fold, or spilling others
            load(runtime, [Loading(shards, some)], [])


def load(runtime: Runtime, wanted: Sequence[Loading], loaded: list[Loaded]) -> None:
    """Load rows of tables into slots, without making room for them. The caller holds the lock.

    What was loaded is appended to `loaded`, so that the caller has it even if Ctrl-C ends this call.

    Raises
    ------
    OSError
        There is no more memory, or spilled rows cannot be read.
    """
    with signals_deferred():  # an interrupt half way would leave the counts of slots wrong
        for each in wanted:
            if each.values is None:
                each.shards.overlay.reload(each.rows)
        places = [each.shards.overlay.places(each.rows) for each in wanted]
        new = [_have_no_slot(each, found) for found, each in zip(places, wanted, strict=True)]
        parts = [each.part(which) for each, which in zip(wanted, new, strict=True)]
        reserved = _fill_new_slots(runtime, parts)
        # Not before they are filled: a lookup without the lock reads a slot as soon as the index leads to it.
        for found, which, part, slots in zip(places, new, parts, reserved, strict=True):
            found[which] = slots
            if part.values is None:
                part.shards.overlay.publish(part.rows, slots)
                part.shards.totals.rows_copied += slots.size
        loaded.extend(
            Loaded(part.shards, found, (_NO_ROWS, _NO_ROWS) if part.values is None else (part.rows, slots))
            for found, part, slots in zip(places, parts, reserved, strict=True)
        )


def _have_no_slot(wanted: Loading, places: Int64Array) -> NDArray[np.bool_]:
    in_files: NDArray[np.bool_] = places == wanted.rows
    return in_files if wanted.values is None else in_files | (places < 0)  # only these may still be spilled


def _fill_new_slots(runtime: Runtime, parts: Sequence[Loading]) -> list[Int64Array]:
    """Reserve slots for rows that have none, and fill them; return their places."""
    samples = _samples(len(parts))
    cold = [
        (each.shards, each.rows)
        for each in parts
        if each.values is None and each.shards.is_cold(each.rows, samples)
    ]
    reserved: list[Int64Array] = []
    try:
        for each in parts:
            reserved.append(each.shards.overlay.reserve(each.rows))
        fill = [_fill(each, slots) for each, slots in zip(parts, reserved, strict=True)]
        sizes = [each.shards.spec.record_bytes for each in parts]
        with runtime.warming.batch_reads([shards for shards, _ in cold]):
            _read_ahead(runtime, cold)
            run_pieces(runtime, fill, [each.rows.size for each in parts], sizes)
    except BaseException:
        for each, slots in zip(parts, reserved, strict=False):
            each.shards.overlay.unreserve(slots)
        raise
    runtime.touch_ahead(each.shards.overlay for each in parts)
    return reserved


def _fill(part: Loading, slots: Int64Array) -> Callable[[int, int], None]:
    """Return the function that fills the slots ``start:stop``, with what the files hold or with new records."""
    if part.values is None or part.positions is None:
        return partial(part.shards.copy, part.rows, slots)
    each_once = np.arange(slots.size + 1)
    values = part.values.view(np.uint8)
    return partial(row_kernels.scatter, part.shards.bytes, slots, each_once, part.positions, values)


def _make_room(runtime: Runtime, batches: Sequence[tuple[Shards, Int64Array]]) -> None:
    """Make room for the rows of batches that are not in memory; the lock may be released meanwhile."""
    budget = runtime.budget
    if budget.has_room(
        sum(rows.size * (shards.overlay.row_bytes + shards.kept_row_bytes) for shards, rows in batches)
    ):
        return  # there is room even if all of them are new, so they need not be counted
    for shards, rows in batches:
        shards.overlay.mark_touched(rows)  # or those of the batch that are in memory could be evicted
    budget.make_room(
        sum(
            shards.overlay.count_new(rows) * shards.overlay.row_bytes + rows.size * shards.kept_row_bytes
            for shards, rows in batches
        )
    )


def _work(change: Change, rows: Loaded) -> Callable[[int, int], None]:
    """Return the function that changes the distinct rows ``start:stop`` of a batch, given their slots."""
    batch, values, training, shards, places = (
        change.batch,
        change.values,
        change.table.training,
        rows.shards,
        rows.places,
    )
    counts_writes = shards.spec.counters and values.shape[1] == shards.spec.weight_width

    def overwrite(start: int, stop: int) -> None:
        if shards.spec.is_caught_up and values.shape[1] != shards.spec.width:
            shards.catch_up(places, training.step, start, stop)
        new = values.view(np.uint8)
        row_kernels.scatter(shards.bytes, places, batch.starts, batch.order, new, start, stop)
        if counts_writes:
            _count_more(shards, places[start:stop], np.diff(batch.starts[start : stop + 1]))
            _counters(shards)[places[start:stop], -1] = training.step

    if not change.takes_step or training.optimizer is None:
        return overwrite
    take_step = _step(shards, training.optimizer, training.step + 1, change.factor)
    if change.row_gradients is None:
        return partial(take_step, batch, values, places)
    return partial(_take_summed_step, change, rows, take_step)


def _step(shards: Shards, optimizer: Optimizer, number: int, factor: float) -> TakeStep:
    """Return what takes the table's `number`-th step on distinct rows in slots."""
    if shards.spec.precision.is_coded:
        return shards.codec.step(optimizer, number, factor, shards.bytes)
    plain = factor == 1 and not optimizer.has_options
    kernel = row_kernels.step(type(optimizer), with_options=not plain)
    scalars = optimizer.scalars_of(number)
    options = optimizer.options_of(number, shards.spec.embedding_dim, factor)
    counting = number if shards.spec.counters else 0

    def take_step(
        grouped: plan.Grouped, values: Float32Array, slots: Int64Array, start: int, stop: int
    ) -> None:
        scratch = np.empty(values.shape[1], np.float32)
        if shards.spec.is_caught_up:
            shards.catch_up(slots, number, start, stop)
        rows = shards.records, slots, grouped.starts, grouped.order
        kernel(*rows, values, scalars, options, scratch, counting, start, stop)

    return take_step


def _take_summed_step(change: Change, rows: Loaded, take_step: TakeStep, start: int, stop: int) -> None:
    """Take a step with gradients that were summed before, a few rows at a time."""
    for some, gradients in change.summed(start, stop):
        count, places = len(gradients), rows.places[some]
        grouped = plan.each_once(change.batch.rows[some])
        take_step(grouped, gradients, places, 0, count)
        if rows.shards.spec.counters:  # the step has counted each row once
            _count_more(rows.shards, places, np.diff(change.batch.starts[some.start : some.stop + 1]) - 1)


def _count_more(shards: Shards, places: Int64Array, times: Int64Array) -> None:
    """Add to the counts of updates of distinct rows."""
    counters = _counters(shards)
    counters[places, -2] = np.minimum(counters[places, -2] + times, MAX_COUNT)


def _counters(shards: Shards) -> Float32Array:
    """Return the records as float32: what they count is float32, and last, whatever the rest is."""
    return shards.records.view(np.float32)


def _samples(tables: int) -> int:
    """Return how many rows of each of several tables to sample for `Shards.is_cold`, at 2 us each."""
    return max(SAMPLES // 4, SAMPLES // tables) if tables else 0


def _row_bytes(shards: Shards, column: str, ids: Int64Array) -> int:
    """Return the cost of looking up one row of a batch, as the bytes that could be copied in that time."""
    first, last = shards.spec.columns[column]
    copied = max(shards.spec.element.itemsize * (last - first), MIN_ROW_BYTES)
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
