"""Gradients scaled all alike, clipping by the norm of all of them, and frozen rows."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardemb
from shardemb.errors import FrozenRowError
from shardemb.optim import SGD, Adam


def grads(ids, dim, seed=0):
    return np.random.default_rng(seed).standard_normal((len(ids), dim)).astype(np.float32)


def norm_of(*batches):
    """The norm of the gradients of all rows: those of equal ids are summed first."""
    total = 0.0
    for ids, values in batches:
        rows, inverse = np.unique(ids, return_inverse=True)
        sums = np.zeros((rows.size, values.shape[1]))
        np.add.at(sums, inverse, values)
        total += float((sums**2).sum())
    return math.sqrt(total)


@pytest.fixture
def two(store):
    return [
        store.create_table(name, num_embeddings=100, embedding_dim=dim, optimizer=optimizer)
        for name, dim, optimizer in [("a", 3, SGD(lr=1.0)), ("b", 8, Adam(lr=0.1))]
    ]


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 20), max_size=40),
    st.lists(st.integers(0, 20), max_size=40),
    st.sampled_from([0.1, 3.0, 1e6]),
    st.sampled_from([None, 1.0, 1024.0, 3.0]),
    st.sampled_from([0.0, 2.5]),
)
def test_clipping_by_the_norm_of_all_tables(tmp_path_factory, first, second, max_norm, scale, extra):
    batches = {"a": (first, grads(first, 3)), "b": (second, grads(second, 8, 1))}
    expected = math.sqrt((norm_of(*batches.values()) / (scale or 1)) ** 2 + extra)
    factor = min(1.0, max_norm / (expected + 1e-6)) / (scale or 1)
    with shardemb.open(tmp_path_factory.mktemp("store") / "s", "w") as store:
        for name in ("clipped", "by_hand"):
            for table, dim in (("a", 3), ("b", 8)):
                store.create_table(
                    f"{name}_{table}", num_embeddings=21, embedding_dim=dim, optimizer=Adam(lr=0.1, eps=1.0)
                )
        got = store.update(
            {f"clipped_{name}": batch for name, batch in batches.items()},
            max_norm=max_norm, extra_norm_sq=extra, scale=scale,
        )  # fmt: skip
        assert got == pytest.approx(expected, rel=1e-6)
        alone = store.gradient_norm({f"by_hand_{name}": batch for name, batch in batches.items()})
        assert math.sqrt((alone / (scale or 1)) ** 2 + extra) == pytest.approx(got, rel=1e-12)
        store.update({f"by_hand_{name}": (ids, values * factor) for name, (ids, values) in batches.items()})
        for name in batches:
            one, other = (store[f"{kind}_{name}"].lookup(range(21)) for kind in ("clipped", "by_hand"))
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8)
        store.rollback()


def test_clipping_agrees_with_torch(store, two):
    torch = pytest.importorskip("torch")
    ids, values = [1, 5, 9], grads([1, 5, 9], 3)
    parameter = torch.nn.Parameter(torch.zeros(100, 3))
    parameter.grad = torch.zeros(100, 3)
    parameter.grad[ids] = torch.from_numpy(values)
    expected = torch.nn.utils.clip_grad_norm_([parameter], 0.5)
    torch.optim.SGD([parameter], lr=1.0).step()
    assert store.update({"a": (ids, values)}, max_norm=0.5) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(two[0].lookup(range(100)), parameter.detach().numpy(), rtol=1e-6)


def test_the_norm_alone_changes_nothing(store, two):
    store.create_vocabulary("v", key_type="int64")
    keyed = store.create_table("k", vocabulary="v", embedding_dim=2, optimizer=SGD(lr=1.0))
    keyed.vocabulary.add([5])
    commit = store.commit()
    batches = {
        "a": ([1, 1], np.ones((2, 3))),
        "b": (shardemb.Bags([1, 2], [0], mode="mean"), np.ones((1, 8))),
        "k": ([5, 6], [[3.0, 0], [100.0, 0]]),
    }
    assert store.gradient_norm(batches, missing="skip") == pytest.approx(math.sqrt(12 + 2 * 8 / 4 + 9))
    assert (store.last_commit, store.has_changes, keyed.num_embeddings) == (commit, False, 1)
    assert math.isnan(store.gradient_norm({"a": ([1], np.full((1, 3), np.nan))}))
    assert store.gradient_norm({}) == 0
    with pytest.raises(shardemb.UnknownKeyError):
        store.gradient_norm(batches)
    with pytest.raises(shardemb.RowIdError):
        store.gradient_norm({"a": ([100], np.ones((1, 3)))})
    store.close()
    with pytest.raises(shardemb.StoreClosedError):
        store.gradient_norm(batches)


def test_without_limits_there_is_no_norm(store, two):
    assert store.update({"a": ([1], grads([1], 3))}) is None
    assert two[0].update([1], grads([1], 3)) is None
    assert store.update({"a": ([1], grads([1], 3))}, max_norm=1e30) > 0


def test_the_norm_has_the_same_bits_for_any_number_of_threads(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50_000, 60_000)
    found = set()
    for threads in (1, 3):
        for rows_per_shard in (None, 1024):
            with shardemb.open(tmp_path / "s", "w", threads=threads) as store:
                store.create_table(
                    "t",
                    num_embeddings=50_000,
                    embedding_dim=33,
                    optimizer=SGD(),
                    rows_per_shard=rows_per_shard,
                )
                found.add(store.update({"t": (ids, grads(ids, 33))}, max_norm=1.0))
                found.add(store["t"].lookup(range(50_000)).tobytes())
                store.rollback()
    assert len(found) == 2


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_step_whose_gradients_are_not_finite_is_skipped(store, two, bad):
    values = grads([1, 2], 8)
    store.commit()
    values[1, 7] = bad
    good = grads([3], 3)
    assert not math.isfinite(store.update({"a": ([3], good), "b": ([1, 2], values)}, scale=1024.0))
    assert not math.isfinite(two[1].update([1, 2], values, scale=1024.0))
    assert not store.has_changes
    assert [table.step for table in two] == [0, 0]
    assert two[0].update([3], good, scale=2.0) == pytest.approx(norm_of(([3], good)) / 2, rel=1e-6)
    np.testing.assert_array_equal(two[0].lookup([3]), -good / 2)


def test_huge_gradients_are_finite(two):
    """The squares overflow float32, but not float64."""
    assert two[0].update([3], np.full((1, 3), 1e30), scale=1e30) == pytest.approx(math.sqrt(3))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 9), st.booleans())
def test_gradients_of_padding_have_no_part_in_the_norm(tmp_path_factory, ids, padding, by_frequency):
    values = grads(ids, 3)
    kept = [i for i, row in enumerate(ids) if row != padding]
    counts = np.bincount(ids, minlength=10)[ids][:, None] if by_frequency else 1
    expected = norm_of((np.array(ids)[kept], (values / counts)[kept])) if kept else 0.0
    values[[i for i in range(len(ids)) if i not in kept]] = np.nan
    with shardemb.open(tmp_path_factory.mktemp("store") / "s", "w") as store:
        table = store.create_table("t", num_embeddings=10, embedding_dim=3, optimizer=SGD(lr=1.0))
        named = {"scale_grad_by_freq": by_frequency, "scale": 2.0}
        found = table.update(ids, values, padding_idx=padding - 10, **named)
        assert found == pytest.approx(expected / 2, rel=1e-6)
        moved = table.lookup(range(10))
        assert np.linalg.norm(moved) == pytest.approx(expected / 2, rel=1e-6)
        assert table.update(ids, values, padding_idx=padding, **named) == found
        np.testing.assert_allclose(table.lookup(range(10)), 2 * moved, rtol=1e-6)
        store.rollback()


def test_a_dense_part_that_is_not_finite_skips_the_step_too(store, two):
    for extra in (math.inf, math.nan):
        norm = store.update({"a": ([3], grads([3], 3))}, scale=1.0, extra_norm_sq=extra)
        assert not math.isfinite(norm)
    assert two[0].step == 0


def test_by_key(store):
    store.create_vocabulary("v", key_type="string")
    table = store.create_table("t", vocabulary="v", embedding_dim=2, optimizer=SGD(lr=1.0))
    table.update(["x", "y"], [[1.0, 0], [0, 1.0]], create=True)
    assert table.update(["x"], [[8.0, 0]], scale=4.0) == 2.0
    assert math.isnan(table.update(["x"], [[math.nan, 0]], scale=4.0))
    np.testing.assert_array_equal(table.lookup(["x"]), [[-3.0, 0]])
    assert store.update({"t": (["x", "z"], [[3.0, 0], [0, 9.0]])}, max_norm=6.0, missing="skip") == 3.0


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_are_clipped_by_the_norm_of_their_rows(store, mode):
    """As if the gradients of the rows had been given."""
    ids, offsets, by_bag = [1, 5, 5, 9, 1], [0, 3], grads([0, 1], 3)
    tables = [
        store.create_table(name, num_embeddings=10, embedding_dim=3, optimizer=SGD(lr=1.0))
        for name in ("free", "clipped", "scaled")
    ]
    tables[0].update_bag(ids, offsets, by_bag, mode=mode)
    by_row = -tables[0].lookup(range(10))
    expected = np.linalg.norm(by_row)
    assert store.update_bag(
        {"clipped": (shardemb.Bags(ids, offsets, mode=mode), by_bag)}, max_norm=0.5
    ) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(
        tables[1].lookup(range(10)), -by_row * (0.5 / (expected + 1e-6)), rtol=1e-5, atol=1e-7
    )
    assert tables[2].update_bag(ids, offsets, by_bag, mode=mode, scale=2.0) == pytest.approx(
        expected / 2, rel=1e-6
    )
    assert math.isnan(tables[2].update_bag(ids, offsets, by_bag * np.nan, mode=mode, scale=2.0))
    assert tables[2].step == 1


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"scale": 0.0}, ValueError, "scale"),
        ({"scale": -1.0}, ValueError, "scale"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"max_norm": -1.0}, ValueError, "max_norm"),
        ({"max_norm": 1.0, "extra_norm_sq": -1.0}, ValueError, "extra_norm_sq"),
        ({"max_norm": 1.0, "extra_norm_sq": math.nan}, ValueError, "extra_norm_sq is nan.*scale=1.0"),
    ],
)
def test_bad_limits_change_nothing(store, two, arguments, error, match):
    with pytest.raises(error, match=match):
        store.update({"a": ([3], grads([3], 3))}, **arguments)
    assert two[0].step == 0


def test_a_norm_that_is_not_finite_cannot_be_clipped(store, two):
    for check_finite in (False, True):
        with pytest.raises(ValueError, match=r"gradients .* hold inf at position \(1, 2\).*scale=1.0"):
            store.update(
                {"a": ([3, 5], [[0, 0, 0], [0, 0, np.inf]])}, max_norm=1.0, check_finite=check_finite
            )
    assert two[0].step == 0


# ---- frozen rows ------------------------------------------------------------------------------------------------


def test_a_frozen_row_takes_no_gradients(store, two):
    table, other = two
    table.freeze_rows(10, 20)
    for ids in ([5, 10], [19], [25, 12, 12]):
        with pytest.raises(FrozenRowError, match=r"row 1[029] .*unfreeze_rows"):
            store.update({"b": ([1], grads([1], 8)), "a": (ids, grads(ids, 3))})
    assert (table.step, other.step) == (0, 0)
    table.update([9, 20], grads([9, 20], 3))
    table.write([10], [[1.0, 2.0, 3.0]])
    table.unfreeze_rows(10, 11)
    table.update([10], grads([10], 3))
    assert table.frozen_rows == ((11, 20),)


def test_frozen_rows_are_part_of_a_commit(tmp_path):
    with shardemb.open(tmp_path / "s", "w") as store:
        table = store.create_table("t", num_embeddings=100, embedding_dim=1, optimizer=SGD())
        store.commit()
        table.freeze_rows(50)
        assert store.has_changes
        store.rollback()
        assert table.frozen_rows == ()
        table.freeze_rows(50)
        table.freeze_rows(0, 10)
        store.commit()
    with shardemb.open(tmp_path / "s", "a") as store:
        table = store["t"]
        assert table.frozen_rows == ((0, 10), (50, 100))
        table.resize(60, drop_rows=True)
        assert table.frozen_rows == ((0, 10), (50, 60))
        table.resize(200)
        assert table.frozen_rows == ((0, 10), (50, 60))
        store.commit()
        store.reshard("t", optimizer=Adam())
        assert store["t"].frozen_rows == ((0, 10), (50, 60))
        with pytest.raises(FrozenRowError):
            store["t"].update([0], [[1.0]])
    with shardemb.open(tmp_path / "s", "r") as reader:
        assert reader["t"].frozen_rows == ((0, 10), (50, 60))
        with pytest.raises(shardemb.ReadOnlyError):
            reader["t"].freeze_rows()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [((-1, 3), ValueError), ((3, 101), ValueError), ((5, 3), ValueError), ((0.5, 3), TypeError)],
)
def test_bad_ranges_freeze_nothing(two, arguments, error):
    with pytest.raises(error):
        two[0].freeze_rows(*arguments)
    assert two[0].frozen_rows == ()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.integers(0, 12)), max_size=8))
def test_ranges_are_sets(changes):
    from shardemb.format import ranges

    found, model = (), set()
    for add, one, other in changes:
        start, stop = sorted((one, other))
        found = (ranges.united if add else ranges.without)(found, start, stop)
        model = model | set(range(start, stop)) if add else model - set(range(start, stop))
        assert [row for first, last in found for row in range(first, last)] == sorted(model)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(found))
        for row in range(12):
            assert ranges.first_within(found, np.array([row])) == (row if row in model else None)
