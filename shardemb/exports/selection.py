"""Which rows of what are exported: the source as exports see it, what a caller asks for, and the rows that this is.

All formats share this, so a new way to choose rows is one more field of `Query`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np

from shardemb.base import validation
from shardemb.base.arrays import as_array

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    import pyarrow as pa
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

T = TypeVar("T")

SCANNED_ROWS = 2**20
"""How many rows have a counter, or whether they have a key, read in one step."""

LAST_STEP, COUNT = "last_step", "count"


class RowKeys(NamedTuple):
    """How to read the keys of rows, for sources that have keys.

    Attributes
    ----------
    kind : pyarrow.DataType
        Arrow's type of the keys.
    read : callable
        ``read(ids)`` returns which of these rows have a key, bool, shape (n,), and the keys of those.
    nbytes : callable
        ``nbytes(ids)`` returns how many bytes the key of each row has, int64, shape (n,), without reading the keys.
    steadily : callable
        ``steadily(function)`` returns what the function returns, and calls it again if a row has lost its key
        meanwhile: rows and keys that are read one after the other then belong together.
    live : callable
        ``live(start, stop)`` lists those of the rows ``[start, stop)`` that have a key, ascending.
    find : callable
        ``find(keys)`` returns the rows of keys; one without a row is a `KeyError`.
    """

    kind: pa.DataType
    read: Callable[[Int64Array], tuple[NDArray[np.bool_], pa.Array]]
    nbytes: Callable[[Int64Array], Int64Array]
    steadily: Callable[[Callable[[], Any]], Any]
    live: Callable[[int, int], Int64Array]
    find: Callable[[Any], Int64Array]


class RowSource(Protocol):
    """Rows to export, as a table offers them. If it has `keys`, rows without a key are left out.

    Attributes
    ----------
    form : str
        As what vectors are read for Arrow: ``"float32"``, ``"float16"``, or ``"raw"``, which is uint8.
    stored : str
        As what they are stored, if other programs have that dtype: a float type, or ``"raw"``; otherwise
        ``"float32"``.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    rows_per_shard: int
    threads: int
    keys: RowKeys | None
    form: str
    stored: str

    @property
    def columns(self) -> Mapping[str, int]:
        """The state columns, and how many values each has in a row."""

    @property
    def commit(self) -> int | None:
        """The number of the commit whose rows these are; None if some were changed after it."""

    def read_rows(self, start: int, stop: int, columns: Sequence[str]) -> list[NDArray[Any]]:
        """Read the vectors of rows ``[start, stop)``, then each state column. Safe from several threads.

        The arrays have shape (stop - start, width) and belong to the caller. State is float32; vectors are as `form`
        says.
        """

    def read_ids(self, ids: Int64Array, columns: Sequence[str] = ()) -> list[NDArray[Any]]:
        """Read the same of ascending rows. Safe from several threads."""

    def read_vectors(self, ids: Int64Array, form: str) -> NDArray[Any]:
        """Read the vectors of ascending rows as a float type, or ``"raw"``: as stored. Safe from several threads."""

    def read_column(self, column: str, ids: Int64Array) -> NDArray[np.float32]:
        """Read a state column with one number a row, of ascending rows. Safe from several threads."""

    def run(self, tasks: Sequence[Callable[[], T]], stop: threading.Event | None = None) -> list[T]:
        """Run tasks, `threads` of them concurrently; see `scheduler.run`."""

    def release_pages(self, start: int, stop: int) -> None:
        """Let the kernel reclaim the page cache of rows ``[start, stop)``. A hint."""

    def describe(self) -> Mapping[str, object]:
        """Return a few facts about the table, as JSON values."""


