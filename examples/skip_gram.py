"""Train word vectors with torch (skip-gram with negative samples: Mikolov et al., 2013), in memory or on disk.

    python skip_gram.py ram             torch.nn.Embedding and torch.optim.SparseAdam
    python skip_gram.py vectors.zarr    shardemb.torch.Embedding and Adam, which are the same

Two tables are trained: of words, and of words as neighbours of others. One update of
the store changes both. The text is the prose of Python's standard library.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import shardemb
import shardemb.torch
from shardemb.quickstart import corpus

WORDS, DIM, BATCH, WINDOW, NEGATIVES, LR = 20_000, 64, 8192, 5, 64, 5e-3


def text():
    """Return the words, the most frequent first, and the text as their numbers, with -1 between passages."""
    prose = corpus.build(WORDS)
    numbers = {word: number for number, word in enumerate(prose.words)}
    places = [
        [*(numbers.get(word, -1) for word in passage.split()), *[-1] * WINDOW] for passage in prose.passages
    ]
    return prose.words, np.array([number for passage in places for number in passage])


def pairs(numbers, rng):
    """Yield words and their neighbours, at random distances up to the window."""
    near = [(numbers[distance:], numbers[:-distance]) for distance in range(1, WINDOW + 1)]
    while True:
        words, neighbours = near[int(WINDOW * rng.random() ** 1.5)]
        at = rng.integers(0, len(words), BATCH)
        known = (words[at] >= 0) & (neighbours[at] >= 0)
        if known.any():
            yield torch.from_numpy(words[at][known]), torch.from_numpy(neighbours[at][known])


def build(name, words):
    """Return the modules of words and of neighbours, their optimizer, and the store, if they are in one."""
    if name == "ram":
        modules = nn.Embedding(words, DIM, sparse=True), nn.Embedding(words, DIM, sparse=True)
        nn.init.uniform_(modules[0].weight, -0.5 / DIM, 0.5 / DIM)
        nn.init.zeros_(modules[1].weight)
        return *modules, torch.optim.SparseAdam([each.weight for each in modules], lr=LR), None
    store = shardemb.open(name, mode="w")
    initial = shardemb.initializers.Uniform(-0.5 / DIM, 0.5 / DIM, seed=0)
    for table, first in (("words", initial), ("neighbours", shardemb.initializers.Constant(0.0))):
        store.create_table(
            table,
            num_embeddings=words,
            embedding_dim=DIM,
            initializer=first,
            optimizer=shardemb.optim.Adam(lr=LR),
        )
    modules = [shardemb.torch.Embedding(store[table]) for table in ("words", "neighbours")]
    return *modules, shardemb.torch.Optimizer(modules), store


def anonymous_memory():
    """Return the memory of this process in MB, without pages of files, which the kernel may drop."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def train(name, steps=300):
    """Train in memory ("ram") or in a new store; return loss, seconds a step, memory, words, vectors."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    words, numbers = text()
    frequency = np.cumsum(np.bincount(numbers[numbers >= 0], minlength=len(words)) ** 0.75)
    rows, contexts, optimizer, store = build(name, len(words))
    losses, seconds, memory = [], [], 0.0
    for _, (word, neighbour) in zip(range(steps), pairs(numbers, rng), strict=False):
        noise = torch.from_numpy(np.searchsorted(frequency, frequency[-1] * rng.random(NEGATIVES)))
        start = time.perf_counter()
        vectors, others = rows(word), contexts(torch.cat([neighbour, noise]))
        near, far = others.split([len(neighbour), len(noise)])
        loss = -nn.functional.logsigmoid((vectors * near).sum(1)).mean()
        loss = loss - 5 * nn.functional.logsigmoid(-vectors @ far.T).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
        memory = max(memory, anonymous_memory())
    with torch.no_grad():
        vectors = nn.functional.normalize(rows(torch.arange(len(words))))
    if store is not None:
        store.commit(step=steps)
        store.close()
    return np.mean(losses[-50:]), float(np.median(seconds)), memory, words, vectors


def nearest(word, words, vectors, count=5):
    """Return the words whose vectors point into the most similar directions."""
    found = (vectors @ vectors[words.index(word)]).topk(count + 1).indices[1:]
    return [words[number] for number in found]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", help='"ram", or the path of a store, which is overwritten')
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    loss, seconds, memory, words, vectors = train(options.tables, options.steps)
    for word in ("file", "thread", "first", "returns", "integer"):
        print(f"{word}: {', '.join(nearest(word, words, vectors))}")
    print(f"loss {loss:.4f}, {1e3 * seconds:.1f} ms a step, {memory:,.0f} MB of memory")
