"""A store in plain NumPy, written from the formulas and not from the package: what the tests compare with.

Everything here is float32 and meant to be equal *bit for bit*: the formulas add and multiply in the order that the
documentation fixes.
"""

import copy
import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from shardemb import initializers, optim
from shardemb.base import sampling

F = np.float32


def assert_same_bits(actual, expected):
    """Assert that two float32 arrays have one shape and the same bits, NaNs and signs of zeros included."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype == np.float32
    assert actual.shape == expected.shape
    different = np.ascontiguousarray(actual).view(np.uint32) != np.ascontiguousarray(expected).view(np.uint32)
    if different.any():
        where = np.argwhere(different)
        first = tuple(where[0])
        raise AssertionError(
            f"{len(where)} of {actual.size} values differ, first at {first}: {actual[first]!r}, "
            f"expected {expected[first]!r}"
        )


# ---- initial values -------------------------------------------------------------------------------------------


def initial_weights(initializer, stream, num_embeddings, embedding_dim):
    """Initial weights of a whole table."""
    if isinstance(initializer, np.ndarray):
        return initializer.astype(F)
    if initializer is None or isinstance(initializer, initializers.Constant):
        return np.full((num_embeddings, embedding_dim), getattr(initializer, "value", 0.0), F)
    return _random_weights(initializer, stream, num_embeddings, embedding_dim).copy()


@lru_cache(maxsize=64)
def _random_weights(initializer, stream, num_embeddings, embedding_dim):
    units = _uniform_words(initializer.seed, stream, num_embeddings, embedding_dim)
    units = (units.astype(np.float64) + 0.5) / 2**32
    if isinstance(initializer, initializers.Uniform):
        values = (initializer.low + (initializer.high - initializer.low) * units).astype(F)
        return np.where(
            values < F(initializer.high), values, np.nextafter(F(initializer.high), F(initializer.low))
        )
    quantiles = [sampling.normal_quantile(unit) for unit in units.reshape(-1).tolist()]
    return F(initializer.mean) + F(initializer.std) * np.array(quantiles, F).reshape(units.shape)


def _uniform_words(seed, stream, num_rows, num_columns):
    """Philox4x32-10, all rows at once: counter (row, block of four columns), key from seed and stream."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + stream.encode(), digest_size=8).digest()
    key0, key1 = (int(word) for word in np.frombuffer(digest, "<u4"))
    blocks = -(-num_columns // 4)
    row, block = np.meshgrid(
        np.arange(num_rows, dtype=np.uint64), np.arange(blocks, dtype=np.uint64), indexing="ij"
    )
    low = np.uint64(2**32 - 1)
    half = np.uint64(32)
    c = [row & low, row >> half, block & low, block >> half]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> half) ^ c[1] ^ np.uint64(key0), b & low, (a >> half) ^ c[3] ^ np.uint64(key1), a & low]
        key0, key1 = (key0 + 0x9E3779B9) % 2**32, (key1 + 0xBB67AE85) % 2**32
    return np.stack(c, axis=-1).reshape(num_rows, 4 * blocks)[:, :num_columns]


# ---- optimizers -----------------------------------------------------------------------------------------------


def sum_duplicates(ids, gradients):
    """Return distinct ids, ascending, and the sum of each one's gradients in the order of the batch."""
    rows, inverse = np.unique(ids, return_inverse=True)
    sums = np.full((rows.size, gradients.shape[1]), -0.0, F)  # the zero that adding changes nothing to
    np.add.at(sums, inverse.reshape(-1), gradients)
    return rows, sums


def _mean_square(g):
    squares = g * g
    whole = g.shape[1] - g.shape[1] % 8
    lanes = np.zeros((len(g), 8), F)
    for j in range(0, whole, 8):
        lanes += squares[:, j : j + 8]
    while lanes.shape[1] > 1:
        lanes = lanes[:, ::2] + lanes[:, 1::2]
    total = lanes[:, 0]
    for j in range(whole, g.shape[1]):
        total = total + squares[:, j]
    return total / F(g.shape[1])


