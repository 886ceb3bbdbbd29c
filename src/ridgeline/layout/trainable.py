"""Which layouts today's trainer can run: one rule, without torch, for trainer and planner."""

from __future__ import annotations

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Layout


def trainable(layout: Layout) -> None:
    """Raise LayoutError when PyTorch and this code cannot train `layout`."""
    alone = Layout(data=layout.data, micro_batch=layout.micro_batch, precision=layout.precision)
    if layout != alone or layout.precision not in ("auto", "fp32", "bf16"):
        raise LayoutError(
            f"training layout '{layout}'",
            "this version trains data-parallel layouts: dp, mb, and fp32 or bf16",
            f"'{Layout(data=layout.world, micro_batch=layout.micro_batch, precision='bf16')}'",
        )


def is_trainable(layout: Layout) -> bool:
    """Whether `trainable` lets it pass."""
    try:
        trainable(layout)
    except LayoutError:
        return False
    return True
