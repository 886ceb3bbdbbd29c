"""A checkpoint written in one layout is read in any other: weights, buffers, optimizer state."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tests.train import saved
from torch import Tensor
from torch.distributed.tensor import DTensor

from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.model.decoder import Decoder
from ridgeline.run import Run
from ridgeline.torch_compat import local_part
from ridgeline.train.build import make_job
from ridgeline.train.checkpoint import load, make_state, tensors_of
from ridgeline.train.loop import Job
from ridgeline.train.manifest import Progress, newest
from ridgeline.train.optimizer import adamw
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import process_group

TIED = {"tied": True, "layers": 4, "vocab": 321}  # over two tensor ranks: 161 and 160
GPT = {"positions": "learned", "norm": "layernorm", "bias": True, "layers": 4}
EXPERTS = {
    "layers": 3,
    "experts": {
        "count": 4, "top_k": 2, "ffn_hidden": 16, "shared": 1, "bias_rate": 0.1,
        "first_dense_layers": 1,
    },
}  # fmt: skip
PATHS = [
    # model, layout that writes, layout that reads
    (TIED, "pp2", "dp1"),
    (TIED, "dp1", "pp2"),
    (TIED, "pp2 zbv", "dp1"),  # both copies of the embedding on one rank
    (TIED, "dp1", "pp2 zbv"),
    (TIED, "dp2 tp2 zero3", "pp2"),
    (TIED, "pp2", "dp2 tp2 zero3"),
    (TIED, "dp4 zero2/2", "tp4"),
    (GPT, "dp2 tp2 zero3", "pp2 v2"),
    (GPT, "pp2 v2", "tp2 cp2 zero1"),
    (EXPERTS, "dp2 ep2 tp2 zero3", "pp2"),
    (EXPERTS, "dp1", "dp4 ep2 zero1"),
    (EXPERTS, "pp2", "dp4 ep4"),
]


def value_of(name: str, like: Tensor) -> Tensor:
    """A whole value that its name decides; both names of a tied embedding mean the same."""
    key = name.replace("head.", "embedding.")
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def held(job: Job) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, this rank's part, and the part it should hold, of all but random state."""
    for name, tensor in tensors_of(job.chunks, job.optimizer).items():
        if not name.startswith("random."):
            here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            yield name, here, local_part(value_of(name, tensor), tensor)


def made(run: Run, device: torch.device, control: dist.ProcessGroup | None) -> Job:
    job = make_job(run, Decoder, token_loss, adamw, device, control, lambda: False)
    make_state(job.optimizer)
    return job


@contextmanager
def unpickling_forbidden() -> Iterator[None]:
    """Whatever would execute what it reads raises."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError("unpickled")

    with ExitStack() as patches:
        for name in ("load", "loads", "Unpickler"):
            patches.enter_context(mock.patch.object(pickle, name, refuse))
        patches.enter_context(mock.patch.object(torch, "load", refuse))
        yield


def write(run: Run) -> set[str]:
    """As each rank: save a checkpoint of values by name; the names this rank holds."""
    with process_group() as (device, control), torch.no_grad():
        job = made(run, device, control)
        for _, here, expected in held(job):
            here.copy_(expected)
        with unpickling_forbidden():
            tensors = tensors_of(job.chunks, job.optimizer)
            assert saved.write(run.path, tensors, Progress(step=7), control).error is None
        return {name for name, *_ in held(job)}


def read(run: Run) -> dict[str, bool]:
    """As each rank: load the newest checkpoint; of each name, whether the value is its own."""
    with process_group() as (device, control):
        job = made(run, device, control)
        assert not any(torch.equal(here, expected) for _, here, expected in held(job))
        path = newest(run.path)
        assert path is not None
        with unpickling_forbidden():
            progress = load(path, tensors_of(job.chunks, job.optimizer))
        assert progress == Progress(step=7)
        return {name: torch.equal(here, expected) for name, here, expected in held(job)}


def one_name(names: set[str]) -> set[str]:
    return {name.replace("head.", "embedding.") for name in names}


@pytest.mark.parametrize(
    ("model", "writer", "reader"),
    PATHS,
    ids=[f"{writer} to {reader}" for _, writer, reader in PATHS],
)
def test_what_one_layout_wrote_another_reads(
    model: dict[str, Any], writer: str, reader: str, tiny_run: Callable[..., Run], pool: Pool
) -> None:
    runs = [tiny_run(model=model, layout=f"{layout} fp32") for layout in (writer, reader)]
    first, second = (run.layout for run in runs)
    assert isinstance(first, Layout) and isinstance(second, Layout)
    written: set[str] = set().union(*pool.run(write, (runs[0],), first.world))
    answers: list[dict[str, bool]] = pool.run(read, (runs[1],), second.world)
    wrong = {name for by_rank in answers for name, equal in by_rank.items() if not equal}
    assert not wrong
    found: set[str] = set().union(*answers)
    tied = bool(runs[0].model.tied)
    assert (one_name(found) == one_name(written)) if tied else (found == written)
    assert {f"optimizer.norm.weight.{key}" for key in ("step", "exp_avg", "exp_avg_sq")} < found
