"""The vocabularies of a store: names, dropping, rollback, copies, other openings, and stores that lack one."""

import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
from support import inside
from support.power_loss import Recording
from support.small import make_small
from support.stores import close_quietly

import shardemb
from shardemb.errors import (
    FormatError,
    RowIdError,
    ShardEmbError,
    StaleReaderError,
    TableExistsError,
    TableNotFoundError,
    VocabularyExistsError,
    VocabularyNotFoundError,
)
from shardemb.format import store_paths
from shardemb.format.documents import crc32
from shardemb.format.manifest import Manifest
from shardemb.optim import SGD
from shardemb.storage import files
from shardemb.store.keyed_table import KeyedTable
from shardemb.store.table import Table


def bound(store, name="t", vocabulary="v", **more):
    return store.create_table(name, vocabulary=vocabulary, embedding_dim=2, **more)


# ---- names ------------------------------------------------------------------------------------------------------


def test_names_of_vocabularies_and_tables_are_independent(store):
    words = store.create_vocabulary("v", key_type="string")
    table = bound(store, "v")
    assert (store["v"], store.vocabularies["v"]) == (table, words)
    assert (list(store), len(store), list(store.vocabularies)) == (["v"], 1, ["v"])
    with pytest.raises(VocabularyExistsError, match="already has a vocabulary 'v'"):
        store.create_vocabulary("v", key_type="int64")
    with pytest.raises(TableExistsError):
        bound(store, "v")
    store.rename_table("v", "other")
    assert table.vocabulary is words
    assert table.lookup(["a"], create=True).tolist() == [[0, 0]]
    store.commit()
    assert {each["name"] for each in manifest_of(store.path)["tables"]} == {
        "other",
        "v@keys",
        "v@bytes",
        "v@freed",
    }


@pytest.mark.parametrize("name", ["v@keys", "@", "v@", "", "a/b", "-a", ".a", "a" * 65, None, 7])
def test_invalid_names_are_refused(store, name):
    with pytest.raises((TypeError, ValueError)):
        store.create_vocabulary(name, key_type="int64")
    assert (dict(store.vocabularies), store.has_changes) == ({}, False)


def test_tables_of_a_vocabulary_are_hidden_from_users(store):
    store.create_vocabulary("v", key_type="string")
    store.commit()
    for call in (
        lambda: store["v@keys"],
        lambda: store.drop_table("v@keys"),
        lambda: store.rename_table("v@keys", "w"),
        lambda: store.reshard("v@keys"),
        lambda: store.lookup({"v@keys": [0]}),
    ):
        with pytest.raises(TableNotFoundError):
            call()
    with pytest.raises(ValueError):
        store.create_table("v@keys", num_embeddings=3, embedding_dim=2)
    assert store.verify(["v@keys", "v@freed"]) == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"key_type": "int32"},
            ValueError,
            "key_type must be one of 'int64', 'string', 'bytes', got 'int32'",
        ),
        ({"key_type": None}, ValueError, "key_type must be one of"),
        ({"key_type": "int64", "admission": 3}, TypeError, r"admission must be a shardemb.Admission.*got 3"),
        ({"key_type": "int64", "reserved": -1}, ValueError, "reserved"),
        ({"key_type": "int64", "reserved": 1.5}, TypeError, "reserved"),
        ({"key_type": "int64", "reserved": 2**40}, ValueError, "reserved"),
    ],
)
def test_invalid_arguments_create_no_vocabulary(store, arguments, error, message):
    with pytest.raises(error, match=message):
        store.create_vocabulary("v", **arguments)
    assert (dict(store.vocabularies), store.has_changes) == ({}, False)
    assert not list((store.path / ".shardemb").glob("tables/*"))


def test_a_table_needs_either_an_existing_vocabulary_or_a_size(store):
    with pytest.raises(VocabularyNotFoundError, match="has no vocabulary 'v'; its vocabularies: none"):
        bound(store)
    store.create_vocabulary("w", key_type="int64")
    with pytest.raises(VocabularyNotFoundError, match="its vocabularies: 'w'"):
        bound(store)
    with pytest.raises(ValueError, match="either num_embeddings or the vocabulary"):
        store.create_table("t", embedding_dim=2, vocabulary="w", num_embeddings=3)
    with pytest.raises(ValueError, match="either num_embeddings or the vocabulary"):
        store.create_table("t", embedding_dim=2)
    assert list(store) == []


