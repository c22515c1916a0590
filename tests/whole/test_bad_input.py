"""Bad input gets a clear error that names the thing, the place and the way out, and changes nothing."""

import contextlib
import json
import os
import shutil
import signal
import threading
import unicodedata
import zlib

import dask.array as da
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import zarr
from support.model import STATE_COLUMNS
from support.stores import close_quietly

import shardemb
from shardemb.errors import (
    FormatError,
    ReadOnlyError,
    RowIdError,
    ShardEmbError,
    StoreLockedError,
    StoreNotFoundError,
    TableExistsError,
    TableNotFoundError,
)
from shardemb.initializers import Constant, Normal, Uniform
from shardemb.optim import SGD, Adagrad, Adam

ONES = np.ones((2, 4), np.float32)
NAN, INF = np.nan, np.inf


@pytest.fixture
def filled(store):
    """A store with committed tables and changes that are not: "t" with Adam, "plain" without an optimizer."""
    table = store.create_table(
        "t",
        num_embeddings=300,
        embedding_dim=4,
        optimizer=Adam(lr=0.1),
        initializer=Normal(seed=1),
        rows_per_shard=64,
    )
    store.create_table("plain", num_embeddings=100, embedding_dim=4)
    table.update([1, 2], ONES)
    store.commit(step=5, metadata={"a": 1})
    table.update([2, 299], ONES)
    return store


def everything(store):
    """All that a user could see of a store, and every byte on its disk."""
    facts = [store.has_changes, store.last_commit, list(store)]
    for name, table in store.items():
        ids = np.arange(table.num_embeddings)
        facts += [
            name,
            table.name,
            table.step,
            table.optimizer,
            table.shape,
            repr(table),
            table.lookup(ids).tobytes(),
        ]
        facts += [table.state(column, ids).tobytes() for column in STATE_COLUMNS[type(table.optimizer)]]
    files = {file: file.read_bytes() for file in sorted(store.path.rglob("*")) if file.is_file()}
    return facts, files


@contextlib.contextmanager
def nothing_changes(store):
    before = everything(store)
    yield
    assert everything(store) == before


# ---- row ids --------------------------------------------------------------------------------------------------

BAD_IDS = {
    "past the end": ([0, 300], RowIdError, r"row id 300 at position 1 is past the end.*300 rows.*0 to 299"),
    "negative": ([[0, 1], [2, -1]], RowIdError, r"row id -1 at position \(1, 1\) is negative.*300 rows"),
    "one id": (300, RowIdError, r"row id 300 is past the end"),
    "minus one": (-1, RowIdError, r"row id -1 is negative"),
    "several": ([-1, 5, 400, 500], RowIdError, r"row id -1 at position 0 .*\(2 more ids are out of range"),
    "the least int64": (
        np.array([-(2**63)]),
        RowIdError,
        r"row id -9223372036854775808 at position 0 is negative",
    ),
    "the largest uint64": (
        np.array([2**64 - 1], np.uint64),
        RowIdError,
        r"row id 18446744073709551615 .*past the end",
    ),
    "int8": (np.array([-128], np.int8), RowIdError, r"row id -128"),
    "uint8 beyond": (np.array([300], np.uint16), RowIdError, r"row id 300"),
    "big endian": (np.array([0, 300], ">i4"), RowIdError, r"row id 300"),
    "beyond every integer": ([0, 10**30], RowIdError, rf"row id {10**30} at position 1 is past the end"),
    "far below": ([-(10**30)], RowIdError, r"is negative"),
    "beyond int64": ([1, 2**63], RowIdError, r"row id 9223372036854775808 at position 1"),
    "both ends": ([-1, 2**63], RowIdError, r"row id -1 at position 0 is negative"),
    "float": ([1.0, 2.0], TypeError, r"row ids must be integers, got dtype float64.*astype"),
    "one float": (1.0, TypeError, r"row ids must be integers"),
    "float32": (np.array([1, 2], np.float32), TypeError, r"got dtype float32"),
    "bool": ([True, False], TypeError, r"got dtype bool"),
    "mask": (np.zeros(300, bool), TypeError, r"got dtype bool"),
    "empty float array": (np.empty(0), TypeError, r"got dtype float64"),
    "empty bool array": (np.empty(0, bool), TypeError, r"got dtype bool"),
    "text": (["1", "2"], TypeError, r"row ids must be integers"),
    "complex": ([1j], TypeError, r"row ids must be integers"),
    "datetime": (np.array(["2020-01-01"], "M8[D]"), TypeError, r"row ids must be integers"),
    "timedelta": (np.array([1], "m8[s]"), TypeError, r"row ids must be integers"),
    "None": (None, TypeError, r"row ids must be integers"),
    "a set": ({1, 2}, TypeError, r"row ids must be integers"),
    "a generator": ((i for i in (1, 2)), TypeError, r"row ids must be integers"),
    "objects": (np.array([1, "x"], object), TypeError, r"row ids must be integers"),
    "ragged": (
        [[1], [1, 2]],
        ValueError,
        r"row ids: there is a list of 1 at position 0 and a list of 2 at position 1; .*same length.* pad them",
    ),
    "ragged inside": (
        [[[1], [2]], [[3], 4]],
        ValueError,
        r"a list of 1 at position \(1, 0\) and no list at",
    ),
    "masked": (
        np.ma.masked_array([1, 2], [False, True]),
        ValueError,
        r"row ids: 1 of 2 values are masked.* 1,",
    ),
    "masked inside": (
        np.ma.masked_array([[1, 2], [3, 4]], [[False, False], [True, True]]),
        ValueError,
        r"2 of 4 values are masked, the first at position \(1, 0\).*filled",
    ),
    "a list of masked": (
        [np.ma.masked_array([1, 2], [False, True])],
        ValueError,
        r"1 of 2 values are masked",
    ),
    "the masked constant": (np.ma.masked, ValueError, r"1 of 1 values are masked"),
    "nulls of Arrow": (pa.array([1, None, 2]), ValueError, r"row ids: 1 values are missing \(null\)"),
    "nulls of polars": (pl.Series([1, None]), ValueError, r"row ids: 1 values are missing \(null\)"),
    "nulls of pandas": (pd.array([1, None], "Int64"), ValueError, r"row ids: 1 values are missing \(null\)"),
    "Arrow lists": (pa.array([[1, 2], [3, 4]]), TypeError, r"row ids: an Arrow array of list<.*np.stack"),
    "a dict": ({1: 2}, TypeError, r"got dtype object, made from dict"),
}


