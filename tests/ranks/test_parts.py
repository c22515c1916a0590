"""Batches of several ranks joined into one, against the same batches made by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardemb
from shardemb.bags import Bags
from shardemb.ranks.parts import Joined, Part

ROWS, DIM = 50, 3


def rows_of(draw, ids):
    return np.random.default_rng(len(ids)).random((*np.shape(ids), DIM), np.float32)


@st.composite
def rank_rows(draw):
    shape = draw(st.sampled_from([(0,), (1,), (4,), (2, 3), (0, 2), ()]))
    ids = draw(st.lists(st.integers(0, ROWS - 1), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    return np.array(ids, np.int64).reshape(shape)


@settings(max_examples=60)
@given(each=st.lists(st.one_of(st.none(), rank_rows()), min_size=1, max_size=4), divisor=st.integers(1, 4))
def test_rows_are_joined_and_cut_again(each, divisor):
    if all(ids is None for ids in each):
        return
    grads = [None if ids is None else np.random.default_rng(1).random((*ids.shape, DIM)) for ids in each]
    parts = [
        None if ids is None else Part.of("t", ids, own, DIM) for ids, own in zip(each, grads, strict=True)
    ]
    joined = Joined("t", parts)
    flat = [ids.reshape(-1) for ids in each if ids is not None]
    assert np.array_equal(joined.what, np.concatenate(flat))
    expected = np.concatenate([own.reshape(-1, DIM).astype(np.float32) for own in grads if own is not None])
    assert np.array_equal(joined.gradients(divisor), expected / np.float32(divisor))
    table = np.arange(ROWS * DIM).reshape(ROWS, DIM)
    for ids, rows in zip(each, joined.cut(table[joined.what]), strict=True):
        assert (rows is None) if ids is None else np.array_equal(rows, table[ids])


@st.composite
def rank_bags(draw):
    sizes = draw(st.lists(st.integers(0, 3), max_size=4))
    ids = draw(st.lists(st.integers(0, ROWS - 1), min_size=sum(sizes), max_size=sum(sizes)))
    offsets = np.cumsum([0, *sizes])
    weights = draw(st.sampled_from([None, np.linspace(0.5, 2, len(ids), dtype=np.float32)]))
    last = draw(st.booleans())
    return np.array(ids, np.int64), offsets if last else offsets[:-1], weights, last


@settings(max_examples=40)
@given(each=st.lists(rank_bags(), min_size=1, max_size=3), mode=st.sampled_from(["sum", "mean", "sqrtn"]))
def test_bags_are_joined_and_cut_again(new_store, each, mode):
    with new_store() as store:
        table = store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM)
        table.write(np.arange(ROWS), np.random.default_rng(0).random((ROWS, DIM), np.float32))
        bags = [Bags(ids, offsets, mode, weights, 7, last) for ids, offsets, weights, last in each]
        joined = Joined("t", [Part.of("t", one, None, DIM) for one in bags])
        found = joined.cut(store.lookup_bag({"t": joined.what})["t"])
        for one, rows in zip(bags, found, strict=True):
            expected = store.lookup_bag({"t": one})["t"]
            assert rows.shape == expected.shape
            assert np.allclose(rows, expected, 1e-6, 1e-7)
        counts = joined.cut_by_id(np.arange(sum(len(one.ids) for one in bags)))
        assert np.array_equal(np.concatenate(counts), np.arange(sum(len(one.ids) for one in bags)))
        store.commit()


def test_keys_are_joined_as_they_are():
    parts = [Part.of("t", [["a", "b"]], None, DIM), Part.of("t", np.empty(0, np.int64), None, DIM)]
    joined = Joined("t", [*parts, Part.of("t", np.array(["ccc"]), None, DIM)])
    assert joined.what == ["a", "b", "ccc"]
    found = joined.cut(np.arange(9).reshape(3, 3))
    assert [each.tolist() for each in found] == [[[[0, 1, 2], [3, 4, 5]]], [], [[6, 7, 8]]]


def test_what_differs_between_ranks_is_refused():
    rows = Part.of("t", [1], None, DIM)
    sums, maxima = (Part.of("t", Bags([1], [0], mode), None, DIM) for mode in ("sum", "max"))
    for pair in ((rows, sums), (sums, maxima)):
        with pytest.raises(
            ValueError, match=r"table 't': ranks ask for .* all have to ask for the same kind"
        ):
            Joined("t", pair)


def test_a_wrong_id_is_named_with_its_rank_and_its_position_there():
    joined = Joined("t", [Part.of("t", [1, 2], None, DIM), None, Part.of("t", [[3, 99]], None, DIM)])
    with pytest.raises(shardemb.RowIdError, match=r"row id 99 at position \(0, 1\)") as caught:
        joined.require_rows(ROWS, "t")
    assert caught.value.__notes__ == ["these are the ids of rank 2"]


def test_gradients_and_ids_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="gradients have shape"):
        Part.of("t", [1, 2], np.zeros((3, DIM), np.float32), DIM)
    with pytest.raises(TypeError, match="gradients must be float"):
        Part.of("t", [1], np.zeros((1, DIM), np.int32), DIM)
