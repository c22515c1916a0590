"""The log, written and read again: intact, torn, damaged, and with false numbers."""

import shutil
import struct
import uuid
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.specs import make

from shardemb.base.sizes import PAGE
from shardemb.commits import log_reader, log_writer
from shardemb.errors import DiskFullError, FormatError, LogDamagedError, ShardEmbError
from shardemb.format.manifest import Commit, Manifest, PartitionIdentity
from shardemb.storage import files

SPEC = make(1000, 4, rows_per_shard=256)
STORE = str(uuid.UUID(int=7))
BASE = Manifest(uuid=STORE, epoch=3, segment=5, sequence=11, attempt=2)


def write_commits(folder, commits, *, segment_bytes=1):
    """Write ``[(rows, value, whole), ...]`` as commits, which are interrupted if not whole; return the log."""
    folder.mkdir(exist_ok=True)
    writer = log_writer.Log(folder, BASE, segment_bytes)
    for number, (rows, value, whole) in enumerate(commits, 1):
        ids = np.array(sorted(set(rows)), np.int64)
        records = np.full((SPEC.num_embeddings, 4), value, np.float32)
        payload = manifest(number).to_bytes()
        writer.begin(log_writer.needed_bytes([(ids.size, SPEC.record_bytes)], len(payload)))

        def pack(start, stop, address, ids=ids, records=records):
            target = np.ctypeslib.as_array(
                (np.ctypeslib.ctypes.c_float * (4 * (stop - start))).from_address(address)
            )
            target[:] = records[ids[start:stop]].reshape(-1)

        writer.append_images(SPEC.uuid, ids.size, SPEC.record_bytes, log_writer.in_order(ids, pack))
        if whole:
            writer.append_commit(payload)
        elif value % 2:
            writer._flush()
    return writer


def manifest(number):
    return Manifest(uuid=STORE, epoch=3, commit=Commit(number, 10 * number, {}))


def found(folder, base=BASE, end=None):
    """What the log holds: the number of the last commit, and the rows with their values."""
    newer = log_reader.read(folder, base, end)
    images = newer.images(SPEC)
    values = [
        np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float * 4).from_address(address)).tolist()
        for address in images.addresses.tolist()
    ]
    assert all(len(set(value)) == 1 for value in values)
    commit = newer.manifest.commit
    return commit.id if commit else 0, dict(
        zip(images.ids.tolist(), [value[0] for value in values], strict=True)
    )


def expected(commits):
    last, rows = 0, {}
    for number, (ids, value, whole) in enumerate(commits, 1):
        if whole:
            last, rows = number, rows | dict.fromkeys(ids, float(value))
    return last, rows


COMMITS = st.lists(
    st.tuples(st.lists(st.integers(0, 999), min_size=1, max_size=900), st.integers(0, 99), st.booleans()),
    max_size=12,
)


@settings(max_examples=60)
@given(COMMITS, st.sampled_from([1, 200_000, 2**20]))
def test_the_newest_image_of_every_committed_row_is_read(tmp_path_factory, commits, segment_bytes):
    folder = tmp_path_factory.mktemp("log")
    writer = write_commits(folder, commits, segment_bytes=segment_bytes)
    assert found(folder) == expected(commits)
    assert found(folder, end=writer.end) == expected(commits)
    writer.close()
    shutil.rmtree(folder)


MANY = [(range(k % 3, 1000, 3), k, k % 4 != 3) for k in range(20)]


def test_a_segment_that_is_begun_after_the_folder_was_listed_is_read(tmp_path, monkeypatch):
    writer = write_commits(tmp_path, MANY)
    writer.close()
    real, left = log_reader.segments, [1, 2]
    # As if the writer had begun the last two segments one after the other, just then.
    monkeypatch.setattr(log_reader, "segments", lambda folder: real(folder)[: -left.pop() if left else None])
    assert found(tmp_path) == expected(MANY)
    assert not left


