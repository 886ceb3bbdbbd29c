"""The planner's count of a layout equals what the traced program does: FLOPs, bytes, memory.

`bench/plan_against_rehearsal.py` lays more and larger layouts side by side.
"""

from __future__ import annotations

from typing import Any

import pytest

from ridgeline.layout.layout import Layout
from ridgeline.ledger import Ledger
from ridgeline.plan.plan import price
from ridgeline.plan.question import question_of_run
from ridgeline.rehearse.rehearse import rehearse
from ridgeline.run import make_run

PARTS = ("weights", "gradients", "optimizer", "activations", "temporary")
AXES = ("tensor", "pipeline", "data", "context", "expert")
SMALL = 0.1
"""Of the stage's tensors: a component that is less is held to that."""
MEMORY, HALVES = 0.03, 0.05
"""Shares of a component that may differ; where a backward pass is split, not all is known of what
waits between its halves."""
LLAMA: dict[str, Any] = {
    "layers": 2, "hidden": 512, "heads": 8, "kv_heads": 4, "ffn_hidden": 1536, "vocab": 4096,
    "max_sequence": 1024,
}  # fmt: skip
GPT = LLAMA | {
    "kv_heads": 8, "ffn_hidden": 2048, "norm": "layernorm", "activation": "gelu", "bias": True,
    "qkv_bias": True, "tied": True, "positions": "learned",
}  # fmt: skip
EXPERTS = LLAMA | {"experts": {"count": 4, "top_k": 2, "ffn_hidden": 1024}}
CASES = (
    (LLAMA, "mb4 fp32", 2),
    (LLAMA, "dp4 mb4 zero3 selective bf16", 2),
    (LLAMA, "dp2 tp2 pp2 mb4 zero1 full bf16", 4),
    (LLAMA, "dp2 cp2 mb4 zero2 bf16", 2),
    (LLAMA, "pp2 mb4 zbh1 bf16", 4),
    (GPT | {"layers": 4}, "dp2 pp2 mb4 v2 zero1 fp16", 4),
    (GPT, "dp2 tp2 mb4 zero3 full bf16", 2),
    (EXPERTS, "dp4 ep2 tp2 mb4 zero1 bf16", 2),
    (EXPERTS, "dp2 mb4 zero3 full bf16", 2),
)
"""Model, layout, micro-batches of a step."""


def ledgers(model: dict[str, Any], sentence: str, micro_batches: int) -> tuple[Ledger, Ledger]:
    """Planned and rehearsed, on as many H100 as the layout says."""
    layout = Layout.model_validate(sentence)
    run = make_run(
        {
            "name": "agrees",
            "model": {"name": "small", **model},
            "layout": sentence,
            "data": {
                "folder": "nowhere",
                "sequence": 1024,
                "corpora": [{"name": "none", "sources": ["none"]}],
            },
            "cluster": {"device": "H100-SXM-80GB", "devices": layout.world},
            "schedule": {"global_batch": micro_batches * layout.data * layout.micro_batch},
            "budget": {"steps": 10},
        }
    )
    return price(question_of_run(run), [layout])[0].ledger, rehearse(run).ledger


@pytest.mark.parametrize(("model", "sentence", "micro_batches"), CASES, ids=lambda v: str(v)[:40])
def test_the_plan_counts_what_the_program_does(
    model: dict[str, Any], sentence: str, micro_batches: int
) -> None:
    planned, rehearsed = ledgers(model, sentence, micro_batches)
    assert planned.hardware_flops_per_device == pytest.approx(
        rehearsed.hardware_flops_per_device, rel=1e-3
    )
    for axis in AXES:
        name = f"{axis}_bytes"
        assert getattr(planned.sent, name) == pytest.approx(
            getattr(rehearsed.sent, name), rel=0.01
        ), axis
    fullest = max(rehearsed.memory, key=lambda stage: stage.total_bytes or 0.0)
    ours = planned.memory[rehearsed.memory.index(fullest)]
    tensors = sum(getattr(fullest, f"{part}_bytes") for part in PARTS)
    share = HALVES if "zb" in sentence else MEMORY
    for part in PARTS:
        name = f"{part}_bytes"
        assert getattr(ours, name) == pytest.approx(
            getattr(fullest, name), rel=share, abs=share * SMALL * tensors
        ), part
