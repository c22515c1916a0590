"""Hashes of keys: the hot loops from keys to well-distributed 64-bit hashes.

Each vocabulary has a secret of 128 bits that both hash functions depend on, so that nobody without it can construct
keys whose hashes collide or cluster. Integers are only permuted: different integers never have the same hash.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shardemb.compute.compiler import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from shardemb.base.validation import Int64Array

_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31 = np.uint64(27), np.uint64(30), np.uint64(31)
_S13, _S16, _S17, _S21, _S32 = np.uint64(13), np.uint64(16), np.uint64(17), np.uint64(21), np.uint64(32)
_V0, _V1 = np.uint64(0x736F6D6570736575), np.uint64(0x646F72616E646F6D)
_V2, _V3 = np.uint64(0x6C7967656E657261), np.uint64(0x7465646279746573)
_END, _S8, _S56, _S64 = np.uint64(0xFF), np.uint64(8), np.uint64(56), np.uint64(64)


class Secret(NamedTuple):
    """The secret of a vocabulary's hashes."""

    first: np.uint64
    second: np.uint64


def secret_of(identity: str) -> Secret:
    """Derive the secret of a vocabulary from its random uuid."""
    digest = hashlib.sha256(identity.encode()).digest()
    return Secret(*np.frombuffer(digest[:16], np.uint64))


@kernel
def hash_integers(
    keys: Int64Array, first: np.uint64, second: np.uint64, out: NDArray[np.uint64], start: int, stop: int
) -> None:
    """Permute 64-bit integers by the finalizer of SplitMix64 (Steele, Lea, Flood 2014), between two secret words."""
    for i in range(start, stop):
        x = np.uint64(keys[i]) ^ first
        x = (x ^ (x >> _S30)) * _M1
        x = (x ^ (x >> _S27)) * _M2
        out[i] = (x ^ (x >> _S31)) + second


@kernel
def _rotate_left(x: Any, left: Any) -> Any:  # noqa: ANN401
    return (x << left) | (x >> (_S64 - left))


@kernel
def _sip_round(v: Any) -> None:  # noqa: ANN401
    """Mix the four words of SipHash's state: one SipRound."""
    v0, v1, v2, v3 = v[0] + v[1], v[1], v[2] + v[3], v[3]
    v1 = _rotate_left(v1, _S13) ^ v0
    v3 = _rotate_left(v3, _S16) ^ v2
    v0 = _rotate_left(v0, _S32)
    v2 += v1
    v0 += v3
    v[1] = _rotate_left(v1, _S17) ^ v2
    v[3] = _rotate_left(v3, _S21) ^ v0
    v[0], v[2] = v0, _rotate_left(v2, _S32)


@kernel
def hash_strings(
    offsets: Int64Array,
    data: NDArray[np.uint8],
    first: np.uint64,
    second: np.uint64,
    out: NDArray[np.uint64],
    start: int,
    stop: int,
) -> None:
    """Hash strings by SipHash-1-3 (Aumasson, Bernstein 2012). Their bytes are contiguous in `data`."""
    v = np.empty(4, np.uint64)
    for i in range(start, stop):
        begin, end = offsets[i], offsets[i + 1]
        v[0], v[1], v[2], v[3] = first ^ _V0, second ^ _V1, first ^ _V2, second ^ _V3
        whole = begin + ((end - begin) & -8)
        for at in range(begin, whole, 8):
            word = np.uint64(0)
            for k in range(8):
                word |= np.uint64(data[at + k]) << np.uint64(8 * k)
            v[3] ^= word
            _sip_round(v)
            v[0] ^= word
        word = np.uint64(end - begin) << _S56
        for at in range(whole, end):
            word |= np.uint64(data[at]) << np.uint64(8 * (at - whole))
        v[3] ^= word
        _sip_round(v)
        v[0] ^= word
        v[2] ^= _END
        for _ in range(3):
            _sip_round(v)
        out[i] = v[0] ^ v[1] ^ v[2] ^ v[3]
