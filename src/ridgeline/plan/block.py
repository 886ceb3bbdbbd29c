"""The cost of one transformer block, and of the head, for one micro-batch on one device.

Depends on few keys (tensor, context, expert, micro-batch, recompute), so a search computes it once
per key. Sources: matrix products as max(arithmetic, memory) with a rate that saturates with each
dimension; causal flash attention as its own kernel, backward 2.9 times forward; tensor parallelism
as two all-reduces (or gather and scatter pairs) per pass, arXiv:1909.08053; the host floor, which
eager programs with small micro-batches hit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ridgeline.plan.constants import Shared
from ridgeline.plan.quantities import Array, Layouts, Rates, Table, Task

FORWARD_HOST, RECOMPUTE_HOST, BACKWARD_HOST = 0.28, 0.28, 0.44
"""Shares of the host's work per layer (assumed: counted in launched kernels)."""


@dataclass(frozen=True)
class Block(Table):
    """Seconds of one layer and of the head, per micro-batch and device."""

    forward: Array
    backward: Array
    """Recomputation included."""
    compute: Array
    """Device work of both, without communication and without waiting for the host."""
    tensor: Array
    """Exposed tensor-parallel communication of both."""
    context: Array
    expert: Array
    weight_gradient: Array
    """The part of `backward` that zero-bubble schedules may postpone."""
    head: Array
    """Logits and loss, forward and backward."""


def group_rate(rates: Rates, ranks: Array, stride: Array) -> tuple[Array, Array]:
    """Bytes per second per rank, and seconds of latency per trip round, of a group of `ranks`.

    `stride` is the distance between neighbours of the group. Ranks of one node drive that many
    ports together, up to the rate of the links; beyond a pod the ports are oversubscribed.
    """
    within = np.clip(np.floor(rates.node_ranks / stride), 1, ranks)
    span = ranks * stride
    inside = np.where(span <= rates.near_ranks, rates.near, rates.link)
    port = np.where(span > rates.pod_ranks, rates.port / rates.oversubscription, rates.port)
    outside = np.minimum(rates.link, port * within)
    rate = np.where(within >= ranks, inside, outside)
    nodes = np.ceil(ranks / within)
    latency = rates.link_latency * (within - 1) + rates.port_latency * (nodes - 1)
    return rate, latency


def ring_bytes(size: Array, ranks: Array) -> Array:
    """What each rank sends in a ring all-gather or reduce-scatter of `size` bytes in all."""
    return size * (ranks - 1) / ranks


def gather_seconds(rates: Rates, size: Array, ranks: Array, stride: Array) -> Array:
    """A ring all-gather or reduce-scatter of `size` bytes in all over `ranks`."""
    rate, latency = group_rate(rates, ranks, stride)
    return np.where(ranks > 1, latency + ring_bytes(size, ranks) / rate, 0.0)


@dataclass(frozen=True)
class Messages(Table):
    """Bytes, in all, of each collective of one layer's pass over one micro-batch."""

    attention: Array
    """Gathered over tensor ranks before attention: the residual stream, or its latents."""
    hidden: Array
    """Each of the three others: scattered after attention, gathered and scattered for the MLP."""
    context: Array
    """Keys and values that go round the ring of context ranks."""
    expert: Array
    """To the experts, and as much again back."""


def messages(task: Task, keys: Layouts) -> Messages:
    """The collectives of a layer, of every row of `keys`."""
    rows = keys.micro_batch * task.sequence / keys.context
    return Messages(
        attention=rows * np.where(task.latent > 0, task.latent, task.hidden) * 2,
        hidden=rows * task.hidden * 2,
        context=rows * keys.context * task.keys_values / keys.tensor * 2,
        expert=rows / keys.tensor * task.top_k * task.hidden * 2,
    )


def passes(keys: Layouts) -> Array:
    """How often a layer's collectives run per micro-batch: forward, backward, recomputation."""
    return np.where(keys.recompute == 2, 3.0, 2.0)


def _product(task: Task, rates: Rates, m: Array, n: Array, k: Array) -> tuple[Array, Array]:
    """Seconds of (m, k) by (k, n), and bytes that casting its inputs and outputs moves."""
    edge = rates.edge
    saturation = (1 + edge / m) * (1 + edge / n) * (1 + edge / k)
    arithmetic = 2 * m * n * k * saturation / rates.matrix
    memory = task.weight_bytes * (m * k + k * n + m * n) / rates.memory
    return np.maximum(arithmetic, memory), rates.cast * (m * k + m * n)


