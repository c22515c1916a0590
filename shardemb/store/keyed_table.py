"""A table that is used by key, as its users hold it.

Contracts only: each method is one call of `KeyedRows`, which does the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from shardemb import keyed_bags
from shardemb.bags import Bags
from shardemb.engine.training import Padding, Scaling
from shardemb.search import evaluation, words
from shardemb.session import display

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    import pyarrow as pa
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    from shardemb.bags import Mode
    from shardemb.base.progress import Progress
    from shardemb.dtypes import Dtype, DtypeLike
    from shardemb.exports.formats import Format
    from shardemb.exports.parquet import Encoding
    from shardemb.exports.targets import ExportReport
    from shardemb.initializers import Initializer
    from shardemb.optim import Optimizer
    from shardemb.search.correlation import Correlation
    from shardemb.search.evaluation import Lines
    from shardemb.search.metrics import MetricName
    from shardemb.search.words import KeySearchResult, Words
    from shardemb.store.table import Table
    from shardemb.store.vocabulary import Vocabulary
    from shardemb.vocabulary.keyed_rows import KeyedRows, Missing, MissingChange
    from shardemb.vocabulary.keys import KeysLike


class KeyedTable:
    """Rows of float32 by key. Made by `Store.create_table` with a vocabulary, found by name in the store.

    The vocabulary gives out rows, and the table grows with it. Several tables may share one vocabulary. `rows` is the
    same table by row id.

    ``table[keys]`` is ``table.lookup(keys)``. ``key in table`` says whether a key has a row. Iterating gives the keys
    in the order of their rows. ``np.asarray(table)`` has the rows of all keys in this order, up to 1 GiB. A table keeps
    its store open.

    Thread safety: as for a `Table`. Lookups may run in any number of threads, also concurrently with changes; a lookup
    with ``create=True`` is a change. Every result is the caller's own memory, and arguments are neither kept nor
    changed.

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

    def __init__(self, keyed: KeyedRows, rows: Table, vocabulary: Vocabulary) -> None:
        self._keyed = keyed
        self._rows = rows
        self._vocabulary = vocabulary

    # ---- what it is

    @property
    def store(self) -> Any:  # noqa: ANN401 -- modules know only those below them
        """The `Store` that the table is in."""
        return self._rows.store

    @property
    def rows(self) -> Table:
        """The same table by row id. It has more rows than were given out, so that it grows rarely."""
        return self._rows

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary that says which key has which row."""
        return self._vocabulary

    @property
    def name(self) -> str:
        """Name of the table within its store."""
        return self._rows.name

    @property
    def num_embeddings(self) -> int:
        """Number of rows given out so far, reserved and freed ones included."""
        return self._keyed.num_rows

    @property
    def embedding_dim(self) -> int:
        """Number of values in a row's weight."""
        return self._rows.embedding_dim

    @property
    def dtype(self) -> str | Dtype:
        """What a row is stored as; see `Table.dtype`."""
        return self.rows.dtype

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

    def __contains__(self, key: object) -> bool:
        return key in self._vocabulary

    def __iter__(self) -> Iterator[Any]:
        return iter(self._vocabulary)

    def __getitem__(self, keys: KeysLike) -> NDArray[Any]:
        return self.lookup(keys)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return self._keyed.as_numpy(dtype, copy=copy)

    def __reduce__(self) -> NoReturn:
        self.rows.__reduce__()

    def __repr__(self) -> str:
        kind = f"{len(self):,} {self._vocabulary.key_type} keys"
        state = f"{self.optimizer or 'no optimizer'}, step {self.step}"
        return f"KeyedTable {self.name!r}: {kind} x {self.embedding_dim} float32, {state}"

    def _repr_html_(self) -> str:
        return display.html_table([display.keyed_facts(self._keyed)])

    def stats(self) -> dict[str, Any]:
        """Return what was done with the table and what it takes; see `Table.stats`.

        Returns
        -------
        dict
            The items of `Table.stats`, and ``vocabulary``: the dict of `Vocabulary.stats`. With counters also
            ``updates``, the sum of all counts.

        Raises
        ------
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        Safe from any thread. With counters, the call reads the count of every row that has a key.

        Examples
        --------
        >>> table.stats()["vocabulary"]["keys"]
        2
        """
        return self._keyed.stats()

    # ---- reading

    def lookup(
        self,
        keys: KeysLike,
        *,
        missing: Missing = "error",
        create: bool = False,
        dtype: DtypeLike | None = None,
        out: NDArray[Any] | None = None,
    ) -> NDArray[Any]:
        """Copy the rows of keys out of the table.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `Vocabulary.lookup`.
        missing : {"error", "initial", "zeros"} or int
            What keys without a row get: ``"error"`` raises; ``"initial"`` gives the initial value of the row that the
            key would get; ``"zeros"`` gives zeros; an int gives the row of that id, for example a reserved one.
        create : bool
            Give new keys rows first, as `Vocabulary.add` does. `missing` then applies to keys that are not admitted
            yet.
        dtype : str or dtype, optional
            As for `Table.lookup`.
        out : ndarray of float32 or of `dtype`, shape ``keys.shape + (embedding_dim,)``, optional
            As for `Table.lookup`.

        Returns
        -------
        ndarray of float32 or of `dtype`, shape ``keys.shape + (embedding_dim,)``
            The caller's own memory; `out` if that was given.

        Raises
        ------
        UnknownKeyError
            A key has no row; the message names the first one. With `create`, rows that other keys got stay.
        TypeError, ValueError
            Keys of another type, or missing ones (null); `missing` or `out` is invalid. No key was added.
        RowIdError
            `missing` is not the id of a row.
        StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `Table.lookup`. With `create` also what `Vocabulary.add` raises.

        Notes
        -----
        Safe from any thread. With `create` the call waits for other changes.

        Examples
        --------
        >>> table.lookup([[-5], [7]], missing="initial").shape
        (2, 1, 2)
        """
        return self._keyed.read(keys, missing=missing, create=create, out=out, dtype=dtype)

    def lookup_bag(
        self,
        keys: KeysLike,
        offsets: ArrayLike | None = None,
        *,
        mode: Mode = "sum",
        weights: ArrayLike | None = None,
        padding_key: Any = None,  # noqa: ANN401
        include_last_offset: bool = False,
        missing: Missing = "error",
        create: bool = False,
        out: NDArray[np.float32] | None = None,
    ) -> NDArray[np.float32]:
        """Look up bags of keys, and return one row for each bag; see `Table.lookup_bag`.

        Parameters
        ----------
        keys : array_like of int, str or bytes, shape (n,), or (bags, n)
            As for `Vocabulary.lookup`. With two dimensions, each row is a bag.
        offsets, mode, weights : optional
            As for `Table.lookup_bag`.
        padding_key : int, str or bytes, optional
            This key, which has a row, is left out. By default the row of the table's `Table.padding_idx` is, which keys
            without a row get if `missing` names it.
        include_last_offset : bool
            As for `Table.lookup_bag`.
        missing : {"error", "initial", "zeros"} or int
            What is taken for keys without a row, as for `lookup`. They count for ``"mean"`` and ``"sqrtn"``.
        create : bool
            Give new keys rows first, as for `lookup`.
        out : ndarray of float32, shape (bags, embedding_dim), optional
            As for `Table.lookup_bag`.

        Returns
        -------
        ndarray of float32, shape (bags, embedding_dim)
            The caller's own memory; `out` if that was given.

        Raises
        ------
        UnknownKeyError
            A key, or the one of padding, has no row. With `create`, rows that other keys got stay.
        TypeError, ValueError
            As `lookup` and `Table.lookup_bag`. No key was added.
        RowIdError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread. With `create` the call waits for other changes.

        Examples
        --------
        >>> table.lookup_bag([-5, 99, -5], [0, 2], missing="zeros").shape
        (2, 2)
        """
        given = Bags(keys, offsets, mode, weights, padding_key, include_last_offset)
        return keyed_bags.read(self._keyed, given, missing=missing, create=create, out=out)

    def bag_weight_gradient(
        self,
        keys: KeysLike,
        offsets: ArrayLike | None,
        grads: ArrayLike,
        *,
        mode: Literal["sum", "mean", "sqrtn"] = "sum",
        weights: ArrayLike | None = None,
        padding_key: Any = None,  # noqa: ANN401
        include_last_offset: bool = False,
        missing: Missing = "error",
    ) -> NDArray[np.float32]:
        """Return the gradient of a loss by the weights of `lookup_bag`; see `Table.bag_weight_gradient`.

        Parameters
        ----------
        keys, offsets : array_like
            As for `lookup_bag`; `offsets` is None for keys of two dimensions.
        grads : array_like of float, shape (bags, embedding_dim)
            The gradient by the result.
        mode, weights, padding_key, include_last_offset, missing : optional
            As for `lookup_bag`.

        Returns
        -------
        ndarray of float32, shape ``keys.shape``
            For each weight; 0 for padding. The caller's own memory.

        Raises
        ------
        UnknownKeyError, TypeError, ValueError, RowIdError
            As `lookup_bag` and `Table.bag_weight_gradient`.
        StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.bag_weight_gradient([-5, 99], [0], [[1.0, 1.0]], missing="zeros").shape
        (2,)
        """
        given = Bags(keys, offsets, mode, weights, padding_key, include_last_offset)
        return keyed_bags.weight_gradient(self._keyed, given, grads, missing=missing)

    def lookup_unique(
        self, keys: KeysLike, *, create: bool = False, dtype: DtypeLike | None = None
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
        """Copy the row of each distinct key once.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `Vocabulary.lookup`.
        create : bool
            Give new keys rows first, as for `lookup`.
        dtype : str or dtype, optional
            As for `Table.lookup`.

        Returns
        -------
        rows : ndarray of float32 or of `dtype`, shape (u, embedding_dim)
            The distinct rows, by ascending row id; the caller's own memory.
        unique_keys : ndarray of int64, or of str or bytes objects, shape (u,)
            Their keys.
        inverse : ndarray of int64, shape ``keys.shape``
            ``rows[inverse]`` equals the result of `lookup`.

        Raises
        ------
        UnknownKeyError
            A key has no row.
        TypeError, ValueError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread. With `create` the call waits for other changes.

        Examples
        --------
        >>> rows, unique_keys, inverse = table.lookup_unique([-5, 7, -5], create=True)
        >>> unique_keys, inverse
        (array([-5,  7]), array([0, 1, 0]))
        """
        return self._keyed.read_unique(keys, create=create, dtype=dtype)

    def state(self, column: str, keys: KeysLike) -> NDArray[np.float32]:
        """Copy a column of optimizer state, or a counter, of the rows of keys.

        Parameters
        ----------
        column : str
            One of the optimizer's state columns, ``"count"`` or ``"last_step"``.
        keys : array_like of int, str or bytes
            As for `Vocabulary.lookup`; all of them have rows.

        Returns
        -------
        ndarray of float32, shape ``keys.shape + (embedding_dim,)``, or ``keys.shape``
            The latter if the column has one number a row. The caller's own memory.

        Raises
        ------
        UnknownKeyError
            A key has no row.
        ValueError
            The table has no such column, or a key is missing (null).
        TypeError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread, also concurrently with changes.

        Examples
        --------
        >>> table.state("count", [-5])
        array([1.], dtype=float32)
        """
        return self._keyed.read_state(column, keys)

    # ---- searching

    def search(
        self,
        queries: ArrayLike,
        k: int,
        *,
        metric: MetricName = "cosine",
        keys: KeysLike | None = None,
        exclude: Any = None,  # noqa: ANN401
    ) -> KeySearchResult:
        """Find the k keys whose rows are nearest to each query; see `Table.search`.

        Parameters
        ----------
        queries : array_like of float, shape (q, embedding_dim), or (embedding_dim,) for one
            Vectors, not keys; `lookup` has those of keys.
        k : int
            How many keys to find for each query.
        metric : {"cosine", "dot", "l2"}
            As for `Table.search`.
        keys : array_like of int, str or bytes, optional
            Only these are looked at; all keys by default.
        exclude : array_like of int, str or bytes, or a sequence of these, optional
            Keys that are no answer to any query, or a list for each query.

        Returns
        -------
        KeySearchResult
            A named tuple: ``keys``, int64 or objects, ``scores``, float32, and ``ids``, the row ids, int64, all of
            shape (q, k), or (k,) for one query. If there are fewer than k keys, the ids at the end are -1, and the keys
            0 or None.

        Raises
        ------
        UnknownKeyError
            One of `keys` or `exclude` has no row.
        TypeError, ValueError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `Table.search` and `lookup`.

        Notes
        -----
        Safe from any thread. All queries share one pass over the table. Rows that were never written are left out.

        Examples
        --------
        >>> table.search([-1.0, -2.0], 1).keys
        array([-5])
        """
        return words.search(self._keyed, queries, k, metric=metric, keys=keys, exclude=exclude)

    def most_similar(
        self,
        positive: Words = None,
        negative: Words = None,
        topn: int | None = 10,
        clip_start: int = 0,
        clip_end: int | None = None,
        restrict_vocab: int | None = None,
    ) -> list[tuple[Any, float]] | NDArray[np.float32]:
        """Find the keys nearest to a sum of keys and vectors by cosine, as gensim's method of this name does.

        Parameters
        ----------
        positive, negative : key, vector, or list of keys, vectors, (key, weight) and (vector, weight), optional
            What is added and what is subtracted. A key stands for its row divided by its length, a vector for itself.
            The weights are 1 and -1 by default. Keys that are given are no answer.
        topn : int, optional
            How many keys to find. With None, return the cosines of all keys.
        clip_start, clip_end : int, optional
            Look only at the keys at these positions, in the order of their rows.
        restrict_vocab : int, optional
            Look only at the first keys; this overrides `clip_start` and `clip_end`.

        Returns
        -------
        list of (key, float), or ndarray of float32, shape (number of keys,)
            Best first; of equal cosines, the key with the smaller row first. Without `topn`, all in the order of their
            rows, and also those that were never written.

        Raises
        ------
        UnknownKeyError
            A key has no row.
        ValueError
            Nothing is given, or the sum is all zeros; a vector of another shape; a negative position.
        TypeError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread. A row of zeros has a cosine of -1.

        Examples
        --------
        >>> table.most_similar(positive=[[-1.0, -2.0]], topn=1)[0][0]
        -5
        >>> table.most_similar([-5], topn=None).round(2)
        array([-1.,  1.], dtype=float32)
        """
        clip = (0, restrict_vocab) if restrict_vocab else (clip_start, clip_end)
        return words.most_similar(self._keyed, positive, negative, topn, clip)

    def most_similar_cosmul(
        self,
        positive: Words = None,
        negative: Words = None,
        topn: int | None = 10,
        restrict_vocab: int | None = None,
    ) -> list[tuple[Any, float]] | NDArray[np.float32]:
        """Find the keys with the greatest product of similarities (3CosMul), as gensim's method of this name does.

        Parameters
        ----------
        positive, negative : key, vector, or list of these, optional
            The similarities ``(1 + cosine) / 2`` with `positive` are multiplied, and divided by those with `negative`.
            At least one is positive. Keys that are given are no answer; weights are ignored.
        topn, restrict_vocab : int, optional
            As for `most_similar`.

        Returns
        -------
        list of (key, float), or ndarray of float32, shape (number of keys,)
            As for `most_similar`.

        Raises
        ------
        UnknownKeyError, ValueError, TypeError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError,
        OSError
            As `most_similar`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.most_similar_cosmul([[1.0, 2.0]], topn=None).shape
        (2,)
        """
        return words.most_similar_cosmul(self._keyed, positive, negative, topn, (0, restrict_vocab))

    def similar_by_vector(
        self, vector: ArrayLike, topn: int | None = 10, restrict_vocab: int | None = None
    ) -> list[tuple[Any, float]] | NDArray[np.float32]:
        """Find the keys nearest to a vector by cosine: `most_similar` with one vector.

        Parameters
        ----------
        vector : array_like of float, shape (embedding_dim,)
        topn, restrict_vocab : int, optional
            As for `most_similar`.

        Returns
        -------
        list of (key, float), or ndarray of float32, shape (number of keys,)
            As for `most_similar`.

        Raises
        ------
        ValueError, TypeError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `most_similar`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.similar_by_vector([-1.0, -2.0], topn=1)[0][0]
        -5
        """
        return words.most_similar(self._keyed, [vector], None, topn, (0, restrict_vocab))

    def similarity(self, key: Any, other: Any) -> float:  # noqa: ANN401
        """Return the cosine of the rows of two keys.

        Parameters
        ----------
        key, other : int, str or bytes

        Returns
        -------
        float
            0 if one of the rows is all zeros.

        Raises
        ------
        UnknownKeyError, TypeError, ValueError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError,
        OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> round(table.similarity(-5, -5), 6)
        1.0
        """
        return words.similarity(self._keyed, [key], [other])

    def n_similarity(self, keys: Sequence[Any], others: Sequence[Any]) -> float:
        """Return the cosine of the means of the rows of two lists of keys.

        Parameters
        ----------
        keys, others : sequence of int, str or bytes
            Not empty.

        Returns
        -------
        float
            0 if one of the means is all zeros.

        Raises
        ------
        ValueError
            A list is empty.
        UnknownKeyError, TypeError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.n_similarity([-5], [1234567890123])
        0.0
        """
        return words.similarity(self._keyed, keys, others)

    def distances(self, key_or_vector: Any, other_keys: KeysLike = ()) -> NDArray[np.float32]:  # noqa: ANN401
        """Return one minus the cosine with each of other keys, or with all.

        Parameters
        ----------
        key_or_vector : int, str or bytes, or array_like of float, shape (embedding_dim,)
        other_keys : array_like of int, str or bytes, optional
            All keys by default, in the order of their rows.

        Returns
        -------
        ndarray of float32, shape (number of these keys,)
            2 for rows of zeros.

        Raises
        ------
        UnknownKeyError
            A key has no row.
        ValueError
            The vector, or the row of the key, is all zeros.
        TypeError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.distances(-5, [1234567890123])
        array([2.], dtype=float32)
        """
        return words.distances(self._keyed, key_or_vector, other_keys)

    def closer_than(self, key: Any, other: Any) -> list[Any]:  # noqa: ANN401
        """List the keys that are closer to a key than another one is, by cosine, in the order of their rows.

        Parameters
        ----------
        key, other : int, str or bytes

        Returns
        -------
        list of int, str or bytes
            Without `key` itself.

        Raises
        ------
        UnknownKeyError, TypeError, ValueError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError,
        OSError
            As `distances`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.closer_than(-5, 1234567890123)
        []
        """
        return words.closer_than(self._keyed, key, other)

    def rank(self, key: Any, other: Any) -> int:  # noqa: ANN401
        """Return how many keys are closer to a key than another one is, plus one.

        Parameters
        ----------
        key, other : int, str or bytes

        Returns
        -------
        int

        Raises
        ------
        UnknownKeyError, TypeError, ValueError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError,
        OSError
            As `distances`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.rank(-5, 1234567890123)
        1
        """
        return len(words.closer_than(self._keyed, key, other)) + 1

    def doesnt_match(self, keys: Sequence[Any]) -> Any:  # noqa: ANN401
        """Return the key that is farthest from the mean of several, by cosine.

        Parameters
        ----------
        keys : sequence of int, str or bytes
            Keys without a row are left out, and logged.

        Returns
        -------
        int, str or bytes

        Raises
        ------
        ValueError
            None of the keys has a row.
        TypeError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError, OSError
            As `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.doesnt_match([-5, 1234567890123])
        1234567890123
        """
        return words.doesnt_match(self._keyed, keys)

    def evaluate_word_analogies(
        self,
        analogies: Lines,
        restrict_vocab: int | None = 300_000,
        case_insensitive: bool = True,
        dummy4unknown: bool = False,
    ) -> tuple[float, list[dict[str, Any]]]:
        """Measure how many analogies the words solve, such as ``Athens Greece Oslo Norway``.

        Parameters
        ----------
        analogies : path-like, or iterable of str
            A text file in UTF-8, or its lines: four words in a line, in sections that begin with ``: NAME``, like the
            ``questions-words.txt`` of word2vec.
        restrict_vocab : int, optional
            Use only the first keys.
        case_insensitive : bool
            Compare words in upper case; of several such keys, the first counts.
        dummy4unknown : bool
            Count analogies with unknown words as wrong, instead of leaving them out.

        Returns
        -------
        score : float
            The share of analogies that were solved.
        sections : list of dict
            For each section, and for all as ``"Total accuracy"``: its name, ``section``, and its ``correct`` and
            ``incorrect`` analogies, as tuples of words.

        Raises
        ------
        TypeError
            The keys are not strings.
        ValueError
            A line comes before any section.
        OSError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError
            The file cannot be read; as `lookup`.

        Notes
        -----
        Safe from any thread. All analogies share one pass over the table.

        Examples
        --------
        >>> spoken = store.create_vocabulary("spoken", key_type="string")
        >>> some = store.create_table("spoken", vocabulary="spoken", embedding_dim=2)
        >>> some.write(["one", "two", "first", "second"], [[1, 0.0], [2, 1.0], [0, 1.0], [1, 2.0]], create=True)
        >>> score, sections = some.evaluate_word_analogies([": ordinals", "one two first second"])
        >>> score, sections[-1]["correct"]
        (1.0, [('ONE', 'TWO', 'FIRST', 'SECOND')])
        """
        return evaluation.analogies(
            self._keyed, analogies, restrict_vocab, upper=case_insensitive, unknown_is_wrong=dummy4unknown
        )

    def evaluate_word_pairs(
        self,
        pairs: Lines,
        delimiter: str = "\t",
        restrict_vocab: int | None = 300_000,
        case_insensitive: bool = True,
        dummy4unknown: bool = False,
    ) -> tuple[Correlation, Correlation, float]:
        r"""Measure how well similarities of words agree with people's judgements, such as WordSim-353 or SimLex-999.

        Parameters
        ----------
        pairs : path-like, or iterable of str
            A text file in UTF-8, or its lines: two words and a number. Lines that begin with ``#`` are left out.
        delimiter : str
            Between the words and the number.
        restrict_vocab, case_insensitive
            As for `evaluate_word_analogies`.
        dummy4unknown : bool
            Take 0 for the similarity of pairs with unknown words, instead of leaving them out.

        Returns
        -------
        pearson, spearman : Correlation
            Named tuples: the coefficient, ``statistic``, and its two-sided ``pvalue``.
        oov_ratio : float
            How many of a hundred pairs have an unknown word.

        Raises
        ------
        TypeError
            The keys are not strings.
        ValueError
            No line has two known words and a number.
        OSError, StoreClosedError, TableNotFoundError, StaleReaderError, DiskFullError
            The file cannot be read; as `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> spoken = store.create_vocabulary("spoken", key_type="string")
        >>> some = store.create_table("spoken", vocabulary="spoken", embedding_dim=2)
        >>> some.write(["one", "two", "first", "second"], [[1, 0.0], [2, 1.0], [0, 1.0], [1, 2.0]], create=True)
        >>> judged = ["one\ttwo\t9", "one\tfirst\t2", "two\tsecond\t7"]
        >>> round(some.evaluate_word_pairs(judged)[1].statistic, 6)
        1.0
        """
        return evaluation.pairs(
            self._keyed,
            pairs,
            delimiter,
            restrict_vocab,
            upper=case_insensitive,
            unknown_is_wrong=dummy4unknown,
        )

    # ---- reading ahead

    def prefetch(self, keys: KeysLike, *, for_update: bool = False) -> None:
        """Start to read the rows of keys into memory, in the background; see `Table.prefetch`.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `Vocabulary.lookup`. Keys without a row are ignored.
        for_update : bool
            Also copy the rows to where an update changes them.

        Raises
        ------
        TypeError, ValueError, StoreClosedError, TableNotFoundError, StaleReaderError
            As `lookup`.
        ReadOnlyError
            `for_update` in a store that cannot be written.

        Notes
        -----
        Safe from any thread. The keys are looked up before the call returns; their rows are read afterwards.

        Examples
        --------
        >>> table.prefetch([-5, 99])
        """
        self._keyed.prefetch(keys, for_update=for_update)

    def warm(self, keys: KeysLike | None = None, *, progress: Progress = None) -> None:
        """Read the table into memory and wait for it; see `Table.warm`.

        Parameters
        ----------
        keys : array_like of int, str or bytes, optional
            Only the rows of these keys; those without a row are ignored. By default all of the table.
        progress : bool or callable, optional
            Show a bar on stderr, or call ``progress(bytes_done, bytes_in_all)``.

        Raises
        ------
        TypeError, ValueError, StoreClosedError, TableNotFoundError
            As `lookup`.
        ShardEmbError, OSError
            As `Table.warm`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.warm([-5, 99])
        """
        self._keyed.warm(keys, progress)

    # ---- changing

    def set_optimizer(self, optimizer: Optimizer) -> None:
        """Change the optimizer's hyper-parameters for the following updates; see `Table.set_optimizer`.

        Parameters
        ----------
        optimizer : Optimizer
            Of the same class as the table's and with the same initial state.

        Raises
        ------
        ValueError, ReadOnlyError, StoreClosedError, TableNotFoundError
            As `Table.set_optimizer`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits for other changes.

        Examples
        --------
        >>> table.set_optimizer(table.optimizer)
        """
        self._rows.set_optimizer(optimizer)

    def update(
        self,
        keys: KeysLike,
        grads: ArrayLike,
        *,
        padding_key: Any = None,  # noqa: ANN401
        scale_grad_by_freq: bool = False,
        missing: MissingChange = "error",
        create: bool = False,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """Take one optimizer step on the rows of keys: all of them change, or none; see `Table.update`.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `Vocabulary.lookup`. Gradients of duplicate keys are summed first.
        grads : array_like of float, shape ``keys.shape + (embedding_dim,)``
            float16, bfloat16, float32 or float64; the computation is in float32.
        padding_key : int, str or bytes, optional
            Gradients of this key, which has a row, are dropped. By default those of the row of the table's
            `Table.padding_idx` are, which keys without a row get if `missing` names it.
        scale_grad_by_freq : bool
            Divide the gradients of each row by how often its keys are in the batch; see `Table.update`.
        missing : {"error", "skip"} or int
            What happens to the gradients of keys without a row: ``"error"`` raises; ``"skip"`` ignores them; an int
            adds them to those of the row of that id.
        create : bool
            Give new keys rows first, as for `lookup`. If the update fails or is skipped after that, they keep them.
        scale : float, optional
            Divide the gradients by this number, and skip the step if any is not finite then; see `Table.update`.
        check_finite : bool
            Refuse NaN and infinity, unless there is a `scale`.

        Returns
        -------
        float or None
            With `scale`, the norm of the gradients; see `Table.update`.

        Raises
        ------
        UnknownKeyError
            A key, or the one of padding, has no row; the message names the first one.
        TypeError, ValueError
            Wrong type, dtype or shape; NaN or infinity; a missing key (null); the table has no optimizer.
        RowIdError, LearningRateError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError,
        DiskFullError, OSError
            As `Table.update`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `Table.update`.

        Examples
        --------
        >>> table.update([-5, 99], np.ones((2, 2), np.float32), missing="skip")
        """
        scaling = Scaling.of(scale)
        return self._keyed.change(
            keys,
            grads,
            Padding(padding_key, scale_grad_by_freq),
            missing=missing,
            create=create,
            scaling=scaling,
            check_finite=check_finite,
        )

    def update_bag(
        self,
        keys: KeysLike,
        offsets: ArrayLike | None,
        grads: ArrayLike,
        *,
        mode: Mode = "sum",
        weights: ArrayLike | None = None,
        padding_key: Any = None,  # noqa: ANN401
        include_last_offset: bool = False,
        scale_grad_by_freq: bool = False,
        missing: MissingChange = "error",
        create: bool = False,
        scale: float | None = None,
        check_finite: bool = True,
    ) -> float | None:
        """Take one optimizer step on the rows of bags of keys: all of them change, or none; see `Table.update_bag`.

        Parameters
        ----------
        keys, offsets : array_like
            As for `lookup_bag`; `offsets` is None for keys of two dimensions.
        grads : array_like of float, shape (bags, embedding_dim)
            The gradient by the result.
        mode, weights, padding_key, include_last_offset : optional
            As for `lookup_bag`.
        scale_grad_by_freq : bool
            As for `Table.update_bag`.
        missing : {"error", "skip"} or int
            What happens to the gradients of keys without a row, as for `update`. With ``"skip"`` such keys count for
            the mean, the root and the maximum as in ``lookup_bag(..., missing="zeros")``.
        create : bool
            Give new keys rows first, as for `lookup`. If the update fails after that, they keep them.
        scale : float, optional
            Divide the gradients by this number, and skip the step if any is not finite then; see `Table.update`.
        check_finite : bool
            Refuse NaN and infinity in `grads`, unless there is a `scale`, and in `weights`.

        Returns
        -------
        float or None
            With `scale`, the norm of the gradients of the rows; see `Table.update`.

        Raises
        ------
        UnknownKeyError
            A key, or the one of padding, has no row.
        TypeError, ValueError
            As `lookup_bag` and `Table.update_bag`; nothing was changed.
        RowIdError, ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `Table.update`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `Table.update`.

        Examples
        --------
        >>> table.update_bag([-5, 99, -5], [0, 2], np.ones((2, 2), np.float32), missing="skip")
        """
        given = Bags(keys, offsets, mode, weights, padding_key, include_last_offset)
        return keyed_bags.change_many(
            self._keyed.table.runtime,
            {self.name: self._keyed},
            {self.name: (given, grads)},
            missing=missing,
            create=create,
            scale_grad_by_freq=scale_grad_by_freq,
            scaling=Scaling.of(scale),
            check_finite=check_finite,
        )

    def write(
        self,
        keys: KeysLike,
        rows: ArrayLike,
        *,
        missing: MissingChange = "error",
        create: bool = False,
        check_finite: bool = True,
    ) -> None:
        """Overwrite the weights of keys; optimizer state stays; see `Table.write`.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `Vocabulary.lookup`; of duplicates the last wins.
        rows : array_like of float, shape ``keys.shape + (embedding_dim,)``
            float16, bfloat16, float32 or float64; stored as float32.
        missing : {"error", "skip"} or int
            As for `update`.
        create : bool
            As for `update`.
        check_finite : bool
            Refuse NaN and infinity.

        Raises
        ------
        UnknownKeyError, TypeError, ValueError, RowIdError
            As `update`; nothing was changed.
        ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `Table.write`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `Table.update`.

        Examples
        --------
        >>> table.write([-5], [[1.0, 2.0]])
        """
        self._keyed.change(keys, rows, None, missing=missing, create=create, check_finite=check_finite)

    def reset_rows(self, keys: KeysLike) -> None:
        """Make the rows of keys freshly initialised; see `Table.reset_rows`.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `Vocabulary.lookup`; they keep their rows.

        Raises
        ------
        UnknownKeyError, TypeError, ValueError
            As `lookup`; nothing was changed.
        ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `Table.reset_rows`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `Table.update`.

        Examples
        --------
        >>> table.reset_rows([-5])
        """
        self._keyed.reset(keys)

    def copy_rows(self, source: KeysLike, target: KeysLike) -> None:
        """Overwrite the rows of keys by those of others, with optimizer state and counters; see `Table.copy_rows`.

        Parameters
        ----------
        source : array_like of int, str or bytes
            The keys whose rows are copied.
        target : array_like of int, str or bytes, shape ``source.shape``
            The keys whose rows become like them; they have rows already.

        Raises
        ------
        UnknownKeyError, TypeError, ValueError
            A key has no row; the shapes differ. Nothing was changed.
        ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `Table.copy_rows`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `Table.update`.

        Examples
        --------
        >>> table.copy_rows([-5], [-5])
        """
        self._keyed.copy_rows(source, target)

    def swap_rows(self, keys: KeysLike, others: KeysLike) -> None:
        """Let the rows of keys change places with those of others; see `Table.swap_rows`.

        Parameters
        ----------
        keys, others : array_like of int, str or bytes
            As many of both, each of them once.

        Raises
        ------
        UnknownKeyError, TypeError, ValueError
            A key has no row; the shapes differ; a key occurs twice. Nothing was changed.
        ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError, OSError
            As `Table.swap_rows`; nothing was changed.

        Notes
        -----
        Safe from any thread; waits as `Table.update`.

        Examples
        --------
        >>> table.write([1, 2], [[1.0, 1.0], [2.0, 2.0]], create=True)
        >>> table.swap_rows([1], [2])
        >>> table.lookup([1, 2])
        array([[2., 2.],
               [1., 1.]], dtype=float32)
        """
        self._keyed.swap_rows(keys, others)

    def delete(self, keys: KeysLike) -> NDArray[np.int64]:
        """Take the rows of keys away, in all tables of their vocabulary; see `Vocabulary.remove`.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `Vocabulary.lookup`.

        Returns
        -------
        ndarray of int64, shape ``keys.shape``
            The rows that they had, -1 for keys that had none. The caller's own memory.

        Raises
        ------
        TypeError, ValueError
            As `Vocabulary.remove`.
        ReadOnlyError, StoreClosedError, VocabularyNotFoundError, PoisonedError, DiskFullError
            No key was removed.

        Notes
        -----
        Safe from any thread; waits for other changes. Other keys get these rows after the next commit.

        Examples
        --------
        >>> table.delete([1, 2]).size
        2
        """
        return self._keyed.keys.remove_keys(keys)

    def evict(
        self, *, older_than: int | None = None, keep: int | None = None, by: Literal["lru", "lfu"] = "lru"
    ) -> NDArray[Any]:
        """Remove keys that are of little use. Other keys get their rows after the next commit.

        In all tables of the vocabulary, these rows become freshly initialised: in memory only until `Store.commit`. A
        row that was never updated counts as the oldest and the least often updated.

        Parameters
        ----------
        older_than : int, optional
            Remove the keys whose rows were not updated in the last `older_than` steps of this table.
        keep : int, optional
            Remove all but `keep` keys.
        by : {"lru", "lfu"}
            Which keys to keep: those that were updated last, or those that were updated most often. Ties go to the
            lower row ids.

        Returns
        -------
        ndarray of int64, or of str or bytes objects, shape (n,)
            The removed keys, by ascending row; the caller's own memory.

        Raises
        ------
        TypeError, ValueError
            The table has no counters; not exactly one of `older_than` and `keep` was given; a number or `by` is
            invalid.
        ReadOnlyError, StoreClosedError, TableNotFoundError, PoisonedError, DiskFullError
            Nothing was changed.

        Notes
        -----
        Safe from any thread; other changes wait while all counters are read.

        Examples
        --------
        >>> table.evict(keep=1, by="lfu")
        array([1234567890123])
        """
        return self._keyed.evict(older_than=older_than, keep=keep, by=by)

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
            the other columns, by ascending row. Each batch owns its memory.

        Raises
        ------
        ValueError, StoreClosedError, TableNotFoundError
            As `Table.to_arrow_batches`.

        Notes
        -----
        Safe from any thread; one thread at a time may read from a reader.

        Examples
        --------
        >>> table.to_arrow_batches(columns=["count"]).read_all().column_names
        ['id', 'key', 'embedding', 'count']
        """
        from shardemb.exports import arrow

        return arrow.to_arrow_batches(self._keyed.source(self), columns=columns, rows=rows)

    def export(
        self,
        path: str | os.PathLike[str],
        format: str | Format | None = None,
        *,
        columns: Sequence[str] = (),
        rows: tuple[int, int] | None = None,
        where: KeysLike | None = None,
        changed_since: int | str | None = None,
        resume: bool = False,
        progress: Progress = None,
    ) -> ExportReport:
        """Write the rows that have keys, or some of them, to files of one of several formats; see `Table.export`.

        Parameters
        ----------
        path : path-like or str
            As for `Table.export`.
        format : str or shardemb.exports.Format, optional
            As for `Table.export`. word2vec's formats have the keys as tokens; .npy and safetensors files have them in
            ``NAME.tokens.txt`` beside the file, one a line.
        columns : sequence of str
            Optimizer state columns and counters to add; for parquet and Arrow.
        rows : tuple of two int, optional
            ``(start, stop)``, a half-open range of row ids; all rows by default.
        where : array_like, optional
            Only these rows: a bool for each row; or keys in any order, each of which is exported once.
        changed_since : str or int, optional
            Only keys that are new since a tag, or have another row or vector than in it, see `Store.changed_rows`; keys
            that are gone since are listed in ``NAME.removed.parquet`` beside the target. Or, given a step, only rows
            whose counter ``last_step`` is greater: those that were updated after that step of the table, which has
            counters. Rows that were written, reset or never updated since do not count then, and no table knows which
            keys were removed since a step.
        resume : bool
            Continue an export in parts that was interrupted: take over what it has completed, if the store is at the
            same commit and the same rows are asked for; otherwise a warning is logged, and all is written. Until all
            parts are there, the folder has no ``_SUCCESS``; if this one is interrupted, its complete parts stay.
        progress : bool or callable, optional
            True shows a bar; a function is called as ``progress(done, total)``, in rows.

        Returns
        -------
        ExportReport
            A frozen dataclass: path, files, num_rows, nbytes, and of the keys that are gone removed_path, num_removed.

        Raises
        ------
        UnknownKeyError
            A key of `where` has no row.
        TypeError, ValueError, ImportError, FileNotFoundError, FileExistsError, DiskFullError, OSError
            As `Table.export`.
        ShardEmbError
            Keys were removed meanwhile, and the format needs their number ahead.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.export(tmp / "users.vec").num_rows
        2
        >>> print((tmp / "users.vec").read_text())
        2 2
        1234567890123 0 0
        -5 -0.01 -0.02
        <BLANKLINE>
        >>> table.export(tmp / "changed.parquet", changed_since=0, columns=["count"]).num_rows
        1
        """
        from shardemb.exports import formats
        from shardemb.exports.selection import Query

        if isinstance(changed_since, str):
            changes = self.store.changed_keys(self.vocabulary.name, changed_since)
            among = np.union1d(self.store.changed_rows(self.name, changed_since), changes.rows)
            query = Query(rows, where, among=among, removed=self._keyed.keys.as_arrow(changes.removed))
        else:
            query = Query(rows, where, changed_since)
        source = self._keyed.source(self)
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
        """Write the rows that have keys to a parquet file, or to a folder of them; see `Table.export_parquet`.

        Parameters
        ----------
        path : path-like
            The file, on a local disk, or with `parts` the folder. What an earlier export has left there is replaced
            atomically; a folder with anything else in it is refused.
        columns : sequence of str
            Optimizer state columns and counters to add.
        rows : tuple of two int, optional
            ``(start, stop)``, a half-open range of row ids; all rows by default.
        parts : int, optional
            Write this many files, several at a time.
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
        TypeError, ValueError, FileNotFoundError, FileExistsError, DiskFullError
            As `Table.export_parquet`.
        StoreClosedError, TableNotFoundError
            As `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> table.export_parquet(tmp / "users.parquet").num_rows
        2
        """
        from shardemb.exports import parquet

        return parquet.export_parquet(
            self._keyed.source(self),
            path,
            columns=columns,
            rows=rows,
            parts=parts,
            encoding=encoding,
            progress=progress,
        )
