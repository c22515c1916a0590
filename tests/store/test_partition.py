"""A partition: its vote, the decision of others, and what an opening makes of one without the other."""

import contextlib
import errno
import os
import random
import signal
import time
import warnings

import numpy as np
import pytest
from support import inside

import shardemb
from shardemb.commits import fold, log_writer
from shardemb.engine import filling
from shardemb.errors import DiskFullError
from shardemb.format.manifest import Manifest, PartitionIdentity
from shardemb.initializers import Uniform
from shardemb.optim import Adam
from shardemb.session import display
from shardemb.storage import files
from shardemb.store.partition import Partition

IDENTITY = PartitionIdentity("0b5f4a2e-54b1-4a52-8f0c-0d2b8f3c1e11", number=3, count=16)

FIRST, SECOND, THIRD = ((number, (1, "head", number)) for number in (1, 2, 3))


@pytest.fixture
def part(path):
    """A partition with a table and one commit."""
    with Partition.create(path, IDENTITY) as part:
        store = part.open((0, None))
        table = store.create_table("t", num_embeddings=100, embedding_dim=4, optimizer=Adam(lr=0.1))
        table.write([1], np.ones((1, 4), np.float32))
        part.prepare(FIRST, step=5, metadata={"seen": 1})
        part.decide()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of changes that are not committed
            yield part
            part.close()


def write(part, value):
    part.store["t"].write([1], np.full((1, 4), value, np.float32))


def value(store):
    return store["t"].lookup(1)[0]


def reopened(part, decided):
    """Close a partition and open it at what was decided."""
    path = part.store.path
    part.close()
    again = Partition.hold(path)
    again.open(decided)
    return again


# ---- a vote and a decision --------------------------------------------------------------------------------------


def test_a_commit_has_two_halves(part):
    assert part.status.decided == FIRST
    write(part, 2)
    part.prepare(SECOND, step=6)
    assert (part.status.decided, part.status.prepared) == (FIRST, SECOND)
    assert part.store.last_commit.step == 5
    part.decide()
    assert (part.status.decided, part.status.prepared) == (SECOND, None)
    assert (part.store.last_commit.step, part.store.has_changes) == (6, False)
    assert value(part.store) == 2


def test_what_is_abandoned_counts_as_changed_again(part):
    write(part, 2)
    part.prepare(SECOND)
    part.abandon()
    assert (part.status.decided, part.status.prepared) == (FIRST, None)
    assert part.store.has_changes
    assert value(part.store) == 2
    part.store.rollback()
    assert value(part.store) == 1


def test_an_attempt_after_an_abandoned_one_has_its_changes_too(part):
    part.store["t"].write([7], np.full((1, 4), 7, np.float32))
    part.prepare(SECOND)
    part.abandon()
    write(part, 2)
    part.prepare((2, (1, "head", 9)))
    part.decide()
    with reopened(part, (2, (1, "head", 9))) as again:
        assert again.store["t"].lookup([1, 7])[:, 0].tolist() == [2, 7]


@pytest.mark.parametrize("decided", [(1, (1, "head", 2)), (3, (1, "head", 2)), (2, None), (0, None)], ids=str)
def test_only_the_next_commit_can_be_prepared(part, decided):
    with pytest.raises(shardemb.PartitionError, match="at commit 1"):
        part.prepare(decided)
    assert part.status.prepared is None


@pytest.mark.parametrize(
    "decided", [2, (2,), (2, (1, "head")), (2, (1, 2, 3)), (2, ("a", "head", 1))], ids=str
)
def test_what_is_no_attempt_is_refused(part, decided):
    with pytest.raises((TypeError, ValueError)):
        part.prepare(decided)
    assert part.status.prepared is None


def test_what_came_over_a_wire_as_lists_is_the_same(part):
    part.prepare([2, [1, "head", 2]])
    assert part.status.prepared == SECOND
    with reopened(part, [2, [1, "head", 2]]) as again:
        assert again.status.decided == SECOND


def test_nothing_prepared_is_neither_decided_nor_abandoned(part):
    for call in (part.decide, part.abandon):
        with pytest.raises(shardemb.PartitionError, match="nothing is prepared"):
            call()


