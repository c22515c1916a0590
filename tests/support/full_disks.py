"""Disks of every fullness."""

import copy
import os
import pickle
import random
import signal
import tempfile
import threading
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import shardemb
from shardemb.commits import fold
from shardemb.errors import DiskFullError, StoreNotFoundError
from shardemb.initializers import Constant, Uniform
from shardemb.optim import SGD, Adagrad, Adam
from support import inside
from support.failures import Failing
from support.model import StoreModel, TableModel, assert_same_bits
from support.power_loss import NOTHING, contents
from support.stores import SmallDisk, run_in_fork

DISKS = int(os.environ.get("SHARDEMB_FULL_DISKS", "10"))


LIVES, CALLS = 4, 20


DISK_BYTES = 20 * 2**20


DIM = 16


ROOM = [0, 0, 5_000, 30_000, 100_000, 300_000, 10**6, 4 * 10**6]


NAMES = ["a", "b", "c"]


_write = fold.write


class Killing(Failing):
    """Ends the process before the operation of a number."""

    def _fail(self, name, real, arguments):
        os.kill(os.getpid(), signal.SIGKILL)


class Life:
    """One opening of a store, what it should hold, and random calls of which a full disk may refuse any.

    Parameters
    ----------
    path : Path
        Of the store.
    model : StoreModel
        As of the last commit.
    disk : SmallDisk or None
        Without one there is room for everything.
    notes : Path
        File to note in, before and after each commit, what may be found from then on, and what was refused.
    """

    def __init__(self, path, model, disk, notes, seed):
        self.path, self.model, self.disk, self.notes = path, model, disk, notes
        self.chance, self.rng = random.Random(seed), np.random.default_rng(seed)
        self.folds = random.Random(seed)  # those in a thread
        self.refused, self.filling, self.lock = Counter(), False, threading.Lock()

    def run(self, kill):
        with warnings.catch_warnings(), Killing(kill).on(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(fold, "write", self.fold)
            warnings.simplefilter("ignore")  # what is not committed is lost; what is not folded is in the log
            self.note(self.model)
            self.change_room()
            options = {
                "log_bytes": self.chance.choice([1, 300_000, 2**30, 2**30]),
                "memory_budget": self.chance.choice([0, 100_000, 2**30]),
                "threads": 1,
            }
            if not self.attempt(self.open, options):
                self.make_room()
                self.open(options)
            self.compare()
            for _ in range(CALLS):
                if self.chance.random() < 0.4:
                    self.change_room()
                getattr(self, self.chance.choice(self.possible()))()
            self.make_room()
            assert self.commit(), "refused with room"
            self.compare()
            damage = self.store.verify()
            assert damage == [], damage
            if self.chance.random() < 0.5:
                self.change_room()
                self.attempt(self.store.checkpoint)
                self.commit()
            if kill:
                os.kill(os.getpid(), signal.SIGKILL)
            self.store.close()

    # ---- the disk

    def change_room(self):
        with self.lock:
            self.filling = True
            if self.disk:
                self.disk.leave(self.chance.choice(ROOM))

    def make_room(self):
        with self.lock:
            self.filling = False
            if self.disk:
                self.disk.make_room()

    def fold(self, tables, threads, *rest):
        """Write into the shards, maybe with less room than there was when it was begun."""
        with self.lock:
            many = any(images.ids.size > 100 for *_, images in tables)
            if self.disk and self.filling and self.folds.random() < (0.8 if many else 0.2):
                self.disk.leave(self.folds.choice([0, 5_000, 30_000]))
        try:
            _write(tables, threads, *rest)
        except DiskFullError:
            self.refused["fold"] += 1
            raise

    def attempt(self, call, *arguments, **options):
        """Return whether a call went through; a full disk refuses it, and breaks nothing."""
        try:
            call(*arguments, **options)
        except DiskFullError as error:
            assert str(error)
            assert self.disk, "refused without a disk"
            if call != self.open:
                assert inside.runtime(self.store).poisoned is None
                assert inside.runtime(self.store).half_done is None
            self.refused[call.__name__] += 1
            return False
        return True

    def note(self, *allowed):
        staged = self.notes.with_suffix(".new")
        staged.write_bytes(pickle.dumps((allowed, self.refused)))
        staged.replace(self.notes)

    # ---- calls

    def possible(self):
        if not self.model.tables:
            return ["create", "create", "create", "commit", "rollback"]
        calls = 3 * ["update", "write", "commit"] + 2 * ["write", "checkpoint"]
        calls += ["look", "read_beside", "rollback", "drop", "rename"]
        return calls if len(self.model.tables) == len(NAMES) else [*calls, "create", "create"]

    def open(self, options):
        self.store = shardemb.open(self.path, **options)

    def compare(self):
        """Compare all that the store holds; needs room where pages are out."""
        self.model.assert_matches(self.store)

    def create(self):
        name = self.chance.choice([each for each in NAMES if each not in self.model.tables])
        rows = self.chance.choice([100, 1000, 4000])
        values = self.rng.normal(size=(rows, DIM)).astype(np.float32)
        arguments = {
            "num_embeddings": rows,
            "embedding_dim": DIM,
            "initializer": self.chance.choice([None, Constant(2.0), Uniform(-1, 1, seed=1), values]),
            "optimizer": self.chance.choice([None, SGD(lr=0.5), Adam(lr=0.1), Adagrad(lr=0.1)]),
            "rows_per_shard": self.chance.choice([None, 256]),
        }
        if self.attempt(self.store.create_table, name, **arguments):
            self.model.tables[name] = TableModel.new(name, **arguments)
            # Whether two tables of one name draw the same values is another test's question.
            self.model.tables[name].weights = self.store[name].lookup(np.arange(rows))
        else:
            assert name not in self.store

    def drop(self):
        name = self.chance.choice(list(self.model.tables))
        self.store.drop_table(name)
        del self.model.tables[name]

    def rename(self):
        old = self.chance.choice(list(self.model.tables))
        new = self.chance.choice(NAMES)
        if new not in self.model.tables:
            self.store.rename_table(old, new)
            self.model.tables = {new if name == old else name: t for name, t in self.model.tables.items()}

    def batch(self):
        """Choose a table and rows of it, some or all."""
        name = self.chance.choice(list(self.model.tables))
        rows = len(self.model.tables[name].weights)
        size = self.chance.choice([1, 50, rows, rows])
        ids = self.rng.permutation(rows)[:size]
        return name, ids, self.rng.normal(size=(ids.size, DIM)).astype(np.float32)

    def update(self):
        name, ids, gradients = self.batch()
        if self.model.tables[name].optimizer and self.attempt(self.store[name].update, ids, gradients):
            self.model.tables[name].update(ids, gradients)

    def write(self):
        name, ids, rows = self.batch()
        if self.attempt(self.store[name].write, ids, rows):
            self.model.tables[name].write(ids, rows)

    def look(self):
        name, ids, _ = self.batch()
        found = []
        if self.attempt(lambda: found.append(self.store[name].lookup(ids))):
            assert_same_bits(found[0], self.model.tables[name].lookup(ids))

    def commit(self):
        future = copy.deepcopy(self.model)
        future.commit(self.model.commit_id + 1, {})
        self.note(self.model, future)
        done = self.attempt(self.store.commit, step=future.commit_step)
        self.model = future if done else self.model
        self.note(self.model)
        return done

    def checkpoint(self):
        return self.attempt(self.store.checkpoint)

    def rollback(self):
        if not self.attempt(self.store.rollback):
            self.make_room()
            self.store.rollback()
        self.model.rollback()
        assert not self.store.has_changes

    def read_beside(self):
        """A reader needs no room."""
        with shardemb.open(self.path, "r", threads=1) as reader:
            assert contents(reader) == committed(self.model)


def committed(model):
    """What `contents` finds at a model's last commit."""
    found = {
        name: (t.step, t.optimizer, t.weights.tobytes(), *(each.tobytes() for each in t.state.values()))
        for name, t in model.committed.items()
    }
    return (model.commit_id, model.commit_step, ()) if model.commit_id else None, found


def look_at(path, mode):
    """Open a store and return what it holds; None where a full disk refuses that, or there is none yet."""
    try:
        store = shardemb.open(path, mode, threads=1)
    except (DiskFullError, StoreNotFoundError) as error:
        assert isinstance(error, StoreNotFoundError if mode == "r" else DiskFullError)
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is not folded is in the log
        with store:
            assert store.verify() == []
            return contents(store)


def alone(function, *arguments, may_be_killed=False):
    """Call a function in a fork, where a signal is seen."""
    answer, died_of = run_in_fork(function, *arguments)
    if isinstance(answer, BaseException):
        raise answer
    assert died_of == 0 or (may_be_killed and died_of == signal.SIGKILL), signal.Signals(died_of)
    return answer


def fill_disks(seed):
    """Let a store live on a small disk; return what was refused, by the name of the call."""
    chance, refused, model = random.Random(seed), Counter(), StoreModel()
    kind = ["ext4", "tmpfs"][seed % 2]
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "notes"
        # What is compiled here is not compiled in every fork. Also: with room nothing is refused.
        Life(Path(folder) / "warm", StoreModel(), None, notes, seed).run(None)
        disk = SmallDisk(kind, folder, DISK_BYTES)
        try:
            path = disk.place / "store"
            for number in range(LIVES):
                kill = chance.choice([None, int(10 ** chance.uniform(0, 2.7))])
                life = Life(path, copy.deepcopy(model), disk, notes, 100 * seed + number)
                what = f"seed {seed}, {kind}, life {number}, kill {kill}"
                try:
                    alone(life.run, kill, may_be_killed=kill)
                    models, found = pickle.loads(notes.read_bytes())
                    refused += found
                    allowed = [committed(each) for each in models]
                    disk.leave(chance.choice(ROOM))
                    for mode in ("r", "a", "r"):
                        found = alone(look_at, path, mode)
                        refused[f"mode {mode}"] += found is None and mode == "a"
                        assert found in allowed or (found is None and (mode == "a" or NOTHING in allowed))
                        allowed = allowed if found is None else [found]
                    disk.make_room()
                    found = alone(look_at, path, "a")
                    assert found in allowed
                    model = next(each for each in models if committed(each) == found)
                    model.rollback()
                except BaseException as error:
                    error.add_note(what)
                    raise
        finally:
            disk.unmount()
    return refused
