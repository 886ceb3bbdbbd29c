"""The example of a block of one's own, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from examples.own_block import ParallelDecoder

import ridgeline
from ridgeline.launch.pool import Pool
from ridgeline.run import Run
from ridgeline.train.parity import parity
from ridgeline.train.parity_text import table

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_block.py"
SENTENCE = "a ridge line runs from peak to peak, and no step of it is lost"
RUN = """
name = "tiny"
model = {{ name = "tiny", layers = 2, hidden = 32, heads = 2, vocab = 300, max_sequence = 32 }}
data = {{ folder = "{folder}/prepared", workers = 1, corpora = [
    {{ name = "text", sources = ["{folder}/text.jsonl"] }},
] }}
optimizer = {{ lr = 1e-2 }}
evaluation = {{ sequences = 8, must_learn_nats = 1.5 }}
"""


def test_own_block_trains_on_two_processes_and_checks_itself(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{number} {SENTENCE} {number % 7}"}) for number in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n")
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN.format(folder=tmp_path))
    ridgeline.prepare(ridgeline.read_run(run_file))
    overrides = ["--folder", str(tmp_path), "--layout", "dp2 mb4 fp32"]
    overrides += ["--schedule.global_batch", "8", "--schedule.warmup_steps", "3"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(run_file), *overrides, "--budget.steps", "25"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = re.search(r"^held-out loss ([\d.]+), unigram entropy ([\d.]+)$", done.stdout, re.M)
    assert found is not None, done.stdout
    assert float(found[1]) < float(found[2])
    rows = [
        json.loads(line)
        for line in (tmp_path / "own-block" / "metrics.jsonl").read_text().splitlines()
    ]
    # a norm of 32 fewer in each of two blocks: it was our block that trained
    started = next(row for row in rows if row.get("event") == "started")
    assert started["parameters"] == 2 * 300 * 32 + 2 * (4 * 32**2 + 3 * 32 * 256 + 32) + 32


def test_own_block_is_the_same_model_over_tensor_pipeline_and_shard(
    tiny_run: Callable[..., Run], pool: Pool
) -> None:
    layouts = ("tp2 mb4", "pp2 mb2", "dp2 mb2 zero3", "dp2 tp2 pp2 mb2 zero1")
    run = tiny_run(optimizer={"lr": 1e-2})
    found = parity(run, layouts, 6, decoder=ParallelDecoder, pool=pool)
    assert found.equal, table(found)
    assert found.learnt_nats >= 0.5
    ours = parity(run, ("dp1 mb8",), 1, pool=pool)
    assert found.loss[0] != ours.loss[0]  # the example's model is another one