def test_a_second_vote_before_the_decision_is_refused(part):
    write(part, 2)
    part.prepare(SECOND)
    with pytest.raises(shardemb.PartitionError, match="prepared and not decided"):
        part.prepare((2, (1, "head", 3)))
    assert part.status.prepared == SECOND


@pytest.mark.parametrize("name", ["rollback", "checkpoint"])
def test_what_would_wait_for_the_decision_is_refused(part, name):
    write(part, 2)
    part.prepare(SECOND)
    with pytest.raises(shardemb.PartitionError, match="decide or abandon it first"):
        getattr(part.store, name)()
    assert (part.status.prepared, value(part.store)) == (SECOND, 2)
    part.decide()
    getattr(part.store, name)()


@pytest.mark.parametrize(
    "commit",
    [
        lambda store: store.commit(),
        lambda store: store.commit(wait=False),
        lambda store: store.reshard("t", rows_per_shard=10),
    ],
)
def test_a_partition_does_not_commit_alone(part, commit):
    write(part, 2)
    with pytest.raises(shardemb.PartitionError, match="partition 3 of 16 .* does not commit alone"):
        commit(part.store)
    assert part.status.decided == FIRST
    assert value(part.store) == 2


def test_nor_does_it_go_back_to_a_tag_alone(part):
    part.store.tag("best")
    with pytest.raises(shardemb.PartitionError, match="does not commit alone"):
        part.store.restore("best")


def test_a_full_disk_is_no_vote(part, monkeypatch):
    def full(self, nbytes):
        raise DiskFullError(28, "full")

    write(part, 2)
    with monkeypatch.context() as patch, pytest.raises(DiskFullError):
        patch.setattr(log_writer.Log, "begin", full)
        part.prepare(SECOND)
    assert (part.status.prepared, part.store.has_changes) == (None, True)
    part.prepare(SECOND)
    with monkeypatch.context() as patch:
        patch.setattr(log_writer.Log, "begin", full)
        with pytest.raises(DiskFullError):
            part.abandon()
        assert part.status.prepared == SECOND
        part.decide()  # which has its space since the vote
    assert part.status.decided == SECOND


def test_ctrl_c_just_after_a_vote_leaves_it_a_vote(part, monkeypatch):
    real = log_writer.Log.append_prepared

    def append(self, manifest):
        real(self, manifest)
        os.kill(os.getpid(), signal.SIGINT)

    write(part, 2)
    monkeypatch.setattr(log_writer.Log, "append_prepared", append)
    with pytest.raises(KeyboardInterrupt):
        part.prepare(SECOND)
    assert part.status.prepared == SECOND
    part.decide()
    assert (part.status.decided, value(part.store)) == (SECOND, 2)


@pytest.mark.parametrize("decides", [True, False])
@pytest.mark.parametrize("name", ["write", "sync_data"])
@pytest.mark.parametrize("number", range(4))
def test_a_disk_that_fails_ends_it_and_the_next_opening_follows_the_head(
    path, monkeypatch, decides, name, number
):
    """At whichever write or sync of a vote, a decision or the giving up of one."""
    head, left, real = (0, None), [number], getattr(files, name)

    def fail(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.EIO, "the disk has failed")
        return real(*arguments)

    with Partition.create(path, IDENTITY) as part:
        store = part.open(head)
        store.create_table("t", num_embeddings=100, embedding_dim=4)
        write(part, 1)
        with monkeypatch.context() as patch, contextlib.suppress(OSError):
            patch.setattr(files, name, fail)
            part.prepare(FIRST)
            head = FIRST if decides else head
            part.decide() if decides else part.abandon()
        if left[0] < 0:
            following = part.status.commit + 1, (1, "head", 2)
            with pytest.raises(shardemb.PoisonedError):
                part.decide() if part.status.prepared else part.prepare(following)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of changes that are not committed
            part.close()
    with Partition.hold(path) as again:
        assert head in (again.status.decided, again.status.prepared)
        store = again.open(head)
        assert ("t" in store) == (head == FIRST)
        assert head == (0, None) or value(store) == 1
        assert store.verify() == []


# ---- in doubt ---------------------------------------------------------------------------------------------------


