"""The divisibility rules between a layout, a model, a batch and a number of devices."""

from __future__ import annotations

import math

from ridgeline.errors import LayoutError
from ridgeline.layout.context import positions_of
from ridgeline.layout.layout import Layout
from ridgeline.model.shape import ModelShape


def check(
    layout: Layout, shape: ModelShape, sequence: int, global_batch: int, devices: int | None = None
) -> None:
    """Refuse a layout that cannot divide this model, sequence (tokens), batch (sequences), world.

    Raises LayoutError naming the rule, its arithmetic and the nearest layout that works.
    """
    if devices is not None and layout.world != devices:
        per_replica = layout.world // layout.data
        remedy = (
            f"dp{devices // per_replica}"
            if devices % per_replica == 0
            else f"{layout.world} devices, or axes whose product divides {devices}"
        )
        raise LayoutError(
            f"layout '{layout}' on {devices} devices",
            f"dp·cp·tp·pp is the number of devices: {layout.data}·{layout.context}·"
            f"{layout.tensor}·{layout.pipeline} = {layout.world}, not {devices}",
            remedy,
        )
    per_step = layout.data * layout.micro_batch
    if global_batch % per_step:
        below, above = global_batch // per_step * per_step, -(-global_batch // per_step) * per_step
        raise LayoutError(
            f"layout '{layout}' with a global batch of {global_batch} sequences",
            f"dp·mb divides the global batch: {layout.data}·{layout.micro_batch} = {per_step}, "
            f"and {global_batch} = {global_batch // per_step}·{per_step} + "
            f"{global_batch % per_step}",
            f"a global batch of {f'{below} or ' if below else ''}{above}, or "
            f"dp{_near(global_batch, layout.data)} mb1",
        )
    _check_tensor_and_context(layout, shape, sequence)
    _check_pipeline(layout, shape, global_batch // per_step)
    experts = shape.experts.count if shape.experts else 1
    if experts % layout.expert:
        raise LayoutError(
            f"ep{layout.expert} for {shape.name}",
            f"ep divides the number of experts, {experts}",
            f"ep{_near(experts, layout.expert)}",
        )


def _check_tensor_and_context(layout: Layout, shape: ModelShape, sequence: int) -> None:
    widths = {
        "attention heads": shape.heads,
        "key-value heads": shape.kv_heads,
        "feed-forward width": shape.ffn_hidden,
    }
    for what, number in widths.items():
        if number % layout.tensor:
            raise LayoutError(
                f"tp{layout.tensor} for {shape.name}",
                f"tp divides the {what}: {number} is not a multiple of {layout.tensor}",
                f"tp{_near(math.gcd(*widths.values()), layout.tensor)}",
            )
    rows = -(-shape.vocab // layout.tensor)
    if rows * (layout.tensor - 1) >= shape.vocab:
        raise LayoutError(
            f"tp{layout.tensor} for {shape.name}",
            f"each tensor rank holds {rows} entries of the vocabulary, the last one the rest: "
            f"{shape.vocab} - {rows}·{layout.tensor - 1} leaves none",
            f"tp{_near(shape.vocab, layout.tensor)}",
        )
    positions_of(layout, shape, sequence, 0)  # raises where context ranks cannot divide it


def _check_pipeline(layout: Layout, shape: ModelShape, micro_batches: int) -> None:
    chunks = layout.pipeline * layout.interleave
    if shape.layers < chunks:
        raise LayoutError(
            f"pp{layout.pipeline} v{layout.interleave} for {shape.name}",
            f"each of the pp·v = {chunks} chunks holds at least one of {shape.layers} layers",
            f"pp·v of at most {shape.layers}",
        )
    if layout.interleave > 1 and micro_batches % layout.pipeline:
        raise LayoutError(
            f"v{layout.interleave} over pp{layout.pipeline} with micro-batches: {micro_batches}",
            "interleaving needs the number of micro-batches to be a multiple of pp",
            f"v1, or {-(-micro_batches // layout.pipeline) * layout.pipeline} micro-batches",
        )


def _near(number: int, wanted: int) -> int:
    """The divisor of `number` closest to `wanted`."""
    divisors = (size for size in range(1, number + 1) if number % size == 0)
    return min(divisors, key=lambda size: (abs(size - wanted), size))
