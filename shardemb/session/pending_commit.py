"""A commit that is made durable in the background, as its caller sees it."""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING

from shardemb.errors import ReadOnlyError
from shardemb.format.manifest import Commit, check_metadata

if TYPE_CHECKING:
    from pathlib import Path


class PendingCommit:
    """A commit that is made durable in the background: what ``store.commit(wait=False)`` returns.

    It goes on if nobody holds this object. Thread safety: any thread may use it. A fork of the process cannot wait.

    Examples
    --------
    >>> pending = store.commit(step=100, wait=False)
    >>> table.write([1], np.ones((1, 4), np.float32))  # belongs to the next commit
    >>> pending.result()
    Commit(id=1, step=100, metadata={})
    >>> pending.done()
    True
    """

    def __init__(self, path: Path, commit: Commit) -> None:
        self._path, self._commit = path, commit
        self._pid = os.getpid()
        self._durable: Future[None] = Future()

    def __repr__(self) -> str:
        state = "under way"
        if self._durable.done():
            state = "failed" if self._durable.exception() else "durable"
        return f"<PendingCommit {self._commit.id} of '{self._path}', step {self._commit.step}, {state}>"

    def done(self) -> bool:
        """Return whether the commit has ended: it is durable, or it has failed."""
        return self._durable.done()

    def result(self, timeout: float | None = None) -> Commit:
        """Wait until the commit is durable, and return it.

        Parameters
        ----------
        timeout : float, optional
            Most seconds to wait; by default as long as it takes.

        Returns
        -------
        Commit
            With a copy of the metadata.

        Raises
        ------
        TimeoutError
            It is not durable yet; it goes on.
        DiskFullError
            There was no space on the disk. The last commit stands, and so do the changes in memory: the next commit
            takes them. Free some space and commit again.
        OSError, PoisonedError
            Writing or syncing failed; as for `Store.commit`.
        ReadOnlyError
            This process is a fork of the one that commits.
        """
        if os.getpid() != self._pid and not self._durable.done():
            msg = f"the store {self._path} is committed by process {self._pid}, and this is a fork of it; wait there"
            raise ReadOnlyError(msg)
        self._durable.result(timeout)
        return replace(self._commit, metadata=check_metadata(self._commit.metadata))

    def end(self, problem: BaseException | None) -> None:
        """Note that the commit is durable, or why it is not. For the thread that commits; the first call counts."""
        if self._durable.done():
            return
        if problem is None:
            self._durable.set_result(None)
        else:
            self._durable.set_exception(problem)
