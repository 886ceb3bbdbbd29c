"""Which layouts today's trainer can run: one rule, without torch, for trainer and planner."""

from __future__ import annotations

from ridgeline.errors import LayoutError
from ridgeline.layout.context import positions_of
from ridgeline.layout.layout import Layout
from ridgeline.layout.stages import chunks_of
from ridgeline.model.shape import ModelShape

SPLIT_BACKWARD = ("zbh1", "izb", "zbv", "dualpipev")


def trainable(layout: Layout, shape: ModelShape, sequence: int) -> None:
    """Raise LayoutError when PyTorch and this code cannot train `shape` in `layout`.

    `sequence` in tokens. What no program could divide is `layout.arithmetic`'s to refuse.
    """
    if shape.latent_attention:
        raise LayoutError(
            f"training {shape.name}",
            "latent attention can be planned but not yet trained",
            "a model with ordinary or grouped-query heads",
        )
    if layout.precision == "fp8" and layout.tensor > 1:
        raise LayoutError(
            f"training layout '{layout}'",
            "matrix products in 8 bits are not divided by tensor here",
            f"'{layout.model_copy(update={'precision': 'bf16'})}', or tp1",
        )
    if layout.expert_tensor > 1:
        raise LayoutError(
            f"training layout '{layout}'",
            "experts are not divided by tensor: every tensor rank holds whole ones",
            f"'{layout.model_copy(update={'expert_tensor': 1})}'",
        )
    if layout.compile and layout.schedule in SPLIT_BACKWARD and layout.pipeline > 1:
        raise LayoutError(
            f"training layout '{layout}'",
            f"{layout.schedule} computes a backward pass in two halves, which PyTorch (2.13 and "
            "before) cannot do inside compiled blocks",
            f"'{layout.model_copy(update={'compile': False})}', or schedule 1f1b",
        )
    if (
        layout.recompute == "selective"
        and layout.schedule in SPLIT_BACKWARD
        and layout.pipeline > 1
    ):
        raise LayoutError(
            f"training layout '{layout}'",
            f"{layout.schedule} computes a backward pass in two halves, and PyTorch (2.13 and "
            "before) recomputes selectively for one backward pass alone",
            f"'{layout.model_copy(update={'recompute': 'full'})}', or schedule 1f1b",
        )
    if layout.compile and shape.experts and layout.precision not in ("bf16", "auto"):
        raise LayoutError(
            f"training layout '{layout}' for {shape.name}",
            "PyTorch (2.13 and before) compiles the grouped matrix products of experts in bf16 "
            "alone",
            f"'{layout.model_copy(update={'precision': 'bf16'})}', or without compile",
        )
    parts = layout.context * layout.tensor
    if sequence % parts:
        longer = -(-sequence // parts) * parts
        raise LayoutError(
            f"training layout '{layout}' with sequences of {sequence} tokens",
            f"norms see cp·tp = {layout.context}·{layout.tensor} equal parts of a sequence: "
            f"{sequence} is not a multiple of {parts}",
            f"a sequence of {longer}",
        )
    positions_of(layout, shape, sequence, 0)
    chunks_of(layout, shape, sequence)


def is_trainable(layout: Layout, shape: ModelShape, sequence: int) -> bool:
    """Whether `trainable` lets it pass."""
    try:
        trainable(layout, shape, sequence)
    except LayoutError:
        return False
    return True
