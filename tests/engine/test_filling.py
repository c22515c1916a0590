"""Tables that are filled before the commit: what lookups, commits, rollbacks and folds make of it, and failures."""

import os
import random
import signal
import threading
import time

import numpy as np
import pytest
from support import inside
from support.stores import close_quietly

import shardemb
from shardemb.commits import fills
from shardemb.engine import filling
from shardemb.format import store_paths
from shardemb.initializers import Uniform
from shardemb.optim import Adagrad, Adam
from shardemb.storage import address_space, files

ROWS = 3000


@pytest.fixture(autouse=True)
def low_limits(monkeypatch):
    monkeypatch.setattr(filling, "LEAST_BYTES", 8192)
    monkeypatch.setattr(filling, "PIECE_BYTES", 16_384)
    monkeypatch.setattr(filling, "TAKEN_BACK_ROWS", 300)


def new_table(store, name="t", dim=16, **more):
    table = store.create_table(name, num_embeddings=ROWS, embedding_dim=dim, rows_per_shard=1024, **more)
    store.commit()
    return table


def values(count, dim=16, seed=0):
    return np.random.default_rng(seed).random((count, dim), np.float32)


def everything(table):
    ids = np.arange(table.num_embeddings)
    columns = list(inside.state(table).spec.columns)[1:]
    return np.hstack([table.lookup(ids), *(table.state(each, ids).reshape(ids.size, -1) for each in columns)])


def filled(table):
    """Rows in fills that no commit has."""
    return inside.shards(table).filled.changes


