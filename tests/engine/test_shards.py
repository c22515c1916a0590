import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.specs import make

from shardemb.base.sizes import PAGE
from shardemb.base.validation import FirstRows
from shardemb.commits import fold
from shardemb.commits.log_reader import Images
from shardemb.compute import plan, row_kernels
from shardemb.engine import shards
from shardemb.errors import DiskFullError, FormatError, ShardEmbError
from shardemb.format import zarr_metadata
from shardemb.initializers import Constant, Uniform
from shardemb.memory.memory_budget import MemoryBudget
from shardemb.memory.slots import DIRTY
from shardemb.optim import Adagrad, Adam, RowWiseAdagrad
from shardemb.storage import address_space, files, table_folder

ROWS_PER_BLOCK = 8 * PAGE  # rows whose bits fill a page of the presence bitmap
ROWS = 2 * ROWS_PER_BLOCK + 1000


def int64(rows):
    return np.array(sorted(set(rows)), np.int64)


def load(table, rows):
    """As `batch` does it: reload spilled rows, copy new rows into slots."""
    table.overlay.reload(rows)
    places = table.overlay.places(rows)
    new = places == rows
    places[new] = table.overlay.reserve(rows[new])
    table.copy(rows[new], places[new], 0, int(new.sum()))
    table.overlay.publish(rows[new], places[new])
    return places


def write(table, rows, values):
    """As `batch` does it: load, mark, overwrite weights."""
    batch = plan.group(np.array(rows, np.int64), table.spec.num_embeddings)
    places = load(table, batch.rows)
    table.overlay.mark_changed(places)
    values = np.ascontiguousarray(values, np.float32).reshape(len(rows), table.spec.embedding_dim)
    row_kernels.scatter(table.records, places, batch.starts, batch.order, values, 0, batch.rows.size)


def look_up(table, rows, column="weight"):
    first, last = table.spec.columns[column]
    out = np.empty((len(rows), last - first), np.float32)
    table.overlay.reload(int64(rows))
    table.gather(column, np.array(rows, np.int64), out, 0, len(rows))
    return out


UNLIMITED = MemoryBudget()
NO_IMAGES = Images(np.empty(0, np.int64), np.empty(0, np.int64))


def images_of(table, rows):
    """What a log would hold of rows; the second value is the memory of the images."""
    records = np.empty((rows.size, table.spec.width), np.float32)
    table.overlay.pack(rows, records.ctypes.data)
    return Images(rows, records.ctypes.data + np.arange(rows.size) * table.spec.record_bytes), records


def save(table):
    """As a commit and a fold do it."""
    images, memory = images_of(table, np.sort(table.changed_rows()))  # as a replay has them
    table.overlay.clear_changes()
    table.begin_fold()
    fold.write([(table.location, images)], 2)
    table.overlay.end_fold(folded=True)
    del memory


def on_disk(table):
    """What the files hold: records and presence bits."""
    rows = [table.shard_path(shard).read_bytes() for shard in range(table.spec.num_shards)]
    bits = [table.presence_path(chunk).read_bytes() for chunk in range(table.spec.num_presence_chunks)]
    return b"".join(rows), b"".join(bits)


