"""Columns: parquet, Arrow files and streams, and whatever has Arrow's C stream interface, read by pyarrow."""

from __future__ import annotations

import contextlib
import glob
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import dataset
from pyarrow import parquet as pq

from shardemb.base.paths import local_path
from shardemb.imports.arrays import convert, lossless, opened
from shardemb.imports.blocks import (
    Block,
    ReadOptions,
    ahead_of,
    block_rows,
    checked_dim,
    listed,
    refuse,
    refuse_unused,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from numpy.typing import NDArray

    from shardemb.base.validation import Float32Array

T = TypeVar("T")

KEY_NAMES = "key", "token", "word", "text", "id"
"""Columns that are taken for keys, the first of these that there is. In exports of tables by key, the key is what says
which row it is; the id says where it was."""

VECTOR_NAMES = "embedding", "embeddings", "vector"
"""Columns that are taken for vectors where several could be."""

_NUMBERS = {
    pa.float16(): "float16", pa.float32(): "float32", pa.float64(): "float64",
    pa.int8(): "int8", pa.uint8(): "uint8", pa.int16(): "int16", pa.uint16(): "uint16",
}  # fmt: skip
"""Types of values that are read, and NumPy's names of them."""

_BUFFER = 4 * 2**20
"""Bytes of a column of a parquet file that are read at once; without it, pyarrow reads those of a whole row group."""

_TABLE_ROWS = 2**12
"""Rows that a data set is asked for at once."""

_PIECES = 4
"""Pieces of a block that are decoded on their own: pyarrow doubles the memory of a list as it grows."""

_MOST_ROWS = 2**16
"""Rows that are decoded at once, however short they are: their keys may be long."""

_KEY_BYTES = 32 * 2**20
"""Bytes of keys after which a block ends, however few values it has."""

_MOST_AHEAD, _ROWS_AHEAD = 4, 4
"""Row groups of a parquet file that are decoded concurrently at most, and blocks that their rows may make together."""


# ---- columns ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Which columns of a source are read.

    Attributes
    ----------
    vectors : tuple of str
        One column of lists, or several columns of one value each.
    keys : str or None
        The column of keys.
    """

    vectors: tuple[str, ...]
    keys: str | None

    @property
    def names(self) -> list[str]:
        """All of them."""
        return [*([] if self.keys is None else [self.keys]), *self.vectors]


def _unwrapped(kind: pa.DataType) -> pa.DataType:
    """Return the type as which values are stored: that of a tensor of fixed shape is a list."""
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _is_vector(kind: pa.DataType) -> bool:
    return _is_list(kind) and kind.value_type in _NUMBERS


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_key(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))


def find_columns(schema: pa.Schema, wanted: tuple[str, ...], name: str) -> Columns:
    """Return which columns to read: those that are wanted, or those that the types and names of all point to.

    Raises
    ------
    SourceError
        There is no such column, it is of another type, or several could be meant.

    Examples
    --------
    >>> find_columns(pa.schema({"id": pa.int64(), "vector": pa.list_(pa.float64())}), (), "x")
    Columns(vectors=('vector',), keys='id')
    """
    try:
        kinds = {each.name: _unwrapped(each.type) for each in schema}
    except UnicodeDecodeError as error:
        raise refuse(name, "", f"the name of a column is not UTF-8: {error.object!r:.80}") from error
    every = listed([f"{each} ({kind})" for each, kind in kinds.items()])
    for each in wanted or schema.names:
        if schema.names.count(each) != 1:
            what = "is there twice" if each in kinds else "is not there"
            raise refuse(name, f"column {each!r}", f"{what}; there are {every}")
    if wanted:
        return _wanted_columns(kinds, wanted, name)
    vectors = [each for each, kind in kinds.items() if _is_vector(kind)]
    named = [each for each in vectors if each in VECTOR_NAMES]
    vectors = named if len(named) == 1 else vectors
    if len(vectors) != 1:
        if any(pa.types.is_fixed_size_binary(kind) for kind in kinds.values()):
            problem = "a column is bytes of fixed size, as raw rows are exported: which numbers they are is not said"
            raise refuse(name, "", f"{problem}; export the table as float32, or convert that column to lists")
        problem = f"{len(vectors) or 'no'} columns are lists of numbers; say which columns to read: {every}"
        raise refuse(name, "", problem)
    keys = next((each for each in KEY_NAMES if each in kinds and _is_key(kinds[each])), None)
    return Columns((vectors[0],), keys)


def _wanted_columns(kinds: dict[str, pa.DataType], wanted: tuple[str, ...], name: str) -> Columns:
    """Tell what columns given by name mean: of several, the first may be the keys, if it is of text or integers."""
    keys = wanted[0] if len(wanted) > 1 and _is_key(kinds[wanted[0]]) else None
    vectors = wanted[1:] if keys is not None else wanted
    lists = len(vectors) == 1 and _is_vector(kinds[vectors[0]])
    for each in vectors:
        if not lists and kinds[each] not in _NUMBERS:
            problem = (
                f"is {kinds[each]}; vectors are one column of lists of float16, float32, float64 or integers "
                f"of at most 16 bits, or several columns of such numbers"
            )
            raise refuse(name, f"column {each!r}", problem)
    return Columns(vectors, keys)


# ---- values -----------------------------------------------------------------------------------------------------


def _checked(array: pa.Array, place: str, first: int, name: str) -> pa.Array:
    """Return the values of a column, without a type of another library around them, if none is missing.

    Before anything of a list or a string is used, its offsets are known to stay within its values, and text to be
    UTF-8: a file can say anything, and most readers leave that to their callers.
    """
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        raise refuse(name, f"{place}, from row {first} on", f"is damaged: {error}") from error
    array = array.storage if isinstance(array, pa.ExtensionArray) else array
    if array.null_count:
        row = first + pc.index(pc.is_null(array), True).as_py()
        raise refuse(name, f"{place}, row {row}", "is missing (null); leave such rows out first")
    return array


def as_keys(array: pa.Array, column: str, first: int, name: str) -> pa.Array | NDArray[np.int64]:
    """Return a column of keys as strings of Arrow or as integers of NumPy; `first` is the number of its first row.

    Raises
    ------
    SourceError
        A key is missing, or an integer does not fit into 64 bits.
    """
    place = f"column {column!r}"
    array = _checked(array, place, first, name)
    if pa.types.is_dictionary(array.type):
        array = _checked(array.dictionary_decode(), place, first, name)
    if pa.types.is_string_view(array.type):
        array = array.cast(pa.large_string())
    if _is_text(array.type):
        return array
    try:
        return array.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise refuse(
            name, f"{place}, from row {first} on", f"a key is larger than 2**63 - 1: {error}"
        ) from error


def as_rows(array: pa.Array, dim: int, column: str, first: int, name: str) -> Float32Array:
    """Return a column of lists as rows, without a copy if they are float32; `first` is the number of the first row.

    Raises
    ------
    SourceError
        A list or a value is missing, a list has another length, or a number is too large for float32.
    """
    place = f"column {column!r}"
    array = _checked(array, place, first, name)
    if not pa.types.is_fixed_size_list(array.type):
        lengths = np.diff(array.offsets.to_numpy())
        others = np.flatnonzero(lengths != dim)
        if others.size:
            problem = f"has {lengths[others[0]]} values, but rows before it have {dim}"
            raise refuse(name, f"{place}, row {first + others[0]}", problem)
    values = array.flatten()  # of this slice alone
    if values.null_count:
        row = first + pc.index(pc.is_null(values), True).as_py() // dim
        raise refuse(
            name, f"{place}, row {row}", "a value is missing (null); fill it, or leave such rows out first"
        )
    return _floats(values.to_numpy(zero_copy_only=True).reshape(-1, dim), f"{name}, {place}", first)


def _floats(numbers: NDArray[Any], name: str, first: int) -> Float32Array:
    if numbers.dtype == np.float32 and numbers.flags.aligned:
        return numbers
    rows = np.empty(numbers.shape, np.float32)
    convert(numbers, rows, name, first)
    return rows


def find_dim(
    schema: pa.Schema, columns: Columns, batches: Iterator[pa.RecordBatch], name: str
) -> tuple[int, Iterator[pa.RecordBatch]]:
    """Return the number of values in a row, and the batches that are to be read, none of them lost.

    Lists that may have any length do not say it in their type. The first one does then, and the others have to fit.
    """
    kind, place = _unwrapped(schema.field(columns.vectors[0]).type), f"column {columns.vectors[0]!r}"
    if not _is_list(kind):
        return checked_dim(len(columns.vectors), name), batches
    if pa.types.is_fixed_size_list(kind):
        return checked_dim(int(kind.list_size), name, place), batches
    for batch in batches:
        if batch.num_rows:
            lists = _checked(batch.column(columns.vectors[0]).slice(0, 1), place, 0, name)
            dim = checked_dim(int(np.diff(lists.offsets.to_numpy())[0]), name, place)
            return dim, chain([batch], batches)
    raise refuse(name, place, "there are no rows, which would tell how long the lists are")


# ---- sources ----------------------------------------------------------------------------------------------------


@dataclass
class ColumnSource:
    """Record batches, as a `VectorSource`.

    Parameters
    ----------
    format, name, dim, num_rows
        As of a `VectorSource`.
    schema : pyarrow.Schema
        Of the batches, and maybe of more columns.
    columns : Columns
        Which are read.
    batches : iterator of pyarrow.RecordBatch
        Of any sizes.
    limit : int, optional
        At most so many rows.
    key_batches : iterator of pyarrow.RecordBatch, optional
        The column of keys alone, where that can be read too.
    resources : ExitStack
        What `close` closes.
    """

    format: str
    name: str
    dim: int
    num_rows: int | None
    schema: pa.Schema
    columns: Columns
    batches: Iterator[pa.RecordBatch]
    limit: int | None = None
    key_batches: Iterator[pa.RecordBatch] | None = None
    resources: ExitStack = field(default_factory=ExitStack)
    dtype: str = field(init=False)
    total: int = field(init=False)
    unit: Literal["row", "byte"] = field(init=False, default="row")
    key_type: Literal["string", "int64"] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.num_rows is not None and self.limit is not None:
            self.num_rows = min(self.num_rows, self.limit)
        self.total = self.num_rows or 0
        kinds = [_unwrapped(self.schema.field(each).type) for each in self.columns.vectors]
        self._is_list = _is_list(kinds[0])
        self.dtype = lossless(*(_NUMBERS[kind.value_type if self._is_list else kind] for kind in kinds))
        if self.columns.keys is not None:
            self.key_type = (
                "string" if _is_text(_unwrapped(self.schema.field(self.columns.keys).type)) else "int64"
            )

    def key_blocks(self) -> Iterator[Any] | None:
        """Read the keys alone, where that is possible."""
        return None if self.key_batches is None else self._keys(self.key_batches)

    def _keys(self, batches: Iterator[pa.RecordBatch]) -> Iterator[Any]:
        first = 0
        for batch in batches:
            some = batch if self.limit is None else batch.slice(0, self.limit - first)
            if some.num_rows:
                yield as_keys(some.column(0), some.schema.names[0], first, self.name)
            first += some.num_rows

    def blocks(self) -> Iterator[Block]:
        """Read the rows, once, in order."""
        first, most = 0, block_rows(self.dim)
        pending: list[tuple[Float32Array, Any]] = []
        waiting = key_bytes = 0
        for rows, keys in self._pieces(min(most, _MOST_ROWS)):
            # One that is large enough is passed on as it is; those of small batches are brought together.
            pending.append((rows, keys))
            waiting += len(rows)
            key_bytes += 0 if keys is None else keys.nbytes
            if 2 * waiting >= most or key_bytes >= _KEY_BYTES:
                yield _joined(pending, first)
                first, pending, waiting, key_bytes = first + waiting, [], 0, 0
        if pending:
            yield _joined(pending, first)

    def _pieces(self, most: int) -> Iterator[tuple[Float32Array, Any]]:
        """Iterate over rows and keys, at most so many of them at once, and at most as many as wanted."""
        first = 0
        for batch in self.batches:
            for start in range(0, batch.num_rows, most):
                count = min(most, batch.num_rows - start)
                count = count if self.limit is None else min(count, self.limit - first)
                if count:
                    yield self._piece(batch.slice(start, count), first)
                first += count
                if first == self.limit:
                    return
        if self.num_rows is not None and first != self.num_rows:
            raise refuse(
                self.name, f"row {first}", f"is where it ends, and {self.num_rows} rows were promised"
            )

    def _piece(self, batch: pa.RecordBatch, first: int) -> tuple[Float32Array, Any]:
        arrays = [batch.column(each) for each in self.columns.vectors]
        if self._is_list:
            rows = as_rows(arrays[0], self.dim, self.columns.vectors[0], first, self.name)
        else:
            rows = np.empty((batch.num_rows, self.dim), np.float32)
            for place, (each, array) in enumerate(zip(self.columns.vectors, arrays, strict=True)):
                values = _checked(array, f"column {each!r}", first, self.name).to_numpy(zero_copy_only=True)
                convert(values[:, None], rows[:, place : place + 1], f"{self.name}, column {each!r}", first)
        keys = self.columns.keys
        return rows, None if keys is None else as_keys(batch.column(keys), keys, first, self.name)

    def close(self) -> None:
        """Close the source."""
        self.batches = iter(())
        self.resources.close()

    def __enter__(self) -> ColumnSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _joined(pieces: list[tuple[Float32Array, Any]], first: int) -> Block:
    if len(pieces) == 1:
        rows, keys = pieces[0]
    else:
        rows = np.concatenate([each for each, _ in pieces])
        parts = [each for _, each in pieces]
        keys = None if parts[0] is None else _joined_keys(parts)
    return Block(rows, keys, first, len(rows))


def _joined_keys(parts: list[Any]) -> Any:  # noqa: ANN401
    return np.concatenate(parts) if isinstance(parts[0], np.ndarray) else pa.concat_arrays(parts)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Make a `SourceError` of what pyarrow raises for a damaged source, but not of errors of the disk."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise refuse(name, "", f"pyarrow cannot read it: {error}") from error


def _reported(batches: Iterable[pa.RecordBatch], name: str) -> Iterator[pa.RecordBatch]:
    """Pass batches on, with errors as by `_reading`."""
    with _reading(name):
        yield from batches


# ---- parquet ----------------------------------------------------------------------------------------------------


def open_parquet(source: object, options: ReadOptions) -> ColumnSource:
    """Open a parquet file, all those below a folder, or those that a pattern fits, by ascending numbers in their names.

    Columns are chosen by `columns`, or found: vectors are the only column of lists of numbers, or the one that is
    called ``embedding``, ``embeddings`` or ``vector``; keys are called ``key``, ``token``, ``word``, ``text`` or
    ``id``.

    Raises
    ------
    SourceError
        There are no such files or columns; files differ in their columns; one is damaged; an option is set that means
        nothing here.
    OSError
        A file cannot be read.

    Notes
    -----
    pyarrow makes room for what the header of a page says, which is less than 2 GiB, before it finds the page damaged.
    """
    path = local_path(source, "the file to import")
    name = str(path)
    refuse_unused(name, options, "columns")
    paths = parquet_files(path)
    schema, columns = _parquet_schema(paths[0], options)
    num_rows = sum(_parquet_rows(each, schema, columns) for each in paths)
    with contextlib.closing(_first_rows(paths, columns)) as first:
        dim, _ = find_dim(schema, columns, first, name)
    batches = _read_parquet(paths, columns, dim)
    keys = None if columns.keys is None else _read_keys(paths, columns.keys)
    found = ColumnSource("parquet", name, dim, num_rows, schema, columns, batches, options.limit, keys)
    found.resources.callback(batches.close)
    return found


def _read_keys(paths: list[Path], column: str) -> Iterator[pa.RecordBatch]:
    """Read the column of keys of all files."""
    for path in paths:
        with _opened_parquet(path) as file:
            yield from _reported(file.iter_batches(columns=[column]), str(path))


def _parquet_schema(path: Path, options: ReadOptions) -> tuple[pa.Schema, Columns]:
    """Return the columns of a file, and which of them to read."""
    with _reading(str(path)), pq.ParquetFile(path) as file:
        schema = file.schema_arrow
    return schema, find_columns(schema, options.columns, str(path))


def _parquet_rows(path: Path, schema: pa.Schema, columns: Columns) -> int:
    """Count the rows of a file, which must have columns like the first one."""
    with _reading(str(path)), pq.ParquetFile(path) as file:
        found, rows = file.schema_arrow, int(file.metadata.num_rows)
    for each in columns.names:
        kinds = [one.type for one in found if one.name == each]
        if kinds != [schema.field(each).type]:
            what = kinds[0] if len(kinds) == 1 else "there twice" if kinds else "missing"
            raise refuse(
                str(path), f"column {each!r}", f"is {what}, but {schema.field(each).type} in the first file"
            )
    return rows


def parquet_files(path: Path) -> list[Path]:
    """Return the files that a path stands for: itself, those below a folder, or those that a pattern fits."""
    if path.is_dir():
        found = [each for each in path.rglob("*.parquet") if not _is_hidden(each.relative_to(path))]
    elif not path.exists() and glob.has_magic(str(path)):
        found = [Path(each) for each in glob.iglob(str(path), recursive=True)]
    else:
        with ExitStack() as checked:
            opened(path, checked)
        return [path]
    if not found:
        raise refuse(str(path), "", "there is no parquet file of that name")
    return sorted(found, key=by_numbers)


def _is_hidden(path: Path) -> bool:
    """Return whether other programs leave a file out of a data set: such names are for what is being written."""
    return any(each.startswith(("_", ".")) for each in path.parts)


def by_numbers(path: Path) -> list[tuple[int, int, str]]:
    """Sort part-9 before part-10."""
    return [
        (0, int(each), each) if each.isdecimal() else (1, 0, each) for each in re.split("([0-9]+)", str(path))
    ]


def _first_rows(paths: list[Path], columns: Columns) -> Generator[pa.RecordBatch]:
    """Read one row of each file."""
    for path in paths:
        with _opened_parquet(path) as file:
            yield from islice(_reported(file.iter_batches(1, columns=columns.names), str(path)), 1)


def _read_parquet(paths: list[Path], columns: Columns, dim: int) -> Generator[pa.RecordBatch]:
    """Read files one after the other: row groups concurrently if they are small, or else one, a part at a time.

    A row group is decoded by one thread, and most of the time that an import takes is spent there.
    """
    most = min(block_rows(dim), _MOST_ROWS)
    rows = max(1, most // _PIECES)
    with ThreadPoolExecutor(min(_MOST_AHEAD, pa.cpu_count())) as pool:
        for path in paths:
            with _opened_parquet(path) as file:
                groups = [file.metadata.row_group(each).num_rows for each in range(file.num_row_groups)]
                ahead = min(_MOST_AHEAD, _ROWS_AHEAD * most // max([1, *groups]))
                if ahead > 1:
                    read = partial(_read_group, path, file.metadata, columns, rows)
                    tasks = (partial(read, group) for group in range(len(groups)))
                    batches = chain.from_iterable(ahead_of(pool, tasks, ahead))
                else:
                    batches = file.iter_batches(rows, columns=columns.names)
                yield from _reported(batches, str(path))


def _read_group(
    path: Path, metadata: pq.FileMetaData, columns: Columns, rows: int, group: int
) -> list[pa.RecordBatch]:
    with _opened_parquet(path, metadata) as file:
        return list(file.iter_batches(rows, row_groups=[group], columns=columns.names, use_threads=False))


def _opened_parquet(path: Path, metadata: pq.FileMetaData = None) -> pq.ParquetFile:
    """Open a file so that of each column a few pages are in memory at a time, and not all of a row group."""
    return pq.ParquetFile(path, metadata=metadata, buffer_size=_BUFFER, pre_buffer=False)


# ---- Arrow ------------------------------------------------------------------------------------------------------


def open_arrow(source: object, options: ReadOptions) -> ColumnSource:
    """Open an Arrow file or stream on disk, anything that has Arrow's C stream interface, or a data set of datasets.

    Tables, record batches and their readers, and frames of polars, pandas and DuckDB have that interface. Columns are
    chosen or found as by `open_parquet`.

    Raises
    ------
    SourceError
        It is none of these; there are no such columns; a file is damaged; an option is set that means nothing here.
    OSError
        The file cannot be read.
    """
    if hasattr(source, "__arrow_c_stream__") or hasattr(source, "with_format"):
        return _of_object(source, options)
    path = local_path(source, "the file to import")
    name = str(path)
    refuse_unused(name, options, "columns")
    with ExitStack() as resources:
        is_file = opened(path, resources).read(0, 6) == b"ARROW1"
        with _reading(name):
            data = resources.enter_context(pa.memory_map(name))
            reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(data)
            num_rows = dataset.dataset(name, format="ipc").count_rows() if is_file else None
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
        found = _of_batches(name, num_rows, reader.schema, batches, options)
        found.resources = resources.pop_all()
        return found


def _of_object(source: Any, options: ReadOptions) -> ColumnSource:  # noqa: ANN401
    """Read what a library in this process offers; it is asked for batches only as they are needed."""
    kind = type(source)
    name = f"{kind.__module__.partition('.')[0]}.{kind.__name__}"
    refuse_unused(name, options, "columns")
    counts = (
        getattr(source, each, None) for each in ("num_rows", "height")
    )  # of Arrow and datasets, of polars
    num_rows = next((each for each in counts if isinstance(each, int)), None)
    with _reading(name):
        schema, batches = _batches_of(source)
    return _of_batches(name, num_rows, schema, batches, options)


def _batches_of(source: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:  # noqa: ANN401
    if hasattr(source, "__arrow_c_stream__"):
        reader = pa.RecordBatchReader.from_stream(source)
        return reader.schema, iter(reader)
    # A data set: its table has all rows that it was made of, and only `iter` those that it consists of.
    tables = iter(source.with_format("arrow").iter(_TABLE_ROWS))
    first = next(tables, pa.table({}))
    return first.schema, chain.from_iterable(table.to_batches() for table in chain([first], tables))


def _of_batches(
    name: str,
    num_rows: int | None,
    schema: pa.Schema,
    batches: Iterator[pa.RecordBatch],
    options: ReadOptions,
) -> ColumnSource:
    columns = find_columns(schema, options.columns, name)
    dim, batches = find_dim(schema, columns, _reported(batches, name), name)
    return ColumnSource("arrow", name, dim, num_rows, schema, columns, batches, options.limit)
