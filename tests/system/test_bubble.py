"""Processes whose chunks sleep: a rank idles as long as the formulas of its schedule say."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import pytest
from tests.system.sleeping import as_split, time_steps

from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import pipeline_schedule
from ridgeline.plan.timeline import closed_form_bubble_s, even_durations, replay

RANKS = 4
FORWARD_S, INPUT_S, WEIGHT_S = 0.15, 0.18, 0.12
"""Of a rank's layers and one micro-batch: long against what the program does beside sleeping."""
ATTEMPTS = 6
"""A busy machine wakes sleepers late, never early: the best of so many tries counts."""

Bubble = Callable[[int, int, int], float]


def of_1f1b(p: int, m: int, v: int) -> float:
    """arXiv:2104.04473, section 2.2, as a share of the step: (p-1)/(v·m + p-1)."""
    return (p - 1) / (v * m + p - 1)


def of_zbh1(p: int, m: int, v: int) -> float:
    """arXiv:2401.10241, section 3: (p-1)(T_F + T_I - T_W), over v where chunks interleave."""
    idle_s = (p - 1) * (FORWARD_S + INPUT_S - WEIGHT_S) / v
    return idle_s / (m * (FORWARD_S + INPUT_S + WEIGHT_S) + idle_s)


@pytest.mark.system
@pytest.mark.parametrize(
    ("sentence", "micro_batches", "formula"),
    [
        ("gpipe", 4, of_1f1b),
        ("1f1b", 4, of_1f1b),
        ("1f1b", 8, of_1f1b),
        ("1f1b v2", 4, of_1f1b),
        ("zbh1", 4, of_zbh1),
        ("izb v2", 4, of_zbh1),
        # no closed form of so few micro-batches: the replay alone
        ("zbv", 4, None),
        ("dualpipev", 4, None),
    ],
)
def test_a_rank_idles_as_long_as_its_schedule_says(
    sentence: str, micro_batches: int, formula: Bubble | None, pool: Pool
) -> None:
    layout = Layout.model_validate(f"pp{RANKS} {sentence} fp32")
    name, interleave = layout.schedule, layout.interleave
    schedule = pipeline_schedule(name, RANKS, micro_batches, interleave)
    of_rank = (FORWARD_S, INPUT_S, WEIGHT_S)
    of_chunk = tuple(each * RANKS / schedule.chunks for each in of_rank)
    even = even_durations(schedule.chunks, *of_chunk)
    expected = replay(schedule, as_split(even))
    idle = mean(expected.bubble_s) / expected.step_s
    if formula is not None:
        assert idle == pytest.approx(formula(RANKS, micro_batches, interleave))
        closed_s = closed_form_bubble_s(name, RANKS, micro_batches, interleave, *of_chunk)
        assert closed_s == pytest.approx(mean(expected.bubble_s))

    for _ in range(ATTEMPTS):
        told = pool.run(time_steps, (str(layout), micro_batches, even, 2), RANKS)
        steps = [
            (max(rank.step_s for rank in step), mean(rank.busy_s for rank in step))
            for step in zip(*told, strict=True)
        ]
        step_s, busy_s = min(steps)
        if 1 - busy_s / step_s == pytest.approx(idle, rel=0.05):
            break
    assert step_s == pytest.approx(expected.step_s, rel=0.05)
    assert 1 - busy_s / step_s == pytest.approx(idle, rel=0.05)
