"""Which layers lie in which chunk of a pipeline, balanced by what they cost. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import schedule_of
from ridgeline.model.counts import flops_per_token
from ridgeline.model.shape import ModelShape


@dataclass(frozen=True)
class Chunk:
    """Consecutive layers of the model, and what stands before the first or behind the last."""

    index: int
    """Place along the model, from 0."""
    layers: Sequence[int]
    first: bool
    """Whether it holds the embedding."""
    last: bool
    """Whether it holds the last norm and the head."""


def chunks_of(layout: Layout, shape: ModelShape, sequence: int) -> tuple[Chunk, ...]:
    """The model cut into pp·v chunks so that the costliest one costs least.

    Cost is FLOPs per token: the head weighs as many layers as it costs, so the last chunk holds
    fewer. Raises LayoutError when there are more chunks than layers.
    """
    count = schedule_of(layout, 1).chunks
    if count > shape.layers:
        raise LayoutError(
            f"layout '{layout}' for {shape.name}",
            f"each of the {count} chunks of its pipeline holds at least one layer, and the model "
            f"has {shape.layers}",
            f"at most {shape.layers} chunks in all",
        )
    forward = flops_per_token(shape, sequence, "causal").forward
    layer = (forward.total - forward.head) / shape.layers
    counts = balanced(shape.layers, count, forward.head / layer)
    edges = [sum(counts[:i]) for i in range(count + 1)]
    return tuple(
        Chunk(i, range(edges[i], edges[i + 1]), i == 0, i == count - 1) for i in range(count)
    )


@lru_cache(maxsize=256)
def balanced(layers: int, chunks: int, tail: float) -> tuple[int, ...]:
    """Layers of each chunk, at least one, when the last carries `tail` layers' worth beside.

    The costliest chunk is as cheap as can be; then the chunks are as even as can be, the longer
    ones in the middle, where no embedding and no head lie.
    """
    if chunks == 1:
        return (layers,)
    fair = (layers + tail) / chunks
    last = min(max(1, round(fair - tail)), layers - chunks + 1)
    choices = []
    for candidate in {last, max(1, last - 1), min(last + 1, layers - chunks + 1)}:
        rest = layers - candidate
        costliest = max(-(-rest // (chunks - 1)), candidate + tail)
        choices.append((costliest, abs(candidate - rest / (chunks - 1)), candidate))
    last = min(choices)[2]
    base, longer = divmod(layers - last, chunks - 1)
    start = chunks - 1 - longer  # the first chunks, with the embedding, are not the longer ones
    return (*(base + (i >= start) for i in range(chunks - 1)), last)
