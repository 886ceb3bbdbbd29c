"""AdamW, gradient clipping, and the default loss."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ridgeline.run import Optimizer

IGNORED = -100
"""A target that counts for nothing: padding, or a token the loss leaves out."""


def adamw(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
    """Fused AdamW; weight decay on parameters of two or more dimensions only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )


def clip_gradients(parameters: Iterable[nn.Parameter], clip_norm: float) -> Tensor:
    """Scale gradients to a global norm of at most `clip_norm` (0: leave them); the norm before."""
    with_gradient = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in with_gradient if p.grad is not None])
    if clip_norm:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, clip_norm, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def token_loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, in float32; IGNORED targets count nothing."""
    logits_TV, targets_T = logits_BLV.flatten(0, 1).float(), targets_BL.flatten()
    return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
