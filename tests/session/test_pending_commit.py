"""Commits in the background: what they hold, what waits for them, and what happens if they fail."""

import contextlib
import errno
import os
import threading
import time

import numpy as np
import pytest
from support import inside

import shardemb
from shardemb.commits import fills, fold, log_writer
from shardemb.engine import filling
from shardemb.errors import DiskFullError, PoisonedError, ReadOnlyError
from shardemb.format import store_paths
from shardemb.format.manifest import Manifest
from shardemb.initializers import Uniform
from shardemb.optim import Adam
from shardemb.session.pending_commit import PendingCommit
from shardemb.storage import files

ROWS, DIM = 500, 4
ALL = np.arange(ROWS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.zarr"


@pytest.fixture
def store(path):
    with shardemb.open(path, threads=1) as store:
        store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
        store.commit()
        yield store
        if not inside.session(store).runtime.closed:
            with contextlib.suppress(PoisonedError):
                store.rollback()


@pytest.fixture
def gate(monkeypatch):
    """Commits wait at it before they pack their rows; it is open at the end."""
    gate, real = threading.Event(), log_writer.Log.append_images

    def append_images(self, *arguments):
        gate.wait(30)
        real(self, *arguments)

    monkeypatch.setattr(log_writer.Log, "append_images", append_images)
    yield gate
    gate.set()


def write(store, rows, value, name="t"):
    store[name].write(rows, np.full((len(rows), DIM), value, np.float32))


def values(store, name="t"):
    return store[name].lookup(np.arange(store[name].num_embeddings))[:, 0].tolist()


def committed(path):
    """Values of the first column as another program sees them."""
    with shardemb.open(path, mode="r") as reader:
        return values(reader)


def expected(**rows):
    found = [0.0] * ROWS
    for value, some in rows.items():
        for row in some:
            found[row] = float(value.removeprefix("v"))
    return found


def test_it_holds_what_was_changed_before_the_call(store, path, gate):
    write(store, range(10), 1)
    before = store.last_commit
    pending = store.commit(step=7, metadata={"at": 3}, wait=False)
    assert not pending.done()
    assert "2 of" in repr(pending)
    assert "under way" in repr(pending)
    with pytest.raises(TimeoutError):
        pending.result(0.01)
    assert store.last_commit == before
    assert store.has_changes
    write(store, range(5, 15), 2)
    gate.set()
    assert pending.result(30) == shardemb.Commit(2, 7, {"at": 3})
    assert pending.done()
    assert "durable" in repr(pending)
    assert store.last_commit == pending.result()
    assert committed(path) == expected(v1=range(10))
    assert values(store) == expected(v1=range(5), v2=range(5, 15))
    assert store["t"].stats()["changes"] == 2
    store.rollback()
    assert values(store) == expected(v1=range(10))


def test_its_metadata_are_copies(store):
    given = {"list": [1]}
    pending = store.commit(metadata=given, wait=False)
    given["list"].append(2)
    pending.result().metadata["list"].append(3)
    assert pending.result().metadata == store.last_commit.metadata == {"list": [1]}


def test_steps_and_optimizers_are_those_of_the_call(path, gate):
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, optimizer=Adam(lr=0.5))
        table.update(ALL, np.ones((ROWS, DIM), np.float32))
        pending = store.commit(wait=False)
        want = table.lookup(ALL).copy(), table.state("exp_avg", ALL).copy()
        table.update(ALL, np.ones((ROWS, DIM), np.float32))
        table.set_optimizer(Adam(lr=0.25))
        gate.set()
        pending.result()
        with shardemb.open(path, mode="r") as reader:
            assert (reader["t"].lookup(ALL) == want[0]).all()
            assert (reader["t"].state("exp_avg", ALL) == want[1]).all()
            assert reader["t"].step == 1
            assert reader["t"].optimizer == Adam(lr=0.5)
        assert store.has_changes
        store.commit()
    with shardemb.open(path) as store:
        assert store["t"].step == 2
        assert store["t"].optimizer == Adam(lr=0.25)


