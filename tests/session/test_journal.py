"""Folds during training, rollbacks during folds, and readers next to both."""

import errno
import logging
import os
import re
import threading
import time

import numpy as np
import pytest
from support import inside
from support.stores import close_quietly

import shardemb
from shardemb.commits import fold, log_limit, log_reader, log_writer
from shardemb.errors import DiskFullError, PoisonedError, ReadOnlyError, StaleReaderError
from shardemb.initializers import Uniform
from shardemb.optim import SGD
from shardemb.storage import address_space, files

ROWS, DIM = 5000, 16


def new_table(store, name="t", **options):
    options = {"num_embeddings": ROWS, "embedding_dim": DIM, "rows_per_shard": 1024} | options
    table = store.create_table(name, **options)
    store.commit(step=0)
    return table


def fill(table, value, rows=range(ROWS)):
    table.write(list(rows), np.full((len(rows), DIM), value, np.float32))


@pytest.fixture
def slow_fold(monkeypatch):
    """Let folds wait before they write. Returns two events: a fold has begun; it may continue."""
    begun, proceed = threading.Event(), threading.Event()
    write = fold.write

    def slow(tables, threads, *rest):
        begun.set()
        assert proceed.wait(30)
        write(tables, threads, *rest)

    monkeypatch.setattr(fold, "write", slow)
    yield begun, proceed
    proceed.set()


def background_fold(store, begun):
    thread = threading.Thread(target=store.checkpoint)
    thread.start()
    assert begun.wait(30)
    return thread


def test_training_continues_during_a_fold(path):
    with shardemb.open(path) as store:
        table = new_table(store, optimizer=SGD(lr=1.0))
        fill(table, 1)
        store.commit(step=1)
        begun, proceed, write = threading.Event(), threading.Event(), fold.write
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fold, "write", lambda *given: (begun.set(), proceed.wait(30), write(*given)))
            thread = background_fold(store, begun)
            table.update([1, 2], np.ones((2, DIM)))
            store.commit(step=2)
            table.update([2, 3], np.ones((2, DIM)))
            assert table.lookup([1, 2, 3])[:, 0].tolist() == [0, -1, 0]
            proceed.set()
            thread.join()
        assert table.lookup([1, 2, 3])[:, 0].tolist() == [0, -1, 0]
        with shardemb.open(path, "r") as reader:
            assert reader["t"].lookup([1, 2, 3, 4])[:, 0].tolist() == [0, 0, 1, 1]
        store.rollback()
        assert table.lookup([1, 2, 3, 4])[:, 0].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("initializer", [None, Uniform(-1, 1, seed=3)])
def test_rollback_during_a_fold_restores_what_is_being_folded(path, slow_fold, initializer):
    begun, proceed = slow_fold
    proceed.set()
    with shardemb.open(path) as store:
        table = new_table(store, initializer=initializer)
        fresh = table.lookup(range(ROWS))
        fill(table, 1, range(0, ROWS, 3))
        store.commit(step=1)
        proceed.clear()
        thread = background_fold(store, begun)
        fill(table, 2, range(0, ROWS, 7))
        store.commit(step=2)
        expected = table.lookup(range(ROWS))
        fill(table, 3, range(0, ROWS, 2))
        store.rollback()
        assert np.array_equal(table.lookup(range(ROWS)), expected)
        assert np.array_equal(expected[1], fresh[1])
        proceed.set()
        thread.join()
        assert np.array_equal(table.lookup(range(ROWS)), expected)
    with shardemb.open(path) as store:
        assert np.array_equal(store["t"].lookup(range(ROWS)), expected)


def test_closing_shows_how_far_the_fold_is(path, capsys):
    for progress in (False, True):
        store = shardemb.open(path, "w")
        fill(new_table(store), 1)
        store.commit()
        store.close(progress=progress)
        shown = capsys.readouterr().err
        assert bool(re.fullmatch(r"folding the log: \d+\.\d [KM]iB in \d+\.\d s\n", shown)) == progress, shown


