"""All that modules look up in a table before a step is one change of it, equal to that by torch's dense gradients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402
from shardemb.optim import SGD  # noqa: E402
from shardemb.torch import Embedding, EmbeddingBag  # noqa: E402
from shardemb.torch.merging import merged  # noqa: E402

ROWS, DIM = 6, 2
WEIGHT = np.random.default_rng(0).permutation(ROWS * DIM).reshape(ROWS, DIM).astype(np.float32)
"""No ties, so a maximum has one place, also after rounding."""

PADDING = 5


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with shardemb.open(tmp_path_factory.mktemp("torch") / "s.zarr") as store:
        options = {"num_embeddings": ROWS, "embedding_dim": DIM, "optimizer": SGD(lr=1.0), "counters": True}
        store.create_table("plain", **options)
        store.create_table("padded", **options, padding_idx=PADDING)
        words = store.create_vocabulary("words", key_type="string", reserved=1)
        keyed = {"vocabulary": "words", "embedding_dim": DIM, "optimizer": SGD(lr=1.0), "counters": True}
        store.create_table("keyed", **keyed)
        words.add(list("bcdef"))  # row i has the i-th letter, but row 0 has none
        yield store
        store.commit()


@st.composite
def lookups(draw):
    """What one module looks up: its kind, ids in groups, and its options."""
    kind = draw(st.sampled_from(["rows", "sum", "mean", "max"]))
    ids = st.integers(0, ROWS - 1)
    groups = draw(st.lists(st.lists(ids, min_size=int(kind == "max"), max_size=3), max_size=3))
    flat = [each for group in groups for each in group]
    weights = None
    if kind == "sum" and draw(st.booleans()):
        weights = draw(st.lists(st.sampled_from([-1.0, 0.5, 2.0]), min_size=len(flat), max_size=len(flat)))
    padding = draw(st.sampled_from([None, None, 0, 3]))
    return kind, groups, weights, {"padding_idx": padding, "scale_grad_by_freq": draw(st.integers(0, 3)) == 0}


def tensors(groups, weights):
    flat = torch.tensor([each for group in groups for each in group], dtype=torch.long)
    offsets = torch.tensor([0, *np.cumsum([len(each) for each in groups])])
    return flat, offsets, None if weights is None else torch.tensor(weights)


def weighed(tensor, number):
    return (tensor * (number + torch.arange(1.0, 1 + tensor.numel())).reshape(tensor.shape)).sum()


def densely(weight, lookup, padding):
    """The same with torch alone: rows are looked up without padding, and pooled after."""
    kind, groups, weights, options = lookup
    flat, bounds, weights = tensors(groups, weights)
    padding = padding if options["padding_idx"] is None else options["padding_idx"]
    by_freq = options["scale_grad_by_freq"]
    if kind == "rows":
        return functional.embedding(flat, weight, padding_idx=padding, scale_grad_by_freq=by_freq)
    kept = torch.ones_like(flat, dtype=torch.bool) if padding is None else flat != padding
    rows = functional.embedding(flat[kept], weight, scale_grad_by_freq=by_freq)
    before = torch.cat([torch.zeros(1, dtype=torch.long), kept.cumsum(0)])
    return functional.embedding_bag(
        torch.arange(len(rows)),
        rows,
        before[bounds],
        mode=kind,
        include_last_offset=True,
        per_sample_weights=None if weights is None else weights[kept],
    )


def touched(lookup, padding):
    _, groups, _, options = lookup
    padding = padding if options["padding_idx"] is None else options["padding_idx"]
    return {each for group in groups for each in group} - {padding}


def module_for(table, lookup, **how):
    kind, _, _, options = lookup
    if kind == "rows":
        return Embedding(table, **options, **how)
    return EmbeddingBag(table, mode=kind, include_last_offset=True, **options, **how)


def called(module, ids, lookup):
    kind, groups, weights, _ = lookup
    _, bounds, weights = tensors(groups, weights)
    return module(ids) if kind == "rows" else module(ids, bounds, weights)


@settings(max_examples=150)
@given(st.lists(lookups(), min_size=1, max_size=4), st.booleans())
def test_a_step_is_that_of_dense_gradients(store, some, padded):
    table, padding = (store["padded"], PADDING) if padded else (store["plain"], None)
    if padded:  # then it is the padding of all modules
        some = [(*each[:3], each[3] | {"padding_idx": None}) for each in some]
    table.write(np.arange(ROWS), WEIGHT)
    before, step = table.state("count", np.arange(ROWS)), table.step
    weight = torch.from_numpy(WEIGHT.copy()).requires_grad_()
    modules = [module_for(table, each) for each in some]
    for number, (module, each) in enumerate(zip(modules, some, strict=True)):
        expected = densely(weight, each, padding)
        found = called(module, tensors(*each[1:3])[0], each)
        np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-6)
        weighed(expected, number).backward()
        weighed(found, number).backward()
    shardemb.torch.Optimizer(modules).step()
    gradient = torch.zeros(ROWS, DIM) if weight.grad is None else weight.grad
    np.testing.assert_allclose(table[:], (weight - gradient).detach(), rtol=1e-5, atol=1e-4)
    # One step, of the rows that are not padding.
    assert table.step == step + 1
    rows = set().union(*(touched(each, padding) for each in some))
    assert set(np.flatnonzero(table.state("count", np.arange(ROWS)) - before)) == rows - {padding}


@settings(max_examples=100)
@given(st.lists(lookups(), min_size=1, max_size=4), st.sampled_from(["zeros", 0, 2]))
def test_a_step_by_key_is_that_of_dense_gradients(store, some, missing):
    """Key "a" has no row: it is looked up as zeros, or as the row of that id."""
    table = store["keyed"]
    table.rows.write(np.arange(ROWS), WEIGHT)
    letters = np.array(list("abcdef"), dtype=object)
    padding_keys = {None: None, 0: "b", 3: "d"}
    weight = torch.from_numpy(WEIGHT.copy()).requires_grad_()
    modules = []
    for number, (kind, groups, weights, options) in enumerate(some):
        keyed = options | {"padding_idx": padding_keys[options["padding_idx"]]}
        by_row = options | {"padding_idx": {None: None, 0: 1, 3: 3}[options["padding_idx"]]}
        # As ids: 0 is the key without a row, whose row is one of zeros, or another one.
        shown = weight.clone()
        if missing == "zeros":
            shown = torch.cat([torch.zeros(1, DIM), weight[1:]])
        elif missing:
            shown = torch.cat([weight[missing : missing + 1], weight[1:]])
        modules.append(module_for(table, (kind, groups, weights, keyed), missing=missing))
        ids = tensors(groups, weights)[0]
        found = called(modules[-1], letters[ids.numpy()], (kind, groups, weights, keyed))
        expected = densely(shown, (kind, groups, weights, by_row), None)
        np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-6)
        weighed(expected, number).backward()
        weighed(found, number).backward()
    if any(each[3]["scale_grad_by_freq"] for each in some) and missing:
        return  # keys of one row are counted apart
    shardemb.torch.Optimizer(modules).step()
    gradient = torch.zeros(ROWS, DIM) if weight.grad is None else weight.grad
    np.testing.assert_allclose(table.rows[:ROWS], (weight - gradient).detach(), rtol=1e-5, atol=1e-4)


def lookup_of(module, *given):
    module(*given).sum().backward()
    return module.take_pending()


IDS, BAGS = torch.tensor([1, 2]), torch.tensor([[1, 2], [3, 4]])


def batch_of(lookups):
    (step,) = merged(lookups)
    (batch,) = step.batches.values()
    return batch


def test_one_lookup_is_handed_on_as_it_is(store):
    module = Embedding(store["plain"])
    (lookup,) = lookup_of(module, IDS)
    ids, gradients = batch_of([lookup])
    assert np.shares_memory(ids, lookup.ids)
    assert np.shares_memory(gradients, lookup.leaf.grad.numpy())
    (lookup,) = lookup_of(EmbeddingBag(store["plain"]), BAGS)
    bags, gradients = batch_of([lookup])
    assert bags is lookup.ids
    assert np.shares_memory(gradients, lookup.leaf.grad.numpy())


def test_rows_stay_rows_and_bags_of_one_form_stay_bags(store):
    rows, mean = Embedding(store["plain"]), EmbeddingBag(store["plain"])
    ids, _ = batch_of([*lookup_of(rows, IDS), *lookup_of(rows, IDS[:1])])
    assert ids.tolist() == [1, 2, 1]
    bags, gradients = batch_of([*lookup_of(mean, BAGS), *lookup_of(mean, IDS, torch.tensor([0, 1]))])
    assert (bags.mode, bags.ids.tolist()) == ("mean", [1, 2, 3, 4, 1, 2])
    assert bags.offsets.tolist() == [0, 2, 4, 5, 6]
    assert gradients.shape == (4, DIM)


def test_what_is_mixed_is_no_larger_than_its_bags(store):
    mean, total = EmbeddingBag(store["plain"]), EmbeddingBag(store["plain"], mode="sum")
    bags, gradients = batch_of([*lookup_of(mean, BAGS), *lookup_of(total, BAGS)])
    assert bags.mode == "sum"
    assert bags.weights is None
    assert gradients.tolist() == [[0.5] * DIM] * 2 + [[1] * DIM] * 2


def test_gradients_are_added_in_the_order_of_forward(store):
    module = Embedding(store["plain"])
    first, second = module(IDS), module(IDS + 1)
    second.sum().backward()
    first.sum().backward()
    ids, _ = batch_of(module.take_pending())
    assert ids.tolist() == [1, 2, 2, 3]


def test_tables_of_one_store_are_one_step(store, tmp_path):
    with shardemb.open(tmp_path / "other.zarr") as other:
        more = other.create_table("plain", num_embeddings=ROWS, embedding_dim=DIM, optimizer=SGD(lr=1.0))
        modules = [Embedding(store["plain"]), Embedding(more), EmbeddingBag(store["padded"])]
        pending = [lookup for module in modules for lookup in lookup_of(module, BAGS)]
        steps = merged(pending)
        assert [(step.store, list(step.batches)) for step in steps] == [
            (store, ["plain", "padded"]),
            (other, ["plain"]),
        ]
        other.commit()


def test_modules_agree_about_keys_without_a_row(store):
    keyed = store["keyed"]
    pending = [lookup for how in (0, "zeros") for lookup in lookup_of(Embedding(keyed, missing=how), ["b"])]
    with pytest.raises(ValueError, match="differ in what becomes of keys without a row"):
        merged(pending)
    step = merged(lookup_of(Embedding(keyed, missing="initial"), ["b"]))[0]
    assert step.missing == {"keyed": "skip"}
