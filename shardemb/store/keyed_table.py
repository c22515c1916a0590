"""A table that is used by keys: a vocabulary tells which rows they have, the caller what unknown ones get."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from shardemb import arrays, batch, keys, report, scheduler
from shardemb.errors import UnknownKeyError
from shardemb.spec import COUNT, LAST_STEP, MAX_ROWS, SHARD_BYTES, check_shape
from shardemb.table import Source

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from shardemb.arrays import Float32Array, Int64Array
    from shardemb.export import ExportReport
    from shardemb.initializers import Initializer
    from shardemb.keys import KeysLike
    from shardemb.optim import Optimizer
    from shardemb.progress import Progress
    from shardemb.table import Table
    from shardemb.vocabulary import Vocabulary

Missing: TypeAlias = 'Literal["error", "initial", "zeros"] | int'
"""What a lookup gives for a key that has no row; see `KeyedTable.lookup`."""

SCANNED_ROWS = 2**20
"""Rows whose counters are read at once."""


class KeyedTable:
    """Rows of float32 by key. Made by `Store.create_table` with a vocabulary, found by name.

    The vocabulary, which several tables may share, gives out rows; the table grows with it. `rows` is the same table by
    row id. Threads may do what they may do with a `Table`.

    Examples
    --------
    >>> import shardemb
    >>> store = shardemb.open(tmp / "model.zarr")
    >>> users = store.create_vocabulary("users", key_type="int64")
    >>> table = store.create_table(
    ...     "users", vocabulary="users", embedding_dim=2, optimizer=shardemb.optim.SGD(lr=0.5), counters=True
    ... )
    >>> table.lookup([1234567890123, -5], create=True)
    array([[0., 0.],
           [0., 0.]], dtype=float32)
    >>> table.update([-5], [[1.0, 2.0]])
    >>> table.lookup([-5, 99], missing="zeros")
    array([[-0.5, -1. ],
           [ 0. ,  0. ]], dtype=float32)
    >>> table
    KeyedTable 'users': 2 int64 keys x 2 float32, SGD(lr=0.5), step 1
    >>> commit = store.commit()
    >>> store.close()
    """

    def __init__(self, rows: Table, vocabulary: Vocabulary) -> None:
        self._rows = rows
        self._vocabulary = vocabulary

    # ---- what it is

    @property
    def rows(self) -> Table:
        """The same table by row id. It has more rows than were given out, so that it grows rarely."""
        return self._rows

    @property
    def vocabulary(self) -> Vocabulary:
        """What tells which key has which row."""
        return self._vocabulary

    @property
    def name(self) -> str:
        """Name of the table within its store."""
        return self._rows.name

    @property
    def num_embeddings(self) -> int:
        """Rows given out so far, those of no key by now included."""
        return self._vocabulary.num_rows

    @property
    def embedding_dim(self) -> int:
        """Number of values in a row's weight."""
        return self._rows.embedding_dim

    @property
    def shape(self) -> tuple[int, int]:
        """``(num_embeddings, embedding_dim)``."""
        return self.num_embeddings, self.embedding_dim

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer with its hyper-parameters, or None."""
        return self._rows.optimizer

    @property
    def initializer(self) -> Initializer:
        """What rows hold before they are first written."""
        return self._rows.initializer

    @property
    def step(self) -> int:
        """Number of updates so far."""
        return self._rows.step

    def __len__(self) -> int:
        return len(self._vocabulary)

    def __repr__(self) -> str:
        kind = f"{len(self):,} {self._vocabulary.key_type} keys"
        state = f"{self.optimizer or 'no optimizer'}, step {self.step}"
        return f"KeyedTable {self.name!r}: {kind} x {self.embedding_dim} float32, {state}"

    def stats(self) -> dict[str, Any]:
        """Tell what was done with the table and what it takes; see `Table.stats`.

        Returns
        -------
        dict
            That of `rows`, and ``vocabulary``, that of `Vocabulary.stats`; with counters also ``updates``, the sum of
            all counts.

        Examples
        --------
        >>> table.stats()["vocabulary"]["keys"]
        2
        """
        counted = {} if COUNT not in self._rows._spec.columns else {"updates": self._count_updates()}
        return self._rows.stats() | {"vocabulary": self._vocabulary.stats()} | counted

    # ---- reading

    def lookup(
        self,
        keys: KeysLike,
        *,
        missing: Missing = "error",
        create: bool = False,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Copy rows out of the table.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `Vocabulary.lookup`.
        missing : {"error", "initial", "zeros"} or int
            For keys that have no row: raise; the initial value of the row that the key would get; zeros; or what the
            row of this id holds, which may be reserved for that.
        create : bool
            Give new keys rows first, as `Vocabulary.add` does: what `missing` says is for those not admitted then.
        out : ndarray of float32, shape ``keys.shape + (embedding_dim,)``, optional
            As for `Table.lookup`.

        Returns
        -------
        ndarray of float32, shape ``keys.shape + (embedding_dim,)``
            The caller's own memory.

        Raises
        ------
        UnknownKeyError
            A key has no row.
        TypeError, ValueError, RowIdError, StoreClosedError, TableNotFoundError
            As `Vocabulary.lookup` and `Table.lookup`; with `create` also what `Vocabulary.add` raises.

        Examples
        --------
        >>> table.lookup([[-5], [7]], missing="initial").shape
        (2, 1, 2)
        """
        if isinstance(missing, str) and missing not in ("error", "initial", "zeros"):
            msg = f'missing must be "error", "initial", "zeros" or a row id, got {missing!r}'
            raise ValueError(msg)
        ids = self._vocabulary.add(keys) if create else self._vocabulary.lookup(keys)
        unknown = ids < 0
        if not unknown.any():
            return self._rows.lookup(ids, out=out)
        if missing == "error":
            self._refuse(keys, ids)
        if not isinstance(missing, str):
            ids[unknown] = arrays.row_ids(missing, max(self.num_embeddings, 1), self.name).flat[0]
            return self._rows.lookup(ids, out=out)
        rows = self._rows.lookup(np.maximum(ids, 0), out=out)
        rows[unknown] = 0 if missing == "zeros" else self._initial(keys, unknown)
        return rows

    def state(self, column: str, keys: KeysLike) -> NDArray[np.float32]:
        """Copy optimizer state, or counters, of rows; see `Table.state`.

        Raises
        ------
        UnknownKeyError
            A key has no row.
        TypeError, ValueError, StoreClosedError, TableNotFoundError
            As `lookup`.

        Examples
        --------
        >>> table.state("count", [-5])
        array([1.], dtype=float32)
        """
        return self._rows.state(column, self._known(keys))

    def prefetch(self, keys: KeysLike, *, for_update: bool = False) -> None:
        """Start to read the rows of keys that have one; see `Table.prefetch`.

        Examples
        --------
        >>> table.prefetch([-5, 99])
        """
        ids = self._vocabulary.lookup(keys)
        self._rows.prefetch(ids[ids >= 0], for_update=for_update)

    # ---- changing

    def update(
        self,
        keys: KeysLike,
        grads: ArrayLike,
        *,
        missing: Literal["error", "skip"] | int = "error",
        check_finite: bool = True,
    ) -> None:
        """Take one optimizer step on the rows of keys; see `Table.update`.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `lookup`.
        grads : array_like of float, shape ``keys.shape + (embedding_dim,)``
        missing : {"error", "skip"} or int
            For keys that have no row: raise; leave their gradients out; or take them as those of the row of this id.
        check_finite : bool
            Refuse NaN and infinity.

        Raises
        ------
        UnknownKeyError, TypeError, ValueError, RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError
            Nothing was changed.

        Examples
        --------
        >>> table.update([-5, 99], np.ones((2, 2), np.float32), missing="skip")
        """
        change = self._plan_change(keys, grads, "gradients", missing=missing, check_finite=check_finite)
        batch.change(self._rows._runtime, [change])

    def write(
        self,
        keys: KeysLike,
        rows: ArrayLike,
        *,
        missing: Literal["error", "skip"] | int = "error",
        check_finite: bool = True,
    ) -> None:
        """Overwrite the weights of keys that have rows; see `update` and `Table.write`.

        Examples
        --------
        >>> table.write([-5], [[1.0, 2.0]])
        """
        change = self._plan_change(keys, rows, "rows", missing=missing, check_finite=check_finite)
        batch.change(self._rows._runtime, [change])

    def evict(
        self, *, older_than: int | None = None, keep: int | None = None, by: Literal["lru", "lfu"] = "lru"
    ) -> NDArray[Any]:
        """Take rows away from keys that are of little use; other keys get them after the next commit.

        All tables of the vocabulary have these rows as new then. A row that was never updated is the oldest and the
        least frequent.

        Parameters
        ----------
        older_than : int, optional
            Those that were not updated in the last so many steps of this table.
        keep : int, optional
            All but so many.
        by : {"lru", "lfu"}
            Which are kept: those that were updated last, or most often. Of equal ones the lower row ids.

        Returns
        -------
        ndarray of int64, or of str or bytes objects, shape (n,)
            The keys that lost their rows, in the order of these.

        Raises
        ------
        ValueError
            The table has no counters; not exactly one of `older_than` and `keep`.
        ReadOnlyError, StoreClosedError, TableNotFoundError, DiskFullError
            Nothing was changed.

        Examples
        --------
        >>> table.evict(keep=1, by="lfu")
        array([1234567890123])
        """
        if COUNT not in self._rows._spec.columns:
            msg = f"table {self.name!r} does not count: give create_table counters=True"
            raise ValueError(msg)
        if (older_than is None) == (keep is None) or by not in ("lru", "lfu"):
            msg = (
                f'evict: give older_than or keep, and by "lru" or "lfu"; got {older_than}, {keep} and {by!r}'
            )
            raise ValueError(msg)
        with self._vocabulary._changing():
            if older_than is not None:
                oldest = self.step - arrays.count(older_than, "older_than", minimum=0)
                rows = self._choose(LAST_STEP, lambda values: values <= oldest)
            else:
                rows = self._all_but(
                    arrays.count(keep, "keep", minimum=0), LAST_STEP if by == "lru" else COUNT
                )
            found = self._vocabulary._free_rows(rows)
        return keys.restored(found, self._vocabulary.key_type)

    # ---- leaving

    def to_arrow_batches(
        self, *, columns: Sequence[str] = (), rows: tuple[int, int] | None = None
    ) -> pa.RecordBatchReader:
        """Stream the rows that have keys as Arrow record batches, in bounded memory; see `Table.to_arrow_batches`.

        Parameters
        ----------
        columns : sequence of str
            Optimizer state columns and counters to add.
        rows : tuple of two int, optional
            ``(start, stop)``, a half-open range of row ids; all rows by default.

        Returns
        -------
        pyarrow.RecordBatchReader
            ``id: int64``, ``key`` (int64, large_string or large_binary), ``embedding: FixedSizeList<float32>``, then
            the other columns, in the order of the rows.

        Raises
        ------
        ValueError, StoreClosedError, TableNotFoundError
            As `Table.to_arrow_batches`.

        Examples
        --------
        >>> table.to_arrow_batches(columns=["count"]).read_all().column_names
        ['id', 'key', 'embedding', 'count']
        """
        from shardemb import export

        runtime = self._rows._runtime
        self._rows._live()
        run = partial(scheduler.run, threads=runtime.threads)
        return export.to_arrow_batches(
            _Source(self), columns=columns, rows=rows, run=run, workers=runtime.threads
        )

    def export_parquet(
        self,
        path: str | os.PathLike[str],
        *,
        columns: Sequence[str] = (),
        rows: tuple[int, int] | None = None,
        parts: int | None = None,
        progress: Progress = None,
    ) -> ExportReport:
        """Write the rows that have keys to a parquet file, or to a folder of them; see `Table.export_parquet`.

        Parameters
        ----------
        path, columns, rows, parts, progress
            As for `Table.export_parquet`.

        Returns
        -------
        ExportReport
            Path, files, rows and bytes.

        Raises
        ------
        TypeError, ValueError, FileNotFoundError, FileExistsError, DiskFullError
            As `Table.export_parquet`.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Examples
        --------
        >>> table.export_parquet(tmp / "users.parquet").num_rows
        2
        """
        from shardemb import export

        runtime = self._rows._runtime
        self._rows._live()
        return export.export_parquet(
            _Source(self),
            path,
            columns=columns,
            rows=rows,
            parts=parts,
            progress=progress,
            run=partial(scheduler.run, threads=runtime.threads),
            workers=runtime.threads,
        )

    # ---- the way down

    def _facts(self, *, measured: bool = False) -> report.Facts:
        facts, rows = self._rows._facts(measured=measured), self.num_embeddings
        return replace(facts, num_embeddings=rows, nbytes=rows * self._rows._spec.record_bytes)

    def _plan_read(self, column: str, keys: KeysLike) -> batch.Wanted:
        return self._rows._plan_read(column, self._known(keys))

    def _plan_change(
        self,
        keys: KeysLike,
        values: ArrayLike,
        what: str,
        *,
        missing: Literal["error", "skip"] | int = "error",
        check_finite: bool,
    ) -> batch.Change:
        ids = self._vocabulary.lookup(keys)
        unknown = ids < 0
        if unknown.any():
            if missing == "error":
                self._refuse(keys, ids)
            if missing == "skip":
                given = np.asarray(values)
                arrays.rows(
                    given, (*ids.shape, self.embedding_dim), what=what, table=self.name, check_finite=False
                )
                ids, values = ids[~unknown], given[~unknown]
            else:
                ids[unknown] = arrays.row_ids(missing, max(self.num_embeddings, 1), self.name).flat[0]
        return self._rows._plan_change(ids, values, what, check_finite=check_finite)

    def _known(self, keys: KeysLike) -> Int64Array:
        ids = self._vocabulary.lookup(keys)
        if (ids < 0).any():
            self._refuse(keys, ids)
        return ids

    def _refuse(self, given: KeysLike, ids: Int64Array) -> None:
        unknown = np.flatnonzero(ids.reshape(-1) < 0)
        checked = keys.checked(given, self._vocabulary.key_type, self._vocabulary.name)
        first = keys.restored(checked.take(unknown[:1]), self._vocabulary.key_type).tolist()[0]
        more = f" ({unknown.size - 1} more have none either)" if unknown.size > 1 else ""
        at = tuple(int(i) for i in np.unravel_index(int(unknown[0]), ids.shape))
        msg = (
            f"key {first!r:.100} at position {at[0] if len(at) == 1 else at} has no row in vocabulary "
            f"{self._vocabulary.name!r}{more}: say what it gets by missing=, or look it up with create=True"
        )
        raise UnknownKeyError(msg)

    def _initial(self, given: KeysLike, unknown: NDArray[np.bool_]) -> Float32Array:
        rows = self._vocabulary._rows_to_be(given, np.flatnonzero(unknown.reshape(-1)))
        return self._rows._live().first_records(rows)[:, : self.embedding_dim]

    def _scan(self, column: str) -> Any:  # noqa: ANN401
        """Iterate over the rows that have keys, and their values of a column, piece by piece."""
        vocabulary = self._vocabulary
        for start in range(vocabulary.reserved, vocabulary.num_rows, SCANNED_ROWS):
            rows = vocabulary._live_rows(start, min(start + SCANNED_ROWS, vocabulary.num_rows))
            yield rows, self._rows.state(column, rows)

    def _choose(self, column: str, choose: Callable[[Float32Array], NDArray[np.bool_]]) -> Int64Array:
        chosen = [rows[choose(values)] for rows, values in self._scan(column)]
        return np.concatenate([np.empty(0, np.int64), *chosen])

    def _all_but(self, number: int, column: str) -> Int64Array:
        """List live rows without the `number` of them whose counters are largest, ascending."""
        scanned = list(self._scan(column))
        rows = np.concatenate([np.empty(0, np.int64), *(each for each, _ in scanned)])
        values = np.concatenate([np.empty(0, np.float32), *(each for _, each in scanned)])
        if number >= rows.size:
            return rows[:0]
        return np.sort(rows[np.argsort(-values, kind="stable")[number:]])

    def _count_updates(self) -> int:
        return int(sum(float(values.sum(dtype=np.float64)) for _, values in self._scan(COUNT)))


