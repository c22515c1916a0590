import decimal
import fractions
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from shardemb.base import validation
from shardemb.errors import RowIdError

INTEGERS = [
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    ">i2",
    ">i4",
    ">i8",
    ">u8",
]


def row_ids(ids, num_embeddings=100):
    return validation.row_ids(ids, num_embeddings, "tokens")


def fits_kernels(array, dtype):
    flags = array.flags
    return (
        type(array) is np.ndarray
        and array.dtype == dtype
        and flags.c_contiguous
        and flags.aligned
        and flags.writeable
    )


# ---- ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(), (0,), (6,), (2, 3), (1, 2, 3), (3, 0)])
def test_ids_of_any_integer_dtype_and_any_shape(dtype, shape):
    ids = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    checked = row_ids(ids)
    assert checked.shape == shape
    assert checked.flat.tolist() == list(range(math.prod(shape)))
    assert fits_kernels(checked.flat, np.int64)


@pytest.mark.parametrize(
    ("ids", "shape"),
    [
        (5, ()),
        ([5], (1,)),
        ([[1, 2], [3, 4]], (2, 2)),
        ((1, 2), (2,)),
        (range(4), (4,)),
        ([], (0,)),
        ([[], []], (2, 0)),
    ],
)
def test_ids_as_python_has_them(ids, shape):
    checked = row_ids(ids)
    assert checked.shape == shape
    assert checked.flat.tolist() == np.array(ids).reshape(-1).tolist()
    assert fits_kernels(checked.flat, np.int64)


@pytest.mark.parametrize("make", [np.asfortranarray, lambda a: a[::-1], lambda a: a.T, lambda a: a[:, ::2]])
def test_ids_of_any_layout_come_in_c_order(make):
    ids = make(np.arange(24).reshape(4, 6))
    assert row_ids(ids).flat.tolist() == ids.reshape(-1).tolist()
    assert fits_kernels(row_ids(ids).flat, np.int64)


def test_read_only_ids_are_copied_because_kernels_are_compiled_for_writable_arrays():
    ids = np.arange(5)
    ids.flags.writeable = False
    assert fits_kernels(row_ids(ids).flat, np.int64)


def test_ids_that_fit_are_taken_without_a_copy():
    ids = np.arange(6).reshape(2, 3)
    assert np.shares_memory(row_ids(ids).flat, ids)


