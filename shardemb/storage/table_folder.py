"""The folder of a table: creating it, and opening one while believing nothing that it says."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.progress import track
from shardemb.errors import FormatError, ShardEmbError
from shardemb.format import table_files, zarr_metadata
from shardemb.format.spec import TableSpec
from shardemb.storage import address_space, checksums, files, folders

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    from shardemb.base.progress import Advance, Progress
    from shardemb.base.validation import Rows


_BLOCK_BYTES = 4 * 2**20


def check_mappings(spec: TableSpec) -> None:
    """Raise `ShardEmbError` if the files of one more table cannot all be mapped."""
    more, used = spec.num_shards + spec.num_presence_chunks, files.counters.mappings
    if used + more > address_space.MAX_MAPPINGS:
        msg = (
            f"the table takes {more} files of {spec.shard_bytes} bytes, and the tables open in this process {used} "
            f"more, but a process maps at most {address_space.MAX_MAPPINGS}: use larger shards or close a store"
        )
        raise ShardEmbError(msg)


def create(spec: TableSpec, directory: Path, rows: Rows | None, progress: Progress = None) -> None:
    """Create a table's folder, its zarr documents and all its files, sparse; with `rows`, every row of it.

    They are asked for in consecutive ranges of a few MiB; `progress` is told of rows when they are written.
    Nothing is durable yet (`files.sync_tree` makes it so).

    Raises
    ------
    ShardEmbError, OSError
        It cannot be mapped, or there is no room; nothing is left behind.
    """
    check_mappings(spec)
    try:
        write_documents(directory, zarr_metadata.table_documents(spec))
        for path, nbytes in table_files.expected_files(spec, directory):
            files.create_sparse(path, nbytes)
        total = 0 if rows is None else spec.num_embeddings
        with track(total, f"copying rows into {spec.stream!r}", progress=progress) as advance:
            if rows is not None:
                _write_rows(spec, directory, rows, advance)
    except BaseException:
        files.remove_tree(directory)
        raise


def write_documents(directory: Path, documents: Mapping[str, bytes]) -> None:
    """Make a table's folder with its zarr documents. Not synced."""
    for name, document in documents.items():
        files.make_directory((directory / name).parent)
        files.write_new(directory / name, document)


def open_existing(directory: Path, *, may_miss: bool, may_create: bool) -> tuple[TableSpec, Collection[Path]]:
    """Read and check a table's folder, believing nothing that its metadata say before it is checked.

    Parameters
    ----------
    directory : Path
        The table's folder.
    may_miss : bool
        Whether a file of a table that starts from zeros may be missing: zarr deletes a chunk that it is asked to
        fill with zeros.
    may_create : bool
        Whether such a file is made anew, or only read as zeros.

    Raises
    ------
    FormatError
        The documents are not those of a table; a file is missing or has another size.
    """
    spec = spec_of(directory, may_miss=may_miss)
    missing = dict(find_missing(spec, directory))
    if may_create and missing:
        for path, nbytes in missing.items():  # under its name a file has its size
            files.remove(files.staged(path))
            files.create_sparse(files.staged(path), nbytes)
            files.sync_file(files.staged(path))
            files.publish(path)
        missing = {}
    return spec, missing


@contextlib.contextmanager
def naming(name: str, directory: Path) -> Iterator[None]:
    """Say of which table it is that something is wrong with the files."""
    try:
        yield
    except FormatError as error:
        msg = f"table {name!r} in {directory}: {error}"
        raise type(error)(msg) from error


def spec_of(directory: Path, *, may_miss: bool) -> TableSpec:
    """Read what a table is, and check that its files are there.

    Raises
    ------
    FormatError
        As `open_existing`.
    """
    spec = zarr_metadata.table_spec(folders.documents(directory))
    check_mappings(spec)  # before so many files are looked for
    missing = find_missing(spec, directory)
    fatal = [
        path
        for path, _ in missing
        if spec.has_presence or not may_miss or path == table_files.checksums_path(directory)
    ]
    if fatal:
        msg = f"{fatal[0]} is missing ({len(missing)} in all); restore it from a copy of the store"
        raise FormatError(msg)
    return spec


def find_missing(spec: TableSpec, directory: Path) -> list[tuple[Path, int]]:
    """List the files of a table that are not there, with the size that they should have.

    Raises
    ------
    FormatError
        A file has another size than the metadata says.
    """
    missing = []
    for path, nbytes in table_files.expected_files(spec, directory):
        found = files.size(path)
        if found is None:
            missing.append((path, nbytes))
        elif found != nbytes:
            msg = (
                f"{path} has {found} bytes instead of {nbytes}: it was cut short or replaced; "
                f"restore it from a copy of the store"
            )
            raise FormatError(msg)
    return missing


def _write_rows(spec: TableSpec, directory: Path, rows: Rows, advance: Advance) -> None:
    """Write all rows straight into new files: bulk data never becomes private memory."""
    block_rows = max(1, _BLOCK_BYTES // spec.record_bytes)
    for shard in range(spec.num_shards):
        file = table_files.shard(spec, directory, shard)
        begin, end = file.rows
        with files.opened(file.path, os.O_WRONLY) as descriptor:
            for start in range(begin, end, block_rows):
                stop = min(start + block_rows, end)
                records = np.empty((stop - start, spec.width), np.float32)
                records[:, : spec.embedding_dim] = rows(start, stop)
                records[:, spec.embedding_dim :] = spec.initial_state
                files.write(descriptor, records.data, (start - begin) * spec.record_bytes, file.path)
                advance(stop - start)
            checksums.write_file_sums(file, directory)
            files.sync(descriptor, file.path)
            files.drop_cached(descriptor)
    for chunk in range(spec.num_presence_chunks):
        file = table_files.presence_chunk(spec, directory, chunk)
        bits = np.packbits(np.ones(file.rows[1] - file.rows[0], np.bool_), bitorder="little")
        with files.opened(file.path, os.O_WRONLY) as descriptor:
            files.write(descriptor, bits.data, 0, file.path)
        checksums.write_file_sums(file, directory)
