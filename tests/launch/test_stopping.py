"""Two processes that are asked to stop: saved, told how to go on, and bit-identical in the end."""

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
from ridgeline.train.manifest import read_manifest

MakeRun = Callable[..., Run]
StartCommand = Callable[..., subprocess.Popen[str]]
LastTensors = Callable[[Run], dict[str, bytes]]
RowsOf = Callable[..., list[dict[str, Any]]]
# 16 micro-batches a step and rank: slow enough for a signal to land within a step.
SLOW = {
    "layout": "dp2 mb1 fp32",
    "schedule": {"global_batch": 32, "warmup_steps": 2},
    "budget": {"steps": 12},
    "evaluation": {"sequences": 2},
}


def train_until(command: subprocess.Popen[str], step: int, stop: Callable[[int], None]) -> str:
    """Let the command reach `step`, call `stop` with its process id, and return what it said."""
    assert command.stdout is not None
    said = []
    for line in command.stdout:
        said.append(line)
        if re.match(rf"step +{step}/", line):
            stop(command.pid)
            break
    said.append(command.communicate(timeout=200)[0])
    return "".join(said)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_run: MakeRun, start_command: StartCommand
) -> Run:
    """The run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run = make_tiny_run(folder, **SLOW)
    (folder / "run.toml").write_text(run.to_toml())
    said, _ = (command := start_command("train", folder / "run.toml")).communicate(timeout=200)
    assert command.returncode == 0, said
    return run


def test_ctrl_c_and_sigterm_save_and_the_resumed_run_is_the_run_that_was_not_stopped(
    whole: Run,
    tmp_path: Path,
    make_tiny_run: MakeRun,
    start_command: StartCommand,
    last_tensors: LastTensors,
    rows_of: RowsOf,
) -> None:
    run = make_tiny_run(tmp_path, **SLOW)
    (tmp_path / "run.toml").write_text(run.to_toml())

    # Ctrl-C in a terminal: every process of the group gets SIGINT.
    command = start_command("train", tmp_path / "run.toml")
    said = train_until(command, 2, lambda group: os.killpg(group, signal.SIGINT))
    assert command.returncode == 75, said
    step = read_manifest(max((run.path / "checkpoints").iterdir())).progress.step
    assert 2 <= step < 12
    assert f"stopped at step {step}; go on with: ridgeline train {run.path}" in said
    assert "Traceback" not in said
    assert (run.path / "report.html").exists()
    assert not (run.path / "lock.json").exists()

    # A batch system: SIGTERM to the parent alone; and the run's folder is all that is named.
    command = start_command("train", run.path)
    said = train_until(command, step + 1, lambda parent: os.kill(parent, signal.SIGTERM))
    assert command.returncode == 75, said
    assert f"resumed at step {step}" in said

    said, _ = (command := start_command("train", run.path)).communicate(timeout=200)
    assert command.returncode == 0, said
    assert last_tensors(run) == last_tensors(whole)
    assert [row["loss"] for row in rows_of(run, "loss")] == [
        row["loss"] for row in rows_of(whole, "loss")
    ]


def test_a_killed_command_takes_its_workers_with_it(
    whole: Run, tmp_path: Path, make_tiny_run: MakeRun, start_command: StartCommand
) -> None:
    """Else they would train on unseen, into a folder that the next command takes over."""
    assert whole.path.exists()
    run = make_tiny_run(tmp_path, **SLOW | {"budget": {"steps": 100_000}})
    (tmp_path / "run.toml").write_text(run.to_toml())
    command = start_command("train", tmp_path / "run.toml")
    # The workers hold the other end of stdout: it closes when the last of them has ended.
    train_until(command, 1, lambda parent: os.kill(parent, signal.SIGKILL))
    assert command.returncode == -signal.SIGKILL
    steps = (run.path / "metrics.jsonl").read_text().count('"loss"')
    assert steps < 100
