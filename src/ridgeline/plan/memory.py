"""Memory of one device by component: the worst of the first and the last pipeline stage.

States by ZeRO stage as design and arXiv:1910.02054 have them; activations as the list of tensors
that each operation saves (arXiv:2205.05198, section 4, whose 34·s·b·h and 5·a·s/h it reproduces);
micro-batches in flight by schedule (arXiv:2104.04473, 2205.05198 section 4.2.3 and 2401.10241).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ridgeline.plan.quantities import SCHEDULES, Array, Layouts, Rates, Table, Task
from ridgeline.plan.step import layer_parameters

FRAMEWORK_BYTES = 2.0 * 2**30
"""Device context, communicators and libraries, which no allocator reports (assumed)."""
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
    alone = np.where((pipeline == 1) & (task.tied == 0), 2.0, 1.0)
    parameters = layers * (common + routed) + alone * embedding
    biggest = np.maximum(common + routed, embedding)

    zero, group = layouts.zero, layouts.shard_group
    weights = parameters * np.where(zero == 3, 0.0, task.weight_bytes)
    gradients = parameters * task.gradient_bytes / np.where(zero >= 2, group, 1.0)
    optimizer = parameters * task.master_bytes / np.where(zero >= 1, group, 1.0)
    # ZeRO-3 has two layers gathered at a time; ZeRO-2 and -3 one layer's gradients still whole
    gathered = np.where(zero == 3, 2 * biggest * task.weight_bytes, 0.0)
    gathered = gathered + np.where(zero >= 2, biggest * task.gradient_bytes, 0.0)

    kept, live = layer_activations(task, rates, layouts)
    micro_batches = task.global_batch / (layouts.data * layouts.micro_batch)
    first = kept * layers / chunks * in_flight(layouts, micro_batches)
    last = kept * layers / chunks * np.where(pipeline == 1, 1.0, chunks)
    rows = layouts.micro_batch * task.sequence / layouts.context
    logits = rows * task.vocab / layouts.tensor * task.logit_bytes
    # logits are gone before the last stage's backward pass needs its largest layer
    at_last = last + np.maximum(logits, live)
    at_first = first + np.where(pipeline == 1, np.maximum(logits, live), live)
    worst = np.maximum(at_first, at_last)
    activations = np.where(at_first >= at_last, first, last)
    temporary = gathered + worst - activations
    used = weights + gradients + optimizer + activations + temporary
    framework = np.full_like(used, FRAMEWORK_BYTES) + FRAGMENTATION * used
    return Memory(
        weights, gradients, optimizer, activations, temporary, framework, used + framework
    )


def layer_activations(task: Task, rates: Rates, layouts: Layouts) -> tuple[Array, Array]:
    """Bytes that one layer keeps per micro-batch, and those its backward pass needs at once."""
    rows = layouts.micro_batch * task.sequence / layouts.context
    tensor = layouts.tensor
    spread = np.where(task.sequence_parallel > 0, tensor, 1.0)
    gates = task.mlp_matrices - 1
    hidden = 2 * rows * task.hidden / spread
    queries = 2 * rows * (task.heads + 2 * task.kv_heads) * task.head_dim / tensor
    out = 2 * rows * task.heads * task.head_dim / tensor
    scores = rows * task.sequence * task.heads / tensor
    plain = np.where(task.flash > 0, 4 * rows * task.heads / tensor, 5 * scores)
    masks = task.dropout * rows * task.hidden / spread * 2
    experts = np.where(task.experts > 0, 1 - task.dense_layers / task.layers, 0.0)
    width = (1 - experts) * task.ffn / tensor + experts * (
        task.top_k + task.shared_experts
    ) * task.expert_ffn / tensor
    inner = 2 * rows * width
    # norm in and out twice, queries to values, attention out, up (and gate), activation out
    whole = 4 * hidden + queries + out + plain + masks + (gates + 1) * inner
    megatron = whole - np.where(task.flash > 0, 0.0, plain)
    # every other product's output and attention's are kept, the rest is computed again
    by_product = hidden + out + 0.5 * (queries + 2 * hidden + gates * inner)
    selective = np.where(rates.selective_matrix > 0, by_product, megatron)
    kept = np.where(
        layouts.recompute == 2, hidden, np.where(layouts.recompute == 1, selective, whole)
    )
    again = whole - kept
    return kept, again + 2 * gates * inner + 2 * hidden


def in_flight(layouts: Layouts, micro_batches: Array) -> Array:
    """Chunks of a micro-batch that the first rank holds at once."""
    pipeline, chunks, code = layouts.pipeline, layouts.interleave, layouts.schedule
    warm = np.where(chunks > 1, pipeline * chunks + pipeline - 1, pipeline)
    warm = np.where(code == SCHEDULES.index("zbv"), 2 * pipeline, warm)
    warm = np.where(code == SCHEDULES.index("dualpipev"), 2 * pipeline + 1, warm)
    eager = code == SCHEDULES.index("gpipe")
    return np.where(eager, micro_batches * chunks, np.minimum(micro_batches * chunks, warm))
