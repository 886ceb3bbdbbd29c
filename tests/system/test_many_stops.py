"""A run of two processes, stopped at random moments: in the end it is the run that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ridgeline.run import Run

MakeRun = Callable[..., Run]
StartCommand = Callable[..., subprocess.Popen[str]]
LastTensors = Callable[[Run], dict[str, bytes]]
SLOW = {
    "layout": "dp2 mb1 fp32",
    "schedule": {"global_batch": 64, "warmup_steps": 2},
    "budget": {"steps": 60},
    "evaluation": {"sequences": 2},
    "checkpoint": {"every_steps": 7},
}
RESUME_ME = 75
STOPS = 10
KILLS = 10


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_run: MakeRun, start_command: StartCommand
) -> tuple[Run, float]:
    """The run that nobody stopped, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    run = make_tiny_run(folder, **SLOW)
    (folder / "run.toml").write_text(run.to_toml())
    began = time.monotonic()
    said, _ = (command := start_command("train", folder / "run.toml")).communicate(timeout=600)
    assert command.returncode == 0, said
    return run, time.monotonic() - began


def processes_of(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def wait_for_none(group: int) -> None:
    end = time.monotonic() + 60
    while processes_of(group):
        assert time.monotonic() < end, "processes are left behind"
        time.sleep(0.1)


@pytest.mark.system
def test_stops_at_random_moments_end_bit_identical(
    whole: tuple[Run, float],
    tmp_path: Path,
    make_tiny_run: MakeRun,
    start_command: StartCommand,
    last_tensors: LastTensors,
) -> None:
    """Ctrl-C to the whole group or SIGTERM to the parent: from its first second to its last."""
    reference, seconds = whole
    run = make_tiny_run(tmp_path, **SLOW)
    (tmp_path / "run.toml").write_text(run.to_toml())
    choose = random.Random(20)
    for number in range(STOPS):
        command = start_command("train", tmp_path / "run.toml")
        moment = choose.uniform(1.0, 4.0 + 0.25 * seconds)
        time.sleep(moment)
        if number % 2:
            os.killpg(command.pid, signal.SIGINT)
        else:
            command.terminate()
        said = command.communicate(timeout=300)[0]
        # Before it can save: as any command that is interrupted. After: saved, or just finished.
        early = (130, -signal.SIGINT, -signal.SIGTERM)
        assert command.returncode in (RESUME_ME, 0, *early), (moment, said)
        assert "Traceback" not in said, (moment, said)
        wait_for_none(command.pid)
    said, _ = (command := start_command("train", tmp_path / "run.toml")).communicate(timeout=600)
    assert command.returncode == 0, said
    assert last_tensors(run) == last_tensors(reference)


@pytest.mark.system
def test_kills_at_random_moments_end_bit_identical(
    whole: tuple[Run, float],
    tmp_path: Path,
    make_tiny_run: MakeRun,
    start_command: StartCommand,
    last_tensors: LastTensors,
) -> None:
    """kill -9 of the whole group, or of one of its processes; then start again, as jobs do."""
    reference, seconds = whole
    run = make_tiny_run(tmp_path, **SLOW)
    (tmp_path / "run.toml").write_text(run.to_toml())
    choose = random.Random(21)
    killed = 0
    for number in range(KILLS):
        command = start_command("train", tmp_path / "run.toml")
        time.sleep(choose.uniform(2.0, 4.0 + 0.3 * seconds))
        if living := processes_of(command.pid):
            killed += 1
            if number % 2:
                os.killpg(command.pid, signal.SIGKILL)
            else:
                os.kill(choose.choice(living), signal.SIGKILL)
        command.communicate(timeout=300)
        wait_for_none(command.pid)
    assert killed >= KILLS // 3  # a machine that is suddenly fast finishes the run before the rest
    said, _ = (command := start_command("train", tmp_path / "run.toml")).communicate(timeout=600)
    assert command.returncode == 0, said
    assert last_tensors(run) == last_tensors(reference)
