"""Arrays of rows: ``.npy``, members of ``.npz``, and what all sources with random access have in common.

A source is made of parts, each of which writes any of its rows into memory that it is given. So one class reads a
``.npy`` file, the 128 tensors of a safetensors model, and a dataset of HDF5.
"""

from __future__ import annotations

import lzma
import math
import os
import re
import struct
import zipfile
import zlib
from bisect import bisect_right
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np

from shardemb import dtypes
from shardemb.base.paths import local_path
from shardemb.errors import FormatError, SourceError
from shardemb.imports.blocks import Block, ReadOptions, block_rows, chosen, refuse, refuse_unused
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array

EXACT = {"float32", "float64", "int8", "uint8", "int16", "uint16", *dtypes.FLOATS}
EXACT |= {"float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"}
"""NumPy's names of what is read: float32 holds all of it exactly, except float64, of which it keeps 24 bits."""

COMPRESSED = b"\x1f\x8b", b"BZh", b"\x28\xb5\x2f\xfd"
"""First bytes of what gzip, bzip2 and zstd write."""

_ANNOUNCED = 16 * 2**10
"""Bytes from which on a read is taken for one of many in a row."""


# ---- bytes ------------------------------------------------------------------------------------------------------


class File:
    """A file of the caller's, of which any bytes can be read at any time. Safe from several threads.

    Attributes
    ----------
    path : Path
        As it was given. Links on the way to it are followed, other than to the files of a store.
    name : str
        What messages call it.
    size : int
        In bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        resolved = path.resolve(strict=True)
        self._resources = ExitStack()
        size = files.size(resolved)
        if size is None:
            raise refuse(self.name, "", "not a file" + (", but a folder" if path.is_dir() else ""))
        self.size = size
        try:
            self._descriptor = self._resources.enter_context(files.opened(resolved, os.O_RDONLY))
        except FormatError as error:
            raise refuse(self.name, "", str(error)) from error

    def read_into(self, out: NDArray[Any], offset: int) -> None:
        """Fill a C-contiguous array with the bytes at `offset`; `OSError` if the file has become shorter meanwhile."""
        view = out.reshape(-1).view(np.uint8).data
        end = offset + len(view)
        files.read_into(self._descriptor, view, offset, self.path)
        if len(view) >= _ANNOUNCED:  # the disk goes on while the caller is busy with this
            files.will_need(self._descriptor, end, min(len(view), self.size - end))

    def read(self, offset: int, nbytes: int) -> bytes:
        """Read at most `nbytes` at `offset`: fewer where the file ends."""
        nbytes = max(0, min(nbytes, self.size - offset))
        return bytes(files.read_at(self._descriptor, nbytes, offset, self.path))

    def close(self) -> None:
        """Close the file."""
        self._descriptor = -1  # which is no file: the number may become that of another one
        self._resources.close()


class Cursor:
    """Reads a range of a file from its beginning on, a few bytes at a time.

    Attributes
    ----------
    at : int
        The position in the file of what is read next.
    """

    CHUNK = 2**18

    def __init__(self, file: File, start: int, stop: int) -> None:
        self.file, self.at, self.stop = file, start, min(stop, file.size)
        self._chunk, self._begin = b"", start

    def read(self, nbytes: int) -> bytes:
        """Read exactly so many bytes, or raise `SourceError`."""
        self.require(nbytes)
        first = self.at - self._begin
        if first + nbytes > len(self._chunk):
            self._chunk, self._begin = self.file.read(self.at, max(nbytes, self.CHUNK)), self.at
            first = 0
        self.at += nbytes
        return self._chunk[first : first + nbytes]

    def skip(self, nbytes: int) -> None:
        """Leave out so many bytes."""
        self.require(nbytes)
        self.at += nbytes

    def require(self, nbytes: int) -> None:
        """Raise `SourceError` unless so many bytes follow: ask before memory is taken for them."""
        if nbytes > self.stop - self.at:
            why = (
                "the file was cut off, or is damaged"
                if self.stop == self.file.size
                else "more is not read of a header"
            )
            problem = f"{nbytes} bytes are needed, but {self.stop - self.at} follow: {why}"
            raise refuse(self.file.name, f"byte {self.at}", problem)


# ---- numbers ----------------------------------------------------------------------------------------------------


def checked_type(stored: np.dtype[Any], name: str, place: str) -> np.dtype[Any]:
    """Return the type of numbers if rows can be read from it.

    Raises
    ------
    SourceError
        float32 does not hold such numbers, or they are none.
    """
    if stored.name in EXACT:
        return stored
    way_out = "convert them first, as array.astype('float32') does"
    if stored.kind in "iu":
        problem = f"the values are {stored.name}, and float32 cannot tell all of these apart; {way_out}"
    elif stored.kind in "fcb" or stored.name in ("int4", "uint4"):
        problem = f"the values are {stored.name}, which is not read; {way_out}"
    else:
        problem = f"the values are {stored.name}, and not numbers"
    raise refuse(name, place, problem)


def number_type(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype of a name in `EXACT`."""
    return np.dtype(name) if name in ("float64", "int16", "uint16") else dtypes.numpy_dtype(name)


