"""Checkpoints: what of a run is saved, and how it is read into any layout.

`manifest.py` says what a checkpoint is on disk, and `saving.py` writes it. PyTorch's distributed
planners decide who reads what; nothing in a checkpoint is code, and loading never unpickles.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_planned
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ridgeline.errors import CheckpointError, DamagedCheckpoint
from ridgeline.train.exchange import share
from ridgeline.train.manifest import (
    DTYPES,
    Manifest,
    Progress,
    SavedChunk,
    SavedTensor,
    check_files,
    complete,
    key_of,
    read_manifest,
    set_aside,
)
from ridgeline.train.optimizer import LossScale

OPTIONAL = ("random.", "loss_scale", "last_steps")
"""What a checkpoint of another layout, precision or device need not have."""


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name to tensor of a model's weights, shared ones once, and of the buffers it saves."""
    buffers = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if not isinstance(value, nn.Parameter)
    }
    named = dict(model.named_parameters()) | buffers
    return {f"model.{name}": value for name, value in named.items()}


def tensors_of(
    chunks: Sequence[nn.Module],
    optimizer: torch.optim.Optimizer,
    loss_scale: LossScale | None = None,
    last_steps: Tensor | None = None,
) -> dict[str, Tensor]:
    """Name to tensor of all that a resumed run needs: weights, buffers, optimizer and random state.

    Shared parameters are named once. The optimizer's state must exist (see `make_state`).
    """
    tensors: dict[str, Tensor] = {}
    for chunk in chunks:
        tensors |= model_tensors(chunk)
        for name, parameter in chunk.named_parameters():
            for key, value in optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
    rank = dist.get_rank() if dist.is_initialized() else 0
    tensors[f"random.{rank}"] = torch.get_rng_state()
    if (device := _accelerator()) is not None:
        tensors[f"random.{device}.{rank}"] = torch.get_device_module(device).get_rng_state()
    if loss_scale is not None:
        tensors["loss_scale"] = loss_scale.state
    if last_steps is not None:
        tensors["last_steps"] = last_steps
    return tensors


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state tensors by a step with zero gradients and zero learning rate.

    The values are then overwritten by `load`; weights do not change, since every update is
    scaled by the learning rate.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _accelerator() -> str | None:
    """The kind of accelerator whose random state a rank has beside the host's."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found else None


def restore(
    folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> tuple[Progress | None, list[CheckpointError]]:
    """Read the newest sound checkpoint below `folder` into `tensors`, on all ranks the same one.

    Returns the progress, None where there is no checkpoint; and why newer ones were passed over.
    Those are then set aside under another name. Raises CheckpointError when every one is damaged: a
    run never starts anew by itself; and when one is sound but of another model.
    """
    passed_over: list[CheckpointError] = []
    damaged_paths: list[Path] = []
    first = group is None or dist.get_rank(group) == 0
    for path in [folder / name for name in share([p.name for p in complete(folder)], group)[0]][
        ::-1
    ]:
        progress, words, damaged = None, None, False
        try:
            progress = load(path, tensors, first)
        except CheckpointError as fault:
            words, damaged = fault.args, isinstance(fault, DamagedCheckpoint)
        told = [each for each in share([words, damaged], group) if each[0] is not None]
        if not told:
            for each in damaged_paths if first else []:
                _try_to_set_aside(each, passed_over)
            return progress, passed_over
        for each, is_damaged in told:
            if not is_damaged:
                raise CheckpointError(*each)
        passed_over.append(DamagedCheckpoint(*told[0][0]))
        damaged_paths.append(path)
    if passed_over:
        raise CheckpointError(
            f"resuming from {folder}",
            f"all of its {len(passed_over)} checkpoints are damaged: {passed_over[0]}",
            "a copy of one of them, or another --name to start anew",
        )
    return None, []


def _try_to_set_aside(path: Path, told: list[CheckpointError]) -> None:
    """A folder that cannot be renamed stays; the next checkpoint of its step replaces it."""
    try:
        set_aside(path)
    except OSError as fault:
        told.append(DamagedCheckpoint(f"checkpoint {path}", f"it cannot be set aside: {fault}"))


def load(path: Path, tensors: Mapping[str, Tensor], check: bool = True) -> Progress:
    """Read a checkpoint into `tensors`, in place and in whatever layout they are.

    Each rank reads and verifies its own parts, without a message; `check` looks at the sizes of
    all files. Random state is restored when this rank saved one. Raises CheckpointError where the
    checkpoint lacks a tensor or has another shape, DamagedCheckpoint where it is damaged.
    """
    manifest = read_manifest(path)
    if check:
        check_files(path, manifest)
    # A tied head has its own copy on the last chunk of a pipeline; elsewhere it is the embedding.
    there = {
        name: name if name in manifest.tensors else name.replace("head.", "embedding.", 1)
        for name in tensors
    }
    wanted = {n: v for n, v in tensors.items() if there[n] in manifest.tensors}
    if missing := [n for n in tensors if n not in wanted and not n.startswith(OPTIONAL)]:
        raise CheckpointError(
            f"checkpoint {path}",
            f"it has no {missing[0]!r} ({len(missing)} tensors are missing)",
            "the model and optimizer that wrote it",
        )
    for name, value in wanted.items():
        saved = list(manifest.tensors[there[name]].shape)
        if saved != list(value.shape):
            raise CheckpointError(
                f"checkpoint {path}", f"{name} is {saved} there and {list(value.shape)} here", ""
            )
    loaded = {there[name]: value for name, value in reversed(wanted.items())}
    try:
        with warnings.catch_warnings():
            # Each rank plans for itself; PyTorch guesses that this is an oversight.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load_planned(dict(loaded), storage_reader=_Reader(path, manifest), no_dist=True)
    except CheckpointException as failure:
        fault, _ = next(iter(failure.failures.values()))
        if isinstance(fault, CheckpointError):
            raise fault from None
        raise
    with torch.no_grad():
        for name, value in wanted.items():
            if value is not loaded[there[name]]:
                value.copy_(loaded[there[name]])
    for name, value in wanted.items():
        if name.startswith("random."):
            kind = name.split(".")[1]
            module = torch if kind.isdecimal() else torch.get_device_module(kind)
            module.set_rng_state(value)
    return manifest.progress


class _Reader(StorageReader):
    """Reads what a plan asks for, checking each chunk's crc32."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described: dict[str, Any] = {}
        for name, entry in self.manifest.tensors.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                for chunk in entry.chunks
            ]
            properties = TensorProperties(dtype=DTYPES[entry.dtype])
            described[name] = TensorStorageMetadata(properties, torch.Size(entry.shape), chunks)
        return Metadata(described)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR  # read_metadata describes tensors only
            name, offsets = item.storage_index.fqn, tuple(item.storage_index.offset or ())
            saved = self.manifest.tensors[name]
            chunk = next(c for c in saved.chunks if c.offsets == offsets or not offsets)
            part = self._read(name, saved, chunk)
            for dimension, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                part = part.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, name: str, saved: SavedTensor, chunk: SavedChunk) -> Tensor:
        asked, key = f"checkpoint {self.path}", key_of(name, chunk.offsets)
        try:
            with safe_open(self.path / chunk.file, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as fault:
            raise DamagedCheckpoint(asked, f"{chunk.file}: {fault}") from None
        here = tensor.dtype, tuple(tensor.shape)
        if here != (DTYPES[saved.dtype], chunk.sizes):
            rule = f"{key} in {chunk.file} is {here[0]} {list(here[1])}, the manifest says "
            raise DamagedCheckpoint(asked, f"{rule}{saved.dtype} {list(chunk.sizes)}")
        if crc32_of(tensor) != chunk.crc32:
            rule = f"{key} in {chunk.file} does not have the checksum of its manifest"
            raise DamagedCheckpoint(asked, rule)
        return tensor

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)


def bytes_of(tensor: Tensor) -> memoryview:
    """A contiguous tensor's memory on the host."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def crc32_of(tensor: Tensor) -> int:
    """Checksum of a tensor's values."""
    return zlib.crc32(bytes_of(tensor))
