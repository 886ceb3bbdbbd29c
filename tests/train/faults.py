"""Faults that trainers really have, planted into worker processes; and data with ragged targets.

Each is a function that calls the witness of `ridgeline.train.parity` with something changed: an
argument, or for the time of the call a function of the program. The product knows none of them.

Shape suffixes: B sequences of a micro-batch, L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ridgeline.data.indexed import Int64s
from ridgeline.data.mixture import Mixture
from ridgeline.launch.pool import Pool
from ridgeline.layout.grid import holders
from ridgeline.layout.layout import Layout
from ridgeline.model import decoder as model_decoder
from ridgeline.model import experts as model_experts
from ridgeline.model.decoder import Rope, make_rope
from ridgeline.model.shape import ModelShape
from ridgeline.run import Run
from ridgeline.train import loop, optimizer
from ridgeline.train.loop import Job, LossFunction
from ridgeline.train.pipeline import LossOf, Pipeline
from ridgeline.train.tied import copies
from ridgeline.train.vocabulary import IGNORED

Witness = Callable[..., Any]
Changed = Callable[..., Any]
"""(witness, its arguments …) -> what the witness returns."""


class Changing(Pool):
    """Calls of a pool with something changed: `everywhere`, and in all but the reference `fault`.

    `parity` asks for the reference first.
    """

    def __init__(
        self, pool: Pool, *, everywhere: Changed | None = None, fault: Changed | None = None
    ) -> None:
        super().__init__()
        self.pool = pool
        self.everywhere = everywhere
        self.fault = fault
        self.calls = 0

    def run(self, function: Witness, arguments: Sequence[Any], world: int) -> list[Any]:
        """The pool's, with the changes around `function`."""
        if self.everywhere:
            function = partial(self.everywhere, function)
        if self.fault and self.calls:
            function = partial(self.fault, function)
        self.calls += 1
        return self.pool.run(function, arguments, world)


def ragged_targets(witness: Witness, *arguments: Any) -> Any:
    """No fault: every sample counts another number of its targets, so ranks hold different ones."""
    everything = loop.split

    def split(job: Job, windows: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        inputs, targets = everything(job, windows)
        here_L = job.pipeline.positions
        for window, targets_BL in zip(windows, targets, strict=True):
            kept_B1 = 1 + window.sum(1, keepdim=True) % job.run.sequence
            targets_BL.masked_fill_(here_L >= kept_B1, IGNORED)
        return inputs, targets

    with patch.object(loop, "split", split):
        return witness(*arguments)


def accumulation_rescaled(
    witness: Witness, run: Run, decoder: object, loss: LossFunction, *rest: Any
) -> Any:
    """The loss, a mean over the whole batch already, is divided by the micro-batches again."""
    assert isinstance(run.layout, Layout)
    micro_batches = run.global_batch // (run.layout.data * run.layout.micro_batch)

    def rescaled(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        return loss(logits_BLV, targets_BL) / micro_batches

    return witness(run, decoder, rescaled, *rest)


def mean_loss_of_each_rank(
    witness: Witness, run: Run, decoder: object, loss: LossFunction, *rest: Any
) -> Any:
    """Each rank's mean over its own valid tokens, averaged over ranks: right if all have as many.

    With one micro-batch per step and data parallelism alone.
    """

    def averaged(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        mine = (targets_BL >= 0).sum()
        all_of_them = mine.clone()
        dist.all_reduce(all_of_them)
        mean_share = all_of_them / (mine * dist.get_world_size())
        return loss(logits_BLV, targets_BL) * mean_share

    return witness(run, decoder, averaged, *rest)


def data_of_one_rank_repeated(witness: Witness, *arguments: Any) -> Any:
    """Rank 1 trains on the samples of rank 0."""
    right = Mixture.batch

    def batch(mixture: Mixture, first_sample: int, count: int) -> Int64s:
        repeats = os.environ["RANK"] == "1"
        return right(mixture, first_sample - count * repeats, count)

    with patch.object(Mixture, "batch", batch):
        return witness(*arguments)


def one_rank_reports_another_loss(witness: Witness, *arguments: Any) -> Any:
    """The last rank's numbers are off by a ten-thousandth from the second step on."""
    seen = witness(*arguments)
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        seen.loss[1:] = [loss * 1.0001 for loss in seen.loss[1:]]
    return seen


def norm_counted_twice_over_tensor(witness: Witness, *arguments: Any) -> Any:
    """Parameters that every tensor rank holds whole count once for each of them."""

    def too_few(layout: Layout, parts: Sequence[int]) -> int:
        return max(1, holders(layout, parts) // layout.tensor)

    with patch.object(optimizer, "holders", too_few):
        return witness(*arguments)


def tied_embedding_not_summed(witness: Witness, *arguments: Any) -> Any:
    """First and last stage each keep the gradient of their own use of a tied embedding."""
    with patch.object(loop, "sum_tied", lambda pipeline: copies(pipeline)[1]):
        return witness(*arguments)


def experts_not_summed_over_tensor(witness: Witness, *arguments: Any) -> Any:
    """Each tensor rank keeps what its own tokens give a router and experts that all of them hold.

    Ranks that held different gradients would drift apart: the largest difference of any shows.
    """

    def alone(weight: Tensor) -> Tensor:
        return weight.to_local() if isinstance(weight, DTensor) else weight

    with patch.object(model_experts, "here", alone):
        return witness(*arguments)


def positions_from_0_on_every_rank(witness: Witness, *arguments: Any) -> Any:
    """Each context rank turns its slice of the sequence as if it were the first one."""

    def first(shape: ModelShape, positions_L: Tensor) -> Rope:
        return make_rope(shape, torch.arange(len(positions_L), device=positions_L.device))

    with patch.object(model_decoder, "make_rope", first):
        return witness(*arguments)


def gradients_of_a_stage_dropped(witness: Witness, *arguments: Any) -> Any:
    """What the second pipeline rank computed never reaches the norm and the optimizer."""
    right = Pipeline.run

    def run(
        pipeline: Pipeline, tokens: Sequence[Tensor], loss_of: LossOf, training: bool = True
    ) -> Tensor:
        total = right(pipeline, tokens, loss_of, training)
        if pipeline.rank == 1:
            nn.ModuleList(pipeline.chunks.values()).zero_grad(set_to_none=False)
        return total

    with patch.object(Pipeline, "run", run):
        return witness(*arguments)


def rank_raises(witness: Witness, *arguments: Any) -> Any:
    """One rank fails in its first step while the others wait for its gradients."""

    def broken(mixture: Mixture, first_sample: int, count: int) -> Int64s:
        raise ZeroDivisionError("by nothing")

    if os.environ["RANK"] != "1":
        return witness(*arguments)
    with patch.object(Mixture, "batch", broken):
        return witness(*arguments)
