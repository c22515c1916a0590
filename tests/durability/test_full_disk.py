"""A real file system, small and full: calls are refused by name, nothing is lost, and with room everything goes on.

A store lives several lives on one small disk, ext4 or a tmpfs, beside a model in NumPy. A file takes up more or less
of the room, so that the disk is full while tables are created, commits are logged, folds are written, pages leave
memory or a store is recovered. A life ends with `close` or with the death of the process, at any operation on files.
"""

import gc
import os
import random
import subprocess

import numpy as np
import pytest
from support import inside
from support.full_disks import DISKS, fill_disks
from support.power_loss import contents, keys_that_are_wrong
from support.small import make_small
from support.stores import close_quietly

import shardemb
from shardemb.errors import DiskFullError, PoisonedError
from shardemb.optim import SGD
from shardemb.storage import files


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(DISKS))
def test_a_store_lives_on_a_full_disk(seed, new_disk, elsewhere):
    new_disk("tmpfs", 2**20)  # or skip
    assert elsewhere(fill_disks)


# ---- vocabularies -----------------------------------------------------------------------------------------------


def operations(store, rng):
    """Every operation of a vocabulary and of a table that is used by key, in random order."""

    def some(most):
        return rng.integers(0, 400, rng.integers(1, most))

    def grow():
        store.vocabularies["v"].add(rng.integers(0, 10**6, 80))

    def create():
        name = f"v{rng.integers(10**9)}"
        store.create_vocabulary(
            name, key_type="string", admission=shardemb.Admission(after=1, width=1024, depth=2)
        )
        store.vocabularies[name].add(["a", "b" * 300])

    yield from rng.permutation(
        [
            create,
            grow,
            grow,
            lambda: store.vocabularies["v"].remove(some(200)),
            lambda: store["t"].lookup(some(100), create=True),
            lambda: store["t"].update(ids := some(100), np.ones((ids.size, 64), np.float32), missing="skip"),
            lambda: store["t"].evict(keep=int(rng.integers(50, 200))),
            lambda: store.vocabularies["v"].lookup(some(50)),
            store.commit,
            store.commit,
            store.checkpoint,
            store.rollback,
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("SHARDEMB_FULL_VOCABULARIES", "3"))))
def test_every_operation_of_a_vocabulary_meets_a_full_disk(seed, new_disk, monkeypatch):
    """It is done or not done, no key is lost, and it can be done again once there is room."""
    make_small(monkeypatch, random.Random(seed))
    rng, chance = np.random.default_rng(seed), random.Random(seed)
    disk = new_disk("ext4", 48 * 2**20)
    store = shardemb.open(
        disk.place / "store",
        memory_budget=chance.choice([0, 2**30]),
        log_bytes=chance.choice([1, 2**30]),
        threads=1,
    )
    store.create_vocabulary("v", key_type="int64", reserved=1).add(np.arange(100))
    store.create_table(
        "t", vocabulary="v", embedding_dim=64, rows_per_shard=64, optimizer=SGD(lr=1.0), counters=True
    )
    store.commit(step=1)
    full = 0
    for _ in range(3):
        for operation in operations(store, rng):
            disk.leave(chance.choice([0, 20_000, 100_000, 300_000]))
            try:
                operation()
            except DiskFullError:
                full += 1
                disk.make_room()  # to look at spilled rows takes room, too
                assert keys_that_are_wrong(store, more=False) is None
                assert not inside.runtime(store).poisoned
                operation()
            disk.make_room()
            assert keys_that_are_wrong(store, more=False) is None
    assert full
    store.commit(step=2)
    before = contents(store)
    store.close()
    with shardemb.open(disk.place / "store") as store:
        assert contents(store) == before
        assert store.verify() == []
        assert keys_that_are_wrong(store, more=True) is None
        store.rollback()


# ---- a disk that fails ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:what is committed", "ignore:the changes of")
@pytest.mark.parametrize("seed", range(3))
def test_a_device_that_does_not_take_what_is_written_loses_no_commit(seed, tmp_path, new_disk):
    """The image of the disk is on another one, which is full: the device answers with EIO, at the sync or later."""
    rng = np.random.default_rng(seed)
    outer, place = new_disk("tmpfs", 24 * 2**20), tmp_path / "inner"
    image = outer.place / "disk.img"
    files.create_sparse(tmp_path / "disk.img", 64 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", tmp_path / "disk.img"], check=True, capture_output=True)
    subprocess.run(["cp", "--sparse=always", tmp_path / "disk.img", image], check=True)
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)
    value, acknowledged = {}, 0
    store = shardemb.open(place / "store", log_bytes=2**20)
    try:
        table = store.create_table("t", num_embeddings=20_000, embedding_dim=64, rows_per_shard=1024)
        store.commit(step=0)
        outer.leave(int(rng.integers(0, 2**20)))
        with pytest.raises((OSError, PoisonedError)):
            for step in range(1, 2000):
                row = int(rng.integers(0, 20_000))
                value[step] = row
                table.write([row, 0], np.full((2, 64), step, np.float32))
                table.write(rng.integers(1, 20_000, 200), np.zeros((200, 64), np.float32))
                table.write([row], np.full((1, 64), step, np.float32))
                store.commit(step=step)
                acknowledged = step
        with pytest.raises((OSError, PoisonedError)):
            store.commit(step=5000)
    finally:
        close_quietly(store)
        del store, table
        gc.collect()  # nothing of it stays mapped
        subprocess.run(["umount", place], check=True, capture_output=True)
    outer.make_room()
    subprocess.run(["e2fsck", "-fy", image], check=False, capture_output=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True, capture_output=True)
    try:
        with shardemb.open(place / "store") as store:
            step = store.last_commit.step
            assert step in (acknowledged, acknowledged + 1)
            assert store["t"].lookup([0, value[step]]).tolist() == [[step] * 64] * 2
            assert store.verify() == []
    finally:
        subprocess.run(["umount", place], check=True, capture_output=True)
