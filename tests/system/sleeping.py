"""Chunks of a pipeline that sleep instead of computing, and what a rank's time goes into.

B sequences of a micro-batch, L tokens of a sequence, D hidden.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import pipeline_schedule
from ridgeline.model.shape import ModelShape
from ridgeline.plan.timeline import Durations
from ridgeline.train.parallelize import make_mesh, parallelize
from ridgeline.train.pipeline import Pipeline
from ridgeline.train.telemetry import Clock
from ridgeline.train.worker import process_group

SHAPE = ModelShape(layers=1, hidden=2, heads=1, ffn_hidden=1, vocab=2)


class _Sleep(torch.autograd.Function):
    """Sleeps on the way there and on the way back; a node of its own, so that a schedule which
    splits the backward pass can move it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, forward_s: float, backward_s: float) -> Tensor:
        time.sleep(forward_s)
        ctx.backward_s = backward_s
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(ctx.backward_s)
        return gradients[0], None, None


class SleepingChunk(nn.Module):
    """input · weight, whose forward, input gradient and weight gradient take the given seconds.

    The first has an embedding, so it needs the gradient of what its weight multiplies, as a model's
    first block does.
    """

    def __init__(self, first: bool, forward_s: float, input_s: float, weight_s: float) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.ones(1)) if first else None
        self.weight = nn.Parameter(torch.ones(1))
        self.seconds = (forward_s, input_s, weight_s)

    def forward(self, given: Tensor, positions_L: Tensor) -> Tensor:
        forward_s, input_s, weight_s = self.seconds
        given_BLD = given if self.embedding is None else given[..., None] * self.embedding
        given_BLD = _Sleep.apply(given_BLD, forward_s, input_s)  # type: ignore[no-untyped-call]
        weight_D = _Sleep.apply(self.weight, 0.0, weight_s)  # type: ignore[no-untyped-call]
        made_BLD: Tensor = given_BLD * weight_D
        return made_BLD


def as_split(even: Durations) -> Durations:
    """`even` as the program splits it: tokens have no gradient, so W of the first chunk does all.

    Nobody waits for the first chunk's input gradient.
    """
    inputs, weights = even.backward_input_s, even.backward_weight_s
    first_s = inputs[0] + weights[0]
    return Durations(even.forward_s, (0.0, *inputs[1:]), (first_s, *weights[1:]))


class Timed(NamedTuple):
    """One step of one rank."""

    step_s: float
    busy_s: float
    """Seconds of forward and backward passes."""


def time_steps(sentence: str, micro_batches: int, even: Durations, steps: int) -> list[Timed]:
    """Time this rank's steps of a pipeline whose chunks sleep as long as `even` says."""
    layout, told = Layout.model_validate(sentence), []
    with process_group() as (device, _):
        mesh, clock = make_mesh(layout, device, dist.get_rank()), Clock()
        schedule = pipeline_schedule(
            layout.schedule, layout.pipeline, micro_batches, layout.interleave
        )
        parts = zip(even.forward_s, even.backward_input_s, even.backward_weight_s, strict=True)
        chunks: dict[int, nn.Module] = {}
        for index, seconds in enumerate(parts):
            if schedule.rank_of_chunk[index] == mesh.rank:
                chunks[index] = SleepingChunk(index == 0, *seconds)
                parallelize(chunks[index], SHAPE, mesh)
        pipeline = Pipeline(
            layout=layout,
            rank=mesh.rank,
            chunks=chunks,
            count=schedule.chunks,
            positions=torch.zeros(1, dtype=torch.int64),
            hidden=partial(torch.empty, 1, 1, 1),
            group=mesh.devices["pipeline"].get_group(),
            phase=clock.phase,
        )
        tokens = [torch.ones(1, 1)] * micro_batches
        for _ in range(steps):
            clock.take()
            dist.barrier()
            start = time.perf_counter()
            pipeline.run(tokens, lambda made_BLD, _: made_BLD.sum())
            dist.barrier()
            step_s, seconds_of = time.perf_counter() - start, clock.take()
            told.append(Timed(step_s, seconds_of["forward"] + seconds_of["backward"]))
    return told
