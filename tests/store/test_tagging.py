"""Tags: a commit that is kept is read exactly while a writer goes on, and restored to the bit."""

import errno
import logging
import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inside
from support.failures import Failing
from support.power_loss import contents, lower_limits, scratch
from support.stores import close_quietly

import shardemb
from shardemb.commits import fold, undo
from shardemb.engine import batch, filling
from shardemb.format import store_paths
from shardemb.initializers import Uniform
from shardemb.optim import SGD, Adagrad, Adam
from shardemb.storage import files

ROWS, DIM = 150, 16


def new(store, name="a", **more):
    how = {"num_embeddings": ROWS, "embedding_dim": DIM, "rows_per_shard": 64, "optimizer": Adam(lr=0.1)}
    return store.create_table(name, **how | more)


def train(table, seed, count=20):
    rng = np.random.default_rng(seed)
    table.update(
        rng.integers(0, table.num_embeddings, count), rng.normal(size=(count, DIM)).astype(np.float32)
    )


@pytest.fixture
def store(tmp_path):
    """A store with a table of drawn rows and one of zeros, and a commit."""
    store = shardemb.open(tmp_path / "s", threads=1)
    new(store, "a", initializer=Uniform(-1, 1, seed=1))
    new(store, "z", counters=True)
    for table in store.values():
        train(table, 1)
    store.commit(step=1, metadata={"loss": 0.5})
    yield store
    close_quietly(store)


def go_on(store, seed, *, folds=True):
    for table in store.values():
        train(table, seed, 60)
    store.commit(step=seed)
    if folds:
        store.checkpoint()


def held(path, name="best"):
    """What a tag holds, for a reader that begins now; it finds no damage."""
    with shardemb.open(path, "r", commit=name, threads=1) as reader:
        assert reader.verify() == []
        return contents(reader)


def restored(store, name):
    """Restore a tag, and compare everything with it."""
    before, (commit, tables) = store.last_commit, held(store.path, name)
    found = store.restore(name)
    assert contents(store)[1] == tables
    assert (found.id, found.step) == (before.id + 1, commit[1])
    assert found.metadata == {**dict(commit[2]), "restored": {"tag": name, "commit": commit[0]}}
    assert not store.has_changes
    return tables


# ---- keeping and reading ----------------------------------------------------------------------------------------


def test_a_tag_is_the_last_commit_without_later_changes(store):
    expected = contents(store)
    train(store["a"], 2)
    found = store.tag("best")
    assert found == store.last_commit
    found.metadata["loss"] = 7  # a copy
    assert found != store.last_commit
    assert store.has_changes
    assert held(store.path) == expected
    assert dict(store.tags) == {"best": store.last_commit}


def test_readers_see_it_while_a_writer_trains_and_folds(store):
    expected = contents(store)
    store.tag("best")
    with shardemb.open(store.path, "r", commit="best") as early:
        for seed in range(2, 6):
            go_on(store, seed)
            assert contents(early) == held(store.path) == expected
            assert early.verify() == []
            early.refresh()
            assert contents(early) == expected
    assert store.verify() == []


def test_a_reader_is_exact_beside_a_thread_that_folds(store):
    store.tag("best")
    ids, expected = np.arange(ROWS), [table.lookup(np.arange(ROWS)) for table in store.values()]
    ends = threading.Event()

    def write():
        for seed in range(2, 12):
            go_on(store, seed)
        ends.set()

    writer = threading.Thread(target=write)
    with shardemb.open(store.path, "r", commit="best") as reader:
        writer.start()
        while not ends.is_set():
            for table, rows in zip(reader.values(), expected, strict=True):
                assert np.array_equal(table.lookup(ids), rows)
        writer.join()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fold_between_a_look_and_the_read_is_noticed(store, monkeypatch, dtype):
    table = new(store, "t", dtype=dtype)
    train(table, 1)
    store.commit()
    expected = table.lookup(np.arange(ROWS))
    store.tag("best")
    train(table, 2, 200)
    store.commit()
    real, folds = batch._without_lock, [store.checkpoint]

    def fold_first(runtime, reads, gather):
        if folds and runtime is not inside.runtime(store):
            folds.pop()()
        real(runtime, reads, gather)

    with shardemb.open(store.path, "r", commit="best") as reader:
        monkeypatch.setattr(batch, "_without_lock", fold_first)
        assert np.array_equal(reader["t"].lookup(np.arange(ROWS)), expected)
    assert not folds


