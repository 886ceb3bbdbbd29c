"""Matrix products in 8 bits: which layers have them, and that a run of them learns."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ridgeline
from ridgeline.errors import LaunchError
from ridgeline.model.decoder import Decoder
from ridgeline.model.shape import ModelShape
from ridgeline.run import Run
from ridgeline.train.float8 import check_float8, to_float8

CPU = torch.device("cpu")


def in_8_bits(model: nn.Module) -> set[str]:
    return {name for name, part in model.named_modules() if type(part).__name__ == "Float8Linear"}


def test_linear_layers_of_a_block_multiply_in_8_bits_and_keep_their_weights() -> None:
    shape = ModelShape(layers=1, hidden=32, heads=2, ffn_hidden=40, vocab=64)
    model = Decoder(shape)
    model.initialise(0)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    to_float8(model.blocks["0"], CPU)
    attention = {f"blocks.0.attention.{name}" for name in ("q", "k", "v", "out")}
    assert in_8_bits(model) == attention  # 40 is no multiple of 16
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_router_and_its_experts_stay_as_they_are() -> None:
    experts = {"count": 16, "top_k": 2, "ffn_hidden": 32, "shared": 1}
    shape = ModelShape.model_validate(
        {"layers": 1, "hidden": 32, "heads": 2, "vocab": 64, "experts": experts}
    )
    model = Decoder(shape)
    to_float8(model, CPU)
    assert {name.removeprefix("blocks.0.") for name in in_8_bits(model)} == {
        *(f"attention.{name}" for name in ("q", "k", "v", "out")),
        *(f"mlp.shared.{name}" for name in ("gate", "up", "down")),
        "head",  # the trainer converts blocks alone
    }


def test_a_run_in_fp8_learns_as_in_bf16_and_not_to_the_same_digits(
    tiny_run: Callable[..., Run], rows_of: Callable[..., list[dict[str, Any]]]
) -> None:
    losses = {}
    for precision in ("bf16", "fp8"):
        run = tiny_run(name=precision, layout=f"mb4 {precision}", budget={"steps": 12})
        assert ridgeline.train(run).complete
        losses[precision] = [row["loss"] for row in rows_of(run, "loss")]
    assert losses["fp8"][0] - losses["fp8"][-1] >= 0.5
    assert losses["fp8"][:3] == pytest.approx(losses["bf16"][:3], rel=0.02)
    assert losses["fp8"] != losses["bf16"]


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_float8(CPU, multiplies=False)  # computed in more steps
    with pytest.raises(LaunchError, match="cuda device does not multiply 8 bits"):
        check_float8(torch.device("cuda"), multiplies=False)
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(LaunchError, match=r"pip install 'ridgeline\[float8\]'"):
        check_float8(CPU, multiplies=False)
