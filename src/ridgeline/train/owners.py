"""Whose memory is whose on a rank: the components of a ledger, by ownership."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ridgeline.layout.transfers import Step, Transfer
from ridgeline.torch_compat import sharded_parameters
from ridgeline.train.pipeline import Pipeline
from ridgeline.train.tracker import Tracker


class Owners:
    """Tells a tracker, action by action, whose the storages are that it sees.

    Parameters as they rest, and the optimizer's moments, are its own ("optimizer"); what data
    parallelism gathers is "weights", and "temporary" where it is given back after each pass;
    activations are born in a forward pass and alive at its end. What is nobody's is temporary.
    """

    def __init__(self, tracker: Tracker, pipeline: Pipeline) -> None:
        self.tracker = tracker
        self.pipeline = pipeline
        self.gathered = "temporary" if pipeline.layout.zero == 3 else "weights"
        for chunk in pipeline.chunks.values():
            tracker.own("optimizer", map(local, chunk.parameters()))
            tracker.name("parameter", dict(chunk.named_parameters()))

    def moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Own the optimizer's state, once it exists."""
        states = [v for state in optimizer.state.values() for v in state.values()]
        self.tracker.own("optimizer", [local(v) for v in states if isinstance(v, Tensor)])

    @contextmanager
    def around(self, step: Step) -> Iterator[None]:
        """Of what a step makes."""
        before = self.tracker.storages
        yield
        if not isinstance(step, Transfer) and step.kind == "F":
            for number in self.tracker.born_since(before):
                self.tracker.owners.setdefault(number, "activations")
        if isinstance(step, Transfer) and (step.kind, step.what) == ("receive", "F"):
            value, _ = self.pipeline.arriving["F", step.chunk, step.micro_batch]
            self.tracker.own("activations", [value])
        self.claim()

    def claim(self) -> None:
        """Own what data parallelism gathered, and gradients as far as they are."""
        own = self.tracker.own
        for chunk in self.pipeline.chunks.values():
            for each in sharded_parameters(chunk):
                own(self.gathered, each.gathered)
                own("gradients", map(local, each.gradients))
            found = [p.grad for p in chunk.parameters() if p.grad is not None]
            own("gradients", map(local, found))


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def hands_over(pipeline: Pipeline) -> Iterator[Tensor]:
    """What chunks hand to one another, and what stays alive because of it, at this moment."""
    yield from pipeline.here.values()
    yield from (value for value, _ in pipeline.arriving.values())
    yield from (value for _, value in pipeline.leaving)
    for (chunk, _), kept in pipeline.kept.items():
        if chunk > 0:
            yield kept.given
        if chunk < pipeline.count - 1:
            yield kept.made
        if kept.gradient is not None:
            yield kept.gradient
