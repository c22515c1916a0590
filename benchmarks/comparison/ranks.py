"""Several processes that share a store (T5), and what their messages cost."""

import contextlib
import multiprocessing
import tempfile
import time

import numpy as np

from benchmarks import common
from benchmarks.common import DIM

from .machine import CORES
from .reading import FULL
from .results import Arm, Bar, Case, faster

RANKS = 2
BATCH, WIDTH, LAYERS = 2048, 512, 3
"""Rows of one step of all ranks together, and the dense part: compute dominates."""

EXCHANGED = 65_536
"""Rows of an exchange: ids to the owner, rows back."""

ONE, ONE_THREAD, TWO = "1 process", "1 process, 1 thread in torch", "2 ranks"


def ranks(settings):
    """T5: the same training by one process and by two, of which one owns the store; and the exchange by itself."""
    return [_training(settings), _exchange(settings)]


def _training(settings):
    data = settings.data(FULL)
    path = data.store("ranks", common.optimizer("RowWiseAdagrad"))
    steps = 40 if settings.scale >= 0.2 else 4
    arms, losses = {}, {}
    for name, count, threads in ((ONE, 1, CORES), (ONE_THREAD, 1, 1), (TWO, RANKS, max(1, CORES // RANKS))):
        (seconds, losses[name]), *_ = _spawn(count, threads, _train, str(path), data.rows, steps)
        later = seconds[len(seconds) // 4 :]
        arms[name] = Arm(name, BATCH, tuple(later), f"{steps} steps")
    equal = bool(np.allclose(losses[ONE], losses[TWO], 1e-3))
    bars = (faster(arms, TWO, ONE, 1.2),)
    notes = (
        f"{BATCH:,} rows a step of all ranks together, {LAYERS} dense layers of {WIDTH} in DistributedDataParallel",
        f"threads in torch: {CORES} in one process, {max(1, CORES // RANKS)} in each of two ranks",
        f"two ranks against one process with one thread: {arms[TWO].rate / arms[ONE_THREAD].rate:.2f} times as fast",
    )
    return Case("training", tuple(arms.values()), bars, equal, notes=notes)


def _exchange(settings):
    rows = EXCHANGED if settings.scale >= 0.2 else 4096
    times = settings.times(30)
    (ours, gloo), *_ = _spawn(RANKS, 1, _send, rows, times)
    arms = {name: Arm(name, rows, each) for name, each in (("messages", ours), ("gloo", gloo))}
    share = arms["gloo"].median / arms["messages"].median
    notes = (
        f"{rows:,} ids there, {4 * rows * DIM / 2**20:.0f} MiB of rows back; gloo sends the same arrays",
    )
    return Case(
        "exchange", tuple(arms.values()), (Bar("share of gloo's speed", share, 0.6),), True, notes=notes
    )


def _spawn(count, threads, function, *arguments):
    """Run a function in as many processes, the ranks of a group; return what each returns."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ends = []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(
                target=_work,
                args=(there, rank, count, threads, f"{folder}/meeting", function, arguments),
                daemon=True,
            )
            process.start()
            stack.callback(process.join)
            ends.append(here)
        # The owner's result comes first; the others' are read so that nobody waits for them.
        return [end.recv() for end in ends]


# ---- in the processes


def _work(end, rank, count, threads, meeting, function, arguments):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    end.send(function(rank, count, *arguments))
    dist.barrier()
    dist.destroy_process_group()


def _train(rank, count, path, rows, steps):
    import torch

    import shardemb.torch

    torch.manual_seed(0)
    store = shardemb.open(path) if rank == 0 else None
    if store is not None:
        store["rows"].warm()
    table = store["rows"] if count == 1 else (shared := shardemb.torch.Ranks(store))["rows"]
    words = shardemb.torch.Embedding(table)
    inner = [torch.nn.Linear(DIM, WIDTH), torch.nn.ReLU()]
    for _ in range(LAYERS - 1):
        inner += [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    dense = torch.nn.Sequential(*inner, torch.nn.Linear(WIDTH, 1))
    model = torch.nn.parallel.DistributedDataParallel(dense) if count > 1 else dense
    optimizers = [torch.optim.AdamW(dense.parameters(), lr=1e-3), shardemb.torch.Optimizer(words)]
    random, seconds, losses = np.random.default_rng(3), [], []
    for _ in range(steps):
        ids = random.integers(0, rows, BATCH)[rank::count]
        target = torch.from_numpy(ids % 2).float()
        start = time.perf_counter()
        for each in optimizers:
            each.zero_grad()
        loss = (model(words(torch.from_numpy(ids))).squeeze(-1) - target).square().mean()
        loss.backward()
        for each in optimizers:
            each.step()
        seconds.append(time.perf_counter() - start)
        total = loss.detach()
        if count > 1:
            torch.distributed.all_reduce(total)
        losses.append(total.item() / count)
    if count == 1:
        store.rollback()
        store.close()
    else:
        shared.rollback()
        shared.close()
    return tuple(seconds), losses


def _send(rank, count, rows, times):
    """Time the messages of a lookup, and gloo with the same arrays."""
    import torch
    import torch.distributed as dist

    from shardemb.ranks.transport import Transport

    transport = Transport(dist.group.WORLD, 0, 600.0)
    ids, answer = np.arange(rows), common.make_values(rows)
    ours, gloo = [], []
    there, back = torch.from_numpy(ids), torch.from_numpy(answer)
    for _ in range(times):
        dist.barrier()
        start = time.perf_counter()
        if rank == 0:
            _, got = transport.requests(None)
            transport.answer([None, answer])
            transport.flush()
            assert np.array_equal(got, ids)
        else:
            found = transport.ask(ids)
            assert found.shape == answer.shape
        ours.append(time.perf_counter() - start)
        dist.barrier()
        start = time.perf_counter()
        if rank == 0:
            dist.recv(torch.empty_like(there), 1)
            dist.send(back, 1)
        else:
            dist.send(there, 0)
            dist.recv(torch.empty_like(back), 0)
        gloo.append(time.perf_counter() - start)
    transport.close()
    return tuple(ours), tuple(gloo)
