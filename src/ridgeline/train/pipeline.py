"""The pipeline: this rank's chunks of the model, and the actions of its schedule run on them.

A run without a pipeline is the same program: one chunk, forward and backward of each micro-batch.
B sequences of a micro-batch, L tokens of a sequence on this rank, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import Action, schedule_of
from ridgeline.layout.transfers import MOST_LEAVING, Step, Transfer, with_transfers
from ridgeline.torch_compat import input_half, reduce_now, unshard, weight_half

LossOf = Callable[[Tensor, int], Tensor]
"""(output of the last chunk, micro-batch) -> what is differentiated and summed."""
Key = tuple[str, int, int]
"""What is handed over (F hidden states, B their gradient), to which chunk, for which micro-batch"""


class Kept(NamedTuple):
    """What a micro-batch leaves on a chunk until its backward pass."""

    given: Tensor
    made: Tensor
    gradient: Tensor | None = None
    """Gradient of `made`, for the weights' half of a split backward pass."""
    groups: Any = None
    """What the input's half leaves for the weights' half."""


@lru_cache(maxsize=64)
def steps_of(layout: Layout, rank: int, micro_batches: int, training: bool) -> tuple[Step, ...]:
    """What pipeline rank `rank` does with its micro-batches, sends and receives included."""
    return with_transfers(schedule_of(layout, micro_batches), forward_only=not training)[rank]


