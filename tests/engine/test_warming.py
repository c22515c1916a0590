"""Tables that fit are read into memory in the background, in turns with batches; others are left as they are."""

import gc
import logging
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from support import inside
from support.model import assert_same_bits
from support.page_cache import drop_caches
from support.stores import run_in_fork

import shardemb
from shardemb.base.sizes import PAGE
from shardemb.engine import warming
from shardemb.engine.shards import Shards
from shardemb.engine.warming import Warming, Written
from shardemb.errors import RowIdError, ShardEmbError
from shardemb.memory import memory_budget
from shardemb.storage import address_space, files

ROWS, DIM = 20_000, 64  # 1,250 pages in 5 shards
NBYTES = ROWS * DIM * 4
EVERYTHING = np.arange(ROWS)
SPREAD = np.arange(0, ROWS, 400)  # 50 pages
VALUES = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(warming, "PIECE_BYTES", 16 * PAGE)


@pytest.fixture
def cold(path):
    """Return a function that opens the store and returns its table, none of which is in memory."""
    with shardemb.open(path, warm=False) as store:
        store.create_table(
            "t", num_embeddings=ROWS, embedding_dim=DIM, initializer=VALUES, rows_per_shard=4096
        )
        store.commit()
    opened = []

    def open_cold(**options):
        opened.append(shardemb.open(path, **options))
        table = opened[-1]["t"]
        if not drop_caches(table):
            pytest.skip("this file system keeps its pages in memory (tmpfs)")
        return table

    yield open_cold
    for store in opened:
        store.close()


def wait_until_warm(table):
    thread = inside.state(table).runtime.warming._thread
    if thread is not None:
        thread.join(60)
        assert not thread.is_alive()


