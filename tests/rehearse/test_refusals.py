"""What cannot be rehearsed is refused in one sentence, and what is right is not complained of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ridgeline
from ridgeline.errors import (
    LaunchError,
    LayoutError,
    MachineError,
    ModelError,
    RidgelineError,
    RunError,
)
from ridgeline.model.shape import ModelShape

FILE = """
name = "small"
layout = "dp2 mb2 bf16"
[model]
name = "small"
layers = 2
hidden = 32
heads = 4
kv_heads = 4
ffn_hidden = 64
vocab = 320
max_sequence = 32
[schedule]
global_batch = 8
[budget]
steps = 4
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A run file without data."""
    path = tmp_path / "small.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


REFUSED: tuple[tuple[list[str], type[RidgelineError], str], ...] = (
    (["--layout", "dp2 zz"], LayoutError, "'zz'"),
    (["--layout", "dp3 mb2 bf16"], LayoutError, "divides the global batch"),
    (["--layout", "tp2 mb2 fp8"], LayoutError, "8 bits"),
    (["--layout", "pp2 mb2 zbh1 bf16 compile"], LayoutError, "two halves"),
    (["--layout", "pp2 mb2 zbh1 bf16 selective"], LayoutError, "two halves"),
    (["--model", "deepseek-v3", "--layout", "dp2 mb1"], LayoutError, "latent attention"),
    (["--cluster.device", "nosuch"], MachineError, "not in the catalogue"),
    (["--layout", "auto", "--cluster.device", "H100-SXM-80GB"], RidgelineError, "devices"),
    (["--cluster.devices", "4"], LayoutError, "number of devices"),
    (["--nosuch", "3"], RunError, "not a field"),
)


@pytest.mark.parametrize(("words", "kind", "told"), REFUSED, ids=[" ".join(r[0]) for r in REFUSED])
def test_what_training_would_refuse_is_refused(
    words: list[str], kind: type[RidgelineError], told: str, file: Path
) -> None:
    with pytest.raises(kind, match=told):
        ridgeline.rehearse(ridgeline.read_run(file, words))


def test_data_need_not_be_there(file: Path) -> None:
    found = ridgeline.rehearse(ridgeline.read_run(file, ["--layout", "auto"]))
    assert found.fits is None
    assert found.fullest.flops > 0


def test_fp8_without_its_extra_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(LaunchError, match="torchao is not installed"):
        ridgeline.rehearse(ridgeline.read_run(file, ["--layout", "dp2 mb2 fp8"]))


class Own(nn.Module):
    """A decoder of a user's: no blocks, and a layer that nothing reaches."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.unused = nn.Linear(shape.hidden, shape.hidden)
        self.head = nn.Linear(shape.hidden, shape.vocab)

    def forward(self, tokens_BL: Tensor, positions_L: Tensor | None = None) -> Tensor:
        logits_BLV: Tensor = self.head(self.embedding(tokens_BL))
        return logits_BLV


class Asking(Own):
    """One whose way depends on a value."""

    def forward(self, tokens_BL: Tensor, positions_L: Tensor | None = None) -> Tensor:
        x_BLD = self.embedding(tokens_BL)
        if x_BLD.sum() > 0:
            x_BLD = torch.relu(x_BLD)
        logits_BLV: Tensor = self.head(x_BLD)
        return logits_BLV


def test_a_decoder_of_ones_own_is_rehearsed_and_its_idle_layer_found(file: Path) -> None:
    found = ridgeline.rehearse(ridgeline.read_run(file), decoder=Own)
    assert any("unused.weight gets no gradient" in each for each in found.findings)


@pytest.mark.parametrize("layout", ["tp2 mb2 bf16", "pp2 mb2 bf16"])
def test_a_decoder_that_cannot_be_divided_is_refused(layout: str, file: Path) -> None:
    with pytest.raises(LayoutError, match="Own"):
        ridgeline.rehearse(ridgeline.read_run(file, ["--layout", layout]), decoder=Own)


def test_a_decoder_that_asks_for_a_value_is_refused(file: Path) -> None:
    with pytest.raises(ModelError, match="no values"):
        ridgeline.rehearse(ridgeline.read_run(file), decoder=Asking)


def test_a_part_that_looks_like_a_whole_matrix_is_no_finding(file: Path) -> None:
    """Half of an MLP's matrix (64, 32) has the shape of a whole one of attention."""
    found = ridgeline.rehearse(ridgeline.read_run(file, ["--layout", "tp2 mb2 bf16"]))
    assert not [each for each in found.findings if "stands whole" in each]
