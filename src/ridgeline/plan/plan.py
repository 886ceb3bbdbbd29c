"""`ridgeline plan`: the layouts of a run that finish its tokens soonest, and what each takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from ridgeline.errors import LayoutError, PlanError
from ridgeline.layout.arithmetic import check
from ridgeline.layout.layout import Layout
from ridgeline.layout.trainable import is_trainable
from ridgeline.ledger import Ledger
from ridgeline.machine.device import is_cpu
from ridgeline.model.counts import flops_per_token
from ridgeline.plan import search as searching
from ridgeline.plan.block import block
from ridgeline.plan.certainty import UNKNOWN, certainty
from ridgeline.plan.constants import calibration, peak
from ridgeline.plan.cost import Cost, cost
from ridgeline.plan.ledgers import AXES, CAUSES, ledger_of
from ridgeline.plan.memory import Memory, memory, program_stages, stage_memory
from ridgeline.plan.program import Program, executed_flops, sent_bytes
from ridgeline.plan.quantities import RECOMPUTES, Array, Layouts
from ridgeline.plan.question import (
    STACK,
    Question,
    capacity,
    physics,
    question_of_run,
    usable,
    with_own_layout,
)
from ridgeline.plan.remedies import indivisible, too_small
from ridgeline.plan.search import Found, different, search
from ridgeline.plan.sent import sent
from ridgeline.plan.space import divisors, space
from ridgeline.plan.step import Step, step
from ridgeline.run import Run

Rank = Literal["time", "money", "energy"]
NAIVE_SHARE = 0.5
IDLE_POWER_SHARE = 0.4
"""Power above idle while waiting on links and bubbles, of that while computing (assumed)."""


@dataclass(frozen=True)
class Planned:
    """One layout, priced. Seconds, bytes, joules, fractions; None is not known."""

    layout: Layout
    step_s: float
    interval_s: tuple[float, float]
    """Where four of five such steps would lie."""
    mfu: float
    """Model FLOPs over the dense peak, attention counted causally."""
    mfu_full_attention: float
    hfu: float
    """With recomputation."""
    tokens_per_s: float
    memory_bytes: float
    capacity_bytes: float
    fits: bool
    train_s: float | None
    """Seconds to the last token, failures included where their rate is known."""
    money: float | None
    currency: str | None
    energy_j: float | None
    bound_by: str
    """The cause that takes most of the step."""
    extrapolated: bool
    """Whether it lies outside what the planner was calibrated on."""
    trainable: bool
    """Whether today's trainer can run it."""
    ledger: Ledger

    def json(self) -> dict[str, Any]:
        """The fields of `ridgeline plan --json`."""
        values = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "ledger"}
        return values | {"layout": str(self.layout), "interval_s": list(self.interval_s)}


@dataclass(frozen=True)
class Plan:
    """The answer: layouts in order, and what was searched."""

    question: Question
    layouts: tuple[Planned, ...]
    rank: Rank
    """What the layouts are in order of."""
    asked: Planned | None
    """The run's own layout, where it names one."""
    asked_fitting: Planned | None
    """Where that does not fit: the nearest change of it that does."""
    best_trainable: Planned | None
    """The first in this rank that fits and that today's trainer can run."""
    totals: Cost | None
    """Days, money and energy of the first layout in full; None without a token budget."""
    baseline_s: float
    """Naive step time: model FLOPs over half the peak."""
    space: int
    arithmetic_ok: int
    memory_ok: int
    search_s: float

    def json(self) -> dict[str, Any]:
        """The object of `ridgeline plan --json`."""
        return {
            "layouts": [each.json() for each in self.layouts],
            "asked": self.asked.json() if self.asked else None,
            "best_trainable": self.best_trainable.json() if self.best_trainable else None,
            "baseline_s": self.baseline_s,
            "assumed": list(self.question.assumed),
            "space": self.space,
            "arithmetic_ok": self.arithmetic_ok,
            "memory_ok": self.memory_ok,
            "search_s": self.search_s,
        }


