"""Checkpoints: what is saved comes back bit for bit, damage is refused, nothing is executed."""

from __future__ import annotations

import json
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ridgeline.errors import CheckpointError
from ridgeline.run import Optimizer
from ridgeline.train import checkpoint
from ridgeline.train.checkpoint import Progress, keep_newest, load, make_state, newest, save
from ridgeline.train.optimizer import LossScale, adamw


def some_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Every kind that a run saves, and views that share memory."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(6, 4, generator=generator)
    return {
        "matrix": matrix,
        "transposed": matrix.t(),
        "row": matrix[2],
        "step": torch.tensor(17.0 + seed),
        "half": torch.randn(5, generator=generator).bfloat16(),
        "counts": torch.arange(7) + 2**40 + seed,
        "bytes": torch.arange(9, dtype=torch.uint8) + seed,
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "empty": torch.zeros(0, 3),
    }


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in tensors.items()
    }


def blank(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors.items()}


def saved(folder: Path, step: int = 3) -> Path:
    return save(folder, some_tensors(), Progress(step=step, samples=24, data="abc"), None)


def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    progress = Progress(step=3, samples=24, tokens=768, elapsed_s=1.25, data="abc")
    path = save(tmp_path, some_tensors(), progress, None)
    there = blank(some_tensors())
    assert load(path, there, None) == progress
    assert bits(there) == bits(some_tensors())
    assert path == newest(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003"]


def test_nothing_in_a_checkpoint_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path)

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    there = blank(some_tensors())
    load(path, there, None)
    assert bits(there) == bits(some_tensors())
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    with safe_open(path / "rank-00000.safetensors", framework="np") as file:
        assert len(list(file.keys())) == len(some_tensors())


def truncate(path: Path) -> None:
    file = path / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    file = path / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)


def spoil_the_header(path: Path) -> None:
    file = path / "rank-00000.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def remove(path: Path) -> None:
    (path / "rank-00000.safetensors").unlink()


def remove_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_the_manifest(path: Path) -> None:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-9])


def write_a_foreign_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": "somebody-elses-2"}')


def write_a_list(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def forget_a_tensor(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["tensors"]["half"]
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "rule"),
    [
        (truncate, r"should hold [\d,]+ bytes and holds [\d,]+"),
        (flip_a_bit, "does not have the checksum of its manifest"),
        (spoil_the_header, "(?i)header"),
        (remove, "is missing"),
        (remove_the_manifest, "no readable manifest"),
        (cut_the_manifest, "no readable manifest"),
        (write_a_foreign_manifest, "its manifest is not one of ridgeline-checkpoint-1"),
        (write_a_list, "its manifest is not one of ridgeline-checkpoint-1"),
        (forget_a_tensor, "it has no 'half'"),
    ],
)
def test_damage_is_refused(tmp_path: Path, damage: Callable[[Path], None], rule: str) -> None:
    path = saved(tmp_path)
    damage(path)
    with pytest.raises(CheckpointError, match=rule) as caught:
        load(path, blank(some_tensors()), None)
    assert str(path) in caught.value.asked


def test_another_models_shapes_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    there = blank(some_tensors())
    there["matrix"] = torch.zeros(4, 6)
    with pytest.raises(CheckpointError, match=r"matrix is \[6, 4\] there and \[4, 6\] here"):
        load(path, there, None)


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    first = saved(tmp_path)
    large = {"large": torch.zeros(2**20)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))  # as good as a full disk
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            save(tmp_path, large, Progress(step=4), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert newest(tmp_path) == first
    there = blank(some_tensors())
    load(first, there, None)
    assert bits(there) == bits(some_tensors())
    second = save(tmp_path, large, Progress(step=4), None)  # what was left is in nobody's way
    assert newest(tmp_path) == second


def test_only_the_newest_are_kept_and_torn_ones_removed(tmp_path: Path) -> None:
    for step in (2, 30, 100):
        saved(tmp_path, step)
    (tmp_path / ".step-00000200.partial").mkdir()
    keep_newest(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00000100"]
    keep_newest(tmp_path, 5)
    assert len(list(tmp_path.iterdir())) == 2


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


class Tied(nn.Module):
    """Shares a matrix, and has a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.embedding(tokens)
        logits: Tensor = self.head(hidden)
        return logits


def test_weights_buffers_optimizer_and_random_state_are_all_that_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = Tied()
    optimizer = adamw(model, Optimizer())
    make_state(optimizer)
    tensors = checkpoint.tensors_of([model], optimizer)
    assert set(tensors) == {
        "model.embedding.weight",
        "model.mean",
        "optimizer.embedding.weight.step",
        "optimizer.embedding.weight.exp_avg",
        "optimizer.embedding.weight.exp_avg_sq",
        "random.0",
    }
    path = save(tmp_path, tensors, Progress(step=1), None)
    drawn = torch.rand(3)
    load(path, checkpoint.tensors_of([model], optimizer), None)
    assert torch.equal(torch.rand(3), drawn)  # the generator stands where it stood


def test_a_loss_scale_is_saved_and_may_be_missing(tmp_path: Path) -> None:
    """Missing where the run went on in another precision."""
    model = Tied()
    optimizer = adamw(model, Optimizer())
    make_state(optimizer)
    scale, other = LossScale(), LossScale()
    scale.accepts(torch.tensor(float("inf")))
    path = save(tmp_path, checkpoint.tensors_of([model], optimizer, scale), Progress(step=1), None)
    load(path, checkpoint.tensors_of([model], optimizer, other), None)
    assert torch.equal(other.state, scale.state)
    assert other.factor == LossScale.START / 2
    load(path, checkpoint.tensors_of([model], optimizer), None)
    without = save(tmp_path, checkpoint.tensors_of([model], optimizer), Progress(step=2), None)
    load(without, checkpoint.tensors_of([model], optimizer, fresh := LossScale()), None)
    assert fresh.factor == LossScale.START


def test_creating_the_optimizers_state_changes_no_weight() -> None:
    model = Tied()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, Optimizer(lr=0.7, weight_decay=0.5))
    make_state(optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert {group["lr"] for group in optimizer.param_groups} == {0.7}


def test_only_tensors_are_saved(tmp_path: Path) -> None:
    anything: Any = {"setting": "text"}
    with pytest.raises(CheckpointError, match="only tensors"):
        save(tmp_path, anything, Progress(step=1), None)
    assert newest(tmp_path) is None
