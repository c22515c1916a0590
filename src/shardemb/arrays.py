"""Where user input is checked and coerced, and nowhere else.

Everything below the public methods may rely on what leaves this module: C-contiguous, aligned, writable NumPy
arrays of exactly the dtype that the kernels are compiled for. (Writable only so that a kernel is compiled once:
numba counts a read-only array as another type. No kernel writes to its inputs.)

A check that fails raises before anything was changed, and names the thing, the place and the way out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from shardemb.errors import RowIdError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Float32Array: TypeAlias = "NDArray[np.float32]"
Int64Array: TypeAlias = "NDArray[np.int64]"


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
    # One pass instead of two: as uint64 a negative id is larger than any table.
    unsigned = array.astype(np.int64, copy=False).view(np.uint64) if array.dtype.kind == "i" else array
    if array.size and int(unsigned.max()) >= num_embeddings:
        _refuse_ids(array, num_embeddings, table)
    flat = np.require(array, np.int64, ["C", "A", "W"]).reshape(-1)
    return Ids(flat, array.shape)


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


def initial_rows(values: object, shape: tuple[int, int]) -> Float32Array:
    """Check the array that a new table is to start from: floats, or integers that float32 holds exactly.

    Raises
    ------
    TypeError
        Not real numbers.
    ValueError
        Another shape than ``(num_embeddings, embedding_dim)``; NaN or infinity; an integer that float32 rounds.
    """
    array = np.asarray(values)
    if array.dtype.kind not in "fiu":
        msg = f"initializer: the array must hold real numbers, got dtype {array.dtype}"
        raise TypeError(msg)
    if array.shape != shape:
        msg = (
            f"initializer: the array has shape {array.shape}, but the table has "
            f"(num_embeddings, embedding_dim) = {shape}"
        )
        raise ValueError(msg)
    converted = _as_float32(array)
    # Compared in longdouble, which holds every int64, as float64 does not.
    if array.dtype.kind in "iu" and not np.array_equal(
        converted.astype(np.longdouble), array.astype(np.longdouble)
    ):
        msg = "initializer: the array holds integers that float32 cannot represent; convert it first"
        raise ValueError(msg)
    _require_finite(converted, "initializer: the array", "")
    return converted


def output(out: NDArray[Any] | None, shape: tuple[int, ...]) -> Float32Array:
    """Return `out` if it can take the result as it is, or a new array.

    Raises
    ------
    TypeError
        Not an array of float32.
    ValueError
        Another shape, not C-contiguous, or read-only.
    """
    if out is None:
        return np.empty(shape, np.float32)
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


def _require_finite(array: Float32Array, what: str, way_out: str) -> None:
    # A sum would overflow for large finite values; min and max do not, and they carry NaN along.
    if array.size == 0 or (np.isfinite(array.min()) and np.isfinite(array.max())):
        return
    first = int(np.flatnonzero(~np.isfinite(array.reshape(-1)))[0])
    at = tuple(int(i) for i in np.unravel_index(first, array.shape))
    msg = f"{what} hold {array[at]} at position {at}, as float32; nothing was changed{way_out}"
    raise ValueError(msg)