def _attention(task: Task, rates: Rates, shared: Shared, keys: Layouts) -> tuple[Array, Array]:
    """Seconds of the attention core, forward and backward."""
    rows = keys.micro_batch * task.sequence / keys.context
    heads = task.heads / keys.tensor
    flops = 2 * rows * task.sequence * heads * (task.head_dim + task.value_dim)
    narrow = np.minimum(1.0, task.head_dim / 128) ** shared.narrow_heads
    # a ring's kernels see one part of the sequence at a time
    short = 1 + rates.edge * keys.context / task.sequence
    fused = flops / 2 * short / (rates.attention * narrow)
    edge = rates.edge
    plain = flops * (1 + edge / task.head_dim) * (1 + edge / task.sequence) / rates.matrix_16
    plain = plain + rows * task.sequence * heads * shared.score_bytes / rates.memory
    forward = np.where(task.flash > 0, fused, plain)
    return forward, np.where(task.flash > 0, shared.attention_backward, 2.0) * forward


def _mlp(task: Task, rates: Rates, keys: Layouts, rows: Array) -> tuple[Array, Array, Array, Array]:
    """Mean over the layers: seconds of matrices, cast bytes, activation bytes, exchange seconds."""
    gates = task.mlp_matrices - 1
    width = task.ffn / keys.tensor
    up, up_cast = _product(task, rates, rows, gates * width, task.hidden)
    down, down_cast = _product(task, rates, rows, task.hidden, width)
    activation = rows * width * 2 * (gates + 1)
    seconds, cast = up + down, up_cast + down_cast
    if not np.any(task.experts):
        return seconds, cast, activation, np.zeros(np.broadcast(seconds, keys.tensor).shape)
    # tokens of one rank visit top_k experts, spread over expert-parallel ranks; shared ones all
    visits = task.top_k + task.shared_experts
    each = np.maximum(rows * task.top_k * keys.expert / np.maximum(task.experts, 1), 1.0)
    copies = rows * np.maximum(visits, 1.0) / each
    inner = np.maximum(task.expert_ffn, 1.0)  # dense rows beside others have none; share is 0
    up, up_cast = _product(task, rates, each, gates * inner, task.hidden)
    down, down_cast = _product(task, rates, each, task.hidden, inner)
    share = task.expert_layers
    exchange = 2 * gather_seconds(rates, messages(task, keys).expert, keys.expert, keys.tensor)
    return (
        (1 - share) * seconds + share * copies / keys.tensor * (up + down),
        (1 - share) * cast + share * copies / keys.tensor * (up_cast + down_cast),
        (1 - share) * activation
        + share * rows * visits * task.expert_ffn / keys.tensor * 2 * (gates + 1),
        share * exchange,
    )


def _projections(
    task: Task, rates: Rates, keys: Layouts, rows: Array, spread: Array
) -> tuple[Array, Array, Array]:
    """Seconds, cast bytes and element-wise bytes from the residual stream to q, k, v and back.

    Latents (arXiv:2412.19437, section 2.1.1) are made where the sequence is divided, since their
    matrices are on every tensor rank, then gathered and expanded to each rank's heads.
    """
    tensor = keys.tensor
    queries = (task.heads * task.head_dim + task.keys_values) / tensor
    merge, merge_cast = _product(
        task, rates, rows, task.hidden, task.heads * task.value_dim / tensor
    )
    direct, cast = _product(task, rates, rows, queries, task.hidden)
    smooth = 4 * rows * queries
    if np.any(task.latent):
        # rows without latents beside others have widths of 0, which the formula divides by
        both, ours, theirs = (
            np.maximum(width, 1.0) for width in (task.latent, task.query_rank, task.kv_rank)
        )
        heads, expanded = task.heads / tensor, task.head_dim - task.rope_dim + task.value_dim
        down, down_cast = _product(task, rates, rows / spread, both, task.hidden)
        query, query_cast = _product(task, rates, rows, heads * task.head_dim, ours)
        value, value_cast = _product(task, rates, rows, heads * expanded, theirs)
        latent = task.latent > 0
        direct = np.where(latent, down + query + value, direct)
        cast = np.where(latent, down_cast + query_cast + value_cast, cast)
        smooth = smooth + 4 * rows * task.latent / spread
    return direct + merge, cast + merge_cast, smooth


