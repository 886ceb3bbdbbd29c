"""What one measured step tells of the planner's constants.

Four factors, each found where the planner's seconds of some causes equal the measured ones: the
device's compute, collectives within a node and between nodes, and the update. A cause tells of the
link or of the port, whichever the planned seconds hang on more. What a step does not tell stays:
a cause that was not measured or that the layout lacks, one that is too small a part of the step to
be more than noise, and a factor beyond `MOST`, which says that something else is wrong. Sends
between stages tell nothing, since they cannot be told from waiting for the neighbour's work.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ridgeline.layout.layout import Layout
from ridgeline.ledger import StepSeconds
from ridgeline.machine.corrections import MOST, Correction
from ridgeline.plan.block import block
from ridgeline.plan.constants import calibration
from ridgeline.plan.quantities import Layouts
from ridgeline.plan.question import Question, corrected, physics
from ridgeline.plan.step import step

LEAST_SHARE = 0.02
"""Of the step: causes that take less are noise (assumed)."""
COLLECTIVES = ("tensor", "context", "expert", "data")
HALVINGS, ROUNDS = 30, 5
"""Of a factor's interval, and over all factors: to a millionth."""
Planner = Callable[[Correction], dict[str, float]]
"""Seconds by cause under a correction."""


@dataclass(frozen=True)
class Fitted:
    """The factors that a step identifies, and of the others why not."""

    correction: Correction
    left: dict[str, str]


def fit(asked: Question, layout: Layout, measured: StepSeconds) -> Fitted:
    """The correction by which the planner gives a measured step's causes back.

    Corrections that `asked` has already are not built upon: factors are of the uncorrected rates.
    Each factor is solved for with the others held; a few rounds, since the host's work joins
    compute and communication.
    """
    causes, planned = _measured(measured), _planner(asked, layout)
    whole = measured.total_s or math.fsum(causes.values())
    at_first = planned(Correction())
    hangs_on = {name: _hangs_on(planned, name) for name in COLLECTIVES if at_first[name] > 0}
    parts = {
        "compute": ["compute"],
        "link": [name for name, factor in hangs_on.items() if factor == "link"],
        "port": [name for name, factor in hangs_on.items() if factor == "port"],
        "update": ["optimizer"],
    }
    targets: dict[str, tuple[list[str], float]] = {}
    left: dict[str, str] = {}
    for factor, names in parts.items():
        priced = [name for name in names if at_first[name] > 0]
        known = [name for name in priced if name in causes]
        target = math.fsum(causes[name] for name in known)
        if not known:
            left[factor] = "not measured" if priced else "the planner has no seconds for it here"
        elif target < LEAST_SHARE * whole:
            left[factor] = f"less than {LEAST_SHARE:.0%} of the step"
        else:
            targets[factor] = known, target
    found = Correction()
    for _ in range(ROUNDS):
        for factor, (names, target) in targets.items():
            value = _solve(planned, found, factor, names, target)
            found = _with(found, factor, value or 1.0)
            if value is None:
                left[factor] = f"a factor beyond {1 / MOST:g} to {MOST:g} would be needed"
            else:
                left.pop(factor, None)
    return Fitted(found, left)


def _measured(seconds: StepSeconds) -> dict[str, float]:
    """The causes that are known. Compute is what the device and its host take together."""
    passes = seconds.compute_s
    if passes is None and seconds.forward_s is not None and seconds.backward_s is not None:
        passes = seconds.forward_s + seconds.backward_s
    known = {name: getattr(seconds, f"{name}_s") for name in (*COLLECTIVES, "optimizer")}
    known["compute"] = None if passes is None else passes + (seconds.host_s or 0.0)
    return {name: value for name, value in known.items() if value is not None}


def _planner(asked: Question, layout: Layout) -> Planner:
    """The same causes as the planner has them under a correction."""
    task, bare = physics(replace(asked, corrections={}))
    table, shared = Layouts.of([layout]), calibration().shared

    def planned(correction: Correction) -> dict[str, float]:
        rates = corrected(bare, correction)
        steps = step(task, rates, shared, table, block(task, rates, shared, table))
        names = (*COLLECTIVES, "optimizer", "compute", "host", "jitter")
        seconds = {name: max(0.0, float(getattr(steps, name)[0])) for name in names}
        seconds["compute"] += seconds.pop("host") + seconds.pop("jitter")
        return seconds

    return planned


def _with(correction: Correction, factor: str, value: float) -> Correction:
    changes: dict[str, Any] = {factor: value}
    return replace(correction, **changes)


def _hangs_on(planned: Planner, name: str) -> str:
    """The factor that a collective's seconds grow with the more: link or port."""
    grown = {factor: planned(_with(Correction(), factor, 1.1))[name] for factor in ("port", "link")}
    return max(grown, key=lambda factor: grown[factor])


def _solve(
    planned: Planner, others: Correction, factor: str, names: list[str], target: float
) -> float | None:
    """The factor at which the causes `names` take `target` seconds; None where none of them does.

    Seconds do not fall while a factor grows, so halving its interval finds it.
    """

    def seconds(value: float) -> float:
        told = planned(_with(others, factor, value))
        return math.fsum(told[name] for name in names)

    low, high = 1 / MOST, MOST
    if not seconds(low) <= target <= seconds(high):
        return None
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if seconds(middle) < target else (low, middle)
    return math.sqrt(low * high)
