"""The time of one optimizer step, by cause, of every row at once.

Pipelines by closed form (arXiv:2104.04473, section 2.2; zero bubbles: arXiv:2401.10241): the
slowest stage works through all micro-batches but one, and one micro-batch passes all stages, the
fill divided by the interleaving. ZeRO-3 gathers each layer for each pass of each micro-batch
(arXiv:1910.02054, and FSDP's papers); gradients reduce once, behind the last backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ridgeline.plan.block import Block, gather_seconds, group_rate
from ridgeline.plan.constants import Shared
from ridgeline.plan.quantities import SCHEDULES, Array, Layouts, Rates, Table, Task

Collective = Callable[[Array, Array, Array], Array]
"""What a gather or scatter of so many bytes over so many ranks, so far apart, costs: s or bytes."""


@dataclass(frozen=True)
class Step(Table):
    """Seconds of a step by cause; they add up to `total`."""

    compute: Array
    tensor: Array
    context: Array
    expert: Array
    pipeline: Array
    """Sending between stages."""
    data: Array
    """Exposed gathers and reductions over data and context ranks."""
    bubble: Array
    optimizer: Array
    host: Array
    """Waiting for the host to launch kernels."""
    jitter: Array
    """Waiting for the slowest of many nodes."""
    total: Array


def layer_parameters(task: Task, tensor: Array, expert: Array) -> tuple[Array, Array]:
    """Mean parameters of a layer on one rank: those every data rank holds, and routed experts."""
    merge = task.heads * task.value_dim * task.hidden
    attention = task.hidden * (task.heads * task.head_dim + task.keys_values) + merge
    # queries' heads and keys' and values' expand from latents, which are whole on every tensor rank
    keys_values = task.kv_heads * (task.head_dim - task.rope_dim + task.value_dim)
    expand = task.query_rank * task.heads * task.head_dim + task.kv_rank * keys_values
    attention = np.where(task.latent > 0, expand + merge, attention)
    latents = task.hidden * task.latent + task.query_rank + task.kv_rank
    dense = task.dense_layers / task.layers
    mlp = task.mlp_matrices * task.hidden * task.ffn
    each = task.mlp_matrices * task.hidden * task.expert_ffn
    common = attention + dense * mlp + (1 - dense) * task.shared_experts * each
    whole = (1 - dense) * task.experts * task.hidden + 2 * task.hidden + latents
    return common / tensor + whole, (1 - dense) * task.experts * each / expert


def step(task: Task, rates: Rates, shared: Shared, layouts: Layouts, blocks: Block) -> Step:
    """The step of every row; `blocks` are those of the same rows."""
    micro_batches = task.global_batch / (layouts.data * layouts.micro_batch)
    pipeline, chunks = layouts.pipeline, layouts.interleave
    most = np.ceil(task.layers / (pipeline * chunks)) * chunks
    least = np.floor(task.layers / (pipeline * chunks)) * chunks
    common, routed = layer_parameters(task, layouts.tensor, layouts.expert)
    forward, backward, gathers = _with_gathers(task, rates, layouts, blocks)
    layer = forward + backward
    last = np.where(pipeline > 1, least * layer, most * layer) + blocks.head
    slowest = np.maximum(most * layer, last)
    through = task.layers * layer + blocks.head
    fill = (through - slowest) / chunks * _fill(layouts, blocks, forward, backward)
    work = micro_batches * through / pipeline
    busy = micro_batches * slowest + fill

    replicas = layouts.data * layouts.context
    owned = most * common + embedding_parameters(task, layouts), most * routed

    def seconds(size: Array, ranks: Array, stride: Array) -> Array:
        return gather_seconds(rates, size, ranks, stride)

    reduction = reduced_once(task, layouts, owned, seconds)
    window = np.where(chunks > 1, np.minimum(pipeline, micro_batches), 1.0) * most * backward
    data = np.maximum(reduction - window, 0) + rates.exposed * np.minimum(reduction, window)
    group, fewer = shard_groups(layouts)
    updated = owned[0] / np.where(layouts.zero > 0, group, 1.0)
    if np.any(task.experts):
        updated = updated + owned[1] / np.where(layouts.zero > 0, fewer, 1.0)
    optimizer = updated * rates.update

    rate, latency = group_rate(rates, np.full_like(pipeline, 2.0), layouts.tensor * replicas)
    message = layouts.micro_batch * task.sequence / layouts.context * task.hidden * 2
    hop = latency + message / layouts.tensor / rate
    sends = np.where(pipeline > 1, 2 * micro_batches * chunks * hop, 0.0)

    share = micro_batches * task.layers / pipeline
    compute = share * blocks.compute + micro_batches * blocks.head / pipeline
    tensor, context = share * blocks.tensor, share * blocks.context
    expert = share * blocks.expert
    waiting = share * (blocks.forward + blocks.backward) + micro_batches * blocks.head / pipeline
    host = waiting - compute - tensor - context - expert
    total = busy + data + optimizer + sends
    nodes = np.maximum(pipeline * replicas * layouts.tensor / rates.node_ranks, 1.0)
    jitter = shared.jitter * np.sqrt(2 * np.log(nodes)) * total
    return Step(
        compute=compute,
        tensor=tensor,
        context=context,
        expert=expert,
        pipeline=sends,
        data=data + share * gathers,
        bubble=busy - work,
        optimizer=optimizer,
        host=host,
        jitter=jitter,
        total=total + jitter,
    )


def embedding_parameters(task: Task, layouts: Layouts) -> Array:
    """Parameters of embedding and head on the rank that has most of them.

    One rank has both without a pipeline, and where a schedule folds the model: then its first
    layer and its last are neighbours.
    """
    folded = layouts.schedule >= SCHEDULES.index("zbv")
    both = ((layouts.pipeline == 1) | folded) & (task.tied == 0)
    return np.where(both, 2.0, 1.0) * task.vocab * task.hidden / layouts.tensor


def shard_groups(layouts: Layouts) -> tuple[Array, Array]:
    """Ranks that a shard spans: of what all replicas hold, and of an expert, which fewer hold."""
    group = layouts.shard_group
    return group, np.minimum(group, layouts.data * layouts.context / layouts.expert)


def layer_gathers(task: Task, layouts: Layouts, collective: Collective) -> tuple[Array, Array]:
    """ZeRO-3's gather of a layer's weights, and the scatter of its gradients from ZeRO-2 on."""
    common, routed = layer_parameters(task, layouts.tensor, layouts.expert)
    group, held = shard_groups(layouts)

    def both(width: Array) -> Array:
        ours = collective(common * width, group, layouts.tensor)
        if not np.any(task.experts):
            return ours
        apart = collective(routed * width, held, layouts.tensor * layouts.expert)
        return ours + np.where(task.experts > 0, apart, 0.0)

    return (
        np.where(layouts.zero == 3, both(task.weight_bytes), 0.0),
        np.where(layouts.zero >= 2, both(task.reduce_bytes), 0.0),
    )


def _with_gathers(
    task: Task, rates: Rates, layouts: Layouts, blocks: Block
) -> tuple[Array, Array, Array]:
    """Forward and backward of a layer with ZeRO's gathers; and what they add to both."""

    def seconds(size: Array, ranks: Array, stride: Array) -> Array:
        return gather_seconds(rates, size, ranks, stride) / rates.gather

    gather, scatter = layer_gathers(task, layouts, seconds)
    forward = _overlapped(rates, blocks.forward, gather)
    backward = _overlapped(rates, blocks.backward, gather + scatter)
    return forward, backward, forward + backward - blocks.forward - blocks.backward


