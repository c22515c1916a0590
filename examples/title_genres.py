"""Tell the genres of a film from its title, by the mean of the vectors of what is in it.

    python title_genres.py ram ml-100k.item           a dict, torch.nn.EmbeddingBag and torch.optim.Adagrad
    python title_genres.py titles.zarr ml-100k.item   a table by key, shardemb.torch.EmbeddingBag, and Adagrad too

Words and groups of four letters are the keys of a table, and those of a title a bag (as fastText does: Joulin et al.,
2016). The table by key takes them as they are, and gives new ones rows while it trains. The films are MovieLens' 1,682,
in a file that comes with RecBole:

    pip download --no-deps recbole==1.2.1 && unzip -j recbole-*.whl '*ml-100k.item'
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

DIM, BATCH, LR, HELD_OUT = 32, 64, 0.1, 300


def films(path):
    """Return the titles and the names of the genres of each."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return [row[1] for row in rows], [row[3].split() for row in rows]


def keys_of(title):
    """Return what a title consists of: words with their ends marked, and all groups of four letters in them."""
    words = [f"<{word}>" for word in re.findall(r"\w+", title.lower())]
    return [*words, *(word[start : start + 4] for word in words for start in range(len(word) - 3))]


class InMemory(nn.Module):
    """A dict that numbers keys as they come, and the means of their rows; key 0 stands for unknown ones."""

    def __init__(self, rows):
        super().__init__()
        self.numbers = {}
        self.bags = nn.EmbeddingBag(rows, DIM, mode="mean", padding_idx=0, sparse=True)
        nn.init.zeros_(self.bags.weight)

    def forward(self, keys, offsets):
        """Return the mean of each bag; in training, new keys get rows."""
        if self.training:
            for key in keys:
                self.numbers.setdefault(key, len(self.numbers) + 1)
        ids = torch.tensor([self.numbers.get(key, 0) for key in keys])
        return self.bags(ids, offsets)


def build(name):
    """Return the module that looks up bags of keys, the optimizer of its rows, and the store, if they are in one."""
    if name == "ram":
        bags = InMemory(100_000)
        return bags, torch.optim.Adagrad(bags.parameters(), lr=LR), None
    store = shardemb.open(name, mode="w")
    store.create_vocabulary("parts", key_type="string")
    adagrad = shardemb.optim.Adagrad(lr=LR, eps=1e-10)
    table = store.create_table("parts", vocabulary="parts", embedding_dim=DIM, optimizer=adagrad)
    bags = shardemb.torch.EmbeddingBag(table, mode="mean", create=True, missing="zeros")
    return bags, shardemb.torch.Optimizer(bags), store


def anonymous_memory():
    """Return the memory of this process in MB, without pages of files, which the kernel may drop."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def train(name, path, epochs=10):
    """Train in memory ("ram") or in a new store; return how often the first guess is right, seconds a step, memory."""
    torch.manual_seed(0)
    titles, genres = films(path)
    names = sorted({name for each in genres for name in each})
    labels = torch.tensor([[float(name in each) for name in names] for each in genres])
    bags = [keys_of(title) for title in titles]
    order = np.random.default_rng(0).permutation(len(titles))
    held_out, trained = np.split(order, [min(HELD_OUT, len(order) // 4)])
    mean, sparse, store = build(name)
    guess = nn.Linear(DIM, len(names))
    dense = torch.optim.AdamW(guess.parameters(), lr=0.01)
    seconds, memory = [], 0.0
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(trained)
        for chosen in np.split(order, range(BATCH, len(order), BATCH)):
            start = time.perf_counter()
            scores = guess(mean(*flat([bags[each] for each in chosen])))
            loss = nn.functional.binary_cross_entropy_with_logits(scores, labels[chosen])
            loss.backward()
            for each in (dense, sparse):
                each.step()
                each.zero_grad()
            seconds.append(time.perf_counter() - start)
            memory = max(memory, anonymous_memory())
    mean.eval()
    with torch.no_grad():
        first = guess(mean(*flat([bags[each] for each in held_out]))).argmax(1)
    right = labels[held_out].gather(1, first[:, None]).mean().item()
    if store is not None:
        store.commit(step=len(seconds))
        store.close()
    return right, float(np.median(seconds)), memory


def flat(bags):
    """Return the keys of all bags, and where each bag begins."""
    lengths = [len(each) for each in bags]
    return [key for each in bags for key in each], torch.tensor([0, *lengths[:-1]]).cumsum(0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", help='"ram", or the path of a store, which is overwritten')
    parser.add_argument("films", help="the file ml-100k.item")
    options = parser.parse_args()
    if not Path(options.films).exists():
        parser.error(f"no file {options.films}; --help says how to get it")
    right, seconds, memory = train(options.table, options.films)
    print(f"the first guess is one of the film's genres: {right:.3f}, ", end="")
    print(f"{1e3 * seconds:.1f} ms a step, {memory:,.0f} MB of memory")
