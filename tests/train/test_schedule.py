"""Learning rate and batch: closed forms that equal what a loop would count."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.run import Run, make_run
from ridgeline.train.schedule import (
    batch_at,
    batch_unit,
    first_sample,
    learning_rate,
    run_fraction,
    total_steps,
)


def run_with(batch: int = 8, sequence: int = 16, **changes: Any) -> Run:
    """A run whose schedule is all that matters."""
    schedule = {"global_batch": batch, **changes.pop("schedule", {})}
    model = {"layers": 1, "hidden": 8, "heads": 1, "vocab": 300, "max_sequence": sequence}
    return make_run({"model": model, "schedule": schedule, **changes})


@st.composite
def ramped_runs(draw: st.DrawFn) -> Run:
    start, increment = draw(st.integers(1, 20)), draw(st.integers(1, 9))
    ramp = {"start": start, "increment": increment, "every_steps": draw(st.integers(1, 7))}
    batch = start + increment * draw(st.integers(0, 6))
    return run_with(batch, schedule={"ramp": ramp} if draw(st.booleans()) else {})


@given(run=ramped_runs(), step=st.integers(0, 120))
def test_the_first_sample_is_the_sum_of_all_earlier_batches(run: Run, step: int) -> None:
    assert first_sample(run, step) == sum(batch_at(run, earlier) for earlier in range(step))


@given(run=ramped_runs(), step=st.integers(0, 10**9))
def test_batches_grow_up_to_the_global_batch_in_parts_of_the_unit(run: Run, step: int) -> None:
    batch = batch_at(run, step)
    assert batch <= batch_at(run, step + 1) <= run.global_batch
    assert batch % batch_unit(run) == 0
    assert batch_at(run, 10**9) == run.global_batch


@given(run=ramped_runs(), tokens=st.integers(1, 10**12))
def test_a_budget_of_tokens_is_the_fewest_steps_that_see_them(run: Run, tokens: int) -> None:
    run = run.model_copy(
        update={"budget": run.budget.model_copy(update={"steps": None, "tokens": tokens})}
    )
    steps = total_steps(run)
    assert steps is not None
    assert first_sample(run, steps) * run.sequence >= tokens
    assert first_sample(run, steps - 1) * run.sequence < tokens


def test_a_ramp_by_hand() -> None:
    run = run_with(8, schedule={"ramp": {"start": 2, "increment": 3, "every_steps": 2}})
    assert [batch_at(run, step) for step in range(6)] == [2, 2, 5, 5, 8, 8]
    assert [first_sample(run, step) for step in range(7)] == [0, 2, 4, 9, 14, 22, 30]
    assert batch_unit(run) == 1


def test_a_budget_says_its_steps_or_none_when_it_is_time() -> None:
    assert total_steps(run_with(budget={"steps": 7})) == 7
    assert total_steps(run_with(8, 16, budget={"tokens": 1000})) == 8  # 7.8 steps of 128 tokens
    timed = run_with(budget={"hours": 2})
    assert total_steps(timed) is None
    assert run_fraction(timed, step=10**6, elapsed_s=1800) == 0.25
    assert run_fraction(timed, step=0, elapsed_s=9000) == 1
    assert run_fraction(run_with(budget={"steps": 8}), step=2, elapsed_s=10**9) == 0.25


# Peak 1, 100 steps, 10 of warm-up, final fraction 0.1: (shape, step, rate).
POINTS = [
    ("cosine", 0, 0.1),
    ("cosine", 9, 1.0),
    ("cosine", 10, 1.0),
    ("cosine", 55, 0.55),  # half of the way down: 0.1 + 0.9 / 2
    ("cosine", 100, 0.1),
    ("linear", 4, 0.5),
    ("linear", 10, 1.0),
    ("linear", 55, 0.55),
    ("linear", 82, 0.28),  # 0.1 + 0.9 · 18 / 90
    ("linear", 100, 0.1),
    ("wsd", 9, 1.0),
    ("wsd", 80, 1.0),  # stable up to the last fifth
    ("wsd", 90, 0.55),
    ("wsd", 100, 0.1),
    ("constant", 4, 0.5),
    ("constant", 10, 1.0),
    ("constant", 100, 1.0),
]


@pytest.mark.parametrize(("shape", "step", "rate"), POINTS)
def test_the_learning_rate_at_known_points(shape: str, step: int, rate: float) -> None:
    schedule = {"shape": shape, "warmup_steps": 10, "final_fraction": 0.1, "decay_fraction": 0.2}
    run = run_with(schedule=schedule, budget={"steps": 100}, optimizer={"lr": 1.0})
    assert learning_rate(run, step, step / 100) == pytest.approx(rate, abs=1e-12)


def test_a_quarter_down_the_cosine() -> None:
    run = run_with(
        schedule={"warmup_steps": 0, "final_fraction": 0.0},
        budget={"steps": 100},
        optimizer={"lr": 2.0},
    )
    assert learning_rate(run, 25, 0.25) == pytest.approx(1 + math.cos(math.pi / 4))


@given(
    shape=st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    warmup=st.integers(0, 300),
    steps=st.integers(1, 200),
    final=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)
def test_the_learning_rate_stays_between_zero_and_its_peak_and_only_falls_after_warm_up(
    shape: str, warmup: int, steps: int, final: float, decay: float
) -> None:
    schedule = {
        "shape": shape,
        "warmup_steps": warmup,
        "final_fraction": final,
        "decay_fraction": decay,
    }
    run = run_with(schedule=schedule, budget={"steps": steps}, optimizer={"lr": 3.0})
    rates = [learning_rate(run, step, step / steps) for step in range(steps)]
    assert all(0 <= rate <= 3.0 * (1 + 1e-12) for rate in rates)
    after = rates[warmup:]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(after))


def test_a_budget_of_hours_decays_by_the_clock() -> None:
    run = run_with(
        schedule={"shape": "linear", "warmup_steps": 5, "final_fraction": 0.0},
        budget={"hours": 1.0},
        optimizer={"lr": 1.0},
    )
    assert learning_rate(run, 2, 0.0) == pytest.approx(0.6)
    assert learning_rate(run, 1000, 0.75) == pytest.approx(0.25)
