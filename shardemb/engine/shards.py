"""The shards of one table: its files, mapped as one array, and over them the rows that changed in memory.

`Shards` maps every file of a table into one contiguous range, so the table *is* one array however many files hold it.
The files hold what was committed and folded. A row is copied into a *slot* before it changes, which is memory of this
process (`Overlay`); to undo the change is to drop the slot.
"""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from shardemb.base.sampling import stream_key
from shardemb.base.sizes import PAGE, round_up
from shardemb.commits.log_reader import Images
from shardemb.compute import file_blocks, residency, row_index, row_kernels
from shardemb.engine.filled_rows import FilledRows
from shardemb.format.table_files import TableLocation
from shardemb.initializers import Constant
from shardemb.memory.frozen_rows import FrozenRows
from shardemb.memory.overlay import Overlay
from shardemb.memory.totals import Totals
from shardemb.precision.records import RecordCodec, first_rows
from shardemb.storage import address_space, files, table_folder

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from shardemb.base.progress import Progress
    from shardemb.base.validation import FirstRows, Float32Array, Int64Array
    from shardemb.engine.training import Training
    from shardemb.format.spec import TableSpec
    from shardemb.memory.hidden_rows import HiddenRows
    from shardemb.memory.memory_budget import MemoryBudget

PAGED_ROWS = 4096
"""Rows that are loaded into memory at a time if a batch may exceed the memory budget."""


