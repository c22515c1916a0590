"""The index against a dict of hash -> rows: adding, merging, opening its files again, and damaged files."""

import errno
import json
import os
import uuid
from contextlib import contextmanager

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st
from support.failures import Failing
from support.index_pairs import level
from support.references import HOSTILE

from shardemb.base.sizes import PAGE
from shardemb.errors import DiskFullError
from shardemb.format import documents
from shardemb.storage import files
from shardemb.vocabulary import hash_index, index_kernels
from shardemb.vocabulary.hash_index import KeyIndex
from shardemb.vocabulary.index_files import Coverage

LAST = 2**64 - 1
NAME, OTHER = (str(uuid.UUID(int=n, version=4)) for n in (1, 2))
ANY = 2**62  # an end below which all rows lie

few = st.sampled_from([0, 1, 5 << 60, (5 << 60) + 1, LAST - 1, LAST])
crowded = st.integers(5 << 60, (5 << 60) + 50)
edges = st.integers(1, 64).map(lambda n: (n << 58) - 1)  # the last of a part
hashes_ = few | crowded | edges | st.integers(LAST - 2**40, LAST) | st.integers(0, LAST)
batches_ = st.lists(st.lists(st.tuples(hashes_, st.integers(0, 30)), max_size=40), max_size=6)


def run(functions):
    for each in functions:
        each()


