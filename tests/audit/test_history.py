"""Run folders read back: whole, torn, resumed and strange ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ridgeline.audit.history import number, read_history
from ridgeline.audit.report import render
from ridgeline.audit.witnesses import read_witnesses
from ridgeline.errors import RunFolderError

WriteRunFolder = Callable[..., Path]


def write_metrics(folder: Path, *records: object) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    return folder


def step(at: int, loss: float = 3.0) -> dict[str, object]:
    return {"step": at, "loss": loss, "step_s": 0.5}


def test_a_whole_folder_is_read_whole(run_folder: Path) -> None:
    history = read_history(run_folder)
    assert [s.step for s in history.steps] == list(range(1, 601))
    assert [e.step for e in history.evaluations] == list(range(50, 601, 50))
    assert [p.name for p in history.checkpoints] == [f"step-{s:08d}" for s in (200, 400, 600)]
    assert history.latest("parameters") == 8_520_704
    assert history.last_step == 600
    assert history.notes == []


def test_a_missing_folder_and_missing_or_empty_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no such folder"):
        read_history(tmp_path / "nowhere")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl.* missing"):
        read_history(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lo', encoding="utf-8")
    with pytest.raises(RunFolderError, match="no readable record"):
        read_history(tmp_path)


def test_a_torn_last_line_is_left_out_and_said(run_folder: Path) -> None:
    path = run_folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    history = read_history(run_folder)
    assert history.events[-1].name != "finished"
    assert history.notes == ["The last line of metrics.jsonl was cut short and is left out."]


def test_damaged_lines_inside_are_named(tmp_path: Path) -> None:
    write_metrics(tmp_path, step(1), ["no", "record"], step(2), {"loss": 3.0}, step(3))
    history = read_history(tmp_path)
    assert [s.step for s in history.steps] == [1, 2, 3]
    assert "Unreadable lines of metrics.jsonl are left out: 2, 4." in history.notes


def test_steps_rise_though_a_resumed_run_computes_some_again(tmp_path: Path) -> None:
    before = [step(s, 9.0) for s in (5, 10, 15)]
    evaluations = [{"step": s, "held_out_loss": 9.0} for s in (10, 15)]
    resumed = {"step": 10, "event": "resumed"}
    write_metrics(tmp_path, *before, *evaluations, resumed, step(20), step(30), step(30, 2.0))
    history = read_history(tmp_path)
    assert [(s.step, s.loss) for s in history.steps] == [(5, 9), (10, 9), (20, 3), (30, 2)]
    assert [e.step for e in history.evaluations] == [10]
    assert [s.steps_covered for s in history.steps] == [5, 5, 10, 10]
    assert history.notes[0] == "Resumed at step 10."


def test_the_reasons_beside_values_are_read_with_them(run_folder: Path) -> None:
    history = read_history(run_folder)
    assert history.reasons == {
        "layout": "bf16: this CPU multiplies bf16 natively",
        "data.sequence": "the model's max_sequence",
    }


def test_a_run_killed_after_resuming_stands_where_it_resumed(tmp_path: Path) -> None:
    write_metrics(tmp_path, step(50), {"step": 40, "event": "resumed"})
    assert read_history(tmp_path).last_step == 40


def test_time_is_unknown_when_one_logged_step_does_not_tell_it(tmp_path: Path) -> None:
    write_metrics(tmp_path, step(1), {"step": 2, "loss": 3.0})
    history = read_history(tmp_path)
    assert history.elapsed_s != history.elapsed_s


def test_what_describes_the_run_may_be_missing_or_damaged(tmp_path: Path) -> None:
    write_metrics(tmp_path, step(1))
    assert len(read_history(tmp_path).notes) == 2
    (tmp_path / "run.toml").write_text("name = ", encoding="utf-8")
    (tmp_path / "environment.json").write_text("[1]", encoding="utf-8")
    notes = " ".join(read_history(tmp_path).notes)
    assert "run.toml cannot be read" in notes
    assert "environment.json does not hold a table" in notes


def test_only_numbers_are_numbers() -> None:
    assert [number(v) for v in (True, "3", None, 10**400, 3)] == [None, None, None, None, 3.0]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
MEASURES = ["loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "memory_bytes", "step_s"]
OTHERS = ["seconds", "held_out_loss", "held_out", "event", "total_steps", "parameters", "baselines"]
OTHERS += ["time", "start_s", "lost_s"]
KEYS = st.sampled_from([*MEASURES, *OTHERS])
EVENTS = st.sampled_from(["started", "resumed", "finished", "interrupted", "checkpoint", "lost"])
RECORDS = st.builds(
    lambda step, fields, event: {**fields, **({"event": event} if event else {}), "step": step},
    st.integers(0, 50),
    st.dictionaries(KEYS, VALUES | st.floats() | st.dictionaries(KEYS, st.floats(), max_size=4)),
    st.none() | EVENTS,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(RECORDS, min_size=1, max_size=12))
def test_no_readable_record_breaks_the_page(tmp_path: Path, records: list[object]) -> None:
    history = read_history(write_metrics(tmp_path, *records))
    page = render(history, read_witnesses(history))
    assert page.endswith("</html>\n")
    assert page.count("<script") == 1
