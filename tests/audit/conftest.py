"""A run folder as the trainer writes it, with believable curves, for the tests of its readers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ridgeline.layout.layout import Layout
from ridgeline.ledger import Ledger, Memory, StepSeconds
from ridgeline.plan.plan import price
from ridgeline.plan.question import question_of_run
from ridgeline.run import Run

WriteRunFolder = Callable[..., Path]

RUN_TOML = """\
name = "{name}"
seed = 1234
layout = "dp2 mb8 bf16" # bf16: this CPU multiplies bf16 natively

[model]
name = "stdlib-9m"
layers = 8
hidden = 256
heads = 8
vocabulary = 8192
sequence = 256

[data]
prepared = "prepared/standard-library/with-a-rather-long-name/version-2026-01"
sequence = 256 # the model's max_sequence

[[data.corpora]]
name = "code"
weight = 0.7

[[data.corpora]]
name = "prose"
weight = 0.3

[optimizer]
lr = 3e-3
betas = [0.9, 0.95]
weight_decay = 0.1
clip = 1.0

[schedule]
kind = "cosine"
warmup_steps = {warmup}

[budget]
steps = {total}

[evaluation]
every_steps = 100

[checkpoint]
every_steps = 200
keep = 3

[logging]
every_steps = 1
"""

ENVIRONMENT = {
    "ridgeline": "0.1.0",
    "python": "3.11.9",
    "torch": "2.13.0+cpu",
    "platform": "Linux-6.8.0-x86_64-with-glibc2.36",
    "host": "node0123",
    "cpu": "AMD EPYC 7A53 64-Core Processor",
    "cores": 2,
    "threads": 1,
    "device": "cpu",
    "processes": 2,
    "source_version": "9f1c2ab",
    "started": "2026-03-02T09:15:00+00:00",
    "command": "ridgeline train examples/laptop.toml --optimizer.lr 3e-3",
    "capabilities": {"amx_bf16": True, "avx512": None},
}


def loss_at(step: int) -> float:
    """A smooth loss curve from ln(8192) = 9.01 towards 3.1 nats."""
    return 3.1 + (math.log(8192) - 3.1) * math.exp(-(step**0.55) / 9)


def logged_step(step: int, total: int, noise: np.random.Generator) -> dict[str, object]:
    warmup = max(1, total // 20)
    decay = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / total))
    saving = 0.09 if step % 200 == 0 else 0.0
    phases = {
        "data": 0.0012 + 0.0004 * noise.random(),
        "forward_backward": 0.148 + 0.006 * noise.random(),
        "gradient_reduction": 0.012 + 0.003 * noise.random(),
        "optimizer": 0.011,
        "logging": 0.0006,
        "checkpoint": saving,
    }
    step_s = sum(phases.values()) + 0.0025
    norm = 0.6 + 2.5 * math.exp(-step / (0.03 * total)) + 0.12 * noise.random()
    return {
        "step": step,
        "loss": loss_at(step) + 0.08 * noise.standard_normal(),
        "grad_norm": norm + (11.4 if step == int(0.41 * total) else 0.0),
        "lr": 3e-3 * min(step / warmup, 0.1 + 0.9 * decay),
        "tokens": step * 2048,
        "tokens_per_s": 2048 / step_s,
        "mfu": None,
        "memory_bytes": int(1.21e9 + 3e7 * min(1.0, step / 50)),
        "step_s": step_s,
        "seconds": phases,
    }


def write_run_folder(
    folder: Path,
    *,
    total: int = 600,
    reached: int | None = None,
    log_every: int = 1,
    name: str = "standard-library",
    ending: str | None = "finished",
) -> Path:
    """Write a whole run folder that got to step `reached` of `total`; returns it."""
    noise = np.random.default_rng(7)
    reached = total if reached is None else reached
    (folder / "checkpoints").mkdir(parents=True)
    toml = RUN_TOML.format(name=name, warmup=max(1, total // 20), total=total)
    (folder / "run.toml").write_text(toml, encoding="utf-8")
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT), encoding="utf-8")
    records: list[dict[str, object]] = [
        {
            "step": 0,
            "event": "started",
            "total_steps": total,
            "parameters": 8_520_704,
            "embedding_parameters": 2_163_200,
            "model": "stdlib-9m",
            "mfu_convention": "causal",
            "baselines": {"unigram_entropy": 6.12, "bigram_held_out_loss": 4.31},
        }
    ]
    for step in range(log_every, reached + 1, log_every):
        records.append(logged_step(step, total, noise))
        if step % (log_every * max(1, total // (12 * log_every))) == 0:
            held_out = loss_at(step) + 0.09
            by_corpus = {"code": held_out - 0.31, "prose": held_out + 0.62}
            record = {"step": step, "held_out_loss": held_out, "held_out": by_corpus}
            records.append({**record, "seconds": {"evaluation": 1.4}})
        if step % (log_every * max(1, total // (3 * log_every))) == 0:
            checkpoint = folder / "checkpoints" / f"step-{step:08d}"
            checkpoint.mkdir()
            (checkpoint / "weights.safetensors").write_bytes(bytes(40_000))
            records.append({"step": step, "event": "checkpoint"})
    if ending:
        records.append({"step": reached, "event": ending})
    else:
        (folder / "lock.json").write_text("{}", encoding="utf-8")
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if ending == "finished":
        text = "def read(self, size=-1):\n    'Read up to size bytes & <return> them.'\n"
        text += "    if self.closed:\n        raise ValueError('I/O operation on closed file')\n"
        (folder / "sample.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(name="write_run_folder")
def write_run_folder_fixture() -> WriteRunFolder:
    return write_run_folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A finished run of 600 steps."""
    return write_run_folder(tmp_path / "standard-library")


