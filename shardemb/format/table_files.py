"""The files of a table: the path, the size and the rows of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from shardemb.base.sizes import PAGE, round_up
from shardemb.format import zarr_metadata

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shardemb.format.spec import TableSpec


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


class TableLocation(NamedTuple):
    """A table and its folder, which determine its files."""

    spec: TableSpec
    directory: Path

    @property
    def checksums_path(self) -> Path:
        """File of the table's checksums."""
        return self.directory / zarr_metadata.CHECKS / zarr_metadata.presence_key(0)

    def shard(self, number: int) -> File:
        """Describe a row-shard."""
        spec, start = self.spec, number * self.spec.rows_per_shard
        return File(
            # One joinpath takes half the time of two "/", and a table can have a thousand shards.
            self.directory.joinpath(zarr_metadata.ROWS, zarr_metadata.shard_key(number)),
            spec.shard_bytes,
            number * spec.shard_bytes // PAGE,
            (start, min(start + spec.rows_per_shard, spec.num_embeddings)),
            8 * spec.record_bytes,
            number,
        )

    def presence_chunk(self, number: int) -> File:
        """Describe a chunk of the presence bitmap. Its blocks are numbered after those of all shards."""
        spec, rows = self.spec, 8 * self.spec.presence_chunk_bytes
        return File(
            self.directory.joinpath(zarr_metadata.PRESENT, zarr_metadata.presence_key(number)),
            spec.presence_chunk_bytes,
            (spec.num_shards * spec.shard_bytes + number * spec.presence_chunk_bytes) // PAGE,
            (number * rows, min((number + 1) * rows, spec.num_embeddings)),
            1,
            number,
        )

    def presence_of(self, rows: tuple[int, int]) -> Iterator[tuple[File, int, int]]:
        """Describe the chunks that hold the presence bits of a half-open range of rows.

        Yields each chunk with the half-open range of bytes in it.
        """
        start, stop, nbytes = rows[0] // 8, -(-rows[1] // 8), self.spec.presence_chunk_bytes
        for number in range(start // nbytes, -(-stop // nbytes)):
            first = number * nbytes
            yield self.presence_chunk(number), max(start - first, 0), min(stop - first, nbytes)

    def files(self) -> Iterator[File]:
        """Describe all files that have checksums, in the order of their blocks."""
        yield from map(self.shard, range(self.spec.num_shards))
        yield from map(self.presence_chunk, range(self.spec.num_presence_chunks))

    def expected_files(self) -> Iterator[tuple[Path, int]]:
        """List all files except the documents, each with the size that it must have."""
        for file in self.files():
            yield file.path, file.nbytes
        yield self.checksums_path, round_up(8 * self.spec.num_blocks, PAGE)
