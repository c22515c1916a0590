"""The folder of a table: creates one, and checks an existing one before it is mapped, trusting none of its metadata."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.progress import track
from shardemb.base.sizes import PAGE
from shardemb.errors import FormatError, ShardEmbError
from shardemb.format import zarr_metadata
from shardemb.format.table_files import TableLocation
from shardemb.storage import address_space, checksums, files, folders

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

    from shardemb.base.progress import Advance, Progress
    from shardemb.base.validation import FirstRows, Int64Array
    from shardemb.format.spec import TableSpec
    from shardemb.format.table_files import File

_BLOCK_BYTES = 4 * 2**20

_STEPS = "complete-shards"
"""Name of the file, in a folder that is not complete, that says how many shards are."""


def check_mappings(spec: TableSpec, *, exists: bool = False) -> None:
    """Raise `ShardEmbError` if the process cannot map all files of one more table, which may exist already."""
    limit = address_space.MAX_MAPPINGS_OPENING if exists else address_space.MAX_MAPPINGS
    number = spec.num_shards + spec.num_presence_chunks
    more, used = number + address_space.TABLE_MAPPINGS, files.counters.mappings
    if used + more > limit:
        msg = (
            f"the table takes {number} files of {spec.shard_bytes} bytes and {more} mappings, and this process has "
            f"{used} already, but takes at most {limit} (vm.max_map_count): use larger shards or "
            f"close a store"
        )
        raise ShardEmbError(msg)


def create(
    spec: TableSpec,
    directory: Path,
    rows: FirstRows | None,
    progress: Progress = None,
    *,
    stays_cached: bool = False,
    staged: Path | None = None,
) -> None:
    """Create a table's folder with its zarr documents and all its files, which are sparse unless `rows` is given.

    `rows` are read in consecutive ranges of a few MiB; `progress` counts them as they are written. If the table
    `stays_cached`, the page cache keeps them. Nothing is durable yet (`files.sync_tree` makes it durable).

    With `staged`, another folder, rows are first written there, so that after an interruption another call with the
    same spec continues with the first shard that was not complete. They are read in consecutive ranges from the first
    row of a shard on.

    Raises
    ------
    ShardEmbError, OSError
        The table cannot be mapped, or the disk is full. The folder is removed, but not what is staged, unless
        `rows` raise a `ValueError`.
    """
    check_mappings(spec)
    if staged is not None and rows is not None:
        _create_in_steps(spec, staged, rows, progress, stays_cached=stays_cached)
        files.make_directory(directory.parent)
        files.rename(staged, directory)
        return
    try:
        write_documents(directory, zarr_metadata.table_documents(spec))
        for path, nbytes in TableLocation(spec, directory).expected_files():
            files.create_sparse(path, nbytes)
        total = 0 if rows is None else rows.count
        with track(total, f"copying rows into {spec.stream!r}", progress=progress) as advance:
            if rows is not None:
                _write_rows(TableLocation(spec, directory), rows, advance, stays_cached=stays_cached)
    except BaseException:
        files.remove_tree(directory)
        raise


def _create_in_steps(
    spec: TableSpec, directory: Path, rows: FirstRows, progress: Progress, *, stays_cached: bool
) -> None:
    table, note = TableLocation(spec, directory), directory / _STEPS
    done = int(files.read(note)) if files.size(note) is not None else -1
    if done < 0:
        files.remove_tree(directory)
        write_documents(directory, zarr_metadata.table_documents(spec))
        for path, nbytes in table.expected_files():
            files.create_sparse(path, nbytes)
        files.sync_tree(directory)
        files.replace(note, b"0")
        done = 0

    def complete(number: int) -> None:
        files.sync_file(table.checksums_path)
        files.replace(note, str(number + 1).encode())

    try:
        with track(rows.count, f"copying rows into {spec.stream!r}", progress=progress) as advance:
            advance(min(done * spec.rows_per_shard, rows.count))
            _write_rows(table, rows, advance, stays_cached=stays_cached, first=done, complete=complete)
    except ValueError:  # a row that no table can have
        files.remove_tree(directory)
        raise
    files.remove(note)


def write_documents(directory: Path, documents: Mapping[str, bytes]) -> None:
    """Create a table's folder with its zarr documents. Not synced."""
    for name, document in documents.items():
        files.make_directory((directory / name).parent)
        files.write_new(directory / name, document)


def open_existing(directory: Path, *, may_miss: bool, may_create: bool) -> tuple[TableSpec, Collection[Path]]:
    """Read and check a table's folder, trusting none of its metadata before it is checked.

    Returns the spec, and the files that are missing.

    Parameters
    ----------
    directory : Path
        The table's folder.
    may_miss : bool
        Whether files may be missing from a table whose fresh rows are zeros: zarr deletes a chunk when it writes
        zeros to all of it.
    may_create : bool
        Whether to create such files; otherwise they have to be read as zeros.

    Raises
    ------
    FormatError
        The documents are not those of a table, or a file is missing or has the wrong size.
    """
    spec = spec_of(directory, may_miss=may_miss)
    missing = dict(find_missing(spec, directory))
    if may_create and missing:
        for (
            path,
            nbytes,
        ) in missing.items():  # staged, because a file must have its size when it gets its name
            files.remove(files.staged(path))
            files.create_sparse(files.staged(path), nbytes)
            files.sync_file(files.staged(path))
            files.publish(path)
        missing = {}
    return spec, missing


