"""What accounting for every second costs a step: always on, and in the steps that are sampled.

    python bench/telemetry_overhead.py [--seconds 120]

One process trains one model on, with its account and without in turns: a step as `ridgeline train`
does it, two in which nobody looks at a clock, one as before. The ratio is of steps that lie side by
side, so what else the machine does falls on both: the median of all, and how far it may be off
(1.57 interquartile ranges over the root of their number: McGill, Tukey and Larsen, 1978). Then the
sampled steps, beside the ordinary ones. Seconds are the thread's own: in one process an account
waits for nobody, and other programs are not its fault.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from ridgeline.layout.layout import Layout
from ridgeline.model.decoder import Decoder
from ridgeline.run import Run, make_run
from ridgeline.train.account import COUNTED, EVERY, FIRST, Account, held
from ridgeline.train.agreement import Agreement
from ridgeline.train.build import build
from ridgeline.train.loop import Job, train_loop
from ridgeline.train.manifest import Progress
from ridgeline.train.optimizer import adamw
from ridgeline.train.parallelize import make_mesh
from ridgeline.train.telemetry import Clock, Observation
from ridgeline.train.vocabulary import token_loss
from ridgeline.train.worker import process_group

SIZES = {"tiny": (2, 32, 64, 32), "small": (4, 128, 512, 128)}
"""Layers, hidden, feed-forward and sequence; vocabulary 512; 8 sequences, 4 at a time."""


class Switched(Clock):
    """A clock that can be switched off."""

    off = False

    def phase(self, name: str) -> Any:
        return nullcontext() if self.off else super().phase(name)


class Words:
    """Random tokens."""

    def __init__(self, run: Run) -> None:
        self.tokens = np.random.default_rng(0).integers(0, 512, (8, run.sequence + 1))

    def batch(self, start: int, size: int) -> Any:
        return self.tokens[:size]


def run_of(folder: str, size: str, steps: int) -> Run:
    """A run of one process."""
    layers, hidden, ffn, sequence = SIZES[size]
    return make_run(
        {
            "name": size, "folder": folder, "layout": "mb4 fp32", "budget": {"steps": steps},
            "model": {
                "layers": layers, "hidden": hidden, "heads": 4, "ffn_hidden": ffn, "vocab": 512,
                "max_sequence": sequence,
            },
            "data": {"folder": folder, "corpora": [{"name": "none", "sources": ["none"]}]},
            "schedule": {"global_batch": 8, "warmup_steps": 1},
        }
    )  # fmt: skip


@contextmanager
def job_of(run: Run) -> Iterator[Job]:
    """What a rank trains `run` with, on words that mean nothing."""
    assert isinstance(run.layout, Layout)
    with process_group() as (device, control):
        mesh = make_mesh(run.layout, device, 0)
        clock = Switched()
        pipeline = build(run, Decoder, mesh, clock)
        words: Any = Words(run)
        optimizer = adamw(pipeline.chunks[0], run.optimizer)
        yield Job(
            run, mesh, pipeline, token_loss, optimizer, None, words, Agreement(control), clock,
            lambda: False,
        )  # fmt: skip


def measure(size: str, rounds: int) -> tuple[float, list[float], dict[str, float]]:
    """(seconds of a step without, quartiles of with over without, seconds of sampled steps)."""
    steps = COUNTED + 2 + 4 * rounds
    sampled: dict[str, float] = {}
    blocks: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        run = run_of(folder, size, steps)
        run.path.mkdir()
        with job_of(run) as job:
            account = Account(job, None, None, Progress(), held())
            clock = job.clock
            assert isinstance(clock, Switched)
            last = time.thread_time()

            def observe(seen: Observation) -> None:
                if not clock.off:
                    account.observe(seen.progress)

            def after_step(progress: Progress, complete: bool, stop: bool) -> tuple[bool, None]:
                nonlocal last
                step = progress.step
                if not clock.off and (step + 1) % EVERY:
                    with clock.phase("logging"):
                        account.prepare()
                now = time.thread_time()
                if step in (FIRST, COUNTED):
                    sampled["timed" if step == FIRST else "counted"] = now - last
                if step > COUNTED + 2:
                    blocks[not clock.off].append(now - last)
                    done = len(blocks[True]) + len(blocks[False])
                    clock.off = done % 4 in (1, 2)  # on, off, off, on: a drift falls on both
                last = time.thread_time()
                return False, None

            train_loop(job, Progress(), observe, after_step)
    with_, without = blocks[True], blocks[False]
    ratios = [a / b for a, b in zip(with_, without, strict=False)]
    return statistics.median(without), statistics.quantiles(ratios), sampled


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="for each model")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    print(f"every {EVERY}th step is timed finely, and step {COUNTED} is counted")
    print(f"{'model':8} {'step':>9} {'always on':>9} {'give/take':>7}", end=" ")
    print(f"{'timed':>6} {'counted':>7} {'with timed':>10}")
    for size in SIZES:
        rounds = int(seconds / 4 / measure(size, 3)[0])
        step_s, (low, ratio, high), sampled = measure(size, rounds)
        off = 1.57 * (high - low) / (2 * rounds) ** 0.5
        times = {name: seconds / step_s for name, seconds in sampled.items()}
        total = ratio - 1 + (times["timed"] - 1) / EVERY
        print(f"{size:8} {step_s * 1e3:6.1f} ms {ratio - 1:9.2%}", end=" ")
        print(f"{off:7.2%}", end=" ")
        print(f"{times['timed']:5.1f}x {times['counted']:6.1f}x {total:10.2%}")


if __name__ == "__main__":
    main()