# ---- dropping ---------------------------------------------------------------------------------------------------


def test_a_vocabulary_with_tables_is_not_dropped(store):
    words = store.create_vocabulary("v", key_type="int64")
    bound(store, "t")
    bound(store, "u")
    store.create_table("free", num_embeddings=3, embedding_dim=2)
    store.commit()
    with pytest.raises(ShardEmbError, match="tables 't', 'u' are bound to vocabulary 'v'; drop them first"):
        store.drop_vocabulary("v")
    assert not store.has_changes
    words.add([1])
    store.drop_table("t")
    with pytest.raises(ShardEmbError, match="tables 'u' are bound"):
        store.drop_vocabulary("v")
    store.drop_table("u")
    store.drop_vocabulary("v")
    assert list(store) == ["free"]
    with pytest.raises(VocabularyNotFoundError, match="has no vocabulary 'v'"):
        store.drop_vocabulary("v")
    store.rollback()
    assert words.lookup([1]).tolist() == [-1]
    assert (store["t"].vocabulary, len(words)) == (words, 0)


def test_a_vocabulary_is_dropped_and_another_created_with_the_same_name(path):
    with shardemb.open(path) as store:
        old = store.create_vocabulary("v", key_type="int64")
        bound(store).lookup([1, 2], create=True)
        store.commit()
        store.drop_table("t")
        store.drop_vocabulary("v")
        new = store.create_vocabulary("v", key_type="string")
        assert bound(store).lookup(["x"], create=True).shape == (1, 2)
        store.rollback()
        assert store.vocabularies["v"] is old
        assert list(old) == [1, 2]
        with pytest.raises(VocabularyNotFoundError):
            new.add(["x"])
        store.drop_table("t")
        store.drop_vocabulary("v")
        store.create_vocabulary("v", key_type="string").add(["y"])
        store.commit()
    with shardemb.open(path) as store:
        assert list(store.vocabularies["v"]) == ["y"]
        assert list(store) == []
        assert store.verify() == []
        store.drop_vocabulary("v")
        store.commit()
    assert sorted(each.name for each in path.iterdir()) == [".shardemb", "zarr.json"]
    assert "vocabularies" not in manifest_of(path)


def test_a_vocabulary_that_finds_the_disk_full_leaves_nothing(store, monkeypatch):
    real = files.create_sparse

    def fail(path, nbytes):
        if "present" not in str(path) and len(list((store.path / ".shardemb" / "tables").iterdir())) == 2:
            raise shardemb.DiskFullError("disk full")
        real(path, nbytes)

    monkeypatch.setattr(files, "create_sparse", fail)
    with pytest.raises(shardemb.DiskFullError):
        store.create_vocabulary("v", key_type="string")
    monkeypatch.undo()
    assert (dict(store.vocabularies), store.has_changes) == ({}, False)
    assert not list((store.path / ".shardemb" / "tables").iterdir())
    assert store.create_vocabulary("v", key_type="string").add(["a"]).tolist() == [0]


# ---- several ----------------------------------------------------------------------------------------------------


