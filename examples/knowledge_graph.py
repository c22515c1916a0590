"""Train vectors of a knowledge graph and predict its links, with the tables in memory or on disk.

    python knowledge_graph.py ram ml-100k.kg           tables in memory: torch.nn.Embedding and torch.optim.Adagrad
    python knowledge_graph.py graph.zarr ml-100k.kg    tables on disk: shardemb.torch.Embedding, and Adagrad too
    python knowledge_graph.py graph.zarr /usr/share/wordnet/data.noun --product complex --steps 2000
    python knowledge_graph.py graph.zarr --entities 86054151 --dim 100 --batch 50000 --negatives 1000 --steps 20

The graph is a file of triples (head, relation and tail in columns), such as the part of Freebase about films that comes
with RecBole, or `data.noun` of WordNet: each noun with all that it is a kind of, directly or through others (as Nickel
and Kiela, 2017, take it). To get them:

    pip download --no-deps recbole==1.2.1 && unzip -j recbole-*.whl '*ml-100k.kg'
    apt-get install wordnet-base

Without a file, triples of so many entities are made up, few of which are frequent; that shows the speed only. The
models are DistMult (Yang et al., 2015) and ComplEx (Trouillon et al., 2016), trained against random entities in the
place of the head and of the tail.
"""

import argparse
import re
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import nn

import shardemb
import shardemb.torch

LR = 0.1


# ---- graphs


def read_triples(path):
    """Return the triples of a file as numbers, shape (n, 3), and how many entities and relations there are."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    if Path(path).name.startswith("data."):
        named = list(hypernyms(lines))
    else:
        named = [line.split("\t") for line in lines if ":token" not in line]
    entities, relations = {}, {}
    triples = [
        (number(entities, head), number(relations, relation), number(entities, tail))
        for head, relation, tail in named
    ]
    return np.unique(triples, axis=0), len(entities), len(relations)


def hypernyms(lines):
    """Yield each noun of WordNet with all that it is a kind (@) or an instance (@i) of, directly or through others."""
    above = {}
    for line in lines:
        if not line.startswith("  "):  # the licence
            fields = line.split(" | ")[0].split()
            pointers = fields[5 + 2 * int(fields[3], 16) :]
            above[fields[0]] = [
                target
                for symbol, target, kind in zip(pointers[0::4], pointers[1::4], pointers[2::4], strict=False)
                if symbol in ("@", "@i") and kind == "n"
            ]
    for noun, direct in above.items():
        reached, ahead = set(), list(direct)
        while ahead:
            if (target := ahead.pop()) not in reached:
                reached.add(target)
                ahead += above[target]
        yield from ((noun, "is a", target) for target in sorted(reached))


def number(numbers, name):
    """Return the number of a name; a new name gets the next one."""
    return numbers.setdefault(name, len(numbers))


def made_up(entities, relations, count, seed):
    """Make triples in which entity e has a share of about 1 / e."""
    rng = np.random.default_rng(seed)
    drawn = (entities ** rng.random((count, 2))).astype(np.int64)
    heads, tails = (drawn * 2_654_435_761 % entities).T  # frequent ones are anywhere in the table
    return np.stack([heads, rng.integers(0, relations, count), tails], axis=1)


# ---- model


def distmult(vectors, relations, back):
    """Return what the vectors that complete triples should resemble."""
    return vectors * relations


def complex_product(vectors, relations, back):
    """Return the same for complex numbers, whose real parts come first; `back` is from tails to heads."""
    (a, b), (c, d) = vectors.chunk(2, -1), relations.chunk(2, -1)
    d = -d if back else d
    return torch.cat([a * c - b * d, a * d + b * c], dim=-1)


class Model(nn.Module):
    """Vectors of entities and relations, and the product that scores triples."""

    def __init__(self, entities, relations, product):
        super().__init__()
        self.entities, self.relations, self.product = entities, relations, product

    def forward(self, triples, negatives):
        """Return the loss: each true head and tail should have a higher score than random entities."""
        heads, relations, tails = triples.unbind(1)
        rows = self.entities(torch.cat([heads, tails, negatives]))
        head, tail, others = rows.split([len(heads), len(tails), len(negatives)])
        relation, loss = self.relations(relations), 0
        for given, wanted, back in ((head, tail, False), (tail, head, True)):
            guess = self.product(given, relation, back)
            scores = torch.cat([(guess * wanted).sum(1, keepdim=True), guess @ others.T], dim=1)
            loss = loss + nn.functional.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64))
        return loss / 2


@torch.no_grad()
def filtered_mrr(model, entities, triples, known):
    """Return the mean of 1 / rank of the true entity among all that are not known to be true as well."""
    every = torch.cat([model.entities(part) for part in torch.arange(entities).split(65_536)])
    completions = defaultdict(list)
    for head, relation, tail in known:
        completions[head, relation, False].append(tail)
        completions[tail, relation, True].append(head)
    ranks = []
    for part in torch.from_numpy(triples).split(256):
        heads, relations, tails = part.unbind(1)
        for given, wanted, back in ((heads, tails, False), (tails, heads, True)):
            scores = model.product(every[given], model.relations(relations), back) @ every.T
            reached = scores.gather(1, wanted[:, None])
            for row, key in enumerate(zip(given.tolist(), relations.tolist(), strict=True)):
                scores[row, completions[*key, back]] = -torch.inf
            ranks.append(1 + (scores >= reached).sum(1))
    return (1 / torch.cat(ranks)).mean().item()


# ---- training


def anonymous_memory():
    """Return the memory of this process in MB, without pages of files, which the kernel may drop."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def tables(name, sizes, dim):
    """Return modules with the rows of entities and relations, their optimizer, and the store, if they are in one."""
    width = 1 / dim**0.5
    if name == "ram":
        modules = [nn.Embedding(size, dim, sparse=True) for size in sizes]
        for each in modules:
            nn.init.uniform_(each.weight, -width, width)
        return *modules, torch.optim.Adagrad([each.weight for each in modules], lr=LR), None
    store = shardemb.open(name, mode="w")
    for number, (size, table) in enumerate(zip(sizes, ("entities", "relations"), strict=True)):
        initial = shardemb.initializers.Uniform(-width, width, seed=number)
        store.create_table(
            table,
            num_embeddings=size,
            embedding_dim=dim,
            initializer=initial,
            optimizer=shardemb.optim.Adagrad(lr=LR),
        )
    modules = [shardemb.torch.Embedding(store[table]) for table in ("entities", "relations")]
    return *modules, shardemb.torch.Optimizer(modules), store