def test_what_happens_to_the_disk_is_logged(path, caplog, in_fork):
    caplog.set_level(logging.INFO, "shardemb")

    def logged():
        for thread in threading.enumerate():
            if thread.name == "shardemb-fold":  # says so once all others can go on
                thread.join()
        found = [(each.levelname, each.getMessage().replace(str(path), "PATH")) for each in caplog.records]
        found = [each for each in found if not each[1].startswith("compiling kernels")]
        caplog.clear()
        return found

    def train():
        store = shardemb.open(path)
        fill(store["t"], 2)
        store.commit(step=2)
        os._exit(0)  # not closed

    with shardemb.open(path) as store:
        table = new_table(store)
        logged()
        fill(table, 1, range(10))
        store.commit(step=1)
        assert logged() == [("INFO", "committed PATH: step 1, 10 rows")]
        store.checkpoint()
        begun, ended = logged()
        assert begun[1].startswith("folding PATH: ")
        assert ended[1].startswith("folded PATH in ")
    in_fork(train)
    logged()
    with shardemb.open(path, memory_budget=100_000) as store:
        assert logged() == [("INFO", f"recovered PATH: {ROWS} rows of the log folded")]
        fill(store["t"], 3)
        fill(store["t"], 4, range(10))
        assert any(text.startswith("spilled ") for _, text in logged())
        store.rollback()