def test_several_vocabularies_and_tables_in_one_commit(path):
    with shardemb.open(path) as store:
        users = store.create_vocabulary("users", key_type="int64", reserved=1)
        items = store.create_vocabulary("items", key_type="string")
        bound(store, "u", "users", optimizer=SGD(lr=1.0))
        bound(store, "i", "items", optimizer=SGD(lr=1.0))
        bound(store, "j", "items")
        users.add([7, 8])
        items.add(["a"])
        store.update(
            {"u": ([8, 7, 8], np.ones((3, 2), np.float32)), "i": (["a"], -np.ones((1, 2), np.float32))}
        )
        found = store.lookup({"u": [[7], [8]], "i": ["a", "a"], "j": []})
        assert found["u"].tolist() == [[[-1, -1]], [[-2, -2]]]
        assert found["i"].tolist() == [[1, 1], [1, 1]]
        assert found["j"].shape == (0, 2)
        with pytest.raises(
            shardemb.UnknownKeyError, match="key 9 at position 1 has no row in vocabulary 'users'"
        ):
            store.lookup({"i": ["a"], "u": [7, 9]})
        before = store["u"].step
        with pytest.raises(shardemb.UnknownKeyError):
            store.update({"u": ([7], np.ones((1, 2))), "i": (["b"], np.ones((1, 2)))})
        assert store["u"].step == before
        assert [type(store[name]) for name in ("u", "i")] == [KeyedTable] * 2
        assert type(store["u"].rows) is Table
        commit = store.commit()
    with shardemb.open(path, "r") as store:
        assert store.last_commit == commit
        assert list(store.vocabularies) == ["users", "items"]
        assert store["u"].vocabulary is store.vocabularies["users"]
        assert store["i"].vocabulary is store["j"].vocabulary is store.vocabularies["items"]
        assert store["u"] is store["u"]
        assert store["u"].lookup([8]).tolist() == [[-2, -2]]


# ---- readers ----------------------------------------------------------------------------------------------------


def test_a_refresh_shows_new_dropped_and_grown_vocabularies(path):
    with shardemb.open(path) as store:
        old = store.create_vocabulary("old", key_type="int64")
        words = store.create_vocabulary("v", key_type="string")
        bound(store)
        words.add(["a"])
        old.add([1])
        store.commit()
        with shardemb.open(path, "r") as reader:
            seen, gone, table = reader.vocabularies["v"], reader.vocabularies["old"], reader["t"]
            words.add(["b"])
            store.drop_vocabulary("old")
            new = store.create_vocabulary("new", key_type="bytes")
            new.add([b"x"])
            bound(store, "n", "new")
            store.commit()
            assert seen.lookup(["a", "b"]).tolist() == [0, -1]
            assert list(gone) == [1]
            reader.refresh()
            assert reader.vocabularies["v"] is seen
            assert reader["t"] is table
            assert table.vocabulary is seen
            assert seen.lookup(["a", "b"]).tolist() == [0, 1]
            with pytest.raises(VocabularyNotFoundError):
                gone.lookup([1])
            found = reader.vocabularies["new"]
            assert found.lookup([b"x", b"y"]).tolist() == [0, -1]
            assert list(found) == [b"x"]
            assert found.stats()["keys"] == 1
            assert inside.key_rows(found).check_index()
            assert reader["n"].lookup([b"x"]).shape == (1, 2)
            assert reader["n"].vocabulary is found
            new.add([b"y"])
            store.commit()
            reader.refresh()
            assert found.lookup([b"x", b"y"]).tolist() == [0, 1]
            assert reader.verify() == []
        with pytest.raises(shardemb.StoreClosedError):
            found.lookup([b"x"])


def test_a_reader_must_refresh_after_another_writer_opened_the_store(path):
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64")
        words.add([1])
        store.commit()
        reader = shardemb.open(path, "r")
    with shardemb.open(path) as store:
        store.vocabularies["v"].add([2])
        store.commit()
        with pytest.raises(StaleReaderError):
            list(reader.vocabularies["v"])
        reader.refresh()
        assert list(reader.vocabularies["v"]) == [1, 2]
        reader.close()


# ---- other openings and copies ----------------------------------------------------------------------------------


def test_a_copy_has_the_vocabularies_of_the_last_commit(path, tmp_path):
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="string")
        bound(store, optimizer=SGD(lr=1.0), counters=True)
        words.add(["a", "b", "c"])
        words.remove(["b"])
        store.commit()
        words.add(["d"])
        store.copy(tmp_path / "copy")
        store.rollback()
    with shardemb.open(tmp_path / "copy") as store:
        words = store.vocabularies["v"]
        assert list(words) == ["a", "c"]
        assert words.add(["e", "f"]).tolist() == [1, 3]
        assert store["t"].lookup(["a", "f"]).shape == (2, 2)
        store.commit()
        assert store.verify() == []