def fitting(ids):
    """Gradients of the shape that ids of any kind ask for."""
    ids = list(ids) if isinstance(ids, set) else ids
    try:
        return np.ones((*np.shape(ids), 4), np.float32)
    except ValueError:
        return ONES


TAKERS = {
    "lookup": lambda store, ids: store["t"].lookup(ids),
    "lookup_unique": lambda store, ids: store["t"].lookup_unique(ids),
    "state": lambda store, ids: store["t"].state("exp_avg", ids),
    "prefetch": lambda store, ids: store["t"].prefetch(ids, for_update=True),
    "update": lambda store, ids: store["t"].update(ids, fitting(ids)),
    "write": lambda store, ids: store["t"].write(ids, fitting(ids)),
    "store.lookup": lambda store, ids: store.lookup({"plain": [1], "t": ids}),
    "store.update": lambda store, ids: store.update({"t": (ids, fitting(ids))}),
}


@pytest.mark.parametrize("call", TAKERS)
def test_bad_ids_are_refused_everywhere(filled, call):
    with nothing_changes(filled):
        for name, (ids, error, message) in BAD_IDS.items():
            with pytest.raises(error, match=message) as caught:
                TAKERS[call](filled, ids)
            assert "'t'" in str(caught.value), name
            assert isinstance(caught.value, IndexError) == (error is RowIdError)


def test_a_bad_id_leaves_out_as_it_was(filled):
    out = np.full((2, 4), 7.0, np.float32)
    with pytest.raises(RowIdError):
        filled["t"].lookup([0, 300], out=out)
    assert (out == 7).all()


def test_ids_of_one_row_tables_and_last_rows_are_exact(store):
    table = store.create_table("one", num_embeddings=1, embedding_dim=1)
    assert table.lookup([0]).tolist() == [[0]]
    with pytest.raises(RowIdError, match="1 rows?, so ids run from 0 to 0"):
        table.lookup([1])


# ---- bags -----------------------------------------------------------------------------------------------------

BAD_BAGS = {
    "not from 0": ({"offsets": [1, 2]}, ValueError, r"'t': offsets must begin with 0, .* got 1"),
    "none for ids": ({"offsets": []}, ValueError, r"offsets must begin with 0, .* got none"),
    "descending": (
        {"offsets": [0, 2, 1]},
        ValueError,
        r"offsets must ascend, got 1 at position 2 after 2; a bag",
    ),
    "negative": ({"offsets": [0, -1]}, ValueError, r"offsets must ascend, got -1 at position 1 after 0"),
    "past the ids": ({"offsets": [0, 4]}, ValueError, r"reach past the ids: 4 at position 1, .* 3 ids"),
    "another end": (
        {"offsets": [0, 2], "include_last_offset": True},
        ValueError,
        r"offsets end with 2, but with include_last_offset=True .* number of ids, which is 3",
    ),
    "floats": ({"offsets": [0.0]}, TypeError, r"offsets must be integers, got dtype float64"),
    "two dimensions": (
        {"offsets": [[0]]},
        ValueError,
        r"offsets have shape \(1, 1\), but must have one dimension",
    ),
    "no offsets": (
        {"offsets": None},
        ValueError,
        r"ids of shape \(3,\) with no offsets .* two dimensions without",
    ),
    "both": ({"ids": [[1, 2, 3]]}, ValueError, r"ids of shape \(1, 3\) with offsets are no bags"),
    "a cube": ({"ids": np.zeros((1, 1, 1), int), "offsets": None}, ValueError, r"ids of shape \(1, 1, 1\)"),
    "an unknown mode": (
        {"mode": "avg"},
        ValueError,
        r"mode must be one of 'sum', 'mean', 'max', 'sqrtn', got 'avg'",
    ),
    "no word": ({"mode": 0}, TypeError, r"mode must be one of .* got 0"),
    "weights of another shape": (
        {"weights": [1.0]},
        ValueError,
        r"weights have shape \(1,\), .* ids .* \(3,\)",
    ),
    "weights of integers": (
        {"weights": [1, 2, 3]},
        TypeError,
        r"weights must be float16, float32 or float64",
    ),
    "weights of a maximum": (
        {"weights": [1.0] * 3, "mode": "max"},
        ValueError,
        r'"max" takes no weights; leave them out, or choose "sum"',
    ),
    "padding that is no row": ({"padding_idx": 300}, ValueError, r"padding_idx 300 is no row: .* 300 rows"),
    "padding far below": ({"padding_idx": -301}, ValueError, r"padding_idx -301 is no row.* down to -300"),
    "padding that is no number": (
        {"padding_idx": "a"},
        TypeError,
        r"padding_idx must be one row id, got 'a'",
    ),
    "an id past the end": ({"ids": [1, 2, 300]}, RowIdError, r"row id 300 at position 2"),
}


@pytest.mark.parametrize("what", BAD_BAGS)
def test_bad_bags_are_refused_everywhere(filled, what):
    wrong, error, match = BAD_BAGS[what]
    named = {"ids": [1, 2, 3], "offsets": [0, 1]} | wrong
    table, grads = filled["t"], np.ones((2, 4), np.float32)
    with nothing_changes(filled):
        for call in (
            lambda: table.lookup_bag(**named),
            lambda: table.update_bag(**named, grads=grads),
            lambda: table.bag_weight_gradient(**named, grads=grads),
            lambda: filled.lookup_bag({"plain": [[1]], "t": shardemb.Bags(**named)}),
            lambda: filled.update_bag({"t": (shardemb.Bags(**named), grads)}),
        ):
            with pytest.raises(error, match=match):
                call()


