"""Copies of stores, new ones and older ones that are brought up to date."""

import contextlib
import errno
import itertools
import shutil
import threading
from functools import partial

import numpy as np
import pytest
from support.kinds import DIM, KINDS, assert_equal, create, damage, everything, train
from support.model import assert_same_bits

import shardemb
from shardemb.commits import copies, fold
from shardemb.errors import (
    FormatError,
    ReadOnlyError,
    ShardEmbError,
    StaleReaderError,
    StoreExistsError,
    StoreLockedError,
    StoreNotFoundError,
)
from shardemb.initializers import Constant
from shardemb.storage import files, folders


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s"


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
    monkeypatch.setattr(copies, "ROUNDS", 1)

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


# ---- older copies that are brought up to date -------------------------------------------------------------------


def content(store):
    return {name: everything(table) for name, table in store.items()}


def is_copied(place, store):
    with shardemb.open(place, "r") as copied:
        assert copied.last_commit == store.last_commit
        assert copied.verify() == []
        found, expected = content(copied), content(store)
        assert found.keys() == expected.keys()
        for name, each in expected.items():
            assert_equal(found[name], each)


# What may happen to a store between two copies of it.
BETWEEN = {
    "nothing": lambda store: None,
    "train": lambda store: [train(table, 11) for table in store.values()],
    "create": lambda store: train(create(store, 300, "zeros", "new"), 3),
    "fill": lambda store: create(store, 60_000, "zeros", "n", 4096).write(
        np.arange(60_000), np.ones((60_000, DIM))
    ),
    "drop": lambda store: store.drop_table("zeros"),
    "swap names": lambda store: [
        store.rename_table(*names) for names in (("zeros", "x"), ("drawn", "zeros"), ("x", "drawn"))
    ],
    "grow": lambda store: (store["drawn"].resize(900), train(store["drawn"], 4)),
    "shrink": lambda store: store["drawn"].resize(200, drop_rows=True),
    "reshard": lambda store: store.reshard("drawn", rows_per_shard=64),
    "materialize": lambda store: store["drawn"].materialize(),
}


@pytest.mark.parametrize("of_reader", [False, True])
@pytest.mark.parametrize("what", BETWEEN)
def test_an_older_copy_becomes_a_new_one(pair, tmp_path, what, of_reader):
    store, reader = pair
    store.copy(tmp_path / "c", update=True)  # there is none yet
    is_copied(tmp_path / "c", store)
    with shardemb.open(tmp_path / "c", "r") as copied:
        identity = copied.uuid
    BETWEEN[what](store)
    store.commit(step=3)
    (reader if of_reader else store).copy(tmp_path / "c", update=True)
    is_copied(tmp_path / "c", store)
    train(store["row-wise"], 12)
    store.commit(step=4)
    store.copy(tmp_path / "c", update=True)
    is_copied(tmp_path / "c", store)
    with shardemb.open(tmp_path / "c") as copied:  # it is a store like any other
        assert copied.uuid == identity
        train(copied["row-wise"], 13)
        copied.commit()


def test_a_vocabulary_grows_in_an_older_copy(path, tmp_path):
    with shardemb.open(path) as store:
        store.create_vocabulary("words", key_type="string")
        table = store.create_table("words", vocabulary="words", embedding_dim=DIM, rows_per_shard=64)
        for number in range(3):
            keys = [f"{number}-{i}" for i in range(300)]
            table.write(keys, np.full((300, DIM), number, np.float32), create=True)
            table.delete(keys[:10])
            store.commit()
            store.copy(tmp_path / "c", update=True)
            with shardemb.open(tmp_path / "c", "r") as copied:
                assert list(copied["words"]) == list(table)
                assert_same_bits(copied["words"].lookup(keys[10:]), table.lookup(keys[10:]))
                assert copied.verify() == []


def test_an_update_reads_and_writes_what_has_changed(path, tmp_path):
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=200_000, embedding_dim=64)  # 51 MB
        table.write(np.arange(200_000), np.ones((200_000, 64), np.float32))
        store.commit()
        store.copy(tmp_path / "c")
        table.write(np.arange(0, 200_000, 20_000), np.full((10, 64), 2, np.float32))
        store.commit()
        store.checkpoint()
        before = files.counters.bytes_written
        store.copy(tmp_path / "c", update=True)
        assert files.counters.bytes_written - before < 200_000
        is_copied(tmp_path / "c", store)


