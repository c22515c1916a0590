"""Embeddings of torch that become tables, train on as they would have, and come back."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402
from shardemb.optim import SGD, Adagrad, Adam, AdamW  # noqa: E402

ROWS, DIM = 30, 4

KINDS = {
    "sparse adam": (torch.optim.SparseAdam, {"lr": 0.05}, True, Adam(lr=0.05)),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}, True, Adagrad(lr=0.1, lr_decay=0.1)),
    "sgd": (torch.optim.SGD, {"lr": 0.1}, True, SGD(lr=0.1)),
    "momentum": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.1},
        False,
        SGD(lr=0.1, momentum=0.9, dampening=0.1, dense_equivalent=True),
    ),
    "adam": (
        torch.optim.Adam,
        {"lr": 0.05},
        False,
        Adam(lr=0.05, eps_after_correction=True, dense_equivalent=True),
    ),
    "adamw": (
        torch.optim.AdamW,
        {"lr": 0.05, "weight_decay": 0.1},
        False,
        AdamW(lr=0.05, weight_decay=0.1, dense_equivalent=True),
    ),
}


def train(module, optimizer, generator, steps=5):
    losses = []
    for _ in range(steps):
        ids = torch.randint(ROWS, (8,), generator=generator)
        target = torch.randn(8, DIM, generator=generator)
        optimizer.zero_grad()
        loss = ((module(ids) - target) ** 2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(("kind", "options", "sparse", "expected"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("steps", [0, 5])
def test_training_goes_on_in_a_table(store, kind, options, sparse, expected, steps):
    torch.manual_seed(1)
    theirs = torch.nn.Embedding(ROWS, DIM, sparse=sparse)
    dense = kind(theirs.parameters(), **options)
    train(theirs, dense, torch.Generator().manual_seed(2), steps)
    ours = shardemb.torch.from_module(theirs, store, "t", optimizer_state=dense)
    assert ours.table.optimizer == expected
    optimizer = shardemb.torch.Optimizer(ours)
    losses = [
        train(*each, torch.Generator().manual_seed(3), 20) for each in ((theirs, dense), (ours, optimizer))
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    back = shardemb.torch.to_module(ours)
    torch.testing.assert_close(back.weight, theirs.weight, rtol=1e-4, atol=1e-5)
    store.commit()


def test_options_come_along_and_back(store):
    theirs = torch.nn.EmbeddingBag(
        ROWS, DIM, max_norm=2.0, norm_type=1.0, mode="sum", include_last_offset=True, padding_idx=3
    ).eval()
    ours = shardemb.torch.from_module(theirs, store, "bags", optimizer=Adam())
    ids, offsets = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2, 4])
    back = shardemb.torch.to_module(ours)
    for each in (ours, back):
        assert not each.training
        torch.testing.assert_close(each(ids, offsets), theirs(ids, offsets))
        assert each.extra_repr().startswith(theirs.extra_repr()) or each is ours
    single = torch.nn.Embedding(ROWS, DIM, padding_idx=3, scale_grad_by_freq=True)
    ours = shardemb.torch.from_module(single, store, "rows", optimizer=Adam(), dtype="bfloat16")
    assert (ours.padding_idx, ours.scale_grad_by_freq, ours.table.dtype) == (3, True, "bfloat16")
    back = shardemb.torch.to_module(ours)
    assert repr(back) == repr(single)
    torch.testing.assert_close(back.weight, single.weight.to(torch.bfloat16).float())


def test_a_module_that_does_not_train_stays_so(store):
    frozen = torch.nn.Embedding(ROWS, DIM).requires_grad_(False)
    ours = shardemb.torch.from_module(frozen, store, "t", optimizer=Adam())
    assert not ours(torch.tensor([1])).requires_grad
    assert not shardemb.torch.to_module(ours).weight.requires_grad
    ours = shardemb.torch.from_module(torch.nn.Embedding(ROWS, DIM), store, "u")
    assert ours.table.optimizer is None
    assert not ours(torch.tensor([1])).requires_grad


def test_what_cannot_be_moved_is_refused_and_leaves_no_table(store):
    module = torch.nn.Embedding(ROWS, DIM)
    trained = torch.optim.Adagrad(module.parameters())
    train(module, trained, torch.Generator().manual_seed(2))
    parameters = list(module.parameters())
    for options, error, match in [
        (
            {"optimizer_state": torch.optim.SGD(torch.nn.Linear(1, 1).parameters())},
            ValueError,
            "does not train",
        ),
        (
            {"optimizer_state": torch.optim.RMSprop(parameters)},
            TypeError,
            "RMSprop of torch.*pass optimizer=",
        ),
        (
            {"optimizer_state": torch.optim.Adam(parameters, amsgrad=True)},
            ValueError,
            "amsgrad.*pass optimizer=",
        ),
        ({"optimizer_state": torch.optim.Adam(parameters, weight_decay=0.1)}, ValueError, "dense_equivalent"),
        ({"optimizer_state": trained, "optimizer": Adam()}, ValueError, "also needs exp_avg, exp_avg_sq"),
    ]:
        with pytest.raises(error, match=match):
            shardemb.torch.from_module(module, store, "t", **options)
        assert "t" not in store
    with pytest.raises(TypeError, match="got Linear"):
        shardemb.torch.from_module(torch.nn.Linear(1, 1), store, "t")
    with pytest.raises(TypeError, match="got Embedding"):
        shardemb.torch.to_module(module)
    store.create_vocabulary("v", key_type="int64")
    keyed = store.create_table("k", vocabulary="v", embedding_dim=2)
    with pytest.raises(TypeError, match=r"used by key.*table\.rows"):
        shardemb.torch.to_module(shardemb.torch.Embedding(keyed))


def test_pretrained_rows(store, tmp_path):
    rows = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    torch.save(torch.from_numpy(rows), tmp_path / "rows.pt")
    given = {
        "tensor": torch.from_numpy(rows),
        "half": torch.from_numpy(rows).to(torch.float64),
        "array": rows,
        "list": rows.tolist(),
        "npy": tmp_path / "rows.npy",
        "pt": str(tmp_path / "rows.pt"),
    }
    for name, each in given.items():
        module = shardemb.torch.from_pretrained(each, store, name)
        torch.testing.assert_close(module(torch.arange(ROWS)), torch.from_numpy(rows))
        assert not module(torch.arange(ROWS)).requires_grad
    module = shardemb.torch.from_pretrained(
        rows, store, "trained", freeze=False, padding_idx=2, max_norm=1.0, optimizer=SGD(lr=1.0)
    )
    assert (module.padding_idx, module.max_norm) == (2, 1.0)
    module(torch.arange(ROWS)).sum().backward()
    shardemb.torch.Optimizer(module).step()
    assert module.table.step == 1


def test_what_are_no_rows_is_refused(store, tmp_path):
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "state.pt")
    for given, options, error, match in [
        (np.zeros((2, 2)), {"freeze": False}, ValueError, "need an optimizer"),
        (np.zeros(2), {}, ValueError, r"two dimensions.*got shape \(2,\)"),
        (tmp_path / "state.pt", {}, ValueError, "no tensor but 'weight'"),
        ("s3://bucket/rows.npy", {}, ValueError, "local disk"),
    ]:
        with pytest.raises(error, match=match):
            shardemb.torch.from_pretrained(given, store, "t", **options)
    assert "t" not in store
