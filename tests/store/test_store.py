"""A store: a mapping of tables with one commit point; what commits, rollbacks and closing do; what it costs on disk."""

import contextlib
import errno
import gc
import os
import pickle
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from support import inside
from support.model import StoreModel, TableModel, assert_same_bits
from support.stores import close_quietly

import shardemb
from shardemb.engine import filling
from shardemb.errors import (
    DiskFullError,
    PoisonedError,
    ReadOnlyError,
    RowIdError,
    ShardEmbError,
    StoreClosedError,
    TableExistsError,
    TableNotFoundError,
)
from shardemb.initializers import Constant, Normal, Uniform
from shardemb.memory.memory_budget import MemoryBudget
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad
from shardemb.storage import address_space, files

ONES = np.ones((2, 4), np.float32)


def small(store, name="t", **arguments):
    """Create a table of 100 rows of four values, by default with Adam and a presence bitmap."""
    defaults = {
        "num_embeddings": 100,
        "embedding_dim": 4,
        "optimizer": Adam(lr=0.1),
        "initializer": Constant(1.0),
    }
    return store.create_table(name, **(defaults | arguments))


def rows(table):
    return table.lookup(np.arange(table.num_embeddings))


# ---- a mapping ------------------------------------------------------------------------------------------------


def test_a_store_is_a_mapping_of_its_tables(store):
    assert (len(store), list(store), dict(store)) == (0, [], {})
    a, b = small(store, "a"), small(store, "b")
    assert len(store) == 2
    assert list(store) == list(store.keys()) == ["a", "b"]
    assert list(store.values()) == [a, b]
    assert dict(store.items()) == {"a": a, "b": b}
    assert store["a"] is a
    assert "a" in store
    assert "c" not in store
    assert store.get("c") is None
    with pytest.raises(TableNotFoundError, match="no table 'c'.*'a', 'b'"):
        store["c"]


def test_a_store_equals_only_itself(store, path):
    with shardemb.open(path, "r") as reader:
        assert store == store
        assert store != reader
        assert len({store, reader, store}) == 2
    store.close()
    assert store in [store]
    assert store != reader


def test_tables_can_be_created_and_dropped_while_iterating(store):
    for name in "abc":
        small(store, name)
    for name in store:
        store.drop_table(name)
        small(store, name + name)
    assert list(store) == ["aa", "bb", "cc"]


def test_tables_keep_their_order_over_commits_renames_and_reopening(store, path):
    for name in ("z", "a", "m"):
        small(store, name)
    store.rename_table("a", "zz")
    store.commit()
    store.close()
    with shardemb.open(path, "r") as again:
        assert list(again) == ["z", "zz", "m"]


# ---- creating, dropping, renaming -----------------------------------------------------------------------------


def folder_names(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".shardemb")


def test_a_table_becomes_part_of_the_store_with_the_next_commit(store, path):
    table = small(store)
    table.write([1], ONES[:1] * 7)
    assert store.has_changes
    assert folder_names(path) == ["zarr.json"]
    with shardemb.open(path, "r") as reader:
        assert list(reader) == []
    store.commit()
    assert folder_names(path) == ["t", "zarr.json"]
    with shardemb.open(path, "r") as reader:
        assert_same_bits(rows(reader["t"]), rows(table))


def test_rollback_undoes_create(store, path):
    kept = small(store, "kept")
    store.commit()
    gone = small(store, "gone")
    store.rollback()
    assert list(store) == ["kept"]
    assert store["kept"] is kept
    with pytest.raises(TableNotFoundError, match="gone"):
        gone.lookup([1])
    assert not store.has_changes
    assert list((path / ".shardemb" / "tables").iterdir()) == []
    small(store, "gone", embedding_dim=9)
    store.commit()


def test_drop_takes_effect_with_the_next_commit_and_rollback_restores_the_table(store, path):
    table = small(store)
    table.update([1, 2], ONES)
    store.commit()
    before = rows(table)
    table.update([1, 2], ONES)
    store.drop_table("t")
    assert "t" not in store
    assert store.has_changes
    with pytest.raises(TableNotFoundError):
        table.lookup([1])
    with pytest.raises(TableNotFoundError):
        table.update([1, 2], ONES)
    assert folder_names(path) == ["t", "zarr.json"]
    store.rollback()
    assert store["t"] is table
    assert_same_bits(rows(table), before)
    assert table.step == 1
    store.drop_table("t")
    store.commit()
    assert folder_names(path) == ["zarr.json"]
    with pytest.raises(TableNotFoundError):
        table.lookup([1])
    store.close()
    with shardemb.open(path) as again:
        assert list(again) == []


def test_rename_takes_effect_with_the_next_commit_and_rollback_undoes_it(store, path):
    table = small(store, "old")
    store.commit()
    store.rename_table("old", "new")
    assert list(store) == ["new"]
    assert table.name == "new"
    assert store.has_changes
    assert folder_names(path) == ["old", "zarr.json"]
    store.rollback()
    assert (list(store), table.name) == (["old"], "old")
    assert not store.has_changes
    store.rename_table("old", "new")
    table.write([1], ONES[:1] * 5)
    store.commit()
    assert folder_names(path) == ["new", "zarr.json"]
    table.write([2], ONES[:1] * 6)  # the commit has moved its files
    store.commit()
    store.close()
    with shardemb.open(path) as again:
        assert again["new"].lookup([1, 2])[:, 0].tolist() == [5, 6]


def test_two_tables_can_exchange_their_names(store, path):
    small(store, "a", initializer=Constant(1.0))
    small(store, "b", initializer=Constant(2.0))
    store.commit()
    for source, target in [("a", "c"), ("b", "a"), ("c", "b")]:
        store.rename_table(source, target)
    store["a"].write([0], ONES[:1] * 20)
    store["b"].write([0], ONES[:1] * 10)
    store.commit()
    for opened in (store, None):
        if opened is None:
            store.close()
            opened = shardemb.open(path)
        assert opened["a"].lookup([0, 1])[:, 0].tolist() == [20, 2]
        assert opened["b"].lookup([0, 1])[:, 0].tolist() == [10, 1]
    assert folder_names(path) == ["a", "b", "zarr.json"]
    opened.close()


