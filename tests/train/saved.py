"""Checkpoints that tests write: of every kind of tensor a run saves, by one process or several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ridgeline.run import Checkpoint
from ridgeline.train.manifest import Progress
from ridgeline.train.saving import Saved, Saver

WAITING = Checkpoint(asynchronous=False, keep=1000)


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


def bits(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The values of tensors, bit by bit."""
    return {
        name: value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in tensors.items()
    }


def blank(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the same shapes, to load into."""
    return {name: torch.zeros_like(value) for name, value in tensors.items()}


def write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    progress: Progress,
    group: dist.ProcessGroup | None = None,
    settings: Checkpoint = WAITING,
    local: Path | None = None,
) -> Saved:
    """A checkpoint, waited for."""
    saver = Saver(folder, settings, group, local)
    saver.save(progress, tensors)
    saved = saver.finish()
    assert saved is not None
    return saved


def written(folder: Path, step: int = 3, seed: int = 0) -> Path:
    """The path of a small checkpoint."""
    saved = write(folder, some_tensors(seed), Progress(step=step, samples=24, data="abc"))
    assert saved.error is None
    return saved.path
