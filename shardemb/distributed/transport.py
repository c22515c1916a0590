"""Calls of owners, through the connections that dask.distributed has anyway.

A call is a small pickled object and arrays; so is its answer. Arrays travel as they are, without a copy on either side,
from process to process: the scheduler sees none of it. What an owner raises is raised here.

Every call has a deadline. A commit or a verification of a large store may take longer than any; so whoever has waited
for that long asks whether the call is still under way, and takes no answer within another deadline for a lost owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import distributed
from distributed.comm import parse_host_port
from distributed.protocol import to_serialize
from distributed.utils import sync

from shardemb.errors import ShardEmbError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

CALL, IS_UNDER_WAY = "shardemb_call", "shardemb_is_under_way"
"""The names of the handlers on a worker: for a call, and for the question whether that is being carried out."""

WAIT_LIMIT_S = 60.0
"""How long a change waits for the decision about a commit."""

PROBE_S = 0.5
"""How long nothing comes before it is looked whether the other process is there at all."""

PAUSE_S = 1.0
"""How long an answer may be on its way."""

PLUGIN = "shardemb-owner"
"""The name of the plugin that has the handler."""


class UnreachableError(ShardEmbError):
    """A process did not answer: it ended, or the deadline passed. Whether it has done what was asked is not known."""


@dataclass(frozen=True)
class Answer:
    """What a call returned: an object, and arrays."""

    result: Any
    arrays: Sequence[NDArray[Any]]


@dataclass(frozen=True)
class Call:
    """What one process is asked: an object, and arrays that are sent as they are."""

    request: Any
    arrays: Sequence[NDArray[Any]] = ()


class Wire:
    """The connections of this process: of a client, or of the worker that a task runs on.

    Parameters
    ----------
    client : distributed.Client, optional
        By default the connections of the worker that this thread runs a task of.

    Raises
    ------
    TypeError
        The client is asynchronous, so that a call could not wait for its answer.
    ValueError
        There is no client, and this is no task.

    Attributes
    ----------
    task : (str, int) or None
        The key of the task that this thread runs, and which run of it it is.
    """

    def __init__(self, client: distributed.Client | None = None) -> None:
        if client is not None and client.asynchronous:
            msg = "shardemb waits for answers: pass a Client that was made without asynchronous=True"
            raise TypeError(msg)
        node = client if client is not None else distributed.get_worker()
        self._loop, self._pool = node.loop, node.rpc
        self.client = client
        self.task = None if client is not None else _task_of(node)

    def call(
        self, calls: Mapping[str, Call], deadline_s: float
    ) -> tuple[dict[str, Answer], dict[str, Exception]]:
        """Ask several processes at the same time.

        Parameters
        ----------
        calls : mapping of str to Call
            By address.
        deadline_s : float
            Seconds that each of them has.

        Returns
        -------
        answers : dict of str to Answer
            Of those that answered.
        errors : dict of str to Exception
            What the others raised; an `UnreachableError` for those that did not answer.
        """
        found: list[Answer | Exception] = sync(self._loop, self._call_all, calls, deadline_s)
        pairs = list(zip(calls, found, strict=True))
        return (
            {address: each for address, each in pairs if isinstance(each, Answer)},
            {address: each for address, each in pairs if isinstance(each, Exception)},
        )

    def workers(self) -> dict[str, dict[str, Any]]:
        """Return the workers of the cluster, by address, each with its name and host; only for a client."""
        assert self.client is not None
        found: dict[str, dict[str, Any]] = dict(self.client.scheduler_info(n_workers=-1)["workers"])
        return found

    async def _call_all(self, calls: Mapping[str, Call], deadline_s: float) -> list[Answer | Exception]:
        waiting = (self._call_one(address, each, deadline_s) for address, each in calls.items())
        return list(await asyncio.gather(*waiting))

    async def _call_one(self, address: str, call: Call, deadline_s: float) -> Answer | Exception:
        arrays, number = [to_serialize(each) for each in call.arrays], uuid.uuid4().hex
        asked = getattr(self._pool(address), CALL)(
            number=number, request=pickle.dumps(call.request), arrays=arrays
        )
        waiting = asyncio.ensure_future(asked)
        try:
            if not (await asyncio.wait({waiting}, timeout=min(PROBE_S, deadline_s)))[0]:
                await _require_listening(address)
            while not (await asyncio.wait({waiting}, timeout=deadline_s))[0]:
                await self._require_under_way(address, number, waiting, deadline_s)
            reply = await waiting
        except TimeoutError:
            return UnreachableError(f"{address} did not answer within {deadline_s:g} s")
        except (OSError, AttributeError, KeyError, ValueError) as error:
            # A worker that ends closes its connections; one that has just begun has no such handler yet.
            return UnreachableError(f"{address} cannot be reached: {type(error).__name__}: {error}")
        finally:
            waiting.cancel()
        if reply is None:  # of a worker that is ending
            return UnreachableError(f"{address} gave no answer")
        if "error" in reply:
            raised: Exception = pickle.loads(reply["error"])
            return raised
        return Answer(pickle.loads(reply["result"]), reply["arrays"])

    async def _require_under_way(
        self, address: str, number: str, waiting: asyncio.Future[Any], deadline_s: float
    ) -> None:
        asked = getattr(self._pool(address), IS_UNDER_WAY)(number=number)
        if not await asyncio.wait_for(asked, deadline_s) and not waiting.done():
            await asyncio.sleep(PAUSE_S)  # its answer may be on the way
            if not waiting.done():
                raise TimeoutError


def _task_of(worker: distributed.Worker) -> tuple[str, int] | None:
    """Return the key of the task that this thread runs, and which run of it it is; None if it runs none."""
    try:
        key = worker.get_current_task()
    except KeyError:
        return None
    return str(key), int(getattr(worker.state.tasks[key], "run_id", 0))


async def _require_listening(address: str) -> None:
    """Raise `ConnectionRefusedError` if nobody listens there, which dask's own connecting would try again for long."""
    host, port = parse_host_port(address)
    with contextlib.suppress(TimeoutError):
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), PAUSE_S)
        writer.close()


async def answered(
    serve: Callable[[Any, Sequence[NDArray[Any]]], Any], request: bytes, arrays: Sequence[NDArray[Any]]
) -> dict[str, Any]:
    """Carry out a call that came in, with ``serve(request, arrays)``; return what is sent back, errors included."""
    try:
        result, found = await serve(pickle.loads(request), arrays)
    except Exception as error:  # the caller raises it
        return {"error": pickle.dumps(_portable(error))}
    return {"result": pickle.dumps(result), "arrays": [to_serialize(each) for each in found]}


def _portable(error: Exception) -> Exception:
    """Return an error as it can be sent: itself, or one that says the same."""
    try:
        same = type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # errors may have any arguments
        same = False
    return error if same else ShardEmbError(f"{type(error).__name__}: {error}")
