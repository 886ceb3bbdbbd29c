"""Checkpoint intervals and goodput: papers' figures, the optimum, a simulation, published runs."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import PlanError
from ridgeline.plan.goodput import (
    best_interval_s,
    daly_interval_s,
    expected_s,
    failures_per_device_hour,
    goodput,
    job_mtbf_s,
    young_interval_s,
)

MINUTE, HOUR, DAY = 60.0, 3600.0, 86400.0
mtbfs = st.floats(60, 1e8)
ratios = st.floats(1e-6, 1.99)  # of checkpoint time to mean time between failures


@pytest.mark.parametrize(
    ("mtbf_minutes", "minutes"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)], ids=str
)
def test_daly_as_in_the_papers_figures(mtbf_minutes: float, minutes: float) -> None:
    # Captions of figures 3, 4 and 5: R = 10 min, δ = 5 min, M = 24 h, 6 h and 15 min.
    interval = daly_interval_s(5 * MINUTE, mtbf_minutes * MINUTE) / MINUTE
    assert interval == pytest.approx(minutes, abs=0.5 if minutes > 10 else 0.05)


@given(mtbfs, ratios)
def test_daly_is_within_a_fifth_of_a_percent_of_the_best(mtbf: float, ratio: float) -> None:
    checkpoint = ratio * mtbf
    best = best_interval_s(checkpoint, mtbf)
    shortest = expected_s(1.0, best, checkpoint, 0.0, mtbf)
    for factor in (0.98, 0.999, 1.001, 1.02):
        assert expected_s(1.0, best * factor, checkpoint, 0.0, mtbf) >= shortest * (1 - 1e-12)
    daly = daly_interval_s(checkpoint, mtbf)
    tolerance = 2e-5 if ratio <= 0.5 else 2e-3
    assert expected_s(1.0, daly, checkpoint, 0.0, mtbf) <= shortest * (1 + tolerance)


@given(mtbfs, st.floats(1e-6, 1e-3))
def test_young_daly_and_the_best_meet_where_checkpoints_are_cheap(mtbf: float, r: float) -> None:
    best = best_interval_s(r * mtbf, mtbf)
    assert young_interval_s(r * mtbf, mtbf) == pytest.approx(best, rel=0.02)
    assert daly_interval_s(r * mtbf, mtbf) == pytest.approx(best, rel=1e-4)


@given(mtbfs, ratios, st.floats(0, 2))
def test_goodput_is_a_fraction_that_adds_up(mtbf: float, ratio: float, restart: float) -> None:
    result = goodput(mtbf, ratio * mtbf, restart * mtbf)
    assert 0 < result.fraction < 1
    assert 0 <= result.failure_share < 1
    assert result.fraction + result.checkpoint_share + result.failure_share == pytest.approx(1)
    worse = goodput(mtbf / 2, ratio * mtbf, restart * mtbf)
    assert worse.fraction < result.fraction
    other = goodput(mtbf, ratio * mtbf, restart * mtbf, 1.3 * result.interval_s)
    assert other.fraction <= result.fraction


def test_expected_time_is_what_a_simulated_job_takes() -> None:
    mtbf, checkpoint, restart, interval = 100.0, 7.0, 12.0, 35.0
    chance, pieces, clock = random.Random(5), 20_000, 0.0
    for _ in range(pieces):
        wanted = interval + checkpoint  # this piece, and before it a restart after each failure
        while (until := chance.expovariate(1 / mtbf)) < wanted:
            clock += until
            wanted = restart + interval + checkpoint
        clock += wanted
    expected = expected_s(interval * pieces, interval, checkpoint, restart, mtbf)
    # Restarting and working again are one stretch here, so that a failure in either starts both
    # anew: exactly the model, and 20,000 pieces average to within a percent of it.
    assert clock == pytest.approx(expected, rel=0.01)


def test_hopeless_jobs_have_no_goodput() -> None:
    assert expected_s(1.0, 1e6, 1.0, 0.0, 1.0) == math.inf
    assert goodput(1.0, 1.0, 0.0, 1e6).fraction == 0


def test_llama_3s_interruptions() -> None:
    # arXiv:2407.21783 table 5: 419 unexpected interruptions in 54 days on 16,384 H100.
    rate = failures_per_device_hour(419, 16_384, 54 * DAY)
    assert 1 / rate == pytest.approx(50_677, abs=0.5)  # device-hours, 5.8 device-years
    mtbf = job_mtbf_s(rate, 16_384)
    assert mtbf / HOUR == pytest.approx(3.093, abs=5e-4)
    # "more than 90% effective training time": with checkpoints that block for 10 s, saved every
    # 7.8 minutes, the job may take up to 11.6 minutes from a failure until it trains again.
    result = goodput(mtbf, 10.0, 11.6 * MINUTE)
    assert result.fraction == pytest.approx(0.90, abs=5e-4)
    assert result.interval_s / MINUTE == pytest.approx(7.8, abs=0.05)


def test_opt_175bs_two_months() -> None:
    # arXiv:2205.01068 and its log book: 992 A100, about 33 days of training took 56, 53 restarts.
    mtbf = job_mtbf_s(failures_per_device_hour(53, 992, 56 * DAY), 992)
    assert mtbf / HOUR == pytest.approx(25.4, abs=0.05)
    # 59% uptime: random failures alone do not explain it, even with half an hour per checkpoint
    # and four hours per restart.
    assert pytest.approx(0.59, abs=0.005) == 33 / 56
    assert goodput(mtbf, 30 * MINUTE, 4 * HOUR).fraction > 0.59


@pytest.mark.parametrize(
    ("checkpoint", "mtbf"),
    [(0, 1), (-1, 1), (1, 0), (math.nan, 1), (1, math.nan), (math.inf, 1), (1, math.inf)],
)
def test_absurd_numbers_are_refused_by_name(checkpoint: float, mtbf: float) -> None:
    for interval in (young_interval_s, daly_interval_s, best_interval_s):
        with pytest.raises(PlanError, match=r"checkpoint blocks|between failures"):
            interval(checkpoint, mtbf)
    with pytest.raises(PlanError):
        goodput(mtbf, checkpoint, 1.0)


def test_absurd_restarts_and_rates_are_refused() -> None:
    for restart in (-1.0, math.nan, math.inf):
        with pytest.raises(PlanError, match="restart"):
            goodput(100.0, 1.0, restart)
    with pytest.raises(PlanError, match="between checkpoints"):
        goodput(100.0, 1.0, 1.0, 0.0)
    with pytest.raises(PlanError, match="failures"):
        failures_per_device_hour(0, 8, 1.0)
    with pytest.raises(PlanError, match="device-hour"):
        job_mtbf_s(-1e-5, 8)
    with pytest.raises(PlanError, match="devices"):
        job_mtbf_s(1e-5, 0)
