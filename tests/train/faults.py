"""Faults that trainers really have, planted into worker processes; and data with ragged targets.

Each is a function that calls the witness of `ridgeline.train.parity` with something changed: an
argument, or for the time of the call a function of the program. The product knows none of them.

Shape suffixes: B sequences of a micro-batch, L tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ridgeline.data.indexed import Int64s
from ridgeline.data.mixture import Mixture
from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.run import Run
from ridgeline.train import loop
from ridgeline.train.loop import LossFunction
from ridgeline.train.optimizer import IGNORED, clip_gradients

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
    whole = loop.split

    def split(windows: object, device: torch.device) -> tuple[Tensor, Tensor]:
        inputs_BL, targets_BL = whole(windows, device)
        length = inputs_BL.shape[1]
        kept_B1 = 1 + inputs_BL.sum(1, keepdim=True) % length
        beyond_BL = torch.arange(length, device=device) >= kept_B1
        return inputs_BL, targets_BL.masked_fill(beyond_BL, IGNORED)

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


def one_gradient_dropped(witness: Witness, *arguments: Any) -> Any:
    """One parameter's gradient never reaches the optimizer."""

    def clip(parameters: Iterable[nn.Parameter], clip_norm: float) -> Tensor:
        parameters = list(parameters)
        norm = clip_gradients(parameters, clip_norm)
        parameters[4].grad = None
        return norm

    with patch.object(loop, "clip_gradients", clip):
        return witness(*arguments)


def norm_counted_twice(witness: Witness, *arguments: Any) -> Any:
    """The norm is √2 too large, and the gradients are clipped by it."""
    right = torch.nn.utils.get_total_norm

    def doubled(tensors: Any, *options: Any) -> Tensor:
        return right(tensors, *options) * 2**0.5

    with patch.object(torch.nn.utils, "get_total_norm", doubled):
        return witness(*arguments)


def rank_raises(witness: Witness, *arguments: Any) -> Any:
    """One rank fails in its first step while the others wait for its gradients."""

    def broken(mixture: Mixture, first_sample: int, count: int) -> Int64s:
        raise ZeroDivisionError("by nothing")

    if os.environ["RANK"] != "1":
        return witness(*arguments)
    with patch.object(Mixture, "batch", broken):
        return witness(*arguments)
