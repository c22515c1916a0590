"""HDF5 and zarr: datasets and arrays as their libraries write them, chunk by chunk."""

import sys

import numpy as np
import pytest
import zarr
from support.sources import gathered

from shardemb.errors import SourceError
from shardemb.imports import blocks
from shardemb.imports.blocks import ReadOptions
from shardemb.imports.containers import open_hdf5, open_zarr

VALUES = np.random.default_rng(1).standard_normal((50, 7)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Of nine rows of seven values, so that small arrays have several."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 9 * 7 * 4)


@pytest.fixture
def h5py():
    return pytest.importorskip("h5py")


def rows_of(opener, path, **options):
    with opener(path, ReadOptions(**options)) as source:
        return gathered(source)


def refusal(opener, path, **options):
    with pytest.raises(SourceError) as error:
        rows_of(opener, path, **options)
    return str(error.value)


# ---- HDF5 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["<f4", ">f4", "f2", "f8", "i1", "u2"])
@pytest.mark.parametrize(
    "layout", [{}, {"chunks": (4, 7), "compression": "gzip"}, {"chunks": (50, 2)}], ids=str
)
def test_datasets_are_read(tmp_path, h5py, kind, layout):
    array = np.abs(VALUES * 8).astype(kind)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("group/vectors", data=array, **layout)
        file["norms"] = array[0]
        file["words"] = np.array([[b"a", b"b"]])
    with open_hdf5(tmp_path / "a.h5", ReadOptions()) as source:
        assert (source.format, source.dtype) == ("hdf5", "float16" if kind == "f2" else "float32")
        assert np.array_equal(gathered(source), array.astype("f4"))
        assert np.array_equal(source.read(5, 7), array[5:7].astype("f4"))


def test_a_dataset_is_chosen(tmp_path, h5py):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a/x"], file["b"], file["words"], file["ids"] = (
            VALUES,
            VALUES * 2,
            [[b"a"]],
            np.ones((2, 2), "i8"),
        )
        file["p.0"], file["p.1"] = VALUES[:20], VALUES[20:]
        file["away"] = h5py.ExternalLink("other.h5", "/x")
    path = tmp_path / "a.h5"
    assert "a/x (50, 7), b (50, 7)" in refusal(open_hdf5, path)
    for member, expected in {"a/x": VALUES, "/a/x": VALUES, "b": VALUES * 2, "p.*": VALUES}.items():
        assert np.array_equal(rows_of(open_hdf5, path, member=member), expected)
    assert "has no 'away'" in refusal(open_hdf5, path, member="away")
    assert "int64" in refusal(open_hdf5, path, member="ids")
    assert "not numbers" in refusal(open_hdf5, path, member="words")


def test_damaged_files_are_refused(tmp_path, h5py):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("w", data=VALUES, chunks=(50, 7), compression="gzip")
        at = file["w"].id.get_chunk_info(0).byte_offset
    data = bytearray((tmp_path / "a.h5").read_bytes())
    (tmp_path / "short.h5").write_bytes(data[:100])
    assert "h5py cannot read it" in refusal(open_hdf5, tmp_path / "short.h5")
    data[at : at + 20] = b"\0" * 20
    (tmp_path / "b.h5").write_bytes(data)
    assert "rows 0 to 8: cannot be read" in refusal(open_hdf5, tmp_path / "b.h5")


def test_without_h5py_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match="pip install h5py"):
        open_hdf5(tmp_path / "a.h5", ReadOptions())


# ---- zarr -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", ["<f4", ">f4", "f2", "f8", "i1", "u2"])
def test_arrays_are_read(tmp_path, kind, zarr_format):
    array = np.abs(VALUES * 8).astype(kind)
    zarr.create_array(tmp_path / "a.zarr", data=array, chunks=(4, 3), zarr_format=zarr_format)
    with open_zarr(tmp_path / "a.zarr", ReadOptions()) as source:
        assert (source.format, source.dtype) == ("zarr", "float16" if kind == "f2" else "float32")
        assert [block.first for block in source.blocks()] == list(range(0, 50, 8))
        assert np.array_equal(gathered(source), array.astype("f4"))
        assert np.array_equal(source.read(5, 7), array[5:7].astype("f4"))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_of_a_group_is_chosen(tmp_path, zarr_format):
    group = zarr.create_group(tmp_path / "g.zarr", zarr_format=zarr_format)
    for name, array in {"norms": VALUES[0], "a/x": VALUES, "ids": np.ones((2, 2), "i8")}.items():
        group.create_array(name, data=array)
    assert np.array_equal(rows_of(open_zarr, tmp_path / "g.zarr", limit=10), VALUES[:10])
    group.create_array("b", data=VALUES * 2)
    assert "a/x (50, 7)" in refusal(open_zarr, tmp_path / "g.zarr")
    for member, expected in {"a/x": VALUES, "/b": VALUES * 2}.items():
        assert np.array_equal(rows_of(open_zarr, tmp_path / "g.zarr", member=member), expected)
    assert "has no 'c'" in refusal(open_zarr, tmp_path / "g.zarr", member="c")
    assert "int64" in refusal(open_zarr, tmp_path / "g.zarr", member="ids")
    assert "has no member" in refusal(open_zarr, tmp_path / "g.zarr" / "b", member="b")


def test_what_is_no_array_of_rows_is_refused(tmp_path):
    zarr.create_array(tmp_path / "cube.zarr", data=np.ones((2, 2, 2), "f4"))
    assert "no arrays have two dimensions" in refusal(open_zarr, tmp_path / "cube.zarr")
    zarr.create_array(tmp_path / "a.zarr", data=VALUES, chunks=(50, 7))
    (tmp_path / "a.zarr" / "c" / "0" / "0").write_bytes(b"no chunk")
    assert "rows 0 to 8: cannot be read" in refusal(open_zarr, tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "zarr.json").write_text("{")
    assert "zarr cannot read it" in refusal(open_zarr, tmp_path / "a.zarr")
    (tmp_path / "file").write_text("")
    assert "no folder" in refusal(open_zarr, tmp_path / "file")
    assert "columns" in refusal(open_zarr, tmp_path / "cube.zarr", columns=("x",))
    with pytest.raises(FileNotFoundError):
        open_zarr(tmp_path / "none.zarr", ReadOptions())


def test_a_large_float64_is_refused_with_its_row(tmp_path):
    array = VALUES.astype("f8")
    array[30, 2] = 1e39
    zarr.create_array(tmp_path / "a.zarr", data=array)
    assert "row 30" in refusal(open_zarr, tmp_path / "a.zarr")
