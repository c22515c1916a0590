"""Damage of any kind to the files of a store."""

import os
import random
import shutil
from pathlib import Path

import numpy as np

import shardemb
from shardemb.base.sizes import PAGE
from shardemb.errors import ShardEmbError
from shardemb.initializers import Uniform
from shardemb.optim import SGD, Adam
from support.power_loss import contents, scratch
from support.stores import close_quietly

DAMAGES = int(os.environ.get("SHARDEMB_DAMAGES", "1600"))
PARTS = 4
ROWS, DIM = 700, 16


def fill(store):
    for name, more in {"plain": {}, "drawn": {"initializer": Uniform(-1, 1), "optimizer": Adam()}}.items():
        table = store.create_table(name, num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=256, **more)
        ids = np.arange(0, ROWS, 3)
        table.write(ids, np.random.default_rng(0).normal(size=(ids.size, DIM)).astype(np.float32))
    store.commit(step=1)


def damage_something(store, chance):
    """Damage one file, in one of many ways; return what was done."""
    every = sorted(file for file in store.rglob("*") if file.is_file())
    file = chance.choice(every)
    size = file.stat().st_size
    what = chance.choice(["flip", "flip", "flip", "zero", "noise", "cut", "grow", "swap", "unlink"])
    name = file.relative_to(store)
    if what in ("flip", "zero", "noise") and size:
        data = bytearray(file.read_bytes())
        at, count = chance.randrange(size), chance.choice([1, 8, 512, PAGE])
        if what == "flip":
            data[at] ^= 1 << chance.randrange(8)
        else:
            data[at : at + count] = (
                bytes(len(data[at : at + count]))
                if what == "zero"
                else chance.randbytes(len(data[at : at + count]))
            )
        file.write_bytes(data)
        return f"{what} {name} at {at}"
    if what == "cut":
        os.truncate(file, chance.randrange(size + 1))
    elif what == "grow":
        with file.open("ab") as target:
            target.write(chance.randbytes(chance.choice([1, PAGE])))
    elif what == "swap":
        other = chance.choice(every)
        a, b = file.read_bytes(), other.read_bytes()
        file.write_bytes(b)
        other.write_bytes(a)
        return f"swap {name} and {other.relative_to(store)}"
    else:
        file.unlink()
    return f"{what} {name}"


def make_victims(folder):
    """Stores that were closed, and that crashed with a log; what each of them holds."""
    closed, crashed = folder / "closed", folder / "crashed"
    with shardemb.open(closed) as store:
        fill(store)
    shutil.copytree(closed, folder / "open")
    store = shardemb.open(folder / "open")
    for step in (2, 3):
        for table in (store["plain"], store["drawn"]):
            table.write(np.arange(step * 50, step * 100), np.full((step * 50, DIM), step, np.float32))
        store.create_table(f"new{step}", num_embeddings=100, embedding_dim=4, optimizer=SGD(lr=0.1))
        store.commit(step=step)
        before = contents(store)
        store[f"new{step}"].update([1, 2], np.ones((2, 4), np.float32))
    store.commit(step=4)
    shutil.copytree(folder / "open", crashed)
    close_quietly(store)
    found = {}
    for path in (closed, crashed):
        with shardemb.open(path, "r") as store:
            found[path] = contents(store)
    return found, before


def damage_many(seed, count=DAMAGES // PARTS):
    """Return how often damage was refused, reported, or changed nothing."""
    chance = random.Random(seed)
    counts = dict.fromkeys(["refused", "reported", "harmless"], 0)
    with scratch() as folder:
        victims, before = make_victims(Path(folder))
        copy = Path(folder) / "copy"
        for number in range(count):
            victim = chance.choice(list(victims))
            shutil.copytree(victim, copy)
            done = damage_something(copy, chance)
            try:
                with shardemb.open(copy, chance.choice(["r", "r+"])) as store:
                    reported = store.verify()
                    found = contents(store)
            except ShardEmbError:
                counts["refused"] += 1
            else:
                if reported:
                    counts["reported"] += 1
                else:
                    counts["harmless"] += 1
                    # Nothing says that the last commit was there, where its record is gone: it looks cut short.
                    allowed = [victims[victim], *([before] if ".log" in done else [])]
                    assert found in allowed, (seed, number, victim.name, done)
            shutil.rmtree(copy)
    return counts
