"""Train word vectors on text files, in a store that may be larger than memory; stop and run it again to continue.

    python word_vectors.py vectors.zarr corpus/*.txt

Skip-gram with negative samples (Mikolov et al., 2013): the vectors of words that stand near each other are drawn
together, those of random words pushed apart.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import shardemb

DIM, WINDOW, NEGATIVE, BATCH, LEARNING_RATE = 64, 5, 5, 4096, 0.05


def sentences(paths):
    """Yield the words of each line."""
    for path in paths:
        with Path(path).open(encoding="utf-8") as lines:
            for line in lines:
                yield re.findall(r"\w+", line.lower())


def begin(store, paths, min_count=5):
    """Give each frequent word a row, the most frequent first, and create the two tables that are trained."""
    counts = Counter(word for words in sentences(paths) for word in words)
    words = store.create_vocabulary("words", key_type="string")
    words.add([word for word, count in counts.most_common() if count >= min_count])
    for name, width in (("words", 0.5 / DIM), ("contexts", 0)):
        store.create_table(
            name,
            vocabulary="words",
            embedding_dim=DIM,
            rows_per_shard=len(words),
            initializer=shardemb.initializers.Uniform(-width, width) if width else None,
            optimizer=shardemb.optim.Adagrad(lr=LEARNING_RATE),
        )
    store.commit(step=0)


def pairs(store, paths, rng):
    """Yield batches of rows: of words, and of words that stand near them."""
    centers, contexts = [], []
    for words in sentences(paths):
        rows = store.vocabularies["words"].lookup(words)
        rows = rows[rows >= 0]
        for distance in range(1, int(rng.integers(1, WINDOW + 1)) + 1):
            centers += [rows[distance:], rows[:-distance]]
            contexts += [rows[:-distance], rows[distance:]]
        if sum(map(len, centers)) >= BATCH:
            yield np.concatenate(centers), np.concatenate(contexts)
            centers, contexts = [], []
    if centers:
        yield np.concatenate(centers), np.concatenate(contexts)


def step(store, centers, contexts, rng):
    """Update the rows of one batch; return its loss for each pair."""
    words, others = store["words"].rows, store["contexts"].rows
    number = len(store.vocabularies["words"])
    # Frequent words have low rows: this draws them more often, as their frequency would.
    negative = (number * rng.random((centers.size, NEGATIVE)) ** 3).astype(np.int64)
    targets = np.concatenate([contexts[:, None], negative], axis=1)
    near = np.zeros(targets.shape, np.float32)
    near[:, 0] = 1
    center, target = words.lookup(centers), others.lookup(targets)
    score = 1 / (1 + np.exp(-np.einsum("bd,bkd->bk", center, target)))
    gap = (score - near).astype(np.float32)
    # Gradients of rows that occur several times in a batch are summed by the store.
    words.update(centers, np.einsum("bk,bkd->bd", gap, target))
    others.update(targets, gap[:, :, None] * center[:, None, :])
    return -np.log(np.where(near == 1, score, 1 - score) + 1e-9).sum() / centers.size


def train(path, texts, epochs=1):
    """Train on text files; return the last commit."""
    with shardemb.open(path) as store:
        if store.last_commit is None:
            begin(store, texts)
        done = store.last_commit.metadata.get("epochs", 0)
        for epoch in range(done, epochs):
            rng, number = np.random.default_rng(epoch), store.last_commit.step
            for batch in pairs(store, texts, rng):
                number += 1
                loss = step(store, *batch, rng)
                if number % 100 == 0:
                    print(f"epoch {epoch + 1}, step {number:,}: loss {loss:.3f} a pair")
            store.commit(step=number, metadata={"epochs": epoch + 1})
        store["words"].export_parquet(f"{path}.parquet", progress=True)
        return store.last_commit


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    train(sys.argv[1], sys.argv[2:])
