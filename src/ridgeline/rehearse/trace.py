"""The real training step of one rank, run on tensors that have shapes and no values.

Decoder, layout, pipeline, loop and optimizer are the trainer's own; only what they run on is not
there: memory (PyTorch's fake tensors), other ranks (a process group that answers nobody) and data.
Nothing is allocated, so a rank of a trillion parameters traces on a laptop.
"""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ridgeline.data.mixture import Mixture
from ridgeline.layout.layout import Layout
from ridgeline.layout.stages import Chunk, chunks_of
from ridgeline.layout.transfers import Step
from ridgeline.model.shape import ModelShape
from ridgeline.rehearse.effects import Context, Effect, contexts, effect_between, enough, only
from ridgeline.rehearse.fused import fuse, on_cpu
from ridgeline.run import Run
from ridgeline.torch_compat import FakeTensorMode, fake_process_group, settle_shards
from ridgeline.train.agreement import Agreement
from ridgeline.train.badsteps import BadSteps
from ridgeline.train.build import (
    MakeDecoder,
    MakeOptimizer,
    chunks_here,
    divide,
    pipeline_of,
    to_empty,
    without_memory,
)
from ridgeline.train.checkpoint import make_state
from ridgeline.train.experts import ExpertExchange, mixtures
from ridgeline.train.loop import Job, LossFunction, fetch, train_loop, valid_tokens
from ridgeline.train.manifest import Progress
from ridgeline.train.messages import groups_of
from ridgeline.train.optimizer import LossScale
from ridgeline.train.owners import Owners, hands_over
from ridgeline.train.parallelize import Mesh, make_mesh
from ridgeline.train.pipeline import Pipeline
from ridgeline.train.telemetry import Clock
from ridgeline.train.tracker import Mark, Tracker

LOGITS = ("activations", "temporary")
BEFORE, AFTER = Context("before", -1), Context("after", -1)
"""What surrounds the pipeline's pass: fetching tokens; norm, clipping and the optimizer."""


@dataclass(frozen=True)
class Program:
    """What a run is trained with."""

    decoder: MakeDecoder
    loss: LossFunction
    optimizer: MakeOptimizer


@dataclass(frozen=True)
class Live:
    """A tensor that is alive at the peak."""

    name: str
    """Its parameter, or the operation that made it."""
    shape: tuple[int, ...]
    dtype: str
    owner: str
    size_bytes: int


@dataclass(frozen=True)
class Trace:
    """What one rank does in a step of steady state."""

    resting: Mapping[str, int]
    """Bytes by owner between two steps."""
    micro_batches: int
    """How many were traced."""
    tokens_bytes: int
    """Inputs and targets of one micro-batch."""
    tokens_kernels: int
    """What fetching and counting them launches."""
    effects: dict[Context, Effect]
    hidden_bytes: int
    """What a chunk hands to the next for one micro-batch."""
    largest: tuple[Live, ...]
    """At the peak of what was traced."""
    unowned: tuple[str, ...]
    """Parameters that no optimizer moves."""
    without_gradient: tuple[str, ...]
    """Parameters that the pass gave no gradient."""
    whole: tuple[str, ...]
    """What stands whole on this rank although the layout divides it."""
    seconds: float


class EvenExchange(ExpertExchange):
    """Every rank sends every other as many visits: where nothing is routed, nobody knows better."""

    def sizes(
        self, leaving_RE: Tensor, arriving_RE: Tensor, x_TD: Tensor
    ) -> tuple[list[int], list[int]]:
        """As many rows each."""
        ranks = self.group.size()
        each, more = divmod(x_TD.shape[0], ranks)
        rows = [each + (rank < more) for rank in range(ranks)]
        return rows, rows


