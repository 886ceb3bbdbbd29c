"""The full table: every kind of model, in layouts that divide it by several axes at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train import layouts

from ridgeline.launch.pool import Pool
from ridgeline.run import Run
from ridgeline.train.parity import parity
from ridgeline.train.parity_text import table

pytestmark = pytest.mark.system
MakeRun = Callable[..., Run]
STEPS = 4

DIVIDED = ("tp2 pp2 mb4 v2", "dp2 tp2 cp2 mb2 zero2", "dp2 tp2 pp2 mb2 zero3 zbh1")
"""For every kind of model."""
COMBINED = (
    *DIVIDED,
    *("dp2 cp2 mb2 zero3/2", "cp2 pp2 mb4", "cp2 tp2 pp2 mb4 zbv full"),
    *("dp4 pp2 mb1 zero2/2 dualpipev", "dp2 tp2 mb2 zero3 selective"),
)
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dense": (layouts.DENSE, (*COMBINED, "tp4 pp2 mb4", "cp8 mb8")),
    "gpt": (layouts.GPT, (*DIVIDED, "tp4 mb8", "dp2 pp4 mb1 zero2")),
    "qwen": (layouts.QWEN, (*DIVIDED, "cp4 mb8")),
    "few-heads": (layouts.FEW_HEADS, (*DIVIDED, "cp4 tp2 mb8", "cp8 mb4 zero3")),
    "mixture": (
        layouts.MIXTURE,
        (
            *DIVIDED,
            *("dp4 ep2 mb2 zero3/2", "dp4 ep4 mb1 zero2", "dp2 cp2 ep4 mb2 zero3"),
            *("dp2 cp2 tp2 ep2 mb2 zero1 selective", "dp2 pp2 ep2 mb2 zero3 izb v2"),
        ),
    ),
}
SCHEDULES = ("gpipe", "1f1b", "v2", "zbh1", "izb v2", "zbv", "dualpipev")
ORDERS = ("tp-cp-dp-pp", "cp-tp-pp-dp")


@pytest.mark.parametrize("name", MODELS)
def test_every_layout_of_every_model_is_the_model_of_one_process(
    name: str, make_tiny_run: MakeRun, tmp_path: Path, pool: Pool
) -> None:
    model, divided = MODELS[name]
    run = layouts.table_run(make_tiny_run, tmp_path, model)
    found = parity(run, divided, STEPS, pool=pool)
    assert found.equal, table(found)
    assert found.learnt_nats >= 0.25


def test_every_schedule_is_the_same_model_under_zero3(
    make_tiny_run: MakeRun, tmp_path: Path, pool: Pool
) -> None:
    run = layouts.table_run(make_tiny_run, tmp_path, layouts.GPT)
    divided = [f"dp2 pp2 mb1 {schedule} zero3" for schedule in SCHEDULES]
    found = parity(run, divided, STEPS, pool=pool)
    assert found.equal, table(found)


def test_ranks_in_another_order_are_the_same_model(
    make_tiny_run: MakeRun, tmp_path: Path, pool: Pool
) -> None:
    run = layouts.table_run(make_tiny_run, tmp_path, layouts.MIXTURE)
    divided = ["dp2 tp2 pp2 ep2 mb2 zero2 dp-pp-tp-cp"]
    divided += [f"dp2 cp2 tp2 ep4 mb2 {order}" for order in ORDERS]
    divided += ["dp2 cp2 tp2 mb2 zero3/2 tp-cp-dp-pp"]
    found = parity(run, divided, STEPS, pool=pool)
    assert found.equal, table(found)


def test_compiled_blocks_are_the_same_model(
    make_tiny_run: MakeRun, tmp_path: Path, pool: Pool
) -> None:
    run = layouts.table_run(make_tiny_run, tmp_path, layouts.DENSE)
    divided = ("mb4 compile", "dp2 mb2 zero3 compile", "tp2 mb4 compile", "pp2 mb4 full compile")
    found = parity(run, divided, STEPS, pool=pool)
    assert found.equal, table(found)


# Not of a mixture: a rounding in bf16 can send a token to another expert, which is no small change.
def test_bf16_agrees_within_what_its_eight_bits_explain_in_every_layout(
    make_tiny_run: MakeRun, tmp_path: Path, pool: Pool
) -> None:
    run = layouts.table_run(make_tiny_run, tmp_path, layouts.DENSE, layout="mb4 bf16", lr=5e-3)
    found = parity(run, DIVIDED, STEPS, pool=pool)
    assert found.equal, table(found)
    assert found.learnt_nats >= 0.25


def test_the_usual_layouts_of_a_mixture_divide_its_experts(
    make_tiny_run: MakeRun, tmp_path: Path, pool: Pool
) -> None:
    run = layouts.table_run(make_tiny_run, tmp_path, layouts.MIXTURE)
    found = parity(run, steps=2, pool=pool)
    assert found.equal, table(found)
    assert not found.skipped
    assert "dp2 tp2 pp2 ep2 mb2 fp32" in [each.layout for each in found.layouts]