def test_a_new_store_in_place_of_another_has_none_of_its_vocabularies(path):
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="string").add(["a"])
        store.commit()
    with shardemb.open(path, "w") as store:
        assert dict(store.vocabularies) == {}
        assert store.create_vocabulary("v", key_type="string").add(["b"]).tolist() == [0]
        store.commit()
    with shardemb.open(path) as store:
        assert list(store.vocabularies["v"]) == ["b"]


def test_a_new_store_whose_creation_is_interrupted_opens_as_the_old_or_empty(path, tmp_path, monkeypatch):
    make_small(monkeypatch, random.Random(0))
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="string").add(["a"])
        bound(store, rows_per_shard=64)
        store.commit()
    kept = tmp_path / "kept"
    shutil.copytree(path, kept)
    recording = Recording(tmp_path)
    with recording.on():
        shardemb.open(path, "w").close()
    cut = len(recording.operations)
    assert cut > 10

    class Cut(BaseException):
        pass

    for number in range(0, cut, 2):
        shutil.rmtree(path)
        shutil.copytree(kept, path)
        recording = Recording(tmp_path)
        with recording.on(), pytest.MonkeyPatch.context() as patch:

            def add(*operation, recording=recording, number=number):
                if len(recording.operations) >= number:
                    raise Cut
                recording.operations.append(operation)

            patch.setattr(recording, "add", add)
            with pytest.raises(Cut):
                close_quietly(shardemb.open(path, "w"))
        with shardemb.open(path) as store:
            if store.vocabularies:
                assert list(store.vocabularies["v"]) == ["a"]
                assert list(store) == ["t"]
            else:
                assert list(store) == []


def manifest_of(path):
    return json.loads(store_paths.manifest(path).read_bytes())


@pytest.mark.parametrize(
    "change",
    [
        {"key_type": "int32"},
        {"key_type": None},
        {"rows": -1},
        {"rows": 1.5},
        {"head": 3},
        {"reserved": 99},
        {"name": "a/b"},
        {"uuid": "x"},
        {"admission": {"name": "Admission", "after": 0, "width": 16, "depth": 1}},
        {"admission": {"name": "Other"}},
        {"admission": 7},
        {"text_bytes": None},
        {"sightings": "1"},
    ],
)
def test_an_impossible_entry_is_refused(path, change):
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="string").add(["a", "b"])
        store.commit()
    document = manifest_of(path)
    (record,) = document["vocabularies"]
    for changed in ([record | change], [7], {"v": record}, "v", [{**record, "name": None}]):
        document["vocabularies"] = changed
        document["crc32"] = crc32(document)
        store_paths.manifest(path).write_bytes(json.dumps(document).encode())
        with pytest.raises(FormatError, match=r"manifest\.json"):
            shardemb.open(path)


@pytest.mark.parametrize("what", ["keys", "bytes", "freed"])
def test_a_store_that_lacks_a_table_of_its_vocabulary_names_it(path, what):
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="string").add(["a", "b"])
        store.commit()
    shutil.rmtree(path / f"v@{what}")
    with pytest.raises(FormatError, match=f"v@{what}"):
        shardemb.open(path)


def test_a_manifest_that_lacks_a_table_of_its_vocabulary_is_refused(path):
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="string").add(["a", "b"])
        bound(store)
        store.commit()
    sound = manifest_of(path)
    for changed in (
        {"tables": [each for each in sound["tables"] if each["name"] != "v@freed"]},
        {"vocabularies": []},
        {"vocabularies": sound["vocabularies"] * 2},
    ):
        document = sound | changed
        document["crc32"] = crc32(document)
        store_paths.manifest(path).write_bytes(json.dumps(document).encode())
        with pytest.raises(FormatError):
            shardemb.open(path)


def test_row_ids_of_bound_tables_reach_as_far_as_the_table(store):
    store.create_vocabulary("v", key_type="int64").add([1, 2])
    table = bound(store)
    assert table.num_embeddings == 2
    assert table.rows.lookup([1]).shape == (1, 2)
    with pytest.raises(RowIdError):
        table.lookup([9], missing=2)
    with pytest.raises(ShardEmbError, match="as large as its vocabulary needs; remove keys instead"):
        table.rows.resize(1, drop_rows=True)
    table.rows.resize(table.rows.num_embeddings + 1)
    assert table.lookup([1, 2]).shape == (2, 2)