def test_it_is_kept_when_its_tables_change_their_form(store):
    expected = contents(store)
    store.tag("best")
    store["a"].resize(300)
    go_on(store, 2)
    store.reshard("z", rows_per_shard=128)
    go_on(store, 3)
    store.drop_table("a")
    new(store, "a")
    go_on(store, 4)
    store.rename_table("a", "b")
    store.commit()
    assert held(store.path) == expected
    store.close()
    with shardemb.open(store.path) as again:
        go_on(again, 5)
        assert held(store.path) == expected
        restored(again, "best")


def test_a_new_writer_goes_on_keeping(store):
    expected = contents(store)
    store.tag("best")
    path = store.path
    with shardemb.open(path, "r", commit="best") as reader:
        go_on(store, 2, folds=False)
        store.close()
        with shardemb.open(path, threads=1) as again:
            go_on(again, 3)
            go_on(again, 4)
            assert contents(reader) == expected
    assert held(path) == expected


def test_several_tags_keep_what_each_has(store):
    expected = {}
    for seed in range(2, 6):
        expected[f"t{seed}"] = contents(store)
        store.tag(f"t{seed}")
        go_on(store, seed)
    assert {name: held(store.path, name) for name in store.tags} == expected
    store.untag("t3")
    go_on(store, 9)
    del expected["t3"]
    assert {name: held(store.path, name) for name in store.tags} == expected
    for name in expected:
        restored(store, name)


def test_copies_and_exports_of_a_tag_are_the_tag(store, tmp_path):
    expected = contents(store)
    store.tag("best")
    go_on(store, 2)
    store.commit(step=3)
    store.copy(tmp_path / "older")
    with shardemb.open(store.path, "r", commit="best") as reader:
        reader.copy(tmp_path / "copy")
        reader.copy(tmp_path / "older", update=True)
        reader["a"].export_parquet(tmp_path / "a.parquet")
        weights = reader["a"].lookup(np.arange(ROWS))
    for name in ("copy", "older"):
        with shardemb.open(tmp_path / name, "r") as copied:
            assert contents(copied) == expected
            assert copied.verify() == []
            assert not copied.tags
    pq = pytest.importorskip("pyarrow.parquet")
    column = pq.read_table(tmp_path / "a.parquet").column(1).to_pylist()
    assert np.array_equal(np.array(column, np.float32), weights)


def test_rows_are_not_filled_into_files_that_a_tag_has(store, monkeypatch):
    monkeypatch.setattr(filling, "LEAST_BYTES", 4096)
    table = store.create_table("f", num_embeddings=4096, embedding_dim=DIM)
    table.write(np.arange(1000), np.ones((1000, DIM), np.float32))
    store.commit()
    table.write(np.arange(1000, 2000), np.ones((1000, DIM), np.float32))
    assert inside.shards(table).filled.changes
    expected = np.repeat([1, 0], [1000, 3096])
    store.tag("best")  # the fills before it are part of it, and those since the commit are not
    assert not inside.shards(table).filled.changes
    table.write(np.arange(2000, 3000), np.ones((1000, DIM), np.float32))
    assert not inside.shards(table).filled.changes
    for folds in (store.commit, store.checkpoint):
        folds()
        with shardemb.open(store.path, "r", commit="best") as reader:
            assert np.array_equal(reader["f"].lookup(np.arange(4096))[:, 0], expected)
    assert table.lookup(2999)[0] == 1


# ---- going back -------------------------------------------------------------------------------------------------


def test_a_restore_discards_what_no_commit_has(store):
    expected = contents(store)[1]
    store.tag("best")
    go_on(store, 2)
    train(store["a"], 3)
    new(store, "n")
    store["z"].resize(77, drop_rows=True)
    a = store["a"]
    restored(store, "best")
    assert contents(store)[1] == expected
    assert store["a"] is a
    train(a, 4)
    store.commit()
    store.checkpoint()
    assert held(store.path)[1] == expected
    assert store.verify() == []


