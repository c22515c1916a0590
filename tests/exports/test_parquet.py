"""Exports to parquet and Arrow: what they hold, where they are written, what goes wrong, how much memory they take."""

import doctest
import errno
import json
import mmap
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardemb.compute import scheduler
from shardemb.errors import DiskFullError
from shardemb.exports import arrow, parquet
from shardemb.exports.arrow import schema, to_arrow_batches
from shardemb.exports.parquet import export_parquet
from shardemb.storage import files


@dataclass
class Rows:
    """A table in memory that records which rows were read and released."""

    weights: np.ndarray
    states: dict = field(default_factory=dict)
    rows_per_shard: int = 64
    name: str = "tokens"
    form: str = "float32"
    before_read: Callable[[int], object] = lambda start: None
    events: list = field(default_factory=list)
    arrays: list = field(default_factory=list)
    keys: None = None
    threads: int = 2
    run: Callable = lambda tasks, stop=None: [task() for task in tasks]

    @property
    def num_embeddings(self):
        return len(self.weights)

    @property
    def embedding_dim(self):
        return self.weights.shape[1]

    @property
    def columns(self):
        return {name: values.shape[1] for name, values in self.states.items()}

    def read_rows(self, start, stop, columns):
        self.before_read(start)
        arrays = [
            self.weights[start:stop].copy(),
            *(self.states[name][start:stop].copy() for name in columns),
        ]
        self.events.append(("read", start, stop))
        self.arrays.append([weakref.ref(array) for array in arrays])
        return arrays

    def release_pages(self, start, stop):
        self.events.append(("release", start, stop))

    def describe(self):
        return {"step": 7, "optimizer": "Adam"}

    @property
    def reads(self):
        return sorted((start, stop) for what, start, stop in self.events if what == "read")


def any_bits(num_rows, width, seed=0):
    """Make float32 values of every kind: NaNs with payloads, signalling ones, infinities, denormals, -0.0."""
    bits = np.random.default_rng(seed).integers(0, 2**32, (num_rows, width), dtype=np.uint32)
    special = np.array(
        [0x7FC00000, 0xFFC12345, 0x7F800001, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000, 0],
        np.uint32,
    )
    bits.reshape(-1)[: special.size] = special[: bits.size]
    return bits.view(np.float32)


def trained(num_rows, dim=3, rows_per_shard=64):
    states = {
        "exp_avg": any_bits(num_rows, dim, 1),
        "sum": any_bits(num_rows, 1, 2),
        "other": any_bits(num_rows, 2, 3),
    }
    return Rows(any_bits(num_rows, dim), states, rows_per_shard)


def one_by_one(tasks, stop=None):
    return [task() for task in tasks]


def in_threads(tasks, stop=None):
    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


RUNS = {"one by one": one_by_one, "threads": in_threads, "dask": partial(scheduler.run, threads=2)}


def running(source, run, workers=2):
    """Make an export run its tasks with `run`."""
    source.run, source.threads = run, workers
    return source


@pytest.fixture
def run():
    return partial(scheduler.run, threads=2)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(arrow, "MAX_ROWS", 32)


