"""Pricing the whole space: memory first, then the time of what fits; the best stay."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np

from ridgeline.plan.block import Block, block
from ridgeline.plan.constants import Shared
from ridgeline.plan.memory import Memory, memory
from ridgeline.plan.quantities import Array, Layouts, Rates, Task
from ridgeline.plan.space import Space
from ridgeline.plan.step import Step, step

Rows = TypeVar("Rows", Layouts, Step, Memory)
Objective = Callable[[Step], Array]
"""What is to be smallest, of many steps: their seconds, or what is paid or burnt in them."""
KEPT = 400
"""Layouts that stay of each chunk, and in the end."""
ALIKE = (
    "data", "context", "tensor", "pipeline", "expert", "micro_batch", "interleave", "zero",
    "recompute",
)  # fmt: skip
"""What two layouts share that differ only in schedule or in the span of shards."""


@dataclass(frozen=True)
class Found:
    """What a search found: the best layouts in order of the objective, and what it counted."""

    layouts: Layouts
    steps: Step
    memories: Memory
    space: int
    arithmetic_ok: int
    memory_ok: int
    search_s: float
    smallest: Layouts
    """The layout with the smallest memory, whether it fits or not."""
    smallest_memory: Memory


def seconds(steps: Step) -> Array:
    """The objective of who wants to be done soonest."""
    return steps.total


def search(
    task: Task,
    rates: Rates,
    shared: Shared,
    space: Space,
    capacity_bytes: float,
    objective: Objective = seconds,
) -> Found:
    """Price every layout of `space` and keep the best by `objective` that fit `capacity_bytes`."""
    begun = time.perf_counter()
    pricer = Pricer(task, rates, shared, space)
    fitting = 0
    best: list[tuple[Layouts, Step, Memory]] = []
    least: list[tuple[Layouts, Memory]] = []
    worst_kept = np.inf
    for layouts in space.chunks():
        table = memory(task, rates, layouts)
        if table.total.size and table.total.min() < min(
            (float(m.total[0]) for _, m in least), default=np.inf
        ):
            row = np.array([np.argmin(table.total)])
            least = [(layouts.take(row), table.take(row))]
        fits = np.flatnonzero(table.total <= capacity_bytes)
        fitting += len(fits)
        if not len(fits):
            continue
        some = layouts.take(fits)
        steps = pricer.step(some)
        values = objective(steps)
        good = np.flatnonzero(values < worst_kept)
        if len(good) > KEPT:
            good = good[np.argpartition(values[good], KEPT)[:KEPT]]
        if len(good):
            best.append((some.take(good), steps.take(good), table.take(fits[good])))
        if len(best) > 16:
            best = [_sorted(best, objective)]
            full = best[0][0].count >= KEPT
            worst_kept = float(objective(best[0][1])[-1]) if full else np.inf
    layouts, steps, memories = _sorted(best, objective) if best else _nothing()
    smallest, smallest_memory = least[0] if least else (layouts, memories)
    return Found(
        layouts, steps, memories, space.candidates, space.valid, fitting,
        time.perf_counter() - begun, smallest, smallest_memory,
    )  # fmt: skip


def different(found: Found, objective: Objective = seconds) -> list[int]:
    """Rows in order of `objective`, without twins: alike but for the span of shards, or equal."""
    table = found.layouts
    # to six digits: of equally good layouts the one with memory to spare stands first
    rounded = np.array([float(f"{value:.6g}") for value in objective(found.steps)])
    order = np.lexsort((found.memories.total, rounded))
    seen: set[tuple[object, ...]] = set()
    rows: list[int] = []
    for row in order:
        alike = tuple(float(getattr(table, name)[row]) for name in ALIKE)
        by_schedule = (*alike, "schedule", float(table.schedule[row]))
        time_s, used = float(found.steps.total[row]), float(found.memories.total[row])
        by_figures = (*alike, f"{time_s:.6g}", f"{used:.6g}")
        if by_schedule not in seen and by_figures not in seen:
            rows.append(int(row))
        seen |= {by_schedule, by_figures}
    return rows


class Pricer:
    """Step times of many layouts of one run: blocks are priced once per key and looked up."""

    def __init__(self, task: Task, rates: Rates, shared: Shared, space: Space) -> None:
        self._task, self._rates, self._shared = task, rates, shared
        bases = space.bases
        columns = [bases.tensor, bases.context, bases.expert, bases.micro_batch]
        self._levels = [np.unique(column) for column in columns]
        self._levels.append(np.arange(3.0))
        grid = np.meshgrid(*self._levels, indexing="ij")
        tensor, context, expert, micro_batch, recompute = (axis.ravel() for axis in grid)
        one = np.ones_like(tensor)
        keys = Layouts(
            one, context, tensor, one, expert, micro_batch, one, one, one, one, recompute
        )
        self._blocks = block(task, rates, shared, keys)

    def blocks(self, layouts: Layouts) -> Block:
        """The block of each row."""
        columns = [
            layouts.tensor, layouts.context, layouts.expert, layouts.micro_batch, layouts.recompute,
        ]  # fmt: skip
        where = np.zeros(layouts.count, dtype=np.intp)
        for values, level in zip(columns, self._levels, strict=True):
            if len(level) > 1:
                where = where * len(level) + np.searchsorted(level, values)
        return self._blocks.take(where)

    def step(self, layouts: Layouts) -> Step:
        """The step of each row."""
        return step(self._task, self._rates, self._shared, layouts, self.blocks(layouts))


def _sorted(
    parts: list[tuple[Layouts, Step, Memory]], objective: Objective
) -> tuple[Layouts, Step, Memory]:
    """The KEPT best of all parts; of equally good ones the smallest memory stands first."""
    layouts = _joined([each[0] for each in parts])
    steps = _joined([each[1] for each in parts])
    memories = _joined([each[2] for each in parts])
    order = np.lexsort((memories.total, np.round(objective(steps), 9)))[:KEPT]
    return layouts.take(order), steps.take(order), memories.take(order)


def _joined(parts: list[Rows]) -> Rows:
    kind = type(parts[0])
    names = [field.name for field in fields(kind)]
    return kind(**{name: np.concatenate([getattr(p, name) for p in parts]) for name in names})


def _nothing() -> tuple[Layouts, Step, Memory]:
    def empty(kind: type[Rows]) -> Rows:
        return kind(**{field.name: np.zeros(0) for field in fields(kind)})

    return empty(Layouts), empty(Step), empty(Memory)