def test_a_subclass_of_ndarray_becomes_a_plain_one(tmp_path):
    ids = np.memmap(tmp_path / "ids", np.int64, "w+", shape=4)
    assert fits_kernels(row_ids(ids).flat, np.int64)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [1, -1],
            "row id -1 at position 1 is negative: table 'tokens' has 100 rows, so ids run from 0 to 99",
        ),
        ([100, 1], "row id 100 at position 0 is past the end"),
        (100, "row id 100 is past the end"),
        ([[1, 2], [3, 100]], r"row id 100 at position \(1, 1\) is past the end"),
        ([-5, 2, 300, 400], r"row id -5 at position 0 is negative.*\(2 more ids are out of range too\)"),
        ([1, 2**63], "row id 9223372036854775808 at position 1 is past the end"),
        ([-1, 2**63], "row id -1 at position 0 is negative"),
        ([1, 2**64], "row id 18446744073709551616 at position 1"),
        ([1, -(2**70)], "row id -1180591620717411303424 at position 1 is negative"),
        (np.array([2**64 - 1], np.uint64), "row id 18446744073709551615 at position 0 is past the end"),
        (np.array([-1], np.int8), "row id -1 at position 0 is negative"),
        (np.array([7, 200], np.uint8), "row id 200 at position 1"),
        (np.array([7, -1], ">i4"), "row id -1 at position 1"),
        (np.array([[0, 1], [-2, -1]]).T, r"row id -2 at position \(0, 1\)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_id_outside_the_table_is_named(ids, message):
    with pytest.raises(RowIdError, match=message):
        row_ids(ids)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_the_last_row_is_in_the_table_and_the_next_is_not(dtype):
    assert row_ids(np.array([0, 99], dtype)).flat.tolist() == [0, 99]
    with pytest.raises(RowIdError):
        row_ids(np.array([100], dtype))


def test_a_narrow_dtype_in_a_large_table():
    assert row_ids(np.array([127], np.int8), 2**48).flat.tolist() == [127]
    with pytest.raises(RowIdError, match="row id -128"):
        row_ids(np.array([-128], np.int8), 2**48)


@pytest.mark.parametrize(
    ("ids", "dtype"),
    [
        ([1.0], "float64"),
        ([1, 2.5], "float64"),
        (np.array([1.0], np.float32), "float32"),
        (np.array([]), "float64"),  # a list would be fine, but this array is explicitly one of floats
        ([True, False], "bool"),
        (True, "bool"),
        (np.array([1 + 0j]), "complex128"),
        (["1"], "<U1"),
        ([None], "object"),
        (np.array(["2020-01-01"], "datetime64[D]"), "datetime64"),
        (np.array([1], "timedelta64[s]"), "timedelta64"),
        (np.array([1, 2], object), "object"),
        (None, "object"),
    ],
    ids=str,
)
def test_ids_are_integers(ids, dtype):
    with pytest.raises(TypeError, match=f"table 'tokens': row ids must be integers, got dtype {dtype}"):
        row_ids(ids)


def test_ragged_ids_are_refused():
    with pytest.raises((TypeError, ValueError)):
        row_ids([[1, 2], [3]])


@given(npst.arrays(npst.integer_dtypes(), npst.array_shapes(min_dims=0, min_side=0)), st.integers(1, 2**48))
def test_ids_are_taken_exactly_if_all_lie_in_the_table(ids, num_embeddings):
    good = all(0 <= value < num_embeddings for value in ids.reshape(-1).tolist())
    if good:
        assert row_ids(ids, num_embeddings).flat.tolist() == ids.reshape(-1).tolist()
    else:
        with pytest.raises(RowIdError):
            row_ids(ids, num_embeddings)


# ---- rows -------------------------------------------------------------------------------------------------------


def rows(values, shape, check_finite=True, what="gradients"):
    return validation.rows(values, shape, what=what, table="tokens", check_finite=check_finite)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4", ">f8"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4), (2, 0, 4)])
def test_rows_of_any_float_dtype_become_float32_over_flat_ids(dtype, shape):
    values = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    got = rows(values, shape)
    assert got.shape == (math.prod(shape[:-1]), 4)
    np.testing.assert_array_equal(got, values.reshape(-1, 4).astype(np.float32))
    assert fits_kernels(got, np.float32)


def test_rows_may_be_lists():
    assert rows([[1.0, 2], [3, 4]], (2, 2)).tolist() == [[1, 2], [3, 4]]


def test_rows_that_fit_are_taken_without_a_copy():
    values = np.ones((3, 2), np.float32)
    assert np.shares_memory(rows(values, (3, 2)), values)


@pytest.mark.parametrize("make", [np.asfortranarray, lambda a: a[::-1], lambda a: a[:, ::-1]])
def test_rows_of_any_layout(make):
    values = make(np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(rows(values, (2, 3)), values)
    assert fits_kernels(rows(values, (2, 3)), np.float32)


def test_read_only_rows_are_copied():
    values = np.ones((2, 3), np.float32)
    values.flags.writeable = False
    assert fits_kernels(rows(values, (2, 3)), np.float32)


@pytest.mark.parametrize("shape", [(6,), (3, 2), (2, 3, 1), (1, 2, 3), (2, 4), (1, 3), (3,), ()])
def test_rows_have_exactly_the_shape_that_the_ids_ask_for(shape):
    """Nothing is broadcast, because a gradient of the wrong shape is a mistake."""
    with pytest.raises(
        ValueError, match=r"gradients have shape .* but the ids ask for .*embedding_dim"
    ) as caught:
        rows(np.ones(shape), (2, 3))
    assert str(shape) in str(caught.value)
    assert "(2, 3)" in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        np.ones((2, 3), int),
        [[1, 2, 3], [4, 5, 6]],
        np.ones((2, 3), bool),
        np.ones((2, 3), complex),
        [["a"] * 3] * 2,
        None,
    ],
    ids=str,
)
def test_rows_are_floats(values):
    with pytest.raises(
        TypeError, match="table 'tokens': gradients must be float16, float32 or float64, got dtype"
    ):
        rows(values, (2, 3))


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="longdouble is float64 here")
def test_rows_are_not_longdouble():
    with pytest.raises(TypeError, match="float16, float32 or float64"):
        rows(np.ones((2, 3), np.longdouble), (2, 3))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39, -1e300])
