"""The formats of exports: how one is chosen, what it refuses, and those that are Arrow's own."""

import builtins

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
from support.exports import DIM, keyed_table, nothing_left, plain_table, same_bits

import shardemb
from shardemb import cli, exports
from shardemb.exports import arrow, formats


def vectors_in(table):
    return table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("a.parquet", exports.Parquet()),
        ("a.b/A.ARROW", exports.Arrow()),
        ("a.feather", exports.Arrow()),
        ("a.txt", exports.Word2VecText()),
        ("a.vec", exports.Word2VecText()),
        ("a.bin", exports.Word2VecBinary()),
        ("a.npy", exports.Npy()),
        ("a.safetensors", exports.Safetensors()),
        ("a.lance", exports.Lance()),
        ("s3://bucket/a.parquet?region=eu", exports.Parquet()),
    ],
)
def test_the_suffix_tells_the_format(path, form):
    assert exports.format_of(path) == form
    assert exports.format_of(path, "projector") == exports.Projector()
    assert exports.format_of(path, exports.Npy()) == exports.Npy()


@pytest.mark.parametrize("path", ["tokens", "tokens.hdf5", "a.npy/b", ".npy"])
def test_a_suffix_that_tells_nothing_is_an_error_with_all_formats(store, tmp_path, path):
    table, _ = plain_table(store, 10)
    with pytest.raises(
        ValueError, match=r"table 't': the name .* does not tell the format, as \.parquet"
    ) as raised:
        table.export(path)
    for name in formats.FORMATS:
        assert repr(name) in str(raised.value)


@pytest.mark.parametrize("given", ["csv", 3, exports.Npy])
def test_an_unknown_format_is_refused(store, tmp_path, given):
    table, _ = plain_table(store, 10)
    with pytest.raises(ValueError, match="format must be one of 'parquet'"):
        table.export(tmp_path / "t.npy", given)


def test_columns_are_for_formats_that_have_some(store, tmp_path):
    table, _ = plain_table(store, 10, optimizer=shardemb.optim.Adagrad())
    for name in ("t.npy", "t.vec", "t.safetensors"):
        with pytest.raises(ValueError, match="has vectors alone, no columns"):
            table.export(tmp_path / name, columns=["sum"])
    assert nothing_left(tmp_path)


def test_the_command_line_knows_all_formats():
    assert list(cli.FORMATS) == list(formats.FORMATS)
    assert set(formats.FORMATS.values()) == {type(exports.format_of("", name)) for name in cli.FORMATS}


@pytest.mark.parametrize("rows", [None, (100, 1300)])
def test_an_arrow_file_has_what_the_stream_has(store, tmp_path, monkeypatch, rows):
    monkeypatch.setattr(arrow, "MAX_ROWS", 300)
    table, expected = plain_table(store, optimizer=shardemb.optim.Adagrad())
    report = table.export(tmp_path / "t.arrow", rows=rows, columns=["sum"])
    with pa.memory_map(str(tmp_path / "t.arrow")) as source:
        read = pa.ipc.open_file(source).read_all()
        assert read.equals(table.to_arrow_batches(rows=rows, columns=["sum"]).read_all(), check_metadata=True)
        assert same_bits(vectors_in(read), expected[slice(*rows) if rows else slice(None)])
        assert report.num_rows == read.num_rows
        del read


def test_other_readers_of_arrow_files(store, tmp_path):
    polars = pytest.importorskip("polars")
    table, keys, rows = keyed_table(store)
    assert table.export(tmp_path / "w.feather", columns=["count"]).num_rows == 8
    assert pyarrow.feather.read_table(tmp_path / "w.feather")["key"].to_pylist() == keys
    frame = polars.read_ipc(tmp_path / "w.feather")
    assert frame["key"].to_list() == keys
    assert same_bits(frame["embedding"].to_numpy(), rows)


def test_parquet_is_that_of_export_parquet(store, tmp_path):
    table, _ = plain_table(store, optimizer=shardemb.optim.Adagrad())
    arguments = {"rows": (5, 1000), "columns": ["sum"]}
    table.export(tmp_path / "new.parquet", exports.Parquet(encoding="byte_stream_split"), **arguments)
    table.export_parquet(tmp_path / "old.parquet", encoding="byte_stream_split", **arguments)
    assert (tmp_path / "new.parquet").read_bytes() == (tmp_path / "old.parquet").read_bytes()


def test_duckdb_reads_a_selection(store, tmp_path):
    duckdb = pytest.importorskip("duckdb")
    table, _, _ = keyed_table(store)
    table.export(tmp_path / "w.parquet", where=["of", "Z"])
    found = duckdb.sql(f"SELECT key, len(embedding) FROM '{tmp_path}/w.parquet' ORDER BY id").fetchall()
    assert found == [("of", DIM), ("Z", DIM)]


def test_lance_reads_its_own(store, tmp_path):
    lance = pytest.importorskip("lance")
    table, keys, rows = keyed_table(store)
    report = table.export(tmp_path / "w.lance")
    read = lance.dataset(str(tmp_path / "w.lance")).to_table()
    assert read["key"].to_pylist() == keys
    assert same_bits(vectors_in(read), rows)
    assert report.num_rows == 8
    assert report.nbytes == sum(
        path.stat().st_size for path in (tmp_path / "w.lance").rglob("*") if path.is_file()
    )
    with pytest.raises(FileExistsError, match="that is a folder.*choose another name"):
        table.export(tmp_path / "w.lance")
    (tmp_path / "file.lance").touch()
    with pytest.raises(FileExistsError, match="a dataset needs a new name"):
        table.export(tmp_path / "file.lance")
    assert nothing_left(tmp_path, "w.lance", "file.lance")


def test_without_pylance_the_error_says_what_to_install(store, tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *arguments):
        if name == "lance":
            raise ImportError(name)
        return original(name, *arguments)

    table, _ = plain_table(store, 10)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pylance"):
        table.export(tmp_path / "t.lance")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.vec", "t.bin", "t.npy", "t.safetensors", "t"])
def test_progress_counts_the_rows_that_are_exported(store, tmp_path, name):
    table, _ = plain_table(store)
    seen = []
    form = "projector" if name == "t" else None
    arguments = {
        "where": np.arange(1500) % 3 == 0,
        "progress": lambda done, total: seen.append((done, total)),
    }
    assert table.export(tmp_path / name, form, **arguments).num_rows == 500
    assert seen[-1] == (500, 500)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_exports_of_a_reader_see_the_last_commit(path, tmp_path):
    with shardemb.open(path) as store:
        table, rows = plain_table(store)
        store.commit()
        table.write([0], np.zeros((1, DIM), np.float32))
        with shardemb.open(path, mode="r") as reader:
            reader["t"].export(tmp_path / "t.npy")
        table.export(tmp_path / "u.npy")
        store.commit()
    assert same_bits(np.load(tmp_path / "t.npy"), rows)
    assert not np.load(tmp_path / "u.npy")[0].any()
