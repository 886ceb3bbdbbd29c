"""The measured ledger: what all ranks counted, as the terms that plan and rehearsal fill too.

Seconds are those of one rank, the one that computes longest: the others wait for it. Phases are
the mean of all ordinary steps; of them, what was exposed communication is known from the few steps
that were timed finely. On an accelerator the host's phases say nothing, and those of the finely
timed steps, in which it waits for the device, are scaled to the length of an ordinary step.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ridgeline.ledger import Calls, Ledger, Memory, SentBytes, StepSeconds

AXES = ("tensor", "pipeline", "data", "context", "expert")
COMPONENTS = ("weights", "gradients", "optimizer", "activations", "temporary")
BETWEEN = ("checkpoint", "evaluation")
"""Phases that lie between steps."""


class Done(NamedTuple):
    """An action of a pipeline rank, or its wait for what an action needs (F or B)."""

    kind: str
    chunk: int
    micro_batch: int
    start_s: float
    end_s: float
    """By the rank's own clock, or since the step began."""


class Idle(NamedTuple):
    """What a pipeline rank did not do in one step, in seconds."""

    waited: float
    """In waiting for what a neighbour sends."""
    for_neighbour: float
    """The part of it in which the neighbour had not yet made it."""
    at_the_end: float
    """From its last action to the last one of all."""


@dataclass(frozen=True)
class Counts:
    """What one rank did in one step."""

    step: int
    kernels: int
    flops: Mapping[str, float]
    """By kind of module."""
    memory: Mapping[str, int]
    """Bytes by component, when it held most."""


@dataclass(frozen=True)
class Counted:
    """What one rank knows of this session. Seconds and steps are sums."""

    rank: int
    stage: int
    on_accelerator: bool
    steps: int = 0
    """Ordinary steps: neither the first nor sampled."""
    tokens: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By phase, of ordinary steps."""
    wall_s: float = 0.0
    all_steps: int = 0
    between: Mapping[str, float] = field(default_factory=dict)
    """Checkpoints and evaluations."""
    timed: tuple[int, ...] = ()
    """The steps that were timed finely."""
    timed_seconds: Mapping[str, float] = field(default_factory=dict)
    timed_wall_s: float = 0.0
    exposed: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """By (phase, axis), of the steps that were timed finely."""
    sent: Mapping[str, float] = field(default_factory=dict)
    """Bytes by axis, of the last of them."""
    calls: Mapping[str, int] = field(default_factory=dict)
    memory_bytes: float | None = None
    counts: Counts | None = None
    energy_j: float | None = None
    energy_source: str = ""


@dataclass(frozen=True)
class Known:
    """What one rank knows for all."""

    train_s: float
    energy_before_j: float | None
    """Of the sessions before this one."""
    flops_per_token: float
    """By the model's shape, attention counted causally."""
    peak_flops: float | None
    """Of one device."""


Timeline = tuple[list[Done], list[Done]]
"""A pipeline rank's actions, and its waits."""


def on_one_clock(ranks: Sequence[tuple[list[float], list[Done], list[Done]]]) -> list[Timeline]:
    """Ranks' timelines by the first one's clock, from its last moment on.

    Each comes with the moments at which the rank left the same barriers, by its own clock: clocks
    of different machines begin anywhere. The median of the differences is how far two are apart.
    """
    first = ranks[0][0]
    found = []
    for moments, *lists in ranks:
        apart = statistics.median(here - there for here, there in zip(moments, first, strict=True))
        zero = first[-1] + apart
        actions, waits = (
            [done._replace(start_s=done.start_s - zero, end_s=done.end_s - zero) for done in each]
            for each in lists
        )
        found.append((actions, waits))
    return found


def idle_of(ranks: Sequence[Timeline]) -> list[Idle]:
    """Each pipeline rank's idle time, from (actions, waits) of all of them.

    A wait lasts until a neighbour has made what it is for, which is the pipeline's bubble, and then
    until that has arrived, which is communication.
    """
    made: dict[tuple[str, int, int], float] = {}
    for actions, _ in ranks:
        for action in actions:
            if action.kind == "F":
                made["F", action.chunk + 1, action.micro_batch] = action.end_s
            elif action.kind in ("B", "I"):
                made["B", action.chunk - 1, action.micro_batch] = action.end_s
    end = max((action.end_s for actions, _ in ranks for action in actions), default=0.0)
    found = []
    for actions, waits in ranks:
        bubble = sum(min(max(made[w[:3]] - w.start_s, 0.0), w.end_s - w.start_s) for w in waits)
        last = max((action.end_s for action in actions), default=end)
        found.append(Idle(sum(w.end_s - w.start_s for w in waits), bubble, end - last))
    return found


