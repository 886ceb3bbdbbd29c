"""One rank of a parity check: the program as it trains, and somebody who writes down what it does.

The reference, one process, leaves the gradients of its first step in a file; a rank of any layout
compares its own with them, one tensor at a time, so that no rank holds two whole models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ridgeline.run import Run
from ridgeline.torch_compat import whole
from ridgeline.train.build import MakeDecoder, MakeOptimizer, make_job
from ridgeline.train.loop import Job, LossFunction, train_loop
from ridgeline.train.manifest import Progress
from ridgeline.train.telemetry import Observation
from ridgeline.train.worker import process_group


@dataclass(frozen=True)
class Deviation:
    """The element of a gradient that is furthest from the reference's."""

    size: float
    """Its distance over the largest absolute value of the reference's tensor; 0: rounding."""
    reference: float | None
    """None: the reference has no such gradient, or one of another shape."""
    here: float


@dataclass(frozen=True)
class Seen:
    """What one rank saw: the numbers of each step, and the gradients of the first."""

    loss: list[float]
    grad_norm: list[float]
    gradients: dict[str, Deviation]
    """By the parameter's name, of all parameters this rank holds; a tied one by all its names."""


def witness(
    run: Run,
    decoder: MakeDecoder,
    loss: LossFunction,
    make_optimizer: MakeOptimizer,
    file: Path,
    rounding: float | None,
) -> Seen:
    """Train `run`, resolved, as the rank that the environment says, and tell what was seen.

    `file` holds the reference's gradients. `rounding`: what of the largest of all of them is
    nothing but rounding in one of them; None: this is the reference, which writes the file.
    """
    losses: list[float] = []
    norms: list[float] = []
    gradients: dict[str, Deviation] = {}

    def before_update(*_: Any) -> None:
        hook.remove()  # the first step alone
        gradients.update(_write(job, file) if rounding is None else _compare(job, file, rounding))

    def observe(seen: Observation) -> None:
        losses.append(float(seen.loss))
        norms.append(float(seen.grad_norm))

    with process_group() as (device, control):
        job = make_job(run, decoder, loss, make_optimizer, device, control, lambda: False)
        hook = job.optimizer.register_step_pre_hook(before_update)
        train_loop(job, Progress(), observe, lambda *_: (False, None))
    return Seen(losses, norms, gradients)


def gradients_of(job: Job) -> Iterator[tuple[str, Tensor]]:
    """Name and whole gradient of every parameter of this rank, float32 on the CPU.

    As the optimizer gets them: summed over ranks, and clipped. One that was never computed is zero.
    A collective call: ranks that share a parameter must be at the same one.
    """
    for chunk in job.chunks:
        for name, parameter in chunk.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                missing = parameter.grad is None
                gradient = torch.zeros_like(parameter) if missing else parameter.grad
                assert gradient is not None
                yield name, whole(gradient).detach().float().cpu()


def _write(job: Job, file: Path) -> dict[str, Deviation]:
    """Write the reference's gradients, and the largest absolute value of all beside them."""
    tensors = {name: gradient.clone() for name, gradient in gradients_of(job)}
    largest = max(float(gradient.abs().max()) for gradient in tensors.values())
    save_file(tensors, file, metadata={"largest": repr(largest)})
    return {name: Deviation(0.0, largest, largest) for name in tensors}


def _compare(job: Job, file: Path, rounding: float) -> dict[str, Deviation]:
    found = {}
    with safe_open(file, framework="pt") as reference:
        names = set(reference.keys())
        floor = rounding * float(reference.metadata()["largest"])
        for name, gradient in gradients_of(job):
            known = reference.get_tensor(name) if name in names else None
            found[name] = deviation(gradient, known, floor)
    return found


def deviation(gradient: Tensor, reference: Tensor | None, floor: float) -> Deviation:
    """How far a gradient is from the reference's; distances up to `floor` are none."""
    if reference is None or reference.shape != gradient.shape:
        return Deviation(math.inf, None, float(gradient.abs().max()))
    distance = (gradient - reference).abs().flatten()
    at = int(distance.argmax())  # NaN counts as the largest
    values = float(reference.flatten()[at]), float(gradient.flatten()[at])
    furthest = float(distance[at])
    if furthest <= floor:
        return Deviation(0.0, *values)
    size = furthest / float(reference.abs().max()) if reference.any() else math.inf
    return Deviation(math.inf if math.isnan(size) else size, *values)
