"""Two processes that share a store, against one that has it."""

import os
import time

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.distributed as dist  # noqa: E402
from support.ranks import RankPool  # noqa: E402

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402
from shardemb.ranks.transport import Transport  # noqa: E402
from shardemb.torch import Embedding, Optimizer, Pipeline, Ranks, prefetching  # noqa: E402

ROWS, DIM, SIZE = 60, 4, 2

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = RankPool(SIZE, tmp_path_factory.mktemp("ranks") / "meeting")
    yield pool
    pool.close()


def new_store(path, optimizer=None):
    store = shardemb.open(path)
    options = {
        "embedding_dim": DIM,
        "optimizer": optimizer or shardemb.optim.Adam(lr=0.1),
        "initializer": shardemb.initializers.Uniform(-1, 1, seed=3),
    }
    store.create_table("t", num_embeddings=ROWS, **options)
    store.create_table("u", num_embeddings=ROWS, padding_idx=0, **options)
    store.create_vocabulary("v", key_type="string")
    store.create_table("k", vocabulary="v", **options)
    store.commit(step=0)
    return store


def opened(rank, path, **options):
    return Ranks(new_store(path) if rank == 0 else None, timeout=60, **options)


def ids_of(rank, count=7):
    return np.random.default_rng(rank).integers(1, ROWS, count)


def grads_of(rank, count=7):
    return np.random.default_rng(10 + rank).standard_normal((count, DIM)).astype(np.float32)


def joined(function, *arguments):
    return np.concatenate([function(rank, *arguments) for rank in range(SIZE)])


# ---- messages ---------------------------------------------------------------------------------------------------


def send_and_receive(rank, messages):
    transport = Transport(dist.group.WORLD, 0, 60.0)
    for number, message in enumerate(messages):
        if rank == 0:
            own, other = transport.requests(message)
            assert own is message
            assert repr(other) == repr((1, number, message))
            transport.answer([None, other])
        else:
            assert repr(transport.ask((1, number, message))) == repr((1, number, message))
    if rank == 0:
        assert transport.requests("last") == ["last", "told"]
    else:
        transport.tell("told")
    transport.close()
    return True


def test_any_object_travels_with_its_arrays(pool):
    large = np.arange(100_000, dtype=np.float32).reshape(-1, 4)
    read_only = large.copy()
    read_only.flags.writeable = False
    messages = [
        None,
        "x" * 10_000,  # longer than a head
        {"a": large, "b": [large[::2], np.empty((0, 4)), np.float32(3)]},
        [np.arange(size, dtype=np.uint8) for size in (1023, 1024, 1025, 4088, 4096, 2**21)],
        read_only,
        np.array(["a", None], dtype=object),
    ]
    assert pool.run(send_and_receive, messages) == [True] * SIZE


# ---- calls ------------------------------------------------------------------------------------------------------


def use(rank, path):
    """Make every call once; return what it gave, so that it can be compared."""
    with opened(rank, path, reduce="sum") as ranks:
        table, padded, keyed = ranks["t"], ranks["u"], ranks["k"]
        assert list(ranks) == ["t", "u", "k"]
        assert (table.shape, table.dtype, table.padding_idx, padded.padding_idx) == (
            (60, 4),
            "float32",
            None,
            0,
        )
        assert table.store is ranks
        assert hasattr(keyed, "vocabulary") != hasattr(table, "vocabulary")
        ids, grads, offsets = ids_of(rank), grads_of(rank), [0, 3, 3 + rank]
        keys = np.array([f"k{number % 5}" for number in ids])
        bags = shardemb.Bags(ids, offsets, "mean", padding_idx=int(ids_of(0)[0]))
        out = np.empty((7, DIM), np.float32)
        found = {
            "rows": table.lookup(ids),
            "half": table.lookup(ids.reshape(1, 7), dtype="float16"),
            "none": table.lookup(ids[: 3 * rank]),
            "clip": table.lookup([-1, 1000], out_of_range="clip"),
            "bags": padded.lookup_bag(ids, offsets, weights=grads[:, 0]),
            "many": ranks.lookup({"t": ids, "u": ids[:2]}),
            "mean": ranks.lookup_bag({"t": bags, "u": (ids, offsets)}),
            "weights": padded.bag_weight_gradient(ids, offsets, grads[:3], weights=grads[:, 0]),
            "zeros": keyed.lookup(keys, missing="zeros"),
            "found": keyed.vocabulary.lookup(keys),
            "created": keyed.lookup(keys, create=True),
            "keyed bags": keyed.lookup_bag(keys, offsets, mode="max"),
            "given back": table.lookup(ids, out=out) is out,
        }
        keyed.vocabulary.lookup(keys)
        rows = keyed.num_embeddings
        table.prefetch(ids, for_update=True)
        assert ranks.gradient_norm({"t": (ids, grads)}) > 0
        found["norm"] = ranks.update({"t": (ids, grads), "k": (keys, grads)}, max_norm=0.5)
        found["unscaled"] = table.update(ids, grads, scale=2.0)
        table.update_bag(ids, offsets, grads[:3])
        padded.update_bag(ids, offsets, grads[:3], mode="mean", scale_grad_by_freq=True)
        padded.update([0, 1], grads[:2])  # the row of padding is left alone
        keyed.update_bag(keys, offsets, grads[:3], mode="sqrtn")
        keyed.update(keys[:1], grads[:1])
        ranks.update({"t": (bags, grads[:3])} if rank else {})  # one has nothing
        padded.write([rank + 1, 5], grads[:2])
        keyed.write(keys[:1], grads[:1])
        found["steps"] = table.step, padded.step, keyed.step, rows
        found["commit"] = ranks.commit(step=5, metadata={"rank": rank})
        assert ranks.last_commit == found["commit"]
        table.set_optimizer(shardemb.optim.Adam(lr=0.5))
        found["lr"] = table.optimizer.lr
        before = table.lookup(ids)
        table.update(ids, grads)
        changed = not np.array_equal(table.lookup(ids), before)
        ranks.rollback()
        assert changed
        assert np.array_equal(table.lookup(ids), before)
        found["back"] = table.optimizer.lr
    with pytest.raises(shardemb.StoreClosedError, match="closed"):
        table.lookup(ids)
    return found


