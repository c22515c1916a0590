"""Clusters of dask.distributed on this machine, whose processes tests stop and kill."""

import contextlib
import os
import signal
import time
from unittest import mock

import pytest

pytest.importorskip("distributed.client", reason="distributed is not installed")

import dask
import distributed

import shardemb.distributed

QUICK = {
    "distributed.comm.timeouts.connect": "10s",
    "distributed.deploy.lost-worker-timeout": "1h",  # or the cluster ends the nanny of one that is killed twice
    "distributed.admin.tick.limit": "60s",  # a slow machine is no news
}


class Cluster:
    """Workers as processes of their own, with the names ``"0"``, ``"1"`` and so on."""

    def __init__(self, workers):
        self._stack = contextlib.ExitStack()
        # Nannies set variables of this process, by which the next ones that it starts would be different.
        self._stack.enter_context(mock.patch.dict(os.environ))
        self._stack.enter_context(dask.config.set(QUICK))
        local = shardemb.distributed.local_cluster(workers, threads_per_worker=2)
        self._local = self._stack.enter_context(local)
        self.client = self._stack.enter_context(distributed.Client(self._local))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self._stack.__exit__(*error)

    @staticmethod
    def owners(folder, workers=2):
        """Name folders for owners to put their partitions into."""
        return {str(worker): folder / f"owner-{worker}" for worker in range(workers)}

    def open(self, path, **options):
        """Open a distributed store, or create one."""
        return shardemb.distributed.open(self.client, path, **options)

    def kill(self, worker, number=signal.SIGKILL):
        """Send a signal to a worker's process; return its id."""
        process = self._local.workers[worker].pid
        os.kill(process, number)
        return process

    def wait_for(self, worker, other_than):
        """Wait until a nanny has started a new process."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            found = self._local.workers[worker]
            if found.pid not in (None, other_than) and found.worker_address is not None:
                return
            time.sleep(0.05)
        pytest.fail("the nanny has started no new process")
