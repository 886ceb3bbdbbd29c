"""`ridgeline plan`: the layouts of a run that finish its tokens soonest, and what each takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from ridgeline.errors import LayoutError, PlanError, RunError
from ridgeline.layout.arithmetic import check
from ridgeline.layout.layout import Layout
from ridgeline.layout.trainable import is_trainable
from ridgeline.ledger import Ledger
from ridgeline.machine.cluster import Cluster, cluster, parse_devices
from ridgeline.machine.local import LOCAL, local_name, local_processes
from ridgeline.model.counts import flops_per_token, parameters
from ridgeline.model.shape import ModelShape
from ridgeline.plan.block import block
from ridgeline.plan.certainty import UNKNOWN, certainty
from ridgeline.plan.constants import calibration, peak, rates_of
from ridgeline.plan.cost import Cost, cost
from ridgeline.plan.cost import Rates as Prices
from ridgeline.plan.ledgers import CAUSES, ledger_of
from ridgeline.plan.measured import measured_rates
from ridgeline.plan.memory import Memory, memory, stage_memory
from ridgeline.plan.quantities import Layouts, Rates, Task, task_of
from ridgeline.plan.search import Found, different, search
from ridgeline.plan.sent import sent
from ridgeline.plan.space import MOST_MICRO_BATCH, nearest_devices, space
from ridgeline.plan.step import Step, step
from ridgeline.run import Run

Objective = Literal["time", "money", "energy"]
STACK = "ridgeline"
USABLE = 0.95
"""Share of the device's memory that a layout may fill: a prediction a few percent low must fit too
(assumed; framework and allocator's slack are counted apart)."""
NAIVE_SHARE = 0.5
IDLE_POWER_SHARE = 0.4
"""Power above idle while waiting on links and bubbles, of that while computing (assumed)."""


@dataclass(frozen=True)
class Question:
    """What is planned, completed: every default of the command is filled in here."""

    shape: ModelShape
    cluster: Cluster
    devices: int
    sequence: int
    """Tokens per sequence."""
    global_batch: int
    """Sequences per step."""
    tokens: int | None = None
    """Training tokens; None: no total is planned."""
    precision: str = "bf16"
    stack: str = STACK
    prices: Prices = field(default_factory=Prices)
    notes: tuple[str, ...] = ()
    """What was assumed."""


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
    asked: Planned | None
    """The run's own layout, where it names one."""
    best_trainable: Planned | None
    """The fastest that today's trainer can run and that fits."""
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
            "assumed": list(self.question.notes),
            "space": self.space,
            "arithmetic_ok": self.arithmetic_ok,
            "memory_ok": self.memory_ok,
            "search_s": self.search_s,
        }


def question(
    shape: ModelShape,
    on: str,
    *,
    tokens: int | None = None,
    batch_tokens: int | None = None,
    sequence: int | None = None,
    precision: str | None = None,
    stack: str = STACK,
    prices: Prices | None = None,
) -> Question:
    """A Question from a model and a machine such as `16384xH100`, with what is left out assumed.

    Raises MachineError, PlanError.
    """
    devices, machine = parse_devices(on)
    notes: list[str] = []
    if sequence is None:
        sequence = min(shape.max_sequence, 8192)
        notes.append(f"sequence {sequence:,} tokens: the model's, at most 8,192")
    if sequence < 1 or (shape.positions == "learned" and sequence > shape.max_sequence):
        raise PlanError(
            f"sequences of {sequence:,} tokens for {shape.name}",
            f"it has {shape.max_sequence:,} learned positions",
            f"--seq {shape.max_sequence}",
        )
    if tokens is None:
        tokens = 20 * parameters(shape).active
        notes.append(f"{tokens:.3g} training tokens: 20 per parameter (arXiv:2203.15556)")
    if batch_tokens is None:
        batch_tokens = _usual_batch(shape)
        notes.append(f"batch of {batch_tokens:.3g} tokens: usual for a model of this size")
    if batch_tokens > tokens:
        raise PlanError(
            f"a batch of {batch_tokens:,} tokens for {tokens:,} training tokens",
            "a step takes one batch, and training takes at least one step",
            f"--batch {tokens}, or --tokens {batch_tokens}",
        )
    sequences = _whole_batch(batch_tokens, sequence)
    if sequences * sequence != batch_tokens:
        notes.append(
            f"batch of {sequences:,} sequences, {sequences * sequence:,} tokens: the nearest to "
            f"{batch_tokens:,} that divides well"
        )
    return Question(
        shape, machine, devices, sequence, sequences, tokens, _precision(machine, precision),
        stack, prices or Prices(), tuple(notes),
    )  # fmt: skip