def expected_of(path):
    """Return what a single process gets, by the batches one after the other, cut into those of the ranks."""
    found = [{}, {}]

    def cut(name, rows, counts=(7, 7)):
        found[0][name], found[1][name] = rows[: counts[0]], rows[counts[0] :]

    with new_store(path) as store:
        table, padded, keyed = store["t"], store["u"], store["k"]
        ids, grads = joined(ids_of), joined(grads_of)
        offsets = np.array([0, 3, 3, 7, 10, 11])
        few = np.concatenate([grads_of(rank)[:3] for rank in range(SIZE)])
        keys = np.array([f"k{number % 5}" for number in ids])
        cut("rows", table.lookup(ids))
        cut("half", table.lookup(ids.reshape(2, 1, 7), dtype="float16").reshape(2, 7, DIM), (1, 1))
        cut("none", table.lookup(ids_of(1)[:3]), (0, 3))
        cut("clip", table.lookup([0, ROWS - 1] * 2), (2, 2))
        weights = grads[:, 0]
        cut("bags", padded.lookup_bag(ids, offsets, weights=weights), (3, 3))
        cut("weights", padded.bag_weight_gradient(ids, offsets, few, weights=weights))
        cut("zeros", keyed.lookup(keys, missing="zeros"))
        cut("found", store.vocabularies["v"].lookup(keys))
        cut("created", keyed.lookup(keys, create=True))
        cut("keyed bags", keyed.lookup_bag(keys, offsets, mode="max"), (3, 3))
        norm = store.update({"t": (ids, grads), "k": (keys, grads)}, max_norm=0.5)
        unscaled = table.update(ids, grads, scale=2.0)
        table.update_bag(ids, offsets, few)
        padded.update_bag(ids, offsets, few, mode="mean", scale_grad_by_freq=True)
        padded.update([0, 1, 0, 1], np.concatenate([grads_of(rank)[:2] for rank in range(SIZE)]))
        keyed.update_bag(keys, offsets, few, mode="sqrtn")
        keyed.update(keys[[0, 7]], grads[[0, 7]])
        one = shardemb.Bags(ids_of(1), [0, 3, 4], "mean", padding_idx=int(ids_of(0)[0]))
        store.update({"t": (one, grads_of(1)[:3])})
        padded.write([1, 5, 2, 5], np.concatenate([grads_of(rank)[:2] for rank in range(SIZE)]))
        for each in found:
            each |= {
                "norm": norm,
                "unscaled": unscaled,
                "steps": (4, 2, 3, keyed.num_embeddings),
                "lr": 0.5,
                "back": 0.1,
            }
            each["commit"] = shardemb.Commit(2, 5, {"rank": 0})
        rows = [store[name].lookup(np.arange(ROWS)) for name in ("t", "u")]
        store.commit()
    return found, rows


