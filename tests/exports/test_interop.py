"""A store is plain zarr v3: zarr, tensorstore, xarray, dask and NumPy read it, and shardemb sees what zarr writes."""

import json
import warnings
import zlib
from pathlib import Path

import dask.array
import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from support.model import STATE_COLUMNS, TableModel, assert_same_bits

import shardemb
from shardemb.errors import FormatError
from shardemb.initializers import Constant, Normal, Uniform
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad

ROWS, DIM = 3000, 16
KINDS = {
    "Adam": {"optimizer": Adam(lr=0.1), "initializer": Uniform(-1, 1)},
    "Adam, zeros": {"optimizer": Adam(lr=0.1)},
    "Adagrad from 0.5": {"optimizer": Adagrad(initial_accumulator_value=0.5)},
    "RowWiseAdagrad": {"optimizer": RowWiseAdagrad(), "initializer": Normal()},
    "SGD": {"optimizer": SGD(lr=0.5), "initializer": Constant(3.0)},
    "no optimizer": {"initializer": Normal(seed=3)},
}


@pytest.fixture(params=KINDS)
def written(request, path):
    """Make a closed store with a table "t" of which every row was written; return its path and a model of the table."""
    arguments = {"num_embeddings": ROWS, "embedding_dim": DIM} | KINDS[request.param]
    model = TableModel.new("t", **arguments)
    rng = np.random.default_rng(0)
    with shardemb.open(path) as store:
        table = store.create_table("t", rows_per_shard=256, **arguments)
        everything, numbers = np.arange(ROWS), rng.normal(size=(ROWS, DIM)).astype(np.float32)
        for each in (table, model):
            if arguments.get("optimizer"):
                each.update(everything, numbers)
            else:
                each.write(everything, numbers)
            each.write([1, 2999], numbers[:2])
        store.commit()
    return path, model


def attributes(path):
    return json.loads((path / "t" / "zarr.json").read_text())["attributes"]["shardemb"]


def assert_shows(path, model, array):
    """Assert that an array read by another library holds the weights and the state columns."""
    array = np.asarray(array)
    assert_same_bits(array[:, : model.weights.shape[1]], model.weights)
    columns = attributes(path)["columns"]
    assert list(columns) == ["weight", *STATE_COLUMNS[type(model.optimizer)]]
    for name, (first, last) in columns.items():
        assert_same_bits(array[:, first:last], model.weights if name == "weight" else model.state[name])
    assert array.shape == (ROWS, max(last for _, last in columns.values()))


# ---- other readers --------------------------------------------------------------------------------------------


def test_zarr_shows_weights_and_state(written):
    path, model = written
    group = zarr.open_group(path, mode="r")
    with pytest.warns(zarr.errors.ZarrUserWarning, match=r"Object at \.shardemb is not recognized"):
        assert sorted(group) == ["t"]
    assert_shows(path, model, group["t/rows"][:])
    assert_shows(path, model, zarr.open_array(path / "t" / "rows", mode="r")[:])
    columns = group["t"].attrs["shardemb"]["columns"]
    assert columns["weight"] == [0, DIM]


def test_tensorstore_shows_weights_and_state(written):
    path, model = written
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "t" / "rows")}}
    array = tensorstore.open(spec, open=True, read=True).result()
    assert array.domain.labels == ("row", "column")
    assert_shows(path, model, array.read().result())


def test_xarray_shows_weights_and_state(written):
    path, model = written
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of xarray itself
        with xarray.open_zarr(path, group="t", consolidated=False) as dataset:
            assert dataset["rows"].dims == ("row", "column")
            assert_shows(path, model, dataset["rows"].values)
            weights = dataset["rows"].isel(column=slice(0, DIM))
            assert_same_bits(weights.isel(row=[3, 2999]).values, model.weights[[3, 2999]])


def test_dask_shows_weights_and_state(written):
    path, model = written
    array = dask.array.from_zarr(str(path), component="t/rows")
    assert max(array.chunks[0]) == attributes(path)["rows_per_shard"]
    assert len(array.chunks[0]) > 2
    assert_shows(path, model, array.compute(scheduler="sync"))


