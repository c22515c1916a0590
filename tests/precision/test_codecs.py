"""Every bit pattern and every boundary of rounding, against the types of the package ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support import encodings

from shardemb.dtypes import BlockScaled, Plain, ScaledInt8
from shardemb.precision import coded_rows

FLOATS = {name: kind for name, kind in encodings.FLOATS.items() if name != "float32"}
each_float = pytest.mark.parametrize("name", FLOATS)


def weight_bytes(dtype, dim):
    precision_columns = dtype.columns(dim)
    sizes = {"float32": 4, "float16": 2, "bfloat16": 2}
    return sum(sizes.get(kind, 1) * count for kind, count in precision_columns.values())


def decode(dtype, data, dim, wanted="float32"):
    """Decode rows of bytes."""
    data = np.ascontiguousarray(data).view(np.uint8).reshape(-1, weight_bytes(dtype, dim))
    kind = np.dtype(np.float32) if wanted == "float32" else FLOATS[wanted]
    out = np.empty((len(data), dim), kind)
    kernel = coded_rows.gather(dtype, wanted)
    places = np.arange(len(data))
    kernel(data, places, 0, data.shape[1], dim, dtype.block_size, out.view(np.uint8), 0)
    return out


def encode(dtype, values, rows=None, key=1, step=0):
    """Encode rows of float32; stochastically if the ids of rows are given."""
    values = np.ascontiguousarray(np.atleast_2d(values), np.float32)
    out = np.empty((len(values), weight_bytes(dtype, values.shape[1])), np.uint8)
    kernel = coded_rows.encode_rows(dtype, drawn=rows is not None)
    ids = np.zeros(len(values), np.int64) if rows is None else np.asarray(rows, np.int64)
    kernel(values, out, ids, np.uint64(key), step, dtype.block_size, 0, len(values))
    return out


def every_code(kind):
    return np.arange(2 ** (8 * kind.itemsize), dtype=f"u{kind.itemsize}").view(kind)


def boundaries(kind):
    """All finite numbers of a type, what lies half way between two of them, and the neighbours of both in float32."""
    values = every_code(kind).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    with np.errstate(over="ignore"):
        past = values[-1] + (values[-1] - values[-2]) * np.array(
            [0.5, 1], np.float32
        )  # where it becomes infinite
    values = np.concatenate([values, past[np.isfinite(past)], -past[np.isfinite(past)]])
    values.sort()
    halves = (values[:-1].astype(np.float64) / 2 + values[1:].astype(np.float64) / 2).astype(np.float32)
    some = np.concatenate([values, halves])
    with np.errstate(over="ignore"):
        near = [np.nextafter(some, np.float32(np.inf)), np.nextafter(some, np.float32(-np.inf))]
    extremes = np.array(
        [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38], np.float32
    )
    return np.concatenate([some, *near, extremes])


def assert_same(found, expected):
    """Compare the bits of numbers; any NaN will do for another of that sign."""
    bits = f"u{expected.dtype.itemsize}"
    nan = np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(found.astype(np.float32)), nan)
    np.testing.assert_array_equal(found.view(bits)[~nan], expected.view(bits)[~nan])


@each_float
def test_every_code_is_the_number_that_ml_dtypes_has(name):
    codes = every_code(FLOATS[name])
    assert_same(decode(Plain(name), codes, codes.size)[0], codes.astype(np.float32))


@each_float
def test_every_boundary_of_rounding_is_that_of_ml_dtypes(name):
    kind = FLOATS[name]
    values = boundaries(kind)
    rng = np.random.default_rng(0)
    some = np.concatenate([values, rng.integers(0, 2**32, 100_000, np.uint32).view(np.float32)])
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same(encode(Plain(name), some)[0].view(kind), some.astype(kind))


@each_float
@pytest.mark.parametrize("dim", [1, 2, 7, 16, 33])
def test_rows_of_any_width(name, dim):
    values = np.random.default_rng(dim).normal(size=(5, dim)).astype(np.float32)
    data = encode(Plain(name), values)
    assert_same(data.view(FLOATS[name]), values.astype(FLOATS[name]))
    assert_same(decode(Plain(name), data, dim), values.astype(FLOATS[name]).astype(np.float32))


def test_from_one_type_to_another():
    values = boundaries(FLOATS["float8_e4m3fn"])
    with np.errstate(over="ignore"):
        stored = values.astype(np.float16)
    found = decode(Plain("float16"), stored, values.size, "bfloat16")[0]
    assert_same(found, stored.astype(np.float32).astype(ml_dtypes.bfloat16))


# ---- rounded stochastically -------------------------------------------------------------------------------------


@each_float
def test_drawn_numbers_are_a_neighbour_and_on_average_the_number(name):
    """The mean of `n` draws between neighbours one apart deviates by more than 5 / sqrt(4 n) once in two million."""
    kind, draws = FLOATS[name], 4096
    top = float(ml_dtypes.finfo(kind).max)
    smallest = float(ml_dtypes.finfo(kind).smallest_subnormal)
    with np.errstate(over="ignore", under="ignore"):
        values = np.array(
            [1.0, 1.01, -1.3, 0.3, 1.5 * smallest, smallest / 8, 0.99 * top, -top, 0.0], np.float32
        )
    data = encode(Plain(name), np.tile(values, (draws, 1)), np.arange(draws)).view(kind).astype(np.float64)
    lower, upper = neighbours(values, kind)
    assert np.isin(data, [lower, upper]).all() or ((data == lower) | (data == upper)).all()
    share = (data.mean(axis=0) - lower) / np.where(upper > lower, upper - lower, 1)
    expected = (values - lower) / np.where(upper > lower, upper - lower, 1)
    assert np.abs(share - expected).max() <= 5 / np.sqrt(4 * draws)


def neighbours(values, kind):
    """The largest number of a type that is not above, and the smallest that is not below."""
    with np.errstate(invalid="ignore"):
        every = every_code(kind).astype(np.float64)
    every = np.unique(every[np.isfinite(every)])
    lower = every[np.searchsorted(every, values.astype(np.float64), side="right") - 1]
    return lower, every[np.searchsorted(every, values.astype(np.float64), side="left")]


@each_float
def test_a_number_of_the_type_is_never_changed_and_too_large_ones_are_rounded_to_nearest(name):
    kind = FLOATS[name]
    codes = every_code(kind)
    for row in range(3):
        assert_same(encode(Plain(name), codes.astype(np.float32), [row])[0].view(kind), codes)
    top = np.float32(ml_dtypes.finfo(kind).max)
    with np.errstate(over="ignore"):
        values = np.array([top * 1.001, top * 1.2, np.inf, -np.inf], np.float32)
        assert_same(encode(Plain(name), values, [5])[0].view(kind), values.astype(kind))


def test_draws_are_a_function_of_key_row_column_and_step():
    values = np.full((8, 16), 1.003, np.float32)
    one = encode(Plain("bfloat16"), values, np.arange(8))
    np.testing.assert_array_equal(one, encode(Plain("bfloat16"), values, np.arange(8)))
    np.testing.assert_array_equal(one[3:5], encode(Plain("bfloat16"), values[3:5], [3, 4]))
    np.testing.assert_array_equal(one[:, :20], encode(Plain("bfloat16"), values[:, :10], np.arange(8)))
    for other in ({"key": 2}, {"step": 1}, {"rows": np.arange(1, 9)}):
        assert (one != encode(Plain("bfloat16"), values, **{"rows": np.arange(8), **other})).any()
    assert len({row.tobytes() for row in one}) > 4


# ---- a scale for each row ---------------------------------------------------------------------------------------

FINITE = st.floats(-1e6, 1e6, width=32)
rows_of_floats = arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)), elements=FINITE)


@given(rows_of_floats)
@settings(deadline=None)
def test_a_biased_row_is_that_of_fbgemm(values):
    dtype = ScaledInt8(bias=True)
    data = encode(dtype, values)
    np.testing.assert_array_equal(data, encodings.encode(dtype, values))
    dim = values.shape[1]
    scales = data[:, dim:].copy().view(np.float32)
    expected = data[:, :dim].astype(np.float32) * scales[:, :1] + scales[:, 1:]
    found = decode(dtype, data, dim)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)  # LLVM may fuse the two operations
    span = values.max(axis=1) - values.min(axis=1)
    bound = span / 510 * 1.001 + 1e-6 * np.abs(values).max(axis=1) + 1e-8
    assert (np.abs(found - values).max(axis=1) <= bound).all()


@given(rows_of_floats)
@settings(deadline=None)
def test_a_symmetric_row(values):
    dtype = ScaledInt8(bias=False)
    dim = values.shape[1]
    data = encode(dtype, values)
    np.testing.assert_array_equal(data, encodings.encode(dtype, values))
    np.testing.assert_array_equal(decode(dtype, data, dim), encodings.decode(dtype, data, dim))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("drawn", [False, True])
def test_scaled_rows_at_the_edges(bias, drawn):
    dtype = ScaledInt8(bias=bias)
    rows = [1, 2, 3, 4, 5] if drawn else None
    values = np.array([[0, 0], [5, 5], [np.nan, 1], [np.inf, 1], [-1, 1]], np.float32)
    data = encode(dtype, values, rows)
    assert not data[0].any()  # as a fresh row of zeros
    found = decode(dtype, data, 2)
    np.testing.assert_allclose(found[[0, 1, 4]], values[[0, 1, 4]], rtol=1e-6)
    assert np.isnan(found[2:4]).all()


@pytest.mark.parametrize(
    "dtype", [ScaledInt8(bias=True), ScaledInt8(bias=False), BlockScaled(block=8)], ids=repr
)
def test_drawn_scaled_rows_are_right_on_average(dtype):
    values, draws = np.random.default_rng(1).normal(size=24).astype(np.float32), 4096
    data = encode(dtype, np.tile(values, (draws, 1)), np.arange(draws))
    found = decode(dtype, data, 24).astype(np.float64)
    spread = np.ptp(found, axis=0)
    assert (np.abs(found.mean(axis=0) - values) <= 5 * spread / np.sqrt(4 * draws) + 1e-6).all()
    assert (spread > 0).sum() > 12


# ---- a scale for each block -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
@given(values=rows_of_floats, block=st.integers(1, 40))
@settings(deadline=None)
def test_blocks_with_scales(kind, values, block):
    dtype, dim = BlockScaled(kind, block), values.shape[1]
    data = encode(dtype, values)
    np.testing.assert_array_equal(data, encodings.encode(dtype, values))
    np.testing.assert_array_equal(decode(dtype, data, dim), encodings.decode(dtype, data, dim))


def test_every_scale_of_a_block():
    data = np.zeros((256, 2), np.uint8)
    data[:, 0], data[:, 1] = np.float32(1).astype(FLOATS["float8_e4m3fn"]).view(np.uint8), np.arange(256)
    found = decode(BlockScaled(block=1), data, 1)[:, 0]
    assert_same(found, np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float32))


def every_pair(block):
    """All 256 codes with all 256 scales, in blocks: rows of scales, columns of codes."""
    codes = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    return np.concatenate([codes, np.repeat(np.arange(256, dtype=np.uint8)[:, None], -(-256 // block), 1)], 1)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("block", [32, 40, 3, 256])
def test_every_code_and_scale_as_bfloat16_is_rounded_from_float32(kind, block):
    """They do not become float32 on their way, and 32 of a block are converted at once."""
    data, dtype = every_pair(block), BlockScaled(kind, block)
    found = decode(dtype, data, 256, "bfloat16")
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = encodings.decode(dtype, data, 256).astype(ml_dtypes.bfloat16)
        assert_same(decode(dtype, data, 256), encodings.decode(dtype, data, 256))
    assert_same(found, expected)
    # The sign of NaN too, where there is one to keep.
    nan = np.isnan(expected[:255].astype(np.float32)).any(axis=0)
    signs = found.view(np.uint16)[:255, nan] & 0xFF80
    np.testing.assert_array_equal(signs, np.tile(0x7F80 | (np.arange(256)[nan] & 0x80) << 8, (255, 1)))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float8_without_scales_as_bfloat16(name):
    codes = every_code(FLOATS[name])
    found = decode(Plain(name), codes, codes.size, "bfloat16")[0]
    assert_same(found, codes.astype(np.float32).astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("block", [1, 7, 32, 64])
@pytest.mark.parametrize("dim", [1, 31, 33, 100])
def test_rows_of_blocks_of_any_width_as_bfloat16(block, dim):
    dtype, rng = BlockScaled(block=block), np.random.default_rng(dim)
    data = encode(dtype, rng.normal(size=(5, dim)) * 2.0 ** rng.integers(-8, 8, (5, 1)))
    expected = encodings.decode(dtype, data, dim).astype(ml_dtypes.bfloat16)
    assert_same(decode(dtype, data, dim, "bfloat16"), expected)


def test_a_block_that_is_not_finite_becomes_nan_and_no_other():
    values = np.ones((1, 8), np.float32)
    values[0, 2], values[0, 5] = np.nan, np.inf
    found = decode(BlockScaled(block=2), encode(BlockScaled(block=2), values), 8)
    np.testing.assert_array_equal(np.isnan(found[0]), [0, 0, 1, 1, 1, 1, 0, 0])


def test_the_row_of_an_llm_table_has_264_bytes():
    assert encode(BlockScaled("float8_e4m3fn", 32), np.ones((1, 256), np.float32)).shape == (1, 264)
