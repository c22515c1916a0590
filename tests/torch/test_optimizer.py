"""Steps of all tables of a model: learning rates, scaled and clipped gradients, failures, states."""

import io
import math
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402
from shardemb.optim import SGD, Adam, schedules  # noqa: E402

ROWS, DIM = 9, 3
IDS = torch.tensor([1, 2, 1])


def make(store, name="t", optimizer=SGD(lr=1.0)):  # noqa: B008 optimizers are values
    table = store.create_table(name, num_embeddings=ROWS, embedding_dim=DIM, optimizer=optimizer)
    return shardemb.torch.Embedding(table)


@pytest.fixture
def module(store):
    return make(store)


@pytest.fixture
def both(store):
    """Two modules of one store, in one model."""
    return torch.nn.ModuleDict({"a": make(store, "a"), "b": make(store, "b", Adam(lr=0.1))})


def backward(module, ids=IDS, factor=1.0):
    (factor * module(ids).sum()).backward()


def first(module):
    return module.table[0:4][:, 0].tolist()


# ---- steps ------------------------------------------------------------------------------------------------------


def test_all_tables_of_a_store_change_in_one_call(store, both, monkeypatch):
    calls = []
    monkeypatch.setattr(
        shardemb.Store, "update", lambda self, batches, **options: calls.append((self, list(batches)))
    )
    for each in both.values():
        backward(each)
    shardemb.torch.Optimizer(both).step()
    assert calls == [(store, ["a", "b"])]


def test_a_closure_is_evaluated_with_gradients(module):
    def closure():
        loss = module(IDS).sum() + 5
        loss.backward()
        return loss

    with torch.no_grad():
        loss = shardemb.torch.Optimizer(module).step(closure)
    assert loss.item() == 5
    assert first(module) == [0, -2, -1, 0]


def test_a_step_without_gradients_changes_nothing(store, module):
    store.commit()
    optimizer = shardemb.torch.Optimizer(module, lr=5.0)
    assert optimizer.step() is None
    assert not store.has_changes


def test_tables_of_several_stores_take_their_steps(store, tmp_path):
    with shardemb.open(tmp_path / "other.zarr") as other:
        modules = [make(store), make(other), make(other, "u", SGD(lr=0.5))]
        optimizer = shardemb.torch.Optimizer(modules)
        assert [group["table"] for group in optimizer.param_groups] == ["t", "t", "u"]
        for each in modules:
            backward(each)
        optimizer.step()
        assert [first(each) for each in modules] == [[0, -2, -1, 0]] * 2 + [[0, -1, -0.5, 0]]
        other.commit()


def test_hooks_of_a_step_run(module):
    optimizer, seen = shardemb.torch.Optimizer(module), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    backward(module)
    optimizer.step()
    assert seen == ["before", "after"]


# ---- learning rates ---------------------------------------------------------------------------------------------

SCHEDULERS = {
    "step": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=5),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.5, total_steps=10, cycle_momentum=False),
    "warm-up": partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=4),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_of_torch_drives_the_learning_rate_of_the_tables(both, scheduler):
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs, ours = torch.optim.SGD([weight], lr=0.25), shardemb.torch.Optimizer(both, lr=0.25)
    schedulers = [scheduler(theirs), scheduler(ours)]
    for _ in range(6):
        weight.grad = torch.ones(1)
        theirs.step()
        for each in both.values():
            backward(each, torch.tensor([3]))
        ours.step()
        lr = theirs.param_groups[0]["lr"]
        assert [group["lr"] for group in ours.param_groups] == [lr, lr]
        assert [each.table.optimizer.lr for each in both.values()] == [lr, lr]
        for each in schedulers:
            each.step()
    assert both["a"].table.lookup(3)[0] == pytest.approx(weight.item(), rel=1e-5)


def test_reducing_on_a_plateau(module):
    optimizer = shardemb.torch.Optimizer(module)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        backward(module)
        optimizer.step()
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert module.table.optimizer.lr == 0.5  # of the last step


def test_tables_keep_their_own_learning_rates_until_others_are_set(store, both, monkeypatch):
    calls = []
    original = shardemb.Table.set_optimizer
    monkeypatch.setattr(
        shardemb.Table, "set_optimizer", lambda *given: (calls.append(given), original(*given))
    )
    optimizer = shardemb.torch.Optimizer(both)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]
    for lr in (None, None, 0.5, 0.5):
        if lr is not None:
            optimizer.param_groups[1]["lr"] = torch.tensor(lr)
        for each in both.values():
            backward(each)
        optimizer.step()
    assert [each.table.optimizer.lr for each in both.values()] == [1.0, 0.5]
    assert len(calls) == 1
    store.commit()
    both["b"].table.set_optimizer(Adam(lr=0.7))
    store.rollback()
    both["b"].table.set_optimizer(Adam(lr=0.7))
    backward(both["b"])
    optimizer.step()
    assert both["b"].table.optimizer.lr == 0.5  # it is that of the group from then on


