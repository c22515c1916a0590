"""Checks and conversions of user input, all in one place.

Everything below the public methods may rely on what this module returns: C-contiguous, aligned, writable NumPy arrays
of exactly the dtype that the kernels are compiled for. (They are writable only so that each kernel is compiled once:
to numba, a read-only array has another type. No kernel writes to its inputs.)

A check that fails raises before anything is changed. Its message names the value, its position and a way out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np

from shardemb.base.arrays import as_array, described, is_layer
from shardemb.errors import RowIdError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

T = TypeVar("T")

Float32Array: TypeAlias = "NDArray[np.float32]"
Int64Array: TypeAlias = "NDArray[np.int64]"

Rows: TypeAlias = "Callable[[int, int], Float32Array]"
"""Takes a range of rows, start and stop, and returns them, shape (stop - start, embedding_dim)."""


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a new table, where they are given: how many, and what returns a range of them."""

    count: int
    read: Rows


_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Ids:
    """Checked row ids.

    Attributes
    ----------
    flat : ndarray of int64, shape (n,)
        The ids in C order. May be the caller's own array, so it must not be written to.
    shape : tuple of int
        Their original shape.
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
        Every id must be in ``[0, num_embeddings)``.
    table : str
        The table's name, for the message.

    Raises
    ------
    TypeError
        The ids are not integers.
    ValueError
        An id is masked or null, or nested lists of ids have different lengths.
    RowIdError
        An id is negative or past the end; the message names the id and its position.
    """
    array = _as_array(ids, "iu", "row ids", table)
    if array.size == 0 and not isinstance(ids, np.ndarray):
        array = array.astype(np.int64)  # np.asarray([]) is float64
    if array.dtype.kind in "fO" and isinstance(ids, int | list | tuple | np.ndarray):
        # Python ints that no integer dtype can hold together are out of range, not of a wrong type.
        values = np.asarray(ids, dtype=object)
        if all(type(value) is int for value in values.flat):
            _refuse_ids(values, num_embeddings, table)
    if array.dtype.kind not in "iu":
        msg = (
            f"table {table!r}: row ids must be integers, got {described(ids, array)}; "
            f"convert them first, for example with ids.astype('int64')"
        )
        raise TypeError(msg)
    unsigned = array
    if array.dtype.kind == "i":  # one pass instead of two: as uint64, a negative id is larger than any table
        array = array.astype(np.int64, copy=False)
        unsigned = array.view(np.uint64)
    # argmax takes half as long as max, and these checks are much of the time of a small batch.
    if array.size and unsigned.item(unsigned.argmax()) >= num_embeddings:
        _refuse_ids(array, num_embeddings, table)
    flat = array.astype(np.int64, copy=False)
    if not flat.flags.carray:  # C-contiguous, aligned and writable
        flat = flat.copy()
    return Ids(flat.reshape(-1), array.shape)


def any_ids(ids: ArrayLike, table: str) -> Ids:
    """Check ids as `row_ids` does, whether or not there are such rows. Those beyond int64 become the largest."""
    if isinstance(ids, np.ndarray) and ids.dtype == np.uint64:
        ids = np.minimum(ids, np.uint64(2**63 - 1))
    return row_ids(ids, 2**64, table)


