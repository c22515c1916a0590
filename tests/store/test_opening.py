"""Opening: what each mode creates, deletes and refuses; one writer at a time; forks; and kills at any moment."""

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
import zarr
from support import inside
from support.model import assert_same_bits
from support.stores import close_quietly

import shardemb
from shardemb.commits import fold
from shardemb.errors import (
    FormatError,
    PoisonedError,
    ReadOnlyError,
    StaleReaderError,
    StoreExistsError,
    StoreLockedError,
    StoreNotFoundError,
)
from shardemb.initializers import Constant, Normal
from shardemb.optim import SGD, Adam
from shardemb.storage import files

ONES = np.ones((2, 4), np.float32)


def make(path, *names, **options):
    """Make a store of small tables. Row 1 of each holds its position in `names`."""
    with shardemb.open(path, **options) as store:
        for number, name in enumerate(names):
            table = store.create_table(name, num_embeddings=100, embedding_dim=4, initializer=Constant(0.5))
            table.write([1], np.full((1, 4), float(number)))
        store.commit(step=7)


def content(path):
    return {
        str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()
    }


# ---- modes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["a", "w", "w-"])
@pytest.mark.parametrize("there", ["nothing", "parents missing", "an empty folder"])
def test_modes_that_create_create_an_empty_store(tmp_path, mode, there):
    path = tmp_path / "above" / "store.zarr" if there == "parents missing" else tmp_path / "store.zarr"
    if there == "an empty folder":
        path.mkdir()
    with shardemb.open(path, mode) as store:
        assert (len(store), store.last_commit, store.has_changes) == (0, None, False)
        assert store.path == path
    with shardemb.open(path, "r") as store:
        assert list(store) == []


@pytest.mark.parametrize("mode", ["r", "r+"])
@pytest.mark.parametrize("there", ["nothing", "an empty folder"])
def test_modes_that_do_not_create_say_how_to(path, mode, there):
    if there == "an empty folder":
        path.mkdir()
    with pytest.raises(StoreNotFoundError, match=r'no store at .*store\.zarr; create one with mode "a"'):
        shardemb.open(path, mode)
    assert path.exists() == (there == "an empty folder")
    assert not path.exists() or not any(path.iterdir())


@pytest.mark.parametrize("mode", ["r", "r+", "a"])
def test_modes_that_keep_show_what_is_there(path, mode):
    make(path, "a", "b")
    with shardemb.open(path, mode) as store:
        assert list(store) == ["a", "b"]
        assert store["b"].lookup([0, 1])[:, 0].tolist() == [0.5, 1]
        assert store.last_commit.step == 7


def test_mode_w_minus_refuses_a_store(path):
    make(path, "a")
    before = content(path)
    with pytest.raises(
        StoreExistsError, match=r'store\.zarr is a store already; open it with mode "r\+", or replace'
    ):
        shardemb.open(path, "w-")
    assert content(path) == before


@pytest.mark.parametrize("manifest", ["sound", "damaged"])
def test_mode_w_replaces_a_store_and_keeps_what_is_not_its_own(path, manifest):
    make(path, "a", "b")
    (path / "notes.txt").write_text("within the store")
    zarr.create_array(str(path / "mine"), shape=(3,), dtype="int64")[:] = [1, 2, 3]
    if manifest == "damaged":
        (path / ".shardemb" / "manifest.json").write_text("{}")
    with shardemb.open(path, "w") as store:
        assert list(store) == []
        assert store.last_commit is None
        assert sorted(os.listdir(path)) == [".shardemb", "mine", "notes.txt", "zarr.json"]
        assert zarr.open_array(str(path / "mine"))[:].tolist() == [1, 2, 3]
        store.create_table("a", num_embeddings=10, embedding_dim=2)
        assert store.commit().id == 1
    assert shardemb_names(path) == ["a"]


def test_mode_w_does_not_follow_links(path, tmp_path):
    make(path, "a")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "thesis.txt").write_text("mine")
    (path / "link").symlink_to(outside)
    shardemb.open(path, "w").close()
    assert (outside / "thesis.txt").read_text() == "mine"


def test_mode_w_replaces_a_store_whose_metadata_are_damaged(path):
    make(path, "a")
    (path / ".shardemb" / "manifest.json").write_text("{")
    with shardemb.open(path, "w") as store:
        assert list(store) == []


FOREIGN = {
    "files": lambda path: (path.mkdir(), (path / "thesis.txt").write_text("mine")),
    "folders": lambda path: (path / "photos").mkdir(parents=True),
    "a hidden file": lambda path: (path.mkdir(), (path / ".hidden").write_text("mine")),
    "an empty zarr array": lambda path: zarr.create_array(path, shape=(10,), chunks=(5,), dtype="f4"),
    "a zarr array": lambda path: zarr.save_array(str(path), np.arange(3)),
    "an empty zarr group": lambda path: zarr.create_group(path, attributes={"mine": 1}),
    "a zarr group": lambda path: zarr.create_group(path).create_array("x", shape=(3,), dtype="f4"),
    "an old zarr group": lambda path: zarr.create_group(path, zarr_format=2),
}


@pytest.mark.parametrize("mode", ["r", "r+", "a", "w", "w-"])
@pytest.mark.parametrize("there", FOREIGN)
def test_a_folder_that_is_no_store_is_refused_and_left_as_it_was(path, mode, there):
    FOREIGN[there](path)
    before = content(path), sorted(path.iterdir())
    with pytest.raises(StoreNotFoundError, match=r"store\.zarr is a folder but not a shardemb store.*choose"):
        shardemb.open(path, mode)
    assert (content(path), sorted(path.iterdir())) == before


