"""When a key gets its row: the sketch, against a dict of counts."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.stores import close_quietly

import shardemb
from shardemb import Admission
from shardemb.engine import batch as engine_batch
from shardemb.errors import DiskFullError
from shardemb.vocabulary import hashing, key_kernels

SECRET = hashing.secret_of("00000000-0000-4000-8000-000000000000")


def hashes_of(keys):
    out = np.empty(keys.size, np.uint64)
    hashing.hash_integers(keys, *SECRET, out, 0, keys.size)
    return out


def counted(admission, stream):
    """Count a stream of small integers, batch by batch; return the sketch's count of each at its last occurrence."""
    counters = np.zeros(admission.width * admission.depth, np.uint32)
    every = np.arange(max(map(max, stream)) + 1)
    places = admission.counters(hashes_of(every), SECRET)
    true = np.zeros(every.size, np.uint32)
    for batch in stream:
        keys, inverse = np.unique(batch, return_inverse=True)
        told = np.zeros(keys.size, np.uint32)
        key_kernels.count_seen(counters, places[keys], inverse.reshape(-1), told)
        np.add.at(true, batch, np.uint32(1))
        # This is the count at the key's own last occurrence; others may have raised all of its counters since.
        assert (true[keys] <= told).all()
        assert (told <= counters[places[keys]].min(axis=1)).all()
    return counters[places].min(axis=1)


@pytest.mark.parametrize(("width", "depth"), [(16, 1), (64, 3), (1000, 4), (4096, 8)])
def test_each_key_has_a_counter_in_each_row(width, depth):
    admission = Admission(after=2, width=width, depth=depth)
    places = admission.counters(hashes_of(np.arange(5000)), SECRET)
    assert (admission.width % 16, places.shape) == (0, (5000, depth))
    assert (places // admission.width == np.arange(depth)).all()
    for row in range(depth):  # about as many keys for each counter
        counts = np.bincount(places[:, row] - row * admission.width, minlength=admission.width)
        assert counts.max() < 5000 / admission.width + 8 * math.sqrt(5000 / admission.width) + 3


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=200), min_size=1, max_size=8),
    st.sampled_from([(16, 1), (16, 4), (64, 2), (1024, 4)]),
)
def test_a_count_is_never_too_low(stream, shape):
    width, depth = shape
    found = counted(Admission(after=3, width=width, depth=depth), stream)
    true = np.bincount(np.concatenate(stream), minlength=found.size)
    assert (found >= true).all()
    assert found.max() <= true.sum()


def test_keys_that_share_no_counter_with_all_others_are_counted_exactly():
    rng = np.random.default_rng(0)
    stream = [rng.integers(0, 200, 100).tolist() for _ in range(20)]
    found = counted(Admission(after=3, width=2**16, depth=4), stream)
    assert found.tolist() == np.bincount(np.concatenate(stream), minlength=found.size).tolist()


@pytest.mark.parametrize(("width", "depth"), [(256, 2), (512, 3), (1024, 4)])
def test_counts_are_too_high_as_rarely_as_promised(width, depth):
    admission = Admission(after=3, width=width, depth=depth)
    rng = np.random.default_rng(1)
    stream = [(rng.zipf(1.1, 5000) % 20_000).tolist() for _ in range(10)]
    found = counted(admission, stream)
    true = np.bincount(np.concatenate(stream), minlength=found.size)
    too_high = found - true > admission.error * true.sum()
    assert too_high.mean() <= admission.failure
    assert (admission.error, admission.failure) == (math.e / width, math.exp(-depth))


def test_a_counter_stays_at_its_maximum():
    counters = np.full(32, 2**32 - 1, np.uint32)
    told = np.zeros(1, np.uint32)
    key_kernels.count_seen(counters, np.array([[0, 16]]), np.array([0, 0]), told)
    assert told[0] == counters[0] == 2**32 - 1


