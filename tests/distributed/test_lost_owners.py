"""What happens when a process ends, stops or is replaced, or a folder is not what it should be."""

import pickle
import shutil
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace

import numpy as np
import pytest

import shardemb
from shardemb.optim import SGD

IDS = np.arange(40)
ONES = np.ones((40, 2), np.float32)


def committed(store):
    """A table with a commit, in which all numbers are -1, and an update that is in none."""
    table = store.create_table("t", num_embeddings=40, embedding_dim=2, optimizer=SGD(lr=1.0))
    table.update(IDS, ONES)
    store.commit(step=8)
    table.update(IDS, ONES)
    return table


# ---- processes


def test_a_killed_owner_is_named_and_comes_back_to_the_last_commit(new_store, cluster):
    store = new_store()
    table = committed(store)
    handle = pickle.dumps(store)
    cluster.kill(0)
    with pytest.raises(
        shardemb.OwnerLostError, match=r"tcp.* it has the partitions 0, 2 of .* commit 1 \(step 8\)"
    ):
        table.lookup(IDS)
    np.testing.assert_array_equal(table.lookup(IDS), -ONES)
    table.update(IDS, ONES)
    assert store.commit().id == 2
    done = cluster.client.submit(lambda handle: pickle.loads(handle)["t"].lookup(1), handle, pure=False)
    with pytest.raises(shardemb.EraEndedError, match="Go on from its last commit, with a new handle"):
        done.result()


def test_an_owner_that_is_killed_between_calls_is_noticed_by_the_next(new_store, cluster):
    store = new_store()
    table = committed(store)
    before = cluster.kill(1)
    cluster.wait_for(1, before)
    with pytest.raises(shardemb.OwnerLostError):
        table.update(IDS, ONES)
    np.testing.assert_array_equal(table.lookup(IDS), -ONES)


@pytest.mark.parametrize("call", ["commit", "verify", "stats"])
def test_all_calls_name_a_lost_owner(new_store, cluster, call):
    store = new_store()
    committed(store)
    cluster.kill(0)
    with pytest.raises(shardemb.OwnerLostError):
        getattr(store, call)()
    assert store.last_commit.id == 1