# ---- entries that cannot be -------------------------------------------------------------------------------------

IMPOSSIBLE = {
    "rows": {"rows": 2**40},
    "a little more rows": {"rows": 2**24 + 1},
    "tail": {"tail": 2**40},
    "a little more tail": {"tail": 101},
    "head and tail": {"head": 2**60, "tail": 2**60 + 101},
    "more free rows than the ring has": {"rows": 2**21, "tail": 2**20 + 1},
    "reserved": {"reserved": 2**30},
    "reserved all": {"reserved": 100, "rows": 100, "tail": 1},
    "text_bytes": {"text_bytes": 2**61},
    "admission": {"admission": shardemb.Admission(after=2, width=2**22, depth=4)},
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("what", IMPOSSIBLE)
@pytest.mark.parametrize("mode", ["r", "a"])
def test_an_entry_that_cannot_be_is_refused_and_named(path, what, mode):
    admission = shardemb.Admission(after=1, width=1024, depth=2) if what == "admission" else None
    with shardemb.open(path) as store:
        words = store.create_vocabulary("words", key_type="string", admission=admission)
        words.add([f"{n}" for n in range(100)])
        store.commit()
    file = path / ".shardemb" / "manifest.json"
    manifest = Manifest.from_bytes(file.read_bytes())
    (entry,) = manifest.vocabularies
    file.write_bytes(
        dataclasses.replace(
            manifest, vocabularies=(dataclasses.replace(entry, **IMPOSSIBLE[what]),)
        ).to_bytes()
    )
    with pytest.raises(FormatError, match="'words'"):
        shardemb.open(path, mode)


# ---- renaming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_type", ["int64", "string"])
def test_a_renamed_vocabulary_keeps_its_keys(path, key_type):
    keys = [5, 6] if key_type == "int64" else ["a", "b"]
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type=key_type)
        table = bound(store)
        table.lookup(keys, create=True)
        store.commit()
        store.rename_vocabulary("v", "w")
        assert store.vocabularies["w"] is words is table.vocabulary
        assert "v" not in store.vocabularies
        words.add(keys[:1])
        store.rollback()
        assert list(store.vocabularies) == ["v"]
        assert words.lookup(keys).tolist() == [0, 1]
        store.rename_vocabulary("v", "w")
        store.create_vocabulary("v", key_type=key_type).add(keys[1:])
        store.commit()
        assert store.verify() == []
        assert sorted(each.name for each in path.glob("*@keys")) == ["v@keys", "w@keys"]
    with shardemb.open(path) as store:
        assert store.vocabularies["w"].lookup(keys).tolist() == [0, 1]
        assert store.vocabularies["v"].lookup(keys).tolist() == [-1, 0]
        assert store["t"].vocabulary.name == "w"
        assert store.verify() == []


def test_names_that_a_vocabulary_cannot_be_given(store):
    store.create_vocabulary("v", key_type="int64")
    store.create_vocabulary("w", key_type="int64")
    with pytest.raises(VocabularyExistsError):
        store.rename_vocabulary("v", "w")
    with pytest.raises(VocabularyNotFoundError):
        store.rename_vocabulary("x", "y")
    with pytest.raises(ValueError, match="name"):
        store.rename_vocabulary("v", "a/b")
    (store.path / "y@freed").mkdir()
    with pytest.raises(TableExistsError):
        store.rename_vocabulary("v", "y")
    assert list(store.vocabularies) == ["v", "w"]
    store.commit()


def test_a_reader_follows_a_renamed_vocabulary(path):
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="int64").add([5])
        store.commit()
        with shardemb.open(path, mode="r") as reader:
            words = reader.vocabularies["v"]
            store.rename_vocabulary("v", "w")
            store.commit()
            reader.refresh()
            assert reader.vocabularies["w"] is words
            assert words.lookup([5]) == [0]
