"""A Layout applied to a decoder that knows nothing of parallelism: the one place where it happens.

Gradients are summed over data-parallel ranks, never averaged: the loss is divided by the number of
valid tokens of the whole global batch before backward, so the sum is the mean over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from ridgeline.layout.layout import Layout
from ridgeline.torch_compat import replicate


@dataclass(frozen=True)
class Mesh:
    """Who this process is: its device, and its place on the data axis of the device mesh."""

    devices: DeviceMesh
    device: torch.device
    rank: int
    data_rank: int
    data_size: int

    @property
    def data(self) -> DeviceMesh:
        """The data axis."""
        return self.devices["data"]


def make_mesh(layout: Layout, device: torch.device, rank: int) -> Mesh:
    """The device mesh of `layout`; needs an initialised process group of `layout.world` ranks."""
    devices = init_device_mesh(device.type, (layout.data,), mesh_dim_names=("data",))
    return Mesh(devices, device, rank, devices.get_local_rank("data"), layout.data)


def parallelize(model: nn.Module, layout: Layout, mesh: Mesh) -> None:
    """Apply `layout` to `model` in place: each block, then the rest, becomes a replicated unit.

    With bf16, parameters stay in float32 (the master weights), are cast once per step for the
    matrix products, and gradients are reduced in float32.
    """
    precision = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if layout.precision == "bf16"
        else MixedPrecisionPolicy()
    )
    blocks = getattr(model, "blocks", None)
    if isinstance(blocks, nn.ModuleDict):
        for block in blocks.values():
            replicate(block, mesh.data, precision)
    replicate(model, mesh.data, precision)