def test_a_stopped_owner_is_noticed_by_the_deadline(new_store, cluster):
    store = new_store(deadline_s=1.0, recover_s=2.0)
    table = committed(store)
    cluster.kill(0, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        with pytest.raises(shardemb.OwnerLostError, match=r"did not answer within 1 s"):
            table.lookup(IDS)
        with pytest.raises(shardemb.OwnerLostError, match="did not answer"):  # no era without it
            table.lookup(IDS)
        assert time.monotonic() - begin < 10
    finally:
        cluster.kill(0, signal.SIGCONT)
    np.testing.assert_array_equal(table.lookup(IDS), -ONES)


def test_a_call_that_takes_longer_than_the_deadline_is_no_loss(new_store, cluster, monkeypatch):
    """It answers that the call is under way, each time that it is asked."""
    store = new_store(deadline_s=0.7)
    committed(store)
    assert store.link.ask(Sleep(2.0)) == dict.fromkeys(range(4), 2.0)


class Sleep:
    """Asked of a partition."""

    def __init__(self, seconds):
        self.seconds = seconds

    def answer(self, partition):
        time.sleep(self.seconds / 2)
        return self.seconds


PROGRAM = """
import sys, distributed, shardemb.distributed
with distributed.Client(sys.argv[1]) as client:
    store = shardemb.distributed.open(client, sys.argv[2])
    store["t"].update([1], [[5.0, 5.0]])
    print("changed", flush=True)
    sys.stdin.read()
"""


def test_a_killed_coordinator_leaves_what_it_has_committed(new_store, cluster, tmp_path):
    store = new_store()
    committed(store)
    store.rollback()
    store.close()
    command = [sys.executable, "-c", PROGRAM, cluster.client.scheduler.address, str(tmp_path / "head.zarr")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "changed\n"
        with pytest.raises(shardemb.StoreLockedError):
            new_store()
        process.kill()
    again = new_store()
    np.testing.assert_array_equal(again["t"].lookup(IDS), -ONES)


def test_of_two_coordinators_the_older_one_is_refused(new_store, cluster, tmp_path):
    """A copy of the head has a lock of its own."""
    store = new_store()
    committed(store)
    store.rollback()
    store.close()
    shutil.copytree(tmp_path / "head.zarr", tmp_path / "copy.zarr")
    cluster.open(tmp_path / "copy.zarr").close()
    store = new_store()
    committed_table = store["t"]
    with cluster.open(tmp_path / "copy.zarr") as newer:
        for call in (
            lambda: committed_table.update(IDS, ONES),
            store.commit,
            lambda: committed_table.lookup(0),
        ):
            with pytest.raises(shardemb.EraEndedError):
                call()
        newer["t"].update(IDS, ONES)
        newer.commit(step=9)
        np.testing.assert_array_equal(newer["t"].lookup(IDS), -2 * ONES)
    store.close()


# ---- folders


@pytest.fixture
def folders(new_store, tmp_path):
    """The folders of a store's partitions, which is closed at commit 2; next to each a copy of commit 1."""
    store = new_store()
    committed(store)
    store.rollback()
    store.close()
    found = [tmp_path / f"owner-{part % 2}" / f"{part:05}.zarr" for part in range(4)]
    for folder in found:
        shutil.copytree(folder, folder.with_name(f"{folder.name}.old"))
    store = new_store()
    store["t"].update(IDS, ONES)
    store.commit(step=9)
    store.close()
    return found


def replaced(folder, by):
    shutil.rmtree(folder)
    shutil.copytree(by, folder)


def refused(new_store, folders, match):
    """Opening is refused by name, and works when the folder is what it was."""
    with pytest.raises(shardemb.PartitionError, match=match):
        new_store()
    with pytest.raises(shardemb.PartitionError, match=match):  # nothing was left locked by the first
        new_store()


def test_an_older_copy_of_a_partition_is_refused(new_store, folders):
    shutil.move(folders[2], folders[2].with_name("now"))
    shutil.copytree(folders[2].with_name("00002.zarr.old"), folders[2])
    refused(new_store, folders, r"partition 2 of 4 of the store .* is at commit 1, but .* is 2")
    replaced(folders[2], folders[2].with_name("now"))
    np.testing.assert_array_equal(new_store()["t"].lookup(IDS), -2 * ONES)


def test_a_missing_partition_is_refused_and_not_made_anew(new_store, folders):
    shutil.move(folders[1], folders[1].with_name("elsewhere"))
    refused(
        new_store, folders, r"partition 1 of 4 .* is missing: there is none at .*00001.zarr of the worker tcp"
    )
    assert not folders[1].exists()


def test_a_partition_of_another_number_is_refused(new_store, folders):
    replaced(folders[1], folders[3])
    refused(new_store, folders, r"is partition 3 of 4 .*, where partition 1 of 4 .* should be")


def test_a_partition_of_another_store_is_refused(new_store, folders, cluster, tmp_path):
    cluster.open(
        tmp_path / "other" / "head.zarr", owners=cluster.owners(tmp_path / "other"), partitions=4
    ).close()
    replaced(folders[0], tmp_path / "other" / "owner-0" / "00000.zarr")
    refused(
        new_store,
        folders,
        r"is partition 0 of 4 of the store .*, where partition 0 of 4 of the store .* should",
    )


def test_an_ordinary_store_in_the_place_of_a_partition_is_refused(new_store, folders):
    shutil.rmtree(folders[0])
    shardemb.open(folders[0]).close()
    refused(new_store, folders, "is a store of its own and no partition")


def test_partitions_that_were_moved_are_opened_where_they_are(new_store, folders, cluster, tmp_path):
    shutil.move(tmp_path / "owner-1", tmp_path / "elsewhere")
    store = new_store(owners={"0": tmp_path / "owner-0", "1": tmp_path / "elsewhere"})
    np.testing.assert_array_equal(store["t"].lookup(IDS), -2 * ONES)
    store.close()
    np.testing.assert_array_equal(new_store()["t"].lookup(IDS), -2 * ONES)  # it is remembered


def test_all_partitions_know_what_an_older_head_does_not(new_store, folders, cluster, tmp_path):
    """All are at a commit that the head has not: it follows them."""
    shutil.copytree(tmp_path / "head.zarr", tmp_path / "older.zarr")
    store = new_store()
    store["t"].update(IDS, ONES)
    store.commit(step=10, metadata={"a": 1})
    store.close()
    replaced(tmp_path / "head.zarr", tmp_path / "older.zarr")
    again = new_store()
    assert again.last_commit == shardemb.Commit(3, 10, {"a": 1})
    np.testing.assert_array_equal(again["t"].lookup(IDS), -3 * ONES)


# ---- arguments


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"mode": "w"}, ValueError, "mode must be"),
        ({"owners": {}}, ValueError, "must name at least one worker"),
        ({"partitions": 0}, ValueError, "partitions"),
        ({"partitions": 8}, ValueError, "has 4 partitions, which is fixed"),
        ({"mode": "w-"}, shardemb.StoreExistsError, None),
        ({"owners": {"nobody": "/nowhere"}, "recover_s": 0.1}, shardemb.OwnerLostError, "no worker 'nobody'"),
        ({"owners": {"127.0.0.1": "/nowhere"}}, shardemb.PartitionError, "2 workers run on the host"),
        ({"deadline_s": "soon"}, TypeError, "deadline_s"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(new_store, folders, options, error, match):
    with pytest.raises(error, match=match):
        new_store(**options)
    np.testing.assert_array_equal(new_store()["t"].lookup(IDS), -2 * ONES)


def test_a_store_that_is_not_there_is_not_created_without_owners(cluster, tmp_path):
    with pytest.raises(shardemb.StoreNotFoundError, match="owners="):
        cluster.open(tmp_path / "head.zarr")
    with pytest.raises(shardemb.StoreNotFoundError):
        cluster.open(tmp_path / "head.zarr", mode="r+")


def test_a_store_of_one_machine_is_no_head(cluster, tmp_path):
    with shardemb.open(tmp_path / "head.zarr") as store:
        store.create_table("t", num_embeddings=1, embedding_dim=1)
        store.commit()
    with pytest.raises(shardemb.FormatError, match=r"a store of one machine: open it with shardemb\.open"):
        cluster.open(tmp_path / "head.zarr", owners=cluster.owners(tmp_path))


def test_a_worker_that_gives_no_answer_is_lost(new_store, cluster):
    """As one does that is ending."""

    def silence(dask_worker):
        dask_worker.kept = dask_worker.handlers["shardemb_call"]
        dask_worker.handlers["shardemb_call"] = lambda **given: None

    def restore(dask_worker):
        dask_worker.handlers["shardemb_call"] = dask_worker.kept

    table = committed(new_store())
    cluster.client.run(silence)
    try:
        with pytest.raises(shardemb.OwnerLostError, match="gave no answer"):
            table.lookup(IDS)
    finally:
        cluster.client.run(restore)
    np.testing.assert_array_equal(table.lookup(IDS), -ONES)


def test_another_version_is_refused_by_name(tmp_path):
    """Nothing is created, and nothing is held."""
    pytest.importorskip("distributed.client", reason="distributed is not installed")
    from shardemb.distributed import owner

    holding, path = owner.Holding("tcp://node-1:1234"), tmp_path / "00000.zarr"
    asked = owner.Hold(str(uuid.uuid4()), {0: str(path)}, 1, may_create=True)
    with pytest.raises(
        shardemb.PartitionError, match=r"node-1:1234 has shardemb .*, and who opens .* has 0.0.1"
    ):
        holding.hold(replace(asked, version="0.0.1"))
    assert not path.exists()
    assert [each.part for each in holding.hold(asked)] == [0]
    holding.close()
