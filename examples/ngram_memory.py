"""Train a small language model with a memory: rows of its last two and three words, hashed, in a large table.

    python ngram_memory.py none          the model alone
    python ngram_memory.py ram           with the table in memory: torch.nn.Embedding and torch.optim.SparseAdam
    python ngram_memory.py memory.zarr   with the table on disk; stop it and run it again to continue

Which rows a batch needs depends on its text alone, not on what the model computes. So they are read ahead, while the
model works on the batches before. The text is the prose of Python's standard library.
"""

import argparse
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import shardemb
import shardemb.torch
from shardemb.quickstart import corpus

WORDS, DIM, LENGTH, BATCH = 4_000, 64, 64, 16
ROWS, LR, MEMORY_LR, HELD_OUT = 2_000_000, 3e-3, 3e-2, 20
SALTS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)


# ---- data


def text():
    """Return the words of the text as numbers; 0 stands for all words that are rare."""
    prose = corpus.build(WORDS - 1)
    numbers = {word: number for number, word in enumerate(prose.words, 1)}
    return np.array([numbers.get(word, 0) for passage in prose.passages for word in passage.split()])


def ngrams(words, rows):
    """Return the rows of the last two and of the last three words at each place, shape ``words.shape + (2,)``."""
    first = words.astype(np.uint64) * SALTS[0]
    two = (first ^ (shifted(words, 1) * SALTS[1])) * SALTS[2]
    three = (two ^ (shifted(words, 2) * SALTS[1])) * SALTS[0]
    return ((np.stack([two, three], -1) >> np.uint64(20)) % np.uint64(rows)).astype(np.int64)


def shifted(words, by):
    """Return the words that stand `by` places before."""
    return np.pad(words, ((0, 0), (by, 0)))[:, : words.shape[1]].astype(np.uint64)


class Batches:
    """The batches of a text, in an order of their own in each epoch; the last ones are held out."""

    def __init__(self, words, rows, size):
        spans = len(words) // (LENGTH + 1)
        words = words[: spans * (LENGTH + 1)].reshape(spans, LENGTH + 1)
        words = words[np.random.default_rng(0).permutation(spans)]
        held_out = min(HELD_OUT * size, spans // 4)
        self.train, self.held_out = words[held_out:], words[:held_out]
        self.rows, self.size = rows, size

    def __call__(self, first, last):
        """Yield the batches of steps, from the first to the last."""
        per_epoch = len(self.train) // self.size
        for step in range(first, last + 1):
            epoch, number = divmod(step - 1, per_epoch)
            order = np.random.default_rng(epoch).permutation(len(self.train))
            yield self.tensors(self.train[order[number * self.size : (number + 1) * self.size]])

    def tensors(self, spans):
        """Return words, the rows of their n-grams, and the words that follow."""
        given = spans[:, :-1]
        return [torch.from_numpy(each) for each in (given, ngrams(given, self.rows), spans[:, 1:])]


# ---- model


class Model(nn.Module):
    """A transformer of two layers; `memory` looks up the rows of n-grams, which are added to those of words."""

    def __init__(self, memory=None):
        super().__init__()
        self.words = nn.Embedding(WORDS, DIM)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, DIM))
        layer = nn.TransformerEncoderLayer(DIM, 4, 4 * DIM, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.next_word = nn.Linear(DIM, WORDS)
        self.memory = memory

    def forward(self, words, ngrams):
        """Return the score of each word as the next one, at each place."""
        hidden = self.words(words) + self.places
        if self.memory is not None:
            hidden = hidden + self.memory(ngrams).sum(2)
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return self.next_word(self.layers(hidden, mask=mask, is_causal=True))


def loss_of(model, batch):
    """Return the mean loss of a batch, in nats a word."""
    words, rows, following = batch
    return nn.functional.cross_entropy(model(words, rows).flatten(0, 1), following.flatten())


@torch.no_grad()
def held_out_loss(model, batches):
    """Return the loss on text that was not trained on."""
    model.eval()
    spans = np.array_split(batches.held_out, max(1, len(batches.held_out) // batches.size))
    losses = [loss_of(model, batches.tensors(each)).item() for each in spans]
    model.train()
    return sum(losses) / len(losses)


# ---- training


def opened(name, rows, warm):
    """Return a memory, the optimizer of its rows, and the store that they are in."""
    if name == "none":
        return None, None, None
    if name == "ram":
        memory = nn.Embedding(rows, DIM, sparse=True)
        nn.init.zeros_(memory.weight)
        return memory, torch.optim.SparseAdam(memory.parameters(), lr=MEMORY_LR), None
    store = shardemb.open(name, warm=warm)
    if "ngrams" not in store:
        adam = shardemb.optim.Adam(lr=MEMORY_LR)
        store.create_table("ngrams", num_embeddings=rows, embedding_dim=DIM, optimizer=adam)
    memory = shardemb.torch.Embedding(store["ngrams"])
    return memory, shardemb.torch.Optimizer(memory), store


def anonymous_memory():
    """Return the memory of this process in MB, without pages of files, which the kernel may drop."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def train(name, steps=500, rows=ROWS, size=BATCH, *, cold=False):
    """Train with a memory ("none", "ram" or the path of a store); return held-out loss, seconds a step, memory.

    With `cold`, rows are read from the disk, as if there were no memory for them.
    """
    torch.manual_seed(0)
    batches = Batches(text(), rows, size)
    model = Model()
    dense = torch.optim.AdamW(model.parameters(), lr=LR)
    if cold:
        drop_pages(name)
    model.memory, sparse, store = opened(name, rows, warm=not cold)
    first, rest = 1, f"{name}-rest"  # a folder for everything that is not in the store
    if store is not None and store.last_commit is not None:
        first += shardemb.torch.load(rest, model, [dense, sparse], store).step
    loader, seconds, used = batches(first, steps), [], 0.0
    if store is not None:
        loader = shardemb.torch.prefetching(loader, model, ids=lambda batch: {"memory": batch[1]})
    for step, batch in enumerate(loader, first):
        start = time.perf_counter()
        loss = loss_of(model, batch)
        loss.backward()
        for each in filter(None, (dense, sparse)):
            each.step()
            each.zero_grad()
        seconds.append(time.perf_counter() - start)
        used = max(used, anonymous_memory())
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}, {1e3 * np.median(seconds):.0f} ms a step")
    if store is not None:
        shardemb.torch.save(rest, model, [dense, sparse], store, steps)
    reached = held_out_loss(model, batches)
    if store is not None:
        store.close()
    return reached, float(np.median(seconds)), used


def drop_pages(folder):
    """Let the kernel forget what it has of files in memory."""
    for path in Path(folder).rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("memory", help='"none", "ram", or the path of a store, which is created or continued')
    parser.add_argument("--steps", type=int, default=500, help="until which step to train")
    parser.add_argument(
        "--cold", action="store_true", help="read rows from the disk, as if memory were too small"
    )
    options = parser.parse_args()
    reached, seconds, used = train(options.memory, options.steps, cold=options.cold)
    print(f"loss on text that was held out: {reached:.4f}, ", end="")
    print(f"{1e3 * seconds:.1f} ms a step, {used:,.0f} MB of memory")
