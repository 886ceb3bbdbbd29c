"""What an accelerator fuses and the CPU of a rehearsal does in parts: RMSNorm.

There PyTorch has one kernel that keeps its input and a number per row; on a CPU it works in parts,
whose float32 copies would be the largest share of what a layer keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from ridgeline.machine.device import is_cpu
from ridgeline.machine.local import is_local
from ridgeline.run import Run


def on_cpu(run: Run) -> bool:
    """Whether the run's devices run PyTorch's CPU kernels; this machine's may be accelerators."""
    name = run.cluster.device
    return is_cpu(name) and not (is_local(name) and torch.accelerator.is_available())


def fuse(modules: Iterable[nn.Module]) -> None:
    """Let every RMSNorm of some modules take and give what the fused kernel does, in place."""
    for module in modules:
        for part in module.modules():
            if isinstance(part, nn.RMSNorm):
                part.forward = partial(_forward, part)  # type: ignore[method-assign]


def _forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    # Of tensor ranks, each gives the terms of its part of the sequence to the weight's gradient.
    weight: Any = norm.weight
    if not isinstance(x, DTensor):
        return _apply(x, weight)
    weight = weight.to_local(grad_placements=[Partial()])
    out = _apply(x.to_local(), weight)
    return DTensor.from_local(out, x.device_mesh, x.placements, run_check=False)


def _apply(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = _FusedRMSNorm.apply(x, weight)  # type: ignore[no-untyped-call]
    return out


class _FusedRMSNorm(torch.autograd.Function):
    """Shapes of aten::_fused_rms_norm and its backward; values are wrong, and never looked at."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return x.clone(), torch.empty_like(weight)
