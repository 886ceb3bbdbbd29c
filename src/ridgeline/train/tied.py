"""A tied embedding under a pipeline: two copies, on the first and the last chunk, kept equal.

Both start from the same values; their gradients are summed before the optimizer, which then moves
both alike.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ridgeline.train.pipeline import Pipeline


def copies(pipeline: Pipeline) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """This rank's copy of a tied embedding on the first chunk, and the one on the last."""
    first, last = pipeline.chunks.get(0), pipeline.chunks.get(pipeline.count - 1)
    embedding = first.embedding.weight if first is not None else None  # type: ignore[union-attr]
    head = last.head.weight if last is not None else None  # type: ignore[union-attr]
    return embedding, head  # type: ignore[return-value]


def sum_tied(pipeline: Pipeline) -> nn.Parameter | None:
    """Sum the two copies' gradients in place; the second copy, which no norm must count again.

    Without a pipeline there is one parameter, and nothing to do.
    """
    if pipeline.count == 1:
        return None
    embedding, head = copies(pipeline)
    if embedding is not None and head is not None:
        ours, theirs = _gradient(embedding), _gradient(head)
        ours += theirs
        theirs.copy_(ours)
    elif (parameter := embedding if head is None else head) is not None:
        ours = _gradient(parameter)
        theirs = torch.empty_like(ours)
        peer = pipeline.layout.pipeline - 1 - pipeline.rank
        # One by one, in the order of both ends: a batch would be a collective call of the whole
        # pipeline on NCCL, where the stages between would be waited for (for ever).
        send = partial(dist.isend, ours, group=pipeline.group, group_dst=peer)
        receive = partial(dist.irecv, theirs, group=pipeline.group, group_src=peer)
        for work in [each() for each in ((send, receive) if head is None else (receive, send))]:
            assert work is not None
            work.wait()
        ours += theirs
    return head


def _gradient(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