def in_memory(table):
    """The same, as memory shows it; the rows of the last file that no table has are always zero."""
    rows = np.arange(len(table.records) // 2)
    records = np.empty((rows.size, table.spec.width), np.float32)
    table.overlay.pack(rows, records.ctypes.data)
    if not table.spec.has_presence:
        return records.tobytes(), b""
    present = np.unpackbits(table.present, bitorder="little")
    for slots in table.overlay._all_slots():
        present[slots.owner[np.flatnonzero(slots.state & DIRTY)]] = 1
    records[present[: rows.size] == 0] = 0  # a row that was only loaded has its initial record in its slot
    return records.tobytes(), np.packbits(present, bitorder="little").tobytes()


# ---- a model ----------------------------------------------------------------------------------------------------

SPECS = {
    "20 bytes": make(ROWS, 5, rows_per_shard=20_000),
    "28 bytes with presence": make(ROWS, 3, Adagrad(initial_accumulator_value=0.5), rows_per_shard=1024 * 11),
    "a page and a bit": make(1100, 1025, initializer=Constant(2.0), rows_per_shard=1024),
}


@st.composite
def histories(draw):
    """What happens to a table: changes of rows near each other, far apart, and at every kind of border."""
    name = draw(st.sampled_from(list(SPECS)))
    spec = SPECS[name]
    last = spec.num_embeddings - 1
    borders = [
        0,
        63,
        64,
        spec.rows_per_shard - 1,
        spec.rows_per_shard,
        ROWS_PER_BLOCK - 1,
        ROWS_PER_BLOCK,
        last,
    ]
    row = st.sampled_from([border for border in borders if border <= last]) | st.integers(0, last)
    rows = st.lists(row, min_size=1, max_size=8)
    span = st.tuples(row, row).map(sorted)
    event = st.one_of(
        st.tuples(st.just("write"), rows),
        st.tuples(st.just("write"), rows),
        st.tuples(st.just("load"), rows),
        st.tuples(st.just("release pages"), span),
        st.tuples(st.sampled_from(["spill", "evict"]), st.sampled_from([1, 2, 1000])),
        st.tuples(st.sampled_from(["save", "forget", "compact"]), st.none()),
    )
    return spec, draw(st.lists(event, min_size=1, max_size=12))


class Model:
    """The rows that were written, and what they were at the last save."""

    def __init__(self):
        self.now, self.saved = {}, {}


def step(table, model, number, event, argument):
    if event == "write":
        values = np.full((len(argument), table.spec.embedding_dim), number, np.float32)
        values[:, 0] = argument
        write(table, argument, values)
        model.now = {**model.now, **dict.fromkeys(argument, number)}
    elif event == "load":
        load(table, int64(argument))
    elif event == "release pages":
        table.release_pages(argument[0], argument[1] + 1)
    elif event == "spill":
        before, count = table.overlay.spilled, min(argument, table.overlay.slots.count)
        table.overlay.spill(argument, table.directory)
        assert table.overlay.spilled == before + count
    elif event == "compact":
        table.overlay.compact()
        assert table.overlay.idle_bytes == 0
    elif event == "save":
        check_changes(table)
        save(table)
        assert on_disk(table) == in_memory(table)
        model.saved = model.now
    elif event == "forget":
        table.forget_changes(NO_IMAGES, UNLIMITED)
        assert not table.changes
        assert on_disk(table) == in_memory(table)
        model.now = model.saved
    else:
        table.overlay.evict(argument)
        assert table.overlay.slots.count >= table.overlay.slots.dirty


def check_changes(table):
    """No row is listed twice, and as many are listed as are counted."""
    assert np.unique(table.changed_rows()).size == table.changed_rows().size == table.changes


def check_table(table, model):
    some = sorted({0, 1, table.spec.num_embeddings - 1, *model.now, *model.saved})
    weights = look_up(table, some)
    fresh = look_up(table, [2]) if 2 not in model.now else None
    for row, weight in zip(some, weights, strict=True):
        if row in model.now:
            assert weight[0] == row
            assert (weight[1:] == model.now[row]).all()
        elif fresh is not None:
            assert (weight == fresh).all()
    for column in list(table.spec.columns)[1:]:
        assert (look_up(table, some, column) == 0.5).all()
    assert (table.overlay._entries(table.changed_rows()) != 0).all()
    assert table.overlay.nbytes <= table.overlay.slots.count * table.overlay.row_bytes


@settings(max_examples=60)
@given(histories())
def test_memory_files_and_a_model_agree_whatever_happens(history):
    spec, events = history
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync_data", lambda descriptor, path: None)  # for speed: nothing crashes here
        table = shards.create(spec, Path(folder) / "table", None)
        model = Model()
        for number, (event, argument) in enumerate(events, 1):
            step(table, model, number, event, argument)
            check_table(table, model)
            check_changes(table)
            differ = {row for row, value in model.now.items() if model.saved.get(row) != value}
            assert differ <= set(table.changed_rows().tolist())
        table.forget_changes(NO_IMAGES, UNLIMITED)
        assert in_memory(table) == on_disk(table)
        del table


# ---- changes ----------------------------------------------------------------------------------------------------

PLAIN, PRESENCE, LARGE_RECORDS = SPECS.values()


def create(tmp_path, spec=PLAIN, values=None):
    rows = None if values is None else FirstRows(len(values), lambda start, stop: values[start:stop])
    return shards.create(spec, tmp_path / "table", rows)


def in_slots(table):
    entries = table.overlay._entries(np.arange(table.spec.num_embeddings))
    return set(np.flatnonzero(entries > 0).tolist())


def test_a_new_table_has_no_changes_and_takes_no_disk(tmp_path):
    table = create(tmp_path)
    assert not table.changes
    assert table.changes == 0
    assert table.changed_rows().size == 0
    assert not table.records[:ROWS].any()
    assert files.allocated(tmp_path / "table" / "rows") < 100_000


def test_changed_rows_are_listed_in_the_order_of_their_slots(tmp_path):
    table = create(tmp_path)
    write(table, [61_440, 0, 5000], np.ones((3, 5)))
    write(table, [1, 5000, 61_439], np.ones((3, 5)))
    rows = table.changed_rows()
    assert set(rows.tolist()) == {0, 1, 5000, 61_439, 61_440}
    assert (np.diff(table.overlay.places(rows)) > 0).all()
    assert table.changes == 5


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_going_back_gives_images_that_the_files_do_not_hold(tmp_path, spec):
    table = create(tmp_path, spec)
    rows = int64([0, 1, 700, spec.num_embeddings - 1])
    write(table, rows, np.full((4, spec.embedding_dim), 5.0))
    images, memory = images_of(table, rows)
    table.overlay.clear_changes()
    expected = in_memory(table)
    write(table, [1, 2, 700], np.full((3, spec.embedding_dim), 6.0))
    assert in_memory(table) != expected
    table.forget_changes(images, UNLIMITED)
    assert in_memory(table) == expected
    assert not table.changes
    del memory


def test_rows_stay_until_the_files_hold_them(tmp_path):
    table = create(tmp_path)
    write(table, [0], np.ones((1, 5)))
    table.overlay.clear_changes()
    table.overlay.evict(10)
    assert in_slots(table) == {0}
    table.begin_fold()
    write(table, [1000], np.ones((1, 5)))
    table.overlay.evict(10)
    assert in_slots(table) == {0, 1000}
    table.overlay.end_fold(folded=False)
    table.overlay.evict(10)
    assert in_slots(table) == {0, 1000}
    table.begin_fold()  # row 1,000 is not committed
    table.overlay.end_fold(folded=True)
    table.overlay.evict(10)
    assert in_slots(table) == {1000}


def test_releasing_pages_spares_slots(tmp_path):
    table = create(tmp_path)
    write(table, [0, ROWS - 1], np.ones((2, 5)))
    save(table)
    write(table, [1], np.full((1, 5), 2.0))
    table.release_pages(0, ROWS)
    assert look_up(table, [0, ROWS - 1]).max() == 1
    assert look_up(table, [1]).min() == 2


def test_memory_of_evicted_rows_is_released(tmp_path):
    table = create(tmp_path)
    rows = np.arange(ROWS)
    write(table, rows, np.ones((ROWS, 5)))
    save(table)
    before = anonymous()
    table.overlay.evict(ROWS)
    assert before - anonymous() > 0.9 * ROWS * 20
    assert table.overlay.slots.count == 0
    assert (table.records[:ROWS] == 1).all()


def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


def test_loaded_rows_are_counted_and_not_changed(tmp_path):
    table = create(tmp_path, LARGE_RECORDS)
    load(table, int64([0, 5]))
    assert in_slots(table) == {0, 5}
    assert table.overlay.nbytes == 2 * (4100 + 16) + 2 * 64
    assert not table.changes
    table.overlay.evict(1)
    assert len(in_slots(table)) == 1


# ---- reading ----------------------------------------------------------------------------------------------------


def test_rows_never_written_have_their_initial_values_in_every_column(tmp_path):
    spec = make(500, 4, Adagrad(initial_accumulator_value=0.5), Uniform(-1, 1, seed=3))
    table = create(tmp_path, spec)
    fresh = look_up(table, range(500))
    assert len(np.unique(fresh)) == 2000
    assert (look_up(table, range(500), "sum") == 0.5).all()
    write(table, [7], np.full((1, 4), 9.0))
    np.testing.assert_array_equal(look_up(table, [6, 7, 8]), [fresh[6], [9] * 4, fresh[8]])
    assert (look_up(table, [6, 7, 8], "sum") == 0.5).all()


def test_a_row_that_was_never_written_is_loaded_as_it_was_looked_up(tmp_path):
    table = create(tmp_path, make(500, 4, RowWiseAdagrad(), Uniform(-1, 1, seed=3)))
    fresh = look_up(table, range(500))
    places = load(table, int64([3, 499]))
    np.testing.assert_array_equal(table.records[places, :4], fresh[[3, 499]])
    np.testing.assert_array_equal(look_up(table, range(500)), fresh)


def test_the_share_of_rows_that_have_to_be_drawn(tmp_path):
    table = create(tmp_path, make(500, 4, RowWiseAdagrad(), Uniform(-1, 1, seed=3)))
    rows = int64(range(64))
    assert table.share_drawn("weight", rows, 32) == 1
    assert table.share_drawn("sum", rows, 32) == 0  # all of it has one initial value
    load(table, rows[:32])  # rows in slots have records, whatever their bit says
    assert table.share_drawn("weight", rows, 32) == 0.5
    assert table.share_drawn("weight", rows[40:41], 32) == 1


@pytest.mark.parametrize("initializer", [Constant(0.0), Constant(0.5)], ids=str)
def test_constant_rows_are_not_drawn(tmp_path, initializer):
    table = create(tmp_path, make(500, 4, RowWiseAdagrad(), initializer))
    assert table.share_drawn("weight", int64(range(64)), 32) == 0


def test_a_batch_is_cold_when_its_pages_are_not_in_memory(tmp_path):
    table = create(tmp_path, values=np.ones((ROWS, 5), np.float32))  # written, synced and dropped
    rows = int64(range(0, ROWS, 400))
    if not table.is_cold(rows, 32):
        pytest.skip("this file system keeps its files in memory")
    table.read_ahead(rows, 0, rows.size)
    assert (look_up(table, rows) == 1).all()
    assert not table.is_cold(rows, 32)


def test_one_row_of_a_sample_makes_a_batch_cold(tmp_path):
    """To wait for a page takes 100 us, so for a tenth of 65,536 it takes two cores a third of a second."""
    table = create(tmp_path, values=np.ones((ROWS, 5), np.float32))
    rows = int64(range(0, ROWS, 400))
    if not table.is_cold(rows, 32):
        pytest.skip("this file system keeps its files in memory")
    table.read_ahead(rows, 1, rows.size)
    look_up(table, rows[1:])
    assert table.is_cold(rows, 32)
    assert not table.is_cold(rows[1:], 32)


HUGE = make(40_960, 64, rows_per_shard=16_384)  # two shards of 4 MiB, and one of which half is rows


@pytest.fixture
def parts_read(monkeypatch):
    """List the parts of files that are read in huge pages."""
    parts = []

    def spy(path, start, nbytes):
        parts.append((path.name, start / address_space.HUGE_PAGE, nbytes / address_space.HUGE_PAGE))
        read(path, start, nbytes)

    read = address_space.read_in_huge_pages
    monkeypatch.setattr(address_space, "read_in_huge_pages", spy)
    return parts


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [
        (0, 40_960, [("c.0.0", 0, 2), ("c.1.0", 0, 2), ("c.2.0", 0, 1)]),
        (1, 40_959, [("c.0.0", 1, 1), ("c.1.0", 0, 2)]),
        (8_192, 16_384, [("c.0.0", 1, 1)]),
        (8_191, 24_577, [("c.0.0", 1, 1), ("c.1.0", 0, 1)]),
        (8_193, 24_575, []),
        (5, 5, []),
    ],
)
def test_contiguous_rows_are_read_in_huge_pages(tmp_path, parts_read, start, stop, expected):
    values = np.random.default_rng(0).random((40_960, 64), np.float32)
    table = create(tmp_path, HUGE, values)
    rows = np.arange(start, stop)
    table.read_ahead(rows, 0, rows.size)
    assert parts_read == expected
    np.testing.assert_array_equal(look_up(table, rows), values[rows])
    assert not table.is_cold(rows, 32)


