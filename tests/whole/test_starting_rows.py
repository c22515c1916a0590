"""Tables that start from an array of whatever library, or from a function of ranges of rows."""

import tracemalloc

import numpy as np
import pytest
import zarr

import shardemb

ROWS, DIM = 300, 16  # a shard can have 64 rows
MIB = 2**20


@pytest.fixture
def store(tmp_path):
    with shardemb.open(tmp_path / "s.zarr") as opened:
        yield opened
        opened.rollback()


def files_of(store):
    tables = store.path / ".shardemb" / "tables"  # an empty folder
    return sorted(path for path in store.path.rglob("*") if path != tables)


def create(store, initializer, num_embeddings=ROWS, dim=DIM, **arguments):
    return store.create_table(
        "t", num_embeddings=num_embeddings, embedding_dim=dim, initializer=initializer, **arguments
    )


def values_of(num_embeddings=ROWS, dim=DIM, dtype=np.float32):
    return np.random.default_rng(1).random((num_embeddings, dim)).astype(dtype)


def of_zarr(values, path):
    array = zarr.create_array(path / "source.zarr", shape=values.shape, dtype=values.dtype, chunks=(64, DIM))
    array[:] = values
    return array


def of_memmap(values, path):
    array = np.memmap(path / "source.bin", values.dtype, "w+", shape=values.shape)
    array[:] = values
    return np.memmap(path / "source.bin", values.dtype, "r", shape=values.shape)


def of_h5py(values, path):
    h5py = pytest.importorskip("h5py")
    return h5py.File(path / "source.h5", "w").create_dataset("rows", data=values)


def of_dask(values, path):
    import dask.array as da

    return da.from_array(values, chunks=(100, -1))


def of_function(values, path):
    return lambda start, stop: values[start:stop]


def of_list(values, path):
    return values.tolist()


SOURCES = [of_zarr, of_memmap, of_h5py, of_dask, of_function, of_list]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_table_starts_with_the_rows_of_its_source(store, tmp_path, source, dtype):
    values = values_of(dtype=dtype)
    table = create(store, source(values, tmp_path), rows_per_shard=64, optimizer=shardemb.optim.Adam())
    np.testing.assert_array_equal(table.lookup(np.arange(ROWS)), values.astype(np.float32))
    assert not table.state("exp_avg", np.arange(ROWS)).any()
    assert table.initializer == shardemb.initializers.Constant(0.0)
    store.commit()


class Recorded:
    """An array that knows what was read of it, and has nothing else to offer."""

    def __init__(self, shape, dtype=np.float32):
        self.shape, self.dtype, self.read = shape, dtype, []

    def __getitem__(self, rows):
        self.read.append((rows.start or 0, rows.stop))
        return self.values(rows.start or 0, rows.stop)

    def values(self, start, stop):
        return np.repeat(np.arange(start, stop, dtype=self.dtype)[:, None], self.shape[1], axis=1)


LARGE = 100_000, 64  # 25.6 MB


def test_an_array_is_read_in_consecutive_blocks_of_some_mebibytes(store):
    source = Recorded(LARGE)
    table = create(store, source, *LARGE, rows_per_shard=40_000)
    assert source.read[0] == (0, 0)  # what type it has
    assert_consecutive(source.read[1:])
    np.testing.assert_array_equal(table.lookup([0, 65_535, 99_999])[:, 3], [0, 65_535, 99_999])


def test_a_function_is_called_for_consecutive_ranges(store):
    calls, source = [], Recorded(LARGE)

    def rows(start, stop):
        calls.append((start, stop))
        return source.values(start, stop)

    create(store, rows, *LARGE, rows_per_shard=40_000)
    assert_consecutive(calls)


def assert_consecutive(ranges):
    starts, stops = zip(*ranges, strict=True)
    assert (starts[0], stops[-1]) == (0, LARGE[0])
    assert starts[1:] == stops[:-1]
    assert max(np.subtract(stops, starts)) * 4 * LARGE[1] <= 4 * MIB


def test_memory_is_that_of_a_few_blocks(store):
    source = Recorded(LARGE, np.float64)
    tracemalloc.start()
    try:
        create(store, source, *LARGE)
        assert tracemalloc.get_traced_memory()[1] < 24 * MIB  # of 51 as float64, 26 as float32
    finally:
        tracemalloc.stop()


