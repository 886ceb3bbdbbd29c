"""Checkpoints: PyTorch's distributed planners over safetensors files and one JSON manifest.

    checkpoints/step-00000120/
        manifest.json               progress, and for each tensor its chunks: file, key, crc32
        rank-00000.safetensors      the tensors this rank was asked to write

A checkpoint is written under a temporary name and renamed when complete, so one that has the final
name is whole. Nothing in it is code: loading never unpickles.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_planned
from torch.distributed.checkpoint.state_dict_saver import save as save_planned
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ridgeline.errors import CheckpointError
from ridgeline.train.optimizer import LossScale

FORMAT = "ridgeline-checkpoint-1"
PREFIX = "step-"
OPTIONAL = ("random.", "loss_scale", "last_steps")
"""What a checkpoint of another layout or precision need not have."""
MOVE_AWAY = "move this folder away: the run resumes from the checkpoint before it"


@dataclass(frozen=True)
class Progress:
    """Where a run stands: everything beside tensors that a resumed run needs."""

    step: int = 0
    """Optimizer steps done."""
    samples: int = 0
    """Index of the next sample."""
    tokens: int = 0
    """Training tokens seen."""
    elapsed_s: float = 0.0
    """Seconds of training over all restarts."""
    data: str = ""
    """Fingerprint of the mixture."""


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


def save(
    folder: Path, tensors: Mapping[str, Tensor], progress: Progress, group: dist.ProcessGroup | None
) -> Path:
    """Write a checkpoint of all ranks below `folder`, commit it by rename, and return its path."""
    final = folder / f"{PREFIX}{progress.step:08d}"
    if final.exists():
        return final
    writer = _Writer(folder / f".{final.name}.partial", final, asdict(progress))
    try:
        with _planning(f"checkpoint {final}", "written"):
            save_planned(
                dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None
            )
    except CheckpointError:
        shutil.rmtree(writer.partial, ignore_errors=True)  # a full disk needs the room
        raise
    return final


def load(path: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> Progress:
    """Read a checkpoint into `tensors`, in place and in whatever layout they are.

    Random state is restored when this rank saved one. Raises CheckpointError when the checkpoint
    is damaged or lacks a tensor.
    """
    manifest = read_manifest(path)
    # A tied head has its own copy on the last chunk of a pipeline; elsewhere it is the embedding.
    there = {
        name: name if name in manifest["tensors"] else name.replace("head.", "embedding.", 1)
        for name in tensors
    }
    wanted = {n: v for n, v in tensors.items() if there[n] in manifest["tensors"]}
    if missing := [n for n in tensors if n not in wanted and not n.startswith(OPTIONAL)]:
        raise CheckpointError(
            f"checkpoint {path}",
            f"it has no {missing[0]!r} ({len(missing)} tensors are missing)",
            "the model and optimizer that wrote it",
        )
    for name, value in wanted.items():
        saved = manifest["tensors"][there[name]]["shape"]
        if saved != list(value.shape):
            raise CheckpointError(
                f"checkpoint {path}", f"{name} is {saved} there and {list(value.shape)} here", ""
            )
    reader = _Reader(path, manifest)
    loaded = {there[name]: value for name, value in reversed(wanted.items())}
    with _planning(f"checkpoint {path}", "read"):
        load_planned(
            dict(loaded), storage_reader=reader, process_group=group, no_dist=group is None
        )
    with torch.no_grad():
        for name, value in wanted.items():
            if value is not loaded[there[name]]:
                value.copy_(loaded[there[name]])
    for name, value in wanted.items():
        if name.startswith("random."):
            torch.set_rng_state(value)
    return Progress(**manifest["progress"])


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after checking that its files are there in full."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as fault:
        raise CheckpointError(
            f"checkpoint {path}", f"no readable manifest: {fault}", MOVE_AWAY
        ) from None
    whole = {"format", "progress", "files", "tensors"}
    if (
        not isinstance(manifest, dict)
        or manifest.get("format") != FORMAT
        or manifest.keys() != whole
        or not all(isinstance(manifest[key], dict) for key in whole - {"format"})
        or manifest["progress"].keys() != {field.name for field in fields(Progress)}
    ):
        raise CheckpointError(
            f"checkpoint {path}", f"its manifest is not one of {FORMAT}", MOVE_AWAY
        )
    for name, size in manifest["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            raise CheckpointError(
                f"checkpoint {path}",
                f"{name} should hold {size:,} bytes and "
                + ("is missing" if found is None else f"holds {found:,}"),
                MOVE_AWAY,
            )
    return manifest


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, if there is one."""
    return max(complete(folder), default=None)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    return sorted(folder.glob(f"{PREFIX}{'[0-9]' * 8}"))


