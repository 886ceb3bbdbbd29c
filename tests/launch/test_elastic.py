"""Lost workers and nodes: the same command goes on from the newest checkpoint, bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.launch.commands import Watched, check_every_sample_was_read_once, hit, workers_of

import ridgeline
from ridgeline.errors import LaunchError, LayoutError, ShardError, WorkerLost
from ridgeline.launch.local import Life, run_workers
from ridgeline.launch.stopping import Wish
from ridgeline.run import Faults, Run

MakeRun = Callable[..., Run]
StartCommand = Callable[..., subprocess.Popen[str]]
LastTensors = Callable[[Run], dict[str, bytes]]
RowsOf = Callable[..., list[dict[str, Any]]]
FOUR = {
    "layout": "dp2 pp2 mb1 fp32",
    "schedule": {"global_batch": 8, "warmup_steps": 2},
    "budget": {"steps": 50},
    "evaluation": {"sequences": 2},
    "checkpoint": {"every_steps": 2},
    "logging": {"samples": True},
    "faults": {"restarts": 4},
}


def test_a_command_whose_workers_are_killed_goes_on_and_ends_bit_identical(
    tiny_run: MakeRun,
    tmp_path: Path,
    start_command: StartCommand,
    last_tensors: LastTensors,
    rows_of: RowsOf,
) -> None:
    whole = tiny_run(name="whole", **FOUR)
    (tmp_path / "whole.toml").write_text(whole.to_toml())
    command = Watched(start_command("train", tmp_path / "whole.toml"))
    assert command.end() == 0, command.said
    run = tiny_run(**FOUR)
    (tmp_path / "run.toml").write_text(run.to_toml())
    choose, seen = random.Random(6), 0
    command = Watched(start_command("train", tmp_path / "run.toml"))
    for _ in range(4):
        seen = command.wait_for(r"step +\d+/", seen)
        seen = command.wait_for(r"step +\d+/", seen + choose.randrange(6))
        assert hit(choose.choice(workers_of(command.process.pid)), signal.SIGKILL)
        seen = command.wait_for(r"rank \d \(process \d+\) died: exit code -9; all start", seen)
    assert command.end() == 0, command.said
    assert "(4 of 4 times)" in command.said
    events = [row for row in rows_of(run, "event") if row["event"] == "restarted"]
    assert [row["restarts"] for row in events] == [1, 2, 3, 4]
    assert all("exit code -9" in row["why"] for row in events)
    assert last_tensors(run) == last_tensors(whole)
    losses = [[row["loss"] for row in rows_of(each, "loss")] for each in (run, whole)]
    assert losses[0] == losses[1]
    check_every_sample_was_read_once(run, 50)
    assert not (run.path / "lock.json").exists()


def lose(folder: Path, life: Life) -> int:
    """Die in the first two lives; tell of the third."""
    if len(life.lost) < 2:
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "lives").write_text("\n".join(life.lost))
    return len(life.lost)


def refuse(folder: Path, life: Life) -> None:
    (folder / "refused").write_text((folder / "refused").read_text() + "x")
    raise ShardError("shard x", "1 + 1 = 2")


def sleep(seconds: float, life: Life) -> float:
    """Ignore that somebody wishes to stop."""
    time.sleep(seconds)
    return seconds


def test_workers_are_started_again_as_often_as_the_run_says(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_workers(lose, (tmp_path,), 1, faults=Faults(restarts=2)) == 2
    assert (tmp_path / "lives").read_text().count("exit code -9") == 2
    assert "(2 of 2 times)" in capfd.readouterr().out
    with pytest.raises(WorkerLost, match=r"rank 0 (.|\n)*exit code -9"):
        run_workers(lose, (tmp_path,), 1, faults=Faults(restarts=1))


def test_an_error_that_would_come_again_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "refused").touch()
    with pytest.raises(ShardError, match="shard x"):
        run_workers(refuse, (tmp_path,), 1, faults=Faults(restarts=3))
    assert (tmp_path / "refused").read_text() == "x"


def test_workers_that_stop_too_slowly_are_ended_and_not_started_again() -> None:
    stop = Wish()
    stop.set()
    with pytest.raises(LaunchError, match=r"stop_within_s = 1 s"):
        run_workers(sleep, (600.0,), 2, stop, Faults(stop_within_s=1.0))
    assert run_workers(sleep, (0.1,), 2, stop, Faults(stop_within_s=60.0)) == 0.1


def test_with_fewer_processes_a_launched_run_goes_on_in_the_nearest_layout_or_is_refused(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch, rows_of: RowsOf
) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(10_000 + os.getpid() % 20_000)}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    refused = tiny_run(layout="dp4 mb2 fp32", faults={"fewer_devices": False})
    with pytest.raises(LayoutError, match="on 1 devices"):
        ridgeline.train(refused)
    run = tiny_run(layout="dp4 mb2 fp32")
    assert ridgeline.train(run).complete
    event = next(row for row in rows_of(run, "event") if row["event"] == "fewer devices")
    assert (event["layout"], event["asked"]) == ("mb2 fp32", "dp4 mb2 fp32")
