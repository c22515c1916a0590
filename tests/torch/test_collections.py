"""Collections of features: what they return and how they train, against `torch.nn`; batches as TorchRec has them."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402
from shardemb.optim import SGD  # noqa: E402
from shardemb.torch import EmbeddingBagCollection, EmbeddingCollection  # noqa: E402

ROWS = 6
DIMS = {"users": 3, "items": 2}
FEATURES = {"seen": "items", "user": "users", "bought": "items"}
WEIGHTS = {
    name: np.random.default_rng(dim).normal(size=(ROWS, dim)).astype(np.float32) for name, dim in DIMS.items()
}


class KeyedJagged:
    """The part of TorchRec's ``KeyedJaggedTensor`` that collections read: groups by feature, then by sample."""

    def __init__(self, features, weights=None):
        self.features = features
        self.weights = weights

    def keys(self):
        return list(self.features)

    def _groups(self, features):
        return [torch.as_tensor(group) for groups in features.values() for group in groups]

    def values(self):
        return torch.cat([torch.zeros(0, dtype=torch.long), *self._groups(self.features)]).long()

    def lengths(self):
        return torch.tensor([len(group) for groups in self.features.values() for group in groups])

    def offsets(self):
        return torch.cat([torch.zeros(1, dtype=torch.long), self.lengths().cumsum(0)])

    def stride(self):
        return len(next(iter(self.features.values())))

    def weights_or_none(self):
        return self.weights


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with shardemb.open(tmp_path_factory.mktemp("torch") / "s.zarr") as store:
        for name, dim in DIMS.items():
            store.create_table(name, num_embeddings=ROWS, embedding_dim=dim, optimizer=SGD(lr=1.0))
        yield store
        store.commit()


@pytest.fixture
def tables(store):
    """The tables, with their first values."""
    return reset(store)


def reset(store):
    for name, weight in WEIGHTS.items():
        store[name].write(np.arange(ROWS), weight)
    return [store[name] for name in DIMS]


def theirs(mode="sum"):
    return {
        name: nn.EmbeddingBag(ROWS, dim, mode=mode, _weight=torch.from_numpy(WEIGHTS[name].copy()))
        for name, dim in DIMS.items()
    }


def split(groups):
    flat = torch.tensor([each for group in groups for each in group], dtype=torch.long)
    return flat, torch.tensor([0, *np.cumsum([len(group) for group in groups])][:-1])


def weighed(tensor):
    return (tensor * torch.arange(1.0, 1 + tensor.numel()).reshape(tensor.shape)).sum()


GROUPS = st.lists(st.lists(st.integers(0, ROWS - 1), max_size=3), min_size=3, max_size=3)
BATCHES = st.fixed_dictionaries(dict.fromkeys(FEATURES, GROUPS))


@settings(max_examples=40)
@given(BATCHES, st.sampled_from(["sum", "mean", "max"]), st.booleans(), st.booleans())
def test_pooled_features_are_those_of_torch(store, batch, mode, keyed_jagged, weighted):
    weights = None
    weighted = weighted and mode == "sum" and keyed_jagged
    given = KeyedJagged(batch) if keyed_jagged else {name: split(groups) for name, groups in batch.items()}
    if weighted:
        weights = torch.linspace(-1, 2, given.values().numel()).requires_grad_()
        given.weights = weights
    inner = theirs(mode)
    starts = np.cumsum([0, *(sum(map(len, groups)) for groups in batch.values())])
    own = dict.fromkeys(batch)
    if weighted:
        pairs = itertools.pairwise(starts)
        learned = weights.detach().clone().requires_grad_()
        own = {name: learned[a:b] for name, (a, b) in zip(batch, pairs, strict=True)}
    expected = {name: inner[of](*split(batch[name]), own[name]) for name, of in FEATURES.items()}
    weighed(torch.cat(list(expected.values()), dim=1)).backward()

    outer = EmbeddingBagCollection(reset(store), FEATURES, mode=mode, is_weighted=weighted)
    found = outer(given)
    assert found.keys() == list(FEATURES) == list(found.to_dict())
    assert found.length_per_key() == [2, 3, 2]
    for name, each in expected.items():
        np.testing.assert_allclose(found[name].detach(), each.detach(), rtol=1e-5, atol=1e-6)
    weighed(found.values()).backward()
    if weighted:
        np.testing.assert_allclose(weights.grad, learned.grad, rtol=1e-5, atol=1e-5)
    steps = [store[name].step for name in DIMS]
    shardemb.torch.Optimizer(outer).step()
    assert [store[name].step for name in DIMS] == [step + 1 for step in steps]
    for name, module in inner.items():
        after = (module.weight - module.weight.grad).detach()
        np.testing.assert_allclose(store[name][:], after, rtol=1e-5, atol=1e-5)