def bits(column):
    """Return the bits of an Arrow column of floats or of lists of floats as one flat array."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    assert column.null_count == 0
    values = column if pa.types.is_float32(column.type) else column.flatten()
    assert values.null_count == 0
    return values.to_numpy().view(np.uint32)


def assert_holds(table, source, start=0, stop=None, columns=()):
    """Compare an Arrow table with the rows of a source, bit for bit."""
    stop = source.num_embeddings if stop is None else stop
    assert table.column_names == ["id", "embedding", *columns]
    np.testing.assert_array_equal(table["id"].to_numpy(), np.arange(start, stop))
    for name in table.column_names[1:]:
        expected = source.weights if name == "embedding" else source.states[name]
        np.testing.assert_array_equal(bits(table[name]), expected[start:stop].view(np.uint32).reshape(-1))


def by_pyarrow(path):
    return pq.read_table(path)


def by_duckdb(path):
    where = f"{path}/*.parquet" if path.is_dir() else str(path)
    with duckdb.connect() as connection:
        return connection.sql("select * from read_parquet(?) order by id", params=[where]).to_arrow_table()


def by_polars(path):
    return pl.read_parquet(f"{path}/*.parquet" if path.is_dir() else path).sort("id").to_arrow()


READERS = [by_pyarrow, by_duckdb, by_polars]


# ---- what is in the files


@pytest.mark.parametrize("read", READERS)
def test_the_compact_encoding_reads_back_bit_for_bit(tmp_path, read):
    source = trained(300)
    export_parquet(source, tmp_path / "t", columns=["sum", "exp_avg"], encoding="byte_stream_split")
    assert_holds(read(tmp_path / "t"), source, columns=["sum", "exp_avg"])


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("parts", [None, 1, 3])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_read_back_bit_for_bit(tmp_path, read, parts, run, small_batches):
    source = trained(1003, rows_per_shard=100)
    columns = ["sum", "exp_avg"]
    report = export_parquet(running(source, run), tmp_path / "t", columns=columns, rows=(5, 998), parts=parts)
    assert report.num_rows == 993
    assert_holds(read(tmp_path / "t"), source, 5, 998, columns)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("parts", [None, 2])
def test_an_empty_range_has_the_schema(tmp_path, read, parts):
    source = trained(10)
    path = tmp_path / "none.parquet"
    report = export_parquet(source, path, columns=["sum"], rows=(4, 4), parts=parts)
    table = read(path)
    assert (table.num_rows, report.num_rows, source.reads) == (0, 0, [])
    assert table.column_names == ["id", "embedding", "sum"]


@pytest.mark.parametrize("read", READERS)
def test_vectors_of_one_value(tmp_path, read):
    source = Rows(any_bits(77, 1))
    export_parquet(source, tmp_path / "one.parquet")
    assert_holds(read(tmp_path / "one.parquet"), source)


def test_schema():
    fields = schema(trained(10, dim=4), ["sum", "exp_avg"])
    vector = pa.list_(pa.field("element", pa.float32(), nullable=False), 4)
    assert fields.equals(
        pa.schema(
            [
                pa.field("id", pa.int64(), nullable=False),
                pa.field("embedding", vector, nullable=False),
                pa.field("sum", pa.float32(), nullable=False),
                pa.field("exp_avg", vector, nullable=False),
            ]
        )
    )
    assert not fields.field("embedding").type.value_field.nullable
    assert json.loads(fields.metadata[b"shardemb"]) == {
        "table": "tokens",
        "num_embeddings": 10,
        "embedding_dim": 4,
        "step": 7,
        "optimizer": "Adam",
    }


def test_the_file_keeps_the_schema(tmp_path):
    source = trained(10)
    export_parquet(source, tmp_path / "t.parquet", columns=["sum", "exp_avg"])
    written, promised = pq.read_schema(tmp_path / "t.parquet"), schema(source, ["sum", "exp_avg"])
    assert written.equals(promised)
    assert written.metadata[b"shardemb"] == promised.metadata[b"shardemb"]
    assert "optional" not in str(pq.ParquetFile(tmp_path / "t.parquet").schema)


@pytest.mark.parametrize("chosen", [None, "plain", "byte_stream_split"])
def test_compression_and_encodings(tmp_path, chosen):
    source = trained(200_000, rows_per_shard=150_016)
    options = {} if chosen is None else {"encoding": chosen}
    export_parquet(source, tmp_path / "t.parquet", columns=["sum", "exp_avg"], **options)
    metadata = pq.ParquetFile(tmp_path / "t.parquet").metadata
    groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
    assert [group.num_rows for group in groups] == [50_005, 50_005, 50_006, 49_984]
    for group in groups:
        assert [(column.column_index, column.descending) for column in group.sorting_columns] == [(0, False)]
        chunks = {(chunk := group.column(k)).path_in_schema: chunk for k in range(4)}
        assert list(chunks) == ["id", "embedding.list.element", "sum", "exp_avg.list.element"]
        for path, chunk in chunks.items():
            encoding = "DELTA_BINARY_PACKED" if path == "id" else (chosen or "plain").upper()
            assert chunk.compression == "ZSTD"
            assert set(chunk.encodings) <= {"RLE", encoding}
            assert encoding in chunk.encodings
            assert not chunk.has_dictionary_page
            assert chunk.is_stats_set == (path == "id")
            assert chunk.has_offset_index
    ids = [group.column(0).statistics for group in groups]
    assert [(s.min, s.max) for s in ids] == [
        (0, 50_004),
        (50_005, 100_009),
        (100_010, 150_015),
        (150_016, 199_999),
    ]


@pytest.mark.parametrize(("encoding", "share"), [("plain", 0.94), ("byte_stream_split", 0.88)])
def test_vectors_do_compress(tmp_path, encoding, share):
    vectors = (np.random.default_rng(0).standard_normal((20_000, 32)) * 0.05).astype(np.float32)
    report = export_parquet(Rows(vectors, rows_per_shard=20_032), tmp_path / "t.parquet", encoding=encoding)
    assert report.nbytes < share * vectors.nbytes


# ---- where it is written


def test_report(tmp_path):
    source = trained(1000)
    one = export_parquet(source, tmp_path / "one.parquet")
    assert (one.path, one.files) == (tmp_path / "one.parquet", (tmp_path / "one.parquet",))
    assert one.nbytes == (tmp_path / "one.parquet").stat().st_size
    many = export_parquet(source, tmp_path / "many", parts=3)
    assert many.path == tmp_path / "many"
    assert [file.name for file in many.files] == [f"part-0000{k}.parquet" for k in range(3)]
    assert sorted(many.files) == sorted((tmp_path / "many").iterdir())
    assert many.nbytes == sum(file.stat().st_size for file in many.files)


def test_nothing_else_is_left(tmp_path):
    export_parquet(trained(100), tmp_path / "one")
    export_parquet(trained(100), tmp_path / "many", parts=2)
    assert sorted(os.listdir(tmp_path)) == ["many", "one"]


@pytest.mark.parametrize(("num_rows", "parts"), [(10_000, 7), (100_000, 2), (999, 100), (12, 12), (5, 8)])
def test_there_are_exactly_that_many_parts_of_about_equal_size(tmp_path, num_rows, parts):
    source = Rows(any_bits(num_rows, 2), rows_per_shard=4096)
    report = export_parquet(source, tmp_path / "t", parts=parts)
    sizes = [pq.ParquetFile(file).metadata.num_rows for file in report.files]
    assert len(sizes) == parts
    assert max(sizes) <= max(1, 1.5 * num_rows / parts)
    assert num_rows < parts or min(sizes) >= max(1, 0.5 * num_rows / parts)
    assert_holds(pq.read_table(report.path), source)


def test_an_existing_file_is_replaced(tmp_path):
    (tmp_path / "t.parquet").write_text("old")
    source = trained(100)
    export_parquet(source, tmp_path / "t.parquet")
    assert_holds(pq.read_table(tmp_path / "t.parquet"), source)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "real").write_text("old")
    (tmp_path / "link").symlink_to("there/real")
    report = export_parquet(trained(100), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert report.path == tmp_path / "there" / "real"
    assert pq.read_metadata(report.path).num_rows == 100


def test_an_empty_folder_takes_parts(tmp_path):
    (tmp_path / "t").mkdir()
    export_parquet(trained(100), str(tmp_path / "t"), parts=2)
    assert len(list((tmp_path / "t").iterdir())) == 2


def test_a_name_as_long_as_names_can_be(tmp_path):
    export_parquet(trained(100), tmp_path / ("x" * 255))
    assert (tmp_path / ("x" * 255)).is_file()


def test_written_then_synced_then_renamed_then_the_folder_synced(tmp_path, monkeypatch):
    calls = []

    def heard(name, where):
        real = getattr(files, name)
        monkeypatch.setattr(files, name, lambda *args: (calls.append((name, args[where])), real(*args))[1])

    heard("write", 3)
    heard("sync", 1)
    heard("rename", 1)
    target = tmp_path / "t"
    export_parquet(trained(100), target)
    temporary = calls[0][1]
    assert temporary.parent == tmp_path
    tail = [("sync", temporary), ("rename", target), ("sync", tmp_path)]
    assert calls == [("write", temporary)] * (len(calls) - 3) + tail

    calls.clear()
    target = tmp_path / "many"
    export_parquet(trained(100), target, parts=2)
    folder = calls[0][1].parent
    parts = [("sync", folder / "part-00000.parquet"), ("sync", folder / "part-00001.parquet")]
    tail = [("sync", folder), ("rename", target), ("sync", tmp_path)]
    assert [call for call in calls if call[0] != "write"] == parts + tail


# ---- what goes wrong


BAD = {
    "unknown column": ({"columns": ["exp_avg_sq"]}, ValueError, r"'tokens'.*exp_avg.*got \['exp_avg_sq'\]"),
    "weight as a column": ({"columns": ["weight"]}, ValueError, "weight is always exported"),
    "column twice": ({"columns": ["sum", "sum"]}, ValueError, "different names"),
    "column as a string": ({"columns": "sum"}, ValueError, "must be a list"),
    "negative start": ({"rows": (-1, 5)}, ValueError, r"'tokens'.*stop <= 10, got \(-1, 5\)"),
    "stop past the end": ({"rows": (0, 11)}, ValueError, r"stop <= 10, got \(0, 11\)"),
    "stop before start": ({"rows": (5, 4)}, ValueError, r"got \(5, 4\)"),
    "rows as floats": ({"rows": (0.0, 5.0)}, ValueError, r"got \(0.0, 5.0\)"),
    "rows as a range": ({"rows": range(2, 4)}, ValueError, r"must be a tuple.*got range\(2, 4\)"),
    "three rows": ({"rows": (1, 2, 3)}, ValueError, r"got \(1, 2, 3\)"),
    "no parts": ({"parts": 0}, ValueError, "parts must be 1 to 100000.*got 0"),
    "unknown encoding": ({"encoding": "PLAIN"}, ValueError, "'tokens'.*encoding must be.*got 'PLAIN'"),
    "encoding as a list": ({"encoding": ["plain"]}, ValueError, "encoding must be"),
    "too many parts": ({"parts": 100_001}, ValueError, "parts must be 1 to 100000"),
    "progress": ({"progress": "yes"}, TypeError, "progress must be"),
    "missing folder": ({"path": "no/such"}, FileNotFoundError, r"'tokens'.*no folder .*/no; create it"),
    "folder as a file": ({"path": "full"}, FileExistsError, "that is a folder.*choose another name"),
    "pipe as a file": ({"path": "pipe"}, FileExistsError, "no regular file"),
    "file as a folder": (
        {"path": "file", "parts": 2},
        FileExistsError,
        "parts need a new or an empty folder",
    ),
    "full folder": ({"path": "full", "parts": 2}, FileExistsError, "parts need a new or an empty folder"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_changes_nothing(tmp_path, options, error, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    (tmp_path / "file").write_text("old")
    os.mkfifo(tmp_path / "pipe")
    source = Rows(any_bits(10, 2), {"sum": any_bits(10, 1), "exp_avg": any_bits(10, 2)})
    options = dict(options)
    with pytest.raises(error, match=message):
        export_parquet(source, tmp_path / options.pop("path", "file"), **options)
    assert sorted(os.listdir(tmp_path)) == ["file", "full", "pipe"]
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path / "full") == ["kept"]
    assert source.events == []


@pytest.mark.parametrize("name", ["unknown column", "stop past the end"])
def test_bad_input_of_a_stream_is_refused_immediately(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        to_arrow_batches(trained(10), **options)


def test_a_state_column_with_the_name_of_another_field():
    with pytest.raises(ValueError, match="'id'"):
        schema(Rows(any_bits(3, 2), {"id": any_bits(3, 1)}), ["id"])


@pytest.fixture(params=[None, 3], ids=["file", "parts"])
def target(request, tmp_path):
    """A target at which something exists, and a check that this is unchanged and nothing else is there."""
    path = tmp_path / "target"
    (path.mkdir if request.param else partial(path.write_text, "old"))()
    yield path, request.param
    assert os.listdir(tmp_path) == ["target"]
    assert os.listdir(path) == [] if request.param else path.read_text() == "old"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 1, 2, 15, 31])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_reading_fails(target, run, at, error, small_batches):
    source = trained(1024)
    reads = iter(range(1000))
    lock = threading.Lock()

    def fail(start):
        with lock:
            if next(reads) == at:
                raise error("the disk is on fire")

    source.before_read = fail
    path, parts = target
    with pytest.raises(error, match="on fire"):
        export_parquet(running(source, run), path, parts=parts)


@pytest.mark.parametrize("call", ["write", "sync", "rename"])
def test_the_disk_is_full(target, monkeypatch, call, run):
    def full(*args):
        raise DiskFullError(errno.ENOSPC, "no space left")

    path, parts = target
    monkeypatch.setattr(files, call, full)
    with pytest.raises(DiskFullError, match="no space left"):
        export_parquet(running(trained(1000), run), path, parts=parts)


def test_the_disk_becomes_full_half_way(target, monkeypatch, run, small_batches):
    """The kernel's own error, raised through Arrow."""
    real, left = os.pwrite, [20_000]

    def pwrite(descriptor, data, offset):
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data, offset)

    path, parts = target
    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(DiskFullError, match="no space left on the disk"):
        export_parquet(running(trained(3000), run), path, parts=parts)


