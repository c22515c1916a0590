"""Keys that have rows, as users hold them.

Contracts only: each method is one call of `KeyRows`, which leads down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import pyarrow as pa
    from numpy.typing import ArrayLike, NDArray

    from shardemb.admission import Admission
    from shardemb.vocabulary.key_rows import KeyRows
    from shardemb.vocabulary.keys import KeysLike, KeyType


class Vocabulary:
    """Keys by row and rows by key; made by `Store.create_vocabulary`, found in `Store.vocabularies`.

    A new key gets the next row, in the order of first appearance, so that keys that came early, which are those that
    come often, lie together. Changes are part of the next commit, with those of the tables. Lookups may run in any
    number of threads; changes wait for each other.

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

    def __init__(self, rows: KeyRows) -> None:
        self._rows = rows

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
        """When a key earns its row; None: at once."""
        return self._rows.entry.admission

    @property
    def reserved(self) -> int:
        """Rows at the beginning that no key gets."""
        return self._rows.entry.reserved

    @property
    def num_rows(self) -> int:
        """Rows given out so far, those of no key by now included; all row ids lie below."""
        return self._rows.entry.rows

    def __len__(self) -> int:
        """Return the number of keys that have a row."""
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        """Tell whether one key has a row."""
        return bool(self.lookup([key])[0] >= 0)

    def __repr__(self) -> str:
        return f"Vocabulary {self.name!r}: {len(self):,} {self.key_type} keys"

    def stats(self) -> dict[str, int]:
        """Tell what the vocabulary takes in memory and on disk.

        Returns
        -------
        dict of str to int
            ``keys``; ``rows`` given out so far and those ``rows_free``; ``sightings`` of keys without a row;
            ``index_bytes_in_memory`` and ``index_bytes_on_disk``; ``pairs`` of the index, old ones included;
            ``bytes_on_disk`` of the keys and what belongs to them, without the index.

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
            By the type of the vocabulary, in any shape: a NumPy or Arrow array, a (nested) list, a single key.
        missing : int
            What stands for keys that have no row.

        Returns
        -------
        ndarray of int64, shape ``keys.shape``

        Raises
        ------
        TypeError, ValueError
            Keys of another type, or missing ones (null).
        StoreClosedError, VocabularyNotFoundError
            The store was closed; the vocabulary was dropped.

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
            In any shape.

        Returns
        -------
        ndarray of int64, or of str or bytes objects, shape ``row_ids.shape``

        Raises
        ------
        RowIdError
            A row has no key: it was never given out, was freed, or is reserved.
        TypeError, StoreClosedError, VocabularyNotFoundError
            As `lookup`.

        Examples
        --------
        >>> words.keys([[2]])
        array([['or']], dtype=object)
        """
        return self._rows.keys_of(row_ids)

    def to_arrow_batches(self) -> Iterator[pa.RecordBatch]:
        """Iterate over the keys in the order of their rows: ``row`` (int64) and ``key``, in bounded memory.

        Yields
        ------
        pyarrow.RecordBatch
            At most 65,536 rows, those without a key left out.

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
        """Find the rows of keys, and give new keys the next ones, in the order of first appearance.

        Rows of removed keys are given out first, once the removal is committed. With an `Admission`, a call is one
        sighting of each key for each time that it stands there, and those that have not earned a row yet get none.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `lookup`; the same key may stand there several times.

        Returns
        -------
        ndarray of int64, shape ``keys.shape``
            -1 for keys that are not admitted yet.

        Raises
        ------
        TypeError, ValueError, ReadOnlyError, StoreClosedError, VocabularyNotFoundError, DiskFullError
            No key was added.

        Examples
        --------
        >>> words.add(["that", "is"])
        array([4, 5])
        """
        return self._rows.add(keys)

    def remove(self, keys: KeysLike) -> NDArray[np.int64]:
        """Take the rows of keys away; other keys get them after the next commit.

        In the tables that are bound to the vocabulary these rows are as new: initial values, fresh state.

        Parameters
        ----------
        keys : array_like of int, str or bytes
            As for `lookup`.

        Returns
        -------
        ndarray of int64, shape ``keys.shape``
            The rows that they had; -1 for keys that had none.

        Raises
        ------
        TypeError, ValueError, ReadOnlyError, StoreClosedError, VocabularyNotFoundError, DiskFullError
            No key was removed.

        Examples
        --------
        >>> words.remove(["not", "unheard"])
        array([ 3, -1])
        """
        return self._rows.remove_keys(keys)
