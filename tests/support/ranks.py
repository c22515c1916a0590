"""Processes that are the ranks of a process group, and run what tests give them."""

import datetime
import multiprocessing
import traceback

SECONDS = 100
"""Until a test that waits for its ranks fails."""


class RankPool:
    """Processes of one gloo group; ``pool.run(function, *arguments)`` runs it on all of them, and returns the results.

    The function is called as ``function(rank, *arguments)``.
    """

    def __init__(self, size, meeting):
        context = multiprocessing.get_context("spawn")
        self._ends, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, rank, size, str(meeting)), daemon=True)
            process.start()
            self._ends.append(here)
            self.processes.append(process)

    def run(self, function, *arguments):
        """Return what each rank returns; raise if one raises."""
        for end in self._ends:
            end.send((function, arguments))
        for rank in range(len(self._ends)):  # of all, before the first problem is raised
            self._await(rank)
        return [self.result(rank) for rank in range(len(self._ends))]

    def result(self, rank):
        """Wait for what a rank returns."""
        self._await(rank)
        problem, result = self._ends[rank].recv()
        if problem is not None:
            raise AssertionError(f"rank {rank}: {problem}")
        return result

    def _await(self, rank):
        if not self._ends[rank].poll(SECONDS):
            raise TimeoutError(f"rank {rank} has not returned")

    def close(self):
        for end, process in zip(self._ends, self.processes, strict=True):
            if process.is_alive():
                end.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()


def _work(end, rank, size, meeting):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    while (given := end.recv()) is not None:
        function, arguments = given
        try:
            end.send((None, function(rank, *arguments)))
        except BaseException:
            end.send((traceback.format_exc(), None))
    dist.destroy_process_group()