def plan(
    asked: Question, *, top: int = 5, rank: Rank = "time", layout: Layout | None = None
) -> Plan:
    """Search the whole space of `asked`; the `top` best, and `layout` beside them if given.

    A failure stops every device whatever the layout, so goodput lengthens all of them alike: the
    fastest step is the soonest end, and the cheapest. Energy has an order of its own.

    Raises PlanError where nothing divides the run or nothing fits, with the nearest that would;
    LayoutError for a `layout` that does not divide it.
    """
    task, rates = physics(asked)
    known = calibration()
    everything = space(asked.shape, asked.sequence, asked.global_batch, asked.devices)
    if everything.valid == 0:
        raise indivisible(asked)
    objective = searching.seconds if rank != "energy" else lambda steps: _joules(asked, steps)
    found = search(task, rates, known.shared, everything, usable(asked), objective)
    if found.layouts.count == 0:
        raise too_small(asked, found)
    if layout:
        check(layout, asked.shape, asked.sequence, asked.global_batch, asked.devices)
    ranked = different(found, objective)
    rows, pool = _that_fit(asked, found, ranked, top)
    if any(_cost(each, rank) is None for each in pool):
        raise PlanError(
            f"ranking by {rank}",
            "the training tokens, or the price or power of a device, are not known",
            "--tokens and --price-per-hour" if rank == "money" else "--tokens, or --rank time",
        )
    best = next((each for each in pool if each.trainable), None)
    pool.sort(key=lambda each: _key(each, rank))
    own = price(asked, [layout])[0] if layout else None
    return Plan(
        asked,
        tuple(pool),
        rank,
        own,
        _fitting(asked, own.layout) if own and not own.fits else None,
        best or _best_trainable(asked, found, ranked),
        _totals(asked, found.steps, rows[0], pool[0].mfu),
        _flops(asked, "full") / asked.devices / NAIVE_SHARE / peak(asked.cluster, asked.precision),
        found.space,
        found.arithmetic_ok,
        found.memory_ok,
        found.search_s,
    )


def plan_run(run: Run, on: str | None = None, *, top: int = 5, rank: Rank = "time") -> Plan:
    """Plan a run file's model, batch and budget, its own layout beside the best if it names one."""
    asked, own = with_own_layout(question_of_run(run, on), run, on)
    return plan(asked, top=top, rank=rank, layout=own)


def price(asked: Question, layouts: list[Layout]) -> list[Planned]:
    """Given layouts priced, whether they fit or not. They are not checked against the run.

    The order of their axes is not priced: tensor ranks are taken to be neighbours, then context,
    data and pipeline ranks.
    """
    task, rates = physics(asked)
    shared = calibration().shared
    table = Layouts.of(layouts)
    blocks = block(task, rates, shared, table)
    steps = step(task, rates, shared, table, blocks)
    return _priced(asked, table, steps, memory(task, rates, table))


def _priced(asked: Question, table: Layouts, steps: Step, memories: Memory) -> list[Planned]:
    """Every row as a Planned."""
    device, sure = asked.cluster.device.name, certainty()
    task, rates = physics(asked)
    sizes = {
        "devices": np.full(table.count, float(asked.devices)),
        "sequence": np.full(table.count, float(asked.sequence)),
        "tensor": table.tensor,
        "pipeline": table.pipeline,
    }
    stretch = sure.stretch(device, asked.precision, sizes)
    if asked.shape.experts or asked.shape.latent_attention:  # no fitted row has either
        stretch = np.maximum(stretch, UNKNOWN)
    low, high = sure.interval(steps.total, asked.stack, asked.precision, stretch)
    at_peak = peak(asked.cluster, asked.precision) * asked.devices
    causal, full = _flops(asked, "causal"), _flops(asked, "full")
    head = 6 * asked.shape.hidden * asked.shape.vocab * asked.sequence * asked.global_batch
    planned, sending = [], sent(task, table)
    for row in range(table.count):
        layout = table.layout(row, asked.precision)
        seconds = float(steps.total[row])
        mfu = causal / seconds / at_peak
        trains = is_trainable(layout, asked.shape, asked.sequence)
        program = _program(asked, layout) if trains else None
        if program is None:
            some = float(rates.selective_matrix)
            again = {"none": 0.0, "selective": some, "full": 1.0}[layout.recompute]
            hfu = mfu * (1 + again / 3 * (1 - head / causal))
            stages = stage_memory(task, rates, table.take(np.array([row])))
            crossing: Mapping[str, float]
            crossing = {axis: float(getattr(sending, axis)[row]) for axis in AXES}
        else:
            hfu = mfu * (1 + executed_flops(program)[1] / causal)
            stages = program_stages(program, is_cpu(device))
            crossing = sent_bytes(program)
        total = _totals(asked, steps, row, mfu)
        train_s = None if total is None else total.wall_s or total.train_s
        currency = total.currency if total and total.rent is not None else None
        shared: dict[str, Any] = {
            "mfu": mfu,
            "mfu_full_attention": full / seconds / at_peak,
            "hfu": hfu,
            "tokens_per_s": asked.sequence * asked.global_batch / seconds,
            "train_s": train_s,
            "money": total.rent if total else None,
            "currency": currency,
            "energy_j": total.energy_j if total else None,
        }
        ledger = ledger_of(
            steps,
            crossing,
            stages,
            row,
            causal / asked.devices,
            hardware_flops_per_device=causal / asked.devices * hfu / mfu,
            goodput=total.goodput if total else None,
            **shared,
        )
        fullest = float((memories.total[row] if program is None else stages.total).max())
        busiest = max(CAUSES, key=lambda name: float(getattr(steps, name)[row]))
        planned.append(
            Planned(
                layout=layout,
                step_s=seconds,
                interval_s=(float(low[row]), float(high[row])),
                memory_bytes=fullest,
                capacity_bytes=capacity(asked),
                fits=fullest <= usable(asked),
                bound_by=busiest,
                extrapolated=bool(stretch[row] > 1),
                trainable=trains,
                ledger=ledger,
                **shared,
            )
        )
    return planned


