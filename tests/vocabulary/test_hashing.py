"""Hashes, against Python's own SipHash and against the formulas; and how well they are distributed."""

import ast
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.references import siphash13, splitmix, unsplitmix

from shardemb.vocabulary import hashing

words = st.integers(0, 2**64 - 1)
LIMITS = [0, 1, -1, 2**31, -(2**31), 2**63 - 1, -(2**63)]


def hash_strings(strings, secret=(0, 0), start=0, stop=None):
    offsets = np.cumsum([0, *map(len, strings)])
    data = np.frombuffer(b"".join(strings), np.uint8).copy()
    out = np.zeros(len(strings), np.uint64)
    stop = len(strings) if stop is None else stop
    hashing.hash_strings(offsets, data, *map(np.uint64, secret), out, start, stop)
    return out


def hash_integers(keys, secret=(0, 0)):
    keys = np.asarray(keys, np.int64)
    out = np.empty(keys.size, np.uint64)
    hashing.hash_integers(keys, *map(np.uint64, secret), out, 0, keys.size)
    return out


# ---- strings ----------------------------------------------------------------------------------------------------


def test_strings_have_the_hashes_that_python_gives_them():
    """Of every length up to 300: Python hashes bytes by SipHash-1-3, with a key of zeros if PYTHONHASHSEED is 0."""
    if sys.hash_info.algorithm != "siphash13":
        pytest.skip("this Python uses another hash function")
    rng = np.random.default_rng(0)
    strings = [rng.bytes(length) for length in range(1, 300)]  # Python hashes the empty one to 0
    code = "import sys, ast; print([hash(each) for each in ast.literal_eval(sys.stdin.read())])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=repr(strings),
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = np.array(ast.literal_eval(done.stdout), np.int64)
    assert -2 not in expected  # Python replaces -1 by it
    np.testing.assert_array_equal(hash_strings(strings).view(np.int64), expected)


def test_the_reference_is_siphash():
    """Test vectors of its reference implementation (``vectors.h``, SipHash-2-4); key and message count up from 0."""
    key = 0x0706050403020100, 0x0F0E0D0C0B0A0908
    found = [siphash13(bytes(range(n)), *key, rounds=(2, 4)).to_bytes(8, "little").hex() for n in (0, 1, 15)]
    assert found == ["310e0edd47db6f72", "fd67dc93c539f874", "e545be4961ca29a1"]


@given(st.lists(st.binary(max_size=40), max_size=8), words, words)
def test_strings_are_hashed_as_the_formula_says(strings, first, second):
    assert hash_strings(strings, (first, second)).tolist() == [
        siphash13(each, first, second) for each in strings
    ]


def test_the_length_counts_modulo_256_as_the_formula_says():
    strings = [b"", b"\0", b"\0" * 8, b"\0" * 256, b"a" * 1000]
    found = hash_strings(strings, (1, 2)).tolist()
    assert found == [siphash13(each, 1, 2) for each in strings]
    assert len(set(found)) == len(found)


def test_only_a_range_of_the_strings_is_hashed():
    strings = [b"a", b"", b"bcd", b"e"]
    whole = hash_strings(strings)
    assert hash_strings(strings, start=1, stop=3).tolist() == [0, *whole[1:3].tolist(), 0]


# ---- integers ---------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(LIMITS) | st.integers(-(2**63), 2**63 - 1)), words, words)
def test_integers_are_only_permuted(keys, first, second):
    """The hash has an inverse, so different keys have different hashes."""
    hashes = hash_integers(keys, (first, second))
    assert hashes.tolist() == [splitmix(key % 2**64, first, second) for key in keys]
    assert unsplitmix(hashes, first, second).tolist() == keys


def test_the_permutation_of_integers_is_that_of_splitmix64():
    """The first outputs for the seed 1234567, as Vigna's ``splitmix64.c`` prints them."""
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + golden * n) % 2**64 for n in (1, 2, 3)], np.uint64)
    assert hash_integers(states.view(np.int64)).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


# ---- distribution -----------------------------------------------------------------------------------------------


def integers_with_bit(rng, bit):
    keys = rng.integers(-(2**63), 2**63, 4096)
    return hash_integers(keys, (5, 7)), hash_integers(
        keys ^ np.int64(np.uint64(1 << bit).view(np.int64)), (5, 7)
    )


def strings_with_bit(rng, bit):
    keys = rng.integers(-(2**63), 2**63, 4096)
    changed = keys ^ np.uint64(1 << bit).view(np.int64)
    return tuple(hash_strings([each.tobytes() for each in some], (5, 7)) for some in (keys, changed))


@pytest.mark.parametrize("pairs", [integers_with_bit, strings_with_bit])
def test_each_bit_of_a_key_flips_half_the_bits_of_its_hash(pairs):
    """For 4,096 keys, each bit of the hash flips 2,048 times, within five standard deviations of 32."""
    rng = np.random.default_rng(1)
    for bit in range(64):
        before, after = pairs(rng, bit)
        turned = np.unpackbits((before ^ after).view(np.uint8)).reshape(-1, 64).sum(0, np.int64)
        assert (abs(turned - 2048) < 5 * 32).all(), (bit, turned)


@pytest.mark.parametrize("step", [1, 2**20, 2**40, -7])
def test_hashes_of_evenly_spaced_integers_are_uniform(step):
    """In 1,024 buckets by their first bits: chi-squared of 1,023 degrees of freedom has a standard deviation of 45."""
    hashes = hash_integers(np.arange(2**16) * step, hashing.secret_of("one"))
    counts = np.bincount((hashes >> np.uint64(54)).astype(np.int64), minlength=1024)
    assert abs(((counts - 64.0) ** 2 / 64).sum() - 1023) < 5 * 45


# ---- secrets ----------------------------------------------------------------------------------------------------


def test_a_secret_is_the_beginning_of_a_digest():
    digest = hashlib.sha256(b"one").digest()
    secret = hashing.secret_of("one")
    assert [int(each) for each in secret] == [
        int.from_bytes(digest[at : at + 8], sys.byteorder) for at in (0, 8)
    ]
    assert secret != hashing.secret_of("two")


def test_keys_that_collide_without_the_secret_do_not_with_it():
    """Constructed for the secret 0 to share 40 bits. With another secret, 2,048 buckets have about 32 of them each."""
    alike = (np.uint64(0xABCDEF0123) << np.uint64(24)) + np.arange(2**16, dtype=np.uint64)
    keys = unsplitmix(alike, 0, 0)
    assert np.unique(hash_integers(keys) >> np.uint64(24)).size == 1
    buckets = hash_integers(keys, hashing.secret_of("one")) >> np.uint64(53)
    assert np.bincount(buckets.astype(np.int64), minlength=2048).max() < 80
