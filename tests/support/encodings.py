"""Rows as bytes and back, by NumPy and the types of the package ml_dtypes."""

import ml_dtypes
import numpy as np

from shardemb.dtypes import BlockScaled, Plain, ScaledInt8

FLOATS = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


def encode(dtype, values):
    """The bytes of finite rows of float32, rounded to nearest; shape (n, bytes of a row)."""
    values = np.asarray(values, np.float32)
    if isinstance(dtype, str):
        dtype = Plain(dtype)
    if isinstance(dtype, Plain):
        with np.errstate(over="ignore"):
            return values.astype(FLOATS[dtype.kind]).view(np.uint8).reshape(len(values), -1)
    if isinstance(dtype, BlockScaled):
        return (
            np.stack([_blocks(dtype, row) for row in values]) if len(values) else np.empty((0, 1), np.uint8)
        )
    return np.stack([_fbgemm(row) if dtype.bias else _symmetric(row) for row in values])


def decode(dtype, data, dim):
    """The float32 of rows of bytes."""
    if isinstance(dtype, str):
        dtype = Plain(dtype)
    if isinstance(dtype, Plain):
        return np.ascontiguousarray(data).view(FLOATS[dtype.kind]).astype(np.float32)
    if isinstance(dtype, BlockScaled):
        scales = np.ascontiguousarray(data[:, dim:]).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        codes = np.ascontiguousarray(data[:, :dim]).view(FLOATS[dtype.values]).astype(np.float32)
        return codes * np.repeat(scales, dtype.block, axis=1)[:, :dim]
    scales = np.ascontiguousarray(data[:, dim:]).view(np.float32)
    if dtype.bias:
        return data[:, :dim].astype(np.float32) * scales[:, :1] + scales[:, 1:]
    return np.ascontiguousarray(data[:, :dim]).view(np.int8).astype(np.float32) * scales


def _fbgemm(row):
    """The fused 8-bit row of FBGEMM: bias = min, scale = range / 255, q = round((x - min) * 255 / (range + 1e-8))."""
    low, span = row.min() + np.float32(0), np.float32(row.max() - row.min())
    inverse = np.float32(255) / np.float32(span + np.float32(1e-8))
    codes = np.rint(np.float32(row - low) * inverse).clip(0, 255).astype(np.uint8)
    return np.concatenate([codes, np.array([span / np.float32(255), low], np.float32).view(np.uint8)])


def _symmetric(row):
    most = np.float32(np.abs(row).max())
    large = most >= 2.0**-100
    inverse = np.float32(127) / most if large else np.float32(0)
    scale = np.array([most / np.float32(127) if large else 0], np.float32)
    return np.concatenate([np.rint(row * inverse).astype(np.int8).view(np.uint8), scale.view(np.uint8)])


def _blocks(dtype, row):
    codes, scales, kind = [], [], FLOATS[dtype.values]
    for start in range(0, row.size, dtype.block):
        some = row[start : start + dtype.block].astype(np.float64)
        largest = np.abs(some).max()
        exponent = (
            -127
            if largest == 0
            else max(int(np.ceil(np.log2(largest / float(ml_dtypes.finfo(kind).max)))), -127)
        )
        codes.append((some / 2.0**exponent).astype(np.float32).astype(kind).view(np.uint8))
        scales.append(exponent + 127)
    return np.concatenate([*codes, np.array(scales, np.uint8)])


EVERY = [
    *(Plain(name) for name in FLOATS if name != "float32"),
    ScaledInt8(True),
    ScaledInt8(False),
    BlockScaled(block=4),
]
