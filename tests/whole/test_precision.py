"""Tables of every precision, against NumPy and the types of the package ml_dtypes."""

import shutil

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import encodings

import shardemb
from shardemb.dtypes import BlockScaled, Plain, ScaledInt8, Stochastic
from shardemb.initializers import Constant, Uniform
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad

ROWS, DIM = 300, 6

every_dtype = pytest.mark.parametrize("dtype", encodings.EVERY, ids=lambda dtype: dtype.label)


class Model:
    """What a table should hold: the bytes of its rows, and those of the last commit."""

    def __init__(self, dtype, initial):
        self.dtype = dtype
        self.rows = encodings.encode(dtype, np.full((ROWS, DIM), initial, np.float32))
        self.committed = self.rows.copy()

    def values(self):
        return encodings.decode(self.dtype, self.rows, DIM)

    def write(self, ids, values):
        for row, value in zip(ids, values, strict=True):
            self.rows[row] = encodings.encode(self.dtype, value[None])[0]

    def update(self, ids, grads, lr):
        for row in dict.fromkeys(ids):
            total = np.zeros(DIM, np.float32)
            for each, grad in zip(ids, grads, strict=True):
                if each == row:
                    total = grad.copy() if not total.any() else total + grad
            weight = encodings.decode(self.dtype, self.rows[row : row + 1], DIM)[0]
            self.rows[row] = encodings.encode(self.dtype, (weight - np.float32(lr) * total)[None])[0]


NUMBERS = st.floats(-100, 100, width=32)
IDS = st.lists(st.integers(0, ROWS - 1) | st.integers(0, 3), min_size=1, max_size=6)
STEPS = st.lists(
    st.tuples(st.sampled_from(["write", "update", "raw"]), IDS, st.integers(0, 2**32 - 1))
    | st.sampled_from(["commit", "rollback", "reopen", "checkpoint"]),
    max_size=10,
)


@every_dtype
@given(steps=STEPS, initial=st.sampled_from([0.0, 0.3]), small=st.booleans())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_table_holds_what_the_model_holds(dtype, steps, initial, small, tmp_path):
    shutil.rmtree(tmp_path / "s", ignore_errors=True)
    model, options = Model(dtype, initial), {"memory_budget": 0} if small else {}
    store = shardemb.open(tmp_path / "s", **options)
    store.create_table(
        "t", num_embeddings=ROWS, embedding_dim=DIM, dtype=dtype, optimizer=SGD(lr=0.5),
        initializer=Constant(initial), rows_per_shard=1,
    )  # fmt: skip
    store.commit()
    for step in steps:
        table = store["t"]
        if step == "commit":
            store.commit()
            model.committed = model.rows.copy()
        elif step == "rollback":
            store.rollback()
            model.rows = model.committed.copy()
        elif step == "checkpoint":
            store.checkpoint()
        elif step == "reopen":
            store.commit()
            model.committed = model.rows.copy()
            store.close()
            store = shardemb.open(tmp_path / "s", **options)
        else:
            what, ids, seed = step
            values = np.random.default_rng(seed).uniform(-3, 3, (len(ids), DIM)).astype(np.float32)
            if what == "write":
                table.write(ids, values)
                model.write(ids, values)
            elif what == "update":
                # Of ids that occur once: what LLVM makes of the formula may be fused.
                ids = list(dict.fromkeys(ids))
                grads = np.round(values[: len(ids)] * 4) / 4
                before = model.values()[ids]
                table.update(ids, grads)
                model.write(ids, before - np.float32(0.5) * grads)
            else:
                data = encodings.encode(dtype, values)
                table.write(ids, data)
                for row, some in zip(ids, data, strict=True):
                    model.rows[row] = some
        table = store["t"]
        np.testing.assert_array_equal(table.lookup(np.arange(ROWS), dtype="raw"), model.rows)
        np.testing.assert_array_equal(table.lookup(np.arange(ROWS)), model.values())
    assert store.verify() == []
    store.rollback()
    store.close()
    with shardemb.open(tmp_path / "s", mode="r") as store:
        np.testing.assert_array_equal(store["t"].lookup(np.arange(ROWS), dtype="raw"), model.committed)
