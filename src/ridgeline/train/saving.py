"""Writing checkpoints while training goes on.

Who writes what is planned once, by PyTorch's distributed planner. To save, each rank copies its
parts into buffers on the host, which is all that training waits for; a thread then writes them,
to a disk of the node first where there is one, and rank 0 makes the checkpoint a complete one.
A write that fails leaves the checkpoints before it, and the run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from ridgeline.errors import CheckpointError, DamagedCheckpoint
from ridgeline.run import Checkpoint
from ridgeline.train.checkpoint import bytes_of
from ridgeline.train.exchange import broadcast, gather, scatter, share
from ridgeline.train.manifest import (
    DTYPES,
    MANIFEST,
    Progress,
    check_files,
    commit,
    complete,
    file_of,
    folder_of,
    keep_newest,
    key_of,
    manifest_text,
    partial_of,
    read_manifest,
)

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Saved:
    """How one checkpoint went; the same on every rank, but for the seconds."""

    progress: Progress
    path: Path
    error: str | None
    """Why it could not be written; then it is not there."""
    stall_s: float
    """What training waited."""
    write_s: float
    """From the copy to the complete checkpoint."""
    size_bytes: int
    """Of all files."""


@dataclass
class Saver:
    """One rank's part in the checkpoints of a run."""

    folder: Path
    settings: Checkpoint
    group: dist.ProcessGroup | None
    """Of all ranks, on the host, for the writing threads alone."""
    local: Path | None = None
    """Where on this node's own disk checkpoints are written first."""
    items: list[WriteItem] | None = None
    """What this rank writes, once planned."""
    tensors: dict[str, Any] = field(default_factory=dict)
    """Rank 0: the manifest's tensors, each chunk with the rank that writes it, its place there."""
    buffers: list[Tensor] = field(default_factory=list)
    thread: threading.Thread | None = None
    done: Saved | None = None

    @property
    def rank(self) -> int:
        """This rank."""
        return 0 if self.group is None else dist.get_rank(self.group)

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> Saved | None:
        """Begin a checkpoint of all ranks' `tensors`; how the one before went, if not yet told.

        Waits for that one first, and for this one too unless saving is asynchronous.
        """
        began = time.perf_counter()
        before = self.finish()
        if self.items is None:
            self._plan(tensors)
        pieces = self._snapshot(tensors)
        stall_s = time.perf_counter() - began
        self.thread = threading.Thread(
            target=self._run, args=(progress, pieces, stall_s, began), daemon=True
        )
        self.thread.start()
        if not self.settings.asynchronous:
            self.thread.join()
        return before

    def poll(self) -> Saved | None:
        """How the last checkpoint went, once, when it has gone."""
        if self.thread is None or self.thread.is_alive():
            return None
        self.thread.join()
        self.thread = None
        done, self.done = self.done, None
        if done is None:
            raise CheckpointError(
                "writing a checkpoint", "its thread died, as the traceback above says", ""
            )
        return done

    def finish(self) -> Saved | None:
        """Wait for the last checkpoint; how it went, if that is not yet told."""
        if self.thread is not None:
            self.thread.join()
        return self.poll()

    def _plan(self, tensors: Mapping[str, Tensor]) -> None:
        """Agree who writes what: each part once, however many ranks hold it."""
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in NAMES:
                kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise CheckpointError(
                    f"saving {name}", f"only tensors of some types are saved, not {kind}",
                    ", ".join(DTYPES),
                )  # fmt: skip
        own = _planner(tensors).create_local_plan().items
        told = gather([_described(item) for item in own], self.group)
        chosen: list[list[Any]] | None = None
        if told is not None:
            plans = [SavePlan([_item(*entry) for entry in rank]) for rank in told]
            final, _ = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
            chosen = [[_described(item)[:2] for item in plan.items] for plan in final]
            for rank, plan in enumerate(final):
                for place, item in enumerate(plan.items):
                    name, offsets, sizes, dtype, shape = _described(item)
                    entry = {"dtype": dtype, "shape": shape, "chunks": []}
                    chunk = {"offsets": offsets, "sizes": sizes, "by": (rank, place)}
                    self.tensors.setdefault(name, entry)["chunks"].append(chunk)
        here = {_key(*_described(item)[:2]): item for item in own}
        self.items = [here[_key(*entry)] for entry in scatter(chosen, self.group)]

    def _snapshot(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """This rank's parts, on the host: copies, where training goes on beside the writing."""
        assert self.items is not None
        planner = _planner(tensors)
        parts = [_part(planner, item) for item in self.items]
        if not self.settings.asynchronous:
            return [part.cpu().contiguous() for part in parts]
        if not self.buffers:
            for part in parts:
                pinned = part.device.type != "cpu"
                self.buffers.append(torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned))
        for buffer, part in zip(self.buffers, parts, strict=True):
            buffer.copy_(part, non_blocking=True)
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return self.buffers

    def _run(
        self, progress: Progress, pieces: Sequence[Tensor], stall_s: float, began: float
    ) -> None:
        final = folder_of(self.folder, progress.step)
        error, size = self._write(final, progress, pieces)
        write_s = time.perf_counter() - began - stall_s
        if not self.settings.asynchronous:
            stall_s, write_s = stall_s + write_s, 0.0
        self.done = Saved(progress, final, error, stall_s, write_s, size)

    def _write(
        self, final: Path, progress: Progress, pieces: Sequence[Tensor]
    ) -> tuple[str | None, int]:
        """All ranks: write, and rank 0 commits; (what went wrong, bytes of all files)."""
        assert self.items is not None
        partial = partial_of(final)
        here = partial if self.local is None else self.local / final.name
        keys = [_key(*_described(item)[:2]) for item in self.items]
        report: dict[str, Any] = {"crc32": [], "bytes": 0, "error": None}
        try:
            if keys:
                file = here / file_of(self.rank)
                report["crc32"] = write_safetensors(file, keys, pieces)
                report["bytes"] = file.stat().st_size
        except OSError as fault:
            report["error"] = f"rank {self.rank}: {fault}"
        told = gather(report, self.group)
        text, error = None, None
        if told is not None:
            error = next((each["error"] for each in told if each["error"]), None)
            text = manifest_text(self._body(progress, told)) if error is None else None
        if self.local is not None:
            text = broadcast(text, self.group)
            if text is not None:
                error = self._drain(here, partial, text)
        outcome = None
        if told is not None:
            error = self._commit(partial, final, None if error else text) or error
            outcome = [error, sum(each["bytes"] for each in told)]
        error, size = broadcast(outcome, self.group)
        return error, size

    def _body(self, progress: Progress, told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The manifest of what every rank reported."""
        tensors = {}
        for name, entry in self.tensors.items():
            chunks = [
                {"offsets": chunk["offsets"], "sizes": chunk["sizes"],
                 "file": file_of(chunk["by"][0]),
                 "crc32": told[chunk["by"][0]]["crc32"][chunk["by"][1]]}
                for chunk in entry["chunks"]
            ]  # fmt: skip
            tensors[name] = entry | {"chunks": chunks}
        files = {file_of(rank): each["bytes"] for rank, each in enumerate(told) if each["bytes"]}
        return {"progress": asdict(progress), "files": files, "tensors": tensors}

    def _drain(self, here: Path, partial: Path, text: str) -> str | None:
        """From this node's disk to the folder of all; rank 0: what went wrong anywhere."""
        error = None
        try:
            if is_first_of_its_node():
                (here / MANIFEST).write_text(text)
            copy_files([file_of(self.rank)], here, partial)
            for old in complete(here.parent)[:-1] if is_first_of_its_node() else []:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as fault:
            error = f"rank {self.rank}: {fault}"
        told = gather(error, self.group)
        return next((each for each in told if each), None) if told is not None else None

    def _commit(self, partial: Path, final: Path, text: str | None) -> str | None:
        """Rank 0: give the checkpoint its name, or remove what there is of it."""
        try:
            if text is not None:
                commit(partial, final, text)
                keep_newest(final.parent, self.settings.keep, self.settings.permanent_every_steps)
                return None
        except OSError as fault:
            shutil.rmtree(partial, ignore_errors=True)
            return f"rank 0: {fault}"
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        return None


def is_first_of_its_node() -> bool:
    """Whether this process is the one that cares for what its node's ranks share."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def drain_left(local: Path, folder: Path, group: dist.ProcessGroup | None) -> str | None:
    """Bring over what a killed run had on its nodes' disks and not yet in the folder of all.

    The newest checkpoint of which every file is still on some node; its name, if there is one.
    """
    mine = [path.name for path in complete(local)] if is_first_of_its_node() else []
    there = share([mine, [path.name for path in complete(folder)]], group)
    known = max(there[0][1], default="")
    for name in sorted({name for names, _ in there for name in names if name > known})[::-1]:
        final = folder / name
        partial, drained = partial_of(final), False
        with suppress(OSError, DamagedCheckpoint):  # what a node lacks, another one may have
            if name in mine:
                files = read_manifest(local / name).files
                copy_files([*files, MANIFEST], local / name, partial)
        share(None, group)
        if group is None or dist.get_rank(group) == 0:
            with suppress(OSError, DamagedCheckpoint):  # then the one before it
                check_files(partial, read_manifest(partial))
                commit(partial, final, (partial / MANIFEST).read_text())
                drained = True
            shutil.rmtree(partial, ignore_errors=True)
        if broadcast(drained, group):
            return str(name)
    return None


def copy_files(names: Sequence[str], source: Path, target: Path) -> None:
    """Copy those of the files that are there, and wait until they are on disk."""
    for name in names:
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
            with (target / name).open("rb") as file:
                os.fsync(file.fileno())


def write_safetensors(file: Path, keys: Sequence[str], tensors: Sequence[Tensor]) -> list[int]:
    """Write contiguous host tensors in the safetensors format, and wait until they are on disk.

    The library's own writer first copies all of them in memory. Returns each one's crc32. Source:
    the format's description, github.com/huggingface/safetensors.
    """
    header, at = {}, 0
    for key, tensor in zip(keys, tensors, strict=True):
        end = at + tensor.nbytes
        header[key] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end],
        }  # fmt: skip
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    checksums = []
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            out.write(bytes_of(tensor))
            checksums.append(zlib.crc32(bytes_of(tensor)))
        out.flush()
        os.fsync(out.fileno())
    return checksums


def _planner(tensors: Mapping[str, Tensor]) -> DefaultSavePlanner:
    planner = DefaultSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    return planner


def _part(planner: DefaultSavePlanner, item: WriteItem) -> Tensor:
    part = planner.resolve_data(item)
    assert isinstance(part, Tensor)
    return part.detach()


def _key(name: str, offsets: Sequence[int]) -> str:
    return key_of(name, tuple(offsets))


def _described(item: WriteItem) -> tuple[str, list[int], list[int], str, list[int]]:
    """Name, offsets, sizes, type, and shape of the whole: what another rank needs to know."""
    data = item.tensor_data
    assert data is not None
    dtype = NAMES[data.properties.dtype]
    return item.index.fqn, list(data.chunk.offsets), list(data.chunk.sizes), dtype, list(data.size)


def _item(
    name: str, offsets: list[int], sizes: list[int], dtype: str, shape: list[int]
) -> WriteItem:
    """The other way."""
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    data = TensorWriteData(chunk, TensorProperties(dtype=DTYPES[dtype]), torch.Size(shape))
    kind = WriteItemType.TENSOR if sizes == shape else WriteItemType.SHARD
    return WriteItem(MetadataIndex(name, chunk.offsets), kind, tensor_data=data)