@settings(max_examples=20)
@given(BATCHES, st.booleans())
def test_rows_of_features_are_those_of_torch(store, batch, keyed_jagged):
    given = KeyedJagged(batch) if keyed_jagged else {name: split(groups) for name, groups in batch.items()}
    outer = EmbeddingCollection(reset(store), FEATURES)
    found = outer(given)
    assert list(found) == list(FEATURES)
    expected = {name: torch.from_numpy(weight.copy()).requires_grad_() for name, weight in WEIGHTS.items()}
    loss = torch.zeros(())
    for name, of in FEATURES.items():
        ids, offsets = split(batch[name])
        assert torch.equal(found[name].values(), expected[of][ids])
        assert torch.equal(found[name].offsets()[:-1], offsets)
        assert found[name].lengths().tolist() == [len(group) for group in batch[name]]
        loss = loss + weighed(expected[of][ids])
    loss.backward()
    sum(weighed(each.values()) for each in found.values()).backward()
    shardemb.torch.Optimizer(outer).step()
    for name, weight in expected.items():
        np.testing.assert_allclose(store[name][:], (weight - weight.grad).detach(), rtol=1e-5, atol=1e-5)


def test_features_are_given_in_many_forms(tables):
    collection = EmbeddingBagCollection(tables, FEATURES)
    flat, offsets = torch.tensor([1, 2, 3]), torch.tensor([0, 2])
    jagged = shardemb.torch.JaggedTensor(flat, torch.tensor([0, 2, 3]))
    one = collection(
        {"user": torch.tensor([4, 5]), "seen": (flat, offsets), "bought": torch.tensor([[1, 2], [3, 3]])}
    )
    other = collection({"user": torch.tensor([[4], [5]]), "seen": jagged, "bought": jagged, "more": None})
    assert torch.equal(one["user"], torch.from_numpy(WEIGHTS["users"][[4, 5]]))
    assert torch.equal(one["user"], other["user"])
    assert torch.equal(one["seen"], other["seen"])
    assert torch.equal(one["bought"][0], other["bought"][0])
    assert torch.equal(one["bought"][1], 2 * other["bought"][1])


def test_tables_have_names_and_modes(tables):
    named = {"a": tables[0], "b": tables[1]}
    collection = EmbeddingBagCollection(named, mode={"a": "mean"})
    pooled = collection({"a": torch.tensor([[1, 2]]), "b": torch.tensor([[1, 2]])})
    np.testing.assert_allclose(pooled["a"][0].detach(), WEIGHTS["users"][[1, 2]].mean(0), rtol=1e-6)
    np.testing.assert_allclose(pooled["b"][0].detach(), WEIGHTS["items"][[1, 2]].sum(0), rtol=1e-6)
    assert collection.named_tables() == named
    assert repr(collection) == "EmbeddingBagCollection(\n  a: 6, 3, for a\n  b: 6, 2, for b\n)"
    assert list(collection.parameters()) == []


def test_tables_may_be_in_several_stores(tables, tmp_path):
    with shardemb.open(tmp_path / "other.zarr") as other:
        more = other.create_table("users", num_embeddings=ROWS, embedding_dim=1, optimizer=SGD(lr=1.0))
        collection = EmbeddingBagCollection({"here": tables[0], "there": more})
        ids = torch.tensor([[1]])
        collection({"here": ids, "there": ids}).values().sum().backward()
        shardemb.torch.Optimizer(collection).step()
        assert more.lookup(1) == [-1]
        assert np.array_equal(tables[0].lookup(1), WEIGHTS["users"][1] - 1)
        other.commit()


