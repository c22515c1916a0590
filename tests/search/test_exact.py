"""Exact search, against NumPy in double precision: every metric, ties, what is left out, and what is refused."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import inside

import shardemb
from shardemb.initializers import Constant, Uniform
from shardemb.search import exact

METRICS = ("cosine", "dot", "l2")


def model(rows, queries, k, metric, ids=None, exclude=None, written=None):
    """Compare all pairs in double precision; return ids and scores, best first, smaller ids first."""
    ids = np.arange(len(rows)) if ids is None else np.unique(ids)
    rows, queries = rows.astype(np.float64), queries.astype(np.float64)
    found, scores = (
        np.full((len(queries), k), -1),
        np.full((len(queries), k), np.inf if metric == "l2" else -np.inf),
    )
    for number, query in enumerate(queries):
        left = [
            i for i in ids if (written is None or i in written) and i not in (exclude or {}).get(number, ())
        ]
        each = {i: score(rows[i], query, metric) for i in left}
        best = sorted(each, key=lambda i: (each[i] if metric == "l2" else -each[i], i))[:k]
        found[number, : len(best)], scores[number, : len(best)] = best, [each[i] for i in best]
    return found, scores


def score(row, query, metric):
    if metric == "dot":
        return row @ query
    if metric == "l2":
        return ((row - query) ** 2).sum()
    return row @ query / np.linalg.norm(row) / np.linalg.norm(query) if row.any() else -1.0


def check(table, values, queries, k, metric, model_options=None, **options):
    """Compare a search with the model: equal scores, and equal ids but for those whose scores round alike."""
    got = table.search(queries, k, metric=metric, **options)
    ids, scores = model(values, queries, k, metric, **(model_options or {}))
    assert got.ids.dtype == np.int64
    assert got.scores.dtype == np.float32
    np.testing.assert_allclose(got.scores, scores, rtol=1e-4, atol=1e-4)
    for number, row in enumerate(got.ids):
        assert (row < 0).sum() == (ids[number] < 0).sum()
        assert len(set(row[row >= 0])) == (row >= 0).sum()
        assert not set(row[row >= 0]) & set((model_options or {}).get("exclude", {}).get(number, ()))
    return got, ids


@pytest.fixture
def small(monkeypatch):
    """Blocks and tiles of few rows, and few scores at a time, so that small tables have many."""
    monkeypatch.setattr(exact, "TILE_BYTES", 2048)
    monkeypatch.setattr(exact, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(exact, "PRODUCT", 1024)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 400),
    dim=st.integers(1, 9),
    queries=st.integers(1, 21),
    k=st.sampled_from([1, 2, 7, 50, 500]),
    metric=st.sampled_from(METRICS),
    shards=st.sampled_from([1, 3]),
)
def test_it_finds_what_a_comparison_of_all_pairs_finds(
    new_store, seed, count, dim, queries, k, metric, shards
):
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 3, (count, dim)).astype(np.float32)  # many duplicates, ties and zeros
    asked = rng.integers(-2, 3, (queries, dim)).astype(np.float32)
    asked[~asked.any(axis=1)] = 1
    excluded = [rng.integers(0, count, rng.integers(0, 4)).tolist() for _ in asked]
    patch = pytest.MonkeyPatch()
    with new_store() as store, patch.context() as patched:
        patched.setattr(exact, "TILE_BYTES", 64 * 8 * 4)
        patched.setattr(exact, "BLOCK_BYTES", 2 * 64 * 8 * 4)
        patched.setattr(exact, "PRODUCT", 1024)
        table = store.create_table(
            "t", num_embeddings=count, embedding_dim=dim, initializer=rows, rows_per_shard=-(-count // shards)
        )
        exclude = {number: set(each) for number, each in enumerate(excluded)}
        got, ids = check(table, rows, asked, k, metric, {"exclude": exclude}, exclude=excluded)
        if metric != "cosine":  # products of small integers are exact
            assert np.array_equal(got.ids, ids)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.usefixtures("small")
def test_equal_rows_come_by_their_ids(store, metric):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((7, 5), np.float32)[rng.integers(0, 7, 3000)]
    table = store.create_table("t", num_embeddings=3000, embedding_dim=5, initializer=rows)
    for queries in (rows[:1], rows[:3], rng.standard_normal((30, 5), np.float32)):
        found = table.search(queries, 200, metric=metric)
        for ids, scores in zip(found.ids, found.scores, strict=True):
            same = (rows[ids][1:] == rows[ids][:-1]).all(axis=1)
            assert (np.diff(ids)[same] > 0).all()
            assert (np.diff(scores)[same] == 0).all()
            first = np.flatnonzero((rows == rows[ids[0]]).all(axis=1))[:200]
            assert np.array_equal(ids[: first.size], first)


@pytest.mark.usefixtures("small")
def test_threads_and_shards_make_no_difference(tmp_path):
    rng = np.random.default_rng(1)
    rows, queries = rng.standard_normal((5000, 8), np.float32), rng.standard_normal((17, 8), np.float32)
    results = []
    for threads, per_shard in ((1, 5000), (8, 5000), (8, 80), (1, 80)):
        with shardemb.open(tmp_path / f"{threads}-{per_shard}", threads=threads) as store:
            table = store.create_table(
                "t", num_embeddings=5000, embedding_dim=8, initializer=rows, rows_per_shard=per_shard
            )
            store.commit()
            results.append([table.search(queries, 30, metric=metric, rows=(7, 4500)) for metric in METRICS])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert np.array_equal(one.ids, same.ids)
            assert np.array_equal(one.scores, same.scores)


def test_distances_of_rows_far_from_the_origin_keep_their_digits(store):
    rng = np.random.default_rng(2)
    rows = (1000 + rng.standard_normal((2000, 16)) / 100).astype(np.float32)
    table = store.create_table("t", num_embeddings=2000, embedding_dim=16, initializer=rows)
    found = table.search(rows[:50], 5, metric="l2")
    ids, scores = model(rows, rows[:50], 5, "l2")
    assert np.array_equal(found.ids, ids)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


def test_rows_that_were_never_written_are_left_out(store):
    table = store.create_table("t", num_embeddings=100, embedding_dim=3, initializer=Uniform(-1, 1))
    assert (table.search([1, 0, 0], 4).ids == -1).all()
    assert (table.search([1, 0, 0], 4).scores == -np.inf).all()
    table.write([5], [[1.0, 0, 0]])
    table.prefetch([7], for_update=True)
    assert table.search([1, 0, 0], 2).ids.tolist() == [5, -1]
    store.commit()
    store.checkpoint()
    table.write([9], [[2.0, 0.1, 0]])
    assert table.search([1, 0, 0], 3).ids.tolist() == [5, 9, -1]
    store.rollback()
    assert table.search([1, 0, 0], 3, metric="l2").ids.tolist() == [5, -1, -1]
    assert table.search([1, 0, 0], 3, metric="l2").scores.tolist() == [0, np.inf, np.inf]


def test_rows_of_zeros_come_last_and_what_is_not_finite_never(store):
    table = store.create_table("t", num_embeddings=5, embedding_dim=2)
    table.write([0, 1, 3], [[-1, 0], [np.nan, 1], [np.inf, 1]], check_finite=False)
    table.write([4], [[1e-42, 0]])  # too short for a direction
    found = table.search([1, 0.1], 5)
    assert found.ids.tolist() == [0, 2, 4, -1, -1]
    assert found.scores.tolist()[1:] == [-1, -1, -np.inf, -np.inf]
    for metric in ("dot", "l2"):
        assert set(table.search([1, 0.1], 5, metric=metric).ids) == {0, 2, 4, -1}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.usefixtures("small")
def test_some_rows_are_searched(store, metric):
    rng = np.random.default_rng(3)
    rows, queries = rng.standard_normal((1000, 4), np.float32), rng.standard_normal((5, 4), np.float32)
    table = store.create_table("t", num_embeddings=1000, embedding_dim=4, initializer=rows)
    some = rng.integers(0, 1000, 300)
    for given_rows, ids in (
        ((100, 900), np.arange(100, 900)), ((5, 5), []), (some, some), (some.tolist(), some), ([], []),
    ):  # fmt: skip
        got, expected = check(table, rows, queries, 10, metric, {"ids": ids}, rows=given_rows)
        assert np.array_equal(got.ids, expected)
    left_out = {number: set(range(500)) for number in range(5)}
    check(table, rows, queries, 10, metric, {"exclude": left_out}, exclude=np.arange(500))


def test_other_dtypes_and_optimizer_state_are_searched_as_they_are_looked_up(store):
    rng = np.random.default_rng(4)
    rows = rng.standard_normal((500, 8), np.float32)
    for name, options in {
        "short": {"dtype": "bfloat16"},
        "scaled": {"dtype": shardemb.dtypes.ScaledInt8()},
        "trained": {"optimizer": shardemb.optim.Adam()},
        "rested": {"optimizer": shardemb.optim.Adam(dense_equivalent=True)},
    }.items():
        table = store.create_table(name, num_embeddings=500, embedding_dim=8, **options)
        table.write(np.arange(500), rows)
        if table.optimizer is not None:
            table.update([1, 2, 3], np.ones((3, 8)))
        check(table, table.lookup(np.arange(500)), rows[:3], 5, "cosine")


def test_a_search_while_rows_are_spilled_and_changed(tmp_path):
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((20_000, 64), np.float32)
    with shardemb.open(tmp_path / "s", memory_budget=0) as store:
        table = store.create_table("t", num_embeddings=20_000, embedding_dim=64, initializer=rows)
        store.commit()
        changed = rng.permutation(20_000)[:8000]
        rows[changed] += 1
        for some in np.array_split(changed, 4):  # what is in memory is spilled for the next
            table.write(some, rows[some])
        assert table.stats()["rows_out"]
        check(table, rows, rows[:4], 6, "l2")
        stop = threading.Event()

        def change():
            while not stop.is_set():
                table.write(changed[:100], rows[changed[:100]])

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(5):
                check(table, rows, rows[:4], 6, "cosine")
        finally:
            stop.set()
            thread.join()
        store.commit()


def test_a_reader_searches_beside_the_writer(path):
    with shardemb.open(path) as store:
        table = store.create_table("t", num_embeddings=10, embedding_dim=2, initializer=Constant(1.0))
        table.write([3], [[1.0, 0]])
        store.commit()
        with shardemb.open(path, "r") as reader:
            assert reader["t"].search([1, 0], 2).ids.tolist() == [3, -1]


def test_pages_are_released_behind_a_table_that_does_not_fit(store, monkeypatch):
    rows = np.random.default_rng(6).standard_normal((5000, 64), np.float32)
    table = store.create_table("t", num_embeddings=5000, embedding_dim=64, initializer=rows)
    released = []
    kind = type(inside.state(table).shards)
    monkeypatch.setattr(kind, "release_pages", lambda self, start, stop: released.append((start, stop)))
    before = table.search(rows[:2], 3)
    assert released == []
    monkeypatch.setattr(exact.memory_budget, "available_bytes", lambda: 1000)
    after = table.search(rows[:2], 3)
    assert sorted(released)[0][0] == 0
    assert sorted(released)[-1][1] == 5000
    assert np.array_equal(before.ids, after.ids)


def test_no_queries_are_fine(store):
    table = store.create_table("t", num_embeddings=10, embedding_dim=2)
    found = table.search(np.empty((0, 2)), 3)
    assert found.ids.shape == found.scores.shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (([[1, 0], [0, 0]], 1), {}, ValueError, "query 1 is all zeros"),
        (([[1, 0, 0]], 1), {}, ValueError, r"\(q, 2\), or \(2,\) for one, got \(1, 3\)"),
        (([[np.nan, 0]], 1), {}, ValueError, "queries"),
        ((["a", "b"], 1), {}, TypeError, "queries"),
        (([1, 0], 0), {}, ValueError, "k must be between 1"),
        (([1, 0], 1.5), {}, TypeError, "k must be an integer"),
        (([1, 0], 1), {"metric": "l1"}, ValueError, "'cosine', 'dot', 'l2'"),
        (([1, 0], 1), {"rows": (2, 11)}, ValueError, "start <= stop <= 10"),
        (([1, 0], 1), {"rows": (2, 3, 4)}, ValueError, "array or list of row ids"),
        (([1, 0], 1), {"rows": [2, 10]}, shardemb.RowIdError, "10 at position 1"),
        (([1, 0], 1), {"exclude": [-1]}, shardemb.RowIdError, "-1"),
        (([1, 0], 1), {"exclude": [[1], [2]]}, ValueError, "2 lists for 1 queries"),
    ],
)
def test_what_is_refused(store, arguments, options, error, words):
    table = store.create_table("t", num_embeddings=10, embedding_dim=2)
    with pytest.raises(error, match=words):
        table.search(*arguments, **options)


def test_raw_bytes_are_refused(store):
    table = store.create_table("t", num_embeddings=10, embedding_dim=2, dtype="raw")
    with pytest.raises(ValueError, match="raw bytes"):
        table.search([1, 0], 1)
    store.commit()
    store.close()
    with pytest.raises(shardemb.StoreClosedError):
        table.search([1, 0], 1)