@pytest.mark.parametrize("at", [(0, 0), (1, 2)])
def test_what_is_not_finite_in_float32_is_named(value, at):
    values = np.zeros((2, 3))
    values[at] = value
    with pytest.raises(ValueError, match=r"gradients hold (nan|inf|-inf) at position") as caught:
        rows(values, (2, 3))
    assert f"at position {at}" in str(caught.value)
    assert "check_finite=False" in str(caught.value)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_not_finite_is_let_in_where_that_is_wanted(dtype):
    values = np.array([[np.nan, np.inf, -np.inf]], dtype)
    np.testing.assert_array_equal(rows(values, (1, 3), check_finite=False), values)
    with np.errstate(over="ignore"):
        assert rows(np.array([[1e300]]), (1, 1), check_finite=False)[0, 0] == np.inf


def test_large_finite_values_are_finite():
    """Even if their sum is not."""
    largest = float(np.finfo(np.float32).max)
    assert rows(np.full((2, 3), largest), (2, 3)).min() == np.float32(largest)


# ---- the array of an initializer --------------------------------------------------------------------------------


def initial_rows(values, shape):
    return validation.initial_rows(values, shape)(0, shape[0])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "int64", "uint64", ">i4"])
def test_initial_rows_of_any_real_dtype(dtype):
    got = initial_rows(np.arange(6).reshape(2, 3).astype(dtype), (2, 3))
    assert got.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert fits_kernels(got, np.float32)


def test_initial_rows_may_be_a_list():
    assert initial_rows([[1, 2]], (1, 2)).tolist() == [[1, 2]]


@pytest.mark.parametrize("value", [2**24, 2**30, -(2**40) * 3, 2**62, 0])
def test_initial_integers_that_float32_holds(value):
    assert initial_rows(np.array([[value]]), (1, 1))[0, 0] == value


@pytest.mark.parametrize("value", [2**24 + 1, 2**53 + 1, -(2**24) - 1, 2**63 - 1])
def test_initial_integers_that_float32_would_round_are_refused(value):
    with pytest.raises(ValueError, match="integers that float32 cannot represent"):
        initial_rows(np.array([[value]]), (1, 1))


def test_the_largest_uint64_is_refused():
    with pytest.raises(ValueError, match="integers that float32 cannot represent"):
        initial_rows(np.array([[2**64 - 1]], np.uint64), (1, 1))


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3), (2, 4), ()])
def test_initial_rows_have_the_shape_of_the_table(shape):
    with pytest.raises(ValueError, match="initializer: the array has shape"):
        initial_rows(np.ones(shape), (2, 3))


