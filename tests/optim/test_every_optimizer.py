"""Each optimizer with each of its options against its formula in float64, as published."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import references

import shardemb
from shardemb import optim
from shardemb.errors import FormatError, LearningRateError
from shardemb.optim import (
    FTRL,
    LAMB,
    LARS,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    AMSGrad,
    Lion,
    NAdam,
    PartialRowWiseAdam,
    PartialRowWiseLAMB,
    RMSprop,
    RowWiseAdagrad,
    RowWiseRMSprop,
    schedules,
)  # fmt: skip

ROWS, DIM = 12, 13

PLAIN = [
    SGD(lr=0.3, momentum=0.9),
    SGD(lr=0.3, momentum=0.9, dampening=0.25),
    SGD(lr=0.3, momentum=0.5, nesterov=True),
    SGD(lr=0.3, momentum=0.5, nesterov=True, lr_in_momentum=True),
    SGD(lr=schedules.StepDecay(0.3, 2, 0.5), momentum=0.9, lr_in_momentum=True),
    LARS(lr=0.3),
    LARS(lr=0.3, eta=0.1, weight_decay=0.1),
    LARS(lr=0.3, eta=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    Adagrad(lr=0.1, eps=1e-7, initial_accumulator_value=0.1, eps_inside_root=True),
    RowWiseAdagrad(lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5, eps_inside_root=True),
    RowWiseAdagrad(lr=0.1, weight_decay=0.1),
    RowWiseAdagrad(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True),
    Adam(lr=0.01, eps=1e-3, eps_after_correction=True),
    Adam(lr=0.01, rowwise_bias_correction=True),
    Adam(lr=schedules.LinearWarmup(0.1, 4), betas=(0.5, 0.75), rowwise_bias_correction=True),
    AdamW(lr=0.01, weight_decay=0.5),
    PartialRowWiseAdam(lr=0.01),
    PartialRowWiseAdam(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True, rowwise_bias_correction=True),
    AMSGrad(lr=0.01, betas=(0.5, 0.5)),
    Adamax(lr=0.01),
    Adamax(lr=0.01, eps=1e-2),
    Adamax(lr=0.01, eps=1e-2, eps_outside_maximum=True, rowwise_bias_correction=True),
    NAdam(lr=0.01),
    NAdam(lr=0.01, momentum_decay=1.0, rowwise_bias_correction=True),
    NAdam(lr=0.01, betas=(0.0, 0.9)),
    RMSprop(lr=0.01),
    RMSprop(lr=0.01, eps=1e-2, eps_inside_root=True),
    RMSprop(lr=0.01, momentum=0.9, eps_inside_root=True),
    RMSprop(lr=schedules.CosineDecay(0.1, 5), momentum=0.9, lr_in_momentum=True),
    RMSprop(lr=0.01, alpha=0.5, centered=True, eps=1e-2),
    RMSprop(lr=0.01, alpha=0.5, centered=True, eps=1e-2, momentum=0.9),
    RowWiseRMSprop(lr=0.01),
    RowWiseRMSprop(lr=0.01, eps=1e-2, eps_inside_root=True),
    Adadelta(lr=0.5),
    LAMB(lr=0.01),
    LAMB(lr=0.01, weight_decay=0.1, rowwise_bias_correction=True),
    LAMB(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    PartialRowWiseLAMB(lr=0.01, weight_decay=0.1),
    FTRL(lr=0.1),
    FTRL(lr=0.1, l1_strength=0.1, l2_strength=0.1, l2_shrinkage=0.1, beta=1.0),
    Lion(lr=0.01),
    Lion(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
]

OPTIONS = {
    "maximize": True,
    "clip_value": 0.01,
    "clip_norm": 0.02,
    "l1": 0.01,
    "weight_decay": 0.1,
    "max_norm": 2.0,
    "constraint": "non_neg",
}


def batches(steps=6, seed=0, dim=DIM):
    """Batches with duplicates, rows that come and go, and gradients of many magnitudes."""
    rng = np.random.default_rng([seed, dim])
    for _ in range(steps):
        ids = rng.integers(0, ROWS - 2, 9)
        ids[-1] = ids[0]
        scale = 10.0 ** rng.integers(-3, 2, (9, 1))
        yield ids, (rng.standard_normal((9, dim)) * scale).astype(np.float32)


def start(dim=DIM):
    """Rows of random numbers, but one of zeros, which has no norm to be in proportion to."""
    rows = np.random.default_rng(dim).standard_normal((ROWS, dim)).astype(np.float32)
    rows[0] = 0
    return rows


def pair(store, optimizer, name="t", dim=DIM):
    """A table, and its model in float64."""
    table = store.create_table(
        name, num_embeddings=ROWS, embedding_dim=dim, initializer=start(dim), optimizer=optimizer
    )
    widths = optimizer.state_columns(dim)
    return table, references.Model(optimizer, start(dim), widths, optimizer.initial_state())


def check(table, model, rtol=4e-6):
    """Sums of float32 differ from those of float64 by some 2**-23 of their largest term; `rtol` allows 32 of these."""
    largest = np.abs(model.weights).max()
    np.testing.assert_allclose(table.lookup(range(ROWS)), model.weights, rtol=rtol, atol=rtol * largest)
    for name, width in table.optimizer.state_columns(table.embedding_dim).items():
        expected = model.state(name)
        got = table.state(name, range(ROWS)).reshape(ROWS, width)
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


@pytest.mark.parametrize("optimizer", PLAIN, ids=str)
def test_it_is_the_published_formula(store, optimizer):
    table, model = pair(store, optimizer)
    for ids, grads in batches():
        table.update(ids, grads)
        model.update(ids, grads)
    check(table, model, rtol=2e-5 if getattr(optimizer, "centered", False) else 4e-6)


@pytest.mark.parametrize("cls", optim.OPTIMIZERS.values())
def test_it_has_all_options_at_once(store, cls):
    """In pairs of an odd and an even dimension, so that sums have whole eights and a rest, or neither."""
    for dim in (5, 16):
        table, model = pair(store, cls(lr=0.05, **OPTIONS), f"dim{dim}", dim)
        for ids, grads in batches(dim=dim):
            table.update(ids, grads)
            model.update(ids, grads)
        # A sign that differs where a momentum cancels, or a clipped norm, moves a weight by more than rounding.
        check(table, model, rtol=1e-5)


@pytest.mark.parametrize("optimizer", PLAIN, ids=str)
def test_the_plain_function_of_a_row_gives_the_bits_of_the_kernel(store, optimizer):
    """So the formula can be read and debugged as Python, and is the specification of its bits."""
    table, _ = pair(store, optimizer)
    widths = optimizer.state_columns(DIM)
    state = np.zeros((ROWS, sum(widths.values())), np.float32)
    at = 0
    for name, width in widths.items():
        state[:, at : at + width] = optimizer.initial_state().get(name, 0.0)
        at += width
    weights, work, kind = start(), np.empty(DIM, np.float32), type(optimizer)
    for step, (ids, grads) in enumerate(batches(), 1):
        table.update(ids, grads)
        scalars, options = optimizer.scalars_of(step), optimizer.options_of(step, DIM)
        for row in np.unique(ids):
            gradient, *more = grads[ids == row]
            for each in more:
                gradient = gradient + each
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("shardemb.optim.options._row_step", kind.row_step)
                kind.take_step(weights[row], state[row], gradient, scalars, options, work)
    np.testing.assert_array_equal(table.lookup(range(ROWS)).view(np.uint32), weights.view(np.uint32))


def test_a_row_counts_on_when_there_is_no_bias_left_to_correct(store):
    """The corrections of some 60 counts are tabulated for these betas; the last one holds for all that follow."""
    table, model = pair(store, Adam(lr=0.1, betas=(0.5, 0.75), rowwise_bias_correction=True))
    rng = np.random.default_rng(0)
    for _ in range(80):
        gradient = rng.standard_normal((1, DIM)).astype(np.float32)
        table.update([1], gradient)
        model.update([1], gradient)
    assert table.state("step", [1]).item() == 80 > len(table.optimizer.scalars_of(80))
    check(table, model, rtol=1e-5)


def test_a_row_of_zeros_cannot_get_the_norm_1(store):
    """It has no direction, so it stays."""
    table, _ = pair(store, SGD(constraint="unit_norm"))
    table.update([0, 1], np.zeros((2, DIM), np.float32))
    np.testing.assert_array_equal(table.lookup([0])[0], np.zeros(DIM))
    assert np.linalg.norm(table.lookup([1])) == pytest.approx(1, rel=1e-6)


def test_a_gradient_that_never_changes_has_no_negative_variance(store):
    """Its square and the square of its average are the same but for rounding, so there may be no root."""
    optimizer = RMSprop(lr=0.01, alpha=0.5, centered=True, eps=1e-2)
    table, _ = pair(store, optimizer)
    gradient = np.random.default_rng(0).standard_normal((1, DIM)).astype(np.float32)
    for _ in range(60):
        table.update([1], gradient)
    square, average = table.state("square_avg", [1]), table.state("grad_avg", [1])
    assert (square < average * average).any()
    assert np.isfinite(table.lookup([1])).all()


def test_ftrl_leaves_a_row_at_zero_to_which_nothing_was_added(store):
    """There is nothing to divide by."""
    optimizer = FTRL(lr=0.1, initial_accumulator_value=0.0)
    table, _ = pair(store, optimizer)
    table.update([0, 1], np.zeros((2, DIM), np.float32))
    np.testing.assert_array_equal(table.lookup([0, 1]), np.zeros((2, DIM), np.float32))


OPTION_SETS = st.fixed_dictionaries(
    {},
    optional={
        "maximize": st.booleans(),
        "clip_value": st.sampled_from([0.01, 1.0]),
        "clip_norm": st.sampled_from([0.05, 1.0]),
        "l1": st.sampled_from([0.01, 0.1]),
        "weight_decay": st.sampled_from([0.01, 0.5]),
        "decoupled_weight_decay": st.booleans(),
        "max_norm": st.sampled_from([0.5, 2.0]),
        "constraint": st.sampled_from(["non_neg", "unit_norm", None]),
        "lr": st.sampled_from(
            [
                0.1,
                schedules.LinearWarmup(0.1, 3),
                schedules.StepDecay(0.1, 2, 0.5, 1),
                schedules.CosineDecay(0.1, 4, 0.01, 2),
                schedules.InverseSquareRoot(0.1, 3),
                lambda step: 0.1 / step,
            ]
        ),
    },
)


@settings(max_examples=60)
@given(kind=st.sampled_from([SGD, RowWiseAdagrad, Adam, LAMB]), options=OPTION_SETS, seed=st.integers(0, 99))
def test_options_in_any_combination(tmp_path_factory, kind, options, seed):
    if options.get("constraint") == "unit_norm":
        options.pop("max_norm", None)
    with shardemb.open(tmp_path_factory.mktemp("store") / "s", "w") as store:
        table, model = pair(store, kind(**options))
        for ids, grads in batches(4, seed):
            table.update(ids, grads)
            model.update(ids, grads)
        check(table, model, rtol=1e-5)
        store.rollback()


def test_schedules_match_those_of_torch():
    torch = pytest.importorskip("torch")
    rates = torch.optim.lr_scheduler
    for ours, theirs in [
        (schedules.StepDecay(0.5, 3, 0.5), lambda o: rates.StepLR(o, 3, 0.5)),
        (schedules.CosineDecay(0.5, 10, 0.125), lambda o: rates.CosineAnnealingLR(o, 10, 0.125)),
        (
            schedules.LinearWarmup(0.5, 4),
            lambda o: rates.LinearLR(o, start_factor=0.25, total_iters=3),
        ),
    ]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        schedule = theirs(optimizer)
        for step in range(1, 11):
            assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (schedules.LinearWarmup(0.5, 4), lambda t: 0.5 * min(1, t / 4)),
        (schedules.StepDecay(0.5, 3, 0.25, 4), lambda t: 0.5 * 0.25 ** ((t - 1) // 3) * min(1, t / 4)),
        (
            schedules.CosineDecay(0.5, 5, 0.125, 3),
            lambda t: (
                0.5 * t / 3 if t <= 3 else 0.125 + 0.375 * (1 + math.cos(math.pi * min(1, (t - 4) / 5))) / 2
            ),
        ),
        (schedules.InverseSquareRoot(0.5, 4), lambda t: 0.5 * min(t / 4, (4 / t) ** 0.5)),
        (schedules.InverseSquareRoot(0.5, 0), lambda t: 0.5 * (1 / t) ** 0.5),
    ],
    ids=lambda given: str(given) if isinstance(given, schedules.Schedule) else "formula",
)
def test_schedules_are_their_formulas_also_after_their_end(schedule, formula):
    assert [float(schedule(t)) for t in range(1, 16)] == pytest.approx([formula(t) for t in range(1, 16)])


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.LinearWarmup(0.5, 4),
        schedules.LinearWarmup(0.5),
        schedules.StepDecay(0.5, 3),
        schedules.CosineDecay(0.5, 7, 0.1, 2),
        schedules.InverseSquareRoot(0.5, 4),
        schedules.InverseSquareRoot(0.5, 0),
    ],
    ids=str,
)
def test_schedules_are_stored_and_take_one_step_or_many(tmp_path, schedule):
    many = schedule(np.arange(1.0, 12))
    assert many.tolist() == [float(schedule(step)) for step in range(1, 12)]
    assert max(many) <= 0.5
    optimizer = SGD(lr=schedule)
    assert optim.from_json(json.loads(json.dumps(optim.to_json(optimizer)))) == optimizer
    with shardemb.open(tmp_path / "s", "w") as store:
        store.create_table("t", num_embeddings=2, embedding_dim=1, optimizer=optimizer)
        store.commit()
    with shardemb.open(tmp_path / "s", "a") as store:
        table = store["t"]
        assert table.optimizer == optimizer
        for _ in range(3):
            table.update([0], [[1.0]])
        assert table.lookup([0])[0, 0] == pytest.approx(-many[:3].sum(), rel=1e-6)
        store.rollback()


def test_a_function_of_the_step_has_to_be_set_again(tmp_path):
    with shardemb.open(tmp_path / "s", "w") as store:
        table = store.create_table(
            "t", num_embeddings=2, embedding_dim=1, optimizer=SGD(lr=lambda step: 0.5 * step)
        )
        table.update([0], [[1.0]])
        store.commit()
        assert not store.has_changes
    with shardemb.open(tmp_path / "s", "a") as store:
        table = store["t"]
        with pytest.raises(LearningRateError, match=r"table 't'.*set_optimizer"):
            table.update([0], [[1.0]])
        assert not store.has_changes
        table.set_optimizer(dataclasses.replace(table.optimizer, lr=lambda step: 0.25 * step))
        table.update([0], [[1.0]])
        assert table.lookup([0])[0, 0] == -1.0
        store.commit()


@pytest.mark.parametrize("value", [None, "fast", -1.0, np.nan, np.zeros(2)], ids=str)
def test_a_function_that_gives_no_learning_rate_changes_nothing(store, value):
    table = store.create_table("t", num_embeddings=2, embedding_dim=1, optimizer=SGD(lr=lambda _: value))
    with pytest.raises(LearningRateError, match="step 1"):
        table.update([0], [[1.0]])
    assert table.step == 0
    assert not table.lookup([0]).any()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SGD(momentum=1.0), ValueError, "momentum"),
        (lambda: SGD(nesterov=True), ValueError, "nesterov"),
        (lambda: SGD(momentum=0.9, dampening=0.5, nesterov=True), ValueError, "nesterov"),
        (lambda: SGD(maximize=1), TypeError, "maximize"),
        (lambda: SGD(lr=SGD), TypeError, "lr"),
        (lambda: SGD(lr="fast"), TypeError, "lr"),
        (lambda: SGD(clip_value=-1.0), ValueError, "clip_value"),
        (lambda: SGD(clip_norm="1"), TypeError, "clip_norm"),
        (lambda: SGD(max_norm=np.inf), ValueError, "max_norm"),
        (lambda: SGD(constraint="positive"), ValueError, "'non_neg', 'unit_norm'"),
        (lambda: SGD(constraint="unit_norm", max_norm=1.0), ValueError, "no max_norm"),
        (lambda: SGD(speed=1.0), TypeError, "speed"),
        (lambda: SGD(rowwise_bias_correction=True), ValueError, "SGD has no bias correction"),
        (lambda: RMSprop(alpha=1.0), ValueError, "alpha"),
        (lambda: Adadelta(rho=1.0), ValueError, "rho"),
        (lambda: FTRL(lr=0.0), ValueError, "lr must be greater than 0"),
        (lambda: Lion(betas=(0.9,)), ValueError, "betas"),
        (lambda: schedules.CosineDecay(0.1, 0), ValueError, "decay_steps"),
        (lambda: schedules.StepDecay(-0.1, 1), ValueError, "lr"),
        (lambda: schedules.LinearWarmup(0.1, -1), ValueError, "warmup_steps"),
        (lambda: optim.from_json({"name": "SGD", "lr": {"name": "Cosine"}}), FormatError, "Cosine"),
    ],
)
def test_bad_hyper_parameters_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_only_what_was_chosen_is_shown_and_stored():
    optimizer = Adam(lr=0.5, clip_norm=1.0)
    assert repr(optimizer) == "Adam(lr=0.5, betas=(0.9, 0.999), eps=1e-08, clip_norm=1.0)"
    assert optim.to_json(optimizer) == {
        "name": "Adam", "lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-08, "clip_norm": 1.0,
    }  # fmt: skip
    assert repr(AdamW()) == "AdamW(lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01)"


def test_a_decay_that_a_store_is_silent_about_is_none():
    """Adam before there was such an option is Adam without it."""
    assert optim.from_json({"name": "Adam", "lr": 0.5, "betas": [0.9, 0.999], "eps": 1e-8}) == Adam(lr=0.5)


def test_set_optimizer_keeps_the_columns(store):
    table = store.create_table("t", num_embeddings=2, embedding_dim=1, optimizer=SGD())
    table.set_optimizer(SGD(weight_decay=0.5, lr=schedules.StepDecay(0.1, 2)))
    with pytest.raises(ValueError, match="reshard"):
        table.set_optimizer(SGD(momentum=0.9))
    assert table.optimizer.weight_decay == 0.5
