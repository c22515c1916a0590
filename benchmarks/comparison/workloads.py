"""The workloads by name, each run in a process of its own."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from . import (
    adapters,
    ahead,
    around,
    capped,
    committing,
    files,
    filling,
    folding,
    nearest,
    optimizers,
    partitions,
    peers,
    pooling,
    precision,
    ranks,
    reading,
    starting,
    tight,
    training,
)
from .data import remove
from .processes import CannotRun, alone
from .results import Outcome


@dataclass(frozen=True)
class Workload:
    """What is measured, by which function, and against which peers."""

    name: str
    title: str
    run: Callable
    peers: tuple[str, ...] = ()
    data: int | None = None
    """Rows, at full scale, of the table that it shares with other workloads."""


WARM = ("torch", "zarr", "lmdb", "RocksDB", "Lance", "h5py")

WORKLOADS = {
    each.name: each
    for each in (  # those that share a table are next to each other, so that it can be deleted early
        Workload("W1", "warm lookup, uniform ids", reading.warm_uniform, WARM, reading.FULL),
        Workload("W2", "warm lookup, Zipf ids", reading.warm_zipf, WARM, reading.FULL),
        Workload("W5", "durable update", committing.durable_update, tuple(committing.ENGINES), reading.FULL),
        Workload("W8", "commit of 1 % of the rows", committing.incremental, (), reading.FULL),
        Workload("W16", "cold write of whole rows", committing.cold_writes, ("RocksDB",), reading.FULL),
        Workload("W9", "parquet export", around.export, (), reading.FULL),
        Workload("W6a", "warm training step", training.warm_steps, ("torch", "FBGEMM"), reading.FULL),
        Workload("W6b", "training with commits", training.committed_steps, ("torch",), reading.FULL),
        Workload("B1", "lookups of bags", pooling.lookups, ("torch",), reading.FULL),
        Workload("B2", "training steps on bags", pooling.steps, ("torch", "FBGEMM"), reading.FULL),
        Workload("I4", "exact nearest neighbours", nearest.exact, (), reading.FULL),
        Workload("T5", "two ranks that share a store", ranks.ranks, ("torch",), reading.FULL),
        Workload("T1", "an Embedding in torch", adapters.rows, ("torch",), reading.FULL),
        Workload("W14", "a hundred steps from a cold start", starting.cold_start, ("torch",), reading.FULL),
        Workload("W15", "a hundred steps after creation", starting.first_steps, (), reading.FULL),
        Workload("W3", "cold lookup", reading.cold_uniform, ("Lance", "lmdb", "RocksDB"), reading.LARGE),
        Workload("W18", "cold lookup beside a fold", folding.beside_fold, (), reading.LARGE),
        Workload("W7", "look-ahead", capped.look_ahead, (), reading.LARGE),
        Workload("W4", "training under a memory limit", capped.capped_training, ("RocksDB",), reading.LARGE),
        Workload("T3", "n-gram memory in torch, read ahead", ahead.ngram_memory, ("torch",), reading.LARGE),
        Workload("T4", "memory of training in torch under a limit", tight.memory, ("torch",), tight.ROWS),
        Workload("W17", "filling a table", filling.fill),
        Workload("W10", "a table of a billion rows", around.huge),
        Workload("W11", "small batches", reading.small_batches),
        Workload("W12", "many tables in one call", reading.many_tables),
        Workload("B3", "bags of many tables in one call", pooling.many_tables),
        Workload("B4", "rows of bfloat16", precision.short_rows),
        Workload("B5", "rows of float8 with scales", precision.scaled_rows),
        Workload("B6", "a step of each optimizer", optimizers.each_optimizer),
        Workload("T2", "the features of a recommender in torch", adapters.bags, ("torch",)),
        Workload("T6", "importing shardemb.torch", adapters.imports, ("torch",)),
        Workload("I5", "nearest neighbours through an index", nearest.indexed, ("usearch",)),
        Workload("I1", "files into tables", files.imports, ("gensim",)),
        Workload("I2", "tables into files", files.exports, ("gensim",), reading.LARGE),
        Workload("I3", "what has changed into a file", files.changes),
        Workload("B7", "clipping by the global norm", optimizers.clipping),
        Workload("D1", "one owner of partitions", partitions.one_owner, ("dask.distributed",)),
        Workload("D2", "two owners of partitions", partitions.two_owners, ("dask.distributed",)),
        Workload("D7", "an owner of partitions is killed", partitions.recovery, ("dask.distributed",)),
        Workload("D8", "more machines, computed", partitions.scaling, ("dask.distributed",)),
        Workload("W13", "the first seconds of a process", around.first_use),
    )
}


def run_all(names, settings, say):
    """Run workloads one after the other; `say` is called with each outcome as soon as it is known."""
    chosen = [workload for workload in WORKLOADS.values() if workload.name in names]
    outcomes = []
    for number, workload in enumerate(chosen):
        outcomes.append(_run(workload, settings))
        say(outcomes[-1])
        if workload.data not in [later.data for later in chosen[number + 1 :]]:
            remove(settings.folder / f"rows-{settings.rows(workload.data or 0)}")
    return outcomes


def _run(workload, settings):
    start = time.perf_counter()
    cases, error, skipped = (), "", ""
    try:
        cases = tuple(alone(workload.run, settings))
    except CannotRun as reason:
        skipped = str(reason)
    except Exception as problem:  # the others can still be measured
        traceback.print_exc()
        error = f"{type(problem).__name__}: {problem}"
    elapsed = time.perf_counter() - start
    absent = peers.missing(workload.peers)
    return Outcome(workload.name, workload.title, cases, absent, elapsed, error, skipped)
