"""One table as its users hold it: lookup, update, write. Read this first.

Contracts only: each method is one call of `TableState`, which does the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn

from shardemb.bags import Bags
from shardemb.engine import bags, planned
from shardemb.engine.training import Padding, Scaling, is_checked
from shardemb.search import exact
from shardemb.session import display
from shardemb.table_source import TableSource

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import dask.array
    import numpy as np
    import pyarrow as pa
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from shardemb.bags import Mode
    from shardemb.base.progress import Progress
    from shardemb.dtypes import Dtype, DtypeLike
    from shardemb.engine.bags import OutOfRange
    from shardemb.engine.table_state import TableState
    from shardemb.exports.formats import Format
    from shardemb.exports.parquet import Encoding
    from shardemb.exports.targets import ExportReport
    from shardemb.initializers import Initializer
    from shardemb.optim import Optimizer
    from shardemb.search.exact import SearchResult
    from shardemb.search.index import Index
    from shardemb.search.metrics import MetricName
    from shardemb.session.display import Explanation

ROWS_AT_ONCE = 2**16
"""How many rows are rewritten in one piece where all of them are."""


class Table:
    """Rows of numbers on disk, looked up and trained by row id. Made by `Store.create_table`, found by name.

    Thread safety: lookups may run in any number of threads, also concurrently with an update; such a lookup may see a
    row half updated. Updates, writes and commits wait for each other. A table cannot be pickled: open the store in the
    other process, with ``mode="r"`` if it only reads.

    Every result is the caller's own memory, and arguments are neither kept nor changed.

    ``table[ids]`` is ``table.lookup(ids)``; ``table[start:stop]`` has the rows of a range, and ``np.asarray(table)``
    all rows, up to 1 GiB. A table keeps its store open.

    Examples
    --------
    >>> import shardemb
    >>> store = shardemb.open(tmp / "words.zarr")
    >>> table = store.create_table(
    ...     "tokens", num_embeddings=400_000, embedding_dim=4, optimizer=shardemb.optim.SGD(lr=0.5)
    ... )
    >>> table.update([7, 7], [[1, 0, 0, 0.0], [1, 0, 0, 2.0]])
    >>> table.lookup([[7], [8]])
    array([[[-1.,  0.,  0., -1.]],
    <BLANKLINE>
           [[ 0.,  0.,  0.,  0.]]], dtype=float32)
    >>> table
    Table 'tokens': 400,000 x 4 float32, SGD(lr=0.5), step 1, 1 shard, 1 changed row not committed
    >>> store.commit(step=1)
    Commit(id=1, step=1, metadata={})
    >>> store.close()
    """

    def __init__(self, state: TableState, store: object) -> None:
        self._state = state
        self._store = store  # it closes when nobody holds it

    # ---- what it is

    @property
    def store(self) -> Any:  # noqa: ANN401 -- modules know only those below them
        """The `Store` that the table is in."""
        return self._store

    @property
    def name(self) -> str:
        """Name of the table within its store."""
        return self._state.name

    @property
    def num_embeddings(self) -> int:
        """Number of rows; row ids run from 0 to one less."""
        return self._state.spec.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Number of values in a row's weight."""
        return self._state.spec.embedding_dim

    @property
    def shape(self) -> tuple[int, int]:
        """``(num_embeddings, embedding_dim)``."""
        return self.num_embeddings, self.embedding_dim

    @property
    def dtype(self) -> str | Dtype:
        """What a row is stored as, as `Store.create_table` takes it. Lookups return float32 unless asked otherwise."""
        return self._state.spec.precision.public_dtype

    @property
    def rows_per_shard(self) -> int:
        """Rows in a row-shard: one file, and one zarr chunk."""
        return self._state.spec.rows_per_shard

    @property
    def nbytes(self) -> int:
        """Bytes of all rows with their optimizer state, whether they take disk space yet or not."""
        return self._state.spec.nbytes

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer with its hyper-parameters, or None."""
        return self._state.training.optimizer

    @property
    def initializer(self) -> Initializer:
        """What rows hold before they are first written."""
        return self._state.spec.initializer

    @property
    def padding_idx(self) -> int | None:
        """The row whose gradients are dropped and which bags leave out, or None; see `Store.create_table`."""
        return self._state.spec.padding_idx

    @property
    def step(self) -> int:
        """Number of updates so far. Adam's bias correction uses it."""
        return self._state.training.step

    @property
    def frozen_rows(self) -> tuple[tuple[int, int], ...]:
        """The ranges of rows, from the first to one past the last, that no update changes; see `freeze_rows`."""
        return self._state.training.frozen

    # ---- reading

    def lookup(
        self,
        ids: ArrayLike,
        *,
        dtype: DtypeLike | None = None,
        out: NDArray[Any] | None = None,
        out_of_range: OutOfRange = "raise",
    ) -> NDArray[Any]:
        """Copy rows out of the table.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape, also empty; nested lists too.
        dtype : str or dtype, optional
            What to return: ``"float32"``, which is the default; ``"float16"``, ``"bfloat16"``, ``"float8_e4m3fn"`` or
            ``"float8_e5m2"``; or ``"raw"``, the bytes of the rows as they are stored, without optimizer state. Rows
            that are stored as that are copied, others are decoded and rounded to nearest. A table of raw bytes returns
            these by default.
        out : ndarray of that dtype, shape ``ids.shape + (embedding_dim,)``, optional
            Array to fill and return. It must be C-contiguous and writable.
        out_of_range : {"raise", "clip"} or array_like of float, shape (embedding_dim,)
            What is done with negative ids and those past the end: ``"raise"`` refuses them; ``"clip"`` takes the first
            row for the former and the last one for the latter; an array is the row that is returned for both.

        Returns
        -------
        ndarray of float32 or of `dtype`, shape ``ids.shape + (embedding_dim,)``
            The caller's own memory, never a view of the table; `out` if that was given. The dtypes that NumPy lacks are
            those of the package ml_dtypes. JAX knows these; torch takes their memory by way of integers, without a
            copy: ``torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)``. Bytes are uint8, and their last axis
            is as long as a row in bytes.

        Raises
        ------
        TypeError, ValueError
            The ids are not integers; `dtype` is none of these; `out` has another dtype, shape or layout; `out_of_range`
            is invalid, or a row although bytes are wanted.
        RowIdError
            An id is negative or past the end.
        StoreClosedError, TableNotFoundError
            The store was closed; the table was dropped.
        StaleReaderError
            The store was opened for reading, and another writer has opened it since: call `Store.refresh`.
        DiskFullError, OSError
            Rows have to be reloaded from the spill file, and there is no space for the rows that they displace.
        ReadOnlyError
            In a fork of the process, while rows of the table are spilled.

        Notes
        -----
        Safe from any thread, also concurrently with changes. The memory of a large result is reused once no array or
        view of it is left; a bare address does not keep it.

        Examples
        --------
        >>> table.lookup([[0, 2], [1, 2]]).shape
        (2, 2, 4)
        >>> table.lookup([0, 2], dtype="bfloat16").dtype
        dtype(bfloat16)
        >>> table.lookup([0, -1], out_of_range=np.full(4, 0.5))[1]
        array([0.5, 0.5, 0.5, 0.5], dtype=float32)
        """
        return self._state.read_any(ids, out, dtype, out_of_range)

    def lookup_bag(
        self,
        ids: ArrayLike,
        offsets: ArrayLike | None = None,
        *,
        mode: Mode = "sum",
        weights: ArrayLike | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        out_of_range: OutOfRange = "raise",
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Look up bags of rows, and return one row for each bag: their sum, mean, greatest values or sum over a root.

        The rows are added up where they are, without a copy of all of them, as the float32 that they are looked up as.

        Parameters
        ----------
        ids : array_like of int, shape (n,), or (bags, n)
            Row ids of any integer dtype. With two dimensions, each row is a bag.
        offsets : array_like of int, shape (bags,), optional
            Where each bag begins among ids of one dimension: ascending, the first is 0. A bag ends where the next one
            begins, so equal offsets make an empty one. Left out for ids of two dimensions.
        mode : {"sum", "mean", "max", "sqrtn"}
            With the rows ``e`` of a bag and their weights ``w``, 1 by default: ``"sum"`` is ``sum(w * e)``; ``"mean"``
            is ``sum(w * e) / sum(w)``; ``"sqrtn"`` is ``sum(w * e) / sqrt(sum(w * w))``; ``"max"`` is the greatest of
            each value. Zeros instead of a division by zero.
        weights : array_like of float, shape ``ids.shape``, optional
            Weights of the rows, not with ``"max"``: float16, bfloat16, float32 or float64.
        padding_idx : int, optional
            Ids of this row are left out, and not counted by ``"mean"`` and ``"sqrtn"``; counted from the end if it is
            negative. By default the table's `padding_idx`.
        include_last_offset : bool
            Whether `offsets` has one number more: where the last bag ends, which is the number of ids.
        out_of_range : {"raise", "clip"} or array_like of float, shape (embedding_dim,)
            As for `lookup`.
        out : ndarray of float32, shape (bags, embedding_dim), optional
            Array to fill and return. It must be C-contiguous and writable.

        Returns
        -------
        ndarray of float32, shape (bags, embedding_dim)
            A bag without rows gives zeros. The caller's own memory; `out` if that was given.

        Raises
        ------
        TypeError, ValueError
            Offsets that are not integers, do not begin with 0, do not ascend or reach past the ids; offsets with ids of
            two dimensions, or none with ids of one; weights of another shape or dtype, or with ``"max"``; an unknown
            mode; `padding_idx`, `out_of_range` or `out` is invalid; the ids are no integers; the table holds raw bytes.
        RowIdError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError, ReadOnlyError
            As `lookup`.

        Notes
        -----
        Safe from any thread, also concurrently with changes.

        ``"sum"``, ``"mean"``, ``"max"`` and padding mean what they do for `torch.nn.functional.embedding_bag`, weights
        with ``"mean"`` and ``"sqrtn"`` what they do for the combiners of TensorFlow's ``embedding_lookup_sparse``. The
        rows of a bag are added in the order of its ids, in float32, so the result has the same bits for any number of
        threads and shards.

        Examples
        --------
        >>> table.lookup_bag([0, 1, 1, 2], offsets=[0, 3], mode="mean").shape
        (2, 4)
        >>> table.lookup_bag([[0, 1], [1, 2]], weights=[[1.0, 2.0], [0.5, 0.5]]).shape
        (2, 4)
        """
        given = Bags(ids, offsets, mode, weights, padding_idx, include_last_offset)
        return bags.read(given, self._state, out, out_of_range)

    def bag_weight_gradient(
        self,
        ids: ArrayLike,
        offsets: ArrayLike | None,
        grads: ArrayLike,
        *,
        mode: Literal["sum", "mean", "sqrtn"] = "sum",
        weights: ArrayLike | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
    ) -> NDArray[np.float32]:
        """Return the gradient of a loss by the weights of `lookup_bag`, given that by its result.

        Parameters
        ----------
        ids, offsets : array_like of int
            As for `lookup_bag`; `offsets` is None for ids of two dimensions.
        grads : array_like of float, shape (bags, embedding_dim)
            The gradient by the result; float16, bfloat16, float32 or float64.
        mode, weights, padding_idx, include_last_offset : optional
            As for `lookup_bag`. The weights matter for ``"mean"`` and ``"sqrtn"``.

        Returns
        -------
        ndarray of float32, shape ``ids.shape``
            For each weight; 0 for padding. The caller's own memory.

        Raises
        ------
        TypeError, ValueError
            As `lookup_bag`; `grads` has another dtype or shape; the mode is ``"max"``.
        RowIdError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError, ReadOnlyError
            As `lookup`.

        Notes
        -----
        Safe from any thread, also concurrently with changes; the rows are those of now. Call it before `update_bag`.

        For ``"sum"``, the gradient of a weight is the product ``p`` of its row and the gradient of its bag, as for
        torch. With the sums ``s = sum(w)`` and ``q = sqrt(sum(w * w))`` over the bag, it is
        ``(p - sum(w * p) / s) / s`` for ``"mean"``, and ``(p - sum(w * p) * w / (q * q)) / q`` for ``"sqrtn"``: the
        derivatives of the formulas of `lookup_bag`.

        Examples
        --------
        >>> table.bag_weight_gradient([0, 1, 1], [0, 2], np.ones((2, 4))).shape
        (3,)
        """
        given = Bags(ids, offsets, mode, weights, padding_idx, include_last_offset)
        return bags.plan_read(given, self._state).weight_gradient(grads)

    def lookup_unique(
        self, ids: ArrayLike, *, dtype: DtypeLike | None = None
    ) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]:
        """Copy each distinct row once.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.
        dtype : str or dtype, optional
            As for `lookup`.

        Returns
        -------
        rows : ndarray of float32 or of `dtype`, shape (u, embedding_dim)
            The distinct rows, by ascending id; the caller's own memory.
        unique_ids : ndarray of int64, shape (u,)
            Their ids.
        inverse : ndarray of int64, shape ``ids.shape``
            ``rows[inverse]`` equals the result of `lookup`.

        Raises
        ------
        TypeError, RowIdError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread, also concurrently with changes.

        Examples
        --------
        >>> rows, unique_ids, inverse = table.lookup_unique([5, 3, 5])
        >>> unique_ids, inverse
        (array([3, 5]), array([1, 0, 1]))
        """
        return self._state.read_unique(ids, dtype)

    def state(self, column: str, ids: ArrayLike) -> NDArray[np.float32]:
        """Copy a column of optimizer state.

        Parameters
        ----------
        column : str
            One of the optimizer's state columns, for example ``"exp_avg"``, or a counter.
        ids : array_like of int
            Row ids of any integer dtype and any shape.

        Returns
        -------
        ndarray of float32, shape ``ids.shape + (embedding_dim,)``, or ``ids.shape``
            The latter if the column has one number a row. The caller's own memory.

        Raises
        ------
        ValueError
            The table has no such column.
        TypeError, RowIdError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread, also concurrently with changes.

        Examples
        --------
        >>> table.state("exp_avg", [0, 1]).shape
        (2, 4)
        """
        return self._state.read_state(column, ids)

    def search(
        self,
        queries: ArrayLike,
        k: int,
        *,
        metric: MetricName = "cosine",
        rows: tuple[int, int] | ArrayLike | None = None,
        exclude: ArrayLike | Sequence[ArrayLike] | None = None,
    ) -> SearchResult:
        """Find the k rows that are nearest to each query, by a comparison with every row.

        Parameters
        ----------
        queries : array_like of float, shape (q, embedding_dim), or (embedding_dim,) for one
            Vectors, not row ids; `lookup` has those of rows.
        k : int
            How many rows to find for each query.
        metric : {"cosine", "dot", "l2"}
            ``"cosine"`` finds the greatest cosines, where a row of zeros has -1; ``"dot"`` the greatest products;
            ``"l2"`` the least squared distances.
        rows : tuple of two int, or array_like of int, optional
            Only these are looked at: ``(start, stop)``, a half-open range, or row ids in an array or a list; all rows
            by default.
        exclude : array_like of int, or sequence of array_like of int, optional
            Row ids that are no answer to any query, or a list for each query.

        Returns
        -------
        SearchResult
            A named tuple: ``ids``, int64, and ``scores``, float32, both of shape (q, k), or (k,) for one query. Best
            first; of rows with equal scores, the one with the smaller id first. Scores are cosines, products or squared
            distances. If there are fewer than k rows, the ids at the end are -1, and the scores minus infinity, or
            infinity for ``"l2"``.

        Raises
        ------
        TypeError, ValueError
            Queries of another dtype or shape, with NaN or infinity, or all zeros with ``"cosine"``; `k` or `metric` is
            invalid; no such range; `exclude` has lists for another number of queries; the table holds raw bytes.
        RowIdError
            There is no such row to look at or to exclude.
        StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread, also concurrently with changes; rows are as they are when the search reads them.

        All queries share one pass over the table, in the order of its files, so ask for many at once. It takes a few
        tens of MiB of memory, whatever the table and the number of queries are. Pages of a table that does not fit into
        memory are released behind the pass.

        Rows that were never written are left out, and rows with NaN or infinity. (A table that begins with zeros, and
        whose optimizer's state does too, does not know which were written: there all others are rows of zeros.)

        Examples
        --------
        >>> table.write([3, 4], [[1.0, 0, 0, 0], [2.0, 2.0, 0, 0]])
        >>> found = table.search([[1.0, 0.0, 0.0, 0.0]], 2, rows=[3, 4, 5])
        >>> found.ids, found.scores.round(2)
        (array([[3, 4]]), array([[1.  , 0.71]], dtype=float32))
        >>> table.search([1.0, 0, 0, 0], 1, metric="l2", exclude=[3]).ids.shape
        (1,)
        """
        return exact.search(self._state, queries, k, metric=metric, rows=rows, exclude=exclude)

    def build_index(
        self,
        path: str | os.PathLike[str],
        *,
        metric: MetricName = "cosine",
        links: int = 7,
        progress: Progress = None,
    ) -> Index:
        """Build an index of neighbours, by which searches need not compare every row. Needs the extra ``[ann]``.

        Parameters
        ----------
        path : path-like
            The file of the index, on a local disk; not inside the store. An index or file that is there is replaced
            atomically.
        metric : {"cosine", "dot", "l2"}
            What the index compares rows by; see `search`.
        links : int
            How many rows each row is linked to, and twice as many in the lowest layer. More of them take 8 bytes each,
            and find more where queries are unlike the rows.
        progress : bool or callable, optional
            True shows a bar; a function is called as ``progress(done, total)``, in rows.

        Returns
        -------
        Index
            It is open. Later, `open_index` opens it.

        Raises
        ------
        ModuleNotFoundError
            usearch is not installed; the message has the command.
        ShardEmbError
            Changes of the table are not committed; it was resized or resharded meanwhile.
        TypeError, ValueError
            `path` is no local path, or `metric` unknown; the table holds raw bytes; each step of its optimizer changes
            all rows (``dense_equivalent=True``).
        FileNotFoundError, FileExistsError, DiskFullError, OSError
            The folder above `path` is missing; something there cannot be replaced; the disk is full.
        StoreClosedError, TableNotFoundError, StaleReaderError
            As `lookup`.

        Notes
        -----
        Safe from any thread. Commits are folded first, and the table may be changed meanwhile.

        The file has a graph (HNSW) of the rows, with a byte for each number instead of four, and no rows: a search
        looks up the rows that the graph proposes, in one call, and has their exact scores. Rows that were never written
        are not in it. While it is built, the graph is in memory: for rows of 64 numbers, 140 bytes each.

        Examples
        --------
        >>> rows = np.random.default_rng(0).standard_normal((1000, 4), np.float32)
        >>> table.write(np.arange(1000), rows)
        >>> commit = store.commit()
        >>> index = table.build_index(tmp / "tokens.index")  # doctest: +SKIP
        """
        from shardemb.search import index

        return index.build(self._state, path, metric, links, progress)

    def open_index(self, path: str | os.PathLike[str]) -> Index:
        """Open an index that `build_index` has made of this table. Needs the extra ``[ann]``.

        Parameters
        ----------
        path : path-like
            The file of the index. It is mapped, not loaded.

        Returns
        -------
        Index
            ``index.search(queries, k)`` returns what `search` does, nearly always. It is never out of date: rows that
            changed since the index was built are compared one by one.

        Raises
        ------
        ModuleNotFoundError
            usearch is not installed; the message has the command.
        ShardEmbError
            It is the index of another table, or the table was resized or resharded since: build it again.
        FileNotFoundError, FormatError, OSError
            There is no such file; it is no index, or damaged.
        TypeError, ValueError
            `path` is no local path.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        Safe from any thread. Open only files that you trust: usearch follows the links in a graph as they are.

        Examples
        --------
        >>> index = table.open_index(tmp / "tokens.index")  # doctest: +SKIP
        >>> index.search(table.lookup([7]), 10).ids.shape  # doctest: +SKIP
        (1, 10)
        """
        from shardemb.search import index

        return index.open_index(self._state, path)

    def prefetch(self, ids: ArrayLike, *, for_update: bool = False) -> None:
        """Start to read rows into memory, in the background.

        A hint: with `for_update`, rows that do not fit into the memory budget are not copied, without an error.

        Parameters
        ----------
        ids : array_like of int
            Row ids that a later lookup or update will ask for.
        for_update : bool
            Also copy the rows to where an update changes them, which the update would do otherwise.

        Raises
        ------
        TypeError, RowIdError, StoreClosedError, TableNotFoundError
            As `lookup`.
        ReadOnlyError
            `for_update` in a store that cannot be written.

        Notes
        -----
        Safe from any thread; returns before the rows are read.

        Examples
        --------
        >>> table.prefetch([1, 2, 3], for_update=True)
        """
        self._state.prefetch(ids, for_update=for_update)

    def warm(self, rows: ArrayLike | None = None, *, progress: Progress = None) -> None:
        """Read the table into memory and wait for it, so that no lookup waits for the disk.

        Memory means the page cache: the kernel takes it back if something else needs it.

        Parameters
        ----------
        rows : array-like of int, optional
            Row ids, of any shape; only their pages are read. By default all of the table is, one shard after the other.
        progress : bool or callable, optional
            Show a bar on stderr, or call ``progress(bytes_done, bytes_in_all)``.

        Raises
        ------
        RowIdError
            An id is not a row of the table.
        ShardEmbError
            There is not enough free memory for that much.
        OSError
            The files cannot be read.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        Safe from any thread. Tables that fit into half of the free memory are read in the background, once batches have
        read a small part of them, unless they are opened with ``warm=False``; `stats` has the bytes as
        ``bytes_warmed``.

        Examples
        --------
        >>> table.warm()
        """
        self._state.warm(rows, progress)

    def explain(self, ids: ArrayLike) -> Explanation:
        """Explain what a lookup of a batch would do: where its rows are, and how much has to be read from disk.

        Looks at every page of the batch, and reads none.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.

        Returns
        -------
        Explanation
            A frozen dataclass; prints as a few lines. It holds for this moment only.

        Raises
        ------
        TypeError, RowIdError, StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.explain([1, 2, 2]).rows
        2
        """
        return display.explanation(self._state, ids)

    def stats(self) -> dict[str, Any]:
        """Return what was done with the table since it was opened, and the memory and disk space that it takes.

        Looks at every file of the table: about a millisecond for a hundred shards.

        Returns
        -------
        dict
            Since the table was opened: ``lookups``, ``rows_looked_up`` and ``cold_lookups``; ``changes`` (updates and
            writes) and their distinct ``rows_changed``; ``rows_copied`` from the files into memory before they changed;
            ``bytes_requested``, the pages that cold batches and prefetches asked for, whether or not some were in
            memory; ``bytes_warmed``, what was read in addition so that the table is in memory (`warm`).

            Now: ``rows_in_memory`` and the ``bytes_in_memory`` that they take, which count against the memory budget;
            ``rows_out``, the rows in the spill file; ``bytes_mapped``, the address space of the files, which costs
            nothing; ``rows_written``, and the ``bytes_allocated`` for them on the disk. The last two also by shard:
            ``shards`` is a list of dicts. If all rows start from zeros, no bitmap records which were written, and
            ``rows_written`` counts all rows of the blocks of 4,096 bytes that were.

        Raises
        ------
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        Safe from any thread; changes wait meanwhile.

        Examples
        --------
        >>> before = table.stats()["rows_looked_up"]
        >>> rows = table.lookup([1, 2, 2])
        >>> table.stats()["rows_looked_up"] - before
        3
        """
        return self._state.stats()

    # ---- changing

    def update(
        self,
        ids: ArrayLike,
        grads: ArrayLike,
        *,
        padding_idx: int | None = None,
        scale_grad_by_freq: bool = False,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """Take one optimizer step on the rows in `ids`: all of them change, or none.

        Gradients of duplicate ids are summed first, in the order of the batch, so the result has the same bits for any
        number of threads and shards. Rows that are not in `ids` do not change. In memory only until `Store.commit`.

        In a table that is not float32, a row is decoded, changed in float32, and rounded as the table rounds.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.
        grads : array_like of float, shape ``ids.shape + (embedding_dim,)``
            float16, bfloat16, float32 or float64; the computation is in float32.
        padding_idx : int, optional
            Gradients of this row are dropped; counted from the end if it is negative. By default the table's
            `padding_idx`.
        scale_grad_by_freq : bool
            Divide the gradients of each row by how often its id is in the batch, as `torch.nn.Embedding` does.
        scale : float, optional
            Divide the gradients by this number, as a gradient scaler of mixed precision needs it. If any of them is not
            finite then, the whole step is skipped: nothing changes, neither rows nor steps.
        check_finite : bool
            Refuse NaN and infinity, unless there is a `scale`.

        Returns
        -------
        float or None
            With `scale`, the Euclidean norm of the gradients after the division; infinite or NaN if the step was
            skipped.

        Raises
        ------
        TypeError, ValueError
            Wrong dtype or shape; NaN or infinity; the table has no optimizer; `padding_idx` is no row.
        FrozenRowError, LearningRateError
            A row is frozen; the learning rate is a function that has to be set again. Nothing was changed.
        RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError
            Nothing was changed.
        DiskFullError, OSError
            Rows have to be spilled to fit the memory budget, and there is no space for them. Nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes, and for a fold if the memory budget is used up.

        Examples
        --------
        >>> table.update([0, 1], np.ones((2, 4), np.float32))
        """
        scaling = Scaling.of(scale)
        change = self._state.plan_update(
            ids,
            grads,
            Padding(padding_idx, scale_grad_by_freq),
            check_finite=is_checked(scaling, check_finite=check_finite),
        )
        return self._state.apply(change, scaling)

    def update_bag(
        self,
        ids: ArrayLike,
        offsets: ArrayLike | None,
        grads: ArrayLike,
        *,
        mode: Mode = "sum",
        weights: ArrayLike | None = None,
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        scale_grad_by_freq: bool = False,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """Take one optimizer step on the rows of bags, given the gradient by the result of `lookup_bag`.

        All rows change, or none. The gradient of a row is the sum, over the places of its id in the order of the batch,
        of the gradient of the bag times what the row was multiplied by. It is summed within the step, so nothing is as
        large as a gradient for each id.

        Parameters
        ----------
        ids, offsets : array_like of int
            As for `lookup_bag`; `offsets` is None for ids of two dimensions.
        grads : array_like of float, shape (bags, embedding_dim)
            The gradient by the result; float16, bfloat16, float32 or float64. The computation is in float32.
        mode, weights, padding_idx, include_last_offset : optional
            As for `lookup_bag`.
        scale_grad_by_freq : bool
            Divide the gradients of each row by how often its id is in the batch, padding left out.
        scale : float, optional
            Divide the gradients by this number, and skip the step if any is not finite then; see `update`.
        check_finite : bool
            Refuse NaN and infinity in `grads`, unless there is a `scale`, and in `weights`.

        Returns
        -------
        float or None
            With `scale`, the norm of the gradients of the rows; see `update`.

        Raises
        ------
        TypeError, ValueError
            As `lookup_bag`; `grads` has another dtype or shape; NaN or infinity; the table has no optimizer.
            Nothing was changed.
        FrozenRowError, LearningRateError
            As `update`; nothing was changed.
        RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `update`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `update`.

        With ``"mean"`` and ``"sqrtn"``, the gradient of a bag is divided by what its sum was divided by. With
        ``"max"``, each value of it goes to the first of the bag's rows that has the greatest value now. So it is that
        of `torch.nn.functional.embedding_bag`, and the result has the same bits for any number of threads and shards.
        (With `scale_grad_by_freq`, it is that of `torch.nn.functional.embedding`, whose rows are pooled: on CPUs,
        ``embedding_bag`` of torch 2.13 divides by the counts of other ids.)

        Examples
        --------
        >>> table.update_bag([0, 1, 1, 2], [0, 3], np.ones((2, 4), np.float32), mode="mean")
        """
        given = Bags(ids, offsets, mode, weights, padding_idx, include_last_offset)
        return bags.update(
            self._state,
            given,
            grads,
            scale_grad_by_freq=scale_grad_by_freq,
            scaling=Scaling.of(scale),
            check_finite=check_finite,
        )

    def freeze_rows(self, start: int = 0, stop: int | None = None) -> None:
        """Let no update change rows ``start:stop``, by default all of them; part of the next commit.

        An update with a gradient for one of them is refused. `write` and `reset_rows` still change them.

        Parameters
        ----------
        start : int
            The first row.
        stop : int, optional
            One past the last row; by default the end of the table.

        Raises
        ------
        TypeError, ValueError
            They are not integers in ascending order within the table.
        ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError
            As `update`.

        Notes
        -----
        Safe from any thread; waits for other changes.

        Examples
        --------
        >>> table.freeze_rows(100, 200)
        >>> table.frozen_rows
        ((100, 200),)
        """
        self._state.freeze(start, stop, frozen=True)

    def unfreeze_rows(self, start: int = 0, stop: int | None = None) -> None:
        """Let updates change rows ``start:stop`` again, by default all; part of the next commit.

        Parameters
        ----------
        start : int
            The first row.
        stop : int, optional
            One past the last row; by default the end of the table.

        Raises
        ------
        TypeError, ValueError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError
            As `freeze_rows`.

        Notes
        -----
        Safe from any thread; waits for other changes.

        Examples
        --------
        >>> table.unfreeze_rows()
        >>> table.frozen_rows
        ()
        """
        self._state.freeze(start, stop, frozen=False)

    def write(self, ids: ArrayLike, rows: ArrayLike, *, check_finite: bool = True) -> None:
        """Overwrite weights; optimizer state stays. Undone unless `Store.commit` follows.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape; of duplicates the last wins.
        rows : array_like of float, shape ``ids.shape + (embedding_dim,)``
            float16, bfloat16, float32 or float64; stored as the table's dtype, rounded as the table rounds. If that is
            not float32, also uint8: the bytes of rows, which ``lookup(dtype="raw")`` returns, stored as they are.
        check_finite : bool
            Refuse NaN and infinity.

        Raises
        ------
        TypeError, ValueError
            Wrong dtype or shape; NaN or infinity.
        RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `update`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `update`. Rows are in memory only until the commit, except where 4 MiB or more of
        consecutive rows were never written: these go to the disk at once, which takes no memory and is the fastest way
        to fill a table. A lookup in another thread may see some of them before the call returns.

        Examples
        --------
        >>> table.write([3], [[1.0, 2.0, 3.0, 4.0]])
        >>> table.lookup(3)
        array([1., 2., 3., 4.], dtype=float32)
        """
        self._state.change(ids, rows, "rows", check_finite=check_finite)

    def write_state(
        self, ids: ArrayLike, state: Mapping[str, ArrayLike], *, check_finite: bool = True
    ) -> None:
        """Overwrite the optimizer's state of rows, which was trained elsewhere. Weights stay.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape; of duplicates the last wins.
        state : mapping of str to array_like of float
            Columns of the optimizer's state, such as ``"exp_avg"``, each of the shape that `state` returns; others
            stay.
        check_finite : bool
            Refuse NaN and infinity.

        Raises
        ------
        TypeError, ValueError
            Wrong dtype or shape; NaN or infinity; the optimizer has no such column.
        RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `update`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `update`. In memory only until `Store.commit`. `set_step` sets what else an
        optimizer remembers.

        Examples
        --------
        >>> table.write_state([3], {"exp_avg": [[0.1, 0.2, 0.3, 0.4]]})
        >>> table.state("exp_avg", 3)
        array([0.1, 0.2, 0.3, 0.4], dtype=float32)
        """
        self._state.apply(planned.plan_state(self._state, ids, state, check_finite=check_finite))

    def set_step(self, step: int) -> None:
        """Set the number of updates that the table has had, to go on with training from elsewhere.

        Adam's bias correction and schedules depend on it. Rows stay as they are. Part of the next commit.

        Parameters
        ----------
        step : int
            The number, at least 0.

        Raises
        ------
        TypeError, ValueError
            It is none.
        ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `update`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes. If the optimizer is ``dense_equivalent``, all rows are written.

        Examples
        --------
        >>> table.set_step(1000)
        >>> table.step
        1000
        """
        planned.set_step(self._state, step, ROWS_AT_ONCE)

    def reset_rows(self, ids: ArrayLike) -> None:
        """Make rows freshly initialised: initial weights, initial state. In memory only until `Store.commit`.

        Parameters
        ----------
        ids : array_like of int
            Row ids of any integer dtype and any shape.

        Raises
        ------
        TypeError, RowIdError
            The ids are not integers; an id is negative or past the end.
        ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `update`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `update`.

        Examples
        --------
        >>> table.reset_rows([3])
        """
        self._state.reset(ids)

    def copy_rows(self, source: ArrayLike, target: ArrayLike) -> None:
        """Overwrite rows by others, with optimizer state and counters: all of them, or none.

        Parameters
        ----------
        source : array_like of int
            The rows to copy, of any integer dtype and any shape. All are read before any row changes.
        target : array_like of int, shape ``source.shape``
            The rows that become like them; of duplicates the last wins.

        Raises
        ------
        TypeError, ValueError
            The ids are not integers, or the shapes differ.
        RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `update`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `update`. In memory only until `Store.commit`.

        Examples
        --------
        >>> table.copy_rows([0, 1], [10, 11])
        >>> bool((table.lookup([10, 11]) == table.lookup([0, 1])).all())
        True
        """
        self._state.apply(planned.plan_copy(self._state, source, target))

    def swap_rows(self, rows: ArrayLike, others: ArrayLike) -> None:
        """Let rows change places with others, with optimizer state and counters: all of them, or none.

        Parameters
        ----------
        rows, others : array_like of int
            Row ids of any integer dtype, and of one shape; each id occurs once.

        Raises
        ------
        TypeError, ValueError
            The ids are not integers; the shapes differ; an id occurs twice.
        RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `update`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `update`. In memory only until `Store.commit`.

        Examples
        --------
        >>> table.swap_rows([0, 1], [20, 21])
        """
        self._state.apply(planned.plan_swap(self._state, rows, others))

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Change the optimizer's hyper-parameters for the following updates; part of the next commit.

        Parameters
        ----------
        optimizer : Optimizer
            Of the same class as the table's and with the same initial state, so that the stored state stays valid.

        Raises
        ------
        ValueError
            Not an optimizer, or one of another class or with other initial state.
        ReadOnlyError, StoreClosedError, TableNotFoundError
            Nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes.

        Examples
        --------
        >>> table.set_optimizer(shardemb.optim.Adam(lr=1e-4))
        """
        self._state.set_optimizer(optimizer)

    def resize(self, num_embeddings: int, *, drop_rows: bool = False) -> None:
        """Change the number of rows; part of the next commit, and undone by a rollback.

        New rows hold their initial values, the same as if the table had been created with that many rows. The existing
        shards stay as they are. New rows take no disk space until they are written.

        Parameters
        ----------
        num_embeddings : int
            New number of rows.
        drop_rows : bool
            Allow fewer rows than now. The rows past the new end are gone with the next commit: if the table grows
            again, they hold their initial values.

        Raises
        ------
        TypeError, ValueError
            The number is invalid, or it is smaller than now without `drop_rows`.
        ShardEmbError
            The table would have too many shards (`Store.reshard` makes them larger); or it would shrink, though a
            vocabulary gives out its rows (remove keys instead).
        FormatError
            A part of the table that has to be copied is damaged. Nothing was changed.
        DiskFullError, OSError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError
            Nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes, and until what is committed was folded into the shards.

        Examples
        --------
        >>> table.resize(500_000)
        >>> table.num_embeddings
        500000
        """
        self._state.resize(num_embeddings, drop_rows=drop_rows)

    def materialize(self, *, progress: Progress = None) -> None:
        """Write the initial values of rows that were never written into the shards, for readers that know only zarr.

        No value changes, so this is not part of a commit. Lookups and updates continue meanwhile. If the call is
        interrupted, the next one continues where it stopped. Rows with uncommitted changes are skipped: their commit
        writes them.

        Parameters
        ----------
        progress : bool or callable, optional
            True shows a bar; a function is called as ``progress(done, total)``, in rows.

        Raises
        ------
        ShardEmbError
            The table is not part of a commit yet.
        DiskFullError
            There is no space on the disk; what is written stays.
        ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError
            As `update`; what is written stays.

        Notes
        -----
        Safe from any thread. Afterwards the table takes `nbytes` on the disk. A table whose rows all start
        from zeros needs none of this: holes in its files read as zeros.

        Examples
        --------
        >>> small = store.create_table(
        ...     "small", num_embeddings=100, embedding_dim=2, initializer=shardemb.initializers.Constant(1.0)
        ... )
        >>> commit = store.commit()
        >>> small.materialize()
        """
        self._state.materialize(progress)

    # ---- leaving

    def to_dask_array(self) -> dask.array.Array:
        """Make a dask array of the weights: one chunk for each row-shard, read when it is computed.

        Returns
        -------
        dask.array.Array of float32, or uint8 if the table holds raw bytes, shape (num_embeddings, embedding_dim)
            Shows the rows as they are when a chunk is computed, uncommitted changes included. It works with the
            schedulers of this process; in other processes open ``TABLE/rows`` with `dask.array.from_zarr`. It
            keeps the store open; chunks that are computed after `Store.close` raise `StoreClosedError`.

        Raises
        ------
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> float(table.to_dask_array()[:100].sum().compute())
        0.0
        """
        return self._state.as_dask_array(self)

    def to_arrow_batches(
        self, *, columns: Sequence[str] = (), rows: tuple[int, int] | None = None
    ) -> pa.RecordBatchReader:
        """Stream the table as Arrow record batches, in bounded memory.

        Parameters
        ----------
        columns : sequence of str
            Optimizer state columns to add.
        rows : tuple of two int, optional
            ``(start, stop)``, a half-open range of row ids; all rows by default.

        Returns
        -------
        pyarrow.RecordBatchReader
            ``id: int64``, ``embedding: FixedSizeList<float32>``, then the state columns, none of them nullable; at most
            65,536 rows in a batch. A table of float16 has lists of float16, one of raw bytes has FixedSizeBinary; other
            dtypes become float32. Each batch owns its memory. Rows are as they are when their batch is read,
            uncommitted changes included. duckdb, polars, lance and others take the reader directly. The
            reader keeps the store open.

        Raises
        ------
        ValueError
            There is no such column or no such range.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        Safe from any thread; one thread at a time may read from a reader.

        Examples
        --------
        >>> table.to_arrow_batches(rows=(10, 20)).read_all().num_rows
        10
        """
        from shardemb.exports import arrow

        return arrow.to_arrow_batches(TableSource(self._state, self), columns=columns, rows=rows)

    def export(
        self,
        path: str | os.PathLike[str],
        format: str | Format | None = None,
        *,
        columns: Sequence[str] = (),
        rows: tuple[int, int] | None = None,
        where: ArrayLike | None = None,
        changed_since: int | str | None = None,
        resume: bool = False,
        progress: Progress = None,
    ) -> ExportReport:
        """Write the table, or some of its rows, to files of one of several formats, in bounded memory.

        Parameters
        ----------
        path : path-like or str
            The file, or for formats in several files the folder, on a local disk. Parquet also takes URLs, such as
            ``s3://bucket/folder``: of a folder, whose files are written one by one, and ``_SUCCESS`` last.
        format : str or shardemb.exports.Format, optional
            ``"parquet"``, ``"arrow"``, ``"word2vec-text"``, ``"word2vec-binary"``, ``"npy"``, ``"safetensors"``,
            ``"lance"`` or ``"projector"``; or an object with options: ``shardemb.exports.Parquet(parts=8)``. By
            default, what the suffix says: .parquet, .arrow, .feather, .txt, .vec, .bin, .npy, .safetensors or .lance.
        columns : sequence of str
            Optimizer state columns to add; for parquet and Arrow.
        rows : tuple of two int, optional
            ``(start, stop)``, a half-open range of row ids; all rows by default.
        where : array_like, optional
            Only these rows: a bool for each row; or row ids in any order, each of which is exported once.
        changed_since : str or int, optional
            Only rows whose vectors are not what they were in a tag, see `Store.changed_rows`. Or, given a step, only
            rows whose counter ``last_step`` is greater: those that were updated after that step of the table, which has
            counters. Rows that were written, reset or never updated since do not count then.
        resume : bool
            Continue an export in parts that was interrupted: take over what it has completed, if the store is at the
            same commit and the same rows are asked for; otherwise a warning is logged, and all is written. Until all
            parts are there, the folder has no ``_SUCCESS``; if this one is interrupted, its complete parts stay.
        progress : bool or callable, optional
            True shows a bar; a function is called as ``progress(done, total)``, in rows.

        Returns
        -------
        ExportReport
            A frozen dataclass: path, files, num_rows, nbytes.

        Raises
        ------
        TypeError, ValueError, RowIdError
            The path, the format or an option is invalid, the format cannot be told from the suffix, or there are no
            such columns or rows; the table has no counters; a key cannot be written in that format.
        TagNotFoundError
            There is no such tag.
        ImportError
            A package that the format or the URL needs is not installed.
        FileNotFoundError, FileExistsError, DiskFullError, OSError
            The folder above `path` is missing, something at `path` cannot be replaced, or it cannot be written. On a
            local disk, what was there before is unchanged.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        Rows are ascending, as a lookup sees them, uncommitted changes included. Files are written under a temporary
        name and renamed when they are complete.

        Safe from any thread. Updates may run concurrently; rows are as they are when their block is read.

        Examples
        --------
        >>> table.export(tmp / "tokens.npy", where=[3, 5]).num_rows
        2
        >>> np.load(tmp / "tokens.npy").shape
        (2, 4)
        >>> report = table.export(tmp / "parts", shardemb.exports.Parquet(parts=2))
        >>> [file.name for file in report.files]
        ['part-00000.parquet', 'part-00001.parquet']
        """
        from shardemb.exports import formats
        from shardemb.exports.selection import Query

        if isinstance(changed_since, str):
            query = Query(rows, where, among=self.store.changed_rows(self.name, changed_since))
        else:
            query = Query(rows, where, changed_since)
        source = TableSource(self._state, self)
        return formats.export(source, path, format, query, columns=columns, resume=resume, progress=progress)

    def export_parquet(
        self,
        path: str | os.PathLike[str],
        *,
        columns: Sequence[str] = (),
        rows: tuple[int, int] | None = None,
        parts: int | None = None,
        encoding: Encoding = "plain",
        progress: Progress = None,
    ) -> ExportReport:
        """Write the table to a parquet file, or to a folder of them, in bounded memory.

        Parameters
        ----------
        path : path-like
            The file, on a local disk, or with `parts` the folder. What an earlier export has left there is replaced
            atomically; a folder with anything else in it is refused.
        columns : sequence of str
            Optimizer state columns to add.
        rows : tuple of two int, optional
            ``(start, stop)``, a half-open range of row ids; all rows by default.
        parts : int, optional
            Write this many files, several at a time, which is faster on several cores.
        encoding : {"plain", "byte_stream_split"}
            How values are stored. Every reader knows ``"plain"``. ``"byte_stream_split"`` makes files of vectors about
            a tenth smaller, but some readers refuse it.
        progress : bool or callable, optional
            True shows a bar; a function is called as ``progress(done, total)``, in rows.

        Returns
        -------
        ExportReport
            A frozen dataclass: path, files, num_rows, nbytes.

        Raises
        ------
        TypeError, ValueError
            `path` is no local path, there is no such column or no such range, `parts` is not between 1 and 100,000, or
            `encoding` is neither of these.
        FileNotFoundError, FileExistsError, DiskFullError
            The folder above `path` is missing, something at `path` cannot be replaced, or the disk is full. What was
            there before is unchanged.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        The file has ``id: int64``, ``embedding: FixedSizeList<float32>`` and the state columns, none of
        them nullable. A table of float16 has lists of float16, one of raw bytes has FixedSizeBinary; other dtypes
        become float32. It is compressed with zstd, in row groups of at most 65,536 rows and 32 MiB of values. Rows are
        exported as a lookup sees them, uncommitted changes included.

        Safe from any thread. Updates may run concurrently; rows are as they are when their row group is read.

        Examples
        --------
        >>> report = table.export_parquet(tmp / "tokens.parquet", rows=(0, 100))
        >>> report.num_rows
        100
        """
        from shardemb.exports import parquet

        return parquet.export_parquet(
            TableSource(self._state, self),
            path,
            columns=columns,
            rows=rows,
            parts=parts,
            encoding=encoding,
            progress=progress,
        )

    # ---- at a glance

    def __repr__(self) -> str:
        return display.one_line(display.facts(self._state))

    def _repr_html_(self) -> str:
        return display.html_table([display.facts(self._state)])

    def __len__(self) -> int:
        return self.num_embeddings

    def __getitem__(self, ids: ArrayLike | slice) -> NDArray[Any]:
        return self._state.read_items(ids)

    # By position, Python would iterate over the rows one by one.
    __iter__ = None
    __contains__ = None

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return self._state.as_numpy(None, dtype, copy=copy)

    def __reduce__(self) -> NoReturn:
        path = str(self._state.runtime.path)
        msg = (
            f"table {self.name!r} cannot be pickled: it is memory of this process; in the other process call "
            f'shardemb.open({path!r}, mode="r")[{self.name!r}]'
        )
        raise TypeError(msg)