class _Source(Source):
    """The table as `export` sees it: as many rows as were given out."""

    def __init__(self, table: KeyedTable) -> None:
        from shardemb.export import RowKeys

        super().__init__(table.rows)
        self.num_embeddings = table.num_embeddings
        vocabulary = table.vocabulary
        self.keys = RowKeys(keys.arrow_type(vocabulary.key_type), vocabulary._arrow_keys)


def first_shape(
    vocabulary: Vocabulary | None, num_embeddings: object, embedding_dim: object, rows_per_shard: int | None
) -> tuple[tuple[int, int], int | None]:
    """Check the shape of a new table; choose how many rows one begins with that grows with a vocabulary, by shards.

    Raises
    ------
    TypeError, ValueError
        A number that cannot be; not exactly one of rows and vocabulary.
    """
    if (vocabulary is None) == (num_embeddings is None):
        msg = "give either num_embeddings or the vocabulary that gives out the table's rows"
        raise ValueError(msg)
    if vocabulary is None:
        return check_shape(num_embeddings, embedding_dim), rows_per_shard
    rows, dim = check_shape(max(1, vocabulary.num_rows), embedding_dim)
    if rows_per_shard is None:
        rows_per_shard = max(1, SHARD_BYTES[0] // (4 * dim))
    rows_per_shard = arrays.count(rows_per_shard, "rows_per_shard", maximum=MAX_ROWS)
    return (-(-rows // rows_per_shard) * rows_per_shard, dim), rows_per_shard