def test_a_dropped_tables_name_is_free_in_the_same_transaction(store, path):
    old = small(store, initializer=Constant(1.0))
    store.commit()
    store.drop_table("t")
    new = small(store, embedding_dim=2, initializer=Constant(2.0))
    assert store["t"] is new
    store.rollback()
    assert store["t"] is old
    assert rows(old).tolist() == [[1] * 4] * 100
    store.drop_table("t")
    new = small(store, embedding_dim=2, initializer=Constant(2.0))
    new.write([3], [[5, 5.0]])
    store.commit()
    store.close()
    with shardemb.open(path) as again:
        assert again["t"].shape == (100, 2)
        assert again["t"].lookup([2, 3]).tolist() == [[2, 2], [5, 5]]
        assert again.verify() == []
    assert not any((path / ".shardemb" / "tables").iterdir())


def test_a_table_dropped_before_its_first_commit_leaves_nothing(store, path):
    table = store.create_table("t", num_embeddings=1000, embedding_dim=100, initializer=np.ones((1000, 100)))
    store.drop_table("t")
    assert not store.has_changes
    with pytest.raises(TableNotFoundError):
        table.lookup([1])
    store.close()
    assert files.allocated(path) < 100_000


def test_names_must_be_free(store):
    small(store, "a")
    small(store, "b")
    with pytest.raises(TableExistsError, match="'a'"):
        small(store, "a")
    with pytest.raises(TableExistsError, match="'b'"):
        store.rename_table("a", "b")
    with pytest.raises(TableExistsError, match="'a'"):
        store.rename_table("a", "a")
    with pytest.raises(TableNotFoundError, match="'c'"):
        store.rename_table("c", "d")
    with pytest.raises(TableNotFoundError, match="'c'"):
        store.drop_table("c")
    assert list(store) == ["a", "b"]


def test_a_foreign_folder_in_the_place_of_a_table_is_never_touched(store, path):
    small(store)
    (path / "t").mkdir()  # had it been there before, the table would not have been created
    (path / "t" / "thesis.txt").write_text("mine")
    with pytest.raises(shardemb.FormatError, match=r"store\.zarr/t .*move it away"):
        store.commit()
    assert (path / "t" / "thesis.txt").read_text() == "mine"
    store.rename_table("t", "u")
    store.commit()
    assert (path / "t" / "thesis.txt").read_text() == "mine"
    assert folder_names(path) == ["t", "u", "zarr.json"]


@pytest.mark.parametrize("initializer", [None, Uniform(-1, 1, seed=3)])
def test_a_table_of_an_array_starts_with_its_rows(store, path, initializer):
    array = np.random.default_rng(0).normal(size=(300, 5))
    optimizer = (
        Adagrad(initial_accumulator_value=0.5) if initializer else None
    )  # with and without a presence bitmap
    table = store.create_table(
        "t", num_embeddings=300, embedding_dim=5, initializer=array, optimizer=optimizer, rows_per_shard=64
    )
    expected = array.astype(np.float32)
    assert_same_bits(rows(table), expected)
    if optimizer:
        assert (table.state("sum", range(300)) == 0.5).all()
    store.commit()
    store.close()
    with shardemb.open(path) as again:
        assert_same_bits(rows(again["t"]), expected)


# ---- commits --------------------------------------------------------------------------------------------------


def test_a_commit_returns_its_step_and_metadata(store, path):
    assert store.last_commit is None
    commit = store.commit(step=100, metadata={"loss": 0.3, "data": {"file": "a", "at": [1, 2]}, "none": None})
    assert commit == shardemb.Commit(1, 100, {"loss": 0.3, "data": {"file": "a", "at": [1, 2]}, "none": None})
    assert store.last_commit == commit
    store.close()
    with shardemb.open(path, "r") as again:
        assert again.last_commit == commit


def test_commits_count_up_and_keep_the_step_where_none_is_given(store, path):
    commits = [
        store.commit(),
        store.commit(step=7),
        store.commit(),
        store.commit(step=3),
        store.commit(metadata={"a": 1}),
    ]
    assert [(commit.id, commit.step) for commit in commits] == [(1, 0), (2, 7), (3, 7), (4, 3), (5, 3)]
    assert [commit.metadata for commit in commits[3:]] == [{}, {"a": 1}]
    assert store.last_commit == commits[-1]
    store.close()
    with shardemb.open(path) as again:
        assert again.commit().id == 6
        assert again.last_commit.metadata == {}


def test_metadata_is_copied(store):
    given = {"list": [1]}
    returned = store.commit(metadata=given)
    given["list"].append(2)
    returned.metadata["list"].append(3)
    store.last_commit.metadata["list"].append(4)
    assert store.last_commit.metadata == {"list": [1]}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "step must be between 0"),
        ({"step": 1.0}, TypeError, "step must be an integer"),
        ({"step": True}, TypeError, "step must be an integer"),
        ({"metadata": {"x": object()}}, TypeError, "JSON"),
        ({"step": 2**63}, ValueError, "step must be between 0 and 9223372036854775807"),
        (
            {"metadata": {"x": {"y": [1, np.ones(2)]}}},
            TypeError,
            r"ndarray .* \(at metadata\['x'\]\['y'\]\[1\]\)",
        ),
        ({"metadata": {"x": np.ma.masked}}, TypeError, "MaskedConstant .*convert it first"),
        ({"metadata": {"x": np.ma.masked_array([1, 2], [0, 1])}}, TypeError, "MaskedArray"),
        ({"metadata": {"x": np.longdouble(1)}}, TypeError, r"longdouble .*\(at metadata\['x'\]\)"),
        ({"metadata": {"x": np.datetime64("2020-01-01")}}, TypeError, "datetime64"),
        ({"metadata": {"x": np.timedelta64(1, "s")}}, TypeError, "timedelta64"),
        ({"metadata": {"x": 1j}}, TypeError, "complex"),
        ({"metadata": {"x": np.float32("nan")}}, ValueError, "JSON"),
        ({"metadata": 5}, TypeError, "metadata"),
        ({"metadata": {"x": float("nan")}}, ValueError, "JSON"),
        ({"metadata": {"x": "y" * 2**20}}, ValueError, "1 MiB"),
    ],
)
def test_an_invalid_commit_changes_nothing(store, arguments, error, message):
    small(store).write([1], ONES[:1])
    first = store.commit(step=5)
    store["t"].write([1], ONES[:1] * 2)
    with pytest.raises(error, match=message):
        store.commit(**arguments)
    assert store.last_commit == first
    assert store.has_changes
    assert store.commit().id == 2


