"""The index of a vocabulary can be lost, or be anything else: it is a hint, and what it does not know is learnt."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardemb
from shardemb import files, keyindex, keystore, vocabularies, vocabulary
from shardemb.errors import DiskFullError
from shardemb.keyindex import Coverage, KeyIndex
from shardemb.spec import PAGE, crc32

KEYS = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 300)
UUID = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(keyindex, "OPEN_PAIRS", (70, 70))  # of 300, so that some are in no file
    monkeypatch.setattr(keyindex, "PART_BITS", 5)
    monkeypatch.setattr(vocabulary, "SLICE_ROWS", 7)


def run(functions):
    for function in functions:
        function()


def new_index(path, *, writable=True):
    return KeyIndex(path, UUID, run, writable=writable)


def index_of(path):
    (found,) = (path / ".shardemb" / "vocabularies").glob("*-*")
    return found


def fill(path, keys=KEYS):
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64")
        words.add(keys)
        store.commit()
    return index_of(path)


def found(path, mode="a"):
    """How many keys a store finds, which knows all of them."""
    with shardemb.open(path, mode) as store:
        words = store.vocabularies["v"]
        assert words._check_index()
        rows = words.lookup(KEYS)
        assert set(rows.tolist()) <= {-1, *range(KEYS.size)}
        if mode == "a":
            assert words.add(KEYS).tolist() == list(range(KEYS.size))
            assert not store.has_changes
        return int((rows == np.arange(KEYS.size)).sum())


# ---- the file ---------------------------------------------------------------------------------------------------


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
    "a header that is no UTF-8": lambda data, rng: data.__setitem__(slice(0, 4), b"\xff\xfe\xff\xff"),
    "a header that is a list": lambda data, rng: data.__setitem__(slice(0, PAGE), b"[1]".ljust(PAGE)),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("mode", ["a", "r"])
def test_a_file_that_is_not_what_it_was_is_not_taken_up(path, damage, mode):
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
    """A header that is believed as far as its checksum goes."""
    header["crc32"] = crc32(header)
    file.write_bytes(json.dumps(header).encode().ljust(PAGE) + file.read_bytes()[PAGE:])


@pytest.mark.parametrize(
    "change",
    [
        {"uuid": UUID},
        {"format_version": 99},
        {"entries": 10**9},
        {"entries": -1},
        {"bits": 47},
        {"bits": 4000},
        {"parts": 9},
        {"coverage": {"commit": 2, "rows": 1, "head": 0}},
        {"coverage": {"commit": 1, "rows": 301, "head": 0}},
        {"coverage": {"commit": 1, "rows": 300, "head": 1}},
        {"coverage": {"commit": 1}},
        {"coverage": None},
    ],
)
def test_a_header_that_cannot_be_true_is_not_believed(path, change):
    file = fill(path)
    write_header(file, header_of(file) | change)
    assert found(path) == KEYS.size


def test_the_file_of_another_vocabulary_is_not_taken_up(path, tmp_path):
    file = fill(path)
    other = fill(tmp_path / "other", KEYS[::-1].copy())
    file.write_bytes(other.read_bytes())
    assert found(path) == KEYS.size


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_missing_file_is_made_anew_and_is_whole_then(path, times):
    # Learning merges on the way; the file that it leaves must not say that it knows what came after.
    fill(path).unlink()
    for _ in range(times):
        assert found(path) == KEYS.size
    assert index_of(path).exists()


def test_a_file_that_knows_less_is_completed(path):
    old = fill(path, KEYS[:160]).read_bytes()
    with shardemb.open(path) as store:
        words = store.vocabularies["v"]
        words.remove(KEYS[10:30])
        store.commit()
        words.add(KEYS[10:30])  # in rows that the file knows as those of the same keys, one after the other
        words.remove(KEYS[40:60])
        store.commit()
        words.add(KEYS[:300])
        store.commit()
        rows = words.lookup(KEYS)
    for _ in range(2):
        index_of(path).write_bytes(old)
        with shardemb.open(path) as store:
            assert store.vocabularies["v"].lookup(KEYS).tolist() == rows.tolist()


def test_a_file_that_cannot_be_read_is_not_needed(path):
    file = fill(path)
    file.unlink()
    file.mkdir()
    with shardemb.open(path, "r") as store:
        assert (store.vocabularies["v"].lookup(KEYS) >= 0).all()


@pytest.mark.parametrize("which", ["directory", "entries", "sums"])
def test_a_flipped_bit_is_told(path, which):
    file = fill(path)
    header = header_of(file)
    sound = file.read_bytes()
    entries = PAGE + -(-(2 ** header["bits"] + 1) * 8 // PAGE) * PAGE
    begin, end = {
        "directory": (PAGE, PAGE + (2 ** header["bits"] + 1) * 8),
        "entries": (entries, entries + 16 * header["entries"]),
        "sums": (len(sound) - 8 * (1 + 2 ** header["parts"]), len(sound)),
    }[which]
    rng = np.random.default_rng(0)
    with shardemb.open(path, "r") as store:
        assert store.vocabularies["v"]._check_index()
    for at in [begin, end - 1, *rng.integers(begin, end, 30).tolist()]:
        data = bytearray(sound)
        flip(data, at, int(rng.integers(8)))
        file.write_bytes(data)
        # Not even opened for lookups: where the entries lie is not known any more.
        index = KeyIndex(file, header["uuid"], run, writable=False)
        index.take_up(Coverage(1, 300, 0))
        assert len(index) == header["entries"]
        assert not index.check()


def test_a_file_that_is_replaced_while_it_is_opened_is_one_of_both(tmp_path, monkeypatch):
    """A reader beside a writer: the header is one file's, and what is mapped then must be of the same."""
    path = tmp_path / "index"
    hashes = np.random.default_rng(1).integers(0, 2**64, 200, np.uint64)
    writer = new_index(path)
    writer.add(hashes[:50], np.arange(50), Coverage(1, 50, 0))
    writer.add(hashes[50:90], np.arange(50, 90), Coverage(2, 50, 0))
    real = files.AddressRange

    def late(nbytes):
        monkeypatch.setattr(files, "AddressRange", real)
        writer.merge(Coverage(3, 90, 0))
        return real(nbytes)

    reader = new_index(path, writable=False)
    monkeypatch.setattr(files, "AddressRange", late)
    reader.take_up(Coverage(9, 1000, 0))
    assert writer.coverage == Coverage(3, 90, 0)
    assert (reader.coverage, len(reader)) in [
        (Coverage(), 0),
        (Coverage(1, 50, 0), 50),
        (Coverage(3, 90, 0), 90),
    ]
    assert reader.check()