def lossless(*stored: str) -> str:
    """Return the name in `shardemb.dtypes` of what holds numbers of types of these names without loss, or float32.

    Examples
    --------
    >>> lossless("float16"), lossless("float16", "bfloat16"), lossless("int8")
    ('float16', 'float32', 'float32')
    """
    name = stored[0] if len(set(stored)) == 1 else "float32"
    return name if name in dtypes.FLOATS else "float32"


def convert(stored: NDArray[Any], out: Float32Array, name: str, first: int) -> None:
    """Convert numbers of any type to float32, shape (n, dim) both; `first` is the number of the first row.

    Raises
    ------
    SourceError
        A float64 is too large.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, stored, casting="unsafe")
    if stored.dtype.name == "float64":
        lost = np.isinf(out) & np.isfinite(stored)
        if lost.any():
            row, column = np.argwhere(lost)[0]
            problem = f"{stored[row, column]:g} is too large for float32, which ends at 3.4e38"
            raise refuse(name, f"row {first + row}", problem)


# ---- rows -------------------------------------------------------------------------------------------------------


class Part(Protocol):
    """Rows of which any can be read at any time."""

    @property
    def num_rows(self) -> int:
        """How many there are."""

    def fill(self, start: int, out: Float32Array) -> None:
        """Write the rows from `start` on into `out`, shape (n, dim). Safe from several threads."""


@dataclass(frozen=True)
class RowMajor:
    """Rows that follow each other in a file; messages call them by the label."""

    file: File
    offset: int
    num_rows: int
    dtype: np.dtype[Any]
    label: str

    def fill(self, start: int, out: Float32Array) -> None:
        """Write the rows from `start` on into `out`, shape (n, dim). Safe from several threads."""
        offset = self.offset + start * out.shape[1] * self.dtype.itemsize
        if self.dtype == out.dtype:
            self.file.read_into(out, offset)
            return
        stored = np.empty(out.shape, self.dtype)
        self.file.read_into(stored, offset)
        convert(stored, out, self.label, start)


@dataclass(frozen=True)
class ColumnMajor:
    """Columns that follow each other in a file, as Fortran has them."""

    file: File
    offset: int
    num_rows: int
    dtype: np.dtype[Any]
    label: str

    def fill(self, start: int, out: Float32Array) -> None:
        """Write the rows from `start` on into `out`, shape (n, dim). Safe from several threads."""
        rows, dim = out.shape
        stored = np.empty((dim, rows), self.dtype)
        for column in range(dim):
            place = column * self.num_rows + start
            self.file.read_into(stored[column], self.offset + place * self.dtype.itemsize)
        convert(stored.T, out, self.label, start)


@dataclass
class ArraySource:
    """A source of which any rows can be read at any time: a `VectorSource`, and a `RowReader` if it has no keys.

    Parameters
    ----------
    format, name, dim, dtype
        As of a `VectorSource`.
    parts : sequence of Part
        Whose rows follow each other.
    limit : int, optional
        At most so many rows.
    keys : pyarrow.Array, optional
        One for each row.
    align : int
        Blocks begin at multiples of so many rows, where that leaves them small: what is stored in chunks is read once.
    resources : ExitStack
        What `close` closes.
    """

    format: str
    name: str
    dim: int
    dtype: str
    parts: Sequence[Part]
    limit: int | None = None
    keys: Any = None
    align: int = 1
    resources: ExitStack = field(default_factory=ExitStack)
    num_rows: int = field(init=False)
    total: int = field(init=False)
    unit: Literal["row", "byte"] = field(init=False, default="row")
    key_type: Literal["string", "int64"] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._bounds = list(accumulate((part.num_rows for part in self.parts), initial=0))
        rows = self._bounds[-1]
        self.num_rows = self.total = rows if self.limit is None else min(rows, self.limit)
        self.key_type = None if self.keys is None else "string"

    def read(self, start: int, stop: int) -> Float32Array:
        """Read rows ``[start, stop)``: float32, shape (stop - start, dim). Safe from several threads."""
        if not 0 <= start <= stop <= self.num_rows:
            msg = f"{self.name} has {self.num_rows} rows: no range ({start}, {stop})"
            raise ValueError(msg)
        rows = np.empty((stop - start, self.dim), np.float32)
        at = start
        while at < stop:
            which = bisect_right(self._bounds, at) - 1
            end = min(stop, self._bounds[which + 1])
            self.parts[which].fill(at - self._bounds[which], rows[at - start : end - start])
            at = end
        return rows

    def key_blocks(self) -> Iterator[Any] | None:
        """Return the keys, which are in memory, if there are any."""
        return None if self.keys is None else iter([self.keys[: self.num_rows]])

    def blocks(self) -> Iterator[Block]:
        """Read the rows, once, in order."""
        most = block_rows(self.dim)
        # A chunk of more than a few blocks is read several times; the memory for a whole one may not be there.
        rows = max(self.align, most - most % self.align) if self.align <= 4 * most else most
        for start in range(0, self.num_rows, rows):
            stop = min(start + rows, self.num_rows)
            keys = None if self.keys is None else self.keys[start:stop]
            yield Block(self.read(start, stop), keys, start, stop - start)

    def close(self) -> None:
        """Close the source, and let go of what it maps."""
        self.parts = ()
        self.resources.close()

    def __enter__(self) -> ArraySource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# ---- NumPy's files ----------------------------------------------------------------------------------------------


class NpyHeader(NamedTuple):
    """What an array in NumPy's format says about itself; `nbytes` is how long the header is."""

    descr: str
    is_fortran: bool
    shape: tuple[int, ...]
    nbytes: int