def _as_array(given: object, kinds: str, what: str, table: str) -> NDArray[Any]:
    """Return an array of the right kind as it is: to make the message alone would cost as much as a check."""
    if type(given) is np.ndarray and given.dtype.kind in kinds:
        return given
    return as_array(given, f"table {table!r}: {what}")


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
    values: ArrayLike,
    shape: tuple[int, ...],
    *,
    what: str,
    table: str,
    check_finite: bool,
    form: str = "ids.shape + (embedding_dim,)",
) -> Float32Array:
    """Check gradients or weights and bring them to float32.

    Parameters
    ----------
    values : array_like of float16, float32 or float64, or of bfloat16
        Must have exactly `shape`; nothing is broadcast.
    shape : tuple of int
        ``ids.shape + (embedding_dim,)``.
    what : str
        ``"gradients"`` or ``"rows"``, for the message.
    table : str
        The table's name, for the message.
    check_finite : bool
        Refuse NaN and infinity, including float64 values that become infinite in float32.
    form : str
        What makes up `shape`, for the message.

    Returns
    -------
    ndarray of float32, shape (n, embedding_dim)
        Flattened over the ids. May be the caller's own memory, so it must not be written to.

    Raises
    ------
    TypeError
        The dtype is none of these.
    ValueError
        Another shape; a value is masked or null; or, if `check_finite`, NaN or infinity.
    """
    array = _as_array(values, "f", what, table)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        if array.size or isinstance(values, np.ndarray):
            msg = (
                f"table {table!r}: {what} must be float16, float32 or float64, got {described(values, array)}"
            )
            raise TypeError(msg)
        array = array.astype(np.float32)
    if array.shape != shape:
        msg = f"table {table!r}: {what} have shape {array.shape}, but the ids ask for {shape} ({form})"
        raise ValueError(msg)
    converted = _as_float32(array)
    if check_finite:
        require_finite(converted, f"table {table!r}: {what}")
    return converted.reshape(-1, shape[-1])


def bag_bounds(
    offsets: ArrayLike | None, shape: tuple[int, ...], table: str, *, include_last_offset: bool
) -> Int64Array:
    """Check where the bags of a batch begin.

    Parameters
    ----------
    offsets : array_like of int, shape (bags,) or (bags + 1,)
        Where each bag begins among ids of one dimension; None for ids of two, each of whose rows is a bag.
    shape : tuple of int
        That of the ids.
    table : str
        The table's name, for the message.
    include_last_offset : bool
        Whether the last offset is where the last bag ends.

    Returns
    -------
    ndarray of int64, shape (bags + 1,)
        Where each bag begins, and the number of ids.

    Raises
    ------
    TypeError
        The offsets are not integers.
    ValueError
        They do not go with the ids, do not begin with 0 or do not ascend; or one is past the ids.
    """
    what = f"table {table!r}: offsets"
    if len(shape) == 2 and offsets is None:
        return np.arange(shape[0] + 1, dtype=np.int64) * shape[1]
    if len(shape) != 1 or offsets is None:
        given = "no offsets" if offsets is None else "offsets"
        msg = (
            f"table {table!r}: ids of shape {shape} with {given} are no bags: pass ids of one dimension and the "
            f"offsets at which bags begin, or ids of two dimensions without offsets, one bag a row"
        )
        raise ValueError(msg)
    array = as_array(offsets, what)
    if array.size == 0 and not isinstance(offsets, np.ndarray):
        array = array.astype(np.int64)  # np.asarray([]) is float64
    if array.dtype.kind not in "iu":
        msg = f"{what} must be integers, got {described(offsets, array)}; convert them first, for example to int64"
        raise TypeError(msg)
    if array.ndim != 1:
        msg = f"{what} have shape {array.shape}, but must have one dimension: where each bag begins"
        raise ValueError(msg)
    bounds = array.astype(np.int64)
    if (bounds.size or include_last_offset or shape[0]) and (not bounds.size or bounds[0] != 0):
        found = bounds[0] if bounds.size else "none"
        msg = f"{what} must begin with 0, where the first bag begins, got {found}"
        raise ValueError(msg)
    if not include_last_offset:
        bounds = np.append(bounds, shape[0])
    elif bounds[-1] != shape[0]:
        msg = (
            f"{what} end with {bounds[-1]}, but with include_last_offset=True the last is the number of ids, "
            f"which is {shape[0]}"
        )
        raise ValueError(msg)
    _require_ascending(bounds, shape[0], what)
    return bounds


def _require_ascending(bounds: Int64Array, count: int, what: str) -> None:
    descents = np.flatnonzero(np.diff(bounds) < 0)
    if not descents.size:
        return
    at = int(descents[0])
    if bounds[at] > count:
        msg = f"{what} reach past the ids: {bounds[at]} at position {at}, but there are {count} ids"
    else:
        msg = (
            f"{what} must ascend, got {bounds[at + 1]} at position {at + 1} after {bounds[at]}; "
            f"a bag without ids begins where the next one begins"
        )
    raise ValueError(msg)


