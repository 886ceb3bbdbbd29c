"""What each field of a run changes: probes that look at one part of what a run does."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import ridgeline
from ridgeline.data.prepare import prepare
from ridgeline.errors import CorruptionError, LaunchError, LayoutError, NotLearnt, WorkerLost
from ridgeline.launch.local import Life, run_workers
from ridgeline.launch.stopping import Wish, deadline
from ridgeline.layout.arithmetic import check
from ridgeline.layout.layout import Layout
from ridgeline.layout.trainable import trainable
from ridgeline.model.counts import flops_per_token, parameters
from ridgeline.model.decoder import Decoder, make_mlp
from ridgeline.plan.constants import peak
from ridgeline.plan.question import question_of_run
from ridgeline.run import Run
from ridgeline.train.build import build
from ridgeline.train.experts import update_router_bias
from ridgeline.train.manifest import Progress
from ridgeline.train.parallelize import make_mesh
from ridgeline.train.pipeline import steps_of
from ridgeline.train.resolve import Host, resolve
from ridgeline.train.saving import Saver
from ridgeline.train.schedule import (
    batch_at,
    first_sample,
    learning_rate,
    run_fraction,
    total_steps,
)
from ridgeline.train.start import judge
from ridgeline.train.telemetry import Clock
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.watchdog import Watchdog
from ridgeline.train.worker import Outcome, local_folder

MakeRun = Callable[..., Run]
LAPTOP = Host(torch.device("cpu"), devices=0, cores=2, numa_domains=1, bf16=None)
TIMED = {"tokens_per_s", "memory_bytes", "step_s", "seconds", "mfu", "time", "start_s"}
TIMED |= {"write_s", "slower"}


def trained(run: Run) -> object:
    """All that training leaves, but for what differs from one minute to the next."""
    outcome = ridgeline.train(run)
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    measured = [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    knows_its_peak = any(row.get("mfu") is not None for row in rows)
    measured.sort(
        key=lambda row: ("loss" in row, row["step"])
    )  # a checkpoint tells when it is done
    kept = sorted(path.name for path in (run.path / "checkpoints").iterdir())
    files = sorted(path.name for path in run.path.iterdir())
    return outcome, measured, knows_its_peak, kept, files


def saved(run: Run) -> object:
    """How a checkpoint is written: whether from a copy, and what lies on the node's own disk."""
    saver = Saver(run.path / "checkpoints", run.checkpoint, None, local_folder(run))
    saver.save(Progress(step=1), {"weight": torch.zeros(3)})
    done = saver.finish()
    assert done is not None and done.error is None
    return len(saver.buffers), sorted(Path().rglob("step-*"))


def troubled(run: Run) -> object:
    """Which steps are left out, and whether one stops the run, where the loss is NaN in step 2 and
    a thousandfold in step 23."""
    factors = (
        {2: math.nan, 23: 1000.0}.get(step, 1.0) for step in itertools.count(1) for _ in range(2)
    )

    def loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        factor = next(factors) if torch.is_grad_enabled() else 1.0
        return token_loss(logits_BLV, targets_BL) * factor

    stopped = None
    try:
        ridgeline.train(run, loss=loss)
    except NotLearnt as error:
        stopped = error.rule
    rows = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return stopped, [row["step"] for row in map(json.loads, rows) if row.get("event") == "bad_step"]