_MAX_HEADER = 2**16
_DESCR = re.compile(r"""['"]descr['"]\s*:\s*(?:(['"])([^'"]{1,40})\1|(\[))""")
_ORDER = re.compile(r"""['"]fortran_order['"]\s*:\s*(True|False)\b""")
# A comma ends each number but the last, so that there is one way alone to read digits, and no time lost with others.
_SHAPE = re.compile(r"""['"]shape['"]\s*:\s*\(((?:\s*[0-9]{1,18}L?\s*,)*(?:\s*[0-9]{1,18}L?)?)\s*\)""")
_SIMPLE = re.compile(r"[<>|=]?[biufcSUmM][0-9]{1,5}(\[\w+\])?")


def npy_header(read: Callable[[int], bytes], name: str) -> NpyHeader:
    """Read the header of an array in NumPy's format, versions 1 to 3.

    The header is a literal of Python. It is not evaluated: what is needed of it is found by three patterns.
    """
    start = read(8)
    if start[:6] != b"\x93NUMPY":
        raise refuse(name, "byte 0", f"is no .npy file, which begins with \\x93NUMPY; this has {start[:6]!r}")
    if start[6] not in (1, 2, 3):
        raise refuse(name, "byte 6", f"has version {start[6]} of the .npy format; 1, 2 and 3 are known")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(read(width), "little")
    if length > _MAX_HEADER:
        raise refuse(name, "byte 8", f"the header has {length} bytes, more than that of any array of numbers")
    text = read(length).decode("latin1")
    descr, order, shape = (pattern.search(text) for pattern in (_DESCR, _ORDER, _SHAPE))
    if descr is None or order is None or shape is None:
        problem = f"the header does not say descr, fortran_order and shape: {text.strip()[:120]!r}"
        raise refuse(name, f"byte {8 + width}", problem)
    dims = tuple(int(each) for each in re.findall("[0-9]+", shape[1]))
    return NpyHeader(descr[2] or "a record", order[1] == "True", dims, 8 + width + length)


