"""The shards of one table: its files, mapped as one array, and over them what has changed in memory.

`Shards` maps every file of a table into one contiguous range, so the table *is* one array however many files hold it.
The files keep what was committed and folded: a row that changes is copied into a *slot* first, which is memory of this
process (`Overlay`), and forgetting a change is giving its slot up.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

import numpy as np

from shardemb.base.sampling import stream_key
from shardemb.base.sizes import PAGE, round_up
from shardemb.compute import residency, row_kernels
from shardemb.engine.overlay import Overlay
from shardemb.format import table_files
from shardemb.format.spec import TableSpec
from shardemb.initializers import Constant
from shardemb.storage import address_space, files, table_folder
from shardemb.storage.log_reader import Images

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.progress import Progress
    from shardemb.base.validation import Float32Array, Int64Array, Rows
    from shardemb.engine.memory_budget import MemoryBudget

PAGED_ROWS = 4096
"""Rows that are brought into memory together where not all of them have room."""


class Totals:
    """What was done with a table since it was opened. Safe from any thread.

    Attributes
    ----------
    lookups, rows_looked_up, cold_lookups : int
    changes, rows_changed : int
        Updates and writes, and their distinct rows.
    rows_copied : int
        Rows that were copied into slots.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.lookups = self.rows_looked_up = self.cold_lookups = 0
        self.changes = self.rows_changed = self.rows_copied = 0

    def add_lookup(self, rows: int) -> None:
        """Count a lookup of so many ids."""
        with self._lock:
            self.lookups += 1
            self.rows_looked_up += rows

    def add_cold(self) -> None:
        """Count a lookup that found its pages not in memory."""
        with self._lock:
            self.cold_lookups += 1


