"""Threads that add keys, remove them, look them up, commit and roll back: no key has two rows, and no row two keys.

Memory is so small that changes wait for folds, and release the lock meanwhile.
"""

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support import inside
from support.small import make_small, pool_of
from support.stores import close_quietly
from support.threads import Threads

import shardemb
from shardemb.compute import plan
from shardemb.errors import RowIdError, ShardEmbError, StoreClosedError, UnknownKeyError
from shardemb.initializers import Constant
from shardemb.optim import SGD
from shardemb.vocabulary import hash_index, key_records

DIM = 4


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_small(monkeypatch, random.Random(3))
    monkeypatch.setattr(hash_index, "OPEN_PAIRS", (16, 128))
    monkeypatch.setattr(hash_index, "_STALE", 50)
    monkeypatch.setattr(plan, "TASK_BYTES", 2_000)


def open_store(path, key_type="int64", **options):
    store = shardemb.open(path, **({"memory_budget": 10_000, "log_bytes": 1} | options))
    if "v" not in store.vocabularies:
        store.create_vocabulary("v", key_type=key_type)
        new_table(store, "t")
        store.commit()
    return store, store.vocabularies["v"], store["t"]


def new_table(store, name, **more):
    return store.create_table(
        name,
        vocabulary="v",
        embedding_dim=DIM,
        rows_per_shard=64,
        optimizer=SGD(lr=1.0),
        initializer=Constant(5.0),
        **more,
    )


def assert_sound(store):
    """Assert that each row has one key or is among the freed ones, and that tables and index have all of them."""
    words = store.vocabularies["v"]
    state = inside.key_rows(words).entry
    found = [batch.to_pydict() for batch in words.to_arrow_batches()]
    rows = [row for each in found for row in each["row"]]
    keys = [key for each in found for key in each["key"]]
    assert len(set(keys)) == len(keys) == len(words)
    assert words.lookup(keys).tolist() == rows
    assert inside.key_rows(words).check_index()
    free = inside.key_rows(words).tables.freed(state.head, state.tail).tolist()
    assert sorted(rows + free) == list(range(state.reserved, state.rows))
    dead = inside.key_rows(words).tables.records(np.array(free, np.int64))
    assert not key_records.are_live(dead).any()
    for name in store:
        if hasattr(store[name], "vocabulary"):
            assert store[name].rows.num_embeddings >= words.num_rows
            assert store[name].lookup(keys).shape == (len(keys), DIM)
    return dict(zip(keys, rows, strict=True))


@pytest.mark.parametrize("key_type", ["int64", "string"])
def test_overlapping_keys_of_several_threads_get_one_row_each(path, key_type):
    store, words, table = open_store(path, key_type)
    pool = pool_of(key_type, np.random.default_rng(0))
    rows_of, lock = {}, threading.Lock()

    def note(keys, rows):
        with lock:
            for key, row in zip(keys, rows.tolist(), strict=True):
                if row >= 0:
                    assert rows_of.setdefault(key, row) == row

    def adder(seed):
        rng = np.random.default_rng(seed)
        for _ in range(12):
            keys = [pool[i] for i in rng.integers(0, len(pool), 80).tolist()]
            rows = words.add(keys)
            assert (rows >= 0).all()
            note(keys, rows)
            note(keys, words.lookup(keys))
            assert words.keys(rows).tolist() == keys
            assert table.lookup(keys).min() == 5

    def look():
        keys = pool[:: random.randrange(5, 50)]
        note(keys, words.lookup(keys))

    with ThreadPoolExecutor(3) as pool_of_threads, Threads(look, store.commit):
        for future in [pool_of_threads.submit(adder, seed) for seed in range(3)]:
            future.result()
    assert len(set(rows_of.values())) == len(rows_of)
    store.commit()
    assert assert_sound(store) == rows_of
    store.close()
    with open_store(path, key_type)[0] as store:
        assert assert_sound(store) == rows_of
        assert store.verify() == []


@pytest.mark.parametrize("key_type", ["int64", "bytes"])
@pytest.mark.parametrize("seed", range(2))
def test_commits_and_rollbacks_while_keys_are_added_and_removed(path, key_type, seed):
    store, words, table = open_store(path, key_type)
    pool = pool_of(key_type, np.random.default_rng(seed))
    chance = random.Random(seed)

    def some(most=60):
        return random.sample(pool[:500], random.randrange(1, most))

    def add():
        words.add(some())

    def remove():
        keys = some()
        rows = words.remove(keys)
        assert len({row for row in rows.tolist() if row >= 0}) == np.count_nonzero(rows >= 0)

    def look():
        keys = some()
        rows = words.lookup(keys)
        try:
            seen = table.lookup(keys, missing="zeros")
            assert ((seen == 5) | (seen == 0)).all()
            words.keys(rows[rows >= 0])
        except (RowIdError, UnknownKeyError):
            pass  # removed or rolled back meanwhile

    with Threads(add, add, remove, look, look):
        for _ in range(40):
            chance.choice([store.commit, store.rollback, store.rollback, store.checkpoint])()
    assert_sound(store)
    store.commit()
    before = assert_sound(store)
    store.close()
    with open_store(path, key_type)[0] as store:
        assert assert_sound(store) == before
        assert store.verify() == []