@pytest.mark.parametrize("mode", ["r", "r+", "a", "w", "w-"])
def test_a_file_is_refused(path, mode):
    path.write_text("mine")
    with pytest.raises(StoreNotFoundError, match="is a file; a store is a folder"):
        shardemb.open(path, mode)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "x"}, ValueError, "mode must be one of 'r', 'r\\+', 'a', 'w', 'w-', got 'x'"),
        ({"mode": None}, ValueError, "mode must be"),
        ({"threads": 0}, ValueError, "threads must be between 1 and"),
        ({"threads": 2.0}, TypeError, "threads must be an integer"),
        ({"threads": True}, TypeError, "threads must be an integer"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be between 0 and"),
        ({"memory_budget": "1 GB"}, TypeError, "memory_budget must be an integer"),
        ({"log_bytes": 0}, ValueError, "log_bytes must be between 1 and"),
        ({"log_bytes": 1.5}, TypeError, "log_bytes must be an integer"),
    ],
)
def test_options_are_checked_before_anything_is_created(path, options, error, message):
    with pytest.raises(error, match=message):
        shardemb.open(path, **options)
    assert not path.exists()


def test_valid_options(path):
    with shardemb.open(str(path), threads=np.int64(3), memory_budget=0, log_bytes=1) as store:
        assert len(store) == 0
    with shardemb.open(os.fspath(path), mode="r", threads=1024, memory_budget=2**50):
        pass


def test_a_relative_path_stays_what_it_was_when_the_process_moves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with shardemb.open("store.zarr") as store:
        store.create_table("t", num_embeddings=10, embedding_dim=2)
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.commit()
    assert shardemb_names(tmp_path / "store.zarr") == ["t"]


def shardemb_names(path):
    with shardemb.open(path, "r") as store:
        return list(store)


# ---- one writer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r+", "a", "w"])
def test_a_second_writer_in_this_process_is_refused(path, mode):
    make(path, "a")
    with shardemb.open(path) as store:
        before = content(path)
        with pytest.raises(
            StoreLockedError, match=rf"being written by process {os.getpid()} \(this one\); close it"
        ):
            shardemb.open(path, mode)
        assert content(path) == before
        store["a"].write([2], np.ones((1, 4)))
        store.commit()
    shardemb.open(path, mode).close()


@pytest.mark.parametrize("mode", ["r+", "a", "w"])
@pytest.mark.parametrize("refreshed", [False, True])
def test_a_reader_does_not_keep_a_writer_waiting(path, mode, refreshed):
    make(path, "a")
    with shardemb.open(path, "r") as reader:
        if refreshed:
            reader.refresh()
        assert reader["a"].lookup(2).tolist() == [0.5] * 4
        with shardemb.open(path, mode) as writer:
            with pytest.raises(StaleReaderError, match="refresh"):
                reader["a"].lookup(2)
            if mode == "w":
                with pytest.raises(StaleReaderError, match="another store is at"):
                    reader.refresh()
                return
            reader.refresh()
            assert list(reader) == ["a"]
            writer.create_table("b", num_embeddings=10, embedding_dim=2)
            writer.commit()
            reader.refresh()
            assert "b" in reader
            with shardemb.open(path, "r") as another:
                assert "b" in another
        assert reader["b"].lookup(1).tolist() == [0, 0]


def test_a_reader_next_to_a_writer_sees_only_commits(path):
    make(path, "a", "b")
    with shardemb.open(path) as writer:
        writer["a"].write([5], np.full((1, 4), 9.0))
        writer.drop_table("b")
        writer.create_table("c", num_embeddings=10, embedding_dim=2)
        with shardemb.open(path, "r") as reader:
            assert list(reader) == ["a", "b"]
            assert reader["a"].lookup(5).tolist() == [0.5] * 4
        writer.commit(step=8)
        with shardemb.open(path, "r") as reader:
            assert list(reader) == ["a", "c"]
            assert reader["a"].lookup(5).tolist() == [9] * 4
            assert reader.last_commit.step == 8


def test_a_reader_keeps_working_while_the_writer_drops_and_renames(path):
    make(path, "a", "b")
    with shardemb.open(path) as writer, shardemb.open(path, "r") as reader:
        writer.drop_table("a")
        writer.rename_table("b", "a")
        writer.commit()
        assert reader["a"].lookup(1).tolist() == [0] * 4
        assert reader["b"].lookup(1).tolist() == [1] * 4
        assert list(reader) == ["a", "b"]


def test_a_reader_that_opens_while_a_commit_moves_folders_sees_one_commit(path, monkeypatch):
    make(path, "a", "b")
    with shardemb.open(path) as writer:

        def exchange():
            for source, target in [("a", "c"), ("b", "a"), ("c", "b")]:
                writer.rename_table(source, target)
            writer.commit(step=writer.last_commit.step + 1)

        for number in range(100):
            left = [number]

            def at_last(name, left=left):
                real = getattr(files, name)

                def call(*arguments, **options):
                    left[0] -= 1
                    if left[0] == -1:
                        exchange()
                    return real(*arguments, **options)

                return call

            with monkeypatch.context() as patch:
                for name in ("read", "size", "opened"):
                    patch.setattr(files, name, at_last(name))
                reader = shardemb.open(path, "r")
            with reader:
                found = {name: table.lookup(1)[0] for name, table in reader.items()}
                moved = reader.last_commit.step % 2 == 0  # step 7 was the first
                assert found == ({"b": 0, "a": 1} if moved else {"a": 0, "b": 1}), number
                assert reader.verify() == []
            if left[0] >= 0:
                assert number > 10  # an opening makes at least that many calls
                return


