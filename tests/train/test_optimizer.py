"""Clipping, loss and AdamW, each against PyTorch's or a loop of our own in plain words."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ridgeline.run import Optimizer
from ridgeline.train.optimizer import IGNORED, adamw, clip_gradients, token_loss


def _parameters(seed: int, scale: float) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.zeros(size)) for size in ((3, 4), (5,), ())]
    for parameter in parameters:
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)
    return [*parameters, nn.Parameter(torch.zeros(2))]  # the last has no gradient


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), limit=st.floats(0.01, 10))
def test_clipping_is_pytorchs(seed: int, scale: float, limit: float) -> None:
    ours, theirs = _parameters(seed, scale), _parameters(seed, scale)
    norm = clip_gradients(ours, limit)
    expected = nn.utils.clip_grad_norm_(theirs, limit)
    assert torch.equal(norm, expected)
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine.grad is None) == (reference.grad is None)
        if mine.grad is not None and reference.grad is not None:
            torch.testing.assert_close(mine.grad, reference.grad)


def test_a_clip_norm_of_zero_leaves_gradients_and_still_tells_their_norm() -> None:
    parameters, untouched = _parameters(0, 100.0), _parameters(0, 100.0)
    squares = sum(float(p.grad.square().sum()) for p in untouched if p.grad is not None)
    assert float(clip_gradients(parameters, 0)) == pytest.approx(math.sqrt(squares))
    for mine, before in zip(parameters[:3], untouched[:3], strict=True):
        assert mine.grad is not None
        assert before.grad is not None
        assert torch.equal(mine.grad, before.grad)


def test_the_loss_is_the_sum_of_nats_over_targets_that_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BLV = torch.randn(2, 5, 7, generator=generator)
    targets_BL = torch.randint(0, 7, (2, 5), generator=generator)
    targets_BL[0, 1] = targets_BL[1, 4] = IGNORED
    by_hand = 0.0
    for row, column in ((b, t) for b in range(2) for t in range(5)):
        target = int(targets_BL[row, column])
        if target != IGNORED:
            by_hand -= math.log(torch.softmax(logits_BLV[row, column].double(), 0)[target])
    assert float(token_loss(logits_BLV, targets_BL)) == pytest.approx(by_hand, rel=1e-6)
    assert token_loss(logits_BLV.bfloat16(), targets_BL).dtype == torch.float32


def test_a_batch_of_ignored_targets_adds_nothing() -> None:
    logits_BLV = torch.randn(1, 3, 7, requires_grad=True)
    loss = token_loss(logits_BLV, torch.full((1, 3), IGNORED))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert logits_BLV.grad is not None
    assert not logits_BLV.grad.any()


def test_adamw_decays_matrices_only_and_follows_its_formula() -> None:
    """arXiv:1711.05101, algorithm 2, after one step: m / (1 - beta1) is the gradient itself."""
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    settings = Optimizer(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.5)
    optimizer = adamw(model, settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 0.1 * 0.5 if parameter.ndim >= 2 else 1.0
        expected = before[name] * kept - 0.1 * 2.0 / (2.0 + 1e-3)
        torch.testing.assert_close(parameter.detach(), expected)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    (group,) = adamw(model, Optimizer()).param_groups
    assert [p.ndim for p in group["params"]] == [1]