def test_every_call_gives_what_one_process_gets(pool, tmp_path):
    expected, rows = expected_of(tmp_path / "one.zarr")
    found = pool.run(use, tmp_path / "two.zarr")
    for rank in range(SIZE):
        for name, value in expected[rank].items():
            got = found[rank][name]
            if isinstance(value, np.ndarray):
                got = got.reshape(value.shape)
                assert got.tobytes() == value.tobytes(), name
            else:
                assert got == value, name
        assert np.array_equal(found[rank]["many"]["t"], found[rank]["rows"])
        assert found[rank]["many"]["u"].shape == (2, DIM)
        assert found[rank]["mean"]["t"].shape == (3, DIM)
        assert found[rank]["given back"]
    with shardemb.open(tmp_path / "two.zarr", mode="r") as store:
        for name, each in zip(("t", "u"), rows, strict=True):
            assert store[name].lookup(np.arange(ROWS)).tobytes() == each.tobytes()


# ---- training -----------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.words, self.dense = Embedding(table), torch.nn.Linear(DIM, 1)

    def forward(self, batch):
        output = self.dense(self.words(batch[0])).squeeze(-1)
        return ((output - batch[1]) ** 2).mean(), output


def make_batches(rank, count=6, size=8):
    ids = np.random.default_rng(rank).integers(0, ROWS, (count, size))
    return [(torch.from_numpy(each), torch.from_numpy(each % 3).float()) for each in ids]


def train(rank, path):
    """Train with the dense part in DistributedDataParallel, rows ahead, a scheduler."""
    with opened(rank, path) as ranks:
        torch.manual_seed(0)
        inner = Model(ranks["t"])
        model = torch.nn.parallel.DistributedDataParallel(inner)
        assert [name for name, _ in inner.named_parameters()] == ["dense.weight", "dense.bias"]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), Optimizer(inner)]
        losses = []
        for batch in prefetching(make_batches(rank), model):
            for each in optimizers:
                each.zero_grad()
            loss, _ = model(batch)
            loss.backward()
            for each in optimizers:
                each.step()
            losses.append(loss.item())
        commit = ranks.commit(step=len(losses))
        rows = ranks["t"].lookup(np.arange(ROWS))
        return losses, rows, inner.dense.weight.detach().numpy(), commit


def test_two_ranks_train_what_one_does_with_the_batches_joined(pool, tmp_path):
    found = pool.run(train, tmp_path / "two.zarr")
    with new_store(tmp_path / "one.zarr") as store:
        torch.manual_seed(0)
        model = Model(store["t"])
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), Optimizer(model)]
        pairs = zip(make_batches(0), make_batches(1), strict=True)
        batches = [tuple(torch.cat(each) for each in zip(*pair, strict=True)) for pair in pairs]
        pipeline, losses = Pipeline(model, optimizers), []
        iterator = iter(batches)
        for _, target in batches:
            output = pipeline.progress(iterator)
            losses.append(((output - target) ** 2).mean().item())
        assert len(target) == 16
        rows = store["t"].lookup(np.arange(ROWS))
        commit = store.commit(step=len(losses))
    assert np.allclose(np.mean([each[0] for each in found], 0), losses, 1e-5)
    for _, got, weight, made in found:
        assert np.allclose(got, rows, 1e-4, 1e-5)
        assert np.allclose(weight, model.dense.weight.detach().numpy(), 1e-5)
        assert made == commit


# ---- what goes wrong ----------------------------------------------------------------------------------------------


def fail(rank, path):
    """Return the messages of what is refused; after each, the ranks go on."""
    said = []

    def refused(kind, function):
        try:
            function()
        except kind as error:
            said.append((str(error), *getattr(error, "__notes__", [])))
        else:
            raise AssertionError("nothing was raised")

    with opened(rank, path) as ranks:
        table = ranks["t"]
        before = table.lookup(np.arange(ROWS))
        refused(shardemb.RowIdError, lambda: table.lookup([1, 500 if rank else 2]))
        refused(TypeError, lambda: table.lookup([1.5] if rank else [1]))
        refused(ValueError, lambda: table.update([1], np.full((1, DIM), np.nan if rank else 0.0)))
        refused(ValueError, lambda: table.update([1], np.zeros((1, DIM + rank))))
        refused(shardemb.UnknownKeyError, lambda: ranks["k"].lookup(["missing"]))
        refused(shardemb.ShardEmbError, lambda: ranks.commit() if rank else table.lookup([1]))
        refused(shardemb.ShardEmbError, lambda: table.lookup([1], dtype="float16" if rank else None))
        refused(ValueError, lambda: table.lookup([1]) if rank else table.lookup_bag([1], [0]))
        refused(shardemb.TableNotFoundError, lambda: ranks["new"])
        assert np.array_equal(table.lookup(np.arange(ROWS)), before)
        if rank == 0:
            ranks._store.create_table("new", num_embeddings=10, embedding_dim=2)
        ranks.refresh()
        assert ranks["new"].lookup([1]).shape == (1, 2)
        ranks.commit()
    return said


