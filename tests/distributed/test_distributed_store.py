"""A distributed store through its life: rows, commits, other openings, handles in tasks, and what it refuses."""

import pickle

import numpy as np
import pytest

import shardemb
from shardemb.optim import SGD, Adam

IDS = np.arange(100)


def rows(seed, count=100, dim=4):
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def filled(store, optimizer=None):
    table = store.create_table("t", num_embeddings=100, embedding_dim=4, optimizer=optimizer or SGD(lr=1.0))
    table.write(IDS, rows(1))
    return table


def test_rows_come_back_in_the_order_and_shape_that_were_asked_for(new_store):
    table = filled(new_store())
    ids = np.random.default_rng(0).integers(0, 100, (6, 7))
    np.testing.assert_array_equal(table.lookup(ids), rows(1)[ids])
    assert table.lookup(np.empty((2, 0), int)).shape == (2, 0, 4)
    assert table.lookup(3).shape == (4,)
    out = np.empty((6, 7, 4), np.float32)
    assert table.lookup(ids, out=out) is out
    np.testing.assert_array_equal(out, rows(1)[ids])


def test_distinct_rows_are_looked_up_once(new_store):
    table = filled(new_store())
    found, ids, inverse = table.lookup_unique([[7, 7], [3, 7]])
    assert ids.tolist() == [3, 7]
    assert inverse.tolist() == [[1, 1], [0, 1]]
    np.testing.assert_array_equal(found, rows(1)[[3, 7]])


def test_an_update_sums_gradients_of_equal_ids_and_counts_everywhere(new_store):
    table = filled(new_store())
    table.update([5, 5, 6], np.ones((3, 4)))
    expected = rows(1)
    expected[5] -= 2
    expected[6] -= 1
    np.testing.assert_array_equal(table.lookup(IDS), expected)
    table.update(np.empty(0, int), np.empty((0, 4)))
    assert table.step == 2


def test_what_is_committed_is_there_after_another_opening(new_store):
    store = new_store()
    assert store.last_commit is None
    table = filled(store, Adam())
    table.update(IDS, rows(2))
    commit = store.commit(step=7, metadata={"loss": 0.5})
    expected, moments = table.lookup(IDS), table.state("exp_avg", IDS)
    table.update(IDS, rows(3))
    with pytest.warns(RuntimeWarning, match="are lost"):
        store.close()
    again = new_store()
    assert again.last_commit == commit == shardemb.Commit(1, 7, {"loss": 0.5})
    np.testing.assert_array_equal(again["t"].lookup(IDS), expected)
    np.testing.assert_array_equal(again["t"].state("exp_avg", IDS), moments)
    assert again["t"].step == 1
    assert again.commit().step == 7


def test_a_rollback_goes_back_in_all_partitions(new_store):
    store = new_store()
    table = filled(store)
    store.commit(step=1)
    assert not store.has_changes
    table.update(IDS, rows(2))
    store.create_table("u", num_embeddings=2, embedding_dim=1)
    assert store.has_changes
    store.rollback()
    assert not store.has_changes
    assert list(store) == ["t"]
    np.testing.assert_array_equal(store["t"].lookup(IDS), rows(1))
    store["t"].update(IDS, rows(2))
    store.commit(step=2)
    np.testing.assert_array_equal(store["t"].lookup(IDS), rows(1) - rows(2))


def test_a_table_that_was_dropped_is_gone_with_the_commit(new_store):
    store = new_store()
    filled(store)
    store.commit(step=1)
    store.drop_table("t")
    with pytest.raises(shardemb.TableNotFoundError, match="no table 't'"):
        store["t"]
    store.rollback()
    assert "t" in store
    store.drop_table("t")
    store.commit(step=2)
    store.close()
    assert list(new_store()) == []


def train(store, ids, gradients):
    """Run in a task, on a worker."""
    table = store["t"]
    found = table.lookup(ids)
    table.update(ids, gradients)
    return found


def test_a_task_trains_by_a_handle(new_store, cluster):
    store = new_store()
    filled(store)
    done = cluster.client.submit(train, store, IDS[::-1].copy(), rows(2), workers=[1], pure=False)
    np.testing.assert_array_equal(done.result(), rows(1)[::-1])
    store.commit(step=1)
    np.testing.assert_array_equal(store["t"].lookup(IDS), rows(1) - rows(2)[::-1])


def fails_once(store, marker):
    """Run in a task."""
    store["t"].update(IDS, rows(2))
    if not marker.exists():
        marker.touch()
        msg = "the first run fails"
        raise OSError(msg)