def seconds_of(row: Counted, idle: Idle) -> StepSeconds:
    """One rank's step by cause; what only a finely timed step can tell is None without one."""
    between = {
        f"{name}_s": row.between.get(key, 0.0) / row.all_steps if row.all_steps else None
        for name, key in (("checkpoint_stall", "checkpoint"), ("evaluation", "evaluation"))
    }
    if not row.steps:
        return StepSeconds.model_validate(between)
    wall = row.wall_s / row.steps
    phases = {name: total / row.steps for name, total in row.seconds.items()}
    logging = phases.pop("logging", 0.0)
    known = between | {"total_s": wall, "logging_s": logging}
    if not row.timed:
        return StepSeconds.model_validate(known)
    if row.on_accelerator:
        scale = (wall - logging) / row.timed_wall_s
        phases = {name: scale * total for name, total in row.timed_seconds.items()}
    else:
        scale = 1 / len(row.timed)
    phases[""] = max(0.0, wall - logging - sum(phases.values()))
    own, by_axis, bubble = _divided(row, phases, scale, idle)
    compute = own.get("forward", 0.0) + own.get("backward", 0.0)
    return StepSeconds.model_validate(
        known
        | {f"{axis}_s": by_axis[axis] for axis in AXES}
        | {
            "compute_s": compute,
            "forward_s": own.get("forward", 0.0),
            "backward_s": own.get("backward", 0.0),
            "bubble_s": bubble,
            "host_s": own[""] + by_axis["world"],
            "optimizer_s": own.get("optimizer", 0.0),
            "data_stall_s": own.get("data", 0.0),
        }
    )


def _divided(
    row: Counted, phases: Mapping[str, float], scale: float, idle: Idle
) -> tuple[dict[str, float], dict[str, float], float]:
    """(each phase without what is exposed in it, exposed seconds by axis, the bubble).

    The last rank that works makes the others wait in the message of the gradient's norm, the first
    one behind the pipeline's actions: as much of that is the bubble.
    """
    own = dict(phases)
    waited = own.pop("pipeline wait", 0.0)
    bubble = waited * (idle.for_neighbour / idle.waited if idle.waited else 0.0)
    by_axis: defaultdict[str, float] = defaultdict(float)
    by_axis["pipeline"] = waited - bubble
    tail = idle.at_the_end * (scale if row.on_accelerator else 1.0)
    for name, whole in own.items():
        exposed = {
            axis: scale * seconds for (at, axis), seconds in row.exposed.items() if at == name
        }
        # A disturbed sample may have waited longer than this phase takes on average.
        fits = min(1.0, whole / sum(exposed.values())) if sum(exposed.values()) else 1.0
        for axis in sorted(exposed, key=("world", *AXES).index):
            part = exposed[axis] * fits
            own[name] -= part
            if name == "optimizer" and axis in ("world", "pipeline"):
                idled = min(part, tail)
                bubble, tail, part = bubble + idled, tail - idled, part - idled
            by_axis[axis] += part
    return {name: max(0.0, seconds) for name, seconds in own.items()}, by_axis, bubble


def ledger_of(rows: Sequence[Counted], idle: Sequence[Idle], known: Known) -> Ledger:
    """The ledger from all ranks' rows, by rank, and the idle time of each pipeline stage."""
    each = [seconds_of(row, idle[row.stage]) for row in rows]
    slowest = max(range(len(rows)), key=lambda rank: each[rank].compute_s or 0.0)
    row, seconds = rows[slowest], each[slowest]
    energies = [other.energy_j for other in rows if other.energy_j is not None]
    energy = sum(energies) if len(energies) == len(rows) else None
    terms: dict[str, Any] = {
        "witness": "train",
        "memory": _memory(rows) if row.timed else (),
        "seconds": seconds,
        "step_energy_j": energy / row.all_steps if energy is not None and row.all_steps else None,
        "train_s": known.train_s,
    }
    if energy is not None and known.energy_before_j is not None:
        terms["energy_j"] = energy + known.energy_before_j
    if row.timed:
        most = {
            axis: (
                max(r.sent.get(axis, 0.0) for r in rows),
                max(r.calls.get(axis, 0) for r in rows),
            )
            for axis in (*AXES, "world")
        }
        terms["sent"] = SentBytes(**{f"{axis}_bytes": sent for axis, (sent, _) in most.items()})
        terms["calls"] = Calls(**{axis: calls for axis, (_, calls) in most.items()})
    counts = [other.counts for other in rows if other.counts is not None]
    if counts:
        by_kind = defaultdict[str, float](float)
        for each_counts in counts:
            for kind, flops in each_counts.flops.items():
                by_kind[kind] += flops
        terms["kernels"] = max(each_counts.kernels for each_counts in counts)
        terms["flops_by_module"] = {kind: by_kind[kind] / len(rows) for kind in sorted(by_kind)}
        terms["hardware_flops_per_device"] = hardware = sum(by_kind.values()) / len(rows)
        if known.peak_flops and row.steps:
            terms["hfu"] = hardware * row.steps / row.wall_s / known.peak_flops
    if row.steps:
        terms["tokens_per_s"] = speed = row.tokens / row.wall_s
        flops = known.flops_per_token / len(rows)
        terms["flops_per_device"] = flops * row.tokens / row.steps
        terms["mfu"] = flops * speed / known.peak_flops if known.peak_flops else None
    ledger = Ledger.model_validate(terms)
    told = {name: why for name, why in _sources(rows, slowest).items() if _known(ledger, name)}
    return ledger.model_copy(update={"sources": told})