def question_of_run(run: Run, on: str | None = None, prices: Prices | None = None) -> Question:
    """The Question of a run file; `on` takes the place of its [cluster]. Raises MachineError."""
    if on is not None:
        devices, machine = parse_devices(on)
    elif run.cluster.device == LOCAL:
        own = run.layout.world if isinstance(run.layout, Layout) else 0
        devices = own or run.cluster.devices or local_processes()
        machine = cluster(local_name(devices))
    else:
        machine, devices = cluster(run.cluster.device), run.cluster.devices
        if devices == 0:
            raise RunError(
                f'cluster.device = "{run.cluster.device}" without cluster.devices',
                "a plan is for a number of devices",
                f"cluster.devices = {machine.node.devices}",
            )
    asked = run.layout.precision if isinstance(run.layout, Layout) else "auto"
    budget, per_step = run.budget, run.global_batch * run.sequence
    tokens = budget.tokens or (budget.steps * per_step if budget.steps else None)
    return Question(
        run.model, machine, devices, run.sequence, run.global_batch, tokens,
        _precision(machine, None if asked == "auto" else asked), STACK, prices or Prices(),
    )  # fmt: skip


def plan(
    asked: Question, *, top: int = 5, rank: Objective = "time", layout: Layout | None = None
) -> Plan:
    """Search the whole space of `asked`; the `top` best, and `layout` beside them if given.

    Raises PlanError where nothing divides the run or nothing fits, with the nearest that would;
    LayoutError for a `layout` that does not divide it.
    """
    task, rates = physics(asked)
    known = calibration()
    everything = space(asked.shape, asked.sequence, asked.global_batch, asked.devices)
    if everything.valid == 0:
        raise _indivisible(asked)
    found = search(task, rates, known.shared, everything, usable(asked))
    if found.layouts.count == 0:
        raise _too_small(asked, found)
    ours = [layout] if layout else []
    if layout:
        check(layout, asked.shape, asked.sequence, asked.global_batch, asked.devices)
    rows = np.array(different(found)[: top if rank == "time" else None], dtype=np.intp)
    pool = _priced(
        asked, found.layouts.take(rows), found.steps.take(rows), found.memories.take(rows)
    )
    if any(_cost(each, rank) is None for each in pool):
        raise PlanError(
            f"ranking by {rank}",
            "the training tokens, or the price or power of a device, are not known",
            "--tokens and --price-per-hour" if rank == "money" else "--tokens, or --rank time",
        )
    pool.sort(key=lambda each: _key(each, rank))
    return Plan(
        asked,
        tuple(pool[:top]),
        price(asked, ours)[0] if ours else None,
        _best_trainable(asked),
        _flops(asked, "full") / asked.devices / NAIVE_SHARE / peak(asked.cluster, asked.precision),
        found.space,
        found.arithmetic_ok,
        found.memory_ok,
        found.search_s,
    )


def plan_run(run: Run, on: str | None = None, *, top: int = 5, rank: Objective = "time") -> Plan:
    """Plan a run file's model, batch and budget, its own layout beside the best if it names one."""
    asked, own = with_own_layout(question_of_run(run, on), run, on)
    return plan(asked, top=top, rank=rank, layout=own)


