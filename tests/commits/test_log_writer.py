"""The image log as it is written and read: round trips, torn ends, damage, full disks."""

import random
import shutil
import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.log_files import HEADER, independent, rewrite
from support.specs import make

from shardemb.base.sizes import PAGE
from shardemb.commits import log_reader, log_writer
from shardemb.commits.log_writer import Log, in_order, needed_bytes
from shardemb.errors import DiskFullError, FormatError, LogDamagedError
from shardemb.format.manifest import Commit, Manifest, TableEntry
from shardemb.storage import files

STORE, OTHER = "0b7a4d5e-93a7-4a8e-8b61-2f1f6a6f0c00", "0b7a4d5e-93a7-4a8e-8b61-2f1f6a6f0c01"
SPEC = make(1000, 6)
TABLE = SPEC.uuid
BASE = Manifest(STORE, epoch=3, segment=5, sequence=11, attempt=7)


def manifest_of(number, base=BASE):
    return Manifest(
        base.uuid,
        epoch=base.epoch,
        segment=base.segment,
        sequence=base.sequence,
        attempt=base.attempt,
        commit=Commit(number, number, {}),
        tables=(TableEntry(TABLE, "t", number, None),),
    )


def append(log, ids, value, spec=SPEC):
    """Append the images of an attempt, but no commit record; rows hold `value` and their id."""
    ids = np.array(ids, np.int64)
    records = np.full((ids.size, spec.width), value, np.float32)
    records[:, 0] = ids

    def pack(start, stop, address):
        np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float * records[start:stop].size).from_address(address))[
            :
        ] = records[start:stop].ravel()

    log.append_images(spec.uuid, ids.size, spec.record_bytes, in_order(ids, pack))


def commit(log, ids, number, spec=SPEC):
    payload = manifest_of(number).to_bytes()
    log.begin(needed_bytes([(len(ids), spec.record_bytes)] if ids else [], len(payload)))
    if ids:
        append(log, ids, number, spec)
    log.append_commit(payload)


def rows_of(found, spec=SPEC):
    """Map rows to the value that the image of each holds in memory."""
    images = found.images(spec)
    values = {}
    for row, address in zip(images.ids.tolist(), images.addresses.tolist(), strict=True):
        record = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float * spec.width).from_address(address))
        assert record[0] == row
        assert (record[1:] == record[1]).all()
        values[row] = int(record[1])
    return values


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


@pytest.fixture
def log(folder):
    log = Log(folder, BASE, 2**16)
    yield log
    log.close()


def last(folder, base=BASE):
    found = log_reader.read(folder, base)
    return found.manifest.commit.id if found.manifest.commit else 0


# ---- files ------------------------------------------------------------------------------------------------------


def only(folder):
    return sorted(folder.glob("*.log"))[-1]


# ---- round trips ------------------------------------------------------------------------------------------------

attempts = st.lists(
    st.tuples(st.lists(st.integers(0, 999), max_size=30, unique=True).map(sorted), st.booleans()), max_size=12
)


@settings(max_examples=50)
@given(attempts)
def test_the_newest_committed_image_of_every_row_is_read(tmp_path_factory, history):
    folder = tmp_path_factory.mktemp("log")
    log, expected, commits = Log(folder, BASE, 2**16), {}, 0
    for number, (ids, ends) in enumerate(history, 1):
        if ends:
            commit(log, ids, number)
            expected |= dict.fromkeys(ids, number)
            commits = number
        else:
            log.begin(needed_bytes([(len(ids), SPEC.record_bytes)], 0))
            append(log, ids, number)
            log._flush()  # as a large attempt does before its commit record
    log.close()
    found = log_reader.read(folder, BASE)
    assert rows_of(found) == expected
    assert (found.manifest.commit.id if found.manifest.commit else 0) == commits
    assert found.attempt <= log.attempt
    assert found.sequence == log.sequence
    shutil.rmtree(folder)


