"""What a forked child does with locks: other threads may have held them, and do not exist in the child."""

from __future__ import annotations

import threading


def usable_in_child(lock: threading.RLock) -> threading.RLock:
    """Return a lock as a child may use it: itself if nobody else holds it, otherwise a new one.

    Only for locks that protect something that is consistent between any two steps of their holders.
    """
    if lock.acquire(blocking=False):
        lock.release()
        return lock
    return threading.RLock()
