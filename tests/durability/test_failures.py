"""Every operation on files fails once, in every way: the error has a name, and no acknowledged commit is lost.

A workload runs with one call of ``files`` failing, for each call site in each way; the soak lets every call fail.
Whatever it raises is one of shardemb's errors or an `OSError`; afterwards the store opens at the last acknowledged
commit, or at the one under way. What gives a table another form, or copies a store, then does so when it is called
again.
"""

import os
import resource
import signal
from collections import Counter

import numpy as np
import pytest
from support.failures import (
    CHANGES,
    DIM,
    KINDS,
    ROWS,
    THEIRS,
    WORKLOADS,
    Failing,
    calls_of_changes,
    change_every_site,
    every_site,
    fail_every_site,
    small,
)

import shardemb
from shardemb.storage import files


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WORKLOADS))
def test_every_operation_fails_once(seed, elsewhere):
    assert {"write", "sync", "rename", "opened"} <= elsewhere(fail_every_site).keys()


def test_every_call_site_fails_in_every_way():
    a, b, c = ("write", ("x", 1)), ("sync", ("x", 2)), ("remove_tree", ("y", 1))
    workloads = [Counter({a: 5, b: 1}), Counter({a: 2, c: 3})]
    every = [[(one.site, one.kind, one.at) for one in every_site(workloads, number)] for number in range(2)]
    assert sorted((site, kind) for found in every for site, kind, _ in found) == sorted(
        (site, kind) for site, kinds in ((a, KINDS), (b, KINDS[:2]), (c, KINDS)) for kind in kinds
    )
    assert all(1 <= at <= workloads[number][site] for number in range(2) for site, _, at in every[number])


def test_the_call_of_a_number_at_a_site_fails(tmp_path):
    def write(at, site=None):
        failing, done = Failing(at, "error", site), 0
        with failing.on(), files.opened(tmp_path / "x", os.O_RDWR | os.O_CREAT) as descriptor:
            try:
                for _ in range(5):
                    files.write(descriptor, b"x", 0, tmp_path / "x")
                    done += 1
            except OSError:
                pass
        return failing, done

    assert write(4)[1] == 2  # the first is that of `opened`
    calls, done = write(None)
    assert (calls.count, done) == (6, 5)
    (site,) = [site for site in calls.sites if site[0] == "write"]
    assert calls.sites[site] == 5
    failing, done = write(3, site)
    assert done == 2
    assert failing.failed == f"write of {tmp_path / 'x'}"


# ---- tables of another form, and a store elsewhere --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("what", CHANGES)
def test_what_failed_once_succeeds_when_it_is_called_again(what, elsewhere):
    assert elsewhere(change_every_site)


def test_the_calls_that_fail_are_those_of_the_changes():
    with small():
        found = calls_of_changes()
    assert found.keys() == CHANGES.keys()
    for what, (calls, _, _) in found.items():
        assert {"write", "opened", *THEIRS.get(what, ())} <= {name for name, *_ in calls.sites}


@pytest.mark.filterwarnings("ignore:the changes of")
def test_a_limit_on_the_size_of_files_is_an_error_and_no_signal(tmp_path, in_fork):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = shardemb.open(tmp_path / "s", memory_budget=0)
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=64)
        table.write([1], np.ones((1, DIM), np.float32))
        store.commit(step=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(
            shardemb.DiskFullError, match=r"would be larger than this process may write \(ulimit -f\)"
        ):
            store.create_table("large", num_embeddings=10**6, embedding_dim=DIM)
        table.write(np.arange(ROWS), np.ones((ROWS, DIM), np.float32))
        for step in range(2, 300):
            table.write([2], np.full((1, DIM), step, np.float32))
            try:
                store.commit(step=step)
            except OSError:
                break
        os._exit(0)

    assert in_fork(limited) is None  # as it ended by itself
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
