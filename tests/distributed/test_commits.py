"""A commit that stops at each of its steps, with real owners: what is there afterwards, and what the caller is told."""

import numpy as np
import pytest

import shardemb
from shardemb.optim import SGD
from shardemb.protocol import messages

IDS = np.arange(40)
ONES = np.ones((40, 2), np.float32)


@pytest.fixture
def store(new_store):
    """A store at commit 1, with changes since."""
    store = new_store()
    table = store.create_table("t", num_embeddings=40, embedding_dim=2, optimizer=SGD(lr=1.0))
    table.update(IDS, ONES)
    store.commit(step=1)
    table.update(IDS, ONES)
    return store


class FullOnce:
    """Asked of a partition: it cannot prepare the next time."""

    def answer(self, partition):
        def prepare(*arguments):
            del partition.prepare
            raise shardemb.DiskFullError(28, "no space left, says the test")

        partition.prepare = prepare


class Poisoned:
    """A change that fails in one partition, half way."""

    def change(self, partition, part, arrays):
        if part == 3:
            msg = "half way, says the test"
            raise shardemb.PoisonedError(msg)


class RefusedByOne:
    """A change that one partition refuses."""

    def change(self, partition, part, arrays):
        if part == 3:
            msg = "not here, says the test"
            raise ValueError(msg)


class RefusedByAll:
    """A change that all partitions refuse."""

    def change(self, partition, part, arrays):
        msg = "nowhere, says the test"
        raise ValueError(msg)


@pytest.mark.parametrize("part", [0, 3])
def test_an_owner_that_cannot_prepare_loses_nothing(store, part):
    store.link.ask(FullOnce(), [part])
    with pytest.raises(shardemb.DiskFullError, match="says the test"):
        store.commit(step=2)
    assert store.last_commit.id == 1
    np.testing.assert_array_equal(store["t"].lookup(IDS), -2 * ONES)
    store["t"].update(IDS, ONES)
    assert store.commit(step=3) == shardemb.Commit(2, 3, {})
    store["t"].update(IDS, ONES)
    store.rollback()
    np.testing.assert_array_equal(store["t"].lookup(IDS), -3 * ONES)


@pytest.mark.parametrize(
    ("change", "error"), [(Poisoned, shardemb.PoisonedError), (RefusedByOne, ValueError)]
)
def test_a_change_that_is_not_made_everywhere_is_undone_everywhere(store, change, error):
    with pytest.raises(error, match="says the test"):
        store.link.change(change())
    np.testing.assert_array_equal(store["t"].lookup(IDS), -ONES)
    store["t"].update(IDS, ONES)
    assert store.commit().id == 2


def test_a_change_that_all_refuse_changes_nothing(store):
    with pytest.raises(ValueError, match="says the test"):
        store.link.change(RefusedByAll())
    np.testing.assert_array_equal(store["t"].lookup(IDS), -2 * ONES)
    assert store.commit().id == 2


def test_a_head_that_cannot_be_written_is_opened_again_at_what_all_have_prepared(
    store, new_store, monkeypatch
):
    def fail(*arguments, **options):
        msg = "the head's disk is gone, says the test"
        raise OSError(msg)

    with monkeypatch.context() as patched:
        patched.setattr("shardemb.Store.commit", fail)
        with pytest.raises(OSError, match="says the test"):
            store.commit(step=2, metadata={"a": 1})
        with pytest.raises(shardemb.PoisonedError, match="close the store and open it again"):
            store["t"].lookup(IDS)
    store.close()
    again = new_store()
    assert again.last_commit == shardemb.Commit(2, 2, {"a": 1})
    np.testing.assert_array_equal(again["t"].lookup(IDS), -2 * ONES)


def without(monkeypatch, kind):
    """Let the coordinator's requests of one kind get lost, with the process that sends them."""
    from shardemb.distributed import head

    real = head.Coordinator._send

    def send(self, parts):
        if isinstance(self._machine.request, kind):
            raise KeyboardInterrupt
        return real(self, parts)

    monkeypatch.setattr(head.Coordinator, "_send", send)


@pytest.mark.parametrize(("kind", "commits", "value"), [(messages.Prepare, 1, -1), (messages.Decide, 2, -2)])
def test_a_coordinator_that_stops_in_between(store, new_store, monkeypatch, kind, commits, value):
    with monkeypatch.context() as patched:
        without(patched, kind)
        with pytest.raises(KeyboardInterrupt):
            store.commit(step=2)
    store.close()
    again = new_store()
    assert again.last_commit.id == commits
    np.testing.assert_array_equal(again["t"].lookup(IDS), value * ONES)


def test_the_same_process_goes_on_after_an_interruption(store, monkeypatch):
    with monkeypatch.context() as patched:
        without(patched, messages.Decide)
        with pytest.raises(KeyboardInterrupt):
            store.commit(step=2)
    np.testing.assert_array_equal(store["t"].lookup(IDS), -2 * ONES)
    assert store.last_commit.id == 2
    store["t"].update(IDS, ONES)
    assert store.commit(step=3).id == 3
