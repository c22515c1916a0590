"""`EmbeddingBag` against `torch.nn.EmbeddingBag`, option by option."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402
from shardemb.optim import SGD  # noqa: E402

ROWS, DIM = 7, 3
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    with shardemb.open(tmp_path_factory.mktemp("torch") / "s.zarr") as store:
        yield store
        store.commit()


@pytest.fixture(scope="module")
def table(store):
    return store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, optimizer=SGD(lr=1.0))


@pytest.fixture
def rows(table):
    """The table, with its first values."""
    table.write(np.arange(ROWS), WEIGHT)
    return table


@st.composite
def bags(draw, *, modes=("sum", "mean", "max")):
    """Input, offsets, weights or None, and the options of a module."""
    mode = draw(st.sampled_from(modes))
    flat = draw(st.booleans())
    options = {
        "mode": mode,
        "padding_idx": draw(st.sampled_from([None, 0, 3, -1])),
        "include_last_offset": flat and draw(st.booleans()),
    }
    ids = st.integers(0, ROWS - 1)
    if flat:
        groups = draw(st.lists(st.lists(ids, max_size=4), min_size=1, max_size=5))
        input = torch.tensor([each for group in groups for each in group], dtype=torch.long)
        offsets = torch.tensor([0, *np.cumsum([len(each) for each in groups])])
        offsets = offsets if options["include_last_offset"] else offsets[:-1]
    else:
        count, length = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        values = draw(st.lists(ids, min_size=count * length, max_size=count * length))
        input, offsets = torch.tensor(values).reshape(count, length), None
    weights = None
    if mode == "sum" and draw(st.booleans()):
        numbers = st.floats(-2, 2, width=16)
        values = draw(st.lists(numbers, min_size=input.numel(), max_size=input.numel()))
        weights = torch.tensor(values, dtype=torch.float32).reshape(input.shape)
    return input, offsets, weights, options


def theirs(**options):
    return nn.EmbeddingBag(ROWS, DIM, _weight=torch.from_numpy(WEIGHT.copy()), **options)


def weighed(pooled):
    """A number that depends on each value differently."""
    return (pooled * torch.arange(1.0, 1 + pooled.numel()).reshape(pooled.shape)).sum()


@settings(max_examples=100)
@given(bags(), st.sampled_from([None, 0.5, 1.5]), st.booleans())
def test_forward_and_step_are_those_of_torch(table, given, max_norm, own_weights):
    input, offsets, weights, options = given
    table.write(np.arange(ROWS), WEIGHT)
    inner = theirs(max_norm=max_norm, **options)
    outer = shardemb.torch.EmbeddingBag(table, max_norm=max_norm, **options)
    results, gradients = [], []
    for module in (inner, outer):
        learned = None if weights is None else weights.clone().requires_grad_(own_weights)
        pooled = module(input, offsets, learned)
        weighed(pooled).backward()
        results.append(pooled.detach())
        gradients.append(learned.grad if own_weights and weights is not None else torch.zeros(0))
    shardemb.torch.Optimizer(outer).step()
    np.testing.assert_allclose(*results[::-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(*gradients[::-1], rtol=1e-5, atol=1e-5)
    expected = (inner.weight - inner.weight.grad).detach()
    np.testing.assert_allclose(table[:], expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(bags())
def test_gradients_are_divided_by_how_often_rows_occur(table, given):
    """The oracle is `functional.embedding`: ``embedding_bag`` of torch 2.13 divides by the counts of other ids."""
    input, offsets, weights, options = given
    table.write(np.arange(ROWS), WEIGHT)
    module = shardemb.torch.EmbeddingBag(table, scale_grad_by_freq=True, **options)
    weighed(module(input, offsets, weights)).backward()
    shardemb.torch.Optimizer(module).step()

    flat = input.reshape(-1)
    padding = module.padding_idx
    kept = torch.ones_like(flat, dtype=torch.bool) if padding is None else flat != padding
    weight = torch.from_numpy(WEIGHT.copy()).requires_grad_()
    looked_up = functional.embedding(flat[kept], weight, scale_grad_by_freq=True)
    if offsets is None:
        offsets = torch.arange(0, flat.numel(), input.shape[1])
    elif options["include_last_offset"]:
        offsets = offsets[:-1]
    before = torch.cat([torch.zeros(1, dtype=torch.long), kept.cumsum(0)])
    pooled = functional.embedding_bag(
        torch.arange(int(kept.sum())),
        looked_up,
        before[offsets],
        mode=options["mode"],
        per_sample_weights=None if weights is None else weights.reshape(-1)[kept],
    )
    weighed(pooled).backward()
    np.testing.assert_allclose(table[:], (weight - weight.grad).detach(), rtol=1e-5, atol=1e-5)


def test_nested_tensors_are_bags(rows):
    input = torch.nested.nested_tensor([torch.tensor([1, 2, 3]), torch.tensor([6])], layout=torch.jagged)
    for mode in ("sum", "mean", "max"):
        expected = theirs(mode=mode)(input)
        assert torch.equal(shardemb.torch.EmbeddingBag(rows, mode=mode)(input).detach(), expected.detach())


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ValueError, "input has to be 1D or 2D Tensor, but got Tensor of dimension 3", ([[[1]]],)),
        (ValueError, "input is 2D, each row a bag, so offsets has to be None", ([[1]], [0])),
        (ValueError, "input is 1D, so offsets has to be a 1D Tensor", ([1],)),
        (ValueError, "must have one dimension", ([1], [[0]])),
        (ValueError, "must begin with 0", ([1, 2], [1])),
        (ValueError, r"per_sample_weights have shape \(1,\)", ([1, 2], [0], [1.0])),
        (IndexError, "row id 9 at position 1 is past the end", ([1, 9], [0])),
        (TypeError, "ids must be a tensor of integers", ([1.0], [0])),
    ],
)
def test_what_are_no_bags_is_refused(rows, error, message, given):
    with pytest.raises(error, match=message):
        shardemb.torch.EmbeddingBag(rows, mode="sum")(*map(torch.tensor, given))


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_weights_are_for_sums(rows, mode):
    for module in (theirs(mode=mode), shardemb.torch.EmbeddingBag(rows, mode=mode)):
        with pytest.raises(NotImplementedError, match="per_sample_weights"):
            module(torch.tensor([[1]]), None, torch.ones(1, 1))


def test_a_mode_is_one_of_torch_s(rows):
    with pytest.raises(ValueError, match='mode must be "mean", "sum" or "max", got \'sqrtn\''):
        shardemb.torch.EmbeddingBag(rows, mode="sqrtn")


def test_it_is_described_as_that_of_torch(rows):
    for options in (
        {"mode": "sum"},
        {"padding_idx": 0, "mode": "max"},
        {"max_norm": 1.0, "norm_type": 1.0, "scale_grad_by_freq": True, "mode": "sum"},
    ):
        assert repr(shardemb.torch.EmbeddingBag(rows, **options)) == repr(theirs(**options))
    assert repr(shardemb.torch.EmbeddingBag(rows)) == repr(theirs())


def test_its_gradient_is_no_larger_than_its_result(rows):
    module = shardemb.torch.EmbeddingBag(rows, mode="sum")
    module(torch.zeros(2, 1000, dtype=torch.long)).sum().backward()
    (lookup,) = module.pending
    assert lookup.leaf.shape == lookup.leaf.grad.shape == (2, DIM)


def test_weights_have_gradients_also_in_evaluation(rows):
    module = shardemb.torch.EmbeddingBag(rows, mode="sum").eval()
    weights = torch.ones(2, 2, dtype=torch.float64, requires_grad=True)
    module(torch.tensor([[1, 2], [3, 3]]), None, weights).sum().backward()
    assert module.pending == []
    np.testing.assert_allclose(weights.grad, WEIGHT[[[1, 2], [3, 3]]].sum(-1), rtol=1e-6)
    assert weights.grad.dtype is torch.float64


def test_what_was_given_may_be_overwritten_before_the_step(rows):
    """As an optimizer does it with weights that are a parameter, and a loader with its buffers."""
    module = shardemb.torch.EmbeddingBag(rows, mode="sum")
    ids, offsets, weights = torch.tensor([1, 2]), torch.tensor([0, 1]), torch.tensor([1.0, 2.0])
    pooled = module(ids, offsets, weights)
    for each in (ids, offsets, weights):
        each.zero_()
    pooled.sum().backward()
    shardemb.torch.Optimizer(module).step()
    expected = WEIGHT.copy()
    expected[1] -= 1
    expected[2] -= 2
    assert np.array_equal(rows[:], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_are_of_the_dtype_asked_for(rows, dtype):
    rows.write(np.arange(ROWS), np.round(WEIGHT * 2) / 2)
    module = shardemb.torch.EmbeddingBag(rows, mode="sum", dtype=dtype)
    pooled = module(torch.tensor([[1, 2]]))
    assert pooled.dtype is dtype
    pooled *= 2
    pooled.sum().backward()
    shardemb.torch.Optimizer(module).step()
    assert np.array_equal(rows.lookup([1, 2]), np.round(WEIGHT[[1, 2]] * 2) / 2 - 2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_is_one_update_with_weights_too(rows, use_reentrant):
    module = shardemb.torch.EmbeddingBag(rows, mode="sum")
    weights = torch.tensor([[1.0, 2.0]], requires_grad=True)

    def forward(weights):
        return module(torch.tensor([[1, 2]]), None, weights).sin()

    checkpoint(forward, weights, use_reentrant=use_reentrant).sum().backward()
    expected = functional.embedding_bag(
        torch.tensor([[1, 2]]),
        weight := torch.from_numpy(WEIGHT.copy()).requires_grad_(),
        per_sample_weights=(other := weights.detach().clone().requires_grad_()),
        mode="sum",
    )
    expected.sin().sum().backward()
    shardemb.torch.Optimizer(module).step()
    np.testing.assert_allclose(weights.grad, other.grad, rtol=1e-5)
    np.testing.assert_allclose(rows[:], (weight - weight.grad).detach(), rtol=1e-5, atol=1e-6)


def test_bags_of_keys(store):
    store.create_vocabulary("words", key_type="string")
    table = store.create_table("keyed", vocabulary="words", embedding_dim=DIM, optimizer=SGD(lr=1.0))
    module = shardemb.torch.EmbeddingBag(table, mode="mean", create=True, padding_idx="pad")
    table.vocabulary.add(["pad"])
    module([["to", "be", "pad"], ["to", "pad", "pad"]]).sum().backward()
    shardemb.torch.Optimizer(module).step()
    assert np.array_equal(table.lookup(["to", "be", "pad"])[:, 0], [-1.5, -0.5, 0])
    module = shardemb.torch.EmbeddingBag(table, mode="sum", missing="zeros")
    weights = torch.ones(2, requires_grad=True)
    pooled = module(["to", "what"], torch.tensor([0]), weights)
    assert pooled.tolist() == [[-1.5] * DIM]
    pooled.sum().backward()
    shardemb.torch.Optimizer(module).step()
    assert weights.grad.tolist() == [-1.5 * DIM, 0]
    assert np.array_equal(table.lookup(["to", "be", "pad"])[:, 0], [-2.5, -0.5, 0])
