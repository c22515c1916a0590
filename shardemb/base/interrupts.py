"""Signals that take effect at the end of a block and not within it."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


_deferring = False  # in the main thread: a block within a block has nothing to do


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Let SIGINT and SIGTERM, where Python handles them, take effect at the end of the block and not within it."""
    global _deferring  # noqa: PLW0603 signal handlers are those of the process
    if _deferring or threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    received: list[tuple[int, FrameType | None]] = []
    previous = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM)
        if callable(handler := signal.getsignal(number))
    }
    try:
        for number in previous:
            signal.signal(number, lambda number, frame: received.append((number, frame)))
        _deferring = True
        yield
    finally:
        _deferring = False
        for number, handler in previous.items():
            signal.signal(number, handler)
        _deliver(received, previous)


def _deliver(
    received: list[tuple[int, FrameType | None]],
    handlers: dict[signal.Signals, Callable[[int, FrameType | None], object]],
) -> None:
    if not received:
        return
    number, frame = received[0]
    try:
        handlers[signal.Signals(number)](number, frame)
    finally:  # the first may raise, and the second is due all the same
        _deliver(received[1:], handlers)
