"""Tables rewritten with other rows, other shards, another optimizer, or as a copy; and rows that are materialized."""

import contextlib
import errno
import itertools
import os
import shutil
import threading

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inside
from support.model import assert_same_bits

import shardemb
from shardemb.base.sizes import PAGE
from shardemb.commits import fold, log_writer, rewrite
from shardemb.engine import table_state
from shardemb.errors import (
    DiskFullError,
    FormatError,
    ReadOnlyError,
    RowIdError,
    ShardEmbError,
    StaleReaderError,
    StoreExistsError,
)
from shardemb.initializers import Constant, Normal, Uniform
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad
from shardemb.storage import files, folders

DIM = 5
KINDS = {
    "zeros": {},
    "drawn": {"initializer": Uniform(-1, 1, seed=3), "optimizer": Adam(lr=0.1)},
    "state_alone": {"optimizer": Adagrad(lr=0.1, initial_accumulator_value=0.5)},
    "row-wise": {"initializer": Normal(seed=1), "optimizer": RowWiseAdagrad()},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s"


def create(store, rows, kind="drawn", name="t", rows_per_shard=192):
    return store.create_table(
        name, num_embeddings=rows, embedding_dim=DIM, rows_per_shard=rows_per_shard, **KINDS[kind]
    )


def train(table, seed, count=40):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, table.num_embeddings, count)
    values = rng.normal(size=(count, DIM)).astype(np.float32)
    table.update(ids, values) if table.optimizer else table.write(ids, values)


def everything(table):
    ids = np.arange(table.num_embeddings)
    states = [table.state(column, ids) for column in list(inside.state(table).spec.columns)[1:]]
    return [table.lookup(ids), *(each.reshape(ids.size, -1) for each in states)]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same_bits(mine, theirs)


def inodes(path):
    return {int(each.name.split(".")[1]): each.stat().st_ino for each in (path / "t" / "rows").glob("c.*")}


# ---- another number of rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("resize"), st.integers(1, 1500)),
            st.tuples(st.sampled_from(["train", "commit", "rollback", "checkpoint", "reopen"]), st.none()),
        ),
        max_size=12,
    ),
    st.sampled_from([0, 2**30]),
    st.sampled_from([64, 192, 1024]),
)
def test_a_table_that_grows_and_shrinks_equals_one_that_keeps_everything(
    tmp_path_factory, kind, events, budget, rows_per_shard
):
    """The model is a table that is large from the start, in which each resize resets the dropped rows."""
    path = tmp_path_factory.mktemp("grown") / "s"
    store = shardemb.open(path, memory_budget=budget)
    table = create(store, 700, kind, rows_per_shard=rows_per_shard)
    fresh = everything(create(store, 1500, kind, "t2"))  # of another stream: only its state is compared
    store.drop_table("t2")
    with shardemb.open(tmp_path_factory.mktemp("large") / "s") as large:
        fresh[0] = everything(create(large, 1500, kind))[0]
        large.rollback()
    store.commit()
    now = saved = [each[:700].copy() for each in fresh]
    step = 0
    for event, argument in events:
        if event == "resize":
            table.resize(argument, drop_rows=True)
            now = [
                np.concatenate([mine[:argument], new[len(mine) : argument]])
                for mine, new in zip(now, fresh, strict=True)
            ]
        elif event == "train":
            step += 1
            train(table, step)
            now = everything(table)
        elif event == "commit":
            store.commit()
            saved = now
        elif event == "rollback":
            store.rollback()
            now = saved
        elif event == "checkpoint":
            store.checkpoint()
        else:
            store.rollback()
            store.close()
            store = shardemb.open(path, memory_budget=budget)
            table, now = store["t"], saved
        assert table.num_embeddings == len(now[0])
        assert_equal(everything(table), now)
        with pytest.raises(RowIdError):
            table.lookup([table.num_embeddings])
    store.commit()
    store.close()
    with shardemb.open(path) as store:
        assert_equal(everything(store["t"]), now)
        assert store.verify() == []