def test_some_tables_may_be_used_by_key(tables, store):
    store.create_vocabulary("words", key_type="string")
    words = store.create_table("words", vocabulary="words", embedding_dim=2, optimizer=SGD(lr=1.0))
    for kind in (EmbeddingBagCollection, EmbeddingCollection):
        collection = kind([tables[0], words], missing="zeros", create=True)
        collection({"users": torch.tensor([1]), "words": (["to", "be"], [0])})
        assert list(words) == ["to", "be"]
        collection.eval()({"users": torch.tensor([1]), "words": [["or"]]})
        assert list(words) == ["to", "be"]
    loss = EmbeddingBagCollection([words])({"words": [["to", "be"]]}).values().sum()
    loss.backward()


def test_nothing_is_remembered_in_evaluation(tables):
    batch = dict.fromkeys(FEATURES, torch.tensor([[1]]))
    assert not EmbeddingBagCollection(tables, FEATURES).eval()(batch).values().requires_grad
    assert not EmbeddingCollection(tables, FEATURES).eval()(batch)["seen"].values().requires_grad


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # within the compiler
def test_a_model_around_it_compiles(tables):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.bags, self.linear = EmbeddingBagCollection(tables, FEATURES), nn.Linear(7, 1)

        def forward(self, features):
            return self.linear(self.bags(features).values()).relu()

    model, batch = Model(), dict.fromkeys(FEATURES, torch.tensor([[1, 2]]))
    assert torch.equal(torch.compile(model, backend="eager")(batch), model(batch))
    torch._dynamo.reset()


IDS = torch.tensor([[1]])


@pytest.mark.parametrize(
    ("error", "message", "batch"),
    [
        (TypeError, "pass a dict of features or a KeyedJaggedTensor, got Tensor", IDS),
        (KeyError, "the batch has no feature 'bought'; it has", {"user": IDS, "seen": IDS}),
        (ValueError, "must have as many bags", {"user": IDS, "seen": IDS, "bought": torch.ones(2, 1).long()}),
        (
            ValueError,
            "feature 'user': pass ids of one dimension",
            {"user": IDS[None], "seen": IDS, "bought": IDS},
        ),
        (
            ValueError,
            "ids and offsets must have one dimension",
            {"user": (IDS, IDS), "seen": IDS, "bought": IDS},
        ),
        (IndexError, "row id 6 at position 0 is past", {"user": IDS + 5, "seen": IDS, "bought": IDS}),
    ],
)
def test_batches_that_do_not_fit_are_refused(tables, error, message, batch):
    with pytest.raises(error, match=message):
        EmbeddingBagCollection(tables, FEATURES)(batch)


def test_batch_sizes_may_not_vary_by_feature(tables):
    batch = KeyedJagged({"seen": [[1]], "user": [[1], [2]], "bought": [[1]]})
    with pytest.raises(ValueError, match="of 3 features and stride 1 must have 3 lengths, got 4"):
        EmbeddingBagCollection(tables, FEATURES)(batch)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("features name the tables", {"features": {"user": "people"}}),
        ('must be "sum", "mean" or "max"', {"mode": "sqrtn"}),
        ('of weighted bags must be "sum"', {"mode": "mean", "is_weighted": True}),
    ],
)
def test_what_is_no_collection_is_refused(tables, message, options):
    with pytest.raises(ValueError, match=message):
        EmbeddingBagCollection(tables, **options)


def test_a_table_is_named_once(tables):
    with pytest.raises(ValueError, match="a table occurs twice"):
        EmbeddingCollection({"a": tables[0], "b": tables[0]})
    with pytest.raises(ValueError, match="a table occurs twice"):
        EmbeddingCollection([tables[0], tables[0]])


def test_weights_are_needed_where_bags_are_weighted(tables):
    with pytest.raises(ValueError, match="the batch has no weights"):
        EmbeddingBagCollection(tables, FEATURES, is_weighted=True)(dict.fromkeys(FEATURES, IDS))
    weighted = (torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([1.0, 2.0]))
    pooled = EmbeddingBagCollection(tables[:1], is_weighted=True)({"users": weighted})
    np.testing.assert_allclose(
        pooled.values()[0].detach(), WEIGHTS["users"][1] + 2 * WEIGHTS["users"][2], rtol=1e-5
    )