def test_segments_that_are_read_into_memory_stay_what_they_are(tmp_path):
    write_commits(tmp_path, MANY).close()
    newer = log_reader.read(tmp_path, BASE, private=True)
    for path in tmp_path.glob("*.log"):
        path.write_bytes(bytes(path.stat().st_size))
    addresses = newer.images(SPEC).addresses.tolist()
    values = [
        np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float).from_address(each)).item() for each in addresses
    ]
    assert dict(zip(newer.images(SPEC).ids.tolist(), values, strict=True)) == expected(MANY)[1]


def test_segments_are_consecutive_and_filled_with_zeros_after_the_end(tmp_path):
    writer = write_commits(tmp_path, MANY)
    assert log_reader.segments(tmp_path) == list(range(5, writer.number + 1))
    assert writer.number > 5
    number, position = writer.end
    assert number == writer.number
    assert not any((tmp_path / f"{number:08d}.log").read_bytes()[position:])
    writer.close()


def test_cut_anywhere_the_log_ends_with_a_commit(tmp_path):
    """A loss of power leaves it so: the blocks from some position on are zeros."""
    folder = tmp_path / "log"
    commits = [([k, 10 + k, 999], k, True) for k in range(12)]
    write_commits(folder, commits).close()
    path = folder / "00000005.log"
    data = path.read_bytes()
    seen = set()
    for cut in range(PAGE, len(data), PAGE):
        path.write_bytes(data[:cut].ljust(len(data), b"\0"))
        if len(log_reader.segments(folder)) > 1:
            with pytest.raises(LogDamagedError):
                found(folder)
            for number in log_reader.segments(folder)[1:]:
                (folder / f"{number:08d}.log").unlink()
        last, rows = found(folder)
        assert (last, rows) == expected(commits[:last])
        seen.add(last)
    assert len(seen) > 5


def test_a_record_that_was_synced_and_cannot_be_read_is_damage(tmp_path):
    writer = write_commits(tmp_path, [([k], k, True) for k in range(3)])
    writer.close()
    path = tmp_path / "00000005.log"
    data = path.read_bytes()
    used = writer.end[1] // PAGE
    for block in range(1, used):
        for at in (0, 30, 80, 90):
            broken = bytearray(data)
            broken[block * PAGE + at] ^= 16
            path.write_bytes(broken)
            if (
                block < used - 2
            ):  # the last commit is two blocks, and no record says yet that they were synced
                with pytest.raises(LogDamagedError, match="was synced and cannot be read"):
                    found(tmp_path)
            else:
                assert found(tmp_path) == (2, {0: 0.0, 1: 1.0})


@pytest.mark.parametrize("number", [5, 6, 7])
def test_a_missing_segment_is_damage(tmp_path, number):
    writer = write_commits(tmp_path, MANY)
    writer.close()
    assert writer.number >= 7
    (tmp_path / f"{number:08d}.log").unlink()
    with pytest.raises(LogDamagedError, match="missing"):
        found(tmp_path)


def test_swapped_or_truncated_segments_are_damage(tmp_path):
    write_commits(tmp_path, MANY).close()
    five, six = tmp_path / "00000005.log", tmp_path / "00000006.log"
    before = five.read_bytes(), six.read_bytes()
    for contents in (
        before[::-1],
        (before[0][:-PAGE], before[1]),
        (before[0][:100], before[1]),
        (b"", before[1]),
    ):
        five.write_bytes(contents[0])
        six.write_bytes(contents[1])
        with pytest.raises(LogDamagedError):
            found(tmp_path)


def test_a_segment_of_another_store_or_header_with_a_flipped_bit_is_damage(tmp_path):
    write_commits(tmp_path, MANY).close()
    other = Manifest(uuid=str(uuid.UUID(int=8)), epoch=3, segment=5, sequence=11)
    with pytest.raises(LogDamagedError, match="belongs elsewhere"):
        found(tmp_path, other)
    data = bytearray((tmp_path / "00000005.log").read_bytes())
    for at in range(88):
        broken = bytearray(data)
        broken[at] ^= 1
        (tmp_path / "00000005.log").write_bytes(broken)
        with pytest.raises(ShardEmbError):
            found(tmp_path)


