"""Thinning keeps what a reader must see; ticks and drawings are right by construction."""

from __future__ import annotations

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline import human
from ridgeline.audit.plots import (
    Chart,
    FloatArray,
    Reference,
    Series,
    figure,
    keep_extremes,
    nice_ticks,
    share_bar,
    tick_labels,
)

CURVES = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=120)


def chart_of(y: list[float], from_zero: bool = True) -> Chart:
    x = np.arange(1.0, len(y) + 1)
    curve = Series("curve", x, np.array(y, dtype=np.float64), 0)
    return Chart("Title", "unit", "Sentence.", [curve], human.fixed, from_zero=from_zero)


def curve_of(chart: Chart, last_step: float) -> str:
    path = ElementTree.fromstring(figure(chart, last_step)).find(".//svg/svg/path")
    assert path is not None
    return path.attrib["d"]


@given(CURVES, st.integers(1, 12))
def test_thinning_keeps_ends_extremes_and_gaps_of_every_bucket(
    values: list[float], buckets: int
) -> None:
    x, y = np.arange(float(len(values))), np.array(values)
    kept = keep_extremes(x, y, buckets=buckets)
    assert list(kept) == sorted(set(kept.tolist()))
    assert kept[0] == 0 and kept[-1] == len(y) - 1
    assert len(kept) <= 2 + 3 * buckets
    assert np.isnan(y[kept]).any() == np.isnan(y).any()
    if np.isfinite(y).any():
        assert np.nanmax(y[kept]) == np.nanmax(y)
        assert np.nanmin(y[kept]) == np.nanmin(y)


def test_a_spike_of_one_step_in_a_million_survives_in_each_column() -> None:
    x = np.arange(1e6)
    up, down = np.zeros_like(x), np.zeros_like(x)
    up[123_457], down[765_432] = 9.0, -9.0
    kept = keep_extremes(x, up, down)
    assert {123_457, 765_432} <= set(kept.tolist())
    assert len(kept) < 2500


def test_buckets_divide_the_steps_and_not_the_records() -> None:
    """A run that logged every step at first and every 1,000th later keeps its late spike."""
    x = np.concatenate([np.arange(2000.0), np.arange(2000.0, 1e6, 1000)])
    y = np.zeros_like(x)
    y[2900], y[2901] = 5.0, -5.0
    assert {2900, 2901} <= set(keep_extremes(x, y).tolist())


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(3, 8))
def test_ticks_lie_inside_are_evenly_spaced_and_about_as_many_as_asked(
    low: float, extent: float, about: int
) -> None:
    high = low + extent
    ticks = nice_ticks(low, high, about)
    slack = 1e-6 * (high - low) + 1e-9 * abs(low)
    assert all(low - slack <= t <= high + slack for t in ticks)
    if extent > 1e-6 * abs(low):
        assert about // 2 - 1 <= len(ticks) <= about + 1
        assert np.allclose(np.diff(ticks, n=2), 0, atol=slack)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0, 10_000, ["0", "2k", "4k", "6k", "8k", "10k"]),
        (0, 11_500, ["0", "2.5k", "5.0k", "7.5k", "10.0k"]),
        (3.1, 9.0, ["4", "6", "8"]),
        (0, 600, ["0", "200", "400", "600"]),
        (0, 3e-4, ["0", "1e-4", "2e-4", "3e-4"]),
        (2.8, 3.9, ["3.00", "3.25", "3.50", "3.75"]),
    ],
)
def test_tick_labels(low: float, high: float, labels: list[str]) -> None:
    assert tick_labels(nice_ticks(low, high)) == labels


def test_a_curve_is_drawn_from_left_to_right_in_a_box_of_4000_by_1000() -> None:
    chart = chart_of([1.0, 2.0])  # the axis goes from 0 to 2 plus 6%
    assert curve_of(chart, 2) == "M2000,528h0L4000,57"


def test_a_value_that_is_not_finite_breaks_the_curve() -> None:
    assert curve_of(chart_of([1, 2, math.nan, 2, 1]), 5).count("M") == 2


def test_a_single_point_and_a_flat_curve_still_show() -> None:
    assert "M" in curve_of(chart_of([3.0]), 1)
    assert "L" in curve_of(chart_of([0.0, 0.0], from_zero=False), 2)


def test_a_huge_spike_turns_the_axis_logarithmic_so_that_the_rest_is_seen() -> None:
    y = [1.0, 1.1] * 50 + [900.0]
    heights = [int(p.split(",")[1].split("h")[0]) for p in _points(curve_of(chart_of(y), 101))]
    assert max(heights) - min(heights[:-1]) > 10  # 1.0 and 1.1 lie apart, though 900 is in sight


def _points(path: str) -> list[str]:
    return path.removeprefix("M").split("L")


def test_the_figure_is_well_formed_whatever_its_names_hold() -> None:
    nasty = '<script>alert("x")</script>&\''
    x: FloatArray = np.array([1.0, 2.0])
    series = [Series(nasty, x, x, 0, "line", nasty), Series(nasty, x, x, 0, "points", nasty)]
    chart = Chart(nasty, nasty, nasty, series, human.fixed, [Reference(nasty, 1.5)])
    tree = ElementTree.fromstring(figure(chart, 2))
    assert tree.find(".//script") is None
    assert tree.findtext(".//figcaption/p") == nasty
    assert ElementTree.fromstring(share_bar([(nasty, 1.0, 0)])).findtext(".//title")


def test_bands_stack_and_hovering_tells_each_its_own_value() -> None:
    x: FloatArray = np.array([1.0, 2.0])
    parts = [Series(n, x, np.full(2, v), 0, "band") for n, v in (("a", 1.0), ("b", 3.0))]
    tree = ElementTree.fromstring(figure(Chart("T", "s", "S.", parts, human.fixed), 2))
    data = json.loads(tree.attrib["data-chart"])
    assert [one["text"] for one in data["series"]] == ["1.000|1.000", "3.000|3.000"]
    lower, upper = (one["y"][0] for one in data["series"])
    assert (1000 - upper) == pytest.approx(4 * (1000 - lower), abs=4)
    assert data["end"] == 2


def test_the_legend_holds_the_last_known_value_without_any_script() -> None:
    tree = ElementTree.fromstring(figure(chart_of([5.0, 4.0, math.nan]), 3))
    assert [o.text for o in tree.findall(".//ul[@class='legend']/li/output")] == ["3", "4.000"]
