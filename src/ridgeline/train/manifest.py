"""What a checkpoint is on disk: a folder of safetensors files and a manifest that names each byte.

    checkpoints/step-00000120/
        manifest.json       progress; the chunks of each tensor, their file and crc32; its own crc32
        ranks-000/rank-00000.safetensors        the tensors this rank was asked to write

A checkpoint is written under a temporary name and renamed when complete, so one that has the final
name is whole. No more than `FILES_PER_FOLDER` files share a folder: metadata servers of parallel
file systems serve a folder one request at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ridgeline.errors import DamagedCheckpoint

FORMAT = "ridgeline-checkpoint-2"
PREFIX = "step-"
MANIFEST = "manifest.json"
FILES_PER_FOLDER = 512
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""What may be saved, by the names of the safetensors format."""
SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}

Natural = Annotated[int, Field(ge=0, strict=True)]
FileName = Annotated[str, Field(pattern=r"^ranks-\d{3,6}/rank-\d{5,8}\.safetensors$")]


def file_of(rank: int) -> str:
    """Where a rank writes its tensors, below the checkpoint's folder."""
    return f"ranks-{rank // FILES_PER_FOLDER:03d}/rank-{rank:05d}.safetensors"


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


class Strict(BaseModel):
    """Nothing beside what is named."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SavedChunk(Strict):
    """A part of a tensor, as one rank wrote it."""

    offsets: tuple[Natural, ...]
    sizes: tuple[Natural, ...]
    file: FileName
    crc32: Natural


class SavedTensor(Strict):
    """A whole tensor."""

    dtype: str
    shape: tuple[Natural, ...]
    chunks: tuple[SavedChunk, ...]


class Manifest(Strict):
    """All that a checkpoint holds."""

    progress: Progress
    files: dict[FileName, Natural]
    """Bytes of each file."""
    tensors: dict[str, SavedTensor]

    def fault(self) -> str | None:
        """What does not fit together, if anything does not."""
        for name, tensor in self.tensors.items():
            if tensor.dtype not in DTYPES:
                return f"{name} is of an unknown type {tensor.dtype!r}"
            covered = 0
            for chunk in tensor.chunks:
                ends = zip(chunk.offsets, chunk.sizes, tensor.shape, strict=False)
                if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.shape) or any(
                    offset + size > whole for offset, size, whole in ends
                ):
                    return f"a part of {name} lies outside it"
                if chunk.file not in self.files:
                    return f"a part of {name} lies in a file that it does not name"
                covered += math.prod(chunk.sizes)
            if covered != math.prod(tensor.shape):
                whole = math.prod(tensor.shape)
                return f"it has {covered:,} of the {whole:,} values of {name}"
        return None


def key_of(name: str, offsets: tuple[int, ...]) -> str:
    """What a chunk is called in its safetensors file."""
    return f"{name}@{','.join(map(str, offsets))}"


def manifest_text(body: dict[str, Any]) -> str:
    """The manifest's file: its format, a checksum, and `body`, what a `Manifest` holds."""
    return json.dumps({"format": FORMAT, "crc32": _crc32(body), "body": body})


def _crc32(body: Any) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint. Raises DamagedCheckpoint."""
    asked = f"checkpoint {path}"
    try:
        document = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as fault:
        raise DamagedCheckpoint(asked, f"no readable manifest: {fault}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        rule = f"its manifest is not one of {FORMAT}: {str(found)[:60]!r}"
        raise DamagedCheckpoint(asked, rule)
    body = document.get("body")
    if document.get("crc32") != _crc32(body):
        raise DamagedCheckpoint(asked, "its manifest does not have its own checksum")
    try:
        manifest = Manifest.model_validate(body)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedCheckpoint(asked, f"its manifest: {where}: {first['msg']}") from None
    if misfit := manifest.fault():
        raise DamagedCheckpoint(asked, misfit)
    return manifest


def is_sound(path: Path) -> bool:
    """Whether the manifest of a checkpoint can be read."""
    try:
        read_manifest(path)
    except DamagedCheckpoint:
        return False
    return True


def check_files(path: Path, manifest: Manifest) -> None:
    """Raise DamagedCheckpoint unless every file is there with its size."""
    for name, size in manifest.files.items():
        file = path / name
        try:
            found = file.stat().st_size if file.is_file() else None
        except OSError as fault:
            raise DamagedCheckpoint(f"checkpoint {path}", str(fault)) from None
        if found != size:
            raise DamagedCheckpoint(
                f"checkpoint {path}",
                f"{name} should hold {size:,} bytes and "
                + ("is missing" if found is None else f"holds {found:,}"),
            )


def folder_of(folder: Path, step: int) -> Path:
    """A complete checkpoint's folder."""
    return folder / f"{PREFIX}{step:08d}"


def partial_of(final: Path) -> Path:
    """Where a checkpoint lies until it is complete."""
    return final.with_name(f".{final.name}.partial")


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    return sorted(folder.glob(f"{PREFIX}{'[0-9]' * 8}"))


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, if there is one."""
    return max(complete(folder), default=None)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix(PREFIX))


def commit(partial: Path, final: Path, text: str) -> None:
    """Make a written checkpoint a complete one: its manifest, on disk, then its name.

    One that has the name already, and was found damaged, gives way.
    """
    with (partial / MANIFEST).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        set_aside(final)
    partial.rename(final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name that nothing resumes from; it stays for a look at it."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def keep_newest(folder: Path, keep: int, permanent_every: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints and those of every `permanent_every` steps."""
    for old in complete(folder)[:-keep]:
        if not permanent_every or step_of(old) % permanent_every:
            shutil.rmtree(old, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Remove what interrupted writes left behind."""
    for partial in folder.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