def train(name, graph=None, *, entities=0, product="distmult", dim=64, batch=2048, negatives=256, steps=1000):
    """Train in memory ("ram") or in a new store; return the filtered MRR, seconds a step, and memory in MB."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    if graph:
        triples, entities, relations = read_triples(graph)
        triples = triples[rng.permutation(len(triples))]
        held_out, known = triples[: min(1000, len(triples) // 20)], triples
        triples = triples[len(held_out) :]
    else:
        relations, known = 14_824, None
        triples = made_up(entities, relations, steps * batch, seed=0)
    entity_rows, relation_rows, optimizer, store = tables(name, (entities, relations), dim)
    model = Model(entity_rows, relation_rows, {"distmult": distmult, "complex": complex_product}[product])
    seconds, memory = [], 0.0
    for step in range(1, steps + 1):
        chosen = torch.from_numpy(np.take(triples, rng.integers(0, len(triples), batch), axis=0))
        others = torch.from_numpy(rng.integers(0, entities, negatives))
        start = time.perf_counter()
        loss = model(chosen, others)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        memory = max(memory, anonymous_memory())
        if step % max(1, steps // 5) == 0:
            print(
                f"step {step:,}: loss {loss.item():.3f}, {batch / np.median(seconds):,.0f} triples a second"
            )
    mrr = filtered_mrr(model, entities, held_out, known) if graph else float("nan")
    if store is not None:
        store.commit(step=steps)
        store.close()
    return mrr, float(np.median(seconds)), memory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", help='"ram", or the path of a store, which is overwritten')
    parser.add_argument("graph", nargs="?", help="a file of triples; made up by default")
    parser.add_argument("--product", choices=("distmult", "complex"), default="distmult")
    for option, default in (
        ("entities", 1_000_000),
        ("dim", 64),
        ("batch", 2048),
        ("negatives", 256),
        ("steps", 1000),
    ):
        parser.add_argument(f"--{option}", type=int, default=default)
    given = vars(parser.parse_args())
    graph = given.pop("graph")
    if graph and not Path(graph).exists():
        parser.error(f"no file {graph}; --help says how to get it")
    mrr, seconds, memory = train(given.pop("tables"), graph, **given)
    print(f"filtered MRR {mrr:.3f}, " if graph else "", end="")
    print(f"{1e3 * seconds:.1f} ms a step, {memory:,.0f} MB of memory")