class Shards:
    """One table's files in memory.

    Parameters
    ----------
    spec : TableSpec
    directory : Path
        Where the table lies now; the attribute follows it when it moves.
    missing : collection of Path
        Files that are not there and read as zeros.

    Raises
    ------
    ShardEmbError
        The tables that this process has open would need too many mappings.

    Attributes
    ----------
    spec : TableSpec
    records : ndarray of float32, shape (twice the rows of whole shards, width)
        All records of the files, and behind them the slots, which are memory only where they are in use.
    present : ndarray of uint8
        The presence bitmap of the files; empty where the table keeps none. A row in a slot or out may not be in it yet.
    overlay : Overlay
        The rows that lie in slots.
    successor : Shards or None
        What the table went on with since it was resized or resharded, or such a change was undone.
    totals : Totals
    """

    def __init__(self, spec: TableSpec, directory: Path, missing: Collection[Path] = ()) -> None:
        self.spec = spec
        self.directory = directory
        table_folder.check_mappings(spec)
        shards = map(self.shard_path, range(spec.num_shards))
        files_bytes = spec.num_shards * spec.shard_bytes
        self._rows = address_space.AddressRange(2 * files_bytes)
        _map(self._rows, shards, spec.shard_bytes, missing)
        chunks = map(self.presence_path, range(spec.num_presence_chunks))
        self._present = address_space.AddressRange(spec.num_presence_chunks * spec.presence_chunk_bytes)
        _map(self._present, chunks, spec.presence_chunk_bytes, missing)
        # The default read-ahead would read whole megabytes for a row.
        self._rows.advise(0, files_bytes, address_space.MADV_RANDOM)
        self.records: Float32Array = self._rows.array(
            np.float32, (2 * spec.num_shards * spec.rows_per_shard, spec.width)
        )
        self.present: NDArray[np.uint8] = self._present.array(np.uint8, (self._present.nbytes,))
        self.overlay = Overlay(self._rows, self.records)
        self.totals = Totals()
        self.successor: Shards | None = None
        initializer = spec.initializer
        self._key = np.uint64(stream_key(getattr(initializer, "seed", 0), spec.stream))
        self._parameters = np.array(initializer.parameters(), np.float64)

    # ---- reading; needs no lock

    def gather(self, column: str, ids: Int64Array, out: Float32Array, start: int, stop: int) -> None:
        """Copy a column of rows ``ids[start:stop]`` into ``out[start:stop]``, initial values for rows never written."""
        first = self.spec.columns[column][0]
        if not self.spec.has_presence:
            row_kernels.gather(self.records, *self.overlay.index, first, ids, out, start, stop)
            return
        initializer, key, parameters = type(self.spec.initializer), self._key, self._parameters
        if column != "weight":
            initializer = Constant  # a state column starts from one value
            parameters = self.spec.initial_state[first - self.spec.embedding_dim :][:1].astype(np.float64)
        row_kernels.gather_or_fill(initializer)(
            self.records, *self.overlay.index, self.present, first, ids, out, key, parameters, start, stop
        )

    def is_cold(self, ids: Int64Array, max_samples: int) -> bool:
        """Whether any of a batch would have to be read from disk, by a sample of one row in eight up to `max_samples`.

        Asking for pages ahead takes 0.4 us a row where all are in memory, and a page that the gather has to wait for
        100 us. So it is worth it where one row in a hundred is missing, which a sample of 32 sees one time in four.
        """
        samples = min(max_samples, -(-ids.size // 8))
        if samples == 0:
            return False
        resident = residency.sample_resident(
            self._rows.address, self.spec.record_bytes, *self.overlay.index, self.present, ids, samples
        )
        return bool(0 <= resident < samples)

    def share_drawn(self, column: str, ids: Int64Array, max_samples: int) -> float:
        """Share of a batch of which random initial values have to be drawn, by a sample of up to `max_samples` rows."""
        if column != "weight" or not self.spec.has_presence or isinstance(self.spec.initializer, Constant):
            return 0.0
        sample = ids[:: -(-ids.size // max_samples)].copy()  # kernels take what lies together
        in_files = self.overlay.places(sample) == sample
        return float(np.mean(in_files & ~self.were_written(sample)))

    def were_written(self, rows: Int64Array) -> NDArray[np.bool_]:
        """Tell which rows have a record."""
        if not self.spec.has_presence:
            return np.ones(rows.size, np.bool_)
        bits: NDArray[np.bool_] = (self.present[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
        return bits

    def count_resident(self, pages: Int64Array) -> int:
        """Count the pages of the files that are in memory; none if the kernel won't tell."""
        nothing, none = np.empty(0, np.uint8), np.empty(0, np.int32)
        found = residency.sample_resident(
            self._rows.address, PAGE, none, none, none, 0, nothing, pages, pages.size
        )
        return max(0, int(found))

    def read_ahead(self, rows: Int64Array, start: int, stop: int) -> None:
        """Ask for the pages of ascending ``rows[start:stop]``; the kernel reads them meanwhile."""
        # Advice that fails costs time and nothing else: the gather reads the page all the same.
        for number, first, last in self._huge_pages(rows[start:stop]):
            with contextlib.suppress(OSError):
                address_space.read_in_huge_pages(self.shard_path(number), first, last - first)
        residency.advise(
            self._rows.address,
            self.spec.record_bytes,
            *self.overlay.index,
            self.present,
            rows,
            address_space.MADV_WILLNEED,
            files.ADVISED // PAGE,
            start,
            stop,
        )

    def _huge_pages(self, rows: Int64Array) -> Iterator[tuple[int, int, int]]:
        """List the parts of files, in whole pages of 2 MiB, of which ascending rows ask for everything."""
        shard_bytes, record_bytes = self.spec.shard_bytes, self.spec.record_bytes
        if shard_bytes % address_space.HUGE_PAGE or not rows.size or rows[-1] - rows[0] >= rows.size:
            return
        begin, end = int(rows[0]) * record_bytes, (int(rows[-1]) + 1) * record_bytes
        if end - begin < address_space.HUGE_PAGE or not self.were_written(rows).all():
            return
        for number in range(begin // shard_bytes, -(-end // shard_bytes)):
            first = round_up(max(begin - number * shard_bytes, 0), address_space.HUGE_PAGE)
            last = (
                min(end - number * shard_bytes, shard_bytes)
                // address_space.HUGE_PAGE
                * address_space.HUGE_PAGE
            )
            if first < last:
                yield number, first, last

    # ---- changing, in memory; all of it under the store's lock

    def copy(self, rows: Int64Array, places: Int64Array, start: int, stop: int) -> None:
        """Copy the records of ``rows[start:stop]``, of the files or first ones, to slots reserved for them."""
        if not self.spec.has_presence:
            row_kernels.copy_rows(self.records, rows, places, start, stop)
            return
        row_kernels.copy_or_fill(type(self.spec.initializer))(
            self.records,
            self.present,
            rows,
            places,
            self.spec.initial_state,
            self._key,
            self._parameters,
            start,
            stop,
        )

    # ---- what changed; under the store's lock

    @property
    def changes(self) -> int:
        """How many rows differ from the last commit."""
        return self.overlay.changes

    def changed_rows(self) -> Int64Array:
        """List the rows that differ from the last commit, in the order in which `pack` is fastest."""
        return self.overlay.changed_rows()

    def pack(self, ids: Int64Array, start: int, stop: int, address: int) -> None:
        """Copy the records of ``ids[start:stop]``, one behind the other, to an address."""
        ids = ids[start:stop]
        row_kernels.pack(self.records, self.overlay.places(ids), address)
        self.overlay.read_spilled(ids, address)

    def forget_changes(self, images: Images, budget: MemoryBudget) -> None:
        """Go back to the last commit: to the files, and to the images that are newer than they.

        Raises
        ------
        DiskFullError, OSError
            The images have no room, neither in memory nor in the scratch file.
        """
        with self.overlay.rewinding():
            rows = self.changed_rows()
            again = np.isin(images.ids, rows)
            self.overlay.drop(rows[~np.isin(rows, images.ids)])
            self.load_images(Images(images.ids[again], images.addresses[again]), budget)
            self.clear_changes()  # last: whoever calls again after an error has all of it done again

    def load_images(self, images: Images, budget: MemoryBudget) -> None:
        """Put committed images, which the files do not hold yet, into memory, making room for them if need be."""
        overlay = self.overlay
        for start in range(0, images.ids.size, PAGED_ROWS):
            ids, addresses = (each[start : start + PAGED_ROWS] for each in images)
            budget.spill(overlay.count_new(ids) * overlay.row_bytes)
            overlay.reload(ids)
            places = overlay.places(ids)
            new = places == ids
            places[new] = overlay.reserve(ids[new])
            overlay.publish(ids[new], places[new])
            row_kernels.place_images(self.records, places, addresses)
            overlay.mark_dirty(places)

    def adopt_changes(self, other: Shards, budget: MemoryBudget) -> None:
        """Take over what differs from the last commit in a table with other rows; those that it has more stay behind.

        Raises
        ------
        DiskFullError, OSError
            There is no room for that.
        """
        rows = other.changed_rows()
        rows = rows[rows < self.spec.num_embeddings]
        for start in range(0, rows.size, PAGED_ROWS):
            ids = rows[start : start + PAGED_ROWS]
            records = np.empty((ids.size, self.spec.width), np.float32)
            other.pack(ids, 0, ids.size, records.ctypes.data)
            self.adopt_records(ids, records, budget)

    def adopt_records(self, ids: Int64Array, records: Float32Array, budget: MemoryBudget) -> None:
        """Take over records that differ from the last commit; as `adopt_changes`."""
        for start in range(0, ids.size, PAGED_ROWS):
            some, given = ids[start : start + PAGED_ROWS], records[start : start + PAGED_ROWS]
            addresses = given.ctypes.data + np.arange(some.size) * self.spec.record_bytes
            self.load_images(Images(some, addresses), budget)
            self.overlay.reload(some)  # what another part of the batch may have sent out
            self.overlay.mark_changed(self.overlay.places(some))

    def never_written(self, start: int, stop: int) -> Int64Array:
        """List those of rows ``start:stop`` that the files have no record of, nor is one on its way to them."""
        rows = np.arange(start, stop)
        rows = rows[~self.were_written(rows)]
        return rows[~self.overlay.are_dirty(rows)]

    def pack_initial(self, ids: Int64Array, start: int, stop: int, address: int) -> None:
        """As `pack`, of rows that were never written: what they start from."""
        row_kernels.pack(self.initial_records(ids[start:stop]), np.arange(stop - start), address)

    def initial_records(self, ids: Int64Array) -> Float32Array:
        """Compute what rows start from, shape (ids.size, width); they need not be rows of the table yet."""
        weights = np.empty((ids.size, self.spec.embedding_dim), np.float32)
        fill = row_kernels.fill(type(self.spec.initializer))
        fill(ids, weights, self._key, self._parameters, 0, ids.size)
        return np.hstack([weights, np.tile(self.spec.initial_state, (ids.size, 1))])

    def begin_fold(self) -> None:
        """Note that what is committed by now is being folded."""
        self.overlay.begin_fold()

    def clear_changes(self) -> None:
        """Count no row as changed any more."""
        self.overlay.clear_changes()

    def release_pages(self, start: int, stop: int) -> None:
        """Let what memory holds of the files of rows ``start:stop`` go; what lies in slots stays."""
        first, last = start * self.spec.record_bytes // PAGE, -(-stop * self.spec.record_bytes // PAGE)
        self._rows.advise(first * PAGE, (last - first) * PAGE, address_space.MADV_DONTNEED)

    # ---- files

    def shard_path(self, shard: int) -> Path:
        """File of a row-shard, where the table lies now."""
        return table_files.shard(self.spec, self.directory, shard).path

    def presence_path(self, chunk: int) -> Path:
        """File of a chunk of the presence bitmap, where the table lies now."""
        return table_files.presence_chunk(self.spec, self.directory, chunk).path


def create(spec: TableSpec, directory: Path, rows: Rows | None, progress: Progress = None) -> Shards:
    """Create a table's folder, see `table_folder.create`, and map it; nothing is left of one that cannot be."""
    table_folder.create(spec, directory, rows, progress)
    try:
        return Shards(spec, directory)
    except BaseException:
        files.remove_tree(directory)
        raise


def open_existing(directory: Path, *, may_miss: bool, may_create: bool) -> Shards:
    """Check a table's folder, see `table_folder.open_existing`, and map it."""
    spec, missing = table_folder.open_existing(directory, may_miss=may_miss, may_create=may_create)
    return Shards(spec, directory, missing)


def _map(
    memory: address_space.AddressRange, paths: Iterable[Path], file_bytes: int, missing: Collection[Path]
) -> None:
    for number, path in enumerate(paths):
        if path in missing:
            memory.map_zeros(number * file_bytes, file_bytes)
        else:
            memory.map_file(number * file_bytes, path, file_bytes)
