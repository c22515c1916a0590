"""Difficult keys: with hashes that collide, at the limits of their type, and constructed to cluster."""

import errno
import time
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inside
from support.references import unsplitmix
from support.stores import close_quietly

import shardemb
from shardemb.engine import batch
from shardemb.errors import DiskFullError
from shardemb.vocabulary import hash_index, hashing, key_rows

strings_ = st.text("ab\0é", max_size=3)
KINDS = {
    "int64": st.integers(-20, 20) | st.sampled_from([2**63 - 1, -(2**63), 2**32]),
    "string": strings_,
    "bytes": strings_.map(str.encode),
}
_hash_strings = hashing.hash_strings


def weak_strings(offsets, data, first, second, out, start, stop):
    """Keep only three bits of each hash."""
    _hash_strings(offsets, data, first, second, out, start, stop)
    out[start:stop] &= np.uint64(7 << 61)


def weak_integers(keys, first, second, out, start, stop):
    """Permute integers, but leave neighbours next to each other."""
    out[start:stop] = keys[start:stop].view(np.uint64)


@contextmanager
def colliding(*, merge_at=(16, 64)):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hashing, "hash_strings", weak_strings)
        patch.setattr(hashing, "hash_integers", weak_integers)
        patch.setattr(hash_index, "OPEN_PAIRS", merge_at)
        patch.setattr(hash_index, "PART_BITS", 3)
        patch.setattr(hash_index, "_STALE", 20)
        yield


class Model:
    """A vocabulary as a dict, and the rows that no key has."""

    def __init__(self):
        self.rows, self.count, self.free, self.freed = {}, 0, [], []

    def add(self, keys):
        for key in keys:
            if key not in self.rows:
                if self.free:
                    self.rows[key] = self.free.pop(0)
                else:
                    self.rows[key], self.count = self.count, self.count + 1
        return [self.rows[key] for key in keys]

    def remove(self, keys):
        found = self.lookup(keys)
        self.freed += sorted({row for row in found if row >= 0})
        for key in keys:
            self.rows.pop(key, None)
        return found

    def commit(self):
        self.free, self.freed = self.free + self.freed, []

    def lookup(self, keys):
        return [self.rows.get(key, -1) for key in keys]


def assert_same(words, model, more=()):
    keys = [*model.rows, *more]
    assert words.lookup(keys).tolist() == model.lookup(keys)
    assert len(words) == len(model.rows)
    assert words.num_rows == model.count
    rows = list(model.rows.values())
    assert words.keys(np.array(rows, np.int64)).tolist() == list(model.rows)


# ---- hashes that collide ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_type", KINDS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_vocabulary_is_a_dict_whatever_the_hashes(new_store, key_type, data):
    """While keys are added and removed, and the store is committed and opened again."""
    batch = st.lists(KINDS[key_type], max_size=20)
    steps = data.draw(
        st.lists(st.tuples(st.sampled_from(["add", "add", "remove", "commit", "open"]), batch), max_size=12)
    )
    with colliding(), new_store() as store:
        words, model, path = store.create_vocabulary("words", key_type=key_type), Model(), store.path
        for what, keys in steps:
            if what in ("add", "remove"):
                assert getattr(words, what)(keys).tolist() == getattr(model, what)(keys)
            else:
                store.commit()
                model.commit()
            if what == "open":
                store.close()
                with shardemb.open(path, mode="r") as reader:
                    assert_same(reader.vocabularies["words"], model, keys)
                store = shardemb.open(path)
                words = store.vocabularies["words"]
            assert_same(words, model, keys)
        close_quietly(store)


@pytest.mark.parametrize("key_type", ["string", pytest.param("bytes", marks=pytest.mark.soak)])
def test_many_keys_of_one_hash(store, key_type):
    """Far more than one cache line or one scan of the index holds."""
    keys = [f"{n}" if key_type == "string" else b"%d" % n for n in range(1500)]
    with colliding():
        words = store.create_vocabulary("words", key_type=key_type)
        for start in range(0, 1500, 300):
            words.add(keys[start : start + 300])
        assert words.lookup(keys).tolist() == list(range(1500))
        store.commit()
        assert words.remove(keys[::2]).tolist() == list(range(0, 1500, 2))
        assert words.lookup(keys).tolist() == [n if n % 2 else -1 for n in range(1500)]
        assert words.keys(np.arange(1, 1500, 2)).tolist() == keys[1::2]


# ---- keys at the limits -----------------------------------------------------------------------------------------


def comes_back(store, key_type, batches):
    """Add keys, and find them again: immediately, after the commit, and in another opening."""
    words = store.create_vocabulary("words", key_type=key_type)
    keys = [key for batch in batches for key in batch]
    rows = np.concatenate([words.add(batch) for batch in batches])
    assert rows.tolist() == list(range(len(keys)))
    assert words.lookup(keys).tolist() == rows.tolist()
    assert words.keys(rows).tolist() == keys
    store.commit()
    with shardemb.open(store.path, mode="r") as reader:
        again = reader.vocabularies["words"]
        assert again.keys(rows).tolist() == keys
        assert again.lookup(keys).tolist() == rows.tolist()
    assert store.verify() == []
    return words


