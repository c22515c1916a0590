"""Vectors with their tokens: word2vec's two formats, and lines of numbers.

Blocks of rows become bytes through kernels of Arrow: numbers become the shortest text that reads back as the same
float32, and the pieces of all rows are joined at once. Nothing is done row by row in Python.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shardemb.base.progress import track
from shardemb.exports import targets
from shardemb.exports.arrow import MAX_READ_AHEAD, Selection
from shardemb.exports.selection import with_keys
from shardemb.exports.targets import ExportReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from shardemb.base.progress import Progress
    from shardemb.exports.selection import RowSet, RowSource

BINARY_BYTES = 4 * 2**20
"""Bytes of float32 in a block of the binary format; see `arrays.BLOCK_BYTES`."""

TEXT_BYTES = 4 * 2**20
"""Bytes of float32 in a block that becomes text, which is three times as large, and twice that while it is made."""


def export_text(source: RowSource, path: object, rows: RowSet, *, progress: Progress = None) -> ExportReport:
    """Write word2vec's text format: a line with the numbers of rows and of values, then a line for each row.

    Raises
    ------
    ValueError
        A token has a blank or a line break, or is empty; or the table holds raw bytes.
    """
    chosen = Selection.of(source, (), with_keys(source, rows), most_bytes=TEXT_BYTES)
    return _export(chosen, path, lambda tokens, vectors: lines(vectors, " ", tokens), progress)


def export_binary(
    source: RowSource, path: object, rows: RowSet, *, progress: Progress = None
) -> ExportReport:
    """Write word2vec's binary format: a line as of the text format, then token, blank and float32 for each row.

    Raises
    ------
    ValueError
        As for `export_text`.
    """
    chosen = Selection.of(source, (), with_keys(source, rows), most_bytes=BINARY_BYTES)
    return _export(chosen, path, _records, progress)


def _export(
    chosen: Selection,
    path: object,
    encode: Callable[[pa.Array, NDArray[np.float32]], memoryview],
    progress: Progress,
) -> ExportReport:
    source = chosen.source
    require_numbers(source, "word2vec's formats have")
    target = targets.checked(path, source.name, folder=False)

    def block(first: int, last: int) -> tuple[int, memoryview]:
        vectors, keys = chosen.read_vectors("float32", first, last)
        ids = chosen.rows.ids(first, last)
        tokens = as_tokens(ids if keys is None else keys)
        _require_words(source.name, tokens, ids)
        return last - first, encode(tokens, vectors)

    def write(blocks: list[tuple[int, memoryview]]) -> None:
        for count, data in blocks:
            sink.write(data)
            sink.begin_write_back()
            advance(count)

    with (
        track(chosen.num_rows, f"export {source.name}", progress=progress) as advance,
        targets.staged(target, []) as temporary,
        targets.new_file(temporary) as sink,
    ):
        sink.write(f"{chosen.num_rows} {source.embedding_dim}\n".encode())
        ranges, made = chosen.ranges(), list[Any]()
        ahead = min(source.threads, MAX_READ_AHEAD)
        # One thread writes some blocks, while the others make the next ones.
        while some := list(islice(ranges, ahead)):
            tasks: list[Callable[[], Any]] = [partial(write, made), *(partial(block, *each) for each in some)]
            made = source.run(tasks)[1:]
        write(made)
    return ExportReport.of([target], chosen.num_rows)


def require_numbers(source: RowSource, what: str) -> None:
    """Refuse a table of raw bytes, in which nobody knows numbers."""
    if source.form == "raw":
        msg = f"table {source.name!r} holds raw bytes, but {what} numbers: export to parquet, arrow, npy or safetensors"
        raise ValueError(msg)


def as_tokens(keys: Any) -> pa.Array:  # noqa: ANN401
    """Return keys, or row ids, as Arrow's large_binary: integers as decimals.

    Examples
    --------
    >>> as_tokens(np.array([7, 10])).to_pylist()
    [b'7', b'10']
    """
    found = pa.array(keys) if isinstance(keys, np.ndarray) else keys
    if pa.types.is_integer(found.type):
        found = found.cast(pa.large_string())
    return found.cast(pa.large_binary())


def content(joined: pa.Array) -> memoryview:
    """Return the bytes of an array of large_binary, which follow each other."""
    bounds = _bounds(joined)
    return memoryview(joined.buffers()[2] or b"")[int(bounds[0]) : int(bounds[-1])]


def lines(vectors: NDArray[np.float32], separator: str, tokens: pa.Array | None = None) -> memoryview:
    r"""Return a line for each row: the token if there is one, then the numbers.

    Examples
    --------
    >>> bytes(lines(np.array([[0.1, -2.0], [1e-30, np.nan]], np.float32), "\t"))
    b'0.1\t-2\n1e-30\tnan\n'
    """
    count, dim = vectors.shape
    numbers = pa.array(vectors.reshape(-1)).cast(pa.large_string()).cast(pa.large_binary())
    rows = pa.LargeListArray.from_arrays(pa.array(np.arange(0, (count + 1) * dim, dim)), numbers)
    sep = pa.scalar(separator.encode(), pa.large_binary())
    joined = pc.binary_join(rows, sep)
    if tokens is not None:
        joined = pc.binary_join_element_wise(tokens, joined, sep)
    return with_line_ends(joined)


def with_line_ends(texts: pa.Array) -> memoryview:
    """Return the bytes of texts, each with a line break after it."""
    nothing, end = (pa.scalar(each, pa.large_binary()) for each in (b"", b"\n"))
    return content(pc.binary_join_element_wise(texts, nothing, end))


def _records(tokens: pa.Array, vectors: NDArray[np.float32]) -> memoryview:
    """Return the binary format of rows."""
    count, dim = vectors.shape
    bounds = np.arange(count + 1) * (4 * dim)
    buffers = [None, pa.py_buffer(bounds), pa.py_buffer(np.ascontiguousarray(vectors, "<f4"))]
    values = pa.Array.from_buffers(pa.large_binary(), count, buffers)
    return content(pc.binary_join_element_wise(tokens, values, pa.scalar(b" ", pa.large_binary())))


def _bounds(array: pa.Array) -> NDArray[np.int64]:
    return np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]


def first_with(tokens: pa.Array, forbidden: bytes) -> int | None:
    """Return the position of the first token that has one of some bytes; None if there is none."""
    bounds = _bounds(tokens)
    data = np.frombuffer(content(tokens), np.uint8)
    found = np.flatnonzero(np.isin(data, np.frombuffer(forbidden, np.uint8)))
    return int(np.searchsorted(bounds - bounds[0], found[0], side="right")) - 1 if found.size else None


def _require_words(table: str, tokens: pa.Array, ids: NDArray[np.int64]) -> None:
    empty = np.flatnonzero(np.diff(_bounds(tokens)) == 0)
    at = int(empty[0]) if empty.size else first_with(tokens, b" \n")
    if at is not None:
        msg = (
            f"table {table!r}: the token {tokens[at].as_py().decode(errors='backslashreplace')!r:.100} of row "
            f"{int(ids[at])} is empty or has a blank or a line break, which ends a token in word2vec's formats: leave "
            f"it out with where=, or export to parquet, arrow or npy"
        )
        raise ValueError(msg)