def pages_in_memory(table):
    return sum(
        inside.shards(table).count_resident(np.arange(offset // PAGE, (offset + nbytes) // PAGE))
        for offset, nbytes in inside.shards(table).written_pieces(2**20)
    )


def counts(table):
    stats = table.stats()
    return stats["bytes_requested"], stats["bytes_warmed"]


# ---- by itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["r", "r+"])
def test_cold_batches_begin_to_warm_a_table_that_fits(cold, mode):
    table = cold(mode=mode)
    assert_same_bits(table.lookup(SPREAD), VALUES[SPREAD])
    wait_until_warm(table)
    assert pages_in_memory(table) == NBYTES // PAGE
    requested, warmed = counts(table)
    assert requested == SPREAD.size * PAGE
    assert 0 <= NBYTES - requested - warmed <= 2 * requested  # the kernel may read a few pages around those
    assert_same_bits(table.lookup(EVERYTHING), VALUES)
    assert table.stats()["cold_lookups"] == 1


def test_updates_begin_it_too(path):
    with shardemb.open(path) as store:
        table = store.create_table(
            "t", num_embeddings=ROWS, embedding_dim=DIM, initializer=VALUES, optimizer=shardemb.optim.SGD()
        )
        store.commit()
        if not drop_caches(table):
            pytest.skip("this file system keeps its pages in memory (tmpfs)")
        table.update(SPREAD, np.zeros((SPREAD.size, DIM)))
        wait_until_warm(table)
        assert pages_in_memory(table) == NBYTES // PAGE
        store.rollback()


@pytest.mark.parametrize("reason", ["memory", "turned off", "few lookups"])
def test_otherwise_nothing_is_read_but_what_batches_ask_for(cold, monkeypatch, reason):
    if reason == "memory":
        monkeypatch.setattr(memory_budget, "available_bytes", lambda: NBYTES)  # half of it is too little
    table = cold(warm=reason != "turned off")
    for start in range(0, 10 if reason == "few lookups" else ROWS, 1000):
        table.lookup(EVERYTHING[start : start + 1000 : 100])
    wait_until_warm(table)
    requested, warmed = counts(table)
    assert warmed == 0
    assert 0 < pages_in_memory(table) * PAGE <= requested < NBYTES / 4


def test_what_is_in_memory_already_counts(cold, monkeypatch):
    shards = inside.shards(cold())
    monkeypatch.setattr(memory_budget, "available_bytes", lambda: NBYTES * 13 // 10)
    assert not warming.is_worth_it(shards, Written.of(shards))  # all of it is more than half of that
    shards.read_in(0, NBYTES // 2 // PAGE * PAGE)
    # Half of it is more than half of what is free besides the rest.
    assert not warming.is_worth_it(shards, Written.of(shards))
    shards.read_in(0, NBYTES * 3 // 4 // PAGE * PAGE)
    assert warming.is_worth_it(shards, Written.of(shards))  # a quarter of it is less than half of the rest


def test_a_table_that_is_in_memory_is_not_read_again(cold):
    table = cold()
    table.warm()
    seen = inside.state(table).runtime.warming
    shards = inside.shards(table)
    shards.totals.add_bytes(requested=NBYTES)
    with seen.batch_reads([shards]):
        pass
    assert seen._thread is None


def test_holes_are_not_read(path):
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=10**6, embedding_dim=DIM, rows_per_shard=4096)
        table.write([0, 500_000], np.ones((2, DIM)))
        store.commit()
        store.checkpoint()
        pieces = list(inside.shards(table).written_pieces(2**20))
        assert sum(nbytes for _, nbytes in pieces) <= 16 * PAGE  # two blocks of a file system
        table.warm()
        assert (table.lookup([0, 1, 500_000])[:, 0] == [1, 0, 1]).all()


def test_a_sparse_table_that_is_in_memory_is_not_read_again(path):
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=10**6, embedding_dim=DIM, rows_per_shard=4096)
        table.write(np.arange(0, 10**6, 4000), np.ones((250, DIM)))
        store.commit()
        store.checkpoint()
        table.warm()
        shards = inside.shards(table)
        shards.totals.add_bytes(requested=NBYTES)
        assert not warming.is_worth_it(shards, Written.of(shards))
        if drop_caches(table):
            assert warming.is_worth_it(shards, Written.of(shards))


def test_files_that_a_reader_lacks_are_read_as_zeros(path):
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=4096)
        store.commit()
        gone = inside.shards(table).shard_path(1)
    gone.unlink()
    with shardemb.open(path, "r") as store:
        store["t"].warm()
        assert not store["t"].lookup(EVERYTHING).any()


def test_closing_stops_it(cold, monkeypatch):
    table = cold()
    store, began = inside.state(table).runtime, threading.Event()
    read_in, reads = Shards.read_in, []

    def slow(self, offset, nbytes):
        reads.append(offset)
        began.set()
        time.sleep(0.01)
        read_in(self, offset, nbytes)

    monkeypatch.setattr(Shards, "read_in", slow)
    table.lookup(SPREAD)
    assert began.wait(60)
    thread = store.warming._thread
    table._store.close()
    assert not thread.is_alive()
    assert len(reads) < NBYTES // warming.PIECE_BYTES


def test_the_thread_holds_nothing_of_a_store_but_the_table_that_it_reads():
    state, fake = Warming(), Fake(pieces=1000, seconds=0.001)
    with state.batch_reads([fake]):
        pass
    gone = weakref.ref(fake)
    del fake
    state._thread.join(60)
    gc.collect()
    assert gone() is None


def test_a_child_of_a_fork_warms_nothing(cold):
    table = cold()
    table.lookup(SPREAD[:1])

    def lookup():
        found = table.lookup(SPREAD)
        return bool((found == VALUES[SPREAD]).all()), inside.state(table).runtime.warming.enabled

    assert run_in_fork(lookup) == ((True, False), 0)


def test_a_disk_error_ends_it_and_nothing_else(cold, monkeypatch, caplog):
    def broken(self, offset, nbytes):
        raise OSError(5, "bad sector")

    monkeypatch.setattr(Shards, "read_in", broken)
    table = cold()
    with caplog.at_level(logging.WARNING, "shardemb"):
        table.lookup(SPREAD)
        wait_until_warm(table)
    assert "bad sector" in caplog.text
    assert_same_bits(table.lookup(EVERYTHING), VALUES)
    with pytest.raises(OSError, match="bad sector"):
        table.warm()


def test_without_threads_nothing_is_warmed(cold, monkeypatch):
    def no_thread(self):
        raise RuntimeError("can't start new thread")

    table = cold()
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    assert_same_bits(table.lookup(SPREAD), VALUES[SPREAD])
    assert inside.state(table).runtime.warming._thread is None
    assert counts(table)[1] == 0


# ---- turns ------------------------------------------------------------------------------------------------------


class Fake:
    """A cold table whose pieces take as long as the test says."""

    def __init__(self, pieces=8, seconds=0.0):
        self.totals = SimpleNamespace(bytes_requested=pieces * PAGE)
        self.directory = "fake"
        self.pieces, self.seconds, self.read = pieces, seconds, []

    def count_resident(self, pages):
        return 0

    def written_pieces(self, nbytes):
        return ((k * PAGE, PAGE) for k in range(self.pieces))

    def request(self, offset, nbytes):
        pass

    def read_in(self, offset, nbytes):
        time.sleep(self.seconds)
        self.read.append(offset)


def test_the_thread_waits_while_a_batch_reads():
    state, fake = Warming(), Fake(seconds=0.01)
    with state.batch_reads([fake]):
        pass
    assert state._thread is not None
    with state.batch_reads([fake]):
        time.sleep(0.05)  # for a piece that was under way
        before = len(fake.read)
        time.sleep(0.05)
        assert len(fake.read) == before < fake.pieces
    state._thread.join(60)
    assert fake.read == [k * PAGE for k in range(fake.pieces)]


def test_a_batch_waits_until_the_thread_had_its_turn():
    state, fake = Warming(), Fake(pieces=100, seconds=0.01)
    with state.batch_reads([fake]):
        pass
    with state.batch_reads([fake]):
        time.sleep(0.1)
    before = len(fake.read)
    with state.batch_reads([fake]):
        turn = len(fake.read) - before
    assert (
        0.5 * warming.TURN * 10 < turn < 2 * warming.TURN * 10
    )  # 10 pieces take as long as the batch before
    state.close()
    assert len(fake.read) < fake.pieces


def test_a_batch_does_not_wait_once_the_thread_is_done_or_dead():
    state, fake = Warming(), Fake()
    fake.read_in = lambda offset, nbytes: 1 / 0
    for _ in range(3):
        with state.batch_reads([fake]):
            pass
        if state._thread is not None:
            state._thread.join(60)
    assert state._owed == 0


def test_tables_are_warmed_one_after_the_other():
    state, fakes = Warming(), [Fake(seconds=0.01), Fake(), Fake()]
    with state.batch_reads(fakes):
        pass
    assert state.progress(fakes[1]) is None
    state._thread.join(60)
    assert [len(each.read) for each in fakes] == [8, 8, 8]


# ---- on purpose -------------------------------------------------------------------------------------------------


def test_warm_reads_all_of_a_table_and_says_how_far_it_is(cold):
    table, seen = cold(warm=False), []
    table.warm(progress=lambda done, total: seen.append((done, total)))
    assert pages_in_memory(table) == NBYTES // PAGE
    assert counts(table) == (0, NBYTES)
    assert seen[-1] == (NBYTES, NBYTES)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_warm_reads_the_pages_of_rows(cold, monkeypatch):
    monkeypatch.setattr(warming, "WARMED_ROWS", 7)
    table, seen = cold(warm=False), []
    table.warm([[5000, 0], [1, 5000]], progress=lambda done, total: seen.append((done, total)))
    assert pages_in_memory(table) == 2
    assert seen[-1] == (2 * PAGE, 2 * PAGE)
    assert counts(table) == (0, 2 * PAGE)
    table.warm(SPREAD)
    assert pages_in_memory(table) == SPREAD.size + 1
    table.warm([])
    with pytest.raises(RowIdError):
        table.warm([ROWS])


def test_warm_refuses_what_does_not_fit(cold, monkeypatch):
    table = cold()
    monkeypatch.setattr(memory_budget, "available_bytes", lambda: NBYTES - 1)
    with pytest.raises(
        ShardEmbError, match=r"'t': 4.9 MiB are to be read .* only 4.9 MiB are free.*fewer rows"
    ):
        table.warm()
    table.warm(SPREAD)


def test_a_table_by_key_is_warmed_by_its_keys(path):
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="string")
        table = store.create_table("t", vocabulary="v", embedding_dim=DIM)
        keys = [f"k{i}" for i in range(2000)]
        table.lookup(keys, create=True)
        table.write(keys, VALUES[:2000])
        store.commit()
        store.checkpoint()
        if not drop_caches(table.rows):
            pytest.skip("this file system keeps its pages in memory (tmpfs)")
        table.warm(["k0", "k100", "no such key"])
        assert pages_in_memory(table.rows) == 2
        table.warm()
        assert pages_in_memory(table.rows) >= 2000 * DIM * 4 // PAGE


def test_explain_says_that_a_table_is_being_warmed(cold, monkeypatch):
    table = cold()
    assert table.explain(SPREAD).warming is None
    begun, go_on, read_in = threading.Event(), threading.Event(), Shards.read_in

    def slow(self, offset, nbytes):
        if offset >= NBYTES // 2:
            begun.set()
            go_on.wait(60)
        read_in(self, offset, nbytes)

    monkeypatch.setattr(Shards, "read_in", slow)
    table.lookup(SPREAD)
    assert begun.wait(60)
    explained = table.explain(SPREAD)
    go_on.set()
    assert explained.warming == pytest.approx(0.5, abs=0.1)
    assert "read into memory in the background: 5" in str(explained).replace("4", "5")
    wait_until_warm(table)
    assert table.explain(SPREAD).warming is None


# ---- after creation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enough", [True, False])
def test_a_new_table_stays_in_memory_if_there_is_enough(path, monkeypatch, enough):
    monkeypatch.setattr(memory_budget, "available_bytes", lambda: 2 * NBYTES - (not enough))
    drop_cached, dropped = files.drop_cached, []
    monkeypatch.setattr(
        files, "drop_cached", lambda descriptor: (dropped.append(descriptor), drop_cached(descriptor))
    )
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, initializer=VALUES)
        store.commit()
        assert bool(dropped) != enough  # or they would be read again
        found = pages_in_memory(table)
        if not enough and found:
            pytest.skip("this file system keeps its pages in memory (tmpfs)")
        assert found == (NBYTES // PAGE if enough else 0)
        assert_same_bits(table.lookup(EVERYTHING), VALUES)


def test_small_writes_to_a_new_table_are_counted_as_small(path):
    """If its pages cannot be mapped as large ones; otherwise each block would count as up to 2 MiB."""
    with shardemb.open(path) as store:
        table = store.create_table(
            "t",
            num_embeddings=ROWS,
            embedding_dim=DIM,
            initializer=VALUES,
            optimizer=shardemb.optim.Adagrad(),
        )
        assert inside.shards(table).spec.shard_bytes % address_space.HUGE_PAGE
        store.commit()
        table.write(SPREAD, VALUES[SPREAD])
        store.commit()

        def written():
            with open("/proc/self/io") as lines:
                return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))

        before, by_calls = written(), files.counters.bytes_written
        store.checkpoint()
        assert written() - before <= 2 * (files.counters.bytes_written - by_calls) + 64 * PAGE


def test_files_of_large_pages_are_read_in_large_pages(path, monkeypatch):
    monkeypatch.setattr(warming, "PIECE_BYTES", address_space.HUGE_PAGE)
    read, read_in = [], address_space.read_in_huge_pages
    with shardemb.open(path) as store:
        table = store.create_table(
            "t", num_embeddings=ROWS, embedding_dim=DIM, initializer=VALUES, rows_per_shard=8192
        )
        store.commit()
        if not drop_caches(table):
            pytest.skip("this file system keeps its pages in memory (tmpfs)")
        monkeypatch.setattr(
            address_space, "read_in_huge_pages", lambda *part: (read.append(part[1:]), read_in(*part))
        )
        table.lookup(SPREAD)
        wait_until_warm(table)
        assert read == [(0, address_space.HUGE_PAGE)] * 2  # the last file is not full
        assert pages_in_memory(table) == NBYTES // PAGE
        assert_same_bits(table.lookup(EVERYTHING), VALUES)