@pytest.mark.parametrize(
    "rows", [np.delete(np.arange(40_960), 20_000), np.arange(0, 40_960, 2), np.arange(8_000)]
)
def test_no_more_is_read_than_is_requested(tmp_path, parts_read, rows):
    table = create(tmp_path, HUGE, np.ones((40_960, 64), np.float32))
    table.read_ahead(rows, 0, rows.size)
    assert parts_read == []


def test_rows_that_were_never_written_are_not_read(tmp_path, parts_read):
    table = create(tmp_path, make(16_384, 64, None, Uniform(-1, 1, seed=3), rows_per_shard=16_384))
    rows = np.arange(16_384)
    table.read_ahead(rows, 0, rows.size)
    assert parts_read == []


def test_reading_ahead_fails_quietly(tmp_path, monkeypatch):
    def fail(path, start, nbytes):
        raise OSError(path)

    monkeypatch.setattr(address_space, "read_in_huge_pages", fail)
    table = create(tmp_path, HUGE, np.ones((40_960, 64), np.float32))
    rows = np.arange(40_960)
    table.read_ahead(rows, 0, rows.size)
    assert (look_up(table, rows) == 1).all()


def test_rows_never_written_are_not_cold(tmp_path):
    table = create(tmp_path, PRESENCE)
    assert not table.is_cold(int64(range(0, ROWS, 400)), 32)