def _program(asked: Question, layout: Layout) -> Program | None:
    """What our own program does with a layout; None for other stacks, and what cannot be run."""
    if asked.stack != STACK:
        return None
    try:
        check(layout, asked.shape, asked.sequence, asked.global_batch, asked.devices)
    except LayoutError:
        return None
    return Program(asked.shape, layout, asked.sequence, asked.global_batch)


def _totals(asked: Question, steps: Step, row: int, mfu: float) -> Cost | None:
    """Days, money and energy to the last token, with the power that this layout draws."""
    if asked.tokens is None:
        return None
    watts, device = _watts(asked, steps), asked.cluster.device
    drawn = None if watts is None else float(watts[row])
    known = asked.precision if asked.precision in device.peak_flops else None
    return cost(
        asked.shape, asked.tokens, asked.devices, asked.cluster, mfu=min(mfu, 1.0),
        sequence=asked.sequence, precision=known, rates=replace(asked.prices, device_w=drawn),
    )  # fmt: skip


def _watts(asked: Question, steps: Step) -> Array | None:
    """Power of a device with its share of the node, by how much of the step it computes."""
    device, node = asked.cluster.device, asked.cluster.node
    if asked.prices.device_w is not None:
        return np.full_like(steps.total, asked.prices.device_w)
    if device.power_w is None or device.idle_w is None or node.overhead_w is None:
        return None
    busy = steps.compute / steps.total
    above = (device.power_w - device.idle_w) * (busy + IDLE_POWER_SHARE * (1 - busy))
    return device.idle_w + above + node.overhead_w / node.devices


def _joules(asked: Question, steps: Step) -> Array:
    """What a device burns in a step; seconds where its power is not known (that is refused)."""
    watts = _watts(asked, steps)
    return steps.total if watts is None else steps.total * watts


def _fitting(asked: Question, own: Layout) -> Planned | None:
    """The layout on the same mesh that fits with the fewest changes, and of those the fastest.

    What may change is the micro-batch, ZeRO and recomputation.
    """
    tried = {
        own.model_copy(update={"micro_batch": mb, "zero": zero, "recompute": recompute})
        for mb, zero, recompute in product(divisors(own.micro_batch), range(4), RECOMPUTES)
        if zero >= own.zero and (own.data * own.context > 1 or zero == own.zero)
    }

    def changes(each: Planned) -> tuple[int, float]:
        names = ("micro_batch", "zero", "recompute")
        return sum(getattr(each.layout, n) != getattr(own, n) for n in names), each.step_s

    fits = [each for each in price(asked, sorted(tried, key=str)) if each.fits]
    return min(fits, key=changes, default=None)


def _that_fit(
    asked: Question, found: Found, ranked: Sequence[int], top: int
) -> tuple[list[int], list[Planned]]:
    """The first of the ranked rows that fit stage by stage too, which the search knew roughly.

    Raises PlanError where none does.
    """
    rows, pool = [], []
    for row in ranked:
        one = np.array([row])
        (each,) = _priced(
            asked, found.layouts.take(one), found.steps.take(one), found.memories.take(one)
        )
        if each.fits:
            rows.append(row)
            pool.append(each)
        if len(pool) == top:
            break
    if not pool:
        raise too_small(asked, found)
    return rows, pool


def _best_trainable(asked: Question, found: Found, ranked: Sequence[int]) -> Planned | None:
    """The first of the ranked layouts that today's trainer can run."""
    for row in ranked:
        layout = found.layouts.layout(row, asked.precision)
        if is_trainable(layout, asked.shape, asked.sequence):
            (each,) = price(asked, [layout])
            if each.fits:
                return each
    return None


def _cost(each: Planned, rank: Rank) -> float | None:
    return {"time": each.step_s, "money": each.money, "energy": each.energy_j}[rank]


def _key(each: Planned, rank: Rank) -> tuple[float, float, float]:
    value = _cost(each, rank)
    # to six digits: of equally fast layouts the one with memory to spare stands first
    return (
        float(f"{each.step_s if value is None else value:.6g}"),
        each.memory_bytes,
        float(len(str(each.layout))),
    )


def _flops(asked: Question, convention: Literal["causal", "full"]) -> float:
    """Model FLOPs of one step."""
    each = flops_per_token(asked.shape, asked.sequence, convention).total
    return float(each) * asked.sequence * asked.global_batch
