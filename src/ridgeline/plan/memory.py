"""Memory of one device by component: the worst of the first and the last pipeline stage.

States by ZeRO stage as design and arXiv:1910.02054 have them; activations as the list of tensors
that each operation saves (arXiv:2205.05198, section 4, whose 34·s·b·h and 5·a·s/h it reproduces);
micro-batches in flight by schedule (arXiv:2104.04473, 2205.05198 section 4.2.3 and 2401.10241).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ridgeline.plan.program import Program
from ridgeline.plan.program_stages import stage_peaks
from ridgeline.plan.quantities import (
    LOSS_CHUNK_TOKENS,
    SCHEDULES,
    Array,
    Layouts,
    Rates,
    Table,
    Task,
)
from ridgeline.plan.step import embedding_parameters, layer_parameters, shard_groups

COMPONENTS = ("weights", "gradients", "optimizer", "activations", "temporary")
FRAMEWORK_BYTES = 2.0 * 2**30
"""Device context, communicators and libraries, which no allocator reports (assumed); a CPU has
none of its own, and what Python and its libraries take is there before a run is."""
FRAGMENTATION = 0.03
"""Share of the rest that the allocator holds without use (assumed)."""


@dataclass(frozen=True)
class Memory(Table):
    """Bytes on one device; they add up to `total`."""

    weights: Array
    gradients: Array
    optimizer: Array
    activations: Array
    temporary: Array
    """Gathered layers, logits, one layer's backward pass."""
    framework: Array
    total: Array


def memory(task: Task, rates: Rates, layouts: Layouts) -> Memory:
    """The memory of every row."""
    chunks, pipeline = layouts.interleave, layouts.pipeline
    layers = np.ceil(task.layers / (pipeline * chunks)) * chunks
    common, routed = layer_parameters(task, layouts.tensor, layouts.expert)
    embedding = task.vocab * task.hidden / layouts.tensor
    everywhere = layers * common + embedding_parameters(task, layouts)
    biggest = np.maximum(common + routed, embedding)

    kept, live = layer_activations(task, rates, layouts)
    micro_batches = task.global_batch / (layouts.data * layouts.micro_batch)
    first = kept * layers / chunks * in_flight(layouts, micro_batches)
    last = kept * layers / chunks * in_flight(layouts, micro_batches, pipeline - 1)
    logits = _logits(task, layouts)
    last = last + _halves(task, layouts) * layers / chunks
    # logits are gone before the last stage's backward pass needs its largest layer
    at_last = last + np.maximum(logits, live)
    at_first = first + live + _whole_gradient(task, layouts)
    worst = np.maximum(at_first, at_last)
    activations = np.where(at_first >= at_last, first, last)
    held = (everywhere, layers * routed)
    return _added_up(task, layouts, held, biggest, activations, worst - activations)


def _added_up(
    task: Task,
    layouts: Layouts,
    held: tuple[Array, Array],
    biggest: Array,
    activations: Array,
    working: Array,
) -> Memory:
    """All components: of the parameters `held` by all replicas and of experts, which fewer hold.

    `biggest`: parameters of the largest unit; `working`: bytes of a backward pass.
    """
    zero = layouts.zero
    parameters = held[0] + held[1]
    weights = parameters * np.where(zero == 3, 0.0, task.weight_bytes)

    def sharded(stage: int) -> Array:
        group, fewer = shard_groups(layouts)
        ours = held[0] / np.where(zero >= stage, group, 1.0)
        if not np.any(task.experts):
            return ours
        return ours + held[1] / np.where(zero >= stage, fewer, 1.0)

    gradients = sharded(2) * task.gradient_bytes
    optimizer = sharded(1) * task.master_bytes
    # ZeRO-3 has two layers gathered at a time; ZeRO-2 and -3 one layer's gradients still whole
    gathered = np.where(zero == 3, 2 * biggest * task.weight_bytes, 0.0)
    gathered = gathered + np.where(zero >= 2, biggest * task.gradient_bytes, 0.0)
    temporary = gathered + working
    used = weights + gradients + optimizer + activations + temporary
    framework = framework_bytes(used)
    return Memory(
        weights, gradients, optimizer, activations, temporary, framework, used + framework
    )


