"""Rows that were left out of steps, against a dense optimizer that saw gradients of zeros."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import references

import shardemb
from shardemb.compute import row_kernels
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
    RMSprop,
    RowWiseAdagrad,
    RowWiseRMSprop,
    schedules,
)  # fmt: skip

ROWS, DIM = 6, 5

DECAY = {"weight_decay": 0.1, "decoupled_weight_decay": True}
OPTIMIZERS = [
    SGD(lr=0.1, weight_decay=0.1),
    SGD(lr=schedules.CosineDecay(0.5, 40), weight_decay=0.1),
    SGD(lr=0.1, momentum=0.9),
    SGD(lr=schedules.LinearWarmup(0.1, 20), momentum=0.9, nesterov=True, **DECAY),
    SGD(lr=0.1, momentum=0.9, lr_in_momentum=True, max_norm=1.0),
    LARS(lr=0.1, eta=0.1, **DECAY),
    Adagrad(lr=0.1, **DECAY),
    RowWiseAdagrad(lr=0.1, constraint="non_neg", **DECAY),
    Adam(lr=0.05),
    Adam(lr=0.05, betas=(0.5, 0.9), eps_after_correction=True, eps=1e-3, max_norm=2.0),
    AdamW(lr=schedules.InverseSquareRoot(0.05, 10), weight_decay=0.5),
    PartialRowWiseAdam(lr=0.05, **DECAY),
    AMSGrad(lr=0.05),
    Adamax(lr=0.05),
    NAdam(lr=0.05, **DECAY),
    RMSprop(lr=0.05, **DECAY),
    RMSprop(lr=0.05, momentum=0.9, centered=True, eps=1e-2),
    RowWiseRMSprop(lr=0.05, **DECAY),
    Adadelta(lr=0.5, **DECAY),
    FTRL(lr=0.1, l1_strength=0.01, l2_strength=0.1),
]


def dense(optimizer):
    """The same optimizer, as dataclasses of the tests' references see it."""
    import dataclasses

    return dataclasses.replace(optimizer, dense_equivalent=True)


def start():
    return np.random.default_rng(1).standard_normal((ROWS, DIM)).astype(np.float32)


class Dense(references.Model):
    """A model that takes a step on all rows, with zeros for those that are not in the batch."""

    def summed(self, ids, grads):
        sums = np.zeros((ROWS, DIM))
        np.add.at(sums, np.ravel(ids), grads.astype(np.float64))
        return np.arange(ROWS), sums


def pair(store, optimizer, initializer=None):
    optimizer = dense(optimizer)
    table = store.create_table(
        "t", num_embeddings=ROWS, embedding_dim=DIM, initializer=start() if initializer is None else initializer,
        optimizer=optimizer,
    )  # fmt: skip
    return table, Dense(
        optimizer, table.lookup(range(ROWS)), optimizer.own_columns(DIM), optimizer.initial_state()
    )


def check(table, model):
    """What is cut off is less than 1e-7 of a step; the rest is rounding, of up to hundreds of steps in float32."""
    np.testing.assert_allclose(table.lookup(range(ROWS)), model.weights, rtol=3e-5, atol=3e-5)
    for name, width in table.optimizer.own_columns(DIM).items():
        expected = model.state(name)
        got = table.state(name, range(ROWS)).reshape(ROWS, width)
        np.testing.assert_allclose(got, expected, rtol=3e-4, atol=3e-5 * max(np.abs(expected).max(), 1e-3))


def train(table, model, gaps, seed=0):
    """Steps on two rows each; between them some on row 0 alone, so that the others are left out."""
    rng = np.random.default_rng(seed)
    for gap in gaps:
        for ids in [[1 + rng.integers(0, ROWS - 2), ROWS - 1], *[[0]] * gap]:
            grads = rng.standard_normal((len(ids), DIM)).astype(np.float32)
            table.update(ids, grads)
            model.update(ids, grads)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_rows_that_were_left_out_are_those_of_a_dense_optimizer(store, optimizer):
    table, model = pair(store, optimizer)
    for gaps in ([0, 3, 1], [40], [2, 0]):
        train(table, model, gaps)
        check(table, model)


def test_a_long_rest_ends_in_a_closed_form(store):
    """250 steps are more than are taken one by one."""
    table, model = pair(store, AdamW(lr=0.01, weight_decay=0.5))
    assert table.optimizer.after_rest().replayed < 200
    train(table, model, [3, 250, 1])
    check(table, model)