def test_a_schedule_of_a_table_goes_on_and_is_shown(module, store):
    schedule = schedules.StepDecay(lr=1.0, step_size=1, gamma=0.5)
    module = make(store, "scheduled", SGD(lr=schedule))
    optimizer, shown = shardemb.torch.Optimizer(module), []
    for _ in range(3):
        shown.append(optimizer.param_groups[0]["lr"])
        backward(module, torch.tensor([3]))
        optimizer.step()
    assert shown == [schedule(step) for step in (1, 2, 3)]
    assert first(module)[3] == -sum(shown)
    assert module.table.optimizer.lr == schedule
    optimizer.param_groups[0]["lr"] = 0.25
    backward(module, torch.tensor([3]))
    optimizer.step()
    assert module.table.optimizer.lr == optimizer.param_groups[0]["lr"] == 0.25


def test_a_changed_learning_rate_of_a_dense_table_warns_once(store):
    module = make(store, optimizer=Adam(lr=0.1, dense_equivalent=True))
    optimizer = shardemb.torch.Optimizer(module)
    with pytest.warns(UserWarning, match=r"'t' is dense_equivalent.*optim\.schedules") as caught:
        for lr in (0.1, 0.2, 0.3):
            optimizer.param_groups[0]["lr"] = lr
            backward(module)
            optimizer.step()
    assert len(caught) == 1


@pytest.mark.parametrize(("lr", "error"), [(-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)])
def test_a_learning_rate_that_is_none_is_refused(module, lr, error):
    with pytest.raises(error, match="lr"):
        shardemb.torch.Optimizer(module, lr=lr)


def test_what_is_no_model_with_tables_that_train_is_refused(store, module):
    with pytest.raises(ValueError, match="none of the modules trains"):
        shardemb.torch.Optimizer(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="the model itself"):
        shardemb.torch.Optimizer(torch.nn.Linear(2, 2).parameters())
    resting = make(store, "resting", None)
    with pytest.raises(ValueError, match=r"'resting' has no optimizer.*reshard.*requires_grad_\(False\)"):
        shardemb.torch.Optimizer([module, resting])
    optimizer = shardemb.torch.Optimizer([module, resting.requires_grad_(False)])
    assert len(optimizer.param_groups) == 1
    assert not resting(IDS).requires_grad
    with pytest.raises(TypeError, match="the groups of this optimizer are the tables"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})


# ---- scaled gradients -------------------------------------------------------------------------------------------


def test_gradients_are_divided_by_a_scale(module):
    optimizer = shardemb.torch.Optimizer(module)
    backward(module, factor=1024.0)
    optimizer.step(grad_scale=torch.tensor(1024.0))
    assert not optimizer.skipped
    assert first(module) == [0, -2, -1, 0]


def test_a_scaled_step_that_is_not_finite_is_skipped_in_all_stores(store, module, tmp_path):
    with shardemb.open(tmp_path / "other.zarr") as other:
        modules = [module, make(other)]
        optimizer = shardemb.torch.Optimizer(modules)
        for ready in ([module], modules):
            for each in ready:
                backward(each, factor=math.inf if each is ready[-1] else 1.0)
            optimizer.step(grad_scale=2.0)
            assert optimizer.skipped
            assert [each.table.step for each in modules] == [0, 0]
            assert optimizer.param_groups[0]["params"] == []
        backward(module, factor=2.0)
        optimizer.step(grad_scale=2.0)
        assert not optimizer.skipped
        assert first(module) == [0, -2, -1, 0]
        other.commit()


def test_a_gradient_scaler_works_as_for_any_optimizer(both):
    linear = torch.nn.Linear(DIM, 1)
    dense, rows = torch.optim.SGD(linear.parameters(), lr=0.1), shardemb.torch.Optimizer(both)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scales, steps = [], []
    for factor in (1.0, math.inf, 1.0, 1.0):
        loss = factor * linear(both["a"](IDS) + both["b"](IDS)).sum()
        dense.zero_grad()
        rows.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(dense)
        scaler.step(rows)
        scaler.update()
        scales.append(scaler.get_scale())
        steps.append(both["a"].table.step)
    assert scales == [1024, 512, 512, 1024]
    assert steps == [1, 1, 2, 3]


