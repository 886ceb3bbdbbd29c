"""The console's line to the letter, rows of metrics.jsonl, and what a resumed run forgets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ridgeline.run import Run
from ridgeline.train.manifest import Progress
from ridgeline.train.telemetry import (
    Clock,
    Lost,
    Observation,
    Recorder,
    drop_after,
    memory_bytes,
)

MakeRun = Callable[..., Run]

ROW = {
    "loss": 3.2141,
    "grad_norm": 0.8149,
    "lr": 3e-4,
    "tokens_per_s": 12345.6,
    "mfu": 0.412,
    "memory_bytes": int(1.2 * 2**30),
}


@contextmanager
def recorder(run: Run, peak_flops: float | None = None) -> Iterator[Recorder]:
    run.path.mkdir(parents=True, exist_ok=True)
    opened = Recorder(run, torch.device("cpu"), flops_per_token=1e6, peak_flops=peak_flops)
    try:
        yield opened
    finally:
        opened.close()


def rows_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def observation(step: int, tokens: int) -> Observation:
    progress = Progress(step=step, tokens=tokens, elapsed_s=0.5 * step)
    return Observation(progress, torch.tensor(2.0), torch.tensor(0.5), 1e-3, torch.zeros(()))


def test_the_line_is_the_one_that_was_promised(tiny_run: MakeRun) -> None:
    with recorder(tiny_run(budget={"steps": 2000})) as opened:
        line = opened.line(ROW, Progress(step=120, elapsed_s=12.26))
    assert line == (
        "step   120/2,000  loss  3.214  grad  0.81  lr 3.0e-4   12.3k tok/s  MFU 41%  "
        "1.20 GiB  eta 3m12s"
    )


def test_an_unknown_peak_is_a_dash_and_a_budget_of_hours_has_no_total(tiny_run: MakeRun) -> None:
    with recorder(tiny_run(budget={"steps": None, "hours": 1.0})) as opened:
        line = opened.line(ROW | {"mfu": None}, Progress(step=1200, elapsed_s=1800.0))
    assert line == (
        "step   1,200  loss  3.214  grad  0.81  lr 3.0e-4   12.3k tok/s  MFU   —  "
        "1.20 GiB  eta 30m00s"
    )


def test_lines_of_one_run_are_aligned(tiny_run: MakeRun) -> None:
    with recorder(tiny_run(budget={"steps": 12000})) as opened:
        lines = [
            opened.line(
                ROW | {"loss": loss, "tokens_per_s": speed}, Progress(step=step, elapsed_s=1.0)
            )
            for step, loss, speed in ((1, 11.5, 999.4), (120, 3.2, 12345.0), (12000, 0.9, 1.5e6))
        ]
    assert len({line.index("  eta") for line in lines}) == 1


def test_a_logged_step_holds_what_readers_expect(tiny_run: MakeRun) -> None:
    run = tiny_run()
    with recorder(run, peak_flops=1e12) as opened:
        opened.start(Progress())
        opened.since = (0, opened.since[1] - 0.5)  # as if the two steps had taken half a second
        opened.step(observation(2, 512), loss=2.5, seconds={"forward": 0.001})
    (row,) = rows_of(run)
    assert list(row) == [
        "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "memory_bytes",
        "step_s", "seconds", "time",
    ]  # fmt: skip
    assert (row["step"], row["loss"], row["tokens"]) == (2, 2.5, 512)
    assert row["tokens_per_s"] * row["step_s"] == pytest.approx(256)  # two steps, 512 tokens
    assert row["mfu"] == pytest.approx(row["tokens_per_s"] * 1e6 / 1e12)
    assert row["seconds"]["forward"] == 0.0005
    assert sum(row["seconds"].values()) == pytest.approx(row["step_s"])


def test_mfu_is_absent_without_a_peak_and_counts_every_device(tiny_run: MakeRun) -> None:
    shares = []
    for layout in ("dp1 mb4 fp32", "dp2 mb4 fp32"):
        run = tiny_run(name=f"with-{layout[:3]}", layout=layout)
        with recorder(run, peak_flops=1e12) as opened:
            opened.start(Progress())
            opened.step(observation(1, 512), 2.5, {})
        (row,) = rows_of(run)
        shares.append(row["mfu"] / row["tokens_per_s"])
    assert shares[0] == pytest.approx(2 * shares[1])
    run = tiny_run(name="unknown")
    with recorder(run) as opened:
        opened.start(Progress())
        opened.step(observation(1, 512), 2.5, {})
    assert rows_of(run)[0]["mfu"] is None


def test_an_evaluation_does_not_slow_the_tokens_per_second(tiny_run: MakeRun) -> None:
    run = tiny_run()
    with recorder(run) as opened:
        opened.start(Progress())
        began = opened.since[1]
        opened.held_out(Progress(step=1), 2.0, {"code": 1.5, "prose": 3.0}, 7.0)
        assert opened.since == (0, began + 7.0)
    (row,) = rows_of(run)
    assert abs(row.pop("time") - time.time()) < 3600
    assert [row] == [
        {
            "step": 1,
            "held_out_loss": 2.0,
            "held_out": {"code": 1.5, "prose": 3.0},
            "seconds": {"evaluation": 7.0},
        }
    ]


def test_rows_beyond_the_step_that_was_restored_are_dropped(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 0, "event": "started"},
        {"step": 4, "loss": 3.0},
        {"step": 4, "event": "checkpoint"},
        {"step": 5, "loss": 2.0},
    ]
    torn = '{"step": 6, "lo'
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    assert drop_after(metrics, 4) == Lost(1, None)
    assert [json.loads(line) for line in metrics.read_text().splitlines()] == rows[:3]
    assert drop_after(metrics, 4) is None
    assert drop_after(tmp_path / "none.jsonl", 4) is None
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_is_lost_is_from_the_checkpoint_to_the_last_row(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 0, "event": "started", "time": 100.0},
        {"step": 4, "loss": 3.0, "time": 110.0},
        {"step": 4, "event": "checkpoint", "time": 111.5},
        {"step": 5, "loss": 2.0, "time": 114.0},
        {"step": 9, "loss": 1.0, "time": 121.5},
    ]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert drop_after(metrics, 4) == Lost(steps=5, seconds=10.0)
    assert drop_after(metrics, 0) == Lost(steps=4, seconds=11.5)  # without any checkpoint
    assert json.loads(metrics.read_text()) == rows[0]


def test_the_clock_adds_up_phases_and_starts_again() -> None:
    clock = Clock()
    for _ in range(2):
        with clock.phase("data"):
            pass
    with pytest.raises(ValueError, match="inside"), clock.phase("forward"):
        raise ValueError("inside")
    assert set(taken := clock.take()) == {"data", "forward"}
    assert all(seconds > 0 for seconds in taken.values())
    assert clock.take() == {}
    assert clock.lap() >= 0


def test_a_phase_within_a_phase_belongs_to_the_outer_one() -> None:
    clock = Clock(spans=[])
    with clock.phase("evaluation"), clock.phase("forward"):
        assert clock.inside == "evaluation"
    assert clock.inside == ""
    assert set(clock.seconds) == {"evaluation"}
    assert [span.phase for span in clock.spans or []] == ["evaluation"]


def test_a_lap_leaves_out_what_lies_between_steps() -> None:
    clock, begun = Clock(), time.perf_counter()
    clock.lap()
    with clock.between("checkpoint"):
        time.sleep(0.05)
    lap, all_of_it = clock.lap(), time.perf_counter() - begun
    assert 0 <= lap <= all_of_it - clock.seconds["checkpoint"]


def test_where_it_must_the_clock_waits_for_the_device_before_and_after_a_phase() -> None:
    calls: list[str] = []
    clock = Clock(settle=lambda: calls.append(clock.inside))
    with clock.phase("forward"):
        calls.append("work")
    assert calls == ["", "work", "forward"]


def test_memory_on_a_cpu_is_what_the_process_holds() -> None:
    held = memory_bytes(torch.device("cpu"))
    assert 2**26 < held < 2**36  # torch alone takes more than 64 MiB


def test_what_is_not_a_number_is_null_in_the_metrics(tiny_run: MakeRun) -> None:
    run = tiny_run()
    run.path.mkdir(parents=True)
    with recorder(run) as opened:
        opened.write({"step": 1, "held_out": {"code": float("nan"), "prose": 2.0}, "loss": 1e400})
    text = (run.path / "metrics.jsonl").read_text()
    row = json.loads(text)
    del row["time"]
    assert row == {"step": 1, "held_out": {"code": None, "prose": 2.0}, "loss": None}
