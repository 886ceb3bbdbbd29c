"""Context parallelism of causal attention: over heads where they suffice, else round a ring.

Axes: C context ranks, B batch, L this rank's slice of the sequence, T the whole sequence (C·L),
S keys of any slice, N query heads, K key/value heads, M all heads together of one rank, H head_dim;
N and K are this tensor rank's part. `layout.context` says which positions a rank holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ridgeline.layout.context import ContextKind
from ridgeline.model.decoder import causal_attention
from ridgeline.torch_compat import all_to_all, attend_block, attend_block_backward


@dataclass(frozen=True)
class ContextAttention:
    """Causal attention over a sequence that the ranks of `group` (two or more) hold in slices.

    Takes this rank's q (B, L, N, H), k and v (B, L, K, H), already rotated by their positions in
    the whole sequence, and returns its slice of the output (B, L, N, H). Differentiable once.
    """

    group: dist.ProcessGroup
    kind: ContextKind

    def __call__(self, q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor) -> Tensor:
        attend = attend_over_heads if self.kind == "heads" else attend_round_ring
        return attend(q_BLNH, k_BLKH, v_BLKH, self.group)


def attend_over_heads(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """All-to-all, attention over the whole sequence with N/C heads, all-to-all (arXiv:2309.14509).

    Queries, keys and values travel in one message; with fewer key/value heads than ranks, each is
    sent to the C/K ranks whose queries need it.
    """
    ranks = group.size()
    copies = max(1, ranks // k_BLKH.shape[2])
    heads_of_all = (q_BLNH, _copied(k_BLKH, copies), _copied(v_BLKH, copies))
    parts_BLCMH = [torch.unflatten(x, 2, (ranks, -1)) for x in heads_of_all]
    heads_CBLMH = torch.cat(parts_BLCMH, 3).movedim(2, 0).contiguous()
    slices_CBLMH = all_to_all(heads_CBLMH, group)
    whole_BTMH = slices_CBLMH.movedim(0, 1).flatten(1, 2)
    heads = [part.shape[3] for part in parts_BLCMH]
    out_BTMH = causal_attention(*whole_BTMH.split_with_sizes(heads, 2))
    out_BCLMH = torch.unflatten(out_BTMH, 1, (ranks, -1))
    return all_to_all(out_BCLMH.movedim(1, 0).contiguous(), group).movedim(0, 2).flatten(2, 3)


# dynamo breaks the graph at every point-to-point message; so it does once.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_round_ring(
    q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Keys and values visit every rank, each block's attention hiding the next block's journey
    (arXiv:2310.01889); slices lie in zigzag, so that every rank works equally in every step."""
    out_BLNH: Tensor = _Ring.apply(q_BLNH, k_BLKH, v_BLKH, group)  # type: ignore[no-untyped-call]
    return out_BLNH


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BLNH: Tensor, k_BLKH: Tensor, v_BLKH: Tensor, group: dist.ProcessGroup
    ) -> Tensor:
        q_BNLH, k_BKLH, v_BKLH = (x.transpose(1, 2) for x in (q_BLNH, k_BLKH, v_BLKH))
        block = torch.stack((k_BKLH, v_BKLH)).contiguous()
        out_BNLH = torch.zeros_like(q_BNLH, dtype=torch.float32)
        lse_BNL = torch.full_like(out_BNLH[..., 0], -math.inf)
        for step in range(group.size()):
            coming = _Passed(block, group) if step + 1 < group.size() else None
            queries, keys, causal = _visible(step, group.rank(), q_BNLH.shape[2])
            k_BNSH, v_BNSH = _for_each_query_head(block[..., keys, :], q_BNLH.shape[1])
            part_BNLH, part_lse_BNL = attend_block(q_BNLH[:, :, queries], k_BNSH, v_BNSH, causal)
            _merge(out_BNLH[:, :, queries], lse_BNL[:, :, queries], part_BNLH, part_lse_BNL)
            if coming:
                block = coming.wait()
        out_BNLH = out_BNLH.to(q_BLNH.dtype)
        ctx.save_for_backward(q_BNLH, k_BKLH, v_BKLH, out_BNLH, lse_BNL)
        ctx.group = group
        return out_BNLH.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLNH: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Blocks go round again, followed by the sums of their gradients, which end at home.

        With the log-sum-exp over all keys, a block's backward is its exact share of the whole.
        """
        q_BNLH, k_BKLH, v_BKLH, out_BNLH, lse_BNL = ctx.saved_tensors
        group, grad_BNLH = ctx.group, grad_BLNH.contiguous().transpose(1, 2)
        block = torch.stack((k_BKLH, v_BKLH)).contiguous()
        dq_BNLH = torch.zeros_like(q_BNLH, dtype=torch.float32)
        sums: _Passed | None = None
        for step in range(group.size()):
            coming = _Passed(block, group) if step + 1 < group.size() else None
            queries, keys, causal = _visible(step, group.rank(), q_BNLH.shape[2])
            k_BNSH, v_BNSH = _for_each_query_head(block[..., keys, :], q_BNLH.shape[1])
            q, out, lse, grad = (x[:, :, queries] for x in (q_BNLH, out_BNLH, lse_BNL, grad_BNLH))
            dq, dk, dv = attend_block_backward(q, out, lse, grad, k_BNSH, v_BNSH, causal)
            dq_BNLH[:, :, queries] += dq
            sum_of_block = sums.wait() if sums else torch.zeros_like(block, dtype=torch.float32)
            heads = (block.shape[2], -1)  # each key/value head and the query heads that share it
            for total, part in zip(sum_of_block[..., keys, :], (dk, dv), strict=True):
                total += torch.unflatten(part, 1, heads).sum(2, dtype=torch.float32)
            sums = _Passed(sum_of_block, group)
            if coming:
                block = coming.wait()
        assert sums is not None
        dk_BKLH, dv_BKLH = sums.wait().to(k_BKLH.dtype)
        gradients = dq_BNLH.to(q_BNLH.dtype), dk_BKLH, dv_BKLH
        dq_BLNH, dk_BLKH, dv_BLKH = (x.transpose(1, 2) for x in gradients)
        return dq_BLNH, dk_BLKH, dv_BLKH, None


class _Passed:
    """A tensor on its way from every rank of a ring to the next, kept alive until it arrives."""

    def __init__(self, sent: Tensor, group: dist.ProcessGroup) -> None:
        self.sent = sent
        self.received = torch.empty_like(sent)
        rank, ranks = group.rank(), group.size()
        send = dist.P2POp(dist.isend, sent, group=group, group_peer=(rank + 1) % ranks)
        receive = dist.P2POp(dist.irecv, self.received, group=group, group_peer=(rank - 1) % ranks)
        self.works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> Tensor:
        """What the rank before sent."""
        for work in self.works:
            work.wait()
        return self.received


def _visible(step: int, rank: int, length: int) -> tuple[slice, slice, bool]:
    """This rank's queries and the keys they attend to in a step, and whether causally.

    In step s a rank holds the block of rank - s, modulo C. Of a lower rank's two slices the early
    one lies before both of ours and the late one behind both; of a higher rank's, both lie between
    ours. So every later step is half the rectangle, about as much as the first one's triangle.
    """
    whole, half = slice(0, length), length // 2
    if step == 0:
        return whole, whole, True
    if step <= rank:
        return whole, slice(0, half), False
    return slice(half, length), whole, False


def _for_each_query_head(block: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values (B, N, S, H) of a block (2, B, K, S, H), each repeated for its queries."""
    k_BNSH, v_BNSH = _copied(block, heads // block.shape[2])
    return k_BNSH, v_BNSH


def _copied(x: Tensor, copies: int) -> Tensor:
    """Each of the heads, axis 2, that many times in a row; not moved in memory when it is once."""
    return x if copies == 1 else x.repeat_interleave(copies, 2)


def _merge(out_BNLH: Tensor, lse_BNL: Tensor, part_BNLH: Tensor, part_lse_BNL: Tensor) -> None:
    """Add, in place and in float32, attention to further keys; lse is the log of the weights' sum.

    Both outputs are means weighted by exp(score), so their mean is weighted by exp(lse).
    """
    total_BNL = torch.logaddexp(lse_BNL, part_lse_BNL)
    old, new = (lse_BNL - total_BNL).exp(), (part_lse_BNL - total_BNL).exp()
    out_BNLH.mul_(old[..., None]).add_(part_BNLH.float() * new[..., None])
    lse_BNL.copy_(total_BNL)
