"""Vocabularies: the forms of keys, what is refused, concurrent lookups, and changes that fail."""

import itertools
import random

import numpy as np
import pyarrow as pa
import pytest
from support import inside
from support.model import VocabularyModel
from support.small import make_small, pool_of
from support.stores import close_quietly

import shardemb
from shardemb.engine import batch
from shardemb.errors import (
    DiskFullError,
    ReadOnlyError,
    RowIdError,
    StoreClosedError,
    VocabularyNotFoundError,
)
from shardemb.session.journal import Journal
from shardemb.vocabulary import hash_index, key_rows, key_tables

KEYS = {
    "int64": [5, -1, 2**62, 0],
    "string": ["five", "", "ä\0b", "x" * 1000],
    "bytes": [b"5", b"", b"\xff\0", b"y" * 1000],
}


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch, random.Random(1))
    monkeypatch.setattr(hash_index, "_STALE", 2**16)
    monkeypatch.setattr(key_rows, "SLICE_ROWS", 50)


@pytest.fixture(params=KEYS)
def key_type(request):
    return request.param


# ---- keys in and out --------------------------------------------------------------------------------------------


def forms(key_type, keys):
    """Yield a batch in all forms that are accepted, each with the shape of the result."""
    kind = {"int64": pa.int64(), "string": pa.string(), "bytes": pa.binary()}[key_type]
    size = len(keys)
    yield keys, (size,)
    yield tuple(keys), (size,)
    yield [[key] for key in keys], (size, 1)
    yield [keys, keys[::-1]], (2, size)
    yield np.array(keys, np.int64 if key_type == "int64" else object), (size,)
    yield (
        np.array([*keys, *keys], object if key_type != "int64" else np.int64).reshape(2, size)[:, ::-1],
        (2, size),
    )
    yield pa.array(keys, kind), (size,)
    yield pa.array([*keys, *keys], kind)[1 : size + 1], (size,)
    yield pa.chunked_array([keys[:1], [], keys[1:]], kind), (size,)
    if key_type == "int64":
        yield np.array([1, 2, 255], np.uint8), (3,)
        yield np.array([1, 2, 2**63 - 1], np.uint64), (3,)
        yield np.array([1, -2], ">i4"), (2,)
        yield pa.array([1, 2], pa.uint16()), (2,)
    if key_type != "int64":
        yield pa.array(keys, kind).dictionary_encode(), (size,)
        yield pa.array(keys, pa.large_string() if key_type == "string" else pa.large_binary()), (size,)
        yield np.array(["ab", "c"] if key_type == "string" else [b"ab", b"c"]), (2,)
        yield keys[0], ()
    for empty in [], np.empty((0, 3), np.int64 if key_type == "int64" else object), pa.array([], kind):
        yield empty, np.shape(empty) if isinstance(empty, np.ndarray) else (0,)
    yield pa.chunked_array([], kind), (0,)


def flat(given):
    array = given.to_pylist() if isinstance(given, pa.Array | pa.ChunkedArray) else given
    if isinstance(array, str | bytes):
        return [array]
    return np.asarray(array, object).reshape(-1).tolist()


def test_keys_are_accepted_in_many_forms_and_shapes(store, key_type):
    words = store.create_vocabulary("v", key_type=key_type)
    model = VocabularyModel()
    for given, shape in forms(key_type, KEYS[key_type]):
        assert words.lookup(given).shape == shape
        assert words.lookup(given, missing=-7).reshape(-1).tolist() == [
            -7 if row < 0 else row for row in model.lookup(flat(given))
        ]
        rows = words.add(given)
        assert (rows.shape, rows.dtype) == (shape, np.int64)
        assert rows.reshape(-1).tolist() == model.add(flat(given))
        assert words.lookup(given).tolist() == rows.tolist()
        back = words.keys(rows)
        assert back.shape == shape
        assert back.dtype == (np.int64 if key_type == "int64" else object)
        assert back.reshape(-1).tolist() == flat(given)
        model.assert_matches(words)
    gone = words.remove([KEYS[key_type]])
    assert gone.tolist() == [model.remove(KEYS[key_type])]
    model.assert_matches(words)
    for key in KEYS[key_type]:
        assert key not in words