def test_numpy_scalars_in_metadata_are_those_of_python(store, path):
    given = {
        "loss": np.float32(0.1), "half": np.float16(0.5), "double": np.float64(0.3), "best": np.bool_(True),
        "step": np.int64(2**63 - 1), "rows": [np.uint64(2**64 - 1), {"small": np.int8(-1)}], "name": np.str_("a"),
    }  # fmt: skip
    expected = {
        "loss": float(np.float32(0.1)), "half": 0.5, "double": 0.3, "best": True,
        "step": 2**63 - 1, "rows": [2**64 - 1, {"small": -1}], "name": "a",
    }  # fmt: skip
    commit = store.commit(step=np.uint64(7), metadata=given)
    assert commit.metadata == store.last_commit.metadata == expected
    assert type(commit.metadata["best"]) is bool
    assert type(commit.step) is int
    store.close()
    with shardemb.open(path, "r") as again:
        assert again.last_commit == commit


@pytest.mark.parametrize("step", [1_795_987_377_811_758_424, 2**62 + 1, 2**63 - 1])
def test_steps_may_be_nanoseconds(store, path, step):
    store.commit(step=step)
    store.close()
    with shardemb.open(path) as again:
        assert again.last_commit.step == step
        assert again.commit().step == step


def test_deeply_nested_metadata_never_makes_a_store_unreadable(store, path):
    # In indented JSON, each of these numbers would take a line with hundreds of spaces.
    metadata = [0] * 100_000
    for _ in range(200):
        metadata = [metadata]
    with contextlib.suppress(ValueError):
        store.commit(metadata={"deep": metadata})
    store.close()
    with shardemb.open(path) as again:
        assert again.last_commit is None or again.last_commit.metadata == {"deep": metadata}


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.5), Adagrad(initial_accumulator_value=1.0), RowWiseAdagrad(), Adam()]
)
@pytest.mark.parametrize("initializer", [None, Normal(seed=1)])
def test_reopening_restores_rows_state_steps_and_hyper_parameters(path, optimizer, initializer):
    arguments = {
        "num_embeddings": 300,
        "embedding_dim": 5,
        "optimizer": optimizer,
        "initializer": initializer,
    }
    rng = np.random.default_rng(0)
    model = TableModel.new("t", **arguments)
    for turn in range(3):
        with shardemb.open(path) as store:
            table = store["t"] if turn else store.create_table("t", rows_per_shard=64, **arguments)
            model.assert_matches(table)
            ids, gradients = rng.integers(0, 300, 40), rng.normal(size=(40, 5)).astype(np.float32)
            for each in (table, model):
                each.update(ids, gradients)
            store.commit(step=turn)
            assert not store.has_changes
    with shardemb.open(path, "r") as store:
        model.assert_matches(store["t"])
        assert store["t"].initializer == (initializer or Constant(0.0))
        assert store.last_commit.step == 2


def test_hyper_parameters_are_part_of_a_commit(store, path):
    table = small(store, optimizer=Adam(lr=0.1))
    store.commit()
    table.set_optimizer(Adam(lr=0.2, betas=(0.5, 0.6)))
    assert table.optimizer == Adam(lr=0.2, betas=(0.5, 0.6))
    assert store.has_changes
    store.rollback()
    assert table.optimizer == Adam(lr=0.1)
    table.set_optimizer(Adam(lr=0.3))
    store.commit()
    table.set_optimizer(Adam(lr=0.4))
    close_quietly(store)
    with shardemb.open(path) as again:
        assert again["t"].optimizer == Adam(lr=0.3)


def test_has_changes_notices_every_kind_of_change(store):
    table = small(store)
    store.commit()

    def changed():
        answer = store.has_changes
        store.rollback()
        return answer

    assert not changed()
    table.update([1, 2], ONES)
    assert changed()
    table.update([], np.empty((0, 4)))  # a step is a change
    assert changed()
    table.write([1, 2], rows(table)[1:3])
    assert changed()
    table.set_optimizer(Adam(lr=0.3))
    assert changed()
    table.set_optimizer(table.optimizer)
    assert not changed()
    store.rename_table("t", "u")
    assert changed()
    store.drop_table("t")
    assert changed()
    small(store, "u")
    assert changed()
    rows(table)
    table.prefetch([1], for_update=True)
    assert not changed()


def test_checkpoint_commits_nothing(store, path):
    table = small(store)
    first = store.commit(step=1)
    table.update([1, 2], ONES)
    store.checkpoint()
    assert store.has_changes
    assert store.last_commit == first
    store.rollback()
    assert rows(table).tolist() == [[1] * 4] * 100


# ---- rollback -------------------------------------------------------------------------------------------------


def test_rollback_restores_rows_presence_state_steps_and_hyper_parameters(store, path):
    model = StoreModel()
    for name, optimizer, initializer in [
        ("a", Adam(lr=0.1), Normal(seed=1)),
        ("b", Adagrad(lr=0.1), None),
        ("c", None, Constant(2.0)),
    ]:
        arguments = {
            "num_embeddings": 500,
            "embedding_dim": 8,
            "optimizer": optimizer,
            "initializer": initializer,
        }
        store.create_table(name, rows_per_shard=64, **arguments)
        model.tables[name] = TableModel.new(name, **arguments)
    rng = np.random.default_rng(0)

    def change(*each_of):
        ids, numbers = rng.integers(0, 500, 50), rng.normal(size=(50, 8)).astype(np.float32)
        for tables in each_of:
            tables["a"].update(ids, numbers)
            tables["b"].update(ids, numbers)
            tables["b"].write(ids[:5], numbers[:5])
            tables["c"].write(ids, numbers)

    change(store, model.tables)
    store.commit(step=3, metadata={"x": 1})
    model.commit(3, {"x": 1})
    for _ in range(2):
        change(store)
        store["a"].set_optimizer(Adam(lr=9.0))
        store.rollback()
        model.assert_matches(store)
        assert not store.has_changes
        change(store, model.tables)  # changes after a rollback are right too
        model.assert_matches(store)
        store.commit(step=4)
        model.commit(4, {})
    store.close()
    with shardemb.open(path) as again:
        model.assert_matches(again)


