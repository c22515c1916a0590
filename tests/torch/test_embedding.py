"""`Embedding` against `torch.nn.Embedding`, option by option, and what surrounds a forward pass."""

import copy
import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
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


@pytest.fixture(scope="module")
def keyed(store):
    store.create_vocabulary("words", key_type="string")
    return store.create_table("keyed", vocabulary="words", embedding_dim=DIM, optimizer=SGD(lr=1.0))


@pytest.fixture
def rows(table):
    """The table, with its first values."""
    table.write(np.arange(ROWS), WEIGHT)
    return table


def theirs(**options):
    return nn.Embedding(ROWS, DIM, _weight=torch.from_numpy(WEIGHT.copy()), **options)


def stepped(module, table, run):
    """The rows after a step of gradient descent on the sum of what `run` returns, and the gradients' sum."""
    run(module).backward()
    if isinstance(module, nn.Embedding):
        return (module.weight - module.weight.grad).detach().numpy()
    shardemb.torch.Optimizer(module).step()
    return table[:]


def weighed(rows):
    """A number that depends on each value differently."""
    return (rows * torch.arange(1.0, 1 + rows.numel()).reshape(rows.shape)).sum()


SHAPES = st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (2, 2, 2)])


@settings(max_examples=60, deadline=None)
@given(
    st.data(),
    SHAPES,
    st.sampled_from([None, 0, 3, -1, -ROWS]),
    st.sampled_from([None, 0.5, 1.5]),
    st.sampled_from([2.0, 1.0, float("inf")]),
    st.booleans(),
)
def test_forward_and_step_are_those_of_torch(table, data, shape, padding, max_norm, norm_type, by_freq):
    ids = torch.from_numpy(
        np.array(
            data.draw(
                st.lists(st.integers(0, ROWS - 1), min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))
            ),
            np.int64,
        ).reshape(shape)
    )
    options = {
        "padding_idx": padding,
        "max_norm": max_norm,
        "norm_type": norm_type,
        "scale_grad_by_freq": by_freq,
    }
    table.write(np.arange(ROWS), WEIGHT)
    inner, outer = theirs(**options), shardemb.torch.Embedding(table, **options)
    assert inner.padding_idx == outer.padding_idx
    expected, found = inner(ids), outer(ids)
    assert found.shape == expected.shape
    assert found.dtype is expected.dtype
    assert found.requires_grad
    np.testing.assert_allclose(found.detach(), expected.detach(), rtol=1e-6)
    np.testing.assert_allclose(table[:], inner.weight.detach(), rtol=1e-6)
    after = [stepped(each, table, lambda module: weighed(module(ids))) for each in (inner, outer)]
    np.testing.assert_allclose(after[1], after[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_are_of_any_integer_dtype(rows, dtype):
    module = shardemb.torch.Embedding(rows)
    ids = torch.tensor([[1, 2, 6], [0, 0, 3]], dtype=dtype)
    assert np.array_equal(module(ids).detach(), WEIGHT[ids.long()])
    assert np.array_equal(module(ids.T).detach(), WEIGHT[ids.long().T])
    assert np.array_equal(module(ids[:, ::2]).detach(), WEIGHT[ids.long()[:, ::2]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_other_tensors_are_no_ids(rows, dtype):
    with pytest.raises(
        TypeError, match=r"ids must be a tensor of integers, got torch\.\w+: use ids\.long\(\)"
    ):
        shardemb.torch.Embedding(rows)(torch.zeros(3, dtype=dtype))


def test_ids_out_of_range_are_index_errors(rows):
    module = shardemb.torch.Embedding(rows)
    with pytest.raises(IndexError, match="row id 7 at position 1 is past the end"):
        module(torch.tensor([1, 7]))
    assert module.pending == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_results_are_of_the_dtype_asked_for(store, dtype, stored):
    name = f"{stored}{str(dtype)[-8:]}".replace(".", "")
    table = store.create_table(
        name, num_embeddings=ROWS, embedding_dim=DIM, dtype=stored, optimizer=SGD(lr=1.0)
    )
    halves = np.round(WEIGHT * 2) / 2
    table.write(np.arange(ROWS), halves)
    module = shardemb.torch.Embedding(table, dtype=dtype)
    rows = module(torch.tensor([2, 5]))
    assert rows.dtype is dtype
    assert np.array_equal(rows.detach().float(), halves[[2, 5]])
    (rows * 0.5).sum().backward()
    shardemb.torch.Optimizer(module).step()
    assert np.array_equal(table.lookup([2, 5]), halves[[2, 5]] - 0.5)


def test_results_may_be_changed_in_place(rows):
    module = shardemb.torch.Embedding(rows)
    found = module(torch.tensor([1, 1, 4]))
    found *= 2
    found += 1
    found.pow(2).sum().backward()
    shardemb.torch.Optimizer(module).step()
    expected = WEIGHT.copy()
    expected[1] -= 2 * 2 * 2 * (2 * WEIGHT[1] + 1)
    expected[4] -= 2 * 2 * (2 * WEIGHT[4] + 1)
    np.testing.assert_allclose(rows[:], expected, rtol=1e-5)


def test_ids_may_be_overwritten_between_forward_and_step(rows):
    module, ids = shardemb.torch.Embedding(rows), torch.tensor([1, 2])
    found = module(ids)
    ids.fill_(6)
    found.sum().backward()
    shardemb.torch.Optimizer(module).step()
    changed = (rows[:] != WEIGHT).any(axis=1)
    assert np.flatnonzero(changed).tolist() == [1, 2]


@pytest.mark.parametrize("quiet", ["no_grad", "inference_mode", "eval"])
def test_nothing_is_remembered_where_nothing_is_learned(rows, quiet):
    module = shardemb.torch.Embedding(rows)
    if quiet == "eval":
        found = module.eval()(torch.tensor([1]))
    else:
        with getattr(torch, quiet)():
            found = module(torch.tensor([1]))
    assert not found.requires_grad
    assert found.is_inference() == (quiet == "inference_mode")


def test_autocast_does_not_change_the_dtype(rows):
    module = shardemb.torch.Embedding(rows)
    linear = nn.Linear(DIM, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(torch.tensor([1, 2]))
        assert found.dtype is torch.float32 is theirs()(torch.tensor([1, 2])).dtype
        out = linear(found)
        assert out.dtype is torch.bfloat16
    out.sum().backward()
    (lookup,) = module.pending
    assert lookup.leaf.grad.dtype is torch.float32


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_is_one_update(rows, use_reentrant):
    module, linear = shardemb.torch.Embedding(rows), nn.Linear(DIM, DIM)
    ids = torch.tensor([1, 2, 1])

    def forward(begin):
        return torch.tanh(linear(module(ids) + begin))

    begin = torch.zeros(3, DIM, requires_grad=True)
    after = []
    for run in (forward, lambda begin: checkpoint(forward, begin, use_reentrant=use_reentrant)):
        rows.write(np.arange(ROWS), WEIGHT)
        step = rows.step
        after.append(stepped(module, rows, lambda _, run=run: run(begin).sum()))
        assert rows.step == step + 1
    assert np.array_equal(*after)


# ---- torch.compile ----------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.before, self.embedding, self.after = nn.Linear(DIM, DIM), embedding, nn.Linear(DIM, 2)

    def forward(self, ids, begin):
        begin = torch.relu(self.before(begin))
        return torch.relu(self.after(self.embedding(ids) + begin))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # within the compiler
def test_a_model_around_it_compiles_into_two_graphs(rows):
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op != "placeholder"])
        return graph.forward

    torch.manual_seed(0)
    model = Model(shardemb.torch.Embedding(rows))
    compiled = torch.compile(model, backend=backend)
    ids, begin = torch.tensor([1, 5]), torch.ones(2, DIM)
    for _ in range(2):  # compiled once
        after = []
        for each in (model, compiled):
            rows.write(np.arange(ROWS), WEIGHT)
            each(ids, begin).sum().backward()
            shardemb.torch.Optimizer(model).step()
            after.append(rows[:])
        assert np.array_equal(*after)
    assert len(graphs) == 2
    torch._dynamo.reset()


def test_a_model_around_it_does_not_compile_into_one(rows):
    compiled = torch.compile(Model(shardemb.torch.Embedding(rows)), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"torch.compiler.disable"):
        compiled(torch.tensor([1, 5]), torch.ones(2, DIM))
    torch._dynamo.reset()


# ---- as a module ------------------------------------------------------------------------------------------------


def test_it_has_no_parameters_and_moves_freely(rows):
    module = shardemb.torch.Embedding(rows)
    model = nn.Sequential(module, nn.Linear(DIM, 1))
    assert list(module.parameters()) == list(module.buffers()) == []
    model.half().double().float().to("cpu").requires_grad_(False)
    assert model(torch.tensor([1])).shape == (1, 1)
    assert module.num_embeddings == ROWS
    assert module.embedding_dim == DIM


def test_it_is_described_as_that_of_torch(rows):
    for options in (
        {},
        {"padding_idx": 0},
        {"max_norm": 1.0, "norm_type": 1.0},
        {"scale_grad_by_freq": True},
    ):
        assert repr(shardemb.torch.Embedding(rows, **options)) == repr(theirs(**options))
    assert (
        repr(shardemb.torch.Embedding(rows, dtype=torch.bfloat16)) == "Embedding(7, 3, dtype=torch.bfloat16)"
    )


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())]
)
def test_it_is_not_copied(rows, copied):
    model = nn.Sequential(shardemb.torch.Embedding(rows))
    with pytest.raises(TypeError, match="Embedding cannot be copied or pickled: its rows are in table 't'"):
        copied(model[0] if copied is copy.copy else model)


