"""The model of a run: made, cut, divided and filled on this rank, with all it is trained with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ridgeline.data.mixture import Mixture, open_mixture
from ridgeline.errors import LayoutError, ModelError
from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import schedule_of
from ridgeline.layout.stages import Chunk, chunks_of
from ridgeline.model.shape import ModelShape
from ridgeline.run import Optimizer, Run
from ridgeline.torch_compat import Unfilled, local_part
from ridgeline.train.agreement import Agreement
from ridgeline.train.badsteps import BadSteps
from ridgeline.train.loop import Job, LossFunction
from ridgeline.train.optimizer import LossScale
from ridgeline.train.parallelize import PRECISIONS, Mesh, cut, make_mesh, parallelize
from ridgeline.train.pipeline import Pipeline
from ridgeline.train.telemetry import Clock
from ridgeline.train.tensor import rules_of

MakeDecoder = Callable[[ModelShape], nn.Module]
MakeOptimizer = Callable[[nn.Module, Optimizer], torch.optim.Optimizer]


def without_memory(decoder: MakeDecoder, shape: ModelShape) -> nn.Module:
    """The decoder on the meta device: its names and shapes, and no values."""
    with torch.device("meta"), Unfilled():
        return decoder(shape)


def check_decoder(model: nn.Module, layout: Layout) -> None:
    """Raise LayoutError when a decoder cannot be divided as `layout` asks, before any process."""
    if layout.tensor > 1:
        rules_of(model, layout.tensor)
    if layout.pipeline > 1 and not isinstance(getattr(model, "blocks", None), nn.ModuleDict):
        raise LayoutError(
            f"pp{layout.pipeline} for a {type(model).__name__}",
            "a pipeline is cut between the blocks: `blocks` is an nn.ModuleDict of them by layer, "
            "with `embedding` and `positions` before and `norm` and `head` behind it",
            "pp1, or a decoder with these attributes",
        )


def make_job(
    run: Run,
    decoder: MakeDecoder,
    loss: LossFunction,
    make_optimizer: MakeOptimizer,
    device: torch.device,
    control: dist.ProcessGroup | None,
    stop_asked: Callable[[], bool],
) -> Job:
    """Everything this rank trains `run`, resolved, with; needs an initialised process group."""
    assert isinstance(run.layout, Layout)
    mesh = make_mesh(run.layout, device, dist.get_rank())
    mixture = mixture_of(run)
    clock = Clock()
    pipeline = build(run, decoder, mesh, clock)
    chunks = list(pipeline.chunks.values())
    torch.manual_seed(run.seed + mesh.rank)  # for what a user's own decoder draws, as dropout
    model = chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks)
    return Job(
        run=run,
        mesh=mesh,
        pipeline=pipeline,
        loss=loss,
        optimizer=make_optimizer(model, run.optimizer),
        loss_scale=LossScale() if run.layout.precision == "fp16" else None,
        mixture=mixture,
        agreement=Agreement(control),
        clock=clock,
        stop_asked=stop_asked,
        bad_steps=BadSteps(run.faults, loss_scaled=run.layout.precision == "fp16"),
    )


def mixture_of(run: Run) -> Mixture:
    """The mixture a run trains on; DataError when it is missing or too small for one batch."""
    return open_mixture(
        run.data.folder, run.data.corpora, run.sequence, run.seed, run.model.vocab, run.global_batch
    )


def build(run: Run, decoder: MakeDecoder, mesh: Mesh, clock: Clock) -> Pipeline:
    """This rank's chunks of the decoder, divided by the layout, with their initial weights.

    A decoder with `initial_values(seed)` is made without memory first, and each rank fills the
    parts it keeps; another one is made whole, as it makes itself after seeding PyTorch.
    """
    cuts = chunks_of(mesh.layout, run.model, run.sequence)
    chunks = {}
    for chunk in chunks_here(mesh, cuts):
        model = without_memory(decoder, run.model)
        filled = hasattr(model, "initial_values")
        if not filled:
            torch.manual_seed(run.seed)
            model = decoder(run.model).to(mesh.device)
        divide(model, run.model, mesh, chunk, len(cuts))
        if filled:
            _fill(model, run, mesh.device)
        chunks[chunk.index] = model
    return pipeline_of(run, mesh, chunks, len(cuts), clock)


def chunks_here(mesh: Mesh, cuts: Sequence[Chunk]) -> list[Chunk]:
    """Those chunks of the whole model that lie on this rank."""
    ranks = schedule_of(mesh.layout, 1).rank_of_chunk
    return [chunk for chunk in cuts if ranks[chunk.index] == mesh.place["pipeline"]]


def divide(model: nn.Module, shape: ModelShape, mesh: Mesh, chunk: Chunk, count: int) -> None:
    """Make a whole decoder this rank's part of `chunk`, one of `count`, in place.

    A rehearsal leaves out layers that only repeat.
    """
    if count > 1 or len(chunk.layers) < shape.layers:
        cut(model, chunk)
    parallelize(model, shape, mesh)


def pipeline_of(
    run: Run, mesh: Mesh, chunks: dict[int, nn.Module], count: int, clock: Clock
) -> Pipeline:
    """The pipeline of this rank's chunks, by their place among the `count` of the whole model."""
    layout, shape = mesh.layout, run.model
    length = run.sequence // (layout.context * layout.tensor)
    dtype = PRECISIONS.get(layout.precision, torch.float32)
    hidden = partial(
        torch.empty, layout.micro_batch, length, shape.hidden, dtype=dtype, device=mesh.device
    )
    return Pipeline(
        layout=layout,
        rank=mesh.place["pipeline"],
        chunks=chunks,
        count=count,
        positions=mesh.positions(shape, run.sequence),
        hidden=hidden,
        group=mesh.devices["pipeline"].get_group(),
        phase=clock.phase,
    )


def _fill(model: nn.Module, run: Run, device: torch.device) -> None:
    """Memory and initial values for a model without."""
    try:
        to_empty(model, device)
    except RuntimeError as fault:  # what PyTorch raises when memory ends, on every device
        raise ModelError(
            f"building {run.model.name} on {device}",
            str(fault).splitlines()[0],
            "a smaller model, or a layout that divides it further",
        ) from None
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, value in model.initial_values(run.seed):  # type: ignore[operator]
            whole = tensors[name]
            here = whole.to_local() if isinstance(whole, DTensor) else whole
            here.copy_(local_part(value, whole))


def to_empty(model: nn.Module, device: torch.device) -> None:
    """Memory for a model without any; parameters that were one stay one."""
    shared: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shared.setdefault(parameter, []).append((module, name))
    model.to_empty(device=device)
    for (first, kept), *others in shared.values():
        for module, name in others:
            setattr(module, name, getattr(first, kept))
