"""Each optimizer against those of torch, Keras and FBGEMM, with the options that make it theirs.

All of them compute in float32, in orders of their own, so a few units in the last place differ in each step.
"""

import numpy as np
import pytest

from shardemb import optim
from shardemb.optim import (
    FTRL,
    LAMB,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    AMSGrad,
    Lion,
    NAdam,
    RMSprop,
    RowWiseAdagrad,
)  # fmt: skip

ROWS, DIM, STEPS = 12, 12, 8


def start():
    return np.random.default_rng(1).standard_normal((ROWS, DIM)).astype(np.float32)


def batches(every_row):
    """Ids and gradients. `every_row`: all of them, as a dense optimizer expects."""
    rng = np.random.default_rng(2)
    for _ in range(STEPS):
        ids = rng.permutation(ROWS) if every_row else rng.integers(0, ROWS, 9)
        yield ids, rng.standard_normal((ids.size, DIM)).astype(np.float32)


def trained(store, optimizer, every_row):
    table = store.create_table(
        "t", num_embeddings=ROWS, embedding_dim=DIM, initializer=start(), optimizer=optimizer
    )
    for ids, grads in batches(every_row):
        table.update(ids, grads)
    return table


def dense(ids, grads):
    gradient = np.zeros((ROWS, DIM), np.float32)
    np.add.at(gradient, ids, grads)
    return gradient