def framework_bytes(used: Array, cpu: bool = False) -> Array:
    """What no tensor accounts for, where tensors take `used` bytes of a device or of a `cpu`."""
    return (0.0 if cpu else FRAMEWORK_BYTES) + FRAGMENTATION * used


def _whole_gradient(task: Task, layouts: Layouts) -> Array:
    """What the embedding's gradient adds to its share where no backward pass divides it.

    DTensor has no vocabulary-parallel gradient of an embedding, and FSDP2 keeps what it
    accumulates over micro-batches as it came, until it reduces once.
    """
    if not np.any(task.whole_gradient):
        return np.zeros_like(layouts.tensor)
    parameters = task.vocab * task.hidden * (1 - 1 / layouts.tensor)
    return np.where(layouts.zero < 2, parameters * task.whole_gradient, 0.0)


def _halves(task: Task, layouts: Layouts) -> Array:
    """Bytes per layer of gradients that wait for the weights' half of a split backward pass.

    On the last stage, of all micro-batches in flight but one, where the schedule postpones most.
    """
    late = (layouts.schedule == SCHEDULES.index("zbh1")) | (
        layouts.schedule == SCHEDULES.index("zbv")
    )
    rows = layouts.micro_batch * task.sequence / layouts.context
    inner = (task.mlp_matrices - 1) * (1 - task.expert_layers) * task.ffn / layouts.tensor
    queries = (task.heads * task.head_dim + task.keys_values) / layouts.tensor
    hidden = (2 + 2 / layouts.tensor) * task.hidden
    each = task.activation_bytes * rows * (inner + queries + hidden)
    waiting = in_flight(layouts, task.global_batch / (layouts.data * layouts.micro_batch)) - 1
    return np.where(late, task.keeps_messages * each * waiting, 0.0)


def _logits(task: Task, layouts: Layouts) -> Array:
    """Bytes of a micro-batch's logits and loss at their peak."""
    rows = layouts.micro_batch * task.sequence / layouts.context
    chunk = np.minimum(rows, LOSS_CHUNK_TOKENS)
    wide = rows * task.logit_bytes + chunk * task.chunk_logit_bytes
    return wide * task.vocab / layouts.tensor


def layer_activations(task: Task, rates: Rates, layouts: Layouts) -> tuple[Array, Array]:
    """Bytes that one layer keeps per micro-batch, and those its backward pass needs at once."""
    rows = layouts.micro_batch * task.sequence / layouts.context
    tensor = layouts.tensor
    spread = np.where(task.sequence_parallel > 0, tensor, 1.0)
    gates = task.mlp_matrices - 1
    size = task.activation_bytes
    hidden = size * rows * task.hidden / spread
    queries = size * rows * (task.heads * task.head_dim + task.keys_values) / tensor
    # latents before and after their norms; the rotated key has none
    queries = queries + size * rows * (task.latent + task.query_rank + task.kv_rank) / spread
    out = size * rows * task.heads * task.value_dim / tensor
    scores = rows * task.sequence * task.heads / tensor
    plain = np.where(task.flash > 0, 4 * rows * task.heads / tensor, 5 * scores)
    masks = task.dropout * rows * task.hidden / spread * 2
    experts = task.expert_layers
    width = (1 - experts) * task.ffn / tensor + experts * (
        task.top_k + task.shared_experts
    ) * task.expert_ffn / tensor
    inner = size * rows * width
    # norm in and out twice, queries to values, attention out, up (and gate), activation out
    whole = 4 * hidden + queries + out + plain + masks + (gates + 1) * inner
    # gathered, the norms' outputs are as long as the sequence; unfused, a gate's activation is kept
    # beside its product; visits and their results, and the router's float32 copy of its input
    visits = 2 * task.top_k * hidden + 4 * rows * task.hidden / spread - hidden
    more = 2 * hidden * (spread - 1) + (gates - 1) * inner + experts * visits
    whole = whole + task.keeps_messages * more
    megatron = whole - np.where(task.flash > 0, 0.0, plain)
    # every other product's output and attention's are kept, the rest is computed again
    by_product = hidden + out + 0.5 * (queries + 2 * hidden + gates * inner)
    selective = np.where(rates.selective_matrix > 0, by_product, megatron)
    # the block's input and every product, those summed over tensor ranks also before they are, and
    # the gathered sequence
    messages = np.where(tensor > 1, 4 * hidden * spread, 0.0)
    dense = (1 - experts) * size * rows * task.ffn / tensor
    every = 3 * hidden + queries + gates * dense + messages
    selective = np.where(task.keeps_messages > 0, every, selective)
    kept = np.where(
        layouts.recompute == 2, hidden, np.where(layouts.recompute == 1, selective, whole)
    )
    again = np.maximum(whole - kept, 0.0)
    return kept, again + 2 * gates * inner + 2 * hidden