# ---- pairs ------------------------------------------------------------------------------------------------------


def probe(index, hashes, skip=0, end=2**40):
    out = np.empty(hashes.size, np.int64)
    index.probe(hashes, skip, end, out, 0, hashes.size)
    return out.tolist()


def all_of(index, value, end=2**40):
    """All rows that an index names for a hash."""
    rows = []
    while (row := probe(index, np.array([value], np.uint64), len(rows), end)[0]) >= 0:
        rows.append(row)
    return rows


@settings(max_examples=50)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1, *range(5 << 60, (5 << 60) + 20)]),
                st.integers(0, 9),
            ),
            max_size=40,
        ),
        max_size=8,
    ),
    st.sampled_from([(1, 1), (4, 30), (64, 64)]),
    st.sampled_from([1, 64]),
    st.integers(0, 12),
)
def test_an_index_names_every_row_that_a_hash_was_added_with(tmp_path_factory, batches, limits, first, end):
    path = tmp_path_factory.mktemp("index") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keyindex, "OPEN_PAIRS", limits)
        patch.setattr(keyindex, "_FIRST_SLOTS", first)
        patch.setattr(keyindex, "PART_BITS", 3)
        patch.setattr(keyindex, "BUCKET_BITS", 1)
        index = new_index(path)
        expected, count = {}, 0
        for number, pairs in enumerate(batches):
            hashes = np.array([value for value, _ in pairs], np.uint64)
            index.add(hashes, np.array([row for _, row in pairs], np.int64), Coverage(number, number, 0))
            count += len(pairs)
            for value, row in pairs:
                expected.setdefault(value, set()).add(row)
        assert sum(map(len, expected.values())) <= len(index) <= count
        for value in [*expected, 7, 2**64 - 2]:
            wanted = expected.get(value, set())
            assert set(all_of(index, value)) == wanted
            assert set(all_of(index, value, end)) == {row for row in wanted if row < end}
        index.merge(Coverage(99, 99, 0))
        assert len(index) == sum(map(len, expected.values()))  # each once
        assert index.check()
        again = new_index(path)
        again.take_up(Coverage(99, 99, 0))
        assert again.coverage == Coverage(99, 99, 0)
        for value, wanted in expected.items():
            assert sorted(all_of(again, value)) == sorted(wanted)
        again = new_index(path)  # of an older commit: the file is too new
        again.take_up(Coverage(98, 99, 0))
        assert (len(again), again.coverage, again.nbytes[1]) == (0, Coverage(), 0)
        assert not path.exists()