def test_a_segment_of_a_writer_that_never_replaced_the_base_is_ignored(tmp_path):
    commits = [([1], 1, True)]
    write_commits(tmp_path, commits).close()
    later = Manifest(uuid=STORE, epoch=4, segment=6, sequence=13)
    log_writer.Log(tmp_path, later).close()
    assert found(tmp_path) == expected(commits)


def test_a_clean_base_has_no_log(tmp_path):
    clean = Manifest(uuid=STORE, clean=True)
    assert log_reader.read(tmp_path / "nothing", clean).manifest == clean


def forge(folder, count, ids, nbytes):
    """Write a log by hand, with right checksums and possibly false numbers."""
    store, salt = uuid.UUID(STORE).bytes, bytes(range(16))
    header = struct.pack("<8sQQQQQ16s16s", b"shardlog", 1, 3, 5, 11, 16 * PAGE, store, salt)
    blocks = [(header + xxhash.xxh3_64_intdigest(header).to_bytes(8, "little")).ljust(PAGE, b"\0")]
    payloads = [
        (1, np.array(ids, np.int64).tobytes().ljust(nbytes, b"\0"), count, uuid.UUID(SPEC.uuid).bytes),
        (2, manifest(1).to_bytes(), count, bytes(16)),
    ]
    for sequence, (kind, payload, number, table) in enumerate(payloads, 11):
        found = xxhash.xxh3_64_intdigest(payload)
        head = struct.pack(
            "<4sIQQQQQQ16sQ", b"srec", kind, len(payload), 3, sequence, 10, 3, number, table, found
        )
        head += xxhash.xxh3_64_intdigest(store + salt + head).to_bytes(8, "little")
        data = head + payload
        blocks.append(data.ljust(-(-len(data) // PAGE) * PAGE, b"\0"))
    folder.mkdir(exist_ok=True)
    (folder / "00000005.log").write_bytes(b"".join(blocks).ljust(16 * PAGE, b"\0"))


def test_a_log_written_by_hand_from_the_specification_is_read(tmp_path):
    forge(tmp_path, 2, [3, 5], 2 * (8 + SPEC.record_bytes))
    assert found(tmp_path) == (1, {3: 0.0, 5: 0.0})


@pytest.mark.parametrize(
    ("count", "ids", "nbytes"),
    [
        (1, [1000], 24),  # past the end of the table
        (1, [-1], 24),
        (1, [1], 32),  # a record of another size
        (0, [1], 24),
        (2**60, [1], 24),
        (3, [1, 2], 24),
    ],
)
def test_false_numbers_are_damage_although_the_checksums_are_right(tmp_path, count, ids, nbytes):
    forge(tmp_path, count, ids, nbytes)
    with pytest.raises(LogDamagedError):
        found(tmp_path)


@pytest.mark.parametrize("seed", range(5))
def test_random_damage_is_always_a_commit_or_an_error(tmp_path, seed):
    rng = np.random.default_rng(seed)
    writer = write_commits(tmp_path, MANY)
    writer.close()
    originals = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for _ in range(60):
        path = list(originals)[rng.integers(len(originals))]
        data = bytearray(originals[path])
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            data[at] ^= int(rng.integers(1, 256))
        if rng.random() < 0.2:
            data = data[: rng.integers(len(data))]
        path.write_bytes(data)
        try:
            last, rows = found(tmp_path)
        except ShardEmbError:
            pass
        else:
            assert (last, rows) == expected(MANY[:last])
        path.write_bytes(originals[path])


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path, monkeypatch):
    writer = write_commits(tmp_path, [([1], 1, True)])
    before = writer.end, log_reader.segments(tmp_path), writer.sequence
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", lambda *arguments: (_ for _ in ()).throw(DiskFullError(28, "no room")))
        with pytest.raises(DiskFullError):
            writer.begin(10 * 2**20)
    assert (writer.end, log_reader.segments(tmp_path), writer.sequence) == before
    assert not list(tmp_path.glob("*.new"))
    writer.begin(10 * 2**20)
    assert writer.end == (6, PAGE)
    writer.close()
    assert found(tmp_path) == (1, {1: 1.0})


def test_segments_are_reused_and_their_old_records_are_ignored(tmp_path):
    writer = write_commits(tmp_path, [(range(900), 1, True)], segment_bytes=log_writer.FIRST_SEGMENT)
    for _ in range(3):
        closed = writer.close_segments()
        writer.discard(closed)
    base = Manifest(uuid=STORE, epoch=3, segment=writer.number, sequence=writer.sequence)
    assert found(tmp_path, base) == (0, {})
    assert (tmp_path / f"{writer.number:08d}.log").read_bytes()[PAGE:].strip(
        b"\0"
    ) != b""  # one that was in use
    writer.close()


# ---- prepared attempts ------------------------------------------------------------------------------------------

PARTITION = replace(BASE, partition=PartitionIdentity(STORE, 0, 2))


def write_prepared(folder, ends):
    """Write attempts, each of one row with its own number as value, and how each ends; return the log.

    Each is of the commit after the last one.
    """
    writer, last = log_writer.Log(folder, PARTITION, 1), 0
    for attempt, end in enumerate(ends, 1):
        payload = replace(
            manifest(last + 1), partition=PARTITION.partition, decision=(1, "head", attempt)
        ).to_bytes()
        writer.begin(
            log_writer.needed_bytes([(1, SPEC.record_bytes)], len(payload)) + 2 * len(payload) + 2 * PAGE
        )

        def fill(ids, address, attempt=attempt):
            ids[:] = attempt
            target = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float * 4).from_address(address))
            target[:] = attempt

        writer.append_images(SPEC.uuid, 1, SPEC.record_bytes, fill)
        if end == "commit":
            writer.append_commit(payload)
        elif end:
            writer.append_prepared(payload)
        else:
            writer._flush()
        if end == "decided":
            writer.append_decision(payload)
        last += end in ("commit", "decided")
    return writer


