"""What the physics is computed from: structs of numbers or arrays that broadcast together.

The same functions price a million layouts of one model (`Layouts` of arrays, the rest scalars) and
a thousand published runs of different models, devices and stacks (everything arrays). Units are
bytes, seconds, FLOP/s and bytes per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self, get_args

import numpy as np
from numpy.typing import NDArray

from ridgeline.layout.layout import Layout, Recompute, Schedule
from ridgeline.model.shape import ModelShape

Array = NDArray[np.float64]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
RECOMPUTES: tuple[str, ...] = get_args(Recompute)
FUSED_LOSS_BYTES = 12
"""Traffic per logit of a fused loss: 16-bit logits and their gradient, a float32 copy (assumed)."""

LOSS_CHUNK_TOKENS = 2048
"""Tokens whose logits our loss has in float32 at one time."""


@dataclass(frozen=True)
class Table:
    """A struct of arrays; `take` picks rows of every field that has rows."""

    def take(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Self:
        """The same struct for some rows; scalars stay scalars."""
        picked = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{k: v[rows] if np.ndim(v) else v for k, v in picked.items()})


@dataclass(frozen=True)
class Layouts(Table):
    """Many layouts: each field as in `layout.Layout`, schedule and recompute as their index."""

    data: Array
    context: Array
    tensor: Array
    pipeline: Array
    expert: Array
    micro_batch: Array
    interleave: Array
    schedule: Array
    """Index into SCHEDULES."""
    zero: Array
    shard_group: Array
    """Ranks a ZeRO shard spans, never 0: data·context where a Layout says 0."""
    recompute: Array
    """Index into RECOMPUTES."""

    @property
    def count(self) -> int:
        """How many layouts."""
        return int(np.size(self.data))

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> Layouts:
        """The struct for a list of layouts."""
        rows = [
            (
                each.data, each.context, each.tensor, each.pipeline, each.expert,
                each.micro_batch, each.interleave, SCHEDULES.index(each.schedule), each.zero,
                each.shard_group or each.data * each.context, RECOMPUTES.index(each.recompute),
            )
            for each in layouts
        ]  # fmt: skip
        columns = np.array(rows, dtype=np.float64).T
        return cls(*columns)

    def layout(self, row: int, precision: str) -> Layout:
        """Row `row` as a Layout."""
        replicas = int(self.data[row] * self.context[row])
        zero, group = int(self.zero[row]), int(self.shard_group[row])
        return Layout.model_validate(
            {
                "data": int(self.data[row]),
                "context": int(self.context[row]),
                "tensor": int(self.tensor[row]),
                "pipeline": int(self.pipeline[row]),
                "expert": int(self.expert[row]),
                "micro_batch": int(self.micro_batch[row]),
                "interleave": int(self.interleave[row]),
                "schedule": SCHEDULES[int(self.schedule[row])],
                "zero": zero,
                "shard_group": 0 if zero == 0 or group == replicas else group,
                "recompute": RECOMPUTES[int(self.recompute[row])],
                "precision": precision,
            }
        )


@dataclass(frozen=True)
class Task(Table):
    """What is trained, and by which kind of program."""

    layers: Array
    hidden: Array
    heads: Array
    kv_heads: Array
    head_dim: Array
    """Width of one query and one key."""
    value_dim: Array
    """Width of one value."""
    query_rank: Array
    """Width of the queries' latent; 0: attention is not latent."""
    kv_rank: Array
    """Width of the latent of keys and values; 0: attention is not latent."""
    rope_dim: Array
    """Width of the rotated key that all heads of latent attention share; 0: not latent."""
    ffn: Array
    """Inner width of the MLP that a dense layer has."""
    mlp_matrices: Array
    """2, or 3 where the MLP is gated."""
    vocab: Array
    tied: Array
    """1 where the head is the embedding's weight."""
    experts: Array
    """Routed experts per layer; 0: dense."""
    top_k: Array
    expert_ffn: Array
    shared_experts: Array
    dense_layers: Array
    """Layers with an ordinary MLP; all of them in a dense model."""
    sequence: Array
    global_batch: Array
    flash: Array
    """1 where attention is one fused kernel that never writes the scores."""
    sequence_parallel: Array
    """1 where norms and residuals are divided over the tensor ranks too."""
    dropout: Array
    """1 where dropout masks are kept, as GPT-3's kin do."""
    master_bytes: Array
    """Bytes per parameter of master weight and moments that ZeRO-1 shards."""
    weight_bytes: Array
    """Bytes per parameter of the weights that the matrix products read."""
    gradient_bytes: Array
    """Bytes per parameter of kept gradients."""
    reduce_bytes: Array
    """Bytes per parameter that cross the network when gradients are reduced."""
    activation_bytes: Array
    """Bytes per element of what a layer keeps for its backward pass."""
    keeps_messages: Array
    """1 where layers keep the sequence that they gather over tensor ranks, as DTensor's do, and
    selective recomputation keeps every product and message and computes the rest again."""
    logit_bytes: Array
    """Memory per logit: 16 bits, a float32 copy, its gradient, and what an unfused loss adds."""
    chunk_logit_bytes: Array
    """Memory per logit of LOSS_CHUNK_TOKENS tokens, where the loss goes through them in turn."""
    loss_bytes: Array
    """Memory traffic per logit of the loss, forward and backward."""
    whole_gradient: Array
    """Bytes per parameter of the embedding's gradient that each tensor rank accumulates whole; 0
    where it is divided as the embedding is."""

    @property
    def expert_layers(self) -> Array:
        """Share of the layers that hold experts."""
        return np.where(self.experts > 0, 1 - self.dense_layers / self.layers, 0.0)

    @property
    def keys_values(self) -> Array:
        """Width of all keys and values of a token."""
        return self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def latent(self) -> Array:
        """Width of all latents of a token, the shared rotated key among them."""
        return self.query_rank + self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class Rates(Table):
    """Effective rates of a machine under a software stack: catalogue times calibration."""

    peak: Array
    """Peak in the precision of the run, FLOP/s: what MFU is measured against."""
    matrix: Array
    """FLOP/s of large matrix products in the precision of the run."""
    matrix_16: Array
    """FLOP/s of large matrix products in 16 bits."""
    cast: Array
    """Bytes per element that conversion to a narrower precision costs; 0 for 16 bits."""
    edge: Array
    """Width at which a matrix product has half its rate."""
    attention: Array
    """FLOP/s of the fused attention kernel at head width 128."""
    memory: Array
    """Bytes per second of element-wise work."""
    near_ranks: Array
    near: Array
    """Bytes per second within `near_ranks` neighbours."""
    node_ranks: Array
    link: Array
    """Bytes per second per device within a node."""
    port: Array
    """Bytes per second of a device's share of the node's ports."""
    pod_ranks: Array
    oversubscription: Array
    link_latency: Array
    port_latency: Array
    host: Array
    """Seconds that the host needs to launch a layer's forward, recompute and backward."""
    traffic: Array
    """Memory traffic of element-wise work over that of perfectly fused work."""
    exposed: Array
    """Share of overlapped data-parallel communication that is paid all the same."""
    tensor_exposed: Array
    """Share of tensor-parallel communication that compute does not hide."""
    gather: Array
    """Share of the network's rate that ZeRO-3's gathers reach."""
    join: Array
    """Exponent of the power mean that joins device and host time; 1 where they are one."""
    loss_traffic: Array
    """Multiple of the loss's bytes that move through memory."""
    update: Array
    """Seconds of the optimizer per parameter that a rank updates."""
    selective_matrix: Array
    """Share of matrix work that `selective` recomputes."""
    selective_attention: Array
    """Share of attention that `selective` recomputes."""


