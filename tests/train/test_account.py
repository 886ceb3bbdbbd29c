"""The measured ledger of real runs: every second has a cause, and sampling changes no number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import ridgeline
from ridgeline.launch.pool import Pool
from ridgeline.ledger import Ledger, StepSeconds, read_ledger
from ridgeline.model.counts import flops_per_token, parameters
from ridgeline.model.decoder import Decoder
from ridgeline.run import Run
from ridgeline.train import account
from ridgeline.train.optimizer import adamw
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import work

MakeRun = Callable[..., Run]
RowsOf = Callable[..., list[dict[str, Any]]]
NOT_OF_THE_STEP = {"compute_s", "total_s", "checkpoint_stall_s", "evaluation_s"}


def _work(run: Run) -> None:
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "checkpoints").mkdir(exist_ok=True)
    work(run, Decoder, token_loss, adamw)


def ledger(run: Run) -> Ledger:
    return read_ledger(run.path / "ledgers/train.json")


def timeline(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / "ledgers/timeline.json").read_text())
    return found


def causes(seconds: StepSeconds) -> dict[str, float]:
    values = {k: v for k, v in seconds.model_dump().items() if k not in NOT_OF_THE_STEP}
    assert None not in values.values()
    return values


def test_a_run_leaves_a_ledger_in_which_every_second_has_a_cause(
    tiny_run: MakeRun, rows_of: RowsOf
) -> None:
    run = tiny_run(budget={"steps": 5}, evaluation={"every_steps": 2})
    ridgeline.train(run)
    found = ledger(run)
    assert found.witness == "train"
    assert sum(causes(found.seconds).values()) == pytest.approx(found.seconds.total_s)
    assert found.seconds.forward_s and found.seconds.backward_s and found.seconds.data_stall_s
    evaluations = [row["seconds"]["evaluation"] for row in rows_of(run, "held_out")]
    assert found.seconds.evaluation_s == pytest.approx(sum(evaluations) / 5, rel=0.05)
    (saved,) = (row for row in rows_of(run, "event") if row["event"] == "checkpoint")
    # the copy of the state, and what lies around it
    assert saved["seconds"] / 5 <= (found.seconds.checkpoint_stall_s or 0) <= saved["seconds"]
    assert found.train_s is not None
    assert 0 < found.train_s < rows_of(run, "event")[-1]["time"] - rows_of(run, "event")[0]["time"]
    assert (found.calls.tensor, found.calls.world) == (0, 4)  # valid tokens, norm; two groups more
    assert found.sent.world_bytes == 0  # to itself
    assert found.sources["sent.data_bytes"].startswith("messages of step 3")
    assert set(found.sources) >= {f"seconds.{name}" for name in causes(found.seconds)}
    assert found.mfu is None


def test_the_counted_step_knows_memory_and_the_flops_of_the_formula(tiny_run: MakeRun) -> None:
    run = tiny_run(budget={"steps": 4})
    ridgeline.train(run)
    found = ledger(run)
    (memory,) = found.memory
    model = parameters(run.model).total * 4  # in float32
    assert model <= (memory.gradients_bytes or 0) < 1.1 * model
    assert 3 * model <= (memory.optimizer_bytes or 0) < 3.1 * model
    assert memory.activations_bytes
    assert found.hardware_flops_per_device == pytest.approx(
        8 * 32 * flops_per_token(run.model, 32, "causal").total, rel=1e-3
    )
    assert sum(found.flops_by_module.values()) == found.hardware_flops_per_device
    assert found.kernels and found.kernels > 100
    assert "step 4" in found.sources["kernels"]


def test_actions_of_one_process_are_those_of_the_sampled_step(tiny_run: MakeRun) -> None:
    run = tiny_run(budget={"steps": 4})
    ridgeline.train(run)
    seen = timeline(run)
    assert seen["step"] == 3
    (actions,) = seen["ranks"]
    assert [(a["kind"], a["chunk"], a["micro_batch"]) for a in actions] == [
        ("F", 0, 0), ("B", 0, 0), ("F", 0, 1), ("B", 0, 1),
    ]  # fmt: skip
    ends = [0.0, *(moment for a in actions for moment in (a["start_s"], a["end_s"]))]
    assert ends == sorted(ends)


def test_sampling_changes_no_number(
    tiny_run: MakeRun, last_tensors: Callable[[Run], dict[str, bytes]]
) -> None:
    tensors = []
    for name, first in (("sampled", 3), ("plain", 1000)):
        run = tiny_run(name=name, layout="mb2 bf16 selective", budget={"steps": 5})
        with patch.object(account, "FIRST", first):
            ridgeline.train(run)
        tensors.append(last_tensors(run))
        assert (run.path / "ledgers/timeline.json").exists() == (name == "sampled")
    assert tensors[0] == tensors[1]
    assert ledger(run).seconds.forward_s is None
    assert ledger(run).seconds.total_s is not None


@pytest.mark.parametrize("layout", ["dp2 mb2 fp32 zero3", "tp2 mb2 fp32"])
def test_two_ranks_tell_what_their_axis_costs(tiny_run: MakeRun, pool: Pool, layout: str) -> None:
    run = tiny_run(layout=layout, budget={"steps": 5})
    pool.run(_work, (run,), 2)
    found = ledger(run)
    axis, other = ("data", "tensor") if "dp2" in layout else ("tensor", "data")
    assert sum(causes(found.seconds).values()) == pytest.approx(found.seconds.total_s)
    assert getattr(found.seconds, f"{axis}_s") > 0
    assert getattr(found.seconds, f"{other}_s") == 0
    assert getattr(found.calls, axis) > 10
    assert getattr(found.sent, f"{axis}_bytes") > 1000
    assert "of 2" in found.sources["seconds.total_s"]
    assert len(timeline(run)["ranks"]) == 1


def test_a_pipeline_tells_its_bubble_and_its_actions(tiny_run: MakeRun, pool: Pool) -> None:
    run = tiny_run(layout="pp2 mb2 fp32", budget={"steps": 5})
    pool.run(_work, (run,), 2)
    found = ledger(run)
    assert sum(causes(found.seconds).values()) == pytest.approx(found.seconds.total_s)
    assert found.seconds.bubble_s and found.seconds.pipeline_s is not None
    assert len(found.memory) == 2
    first, last = timeline(run)["ranks"]
    assert [a["kind"] for a in first] == list("FFBFBFBB")
    assert [a["kind"] for a in last] == list("FBFBFBFB")
    begun = {a["micro_batch"]: a["start_s"] for a in first if a["kind"] == "F"}
    assert all(a["end_s"] > begun[a["micro_batch"]] for a in last if a["kind"] == "F")
    hidden = 4 * 2 * 32 * 32 * 4  # micro-batches of B sequences, L tokens, D hidden, in float32
    assert hidden <= (found.sent.pipeline_bytes or 0) <= hidden + 64  # and a norm between the two


def test_a_killed_run_says_what_was_lost_when_it_resumes(
    tiny_run: MakeRun, rows_of: RowsOf
) -> None:
    run = tiny_run(budget={"steps": 6}, checkpoint={"every_steps": 4})
    ridgeline.train(run)
    for path in run.path.glob("checkpoints/step-*6"):
        path.rename(path.with_name(".gone"))  # as if the run had been killed before this one
    before = rows_of(run, "time")
    ridgeline.train(run)
    lost, resumed = (e for e in rows_of(run, "event") if e["event"] in ("lost", "resumed"))
    assert (lost["step"], lost["lost_steps"]) == (4, 2)
    kept = [row for row in before if row["step"] <= 4]
    assert lost["lost_s"] == pytest.approx(before[-1]["time"] - kept[-1]["time"])
    assert resumed["start_s"] > 0


def test_a_ledger_that_cannot_be_read_leaves_the_energy_unknown(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    assert account._energy_of(path) is None
    path.write_text(Ledger(witness="train", energy_j=5.0).to_json())
    assert account._energy_of(path) == 5.0