def _memory(rows: Sequence[Counted]) -> tuple[Memory, ...]:
    """Of each stage, the components on the rank that held most, and the largest total."""
    stages: dict[int, list[Counted]] = defaultdict(list)
    for row in rows:
        stages[row.stage].append(row)
    found = []
    for _, members in sorted(stages.items()):
        totals = [row.memory_bytes for row in members if row.memory_bytes is not None]
        parts = [row.counts.memory for row in members if row.counts is not None]
        fullest: Mapping[str, int] = max(parts, key=lambda part: sum(part.values()), default={})
        names = COMPONENTS if fullest else ()
        components = {f"{name}_bytes": fullest.get(name, 0) for name in names}
        found.append(Memory(**components, total_bytes=max(totals, default=None)))
    return tuple(found)


def _known(ledger: Ledger, term: str) -> bool:
    """Whether a term has a value; of memory, that of any stage."""
    part, _, name = term.rpartition(".")
    tables = [ledger] if not part else getattr(ledger, part)
    tables = tables if isinstance(tables, list | tuple) else [tables]
    return any(getattr(table, name) is not None for table in tables)


def _sources(rows: Sequence[Counted], slowest: int) -> dict[str, str]:
    """How each term was counted."""
    row = rows[slowest]
    whose = f"rank {row.rank}, which computes longest of {len(rows)}" if len(rows) > 1 else "rank 0"
    mean = f"host clock: mean of {row.steps:,} steps of {whose}"
    sampled = f"step {', '.join(f'{step:,}' for step in row.timed[-3:])}"
    if len(row.timed) > 3:
        sampled = f"{len(row.timed)} steps, the last of them {row.timed[-1]:,}"
    phase = mean
    if row.on_accelerator:
        phase = f"{whose}, the host waiting for the device, in {sampled}; scaled to the mean step"
    waits = f"time in messages that the device waits for, in {sampled}; {whose}"
    spread = f"host clock: its total over {row.all_steps:,} steps; {whose}"
    counted = f"messages of {sampled}, ring algorithms; the rank with most"
    held = (
        "peak of the device's allocator"
        if row.on_accelerator
        else "peak resident memory less what the process held before it built the model"
    )
    tracked = f"operations of step {row.counts.step}" if row.counts else ""
    energy = ", ".join(sorted({other.energy_source for other in rows if other.energy_source}))
    return {
        "memory.total_bytes": f"{held}, after {sampled}; the fullest rank of each stage",
        **{
            f"memory.{name}_bytes": f"storages in {tracked}; the fullest rank of each stage"
            for name in COMPONENTS
        },
        "kernels": f"{tracked}; the rank with most",
        "hardware_flops_per_device": f"matrix products in {tracked}; mean of {len(rows)} ranks",
        "hfu": "FLOPs of the counted step in the mean time of a step, over the catalogue's peak",
        "seconds.forward_s": f"{phase}; less what is exposed",
        "seconds.backward_s": f"{phase}; less what is exposed",
        "seconds.compute_s": "forward and backward",
        "seconds.optimizer_s": f"{phase}; less what is exposed",
        "seconds.data_stall_s": f"{phase}; less what is exposed",
        **{f"seconds.{axis}_s": waits for axis in AXES if axis != "pipeline"},
        "seconds.pipeline_s": f"{mean}: from when a neighbour has made it until it is here",
        "seconds.bubble_s": f"{mean}: until a neighbour has made it; division as in {sampled}",
        "seconds.host_s": f"{mean}: the rest of a step, and messages of all ranks in {sampled}",
        "seconds.logging_s": mean,
        "seconds.checkpoint_stall_s": spread,
        "seconds.evaluation_s": spread,
        "seconds.total_s": f"{mean}; without checkpoints and evaluations",
        **{f"sent.{axis}_bytes": counted for axis in (*AXES, "world")},
        **{f"calls.{axis}": counted for axis in (*AXES, "world")},
        "tokens_per_s": f"mean of {row.steps:,} steps",
        "flops_per_device": "2mnk of each matrix product of the model's shape, on average",
        "mfu": "tokens_per_s times FLOPs per token, over the catalogue's peak",
        "train_s": "host clock of rank 0, over all sessions; without checkpoints and evaluations",
        "step_energy_j": f"{energy}; with checkpoints and evaluations",
        "energy_j": energy,
    }
