"""Messages between the rank that owns a store and the others, through torch.distributed.

A message is any Python object. Its arrays travel as they are, without a copy on the way out, behind a short head that
says how many bytes each has:

::

    HEAD_BYTES  length of the rest, then as much of it as fits: pickle of the sizes of the arrays and of the object
    (the rest of that, if it did not fit)
    each array of at least MIN_BYTES
"""

from __future__ import annotations

import datetime
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from shardemb.errors import ShardEmbError
from shardemb.memory.output_pool import OutputPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HEAD_BYTES = 4096
"""The first part of each message: one round of the network for whatever has no large arrays."""

MIN_BYTES = 1024
"""Shorter arrays are part of the pickle: to send one by itself costs more than its bytes."""

_LENGTH = 8


class Transport:
    """The ranks of a process group, of which each sends to the owner and gets an answer, all in the same order.

    Parameters
    ----------
    group : ProcessGroup
        Of a backend that sends memory of the CPU, such as gloo.
    owner : int
        The owner's rank in the group.
    timeout : float
        Seconds until a rank that does not answer counts as lost.
    """

    def __init__(self, group: dist.ProcessGroup, owner: int, timeout: float) -> None:
        self.rank, self.size, self.owner = dist.get_rank(group), dist.get_world_size(group), owner
        self._group, self._timeout = group, datetime.timedelta(seconds=timeout)
        self._global = [dist.get_global_rank(group, rank) for rank in range(self.size)]
        self._sending: list[tuple[Any, torch.Tensor]] = []
        self._outputs = OutputPool()
        self._lost: str | None = None

    @property
    def others(self) -> list[int]:
        """The ranks but this one, ascending."""
        return [rank for rank in range(self.size) if rank != self.rank]

    def ask(self, request: object) -> Any:  # noqa: ANN401
        """Send a request to the owner, and wait for the answer."""
        self.flush()
        self._send(self.owner, request)
        return self._receive(self.owner)

    def tell(self, request: object) -> None:
        """Send a request to the owner that has no answer."""
        self.flush()
        self._send(self.owner, request)

    def requests(self, own: object) -> list[Any]:
        """Return the requests of all ranks, in their order; `own` is that of the owner, whose call this is."""
        self.flush()
        return [own if rank == self.rank else self._receive(rank) for rank in range(self.size)]

    def answer(self, answers: Sequence[object]) -> None:
        """Send each rank its answer. The arrays in them are sent in the background: nobody may change them."""
        for rank in self.others:
            self._send(rank, answers[rank])

    def flush(self) -> None:
        """Wait for what is still being sent."""
        sending, self._sending = self._sending, []
        for work, _ in sending:
            self._do(self.owner, work.wait, self._timeout)

    def close(self) -> None:
        """Wait until everything is sent, and release memory."""
        try:
            self.flush()
        finally:
            self._outputs.close()

    # ---- one message

    def _send(self, rank: int, message: object) -> None:
        arrays: list[NDArray[np.uint8]] = []
        body = pickle.dumps(message, protocol=5, buffer_callback=lambda each: _is_short(each, arrays))
        rest = pickle.dumps(([each.nbytes for each in arrays], body))
        head = np.zeros(HEAD_BYTES, np.uint8)
        head[:_LENGTH].view(np.int64)[0] = len(rest)
        content = np.frombuffer(rest, np.uint8)
        fitting = min(content.size, HEAD_BYTES - _LENGTH)
        head[_LENGTH : _LENGTH + fitting] = content[:fitting]
        longer = [content[fitting:].copy()] if content.size > fitting else []
        for part in (head, *longer, *arrays):
            self._do(rank, self._begin_to_send, rank, torch.from_numpy(part))

    def _begin_to_send(self, rank: int, part: torch.Tensor) -> None:
        self._sending.append((dist.isend(part, self._global[rank], group=self._group), part))

    def _receive(self, rank: int) -> Any:  # noqa: ANN401
        head = self._bytes(rank, HEAD_BYTES)
        length = int(head[:_LENGTH].view(np.int64)[0])
        rest = head[_LENGTH : _LENGTH + length].tobytes()
        if len(rest) < length:
            rest += self._bytes(rank, length - len(rest)).tobytes()
        sizes, body = pickle.loads(rest)
        return pickle.loads(body, buffers=[self._bytes(rank, size) for size in sizes])

    def _bytes(self, rank: int, count: int) -> NDArray[np.uint8]:
        into = self._outputs.empty((count,), np.dtype(np.uint8))
        self._do(rank, self._wait_for, rank, torch.from_numpy(into))
        return into

    def _wait_for(self, rank: int, into: torch.Tensor) -> None:
        work = dist.irecv(into, self._global[rank], group=self._group)
        assert work is not None
        work.wait(self._timeout)

    def _do(self, rank: int, step: Any, *arguments: Any) -> None:  # noqa: ANN401
        """Do one step with another rank, unless one was lost: then messages may be cut off anywhere."""
        if self._lost is not None:
            raise ShardEmbError(self._lost)
        try:
            step(*arguments)
        except RuntimeError as error:
            self._lost = (
                f"rank {self.rank} of {self.size} waited for rank {rank} in vain ({str(error)[:200]}): that one has "
                f"ended or failed, makes other calls than this one, or needs more than the timeout of "
                f"{self._timeout.total_seconds():g} s; see what it says, and start all of them again"
            )
            raise ShardEmbError(self._lost) from error
        except BaseException as error:
            kind = type(error).__name__
            self._lost = (
                f"rank {self.rank} was interrupted in a call of all ranks ({kind}): start all of them again"
            )
            raise


def _is_short(buffer: pickle.PickleBuffer, arrays: list[NDArray[np.uint8]]) -> bool:
    """Collect a buffer for sending by itself; return whether it is too short for that."""
    with buffer.raw() as raw:
        if raw.nbytes < MIN_BYTES:
            return True
        array = np.frombuffer(raw, np.uint8)
        arrays.append(
            array if array.flags.writeable else array.copy()
        )  # torch warns of memory that it may not write
    return False
