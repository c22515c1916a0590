"""Rows that leave a distributed store: dask arrays, Arrow, parquet."""

import numpy as np
import pytest

import shardemb
from shardemb import optim
from shardemb.initializers import Uniform

ROWS, DIM = 101, 4
OPTIONS = {
    "num_embeddings": ROWS,
    "embedding_dim": DIM,
    "initializer": Uniform(-1, 1, seed=1),
    "optimizer": optim.Adam(lr=0.1),
}


@pytest.fixture
def tables(new_store, tmp_path):
    """The same table in a distributed store and in a local one, trained."""
    with shardemb.open(tmp_path / "local.zarr") as local:
        found = [store.create_table("t", **OPTIONS) for store in (new_store(), local)]
        for table in found:
            table.update([3, 50, 3], np.ones((3, DIM)))
        yield found
        local.rollback()


def test_a_dask_array_is_computed_on_the_cluster_and_here(tables, cluster, monkeypatch):
    monkeypatch.setattr("shardemb.distributed.table.CHUNK_BYTES", 30 * 4 * DIM)
    expected = tables[1].lookup(range(ROWS))
    array = tables[0].to_dask_array()
    assert array.numblocks == (4, 1)
    np.testing.assert_array_equal(array.compute(scheduler="threads"), expected)
    np.testing.assert_array_equal(cluster.client.compute(array).result(), expected)
    np.testing.assert_array_equal(array[10:40].compute(scheduler="threads"), expected[10:40])


def test_arrow_has_global_ids_and_state(tables):
    one, other = (table.to_arrow_batches(columns=["exp_avg"], rows=(2, 60)).read_all() for table in tables)
    assert one.equals(other)


@pytest.mark.parametrize("parts", [None, 3])
def test_parquet_is_that_of_a_local_store(tables, tmp_path, parts):
    polars = pytest.importorskip("polars")
    found = []
    for number, table in enumerate(tables):
        report = table.export_parquet(tmp_path / f"{number}.parquet", columns=["exp_avg_sq"], parts=parts)
        assert report.num_rows == ROWS
        found.append(polars.concat([polars.read_parquet(each) for each in report.files]))
    assert found[0].equals(found[1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "raw"])
def test_other_dtypes(new_store, tmp_path, dtype):
    options = {"num_embeddings": 9, "embedding_dim": DIM, "dtype": dtype}
    rows = np.arange(9 * DIM).reshape(9, DIM).astype("uint8" if dtype == "raw" else "float32")
    with shardemb.open(tmp_path / "local.zarr") as local:
        found = []
        for store in (new_store(), local):
            table = store.create_table("t", **options)
            table.write(range(9), rows)
            found.append(
                (table.to_arrow_batches().read_all(), table.to_dask_array().compute(scheduler="threads"))
            )
        local.rollback()
    assert found[0][0].equals(found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_what_is_not_there_is_refused(tables, tmp_path):
    for call in (
        tables[0].to_arrow_batches,
        lambda **given: tables[0].export_parquet(tmp_path / "p", **given),
    ):
        with pytest.raises(ValueError, match="columns"):
            call(columns=["no"])
        with pytest.raises(ValueError, match="rows"):
            call(rows=(0, ROWS + 1))
