"""AdamW, and the norm of gradients that lie divided over ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ridgeline.errors import NotLearnt
from ridgeline.layout.grid import holders
from ridgeline.layout.layout import Layout
from ridgeline.run import Optimizer


def adamw(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Fused AdamW; weight decay on parameters of two or more dimensions only."""
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # One fused call updates DTensors of one mesh; experts have another.
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups[parameter.ndim >= 2, mesh].append(parameter)
    decays = {True: settings.weight_decay, False: 0.0}
    return torch.optim.AdamW(
        [{"params": each, "weight_decay": decays[key[0]]} for key, each in groups.items()],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def totals(
    parameters: Iterable[nn.Parameter],
    loss: Tensor,
    layout: Layout,
    repeated: nn.Parameter | None = None,
) -> tuple[Tensor, Tensor]:
    """Norm of the whole model's gradient, and the sum of all ranks' `loss`, in one message.

    Each rank gives the squares of its shards, each divided by the number of ranks that hold the
    same shard; so every number of the model counts once, whatever divides it. `repeated` is a
    parameter that another chunk counts.
    """
    squares = loss.new_zeros(2)
    squares[1] = loss
    by_holders: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        gradient, parts = None if parameter is repeated else parameter.grad, [1]
        if isinstance(gradient, DTensor):
            sizes = zip(gradient.placements, gradient.device_mesh.shape, strict=True)
            parts = [size for placement, size in sizes if not placement.is_replicate()]
            gradient = gradient.to_local()
        if gradient is not None:
            by_holders[holders(layout, parts)].append(gradient)
    for number, gradients in by_holders.items():
        norms = torch.stack(torch._foreach_norm(gradients))
        squares[0] += norms.square().sum() / number
    dist.all_reduce(squares)
    return squares[0].sqrt(), squares[1]


def clip(
    parameters: Iterable[nn.Parameter], norm: Tensor, most: float, factor: float = 1.0
) -> None:
    """Divide gradients by `factor`, and scale them so that their norm, `norm` before, is then at
    most `most`; 0 scales nothing."""
    scale = (most / (norm + 1e-6)).clamp(max=1.0) if most else torch.ones_like(norm)
    gradients = [p.grad for p in parameters if p.grad is not None]
    local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    if local and (most or factor != 1.0):
        torch._foreach_mul_(local, scale / factor)


class LossScale:
    """What fp16 multiplies losses by, so that small gradients are not rounded to zero.

    Halved when a gradient overflows, and that step is left out; doubled after `PATIENCE` steps
    without (arXiv:1710.03740, section 3.2). `state`: (2,) factor and steps since it changed, for
    a checkpoint.
    """

    START, LEAST, PATIENCE = 2.0**16, 2.0**-8, 2000

    def __init__(self) -> None:
        self.state = torch.tensor([self.START, 0.0])

    @property
    def factor(self) -> float:
        """By what losses are multiplied now."""
        return float(self.state[0])

    def accepts(self, norm: Tensor) -> bool:
        """Whether a step with this gradient norm counts; the next factor. Waits for the device.

        Raises NotLearnt when no factor is small enough.
        """
        finite = bool(torch.isfinite(norm))
        steps = float(self.state[1]) + 1
        if not finite and self.factor <= self.LEAST:
            raise NotLearnt(
                f"a step in fp16 with losses multiplied by {self.factor:g}",
                f"its gradients are not finite even so, {math.log2(self.START):.0f} halvings and "
                "more below the first factor: the loss itself diverges",
                "a lower optimizer.lr, or bf16",
            )
        if not finite:
            self.state.copy_(torch.tensor([self.factor / 2, 0.0]))
        elif steps >= self.PATIENCE:
            self.state.copy_(torch.tensor([self.factor * 2, 0.0]))
        else:
            self.state[1] = steps
        return finite
