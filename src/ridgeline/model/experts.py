"""A mixture of experts in the place of a block's MLP, and no parallelism.

Axes: B batch, L sequence, D hidden, F an expert's ffn_hidden, E routed experts, K experts that one
token visits, T visits (tokens times K) in the order of their experts. E is this rank's part in the
stacked weights, where experts are spread over ranks, and the whole elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from torch.nn import functional

from ridgeline.errors import ModelError
from ridgeline.model.shape import ExpertShape, ModelShape
from ridgeline.torch_compat import in_backward

ROW_MULTIPLE = 8
"""Grouped matrix products want rows of whole 16 bytes: 8 elements in bf16."""


class _Permute(torch.autograd.Function):
    """Row order[i] // copies of x in row i: each row `copies` times, permuted.

    The gradient is gathered by the inverse permutation instead of scattered, so that it is the same
    in every run: adding rows in place has no fixed order on an accelerator.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order_T: Tensor, inverse_T: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse_T)
        ctx.copies = copies
        return x.index_select(0, order_T // copies)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_T,) = ctx.saved_tensors
        rows = len(inverse_T) // ctx.copies
        gathered = gradient.index_select(0, inverse_T)
        return gathered.view(rows, ctx.copies, *gradient.shape[1:]).sum(1), None, None, None


def permute(x: Tensor, order_T: Tensor, inverse_T: Tensor, copies: int = 1) -> Tensor:
    """Row order_T[i] // copies of x (T / copies, ...) in row i; inverse_T undoes order_T."""
    permuted: Tensor = _Permute.apply(x, order_T, inverse_T, copies)  # type: ignore[no-untyped-call]
    return permuted


class _WithLoss(torch.autograd.Function):
    """x as it is; its backward starts that of a second loss, as if it were added to the first.

    So a loss can arise inside any block of any pipeline stage.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


def here(weight: Tensor) -> Tensor:
    """This rank's part of a weight; over ranks that hold it whole, each has a term of its gradient.

    What a rank computes with it are its own tokens' visits alone.
    """
    if not isinstance(weight, DTensor):
        return weight
    terms = [Partial() if p.is_replicate() else p for p in weight.placements]
    return weight.to_local(grad_placements=terms)


class Router(nn.Linear):
    """Logits (B, L, E) of every expert for every token, in float32 whatever the precision of x."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        return functional.linear(x_BLD.float(), here(self.weight).float())


class StackedLinear(nn.Module):
    """One matrix per expert, in one weight (experts, outputs, inputs)."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x_T: Tensor, ends_E: Tensor) -> Tensor:
        """(T, inputs) to (T, outputs): expert e multiplies rows ends_E[e-1] to ends_E[e]."""
        weight = here(self.weight).transpose(1, 2)
        out_T: Tensor = functional.grouped_mm(x_T, weight, offs=ends_E)
        return out_T


class Experts(nn.Module):
    """The routed experts: each an MLP as in a dense block."""

    def __init__(self, shape: ModelShape, experts: ExpertShape) -> None:
        super().__init__()
        count, hidden, ffn_hidden = experts.count, shape.hidden, experts.ffn_hidden
        gated = shape.activation == "swiglu"
        self.gelu = "tanh" if shape.activation == "gelu_tanh" else "none"
        self.gate = StackedLinear(count, hidden, ffn_hidden) if gated else None
        self.up = StackedLinear(count, hidden, ffn_hidden)
        self.down = StackedLinear(count, ffn_hidden, hidden)

    def forward(self, x_TD: Tensor, visits_E: Tensor) -> Tensor:
        """What the experts make of x_TD: the first visits_E[0] rows are expert 0's, and so on."""
        ends_E = visits_E.cumsum(0, dtype=torch.int32)
        h_TF = self.up(x_TD, ends_E)
        if self.gate is None:
            h_TF = functional.gelu(h_TF, approximate=self.gelu)
        else:
            h_TF = functional.silu(self.gate(x_TD, ends_E)) * h_TF
        out_TD: Tensor = self.down(h_TF, ends_E)
        return out_TD


def stay(x_TD: Tensor, visits_E: Tensor, experts: nn.Module) -> Tensor:
    """Without expert parallelism every expert is here."""
    out_TD: Tensor = experts(x_TD, visits_E)
    return out_TD


def whole(visits_BE: Tensor) -> Tensor:
    """Where no sequence is divided over ranks, its visits are all counted here."""
    return visits_BE


class MixtureOfExperts(nn.Module):
    """Each token visits top_k routed experts, weighted by the router, and all shared experts.

    No token is dropped. Softmax routing is Mixtral's (arXiv:2401.04088, section 2.1), sigmoid
    routing DeepSeek-V3's (arXiv:2412.19437, section 2.1.2, without groups of experts): a token
    visits the experts of the highest score + bias, and the score alone weights them.
    """

    def __init__(self, shape: ModelShape, experts: ExpertShape, shared: nn.Module | None) -> None:
        """`shared`: the shared experts as one MLP; None where there are none.

        Raises ModelError for biases, and for widths that grouped matrix products cannot take.
        """
        super().__init__()
        _check(shape, experts)
        self.settings = experts
        self.router = Router(shape.hidden, experts.count, bias=False)
        self.experts = Experts(shape, experts)
        self.shared = shared
        self.selection_bias: Tensor
        """(E), float32: part of the model, but moved by a rule and not by a gradient."""
        self.register_buffer("selection_bias", torch.zeros(experts.count))
        self.visits: Tensor
        """(E), int64: visits while training since the last move of the bias; what backward computes
        again, and in halves twice, counts no more."""
        visits = torch.zeros(experts.count, dtype=torch.int64)
        self.register_buffer("visits", visits, persistent=False)

        self.loss_scale: Tensor | float = 1.0
        """What the training loss, summed over tokens, is multiplied by before backward."""
        self.exchange: Callable[[Tensor, Tensor, nn.Module], Tensor] = stay
        """(x_TD, visits_E, experts) -> out_TD: brings visits to their experts and back."""
        self.whole_sequences: Callable[[Tensor], Tensor] = whole
        """visits_BE of this rank's tokens -> those of the same sequences on all ranks."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        weight_BLK, expert_BLK, visits_E = self._route(x_BLD)
        order_T = expert_BLK.flatten().argsort(stable=True)
        inverse_T = order_T.argsort()
        x_TD = permute(x_BLD.flatten(0, 1), order_T, inverse_T, copies=self.settings.top_k)
        out_TD = permute(self.exchange(x_TD, visits_E, self.experts), inverse_T, order_T)
        out_BLKD = out_TD.view(*expert_BLK.shape, -1)
        out_BLD = (out_BLKD * weight_BLK[..., None]).sum(2).to(x_BLD.dtype)
        return out_BLD if self.shared is None else out_BLD + self.shared(x_BLD)

    def _route(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of the visits (B, L, K), float32; their experts; visits per expert (E)."""
        settings = self.settings
        logits_BLE = self.router(x_BLD)
        sigmoid = settings.routing == "sigmoid"
        scores_BLE = logits_BLE.sigmoid() if sigmoid else logits_BLE.softmax(-1)
        expert_BLK = (scores_BLE.detach() + self.selection_bias).topk(settings.top_k).indices
        visits_BE = torch.zeros_like(scores_BLE[:, 0], dtype=torch.int64)
        visits_BE.scatter_add_(1, expert_BLK.flatten(1), torch.ones_like(expert_BLK.flatten(1)))
        visits_E = visits_BE.sum(0)
        weight_BLK = scores_BLE.gather(-1, expert_BLK)
        if settings.normalise:
            weight_BLK = weight_BLK / weight_BLK.sum(-1, keepdim=True)
        weight_BLK = weight_BLK * settings.scale
        if self.training:
            if torch.compiler.is_compiling() or not in_backward():
                self.visits += visits_E
            if settings.balance_weight:
                loss = self._balance_loss(scores_BLE, visits_BE)
                weight_BLK = _WithLoss.apply(weight_BLK, loss)  # type: ignore[no-untyped-call]
        return weight_BLK, expert_BLK, visits_E

    def _balance_loss(self, scores_BLE: Tensor, visits_BE: Tensor) -> Tensor:
        """The part that this rank's tokens have in the auxiliary loss, of all their sequences.

        Per sequence of L tokens it is L sum_E f P (arXiv:2412.19437, equations 17 to 20), where
        f = E visits / (K L) and P is the mean over tokens of score / sum of scores. Only P has a
        gradient, and it is linear in P: with f of the whole sequence, every rank adds its tokens'
        terms and no sum of P over ranks is needed. Independent of micro-batches and of the layout.
        """
        visits_BE = self.whole_sequences(visits_BE)
        often_BE = visits_BE * (visits_BE.shape[-1] / visits_BE.sum(-1, keepdim=True))
        affinity_BLE = scores_BLE / scores_BLE.sum(-1, keepdim=True)
        loss = (often_BE[:, None] * affinity_BLE).sum()
        return loss * self.settings.balance_weight * self.loss_scale


def _check(shape: ModelShape, experts: ExpertShape) -> None:
    if shape.bias:
        raise ModelError(
            f"train {shape.name}: experts with bias",
            "grouped matrix products add no bias, so experts have none",
            "bias = false",
        )
    for name, width in (("hidden", shape.hidden), ("experts.ffn_hidden", experts.ffn_hidden)):
        if width % ROW_MULTIPLE:
            above = -(-width // ROW_MULTIPLE) * ROW_MULTIPLE
            raise ModelError(
                f"train {shape.name}: {name} {width} with experts",
                f"grouped matrix products want rows of whole 16 bytes, a multiple of "
                f"{ROW_MULTIPLE} in bf16; {width} = {above} - {above - width}",
                f"{name} = {above}",
            )
