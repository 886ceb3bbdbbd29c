"""Signals and time limits: noticed wherever they come, agreed by all, saved, and exit status 75."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tests.launch.commands import Watched, hit, workers_of
from torch import Tensor

import ridgeline
from ridgeline.errors import RunError, Stopped
from ridgeline.launch.stopping import SIGNALS, StopFile, Wish, stop_on_signals
from ridgeline.run import Run
from ridgeline.train import checkpoint
from ridgeline.train.saving import Saver
from ridgeline.train.vocabulary import token_loss

MakeRun = Callable[..., Run]
StartCommand = Callable[..., subprocess.Popen[str]]
LastTensors = Callable[[Run], dict[str, bytes]]
RowsOf = Callable[..., list[dict[str, Any]]]


class Signalling:
    """The loss; sends this process a signal at its n-th call, in training or in evaluation."""

    def __init__(self, number: int, call: int, training: bool = True) -> None:
        self.number = number
        self.left = call
        self.training = training

    def __call__(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        if torch.is_grad_enabled() == self.training:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)
        return token_loss(logits_BLV, targets_BL)


def checkpoints(run: Run) -> list[str]:
    return sorted(path.name for path in (run.path / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_run: MakeRun, last_tensors: LastTensors
) -> dict[str, bytes]:
    """What the run that nobody stopped ends with."""
    run = make_tiny_run(tmp_path_factory.mktemp("whole"), budget={"steps": 8})
    ridgeline.train(run)
    return last_tensors(run)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_within_a_step_saves_and_the_resumed_run_is_the_one_that_was_not_stopped(
    number: signal.Signals,
    whole: dict[str, bytes],
    tiny_run: MakeRun,
    last_tensors: LastTensors,
    rows_of: RowsOf,
) -> None:
    run = tiny_run(budget={"steps": 8})
    before = signal.getsignal(number)
    outcome = ridgeline.train(run, loss=Signalling(number, call=5))  # two a step: within step 3
    assert (outcome.complete, outcome.step) == (False, 4)  # agreed one step late
    assert checkpoints(run) == ["step-00000004"]
    assert rows_of(run, "event")[-1]["event"] == "interrupted"
    assert signal.getsignal(number) == before
    assert ridgeline.train(run).complete
    assert last_tensors(run) == whole


def test_a_signal_within_an_evaluation_ends_it_and_the_resumed_run_evaluates(
    whole: dict[str, bytes], tiny_run: MakeRun, rows_of: RowsOf, last_tensors: LastTensors
) -> None:
    run = tiny_run(budget={"steps": 8}, evaluation={"every_steps": 3})
    outcome = ridgeline.train(run, loss=Signalling(signal.SIGTERM, call=1, training=False))
    assert (outcome.complete, outcome.step, outcome.held_out_loss) == (False, 3, None)
    assert checkpoints(run) == ["step-00000003"]
    assert not rows_of(run, "held_out_loss")
    # In the one after the last step: it is not complete before it is measured.
    outcome = ridgeline.train(run, loss=Signalling(signal.SIGTERM, call=3, training=False))
    assert (outcome.complete, outcome.step) == (False, 8)
    assert ridgeline.train(run).held_out_loss is not None
    assert last_tensors(run) == whole


def test_a_signal_within_a_checkpoint_ends_with_that_checkpoint(tiny_run: MakeRun) -> None:
    run = tiny_run(checkpoint={"every_steps": 2})
    write = Saver.save

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return write(*arguments, **options)

    with patch.object(Saver, "save", signalled):
        outcome = ridgeline.train(run)
    assert (outcome.complete, outcome.step) == (False, 2)
    assert checkpoints(run) == ["step-00000002"]


def test_a_signal_before_the_first_step_leaves_all_as_it_was(tiny_run: MakeRun) -> None:
    run, stop = tiny_run(), Wish()
    stop.set()
    with pytest.raises(Stopped, match="before the first step"):
        ridgeline.train(run, stop=stop)
    assert not run.path.parent.exists()

    def make(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)  # the folder has been made by now
        assert run.path.exists()
        return torch.optim.SGD(arguments[0].parameters())

    with pytest.raises(Stopped):
        ridgeline.train(run, optimizer=make)
    assert not run.path.exists()

    assert ridgeline.train(run).complete
    longer = run.model_copy(update={"budget": run.budget.model_copy(update={"steps": 6})})
    read = checkpoint.load

    def signalled(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*arguments, **options)

    written = (run.path / "metrics.jsonl").read_text()
    with patch.object(checkpoint, "load", signalled), pytest.raises(Stopped):
        ridgeline.train(longer)
    assert checkpoints(run) == ["step-00000004"]
    assert (run.path / "metrics.jsonl").read_text() == written
    assert ridgeline.train(longer).step == 6


def test_a_run_saves_and_stops_before_its_jobs_time_limit(
    tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(budget={"steps": 100_000}, faults={"save_before_s": 1000.0})
    now = int(time.time())
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(now - 5000))
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(now + 1003))
    outcome = ridgeline.train(run)
    assert not outcome.complete
    assert checkpoints(run) == [f"step-{outcome.step:08d}"]

    # Started again in the rest of that job: the next one will have its full time.
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(now + 900))
    with pytest.raises(Stopped):
        ridgeline.train(run)
    # A job that is too short for ever is not to be started again and again.
    monkeypatch.setenv("SLURM_JOB_START_TIME", str(now))
    with pytest.raises(RunError, match=r"900 - 1000 leaves nothing(.|\n)*save_before_s 90"):
        ridgeline.train(run)


def test_handlers_nest_and_a_hangup_that_is_ignored_stays_so(tmp_path: Path) -> None:
    first, second = Wish(), StopFile(tmp_path / "stop")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_on_signals(first):
            os.kill(os.getpid(), signal.SIGHUP)
            with stop_on_signals(first, second):
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGUSR2)
            assert first.is_set()
            assert second.is_set()
            first.made = False
            os.kill(os.getpid(), signal.SIGHUP)
        assert not first.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


MULTI = {
    "layout": "dp2 mb1 fp32",
    "schedule": {"global_batch": 32, "warmup_steps": 2},
    "budget": {"steps": 100_000},
}


def test_two_processes_stop_for_a_signal_to_one_to_all_or_before_they_train(
    tiny_run: MakeRun, tmp_path: Path, start_command: StartCommand
) -> None:
    run = tiny_run(**MULTI)
    (tmp_path / "run.toml").write_text(run.to_toml())
    command = Watched(start_command("train", tmp_path / "run.toml"))
    command.wait_for("run ")
    os.killpg(command.process.pid, signal.SIGUSR1)
    assert command.end() == 75, command.said
    assert "stopped before the first step" in command.said
    assert not run.path.exists()

    reached = [0]
    for all_of_them in (False, True):
        command = Watched(start_command("train", tmp_path / "run.toml"))
        command.wait_for(r"step +\d+/")
        if all_of_them:
            os.killpg(command.process.pid, signal.SIGHUP)
        else:
            hit(workers_of(command.process.pid)[1], signal.SIGUSR2)
        assert command.end() == 75, command.said
        assert "Traceback" not in command.said
        assert f"go on with: ridgeline train {run.path}" in command.said
        reached.append(int(checkpoints(run)[-1][5:]))
    assert reached == sorted(set(reached))


def rank_of(process: int) -> str | None:
    """The RANK that a process was started with."""
    words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((word[5:].decode() for word in words if word.startswith(b"RANK=")), None)


def test_ranks_of_another_launcher_stop_for_a_signal_to_one_or_to_its_agent_and_stay_so(
    tiny_run: MakeRun, tmp_path: Path, rows_of: RowsOf
) -> None:
    run = tiny_run(**MULTI)
    (tmp_path / "run.toml").write_text(run.to_toml())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "--max-restarts", "3"]
    reached = [0]
    for agent in (True, False):
        command = Watched(
            subprocess.Popen(
                [*launcher, "-m", "ridgeline", "train", str(tmp_path / "run.toml")],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        command.wait_for(r"step +\d+/")
        ranks = Path(f"/proc/{command.process.pid}/task/{command.process.pid}/children")
        (last,) = (n for n in map(int, ranks.read_text().split()) if rank_of(n) == "1")
        hit(command.process.pid if agent else last, signal.SIGTERM if agent else signal.SIGUSR1)
        assert command.end() != 0
        assert f"go on with: ridgeline train {run.path}" in command.said
        reached.append(int(checkpoints(run)[-1][5:]))
    assert reached == sorted(set(reached))
    assert "restarted" not in [row["event"] for row in rows_of(run, "event")]
    assert not (run.path / "lock.json").exists()


def test_ranks_without_an_agent_end_with_75_for_a_signal_to_one(
    tiny_run: MakeRun, tmp_path: Path, start_command: StartCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(**MULTI)
    (tmp_path / "run.toml").write_text(run.to_toml())
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    commands = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        commands.append(Watched(start_command("train", tmp_path / "run.toml")))
    try:
        commands[0].wait_for(r"step +\d+/")
        assert commands[0].thread.is_alive(), commands[0].said
        hit(commands[1].process.pid, signal.SIGINT)
        assert [command.end() for command in commands] == [75, 75], commands[0].said
    finally:
        for command in commands:  # one that waits for the other would stay
            hit(command.process.pid, signal.SIGKILL)
    assert checkpoints(run)
