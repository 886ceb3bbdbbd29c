"""Hangs under a launcher and in other layouts: who is late is named once, and the run ends."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from tests.train.test_watchdog import LIMIT_S, hung

from ridgeline.run import Run

MakeRun = Callable[..., Run]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


@pytest.mark.system
@pytest.mark.parametrize(
    ("layout", "kind", "launcher"),
    [
        ("dp2 mb2 fp32", "endless", TORCHRUN),
        ("dp2 mb2 fp32", "stopped", TORCHRUN),
        ("pp2 mb2 fp32", "endless", ()),
        ("tp2 mb2 fp32", "endless", ()),
        ("dp2 mb2 zero3 fp32", "stopped", ()),
    ],
)
def test_the_late_rank_is_named_once(
    layout: str, kind: str, launcher: tuple[str, ...], tiny_run: MakeRun
) -> None:
    run = tiny_run(layout=layout, budget={"steps": 40}, faults={"step_limit_s": LIMIT_S})
    ended = hung(run, kind, *launcher)
    assert len(re.findall(r"late: rank 1 on \S+ \(process \d+\)\n", ended.said)) == 1, ended.said
    assert ended.named_after_s < LIMIT_S + 5, ended.said
    assert ended.status != 0