@dataclass(frozen=True)
class RowSet:
    """Rows, ascending, as runs of consecutive ones: a table of any size is one run.

    Attributes
    ----------
    starts, stops : ndarray of int64
        The first row of each run, and one past its last. No run is empty, and none begins where another ends.
    """

    starts: Int64Array
    stops: Int64Array

    @classmethod
    def of_range(cls, start: int, stop: int) -> RowSet:
        """Return the rows ``[start, stop)``."""
        return cls(*(np.array([row] if start < stop else [], np.int64) for row in (start, stop)))

    @classmethod
    def of_ids(cls, ids: Int64Array) -> RowSet:
        """Return rows given in any order.

        Examples
        --------
        >>> RowSet.of_ids(np.array([7, 3, 4, 3]))
        RowSet(starts=array([3, 7]), stops=array([5, 8]))
        """
        if not (np.diff(ids) > 0).all():
            ids = np.unique(ids)
        if not ids.size:
            return cls.of_range(0, 0)
        last = np.flatnonzero(np.diff(ids) != 1)
        return cls(ids[np.concatenate([[0], last + 1])], ids[np.concatenate([last, [ids.size - 1]])] + 1)

    @classmethod
    def of_mask(cls, mask: NDArray[np.bool_]) -> RowSet:
        """Return the rows for which a mask is true.

        Examples
        --------
        >>> RowSet.of_mask(np.array([True, False, True, True]))
        RowSet(starts=array([0, 2]), stops=array([1, 4]))
        """
        edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
        outer = [[0] if mask[:1].any() else [], edges, [mask.size] if mask[-1:].any() else []]
        edges = np.concatenate([np.asarray(each, np.int64) for each in outer])
        return cls(edges[::2], edges[1::2])

    @classmethod
    def joined(cls, pieces: Iterable[RowSet]) -> RowSet:
        """Return the rows of several sets, each of which begins after the one before."""
        some = list(pieces) or [cls.of_range(0, 0)]
        starts = np.concatenate([each.starts for each in some])
        stops = np.concatenate([each.stops for each in some])
        apart = starts[1:] != stops[:-1]
        ends = np.ones(starts.size, np.bool_)
        begins = ends.copy()
        begins[1:], ends[:-1] = apart, apart
        return cls(starts[begins], stops[ends])

    @cached_property
    def ends(self) -> Int64Array:
        """How many rows there are up to the end of each run."""
        return np.cumsum(self.stops - self.starts)

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        return int(self.ends[-1]) if self.ends.size else 0

    @property
    def span(self) -> tuple[int, int]:
        """The first row, and one past the last; ``(0, 0)`` without rows."""
        return (int(self.starts[0]), int(self.stops[-1])) if self.starts.size else (0, 0)

    @property
    def is_range(self) -> bool:
        """Whether all rows follow each other."""
        return self.starts.size < 2

    def ids(self, first: int, last: int) -> Int64Array:
        """List the rows number `first` to `last` - 1 of the set.

        Examples
        --------
        >>> RowSet.of_ids(np.array([3, 4, 7, 8])).ids(1, 3)
        array([4, 7])
        """
        low, high = np.searchsorted(self.ends, [first, last - 1], side="right")
        runs = slice(low, high + 1)
        begins = (self.ends - self.stops + self.starts)[runs]
        counts = np.minimum(self.ends[runs], last) - np.maximum(begins, first)
        found: Int64Array = np.arange(first, last) + np.repeat(self.starts[runs] - begins, counts)
        return found

    def __and__(self, other: RowSet) -> RowSet:
        """Return the rows that are in both.

        Examples
        --------
        >>> RowSet.of_range(2, 8) & RowSet.of_ids(np.array([1, 3, 4, 7, 9]))
        RowSet(starts=array([3, 7]), stops=array([5, 8]))
        """
        low = np.searchsorted(other.stops, self.starts, side="right")
        counts = np.searchsorted(other.starts, self.stops, side="left") - low
        mine = np.repeat(np.arange(counts.size), counts)
        theirs = np.arange(mine.size) + np.repeat(low - np.cumsum(counts) + counts, counts)
        return RowSet(
            np.maximum(self.starts[mine], other.starts[theirs]),
            np.minimum(self.stops[mine], other.stops[theirs]),
        )

    def at(self, places: Int64Array) -> Int64Array:
        """List the rows number `places` of the set."""
        runs = np.searchsorted(self.ends, places, side="right")
        return places - self.ends[runs] + self.stops[runs]

    def part(self, first: int, last: int) -> RowSet:
        """Return the rows number `first` to `last` - 1 of the set."""
        if first >= last:
            return RowSet.of_range(0, 0)
        start, end = self.at(np.array([first, last - 1])).tolist()
        return self & RowSet.of_range(start, end + 1)

    def blocks(self, most: int) -> Iterator[Int64Array]:
        """Iterate over the rows, at most so many at once."""
        for first in range(0, self.num_rows, most):
            yield self.ids(first, min(first + most, self.num_rows))


