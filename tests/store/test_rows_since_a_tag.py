"""Which rows differ from a commit that was kept, and exports of those."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kinds import DIM, KINDS, create, train

import shardemb
from shardemb.errors import TableNotFoundError, TagNotFoundError

ROWS = 500


def vectors(table):
    return table.lookup(np.arange(table.num_embeddings))


def differing(now, then):
    shared = min(len(now), len(then))
    differ = (now[:shared].view(np.uint32) != then[:shared].view(np.uint32)).any(axis=1)
    return [*np.flatnonzero(differ).tolist(), *range(shared, len(now))]


EVENTS = st.one_of(
    st.tuples(st.sampled_from(["train", "write"]), st.integers(0, 2**31)),
    st.tuples(st.sampled_from(["commit", "checkpoint", "rollback", "tag", "reopen"]), st.none()),
    st.tuples(st.just("grow"), st.integers(1, 300)),
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(st.lists(EVENTS, max_size=15), st.sampled_from([0, 2**30]))
def test_rows_that_differ_from_a_tag_are_those_of_numpy(tmp_path_factory, kind, events, budget):
    path = tmp_path_factory.mktemp("changed") / "s"
    store = shardemb.open(path, memory_budget=budget)
    table = create(store, ROWS, kind)
    train(table, 1)
    store.commit()
    store.tag("then")
    then = kept = vectors(table)
    for event, argument in events:
        if event == "train":
            train(table, argument, 30)
        elif event == "write":
            ids = np.random.default_rng(argument).integers(0, ROWS, 20)
            table.write(ids, kept[ids])  # some of them become what they were
        elif event == "grow":
            table.resize(table.num_embeddings + argument)
        elif event == "tag":
            if store.has_changes:
                store.commit()
            store.tag("then", replace=True)
            then = vectors(table)
        elif event == "reopen":
            store.rollback()
            store.close()
            store = shardemb.open(path, memory_budget=budget)
            table = store["t"]
        else:
            getattr(store, event)()
        assert store.changed_rows("t", "then").tolist() == differing(vectors(table), then)
    store.rollback()
    with shardemb.open(path, "r") as reader:
        assert reader.changed_rows("t", "then").tolist() == differing(vectors(table), then)
    store.close()


def test_a_reader_sees_what_a_writer_has_committed_and_not_folded(path):
    with shardemb.open(path) as store:
        table = create(store, ROWS)
        store.commit()
        store.tag("then")
        table.write([3, 7], np.ones((2, DIM)))
        store.commit()
        with shardemb.open(path, "r") as reader:
            assert reader.changed_rows("t", "then").tolist() == [3, 7]


def test_a_table_of_another_form_has_changed_as_a_whole(path):
    with shardemb.open(path) as store:
        create(store, ROWS)
        store.commit()
        store.tag("then")
        store.reshard("t", rows_per_shard=192)
        assert store.changed_rows("t", "then").size == 0  # other files with the same rows
        store.reshard("t", dtype="float16")
        assert store.changed_rows("t", "then").size == ROWS
        create(store, 10, name="new")
        store.commit()
        assert store.changed_rows("new", "then").tolist() == list(range(10))
        with pytest.raises(TagNotFoundError):
            store.changed_rows("t", "missing")
        with pytest.raises(TableNotFoundError):
            store.changed_rows("missing", "then")


@pytest.mark.parametrize("keyed", [False, True])
def test_exports_of_what_changed_since_a_tag(path, tmp_path, keyed):
    with shardemb.open(path) as store:
        if keyed:
            store.create_vocabulary("v", key_type="int64")
            table = store.create_table("t", vocabulary="v", embedding_dim=DIM)
            table.write(np.arange(1000, 1000 + ROWS), np.ones((ROWS, DIM)), create=True)
        else:
            table = create(store, 1000 + ROWS, "zeros")
        store.commit()
        store.tag("then")
        table.write([1003, 1009], np.full((2, DIM), 2, np.float32))
        if keyed:
            table.write([5], np.full((1, DIM), 3, np.float32), create=True)
            table.delete([1001])
        store.commit()
        report = table.export(tmp_path / "some.parquet", changed_since="then")
        found = pq.read_table(tmp_path / "some.parquet")
        expected = [1003, 1009, 5] if keyed else [1003, 1009]
        assert found["key" if keyed else "id"].to_pylist() == expected
        assert report.num_rows == len(expected)
        assert found["embedding"].to_pylist()[0] == [2] * DIM
        report = table.export(tmp_path / "less.parquet", changed_since="then", where=[1003, 1004])
        assert report.num_rows == 1
