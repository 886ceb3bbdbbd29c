"""Expert parallelism: experts spread over ranks, visits sent to them and back; even load.

Shapes: E routed experts, R ranks of the expert group, T visits in the order of their experts (see
`model/experts.py`), D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from ridgeline.model.experts import MixtureOfExperts, StackedLinear, permute
from ridgeline.torch_compat import as_parameter_of


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
        send, receive = self.sizes(leaving_RE, arriving_RE, x_TD)
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

    def sizes(
        self, leaving_RE: Tensor, arriving_RE: Tensor, x_TD: Tensor
    ) -> tuple[list[int], list[int]]:
        """Rows of x_TD to each rank, and rows from each."""
        send, receive = torch.stack([leaving_RE.sum(1), arriving_RE.sum(1)]).tolist()
        return send, receive


def mixtures(modules: Iterable[nn.Module]) -> list[MixtureOfExperts]:
    """Every mixture of experts within `modules` (a model, or a pipeline rank's chunks of one)."""
    return [m for part in modules for m in part.modules() if isinstance(m, MixtureOfExperts)]


def divide_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the routed experts over the axis "expert" of `mesh`, in place; tensor ranks copy them.

    A mesh without a tensor axis of two or more leaves that axis out.
    """
    for mixture in mixtures([model]):
        mixture.exchange = ExpertExchange(mesh["expert"].get_group())
        tensor = mesh["tensor"].size() > 1
        axes = mesh["expert", "tensor"] if tensor else mesh["expert"]
        placements = [Shard(0), Replicate()] if tensor else [Shard(0)]
        for stacked in mixture.experts.modules():
            if isinstance(stacked, StackedLinear):
                stacked.weight = as_parameter_of(stacked.weight, axes, placements)


def count_whole_sequences(model: nn.Module, groups: Sequence[ProcessGroup]) -> None:
    """Sum the visits of ranks that hold parts of the same sequences, one group after the other."""

    def sum_over(visits_BE: Tensor) -> Tensor:
        total_BE = visits_BE.clone()  # counts have no gradient
        for group in groups:
            dist.all_reduce(total_BE, group=group)
        return total_BE

    for mixture in mixtures([model]):
        mixture.whole_sequences = sum_over


def set_loss_scale(modules: Iterable[nn.Module], scale: Tensor | float) -> None:
    """Weight the auxiliary losses of the next backward passes as the main loss is: by 1 / (valid
    tokens of the global batch), times the scale of fp16 where there is one."""
    for mixture in mixtures(modules):
        mixture.loss_scale = scale


@torch.no_grad()
def update_router_bias(
    modules: Iterable[nn.Module], total: Callable[[Tensor], Tensor], share: Tensor | float = 1.0
) -> None:
    """After a step: each expert's bias up where it had fewer visits than the mean, down where more.

    By bias_rate (arXiv:2412.19437, section 2.1.2); then the counting starts anew. `total` sums over
    all ranks that train the same layers (data, context and tensor). `share`: 0 moves nothing.
    """
    found = mixtures(modules)
    if not found:
        return
    visits_ME = total(torch.stack([mixture.visits for mixture in found]))
    # sign(mean - visits), in whole numbers
    behind_ME = visits_ME.sum(1, keepdim=True) - visits_ME * visits_ME.shape[1]
    direction_ME = behind_ME.sign() * share
    for mixture, direction_E in zip(found, direction_ME, strict=True):
        mixture.selection_bias.add_(direction_E, alpha=mixture.settings.bias_rate)
        mixture.visits.zero_()
