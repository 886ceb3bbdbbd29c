"""The Frontier study (arXiv:2312.12705), predicted: no row of it is in the calibration.

    python bench/frontier.py

Shares are of 191.5 TFLOP/s and count recomputation, as the study's own counter very probably does;
the layouts of 175B and 1T are recalled, that of 22B is the best of those in `frontier.csv`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ridgeline.plan.cases import Case, predict, predict_memory, read_cases
from ridgeline.plan.constants import calibration

PEAK = 191.5e12
CAPACITY = 64 * 2.0**30
PUBLISHED = {"22b": 0.3838, "175b": 0.3614, "1t": 0.3196}


def share(case: Case, seconds: float) -> float:
    """Executed FLOPs, 96·B·s·l·h²·(1 + s/6h + V/16lh) (arXiv:2104.04473), over the peak."""
    n = case.numbers
    h, layers, s = n["hidden"], n["layers"], n["sequence"]
    factor = 1 + s / (6 * h) + n["vocab"] / (16 * layers * h)
    flops = 96 * n["global_batch"] * s * layers * h**2 * factor
    return float(flops / seconds / case.devices / PEAK)


def figures(micro_batch: int = 1) -> dict[str, float]:
    """Every figure of the study that is predicted, as fractions.

    175B and 1T run with micro-batches of `micro_batch` sequences; 1 is what is recalled.
    """
    known = calibration()
    read = read_cases([Path(__file__).with_name("frontier.csv")], known).rows
    size = {"micro_batch": float(micro_batch)}
    rows = [r if r.id.startswith("22b") else replace(r, numbers=r.numbers | size) for r in read]
    steps = predict(rows, known).total
    fits = predict_memory(rows, known).total <= CAPACITY
    seconds = {row.id: float(s) for row, s in zip(rows, steps, strict=True)}
    shares = {row.id: share(row, seconds[row.id]) for row in rows}
    fitting = {row.id for row, f in zip(rows, fits, strict=True) if f}
    best = max((name for name in fitting if name.startswith("22b")), key=lambda n: shares[n])
    return {
        "22b": shares[best],
        "175b": shares["175b"],
        "1t": shares["1t"],
        "175b weak": seconds["175b_one"] / seconds["175b"],
        "1t weak": seconds["1t_one"] / seconds["1t"],
        "175b strong": seconds["175b_strong_base"] / seconds["175b_strong"] / 8,
        "1t strong": seconds["1t_strong_base"] / seconds["1t_strong"] / 3,
    }


def main() -> None:
    """Print the table that the docs quote."""
    published = PUBLISHED | {
        "175b weak": 1.0, "1t weak": 1.0, "175b strong": 0.8993, "1t strong": 0.8705
    }  # fmt: skip
    larger = figures(micro_batch=4)
    print(f"{'':12} {'predicted':>10} {'published':>10} {'points':>7} {'mb4 instead':>12}")
    for name, value in figures().items():
        points = 100 * (value - published[name])
        print(
            f"{name:12} {value:10.2%} {published[name]:10.2%} {points:+7.1f} {larger[name]:12.2%}"
        )


if __name__ == "__main__":
    main()