def bag_weights(weights: ArrayLike, shape: tuple[int, ...], mode: str, table: str) -> Float32Array:
    """Check the weights of the rows of bags, one for each id, and bring them to float32.

    Raises
    ------
    TypeError
        They are not float16, bfloat16, float32 or float64.
    ValueError
        They have another shape than the ids; or the mode has no weights.
    """
    if mode == "max":
        msg = f'table {table!r}: the mode "max" takes no weights; leave them out, or choose "sum", "mean" or "sqrtn"'
        raise ValueError(msg)
    array = as_array(weights, f"table {table!r}: weights")
    if array.shape != shape:
        msg = f"table {table!r}: weights have shape {array.shape}, but the ids have {shape}: pass one for each id"
        raise ValueError(msg)
    checked = rows(array[..., np.newaxis], (*shape, 1), what="weights", table=table, check_finite=False)
    return checked.reshape(-1)


def padding_row(padding_idx: object, num_embeddings: int, table: str) -> int:
    """Check the row of padding; a negative one counts from the end.

    Raises
    ------
    TypeError
        Not an integer.
    ValueError
        The table has no such row.
    """
    if isinstance(padding_idx, bool) or not isinstance(padding_idx, int | np.integer):
        msg = f"table {table!r}: padding_idx must be one row id, got {padding_idx!r:.80}"
        raise TypeError(msg)
    if not -num_embeddings <= padding_idx < num_embeddings:
        msg = (
            f"table {table!r}: padding_idx {padding_idx} is no row: the table has {num_embeddings} rows, so it runs "
            f"from 0 to {num_embeddings - 1}, or from -1 down to {-num_embeddings}, counted from the end"
        )
        raise ValueError(msg)
    return int(padding_idx) % num_embeddings


