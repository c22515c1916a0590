"""Arrays of any library, as arrays of NumPy: tensors, masked arrays, Arrow arrays, nested lists.

A conversion never loses what NumPy cannot hold, such as a mask or nulls: it refuses. No other library is imported here;
an object that comes from one is recognised by its class or its methods.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.errors import ShardEmbError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SMALL_FLOATS = ("bfloat16", "float8_", "float6_", "float4_")
"""Beginnings of the names of the dtypes that the package ml_dtypes adds to NumPy's floats; float32 holds each."""


def as_array(given: object, what: str) -> NDArray[Any]:
    """Return what a caller gave as an array, without a copy where NumPy can share its memory.

    Tensors that require a gradient are taken as they are now, as ``tensor.detach()`` does. Floats that NumPy does not
    know, like bfloat16, become float32, which holds all of them exactly.

    Parameters
    ----------
    given : object
        An array or tensor of any library that is in the main memory, a (nested) list, a number.
    what : str
        What it is, for the message: ``"table 't': row ids"``.

    Raises
    ------
    TypeError
        It cannot be read as an array: a tensor on another device, Arrow lists.
    ValueError
        A value is masked or null, or nested lists have different lengths.
    """
    if type(given) is np.ndarray and given.dtype.kind != "V":
        return given
    if hasattr(given, "__dask_graph__"):  # converted by dask, a result would have lost its mask
        given = given.compute()  # type: ignore[attr-defined]
    _refuse_masks(given, what)
    _refuse_nulls(given, what)
    _refuse_arrow_lists(given, what)
    given = _readable(given)
    try:
        # Not `asarray`: what the conversion makes may be a masked array, whose mask that would drop.
        array = np.asanyarray(given)
    except ShardEmbError:  # from a table of a store, read as an array
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        if (place := _ragged(given)) is not None:
            msg = f"{what}: {place}; nested lists must have the same length: pad them, or pass one flat list"
            raise ValueError(msg) from error
        # Libraries raise errors of many types, whose texts name neither the table nor the argument.
        way_out = "; copy it to the main memory first: tensor.cpu()" if _is_elsewhere(given) else ""
        msg = f"{what}: {_name_of(given)} cannot be read as a NumPy array{way_out} ({error})"
        raise TypeError(msg) from error
    _refuse_masks(array, what)
    if _is_small_float(array.dtype):
        array = array.astype(np.float32)
    return np.asarray(array)


def described(given: object, array: NDArray[Any]) -> str:
    """Describe for a message what was given where an array of another dtype is needed."""
    if isinstance(given, np.ndarray | list | tuple) or array.dtype != np.object_:
        return f"dtype {array.dtype}"
    advice = "; pass its weights, for example module.weight" if is_layer(given) else ""
    return f"dtype {array.dtype}, made from {_name_of(given)}{advice}"


def is_layer(given: object) -> bool:
    """Return whether something is a layer or model of torch or keras, which holds weights but is no array."""
    return any(hasattr(given, name) for name in ("state_dict", "get_weights"))


def _name_of(given: object) -> str:
    kind = type(given)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


# ---- what NumPy would lose --------------------------------------------------------------------------------------


def _refuse_masks(given: object, what: str) -> None:
    if isinstance(given, list | tuple):
        kinds = set(map(type, given))
        if any(issubclass(kind, list | tuple | np.ma.MaskedArray) for kind in kinds):
            for each in given:
                _refuse_masks(each, what)
    if not isinstance(given, np.ma.MaskedArray):
        return
    mask = np.ma.getmaskarray(given)
    if mask.any():
        first = np.flatnonzero(mask.reshape(-1))[0]
        at = tuple(int(i) for i in np.unravel_index(first, mask.shape))
        place = f", the first at position {at[0] if len(at) == 1 else at}" if at else ""
        msg = (
            f"{what}: {np.count_nonzero(mask)} of {mask.size} values are masked{place}, and nothing here keeps a mask: "
            f"leave them out, or fill them with array.filled(value)"
        )
        raise ValueError(msg)


def _refuse_nulls(given: object, what: str) -> None:
    """Refuse columns and tables of Arrow, polars and pandas with nulls, which would become NaN."""
    count = _count_nulls(given)
    if count:
        msg = f"{what}: {count} values are missing (null), and would become NaN; drop or fill them first"
        raise ValueError(msg)


def _count_nulls(given: object) -> int:
    if _comes_from(given, "pyarrow") and hasattr(given, "itercolumns"):
        return sum(map(_count_nulls, given.itercolumns()))
    nulls: Any = getattr(given, "null_count", None)  # Arrow has a number, polars a method
    if nulls is None and _comes_from(given, "pandas") and hasattr(given, "isna"):
        return _count_nulls_of_pandas(given)
    return 0 if nulls is None else int(np.sum(np.asarray(nulls() if callable(nulls) else nulls)))


def _count_nulls_of_pandas(given: Any) -> int:  # noqa: ANN401
    """Count missing values, but not the NaN of NumPy's dtypes, which are values like any other."""
    if hasattr(given, "columns"):
        return sum(_count_nulls_of_pandas(given[name]) for name in given.columns)
    return 0 if isinstance(given.dtype, np.dtype) else int(np.sum(np.asarray(given.isna())))


def _refuse_arrow_lists(given: object, what: str) -> None:
    kind = str(getattr(given, "type", None))
    if _comes_from(given, "pyarrow") and kind.partition("<")[0].endswith(("list", "list_view")):
        msg = (
            f"{what}: an Arrow array of {kind} is not an array of rows; pass its values in their shape: "
            f"np.stack(array.to_numpy(zero_copy_only=False)), where all lists have the same length"
        )
        raise TypeError(msg)


# ---- what NumPy does not know -----------------------------------------------------------------------------------


def _readable(given: Any) -> object:  # noqa: ANN401
    """Return a tensor of torch as one that NumPy can read; anything else as it is."""
    if not _is_tensor(given):
        return given
    tensor = given.detach()
    if tensor.is_floating_point() and str(tensor.dtype).removeprefix("torch.").startswith(_SMALL_FLOATS):
        return tensor.float()
    return tensor


def _is_tensor(given: object) -> bool:
    """Return whether something is a tensor of torch, or of a subclass, like a parameter."""
    return any(kind.__module__ == "torch" and kind.__name__ == "Tensor" for kind in type(given).__mro__)


def _is_elsewhere(given: object) -> bool:
    return _is_tensor(given) and str(getattr(given, "device", "cpu")) != "cpu"


def _comes_from(given: object, library: str) -> bool:
    return type(given).__module__.partition(".")[0] == library


def _is_small_float(dtype: np.dtype[Any]) -> bool:
    return dtype.type.__module__.startswith("ml_dtypes") and dtype.name.startswith(_SMALL_FLOATS)


def _ragged(given: object, at: tuple[int, ...] = ()) -> str | None:
    """Describe the first place where nested lists differ in length or depth; None if they do not."""
    if not isinstance(given, list | tuple) or not given:
        return None
    lengths = [_length(each) for each in given]
    for i, length in enumerate(lengths):
        if length != lengths[0]:
            first, here = ("no list" if n is None else f"a list of {n}" for n in (lengths[0], length))
            place, begin = ((*at, i), (*at, 0)) if at else (i, 0)
            return f"there is {first} at position {begin} and {here} at position {place}"
    found = (_ragged(each, (*at, i)) for i, each in enumerate(given))
    return next((place for place in found if place is not None), None)


def _length(given: object) -> int | None:
    if isinstance(given, list | tuple):
        return len(given)
    shape = getattr(given, "shape", ())
    return math.prod(shape[:1]) if shape else None