def test_a_reader_changes_no_file(path):
    make(path, "a")
    before = content(path)
    with shardemb.open(path, "r") as reader:
        reader["a"].lookup(range(100))
        assert reader.verify() == []
    assert content(path) == before


def test_a_copy_on_a_read_only_file_system_can_be_read(path, monkeypatch):
    make(path, "a")

    def refuse(*arguments, **options):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr(files, "lock", refuse)
    with shardemb.open(path, "r") as reader:
        assert reader["a"].lookup(1).tolist() == [0] * 4
    (path / ".shardemb" / "lock").unlink()
    monkeypatch.undo()
    with shardemb.open(path, "r") as reader:
        assert list(reader) == ["a"]


def test_an_opening_that_fails_leaves_nothing_open(path):
    make(path, "a")
    (path / "a" / "rows" / "c.0.0").write_bytes(b"short")
    for mode in ("r", "r+", "a", "r"):
        with pytest.raises(FormatError):
            shardemb.open(path, mode)
        gc.collect()  # errors in __del__ become warnings, which raise here
    with shardemb.open(path, "w"):
        pass


PROGRAM = """
    import sys
    import numpy as np
    import shardemb

    def say(word):
        print(word, flush=True)
        sys.stdin.readline()

    store = shardemb.open(sys.argv[1])
"""