def test_a_restore_commits_only_rows_that_differ(store, caplog):
    table = store.create_table("m", num_embeddings=10_000, embedding_dim=DIM)
    table.write(np.arange(10_000), np.ones((10_000, DIM), np.float32))
    store.commit()
    store.tag("best")
    table.write([5, 5000], np.zeros((2, DIM), np.float32))
    store.commit()
    with caplog.at_level(logging.INFO, "shardemb"):
        store.restore("best")
    assert ["step 1, 2 rows" in message for message in caplog.messages if "committed" in message] == [True]
    assert (table.lookup(np.arange(10_000)) == 1).all()


def test_a_restore_takes_hyper_parameters_names_and_frozen_rows_back(store):
    store["a"].freeze_rows(3, 9)
    store.commit(step=5)
    store.tag("best")
    store["a"].unfreeze_rows()
    store["a"].set_optimizer(Adam(lr=7.0))
    store.rename_table("a", "tmp")
    store.rename_table("z", "a")
    store.rename_table("tmp", "z")
    go_on(store, 6)
    restored(store, "best")
    assert store["a"].optimizer == Adam(lr=0.1)
    with pytest.raises(shardemb.FrozenRowError):
        store["a"].update([4], np.ones((1, DIM), np.float32))


@pytest.mark.parametrize("key_type", ["int64", "string"])
@pytest.mark.parametrize("reopens", [False, True])
def test_vocabularies_are_what_they_were(tmp_path, key_type, reopens):
    def keys(*numbers):
        return list(numbers) if key_type == "int64" else [f"key {n}" for n in numbers]

    store = shardemb.open(tmp_path / "s", threads=1)
    words = store.create_vocabulary("words", key_type=key_type)
    table = store.create_table("v", vocabulary="words", embedding_dim=DIM, optimizer=SGD(lr=1.0))
    words.add(keys(*range(100)))
    table.update(keys(*range(100)), np.ones((100, DIM), np.float32))
    words.remove(keys(7))
    store.commit(step=1)
    store.tag("best")
    expected = contents(store)[1]
    for seed in range(3):
        words.remove(keys(3 + seed, 50 + seed))
        words.add(more := keys(*range(1000 * seed, 1000 * seed + 700)))
        table.update(more, np.ones((700, DIM), np.float32))
        store.commit()
        store.checkpoint()
    inside.key_rows(words).index.merge(inside.key_rows(words)._coverage())
    with shardemb.open(store.path, "r", commit="best") as reader:
        assert contents(reader)[1] == expected
        assert reader["v"].lookup(keys(3)).any()
    restored(store, "best")
    if reopens:
        close_quietly(store)
        store = shardemb.open(tmp_path / "s", threads=1)
        words, table = store.vocabularies["words"], store["v"]
    assert contents(store)[1] == expected
    rows = words.lookup(keys(3, 7, 50, 99, 100, 2000)).tolist()
    assert rows == [3, -1, 50, 99, -1, -1]
    assert words.add(keys(5000, 5001)).tolist() == [7, 100]
    table.update(keys(5000, 5001), np.ones((2, DIM), np.float32))
    store.commit()
    store.close()
    with shardemb.open(tmp_path / "s") as again:
        assert again.vocabularies["words"].lookup(keys(5001, 3, 5000, 2000)).tolist() == [100, 3, 7, -1]
        assert again.verify() == []


def test_a_vocabulary_that_was_dropped_comes_back(tmp_path):
    with shardemb.open(tmp_path / "s", threads=1) as store:
        store.create_vocabulary("words", key_type="string")
        table = store.create_table("v", vocabulary="words", embedding_dim=DIM)
        store.vocabularies["words"].add(["a", "b"])
        table.write(["a", "b"], np.ones((2, DIM), np.float32))
        store.commit()
        store.tag("best")
        expected = contents(store)[1]
        store.drop_table("v")
        store.drop_vocabulary("words")
        store.create_vocabulary("words", key_type="string").add(["c"])
        store.commit()
        store.restore("best")
        assert contents(store)[1] == expected
        assert store.vocabularies["words"].lookup(["a", "b", "c"]).tolist() == [0, 1, -1]


# ---- a model ----------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["train", "train", "fold", "tag", "tag", "restore", "untag", "resize", "reshard", "drop", "reopen", "roll"]
        ),
        st.integers(0, 2),
    ),
    max_size=14,
)  # fmt: skip