@pytest.mark.parametrize("values", [[["a"]], [[None]], [[True]], [[1j]], [[b"a"]]])
def test_initial_rows_are_real_numbers(values):
    with pytest.raises(TypeError, match="initializer: the array must hold real numbers"):
        initial_rows(values, (1, 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_initial_rows_are_finite(value):
    with pytest.raises(ValueError, match="initializer: the array hold"):
        initial_rows([[0.0, value]], (1, 2))


# ---- out --------------------------------------------------------------------------------------------------------


def test_out_that_fits_is_the_result():
    out = np.empty((2, 3), np.float32)
    assert validation.output(out, (2, 3)) is out


def misaligned():
    return np.zeros(25, np.uint8)[1:].view(np.float32).reshape(2, 3)


def read_only():
    out = np.empty((2, 3), np.float32)
    out.flags.writeable = False
    return out


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.empty((2, 3)), TypeError, "float32, got dtype float64"),
        (np.empty((2, 3), ">f4"), TypeError, "got dtype >f4"),
        ([[0.0] * 3] * 2, TypeError, "got list"),
        (np.empty((3, 2), np.float32), ValueError, r"out has shape \(3, 2\), but the result has \(2, 3\)"),
        (np.empty((2, 3, 1), np.float32), ValueError, "out has shape"),
        (np.empty((2, 6), np.float32)[:, ::2], ValueError, "C-contiguous"),
        (np.empty((2, 3), np.float32, order="F"), ValueError, "C-contiguous"),
        (misaligned(), ValueError, "aligned"),
        (read_only(), ValueError, "writable"),
    ],
    ids=[
        "float64",
        "big-endian",
        "list",
        "shape",
        "dimensions",
        "strided",
        "fortran",
        "misaligned",
        "read-only",
    ],
)
def test_out_is_refused_unless_the_result_can_be_written_there(out, error, message):
    with pytest.raises(error, match=message):
        validation.output(out, (2, 3))


# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, np.int8(1), np.uint64(1)])
def test_counts_are_integers_of_any_kind(value):
    assert type(validation.count(value, "n")) is int


@pytest.mark.parametrize("value", [1.0, "1", None, True, np.True_, np.float32(1), [1], fractions.Fraction(1)])
def test_what_is_no_integer_is_no_count(value):
    with pytest.raises(TypeError, match="n must be an integer, got"):
        validation.count(value, "n")


@pytest.mark.parametrize("value", [0, -1, 2**48 + 1, 2**100, 10**400, np.int64(-1), np.uint64(2**64 - 1)])
def test_counts_have_limits(value):
    with pytest.raises(ValueError, match="n must be between 1 and 281474976710656, got"):
        validation.count(value, "n")


def test_limits_of_a_count_belong_to_it():
    assert validation.count(0, "n", minimum=0) == 0
    assert validation.count(5, "n", maximum=5) == 5
    with pytest.raises(ValueError, match="between 0 and 5"):
        validation.count(6, "n", minimum=0, maximum=5)


@pytest.mark.parametrize(
    "value", [0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5), np.longdouble(0.5)]
)
def test_numbers_are_floats_of_any_kind(value):
    assert validation.number(value, "lr") == 0.5
    assert type(validation.number(value, "lr")) is float


@pytest.mark.parametrize("value", [3, np.int8(3), np.uint64(3)])
def test_integers_are_numbers_too(value):
    assert validation.number(value, "lr") == 3.0
    assert type(validation.number(value, "lr")) is float


@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, [1.0], np.array([1.0]), decimal.Decimal(1)])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="lr must be a number, got"):
        validation.number(value, "lr")


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 3.5e38, -1e300, 10**39, 10**400, np.float32(np.inf)]
)
def test_numbers_are_finite_in_float32(value):
    with pytest.raises(ValueError, match="lr must be finite in float32, got"):
        validation.number(value, "lr")


def test_a_number_may_have_a_minimum():
    assert validation.number(0, "lr", minimum=0.0) == 0.0
    assert validation.number(-1, "lr") == -1.0
    with pytest.raises(ValueError, match="lr must be at least 0, got -1e-09"):
        validation.number(-1e-9, "lr", minimum=0.0)
