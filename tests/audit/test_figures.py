"""Smoothing and the sums behind the figures."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.audit.figures import FEW, charts, smoothed, step_time
from ridgeline.audit.history import read_history


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=300))
def test_smoothing_stays_within_its_values_and_starts_at_the_first(values: list[float]) -> None:
    y = np.array(values)
    smooth = smoothed(y)
    assert smooth[0] == pytest.approx(y[0], abs=1e-9)
    assert smooth.min() >= y.min() - 1e-9 and smooth.max() <= y.max() + 1e-9
    assert len(y) >= FEW or np.allclose(smooth, y)


def test_smoothing_is_a_mean_of_two_percent_and_does_not_lag() -> None:
    y = np.zeros(1000)
    y[500] = 21.0
    assert smoothed(y)[490:511] == pytest.approx(np.ones(21))
    line = np.arange(1000.0)
    assert smoothed(line)[:990] == pytest.approx(line[:990])


def test_smoothing_leaves_gaps_where_they_are_and_out_of_the_mean() -> None:
    y = np.full(200, 4.0)
    y[100] = math.nan
    smooth = smoothed(y)
    assert np.flatnonzero(np.isnan(smooth)).tolist() == [100]
    assert smooth[99] == 4.0


def test_shares_weigh_each_record_by_its_steps_and_count_what_no_phase_explains(
    tmp_path: Path,
) -> None:
    records = [
        {"step": 1, "step_s": 5.0, "seconds": {"data": 5.0}},
        {"step": 10, "step_s": 1.0, "seconds": {"compute": 0.75}},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    chart = step_time(read_history(tmp_path))
    assert chart is not None
    # 14 s in all: 1 step of 5 s on data; 9 steps of 0.75 s computing and 0.25 s unexplained
    shares = {s.name: s.note for s in chart.series}
    assert shares == {"data": "35.7%", "compute": "48.2%", "other": "16.1%"}


def test_every_figure_says_one_sentence(run_folder: Path) -> None:
    drawn = charts(read_history(run_folder))
    assert len(drawn) == 7
    assert all(chart.sentence.endswith(".") for chart in drawn)
