"""Every private or version-bound PyTorch import, each with the versions it was tested on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# In-process store of a one-member group; re-exported by torch.distributed only conditionally.
# Tested on 2.13.0.
from torch._C._distributed_c10d import HashStore
from torch.distributed import ProcessGroup

# FSDP2's replicate: DDP semantics on FSDP2's engine, with its mixed precision. Private path.
# Tested on 2.13.0.
from torch.distributed._composable.replicate_with_fsdp import replicate as _replicate

# The all-to-all that autograd and the compiler know. Private path. Tested on 2.13.0.
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.overrides import TorchFunctionMode

__all__ = [
    "HashStore",
    "Unfilled",
    "all_to_all",
    "attend_block",
    "attend_block_backward",
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


def all_to_all(x_C: Tensor, group: ProcessGroup) -> Tensor:
    """Row i of `x_C` to rank i; row j of the result is from rank j. Contiguous; differentiable."""
    received_C: Tensor = all_to_all_single_autograd(x_C, None, None, group)
    return received_C


def attend_block(
    q_BNLH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of one block of keys by PyTorch's flash kernels, outside of autograd.

    Returns the output (B, N, L, H) and the float32 log-sum-exp (B, N, L) of the scaled scores.
    CPU: tested on 2.13.0. Accelerators: never run on one, only as shapes on the meta device; CUDA's
    kernels take bf16 and fp16 only, and an H that is a multiple of 8.
    """
    if q_BNLH.device.type == "cpu":
        out_BNLH, lse_BNL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BNLH, k_BNSH, v_BNSH, is_causal=causal
        )
    else:
        out_BNLH, lse_BNL, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            q_BNLH, k_BNSH, v_BNSH, is_causal=causal
        )
    return out_BNLH, lse_BNL


def attend_block_backward(
    q_BNLH: Tensor,
    out_BNLH: Tensor,
    lse_BNL: Tensor,
    grad_BNLH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from one block of keys; out, lse and grad are those of all blocks.

    Tested as `attend_block`. The accelerators' kernels read lse without its strides, and the random
    state only for dropout; sequences of one length have no table of cumulative lengths.
    """
    aten = torch.ops.aten
    saved = (grad_BNLH, q_BNLH, k_BNSH, v_BNSH, out_BNLH, lse_BNL.contiguous())
    if q_BNLH.device.type == "cpu":
        dq_BNLH, dk_BNSH, dv_BNSH = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *saved, 0.0, causal
        )
    else:
        lengths = (None, None, q_BNLH.shape[2], k_BNSH.shape[2])
        unread = lse_BNL.new_zeros(2)
        dq_BNLH, dk_BNSH, dv_BNSH = aten._scaled_dot_product_flash_attention_backward(
            *saved, *lengths, 0.0, causal, unread, unread
        )
    return dq_BNLH, dk_BNSH, dv_BNSH
