"""Tables in the place of torch's modules, a training step at a time, against torch in memory (T1, T2, T6)."""

import itertools
import subprocess
import sys
from functools import partial

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import DIM

from . import peers
from .data import warm
from .processes import CannotRun
from .racing import Contender, race, same_bytes
from .reading import FULL
from .results import Arm, Case, at_most, faster
from .training import BATCH, STEPS_BEFORE, TIMED, make_batches, make_steps, step_of

OURS = "shardemb.torch"


def _torch():
    """Return torch, which all arms need."""
    if not peers.has("torch"):
        raise CannotRun("torch is not installed")
    import torch

    return torch


def _optimizer(module):
    import shardemb.torch

    return shardemb.torch.Optimizer(module)


def _backward(torch, results, gradients):
    """Run backward with gradients that nobody else holds, as those are that a network has computed."""

    class Given(torch.autograd.Function):
        @staticmethod
        def forward(context, *results):
            return results[0].new_zeros(())

        @staticmethod
        def backward(context, _):
            return tuple(gradients.pop(0) for _ in results)

    Given.apply(*results).backward()


# ---- T1: one row for each id --------------------------------------------------------------------------------------


def rows(settings):
    """T1: forward, backward and step of an Embedding with Adam, in memory."""
    _torch()
    return [_rows(settings, distribution) for distribution in ("uniform", "zipf")]


def _rows(settings, distribution):
    import shardemb.torch

    from .torches import TorchAdam

    data = settings.data(FULL)
    batch = settings.batch(BATCH, data.rows)
    make, theirs = make_batches(distribution, data.rows), TorchAdam(np.array(data.raw))
    with shardemb.open(data.store("train-Adam", common.optimizer("Adam"))) as store:
        table = store["rows"]
        warm(table)
        module = shardemb.torch.Embedding(table)
        step = _step_of_rows(module, _optimizer(module))
        if not same_bytes(step(given := make(batch)), theirs.step(given)):
            raise AssertionError(f"{theirs.name} returned other bytes")
        contenders = [
            Contender(OURS, step),
            Contender("lookup + update, without torch", step_of(table)),
            Contender(theirs.name, theirs.step),
        ]
        before = STEPS_BEFORE if settings.scale >= 0.2 else STEPS_BEFORE // 10
        for given in make_steps(distribution, data.rows, batch, before):
            for each in contenders:
                each.call(given)
        arms = race(contenders, make, batch, settings.times(TIMED))
        store.rollback()
    bars = (
        faster(arms, OURS, theirs.name, 2.5, stretch=5.0),
        _overhead(arms, OURS, contenders[1].name),
    )
    return Case(distribution, tuple(arms.values()), bars, True)


def _step_of_rows(module, optimizer):
    import torch

    def step(batch):
        ids, grads = batch
        found = module(torch.from_numpy(ids))
        _backward(torch, [found], [torch.from_numpy(grads)])
        optimizer.step()
        optimizer.zero_grad()
        return found.detach()

    return step


def _overhead(arms, ours, plain):
    """Return the bar of what the adapter costs beside the calls that it makes."""
    return at_most(
        "the adapter's own overhead", arms[ours].median / arms[plain].median - 1, 0.1, "of the calls"
    )


# ---- T2: 26 bags of a batch ---------------------------------------------------------------------------------------

FEATURES, SAMPLES, LONGEST = 26, 2048, 15
"""Features of a sample, as Criteo's, and samples of a batch; each feature of a sample has 1 to `LONGEST` ids."""

LARGEST = 1_500_000
"""Rows of the largest table; the smallest has 4, and all together 3.7 million."""

REPETITIONS = 10

DENSE = 13
"""Numbers of a sample besides its features."""

KEYS = np.int64(0x9E3779B97F4A7C15 - 2**64)
"""Times a row id: a key that looks like a hash, and stands for that row."""

PLAIN = "lookup_bag + update_bag, without torch"
THEIRS = "torch EmbeddingBags, Adagrad in RAM"


