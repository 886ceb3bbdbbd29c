"""The whole program of a rank in one layout, and then in another from its checkpoint.

Losses, held-out losses and what is saved are those of one process that trains all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import ridgeline
from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.model.decoder import Decoder
from ridgeline.run import Run
from ridgeline.train.optimizer import adamw
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import Outcome, work

MakeRun = Callable[..., Run]
RowsOf = Callable[..., list[dict[str, Any]]]
HALF, WHOLE = {"steps": 4}, {"steps": 8}
CHANGES: dict[str, Any] = {
    # An odd vocabulary over tensor ranks; held-out sequences that dp2 and dp4 do not divide.
    "model": {"tied": True, "layers": 4, "vocab": 321},
    "schedule": {"shape": "constant"},
    "evaluation": {"sequences": 5, "every_steps": 4},
    "checkpoint": {"every_steps": 4},
}
CHAINS = [
    ("dp2 mb2", "pp2 v2 mb2"),
    ("pp2 mb1 zbv", "dp2 tp2 mb2 zero3"),
    ("tp2 cp2 mb4", "pp4 mb1 izb"),
    ("tp2 pp2 mb2 zbh1 full", "dp4 mb1 zero2/2 selective"),
    ("dp2 cp2 mb2 zero1", "mb4 dualpipev"),
]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, make_tiny_run: MakeRun) -> tuple[Run, Outcome]:
    """Trained by one process, without a stop."""
    run = make_tiny_run(tmp_path_factory.mktemp("one"), **CHANGES, budget=WHOLE)
    return run, ridgeline.train(run)


@pytest.mark.parametrize(("first", "second"), CHAINS, ids=[" then ".join(c) for c in CHAINS])
def test_two_layouts_one_after_another_are_one_process(
    first: str,
    second: str,
    one: tuple[Run, Outcome],
    tiny_run: MakeRun,
    rows_of: RowsOf,
    pool: Pool,
) -> None:
    alone, expected = one
    for layout, budget in ((first, HALF), (second, WHOLE)):
        run = tiny_run(**CHANGES, layout=f"{layout} fp32", budget=budget)
        assert isinstance(run.layout, Layout)
        run.path.mkdir(parents=True, exist_ok=True)
        outcomes = pool.run(work, (run, Decoder, token_loss, adamw), run.layout.world)
    for outcome in outcomes:
        assert outcome.complete
        assert (outcome.step, outcome.tokens) == (8, 8 * 8 * 32)
        assert outcome.held_out_loss == pytest.approx(expected.held_out_loss, rel=1e-5)
    for name, close in (("loss", 1e-5), ("grad_norm", 1e-4), ("held_out_loss", 1e-5)):
        told = [[row[name] for row in rows_of(each, name)] for each in (run, alone)]
        assert told[0] == pytest.approx(told[1], rel=close), name
    assert [row["step"] for row in rows_of(run, "loss")] == list(range(1, 9))
