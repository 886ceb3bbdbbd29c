"""The replay: closed forms, uneven stages by hand, waiting, deadlock, idle time."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.cli import verbs
from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Schedule
from ridgeline.layout.schedules import Action, PipelineSchedule, pipeline_schedule
from ridgeline.plan.timeline import Durations, closed_form_bubble_s, even_durations, replay
from ridgeline.plan.timeline_picture import timeline_svg, timeline_trace

seconds = st.floats(0.1, 2.0)
ranks = st.integers(1, 8)


@given(st.sampled_from(["gpipe", "1f1b"]), ranks, st.integers(1, 32), seconds, seconds, seconds)
def test_bubble_of_gpipe_and_1f1b_is_p_minus_1_micro_batches(
    name: Schedule, pipeline: int, count: int, f: float, i: float, w: float
) -> None:
    schedule = pipeline_schedule(name, pipeline, count)
    timeline = replay(schedule, even_durations(pipeline, f, i, w))
    assert timeline.bubble_of_ideal == pytest.approx((pipeline - 1) / count, abs=1e-9)
    closed = closed_form_bubble_s(name, pipeline, count, 1, f, i, w)
    assert timeline.bubble_s == pytest.approx((closed,) * pipeline, abs=1e-9)


@given(ranks, st.integers(1, 4), st.integers(2, 4), seconds, seconds, seconds)
def test_interleaving_divides_the_bubble_by_v(
    pipeline: int, rounds: int, interleave: int, f: float, i: float, w: float
) -> None:
    schedule = pipeline_schedule("1f1b", pipeline, rounds * pipeline, interleave)
    timeline = replay(schedule, even_durations(schedule.chunks, f, i, w))
    ideal = (pipeline - 1) / (interleave * rounds * pipeline)
    assert timeline.bubble_of_ideal == pytest.approx(ideal, abs=1e-9)


@given(ranks, st.integers(1, 3), st.integers(1, 3), seconds, seconds, st.floats(0.05, 1))
def test_zero_bubble_h1_fills_two_thirds_of_it(
    pipeline: int, rounds: int, interleave: int, f: float, i: float, share: float
) -> None:
    w = share * min(f, i)
    name: Schedule = "izb" if interleave > 1 else "zbh1"
    schedule = pipeline_schedule(name, pipeline, rounds * pipeline, interleave)
    timeline = replay(schedule, even_durations(schedule.chunks, f, i, w))
    expected = (pipeline - 1) * (f + i - w)
    assert timeline.bubble_s == pytest.approx((expected,) * pipeline, abs=1e-9)
    closed = closed_form_bubble_s(name, pipeline, rounds * pipeline, interleave, f, i, w)
    assert closed == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("pipeline", [2, 3, 4, 8])
def test_folded_schedules_leave_only_the_slant_of_starting(pipeline: int) -> None:
    for count in (2 * pipeline, 2 * pipeline + 3, 32):
        zbv = replay(
            pipeline_schedule("zbv", pipeline, count), even_durations(2 * pipeline, 1, 1, 1)
        )
        assert zbv.inner_bubble_s == (0.0,) * pipeline
        for name in ("zbv", "dualpipev"):
            timeline = replay(
                pipeline_schedule(name, pipeline, count),
                even_durations(2 * pipeline, 1, 1, 1),
            )
            closed = closed_form_bubble_s(name, pipeline, count, 2, 1, 1, 1)
            assert timeline.bubble_s == (closed,) * pipeline == (pipeline - 1.0,) * pipeline


@given(
    st.sampled_from(["zbv", "dualpipev"]),
    ranks,
    st.integers(0, 16),
    st.floats(1, 3),
    st.floats(0.05, 1.3),
)
def test_folded_schedules_where_backward_is_the_slower(
    name: Schedule, pipeline: int, more: int, i: float, share: float
) -> None:
    w = share * i if name == "zbv" else min(share, 1) * i
    count = 2 * pipeline + more
    timeline = replay(
        pipeline_schedule(name, pipeline, count), even_durations(2 * pipeline, 1, i, w)
    )
    closed = closed_form_bubble_s(name, pipeline, count, 2, 1.0, i, w)
    assert timeline.bubble_s == pytest.approx((closed,) * pipeline, abs=1e-9)


def test_no_closed_form_is_claimed_where_none_is_known() -> None:
    assert closed_form_bubble_s("zbh1", 4, 8, 1, 1.0, 1.0, 1.2) is None
    assert closed_form_bubble_s("zbv", 4, 8, 2, 1.1, 1.0, 1.0) is None
    assert closed_form_bubble_s("zbv", 4, 7, 2, 1.0, 1.0, 1.0) is None
    assert closed_form_bubble_s("dualpipev", 4, 8, 2, 1.0, 1.0, 1.2) is None
    assert closed_form_bubble_s("1f1b", 4, 6, 2, 1.0, 1.0, 1.0) is None


def test_uneven_stages_by_hand() -> None:
    # Two stages, forward 1 and 3 s, backward 2 and 6 s, two micro-batches, 0.5 s to send.
    # Rank 0: F 0-1, F 1-2; rank 1: F 1.5-4.5, B 4.5-10.5, F 10.5-13.5, B 13.5-19.5;
    # the gradients arrive at 11 and 20: rank 0: B 11-13, B 20-22.
    durations = Durations((1, 3), (1, 4), (1, 2), send_s=0.5)
    timeline = replay(pipeline_schedule("1f1b", 2, 2), durations)
    assert [(start, end) for _, start, end in timeline.spans[0]] == [
        (0, 1),
        (1, 2),
        (11, 13),
        (20, 22),
    ]
    assert timeline.step_s == 22
    assert timeline.busy_s == (6, 18)
    assert timeline.bubble_s == (16, 4)
    assert timeline.inner_bubble_s == (16, 0)


def test_fugaku_llms_seven_micro_batches_leave_half_the_step_idle() -> None:
    # github.com/Fugaku-LLM/DeepSpeedFugaku scripts/13b: 8 stages, 2016/288 = 7 micro-batches.
    timeline = replay(pipeline_schedule("1f1b", 8, 2016 // 288), even_durations(8, 1, 1, 1))
    assert timeline.bubble_s[0] / timeline.step_s == pytest.approx(0.5)


@given(st.sampled_from(["1f1b", "zbh1", "zbv", "dualpipev"]), ranks, st.integers(1, 12), st.data())
def test_nothing_runs_before_what_it_waits_for(
    name: Schedule, pipeline: int, count: int, data: st.DataObject
) -> None:
    schedule = pipeline_schedule(name, pipeline, count)
    n = schedule.chunks
    one = st.lists(seconds, min_size=n, max_size=n).map(tuple)
    durations = data.draw(st.builds(Durations, one, one, one, st.floats(0, 1)))
    timeline = replay(schedule, durations)
    starts, ends = {}, {}
    for rank in timeline.spans:
        clock = 0.0
        for action, start, end in rank:
            assert start >= clock
            assert end == pytest.approx(start + durations.of(action))
            starts[action], ends[action], clock = start, end, end
    for (kind, chunk, k), start in starts.items():
        if kind == "F" and chunk:
            assert start >= ends[Action("F", chunk - 1, k)]
        if kind == "W":
            assert start >= ends[Action("I", chunk, k)]
        if kind in "BI":
            assert start >= ends[Action("F", chunk, k)]
            if chunk + 1 < schedule.chunks:
                after = [ends.get(Action("B", chunk + 1, k)), ends.get(Action("I", chunk + 1, k))]
                assert start >= next(end for end in after if end is not None)
    assert timeline.step_s >= max(timeline.busy_s) * (1 - 1e-12)


def test_lists_that_wait_for_each_other_are_named() -> None:
    def both(rank: int, micro_batches: tuple[int, int]) -> tuple[Action, ...]:
        forwards = tuple(Action("F", rank, k) for k in micro_batches)
        return forwards + tuple(Action("B", rank, k) for k in micro_batches)

    crossed = PipelineSchedule(
        "mine",
        2,
        (0, 1),
        (
            (Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1)),
            both(1, (0, 1)),
        ),
    )
    with pytest.raises(LayoutError, match=r"rank 0 at 0B0, rank 1 at 1F1"):
        replay(crossed, even_durations(2, 1, 1, 1))


@pytest.mark.parametrize(
    "durations",
    [
        even_durations(3, 1, 1, 1),
        even_durations(2, math.nan, 1, 1),
        even_durations(2, 1, -1, 1),
        even_durations(2, 1, 1, math.inf),
        even_durations(2, 1, 1, 1, send_s=-0.1),
        even_durations(2, 0, 0, 0),
    ],
)
def test_absurd_durations_are_refused(durations: Durations) -> None:
    with pytest.raises(LayoutError):
        replay(pipeline_schedule("1f1b", 2, 4), durations)


def test_picture_draws_every_action_once_and_needs_nothing_else() -> None:
    timeline = replay(pipeline_schedule("zbv", 4, 8), even_durations(8, 1, 1, 1))
    svg = timeline_svg(timeline)
    assert len(svg) < 60_000
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
    root = ElementTree.fromstring(svg)
    bars = [e for e in root.iter() if e.tag.endswith("rect") and e.get("class", "").startswith("k")]
    assert len(bars) == sum(len(actions) for actions in timeline.schedule.actions) == 4 * 2 * 8 * 3
    assert "prefers-color-scheme: dark" in svg
    assert {bar.get("class") for bar in bars} == {"kF", "kI", "kW"}


def test_pictures_nobody_could_read_are_refused() -> None:
    timeline = replay(pipeline_schedule("1f1b", 16, 400), even_durations(16, 1, 1, 1))
    with pytest.raises(LayoutError, match="312 micro-batches, or a trace"):
        timeline_svg(timeline)


def test_trace_opens_in_perfetto() -> None:
    timeline = replay(pipeline_schedule("1f1b", 2, 3), even_durations(2, 0.5, 0.25, 0.25))
    events = json.loads(timeline_trace(timeline))["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert names == {0: "pipeline rank 0", 1: "pipeline rank 1"}
    work = [event for event in events if event["ph"] == "X"]
    assert len(work) == 12
    first = work[0]
    assert (first["name"], first["ts"], first["dur"], first["tid"]) == ("0F0", 0.0, 5e5, 0)
    assert max(event["ts"] + event["dur"] for event in work) == pytest.approx(4e6)


def test_the_command_replays_and_draws(tmp_path: Path) -> None:
    svg, trace = tmp_path / "zbv.svg", tmp_path / "zbv.json"
    command = ["pipeline", "pp4 zbv", "--micro-batches", "8", "--svg", str(svg)]
    told = CliRunner().invoke(verbs, [*command, "--trace", str(trace)], catch_exceptions=False)
    # A rank's work is 8·3 s, and the slant of starting 3 chunks of half a second.
    assert told.output.splitlines()[0].startswith(
        "zbv v2, 4 ranks, 8 micro-batches: 26s from first"
    )
    assert told.output.count("24s") == 4
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")
    assert json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    refused = CliRunner().invoke(verbs, ["pipeline", "pp4 gpipe v2", "--micro-batches", "8"])
    assert isinstance(refused.exception, LayoutError)
