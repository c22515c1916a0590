"""Training steps in memory, against torch and FBGEMM: warm (W6a), and with commits (W6b)."""

import time
from functools import partial

import numpy as np

import shardemb
from benchmarks import common
from benchmarks.common import ROW_BYTES

from . import memory, peers, torches
from .data import ids_of, remove, warm
from .racing import Contender, race, same_bytes
from .reading import FULL
from .results import Arm, Case, at_most, faster

BATCH = 65_536
GRADIENTS = 8
"""Arrays of gradients, used in turn: one per step would not fit in memory."""


def make_batches(distribution, rows):
    """Make a function that returns a given number of ids with gradients."""
    ids = ids_of(distribution, rows)
    return lambda size: (ids(size), common.make_values(size) - np.float32(0.5))


def make_steps(distribution, rows, batch, steps):
    """Return that many batches: ids that are new in each step, and one of a few arrays of gradients."""
    make = make_batches(distribution, rows)
    gradients = [make(batch)[1] for _ in range(GRADIENTS)]
    ids = ids_of(distribution, rows)
    return [(ids(batch), gradients[step % GRADIENTS]) for step in range(steps)]


def step_of(table):
    """Make our training step: lookup, then update."""

    def step(batch):
        ids, grads = batch
        rows = table.lookup(ids)
        table.update(ids, grads)
        return rows

    return step


# ---- W6a: without commits -----------------------------------------------------------------------------------------

STEPS_BEFORE, TIMED = 200, 60
"""Steps after opening that are not timed, and then those that are: most rows were changed before, but not all."""


def warm_steps(settings):
    """W6a: steps on rows in memory, 200 to 260 steps after opening."""
    data = settings.data(FULL)
    batch = settings.batch(BATCH, data.rows)
    targets = {"uniform": (3.0, 5.0), "zipf": (3.0, 4.0)}
    adam = _against(settings, data, batch, "Adam", "torch", targets)
    targets = {"uniform": (2.0, None), "zipf": (2.0, None)}
    row_wise = _against(settings, data, batch, "RowWiseAdagrad", "FBGEMM", targets)
    work = memory.Work(data.rows, batch, "zipf", 20, optimizer="Adam", commit_every=10)
    return [*adam, *row_wise, memory.check("W6a", work, settings)]


def _against(settings, data, batch, optimizer, peer, targets):
    """Race our step against one peer's, with one case per distribution of ids."""
    kind = {"torch": torches.TorchAdam, "FBGEMM": torches.FbgemmAdagrad}[peer]
    path = data.store(f"train-{optimizer}", common.optimizer(optimizer))
    cases = []
    for distribution, target in targets.items():
        theirs = kind(np.array(data.raw)) if peers.missing(("torch", peer)) == () else None
        with shardemb.open(path) as store:
            table = store["rows"]
            warm(table)
            contenders = [Contender(f"lookup + {optimizer} update", step_of(table))]
            if theirs is not None:
                _meet(contenders[0].call, theirs, data, batch)
                contenders.append(Contender(kind.name, theirs.step))
            cases.append(_steps(settings, table, contenders, distribution, batch, target, kind.name))
            store.rollback()
    return cases


def _meet(ours, theirs, data, batch):
    """Check that both return the same bytes before the first step, in which torch creates its state."""
    given = make_batches("uniform", data.rows)(batch)
    if not same_bytes(ours(given), theirs.step(given).numpy()):
        raise AssertionError(f"{theirs.name} returned other bytes")


def _steps(settings, table, contenders, distribution, batch, target, peer):
    make = make_batches(distribution, table.num_embeddings)
    before = STEPS_BEFORE if settings.scale >= 0.2 else STEPS_BEFORE // 10
    for given in make_steps(distribution, table.num_embeddings, batch, before):
        for each in contenders:
            each.call(given)
    arms = race(contenders, make, batch, settings.times(TIMED))
    ours = contenders[0].name
    distinct = np.unique(make(batch)[0]).size / batch
    record = table.nbytes / table.num_embeddings
    # Rows are returned, gradients are read, and each distinct record is read and written.
    moved = 2 * ROW_BYTES + distinct * record
    return Case(
        f"{distribution}, {contenders[0].name}",
        tuple(arms.values()),
        (faster(arms, ours, peer, target[0], stretch=target[1]),),
        True if len(contenders) > 1 else None,
        settings.machine.copy_bytes_per_s / moved,
        (f"{distinct:.0%} of a batch is distinct", f"{before} steps before the first that is timed"),
    )


# ---- W6b: from an empty log, with commits -------------------------------------------------------------------------

STEPS, COMMIT_EVERY, ROUNDS = 300, 100, 3
BESIDE = "the same, commits in the background"
LONG_LOG = 8 * 2**30
"""Holds everything that is committed here: what a job gains if it can spare the disk space."""