TORCH = [
    (SGD(lr=0.1, momentum=0.9, dampening=0.5), "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    (
        SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, maximize=True),
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ),
    (
        Adagrad(lr=0.1, lr_decay=0.1, weight_decay=0.1),
        "Adagrad",
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1},
    ),
    (Adam(lr=0.1, eps_after_correction=True), "Adam", {"lr": 0.1}),
    (
        Adam(lr=0.1, eps=1e-2, eps_after_correction=True, weight_decay=0.1, maximize=True),
        "Adam",
        {"lr": 0.1, "eps": 1e-2, "weight_decay": 0.1, "maximize": True},
    ),
    (AdamW(lr=0.1), "AdamW", {"lr": 0.1}),
    (AMSGrad(lr=0.1), "Adam", {"lr": 0.1, "amsgrad": True}),
    (Adamax(lr=0.1, eps=1e-2), "Adamax", {"lr": 0.1, "eps": 1e-2}),
    (NAdam(lr=0.1), "NAdam", {"lr": 0.1}),
    (
        NAdam(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
        "NAdam",
        {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    (RMSprop(lr=0.1), "RMSprop", {"lr": 0.1}),
    (
        RMSprop(lr=0.1, momentum=0.9, centered=True, eps=1e-2),
        "RMSprop",
        {"lr": 0.1, "momentum": 0.9, "centered": True, "eps": 1e-2},
    ),
    (Adadelta(weight_decay=0.1), "Adadelta", {"weight_decay": 0.1}),
]


@pytest.mark.parametrize(("ours", "name", "options"), TORCH, ids=str)
def test_it_is_that_of_torch_with_dense_gradients(store, ours, name, options):
    torch = pytest.importorskip("torch")
    table = trained(store, ours, every_row=True)
    parameter = torch.nn.Parameter(torch.from_numpy(start()))
    theirs = getattr(torch.optim, name)([parameter], **options)
    for ids, grads in batches(every_row=True):
        parameter.grad = torch.from_numpy(dense(ids, grads))
        theirs.step()
    np.testing.assert_allclose(table.lookup(range(ROWS)), parameter.detach().numpy(), rtol=1e-5, atol=2e-6)
    for column in ours.state_columns(DIM):
        expected = theirs.state[parameter][column].numpy()
        atol = 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(table.state(column, range(ROWS)), expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("decoupled", [False, True])
def test_rowwise_adagrad_is_that_of_a_plain_loop_in_torch(store, decoupled):
    torch = pytest.importorskip("torch")
    table = trained(
        store, RowWiseAdagrad(lr=0.1, weight_decay=0.1, decoupled_weight_decay=decoupled), every_row=True
    )
    weight, total = torch.from_numpy(start()), torch.zeros(ROWS)
    for ids, grads in batches(every_row=True):
        g = torch.from_numpy(dense(ids, grads))
        if decoupled:
            weight = weight * (1 - 0.1 * 0.1)
        else:
            g = g + 0.1 * weight
        total = total + g.square().mean(dim=1)
        weight = weight - 0.1 / (total.sqrt() + 1e-8)[:, None] * g
    np.testing.assert_allclose(table.lookup(range(ROWS)), weight.numpy(), rtol=1e-5, atol=2e-6)


KERAS = [
    (SGD(lr=0.1, momentum=0.9, lr_in_momentum=True), "SGD", {"momentum": 0.9}),
    (
        SGD(lr=0.1, momentum=0.9, nesterov=True, lr_in_momentum=True),
        "SGD",
        {"momentum": 0.9, "nesterov": True},
    ),
    (Adagrad(lr=0.1, eps=1e-7, initial_accumulator_value=0.1, eps_inside_root=True), "Adagrad", {}),
    (Adam(lr=0.1, eps=1e-7), "Adam", {}),
    (Adam(lr=0.1, eps=1e-7, weight_decay=0.1, decoupled_weight_decay=True), "Adam", {"weight_decay": 0.1}),
    (Adam(lr=0.1, eps=1e-7, clip_norm=0.5), "Adam", {"clipnorm": 0.5}),
    (Adam(lr=0.1, eps=1e-7, clip_value=0.5), "Adam", {"clipvalue": 0.5}),
    (AMSGrad(lr=0.1, eps=1e-7, eps_after_correction=False), "Adam", {"amsgrad": True}),
    (Adamax(lr=0.1, eps=1e-7, eps_outside_maximum=True), "Adamax", {}),
    (NAdam(lr=0.1, eps=1e-7, momentum_decay=1.0), "Nadam", {}),
    (RMSprop(lr=0.1, alpha=0.9, eps=1e-7, eps_inside_root=True), "RMSprop", {}),
    (
        RMSprop(lr=0.1, alpha=0.9, eps=1e-7, eps_inside_root=True, momentum=0.9, centered=True, lr_in_momentum=True),
        "RMSprop",
        {"momentum": 0.9, "centered": True},
    ),
    (Adadelta(lr=0.1, rho=0.95, eps=1e-7), "Adadelta", {}),
    (LAMB(lr=0.1, eps=1e-7), "Lamb", {}),
    (FTRL(lr=0.1), "Ftrl", {}),
    (
        FTRL(lr=0.1, l1_strength=0.1, l2_strength=0.1, l2_shrinkage=0.1, beta=0.5),
        "Ftrl",
        {
            "l1_regularization_strength": 0.1,
            "l2_regularization_strength": 0.1,
            "l2_shrinkage_regularization_strength": 0.1,
            "beta": 0.5,
        },
    ),
    (Lion(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True), "Lion", {"weight_decay": 0.1}),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::Warning")  # of other people's code
@pytest.mark.parametrize(("ours", "name", "options"), KERAS, ids=str)
def test_it_is_that_of_keras(store, monkeypatch, ours, name, options):
    """One variable for each row, because Keras clips and scales by the norm of a variable."""
    pytest.importorskip("torch")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    table = trained(store, ours, every_row=True)
    variables = [keras.Variable(row) for row in start()]
    theirs = getattr(keras.optimizers, name)(learning_rate=0.1, **options)
    theirs.build(variables)
    for ids, grads in batches(every_row=True):
        theirs.apply(list(map(keras.ops.convert_to_tensor, dense(ids, grads))), variables)
    expected = np.stack([each.numpy() for each in variables])
    np.testing.assert_allclose(table.lookup(range(ROWS)), expected, rtol=2e-5, atol=5e-6)


FBGEMM = [
    (SGD(lr=0.1), "EXACT_SGD", {}),
    (Adagrad(lr=0.1, eps=1e-3), "EXACT_ADAGRAD", {"eps": 1e-3}),
    # The optimizers that it has for the CPU.
    (RowWiseAdagrad(lr=0.1, eps=1e-3), "EXACT_ROWWISE_ADAGRAD", {"eps": 1e-3}),
    (RowWiseAdagrad(lr=0.1, weight_decay=0.1), "EXACT_ROWWISE_ADAGRAD", {"weight_decay": 0.1, "decay": "L2"}),
    (
        RowWiseAdagrad(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
        "EXACT_ROWWISE_ADAGRAD",
        {"weight_decay": 0.1, "decay": "DECOUPLE"},
    ),
]


@pytest.mark.filterwarnings("ignore::Warning")  # of other people's code
@pytest.mark.parametrize(("ours", "name", "options"), FBGEMM, ids=str)
def test_it_is_that_of_fbgemm(store, ours, name, options):
    torch = pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")
    from fbgemm_gpu import split_table_batched_embeddings_ops_common as common
    from fbgemm_gpu import split_table_batched_embeddings_ops_training as training
    from fbgemm_gpu.split_embedding_configs import EmbOptimType

    options = dict(options)
    decay = getattr(training.WeightDecayMode, options.pop("decay", "NONE"))
    theirs = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, DIM, common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)],
        optimizer=getattr(EmbOptimType, name),
        learning_rate=0.1,
        weight_decay_mode=decay,
        pooling_mode=common.PoolingMode.NONE,
        **options,
    )
    theirs.split_embedding_weights()[0].data.copy_(torch.from_numpy(start()))
    for ids, grads in batches(every_row=False):
        rows = theirs(torch.from_numpy(ids), torch.arange(ids.size + 1))
        rows.backward(torch.from_numpy(grads))
    table = trained(store, ours, every_row=False)
    expected = theirs.split_embedding_weights()[0].detach().numpy()
    np.testing.assert_allclose(table.lookup(range(ROWS)), expected, rtol=2e-5, atol=5e-6)


def test_every_optimizer_is_compared_with_somebody():
    compared = {type(ours) for ours, *_ in [*TORCH, *KERAS, *FBGEMM]}
    # FBGEMM has these on the GPU only; `test_every_optimizer` has their formulas.
    elsewhere = {optim.PartialRowWiseAdam, optim.PartialRowWiseLAMB, optim.LARS, optim.RowWiseRMSprop}
    assert compared | elsewhere == set(optim.OPTIMIZERS.values())
