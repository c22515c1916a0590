"""The note of what is written before its commit, what recovery makes of it, and fills in the log."""

import uuid

import numpy as np
import pytest
from support.specs import make

from shardemb.base.sizes import PAGE
from shardemb.commits import fills, fold, log_reader, log_writer
from shardemb.errors import DiskFullError, FormatError, LogDamagedError
from shardemb.format import log_records, store_paths
from shardemb.format.fill_records import Fill, Filled, Note
from shardemb.format.manifest import Commit, Manifest
from shardemb.format.table_files import TableLocation
from shardemb.initializers import Uniform
from shardemb.storage import checksums, files, table_folder

STORE = str(uuid.UUID(int=7))
SPEC = make(3000, 16, rows_per_shard=1024)  # 16 blocks a shard, 48 in all
BASE = Manifest(uuid=STORE, epoch=3, segment=5, sequence=11, attempt=2)


def fill(first, stop, table=SPEC.uuid):
    return Fill(table, first, stop)


@pytest.fixture
def table(tmp_path):
    """A table in whose shards every block is ones."""
    location = TableLocation(SPEC, tmp_path / "t")
    table_folder.create(SPEC, location.directory, None)
    for number in range(SPEC.num_shards):
        location.shard(number).path.write_bytes(b"\1" * SPEC.shard_bytes)
    return location


def zeroed(table):
    """The blocks that are zeros."""
    data = b"".join(table.shard(number).path.read_bytes() for number in range(SPEC.num_shards))
    return np.flatnonzero(~np.frombuffer(data, np.uint8).reshape(-1, PAGE).any(axis=1)).tolist()


# ---- the note ---------------------------------------------------------------------------------------------------


class Writer:
    """What a writer has begun, and its note."""

    def __init__(self, path, epoch=3):
        files.make_directory(store_paths.private(path))
        files.overwrite(store_paths.epoch(path), epoch.to_bytes(8, "little").ljust(PAGE, b"\0"))
        self.path, self.begun = path, []
        self.note = fills.Announcements(path, epoch, lambda: self.begun)

    def announce(self, *more):
        self.note.announce(more)
        self.begun += more

    @property
    def named(self):
        return list(fills.read_note(self.path, BASE).fills)

    @property
    def count(self):
        return int.from_bytes(store_paths.epoch(self.path).read_bytes()[8:16], "little")


def test_a_fill_is_named_before_readers_are_told(tmp_path):
    writer = Writer(tmp_path)
    assert writer.named == []
    writer.announce(fill(0, 4))
    writer.announce(fill(7, 9), fill(20, 40))
    assert writer.named == [fill(0, 4), fill(7, 9), fill(20, 40)]
    assert writer.count == 2
    assert store_paths.epoch(tmp_path).read_bytes()[:8] == (3).to_bytes(8, "little")


def test_the_note_forgets_when_it_is_settled(tmp_path, monkeypatch):
    writer = Writer(tmp_path)
    writer.announce(fill(0, 4), fill(7, 9))
    before = files.counters.syncs
    writer.note.settle()  # nothing to forget
    assert files.counters.syncs == before
    writer.begun = [fill(7, 9)]
    writer.note.settle()
    assert writer.named == [fill(7, 9)]
    assert writer.count == 1


def test_a_note_that_may_name_too_much_is_replaced_before_a_fold(tmp_path, monkeypatch):
    writer = Writer(tmp_path)

    def fail(path):
        raise OSError(5, "it failed")

    monkeypatch.setattr(files, "sync_directory", fail)
    with pytest.raises(OSError, match="it failed"):
        writer.announce(fill(0, 4))
    assert writer.count == 0
    monkeypatch.undo()
    assert writer.named == [fill(0, 4)]
    writer.note.settle()
    assert writer.named == []