def test_what_is_refused_on_one_rank_is_refused_on_all(pool, tmp_path):
    here, there = pool.run(fail, tmp_path / "s.zarr")
    assert here[0][0] == there[0][0]
    assert "row id 500 at position 1" in here[0][0]
    assert here[0][1] == there[0][1] == "these are the ids of rank 1"
    for each in (here, there):
        assert "gradients have shape (1, 5)" in each[3][0]
        assert "'missing'" in each[4][0]
        assert "all ranks have to make the same calls in the same order" in each[5][0]
        assert "dtype='float16'" in each[6][0]
        assert "call refresh() on all ranks" in each[8][0]
    assert "raised on rank 1" in here[3]


def disagree(rank, path):
    said = []
    store = new_store(path) if rank == 0 else None
    for given, options in ((store, {"reduce": "max"}), (store if rank else None, {}), (store, {"owner": 1})):
        with pytest.raises(ValueError) as caught:
            Ranks(given, timeout=60, **options)
        said.append(str(caught.value))
    with pytest.raises(shardemb.ShardEmbError, match="the same calls"):
        Ranks(store, timeout=60, reduce="sum" if rank else "mean")
    if rank == 0:
        store.close()
    return said


def test_ranks_that_do_not_agree_are_refused(pool, tmp_path):
    for said in pool.run(disagree, tmp_path / "s.zarr"):
        assert 'reduce must be "mean" or "sum"' in said[0]
        assert "the store belongs to rank 0 alone, but rank 0 has none" in said[1]
        assert "the store belongs to rank 1 alone, but rank" in said[2]


def be_late(rank, path):
    ranks = opened(rank, path)
    late = Transport(dist.new_group(backend="gloo"), 0, 0.2)  # whose connections end by it
    began = time.monotonic()
    if rank == 0:  # the other does not call
        with pytest.raises(shardemb.ShardEmbError, match=r"waited for rank 1 in vain.*timeout of 0.2 s"):
            late.requests("x")
        with pytest.raises(shardemb.ShardEmbError, match="in vain"):
            late.requests("x")
    ranks.close()
    return time.monotonic() - began


def test_a_rank_that_does_not_call_is_not_waited_for_longer_than_asked(pool, tmp_path):
    assert max(pool.run(be_late, tmp_path / "s.zarr")) < 30


def lose_one(rank, path):
    ranks = opened(rank, path)
    ranks["t"].lookup([1])
    if rank == 1:
        os._exit(3)
    with pytest.raises(
        shardemb.ShardEmbError, match=r"rank 0 of 2 waited for rank 1 in vain.*start all of them again"
    ):
        ranks["t"].lookup([1])
    with pytest.raises(RuntimeError), ranks:
        raise RuntimeError("the program ends by it")
    shardemb.open(path, mode="r+").close()  # the store was closed
    return "told"


def test_a_rank_that_ends_does_not_leave_the_others_hanging(tmp_path):
    pool = RankPool(SIZE, tmp_path / "meeting")
    try:
        for end in pool._ends:
            end.send((lose_one, (tmp_path / "s.zarr",)))
        assert pool.result(0) == "told"
    finally:
        pool.close()


def test_without_a_process_group_there_is_a_way_out():
    with pytest.raises(RuntimeError, match=r"call torch.distributed.init_process_group\(\) first"):
        Ranks(None)


def resume(rank, path):
    """Train, save, go on, go back to what was saved and go on again."""
    with opened(rank, path / "s.zarr") as ranks:
        model = torch.nn.Sequential(Embedding(ranks["t"]), torch.nn.Linear(DIM, 1))
        for each in model.parameters():
            torch.nn.init.constant_(each, 0.1)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1), Optimizer(model)]

        def step():
            loss = wrapped(torch.from_numpy(ids_of(rank))).square().mean()
            for each in optimizers:
                each.zero_grad()
            loss.backward()
            for each in optimizers:
                each.step()
            return loss.item()

        step()
        commit = shardemb.torch.save(path / "rest", model, optimizers, ranks, 7, metadata={"mine": 1})
        state = model.state_dict()
        losses = [step() for _ in range(3)]
        ranks.rollback()
        assert shardemb.torch.load(path / "rest", model, optimizers, ranks) == commit
        assert [step() for _ in range(3)] == losses
        ranks.rollback()
        reference = state["0._extra_state"][0]
        assert (reference["commit"], reference["store"]) == (commit.id, ranks.uuid)
        assert (commit.step, commit.metadata["mine"]) == (7, 1)
        return len(os.listdir(path / "rest"))


def test_ranks_save_and_load_together(pool, tmp_path):
    assert pool.run(resume, tmp_path) == [1, 1]
