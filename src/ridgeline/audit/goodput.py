"""Goodput: of the time that a run held its machine, how much went into steps that were kept.

From metrics.jsonl alone, so that a run that was killed shows what there is. A session lasts from
the start of its command (its first event less the seconds that it took to start) to the last that
was written of it; what a later session threw away of it, it wrote down as lost. Time between two
sessions is not held, and not counted.
"""

from __future__ import annotations

import math
from typing import Final

from pydantic import BaseModel, ConfigDict

from ridgeline.audit.history import Event, History, number

BADPUT: Final = ("start", "restart", "checkpoint", "data", "evaluation", "lost work", "unknown")
"""Causes, in reading order; `unknown` is what no record accounts for, idle time too."""


class Goodput(BaseModel):
    """Where the held time went. Seconds; None is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sessions: int
    """Commands that worked on the run."""
    held_s: float | None
    """From each session's start to its last record; None where records carry no time."""
    useful_s: float
    """In steps that were kept, waiting for data and saving left out."""
    fraction: float | None
    """`useful_s` over `held_s`."""
    badput_s: dict[str, float | None]
    """The other seconds, by cause."""


def goodput_of(history: History) -> Goodput:
    """Useful and lost time of all sessions that a run folder tells of."""
    waiting = {"data": 0.0, "checkpoint": 0.0, "evaluation": 0.0}
    useful_s = 0.0
    for step in history.steps:
        phases = {name: step.seconds.get(name, 0.0) * step.steps_covered for name in waiting}
        waiting = {name: waiting[name] + phases[name] for name in waiting}
        useful_s += _finite((step.step_s or 0.0) * step.steps_covered - math.fsum(phases.values()))
    stalls = [_seconds(event, "seconds") for event in history.events if event.name == "checkpoint"]
    if any(stall is not None for stall in stalls):  # the last save is in no later step's phases
        waiting["checkpoint"] = math.fsum(stall or 0.0 for stall in stalls)
    waiting["evaluation"] += math.fsum(each.seconds for each in history.evaluations)
    starts = [event for event in history.events if event.name in ("started", "resumed")]
    lost = [_seconds(event, "lost_s") for event in history.events if event.name == "lost"]
    causes: dict[str, float | None] = {
        "start": _first(starts[:1]),
        "restart": _first(starts[1:]) if len(starts) > 1 else 0.0,
        **{name: _finite(seconds) for name, seconds in waiting.items()},
        "lost work": math.fsum(each or 0.0 for each in lost),
    }
    held_s = _held(history, starts, causes["lost work"] or 0.0)
    told = math.fsum(seconds or 0.0 for seconds in causes.values())
    unknown = None if held_s is None else max(0.0, held_s - useful_s - told)
    fraction = None if not held_s else min(1.0, useful_s / held_s)
    return Goodput(
        sessions=len(starts),
        held_s=held_s,
        useful_s=useful_s,
        fraction=fraction,
        badput_s={name: {**causes, "unknown": unknown}[name] for name in BADPUT},
    )


def _held(history: History, starts: list[Event], lost_s: float) -> float | None:
    """Seconds of all sessions; None where one of them does not say when it began.

    What was lost lay between a session's last kept record and its end, so it adds to both.
    """
    begun = [event.time for event in starts]
    known = [time for time in begun if time is not None and math.isfinite(time)]
    if not known or len(known) < len(begun):
        return None
    records = [step.time for step in history.steps]
    records += [evaluation.time for evaluation in history.evaluations]
    records += [event.time for event in history.events if event.name != "lost"]
    times = sorted(time for time in records if time is not None and math.isfinite(time))
    held = lost_s
    for event, time, end in zip(starts, known, [*known[1:], math.inf], strict=True):
        last = max((each for each in times if time <= each < end), default=time)
        held += last - time + (_seconds(event, "start_s") or 0.0)
    return held


def _first(starts: list[Event]) -> float | None:
    """Seconds that sessions took to their first step; None where one does not say."""
    took = [_seconds(event, "start_s") for event in starts]
    known = [seconds for seconds in took if seconds is not None]
    return math.fsum(known) if known and len(known) == len(took) else None


def _seconds(event: Event, field: str) -> float | None:
    value = number(event.fields.get(field))
    return value if value is not None and math.isfinite(value) and value >= 0 else None


def _finite(value: float) -> float:
    return max(0.0, value) if math.isfinite(value) else 0.0