@pytest.mark.parametrize("initializer", [None, Uniform(-1, 1, seed=1)])
def test_changes_all_over_a_large_table(path, initializer):
    # A page of the presence bitmap holds 32,768 bits. Such pages, shards and pages of rows all end at different rows.
    arguments = {
        "num_embeddings": 150_000,
        "embedding_dim": 5,
        "optimizer": Adagrad(lr=0.1),
        "initializer": initializer,
    }
    model = StoreModel()
    rng = np.random.default_rng(0)
    edges = np.array([0, 32_767, 32_768, 65_535, 65_536, 98_303, 98_304, 131_072, 149_999])

    def change(tables, ids, numbers):
        tables["t"].update(ids, numbers)
        tables["t"].write(ids[::3], numbers[::3])

    with shardemb.open(path) as store:
        store.create_table("t", rows_per_shard=20_000, **arguments)
        model.tables["t"] = TableModel.new("t", **arguments)
        for turn in range(6):
            ids = np.concatenate([edges[turn % 2 :: 2], rng.integers(turn * 20_000, 150_000, 300)])
            numbers = rng.normal(size=(ids.size, 5)).astype(np.float32)
            change(store, ids, numbers)
            assert f"{np.unique(ids).size} changed rows" in repr(store["t"])
            if turn % 3 == 1:
                store.rollback()
                continue
            change(model.tables, ids, numbers)
            store.commit(step=turn)
            model.commit(turn, {})
        model.assert_matches(store)
    with shardemb.open(path) as store:
        model.assert_matches(store)


def test_rows_on_both_sides_of_the_files_of_the_presence_bitmap(path):
    # A file of the bitmap holds 2**25 bits.
    ids = np.array([2**25 - 1, 2**25, 2**26 - 1, 2**26, 80_000_000 - 1])
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=80_000_000, embedding_dim=1, initializer=Constant(3.0))
        store.commit()
        for number, row in enumerate(ids):
            table.write([row], [[float(number)]])
            store.commit() if number % 2 == 0 else store.rollback()
        expected = [0, 3, 2, 3, 4]
        assert table.lookup(ids)[:, 0].tolist() == expected
        assert table.lookup(ids - 1)[:, 0].tolist() == [3, 0, 3, 2, 3]
    assert [file.name for file in sorted((path / "t" / "present").glob("c.*"))] == ["c.0", "c.1", "c.2"]
    with shardemb.open(path, "r") as store:
        assert store["t"].lookup(ids)[:, 0].tolist() == expected


def test_rollback_removes_new_tables_and_restores_what_is_only_in_the_log(store):
    table = small(store)
    store.commit()
    table.write([1], ONES[:1] * 5)
    store.commit()  # not folded
    small(store, "new")
    table.write([1, 2], ONES * 2)
    store.rollback()
    assert list(store) == ["t"]
    assert table.lookup([1, 2])[:, 0].tolist() == [5, 1]


def test_after_a_failed_rollback_only_another_rollback_is_allowed(path, monkeypatch):
    with shardemb.open(path) as store:
        table = small(store)
        store.commit()
        table.write([1], ONES[:1] * 5)
        store.commit()  # not folded
        table.write([1, 2], ONES * 2)
        with monkeypatch.context() as patch:
            patch.setattr(MemoryBudget, "spill", fail)
            with pytest.raises(OSError, match="Input/output"):
                store.rollback()
        for call in (store.commit, lambda: table.write([1], ONES[:1])):
            with pytest.raises(PoisonedError, match="a rollback failed half way.*call store.rollback"):
                call()
        store.rollback()
        assert table.lookup([1, 2])[:, 0].tolist() == [5, 1]
        table.write([2], ONES[:1] * 3)
        store.commit()
    with shardemb.open(path, "r") as store:
        assert store["t"].lookup([1, 2])[:, 0].tolist() == [5, 3]


def test_rollback_before_the_first_commit_empties_the_store(store):
    small(store)
    store.rollback()
    assert (len(store), store.has_changes, store.last_commit) == (0, False, None)


# ---- many tables at once --------------------------------------------------------------------------------------


def test_lookup_and_update_of_many_tables(store):
    a, b = small(store, "a", optimizer=SGD(lr=1.0)), small(store, "b", embedding_dim=2, optimizer=SGD(lr=1.0))
    store.update({"b": ([[1], [2]], np.ones((2, 1, 2))), "a": (3, np.ones(4))})
    assert a.lookup([3, 4]).tolist() == [[0] * 4, [1] * 4]
    assert b.lookup([1, 2, 3]).tolist() == [[0, 0], [0, 0], [1, 1]]
    assert (a.step, b.step) == (1, 1)
    found = store.lookup({"b": [[1, 3]], "a": []})
    assert {name: each.tolist() for name, each in found.items()} == {"b": [[[0, 0], [1, 1]]], "a": []}
    assert found["a"].shape == (0, 4)
    assert store.lookup({}) == {}
    store.update({})
    assert (a.step, b.step) == (1, 1)


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        ({"b": ([100], np.ones((1, 4)))}, RowIdError),
        ({"b": ([0.5], np.ones((1, 4)))}, TypeError),
        ({"b": ([1], np.ones((1, 3)))}, ValueError),
        ({"b": ([1], np.full((1, 4), np.nan))}, ValueError),
        ({"c": ([1], np.ones((1, 4)))}, TableNotFoundError),
        ({"no_optimizer": ([1], np.ones((1, 4)))}, ValueError),
        ({"b": 5}, TypeError),
    ],
)
def test_every_table_is_checked_before_any_row_changes(store, batch, error):
    small(store, "a")
    small(store, "b")
    small(store, "no_optimizer", optimizer=None)
    store.commit()
    with pytest.raises(error):
        store.update({"a": ([1, 2], ONES)} | batch)
    assert not store.has_changes
    assert (rows(store["a"]) == 1).all()
    assert store["a"].step == 0