def test_a_full_disk_names_nothing(tmp_path, monkeypatch):
    writer = Writer(tmp_path)

    def fail(*arguments):
        raise DiskFullError(28, "full")

    monkeypatch.setattr(files, "write", fail)
    with pytest.raises(DiskFullError):
        writer.announce(fill(0, 4))
    assert writer.named == []


def test_a_note_of_another_writer_means_nothing(tmp_path):
    Writer(tmp_path, epoch=2).announce(fill(0, 4))
    assert fills.read_note(tmp_path, BASE) == Note(3)
    writer = Writer(tmp_path)
    writer.announce(fill(0, 4))
    assert fills.read_note(tmp_path, Manifest(uuid=STORE, epoch=3, clean=True)) == Note(3)
    writer.note.withdraw()
    assert writer.named == []


# ---- recovery ---------------------------------------------------------------------------------------------------


def test_what_the_note_names_and_no_commit_has_becomes_holes(table):
    sums = checksums.read_sums(table.checksums_path, 0, 48).copy()
    sums[5] = 1000  # written by a fold since
    checksums.write_sums(table.checksums_path, np.arange(48), sums)
    committed = [Filled(fill(14, 18), np.ones(4, np.uint64))]
    fills.undo_unfinished(table, [fill(3, 8), fill(12, 20)], committed)
    assert zeroed(table) == [3, 4, 6, 7, 12, 13, 18, 19]
    fills.undo_unfinished(table, [fill(3, 8), fill(12, 20)], committed)  # after an interruption
    assert zeroed(table) == [3, 4, 6, 7, 12, 13, 18, 19]


def test_blocks_that_a_table_does_not_have_are_refused(table):
    with pytest.raises(FormatError, match="cannot have"):
        fills.undo_unfinished(table, [fill(40, 49)], [])


def test_where_there_are_no_holes_zeros_are_written(table, monkeypatch):
    monkeypatch.setattr(files, "punch", lambda *arguments: False)
    monkeypatch.setattr(fills, "ZEROED_BYTES", 3 * PAGE)
    fills.punch(table, 10, 35)
    assert zeroed(table) == list(range(10, 35))


# ---- the log ----------------------------------------------------------------------------------------------------


def write_log(folder, *commits):
    """Write commits of fills, and leave the log open."""
    log = log_writer.Log(folder, BASE)
    for number, filled in enumerate(commits, 1):
        payload = Manifest(uuid=STORE, epoch=3, commit=Commit(number, number, {})).to_bytes()
        needed = [log_writer.needed_for_fill(each, SPEC.record_bytes) for each in filled]
        before = log.nbytes
        log.begin(log_writer.needed_bytes([], len(payload)) + sum(needed))
        for each in filled:
            log.append_fill(each, SPEC.record_bytes)
        log.append_commit(payload)
        assert log.nbytes - before == log_writer.needed_bytes([], len(payload)) + sum(needed)
    return log


def filled(first, stop):
    return Filled(fill(first, stop), np.arange(first, stop, dtype=np.uint64) + 10)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("stage", [PAGE + 8 * 5, 8 * 2**20])
