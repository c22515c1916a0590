"""Rows that may have changed: every one that did is listed, whatever happened to the table in between."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inside

import shardemb
from shardemb.initializers import Uniform
from shardemb.search import changed_rows

PAGE = 4096


@settings(max_examples=50)
@given(st.lists(st.integers(0, 60), unique=True), st.integers(1, 9000))
def test_rows_of_blocks(blocks, record_bytes):
    blocks = np.array(sorted(blocks), np.int64)
    last = 61 * PAGE // record_bytes + 2
    touched = {
        row
        for row in range(last)
        if set(range(row * record_bytes // PAGE, ((row + 1) * record_bytes - 1) // PAGE + 1))
        & set(blocks.tolist())
    }
    assert changed_rows.rows_of(blocks, record_bytes).tolist() == sorted(touched)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["write", "update", "fill", "reset", "commit", "fold", "rollback", "reopen"]),
        st.integers(0, 3999),
    ),
    max_size=12,
)


@settings(max_examples=15)
@given(OPERATIONS, st.sampled_from([None, Uniform(-1, 1)]), st.sampled_from([1, 7]), st.booleans())
def test_no_change_is_missed(tmp_path_factory, operations, initializer, shards, spills):
    path, rng = tmp_path_factory.mktemp("changes") / "s", np.random.default_rng(0)
    budget = 0 if spills else None
    store = shardemb.open(path, memory_budget=budget)
    try:
        table = store.create_table(
            "t", num_embeddings=4000, embedding_dim=12, initializer=initializer, optimizer=shardemb.optim.SGD(),
            rows_per_shard=-(-4000 // shards),
        )  # fmt: skip
        table.write(np.arange(500), rng.standard_normal((500, 12), np.float32))
        store.commit()
        store.checkpoint()
        shards = inside.state(table).shards
        total = changed_rows.num_blocks(shards)
        then, before = changed_rows.sums(shards, 0, total), table.lookup(np.arange(4000))
        listed = changed_rows.ChangedRows(
            inside.state(table), lambda first, count: then[first : first + count]
        )
        assert listed.list().size == 0
        for what, row in operations:
            ids = (row + 13 * np.arange(5)) % 4000
            if what == "write":
                table.write(ids, rng.standard_normal((5, 12), np.float32))
            elif what == "update":
                table.update(ids, rng.standard_normal((5, 12), np.float32))
            elif what == "fill":
                table.write(
                    np.arange(row, min(row + 900, 4000)),
                    rng.standard_normal((min(900, 4000 - row), 12), np.float32),
                )
            elif what == "reset":
                table.reset_rows(ids)
            elif what == "reopen":
                store.rollback()
                store.close()
                store = shardemb.open(path, memory_budget=budget)
                table = store["t"]
            elif what == "fold":
                store.commit()
                store.checkpoint()
            else:
                getattr(store, what)()
            if what == "reopen":
                listed = changed_rows.ChangedRows(
                    inside.state(table), lambda first, count: then[first : first + count]
                )
            found = listed.list()
            differs = np.flatnonzero((table.lookup(np.arange(4000)) != before).any(axis=1))
            assert not set(differs.tolist()) - set(found.tolist())
            assert (np.diff(found) > 0).all()
        store.commit()
    finally:
        store.close()


def folded(store):
    """Return a table all of whose rows are folded, its state, and the checksums of its blocks."""
    table = store.create_table("t", num_embeddings=4000, embedding_dim=16)
    table.write(np.arange(4000), np.ones((4000, 16)))
    store.commit()
    store.checkpoint()
    state = inside.state(table)
    return table, state, changed_rows.sums(state.shards, 0, changed_rows.num_blocks(state.shards))


def test_few_rows_besides_those_that_changed_are_listed(store, monkeypatch):
    monkeypatch.setattr(changed_rows, "WINDOW", 3)
    table, state, then = folded(store)
    table.write([70, 3999], np.zeros((2, 16)))

    listed = changed_rows.ChangedRows(state, lambda first, count: then[first : first + count])

    def since():
        return listed.list().tolist()

    assert since() == [70, 3999]
    store.commit()
    assert since() == [70, 3999]
    store.checkpoint()
    assert since() == [*range(64, 128), *range(3968, 4000)]
    with pytest.raises(shardemb.StoreClosedError):
        store.close()
        since()


def counted_reads(state, then, reads):
    def read(first, count):
        reads.append(first)
        return then[first : first + count]

    return changed_rows.ChangedRows(state, read)


def test_checksums_are_read_once_after_each_fold(path):
    with shardemb.open(path) as store:
        (table, state, then), reads = folded(store), []
        listed = counted_reads(state, then, reads)
        for row in (70, 80, 90):
            table.write([row], np.zeros((1, 16)))
            assert row in listed.list()
            store.commit()
            assert row in listed.list()
        assert len(reads) == 1
        store.checkpoint()
        assert listed.list().tolist() == list(range(64, 128))
        assert listed.list().tolist() == list(range(64, 128))
        assert len(reads) == 2
        with shardemb.open(path, "r") as reader:
            of_reader, reads = inside.state(reader["t"]), []
            listed = counted_reads(of_reader, then, reads)
            assert listed.list().tolist() == list(range(64, 128))
            table.write([700], np.zeros((1, 16)))
            store.commit()
            store.checkpoint()  # of which a reader does not learn
            assert 700 in listed.list()
            assert len(reads) == 2


def test_a_fold_that_ends_while_checksums_are_read_is_not_missed(store):
    table, state, then = folded(store)
    table.write([70], np.zeros((1, 16)))
    store.commit()
    changes = iter([700])

    def read(first, count):
        for row in changes:
            table.write([row], np.zeros((1, 16)))
            store.commit()
            store.checkpoint()
        return then[first : first + count]

    listed = changed_rows.ChangedRows(state, read)
    listed.list()
    assert {70, 700} <= set(listed.list().tolist())