def test_an_independent_reader_finds_the_same_rows(folder, log):
    for number in range(1, 40):
        commit(log, [number, number + 1], number)
    rows, pending, sequence = {}, {}, 11
    for path in sorted(folder.glob("*.log")):
        header, records = independent(path)
        assert header[:2] == (b"shardlog", 2)
        assert header[2:5] == (3, int(path.stem), sequence)
        assert header[6] == uuid.UUID(STORE).bytes
        for position, fields, payload in records:
            assert position % 4096 == 0
            kind, number, synced, count = fields[1], fields[4], fields[5], fields[7]
            assert synced < sequence
            if kind == 3:
                assert fields[2] == 0
                continue
            assert number == sequence
            sequence += 1
            if kind == 1:
                ids = np.frombuffer(payload, np.int64, count)
                values = np.frombuffer(payload, np.float32, offset=8 * count).reshape(count, -1)
                pending |= dict(zip(ids.tolist(), values[:, 1].astype(int).tolist(), strict=True))
            elif kind == 2:
                assert count == len(pending)
                rows, pending = rows | pending, {}
    assert rows == rows_of(log_reader.read(folder, BASE))
    assert len(rows) == 40
    assert len(list(folder.glob("*.log"))) > 2


def test_every_segment_but_the_last_ends_with_an_end_record(folder, log):
    for number in range(1, 40):
        commit(log, [number], number)
    kinds = [[fields[1] for _, fields, _ in independent(path)[1]] for path in sorted(folder.glob("*.log"))]
    assert len(kinds) > 2
    assert [each[-1] == 3 for each in kinds] == [True] * (len(kinds) - 1) + [False]


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_every_segment_has_space_for_its_end_record(folder, log, pages):
    """Also where the commits before it end exactly there: a file has the size that its header says."""
    rows = (pages - 2) * PAGE // (8 + SPEC.record_bytes) if pages > 1 else 0
    for number in range(1, 100):
        commit(log, list(range(rows + (pages > 1))), number)
    segments = sorted(folder.glob("*.log"))
    assert len(segments) > 2
    for path in segments:
        header, records = independent(path)
        assert path.stat().st_size == header[5]
        assert all(position < header[5] for position, _, _ in records)
        assert path == segments[-1] or records[-1][1][1] == 3
    assert last(folder) == 99


@pytest.mark.parametrize("again", ["commit", "close"])
def test_an_attempt_that_failed_leaves_no_gap_in_the_numbers(folder, log, again):
    """What it had staged never reached the file, so the records after it take its numbers."""
    commit(log, [1], 1)
    log.begin(needed_bytes([(3, SPEC.record_bytes)], 100))
    append(log, [1, 2, 3], 9)
    if again == "close":
        log.close_segments()
    commit(log, [2], 2)
    commit(log, [3], 3)
    assert rows_of(log_reader.read(folder, BASE)) == {1: 1, 2: 2, 3: 3}
    numbers = [
        fields[4]
        for path in sorted(folder.glob("*.log"))
        for _, fields, _ in independent(path)[1]
        if fields[1] != 3
    ]
    assert numbers == list(range(BASE.sequence, BASE.sequence + 6))


def test_a_commit_larger_than_a_segment_has_one_of_its_own(folder, log):
    big = make(100_000, 6)
    commit(log, list(range(60_000)), 1, big)
    assert log_reader.read(folder, BASE).images(big).ids.size == 60_000
    assert only(folder).stat().st_size > 2**16
    commit(log, [5], 2, big)
    assert rows_of(log_reader.read(folder, BASE), big)[5] == 2


def test_discarded_segments_are_reused_and_their_records_ignored(folder, log):
    commit(log, [1], 1)
    closed = log.close_segments()
    inodes = {path.stat().st_ino for path in closed}
    log.discard(closed)
    base = Manifest(STORE, epoch=3, segment=log.number, sequence=log.sequence, attempt=log.attempt + 1)
    log.close_segments()
    assert only(folder).stat().st_ino in inodes
    commit(log, [2], 2)
    assert rows_of(log_reader.read(folder, base)) == {2: 2}


def test_no_large_segment_is_filled_with_zeros_for_commits_that_may_never_come(folder):
    log = Log(folder, BASE, 2**20)
    for number in range(60):  # segments double until they have their usual size
        commit(log, list(range(600)), number)
    assert max(path.stat().st_size for path in folder.glob("*.log")) == 2**20
    log.close_segments()
    assert folder.joinpath(f"{log.number:08d}.log").stat().st_size == log_writer.FIRST_SEGMENT
    log.close()