@pytest.mark.parametrize(
    ("optimizer", "shrinks_by"),
    [
        (SGD(momentum=0.9), 0.9),
        (LARS(momentum=0.5), 0.5),
        (Adam(betas=(0.5, 0.3)), 0.5 / 0.3**0.5),
        (AMSGrad(betas=(0.5, 0.3)), 0.5),
        (Adamax(betas=(0.5, 0.6)), 0.5 / 0.6),
        (RMSprop(momentum=0.5, alpha=0.25), 0.5),
    ],
    ids=str,
)
def test_steps_are_taken_one_by_one_until_what_is_left_of_them_is_nothing(optimizer, shrinks_by):
    """All steps that follow are together less than 1e-7 of the first one, and one step earlier they were more."""
    replayed = optimizer.after_rest().replayed
    assert shrinks_by**replayed / (1 - shrinks_by) <= 1e-7 < shrinks_by ** (replayed - 1) / (1 - shrinks_by)


@pytest.mark.parametrize("optimizer", [SGD(), Adagrad(), RMSprop(), RowWiseRMSprop(), Adadelta()], ids=str)
def test_without_a_momentum_there_are_none(optimizer):
    assert optimizer.after_rest().replayed == 0


def test_a_row_that_an_update_has_taken_further_is_left_alone():
    """As when the update is in another thread, and faster than the lookup that wants the row as of an earlier step."""
    decays = dense(SGD(lr=0.1, momentum=0.9)).decays_until(20, DIM)
    records = np.ones((1, 2 * DIM + 1), np.float32)
    records[0, -1] = 10
    before = records.copy()
    known = decays.scalars, decays.options, decays.kept, decays.log_kept, decays.log_state, decays.replayed
    row_kernels.catch_up(SGD)(records, DIM, np.array([0]), *known, 5, 5, 0, 1)
    np.testing.assert_array_equal(records, before)


def test_against_dense_adamw_of_torch(store):
    torch = pytest.importorskip("torch")
    table, _ = pair(store, AdamW(lr=0.01, weight_decay=0.5))
    parameter = torch.nn.Parameter(torch.from_numpy(start()))
    theirs = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.5)
    rng = np.random.default_rng(0)
    for step in range(60):
        ids = rng.choice(ROWS - 1, 2, replace=False) if step % 20 else [ROWS - 1]
        grads = rng.standard_normal((len(ids), DIM)).astype(np.float32)
        table.update(ids, grads)
        parameter.grad = torch.zeros(ROWS, DIM)
        parameter.grad[ids] = torch.from_numpy(grads)
        theirs.step()
    np.testing.assert_allclose(table.lookup(range(ROWS)), parameter.detach().numpy(), rtol=2e-5, atol=2e-5)


@settings(max_examples=25)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("update"), st.sets(st.integers(0, ROWS - 1), min_size=1)),
            st.tuples(st.just("write"), st.sets(st.integers(0, ROWS - 1), min_size=1)),
            st.tuples(st.just("reset"), st.sets(st.integers(0, ROWS - 1), min_size=1)),
            st.tuples(st.sampled_from(["commit", "rollback", "reopen", "rate", "checkpoint"]), st.just({0})),
        ),
        max_size=12,
    ),
    st.booleans(),
)
def test_whatever_happens_between_the_steps(tmp_path_factory, actions, counters):
    import copy

    path = tmp_path_factory.mktemp("store") / "s"
    optimizer = dense(AdamW(lr=0.05, weight_decay=0.5))
    rng = np.random.default_rng(3)
    store = shardemb.open(path, "w")
    table = store.create_table(
        "t", num_embeddings=ROWS, embedding_dim=DIM, optimizer=optimizer, counters=counters,
        initializer=shardemb.initializers.Normal(std=1.0, seed=4),
    )  # fmt: skip
    first = table.lookup(range(ROWS))
    model = Dense(optimizer, first, optimizer.own_columns(DIM), {})
    store.commit()
    committed = copy.deepcopy(model)
    for what, rows in actions:
        ids = sorted(rows)
        if what == "update":
            grads = rng.standard_normal((len(ids), DIM)).astype(np.float32)
            table.update(ids, grads)
            model.update(ids, grads)
        elif what == "write":
            table.write(ids, np.ones((len(ids), DIM)))
            model.weights[ids] = 1
        elif what == "reset":
            table.reset_rows(ids)
            model.weights[ids] = first[ids]
            for row in ids:
                model.states[row] = {name: np.zeros(DIM) for name in model.states[row]}
        elif what == "rollback":
            store.rollback()
            model = copy.deepcopy(committed)
        elif what == "rate":
            changed = AdamW(lr=0.5 * table.optimizer.lr, weight_decay=0.25)
            table.set_optimizer(dense(changed))
            model.optimizer = dense(changed)
        else:
            store.commit()
            committed = copy.deepcopy(model)
            if what == "checkpoint":
                store.checkpoint()
            if what == "reopen":
                store.close()
                store = shardemb.open(path, "a")
                table = store["t"]
        check(table, model)
        if counters:
            assert (table.state("last_step", range(ROWS)) <= table.step).all()
    store.rollback()
    store.close()


