"""Checkpoints: what is saved comes back bit for bit, damage is found, nothing is executed."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.train.saved import bits, blank, some_tensors, write, written
from torch import Tensor, nn

from ridgeline.errors import CheckpointError, DamagedCheckpoint
from ridgeline.run import Optimizer
from ridgeline.train import checkpoint
from ridgeline.train.checkpoint import load, make_state, restore
from ridgeline.train.manifest import MANIFEST, Progress, file_of, manifest_text, newest
from ridgeline.train.optimizer import LossScale, adamw

FILE = file_of(0)


def test_every_tensor_comes_back_bit_for_bit(tmp_path: Path) -> None:
    progress = Progress(step=3, samples=24, tokens=768, elapsed_s=1.25, data="abc")
    path = write(tmp_path, some_tensors(), progress).path
    there = blank(some_tensors())
    assert load(path, there) == progress
    assert bits(there) == bits(some_tensors())
    assert path == newest(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003"]


def test_nothing_in_a_checkpoint_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    path = written(tmp_path)
    there = blank(some_tensors())
    load(path, there)
    assert bits(there) == bits(some_tensors())
    files = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert files == {".json", ".safetensors"}
    with safe_open(path / FILE, framework="np") as file:
        assert len(list(file.keys())) == len(some_tensors())


Damage = Callable[[Path], object]


def bytes_at(name: str, place: float, change: Callable[[bytes], bytes]) -> Damage:
    """Replace the eight bytes at a place (a share of the file) by what `change` makes of them."""

    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        at = int(place * (len(content) - 8))
        (path / name).write_bytes(content[:at] + change(content[at : at + 8]) + content[at + 8 :])

    return damage


def flip(content: bytes) -> bytes:
    """One bit the other way."""
    return bytes([content[0] ^ 1]) + content[1:]


def whole(name: str, content: bytes) -> Damage:
    """The file holds something else."""
    return lambda path: (path / name).write_bytes(content)


def resized(name: str, share: float) -> Damage:
    """The file is shorter, or longer by zeros."""

    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        size = int(share * len(content)) if share != 1 else len(content) - 1
        (path / name).write_bytes(content[:size].ljust(size, b"\0"))

    return damage


def in_manifest(change: Callable[[dict[str, Any]], object], *, sealed: bool = False) -> Damage:
    """The manifest says something else; sealed: with a checksum that fits."""

    def damage(path: Path) -> None:
        document = json.loads((path / MANIFEST).read_text())
        change(document["body"] if sealed else document)
        text = manifest_text(document["body"]) if sealed else json.dumps(document)
        (path / MANIFEST).write_text(text)

    return damage


def in_shard(change: Callable[[dict[str, Tensor]], object]) -> Damage:
    """The shard is sound by itself, and not what was written."""

    def damage(path: Path) -> None:
        tensors = load_file(path / FILE)
        change(tensors)
        save_file(tensors, path / FILE)
        size = (path / FILE).stat().st_size
        in_manifest(lambda body: body["files"].update({FILE: size}), sealed=True)(path)

    return damage


def swap(tensors: dict[str, Tensor]) -> None:
    """Two tensors of the same size under each other's name."""
    first = tensors["matrix@0,0"].clone()
    tensors["matrix@0,0"] = tensors["transposed@0,0"].clone().reshape(6, 4)
    tensors["transposed@0,0"] = first.reshape(4, 6)


def from_another(path: Path) -> None:
    """The same file of another step."""
    other = written(path.parent / "elsewhere", 4, seed=9)
    shutil.copyfile(other / FILE, path / FILE)
    shutil.rmtree(other.parent)


def folder_in_place_of_the_shard(path: Path) -> None:
    (path / FILE).unlink()
    (path / FILE).mkdir()


def chunk_of(body: dict[str, Any]) -> dict[str, Any]:
    """The first chunk of a matrix in a manifest."""
    first: dict[str, Any] = body["tensors"]["matrix"]["chunks"][0]
    return first


