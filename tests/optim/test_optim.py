import dataclasses
import json
import math

import numpy as np
import pytest
from support import references

from shardemb import optim
from shardemb.base import serialization
from shardemb.errors import FormatError
from shardemb.optim import SGD, Adagrad, Adam, RowWiseAdagrad

ROWS = 12

OPTIMIZERS = [
    SGD(lr=0.3),
    Adagrad(lr=0.1),
    Adagrad(lr=0.1, lr_decay=0.25, eps=1e-3, initial_accumulator_value=0.5),
    RowWiseAdagrad(lr=0.1),
    RowWiseAdagrad(lr=0.5, eps=0.1),
    Adam(lr=0.01),
    Adam(lr=0.1, betas=(0.5, 0.75), eps=0.01),
]
DIMS = [1, 3, 8, 13, 64]


@pytest.fixture(params=OPTIMIZERS, ids=str)
def optimizer(request):
    return request.param


def hyper(optimizer):
    return serialization.stored_fields(optimizer)


def batches(dim, steps=6, seed=0):
    """Batches with duplicates, rows that come and go, and gradients of many magnitudes."""
    rng = np.random.default_rng([seed, dim])
    for _ in range(steps):
        ids = rng.integers(0, ROWS - 2, 9)
        ids[-1] = ids[0]
        scale = 10.0 ** rng.integers(-4, 2, (9, 1))
        yield ids, (rng.standard_normal((9, dim)) * scale).astype(np.float32)


def start(dim):
    return np.random.default_rng(dim).standard_normal((ROWS, dim)).astype(np.float32)


def reference(formulas, optimizer, weights):
    initial = optimizer.initial_state()
    state = {
        name: np.full((ROWS, width), initial.get(name, 0.0), weights.dtype)
        for name, width in optimizer.state_columns(weights.shape[1]).items()
    }
    return references.Table(formulas[type(optimizer).__name__], weights, state, **hyper(optimizer))


@pytest.fixture
def trained(store, optimizer):
    """Train a real table and a reference on the same batches: ``trained(formulas, real, dim)``."""

    def train(formulas, real, dim):
        weights = start(dim)
        table = store.create_table(
            f"dim{dim}", num_embeddings=ROWS, embedding_dim=dim, initializer=weights, optimizer=optimizer
        )
        model = reference(formulas, optimizer, weights.astype(real))
        for ids, grads in batches(dim):
            table.update(ids, grads)
            model.update(ids, grads)
        return table, model

    return train


def columns(table):
    return table.optimizer.state_columns(table.embedding_dim)


@pytest.mark.parametrize("dim", DIMS)
def test_it_is_the_published_formula(trained, dim):
    table, model = trained(references.PUBLISHED, np.float64, dim)
    np.testing.assert_allclose(table.lookup(range(ROWS)), model.weight(), rtol=2e-6, atol=2e-6)
    for name, width in columns(table).items():
        expected = model.state(name)
        got = table.state(name, range(ROWS)).reshape(ROWS, width)
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dim", DIMS)
def test_it_has_the_bits_that_the_documentation_promises(trained, dim):
    table, model = trained(references.DOCUMENTED, np.float32, dim)
    np.testing.assert_array_equal(bits(table.lookup(range(ROWS))), bits(model.weight()))
    for name in columns(table):
        got = table.state(name, range(ROWS))
        np.testing.assert_array_equal(bits(got), bits(model.state(name)).reshape(got.shape))


def bits(values):
    return np.ascontiguousarray(values, np.float32).view(np.uint32)


def test_rows_outside_the_batch_do_not_move_and_neither_does_their_state(trained):
    table, _ = trained(references.PUBLISHED, np.float64, 3)
    untouched = [ROWS - 2, ROWS - 1]  # `batches` never draws these
    np.testing.assert_array_equal(table.lookup(untouched), start(3)[untouched])
    for name in columns(table):
        np.testing.assert_array_equal(
            table.state(name, untouched), table.optimizer.initial_state().get(name, 0.0)
        )