def choice(value: T, allowed: Sequence[T], name: str, table: str) -> T:
    """Check a word of which there are a few.

    Raises
    ------
    TypeError, ValueError
        It is not a string; it is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        msg = f"table {table!r}: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r:.80}"
        raise (ValueError if isinstance(value, str) else TypeError)(msg)
    return value


@runtime_checkable
class Sliceable(Protocol):
    """An array that can be read a few rows at a time: of NumPy (also mapped), zarr, h5py or dask, or a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows and of columns."""

    @property
    def dtype(self) -> Any:  # noqa: ANN401
        """Type of the elements."""

    def __getitem__(self, rows: slice, /) -> Any:  # noqa: ANN401
        """Return a range of rows, as something that ``np.asarray`` accepts."""


def initial_rows(given: object, shape: tuple[int, int]) -> Rows:
    """Check the initial rows of a new table: an array, or a function that returns a range of rows.

    Parameters
    ----------
    given : Sliceable or array_like, shape (num_embeddings, embedding_dim), or callable
        Floats, also bfloat16, or integers that float32 holds exactly. A callable is ``f(start, stop)``, which returns
        an array of shape ``(stop - start, embedding_dim)``.
    shape : tuple of int
        ``(num_embeddings, embedding_dim)``.

    Returns
    -------
    callable
        ``rows(start, stop)`` returns that range of rows as float32. It reads no more of `given` than that, and may
        return the caller's own memory. It raises `ValueError` if a row holds NaN, infinity or an integer that float32
        cannot represent, or if a function returns another shape, and `TypeError` if the values are not real numbers.

    Raises
    ------
    TypeError
        `given` is neither of them, or does not hold real numbers.
    ValueError
        Another shape.
    """
    _require_no_scalar(given)
    if callable(given) and not isinstance(given, Sliceable):
        _require_function_of_ranges(given)
        return partial(_rows_of_function, given, shape[1])
    what = "initializer: the array"
    is_sliceable = isinstance(given, Sliceable) and not isinstance(given, np.ma.MaskedArray)
    source: Any = given if is_sliceable else as_array(given, what)
    # An empty range becomes a NumPy array of the right dtype, whatever library the array is from.
    _require_real_numbers(as_array(source[:0] if len(source.shape) else source, what), what, given)
    if tuple(source.shape) != shape:
        msg = (
            f"initializer: the array has shape {tuple(source.shape)}, but the table has "
            f"(num_embeddings, embedding_dim) = {shape}"
        )
        raise ValueError(msg)
    return partial(_rows_of_array, source)


def _require_no_scalar(given: object) -> None:
    """Refuse what other libraries take as an initializer, but is neither an array nor a function."""
    if isinstance(given, bool | int | float | np.number):
        advice = f"for rows that all hold it, pass shardemb.initializers.Constant({given})"
        msg = f"initializer: {given!r} is a number, not an array; {advice}"
        raise TypeError(msg)
    if isinstance(given, str | bytes | Mapping):
        msg = (
            f"initializer: {given!r:.80} is a {type(given).__name__}; pass an object of shardemb.initializers, "
            f"for example shardemb.initializers.Uniform(-0.05, 0.05)"
        )
        raise TypeError(msg)
    if is_layer(given):
        msg = f"initializer: {given!r:.80} is a layer, not an array; pass its weights, for example module.weight"
        raise TypeError(msg)


def _require_function_of_ranges(given: Callable[..., object]) -> None:
    try:
        inspect.signature(given).bind(0, 1)
        fits = not isinstance(given, type)
    except TypeError:
        fits = False
    except ValueError:  # a function written in C may have no signature
        fits = True
    if not fits:
        msg = (
            f"initializer must be one of shardemb.initializers, an array, or a function f(start, stop) that returns "
            f"those rows, got {given!r}"
        )
        raise TypeError(msg)


def _rows_of_function(
    function: Callable[[int, int], object], embedding_dim: int, start: int, stop: int
) -> Float32Array:
    try:
        given = function(start, stop)
    except Exception as error:
        error.add_note(
            f"initializer: the function was asked for rows {start} to {stop - 1}; no table was created"
        )
        raise
    what = f"initializer: the values of the function for rows {start} to {stop - 1}"
    block = as_array(given, what)
    if block.shape != (stop - start, embedding_dim):
        msg = (
            f"{what} have shape {block.shape}, but must have "
            f"(stop - start, embedding_dim) = {(stop - start, embedding_dim)}"
        )
        raise ValueError(msg)
    return _exact_rows(block, start, what)


def _rows_of_array(array: Sliceable, start: int, stop: int) -> Float32Array:
    block = as_array(array[start:stop], f"initializer: the array's rows from {start} on")
    if block.shape != (stop - start, array.shape[1]):
        msg = f"initializer: the array gave rows of shape {block.shape} when asked for rows {start} to {stop - 1}"
        raise ValueError(msg)
    return _exact_rows(block, start, "initializer: the array")


def _exact_rows(block: NDArray[Any], start: int, what: str) -> Float32Array:
    """Convert rows to float32, integers only without rounding. `start` is the number of the first row."""
    _require_real_numbers(block, what)
    converted = _as_float32(block)
    # Compared in longdouble, which holds every int64; float64 does not.
    if block.dtype.kind in "iu" and not np.array_equal(
        converted.astype(np.longdouble), block.astype(np.longdouble)
    ):
        msg = (
            f"{what} holds integers that float32 cannot represent, in rows {start} to {start + len(block) - 1}; "
            f"convert it first"
        )
        raise ValueError(msg)
    require_finite(converted, what, "", first_row=start)
    return converted


def _require_real_numbers(array: NDArray[Any], what: str, given: object = None) -> None:
    if array.dtype.kind not in "fiu":
        got = f"dtype {array.dtype}" if given is None else described(given, array)
        msg = f"{what} must hold real numbers, got {got}"
        raise TypeError(msg)


def is_raw(values: object, *, raw: bool) -> bool:
    """Whether rows are given as bytes. If they are to be `raw`, everything is, for `raw_rows` to judge."""
    return raw or str(getattr(values, "dtype", "")).removeprefix("torch.") == "uint8"


def raw_rows(values: ArrayLike, shape: tuple[int, ...], *, table: str) -> NDArray[np.uint8]:
    """Check rows that are given as bytes; return them flattened over the ids.

    Raises
    ------
    TypeError
        The dtype is not uint8.
    ValueError
        Another shape.
    """
    array = _as_array(values, "u", "rows", table)
    if array.size == 0 and not isinstance(values, np.ndarray):
        array = array.astype(np.uint8)
    if array.dtype != np.uint8:
        msg = f"table {table!r}: raw rows must be uint8, got {described(values, array)}"
        raise TypeError(msg)
    if array.shape != shape:
        msg = (
            f"table {table!r}: raw rows have shape {array.shape}, but the ids ask for {shape} "
            f"(ids.shape + (bytes of a row,))"
        )
        raise ValueError(msg)
    return np.require(array, np.uint8, ["C", "A", "W"]).reshape(-1, shape[-1])


_FLOAT32 = np.dtype(np.float32)


def output(out: NDArray[Any], shape: tuple[int, ...], dtype: np.dtype[Any] = _FLOAT32) -> NDArray[Any]:
    """Return `out` if the result can be written into it as it is.

    Raises
    ------
    TypeError
        Not an array of that dtype, or one with a mask.
    ValueError
        Another shape, not C-contiguous and aligned, or read-only.
    """
    is_array = isinstance(out, np.ndarray) and not isinstance(out, np.ma.MaskedArray)
    if not is_array or out.dtype != dtype:
        got = f"dtype {out.dtype}" if is_array else type(out).__name__
        msg = f"out must be a NumPy array of {dtype}, got {got}"
        raise TypeError(msg)
    if out.shape != shape:
        msg = f"out has shape {out.shape}, but the result has {shape}"
        raise ValueError(msg)
    if not (out.flags.c_contiguous and out.flags.aligned and out.flags.writeable):
        msg = (
            f"out must be C-contiguous, aligned and writable, for example np.empty(shape, {_written(dtype)})"
        )
        raise ValueError(msg)
    return out


def _written(dtype: np.dtype[Any]) -> str:
    """Return how a dtype is written in a program."""
    return f"{'np' if dtype.isbuiltin == 1 else 'ml_dtypes'}.{dtype}"


def number(value: object, name: str, *, minimum: float | None = None) -> float:
    """Check a real number given by the user: of Python or NumPy (not a bool), finite in float32.

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