def test_a_single_integer_is_a_key(store):
    words = store.create_vocabulary("v", key_type="int64")
    assert words.add(7).shape == ()
    assert words.lookup(np.int32(7)) == 0
    assert words.keys(0) == 7
    assert 7 in words
    assert 8 not in words


@pytest.mark.parametrize(
    ("key_type", "given", "error", "message"),
    [
        ("int64", ["a"], TypeError, "vocabulary 'v' has integer keys"),
        ("int64", np.array([2**63], np.uint64), ValueError, r"keys.view\('int64'\)"),
        ("int64", pa.array([1, None]), ValueError, "1 of 2 keys are missing"),
        ("string", [1], TypeError, "vocabulary 'v' has keys of str"),
        ("string", ["a", b"b"], TypeError, "has keys of str"),
        ("string", ["a", None], ValueError, "1 of 2 keys are missing"),
        ("string", ["\ud800"], ValueError, "cannot be encoded as UTF-8"),
        ("bytes", ["a"], TypeError, "vocabulary 'v' has keys of bytes"),
        ("bytes", pa.array(["a"]), TypeError, "has keys of bytes"),
    ],
)
def test_keys_of_another_type_are_refused(store, key_type, given, error, message):
    words = store.create_vocabulary("v", key_type=key_type)
    for call in words.add, words.lookup, words.remove:
        with pytest.raises(error, match=message):
            call(given)
    assert len(words) == 0
    store.commit()
    assert not store.has_changes


# ---- rows -------------------------------------------------------------------------------------------------------


def test_rows_without_a_key_are_refused(store):
    words = store.create_vocabulary("v", key_type="string", reserved=2)
    for row in 0, 1:
        with pytest.raises(RowIdError, match=f"row {row} of vocabulary 'v' has no key"):
            words.keys([row])
    words.add(["a", "b", "c"])
    words.remove(["b"])
    assert words.keys([[2], [4]]).tolist() == [["a"], ["c"]]
    with pytest.raises(RowIdError, match=r"row 3 of vocabulary 'v' has no key \(2 such rows\)"):
        words.keys([2, 3, 1])
    for row in 5, -1:
        with pytest.raises(RowIdError, match=str(row)):
            words.keys([row])
    with pytest.raises(TypeError):
        words.keys([0.5])
    assert (words.num_rows, words.reserved, len(words)) == (5, 2, 2)
    assert words.keys([]).shape == (0,)
    assert list(words) == ["a", "c"]


def test_an_empty_vocabulary(store, key_type):
    words = store.create_vocabulary("v", key_type=key_type)
    assert (len(words), words.num_rows, list(words)) == (0, 0, [])
    assert words.add([]).tolist() == words.remove([]).tolist() == []
    with pytest.raises(RowIdError):
        words.keys([0])
    store.commit()
    assert words.remove(KEYS[key_type]).tolist() == [-1] * 4
    assert not store.has_changes


def test_reserved_rows_beyond_the_first_tables(path, small):
    """The table of keys begins with few rows. If more are reserved, none of them may be read behind its end."""
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64", reserved=5000)
        table = store.create_table("t", vocabulary="v", embedding_dim=2, rows_per_shard=64)
        assert table.rows.num_embeddings >= 5000
        with pytest.raises(RowIdError, match="row 4999 of vocabulary 'v' has no key"):
            words.keys([4999])
        store.commit()
    with shardemb.open(path) as store:
        words = store.vocabularies["v"]
        assert words.lookup([1]).tolist() == [-1]
        assert list(words) == []
        assert words.add([1, 2]).tolist() == [5000, 5001]
        store.commit()
    with shardemb.open(path, "r") as store:
        assert list(store.vocabularies["v"]) == [1, 2]


def test_reserved_rows_beyond_the_first_tables_at_their_real_size(path):
    shapes = key_tables.table_shapes
    with shardemb.open(path) as store:
        rows = shapes(inside.key_rows(store.create_vocabulary("v", key_type="int64")).entry)["keys"][0]
        words = store.create_vocabulary("w", key_type="int64", reserved=rows + 10)
        with pytest.raises(RowIdError, match="has no key"):
            words.keys([rows + 9])
        assert words.add([3]).tolist() == [rows + 10]
        assert words.keys([rows + 10]).tolist() == [3]
        close_quietly(store)


