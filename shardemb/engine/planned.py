"""Checked lookups and changes of one table each, of which batches are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from shardemb import dtypes
from shardemb.base import validation
from shardemb.base.arrays import as_array
from shardemb.compute import plan, row_kernels
from shardemb.errors import FrozenRowError, ShardEmbError
from shardemb.format import ranges
from shardemb.format.spec import COUNTERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.compute.plan import Grouped
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.shards import Shards
    from shardemb.engine.training import Scaling, Training


SCRATCH_BYTES = 2**18
"""Memory for rows that are copied or computed on the way to a result: it stays in the processor's caches."""


def few_rows(start: int, stop: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut a range of rows into ranges of so few that they fit into `SCRATCH_BYTES`, or of one."""
    step = max(1, SCRATCH_BYTES // (4 * width))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


class Target(Protocol):
    """A table as a batch sees it. Its memory is replaced when it is resized or resharded, and when that is undone."""

    training: Training

    @property
    def memory(self) -> Shards | None:
        """Its memory now; None once it is released."""

    def live(self) -> Shards:
        """Return its memory now.

        Raises
        ------
        StoreClosedError, TableNotFoundError
            The store was closed; the table was dropped.
        """


class PlannedRead(NamedTuple):
    """A checked lookup in one table, and the shape of its result.

    Where ids only stand in for rows that there are not, `replace` is called with the result and fills in what it is.
    """

    table: Target
    shards: Shards
    column: str
    ids: Int64Array
    shape: tuple[int, ...]
    form: str = "float32"
    dtype: np.dtype[Any] = np.dtype(np.float32)
    replace: Callable[[NDArray[Any]], None] | None = None

    def replacing(self, replace: Callable[[NDArray[Any]], None]) -> PlannedRead:
        """Return the same lookup, whose result `replace` completes."""
        return self._replace(replace=replace)

    def finish(self, result: NDArray[Any]) -> None:
        """Complete a result that has been read."""
        if self.replace is not None:
            self.replace(result)

    def into(self, result: NDArray[Any]) -> Read:
        """Add the array that the result goes to; it has that shape and is C-contiguous."""
        # To kernels, a subclass of ndarray such as memmap would be another type.
        flat = np.asarray(result).reshape(-1, self.shape[-1])
        if self.form != "float32":
            flat = flat.view(np.uint8)  # numba does not know all types
        return Read(self.table, self.shards, self.column, self.ids, flat, self.form)


class Reading(Protocol):
    """A lookup in one table as a batch carries it out, whatever becomes of the rows."""

    @property
    def table(self) -> Target:
        """The table."""

    @property
    def shards(self) -> Shards:
        """The memory that the ids were checked against."""

    @property
    def column(self) -> str:
        """What is read of each row."""

    @property
    def ids(self) -> Int64Array:
        """The rows."""

    def gather(self, start: int, stop: int) -> None:
        """Read for the positions ``start:stop`` of the ids; a task may do so beside others that have other positions.

        What must not be divided belongs to the positions that it begins at, so that pieces which cover all of the ids
        do all of the work.
        """

    def gather_part(self, start: int, stop: int) -> None:
        """Read the rows at positions ``start:stop``, neither more nor less; the parts follow one another."""

    def renewed(self) -> Reading:
        """Return the lookup in the memory that the table has now; itself if that is still the same."""


def memory_now(table: Target, shards: Shards, ids: Int64Array) -> Shards:
    """Return the memory in which to look up ids that were checked against `shards`: what the table has now."""
    now = table.memory
    if now is None or now is shards:
        return shards
    if ids.size and int(ids.max()) >= now.spec.num_embeddings:
        return shards  # the table lost rows: the lookup sees them as they were when it began
    return now


class Read(NamedTuple):
    """A lookup in one table: ``out[i]`` becomes the column of row ``ids[i]``. The ids were checked against `shards`.

    The form is the name of a float type, or ``"raw"``; unless it is float32, `out` is the bytes of the result.
    """

    table: Target
    shards: Shards
    column: str
    ids: Int64Array
    out: NDArray[Any]
    form: str = "float32"

    def gather(self, start: int, stop: int) -> None:
        """See `Reading`: rows do not depend on each other."""
        if self.form == "float32":
            self.shards.gather(self.column, self.ids, self.out, start, stop)
        else:
            self.shards.gather(self.column, self.ids, self.out, start, stop, self.form)

    def gather_part(self, start: int, stop: int) -> None:
        """See `Reading`."""
        self.gather(start, stop)

    def renewed(self) -> Read:
        """See `Reading`; a table that was converted is seen as it was when the lookup began."""
        now = memory_now(self.table, self.shards, self.ids)
        same = now is self.shards or now.spec.precision != self.shards.spec.precision
        return self if same else self._replace(shards=now)


@dataclass(frozen=True)
class Change:
    """A change of one table: gradients for a step of its optimizer, or weights to write.

    Attributes
    ----------
    table : Target
        Its memory is looked up when the change is carried out, and not before.
    batch : Grouped
        The rows.
    values : ndarray
        Gradients as float32, or weights as the elements that records of the table have. Weights may also be as wide as
        whole records.
    takes_step : bool
        Whether the optimizer takes a step with the gradients.
    factor : float
        The gradients are multiplied by this first.
    renew : callable, optional
        Returns the change as it has to be now, if what it was planned from has changed, otherwise None. It is called
        with the store's lock held, again after every wait.
    row_gradients : callable, optional
        Given if the gradient of a row is more than the sum of its `values`: ``row_gradients(out, start, stop)`` writes
        those of the distinct rows ``start:stop``, one after the other.
    """

    table: Target
    batch: Grouped
    values: NDArray[Any]
    takes_step: bool
    factor: float = 1.0
    renew: Callable[[], Change | None] | None = None
    row_gradients: Callable[[Float32Array, int, int], None] | None = None

    def overwritten(self, shards: Shards) -> Int64Array | None:
        """Where in `values` the new record of each row is; None if what the rows hold so far matters."""
        if self.takes_step or self.values.shape[1] != shards.spec.width:
            return None
        return self.last_positions()

    def summed(self, start: int, stop: int) -> Iterator[tuple[slice, Float32Array]]:
        """Iterate over the `row_gradients` of the distinct rows ``start:stop``, a few rows at a time."""
        assert self.row_gradients is not None
        dim = self.values.shape[1]
        for first, last in few_rows(start, stop, dim):
            gradients = np.empty((last - first, dim), np.float32)
            self.row_gradients(gradients, first, last)
            yield slice(first, last), gradients

    def last_positions(self) -> Int64Array:
        """Where in `values` each row is given last, which counts."""
        last: Int64Array = self.batch.order[self.batch.starts[1:] - 1]
        return last

    def renewed(self) -> Change:
        """Return the change as it has to be now; itself if nothing that it was planned from has changed.

        Raises
        ------
        StoreClosedError, TableNotFoundError
            The store was closed; the table was dropped.
        ShardEmbError
            The table does not have the rows or the optimizer any more.
        FrozenRowError
            It is an update of a frozen row.
        """
        change = (self.renew() if self.renew else None) or self
        require_rows(change.table, change.batch.rows, takes_step=change.takes_step)
        return change


def require_rows(table: Target, rows: Int64Array, *, takes_step: bool = False) -> Shards:
    """Return a table's memory, if it still has ascending rows that a change was planned for, and an optimizer.

    Raises
    ------
    StoreClosedError, TableNotFoundError
        The store was closed; the table was dropped.
    ShardEmbError
        The table does not have them any more.
    FrozenRowError
        One of them is frozen, and `takes_step`.
    """
    shards = table.live()
    if takes_step and (frozen := ranges.first_within(table.training.frozen, rows)) is not None:
        msg = (
            f"row {frozen} of the table in {shards.directory} is frozen, so it takes no gradients; leave them out, or "
            f"call unfreeze_rows({frozen}, {frozen + 1}); nothing was changed"
        )
        raise FrozenRowError(msg)
    gone = rows.size and rows[-1] >= shards.spec.num_embeddings
    if gone or (takes_step and table.training.optimizer is None):
        msg = (
            f"the table in {shards.directory} lost rows or its optimizer while this change waited; "
            f"nothing was changed"
        )
        raise ShardEmbError(msg)
    return shards


# ---- the norm of gradients ------------------------------------------------------------------------------------


def norm_of(changes: Sequence[Change], scaling: Scaling, run: Callable[..., None]) -> float:
    """Return the norm of all gradients, with `run` for work in pieces; refuse one that is not finite without a scale.

    Raises
    ------
    ValueError
        It is not finite, and the step cannot be skipped.
    """
    found = scaling.norm(_sum_squares(changes, run))
    if scaling.scale is None and not math.isfinite(found):
        way_out = " (with scale=1.0, such a step is skipped)"
        for each in changes:
            directory = each.table.live().directory
            validation.require_finite(each.values, f"gradients for the table in {directory}", way_out)
        msg = f"extra_norm_sq is {scaling.extra_norm_sq}, so gradients cannot be clipped{way_out}; nothing was changed"
        raise ValueError(msg)
    return found


def _sum_squares(changes: Sequence[Change], run: Callable[..., None]) -> float:
    """Add up the squares of all rows' gradients, in an order that does not depend on the tasks."""
    parts = [_Squares.of(each) for each in changes]
    pieces = [piece for part in parts for piece in part.pieces]
    run(*([piece[k] for piece in pieces] for k in range(3)))
    return math.fsum(part.total() for part in parts)


class _Squares(NamedTuple):
    """The squares of the gradients of one change: those of its positions, and those of rows that occur repeatedly.

    To sum the squares of the rows alone would have to wait for the positions, and read these in a random order.
    """

    change: Change
    repeated: Int64Array
    squares: NDArray[np.float64]
    sums: NDArray[np.float64]

    @classmethod
    def of(cls, change: Change) -> _Squares:
        """Make room for the squares of a change; where it has gradients of rows, only those count."""
        if change.row_gradients is not None:
            return cls(change, np.empty(0, np.int64), np.empty(0), np.empty(change.batch.rows.size))
        repeated = np.flatnonzero(np.diff(change.batch.starts) > 1)
        return cls(change, repeated, np.empty(len(change.values)), np.empty(repeated.size))

    @property
    def pieces(self) -> list[tuple[Callable[[int, int], None], int, int]]:
        """What has to be called, for how many rows, and the bytes of one."""
        change, row_bytes = self.change, 4 * self.change.values.shape[1]
        if change.row_gradients is not None:
            return [(self._sum_rows, self.sums.size, row_bytes)]
        grouped = change.batch
        what = grouped.starts, grouped.order, change.values, self.repeated, self.sums
        return [
            (partial(row_kernels.sum_squares, change.values, self.squares), self.squares.size, row_bytes),
            (partial(row_kernels.sum_squares_of_repeated, *what), self.sums.size, row_bytes),
        ]

    def _sum_rows(self, start: int, stop: int) -> None:
        for some, gradients in self.change.summed(start, stop):
            row_kernels.sum_squares(gradients, self.sums[some], 0, len(gradients))

    def total(self) -> float:
        """Return the sum of all of them, once the pieces were called."""
        total = float(self.sums.sum())
        if self.change.row_gradients is None:
            grouped = self.change.batch
            total += row_kernels.sum_of_single(grouped.starts, grouped.order, self.squares)
        return total


# ---- rows that move -------------------------------------------------------------------------------------------


class Moving(Target, Protocol):
    """A table as changes of whole records see it."""

    @property
    def name(self) -> str:
        """Its name, for messages."""

    def read(
        self, column: str, ids: ArrayLike, out: NDArray[Any] | None = None, form: str = "float32"
    ) -> NDArray[Any]:
        """Copy a column of rows."""


class Stepped(Moving, Protocol):
    """A table as a change of its step sees it."""

    runtime: Runtime

    def apply(self, change: Change) -> float | None:
        """Carry out a planned change."""


def records_of(table: Moving, rows: Int64Array) -> NDArray[Any]:
    """Copy whole records of rows, as they are at the table's step."""
    while True:
        spec = table.live().spec
        form = dtypes.RAW if spec.precision.is_coded else "float32"
        found = [table.read(column, rows, form=form) for column in spec.columns]
        if table.live().spec.precision == spec.precision:  # it may be converted meanwhile
            break
    records = np.zeros((rows.size, spec.width), spec.element)
    for (first, last), values in zip(spec.columns.values(), found, strict=True):
        records[:, first:last] = values
    if spec.is_caught_up:
        records[:, -1] = table.training.step
    return records


def catch_up(table: Moving, rows_at_once: int) -> Iterator[Change]:
    """Plan changes that bring all rows to the table's step, before the optimizer that says how changes."""
    count = table.live().spec.num_embeddings
    for start in range(0, count, rows_at_once):
        rows = np.arange(start, min(start + rows_at_once, count))
        yield Change(table, plan.each_once(rows), records_of(table, rows), takes_step=False)


def plan_copy(table: Moving, source: ArrayLike, target: ArrayLike) -> Change:
    """Plan to overwrite whole records of rows by those of others, all of which are read before any changes."""
    count = table.live().spec.num_embeddings
    read, changed = (validation.row_ids(ids, count, table.name) for ids in (source, target))
    if read.shape != changed.shape:
        msg = f"table {table.name!r}: {read.shape} rows cannot be copied to {changed.shape}; give as many of both"
        raise ValueError(msg)
    return _copying(table, read.flat, plan.group(changed.flat, count))


def _copying(table: Moving, source: Int64Array, target: Grouped) -> Change:
    require_rows(table, np.sort(source))
    records = records_of(table, source)

    def renew() -> Change | None:
        same = np.array_equal(records.view(np.uint8), records_of(table, source).view(np.uint8))
        return None if same else _copying(table, source, target)

    return Change(table, target, records, takes_step=False, renew=renew)


def plan_swap(table: Moving, one: ArrayLike, other: ArrayLike) -> Change:
    """Plan to let rows change places, each of them once."""
    count = table.live().spec.num_embeddings
    first, second = (validation.row_ids(ids, count, table.name) for ids in (one, other))
    joined = np.concatenate([first.flat, second.flat])
    distinct = np.unique(joined).size
    if first.shape != second.shape or distinct != joined.size:
        msg = (
            f"table {table.name!r}: rows change places in pairs, and each of them once; "
            f"got {first.flat.size} and {second.flat.size} ids, {distinct} of them different"
        )
        raise ValueError(msg)
    return plan_copy(table, joined, np.concatenate([second.flat, first.flat]))


# ---- state of optimizers from elsewhere -------------------------------------------------------------------------


def plan_state(
    table: Moving, ids: ArrayLike, state: Mapping[str, ArrayLike], *, check_finite: bool
) -> Change:
    """Plan to overwrite columns of the optimizer's state of rows; see `Table.write_state`."""
    spec = table.live().spec
    checked = validation.row_ids(ids, spec.num_embeddings, table.name)
    known = [name for name in spec.states if name not in COUNTERS]
    columns = {}
    for name, given in state.items():
        if name not in known:
            names = ", ".join(known) or "none"
            msg = f"table {table.name!r} has no state column {name!r} of an optimizer; it has {names}"
            raise ValueError(msg)
        values, shape = as_array(given, f"table {table.name!r}: {name}"), checked.shape
        if spec.is_row_wise(name):
            values, shape = values[..., np.newaxis], (*shape, 1)
        else:
            shape = (*shape, spec.embedding_dim)
        columns[name] = validation.rows(values, shape, what=name, table=table.name, check_finite=check_finite)
    return _stating(table, checked.flat, columns)


def _stating(table: Moving, rows: Int64Array, columns: dict[str, Float32Array]) -> Change:
    shards = require_rows(table, np.sort(rows))
    before = records_of(table, rows)
    records = before.copy()
    for name, values in columns.items():
        if shards.spec.precision.is_coded:
            shards.codec.put(records.view(np.uint8), name, values)
        else:
            first, last = shards.spec.columns[name]
            records[:, first:last] = values

    def renew() -> Change | None:
        same = np.array_equal(before.view(np.uint8), records_of(table, rows).view(np.uint8))
        return None if same else _stating(table, rows, columns)

    grouped = plan.group(rows, shards.spec.num_embeddings)
    return Change(table, grouped, records, takes_step=False, renew=renew)


def set_step(table: Stepped, step: int, rows_at_once: int) -> None:
    """Set the number of updates that a table has had; see `Table.set_step`."""
    number = validation.count(step, "step", minimum=0)
    with table.runtime.changing():
        spec = table.live().spec
        if spec.is_caught_up and number != table.training.step:
            # Rows are what they are now, at a step of another number.
            with table.runtime.all_or_nothing("a change of a table's step"):
                for change in catch_up(table, rows_at_once):
                    change.values[:, -1] = number
                    table.apply(change)
                table.training.step = number
        table.training.step = number
