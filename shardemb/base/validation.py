"""Where user input is checked and coerced, and nowhere else.

Everything below the public methods may rely on what leaves this module: C-contiguous, aligned, writable NumPy
arrays of exactly the dtype that the kernels are compiled for. (Writable only so that a kernel is compiled once:
numba counts a read-only array as another type. No kernel writes to its inputs.)

A check that fails raises before anything was changed, and names the thing, the place and the way out.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from shardemb.errors import RowIdError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike, NDArray

Float32Array: TypeAlias = "NDArray[np.float32]"
Int64Array: TypeAlias = "NDArray[np.int64]"

Rows: TypeAlias = "Callable[[int, int], Float32Array]"
"""Takes a range of rows, start and stop, and returns them, shape (stop - start, embedding_dim)."""


_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Ids:
    """Checked row ids.

    Attributes
    ----------
    flat : ndarray of int64, shape (n,)
        The ids in C order. May be the caller's own array: read only, by agreement.
    shape : tuple of int
        The shape in which they came.
    """

    flat: Int64Array
    shape: tuple[int, ...]


def row_ids(ids: ArrayLike, num_embeddings: int, table: str) -> Ids:
    """Check row ids of any integer dtype and any shape.

    Parameters
    ----------
    ids : array_like of int
        Arrays, nested lists, a single int. An empty list is fine; bool and float are refused.
    num_embeddings : int
        Ids must lie in ``[0, num_embeddings)``.
    table : str
        The table's name, for the message.

    Raises
    ------
    TypeError
        The ids are not integers.
    RowIdError
        An id is negative or past the end; the message names the id and its position.
    """
    array = np.asarray(ids)
    if array.size == 0 and not isinstance(ids, np.ndarray):
        array = array.astype(np.int64)  # np.asarray([]) is float64
    if array.dtype.kind in "fO":
        # Python ints too large for int64, or for one integer dtype together: out of range, not of a wrong type.
        values = np.asarray(ids, dtype=object)
        if all(type(value) is int for value in values.flat):
            _refuse_ids(values, num_embeddings, table)
    if array.dtype.kind not in "iu":
        msg = (
            f"table {table!r}: row ids must be integers, got dtype {array.dtype}; "
            f"convert them first, for example with ids.astype('int64')"
        )
        raise TypeError(msg)
    unsigned = array
    if array.dtype.kind == "i":  # one pass instead of two: as uint64 a negative id is larger than any table
        array = array.astype(np.int64, copy=False)
        unsigned = array.view(np.uint64)
    # Half of what `max` takes, and of a small batch checks are much of the time.
    if array.size and unsigned.item(unsigned.argmax()) >= num_embeddings:
        _refuse_ids(array, num_embeddings, table)
    flat = array.astype(np.int64, copy=False)
    if not flat.flags.carray:  # C-contiguous, aligned and writable
        flat = flat.copy()
    return Ids(flat.reshape(-1), array.shape)


def _refuse_ids(array: NDArray[Any], num_embeddings: int, table: str) -> None:
    bad = np.flatnonzero(((array < 0) | (array >= num_embeddings)).reshape(-1))
    if bad.size == 0:
        return
    at = tuple(int(i) for i in np.unravel_index(int(bad[0]), array.shape))
    value = int(array[at])
    place = f" at position {at[0] if len(at) == 1 else at}" if at else ""
    reason = "is negative" if value < 0 else "is past the end"
    more = f" ({bad.size - 1} more ids are out of range too)" if bad.size > 1 else ""
    msg = (
        f"row id {value}{place} {reason}: table {table!r} has {num_embeddings} rows, "
        f"so ids run from 0 to {num_embeddings - 1}{more}"
    )
    raise RowIdError(msg)


def rows(
    values: ArrayLike, shape: tuple[int, ...], *, what: str, table: str, check_finite: bool
) -> Float32Array:
    """Check gradients or weights and bring them to float32.

    Parameters
    ----------
    values : array_like of float16, float32 or float64
        Must have exactly `shape`; nothing is broadcast.
    shape : tuple of int
        ``ids.shape + (embedding_dim,)``.
    what : str
        ``"gradients"`` or ``"rows"``, for the message.
    table : str
        The table's name, for the message.
    check_finite : bool
        Refuse NaN and infinity, also those that float64 values become in float32.

    Returns
    -------
    ndarray of float32, shape (n, embedding_dim)
        Flattened over the ids. May be the caller's own memory: read only, by agreement.

    Raises
    ------
    TypeError
        Not floating point.
    ValueError
        Another shape; or NaN or infinity while `check_finite` is set.
    """
    array = np.asarray(values)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        if array.size or isinstance(values, np.ndarray):
            msg = f"table {table!r}: {what} must be float16, float32 or float64, got dtype {array.dtype}"
            raise TypeError(msg)
        array = array.astype(np.float32)
    if array.shape != shape:
        msg = (
            f"table {table!r}: {what} have shape {array.shape}, but the ids ask for {shape} "
            f"(ids.shape + (embedding_dim,))"
        )
        raise ValueError(msg)
    converted = _as_float32(array)
    if check_finite:
        _require_finite(converted, f"table {table!r}: {what}", " (check_finite=False lets such values in)")
    return converted.reshape(-1, shape[-1])


@runtime_checkable
class Sliceable(Protocol):
    """What is read like an array a few rows at a time: NumPy's, also mapped ones, zarr's, h5py's, dask's, tensors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Numbers of rows and columns."""

    @property
    def dtype(self) -> Any:  # noqa: ANN401
        """Type of the elements."""

    def __getitem__(self, rows: slice, /) -> Any:  # noqa: ANN401
        """Return a range of rows, as something that NumPy makes an array of."""


def initial_rows(given: object, shape: tuple[int, int]) -> Rows:
    """Check what a new table is to start from: an array, or a function of ranges of rows.

    Parameters
    ----------
    given : Sliceable or array_like, shape (num_embeddings, embedding_dim), or callable
        Floats, or integers that float32 holds exactly. A callable is ``f(start, stop)``, which returns an array of
        shape ``(stop - start, embedding_dim)``.
    shape : tuple of int
        ``(num_embeddings, embedding_dim)``.

    Returns
    -------
    callable
        ``rows(start, stop)``: that range of the rows, as float32. Reads no more of `given` than that; may return the
        caller's own memory. Raises `ValueError` where a row holds NaN, infinity or an integer that float32 rounds,
        or a function returned another shape; `TypeError` for what are no real numbers.

    Raises
    ------
    TypeError
        Neither of them, or not real numbers.
    ValueError
        Another shape.
    """
    if callable(given) and not isinstance(given, Sliceable):
        _require_function_of_ranges(given)
        return partial(_rows_of_function, given, shape[1])
    source = given if isinstance(given, Sliceable) else np.asarray(given)
    # A range without rows tells its type to NumPy, whatever library it is from.
    _require_real_numbers(np.asarray(source[:0] if len(source.shape) else source), "initializer: the array")
    if tuple(source.shape) != shape:
        msg = (
            f"initializer: the array has shape {tuple(source.shape)}, but the table has "
            f"(num_embeddings, embedding_dim) = {shape}"
        )
        raise ValueError(msg)
    return partial(_rows_of_array, source)


def _require_function_of_ranges(given: Callable[..., object]) -> None:
    try:
        inspect.signature(given).bind(0, 1)
        fits = not isinstance(given, type)
    except TypeError:
        fits = False
    except ValueError:  # a function written in C may not tell
        fits = True
    if not fits:
        msg = (
            f"initializer must be one of shardemb.initializers or an array or a function f(start, stop) that returns "
            f"those rows, got {given!r}"
        )
        raise TypeError(msg)


def _rows_of_function(
    function: Callable[[int, int], object], embedding_dim: int, start: int, stop: int
) -> Float32Array:
    try:
        block = np.asarray(function(start, stop))
    except Exception as error:
        error.add_note(
            f"initializer: the function was asked for rows {start} to {stop - 1}; no table was created"
        )
        raise
    what = f"initializer: of the function for rows {start} to {stop - 1}, the values"
    if block.shape != (stop - start, embedding_dim):
        msg = (
            f"{what} have shape {block.shape}, but must have "
            f"(stop - start, embedding_dim) = {(stop - start, embedding_dim)}"
        )
        raise ValueError(msg)
    return _exact_rows(block, start, what)


def _rows_of_array(array: Sliceable, start: int, stop: int) -> Float32Array:
    block = np.asarray(array[start:stop])
    if block.shape != (stop - start, array.shape[1]):
        msg = f"initializer: the array gave rows of shape {block.shape} when asked for rows {start} to {stop - 1}"
        raise ValueError(msg)
    return _exact_rows(block, start, "initializer: the array")


def _exact_rows(block: NDArray[Any], start: int, what: str) -> Float32Array:
    """Bring rows from `start` on to float32, integers without rounding."""
    _require_real_numbers(block, what)
    converted = _as_float32(block)
    # Compared in longdouble, which holds every int64, as float64 does not.
    if block.dtype.kind in "iu" and not np.array_equal(
        converted.astype(np.longdouble), block.astype(np.longdouble)
    ):
        msg = (
            f"{what} holds integers that float32 cannot represent, in rows {start} to {start + len(block) - 1}; "
            f"convert it first"
        )
        raise ValueError(msg)
    _require_finite(converted, what, "", first_row=start)
    return converted


def _require_real_numbers(array: NDArray[Any], what: str) -> None:
    if array.dtype.kind not in "fiu":
        msg = f"{what} must hold real numbers, got dtype {array.dtype}"
        raise TypeError(msg)


def output(out: NDArray[Any], shape: tuple[int, ...]) -> Float32Array:
    """Return `out` if it can take the result as it is.

    Raises
    ------
    TypeError
        Not an array of float32.
    ValueError
        Another shape, not C-contiguous, or read-only.
    """
    if not isinstance(out, np.ndarray) or out.dtype != np.float32:
        got = f"dtype {out.dtype}" if isinstance(out, np.ndarray) else type(out).__name__
        msg = f"out must be a NumPy array of float32, got {got}"
        raise TypeError(msg)
    if out.shape != shape:
        msg = f"out has shape {out.shape}, but the result has {shape}"
        raise ValueError(msg)
    if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
        msg = "out must be C-contiguous, aligned and writable, for example np.empty(shape, np.float32)"
        raise ValueError(msg)
    return out


def number(value: object, name: str, *, minimum: float | None = None) -> float:
    """Check a real number given by the user: a Python or NumPy one (no bool), finite in float32.

    Raises
    ------
    TypeError
        Not a real number.
    ValueError
        Less than `minimum`; or NaN, infinite, or too large for float32.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        msg = f"{name} must be a number, got {value!r}"
        raise TypeError(msg)
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not abs(result) <= _FLOAT32_MAX:
        msg = f"{name} must be finite in float32, got {value}"
        raise ValueError(msg)
    if minimum is not None and result < minimum:
        msg = f"{name} must be at least {minimum:g}, got {value}"
        raise ValueError(msg)
    return result


