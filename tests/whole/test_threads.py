"""Threads: lookups beside updates, commits and closing; changes that wait for each other."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import inside
from support.model import TableModel, assert_same_bits
from support.stores import close_quietly
from support.threads import Threads

import shardemb
from shardemb.compute import plan, scheduler
from shardemb.engine.shards import Shards
from shardemb.errors import StoreClosedError, TableNotFoundError
from shardemb.initializers import Constant, Normal
from shardemb.optim import SGD, Adam

ROWS, DIM = 4000, 16
STILL, MOVING = np.arange(0, 2000), np.arange(2000, 4000)


@pytest.fixture(autouse=True)
def small_tasks(monkeypatch):
    """Let every batch be cut into tasks for dask's threads."""
    monkeypatch.setattr(plan, "TASK_BYTES", 10_000)


def new_table(store, **arguments):
    defaults = {
        "num_embeddings": ROWS,
        "embedding_dim": DIM,
        "optimizer": SGD(lr=1.0),
        "initializer": Normal(seed=1),
    }
    table = store.create_table("t", rows_per_shard=256, **(defaults | arguments))
    store.commit()
    return table


def test_lookups_of_other_rows_are_exact_beside_updates_commits_and_rollbacks(store):
    table = new_table(store)
    expected = table.lookup(STILL)

    def look():
        assert_same_bits(table.lookup(STILL), expected)
        assert_same_bits(store.lookup({"t": STILL[::7]})["t"], expected[::7])
        rows, _, inverse = table.lookup_unique(STILL[::3])
        assert_same_bits(rows[inverse], expected[::3])

    ones = np.ones((2000, DIM), np.float32)
    with Threads(look, look, lambda: table.to_dask_array()[:100].compute()):
        for turn in range(12):
            table.update(MOVING, ones)
            table.write(MOVING[:500], ones[:500])
            table.prefetch(MOVING, for_update=True)
            if turn % 3 == 0:
                store.rollback()
            elif turn % 3 == 1:
                store.commit()


def test_a_row_seen_beside_updates_is_made_of_old_and_new_values(store):
    table = new_table(store, initializer=Constant(0.0))
    ones = np.ones((ROWS, DIM), np.float32)

    def look():
        before = -table.step
        rows = table.lookup(np.arange(ROWS))
        after = -table.step - 1  # the step that is being taken may be seen already
        assert after <= rows.min() <= rows.max() <= before
        assert (rows == np.round(rows)).all()

    with Threads(look, look):
        for turn in range(30):
            table.update(np.arange(ROWS), ones)
            if turn % 10 == 9:
                store.commit()
    assert (table.lookup(np.arange(ROWS)) == -30).all()


def test_rows_written_for_the_first_time_are_seen_as_initial_or_written(store):
    table = new_table(store, initializer=Constant(5.0))
    ids = np.arange(ROWS)

    def look():
        rows = table.lookup(ids)
        assert ((rows == 5) | (rows == 7)).all()

    with Threads(look, look):
        for part in np.array_split(np.random.default_rng(0).permutation(ids), 20):
            table.write(part, np.full((part.size, DIM), 7.0, np.float32))
        store.commit()
        store.rollback()
    assert (table.lookup(ids) == 7).all()


def test_updates_of_several_threads_exclude_each_other(store):
    table = new_table(store, initializer=Constant(0.0), optimizer=SGD(lr=1.0))
    ids = np.arange(ROWS)
    ones = np.ones((ROWS, DIM), np.float32)
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(table.update, ids, -ones) for _ in range(40)]:
            future.result()
    assert table.step == 40
    assert (table.lookup(ids) == 40).all()


def test_commits_of_several_threads_exclude_each_other(store):
    table = new_table(store, optimizer=Adam())
    ones = np.ones((10, DIM), np.float32)

    def work(number):
        table.update(np.arange(10) + 10 * number, ones)
        return store.commit(step=number).id

    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(work, range(12)))
    assert sorted(ids) == list(range(2, 14))
    assert table.step == 12


def test_a_commit_holds_whole_updates_only(path):
    # A thread trains, this one commits: whatever is committed is a number of whole steps.
    with shardemb.open(path) as store:
        table = new_table(store, initializer=Constant(0.0))
        ids, ones = np.arange(ROWS), np.ones((ROWS, DIM), np.float32)
        with Threads(lambda: table.update(ids, -ones)):
            for _ in range(5):
                store.commit()
                with shardemb.open(path, "r") as reader:
                    assert (reader["t"].lookup(ids) == reader["t"].step).all()
                    assert reader.last_commit == store.last_commit
        store.commit()