def test_exports_and_ranges_are_caught_up(store, tmp_path):
    table, model = pair(store, SGD(lr=0.1, weight_decay=0.1))
    train(table, model, [5])
    np.testing.assert_array_equal(table.to_dask_array().compute(), table.lookup(range(ROWS)))
    batches = table.to_arrow_batches().read_all()
    assert batches.num_rows == ROWS
    np.testing.assert_allclose(table[0:ROWS], model.weights, rtol=1e-5)


def test_bags_are_caught_up(store):
    table, model = pair(store, AdamW(lr=0.05, weight_decay=0.5))
    train(table, model, [5])
    for mode in ("sum", "max"):
        pooled = table.lookup_bag([[1, 2, 2]], mode=mode)
        np.testing.assert_allclose(
            pooled, getattr(table.lookup([1, 2, 2]), mode)(axis=0, keepdims=True), rtol=1e-6
        )
    gradient = np.ones((1, DIM), np.float32)
    table.update_bag([[1, 2, 2]], None, gradient)
    model.update([1, 2, 2], np.repeat(gradient, 3, axis=0))
    check(table, model)


def test_many_rows_have_the_same_bits_for_any_number_of_threads_and_shards(tmp_path):
    ids = np.random.default_rng(0).integers(0, 20_000, (3, 15_000))
    found = set()
    for threads, rows_per_shard in ((1, None), (3, 1024)):
        with shardemb.open(tmp_path / "s", "w", threads=threads) as store:
            table = store.create_table(
                "t", num_embeddings=20_000, embedding_dim=24, optimizer=dense(AdamW(lr=0.1)),
                rows_per_shard=rows_per_shard, initializer=shardemb.initializers.Normal(std=1.0, seed=4),
            )  # fmt: skip
            for some in ids:
                table.update(some, np.ones((some.size, 24), np.float32))
            found.add(table.lookup(range(20_000)).tobytes())
            store.rollback()
    assert len(found) == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Adam(weight_decay=0.1, dense_equivalent=True), "decoupled_weight_decay"),
        (lambda: SGD(momentum=0.9, weight_decay=0.1, dense_equivalent=True), "decoupled_weight_decay"),
        (lambda: Adam(l1=0.1, dense_equivalent=True), "l1"),
        (lambda: Adam(lr=lambda step: 0.1, dense_equivalent=True), "optim.schedules"),
        (lambda: Adam(betas=(0.9, 0.5), dense_equivalent=True), "betas"),
        (lambda: Adam(betas=(0.5, 0.25), dense_equivalent=True), "betas"),  # all steps as long as the first
        (lambda: Adam(rowwise_bias_correction=True, dense_equivalent=True), "rowwise_bias_correction"),
        (lambda: Adagrad(constraint="unit_norm", dense_equivalent=True), "unit norm"),
        (lambda: SGD(lr=1.0, weight_decay=1.0, dense_equivalent=True), "is 1 or more"),
        (
            lambda: SGD(lr=schedules.StepDecay(2.0, 5), weight_decay=0.5, dense_equivalent=True),
            "is 1 or more",
        ),
        (lambda: LAMB(dense_equivalent=True), "LAMB cannot be dense_equivalent: its steps have the length"),
        (lambda: Lion(dense_equivalent=True), "Lion cannot be dense_equivalent"),
        (lambda: FTRL(l2_shrinkage=0.1, dense_equivalent=True), "FTRL"),
    ],
)
def test_where_there_is_no_bound_it_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_table_by_key_refuses_what_would_change_rows_before_their_keys_come(store):
    store.create_vocabulary("v", key_type="int64")
    for optimizer in (AdamW(), SGD(max_norm=1.0), FTRL()):
        with pytest.raises(ValueError, match=r"table 't'.*before it came"):
            store.create_table("t", vocabulary="v", embedding_dim=2, optimizer=dense(optimizer))
    table = store.create_table(
        "t", vocabulary="v", embedding_dim=2, optimizer=dense(SGD(lr=1.0, momentum=0.5))
    )
    for _ in range(3):
        table.update([1], [[1.0, 1.0]], create=True)
    table.update([2], [[1.0, 1.0]], create=True)
    store.commit()
    np.testing.assert_allclose(table.lookup([1, 2])[:, 0], [-(1 + 1.5 + 1.75 + 0.875), -1.0])
    with pytest.raises(ValueError, match="before it came"):
        store.reshard("t", optimizer=dense(AdamW()))
