"""Ctrl-C and errors at awkward moments: a change happens as a whole or not at all, and the store stays usable."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import inside
from support.model import TableModel, assert_same_bits

import shardemb
from shardemb.compute import plan, scheduler
from shardemb.engine import batch
from shardemb.engine.shards import Shards
from shardemb.errors import PoisonedError
from shardemb.initializers import Constant, Normal
from shardemb.optim import Adam
from shardemb.storage import files

ONES = np.ones((2, 4), np.float32)
ROWS, DIM = 5000, 8


def interrupt():
    """Press Ctrl-C: the main thread handles it, be it only waiting for others."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def rows(table):
    return table.lookup(np.arange(table.num_embeddings))


def new_table(store, **arguments):
    defaults = {
        "num_embeddings": ROWS,
        "embedding_dim": DIM,
        "optimizer": Adam(lr=0.1),
        "initializer": Normal(seed=1),
    }
    table = store.create_table("t", rows_per_shard=512, **(defaults | arguments))
    return table, TableModel.new("t", **(defaults | arguments))


def take_in(store, table, ids):
    """Copy rows into slots beforehand, as a prefetch does: an update then has nothing to do but to change them."""
    batch.load(inside.runtime(store), [batch.Loading(inside.shards(table), np.unique(ids))], [])


# ---- Ctrl-C within an update ----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["update", "write", "store.update"])
@pytest.mark.parametrize("where", ["before the tasks", "within a task", "after the tasks"])
def test_ctrl_c_among_the_kernels_takes_effect_once_the_change_is_complete(store, monkeypatch, call, where):
    table, model = new_table(store)
    rng = np.random.default_rng(0)
    ids, numbers = rng.integers(0, ROWS, 3000), rng.normal(size=(3000, DIM)).astype(np.float32)
    monkeypatch.setattr(plan, "TASK_BYTES", 1000)
    run = scheduler.run
    sent = []

    def interrupted(tasks, threads):
        if not tasks:
            return run(tasks, threads)

        def task():
            sent.append(None)
            interrupt()
            time.sleep(0.02)
            return tasks[-1]()

        if where == "before the tasks":
            sent.append(None)
            interrupt()
        results = run([*tasks[:-1], task] if where == "within a task" else tasks, threads)
        if where == "after the tasks":
            sent.append(None)
            interrupt()
        return results

    take_in(store, table, ids)
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            if call == "store.update":
                store.update({"t": (ids, numbers)})
            else:
                getattr(table, call)(ids, numbers)
    assert sent
    (model.write if call == "write" else model.update)(ids, numbers)
    model.assert_matches(table)
    store.commit(step=1)
    assert not store.has_changes