def optimizer_step(optimizer, t, w, state, g):
    """Take the `t`-th step of a table on rows `w` with state by column; return both anew."""
    match optimizer:
        case optim.SGD(lr=lr):
            return w - F(lr) * g, {}
        case optim.Adagrad(lr=lr, lr_decay=decay, eps=eps):
            total = state["sum"] + g * g
            return w - F(lr / (1 + (t - 1) * decay)) * (g / (np.sqrt(total) + F(eps))), {"sum": total}
        case optim.RowWiseAdagrad(lr=lr, eps=eps):
            total = state["sum"] + _mean_square(g)[:, None]
            return w - F(lr) / (np.sqrt(total) + F(eps)) * g, {"sum": total}
        case optim.Adam(lr=lr, betas=(b1, b2), eps=eps):
            m = state["exp_avg"] + F(1 - b1) * (g - state["exp_avg"])
            v = state["exp_avg_sq"] + F(1 - b2) * (g * g - state["exp_avg_sq"])
            size = F(lr * np.sqrt(1 - b2**t) / (1 - b1**t))
            return w - size * (m / (np.sqrt(v) + F(eps))), {"exp_avg": m, "exp_avg_sq": v}
    raise NotImplementedError(optimizer)


STATE_COLUMNS = {
    type(None): [],
    optim.SGD: [],
    optim.Adagrad: ["sum"],
    optim.RowWiseAdagrad: ["sum"],
    optim.Adam: ["exp_avg", "exp_avg_sq"],
}


# ---- tables and stores ----------------------------------------------------------------------------------------


@dataclass
class TableModel:
    """One table: every row's weight and state in arrays."""

    weights: np.ndarray
    optimizer: optim.Optimizer | None = None
    state: dict = field(default_factory=dict)
    step: int = 0

    @classmethod
    def new(
        cls, stream, *, num_embeddings, embedding_dim, initializer=None, optimizer=None, rows_per_shard=None
    ):
        """Take the arguments of `Store.create_table`. Shard sizes mean nothing here."""
        width = 1 if isinstance(optimizer, optim.RowWiseAdagrad) else embedding_dim
        start = getattr(optimizer, "initial_accumulator_value", 0.0)
        return cls(
            initial_weights(initializer, stream, num_embeddings, embedding_dim),
            optimizer,
            {name: np.full((num_embeddings, width), start, F) for name in STATE_COLUMNS[type(optimizer)]},
        )

    def lookup(self, ids):
        return self.weights[np.asarray(ids, np.int64)]

    def write(self, ids, rows):
        for row, values in zip(np.ravel(ids), np.reshape(rows, (-1, self.weights.shape[1])), strict=True):
            self.weights[int(row)] = values

    def update(self, ids, gradients):
        self.step += 1
        gradients = np.asarray(gradients).astype(F).reshape(-1, self.weights.shape[1])
        rows, sums = sum_duplicates(np.ravel(ids).astype(np.int64), gradients)
        state = {name: values[rows] for name, values in self.state.items()}
        weights, state = optimizer_step(self.optimizer, self.step, self.weights[rows], state, sums)
        self.weights[rows] = weights
        for name, values in state.items():
            self.state[name][rows] = values

    def assert_matches(self, table):
        """Assert that a table holds the same, in every row and every bit."""
        ids = np.arange(len(self.weights))
        assert_same_bits(table.lookup(ids), self.weights)
        for name, values in self.state.items():
            assert_same_bits(table.state(name, ids).reshape(values.shape), values)
        assert table.step == self.step
        assert table.optimizer == self.optimizer


@dataclass
class StoreModel:
    """Tables by name, now and as of the last commit."""

    tables: dict = field(default_factory=dict)
    committed: dict = field(default_factory=dict)
    commit_id: int = 0
    commit_step: int = 0
    metadata: dict = field(default_factory=dict)

    def commit(self, step, metadata):
        self.commit_id += 1
        self.commit_step = self.commit_step if step is None else step
        self.metadata = metadata
        self.committed = copy.deepcopy(self.tables)

    def rollback(self):
        self.tables = copy.deepcopy(self.committed)

    def assert_matches(self, store):
        assert list(store) == list(self.tables)
        for name, table in self.tables.items():
            assert store[name].name == name
            table.assert_matches(store[name])
        last = store.last_commit
        if self.commit_id == 0:
            assert last is None
        else:
            assert (last.id, last.step, last.metadata) == (self.commit_id, self.commit_step, self.metadata)


# ---- keys -----------------------------------------------------------------------------------------------------