@pytest.mark.parametrize("key_type", ["int64", "string"])
@pytest.mark.parametrize("after", [1, 2, 5])
def test_keys_get_rows_with_the_occurrence_that_earns_them(store, key_type, after):
    words = store.create_vocabulary(
        "v", key_type=key_type, admission=Admission(after=after, width=2**14, depth=4)
    )
    rng = np.random.default_rng(after)
    seen, rows, occurrences = {}, {}, 0
    for turn in range(30):
        keys = (rng.zipf(1.3, 40) % 150).tolist()
        keys = keys if key_type == "int64" else list(map(str, keys))
        new = [key for key in keys if key not in rows]
        occurrences += len(new)
        for key in new:
            seen[key] = seen.get(key, 0) + 1
        for key in dict.fromkeys(new):
            if seen[key] >= after:
                rows[key] = len(rows)
        assert words.add(keys).tolist() == [rows.get(key, -1) for key in keys]
        assert words.lookup(keys).tolist() == [rows.get(key, -1) for key in keys]
        if turn % 7 == 0:
            store.commit()
    assert words.stats()["sightings"] == occurrences
    assert len(words) == words.num_rows == len(rows)


def test_what_was_counted_is_part_of_the_commit(path):
    store = shardemb.open(path)
    words = store.create_vocabulary("v", key_type="string", admission=Admission(after=3, width=1024))
    words.add(["a", "b", "b"])
    store.commit()
    words.add(["a", "b"])
    assert words.lookup(["a", "b"]).tolist() == [-1, 0]
    store.rollback()
    assert words.add(["a"]).tolist() == [-1]  # the second
    store.commit()
    store.close()
    store = shardemb.open(path)
    words = store.vocabularies["v"]
    assert words.admission == Admission(after=3, width=1024)
    words.add(["b"])
    close_quietly(store)
    store = shardemb.open(path)
    words = store.vocabularies["v"]
    assert words.add(["a", "b"]).tolist() == [0, 1]
    # Neither a lookup nor a key that has a row counts as an occurrence.
    before = words.stats()["sightings"]
    words.lookup(["c"] * 5)
    words.add(["a", "b"])
    assert words.stats()["sightings"] == before
    assert words.add(["c", "c"]).tolist() == [-1, -1]
    store.commit()
    # A key that was removed has already earned its row.
    words.remove(["a"])
    store.commit()
    assert words.add(["a"]).tolist() == [0]
    close_quietly(store)


def test_occurrences_count_within_one_call(store):
    words = store.create_vocabulary("v", key_type="int64", admission=Admission(after=3, width=1024))
    assert words.add([[1, 2, 1], [2, 1, 3]]).tolist() == [[0, -1, 0], [-1, 0, -1]]
    assert words.add([3, 2]).tolist() == [-1, 1]
    assert words.add([4, 4, 4, 3]).tolist() == [2, 2, 2, 3]


def test_a_count_without_disk_space_counts_nothing(store, monkeypatch):
    words = store.create_vocabulary("v", key_type="int64", admission=Admission(after=2, width=1024))
    store.commit()

    def fail(*arguments):
        raise DiskFullError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine_batch, "change", fail)
        with pytest.raises(DiskFullError):
            words.add([1])
    assert not store.has_changes
    assert words.add([1]).tolist() == [-1]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"after": 0}, ValueError),
        ({"after": 2**31 + 1}, ValueError),
        ({"after": 1.5}, TypeError),
        ({"after": 2, "width": 0}, ValueError),
        ({"after": 2, "depth": 0}, ValueError),
        ({"after": 2, "depth": 17}, ValueError),
        ({"after": 2, "width": "x"}, TypeError),
    ],
)
def test_what_an_admission_cannot_be(arguments, error):
    with pytest.raises(error, match=next(reversed(arguments))):
        Admission(**arguments)


def test_a_width_is_whole_cells():
    assert [Admission(after=1, width=width).width for width in (1, 16, 17)] == [16, 16, 32]
    assert Admission(after=1, width=17, depth=2).nbytes == 256