def test_a_fold_that_fails_is_logged_as_a_warning(path, caplog, monkeypatch):
    with shardemb.open(path) as store:
        table = new_table(store)
        fill(table, 1)
        store.commit(step=1)
        with monkeypatch.context() as patch:
            patch.setattr(
                fold, "write", lambda *_: (_ for _ in ()).throw(DiskFullError(errno.ENOSPC, "full"))
            )
            with pytest.raises(DiskFullError):
                store.checkpoint()
    (said,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert said == f"the fold of {path} failed: [Errno 28] full"


def test_the_log_is_bounded(path):
    limit = 400_000
    with shardemb.open(path, log_bytes=limit) as store:
        table = new_table(store)
        most = 0
        for step in range(1, 40):
            fill(table, step, range(step, ROWS, 5))
            store.commit(step=step)
            # A fold may discard a segment between the listing and the look at it.
            sizes = (files.size(each) or 0 for each in (path / ".shardemb" / "log").iterdir())
            most = max(most, sum(sizes))
        interval = 1000 * (8 + 4 * DIM)
        assert most < 2 * (limit + interval)  # segments that are not full yet, and spare ones
        assert store["t"].lookup(39)[0] == 39


@pytest.mark.parametrize(
    ("free", "budget", "log_bytes", "limit"),
    [
        (2**40, 2**40, None, "tables"),
        (10**6, 2**40, None, 10**6 // 8),  # an eighth of what is free
        (2**40, 150_000, None, 150_000),
        (10, 10, None, 50_000),  # the least
        (10, 10, 70_000, 70_000),  # what the caller says
    ],
)
def test_the_log_is_as_large_as_tables_disk_and_memory_allow(
    path, monkeypatch, free, budget, log_bytes, limit
):
    monkeypatch.setattr(log_limit, "LOG_BYTES", 50_000)
    with shardemb.open(path, log_bytes=log_bytes, memory_budget=budget) as store:
        table = new_table(store)
        store.commit()
        log = inside.journal(store)

        def exceeded(nbytes):
            return log._limit.is_exceeded(nbytes, log._in_log)

        monkeypatch.setattr(files, "free_space", lambda folder: free)
        if limit == "tables":
            spec = inside.shards(table).spec
            limit = 3 * spec.num_shards * spec.shard_bytes
        assert not exceeded(limit)
        assert exceeded(limit + 10_000)  # what the log holds counts as free
        if free > 10**6 < budget:  # with another table, it is larger
            store.create_table("other", num_embeddings=ROWS, embedding_dim=DIM)
            assert not exceeded(limit + 10_000)
            store.rollback()


def test_free_space_is_what_the_file_system_says(path):
    found = os.statvfs(path.parent)
    assert files.free_space(path.parent) == pytest.approx(found.f_bavail * found.f_frsize, rel=0.1)


def test_a_commit_waits_for_the_space_of_what_is_being_folded(path, slow_fold):
    """The segments of a fold are there until it ends, so they count against `log_bytes` although commits go on."""
    begun, proceed = slow_fold
    proceed.set()
    limit = 2 * 1000 * (8 + 4 * DIM)
    with shardemb.open(path, log_bytes=limit) as store:
        table = new_table(store)
        proceed.clear()
        begun.clear()
        fill(table, 1, range(1200))
        store.commit(step=1)  # the log is more than half full, so a fold begins
        assert begun.wait(30)
        fill(table, 2, range(1200))
        thread = threading.Thread(target=store.commit, args=(2,))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert store.last_commit.step == 1
        proceed.set()
        thread.join(30)
        assert not thread.is_alive()
        assert store.last_commit.step == 2


def test_a_commit_that_waited_for_a_running_fold_starts_no_other_if_there_is_space_now(path, monkeypatch):
    """So the next fold has more to fold at once."""
    begun, proceed, write, folded = threading.Event(), threading.Event(), fold.write, []

    def slow(tables, *rest):
        begun.set()
        assert proceed.wait(30)
        folded.append(sum(images.ids.size for _, images in tables))
        write(tables, *rest)

    limit = 2000 * (8 + 4 * DIM)
    with shardemb.open(path, log_bytes=limit) as store:
        table = new_table(store)
        monkeypatch.setattr(fold, "write", slow)
        fill(table, 1, range(1200))
        store.commit(step=1)  # the log is more than half full, so a fold begins
        assert begun.wait(30)
        fill(table, 2, range(1000, 1400))
        store.commit(step=2)
        fill(table, 3, range(2000, 2500))
        threading.Timer(0.3, proceed.set).start()
        store.commit(step=3)
        store.checkpoint()
    assert folded == [1200, 900]


@pytest.fixture
def written_back(monkeypatch):
    """The files of which pieces are written back, as is done only by a fold that gives way."""
    calls, write_back = [], address_space.write_back
    monkeypatch.setattr(
        address_space, "write_back", lambda *given: (calls.append(given[-1]), write_back(*given))
    )
    return calls


def test_a_fold_gives_way_to_cold_lookups_until_somebody_waits_for_it(
    path, slow_fold, written_back, monkeypatch
):
    begun, proceed = slow_fold
    proceed.set()
    monkeypatch.setattr(fold, "REST", 1e6)  # it would never end
    with shardemb.open(path, log_bytes=600_000) as store:
        table = new_table(store)
        proceed.clear()
        begun.clear()
        fill(table, 1)
        store.commit(step=1)
        assert begun.wait(30)
        inside.shards(table).totals.add_cold()
        proceed.set()
        while not written_back:
            time.sleep(0.001)
        time.sleep(0.1)
        assert inside.journal(store).is_folding
        store.checkpoint()
        assert (np.fromfile(path / "t" / "rows" / "c.0.0", np.float32) == 1).all()
    assert len(written_back) == 1


def test_a_fold_does_not_rest_while_the_log_is_nearly_full(path, slow_fold, written_back, monkeypatch):
    begun, proceed = slow_fold
    proceed.set()
    monkeypatch.setattr(fold, "REST", 1e6)
    with shardemb.open(path, log_bytes=2000 * (8 + 4 * DIM)) as store:
        table = new_table(store)
        proceed.clear()
        begun.clear()
        fill(table, 1, range(1200))
        store.commit(step=1)
        assert begun.wait(30)
        fill(table, 2, range(400))
        store.commit(step=2)  # more than three quarters are full
        inside.shards(table).totals.add_cold()
        proceed.set()
        limit = time.monotonic() + 30
        while inside.journal(store).is_folding and time.monotonic() < limit:
            time.sleep(0.001)
        assert not inside.journal(store).is_folding
    assert written_back == []


def test_a_fold_that_finds_the_disk_full_loses_nothing_and_is_retried(path, monkeypatch):
    store = shardemb.open(path)
    table = new_table(store)
    fill(table, 1)
    store.commit(step=1)
    with monkeypatch.context() as patch:
        patch.setattr(
            fold, "write", lambda *given: (_ for _ in ()).throw(DiskFullError(errno.ENOSPC, "no space left"))
        )
        with pytest.raises(DiskFullError):
            store.checkpoint()
        fill(table, 2, range(10))
        store.commit(step=2)
        with shardemb.open(path, "r") as reader:
            assert reader.last_commit.step == 2
            assert reader["t"].lookup([9, 10])[:, 0].tolist() == [2, 1]
    store.checkpoint()
    assert np.fromfile(path / "t" / "rows" / "c.0.0", np.float32)[:: 16 * 10][:2].tolist() == [2, 1]
    store.close()
    assert list((path / ".shardemb" / "log").iterdir()) == []


def test_a_manifest_that_is_there_though_its_sync_failed_is_no_stranger(path, monkeypatch):
    with shardemb.open(path) as store:
        table = new_table(store)
        fill(table, 1)
        store.commit(step=1)
        sync = files.sync_directory

        def fail(folder):
            if folder.name == ".shardemb":
                raise DiskFullError(errno.ENOSPC, "full")
            sync(folder)

        with monkeypatch.context() as patch:
            patch.setattr(files, "sync_directory", fail)
            with pytest.raises(DiskFullError):
                store.checkpoint()
        fill(table, 2)
        store.commit(step=2)
        store.checkpoint()
    with shardemb.open(path, mode="r") as store:
        assert (store["t"].lookup(range(ROWS)) == 2).all()


def test_a_checkpoint_that_waits_for_a_fold_that_fails_fails_too(path, slow_fold, monkeypatch):
    begun, proceed = slow_fold
    proceed.set()
    with shardemb.open(path, log_bytes=1) as store:
        table = new_table(store)
        fill(table, 1)
        proceed.clear()
        begun.clear()
        store.commit(step=1)
        assert begun.wait(30)
        with monkeypatch.context() as patch:
            patch.setattr(
                files, "sync_data", lambda *given: (_ for _ in ()).throw(OSError(errno.EIO, "bad disk"))
            )
            threading.Timer(0.1, proceed.set).start()
            with pytest.raises(OSError, match="bad disk"):
                store.checkpoint()
    with shardemb.open(path) as store:
        assert (store["t"].lookup(range(ROWS)) == 1).all()


def test_folders_that_a_fold_moved_before_it_failed_are_found_by_the_next(path, monkeypatch):
    with shardemb.open(path) as store:
        tables = [store.create_table(name, num_embeddings=ROWS, embedding_dim=DIM) for name in "ab"]
        rename = files.rename

        def full(source, target):
            if target == path / "b":
                raise DiskFullError(errno.ENOSPC, "no space left")
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files, "rename", full)
            store.commit(step=1)
        assert sorted(each.name for each in path.iterdir() if each.is_dir()) == [".shardemb", "a"]
        for table in tables:
            fill(table, 1)
        store.commit(step=2)
        store.checkpoint()
        assert not inside.runtime(store).poisoned
    with shardemb.open(path) as store:
        assert all((table.lookup(range(ROWS)) == 1).all() for table in store.values())


def test_a_fold_that_fails_poisons_and_the_next_opening_has_every_commit(path, monkeypatch):
    store = shardemb.open(path)
    table = new_table(store)
    fill(table, 1)
    store.commit(step=1)
    with monkeypatch.context() as patch:
        patch.setattr(
            files, "sync_data", lambda *given: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(5)))
        )
        with pytest.raises(OSError, match="Input/output"):
            store.checkpoint()
    with pytest.raises(PoisonedError, match="open it again"):
        store.commit(step=2)
    close_quietly(store)
    with shardemb.open(path) as again:
        assert again.last_commit.step == 1
        assert (again["t"].lookup(range(ROWS)) == 1).all()


