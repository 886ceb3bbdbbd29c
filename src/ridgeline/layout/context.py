"""Which ranks hold which tokens under context parallelism, and how their attention is exchanged.

Two kinds. "heads": before attention the ranks exchange their slices of the sequence for whole
sequences of fewer heads (DeepSpeed-Ulysses, arXiv:2309.14509). "ring": keys and values go round the
ranks (arXiv:2310.01889), where there are too few heads to give each rank its own.
"""

from __future__ import annotations

from typing import Literal

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Layout
from ridgeline.model.shape import ModelShape

ContextKind = Literal["heads", "ring"]


def context_kind(heads: int, kv_heads: int, context: int) -> ContextKind:
    """How `context` ranks exchange attention, by the heads of one tensor-parallel rank.

    Over heads when each rank gets equally many query heads and either its own key/value heads or a
    copy of one; otherwise round the ring, which divides no heads.
    """
    shared = kv_heads % context == 0 or context % kv_heads == 0
    return "heads" if heads % context == 0 and shared else "ring"


def context_positions(sequence: int, context: int, rank: int, kind: ContextKind) -> list[range]:
    """Positions of context rank `rank` in a sequence of that many tokens, in the order it holds.

    "heads": one slice of `context`. "ring": slices rank and 2·context-1-rank of 2·context, an early
    and a late one (zigzag), since a causal token costs as much as there are tokens before it: every
    rank then attends over equally many. Raises LayoutError when the sequence cannot be cut so.
    """
    slices = context if kind == "heads" else 2 * context
    if sequence % slices:
        below, above = sequence // slices * slices, -(-sequence // slices) * slices
        divisor = "cp" if kind == "heads" else "2·cp (each rank of the ring holds two slices)"
        raise LayoutError(
            f"cp{context} with sequences of {sequence} tokens",
            f"{divisor} divides the sequence: {sequence} is not a multiple of {slices}",
            f"a sequence of {f'{below} or ' if below else ''}{above}",
        )
    length = sequence // slices
    held = [rank] if kind == "heads" else [rank, slices - 1 - rank]
    return [range(index * length, (index + 1) * length) for index in held]


def kind_of(layout: Layout, shape: ModelShape) -> ContextKind:
    """How the context ranks of `layout` exchange the attention of `shape`."""
    heads, kv_heads = shape.heads // layout.tensor, shape.kv_heads // layout.tensor
    return context_kind(max(heads, 1), max(kv_heads, 1), layout.context)


def positions_of(layout: Layout, shape: ModelShape, sequence: int, rank: int) -> list[range]:
    """Positions of context rank `rank`: `context_positions` for this model and layout."""
    return context_positions(sequence, layout.context, rank, kind_of(layout, shape))