def test_freed_rows_are_reused_after_the_commit_in_the_order_in_which_they_were_freed(store):
    words = store.create_vocabulary("v", key_type="int64")
    words.add(np.arange(10))
    store.commit()
    words.remove([7, 3])
    words.remove([5])
    assert words.add([100]).tolist() == [10]  # not before the commit
    store.commit()
    words.remove([1])
    assert words.add([101, 102]).tolist() == [3, 7]
    assert words.add([3, 103, 1]).tolist() == [5, 11, 12]
    store.rollback()
    assert words.add([1, 3, 5]).tolist() == [1, 3, 7]
    store.commit()
    assert len(words) == 10


def test_bytes_of_a_freed_row_are_used_again(store):
    words = store.create_vocabulary("v", key_type="bytes")
    words.add([b"a" * 100, b"b" * 100])
    store.commit()
    sizes = []
    for turn in range(30):
        key = bytes([turn]) * (80 + turn)
        words.remove(words.keys([0]))
        store.commit()
        assert words.add([key]).tolist() == [0]
        store.commit()
        assert words.keys([0, 1]).tolist() == [key, b"b" * 100]
        sizes.append(inside.key_rows(words).entry.text_bytes)
    assert sizes[-1] <= 200 + 2 * 110 + 10  # it moved once, and got a capacity of twice its length


def test_keys_larger_than_what_is_compared_in_one_step(store, monkeypatch):
    monkeypatch.setattr(key_tables, "SLICE_BYTES", 1000)
    words = store.create_vocabulary("v", key_type="bytes")
    keys = [bytes([i]) * (i * 500) for i in range(12)] + [b"\1" * 499 + b"\2"]
    assert words.add([*keys, *keys[::-1]]).tolist() == [*range(13), *range(12, -1, -1)]
    assert words.keys(np.arange(13)).tolist() == keys
    assert words.lookup([keys[3][:-1], keys[3]]).tolist() == [-1, 3]


# ---- stores that do not allow it --------------------------------------------------------------------------------


def test_a_store_for_reading_refuses_changes(path):
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="int64").add([1, 2])
        store.create_table("t", vocabulary="v", embedding_dim=2, counters=True)
        store.commit()
    with shardemb.open(path, "r") as store:
        words, table = store.vocabularies["v"], store["t"]
        for call in (
            lambda: words.add([1]),
            lambda: words.add([3]),
            lambda: words.remove([1]),
            lambda: table.lookup([1], create=True),
            lambda: table.evict(keep=1),
            lambda: table.rows.reset_rows([0]),
            lambda: table.write([1], [[1.0, 1.0]]),
            lambda: store.create_vocabulary("w", key_type="int64"),
            lambda: store.drop_vocabulary("v"),
        ):
            with pytest.raises(ReadOnlyError):
                call()
        assert words.lookup([2, 3]).tolist() == [1, -1]
        with pytest.raises(TypeError):
            store.vocabularies["w"] = words
    for call in (
        lambda: words.add([1]),
        lambda: words.lookup([1]),
        lambda: words.remove([1]),
        lambda: words.keys([0]),
        lambda: list(words),
        lambda: 1 in words,
        words.stats,
        lambda: table.lookup([1]),
        lambda: store.vocabularies,
        lambda: store.create_vocabulary("w", key_type="int64"),
        lambda: store.drop_vocabulary("v"),
    ):
        with pytest.raises(StoreClosedError):
            call()


def test_a_dropped_vocabulary_refuses_everything_until_a_rollback_brings_it_back(path):
    store = shardemb.open(path)
    words = store.create_vocabulary("v", key_type="string")
    words.add(["a"])
    store.commit()
    store.drop_vocabulary("v")
    for call in words.add, words.lookup, words.remove:
        with pytest.raises(VocabularyNotFoundError, match="vocabulary 'v' is no longer in the store"):
            call(["a"])
    for call in (lambda: words.keys([0]), lambda: list(words), lambda: "a" in words, words.stats):
        with pytest.raises(VocabularyNotFoundError):
            call()
    assert "v" not in store.vocabularies
    store.rollback()
    assert store.vocabularies["v"] is words
    assert words.add(["b", "a"]).tolist() == [1, 0]
    store.rollback()
    store.drop_vocabulary("v")
    store.commit()
    store.rollback()
    assert "v" not in store.vocabularies
    with pytest.raises(VocabularyNotFoundError):
        words.lookup(["a"])
    store.close()


