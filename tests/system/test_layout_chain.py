"""One run that moves through many layouts, from 8 processes to 1 and back, by its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tests.train import layouts

import ridgeline
from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.model.decoder import Decoder
from ridgeline.run import Run
from ridgeline.train.optimizer import adamw
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import work

MakeRun = Callable[..., Run]
STEPS = 2
"""In each layout."""
CHAINS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "dense": (
        layouts.DENSE,
        (
            *("dp2 tp2 pp2 mb2 zero3", "dp2 cp2 mb2 zero3/2", "pp2 mb2 v2", "mb4", "tp2 mb4"),
            *("dp4 mb1 zero2", "cp2 tp2 pp2 mb4 zbv", "tp2 cp2 mb8", "dp2 mb1 zero1"),
        ),
    ),
    "mixture": (
        layouts.MIXTURE,
        ("dp2 ep2 tp2 pp2 mb2", "dp4 ep4 mb2", "pp2 mb2", "mb4", "dp2 cp2 ep4 mb2 zero3"),
    ),
}


@pytest.mark.system
@pytest.mark.parametrize("name", CHAINS)
def test_a_run_that_moves_through_layouts_is_the_run_of_one_process(
    name: str, tiny_run: MakeRun, pool: Pool, rows_of: Callable[..., Any]
) -> None:
    model, chain = CHAINS[name]
    changes = {"model": model, "schedule": {"shape": "constant"}, "optimizer": {"lr": 2e-3}}
    steps = STEPS * len(chain)
    alone = tiny_run(**changes, name="alone", budget={"steps": steps})
    ridgeline.train(alone)
    for number, layout in enumerate(chain, start=1):
        budget = {"steps": STEPS * number}
        moved = tiny_run(**changes, layout=f"{layout} fp32", budget=budget)
        assert isinstance(moved.layout, Layout)
        moved.path.mkdir(parents=True, exist_ok=True)
        outcomes = pool.run(work, (moved, Decoder, token_loss, adamw), moved.layout.world)
        assert {outcome.step for outcome in outcomes} == {STEPS * number}
    for field, close in (("loss", 1e-5), ("grad_norm", 1e-4)):
        told = [[row[field] for row in rows_of(run, "loss")] for run in (moved, alone)]
        assert told[0] == pytest.approx(told[1], rel=close), field
    assert len(told[0]) == steps
