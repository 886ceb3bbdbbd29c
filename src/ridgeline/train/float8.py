"""Matrix products of a block in 8 bits, through torchao: an optional extra, `ridgeline[float8]`.

Weights, gradients and the optimizer stay as in bf16; what is multiplied is scaled by one factor per
tensor (e4m3 for inputs and weights, e5m2 for gradients; arXiv:2209.05433).
"""

from __future__ import annotations

import torch
from torch import nn

from ridgeline.errors import LaunchError

MULTIPLE = 16
"""What the hardware's products want of both widths of a matrix."""


def to_float8(block: nn.Module, device: torch.device) -> None:
    """Let the linear layers of `block` multiply in 8 bits, in place; names and weights stay.

    Those of other widths than multiples of 16, routers and stacked experts stay as they are. A CPU
    computes the same numbers in more steps: for trying a run, not for speed.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    def divides(module: nn.Module, name: str) -> bool:
        # A subclass, such as a router, has products of its own.
        return type(module) is nn.Linear and not any(n % MULTIPLE for n in module.weight.shape)

    config = Float8LinearConfig(emulate=device.type == "cpu")
    convert_to_float8_training(block, config=config, module_filter_fn=divides)


def check_float8(device: torch.device, multiplies: bool) -> None:
    """Raise LaunchError where torchao is missing, or an accelerator has no products in 8 bits."""
    try:
        import torchao  # noqa: F401
    except ImportError:
        raise LaunchError(
            "training in fp8",
            "torchao is not installed",
            "pip install 'ridgeline[float8]', or bf16",
        ) from None
    if device.type != "cpu" and not multiplies:
        raise LaunchError(
            "training in fp8", f"this {device.type} device does not multiply 8 bits", "bf16"
        )