@contextlib.contextmanager
def another_process(path, program):
    """Run a program that has opened the store for writing. Each line sent to it makes it continue by one step."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM) + textwrap.dedent(program), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_writer_in_another_process_and_its_death(path):
    make(path, "a")
    program = """
        store["a"].write([1], np.full((1, 4), 5.0))
        store.commit(step=8)
        store["a"].write([1], np.full((1, 4), 6.0))
        store.create_table("b", num_embeddings=10, embedding_dim=2)
        say("ready")
    """
    with another_process(path, program) as writer:
        assert writer.stdout.readline() == "ready\n"
        with pytest.raises(StoreLockedError, match=rf"being written by process {writer.pid}; close it there"):
            shardemb.open(path)
        with shardemb.open(path, "r") as reader:
            assert reader["a"].lookup(1).tolist() == [5] * 4
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        with shardemb.open(path) as store:
            assert list(store) == ["a"]
            assert store["a"].lookup(1).tolist() == [5] * 4
            assert store.last_commit.step == 8
            assert not list((path / ".shardemb" / "tables").glob("*"))


def test_a_store_killed_before_its_first_commit_opens_empty(path):
    program = """
        table = store.create_table("a", num_embeddings=1000, embedding_dim=16, initializer=np.ones((1000, 16)))
        table.write([1], np.full((1, 16), 5.0))
        say("ready")
    """
    with another_process(path, program) as writer:
        assert writer.stdout.readline() == "ready\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    with shardemb.open(path, "r") as store:
        assert (list(store), store.last_commit) == ([], None)
    with shardemb.open(path) as store:
        assert (list(store), store.last_commit, store.has_changes) == ([], None, False)
        store.create_table("a", num_embeddings=10, embedding_dim=2)
        store.commit()
    assert sorted(os.listdir(path)) == [".shardemb", "a", "zarr.json"]
    assert not list((path / ".shardemb" / "tables").glob("*"))


# ---- forks ----------------------------------------------------------------------------------------------------


def trained(store):
    table = store.create_table(
        "t", num_embeddings=60_000, embedding_dim=64, optimizer=SGD(lr=1.0), initializer=Normal()
    )
    table.update(np.arange(0, 60_000, 7), np.ones((8572, 64), np.float32))
    store.commit()
    table.update([1, 2], np.ones((2, 64)))
    return table


def test_a_fork_reads_small_and_large_batches(store, in_fork):
    table = trained(store)
    # Enough rows for several tasks. The fork does not have the threads that run them.
    everything = np.arange(60_000)
    expected = table.lookup(everything)
    assert in_fork(lambda: np.array_equal(table.lookup(everything), expected)) is True
    assert in_fork(lambda: np.array_equal(store.lookup({"t": [1, 2]})["t"], expected[1:3])) is True
    assert in_fork(lambda: len(table.to_arrow_batches(rows=(0, 10)).read_all())) == 10


def test_a_fork_cannot_change_the_store_and_its_parent_notices_nothing(store, path, in_fork):
    table = trained(store)
    everything = np.arange(60_000)
    expected = table.lookup(everything)
    changes = {
        "update": lambda: table.update([1, 2], np.ones((2, 64))),
        "write": lambda: table.write([1, 2], np.ones((2, 64))),
        "prefetch": lambda: table.prefetch([1], for_update=True),
        "set_optimizer": lambda: table.set_optimizer(SGD()),
        "commit": store.commit,
        "rollback": store.rollback,
        "checkpoint": store.checkpoint,
        "create_table": lambda: store.create_table("u", num_embeddings=1, embedding_dim=1),
        "drop_table": lambda: store.drop_table("t"),
        "rename_table": lambda: store.rename_table("t", "u"),
    }
    for name, change in changes.items():
        error = in_fork(change)
        assert isinstance(error, ReadOnlyError), (name, error)
        assert f"belongs to process {os.getpid()}, and this is a fork of it" in str(error), name
    before = content(path)
    assert in_fork(lambda: (store.close(), "closed")[1]) == "closed"
    assert in_fork(lambda: (store.__exit__(None, None, None), "closed")[1]) == "closed"
    assert content(path) == before
    with pytest.raises(StoreLockedError):
        shardemb.open(path)  # the parent still holds the lock
    assert isinstance(in_fork(lambda: shardemb.open(path)), StoreLockedError)
    assert_same_bits(table.lookup(everything), expected)
    assert store.has_changes
    store.commit()
    assert (table.step, store.last_commit.id) == (2, 2)


def test_a_fork_sees_the_rows_as_they_were(store, in_fork):
    table = trained(store)
    reader, writer = os.pipe()

    def child():
        os.close(writer)
        os.read(reader, 1)  # until the parent has updated the table
        return table.lookup([1, 2]).tobytes()

    def parent():
        table.update([1, 2], np.ones((2, 64)))
        os.write(writer, b"x")

    expected = table.lookup([1, 2]).tobytes()
    timer = threading.Timer(0.2, parent)
    timer.start()
    assert in_fork(child) == expected
    timer.join()
    assert table.lookup([1, 2]).tobytes() != expected
    os.close(reader)
    os.close(writer)


# ---- killed at any moment -------------------------------------------------------------------------------------

# Calls that change files: a kill at any other moment looks like one at these. (Syncs do not matter: the page cache
# survives a kill.)
CALLS = ["make_directory", "create_sparse", "write", "rename", "remove", "remove_tree", "overwrite_text"]


def die_at(number, operation):
    """Run an operation in this process, which dies before its `number`-th such call; a tree is half deleted then."""
    left = [number]

    def dying(name, real):
        def call(*arguments, **options):
            if left[0] == 0:
                if name == "remove_tree":
                    for file in sorted(arguments[0].rglob("*"))[::2]:
                        with contextlib.suppress(OSError):
                            file.unlink()
                os._exit(0)
            left[0] -= 1
            return real(*arguments, **options)

        return call

    for name in CALLS:
        setattr(files, name, dying(name, getattr(files, name)))
    operation()
    return "survived"


def killed_everywhere(in_fork, template, path, operation, moments=slice(None)):
    """Kill an operation at possible moments, each time on a new copy of `template` at `path`; yield after each."""
    for number in range(200)[moments]:
        shutil.rmtree(path, ignore_errors=True)
        if template is not None:
            shutil.copytree(template, path, symlinks=True)
        survived = in_fork(die_at, number, operation)
        assert survived in (None, "survived"), survived
        yield number
        if survived:
            assert number > 5  # the calls are counted
            return
    raise AssertionError("never done")


def sound(path, *allowed):
    """Assert that a store opens, for reading and for writing, with an allowed set of tables and nothing else."""
    with shardemb.open(path, "r") as reader:
        found = [(name, table.lookup([0, 1])[:, 0].tolist()) for name, table in reader.items()]
    assert found in allowed
    with shardemb.open(path) as store:
        again = [(name, table.lookup([0, 1])[:, 0].tolist()) for name, table in store.items()]
        assert again == found
        assert store.verify() == []
        assert sorted(os.listdir(path)) == sorted([".shardemb", "zarr.json", *(name for name, _ in found)])
        assert not list((path / ".shardemb" / "tables").glob("*"))
        store.create_table("later", num_embeddings=10, embedding_dim=2)
        store.commit()
    with shardemb.open(path, "r") as reader:
        assert list(reader) == [*(name for name, _ in found), "later"]


@pytest.mark.parametrize(
    ("mode", "moments"), [("a", slice(0, None, 2)), ("w", slice(1, None, 2)), ("w-", slice(1, None, 2))]
)
def test_killed_while_a_store_is_created(path, in_fork, mode, moments):
    """The modes do the same where there is nothing yet."""
    for number in killed_everywhere(in_fork, None, path, lambda: shardemb.open(path, mode).close(), moments):
        if number % 2:
            sound_or_nothing(path)
        shardemb.open(path, "a" if number % 3 else "w").close()
        sound(path, [])


def sound_or_nothing(path):
    try:
        shardemb.open(path, "r").close()
    except StoreNotFoundError:
        return


def test_killed_while_mode_w_deletes(path, tmp_path, in_fork):
    make(tmp_path / "template", "a", "b")
    before = [("a", [0.5, 0]), ("b", [0.5, 1])]
    for number in killed_everywhere(
        in_fork, tmp_path / "template", path, lambda: shardemb.open(path, "w").close()
    ):
        if number % 2:
            shardemb.open(path, "w").close()
            sound(path, [])
        else:
            shardemb.open(path, "a").close()
            sound(path, before, [])


CHANGES = {
    "create": (["a"], lambda store: new(store, "b", 9), [("a", [0.5, 0]), ("b", [9, 9])]),
    "drop": (["a", "b"], lambda store: store.drop_table("a"), [("b", [0.5, 1])]),
    "rename": (["a"], lambda store: store.rename_table("a", "b"), [("b", [0.5, 0])]),
    "exchange": (
        ["a", "b"],
        lambda store: (
            store.rename_table("a", "c"),
            store.rename_table("b", "a"),
            store.rename_table("c", "b"),
        ),
        [("b", [0.5, 0]), ("a", [0.5, 1])],
    ),
    "drop and create": (["a"], lambda store: (store.drop_table("a"), new(store, "a", 9)), [("a", [9, 9])]),
    "drop and rename": (
        ["a", "b"],
        lambda store: (store.drop_table("a"), store.rename_table("b", "a")),
        [("a", [0.5, 1])],
    ),
    "all": (
        ["a", "b", "c"],
        lambda store: (
            store.rename_table("a", "x"),
            store.drop_table("b"),
            store.rename_table("c", "b"),
            new(store, "a", 9),
            store.rename_table("x", "c"),
        ),
        [("c", [0.5, 0]), ("b", [0.5, 2]), ("a", [9, 9])],
    ),
}


def new(store, name, value):
    store.create_table(name, num_embeddings=100, embedding_dim=4, initializer=np.full((100, 4), float(value)))


@pytest.mark.parametrize(
    ("change", "moments"),
    [
        *((change, slice(number % 3, None, 3)) for number, change in enumerate(CHANGES)),
        *(pytest.param(change, slice(None), marks=pytest.mark.soak) for change in CHANGES),
    ],
)
def test_killed_while_a_commit_changes_the_set_of_tables(path, tmp_path, in_fork, change, moments):
    """The changes have most of their moments in common, so each of them takes others."""
    names, operation, after = CHANGES[change]
    make(tmp_path / "template", *names)
    before = [(name, [0.5, number]) for number, name in enumerate(names)]

    def commit():
        store = shardemb.open(path)
        operation(store)
        store.commit(step=8)
        close_quietly(store)

    for _ in killed_everywhere(in_fork, tmp_path / "template", path, commit, moments):
        sound(path, before, after)
    assert shardemb_names(path) == [*(name for name, _ in after), "later"]


def test_killed_while_the_store_after_a_kill_is_opened(path, tmp_path, in_fork):
    # The opening that recovers may be killed too.
    make(tmp_path / "made", "a", "b")

    def commit():
        store = shardemb.open(tmp_path / "made")
        store.drop_table("a")
        store.rename_table("b", "a")
        files.rename = lambda source, target: (
            os._exit(0) if "manifest" not in str(source) else source.rename(target)
        )
        store.commit()

    assert in_fork(commit) is None
    for _ in killed_everywhere(in_fork, tmp_path / "made", path, lambda: close_quietly(shardemb.open(path))):
        sound(path, [("a", [0.5, 1])])


def test_a_killed_commit_is_there_as_a_whole_or_not_at_all(path, tmp_path, in_fork):
    template = tmp_path / "template"
    with shardemb.open(template) as store:
        table = store.create_table(
            "t",
            num_embeddings=1000,
            embedding_dim=4,
            rows_per_shard=256,
            optimizer=Adam(),
            initializer=Constant(2.0),
        )
        table.write(range(0, 1000, 2), np.full((500, 4), 3.0))
        store.commit(step=1)

    def commit():
        store = shardemb.open(path)
        store["t"].write(range(0, 1000, 50), np.full((20, 4), 4.0))
        store.commit(step=2)
        close_quietly(store)

    everything = np.arange(1000)
    old = np.where(everything % 2 == 0, 3.0, 2.0)
    new = np.where(everything % 50 == 0, 4.0, old)
    steps = []
    for _ in killed_everywhere(in_fork, template, path, commit):
        with shardemb.open(path) as store:
            rows = store["t"].lookup(everything)
            steps.append(store.last_commit.step)
        assert (rows == (old if steps[-1] == 1 else new)[:, None]).all()
    assert steps == sorted(steps)
    assert set(steps) == {1, 2}


# ---- folders that others made -----------------------------------------------------------------------------------


FOLDERS = ["vocabularies", "tables", "log", "rebuilt", "", "a", "a/rows", "a/checks"]


def kept(path):
    """What must not change, whatever is opened: files with their content and their number of names."""
    return {each: (each.read_bytes(), each.stat().st_nlink) for each in path.rglob("*") if each.is_file()}


@pytest.mark.parametrize("mode", ["r", "r+", "a", "w"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_is_a_link_is_named_and_what_it_leads_to_stays(path, tmp_path, folder, mode):
    make(path, "a")
    place, outside = path / ("" if folder.startswith("a") else ".shardemb") / folder, tmp_path / "outside"
    if place.exists():
        shutil.move(place, outside)
    else:
        outside.mkdir()
    (outside / "00000001.log").write_text("mine")
    (outside / "thesis").mkdir()
    (outside / "thesis" / "zarr.json").write_text("mine")
    place.symlink_to(outside)
    before = kept(outside)
    if mode == "w" and folder.startswith("a"):
        shardemb.open(path, mode).close()  # it deletes the link, or nothing
    elif mode == "r" and folder in (
        "vocabularies",
        "tables",
        "rebuilt",
        "log",
    ):  # it looks there only in need
        with contextlib.suppress(FormatError):
            shardemb.open(path, mode).close()
    else:
        with pytest.raises((FormatError, StoreNotFoundError), match=r"symbolic link|not a shardemb store"):
            shardemb.open(path, mode)
    assert kept(outside) == before


@pytest.mark.parametrize("kind", ["symbolic", "hard"])
@pytest.mark.parametrize("name", ["lock", "epoch", "manifest.json", "manifest.json.tmp", "lock.tmp"])
@pytest.mark.parametrize("mode", ["r", "r+", "a", "w"])
def test_a_file_that_is_a_link_is_not_written(path, tmp_path, name, kind, mode):
    make(path, "a")
    place, victim = path / ".shardemb" / name, tmp_path / "victim"
    if place.exists():
        shutil.move(place, victim)
    else:
        victim.write_text("mine")
    place.symlink_to(victim) if kind == "symbolic" else os.link(victim, place)
    before = victim.read_bytes()
    try:
        with shardemb.open(path, mode) as store:
            if mode != "r":
                store.create_table("new", num_embeddings=10, embedding_dim=2)
                store.commit()
    except (FormatError, StoreNotFoundError) as error:
        assert name in str(error) or "store" in str(error)
        assert kind == "symbolic"
    assert victim.read_bytes() == before


def test_a_shard_that_is_a_link_is_named(path, tmp_path):
    make(path, "a")
    shard = next(
        each for each in (path / "a" / "rows").rglob("*") if each.is_file() and "json" not in each.name
    )
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    for mode in ("r", "a"):
        with pytest.raises(FormatError, match="missing|symbolic link"):
            shardemb.open(path, mode)


@pytest.mark.parametrize("mode", ["r", "a", "w"])
@pytest.mark.parametrize(
    "file",
    [
        ".shardemb/manifest.json",
        ".shardemb/lock",
        ".shardemb/epoch",
        "zarr.json",
        "a/zarr.json",
        "a/rows/zarr.json",
        "a/rows/c.0.0",
        ".shardemb/log/00000007.log",
    ],
)
def test_a_pipe_in_the_place_of_a_file_does_not_keep_anybody_waiting(path, file, mode):
    make(path, "a")
    names = {each.name for each in (path / "a" / "rows").iterdir()}
    if file == "a/rows/c.0.0":
        file = f"a/rows/{next(name for name in sorted(names) if 'json' not in name)}"
    place = path / file
    place.unlink(missing_ok=True)
    os.mkfifo(place)
    with contextlib.suppress(FormatError, StoreNotFoundError, StoreExistsError):
        shardemb.open(path, mode).close()


def test_a_store_may_be_opened_through_a_link_to_it(path, tmp_path):
    make(path, "a")
    (tmp_path / "link").symlink_to(path)
    with shardemb.open(tmp_path / "link") as store:
        assert store.path == path
        with pytest.raises(StoreLockedError):
            shardemb.open(path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StoreNotFoundError, match="loop"):
        shardemb.open(tmp_path / "loop")


# ---- folders that share their files with others ------------------------------------------------------------------


@pytest.mark.parametrize("which", ["original", "copy"])
def test_a_copy_of_links_does_not_change_with_the_original(path, tmp_path, which):
    copy = tmp_path / "copy"
    with shardemb.open(path) as store:
        table = store.create_table(
            "a", num_embeddings=300, embedding_dim=4, rows_per_shard=64, initializer=Constant(0.5)
        )
        table.write([1, 299], ONES)
        words = store.create_vocabulary("w", key_type="int64")
        words.add(np.arange(100))
        store.commit(step=7)
    subprocess.run(["cp", "-al", path, copy], check=True)
    changed, other = (path, copy) if which == "original" else (copy, path)
    before = content(other)
    with shardemb.open(other, "r") as reader, shardemb.open(changed) as store:
        store["a"].write([1, 5, 100], np.full((3, 4), 9, np.float32))
        store.vocabularies["w"].add(np.arange(200))
        store.commit(step=8)
        store.checkpoint()
        assert store.verify() == []
        assert reader["a"].lookup([1, 5, 299])[:, 0].tolist() == [1, 0.5, 1]
        shardemb.open(other).close()  # the lock is its own, too
    with shardemb.open(other) as store:
        assert store["a"].lookup([1, 5, 299])[:, 0].tolist() == [1, 0.5, 1]
        assert len(store.vocabularies["w"]) == 100
        assert store.verify() == []
    assert before.keys() <= content(other).keys() | {".shardemb/epoch"}
    with shardemb.open(changed, "r") as store:
        assert store["a"].lookup([1, 5, 299])[:, 0].tolist() == [9, 9, 1]
        assert store.verify() == []


def test_files_that_a_resize_has_given_two_names_are_not_copied(path, tmp_path, in_fork):
    def die():
        store = shardemb.open(path)
        store["a"].resize(500)
        os._exit(0)

    with shardemb.open(path) as store:
        store.create_table("a", num_embeddings=300, embedding_dim=4, rows_per_shard=64)
        store.commit()
    shard = next(each for each in sorted((path / "a" / "rows").iterdir()) if "json" not in each.name)
    number = shard.stat().st_ino
    in_fork(die)
    assert shard.stat().st_nlink == 2
    shardemb.open(path).close()
    assert (shard.stat().st_nlink, shard.stat().st_ino) == (1, number)


# ---- a folder that changes while it is open ----------------------------------------------------------------------


def restored(path, backup):
    shutil.rmtree(path)
    shutil.copytree(backup, path)


def another_store(path, backup):
    shutil.rmtree(path)
    make(path, "other")


def manifest_restored(path, backup):
    shutil.copy(backup / ".shardemb" / "manifest.json", path / ".shardemb" / "new")
    (path / ".shardemb" / "new").rename(path / ".shardemb" / "manifest.json")


REPLACED = {
    "restored": restored,
    "another store": another_store,
    "removed": lambda path, backup: shutil.rmtree(path),
    "renamed": lambda path, backup: path.rename(path.with_name("elsewhere")),
    "manifest restored": manifest_restored,
}
WRITES = {
    "commit": lambda store: store.commit(step=9),
    "checkpoint": lambda store: store.checkpoint(),
    "create": lambda store: store.create_table("new", num_embeddings=10, embedding_dim=2) and store.commit(),
    "resize": lambda store: store["a"].resize(500) or store.commit(),
    "reshard": lambda store: store.rollback() or store.reshard("a", rows_per_shard=64),
    "drop": lambda store: store.drop_table("a") or store.commit(),
    "keys": lambda store: store.vocabularies["w"].add(np.arange(1000)) is None or store.commit(),
    "close": lambda store: None,
}


@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("call", WRITES)
def test_a_writer_whose_folder_was_replaced_leaves_alone_what_is_there_now(path, tmp_path, what, call):
    backup = tmp_path / "backup"
    with shardemb.open(path) as store:
        table = store.create_table("a", num_embeddings=300, embedding_dim=4, rows_per_shard=64)
        table.write([1], ONES[:1])
        if call == "keys":  # its files are sparse, and large to copy and to compare
            store.create_vocabulary("w", key_type="int64")
        store.commit(step=1)
    shutil.copytree(path, backup)
    store = shardemb.open(path)
    store["a"].write([1], np.full((1, 4), 2, np.float32))
    store.commit(step=2)
    store["a"].write([1], np.full((1, 4), 3, np.float32))
    REPLACED[what](path, backup)
    there = path.with_name("elsewhere") if what == "renamed" else path
    before = content(there) if there.exists() else {}
    if call != "close":
        with pytest.raises(PoisonedError, match="moved, removed or replaced|manifest was replaced"):
            WRITES[call](store)
        with pytest.raises(PoisonedError):
            store.commit()
        store.close()
    else:
        with pytest.warns(RuntimeWarning) as warned:
            store.close()
        assert any("was" in str(each.message) and "replaced" in str(each.message) for each in warned)
        assert not any("safe" in str(each.message) for each in warned)
    after = content(there) if there.exists() else {}
    if what == "manifest restored":  # all else is its own, also tables that wait for a commit
        after = {name: data for name, data in after.items() if name in before}
    assert after == before
    if what == "restored":
        with shardemb.open(path) as store:
            assert store.last_commit.step == 1
            assert store["a"].lookup(1).tolist() == [1] * 4
            assert store.verify() == []
    if what == "renamed":
        with shardemb.open(there) as store:
            assert store.last_commit.step == 2
            assert store["a"].lookup(1).tolist() == [2] * 4


@pytest.mark.parametrize("what", REPLACED)
def test_closing_with_nothing_to_fold_leaves_alone_what_is_there_now(path, tmp_path, what):
    backup = tmp_path / "backup"
    make(path, "a")
    shutil.copytree(path, backup)
    store = shardemb.open(path)
    store["a"].write([1], ONES[:1])
    store.commit(step=2)
    store.checkpoint()
    REPLACED[what](path, backup)
    there = path.with_name("elsewhere") if what == "renamed" else path
    before = content(there) if there.exists() else {}
    with pytest.warns(RuntimeWarning, match="replaced"):
        store.close()
    assert (content(there) if there.exists() else {}) == before


def test_a_fold_does_not_write_into_a_folder_that_was_put_in_its_place(path, tmp_path, monkeypatch):
    make(path, "a")
    backup = tmp_path / "backup"
    shutil.copytree(path, backup)
    store = shardemb.open(path, log_bytes=1)
    restored(path, backup)
    before = content(path)
    store["a"].write([1], ONES[:1])
    with pytest.raises(PoisonedError):
        store.commit()
    store.close()
    assert content(path) == before


# ---- threads that fork, and that cannot be started ---------------------------------------------------------------


def run_script(text, *arguments, **options):
    """Run a program in a process of its own; return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_threads_that_fork_at_once_leave_lock_and_log_with_the_parent(path):
    printed = run_script(
        """
        import os, sys, threading
        import numpy as np
        import shardemb
        sys.setswitchinterval(1e-6)  # so that threads take turns wherever they can
        store = shardemb.open(sys.argv[1], memory_budget=0, log_bytes=1)
        table = store.create_table("a", num_embeddings=1000, embedding_dim=4, optimizer=shardemb.optim.SGD(lr=1.0))
        words = store.create_vocabulary("w", key_type="int64")
        keyed = store.create_table("k", vocabulary="w", embedding_dim=4)
        words.add(np.arange(100))
        table.write(np.arange(1000), np.ones((1000, 4), np.float32))
        store.commit()
        wrong = []

        def fork():
            for _ in range(12):
                child = os.fork()
                if child == 0:
                    code = 1
                    try:
                        held = {os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")
                                if os.path.exists(f"/proc/self/fd/{n}")}
                        assert not any(name.endswith(("/lock", ".log")) for name in held), held
                        assert (table.lookup(np.arange(1000)) == 1).all()
                        keyed.lookup(np.arange(100), missing="zeros")
                        try:
                            table.write([1], np.zeros((1, 4), np.float32))
                        except shardemb.ReadOnlyError:
                            code = 0
                    finally:
                        os._exit(code)
                if os.waitpid(child, 0)[1]:
                    wrong.append(child)

        def work():
            turn = 0
            while not done.is_set():
                turn += 1
                table.lookup(np.arange(50))
                words.add(np.arange(turn * 3, turn * 3 + 3))
                words.remove(np.arange(turn * 3, turn * 3 + 1))

        done = threading.Event()
        worker = threading.Thread(target=work)
        worker.start()
        threads = [threading.Thread(target=fork) for _ in range(3)]
        for each in threads: each.start()
        for each in threads: each.join()
        done.set()
        worker.join()
        table.write([1], np.zeros((1, 4), np.float32))
        store.commit()
        store.close()
        print("wrong", wrong)
        """,
        path,
    )
    assert printed == "wrong []\n"
    with shardemb.open(path) as store:
        assert store["a"].lookup([0, 1])[:, 0].tolist() == [1, 0]