def bags(settings):
    """T2: the embeddings of a DLRM, by row id and by key: forward, backward, update; and its whole step."""
    torch = _torch()
    sizes = np.geomspace(4, settings.rows(LARGEST), FEATURES).astype(np.int64)
    samples = max(16, int(settings.batch(SAMPLES, settings.rows(FULL))))
    path = settings.folder / "features.zarr"
    theirs = _TorchBags(torch, sizes)
    with shardemb.open(path, mode="w") as store:
        for number, (size, weight) in enumerate(zip(sizes, theirs.weights(), strict=True)):
            _create(store, number, int(size), weight)
        store.commit()
        make = partial(_make_features, sizes, random=np.random.default_rng(0))
        return [
            _embeddings(settings, store, theirs, make, samples, keyed=False),
            _embeddings(settings, store, theirs, make, samples, keyed=True),
            _whole_steps(settings, store, theirs, make, samples),
        ]


def _create(store, number, size, weight):
    """Create a table of rows, and one of keys with the same rows."""
    optimizer = shardemb.optim.RowWiseAdagrad(lr=0.01)
    store.create_table(f"f{number}", num_embeddings=size, embedding_dim=DIM, optimizer=optimizer).write(
        np.arange(size), weight
    )
    vocabulary = store.create_vocabulary(f"f{number}", key_type="int64")
    vocabulary.add(np.arange(size) * KEYS)
    table = store.create_table(f"k{number}", vocabulary=f"f{number}", embedding_dim=DIM, optimizer=optimizer)
    table.rows.write(np.arange(size), weight)


def _make_features(sizes, samples, *, random):
    """Make a batch: for each feature ids and offsets, and the gradient by what they are pooled to."""
    made = []
    for size in sizes:
        counts = random.integers(1, LONGEST + 1, samples)
        ids = common.make_ids("zipf", int(size), int(counts.sum()))
        offsets = np.concatenate([[0], np.cumsum(counts)[:-1]])
        made.append((ids, offsets, common.make_values(samples) - np.float32(0.5)))
    return made


class _TorchBags:
    """26 modules in memory, and row-wise Adagrad's nearest of torch for sparse gradients."""

    def __init__(self, torch, sizes):
        self.torch = torch
        self.modules = torch.nn.ModuleList(
            torch.nn.EmbeddingBag(int(size), DIM, mode="sum", sparse=True) for size in sizes
        )
        self.optimizer = torch.optim.Adagrad(self.modules.parameters(), lr=0.01)

    def weights(self):
        return [each.weight.detach().numpy() for each in self.modules]

    def pooled(self, batch):
        from_numpy = self.torch.from_numpy
        return [
            module(from_numpy(ids), from_numpy(offsets))
            for module, (ids, offsets, _) in zip(self.modules, batch, strict=True)
        ]

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()


class _OurBags:
    """The same from tables, by row id or by key."""

    def __init__(self, store, prefix):
        import torch

        import shardemb.torch

        self.torch, self.keyed = torch, prefix == "k"
        tables = [store[f"{prefix}{number}"] for number in range(FEATURES)]
        self.module = shardemb.torch.EmbeddingBagCollection(tables)
        self.optimizer = _optimizer(self.module)
        self.names = [table.name for table in tables]

    def given(self, batch):
        from_numpy = self.torch.from_numpy
        return {
            name: (from_numpy(ids * KEYS if self.keyed else ids), from_numpy(offsets))
            for name, (ids, offsets, _) in zip(self.names, batch, strict=True)
        }

    def pooled(self, batch):
        return list(self.module(batch).to_dict().values())

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.optimizer.step()


