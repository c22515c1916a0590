"""What every importer offers: a source of vectors, read as blocks of consecutive rows."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from shardemb.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
    from concurrent.futures import Future, ThreadPoolExecutor

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array

T = TypeVar("T")

BLOCK_BYTES = 16 * 2**20
"""About how many bytes of float32 a block has: enough for writes at the disk's rate, a small part of any memory."""

MAX_DIM = 2**16
"""Most values in a row, as in a table. It bounds the memory of a block, whatever a header says."""

_LISTED = 12
"""Most names that a message lists."""

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
    dtype: str
    key_type: Literal["string", "int64"] | None
    total: int
    unit: Literal["row", "byte"]

    @property
    def num_rows(self) -> int | None:
        """How many rows `blocks` yields; None if only reading tells."""

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


@runtime_checkable
class RowReader(Protocol):
    """A source without keys of which any rows can be read at any time, so that an import can be continued."""

    @property
    def num_rows(self) -> int:
        """How many rows there are."""

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


def checked_dim(dim: int, name: str, place: str = "") -> int:
    """Return the number of values in a row if a table can have so many."""
    if not 1 <= dim <= MAX_DIM:
        raise refuse(name, place, f"rows have {dim} values; a table has 1 to {MAX_DIM}")
    return dim


# ---- what a source is asked for ---------------------------------------------------------------------------------


def refuse_unused(name: str, options: ReadOptions, *used: str) -> None:
    """Raise `SourceError` if options are set that mean nothing for a source; `limit` means something for all."""
    for each in ("member", "columns", "unicode_errors"):
        given = getattr(options, each)
        if each not in used and given != getattr(ReadOptions(), each):
            raise refuse(
                name, "", f"{each}={given!r} means nothing for a source of this format; leave it out"
            )


def listed(names: Sequence[str]) -> str:
    """Return names for a message: the first of them, if there are many."""
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "") if names else "none"


def chosen(name: str, shapes: Mapping[str, tuple[int, ...]], member: str | None) -> list[str]:
    """Return which arrays of a source to read, in this order, and see that their rows have one length.

    Parameters
    ----------
    name : str
        Of the source, for messages.
    shapes : mapping of str to tuple of int
        All arrays that it has.
    member : str, optional
        As in `ReadOptions`; not needed if one array alone has two dimensions.

    Raises
    ------
    SourceError
        There are no such arrays, there are several, or they do not fit together.

    Examples
    --------
    >>> chosen("x", {"w.10": (3, 2), "w.9": (3, 2), "bias": (2,)}, "w.*")
    ['w.9', 'w.10']
    """
    if member is None:
        names = [each for each, shape in shapes.items() if len(shape) == 2]
        if len(names) != 1:
            every = [f"{each} {shape}" for each, shape in shapes.items() if not names or len(shape) == 2]
            problem = (
                f"{len(names) or 'no'} arrays have two dimensions, which takes a member: {listed(every)}"
            )
            raise refuse(name, "", problem if names else problem.replace(", which takes a member", ""))
    elif member in shapes or "*" not in member:
        names = [member]
    else:
        names = numbered(name, list(shapes), member)
    for each in names:
        if each not in shapes:
            raise refuse(name, "", f"has no {each!r}; it has {listed(list(shapes))}")
        if len(shapes[each]) != 2:
            problem = f"its shape is {shapes[each]}, and not (rows, values in a row); reshape it first"
            raise refuse(name, each, problem)
        checked_dim(shapes[each][1], name, each)
        if shapes[each][1] != shapes[names[0]][1]:
            problem = (
                f"rows have {shapes[each][1]} values, but those of {names[0]} have {shapes[names[0]][1]}"
            )
            raise refuse(name, each, problem)
    return names


def numbered(name: str, names: Sequence[str], pattern: str) -> list[str]:
    """Return the names that a pattern with one ``*`` fits, by ascending number, without a gap."""
    if pattern.count("*") != 1:
        raise refuse(name, "", f"member={pattern!r} has more than one *, which stands for a number")
    before, after = map(re.escape, pattern.split("*"))
    found = [
        (int(fit[1]), each) for each in names if (fit := re.fullmatch(f"{before}([0-9]{{1,9}}){after}", each))
    ]
    found.sort()
    if not found:
        raise refuse(name, "", f"no name fits {pattern!r}; it has {listed(names)}")
    for (number, one), (following, other) in pairwise(found):
        if following != number + 1:
            problem = (
                f"{pattern!r} fits {one} and then {other}: parts are missing between them, or there twice"
            )
            raise refuse(name, "", problem)
    return [each for _, each in found]


def ahead_of(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], T]], ahead: int) -> Generator[T]:
    """Iterate over what tasks return, while the next ones run: `ahead` of them were begun when one is waited for."""
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for each in waiting:
            each.cancel()