def in_flight(layouts: Layouts, micro_batches: Array, rank: Array | float = 0.0) -> Array:
    """Chunks of a micro-batch that a pipeline rank holds at once, at most.

    1F1B: min(m, p - i), interleaved (v - 1)·p + 2·(p - i - 1) + 1 (arXiv:2104.04473). Zero-bubble
    schedules keep as much on every rank as on the first, GPipe all there is.
    """
    every = micro_batches * layouts.interleave
    one_by_one = layouts.schedule == SCHEDULES.index("1f1b")
    less = np.where(one_by_one, rank * np.minimum(layouts.interleave, 2), 0.0)
    warm = np.minimum(every, _warm(layouts) - less)
    return np.where(layouts.schedule == SCHEDULES.index("gpipe"), every, warm)


def _warm(layouts: Layouts) -> Array:
    """Chunks in flight on the first rank once the pipeline is full."""
    pipeline, chunks, code = layouts.pipeline, layouts.interleave, layouts.schedule
    warm = np.where(chunks > 1, pipeline * chunks + pipeline - 1, pipeline)
    warm = np.where(code == SCHEDULES.index("zbv"), 2 * pipeline, warm)
    return np.where(code == SCHEDULES.index("dualpipev"), 2 * pipeline + 1, warm)


def program_stages(program: Program, cpu: bool) -> Memory:
    """The memory of every pipeline stage of one layout, as our own program fills it."""
    peaks = stage_peaks(program)
    parts = [np.array([float(peak[name]) for peak in peaks]) for name in COMPONENTS]
    used: Array = np.sum(parts, axis=0)
    framework = framework_bytes(used, cpu)
    return Memory(
        **dict(zip(COMPONENTS, parts, strict=True)), framework=framework, total=used + framework
    )


def stage_memory(task: Task, rates: Rates, layout: Layouts) -> Memory:
    """The memory of every pipeline stage of one layout, first to last.

    `memory` is that of the fullest one, with the layers of the longest stage wherever it stands.
    """
    stages = int(layout.pipeline[0])
    index = np.arange(float(stages))
    one = layout.take(np.zeros(stages, dtype=np.intp))
    chunks, pipeline = one.interleave, one.pipeline
    even = np.floor(task.layers / (pipeline * chunks)) * chunks
    # what does not divide goes to the first stages, a layer each
    layers = even + np.clip(task.layers - even * pipeline - index * chunks, 0, chunks)
    folded = one.schedule >= SCHEDULES.index("zbv")
    first, last = index == 0, np.where(folded, index == 0, index == stages - 1)
    common, routed = layer_parameters(task, one.tensor, one.expert)
    embedding = task.vocab * task.hidden / one.tensor
    most = embedding_parameters(task, one) / embedding
    copies = np.where(first & last, most, np.where(first | last, 1.0, 0.0))
    held = (layers * common + copies * embedding, layers * routed)
    biggest = np.where(copies > 0, np.maximum(common + routed, embedding), common + routed)
    micro_batches = task.global_batch / (one.data * one.micro_batch)
    ahead = in_flight(one, micro_batches, index)
    kept, live = layer_activations(task, rates, one)
    activations = kept * layers / chunks * ahead
    logits = np.where(last, _logits(task, one), 0.0)
    working = np.maximum(logits, live) + np.where(first, _whole_gradient(task, one), 0.0)
    return _added_up(task, one, held, biggest, activations, working)