def in_doubt(part):
    """Leave a partition with a vote and without a decision; return its path."""
    path = part.store.path
    write(part, 2)
    part.prepare(SECOND, step=6)
    part.close()
    return path


@pytest.mark.parametrize(("decided", "expected"), [(FIRST, 1), (SECOND, 2)])
def test_in_doubt_it_becomes_what_was_decided(part, decided, expected):
    path = in_doubt(part)
    with Partition.hold(path) as again:
        assert (again.identity, again.status.decided, again.status.prepared) == (IDENTITY, FIRST, SECOND)
        store = again.open(decided)
        assert (again.status.decided, again.status.prepared) == (decided, None)
        assert (value(store), store.has_changes, store.verify()) == (expected, False, [])
    with Partition.hold(path) as again:
        assert (again.status.decided, again.status.prepared) == (decided, None)
    with shardemb.open(path, "r") as reader:
        assert value(reader) == expected


def test_holding_it_changes_nothing(part):
    path = in_doubt(part)
    before = {each: each.read_bytes() for each in path.rglob("*") if each.is_file() and each.name != "lock"}
    for _ in range(2):
        with Partition.hold(path) as again:
            assert again.status.prepared == SECOND
    assert before == {each: each.read_bytes() for each in before}


@pytest.mark.parametrize("decided", [(0, None), (2, (1, "head", 3)), (3, (1, "head", 3)), (1, None)], ids=str)
def test_it_is_not_opened_at_anything_else(part, decided):
    path = in_doubt(part)
    with Partition.hold(path) as again:
        with pytest.raises(shardemb.PartitionError, match="at commit 1 .* was decided"):
            again.open(decided)
        with pytest.raises(shardemb.PartitionError, match="is not open"):
            _ = again.store
        assert again.status.prepared == SECOND
        assert value(again.open(SECOND)) == 2


@pytest.mark.parametrize("decided", [FIRST, SECOND])
def test_an_opening_that_fails_half_way_goes_on_with_the_same_decision(part, monkeypatch, decided):
    def full(*arguments):
        raise DiskFullError(errno.ENOSPC, "full")

    path = in_doubt(part)
    with Partition.hold(path) as again:
        with monkeypatch.context() as patch, pytest.raises(DiskFullError):
            patch.setattr(fold, "write", full)
            again.open(decided)
        assert (again.status.decided, again.status.prepared) == (decided, None)
        with pytest.raises(shardemb.PartitionError, match="was decided"):
            again.open(FIRST if decided == SECOND else SECOND)
        assert value(again.open(decided)) == decided[0]


def test_a_reader_takes_it_for_not_committed(part):
    path = in_doubt(part)
    with shardemb.open(path, "r") as reader:
        assert (value(reader), reader.last_commit.step) == (1, 5)
        assert str(reader.info()).count("prepared") == 0
        assert reader.info().partition == IDENTITY
        assert reader.verify() == []


def test_a_reader_beside_it_sees_the_decision_once_it_refreshes(part):
    write(part, 2)
    part.prepare(SECOND)
    with shardemb.open(part.store.path, "r") as reader:
        assert value(reader) == 1
        part.decide()
        reader.refresh()
        assert value(reader) == 2


def test_what_was_filled_is_there_with_the_decision_alone(part, monkeypatch):
    monkeypatch.setattr(filling, "LEAST_BYTES", 4096)
    path = part.store.path
    rows = np.random.default_rng(1).random((2000, 4), np.float32)
    part.store.create_table("f", num_embeddings=4000, embedding_dim=4).write(np.arange(2000), rows)
    part.prepare(SECOND)
    part.close()
    for decided, there in ((SECOND, True), (FIRST, False)):
        copied = path.with_name(f"copy-{there}")
        os.system(f"cp -r --sparse=always {path} {copied}")
        with Partition.hold(copied) as again:
            store = again.open(decided)
            assert ("f" in store) == there
            if there:
                assert np.array_equal(store["f"].lookup(np.arange(2000)), rows)
            assert store.verify() == []


