"""Fork safety: the child's stores are read-only and drop lock and log, which stay with the parent.

Every store's lock is held while the process forks, so no store in the child is in the middle of a change.
"""

from __future__ import annotations

import os
import threading
import weakref
from functools import partial
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from shardemb.engine.runtime import Runtime


class Opening(Protocol):
    """An open store."""

    runtime: Runtime

    def detach_in_child(self) -> None:
        """Drop lock and log in a child process: they belong to its parent."""


_open: weakref.WeakSet[Opening] = weakref.WeakSet()


class _Forking(threading.local):
    """The openings that a thread has locked while it forks. Several threads may fork at once."""

    def __init__(self) -> None:
        self.locked: list[Opening] = []


_forking = _Forking()


def watch(opening: Opening) -> None:
    """Keep an open store usable in the children of this process, as long as it is referenced elsewhere."""
    _open.add(opening)


def _before_fork() -> None:
    # In the same order in every thread, or two that fork could wait for each other.
    for opening in sorted(_open, key=id):
        opening.runtime.lock.acquire()
        _forking.locked.append(opening)


def _after_fork(*, child: bool) -> None:
    while _forking.locked:
        opening = _forking.locked.pop()
        try:
            if child and not opening.runtime.closed:
                opening.detach_in_child()
        finally:
            opening.runtime.lock.release()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=partial(_after_fork, child=False),
    after_in_child=partial(_after_fork, child=True),
)
