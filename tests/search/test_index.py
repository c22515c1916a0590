"""An index finds what an exact search finds, whatever happened to the table since; other files are refused."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import shardemb
from shardemb.initializers import Uniform
from shardemb.search import graph
from shardemb.search import index as indexes

METRICS = ("cosine", "dot", "l2")


@pytest.fixture(autouse=True)
def has_usearch(request, monkeypatch):
    monkeypatch.setattr(indexes, "MANY", 1.0)  # in small tables, blocks of a few changed rows are many
    if "without" not in request.node.name:
        pytest.importorskip("usearch")


def clustered(rng, count, dim, clusters=100):
    centres = rng.standard_normal((clusters, dim), np.float32)
    return centres[rng.integers(0, clusters, count)] + rng.standard_normal((count, dim), np.float32) / 3


def make(store, count=3000, dim=16, **options):
    table = store.create_table("t", num_embeddings=count, embedding_dim=dim, **options)
    table.write(np.arange(count), clustered(np.random.default_rng(0), count, dim))
    store.commit()
    return table


def recall(found, exact):
    return np.mean([np.isin(a, b).mean() for a, b in zip(exact.ids, found.ids, strict=True)])


def queries_of(table, number=40, seed=9):
    rng = np.random.default_rng(seed)
    rows = table.lookup(rng.integers(0, table.num_embeddings, number))
    return rows + rng.standard_normal(rows.shape, np.float32) / 5


def check(index, table, k=10, least=0.98, queries=None):
    queries = queries_of(table) if queries is None else queries
    found, exact = index.search(queries, k), table.search(queries, k, metric=index.metric)
    assert recall(found, exact) >= least
    both = found.ids == exact.ids
    np.testing.assert_allclose(found.scores[both], exact.scores[both], rtol=1e-4, atol=1e-5)
    step = np.diff(found.scores, axis=1)
    assert (step >= 0).all() if index.metric == "l2" else (step <= 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_it_finds_what_an_exact_search_finds(store, tmp_path, metric):
    table = make(store)
    index = table.build_index(tmp_path / "i", metric=metric)
    assert index.metric == metric
    assert len(index) == 3000
    assert index.changed_rows().size == 0
    check(index, table)
    linked = table.build_index(tmp_path / "j", metric=metric, links=16)
    assert (tmp_path / "j").stat().st_size > (tmp_path / "i").stat().st_size
    check(linked, table, least=0.99)
    again = table.open_index(tmp_path / "i")
    queries = queries_of(table)
    assert np.array_equal(again.search(queries, 5).ids, index.search(queries, 5).ids)
    one = index.search(queries[0], 5)
    assert one.ids.shape == (5,)
    assert np.array_equal(one.ids, index.search(queries, 5).ids[0])
    assert index.search(np.empty((0, 16)), 5).ids.shape == (0, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "j", "store.zarr"]


def test_a_larger_index_proposes_more_candidates(store, tmp_path, monkeypatch):
    table, asked = make(store), []
    index, search = table.build_index(tmp_path / "i"), indexes.Graph.search

    def counted(graph, codes, count, threads):
        asked.append(count)
        return search(graph, codes, count, threads)

    monkeypatch.setattr(indexes.Graph, "search", counted)
    index.search(queries_of(table), 10)
    monkeypatch.setattr(indexes.Index, "__len__", lambda self: 1_000_000)
    index.search(queries_of(table), 10)
    index.search(queries_of(table), 100)
    index.search(queries_of(table), 10, candidates=20)
    assert asked == [96, 250, 400, 20]


@pytest.mark.parametrize("metric", METRICS)
def test_changed_rows_are_found_as_they_are_now(store, tmp_path, metric):
    table = make(store, optimizer=shardemb.optim.SGD(lr=1.0))
    index = table.build_index(tmp_path / "i", metric=metric)
    rng, target = np.random.default_rng(3), 5 * queries_of(table, 1)[0]

    def found():
        return set(index.search(target, 5).ids.tolist())

    moved = [7, 900, 1800]
    table.write(moved, target + rng.standard_normal((3, 16), np.float32) / 1000)
    assert set(moved) <= found()
    check(index, table)
    store.commit()
    assert set(moved) <= found()
    store.checkpoint()
    assert set(moved) <= found()
    check(table.open_index(tmp_path / "i"), table)
    table.write([moved[0]], -target[None])
    assert moved[0] not in found()
    assert set(moved[1:]) <= found()
    store.rollback()
    assert set(moved) <= found()
    table.update([moved[1]], 2 * target[None])
    assert moved[1] not in found()
    check(index, table)
    store.commit()


def test_it_stays_right_through_another_opening_and_a_reader(path, tmp_path):
    with shardemb.open(path) as store:
        make(store).build_index(tmp_path / "i")
    with shardemb.open(path) as store:
        table = store["t"]
        target = -queries_of(table, 1)[0]
        table.write([5], target[None])
        store.commit()
        with shardemb.open(path, "r") as reader:
            assert reader["t"].open_index(tmp_path / "i").search(target, 1).ids.tolist() == [5]
    with shardemb.open(path, "r") as reader:
        assert reader["t"].open_index(tmp_path / "i").search(target, 1).ids.tolist() == [5]
        reader["t"].build_index(tmp_path / "j")  # a reader can build one too
        assert reader["t"].open_index(tmp_path / "j").changed_rows().size == 0
        check(reader["t"].open_index(tmp_path / "j"), reader["t"])


def test_rows_that_were_never_written_are_found_once_they_are(store, tmp_path):
    table = store.create_table("t", num_embeddings=2000, embedding_dim=8, initializer=Uniform(-1, 1))
    table.write(np.arange(500), clustered(np.random.default_rng(0), 500, 8))
    store.commit()
    index = table.build_index(tmp_path / "i")
    assert len(index) == 500
    target = 10 * np.ones(8, np.float32)
    table.write([1500], target[None])
    assert index.search(target, 1).ids.tolist() == [1500]
    store.commit()
    store.checkpoint()
    assert index.search(target, 1).ids.tolist() == [1500]
    table.reset_rows([1500])
    store.commit()
    store.checkpoint()
    assert np.array_equal(index.search(target, 3).ids, table.search(target, 3).ids)


def test_keys_are_deleted_and_tables_by_key_grow(store, tmp_path):
    store.create_vocabulary("v", key_type="int64")
    table = store.create_table("t", vocabulary="v", embedding_dim=8)
    table.write(np.arange(1000), clustered(np.random.default_rng(0), 1000, 8), create=True)
    store.commit()
    index = table.rows.build_index(tmp_path / "i")
    queries = table.lookup(np.arange(0, 1000, 20)) + np.float32(0.01)
    check(index, table.rows, queries=queries)
    table.delete([3, 4])
    table.write([2000, 2001], table.lookup([5, 6]) * -1, create=True)  # in the rows of 3 and 4
    check(index, table.rows, queries=queries)
    found = index.search(table.lookup([2000]), 1).ids
    assert table.vocabulary.keys(found).tolist() == [[2000]]
    table.rows.resize(table.rows.num_embeddings + 10)  # as it does itself once it is full
    with pytest.raises(shardemb.ShardEmbError, match="build the index again"):
        index.search(table.lookup([5]), 1)
    store.commit()


def test_a_table_of_another_form_is_refused(store, tmp_path):
    table = make(store)
    index = table.build_index(tmp_path / "i")
    other = store.create_table("u", num_embeddings=3000, embedding_dim=16)
    with pytest.raises(shardemb.ShardEmbError, match="not built for table 'u'"):
        other.open_index(tmp_path / "i")
    table.resize(4000)
    with pytest.raises(shardemb.ShardEmbError, match="resized or resharded"):
        index.search(np.ones(16), 1)
    store.rollback()
    assert index.search(np.ones(16), 1).ids.shape == (1,)
    store.commit()
    store.reshard("t", rows_per_shard=500)
    with pytest.raises(shardemb.ShardEmbError, match="build the index again"):
        table.open_index(tmp_path / "i")


def test_many_changes_make_it_say_so_once(store, tmp_path, monkeypatch):
    monkeypatch.setattr(indexes, "MANY", 0.05)
    table = make(store)
    index = table.build_index(tmp_path / "i")
    table.write(np.arange(200), -table.lookup(np.arange(200)))
    with pytest.warns(RuntimeWarning, match="200 of the 3000 rows .* build it again"):
        index.search(np.ones(16), 1)
    check(index, table)
    store.commit()


def test_changes_while_it_is_built_are_searched_exactly(store, tmp_path, monkeypatch):
    table = make(store)
    target = 9 * np.ones(16, np.float32)
    add, steps = graph.Graph.add, iter(range(10**6))

    def add_and_change(self, ids, codes, threads):
        add(self, ids, codes, threads)
        table.write([next(steps), 2990], np.stack([target, target]))

    monkeypatch.setattr(graph.Graph, "add", add_and_change)
    monkeypatch.setattr(indexes, "BLOCK_ROWS", 500)
    index = table.build_index(tmp_path / "i")
    monkeypatch.undo()
    assert 2990 in index.changed_rows()
    assert set(index.search(target, 7).ids.tolist()) == {0, 1, 2, 3, 4, 5, 2990}
    store.rollback()
    assert 2990 in index.changed_rows()  # its code is not in the graph
    check(index, table)
    assert 2990 in index.search(table.lookup([2990]), 1).ids


def test_searches_of_several_threads_beside_changes(store, tmp_path):
    table = make(store)
    index = table.build_index(tmp_path / "i")
    queries, problems = queries_of(table), []
    expected = index.search(queries, 5).scores

    def search():
        try:
            for _ in range(10):
                np.testing.assert_allclose(index.search(queries, 5).scores, expected, rtol=1e-5)
        except BaseException as problem:
            problems.append(problem)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for each in threads:
        each.start()
    for _ in range(20):
        table.write(np.arange(50), table.lookup(np.arange(50)))
    for each in threads:
        each.join()
    assert problems == []
    store.commit()


def test_zeros_and_what_is_not_finite_are_left_out(store, tmp_path):
    table = make(store, 200, 4)
    table.write([3, 4], [[0, 0, 0, 0], [np.nan, 1, 1, 1]], check_finite=False)
    store.commit()
    assert len(table.build_index(tmp_path / "i")) == 198
    assert len(table.build_index(tmp_path / "i", metric="l2")) == 199
    tiny = store.create_table("empty", num_embeddings=5, embedding_dim=4, initializer=Uniform(0, 1))
    store.commit()
    for metric in METRICS:
        index = tiny.build_index(tmp_path / "j", metric=metric)
        assert index.search(np.ones(4), 3).ids.tolist() == [-1, -1, -1]


def test_what_cannot_be_indexed(store, tmp_path):
    table = make(store)
    table.write([1], np.ones((1, 16)))
    with pytest.raises(shardemb.ShardEmbError, match="commit first"):
        table.build_index(tmp_path / "i")
    store.commit()
    with pytest.raises(ValueError, match="'cosine', 'dot', 'l2'"):
        table.build_index(tmp_path / "i", metric="hamming")
    with pytest.raises(FileNotFoundError, match="create it first"):
        table.build_index(tmp_path / "no" / "i")
    raw = store.create_table("raw", num_embeddings=5, embedding_dim=4, dtype="raw")
    with pytest.raises(ValueError, match="raw bytes"):
        raw.build_index(tmp_path / "i")
    rested = store.create_table(
        "rested", num_embeddings=5, embedding_dim=4, optimizer=shardemb.optim.Adam(dense_equivalent=True)
    )
    with pytest.raises(ValueError, match="each step changes all rows"):
        rested.build_index(tmp_path / "i")
    index = table.build_index(tmp_path / "i")
    with pytest.raises(ValueError, match="candidates must be between 10"):
        index.search(np.ones(16), 10, candidates=5)
    store.commit()
    assert os.listdir(tmp_path) != []


def test_damaged_files_are_refused(store, tmp_path):
    table = make(store)
    path = tmp_path / "i"
    with pytest.raises(FileNotFoundError, match="build_index"):
        table.open_index(path)
    table.build_index(path)
    content = path.read_bytes()
    for damaged in (b"", content[:20], content[:-1], content[: len(content) // 2], b"x" * 5000):
        path.write_bytes(damaged)
        with pytest.raises(shardemb.FormatError, match="build it again"):
            table.open_index(path)
    position = content.rindex(b'"table"')
    path.write_bytes(content[:position] + b'"tabel"' + content[position + 7 :])
    with pytest.raises(shardemb.FormatError, match="damaged"):
        table.open_index(path)
    path.write_bytes(content[1000:])
    with pytest.raises(shardemb.FormatError, match="damaged"):
        table.open_index(path)


def test_a_failure_leaves_the_old_index(store, tmp_path, monkeypatch):
    table = make(store)
    table.build_index(tmp_path / "i")
    before = (tmp_path / "i").read_bytes()
    monkeypatch.setattr(graph.Graph, "write_to", lambda self, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        table.build_index(tmp_path / "i")
    assert (tmp_path / "i").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "store.zarr"]


def test_without_usearch_the_message_has_the_command(path):
    code = """
        import sys, shardemb, pytest
        sys.modules["usearch"] = sys.modules["usearch.index"] = None
        with shardemb.open(sys.argv[1]) as store:
            table = store.create_table("t", num_embeddings=5, embedding_dim=2)
            store.commit()
            with pytest.raises(ModuleNotFoundError, match=r"pip install 'shardemb\\[ann\\]'"):
                table.build_index(sys.argv[1] + ".index")
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    subprocess.run([sys.executable, "-c", lines, str(path)], check=True)