def test_progress_may_end_it(target, run, small_batches):
    def enough(done, total):
        if done > total / 2:
            raise InterruptedError("enough")

    path, parts = target
    with pytest.raises(InterruptedError, match="enough"):
        export_parquet(running(trained(1000), run), path, parts=parts, progress=enough)


def test_ctrl_c_waits_for_the_threads_and_then_cleans_up(target, run, small_batches):
    """A signal interrupts only the main thread; the others continue to write."""
    signal.siginterrupt(signal.SIGINT, True)  # polars has set a handler after which waits are resumed
    source = trained(2048)
    reading, interrupted, lock = set(), threading.Event(), threading.Lock()

    def slow(start):
        reading.add(start)
        try:
            with lock:
                first = len(source.events) > 6 and not interrupted.is_set()
                if first:
                    interrupted.set()
            if first:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1 if interrupted.is_set() else 0)
        finally:
            reading.discard(start)

    source.before_read = slow
    path, parts = target
    with pytest.raises(KeyboardInterrupt):
        export_parquet(running(source, run), path, parts=parts)
    assert reading == set()
    count = len(source.events)
    assert count < 32  # of 128: no task ran to the end of its part
    time.sleep(0.2)
    assert len(source.events) == count


def test_a_second_export_to_a_folder_that_appeared_meanwhile(tmp_path):
    source = trained(100)
    source.before_read = lambda start: (tmp_path / "t" / "theirs").mkdir(parents=True, exist_ok=True)
    with pytest.raises(OSError):
        export_parquet(source, tmp_path / "t", parts=1)
    assert os.listdir(tmp_path) == ["t"]
    assert os.listdir(tmp_path / "t") == ["theirs"]


