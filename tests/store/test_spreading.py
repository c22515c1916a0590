"""A store's tables in partitions, and back in one store: every bit, also of rows that were never written."""

import contextlib

import numpy as np
import pytest
from support import inside
from support.stores import close_quietly

import shardemb
from shardemb.commits import rewrite
from shardemb.errors import FormatError, PartitionError, ShardEmbError, TableExistsError
from shardemb.format.manifest import PartitionIdentity
from shardemb.initializers import Uniform
from shardemb.optim import Adam, RowWiseAdagrad
from shardemb.store import spreading
from shardemb.store.partition import Partition

HEAD = "0b5f4a2e-54b1-4a52-8f0c-0d2b8f3c1e11"
ROWS, DIM = 2003, 6
EVERY = np.arange(ROWS)
DECIDED = (1, (1, "coordinator", 1))

KINDS = {
    "rows alone": {"initializer": Uniform(-1, 1, seed=2)},
    "adam": {"initializer": Uniform(-1, 1), "optimizer": Adam(lr=0.1), "padding_idx": 5},
    "counted": {"initializer": Uniform(-1, 1), "optimizer": RowWiseAdagrad(lr=0.1), "counters": True},
    "bfloat16": {
        "initializer": Uniform(-1, 1), "optimizer": Adam(lr=0.1), "dtype": "bfloat16", "rounding": "stochastic",
    },
}  # fmt: skip


@pytest.fixture
def parts(tmp_path):
    """``parts(count)`` creates all partitions of a store, or holds those that are there; they are closed."""
    opened = []

    def parts(count):
        for number in range(count):
            path, identity = tmp_path / f"{number}.zarr", PartitionIdentity(HEAD, number, count)
            opened.append(Partition.hold(path) if path.exists() else Partition.create(path, identity))
        return opened[-count:]

    yield parts
    for part in opened:
        with contextlib.suppress(PartitionError):  # it is not open
            part.store.rollback()
        part.close()


def create(store, kind):
    table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, rows_per_shard=512, **KINDS[kind])
    train(table, 0)
    return table