def keep_newest(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted write left behind."""
    for old in complete(folder)[:-keep]:
        shutil.rmtree(old)
    for partial in folder.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(partial)


@contextmanager
def _planning(asked: str, verb: str) -> Iterator[None]:
    """PyTorch's planners with a rank's own error for their list of all ranks' tracebacks.

    Silences their guess that working without a process group is an oversight.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as failure:
        rank, (fault, _) = min(failure.failures.items())
        if isinstance(fault, CheckpointError):
            raise fault from None
        if isinstance(fault, OSError | SafetensorError):
            rule = f"it cannot be {verb} by rank {rank}: {fault}"
            raise CheckpointError(asked, rule, "free space, or another folder") from None
        raise


def _alone(tensor: Tensor) -> Tensor:
    """`tensor` with storage of its own: safetensors refuses tensors that share one."""
    shares = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if shares else tensor


def _crc32(tensor: Tensor) -> int:
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


class _Writer(StorageWriter):
    """Each rank writes one safetensors file; the coordinator writes the manifest and commits."""

    def __init__(self, partial: Path, final: Path, progress: dict[str, Any]) -> None:
        self.partial = partial
        self.final = final
        self.progress = progress
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        # Only the coordinator runs this, before anybody writes.
        if self.partial.exists():
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True)
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors: dict[str, Tensor] = {}
        results = []
        file = f"rank-{self.rank:05d}.safetensors"
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise CheckpointError(f"saving {item.index.fqn}", "only tensors are saved", "")
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            tensor = tensor.detach().cpu().contiguous()
            key = f"{item.index.fqn}@{','.join(map(str, item.index.offset or ()))}"
            tensors[key] = _alone(tensor)
            entry = {"file": file, "key": key, "crc32": _crc32(tensor)}
            results.append(WriteResult(item.index, tensor.nbytes, entry))
        if tensors:
            save_file(tensors, self.partial / file)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = {result.index: result.storage_data for rank in results for result in rank}
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)  # write_data refuses the rest
            chunks = [
                {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)}
                | written[MetadataIndex(name, chunk.offsets)]
                for chunk in entry.chunks
            ]
            tensors[name] = {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "shape": list(entry.size),
                "chunks": chunks,
            }
        files = {p.name: p.stat().st_size for p in sorted(self.partial.glob("*.safetensors"))}
        manifest = {
            "format": FORMAT, "progress": self.progress, "files": files, "tensors": tensors,
        }  # fmt: skip
        (self.partial / "manifest.json").write_text(json.dumps(manifest))
        self.partial.rename(self.final)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)


class _Reader(StorageReader):
    """Reads what a plan asks for, checking each chunk's crc32."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
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
        for name, entry in self.manifest["tensors"].items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"]))
                for chunk in entry["chunks"]
            ]
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            described[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
        return Metadata(described)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR  # read_metadata describes tensors only
            offsets = list(item.storage_index.offset or ())
            chunk = next(
                chunk
                for chunk in self.manifest["tensors"][item.storage_index.fqn]["chunks"]
                if chunk["offsets"] == offsets or not offsets
            )
            part = self._read(chunk)
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

    def _read(self, chunk: dict[str, Any]) -> Tensor:
        try:
            with safe_open(self.path / chunk["file"], framework="pt") as file:
                tensor: Tensor = file.get_tensor(chunk["key"])
        except (SafetensorError, OSError) as fault:
            raise CheckpointError(f"checkpoint {self.path}", str(fault), "") from None
        if _crc32(tensor) != chunk["crc32"]:
            raise CheckpointError(
                f"checkpoint {self.path}",
                f"{chunk['key']} in {chunk['file']} does not have the checksum of its manifest",
                MOVE_AWAY,
            )
        return tensor

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)
