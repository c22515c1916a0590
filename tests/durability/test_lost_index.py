"""A store whose index was lost, damaged or replaced finds all its keys: an opening indexes what the files lack."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from support import inside

import shardemb
from shardemb.base.sizes import PAGE
from shardemb.errors import DiskFullError
from shardemb.format.documents import crc32
from shardemb.format.manifest import Manifest
from shardemb.session import vocabulary_catalog
from shardemb.storage import address_space, files
from shardemb.vocabulary import hash_index, key_rows, key_tables
from shardemb.vocabulary.hash_index import KeyIndex
from shardemb.vocabulary.index_files import Coverage

KEYS = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 300)
UUID = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(hash_index, "OPEN_PAIRS", (70, 70))  # of 300, so that some are in no file
    monkeypatch.setattr(hash_index, "PART_BITS", 6)
    monkeypatch.setattr(key_rows, "SLICE_ROWS", 7)


def run(functions):
    for function in functions:
        function()


def new_index(path, *, writable=True):
    return KeyIndex(path, UUID, run, writable=writable)


def index_of(path):
    folders = (path / ".shardemb" / "vocabularies").glob("*-*")
    (found,) = (folder for folder in folders if folder.suffix != ".new")
    return found


def fill(path, keys=KEYS):
    """Create a store with keys; return one of the parts of its index."""
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64")
        words.add(keys)
        store.commit()
    return sorted(index_of(path).iterdir())[1]


def found(path, mode="a"):
    """Open a store that has all keys; return how many of them it finds."""
    with shardemb.open(path, mode) as store:
        words = store.vocabularies["v"]
        assert inside.key_rows(words).check_index()
        rows = words.lookup(KEYS)
        assert set(rows.tolist()) <= {-1, *range(KEYS.size)}
        if mode == "a":
            assert words.add(KEYS).tolist() == list(range(KEYS.size))
            assert not store.has_changes
        return int((rows == np.arange(KEYS.size)).sum())


@pytest.mark.timeout(30)
def test_more_reassignments_than_the_ring_remembers_are_indexed_again(path):
    """However many an entry claims: an opening must end."""
    fill(path, KEYS[:150])
    with shardemb.open(path) as store:
        store.vocabularies["v"].add(KEYS[150:])  # merges files that claim to know a commit
        store.commit()
    file = path / ".shardemb" / "manifest.json"
    manifest = Manifest.from_bytes(file.read_bytes())
    (entry,) = manifest.vocabularies
    claimed = dataclasses.replace(entry, head=2**60, tail=2**60)
    file.write_bytes(dataclasses.replace(manifest, vocabularies=(claimed,)).to_bytes())
    assert found(path) == KEYS.size


# ---- damaged files ----------------------------------------------------------------------------------------------


def flip(data, at, bit):
    data[at] ^= 1 << bit


DAMAGES = {
    "cut to nothing": lambda data, rng: data.clear(),
    "cut": lambda data, rng: data.__delitem__(slice(int(rng.integers(1, len(data))), None)),
    "longer": lambda data, rng: data.extend(bytes(PAGE)),
    "noise": lambda data, rng: data.__setitem__(slice(None), rng.bytes(len(data))),
    "zeros": lambda data, rng: data.__setitem__(slice(None), bytes(len(data))),
    "a flipped bit of the header": lambda data, rng: flip(
        data, int(rng.integers(0, 200)), int(rng.integers(8))
    ),
    "a header that is not UTF-8": lambda data, rng: data.__setitem__(slice(0, 4), b"\xff\xfe\xff\xff"),
    "a header that is a list": lambda data, rng: data.__setitem__(slice(0, PAGE), b"[1]".ljust(PAGE)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("mode", ["a", "r"])
def test_a_damaged_file_is_ignored(path, damage, mode):
    file = fill(path)
    sound = file.read_bytes()
    for seed in range(10 if damage in ("cut", "noise", "a flipped bit of the header") else 1):
        data = bytearray(sound)
        DAMAGES[damage](data, np.random.default_rng(seed))
        file.write_bytes(data)
        assert found(path, mode) == KEYS.size


def header_of(file):
    return json.loads(file.read_bytes()[:PAGE])


def write_header(file, header):
    """Write a header with a valid checksum."""
    header["crc32"] = crc32(header)
    file.write_bytes(json.dumps(header).encode().ljust(PAGE) + file.read_bytes()[PAGE:])


@pytest.mark.parametrize(
    "change",
    [
        {"uuid": UUID},
        {"format_version": 99},
        {"entries": 10**9},
        {"entries": -1},
        {"pairs": 10**9},
        {"bits": 4000},
        {"bits": 9},
        {"number": 0},
        {"coverage": {"commit": 2, "rows": 1, "head": 0}},
        {"coverage": {"commit": 1, "rows": 301, "head": 0}},
        {"coverage": {"commit": 1, "rows": 300, "head": 1}},
        {"coverage": {"commit": 1}},
        {"coverage": None},
    ],
)
def test_an_impossible_header_is_ignored(path, change):
    file = fill(path)
    write_header(file, header_of(file) | change)
    assert found(path) == KEYS.size


def test_the_file_of_another_vocabulary_is_ignored(path, tmp_path):
    file = fill(path)
    other = fill(tmp_path / "other", KEYS[::-1].copy())
    file.write_bytes(other.read_bytes())
    assert found(path) == KEYS.size


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_missing_file_is_rebuilt_completely(path, times):
    # The index is merged while it is rebuilt. Files written on the way must not claim to cover what came later.
    fill(path).unlink()
    for _ in range(times):
        assert found(path) == KEYS.size
    assert index_of(path).exists()


def test_an_older_file_is_completed(path):
    fill(path, KEYS[:160])
    old = {file.name: file.read_bytes() for file in index_of(path).iterdir()}
    with shardemb.open(path) as store:
        words = store.vocabularies["v"]
        words.remove(KEYS[10:30])
        store.commit()
        words.add(KEYS[10:30])  # in the rows that the file has for the same keys
        words.remove(KEYS[40:60])
        store.commit()
        words.add(KEYS[:300])
        store.commit()
        rows = words.lookup(KEYS)
    index_of_old = index_of(path)
    for _ in range(2):
        shutil.rmtree(index_of_old)
        index_of_old.mkdir()
        for name, data in old.items():
            (index_of_old / name).write_bytes(data)
        with shardemb.open(path) as store:
            assert store.vocabularies["v"].lookup(KEYS).tolist() == rows.tolist()


def test_a_file_that_cannot_be_read_is_not_needed(path):
    file = fill(path)
    file.unlink()
    file.mkdir()
    with shardemb.open(path, "r") as store:
        assert (store.vocabularies["v"].lookup(KEYS) >= 0).all()


def test_a_file_that_is_replaced_while_it_is_opened_is_one_of_both(tmp_path, monkeypatch):
    """A reader reads a header while a writer replaces the file; what it maps then must belong to that header."""
    path = tmp_path / "index"
    hashes = np.random.default_rng(1).integers(0, 2**64, 200, np.uint64)
    writer = new_index(path)
    writer.add(hashes[:50], np.arange(50), Coverage(1, 50, 0))
    writer.add(hashes[50:90], np.arange(50, 90), Coverage(2, 50, 0))
    real = address_space.AddressRange

    def late(nbytes):
        monkeypatch.setattr(address_space, "AddressRange", real)
        writer.merge(Coverage(3, 90, 0))
        return real(nbytes)

    reader = new_index(path, writable=False)
    monkeypatch.setattr(address_space, "AddressRange", late)
    reader.load(Coverage(9, 1000, 0))
    assert writer.coverage == Coverage(3, 90, 0)
    assert (reader.coverage, len(reader)) in [
        (Coverage(), 0),
        (Coverage(1, 50, 0), 50),
        (Coverage(3, 90, 0), 90),
    ]
    assert reader.check()


@pytest.mark.parametrize("first", ["_open_pairs", "_level"])
def test_pairs_that_are_merged_while_they_are_counted_are_not_missed(tmp_path, first):
    class Merging(KeyIndex):
        """Is merged right after `len` has read the first of its two numbers."""

        armed = False

    def read(self):
        found = self.__dict__[first]
        if self.armed:
            self.armed = False
            self.merge(Coverage())
        return found

    setattr(Merging, first, property(read, lambda self, value: self.__dict__.__setitem__(first, value)))
    index = Merging(tmp_path / "file", UUID, run, writable=True)
    hashes = np.arange(20).astype(np.uint64)
    index.add(hashes[:10], np.arange(10), Coverage())
    index.merge(Coverage())
    index.add(hashes[10:], np.arange(10, 20), Coverage())
    index.armed = True
    assert len(index) >= 20
    assert len(index) == 20


@pytest.mark.parametrize("call", ["write", "sync", "rename", "sync_directory", "make_directory", "opened"])
def test_a_merge_that_fails_leaves_everything_as_it_was(path, monkeypatch, call):
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64")
        words.add(KEYS[:160])
        store.commit()
        real = getattr(files, call)

        def fail(*arguments, **options):
            if any("vocabularies" in str(each) for each in arguments):
                raise DiskFullError("disk full")
            return real(*arguments, **options)

        monkeypatch.setattr(files, call, fail)
        for _ in range(3):
            with pytest.raises(DiskFullError):
                words.add(KEYS[160:])
            assert len(words) == 160
            assert words.lookup(KEYS).tolist() == [*range(160), *[-1] * 140]
            assert not store.has_changes
        monkeypatch.setattr(files, call, real)
        assert words.add(KEYS).tolist() == list(range(300))
        assert not list(index_of(path).parent.glob("*.tmp"))
        store.commit()
    assert found(path) == KEYS.size


@pytest.mark.parametrize("call", ["write", "rename", "remove_tree"])
def test_an_index_that_cannot_be_rebuilt_stays(path, monkeypatch, call):
    monkeypatch.setattr(hash_index, "_STALE", 10)
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64")
        words.add(KEYS)
        store.commit()
        words.remove(KEYS[:200])
        real = getattr(files, call)

        def fail(*arguments):
            if any("vocabularies" in str(each) for each in arguments):
                raise DiskFullError("disk full")
            return real(*arguments)

        monkeypatch.setattr(files, call, fail)
        store.commit()
        assert len(inside.key_rows(words).index) == 300
        monkeypatch.setattr(files, call, real)
        store.commit()
        assert len(inside.key_rows(words).index) == 100
        assert words.lookup(KEYS).tolist() == [*[-1] * 200, *range(200, 300)]
        assert words.add(KEYS[:10]).tolist() == list(range(10))
        store.commit()
    with shardemb.open(path) as store:
        assert store.vocabularies["v"].lookup(KEYS).tolist() == [*range(10), *[-1] * 190, *range(200, 300)]


def test_the_ring_of_freed_rows_grows_no_longer_than_it_must(path, monkeypatch):
    monkeypatch.setattr(hash_index, "OPEN_PAIRS", (2**20, 2**20))  # no file at all
    shapes = key_tables.table_shapes
    monkeypatch.setattr(
        vocabulary_catalog, "table_shapes", lambda entry: shapes(entry) | {"freed": (100, 2, 64)}
    )
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64")
        for turn in range(60):
            words.add(KEYS[:100] + turn)
            store.commit()
            words.remove(KEYS[:100] + turn)
            store.commit()
        assert inside.session(store).tables.current["v@freed"].spec.num_embeddings < 2000
        assert words.num_rows == 100
        words.add(KEYS)
        store.commit()
    with shardemb.open(path) as store:
        assert (np.sort(store.vocabularies["v"].lookup(KEYS)) == np.arange(300)).all()


def test_an_opening_removes_the_files_of_dropped_vocabularies(path):
    file = fill(path)
    stray = file.with_name("stray")
    stray.write_bytes(b"")
    with shardemb.open(path) as store:
        assert not stray.exists()
        store.drop_vocabulary("v")
        store.commit()
    with shardemb.open(path) as store:
        assert list(file.parent.parent.iterdir()) == []
        assert sorted(os.listdir(path)) == [".shardemb", "zarr.json"]


# ---- the index before it was rebuilt ----------------------------------------------------------------------------


def reassign(store, keys, some, turns):
    """Give the rows of some of the keys to others, again and again; return the keys that there are then."""
    words = store.vocabularies["v"]
    for _ in range(turns):
        gone, new = keys[some], [max(keys) + 1 + n for n in range(20)]
        words.remove(gone)
        store.commit()
        words.add(new)
        keys = [key for key in keys if key not in gone] + new
        store.commit()
    return keys


def test_a_rebuilt_index_is_durable_before_its_predecessor_is_outdated(tmp_path, monkeypatch):
    """After a loss of power the old files could come back, which cannot be completed once the ring is used again."""
    monkeypatch.setattr(hash_index, "_STALE", 0)
    shapes = key_tables.table_shapes
    monkeypatch.setattr(
        vocabulary_catalog, "table_shapes", lambda entry: shapes(entry) | {"freed": (48, 2, 8)}
    )
    path, calls = tmp_path / "s", []
    relocate = KeyIndex.relocate

    def watched(index, folder):
        relocate(index, folder)
        calls.append("relocated")

    monkeypatch.setattr(KeyIndex, "relocate", watched)

    def watch(name):
        real = getattr(files, name)

        def call(*paths):
            calls.append((name, paths[-1].parent.name, paths[-1].name))
            real(*paths)

        monkeypatch.setattr(files, name, call)

    watch("rename")
    watch("sync_directory")
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="int64").add(np.arange(150))
        store.commit()
        keys = reassign(store, list(range(150)), slice(-20, None), 12)  # until the index is rebuilt
        index, at = index_of(path).name, calls.index("relocated")
        moved = max(k for k in range(at) if calls[k][0] == "rename" and calls[k][2] == index)
        assert ("sync_directory", ".shardemb", "vocabularies") in calls[moved:at]
        assert store.verify() == []
        assert (store.vocabularies["v"].lookup(keys) >= 0).all()


@pytest.mark.parametrize("mode", ["a", "r"])
def test_verify_reports_a_key_that_the_index_does_not_lead_to(path, monkeypatch, mode):
    fill(path)
    find = key_rows.KeyRows._find

    def lose_one(self, checked, hashes):
        rows = find(self, checked, hashes)
        rows[rows == 211] = -1
        return rows

    with shardemb.open(path, mode) as store:
        assert store.verify() == []
        monkeypatch.setattr(key_rows.KeyRows, "_find", lose_one)
        (damage,) = store.verify()
        assert damage.table == "v@keys"
        assert "lead to all keys" in damage.problem
