"""Blocks that a signal cannot interrupt: it takes effect at their end."""

from __future__ import annotations

import contextlib
import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType


_deferring = False  # of the main thread; a nested block leaves everything to the outer one


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM to the end of the block, if a Python function handles them."""
    global _deferring  # noqa: PLW0603 signal handlers belong to the process
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
        # All handlers are back before the first one runs, because it may raise.
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
    finally:  # even if the first handler raises, the other signal is delivered
        _deliver(received[1:], handlers)
