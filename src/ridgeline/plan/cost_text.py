"""A cost as text for people: days, GWh, millions; a dash where something is not known."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from ridgeline.human import DASH, duration, integer, percent, short
from ridgeline.machine.cluster import parse_devices
from ridgeline.model.catalogue import entry
from ridgeline.model.shape import ModelShape
from ridgeline.plan.amounts import count_of
from ridgeline.plan.cost import DAY, KWH, Cost, Rates, cost
from ridgeline.plan.plan import plan
from ridgeline.plan.question import question

WIDTH = 100


def answer(
    model: str,
    tokens: str,
    machine: str,
    *,
    as_json: bool = False,
    mfu: float | None = None,
    days: float | None = None,
    sequence: int | None = None,
    precision: str | None = None,
    **rates: Any,
) -> str:
    """What `ridgeline cost` prints for a question in words; `rates` are those of `cost.Rates`.

    Raises ModelError, MachineError and PlanError.
    """
    found = cost_of(
        entry(model).shape, count_of(tokens, "tokens"), machine,
        mfu=mfu, days=days, sequence=sequence, precision=precision, **rates,
    )  # fmt: skip
    return json.dumps(asdict(found), indent=2, allow_nan=False) if as_json else describe(found)


def cost_of(
    shape: ModelShape,
    tokens: int,
    on: str,
    *,
    mfu: float | None = None,
    days: float | None = None,
    sequence: int | None = None,
    precision: str | None = None,
    **rates: Any,
) -> Cost:
    """`cost` on a machine such as `16000xH100`; where neither `mfu` nor `days` is said, as planned.

    Raises MachineError, PlanError; LayoutError where no layout divides the run.
    """
    prices = Rates(**rates)
    devices, cluster = parse_devices(on)
    note = ""
    if mfu is None and days is None:
        asked = question(
            shape, on, tokens=tokens, sequence=sequence, precision=precision, prices=prices
        )
        best = plan(asked, top=1).layouts[0]
        mfu, sequence, precision = best.mfu, asked.sequence, asked.precision
        doubt = "; outside what the planner was calibrated on" if best.extrapolated else ""
        note = (
            f"MFU as planned for the fastest layout, '{best.layout}', with batches of "
            f"{short(float(asked.sequence * asked.global_batch))} tokens: ridgeline plan says "
            f"more{doubt}"
        )
    found = cost(
        shape, tokens, devices, cluster,
        mfu=mfu, days=days, sequence=sequence, precision=precision, rates=prices,
    )  # fmt: skip
    return replace(found, notes=(note, *found.notes)) if note else found


def describe(cost: Cost) -> str:
    """The whole cost, one line each, with what was assumed below."""
    title = (
        f"{cost.model} on {cost.devices:,} x {cost.device} ({cost.cluster}), {cost.precision}, "
        f"{short(cost.tokens)} tokens in sequences of {cost.sequence:,}"
    )
    lines = [f"  {name:24} {value:>14}  {beside}".rstrip() for name, value, beside in _rows(cost)]
    notes = [
        line
        for note in cost.notes
        for line in textwrap.wrap(note, WIDTH, initial_indent="- ", subsequent_indent="  ")
    ]
    return "\n".join([title, *lines, *([""] if notes else []), *notes])


def _rows(cost: Cost) -> Iterator[tuple[str, str, str]]:
    money = cost.currency
    yield "parameters", f"{cost.parameters / 1e9:,.2f}B", f"{cost.parameters:,}"
    yield "FLOP as 6·N·D", f"{cost.flops_6nd:.3g}", "without embeddings, head and attention scores"
    yield (
        "FLOP counted",
        f"{cost.flops:.3g}",
        f"causal attention; {cost.flops_full_attention:.3g} counting the full square",
    )
    yield "at the dense peak", _days(cost.at_peak_s), f"{cost.peak_flops / 1e12:g} TFLOP/s each"
    yield (
        f"at MFU {percent(cost.mfu)}",
        _days(cost.train_s),
        f"{short(cost.tokens_per_s)} tokens/s; MFU {percent(cost.mfu_full_attention)} counting the "
        "full square",
    )
    yield (
        "with failures",
        _days(cost.wall_s),
        f"goodput {percent(cost.goodput)}, a failure every {duration(cost.mtbf_s)}, a checkpoint "
        f"every {duration(cost.checkpoint_interval_s)}"
        if cost.goodput is not None
        else "",
    )
    yield "device-hours", short(cost.device_hours), integer(cost.device_hours)
    yield "power of the centre", _unit(cost.power_w, 1e6, "MW"), ""
    yield "energy", _unit(cost.energy_j, KWH * 1e6, "GWh"), ""
    yield "CO₂", _unit(cost.co2_kg, 1e3, "t"), ""
    yield "electricity", _unit(cost.electricity, 1e6, f"M {money}"), ""
    yield "devices", _unit(cost.device_capital, 1e6, f"M {money}"), ""
    yield "capital", _unit(cost.capital, 1e6, f"M {money}"), "devices and all around them"
    beside = ""
    if cost.ownership and cost.electricity is not None:
        beside = f"capital and electricity, which is {cost.electricity / cost.ownership:.2%} of it"
    yield "cost of ownership", _unit(cost.ownership, 1e6, f"M {money}"), beside
    yield "rent", _unit(cost.rent, 1e6, f"M {money}"), ""


def _days(seconds: float | None) -> str:
    return DASH if seconds is None else f"{seconds / DAY:,.1f} days"


def _unit(value: float | None, one: float, unit: str) -> str:
    return DASH if value is None else f"{value / one:,.2f} {unit}"