# ---- progress


@pytest.mark.parametrize("parts", [None, 3])
def test_progress_is_called_to_completion(tmp_path, parts, run, small_batches):
    heard = []
    export_parquet(
        running(trained(1000), run),
        tmp_path / "t",
        rows=(10, 990),
        parts=parts,
        progress=lambda done, total: heard.append((done, total)),
    )
    assert {total for _, total in heard} == {980}
    done = [done for done, _ in heard]
    assert done == sorted(set(done))
    assert done[-1] == 980
    assert len(done) >= 30


def test_a_line_says_that_it_is_done(tmp_path, capsys):
    export_parquet(trained(1000), tmp_path / "t", progress=True)
    assert capsys.readouterr().err.startswith("export tokens: 1,000 rows in ")


# ---- the stream


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_stream(run, small_batches):
    source = trained(1003, rows_per_shard=100)
    reader = to_arrow_batches(running(source, run, 3), columns=["other"], rows=(1, 1003))
    assert isinstance(reader, pa.RecordBatchReader)
    assert reader.schema.equals(schema(source, ["other"]), check_metadata=True)
    assert_holds(reader.read_all(), source, 1, 1003, ["other"])


def test_an_empty_stream_has_the_schema():
    source = trained(10)
    table = to_arrow_batches(source, columns=["sum"], rows=(10, 10)).read_all()
    assert (table.num_rows, source.reads) == (0, [])
    assert table.schema.equals(schema(source, ["sum"]), check_metadata=True)