def spoiled(values, path):
    values[217, 3] = np.nan
    return values


def cut_short(start, stop):
    return values_of()[start:stop][:-1] if stop == ROWS else values_of()[start:stop]


def raising(start, stop):
    if start >= 128:
        raise KeyError("no such rows")
    return values_of()[start:stop]


BAD = {
    "NaN in an array": (lambda path: of_memmap(spoiled(values_of(), path), path), ValueError, r"\(217, 3\)"),
    "NaN in zarr": (
        lambda path: of_zarr(spoiled(values_of(), path), path),
        ValueError,
        r"nan at position \(217, 3\)",
    ),
    "NaN of a function": (
        lambda path: of_function(spoiled(values_of(), path), path),
        ValueError,
        r"values of the function for rows 192 to 255 hold nan at position \(217, 3\)",
    ),
    "infinite in float32": (
        lambda path: lambda a, b: np.full((b - a, DIM), 1e39),
        ValueError,
        "rows 0 to 63.* hold inf",
    ),
    "too few rows": (
        lambda path: cut_short,
        ValueError,
        r"values of the function for rows 256 to 299 have shape \(43, 16\).*\(44, 16\)",
    ),
    "a vector": (lambda path: lambda a, b: np.ones(b - a), ValueError, r"shape \(64,\)"),
    "a scalar": (lambda path: lambda a, b: 0.0, ValueError, r"shape \(\)"),
    "text": (lambda path: lambda a, b: np.full((b - a, DIM), "x"), TypeError, "rows 0 to 63.*real numbers"),
    "integers that float32 rounds": (
        lambda path: lambda a, b: np.full((b - a, DIM), 2**24 + 1),
        ValueError,
        "cannot represent, in rows 0 to 63",
    ),
    "another shape": (lambda path: of_zarr(values_of(ROWS, DIM + 1), path), ValueError, r"shape \(300, 17\)"),
    "text in zarr": (
        lambda path: zarr.zeros((ROWS, DIM), dtype="bool"),
        TypeError,
        "real numbers, got dtype bool",
    ),
    "a function of nothing": (lambda path: lambda: 0, TypeError, r"f\(start, stop\)"),
    "a class": (lambda path: Recorded, TypeError, r"f\(start, stop\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_and_leaves_nothing_behind(store, tmp_path, case):
    make, error, message = BAD[case]
    source, before = make(tmp_path), files_of(store)
    with pytest.raises(error, match=message):
        create(store, source, rows_per_shard=64)
    assert files_of(store) == before
    assert not store.has_changes
    create(store, values_of())  # the name is free


def test_what_a_function_raises_comes_out_with_the_rows(store):
    before = files_of(store)
    with pytest.raises(KeyError, match="no such rows") as caught:
        create(store, raising, rows_per_shard=64)
    assert caught.value.__notes__ == [
        "initializer: the function was asked for rows 128 to 191; no table was created"
    ]
    assert files_of(store) == before


def test_a_function_may_read_other_tables(store):
    store.create_table("old", num_embeddings=ROWS, embedding_dim=DIM, initializer=values_of())
    table = create(store, lambda start, stop: 2 * store["old"].lookup(np.arange(start, stop)))
    np.testing.assert_array_equal(table.lookup(np.arange(ROWS)), 2 * values_of())


def test_progress_is_told_of_all_rows(store):
    told = []
    create(store, values_of(), rows_per_shard=64, progress=lambda done, total: told.append((done, total)))
    assert told == [(done, ROWS) for done in (64, 128, 192, 256, 300)]


def test_progress_of_nothing_is_not_told(store):
    create(
        store, shardemb.initializers.Normal(), progress=lambda done, total: pytest.fail("there are no rows")
    )


def test_progress_may_end_the_copying(store):
    def stop(done, total):
        raise KeyboardInterrupt

    before = files_of(store)
    with pytest.raises(KeyboardInterrupt):
        create(store, values_of(), progress=stop)
    assert files_of(store) == before


def test_progress_that_is_none_is_refused(store):
    before = files_of(store)
    with pytest.raises(TypeError, match="progress must be"):
        create(store, None, progress=5)
    assert files_of(store) == before


def test_a_line_is_shown_where_stderr_is_no_terminal(store, capsys):
    create(store, values_of(), progress=True)
    assert capsys.readouterr().err.startswith("copying rows into 't': 300 rows in ")
