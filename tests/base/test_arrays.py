"""Arrays of every library become arrays of NumPy, and nothing that NumPy cannot hold is lost on the way."""

import subprocess
import sys

import dask.array as da
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import shardemb
from shardemb.base.arrays import as_array
from shardemb.errors import FormatError


def test_arrays_are_not_copied():
    array = np.ones((3, 2), np.float32)
    assert as_array(array, "x") is array
    for same in (np.ma.masked_array(array), array.view(np.recarray), pa.array(array.reshape(-1))):
        assert np.shares_memory(as_array(same, "x"), array)
        assert type(as_array(same, "x")) is np.ndarray


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (5, 5),
        ([], []),
        ([[1, 2], (3, 4)], [[1, 2], [3, 4]]),
        ([np.arange(2), [5, 6]], [[0, 1], [5, 6]]),
        (range(3), [0, 1, 2]),
        (np.ma.masked_array([1, 2], [False, False]), [1, 2]),
        ([np.ma.masked_array([1, 2])], [[1, 2]]),
        (pa.array([1, 2]), [1, 2]),
        (pa.chunked_array([[1], [2]]), [1, 2]),
        (pa.chunked_array([[1], [1]]).dictionary_encode(), [1, 1]),
        (pl.Series([1, 2]), [1, 2]),
        (pd.Series([1, 2]), [1, 2]),
        (pd.Series([1, 2], dtype="Int64"), [1, 2]),
        (pd.DataFrame({"a": [1], "b": [2]}), [[1, 2]]),
    ],
)
def test_what_is_an_array(given, expected):
    array = as_array(given, "x")
    assert type(array) is np.ndarray
    assert array.tolist() == expected


def test_nan_of_floats_is_a_value_and_not_missing():
    for given in (pd.Series([1.0, np.nan]), pl.Series([1.0, np.nan]), pa.array([1.0, np.nan])):
        assert np.isnan(as_array(given, "x")[1])


def test_a_mask_that_only_the_conversion_shows_is_seen():
    class Lazy:
        def __array__(self, dtype=None, copy=None):
            return np.ma.masked_array([1.0, 2.0], [False, True])

    for given in (Lazy(), da.ma.masked_array([1.0, 2.0], [False, True])):
        with pytest.raises(ValueError, match="x: 1 of 2 values are masked, the first at position 1"):
            as_array(given, "x")


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.int64()), pa.list_(pa.int64(), 2)], ids=str
)
def test_arrow_lists_are_refused_and_the_way_out_works(kind):
    array = pa.array([[1, 2], [3, 4]], kind)
    for given in (array, pa.chunked_array([array])):
        with pytest.raises(TypeError, match=r"x: an Arrow array of .*list.*np\.stack\(array.to_numpy"):
            as_array(given, "x")
        assert np.stack(given.to_numpy(zero_copy_only=False)).tolist() == [[1, 2], [3, 4]]


def test_the_way_to_a_ragged_place():
    for given, place in [
        ([[1], [1, 2]], "a list of 1 at position 0 and a list of 2 at position 1"),
        ([[1], 2], "a list of 1 at position 0 and no list at position 1"),
        (
            [[[1, 2], [3]], [[4, 5], [6, 7]]],
            r"a list of 2 at position \(0, 0\) and a list of 1 at position \(0, 1\)",
        ),
        ([np.ones(2), np.ones(3)], "a list of 2 at position 0 and a list of 3 at position 1"),
    ]:
        with pytest.raises(ValueError, match=f"x: there is {place}; .*pad them"):
            as_array(given, "x")


def test_errors_of_other_libraries_name_what_was_given():
    class Broken:
        def __array__(self, dtype=None, copy=None):
            raise self.error

    broken = Broken()
    for error in (TypeError("no"), ValueError("no"), RuntimeError("no")):
        broken.error = error
        with pytest.raises(
            TypeError, match=r"table 't': row ids: .*Broken cannot be read as a NumPy array \(no\)"
        ):
            as_array(broken, "table 't': row ids")
    for error in (OSError("disk"), MemoryError(), FormatError("damaged"), KeyboardInterrupt()):
        broken.error = error
        with pytest.raises(type(error)):
            as_array(broken, "x")


