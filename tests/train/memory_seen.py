"""A rank that trains two steps under a memory tracker, and what it saw in the second."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tests.train.tracker import MemoryTracker
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ridgeline.model.decoder import Decoder
from ridgeline.run import Run
from ridgeline.train.build import make_job
from ridgeline.train.checkpoint import Progress
from ridgeline.train.loop import train_loop
from ridgeline.train.optimizer import adamw
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import process_group


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fsdp_parameters(chunks: list[nn.Module]) -> Iterator[Any]:
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, FSDPModule):
                state: Any = module._get_fsdp_state()
                for group in state._fsdp_param_groups:
                    yield from group.fsdp_params


def memory_seen(run: Run) -> tuple[int, Mapping[str, int]]:
    """Peak bytes of this rank's second step, and by component at that moment."""
    tracker = MemoryTracker()

    def own_all() -> None:
        for each in fsdp_parameters(job.chunks):
            tracker.own("weights", each.all_gather_outputs)
            grad = each.unsharded_accumulated_grad
            grads = [] if grad is None else [local(grad)]
            if hasattr(each, "_unsharded_param") and each._unsharded_param.grad is not None:
                grads.append(local(each._unsharded_param.grad))
            tracker.own("gradients", grads)
        for chunk in job.chunks:
            for parameter in chunk.parameters():
                if isinstance(parameter, DTensor) and parameter.grad is not None:
                    tracker.own("gradients", [local(parameter.grad)])

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        before = len(tracker.sizes)
        yield
        if name == "forward":
            for number in tracker.born_since(before):
                tracker.owners.setdefault(number, "activations")
        own_all()

    with process_group() as (device, control), tracker.watching():
        job = make_job(run, Decoder, token_loss, adamw, device, control, lambda: False)
        own_all()
        tracker.own("optimizer", (local(p) for chunk in job.chunks for p in chunk.parameters()))
        job.pipeline.phase = phase
        since = 0

        def observe(seen: Any) -> None:
            nonlocal since
            if seen.progress.step == 1:
                since = len(tracker.events)
                own = [v for s in job.optimizer.state.values() for v in s.values()]
                tracker.own("optimizer", map(local, own))

        train_loop(job, Progress(), observe, lambda *_: None)
        own_all()
        return tracker.peak(since)
