"""A whole run rehearsed: every stage of its pipeline, at the run's true size, on one CPU."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ridgeline.errors import MachineError, ModelError
from ridgeline.layout.grid import RankGrid
from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import schedule_of
from ridgeline.layout.stages import Chunk, chunks_of
from ridgeline.layout.transfers import Step, with_transfers
from ridgeline.ledger import Calls, Ledger, SentBytes
from ridgeline.ledger import Memory as StageMemory
from ridgeline.model.decoder import Decoder
from ridgeline.plan.memory import framework_bytes
from ridgeline.plan.plan import plan_run
from ridgeline.plan.question import Question, capacity, question_of_run, usable
from ridgeline.rehearse.deep import DEEP, TRACED, extrapolated
from ridgeline.rehearse.effects import contexts
from ridgeline.rehearse.findings import findings_of
from ridgeline.rehearse.fused import on_cpu
from ridgeline.rehearse.replay import Moment, Replay, replay
from ridgeline.rehearse.trace import Live, Program, Trace, trace
from ridgeline.run import Run
from ridgeline.torch_compat import DataDependentOutputException, DynamicOutputShapeException
from ridgeline.train.build import MakeDecoder, MakeOptimizer, check_decoder, without_memory
from ridgeline.train.float8 import check_float8
from ridgeline.train.loop import LossFunction
from ridgeline.train.optimizer import adamw
from ridgeline.train.resolve import resolve, this_host
from ridgeline.train.start import refuse_layout
from ridgeline.train.vocabulary import token_loss

VALIDATED_ON = "cpu"
"""Where a rehearsal was compared with the run that it rehearses (`tests/rehearse`)."""
OWNERS = ("weights", "gradients", "optimizer", "activations", "temporary")
AXES = tuple(Calls.model_fields)
Say = Callable[[str, float], None]


@dataclass(frozen=True)
class Stage:
    """What the first rank of one pipeline stage does in a step."""

    stage: int
    rank: int
    layers: int
    peak_bytes: float
    """With what the framework takes."""
    by_component: Mapping[str, float]
    """Bytes at the peak; they add up to it."""
    peak_at: str
    """The action at whose highest moment it is: chunk, kind, micro-batch."""
    flops: float
    """Executed in a step, attention counted causally."""
    flops_by_module: Mapping[str, float]
    flops_again: float
    """Those among them that backward does a second time."""
    calls: Mapping[str, int]
    sent_bytes: Mapping[str, float]
    kernels: int
    timeline: tuple[Moment, ...]
    largest: tuple[Live, ...]
    """The largest tensors that are alive at the peak of what was traced."""


@dataclass(frozen=True)
class Rehearsal:
    """What the real program does with a run, stage by stage."""

    run: Run
    """Resolved."""
    layout: Layout
    capacity_bytes: float | None
    """Memory of one device; None: not known."""
    usable_bytes: float | None
    """What of it may be filled."""
    stages: tuple[Stage, ...]
    findings: tuple[str, ...]
    ledger: Ledger
    traced: str
    """How much was traced, and how much was put together from it."""
    seconds: float
    rss_bytes: int
    validated_on: str = VALIDATED_ON

    @property
    def fullest(self) -> Stage:
        """The stage that needs most memory."""
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits its device; None where its memory is not known."""
        if self.usable_bytes is None:
            return None
        return self.fullest.peak_bytes <= self.usable_bytes