def test_unscaled_gradients_are_clipped_together(both):
    model = torch.nn.ModuleList([*both.values(), torch.nn.Linear(DIM, 1, bias=False)])
    dense, rows = torch.optim.SGD(model[2].parameters(), lr=0.1), shardemb.torch.Optimizer(both)
    norms = []
    for scale in (None, 4096.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        loss = model[2](both["a"](IDS) + 3 * both["b"](IDS)).sum()
        scaler.scale(loss).backward()
        for each in (dense, rows):
            scaler.unscale_(each)
        norms.append(shardemb.torch.clip_grad_norm_(model, 1e9).item())
        dense.zero_grad()
        rows.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


# ---- clipping ---------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=6),
    st.lists(st.lists(st.integers(0, ROWS - 1), max_size=3), max_size=4),
    st.sampled_from(["sum", "mean"]),
    st.sampled_from([0.01, 1.0, 1e6, math.inf]),
)
def test_clipping_is_that_of_torch_on_dense_parameters(tmp_path_factory, ids, bags, mode, max_norm):
    weights = np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)
    theirs = [
        torch.nn.Embedding.from_pretrained(torch.from_numpy(weights.copy()), freeze=False),
        torch.nn.EmbeddingBag.from_pretrained(torch.from_numpy(weights.copy()), freeze=False, mode=mode),
        torch.nn.Linear(DIM, 1),
    ]
    with shardemb.open(tmp_path_factory.mktemp("store") / "s") as store:
        tables = [make(store, name).table for name in "ab"]
        for table in tables:
            table.write(range(ROWS), weights)
        ours = [shardemb.torch.Embedding(tables[0]), shardemb.torch.EmbeddingBag(tables[1], mode=mode)]
        ours.append(torch.nn.Linear(DIM, 1))
        ours[2].load_state_dict(theirs[2].state_dict())
        flat = torch.tensor([each for bag in bags for each in bag], dtype=torch.int64)
        offsets = torch.tensor(np.cumsum([0, *map(len, bags)])[:-1], dtype=torch.int64)
        norms = []
        for rows, pooled, linear in (theirs, ours):
            (linear(rows(torch.tensor(ids))).sum() ** 2).backward()
            (linear(pooled(flat, offsets)).sum() ** 2).backward()
        parameters = [each for module in theirs for each in module.parameters()]
        norms = [torch.nn.utils.clip_grad_norm_(parameters, max_norm)]
        norms.append(shardemb.torch.clip_grad_norm_(ours, max_norm))
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-5)
        assert norms[0].dtype == norms[1].dtype
        torch.testing.assert_close(ours[2].weight.grad, theirs[2].weight.grad)
        torch.optim.SGD(parameters, lr=1.0).step()
        shardemb.torch.Optimizer(ours).step()
        for table, module in zip(tables, theirs[:2], strict=True):
            np.testing.assert_allclose(table[:], module.weight.detach().numpy(), rtol=1e-4, atol=1e-6)
        store.commit()


def test_without_rows_clipping_is_torch_s(module):
    linear = torch.nn.Linear(2, 1)
    linear(torch.tensor([3.0, 4.0])).backward()
    assert shardemb.torch.clip_grad_norm_([linear, module], 2.0, norm_type=math.inf) == 4
    assert linear.weight.grad.tolist() == [[pytest.approx(1.5), pytest.approx(2.0)]]


def test_what_cannot_be_clipped_is_refused(module):
    backward(module)
    with pytest.raises(ValueError, match="norm_type must be 2"):
        shardemb.torch.clip_grad_norm_(module, 1.0, norm_type=1.0)
    with pytest.raises(TypeError, match="the model itself"):
        shardemb.torch.clip_grad_norm_(module.parameters(), 1.0)
    with pytest.raises(TypeError, match="the model itself"):
        shardemb.torch.clip_grad_norm_(torch.nn.Linear(2, 1).parameters(), 1.0)
    backward(module, factor=math.inf)
    with pytest.raises(RuntimeError, match="not finite"):
        shardemb.torch.clip_grad_norm_(module, 1.0, error_if_nonfinite=True)
    assert math.isinf(shardemb.torch.clip_grad_norm_(module, 1.0))
    shardemb.torch.Optimizer(module, fused=True).zero_grad()
    with pytest.raises(ValueError, match="fused"):
        shardemb.torch.clip_grad_norm_(module, 1.0)


# ---- fused ------------------------------------------------------------------------------------------------------


def test_a_fused_optimizer_steps_within_backward(both):
    optimizer = shardemb.torch.Optimizer(both, lr=1.0, fused=True)
    (both["a"](IDS) + both["b"](IDS)).sum().backward()
    assert first(both["a"]) == [0, -2, -1, 0]
    assert [each.table.step for each in both.values()] == [1, 1]
    assert all(each.pending == [] for each in both.values())
    optimizer.param_groups[0]["lr"] = 0.5
    (both["a"](IDS).sum() + both["a"](torch.tensor([3])).sum()).backward()
    assert first(both["a"]) == [0, -3, -1.5, -0.5]
    assert both["a"].table.step == 3
    optimizer.step()
    assert both["a"].table.step == 3
    with pytest.raises(ValueError, match="fused"):
        optimizer.step(grad_scale=2.0)
    shardemb.torch.Optimizer(both)
    backward(both["a"])
    assert both["a"].table.step == 3