def test_bad_arguments_of_bags_are_refused(filled):
    table, bags = filled["t"], ([1, 2, 3], [0, 1])
    with nothing_changes(filled):
        for grads, match in (
            (np.ones((3, 4)), r"gradients have shape \(3, 4\), .* \(2, 4\) \(\(bags, embedding_dim\)\)"),
            (np.full((2, 4), NAN), r"gradients hold nan at position \(0, 0\)"),
        ):
            with pytest.raises(ValueError, match=match):
                table.update_bag(*bags, grads)
        with pytest.raises(ValueError, match=r"'t': weights hold inf at position \(1,\)"):
            table.update_bag(*bags, ONES, weights=[1.0, INF, 1.0])
        with pytest.raises(ValueError, match="'plain' has no optimizer"):
            filled["plain"].update_bag(*bags, ONES)
        with pytest.raises(ValueError, match=r"gradients have shape \(3, 4\)"):
            table.bag_weight_gradient(*bags, np.ones((3, 4)))
        with pytest.raises(ValueError, match='"max" has no weights; choose "sum"'):
            table.bag_weight_gradient(*bags, ONES, mode="max")
        with pytest.raises(ValueError, match=r"out has shape \(1, 4\), but the result has \(2, 4\)"):
            table.lookup_bag(*bags, out=ONES[:1])
        for wrong, error, match in (
            ("ignore", ValueError, r"out_of_range must be one of 'raise', 'clip', got 'ignore'"),
            ([1.0], ValueError, r"values of out_of_range have shape \(1,\), .* \(4,\)"),
            (5, TypeError, r"values of out_of_range must be float16"),
        ):
            with pytest.raises(error, match=match):
                table.lookup_bag(*bags, out_of_range=wrong)
            with pytest.raises(error, match=match):
                table.lookup([1], out_of_range=wrong)
        with pytest.raises(TypeError, match="row ids must be integers"):
            table.lookup([1.5], out_of_range="clip")
        with pytest.raises(ValueError, match="padding_idx 300 is no row"):
            table.update([1], ONES[:1], padding_idx=300)
        with pytest.raises(ValueError, match="table 'u': padding_idx 3 is no row"):
            filled.create_table("u", num_embeddings=3, embedding_dim=2, padding_idx=3)
        assert "u" not in filled


# ---- gradients and rows ---------------------------------------------------------------------------------------

BAD_VALUES = {
    "too few": (np.ones((1, 4)), ValueError, r"have shape \(1, 4\), but the ids ask for \(2, 4\)"),
    "too many": (np.ones((3, 4)), ValueError, r"\(3, 4\), but the ids ask for \(2, 4\)"),
    "another dim": (np.ones((2, 3)), ValueError, r"\(2, 3\), but the ids ask for \(2, 4\)"),
    "transposed": (np.ones((4, 2)), ValueError, r"\(4, 2\)"),
    "flat": (np.ones(8), ValueError, r"\(8,\)"),
    "deeper": (np.ones((1, 2, 4)), ValueError, r"\(1, 2, 4\)"),
    "to be broadcast": (np.ones((1, 1)), ValueError, r"\(1, 1\)"),
    "a number": (1.0, ValueError, r"have shape \(\)"),
    "no ids' worth": ([], ValueError, r"have shape \(0,\)"),
    "integers": (np.ones((2, 4), int), TypeError, r"must be float16, float32 or float64, got dtype int64"),
    "bool": (np.ones((2, 4), bool), TypeError, r"got dtype bool"),
    "complex": (np.ones((2, 4), complex), TypeError, r"got dtype complex128"),
    "long double": (np.ones((2, 4), np.longdouble), TypeError, r"got dtype float128"),
    "text": (np.full((2, 4), "1"), TypeError, r"got dtype <U1"),
    "objects": (np.full((2, 4), None), TypeError, r"got dtype object"),
    "None": (None, TypeError, r"got dtype object"),
    "NaN": (
        [[1.0] * 4, [1, 2, NAN, 4]],
        ValueError,
        r"hold nan at position \(1, 2\).*nothing was changed.*check_finite",
    ),
    "inf": ([[INF, 1, 1, 1], [1.0] * 4], ValueError, r"hold inf at position \(0, 0\)"),
    "-inf": ([[1.0] * 4, [1, 1, 1, -INF]], ValueError, r"hold -inf at position \(1, 3\)"),
    "NaN of float16": (np.full((2, 4), NAN, np.float16), ValueError, r"hold nan at position \(0, 0\)"),
    "beyond float32": (np.full((2, 4), 1e39), ValueError, r"hold inf at position \(0, 0\), as float32"),
    "ragged": ([[1.0], [1.0, 2.0]], ValueError, r"a list of 1 at position 0 and a list of 2 at position 1"),
    "masked": (np.ma.masked_array(np.ones((2, 4)), np.eye(2, 4)), ValueError, r"2 of 8 values are masked"),
    "masked and NaN": (np.ma.masked_invalid([[NAN] * 4] * 2), ValueError, r"8 of 8 values are masked"),
    "a list of masked": (
        [np.ones(4), np.ma.masked_array(np.ones(4), [0, 0, 1, 0])],
        ValueError,
        r"1 of 4 values are masked, the first at position 2",
    ),
    "nulls": (
        pl.DataFrame({str(i): [1.0, None] for i in range(4)}),
        ValueError,
        r"4 values are missing \(null\), and would become NaN",
    ),
    "nulls of a table": (
        pa.table({str(i): [1.0, None] for i in range(4)}),
        ValueError,
        r"4 values are missing",
    ),
    "nulls of pandas": (
        pd.DataFrame({str(i): pd.array([1.0, None], "Float64") for i in range(4)}),
        ValueError,
        r"4 values are missing",
    ),
    "Arrow lists": (
        pa.array([[1.0] * 4] * 2, pa.list_(pa.float32(), 4)),
        TypeError,
        r"an Arrow array of fixed_size_list<.*np.stack",
    ),
}