def test_a_reader_after_a_crash_sees_the_last_commit_and_writes_nothing(path, in_fork):
    def job():
        store = shardemb.open(path, threads=1)
        table = new_table(store, initializer=Uniform(-1, 1, seed=1))
        fill(table, 5, range(0, ROWS, 2))
        store.commit(step=9)
        fill(table, 6)
        os._exit(0)

    assert in_fork(job) is None
    before = {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}
    with shardemb.open(path, "r") as reader:
        assert reader.last_commit.step == 9
        rows = reader["t"].lookup(range(ROWS))
        assert (rows[::2] == 5).all()
        assert (np.abs(rows[1::2]) <= 1).all()
    assert {each: each.read_bytes() for each in path.rglob("*") if each.is_file()} == before


def test_a_reader_works_as_before_after_a_refresh(path):
    """The opening that it takes over from ends, with its pool of results and its threads, but not with the reader's."""
    with shardemb.open(path) as store:
        fill(new_table(store), 3)
        store.commit(step=1)
        with shardemb.open(path, "r") as reader:
            reader["t"].prefetch([1])
            runtime = inside.runtime(reader)
            reader.refresh()
            reader.verify()
            names = []
            runtime.in_background(lambda: names.append(threading.current_thread().name))
            runtime.in_background(lambda: names.append(""))
            found = reader["t"].lookup(np.arange(ROWS).repeat(16))
            del found
            assert runtime.outputs.nbytes > 0  # kept for the next result
        assert names[0] == "shardemb_0"