def test_the_plain_function_of_a_row_gives_the_bits_of_the_kernel(trained, optimizer):
    """So the formula can be read and debugged as Python."""
    dim = 13
    table, _ = trained(references.PUBLISHED, np.float64, dim)
    widths = optimizer.state_columns(dim)
    state = np.zeros((ROWS, sum(widths.values())), np.float32)
    at = 0
    for name, width in widths.items():
        state[:, at : at + width] = optimizer.initial_state().get(name, 0.0)
        at += width
    weights = start(dim)
    for step, (ids, grads) in enumerate(batches(dim), 1):
        scalars = optimizer.scalars_of(step)[0]
        for row in np.unique(ids):
            gradient, *more = grads[ids == row]
            for each in more:
                gradient = gradient + each
            optimizer.row_step(weights[row], state[row], gradient, scalars)
    np.testing.assert_array_equal(bits(table.lookup(range(ROWS))), bits(weights))


def test_a_gradient_that_is_not_finite_has_the_same_effect_as_in_numpy(store, optimizer):
    """There is no exception in the middle of an update, and no other row is affected."""
    table = store.create_table("t", num_embeddings=4, embedding_dim=2, optimizer=optimizer)
    table.update([0, 1, 2], [[np.inf, 1], [np.nan, 1], [1.0, 1]], check_finite=False)
    rows = table.lookup(range(4))
    assert not np.isfinite(rows[0, 0])
    assert np.isnan(rows[1, 0])
    assert np.isfinite(rows[2:]).all()


@pytest.mark.parametrize("place", [0, 1, 8])
def test_an_infinite_gradient_has_the_same_effect_in_every_column(store, place):
    gradient = np.ones((1, 9))
    gradient[0, place] = np.inf
    table = store.create_table("t", num_embeddings=1, embedding_dim=9, optimizer=RowWiseAdagrad())
    table.update([0], gradient, check_finite=False)
    assert table.state("sum", 0) == np.inf
    expected = np.zeros(9)  # lr / inf times a finite gradient
    expected[place] = np.nan
    np.testing.assert_array_equal(table.lookup(0), expected)


def test_adam_with_a_zero_gradient_moves_by_its_moments(store):
    table = store.create_table("t", num_embeddings=1, embedding_dim=1, optimizer=Adam(lr=0.1))
    table.update([0], [[1.0]])
    first = float(table.lookup(0)[0])
    table.update([0], [[0.0]])
    assert first == pytest.approx(-0.1, rel=1e-5)
    assert float(table.lookup(0)[0]) < first


def test_adam_corrects_its_bias_by_the_steps_of_the_table_and_not_of_the_row(store):
    table = store.create_table("t", num_embeddings=2, embedding_dim=1, optimizer=Adam(lr=0.1))
    table.update([0], [[1.0]])
    table.update([1], [[1.0]])
    b1, b2 = 0.9, 0.999
    late = 0.1 * math.sqrt(1 - b2**2) / (1 - b1**2) * (1 - b1) / math.sqrt(1 - b2)
    assert float(table.lookup(1)[0]) == pytest.approx(-late, rel=1e-5)
    assert float(table.lookup(0)[0]) != pytest.approx(-late, rel=1e-2)


def test_the_powers_of_the_betas_are_taken_in_double_precision():
    """In float32, 1 - 0.999**1 is already wrong in its fifth digit."""
    _, _, rate, _ = Adam().scalars(1.0, 1)
    assert rate == pytest.approx(math.sqrt(0.001) / 0.1, rel=1e-12)
    _, _, rate, _ = Adam().scalars(1.0, 10**9)
    assert rate == 1.0


# ---- against torch ----------------------------------------------------------------------------------------------


def torch_optimizers(torch, parameters):
    return [
        (SGD(lr=0.3), torch.optim.SGD(parameters(), lr=0.3)),
        (Adagrad(lr=0.1), torch.optim.Adagrad(parameters(), lr=0.1)),
        (
            Adagrad(lr=0.1, lr_decay=0.25, eps=1e-3, initial_accumulator_value=0.5),
            torch.optim.Adagrad(parameters(), lr=0.1, lr_decay=0.25, eps=1e-3, initial_accumulator_value=0.5),
        ),
        (Adam(lr=0.01), torch.optim.SparseAdam(parameters(), lr=0.01)),
        (
            Adam(lr=0.1, betas=(0.5, 0.75), eps=0.01),
            torch.optim.SparseAdam(parameters(), lr=0.1, betas=(0.5, 0.75), eps=0.01),
        ),
    ]