def test_a_child_reads_rows_that_its_parent_had_spilled(path, in_fork):
    with shardemb.open(path, memory_budget=0) as store:
        table = store.create_table("a", num_embeddings=1000, embedding_dim=4)
        table.write(np.arange(500), np.ones((500, 4), np.float32))
        table.write([900], np.ones((1, 4), np.float32))

        def look():
            return (table.lookup(np.arange(500)) == 1).all()

        assert in_fork(look)
        assert (table.lookup(np.arange(500)) == 1).all()
        store.commit()
    with shardemb.open(path) as store:
        assert (store["a"].lookup(np.arange(500)) == 1).all()


def test_a_child_can_compile_what_another_thread_was_compiling(tmp_path):
    printed = run_script(
        """
        import os, sys, threading, time
        import numpy as np
        import shardemb
        from shardemb.initializers import Uniform
        store = shardemb.open(sys.argv[1])
        table = store.create_table("a", num_embeddings=100, embedding_dim=4, initializer=Uniform(-1, 1))
        thread = threading.Thread(target=table.lookup, args=([1],))
        thread.start()
        time.sleep(0.3)
        child = os.fork()
        if child == 0:
            table.lookup([1])
            os._exit(0)
        print(os.waitpid(child, 0)[1])
        thread.join()
        store.close()
        """,
        tmp_path / "store",
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert printed == "0\n"


def test_handlers_of_exit_may_use_a_store(path):
    run_script(
        """
        import atexit, sys
        import numpy as np
        import shardemb
        store = shardemb.open(sys.argv[1])
        table = store.create_table(
            "a", num_embeddings=300_000, embedding_dim=16, optimizer=shardemb.optim.SGD(lr=1.0), rows_per_shard=1024
        )
        ids = np.arange(200_000)
        table.prefetch([1])

        @atexit.register
        def save():
            assert (table.lookup(ids) == 0).all()
            table.prefetch(ids, for_update=True)
            table.update(ids, -np.ones((ids.size, 16), np.float32))
            store.create_vocabulary("w", key_type="int64").add(np.arange(50_000))
            store.commit(step=3)
            table.export_parquet(sys.argv[1] + ".parquet")
            store.close()
        """,
        path,
    )
    with shardemb.open(path, "r") as store:
        assert store.last_commit.step == 3
        assert (store["a"].lookup(np.arange(200_000)) == 1).all()
        assert len(store.vocabularies["w"]) == 50_000


def test_a_forgotten_store_is_released_though_its_warning_is_an_error(path):
    run_script(
        """
        import gc, sys
        import numpy as np
        import shardemb
        sys.unraisablehook = lambda unraisable: None
        store = shardemb.open(sys.argv[1])
        store.create_table("a", num_embeddings=10, embedding_dim=2)
        del store
        gc.collect()
        shardemb.open(sys.argv[1]).close()
        """,
        path,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )


def test_a_store_that_is_forgotten_during_a_fold_is_released_after_it(path, monkeypatch):
    write, go_on = fold.write, threading.Event()
    store = shardemb.open(path)
    store.create_table("a", num_embeddings=100, embedding_dim=4)
    store.commit()
    monkeypatch.setattr(fold, "write", lambda *arguments: (go_on.wait(20), write(*arguments)))
    store["a"].write([1], ONES[:1])
    store.commit(step=5)
    inside.journal(store)._start()
    with pytest.warns(ResourceWarning, match="was not closed"):
        del store
        gc.collect()
    with pytest.raises(StoreLockedError):
        shardemb.open(path)
    go_on.set()
    for _ in range(1000):
        with contextlib.suppress(StoreLockedError):
            store = shardemb.open(path)
            break
        time.sleep(0.01)
    with store:
        assert store["a"].lookup(1).tolist() == [1] * 4


@pytest.mark.parametrize("nbytes", [None, 0, 7, 8, 100, 4096])
def test_a_reader_notices_a_writer_whatever_is_left_of_the_epoch(path, nbytes):
    make(path, "a")
    epoch = path / ".shardemb" / "epoch"
    data = epoch.read_bytes()
    epoch.unlink()
    if nbytes is not None:
        epoch.write_bytes(data[:nbytes])
    with shardemb.open(path, "r") as reader:
        assert reader["a"].lookup(2).tolist() == [0.5] * 4
        with shardemb.open(path):
            with pytest.raises(StaleReaderError):
                reader["a"].lookup(2)
            reader.refresh()
            assert reader["a"].lookup(2).tolist() == [0.5] * 4
