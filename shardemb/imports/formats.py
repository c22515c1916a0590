"""Formats: which one a source has, by its first bytes and its name, and who reads it."""

from __future__ import annotations

import os
import re
import struct
from importlib import import_module
from typing import TYPE_CHECKING, Any

from shardemb.base.paths import local_path
from shardemb.imports import streams
from shardemb.imports.arrays import zip_members
from shardemb.imports.blocks import ReadOptions, VectorSource, listed, refuse

if TYPE_CHECKING:
    from pathlib import Path

    from shardemb.errors import SourceError

_OPENERS = {
    "word2vec-text": "text.open_word2vec_text",
    "word2vec-binary": "binary.open_word2vec_binary",
    "glove": "text.open_glove",
    "fasttext-text": "text.open_fasttext_text",
    "fasttext-binary": "binary.open_fasttext_binary",
    "npy": "arrays.open_npy",
    "safetensors": "tensors.open_safetensors",
    "gguf": "gguf.open_gguf",
    "parquet": "columnar.open_parquet",
    "arrow": "columnar.open_arrow",
    "torch": "tensors.open_torch",
    "hdf5": "containers.open_hdf5",
    "zarr": "containers.open_zarr",
}
"""Module and function of each format; a module is imported when it is first needed."""

FORMATS = tuple(_OPENERS)
"""Names of all formats."""

_TEXT = {"word2vec-text", "word2vec-binary", "glove", "fasttext-text", "fasttext-binary"}
"""Formats that are read from their beginning to their end, and so may be compressed."""

_MAGIC = (
    (b"\x93NUMPY", "npy"),
    (b"PAR1", "parquet"),
    (b"PARE", "parquet"),
    (b"ARROW1", "arrow"),
    (b"\xff\xff\xff\xff", "arrow"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"GGUF", "gguf"),
    (struct.pack("<i", 793712314), "fasttext-binary"),
)
"""First bytes of files, and their format. A stream of Arrow begins with the mark of a message."""

_HEAD = 2**18
"""Bytes by which text and binary files are told apart: enough for two rows of some thousand numbers."""

_NUMBER = re.compile(rb"[+-]?([0-9]+(?:\.[0-9]*)?|\.[0-9]+|nan|inf)(e[+-]?[0-9]+)?", re.IGNORECASE)
_HEADER = re.compile(rb"\s*([0-9]+)[ \t]+([0-9]+)[ \t\r]*\n")


def open_source(
    source: object, format: str | None = None, options: ReadOptions | None = None
) -> VectorSource:
    """Open what vectors are imported from.

    Parameters
    ----------
    source : str, path-like, or an object with Arrow's C stream interface
        A file, a folder, a pattern of parquet files; a table, a frame, a reader of record batches, a data set of
        datasets.
    format : str, optional
        One of `FORMATS`; guessed by default.
    options : ReadOptions, optional
        What to read of it, and how.

    Returns
    -------
    VectorSource
        To be closed by the caller.

    Raises
    ------
    ValueError
        There is no such format.
    SourceError
        The source is not what it claims to be, its format cannot be told, or it has no use for an option.
    OSError
        It cannot be read.

    Examples
    --------
    >>> import numpy as np
    >>> np.save(tmp / "vectors.npy", np.eye(3, dtype=np.float16))
    >>> with open_source(tmp / "vectors.npy") as source:
    ...     source.format, source.num_rows, source.dim, source.dtype, next(source.blocks()).rows[0].tolist()
    ('npy', 3, 3, 'float16', [1.0, 0.0, 0.0])
    """
    if format is not None and format not in _OPENERS:
        msg = f"format must be one of {', '.join(FORMATS)}, got {format!r:.80}"
        raise ValueError(msg)
    module, _, function = _OPENERS[guess(source) if format is None else format].partition(".")
    opener: Any = getattr(import_module(f"shardemb.imports.{module}"), function)
    found: VectorSource = opener(source, ReadOptions() if options is None else options)
    return found


def origin_of(source: object, format: str, options: ReadOptions) -> str | None:
    """Describe what is read of a file or folder, so that what it becomes when it changes has another description.

    None for an object.
    """
    if not isinstance(source, str | os.PathLike):
        return None
    path = local_path(source, "the file to import").resolve()
    path = path.parent if path.name.endswith(".index.json") else path  # which names files beside it
    files = sorted(each for each in ([path, *path.rglob("*")] if path.is_dir() else [path]))
    states = [(str(each), status.st_size, status.st_mtime_ns) for each in files for status in (each.stat(),)]
    return repr((states, format, options))


