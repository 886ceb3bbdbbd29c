"""How long a rehearsal takes, and how much memory: by ranks, by layers, and of published runs.

    python bench/rehearse_scale.py

One process on one core; each run in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

FULL = "mb1 zero1 full fp16"
LARGE = [
    # name, model, layout, sequence, sequences per step, device
    ("1T on 3,072", "frontier-1t", f"dp6 tp8 pp64 {FULL}", 2048, 9600, "MI250X-GCD"),
    ("1T on 98,304", "frontier-1t", f"dp192 tp8 pp64 {FULL}", 2048, 307_200, "MI250X-GCD"),
    ("175B on 1,024", "frontier-175b", f"dp16 tp4 pp16 {FULL}", 2048, 10_240, "MI250X-GCD"),
    ("405B on 16,384", "llama3.1-405b", "dp128 tp8 pp16 zero1", 8192, 2048, "H100-SXM-80GB"),
]
RANKS = [(f"1T, dp{dp}", dp) for dp in (1, 6, 24, 96, 384)]
LAYERS = (4, 8, 16, 32, 64, 128)


def rehearse(model: Any, layout: str, sequence: int, batch: int, device: str) -> dict[str, Any]:
    """Rehearse one run in this process; its seconds, memory and verdict."""
    import torch

    import ridgeline
    from ridgeline.layout.layout import Layout
    from ridgeline.run import make_run

    torch.set_num_threads(1)
    world = Layout.model_validate(layout).world
    run = make_run(
        {
            "model": model, "layout": layout, "schedule": {"global_batch": batch},
            "data": {"sequence": sequence}, "cluster": {"device": device, "devices": world},
        }
    )  # fmt: skip
    found = ridgeline.rehearse(run)
    return {
        "ranks": world,
        "stages": len(found.stages),
        "seconds": found.seconds,
        "rss_bytes": found.rss_bytes,
        "peak_bytes": found.fullest.peak_bytes,
        "fits": found.fits,
    }


def measured(*asked: Any) -> dict[str, Any]:
    """`rehearse` in a process of its own."""
    words = [sys.executable, __file__, json.dumps(asked)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(title: str, *asked: Any) -> None:
    """A row of the table."""
    told = measured(*asked)
    print(
        f"{title:18} {told['ranks']:>7,} {told['stages']:>6} {told['seconds']:>8.1f} "
        f"{told['rss_bytes'] / 2**30:>9.2f} {told['peak_bytes'] / 2**30:>10.1f}  "
        f"{'fits' if told['fits'] else 'does not fit'}",
        flush=True,
    )


def main() -> None:
    """Print the three tables."""
    print(f"{'run':18} {'ranks':>7} {'stages':>6} {'seconds':>8} {'RSS GiB':>9} {'peak GiB':>10}")
    for name, *asked in LARGE:
        show(name, *asked)
    print("\nby ranks: 1T, tp8 pp64, 64 micro-batches of each replica")
    for name, dp in RANKS:
        layout = f"dp{dp} tp8 pp64 mb1 zero1 full bf16"
        show(name, "frontier-1t", layout, 2048, 64 * dp, "MI250X-GCD")
    print("\nby layers: 1.3B's width, tp2 dp8 zero3, 4 micro-batches of each replica")
    wide = {"hidden": 2048, "heads": 16, "kv_heads": 16, "ffn_hidden": 8192, "vocab": 50_304,
            "max_sequence": 2048}  # fmt: skip
    for layers in LAYERS:
        model = wide | {"layers": layers}
        show(f"{layers} layers", model, "dp8 tp2 mb1 zero3 bf16", 2048, 32, "H100-SXM-80GB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(rehearse(*json.loads(sys.argv[1]))))
    else:
        main()