def test_an_abandoned_attempt_is_not_found_again(part):
    """Its table is gone by then."""
    part.store.create_table("new", num_embeddings=10, embedding_dim=4)
    part.prepare(SECOND)
    part.abandon()
    path = part.store.path
    part.close()
    with Partition.hold(path) as again:
        assert (again.status.decided, again.status.prepared) == (FIRST, None)


def test_a_fold_leaves_out_what_was_abandoned(part):
    write(part, 2)
    part.prepare(SECOND)
    part.abandon()
    part.store.checkpoint()
    with shardemb.open(part.store.path, "r") as reader:
        assert value(reader) == 1
    part.store.rollback()
    assert value(part.store) == 1


@pytest.mark.parametrize("end", ["decide", "abandon"])
def test_lookups_go_on_while_it_waits_for_the_decision(path, end):
    """Also of rows that are spilled, which wait for no fold then."""
    rng, expected = np.random.default_rng(1), np.zeros((3000, 16), np.float32)
    with Partition.create(path, PartitionIdentity(IDENTITY.head, 0, 1)) as part:
        store = part.open((0, None), memory_budget=20_000, threads=1)
        table = store.create_table("t", num_embeddings=3000, embedding_dim=16)
        part.prepare((1, (1, "head", 0)))
        part.decide()
        for number in range(1, 5):
            for ids in rng.integers(0, 3000, (4, 300)):
                table.write(ids, np.full((300, 16), number, np.float32))
                expected[ids] = number
            assert inside.shards(table).overlay.spilled
            part.prepare((part.status.commit + 1, (1, "head", number)))
            assert np.array_equal(table.lookup(np.arange(3000)), expected)
            getattr(part, end)()
            assert store.has_changes == (end == "abandon")
            assert np.array_equal(table.lookup(np.arange(3000)), expected)
        store.rollback()
        assert table.lookup(np.arange(3000)).any() == (end == "decide")


def test_it_leaves_no_fold_and_no_eviction_to_what_is_prepared(path):
    """With no memory for changed rows, every batch asks for a fold."""
    with Partition.create(path, IDENTITY) as part:
        store = part.open((0, None), memory_budget=0, log_bytes=1)
        table = store.create_table("t", num_embeddings=100, embedding_dim=4)
        for number in range(1, 4):
            table.write(np.arange(100), np.full((100, 4), number, np.float32))
            part.prepare((number, (1, "head", number)))
            assert (table.lookup(np.arange(100)) == number).all()
            part.decide()
        assert (table.lookup(np.arange(100)) == 3).all()


# ---- what it is not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["a", "r+", "w"])
def test_it_is_not_opened_for_writing_by_itself(part, mode):
    path = in_doubt(part)
    with pytest.raises(shardemb.PartitionError, match=r"partition 3 of 16 .* opening that store"):
        shardemb.open(path, mode)
    with Partition.hold(path) as again:
        assert again.status.prepared == SECOND


def test_it_has_one_owner(part):
    with pytest.raises(shardemb.StoreLockedError):
        Partition.hold(part.store.path)
    path = in_doubt(part)
    with Partition.hold(path), pytest.raises(shardemb.StoreLockedError):
        Partition.hold(path)


def test_a_store_of_its_own_is_no_partition(path):
    with shardemb.open(path) as store:
        store.commit()
    with pytest.raises(shardemb.PartitionError, match="no partition"):
        Partition.hold(path)
    with shardemb.open(path) as store:  # the lock is free
        assert store.last_commit.id == 1


def test_it_is_created_where_nothing_is(part, tmp_path):
    with pytest.raises(shardemb.StoreExistsError):
        Partition.create(part.store.path, IDENTITY)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(shardemb.StoreNotFoundError):
        Partition.create(tmp_path / "other", IDENTITY)
    with pytest.raises(shardemb.StoreNotFoundError):
        Partition.hold(tmp_path / "nowhere")


def test_a_copy_is_the_same_partition_at_the_same_commit(part, tmp_path):
    part.store.copy(tmp_path / "copy")
    with Partition.hold(tmp_path / "copy") as copy:
        assert (copy.identity, copy.status) == (IDENTITY, part.status)
        assert value(copy.open(FIRST)) == 1