def test_a_rollback_removes_a_vocabulary_that_was_never_committed(path):
    store = shardemb.open(path)
    words = store.create_vocabulary("v", key_type="string")
    words.add(["a"])
    store.create_table("t", vocabulary="v", embedding_dim=2)
    store.rollback()
    assert (list(store), list(store.vocabularies), store.has_changes) == ([], [], False)
    with pytest.raises(VocabularyNotFoundError):
        words.add(["a"])
    store.close()
    assert [each.name for each in (path / ".shardemb" / "tables").iterdir()] == []


def test_a_fork_may_look_up_keys_but_not_change_them(store, in_fork):
    words = store.create_vocabulary("v", key_type="int64")
    words.add([1, 2])

    def child():
        assert words.lookup([2, 3]).tolist() == [1, -1]
        assert words.keys([0]).tolist() == [1]
        with pytest.raises(ReadOnlyError):
            words.add([3])
        with pytest.raises(ReadOnlyError):
            words.remove([1])
        return len(words)

    assert in_fork(child) == 2
    assert words.add([3]).tolist() == [2]


def test_attributes_repr_and_stats(store):
    words = store.create_vocabulary("v", key_type="bytes", admission=shardemb.Admission(after=2, width=64))
    words.add([b"a", b"a", b"b"])
    assert repr(words) == "Vocabulary 'v': 1 bytes keys"
    assert "Vocabulary 'v': 1 bytes keys" in repr(store)
    assert (words.name, words.key_type, words.reserved) == ("v", "bytes", 0)
    assert words.admission == shardemb.Admission(after=2, width=64)
    store.commit()
    words.remove([b"a"])
    stats = words.stats()
    assert stats.items() >= {"keys": 0, "rows": 1, "rows_free": 1, "sightings": 3, "pairs": 1}.items()
    assert stats["index_bytes_in_memory"] > stats["index_bytes_on_disk"] == 0
    assert list(words) == []


# ---- lookups and concurrent changes -----------------------------------------------------------------------------


def once(patch, owner, name, action):
    """Call `action` right before the next call of a method."""
    real = getattr(owner, name)

    def call(*arguments, **options):
        patch.setattr(owner, name, real)
        action()
        return real(*arguments, **options)

    patch.setattr(owner, name, call)


def test_a_lookup_during_a_rollback_does_not_take_old_pairs_for_new_ones(store, monkeypatch):
    """As many pairs as keys means that each pair is that of a key, but only if both are counted at the same moment."""
    words = store.create_vocabulary("v", key_type="int64")
    words.add([1, 2, 3])
    store.commit()

    def change():
        words.add([4])
        store.rollback()
        words.add([5])

    real = key_rows.KeyRows.__len__

    def count(self):
        found = real(self)
        monkeypatch.setattr(key_rows.KeyRows, "__len__", real)
        change()
        return found

    monkeypatch.setattr(key_rows.KeyRows, "__len__", count)
    assert words.lookup([1, 4, 5]).tolist() == [0, -1, -1]  # the rows before the rollback
    assert words.lookup([1, 4, 5]).tolist() == [0, -1, 3]


def test_after_a_checkpoint_an_opening_indexes_few_keys(path, monkeypatch):
    monkeypatch.setattr(hash_index, "_QUICKLY_INDEXED", 100)
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64")
        words.add(np.arange(500))
        store.commit()
        words.add(np.arange(500, 600))  # not committed, but in the files nevertheless
        store.checkpoint()
        assert store.has_changes
        assert words.stats()["index_bytes_on_disk"] > 0
        with pytest.warns(RuntimeWarning, match="are lost"):
            store.close()
    with shardemb.open(path) as store:
        words = store.vocabularies["v"]
        assert inside.key_rows(words).index._open_pairs == 0
        assert words.lookup(np.arange(600)).tolist() == [*range(500), *[-1] * 100]
        assert words.add(np.arange(400, 700)).tolist() == list(range(400, 700))
        store.commit()
    with shardemb.open(path) as store:
        assert store.vocabularies["v"].lookup(np.arange(700)).tolist() == list(range(700))