def committed_steps(settings):
    """W6b: the total time of 300 steps with a durable commit every 100, from a table in memory."""
    data = settings.data(FULL)
    work = memory.Work(
        data.rows, settings.batch(BATCH, data.rows), "uniform", 20, optimizer="Adam", commit_every=10
    )
    return [
        _committed(settings, "uniform", 2.5, stretch=4.0),
        _committed(settings, "zipf", 3.5, stretch=5.0),
        memory.check("W6b", work, settings),
    ]


def _committed(settings, distribution, target, stretch):
    data = settings.data(FULL)
    batch = settings.batch(BATCH, data.rows)
    steps, every = (STEPS, COMMIT_EVERY) if settings.scale >= 0.2 else (30, 10)
    inputs = make_steps(distribution, data.rows, batch, steps)
    sample = common.make_ids("uniform", data.rows, 4096)
    ours = f"lookup + Adam update, commit every {every}"
    beside = []
    notes = [f"{steps} steps a run, {ROUNDS} runs in turns; the figure is a step's share of the total"]
    trainings = {
        ours: partial(_train_ours, shardemb.open),
        f"the same, log_bytes of {LONG_LOG >> 30} GiB": partial(
            _train_ours, partial(shardemb.open, log_bytes=LONG_LOG)
        ),
        BESIDE: partial(_train_beside, beside),
        torches.TorchAdam.name: _train_torch,
    }
    if not peers.has("torch"):
        del trainings[torches.TorchAdam.name]
    seconds = {name: [] for name in trainings}
    rows = dict.fromkeys(trainings)
    for number in range(ROUNDS):
        for name in list(trainings)[:: -1 if number % 2 else 1]:
            step_s, commit_s, rows[name] = trainings[name](data, inputs, every, sample)
            total = sum(step_s) + sum(commit_s)
            seconds[name].append(total / steps)
            commits = ", ".join(f"{each:.2f}" for each in commit_s)
            notes.append(f"{name}: {total:.1f} s, of it waiting for commits {commits} s")
    arms = {name: Arm(name, batch, tuple(each)) for name, each in seconds.items()}
    equal = all(np.allclose(each, rows[ours], 1e-4, 1e-5) for each in rows.values())
    notes.append("rows of both agree within 1e-5 in the end")
    shown = ", ".join(f"{each:.2f}" for each in beside)
    notes.append(f"a step beside a commit, in times of one before the first commit: {shown}")
    bars = (
        faster(arms, ours, torches.TorchAdam.name, target, stretch=stretch),
        at_most("a step beside a commit", float(np.median(beside)) if beside else None, 1.3, "x"),
    )
    return Case(distribution, tuple(arms.values()), bars, equal, notes=tuple(notes))


def _train_ours(opened, data, inputs, every, sample):
    path = data.store("logged", common.optimizer("Adam"))
    with opened(path) as store:
        table = store["rows"]
        warm(table)  # as the peer's is; the log is empty
        step_s, commit_s = _timed_steps(step_of(table), store.commit, inputs, every)
        rows = table.lookup(sample)
    remove(path)
    return step_s, commit_s, rows


def _train_beside(ratios, data, inputs, every, sample):
    """Train while commits are made durable in the background; add to `ratios` how much slower a step is meanwhile."""
    path = data.store("logged", common.optimizer("Adam"))
    alone, beside, pending = [], [], None
    with shardemb.open(path) as store:
        table = store["rows"]
        warm(table)
        step, begun = step_of(table), time.perf_counter()
        for number, batch in enumerate(inputs, 1):
            start = time.perf_counter()
            step(batch)
            took = time.perf_counter() - start
            if pending is None and number > every // 2:  # the first steps are slower: nearly all rows are new
                alone.append(took)
            elif pending is not None and not pending.done():
                beside.append(took)
            if number % every == 0:
                pending = store.commit(wait=False)  # waits for the one before
        trained = time.perf_counter()
        pending.result()
        ended = time.perf_counter()
        rows = table.lookup(sample)
    remove(path)
    if beside:  # small commits may be over before the next step
        ratios.append(float(np.median(beside) / np.median(alone)))
    return [trained - begun], [ended - trained], rows


def _train_torch(data, inputs, every, sample):
    peer, saved = torches.TorchAdam(np.array(data.raw)), data.folder / "saved.pt"
    step_s, commit_s = _timed_steps(peer.step, lambda: peer.save(saved), inputs, every)
    remove(saved)
    return step_s, commit_s, peer.rows(sample)


def _timed_steps(step, commit, inputs, every):
    """Return the seconds of each run of steps, and of the commit after it."""
    step_s, commit_s = [], []
    for first in range(0, len(inputs), every):
        start = time.perf_counter()
        for batch in inputs[first : first + every]:
            step(batch)
        middle = time.perf_counter()
        commit()
        step_s.append(middle - start)
        commit_s.append(time.perf_counter() - middle)
    return step_s, commit_s
