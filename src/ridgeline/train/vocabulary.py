"""Embedding and loss over a vocabulary that is divided over tensor ranks: logits are never whole.

B batch, L sequence, D hidden, V this rank's part of the vocabulary, T tokens (B·L).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from ridgeline.torch_compat import local_offset

IGNORED = -100
"""A target that counts for nothing: padding, or a token the loss leaves out."""
CHUNK_TOKENS = 2048
"""Tokens whose logits stand in float32 at one time."""


def divided_embedding(tokens_BL: Tensor, weight_VD: DTensor) -> Tensor:
    """This rank's terms (B, L, D) of the embedding: a sum over tensor ranks makes it whole.

    DTensor's own embedding has no rule for the gradient of a divided vocabulary: it would be whole
    on every rank. Here it is that of the local rows.
    """
    local_VD = weight_VD.to_local()
    rows_BL = tokens_BL - local_offset(weight_VD)
    elsewhere_BL = (rows_BL < 0) | (rows_BL >= local_VD.shape[0])
    found_BLD = functional.embedding(rows_BL.masked_fill(elsewhere_BL, 0), local_VD)
    return found_BLD.masked_fill(elsewhere_BL[..., None], 0.0)


def token_loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy in nats, in float32; IGNORED targets count nothing.

    Logits divided over tensor ranks (a DTensor) stay so; every one of them gets the same sum.
    """
    start, group = 0, None
    if isinstance(logits_BLV, DTensor):
        start, group = local_offset(logits_BLV), logits_BLV.device_mesh.get_group()
        logits_BLV = logits_BLV.to_local()
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits_BLV.flatten(0, 1), targets_BL.flatten(), start, group
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits in their own precision and one number per token; float32 in chunks only."""

    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, targets_T: Tensor, start: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        columns_T, elsewhere_T = _columns(logits_TV, targets_T, start)
        chosen_T = torch.empty(len(targets_T), dtype=torch.float32, device=logits_TV.device)
        sum_T = torch.empty_like(chosen_T)  # logarithm of this rank's part of the softmax's sum
        for part in _parts(targets_T):
            chunk_TV = logits_TV[part].float()
            log_share_TV = chunk_TV.log_softmax(1)
            chosen_T[part] = log_share_TV.gather(1, columns_T[part, None]).squeeze(1)
            sum_T[part] = chunk_TV.amax(1) - log_share_TV.amax(1)
        whole_T = sum_T
        if group is not None:
            dist.all_reduce(highest_T := sum_T.clone(), dist.ReduceOp.MAX, group)
            both_2T = torch.stack([(sum_T - highest_T).exp(), chosen_T + sum_T])
            both_2T[1].masked_fill_(elsewhere_T, 0.0)
            dist.all_reduce(both_2T, group=group)
            whole_T = highest_T + both_2T[0].log()
            chosen_T = both_2T[1] - whole_T
        ctx.save_for_backward(logits_TV, targets_T, (sum_T - whole_T).exp())
        ctx.start = start
        return -chosen_T.masked_fill(targets_T == IGNORED, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, targets_T, ours_T = ctx.saved_tensors
        columns_T, elsewhere_T = _columns(logits_TV, targets_T, ctx.start)
        scale_T = gradients[0] * (targets_T != IGNORED)
        result_TV = torch.empty_like(logits_TV)
        for part in _parts(targets_T):
            share_TV = logits_TV[part].float().softmax(1)
            share_TV *= (ours_T[part] * scale_T[part])[:, None]
            less_T = scale_T[part].masked_fill(elsewhere_T[part], 0.0)
            result_TV[part] = share_TV.scatter_add_(1, columns_T[part, None], -less_T[:, None])
        return result_TV, None, None, None


def _parts(targets_T: Tensor) -> list[slice]:
    return [slice(at, at + CHUNK_TOKENS) for at in range(0, len(targets_T), CHUNK_TOKENS)]


def _columns(logits_TV: Tensor, targets_T: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Each target's column among this rank's logits, and which targets have none (column 0)."""
    columns_T = targets_T - start
    elsewhere_T = (columns_T < 0) | (columns_T >= logits_TV.shape[1])
    return columns_T.masked_fill(elsewhere_T, 0), elsewhere_T
