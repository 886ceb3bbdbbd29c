"""How fast the whole space is priced, on one core.

    python bench/search_speed.py

Counts layouts that satisfy the arithmetic and whose memory was computed; the time is that of the
whole answer, enumeration and pricing of the best in detail included.
"""

from __future__ import annotations

import time

from ridgeline.model.catalogue import entry
from ridgeline.plan.plan import plan
from ridgeline.plan.question import question

CASES = (
    ("frontier-175b", "1024xFrontier", 2048, 10240),
    ("frontier-175b", "3072xFrontier", 2048, 9600),
    ("frontier-1t", "3072xFrontier", 2048, 9600),
    ("llama3.1-405b", "16384xH100", 8192, 2048),
)


def main() -> None:
    """Print one line per model and machine: the best of three searches."""
    print(
        f"{'model':16} {'machine':16} {'space':>12} {'valid':>10} {'fit':>10} {'s':>6} {'M/s':>6}"
    )
    for model, machine, sequence, batch in CASES:
        asked = question(
            entry(model).shape, machine, batch_tokens=batch * sequence, sequence=sequence
        )
        seconds = []
        for _ in range(3):
            begun = time.perf_counter()
            found = plan(asked)
            seconds.append(time.perf_counter() - begun)
        print(
            f"{model:16} {machine:16} {found.space:12,} {found.arithmetic_ok:10,} "
            f"{found.memory_ok:10,} {min(seconds):6.2f} "
            f"{found.arithmetic_ok / min(seconds) / 1e6:6.2f}"
        )


if __name__ == "__main__":
    main()