def test_an_empty_batch_is_not_cold(tmp_path):
    assert not create(tmp_path).is_cold(int64([]), 32)


# ---- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_file_is_there_with_its_size(tmp_path, spec):
    create(tmp_path, spec)
    directory = tmp_path / "table"
    rows = {path.name: path.stat().st_size for path in (directory / "rows").iterdir()}
    assert rows.pop("zarr.json")
    assert rows == {f"c.{shard}.0": spec.shard_bytes for shard in range(spec.num_shards)}
    assert (directory / "present").exists() == spec.has_presence
    assert table_folder.find_missing(spec, directory) == []
    assert (
        zarr_metadata.table_spec(
            {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("zarr.json")}
        )
        == spec
    )


@pytest.mark.parametrize("spec", [*SPECS.values(), make(40_000, 6, Adam())], ids=[*SPECS, "adam"])
def test_an_array_of_values_becomes_the_rows(tmp_path, spec):
    values = np.random.default_rng(0).random((spec.num_embeddings, spec.embedding_dim), np.float32)
    table = create(tmp_path, spec, values)
    np.testing.assert_array_equal(look_up(table, range(spec.num_embeddings)), values)
    for column in list(spec.columns)[1:]:
        assert (look_up(table, range(spec.num_embeddings), column) == spec.initial_state[0]).all()
    assert not table.changes
    assert table.overlay.slots.count == 0
    if spec.has_presence:
        assert np.unpackbits(table.present, bitorder="little").sum() == spec.num_embeddings


