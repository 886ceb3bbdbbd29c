"""When checkpoints are due: by the step, or as the cost of one and the failure rate say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ridgeline.errors import RunError
from ridgeline.plan.goodput import daly_interval_s
from ridgeline.run import Run
from ridgeline.train.interval import ASSUMED_COST_S, Beside, Interval, check_interval, mtbf_s

AUTO: dict[str, Any] = {"checkpoint": {"every_steps": "auto"}}


def test_a_fixed_interval_counts_steps(tiny_run: Callable[..., Run]) -> None:
    interval = Interval.of(tiny_run(checkpoint={"every_steps": 3}), 0.0)
    assert [step for step in range(1, 10) if interval.due(step, 1e6)] == [3, 6, 9]
    never = Interval.of(tiny_run(checkpoint={"every_steps": 0}), 0.0)
    assert not any(never.due(step, 1e6) for step in range(1, 10))


def test_the_interval_follows_the_measured_cost(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run(**AUTO, cluster={"mtbf_hours": 2.0})
    interval = Interval.of(run, elapsed_s=100.0)
    first = daly_interval_s(ASSUMED_COST_S, 7200.0)
    assert not interval.due(7, 100.0 + first - 1)
    assert interval.due(7, 100.0 + first + 1)
    interval.saved(500.0, 0.5, 3.0)
    cheaper = daly_interval_s(0.5, 7200.0)
    assert cheaper < first / 4
    assert not interval.due(8, 500.0 + cheaper - 1)
    assert interval.due(8, 500.0 + cheaper + 1)
    interval.saved(600.0, 0.5, 900.0)  # no more often than the writing keeps up with
    assert not interval.due(9, 600.0 + 899.0)


def test_the_failure_rate_is_the_catalogues_unless_the_run_says(
    tiny_run: Callable[..., Run],
) -> None:
    cluster = {"device": "H100-SXM-80GB"}
    small = tiny_run(cluster={**cluster, "devices": 1}, layout="dp1 mb4")
    assert mtbf_s(tiny_run()) is None
    rate = mtbf_s(small)
    assert rate is None or rate > 3600.0
    assert mtbf_s(tiny_run(cluster={**cluster, "mtbf_hours": 3.0})) == 3 * 3600.0


def test_an_interval_without_a_failure_rate_is_refused(tiny_run: Callable[..., Run]) -> None:
    with pytest.raises(RunError, match="no failure rate of 'local'"):
        check_interval(tiny_run(**AUTO))
    check_interval(tiny_run())


def test_slower_steps_beside_a_writing_are_counted() -> None:
    beside = Beside()
    assert beside.take() == (0.0, None)
    for _ in range(10):
        beside.step(1.0, writing=False)
    for _ in range(4):
        beside.step(1.5, writing=True)
    lost_s, slower = beside.take()
    assert lost_s == pytest.approx(2.0)
    assert slower == pytest.approx(0.5)
    assert beside.take() == (0.0, None)