@contextmanager
def small(open_pairs=(8, 32), part_bits=6):
    """Make an index merge after a few pairs, into parts of a few entries, and insert by two threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hash_index, "PARALLEL_PAIRS", 5)
        patch.setattr(hash_index, "OPEN_PAIRS", open_pairs)
        patch.setattr(hash_index, "PART_BITS", part_bits)
        patch.setattr(hash_index, "_FIRST_BUCKETS", 4)
        yield


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vocabularies" / NAME


def new_index(path, *, writable=True):
    return KeyIndex(path, NAME, run, writable=writable)


def opened(path, now=Coverage(10, ANY, ANY), *, writable=False):  # noqa: B008
    index = new_index(path, writable=writable)
    index.load(now)
    return index


def add(index, pairs, coverage=Coverage()):  # noqa: B008
    values, rows = (
        np.array([value for value, _ in pairs], np.uint64),
        np.array([row for _, row in pairs], np.int64),
    )
    index.add(values, rows, coverage)


def rows_of(index, values, end=ANY):
    """Return all rows of each hash, as `skip` lists them."""
    values, find = np.array(values, np.uint64).reshape(-1), index.view.probe
    found = [[] for _ in range(values.size)]
    for skip in range(1000):
        out = np.full(values.size, -7, np.int64)
        find(values, skip, end, out, 0, values.size)
        for rows, row in zip(found, out.tolist(), strict=True):
            if row >= 0:
                assert len(rows) == skip
                rows.append(row)
        if (out < 0).all():
            assert (out == -1).all()
            return found
    raise AssertionError


def assert_holds(index, pairs, end=ANY):
    """Assert that an index names the rows below `end` that a dict has for each hash, and no others."""
    model = {value: set() for value in (0, 2, LAST // 3, LAST)}
    for value, row in pairs:
        model.setdefault(value, set())
        if row < end:
            model[value].add(row)
    found = dict(zip(model, rows_of(index, list(model), end), strict=True))
    assert {value: set(rows) for value, rows in found.items()} == model
    return found


# ---- adding and merging -----------------------------------------------------------------------------------------


@given(
    batches_,
    st.sampled_from([2, 8, 1000]),
    st.sampled_from([4, 6, 30]),
    st.integers(0, 31),
)
@example([[(LAST, row) for row in range(30)]] * 3, 8, 4, 31)
@example([[(5 << 60, row) for row in range(31)], [(0, 1)]], 8, 4, 20)
@example([[(n, n) for n in range(40)]], 8, 4, 31)  # all in the first part
@example([[(n << 58, n) for n in range(31)]], 8, 4, 31)
def test_an_index_names_the_rows_that_a_dict_has(tmp_path_factory, batches, most, bits, end):
    path = tmp_path_factory.mktemp("index") / NAME
    pairs = []
    with small((most, 4 * most), bits):
        index = new_index(path)
        for batch in batches:
            add(index, batch)
            pairs += batch
            assert_holds(index, pairs, end)
            assert len(index) >= len(set(pairs))
        index.merge(Coverage(3, 2, 1))
        found = assert_holds(index, pairs)
        # Each pair is there once, however often it was added.
        assert all(len(rows) == len(set(rows)) for rows in found.values())
        assert len(index) == len(set(pairs))
        assert index.check()
        again = opened(path)
        assert again.coverage == Coverage(3, 2, 1)
        assert_holds(again, pairs, end)
        assert len(again) == len(index)
        assert again.check()


def test_what_is_in_memory_is_a_share_of_what_is_on_disk(path):
    """The table grows to no more pairs than one merge takes; the larger the files, the more these are."""
    with small((100, 1000), part_bits=14):
        index, sizes = new_index(path), []
        for start in range(0, 20_000, 10):
            add(index, [((n * 0x9E3779B97F4A7C15) % 2**64, n) for n in range(start, start + 10)])
            sizes.append((len(index), index._open_pairs, index.nbytes[0]))
        assert all(held < max(100, min(total / 3, 1000)) for total, held, _ in sizes)
        assert max(nbytes for *_, nbytes in sizes) <= 17 * (1000 / 0.75 + 1)
        assert index.nbytes[1] > 16 * 19_000
        assert_holds(index, [((n * 0x9E3779B97F4A7C15) % 2**64, n) for n in range(20_000)])


def test_a_checkpoint_writes_pairs_that_would_take_long_to_index(path, monkeypatch):
    monkeypatch.setattr(hash_index, "_QUICKLY_INDEXED", 20)
    pairs = [((n * 0x9E3779B97F4A7C15) % 2**64, n) for n in range(700)]
    with small((10**6, 10**6), part_bits=8):
        index, written = new_index(path), []
        for start, stop in ((0, 20), (20, 21), (21, 600), (600, 637), (637, 638)):
            add(index, pairs[start:stop])
            index.checkpoint(Coverage(1, stop, 0))
            written.append(index.coverage.rows)
            assert_holds(index, pairs[:stop])
        assert written == [0, 21, 600, 600, 638]
        reader = opened(path)
        add(reader, pairs)
        reader.checkpoint(Coverage(2, 700, 0))
        assert reader.coverage.rows == 638
        with (path / "02-1").open("r+b") as file:
            os.pwrite(file.fileno(), b"\xff", PAGE + 5)
        add(index, pairs[638:])
        for _ in range(2):
            index.checkpoint(Coverage(2, 700, 0))
            assert index.coverage.rows == 638
        assert index.is_stale(700)


def test_an_index_that_may_not_write_keeps_all_in_memory(path):
    with small():
        index = new_index(path, writable=False)
        pairs = [(n << 50, n) for n in range(1000)]
        add(index, pairs)
        assert_holds(index, pairs)
    assert not path.exists()
    assert not index.has_files


def test_hashes_that_begin_alike_are_merged_too(path):
    """There are more of them than may lie near one bucket, so that the table gets a salt."""
    pairs = [((7 << 40) + n * 7919 % 5000, n) for n in range(3 * index_kernels.MAX_DISTANCE)]
    pairs += [(n << 50, n) for n in range(99)] + [((n << 58) - 1, n) for n in range(1, 65)]
    with small((10**6, 10**6), part_bits=6):
        index = new_index(path)
        add(index, pairs[:2000])
        add(index, pairs[2000:])
        assert index._table.salt
        assert_holds(index, pairs)
        index.merge(Coverage())
        assert not index._table.salt
        add(index, pairs[:5])
        assert_holds(index, pairs)
        assert len(index) == len(set(pairs)) + 5
        assert index.check()
        assert_holds(opened(path), pairs)


def test_each_salt_is_new_and_none_is_zero():
    assert 0 not in {int(hash_index.new_salt()) for _ in range(10)}
    assert len({int(hash_index.new_salt()) for _ in range(10)}) == 10


def test_parts_merged_concurrently_are_the_same_as_one_by_one(path, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    pairs = [((n * 0x9E3779B97F4A7C15) % 2**64, n) for n in range(3000)]
    with small((10**6, 10**6), part_bits=4), ThreadPoolExecutor(3) as pool:
        for where, how in (
            (path, run),
            (tmp_path / "other", lambda functions: list(pool.map(lambda f: f(), functions))),
        ):
            index = KeyIndex(where, NAME, how, writable=True)
            for some in (pairs[:1000], pairs[1000:]):
                add(index, some)
                index.merge(Coverage())
    assert contents(path) == contents(tmp_path / "other")
    assert len(contents(path)) == 256


def contents(path):
    return {each.name: each.read_bytes() for each in path.iterdir()}


def test_the_files_are_what_their_docstring_says(path):
    pairs = sorted([(n << 57, n) for n in range(100)] + [(3 << 57, 7)])
    with small((1000, 1000), part_bits=4):
        index = new_index(path)
        add(index, pairs)
        index.merge(Coverage(1, 2, 3))
    spans, entries, _ = level(pairs, 3, deep=range(4))
    assert sorted(contents(path)) == [f"03-{number}" for number in range(8)]
    for number, (begin, homes, end, bits) in enumerate(spans.tolist()):
        data = (path / f"03-{number}").read_bytes()
        header = json.loads(data[:PAGE])
        own = entries[begin:end]
        assert header == {
            "format_version": 1,
            "uuid": NAME,
            "bits": 3,
            "number": number,
            "pairs": sum(value >> 61 == number for value, _ in pairs),
            "homes": homes,
            "entries": end - begin,
            "coverage": {"commit": 1, "rows": 2, "head": 3},
            "checksum": xxhash.xxh3_64_intdigest(own.tobytes()) if own.size else 0,
            "crc32": documents.crc32(header),
        }
        assert bits == 3
        assert data[PAGE:] == own.tobytes()
        assert own[:, 0].tolist() == sorted(own[:, 0].tolist())


def test_parts_are_replaced_one_by_one_and_each_state_is_a_whole_index(path, tmp_path):
    """As a crash may leave them: some new, some old, and parts of longer prefixes next to those that they replace."""
    from shardemb.vocabulary import index_files

    pairs = [((n * 0x9E3779B97F4A7C15) % 2**64, n) for n in range(600)]
    states = []
    with small((10**6, 10**6), part_bits=6), pytest.MonkeyPatch.context() as patch:
        index = new_index(path)
        add(index, pairs[:200])
        index.merge(Coverage(1, 200, 0))
        for name in ("rename", "remove", "write"):
            real = getattr(files, name)

            def recorded(*arguments, real=real):
                real(*arguments)
                states.append(contents(path))

            patch.setattr(files, name, recorded)
        known = Coverage(2, 600, 0)
        add(index, pairs[200:])
        index.merge(known)
    assert {name[:2] for name in states[-1]} == {"04"}
    assert {frozenset(name[:2] for name in each if "tmp" not in name) for each in states} >= {
        frozenset({"02", "04"})
    }
    found = set()
    for number, state in enumerate(states):
        folder = tmp_path / str(number) / NAME
        folder.mkdir(parents=True)
        for name, data in state.items():
            (folder / name).write_bytes(data)
        again = opened(folder, writable=number % 2 == 0)
        found.add(again.coverage)
        assert again.check()
        assert len(again) >= len(pairs[:200])
        holds = rows_of(again, [value for value, _ in pairs])
        rows = again.coverage.rows
        assert holds[:rows] == [[row] for row in range(rows)]
        assert all(some in ([], [row]) for row, some in enumerate(holds))
        assert number % 2 or sorted(contents(folder)) == sorted(part.name for part in again._level.parts)
        add(again, pairs)
        if again._writable:
            again.merge(known)
            assert len(again) == 600
            assert again.check()
            assert_holds(opened(folder), pairs)
    assert found == {Coverage(1, 200, 0), known}
    assert index_files.assign_prefixes([]) is None


@pytest.mark.parametrize("sample", [1, 32])
def test_reading_ahead_changes_nothing(path, sample, monkeypatch):
    monkeypatch.setattr(hash_index, "SAMPLES", sample)
    pairs = [((n * 0x9E3779B97F4A7C15) % 2**64, n) for n in range(3000)]
    with small((10**6, 10**6)):
        index = new_index(path)
        index.view.read_ahead(np.arange(3, dtype=np.uint64))
        add(index, pairs)
        index.merge(Coverage())
    monkeypatch.setattr(hash_index, "_are_resident", lambda array, places: False)
    index.view.read_ahead(np.array([value for value, _ in pairs] + [0, LAST], np.uint64))
    index.view.read_ahead(np.empty(0, np.uint64))
    assert_holds(index, pairs)


def test_a_view_keeps_its_order_of_rows(path):
    """When a table grows, rows of one hash that had wrapped around change order. A lookup could then skip one."""
    with small((1000, 1000)):
        index = new_index(path)
        add(index, [(LAST, 1), (LAST, 2), (LAST, 3)])
        find, before = index.view.probe, rows_of(index, [LAST])
        add(index, [(n << 57, n) for n in range(100)])
        assert rows_of(index, [LAST]) != before
        index.merge(Coverage())
    for skip, row in enumerate([*before[0], -1]):
        out = np.zeros(1, np.int64)
        find(np.array([LAST], np.uint64), skip, ANY, out, 0, 1)
        assert out[0] == row


# ---- opening files ----------------------------------------------------------------------------------------------


@pytest.fixture
def written(path):
    """A folder of some parts, and their pairs."""
    pairs = [((n * 0x9E3779B97F4A7C15) % 2**64, n) for n in range(300)]
    with small((1000, 1000), part_bits=6):
        index = new_index(path)
        add(index, pairs)
        index.merge(Coverage(5, 300, 7))
    assert sorted(contents(path)) == [f"03-{number}" for number in range(8)]
    return path, pairs


@pytest.mark.parametrize(
    ("now", "is_opened"),
    [
        (Coverage(5, 300, 7), True),
        (Coverage(6, 400, 8), True),
        (Coverage(4, 300, 7), False),
        (Coverage(5, 299, 7), False),
        (Coverage(5, 300, 6), False),
    ],
)
def test_a_file_that_knows_more_than_the_commit_is_refused(written, now, is_opened):
    path, pairs = written
    index = opened(path, now)
    assert index.has_files == is_opened
    assert index.coverage == (Coverage(5, 300, 7) if is_opened else Coverage())
    assert_holds(index, pairs if is_opened else [])
    assert path.exists()
    opened(path, now, writable=True)
    assert path.exists() == is_opened  # or a later commit might trust it


def test_the_file_of_another_vocabulary_is_refused(written):
    path, _ = written
    index = KeyIndex(path, OTHER, run, writable=False)
    index.load(Coverage(10, ANY, ANY))
    assert (index.has_files, len(index)) == (False, 0)


def test_an_index_is_empty_without_a_folder_or_with_a_file_in_its_place(path):
    assert len(opened(path)) == 0
    path.parent.mkdir()
    path.write_bytes(b"")
    assert len(opened(path)) == 0
    index = opened(path, writable=True)
    assert not path.exists()
    add(index, [(1, 2)])
    index.merge(Coverage())
    assert_holds(opened(path), [(1, 2)])


@pytest.mark.parametrize("number", range(8))
def test_no_part_is_trusted_if_one_is_missing(written, number):
    path, _ = written
    (path / f"03-{number}").unlink()
    assert not opened(path).has_files
    assert not opened(path, writable=True).has_files
    assert not path.exists()


def test_a_writer_removes_what_a_crash_left_behind(written):
    path, pairs = written
    (path / "03-1.tmp").write_bytes(b"half")
    (path / ".nfs000").write_bytes(b"")
    (path / "03-9").mkdir()
    assert_holds(opened(path), pairs)
    assert (path / "03-1.tmp").exists()
    assert_holds(opened(path, writable=True), pairs)
    assert len(os.listdir(path)) == 8


def test_a_file_cut_short_or_longer_is_refused(written):
    path, _ = written
    path /= "03-2"
    data = path.read_bytes()
    cuts = {*range(0, len(data), 61), *range(PAGE - 2, PAGE + 2), *range(len(data) - 80, len(data))}
    for length in sorted(cuts):
        path.write_bytes(data[:length])
        assert not opened(path.parent).has_files, length
    path.write_bytes(data + b"\0")
    assert not opened(path.parent).has_files


def test_a_flip_in_the_header_is_refused(written):
    """A bit of each byte of the JSON is flipped, each bit somewhere, and all of some bytes at its end and behind it."""
    path, _ = written
    path /= "03-2"
    data = path.read_bytes()
    end = len(data[:PAGE].rstrip())
    with path.open("r+b") as file:
        for at in [*range(end + 3), PAGE - 1]:
            for bit in range(8) if at > end - 3 else [at % 8]:
                os.pwrite(file.fileno(), bytes([data[at] ^ 1 << bit]), at)
                assert not opened(path.parent).has_files, (at, bit)
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert opened(path.parent).has_files


FIELDS = [
    "format_version",
    "uuid",
    "bits",
    "number",
    "pairs",
    "homes",
    "entries",
    "coverage",
    "checksum",
    "crc32",
]


@pytest.mark.parametrize("name", FIELDS)
def test_a_false_header_with_a_valid_checksum_is_refused(written, name):
    path, _ = written
    path /= "03-2"
    data = path.read_bytes()
    sound = json.loads(data[:PAGE])
    for value in HOSTILE:
        lying = sound | {name: value}
        if name != "crc32":
            lying["crc32"] = documents.crc32(lying)
        head = json.dumps(lying).encode()
        is_one = name == "format_version" and value is not True and value == 1
        could_be = name in ("pairs", "homes", "checksum") and type(value) is int
        if len(head) <= PAGE and not is_one and not could_be:
            path.write_bytes(head.ljust(PAGE) + data[PAGE:])
            assert not opened(path.parent).has_files, value


# ---- damage that shows later ------------------------------------------------------------------------------------


def flips(data, start, stop, step=1):
    """Yield copies of a file with one bit flipped, each in another byte."""
    for n, at in enumerate(range(start, stop, step)):
        yield at, data[:at] + bytes([data[at] ^ 1 << n % 8]) + data[at + 1 :]


def test_more_pairs_than_entries_or_far_too_many_buckets_are_refused(written):
    path, _ = written
    path /= "03-2"
    data = path.read_bytes()
    for name in ("pairs", "homes"):
        lying = json.loads(data[:PAGE])
        for value in (lying["entries"] + 1 if name == "pairs" else 2**40 + 1, -1, 2**62, "9", None):
            lying[name] = value
            lying["crc32"] = documents.crc32(lying)
            path.write_bytes(json.dumps(lying).encode().ljust(PAGE) + data[PAGE:])
            assert not opened(path.parent).has_files, value


@pytest.mark.parametrize("homes", [0, 1, 2**40])
def test_a_false_number_of_buckets_leads_to_no_other_row(written, homes):
    path, pairs = written
    path /= "03-2"
    data = path.read_bytes()
    lying = json.loads(data[:PAGE]) | {"homes": homes}
    lying["crc32"] = documents.crc32(lying)
    path.write_bytes(json.dumps(lying).encode().ljust(PAGE) + data[PAGE:])
    index = opened(path.parent)
    for (value, row), found in zip(pairs, rows_of(index, [value for value, _ in pairs]), strict=True):
        assert found == [row] or (found == [] and value >> 61 == 2)


def test_flips_in_the_entries_are_found_by_check_and_do_no_harm(written):
    """A lookup may miss a key, but it reads nothing beyond the file and returns no impossible row."""
    path, pairs = written
    path /= "03-2"
    data = path.read_bytes()
    values = [value for value, _ in pairs] + [0, LAST]
    for at, damaged in flips(data, PAGE, len(data), 3):
        path.write_bytes(damaged)
        index = opened(path.parent)
        assert index.has_files, at
        assert not index.check(), at
        for rows in rows_of(index, values, 1000):
            assert all(0 <= row < 1000 for row in rows)
        index.view.read_ahead(np.array(values, np.uint64))


def test_a_file_that_changes_in_place_is_found_by_check(written):
    path, _ = written
    index = opened(path)
    assert index.check()
    with (path / "03-7").open("r+b") as file:
        file.write(b"[")
    assert not index.check()


@pytest.mark.parametrize("part_bits", [6, 4])  # as many parts as before, and four times as many
def test_a_damaged_file_is_not_merged_into_a_sound_one(written, part_bits):
    """If it lacks a key, the new file would lack it, too, under a valid checksum."""
    path, _ = written
    with (path / "03-5").open("r+b") as file:
        os.pwrite(file.fileno(), b"\xff", PAGE + 5)
    damaged = (path / "03-5").read_bytes()
    more = [(n << 40, 1000 + n) for n in range(500)]
    with small((100, 100), part_bits):
        index = opened(path, writable=True)
        assert not index.is_stale(300)
        add(index, more)
        assert (path / "03-5").read_bytes() == damaged
        assert index.is_stale(300)
        assert {row for rows in rows_of(index, [value for value, _ in more]) for row in rows} >= set(
            range(1000, 1500)
        )
        assert not list(path.glob("*.tmp"))
    assert not opened(path).check()


# ---- failures while merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "error", "short"])
@pytest.mark.parametrize("part_bits", [6, 5])
def test_nothing_is_lost_if_new_files_cannot_be_written(written, kind, part_bits):
    path, pairs = written
    more = [(n << 50, 1000 + n) for n in range(60)]
    with small((1000, 1000), part_bits):
        index = opened(path, writable=True)
        add(index, more)
        for at in range(1, 200):
            failing = Failing(at, kind)
            try:
                with failing.on():
                    index.merge(Coverage(6, 301, 7))
                break
            except (DiskFullError, OSError) as error:
                assert kind != "full" or error.errno == errno.ENOSPC
            assert_holds(index, pairs + more)
            assert len(index) >= len(pairs) + len(more)
            assert index.check()
            assert not list(path.glob("*.tmp"))
            again = opened(path)
            assert again.coverage in (Coverage(5, 300, 7), Coverage(6, 301, 7))
            assert {row for rows in rows_of(again, [value for value, _ in pairs]) for row in rows} >= set(
                range(300)
            )
        assert at > 30
        assert failing.failed is None
        assert index.coverage == Coverage(6, 301, 7)
        assert_holds(index, pairs + more)
        assert len(index) == len(pairs) + len(more)
        assert_holds(opened(path), pairs + more)


def test_pairs_that_could_not_be_merged_can_be_added_again(path, monkeypatch):
    def full(*given):
        raise DiskFullError(errno.ENOSPC, "no space left on the disk")

    with small((100, 100)):
        index = new_index(path)
        pairs = [((n * 0x9E3779B97F4A7C15) % 2**64, n) for n in range(250)]
        with monkeypatch.context() as patch:
            patch.setattr(files, "write", full)
            for _ in range(3):
                with pytest.raises(DiskFullError):
                    add(index, pairs)
        assert len(index) == 100
        add(index, pairs)
        assert_holds(index, pairs)


# ---- when to rebuild --------------------------------------------------------------------------------------------


def test_an_index_is_stale_when_more_than_half_of_its_pairs_are_useless(path, monkeypatch):
    monkeypatch.setattr(hash_index, "_STALE", 10)
    index = new_index(path)
    add(index, [(n, n) for n in range(30)])
    assert [index.is_stale(live) for live in (0, 9, 10, 30)] == [True, True, False, False]


def test_a_rebuilt_index_takes_the_place_of_the_old_one(written):
    path, pairs = written
    old = opened(path, writable=True)
    with small((1000, 1000), 8):  # it has fewer parts
        fresh = old.empty_copy()
        add(fresh, pairs[:100])
        fresh.merge(Coverage(7, 100, 0))
        assert_holds(opened(path), pairs)
        fresh.relocate(old.retire())
        assert_holds(opened(path), pairs[:100])
        assert os.listdir(path.parent) == [NAME]
        add(fresh, pairs[100:])
        fresh.merge(Coverage(8, 300, 0))
        assert_holds(opened(path), pairs)
        add(old, [(7, 7)] * 1500)  # it writes no more files, but still finds all pairs
        assert_holds(opened(path), pairs)
        assert set(range(300)) <= {
            row for rows in rows_of(old, [value for value, _ in pairs]) for row in rows
        }
        assert old.is_stale(10**6)


def test_a_rebuilt_index_without_files_removes_those_of_the_old_one(written):
    path, pairs = written
    old = opened(path, writable=True)
    fresh = old.empty_copy()
    add(fresh, pairs[:10])
    fresh.relocate(old.retire())
    assert os.listdir(path.parent) == []
    fresh.merge(Coverage(7, 10, 0))
    assert_holds(opened(path), pairs[:10])


def test_the_files_of_an_abandoned_index_are_removed(written):
    path, pairs = written
    fresh = opened(path).empty_copy()
    fresh._writable = True
    add(fresh, pairs)
    fresh.merge(Coverage())
    assert len(os.listdir(path.parent)) == 2
    fresh.remove_files()
    assert os.listdir(path.parent) == [NAME]
