"""Expert parallelism: experts spread over ranks, visits sent to them and back; even load.

Shapes: E routed experts, R ranks of the expert group, T visits in the order of their experts (see
`model/experts.py`), D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from ridgeline.model.experts import MixtureOfExperts, StackedLinear, permute


class _AllToAll(torch.autograd.Function):
    """Rows to each rank of a group and rows from each; the gradient goes the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient, ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    received = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(received, x.contiguous(), receive, send, group=group)
    return received


class ExpertExchange:
    """Brings each visit to the rank that holds its expert and the result back.

    Rank r of `group` holds experts r E/R to (r+1) E/R - 1. What a rank receives depends on the
    routing: the counts go first, and wait for the device once.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, x_TD: Tensor, visits_E: Tensor, experts: nn.Module) -> Tensor:
        """x_TD sorted by expert, visits_E (E) rows each; the experts' results in the same order."""
        ranks = self.group.size()
        arriving_E = torch.empty_like(visits_E)
        dist.all_to_all_single(arriving_E, visits_E, group=self.group)
        leaving_RE, arriving_RE = visits_E.view(ranks, -1), arriving_E.view(ranks, -1)
        send, receive = torch.stack([leaving_RE.sum(1), arriving_RE.sum(1)]).tolist()
        arrived_TD = _AllToAll.apply(x_TD, send, receive, self.group)  # type: ignore[no-untyped-call]

        # They arrive by rank and within a rank by expert; experts want them by expert alone.
        local_E = torch.arange(arriving_RE.shape[1], device=x_TD.device).repeat(ranks)
        expert_T = local_E.repeat_interleave(arriving_E, output_size=sum(receive))
        order_T = expert_T.argsort(stable=True)
        inverse_T = order_T.argsort()
        out_TD = experts(permute(arrived_TD, order_T, inverse_T), arriving_RE.sum(0))
        back_TD = permute(out_TD, inverse_T, order_T)
        result_TD: Tensor = _AllToAll.apply(back_TD, receive, send, self.group)  # type: ignore[no-untyped-call]
        return result_TD


class SequenceSum:
    """Sums the visits of ranks that hold parts of the same sequences (context, tensor)."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, visits_BE: Tensor) -> Tensor:
        """visits_BE of all ranks of the group together; counts have no gradient."""
        total_BE = visits_BE.clone()
        dist.all_reduce(total_BE, group=self.group)
        return total_BE


def mixtures(modules: Iterable[nn.Module]) -> list[MixtureOfExperts]:
    """Every mixture of experts within `modules` (a model, or a pipeline rank's chunks of one)."""
    return [m for part in modules for m in part.modules() if isinstance(m, MixtureOfExperts)]


def divide_experts(
    modules: Iterable[nn.Module], expert: DeviceMesh | None, sequence: ProcessGroup | None
) -> None:
    """Spread the routed experts over the one-dimensional mesh `expert`, in place.

    `sequence`: the ranks that hold parts of the same sequences; None where they are whole.
    `expert`: None where every rank holds all experts.
    """
    for mixture in mixtures(modules):
        if sequence is not None:
            mixture.whole_sequences = SequenceSum(sequence)
        if expert is None:
            continue
        mixture.exchange = ExpertExchange(expert.get_group())
        for stacked in mixture.experts.modules():
            if isinstance(stacked, StackedLinear):
                part = distribute_tensor(stacked.weight, expert, [Shard(0)])
                stacked.weight = nn.Parameter(part)


def set_loss_scale(modules: Iterable[nn.Module], scale: Tensor | float) -> None:
    """Weight the auxiliary losses of the next backward passes as the main loss is: by 1 / (valid
    tokens of the global batch), times the scale of fp16 where there is one."""
    for mixture in mixtures(modules):
        mixture.loss_scale = scale


@torch.no_grad()
def update_router_bias(modules: Iterable[nn.Module], group: ProcessGroup | None) -> None:
    """After a step: each expert's bias up where it had fewer visits than the mean, down where more.

    By bias_rate (arXiv:2412.19437, section 2.1.2); then the counting starts anew. `group`: all
    ranks that train the same layers (data, context and tensor); None: all ranks.
    """
    found = mixtures(modules)
    if not found:
        return
    visits_ME = torch.stack([mixture.visits for mixture in found])
    dist.all_reduce(visits_ME, group=group)
    # sign(mean - visits), in whole numbers
    behind_ME = visits_ME.sum(1, keepdim=True) - visits_ME * visits_ME.shape[1]
    direction_ME = behind_ME.sign().float()
    for mixture, direction_E in zip(found, direction_ME, strict=True):
        mixture.selection_bias.add_(direction_E, alpha=mixture.settings.bias_rate)
        mixture.visits.zero_()
