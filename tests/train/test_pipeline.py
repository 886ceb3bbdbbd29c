"""The program of a pipeline rank agrees with the chunks it is given."""

from __future__ import annotations

from typing import get_args

import pytest

from ridgeline.layout.layout import Layout, Schedule
from ridgeline.layout.schedules import Action
from ridgeline.layout.stages import chunks_of
from ridgeline.model.shape import ModelShape
from ridgeline.train.pipeline import steps_of

SHAPE = ModelShape(layers=8, hidden=32, heads=4, vocab=64, max_sequence=32)


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_each_chunk_of_the_cut_is_worked_on_by_one_rank(schedule: Schedule, pipeline: int) -> None:
    layout = Layout(pipeline=pipeline, schedule=schedule)
    homes = []
    for rank in range(pipeline):
        steps = steps_of(layout, rank, 4, True)
        homes.append({step.chunk for step in steps if isinstance(step, Action)})
    worked_on = sorted(chunk for home in homes for chunk in home)
    assert worked_on == [chunk.index for chunk in chunks_of(layout, SHAPE, 32)]


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_without_a_pipeline_each_micro_batch_goes_forward_and_back(schedule: Schedule) -> None:
    expected = [Action(kind, 0, k) for k in range(3) for kind in ("F", "B")]
    assert list(steps_of(Layout(schedule=schedule), 0, 3, True)) == expected