@pytest.mark.parametrize("which", range(5))
def test_it_agrees_with_torch(store, which):
    torch = pytest.importorskip("torch")
    torch.sparse.check_sparse_tensor_invariants.enable()  # torch warns unless told one way or the other
    dim = 13
    parameter = torch.nn.Parameter(torch.from_numpy(start(dim).copy()))
    ours, theirs = torch_optimizers(torch, lambda: [parameter])[which]
    table = store.create_table(
        "t", num_embeddings=ROWS, embedding_dim=dim, initializer=start(dim), optimizer=ours
    )
    for ids, grads in batches(dim):
        table.update(ids, grads)
        theirs.zero_grad()
        rows = torch.nn.functional.embedding(torch.from_numpy(ids), parameter, sparse=True)
        (rows * torch.from_numpy(grads)).sum().backward()
        theirs.step()
    got = table.lookup(range(ROWS))
    np.testing.assert_allclose(got, parameter.detach().numpy(), rtol=1e-6, atol=1e-6)
    state = theirs.state[parameter]
    for name in columns(table):
        expected = state[name].numpy()
        atol = 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(table.state(name, range(ROWS)), expected, rtol=1e-6, atol=atol)


def test_defaults_are_those_of_torch():
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.zeros(1))
    adagrad = torch.optim.Adagrad([parameter]).defaults
    assert hyper(Adagrad()) == {name: adagrad[name] for name in hyper(Adagrad())}
    adam = torch.optim.SparseAdam([parameter]).defaults
    assert hyper(Adam()) == {name: adam[name] for name in hyper(Adam())}


def test_defaults_are_pinned():
    assert [cls() for cls in optim.OPTIMIZERS.values()] == [
        SGD(lr=0.01),
        Adagrad(lr=0.01, lr_decay=0.0, eps=1e-10, initial_accumulator_value=0.0),
        RowWiseAdagrad(lr=0.01, eps=1e-8),  # FBGEMM's
        Adam(lr=0.001, betas=(0.9, 0.999), eps=1e-8),
        optim.AdamW(
            lr=0.001, betas=(0.9, 0.999), eps=1e-8,
            weight_decay=0.01, decoupled_weight_decay=True, eps_after_correction=True,
        ),
        optim.PartialRowWiseAdam(lr=0.001, betas=(0.9, 0.999), eps=1e-8, eps_after_correction=True),  # FBGEMM's
        optim.AMSGrad(lr=0.001, betas=(0.9, 0.999), eps=1e-8, eps_after_correction=True),
        optim.Adamax(lr=0.002, betas=(0.9, 0.999), eps=1e-8),
        optim.NAdam(lr=0.002, betas=(0.9, 0.999), eps=1e-8, momentum_decay=0.004),
        optim.RMSprop(lr=0.01, alpha=0.99, eps=1e-8, momentum=0.0, centered=False),
        optim.RowWiseRMSprop(lr=0.01, alpha=0.99, eps=1e-8),
        optim.Adadelta(lr=1.0, rho=0.9, eps=1e-6),
        optim.LAMB(lr=0.001, betas=(0.9, 0.999), eps=1e-8),
        optim.PartialRowWiseLAMB(lr=0.001, betas=(0.9, 0.999), eps=1e-8),
        optim.LARS(lr=0.01, momentum=0.9, eta=0.001),
        optim.FTRL(lr=0.001, initial_accumulator_value=0.1),  # Keras'
        optim.Lion(lr=0.001, betas=(0.9, 0.99)),  # Keras'
    ]  # fmt: skip


# ---- what they say about themselves -----------------------------------------------------------------------------


def test_state_columns_have_the_names_of_torch_in_the_order_of_the_record():
    assert SGD().state_columns(5) == {}
    assert Adagrad().state_columns(5) == {"sum": 5}
    assert RowWiseAdagrad().state_columns(5) == {"sum": 1}
    assert list(Adam().state_columns(5).items()) == [("exp_avg", 5), ("exp_avg_sq", 5)]


def test_initial_state_names_only_columns_that_there_are(optimizer):
    assert set(optimizer.initial_state()) <= set(optimizer.state_columns(4))


def test_json_gives_back_the_same_optimizer(optimizer):
    document = json.loads(json.dumps(optim.to_json(optimizer)))
    assert optim.from_json(document) == optimizer
    assert hash(optim.from_json(document)) == hash(optimizer)