def _overlapped(rates: Rates, compute: Array, communication: Array) -> Array:
    """The longer of two that run at the same time, and the share of the shorter that is paid."""
    shorter = np.minimum(compute, communication)
    return np.maximum(compute, communication) + rates.exposed * shorter


def reduced_once(
    task: Task, layouts: Layouts, owned: tuple[Array, Array], collective: Collective
) -> Array:
    """What crosses the data axis once per step, of a rank's parameters and of its experts'."""
    replicas = layouts.data * layouts.context
    ours = _reduction(task, layouts, owned[0], replicas, layouts.tensor, collective)
    if not np.any(task.experts):
        return ours
    held, stride = replicas / layouts.expert, layouts.tensor * layouts.expert
    apart = _reduction(task, layouts, owned[1], held, stride, collective)
    return ours + np.where(task.experts > 0, apart, 0.0)


def _reduction(
    task: Task,
    layouts: Layouts,
    parameters: Array,
    ranks: Array,
    stride: Array,
    collective: Collective,
) -> Array:
    """Gradients once per step, and ZeRO-1's weights, of some parameters over their `ranks`."""
    group = np.minimum(layouts.shard_group, ranks)
    weights = collective(parameters * task.weight_bytes, group, stride)
    gradients = collective(parameters * task.reduce_bytes, ranks, stride)
    whole = np.where(layouts.zero == 0, 2 * gradients, gradients + weights)
    # ZeRO-2 and -3 reduced each micro-batch within the group; what is left joins the groups
    joins = collective(parameters / group * task.reduce_bytes, ranks / group, stride * group)
    return np.where(
        layouts.zero == 3, 2 * joins, np.where(layouts.zero == 2, 2 * joins + weights, whole)
    )


def _fill(layouts: Layouts, blocks: Block, forward: Array, backward: Array) -> Array:
    """The share of 1F1B's fill that the schedule leaves: `timeline.closed_form_bubble_s`.

    ZBV and DualPipeV leave some too. Their papers count none, since there each rank steps its
    optimizer when it is done; clipping the gradient by its global norm waits for all ranks.
    """
    weights = np.minimum(blocks.weight_gradient, backward)
    inputs = backward - weights
    left = {
        "zbh1": forward + inputs - weights,
        "izb": forward + inputs - weights,
        "zbv": np.maximum(np.maximum(inputs, weights), 2 * (inputs - weights)),
        "dualpipev": np.maximum(forward + inputs, 2 * inputs) - weights,
    }
    share = np.ones_like(forward + layouts.schedule)
    for name, seconds in left.items():
        here = layouts.schedule == SCHEDULES.index(name)
        share = np.where(here, np.maximum(seconds, 0) / (forward + backward), share)
    return share
