"""Tensors in GGUF, the format of llama.cpp's models: plain numbers, and blocks of 32 that share a scale."""

from __future__ import annotations

import math
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardemb.base.paths import local_path
from shardemb.imports.arrays import (
    ArraySource,
    Cursor,
    File,
    Part,
    RowMajor,
    lossless,
    number_type,
    opened,
)
from shardemb.imports.blocks import ReadOptions, chosen, refuse, refuse_unused

if TYPE_CHECKING:
    import pyarrow as pa

    from shardemb.base.validation import Float32Array

DEFAULT = "token_embd.weight"
"""What llama.cpp calls the table of tokens in every model."""

TOKENS = "tokenizer.ggml.tokens"

MAX_HEADER = 2**26
"""Most bytes before the tensors: several times what models with 262,144 tokens have. Arrays of strings are walked
through one by one, which takes seconds for so many."""

_PLAIN = {0: "float32", 1: "float16", 30: "bfloat16"}
_Q8_0 = 8
_Q8_BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", 32)])

_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""Types of ggml, by number."""

_STRING, _ARRAY = 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the values of metadata, by number of their type, for those that have a fixed size."""


class TensorInfo(NamedTuple):
    """What the header says about a tensor; `offset` counts from the beginning of the data."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What is before the tensors of a file.

    Attributes
    ----------
    tensors : dict of str to TensorInfo
    begin : int
        Where the data begin.
    tokens : list of bytes or None
        The vocabulary of the model.
    """

    tensors: dict[str, TensorInfo]
    begin: int
    tokens: list[bytes] | None