def with_own_layout(asked: Question, run: Run, on: str | None) -> tuple[Question, Layout | None]:
    """The run's own layout, if it names one; on other devices than its own it says nothing."""
    if not isinstance(run.layout, Layout):
        return asked, None
    said = f"the run's own layout, '{run.layout}', is"
    if on is not None and run.layout.world != asked.devices:
        note = f"{said} for {run.layout.world:,} devices: left out"
        return replace(asked, notes=(*asked.notes, note)), None
    plain = {name: Layout.model_fields[name].default for name in ("order", "expert_tensor")}
    priced = run.layout.model_copy(update=plain)
    if priced != run.layout:
        asked = replace(asked, notes=(*asked.notes, f"{said} priced as '{priced}'"))
    return asked, run.layout


def price(asked: Question, layouts: list[Layout]) -> list[Planned]:
    """Given layouts priced, whether they fit or not. They are not checked against the run."""
    task, rates = physics(asked)
    shared = calibration().shared
    table = Layouts.of(layouts)
    blocks = block(task, rates, shared, table)
    steps = step(task, rates, shared, table, blocks)
    return _priced(asked, table, steps, memory(task, rates, table))


def physics(asked: Question) -> tuple[Task, Rates]:
    """What the layouts of a question are priced with. Raises MachineError."""
    task = task_of(asked.shape, asked.sequence, asked.global_batch, precision=asked.precision)
    if asked.cluster.device.effective:
        return task, measured_rates(asked.cluster, asked.devices, asked.stack, asked.precision)
    rates = rates_of([asked.cluster], [asked.stack], [asked.precision], [False], calibration())
    scalars = {name: np.float64(value[0]) for name, value in rates.__dict__.items()}
    return task, Rates(**scalars)  # type: ignore[arg-type]


def usable(asked: Question) -> float:
    """Bytes of one device that a layout may fill."""
    return USABLE * _capacity(asked)


def _capacity(asked: Question) -> float:
    """Bytes of one device; infinite where the catalogue does not know."""
    return asked.cluster.device.memory_bytes or math.inf


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
        some = float(rates.selective_matrix)
        again = {"none": 0.0, "selective": some, "full": 1.0}[layout.recompute]
        hfu = mfu * (1 + again / 3 * (1 - head / causal))
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
            sending,
            stage_memory(task, rates, table.take(np.array([row]))),
            row,
            causal / asked.devices,
            hardware_flops_per_device=causal / asked.devices * hfu / mfu,
            goodput=total.goodput if total else None,
            **shared,
        )
        busiest = max(CAUSES, key=lambda name: float(getattr(steps, name)[row]))
        planned.append(
            Planned(
                layout=layout,
                step_s=seconds,
                interval_s=(float(low[row]), float(high[row])),
                memory_bytes=float(memories.total[row]),
                capacity_bytes=_capacity(asked),
                fits=bool(memories.total[row] <= usable(asked)),
                bound_by=busiest,
                extrapolated=bool(stretch[row] > 1),
                trainable=is_trainable(layout),
                ledger=ledger,
                **shared,
            )
        )
    return planned


def _totals(asked: Question, steps: Step, row: int, mfu: float) -> Cost | None:
    """Days, money and energy to the last token, with the power that this layout draws."""
    if asked.tokens is None:
        return None
    device, node = asked.cluster.device, asked.cluster.node
    prices = asked.prices
    if prices.device_w is None and None not in (device.power_w, device.idle_w, node.overhead_w):
        limit, idle = device.power_w or 0.0, device.idle_w or 0.0
        busy = float(steps.compute[row] / steps.total[row])
        above = (limit - idle) * (busy + IDLE_POWER_SHARE * (1 - busy))
        prices = replace(prices, device_w=idle + above + (node.overhead_w or 0) / node.devices)
    known = asked.precision if asked.precision in device.peak_flops else None
    return cost(
        asked.shape, asked.tokens, asked.devices, asked.cluster, mfu=min(mfu, 1.0),
        sequence=asked.sequence, precision=known, rates=prices,
    )  # fmt: skip


def _best_trainable(asked: Question) -> Planned | None:
    """The fastest layout that fits, of those today's trainer can run."""
    tried = [
        Layout.model_validate(
            {"data": asked.devices, "micro_batch": mb, "precision": asked.precision}
        )
        for mb in range(1, MOST_MICRO_BATCH + 1)
        if asked.global_batch % (asked.devices * mb) == 0
    ]
    priced = [each for each in price(asked, tried) if each.fits and each.trainable] if tried else []
    return min(priced, key=lambda each: each.step_s, default=None)