def miscalculated(run: Run) -> bool:
    """Whether a device whose products are wrong goes unnoticed."""

    class Faulty(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            return out + 1 if func is torch.ops.aten.mm.default else out

    try:
        with Faulty():  # type: ignore[no-untyped-call]
            ridgeline.train(run)
    except CorruptionError:
        return False
    return True


def planned(run: Run) -> float:
    """The peak that a plan of the run's own machine is measured against."""
    asked = question_of_run(run)
    return peak(asked.cluster, asked.precision)


def where(run: Run) -> object:
    """The folder that training makes."""
    ridgeline.train(run)
    return run.path, (run.path / "metrics.jsonl").exists()


def scheduled(run: Run) -> object:
    """The curve of the learning rate, and what each step trains on."""
    steps = total_steps(run) or 30
    rates = [
        learning_rate(run, step, step / steps) for step in range(0, steps, max(1, steps // 30))
    ]
    return rates, total_steps(run), [(batch_at(run, s), first_sample(run, s)) for s in range(12)]


def fraction(run: Run) -> float:
    """How much of the budget is behind step 3, after 36 seconds."""
    return run_fraction(run, 3, 36.0)


def computed(run: Run) -> object:
    """Logits of the model as it is initialised, or what it weighs and costs if only planned."""
    counts = parameters(run.model), flops_per_token(run.model, run.sequence, "full")
    if run.model.latent_attention:
        return counts
    model = Decoder(run.model)
    model.initialise(run.seed)
    tokens = torch.arange(24).reshape(2, 12) * 11 % 250
    return counts, model(tokens).tolist()


def balanced(run: Run) -> object:
    """What evens the load of the experts: the gradient of the router, and the moved bias."""
    mixture = make_mlp(run.model, 0)
    x_BLD = torch.ones(1, 8, run.model.hidden)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    torch.autograd.backward(mixture(x_BLD).sum())
    update_router_bias([mixture], lambda visits_ME: visits_ME)
    gradient = mixture.get_parameter("router.weight").grad
    assert gradient is not None
    return gradient.tolist(), mixture.get_buffer("selection_bias").tolist()


def written(run: Run) -> str:
    """The run's own file, for fields whose whole effect is to be told to a reader."""
    return run.to_toml()


def resolved(run: Run) -> object:
    """What is chosen for a laptop."""
    return resolve(run, LAPTOP, None)[0]


def refused(run: Run) -> str | None:
    """Why the layout cannot be trained, if it cannot."""
    assert isinstance(run.layout, Layout)
    try:
        trainable(run.layout, run.model, run.sequence)
    except LayoutError as error:
        return error.rule
    return None


def divided(run: Run) -> object:
    """The program that the last rank of the layout runs, built without the other ranks: which part
    of each parameter it holds and who shares it, what is done to its blocks, and all its actions.

    Nothing of it is refused: that a run trains so is for the tests of parity.
    """
    layout = run.layout
    assert isinstance(layout, Layout) and refused(run) is None
    check(layout, run.model, run.sequence, run.global_batch, layout.world)
    rank = layout.world - 1
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    try:
        mesh = make_mesh(layout, torch.device("cpu"), rank)
        pipeline = build(run, Decoder, mesh, Clock())
        told: list[object] = [pipeline.positions.tolist(), pipeline.hidden().shape]
        for index, chunk in pipeline.chunks.items():
            for name, parameter in chunk.named_parameters():
                told.append((index, name, parameter.shape))
                if isinstance(parameter, DTensor):
                    ranks = parameter.device_mesh.mesh.tolist()
                    told.append((parameter.to_local().shape, parameter.placements, ranks))
            for block in chunk.get_submodule("blocks").children():
                told.append(isinstance(block, FSDPModule))
                told.append(getattr(block.forward, "args", ())[:1])  # the kind of recomputation
                told.append(block._compiled_call_impl is not None)
    finally:
        dist.destroy_process_group()
    micro_batches = run.global_batch // (layout.data * layout.micro_batch)
    return told, steps_of(layout, pipeline.rank, micro_batches, True)


def judged(run: Run) -> bool:
    """Whether a held-out loss of half a nat is enough."""
    try:
        judge(run, Outcome(rank=0, complete=True, step=4, tokens=99, held_out_loss=0.5))
    except NotLearnt:
        return False
    return True


def hangs_after(run: Run) -> float:
    """Seconds after which the watchdog calls a step a hang."""
    return Watchdog(run).limit_s


def made(run: Run) -> object:
    """What `data prepare` writes and says."""
    said = io.StringIO()
    manifest = prepare(run.data, run.model.vocab, run.seed, Console(file=said, width=200))
    workers = [line.split(" by ")[1] for line in said.getvalue().splitlines() if " by " in line]
    shards = sorted(path.name for path in run.data.folder.iterdir())
    return str(run.data.folder), manifest.digest(), shards, workers


def launched(run: Run) -> object:
    """The layout for which a launcher has too few devices."""
    return resolve(run, LAPTOP, 2)[0].layout


def lost(run: Run) -> object:
    """What becomes of a worker that dies once."""
    run.path.mkdir(parents=True)
    try:
        return run_workers(lose_once, (run.path,), 1, faults=run.faults)
    except WorkerLost:
        return None


def lose_once(folder: Path, life: Life) -> int:
    if not life.lost:
        os.kill(os.getpid(), signal.SIGKILL)
    return len(life.lost)


def slow(run: Run) -> object:
    """What becomes of a worker that was asked to stop and takes a second and a half."""
    stop = Wish()
    stop.set()
    try:
        return run_workers(sleep, (1.5,), 1, stop, run.faults)
    except LaunchError as error:
        return error.rule


def sleep(seconds: float, life: Life) -> float:
    time.sleep(seconds)
    return seconds


def limited(run: Run) -> float:
    """When to save, in a job that ends an hour after the epoch."""
    with patch.dict(os.environ, {"SLURM_JOB_END_TIME": "3600"}):
        return deadline(run.faults.save_before_s)


@dataclass(frozen=True)
class Case:
    """A field, another value for it, and the probe that shows the difference."""

    name: str
    value: object
    probe: Callable[[Run], object]
    base: dict[str, Any] = field(default_factory=dict)
    along: dict[str, Any] = field(default_factory=dict)
    """What must change with it, for the run to agree with itself."""


def nested(name: str, value: object) -> dict[str, Any]:
    """{"a": {"b": value}} from "a.b"."""
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value
