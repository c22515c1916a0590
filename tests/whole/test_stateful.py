"""Any sequence of calls on a store against the model: every table, every row and every bit the same after each call."""

import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import inside
from support.model import StoreModel, TableModel, assert_same_bits
from support.power_loss import scratch
from support.stores import close_quietly

import shardemb
from shardemb.compute import plan
from shardemb.errors import RowIdError, TableExistsError
from shardemb.initializers import Constant, Normal, Uniform
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad

EXAMPLES = int(os.environ.get("SHARDEMB_EXAMPLES", "100"))
STEPS = int(os.environ.get("SHARDEMB_EXAMPLE_STEPS", "30"))
NAMES = ["a", "b", "c"]
# Records of 64, 128 and 192 bytes lie in shards of 64 rows; those of 68 bytes, for RowWiseAdagrad, in shards of 1,024.
DIM = 16
NUM_ROWS = [150, 1, 64, 1100]
OPTIMIZERS = [
    None,
    SGD(lr=0.5),
    Adagrad(lr=0.1, initial_accumulator_value=0.5),
    RowWiseAdagrad(lr=0.1),
    Adam(lr=0.1),
]
INITIALIZERS = [None, Constant(2.0), Uniform(-1, 1, seed=1), Normal(seed=2), "array"]
SEEDS = st.integers(0, 2**32 - 1)


def has_tables(machine):
    return bool(machine.model.tables)


def has_optimizers(machine):
    return any(model.optimizer for model in machine.model.tables.values())