def _embeddings(settings, store, theirs, make, samples, *, keyed):
    torch, ours = theirs.torch, _OurBags(store, "k" if keyed else "f")

    def prepared(samples):
        batch = make(samples)
        tensors = ours.given(batch)
        arrays = {name: (ids.numpy(), offsets.numpy()) for name, (ids, offsets) in tensors.items()}
        return batch, tensors, arrays

    def step(modules, which, given):
        pooled = modules.pooled(given[which])
        _backward(torch, pooled, [torch.from_numpy(grads) for _, _, grads in given[0]])
        modules.step()
        modules.zero_grad()
        return [each.detach() for each in pooled]

    def plainly(given):
        pooled = store.lookup_bag(given[2])
        store.update_bag(
            {
                name: (*each, grads)
                for (name, each), (_, _, grads) in zip(given[2].items(), given[0], strict=True)
            }
        )
        return list(pooled.values())

    contenders = [
        Contender(OURS, partial(step, ours, 1)),
        Contender(PLAIN, plainly),
        Contender(THEIRS, partial(step, theirs, 0)),
    ]
    given = prepared(samples)
    with torch.no_grad():
        pairs = zip(ours.pooled(given[1]), theirs.pooled(given[0]), strict=True)
        equal = all(np.allclose(one, other, 1e-3, 1e-3) for one, other in pairs) if not keyed else None
    for _ in range(2):
        for each in contenders:
            each.call(prepared(samples))
    arms = race(contenders, prepared, samples, settings.times(REPETITIONS), keep=False)
    store.rollback()
    target, stretch = (1.5, 2.0) if keyed else (3.0, 5.0)
    bars = (faster(arms, OURS, THEIRS, target, stretch=stretch), _overhead(arms, OURS, PLAIN))
    note = f"{FEATURES} features of {(LONGEST + 1) / 2:.0f} ids on average in each sample"
    return Case("by key" if keyed else "by row id", tuple(arms.values()), bars, equal, notes=(note,))


# ---- the whole step of a model ----------------------------------------------------------------------------------


def _dense_part(torch):
    """Return the dense part of a DLRM: a network for numbers, dot products of all features, a network for these."""
    pairs = torch.triu_indices(FEATURES + 1, FEATURES + 1, 1)

    def network(*sizes):
        layers = [
            layer
            for before, after in itertools.pairwise(sizes)
            for layer in (torch.nn.Linear(before, after), torch.nn.ReLU())
        ]
        return torch.nn.Sequential(*layers[:-1])

    class Dense(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.below = network(DENSE, 256, DIM)
            self.above = network(pairs.shape[1] + DIM, 256, 1)

        def forward(self, numbers, pooled):
            first = self.below(numbers)
            every = torch.stack([first, *pooled], dim=1)
            products = (every @ every.transpose(1, 2))[:, pairs[0], pairs[1]]
            return self.above(torch.cat([first, products], dim=1)).squeeze(1)

    return Dense()


def _whole_steps(settings, store, theirs, make, samples):
    torch, ours = theirs.torch, _OurBags(store, "f")

    def step_of_model(modules):
        torch.manual_seed(0)
        dense = _dense_part(torch)
        optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-3)

        def step(given):
            batch, numbers, labels = given
            scores = dense(numbers, modules.pooled(batch if modules is theirs else ours.given(batch)))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
            loss.backward()
            for each in (optimizer, modules):
                each.step()
                each.zero_grad()

        return step

    def prepared(samples):
        return make(samples), torch.rand(samples, DENSE), torch.randint(2, (samples,)).float()

    contenders = [Contender(OURS, step_of_model(ours)), Contender(THEIRS, step_of_model(theirs))]
    for each in contenders:
        each.call(prepared(samples))
    arms = race(contenders, prepared, samples, settings.times(REPETITIONS), keep=False)
    store.rollback()
    return Case("a whole step", tuple(arms.values()), (faster(arms, OURS, THEIRS, 1.0),))


# ---- T6: the import -----------------------------------------------------------------------------------------------

IMPORT = """
import time, torch
start = time.perf_counter()
import shardemb.torch
print(time.perf_counter() - start)
"""


def imports(settings):
    """T6: what importing shardemb.torch takes in a process that has imported torch."""
    _torch()
    seconds = [
        float(subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout)
        for _ in range(settings.times(5))
    ]
    arm = Arm("import shardemb.torch", 1, tuple(seconds))
    return [Case("after torch", (arm,), (at_most("import", arm.median, 0.3, "s"),))]