def rehearse(
    run: Run,
    *,
    decoder: MakeDecoder = Decoder,
    loss: LossFunction = token_loss,
    optimizer: MakeOptimizer = adamw,
    progress: Say | None = None,
) -> Rehearsal:
    """Rehearse `run`: trace each kind of pipeline stage, and put every stage's step together.

    Data need not be there. `progress` is told what is traced and the share that is done. Raises
    what training would raise for the layout, and MachineError for a cluster that is not known.
    """
    started = time.perf_counter()
    run, layout = _resolved(run)
    check_decoder(without_memory(decoder, run.model), layout)
    asked = _question(run)
    program = Program(decoder, loss, optimizer)
    every = with_transfers(schedule_of(layout, micro_batches_of(run, layout)))
    traces = _Traces(run, layout, program)
    stages = []
    for place, steps in enumerate(every):
        if progress is not None:
            progress(f"stage {place + 1} of {len(every)}", place / len(every))
        rank = RankGrid(layout).rank(pipeline=place)
        seen = traces.of(place, rank, steps)
        done = replay(steps, seen, len(traces.cuts), micro_batches_of(run, layout))
        stages.append(_stage(place, rank, done, seen, traces.layers(place), on_cpu(run)))
    known = list(traces.by_kind.values())
    return Rehearsal(
        run=run,
        layout=layout,
        capacity_bytes=None if asked is None else _known(capacity(asked)),
        usable_bytes=None if asked is None else _known(usable(asked)),
        stages=tuple(stages),
        findings=tuple(findings_of(layout, asked, stages, known)),
        ledger=ledger_of(stages),
        traced=f"{traces.count} of {len(every)} stages traced, by up to "
        f"{max(each.micro_batches for each in known)} of {micro_batches_of(run, layout)} "
        "micro-batches; the rest put together from their actions" + traces.deep,
        seconds=time.perf_counter() - started,
        rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


class _Traces:
    """What was traced: one trace for each kind of stage, and more where one shows more."""

    def __init__(self, run: Run, layout: Layout, program: Program) -> None:
        self.run = run
        self.layout = layout
        self.program = program
        self.cuts = chunks_of(layout, run.model, run.sequence)
        self.by_kind: dict[object, Trace] = {}
        self.count = 0
        self.deep = ""

    def of(self, place: int, rank: int, steps: Sequence[Step]) -> Trace:
        """A trace that shows every context of `steps`."""
        kind = tuple(map(self._kind, self._chunks(place)))
        known = self.by_kind.get(kind)
        wanted = {context for _, context in contexts(steps)}
        if known is None or not wanted <= known.effects.keys():
            self.count += 1
            try:
                new = self._trace(place, rank, steps)
            except (DataDependentOutputException, DynamicOutputShapeException) as asking:
                raise ModelError(
                    f"rehearsing {self.run.model.name}",
                    f"its step goes on by what a tensor holds ({asking.func}), and tensors of a "
                    "rehearsal have no values",
                    "a decoder, loss and optimizer whose shapes and branches depend on no value",
                ) from None
            if known is not None:
                new = replace(new, effects={**known.effects, **new.effects})
            self.by_kind[kind] = new
        return self.by_kind[kind]

    def _trace(self, place: int, rank: int, steps: Sequence[Step]) -> Trace:
        """A stage of few layers whole; of one chunk with many, some of them."""
        traced = partial(trace, self.run, self.program, rank, steps)
        (deepest, *others) = sorted(self._chunks(place), key=lambda chunk: -len(chunk.layers))
        layers = Counter(self._routed(deepest)).most_common(1)[0][1]
        if not others and layers >= DEEP:
            found = extrapolated(layers, traced)
            if found is not None:
                self.deep = f"; {TRACED[-1]} of {layers} layers of a stage traced"
                return found
        return traced()

    def layers(self, place: int) -> int:
        """Layers of the model that lie on a stage."""
        return sum(len(chunk.layers) for chunk in self._chunks(place))

    def _chunks(self, place: int) -> list[Chunk]:
        ranks = schedule_of(self.layout, 1).rank_of_chunk
        return [chunk for chunk in self.cuts if ranks[chunk.index] == place]

    def _kind(self, chunk: Chunk) -> object:
        return chunk.first, chunk.last, self._routed(chunk)

    def _routed(self, chunk: Chunk) -> tuple[bool, ...]:
        return tuple(self.run.model.experts_at(layer) is not None for layer in chunk.layers)


def micro_batches_of(run: Run, layout: Layout) -> int:
    """Micro-batches of a step on each replica, once a ramp has ended."""
    return run.global_batch // (layout.data * layout.micro_batch)


def _resolved(run: Run) -> tuple[Run, Layout]:
    """The run with a layout: its own, or the planner's best, or what this machine would take."""
    if run.layout == "auto" and run.cluster.device != "local":
        best = plan_run(run).best_trainable
        if best is None:
            raise MachineError(
                f"layout auto for {run.model.name} on {run.cluster.devices:,} devices",
                "none of the layouts that fit can be trained",
                "ridgeline plan says what would fit, and on how many devices",
            )
        run = run.model_copy(update={"layout": best.layout})
    run, _ = resolve(run, this_host(), None)
    assert isinstance(run.layout, Layout)
    refuse_layout(run, run.layout)
    if run.layout.precision == "fp8":
        check_float8(torch.device("cpu"), multiplies=False)
    return run, run.layout


def _question(run: Run) -> Question | None:
    """What the planner knows of the run's machine; None where this machine was never measured."""
    try:
        return question_of_run(run)
    except MachineError:
        if run.cluster.device != "local":
            raise
        return None


def _known(size: float) -> float | None:
    return size if size < float("inf") else None


def _stage(place: int, rank: int, done: Replay, seen: Trace, layers: int, cpu: bool) -> Stage:
    peak = done.peak
    parts: dict[str, float] = {name: float(peak.bytes_by_owner.get(name, 0)) for name in OWNERS}
    parts["framework"] = float(framework_bytes(np.array(float(peak.total)), cpu))
    sums = done.sums
    return Stage(
        stage=place,
        rank=rank,
        layers=layers,
        peak_bytes=sum(parts.values()),
        by_component=parts,
        peak_at=peak.step,
        flops=sum(sums.flops.values()),
        flops_by_module=dict(sums.flops),
        flops_again=sums.again,
        calls={axis: round(count) for axis, count in sums.calls.items()},
        sent_bytes=dict(sums.sent_bytes),
        kernels=round(sums.kernels),
        timeline=done.timeline,
        largest=seen.largest,
    )


SOURCES = {
    "memory.weights_bytes": "storages that data parallelism gathers and keeps",
    "memory.gradients_bytes": "storages of gradients, whole and reduced",
    "memory.optimizer_bytes": "storages of parameters at rest, and of the optimizer's state",
    "memory.activations_bytes": "storages born in a forward pass and alive at its end",
    "memory.temporary_bytes": "all other storages that are alive at the peak",
    "memory.framework_bytes": "2 GiB but on a CPU, and 3%: assumed, as planned",
    "flops_per_device": "operations traced, mean over stages, without what is done again",
    "hardware_flops_per_device": "operations traced, mean over stages",
    "kernels": "operations traced, of the stage that has most",
    **{f"sent.{axis}_bytes": "messages traced, of the stage that sends most" for axis in AXES},
    **{f"calls.{axis}": "messages traced, of the stage that has most" for axis in AXES},
}


def ledger_of(stages: Sequence[Stage]) -> Ledger:
    """The ledger of what was rehearsed: memory by stage, FLOPs as the mean, messages as the most.

    An axis without messages is one with 0 bytes: that is known.
    """
    count = len(stages)
    kinds = sorted({kind for stage in stages for kind in stage.flops_by_module})
    memory = tuple(
        StageMemory(**{f"{name}_bytes": size for name, size in stage.by_component.items()})
        for stage in stages
    )
    return Ledger(
        witness="rehearse",
        memory=memory,
        sent=SentBytes(
            **{f"{a}_bytes": max(s.sent_bytes.get(a, 0.0) for s in stages) for a in AXES}
        ),
        calls=Calls(**{a: max(s.calls.get(a, 0) for s in stages) for a in AXES}),
        kernels=max(stage.kernels for stage in stages),
        flops_per_device=sum(s.flops - s.flops_again for s in stages) / count,
        hardware_flops_per_device=sum(stage.flops for stage in stages) / count,
        flops_by_module={
            kind: sum(s.flops_by_module.get(kind, 0.0) for s in stages) / count for kind in kinds
        },
        sources=SOURCES,
    )
