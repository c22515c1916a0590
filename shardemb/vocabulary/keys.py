"""Check and coerce keys: from NumPy, Arrow or lists to 64-bit integers or bytes, and their hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from shardemb.base.arrays import as_array
from shardemb.vocabulary import hashing, key_kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    import pyarrow as pa
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array
    from shardemb.vocabulary.hashing import Secret

KeyType: TypeAlias = Literal["int64", "string", "bytes"]

KeysLike: TypeAlias = Any
"""Integers, str or bytes, depending on the vocabulary: one, a (nested) list of them, a NumPy or an Arrow array."""

MOST_BYTES = 2**31 - 1
"""Most bytes of a string. Records have 32 bits for its length, and for a capacity of up to twice as much."""


@dataclass(frozen=True)
class Keys:
    """Checked keys, in C order.

    Attributes
    ----------
    shape : tuple of int
        The shape in which the caller gave them.
    integers : ndarray of int64, shape (n,), or None
    offsets : ndarray of int64, shape (n + 1,), or None
        Where the bytes of each key begin and end in `data`, unless the keys are integers.
    data : ndarray of uint8
    """

    shape: tuple[int, ...]
    integers: Int64Array | None = None
    offsets: Int64Array | None = None
    data: NDArray[np.uint8] = field(default_factory=lambda: np.empty(0, np.uint8))

    @property
    def size(self) -> int:
        """Number of keys."""
        return self.integers.size if self.integers is not None else self.bounds.size - 1

    @property
    def lengths(self) -> Int64Array:
        """Bytes of each key, unless the keys are integers."""
        return np.diff(self.bounds)

    @property
    def bounds(self) -> Int64Array:
        """The `offsets` of keys that are known to have them."""
        assert self.offsets is not None
        return self.offsets

    def hasher(self, secret: Secret, out: NDArray[np.uint64]) -> Callable[[int, int], None]:
        """Return a function of start and stop that hashes a range of the keys into `out`."""
        if self.integers is not None:
            return partial(hashing.hash_integers, self.integers, *secret, out)
        return partial(hashing.hash_strings, self.bounds, self.data, *secret, out)

    def take(self, which: Int64Array) -> Keys:
        """Return some of the keys, as a flat batch."""
        if self.integers is not None:
            return Keys(which.shape, self.integers[which])
        lengths = self.lengths[which]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        data = np.empty(offsets[-1], np.uint8)
        key_kernels.take_bytes(self.data, self.bounds[which], offsets, data)
        return Keys(which.shape, None, offsets, data)


def checked(keys: KeysLike, key_type: KeyType, vocabulary: str) -> Keys:
    """Check keys of any shape; what was checked before is returned as it is.

    Raises
    ------
    TypeError
        The keys are not of the vocabulary's type. The message names the first that is not.
    ValueError
        A key is missing (null) or masked, nested lists have different lengths, or a string cannot be encoded as UTF-8
        or has 2 GiB or more.
    """
    if isinstance(keys, Keys):
        return keys
    return _integers(keys, vocabulary) if key_type == "int64" else _strings(keys, key_type, vocabulary)


def _integers(keys: KeysLike, vocabulary: str) -> Keys:
    if _is_arrow(keys):
        _refuse_nulls(keys.null_count, keys, vocabulary)
        if str(keys.type) == "null":
            keys = []
        else:
            keys = keys.to_numpy() if _is_chunked(keys) else keys.to_numpy(zero_copy_only=False)
    elif isinstance(keys, np.ma.MaskedArray):
        _refuse_nulls(int(np.count_nonzero(keys.mask)), keys, vocabulary)
    array = as_array(keys, f"vocabulary {vocabulary!r}: keys")
    if array.size == 0 and not isinstance(keys, np.ndarray):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        msg = f"vocabulary {vocabulary!r} has integer keys, got dtype {array.dtype}: {_excerpt(keys)}"
        raise TypeError(msg)
    is_wide = array.dtype.kind == "u" and array.itemsize == 8  # in either byte order
    if is_wide and array.size and int(array.max()) >= 2**63:
        msg = (
            f"vocabulary {vocabulary!r} has int64 keys, and {int(array.max())} is larger; "
            f"pass 64-bit hashes as keys.view('int64')"
        )
        raise ValueError(msg)
    return Keys(array.shape, np.require(array, np.int64, ["C", "A", "W"]).reshape(-1))


def _strings(keys: KeysLike, key_type: KeyType, vocabulary: str) -> Keys:
    import pyarrow as pa

    wanted = str if key_type == "string" else bytes
    try:
        shape, flat = _flatten(keys, wanted)
        array = flat if _is_arrow(flat) else pa.array(flat, arrow_type(key_type))
        if pa.types.is_dictionary(array.type):
            array = array.cast(array.type.value_type)
        found = str if _is_text(array.type) else bytes if _is_binary(array.type) else None
        if found is not wanted and len(array):
            raise TypeError(f"an Arrow array of {array.type} has other values")
        array = array.cast(arrow_type(key_type))
    except (TypeError, pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        msg = f"vocabulary {vocabulary!r} has keys of {wanted.__name__}: {error}; got {_excerpt(keys)}"
        raise TypeError(msg) from error
    except UnicodeEncodeError as error:
        msg = f"vocabulary {vocabulary!r}: a key cannot be encoded as UTF-8 ({error}); use key_type='bytes' for it"
        raise ValueError(msg) from error
    array = array.combine_chunks() if _is_chunked(array) else array
    _refuse_nulls(array.null_count, array, vocabulary)
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    if bounds.size == 0:
        bounds = np.zeros(1, np.int64)
    content = np.frombuffer(data, np.uint8) if data is not None and data.size else np.empty(0, np.uint8)
    first, last = int(bounds[0]), int(bounds[-1])
    if last - first > MOST_BYTES and int(np.diff(bounds).max()) > MOST_BYTES:
        msg = (
            f"vocabulary {vocabulary!r}: a key has {int(np.diff(bounds).max())} bytes, more than {MOST_BYTES}"
        )
        raise ValueError(msg)
    return Keys(
        (len(array),) if shape is None else shape,
        None,
        np.require(bounds - first, np.int64, ["C", "A", "W"]),
        np.require(content[first:last], np.uint8, ["C", "A", "W"]),
    )


def _flatten(keys: KeysLike, wanted: type) -> tuple[tuple[int, ...] | None, Any]:
    """Return the shape of strings, and all of them in one flat list or Arrow array.

    The types of a list's items are checked here, because Arrow accepts bytes for str and the reverse.
    """
    if _is_arrow(keys):
        return None, keys
    if isinstance(keys, str | bytes):
        keys = np.array(keys, object)
    if isinstance(keys, np.ndarray):
        shape, flat = keys.shape, keys.reshape(-1).tolist()
    else:
        shape, flat = _unnested(keys)
    if not all(issubclass(kind, wanted | None) for kind in set(map(type, flat))):
        first = next(each for each in flat if not isinstance(each, wanted | None))
        raise TypeError(f"{first!r:.60} is a {type(first).__name__}")
    return shape, flat


def _unnested(keys: KeysLike) -> tuple[tuple[int, ...], list[Any]]:
    # A mapping, or a data frame, would give the names of its columns.
    if isinstance(keys, Mapping) or getattr(keys, "ndim", 1) != 1 or not hasattr(keys, "__getitem__"):
        raise TypeError(f"a {type(keys).__name__} is not a sequence")
    keys = list(keys)
    shape: tuple[int, ...] = (len(keys),)
    while keys and all(_is_nested(each) for each in keys):
        lengths = {len(each) for each in keys}
        if len(lengths) > 1:
            msg = f"nested lists of keys must have the same length, got {sorted(lengths)[:3]}"
            raise ValueError(msg)
        shape = (*shape, lengths.pop())
        keys = [key for each in keys for key in each]
    return shape, keys


def _is_nested(each: Any) -> bool:  # noqa: ANN401
    return each.ndim > 0 if isinstance(each, np.ndarray) else isinstance(each, list | tuple)


def restored(keys: Keys, key_type: KeyType) -> NDArray[Any]:
    """Return keys as the array that callers get: of int64, or of str or bytes objects."""
    if keys.integers is not None:
        return keys.integers.reshape(keys.shape)
    return array_of(as_arrow(keys, key_type).to_pylist(), key_type).reshape(keys.shape)


def array_of(keys: list[Any], key_type: KeyType) -> NDArray[Any]:
    """Return a list of keys as the array that callers get."""
    array = np.empty(len(keys), np.int64 if key_type == "int64" else object)
    array[:] = keys
    return array


def as_arrow(keys: Keys, key_type: KeyType) -> pa.Array:
    """Return keys as a flat Arrow array."""
    import pyarrow as pa

    if keys.integers is not None:
        return pa.array(keys.integers)
    buffers = [None, pa.py_buffer(keys.offsets), pa.py_buffer(keys.data)]
    return pa.Array.from_buffers(arrow_type(key_type), keys.size, buffers)


def arrow_type(key_type: KeyType) -> pa.DataType:
    """Return the Arrow type of keys that callers get."""
    import pyarrow as pa

    if key_type == "int64":
        return pa.int64()
    return pa.large_string() if key_type == "string" else pa.large_binary()


def _is_arrow(keys: KeysLike) -> bool:
    """Return whether keys are an Arrow array, chunked or not. Scalars and tables are not."""
    return type(keys).__module__.partition(".")[0] == "pyarrow" and hasattr(keys, "null_count")


def _is_chunked(keys: Any) -> bool:  # noqa: ANN401
    import pyarrow as pa

    return isinstance(keys, pa.ChunkedArray)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return any(
        is_it(kind) for is_it in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )


def _is_binary(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kinds = (
        pa.types.is_binary,
        pa.types.is_large_binary,
        pa.types.is_binary_view,
        pa.types.is_fixed_size_binary,
    )
    return any(is_it(kind) for is_it in kinds)


def _refuse_nulls(count: int, array: Any, vocabulary: str) -> None:  # noqa: ANN401
    if count:
        msg = (
            f"vocabulary {vocabulary!r}: {count} of {np.size(array)} keys are missing (null); drop them first"
        )
        raise ValueError(msg)


def _excerpt(keys: KeysLike) -> str:
    text = " ".join(repr(keys).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
