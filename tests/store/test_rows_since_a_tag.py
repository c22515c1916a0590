"""Which rows differ from a commit that was kept, and exports of those."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kinds import DIM, KINDS, create, train

import shardemb
from shardemb import exports
from shardemb.errors import TableNotFoundError, TagNotFoundError, VocabularyNotFoundError
from shardemb.session import vocabulary_catalog
from shardemb.vocabulary import key_tables

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


# ---- keys -------------------------------------------------------------------------------------------------------

KEYS = {
    "int64": list(range(-3, 9)),
    "string": ["", "a", "b", "ab", "ä", "東京", "x" * 100, "y" * 100, "z" * 200, "a b", "c", "d"],
    "bytes": [
        b"",
        b"a",
        b"\xff",
        b"ab",
        b"\0",
        b"\0\0",
        b"x" * 100,
        b"y" * 100,
        b"z" * 200,
        b"e",
        b"c",
        b"d",
    ],
}
SOME = st.lists(st.integers(0, 11), max_size=4)
KEY_EVENTS = st.one_of(
    st.tuples(st.sampled_from(["add", "remove", "train"]), SOME),
    st.tuples(st.sampled_from(["commit", "checkpoint", "rollback", "tag", "reopen", "rename"]), st.just([])),
)


def rows_and_vectors(store):
    table = store["t"]
    found = list(table)
    return {key: (int(table.vocabulary.lookup([key])[0]), table.lookup([key]).tobytes()) for key in found}


def vocabulary_of(store):
    return next(iter(store.vocabularies))


@pytest.fixture
def small_tables_of_keys(monkeypatch):
    """Tables of keys that grow by every few hundred keys, as those of millions do."""
    shapes = key_tables.table_shapes

    def small(entry):
        return {kind: (4, width, 4) for kind, (_, width, _) in shapes(entry).items()}

    monkeypatch.setattr(vocabulary_catalog, "table_shapes", small)


@pytest.mark.usefixtures("small_tables_of_keys")
@pytest.mark.parametrize("key_type", KEYS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(KEY_EVENTS, max_size=20))
def test_an_upsert_of_what_an_export_lists_makes_the_table_again(tmp_path_factory, key_type, events):
    folder, pool = tmp_path_factory.mktemp("keys"), KEYS[key_type]
    store = shardemb.open(folder / "s")
    store.create_vocabulary("v", key_type=key_type, reserved=2)
    table = store.create_table(
        "t", vocabulary="v", embedding_dim=DIM, initializer=shardemb.initializers.Uniform(-1, 1)
    )
    table.vocabulary.add(pool[:4])
    store.commit()
    store.tag("then")
    then = rows_and_vectors(store)
    for event, numbers in events:
        some = [pool[number] for number in numbers]
        table = store["t"]
        if event == "add":
            table.vocabulary.add(some)
        elif event == "remove":
            table.delete(some)
        elif event == "train":
            known = [key for key in dict.fromkeys(some) if key in table]
            table.write(known, np.full((len(known), DIM), sum(numbers), np.float32))
        elif event == "rename":
            store.rename_vocabulary(vocabulary_of(store), f"{vocabulary_of(store)}_")
        elif event == "tag":
            if store.has_changes:
                store.commit()
            store.tag("then", replace=True)
            then = rows_and_vectors(store)
        elif event == "reopen":
            store.rollback()
            store.close()
            store = shardemb.open(folder / "s")
        else:
            getattr(store, event)()
    now = rows_and_vectors(store)
    changes = store.changed_keys(vocabulary_of(store), "then")
    moved = {key for key in now if key not in then or then[key][0] != now[key][0]}
    assert changes.rows.tolist() == sorted(now[key][0] for key in moved)
    assert set(changes.removed.tolist()) == then.keys() - now.keys()
    assert len(changes.removed) == len(set(changes.removed.tolist()))
    report = store["t"].export(folder / "changes.parquet", changed_since="then")
    upserts, removed = (pq.read_table(folder / f"changes.{end}") for end in ("parquet", "removed.parquet"))
    assert set(upserts["key"].to_pylist()) == {key for key in now if then.get(key) != now[key]}
    assert set(removed["key"].to_pylist()) == then.keys() - now.keys()
    assert (report.num_rows, report.num_removed) == (len(upserts), len(removed))
    assert report.removed_path == folder / "changes.removed.parquet"
    copy = {key: vector for key, (_, vector) in then.items()}
    for key in removed["key"].to_pylist():
        del copy[key]
    for key, vector in zip(upserts["key"].to_pylist(), upserts["embedding"].to_pylist(), strict=True):
        copy[key] = np.array(vector, np.float32).tobytes()
    assert copy == {key: vector for key, (_, vector) in now.items()}
    store.rollback()
    store.close()


@pytest.fixture
def tagged(path, small_tables_of_keys):
    """A store with the keys a to f in rows 0 to 5, each of which a tag has."""
    with shardemb.open(path) as store:
        store.create_vocabulary("v", key_type="string")
        table = store.create_table("t", vocabulary="v", embedding_dim=DIM, counters=True)
        table.write(list("abcdef"), np.ones((6, DIM), np.float32), create=True)
        store.commit()
        store.tag("then")
        yield store
        store.rollback()


def test_keys_that_move_or_come_back_are_not_among_the_removed(tagged):
    words = tagged.vocabularies["v"]
    words.remove(["a", "b", "c"])
    tagged.commit()
    words.add(["c", "x", "y"])  # in the rows that were of a, b and c
    changes = tagged.changed_keys("v", "then")
    assert words.lookup(["c", "x", "y"]).tolist() == [0, 1, 2]
    assert changes.rows.tolist() == [0, 1, 2]
    assert changes.removed.tolist() == ["a", "b"]
    tagged.commit()
    with shardemb.open(tagged.path, "r") as reader:
        again = reader.changed_keys("v", "then")
        assert (again.rows.tolist(), again.removed.tolist()) == ([0, 1, 2], ["a", "b"])


def test_a_key_that_comes_back_to_its_row_has_not_changed(tagged):
    words = tagged.vocabularies["v"]
    words.remove(["a"])
    tagged.commit()
    assert words.add(["a"]).tolist() == [0]
    changes = tagged.changed_keys("v", "then")
    assert (changes.rows.tolist(), changes.removed.tolist()) == ([], [])


def test_many_new_keys_after_a_tag(tagged):
    words = tagged.vocabularies["v"]
    rows = words.add([f"key {number}" for number in range(2000)])
    for _ in range(2):
        assert tagged.changed_keys("v", "then").rows.tolist() == sorted(rows.tolist())
        tagged.commit()
        tagged.checkpoint()


def test_a_vocabulary_that_the_tag_has_not(tagged):
    tagged.create_vocabulary("new", key_type="int64").add([7, 8])
    changes = tagged.changed_keys("new", "then")
    assert (changes.rows.tolist(), changes.removed.tolist()) == ([0, 1], [])
    with pytest.raises(VocabularyNotFoundError):
        tagged.changed_keys("missing", "then")
    with pytest.raises(TagNotFoundError):
        tagged.changed_keys("v", "missing")


def test_removed_keys_beside_an_export(tagged, tmp_path):
    tagged["t"].delete(["b"])
    for target, form, beside in [
        ("some.vec", None, "some.removed.parquet"),
        ("parts", exports.Parquet(parts=2), "parts.removed.parquet"),
        ("v1.5", "npy", "v1.5.removed.parquet"),
    ]:
        report = tagged["t"].export(tmp_path / target, form, changed_since="then")
        assert (report.removed_path, report.num_removed) == (tmp_path / beside, 1)
        assert pq.read_table(tmp_path / beside).to_pydict() == {"key": ["b"]}
    report = tagged["t"].export(tmp_path / "later.vec", changed_since=0)
    assert (report.removed_path, report.num_removed) == (None, 0)  # nobody knows
    assert not (tmp_path / "later.removed.parquet").exists()
    assert tagged["t"].rows.export(tmp_path / "rows.npy", changed_since="then").removed_path is None


def test_an_export_that_fails_leaves_the_list_of_the_last_one(tagged, tmp_path):
    (tmp_path / "some.removed.parquet").write_text("of last night")
    tagged["t"].write(["a b"], np.ones((1, DIM)), create=True)
    with pytest.raises(ValueError, match="has a blank"):
        tagged["t"].export(tmp_path / "some.vec", changed_since="then")
    assert [each.name for each in tmp_path.iterdir() if each != tagged.path] == ["some.removed.parquet"]
    assert (tmp_path / "some.removed.parquet").read_text() == "of last night"


def test_removed_keys_beside_a_url(tagged):
    fsspec = pytest.importorskip("fsspec")
    tagged["t"].delete(["b"])
    report = tagged["t"].export("memory://bucket/nightly/items", "parquet", changed_since="then")
    assert report.removed_path == "memory://bucket/nightly/items.removed.parquet"
    with fsspec.open(report.removed_path) as file:
        assert pq.read_table(file).to_pydict() == {"key": ["b"]}
    with pytest.raises(ValueError, match="has no folder above it"):
        tagged["t"].export("memory://bucket", "parquet", changed_since="then")
    fsspec.filesystem("memory").store.clear()
