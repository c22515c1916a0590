"""The rows of a table by key: what happens to keys without a row, and which keys are evicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from shardemb.base import validation
from shardemb.engine import batch, planned
from shardemb.engine.training import NO_PADDING, Padding, Scaling, is_checked
from shardemb.errors import UnknownKeyError
from shardemb.format.spec import COUNT, LAST_STEP
from shardemb.table_source import TableSource
from shardemb.vocabulary import keys
from shardemb.vocabulary.key_rows import read_steadily

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from shardemb.base.progress import Progress
    from shardemb.base.validation import Float32Array, Int64Array
    from shardemb.engine.planned import Change, PlannedRead
    from shardemb.engine.runtime import Runtime
    from shardemb.engine.table_state import TableState
    from shardemb.vocabulary.key_rows import KeyRows
    from shardemb.vocabulary.keys import Keys, KeysLike

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

    def check_lookup(self, given: KeysLike, missing: Missing) -> Keys:
        """Check what a lookup is given, without looking anything up."""
        self.table.live()
        self.checked_missing(missing, "error", "initial", "zeros")
        return self.keys.checked(given)

    def finder(
        self, out: NDArray[Any] | None = None, form: str = "float32", *, create: bool
    ) -> Callable[[KeysLike], Int64Array]:
        """Return a function that finds the rows of keys, -1 for those that have none.

        If keys are to be created, its first call adds them, and counts them; no key is added if `out` is not right.
        """
        steps = iter(
            [partial(self.keys.add, approve=partial(self.require_output, out, form))] if create else []
        )

        def find(given: KeysLike) -> Int64Array:
            return next(steps, self.keys.lookup)(given)

        return find

    def plan_read(
        self,
        column: str,
        given: KeysLike,
        *,
        missing: Missing = "error",
        find: Callable[[KeysLike], Int64Array] | None = None,
        form: str = "float32",
    ) -> PlannedRead:
        """Check a lookup of keys that `find` finds the rows of, by default `KeyRows.lookup`."""
        missing = self.checked_missing(missing, "error", "initial", "zeros")
        ids = (find or self.keys.lookup)(given)
        unknown = ids < 0
        if not unknown.any():
            return self.table.plan_read(column, ids, form)
        if missing == "error":
            self.refuse(given, ids)
        if not isinstance(missing, str):
            ids[unknown] = missing
            return self.table.plan_read(column, ids, form)

        def replace_unknown(rows: NDArray[Any]) -> None:
            rows[unknown] = 0 if missing == "zeros" else self._initial(given, unknown, form)

        return self.table.plan_read(column, np.maximum(ids, 0), form).replacing(replace_unknown)

    def read(
        self, given: KeysLike, *, missing: Missing, create: bool, out: NDArray[Any] | None, dtype: object
    ) -> NDArray[Any]:
        """Copy the weights of keys; see `KeyedTable.lookup`."""
        form = self.table.form(dtype)
        find = self.finder(out, form, create=create)

        def read() -> NDArray[Any]:
            planned = self.plan_read("weight", given, missing=missing, find=find, form=form)
            return self.table.carry_out(planned, out)

        return read_steadily([self.keys], read)

    def read_unique(
        self, given: KeysLike, *, create: bool, dtype: object
    ) -> tuple[NDArray[Any], NDArray[Any], Int64Array]:
        """Copy the row of each distinct key once; see `KeyedTable.lookup_unique`."""
        self.table.form(dtype)
        find = self.finder(create=create)

        def read() -> tuple[NDArray[Any], NDArray[Any], Int64Array]:
            ids = self.known(given, find)
            rows, unique_ids, inverse = self.table.read_unique(ids, dtype)
            return rows, self.keys.keys_of(unique_ids), inverse

        return read_steadily([self.keys], read)

    def as_numpy(self, dtype: DTypeLike | None, *, copy: bool | None) -> NDArray[Any]:
        """Copy the rows that have keys, ascending; see `TableState.as_numpy`."""
        return read_steadily(
            [self.keys],
            lambda: self.table.as_numpy(
                self.keys.live_rows(self.keys.entry.reserved, self.num_rows), dtype, copy=copy
            ),
        )

    def read_state(self, column: str, given: KeysLike) -> Float32Array:
        """Copy a state column of keys."""
        return read_steadily([self.keys], lambda: self.table.read_state(column, self.known(given)))

    def prefetch(self, given: KeysLike, *, for_update: bool) -> None:
        """Start to read the rows of those keys that have one."""
        ids = self.keys.lookup(given)
        self.table.prefetch(ids[ids >= 0], for_update=for_update)

    def warm(self, given: KeysLike | None, progress: Progress) -> None:
        """Read the table into memory, or the rows of those keys that have one."""
        ids = None if given is None else self.keys.lookup(given)
        self.table.warm(None if ids is None else ids[ids >= 0], progress)

    def source(self, owner: object) -> TableSource:
        """Return the rows that have keys, for exports; see `TableSource`."""
        from shardemb.exports.selection import RowKeys

        row_keys = RowKeys(
            keys.arrow_type(self.keys.key_type),
            read=self.keys.arrow_keys,
            nbytes=self.keys.key_bytes,
            steadily=partial(read_steadily, [self.keys]),
            live=self.keys.live_rows,
            find=self.known,
        )
        return TableSource(self.table, owner, self.num_rows, row_keys)

    # ---- changing

    def check_change(
        self,
        given: KeysLike,
        values: ArrayLike,
        what: str,
        *,
        missing: MissingChange,
        create: bool,
        check_finite: bool,
    ) -> tuple[Keys, Float32Array]:
        """Check what a change is given, without looking anything up; return it checked."""
        self.checked_missing(missing, "error", "skip")
        checked = self.keys.checked(given)
        all_used = create and self.keys.entry.admission is None
        finite = check_finite and (missing != "skip" or all_used)  # what is skipped may be anything
        rows = self.table.check_values(values, checked.shape, what, check_finite=finite)
        return checked, rows.reshape(*checked.shape, rows.shape[1])

    def plan_change(
        self,
        given: KeysLike,
        values: ArrayLike,
        padding: Padding | None,
        *,
        missing: MissingChange = "error",
        create: bool = False,
        check_finite: bool,
    ) -> Change:
        """Check an update, or a write if there is no `padding`, and give new keys rows; see `TableState`."""
        what = "rows" if padding is None else "gradients"
        checked, rows = self.check_change(
            given, values, what, missing=missing, create=create, check_finite=check_finite
        )
        find, finite = self.finder(create=create), check_finite and missing == "skip"

        def plan() -> Change:
            ids, kept = self._rows_to_change(checked, rows, missing, find)
            if padding is None:
                return self.table.plan_change(ids, kept, what, check_finite=finite)
            return self.table.plan_update(ids, kept, self._by_row(padding), check_finite=finite)

        return self.renewing(plan)

    def _by_row(self, padding: Padding) -> Padding:
        """Return the same with the row of a key."""
        key = padding.padding_idx
        return padding if key is None else replace(padding, padding_idx=int(self.known([key])[0]))

    def _rows_to_change(
        self, given: Keys, rows: Float32Array, missing: MissingChange, find: Callable[[KeysLike], Int64Array]
    ) -> tuple[Int64Array, Float32Array]:
        """Return the ids of the rows that a change is for, and their values."""
        missing = self.checked_missing(missing, "error", "skip")
        ids = find(given)
        unknown = ids < 0
        if not unknown.any():
            return ids, rows
        if missing == "error":
            self.refuse(given, ids)
        if missing == "skip":
            return ids[~unknown], rows[~unknown]
        ids[unknown] = missing
        return ids, rows

    def change(
        self,
        given: KeysLike,
        values: ArrayLike,
        padding: Padding | None,
        *,
        missing: MissingChange,
        create: bool,
        scaling: Scaling | None = None,
        check_finite: bool,
    ) -> float | None:
        """Carry out an update or a write; see `plan_change` and `batch.change`."""
        finite = is_checked(scaling, check_finite=check_finite)
        change = self.plan_change(given, values, padding, missing=missing, create=create, check_finite=finite)
        return batch.change(self.table.runtime, [change], scaling)

    def reset(self, given: KeysLike) -> None:
        """Give the rows of keys their initial records again."""
        self.table.apply(self.renewing(lambda: self.table.plan_reset(np.unique(self.known(given)))))

    def copy_rows(self, source: KeysLike, target: KeysLike) -> None:
        """Overwrite the rows of keys by those of others; see `planned.plan_copy`."""
        self.table.apply(
            self.renewing(lambda: planned.plan_copy(self.table, self.known(source), self.known(target)))
        )

    def swap_rows(self, one: KeysLike, other: KeysLike) -> None:
        """Let the rows of keys change places; see `planned.plan_swap`."""
        self.table.apply(
            self.renewing(lambda: planned.plan_swap(self.table, self.known(one), self.known(other)))
        )

    def renewing(self, plan: Callable[[], Change]) -> Change:
        """Plan a change of rows of keys; it is planned again if a key gets another row before it begins."""
        before = self.keys.reassigned

        def renewable(change: Change) -> Change:
            def renew() -> Change | None:
                if self.keys.reassigned != before:
                    return self.renewing(plan)
                newer = change.renew() if change.renew else None
                return None if newer is None else renewable(newer)

            return replace(change, renew=renew)

        return renewable(plan())

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

    def checked_missing(self, missing: object, *words: str) -> Any:  # noqa: ANN401
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

    def require_output(self, out: NDArray[Any] | None, form: str, shape: tuple[int, ...]) -> None:
        """Refuse a lookup that would fail after keys were added for it."""
        width, dtype = self.table.live().codec.shape_of("weight", form)
        if out is not None:
            validation.output(out, (*shape, width), dtype)

    def known(self, given: KeysLike, find: Callable[[KeysLike], Int64Array] | None = None) -> Int64Array:
        """Return the rows of keys, all of which have one."""
        ids = (find or self.keys.lookup)(given)
        if (ids < 0).any():
            self.refuse(given, ids)
        return ids

    def refuse(self, given: KeysLike, ids: Int64Array) -> None:
        """Raise `UnknownKeyError` for the first key without a row."""
        name, key_type = self.keys.entry.name, self.keys.key_type
        unknown = np.flatnonzero(ids.reshape(-1) < 0)
        checked = self.keys.checked(given)
        first = keys.restored(checked.take(unknown[:1]), key_type).tolist()[0]
        more = f" ({unknown.size} such keys)" if unknown.size > 1 else ""
        at = tuple(int(i) for i in np.unravel_index(int(unknown[0]), ids.shape))
        msg = (
            f"key {first!r:.100} at position {at[0] if len(at) == 1 else at} has no row in vocabulary "
            f"{name!r}{more}: add them with create=True, or say with missing= what becomes of such keys"
        )
        raise UnknownKeyError(msg)

    def _initial(self, given: KeysLike, unknown: NDArray[np.bool_], form: str) -> NDArray[Any]:
        rows = self.keys.future_rows(given, np.flatnonzero(unknown.reshape(-1)))
        return self.table.live().initial_values(rows, form)

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


def read_many(
    runtime: Runtime,
    targets: Mapping[str, TableState | KeyedRows],
    ids: Mapping[str, KeysLike],
    *,
    missing: Missing,
    create: bool,
) -> dict[str, NDArray[Any]]:
    """Look up the weights of several tables together; see `Store.lookup`."""
    tables, keyed = by_kind(targets)
    # All of them are checked before the first key is added.
    plain = {name: table.plan_read("weight", ids[name], table.form(None)) for name, table in tables.items()}
    forms = {name: each.table.form(None) for name, each in keyed.items()}
    given = {name: each.check_lookup(ids[name], missing) for name, each in keyed.items()}
    find = {name: each.finder(create=create) for name, each in keyed.items()}

    def read() -> dict[str, NDArray[Any]]:
        wanted = plain | {
            name: each.plan_read("weight", given[name], missing=missing, find=find[name], form=forms[name])
            for name, each in keyed.items()
        }
        # One block of memory for all results: alone, each would take whole huge pages.
        results = runtime.outputs.empty_together([(each.shape, each.dtype) for each in wanted.values()])
        batch.read(runtime, [each.into(rows) for each, rows in zip(wanted.values(), results, strict=True)])
        found = dict(zip(wanted, results, strict=True))
        for name, each in wanted.items():
            each.finish(found[name])
        return {name: found[name] for name in targets}

    return read_steadily([each.keys for each in keyed.values()], read)


def check_changes(
    targets: Mapping[str, TableState | KeyedRows],
    batches: Mapping[str, tuple[KeysLike, ArrayLike]],
    *,
    missing: MissingChange | Mapping[str, MissingChange],
    create: bool,
    check_finite: bool,
) -> tuple[list[Change], list[Callable[[], Change]]]:
    """Check updates of several tables; see `Store.update`.

    Returns
    -------
    changes : list of Change
        Those of tables by row id.
    waiting : list of callable
        Each gives new keys of a table rows, and plans its change.
    """
    tables, keyed = by_kind(targets)
    changes = [table.plan_update(*batches[name], check_finite=check_finite) for name, table in tables.items()]
    waiting: list[Callable[[], Change]] = []
    for name, each in keyed.items():
        handled = missing_in(missing, name)
        given = each.check_change(
            *batches[name], "gradients", missing=handled, create=create, check_finite=check_finite
        )
        waiting.append(
            partial(
                each.plan_change,
                *given,
                NO_PADDING,
                missing=handled,
                create=create,
                check_finite=check_finite and handled == "skip",  # only those that are not skipped count
            )
        )
    return changes, waiting


def missing_in(missing: MissingChange | Mapping[str, MissingChange], table: str) -> MissingChange:
    """Return what a change of several tables does with keys without a row of one of them."""
    return missing.get(table, "error") if isinstance(missing, Mapping) else missing


def by_kind(
    targets: Mapping[str, TableState | KeyedRows],
) -> tuple[dict[str, TableState], dict[str, KeyedRows]]:
    """Divide tables into those used by row id and those used by key."""
    keyed = {name: each for name, each in targets.items() if isinstance(each, KeyedRows)}
    return {name: each for name, each in targets.items() if not isinstance(each, KeyedRows)}, keyed