def test_json_is_pinned():
    assert json.dumps([optim.to_json(cls()) for cls in (SGD, Adagrad, RowWiseAdagrad, Adam)]) == (
        '[{"name": "SGD", "lr": 0.01}, '
        '{"name": "Adagrad", "lr": 0.01, "lr_decay": 0.0, "eps": 1e-10, "initial_accumulator_value": 0.0}, '
        '{"name": "RowWiseAdagrad", "lr": 0.01, "eps": 1e-08}, '
        '{"name": "Adam", "lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-08}]'
    )


def test_numbers_of_numpy_are_hyper_parameters_like_any_other():
    optimizer = Adam(lr=np.float32(0.5), betas=np.array([0.5, 0.75]), eps=np.float64(0.25))
    assert optimizer == Adam(lr=0.5, betas=(0.5, 0.75), eps=0.25)
    assert repr(optimizer) == "Adam(lr=0.5, betas=(0.5, 0.75), eps=0.25)"
    assert optim.from_json(json.loads(json.dumps(optim.to_json(optimizer)))) == optimizer


def short(value):
    return repr(value)[:40]


NUMBERS = [
    (SGD, "lr"),
    (Adagrad, "lr"),
    (Adagrad, "lr_decay"),
    (Adagrad, "eps"),
    (Adagrad, "initial_accumulator_value"),
    (RowWiseAdagrad, "lr"),
    (RowWiseAdagrad, "eps"),
    (Adam, "lr"),
    (Adam, "eps"),
]


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-0.1, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (1e300, ValueError),  # the rows are float32
        (10**400, ValueError),
        ("0.1", TypeError),
        (None, TypeError),
        (True, TypeError),
        ([0.1], TypeError),
    ],
    ids=short,
)
def test_hyper_parameters_are_checked(cls, name, value, error):
    with pytest.raises(error, match=name):
        cls(**{name: value})


@pytest.mark.parametrize(("cls", "name"), NUMBERS)
def test_zero_is_a_hyper_parameter(cls, name):
    assert getattr(cls(**{name: 0}), name) == 0


@pytest.mark.parametrize(
    "betas",
    [
        (0.9,),
        (0.9, 0.99, 0.999),
        (1.0, 0.9),
        (0.9, 1.0),
        (-0.1, 0.9),
        (math.nan, 0.9),
        0.9,
        ("0.9", 0.9),
        (True, 0.9),
    ],
)
def test_betas_are_checked(betas):
    with pytest.raises((TypeError, ValueError), match="betas"):
        Adam(betas=betas)


def test_optimizers_cannot_be_changed_in_place(optimizer):
    with pytest.raises(dataclasses.FrozenInstanceError):
        optimizer.lr = 0.5


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"name": None},
        {"name": ["SGD"]},
        {"name": "Optimizer"},
        {"name": "Momentum", "lr": 0.1},
        {"name": "SGD", "lr": "fast"},
        {"name": "SGD", "lr": -1},
        {"name": "SGD", "lr": math.nan},
        {"name": "SGD", "lr": 10**400},
        {"name": "SGD", "lr": 0.1, "speed": 0.9},
        {"name": "SGD", "lr": 0.1, "momentum": 1.5},
        {"name": "SGD", "lr": {"name": "CosineDecay", "lr": 0.1}},
        {"name": "SGD", "lr": {"name": "Sudden"}},
        {"name": "Adam", "lr": 0.1, "betas": 0.9, "eps": 0.0},
        {"name": "Adam", "lr": 0.1, "betas": {"0": 0.9, "1": 0.9}, "eps": 0.0},
        {"name": "Adam", "lr": 0.1, "betas": None, "eps": 0.0},
    ],
    ids=short,
)
def test_json_that_is_no_optimizer_is_a_format_error(document):
    with pytest.raises(FormatError, match="optimizer|schedule"):
        optim.from_json(document)


@pytest.mark.parametrize("cls", optim.OPTIMIZERS.values())
def test_a_hyper_parameter_missing_from_json_is_not_made_up(cls):
    for name in serialization.stored_fields(cls()):
        document = optim.to_json(cls())
        del document[name]
        with pytest.raises(FormatError, match="optimizer"):
            optim.from_json(document)
