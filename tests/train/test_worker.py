"""One rank: how its model starts, what it tells first, and what bf16 keeps in float32."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.data.manifest import read_manifest
from ridgeline.model.counts import parameters
from ridgeline.model.shape import ModelShape
from ridgeline.run import Run
from ridgeline.train.build import without_memory
from ridgeline.train.manifest import read_manifest as manifest_of
from ridgeline.train.optimizer import LossScale

MakeRun = Callable[..., Run]
RowsOf = Callable[..., list[dict[str, Any]]]
LastTensors = Callable[[Run], dict[str, bytes]]


class Plain(nn.Module):
    """A decoder of a user's own: no blocks, no `initialise`, and dropout."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(shape.hidden, shape.vocab)

    def forward(self, tokens_BL: Tensor, positions_L: Tensor) -> Tensor:
        logits_BLV: Tensor = self.head(self.dropout(self.embedding(tokens_BL)))
        return logits_BLV


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
def test_a_decoder_of_ones_own_is_made_by_the_seed_and_learns(
    tiny_run: MakeRun, rows_of: RowsOf, last_tensors: LastTensors
) -> None:
    seen = []
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        run = tiny_run(name=name, seed=seed, budget={"steps": 15})
        torch.rand(7)  # whatever the process drew before
        ridgeline.train(run, decoder=Plain)
        losses = [row["loss"] for row in rows_of(run, "loss")]
        assert losses[0] - losses[-1] > 0.5
        seen.append((losses, last_tensors(run)))
    assert seen[0] == seen[1]  # weights, dropout and all
    assert seen[0] != seen[2]


def test_a_model_without_memory_has_names_and_shapes_only() -> None:
    shape = ModelShape(layers=200, hidden=8192, heads=64, vocab=128_000)  # 160 G parameters
    model = without_memory(Plain, shape)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert next(tuple(p.shape) for p in model.parameters()) == (128_000, 8192)


def test_the_first_row_says_what_is_trained(tiny_run: MakeRun, rows_of: RowsOf) -> None:
    run = tiny_run()
    ridgeline.train(run)
    first, *_, last = rows_of(run, "event")
    counts = parameters(run.model)
    assert first["event"] == "started"
    assert (first["step"], first["total_steps"], first["model"]) == (0, 4, "tiny")
    assert first["parameters"] == counts.total
    assert first["embedding_parameters"] == counts.total - counts.non_embedding
    measured = read_manifest(run.data.folder).baselines
    assert measured is not None
    assert first["baselines"] == {
        "unigram_entropy": measured.unigram_entropy,
        "bigram_held_out_loss": measured.bigram_held_out_loss,
    }
    assert (last["event"], last["step"]) == ("finished", 4)


def test_baselines_of_other_weights_are_not_shown(tiny_run: MakeRun, rows_of: RowsOf) -> None:
    run = tiny_run()
    heavier = run.data.corpora[0].model_copy(update={"weight": 7.0})
    data = run.data.model_copy(update={"corpora": (heavier, run.data.corpora[1])})
    other = run.model_copy(update={"data": data})
    ridgeline.train(other)
    assert rows_of(other, "event")[0]["baselines"] is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bits_keep_master_weights_and_optimizer_in_float32(
    tiny_run: MakeRun, precision: str
) -> None:
    run = tiny_run(layout=f"mb4 {precision}")
    ridgeline.train(run)
    manifest = manifest_of(run.path / "checkpoints/step-00000004")
    kinds = {
        name: entry.dtype
        for name, entry in manifest.tensors.items()
        if not name.startswith("random.")
    }
    assert set(kinds.values()) == {"F32"}
    assert ("loss_scale" in kinds) == (precision == "fp16")


@pytest.mark.parametrize(("short", "apart"), [("bf16", 0.03), ("fp16", 0.005)])
def test_16_bits_learn_almost_as_float32(
    tiny_run: MakeRun, rows_of: RowsOf, short: str, apart: float
) -> None:
    """bf16 has 8 significant bits, fp16 has 11: single losses differ, learning does not."""
    curves = []
    for precision in ("fp32", short):
        run = tiny_run(name=precision, layout=f"mb4 {precision}", budget={"steps": 12})
        ridgeline.train(run)
        curves.append([row["loss"] for row in rows_of(run, "loss")])
    assert curves[1] != curves[0]
    assert curves[1] == pytest.approx(curves[0], rel=apart)


def test_a_step_that_overflows_in_fp16_is_left_out_and_halves_the_scale(
    tiny_run: MakeRun,
    rows_of: RowsOf,
    last_tensors: LastTensors,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(LossScale, "START", 2.0**30)  # over 256 tokens: far above 65,504
    run = tiny_run(layout="mb4 fp16", budget={"steps": 30}, schedule={"shape": "constant"})
    ridgeline.train(run)
    rows = rows_of(run, "loss")
    norms = [row["grad_norm"] for row in rows]
    left_out = [norm is None or not math.isfinite(norm) for norm in norms]
    assert all(left_out[:5])
    assert rows[5]["loss"] == pytest.approx(rows[0]["loss"], abs=0.05)  # nothing has moved
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    (factor, _) = struct.unpack("2f", last_tensors(run)["loss_scale@0"])
    assert factor == 2.0 ** (30 - sum(left_out))
