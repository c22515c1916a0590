"""Damage of every kind is found by `open` or `verify`, or has no visible effect."""

import errno
import os
import threading

import numpy as np
import pytest
from support import inside
from support.damages import DAMAGES, DIM, PARTS, ROWS, damage_many, fill

import shardemb
from shardemb.base.sizes import PAGE
from shardemb.commits import fold
from shardemb.compute import row_kernels
from shardemb.errors import DiskFullError, TableNotFoundError
from shardemb.storage import checksums, files


@pytest.fixture
def path(tmp_path):
    with shardemb.open(tmp_path / "s") as store:
        fill(store)
    return tmp_path / "s"


def flip(path, position):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 0x10]))


def verified(path, mode="r", **more):
    with shardemb.open(path, mode) as store:
        return store.verify(**more)


# ---- reports ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_damage_is_named_by_table_shard_and_rows(path, mode):
    assert verified(path, mode) == []
    flip(path / "plain/rows/c.1.0", 5000)  # 64 bytes per row, 64 rows per block
    (damage,) = verified(path, mode)
    assert (damage.table, damage.shard, damage.rows) == ("plain", 1, (256 + 64, 256 + 128))
    assert damage.path == str(path / "plain/rows/c.1.0")
    assert str(damage) == (
        f"table 'plain', rows 320 to 384: {damage.path} is not what was written, from byte 4096 to 8192"
    )


def test_neighbouring_blocks_are_one_range(path):
    for block in (0, 1, 3):
        flip(path / "plain/rows/c.0.0", block * PAGE)
    assert [each.rows for each in verified(path)] == [(0, 128), (192, 256)]


def test_damaged_presence_bits_are_rows_too(path):
    flip(path / "drawn/present/c.0", 3)
    assert [(each.table, each.shard, each.rows) for each in verified(path)] == [("drawn", 0, (0, ROWS))]


def test_single_tables_can_be_verified(path):
    flip(path / "plain/rows/c.0.0", 0)
    assert verified(path, tables=["drawn"]) == []
    assert len(verified(path, tables=["plain", "drawn"])) == 1
    with pytest.raises(TableNotFoundError, match="no table 'other'"):
        verified(path, tables=["other"])