# ---- floats that NumPy does not know ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"])
def test_small_floats_become_float32(store, name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.array([[0.5, -1.0], [2.0, 0.0]]).astype(getattr(ml_dtypes, name))
    table = store.create_table(
        "t", num_embeddings=2, embedding_dim=2, initializer=values, optimizer=shardemb.optim.SGD(lr=1.0)
    )
    assert table.lookup([0, 1]).tolist() == [[0.5, -1], [2, 0]]
    table.update([0, 1], values)
    assert table.lookup([0, 1]).tolist() == [[0, 0], [0, 0]]
    table.write([0, 1], values)
    assert table.lookup([0, 1]).tolist() == [[0.5, -1], [2, 0]]


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_other_types_of_ml_dtypes_are_refused(store, name):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    with pytest.raises(TypeError, match=f"'t': rows must be float16, .*got dtype {name}"):
        store.create_table("t", num_embeddings=2, embedding_dim=2).write(
            [0], np.ones((1, 2), getattr(ml_dtypes, name))
        )


# ---- tensors ----------------------------------------------------------------------------------------------------


def test_tensors_share_their_memory():
    torch = pytest.importorskip("torch")
    tensor = torch.ones(2, 3)
    for same in (
        tensor,
        torch.nn.Parameter(tensor),
        tensor.clone().requires_grad_(),
        tensor.half(),
        tensor.double(),
    ):
        array = as_array(same, "x")
        assert array.ctypes.data == same.data_ptr()
        assert array.tolist() == [[1] * 3] * 2
    assert as_array([tensor[0], tensor[1]], "x").tolist() == [[1] * 3] * 2


def test_tensors_are_ids_gradients_rows_and_initializers(store):
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.arange(40, dtype=torch.float32).reshape(10, 4))
    optimizer = shardemb.optim.SGD(lr=1.0)
    table = store.create_table(
        "t", num_embeddings=10, embedding_dim=4, initializer=weight, optimizer=optimizer
    )
    ids = torch.tensor([[1, 2], [3, 4]])
    assert np.array_equal(table.lookup(ids), weight.detach()[ids])
    grads = torch.ones(2, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    table.update(ids, grads)
    assert np.array_equal(table.lookup(ids), weight.detach()[ids] - 1)
    table.write(ids, torch.full((2, 2, 4), 0.5, dtype=torch.bfloat16))
    assert (table.lookup(ids) == 0.5).all()
    small = store.create_table("s", num_embeddings=10, embedding_dim=4, initializer=weight.to(torch.bfloat16))
    assert np.array_equal(small.lookup(range(10)), weight.detach().to(torch.bfloat16).float())
    made = store.create_table(
        "f", num_embeddings=10, embedding_dim=4, initializer=lambda start, stop: weight[start:stop]
    )
    assert np.array_equal(made.lookup(range(10)), weight.detach())
    words = store.create_vocabulary("v", key_type="int64")
    assert words.add(torch.tensor([7, 8])).tolist() == [0, 1]


def test_tensors_that_numpy_cannot_read_are_refused_by_name(store):
    torch = pytest.importorskip("torch")
    table = store.create_table("t", num_embeddings=10, embedding_dim=4)
    elsewhere = torch.ones(1, 4, device="meta")
    with pytest.raises(
        TypeError, match=r"table 't': rows: torch.* cannot be read as a NumPy array; .*tensor\.cpu\(\)"
    ):
        table.write([1], elsewhere)
    with pytest.raises(TypeError, match="table 't': rows: torch.Tensor cannot be read as a NumPy array"):
        table.write([1], torch.ones(1, 4).to_sparse())
    layer = torch.nn.Embedding(10, 4)
    with pytest.raises(
        TypeError, match=r"initializer: Embedding\(10, 4\) is a layer, .*for example module\.weight"
    ):
        store.create_table("x", num_embeddings=10, embedding_dim=4, initializer=layer)
    for call in (lambda: table.write([1], layer), lambda: table.lookup(layer)):
        with pytest.raises(
            TypeError, match=r"'t'.* got dtype object, made from torch.*Embedding; .*module\.weight"
        ):
            call()
    assert list(store) == ["t"]


def test_nothing_imports_torch():
    code = (
        "import sys, numpy, shardemb, shardemb.base.validation as v; "
        "v.row_ids([1], 2, 't'); v.initial_rows(numpy.ones((1, 1)), (1, 1)); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
