"""The modules for torch train a distributed table as they train a local one: the same bits, clipped and scaled too."""

import numpy as np
import pytest

import shardemb
from shardemb import optim
from shardemb.initializers import Uniform

torch = pytest.importorskip("torch")
modules_for_torch = pytest.importorskip("shardemb.torch")

ROWS, DIM = 60, 4


@pytest.fixture
def both(new_store, tmp_path):
    """The same tables in a distributed store and in a local one."""
    with shardemb.open(tmp_path / "local.zarr") as local:
        stores = new_store(), local
        for store in stores:
            for name in ("a", "b"):
                store.create_table(
                    name,
                    num_embeddings=ROWS,
                    embedding_dim=DIM,
                    initializer=Uniform(-1, 1, seed=2),
                    optimizer=optim.Adam(lr=0.1),
                )
        yield stores
        local.rollback()


def assert_same(stores):
    distributed, local = stores
    for name in local:
        assert distributed[name].step == local[name].step
        assert distributed[name].lookup(range(ROWS)).tobytes() == local[name].lookup(range(ROWS)).tobytes()


def trained(store, modules, forward, *, steps=4, max_norm=None):
    """Train modules of a store on the same batches; return the losses."""
    generator, found = np.random.default_rng(1), []
    model = torch.nn.ModuleDict(modules)
    optimizer = modules_for_torch.Optimizer(model)
    for _ in range(steps):
        ids = torch.from_numpy(np.minimum(generator.geometric(0.1, (8, 5)), ROWS) - 1)
        loss = forward(model, ids).square().sum()
        loss.backward()
        if max_norm is not None:
            found.append(float(modules_for_torch.clip_grad_norm_(model, max_norm)))
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_rows_by_id(both, max_norm):
    losses = [
        trained(
            store,
            {"e": modules_for_torch.Embedding(store["a"])},
            lambda model, ids: model["e"](ids),
            max_norm=max_norm,
        )
        for store in both
    ]
    assert losses[0] == losses[1]
    assert_same(both)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(both, mode):
    losses = [
        trained(
            store,
            {"e": modules_for_torch.EmbeddingBag(store["a"], mode=mode)},
            lambda model, ids: model["e"](ids),
        )
        for store in both
    ]
    assert losses[0] == losses[1]
    assert_same(both)


def test_weighted_bags(both):
    def forward(model, ids):
        weights = torch.linspace(0.5, 1.5, ids.numel()).reshape(ids.shape).requires_grad_()
        return model["e"](ids, per_sample_weights=weights)

    losses = [
        trained(store, {"e": modules_for_torch.EmbeddingBag(store["a"], mode="sum")}, forward)
        for store in both
    ]
    assert losses[0] == losses[1]
    assert_same(both)


def test_collections_of_several_tables(both):
    def forward(model, ids):
        pooled = model["e"]({"a": ids, "b": ids.flip(0)})
        return pooled["a"] * pooled["b"]

    losses = [
        trained(
            store,
            {"e": modules_for_torch.EmbeddingBagCollection([store["a"], store["b"]])},
            forward,
            max_norm=1.0,
        )
        for store in both
    ]
    assert losses[0] == losses[1]
    assert_same(both)
    for store in both:
        store.commit(step=4)


def test_a_model_goes_on_from_a_commit(both):
    distributed = both[0]
    model = torch.nn.ModuleDict({"e": modules_for_torch.Embedding(distributed["a"])})
    rows = modules_for_torch.Optimizer(model)
    model["e"](torch.tensor([1, 2])).sum().backward()
    rows.step()
    before = distributed["a"].lookup([1, 2])
    distributed.commit(step=1)
    model["e"](torch.tensor([1, 2])).sum().backward()
    rows.step()
    distributed.rollback()
    np.testing.assert_array_equal(distributed["a"].lookup([1, 2]), before)
