"""Beyond one answer: which knob matters, how a run scales, which devices are worth their money.

Sensitivity is exact over the whole space of layouts that fit: Shapley effects of the logarithm of
the step time (Song, Nelson and Staum, SIAM/ASA J. Uncertainty Quantification 4 (2016) 1060), each
knob's mean contribution to the explained variance over all orders of asking, with the space itself
as the distribution. They add up to the share that the knobs together explain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ridgeline.errors import RidgelineError
from ridgeline.layout.layout import Layout
from ridgeline.plan.block import block, group_rate
from ridgeline.plan.constants import calibration
from ridgeline.plan.memory import memory
from ridgeline.plan.plan import Planned, plan
from ridgeline.plan.quantities import Array, Layouts
from ridgeline.plan.question import Question, physics, usable
from ridgeline.plan.search import Pricer
from ridgeline.plan.space import space
from ridgeline.plan.timeline import Durations, replay
from ridgeline.plan.timeline_picture import MOST_BARS, drawn, replayable

KNOBS = (
    "micro_batch", "tensor", "pipeline", "context", "interleave", "schedule", "zero", "recompute",
)  # fmt: skip
"""Data parallelism is what the others leave, and the shard group follows ZeRO: neither is free."""


@dataclass(frozen=True)
class Sensitivity:
    """Shares of the variance of log step time, by knob, over the layouts that fit."""

    shares: dict[str, float]
    layouts: int
    """How many layouts were priced."""
    fastest_s: float
    slowest_s: float


def sensitivity(asked: Question) -> Sensitivity:
    """Price every layout that fits, and decompose what makes some slow. Needs two that differ."""
    task, rates = physics(asked)
    shared = calibration().shared
    everything = space(asked.shape, asked.sequence, asked.global_batch, asked.devices)
    pricer = Pricer(task, rates, shared, everything)
    times: list[Array] = []
    rows: list[Layouts] = []
    for chunk in everything.chunks():
        fits = memory(task, rates, chunk).total <= usable(asked)
        if fits.any():
            rows.append(chunk.take(fits))
            times.append(pricer.step(rows[-1]).total)
    logs = np.log(np.concatenate(times)) if times else np.zeros(0)
    columns = {name: _codes([getattr(each, name) for each in rows]) for name in KNOBS}
    return Sensitivity(
        shapley(columns, logs),
        len(logs),
        float(np.exp(logs.min())) if len(logs) else math.nan,
        float(np.exp(logs.max())) if len(logs) else math.nan,
    )


def shapley(columns: dict[str, NDArray[np.intp]], values: Array) -> dict[str, float]:
    """Shapley effects of integer-coded `columns` on `values`, as shares of the variance.

    Σ_S |S|!(n-|S|-1)!/n! · (V(S+i) - V(S)), with V(S) the variance of the mean given the columns S.
    """
    names = [name for name, column in columns.items() if len(column) and column.max() > 0]
    variance = float(values.var()) if len(values) else 0.0
    if variance == 0:
        return dict.fromkeys(columns, 0.0)
    explained = {
        subset: _explained([columns[name] for name in subset], values)
        for size in range(len(names) + 1)
        for subset in combinations(names, size)
    }
    shares = dict.fromkeys(columns, 0.0)
    n = len(names)
    for name in names:
        others = [each for each in names if each != name]
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for subset in combinations(others, size):
                joined = tuple(each for each in names if each == name or each in subset)
                gain = explained[joined] - explained[subset]
                shares[name] += weight * gain / variance
    return shares


def _explained(columns: list[NDArray[np.intp]], values: Array) -> float:
    """Variance of the mean of `values` given the columns."""
    key = np.zeros(len(values), dtype=np.intp)
    for column in columns:
        key = key * (int(column.max()) + 1) + column
    if columns and int(key.max()) > 4 * len(values):
        key = np.unique(key, return_inverse=True)[1]
    count = np.bincount(key)
    used = count > 0
    means = np.bincount(key, weights=values)[used] / count[used]
    return float(np.average((means - values.mean()) ** 2, weights=count[used]))


def _codes(parts: list[Array]) -> NDArray[np.intp]:
    if not parts:
        return np.zeros(0, dtype=np.intp)
    return np.asarray(np.unique(np.concatenate(parts), return_inverse=True)[1], dtype=np.intp)


def draw_step(
    asked: Question, layout: Layout, svg: Path | None = None, trace: Path | None = None
) -> str:
    """Replay the pipeline of a layout with its own seconds; write a picture and a Perfetto trace.

    Layers that do not divide make the first chunks longer, and the head the last one. The picture
    shows at most three micro-batches per rank, and no more bars than a picture can; the trace and
    the words tell of the whole step. ZeRO's gathers, reductions and the optimizer are not in it.
    """
    micro_batches = asked.global_batch // (layout.data * layout.micro_batch)
    whole = replayable(layout, micro_batches)
    durations = chunk_durations(asked, layout, whole.chunks)
    if svg is not None:
        most = max(1, MOST_BARS // (3 * whole.chunks))  # forward, and backward in two parts
        part = replayable(layout, min(micro_batches, 3 * layout.pipeline, most))
        drawn(replay(part, durations), svg)
    return drawn(replay(whole, durations), trace=trace)


def chunk_durations(asked: Question, layout: Layout, chunks: int) -> Durations:
    """Seconds of each chunk's work on a micro-batch: its layers', and the head's on the last."""
    task, rates = physics(asked)
    table = Layouts.of([layout])
    each = block(task, rates, calibration().shared, table)
    weights = float(np.minimum(each.weight_gradient, each.backward)[0])
    inputs = float(each.backward[0]) - weights
    least, longer = divmod(asked.shape.layers, chunks)
    layers = [least + (chunk < longer) for chunk in range(chunks)]
    head = [0.0] * (chunks - 1) + [float(each.head[0]) / 3]  # forward, and both parts of backward
    rate, latency = group_rate(rates, np.array([2.0]), table.tensor * table.data * table.context)
    rows = layout.micro_batch * asked.sequence / layout.context
    message = 2 * rows * asked.shape.hidden / layout.tensor

    def seconds(layer_s: float) -> tuple[float, ...]:
        return tuple(n * layer_s + h for n, h in zip(layers, head, strict=True))

    return Durations(
        seconds(float(each.forward[0])),
        seconds(inputs),
        seconds(weights),
        float(latency[0]) + message / float(rate[0]),
    )