class _NoData:
    """Samples of zeros."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence

    def batch(self, start: int, size: int) -> Any:
        return np.zeros((size, self.sequence + 1), dtype=np.int64)


class _Accepting(LossScale):
    """Every step counts: whether a gradient is finite is not known here."""

    @property
    def factor(self) -> float:
        return self.START

    def accepts(self, norm: Tensor) -> bool:
        return True


class _AllGood(BadSteps):
    """Nor is a step bad, for an optimizer that asks the host."""

    def known(self, bad: Tensor) -> bool:
        return False


class _Nobody(Agreement):
    """No rank ever asks to stop."""

    def report(self, stop: bool, elapsed_s: float) -> tuple[bool, float]:
        return False, 0.0


def fewer(chunk: Chunk, shape: ModelShape, most: int | None) -> Chunk:
    """A chunk without the layers beyond `most` of the kind, dense or routed, it has more of."""
    if most is None:
        return chunk
    kinds = Counter(shape.experts_at(layer) is not None for layer in chunk.layers)
    common = kinds.most_common(1)[0][0]
    often = [layer for layer in chunk.layers if (shape.experts_at(layer) is not None) == common]
    return replace(chunk, layers=[n for n in chunk.layers if n not in often[most:]])


@contextmanager
def stage(
    run: Run, program: Program, rank: int, most_layers: int | None = None
) -> Iterator[tuple[Job, Tracker, Owners]]:
    """Rank `rank` of a run, resolved, ready to train on fake tensors, and who watches it.

    `most_layers` of a kind lie on each chunk, where that is given.
    """
    layout = run.layout
    assert isinstance(layout, Layout)
    device = torch.device("cpu")
    with fake_process_group(rank, layout.world), _no_collection():
        mesh = make_mesh(layout, device, rank)
        cuts = chunks_of(layout, run.model, run.sequence)
        chunks: dict[int, nn.Module] = {}
        for chunk in chunks_here(mesh, cuts):
            model = without_memory(program.decoder, run.model)
            divide(model, run.model, mesh, fewer(chunk, run.model, most_layers), len(cuts))
            for mixture in mixtures([model]):
                if isinstance(mixture.exchange, ExpertExchange):
                    mixture.exchange = EvenExchange(mixture.exchange.group)
            chunks[chunk.index] = model
        if not on_cpu(run):
            fuse(chunks.values())
        tracker = Tracker(groups_of(mesh), fake=True)
        with FakeTensorMode(allow_non_fake_inputs=True), tracker.watching(chunks.values()):
            for model in chunks.values():
                to_empty(model, device)
                settle_shards(model)
            clock = Clock()
            pipeline = pipeline_of(run, mesh, chunks, len(cuts), clock)
            owners = Owners(tracker, pipeline)
            yield _job(run, program, mesh, pipeline, clock), tracker, owners


@contextmanager
def _no_collection() -> Iterator[None]:
    """What cycles of references hold is then held to the end, and not until some later moment."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _job(run: Run, program: Program, mesh: Mesh, pipeline: Pipeline, clock: Clock) -> Job:
    chunks = list(pipeline.chunks.values())
    model = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
    return Job(
        run=run,
        mesh=mesh,
        pipeline=pipeline,
        loss=program.loss,
        optimizer=program.optimizer(model, run.optimizer),
        loss_scale=_Accepting() if mesh.layout.precision == "fp16" else None,
        mixture=cast(Mixture, _NoData(run.sequence)),
        agreement=_Nobody(None),
        clock=clock,
        stop_asked=lambda: False,
        bad_steps=_AllGood(),
    )


def of_micro_batches(run: Run, count: int, steps: int = 1) -> Run:
    """The run with that many micro-batches per step, and that many steps."""
    layout = run.layout
    assert isinstance(layout, Layout)
    batch = count * layout.data * layout.micro_batch
    schedule = run.schedule.model_copy(
        update={"global_batch": batch, "global_batch_tokens": None, "ramp": None}
    )
    budget = run.budget.model_copy(update={"steps": steps, "tokens": None, "hours": None})
    return run.model_copy(update={"schedule": schedule, "budget": budget})


def trace(
    run: Run,
    program: Program,
    rank: int,
    every: Sequence[Step],
    most_layers: int | None = None,
) -> Trace:
    """Trace a step of `rank`, by as many micro-batches of `every` as show all there is."""
    started = time.perf_counter()
    chosen = enough(every)
    short = only(every, chosen)
    few = of_micro_batches(run, len(chosen))
    with stage(few, program, rank, most_layers) as (job, tracker, owners):
        job.pipeline.steps = lambda *_: short
        make_state(job.optimizer)
        owners.moments(job.optimizer)
        marks: list[Mark] = []  # before each step, and behind the last
        shared: set[int] = set()
        ungraded: list[str] = []

        @contextmanager
        def around(step: Step) -> Iterator[None]:
            marks.append(tracker.mark())
            with owners.around(step):
                yield
            shared.update(map(tracker.see, hands_over(job.pipeline)))
            if step is short[-1]:
                marks.append(tracker.mark())
                ungraded.extend(_ungraded(job))

        job.pipeline.around = around
        one, two = (_fetching(job, tracker, count) for count in (1, 2))
        resting = _living(tracker, tracker.mark())
        begin = tracker.mark()
        left: list[Mark] = []
        train_loop(job, Progress(), lambda _: left.append(tracker.mark()), lambda *_: (False, None))
        end = tracker.mark()
        # While a step runs, the loop still has the numbers of the step before.
        resting["temporary"] += _living(tracker, left[0], since=marks[0])["temporary"]
        found = partial(effect_between, tracker, shared=shared)
        effects = {BEFORE: found(begin, marks[0]), AFTER: found(marks[-1], end)}
        spans = dict(zip(short, pairwise(marks), strict=True))
        for action, context in contexts(short):
            effects.setdefault(context, found(*spans[action]))
        return Trace(
            resting=resting,
            micro_batches=len(chosen),
            tokens_bytes=two[0] - one[0],
            tokens_kernels=two[1] - one[1],
            effects=effects,
            hidden_bytes=job.pipeline.hidden().untyped_storage().nbytes(),
            largest=_largest(tracker, begin),
            unowned=_unowned(job),
            without_gradient=tuple(ungraded),
            whole=tuple(_whole(job, tracker)),
            seconds=time.perf_counter() - started,
        )