def test_foreign_files_of_an_older_copy_become_those_of_the_store(pair, tmp_path):
    store, _ = pair
    (store.path / "zeros" / "notes").mkdir()
    (store.path / "zeros" / "notes" / "a").write_text("one")
    store.copy(tmp_path / "c")
    (store.path / "zeros" / "notes" / "a").write_text("two")
    (store.path / "README").write_text("three")
    (tmp_path / "c" / "zeros" / "gone").write_text("four")
    store.copy(tmp_path / "c", update=True)
    assert (tmp_path / "c" / "zeros" / "notes" / "a").read_text() == "two"
    assert (tmp_path / "c" / "README").read_text() == "three"
    assert not (tmp_path / "c" / "zeros" / "gone").exists()


def test_who_reads_an_older_copy_notices(pair, tmp_path):
    store, _ = pair
    store.copy(tmp_path / "c")
    with shardemb.open(tmp_path / "c", "r") as copied:
        train(store["drawn"], 21)
        store.commit(step=3)
        store.copy(tmp_path / "c", update=True)
        with pytest.raises(StaleReaderError):
            copied["drawn"].lookup([1])
        copied.refresh()
        assert copied.last_commit.step == 3
        store.copy(tmp_path / "c", update=True)
        with pytest.raises(StaleReaderError):
            copied["drawn"].lookup([1])


def test_only_unchanged_copies_of_the_same_store_are_brought_up_to_date(pair, tmp_path):
    store, _ = pair
    store.copy(tmp_path / "c")
    with shardemb.open(tmp_path / "other") as other:
        create(other, 10)
        other.commit()
        with pytest.raises(StoreExistsError, match="a copy of another store"):
            other.copy(tmp_path / "c", update=True)
        with pytest.raises(StoreExistsError, match="not known as a copy"):
            store.copy(tmp_path / "other", update=True)
        (tmp_path / "folder").mkdir()
        with pytest.raises(StoreExistsError, match="not known as a copy"):
            store.copy(tmp_path / "folder", update=True)
    before = files.read(tmp_path / "c" / ".shardemb" / "manifest.json")
    with copies.older_place(tmp_path / "c", store.uuid), pytest.raises(StoreLockedError):
        store.copy(tmp_path / "c", update=True)
    files.replace(tmp_path / "c" / ".shardemb" / "manifest.json", before)
    with shardemb.open(tmp_path / "c") as copied:
        with pytest.raises(StoreExistsError, match="opened for writing"):
            store.copy(tmp_path / "c", update=True)
        train(copied["drawn"], 5)
        copied.commit()
    with pytest.raises(StoreExistsError, match="opened for writing"):
        store.copy(tmp_path / "c", update=True)


CALLS = [
    "write",
    "sync_data",
    "create_sparse",
    "rename",
    "replace",
    "remove_tree",
    "overwrite",
    "remove",
    "sync_tree",
]


@pytest.mark.parametrize("what", ["train", "grow", "create", "drop"])
def test_an_update_that_is_interrupted_anywhere_is_completed_by_the_next(pair, tmp_path, monkeypatch, what):
    """As by a killed process: whatever a call would have done, and all after it, is missing."""
    store, _ = pair
    store.copy(tmp_path / "old")
    BETWEEN[what](store)
    store.commit(step=3)
    store.checkpoint()
    number, done = 0, False
    while not done:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(tmp_path / "old", tmp_path / "c")
        calls = []

        def stop(*arguments, real, calls=calls, number=number, **options):
            if any(str(each).startswith(str(tmp_path / "c")) for each in arguments):
                calls.append(real)
            if len(calls) > number:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            for name in CALLS:
                patch.setattr(files, name, partial(stop, real=getattr(files, name)))
            store.copy(tmp_path / "c", update=True)
            done = True
        if not done and not (tmp_path / "c" / ".shardemb" / "manifest.json").exists():
            with pytest.raises((StoreNotFoundError, FormatError)):
                shardemb.open(tmp_path / "c", "r")
        store.copy(tmp_path / "c", update=True)
        is_copied(tmp_path / "c", store)
        number += 1
    assert number > 10


def test_a_block_that_becomes_what_it_was_after_an_interrupted_update(pair, tmp_path, monkeypatch):
    """The copy has the new block and the old checksum, which is that of the newest block too."""
    store, _ = pair
    for value in (1, 2):
        store["zeros"].write([3], np.full((1, DIM), value, np.float32))
        store.commit()
        store.checkpoint()
        if value == 1:
            store.copy(tmp_path / "c")
    real = files.sync_data

    def stop(descriptor, path):
        if path.parent.name == "rows":
            raise KeyboardInterrupt
        real(descriptor, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "sync_data", stop)
        store.copy(tmp_path / "c", update=True)
    store["zeros"].write([3], np.full((1, DIM), 1, np.float32))
    store.commit()
    store.checkpoint()
    store.copy(tmp_path / "c", update=True)
    is_copied(tmp_path / "c", store)