@dataclass(frozen=True)
class Point:
    """One size of machine on a scaling curve."""

    devices: int
    global_batch: int
    best: Planned
    efficiency: float
    """Tokens per second and device over those of the smallest size."""


def scaling(asked: Question, sizes: Iterable[int], weak: bool = False) -> list[Point]:
    """The best layout on each number of devices: the batch constant, or growing with them (weak).

    Sizes that nothing divides or fits are left out.
    """
    points: list[Point] = []
    for devices in sorted(sizes):
        batch = asked.global_batch * devices // asked.devices if weak else asked.global_batch
        try:
            best = plan(replace(asked, devices=devices, global_batch=batch), top=1).layouts[0]
        except RidgelineError:
            continue
        each = best.tokens_per_s / devices
        base = points[0].best.tokens_per_s / points[0].devices if points else each
        points.append(Point(devices, batch, best, each / base))
    return points


def pareto(points: list[Point]) -> list[Point]:
    """Those that no smaller machine is as soon done as: more devices must buy fewer days.

    Failures count where they are known: each device more is one more that fails. Without a token
    budget there are no days, and tokens per second decide.
    """

    def pace(point: Point) -> float:
        days = point.best.train_s
        return 1 / point.best.tokens_per_s if days is None else days

    front: list[Point] = []
    for point in sorted(points, key=lambda each: each.devices):
        if not front or pace(point) < pace(front[-1]):
            front.append(point)
    return front


def json_of(points: list[Point]) -> list[dict[str, Any]]:
    """The curve for programs: every size with its best layout, and whether it is on the front."""
    front = {id(point) for point in pareto(points)}
    return [
        {
            "devices": point.devices,
            "global_batch": point.global_batch,
            "efficiency": point.efficiency,
            "pareto": id(point) in front,
            **point.best.json(),
        }
        for point in points
    ]


def table(points: list[Point], sizes: Iterable[int] = ()) -> str:
    """Devices against days, for people; of the `sizes` asked for, those left out are named."""
    front = {id(point) for point in pareto(points)}
    lines = [f"{'devices':>9} {'batch':>7} {'step':>9} {'days':>9} {'efficiency':>10}  layout"]
    for point in points:
        days = None if point.best.train_s is None else point.best.train_s / 86400
        lines.append(
            f"{point.devices:9,} {point.global_batch:7,} {point.best.step_s:8.2f}s "
            f"{'—' if days is None else f'{days:.1f}':>9} {point.efficiency:10.1%}  "
            f"{point.best.layout}{'' if id(point) in front else '  (fewer do as well)'}"
        )
    if missing := sorted({*sizes} - {point.devices for point in points}):
        names = ", ".join(f"{devices:,}" for devices in missing)
        lines.append(f"left out, since no layout divides the run or fits there: {names}")
    return "\n".join(lines)


def sensitivity_table(found: Sensitivity) -> str:
    """Knobs by their share, for people."""
    lines = [
        f"what makes layouts slow, over the {found.layouts:,} that fit "
        f"({found.fastest_s:.3g} to {found.slowest_s:.3g} s a step)"
    ]
    for name, share in sorted(found.shares.items(), key=lambda item: -item[1]):
        lines.append(f"  {name:12} {share:6.1%} {'█' * round(40 * share)}")
    return "\n".join(lines)