def test_keys_that_are_added_meanwhile_belong_to_the_next_commit(path, gate):
    with shardemb.open(path) as store:
        words = store.create_vocabulary("words", key_type="string")
        table = store.create_table("t", vocabulary="words", embedding_dim=DIM)
        table.write(["a", "b"], np.ones((2, DIM), np.float32), create=True)
        pending = store.commit(wait=False)
        table.write(["b", "c"], np.full((2, DIM), 2, np.float32), create=True)
        words.remove(["a"])
        gate.set()
        pending.result()
        with shardemb.open(path, mode="r") as reader:
            assert reader.vocabularies["words"].lookup(["a", "b", "c"]).tolist() == [0, 1, -1]
            assert reader["t"].lookup(["a", "b"]).tolist() == [[1] * DIM] * 2
        store.commit()
    with shardemb.open(path) as store:
        assert store.vocabularies["words"].lookup(["a", "b", "c"])[[0, 1]].tolist() == [-1, 1]
        assert store["t"].lookup(["b", "c"]).tolist() == [[2] * DIM] * 2


WAITING = {
    "commit": lambda store: store.commit(),
    "commit in the background": lambda store: store.commit(wait=False).result(),
    "rollback": lambda store: store.rollback(),
    "checkpoint": lambda store: store.checkpoint(),
    "create": lambda store: store.create_table("u", num_embeddings=3, embedding_dim=2),
    "create with a vocabulary": lambda store: store.create_vocabulary("v", key_type="int64"),
    "drop": lambda store: store.drop_table("t"),
    "rename": lambda store: store.rename_table("t", "u"),
    "resize": lambda store: store["t"].resize(ROWS + 100),
    "materialize": lambda store: store["drawn"].materialize(),
    "close": lambda store: store.close(),
}


@pytest.mark.parametrize("what", WAITING)
@pytest.mark.filterwarnings("ignore:.*lost")
def test_what_waits_for_it(store, path, gate, what, monkeypatch):
    end = PendingCommit.end

    def slowly(pending, problem):
        """The commit counts as ended before whoever waits for it goes on."""
        time.sleep(0.02)
        end(pending, problem)

    monkeypatch.setattr(PendingCommit, "end", slowly)
    store.create_table("drawn", num_embeddings=70, embedding_dim=2, initializer=Uniform(-1, 1))
    gate.set()
    store.commit()
    gate.clear()
    write(store, range(10), 1)
    pending = store.commit(step=5, wait=False)
    seen = []
    caller = threading.Thread(target=lambda: seen.append((WAITING[what](store), pending.done())))
    caller.start()
    time.sleep(0.05)
    assert not seen
    if what != "close":
        write(store, [20], 2)  # updates go on
    gate.set()
    caller.join(60)
    assert seen[0][1]
    assert pending.result().step == 5
    if what not in ("close", "drop", "rename", "resize"):
        assert committed(path) == (
            expected(v1=range(10), v2=[20]) if what.startswith("commit") else expected(v1=range(10))
        )


def test_copies_wait_for_it(store, tmp_path, gate):
    write(store, range(10), 1)
    store.commit(wait=False)
    threading.Timer(0.05, gate.set).start()
    store.copy(tmp_path / "copy.zarr")
    assert committed(tmp_path / "copy.zarr") == expected(v1=range(10))


def test_closing_waits_for_it(path, gate):
    with shardemb.open(path) as store:
        store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
        write(store, range(10), 1)
        pending = store.commit(wait=False)
        threading.Timer(0.05, gate.set).start()
    assert pending.done()
    assert committed(path) == expected(v1=range(10))


def test_a_store_that_nobody_holds_is_committed_all_the_same(path, gate):
    store = shardemb.open(path)
    store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
    write(store, range(10), 1)
    pending = store.commit(wait=False)
    with pytest.warns(ResourceWarning):
        del store
    gate.set()
    pending.result()
    assert committed(path) == expected(v1=range(10))