def test_it_refuses_data_parallel(rows):
    replicate = nn.parallel.replicate
    with pytest.raises(RuntimeError, match="does not work in torch.nn.DataParallel"):
        replicate(nn.Sequential(shardemb.torch.Embedding(rows)), [0])


def test_its_weight_is_not_in_memory(rows):
    with pytest.raises(AttributeError, match="has no weight in memory: its rows are in table 't'"):
        shardemb.torch.Embedding(rows).weight  # noqa: B018


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "padding_idx must be within num_embeddings, 7, got 7", {"padding_idx": 7}),
        (ValueError, "padding_idx must be within num_embeddings, 7, got -8", {"padding_idx": -8}),
        (TypeError, "padding_idx must be one row id, got '0'", {"padding_idx": "0"}),
        (ValueError, "dtype must be torch.float32, float64, float16 or bfloat16", {"dtype": torch.int8}),
        (TypeError, "dtype must be torch.float32, float64, float16 or bfloat16", {"dtype": "float32"}),
        (ValueError, "used by row id: missing= and create= are for tables with a", {"create": True}),
    ],
)
def test_what_it_cannot_be_is_refused(rows, error, message, options):
    with pytest.raises(error, match=message):
        shardemb.torch.Embedding(rows, **options)


def test_padding_is_a_key_where_there_are_keys(keyed):
    with pytest.raises(TypeError, match="padding_idx must be one key, of type string, got 0"):
        shardemb.torch.Embedding(keyed, padding_idx=0)