def flag(value: object, name: str) -> bool:
    """Check a yes or no given by the user, of Python or NumPy.

    Raises
    ------
    TypeError
        It is neither.
    """
    if not isinstance(value, bool | np.bool_):
        msg = f"{name} must be True or False, got {value!r}"
        raise TypeError(msg)
    return bool(value)


def count(value: object, name: str, *, minimum: int = 1, maximum: int = 2**48) -> int:
    """Check a size given by the user: an integer (not a bool or float) within the limits.

    Raises
    ------
    TypeError
        Not an integer.
    ValueError
        Below `minimum` or above `maximum`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        msg = f"{name} must be an integer, got {value!r}"
        raise TypeError(msg)
    if not minimum <= value <= maximum:
        msg = f"{name} must be between {minimum} and {maximum}, got {value}"
        raise ValueError(msg)
    return int(value)


def _as_float32(array: NDArray[Any]) -> Float32Array:
    with np.errstate(over="ignore"):  # `require_finite` finds values that become infinite
        return np.require(array, np.float32, ["C", "A", "W"])


_CHECK_LESS = " (check_finite=False allows such values)"


def require_finite(array: Float32Array, what: str, way_out: str = _CHECK_LESS, *, first_row: int = 0) -> None:
    """Refuse NaN and infinity in the values that a change is made with.

    Raises
    ------
    ValueError
        A value is not finite; the message names its position.
    """
    # A sum of squares reads the values once, and is not finite if one of them is not. It also overflows if they are
    # large; then min and max, which are NaN if any value is, decide.
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
