"""Progress of long jobs, as the caller chooses to see it.

A job opens `track` with its total number of steps, and calls the function that it yields after each step, from any
thread. The caller decides what becomes of these calls, by the argument `progress` of every public method that takes
long:

- ``False`` or ``None``: nothing is shown, which is what a library does unless asked;
- ``True``: a bar on stderr if that is a terminal, else a line every ten seconds and one when the job is done, so that a
  log gets neither escape codes nor a hundred half-drawn bars;
- ``"lines"``: these lines, also on a terminal;
- a function: called as ``progress(done, total)`` after each step. If it raises, the job ends with that exception.

rich is imported only when a bar is actually drawn.

A job with several threads runs its tasks through ``compute.scheduler.run``. No task is running any more when that
raises, so the caller can clean up.
"""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Literal, TypeAlias

from shardemb.base.formatting import plural, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Report: TypeAlias = "Callable[[int, int], object]"
"""Takes the steps done and the total; its result is ignored."""

Progress: TypeAlias = 'bool | Literal["lines"] | Report | None'
"""What a public method accepts as `progress`."""

Advance: TypeAlias = "Callable[[int], None]"
"""Takes the number of steps just done."""

SECONDS_BETWEEN_LINES = 10.0
"""How often a job says in a log how far it is."""


@contextmanager
def track(total: int, description: str, *, unit: str = "row", progress: Progress = None) -> Iterator[Advance]:
    """Show a job's progress while the block runs.

    Parameters
    ----------
    total : int
        Steps of the whole job. If it is 0 there is nothing to report, and a function is never called.
    description : str
        Label of the bar or of the line.
    unit : str
        What a step is, for the bar and the lines. Bytes are shown in KiB, MiB and so on.
    progress : bool or "lines" or callable or None
        See the description of the module.

    Yields
    ------
    callable
        ``advance(steps)``, to be called after each step or batch of steps, from any thread. Calls are serialised, so
        the caller's function never sees a smaller number than before. `advance` raises what that function raises.

    Raises
    ------
    TypeError
        `progress` is none of these.

    Examples
    --------
    >>> with track(3, "counting", progress=lambda done, total: print(f"{done}/{total}")) as advance:
    ...     advance(2)
    ...     advance(1)
    2/3
    3/3
    """
    done = 0
    lock = threading.Lock()
    with _reporter(total, description, unit, progress) as report:

        def advance(steps: int) -> None:
            nonlocal done
            with lock:
                done += steps
                report(done, total)

        yield advance


def _reporter(total: int, description: str, unit: str, progress: Progress) -> AbstractContextManager[Report]:
    if callable(progress):
        return nullcontext(progress)
    if progress not in (None, False, True, "lines"):
        msg = (
            f'progress must be True, False, None or a function of (done, total), or "lines", got {progress!r}'
        )
        raise TypeError(msg)
    if not progress:
        return nullcontext(lambda done, total: None)
    # A process without a console (a Windows service, pythonw) has no stderr at all.
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return _bar(total, description, unit) if terminal and progress != "lines" else _lines(description, unit)


def _amount(done: int, unit: str) -> str:
    return size(done) if unit == "byte" else plural(done, unit)


def _share(done: int, total: int, unit: str) -> str:
    return f"{size(done) if unit == 'byte' else f'{done:,}'} of {_amount(total, unit)}"


@contextmanager
def _bar(total: int, description: str, unit: str) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    try:
        bar.start()
    except RuntimeError:  # no thread can be started, for want of memory or at exit: no bar
        yield lambda done, total: None
        return
    try:
        task = bar.add_task(description, total=total, amount="")
        yield lambda done, total: bar.update(task, completed=done, amount=_share(done, total, unit))
    finally:
        bar.stop()


@contextmanager
def _lines(description: str, unit: str) -> Iterator[Report]:
    start = last = time.monotonic()
    reached = 0

    def say(text: str) -> None:
        if sys.stderr is not None:
            print(f"{description}: {text} in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)

    def report(done: int, total: int) -> None:
        nonlocal last, reached
        reached = done
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            say(_share(done, total, unit))

    yield report
    say(_amount(reached, unit))
