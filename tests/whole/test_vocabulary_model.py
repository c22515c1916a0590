"""Any sequence of calls on a vocabulary with two tables, against a dict: after each call all keys, rows and bits agree.

Limits are so small that in a few dozen calls the index is merged and rebuilt, tables and the ring of freed rows grow,
and batches are split into slices.
"""

import contextlib
import copy
import os
import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import inside
from support.model import KeyedModel, VocabularyModel, assert_same_bits
from support.power_loss import scratch
from support.small import KEY_TYPES, let_hashes_collide, make_small, pool_of
from support.stores import close_quietly

import shardemb
from shardemb.compute import plan
from shardemb.errors import RowIdError, UnknownKeyError
from shardemb.format import store_paths
from shardemb.initializers import Constant, Uniform
from shardemb.optim import SGD, Adam, RowWiseAdagrad

EXAMPLES = int(os.environ.get("SHARDEMB_EXAMPLES", "8"))
STEPS = int(os.environ.get("SHARDEMB_EXAMPLE_STEPS", "30"))
SEEDS = st.integers(0, 2**32 - 1)
DIM, MOST_ROWS = 4, 8192
MISSING = object()


class VocabularyMachine(RuleBasedStateMachine):
    """A store with a vocabulary, what it should hold, and the calls that change it."""

    @initialize(
        seed=SEEDS,
        key_type=st.sampled_from(KEY_TYPES),
        how=st.sampled_from(["", "", "admission", "collisions"]),
        reserved=st.sampled_from([0, 0, 3]),
        threads=st.integers(1, 3),
        budget=st.sampled_from([0, 20_000, 2**40]),
        log_bytes=st.sampled_from([1, 2**30]),
    )
    def open(self, seed, key_type, how, reserved, threads, budget, log_bytes):
        self.patch = pytest.MonkeyPatch()
        self.rng = np.random.default_rng(seed)
        self.key_type, self.pool = key_type, pool_of(key_type, self.rng)
        make_small(self.patch, random.Random(seed))
        self.patch.setattr(plan, "TASK_BYTES", 500 if seed % 2 else 2**20)
        if how == "collisions":
            let_hashes_collide(self.patch)
        self.folder = scratch()
        self.options = {"threads": threads, "memory_budget": budget, "log_bytes": log_bytes}
        self.path = Path(self.folder.name) / "store.zarr"
        self.store = shardemb.open(self.path, **self.options)
        self.reader = None
        # So large that no two of these keys share all their counters.
        admission = shardemb.Admission(after=2, width=2**16, depth=4) if how == "admission" else None
        self.store.create_vocabulary("v", key_type=key_type, admission=admission, reserved=reserved)
        self.model = VocabularyModel(reserved=reserved, after=2 if admission else 1)
        self.tables, self.made = {}, {}
        self.create("early", counters=True, optimizer=Adam(lr=0.1), initializer=Uniform(-1, 1, seed=5))
        self.changed = set()
        self.commit()

    def teardown(self):
        if hasattr(self, "store"):
            self.close_reader()
            close_quietly(self.store)
            self.folder.cleanup()
            self.patch.undo()

    def create(self, name, **arguments):
        table = self.store.create_table(
            name, vocabulary="v", embedding_dim=DIM, rows_per_shard=64, **arguments
        )
        self.tables[name] = KeyedModel.new(
            inside.state(table.rows).spec.stream, num_embeddings=MOST_ROWS, embedding_dim=DIM, **arguments
        )
        self.made[name] = object()

    # ---- arguments of calls

    @property
    def vocabulary(self):
        return self.store.vocabularies["v"]

    def some_keys(self, most=60):
        """Draw a batch of keys: uniformly from the pool, or a few of them many times."""
        size = int(self.rng.integers(0, most))
        which = (
            self.rng.integers(0, len(self.pool), size)
            if self.rng.random() < 0.6
            else self.rng.zipf(1.3, size) % len(self.pool)
        )
        return [self.pool[i] for i in which.tolist()]

    def given(self, keys):
        """Return a batch in one of the forms that are accepted."""
        kind = {"int64": pa.int64(), "string": pa.string(), "bytes": pa.binary()}[self.key_type]
        form = self.rng.integers(0, 4)
        if form == 0:
            return np.array(keys, np.int64 if self.key_type == "int64" else object)
        if form == 1:
            return pa.array(keys, kind)
        return pa.chunked_array([keys[:3], keys[3:]], kind) if form == 2 else keys

    def known_keys(self, most=60):
        known = list(self.model.rows)
        size = int(self.rng.integers(0, most)) if known else 0
        return [known[i] for i in self.rng.integers(0, max(len(known), 1), size).tolist()]

    def vectors(self, count):
        return self.rng.normal(size=(count, DIM)).astype(np.float32)

    def a_table(self, data):
        name = data.draw(st.sampled_from(sorted(self.tables)), label="table")
        return name, self.store[name], self.tables[name]

    # ---- keys

    @rule(most=st.sampled_from([10, 60, 400]))
    def add(self, most):
        keys = self.some_keys(most)
        before = self.model.num_rows, len(self.model.rows), sum(self.model.seen.values())
        expected = self.model.add(keys)
        assert self.vocabulary.add(self.given(keys)).tolist() == expected
        if (self.model.num_rows, len(self.model.rows)) != before[:2]:
            self.changed.add("v")
        if self.model.after > 1 and sum(self.model.seen.values()) != before[2]:
            self.changed.add("v")

    @rule(most=st.sampled_from([10, 200]), known=st.booleans())
    def remove(self, most, known):
        keys = self.known_keys(most) if known else self.some_keys(most)
        expected = self.model.remove(keys)
        assert self.vocabulary.remove(self.given(keys)).tolist() == expected
        self.forget([row for row in expected if row >= 0])

    @rule()
    def remove_most(self):
        keys = self.known_keys(5)
        keys = [key for key in self.model.rows if key not in keys]
        self.forget(self.model.remove(keys))
        self.vocabulary.remove(keys)

    def forget(self, rows):
        if rows:
            self.changed.add("v")
        for table in self.tables.values():
            table.reset(rows)

    @rule(how=st.sampled_from([{"older_than": 2}, {"older_than": 0}, {"keep": 20}, {"keep": 5, "by": "lfu"}]))
    def evict(self, how):
        rows = self.tables["early"].evicted(sorted(self.model.rows.values()), **how)
        by_row = self.model.by_row()
        expected = [by_row[row] for row in rows]
        self.model.remove(expected)
        assert self.store["early"].evict(**how).tolist() == expected
        self.forget(rows)

    # ---- rows

    @rule(data=st.data())
    def look(self, data):
        _, table, model = self.a_table(data)
        keys = self.some_keys()
        rows = self.model.lookup(keys)
        new = dict.fromkeys(key for key, row in zip(keys, rows, strict=True) if row < 0)
        to_be = dict(zip(new, self.model.next_rows(len(new)), strict=True))
        assert_same_bits(
            table.lookup(keys, missing="zeros"), _with(model.weights, rows, np.zeros(DIM, np.float32))
        )
        initial = [row if row >= 0 else to_be[key] for key, row in zip(keys, rows, strict=True)]
        expected = np.where(
            np.array(rows)[:, None] >= 0, model.weights[initial], model.fresh.weights[initial]
        )
        assert_same_bits(table.lookup(self.given(keys), missing="initial"), expected.reshape(-1, DIM))
        if self.model.reserved:
            shown = [max(row, 1) if row < 0 else row for row in rows]
            assert_same_bits(table.lookup(keys, missing=1), model.weights[shown].reshape(-1, DIM))
        if new:
            with pytest.raises(UnknownKeyError, match="has no row"):
                table.lookup(keys)

    @rule(data=st.data())
    def look_and_create(self, data):
        _, table, model = self.a_table(data)
        keys = self.some_keys()
        before = self.model.num_rows, len(self.model.rows), dict(self.model.seen)
        rows = self.model.add(keys)
        found = table.lookup(keys, create=True, missing="zeros")
        assert_same_bits(found, _with(model.weights, rows, np.zeros(DIM, np.float32)))
        if (self.model.num_rows, len(self.model.rows)) != before[:2]:
            self.changed.add("v")
        if self.model.after > 1 and self.model.seen != before[2]:
            self.changed.add("v")

    @rule(data=st.data(), known=st.booleans())
    def update(self, data, known):
        name, table, model = self.a_table(data)
        keys = self.known_keys() if known else self.some_keys()
        gradients = self.vectors(len(keys))
        rows = np.array(self.model.lookup(keys), np.int64)
        if (rows < 0).any():
            with pytest.raises(UnknownKeyError):
                table.update(keys, gradients)
        table.update(self.given(keys), gradients, missing="skip")
        model.update(rows[rows >= 0], gradients[rows >= 0])
        self.changed.add(name)

    @rule(data=st.data())
    def update_and_write(self, data):
        name, table, model = self.a_table(data)
        keys = self.known_keys()
        values = self.vectors(len(keys))
        rows = self.model.lookup(keys)
        self.store.update(dict.fromkeys(self.tables, (keys, values)))
        for each in self.tables.values():
            each.update(rows, values)
        table.write(keys, -values)
        model.write(rows, -values)
        self.changed |= {name, *self.tables}

    @rule(data=st.data())
    def reset(self, data):
        _, table, model = self.a_table(data)
        rows = self.rng.integers(0, table.rows.num_embeddings, 5)
        table.rows.reset_rows(rows)
        model.reset(rows)
        self.changed.add(MISSING)  # unknown: rows that were never written may not count as changed

    # ---- tables

    @precondition(lambda self: "late" not in self.tables)
    @rule(which=st.sampled_from([SGD(lr=0.5), RowWiseAdagrad(lr=0.1)]), value=st.sampled_from([0.0, 2.0]))
    def create_late(self, which, value):
        self.create("late", optimizer=which, initializer=Constant(value), counters=value > 0)

    @precondition(lambda self: "late" in self.tables)
    @rule()
    def drop_late(self):
        self.store.drop_table("late")
        del self.tables["late"], self.made["late"]
        self.changed.discard("late")

    @rule(rows_per_shard=st.sampled_from([64, 128]))
    def reshard(self, rows_per_shard):
        self.commit()
        self.store.reshard("early", rows_per_shard=rows_per_shard)

    # ---- commits

    def commit(self):
        self.store.commit()
        self.model.commit()
        self.settle()
        if self.reader is None:
            self.reader = shardemb.open(self.path, "r")
        else:
            self.reader.refresh()
        self.assert_matches(self.reader)

    def settle(self):
        self.saved = copy.deepcopy((self.model, self.tables)), dict(self.made)
        self.changed = set()

    def go_back(self):
        (self.model, self.tables), self.made = copy.deepcopy(self.saved[0]), dict(self.saved[1])
        self.changed = set()

    def close_reader(self):
        if self.reader is not None:
            self.reader.close()
            self.reader = None

    def reopen(self):
        self.go_back()
        self.store = shardemb.open(self.path, **self.options)
        assert self.store.verify() == []

    @rule(first=st.booleans(), damage=st.sampled_from(["", "", "missing", "cut", "noise", "of another"]))
    def close_and_open(self, first, damage):
        if first:
            self.commit()
        self.close_reader()
        assert self.store.verify() == []
        path = store_paths.index(self.path, inside.key_rows(self.vocabulary).entry.uuid)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            self.store.close()
        if damage and path.exists():
            damage_index(path, damage, self.rng)
        self.reopen()

    @rule(first=st.booleans(), change=st.booleans())
    def crash(self, first, change):
        """Continue with the files as a process leaves them that is killed now."""
        if first:
            self.commit()
        if change:
            self.vocabulary.add(self.some_keys(100))
            self.vocabulary.remove(self.some_keys(20))
        self.close_reader()
        left = self.path.with_name(f"{self.path.name}+")
        with inside.runtime(self.store).lock:  # other tests crash within a change
            inside.journal(self.store)._wait()
            shutil.copytree(self.path, left)
        close_quietly(self.store)
        shutil.rmtree(self.path)
        self.path = left
        self.reopen()

    @rule()
    def roll_back(self):
        self.store.rollback()
        self.go_back()
        assert not self.store.has_changes

    @rule(checkpoint=st.booleans())
    def commit_now(self, checkpoint):
        self.commit()
        if checkpoint:
            self.store.checkpoint()

    @rule()
    def copy_it(self):
        to = self.path.with_name("copy")
        self.store.copy(to)
        now = self.model, self.tables
        self.model, self.tables = self.saved[0]
        with shardemb.open(to, **self.options) as copied:
            self.assert_matches(copied)
        self.model, self.tables = now
        shutil.rmtree(to)

    # ---- invariants

    def assert_matches(self, store):
        found = store.vocabularies["v"]
        self.model.assert_matches(found)
        assert found.lookup(self.pool).tolist() == self.model.lookup(self.pool)
        assert (self.pool[0] in found) == (self.pool[0] in self.model.rows)
        gone = sorted({*range(self.model.num_rows)} - {*self.model.rows.values()})
        for row in gone[:2]:
            with pytest.raises(RowIdError, match="has no key"):
                found.keys([row])
        assert set(store) == set(self.tables)
        for name, model in self.tables.items():
            assert store[name].rows.num_embeddings >= self.model.num_rows
            assert len(store[name]) == len(self.model.rows)
            model.assert_matches(store[name].rows)

    @invariant()
    def the_same(self):
        self.assert_matches(self.store)
        assert inside.key_rows(self.vocabulary).check_index()
        if MISSING not in self.changed:
            assert self.store.has_changes == bool(self.changed or self.made != self.saved[1])


def _with(weights, rows, other):
    """Return rows of an array, and another value for row -1."""
    rows = np.array(rows, np.int64)
    return np.where(rows[:, None] >= 0, weights[rows], other).reshape(-1, DIM)


def damage_index(folder, damage, rng):
    """Damage one of the files in a folder."""
    path = folder / str(rng.choice(sorted(os.listdir(folder))))
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
        return
    if damage == "cut":
        del data[int(rng.integers(0, len(data))) :]
    if damage == "noise":
        data[:200] = rng.bytes(200)
    if damage == "of another":
        with contextlib.suppress(ValueError):
            at = data.index(b'"uuid": "') + 9
            data[at] = ord("0") if data[at] != ord("0") else ord("1")
    path.write_bytes(data)


TestVocabulary = VocabularyMachine.TestCase
TestVocabulary.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, phases=set(Phase) - {Phase.explain}
)