def test_ctrl_c_within_an_update_of_many_tables_is_after_all_of_them(store, monkeypatch):
    arguments = {"num_embeddings": 100, "embedding_dim": 4, "optimizer": Adam(lr=0.1)}
    tables = [store.create_table(name, **arguments) for name in "abc"]
    run = scheduler.run

    def interrupted(tasks, threads):
        if tasks:
            interrupt()
        return run(tasks, threads)

    for table in tables:
        take_in(store, table, [1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.update({name: ([1, 2], ONES) for name in "abc"})
    assert [table.step for table in tables] == [1, 1, 1]
    assert len({table.lookup([1, 2, 3]).tobytes() for table in tables}) == 1
    store.commit()


def test_ctrl_c_while_rows_are_copied_changes_nothing(store, monkeypatch):
    table, model = new_table(store)
    ids, numbers = np.arange(3000), np.ones((3000, DIM), np.float32)
    copy = Shards.copy

    def interrupted(self, *arguments):
        interrupt()
        time.sleep(0.02)
        copy(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "copy", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table.update(ids, numbers)
    assert inside.shards(table).changes == inside.shards(table).overlay.slots.dirty == 0
    model.assert_matches(table)
    for each in (table, model):
        each.update(ids[::2], numbers[::2])
    assert inside.shards(table).overlay.slots.count == 3000
    model.assert_matches(table)
    store.commit()


@pytest.mark.parametrize("error", [MemoryError, OSError])
def test_rows_that_cannot_be_copied_are_in_no_slot(store, monkeypatch, error):
    table, model = new_table(store)
    ids, numbers = np.arange(3000), np.ones((3000, DIM), np.float32)

    def broken(self, *arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "copy", broken)
        with pytest.raises(error):
            table.update(ids, numbers)
    assert inside.shards(table).overlay.slots.count == 0
    for each in (table, model):
        each.update(ids[::2], numbers[::2])
    model.assert_matches(table)
    store.commit()


def test_ctrl_c_before_rows_change_changes_nothing(store, monkeypatch):
    table, model = new_table(store)
    store.commit()

    def interrupted(*arguments):
        interrupt()
        time.sleep(1)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "is_cold", lambda self, ids, most: True)
        patch.setattr(batch, "_read_ahead", interrupted)
        with pytest.raises(KeyboardInterrupt):
            table.update([1, 2], np.ones((2, DIM)))
    assert not store.has_changes
    model.assert_matches(table)
    for each in (table, model):
        each.update([1, 2], np.ones((2, DIM), np.float32))
    model.assert_matches(table)
    store.commit()


@pytest.mark.parametrize("loop", ["grouping", "training"])
def test_ctrl_c_at_any_moment_of(path, loop):
    # In a process of its own: a signal at the wrong moment can kill one (numba 0.66: in a kernel that returns a tuple).
    program = f"import sys, test_interrupts as t; t.interrupted_{loop}(sys.argv[1])"
    folders = [Path(__file__).parent, Path(__file__).parents[1]]  # the latter holds `support`
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", program, str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*folders, *filter(None, sys.path)]))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def interrupted_grouping(_):
    ids = np.random.default_rng(0).integers(0, ROWS, 3000)
    plan.group(ids, ROWS)  # compiled: within its compiler, numba swallows what is raised in a callback
    caught = []
    for turn in range(50):
        with interrupted(0.00002 * turn, caught) as going_on:
            while going_on():
                plan.group(ids, ROWS)
    assert len(caught) > 40


def interrupted_training(path):
    """Interrupt training at moments that nothing has chosen: what is in memory is always a whole number of steps."""
    with shardemb.open(path) as store:
        table, model = new_table(store)
        rng = np.random.default_rng(0)
        ids, numbers = rng.integers(0, ROWS, 3000), rng.normal(size=(3000, DIM)).astype(np.float32)
        plan.TASK_BYTES = 10_000
        for each in (table, model):
            each.update(ids, numbers)
        caught = []
        for turn in range(60):
            with interrupted(0.0003 * turn, caught) as going_on:
                while going_on():
                    table.update(ids, numbers)
            while model.step < table.step:
                model.update(ids, numbers)
            if turn % 12 == 0:
                model.assert_matches(table)
                store.commit(step=turn)
        model.assert_matches(table)
        store.commit()
    assert len(caught) > 50
    with shardemb.open(path, "r") as store:
        model.assert_matches(store["t"])


@contextlib.contextmanager
def interrupted(delay, caught):
    """Press Ctrl-C some seconds after the block began to ask whether to go on; note in a list that it was seen.

    Python itself drops an interrupt that comes within a callback of the garbage collector.
    """
    began, over = threading.Event(), threading.Event()

    def other():
        began.wait()
        time.sleep(delay)
        interrupt()
        time.sleep(0.01)
        over.set()

    def going_on():
        began.set()
        return not over.is_set()

    thread = threading.Thread(target=other)
    thread.start()
    try:
        yield going_on
    except KeyboardInterrupt:
        caught.append(None)
    thread.join()


def test_ctrl_c_within_a_lookup_leaves_nothing_running(store, monkeypatch):
    # scheduler.run: "nothing goes on behind the caller's back", such as writing into the caller's buffer.
    table, _ = new_table(store)
    monkeypatch.setattr(plan, "TASK_BYTES", 1000)
    out = np.zeros((ROWS, DIM), np.float32)
    gather = Shards.gather
    begun = []

    def slow(*arguments):
        begun.append(None)
        if len(begun) == 1:
            interrupt()
        time.sleep(0.2)
        gather(*arguments)

    monkeypatch.setattr(Shards, "gather", slow)
    with pytest.raises(KeyboardInterrupt):
        table.lookup(np.arange(ROWS), out=out)
    out[:] = -1
    time.sleep(0.5)
    assert (out == -1).all()


# ---- Ctrl-C within a commit and within closing ----------------------------------------------------------------


@pytest.mark.parametrize("at", ["write", "sync_data"])
def test_ctrl_c_within_a_commit_lets_it_happen_or_not(path, monkeypatch, at):
    with shardemb.open(path) as store:
        table, model = new_table(store)
        store.commit(step=1)
        for each in (table, model):
            each.update([1, 2, 4000], np.ones((3, DIM), np.float32))
        real = getattr(files, at)
        sent = []

        def interrupted(*arguments, **options):
            sent.append(None)
            interrupt()
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(files, at, interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.commit(step=2)
        assert sent
        if store.last_commit.step == 1:
            assert store.has_changes
            store.commit(step=2)
        assert not store.has_changes
        assert store.last_commit.step == 2
        model.assert_matches(table)
    with shardemb.open(path, "r") as store:
        assert store.last_commit.step == 2
        model.assert_matches(store["t"])


def test_ctrl_c_within_rollback_rolls_back(store, monkeypatch):
    table, model = new_table(store)
    store.commit()
    table.update([1, 2], np.ones((2, DIM)))
    forget = Shards.forget_changes

    def interrupted(self, *arguments):
        interrupt()
        forget(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "forget_changes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.rollback()
    assert not store.has_changes
    model.assert_matches(table)


def test_ctrl_c_within_create_table_creates_nothing(store, path, monkeypatch):
    real = files.create_sparse

    def interrupted(*arguments):
        interrupt()
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(files, "create_sparse", interrupted)
        with pytest.raises(KeyboardInterrupt):
            new_table(store)
    assert (list(store), store.has_changes) == ([], False)
    assert not list((path / ".shardemb" / "tables").glob("*"))
    table, model = new_table(store)
    store.commit()
    model.assert_matches(table)


@pytest.mark.parametrize("at", ["the background", "the manifest"])
def test_ctrl_c_within_closing_does_not_keep_the_store_locked(path, monkeypatch, at):
    store = shardemb.open(path)
    table, _ = new_table(store)
    store.commit()
    begun = threading.Event()

    replace = files.replace

    def slow(*arguments):
        begun.set()
        time.sleep(0.3)
        if at == "the manifest":
            replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(*((Shards, "read_ahead") if at == "the background" else (files, "replace")), slow)
        if at == "the background":
            table.prefetch([1, 2])
        timer = threading.Thread(target=lambda: (begun.wait(), time.sleep(0.05), interrupt()))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            store.close()
        timer.join()
    store.close()
    with shardemb.open(path) as again:
        assert list(again) == ["t"]


def test_a_job_stopped_by_ctrl_c_leaves_its_last_commit(path):
    program = """
        import sys
        import numpy as np
        import shardemb

        with shardemb.open(sys.argv[1]) as store:
            table = store.create_table("t", num_embeddings=1000, embedding_dim=4, optimizer=shardemb.optim.SGD(lr=1.0))
            for step in range(1, 10**9):
                table.update(np.arange(1000), np.full((1000, 4), -1.0))
                store.commit(step=step)
                if step == 3:
                    print("training", flush=True)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdout.readline() == "training\n"
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert job.returncode != 0
    with shardemb.open(path) as store:
        last = store.last_commit
        assert last.step == last.id == store["t"].step >= 3
        assert (rows(store["t"]) == last.step).all()


# ---- handlers -------------------------------------------------------------------------------------------------


def test_handlers_of_the_program_are_called_after_the_change_and_put_back(store, monkeypatch):
    table, _ = new_table(store)
    calls = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: calls.append((number, table.step)))
    mine = signal.getsignal(signal.SIGTERM)
    run = scheduler.run

    def interrupted(tasks, threads):
        if tasks:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert calls == []
        return run(tasks, threads)

    try:
        take_in(store, table, [1, 2])
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "run", interrupted)
            table.update([1, 2], np.ones((2, DIM)))
        assert calls == [(signal.SIGTERM, 1)]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_updates_work_in_threads_where_no_signal_is_handled(store):
    table, model = new_table(store)
    worker = threading.Thread(target=table.update, args=([1, 2], np.ones((2, DIM))))
    worker.start()
    worker.join()
    model.update([1, 2], np.ones((2, DIM), np.float32))
    model.assert_matches(table)


def test_an_ignored_ctrl_c_stays_ignored(store, monkeypatch):
    table, _ = new_table(store)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = scheduler.run
    try:
        monkeypatch.setattr(scheduler, "run", lambda tasks, threads: (interrupt(), run(tasks, threads))[1])
        table.update([1, 2], np.ones((2, DIM)))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, previous)
    assert table.step == 1


# ---- errors ---------------------------------------------------------------------------------------------------


def small(store):
    return store.create_table(
        "t", num_embeddings=100, embedding_dim=4, optimizer=Adam(lr=0.1), initializer=Constant(1.0)
    )


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda store: store["t"].update([1, 2], ONES), id="update"),
        pytest.param(lambda store: store["t"].write([1, 2], ONES), id="write"),
        pytest.param(lambda store: store.update({"t": ([1, 2], ONES)}), id="store.update"),
    ],
)
def test_an_exception_among_the_kernels_makes_commits_refuse_until_rollback(store, monkeypatch, change):
    table = small(store)
    table.update([1, 2], ONES)
    store.commit()
    before = rows(table)
    run = scheduler.run

    def half(tasks, threads):
        run(tasks, threads)
        if tasks:
            raise MemoryError("in a task")

    take_in(store, table, np.arange(table.num_embeddings))
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "run", half)
        with pytest.raises(MemoryError, match="in a task"):
            change(store)
    for refused in (store.commit, lambda: change(store), store.checkpoint):
        with pytest.raises(PoisonedError, match=r"failed half way; call store\.rollback\(\)"):
            refused()
    store.rollback()
    assert_same_bits(rows(table), before)
    assert table.step == 1
    assert not store.has_changes
    change(store)
    assert store.commit().id == 2


def test_half_done_changes_are_not_committed_by_closing(path, monkeypatch):
    with shardemb.open(path) as store:
        table = small(store)
        store.commit()
        take_in(store, table, [1, 2])
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "run", lambda tasks, threads: 1 / 0 if tasks else [])
            with pytest.raises(ZeroDivisionError):
                table.update([1, 2], ONES)
        with pytest.warns(RuntimeWarning, match="lost"):
            store.close()
    with shardemb.open(path) as store:
        assert (rows(store["t"]) == 1).all()
        store["t"].update([1, 2], ONES)
        store.commit()


def test_an_exception_before_rows_change_changes_nothing(store, monkeypatch):
    table = small(store)
    store.commit()

    def broken(*arguments):
        raise MemoryError("planning")

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "is_cold", lambda self, ids, most: True)
        patch.setattr(batch, "_read_ahead", broken)
        with pytest.raises(MemoryError):
            table.update([1, 2], ONES)
    assert not store.has_changes
    table.update([1, 2], ONES)
    assert table.step == 1
    store.commit()
