"""Vectors as one array in a file: NumPy's .npy, and safetensors.

Where a row is in the file is known before it is read, so that several threads write blocks of rows at their places. The
keys of a table go to a text file beside the array, one a line, in the order of its rows.
"""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.progress import track
from shardemb.base.sizes import PAGE, round_up
from shardemb.exports import targets, words
from shardemb.exports.arrow import Selection
from shardemb.exports.selection import with_keys
from shardemb.exports.targets import ExportReport
from shardemb.storage import files

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from shardemb.base.progress import Advance, Progress
    from shardemb.exports.selection import RowSet, RowSource
    from shardemb.exports.targets import Sink

SAFETENSORS = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "raw": "U8",
}  # fmt: skip
"""What safetensors calls each dtype."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1, "raw": 1}

BLOCK_BYTES = 4 * 2**20
"""Bytes of a block as float32: its memory is used again for the next one, and is in a cache when it is written."""

BLOCKS_AT_ONCE = 16
"""How many blocks each thread writes before the keys of all of them are written."""


def export_npy(source: RowSource, path: object, rows: RowSet, *, progress: Progress = None) -> ExportReport:
    """Write a .npy file of float32, of float16 if the table stores that, or of uint8 if it holds raw bytes.

    It can be mapped: ``np.load(path, mmap_mode="r")``. Keys are in ``NAME.tokens.txt``.
    """
    rows = with_keys(source, rows)
    kind = {"float32": "<f4", "float16": "<f2", "raw": "|u1"}[source.form]
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": kind, "fortran_order": False, "shape": (rows.num_rows, source.embedding_dim)}
    )
    target = targets.checked(path, source.name, folder=False)
    return _export(source, source.form, [_ArrayFile(target, header.getvalue(), rows)], None, progress)


def export_safetensors(
    source: RowSource, path: object, rows: RowSet, *, name: str, most_bytes: int, progress: Progress = None
) -> ExportReport:
    """Write a safetensors file with one tensor, or several with a part each, and an index of these.

    The tensor has the dtype in which the table stores its rows, where safetensors has that, otherwise F32; raw bytes
    are U8. Its data begin at a multiple of 4,096 bytes, so that they can be mapped. Keys are in ``NAME.tokens.txt``.

    Parameters
    ----------
    source, path, rows, progress
        As for all formats.
    name : str
        Name of the tensor. Several are called ``NAME.0``, ``NAME.1`` and so on.
    most_bytes : int
        Most bytes of a tensor. If there are more, ``embedding.safetensors`` becomes
        ``embedding-00001-of-00002.safetensors`` and so on, with ``embedding.safetensors.index.json``.
    """
    rows = with_keys(source, rows)
    target = targets.checked(path, source.name, folder=False)
    row_bytes = ITEM_BYTES[source.stored] * source.embedding_dim
    part_rows = max(1, most_bytes // row_bytes)
    cuts = list(range(0, rows.num_rows, part_rows)) or [0]
    parts = [rows.part(first, min(first + part_rows, rows.num_rows)) for first in cuts]
    if len(parts) == 1:
        only = _ArrayFile(target, _header(source, name, rows, row_bytes), rows)
        return _export(source, source.stored, [only], None, progress)
    stem = target.name.removesuffix(".safetensors")
    names = [f"{stem}-{k:05d}-of-{len(parts):05d}.safetensors" for k in range(1, len(parts) + 1)]
    tensors = [f"{name}.{k}" for k in range(len(parts))]
    arrays = [
        _ArrayFile(target.with_name(file), _header(source, tensor, part, row_bytes), part)
        for file, part, tensor in zip(names, parts, tensors, strict=True)
    ]
    index = {
        "metadata": {"total_size": rows.num_rows * row_bytes},
        "weight_map": dict(zip(tensors, names, strict=True)),
    }
    index_file = target.with_name(f"{stem}.safetensors.index.json"), json.dumps(index, indent=2).encode()
    return _export(source, source.stored, arrays, index_file, progress)


def _header(source: RowSource, name: str, rows: RowSet, row_bytes: int) -> bytes:
    """Return the header of a file with one tensor: blanks at its end let the data begin at a page."""
    document = {
        "__metadata__": {"format": "pt", "table": source.name},
        name: {
            "dtype": SAFETENSORS[source.stored],
            "shape": [rows.num_rows, source.embedding_dim],
            "data_offsets": [0, rows.num_rows * row_bytes],
        },
    }
    text = json.dumps(document).encode()
    padded = text.ljust(round_up(8 + len(text), PAGE) - 8)
    return len(padded).to_bytes(8, "little") + padded


@dataclass(frozen=True)
class _ArrayFile:
    """A file of a header and rows."""

    path: Path
    header: bytes
    rows: RowSet


def _export(
    source: RowSource,
    form: str,
    arrays: Sequence[_ArrayFile],
    index: tuple[Path, bytes] | None,
    progress: Progress,
) -> ExportReport:
    """Write files with vectors as some form, one with their keys, and an index of the files if there is one."""
    main = arrays[0].path if index is None else index[0]
    stem = main.name.removesuffix(".index.json").removesuffix(".safetensors").removesuffix(".npy")
    keys_path = None if source.keys is None else main.with_name(f"{stem}.tokens.txt")
    paths = [each.path for each in arrays]
    # The last one is published first: what names the others, or stands for them, comes when they are there.
    order = [*([index[0]] if index else []), *paths, *([keys_path] if keys_path else [])]
    total = sum(each.rows.num_rows for each in arrays)
    with (
        track(total, f"export {source.name}", progress=progress) as advance,
        contextlib.ExitStack() as stack,
    ):
        sinks = {path: stack.enter_context(_staged_sink(path, source.name)) for path in order}
        if index is not None:
            sinks[index[0]].write(index[1])
        for each in arrays:
            sinks[each.path].write(each.header)
            tokens = sinks[keys_path] if keys_path else None
            chosen = Selection.of(source, (), each.rows, most_bytes=BLOCK_BYTES)
            _write_rows(chosen, form, sinks[each.path], tokens, advance)
    return ExportReport.of([*paths, *(path for path in order if path not in paths)], total)


@contextlib.contextmanager
def _staged_sink(path: Path, table: str) -> Iterator[Sink]:
    target = targets.checked(path, table, folder=False)
    with targets.staged(target, []) as temporary, targets.new_file(temporary) as sink:
        yield sink


def _write_rows(chosen: Selection, form: str, sink: Sink, tokens: Sink | None, advance: Advance) -> None:
    """Write vectors after what is in a file, and their keys to another one."""
    begin = sink.tell()
    # Bytes as they are stored need no decoding, and no dtype that NumPy lacks.
    read_as = "float32" if form == "float32" else "raw"
    row_bytes = ITEM_BYTES[form] * chosen.source.embedding_dim

    def write_block(first: int, last: int) -> memoryview:
        vectors, keys = chosen.read_vectors(read_as, first, last)
        offset, nbytes = begin + first * row_bytes, (last - first) * row_bytes
        if nbytes:
            files.write(sink.descriptor, vectors.reshape(-1).data, offset, sink.path)
        files.begin_write_back(sink.descriptor, offset, nbytes)
        advance(last - first)
        return memoryview(b"") if keys is None or tokens is None else _token_lines(chosen, keys, first)

    ranges = chosen.ranges()
    while some := list(islice(ranges, BLOCKS_AT_ONCE * chosen.source.threads)):
        for data in chosen.source.run([partial(write_block, *each) for each in some]):
            if tokens is not None:
                tokens.write(data)


def _token_lines(chosen: Selection, keys: object, first: int) -> memoryview:
    tokens = words.as_tokens(keys)
    at = words.first_with(tokens, b"\n")
    if at is not None:
        token = tokens[at].as_py().decode(errors="backslashreplace")
        row = int(chosen.rows.ids(first + at, first + at + 1)[0])
        msg = (
            f"table {chosen.source.name!r}: the key {token!r:.100} of row {row} has a line break, and keys are written "
            f"one a line: leave it out with where=, or export to parquet or arrow"
        )
        raise ValueError(msg)
    return words.with_line_ends(tokens)