def count(value: object, name: str, *, minimum: int = 1, maximum: int = 2**48) -> int:
    """Check a size given by the user: an int (no bool, no float) within the limits.

    Raises
    ------
    TypeError
        Not an integer.
    ValueError
        Out of the limits.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        msg = f"{name} must be an integer, got {value!r}"
        raise TypeError(msg)
    if not minimum <= value <= maximum:
        msg = f"{name} must be between {minimum} and {maximum}, got {value}"
        raise ValueError(msg)
    return int(value)


def _as_float32(array: NDArray[Any]) -> Float32Array:
    with np.errstate(over="ignore"):  # what becomes infinite is found by `_require_finite`
        return np.require(array, np.float32, ["C", "A", "W"])


def _require_finite(array: Float32Array, what: str, way_out: str, *, first_row: int = 0) -> None:
    # A sum of squares reads the values once, and is not finite if one is not; it overflows for large ones, where min
    # and max, which carry NaN along, tell.
    flat = array.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.dot(flat, flat)
    if np.isfinite(squares) or (np.isfinite(flat.min()) and np.isfinite(flat.max())):
        return
    first = int(np.flatnonzero(~np.isfinite(flat))[0])
    at = tuple(int(i) for i in np.unravel_index(first, array.shape))
    place = (at[0] + first_row, *at[1:])
    msg = f"{what} hold {array[at]} at position {place}, as float32; nothing was changed{way_out}"
    raise ValueError(msg)
