"""Rows copied and swapped with all that belongs to them, against NumPy."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardemb
from shardemb.engine.planned import Change
from shardemb.initializers import Normal
from shardemb.optim import SGD, Adam, AdamW, RowWiseAdagrad
from shardemb.vocabulary.keyed_rows import KeyedRows

ROWS, DIM = 9, 3

IDS = st.lists(st.integers(0, ROWS - 1), max_size=6)


def content(table):
    """All that each row has, as one array."""
    columns = [table.lookup(range(ROWS))]
    columns += [
        table.state(name, range(ROWS)).reshape(ROWS, -1) for name in ("exp_avg", "exp_avg_sq", "count")
    ]
    return np.hstack(columns)


def make(store):
    table = store.create_table(
        "t",
        num_embeddings=ROWS,
        embedding_dim=DIM,
        optimizer=Adam(lr=0.1),
        initializer=Normal(1.0),
        counters=True,
    )
    table.update([0, 3, 3, 5], np.arange(12.0).reshape(4, 3))
    store.commit()
    table.update([1, 3], np.ones((2, 3)))
    return table


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(["copy", "swap", "reset", "commit", "rollback"]), IDS, IDS), max_size=6
    )
)
def test_rows_move_with_their_state(tmp_path_factory, actions):
    path = tmp_path_factory.mktemp("store") / "s"
    with shardemb.open(path, "w") as store:
        table = make(store)
        model, fresh = content(table), content(store.create_table(
            "fresh", num_embeddings=ROWS, embedding_dim=DIM, optimizer=Adam(), initializer=Normal(1.0), counters=True
        ))  # fmt: skip
        store.drop_table("fresh")
        fresh[:, :DIM] = 0  # of another stream: only the state is the same
        store.commit()
        committed = model.copy()
        for what, one, other in actions:
            size = min(len(one), len(other))
            one, other = one[:size], other[:size]
            if what == "copy":
                table.copy_rows(one, other)
                model[other] = model[one]  # NumPy reads all of them first too, and the last wins
            elif what == "swap":
                both = one + other
                if len(set(both)) == len(both):
                    table.swap_rows(one, other)
                    model[both] = model[other + one]
                else:
                    with pytest.raises(ValueError, match="each of them once"):
                        table.swap_rows(one, other)
            elif what == "reset":
                table.reset_rows(one)
                model[one, DIM:] = fresh[one, DIM:]
                model[one, :DIM] = table.lookup(one)
            elif what == "commit":
                store.commit()
                committed = model.copy()
            else:
                store.rollback()
                model = committed.copy()
            np.testing.assert_array_equal(content(table), model)
        store.commit()
        store.checkpoint()
    with shardemb.open(path, "r") as reader:
        np.testing.assert_array_equal(content(reader["t"]), model)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda table: table.copy_rows([1, 2], [3]), ValueError, "as many of both"),
        (lambda table: table.copy_rows([1], [ROWS]), shardemb.RowIdError, f"{ROWS}"),
        (lambda table: table.copy_rows([-1], [1]), shardemb.RowIdError, "-1"),
        (lambda table: table.swap_rows([1, 2], [3]), ValueError, "in pairs"),
        (lambda table: table.swap_rows([1, 2], [2, 3]), ValueError, "each of them once"),
        (lambda table: table.swap_rows([0.5], [1]), TypeError, "ids"),
    ],
)
def test_bad_ids_change_nothing(store, call, error, match):
    table = make(store)
    store.commit()
    with pytest.raises(error, match=match):
        call(table)
    assert not store.has_changes


def test_by_key(store):
    store.create_vocabulary("v", key_type="string")
    table = store.create_table("t", vocabulary="v", embedding_dim=1, optimizer=SGD(lr=1.0))
    table.write(["a", "b", "c"], [[1.0], [2.0], [3.0]], create=True)
    table.swap_rows(["a"], ["b"])
    table.copy_rows(["b"], ["c"])
    assert table.lookup(["a", "b", "c"]).ravel().tolist() == [2.0, 1.0, 1.0]
    table.reset_rows(["a"])
    assert table.lookup(["a", "b", "c"]).ravel().tolist() == [0.0, 1.0, 1.0]
    for call in (table.copy_rows, table.swap_rows):
        with pytest.raises(shardemb.UnknownKeyError, match="'x'"):
            call(["a"], ["x"])
    assert table.delete(["b", "x"]).tolist() == [1, -1]
    assert "b" not in table.vocabulary
    assert table.lookup(["c"]) == 1.0


def test_a_budget_of_nothing_is_enough(tmp_path):
    with shardemb.open(tmp_path / "s", "w", memory_budget=0) as store:
        table = store.create_table("t", num_embeddings=20_000, embedding_dim=8, optimizer=Adam())
        rows = np.arange(20_000)
        table.write(rows, np.repeat(rows, 8).reshape(-1, 8).astype(np.float32))
        store.commit()
        table.swap_rows(rows[:10_000], rows[10_000:])
        assert table.lookup([0, 10_000])[:, 0].tolist() == [10_000, 0]
        store.rollback()
        assert table.lookup([0, 10_000])[:, 0].tolist() == [0, 10_000]


def test_rows_that_are_caught_up_are_copied_as_they_are_now(store):
    table = store.create_table(
        "t", num_embeddings=4, embedding_dim=1, initializer=np.ones((4, 1)),
        optimizer=SGD(lr=0.5, weight_decay=0.5, dense_equivalent=True),
    )  # fmt: skip
    table.update([0], [[0.0]])
    table.copy_rows([1], [2])
    table.update([0], [[0.0]])
    np.testing.assert_allclose(table.lookup(range(4)).ravel(), 0.75**2, rtol=1e-6)


def test_a_move_that_was_planned_again_still_notices_that_keys_got_other_rows():
    """First the records change, then the rows of the keys: both are looked at each time."""

    class Rows:
        renewing = KeyedRows.renewing
        keys = SimpleNamespace(reassigned=0)

    def plan():
        names.append(f"rows {Rows.keys.reassigned}")
        return replace(change, renew=lambda: change)

    names, change = [], Change(None, None, None, takes_step=False)
    first = Rows().renewing(plan)
    second = first.renew()  # the records are others
    assert names == ["rows 0"]
    assert second.renew() is None
    Rows.keys.reassigned = 1
    third = second.renew()
    assert names == ["rows 0", "rows 1"]
    assert third.renew().renew() is None


# ---- state from elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (Adam(lr=0.1), {}),
        (Adam(lr=0.1), {"counters": True}),
        (Adam(lr=0.1, rowwise_bias_correction=True), {}),
        (RowWiseAdagrad(lr=0.1), {}),
        (SGD(lr=0.1, momentum=0.9), {"state_dtype": "bfloat16"}),
        (Adam(lr=0.1), {"dtype": "bfloat16"}),
        (AdamW(lr=0.1, weight_decay=0.1, dense_equivalent=True), {}),
        (Adam(lr=0.1, dense_equivalent=True), {"initializer": Normal(1.0)}),
    ],
    ids=str,
)
def test_training_goes_on_with_state_from_elsewhere(store, optimizer, options):
    old, new = (
        store.create_table(name, num_embeddings=ROWS, embedding_dim=DIM, optimizer=optimizer, **options)
        for name in ("old", "new")
    )
    generator = np.random.default_rng(1)

    def update(*tables):
        ids, values = generator.integers(0, ROWS - 2, 4), generator.normal(size=(4, DIM))
        for table in tables:
            table.update(ids, values)

    for _ in range(5):
        update(old)
    everything = np.arange(ROWS)
    names = [name for name in optimizer.state_columns(DIM) if name != "last_step"]
    new.set_step(old.step)
    new.write(everything, old[:])
    new.write_state(everything, {name: old.state(name, everything) for name in names})
    for _ in range(2):
        for name in names:
            np.testing.assert_array_equal(new.state(name, everything), old.state(name, everything))
        np.testing.assert_array_equal(new[:], old[:])
        assert new.step == old.step
        for _ in range(3):
            update(old, new)
        store.commit()
    new.set_step(old.step)
    new.write_state([], {})
    store.rollback()
    np.testing.assert_array_equal(new[:], old[:])


def test_state_is_written_whole_or_not_at_all(store):
    table = make(store)
    store.commit()
    right = {"exp_avg": np.ones((2, DIM))}
    for ids, state, error, match in [
        (
            [1, 2],
            right | {"sum": np.ones((2, DIM))},
            ValueError,
            "no state column 'sum'.*exp_avg, exp_avg_sq$",
        ),
        ([1, 2], {"count": np.ones(2)}, ValueError, "no state column 'count'"),
        ([1, 2], right | {"exp_avg_sq": np.ones((2, 1))}, ValueError, r"exp_avg_sq have shape \(2, 1\)"),
        ([1, 2], {"exp_avg": np.full((2, DIM), np.nan)}, ValueError, "exp_avg"),
        ([1, 2], {"exp_avg": [["x"] * DIM] * 2}, TypeError, "exp_avg"),
        ([1, ROWS], right, shardemb.RowIdError, "past the end"),
    ]:
        with pytest.raises(error, match=match):
            table.write_state(ids, state)
    with pytest.raises(ValueError, match="step"):
        table.set_step(-1)
    assert not store.has_changes
    table.set_step(7)
    assert store.has_changes
    store.rollback()
    assert table.step == 2
    table.write_state([4, 4], {"exp_avg": [[1.0] * DIM, [2.0] * DIM]})
    assert table.state("exp_avg", 4).tolist() == [2.0] * DIM
    assert table.state("count", 4) == 0