def guess(source: object) -> str:
    """Return the format of a source, one of `FORMATS`.

    Raises
    ------
    SourceError
        It has none of them, or more than one could be meant.
    OSError
        It cannot be read.
    """
    if any(hasattr(source, each) for each in ("__arrow_c_stream__", "with_format")):
        return "arrow"
    path = local_path(source, "the file to import")
    if path.is_dir():
        return _of_folder(path)
    if not path.exists() and re.search(r"[*?[]", str(path)):
        return "parquet"
    with streams.open_stream(path) as stream:
        head, compression = stream.peek(_HEAD), stream.compression
        whole = not compression and stream.size <= _HEAD
    found = _of_bytes(path, head, whole)
    if compression and found not in _TEXT:
        raise refuse(str(path), "", f"is {found}, compressed with {compression}; decompress it first")
    return found


def _of_folder(path: Path) -> str:
    if any((path / each).exists() for each in ("zarr.json", ".zarray", ".zgroup")):
        return "zarr"
    if any(each.name.endswith((".safetensors", ".safetensors.index.json")) for each in path.iterdir()):
        return "safetensors"
    if next(path.rglob("*.parquet"), None) is not None:
        return "parquet"
    raise _unknown(path, "the folder has no metadata of zarr, no .safetensors and no .parquet files")


def _of_bytes(path: Path, head: bytes, whole: bool) -> str:
    """Tell a format by the first bytes of a file, of which these may be all."""
    for magic, found in _MAGIC:
        if head.startswith(magic):
            return found
    if head.startswith(b"PK\x03\x04"):
        return _of_zip(path)
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 2**32:
        return "safetensors"
    if head.startswith(b"{") and b'"weight_map"' in head:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        raise _pickle(path)
    return _of_text(path, head, whole)


def _of_zip(path: Path) -> str:
    """Tell what a zip archive is by its members: each program has its own."""
    names = [info.filename for info in zip_members(path)]
    if any(name.endswith("/data.pkl") for name in names):
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "npy"
    raise _unknown(
        path, f"the archive has no .npy, and nothing that torch writes, but {listed(names)}; unpack it"
    )


def _pickle(path: Path) -> SourceError:
    what = "is a pickle of Python, which runs whatever it says when it is loaded, so it is never read here"
    # gensim saves large arrays beside the object that has them: f.vectors.npy, f.wv.vectors.npy, f.vectors_ngrams.npy.
    arrays = [each.name for each in path.parent.iterdir() if each.name.startswith(f"{path.name}.")]
    vectors = sorted(each for each in arrays if each.endswith(".npy") and "vectors" in each)
    if vectors:
        way_out = (
            f"gensim has saved the vectors beside it: import {listed(vectors)}, with tokens= a text file of the words, "
            f"one a line, as model.index_to_key has them"
        )
    else:
        way_out = (
            "load it with the library that wrote it, and save the vectors in word2vec's format, as .npy or so"
        )
    return refuse(str(path), "", f"{what}; {way_out}")


def _of_text(path: Path, head: bytes, whole: bool) -> str:
    """Tell text formats by their first two lines, and word2vec's binary one by what is no text behind the first."""
    header = _HEADER.match(head)
    if header is None:
        fields = _fields(head, whole)
        if fields is None or not _numbers(fields[-1:]):
            raise _unknown(path, f"it begins with {head[:40]!r}")
        return "glove"
    dim, rest = int(header[2][:9]), head[header.end() :]
    row = _fields(rest, whole)
    if row is not None and len(row) == 2 and _numbers(row[1:]):
        raise _unknown(
            path, "two numbers are a header of word2vec, or a word and its only value, as in the next line"
        )
    if row is not None and _numbers(row[-dim:]):
        return "fasttext-text" if ".vec" in path.suffixes else "word2vec-text"
    # Where the second line is damaged, whoever reads text says how. Numbers of four bytes have some that no text has.
    return "word2vec-binary" if re.search(rb"[\0-\x08\x0e-\x1f]", rest) else "word2vec-text"


def _fields(head: bytes, whole: bool) -> list[bytes] | None:
    """Return the fields of the first line, two or more, if it is text: what is cut off is still a number or not."""
    line, end, _ = head.partition(b"\n")
    fields = line.rstrip(b"\r ").split(b" ")
    if not end and not whole:
        fields.pop()
    return fields if len(fields) >= 2 else None


def _numbers(fields: list[bytes]) -> bool:
    return all(map(_NUMBER.fullmatch, fields))


def _unknown(path: Path, why: str) -> SourceError:
    return refuse(
        str(path), "", f"its format cannot be told: {why}; pass format=, one of {', '.join(FORMATS)}"
    )
