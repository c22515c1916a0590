"""Keys that have rows, as users hold them.

Contracts only: each method is one call of `KeyRows`, which does the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from shardemb.admission import Admission
    from shardemb.vocabulary.key_rows import KeyRows
    from shardemb.vocabulary.keys import KeysLike, KeyType


class Vocabulary:
    """Keys by row and rows by key. Made by `Store.create_vocabulary`, found in `Store.vocabularies`.

    A new key gets the next row, in the order of first appearance. Keys that came early are mostly those that come
    often, so their rows lie together. Changes become part of the next commit, with those of the tables. A vocabulary
    can be iterated: over its keys, in the order of their rows. ``key in vocabulary`` says whether one key has a row.

    Thread safety: lookups may run in any number of threads, also concurrently with changes. Changes wait for each
    other.

    Examples
    --------
    >>> import shardemb
    >>> store = shardemb.open(tmp / "words.zarr")
    >>> words = store.create_vocabulary("words", key_type="string")
    >>> words.add(["to", "be", "or", "not", "to", "be"])
    array([0, 1, 2, 3, 0, 1])
    >>> words.lookup([["be"], ["that"]])
    array([[ 1],
           [-1]])
    >>> words.keys([3, 0])
    array(['not', 'to'], dtype=object)
    >>> words
    Vocabulary 'words': 4 string keys
    >>> commit = store.commit()
    >>> store.close()
    """

    def __init__(self, rows: KeyRows, store: object) -> None:
        self._rows = rows
        self._store = store  # it closes when nobody holds it

    # ---- what it is

    @property
    def name(self) -> str:
        """Name of the vocabulary within its store."""
        return self._rows.entry.name

    @property
    def key_type(self) -> KeyType:
        """``"int64"``, ``"string"`` or ``"bytes"``."""
        return self._rows.key_type

    @property
    def admission(self) -> Admission | None:
        """When a new key earns its row; None if immediately."""
        return self._rows.entry.admission

    @property
    def reserved(self) -> int:
        """Number of rows at the beginning that no key gets."""
        return self._rows.entry.reserved

    @property
    def num_rows(self) -> int:
        """Number of rows given out so far, reserved and freed ones included. All row ids are below it."""
        return self._rows.entry.rows

    def __len__(self) -> int:
        """Return the number of keys that have a row."""
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        """Return whether one key has a row."""
        if isinstance(key, list | tuple | np.ndarray):
            kind = type(key).__name__
            msg = f"vocabulary {self.name!r}: `in` takes one key, got a {kind}; look several up with lookup()"
            raise TypeError(msg)
        return bool(self.lookup([key])[0] >= 0)

    def __reduce__(self) -> NoReturn:
        msg = (
            f"vocabulary {self.name!r} cannot be pickled: it is memory of this process; in the other process open the "
            f'store with mode="r", and take vocabularies[{self.name!r}]'
        )
        raise TypeError(msg)

    def __repr__(self) -> str:
        return f"Vocabulary {self.name!r}: {len(self):,} {self.key_type} keys"

    def stats(self) -> dict[str, int]:
        """Return what the vocabulary takes in memory and on disk.

        Returns
        -------
        dict of str to int
            ``keys``; ``rows`` given out so far, and ``rows_free``, those of them whose key was removed; ``sightings``,
            the counted occurrences of keys without a row; ``pairs`` of the index, outdated ones included;
            ``index_bytes_in_memory`` and ``index_bytes_on_disk``; ``bytes_on_disk`` of the keys and what belongs to
            them, without the index.

        Raises
        ------
        StoreClosedError, VocabularyNotFoundError
            As `lookup`.

        Notes
        -----
        Safe from any thread.

        Examples
        --------
        >>> words.stats()["keys"]
        4
        """
        return self._rows.stats()

    # ---- reading

    def lookup(self, keys: KeysLike, *, missing: int = -1) -> NDArray[np.int64]:
        """Find the rows of keys.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            Keys of the vocabulary's type, in any shape: a NumPy or Arrow array, a (nested) list, a single key.
        missing : int
            The result for keys that have no row.

        Returns
        -------
        ndarray of int64, shape ``keys.shape``
            The caller's own memory.

        Raises
        ------
        TypeError, ValueError
            Keys of another type, or missing ones (null or masked); `missing` is not an integer.
        StoreClosedError, VocabularyNotFoundError
            The store was closed; the vocabulary was dropped.
        StaleReaderError
            The store was opened for reading, and another writer has opened it since: call `Store.refresh`.

        Notes
        -----
        Safe from any thread, also concurrently with changes.

        Examples
        --------
        >>> words.lookup(["be", "that"], missing=0)
        array([1, 0])
        """
        return self._rows.lookup(keys, missing=missing)

    def keys(self, row_ids: ArrayLike) -> NDArray[Any]:
        """Find the keys of rows.

        Parameters
        ----------
        row_ids : array_like of int
            Row ids of any integer dtype and any shape.

        Returns
        -------
        ndarray of int64, or of str or bytes objects, shape ``row_ids.shape``
            The caller's own memory.

        Raises
        ------
        RowIdError
            A row has no key: it is past the end or reserved, or its key was removed.
        TypeError
            The ids are not integers.
        StoreClosedError, VocabularyNotFoundError, StaleReaderError
            As `lookup`.

        Notes
        -----
        Safe from any thread, also concurrently with changes.

        Examples
        --------
        >>> words.keys([[2]])
        array([['or']], dtype=object)
        """
        return self._rows.keys_of(row_ids)

    def to_arrow_batches(self) -> Iterator[pa.RecordBatch]:
        """Iterate over the keys in the order of their rows, in bounded memory.

        Yields
        ------
        pyarrow.RecordBatch
            ``row: int64``, and ``key`` (int64, large_string or large_binary), of at most 65,536 rows; rows without a
            key are left out. Each batch owns its memory. Keys are as they are when their batch is read.

        Raises
        ------
        StoreClosedError, VocabularyNotFoundError, StaleReaderError
            As `lookup`, when a batch is asked for.

        Notes
        -----
        Safe from any thread, also concurrently with changes; one thread at a time may use an iterator.

        Examples
        --------
        >>> next(words.to_arrow_batches()).column("key").to_pylist()
        ['to', 'be', 'or', 'not']
        """
        return self._rows.arrow_batches()

    def __iter__(self) -> Iterator[Any]:
        for each in self.to_arrow_batches():
            yield from each.column("key").to_pylist()

    # ---- changing

    def add(self, keys: KeysLike) -> NDArray[np.int64]:
        """Find the rows of keys, and give new keys the next rows, in the order of first appearance.

        Rows of removed keys are given out first, once the removal is committed. With an `Admission`, each occurrence of
        a key in `keys` counts, and keys that have not earned a row yet get none.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `lookup`; the same key may occur several times.

        Returns
        -------
        ndarray of int64, shape ``keys.shape``
            The row of each key, -1 for keys that are not admitted yet. The caller's own memory.

        Raises
        ------
        TypeError, ValueError
            As `lookup`.
        ShardEmbError
            The vocabulary, or a table that grows with it, would have too many files.
        ReadOnlyError, StoreClosedError, VocabularyNotFoundError, PoisonedError, DiskFullError
            No key was added.

        Notes
        -----
        Safe from any thread; waits for other changes, and for a fold when a table has to grow.

        Examples
        --------
        >>> words.add(["that", "is"])
        array([4, 5])
        """
        return self._rows.add(keys)

    def remove(self, keys: KeysLike) -> NDArray[np.int64]:
        """Take the rows of keys away. Other keys get them after the next commit.

        In all tables of the vocabulary, these rows become freshly initialised: in memory only until `Store.commit`.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `lookup`.

        Returns
        -------
        ndarray of int64, shape ``keys.shape``
            The rows that they had, -1 for keys that had none. The caller's own memory.

        Raises
        ------
        TypeError, ValueError
            As `lookup`.
        ReadOnlyError, StoreClosedError, VocabularyNotFoundError, PoisonedError, DiskFullError
            No key was removed.

        Notes
        -----
        Safe from any thread; waits for other changes.

        Examples
        --------
        >>> words.remove(["not", "unheard"])
        array([ 3, -1])
        """
        return self._rows.remove_keys(keys)