def _cost(each: Planned, rank: Objective) -> float | None:
    return {"time": each.step_s, "money": each.money, "energy": each.energy_j}[rank]


def _key(each: Planned, rank: Objective) -> tuple[float, float, float]:
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


def _precision(machine: Cluster, asked: str | None) -> str:
    """The precision asked for, or the fastest 16-bit one, else float32."""
    if asked is None:
        asked = next((p for p in ("bf16", "fp16") if p in machine.device.peak_flops), "fp32")
    peak(machine, asked)
    return asked


def _usual_batch(shape: ModelShape) -> int:
    """Tokens per step of published models of that size (GPT-3's table 2.1; Llama 3: 16M)."""
    size = parameters(shape).total
    return next(
        (t for least, t in ((1e11, 2**24), (1e10, 2**22), (1e9, 2**21)) if size >= least), 2**19
    )


def _whole_batch(batch_tokens: int, sequence: int) -> int:
    """Sequences of a batch: exact if whole, else the best divisible number within 7%."""
    if batch_tokens % sequence == 0:
        return batch_tokens // sequence
    wanted = batch_tokens / sequence
    if wanted < 1:
        raise PlanError(
            f"a batch of {batch_tokens:,} tokens",
            f"it holds at least one sequence of {sequence:,}",
            f"--batch {sequence}",
        )
    near = range(max(1, math.ceil(wanted * 0.93)), math.floor(wanted * 1.07) + 2)
    return max(near, key=lambda n: (n & -n, -abs(n - wanted)))


def _indivisible(asked: Question) -> LayoutError:
    """No layout divides the run: the batches nearest to the asked one that some layout does."""
    shape, devices = asked.shape, asked.devices
    return LayoutError(
        f"{shape.name} on {devices} devices with a batch of {asked.global_batch} sequences",
        f"dp·cp·tp·pp = {devices}, dp divides {asked.global_batch}, cp divides "
        f"{asked.sequence} tokens, tp divides {shape.heads} heads and {shape.kv_heads} key-value "
        f"heads, pp is at most {shape.layers} layers: no four numbers do all of that",
        f"{nearest_devices(shape, asked.sequence, asked.global_batch, devices)} devices, or a "
        f"batch of {-(-asked.global_batch // devices) * devices} sequences",
    )


def _too_small(asked: Question, found: Found) -> PlanError:
    """Nothing fits: by how much, what binds, and how many devices would do."""
    table, layout = found.smallest_memory, found.smallest.layout(0, asked.precision)
    names = ("weights", "gradients", "optimizer", "activations", "temporary", "framework")
    parts = {name: float(getattr(table, name)[0]) for name in names}
    biggest = max(parts, key=lambda name: parts[name])
    need, have = float(table.total[0]), usable(asked)
    gib = 2.0**30
    return PlanError(
        f"{asked.shape.name} on {asked.devices} {asked.cluster.device.name}",
        f"the smallest layout, '{layout}', needs {need / gib:.1f} of {have / gib:.1f} usable GiB "
        f"per device: {(need - have) / gib:.1f} too much, most of it {biggest} "
        f"({parts[biggest] / gib:.1f} GiB)",
        _what_fits(asked),
    )


def _what_fits(asked: Question) -> str:
    """The fewest devices, at most 1,024 times as many, on which something fits."""
    if asked.cluster.device.effective:
        return "shorter sequences, or a machine with more memory"
    shared = calibration().shared
    for factor in (2**k for k in range(1, 11)):
        larger = replace(asked, devices=asked.devices * factor)
        task, rates = physics(larger)
        tried = space(asked.shape, asked.sequence, asked.global_batch, larger.devices)
        if tried.valid == 0:
            continue
        found = search(task, rates, shared, tried, usable(larger))
        if found.layouts.count:
            best = found.layouts.layout(0, asked.precision)
            return f"{larger.devices} devices ('{best}'), shorter sequences, or larger devices"
    return "shorter sequences, or devices with more memory"