def npy_type(descr: str, name: str) -> np.dtype[Any]:
    """Return the type of the numbers that a header describes.

    Raises
    ------
    SourceError
        It is none that can be read. Objects never are: only pickle reads them, which runs what a file tells it to.
    """
    kind = descr.lstrip("<>|=")
    if kind == "V2":  # as NumPy writes the bfloat16 of ml_dtypes, of which it knows nothing but the size
        return dtypes.numpy_dtype("bfloat16")
    if kind == "f1":
        return dtypes.numpy_dtype("float8_e5m2")
    if kind.startswith("O"):
        problem = (
            "holds Python objects, which only pickle reads, and a pickle runs whatever it says; "
            "save numbers instead: np.save(path, np.stack(array).astype('float32'))"
        )
        raise refuse(name, "", problem)
    if kind.startswith("V") or descr == "a record":
        problem = f"the values are {descr}, of which the file does not say which numbers they are; "
        raise refuse(name, "", problem + "save them as float16 or float32")
    try:
        found = np.dtype(descr if _SIMPLE.fullmatch(descr) else "")
    except TypeError as error:
        raise refuse(name, "", f"the values are of an unknown type, {descr!r}") from error
    return checked_type(found, name, "")


def _part(file: File, offset: int, nbytes: int, header: NpyHeader, name: str) -> RowMajor | ColumnMajor:
    """Return the rows of an array of which header and values take `nbytes` of a file from `offset` on."""
    dtype = npy_type(header.descr, name)
    _check_length(header, dtype, nbytes, name)
    kind = ColumnMajor if header.is_fortran else RowMajor
    return kind(file, offset + header.nbytes, header.shape[0], dtype, name)


def _check_length(header: NpyHeader, dtype: np.dtype[Any], nbytes: int, name: str) -> None:
    need, have = math.prod(header.shape) * dtype.itemsize, nbytes - header.nbytes
    if need != have:
        rows, dim = header.shape
        problem = f"the header promises {rows} rows of {dim} {dtype.name}, {need} bytes, but {have} follow"
        raise refuse(name, f"byte {header.nbytes}", problem)


def open_npy(source: object, options: ReadOptions) -> ArraySource | CompressedArray:
    """Open a ``.npy`` file, or an array in a ``.npz`` file, which is chosen by `member` if there are several.

    Returns
    -------
    ArraySource or CompressedArray
        The latter for an array that was compressed: its rows can only be read in order.

    Raises
    ------
    SourceError
        It is neither; the array is no array of rows of numbers; its length is not that of the header; an option is set
        that means nothing here.
    OSError
        It cannot be read.
    """
    path = local_path(source, "the file to import")
    with ExitStack() as resources:
        file = opened(path, resources)
        if file.read(0, 4) == b"PK\x03\x04":
            found = _open_npz(file, options, resources)
        else:
            refuse_unused(file.name, options)
            header = npy_header(Cursor(file, 0, file.size).read, file.name)
            npy_type(header.descr, file.name)  # what cannot be read in any shape is said first
            chosen(file.name, {"the array": header.shape}, "the array")
            part = _part(file, 0, file.size, header, file.name)
            found = ArraySource(
                "npy", file.name, header.shape[1], lossless(part.dtype.name), [part], options.limit
            )
        found.resources = resources.pop_all()
        return found


def opened(path: Path, resources: ExitStack) -> File:
    """Open a file that is read at any place, until the resources are closed. One that is compressed is refused."""
    file = File(path)
    resources.callback(file.close)
    if file.read(0, 4).startswith(COMPRESSED):
        raise refuse(file.name, "", "is compressed, and cannot be read in place; decompress it first")
    return file


# ---- members of .npz --------------------------------------------------------------------------------------------


