"""Train a recommender of DLRM's shape, with its 26 tables in memory or on disk; the training loop is the same.

    python recommender.py ram            tables in memory: torch.nn.EmbeddingBag and torch.optim.Adagrad
    python recommender.py clicks.zarr    tables on disk: shardemb.torch.EmbeddingBag and row-wise Adagrad

DLRM (Naumov et al., 2019): numbers go through a small network, each categorical feature is a bag of rows that are added
up, and a second network sees the products of all pairs of these vectors. Clicks are generated in the shape of Criteo's
data: 13 numbers and 26 features of 1 to 8 values, from 3 to 40 million different ones of which few are frequent (Zipf),
each hashed to a row. Every value has a hidden effect, so there is something to learn for every row.
"""

import argparse
import copy
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import shardemb
import shardemb.torch

DIM, NUMBERS = 16, 13
LR, TABLE_LR, WARM_UP = 2e-3, 0.05, 20
MICRO_BATCHES = 2  # how many batches' gradients are accumulated for a step

# How many values each feature has, and how many of them a sample has on average, after MLPerf's DLRM-DCNv2.
VALUES = [40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10]
VALUES += [2_209, 11_938, 155, 4, 976, 14, 40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36]
BAG = [3, 2, 1, 2, 4, 1, 1, 1, 1, 4, 3, 4, 1, 4, 4, 4, 1, 1, 1, 4, 4, 4, 4, 3, 1, 1]


# ---- data


def clicks(number, size, rows):
    """Make a batch: numbers, for each feature the rows of its values and where each bag begins, labels."""
    rng = np.random.default_rng(number)
    dense = rng.standard_normal((size, NUMBERS)).astype(np.float32)
    score, features = 0.2 * dense.sum(1) - 1.5, []
    for feature, (values, mean) in enumerate(zip(VALUES, BAG, strict=True)):
        lengths = rng.integers(0, 2 * mean + 1, size) if mean > 1 else np.ones(size, np.int64)
        ids = (values ** rng.random(lengths.sum())).astype(np.int64)  # value v has a share of about 1 / v
        bits = hashed(ids, feature)
        np.add.at(score, np.repeat(np.arange(size), lengths), (bits % 1000 / 1000 - 0.5) / mean**0.5)
        offsets = np.cumsum(lengths) - lengths
        features.append((torch.from_numpy(bits % min(values, rows)), torch.from_numpy(offsets)))
    clicked = rng.random(size) < 1 / (1 + np.exp(-score))
    return torch.from_numpy(dense), features, torch.from_numpy(clicked.astype(np.float32))


def hashed(ids, feature):
    """Return a number below 2**32 for each value of a feature."""
    bits = (ids.astype(np.uint64) + np.uint64(feature << 40)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (bits >> np.uint64(32)).astype(np.int64)


# ---- model


class Dlrm(nn.Module):
    """The dense part, around modules that sum up the rows of each bag."""

    def __init__(self, bags):
        super().__init__()
        self.bags = nn.ModuleList(bags)
        vectors = 1 + len(bags)
        self.pairs = torch.tril_indices(vectors, vectors, -1).unbind()
        self.below = nn.Sequential(nn.Linear(NUMBERS, 64), nn.ReLU(), nn.Linear(64, DIM), nn.ReLU())
        width = DIM + vectors * (vectors - 1) // 2
        self.above = nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 1))

    def forward(self, numbers, features):
        """Return the score of each sample."""
        below = self.below(numbers)
        sums = [bag(ids, offsets) for bag, (ids, offsets) in zip(self.bags, features, strict=True)]
        vectors = torch.stack([below, *sums], dim=1)
        products = (vectors @ vectors.mT)[:, *self.pairs]
        return self.above(torch.cat([below, products], dim=1))[:, 0]


def bags_in_memory(rows):
    """Return a module for each feature, with all rows in memory."""
    bags = [nn.EmbeddingBag(min(values, rows), DIM, mode="sum", sparse=True) for values in VALUES]
    for bag in bags:
        nn.init.uniform_(bag.weight, -0.05, 0.05)
    return bags