def test_tables_are_created_renamed_and_dropped_beside_lookups(store):
    table = new_table(store)
    expected = table.lookup(STILL)

    def look():
        assert_same_bits(table.lookup(STILL), expected)
        for name in list(store):
            try:
                store[name].lookup([0])
            except TableNotFoundError:
                pass

    with Threads(look, look):
        for turn in range(8):
            other = store.create_table(f"o{turn}", num_embeddings=100, embedding_dim=3)
            other.write([1], np.ones((1, 3)))
            store.rename_table("t", f"t{turn}")
            store.commit()
            store.rename_table(f"t{turn}", "t")
            store.drop_table(f"o{turn}")
            if turn % 2:
                store.commit()
            else:
                store.rollback()
                store.rename_table(f"t{turn}", "t")
                store.drop_table(f"o{turn}")


@pytest.mark.parametrize("busy", ["lookup", "update", "commit", "to_dask_array", "store.lookup", "prefetch"])
def test_closing_beside_work_lets_it_end_or_refuses_it(path, busy):
    ids, ones = np.arange(ROWS), np.ones((ROWS, DIM), np.float32)
    work = {
        "lookup": lambda store, table: table.lookup(ids),
        "update": lambda store, table: table.update(ids, ones),
        "commit": lambda store, table: (table.write(ids, ones), store.commit()),
        "to_dask_array": lambda store, table: table.to_dask_array().sum().compute(),
        "store.lookup": lambda store, table: store.lookup({"t": ids}),
        "prefetch": lambda store, table: table.prefetch(ids, for_update=True),
    }[busy]
    for turn in range(6):
        store = shardemb.open(f"{path}{turn}")
        table = new_table(store)

        def until_closed(store=store, table=table):
            done = 0
            while True:
                try:
                    work(store, table)
                except StoreClosedError:
                    return done
                done += 1

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(until_closed) for _ in range(2)]
            time.sleep(0.003 * turn)
            close_quietly(store)
            for future in futures:
                future.result(timeout=60)
        with shardemb.open(f"{path}{turn}", "r") as store:
            rows = store["t"].lookup(ids)
            assert np.isfinite(rows).all()
            if store.last_commit.id > 1:
                assert (rows == 1).all()


def test_close_waits_for_an_update_that_runs(store, monkeypatch):
    table = new_table(store)
    run = scheduler.run
    begun = threading.Event()

    def slow(tasks, threads, *more):
        begun.set()
        time.sleep(0.1)
        return run(tasks, threads, *more)

    monkeypatch.setattr(scheduler, "run", slow)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(table.write, STILL, np.ones((2000, DIM), np.float32))
        begun.wait()
        with pytest.warns(RuntimeWarning, match="lost"):  # what it wrote, so it had ended
            store.close()
        future.result()


def test_close_waits_for_the_prefetch_that_runs_and_drops_the_others(store, monkeypatch):
    table = new_table(store)
    begun = []

    def slow(self, rows, start, stop):
        begun.append(rows.tolist())
        time.sleep(0.1)

    monkeypatch.setattr(Shards, "read_ahead", slow)
    for row in range(5):
        table.prefetch([row])
    while not begun:
        time.sleep(0.001)
    store.close()
    assert len(begun) < 5
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shardemb")]
    with pytest.raises(StoreClosedError):
        table.prefetch([1])


def test_a_lookup_that_runs_while_the_store_closes_reads_on(store, monkeypatch):
    table = new_table(store)
    expected = table.lookup(STILL)
    begun, closed = threading.Event(), threading.Event()
    gather = Shards.gather

    def slow(*arguments):
        begun.set()
        closed.wait()
        gather(*arguments)

    monkeypatch.setattr(Shards, "gather", slow)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(table.lookup, STILL)
        begun.wait()
        store.close()
        closed.set()
        assert_same_bits(future.result(), expected)


def test_a_lookup_of_keys_that_meets_a_close_finds_them_or_is_told(store, monkeypatch):
    """Never that there are none."""
    words = store.create_vocabulary("words", key_type="int64")
    words.add(np.arange(100))
    store.commit()
    hashes = inside.key_rows(words)._hashes

    def close_meanwhile(checked):
        found = hashes(checked)
        store.close()
        return found

    monkeypatch.setattr(inside.key_rows(words), "_hashes", close_meanwhile)
    with pytest.raises(StoreClosedError):
        words.lookup(np.arange(100))


def test_stores_in_several_threads(tmp_path):
    arguments = {
        "num_embeddings": 500,
        "embedding_dim": 8,
        "optimizer": Adam(lr=0.1),
        "initializer": Normal(seed=1),
    }

    def train(number):
        model = TableModel.new("t", **arguments)
        rng = np.random.default_rng(number)
        with shardemb.open(tmp_path / f"{number}.zarr") as store:
            table = store.create_table("t", **arguments)
            for step in range(8):
                ids, numbers = rng.integers(0, 500, 200), rng.normal(size=(200, 8)).astype(np.float32)
                table.update(ids, numbers)
                model.update(ids, numbers)
                store.commit(step=step)
            model.assert_matches(table)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(train, range(6)))