def test_growth_keeps_the_files(path):
    with shardemb.open(path) as store:
        table = create(store, 500)
        train(table, 1)
        store.commit()
        before = inodes(path)
        table.resize(100_000)
        store.commit()
        after = inodes(path)
        assert {number: after[number] for number in before} == before
        assert len(after) == inside.state(table).spec.num_shards > len(before)
        assert zarr.open_array(str(path / "t" / "rows"), mode="r").shape == (100_000, 3 * DIM)
        assert store.verify() == []
    assert [each.name for each in (path / ".shardemb" / "tables").iterdir()] == []


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 13, 191, 192, 193, 199, 200])
@pytest.mark.parametrize("commits", [True, False])
def test_rows_that_were_dropped_are_fresh_when_the_table_grows_again(path, rows, commits):
    """Their presence bits may share a byte with those of rows that stay."""
    with shardemb.open(path) as store:
        table = create(store, 400)
        fresh = everything(table)
        train(table, 0, 3000)
        store.commit()
        kept = [each[:rows] for each in everything(table)]
        table.resize(rows, drop_rows=True)
        if commits:
            store.commit()
        table.resize(400)
        store.commit()
        assert_equal([each[:rows] for each in everything(table)], kept)
        assert_equal([each[rows:] for each in everything(table)], [each[rows:] for each in fresh])
    with shardemb.open(path) as store:
        assert_equal([each[rows:] for each in everything(store["t"])], [each[rows:] for each in fresh])
        assert store.verify() == []


def test_rows_are_dropped_only_on_request(path):
    with shardemb.open(path) as store:
        table = create(store, 500)
        store.commit()
        with pytest.raises(
            ValueError, match=r"has 500 rows; resize\(499, drop_rows=True\) drops those from 499 on"
        ):
            table.resize(499)
        with pytest.raises(ValueError, match="num_embeddings"):
            table.resize(0)
        table.resize(500)
        assert not store.has_changes


def test_too_many_shards_are_refused_and_leave_nothing_behind(path):
    with shardemb.open(path) as store:
        table = create(store, 500)
        store.commit()
        with pytest.raises(ShardEmbError, match="use larger shards"):
            table.resize(10**8)
        assert table.num_embeddings == 500
        assert not store.has_changes
        assert list((path / ".shardemb" / "tables").iterdir()) == []


def test_an_earlier_reader_sees_the_old_size_until_it_refreshes(path):
    with shardemb.open(path) as store:
        table = create(store, 500)
        train(table, 1)
        store.commit()
        before = everything(table)
        with shardemb.open(path, "r") as reader:
            seen = reader["t"]
            table.resize(900)
            train(table, 2)
            store.commit()
            assert seen.num_embeddings == 500
            table.resize(300, drop_rows=True)
            store.commit()
            store.checkpoint()
            assert seen.num_embeddings == 500
            with pytest.raises(RowIdError):
                seen.lookup([500])
            assert seen.lookup(np.arange(500)).shape == before[0].shape
            reader.refresh()
            assert reader["t"] is seen
            assert_equal(everything(seen), everything(table))


def test_a_change_that_waited_while_the_table_grew_is_not_lost(path):
    with shardemb.open(path) as store:
        table = create(store, 500)
        store.commit()
        change = inside.state(table).plan_change([3], np.ones((1, DIM)), "rows", check_finite=True)
        gone = inside.state(table).plan_change([400], np.ones((1, DIM)), "rows", check_finite=True)
        table.resize(600)
        table.resize(300, drop_rows=True)
        shardemb.engine.batch.change(inside.runtime(store), [change])
        assert (table.lookup(3) == 1).all()
        with pytest.raises(ShardEmbError, match="lost rows"):
            shardemb.engine.batch.change(inside.runtime(store), [gone])
        store.rollback()
        shardemb.engine.batch.change(inside.runtime(store), [gone])
        assert (table.lookup(400) == 1).all()
        store.rollback()


def test_a_resized_table_can_be_dropped_and_comes_back(path):
    with shardemb.open(path) as store:
        table = create(store, 500)
        train(table, 1)
        store.commit()
        before = everything(table)
        table.resize(700)
        store.drop_table("t")
        store.rollback()
        assert_equal(everything(store["t"]), before)
        table.resize(700)
        store.drop_table("t")
        store.commit()
    with shardemb.open(path) as store:
        assert list(store) == []


def test_without_hard_links_shards_are_copied(path, monkeypatch):
    monkeypatch.setattr(
        os, "link", lambda *names, **more: (_ for _ in ()).throw(PermissionError(1, "no links here"))
    )
    with shardemb.open(path) as store:
        table = create(store, 500)
        train(table, 1)
        store.commit()
        before = everything(table)[0]
        table.resize(600)
        store.commit()
        assert_same_bits(table.lookup(np.arange(500)), before)
        assert store.verify() == []