def test_a_full_disk_loses_nothing(store, path, monkeypatch, caplog):
    write(store, range(10), 1)
    real = log_writer.Log.begin

    def begin(self, nbytes):
        if threading.current_thread() is not threading.main_thread():
            raise DiskFullError(errno.ENOSPC, "the disk is full", str(path))
        real(self, nbytes)

    monkeypatch.setattr(log_writer.Log, "begin", begin)
    pending = store.commit(step=3, wait=False)
    with pytest.raises(DiskFullError):
        pending.result()
    assert pending.done()
    assert "failed" in repr(pending)
    assert "failed" in caplog.text
    assert store.last_commit.id == 1
    write(store, [1], 2)
    assert store.commit(step=4) == shardemb.Commit(2, 4, {})
    assert committed(path) == expected(v1=range(10), v2=[1])


@pytest.mark.parametrize("position", range(2))
def test_a_failure_half_way_gives_all_rows_back(store, path, monkeypatch, position):
    """Whatever part of it was packed, and whatever has changed meanwhile."""
    monkeypatch.setattr(log_writer, "STAGE_BYTES", 3 * 4096)
    write(store, range(400), 1)
    real, calls = log_writer.Log._reserve, []

    def reserve(self, nbytes):
        calls.append(nbytes)
        if len(calls) == position + 1:
            write(store, range(0, 100, 3), 2)
            raise DiskFullError(errno.ENOSPC, "the disk is full", str(path))
        return real(self, nbytes)

    with monkeypatch.context() as patch:
        patch.setattr(log_writer.Log, "_reserve", reserve)
        with pytest.raises(DiskFullError):
            store.commit(wait=False).result()
    assert len(calls) == position + 1
    want = values(store)
    assert want == expected(v1=range(400), v2=range(0, 100, 3))
    store.commit(wait=False).result()
    assert committed(path) == want


