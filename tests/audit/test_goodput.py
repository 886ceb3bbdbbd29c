"""Goodput: every held second has one cause, over kills and resumptions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.audit.goodput import BADPUT, Goodput, goodput_of
from ridgeline.audit.history import read_history

START: dict[str, Any] = {"step": 0, "event": "started", "start_s": 10.0, "time": 1010.0}


def goodput(folder: Path, *records: dict[str, Any]) -> Goodput:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return goodput_of(read_history(folder))


def logged(step: int, time: float, step_s: float, **seconds: float) -> dict[str, Any]:
    return {"step": step, "step_s": step_s, "seconds": seconds, "time": time}


def saved(step: int, time: float, seconds: float) -> dict[str, Any]:
    return {"step": step, "event": "checkpoint", "seconds": seconds, "time": time}


def test_a_run_without_interruption_counts_every_second_once(tmp_path: Path) -> None:
    found = goodput(
        tmp_path,
        START,
        logged(10, 1030.0, 2.0, data=0.1, forward=1.7),
        {"step": 10, "held_out_loss": 3.0, "seconds": {"evaluation": 5.0}, "time": 1035.0},
        saved(10, 1038.0, 3.0),
        logged(20, 1059.0, 2.3, data=0.1, checkpoint=0.3),
        saved(20, 1062.0, 3.0),
        {"step": 20, "event": "finished", "time": 1063.0},
    )
    assert found.sessions == 1
    assert found.held_s == 63  # 10 s of start, 53 s from the first event to the last
    assert found.useful_s == pytest.approx(10 * 1.9 + 10 * 1.9)
    badput = {"start": 10, "restart": 0, "checkpoint": 6, "data": 2, "evaluation": 5}
    assert found.badput_s == pytest.approx({**badput, "lost work": 0, "unknown": 2})
    assert found.fraction == pytest.approx(38 / 63)


def test_a_killed_and_resumed_run_counts_restart_and_lost_work_but_not_the_queue(
    tmp_path: Path,
) -> None:
    found = goodput(
        tmp_path,
        START,
        logged(10, 1030.0, 2.0),
        saved(10, 1031.0, 1.0),
        # killed at step 18; a day later it goes on from step 10
        {"step": 10, "event": "lost", "lost_steps": 8, "lost_s": 16.0, "time": 90011.5},
        {"step": 10, "event": "resumed", "start_s": 12.0, "time": 90012.0},
        logged(20, 90032.0, 2.0),
    )
    assert found.sessions == 2
    assert found.held_s == (10 + 21 + 16) + (12 + 20)
    badput = {"start": 10, "restart": 12, "checkpoint": 1, "data": 0, "evaluation": 0}
    assert found.badput_s == pytest.approx({**badput, "lost work": 16, "unknown": 0})
    assert found.useful_s == 40


def test_a_run_that_was_killed_before_its_first_step_held_the_machine_for_nothing(
    tmp_path: Path,
) -> None:
    found = goodput(tmp_path, START)
    assert (found.held_s, found.useful_s, found.fraction) == (10, 0, 0)


def test_records_without_time_leave_goodput_unknown_and_say_what_they_know(
    tmp_path: Path,
) -> None:
    found = goodput(tmp_path, {"step": 0, "event": "started"}, {"step": 4, "step_s": 2.0})
    assert (found.held_s, found.fraction, found.useful_s) == (None, None, 8)
    assert found.badput_s["start"] is None
    assert found.badput_s["unknown"] is None


def test_a_lost_piece_of_unknown_length_is_not_counted(tmp_path: Path) -> None:
    lost = {"step": 0, "event": "lost", "lost_steps": 3, "lost_s": None, "time": 1100.0}
    again = {**START, "time": 1110.0}
    assert goodput(tmp_path, START, lost, again).held_s == 20


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(0, 0.3), st.floats(0, 9)), max_size=6),
    st.floats(0, 100),
    st.integers(0, 3),
)
def test_causes_add_up_to_the_time_held(
    tmp_path_factory: pytest.TempPathFactory,
    pieces: list[tuple[float, float, float]],
    start_s: float,
    kills: int,
) -> None:
    time, records = 1000.0, [{**START, "start_s": start_s, "time": 1000.0}]
    for place, (step_s, waited, pause) in enumerate(pieces):
        step = 10 * (place + 1)
        time += 10 * step_s + pause
        records.append(logged(step, time, step_s, data=waited * step_s))
        if place < kills:
            lost = {"step": step, "event": "lost", "lost_steps": 1, "lost_s": pause}
            time += 50
            start = {"step": step, "event": "resumed", "start_s": start_s, "time": time}
            records += [lost, start]
    found = goodput(tmp_path_factory.mktemp("run"), *records)
    assert list(found.badput_s) == list(BADPUT)
    causes = sum(seconds or 0.0 for seconds in found.badput_s.values())
    assert found.held_s == pytest.approx(found.useful_s + causes, abs=1e-6)
