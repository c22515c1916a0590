"""The files of a table: the path, the size and the rows of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shardemb.base.sizes import PAGE, round_up
from shardemb.format import zarr_metadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shardemb.format.spec import TableSpec


class TableLocation(NamedTuple):
    """A table and its folder."""

    spec: TableSpec
    directory: Path


class File(NamedTuple):
    """A shard or a chunk of the presence bitmap.

    Attributes
    ----------
    path : Path
    nbytes : int
        The size that it must have.
    first : int
        Number of its first block among all blocks of the table.
    rows : tuple of int
        Half-open range of the rows that it holds records or bits of.
    row_bits : int
        Bits per row.
    number : int
        Number of the shard or chunk.
    """

    path: Path
    nbytes: int
    first: int
    rows: tuple[int, int]
    row_bits: int
    number: int

    def rows_of(self, block: int) -> tuple[int, int]:
        """Half-open range of rows that lie at least partly in a block of the table; empty for a block without rows."""
        begin = (block - self.first) * PAGE * 8
        start, stop = self.rows
        return (
            min(start + begin // self.row_bits, stop),
            min(start - (-(begin + PAGE * 8) // self.row_bits), stop),
        )


def checksums_path(directory: Path) -> Path:
    """File of a table's checksums."""
    return directory / zarr_metadata.CHECKS / zarr_metadata.presence_key(0)


def shard(spec: TableSpec, directory: Path, number: int) -> File:
    """Describe a row-shard."""
    start = number * spec.rows_per_shard
    return File(
        # One joinpath takes half the time of two "/", and a table can have a thousand shards.
        directory.joinpath(zarr_metadata.ROWS, zarr_metadata.shard_key(number)),
        spec.shard_bytes,
        number * spec.shard_bytes // PAGE,
        (start, min(start + spec.rows_per_shard, spec.num_embeddings)),
        8 * spec.record_bytes,
        number,
    )


def presence_chunk(spec: TableSpec, directory: Path, number: int) -> File:
    """Describe a chunk of the presence bitmap. Its blocks are numbered after those of all shards."""
    rows = 8 * spec.presence_chunk_bytes
    return File(
        directory.joinpath(zarr_metadata.PRESENT, zarr_metadata.presence_key(number)),
        spec.presence_chunk_bytes,
        (spec.num_shards * spec.shard_bytes + number * spec.presence_chunk_bytes) // PAGE,
        (number * rows, min((number + 1) * rows, spec.num_embeddings)),
        1,
        number,
    )


def presence_of(spec: TableSpec, directory: Path, rows: tuple[int, int]) -> Iterator[tuple[File, int, int]]:
    """Describe the chunks that hold the presence bits of a half-open range of rows.

    Yields each chunk with the half-open range of bytes in it.
    """
    start, stop, nbytes = rows[0] // 8, -(-rows[1] // 8), spec.presence_chunk_bytes
    for number in range(start // nbytes, -(-stop // nbytes)):
        first = number * nbytes
        yield presence_chunk(spec, directory, number), max(start - first, 0), min(stop - first, nbytes)


def all_files(spec: TableSpec, directory: Path) -> Iterator[File]:
    """Describe all files of a table that have checksums, in the order of their blocks."""
    for number in range(spec.num_shards):
        yield shard(spec, directory, number)
    for number in range(spec.num_presence_chunks):
        yield presence_chunk(spec, directory, number)


def expected_files(spec: TableSpec, directory: Path) -> Iterator[tuple[Path, int]]:
    """List all files of a table except its documents, each with the size that it must have."""
    for file in all_files(spec, directory):
        yield file.path, file.nbytes
    yield checksums_path(directory), round_up(8 * spec.num_blocks, PAGE)
