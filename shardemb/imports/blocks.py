"""What every importer offers: a source of vectors, read as blocks of consecutive rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from shardemb.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array

BLOCK_BYTES = 16 * 2**20
"""About how many bytes of float32 a block has: enough for writes at the disk's rate, a small part of any memory."""

UnicodeErrors = Literal["strict", "replace", "ignore"]


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read; every importer takes these, and refuses with `SourceError` what it has no use for.

    Attributes
    ----------
    limit : int, optional
        At most so many rows, from the first on.
    member : str, optional
        Which array, tensor or dataset, where a file has several. ``*`` stands for a number: the tensors ``w.0``,
        ``w.1`` and so on are parts of one table, joined by ascending number.
    columns : tuple of str
        Names of columns, where a source has some: of the vectors, or of the keys and the vectors.
    unicode_errors : {"strict", "replace", "ignore"}
        What becomes of tokens that are not UTF-8; see `bytes.decode`.
    """

    limit: int | None = None
    member: str | None = None
    columns: tuple[str, ...] = ()
    unicode_errors: UnicodeErrors = "strict"


class Block(NamedTuple):
    """Consecutive rows of a source.

    Attributes
    ----------
    rows : ndarray of float32
        Shape (n, dim), C-contiguous; nobody else changes them.
    keys : pyarrow.Array, ndarray of int64 or None
        One key a row, if the source has any.
    first : int
        The number of the first row in the source.
    consumed : int
        How much of the source was read for this block, in its `unit`.
    """

    rows: Float32Array
    keys: Any
    first: int
    consumed: int


class VectorSource(Protocol):
    """An open source of vectors. A context manager, which closes it.

    Attributes
    ----------
    format : str
        ``"npy"``, for example.
    name : str
        What messages call it: a path, or the type of an object.
    dim : int
        Values in a row.
    num_rows : int or None
        How many rows `blocks` yields; None if only reading tells.
    dtype : str
        The name in `shardemb.dtypes` of what would hold the rows without loss: ``"float32"`` for everything else.
    key_type : {"string", "int64"} or None
        What the keys are, if there are any.
    total : int
        What all blocks consume together, as far as it is known; 0 otherwise.
    unit : {"row", "byte"}
        What is counted by `total` and `Block.consumed`.
    """

    format: str
    name: str
    dim: int
    num_rows: int | None
    dtype: str
    key_type: Literal["string", "int64"] | None
    total: int
    unit: Literal["row", "byte"]

    def blocks(self) -> Iterator[Block]:
        """Read the rows, once, in order.

        Raises
        ------
        SourceError
            The source is not what it claims to be. The message names the source, the line or byte, and the row.
        """

    def key_blocks(self) -> Iterator[Any] | None:
        """Read the keys of all rows, before `blocks`, where that takes much less than reading the rows; else None.

        Raises
        ------
        SourceError
            As `blocks`.
        """

    def close(self) -> None:
        """Close the source."""

    def __enter__(self) -> VectorSource: ...

    def __exit__(self, *error: object) -> None: ...


class RowReader(Protocol):
    """A source without keys of which any rows can be read at any time, so that an import can be continued."""

    num_rows: int

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Read rows ``[start, stop)``: float32, shape (stop - start, dim). Safe from several threads."""


def block_rows(dim: int) -> int:
    """Return how many rows of `dim` values a block has."""
    return max(1, BLOCK_BYTES // (4 * dim))


def refuse(name: str, place: str, problem: str) -> SourceError:
    """Return the error for a source that cannot be read: where it is, and what is wrong there.

    Examples
    --------
    >>> str(refuse("glove.txt", "line 3", "7 numbers, but the first row has 50"))
    'glove.txt, line 3: 7 numbers, but the first row has 50'
    """
    return SourceError(f"{name}, {place}: {problem}" if place else f"{name}: {problem}")