def test_a_shard_is_a_raw_row_major_file(written):
    path, model = written
    width = max(last for _, last in attributes(path)["columns"].values())
    rows_per_shard = attributes(path)["rows_per_shard"]
    files = [path / "t" / "rows" / f"c.{shard}.0" for shard in range(-(-ROWS // rows_per_shard))]
    assert {file.name for file in (path / "t" / "rows").iterdir()} == {
        "zarr.json",
        *(file.name for file in files),
    }
    assert len(files) > 2
    shards = [np.fromfile(file, "<f4").reshape(-1, width) for file in files]
    assert {len(shard) for shard in shards} == {rows_per_shard}
    assert_shows(path, model, np.concatenate(shards)[:ROWS])
    mapped = np.memmap(files[1], "<f4", mode="r").reshape(-1, width)
    assert_same_bits(mapped[7, :DIM], model.weights[rows_per_shard + 7])
    del mapped


def test_the_presence_bitmap_is_little_endian_bits(path):
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=70_000, embedding_dim=2, initializer=Normal())
        table.write([0, 3, 8, 69_999], np.ones((4, 2)))
        store.commit()
    bits = np.unpackbits(zarr.open_array(path / "t" / "present", mode="r")[:], bitorder="little")
    assert np.flatnonzero(bits).tolist() == [0, 3, 8, 69_999]
    raw = np.fromfile(path / "t" / "present" / "c.0", np.uint8)
    assert (raw[0], raw[1]) == (0b1001, 0b1)
    assert raw.size % 4096 == 0


def test_rows_never_written_read_zero_there(path):
    with shardemb.open(path) as store:
        store.create_table("t", num_embeddings=100, embedding_dim=2, initializer=Normal())
        store.commit()
    assert (zarr.open_array(path / "t" / "rows", mode="r")[:] == 0).all()


# ---- metadata -------------------------------------------------------------------------------------------------


def test_the_metadata_follows_the_format(path):
    with shardemb.open(path) as store:
        store.create_table(
            "t",
            num_embeddings=1000,
            embedding_dim=128,
            optimizer=Adam(lr=0.5),
            initializer=Uniform(-1, 1, seed=7),
            rows_per_shard=100,
        )
        store.commit()
    group = json.loads((path / "zarr.json").read_text())
    assert (group["zarr_format"], group["node_type"]) == (3, "group")
    assert sorted(group["attributes"]["shardemb"]) == ["format_version", "uuid"]
    assert group["attributes"]["shardemb"]["format_version"] == 1

    table = json.loads((path / "t" / "zarr.json").read_text())
    assert (table["zarr_format"], table["node_type"]) == (3, "group")
    found = table["attributes"]["shardemb"]
    crc = found.pop("crc32")
    assert crc == zlib.crc32(json.dumps(found, sort_keys=True).encode())
    arrays_crc = found.pop("arrays_crc32")
    described = zlib.crc32(json.dumps(found, sort_keys=True).encode())
    for name in ("checks", "present", "rows"):
        described = zlib.crc32((path / "t" / name / "zarr.json").read_bytes(), described)
    assert arrays_crc == described
    uuid = found.pop("uuid")
    assert uuid != group["attributes"]["shardemb"]["uuid"]
    assert found == {
        "format_version": 1,
        "stream": "t",
        "num_embeddings": 1000,
        "embedding_dim": 128,
        "rows_per_shard": 128,  # 100, rounded up to a multiple of 64 rows and of 4,096 bytes
        "columns": {"weight": [0, 128], "exp_avg": [128, 256], "exp_avg_sq": [256, 384]},
        "optimizer": {"name": "Adam", "lr": 0.5, "betas": [0.9, 0.999], "eps": 1e-8},
        "initializer": {"name": "Uniform", "low": -1, "high": 1, "seed": 7},
    }

    rows = json.loads((path / "t" / "rows" / "zarr.json").read_text())
    assert rows == {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [1000, 384],
        "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [128, 384]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {"shardemb": {"uuid": uuid}},
        "storage_transformers": [],
        "dimension_names": ["row", "column"],
    }
    present = json.loads((path / "t" / "present" / "zarr.json").read_text())
    assert (present["data_type"], present["shape"], present["fill_value"]) == ("uint8", [125], 0)
    assert [codec["name"] for codec in present["codecs"]] == ["bytes"]
    assert present["chunk_key_encoding"] == rows["chunk_key_encoding"]

    expected = {"zarr.json", "t/zarr.json", "t/rows/zarr.json", "t/present/zarr.json", "t/present/c.0"}
    expected |= {"t/checks/zarr.json", "t/checks/c.0"}
    expected |= {f"t/rows/c.{shard}.0" for shard in range(8)}
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert {name for name in found if not name.startswith(".shardemb/")} == expected
    assert {name for name in found if name.startswith(".shardemb/")} == {
        ".shardemb/epoch",
        ".shardemb/lock",
        ".shardemb/manifest.json",
    }
    assert {(path / f"t/rows/c.{shard}.0").stat().st_size for shard in range(8)} == {128 * 384 * 4}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, False),
        ({"initializer": Constant(0.0)}, False),
        ({"initializer": np.ones((10, 2))}, False),
        ({"optimizer": Adam()}, False),
        ({"optimizer": Adagrad()}, False),
        ({"initializer": Constant(-0.0)}, True),
        ({"initializer": Constant(1e-50)}, False),  # zero in float32
        ({"initializer": Constant(1.0)}, True),
        ({"initializer": Normal()}, True),
        ({"optimizer": Adagrad(initial_accumulator_value=0.1)}, True),
    ],
)
def test_presence_is_kept_unless_a_fresh_record_is_all_zero_bytes(store, path, arguments, expected):
    store.create_table("t", num_embeddings=10, embedding_dim=2, **arguments)
    store.commit()
    assert (path / "t" / "present").exists() == expected


