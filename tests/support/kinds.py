"""Tables of all kinds that commits, copies and rewritten tables are tested with."""

import numpy as np

from shardemb.initializers import Normal, Uniform
from shardemb.optim import Adagrad, Adam, RowWiseAdagrad
from support import inside
from support.model import assert_same_bits

DIM = 5
KINDS = {
    "zeros": {},
    "drawn": {"initializer": Uniform(-1, 1, seed=3), "optimizer": Adam(lr=0.1)},
    "state_alone": {"optimizer": Adagrad(lr=0.1, initial_accumulator_value=0.5)},
    "row-wise": {"initializer": Normal(seed=1), "optimizer": RowWiseAdagrad()},
}


def create(store, rows, kind="drawn", name="t", rows_per_shard=192):
    return store.create_table(
        name, num_embeddings=rows, embedding_dim=DIM, rows_per_shard=rows_per_shard, **KINDS[kind]
    )


def train(table, seed, count=40):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, table.num_embeddings, count)
    values = rng.normal(size=(count, DIM)).astype(np.float32)
    table.update(ids, values) if table.optimizer else table.write(ids, values)


def everything(table):
    ids = np.arange(table.num_embeddings)
    states = [table.state(column, ids) for column in list(inside.state(table).spec.columns)[1:]]
    return [table.lookup(ids), *(each.reshape(ids.size, -1) for each in states)]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same_bits(mine, theirs)


def damage(path, offset=100):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
