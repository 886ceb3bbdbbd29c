"""What is planned: a model or a run file on a machine, with what is left out filled in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

import numpy as np

from ridgeline.errors import PlanError, RunError
from ridgeline.human import short
from ridgeline.layout.layout import Layout, Precision
from ridgeline.machine.cluster import MOST_DEVICES, Cluster, cluster, parse_devices
from ridgeline.machine.corrections import Correction, read_corrections
from ridgeline.machine.local import LOCAL, local_name, local_processes
from ridgeline.model.counts import parameters
from ridgeline.model.shape import ModelShape
from ridgeline.plan.constants import calibration, peak, rates_of
from ridgeline.plan.cost import Rates as Prices
from ridgeline.plan.measured import measured_rates
from ridgeline.plan.quantities import Rates, Task, task_of
from ridgeline.run import Run

STACK = "ridgeline"
USABLE = 0.95
"""Share of the device's memory that a layout may fill: a prediction a few percent low must fit too
(assumed; framework and allocator's slack are counted apart)."""


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
    corrections: Mapping[str, Correction] = field(default_factory=dict)
    """By precision, of the machine's constants under our own stack: from the user's folder."""

    @property
    def correction(self) -> Correction | None:
        """That of the precision and the stack asked for."""
        return self.corrections.get(self.precision) if self.stack == STACK else None

    @property
    def assumed(self) -> tuple[str, ...]:
        """The notes, and by what the machine's constants were corrected."""
        by = self.correction
        return (*self.notes, f"constants corrected by {by.source}") if by else self.notes


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
        said = short(float(tokens))
        notes.append(f"{said} training tokens: 20 per parameter (arXiv:2203.15556)")
    if batch_tokens is None:
        batch_tokens = _usual_batch(shape)
        said = short(float(batch_tokens))
        notes.append(f"batch of {said} tokens: usual for a model of this size")
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
        stack, prices or Prices(), tuple(notes), read_corrections(machine.device.name),
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
        if not 1 <= devices <= MOST_DEVICES:
            raise RunError(
                f'cluster.device = "{run.cluster.device}" with cluster.devices = {devices}',
                f"a plan is for a number of devices, from 1 to {MOST_DEVICES:,}",
                f"cluster.devices = {machine.node.devices}",
            )
    asked = run.layout.precision if isinstance(run.layout, Layout) else "auto"
    budget, per_step = run.budget, run.global_batch * run.sequence
    tokens = budget.tokens or (budget.steps * per_step if budget.steps else None)
    return Question(
        run.model, machine, devices, run.sequence, run.global_batch, tokens,
        _precision(machine, None if asked == "auto" else asked), STACK, prices or Prices(),
        corrections=read_corrections(machine.device.name),
    )  # fmt: skip


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
        left_out = "the order of the axes and etp are not priced"
        asked = replace(asked, notes=(*asked.notes, f"{said} priced as '{priced}': {left_out}"))
    return asked, run.layout


def physics(asked: Question) -> tuple[Task, Rates]:
    """What the layouts of a question are priced with. Raises MachineError."""
    task = task_of(asked.shape, asked.sequence, asked.global_batch, precision=asked.precision)
    if asked.cluster.device.effective:
        rates = measured_rates(asked.cluster, asked.devices, asked.stack, asked.precision)
    else:
        table = rates_of([asked.cluster], [asked.stack], [asked.precision], [False], calibration())
        scalars = {name: np.float64(value[0]) for name, value in table.__dict__.items()}
        rates = Rates(**scalars)  # type: ignore[arg-type]
    return task, corrected(rates, asked.correction) if asked.correction else rates


def corrected(rates: Rates, by: Correction) -> Rates:
    """`rates` with the factors of a correction: each multiplies the seconds that it is of."""
    return replace(
        rates,
        matrix=rates.matrix / by.compute,
        matrix_16=rates.matrix_16 / by.compute,
        attention=rates.attention / by.compute,
        memory=rates.memory / by.compute,
        host=rates.host * by.compute,
        near=rates.near / by.link,
        link=rates.link / by.link,
        link_latency=rates.link_latency * by.link,
        port=rates.port / by.port,
        port_latency=rates.port_latency * by.port,
        update=rates.update * by.update,
    )


def usable(asked: Question) -> float:
    """Bytes of one device that a layout may fill."""
    return USABLE * capacity(asked)


def capacity(asked: Question) -> float:
    """Bytes of one device; infinite where the catalogue does not know."""
    return asked.cluster.device.memory_bytes or math.inf


def _precision(machine: Cluster, asked: str | None) -> str:
    """The precision asked for, or the fastest 16-bit one, else float32."""
    if asked is None:
        asked = next((p for p in ("bf16", "fp16") if p in machine.device.peak_flops), "fp32")
    peak(machine, asked)
    said = [p for p in get_args(Precision) if p in machine.device.peak_flops]
    if asked not in get_args(Precision):
        raise PlanError(
            f"precision {asked}",
            f"a layout says one of {', '.join(get_args(Precision))}; 4 bits are only validated, as "
            "published rows have them",
            said[-1] if asked.endswith(("fp8", "fp4")) else said[0],
        )
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