def test_a_tag_of_it_is_read_as_that_commit(part):
    part.store.tag("best")
    write(part, 2)
    part.prepare(SECOND)
    part.decide()
    with shardemb.open(part.store.path, commit="best") as reader:
        assert (value(reader), reader.info().partition) == (1, IDENTITY)
    with reopened(part, SECOND) as again:
        assert list(again.store.tags) == ["best"]


def test_it_says_what_it_is(part):
    assert part.store.info().partition == IDENTITY
    assert f"Part    partition 3 of 16 of the store {IDENTITY.head}" in display.describe(part.store.info())
    assert repr(part) == f"<partition 3 of 16 of the store {IDENTITY.head} at '{part.store.path}'>"


def test_ordinary_stores_have_none_of_it(store):
    store.create_table("t", num_embeddings=10, embedding_dim=4)
    store.commit()
    text = (store.path / ".shardemb" / "manifest.json").read_text()
    assert not any(word in text for word in ("partition", "decision", "resolved"))
    assert Manifest.from_bytes(text.encode()).partition is None
    log = b"".join(each.read_bytes() for each in (store.path / ".shardemb" / "log").glob("*.log"))
    assert int.from_bytes(log[8:16], "little") == 2
    assert store.info().partition is None


# ---- killed -----------------------------------------------------------------------------------------------------

ROWS = 400


def batch(step):
    """A function of the step alone."""
    rng = np.random.default_rng(step)
    return rng.integers(0, ROWS, 100), rng.normal(size=(100, 8)).astype(np.float32)


def new_table(store):
    initializer = Uniform(-1, 1, seed=1)
    return store.create_table(
        "t", num_embeddings=ROWS, embedding_dim=8, optimizer=Adam(lr=0.1), initializer=initializer
    )


def live(path, life, decided, tell, told):
    """Open a partition at what the head has decided, and go on: tell of each vote, and wait for the decision."""
    with Partition.hold(path) as part:
        store = part.open(decided, threads=1, log_bytes=random.choice([1, 200_000, 2**30]))
        if decided == (0, None):
            new_table(store)
        number = decided[0]
        while True:
            number += 1
            store["t"].update(*batch(number))
            part.prepare((number, (life, "head", number)), step=number)
            os.write(tell, number.to_bytes(4, "little"))
            os.read(told, 1)
            part.decide()


def decide_and_kill(path, life, decided, chance):
    """Let a child live, decide a few of its votes, and kill it; return the last vote, and what is decided by then.

    It is killed while it waits for a decision, or some time after it has got one.
    """
    votes, tell = os.pipe()
    told, decide = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            live(path, life, decided, tell, told)
        finally:
            os._exit(1)
    answers, waits = chance.randrange(1, 6), life % 3
    for answer in range(answers + bool(waits)):
        number = int.from_bytes(os.read(votes, 4), "little")
        if answer < answers:
            decided = number, (life, "head", number)
            os.write(decide, b"!")
    time.sleep(0 if waits else chance.uniform(0, 0.01))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for each in (votes, tell, told, decide):
        os.close(each)
    return number, decided


def test_the_decision_of_a_head_is_honoured_after_every_kill(path, store):
    """Its parent has decided what a child that is killed has voted for, or not, and remembers."""
    chance, decided, straight, after = random.Random(5), (0, None), new_table(store), []
    Partition.create(path.with_name("part"), PartitionIdentity(IDENTITY.head, 0, 1)).close()
    for life in range(1, 11):
        last, decided = decide_and_kill(path.with_name("part"), life, decided, chance)
        if life % 3 == 1:  # it decides this one too, and cannot say so any more
            decided = last, (life, "head", last)
        with Partition.hold(path.with_name("part")) as part:
            assert decided in (part.status.decided, part.status.prepared)
            assert life % 3 == 0 or part.status.prepared == (last, (life, "head", last))
            found = part.open(decided, threads=1)
            assert found.last_commit.step == decided[0]
            while len(after) <= decided[0]:
                after.append(straight.lookup(np.arange(ROWS)))
                straight.update(*batch(len(after)))
            assert np.array_equal(found["t"].lookup(np.arange(ROWS)), after[decided[0]])
            assert found.verify() == []