@pytest.mark.parametrize("dim", [1, 3, 7, 64, 100, 1024, 1500])
@pytest.mark.parametrize("rows_per_shard", [None, 1, 65, 1000])
def test_shards_are_whole_pages_and_whole_words_of_the_bitmap(store, path, dim, rows_per_shard):
    table = store.create_table(
        "t", num_embeddings=300, embedding_dim=dim, optimizer=RowWiseAdagrad(), rows_per_shard=rows_per_shard
    )
    store.commit()
    assert table.rows_per_shard % 64 == 0
    assert table.rows_per_shard >= min(rows_per_shard or 300, 300)
    assert (path / "t" / "rows" / "c.0.0").stat().st_size % 4096 == 0


def test_a_large_tables_shards_have_64_to_512_mib(store):
    for rows, dim, least, most in [(10**7, 128, 64, 80), (10**9, 64, 64, 512), (4 * 10**9, 128, 512, 1024)]:
        table = store.create_table(f"t{rows}", num_embeddings=rows, embedding_dim=dim)
        shard = table.rows_per_shard * dim * 4
        assert least * 2**20 <= shard <= most * 2**20
        assert -(-rows // table.rows_per_shard) < 5000


# ---- what zarr writes -----------------------------------------------------------------------------------------


def open_for_writing(path, array="t/rows"):
    return zarr.open_group(path, mode="r+")[array]


def test_what_zarr_writes_into_a_closed_store_is_seen(path):
    with shardemb.open(path) as store:
        table = store.create_table(
            "t", num_embeddings=1000, embedding_dim=4, optimizer=Adam(), rows_per_shard=256
        )
        table.update([1, 2], np.ones((2, 4)))
        store.commit()
    array = open_for_writing(path)
    array[500:503, :4] = np.arange(12).reshape(3, 4)
    array[2, 0] = 9
    array[999, 4:8] = 0.5
    for mode in ("r", "a"):
        with shardemb.open(path, mode) as store:
            table = store["t"]
            assert table.lookup([499, 500, 501, 502, 503]).tolist() == [
                [0] * 4, [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [0] * 4,
            ]  # fmt: skip
            assert table.lookup(2)[0] == 9
            assert table.state("exp_avg", 999).tolist() == [0.5] * 4
            assert not store.has_changes
            if mode == "a":
                table.update([500], np.ones((1, 4)))  # training continues from there
                assert (np.abs(table.lookup(500) - np.arange(4) + 0.001) < 0.0005).all()
                store.commit()


def test_what_zarr_writes_is_seen_in_rows_whose_bit_is_set(path):
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=1000, embedding_dim=4, initializer=Constant(7.0))
        table.write([1], np.ones((1, 4)))
        store.commit()
    open_for_writing(path)[1:4] = 5
    with shardemb.open(path, "r") as store:
        # FORMAT.md: what zarr writes to a row is not seen while its presence bit is 0.
        assert store["t"].lookup([1, 2, 3])[:, 0].tolist() == [5, 7, 7]
    present = open_for_writing(path, "t/present")
    present[0] = present[0] | 0b100
    with shardemb.open(path, "r") as store:
        assert store["t"].lookup([1, 2, 3])[:, 0].tolist() == [5, 5, 7]


@pytest.mark.parametrize("mode", ["r", "r+", "a"])
def test_a_chunk_that_zarr_filled_with_zeros_in_a_closed_store_reads_as_zeros(path, mode):
    with shardemb.open(path) as store:
        table = store.create_table(
            "t", num_embeddings=1000, embedding_dim=4, optimizer=Adam(), rows_per_shard=256
        )
        table.write(range(1000), np.ones((1000, 4)))
        store.commit()
    open_for_writing(path)[256:512] = 0
    missing = path / "t" / "rows" / "c.1.0"
    assert not missing.exists()  # this is how zarr writes zeros
    with shardemb.open(path, mode) as store:
        table = store["t"]
        rows = table.lookup(range(1000))[:, 0]
        assert rows.tolist() == [1] * 256 + [0] * 256 + [1] * 488
        assert missing.exists() == (mode != "r")
        assert {each.rows for each in store.verify()} == {(256, 512)}  # shardemb has not written these
        if mode != "r":
            table.write([300], np.full((1, 4), 2.0))
            store.commit()
    if mode != "r":
        with shardemb.open(path, "r") as store:
            assert store["t"].lookup([299, 300])[:, 0].tolist() == [0, 2]
        assert open_for_writing(path)[300, 0] == 2


def test_a_missing_chunk_is_damage_if_the_store_was_not_closed_or_keeps_a_bitmap(path, in_fork):
    with shardemb.open(path) as store:
        for name, initializer in [("t", None), ("u", Constant(1.0))]:
            table = store.create_table(name, num_embeddings=1000, embedding_dim=4, initializer=initializer)
            table.write(range(1000), np.ones((1000, 4)))
        store.commit()
    kept = (path / "u/rows/c.0.0").read_bytes()
    open_for_writing(path, "u/rows")[:] = 0
    for mode in ("r", "a"):
        with pytest.raises(FormatError, match=r"'u'.*u/rows/c\.0\.0 is missing.*restore it"):
            shardemb.open(path, mode)
    (path / "u/rows/c.0.0").write_bytes(kept)
    in_fork(lambda: shardemb.open(path).last_commit and None)  # opened, and never closed
    open_for_writing(path)[:] = 0
    for mode in ("r", "a"):
        with pytest.raises(FormatError, match=r"'t'.*t/rows/c\.0\.0 is missing.*restore it"):
            shardemb.open(path, mode)


def test_attributes_and_arrays_that_zarr_adds_are_left_alone(path):
    with shardemb.open(path) as store:
        store.create_table("t", num_embeddings=10, embedding_dim=2).write([1], np.ones((1, 2)))
        store.commit()
    group = zarr.open_group(path, mode="r+")
    group.attrs["mine"] = 1
    group["t"].attrs["mine"] = 2
    group["t/rows"].attrs["mine"] = 3
    group.create_array("notes", shape=(3,), dtype="f4")[:] = 4
    with shardemb.open(path) as store:
        assert list(store) == ["t"]
        store["t"].write([2], np.full((1, 2), 2.0))
        store.rename_table("t", "u")
        store.create_table("v", num_embeddings=10, embedding_dim=2)
        store.commit()
    group = zarr.open_group(path, mode="r")
    assert [group.attrs["mine"], group["u"].attrs["mine"], group["u/rows"].attrs["mine"]] == [1, 2, 3]
    assert group["notes"][:].tolist() == [4] * 3
    assert group["u/rows"][:3, 0].tolist() == [0, 1, 2]


def test_zarr_sees_a_commit_while_the_writer_is_open(store, path):
    table = store.create_table("t", num_embeddings=1000, embedding_dim=4)
    table.write([1, 999], np.ones((2, 4)))
    store.commit()
    array = zarr.open_array(path / "t" / "rows", mode="r")
    assert array[:].sum() == 8
    table.write([500], np.ones((1, 4)))
    assert array[:].sum() == 8
    store.commit()
    assert array[:].sum() == 8
    store.checkpoint()
    assert array[:].sum() == 12


def test_a_store_can_be_moved_and_copied(path, tmp_path):
    import shutil

    with shardemb.open(path) as store:
        store.create_table("t", num_embeddings=10, embedding_dim=2, initializer=Normal(seed=1)).write(
            [1], [[1.0, 2.0]]
        )
        store.commit(step=3)
        expected = store["t"].lookup(range(10))
    shutil.copytree(path, tmp_path / "copy")
    path.rename(tmp_path / "moved")
    for place in ("copy", "moved"):
        with shardemb.open(Path(tmp_path, place)) as store:
            assert_same_bits(store["t"].lookup(range(10)), expected)
            assert store.last_commit.step == 3
