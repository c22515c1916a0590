"""Paths that users give: what is local is taken as it is, everything else is refused before anything is made."""

import io
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

import shardemb
from shardemb import text
from shardemb.base.paths import local_path
from shardemb.cli import main
from shardemb.quickstart.training import Options

fsspec = pytest.importorskip("fsspec")


@dataclass
class Elsewhere(os.PathLike):
    """As the paths of cloudpathlib and universal_pathlib: a local path only once it was downloaded."""

    url: str = "s3://bucket/words.zarr"

    def __str__(self):
        return self.url

    def __fspath__(self):
        raise AssertionError("it was about to be downloaded")


@dataclass
class Bytes(os.PathLike):
    def __fspath__(self):
        return b"words.zarr"


URLS = [
    "s3://bucket/words.zarr",
    "gs://bucket/words.zarr",
    "memory://words.zarr",
    "file:///tmp/words.zarr",
    "file:/tmp/words.zarr",
    "https://host/words.zarr",
    "abfs+x://c/words.zarr",
    "S3://bucket/words.zarr",
    " s3://bucket/words.zarr",
    "simplecache::s3://bucket/words.zarr",
    "zip::file:///words.zip",
    Path("s3://bucket/words.zarr"),  # "s3:/bucket/words.zarr"
    Path("memory://words.zarr"),
    Elsewhere(),
]
OTHERS = [
    fsspec.get_mapper("memory://words.zarr"),
    fsspec.filesystem("memory"),
    io.BytesIO(),
    io.StringIO(),
    b"words.zarr",
    Bytes(),
    None,
    5,
    ["words.zarr"],
    {"path": "words.zarr"},
]
BAD = [(url, ValueError) for url in URLS] + [(other, TypeError) for other in OTHERS]
BAD += [("", ValueError), ("a\0b", ValueError)]
every_bad_path = pytest.mark.parametrize(
    ("bad", "error"), BAD, ids=lambda each: repr(each).split(" at 0x")[0][:40]
)


@pytest.mark.parametrize(
    "path",
    ["words.zarr", "a:b/c", "/s3:/b", "./s3://b", "std::vector", "C:/x", "~/x", "ü ñ", "a" * 255, "x/://"],
)
def test_local_paths_are_taken_as_they_are(path):
    assert local_path(Path(path).absolute(), "it") == Path(path).absolute()
    assert local_path(path, "it") == Path(path)


@every_bad_path
def test_a_message_says_what_was_given(bad, error):
    with pytest.raises(error, match="^the store must be ") as caught:
        local_path(bad, "the store")
    given = str(bad) if error is ValueError else type(bad).__name__
    assert repr(given)[1:-1] in str(caught.value)


def test_a_message_says_the_way_out():
    for given, way_out in {
        "s3://bucket/x": "pass a local path, and copy",
        "file:///tmp/a%20b": "pass '/tmp/a b'",
        "file://localhost/tmp/a": "pass '/tmp/a'",
        "": "pass '.' for the current folder",
    }.items():
        with pytest.raises(ValueError, match=way_out):
            local_path(given, "it")
    for given, way_out in {b"x": "os.fsdecode", io.BytesIO(): "name of a file", 5: "path of a local"}.items():
        with pytest.raises(TypeError, match=way_out):
            local_path(given, "it")


@pytest.fixture
def nothing_is_made(tmp_path, monkeypatch):
    """Work in an empty folder, which must be empty in the end."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield
    assert list(folder.iterdir()) == []


@every_bad_path
@pytest.mark.usefixtures("nothing_is_made")
def test_a_store_is_not_opened_there(bad, error):
    for mode in ("r", "r+", "a", "w", "w-"):
        with pytest.raises(error, match="^the store must be "):
            shardemb.open(bad, mode)


@pytest.fixture
def table(store):
    table = store.create_table("t", num_embeddings=10, embedding_dim=2)
    words = store.create_vocabulary("w", key_type="int64")
    words.add([1])
    store.create_table("keyed", vocabulary="w", embedding_dim=2)
    store.commit()
    return table


@every_bad_path
@pytest.mark.usefixtures("nothing_is_made")
def test_a_store_is_not_copied_or_exported_there(store, table, bad, error):
    with pytest.raises(error, match="^the copy of a store must be "):
        store.copy(bad)
    for name in ("t", "keyed"):
        for parts in (None, 2):
            with pytest.raises(error, match=f"^table '{name}': the target of an export must be "):
                store[name].export_parquet(bad, parts=parts)


@every_bad_path
@pytest.mark.usefixtures("nothing_is_made")
def test_the_quickstart_does_not_work_there(bad, error):
    with pytest.raises(error, match="^the folder of the quickstart must be "):
        Options(folder=bad)


def test_an_open_file_is_no_target(table, tmp_path):
    with (
        (tmp_path / "open").open("wb") as file,
        pytest.raises(TypeError, match="BufferedWriter.*name of a file"),
    ):
        table.export_parquet(file)
    assert (tmp_path / "open").read_bytes() == b""


@pytest.mark.parametrize(
    "command",
    [
        ["info", "URL"],
        ["info", "STORE", "--plot", "URL"],
        ["verify", "URL"],
        ["export", "URL", "t", "x.parquet"],
        ["export", "STORE", "t", "URL", "--format", "npy"],
        ["export", "STORE", "t", "URL", "--format", "projector"],
        ["reshard", "URL", "t"],
        ["resize", "URL", "t", "20"],
        ["materialize", "URL", "t"],
        ["copy", "URL", "copy.zarr"],
        ["copy", "STORE", "URL"],
        ["quickstart", "--folder", "URL", "--steps", "1"],
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("nothing_is_made")
def test_the_command_names_the_url_as_it_was_given(store, table, path, command):
    store.close()
    arguments = [{"URL": "s3://bucket/x", "STORE": str(path)}.get(each, each) for each in command]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "'s3://bucket/x'" in result.stderr
    assert "local disk" in result.stderr


@every_bad_path
def test_lines_are_not_read_there(bad, error):
    if isinstance(bad, list):
        return  # several paths
    with pytest.raises(error, match="^a text file must be "):
        list(text.read_lines(bad))
    with pytest.raises(error, match="^a text file must be "):
        list(text.read_lines([bad]))