def prepare(module: nn.Module, zero: int, *, reduce: bool, last: bool) -> None:
    """Tell the data-parallel engine what follows the next backward pass of `module`.

    ZeRO 0 and 1 keep whole gradients over the micro-batches and reduce them once; 2 and 3 reduce
    each; 3 gives parameters back each time, the others once.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(reduce)
        module.set_reshard_after_backward(last or (reduce and zero == 3))
        module.set_is_last_backward(last)


@dataclass
class Pipeline:
    """This rank's chunks, by their place along the model, and the way to their neighbours."""

    layout: Layout
    rank: int
    """Place on the pipeline axis."""
    chunks: dict[int, nn.Module]
    count: int
    """Chunks of the whole model."""
    positions: Tensor
    """Where in the sequence this rank's tokens stand, (L,)."""
    hidden: Callable[[], Tensor]
    """Makes an empty (B, L, D) for what arrives."""
    group: dist.ProcessGroup
    """The pipeline axis."""
    phase: Callable[[str], AbstractContextManager[None]]
    """Times what it encloses."""
    steps: Callable[[Layout, int, int, bool], Sequence[Step]] = steps_of
    """What a rank does; a rehearsal leaves out what only repeats."""
    around: Callable[[Step], AbstractContextManager[object]] = nullcontext
    """Sees each step."""

    def __post_init__(self) -> None:
        self.expected = self.hidden().to("meta")
        self.kept: dict[tuple[int, int], Kept] = {}
        self.here: dict[Key, Tensor] = {}
        self.arriving: dict[Key, tuple[Tensor, dist.Work]] = {}
        self.leaving: list[tuple[dist.Work, Tensor]] = []

    def run(self, tokens: Sequence[Tensor], loss_of: LossOf, training: bool = True) -> Tensor:
        """One pass over the micro-batches `tokens`, (B, L) each; gradients add up in parameters.

        Returns the sum of what `loss_of` gave, 0 on ranks without the last chunk.
        """
        total = torch.zeros((), device=self.positions.device)
        left = dict.fromkeys(self.chunks, len(tokens))
        for step in self.steps(self.layout, self.rank, len(tokens), training):
            with self.around(step):
                if isinstance(step, Transfer):
                    # Nobody waits for ever: the other end asks for it at the same moment of the
                    # replay, before this one.
                    while len(self.leaving) > MOST_LEAVING:
                        self.leaving.pop(0)[0].wait()
                    self._transfer(step)
                elif step.kind == "F":
                    given = tokens[step.micro_batch] if step.chunk == 0 else self._take(step)
                    with self.phase("forward"):
                        total += self._forward(*step[1:], given, loss_of, training)
                    del given
                else:
                    left[step.chunk] -= step.kind != "I"
                    self._backward(*step, last=left[step.chunk] == 0)
        while self.leaving:
            self.leaving.pop(0)[0].wait()
        return total

    def _forward(
        self, chunk: int, micro_batch: int, given: Tensor, loss_of: LossOf, training: bool
    ) -> Tensor | float:
        if training and chunk > 0:
            given.requires_grad_()
        made = self.chunks[chunk](given, self.positions)
        last = chunk == self.count - 1
        if last:
            made = loss_of(made, micro_batch)
        else:
            self.here["F", chunk + 1, micro_batch] = made.detach()
        if training:
            self.kept[chunk, micro_batch] = Kept(given, made)
        return made.detach() if last else 0.0

    def _backward(self, kind: str, chunk: int, micro_batch: int, last: bool) -> None:
        """B whole, or its halves: I gives the gradient of the input, W those of the weights."""
        module, kept = self.chunks[chunk], self.kept.pop((chunk, micro_batch))
        split = kind in "IW" and chunk > 0  # tokens have no gradient: W of chunk 0 does it all
        gradient = kept.gradient
        if kind in "BI" and chunk < self.count - 1:
            gradient = self._take(Action("B", chunk, micro_batch))
        with self.phase("backward"):
            if kind == "I":
                groups = None
                if split:
                    unshard(module)
                    prepare(module, self.layout.zero, reduce=False, last=False)
                    given, groups = input_half(kept.made, gradient, kept.given, module.parameters())
                    self.here["B", chunk - 1, micro_batch] = given
                self.kept[chunk, micro_batch] = kept._replace(gradient=gradient, groups=groups)
                return
            reduce = last or self.layout.zero >= 2
            if split:
                unshard(module)
                # In several passes: one that recomputes experts would end with a reduction.
                prepare(module, self.layout.zero, reduce=False, last=False)
                weight_half(module.parameters(), kept.groups)
                prepare(module, self.layout.zero, reduce=reduce, last=last)
                reduce_now(module)
                return
            prepare(module, self.layout.zero, reduce=reduce, last=last)
            torch.autograd.backward(kept.made, gradient)
            if chunk > 0:
                assert kept.given.grad is not None
                self.here["B", chunk - 1, micro_batch] = kept.given.grad

    def _take(self, key: Key) -> Tensor:
        """What a neighbour made for a chunk: on this rank, or waited for."""
        if key in self.here:
            return self.here.pop(key)
        value, work = self.arriving.pop(key)
        with self.phase("pipeline wait"):
            work.wait()
        return value

    def _transfer(self, step: Transfer) -> None:
        """Start a message; a tensor that is sent lives until the message is gone."""
        key = (step.what, step.chunk, step.micro_batch)
        tag = (step.chunk * 2 + (step.what == "B")) * 100_000 + step.micro_batch
        if step.kind == "send":
            value = self.here.pop(key).contiguous()
            self._check(value, step)
            sent = dist.isend(value, group=self.group, group_dst=step.peer, tag=tag)
            assert sent is not None
            self.leaving.append((sent, value))
            return
        value = self.hidden()
        work = dist.irecv(value, group=self.group, group_src=step.peer, tag=tag)
        assert work is not None
        self.arriving[key] = (value, work)

    def _check(self, value: Tensor, step: Transfer) -> None:
        """Refuse what the other end has no room for: it would abort there, or wait for ever."""
        there = self.expected
        if (value.shape, value.dtype) != (there.shape, there.dtype):
            raise LayoutError(
                f"sending {value.dtype} {tuple(value.shape)} to chunk {step.chunk} of a pipeline",
                f"chunks hand on hidden states (B, L, D), here {there.dtype} {tuple(there.shape)}",
                "blocks whose output has the shape and the precision of their input",
            )