def bags_on_disk(store, rows):
    """Return a module for each feature, with its rows in a table of a store."""
    for number, values in enumerate(VALUES):
        store.create_table(
            f"feature{number}",
            num_embeddings=min(values, rows),
            embedding_dim=DIM,
            initializer=shardemb.initializers.Uniform(-0.05, 0.05, seed=number),
            optimizer=shardemb.optim.RowWiseAdagrad(lr=TABLE_LR),
        )
    return [shardemb.torch.EmbeddingBag(store[f"feature{number}"], mode="sum") for number in range(26)]


# ---- training


def auc(scores, labels):
    """Return the area under the ROC curve: how often a click has a higher score than what was not clicked."""
    ranks = np.argsort(np.argsort(scores)) + 1.0
    clicked = labels.sum()
    return (ranks[labels == 1].sum() - clicked * (clicked + 1) / 2) / (clicked * (labels.size - clicked))


@torch.no_grad()
def evaluate(model, batches):
    """Return the AUC on batches that are not trained on."""
    model.eval()
    scores = [model(numbers, features).numpy() for numbers, features, _ in batches]
    model.train()
    return auc(np.concatenate(scores), np.concatenate([labels.numpy() for *_, labels in batches]))


def anonymous_memory():
    """Return the memory of this process in MB, without pages of files, which the kernel may drop."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def build(tables, rows):
    """Return the model, the optimizers of its dense part and of its rows, and the store, if they are in one."""
    store = None if tables == "ram" else shardemb.open(tables, mode="w")
    model = Dlrm(bags_in_memory(rows) if store is None else bags_on_disk(store, rows))
    dense = torch.optim.AdamW([*model.below.parameters(), *model.above.parameters()], lr=LR)
    if store is None:
        return model, (dense, torch.optim.Adagrad(model.bags.parameters(), lr=TABLE_LR)), store
    return model, (dense, shardemb.torch.Optimizer(model)), store


def train(tables, steps=300, every=50, size=1024, rows=2_000_000, held_out=8):
    """Train with tables in memory ("ram") or in a new store; return the best AUC, seconds a step, and memory in MB."""
    torch.manual_seed(0)
    model, optimizers, store = build(tables, rows)
    warm_ups = [LambdaLR(each, lambda step: min(1, (step + 1) / WARM_UP)) for each in optimizers]
    unseen = [clicks(10**9 + number, size, rows) for number in range(held_out)]
    best, seconds, memory = 0.0, [], 0.0
    for step in range(1, steps + 1):
        batches = [clicks(step * MICRO_BATCHES + each, size, rows) for each in range(MICRO_BATCHES)]
        start = time.perf_counter()
        for numbers, features, labels in batches:
            with torch.autocast("cpu", torch.bfloat16):
                scores = model(numbers, features)
            loss = nn.functional.binary_cross_entropy_with_logits(scores.float(), labels)
            (loss / MICRO_BATCHES).backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
        seconds.append(time.perf_counter() - start)
        memory = max(memory, anonymous_memory())
        for each in warm_ups:
            each.step()
        if step % every == 0 or step == steps:
            reached = evaluate(model, unseen)
            print(
                f"step {step}: loss {loss.item():.4f}, AUC {reached:.4f}, {1e3 * np.median(seconds):.0f} ms a step"
            )
            if reached > best:
                best, kept = reached, keep(tables, model, optimizers, store, step)
    restore(tables, model, optimizers, store, kept)
    assert evaluate(model, unseen) == best
    if store is not None:
        store.close()
    return best, float(np.median(seconds)), memory


def keep(tables, model, optimizers, store, step):
    """Keep the model as it is: a copy of it, or a commit, which copies no tables."""
    if store is None:
        return copy.deepcopy(model.state_dict())
    return shardemb.torch.save(f"{tables}-rest", model, optimizers, store, step)


def restore(tables, model, optimizers, store, kept):
    """Make the model what was kept last."""
    if store is None:
        model.load_state_dict(kept)
    else:
        store.rollback()
        shardemb.torch.load(f"{tables}-rest", model, optimizers, store)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", help='"ram", or the path of a store, which is overwritten')
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    reached, seconds, memory = train(options.tables, options.steps)
    print(f"AUC {reached:.4f}, {1e3 * seconds:.0f} ms a step, {memory:,.0f} MB of memory")
