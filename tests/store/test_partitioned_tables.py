"""A table in parts, in a partition each, has the bits of the whole table in one store."""

import contextlib
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inside
from support.stores import close_quietly

import shardemb
from shardemb.dtypes import Stochastic
from shardemb.format.manifest import PartitionIdentity
from shardemb.initializers import Constant, Normal, TruncatedNormal, Uniform
from shardemb.optim import SGD, Adam
from shardemb.store.partition import Partition

HEAD = "0b5f4a2e-54b1-4a52-8f0c-0d2b8f3c1e11"

ROWS, DIM = 101, 6

KINDS = [
    {"initializer": Constant(0.5)},
    {"initializer": Uniform(-1, 1, seed=1)},
    {"initializer": Normal(std=0.5, seed=2)},
    {"initializer": TruncatedNormal(std=0.5, seed=3), "dtype": "bfloat16", "rounding": Stochastic(seed=4)},
    {
        "initializer": Uniform(-1, 1, seed=5),
        "dtype": "bfloat16",
        "state_dtype": "bfloat16",
        "rounding": "stochastic",
    },
    {"initializer": None, "dtype": "float16", "rounding": "nearest"},
]


class Parts:
    """A table of `ROWS` rows in so many partitions, used by the ids of the whole."""

    def __init__(self, folder, count, options):
        self.count, self.commits, self.folder, self.tables = count, 0, folder, []
        self.parts = [
            Partition.create(folder / str(number), PartitionIdentity(HEAD, number, count))
            for number in range(count)
        ]
        for number, part in enumerate(self.parts):
            rows = len(range(number, ROWS, count))
            part.open((0, None), threads=1).create_table(
                "t", num_embeddings=rows, embedding_dim=DIM, **options
            )
        self.commit()

    def commit(self):
        self.commits += 1
        for part in self.parts:
            part.prepare(self.decided)
        for part in self.parts:
            part.decide()

    @property
    def decided(self):
        return self.commits, (1, "head", self.commits)

    def reopen(self):
        self.close()
        self.parts = [Partition.hold(self.folder / str(number)) for number in range(self.count)]
        for part in self.parts:
            part.open(self.decided, threads=1)

    def change(self, how, ids, *values, **more):
        """Call a method of each part's table with those of the ids, and their values, that are its own."""
        for number, part in enumerate(self.parts):
            own = ids % self.count == number
            getattr(part.store["t"], how)(ids[own] // self.count, *(each[own] for each in values), **more)

    def whole(self, read):
        """Put what ``read(table, rows)`` returns of the parts together in the order of ids."""
        found = [
            read(part.store["t"], np.arange(len(range(k, ROWS, self.count))))
            for k, part in enumerate(self.parts)
        ]
        out = np.empty((ROWS, *found[0].shape[1:]), found[0].dtype)
        for number, rows in enumerate(found):
            out[number :: self.count] = rows
        return out

    def close(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of changes that are not committed
            for part in self.parts:
                part.close()


READINGS = [
    lambda table, rows: table.lookup(rows, dtype="float32"),
    lambda table, rows: table.state("exp_avg", rows),
    lambda table, rows: table.state("exp_avg_sq", rows),
]


def assert_same(table, parts):
    """Compare all rows and their state."""
    for read in READINGS:
        assert read(table, np.arange(ROWS)).tobytes() == parts.whole(read).tobytes()


@contextlib.contextmanager
def both(folder, count, options):
    with contextlib.closing(Parts(folder, count, options)) as parts:
        store = shardemb.open(folder / "whole", threads=1)
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, **options)
        yield table, parts
        close_quietly(store)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_parts_have_the_bits_of_the_whole(tmp_path, options, count):
    rng = np.random.default_rng(count)
    with both(tmp_path, count, options | {"optimizer": Adam(lr=0.1)}) as (table, parts):
        assert_same(table, parts)
        for step in range(4):
            ids = rng.integers(0, ROWS, 40)
            gradients = rng.normal(size=(40, DIM)).astype(np.float32)
            table.update(ids, gradients)
            parts.change("update", ids, gradients)
            ids = rng.integers(0, ROWS, 5)
            rows = rng.normal(size=(5, DIM)).astype(np.float32)
            table.write(ids, rows)
            parts.change("write", ids, rows)
            assert_same(table, parts)
            if step == 2:
                parts.commit()
                parts.reopen()
                assert_same(table, parts)
        ids = rng.integers(0, ROWS, 20)
        table.reset_rows(ids)
        parts.change("reset_rows", ids)
        assert_same(table, parts)


@settings(max_examples=8)
@given(
    st.sampled_from(KINDS),
    st.integers(1, 5),
    st.lists(st.lists(st.integers(0, ROWS - 1), max_size=9), max_size=4),
)
def test_whatever_the_number_of_parts_and_the_batches(tmp_path_factory, options, count, batches):
    rng = np.random.default_rng(count)
    with both(tmp_path_factory.mktemp("parts"), count, options | {"optimizer": Adam(lr=0.1)}) as (
        table,
        parts,
    ):
        for ids in map(np.array, filter(None, batches)):
            gradients = rng.normal(size=(ids.size, DIM)).astype(np.float32)
            table.update(ids, gradients)
            parts.change("update", ids, gradients)
        assert_same(table, parts)


@pytest.mark.parametrize("change", ["resize", "materialize"])
def test_what_was_never_written_stays_the_same_when_a_table_changes_its_form(tmp_path, change):
    options = {"initializer": Uniform(-1, 1, seed=1), "optimizer": Adam(lr=0.1)}
    with both(tmp_path, 3, options) as (table, parts):
        for part in parts.parts:
            if change == "resize":
                part.store["t"].resize(100)
            else:
                part.store["t"].materialize()
        parts.commit()
        parts.reopen()
        assert_same(table, parts)
        if change == "resize":
            table.resize(300)
            for number, part in enumerate(parts.parts):
                rows = np.arange(100)
                assert np.array_equal(part.store["t"].lookup(rows), table.lookup(number + 3 * rows))


def test_a_reader_of_one_part_sees_its_rows(tmp_path):
    options = {"initializer": Uniform(-1, 1, seed=1)}
    with both(tmp_path, 3, options) as (table, _), shardemb.open(tmp_path / "1", "r") as reader:
        assert np.array_equal(reader["t"].lookup(np.arange(30)), table.lookup(1 + 3 * np.arange(30)))


def test_tables_of_a_store_of_its_own_are_numbered_by_their_rows(store):
    table = store.create_table("t", num_embeddings=10, embedding_dim=4, optimizer=SGD(lr=1))
    spec = inside.state(table).spec
    assert (spec.first, spec.stride) == (0, 1)
    assert not {"first", "stride"} & spec.to_json().keys()
    rows = np.arange(10)
    assert spec.numbers_of(rows) is rows


def test_an_update_without_a_row_of_a_part_is_a_step_of_it(tmp_path):
    """Its owner gets it all the same, so that the next step of Adam has the same number everywhere."""
    with contextlib.closing(Parts(tmp_path, 1, {"optimizer": Adam(lr=0.1)})) as parts:
        store = parts.parts[0].store
        words = store.create_vocabulary("words", key_type="int64")
        keyed = store.create_table("k", vocabulary="words", embedding_dim=4, optimizer=Adam(lr=0.1))
        words.add([5])
        table, nothing = store["t"], np.empty((0, DIM), np.float32)
        table.update(np.empty(0, np.int64), nothing)
        table.update([], nothing)
        store.update({"t": ([], nothing), "k": ([], np.empty((0, 4), np.float32))})
        keyed.update([], np.empty((0, 4), np.float32))
        assert (table.step, keyed.step) == (3, 2)
        parts.commit()
        table.update([], nothing)
        parts.commit()
        parts.reopen()
        found = parts.parts[0].store
        assert (found["t"].step, found["k"].step) == (4, 2)