def test_a_stream_reads_when_asked_and_little_ahead(small_batches):
    source = trained(1024)
    reader = to_arrow_batches(running(source, one_by_one, 64))
    assert source.events == []
    reader.read_next_batch()
    assert len(source.reads) == arrow.MAX_READ_AHEAD


def test_a_stream_copies_nothing_and_keeps_nothing(small_batches):
    source = trained(256)
    reader = to_arrow_batches(source, columns=["sum"])
    first = reader.read_next_batch()
    weights, states = source.arrays[0]
    assert first["embedding"].flatten().buffers()[1].address == weights().ctypes.data
    assert first["sum"].buffers()[1].address == states().ctypes.data
    reader.read_next_batch()
    reader.read_next_batch()
    alive = [weights() is not None for weights, _ in source.arrays]
    # The first is held by this test, two were dropped by it, the last was read ahead.
    assert alive == [True, False, False, True]
    del first
    assert weights() is None


@pytest.mark.parametrize("export_all", [
    lambda source, path: list(to_arrow_batches(source)),
    lambda source, path: export_parquet(source, path),
    lambda source, path: export_parquet(source, path, parts=2),
])  # fmt: skip
def test_pages_are_released_once_read(tmp_path, export_all, small_batches):
    source = trained(500)
    export_all(source, tmp_path / "t")
    pairs = [source.events[k : k + 2] for k in range(0, len(source.events), 2)]
    assert all(pair == [("read", *pair[0][1:]), ("release", *pair[0][1:])] for pair in pairs)
    assert source.reads[0][0] == 0
    assert [stop for _, stop in source.reads] == [start for start, _ in source.reads[1:]] + [500]


