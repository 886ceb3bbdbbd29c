"""A pipeline or tensor ranks that were stopped go on as if not, and in other layouts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ridgeline.run import Run

MakeRun = Callable[..., Run]
StartCommand = Callable[..., subprocess.Popen[str]]
LastTensors = Callable[[Run], dict[str, bytes]]
RowsOf = Callable[..., list[dict[str, Any]]]
# 16 micro-batches a step: slow enough for a signal to land within a step.
SLOW = {"schedule": {"global_batch": 32, "warmup_steps": 2}, "budget": {"steps": 10}}


def train(run: Run, start: StartCommand, *words: object, stop_at: int | None = None) -> str:
    """Run the command to its end, or to what SIGTERM leaves; what it said."""
    file = run.path.parent / "run.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(run.to_toml(), encoding="utf-8")
    command, said = start("train", file, *words), []
    assert command.stdout is not None
    for line in command.stdout:
        said.append(line)
        if stop_at is not None and re.match(rf"step +{stop_at}/", line):
            os.kill(command.pid, signal.SIGTERM)
    command.wait(timeout=200)
    assert command.returncode == (0 if stop_at is None else 75), "".join(said)
    return "".join(said)


SPLIT = pytest.param("dp2 pp2 mb2 zbh1 zero1 bf16", marks=pytest.mark.system)


@pytest.mark.parametrize("layout", ["pp2 mb2 fp32", "tp2 mb2 fp32", SPLIT])
def test_a_stopped_run_is_bit_for_bit_the_one_that_was_not(
    layout: str,
    make_tiny_run: MakeRun,
    tmp_path: Path,
    start_command: StartCommand,
    last_tensors: LastTensors,
    rows_of: RowsOf,
) -> None:
    whole = make_tiny_run(tmp_path / "whole", layout=layout, **SLOW)
    said = train(whole, start_command)
    word, axis = ("tp2", "tensor") if "tp2" in layout else ("pp2", "pipeline")
    assert f"  {word} ({axis}): ranks 0 " in said
    stopped = make_tiny_run(tmp_path / "stopped", layout=layout, **SLOW)
    said = train(stopped, start_command, stop_at=3)
    assert "go on with: ridgeline train" in said
    assert "Traceback" not in said
    said = train(stopped, start_command)
    reached = re.search(r"resumed at step (\d+)", said)
    assert reached is not None
    assert 3 <= int(reached[1]) < 10
    assert last_tensors(stopped) == last_tensors(whole)
    runs = [[row["loss"] for row in rows_of(run, "loss")] for run in (whole, stopped)]
    assert runs[0] == runs[1]


def test_a_run_moves_from_a_pipeline_to_tensor_ranks_to_one_process(
    make_tiny_run: MakeRun,
    tmp_path: Path,
    start_command: StartCommand,
    rows_of: RowsOf,
) -> None:
    changes = {"schedule": {"shape": "constant", "global_batch": 8}, "model": {"tied": True}}
    one = make_tiny_run(tmp_path / "one", layout="mb4 fp32", budget={"steps": 12}, **changes)
    train(one, start_command)
    moved = make_tiny_run(tmp_path / "moved", layout="pp2 mb2 fp32", budget={"steps": 4}, **changes)
    train(moved, start_command)
    train(moved, start_command, "--layout", "dp2 tp2 mb2 fp32", "--budget.steps", 8)
    said = train(moved, start_command, "--layout", "mb8 fp32", "--budget.steps", 12)
    assert "resumed at step 8" in said
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        alone, together = ([row[name] for row in rows_of(run, "loss")] for run in (one, moved))
        assert len(together) == 12
        assert together == pytest.approx(alone, rel=tolerance)
