"""A mixture of experts compiles whole."""

from __future__ import annotations

import pytest
import torch

from ridgeline.model.decoder import make_mlp
from ridgeline.model.shape import ExpertShape, ModelShape

pytestmark = pytest.mark.system


def test_a_bf16_mixture_compiles_without_a_graph_break() -> None:
    """In bf16: PyTorch 2.13 traces grouped products in no other precision."""
    experts = ExpertShape(count=8, top_k=3, ffn_hidden=24, shared=1, balance_weight=0.5)
    shape = ModelShape(layers=1, hidden=16, heads=2, vocab=40, experts=experts)
    torch.manual_seed(1)
    mixture = make_mlp(shape, 0).bfloat16()
    x_BLD = torch.randn(3, 10, 16).bfloat16()
    compiled = torch.compile(mixture, backend="aot_eager", fullgraph=True)
    results = []
    for module in (mixture, compiled):
        out_BLD = module(x_BLD)
        gradients = torch.autograd.grad(out_BLD.square().sum(), list(mixture.parameters()))
        results.append((out_BLD.detach(), *gradients))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(eager, traced)
    assert mixture.get_buffer("visits").sum() == 2 * 30 * 3  # both runs counted
