"""Sensitivity, scaling and what they must add up to."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.cli import verbs
from ridgeline.layout.layout import Layout
from ridgeline.model.catalogue import entry
from ridgeline.plan.cost import Rates
from ridgeline.plan.explore import (
    KNOBS,
    chunk_durations,
    draw_step,
    pareto,
    scaling,
    sensitivity,
    shapley,
)
from ridgeline.plan.plan import price
from ridgeline.plan.question import Question, question
from ridgeline.plan.timeline import replay
from ridgeline.plan.timeline_picture import replayable


def small() -> Question:
    """A quick question."""
    return question(entry("gpt2-xl").shape, "16xA100", batch_tokens=2**19)


@given(st.lists(st.floats(0.1, 5), min_size=3, max_size=3))
def test_shapley_effects_of_a_sum_are_the_shares_of_its_terms(scales: list[float]) -> None:
    """Independent terms: each explains its own variance, in whatever order it is asked."""
    grid = np.array(list(itertools.product(range(3), repeat=3)))
    columns = {f"x{i}": grid[:, i].astype(np.intp) for i in range(3)}
    found = shapley(columns, grid @ np.array(scales))
    total = sum(scale**2 for scale in scales)
    for i, scale in enumerate(scales):
        assert found[f"x{i}"] == pytest.approx(scale**2 / total)


def test_shapley_effects_split_what_two_explain_together() -> None:
    """A product of two signs has no effect of either alone: half each; a third knob has none."""
    grid = np.array(list(itertools.product((0, 1), repeat=3)))
    columns = {f"x{i}": grid[:, i].astype(np.intp) for i in range(3)}
    signs = 2.0 * grid - 1
    found = shapley(columns, signs[:, 0] * signs[:, 1])
    assert found == pytest.approx({"x0": 0.5, "x1": 0.5, "x2": 0.0})


def test_knobs_explain_nearly_all_of_the_space() -> None:
    """What is left is the shard group's and expert parallelism's."""
    found = sensitivity(small())
    assert set(found.shares) == set(KNOBS)
    assert 0.9 < sum(found.shares.values()) <= 1 + 1e-9
    assert all(share >= -1e-9 for share in found.shares.values())
    assert found.fastest_s < found.slowest_s


def test_strong_scaling_is_faster_and_less_efficient() -> None:
    points = scaling(small(), [4, 8, 16, 32])
    assert [each.devices for each in points] == [4, 8, 16, 32]
    steps = [each.best.step_s for each in points]
    assert steps == sorted(steps, reverse=True)
    assert points[0].efficiency == 1
    assert all(later.efficiency <= 1.02 for later in points)
    assert pareto(points) == points


def test_a_machine_that_fails_too_often_is_off_the_front() -> None:
    """More tokens a second, yet later done: the larger machine stops too often to be worth it."""
    prices = Rates(failures_per_device_hour=0.02, checkpoint_s=300, restart_s=1800)
    asked = replace(small(), prices=prices)
    points = scaling(asked, [8, 256], weak=False)
    few, many = points
    assert many.best.tokens_per_s > few.best.tokens_per_s
    assert few.best.train_s is not None and many.best.train_s is not None
    assert many.best.train_s > few.best.train_s
    assert pareto(points) == [few]


def test_every_option_answers_in_json_too(tmp_path: Path) -> None:
    svg, trace = tmp_path / "step.svg", tmp_path / "step.json"
    words = ["plan", "gpt2-xl", "--on", "16xA100", "--batch", "524288", "--top", "2", "--json"]
    words += ["--sensitivity", "--scale", "8,16", "--explain"]
    result = CliRunner().invoke(verbs, [*words, "--picture", str(svg), "--trace", str(trace)])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.output)
    assert list(found)[-3:] == ["ledger", "sensitivity", "scaling"]
    assert found["ledger"]["seconds"]["total_s"] == found["layouts"][0]["step_s"]
    assert set(found["sensitivity"]["shares"]) == set(KNOBS)
    assert [each["devices"] for each in found["scaling"]] == [8, 16]
    assert found["scaling"][0]["pareto"] and found["scaling"][0]["efficiency"] == 1
    assert svg.is_file() and trace.is_file()


def test_a_picture_of_a_deep_pipeline_shows_as_much_as_it_can(tmp_path: Path) -> None:
    asked = question(entry("llama3.1-405b").shape, "2048xH100", batch_tokens=2**24)
    svg = tmp_path / "step.svg"
    draw_step(asked, Layout.model_validate("dp8 tp4 pp64 zbh1 bf16"), svg)
    bars = svg.read_text(encoding="utf-8").count('class="k')
    assert 9_000 < bars <= 10_000


def test_weak_scaling_keeps_the_work_per_device() -> None:
    points = scaling(small(), [16, 64], weak=True)
    assert points[1].global_batch == 4 * points[0].global_batch
    assert 0.8 < points[1].efficiency <= 1.02


def test_sizes_that_nothing_divides_are_left_out() -> None:
    assert [each.devices for each in scaling(small(), [16, 53])] == [16]


def test_the_command_prints_both() -> None:
    words = ["plan", "gpt2-xl", "--on", "16xA100", "--batch", "524288", "--sensitivity"]
    result = CliRunner().invoke(verbs, [*words, "--scale", "8,16"])
    assert result.exit_code == 0, result.exception
    assert "what makes layouts slow" in result.output
    assert "efficiency" in result.output


def test_the_step_is_drawn_with_its_own_seconds(tmp_path: Path) -> None:
    asked = question(entry("llama2-7b").shape, "16xA100", batch_tokens=2**20, sequence=4096)
    layout = Layout.model_validate("dp2 pp8 zero1 bf16")
    svg, trace = tmp_path / "step.svg", tmp_path / "step.json"
    words = draw_step(asked, layout, svg, trace)
    assert svg.read_text(encoding="utf-8").startswith("<svg")
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert "8 ranks, 128 micro-batches" in words
    # the replay has no reduction of gradients, optimizer or slow node
    drawn = replay_seconds(json.loads(trace.read_text(encoding="utf-8")))
    step = price(asked, [layout])[0]
    beside = (step.ledger.seconds.data_s or 0) + (step.ledger.seconds.optimizer_s or 0)
    assert drawn == pytest.approx(step.step_s - beside, rel=0.03)


@pytest.mark.parametrize("sentence", ["dp2 pp5 bf16", "dp2 pp6 bf16", "dp2 pp7 zbh1 bf16"])
def test_the_replay_of_uneven_stages_agrees_with_the_closed_form(sentence: str) -> None:
    """32 layers over 5, 6 and 7 stages: the slowest works through all, the others wait for it."""
    layout = Layout.model_validate(sentence)
    on = f"{layout.world}xA100"
    asked = question(entry("llama2-7b").shape, on, batch_tokens=2**20, sequence=4096)
    durations = chunk_durations(asked, layout, layout.pipeline)
    assert max(durations.forward_s) > 1.1 * min(durations.forward_s)
    replayed = replay(replayable(layout, 128), durations).step_s
    step = price(asked, [layout])[0]
    beside = (step.ledger.seconds.data_s or 0) + (step.ledger.seconds.optimizer_s or 0)
    assert replayed == pytest.approx(step.step_s - beside, rel=0.03)


def replay_seconds(trace: dict[str, list[dict[str, float]]]) -> float:
    """When the last action of a trace ends."""
    spans = [each for each in trace["traceEvents"] if "dur" in each]
    return max(each["ts"] + each["dur"] for each in spans) / 1e6