def test_tables_that_are_bound_while_keys_are_added_have_their_rows(path):
    store, words, _ = open_store(path)
    number = iter(range(10**6))

    def add():
        start = next(number)
        words.add(np.arange(20 * start, 20 * start + 20))

    with Threads(add):
        for turn in range(8):
            table = new_table(store, f"t{turn}")
            for _ in range(3):
                num_rows = words.num_rows  # first: the table grows before the vocabulary
                assert table.rows.num_embeddings >= num_rows
                store.commit()
            assert table.lookup(list(words)).min() == 5
    assert_sound(store)
    close_quietly(store)


def test_eviction_while_keys_are_added(path):
    store, _, _ = open_store(path)
    table = new_table(store, "counted", counters=True)
    number = iter(range(10**6))

    def add():
        start = next(number)
        keys = np.arange(start, start + 50) % 400
        table.lookup(keys, create=True)
        table.update(keys, np.ones((50, DIM), np.float32), missing="skip")

    def evict():
        gone = table.evict(keep=200, by=random.choice(["lru", "lfu"]))
        assert len(set(gone.tolist())) == gone.size

    with Threads(add, evict):
        for _ in range(15):
            store.commit()
    assert_sound(store)
    close_quietly(store)


def test_closing_lets_additions_end_or_refuses_them(path):
    for turn in range(4):
        store, words, _ = open_store(path)
        known = len(words)

        def until_closed(seed, words=words):
            rng = np.random.default_rng(seed)
            while True:
                try:
                    words.add(rng.integers(0, 2000, 40))
                    words.lookup(rng.integers(0, 2000, 40))
                    words.remove(rng.integers(0, 2000, 5))
                except StoreClosedError:
                    return

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(until_closed, 10 * turn + each) for each in range(2)]
            while len(words) < known + 100:
                pass
            store.commit()
            close_quietly(store)
            for future in futures:
                future.result(timeout=60)
    store, words, _ = open_store(path)
    assert len(words) > 100
    assert_sound(store)
    store.close()


def test_no_update_is_lost_while_the_table_grows(path):
    """The table is replaced by a larger one while an update waits for room."""
    store, words, table = open_store(path, memory_budget=0)
    trained, number = np.arange(10**6, 10**6 + 200), iter(range(10**6))
    words.add(trained)

    def add():
        start = next(number)
        words.add(np.arange(40 * start, 40 * start + 40))

    with Threads(add):
        for _ in range(60):
            table.update(trained, -np.ones((200, DIM), np.float32))
    assert (table.lookup(trained) == 65).all()
    assert table.step == 60
    close_quietly(store)


def test_many_threads_find_what_they_wrote(path):
    """Each has keys and a table of its own, and all share a store that is too small for them."""
    store, words, table = open_store(path, "string", memory_budget=20_000, log_bytes=50_000)
    plain = store.create_table("plain", num_embeddings=4000, embedding_dim=DIM, rows_per_shard=256)
    store.commit()

    def writer(number):
        turn = 0

        def work():
            nonlocal turn
            turn += 1
            keys = [f"{number} {turn} {n}" for n in range(40)]
            rows = np.full((40, DIM), turn, np.float32)
            table.lookup(keys, create=True)
            table.write(keys, rows)
            ids = np.arange(number * 400, number * 400 + 300)
            plain.write(ids, np.full((300, DIM), turn, np.float32))
            assert (table.lookup(keys) == turn).all()
            assert (plain.lookup(ids) == turn).all()
            if turn % 3 == 0:
                removed = words.remove(keys[::2])
                assert (removed >= 0).all()
            assert (table.lookup(keys[1::2]) == turn).all()
            if turn > 1:
                assert (table.lookup([f"{number} {turn - 1} {n}" for n in range(1, 40, 2)]) == turn - 1).all()

        return work

    def resize():
        plain.resize(plain.num_embeddings + 100)
        other = store.create_table(f"o{threading.get_ident()}", num_embeddings=50, embedding_dim=3)
        other.write([1], np.ones((1, 3), np.float32))
        store.drop_table(other.name)

    with Threads(*map(writer, range(3)), store.commit, store.checkpoint, resize):
        for _ in range(2):
            with contextlib.suppress(ShardEmbError):  # there are changes that are not committed
                store.reshard("plain", rows_per_shard=random.choice([128, 256, 512]))
    assert_sound(store)
    close_quietly(store)