def _living(tracker: Tracker, moment: Mark, since: Mark | None = None) -> Counter[str]:
    """Bytes by owner at a moment; those of storages that were born after `since`, if given."""
    held: Counter[str] = Counter()
    old = {storage for storage, _ in tracker.events[: since.events]} if since else set()
    for storage, more in tracker.events[: moment.events]:
        if storage not in old:
            held[tracker.owner(storage)] += more
    return held


def _fetching(job: Job, tracker: Tracker, micro_batches: int) -> tuple[int, int]:
    """Bytes of the tokens of a step, and what fetching and counting them launches."""
    start = tracker.mark()
    inputs, targets = fetch(replace(job, run=of_micro_batches(job.run, micro_batches)), Progress())
    valid_tokens(targets)
    sizes = [each.untyped_storage().nbytes() for each in (*inputs, *targets)]
    return sum(sizes), tracker.mark().kernels - start.kernels


def _largest(tracker: Tracker, begin: Mark, count: int = 5) -> tuple[Live, ...]:
    return tuple(
        Live(*tracker.made_by[storage], tracker.owner(storage), size)
        for storage, size in tracker.largest(begin.events, count)
    )


def _ungraded(job: Job) -> list[str]:
    return [
        f"chunk {index}: {name}"
        for index, chunk in job.pipeline.chunks.items()
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]


def _unowned(job: Job) -> tuple[str, ...]:
    owned = {id(p) for group in job.optimizer.param_groups for p in group["params"]}
    return tuple(
        f"chunk {index}: {name}"
        for index, chunk in job.pipeline.chunks.items()
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and id(parameter) not in owned
    )


def _whole(job: Job, tracker: Tracker) -> Iterator[str]:
    """Logits, and gradients of parameters, that tensor ranks divide and that stand here whole."""
    if job.layout.tensor == 1:
        return
    made = {storage: each for storage, each in tracker.made_by.items() if len(each[1]) > 1}
    logits = [
        shape
        for storage, (_, shape, _) in made.items()
        if shape[-1] == job.run.model.vocab and tracker.owner(storage) in LOGITS
    ]
    if logits:
        yield f"logits {max(logits, key=math.prod)} stand whole on a rank of tp{job.layout.tensor}"
    parameters = [
        (f"chunk {index}: the gradient of {name}", parameter)
        for index, chunk in job.pipeline.chunks.items()
        for name, parameter in chunk.named_parameters()
        if isinstance(parameter, DTensor) and len(parameter.shape) > 1
    ]
    # A part of one parameter may look like another that is whole.
    gradients = {shape for s, (_, shape, _) in made.items() if tracker.owner(s) == "gradients"}
    gradients -= {_part(parameter) for _, parameter in parameters}
    for gradient, parameter in parameters:
        if tuple(parameter.shape) in gradients:
            yield (
                f"{gradient} {tuple(parameter.shape)} stands whole on a rank of tp"
                f"{job.layout.tensor}"
            )


def _part(parameter: DTensor) -> tuple[int, ...]:
    """The shape of the part that the first tensor rank holds."""
    shape, mesh = list(parameter.shape), parameter.device_mesh
    # FSDP2 makes the tensor axis a strided division, which is no Shard to PyTorch
    axes = zip(mesh.mesh_dim_names or (), parameter.placements, mesh.shape, strict=True)
    for axis, placement, size in axes:
        if axis == "tensor" and isinstance(dim := getattr(placement, "dim", None), int):
            shape[dim] = -(-shape[dim] // size)
    return tuple(shape)