def test_zeros_are_written_once_however_often_the_log_is_folded(folder, monkeypatch):
    """Also where it never grows to segments of their usual size."""
    log, written, write = Log(folder, BASE, 2**22, spares=6), [], files.write
    monkeypatch.setattr(files, "write", lambda *given: (written.append(len(given[1])), write(*given)))
    appended = []
    for number in range(8):
        written.clear()
        for part in range(20):
            commit(log, list(range(600)), 20 * number + part)
        log.discard(log.close_segments())
        appended.append(sum(written))
    assert len(set(appended[-3:])) == 1
    assert appended[-1] < 0.7 * appended[0]
    assert len(list(folder.iterdir())) <= 6 + 1
    log.close()


def test_segments_of_large_commits_are_not_kept(folder, log):
    commit(log, list(range(60_000)), 1, make(100_000, 6))
    log.discard(log.close_segments())
    assert all(path.stat().st_size <= 2**16 for path in folder.iterdir())


# ---- torn and damaged -------------------------------------------------------------------------------------------


def test_a_log_truncated_at_any_block_ends_with_the_commit_before(folder, log):
    for number in range(1, 6):
        commit(log, [number], number)
    path = only(folder)
    _, records = independent(path)
    ends = [position for position, fields, _ in records if fields[1] == 2]
    data = path.read_bytes()
    for position in range(PAGE, ends[-1] + 2 * PAGE, PAGE):
        path.write_bytes(data[:position] + bytes(len(data) - position))
        assert last(folder) == sum(end < position for end in ends)
    path.write_bytes(data)
    assert last(folder) == 5


def test_a_bad_record_that_a_later_one_calls_synced_is_damage(folder, log):
    for number in range(1, 4):
        commit(log, [number], number)
    path = only(folder)
    _, records = independent(path)
    data = path.read_bytes()
    for position, fields, _ in records:
        path.write_bytes(data[: position + 40] + bytes([data[position + 40] ^ 1]) + data[position + 41 :])
        if fields[6] < records[-1][1][6]:
            with pytest.raises(LogDamagedError, match="was synced"):
                log_reader.read(folder, BASE)
        else:
            assert last(folder) == 2  # torn: no record says that it had been synced


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_missing_segment_is_damage(folder, log, which):
    for number in range(1, 40):
        commit(log, [number], number)
    sorted(folder.glob("*.log"))[which].unlink()
    with pytest.raises(LogDamagedError, match="missing"):
        log_reader.read(folder, BASE)


def test_swapped_segments_are_damage(folder, log):
    for number in range(1, 40):
        commit(log, [number], number)
    first, second = sorted(folder.glob("*.log"))[:2]
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(LogDamagedError, match="belongs elsewhere"):
        log_reader.read(folder, BASE)


@pytest.mark.parametrize("base", [Manifest(OTHER, 3, segment=5, sequence=11), Manifest(STORE, 4, segment=5)])
def test_a_segment_of_another_store_or_epoch_is_damage(folder, log, base):
    commit(log, [1], 1)
    with pytest.raises(LogDamagedError):
        log_reader.read(folder, base)


@pytest.mark.parametrize("position", range(0, HEADER.size, 5))
def test_a_damaged_header_is_damage(folder, log, position):
    commit(log, [1], 1)
    data = bytearray(only(folder).read_bytes())
    data[position] ^= 4
    only(folder).write_bytes(data)
    with pytest.raises(LogDamagedError, match="header"):
        log_reader.read(folder, BASE)


@pytest.mark.parametrize(
    "lie",
    [
        {"count": 0},
        {"count": 2**63},
        {"count": 3},
        {"kind": 9},
        {"table": bytes(range(16))},
        {"payload": b""},
        {"payload": bytes(8)},
        {"payload": np.array([-1], np.int64).tobytes() + bytes(24)},
        {"payload": np.array([1000], np.int64).tobytes() + bytes(24)},
        {"payload": np.array([2**62], np.int64).tobytes() + bytes(24)},
        {"payload": np.array([1], np.int64).tobytes() + bytes(28)},
    ],
    ids=str,
)
def test_a_record_of_images_with_false_numbers_is_never_trusted(folder, log, lie):
    commit(log, [1], 1)
    rewrite(only(folder), PAGE, **lie)
    if "table" in lie:
        assert rows_of(log_reader.read(folder, BASE)) == {}
        return
    with pytest.raises(LogDamagedError):
        log_reader.read(folder, BASE).images(SPEC)