@given(STEPS, st.integers(0, 2**16))
@settings(deadline=None, max_examples=10)
def test_any_history_against_copies_of_everything(steps, seed):
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        lower_limits(patch, seed)
        chance = random.Random(seed)
        options = {
            "threads": 1,
            "log_bytes": chance.choice([1, 60_000]),
            "memory_budget": chance.choice([0, 2**30]),
        }
        store = shardemb.open(Path(folder) / "s", **options)
        new(store, "a", initializer=chance.choice([None, Uniform(-1, 1, seed=1)]))
        new(store, "b", optimizer=Adagrad(), dtype=chance.choice(["float32", "bfloat16"]))
        store.commit()
        tags = {}
        for number, (what, which) in enumerate(steps):
            tag = f"t{which}"
            if what == "reopen":
                close_quietly(store)
                store = shardemb.open(Path(folder) / "s", **options)
            elif what in ("tag", "restore", "untag"):
                _tag(store, what, tag, tags)
            else:
                _change(store, what, which, number)
            assert set(store.tags) == set(tags)
            assert {name: held(store.path, name) for name in tags} == tags
        assert store.verify() == []
        close_quietly(store)


def _tag(store, what, tag, tags):
    if what == "tag":
        if store.has_changes:
            store.commit()
        tags[tag] = contents(store)
        store.tag(tag, replace=True)
    elif tag not in tags:
        with pytest.raises(shardemb.TagNotFoundError):
            getattr(store, what)(tag)
    elif what == "restore":
        restored(store, tag)
    else:
        store.untag(tag)
        del tags[tag]


def _change(store, what, which, number):
    name = list(store)[which % len(store)]
    if what == "train":
        train(store[name], number, 30)
        if which:
            store.commit()
    elif what == "fold":
        store.checkpoint()
    elif what == "resize":
        store[name].resize([70, ROWS, 200][which], drop_rows=True)
    elif what == "reshard":
        store.commit()
        store.reshard(name, rows_per_shard=[64, 128, 256][which])
    elif what == "drop":
        store.drop_table(name)
        new(store, f"n{number}")
    else:
        store.rollback()


# ---- on the disk ------------------------------------------------------------------------------------------------


def records(path):
    """The undo file of the only tag of a store."""
    (folder,) = (path / ".shardemb" / "tags").iterdir()
    return store_paths.undo(folder)


def test_a_block_is_kept_once(store):
    store.tag("best")
    table = store["a"]
    for step in range(4):
        table.write([1], np.full((1, DIM), step, np.float32))
        store.commit()
        store.checkpoint()
    blocks = 2  # of the records, and of the bitmap
    assert records(store.path).stat().st_size == 4096 + blocks * undo.RECORD.itemsize
    assert store.info().tags[0].bytes_kept < 64 * 1024


def test_older_versions_refuse_a_store_with_tags_and_no_other(store):
    manifest = store_paths.manifest(store.path)
    store.tag("best")
    assert b'"format_version": 2' in manifest.read_bytes()
    go_on(store, 2)
    assert b'"format_version": 2' in manifest.read_bytes()
    store.untag("best")
    assert b'"format_version": 1' in manifest.read_bytes()


def test_what_was_kept_last_may_be_torn(store):
    expected = contents(store)
    store.tag("best")
    go_on(store, 2)
    with records(store.path).open("ab") as file:
        file.write(bytes(3 * undo.RECORD.itemsize + 100))
    store.close()
    assert held(store.path) == expected
    with shardemb.open(store.path) as again:
        for seed in (3, 4):
            for table in again.values():
                train(table, seed, 200)
            again.commit()
            again.checkpoint()
            assert held(store.path) == expected


def test_damage_to_what_was_kept_is_named(store):
    store.tag("best")
    go_on(store, 2)
    go_on(store, 3)
    data = bytearray(records(store.path).read_bytes())
    data[4096 + 100] ^= 1
    records(store.path).write_bytes(data)
    with pytest.raises(shardemb.FormatError, match="undo is damaged.*release it"):
        shardemb.open(store.path, "r", commit="best")
    before = contents(store)
    with pytest.raises(shardemb.FormatError, match="undo is damaged"):
        store.restore("best")
    assert contents(store) == before
    store.close()
    with shardemb.open(store.path) as again:
        go_on(again, 4)
        with pytest.raises(shardemb.FormatError, match="undo is damaged"):
            again.restore("best")
        again.untag("best")
        assert again.verify() == []