def test_the_log_has_the_fills_of_commits(folder, stage, monkeypatch):
    monkeypatch.setattr(log_writer, "STAGE_BYTES", stage if stage > 2**20 else 65_536)
    monkeypatch.setattr(log_writer, "_fill_blocks", lambda: (stage - PAGE) // 8)
    log = write_log(folder, [filled(0, 12)], [filled(20, 21), filled(30, 48)])
    log.begin(10_000)
    log.append_fill(filled(15, 17), SPEC.record_bytes)  # of an attempt that failed
    log._flush()
    log.close()
    replay = log_reader.read(folder, BASE)
    found = {}
    for each in replay.fills(SPEC):
        blocks = range(each.fill.first, each.fill.stop)
        found |= dict(zip(blocks, each.sums.tolist(), strict=True))
    assert found == {block: block + 10 for block in [*range(12), 20, *range(30, 48)]}
    assert (len(replay.fills(SPEC)) > 3) == (stage < 2**20)
    assert replay.images(SPEC).fills == replay.fills(SPEC)
    assert replay.manifest.commit.id == 2


def test_blocks_that_a_table_does_not_have_are_damage(folder):
    write_log(folder, [filled(40, 49)]).close()
    with pytest.raises(LogDamagedError, match="cannot have"):
        log_reader.read(folder, BASE).images(SPEC)


def test_a_fill_that_its_commit_misses_is_damage(folder, monkeypatch):
    monkeypatch.setattr(
        log_writer.Log, "append_fill", lambda self, filled, size: setattr(self, "_count", filled.sums.size)
    )
    monkeypatch.setattr(log_writer, "needed_for_fill", lambda filled, size: 0)
    write_log(folder, [filled(0, 12)]).close()
    with pytest.raises(LogDamagedError, match="missing"):
        log_reader.read(folder, BASE)


def test_a_program_that_knows_no_fills_refuses_the_log(folder, monkeypatch):
    write_log(folder, [filled(0, 12)]).close()
    monkeypatch.setattr(log_reader, "PARTITION_LOG_VERSION", 1)
    with pytest.raises(FormatError, match=r"version 2 is newer than 1; upgrade"):
        log_reader.read(folder, BASE)


def test_a_log_from_before_fills_is_read(folder, monkeypatch):
    monkeypatch.setattr(log_writer, "LOG_VERSION", 1)
    write_log(folder, []).close()
    monkeypatch.undo()
    assert log_records.LOG_VERSION == 2
    assert log_reader.read(folder, BASE).manifest.commit.id == 1


# ---- folds and copies -------------------------------------------------------------------------------------------


def images_of(*fills_):
    return log_reader.Images(np.empty(0, np.int64), np.empty(0, np.int64), fills_)


def test_a_fold_gives_checksums_only_to_blocks_that_have_none(table):
    known = np.zeros(48, np.uint64)
    known[[3, 4]] = 1000, 1001
    checksums.write_sums(table.checksums_path, np.arange(48), known)
    fold.write([(table, images_of(filled(2, 7), filled(30, 40)))], 2)
    known[[2, 5, 6, *range(30, 40)]] = np.array([2, 5, 6, *range(30, 40)]) + 10
    assert checksums.read_sums(table.checksums_path, 0, 48).tolist() == known.tolist()


def test_a_fold_sets_the_presence_bits_of_fills(tmp_path):
    spec = make(3000, 16, rows_per_shard=1024, initializer=Uniform(-1, 1))
    table = TableLocation(spec, tmp_path / "t")
    table_folder.create(spec, table.directory, None)
    records = np.zeros((1, 16), np.float32)
    images = log_reader.Images(
        np.array([2999]), np.array([records.ctypes.data]), (filled(2, 7), filled(30, 40))
    )
    fold.write([(table, images)], 2)
    bits = np.unpackbits(np.fromfile(table.presence_chunk(0).path, np.uint8), bitorder="little")
    rows = [*range(2 * 64, 7 * 64), *range(30 * 64, 40 * 64), 2999]
    assert np.flatnonzero(bits).tolist() == rows


def test_a_copy_of_a_fill_to_which_a_fold_writes_is_in_flux(table, tmp_path):
    copy = TableLocation(SPEC, tmp_path / "copy")
    table_folder.create(SPEC, copy.directory, None)
    ones = checksums.block_sum(memoryview(b"\1" * PAGE))
    sums = np.full(20, ones, np.uint64)
    sums[7] = 1000  # the block is not what the log has
    assert fills.copy(table, copy, Filled(fill(5, 25), sums))
    assert zeroed(copy) == [*range(5), *range(25, 48)]
    expected = np.full(20, ones, np.uint64)
    expected[7] = ones | checksums.IN_FLUX
    assert checksums.read_sums(copy.checksums_path, 5, 20).tolist() == expected.tolist()
    assert not fills.copy(table, copy, Filled(fill(5, 25), sums))
