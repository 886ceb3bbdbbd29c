"""Deep stages: a few layers traced, and the rest put on in a straight line.

A layer more adds the same to every number, once a stage has a few: a third trace proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from ridgeline.rehearse.effects import Context, Effect
from ridgeline.rehearse.trace import Trace

TRACED = (6, 8, 10)
"""Layers of the three traces: two make the line, and the third must lie on it."""
DEEP = 32
"""Layers on one chunk from which three small traces cost less than a whole one."""


def extrapolated(layers: int, traced: Callable[[int], Trace]) -> Trace | None:
    """The trace of a stage whose chunks have `layers`, from `traced(most)` of fewer.

    None: the third trace does not lie on the line, so that a whole one is needed.
    """
    low, high, third = map(traced, TRACED)
    steps = TRACED[1] - TRACED[0]
    if _bytes(_along(low, high, (TRACED[2] - TRACED[0]) / steps)) != _bytes(_rounded(third)):
        return None
    return _along(low, high, (layers - TRACED[0]) / steps)


def _along(low: Trace, high: Trace, share: float) -> Trace:
    effects = {
        context: _effect(effect, high.effects[context], share)
        for context, effect in low.effects.items()
    }
    resting = {k: round(v) for k, v in _line(low.resting, high.resting, share).items()}
    return replace(high, resting=resting, effects=effects)


def _bytes(trace: Trace) -> dict[Context, Effect]:
    """Its effects but for the number of kernels, which depends on what PyTorch has cached."""
    return {context: replace(each, kernels=0) for context, each in trace.effects.items()}


def _rounded(trace: Trace) -> Trace:
    """As `_along` leaves numbers."""
    return _along(trace, trace, 0.0)


def _effect(low: Effect, high: Effect, share: float) -> Effect:
    def whole(name: str) -> dict[str, int]:
        line = _line(getattr(low, name), getattr(high, name), share)
        return {key: round(value) for key, value in line.items() if round(value)}

    def number(name: str) -> float:
        below = getattr(low, name)
        return float(round(below + (getattr(high, name) - below) * share))

    return Effect(
        net=whole("net"),
        peak_bytes=int(number("peak_bytes")),
        at_peak=whole("at_peak"),
        flops=whole("flops"),
        again=number("again"),
        calls=whole("calls"),
        sent_bytes=whole("sent_bytes"),
        kernels=number("kernels"),
    )


def _line(low: Mapping[str, float], high: Mapping[str, float], share: float) -> dict[str, float]:
    return {
        key: low.get(key, 0) + (high.get(key, 0) - low.get(key, 0)) * share for key in {*low, *high}
    }