@pytest.mark.parametrize(
    ("call", "what"),
    [
        pytest.param(lambda store, ids, values: store["t"].update(ids, values), "gradients", id="update"),
        pytest.param(lambda store, ids, values: store["t"].write(ids, values), "rows", id="write"),
        pytest.param(
            lambda store, ids, values: store.update({"t": (ids, values)}), "gradients", id="store.update"
        ),
    ],
)
def test_bad_values_are_refused(filled, call, what):
    with nothing_changes(filled):
        for name, (values, error, message) in BAD_VALUES.items():
            with pytest.raises(error, match=message) as caught:
                call(filled, [1, 2], values)
            assert f"table 't': {what}" in str(caught.value), name


@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e39])
def test_check_finite_false_lets_such_values_in(store, value):
    table = store.create_table("t", num_embeddings=10, embedding_dim=3, optimizer=SGD(lr=1.0))
    table.update([1], [[1.0, value, 1.0]], check_finite=False)
    store.update({"t": ([2], [[1.0, value, 1.0]])}, check_finite=False)
    table.write([3], [[1.0, value, 1.0]], check_finite=False)
    with np.errstate(over="ignore"):
        expected = np.array([1, value, 1], np.float64).astype(np.float32)
    assert np.array_equal(table.lookup([1, 2, 3]), [-expected, -expected, expected], equal_nan=True)
    assert not np.isfinite(table.lookup([1, 2, 3])[:, 1]).any()
    store.commit()


def test_large_finite_gradients_are_let_in(store):
    # Their sum is not finite, but each of them is.
    table = store.create_table("t", num_embeddings=10, embedding_dim=2, optimizer=SGD(lr=0.0))
    table.update([1, 2], np.full((2, 2), np.finfo(np.float32).max))
    assert table.step == 1


def test_a_table_without_an_optimizer_is_not_updated(filled):
    with nothing_changes(filled):
        for call in (
            lambda: filled["plain"].update([1, 2], ONES),
            lambda: filled.update({"t": ([1, 2], ONES), "plain": ([1, 2], ONES)}),
        ):
            with pytest.raises(ValueError, match=r"table 'plain' has no optimizer.*create_table.*write\(\)"):
                call()


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.empty((2, 4)), TypeError, "out must be a NumPy array of float32, got dtype float64"),
        ([[0.0] * 4] * 2, TypeError, "out must be a NumPy array of float32, got list"),
        (memoryview(bytearray(32)), TypeError, "got memoryview"),
        (np.ma.masked_array(np.empty((2, 4), np.float32)), TypeError, "got MaskedArray"),
        (np.empty((2, 5), np.float32), ValueError, r"out has shape \(2, 5\), but the result has \(2, 4\)"),
        (np.empty((1, 2, 4), np.float32), ValueError, r"out has shape \(1, 2, 4\)"),
        (np.empty(8, np.float32), ValueError, r"out has shape \(8,\)"),
        (np.empty((4, 2), np.float32).T, ValueError, "out must be C-contiguous"),
        (np.empty((2, 8), np.float32)[:, ::2], ValueError, "out must be C-contiguous"),
        (
            np.broadcast_to(np.float32(0), (2, 4)),
            ValueError,
            "out must be C-contiguous, aligned and writable",
        ),
        (np.frombuffer(bytes(32), np.float32).reshape(2, 4), ValueError, "writable"),
        (np.frombuffer(bytearray(33), np.uint8)[1:].view(np.float32).reshape(2, 4), ValueError, "aligned"),
        (np.empty((2, 4), ">f4"), TypeError, "got dtype >f4"),
    ],
)
def test_an_out_that_does_not_fit_is_refused(filled, out, error, message):
    with nothing_changes(filled), pytest.raises(error, match=message):
        filled["t"].lookup([1, 2], out=out)


@pytest.mark.parametrize("column", ["weight", "exp", "", None, 3])
def test_an_unknown_state_column_is_refused(filled, column):
    with nothing_changes(filled):
        with pytest.raises(ValueError, match=r"table 't' has no state column .*; it has exp_avg, exp_avg_sq"):
            filled["t"].state(column, [1])
        with pytest.raises(ValueError, match=r"table 'plain' has no state column .*; it has none"):
            filled["plain"].state(column, [1])


@pytest.mark.parametrize(
    "optimizer",
    [SGD(), Adagrad(), None, "Adam", Adam, 0.1],
    ids=["SGD", "Adagrad", "None", "text", "class", "number"],
)
def test_set_optimizer_keeps_the_kind(filled, optimizer):
    with nothing_changes(filled):
        with pytest.raises(ValueError, match="table 't' has the optimizer Adam"):
            filled["t"].set_optimizer(optimizer)
        with pytest.raises(ValueError, match="table 'plain' has the optimizer None"):
            filled["plain"].set_optimizer(optimizer)


def test_set_optimizer_does_not_change_what_untouched_state_is(store):
    table = store.create_table(
        "t", num_embeddings=10, embedding_dim=3, optimizer=Adagrad(initial_accumulator_value=0.5)
    )
    with pytest.raises(ValueError, match="'t'"):
        table.set_optimizer(Adagrad(initial_accumulator_value=0.25))
    assert (table.state("sum", range(10)) == 0.5).all()


# ---- tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unknown", "", "t/", "../t", "T", None, 3, ("t",)])
def test_an_unknown_table_is_named(filled, name):
    with nothing_changes(filled):
        for call in (
            lambda: filled[name],
            lambda: filled.drop_table(name),
            lambda: filled.rename_table(name, "new"),
            lambda: filled.lookup({name: [1]}),
            lambda: filled.update({"t": ([1, 2], ONES), name: ([1, 2], ONES)}),
        ):
            with pytest.raises(
                TableNotFoundError, match=r"has no table .*; its tables: 't', 'plain'"
            ) as caught:
                call()
            assert repr(name) in str(caught.value)
            assert isinstance(caught.value, KeyError)
        assert name not in filled


PATHS = [
    "a/b", "/", "/tmp/x", "../x", "..", ".", "a/../b", "a\\b", ".hidden", ".shardemb", "-option", "",
    " ", "a b", "a\n", "\0",
    "x" * 65, "ï" * 100, "na ïve", "🙂", "zarr.json", "a:b", "c*", "~",
]  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_name_that_is_a_path_or_no_name_is_refused(filled, name):
    with nothing_changes(filled):
        for call in (
            lambda: filled.create_table(name, num_embeddings=1, embedding_dim=1),
            lambda: filled.rename_table("t", name),
        ):
            with pytest.raises(ValueError, match=r"cannot be a table's name: use 1 to 64 letters, digits"):
                call()


