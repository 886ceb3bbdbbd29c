"""What a checkpoint costs: the wait, the steps beside its writing, and bytes on disk.

    python bench/checkpoint.py [--layers 6 --hidden 512 --rounds 7]

One process trains a model by the trainer's own parts. In each round: steps alone; the bare copy of
the whole state into memory that is there already; a checkpoint, whose wait is compared with that
copy; and steps until it is written. Ratios are pair by pair, their median and range. The first
round, in which the buffers are made, is told apart.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ridgeline.model.decoder import Decoder
from ridgeline.model.shape import ModelShape
from ridgeline.run import Checkpoint, Optimizer
from ridgeline.train.checkpoint import load, make_state, tensors_of
from ridgeline.train.manifest import Progress
from ridgeline.train.optimizer import adamw
from ridgeline.train.saving import Saver


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    shape = ModelShape(
        layers=asked.layers, hidden=asked.hidden, heads=8, vocab=8192, max_sequence=128
    )
    model = Decoder(shape)
    model.initialise(0)
    optimizer = adamw(model, Optimizer())
    make_state(optimizer)
    tokens_BL, positions_L = torch.randint(8192, (4, 128)), torch.arange(128)

    def step() -> float:
        began = time.perf_counter()
        logits = model(tokens_BL, positions_L)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens_BL.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began

    for _ in range(3):
        step()
    state = tensors_of([model], optimizer)
    size = sum(value.nbytes for value in state.values())
    copies = [torch.zeros_like(value) for value in state.values()]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), Checkpoint(keep=1), None)
        for number in range(asked.rounds + 1):
            alone = [step() for _ in range(5)]
            state = tensors_of([model], optimizer)
            began = time.perf_counter()
            for copy, value in zip(copies, state.values(), strict=True):
                copy.copy_(value.detach())
            copy_s = time.perf_counter() - began
            saver.save(Progress(step=number + 1), state)
            beside = []
            while (saved := saver.poll()) is None:
                beside.append(step())
            assert saved.error is None, saved.error
            slower = statistics.median(beside) / statistics.median(alone) if beside else None
            rows.append((copy_s, saved.stall_s, saved.write_s, slower))
        files = [file for file in saved.path.rglob("*") if file.is_file()]
        on_disk = sum(file.stat().st_size for file in files)
        load(saved.path, tensors_of([model], optimizer))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, state {size / 1e6:.0f} MB"
    )
    print(f"first: copy {rows[0][0]:.3f} s, wait {rows[0][1]:.3f} s (buffers are made)")
    ratios = [stall / copy for copy, stall, _, _ in rows[1:]]
    slow = [each for *_, each in rows[1:] if each is not None]
    print("| | median | least | most |\n|---|---|---|---|")
    for name, values in (
        ("copy of the state, s", [row[0] for row in rows[1:]]),
        ("wait, s", [row[1] for row in rows[1:]]),
        ("wait / copy", ratios),
        ("writing, s", [row[2] for row in rows[1:]]),
        ("step beside the writing / step alone", slow),
    ):
        least, middle, most = min(values), statistics.median(values), max(values)
        print(f"| {name} | {middle:.3f} | {least:.3f} | {most:.3f} |")
    print(f"bytes on disk / state: {on_disk / size:.4f}")


if __name__ == "__main__":
    main()
