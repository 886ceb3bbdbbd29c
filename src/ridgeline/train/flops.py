"""FLOPs of single operations as a dispatch mode sees them, by the conventions of `model.counts`.

A product of (m, k) with (k, n) is 2mnk. Attention counts scores and values, of a causal square
half; its backward pass is twice its forward pass: what a fused kernel computes again is its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.flop_counter import flop_registry

Parts = Callable[[tuple[Any, ...], Mapping[str, Any]], tuple[Any, ...]]
KINDS = ("router", "experts", "shared", "attention", "mlp", "embedding", "positions", "head")


def kind_of_module(name: str) -> str | None:
    """What a module's arithmetic is counted as, by its dotted name; None: as the one around it."""
    last = name.rpartition(".")[2]
    if last not in KINDS:
        return None
    return {"shared": "experts", "attention": "attention_projections"}.get(last, last)


def causal_flops(
    operation: Any, arguments: tuple[Any, ...], named: Mapping[str, Any], out: Any
) -> float:
    """FLOPs of one operation; 0 for all that is no matrix product."""
    name = operation.name().partition(".")[0]
    if name in ATTENTION:
        q, k, v, causal = ATTENTION[name](arguments, named)
        scores = math.prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])
        return float(2 * scores * (2 if "backward" in name else 1) / (2 if causal else 1))
    if name == "aten::_grouped_mm":
        left, right = arguments[0], arguments[1]
        # (T, I) by (E, I, O), each row by one matrix; or (I, T) by (T, O), sums of E parts
        return float(2 * math.prod(left.shape) * right.shape[-1])
    counter = flop_registry.get(operation._overloadpacket)
    return float(counter(*arguments, **named, out_val=out)) if counter else 0.0


def _parts(offset: int, flag: int) -> Parts:
    """q, k, v of a call from argument `offset` on, and argument `flag`: whether it is causal."""

    def parts(given: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, ...]:
        causal = given[flag] if len(given) > flag else named.get("is_causal", False)
        return *given[offset : offset + 3], bool(causal)

    return parts


ATTENTION: Mapping[str, Parts] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _parts(0, 4),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _parts(1, 7),
    "aten::_scaled_dot_product_flash_attention": _parts(0, 4),
    "aten::_scaled_dot_product_flash_attention_backward": _parts(1, 11),
    "aten::_scaled_dot_product_efficient_attention": _parts(0, 6),
    "aten::_scaled_dot_product_efficient_attention_backward": _parts(1, 11),
    "aten::_scaled_dot_product_cudnn_attention": _parts(0, 6),
    "aten::_scaled_dot_product_cudnn_attention_backward": _parts(1, 14),
}
