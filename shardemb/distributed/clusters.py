"""How workers have to be started to be good owners, whether they are, and a cluster of such on one machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import dask.config
import distributed

from shardemb.base import validation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": 2**30,
    "MALLOC_TRIM_THRESHOLD_": 2**31,
    "MALLOC_TOP_PAD_": 2**26,
}
"""What glibc's allocator has to be told when a worker starts. Dask's nannies have it give memory back at once, and then
each batch of rows is mapped, touched page by page and unmapped: a lookup of 16 MB takes half as long again."""


def local_cluster(workers: int = 2, *, threads_per_worker: int = 1) -> distributed.LocalCluster:
    """Start a cluster on this machine whose workers are good owners, to try a distributed store on.

    Parameters
    ----------
    workers : int
        Processes, with the names ``"0"``, ``"1"`` and so on. Each has a nanny, which starts another one if it ends.
    threads_per_worker : int
        For tasks. Owners have threads of their own.

    Returns
    -------
    distributed.LocalCluster
        A context manager.

    Raises
    ------
    TypeError, ValueError
        A number is none, or less than 1.

    Examples
    --------
    >>> from distributed import Client
    >>> from shardemb.distributed import local_cluster
    >>> with local_cluster(2) as cluster, Client(cluster) as client:  # doctest: +SKIP
    ...     store = shardemb.distributed.open(client, "words.zarr", owners={"0": "/nvme/0", "1": "/nvme/1"})
    """
    count = validation.count(workers, "workers")
    threads = validation.count(threads_per_worker, "threads_per_worker")
    with dask.config.set({"distributed.nanny.pre-spawn-environ": ENVIRONMENT}):
        return distributed.LocalCluster(
            n_workers=count,
            threads_per_worker=threads,
            processes=True,
            memory_limit=0,
            dashboard_address=":0",
        )


def allocator() -> dict[str, str | None]:
    """Return how the allocator of this process was set up."""
    return {name: os.environ.get(name) for name in ENVIRONMENT}


def complaints(workers: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> Iterator[str]:
    """Say what is wrong with workers that own partitions, and what would be right.

    Parameters
    ----------
    workers : mapping of str to mapping
        What the scheduler says about workers, by address.
    settings : mapping of str to mapping
        The `allocator` of each owner, by address.
    """
    limited = sorted(address for address in settings if workers.get(address, {}).get("memory_limit"))
    if limited:
        yield (
            f"the workers {', '.join(limited)} have a memory limit, which counts mapped files, so that nannies may "
            f"kill them for rows that the page cache holds: start them with `dask worker --memory-limit 0`"
        )
    returning = sorted(address for address, found in settings.items() if _gives_back(found))
    if returning:
        lines = " ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        yield (
            f"the workers {', '.join(returning)} give memory back to the system after each batch, which costs up to "
            f"half of the time of a lookup. Configure dask where nannies run, in "
            f"distributed.nanny.pre-spawn-environ, or without nannies start workers with {lines}"
        )


def _gives_back(found: Mapping[str, str | None]) -> bool:
    """Whether the allocator trims below 64 MiB, as dask's nannies want it."""
    value = found.get("MALLOC_TRIM_THRESHOLD_")
    return value is not None and value.isdigit() and int(value) < 2**26
