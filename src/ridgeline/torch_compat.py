"""Every private or version-bound PyTorch import, each with the versions it was tested on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# In-process store of a one-member group, and the store behind env://; re-exported by
# torch.distributed only conditionally. Tested on 2.13.0.
from torch._C._distributed_c10d import HashStore, TCPStore

# FSDP2's replicate: DDP semantics on FSDP2's engine, with its mixed precision. Private path.
# Tested on 2.13.0.
from torch.distributed._composable.replicate_with_fsdp import replicate as _replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.overrides import TorchFunctionMode

__all__ = [
    "HashStore",
    "TCPStore",
    "Unfilled",
    "drop_gathered",
    "multiplies_bf16",
    "name_of",
    "peak_memory_bytes",
    "replicate",
    "set_gradient_sync",
]


def replicate(module: nn.Module, mesh: DeviceMesh, precision: MixedPrecisionPolicy) -> None:
    """Replicate `module` over the one-dimensional `mesh`; gradients are summed, not averaged."""
    replicated: Any = _replicate(module, mesh=mesh, mp_policy=precision)
    replicated.set_gradient_divide_factor(1.0)


def set_gradient_sync(module: nn.Module, on: bool) -> None:
    """Whether the next backward reduces gradients over data-parallel ranks or only accumulates."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)


def drop_gathered(module: nn.Module) -> None:
    """Drop the copies of parameters that a forward pass without backward leaves behind.

    They would hide the float32 parameters from a checkpoint, and be stale after the next update.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


class Unfilled(TorchFunctionMode):
    """While it is active, modules are built without their default values.

    On the meta device those go nowhere, and the first random one imports the compiler (1 s).
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Leave a tensor as it is where torch.nn.init would fill it."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Most memory PyTorch's allocator held on an accelerator; None on CPU. Since PyTorch 2.9."""
    if device.type == "cpu":
        return None
    return torch.accelerator.max_memory_allocated()


def name_of(device: torch.device) -> str:
    """What an accelerator calls itself, by its module's own word; empty for a CPU."""
    if device.type == "cpu":
        return ""
    return str(torch.get_device_module(device).get_device_name(device))


def multiplies_bf16(device: torch.device) -> bool:
    """Whether an accelerator multiplies bf16 natively, by its module's own word (cuda, xpu)."""
    module = torch.get_device_module(device)
    return bool(module.is_bf16_supported()) if hasattr(module, "is_bf16_supported") else False