KINDS = {
    "zeros": {},
    "random": {"initializer": Uniform(-1, 1, seed=3)},
    "state": {"optimizer": Adam(lr=0.1)},
    "random and state": {
        "initializer": Uniform(-1, 1, seed=3),
        "optimizer": Adagrad(initial_accumulator_value=0.5),
    },
    "counters": {"optimizer": Adam(lr=0.1), "counters": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_a_filled_table_is_one_that_was_written_row_by_row(path, kind, seed, monkeypatch):
    """The same calls on a table in which nothing is filled give the same rows, also to readers and after reopening."""
    chance, dim = random.Random(f"{kind} {seed}"), [16, 7, 48, 33][seed]
    stores = [
        shardemb.open(path.with_name(f"{name}.zarr"), warm=seed % 2 == 0) for name in ("filled", "plain")
    ]
    tables = [new_table(store, dim=dim, **KINDS[kind]) for store in stores]
    took_part = 0
    for step in range(25):
        what = chance.choice(
            ["fill", "fill", "fill", "some", "update", "commit", "commit", "rollback", "fold", "reopen"]
        )
        start, count = chance.randrange(ROWS), chance.choice([100, 700, 2500])
        for number, store in enumerate(stores):
            rng, table = np.random.default_rng(step), tables[number]
            monkeypatch.setattr(filling, "LEAST_BYTES", 2**40 if number else 8192)
            if what == "fill":
                ids = np.arange(start, min(start + count, ROWS))
                if step % 3 == 0:
                    ids = rng.permutation(np.concatenate([ids, ids[:5]]))
                table.write(ids, rng.random((ids.size, dim), np.float32))
                took_part += filled(table)
            elif what == "some":
                table.write(rng.integers(0, ROWS, 20), rng.random((20, dim), np.float32))
            elif what == "update" and table.optimizer is not None:
                table.update(rng.integers(0, ROWS, 20), rng.random((20, dim), np.float32))
            elif what == "commit":
                store.commit()
            elif what == "rollback":
                store.rollback()
            elif what == "fold":
                store.checkpoint()
            elif what == "reopen":
                close_quietly(store)
                stores[number] = shardemb.open(store.path, warm=seed % 2 == 0)
                tables[number] = stores[number]["t"]
        one, other = tables
        assert np.array_equal(everything(one), everything(other)), (step, what)
        assert one.stats()["rows_written"] >= filled(one)
        assert inside.state(one).changed_rows == inside.state(other).changed_rows, (step, what)
        assert stores[0].has_changes == stores[1].has_changes
        if what in ("commit", "rollback"):
            with shardemb.open(stores[0].path, "r") as reader:
                assert np.array_equal(everything(reader["t"]), everything(other))
    for store in stores:
        assert store.verify() == []
        close_quietly(store)
    assert took_part


def test_filled_rows_take_no_memory_and_no_log(store):
    table = new_table(store)
    before = store.stats()["bytes_written"]
    table.write(np.arange(ROWS), values(ROWS))
    assert filled(table) >= 2048
    assert inside.shards(table).overlay.slots.count == ROWS - filled(table)
    store.commit()
    store.checkpoint()
    assert store.stats()["bytes_written"] - before < 1.5 * ROWS * 64 + 2**18
    assert np.array_equal(table.lookup(np.arange(ROWS)), values(ROWS))


def test_a_table_that_no_commit_has_is_filled_too(path):
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=16)
        table.write(np.arange(ROWS), values(ROWS))
        assert filled(table)
        store.commit()
    with shardemb.open(path) as store:
        assert np.array_equal(store["t"].lookup(np.arange(ROWS)), values(ROWS))
        assert store.verify() == []


def plan(table, start, stop):
    return filling.plan(inside.shards(table), np.arange(start, stop))


def test_blocks_that_were_written_are_not_filled(store):
    table = new_table(store)
    assert [(each.first, each.stop) for each in plan(table, 10, 700)] == [(1, 10)]
    table.write([300], values(1))  # a changed row, in block 4
    assert [(each.first, each.stop) for each in plan(table, 10, 700)] == [(1, 4), (5, 10)]
    store.commit()  # a row that waits for a fold
    assert [(each.first, each.stop) for each in plan(table, 10, 700)] == [(1, 4), (5, 10)]
    store.checkpoint()
    assert [(each.first, each.stop) for each in plan(table, 10, 700)] == [(1, 4), (5, 10)]
    table.write(np.arange(320, 640), values(320))
    assert plan(table, 320, 640) == ()


def test_a_table_that_is_filled_in_order_is_announced_a_few_times(store):
    table = new_table(store)
    announcements, named = inside.runtime(store).announcements, []
    for start in range(0, ROWS, 200):
        table.write(np.arange(start, min(start + 200, ROWS)), values(min(200, ROWS - start)))
        named.append(announcements._count)
        assert announcements.cover(inside.shards(table).filled.unfinished())
    assert named[0] == 1
    assert named[-1] <= 5
    store.commit()
    with shardemb.open(store.path, "r") as reader:  # what is named ahead and written otherwise counts
        assert np.array_equal(reader["t"].lookup(np.arange(ROWS)), table.lookup(np.arange(ROWS)))


def test_what_was_named_ahead_and_written_by_row_counts(path):
    with shardemb.open(path) as store:
        table = new_table(store)
        table.write(np.arange(1000), values(1000))
        assert inside.runtime(store).announcements._durable[0].rows(64)[1] > 1500
        table.write([1100, 1499], values(2))
        store.commit()
        expected = everything(table)
        for _ in range(2):
            with shardemb.open(path, "r") as reader:
                assert np.array_equal(everything(reader["t"]), expected)
                assert reader.verify() == []
            store.checkpoint()
        store.rollback()
    with shardemb.open(path) as store:
        assert np.array_equal(everything(store["t"]), expected)


def test_too_few_rows_or_rows_with_gaps_are_not_filled(store):
    table = new_table(store)
    assert plan(table, 1, 180) == ()
    assert filling.plan(inside.shards(table), np.arange(0, ROWS, 2)) == ()


@pytest.mark.parametrize("kind", ["zeros", "random"])
def test_what_other_programs_wrote_is_not_filled_over(path, kind):
    """They may write values of rows, of which no checksum knows."""
    with shardemb.open(path) as store:
        new_table(store, **KINDS[kind])
    bits = path / "t/present/c.0"
    with (path / "t/rows/c.0.0").open("r+b") as file:
        file.seek(300 * 64)
        file.write(values(1, seed=5).tobytes())
    if kind == "random":
        with bits.open("r+b") as file:
            file.seek(300 // 8)
            file.write(bytes([1 << 300 % 8]))
    with shardemb.open(path) as store:
        table = store["t"]
        before = everything(table)
        assert np.array_equal(before[300], values(1, seed=5)[0])
        table.write(np.arange(ROWS), values(ROWS))
        assert filled(table)
        store.rollback()
        assert np.array_equal(everything(table), before)


def test_a_file_with_another_name_is_not_written(store, tmp_path):
    table = new_table(store)
    os.link(inside.shards(table).shard_path(0), tmp_path / "other")
    table.write(np.arange(ROWS), values(ROWS))
    assert not (tmp_path / "other").read_bytes().strip(b"\0")
    assert [each.first for each in inside.shards(table).filled.unfinished()] == [16]


# ---- readers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_readers_see_commits_only(store, kind):
    """One from before the write, one from before the commit, and one from after it."""
    table = new_table(store, **KINDS[kind])
    table.write([5], values(1))
    store.commit()
    before = everything(table)
    with shardemb.open(store.path, "r") as first:
        table.write(np.arange(500, 2500), values(2000))
        now = everything(table)
        with shardemb.open(store.path, "r") as second:
            for reader in (first, second):
                assert np.array_equal(everything(reader["t"]), before)
                assert reader.verify() == []
            store.commit()
            with shardemb.open(store.path, "r") as third:
                table.write(np.arange(2600, 2900), values(300))
                assert np.array_equal(everything(third["t"]), now)
                assert third.verify() == []
            store.checkpoint()
            second.refresh()
            assert np.array_equal(everything(second["t"]), now)
            # Its commit has none of these rows; they show through once they are folded, each as a whole.
            found = everything(first["t"])
            assert ((found == before).all(axis=1) | (found == now).all(axis=1)).all()


def test_a_reader_beside_writes_finds_no_row_of_them(store):
    table, stop, wrong = new_table(store), threading.Event(), []

    def read():
        with shardemb.open(store.path, "r") as reader:
            while not stop.is_set():
                if reader["t"].lookup(np.arange(ROWS)).any():
                    wrong.append("rows")
                if reader["t"].lookup_bag(np.arange(ROWS), [0]).any():
                    wrong.append("bags")

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(20):
        table.write(np.arange(ROWS), values(ROWS) + 1)
        store.rollback()
    stop.set()
    thread.join()
    assert not wrong


def test_a_damaged_note_is_named(store, in_fork):
    table = new_table(store)
    table.write(np.arange(ROWS), values(ROWS))
    note = store_paths.fills(store.path)
    note.write_bytes(note.read_bytes().replace(b"1", b"2"))
    with pytest.raises(shardemb.FormatError, match="fills.json"):
        shardemb.open(store.path, "r")["t"].lookup([1])
    store.rollback()


# ---- what goes wrong --------------------------------------------------------------------------------------------


def failing_at(number, error, monkeypatch):
    """Let the write of a number to a shard raise an error; return a list that says how many are left."""
    real, left = files.write, [number]

    def write(descriptor, data, offset, path):
        if "/rows/" in str(path):
            left[0] -= 1
            if left[0] < 0:
                raise type(error)(*error.args)  # a new one, which keeps nothing of an earlier test
        real(descriptor, data, offset, path)

    monkeypatch.setattr(files, "write", write)
    return left


@pytest.mark.parametrize("number", [0, 1, 5])
@pytest.mark.parametrize(
    "error", [(shardemb.DiskFullError, 28, "full"), (OSError, 5, "it failed"), (KeyboardInterrupt,)], ids=repr
)
@pytest.mark.parametrize("kind", ["zeros", "random and state"])
def test_a_write_that_fails_changes_nothing(path, number, error, kind, monkeypatch):
    with shardemb.open(path) as store:
        table = new_table(store, **KINDS[kind])
        table.write(np.arange(200), values(200))
        before = everything(table)
        failing_at(number, error[0](*error[1:]), monkeypatch)
        with pytest.raises(error[0]):
            table.write(np.arange(100, ROWS), values(ROWS - 100))
        monkeypatch.undo()
        assert np.array_equal(everything(table), before)
        with shardemb.open(path, "r") as reader:  # in its commit, not even the first rows were written
            assert np.array_equal(everything(reader["t"])[200:], before[200:])
        store.commit()
        store.checkpoint()
        assert store.verify() == []
    with shardemb.open(path) as store:
        assert np.array_equal(everything(store["t"]), before)


def test_a_write_that_cannot_be_undone_needs_a_rollback(path, monkeypatch):
    with shardemb.open(path) as store:
        table = new_table(store)
        before = everything(table)
        failing_at(3, OSError(5, "it failed"), monkeypatch)
        monkeypatch.setattr(files, "punch", lambda *arguments: (_ for _ in ()).throw(OSError(5, "neither")))
        with pytest.raises(OSError, match="neither"):
            table.write(np.arange(ROWS), values(ROWS))
        monkeypatch.undo()
        for call in (store.commit, lambda: table.write([1], values(1))):
            with pytest.raises(shardemb.PoisonedError, match="rollback"):
                call()
        store.rollback()
        assert np.array_equal(everything(table), before)
        store.commit()


def test_holes_that_a_file_system_cannot_make_are_written(path, monkeypatch):
    monkeypatch.setattr(files, "punch", lambda *arguments: False)
    monkeypatch.setattr(fills, "ZEROED_BYTES", 8192)
    with shardemb.open(path) as store:
        table = new_table(store)
        table.write(np.arange(ROWS), values(ROWS))
        store.rollback()
        assert not everything(table).any()
        table.write(np.arange(ROWS), values(ROWS))  # zeros that are no holes
        assert filled(table)
        store.rollback()


def test_ctrl_c_between_pieces_changes_nothing(path, monkeypatch):
    with shardemb.open(path, threads=1) as store:
        table = new_table(store)
        left = failing_at(10**9, None, monkeypatch)
        real = files.write

        def write(*arguments):
            if left[0] == 10**9 - 3:
                os.kill(os.getpid(), signal.SIGINT)
            real(*arguments)

        monkeypatch.setattr(files, "write", write)
        with pytest.raises(KeyboardInterrupt):
            table.write(np.arange(ROWS), values(ROWS))
        monkeypatch.undo()
        assert not everything(table).any()
        assert not store.has_changes


@pytest.mark.parametrize("kind", ["zeros", "random and state"])
@pytest.mark.parametrize("when", ["within", "after"])
def test_a_writer_is_killed(path, kind, when, in_fork, monkeypatch):
    with shardemb.open(path) as store:
        before = everything(new_table(store, **KINDS[kind]))

    def write():
        store = shardemb.open(path)
        if when == "within":
            monkeypatch.setattr(address_space, "begin_write_back", lambda *arguments: os._exit(0))
        store["t"].write(np.arange(ROWS), values(ROWS))
        os._exit(0)

    in_fork(write)
    assert (path / "t/rows/c.1.0").read_bytes().strip(b"\0") or (path / "t/rows/c.0.0").read_bytes().strip(
        b"\0"
    )
    for mode in ("r", "r+", "r"):
        with shardemb.open(path, mode) as store:
            assert np.array_equal(everything(store["t"]), before)
            assert store.verify() == []
    assert not (path / "t/rows/c.0.0").read_bytes().strip(b"\0")


def test_close_discards_what_no_commit_has(path):
    store = shardemb.open(path)
    new_table(store).write(np.arange(ROWS), values(ROWS))
    with pytest.warns(RuntimeWarning, match="since commit"):
        store.close()
    assert not store_paths.fills(path).exists()
    with shardemb.open(path) as store:
        assert not everything(store["t"]).any()
        assert store.verify() == []


def test_what_close_cannot_undo_the_next_opening_does(path, monkeypatch):
    store = shardemb.open(path)
    table = new_table(store)
    table.write([2900], values(1))
    store.commit()
    expected = everything(table)
    table.write(np.arange(2000), values(2000))

    def fail(*arguments):
        raise OSError(5, "it failed")

    monkeypatch.setattr(files, "punch", fail)
    with pytest.warns(RuntimeWarning) as caught:
        store.close()
    assert any("it failed" in str(each.message) for each in caught)
    monkeypatch.undo()
    for mode in ("r", "r+"):
        with shardemb.open(path, mode) as store:
            assert np.array_equal(everything(store["t"]), expected)


def test_a_full_log_leaves_the_fill_uncommitted(path, monkeypatch):
    with shardemb.open(path) as store:
        table = new_table(store)
        table.write(np.arange(ROWS), values(ROWS))
        begin = type(inside.journal(store)._log).begin

        def full(self, nbytes):
            raise shardemb.DiskFullError(28, "full")

        monkeypatch.setattr(type(inside.journal(store)._log), "begin", full)
        with pytest.raises(shardemb.DiskFullError):
            store.commit()
        monkeypatch.setattr(type(inside.journal(store)._log), "begin", begin)
        assert store.has_changes
        store.commit()
    with shardemb.open(path) as store:
        assert np.array_equal(store["t"].lookup(np.arange(ROWS)), values(ROWS))


# ---- changes of form, copies, forks -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_form(path, kind):
    with shardemb.open(path) as store:
        table = new_table(store, **KINDS[kind])
        table.write(np.arange(100, 2900), values(2800))
        table.write(np.arange(150, 160), values(10, seed=1))
        before = everything(table)
        with pytest.raises(shardemb.ShardEmbError, match="not committed"):
            store.reshard("t", rows_per_shard=2048)
        table.resize(ROWS + 100)
        assert not filled(table)
        assert np.array_equal(everything(table)[:ROWS], before)
        store.rename_table("t", "u")
        table.write(np.arange(ROWS - 50, ROWS + 100), values(150))
        expected = everything(table)
        store.commit()
        store.reshard("u", rows_per_shard=2048)
        assert np.array_equal(everything(store["u"]), expected)
        assert store.verify() == []
        store.drop_table("u")
        store.commit()


def test_a_table_with_a_fill_is_dropped(path):
    with shardemb.open(path) as store:
        table = new_table(store)
        table.write(np.arange(ROWS), values(ROWS))
        now = everything(table)
        store.drop_table("t")
        store.rollback()
        assert not everything(store["t"]).any()
        store["t"].write(np.arange(ROWS), values(ROWS))
        assert np.array_equal(everything(store["t"]), now)
        store.drop_table("t")
        store.commit()
        assert "t" not in store


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by", ["writer", "reader"])
def test_copies_have_what_is_committed(path, kind, by):
    with shardemb.open(path) as store:
        table = new_table(store, **KINDS[kind])
        table.write(np.arange(1000), values(1000))
        store.commit()
        table.write(np.arange(500, 510), values(10, seed=1))
        store.commit()
        expected = everything(table)
        table.write(np.arange(1200, ROWS), values(ROWS - 1200))
        with shardemb.open(path, "r") as reader:
            (store if by == "writer" else reader).copy(path.with_name("copy.zarr"))
        with shardemb.open(path.with_name("copy.zarr")) as copy:
            assert np.array_equal(everything(copy["t"]), expected)
            assert copy.verify() == []
        store.rollback()


def test_damage_to_a_fill_is_found_once_it_is_folded(path):
    with shardemb.open(path) as store:
        table = new_table(store)
        table.write(np.arange(ROWS), values(ROWS))
        store.commit()
        with (path / "t/rows/c.1.0").open("r+b") as file:
            file.seek(8192)
            file.write(b"damage")
        (found,) = store.verify()
        assert found.shard == 1


def test_a_forked_child_reads_filled_rows(store, in_fork):
    table = new_table(store, **KINDS["random"])
    table.write(np.arange(ROWS), values(ROWS))
    assert in_fork(lambda: np.array_equal(table.lookup(np.arange(ROWS)), values(ROWS)))
    store.rollback()


def test_rows_folded_beside_a_fill_stay_when_they_leave_memory(path):
    """The page of the bitmap is private to the process, which the fold does not write to."""
    with shardemb.open(path, memory_budget=0) as store:
        table = new_table(store, **KINDS["random"])
        table.write(np.arange(1024, 2048), values(1024))
        assert filled(table)
        table.write([1, 2900], values(2, seed=1))
        expected = everything(table)
        store.commit()
        table.write([3], values(1))
        table.write(np.arange(2200, 2700), values(500))
        expected = everything(table)
        store.checkpoint()
        assert np.array_equal(everything(table), expected)
        store.rollback()
        expected[[3, *range(2200, 2700)]] = everything(table)[[3, *range(2200, 2700)]]
        assert np.array_equal(everything(table), expected)
        assert inside.shards(table).filled._private == set()


def test_a_keyed_table_is_filled(path):
    with shardemb.open(path) as store:
        store.create_vocabulary("words", key_type="int64")
        store.create_table("t", vocabulary="words", embedding_dim=16)
        keys = np.arange(10_000, 12_000)
        store["t"].lookup(keys, create=True)
        store.commit()
        store["t"].write(keys, values(2000))
        store.commit()
    with shardemb.open(path) as store:
        assert np.array_equal(store["t"].lookup(keys), values(2000))
        assert store.verify() == []


def test_writes_of_several_threads(path):
    with shardemb.open(path) as store:
        table = new_table(store)
        parts = [(start, start + 500) for start in range(0, ROWS, 500)]
        threads = [
            threading.Thread(target=table.write, args=(np.arange(*part), values(500, seed=part[0])))
            for part in parts
        ]
        for each in threads:
            each.start()
        while any(each.is_alive() for each in threads):
            table.lookup(np.arange(ROWS))
            time.sleep(0.001)
        store.commit()
        for start, stop in parts:
            assert np.array_equal(table.lookup(np.arange(start, stop)), values(500, seed=start))