ENDS = st.lists(st.sampled_from(["", "commit", "prepared", "decided"]), max_size=6)


@settings(max_examples=60)
@given(ENDS, st.sampled_from(["unknown", "decided", "dropped"]))
def test_a_prepared_attempt_counts_with_its_decision_alone(tmp_path_factory, ends, resolved):
    folder = tmp_path_factory.mktemp("log")
    write_prepared(folder, ends).close()
    committed = [number for number, end in enumerate(ends, 1) if end in ("commit", "decided")]
    in_doubt = (len(committed) + 1, (1, "head", len(ends))) if ends and ends[-1] == "prepared" else None
    base = PARTITION
    if resolved != "unknown":
        base = replace(base, resolved=in_doubt if resolved == "decided" and in_doubt else (0, None))
    if in_doubt and resolved == "decided":
        committed.append(len(ends))
    last, rows = found(folder, base)
    assert (last, rows) == (len(committed), {number: float(number) for number in committed})
    assert log_reader.read(folder, base).prepared == (in_doubt if resolved == "unknown" else None)
    shutil.rmtree(folder)


def test_a_lost_image_of_a_prepared_attempt_is_damage(tmp_path):
    writer = write_prepared(tmp_path, ["commit", ""])
    writer._count += 1
    writer.append_prepared(replace(manifest(2), partition=PARTITION.partition).to_bytes())
    writer.close()
    with pytest.raises(LogDamagedError, match="missing"):
        log_reader.read(tmp_path, PARTITION)


def test_a_program_that_knows_no_partitions_refuses_their_log(tmp_path, monkeypatch):
    write_prepared(tmp_path, []).close()
    monkeypatch.setattr(log_reader, "PARTITION_LOG_VERSION", 2)
    with pytest.raises(FormatError, match="version 3 is newer than 2; upgrade"):
        log_reader.read(tmp_path, PARTITION)


def test_the_log_of_a_store_that_is_no_partition_has_the_version_before(tmp_path):
    write_commits(tmp_path, MANY).close()
    for path in tmp_path.glob("*.log"):
        assert int.from_bytes(path.read_bytes()[8:16], "little") == 2