def test_a_lookup_during_a_merge_finds_keys_behind_many_others(store, monkeypatch):
    """A merge leaves one of several equal pairs, so a lookup has to count candidates in one view of the index."""
    words = store.create_vocabulary("v", key_type="string")
    store.commit()
    for _ in range(3):
        words.add(["a"])
        store.rollback()
    words.add(["b", "a"])
    calls = itertools.count()

    def merge_later(*arguments):
        if next(calls) == 1:
            inside.key_rows(words).index.merge(hash_index.Coverage())
        return real(*arguments)

    real = key_tables.key_kernels.match_hashes
    monkeypatch.setattr(key_tables.key_kernels, "match_hashes", merge_later)
    assert words.lookup(["a"]).tolist() == [1]
    assert next(calls) == 4


def test_a_lookup_while_the_index_is_rebuilt(store, monkeypatch):
    monkeypatch.setattr(hash_index, "_STALE", 0)
    words = store.create_vocabulary("v", key_type="string")
    store.commit()
    for _ in range(3):
        words.add(["a"])
        store.rollback()
    words.add(["b", "a"])
    once(monkeypatch, key_tables.key_kernels, "match_hashes", store.commit)
    assert words.lookup(["a"]).tolist() == [1]
    assert len(inside.key_rows(words).index) == 2


# ---- changes that fail ------------------------------------------------------------------------------------------


class Failing:
    """Makes the n-th call of a function fail."""

    def __init__(self, patch, module, name, error):
        self.real, self.error, self.left = getattr(module, name), error, 0
        patch.setattr(module, name, self)

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.left == 0:
            raise self.error("it failed")
        return self.real(*arguments, **options)


@pytest.mark.parametrize(("key_type", "error"), [("int64", KeyboardInterrupt), ("string", DiskFullError)])
def test_a_change_that_fails_changes_nothing(path, small, monkeypatch, key_type, error):
    """Each change of rows that a call makes fails once, also the one that moves the ring of freed rows."""
    pool = pool_of(key_type, np.random.default_rng(0))
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type=key_type)
        table = store.create_table("t", vocabulary="v", embedding_dim=2, rows_per_shard=64)
        model = VocabularyModel()
        failing = Failing(monkeypatch, batch, "change", error)
        rng = np.random.default_rng(1)
        for turn in range(38):
            some = [pool[i] for i in rng.integers(0, len(pool), 120).tolist()]
            add = turn % 3 != 2 if turn < 30 else turn > 32
            if turn == 32:  # more than fit into the ring, whose content has wrapped around by then
                some = list(model.rows)
                assert (
                    inside.key_rows(words).entry.tail
                    > inside.session(store).tables.current["v@freed"].spec.num_embeddings
                )
            for failing.left in itertools.count(1):
                tried = failing.left
                try:
                    found = (words.add if add else words.remove)(some)
                except error:
                    assert len(words) == len(model.rows)
                    assert words.lookup(some).tolist() == model.lookup(some)
                    failing.left = tried
                    continue
                break
            assert found.tolist() == (model.add if add else model.remove)(some)
            model.assert_matches(words)
            if turn % 2:
                store.commit()
                model.commit()
        assert inside.session(store).tables.current["v@freed"].spec.num_embeddings > 512
        assert table.rows.num_embeddings >= words.num_rows
        failing.left = 0
        store.commit()
    with shardemb.open(path) as store:
        model.assert_matches(store.vocabularies["v"])
        assert store.verify() == []


def test_an_index_is_not_rebuilt_without_the_keys_that_came_since_the_commit(store, monkeypatch):
    """A commit releases the store's lock while it waits for a fold: another thread may add keys then."""
    monkeypatch.setattr(hash_index, "_STALE", -1000)  # each commit rebuilds it, if it may
    words = store.create_vocabulary("v", key_type="int64")
    words.add(range(20))
    store.commit()
    words.remove(range(19))
    commit = Journal.commit

    def commit_and_wait(self, *arguments):
        commit(self, *arguments)
        words.add(range(100, 125))  # 19 get rows of removed keys, the others new ones

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "commit", commit_and_wait)
        store.commit()
    expected = [19, *range(19), *range(20, 26)]
    assert words.lookup([19, *range(100, 125)]).tolist() == expected
    store.commit()
    assert words.lookup([19, *range(100, 125)]).tolist() == expected
    assert len(inside.key_rows(words).index) == len(words) == 26  # now it was rebuilt