def test_a_fused_step_that_fails_is_raised_by_backward(module):
    optimizer = shardemb.torch.Optimizer(module, fused=True)
    with pytest.raises(ValueError, match="inf"):
        backward(module, factor=math.inf)
    assert module.pending == []
    backward(module)
    optimizer.step()
    assert first(module) == [0, -2, -1, 0]


# ---- what fails -------------------------------------------------------------------------------------------------


def test_a_step_that_is_refused_changes_nothing_and_keeps_the_gradients(store, both):
    optimizer = shardemb.torch.Optimizer(both)
    store.commit()
    backward(both["a"])
    backward(both["b"], factor=math.nan)
    for _ in range(2):
        with pytest.raises(ValueError, match="nan"):
            optimizer.step()
    assert not store.has_changes
    optimizer.zero_grad()
    optimizer.step()
    assert not store.has_changes
    both["a"].table.freeze_rows(2, 3)
    backward(both["a"])
    with pytest.raises(shardemb.FrozenRowError, match="row 2"):
        optimizer.step()
    both["a"].table.unfreeze_rows()
    optimizer.step()
    assert first(both["a"]) == [0, -2, -1, 0]


def test_gradients_of_a_store_that_took_its_step_are_gone(store, module, tmp_path):
    with shardemb.open(tmp_path / "other.zarr") as other:
        failing = make(other)
        optimizer = shardemb.torch.Optimizer([module, failing])
        backward(module)
        failing.table.freeze_rows()
        loss = failing(IDS).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(shardemb.FrozenRowError):
            optimizer.step()
        assert (module.pending, len(failing.pending)) == ([], 1)
        failing.table.unfreeze_rows()
        loss.backward()  # adds to the gradient, which is taken once
        optimizer.step()
        assert [first(each) for each in (module, failing)] == [[0, -2, -1, 0], [0, -4, -2, 0]]
        other.commit()


def test_a_store_that_is_only_read_takes_no_step(tmp_path):
    with shardemb.open(tmp_path / "s.zarr") as store:
        make(store)
        store.commit()
    with shardemb.open(tmp_path / "s.zarr", "r") as reader:
        module = shardemb.torch.Embedding(reader["t"])
        backward(module)
        with pytest.raises(shardemb.ReadOnlyError):
            shardemb.torch.Optimizer(module).step()


@pytest.mark.parametrize("applied", [True, False])
def test_an_interrupt_leaves_a_step_taken_or_its_gradients(store, both, monkeypatch, applied):
    optimizer, original = shardemb.torch.Optimizer(both), shardemb.Store.update
    for each in both.values():
        backward(each)

    def update(*given, **options):
        if applied:
            original(*given, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shardemb.Store, "update", update)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert [each.table.step for each in both.values()] == [applied] * 2
    optimizer.step()
    assert [each.table.step for each in both.values()] == [1, 1]


# ---- states -----------------------------------------------------------------------------------------------------


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_a_state_has_the_learning_rates_and_no_rows(both):
    optimizer = shardemb.torch.Optimizer(both)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.param_groups[0]["lr"] = 0.25
    for each in both.values():
        backward(each)
    state = saved(optimizer.state_dict())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert state["state"] == {}
    assert [group["params"] for group in state["param_groups"]] == [[], []]
    optimizer.step()
    assert both["a"].table.optimizer.lr == 0.25

    other = shardemb.torch.Optimizer(both)
    another = lr_scheduler.ExponentialLR(other, 0.5)
    backward(both["a"])
    other.load_state_dict(state)
    another.load_state_dict(scheduler.state_dict())
    assert [group["lr"] for group in other.param_groups] == [0.25, 0.1]
    assert [group["initial_lr"] for group in other.param_groups] == [1.0, 0.1]
    assert len(other.param_groups[0]["params"]) == 1
    other.step()
    another.step()
    assert both["a"].table.optimizer.lr == 0.25
    assert [group["lr"] for group in other.param_groups] == [0.125, 0.05]


def test_a_state_of_other_tables_is_refused(both, module):
    state = shardemb.torch.Optimizer(both).state_dict()
    optimizer = shardemb.torch.Optimizer(module)
    for wrong in (state, {"state": {}, "param_groups": [{"params": [], "lr": 1.0}]}):
        with pytest.raises(ValueError, match="the same modules in the same order"):
            optimizer.load_state_dict(wrong)
    assert optimizer.param_groups[0]["lr"] == 1.0