def test_a_task_that_runs_again_changes_nothing_a_second_time(new_store, cluster, tmp_path):
    store = new_store()
    filled(store)
    done = cluster.client.submit(fails_once, store, tmp_path / "marker", retries=1, pure=False)
    with pytest.raises(shardemb.EraEndedError, match=r"task fails_once-.* was started again"):
        done.result()
    store.commit(step=1)
    np.testing.assert_array_equal(store["t"].lookup(IDS), rows(1) - rows(2))


def train_twice(store, table):
    """Run in a task, with two handles."""
    store["t"].update(IDS, rows(2))
    table.update(IDS, rows(3))


def test_handles_of_one_task_make_changes_in_turn(new_store, cluster):
    store = new_store()
    table = filled(store)
    cluster.client.submit(train_twice, store, table, pure=False).result()
    np.testing.assert_array_equal(table.lookup(IDS), rows(1) - rows(2) - rows(3))


def test_only_the_process_that_opened_a_store_commits(new_store, cluster):
    store = new_store()
    for call in ("commit", "rollback"):
        done = cluster.client.submit(lambda store, call: getattr(store, call)(), store, call, pure=False)
        with pytest.raises(shardemb.ShardEmbError, match=f"{call} belongs to the process that opened"):
            done.result()


def test_facts_about_each_partition(new_store):
    store = new_store()
    store.create_table("t", num_embeddings=10, embedding_dim=2)
    store.commit(step=3)
    found = store.info()
    assert list(found) == [0, 1, 2, 3]
    for part, each in found.items():
        assert (each.partition.number, each.partition.head, each.commit.step) == (part, store.uuid, 3)
    assert [each.tables[0].num_embeddings for each in found.values()] == [3, 3, 2, 2]


def test_a_handle_in_no_task_says_where_it_works(new_store):
    handle = pickle.loads(pickle.dumps(new_store()))
    with pytest.raises(ValueError, match="No worker"):
        handle.stats()


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda table: table.lookup([100]), shardemb.RowIdError),
        (lambda table: table.lookup([-1]), shardemb.RowIdError),
        (lambda table: table.lookup([0.5]), TypeError),
        (lambda table: table.lookup([1], dtype="float63"), ValueError),
        (lambda table: table.update([1], np.ones((2, 4))), ValueError),
        (lambda table: table.update([1], np.full((1, 4), np.nan)), ValueError),
        (lambda table: table.write([1], np.full((1, 4), np.inf)), ValueError),
        (lambda table: table.state("no", [1]), ValueError),
        (lambda table: table.set_optimizer(Adam()), ValueError),
        (
            lambda table: table.store.create_table("t", num_embeddings=1, embedding_dim=1),
            shardemb.TableExistsError,
        ),
        (
            lambda table: table.store.create_table(
                "u", num_embeddings=100, embedding_dim=4, initializer=rows(1)
            ),
            TypeError,
        ),
        (
            lambda table: table.store.create_table("u", num_embeddings=9, embedding_dim=1, rows_per_shard=-1),
            ValueError,
        ),
        (lambda table: table.store.create_table("u", num_embeddings=0, embedding_dim=1), ValueError),
        (lambda table: table.store.drop_table("u"), shardemb.TableNotFoundError),
        (lambda table: table.store.commit(step=-1), ValueError),
        (lambda table: table.store.commit(metadata={"a": object()}), TypeError),
    ],
)
def test_what_is_refused_changes_nothing_and_the_era_goes_on(new_store, call, error):
    store = new_store()
    table = filled(store)
    with pytest.raises(error):
        call(table)
    np.testing.assert_array_equal(table.lookup(IDS), rows(1))
    table.update([1], np.ones((1, 4)))
    assert store.commit(step=1).id == 1


def test_a_closed_store_says_so(new_store):
    store = new_store()
    table = filled(store)
    with pytest.warns(RuntimeWarning, match=r"since its last commit are lost: close\(\) never commits"):
        store.close()
    store.close()
    for call in (lambda: table.lookup([1]), store.commit, store.rollback):
        with pytest.raises(shardemb.StoreClosedError, match="was closed"):
            call()


def test_workers_that_are_no_good_owners_are_warned_of(new_store, monkeypatch):
    monkeypatch.setattr("shardemb.distributed.clusters.complaints", lambda workers, settings: ["too little"])
    with pytest.warns(RuntimeWarning, match="too little"):
        new_store()