DAMAGE: dict[str, Damage] = {
    "the shard is missing": lambda path: (path / FILE).unlink(),
    "the shard's folder is missing": lambda path: shutil.rmtree(path / "ranks-000"),
    "the shard is a folder": folder_in_place_of_the_shard,
    "the shard is empty": whole(FILE, b""),
    "the shard lacks its last byte": resized(FILE, 1),
    "the shard is cut in the middle": resized(FILE, 0.5),
    "the shard has bytes behind it": resized(FILE, 1.1),
    "a bit of the last value is flipped": bytes_at(FILE, 1, flip),
    "a bit in the middle is flipped": bytes_at(FILE, 0.9, flip),
    "a block is zeros": bytes_at(FILE, 0.95, lambda old: bytes(8)),
    "the header's length is absurd": bytes_at(FILE, 0, lambda old: b"\xff" * 8),
    "the header's length is off by one": bytes_at(FILE, 0, flip),
    "the header is not JSON": bytes_at(FILE, 0.1, lambda old: b"\0" * 8),
    "the shard is of another step": from_another,
    "the shard is another program's": whole(FILE, pickle.dumps({"weights": [1.0]})),
    "two tensors are exchanged": in_shard(swap),
    "a tensor is missing in the shard": in_shard(lambda t: t.pop("half@0")),
    "a tensor has another type": in_shard(lambda t: t.update({"half@0": t["half@0"].half()})),
    "a tensor has another shape": in_shard(
        lambda t: t.update({"matrix@0,0": t["matrix@0,0"].reshape(4, 6)})
    ),
    "there is no manifest": lambda path: (path / MANIFEST).unlink(),
    "the manifest is empty": whole(MANIFEST, b""),
    "the manifest is cut": resized(MANIFEST, 0.7),
    "the manifest is no text": whole(MANIFEST, b"\xff\xfe\x00"),
    "the manifest is a list": whole(MANIFEST, b"[]"),
    "the manifest is deeply nested": whole(MANIFEST, b"[" * 100_000),
    "the manifest is another program's": whole(MANIFEST, b'{"format": "somebody-elses-2"}'),
    "the manifest is of another version": in_manifest(
        lambda document: document.update(format="ridgeline-checkpoint-1")
    ),
    "the manifest's step is another": in_manifest(
        lambda document: document["body"]["progress"].update(step=4)
    ),
    "the manifest has lost a tensor": in_manifest(
        lambda document: document["body"]["tensors"].pop("half")
    ),
    "the manifest says no checksum": in_manifest(lambda document: document.pop("crc32")),
    "a chunk is missing": in_manifest(
        lambda body: body["tensors"]["matrix"]["chunks"].clear(), sealed=True
    ),
    "a chunk lies outside": in_manifest(
        lambda body: chunk_of(body).update(offsets=[6, 0]), sealed=True
    ),
    "a chunk's checksum is another": in_manifest(
        lambda body: chunk_of(body).update(crc32=0), sealed=True
    ),
    "a chunk lies in a file elsewhere": in_manifest(
        lambda body: chunk_of(body).update(file="../../secret"), sealed=True
    ),
    "a type is no type": in_manifest(
        lambda body: body["tensors"]["matrix"].update(dtype="save"), sealed=True
    ),
    "the progress is no number": in_manifest(
        lambda body: body["progress"].update(samples="many"), sealed=True
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_the_checkpoint_before_it_used(tmp_path: Path, kind: str) -> None:
    first = written(tmp_path, 2, seed=5)
    DAMAGE[kind](second := written(tmp_path))
    with pytest.raises(DamagedCheckpoint) as caught:
        load(second, blank(some_tensors()))
    assert str(second) in caught.value.asked
    there = blank(some_tensors())
    progress, passed_over = restore(tmp_path, there, None)
    assert progress is not None and progress.step == 2
    assert bits(there) == bits(some_tensors(5))
    assert [each.asked for each in passed_over] == [f"checkpoint {second}"]
    assert newest(tmp_path) == first
    assert {path.name for path in tmp_path.iterdir()} == {first.name, f"damaged-{second.name}"}
    assert written(tmp_path) == newest(tmp_path)  # its step is saved anew


def test_there_are_thirty_kinds_of_damage_and_more() -> None:
    assert len(DAMAGE) >= 30


def test_a_checkpoint_that_cannot_be_opened_is_passed_over(tmp_path: Path) -> None:
    written(tmp_path, 2)
    newer = written(tmp_path)
    (newer / FILE).unlink()
    (newer / FILE).symlink_to(FILE.rpartition("/")[2])  # a loop: nobody can open it, not even root
    progress, passed_over = restore(tmp_path, blank(some_tensors()), None)
    assert progress is not None and progress.step == 2
    assert "symbolic links" in str(passed_over[0]) or "missing" in str(passed_over[0])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(tmp_path: Path) -> None:
    for step in (2, 3):
        DAMAGE["the shard is empty"](written(tmp_path, step))
    for _ in range(2):  # they stay where they are, so the next try starts nothing anew either
        with pytest.raises(CheckpointError, match="all of its 2 checkpoints are damaged"):
            restore(tmp_path, blank(some_tensors()), None)


def test_another_models_shapes_are_refused_and_not_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path)
    there = blank(some_tensors())
    there["matrix"] = torch.zeros(4, 6)
    for read in (lambda: load(path, there), lambda: restore(tmp_path, there, None)):
        with pytest.raises(CheckpointError, match=r"matrix is \[6, 4\] there and \[4, 6\] here"):
            read()
    assert newest(tmp_path) == path


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert restore(tmp_path / "nowhere", {}, None) == (None, [])


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
    path = write(tmp_path, tensors, Progress(step=1)).path
    drawn = torch.rand(3)
    load(path, checkpoint.tensors_of([model], optimizer))
    assert torch.equal(torch.rand(3), drawn)  # the generator stands where it stood


def test_a_loss_scale_is_saved_and_may_be_missing(tmp_path: Path) -> None:
    """Missing where the run went on in another precision."""
    model = Tied()
    optimizer = adamw(model, Optimizer())
    make_state(optimizer)
    scale, other = LossScale(), LossScale()
    scale.accepts(torch.tensor(float("inf")))
    tensors = checkpoint.tensors_of([model], optimizer, scale)
    path = write(tmp_path, tensors, Progress(step=1)).path
    load(path, checkpoint.tensors_of([model], optimizer, other))
    assert torch.equal(other.state, scale.state)
    assert other.factor == LossScale.START / 2
    load(path, checkpoint.tensors_of([model], optimizer))
    tensors = checkpoint.tensors_of([model], optimizer)
    without = write(tmp_path, tensors, Progress(step=2)).path
    load(without, checkpoint.tensors_of([model], optimizer, fresh := LossScale()))
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