def _open_npz(file: File, options: ReadOptions, resources: ExitStack) -> ArraySource | CompressedArray:
    refuse_unused(file.name, options, "member")
    try:
        archive = resources.enter_context(zipfile.ZipFile(file.path))
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        headers = {each: _member_header(archive, info, file.name) for each, info in members.items()}
    except _BROKEN as error:
        raise _broken(error, file.name) from error
    shapes = {each: header.shape for each, header in headers.items() if header is not None}
    names = chosen(file.name, shapes, _without_suffix(options.member))
    infos, dim = [members[each] for each in names], shapes[names[0]][1]
    labels = [f"{file.name}, {info.filename}" for info in infos]
    if all(info.compress_type == zipfile.ZIP_STORED for info in infos):
        parts = [
            _part(file, _data_offset(file, info), info.file_size, headers[each], label)  # type: ignore[arg-type]
            for each, info, label in zip(names, infos, labels, strict=True)
        ]
        return ArraySource(
            "npy", file.name, dim, lossless(*(part.dtype.name for part in parts)), parts, options.limit
        )
    if len(names) > 1:
        raise refuse(
            file.name, "", f"{options.member} are compressed, and read one at a time; save with np.savez"
        )
    return CompressedArray(archive, infos[0], headers[names[0]], labels[0], options.limit)  # type: ignore[arg-type]


_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError, OSError),
)
"""What `zipfile` raises for archives that are damaged, encrypted, or compressed in ways that it does not know."""


def zip_members(path: Path) -> list[zipfile.ZipInfo]:
    """Read the directory of a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except _BROKEN as error:
        raise _broken(error, str(path)) from error


def _broken(error: Exception, name: str) -> SourceError:
    return (
        error
        if isinstance(error, SourceError)
        else refuse(name, "", f"cannot be read as a zip archive: {error}")
    )


def _without_suffix(member: str | None) -> str | None:
    return None if member is None else member.removesuffix(".npy")


def _member_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> NpyHeader | None:
    """Read the header of a member of an archive; None if it is no array."""
    if not info.filename.endswith(".npy"):
        return None
    with archive.open(info) as stream:
        return npy_header(_exactly(stream.read, f"{name}, {info.filename}"), f"{name}, {info.filename}")


def _exactly(read: Callable[[int], bytes], name: str) -> Callable[[int], bytes]:
    """Return a function that reads as many bytes as it is asked for, or raises `SourceError`."""

    def read_all(nbytes: int) -> bytes:
        data = read(nbytes)
        if len(data) < nbytes:
            raise refuse(name, "", "ends within its header")
        return data

    return read_all


def _data_offset(file: File, info: zipfile.ZipInfo) -> int:
    """Return where the bytes of a stored member begin: its own header says, which may differ from the directory's."""
    header = file.read(info.header_offset, 30)
    place = f"byte {info.header_offset}"
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise refuse(file.name, place, f"the header of {info.filename} is damaged")
    if header[6] & 1:
        raise refuse(file.name, place, f"{info.filename} is encrypted; decrypt it first")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    offset = info.header_offset + 30 + lengths
    if offset + info.file_size > file.size or info.compress_size != info.file_size:
        raise refuse(file.name, place, f"{info.filename} is longer than the file")
    return offset


class CompressedArray:
    """An array in an archive that is compressed, read once in order: a `VectorSource`."""

    format = "npy"
    key_type: Literal["string", "int64"] | None = None
    unit: Literal["row", "byte"] = "row"

    def __init__(
        self, archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: NpyHeader, name: str, limit: int | None
    ) -> None:
        if header.is_fortran:
            problem = (
                "is compressed and has its columns one after the other: save it with np.savez, or in C order"
            )
            raise refuse(name, "", problem)
        self.name, (rows, self.dim) = name, header.shape
        self._type = npy_type(header.descr, name)
        _check_length(header, self._type, info.file_size, name)
        self._archive, self._info, self._skipped = archive, info, header.nbytes
        self.num_rows = self.total = rows if limit is None else min(rows, limit)
        self.dtype = lossless(self._type.name)
        self.resources = ExitStack()

    def key_blocks(self) -> None:
        """There are no keys."""

    def blocks(self) -> Iterator[Block]:
        """Read the rows, once, in order."""
        most = block_rows(self.dim)
        try:
            with self._archive.open(self._info) as stream:
                read = _exactly(stream.read, self.name)
                read(self._skipped)
                for start in range(0, self.num_rows, most):
                    rows = np.empty((min(most, self.num_rows - start), self.dim), np.float32)
                    data = read(rows.size * self._type.itemsize)
                    convert(np.frombuffer(data, self._type).reshape(rows.shape), rows, self.name, start)
                    yield Block(rows, None, start, len(rows))
        except _BROKEN as error:
            raise _broken(error, self.name) from error

    def close(self) -> None:
        """Close the source."""
        self.resources.close()

    def __enter__(self) -> CompressedArray:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