def test_an_error_comes_out_of_the_stream_as_it_is(small_batches):
    source = trained(500)
    reader = to_arrow_batches(source)
    reader.read_next_batch()

    def fail(start):
        raise DiskFullError("as it is")

    source.before_read = fail
    with pytest.raises(DiskFullError, match="as it is"):
        list(reader)


def test_duckdb_and_polars_take_the_stream(small_batches):
    source = Rows(any_bits(300, 2))
    with duckdb.connect() as connection:
        relation = connection.from_arrow(to_arrow_batches(source))
        assert relation.aggregate("sum(id), count(embedding)").fetchall() == [(44850, 300)]
    assert pl.DataFrame(to_arrow_batches(source)).shape == (300, 2)


# ---- batches


def test_batches_are_large_but_not_too_large():
    wide = to_arrow_batches(Rows(np.zeros((3000, 8192), np.float32), rows_per_shard=2048))
    assert [batch.num_rows for batch in wide] == [1024, 1024, 952]  # 32 MiB
    long = to_arrow_batches(Rows(np.zeros((200_000, 1), np.float32), rows_per_shard=1024))
    assert [batch.num_rows for batch in long] == [65_536, 65_536, 65_536, 3392]
    huge = to_arrow_batches(Rows(np.zeros((2, 9 * 2**20), np.float32), rows_per_shard=64))
    assert [batch.num_rows for batch in huge] == [1, 1]  # a batch has at least one row


@st.composite
def cases(draw):
    num_rows = draw(st.integers(1, 400))
    start = draw(st.integers(0, num_rows))
    return (
        num_rows,
        draw(st.integers(1, 5)),
        draw(st.integers(1, 150)),
        draw(st.one_of(st.none(), st.tuples(st.just(start), st.integers(start, num_rows)))),
        draw(st.lists(st.sampled_from(["exp_avg", "sum", "other"]), unique=True)),
        draw(st.integers(1, 100)),
        draw(st.integers(1, 6)),
    )