def test_lookup_of_many_tables_checks_all_of_them(store):
    small(store, "a")
    with pytest.raises(TableNotFoundError, match="'b'"):
        store.lookup({"a": [1], "b": [2]})
    with pytest.raises(RowIdError, match="table 'a'"):
        store.lookup({"a": [100]})


# ---- closing --------------------------------------------------------------------------------------------------


def test_close_loses_what_was_not_committed_and_says_so(path):
    store = shardemb.open(path)
    table = small(store)
    store.commit(step=4)
    table.update([1, 2], ONES)
    with pytest.warns(RuntimeWarning, match=r"store\.zarr since commit 1 \(step 4\) are lost.*commit\(\)"):
        store.close()
    with shardemb.open(path) as again:
        assert again["t"].step == 0
        assert (rows(again["t"]) == 1).all()


def test_with_never_commits(path):
    with pytest.warns(RuntimeWarning, match="there was no commit"), shardemb.open(path) as store:
        small(store)
    with shardemb.open(path) as again:
        assert list(again) == []
        assert not any((path / ".shardemb" / "tables").glob("*"))
    with (
        pytest.raises(KeyError, match="mine"),
        pytest.warns(RuntimeWarning, match="lost"),
        shardemb.open(path) as store,
    ):
        small(store)
        raise KeyError("mine")
    assert not Path(path / "t").exists()


def test_close_warns_of_nothing_else(path):
    with shardemb.open(path) as store:  # warnings are errors here
        small(store)
        store.commit()
        rows(store["t"])
    with shardemb.open(path, "r") as store:
        rows(store["t"])
    with shardemb.open(path) as store:
        store["t"].update([1, 2], ONES)
        store.rollback()