# ---- other shards, another optimizer ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(
    st.integers(1, 3000),
    st.sampled_from([64, 192, 1024]),
    st.sampled_from([64, 128, 960, 4096]),
    st.integers(0, 200),
)
def test_other_shards_hold_the_same_bits(tmp_path_factory, kind, rows, before, after, count):
    path = tmp_path_factory.mktemp("s") / "s"
    with shardemb.open(path) as store:
        table = create(store, rows, kind, rows_per_shard=before)
        train(table, 1, count)
        store.commit(step=3, metadata={"x": 1})
        expected = everything(table)
        step = table.step
        commit = store.reshard("t", rows_per_shard=after)
        assert (commit.id, commit.step, commit.metadata) == (2, 3, {"x": 1})
        assert table.rows_per_shard == shardemb.format.spec.choose_rows_per_shard(
            rows, inside.state(table).spec.record_bytes, after, 9
        )
        assert (table.step, store["t"]) == (step, table)
        assert_equal(everything(table), expected)
        assert store.verify() == []
        train(table, 2)
        store.commit()
        expected = everything(table)
    with shardemb.open(path) as store:
        assert_equal(everything(store["t"]), expected)
        assert store.verify() == []


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", [None, SGD(), Adam(lr=0.5), Adagrad(initial_accumulator_value=0.25)], ids=str)
def test_another_optimizer_keeps_the_weights_and_starts_with_a_fresh_state(path, old, new):
    with shardemb.open(path) as store:
        table = create(store, 1000, old)
        train(table, 1)
        store.commit()
        weights = everything(table)[0]
        store.reshard("t", optimizer=new)
        assert (table.optimizer, table.step) == (new, 0)
        found = everything(table)
        assert_same_bits(found[0], weights)
        for state in found[1:]:
            assert (state == (0.25 if isinstance(new, Adagrad) else 0)).all()
        if new:
            table.update([5], np.ones((1, DIM)))
            store.commit()
        expected = everything(table)
    with shardemb.open(path) as store:
        assert_equal(everything(store["t"]), expected)
        assert store.verify() == []


def test_rows_never_written_take_no_disk_space_in_other_shards(path):
    with shardemb.open(path) as store:
        table = store.create_table(
            "t", num_embeddings=10**8, embedding_dim=32, initializer=Uniform(-1, 1), rows_per_shard=2**20
        )
        table.write([0, 10**8 - 1], np.ones((2, 32)))
        store.commit()
        store.reshard("t", rows_per_shard=2**22)
        assert files.allocated(path / "t" / "rows") < 100_000
        assert (table.lookup([0, 10**8 - 1]) == 1).all()


def test_resharding_continues_after_an_interruption(path, monkeypatch):
    with shardemb.open(path) as store:
        table = create(store, 12_000)
        train(table, 1, 8000)
        store.commit()
        expected = everything(table)
        filled, real = [], rewrite._fill

        def fill(old, new, file, staged, *, keep_state):
            filled.append(file.number)
            if len(filled) == 4:
                raise KeyboardInterrupt
            real(old, new, file, staged, keep_state=keep_state)

        monkeypatch.setattr(rewrite, "_fill", fill)
        with pytest.raises(KeyboardInterrupt):
            store.reshard("t", rows_per_shard=256)
        assert not store.has_changes
        assert_equal(everything(table), expected)
    with shardemb.open(path) as store:
        seen = []
        store.reshard("t", rows_per_shard=256, progress=lambda done, total: seen.append((done, total)))
        assert filled == [0, 1, 2, 3, *range(3, 12)]
        assert seen[-1] == (12_000, 12_000)
        assert_equal(everything(store["t"]), expected)
        assert store.verify() == []
        assert not list((path / ".shardemb" / "rebuilt").iterdir())