def test_damage_to_its_files_is_found(store):
    table = new(store, "d", num_embeddings=1024, rows_per_shard=1024)
    table.write(np.arange(1024), np.ones((1024, DIM), np.float32))
    store.commit()
    store.tag("best")
    table.write([0], np.zeros((1, DIM), np.float32))
    store.commit()
    store.checkpoint()
    shard = inside.shards(table).shard_path(0)
    data = bytearray(shard.read_bytes())
    data[100] ^= 1  # in the block that is kept, so the tag does not mind
    data[5000 * 4] ^= 1
    shard.write_bytes(data)
    with shardemb.open(store.path, "r", commit="best") as reader:
        (damage,) = reader.verify()
    assert damage.table == "d"
    assert len(store.verify()) == 2


def test_a_store_copied_with_links_keeps_its_own(store, tmp_path):
    expected = contents(store)
    store.tag("best")
    go_on(store, 2)
    store.close()
    os.system(f"cp -al {store.path} {tmp_path / 'other'}")
    for seed, path in ((3, tmp_path / "other"), (4, store.path)):
        with shardemb.open(path, threads=1) as each:
            for _ in range(2):
                for table in each.values():
                    train(table, seed, 200)
                each.commit()
                each.checkpoint()
            assert held(store.path) == held(tmp_path / "other") == expected
            restored(each, "best")
            assert each.verify() == []


def test_disk_space_is_counted_once(store):
    before = store.info().bytes_on_disk
    store.tag("best")
    more = store.info().bytes_on_disk - before
    assert more < 200_000
    store.untag("best")
    assert not list((store.path / ".shardemb" / "tags").iterdir())


def test_a_new_store_has_no_tags(store):
    store.tag("best")
    store.close()
    with shardemb.open(store.path, "w") as fresh:
        assert not fresh.tags
        assert not (fresh.path / ".shardemb" / "tags").exists()


# ---- errors -----------------------------------------------------------------------------------------------------


def test_names(store):
    store.tag("best")
    with pytest.raises(shardemb.TagExistsError, match="already has a tag 'best'; pass replace=True"):
        store.tag("best")
    for call in (store.untag, store.restore, lambda name: shardemb.open(store.path, "r", commit=name)):
        with pytest.raises(shardemb.TagNotFoundError, match="no tag 'other'; its tags: 'best'"):
            call("other")
    for name in ("", "a/b", ".x", 3):
        with pytest.raises((ValueError, TypeError)):
            store.tag(name)
    assert list(store.tags) == ["best"]


def test_a_tag_is_only_read(store):
    store.tag("best")
    for mode in ("r+", "w", "w-"):
        with pytest.raises(ValueError, match='mode must be "r"'):
            shardemb.open(store.path, mode, commit="best")
    with shardemb.open(store.path, commit="best") as reader:
        for change in (
            lambda: train(reader["a"], 1), lambda: reader.tag("x"), lambda: reader.restore("best"),
            lambda: reader.untag("best"), reader.commit,
        ):  # fmt: skip
            with pytest.raises(shardemb.ReadOnlyError):
                change()
        assert list(reader.tags) == ["best"]
        with pytest.raises(shardemb.StoreNotFoundError):  # its folder is no store
            shardemb.open(reader.path, "r")


def test_a_store_without_a_commit_has_nothing_to_keep(tmp_path):
    with shardemb.open(tmp_path / "s") as store, pytest.raises(shardemb.ShardEmbError, match="no commit yet"):
        store.tag("best")


def test_a_reader_learns_that_a_tag_was_released_or_moved(store):
    store.tag("best")
    readers = [shardemb.open(store.path, "r", commit="best") for _ in range(2)]
    go_on(store, 2)
    store.tag("best", replace=True)
    expected = contents(store)
    for reader in readers:
        with pytest.raises(shardemb.StaleReaderError, match="the tag 'best' was released or moved"):
            reader["a"].lookup(0)
        reader.refresh()
        assert contents(reader) == expected
    go_on(store, 3)
    assert contents(readers[0]) == expected
    store.untag("best")
    with pytest.raises(shardemb.TagNotFoundError):
        readers[0].refresh()
    for reader in readers:
        reader.close()


