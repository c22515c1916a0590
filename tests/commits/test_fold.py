"""What a fold writes and in which order, and how it gives way to lookups."""

import threading
import time

import numpy as np
import pytest

import shardemb
from shardemb.base.sizes import PAGE
from shardemb.commits import fold
from shardemb.initializers import Uniform
from shardemb.storage import files


@pytest.mark.parametrize("threads", [1, 4])
def test_presence_bits_are_written_after_all_records_are_durable(path, threads, monkeypatch):
    """Of all tables: a lookup without the lock, and a fold that was interrupted, may see any part of this."""
    calls, writing = [], []

    def spy(name):
        real = getattr(files, name)

        def record(*arguments):
            if writing:
                calls.append((name, str(arguments[-1])))
            return real(*arguments)

        monkeypatch.setattr(files, name, record)

    def write(*arguments):
        writing.append(1)
        real_write(*arguments)
        writing.clear()

    with shardemb.open(path, threads=threads) as store:
        for name in ("a", "b"):
            store.create_table(
                name, num_embeddings=1000, embedding_dim=16, rows_per_shard=128, initializer=Uniform(-1, 1)
            )
        store.commit()
        for table in store.values():
            table.write(range(0, 1000, 3), np.ones((334, 16)))
        store.commit()
        spy("write")
        spy("sync_data")
        real_write = fold.write
        monkeypatch.setattr(fold, "write", write)
        store.checkpoint()
    synced = [i for i, (name, file) in enumerate(calls) if name == "sync_data" and "/rows/" in file]
    bits = [i for i, (name, file) in enumerate(calls) if name == "write" and "/present/" in file]
    assert len(synced) == 16
    assert len(bits) == 2
    assert max(synced) < min(bits)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_fold_writes_little_more_than_the_blocks_that_change(path, share, monkeypatch):
    """Rows of a block each. The ones between keep their checksums, and what they hold."""
    rows, written = 4000, []
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=rows, embedding_dim=1024, rows_per_shard=1024)
        table.write(range(rows), np.ones((rows, 1024), np.float32))
        store.commit()
        store.checkpoint()
        changed = np.flatnonzero(np.random.default_rng(0).random(rows) < share)
        table.write(changed, np.full((changed.size, 1024), 2, np.float32))
        store.commit()
        write = files.write
        with monkeypatch.context() as patch:
            patch.setattr(
                files, "write", lambda *given: (written.append((len(given[1]), given[3])), write(*given))
            )
            store.checkpoint()
        expected = np.ones(rows)
        expected[changed] = 2
        np.testing.assert_array_equal(
            np.fromfile(path / "t" / "rows" / "c.0.0", np.float32)[::1024], expected[:1024]
        )
        assert store.verify() == []
    with shardemb.open(path, "r") as store:
        np.testing.assert_array_equal(store["t"].lookup(range(rows))[:, -1], expected)
    blocks = sum(nbytes for nbytes, file in written if "/rows/" in str(file)) / PAGE
    between = share * (1 - share) * share  # of all blocks: those that are alone between two that change
    assert share < 0.7 or blocks == rows
    assert share > 0.7 or changed.size <= blocks <= 1.1 * (changed.size + between * rows)


class Lookups:
    """Counts cold lookups as the tables of a store do."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        return self.count


def test_a_fold_rests_only_while_there_are_cold_lookups_and_nobody_waits(monkeypatch):
    monkeypatch.setattr(fold, "RECENT_S", 0.05)
    lookups, hurry = Lookups(), threading.Event()
    lookups.count = 3  # from before this fold
    pace = fold.Pace(lookups, hurry)
    found = []
    for change in (0, 1, 0):
        lookups.count += change
        with pace.piece() as gives_way:
            found.append(gives_way)
    assert found == [False, True, True]
    time.sleep(0.1)
    assert not pace.gives_way()
    lookups.count += 1
    hurry.set()
    assert not pace.gives_way()
    hurry.clear()
    assert pace.gives_way()


def test_a_rest_is_as_long_as_the_work_asks_for_and_ends_when_somebody_waits(monkeypatch):
    monkeypatch.setattr(fold, "REST", 2)
    lookups, hurry = Lookups(), threading.Event()
    pace = fold.Pace(lookups, hurry)
    lookups.count = 1
    begun = time.monotonic()
    with pace.piece():
        time.sleep(0.1)
    assert 0.29 < time.monotonic() - begun < 20
    monkeypatch.setattr(fold, "REST", 1000)
    threading.Timer(0.2, hurry.set).start()
    begun = time.monotonic()
    with pace.piece():
        time.sleep(0.1)
    assert 0.15 < time.monotonic() - begun < 20


def test_beside_cold_lookups_one_thread_works_at_a_time(monkeypatch):
    monkeypatch.setattr(fold, "REST", 0)
    lookups = Lookups()
    pace = fold.Pace(lookups, threading.Event())
    lookups.count = 1
    working, most = [], []

    def work():
        for _ in range(5):
            with pace.piece():
                working.append(1)
                most.append(len(working))
                time.sleep(0.002)
                working.pop()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(20)
    assert most == [1] * 15


def test_a_piece_that_fails_ends_the_turn():
    lookups = Lookups()
    pace = fold.Pace(lookups, threading.Event())
    lookups.count = 1
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), pace.piece():
            1 / 0  # noqa: B018