def train(table, seed, stride=1, first=0):
    """Change some rows; a table that is a part changes those of the same ids that it has."""
    rng = np.random.default_rng(seed)
    ids, values = rng.permutation(ROWS)[:300], rng.normal(size=(300, DIM)).astype(np.float32)
    mine = ids % stride == first
    change = table.write if table.optimizer is None else table.update
    change(ids[mine] // stride, values[mine])


def contents(table, ids=EVERY):
    states = inside.state(table).spec.states
    return [table.lookup(ids), *(table.state(each, ids) for each in states)]


def commit(parts, decided=DECIDED):
    for part in parts:
        part.prepare(decided, step=7)
    for part in parts:
        part.decide()


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("count", [1, 3, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_all_bits_are_the_same_and_stay_so(store, tmp_path, parts, kind, count):
    table = create(store, kind)
    store.commit(step=7)
    all_parts = parts(count)
    spreading.spread(inside.session(store), all_parts)
    commit(all_parts)
    for number, part in enumerate(all_parts):
        mine = part.store["t"]
        ids = EVERY[number::count]
        assert_same(contents(mine, np.arange(ids.size)), contents(table, ids))
        assert (mine.step, mine.optimizer, part.store.verify()) == (table.step, table.optimizer, [])
        train(mine, 1, count, number)
    train(table, 1)
    for number, part in enumerate(all_parts):
        ids = EVERY[number::count]
        assert_same(contents(part.store["t"], np.arange(ids.size)), contents(table, ids))
    commit(all_parts, (2, (1, "coordinator", 2)))
    with shardemb.open(tmp_path / "back.zarr") as back:
        spreading.gather(all_parts, inside.session(back), {"t": (ROWS, table.padding_idx)}, None)
        back.commit()
        again = back["t"]
        assert_same(contents(again), contents(table))
        assert (again.step, again.padding_idx, back.verify()) == (table.step, table.padding_idx, [])
        train(again, 2)
        train(table, 2)
        assert_same(contents(again), contents(table))
        assert inside.state(again).spec.stream == inside.state(table).spec.stream
        back.rollback()


def test_it_survives_the_end_of_the_process(store, parts):
    table = create(store, "adam")
    store.commit()
    spreading.spread(inside.session(store), first := parts(3))
    commit(first)
    for part in first:
        part.close()
    for number, part in enumerate(parts(3)):
        mine = part.open(DECIDED)["t"]
        assert_same(contents(mine, np.arange(len(mine))), contents(table, EVERY[number::3]))


def test_more_partitions_than_rows(store, parts):
    table = store.create_table("t", num_embeddings=2, embedding_dim=3, initializer=Uniform(-1, 1))
    store.commit()
    all_parts = parts(4)
    spreading.spread(inside.session(store), all_parts)
    assert [len(part.store["t"]) for part in all_parts] == [1, 1, 1, 1]
    for number in range(2):
        np.testing.assert_array_equal(all_parts[number].store["t"].lookup([0]), table.lookup([number]))


def test_what_was_interrupted_goes_on(store, parts, monkeypatch):
    table = create(store, "adam")
    store.commit()
    made, real = [], rewrite.ShardWriter.__enter__

    def enter(self):
        made.append(self)
        if len(made) == 5:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(rewrite.ShardWriter, "__enter__", enter)
    with pytest.raises(KeyboardInterrupt):
        spreading.spread(inside.session(store), first := parts(3))
    for part in first:
        part.close()
    spreading.spread(inside.session(store), again := parts(3))
    commit(again)
    for number, part in enumerate(again):
        mine = part.store["t"]
        assert_same(contents(mine, np.arange(len(mine))), contents(table, EVERY[number::3]))
        assert not (part.path / ".shardemb" / "rebuilt").exists()


def change(store):
    store["t"].write([1], np.ones((1, DIM)))


def add_vocabulary(store):
    store.create_vocabulary("words", key_type="string")
    store.commit()


def freeze(store):
    store["t"].freeze_rows(0, 10)
    store.commit()


@pytest.mark.parametrize(
    ("make", "message"),
    [(change, "not committed"), (add_vocabulary, "vocabularies.*words"), (freeze, "'t'.*frozen")],
)
def test_what_cannot_be_split_is_refused_by_name(store, parts, make, message):
    create(store, "adam")
    store.commit()
    make(store)
    all_parts = parts(2)
    with pytest.raises(ShardEmbError, match=message):
        spreading.spread(inside.session(store), all_parts)
    assert all(part.status.commit == 0 for part in all_parts)


def test_a_store_without_a_commit_is_refused(store, parts):
    with pytest.raises(ShardEmbError, match="no commit"):
        spreading.spread(inside.session(store), parts(2))


def test_damage_is_not_passed_on(path, parts):
    with shardemb.open(path) as store:
        create(store, "adam")
        store.commit()
    file = next((path / "t" / "rows").glob("c.1.*"))
    with file.open("r+b") as damaged:
        damaged.seek(100)
        damaged.write(b"damage")
    store = shardemb.open(path)
    with pytest.raises(FormatError, match="is damaged"):
        spreading.spread(inside.session(store), parts(2))
    close_quietly(store)


def test_a_table_that_exists_is_not_replaced(store, tmp_path, parts):
    create(store, "adam")
    store.commit()
    all_parts = parts(2)
    spreading.spread(inside.session(store), all_parts)
    commit(all_parts)
    with shardemb.open(tmp_path / "back.zarr") as back:
        mine = back.create_table("t", num_embeddings=3, embedding_dim=2)
        with pytest.raises(TableExistsError, match="'t'"):
            spreading.gather(all_parts, inside.session(back), {"t": (ROWS, 5)}, None)
        assert back["t"].shape == mine.shape == (3, 2)
        back.rollback()