@pytest.mark.parametrize(
    "lie", [{"length": 2**63}, {"length": 2**40}, {"sequence": 99}, {"epoch": 9}], ids=str
)
def test_a_last_record_with_impossible_numbers_ends_the_log(folder, log, lie):
    commit(log, [1], 1)
    commit(log, [2], 2)
    position = independent(only(folder))[1][-1][0]
    rewrite(only(folder), position, **lie)
    assert last(folder) == 1


@pytest.mark.parametrize("lie", [{"count": 2}, {"payload": b"{}"}, {"payload": b""}], ids=str)
def test_a_commit_record_with_false_numbers_is_an_error(folder, log, lie):
    commit(log, [1], 1)
    rewrite(only(folder), 2 * PAGE, **lie)
    with pytest.raises(FormatError):
        log_reader.read(folder, BASE)


def test_random_damage_gives_an_earlier_commit_or_an_error(folder, log):
    for number in range(1, 21):
        commit(log, [number], number)
    paths = sorted(folder.glob("*.log"))
    whole, rng, refused = {path: path.read_bytes() for path in paths}, random.Random(0), 0
    for _ in range(300):
        path = rng.choice(paths)
        data = bytearray(whole[path])
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            data[start : start + rng.choice([1, 8, 512])] = rng.randbytes(1)
        path.write_bytes(data)
        try:
            found = log_reader.read(folder, BASE)
            number = found.manifest.commit.id if found.manifest.commit else 0
            assert rows_of(found) == {row: row for row in range(1, number + 1)}
        except FormatError:
            refused += 1
        path.write_bytes(whole[path])
    assert 0 < refused < 300
    assert last(folder) == 20


# ---- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["write_new", "open_direct", "write", "sync", "rename"])
def test_a_full_disk_while_a_segment_is_created_leaves_the_log_unchanged(folder, log, monkeypatch, call):
    commit(log, [1], 1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args):
        raise DiskFullError(28, "no room")

    with monkeypatch.context() as patch:
        patch.setattr(files, call, full)
        with pytest.raises(DiskFullError):
            log.begin(2**20)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert last(folder) == 1
    commit(log, [2], 2)
    assert rows_of(log_reader.read(folder, BASE)) == {1: 1, 2: 2}


def test_no_block_of_a_segment_is_written_again_once_it_is_durable(folder, log, monkeypatch):
    durable, fresh, write, sync = set(), set(), files.write, files.sync_data

    def watched(descriptor, data, offset, path):
        assert offset % PAGE == 0
        assert len(data) % PAGE == 0
        # A new segment is filled with zeros, and gets its header, before its first record.
        if path.suffix == ".log":
            blocks = {(path, block) for block in range(offset // PAGE, (offset + len(data)) // PAGE)}
            assert not blocks & durable
            fresh.update(blocks)
        write(descriptor, data, offset, path)

    def synced(descriptor, path):
        sync(descriptor, path)
        durable.update(fresh)

    monkeypatch.setattr(files, "write", watched)
    monkeypatch.setattr(files, "sync_data", synced)
    for number in range(1, 60):
        commit(log, list(range(number)), number)
    assert len(durable) > 110
    assert durable == fresh


def test_a_folder_that_cannot_be_synced_is_not_a_full_disk(tmp_path, monkeypatch):
    """The new segment has its name already: further commits in the old segment could not be read."""
    writer = Log(tmp_path, Manifest(uuid="00000000-0000-0000-0000-000000000007"))
    monkeypatch.setattr(
        files, "sync_directory", lambda path: (_ for _ in ()).throw(DiskFullError(28, "no room"))
    )
    with pytest.raises(OSError, match="cannot be synced") as caught:
        writer.begin(2**20)
    assert not isinstance(caught.value, DiskFullError)
    writer.close()
