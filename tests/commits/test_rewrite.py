"""Tables rewritten with other rows, other shards, or another optimizer; and rows that are materialized."""

import contextlib
import os

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inside
from support.kinds import DIM, KINDS, assert_equal, create, damage, everything, train
from support.model import assert_same_bits

import shardemb
from shardemb.base.sizes import PAGE
from shardemb.commits import fold, log_writer, rewrite
from shardemb.engine import table_state
from shardemb.errors import (
    DiskFullError,
    FormatError,
    RowIdError,
    ShardEmbError,
)
from shardemb.initializers import Uniform
from shardemb.optim import SGD, Adagrad, Adam
from shardemb.storage import files


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s"


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

        def fill(old, new, file, *, keep_state):
            filled.append(file.number)
            if len(filled) == 4:
                raise KeyboardInterrupt
            real(old, new, file, keep_state=keep_state)

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