def test_the_padding_of_a_table_is_that_of_its_modules(store):
    padded = store.create_table("padded", num_embeddings=ROWS, embedding_dim=DIM, padding_idx=-1)
    assert shardemb.torch.Embedding(padded).padding_idx == ROWS - 1
    assert shardemb.torch.Embedding(padded, padding_idx=-1).padding_idx == ROWS - 1
    with pytest.raises(
        ValueError, match="'padded' has the row 6 for padding, so padding_idx cannot be 0; leave it"
    ):
        shardemb.torch.Embedding(padded, padding_idx=0)


def test_it_is_of_a_table(store):
    with pytest.raises(TypeError, match="table must be a table of a store"):
        shardemb.torch.Embedding(torch.zeros(3, 2))
    raw = store.create_table("raw", num_embeddings=4, embedding_dim=4, dtype="raw")
    with pytest.raises(ValueError, match="holds raw bytes"):
        shardemb.torch.Embedding(raw)


def test_rows_of_a_reader_are_not_shortened(tmp_path):
    with shardemb.open(tmp_path / "s.zarr") as store:
        store.create_table("t", num_embeddings=ROWS, embedding_dim=DIM, initializer=WEIGHT)
        store.commit()
    with shardemb.open(tmp_path / "s.zarr", mode="r") as store:
        module = shardemb.torch.Embedding(store["t"], max_norm=0.1)
        with pytest.raises(shardemb.ReadOnlyError):
            module(torch.tensor([1]))


def test_shortening_keeps_the_optimizer_s_state(store):
    table = store.create_table(
        "adam", num_embeddings=ROWS, embedding_dim=DIM, optimizer=shardemb.optim.Adam(lr=1.0)
    )
    table.update([1], np.ones((1, DIM), np.float32))
    before = table.state("exp_avg", [1])
    shardemb.torch.Embedding(table, max_norm=0.5).eval()(torch.tensor([1]))
    assert np.linalg.norm(table.lookup(1)) == pytest.approx(0.5)
    assert np.array_equal(table.state("exp_avg", [1]), before)


# ---- keys -------------------------------------------------------------------------------------------------------


def test_keys_are_created_in_training_only(keyed):
    module = shardemb.torch.Embedding(keyed, missing="zeros", create=True)
    assert module([["to", "be"], ["or", "to"]]).shape == (2, 2, DIM)
    assert list(keyed) == ["to", "be", "or"]
    module.eval()(["not"])
    assert "not" not in keyed
    module.train()(["to", "be"]).sum().backward()
    shardemb.torch.Optimizer(module).step()
    assert np.array_equal(keyed.lookup(["to", "be", "or"]), [[-1] * DIM, [-1] * DIM, [0] * DIM])


def test_unknown_keys_are_an_error_unless_said_otherwise(keyed):
    keyed.vocabulary.add(["to"])
    with pytest.raises(KeyError, match="key 'what' at position 1 has no row"):
        shardemb.torch.Embedding(keyed)(["to", "what"])
    module = shardemb.torch.Embedding(keyed, missing="initial")
    before = keyed.lookup(["to"])
    module(["to", "what", "what"]).sum().backward()
    shardemb.torch.Optimizer(module).step()
    assert np.array_equal(keyed.lookup(["to"]), before - 1)


@pytest.mark.parametrize("key_type", ["int64", "bytes"])
def test_keys_of_other_types(store, key_type):
    vocabulary = store.create_vocabulary(key_type, key_type=key_type)
    table = store.create_table(key_type, vocabulary=key_type, embedding_dim=DIM, optimizer=SGD(lr=1.0))
    keys = {"int64": torch.tensor([-5, 2**60, -5]), "bytes": [b"a\0", b"b", b"a\0"]}[key_type]
    module = shardemb.torch.Embedding(table, create=True, padding_idx=keys[1])
    module(keys).sum().backward()
    shardemb.torch.Optimizer(module).step()
    assert len(vocabulary) == 2
    assert table.lookup(keys.numpy() if key_type == "int64" else keys).tolist() == [
        [-2] * DIM,
        [0] * DIM,
        [-2] * DIM,
    ]
