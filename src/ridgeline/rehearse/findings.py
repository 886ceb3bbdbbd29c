"""Faults that a rehearsal sees before a device is held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ridgeline import human
from ridgeline.layout.grid import RankGrid
from ridgeline.layout.layout import AXIS_WORDS, Axis, Layout
from ridgeline.plan.plan import price
from ridgeline.plan.question import Question
from ridgeline.rehearse.trace import Trace

if TYPE_CHECKING:
    from ridgeline.rehearse.rehearse import Stage

LAUNCH_S = 10e-6
"""Host seconds that PyTorch needs to launch one operation of an eager program, forward or backward
(assumed, of a server's core: 5 to 10 microseconds, and autograd's own work)."""


def findings_of(
    layout: Layout,
    asked: Question | None,
    stages: Sequence[Stage],
    traces: Sequence[Trace],
) -> Iterator[str]:
    """Everything worth a sentence, the costliest first."""
    for seen in traces:
        for name in seen.without_gradient:
            yield f"{name} gets no gradient: it is never trained"
        for name in seen.unowned:
            yield f"{name} is in no group of the optimizer: it is never moved"
        yield from seen.whole
    if asked is not None:
        yield from _crossings(layout, asked.cluster.node.devices, stages)
        yield from _launches(layout, asked, stages)


def _crossings(layout: Layout, node: int, stages: Sequence[Stage]) -> Iterator[str]:
    """Axes that cross nodes although one that sends less stays within one."""
    sent: dict[Axis, float] = {
        axis: max(stage.sent_bytes.get(axis, 0.0) for stage in stages)
        for axis in ("tensor", "context", "data", "pipeline")
    }
    across = {axis: _nodes(layout, axis, node) > 1 for axis in sent}
    for axis, size in sent.items():
        inside = [other for other in sent if not across[other] and 0 < sent[other] < size]
        # that many ranks of an axis side by side do not fit into a node: no order would help
        if across[axis] and size and inside and getattr(layout, axis) <= node:
            other = min(inside, key=lambda each: sent[each])
            yield (
                f"{AXIS_WORDS[axis]}{getattr(layout, axis)} crosses nodes of {node} devices and "
                f"sends {human.size(size)} per device and step, while {AXIS_WORDS[other]}"
                f"{getattr(layout, other)}, which sends {human.size(sent[other])}, stays within "
                f"one: put {axis} behind {other} in layout.order"
            )
    if across["tensor"] and layout.tensor > node:
        yield (
            f"tp{layout.tensor} crosses nodes of {node} devices: {human.size(sent['tensor'])} per "
            f"device and step wait for the network; tp{node} would not"
        )


def _nodes(layout: Layout, axis: Axis, node: int) -> int:
    grid = RankGrid(layout)
    members = [grid.rank(**{axis: place}) for place in range(int(getattr(layout, axis)))]
    return len({member // node for member in members})


def _launches(layout: Layout, asked: Question, stages: Sequence[Stage]) -> Iterator[str]:
    """Whether launching takes the host longer than the device needs for its arithmetic."""
    seconds = price(asked, [layout])[0].ledger.seconds.compute_s
    most = max(stages, key=lambda stage: stage.kernels)
    launching = most.kernels * LAUNCH_S
    if seconds is not None and launching > seconds and not layout.compile:
        yield (
            f"stage {most.stage} launches {most.kernels:,} operations per step for "
            f"{human.duration(seconds)} of planned compute: at {LAUNCH_S * 1e6:.0f} µs each the "
            f"host needs {human.duration(launching)} and becomes the limit; larger micro-batches "
            "or compile help"
        )
