"""The results of a run, as frozen data: arms, bars, cases, outcomes."""

import statistics
from dataclasses import asdict, dataclass, field
from typing import Any

OURS = "shardemb"


@dataclass(frozen=True)
class Arm:
    """One way to do the work: how many rows a call has, and how long each call took."""

    name: str
    rows: float
    seconds: tuple[float, ...]
    note: str = ""

    @property
    def median(self):
        """Seconds of the median call."""
        return statistics.median(self.seconds)

    @property
    def rate(self):
        """Rows per second of the median call."""
        return self.rows / self.median


@dataclass(frozen=True)
class Bar:
    """A promise and what was measured; `value` is None if the peer is missing or could not run."""

    what: str
    value: float | None
    target: float
    unit: str = "x"
    at_least: bool = True
    stretch: float | None = None

    @property
    def met(self):
        """Whether the promise holds; None if nothing was measured."""
        return None if self.value is None else self._reaches(self.target)

    @property
    def stretch_met(self):
        """Whether the stretch goal holds; None if there is none, or nothing was measured."""
        return None if self.value is None or self.stretch is None else self._reaches(self.stretch)

    def _reaches(self, target):
        return bool(self.value >= target if self.at_least else self.value <= target)


@dataclass(frozen=True)
class Case:
    """Arms that did the same work, in turns."""

    name: str
    arms: tuple[Arm, ...] = ()
    bars: tuple[Bar, ...] = ()
    equal: bool | None = None
    """Whether all arms returned the same; None if there is nothing to compare."""
    limit: float | None = None
    """Rows per second that the device allows."""
    notes: tuple[str, ...] = ()
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """A workload with all of its cases."""

    workload: str
    title: str
    cases: tuple[Case, ...] = ()
    missing: tuple[str, ...] = ()
    seconds: float = 0.0
    error: str = ""
    skipped: str = ""
    """Why it cannot run on this machine."""


def at_most(what, value, target, unit, stretch=None):
    """Make a bar that is met by values of at most `target`."""
    return Bar(what, value, target, unit, at_least=False, stretch=stretch)


def faster(arms, ours, peer, target, stretch=None):
    """Make a bar: how many times as fast as the peer ours is, in rows per second; both are names in `arms`."""
    known = ours in arms and peer in arms
    value = arms[ours].rate / arms[peer].rate if known else None
    return Bar(f"{ours} vs {peer}", value, target, stretch=stretch)


def as_document(machine, outcomes, settings) -> dict[str, Any]:
    """Turn a run into a JSON document, including the values computed from it."""
    return {
        "machine": asdict(machine),
        "settings": settings,
        "workloads": {outcome.workload: _outcome(outcome) for outcome in outcomes},
    }


def _outcome(outcome):
    cases = [
        {
            **asdict(case),
            "equal": None if case.equal is None else bool(case.equal),
            "arms": {arm.name: {**asdict(arm), "median": arm.median, "rate": arm.rate} for arm in case.arms},
            "bars": [{**asdict(bar), "met": bar.met, "stretch_met": bar.stretch_met} for bar in case.bars],
        }
        for case in outcome.cases
    ]
    return {**asdict(outcome), "cases": cases}