@contextlib.contextmanager
def naming(name: str, directory: Path) -> Iterator[None]:
    """Prefix a `FormatError` raised within the block with the table's name and folder."""
    try:
        yield
    except FormatError as error:
        msg = f"table {name!r} in {directory}: {error}"
        raise type(error)(msg) from error


def spec_of(directory: Path, *, may_miss: bool) -> TableSpec:
    """Read a table's spec from its documents, and check that its files exist.

    Raises
    ------
    FormatError
        As `open_existing`.
    """
    spec = zarr_metadata.table_spec(folders.documents(directory))
    check_mappings(spec, exists=True)  # before looking for that many files
    missing = find_missing(spec, directory)
    fatal = [
        path
        for path, _ in missing
        if spec.has_presence or not may_miss or path == TableLocation(spec, directory).checksums_path
    ]
    if fatal:
        msg = f"{fatal[0]} is missing ({len(missing)} in all); restore it from a copy of the store"
        raise FormatError(msg)
    return spec


def find_missing(spec: TableSpec, directory: Path) -> list[tuple[Path, int]]:
    """List the files of a table that do not exist, each with the size that it should have.

    Raises
    ------
    FormatError
        The size of a file is not what the metadata says.
    """
    missing = []
    for path, nbytes in TableLocation(spec, directory).expected_files():
        found = files.size(path)
        if found is None:
            missing.append((path, nbytes))
        elif found != nbytes:
            msg = (
                f"{path} has {found} bytes instead of {nbytes}: it was truncated or replaced; "
                f"restore it from a copy of the store"
            )
            raise FormatError(msg)
    return missing


def rows_written(table: TableLocation) -> Int64Array:
    """Count for each shard the rows that its file has records of; about, if no bitmap says which were written."""
    count = _rows_with_bit if table.spec.has_presence else _rows_of_blocks
    return np.array([count(table, table.shard(number)) for number in range(table.spec.num_shards)], np.int64)


def _rows_with_bit(table: TableLocation, file: File) -> int:
    total = 0
    for chunk, start, stop in table.presence_of(file.rows):
        with files.opened(chunk.path, os.O_RDONLY) as descriptor:
            for begin, end in files.data(descriptor, start, stop):
                data = files.read_at(descriptor, end - begin, begin, chunk.path)
                total += int.from_bytes(data, "little").bit_count()
    return total


def _rows_of_blocks(table: TableLocation, file: File) -> int:
    path, start = table.checksums_path, 8 * file.first
    written = 0
    with files.opened(path, os.O_RDONLY) as descriptor:
        for begin, end in files.data(descriptor, start, start + 8 * file.nbytes // PAGE):
            sums = np.frombuffer(files.read_at(descriptor, end - begin, begin, path), np.uint64)
            written += int(np.count_nonzero(sums != checksums.NEVER_WRITTEN))
    return written * PAGE // table.spec.record_bytes


def prepare_to_stay(spec: TableSpec, descriptor: int, offset: int, nbytes: int) -> None:
    """Prepare a hole of a shard to be written through the page cache, in which it is to stay for lookups."""
    # A large write puts large pages into the cache. When a fold writes to a block of such a page, the kernel counts all
    # of it as changed. Lookups gain from them only where they can be mapped as they are. Otherwise the hole is read
    # first, which leaves small pages there and costs no access to the disk.
    if spec.shard_bytes % address_space.HUGE_PAGE:
        files.will_need(descriptor, offset, nbytes)


def _write_rows(
    table: TableLocation,
    rows: FirstRows,
    advance: Advance,
    *,
    stays_cached: bool,
    first: int = 0,
    complete: Callable[[int], None] = lambda number: None,
) -> None:
    """Write the first rows directly into new files, so that bulk data never takes private memory.

    It begins with the shard `first`, and calls ``complete(number)`` once a shard is durable, but for its checksums.
    """
    spec = table.spec
    block_rows = max(1, _BLOCK_BYTES // spec.record_bytes)
    for number in range(first, spec.num_shards):
        file = table.shard(number)
        begin, end = file.rows[0], min(file.rows[1], rows.count)
        if begin >= end:
            break
        with files.opened(file.path, os.O_RDWR) as descriptor:
            for start in range(begin, end, block_rows):
                stop = min(start + block_rows, end)
                records = np.empty((stop - start, spec.width), spec.element)
                records[:, : spec.weight_width] = rows.read(start, stop)
                records[:, spec.weight_width :] = spec.initial_state
                offset = (start - begin) * spec.record_bytes
                if stays_cached:
                    prepare_to_stay(spec, descriptor, offset, records.nbytes)
                files.write(descriptor, records.data, offset, file.path)
                # So that the disk works while the next rows are read, and the sync has little to wait for.
                address_space.begin_write_back(descriptor, offset, records.nbytes)
                advance(stop - start)
            checksums.write_file_sums(table, file)
            files.sync(descriptor, file.path)
            if not stays_cached:
                files.drop_cached(descriptor)
        complete(number)
    for number in range(spec.num_presence_chunks):
        file = table.presence_chunk(number)
        bits = np.packbits(np.arange(*file.rows) < rows.count, bitorder="little")
        with files.opened(file.path, os.O_WRONLY) as descriptor:
            files.write(descriptor, bits.data, 0, file.path)
        checksums.write_file_sums(table, file)