def program_memory(stack: str, precision: str) -> dict[str, float]:
    """Fields of a Task that say what memory a program of `stack` takes beside the usual.

    Ridgeline's, measured by `tests/train/test_memory.py`: FSDP2 gathers parameters into a copy even
    in fp32 training, beside the master weights and moments, and even where one rank has all of
    them. Logits and their gradient stay in the precision of the products; the loss has a float32
    copy of LOSS_CHUNK_TOKENS tokens at a time, its softmax, and that of those before.
    """
    if stack != "ridgeline":
        return {"activation_bytes": 2.0, "keeps_messages": 0.0, "chunk_logit_bytes": 0.0}
    size = 4.0 if precision == "fp32" else 2.0
    return {
        "master_bytes": 12.0,
        "activation_bytes": size,
        "keeps_messages": 1.0,
        "logit_bytes": 2 * size,
        "chunk_logit_bytes": 8.0 if precision == "fp32" else 12.0,
    }


def task_of(
    shape: ModelShape, sequence: int, global_batch: int, *, precision: str = "bf16"
) -> Task:
    """The Task of one model as Ridgeline trains it (bf16 over float32 master weights).

    Gradients are float32 and reduced so.
    """
    experts, latent = shape.experts, shape.latent_attention
    dense = shape.layers if experts is None else experts.first_dense_layers
    wide = precision == "fp32"
    numbers = {
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "value_dim": latent.value_head_dim if latent else shape.head_dim,
        "query_rank": latent.query_rank if latent else 0,
        "kv_rank": latent.kv_rank if latent else 0,
        "rope_dim": latent.rope_head_dim if latent else 0,
        "ffn": shape.ffn_hidden,
        "mlp_matrices": 3 if shape.activation == "swiglu" else 2,
        "vocab": shape.vocab,
        "tied": shape.tied,
        "experts": experts.count if experts else 0,
        "top_k": experts.top_k if experts else 0,
        "expert_ffn": experts.ffn_hidden if experts else 0,
        "shared_experts": experts.shared if experts else 0,
        "dense_layers": dense,
        "sequence": sequence,
        "global_batch": global_batch,
        "flash": 1,
        "sequence_parallel": 1,
        "dropout": 0,
        "weight_bytes": 4 if wide else 2,
        "gradient_bytes": 4,
        "reduce_bytes": 4,
        "loss_bytes": FUSED_LOSS_BYTES,
        "whole_gradient": 0,
    }
    told = numbers | program_memory("ridgeline", precision)
    return Task(**{name: np.float64(value) for name, value in told.items()})  # type: ignore[arg-type]