@dataclass(frozen=True)
class Query:
    """What a caller asks for: the rows for which everything that is given holds.

    Attributes
    ----------
    rows : (int, int), optional
        A half-open range of row ids.
    where : array_like, optional
        A bool for each row; or row ids, or keys where the source has some.
    changed_since : int, optional
        Only rows with a greater ``last_step``.
    among : ndarray of int64, optional
        Only these rows, ascending: those that are known to have changed, for example.
    removed : pyarrow.Array, optional
        Keys that are no longer there. They are listed beside the rows, whatever rows are asked for.
    """

    rows: tuple[int, int] | None = None
    where: Any = None
    changed_since: int | None = None
    among: Int64Array | None = None
    removed: pa.Array | None = None

    def of(self, source: RowSource) -> RowSet:
        """Find the rows in a source; those without a key may be among them.

        Raises
        ------
        TypeError, ValueError, RowIdError, UnknownKeyError
            The range, the mask, an id, a key or the step is invalid, or the source has no counters.
        """
        found = RowSet.of_range(*_checked_range(source, self.rows))
        if self.where is not None:
            found &= _those(source, self.where)
        if self.among is not None:
            found &= RowSet.of_ids(self.among)
        return found if self.changed_since is None else _changed(source, found, self.changed_since)


def with_keys(source: RowSource, rows: RowSet) -> RowSet:
    """Leave out the rows that have no key, in a source that has keys."""
    if source.keys is None:
        return rows
    start, stop = rows.span
    cuts = [(first, min(first + SCANNED_ROWS, stop)) for first in range(start, stop, SCANNED_ROWS)]
    return rows & RowSet.joined(RowSet.of_ids(source.keys.live(*each)) for each in cuts)


def most_frequent(source: RowSource, rows: RowSet, number: int) -> RowSet:
    """Return so many rows, those with the greatest ``count``; of equal ones the first."""
    if COUNT not in source.columns:
        raise _without_counters(source, "which rows are the most frequent")
    best, counts = np.empty(0, np.int64), np.empty(0, np.float32)
    for ids in rows.blocks(SCANNED_ROWS):
        candidates = np.concatenate([best, ids])
        counts = np.concatenate([counts, source.read_column(COUNT, ids)])
        kept = np.sort(np.argsort(-counts, kind="stable")[:number])
        best, counts = candidates[kept], counts[kept]
    return RowSet.of_ids(best)


def _checked_range(source: RowSource, rows: object) -> tuple[int, int]:
    if rows is None:
        return 0, source.num_embeddings
    # Only a tuple: range(2, 4) would unpack too, but mean rows 2 and 3.
    pair = isinstance(rows, tuple) and len(rows) == 2 and all(hasattr(row, "__index__") for row in rows)
    if not pair or not 0 <= rows[0] <= rows[1] <= source.num_embeddings:  # type: ignore[index]
        need = f"rows must be a tuple (start, stop), 0 <= start <= stop <= {source.num_embeddings}"
        msg = f"table {source.name!r}: {need}, got {rows!r}"
        raise ValueError(msg)
    return int(rows[0]), int(rows[1])  # type: ignore[index]


def _those(source: RowSource, where: Any) -> RowSet:  # noqa: ANN401
    """Return the rows of a mask, of row ids, or of keys."""
    is_list = isinstance(where, list | tuple)
    kind = type(where[0]) if is_list and where else getattr(where, "dtype", None)
    if kind is bool or str(kind).lower() in ("bool", "boolean"):
        mask = as_array(where, f"table {source.name!r}: where")
        if mask.shape != (source.num_embeddings,):
            msg = (
                f"table {source.name!r}: a mask of bool needs one for each of the {source.num_embeddings} rows, "
                f"got shape {mask.shape}"
            )
            raise ValueError(msg)
        return RowSet.of_mask(mask)
    if source.keys is not None:
        return RowSet.of_ids(source.keys.find(where).reshape(-1))
    return RowSet.of_ids(validation.row_ids(where, source.num_embeddings, source.name).flat)


def _changed(source: RowSource, rows: RowSet, step: object) -> RowSet:
    """Leave out the rows that were last updated at a step or before it."""
    step = validation.count(step, "changed_since", minimum=0)
    if LAST_STEP not in source.columns:
        raise _without_counters(source, f"which rows changed since step {step}")

    def changed(ids: Int64Array) -> RowSet:
        return RowSet.of_ids(ids[source.read_column(LAST_STEP, ids) > step])

    pieces: list[RowSet] = []
    blocks = rows.blocks(SCANNED_ROWS)
    while some := [ids for _, ids in zip(range(source.threads), blocks, strict=False)]:
        pieces += source.run([partial(changed, ids) for ids in some])
    return RowSet.joined(pieces)


def _without_counters(source: RowSource, what: str) -> ValueError:
    return ValueError(
        f"table {source.name!r} has no counters, so it does not know {what}: create tables with "
        f"create_table(..., counters=True), which counts updates of each row; write() copies rows into such a table"
    )