def test_close_closes_everything_even_if_its_warning_is_an_error(path):
    store = shardemb.open(path)
    table = small(store)
    store.commit()
    small(store, "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="lost"):
            store.close()
    with pytest.raises(StoreClosedError):
        table.lookup([1])
    # As zarr may do, but only in a table without a presence bitmap: see test_interop.py.
    (path / "t" / "rows" / "c.0.0").unlink()
    with pytest.raises(shardemb.FormatError, match="missing"):
        shardemb.open(path)


USES = {
    "store[...]": lambda store, table: store["t"],
    "iter": lambda store, table: list(store),
    "len": lambda store, table: len(store),
    "in": lambda store, table: "t" in store,
    "with": lambda store, table: store.__enter__(),
    "store.lookup": lambda store, table: store.lookup({"t": [1]}),
    "store.update": lambda store, table: store.update({"t": ([1, 2], ONES)}),
    "store.update of nothing": lambda store, table: store.update({}),
    "create_table": lambda store, table: small(store, "u"),
    "drop_table": lambda store, table: store.drop_table("t"),
    "rename_table": lambda store, table: store.rename_table("t", "u"),
    "commit": lambda store, table: store.commit(),
    "rollback": lambda store, table: store.rollback(),
    "checkpoint": lambda store, table: store.checkpoint(),
    "verify": lambda store, table: store.verify(),
    "has_changes": lambda store, table: store.has_changes,
    "table.lookup": lambda store, table: table.lookup([1]),
    "table.lookup of nothing": lambda store, table: table.lookup([]),
    "lookup_unique": lambda store, table: table.lookup_unique([1]),
    "state": lambda store, table: table.state("exp_avg", [1]),
    "table.update": lambda store, table: table.update([1, 2], ONES),
    "write": lambda store, table: table.write([1, 2], ONES),
    "prefetch": lambda store, table: table.prefetch([1]),
    "set_optimizer": lambda store, table: table.set_optimizer(Adam()),
    "to_dask_array": lambda store, table: table.to_dask_array(),
    "to_arrow_batches": lambda store, table: table.to_arrow_batches(),
    "export_parquet": lambda store, table: table.export_parquet(store.path / "x.parquet"),
    "export": lambda store, table: table.export(store.path / "x.npy"),
}


@pytest.mark.parametrize("use", USES)
def test_use_after_close_raises(store, use):
    table = small(store)
    store.commit()
    store.close()
    with pytest.raises(StoreClosedError, match=r"is closed; open it again with shardemb\.open"):
        USES[use](store, table)
    assert table.name == "t"
    assert table.shape == (100, 4)
    assert store.last_commit.id == 1


ABOUT_A_TABLE = ["store[...]", "store.lookup", "store.update", "drop_table", "rename_table", "table.lookup",
                 "table.lookup of nothing", "lookup_unique", "state", "table.update", "write", "prefetch",
                 "set_optimizer", "to_dask_array", "to_arrow_batches", "export_parquet", "export"]  # fmt: skip


@pytest.mark.parametrize("use", ABOUT_A_TABLE)
def test_use_of_a_dropped_table_raises(store, use):
    table = small(store)
    store.commit()
    store.drop_table("t")
    for _ in range(2):
        with pytest.raises(TableNotFoundError, match="'t'"):
            USES[use](store, table)
        store.commit()


def test_results_outlive_the_store_and_lazy_ones_raise(store):
    table = small(store)
    store.commit()
    found, lazy = rows(table), table.to_dask_array()
    store.close()
    store.close()  # a second call does nothing
    del table
    gc.collect()
    assert (found == 1).all()
    with pytest.raises(StoreClosedError):
        lazy.compute()


def _first(read):
    return lambda rows: read()[: len(rows)]


@pytest.mark.filterwarnings("ignore:the store")
@pytest.mark.parametrize(
    ("lookup_of", "ids"),
    [
        (lambda store: store["t"].lookup, [0]),
        (lambda store: store["k"].lookup, ["a"]),
        (lambda store: store["k"].rows.lookup, [0]),
        (lambda store: store["k"].vocabulary.lookup, ["a"]),
        (lambda store: store.vocabularies["v"].lookup, ["a"]),
        (lambda store: _first(store["t"].to_dask_array().compute), [0]),
        (lambda store: _first(store["t"].to_arrow_batches().read_next_batch), [0]),
        (lambda store: _first(store["k"].to_arrow_batches().read_next_batch), [0]),
    ],
    ids=[
        "table",
        "keyed table",
        "its rows",
        "its vocabulary",
        "vocabulary",
        "dask",
        "Arrow",
        "Arrow with keys",
    ],
)
def test_a_table_keeps_its_store_open(path, lookup_of, ids):
    with shardemb.open(path) as store:
        store.create_table("t", num_embeddings=3, embedding_dim=2)
        store.create_vocabulary("v", key_type="string").add(["a"])
        store.create_table("k", vocabulary="v", embedding_dim=2)
        store.commit()
    lookup = lookup_of(shardemb.open(path))
    gc.collect()
    assert len(lookup(ids)) == 1
    with pytest.raises(shardemb.StoreLockedError):
        shardemb.open(path)
    del lookup
    gc.collect()
    shardemb.open(path).close()


def test_a_store_that_is_garbage_collected_warns_and_releases_the_lock(path):
    store = shardemb.open(path)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del store
        gc.collect()
    shardemb.open(path).close()


def test_nothing_stays_mapped_or_counted_after_many_openings(path):
    gc.collect()
    before = files.counters.mappings
    for turn in range(10):
        with shardemb.open(path) as store:
            table = store.create_table(f"t{turn}", num_embeddings=1000, embedding_dim=4, rows_per_shard=64)
            table.write([1, 999], ONES)
            store.commit()
            store.create_table("gone", num_embeddings=1000, embedding_dim=4, rows_per_shard=64)
            store.rollback()
            if turn % 3 == 0:
                store.drop_table(f"t{turn}")
                store.commit()
    del store, table
    gc.collect()
    assert files.counters.mappings == before


# ---- read-only, pickling, at a glance -------------------------------------------------------------------------

WRITES = [
    "create_table", "drop_table", "rename_table", "commit", "rollback", "checkpoint", "store.update",
    "table.update", "write", "set_optimizer",
]  # fmt: skip


@pytest.mark.parametrize("use", WRITES)
def test_a_store_opened_for_reading_refuses_every_change(path, use):
    with shardemb.open(path) as store:
        small(store)
        store.commit()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with shardemb.open(path, "r") as store:
        table = store["t"]
        with pytest.raises(
            ReadOnlyError, match=r"store\.zarr was opened with mode \"r\"; open it with mode \"r\+\""
        ):
            USES[use](store, table)
        assert (rows(table) == 1).all()
        assert (table.step, list(store)) == (0, ["t"])
        with pytest.raises(ReadOnlyError):
            table.prefetch([1], for_update=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_pickling_a_store_or_table_is_refused_with_directions(store):
    table = small(store)
    with pytest.raises(TypeError, match=r"store.*cannot be pickled.*shardemb\.open\('.*', mode=\"r\"\)"):
        pickle.dumps(store)
    with pytest.raises(
        TypeError, match=r"table 't' cannot be pickled.*shardemb\.open\('.*', mode=\"r\"\)\['t'\]"
    ):
        pickle.dumps(table)


def test_commits_and_descriptions_can_be_pickled(store):
    commit = store.commit(step=1, metadata={"a": [1]})
    assert pickle.loads(pickle.dumps(commit)) == commit
    for value in (Adam(lr=0.5), Normal(seed=4)):
        assert pickle.loads(pickle.dumps(value)) == value


def test_repr_shows_what_a_person_wants_to_know(store, path):
    assert repr(store) == f"Store '{path}': 0 tables, no commit yet"
    table = store.create_table("tokens", num_embeddings=400_000, embedding_dim=16, optimizer=SGD(lr=0.5))
    assert repr(table) == "Table 'tokens': 400,000 x 16 float32, SGD(lr=0.5), step 0, 1 shard"
    table.update([1, 7, 1], np.ones((3, 16)))
    assert repr(table).endswith("step 1, 1 shard, 2 changed rows not committed")
    assert "1 table, no commit yet, changes not committed" in repr(store)
    assert repr(table) in repr(store)
    store.commit(step=12)
    assert repr(store).startswith(f"Store '{path}': 1 table, commit 1 at step 12\n")
    with shardemb.open(path, "r") as reader:
        assert "read only" in repr(reader)
    table.write([1], np.ones((1, 16)))
    assert repr(table).endswith("1 changed row not committed")
    html = store._repr_html_()
    assert "tokens" in html
    assert "400,000" in html
    assert "<table>" in table._repr_html_()
    store.rollback()
    store.close()
    assert "closed" in repr(store)
    assert repr(table).endswith("closed")
    assert "closed" in store._repr_html_()


def test_repr_html_escapes(tmp_path):
    with shardemb.open(tmp_path / "a<b>.zarr") as store:
        assert "a<b>" not in store._repr_html_()
        assert "a&lt;b&gt;" in store._repr_html_()


# ---- verify ---------------------------------------------------------------------------------------------------


def sharded(store, name="t", **arguments):
    table = small(store, name, num_embeddings=1000, rows_per_shard=64, **arguments)
    table.update(range(1000), np.ones((1000, 4)))
    store.commit()
    return table


def test_verify_finds_nothing_in_a_sound_store(store):
    sharded(store)
    sharded(store, "u", initializer=None)
    small(store, "not_committed")
    assert store.verify() == []


def test_verify_names_what_is_wrong(store, path):
    sharded(store)
    sharded(store, "u", initializer=None)
    for damage, words in [
        (lambda: os.truncate(path / "t/rows/c.2.0", 100), ["table 't'", "t/rows/c.2.0", "100 bytes"]),
        (lambda: (path / "t/rows/c.3.0").unlink(), ["table 't'"]),
        (lambda: (path / "t/present/c.0").unlink(), ["table 't'"]),
        (lambda: (path / "u/rows/c.1.0").unlink(), ["table 'u'", "u/rows/c.1.0 is missing"]),
        (lambda: (path / "u/rows/zarr.json").write_text("{"), ["table 'u'"]),
    ]:
        kept = path.with_name("kept")
        shutil.copytree(path, kept)
        damage()
        problems = [str(each) for each in store.verify()]
        assert problems
        assert all(word in problems[0] for word in words), problems
        assert all(words[0] in problem for problem in problems), problems
        shutil.rmtree(path)
        kept.rename(path)
    assert store.verify() == []


# ---- what it costs --------------------------------------------------------------------------------------------


def test_a_huge_table_costs_nothing_until_it_is_written(path):
    started = time.perf_counter()
    with shardemb.open(path) as store:
        table = store.create_table(
            "t", num_embeddings=10**9, embedding_dim=16, optimizer=Adam(), initializer=Normal(seed=1)
        )
        store.commit()
        assert table.nbytes == 192 * 10**9
        some = np.array([0, 5 * 10**8, 10**9 - 1])
        initial = table.lookup(some)
        assert len(np.unique(initial)) == 48
        table.update(some, np.ones((3, 16)))
        assert store.stats()["bytes_written"] < 300_000  # mostly zeros of the first segments
        store.commit()
        trained = table.lookup(some)
        assert not np.isclose(trained, initial).any()
    assert files.allocated(path) < 3 * 2**20
    with shardemb.open(path, "r") as store:
        assert_same_bits(store["t"].lookup(some), trained)
    assert time.perf_counter() - started < 20  # about one second on an idle machine


def test_a_commit_writes_changed_rows_only(store):
    table = store.create_table(
        "t", num_embeddings=100_000, embedding_dim=128, optimizer=Adam(), rows_per_shard=10_000
    )
    store.commit()
    everything = np.arange(100_000)
    log = inside.journal(store)._log
    before = log.nbytes
    store.commit()
    assert log.nbytes - before == 4096
    rng = np.random.default_rng(0)
    for count in (1, 100, 1000):
        ids = rng.choice(everything, count, replace=False)
        table.update(ids, np.ones((count, 128)))
        before = log.nbytes
        store.commit()
        images = count * (8 + 3 * 128 * 4)
        assert images <= log.nbytes - before - 4096 <= images + 4096
    assert store.stats()["syncs"] > 0


def test_memory_budget_zero_releases_memory_after_every_fold(path):
    used, found = {}, {}
    for budget in (0, 2**40):
        store = shardemb.open(f"{path}{budget}", memory_budget=budget)
        table = store.create_table("t", num_embeddings=200_000, embedding_dim=64, optimizer=SGD(lr=0.1))
        store.commit()
        rng = np.random.default_rng(0)
        for _ in range(10):
            ids = rng.integers(0, 200_000, 10_000)
            table.update(ids, np.ones((10_000, 64), np.float32))
            store.commit()
            store.checkpoint()
        used[budget] = inside.shards(table).overlay.nbytes
        found[budget] = rows(table)
        store.close()
    assert used[0] == 0
    assert used[2**40] > 20e6  # the memory that the budget saves
    assert_same_bits(found[0], found[2**40])


@pytest.mark.parametrize("initializer", [None, Normal(seed=2)])
def test_memory_budget_zero_changes_nothing_else(path, initializer):
    arguments = {"num_embeddings": 3000, "embedding_dim": 5, "optimizer": Adam(), "initializer": initializer}
    model = TableModel.new("t", **arguments)
    rng = np.random.default_rng(0)
    with shardemb.open(path, memory_budget=0) as store:
        table = store.create_table("t", rows_per_shard=512, **arguments)
        for turn in range(6):
            ids, numbers = rng.integers(0, 3000, 500), rng.normal(size=(500, 5)).astype(np.float32)
            table.update(ids, numbers)
            if turn % 3 == 2:
                store.rollback()
                continue
            model.update(ids, numbers)
            table.prefetch(ids + 1 - ids % 2, for_update=True)
            store.commit()
            model.assert_matches(table)
    with shardemb.open(path) as store:
        model.assert_matches(store["t"])


# ---- disks that are full or broken ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:what is committed in")
def test_a_full_disk_fails_the_commit_and_nothing_else(small_disk, monkeypatch):
    monkeypatch.setattr(filling, "LEAST_BYTES", 2**40)
    path = small_disk.place / "store.zarr"
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=20_000, embedding_dim=256, initializer=Constant(1.0))
        table.write(np.arange(1000), np.full((1000, 256), 2.0))
        first = store.commit(step=1)
        everything = np.arange(20_000)
        table.write(everything, np.full((20_000, 256), 3.0))
        for _ in range(2):
            with pytest.raises(DiskFullError, match="no space left.*free some space") as caught:
                store.commit(step=2)
            assert caught.value.errno == errno.ENOSPC
        assert store.last_commit == first
        assert store.has_changes
        with shardemb.open(path, "r") as reader:
            assert reader.last_commit == first
            assert (reader["t"].lookup(everything) == np.where(everything < 1000, 2, 1)[:, None]).all()
        assert (table.lookup(everything) == 3).all()
        with pytest.raises(DiskFullError):
            store.create_table(
                "u", num_embeddings=20_000, embedding_dim=256, initializer=np.ones((20_000, 256))
            )
        assert list(store) == ["t"]
        small_disk.make_room()
        assert store.commit(step=2) == shardemb.Commit(2, 2, {})
    with shardemb.open(path, "r") as store:
        assert (store["t"].lookup(everything) == 3).all()
        assert store.last_commit.step == 2


@pytest.mark.parametrize("warm", [True, False])
def test_a_full_disk_fails_a_large_write_and_nothing_else(small_disk, warm):
    """Such a write goes to the shards at once, and takes their space."""
    path, everything = small_disk.place / "store.zarr", np.arange(20_000)
    with shardemb.open(path, warm=warm) as store:
        table = store.create_table("t", num_embeddings=20_000, embedding_dim=256, initializer=Constant(1.0))
        table.write(np.arange(1000), np.full((1000, 256), 2.0))
        store.commit(step=1)
        for _ in range(2):
            with pytest.raises(DiskFullError, match=r"no space left.*free some space"):
                table.write(everything, np.full((20_000, 256), 3.0))
            assert not store.has_changes
            assert (table.lookup(everything) == np.where(everything < 1000, 2, 1)[:, None]).all()
        store.commit(step=2)
        small_disk.make_room()
        table.write(everything, np.full((20_000, 256), 3.0))
        store.commit(step=3)
    with shardemb.open(path) as store:
        assert (store["t"].lookup(everything) == 3).all()
        assert store.verify() == []


def test_rollback_after_a_full_disk(small_disk, monkeypatch):
    monkeypatch.setattr(filling, "LEAST_BYTES", 2**40)
    path = small_disk.place / "store.zarr"
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=20_000, embedding_dim=256)
        store.commit()
        table.write(np.arange(20_000), np.full((20_000, 256), 3.0))
        with pytest.raises(DiskFullError):
            store.commit()
        store.rollback()
        assert (rows(table) == 0).all()
        table.write([1], np.ones((1, 256)))
        store.commit()
    with shardemb.open(path, "r") as store:
        assert store["t"].lookup([0, 1])[:, 0].tolist() == [0, 1]


