"""What becomes of open stores where the process forks: the parent keeps them, the child gets them read-only and closed.

Every store's lock is held while the process forks, so that the child finds none in the middle of a change.
"""

from __future__ import annotations

import os
import weakref
from functools import partial
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from shardemb.runtime import Runtime


class Forkable(Protocol):
    """What is told of forks."""

    _runtime: Runtime

    def _leave_to_parent(self) -> None:
        """Keep neither lock nor log open, and let the parent see to everything."""


_open_stores: weakref.WeakSet[Forkable] = weakref.WeakSet()
_held: list[Forkable] = []


def watch(store: Forkable) -> None:
    """Tell a store of every fork from now on, until it is closed."""
    _open_stores.add(store)


def _before_fork() -> None:
    _held[:] = [store for store in _open_stores if not store._runtime.closed]
    for store in _held:
        store._runtime.lock.acquire()


def _after_fork(*, child: bool) -> None:
    for store in _held:
        if child:
            store._leave_to_parent()
        store._runtime.lock.release()
    _held.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=partial(_after_fork, child=False),
    after_in_child=partial(_after_fork, child=True),
)
