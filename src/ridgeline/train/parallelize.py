"""A Layout applied to a decoder that knows nothing of parallelism: the one place where it happens.

Gradients are summed over ranks, never averaged: the loss is divided by the number of valid tokens
of the whole global batch before backward, so the sum is the mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from ridgeline.layout.context import kind_of, positions_of
from ridgeline.layout.grid import RankGrid, expert_sizes, shard_sizes
from ridgeline.layout.layout import Axis, Layout
from ridgeline.layout.stages import Chunk
from ridgeline.model.shape import ModelShape
from ridgeline.torch_compat import replicate, selective_contexts, shard
from ridgeline.train.experts import count_whole_sequences, divide_experts, mixtures
from ridgeline.train.float8 import to_float8
from ridgeline.train.tensor import divide_tensors

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""What weights are cast to for the matrix products; in every other precision they stay float32."""


@dataclass(frozen=True)
class Mesh:
    """Who this process is, and whom it shares each axis with."""

    layout: Layout
    device: torch.device
    rank: int
    devices: DeviceMesh
    """All ranks: pipeline, replicate, shard, tensor. Copies and shards are data·context."""
    sequences: DeviceMesh | None
    """All ranks: pipeline, data, context, tensor; None where no sequence is divided."""
    experts: DeviceMesh | None
    """All ranks: pipeline, replicas of an expert, expert, tensor; None without expert parallel."""

    @cached_property
    def place(self) -> dict[Axis, int]:
        """Where this rank sits on each axis."""
        return RankGrid(self.layout).place(self.rank)

    def sum_over_replicas(self, value: Tensor, *, tensor: bool = False) -> Tensor:
        """`value` summed in place over data and context ranks, and over tensor ranks if asked."""
        for axis in ("shard", "replicate", "tensor")[: 3 if tensor else 2]:
            if self.devices[axis].size() > 1:
                dist.all_reduce(value, group=self.devices[axis].get_group())
        return value

    @property
    def shards(self) -> DeviceMesh:
        """The axis over which ZeRO shards, behind that over which it copies where there are two."""
        if self.devices["replicate"].size() == 1:
            return self.devices["shard"]
        return self.devices["replicate", "shard"]

    @property
    def sequence_groups(self) -> list[dist.ProcessGroup]:
        """Groups that together hold whole sequences: context, then tensor, where they are two."""
        axes = [self.devices["tensor"]]
        if self.sequences is not None:
            axes.append(self.sequences["context"])
        return [axis.get_group() for axis in axes if axis.size() > 1]

    def positions(self, shape: ModelShape, sequence: int) -> Tensor:
        """Where in the sequence this rank's tokens stand, int64 (L,)."""
        mine = positions_of(self.layout, shape, sequence, self.place["context"])
        return torch.tensor([position for part in mine for position in part], device=self.device)


def make_mesh(layout: Layout, device: torch.device, rank: int) -> Mesh:
    """The meshes of `layout`; needs an initialised process group of `layout.world` ranks."""
    pipeline, tensor = layout.pipeline, layout.tensor
    ranks = torch.tensor(RankGrid(layout).ranks()).view(pipeline, -1, tensor)
    # A process group numbers its members by rank: an axis made of data and context follows that,
    # or, where context ranks are the outer ones, a shard's place on the axis is not its member's.
    by_rank = ranks.sort(dim=1).values

    def mesh(of: torch.Tensor, middle: tuple[int, int], names: tuple[str, str]) -> DeviceMesh:
        grid = of.reshape(pipeline, *middle, tensor)
        return DeviceMesh(device.type, grid, mesh_dim_names=("pipeline", *names, "tensor"))

    devices = mesh(by_rank, shard_sizes(layout), ("replicate", "shard"))
    sequences = experts = None
    if layout.context > 1:
        sequences = mesh(ranks, (layout.data, layout.context), ("data", "context"))
    if layout.expert > 1:
        experts = mesh(by_rank, expert_sizes(layout), ("expert_replicate", "expert"))
    return Mesh(layout, device, rank, devices, sequences, experts)


def cut(model: nn.Module, chunk: Chunk) -> None:
    """Take from a whole decoder, in place, what does not lie in `chunk`; names stay."""
    blocks = model.blocks
    assert isinstance(blocks, nn.ModuleDict)
    for layer in list(blocks):
        if int(layer) not in chunk.layers:
            del blocks[layer]
    absent = () if chunk.first else ("embedding", "positions")
    for name in absent if chunk.last else (*absent, "norm", "head"):
        setattr(model, name, None)


def parallelize(model: nn.Module, shape: ModelShape, mesh: Mesh) -> None:
    """Apply the mesh's layout to `model`, a decoder or a chunk of one, in place.

    In this order: the sequence over context ranks, experts over theirs, weights over tensor ranks,
    products in 8 bits, recomputation, compilation, and each block, then the rest, over data ranks.
    With 16 bits, parameters stay in float32 (the master weights), are cast for the matrix products,
    and gradients are reduced in float32.
    """
    layout = mesh.layout
    parts = getattr(model, "blocks", None)
    blocks = list(parts.values()) if isinstance(parts, nn.ModuleDict) else []
    if mesh.sequences is not None:
        from ridgeline.train.context import ContextAttention  # it loads the compiler

        group = mesh.sequences["context"].get_group()
        attend = ContextAttention(group, kind_of(layout, shape))
        for module in model.modules():
            if hasattr(module, "mix"):
                module.mix = attend  # type: ignore[assignment]
    if shape.experts is not None:
        count_whole_sequences(model, mesh.sequence_groups)
        if mesh.experts is not None:
            divide_experts(model, mesh.experts)
    if layout.tensor > 1:
        divide_tensors(model, mesh.devices["tensor"])
    for block in blocks:
        if layout.precision == "fp8":
            to_float8(block, mesh.device)
        if layout.recompute != "none":
            block.forward = partial(_recomputing, layout.recompute, block.forward)
        if layout.compile:
            block.compile()
    precision = MixedPrecisionPolicy()
    if dtype := PRECISIONS.get(layout.precision):
        precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if mesh.experts is not None:
        for mixture in mixtures([model]):
            axis = mesh.experts["expert_replicate"]
            _over_data(mixture.experts, layout.zero, axis, axis, precision)
    for unit in (*blocks, model):
        _over_data(unit, layout.zero, mesh.devices["replicate"], mesh.shards, precision)


def _over_data(
    unit: nn.Module, zero: int, copies: DeviceMesh, shards: DeviceMesh, precision: Any
) -> None:
    """Replicate one unit's parameters over `copies`, or shard them over `shards`."""
    if zero == 0:
        replicate(unit, copies, precision)
    else:
        shard(unit, shards, precision, reshard=zero == 3)


def _recomputing(kind: str, forward: Any, *arguments: Any) -> Any:
    """A block's forward pass that backward does again: all of it, or what is not a product."""
    if kind == "full":
        return checkpoint(forward, *arguments, use_reentrant=False)
    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=selective_contexts)