@dataclass
class VocabularyModel:
    """Keys by row in a dict; rows without a key wait in `freed` for the commit, and then in `free` for their turn."""

    reserved: int = 0
    after: int = 1  # sightings that earn a row
    rows: dict = field(default_factory=dict)
    num_rows: int = 0
    free: list = field(default_factory=list)
    freed: list = field(default_factory=list)
    seen: dict = field(default_factory=dict)

    def __post_init__(self):
        self.num_rows = max(self.num_rows, self.reserved)

    def lookup(self, keys):
        return [self.rows.get(key, -1) for key in keys]

    def add(self, keys):
        new = [key for key in keys if key not in self.rows]
        for key in new:
            self.seen[key] = self.seen.get(key, 0) + 1
        for key in dict.fromkeys(new):
            if self.seen[key] >= self.after:
                self.rows[key] = self.next_row()
        return self.lookup(keys)

    def next_row(self):
        if self.free:
            return self.free.pop(0)
        self.num_rows += 1
        return self.num_rows - 1

    def next_rows(self, number):
        """The rows that so many new keys would get."""
        return [*self.free, *range(self.num_rows, self.num_rows + number)][:number]

    def remove(self, keys):
        found = self.lookup(keys)
        gone = {key for key in keys if key in self.rows}
        self.freed += sorted(self.rows.pop(key) for key in gone)
        return found

    def commit(self):
        self.free, self.freed = self.free + self.freed, []

    def by_row(self):
        """Rows that have a key, ascending, and their keys."""
        return {row: key for key, row in sorted(self.rows.items(), key=lambda item: item[1])}

    def assert_matches(self, vocabulary):
        by_row = self.by_row()
        assert len(vocabulary) == len(by_row)
        assert vocabulary.num_rows == self.num_rows
        batches = [batch.to_pydict() for batch in vocabulary.to_arrow_batches()]
        assert [row for batch in batches for row in batch["row"]] == list(by_row)
        assert [key for batch in batches for key in batch["key"]] == list(by_row.values())
        assert list(vocabulary) == list(by_row.values())
        assert vocabulary.keys(list(by_row)).tolist() == list(by_row.values())
        assert vocabulary.lookup(list(by_row.values())).tolist() == list(by_row)


@dataclass
class KeyedModel(TableModel):
    """A table that is bound to a vocabulary, with more rows than it will ever have; and its counters."""

    counts: np.ndarray | None = None
    last_steps: np.ndarray | None = None
    fresh: TableModel | None = None

    @classmethod
    def new(cls, stream, *, num_embeddings, counters=False, **arguments):
        model = super().new(stream, num_embeddings=num_embeddings, **arguments)
        if counters:
            model.counts, model.last_steps = np.zeros((2, num_embeddings), F)
        model.fresh = copy.deepcopy(model)
        return model

    def update(self, ids, gradients):
        super().update(ids, gradients)
        if self.counts is not None:
            np.add.at(self.counts, np.ravel(ids).astype(np.int64), 1)
            self.last_steps[np.ravel(ids).astype(np.int64)] = self.step

    def write(self, ids, rows):
        super().write(ids, rows)
        if self.counts is not None:
            np.add.at(self.counts, np.ravel(ids).astype(np.int64), 1)
            self.last_steps[np.ravel(ids).astype(np.int64)] = self.step

    def reset(self, ids):
        """Rows are as new."""
        ids = np.asarray(ids, np.int64)
        self.weights[ids] = self.fresh.weights[ids]
        for name, values in self.state.items():
            values[ids] = self.fresh.state[name][ids]
        if self.counts is not None:
            self.counts[ids] = self.last_steps[ids] = 0

    def evicted(self, rows, *, older_than=None, keep=None, by="lru"):
        """Those of the rows, ascending, that are of little use."""
        if older_than is not None:
            return [row for row in rows if self.last_steps[row] <= self.step - older_than]
        worth = self.last_steps if by == "lru" else self.counts
        best = sorted(rows, key=lambda row: (-worth[row], row))
        return sorted(best[keep:])

    def assert_matches(self, table):
        """Assert that a table by row holds the same, in every row that it has and every bit."""
        ids = np.arange(table.num_embeddings)
        assert_same_bits(table.lookup(ids), self.weights[: ids.size])
        for name, values in self.state.items():
            assert_same_bits(table.state(name, ids).reshape(ids.size, -1), values[: ids.size])
        if self.counts is not None:
            assert_same_bits(table.state("count", ids), self.counts[: ids.size])
            assert_same_bits(table.state("last_step", ids), self.last_steps[: ids.size])
        assert table.step == self.step
        assert table.optimizer == self.optimizer