def test_many_pairs(tmp_path, monkeypatch):
    monkeypatch.setattr(keyindex, "OPEN_PAIRS", (500, 5000))
    rng = np.random.default_rng(3)
    hashes = rng.integers(0, 2**64, 20_000, np.uint64)
    hashes[::7] >>= np.uint64(20)  # crowded at the beginning
    index = new_index(tmp_path / "file")
    for start in range(0, hashes.size, 999):
        index.add(hashes[start : start + 999], np.arange(start, min(start + 999, hashes.size)), Coverage())
    assert probe(index, hashes) == list(range(hashes.size))
    assert probe(index, ~hashes).count(-1) == hashes.size
    index.read_ahead(hashes)
    assert index.check()


@pytest.mark.parametrize("call", ["write", "sync", "publish", "sync_directory", "make_directory", "opened"])
def test_a_merge_that_fails_leaves_everything_as_it_was(path, monkeypatch, call):
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64")
        words.add(KEYS[:160])
        store.commit()
        real = getattr(files, call)

        def fail(*arguments, **options):
            if any("vocabularies" in str(each) for each in arguments):
                raise DiskFullError("no room")
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


def test_an_index_that_cannot_be_made_anew_stays(path, monkeypatch):
    monkeypatch.setattr(keyindex, "_STALE", 10)
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64")
        words.add(KEYS)
        store.commit()
        words.remove(KEYS[:200])
        real = files.publish

        def fail(target):
            if target.parent.name == "vocabularies":
                raise DiskFullError("no room")
            real(target)

        monkeypatch.setattr(files, "publish", fail)
        store.commit()
        assert len(words._index) == 300
        monkeypatch.setattr(files, "publish", real)
        store.commit()
        assert len(words._index) == 100
        assert words.lookup(KEYS).tolist() == [*[-1] * 200, *range(200, 300)]
        assert words.add(KEYS[:10]).tolist() == list(range(10))
        store.commit()
    with shardemb.open(path) as store:
        assert store.vocabularies["v"].lookup(KEYS).tolist() == [*range(10), *[-1] * 190, *range(200, 300)]


def test_the_ring_of_freed_rows_stays_as_long_as_it_has_to_be(path, monkeypatch):
    monkeypatch.setattr(keyindex, "OPEN_PAIRS", (2**20, 2**20))  # no file at all
    shapes = keystore.table_shapes
    monkeypatch.setattr(vocabularies, "table_shapes", lambda record: shapes(record) | {"freed": (100, 2, 64)})
    with shardemb.open(path) as store:
        words = store.create_vocabulary("v", key_type="int64")
        for turn in range(60):
            words.add(KEYS[:100] + turn)
            store.commit()
            words.remove(KEYS[:100] + turn)
            store.commit()
        assert store._tables.now["v@freed"].num_embeddings < 2000
        assert words.num_rows == 100
        words.add(KEYS)
        store.commit()
    with shardemb.open(path) as store:
        assert (np.sort(store.vocabularies["v"].lookup(KEYS)) == np.arange(300)).all()


def test_files_of_vocabularies_that_are_gone_go_with_the_next_opening(path):
    file = fill(path)
    stray = file.with_name("stray")
    stray.write_bytes(b"")
    with shardemb.open(path) as store:
        assert not stray.exists()
        store.drop_vocabulary("v")
        store.commit()
    with shardemb.open(path) as store:
        assert list(file.parent.iterdir()) == []
        assert sorted(os.listdir(path)) == [".shardemb", "zarr.json"]