@pytest.mark.parametrize("name", [None, 1, b"t", ["t"]])
def test_a_name_that_is_no_text_is_refused(filled, name):
    with nothing_changes(filled):
        with pytest.raises(TypeError, match="a table's name must be a str"):
            filled.create_table(name, num_embeddings=1, embedding_dim=1)
        with pytest.raises(TypeError, match="a table's name must be a str"):
            filled.rename_table("t", name)


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "_a",
        "9",
        "a.b-c_D",
        "x" * 64,
        "rows",
        "c.0.0",
        "zarr.json.tmp",
        "a.zarr",
        "naïve",
        "字" * 64,
        "كلمات",
    ],
)
def test_other_names_are_fine(store, path, name):
    store.create_table(name, num_embeddings=10, embedding_dim=2).write([1], [[1.0, 2.0]])
    store.commit()
    store.close()
    assert zarr.open_group(path, mode="r")[name]["rows"][1].tolist() == [1, 2]
    with shardemb.open(path) as again:
        assert again[name].lookup(1).tolist() == [1, 2]


def test_names_are_found_in_whatever_form_they_are_written(store, path):
    apart, together = (unicodedata.normalize(form, "Wörter") for form in ("NFD", "NFC"))
    assert apart != together
    store.create_vocabulary(apart, key_type="string").add(["a"])
    table = store.create_table(apart, vocabulary=apart, embedding_dim=4, optimizer=SGD())
    with pytest.raises(TableExistsError, match="already has a table"):
        store.create_table(together, num_embeddings=1, embedding_dim=1)
    store.commit()
    assert table.name == together
    assert list(store) == list(store.vocabularies) == [together]
    assert sorted(each for each in os.listdir(path) if "@" not in each and each[0] != ".") == [
        together,
        "zarr.json",
    ]
    for name in (apart, together):
        assert store[name] is table
        assert name in store
        assert name in store.vocabularies
        assert store.vocabularies[name].lookup(["a"]).tolist() == [0]
        store.update({name: (["a"], ONES[:1])})
        assert list(store.lookup({name: ["a"]})) == [name]
        assert store.verify([name]) == []
    store.rename_table(apart, "x")
    store.rename_table("x", apart)
    store.commit()
    store.close()
    with shardemb.open(path) as again:
        again.drop_table(apart)
        again.drop_vocabulary(apart)
        again.commit()
        assert len(again) == len(again.vocabularies) == 0


def test_a_name_that_is_taken_is_refused(filled):
    with nothing_changes(filled):
        with pytest.raises(TableExistsError, match="already has a table 't'.*drop it first"):
            filled.create_table("t", num_embeddings=1, embedding_dim=1)
        with pytest.raises(TableExistsError, match="already has a table 'plain'"):
            filled.rename_table("t", "plain")


class Layer:
    """A layer as torch has them: a callable that is no function of rows."""

    def __call__(self, *args, **kwargs):
        raise AssertionError

    def state_dict(self):
        return {}


