"""The rank grid: which rank sits where, and who shares an axis with whom. No torch.

Ranks 0 … world-1 fill the mesh axes in the layout's order, the last axis fastest: with the default
order, pipeline outermost and tensor innermost, the ranks of a tensor group are neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ridgeline.layout.layout import AXIS_WORDS, Axis, Layout

GRID_AXES: tuple[Axis, ...] = ("pipeline", "data", "context", "tensor")
"""The order in which `RankGrid.ranks` lists ranks, whatever order they are numbered in."""


@dataclass(frozen=True)
class RankGrid:
    """The one object that says who sits where."""

    layout: Layout

    def _size(self, axis: Axis) -> int:
        return int(getattr(self.layout, axis))

    def rank(self, pipeline: int = 0, data: int = 0, context: int = 0, tensor: int = 0) -> int:
        """The rank at a place of the grid."""
        place = {"pipeline": pipeline, "data": data, "context": context, "tensor": tensor}
        rank = 0
        for axis in self.layout.order:
            rank = rank * self._size(axis) + place[axis]
        return rank

    def place(self, rank: int) -> dict[Axis, int]:
        """Where `rank` sits on each axis."""
        place: dict[Axis, int] = {}
        for axis in reversed(self.layout.order):
            rank, place[axis] = divmod(rank, self._size(axis))
        return place

    def ranks(self) -> list[int]:
        """All ranks, pipeline by data by context by tensor, tensor fastest: reshape as needed."""
        sizes = [range(self._size(axis)) for axis in GRID_AXES]
        return [self.rank(p, d, c, t) for p in sizes[0] for d in sizes[1] for c in sizes[2]
                for t in sizes[3]]  # fmt: skip

    def describe(self, node: int | None = None) -> list[str]:
        """Who sits where, a line for each axis with more than one place.

        Each line shows the group of rank 0 and, where `node` devices share a node, how many nodes
        such a group touches.
        """
        lines = []
        for axis in self.layout.order:
            if self._size(axis) == 1:
                continue
            members = [self.rank(**{axis: place}) for place in range(self._size(axis))]
            line = f"{AXIS_WORDS[axis]}{len(members)} ({axis}): ranks {_brief(members)}, …"
            if node:
                nodes = len({member // node for member in members})
                line += f" on {nodes} node{'s' * (nodes > 1)}"
            lines.append(line)
        return lines


def shard_sizes(layout: Layout) -> tuple[int, int]:
    """(replicas, ranks that share one copy): how dp·cp divides between copies and shards.

    ZeRO 0 copies everything on every rank; a shard group is a run of neighbours on data·context.
    """
    replicas = layout.data * layout.context
    shard = 1 if layout.zero == 0 else layout.shard_group or replicas
    return replicas // shard, shard


def expert_sizes(layout: Layout) -> tuple[int, int]:
    """(replicas, expert-parallel ranks): how dp·cp divides for the experts of a mixture."""
    return layout.data * layout.context // layout.expert, layout.expert


def _brief(ranks: Sequence[int]) -> str:
    steps = {b - a for a, b in pairwise(ranks)}
    if len(ranks) <= 4 or len(steps) > 1:
        return " ".join(map(str, ranks[:8]))
    return f"{ranks[0]} {ranks[1]} … {ranks[-1]}"


def holders(layout: Layout, parts: Sequence[int]) -> int:
    """How many ranks of a pipeline stage hold the same shard of a tensor cut into `parts`."""
    return layout.data * layout.context * layout.tensor // math.prod(parts)
