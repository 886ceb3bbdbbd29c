"""Runs that were published without a step time, predicted: Llama 3 405B and DeepSeek-V3.

    python bench/large_runs.py

Llama's rows stand in `large_runs.csv` (arXiv:2407.21783, table 4), what they leave open assumed by
the rules of `plan/cases.py`. DeepSeek-V3 (arXiv:2412.19437): 180,000 H800 hours per trillion
tokens, 16 stages, experts over 64 ranks, ZeRO-1, fp8, batches of 15,360 sequences of 4,096 tokens;
its DualPipe is taken for DualPipeV, and what it computes again is left out.
"""

from __future__ import annotations

from pathlib import Path

from ridgeline.layout.layout import Layout
from ridgeline.model.catalogue import entry
from ridgeline.model.counts import flops_per_token
from ridgeline.plan.cases import predict, read_cases
from ridgeline.plan.constants import calibration
from ridgeline.plan.plan import Planned, price
from ridgeline.plan.question import question

PUBLISHED = {"8192 8192": 430.0, "16384 8192": 400.0, "16384 131072": 380.0}
"""TFLOP/s per device, by devices and tokens per sequence."""
DEEPSEEK = "dp128 pp16 ep64 v2 zero1 dualpipev fp8"
DEEPSEEK_BATCH = 15360 * 4096
DEEPSEEK_STEP_S = 180e3 * 3600 / 1e12 * DEEPSEEK_BATCH / 2048
"""Published device hours per token, times the tokens of a step, over its devices."""


def llama() -> dict[str, float]:
    """TFLOP/s per device of each row of Llama 3 405B, attention counted causally."""
    known, shape = calibration(), entry("llama3.1-405b").shape
    rows = read_cases([Path(__file__).with_name("large_runs.csv")], known).rows
    found = {}
    for row, seconds in zip(rows, predict(rows, known).total, strict=True):
        sequence = int(row.numbers["sequence"])
        tokens = sequence * row.numbers["global_batch"]
        each = flops_per_token(shape, sequence, "causal").total
        found[row.id] = each * tokens / float(seconds) / row.devices / 1e12
    return found


def deepseek() -> Planned:
    """A step of DeepSeek-V3 with the published layout, on Megatron-Core's constants."""
    asked = question(
        entry("deepseek-v3").shape, "2048xH800-SXM-80GB", batch_tokens=DEEPSEEK_BATCH,
        sequence=4096, precision="fp8", stack="megatron-core",
    )  # fmt: skip
    return price(asked, [Layout.model_validate(DEEPSEEK)])[0]


def main() -> None:
    """Print the figures that the docs quote."""
    print("Llama 3 405B: TFLOP/s per device, attention counted causally")
    print(f"{'devices':>8} {'tokens':>8} {'predicted':>10} {'published':>10}")
    for name, value in llama().items():
        devices, tokens = name.split()
        print(f"{devices:>8} {tokens:>8} {value:10.0f} {PUBLISHED[name]:10.0f}")
    step = deepseek()
    low, high = step.interval_s
    print(f"\nDeepSeek-V3, {step.layout}")
    print(
        f"step: predicted {step.step_s:.1f} s ({low:.1f} to {high:.1f}), published "
        f"{DEEPSEEK_STEP_S:.1f} s; memory {step.memory_bytes / 2**30:.0f} GiB with nothing "
        f"recomputed"
    )
    for name, seconds in step.ledger.seconds:
        if seconds and name != "total_s":
            print(f"  {name.removesuffix('_s'):10} {seconds:6.2f} s")


if __name__ == "__main__":
    main()