def test_refresh_moves_a_reader_to_the_newest_commit(path):
    with shardemb.open(path) as store:
        table = new_table(store)
        fill(table, 1)
        store.commit(step=1)
        with pytest.raises(ReadOnlyError, match="open for writing"):
            store.refresh()
        with shardemb.open(path, "r") as reader:
            seen = reader["t"]
            fill(table, 2)
            new_table(store, "u")
            store.rename_table("t", "v")
            store.commit(step=2)
            reader.refresh()
            assert reader.last_commit.step == 2
            assert sorted(reader) == ["u", "v"]
            assert reader["v"] is seen
            assert (seen.lookup(range(ROWS)) == 2).all()
            store.drop_table("v")
            store.commit(step=3)
            reader.refresh()
            with pytest.raises(shardemb.TableNotFoundError):
                seen.lookup([1])


def test_a_reader_notices_another_writer(path):
    first = shardemb.open(path)
    fill(new_table(first), 1)
    first.commit(step=1)
    with shardemb.open(path, "r") as reader:
        assert reader["t"].lookup(5)[0] == 1
        first.close()
        assert reader["t"].lookup(5)[0] == 1
        with shardemb.open(path) as second:
            with pytest.raises(StaleReaderError, match="refresh"):
                reader["t"].lookup(5)
            fill(second["t"], 2)
            second.commit(step=2)
            reader.refresh()
            assert reader["t"].lookup(5)[0] == 2


def test_a_reader_next_to_a_training_writer_sees_only_committed_values(path):
    """Each row holds the number of its commit. Between commits, rows hold -1, which a reader must never see."""
    stop = threading.Event()
    store = shardemb.open(path, log_bytes=300_000)
    table = new_table(store)
    committed = [0]

    def training():
        rng = np.random.default_rng(0)
        while not stop.is_set():
            rows = np.unique(rng.integers(0, ROWS, 500))
            fill(table, -1, rows)
            fill(table, committed[0] + 1, rows)
            store.commit(step=committed[0] + 1)
            committed[0] += 1

    thread = threading.Thread(target=training)
    thread.start()
    try:
        for _ in range(15):
            with shardemb.open(path, "r") as reader:
                opened_at = reader.last_commit.step
                for _ in range(10):
                    rows = reader["t"].lookup(range(ROWS))
                    assert rows.min() >= 0
                    assert rows.max() <= committed[0] + 1
                    assert opened_at == 0 or rows.max() > 0
        until = time.monotonic() + 60
        while committed[0] <= 10 and time.monotonic() < until:  # a busy machine may need more time
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join()
        store.close()
    assert committed[0] > 10


# ---- folds that cannot begin ------------------------------------------------------------------------------------


def test_a_fold_for_which_no_thread_can_be_started_runs_in_this_one(store, monkeypatch):
    table = store.create_table("t", num_embeddings=100, embedding_dim=4)
    store.commit()

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        table.write([1], np.ones((1, 4), np.float32))
        store.commit()
        store.checkpoint()
        assert not inside.journal(store).is_folding
        table.prefetch([1, 2])
        table.lookup(np.arange(100))
    table.write([2], np.ones((1, 4), np.float32))
    store.commit()
    store.checkpoint()
    assert inside.shards(table).overlay.slots.dirty == 0


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, OSError])
@pytest.mark.parametrize("where", ["begin_fold", "close_segments", "dropped", "end_fold", "write", "read"])
@pytest.mark.filterwarnings("ignore:what is committed")
def test_whatever_goes_wrong_with_a_fold_it_ends(path, monkeypatch, where, error):
    store = shardemb.open(path)
    table = store.create_table("t", num_embeddings=100, embedding_dim=4)
    store.commit()
    table.write([1], np.ones((1, 4), np.float32))
    store.commit(step=7)

    def fail(*arguments, **named):
        raise error("it failed")

    owner = {
        "begin_fold": type(inside.shards(table)),
        "close_segments": log_writer.Log,
        "dropped": type(inside.journal(store).base),
        "end_fold": type(inside.shards(table).overlay),
        "write": fold,
        "read": log_reader,
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, where, fail)
        with pytest.raises(error):
            store.checkpoint()
        assert not inside.journal(store).is_folding
        with pytest.raises(PoisonedError, match="it failed"):
            store.commit()
    store.close()
    with shardemb.open(path) as store:
        assert store.last_commit.step == 7
        assert store["t"].lookup(1).tolist() == [1] * 4