@pytest.mark.parametrize(("rows_per_shard", "max_rows"), [(10, 4), (7, 3), (3, 7), (8, 8)])
def test_every_range_of_a_small_table(monkeypatch, rows_per_shard, max_rows):
    """Shards that do not divide evenly, and ranges that begin and end at every row."""
    monkeypatch.setattr(arrow, "MAX_ROWS", max_rows)
    source = Rows(np.zeros((17, 1), np.float32), rows_per_shard=rows_per_shard)
    for start in range(18):
        for stop in range(start, 18):
            batches = list(to_arrow_batches(source, rows=(start, stop)))
            assert [id for batch in batches for id in batch["id"].to_pylist()] == list(range(start, stop))
            assert all(0 < batch.num_rows <= max_rows for batch in batches)


@settings(deadline=None)
@given(cases())
def test_batches_add_up_to_the_table(case):
    num_rows, dim, rows_per_shard, rows, columns, max_rows, workers = case
    source = trained(num_rows, dim, rows_per_shard)
    with mock.patch.object(arrow, "MAX_ROWS", max_rows):
        batches = list(to_arrow_batches(running(source, one_by_one, workers), columns=columns, rows=rows))
    start, stop = rows or (0, num_rows)
    assert_holds(pa.Table.from_batches(batches, schema(source, columns)), source, start, stop, columns)
    assert len(source.reads) == len(batches)
    for first, last in source.reads:
        assert 0 < last - first <= max_rows
        within_one = first // rows_per_shard == (last - 1) // rows_per_shard
        whole = all(row in (start, stop) or row % rows_per_shard == 0 for row in (first, last))
        assert within_one or whole


@settings(deadline=None, max_examples=30)
@given(cases(), st.integers(1, 9))
def test_parts_add_up_to_the_table(tmp_path_factory, case, parts):
    num_rows, dim, rows_per_shard, rows, columns, max_rows, workers = case
    source = trained(num_rows, dim, rows_per_shard)
    folder = tmp_path_factory.mktemp("parts") / "t"
    with mock.patch.object(arrow, "MAX_ROWS", max_rows):
        report = export_parquet(
            running(source, one_by_one, workers), folder, columns=columns, rows=rows, parts=parts
        )
    assert len(report.files) == parts
    table = pa.concat_tables([pq.read_table(file) for file in report.files])
    assert_holds(table, source, *(rows or (0, num_rows)), columns)
    groups = [pq.read_metadata(file) for file in report.files]
    assert all(meta.row_group(k).num_rows <= max_rows for meta in groups for k in range(meta.num_row_groups))


# ---- memory


def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this kernel does not report RssAnon")


class Synthetic(Rows):
    """Rows created when they are read, in memory that goes back to the kernel as soon as it is dropped.

    (malloc keeps blocks of this size, which would hide what the export itself holds.)
    """

    def __init__(self, num_rows):
        self._num_rows = num_rows
        super().__init__(np.empty((0, 64), np.float32), rows_per_shard=262_144)
        self.peak = 0

    @property
    def num_embeddings(self):
        return self._num_rows

    def read_rows(self, start, stop, columns):
        self.peak = max(self.peak, anonymous_bytes())
        rows = np.frombuffer(mmap.mmap(-1, (stop - start) * 256), np.float32).reshape(-1, 64)
        rows[:] = (np.arange(start, stop) & 1023)[:, None]
        return [rows]


EXPORTS = {
    "file": lambda source, path, run: export_parquet(running(source, run), path),
    "parts": lambda source, path, run: export_parquet(running(source, run), path, parts=2),
    "stream": lambda source, path, run: [b.num_rows for b in to_arrow_batches(running(source, run))],
}


@pytest.mark.parametrize("export_all", EXPORTS.values(), ids=EXPORTS)
def test_memory_does_not_grow_with_rows(tmp_path, run, export_all):
    peaks = []
    for num_rows in (600_000, 2_000_000):
        source = Synthetic(num_rows)
        export_all(source, tmp_path / str(num_rows), run)
        peaks.append(source.peak)
    # The table grew by 358 MB; three batches are 50 MB. How many are alive at a sample varies.
    assert peaks[1] - peaks[0] < 3 * 65_536 * 256


def test_examples():
    assert doctest.testmod(parquet).failed == 0
