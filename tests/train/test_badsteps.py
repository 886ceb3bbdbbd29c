"""Bad steps: left out bit for bit, found alike by all ranks, told of, and answered by policy."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import ridgeline
from ridgeline.errors import NotLearnt
from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.ledger import read_ledger
from ridgeline.model.decoder import Decoder
from ridgeline.run import Faults, Optimizer, Run
from ridgeline.train.badsteps import ENOUGH, WINDOW, BadStep, BadSteps
from ridgeline.train.build import make_job
from ridgeline.train.checkpoint import make_state, tensors_of
from ridgeline.train.loop import train_loop
from ridgeline.train.manifest import Progress, manifest_text, read_manifest
from ridgeline.train.optimizer import LossScale, adamw
from ridgeline.train.telemetry import Observation
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import process_group

MakeRun = Callable[..., Run]
RowsOf = Callable[..., list[dict[str, Any]]]
LastTensors = Callable[[Run], dict[str, bytes]]
BATCH = 8
EXPERTS = {
    "layers": 2,
    "experts": {"count": 4, "top_k": 2, "ffn_hidden": 16, "shared": 1, "bias_rate": 0.1},
}


@dataclass
class Troubled:
    """The loss of tokens, times a factor in some steps, counted from 1, of two micro-batches."""

    factors: dict[int, float] = field(default_factory=dict)
    calls: int = 0

    def __call__(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        loss = token_loss(logits_BLV, targets_BL)
        if torch.is_grad_enabled():
            self.calls += 1
            loss = loss * self.factors.get((self.calls + 1) // 2, 1.0)
        return loss


def observation(step: int, loss: float, norm: float, bad: bool = False) -> Observation:
    progress = Progress(step=step, samples=step * BATCH)
    values = torch.tensor([loss, norm, float(bad)])
    return Observation(progress, values[0], values[1], 1e-3, values[2])


def seen_by(run: Run) -> tuple[list[bool], list[BadStep | None]]:
    """As each rank: train with NaN on the last rank in step 3; of each step whether anything
    changed by it, and what was found bad."""
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    changed: list[bool] = []
    found: list[BadStep | None] = []
    with process_group() as (device, control):
        loss = Troubled({3: math.nan} if last else {})
        job = make_job(run, Decoder, loss, adamw, device, control, lambda: False)
        make_state(job.optimizer)
        before: dict[str, Tensor] = {}

        def observe(seen: Observation) -> None:
            found.append(job.bad_steps.report(seen, BATCH))

        def after_step(*_: Any) -> tuple[bool, None]:
            now = {name: t.detach().clone() for name, t in local(job.chunks, job.optimizer).items()}
            same = {name: torch.equal(value, now[name]) for name, value in before.items()}
            kinds = {"model", "exp_avg", "exp_avg_sq", "step", "selection_bias"}
            moved = {kind for kind in kinds for n, s in same.items() if not s and kind in n}
            present = {kind for kind in kinds for name in now if kind in name}
            assert not same or not moved or moved == present, moved  # all of it, or nothing
            changed.append(bool(moved))
            before.update(now)
            return False, None

        train_loop(job, Progress(), observe, after_step)
        found.append(job.bad_steps.settle())
    return changed[1:], found[1:]


def local(chunks: list[nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = tensors_of(chunks, optimizer)
    return {name: getattr(value, "_local_tensor", value) for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("dp2 tp2 mb2 zero1", {}),
        ("pp2 mb4 zero1", {}),
        ("dp2 ep2 tp2 mb2", EXPERTS),
    ],
)
def test_nan_on_one_rank_leaves_a_step_out_on_all_of_them_bit_for_bit(
    layout: str, model: dict[str, Any], tiny_run: MakeRun, pool: Pool
) -> None:
    run = tiny_run(layout=f"{layout} fp32", model=model)
    assert isinstance(run.layout, Layout)
    answers: list[tuple[list[bool], list[BadStep | None]]]
    answers = pool.run(seen_by, (run,), run.layout.world)
    assert [changed for changed, _ in answers] == [[True, False, True]] * run.layout.world
    # The loss may be NaN or not (one tensor rank counts it), but nowhere another one.
    told = {repr([bad and bad[1:] for bad in found]) for _, found in answers}
    assert len(told) == 1
    (first, second, third, fourth) = answers[0][1]
    assert first is second is fourth is None
    assert third is not None
    assert (third.progress.step, third.first_sample, third.batch) == (3, 2 * BATCH, BATCH)
    assert "gradient norm nan is not finite" in third.why


def test_flagging_masking_and_reporting_read_nothing_from_the_device() -> None:
    """A fake tensor has no value: whoever asks for one fails. Only `settle`, a step later, does."""
    with FakeTensorMode():
        model = nn.Linear(3, 2)
        fused, plain = adamw(model, Optimizer()), torch.optim.SGD(model.parameters(), 0.1)
        make_state(fused)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        loss, norm = torch.ones(()), torch.ones(())
    for steps in (BadSteps(), BadSteps(Faults(spike=3.0))):
        for n in range(1, ENOUGH + 2):  # limits are in force
            steps.report(observation(n, 2.0, 1.0), BATCH)
        steps.settle()
        bad = steps.flag(loss, norm)
        steps.update(fused, bad)
        progress = Progress(step=1, samples=BATCH)
        assert steps.report(Observation(progress, loss, norm, 1e-3, bad), BATCH) is None
        with pytest.raises(DataDependentOutputException):
            float(loss)
        with pytest.raises(DataDependentOutputException):
            steps.settle()
        with pytest.raises(DataDependentOutputException):
            steps.update(plain, bad)


def test_an_optimizer_that_knows_no_flag_leaves_bad_steps_out_too(
    tiny_run: MakeRun, rows_of: RowsOf
) -> None:
    def sgd(model: nn.Module, settings: Optimizer) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=True)

    run = tiny_run()
    ridgeline.train(run, optimizer=sgd, loss=Troubled({2: math.inf}))
    losses = [row["loss"] for row in rows_of(run, "loss") if "event" not in row]
    assert losses[1] is None
    assert all(math.isfinite(losses[step]) for step in (0, 2, 3))
    assert [row["at_step"] for row in rows_of(run, "why")] == [2]


def test_a_bad_step_is_told_with_its_samples_even_if_it_is_the_last(
    tiny_run: MakeRun, rows_of: RowsOf, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run()
    outcome = ridgeline.train(run, loss=Troubled({2: math.nan, 4: -math.inf}))
    assert (outcome.complete, outcome.step) == (True, 4)
    assert outcome.held_out_loss is not None and math.isfinite(outcome.held_out_loss)
    rows = rows_of(run, "loss")
    assert [row["loss"] is None for row in rows if "event" not in row] == [False, True, False, True]
    first, last = rows_of(run, "why")
    assert (first["event"], first["step"], first["done"]) == ("bad_step", 2, "left out")
    assert (first["at_step"], first["first_sample"], first["samples"]) == (2, 8, 8)
    assert first["why"] == "loss nan is not finite, gradient norm nan is not finite"
    assert last["why"].startswith("loss -inf is not finite")
    assert (last["step"], last["first_sample"]) == (4, 24)
    assert "step 4 is bad (loss -inf" in capsys.readouterr().out
    rows = [row for row in rows_of(run, "event") if row["event"] in ("bad_step", "checkpoint")]
    assert [row["event"] for row in rows] == ["bad_step", "bad_step", "checkpoint"]


def test_a_run_that_stops_at_a_bad_step_names_its_samples_and_keeps_its_folder(
    tiny_run: MakeRun, rows_of: RowsOf
) -> None:
    run = tiny_run(faults={"bad_step": "stop"})
    with pytest.raises(NotLearnt, match=r"step 2 is bad .*samples 8 to 15") as stopped:
        ridgeline.train(run, loss=Troubled({2: math.nan}))
    assert "--faults.bad_step skip" in stopped.value.remedy
    assert [row["done"] for row in rows_of(run, "why")] == ["the run stops"]


@pytest.mark.parametrize("policy", ["skip", "roll back"])
def test_many_bad_steps_in_a_row_stop_a_run_under_every_policy(
    policy: str, tiny_run: MakeRun, rows_of: RowsOf
) -> None:
    run = tiny_run(
        faults={"bad_step": policy, "most_bad_steps": 3},
        budget={"steps": 20},
        checkpoint={"every_steps": 2},
    )
    factors = dict.fromkeys((3, *range(5, 99)), math.nan)  # 4 is good between
    with pytest.raises(NotLearnt, match="3 bad steps in a row"):
        ridgeline.train(run, loss=Troubled(factors))
    told = [row["at_step"] for row in rows_of(run, "why")]
    # Step 4 is good, but it lies behind step 3 only where nobody goes back.
    assert told == ([3, 5, 6, 7] if policy == "skip" else [3, 3, 3])


def test_rolling_back_passes_over_all_data_since_the_checkpoint(
    tiny_run: MakeRun, rows_of: RowsOf, last_tensors: LastTensors
) -> None:
    keep_all = {"every_steps": 2, "keep": 9}
    changes: dict[str, Any] = {
        "budget": {"steps": 8},
        "checkpoint": keep_all,
        "faults": {"bad_step": "roll back"},
    }
    run = tiny_run(**changes)
    outcome = ridgeline.train(run, loss=Troubled({5: math.nan}))
    assert (outcome.complete, outcome.step) == (True, 8)
    (told,) = rows_of(run, "why")
    assert (told["step"], told["at_step"], told["first_sample"]) == (4, 5, 4 * BATCH)
    assert told["done"] == "back to step 4, past all data since"
    logged = [row["step"] for row in rows_of(run, "loss") if "event" not in row]
    assert logged == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]  # 6 had begun when 5 was known
    assert read_ledger(run.path / "ledgers/train.json").tokens_per_s

    # As a run that reached step 4 with six steps of data behind it.
    other = tiny_run(name="other", **changes)
    ridgeline.train(other)
    for step in (6, 8):
        shutil.rmtree(other.path / f"checkpoints/step-{step:08d}")
    manifest = other.path / "checkpoints/step-00000004/manifest.json"
    values = json.loads(manifest.read_text())["body"]
    assert values["progress"]["samples"] == 4 * BATCH
    values["progress"]["samples"] = 6 * BATCH
    manifest.write_text(manifest_text(values))
    ridgeline.train(other)
    assert last_tensors(run) == last_tensors(other)
    assert read_manifest(run.path / "checkpoints/step-00000008").progress.samples == 10 * BATCH


def test_the_last_step_rolled_back_is_done_again_with_other_data(
    tiny_run: MakeRun, rows_of: RowsOf
) -> None:
    run = tiny_run(checkpoint={"every_steps": 2}, faults={"bad_step": "roll back"})
    outcome = ridgeline.train(run, loss=Troubled({4: math.nan}))
    assert (outcome.complete, outcome.step) == (True, 4)
    assert [row["step"] for row in rows_of(run, "loss") if "event" not in row] == [1, 2, 3, 4, 3, 4]


def test_without_a_checkpoint_to_go_back_to_a_bad_step_is_left_out(
    tiny_run: MakeRun, rows_of: RowsOf
) -> None:
    run = tiny_run(faults={"bad_step": "roll back"})
    assert ridgeline.train(run, loss=Troubled({2: math.nan})).complete
    (told,) = rows_of(run, "why")
    assert told["done"] == "left out: there is no checkpoint to go back to"


def test_a_spike_is_left_out_and_a_resumed_run_finds_it_too(
    tiny_run: MakeRun, rows_of: RowsOf, last_tensors: LastTensors
) -> None:
    changes: dict[str, Any] = {
        "budget": {"steps": ENOUGH + 9},
        "checkpoint": {"every_steps": ENOUGH + 4, "keep": 9},
        "faults": {"spike": 12.0},
        "evaluation": {"sequences": 1},
    }
    run = tiny_run(**changes)
    at = ENOUGH + 6
    ridgeline.train(run, loss=Troubled({at: 100.0}))
    (told,) = rows_of(run, "why")
    assert told["at_step"] == at
    assert told["loss"] > told["loss_limit"] > told["loss"] / 100
    assert "above" in told["why"]

    final = max((run.path / "checkpoints").glob("step-*"))
    whole = last_tensors(run)
    shutil.rmtree(final)
    ridgeline.train(run, loss=Troubled({2: 100.0}))  # two behind the checkpoint
    assert [row["at_step"] for row in rows_of(run, "why")] == [at]
    assert last_tensors(run) == whole

    blind = tiny_run(name="blind", **{**changes, "faults": {}})
    ridgeline.train(blind, loss=Troubled({at: 100.0}))
    assert not rows_of(blind, "why")


@given(
    level=st.floats(0.01, 100),
    noise=st.lists(st.floats(-0.5, 0.5), min_size=ENOUGH + 1, max_size=2 * WINDOW),
)
def test_limits_lie_robustly_above_the_last_good_steps(level: float, noise: list[float]) -> None:
    """Whatever a third of the steps say, the limits come from the other two."""
    steps = BadSteps(Faults(spike=4.0))
    for n, part in enumerate(noise, 1):
        outlier = n % 3 == 0
        value = level * (50.0 if outlier else 1 + 0.1 * part)
        steps.report(observation(n, value, 2 * value), BATCH)
    if len(noise) > ENOUGH:
        loss, norm = steps.limits
        assert level * 0.95 < loss < level * 2.1  # at most 1.05 + 4 · 1.4826 · 0.1 + rounding
        assert norm == pytest.approx(2 * loss, rel=1e-5)


def test_equal_steps_leave_room_for_noise_and_bad_ones_move_no_limit() -> None:
    steps = BadSteps(Faults(spike=5.0))
    for n in range(1, ENOUGH + 2):
        steps.report(observation(n, 2.0, 1.0), BATCH)
    assert steps.limits == pytest.approx((2.0 * 1.05, 1.05))
    for n in range(ENOUGH + 2, 2 * WINDOW):
        steps.report(observation(n, 900.0, 900.0, bad=True), BATCH)
        if n == ENOUGH + 40:
            assert steps.limits == pytest.approx((2.0 * 1.05, 1.05))


def test_an_overflow_in_fp16_is_the_loss_scales_and_no_event(
    tiny_run: MakeRun, rows_of: RowsOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LossScale, "START", 2.0**27)
    run = tiny_run(layout="mb4 fp16", budget={"steps": 12}, faults={"most_bad_steps": 1})
    assert ridgeline.train(run).complete
    norms = [row["grad_norm"] for row in rows_of(run, "grad_norm")]
    assert None in norms and norms[-1] is not None
    assert not rows_of(run, "why")