def test_progress_counts_bytes(path):
    calls = []
    verified(path, progress=lambda done, total: calls.append((done, total)))
    total = sum(file.stat().st_size for file in path.glob("*/*/c.*") if "checks" not in str(file))
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_ctrl_c_ends_it(path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verified(path, progress=stop)


def test_a_sector_that_cannot_be_read_is_damage(path, monkeypatch):
    real = files.read_into

    def read_into(descriptor, view, offset, where):
        if str(where).endswith("plain/rows/c.2.0") and offset <= 2 * PAGE < offset + len(view):
            raise OSError(5, "bad sector")
        real(descriptor, view, offset, where)

    monkeypatch.setattr(files, "read_into", read_into)
    assert [(each.shard, each.rows) for each in verified(path)] == [(2, (640, 700))]


# ---- concurrency and crashes ------------------------------------------------------------------------------------


def test_rewriting_a_part_of_a_block_does_not_hide_damage_in_the_rest(path):
    flip(path / "plain/rows/c.0.0", 0)  # row 0
    with shardemb.open(path) as store:
        store["plain"].write([1, 3], np.ones((2, DIM), np.float32))
        store.commit()
        store.checkpoint()
        assert [each.rows for each in store.verify()] == [(0, 64)]
        store["plain"].write(np.arange(64), np.ones((64, DIM), np.float32))
        store.commit()
        store.checkpoint()
        assert store.verify() == []  # none of the damage is left


@pytest.mark.parametrize("who", ["writer", "reader"])
def test_it_runs_during_training_without_a_false_alarm(path, who):
    with shardemb.open(path, log_bytes=100_000) as store:
        stop, problems = threading.Event(), []

        def train():
            rng = np.random.default_rng(1)
            while not stop.is_set():
                for name in ("plain", "drawn"):
                    ids = rng.integers(0, ROWS, 50)
                    store[name].write(ids, rng.normal(size=(50, DIM)).astype(np.float32))
                store.commit()

        thread = threading.Thread(target=train)
        thread.start()
        try:
            for _ in range(25):
                problems += store.verify() if who == "writer" else verified(path)
        finally:
            stop.set()
            thread.join()
        assert problems == []


def test_what_a_reader_has_read_of_the_log_stays_while_the_writer_uses_its_segments_again(path):
    with shardemb.open(path, log_bytes=1) as store:
        for value in range(3):  # so that the segment is a spare one, which is used again
            store["plain"].write(np.arange(50), np.full((50, DIM), value, np.float32))
            store.commit()
            store.checkpoint()
        store["plain"].write(np.arange(50), np.full((50, DIM), 7, np.float32))
        store.commit()
        with shardemb.open(path, "r") as reader:
            newest = inside.session(reader)._reader.newest()
        spec = inside.shards(store["plain"]).spec
        before = newest.images(spec)
        for value in range(8, 20):
            store["plain"].write(np.arange(50) + value, np.full((50, DIM), value, np.float32))
            store.commit()
            store.checkpoint()
        after = newest.images(spec)
        assert after.ids.tolist() == before.ids.tolist()
        records = np.empty((after.ids.size, spec.width), np.float32)
        row_kernels.gather_images(after.addresses, spec.record_bytes, records.ctypes.data, 0, after.ids.size)
        assert (records == 7).all()


def full_at(monkeypatch, what, only):
    """Let a call of ``files`` raise `DiskFullError` if its path contains `only`."""
    real = getattr(files, what)

    def sometimes(*arguments):
        if only in str(arguments[-1]):
            raise DiskFullError(errno.ENOSPC, "no room")
        return real(*arguments)

    monkeypatch.setattr(files, what, sometimes)


def test_a_table_that_gets_its_place_late_is_no_damage(tmp_path, monkeypatch):
    """The disk was full after a fold had written some of its blocks; the next fold moves its folder."""
    with shardemb.open(tmp_path / "s") as store:
        with monkeypatch.context() as patch:
            full_at(patch, "sync_data", "rows/c.2.0")
            fill(store)
            assert not (tmp_path / "s" / "plain").exists()
        assert store.verify() == []
        assert (tmp_path / "s" / "plain").exists()
        assert verified(tmp_path / "s") == []


def moving(store):
    """Make a function for `progress` that renames one table and drops the other, with a commit, half way."""

    def move(done, total):
        if done < total and "plain" in store:
            store.rename_table("plain", "moved")
            store.drop_table("drawn")
            store.commit()

    return move


def test_a_table_that_moves_during_verification_is_no_damage(path):
    with shardemb.open(path) as store:
        assert store.verify(progress=moving(store)) == []
        assert list(store) == ["moved"]
        flip(path / "moved" / "rows" / "c.0.0", 100)
        assert [each.table for each in store.verify()] == ["moved"]


def test_a_table_that_a_writer_moves_while_a_reader_verifies_it_is_no_damage(path):
    with shardemb.open(path) as store, shardemb.open(path, "r") as reader:
        assert reader.verify(progress=moving(store)) == []
        assert list(reader) == ["plain", "drawn"]
        assert reader.verify() == []
        flip(path / "moved" / "rows" / "c.0.0", 100)
        assert [each.table for each in reader.verify()] == ["plain"]


def test_a_reader_reports_a_table_that_can_no_longer_be_opened(path):
    with shardemb.open(path, "r") as reader:
        (path / "plain" / "rows" / "zarr.json").write_text("{}")
        assert [each.table for each in reader.verify()] == ["plain"]


@pytest.mark.parametrize("stage", ["nothing written", "some written", "all written"])
def test_an_interrupted_fold_is_no_damage(path, stage, in_fork):
    """Readers ignore what the log has new values for. Recovery writes it, and then no block is in flux."""

    def die_within_a_fold():
        store = shardemb.open(path)
        for name in ("plain", "drawn"):
            store[name].write(np.arange(0, ROWS, 5), np.ones((140, DIM), np.float32))
        store.commit(step=2)
        if stage == "nothing written":
            fold._Task.run = lambda *_: os._exit(0)
        elif stage == "some written":
            files.sync_data = lambda descriptor, where: "rows" in str(where) and os._exit(0)
        else:
            checksums.write_sums = lambda *arguments: os._exit(0)
        store.checkpoint()

    in_fork(die_within_a_fold)
    assert verified(path, "r") == []
    assert verified(path, "r+") == []
    flip(path / "plain/rows/c.0.0", 64)
    assert [each.rows for each in verified(path)] == [(0, 64)]


# ---- random damage ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_damage_is_refused_or_reported_or_changes_nothing(part, elsewhere):
    """Never a silently wrong row."""
    counts = elsewhere(damage_many)
    assert all(count > DAMAGES // PARTS // 25 for count in counts.values()), counts
