"""Bytes that a device sends in one step, by mesh axis: the collectives whose time is priced.

A ring gather or scatter of S bytes over k ranks makes each of them send S·(k-1)/k. Counted is the
device that sends most: in the longest stage, between two others. Not counted, as in the time: the
reductions of a head divided over tensor ranks, and the embedding's gathers under ZeRO-2 and -3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ridgeline.plan.block import messages, passes, ring_bytes
from ridgeline.plan.quantities import SCHEDULES, Array, Layouts, Table, Task
from ridgeline.plan.step import (
    embedding_parameters,
    layer_gathers,
    layer_parameters,
    reduced_once,
)


@dataclass(frozen=True)
class Sent(Table):
    """Bytes per step, device and mesh axis."""

    tensor: Array
    pipeline: Array
    data: Array
    context: Array
    expert: Array


def sent(task: Task, layouts: Layouts) -> Sent:
    """What the busiest device of every row sends."""

    def ring(size: Array, ranks: Array, _stride: Array) -> Array:
        return ring_bytes(size, ranks)

    micro_batches = task.global_batch / (layouts.data * layouts.micro_batch)
    chunks = layouts.interleave
    layers = np.ceil(task.layers / (layouts.pipeline * chunks)) * chunks
    work = layers * micro_batches
    each, times = messages(task, layouts), passes(layouts)
    common, routed = layer_parameters(task, layouts.tensor, layouts.expert)
    owned = layers * common + embedding_parameters(task, layouts), layers * routed
    gather, scatter = layer_gathers(task, layouts, ring)
    # forward and backward gather alike, and ZeRO-2 and -3 scatter after each backward
    sharded = work * (2 * gather + scatter)
    return Sent(
        tensor=work * times * ring_bytes(each.attention + 3 * each.hidden, layouts.tensor),
        pipeline=micro_batches * _neighbours(layouts) * each.hidden / layouts.tensor,
        data=reduced_once(task, layouts, owned, ring) + sharded,
        # backward passes keys and values round again, and their gradients
        context=work * (times + 1) * ring_bytes(each.context, layouts.context),
        expert=work * task.expert_layers * times * 2 * ring_bytes(each.expert, layouts.expert),
    )


def _neighbours(layouts: Layouts) -> Array:
    """Messages per micro-batch from the rank that has most: its chunks' outputs and gradients.

    A rank between two others sends both of each chunk. Of two ranks, each holds one end of the
    model, which has no further neighbour, or the fold in its middle, whose neighbour is itself.
    """
    ends = np.where(layouts.schedule >= SCHEDULES.index("zbv"), 2.0, 1.0)
    most = 2 * layouts.interleave - np.where(layouts.pipeline == 2, ends, 0.0)
    return np.where(layouts.pipeline > 1, most, 0.0)
