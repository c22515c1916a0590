"""Which lookups a step is for: those that backward has left gradients at, each once."""

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")

from torch.utils.checkpoint import checkpoint  # noqa: E402

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402
from shardemb.optim import SGD  # noqa: E402

IDS = torch.tensor([1, 2, 1])


@pytest.fixture
def module(store):
    return shardemb.torch.Embedding(
        store.create_table("t", num_embeddings=9, embedding_dim=2, optimizer=SGD(lr=1.0))
    )


@pytest.fixture
def optimizer(module):
    return shardemb.torch.Optimizer(module)


def first_column(module):
    return module.table[0:4][:, 0].tolist()


def test_gradients_may_be_zeroed_between_forward_and_backward(module, optimizer):
    loss = module(IDS).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert first_column(module) == [0, -2, -1, 0]


def test_zeroed_gradients_are_forgotten(module, optimizer):
    module(IDS).sum().backward()
    optimizer.zero_grad()
    optimizer.step()
    assert module.table.step == 0
    assert module.pending == []


def test_a_forward_pass_without_backward_leaves_nothing(module):
    out = module(IDS)
    gone = weakref.ref(out)
    del out
    gc.collect()
    assert gone() is None
    assert module.pending == []


def test_several_forward_passes_are_one_step(module, optimizer):
    first, second = module(IDS), module(torch.tensor([3]))
    (first.sum() + 2 * second.sum()).backward()
    module(IDS).sum().backward()
    assert len(module.pending) == 3
    optimizer.step()
    assert first_column(module) == [0, -4, -2, -2]
    assert module.table.step == 1


def test_a_second_backward_adds_to_the_first(module, optimizer):
    loss = module(IDS).sum()
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    assert len(module.pending) == 1
    optimizer.step()
    assert first_column(module) == [0, -4, -2, 0]
    loss.backward(retain_graph=True)
    optimizer.step()
    assert first_column(module) == [0, -6, -3, 0]
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert first_column(module) == [0, -8, -4, 0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_forward_pass_that_is_run_again_counts_once(module, optimizer, use_reentrant):
    scale = torch.ones(2, requires_grad=True)

    def forward(scale):
        return (module(IDS) * scale).sum()

    checkpoint(forward, scale, use_reentrant=use_reentrant).backward()
    optimizer.step()
    assert first_column(module) == [0, -2, -1, 0]


def test_a_branch_that_does_not_reach_the_loss_is_no_part_of_the_step(module, optimizer):
    kept, _ = module(IDS), module(torch.tensor([3]))
    kept.sum().backward()
    optimizer.step()
    assert first_column(module) == [0, -2, -1, 0]


def test_gradients_that_autograd_returns_are_not_the_step_s(module, optimizer):
    rows = module(IDS)
    torch.autograd.grad(rows.sum(), rows)
    optimizer.step()
    assert module.table.step == 0


def test_a_module_goes_without_a_collection(store):
    table = store.create_table("gone", num_embeddings=9, embedding_dim=2, optimizer=SGD(lr=1.0))
    gc.disable()
    try:
        module = shardemb.torch.Embedding(table)
        rows, gone = module(IDS), weakref.ref(module)
        del module
        assert gone() is None
        rows.sum().backward()  # nobody is left to take the step
    finally:
        gc.enable()


def test_rows_of_a_table_by_key_are_refused(store):
    store.create_vocabulary("users", key_type="int64")
    users = store.create_table("users", vocabulary="users", embedding_dim=2, optimizer=shardemb.optim.SGD())
    with pytest.raises(TypeError, match=r"'users' is used by key: give the module store\['users'\]"):
        shardemb.torch.Embedding(users.rows)
    shardemb.torch.Embedding(store["users"])
