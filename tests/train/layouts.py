"""The runs that parity's tables are of: models that learn more than half a nat in six steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ridgeline.run import Run

DENSE: dict[str, Any] = {"layers": 5, "kv_heads": 4}
"""Llama-like. Heads for four tensor or context ranks; five layers divide over no pipeline."""
GPT: dict[str, Any] = DENSE | {
    "positions": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "bias": True,
    "tied": True,
    "vocab": 323,  # a prime beyond 320: 2 and 4 tensor ranks hold unequal parts
}
QWEN: dict[str, Any] = {"layers": 5, "kv_heads": 2, "qk_norm": True, "qkv_bias": True}
FEW_HEADS: dict[str, Any] = {"layers": 4, "heads": 2, "kv_heads": 2}
"""Context ranks of its tensor ranks, or four of them, pass keys and values round a ring."""
MIXTURE: dict[str, Any] = {
    "layers": 5,
    "kv_heads": 4,
    "experts": {
        "count": 4,
        "top_k": 2,
        "ffn_hidden": 32,
        "shared": 1,
        "first_dense_layers": 1,
        "routing": "sigmoid",
        "balance_weight": 0.1,
        "bias_rate": 0.01,
    },
}
"""Fine-grained experts with both balances: DeepSeek-V3's."""


def table_run(
    make_tiny_run: Callable[..., Run],
    folder: Path,
    model: dict[str, Any],
    lr: float = 1e-2,
    **changes: Any,
) -> Run:
    """A tiny run of `model`; its one process has two micro-batches.

    At twice the rate gradient norms leap to ten times their size, and no two roundings of such a
    run end alike. A bias of keys moves all scores of a query alike, so its gradient is rounding
    alone, which AdamW would make full steps of: epsilon, far above it and far below the root of a
    real gradient's square (10⁻³), takes it out.
    """
    return make_tiny_run(folder, model=model, optimizer={"lr": lr, "eps": 1e-6}, **changes)