def fail(*arguments, **options):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.filterwarnings("ignore:what is committed in")
@pytest.mark.parametrize(
    ("what", "only", "committed"),
    [
        ("write", "log", False),
        ("sync_data", "log", False),
        ("sync_tree", "", False),
        ("write", "rows", True),
        ("sync_data", "rows", True),
        ("write", "manifest", True),
        ("sync", "manifest", True),
        ("rename", "manifest", True),
        ("sync_directory", "shardemb", True),
    ],
)
def test_an_error_of_the_device_poisons_the_store(path, monkeypatch, what, only, committed):
    store = shardemb.open(path)
    table = small(store)
    table.write([1], ONES[:1] * 5)
    store.commit(step=1)
    small(store, "new")
    table.write([1], ONES[:1] * 6)
    real = getattr(files, what)

    def sometimes(*arguments, **options):
        place = next(str(each) for each in reversed(arguments) if isinstance(each, Path))
        if only in place.removeprefix(str(path)):
            fail()
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, what, sometimes)
        if committed:
            assert store.commit(step=2).step == 2
        else:
            with pytest.raises(OSError, match="Input/output"):
                store.commit(step=2)
    for call in (
        store.commit,
        store.rollback,
        lambda: table.update([1, 2], ONES),
        lambda: table.write([1, 2], ONES),
    ):
        with pytest.raises(PoisonedError, match="close it and open it again"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.close()
    with shardemb.open(path) as again:
        assert again.verify() == []
        assert again.last_commit.step in ({2} if committed else {1, 2})
        assert again["t"].lookup(1)[0] == 4 + again.last_commit.step
        assert again["t"].lookup(2).tolist() == [1] * 4
        again["t"].write([1], ONES[:1] * 7)
        again.commit(step=3)
    with shardemb.open(path, "r") as again:
        assert again["t"].lookup(1).tolist() == [7] * 4


# ---- thousands of tables ----------------------------------------------------------------------------------------


def mappings():
    return len(Path("/proc/self/maps").read_text().splitlines())


def make_many(path, number):
    with shardemb.open(path) as store:
        for k in range(number):
            table = store.create_table(f"t{k}", num_embeddings=100, embedding_dim=4, optimizer=SGD(lr=1.0))
            table.write([1], np.full((1, 4), k, np.float32))
        store.commit(step=1)


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_small_table_takes_few_mappings_and_all_are_counted(path, mode):
    make_many(path, 100)
    gc.collect()
    before, counted = mappings(), files.counters.mappings
    with shardemb.open(path, mode) as store:
        if mode == "a":
            for table in store.values():
                table.write([2], np.ones((1, 4), np.float32))
        taken = mappings() - before
        assert taken <= 3 * 100 + 20
        assert taken <= files.counters.mappings - counted + 20
        if mode == "a":
            store.commit()
        assert store["t99"].lookup(1)[0] == 99


def test_a_vocabulary_takes_few_mappings_and_all_are_counted(path):
    with shardemb.open(path) as store:
        for k in range(21):
            store.create_vocabulary(f"v{k}", key_type="string").add([f"{n}" for n in range(50)])
            store.create_table(f"t{k}", vocabulary=f"v{k}", embedding_dim=4, optimizer=SGD(lr=1.0))
            if k == 0:  # what this has loaded and compiled is not counted
                before, counted = mappings(), files.counters.mappings
        taken = mappings() - before
        assert taken <= 20 * 20
        assert taken <= files.counters.mappings - counted + 20
        store.commit()


def test_a_table_for_which_there_are_no_mappings_is_refused_before_the_commit(path, monkeypatch):
    with shardemb.open(path) as store:
        monkeypatch.setattr(address_space, "MAX_MAPPINGS", files.counters.mappings + 45)
        with pytest.raises(ShardEmbError, match=r"vm\.max_map_count"):
            for k in range(30):
                store.create_table(f"t{k}", num_embeddings=100, embedding_dim=4)
        made = len(store)
        assert 5 < made < 30
        with pytest.raises(ShardEmbError, match=r"vm\.max_map_count"):
            store.create_vocabulary("v", key_type="string")
        assert store.vocabularies == {}
        store.commit()
    for mode in ("r", "a"):
        with shardemb.open(path, mode) as store:
            assert len(store) == made


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand_tables(path):
    make_many(path, 10_000)
    for mode in ("r", "a"):
        started = time.perf_counter()
        with shardemb.open(path, mode) as store:
            assert time.perf_counter() - started < 120
            assert store["t9999"].lookup(1)[0] == 9999
            if mode == "a":
                store["t5"].write([2], np.ones((1, 4), np.float32))
                store.commit(step=2)


def test_nothing_is_left_of_a_table_whose_name_was_taken_while_its_rows_were_computed(store):
    def rows(start, stop):
        if "t" not in store:
            store.create_table("t", num_embeddings=5, embedding_dim=2)
        return np.zeros((stop - start, 4), np.float32)

    with pytest.raises(TableExistsError):
        store.create_table("t", num_embeddings=10, embedding_dim=4, initializer=rows)
    assert store["t"].num_embeddings == 5
    store.commit()
    assert list((store.path / ".shardemb" / "tables").iterdir()) == []