def test_a_rewrite_interrupted_before_another_commit_is_started_again(path, monkeypatch):
    with shardemb.open(path) as store:
        table = create(store, 3000)
        store.commit()
        with monkeypatch.context() as patch:
            patch.setattr(files, "publish", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                store.reshard("t", rows_per_shard=256)
        train(table, 1, 2000)
        store.commit()
        expected = everything(table)
        store.reshard("t", rows_per_shard=256)
        assert_equal(everything(table), expected)


def test_a_rewrite_interrupted_and_half_removed_is_started_again(path, monkeypatch):
    with shardemb.open(path) as store:
        table = create(store, 5000)
        train(table, 1, 2000)
        store.commit()
        expected = everything(table)
        with monkeypatch.context() as patch:
            patch.setattr(rewrite, "_fill", lambda *a, **b: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                store.reshard("t", rows_per_shard=2048)

        def remove_tree(path):
            (path / "rows" / "zarr.json").unlink()
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(files, "remove_tree", remove_tree)
            with pytest.raises(KeyboardInterrupt):
                store.reshard("t", rows_per_shard=4096)
        store.reshard("t", rows_per_shard=2048)
    with shardemb.open(path) as store:
        assert_equal(everything(store["t"]), expected)
        assert store.verify() == []


@pytest.mark.parametrize("new", ["keep", None], ids=str)
def test_resharding_that_cannot_be_committed_leaves_the_table_and_is_not_repeated(path, monkeypatch, new):
    with shardemb.open(path) as store:
        table = create(store, 5000)
        train(table, 1, 2000)
        store.commit()
        before, optimizer, step = everything(table), table.optimizer, table.step
        with monkeypatch.context() as patch:
            patch.setattr(
                log_writer.Log,
                "begin",
                lambda *arguments: (_ for _ in ()).throw(DiskFullError(28, "no room")),
            )
            with pytest.raises(DiskFullError):
                store.reshard("t", rows_per_shard=2048, optimizer=new)
        assert not store.has_changes
        assert (table.rows_per_shard, table.optimizer, table.step) == (1024, optimizer, step)
        assert_equal(everything(table), before)
        monkeypatch.setattr(rewrite, "_fill", None)
        store.reshard("t", rows_per_shard=2048, optimizer=new)
        assert table.rows_per_shard == 2048
        assert_same_bits(everything(table)[0], before[0])
        assert store.verify() == []


def test_resharding_requires_that_everything_is_committed(path):
    with shardemb.open(path) as store:
        table = create(store, 500)
        with pytest.raises(ShardEmbError, match="not committed"):
            store.reshard("t", rows_per_shard=64)
        store.commit()
        train(table, 1)
        with pytest.raises(ShardEmbError, match="not committed"):
            store.reshard("t", rows_per_shard=64)
        store.rollback()
        with pytest.raises(TypeError, match="optimizer"):
            store.reshard("t", optimizer="adam")


def damage(path, offset=100):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("where", ["rows/c.0.0", "present/c.0"])
def test_damage_is_not_copied_as_valid_data(path, where):
    with shardemb.open(path) as store:
        table = create(store, 500)
        table.write(np.arange(500), np.ones((500, DIM)))
        store.commit()
        store.checkpoint()
        damage(path / "t" / where)
        with pytest.raises(FormatError, match="is damaged; store.verify"):
            store.reshard("t", rows_per_shard=64)
        with pytest.raises(FormatError, match="is damaged; store.verify"):
            table.resize(300, drop_rows=True)
        assert table.num_embeddings == 500
        assert len(store.verify()) == 1


def test_damage_in_a_block_of_which_one_byte_stays_is_not_copied_as_valid_data(path):
    rows = 8 * PAGE + 3  # with three bits in the second block of the bitmap
    with shardemb.open(path) as store:
        table = create(store, 40_000)
        written = [0, 4, rows - 3, rows - 1, rows, 39_999]
        table.write(written, np.ones((len(written), DIM)))
        store.commit()
        store.checkpoint()
        damage(path / "t" / "present" / "c.0", offset=PAGE)
        before = everything(table)
        with pytest.raises(FormatError, match="is damaged; store.verify"):
            table.resize(rows, drop_rows=True)
        assert not store.has_changes
        assert_equal(everything(table), before)
        assert list((path / ".shardemb" / "tables").iterdir()) == []
        assert len(store.verify()) == 1


# ---- rows that were never written -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_materialized_rows_are_what_zarr_reads(path, kind, monkeypatch):
    monkeypatch.setattr(table_state, "MATERIALIZED_BYTES", 16_384)
    with shardemb.open(path, log_bytes=100_000) as store:
        table = create(store, 2000, kind)
        train(table, 1)
        store.commit(step=7)
        train(table, 2)  # not committed
        prefetched = np.arange(300, 400)
        shardemb.engine.batch.prefetch(
            inside.runtime(store), inside.state(table), prefetched, for_update=True
        )
        now, seen = everything(table), []
        table.materialize(progress=lambda done, total: seen.append((done, total)))
        assert_equal(everything(table), now)
        store.rollback()
        committed = everything(table)
        table.materialize()  # the rows that had changes
        assert_equal(everything(table), committed)
        assert store.last_commit.id == 1
        assert store.verify() == []
    assert_same_bits(
        zarr.open_array(str(path / "t" / "rows"), mode="r")[:], np.concatenate(committed, axis=1)
    )
    with shardemb.open(path) as store:
        assert_equal(everything(store["t"]), committed)
        assert (not seen) == (kind == "zeros")


@pytest.mark.parametrize("full", ["rows/c.1.0", "present/c.0", None])
def test_rows_keep_their_values_while_they_are_materialized(path, monkeypatch, full):
    with shardemb.open(path, threads=1) as store:
        table = create(store, 3000)
        store.commit()
        expected, run = everything(table), fold._Task.run

        def look_meanwhile(task, *rest):
            if full and task.patch.file.path == path / "t" / full:
                raise DiskFullError(28, "no room")
            run(task, *rest)
            assert_equal(everything(table), expected)

        monkeypatch.setattr(fold._Task, "run", look_meanwhile)
        with pytest.raises(DiskFullError) if full else contextlib.nullcontext():
            table.materialize()
        monkeypatch.undo()
        assert_equal(everything(table), expected)
        table.update(np.arange(3000), np.ones((3000, DIM)))
        after = everything(table)
        store.rollback()
        assert_equal(everything(table), expected)
        with shardemb.open(path.with_name("other")) as other:
            never = create(other, 3000)
            never.update(np.arange(3000), np.ones((3000, DIM)))
            assert_equal(after, everything(never))
            other.rollback()


def test_materializing_continues_after_an_interruption(path, monkeypatch):
    monkeypatch.setattr(table_state, "MATERIALIZED_BYTES", 16_384)
    with shardemb.open(path) as store:
        table = create(store, 2000)
        with pytest.raises(ShardEmbError, match=r"call store.commit\(\) first"):
            table.materialize()
        store.commit()
        expected = everything(table)
        real, calls = fold.write, []

        def stop(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise DiskFullError(28, "no room")
            real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(fold, "write", stop)
            with pytest.raises(DiskFullError):
                table.materialize()
        assert_equal(everything(table), expected)
        table.materialize()
        assert_equal(everything(table), expected)
    assert_same_bits(zarr.open_array(str(path / "t" / "rows"), mode="r")[:], np.concatenate(expected, axis=1))


# ---- copies -----------------------------------------------------------------------------------------------------


def test_a_copy_is_the_last_commit_and_keeps_its_holes(path, tmp_path):
    with shardemb.open(path) as store:
        large = store.create_table("large", num_embeddings=10**7, embedding_dim=64, initializer=Constant(2.0))
        tables = {kind: create(store, 500, kind, kind) for kind in KINDS}
        for table in (large, *tables.values()):
            train_any(table)
        store.rename_table("zeros", "z")
        store.commit(step=9, metadata={"a": 1})
        expected = {name: everything(table) for name, table in store.items() if name != "large"}
        train(tables["drawn"], 2)
        seen = []
        store.copy(tmp_path / "copies" / "c", progress=lambda done, total: seen.append(done / total))
        assert seen[-1] == 1
        assert store.has_changes
        with shardemb.open(tmp_path / "copies" / "c") as copied:
            assert copied.last_commit == store.last_commit
            assert copied.info().uuid != store.info().uuid
            for name, each in expected.items():
                assert_equal(everything(copied[name]), each)
            assert copied.verify() == []
            copied["drawn"].update([1], np.ones((1, DIM)))
            copied.commit()
        assert files.allocated(tmp_path / "copies" / "c") < 3_000_000
        with pytest.raises(StoreExistsError, match="a copy needs a new folder"):
            store.copy(tmp_path / "copies" / "c")
        store.rollback()


def train_any(table):
    table.write([3, table.num_embeddings - 1], np.ones((2, table.embedding_dim)))


def test_commits_continue_during_a_copy_and_are_not_in_it(path, tmp_path, monkeypatch):
    with shardemb.open(path) as store:
        table = create(store, 500)
        train(table, 1)
        store.commit()
        expected, real = everything(table), folders.copy_data

        def copy_data(*arguments):
            train(table, len(store.last_commit.metadata) + 5)
            store.commit()
            real(*arguments)

        monkeypatch.setattr(folders, "copy_data", copy_data)
        store.copy(tmp_path / "c")
        newest = everything(table)
        with shardemb.open(tmp_path / "c", "r") as copied:
            assert copied.last_commit.id == 1
            assert_equal(everything(copied["t"]), expected)
        store.checkpoint()
        assert_equal(everything(table), newest)


def test_a_failed_copy_leaves_nothing_behind(path, tmp_path, monkeypatch):
    with shardemb.open(path) as store:
        create(store, 500)
        store.commit()
        with monkeypatch.context() as patch:
            patch.setattr(files, "sync_tree", lambda path: (_ for _ in ()).throw(OSError(5, "bad disk")))
            with pytest.raises(OSError, match="bad disk"):
                store.copy(tmp_path / "c")
        assert not (tmp_path / "c").exists()
        store.checkpoint()  # folds still work


# ---- a copy from a reader, while another store writes ---------------------------------------------------------


@pytest.fixture
def pair(path):
    """A store with two tables, committed twice and half folded; and a reader of it."""
    with shardemb.open(path) as store:
        for kind in KINDS:
            train(create(store, 500, kind, kind), 1)
        store.commit(step=1)
        store.checkpoint()
        train(store["drawn"], 2)
        store.commit(step=2)
        with shardemb.open(path, "r") as reader:
            yield store, reader
        store.rollback()


def assert_copied(place, expected, step):
    """A copy holds exactly what its tables held at a commit, and no checksum is wrong."""
    with shardemb.open(place) as copied:
        assert copied.last_commit.step == step
        assert set(copied) == set(expected)
        for name, each in expected.items():
            assert_equal(everything(copied[name]), each)
        assert copied.verify() == []
        copied[next(iter(copied))].write([0], np.ones((1, DIM)))
        copied.commit()


def test_a_reader_copies_the_newest_commit_without_what_follows_it(pair, tmp_path):
    store, reader = pair
    expected = {name: everything(table) for name, table in store.items()}
    train(store["zeros"], 5)
    reader.copy(tmp_path / "c")
    assert_copied(tmp_path / "c", expected, 2)
    assert reader.last_commit.step == 2


# What a writer does after a part of the files was copied.
MEANWHILE = {
    "fold": lambda store: train(store["row-wise"], 7),
    "fold again what was not copied yet": lambda store: [train(each, 8, 400) for each in store.values()],
    "create": lambda store: train(create(store, 300, "zeros", "new"), 3),
    "drop": lambda store: store.drop_table("zeros"),
    "rename": lambda store: store.rename_table("drawn", "x"),
    "resize": lambda store: store["drawn"].resize(900),
    "reshard": lambda store: store.reshard("drawn", rows_per_shard=64),
}


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("what", MEANWHILE)
def test_a_copy_follows_what_a_writer_does_meanwhile(pair, tmp_path, what, folded):
    store, reader = pair
    steps = []

    def progress(done, total):
        steps.append(done)
        if len(steps) <= 3:
            (MEANWHILE[what] if len(steps) == 1 else MEANWHILE["fold"])(store)
            store.commit(step=10 + len(steps))
            if folded:
                store.checkpoint()

    reader.copy(tmp_path / "c", progress=progress)
    assert len(steps) > 3
    expected = {name: everything(table) for name, table in store.items()}
    assert_copied(tmp_path / "c", expected, store.last_commit.step)


def test_blocks_that_were_being_written_are_copied_again(pair, tmp_path, monkeypatch):
    """A fold that has written half of its blocks, and ends before the next round."""
    store, _ = pair
    real, started, go_on = fold.files.write, threading.Event(), threading.Event()
    copying = threading.get_ident()

    def write(descriptor, data, offset, path):
        if threading.get_ident() != copying and "rows" in str(path) and "/s/drawn" in str(path):
            real(descriptor, data[: len(data) // 2], offset, path)
            started.set()
            assert go_on.wait(20)
        real(descriptor, data, offset, path)

    monkeypatch.setattr(files, "write", write)
    train(store["drawn"], 9, 400)
    store.commit(step=3)
    expected = {name: everything(table) for name, table in store.items()}
    checkpoint = threading.Thread(target=store.checkpoint)
    checkpoint.start()
    assert started.wait(20)

    def progress(done, total):
        if done == total:
            go_on.set()
            checkpoint.join()

    with shardemb.open(tmp_path / "s", "r", threads=1) as single:
        single.copy(tmp_path / "c", progress=progress)
    assert_copied(tmp_path / "c", expected, 3)


def test_a_writer_that_comes_and_goes_while_a_closed_store_is_copied_is_noticed(path, tmp_path):
    """Such a store has no log, in which something could be missing."""
    with shardemb.open(path) as store:
        train(create(store, 500), 1)
        train(create(store, 500, name="u"), 1)
        store.commit(step=1)
    expected = {}

    def progress(done, total):
        if not expected:
            with shardemb.open(path) as store:
                for name, table in store.items():
                    train(table, 2, 400)
                    expected[name] = everything(table)
                store.commit(step=2)

    with shardemb.open(path, "r") as reader:
        reader.copy(tmp_path / "c", progress=progress)
    assert_copied(tmp_path / "c", expected, 2)


def test_a_block_that_becomes_what_it_was_while_it_is_copied(pair, tmp_path, monkeypatch):
    """Its checksum is the same before and after, but what was copied in between is not."""
    store, reader = pair
    real, before, done = files.read_at, store["zeros"].lookup([7]), []

    def read_at(descriptor, nbytes, offset, path):
        if path == tmp_path / "s" / "zeros" / "rows" / "c.0.0" and not done:
            done.append(path)
            for values in ([[3.0] * DIM], before):
                store["zeros"].write([7], np.array(values, np.float32))
                store.commit(step=3)
                store.checkpoint()
                if values is not before:
                    data = real(descriptor, nbytes, offset, path)
            return data
        return real(descriptor, nbytes, offset, path)

    monkeypatch.setattr(files, "read_at", read_at)
    reader.copy(tmp_path / "c")
    assert done
    assert_copied(tmp_path / "c", {name: everything(table) for name, table in store.items()}, 3)


def test_a_store_that_was_never_closed_is_copied_by_a_reader(pair, tmp_path):
    store, _ = pair
    expected = {name: everything(table) for name, table in store.items()}
    shutil.copytree(store.path, tmp_path / "killed")
    with shardemb.open(tmp_path / "killed", "r") as reader:
        reader.copy(tmp_path / "c")
    assert_copied(tmp_path / "c", expected, 2)


def test_a_copy_gives_up_where_folds_are_too_frequent(pair, tmp_path, monkeypatch):
    store, reader = pair
    monkeypatch.setattr(rewrite, "ROUNDS", 1)

    def progress(done, total):
        train(store["drawn"], done)
        store.commit()
        store.checkpoint()

    with pytest.raises(
        ShardEmbError, match=r"more often than it can be copied; call copy\(\) in the process"
    ):
        reader.copy(tmp_path / "c", progress=progress)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("of_reader", [True, False])
def test_damage_is_copied_as_damage(path, tmp_path, of_reader):
    with shardemb.open(path) as store:
        train(create(store, 500), 1, 400)
        store.commit()
    shard = path / "t" / "rows" / "c.0.0"
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with shardemb.open(path, "r" if of_reader else "r+") as store:
        (found,) = store.verify()
        store.copy(tmp_path / "c")
    with shardemb.open(tmp_path / "c") as copied:
        (again,) = copied.verify()
        assert again.rows == found.rows
        copied["t"].write([found.rows[0]], np.ones((1, DIM)))  # in a part of the block
        copied.commit()
        copied.checkpoint()
        assert [each.rows for each in copied.verify()] == [found.rows]


def test_damage_is_not_hidden_by_what_the_log_has_for_the_same_block(pair, tmp_path):
    store, reader = pair
    store["zeros"].write([3], np.ones((1, DIM)))
    store.commit(step=3)
    store.checkpoint()
    store["zeros"].write([0], np.ones((1, DIM)))
    store.commit(step=4)
    damage(store.path / "zeros" / "rows" / "c.0.0", 3 * 4 * DIM)
    reader.copy(tmp_path / "c")
    with shardemb.open(tmp_path / "c") as copied:
        (found,) = copied.verify()
        assert found.table == "zeros"
        assert copied["zeros"].lookup(0).tolist() == [1] * DIM


def test_a_damaged_block_is_copied_again_too(pair, tmp_path):
    store, reader = pair
    store["zeros"].write([3], np.ones((1, DIM)))
    store.commit(step=3)
    store.checkpoint()
    damage(store.path / "zeros" / "rows" / "c.0.0", 3 * 4 * DIM)
    store["zeros"].write([0], np.ones((1, DIM)))
    store.commit(step=4)
    store.checkpoint()  # notes the block as damaged
    seen = []

    def progress(done, total):
        if done == total and not seen:
            seen.append(done)
            store["zeros"].write([1], np.full((1, DIM), 7, np.float32))
            store.commit(step=5)
            store.checkpoint()

    reader.copy(tmp_path / "c", progress=progress)
    with shardemb.open(tmp_path / "c", "r") as copied:
        assert copied.last_commit.step == 5
        assert copied["zeros"].lookup(1).tolist() == [7] * DIM
        assert len(copied.verify()) == 1


@pytest.mark.parametrize(
    ("module", "call", "what"),
    [(folders, "copy_data", "n.txt"), (files, "create_sparse", "drawn"), (files, "read_at", "zeros/rows")],
)
def test_a_round_that_fails_is_begun_anew(pair, tmp_path, monkeypatch, module, call, what):
    """With the files of other programs, which are copied once."""
    store, reader = pair
    (store.path / "notes").mkdir()
    (store.path / "notes" / "n.txt").write_text("theirs")
    expected = {name: everything(table) for name, table in store.items()}
    real, failed = getattr(module, call), []

    def fail(*arguments):
        if not failed and any(what in str(each) for each in arguments):
            failed.append(call)
            raise FileNotFoundError(errno.ENOENT, "it moved")
        return real(*arguments)

    monkeypatch.setattr(module, call, fail)
    reader.copy(tmp_path / "c")
    assert failed
    assert (tmp_path / "c" / "notes" / "n.txt").read_text() == "theirs"
    assert_copied(tmp_path / "c", expected, 2)


def test_a_copy_that_comes_late_leaves_the_other_alone(pair, tmp_path):
    store, reader = pair
    expected = {name: everything(table) for name, table in store.items()}
    late = []

    def progress(done, total):
        if not late:
            late.append(done)
            with pytest.raises(StoreExistsError):
                store.copy(tmp_path / "c")

    reader.copy(tmp_path / "c", progress=progress)
    with pytest.raises(StoreExistsError):
        reader.copy(tmp_path / "c")
    assert_copied(tmp_path / "c", expected, 2)


def test_a_dropped_table_whose_folder_is_still_there_is_not_copied(pair, tmp_path, monkeypatch):
    store, reader = pair
    store.drop_table("zeros")
    real = folders.arrange

    def arrange(*arguments, **options):
        monkeypatch.setattr(folders, "arrange", real)
        reader.copy(tmp_path / "c")
        return real(*arguments, **options)

    monkeypatch.setattr(folders, "arrange", arrange)
    store.commit(step=3)
    assert not (tmp_path / "c" / "zeros").exists()
    with shardemb.open(tmp_path / "c") as copied:
        create(copied, 100, "zeros", "zeros")
        copied.commit()


def test_a_reader_copies_no_other_store(path, tmp_path):
    with shardemb.open(path) as store:
        create(store, 100)
        store.commit()
    with shardemb.open(path, "r") as reader:
        shutil.rmtree(path)
        with shardemb.open(path) as store:
            store.commit()
        with pytest.raises(StaleReaderError, match="another store"):
            reader.copy(tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_fork_of_the_writer_copies_nothing(path, tmp_path, in_fork):
    with shardemb.open(path) as store:
        create(store, 100)
        store.commit()

        def try_it():
            with pytest.raises(ReadOnlyError):
                store.copy(tmp_path / "c")
            return True

        assert in_fork(try_it)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.parametrize("log_bytes", [2**16, 2**19])
def test_each_copy_is_one_commit_while_a_writer_folds(path, tmp_path, log_bytes):
    rows, finished, failed = 20_000, threading.Event(), []

    def changed(step):
        """Return the rows that a commit sets to its step."""
        return np.random.default_rng(step).choice(rows, 500, replace=False)

    def write(store):
        try:
            for step in itertools.count(1):
                if finished.is_set():
                    break
                store["a"].write(changed(step), np.full((500, DIM), step, np.float32))
                store["b"].write(changed(step), np.full((500, DIM), step, np.float32))
                store.commit(step=step)
        except BaseException as error:
            failed.append(error)
            raise

    with shardemb.open(path, log_bytes=log_bytes) as store:
        for name in "ab":
            create(store, rows, "zeros", name)
        store.commit(step=0)
        writer = threading.Thread(target=write, args=(store,))
        writer.start()
        try:
            with shardemb.open(path, "r") as reader:
                for number in range(5):
                    reader.copy(tmp_path / f"{number}")
        finally:
            finished.set()
            writer.join()
    assert not failed
    for number in range(5):
        with shardemb.open(tmp_path / f"{number}") as copied:
            expected = np.zeros(rows, np.float32)
            for step in range(1, copied.last_commit.step + 1):
                expected[changed(step)] = step
            for name in "ab":
                np.testing.assert_array_equal(copied[name].lookup(np.arange(rows))[:, 0], expected)
            assert copied.verify() == []
