"""Every operation on files fails once, in every way: the error has a name, and no acknowledged commit is lost.

A workload runs with one call of ``files`` failing, at every position one after the other. Whatever it raises is one of
shardemb's errors or an `OSError`; afterwards the store opens at the last acknowledged commit, or at the one under way.
What gives a table another form, or copies a store, then does so when it is called again.
"""

import os
import resource
import signal

import numpy as np
import pytest
from support.failures import CHANGES, DIM, ROWS, THEIRS, WORKLOADS, change_everywhere, fail_everywhere

import shardemb


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_operation_fails_once(seed, elsewhere):
    assert {"write", "sync", "sync_data", "rename", "opened"} <= elsewhere(fail_everywhere)


# ---- tables of another form, and a store elsewhere --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_what_failed_once_succeeds_when_it_is_called_again(what, elsewhere):
    assert {"write", "opened", *THEIRS.get(what, ())} <= elsewhere(change_everywhere)


@pytest.mark.filterwarnings("ignore:the changes of")
def test_a_limit_on_the_size_of_files_is_an_error_and_no_signal(tmp_path, in_fork):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = shardemb.open(tmp_path / "s", memory_budget=0)
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=64)
        table.write([1], np.ones((1, DIM), np.float32))
        store.commit(step=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="File too large"):
            store.create_table("large", num_embeddings=10**6, embedding_dim=DIM)
        table.write(np.arange(ROWS), np.ones((ROWS, DIM), np.float32))
        for step in range(2, 300):
            table.write([2], np.full((1, DIM), step, np.float32))
            try:
                store.commit(step=step)
            except OSError:
                break
        os._exit(0)

    in_fork(limited)
    with shardemb.open(tmp_path / "s") as store:
        assert store.verify() == []
        step = store.last_commit.step
        assert step >= 1
        assert store["t"].lookup(2)[0] == (step if step > 1 else 0)


def test_address_space_that_is_not_to_be_had_is_an_error(tmp_path, in_fork):
    with shardemb.open(tmp_path / "s") as store:
        store.create_table("t", num_embeddings=10**6, embedding_dim=DIM)
        store.commit()

    def limited():
        with shardemb.open(tmp_path / "s") as store:
            with open("/proc/self/statm") as file:
                used = int(file.read().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
            with pytest.raises(OSError, match="cannot map"):
                store.create_table("large", num_embeddings=10**9, embedding_dim=64)
            assert list(store) == ["t"]
            store["t"].write([1], np.ones((1, DIM), np.float32))
            store.commit(step=1)

    in_fork(limited)
    with shardemb.open(tmp_path / "s") as store:
        assert store.last_commit.step == 1
