"""The same model, batches and optimizer with an embedding of torch and with a table on disk give the same losses."""

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.optim import lr_scheduler  # noqa: E402

import shardemb  # noqa: E402
import shardemb.torch  # noqa: E402
from shardemb.optim import SGD, Adagrad, Adam, AdamW  # noqa: E402

ROWS, DIM, STEPS = 100, 4, 200

# Embedding of torch sparse or not, its optimizer, and the table's.
PAIRS = {
    "SparseAdam": (True, partial(torch.optim.SparseAdam, lr=0.01), Adam(lr=0.01)),
    "Adagrad": (True, partial(torch.optim.Adagrad, lr=0.05), Adagrad(lr=0.05)),
    "SGD": (True, partial(torch.optim.SGD, lr=0.1), SGD(lr=0.1)),
    "momentum": (
        False,
        partial(torch.optim.SGD, lr=0.02, momentum=0.9),
        SGD(lr=0.02, momentum=0.9, dense_equivalent=True),
    ),
    "Adam": (
        False,
        partial(torch.optim.Adam, lr=0.01),
        Adam(lr=0.01, eps_after_correction=True, dense_equivalent=True),
    ),
    "AdamW": (
        False,
        partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        AdamW(lr=0.01, weight_decay=0.1, dense_equivalent=True),
    ),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),
    pytest.mark.filterwarnings("ignore:.*is dense_equivalent, so each change"),
]


class Model(torch.nn.Module):
    """Words, the bag of their neighbours in the same rows, and a dense part."""

    def __init__(self, words, bags):
        super().__init__()
        torch.manual_seed(5)
        self.words, self.bags = words, bags
        self.dense = torch.nn.Sequential(torch.nn.Linear(2 * DIM, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))

    def forward(self, ids, neighbours):
        return self.dense(torch.cat([self.words(ids), self.bags(neighbours)], 1))[:, 0]


class Job:
    """A training job: a model, the optimizers of its two halves, and what is done around a step."""

    def __init__(self, model, rows, clip, *, accumulate, scaled, scheduled):
        self.model, self.clip, self.accumulate = model, clip, accumulate
        self.optimizers = [torch.optim.AdamW(model.dense.parameters(), lr=0.01), rows]
        self.schedulers = [
            lr_scheduler.CosineAnnealingLR(each, STEPS) for each in self.optimizers * scheduled
        ]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=20, enabled=scaled)

    def losses(self):
        generator = torch.Generator().manual_seed(3)
        for step in range(STEPS):
            loss = 0.0
            for each in self.optimizers:
                each.zero_grad()
            for _ in range(self.accumulate):
                ids = torch.randint(ROWS, (8,), generator=generator)
                neighbours = torch.randint(ROWS, (8, 2), generator=generator)
                part = (
                    self.model(ids, neighbours) - torch.sin(ids.float())
                ).square().mean() / self.accumulate
                self.scaler.scale(
                    part * (float("inf") if step == 50 and self.scaler.is_enabled() else 1)
                ).backward()
                loss += part.item()
            for each in self.optimizers:
                self.scaler.unscale_(each)
            self.clip(self.model)
            for each in self.optimizers:
                self.scaler.step(each)
            self.scaler.update()
            for each in self.schedulers:
                each.step()
            yield loss


def clip_theirs(model, *, limit):
    if limit is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit)


def clip_ours(model, *, limit):
    if limit is not None:
        shardemb.torch.clip_grad_norm_(model, limit)


AROUND = {
    "plain": {},
    "scheduled": {"scheduled": True},
    "accumulated": {"accumulate": 3},
    "all": {"limit": 0.1, "scaled": True, "accumulate": 2, "scheduled": True},
}

CASES = [(pair, "plain") for pair in PAIRS]
CASES += [("SparseAdam", "scheduled"), ("Adagrad", "accumulated"), ("SGD", "all"), ("AdamW", "all")]


def both(store, pair, *, limit=None, accumulate=1, scaled=False, scheduled=False):
    """Return the jobs of torch and of a table."""
    sparse, of_torch, optimizer = PAIRS[pair]
    sparse = sparse and limit is None  # torch cannot clip sparse gradients
    torch.manual_seed(4)
    words = torch.nn.Embedding(ROWS, DIM, sparse=sparse)
    bags = torch.nn.EmbeddingBag(ROWS, DIM, mode="mean", sparse=sparse)
    bags.weight = words.weight
    table = store.create_table(
        "t",
        num_embeddings=ROWS,
        embedding_dim=DIM,
        optimizer=optimizer,
        initializer=words.weight.detach().numpy(),
    )
    theirs = Model(words, bags)
    ours = Model(shardemb.torch.Embedding(table), shardemb.torch.EmbeddingBag(table, mode="mean"))
    around = {"accumulate": accumulate, "scaled": scaled, "scheduled": scheduled}
    return (
        Job(theirs, of_torch([words.weight]), partial(clip_theirs, limit=limit), **around),
        Job(ours, shardemb.torch.Optimizer(ours), partial(clip_ours, limit=limit), **around),
        words.weight,
        table,
    )


@pytest.mark.parametrize(("pair", "around"), CASES)
def test_a_table_trains_like_an_embedding_of_torch(store, pair, around):
    options = AROUND[around]
    theirs, ours, weight, table = both(store, pair, **options)
    worst = 0.0
    for one, other in zip(theirs.losses(), ours.losses(), strict=True):
        worst = max(worst, abs(one - other) / max(one, 0.01))
    assert worst < 1e-3
    assert table.step == STEPS - bool(options.get("scaled"))
    assert np.abs(table[:] - weight.detach().numpy()).max() < 2e-3
    store.commit()
