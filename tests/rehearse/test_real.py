"""A rehearsed rank is the real one: peak of memory, FLOPs, and every message in its order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.rehearse.real import Seen, real_rank, seen_in_second_step
from tests.train.layouts import DENSE, GPT, QWEN, table_run

from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.model.decoder import Decoder
from ridgeline.rehearse.trace import Program, stage
from ridgeline.run import Run
from ridgeline.train.checkpoint import make_state
from ridgeline.train.optimizer import adamw
from ridgeline.train.vocabulary import token_loss

PROGRAM = Program(Decoder, token_loss, adamw)
MODELS = {"dense": DENSE, "gpt": GPT, "qwen": QWEN}
LAYOUTS = (
    ("dense", "mb4 bf16"),
    ("dense", "mb2 full fp32"),
    ("dense", "dp2 mb2 zero1 bf16"),
    ("qwen", "dp2 mb2 zero2 selective bf16"),
    ("gpt", "dp2 mb2 zero3 fp32"),
    ("dense", "tp2 mb4 bf16"),
    ("gpt", "tp2 mb2 full bf16"),
    ("dense", "pp2 mb2 fp32"),
    ("dense", "pp2 mb2 zbh1 bf16"),
    ("dense", "cp2 mb4 bf16"),
    ("dense", "dp2 tp2 mb2 zero1 bf16"),
    ("dense", "pp2 v2 dp2 mb2 1f1b zero1 bf16"),
)


@pytest.mark.parametrize(("model", "sentence"), LAYOUTS, ids=[" ".join(each) for each in LAYOUTS])
def test_a_real_rank_does_what_was_rehearsed(
    model: str, sentence: str, make_tiny_run: Callable[..., Run], pool: Pool, tmp_path: Path
) -> None:
    run = table_run(make_tiny_run, tmp_path, MODELS[model], layout=sentence, budget={"steps": 2})
    layout = run.layout
    assert isinstance(layout, Layout)
    real: list[Seen] = pool.run(real_rank, (run,), layout.world)
    for rank in {0, layout.world - 1}:
        with stage(run, PROGRAM, rank) as (job, tracker, owners):
            make_state(job.optimizer)
            owners.moments(job.optimizer)
            rehearsed = seen_in_second_step(job, tracker, owners)
        assert rehearsed.messages == real[rank].messages
        assert rehearsed.flops == real[rank].flops
        assert rehearsed.peak_bytes == real[rank].peak_bytes
        assert rehearsed.parts == real[rank].parts
        # FSDP2's own operations are one each in a rehearsal, and several for real
        assert rehearsed.kernels == pytest.approx(real[rank].kernels, rel=0.02)