class StoreMachine(RuleBasedStateMachine):
    """A store, what it should hold, and what can be done to it."""

    @initialize(
        data=st.data(),
        threads=st.integers(1, 3),
        budget=st.sampled_from([0, 50_000, 2**40]),
        log_bytes=st.sampled_from([1, 2**30]),
        task_bytes=st.sampled_from([500, 2**20]),
    )
    def open(self, data, threads, budget, log_bytes, task_bytes):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(plan, "TASK_BYTES", task_bytes)
        self.folder = scratch()
        self.options = {"threads": threads, "memory_budget": budget, "log_bytes": log_bytes}
        self.path = Path(self.folder.name) / "store.zarr"
        self.store = shardemb.open(self.path, **self.options)
        self.model = StoreModel()
        for name in data.draw(st.sampled_from([["a", "b"], ["b"]]), label="tables to begin with"):
            self.new_table(data, name)
        self.store.commit(step=0)
        self.model.commit(0, {})

    def teardown(self):
        if hasattr(self, "store"):
            close_quietly(self.store)
            self.folder.cleanup()
            self.patch.undo()

    def new_table(self, data, name):
        num_rows = data.draw(st.sampled_from(NUM_ROWS), label="rows")
        initializer = data.draw(st.sampled_from(INITIALIZERS), label="initializer")
        arguments = {
            "num_embeddings": num_rows,
            "embedding_dim": DIM,
            "optimizer": data.draw(st.sampled_from(OPTIMIZERS), label="optimizer"),
            "initializer": np.arange(num_rows * DIM).reshape(-1, DIM)
            if initializer == "array"
            else initializer,
            "rows_per_shard": data.draw(st.sampled_from([None, 64]), label="rows_per_shard"),
        }
        table = self.store.create_table(name, **arguments)
        model = TableModel.new(name, **arguments)
        # Whether two tables of one name draw the same values is another test's question.
        model.weights = table.lookup(np.arange(num_rows))
        self.model.tables[name] = model

    def a_table(self, data, *, trained=False):
        """Choose a table; return it and its model."""
        names = [name for name, model in self.model.tables.items() if model.optimizer or not trained]
        name = data.draw(st.sampled_from(names), label="table")
        return self.store[name], self.model.tables[name]

    def a_batch(self, data, model):
        """Choose ids, all over the table or a few of them many times, and as many vectors."""
        rng = np.random.default_rng(data.draw(SEEDS, label="seed of a batch"))
        size = int(rng.integers(0, 100))
        ids = (
            rng.integers(0, len(model.weights), size)
            if rng.random() < 0.7
            else rng.zipf(1.5, size) % len(model.weights)
        )
        return ids, rng.normal(size=(size, DIM)).astype(np.float32)

    # ---- tables

    @precondition(lambda self: len(self.model.tables) < len(NAMES))
    @rule(data=st.data())
    def create(self, data):
        free = [name for name in NAMES if name not in self.model.tables]
        self.new_table(data, data.draw(st.sampled_from(free), label="name"))

    @precondition(has_tables)
    @rule(data=st.data())
    def drop(self, data):
        table, _ = self.a_table(data)
        del self.model.tables[table.name]
        self.store.drop_table(table.name)

    @precondition(has_tables)
    @rule(data=st.data(), new=st.sampled_from(NAMES))
    def rename(self, data, new):
        table, _ = self.a_table(data)
        old = table.name
        if new in self.model.tables:
            with pytest.raises(TableExistsError):
                self.store.rename_table(old, new)
            return
        self.store.rename_table(old, new)
        self.model.tables = {new if name == old else name: model for name, model in self.model.tables.items()}

    # ---- rows

    @precondition(has_optimizers)
    @rule(data=st.data())
    def update(self, data):
        table, model = self.a_table(data, trained=True)
        ids, gradients = self.a_batch(data, model)
        table.update(ids, gradients)
        model.update(ids, gradients)

    @precondition(has_optimizers)
    @rule(data=st.data())
    def update_many(self, data):
        trained = {name: model for name, model in self.model.tables.items() if model.optimizer}
        batches = {name: self.a_batch(data, model) for name, model in trained.items()}
        self.store.update(batches)
        for name, (ids, gradients) in batches.items():
            trained[name].update(ids, gradients)

    @precondition(has_tables)
    @rule(data=st.data())
    def write_rows(self, data):
        self.write(data)

    def write(self, data):
        table, model = self.a_table(data)
        ids, rows = self.a_batch(data, model)
        table.write(ids, rows)
        model.write(ids, rows)

    @precondition(has_optimizers)
    @rule(data=st.data(), lr=st.sampled_from([0.0, 0.25, 0.5]))
    def set_optimizer(self, data, lr):
        table, model = self.a_table(data, trained=True)
        model.optimizer = replace(model.optimizer, lr=lr)
        table.set_optimizer(model.optimizer)

    @precondition(has_tables)
    @rule(data=st.data())
    def look_and_prefetch(self, data):
        table, model = self.a_table(data)
        ids, rows = self.a_batch(data, model)
        assert_same_bits(table.lookup(ids), model.lookup(ids))
        with pytest.raises(RowIdError):
            table.write([*ids, len(model.weights)], [*rows, np.ones(DIM)])
        table.prefetch(ids, for_update=True)

    # ---- commits

    def commit(self, step=None, metadata=None):
        commit = self.store.commit(step=step, metadata=metadata)
        self.model.commit(step, metadata or {})
        assert commit == self.store.last_commit
        assert not self.store.has_changes
        with shardemb.open(self.path, "r") as reader:
            self.model.assert_matches(reader)

    def rollback(self):
        self.store.rollback()
        self.model.rollback()
        assert not self.store.has_changes

    def reopen(self):
        lost = self.store.has_changes
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.store.close()
        # Whatever is collected meanwhile may have warnings of its own.
        found = [warning for warning in caught if issubclass(warning.category, RuntimeWarning)]
        assert [warning.category for warning in found] == [RuntimeWarning] * lost, [
            str(w.message) for w in found
        ]
        self.model.rollback()
        self.store = shardemb.open(self.path, **self.options)
        assert self.store.verify() == []

    @rule()
    def checkpoint(self):
        self.store.checkpoint()

    @rule(data=st.data(), first=st.sampled_from(["", "commit", "commit and change"]))
    def crash(self, data, first):
        """Leave the store as a process leaves it that is killed now, with all that it has not committed."""
        if first:
            self.commit()
        if first.endswith("change") and self.model.tables:
            self.write(data)
        left = self.path.with_name(f"{self.path.name}+")
        journal = inside.journal(self.store)
        with inside.runtime(self.store).lock:  # nothing is copied that is half way; other tests crash there
            journal._wait()
            shutil.copytree(self.path, left)
        close_quietly(self.store)
        shutil.rmtree(self.path)
        self.path = left
        self.model.rollback()
        self.store = shardemb.open(self.path, **self.options)
        assert self.store.verify() == []

    @rule(how=st.sampled_from(["commit", "rollback", "reopen", "commit and reopen"]), data=st.data())
    def end_transaction(self, how, data):
        if how.startswith("commit"):
            step = data.draw(st.one_of(st.none(), st.integers(0, 100)), label="step")
            self.commit(step, data.draw(st.sampled_from([None, {}, {"loss": 0.5}]), label="metadata"))
        if how == "rollback":
            self.rollback()
        if how.endswith("reopen"):
            self.reopen()

    # ---- what always holds

    @invariant()
    def the_same(self):
        self.model.assert_matches(self.store)


TestStore = StoreMachine.TestCase
# Without the phase that explains: it takes longer than the tests, and hides the first failure if that depends on time.
TestStore.settings = settings(
    max_examples=EXAMPLES, stateful_step_count=STEPS, phases=set(Phase) - {Phase.explain}
)