class Shards:
    """One table's files in memory.

    Parameters
    ----------
    spec : TableSpec
    directory : Path
        The folder that the table is in now; whoever moves it updates the attribute.
    missing : collection of Path
        Files that do not exist and are read as zeros.

    Raises
    ------
    ShardEmbError
        The tables that are open in this process would need too many mappings.

    Attributes
    ----------
    spec : TableSpec
    records : ndarray of float32 or of uint8, shape (twice the rows of whole shards, width)
        All records of the files, followed by the slots, as the spec's elements. Only slots that are in use take memory.
    bytes : ndarray of uint8, shape (twice the rows of whole shards, record_bytes)
        The same memory.
    codec : RecordCodec
        What the records mean.
    present : ndarray of uint8
        The presence bitmap of the files; empty if the table has none. Rows in slots, and spilled ones, may not be in it
        yet.
    overlay : Overlay
        The rows in slots.
    filled : FilledRows
        The rows that the files hold and that no commit has, or no fold has been through.
    last_fold : object
        Another one after each fold, set before rows that waited for it are forgotten.
    hidden : HiddenRows or None
        In a reader beside a writer: the rows that the writer may have filled.
    totals : Totals
    frozen : FrozenRows or None
        The rows of this table in a commit under way.
    training : Training or None
        The step and the optimizer that rows are caught up to, once a table has this memory.
    """

    def __init__(self, spec: TableSpec, directory: Path, missing: Collection[Path] = ()) -> None:
        self.spec = spec
        self.directory = directory
        table_folder.check_mappings(spec, exists=True)
        shards = map(self.shard_path, range(spec.num_shards))
        files_bytes = spec.num_shards * spec.shard_bytes
        self._rows = address_space.AddressRange(2 * files_bytes)
        self._rows.map_files(shards, spec.shard_bytes, missing)
        chunks = map(self.presence_path, range(spec.num_presence_chunks))
        self._present = address_space.AddressRange(spec.num_presence_chunks * spec.presence_chunk_bytes)
        self._present.map_files(chunks, spec.presence_chunk_bytes, missing)
        # By default the kernel reads ahead, which would be whole megabytes for one row.
        self._rows.advise(0, files_bytes, address_space.MADV_RANDOM)
        self.records: NDArray[Any] = self._rows.array(
            spec.element, (2 * spec.num_shards * spec.rows_per_shard, spec.width)
        )
        self.bytes: NDArray[np.uint8] = self.records.view(np.uint8)
        self.codec = RecordCodec(spec)
        self.present: NDArray[np.uint8] = self._present.array(np.uint8, (self._present.nbytes,))
        self.overlay = Overlay(self._rows, self.bytes)
        self.filled = FilledRows(spec, self._present)
        self.last_fold = object()
        self.hidden: HiddenRows | None = None
        self.totals = Totals()
        self.frozen: FrozenRows | None = None
        self.training: Training | None = None
        initializer = spec.initializer
        key = np.uint64(stream_key(getattr(initializer, "seed", 0), spec.stream))
        # What initial values are drawn from, as kernels take it.
        self._drawn_from = key, np.array(initializer.parameters(), np.float64), spec.first, spec.stride

    # ---- reading; no lock needed, if the caller compares `Overlay.version`

    def gather(
        self,
        column: str,
        ids: Int64Array,
        out: NDArray[Any],
        start: int,
        stop: int,
        form: str = "float32",
    ) -> None:
        """Copy a column of rows ``ids[start:stop]`` to ``out[start:stop]``; rows never written have initial values.

        The form is the name of a float type, or ``"raw"``; `out` has its dtype, or is its bytes.
        """
        if self.spec.is_caught_up and self.training is not None:
            self._gather_caught_up(column, form, ids, out, start, stop)
        elif form != "float32" or self.spec.precision.is_coded:
            self._gather_coded(column, form, ids, out, start, stop)
        else:
            self._gather(column, ids, out, start, stop)

    def _gather_caught_up(
        self, column: str, form: str, ids: Int64Array, out: NDArray[Any], start: int, stop: int
    ) -> None:
        """Gather in a table whose rows have to be caught up: whole records, some at a time."""
        for begin in range(start, stop, PAGED_ROWS):
            some = ids[begin : min(begin + PAGED_ROWS, stop)]
            records = np.empty((some.size, self.spec.width), np.float32)
            for name, (left, right) in self.spec.columns.items():
                values = np.empty((some.size, right - left), np.float32)
                self._gather(name, some, values, 0, some.size)
                records[:, left:right] = values
            places = np.arange(some.size)
            self._catch_up(records, places, 0, 0, some.size)
            self.codec.gather(records.view(np.uint8), places, column, form, out, begin)

    def catch_up(self, places: Int64Array, mark: int, start: int, stop: int) -> None:
        """Bring the rows in slots ``places[start:stop]`` to the table's step, and note there that it was `mark`."""
        self._catch_up(self.records, places, mark, start, stop)

    def _catch_up(self, records: Float32Array, places: Int64Array, mark: int, start: int, stop: int) -> None:
        assert self.training is not None
        optimizer, step, dim = self.training.optimizer, self.training.step, self.spec.embedding_dim
        assert optimizer is not None
        decays = optimizer.decays_until(step, dim)
        kernel = row_kernels.catch_up(type(optimizer))
        kernel(records, dim, places, *decays, step, mark, start, stop)

    def _gather(self, column: str, ids: Int64Array, out: Float32Array, start: int, stop: int) -> None:
        first = self.spec.columns[column][0]
        if not self.spec.has_presence:
            if self.hidden is None:
                row_kernels.gather(self.records, *self.overlay.index, first, ids, out, start, stop)
            else:
                self._gather_shown(self.hidden, first, ids, out, start, stop)
            return
        initializer, drawn_from = type(self.spec.initializer), self._drawn_from
        if column != "weight":
            initializer = Constant  # all of a state column has one initial value
            value = self.spec.initial_state[first - self.spec.embedding_dim :][:1].astype(np.float64)
            drawn_from = drawn_from[0], value, *drawn_from[2:]
        row_kernels.gather_or_fill(initializer)(
            self.records, *self.overlay.index, self.present, first, ids, out, *drawn_from, start, stop
        )

    def _gather_shown(
        self, hidden: HiddenRows, first: int, ids: Int64Array, out: Float32Array, start: int, stop: int
    ) -> None:
        """Gather in a table without presence bitmap, where a fresh row is all zeros; so is a hidden one."""
        before = None
        while before != (before := hidden.look(self.spec)):  # until no fill begins while the files are read
            row_kernels.gather(self.records, *self.overlay.index, first, ids, out, start, stop)
        some = ids[start:stop]
        which = np.flatnonzero(hidden.contain(self.spec, some))
        which = which[self.overlay.places(some[which]) == some[which]]  # committed images are in slots
        out[start + which] = 0

    def _gather_coded(
        self, column: str, form: str, ids: Int64Array, out: NDArray[Any], start: int, stop: int
    ) -> None:
        """Gather what has to be decoded or encoded."""
        hidden = None if self.spec.has_presence else self.hidden
        while True:
            before = None if hidden is None else hidden.look(self.spec)
            # The place of a row before its bit, as in `row_kernels.gather_or_fill`.
            places = row_index.places_of(*self.overlay.index, ids, start, stop)
            fresh = self._fresh(ids[start:stop], places, hidden)
            places[fresh] = -1
            self.codec.gather(self.bytes, places, column, form, out, start)
            if hidden is None or before == hidden.look(
                self.spec
            ):  # no fill has begun while the files were read
                break
        if fresh.size:
            out[start + fresh] = self.initial_values(ids[start + fresh], form, column).view(out.dtype)

    def _fresh(self, rows: Int64Array, places: Int64Array, hidden: HiddenRows | None) -> Int64Array:
        """Return which of the rows at places have their initial values, though not in slots."""
        if hidden is not None:
            fresh = hidden.contain(self.spec, rows) & (places == rows)  # committed images are in slots
        elif self.spec.has_presence:
            fresh = (places == rows) & ~self.were_written(rows)
        else:
            return np.empty(0, np.int64)
        which: Int64Array = np.flatnonzero(fresh)
        return which

    def is_cold(self, ids: Int64Array, max_samples: int) -> bool:
        """Estimate whether rows of a batch have to be read from disk, from one row in eight but at most `max_samples`.

        To request pages ahead costs 0.4 us a row if all are in memory already; a page that the gather waits for costs
        100 us. So requests pay off once one row in a hundred is not in memory, which a sample of 32 notices one time in
        four.
        """
        samples = min(max_samples, -(-ids.size // 8))
        if samples == 0:
            return False
        resident = residency.sample_resident(
            self._rows.address, self.spec.record_bytes, *self.overlay.index, self.present, ids, samples
        )
        return bool(0 <= resident < samples)

    def share_drawn(self, column: str, ids: Int64Array, max_samples: int) -> float:
        """Estimate the share of rows whose random initial values have to be drawn, from at most `max_samples` rows."""
        if column != "weight" or not self.spec.has_presence or isinstance(self.spec.initializer, Constant):
            return 0.0
        sample = ids[:: -(-ids.size // max_samples)].copy()  # kernels take contiguous arrays
        in_files = self.overlay.places(sample) == sample
        return float(np.mean(in_files & ~self.were_written(sample)))

    def were_written(self, rows: Int64Array) -> NDArray[np.bool_]:
        """Return for each row whether the files hold a record of it; without a presence bitmap, they hold all."""
        if not self.spec.has_presence:
            return np.ones(rows.size, np.bool_)
        bits: NDArray[np.bool_] = (self.present[rows >> 3] >> (rows & 7).astype(np.uint8)) & 1 == 1
        return bits

    def count_resident(self, pages: Int64Array) -> int:
        """Count the pages of the files that are in memory; 0 if the kernel does not say."""
        nothing, none = np.empty(0, np.uint8), np.empty(0, np.int32)
        found = residency.sample_resident(
            self._rows.address, PAGE, none, none, none, 0, nothing, pages, pages.size
        )
        return max(0, int(found))

    def read_ahead(self, rows: Int64Array, start: int, stop: int) -> None:
        """Request the pages of ascending ``rows[start:stop]``; the kernel reads them in the background."""
        self.totals.add_bytes(requested=self.pages_bytes(rows[start:stop]))
        self._request_rows(rows, start, stop)

    def _request_rows(self, rows: Int64Array, start: int, stop: int) -> None:
        # If the advice fails, only time is lost: the gather reads the pages all the same.
        for number, first, last in self._huge_pages(rows[start:stop]):
            with contextlib.suppress(OSError):
                address_space.read_in_huge_pages(self.shard_path(number), first, last - first)
        self._advise(rows, address_space.MADV_WILLNEED, start, stop)

    def _advise(self, rows: Int64Array, advice: int, start: int, stop: int) -> int:
        """Give advice on the pages of those of ascending ``rows[start:stop]`` that only the files have."""
        return residency.advise(
            self._rows.address,
            self.spec.record_bytes,
            *self.overlay.index,
            self.present,
            rows,
            advice,
            files.ADVISED // PAGE,
            start,
            stop,
        )

    def _huge_pages(self, rows: Int64Array) -> Iterator[tuple[int, int, int]]:
        """List the parts of files, as whole pages of 2 MiB, all of whose rows are in ascending `rows`."""
        shard_bytes, record_bytes = self.spec.shard_bytes, self.spec.record_bytes
        if shard_bytes % address_space.HUGE_PAGE or not rows.size or rows[-1] - rows[0] >= rows.size:
            return  # the rows are not one contiguous range
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

    # ---- warming; no lock needed

    def pages_bytes(self, rows: Int64Array) -> int:
        """Count the bytes of the pages of ascending rows."""
        return PAGE * int(file_blocks.pages(rows, self.spec.record_bytes).size)

    def written_pieces(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of the mapped files that were ever written, as offsets and lengths up to `nbytes`."""
        for shard in range(self.spec.num_shards):
            path, begin = self.shard_path(shard), shard * self.spec.shard_bytes
            if files.size(path) is None:  # it is read as zeros
                continue
            with files.opened(path, os.O_RDONLY) as descriptor:
                written = list(files.data(descriptor, 0, self.spec.shard_bytes))
            for first, last in written:
                for start in range(first, last, nbytes):
                    yield begin + start, min(nbytes, last - start)

    def request(self, offset: int, nbytes: int) -> None:
        """Request a part of the mapped files, to warm it; the kernel reads it in the background."""
        address = self._rows.address + offset
        self.totals.add_bytes(warmed=nbytes - PAGE * residency.count_resident(address, nbytes))
        if not self._in_huge_pages(offset, nbytes):  # for those there is no advice
            residency.advise_range(address, nbytes, address_space.MADV_WILLNEED, files.ADVISED)

    def read_in(self, offset: int, nbytes: int) -> None:
        """Wait until a part of the mapped files is in memory, and let this process see it without page faults.

        Raises
        ------
        OSError
            It cannot be read.
        """
        if self._in_huge_pages(offset, nbytes):
            shard, start = divmod(offset, self.spec.shard_bytes)
            address_space.read_in_huge_pages(self.shard_path(shard), start, nbytes)
        self._rows.advise(offset, nbytes, address_space.MADV_POPULATE_READ)

    def _in_huge_pages(self, offset: int, nbytes: int) -> bool:
        """Return whether a part of the files, all of it in one, is whole pages of 2 MiB in files that are."""
        return not any(each % address_space.HUGE_PAGE for each in (self.spec.shard_bytes, offset, nbytes))

    def read_in_rows(self, rows: Int64Array) -> None:
        """As `read_in`, for the pages of ascending rows, all of which are requested first."""
        pages = file_blocks.pages(rows, self.spec.record_bytes)
        self.totals.add_bytes(warmed=PAGE * (pages.size - self.count_resident(pages)))
        self._request_rows(rows, 0, rows.size)
        if self._advise(rows, address_space.MADV_POPULATE_READ, 0, rows.size):
            raise OSError(errno.EIO, f"{self.directory} cannot be read")

    # ---- changing, in memory; under the store's lock

    def copy(self, rows: Int64Array, places: Int64Array, start: int, stop: int) -> None:
        """Copy the records of ``rows[start:stop]``, the files' or initial ones, to the slots reserved for them."""
        if not self.spec.has_presence or self.spec.precision.is_coded:
            row_kernels.copy_rows(self.bytes, rows, places, start, stop)
            fresh = start + self._fresh(rows[start:stop], rows[start:stop], None)
            if fresh.size:
                self.records[places[fresh]] = self.initial_records(rows[fresh])
            return
        row_kernels.copy_or_fill(type(self.spec.initializer))(
            self.records, self.present, rows, places, self.spec.initial_state, *self._drawn_from, start, stop
        )

    # ---- what changed; under the store's lock

    @property
    def changes(self) -> int:
        """How many rows differ from the last commit."""
        in_slots, filled = self.overlay.changes, self.filled.changes
        if in_slots and filled:  # rows may be in both
            in_slots -= int(np.count_nonzero(self.filled.contain(self.overlay.changed_rows())))
        return in_slots + filled

    def changed_rows(self) -> Int64Array:
        """List the rows in slots that differ from the last commit, in the order of these, spilled ones last."""
        return self.overlay.changed_rows()

    def forget_changes(self, images: Images, budget: MemoryBudget) -> None:
        """Go back to the last commit: to the files, and to `images`, which are newer than the files.

        Raises
        ------
        DiskFullError, OSError
            The images fit neither in memory nor in the spill file.
        """
        with self.overlay.rewinding():
            self.filled.undo(self.location, tuple(self.filled.uncommitted))
            rows = self.changed_rows()
            # Changed rows whose committed record is not in the files yet: the image overwrites them.
            again = np.isin(images.ids, rows)
            self.overlay.drop(rows[~np.isin(rows, images.ids)])
            self.load_images(Images(images.ids[again], images.addresses[again]), budget)
            self.overlay.clear_changes()  # last, so that a call after an error does all of it again

    def load_images(self, images: Images, budget: MemoryBudget) -> None:
        """Load committed images, which the files do not hold yet, into memory; spill other rows if need be.

        Raises
        ------
        DiskFullError, OSError
            There is no space for them.
        """
        overlay = self.overlay
        for start in range(0, images.ids.size, PAGED_ROWS):
            ids, addresses = (each[start : start + PAGED_ROWS] for each in images[:2])
            budget.spill(overlay.count_new(ids) * overlay.row_bytes)
            overlay.reload(ids)
            places = overlay.places(ids)
            new = places == ids
            # Slots may be published before they are filled here, because no lookup runs without the lock: the table is
            # new or is being opened, or the caller is `rewinding`.
            places[new] = overlay.reserve(ids[new])
            overlay.publish(ids[new], places[new])
            row_kernels.place_images(self.bytes, places, addresses)
            overlay.mark_dirty(places)

    def adopt_changes(self, other: Shards, budget: MemoryBudget) -> None:
        """Copy the uncommitted changes of a table with another number of rows; rows that this one lacks are left out.

        Raises
        ------
        DiskFullError, OSError
            There is no space for them.
        """
        rows = other.changed_rows()
        rows = rows[rows < self.spec.num_embeddings]
        for start in range(0, rows.size, PAGED_ROWS):
            ids = rows[start : start + PAGED_ROWS]
            records = np.empty((ids.size, self.spec.width), self.spec.element)
            other.overlay.pack(ids, records.ctypes.data)
            self.adopt_records(ids, records, budget)

    def adopt_records(self, ids: Int64Array, records: NDArray[Any], budget: MemoryBudget) -> None:
        """Copy records in as uncommitted changes; raises what `adopt_changes` does."""
        for start in range(0, ids.size, PAGED_ROWS):
            some, given = ids[start : start + PAGED_ROWS], records[start : start + PAGED_ROWS]
            addresses = given.ctypes.data + np.arange(some.size) * self.spec.record_bytes
            self.load_images(Images(some, addresses), budget)
            self.overlay.reload(some)  # in case that loading a part of them has spilled another part
            self.overlay.mark_changed(self.overlay.places(some))

    def never_written(self, start: int, stop: int) -> Int64Array:
        """List those of rows ``start:stop`` that the files have no record of, and that are not dirty either."""
        rows = np.arange(start, stop)
        rows = rows[~self.were_written(rows)]
        return rows[~self.overlay.are_dirty(rows)]

    def pack_initial(self, ids: Int64Array, start: int, stop: int, address: int) -> None:
        """Copy the initial records of ``ids[start:stop]`` to an address, contiguously."""
        records = self.initial_records(ids[start:stop]).view(np.uint8)
        row_kernels.pack(records, np.arange(stop - start), address)

    def initial_records(self, ids: Int64Array) -> NDArray[Any]:
        """Compute the initial records of rows, shape (ids.size, width); they need not be rows of the table yet."""
        spec = self.spec
        if spec.precision.is_raw:
            return np.zeros((ids.size, spec.width), spec.element)
        weights = np.empty((ids.size, spec.embedding_dim), np.float32)
        fill = row_kernels.fill(type(spec.initializer))
        fill(spec.numbers_of(ids), weights, *self._drawn_from[:2], 0, ids.size)
        return np.hstack([self.codec.encoded(weights), np.tile(spec.initial_state, (ids.size, 1))])

    def initial_values(self, ids: Int64Array, form: str, column: str = "weight") -> NDArray[Any]:
        """Compute what a lookup returns for rows that were never written; they need not be rows of the table yet."""
        width, dtype = self.codec.shape_of(column, form)
        out = np.empty((ids.size, width), dtype)
        records = self.initial_records(ids).view(np.uint8)
        self.codec.gather(records, np.arange(ids.size), column, form, out, 0)
        return out

    def begin_fold(self) -> None:
        """Note that a fold of all that is committed begins."""
        self.filled.begin_fold()
        self.overlay.begin_fold()

    def end_fold(self, *, folded: bool) -> None:
        """Note that the fold has ended; see `Overlay.end_fold`."""
        self.last_fold = object()
        # First the filled rows: what they find in the files then leaves its slot.
        self.filled.end_fold(self.location, folded=folded)
        self.overlay.end_fold(folded=folded)

    def freeze(self) -> None:
        """Begin a commit of the rows that differ from the last one; see `FrozenRows`."""
        self.filled.freeze()
        self.frozen = FrozenRows(self.overlay, self.spec.record_bytes)

    @property
    def kept_row_bytes(self) -> int:
        """Bytes of memory that `FrozenRows.keep` may take for a row."""
        return 0 if self.frozen is None else self.spec.record_bytes

    def end_commit(self, *, committed: bool) -> None:
        """End a commit; unless it has `committed` them, its rows differ from the last commit again."""
        if self.frozen is not None:
            self.frozen.release(committed=committed)
            self.frozen = None
            self.filled.end_commit(committed=committed)

    def release_pages(self, start: int, stop: int) -> None:
        """Release the pages of the files of rows ``start:stop``; slots stay."""
        first, last = start * self.spec.record_bytes // PAGE, -(-stop * self.spec.record_bytes // PAGE)
        self._rows.advise(first * PAGE, (last - first) * PAGE, address_space.MADV_DONTNEED)

    # ---- files

    def rows_written(self) -> Int64Array:
        """Count for each shard the rows that hold more than their initial values, dirty ones included."""
        spec = self.spec
        rows = table_folder.rows_written(self.location)
        dirty = self.overlay.dirty_rows()
        if spec.has_presence:
            dirty = dirty[~self.were_written(dirty)]
        rows += np.bincount(dirty // spec.rows_per_shard, minlength=spec.num_shards)
        rows += self.filled.count_by_shard()
        every = (self.location.shard(shard).rows for shard in range(spec.num_shards))
        counts: Int64Array = np.minimum(rows, np.array([last - first for first, last in every]))
        return counts

    def bytes_allocated(self) -> Int64Array:
        """Return for each shard the bytes that its file takes on the disk."""
        paths = map(self.shard_path, range(self.spec.num_shards))
        return np.array([files.allocated(path) for path in paths], np.int64)

    @property
    def location(self) -> TableLocation:
        """The spec of the table and the folder that it is in now."""
        return TableLocation(self.spec, self.directory)

    def shard_path(self, shard: int) -> Path:
        """Return the path of a row-shard's file, in the folder that the table is in now."""
        return self.location.shard(shard).path

    def presence_path(self, chunk: int) -> Path:
        """Return the path of a presence chunk's file, in the folder that the table is in now."""
        return self.location.presence_chunk(chunk).path


def create(
    spec: TableSpec,
    directory: Path,
    rows: FirstRows | None,
    progress: Progress = None,
    *,
    stays_cached: bool = False,
    staged: Path | None = None,
) -> Shards:
    """Create a table's folder, see `table_folder.create`, and map it; remove the folder if it cannot be mapped."""
    rows = first_rows(spec, rows)
    table_folder.create(spec, directory, rows, progress, stays_cached=stays_cached, staged=staged)
    try:
        mapped = Shards(spec, directory)
        if stays_cached:  # or the first lookups would have a page fault for each 64 KiB
            for offset, nbytes in mapped.written_pieces(spec.shard_bytes):
                mapped.read_in(offset, nbytes)
        return mapped
    except BaseException:
        files.remove_tree(directory)
        raise


def open_existing(directory: Path, *, may_miss: bool, may_create: bool) -> Shards:
    """Check a table's folder, see `table_folder.open_existing`, and map it."""
    spec, missing = table_folder.open_existing(directory, may_miss=may_miss, may_create=may_create)
    return Shards(spec, directory, missing)