@pytest.mark.parametrize("call", ["write_new", "create_sparse", "write", "sync"])
def test_a_table_that_cannot_be_created_leaves_nothing_behind(tmp_path, monkeypatch, call):
    def full(*args):
        raise DiskFullError(28, "no room")

    monkeypatch.setattr(files, call, full)
    with pytest.raises(DiskFullError):
        create(tmp_path, PLAIN, np.ones((ROWS, 5), np.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_table_with_more_files_than_can_be_mapped_is_refused_before_anything_is_made(tmp_path):
    spec = make(64 * 70_000, 16, rows_per_shard=64)
    with pytest.raises(ShardEmbError, match=r"takes 70000 files .*use larger shards"):
        create(tmp_path, spec)
    assert list(tmp_path.iterdir()) == []


def test_tables_share_what_a_process_can_map(tmp_path, monkeypatch):
    monkeypatch.setattr(address_space, "MAX_MAPPINGS", files.counters.mappings + 16)
    first = create(tmp_path)  # four files
    with pytest.raises(ShardEmbError, match="at most"):
        shards.create(PLAIN, tmp_path / "second", None)
    del first
    assert shards.create(PLAIN, tmp_path / "second", None) is not None


# ---- existing tables --------------------------------------------------------------------------------------------


def open_existing(tmp_path, *, may_miss=False, may_create=False):
    return shards.open_existing(tmp_path / "table", may_miss=may_miss, may_create=may_create)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_opening_gives_what_was_saved(tmp_path, spec):
    table = create(tmp_path, spec)
    write(table, [1, spec.num_embeddings - 1], np.full((2, spec.embedding_dim), 5.0))
    save(table)
    expected = in_memory(table)
    again = open_existing(tmp_path)
    assert again.spec == spec
    assert in_memory(again) == expected
    assert not again.changes


def test_opening_does_not_give_what_was_not_saved(tmp_path):
    table = create(tmp_path)
    write(table, [1], np.ones((1, 5)))
    assert not open_existing(tmp_path).records[:100].any()


@pytest.mark.parametrize("nbytes", [0, 1, PLAIN.shard_bytes - 1, PLAIN.shard_bytes + 1])
def test_a_file_of_another_size_is_named(tmp_path, nbytes):
    create(tmp_path)
    shard = tmp_path / "table" / "rows" / "c.2.0"
    with shard.open("r+b") as file:
        file.truncate(nbytes)
    with pytest.raises(FormatError, match=rf"c\.2\.0 has {nbytes} bytes instead of {PLAIN.shard_bytes}"):
        open_existing(tmp_path, may_miss=True, may_create=True)


def test_a_file_that_is_a_link_or_a_folder_is_none(tmp_path):
    create(tmp_path)
    shard = tmp_path / "table" / "rows" / "c.2.0"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"c\.2\.0 is missing"):
        open_existing(tmp_path)


@pytest.mark.parametrize(("spec", "may_miss"), [(PLAIN, False), (PRESENCE, True), (PRESENCE, False)])
def test_a_missing_file_is_named(tmp_path, spec, may_miss):
    create(tmp_path, spec)
    (tmp_path / "table" / "rows" / "c.1.0").unlink()
    (tmp_path / "table" / "rows" / "c.3.0").unlink()
    with pytest.raises(FormatError, match=r"c\.1\.0 is missing \(2 in all\).*restore"):
        open_existing(tmp_path, may_miss=may_miss, may_create=True)
    assert not (tmp_path / "table" / "rows" / "c.1.0").exists()


def test_a_missing_presence_file_is_named(tmp_path):
    create(tmp_path, PRESENCE)
    (tmp_path / "table" / "present" / "c.0").unlink()
    with pytest.raises(FormatError, match=r"present/c\.0 is missing"):
        open_existing(tmp_path, may_miss=True, may_create=True)


@pytest.mark.parametrize("may_create", [False, True])
def test_a_chunk_that_zarr_deleted_reads_as_zeros(tmp_path, may_create):
    """zarr deletes a chunk that it is to fill with zeros."""
    table = create(tmp_path, values=np.ones((ROWS, 5), np.float32))
    gone = table.shard_path(1)
    gone.unlink()
    again = open_existing(tmp_path, may_miss=True, may_create=may_create)
    assert gone.exists() == may_create
    begin, end = PLAIN.rows_per_shard, 2 * PLAIN.rows_per_shard
    assert not look_up(again, range(begin, end)).any()
    assert (look_up(again, [*range(begin), *range(end, ROWS)]) == 1).all()


def test_hostile_sizes_are_refused_before_their_files_are_searched(tmp_path, monkeypatch):
    """To look for 2**40 files would take weeks."""
    monkeypatch.setattr(files, "size", lambda path: pytest.fail(f"looked for {path}"))
    spec = make(2**46, 16, rows_per_shard=64)
    for path, document in zarr_metadata.table_documents(spec).items():
        (tmp_path / "table" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "table" / path).write_bytes(document)
    with pytest.raises(ShardEmbError, match="files"):
        open_existing(tmp_path)


def test_a_folder_without_documents_is_no_table(tmp_path):
    (tmp_path / "table").mkdir()
    with pytest.raises(FormatError):
        open_existing(tmp_path)


def test_a_table_that_moves_finds_its_files_again(tmp_path):
    table = create(tmp_path)
    (tmp_path / "table").rename(tmp_path / "moved")
    table.directory = tmp_path / "moved"
    write(table, [1], np.ones((1, 5)))
    save(table)
    assert on_disk(table) == in_memory(table)