def test_strings_that_are_short_long_or_odd(store):
    long = ["x" * 2**20, "x" * (2**20 - 1) + "y", "é" * 2**19]
    odd = ["", "\0", "\0\0", "a", "a\0", "\0a", "\n", " ", "é", "e\u0301", "\ufeff", "𝄞", "\U0010ffff"]
    words = comes_back(store, "string", [odd, [], long, ["end"]])
    assert words.lookup([*long, "x" * (2**20 + 1), "x" * 2**19, "b"]).tolist() == [13, 14, 15, -1, -1, -1]
    assert words.remove(long[::2]).tolist() == [13, 15]
    store.commit()
    assert words.add(["short", "y" * 2**21]).tolist() == [
        13,
        15,
    ]  # within the capacity of the first row, and beyond that of the other
    assert words.keys([13, 14, 15]).tolist() == ["short", long[1], "y" * 2**21]


def test_every_code_point_is_a_key(store):
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    words = comes_back(store, "string", [points])
    assert len(words) == 0x110000 - 0x800
    assert words.lookup(np.array(points[1:])).tolist() == list(range(1, len(points)))  # NumPy has no "\0"
    assert words.lookup(["ab", "\0\0"]).tolist() == [-1, -1]


def test_integers_whose_words_are_no_numbers_as_floats(store):
    """Records are in tables of float32. Signalling NaNs, infinities, subnormal numbers and -0 must keep their bits."""
    halves = [
        0x7F800001,
        0x7FA00000,
        0xFF800001,
        0x7FC00000,
        0xFFFFFFFF,
        0x7F800000,
        0x80000000,
        1,
        0x807FFFFF,
        0,
    ]
    integers = np.array([high << 32 | low for high in halves for low in halves], np.uint64).view(np.int64)
    comes_back(store, "int64", [integers.tolist()])


def test_bytes_that_are_no_numbers_as_floats(store):
    halves = [b"\x01\0\x80\x7f", b"\0\0\xa0\x7f", b"\x01\0\x80\xff", b"\xff" * 4, b"\0\0\0\x80", b"\0" * 4]
    comes_back(
        store, "bytes", [[before + each * 20 for each in halves for before in (b"", b"1", b"12", b"123")]]
    )


def test_the_limits_of_integers(store):
    limits = [0, -1, 1, 2**63 - 1, -(2**63), 2**63 - 2, -(2**63) + 1, 2**31, -(2**31), 2**32, -(2**32)]
    words = comes_back(store, "int64", [limits, list(range(100, 200))])
    words.remove([0, -1])
    assert words.lookup(limits).tolist() == [
        -1,
        -1,
        *range(2, len(limits)),
    ]  # a record without a key is not the key 0


def test_strings_whose_addition_failed_leave_no_capacity_to_their_rows(store, monkeypatch):
    """An addition wrote these rows before it failed, but the bytes that they name belong to no row yet."""
    words, change, left = store.create_vocabulary("words", key_type="string"), batch.change, [1]

    def fail_later(*given):
        if not left:
            raise DiskFullError(errno.ENOSPC, "no space left on the disk")
        left.pop()
        change(*given)

    with monkeypatch.context() as patch:
        patch.setattr(key_rows, "SLICE_ROWS", 10)
        patch.setattr(batch, "change", fail_later)
        with pytest.raises(DiskFullError):
            words.add([f"never added {n}" for n in range(20)])
    keys = [f"{n}" for n in range(5)] + [f"longer than all of those {n}" for n in range(15)]
    assert words.add(keys).tolist() == list(range(20))
    assert words.keys(np.arange(20)).tolist() == keys


# ---- keys that are constructed to cluster -----------------------------------------------------------------------

MANY = 2_000_000


def seconds_to_add(store, name, keys):
    words = store.create_vocabulary(name, key_type="int64")
    keys = keys(inside.key_rows(words)._secret) if callable(keys) else keys
    started = time.perf_counter()
    rows = words.add(keys)
    found = words.lookup(keys)
    took = time.perf_counter() - started
    np.testing.assert_array_equal(rows, np.arange(keys.size))
    np.testing.assert_array_equal(found, rows)
    assert (words.lookup(keys[:1000] ^ np.int64(2**62)) == -1).mean() > 0.9
    return took


def alike(secret):
    """Construct keys whose hashes have the same first 40 bits."""
    return unsplitmix((np.uint64(0xABCDEF0123) << np.uint64(24)) + np.arange(MANY, dtype=np.uint64), *secret)


@pytest.mark.parametrize("secret", [(0, 0), None], ids=["without the secret", "with the secret"])
def test_keys_that_cluster_take_little_longer_than_others(store, secret):
    """If each key had to be searched for behind all others, they would take a million times as long."""
    rng = np.random.default_rng(0)
    seconds_to_add(store, "warm", np.arange(1000))
    usual = seconds_to_add(store, "usual", rng.integers(-(2**63), 2**63, MANY))
    made = seconds_to_add(store, "made", alike(secret) if secret else alike)
    assert made < 20 * usual