def test_without_hard_links_there_are_no_tags(store, monkeypatch):
    monkeypatch.setattr(files, "link", lambda source, target: False)
    with pytest.raises(shardemb.ShardEmbError, match=r"cannot get a second name \(a hard link\)"):
        store.tag("best")
    monkeypatch.undo()
    assert not store.tags
    assert not list((store.path / ".shardemb" / "tags").iterdir())


def test_a_fold_that_cannot_keep_does_not_write(store, monkeypatch):
    expected = contents(store)
    store.tag("best")
    real = files.write

    def write(descriptor, data, offset, path):
        if path.name == "undo":
            raise shardemb.DiskFullError(errno.ENOSPC, "no room")
        real(descriptor, data, offset, path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", write)
        for table in store.values():
            train(table, 2)
        store.commit()
        with pytest.raises(shardemb.DiskFullError):
            store.checkpoint()
        assert held(store.path) == expected
    store.checkpoint()
    assert held(store.path) == expected


# ---- failures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["tag", "move", "untag", "restore"])
def test_every_operation_fails_once(what, tmp_path):
    """Whatever fails: the store is at one of two commits with one of two sets of tags, and each tag is what it was."""
    start, tags = tmp_path / "start", {}
    with shardemb.open(start, threads=1) as store:
        new(store, "a", initializer=Uniform(-1, 1, seed=1))
        new(store, "z")
        go_on(store, 1)
        tags["one"] = contents(store)
        store.tag("one")
        store.drop_table("z")
        go_on(store, 2)
        last = contents(store)
    calls = {
        "tag": lambda store: store.tag("two"),
        "move": lambda store: store.tag("one", replace=True),
        "untag": lambda store: store.untag("one"),
        "restore": lambda store: store.restore("one"),
    }
    after = {"tag": tags | {"two": last}, "move": {"one": last}, "untag": {}, "restore": tags}[what]
    back = last[0][0] + 1, tags["one"][0][1], (("restored", {"tag": "one", "commit": tags["one"][0][0]}),)
    commits = [last, (back, tags["one"][1])] if what == "restore" else [last]
    count = _fail(start, tmp_path / "count", calls[what], Failing(), [commits[-1]], [after])
    positions = random.Random(what).sample(range(1, count + 1), min(count, 6))
    for number in positions:
        failing = Failing(number, ["full", "error", "short"][number % 3])
        try:
            _fail(start, tmp_path / str(number), calls[what], failing, commits, [tags, after])
        except BaseException as error:
            error.add_note(f"call {number}, {failing.kind}, {failing.failed}")
            raise


def _fail(start, path, call, failing, commits, tags):
    shutil.copytree(start, path, copy_function=_copy(start, path))
    store = shardemb.open(path, threads=1)
    with failing.on():
        try:
            call(store)
        except (shardemb.ShardEmbError, OSError) as error:
            assert str(error)
    close_quietly(store)
    with shardemb.open(path, threads=1) as again:
        assert contents(again) in commits
        assert {name: held(path, name) for name in again.tags} in tags
        assert {each.name for each in (path / ".shardemb/tags").iterdir()} == {
            each.uuid for each in inside.session(again).tag_entries()
        }
        go_on(again, 7)
        assert {name: held(path, name) for name in again.tags} in tags
        assert again.verify() == []
    return failing.count


def _copy(start, path):
    """Copy files as ``cp -a`` does: names of one file stay that."""
    first = {}

    def copy(source, target, **more):
        number = os.stat(source).st_ino
        if number in first:
            os.link(first[number], target)
            return target
        first[number] = target
        return shutil.copy2(source, target, **more)

    return copy


def test_the_fold_is_what_keeps(store, monkeypatch):
    """If it did not, these tests would notice."""
    expected = contents(store)
    store.tag("best")
    real = fold.write
    monkeypatch.setattr(fold, "write", lambda tables, threads, *rest: real(tables, threads))
    go_on(store, 2)
    with shardemb.open(store.path, "r", commit="best") as reader:
        assert contents(reader) != expected
        assert reader.verify()
