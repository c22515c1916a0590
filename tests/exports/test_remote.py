"""Exports to URLs, partitioned ones, and those that are continued: what is there when, and what a failure leaves."""

import contextlib
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.exports import DIM, keyed_table, nothing_left, plain_table, same_bits

import shardemb
from shardemb import exports
from shardemb.exports import parquet, remote
from shardemb.storage import files

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.memory import MemoryFileSystem  # noqa: E402

URL = "memory://bucket/nightly"


@pytest.fixture
def memory():
    """An empty file system in memory, which fsspec's URLs lead to."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


def names(memory, root="/bucket/nightly"):
    return sorted(path.removeprefix(root + "/") for path in memory.store if path.startswith(root + "/"))


def manifest(memory):
    return json.loads(memory.cat("/bucket/nightly/_SUCCESS"))


def vectors_in(table):
    return table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)


@pytest.mark.parametrize("parts", [None, 1, 3])
def test_a_url_gets_parts_and_then_a_manifest(store, memory, parts):
    table, rows = plain_table(store)
    store.commit()
    report = table.export(URL, exports.Parquet(parts=parts))
    count = parts or 1
    assert names(memory) == ["_SUCCESS", *(f"part-{k:05d}.parquet" for k in range(count))]
    assert report.files == tuple(f"{URL}/part-{k:05d}.parquet" for k in range(count))
    assert (report.path, report.num_rows) == (URL, 1500)
    said = manifest(memory)
    assert (said["rows"], said["bytes"], said["commit"], said["table"]) == (1500, report.nbytes, 1, "t")
    assert (
        said["uuid"]
        == table.to_arrow_batches().schema.metadata[b"shardemb"].decode().split('"uuid": "')[1][:36]
    )
    sizes = {each["name"]: each["bytes"] for each in said["files"]}
    assert sizes == {
        name: memory.size(f"/bucket/nightly/{name}") for name in names(memory) if name != "_SUCCESS"
    }
    read = [pq.read_table(pa.BufferReader(memory.cat(f"/bucket/nightly/{each}"))) for each in sizes]
    assert same_bits(vectors_in(pa.concat_tables(read)), rows)


def test_an_earlier_export_is_replaced_and_anything_else_refused(store, memory):
    table, _ = plain_table(store)
    table.export(URL, exports.Parquet(parts=3))
    table.export(URL, exports.Parquet(parts=2))
    assert names(memory) == ["_SUCCESS", "part-00000.parquet", "part-00001.parquet"]
    memory.pipe("/bucket/nightly/thesis.tex", b"")
    with pytest.raises(FileExistsError, match=r"thesis\.tex.*choose another folder"):
        table.export(URL, "parquet")
    assert "_SUCCESS" in names(memory)
    memory.rm("/bucket/nightly/thesis.tex")
    memory.pipe("/bucket/nightly/_SUCCESS", b"")  # of Spark
    with pytest.raises(FileExistsError, match="_SUCCESS"):
        table.export(URL, "parquet")
    assert len(names(memory)) == 3


class FailingWrites(MemoryFileSystem):
    """Memory that fails at the nth write to a file."""

    protocol = "failing"
    left = 0

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("failing://", "memory://"))

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        if "w" in mode:
            original = file.write

            def write(data):
                FailingWrites.left -= 1
                if FailingWrites.left < 0:
                    raise OSError(5, "the network is gone")
                return original(data)

            file.write = write
        return file


@pytest.mark.parametrize("nth", [0, 1, 2, 5, 9])
def test_a_failure_at_any_write_leaves_no_manifest_and_no_part(store, memory, nth):
    fsspec.register_implementation("failing", FailingWrites, clobber=True)
    table, _ = plain_table(store)
    FailingWrites.left = nth
    with pytest.raises(OSError, match="the network is gone"):
        table.export(URL.replace("memory", "failing"), exports.Parquet(parts=2))
    assert names(memory) == []
    FailingWrites.left = 10**9
    table.export(URL.replace("memory", "failing"), exports.Parquet(parts=2))
    assert manifest(memory)["rows"] == 1500


def test_a_file_url_is_a_path_with_renames(store, tmp_path):
    table, rows = plain_table(store)
    table.export(f"file://{tmp_path}/with%20blank.npy")
    assert same_bits(np.load(tmp_path / "with blank.npy"), rows)
    table.export(f"file://{tmp_path}/parts", exports.Parquet(parts=2))
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [
        "part-00000.parquet",
        "part-00001.parquet",
    ]


@pytest.mark.parametrize(
    ("url", "form", "message"),
    [
        ("nowhere://bucket/x", "parquet", "cannot export to nowhere://bucket/x.*install fsspec"),
        ("memory://bucket/x.npy", None, "'npy' is written to local disks alone"),
    ],
)
def test_what_no_file_system_takes_is_refused(store, url, form, message):
    table, _ = plain_table(store, 10)
    with pytest.raises(ValueError, match=message):
        table.export(url, form)


class Unreachable(MemoryFileSystem):
    """Memory that refuses to be opened."""

    protocol = "unreachable"

    def __init__(self):
        raise OSError(111, "connection refused")


def test_a_place_that_cannot_be_reached_is_named(store):
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    table, _ = plain_table(store, 10)
    with pytest.raises(
        OSError, match="table 't': cannot export to unreachable://bucket/x: .*connection refused"
    ):
        table.export("unreachable://bucket/x", "parquet")


def test_s3(store, tmp_path):
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        with pytest.MonkeyPatch.context() as patch:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                patch.setenv(name, "testing")
            client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
            client.create_bucket(Bucket="bucket")
            table, rows = plain_table(store)
            url = f"s3://bucket/nightly?scheme=http&endpoint_override={host}:{port}&region=us-east-1"
            report = table.export(url, exports.Parquet(parts=2), columns=[])
            found = {
                each["Key"] for each in client.list_objects_v2(Bucket="bucket")["Contents"] if each["Size"]
            }
            assert found == {
                f"nightly/{name}" for name in ("_SUCCESS", "part-00000.parquet", "part-00001.parquet")
            }
            assert report.num_rows == 1500
            assert same_bits(vectors_in(pa.concat_tables(pq.read_table(file) for file in report.files)), rows)
    finally:
        server.stop()


# ---- partitions


def read_hive(folder):
    return pyarrow.dataset.dataset(folder, partitioning="hive").to_table().sort_by("id")


def test_a_folder_for_each_shard(store, tmp_path):
    table, rows = plain_table(store)
    report = table.export(tmp_path / "p", exports.Parquet(partition_by="shard"), rows=(5, 1400))
    folders = [file.parent.name for file in report.files]
    assert folders == ["shard=0", "shard=1", "shard=2"]
    assert [pq.read_metadata(file).num_rows for file in report.files] == [507, 512, 376]
    found = read_hive(tmp_path / "p")
    assert found["id"].to_pylist() == list(range(5, 1400))
    assert found["shard"].to_pylist() == [row // 512 for row in range(5, 1400)]
    assert same_bits(vectors_in(found), rows[5:1400])


def fnv(data):
    found = 0xCBF29CE484222325
    for byte in data:
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return found


@given(st.lists(st.binary(max_size=12), max_size=30), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=10))
def test_the_hash_is_that_of_the_book(keys, integers):
    assert parquet.hash_keys(pa.array(keys, pa.large_binary())).tolist() == [fnv(key) for key in keys]
    sliced = pa.array([b"xyz", *keys], pa.large_binary()).slice(1)
    assert parquet.hash_keys(sliced).tolist() == [fnv(key) for key in keys]
    wanted = [fnv(number.to_bytes(8, "little", signed=True)) for number in integers]
    assert parquet.hash_keys(pa.array(integers, pa.int64())).tolist() == wanted


@pytest.mark.parametrize("crowded", [False, True])
def test_a_folder_for_each_bucket_of_row_ids(store, tmp_path, monkeypatch, crowded):
    if crowded:
        monkeypatch.setattr(parquet, "BUFFERED_BYTES", 1000)
        monkeypatch.setattr("shardemb.exports.arrow.MAX_ROWS", 100)
    table, rows = plain_table(store)
    report = table.export(tmp_path / "p", exports.Parquet(partition_by=("hash", 4)))
    assert report.num_rows == 1500
    found = read_hive(tmp_path / "p")
    assert found["id"].to_pylist() == list(range(1500))
    assert found["bucket"].to_pylist() == [fnv(row.to_bytes(8, "little")) % 4 for row in range(1500)]
    assert same_bits(vectors_in(found), rows)
    for file in report.files:
        ids = pq.read_table(file, partitioning=None)["id"].to_pylist()
        assert ids == sorted(ids)
        assert len(ids) > 300
    groups = sum(pq.read_metadata(file).num_row_groups for file in report.files)
    assert groups > 10 if crowded else groups == 4


def test_a_folder_for_each_bucket_of_keys(store, tmp_path):
    table, keys, rows = keyed_table(store)
    table.export(tmp_path / "p", exports.Parquet(partition_by=("hash", 3)), columns=["count"])
    found = read_hive(tmp_path / "p")
    assert found["key"].to_pylist() == keys
    assert found["bucket"].to_pylist() == [fnv(key.encode()) % 3 for key in keys]
    assert same_bits(vectors_in(found), rows)


def test_partitions_are_replaced_in_one_step(store, tmp_path, monkeypatch):
    table, _ = plain_table(store)
    table.export(tmp_path / "p", exports.Parquet(partition_by="shard"))
    table.export(tmp_path / "p", exports.Parquet(partition_by=("hash", 2)))
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["bucket=0", "bucket=1"]
    monkeypatch.setattr(files, "sync", lambda *arguments: (_ for _ in ()).throw(OSError(5, "broken")))
    with pytest.raises(OSError, match="broken"):
        table.export(tmp_path / "p", exports.Parquet(partition_by="shard"))
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["bucket=0", "bucket=1"]
    assert nothing_left(tmp_path, "p")
    (tmp_path / "p" / "bucket=0" / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match="choose another name"):
        table.export(tmp_path / "p", exports.Parquet(partition_by="shard"))


# ---- exports that go on where another one stopped


@contextlib.contextmanager
def broken_at(monkeypatch, part):
    """Let the part of that name fail as it is written; yield the names of all that are begun."""
    begun = []
    original = remote.LocalFolder.sink

    @contextlib.contextmanager
    def sink(self, name):
        begun.append(name)
        with original(self, name) as found:
            yield found
            if name == part:
                raise OSError(5, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(remote.LocalFolder, "sink", sink)
        yield begun


PARTS = [f"part-{k:05d}.parquet" for k in range(4)]


@pytest.fixture
def interrupted(path, tmp_path, monkeypatch):
    """A store, and an export of it in four parts to p, of which the third has failed."""
    with shardemb.open(path, threads=1) as store:
        table, rows = plain_table(store, optimizer=shardemb.optim.SGD(lr=1.0))
        store.commit()
        with broken_at(monkeypatch, PARTS[2]), pytest.raises(OSError, match="broken"):
            table.export(tmp_path / "p", exports.Parquet(parts=4), resume=True)
        assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["_PARTS", *PARTS[:2]]
        yield table, rows, tmp_path / "p"


def test_what_is_complete_is_taken_over(interrupted, monkeypatch):
    table, rows, folder = interrupted
    before = {name: (folder / name).stat().st_mtime_ns for name in PARTS[:2]}
    seen = []
    with broken_at(monkeypatch, None) as begun:
        report = table.export(
            folder,
            exports.Parquet(parts=4),
            resume=True,
            progress=lambda done, total: seen.append((done, total)),
        )
    assert begun == PARTS[2:]
    assert seen[-1] == (1500, 1500)
    assert before == {name: (folder / name).stat().st_mtime_ns for name in PARTS[:2]}
    assert [file.name for file in report.files] == PARTS
    assert report.num_rows == 1500
    assert sorted(path.name for path in folder.iterdir()) == ["_SUCCESS", *PARTS]
    assert same_bits(vectors_in(pa.concat_tables(map(pq.read_table, report.files))), rows)
    with broken_at(monkeypatch, None) as begun:
        assert table.export(folder, exports.Parquet(parts=4), resume=True).num_rows == 1500
    assert begun == []
    table.export(folder, exports.Parquet(parts=2))  # as ever: in one step, without a manifest
    assert sorted(path.name for path in folder.iterdir()) == PARTS[:2]


def test_a_part_of_another_size_is_written_again(interrupted, monkeypatch):
    table, _, folder = interrupted
    with (folder / PARTS[0]).open("ab") as file:
        file.write(b"x")
    with broken_at(monkeypatch, None) as begun:
        table.export(folder, exports.Parquet(parts=4), resume=True)
    assert begun == [PARTS[0], *PARTS[2:]]


def update(table):
    table.update([3], np.ones((1, DIM), np.float32))


def commit(table):
    update(table)
    table.store.commit()


@pytest.mark.parametrize(
    ("change", "arguments", "parts", "why"),
    [
        (commit, {}, 4, "another commit"),
        (update, {}, 4, "another commit"),
        (None, {"rows": (0, 1400)}, 4, "another selection"),
        (None, {"where": [1, 2, 3, 7]}, 4, "another selection"),
        (None, {}, 3, "another layout"),
    ],
)
def test_of_anything_else_it_says_so_and_starts_over(
    interrupted, caplog, monkeypatch, change, arguments, parts, why
):
    table, _, folder = interrupted
    if change:
        change(table)
    with caplog.at_level(logging.WARNING, "shardemb"), broken_at(monkeypatch, None) as begun:
        report = table.export(folder, exports.Parquet(parts=parts), resume=True, **arguments)
    assert begun == PARTS[:parts]
    assert f"{why}: the export starts over" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["_SUCCESS", *PARTS[:parts]]
    found = pa.concat_tables(map(pq.read_table, report.files))
    assert same_bits(vectors_in(found), table.lookup(found["id"].to_numpy()))
    if change is update:
        table.store.commit()


def test_shards_are_continued_too_also_below_a_url(store, memory):
    fsspec.register_implementation("failing", FailingWrites, clobber=True)
    table, rows = plain_table(store)
    store.commit()
    url, form = URL.replace("memory", "failing"), exports.Parquet(partition_by="shard")
    FailingWrites.left = 10**9
    table.export(url, form)
    writes = 10**9 - FailingWrites.left
    memory.store.clear()
    FailingWrites.left = writes - 4
    with pytest.raises(OSError, match="the network is gone"):
        table.export(url, form, resume=True)
    assert "_PARTS" in names(memory)
    assert "_SUCCESS" not in names(memory)
    FailingWrites.left = 10**9
    report = table.export(url, form, resume=True)
    assert 0 < 10**9 - FailingWrites.left < writes
    assert table.export(url, form, resume=True).files == report.files
    assert names(memory)[0] == "_SUCCESS"
    assert len(names(memory)) == 4
    assert report.num_rows == 1500
    read = [
        pq.read_table(pa.BufferReader(memory.cat(f"/bucket/nightly/{name}"))) for name in names(memory)[1:]
    ]
    assert same_bits(vectors_in(pa.concat_tables(read)), rows)


@pytest.mark.parametrize(
    ("form", "resume", "message"),
    [
        (exports.Parquet(), True, "what can be continued are parts"),
        (exports.Parquet(partition_by=("hash", 2)), True, "what can be continued are parts"),
        (exports.Npy(), True, "no parts"),
        (exports.Parquet(parts=2, partition_by="shard"), False, "leave parts out"),
        (exports.Parquet(partition_by="key"), False, "partition_by must be"),
        (exports.Parquet(partition_by=("hash", 0)), False, "partition_by must be"),
        (exports.Parquet(parts=0), False, "parts must be"),
    ],
)
def test_layouts_that_cannot_be_are_refused(store, tmp_path, form, resume, message):
    table, _ = plain_table(store, 10)
    with pytest.raises(ValueError, match=message):
        table.export(tmp_path / "p", form, resume=resume)
    assert nothing_left(tmp_path)