@pytest.mark.filterwarnings("ignore:.*lost")
def test_closing_after_a_failure_says_what_is_lost(path, monkeypatch):
    store = shardemb.open(path)
    store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
    store.commit()
    write(store, range(10), 1)

    def begin(self, nbytes):
        raise DiskFullError(errno.ENOSPC, "the disk is full", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(log_writer.Log, "begin", begin)
        pending = store.commit(wait=False)
        with pytest.warns(RuntimeWarning, match="lost"):
            store.close()
    with pytest.raises(DiskFullError):
        pending.result()


@pytest.mark.filterwarnings("ignore:.*cannot commit")
def test_a_failed_sync_poisons_the_store(path, monkeypatch):
    store = shardemb.open(path)
    store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
    store.commit()
    write(store, range(10), 1)
    with monkeypatch.context() as patch:

        def sync_data(descriptor, path):
            raise OSError(errno.EIO, "it failed")

        patch.setattr(files, "sync_data", sync_data)
        pending = store.commit(wait=False)
        with pytest.raises(OSError, match="it failed"):
            pending.result()
    for wait in (True, False):
        with pytest.raises(PoisonedError):
            store.commit(wait=wait)
    store.close()


def test_it_is_refused_where_nothing_can_be_committed(store, path):
    with shardemb.open(path, mode="r") as reader, pytest.raises(ReadOnlyError):
        reader.commit(wait=False)
    for bad in ({"step": -1}, {"metadata": {"a": ALL}}):
        with pytest.raises((TypeError, ValueError)):
            store.commit(wait=False, **bad)
    inside.session(store).runtime.half_done = "an update or write"
    with pytest.raises(PoisonedError, match="rollback"):
        store.commit(wait=False)
    store.rollback()


def test_an_update_that_fails_half_way_meanwhile_does_not_matter(store, path, gate):
    write(store, range(10), 1)
    pending = store.commit(wait=False)
    write(store, range(5), 2)
    inside.session(store).runtime.half_done = "an update or write"
    gate.set()
    pending.result()
    store.rollback()
    assert values(store) == committed(path) == expected(v1=range(10))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_cannot_wait_for_it(store, gate):
    write(store, range(10), 1)
    pending = store.commit(wait=False)
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                pending.result()
            except ReadOnlyError:
                code = 0 if values(store) == expected(v1=range(10)) else 2
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    gate.set()
    pending.result()


def test_without_a_thread_it_is_done_at_once(store, path, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        write(store, range(10), 1)
        assert store.commit(wait=False).done()
    assert committed(path) == expected(v1=range(10))


def test_a_full_log_is_folded_behind(path):
    with shardemb.open(path, log_bytes=1) as store:
        store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
        store.commit()
        for value in range(1, 6):
            write(store, range(value, 100), value)
            pending = store.commit(step=value, wait=False)
            write(store, range(50, 60), 10 * value)
            assert pending.result().step == value
            assert committed(path)[50:60] == [value] * 10
        store.rollback()
    assert committed(path)[:7] == [0, 1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("budget", [0, 5000, 2**30])
def test_copies_stay_within_the_memory_budget(path, budget, gate):
    """Or changes wait for the commit."""
    with shardemb.open(path, memory_budget=budget) as store:
        store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
        write(store, ALL, 1)
        pending = store.commit(wait=False)
        threading.Timer(0.1, gate.set).start()
        for start in range(0, ROWS, 50):
            write(store, range(start, start + 50), 2)
        pending.result()
        assert committed(path) == [1] * ROWS
        assert values(store) == [2] * ROWS
        store.rollback()
        assert values(store) == [1] * ROWS


def test_whatever_is_changed_meanwhile(path, monkeypatch):
    """Random histories, in which each commit is compared with what there was when it was called."""
    monkeypatch.setattr(log_writer, "STAGE_BYTES", 3 * 4096)
    rng = np.random.default_rng(1)
    with shardemb.open(path, log_bytes=200_000, memory_budget=60_000) as store:
        store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, initializer=Uniform(-1, 1, seed=1))
        store.create_table("u", num_embeddings=ROWS, embedding_dim=DIM, optimizer=Adam())
        store.commit()
        model = {name: store[name].lookup(ALL) for name in store}
        for number in range(60):
            pending, want = None, None
            for turn in range(rng.integers(1, 8)):
                rows = rng.integers(0, ROWS, rng.integers(1, 200))
                store["t"].write(rows, rng.normal(size=(rows.size, DIM)).astype(np.float32))
                store["u"].update(rows, rng.normal(size=(rows.size, DIM)).astype(np.float32))
                if turn == 2:
                    want = {name: store[name].lookup(ALL) for name in store}
                    pending = store.commit(step=number, wait=False)
            if rng.random() < 0.5:
                if pending:
                    pending.result()
                    model = want
                store.rollback()
                assert all((store[name].lookup(ALL) == model[name]).all() for name in store)
            elif pending:
                pending.result()
                model = want
                with shardemb.open(path, mode="r") as reader:
                    assert reader.last_commit.step == number
                    assert all((reader[name].lookup(ALL) == model[name]).all() for name in store)
        store.rollback()
        assert store.verify() == []
    with shardemb.open(path) as store:
        assert all((store[name].lookup(ALL) == model[name]).all() for name in store)


def test_lookups_see_whole_rows_meanwhile(path):
    """Two threads: one updates and commits in the background, one looks up."""
    with shardemb.open(path, log_bytes=100_000) as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
        store.commit()
        stop, wrong = threading.Event(), []

        def look():
            while not stop.is_set():
                found = table.lookup(ALL)
                if (found != found[:, :1]).any():
                    wrong.append(found)

        looking = threading.Thread(target=look)
        looking.start()
        for value in range(60):
            write(store, range(value % 7, ROWS, 3), value)
            store.commit(step=value, wait=False)
        stop.set()
        looking.join()
        assert not wrong
    assert committed(path)[59 % 7 :: 3] == [59] * len(range(59 % 7, ROWS, 3))


def test_commits_of_several_threads(path, monkeypatch):
    """Some wait and some do not, the log is often full, and folds run all the time."""
    real = log_writer.Log.append_images

    def slowly(self, *arguments):
        time.sleep(0.003)
        real(self, *arguments)

    monkeypatch.setattr(log_writer.Log, "append_images", slowly)
    with shardemb.open(path, log_bytes=30_000, threads=1) as store:
        names = ["a", "b", "c"]
        for name in names:
            store.create_table(name, num_embeddings=ROWS, embedding_dim=DIM, optimizer=Adam())
        store.commit()
        failed, last = [], {}

        def work(name):
            rng = np.random.default_rng(names.index(name))
            try:
                for number in range(40):
                    rows = rng.integers(0, ROWS, 100)
                    store[name].update(rows, rng.normal(size=(100, DIM)).astype(np.float32))
                    if rng.random() < 0.5:
                        store.commit(wait=bool(rng.random() < 0.3))
                    if number % 10 == 9:
                        store.checkpoint()
                last[name] = store[name].lookup(ALL)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert not failed
        store.commit()
        assert store.verify() == []
    with shardemb.open(path) as store:
        assert all((store[name].lookup(ALL) == last[name]).all() for name in names)


def test_a_table_is_not_resized_beside_a_commit_that_began_while_it_waited(path, monkeypatch, gate):
    """Resizing waits for a fold; a commit in the background that begins meanwhile comes first."""
    with shardemb.open(path) as store:
        gate.set()
        store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
        store.commit()
        write(store, range(10), 1)
        store.commit()
        gate.clear()
        real, folding, go_on = fold.write, threading.Event(), threading.Event()

        def slowly(*arguments):
            folding.set()
            go_on.wait(30)
            real(*arguments)

        monkeypatch.setattr(fold, "write", slowly)
        resizing = threading.Thread(target=store["t"].resize, args=(ROWS + 100,))
        resizing.start()
        assert folding.wait(30)
        write(store, range(5, 15), 2)
        pending = store.commit(step=2, wait=False)
        write(store, range(12, 20), 3)
        go_on.set()
        resizing.join(0.1)
        gate.set()
        resizing.join(30)
        assert pending.result().step == 2
        assert values(store)[:ROWS] == expected(v1=range(5), v2=range(5, 12), v3=range(12, 20))
        store.rollback()
        assert values(store) == expected(v1=range(5), v2=range(5, 15))


# ---- rows that were filled --------------------------------------------------------------------------------------


@pytest.fixture
def filled(path, monkeypatch):
    """A store in which writes of two blocks and more go straight to the shards; two tables without rows in slots."""
    monkeypatch.setattr(filling, "LEAST_BYTES", 8192)
    with shardemb.open(path, threads=1) as store:
        for name in ("t", "u"):
            store.create_table(name, num_embeddings=4096, embedding_dim=DIM)
        store.commit()
        yield store
        store.rollback()


def named(path):
    """The tables whose blocks the note names, and how many at least."""
    base = Manifest.from_bytes(store_paths.manifest(path).read_bytes())
    return {each.table: each.stop - each.first for each in fills.read_note(path, base).fills}


def test_filled_rows_are_part_of_it(filled, path, gate):
    write(filled, range(1024), 1)
    assert filled["t"].stats()["rows_copied"] == 0
    pending = filled.commit(step=1, wait=False)
    write(filled, range(10), 2)  # of a fill that is being committed
    write(filled, range(2048, 3072), 3)  # a fill of the next commit
    gate.set()
    pending.result()
    assert committed(path) == [1.0] * 1024 + [0.0] * 3072
    filled.rollback()
    assert values(filled) == [1.0] * 1024 + [0.0] * 3072


def test_fills_of_a_commit_under_way_stay_named(filled, path, gate):
    write(filled, range(1024), 1)
    pending = filled.commit(step=1, wait=False)
    write(filled, range(1024), 1, name="u")
    first, second = (inside.state(filled[name]).spec.uuid for name in ("t", "u"))
    assert named(path).keys() == {first, second}
    assert min(named(path).values()) >= 4
    gate.set()
    pending.result()
    filled.checkpoint()
    assert named(path).keys() == {second}


def test_fills_of_a_commit_that_fails_can_be_rolled_back_and_committed(filled, path, monkeypatch):
    def begin(self, nbytes):
        raise DiskFullError(errno.ENOSPC, "the disk is full", str(path))

    for end in (filled.rollback, filled.commit):
        write(filled, range(1024), 1)
        with monkeypatch.context() as patch:
            patch.setattr(log_writer.Log, "begin", begin)
            with pytest.raises(DiskFullError):
                filled.commit(step=1, wait=False).result()
        assert values(filled)[:1024] == [1.0] * 1024
        end()
        assert (
            values(filled)
            == committed(path)
            == ([1.0] if end == filled.commit else [0.0]) * 1024 + [0.0] * 3072
        )
