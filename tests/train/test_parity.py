"""Every layout is the same model, and a run that was stopped is the run that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ridgeline
from ridgeline.run import Run
from ridgeline.train.manifest import manifest_text
from ridgeline.train.vocabulary import token_loss

MakeRun = Callable[..., Run]
RowsOf = Callable[..., list[dict[str, Any]]]
LastTensors = Callable[[Run], dict[str, bytes]]
StartCommand = Callable[..., subprocess.Popen[str]]
STEPS = {"steps": 20}
# The checkpoint in the middle is what the two processes resume from.
SAVING = {"every_steps": 10, "keep": 9}


def losses(rows: list[dict[str, Any]]) -> list[float]:
    assert [row["step"] for row in rows] == list(range(1, 21))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, make_tiny_run: MakeRun) -> Run:
    """Trained by one process."""
    run = make_tiny_run(tmp_path_factory.mktemp("one"), budget=STEPS, checkpoint=SAVING)
    assert ridgeline.train(run).complete
    return run


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_run: MakeRun, start_command: StartCommand
) -> Run:
    """The same, trained by two processes that the command starts."""
    folder = tmp_path_factory.mktemp("two")
    run = make_tiny_run(folder, budget=STEPS, layout="dp2 mb2 fp32", checkpoint=SAVING)
    (folder / "two.toml").write_text(run.to_toml(), encoding="utf-8")
    said, _ = (command := start_command("train", folder / "two.toml")).communicate(timeout=200)
    assert command.returncode == 0, said
    return run


def test_one_and_two_processes_have_the_same_losses(one: Run, two: Run, rows_of: RowsOf) -> None:
    alone, together = losses(rows_of(one, "loss")), losses(rows_of(two, "loss"))
    assert together == pytest.approx(alone, rel=1e-5)
    assert alone[0] - alone[-1] >= 0.5  # it learnt, so the parity is of more than a start


def test_one_and_two_processes_have_the_same_gradient_norms_and_held_out_loss(
    one: Run, two: Run, rows_of: RowsOf
) -> None:
    norms = [[row["grad_norm"] for row in rows_of(run, "loss")] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    held_out = [rows_of(run, "held_out_loss")[-1]["held_out_loss"] for run in (one, two)]
    assert held_out[1] == pytest.approx(held_out[0], rel=1e-5)


def test_a_run_that_torchrun_starts_is_the_same_run(
    two: Run, tmp_path: Path, last_tensors: LastTensors
) -> None:
    run = two.model_copy(update={"folder": tmp_path})
    (tmp_path / "run.toml").write_text(run.to_toml(), encoding="utf-8")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m")
    words = (*torchrun, "ridgeline", "train", tmp_path / "run.toml")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 20/20  loss") == 1  # one rank speaks for all
    assert done.stdout.count("report: ") == 1
    assert last_tensors(run) == last_tensors(two)


@pytest.mark.parametrize("layout", ["mb8 fp32", "mb2 fp32", "mb1 fp32"])
def test_gradient_accumulation_changes_nothing(
    one: Run, layout: str, tiny_run: MakeRun, rows_of: RowsOf
) -> None:
    run = tiny_run(layout=layout, budget=STEPS)
    ridgeline.train(run)
    assert losses(rows_of(run, "loss")) == pytest.approx(losses(rows_of(one, "loss")), rel=1e-5)


def test_two_processes_go_on_where_one_stopped(
    one: Run,
    tmp_path: Path,
    start_command: StartCommand,
    rows_of: RowsOf,
    last_tensors: LastTensors,
) -> None:
    """The 1-process run, cut back to its middle checkpoint, resumed in another layout."""
    moved = one.model_copy(update={"folder": tmp_path})
    shutil.copytree(one.path, moved.path)
    shutil.rmtree(moved.path / "checkpoints" / "step-00000020")
    (tmp_path / "run.toml").write_text(moved.to_toml(), encoding="utf-8")
    words = ("train", tmp_path / "run.toml", "--layout", "dp2 mb2 fp32", "--cluster.devices", 2)
    said, _ = (command := start_command(*words)).communicate(timeout=200)
    assert command.returncode == 0, said
    assert "resumed at step 10: weights, optimizer, random state; next sample 80" in said
    assert sorted(p.name for p in moved.path.glob("run*.toml")) == ["run.2.toml", "run.toml"]
    assert losses(rows_of(moved, "loss")) == pytest.approx(losses(rows_of(one, "loss")), rel=1e-5)
    assert set(last_tensors(moved)) == {*last_tensors(one), "random.1@0"}


class StopAt:
    """The default loss, which sends this process a signal when a step begins."""

    def __init__(self, *steps: int, micro_batches: int = 2) -> None:
        self.calls = {step * micro_batches for step in steps}
        self.called = 0

    def __call__(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            if self.called in self.calls:
                os.kill(os.getpid(), signal.SIGTERM)
            self.called += 1
        return token_loss(logits_BLV, targets_BL)


RAMP = {"start": 4, "increment": 2, "every_steps": 3}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layout": "mb4 bf16"},
        {"layout": "mb2 fp32", "schedule": {"global_batch": 8, "ramp": RAMP}},
        {"model": {"tied": True, "positions": "learned", "norm": "layernorm", "bias": True}},
    ],
    ids=["fp32", "bf16", "ramp", "gpt"],
)
def test_a_run_stopped_by_signals_ends_bit_identical(
    changes: dict[str, Any], tiny_run: MakeRun, rows_of: RowsOf, last_tensors: LastTensors
) -> None:
    whole = tiny_run(name="whole", budget={"steps": 12}, **changes)
    assert ridgeline.train(whole).complete
    stopped = tiny_run(name="stopped", budget={"steps": 12}, **changes)
    reached = []
    for _ in range(2):
        outcome = ridgeline.train(stopped, loss=StopAt(3))
        assert not outcome.complete
        reached.append(outcome.step)
    assert ridgeline.train(stopped).complete
    assert 0 < reached[0] < reached[1] < 12
    assert last_tensors(stopped) == last_tensors(whole)
    rows = [[row["loss"] for row in rows_of(run, "loss")] for run in (whole, stopped)]
    assert rows[0] == rows[1]
    events = [row["event"] for row in rows_of(stopped, "event") if row["event"] != "checkpoint"]
    assert events == ["started", "interrupted", "resumed", "interrupted", "resumed", "finished"]


def test_a_budget_that_is_extended_is_the_longer_run(
    tiny_run: MakeRun, last_tensors: LastTensors
) -> None:
    constant = {"shape": "constant"}  # the other shapes plan their decay by the budget
    whole = tiny_run(name="whole", budget={"steps": 9}, schedule=constant)
    ridgeline.train(whole)
    for steps in (4, 9):
        part = tiny_run(name="part", budget={"steps": steps}, schedule=constant)
        ridgeline.train(part)
    assert last_tensors(part) == last_tensors(whole)


def test_a_run_killed_between_checkpoints_repeats_what_was_lost(
    tiny_run: MakeRun, rows_of: RowsOf, last_tensors: LastTensors
) -> None:
    class DieAt(StopAt):
        def __call__(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
            if torch.is_grad_enabled() and self.called in self.calls:
                raise ZeroDivisionError
            return super().__call__(logits_BLV, targets_BL)

    saving = {"every_steps": 4}
    whole = tiny_run(name="whole", budget={"steps": 10}, checkpoint=saving)
    ridgeline.train(whole)
    killed = tiny_run(name="killed", budget={"steps": 10}, checkpoint=saving)
    with pytest.raises(ZeroDivisionError):
        ridgeline.train(killed, loss=DieAt(6))
    assert rows_of(killed, "loss")[-1]["step"] == 6
    ridgeline.train(killed)
    assert last_tensors(killed) == last_tensors(whole)
    assert [row["step"] for row in rows_of(killed, "loss")] == list(range(1, 11))


def test_a_finished_run_is_measured_again_and_not_trained(
    tiny_run: MakeRun, last_tensors: LastTensors
) -> None:
    run = tiny_run()
    first = ridgeline.train(run)
    before = last_tensors(run)
    again = ridgeline.train(run)
    assert (again.complete, again.step, again.tokens) == (True, 4, 4 * 8 * 32)
    assert again.held_out_loss == first.held_out_loss
    assert last_tensors(run) == before


def test_a_resumed_run_of_hours_knows_its_time_from_the_first_step(
    tiny_run: MakeRun, rows_of: RowsOf
) -> None:
    schedule = {"shape": "linear", "warmup_steps": 1, "final_fraction": 0.0}
    run = tiny_run(budget={"steps": None, "hours": 1.0}, schedule=schedule)
    assert not ridgeline.train(run, loss=StopAt(3)).complete
    manifest = max((run.path / "checkpoints").glob("step-*")) / "manifest.json"
    told = json.loads(manifest.read_text())["body"]
    told["progress"]["elapsed_s"] = 1800.0  # as if it had trained for half of its hour
    manifest.write_text(manifest_text(told))
    before = len(rows_of(run, "loss"))
    assert not ridgeline.train(run, loss=StopAt(3)).complete
    after = [row["lr"] for row in rows_of(run, "loss")[before:]]
    assert len(after) > 3
    assert after == pytest.approx([run.optimizer.lr / 2] * len(after), rel=0.02)


@pytest.fixture(autouse=True)
def _signals_are_as_they_were() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) is before