@dataclass(frozen=True)
class Q8Rows:
    """Rows in blocks of 32 bytes that share a scale of float16: 34 bytes a block."""

    file: File
    offset: int
    num_rows: int

    def fill(self, start: int, out: Float32Array) -> None:
        """Write the rows from `start` on into `out`, shape (n, dim). Safe from several threads."""
        rows, dim = out.shape
        stored = np.empty((rows, dim // 32), _Q8_BLOCK)
        self.file.read_into(stored, self.offset + start * (dim // 32) * _Q8_BLOCK.itemsize)
        scales = stored["scale"].astype(np.float32)[:, :, None]
        with np.errstate(invalid="ignore"):  # of a scale that is no number, neither are the products
            np.multiply(stored["values"], scales, out=out.reshape(rows, dim // 32, 32))


def open_gguf(source: object, options: ReadOptions) -> ArraySource:
    """Open a tensor of a GGUF file: by default the only one with two dimensions, or ``token_embd.weight``.

    If there are as many tokens in the file as the tensor has rows, these are the keys.

    Raises
    ------
    SourceError
        It is no GGUF file of version 2 or 3; the header is damaged or does not fit the file; there is no such tensor,
        or it is quantized in a way that is not read; an option is set that means nothing here.
    OSError
        The file cannot be read.
    """
    path = local_path(source, "the file to import")
    with ExitStack() as resources:
        file = opened(path, resources)
        refuse_unused(file.name, options, "member", "unicode_errors")
        header = gguf_header(file)
        shapes = {name: tensor.shape for name, tensor in header.tensors.items()}
        member = DEFAULT if options.member is None and DEFAULT in shapes else options.member
        names = chosen(file.name, shapes, member)
        parts = [_part(file, header, name) for name in names]
        kinds = [_PLAIN.get(header.tensors[name].kind, "float32") for name in names]
        rows = sum(shapes[name][0] for name in names)
        keys = _keys(header.tokens, file.name, options) if len(header.tokens or ()) == rows else None
        found = ArraySource(
            "gguf", file.name, shapes[names[0]][1], lossless(*kinds), parts, options.limit, keys
        )
        found.resources = resources.pop_all()
        return found


def _part(file: File, header: Header, name: str) -> Part:
    """Return the rows of a tensor, if they are within the file and of a type that is read."""
    shape, kind, offset = header.tensors[name]
    place = f"tensor {name!r}"
    if kind in _PLAIN:
        nbytes = math.prod(shape) * number_type(_PLAIN[kind]).itemsize
    elif kind == _Q8_0 and shape[1] % 32 == 0:
        nbytes = math.prod(shape) // 32 * _Q8_BLOCK.itemsize
    else:
        what = (
            _NAMES.get(kind, f"of type {kind}")
            if kind != _Q8_0
            else f"Q8_0 in rows of {shape[1]}, no multiple of 32"
        )
        problem = (
            f"is {what}, and F32, F16, BF16 and Q8_0 are read; convert the model with llama-quantize first"
        )
        raise refuse(file.name, place, problem)
    begin = header.begin + offset
    if begin + nbytes > file.size:
        problem = f"ends at byte {begin + nbytes}, but the file at {file.size}: it was cut off, or is damaged"
        raise refuse(file.name, place, problem)
    if kind == _Q8_0:
        return Q8Rows(file, begin, shape[0])
    return RowMajor(file, begin, shape[0], number_type(_PLAIN[kind]), f"{file.name}, {place}")


def _keys(tokens: list[bytes] | None, name: str, options: ReadOptions) -> pa.Array:
    """Return tokens as an array of Arrow."""
    import pyarrow as pa

    texts = []
    for row, token in enumerate(tokens or ()):
        try:
            texts.append(token.decode("utf-8", options.unicode_errors))
        except UnicodeDecodeError as error:
            problem = f"token {token!r:.80} is not UTF-8; pass unicode_errors='replace' or 'ignore'"
            raise refuse(name, f"row {row}", problem) from error
    return pa.array(texts, pa.string())


# ---- the header -------------------------------------------------------------------------------------------------


def gguf_header(file: File) -> Header:
    """Read what is before the tensors.

    Nothing is allocated by a number in the file: whatever it counts takes bytes, which end before long.

    Raises
    ------
    SourceError
        It is not a GGUF file of version 2 or 3, or damaged.
    """
    cursor = Cursor(file, 0, MAX_HEADER)
    if cursor.read(4) != b"GGUF":
        raise refuse(file.name, "byte 0", "is no GGUF file")
    version = _number(cursor, 4)
    if version not in (2, 3):
        what = "is big-endian" if version & 0xFFFF == 0 else f"has version {version}"
        raise refuse(file.name, "byte 4", f"{what}; GGUF of version 2 and 3, little-endian, is read")
    num_tensors, num_values = _number(cursor, 8), _number(cursor, 8)
    values = _metadata(cursor, num_values)
    tensors: dict[str, TensorInfo] = {}
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise refuse(file.name, "general.alignment", f"must be a power of two, and is {alignment!r:.40}")
    for _ in range(num_tensors):
        name = _text(cursor)
        tensors[_new(name, tensors, cursor)] = _tensor_info(cursor, name, alignment)
    begin = -(-cursor.at // alignment) * alignment
    return Header(tensors, begin, values.get(TOKENS))


def _metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    """Read the values that are needed here; the others are passed over."""
    values: dict[str, Any] = {}
    seen: dict[str, None] = {}
    for _ in range(count):
        key = _text(cursor)
        seen[_new(key, seen, cursor)] = None
        kind = _number(cursor, 4)
        if key == "general.alignment" and kind == 4:
            values[key] = _number(cursor, 4)
        elif key == TOKENS and kind == _ARRAY:
            if _number(cursor, 4) != _STRING:
                raise refuse(cursor.file.name, TOKENS, "are no strings")
            values[key] = [_string(cursor) for _ in range(_number(cursor, 8))]
        else:
            _pass_over(cursor, kind)
    return values


def _pass_over(cursor: Cursor, kind: int) -> None:
    count = 1
    if kind == _ARRAY:
        kind = _number(cursor, 4)
        count = _number(cursor, 8)
    if kind in _WIDTHS:
        cursor.skip(count * _WIDTHS[kind])
    elif kind == _STRING:
        for _ in range(count):
            cursor.skip(_number(cursor, 8))
    else:
        raise refuse(
            cursor.file.name,
            f"byte {cursor.at}",
            f"a value has the unknown type {kind}, or an array of arrays",
        )


def _tensor_info(cursor: Cursor, name: str, alignment: int) -> TensorInfo:
    place = f"tensor {name!r}"
    dims = _number(cursor, 4)
    if dims > 4:
        raise refuse(cursor.file.name, place, f"has {dims} dimensions; there are at most 4")
    shape = tuple(_number(cursor, 8) for _ in range(dims))[::-1]  # the one that varies fastest is first
    kind, offset = _number(cursor, 4), _number(cursor, 8)
    if offset % alignment:
        raise refuse(cursor.file.name, place, f"begins at {offset} of the data, no multiple of {alignment}")
    return TensorInfo(shape, kind, offset)


def _number(cursor: Cursor, width: int) -> int:
    number: int = struct.unpack("<I" if width == 4 else "<Q", cursor.read(width))[0]
    return number


def _string(cursor: Cursor) -> bytes:
    return cursor.read(_number(cursor, 8))


def _text(cursor: Cursor) -> str:
    """Read a name, which has at most 65,535 bytes."""
    length = _number(cursor, 8)
    if length >= 2**16:
        raise refuse(
            cursor.file.name, f"byte {cursor.at}", f"a name of {length} bytes: the header is damaged"
        )
    return cursor.read(length).decode("utf-8", "replace")


def _new(name: str, there: dict[str, Any], cursor: Cursor) -> str:
    if name in there:
        raise refuse(cursor.file.name, f"byte {cursor.at}", f"the name {name!r:.80} is there twice")
    return name