BAD_TABLES = {
    "no rows": ({"num_embeddings": 0}, ValueError, "num_embeddings must be between 1 and"),
    "negative rows": ({"num_embeddings": -5}, ValueError, "num_embeddings must be between 1 and"),
    "float rows": ({"num_embeddings": 10.0}, TypeError, "num_embeddings must be an integer, got 10.0"),
    "bool rows": ({"num_embeddings": True}, TypeError, "num_embeddings must be an integer"),
    "text rows": ({"num_embeddings": "10"}, TypeError, "num_embeddings must be an integer"),
    "too many rows": ({"num_embeddings": 2**49}, ValueError, "num_embeddings must be between"),
    "no dim": ({"embedding_dim": 0}, ValueError, "embedding_dim must be between 1 and"),
    "float dim": ({"embedding_dim": 4.5}, TypeError, "embedding_dim must be an integer"),
    "huge dim": ({"embedding_dim": 2**20}, ValueError, "embedding_dim must be between"),
    "no rows in a shard": ({"rows_per_shard": 0}, ValueError, "rows_per_shard must be between"),
    "float rows in a shard": ({"rows_per_shard": 64.0}, TypeError, "rows_per_shard must be an integer"),
    "optimizer by name": ({"optimizer": "adam"}, TypeError, r"optimizer must be one of shardemb\.optim"),
    "optimizer class": ({"optimizer": Adam}, TypeError, r"optimizer must be one of shardemb\.optim"),
    "a callable": (
        {"initializer": lambda shape: 0},
        TypeError,
        r"must be one of shardemb\.initializers, an array, or a function f\(start, stop\)",
    ),
    "initializer class": (
        {"initializer": Uniform},
        TypeError,
        r"must be one of shardemb\.initializers, an array, or a function",
    ),
    "initializer by name": (
        {"initializer": "normal"},
        TypeError,
        r"'normal' is a str.*initializers\.Uniform",
    ),
    "initializer by config": (
        {"initializer": {"name": "uniform"}},
        TypeError,
        r"initializer: .* is a dict; pass",
    ),
    "a number": (
        {"initializer": 0.5},
        TypeError,
        r"initializer: 0\.5 is a number.*initializers\.Constant\(0\.5\)",
    ),
    "a NumPy number": (
        {"initializer": np.float32(2)},
        TypeError,
        r"is a number.*initializers\.Constant\(2\.0\)",
    ),
    "a layer": (
        {"initializer": Layer()},
        TypeError,
        r"initializer: .* is a layer, not an array.*module\.weight",
    ),
    "an array without axes": (
        {"initializer": np.array(0.5)},
        ValueError,
        r"initializer: the array has shape \(\)",
    ),
    "a masked array": (
        {"initializer": np.ma.masked_array(np.ones((10, 4)), np.eye(10, 4))},
        ValueError,
        r"initializer: the array: 4 of 40 values are masked, the first at position \(0, 0\)",
    ),
    "a list of masked arrays": (
        {"initializer": [np.ma.masked_array(np.ones(4), [0, 0, 0, 1])] * 10},
        ValueError,
        r"1 of 4 values are masked",
    ),
    "a function of masked arrays": (
        {"initializer": lambda start, stop: np.ma.masked_less(np.zeros((stop - start, 4)), 1)},
        ValueError,
        r"initializer: the values of the function for rows 0 to 9: 40 of 40 values are masked",
    ),
    "a lazy masked array": (
        {"initializer": da.from_array(np.ma.masked_array(np.ones((10, 4)), np.eye(10, 4)), chunks=5)},
        ValueError,
        r"initializer: the array's rows from 0 on: 4 of 40 values are masked",
    ),
    "Arrow lists": (
        {"initializer": pa.array([[1.0] * 4] * 10, pa.list_(pa.float32(), 4))},
        TypeError,
        r"initializer: the array: an Arrow array of fixed_size_list",
    ),
    "a ragged list": ({"initializer": [[1.0] * 4] * 9 + [[1.0]]}, ValueError, r"a list of 1 at position 9"),
    "another shape": (
        {"initializer": np.ones((4, 10))},
        ValueError,
        r"shape \(4, 10\), but the table has .*\(10, 4\)",
    ),
    "a row": ({"initializer": np.ones(4)}, ValueError, r"shape \(4,\)"),
    "an array of NaN": ({"initializer": np.full((10, 4), NAN)}, ValueError, r"hold nan at position \(0, 0\)"),
    "an array beyond float32": ({"initializer": np.full((10, 4), 1e39)}, ValueError, r"hold inf at position"),
    "an array of bool": ({"initializer": np.ones((10, 4), bool)}, TypeError, "real numbers, got dtype bool"),
    "an array of text": ({"initializer": np.full((10, 4), "x")}, TypeError, "real numbers"),
    "integers that float32 rounds": (
        {"initializer": np.full((10, 4), 2**24 + 1)},
        ValueError,
        "cannot represent",
    ),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_table_that_cannot_be_is_refused(filled, case):
    arguments, error, message = BAD_TABLES[case]
    with nothing_changes(filled), pytest.raises(error, match=message):
        filled.create_table("new", **({"num_embeddings": 10, "embedding_dim": 4} | arguments))


@pytest.mark.parametrize("rows_per_shard", [2**40, 2**48])
def test_shards_far_larger_than_the_table_are_made_or_refused_clearly(filled, rows_per_shard):
    try:
        table = filled.create_table("new", num_embeddings=10, embedding_dim=4, rows_per_shard=rows_per_shard)
    except (ValueError, ShardEmbError) as error:
        assert "rows_per_shard" in str(error)
        assert not isinstance(error, OSError)
    else:
        table.write([9], [[1.0] * 4])
        filled.commit()


def test_more_files_than_a_process_can_map_are_refused(filled):
    with (
        nothing_changes(filled),
        pytest.raises(ShardEmbError, match=r"70000 files.*at most \d+ .*larger shards"),
    ):
        filled.create_table("new", num_embeddings=64 * 70_000, embedding_dim=16, rows_per_shard=64)


def test_arguments_after_the_name_are_keywords(filled):
    with nothing_changes(filled), pytest.raises(TypeError):
        filled.create_table("new", 10, 4)


@pytest.mark.parametrize("rows", [(0, 301), (-1, 5), (5, 4), (0.0, 5), (0,), (0, 1, 2)])
def test_a_range_of_rows_that_is_none_is_refused(filled, rows, tmp_path):
    with nothing_changes(filled):
        for call in (
            lambda: filled["t"].to_arrow_batches(rows=rows),
            lambda: filled["t"].export_parquet(tmp_path / "x.parquet", rows=rows),
        ):
            with pytest.raises((ValueError, TypeError)):
                call()
    assert not (tmp_path / "x.parquet").exists()


# ---- stores and their files -----------------------------------------------------------------------------------


def make(path, initializer=None, rows=1000):
    """Make a store with one table of several shards, every row of it written."""
    with shardemb.open(path) as store:
        table = store.create_table(
            "t",
            num_embeddings=rows,
            embedding_dim=8,
            optimizer=SGD(),
            initializer=initializer,
            rows_per_shard=256,
        )
        table.write(range(rows), np.ones((rows, 8)))
        store.commit(step=3)


def edit(file, change):
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def attributes(document):
    return document["attributes"]["shardemb"]


def with_checksum(change):
    """Make a change of an object that gives it the checksum that belongs to it too."""

    def both(document):
        document.pop("crc32")
        change(document)
        document["crc32"] = zlib.crc32(json.dumps(document, sort_keys=True).encode())

    return both


def set_manifest(path, change):
    edit(path / ".shardemb" / "manifest.json", with_checksum(change))


def set_attributes(path, change):
    edit(path / "t/zarr.json", lambda document: with_checksum(change)(attributes(document)))


ADAM = {"name": "Adam", "lr": 0.1, "betas": [0.9, 0.999], "eps": 1e-8}

DAMAGE = {
    # what was done: (how, pattern of the message)
    "shard cut short": (
        lambda p: os.truncate(p / "t/rows/c.1.0", 100),
        r"'t'.*c\.1\.0 has 100 bytes instead of 8192",
    ),
    "shard emptied": (lambda p: os.truncate(p / "t/rows/c.1.0", 0), r"'t'.*c\.1\.0 has 0 bytes"),
    "shard extended": (
        lambda p: os.truncate(p / "t/rows/c.1.0", 8193),
        r"'t'.*c\.1\.0 has 8193 bytes.*restore",
    ),
    "last shard extended": (
        lambda p: os.truncate(p / "t/rows/c.3.0", 2**20),
        r"'t'.*c\.3\.0 has 1048576 bytes",
    ),
    "shard missing": (lambda p: (p / "t/rows/c.2.0").unlink(), r"'t'.*c\.2\.0 is missing.*restore"),
    "shard is a folder": (
        lambda p: ((p / "t/rows/c.2.0").unlink(), (p / "t/rows/c.2.0").mkdir()),
        r"'t'.*c\.2\.0",
    ),
    "all shards missing": (lambda p: [(p / f"t/rows/c.{n}.0").unlink() for n in range(4)], r"'t'.*4 in all"),
    "presence cut short": (lambda p: os.truncate(p / "t/present/c.0", 1), r"'t'.*present/c\.0 has 1 bytes"),
    "presence missing": (lambda p: (p / "t/present/c.0").unlink(), r"'t'.*present/c\.0 is missing"),
    "table's folder missing": (
        lambda p: (p / "t").rename(p.parent / "gone"),
        r"folder of table 't' is missing.*restore",
    ),
    "group's document missing": (lambda p: (p / "zarr.json").unlink(), r"zarr\.json"),
    "group's document is no JSON": (
        lambda p: (p / "zarr.json").write_text("{"),
        r"zarr\.json: it is not JSON",
    ),
    "group's document is a list": (
        lambda p: (p / "zarr.json").write_text("[]"),
        r"zarr\.json: it is not a JSON object",
    ),
    "group's document is binary": (
        lambda p: (p / "zarr.json").write_bytes(b"\xff\0"),
        r"zarr\.json: it is not JSON",
    ),
    "group of another store": (
        lambda p: edit(p / "zarr.json", lambda d: attributes(d).update(uuid="0" * 32)),
        r"zarr\.json.*",
    ),
    "group without attributes": (
        lambda p: edit(p / "zarr.json", lambda d: d["attributes"].clear()),
        r"zarr\.json: shardemb",
    ),
    "group of a newer version": (
        lambda p: edit(p / "zarr.json", lambda d: attributes(d).update(format_version=2)),
        r"zarr\.json: format version 2 is newer than 1.*upgrade shardemb",
    ),
    "table of a newer version": (
        lambda p: edit(p / "t/zarr.json", lambda d: attributes(d).update(format_version=99)),
        r"'t'.*format version 99 is newer than 3.*upgrade shardemb",
    ),
    "manifest of a newer version": (
        lambda p: set_manifest(p, lambda d: d.update(format_version=4)),
        r"manifest\.json: format version 4 is newer than 3.*upgrade shardemb",
    ),
    "manifest of a newer version and layout": (
        lambda p: (p / ".shardemb/manifest.json").write_text('{"format_version": 7, "what": "ever"}'),
        r"manifest\.json: format version 7 is newer than 3.*upgrade shardemb",
    ),
    "version is text": (
        lambda p: edit(p / "t/zarr.json", lambda d: attributes(d).update(format_version="1")),
        "format_version",
    ),
    "version is missing": (
        lambda p: edit(p / "t/zarr.json", lambda d: attributes(d).pop("format_version")),
        "format_version",
    ),
    "manifest cut short": (
        lambda p: os.truncate(p / ".shardemb/manifest.json", 50),
        r"manifest\.json: it is not JSON",
    ),
    "manifest empty": (
        lambda p: os.truncate(p / ".shardemb/manifest.json", 0),
        r"manifest\.json: it is not JSON",
    ),
    "manifest edited": (
        lambda p: edit(p / ".shardemb/manifest.json", lambda d: d["tables"][0].update(step=99)),
        r"manifest\.json: its checksum does not match",
    ),
    "manifest huge": (
        lambda p: (p / ".shardemb/manifest.json").write_text("[" * 20_000_000),
        r"manifest\.json",
    ),
    "manifest deeply nested": (
        lambda p: (p / ".shardemb/manifest.json").write_text("[" * 100_000),
        r"manifest\.json: it is not",
    ),
    "manifest without tables": (
        lambda p: set_manifest(p, lambda d: d.pop("tables")),
        r"manifest\.json: tables is None",
    ),
    "step negative": (
        lambda p: set_manifest(p, lambda d: d["tables"][0].update(step=-1)),
        r"manifest\.json: step is -1",
    ),
    "name is a path": (
        lambda p: set_manifest(p, lambda d: d["tables"][0].update(name="../../etc")),
        r"manifest\.json: '../../etc' cannot be a table's name",
    ),
    "uuid is a path": (
        lambda p: set_manifest(p, lambda d: d["tables"][0].update(uuid="../..")),
        r"manifest\.json: uuid",
    ),
    "two tables of one name": (
        lambda p: set_manifest(p, lambda d: d["tables"].append(d["tables"][0])),
        r"manifest\.json",
    ),
    "optimizer of the manifest unknown": (
        lambda p: set_manifest(p, lambda d: d["tables"][0].update(optimizer={"name": "Lemur"})),
        r"manifest\.json: .*'Lemur'",
    ),
    "optimizer of the manifest another": (
        lambda p: set_manifest(p, lambda d: d["tables"][0].update(optimizer=ADAM)),
        r"'t'.*",
    ),
    "table's document missing": (lambda p: (p / "t/zarr.json").unlink(), r"'t'"),
    "table's optimizer unknown": (
        lambda p: edit(p / "t/zarr.json", lambda d: attributes(d).update(optimizer={"name": "Lemur"})),
        r"'t'.*'Lemur'",
    ),
    "table's initializer is code": (
        lambda p: edit(p / "t/zarr.json", lambda d: attributes(d).update(initializer={"name": "__import__"})),
        r"'t'.*__import__",
    ),
    "table's columns moved": (
        lambda p: edit(p / "t/zarr.json", lambda d: attributes(d).update(columns={"weight": [1, 9]})),
        r"'t'.*columns are",
    ),
    "table's rows negative": (
        lambda p: edit(p / "t/zarr.json", lambda d: attributes(d).update(num_embeddings=-1)),
        r"'t'.*num_embeddings is -1",
    ),
    "table's rows huge": (
        lambda p: edit(p / "t/zarr.json", lambda d: attributes(d).update(num_embeddings=2**60)),
        r"'t'.*num_embeddings is",
    ),
    "table's rows other than its array's": (
        lambda p: set_attributes(p, lambda d: d.update(num_embeddings=999)),
        r"'t'.*array 'rows' has shape",
    ),
    "a digit of a table's initial values": (
        lambda p: edit(p / "t/zarr.json", lambda d: attributes(d)["initializer"].update(value=8)),
        r"'t'.*checksum of its attributes",
    ),
    "shards not whole pages": (
        lambda p: edit(p / "t/zarr.json", lambda d: attributes(d).update(rows_per_shard=100)),
        r"'t'.*rows_per_shard 100 is not a multiple",
    ),
    "array's document missing": (lambda p: (p / "t/rows/zarr.json").unlink(), r"'t'"),
    "array's document damaged": (lambda p: (p / "t/rows/zarr.json").write_text("{"), r"'t'.*not JSON"),
    "array compressed": (
        lambda p: edit(
            p / "t/rows/zarr.json",
            lambda d: d["codecs"].append({"name": "zstd", "configuration": {"level": 1}}),
        ),
        r"'t'.*array 'rows' has codecs",
    ),
    "array big endian": (
        lambda p: edit(
            p / "t/rows/zarr.json", lambda d: d["codecs"][0].update(configuration={"endian": "big"})
        ),
        r"'t'.*array 'rows' has codecs",
    ),
    "array float64": (
        lambda p: edit(p / "t/rows/zarr.json", lambda d: d.update(data_type="float64")),
        r"'t'.*rows",
    ),
    "array filled with ones": (
        lambda p: edit(p / "t/rows/zarr.json", lambda d: d.update(fill_value=1.0)),
        r"'t'.*fill_value",
    ),
    "array of another shape": (
        lambda p: edit(p / "t/rows/zarr.json", lambda d: d.update(shape=[9, 8])),
        r"'t'.*shape",
    ),
    "array with other keys": (
        lambda p: edit(
            p / "t/rows/zarr.json",
            lambda d: d.update(chunk_key_encoding={"name": "default", "configuration": {"separator": "/"}}),
        ),
        r"'t'.*chunk_key_encoding",
    ),
    "array of strings": (lambda p: edit(p / "t/rows/zarr.json", lambda d: d.update(shape="abc")), r"'t'.*"),
    "presence's document damaged": (lambda p: (p / "t/present/zarr.json").write_text("{"), r"'t'.*not JSON"),
    "presence of other size": (
        lambda p: edit(p / "t/present/zarr.json", lambda d: d.update(shape=[9])),
        r"'t'.*present",
    ),
}


@pytest.fixture(scope="module")
def sound_store(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "store.zarr"
    make(path, Constant(2.0))
    return path


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_in_every_mode(path, sound_store, damage):
    shutil.copytree(sound_store, path)
    change, message = DAMAGE[damage]
    change(path)

    def names():
        return sorted(str(file) for file in path.rglob("*"))

    def hashes():
        return {
            str(file): hash(file.read_bytes())
            for file in path.rglob("*")
            if file.is_file() and file.name != "lock"
        }

    before = names(), hashes()
    for mode in ("r", "r+", "a"):
        with pytest.raises(FormatError, match=message) as caught:
            shardemb.open(path, mode)
        assert isinstance(caught.value, ValueError)
        assert str(path) in str(caught.value)
    assert (names(), hashes()) == before


@pytest.mark.parametrize(
    "damage", ["uuid is a path", "manifest edited", "shard missing", "table's folder missing"]
)
def test_a_damaged_store_can_be_replaced(path, sound_store, damage, tmp_path):
    shutil.copytree(sound_store, path)
    DAMAGE[damage][0](path)
    (tmp_path / "thesis.txt").write_text("mine")
    with shardemb.open(path, "w") as store:
        assert list(store) == []
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_metadata_that_ask_for_more_shards_than_can_be_are_refused_at_once(path, sound_store):
    shutil.copytree(sound_store, path)
    rows = 2**45

    def array(document, *numbers):
        document["shape"] = list(numbers[0])
        document["chunk_grid"]["configuration"]["chunk_shape"] = list(numbers[1])

    set_attributes(path, lambda d: d.update(num_embeddings=rows, rows_per_shard=128))
    edit(path / "t/rows/zarr.json", lambda d: array(d, [rows, 8], [128, 8]))
    edit(path / "t/present/zarr.json", lambda d: array(d, [rows // 8], [4 * 2**20]))

    def alarm(number, frame):
        raise TimeoutError("still looking for 2**38 files")

    previous = signal.signal(signal.SIGALRM, alarm)
    signal.alarm(5)
    try:
        with pytest.raises(ShardEmbError, match=r"(?s)'t'|files"):
            shardemb.open(path, "r")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def test_a_damaged_table_does_not_lock_the_store_or_leave_it_open(path, sound_store):
    shutil.copytree(sound_store, path)
    kept = (path / "t/rows/c.0.0").read_bytes()
    os.truncate(path / "t/rows/c.0.0", 1)
    with pytest.raises(FormatError):
        shardemb.open(path)
    (path / "t/rows/c.0.0").write_bytes(kept)
    with shardemb.open(path) as store:
        assert (store["t"].lookup(range(1000)) == 1).all()


def test_errors_are_what_they_say_and_what_callers_expect():
    for error, builtin in [
        (RowIdError, IndexError),
        (TableNotFoundError, KeyError),
        (TableExistsError, FileExistsError),
        (StoreNotFoundError, FileNotFoundError),
        (StoreLockedError, BlockingIOError),
        (ReadOnlyError, PermissionError),
        (FormatError, ValueError),
        (shardemb.StoreClosedError, ValueError),
        (shardemb.StoreExistsError, FileExistsError),
        (shardemb.DiskFullError, OSError),
        (shardemb.PoisonedError, RuntimeError),
    ]:
        assert issubclass(error, ShardEmbError)
        assert issubclass(error, builtin)


# ---- a change that is refused while another thread is at it ---------------------------------------------------


def test_refusals_do_not_disturb_an_update_in_another_thread(filled):
    table = filled["t"]
    stop = threading.Event()
    errors = []

    def train():
        try:
            while not stop.is_set():
                table.update([1, 2], ONES * 0)
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=train)
    worker.start()
    try:
        for _ in range(200):
            with pytest.raises(RowIdError):
                table.update([300], np.ones((1, 4)))
            with pytest.raises(ValueError, match="nan"):
                table.update([1, 2], ONES * NAN)
    finally:
        stop.set()
        worker.join()
    assert errors == []
    close_quietly(filled)
