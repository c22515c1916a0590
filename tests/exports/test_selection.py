"""Which rows are exported: ranges, masks, ids, keys, and what changed since a step."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.exports import keyed_table, plain_table

import shardemb
from shardemb.errors import RowIdError, UnknownKeyError
from shardemb.exports import selection
from shardemb.exports.selection import RowSet

sets = st.sets(st.integers(0, 40))


def listed(rows):
    return rows.ids(0, rows.num_rows).tolist()


@given(sets, sets, st.integers(0, 45), st.integers(0, 45))
def test_row_sets_are_sets(one, other, low, high):
    a, b = (RowSet.of_ids(np.array([*each, *each], np.int64)) for each in (one, other))
    assert listed(a) == sorted(one)
    assert listed(a & b) == sorted(one & other)
    mask = np.isin(np.arange(low), list(one))
    assert listed(RowSet.of_mask(mask)) == np.flatnonzero(mask).tolist()
    assert listed(a & RowSet.of_range(low, high)) == sorted(one & set(range(low, high)))
    first, last = sorted((min(low, len(one)), min(high, len(one))))
    assert listed(a.part(first, last)) == a.ids(first, last).tolist() == sorted(one)[first:last]
    assert a.at(np.arange(len(one))).tolist() == sorted(one)
    assert a.span == ((min(one), max(one) + 1) if one else (0, 0))
    cut = RowSet.of_range(0, 20)
    assert listed(RowSet.joined([a & cut, a & RowSet.of_range(20, 50)])) == sorted(one)
    assert RowSet.joined([RowSet.of_range(0, 3), RowSet.of_range(3, 5)]).is_range
    assert [each.tolist() for each in a.blocks(3)] == [sorted(one)[k : k + 3] for k in range(0, len(one), 3)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store with a table of counters and one by key, and the steps at which rows changed."""
    folder = tmp_path_factory.mktemp("trained")
    with shardemb.open(folder / "store.zarr") as store:
        options = {"optimizer": shardemb.optim.SGD(lr=1.0), "counters": True}
        table, _ = plain_table(store, **options)
        words, _, _ = keyed_table(store)
        last = np.zeros(1500, np.int64)
        for step, ids in enumerate(([3, 4, 5, 700], [4, 1499], [0]), 1):
            table.update(ids, np.ones((len(ids), 6), np.float32))
            last[ids] = step
        words.update(["of", "Z"], np.ones((2, 6), np.float32))
        words.update(["Z"], np.ones((1, 6), np.float32))
        store.commit()
        yield table, last, words, folder


masks = st.none() | st.integers(0, 2**32).map(lambda seed: np.random.default_rng(seed).random(1500) < 0.3)


@settings(max_examples=15)
@given(
    where=masks | st.lists(st.integers(0, 1499), max_size=30),
    rows=st.none() | st.tuples(st.integers(0, 700), st.integers(700, 1500)),
    since=st.none() | st.integers(0, 4),
)
def test_everything_that_is_given_holds(trained, where, rows, since):
    table, last, _, folder = trained
    wanted = np.arange(1500)
    chosen = np.ones(1500, np.bool_)
    if where is not None:
        chosen &= where if isinstance(where, np.ndarray) else np.isin(wanted, where)
    if rows is not None:
        chosen &= (wanted >= rows[0]) & (wanted < rows[1])
    if since is not None:
        chosen &= last > since
    report = table.export(
        folder / "some.parquet", where=where, rows=rows, changed_since=since, columns=["last_step"]
    )
    found = pq.read_table(folder / "some.parquet")
    assert report.num_rows == chosen.sum()
    assert found["id"].to_pylist() == wanted[chosen].tolist()
    assert found["last_step"].to_pylist() == last[chosen].tolist()
    vectors = found["embedding"].combine_chunks().flatten().to_numpy()
    np.testing.assert_array_equal(vectors.reshape(-1, 6), table.lookup(wanted[chosen]))


def test_blocks_of_counters_are_joined(trained, monkeypatch):
    monkeypatch.setattr(selection, "SCANNED_ROWS", 7)
    table, _, words, folder = trained
    table.export(folder / "t.parquet", changed_since=0)
    assert pq.read_table(folder / "t.parquet")["id"].to_pylist() == [0, 3, 4, 5, 700, 1499]
    words.export(folder / "w.parquet", changed_since=1)
    assert pq.read_table(folder / "w.parquet")["key"].to_pylist() == ["Z"]
    assert words.export(folder / "w.npy").num_rows == 8


def test_keys_choose_rows_of_a_table_by_key(trained):
    _, _, words, folder = trained
    words.export(folder / "w.parquet", where=["Z", "the", "Z"])
    assert pq.read_table(folder / "w.parquet")["key"].to_pylist() == ["the", "Z"]
    mask = np.zeros(words.num_embeddings, np.bool_)
    mask[[2, 8]] = True  # the second is the row that has lost its key
    words.export(folder / "w.parquet", where=mask)
    assert pq.read_table(folder / "w.parquet")["key"].to_pylist() == ["the"]
    words.export(folder / "w.parquet", where=mask.tolist())
    assert pq.read_table(folder / "w.parquet")["key"].to_pylist() == ["the"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": (0, 1501)}, ValueError, "rows must be a tuple"),
        ({"rows": [0, 5]}, ValueError, "rows must be a tuple"),
        ({"where": [1500]}, RowIdError, "1500"),
        ({"where": np.ones(3, np.bool_)}, ValueError, "one for each of the 1500 rows"),
        ({"where": [0.5]}, TypeError, "integers"),
        ({"changed_since": -1}, ValueError, "changed_since"),
        ({"columns": ["exp_avg"]}, ValueError, "columns must be"),
    ],
)
def test_what_cannot_be_selected_is_refused(trained, arguments, error, message):
    table, _, _, folder = trained
    with pytest.raises(error, match=message):
        table.export(folder / "not.parquet", **arguments)
    assert not (folder / "not.parquet").exists()


def test_a_key_without_a_row_is_named(trained):
    with pytest.raises(UnknownKeyError, match="'gone'"):
        trained[2].export(trained[3] / "not.parquet", where=["the", "gone"])


def test_a_table_without_counters_says_how_to_get_them(store, tmp_path):
    table, _ = plain_table(store)
    with pytest.raises(ValueError, match=r"table 't' has no counters.*since step 3.*counters=True"):
        table.export(tmp_path / "t.npy", changed_since=3)
