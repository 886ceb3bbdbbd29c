"""The planner's vectorised closed forms against the lists of actions themselves."""

from __future__ import annotations

import numpy as np
import pytest

from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import pipeline_schedule
from ridgeline.plan.memory import in_flight
from ridgeline.plan.quantities import Layouts


@pytest.mark.parametrize(
    "words", ["gpipe", "1f1b", "1f1b v2", "1f1b v4", "zbh1", "izb v2", "zbv v2", "dualpipev v2"]
)
def test_memory_counts_at_least_the_activations_the_lists_keep(words: str) -> None:
    for pipeline in (2, 4, 8):
        for rounds in (1, 2, 4):
            layout = Layout.model_validate(f"pp{pipeline} {words}")
            count = rounds * pipeline
            schedule = pipeline_schedule(layout.schedule, pipeline, count, layout.interleave)
            kept = max(schedule.peak_in_flight())
            counted = float(in_flight(Layouts.of([layout]), np.array([float(count)]))[0])
            # Exact, but for interleaved ZB-H1, where the planner allows p - 1 chunks more.
            slack = pipeline - 1 if layout.schedule == "izb" else 0
            assert kept <= counted <= kept + slack
