"""What ranks say to each other: each collective call and send, by mesh axis and size.

PyTorch's collectives are operations like any other, so a dispatch mode sees them on every backend:
on gloo and NCCL, and on the group without partners that a rehearsal runs in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch.distributed as dist
from torch import ScriptObject, Tensor
from torch.utils._pytree import tree_leaves

from ridgeline.torch_compat import group_named
from ridgeline.train.parallelize import Mesh

MessageAxis = Literal["tensor", "context", "expert", "pipeline", "data", "world"]
Kind = Literal[
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send", "receive",
    "other",
]  # fmt: skip
KINDS: Final[Mapping[str, Kind]] = {
    "c10d::allreduce_": "all_reduce",
    "c10d::allreduce_coalesced_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::allgather_": "all_gather",
    "c10d::allgather_into_tensor_coalesced_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::reduce_scatter_": "reduce_scatter",
    "c10d::reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "c10d::alltoall_base_": "all_to_all",
    "c10d::broadcast_": "broadcast",
    "c10d::send": "send",
    "c10d::recv_": "receive",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_reduce_": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_to_all_single": "all_to_all",
    "_c10d_functional::broadcast": "broadcast",
}
AXES: Final[Mapping[str, MessageAxis]] = {
    "pipeline": "pipeline", "tensor": "tensor", "context": "context", "expert": "expert",
    "replicate": "data", "shard": "data", "expert_replicate": "data", "data": "data",
}  # fmt: skip
"""Axes of the meshes, as the ledger counts them: copies and shards are both data parallel."""
WITHIN_REPLICAS: Final = ("data", "context", "expert")
ONLY: Final[Mapping[str, MessageAxis]] = {
    "c10d::alltoall_base_": "expert",
    "_c10d_functional::all_to_all_single": "context",
    "c10d::send": "context",
    "c10d::recv_": "context",
}
"""The one of these axes that says so."""


@dataclass(frozen=True)
class Message:
    """One call: the whole of what is gathered, scattered, reduced or sent, in bytes."""

    axis: MessageAxis
    kind: Kind
    size_bytes: int
    ranks: int

    @property
    def sent_bytes(self) -> float:
        """What one rank of a ring sends: S(k-1)/k to gather, to scatter or to exchange S bytes
        over k ranks, twice that to reduce them everywhere (arXiv:1909.08053)."""
        if self.kind in ("send", "broadcast"):
            return float(self.size_bytes)
        if self.kind in ("receive", "other"):
            return 0.0
        part = self.size_bytes * (self.ranks - 1) / self.ranks
        return 2 * part if self.kind == "all_reduce" else part


def groups_of(mesh: Mesh) -> dict[str, MessageAxis]:
    """Which axis each process group is, by the group's name.

    A group of all ranks is "world", unless one axis has them all: PyTorch then has one group for
    both.
    """
    names: dict[str, MessageAxis] = {dist.group.WORLD.group_name: "world"}  # type: ignore[union-attr]
    for devices in (mesh.sequences, mesh.experts, mesh.devices):
        if devices is not None:
            for name in devices.mesh_dim_names or ():
                if devices[name].size() > 1:
                    names[devices[name].get_group().group_name] = AXES[name]
    return names


def message_of(
    operation: Any, arguments: tuple[Any, ...], groups: Mapping[str, MessageAxis]
) -> Message | None:
    """The message that an operation is, as a dispatch mode sees it.

    None: it is none, or goes over a group that is no axis (what hosts agree on beside a step).
    """
    name = operation.name().partition(".")[0] if hasattr(operation, "name") else ""
    kind = KINDS.get(name)
    if kind is None:
        if name.startswith("c10d::") and name not in ("c10d::barrier", "c10d::monitored_barrier_"):
            return Message("world", "other", 0, 1)
        return None
    group = _group(arguments)
    if group.group_name not in groups:
        return None
    tensors = [_bytes(each) for each in arguments if _has_tensors(each)]
    # Base calls give (output, input): the larger one is the whole of what is gathered or scattered.
    whole = max(tensors)
    if name == "_c10d_functional::all_gather_into_tensor":
        whole *= group.size()
    axis = groups[group.group_name]
    if axis in WITHIN_REPLICAS:  # where these axes have the same ranks, they have one group
        axis = ONLY.get(name, axis)
    return Message(axis, kind, whole, group.size())


def _group(arguments: tuple[Any, ...]) -> dist.ProcessGroup:
    for each in reversed(arguments):
        if isinstance(each, str):
            return group_named(each)  # type: ignore[arg-type]
        if isinstance(each, dist.ProcessGroup):
            return each
        if isinstance(each, ScriptObject):
            try:
                return dist.ProcessGroup.unbox(each)
            except (RuntimeError, TypeError):
                continue  # a reduction's name, boxed alike
    raise AssertionError(f"no process group in {arguments}")


def _has_tensors(argument: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(argument))


def _bytes(argument: Any) -> int:
    leaves = (leaf for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)
