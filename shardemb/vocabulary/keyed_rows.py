"""The rows of a table by key: what happens to keys without a row, and which keys are evicted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from shardemb.base import validation
from shardemb.base.arrays import as_array
from shardemb.engine import batch
from shardemb.engine.table_state import TableSource
from shardemb.errors import UnknownKeyError
from shardemb.format.spec import COUNT, LAST_STEP, MAX_ROWS, SHARD_BYTES, check_shape
from shardemb.vocabulary import keys
from shardemb.vocabulary.key_rows import read_steadily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import ArrayLike, NDArray

    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.engine.table_state import TableState
    from shardemb.vocabulary.key_rows import KeyRows
    from shardemb.vocabulary.keys import KeysLike

Missing: TypeAlias = 'Literal["error", "initial", "zeros"] | int'
"""What a lookup returns for a key without a row; see `KeyedTable.lookup`."""

MissingChange: TypeAlias = 'Literal["error", "skip"] | int'
"""What a change does with a key without a row; see `KeyedTable.update`."""

SCANNED_ROWS = 2**20
"""How many rows have their counters read in one step."""


class KeyedRows:
    """A table together with the vocabulary that assigns its rows. Users hold a `KeyedTable`, which has the contracts.

    Attributes
    ----------
    table : TableState
    keys : KeyRows
    """

    def __init__(self, table: TableState, key_rows: KeyRows) -> None:
        self.table = table
        self.keys = key_rows

    @property
    def num_rows(self) -> int:
        """Number of rows assigned so far, including those whose key was removed."""
        return self.keys.entry.rows

    def stats(self) -> dict[str, Any]:
        """Return what `KeyedTable.stats` returns."""
        counted = {} if COUNT not in self.table.spec.columns else {"updates": self._count_updates()}
        return self.table.stats() | {"vocabulary": self.keys.stats()} | counted

    # ---- reading

    def plan_read(self, column: str, given: KeysLike) -> batch.PlannedRead:
        """Check a lookup in which every key must have a row."""
        return self.table.plan_read(column, self._known(given))

    def read(
        self, given: KeysLike, *, missing: Missing, create: bool, out: NDArray[np.float32] | None
    ) -> Float32Array:
        """Copy the weights of keys; see `KeyedTable.lookup`."""
        missing = self._checked_missing(missing, "error", "initial", "zeros")
        steps = iter([partial(self.keys.add, approve=partial(self._require_output, out))] if create else [])

        def read() -> Float32Array:
            # Keys are added, and counted, once.
            ids = next(steps, self.keys.lookup)(given)
            return self._read(given, ids, missing, out)

        return read_steadily([self.keys], read)

    def _read(
        self, given: KeysLike, ids: Int64Array, missing: Missing, out: NDArray[np.float32] | None
    ) -> Float32Array:
        unknown = ids < 0
        if not unknown.any():
            return self.table.read("weight", ids, out)
        if missing == "error":
            self._refuse(given, ids)
        if not isinstance(missing, str):
            ids[unknown] = missing
            return self.table.read("weight", ids, out)
        rows = self.table.read("weight", np.maximum(ids, 0), out)
        rows[unknown] = 0 if missing == "zeros" else self._initial(given, unknown)
        return rows

    def read_state(self, column: str, given: KeysLike) -> Float32Array:
        """Copy a state column of keys."""
        return read_steadily([self.keys], lambda: self.table.read_state(column, self._known(given)))

    def prefetch(self, given: KeysLike, *, for_update: bool) -> None:
        """Start to read the rows of those keys that have one."""
        ids = self.keys.lookup(given)
        self.table.prefetch(ids[ids >= 0], for_update=for_update)

    def source(self) -> TableSource:
        """Return the rows that have keys, for exports."""
        from shardemb.io.arrow import RowKeys

        steadily = partial(read_steadily, [self.keys])
        row_keys = RowKeys(
            keys.arrow_type(self.keys.key_type), self.keys.arrow_keys, self.keys.key_bytes, steadily
        )
        return TableSource(self.table, self.num_rows, row_keys)

    # ---- changing

    def plan_change(
        self,
        given: KeysLike,
        values: ArrayLike,
        what: str,
        *,
        missing: MissingChange = "error",
        check_finite: bool,
    ) -> batch.Change:
        """Check an update or a write; see `TableState.plan_change`."""
        before = self.keys.reassigned
        change = self._plan_change(given, values, what, missing, check_finite)

        def renew() -> batch.Change | None:
            if self.keys.reassigned == before:
                return None
            return self.plan_change(given, values, what, missing=missing, check_finite=check_finite)

        return replace(change, renew=renew)

    def _plan_change(
        self,
        given: KeysLike,
        values: ArrayLike,
        what: str,
        missing: MissingChange,
        check_finite: bool,
    ) -> batch.Change:
        missing = self._checked_missing(missing, "error", "skip")
        ids = self.keys.lookup(given)
        unknown = ids < 0
        if unknown.any():
            if missing == "error":
                self._refuse(given, ids)
            if missing == "skip":
                name = self.table.name
                array = as_array(values, f"table {name!r}: {what}")
                shape = (*ids.shape, self.table.spec.embedding_dim)
                validation.rows(array, shape, what=what, table=name, check_finite=False)
                ids, values = ids[~unknown], array[~unknown]
            else:
                ids[unknown] = missing
        return self.table.plan_change(ids, values, what, check_finite=check_finite)

    def change(
        self,
        given: KeysLike,
        values: ArrayLike,
        what: str,
        *,
        missing: MissingChange,
        check_finite: bool,
    ) -> None:
        """Carry out an update or a write; see `plan_change`."""
        change = self.plan_change(given, values, what, missing=missing, check_finite=check_finite)
        batch.change(self.table.runtime, [change])

    def evict(self, *, older_than: int | None, keep: int | None, by: Literal["lru", "lfu"]) -> NDArray[Any]:
        """Remove the keys that are used least; return them. See `KeyedTable.evict`."""
        if COUNT not in self.table.spec.columns:
            msg = f"table {self.table.name!r} does not count updates: create it with counters=True"
            raise ValueError(msg)
        if (older_than is None) == (keep is None) or by not in ("lru", "lfu"):
            msg = (
                f'evict: pass either older_than or keep, and by="lru" or "lfu"; '
                f"got {older_than}, {keep} and {by!r}"
            )
            raise ValueError(msg)
        with self.keys.changing():
            if older_than is not None:
                oldest = self.table.training.step - validation.count(older_than, "older_than", minimum=0)
                rows = self._choose(LAST_STEP, lambda values: values <= oldest)
            else:
                rows = self._all_but(
                    validation.count(keep, "keep", minimum=0), LAST_STEP if by == "lru" else COUNT
                )
            found = self.keys.free_rows(rows)
        return keys.restored(found, self.keys.key_type)

    # ---- within

    def _checked_missing(self, missing: object, *words: str) -> Any:  # noqa: ANN401
        """Check what is done with keys without a row: one of `words`, or the id of one row that is used for them."""
        if isinstance(missing, str) and missing in words:
            return missing
        if isinstance(missing, bool) or not isinstance(missing, int | np.integer):
            msg = (
                f"table {self.table.name!r}: missing must be {', '.join(map(repr, words))} or one row id, "
                f"got {missing!r:.80}"
            )
            raise (ValueError if isinstance(missing, str) else TypeError)(msg)
        return int(validation.row_ids(missing, max(self.num_rows, 1), self.table.name).flat[0])

    def _require_output(self, out: NDArray[np.float32] | None, shape: tuple[int, ...]) -> None:
        """Refuse a lookup that would fail after keys were added for it."""
        self.table.live()
        if out is not None:
            validation.output(out, (*shape, self.table.spec.embedding_dim))

    def _known(self, given: KeysLike) -> Int64Array:
        ids = self.keys.lookup(given)
        if (ids < 0).any():
            self._refuse(given, ids)
        return ids

    def _refuse(self, given: KeysLike, ids: Int64Array) -> None:
        name, key_type = self.keys.entry.name, self.keys.key_type
        unknown = np.flatnonzero(ids.reshape(-1) < 0)
        checked = keys.checked(given, key_type, name)
        first = keys.restored(checked.take(unknown[:1]), key_type).tolist()[0]
        more = f" ({unknown.size} such keys)" if unknown.size > 1 else ""
        at = tuple(int(i) for i in np.unravel_index(int(unknown[0]), ids.shape))
        msg = (
            f"key {first!r:.100} at position {at[0] if len(at) == 1 else at} has no row in vocabulary "
            f"{name!r}{more}: say with missing= what such keys get, or add them with create=True"
        )
        raise UnknownKeyError(msg)

    def _initial(self, given: KeysLike, unknown: NDArray[np.bool_]) -> Float32Array:
        rows = self.keys.future_rows(given, np.flatnonzero(unknown.reshape(-1)))
        return self.table.live().initial_records(rows)[:, : self.table.spec.embedding_dim]

    def _scan(self, column: str) -> Iterator[tuple[Int64Array, Float32Array]]:
        """Iterate over the rows that have keys and their values of a column, in slices."""
        entry = self.keys.entry
        for start in range(entry.reserved, entry.rows, SCANNED_ROWS):
            rows = self.keys.live_rows(start, min(start + SCANNED_ROWS, entry.rows))
            yield rows, self.table.read_state(column, rows)

    def _choose(self, column: str, choose: Callable[[Float32Array], NDArray[np.bool_]]) -> Int64Array:
        chosen = [rows[choose(values)] for rows, values in self._scan(column)]
        return np.concatenate([np.empty(0, np.int64), *chosen])

    def _all_but(self, number: int, column: str) -> Int64Array:
        """List the rows that have keys, ascending, except the `number` of them with the largest counters."""
        scanned = list(self._scan(column))
        rows = np.concatenate([np.empty(0, np.int64), *(each for each, _ in scanned)])
        values = np.concatenate([np.empty(0, np.float32), *(each for _, each in scanned)])
        if number >= rows.size:
            return rows[:0]
        return np.sort(rows[np.argsort(-values, kind="stable")[number:]])

    def _count_updates(self) -> int:
        return int(sum(float(values.sum(dtype=np.float64)) for _, values in self._scan(COUNT)))


def first_shape(
    key_rows: KeyRows | None, num_embeddings: object, embedding_dim: object, rows_per_shard: int | None
) -> tuple[tuple[int, int], int | None]:
    """Check the shape of a new table. If a vocabulary makes it grow, choose how many rows it begins with: whole shards.

    Raises
    ------
    TypeError, ValueError
        A number is impossible, or not exactly one of rows and vocabulary is given.
    """
    if (key_rows is None) == (num_embeddings is None):
        msg = "pass either num_embeddings or the vocabulary that assigns the table's rows"
        raise ValueError(msg)
    if key_rows is None:
        return check_shape(num_embeddings, embedding_dim), rows_per_shard
    rows, dim = check_shape(max(1, key_rows.entry.rows), embedding_dim)
    if rows_per_shard is None:
        rows_per_shard = max(1, SHARD_BYTES[0] // (4 * dim))
    rows_per_shard = validation.count(rows_per_shard, "rows_per_shard", maximum=MAX_ROWS)
    return (-(-rows // rows_per_shard) * rows_per_shard, dim), rows_per_shard