def block(task: Task, rates: Rates, shared: Shared, keys: Layouts) -> Block:
    """The block of every row of `keys`; of a Layouts it reads only what the module names."""
    rows = keys.micro_batch * task.sequence / keys.context
    tensor = keys.tensor
    spread = np.where(task.sequence_parallel > 0, tensor, 1.0)
    project, project_cast, rotated = _projections(task, rates, keys, rows, spread)
    mlp, mlp_cast, activation, exchange = _mlp(task, rates, keys, rows)
    matrix, cast = project + mlp, project_cast + mlp_cast
    attention, attention_backward = _attention(task, rates, shared, keys)
    # two norms and two residual sums over the hidden width, rotation of queries and keys
    smooth = rows * 20 * task.hidden / spread + rotated + activation
    element = (smooth * rates.traffic + cast) / rates.memory

    sent, beside = messages(task, keys), np.ones_like(tensor)
    reduce = 3 * gather_seconds(rates, sent.hidden, tensor, beside)
    reduce = reduce + gather_seconds(rates, sent.attention, tensor, beside)
    tensor_pass = reduce * rates.tensor_exposed
    ring = gather_seconds(rates, sent.context, keys.context, tensor)
    # the ring hides behind attention, except for the share that overlap costs
    context = np.maximum(ring - attention, 0.0) + rates.exposed * np.minimum(ring, attention)

    full, selective = keys.recompute == 2, keys.recompute == 1
    again_matrix = np.where(full, 1.0, np.where(selective, rates.selective_matrix, 0.0))
    again_attention = np.where(full, 1.0, np.where(selective, rates.selective_attention, 0.0))
    smooth_again = (rates.selective_matrix > 0) | (task.keeps_messages > 0)
    again_element = np.where(full | (selective & smooth_again), 1.0, 0.0)
    redo = again_matrix * matrix + again_attention * attention + again_element * element
    redo_wait = np.where(full, tensor_pass + context + exchange, 0.0)

    busy_forward = matrix + attention + element
    busy_backward = 2 * (matrix + element) + attention_backward
    # Megatron's fused softmax needs micro-batch · heads per rank to be a multiple of four; the
    # operations that stand in for it are launched one by one
    split = (task.flash == 0) & ((keys.micro_batch * task.heads / tensor) % 4 != 0)
    host = rates.host * (1 + shared.host_growth * (tensor > 1))
    host = host * np.where(split, shared.softmax_fallback, 1.0)
    forward = _floor(rates, busy_forward + tensor_pass + context + exchange, FORWARD_HOST * host)
    again = _floor(rates, redo + redo_wait, np.where(full, RECOMPUTE_HOST * host, 0.0))
    wait_backward = tensor_pass + 2 * context + exchange
    backward = _floor(rates, busy_backward + wait_backward, BACKWARD_HOST * host)
    times = passes(keys)
    return Block(
        forward=forward,
        backward=backward + again,
        compute=busy_forward + busy_backward + redo,
        tensor=times * tensor_pass,
        context=(times + 1) * context,
        expert=times * exchange,
        weight_gradient=matrix,
        head=_floor(rates, _head(task, rates, keys, rows), shared.head_host * rates.host),
    )


def _head(task: Task, rates: Rates, keys: Layouts, rows: Array) -> Array:
    """Logits forward and backward, always in 16 bits, and the float32 loss over them."""
    width = task.vocab / keys.tensor
    edge = rates.edge
    saturation = (1 + edge / rows) * (1 + edge / width) * (1 + edge / task.hidden)
    product = 2 * rows * width * task.hidden * saturation / rates.matrix_16
    return 3 * product + rows * width * task.loss_bytes * rates.loss_traffic / rates.memory


def _floor(rates: Rates, device: Array, host: Array) -> Array:
    """Power mean of device and host time: the larger, and a little more where they are close."""
    return (device**rates.join + host**rates.join) ** (1 / rates.join)