@pytest.fixture
def write_audited(make_tiny_run: Callable[..., Run], tmp_path: Path) -> Callable[..., Path]:
    """Write the folder of a tiny run on A100s that was timed: `write_audited("a", layout="dp2")`.

    What `train` says it measured is the plan, each second stretched by `stretch` of its cause.
    """

    def write(name: str, stretch: Mapping[str, float] | None = None, **changes: Any) -> Path:
        settings = {"layout": "pp2 mb2 bf16", **changes}
        settings["cluster"] = {"device": "A100-SXM-80GB", "devices": 2}
        run = make_tiny_run(tmp_path / "runs", name=name, **settings)
        assert isinstance(run.layout, Layout)
        (run.path / "ledgers").mkdir(parents=True)
        (run.path / "run.toml").write_text(run.to_toml(), encoding="utf-8")
        told = {"device": "cuda", "ridgeline": "0.1.0", "torch": "2.13.0", "host": "n1", "cpu": "x"}
        (run.path / "environment.json").write_text(json.dumps(told), encoding="utf-8")
        records = [
            {"step": 0, "event": "started", "start_s": 3.0, "time": 103.0},
            {"step": 2, "step_s": 1.0, "tokens": 512, "tokens_per_s": 256.0, "time": 105.0},
            {"step": 4, "step_s": 2.0, "tokens": 1024, "tokens_per_s": 128.0, "time": 109.0},
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (run.path / "metrics.jsonl").write_text(lines, encoding="utf-8")
        planned = price(question_of_run(run), [run.layout])[0].ledger
        stretch = stretch or {}
        seconds = {
            cause: value * stretch.get(cause, 1.0)
            for cause, value in planned.seconds.model_dump(exclude={"total_s"}).items()
            if value is not None
        }
        measured = Ledger(
            witness="train",
            layout=str(run.layout),
            memory=tuple(Memory(total_bytes=2 * (s.total_bytes or 0)) for s in planned.memory),
            seconds=StepSeconds(**seconds, total_s=sum(seconds.values())),
            sent=planned.sent,
            sources={"seconds.compute_s": "host clock"},
        )
        (run.path / "ledgers" / "train.json").write_text(measured.to_json(), encoding="utf-8")
        return run.path

    return write
