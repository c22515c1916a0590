"""How a batch runs must not show: the same bits for any scheduler, threads, shards, task size, cold or warm."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import dask
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inside
from support.model import TableModel, assert_same_bits
from support.page_cache import drop_caches
from support.stores import close_quietly

import shardemb
from shardemb.compute import plan, row_kernels, scheduler
from shardemb.engine.shards import Shards
from shardemb.errors import ShardEmbError, TableNotFoundError, UnknownKeyError
from shardemb.initializers import Constant, Normal, Uniform
from shardemb.memory.memory_budget import MemoryBudget
from shardemb.memory.overlay import Overlay
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad

ROWS, DIM = 3000, 8
EVERYTHING = np.arange(ROWS)
KINDS = {
    "Adam, with presence": {"optimizer": Adam(lr=0.1), "initializer": Uniform(-1, 1, seed=1)},
    "Adagrad, without presence": {"optimizer": Adagrad(lr=0.1)},
    "RowWiseAdagrad, constant": {"optimizer": RowWiseAdagrad(lr=0.1), "initializer": Constant(0.5)},
}


@pytest.fixture
def tasks_run(monkeypatch):
    """Make tasks as small as possible, and list how many each batch was cut into."""
    counts = []
    run = scheduler.run

    def spy(tasks, threads):
        counts.append(len(tasks))
        return run(tasks, threads)

    monkeypatch.setattr(scheduler, "run", spy)
    monkeypatch.setattr(plan, "TASK_BYTES", 64)
    return counts


def train(path, arguments, *, steps=4, between=lambda table: None, **options):
    """Train a table for some steps with many duplicates; return everything that a user could see of it."""
    rng = np.random.default_rng(5)
    model = TableModel.new("t", num_embeddings=ROWS, embedding_dim=DIM, **arguments)
    with shardemb.open(path, **options) as store:
        rows_per_shard = arguments.get("rows_per_shard", 64)
        table = store.create_table(
            "t", num_embeddings=ROWS, embedding_dim=DIM, **(arguments | {"rows_per_shard": rows_per_shard})
        )
        for _ in range(steps):
            ids = rng.zipf(1.3, 2000) % ROWS
            gradients = rng.normal(size=(2000, DIM)).astype(np.float32)
            table.update(ids, gradients)
            model.update(ids, gradients)
            store.commit()
            store.checkpoint()
            between(table)
            overwritten = rng.integers(0, ROWS, 300)
            rows = rng.normal(size=(300, DIM)).astype(np.float32)
            table.write(overwritten, rows)
            model.write(overwritten, rows)
            assert_same_bits(table.lookup(ids), model.lookup(ids))
        store.commit()
        model.assert_matches(table)
        return model


# ---- scheduler, threads, shards, task size --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_same_bits_for_any_number_of_threads(path, tasks_run, kind, threads):
    train(path, KINDS[kind], threads=threads)
    assert max(tasks_run) == 2 * threads


@contextlib.contextmanager
def pool():
    with ThreadPoolExecutor(3) as executor:
        yield executor


@contextlib.contextmanager
def by_name(name):
    yield name


@pytest.mark.parametrize(
    "choice",
    [
        pytest.param(lambda: by_name("threads"), id="threads"),
        pytest.param(lambda: by_name("sync"), id="sync"),
        pytest.param(lambda: by_name("single-threaded"), id="single-threaded"),
        pytest.param(lambda: by_name(dask.get), id="dask.get"),
        pytest.param(lambda: by_name(dask.threaded.get), id="dask.threaded.get"),
        pytest.param(pool, id="executor"),
        # Not used here, since the table is memory of this process: falls back to threads.
        pytest.param(lambda: by_name("processes"), id="processes"),
    ],
)
def test_same_bits_for_any_scheduler_of_dask(path, tasks_run, choice):
    with choice() as chosen, dask.config.set(scheduler=chosen):
        train(path, KINDS["Adam, with presence"], threads=2)
    assert max(tasks_run) == 4


def test_tasks_run_where_dask_is_told_to_run_them(store, tasks_run, monkeypatch):
    table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, initializer=Normal())
    seen = set()
    gather = Shards.gather

    def spy(*arguments):
        seen.add(threading.current_thread())
        gather(*arguments)

    monkeypatch.setattr(Shards, "gather", spy)
    with dask.config.set(scheduler="sync"):
        table.lookup(EVERYTHING)
    assert seen == {threading.current_thread()}
    seen.clear()
    with ThreadPoolExecutor(2, thread_name_prefix="mine") as executor, dask.config.set(scheduler=executor):
        table.lookup(EVERYTHING)
    assert seen
    assert all(thread.name.startswith("mine") for thread in seen)


@pytest.mark.parametrize("rows_per_shard", [64, 128, 1000, ROWS, 10 * ROWS])
def test_same_bits_for_any_shard_size(path, tasks_run, rows_per_shard):
    train(path, KINDS["Adam, with presence"] | {"rows_per_shard": rows_per_shard})


@pytest.mark.parametrize(("task_bytes", "most"), [(1, 10), (1000, 10), (90_000, 4), (2**20, 1)])
def test_same_bits_for_any_task_size(path, tasks_run, monkeypatch, task_bytes, most):
    monkeypatch.setattr(plan, "TASK_BYTES", task_bytes)
    monkeypatch.setattr(
        Shards, "is_cold", lambda self, ids, most: False
    )  # reading ahead has tasks of its own
    train(path, KINDS["Adagrad, without presence"] | {"rows_per_shard": ROWS}, threads=5)
    assert max(tasks_run) == most


@given(
    ids=st.lists(st.one_of(st.integers(0, 10), st.integers(0, 199)), min_size=1, max_size=80),
    threads=st.integers(1, 5),
    kind=st.sampled_from(list(KINDS)),
)
@settings(max_examples=60)
def test_every_row_belongs_to_exactly_one_task(new_store, ids, threads, kind):
    # Tasks of one or two positions: if a row has more, cuts have to be moved.
    with pytest.MonkeyPatch.context() as patch, new_store(threads=threads) as store:
        patch.setattr(plan, "TASK_BYTES", 1)
        arguments = {"num_embeddings": 200, "embedding_dim": 2, "rows_per_shard": 64} | KINDS[kind]
        table, model = store.create_table("t", **arguments), TableModel.new("t", **arguments)
        gradients = np.random.default_rng(0).normal(size=(len(ids), 2)).astype(np.float32)
        for each in (table, model):
            each.update(ids, gradients)
            each.write(ids[::2], gradients[::2])
        model.assert_matches(table)


def test_a_batch_is_cut_into_at_most_two_tasks_a_core_and_a_small_one_runs_inline(store, monkeypatch):
    counts = []
    run = scheduler.run
    monkeypatch.setattr(
        scheduler, "run", lambda tasks, threads: (counts.append(len(tasks)), run(tasks, threads))[1]
    )
    table = store.create_table("t", num_embeddings=10**6, embedding_dim=64, optimizer=SGD())
    table.lookup(np.arange(100))
    table.update(np.arange(100), np.ones((100, 64)))
    assert max(counts) == 1
    table.lookup(np.arange(200_000))
    assert counts[-1] == 2 * scheduler.CORES
    with shardemb.open(f"{store.path}2", threads=3) as other:
        table = other.create_table("t", num_embeddings=10**6, embedding_dim=64)
        table.lookup(np.arange(200_000))
        other.commit()
    assert max(counts) == max(6, 2 * scheduler.CORES)


def test_rows_that_have_to_be_drawn_are_more_work(store):
    """So a batch of them is cut into more tasks, until they are written."""
    table = store.create_table(
        "t", num_embeddings=10**6, embedding_dim=64, initializer=Uniform(-1, 1, seed=0)
    )
    ids = np.arange(plan.TASK_BYTES * 3 // 2 // 256)  # half as many again as one task copies
    assert table.explain(ids).tasks == max(2, min(4, scheduler.CORES))
    assert table.explain(ids[: ids.size // 3]).tasks == 1
    table.write(ids, table.lookup(ids))
    assert table.explain(ids).tasks == 1


def test_many_tables_are_one_plan(store, tasks_run):
    arguments = {"num_embeddings": ROWS, "embedding_dim": DIM, "optimizer": Adam()}
    tables = {name: store.create_table(name, **arguments) for name in "abc"}
    models = {name: TableModel.new(name, **arguments) for name in "abc"}
    rng = np.random.default_rng(0)
    batches = {
        name: (rng.integers(0, ROWS, size), rng.normal(size=(size, DIM)).astype(np.float32))
        for name, size in [("c", 700), ("a", 5), ("b", 0)]
    }
    tasks_run.clear()
    store.update(batches)
    assert sum(count > 1 for count in tasks_run) <= 3  # to request pages, to copy new rows, to change rows
    assert max(tasks_run) == 2 * scheduler.CORES
    for name, (ids, gradients) in batches.items():
        models[name].update(ids, gradients)
    for name in "abc":
        models[name].assert_matches(tables[name])
    found = store.lookup({name: ids for name, (ids, _) in batches.items()})
    assert list(found) == ["c", "a", "b"]
    for name, rows in found.items():
        assert_same_bits(rows, models[name].lookup(batches[name][0]))


# ---- cold -----------------------------------------------------------------------------------------------------


@pytest.fixture
def reads_ahead(monkeypatch):
    """List the rows whose pages were requested."""
    asked = []
    read_ahead = Shards.read_ahead

    def spy(self, rows, start, stop):
        asked.extend(rows[start:stop].tolist())
        read_ahead(self, rows, start, stop)

    monkeypatch.setattr(Shards, "read_ahead", spy)
    return asked


@pytest.mark.parametrize("kind", KINDS)
def test_cold_batches_equal_warm_ones(path, tasks_run, reads_ahead, kind):
    cold = []

    def between(table):
        if not drop_caches(table):
            pytest.skip("this file system keeps its pages in memory (tmpfs)")
        cold.append(inside.shards(table).is_cold(EVERYTHING, 32))

    train(path, KINDS[kind], between=between)
    assert cold[-1]
    assert reads_ahead


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cold", [True, False])
def test_same_bits_whether_a_batch_is_held_to_be_cold_or_warm(
    path, tasks_run, reads_ahead, monkeypatch, kind, cold
):
    monkeypatch.setattr(Shards, "is_cold", lambda self, ids, most: cold)
    train(path, KINDS[kind])
    assert bool(reads_ahead) == cold


def test_all_pages_of_a_cold_batch_are_requested_once(store, tasks_run, reads_ahead, monkeypatch):
    monkeypatch.setattr(Shards, "is_cold", lambda self, ids, most: True)
    table = store.create_table(
        "t", num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=64, optimizer=SGD()
    )
    other = store.create_table("other", num_embeddings=ROWS, embedding_dim=DIM)
    ids = [2999, 5, 5, 70, 2999, 0]
    table.lookup(ids)
    assert sorted(reads_ahead) == [0, 5, 70, 2999]
    reads_ahead.clear()
    store.lookup({"t": ids, "other": [3, 1]})
    assert sorted(reads_ahead) == [0, 1, 3, 5, 70, 2999]
    reads_ahead.clear()
    table.update(ids, np.ones((6, DIM)))
    assert sorted(reads_ahead) == [0, 5, 70, 2999]
    assert other.lookup([]).shape == (0, DIM)


def test_a_batch_in_memory_is_warm_and_one_that_was_dropped_is_cold(store):
    table = store.create_table("t", num_embeddings=10**5, embedding_dim=64, optimizer=SGD())
    everything = np.arange(10**5)
    table.write(everything, np.ones((10**5, 64), np.float32))
    store.commit()
    store.checkpoint()
    assert not inside.shards(table).is_cold(everything, 32)
    if not drop_caches(table):
        pytest.skip("this file system keeps its pages in memory (tmpfs)")
    assert inside.shards(table).is_cold(everything, 32)
    assert (table.lookup(everything) == 1).all()
    assert not inside.shards(table).is_cold(everything, 32)


def test_rows_never_written_are_never_cold(store):
    table = store.create_table("t", num_embeddings=10**5, embedding_dim=64, initializer=Normal())
    assert not inside.shards(table).is_cold(np.arange(10**5), 32)


def test_a_lookup_in_another_thread_finds_the_same(store, tasks_run):
    # dask keeps a pool for each thread that computes; results and errors must come back through any of them.
    table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, initializer=Normal())
    expected = table.lookup(EVERYTHING)
    with ThreadPoolExecutor(4) as executor:
        for found in executor.map(lambda _: table.lookup(EVERYTHING), range(8)):
            assert_same_bits(found, expected)
        with pytest.raises(shardemb.RowIdError):
            executor.submit(table.lookup, [ROWS]).result()


def test_an_error_in_one_task_reaches_the_caller_once_none_is_running():
    begun, ended = [], []

    def slow():
        begun.append(None)
        time.sleep(0.05)
        ended.append(None)

    def broken():
        time.sleep(0.01)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        scheduler.run([slow, broken, slow, slow, slow], 2)
    assert len(begun) == len(ended) >= 1
    time.sleep(0.1)
    assert len(begun) == len(ended)


def test_results_come_in_the_order_of_the_tasks():
    assert scheduler.run([], 2) == []
    assert scheduler.run([lambda: 1], 2) == [1]
    slow = [partial(lambda k: (time.sleep(0.01 * (5 - k)), k)[1], k) for k in range(5)]
    assert scheduler.run(slow, 3) == [0, 1, 2, 3, 4]


# ---- rows that are overwritten whole


@pytest.fixture
def copied(monkeypatch):
    """List the rows that were copied from the files into slots, or reloaded from the spill file."""
    found = []
    copy, reload = Shards.copy, Overlay.reload

    def spy(self, rows, places, start, stop):
        found.extend(rows[start:stop].tolist())
        copy(self, rows, places, start, stop)

    def spy_on_reload(self, rows):
        found.extend(rows[self.places(rows) < 0].tolist())
        reload(self, rows)

    monkeypatch.setattr(Shards, "copy", spy)
    monkeypatch.setattr(Overlay, "reload", spy_on_reload)
    return found


WHOLE = {
    "no optimizer": {},
    "no state": {"optimizer": SGD()},
    "with presence": {"initializer": Normal(seed=3)},
}


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("budget", [None, 0])
def test_rows_that_are_overwritten_whole_are_never_read(
    path, tasks_run, reads_ahead, copied, monkeypatch, kind, budget
):
    monkeypatch.setattr(Shards, "is_cold", lambda self, ids, most: True)
    rng = np.random.default_rng(0)
    arguments = {"num_embeddings": ROWS, "embedding_dim": DIM, **WHOLE[kind]}
    model = TableModel.new("t", **arguments)
    with shardemb.open(path, memory_budget=budget, threads=2) as store:
        table = store.create_table("t", rows_per_shard=64, **arguments)
        initial = table.lookup(EVERYTHING)
        reads_ahead.clear()
        for step in range(8):
            ids = rng.integers(
                0, ROWS, 400
            )  # some rows twice, some in slots or spilled by now, some only in files
            rows = rng.normal(size=(400, DIM)).astype(np.float32)
            table.write(ids, rows)
            model.write(ids, rows)
            if step % 3 == 2:
                table.reset_rows(ids[:9])
                model.write(ids[:9], initial[ids[:9]])
            overlay = inside.shards(table).overlay
            assert overlay.changes == np.unique(overlay.changed_rows()).size
            if step % 2:
                store.commit()
        assert not copied
        assert not reads_ahead
        assert max(tasks_run) > 1
        model.assert_matches(table)
        committed = table.lookup(EVERYTHING)
        store.commit()
        table.write(ids, -rows)
        table.write(ids[5:50] // 2, rows[5:50])
        store.rollback()
        assert_same_bits(table.lookup(EVERYTHING), committed)
    with shardemb.open(path, "r") as store:
        model.assert_matches(store["t"])


def test_writes_of_tables_with_state_or_counts_copy_their_rows(store, copied):
    for number, options in enumerate([{"optimizer": Adagrad(lr=1.0)}, {"counters": True}]):
        table = store.create_table(f"t{number}", num_embeddings=9, embedding_dim=2, **options)
        table.write([4, 2], np.ones((2, 2)))
        assert sorted(copied) == [2, 4]
        copied.clear()


def test_no_lookup_finds_a_row_that_is_overwritten_before_all_of_it_is_there(store, monkeypatch):
    table = store.create_table("t", num_embeddings=100, embedding_dim=DIM, initializer=Constant(2.0))
    table.write([0], np.zeros((1, DIM)))  # so that the index is in use
    seen = []
    replace = Overlay.replace

    def spy(self, rows, places):
        seen.append(table.lookup([7, 8, 7]).tolist())  # as another thread might, without the lock
        replace(self, rows, places)
        seen.append(table.lookup([7, 8, 7]).tolist())

    monkeypatch.setattr(Overlay, "replace", spy)
    table.write([8, 7, 7], np.arange(3.0)[:, np.newaxis] * np.ones(DIM))
    assert [[row[0] for row in rows] for rows in seen] == [[2, 2, 2], [2, 0, 2]]


@pytest.mark.parametrize("where", ["fill", "cut", "mark"])
def test_a_write_of_whole_rows_that_fails_leaves_everything_as_it_was(store, monkeypatch, where):
    table = store.create_table("t", num_embeddings=100, embedding_dim=DIM, initializer=Constant(2.0))
    table.write([1, 2], np.ones((2, DIM)))
    store.commit()
    shards = inside.shards(table)
    before = shards.overlay.slots.count, shards.overlay.slots.dirty, shards.overlay.changes

    def fail(*arguments):
        raise MemoryError("none left")

    with monkeypatch.context() as patch:
        if where == "fill":
            patch.setattr(row_kernels, "scatter", fail)
        elif where == "cut":
            cut, calls = plan.cut, []
            patch.setattr(plan, "cut", lambda *each: fail() if calls else calls.append(0) or cut(*each))
        else:
            patch.setattr(Overlay, "mark_changed", fail)
        with pytest.raises(MemoryError):
            table.write([2, 3], np.zeros((2, DIM)))
    assert (shards.overlay.slots.count, shards.overlay.slots.dirty, shards.overlay.changes) == before
    if where == "mark":
        store.rollback()
    assert table.lookup([1, 2, 3])[:, 0].tolist() == [1, 1, 2]
    store.checkpoint()  # now the slots may be evicted
    table.write([2, 3], np.zeros((2, DIM)))
    store.commit()
    assert table.lookup([1, 2, 3])[:, 0].tolist() == [1, 0, 0]


# ---- what others do while a batch waits for room


@pytest.fixture
def meanwhile(monkeypatch):
    """``meanwhile(function)``: when a batch next makes room, it seems to release the lock, and others do this first."""

    def meanwhile(function):
        make_room, left = MemoryBudget.make_room, [function]

        def release_the_lock(self, nbytes):
            if left:
                left.pop()()
            make_room(self, nbytes)

        monkeypatch.setattr(MemoryBudget, "make_room", release_the_lock)
        return left

    return meanwhile


def waiting_table(path, initializer=None, **options):
    """A table of which some rows are spilled, in a store whose batches all have to make room."""
    store = shardemb.open(path, memory_budget=0, log_bytes=1)
    table = store.create_table(
        "t",
        num_embeddings=500,
        embedding_dim=DIM,
        optimizer=SGD(lr=1.0),
        initializer=initializer or Constant(0.0),
        rows_per_shard=64,
        **options,
    )
    table.write(np.arange(100), np.ones((100, DIM)))
    store.commit(step=1)
    return store, table


SEVENS = np.full((3, DIM), 7, np.float32)
CHANGES = {
    "write": lambda store, table, grads: table.write([3, 99, 450], SEVENS),
    "update": lambda store, table, grads: table.update([3, 99, 450], grads),
    "store.update": lambda store, table, grads: store.update({"t": ([3, 99, 450], grads)}),
}
WAITS = {
    "resize": lambda store, table: table.resize(700),
    "resize there and back": lambda store, table: (table.resize(700), table.resize(500, drop_rows=True)),
    "reshard": lambda store, table: store.reshard("t", rows_per_shard=100),
    "rollback": lambda store, table: store.rollback(),
    "rollback of a resize": lambda store, table: store.rollback(),
    "commit": lambda store, table: store.commit(step=2),
    "rename": lambda store, table: store.rename_table("t", "u"),
}


@pytest.mark.parametrize("other", WAITS)
@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_lost_whatever_others_do_while_it_waits(path, meanwhile, change, other):
    store, table = waiting_table(path)
    with store:
        if other == "rollback of a resize":
            table.resize(600)
        before, grads = table.step, table.lookup([3, 99, 450]) - SEVENS
        left = meanwhile(lambda: WAITS[other](store, table))
        CHANGES[change](store, table, grads)
        assert not left
        assert (table.lookup([3, 99, 450]) == 7).all()
        assert table.step == before + (change != "write")
        assert (table.lookup(np.arange(4, 99)) == 1).all()
        store.commit()
    with shardemb.open(path, "r") as store:
        assert (store[next(iter(store))].lookup([3, 99, 450]) == 7).all()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("other", ["drop", "rollback of its creation", "fewer rows", "no optimizer"])
def test_a_change_of_what_is_gone_by_then_is_refused(path, meanwhile, change, other):
    if other == "no optimizer" and change == "write":
        pytest.skip("a write needs none")
    store, table = waiting_table(path)
    kept = table
    others = {
        "drop": (lambda: store.drop_table("t"), TableNotFoundError),
        "rollback of its creation": (store.rollback, TableNotFoundError),
        "fewer rows": (lambda: table.resize(300, drop_rows=True), ShardEmbError),
        "no optimizer": (lambda: store.reshard("t", optimizer=None), ShardEmbError),
    }
    if other == "rollback of its creation":
        store.drop_table("t")
        store.commit()
        table = store.create_table(
            "t", num_embeddings=500, embedding_dim=DIM, optimizer=SGD(lr=1.0), initializer=Constant(0.0)
        )
    function, error = others[other]
    left = meanwhile(function)
    with pytest.raises(error):
        CHANGES[change](store, table, SEVENS)
    assert not left
    if other == "drop":
        store.rollback()
        assert kept.step == 0
        assert (kept.lookup([3, 99, 450])[:, 0] == [1, 1, 0]).all()
    close_quietly(store)


def test_rows_that_change_while_their_reset_waits_are_reset(path, meanwhile):
    store, table = waiting_table(path, initializer=Normal(0, 1))
    with store:
        table.reset_rows([3, 99])
        initial = table.lookup([3, 99, 450])
        table.write([99], SEVENS[:1])
        assert not inside.shards(table).were_written(np.array([450]))[
            0
        ]  # so the reset leaves it out at first
        left = meanwhile(lambda: table.write([3, 450], SEVENS[:2]))
        table.reset_rows([3, 99, 450])
        assert not left
        assert (table.lookup([3, 99, 450]) == initial).all()
        store.commit()


@pytest.mark.parametrize("other", ["resize", "resize there and back", "rename", "drop"])
def test_a_lookup_that_waits_sees_the_rows(path, meanwhile, other):
    store, table = waiting_table(path)
    others = WAITS | {"drop": lambda store, table: store.drop_table("t")}
    ids = np.arange(500)
    table.write([7, 450], SEVENS[:2])  # spilled by the next batch
    table.write([8], SEVENS[:1])
    assert inside.shards(table).overlay.spilled
    left = meanwhile(lambda: others[other](store, table))
    seen = table.lookup(ids)
    assert not left
    assert (seen[[7, 8, 450]] == 7).all()
    assert (seen[[6, 9, 99]] == 1).all()
    store.rollback()
    store.close()


@pytest.mark.parametrize("shared", [False, True])
def test_a_lookup_is_repeated_if_the_table_got_other_memory(path, monkeypatch, shared):
    """The files of the old memory may be those of the new one, into which a fold writes."""
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=500, embedding_dim=DIM, initializer=Constant(0.0))
        gather, memories = Shards.gather, []

        def slow(self, *arguments):
            memories.append(self)
            if len(memories) == 1:
                table.resize(700)
                table.write([1], SEVENS[:1])
            gather(self, *arguments)

        monkeypatch.setattr(Shards, "gather", slow)
        seen = inside.state(table).read_range("weight", 0, 500) if shared else table.lookup(np.arange(500))
        assert len(memories) == 2
        assert memories[1] is inside.shards(table)
        assert (seen[1] == 7).all()
        store.rollback()


def keyed(path):
    store = shardemb.open(path, memory_budget=0, log_bytes=1)
    words = store.create_vocabulary("words", key_type="string")
    table = store.create_table(
        "t", vocabulary="words", embedding_dim=DIM, optimizer=SGD(lr=1.0), initializer=Constant(0.0)
    )
    words.add(["a", "b", "c"])
    table.write(["a", "b", "c"], [np.full(DIM, float(n)) for n in (1, 2, 3)])
    store.commit()
    return store, words, table


def pass_on(store, words):
    """Remove a key, and give its row to another one."""
    row = words.lookup("b")
    words.remove(["b"])
    store.commit()
    assert words.add("z") == row


@pytest.mark.parametrize("together", [False, True])
def test_no_key_gets_what_was_meant_for_the_one_that_had_its_row_before(path, meanwhile, together):
    store, words, table = keyed(path)
    with store:
        left = meanwhile(lambda: pass_on(store, words))
        with pytest.raises(UnknownKeyError, match="'b'"):
            if together:
                store.update({"t": (["a", "b"], SEVENS[:2])})
            else:
                table.update(["a", "b"], SEVENS[:2])
        assert not left
        assert (table.lookup(["a", "z"])[:, 0] == [1, 0]).all()
        left = meanwhile(lambda: (words.remove(["c"]), store.commit(), words.add("y")))
        table.write(["a", "c"], SEVENS[:2], missing="skip")
        assert not left
        assert (table.lookup(["a", "y"])[:, 0] == [7, 0]).all()
        assert table.step == 0
        store.commit()


@pytest.mark.parametrize("together", [False, True])
def test_no_key_is_shown_the_row_of_the_one_that_has_it_now(path, monkeypatch, together):
    store, words, table = keyed(path)
    with store:
        gather, left = Shards.gather, [True]
        memory = inside.shards(table.rows)

        def slow(self, *arguments):
            if self is memory and left:
                left.pop()
                pass_on(store, words)
                table.write(["z"], SEVENS[:1])
            gather(self, *arguments)

        monkeypatch.setattr(Shards, "gather", slow)
        with pytest.raises(UnknownKeyError, match="'b'"):
            store.lookup({"t": ["a", "b"]}) if together else table.lookup(["a", "b"])
        assert not left
        store.rollback()


def test_an_export_gives_no_key_the_row_of_another(path, tmp_path, monkeypatch):
    store, words, table = keyed(path)
    read_range, left = type(inside.state(table.rows)).read_range, [True]

    def slow(self, *arguments):
        found = read_range(self, *arguments)
        if left and self is inside.state(table.rows):
            left.pop()
            pass_on(store, words)
            table.write(["z"], SEVENS[:1])
        return found

    with store:
        monkeypatch.setattr(type(inside.state(table.rows)), "read_range", slow)
        (batch,) = [each.to_pydict() for each in table.to_arrow_batches()]
        assert not left
        assert dict(zip(batch["key"], [row[0] for row in batch["embedding"]], strict=True)) == {
            "a": 1,
            "z": 7,
            "c": 3,
        }
        store.rollback()


def test_a_lookup_by_key_waits_for_a_rollback_that_takes_rows_back(path, monkeypatch):
    store, words, table = keyed(path)
    with store:
        pass_on(store, words)
        table.write(["z"], SEVENS[:1])
        restore, found = type(inside.session(store).vocabularies).restore, []

        def in_between(self):
            future = pool.submit(table.lookup, ["z"], missing="zeros")
            with contextlib.suppress(TimeoutError):
                found.append(future.result(timeout=0.2))
            restore(self)
            found.append(future)

        monkeypatch.setattr(type(inside.session(store).vocabularies), "restore", in_between)
        with ThreadPoolExecutor(1) as pool:
            store.rollback()
            assert (found[-1].result() == 0).all()
        assert len(found) == 1


def test_keys_are_not_added_to_a_vocabulary_that_is_dropped_while_they_wait(path):
    store, words, _ = keyed(path)
    begun, go = threading.Event(), threading.Event()

    def slow(self, nbytes):
        begun.set()
        self._folds.wait()
        go.wait(0.2)
        real(self, nbytes)

    real = MemoryBudget.make_room
    with store, pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(MemoryBudget, "make_room", slow)
        future = pool.submit(words.add, [f"w{n}" for n in range(100)])
        begun.wait()
        store.drop_table("t")
        store.drop_vocabulary("words")
        assert future.result().size == 100  # before the table was dropped
        patch.undo()
        store.rollback()
        assert len(words) == 3
