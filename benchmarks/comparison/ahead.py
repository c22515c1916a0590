"""A training loop in torch whose rows are read ahead (T3), under a memory limit and from a cold start."""

import contextlib
import time
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks import common
from benchmarks.common import DIM

from .capped import BUDGET_SHARE, LEAST_CAP, OPTIMIZER, RECORD_BYTES, STORE
from .data import warm
from .processes import MIB, Capped, alone
from .racing import drop_caches
from .reading import LARGE
from .results import Arm, Case, at_most

TOKENS, HEADS, LAYERS, WIDTH = 2048, 4, 2, 256
SENTENCES, LENGTH = 8, 96
SEED = 5

# A model in torch takes memory, too: below half of the full scale, a quarter of the table does not hold it.
AHEAD = "look-ahead, cold, capped"
PLAIN = "plain loop, cold, capped"
RAM = "plain loop, in RAM"
RAM_AHEAD = "look-ahead, in RAM"


@dataclass(frozen=True)
class Job:
    """What every arm does."""

    rows: int
    steps: int
    memory_budget: int | None
    ahead: bool
    warm: bool


def ngram_memory(settings):
    """T3: a small transformer with a memory of hashed 2- and 3-grams, whose table is four times the memory limit."""
    data = settings.data(LARGE)
    cap = max(2 * LEAST_CAP, data.rows * RECORD_BYTES // 4)
    path = data.store(STORE, common.optimizer(OPTIMIZER))
    steps = 60 if settings.scale >= 0.2 else 8
    arms, losses = {}, {}
    for name, capped, ahead in (
        (RAM, False, False),
        (RAM_AHEAD, False, True),
        (AHEAD, True, True),
        (PLAIN, True, False),
    ):
        job = Job(data.rows, steps, int(cap * BUDGET_SHARE) if capped else None, ahead, not capped)
        seconds, losses[name] = _under(cap if capped else None, path, job)
        later = seconds[len(seconds) // 2 :]
        arms[name] = Arm(name, SENTENCES * LENGTH * 2, tuple(later), f"{steps} steps")
    ratios = {name: arm.median / arms[RAM].median for name, arm in arms.items()}
    bars = (
        at_most("step with look-ahead, cold, vs in RAM", ratios[AHEAD], 1.1, "x", stretch=1.03),
        at_most("step with look-ahead vs without, in RAM", ratios[RAM_AHEAD], 1.03, "x"),
    )
    notes = (
        f"limit {cap / MIB:,.0f} MiB, page cache included; table {data.rows * RECORD_BYTES / MIB:,.0f} MiB",
        f"{SENTENCES * LENGTH * 2:,} ids a step, row-wise Adagrad; the later half of the steps counts",
        *(f"{name}: {1e3 * arm.median:.1f} ms a step" for name, arm in arms.items()),
    )
    equal = all(each == losses[RAM] for each in losses.values())
    return [Case("n-gram memory", tuple(arms.values()), bars, equal, notes=notes, facts=ratios)]


def _under(cap, path, job):
    """Train in a child process, under the limit and from a cold start if there is one."""
    if cap is None:
        return alone(_train, path, job)
    drop_caches(path)
    with Capped(f"compare-ahead-{id(job)}", cap) as group:
        return alone(_train, path, job, first=partial(_join, group))


def _join(group):
    """Load the libraries, which are to lie outside of the limit, and then subject this process to it."""
    import shardemb.torch  # noqa: F401

    group.join()


def make_batches(rows, steps):
    """Return batches of tokens, with the rows of their 2- and 3-grams: shapes (B, T) and (B, T, 2)."""
    random = np.random.default_rng(SEED)
    made = []
    for _ in range(steps):
        ranks = random.zipf(1.2, (SENTENCES, LENGTH + 3)) % TOKENS
        two = ranks[:, 1:-1] * TOKENS + ranks[:, 2:]
        three = two[:, :] * TOKENS + ranks[:, :-2]
        grams = np.stack([two[:, :LENGTH], three[:, :LENGTH]], axis=-1).astype(np.uint64)
        grams = (grams * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(17)
        made.append((ranks[:, 2 : LENGTH + 3], (grams % np.uint64(rows)).astype(np.int64)))
    return made


# ---- in the child process


def make_model(table):
    """Return the model: a causal transformer whose input has the rows of the memory added."""
    import torch

    import shardemb.torch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = torch.nn.Embedding(TOKENS, WIDTH)
            self.memory, self.project = shardemb.torch.Embedding(table), torch.nn.Linear(2 * DIM, WIDTH)
            layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, batch_first=True)
            self.layers = torch.nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
            self.output = torch.nn.Linear(WIDTH, TOKENS)

        def forward(self, tokens, grams):
            mask = torch.nn.Transformer.generate_square_subsequent_mask(LENGTH)
            inner = self.tokens(tokens[:, :-1]) + self.project(self.memory(grams).flatten(-2))
            logits = self.output(self.layers(inner, mask=mask, is_causal=True))
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return Model()


def _train(path, job):
    import torch

    import shardemb.torch

    torch.manual_seed(0)
    batches = [tuple(map(torch.from_numpy, each)) for each in make_batches(job.rows, job.steps)]
    options = {} if job.memory_budget is None else {"memory_budget": job.memory_budget}
    with contextlib.closing(common.open_store(path, warm=job.warm, **options)) as store:
        if job.warm:
            warm(store["rows"])
        model = make_model(store["rows"])
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3), shardemb.torch.Optimizer(model)]
        loader = batches
        if job.ahead:
            loader = shardemb.torch.prefetching(batches, model, ids=lambda batch: {model.memory: batch[1]})
        seconds, losses, start = [], [], time.perf_counter()
        for tokens, grams in loader:
            for each in optimizers:
                each.zero_grad()
            loss = model(tokens, grams)
            loss.backward()
            for each in optimizers:
                each.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
        store.rollback()
    return tuple(seconds), losses
