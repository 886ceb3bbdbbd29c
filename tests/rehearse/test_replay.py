"""A step put together from its kinds of actions is the step traced whole, byte for byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.rehearse.real import Seen, seen_in_second_step

from ridgeline.layout.layout import Layout
from ridgeline.layout.stages import chunks_of
from ridgeline.model.decoder import Decoder
from ridgeline.rehearse.replay import Replay, replay
from ridgeline.rehearse.trace import Program, of_micro_batches, stage, trace
from ridgeline.run import Run, make_run
from ridgeline.train.checkpoint import make_state
from ridgeline.train.optimizer import adamw
from ridgeline.train.pipeline import steps_of
from ridgeline.train.vocabulary import token_loss

PROGRAM = Program(Decoder, token_loss, adamw)
MODEL: dict[str, Any] = {
    "layers": 4, "hidden": 32, "heads": 4, "kv_heads": 4, "ffn_hidden": 64, "vocab": 320,
    "max_sequence": 32,
}  # fmt: skip
DEEP = MODEL | {"layers": 8}
TIED = MODEL | {"positions": "learned", "norm": "layernorm", "tied": True}
MIXTURE = MODEL | {
    "experts": {
        "count": 4, "top_k": 2, "ffn_hidden": 32, "shared": 1, "first_dense_layers": 1,
        "routing": "sigmoid", "balance_weight": 0.1, "bias_rate": 0.01,
    },
}  # fmt: skip


def run_of(model: dict[str, Any], sentence: str, micro_batches: int) -> Run:
    layout = Layout.model_validate(sentence)
    batch = micro_batches * layout.data * layout.micro_batch
    return make_run({"model": model, "layout": sentence, "schedule": {"global_batch": batch}})


def both(run: Run, place: int, micro_batches: int) -> tuple[Replay, Seen]:
    """A pipeline rank's step put together, and its second step traced whole."""
    layout = run.layout
    assert isinstance(layout, Layout)
    rank = place * layout.world // layout.pipeline
    steps = steps_of(layout, place, micro_batches, True)
    chunks = len(chunks_of(layout, run.model, run.sequence))
    parts = replay(steps, trace(run, PROGRAM, rank, steps), chunks, micro_batches)
    with stage(of_micro_batches(run, micro_batches, 2), PROGRAM, rank) as (job, tracker, owners):
        make_state(job.optimizer)
        owners.moments(job.optimizer)
        return parts, seen_in_second_step(job, tracker, owners)


SCHEDULES = ("gpipe", "1f1b", "v2 1f1b", "zbh1", "v2 izb", "zbv", "dualpipev")
FOLDED = ("v2 1f1b", "v2 izb", "zbv", "dualpipev")  # two chunks on each rank
CASES = [
    *((MODEL, f"pp2 {schedule} mb1 bf16", 4) for schedule in SCHEDULES),
    *(
        (DEEP if each in FOLDED else MODEL, f"dp2 zero{n % 4} pp4 {each} mb1 bf16", 8)
        for n, each in enumerate(SCHEDULES)
    ),
    (MODEL, "mb2 fp32 full", 3),
    (MODEL, "dp4 zero3/2 mb1 bf16 selective", 4),
    (MODEL, "cp2 tp2 dp2 mb2 zero1 bf16", 2),
    (MODEL, "mb2 fp16", 1),
    (TIED, "tp2 pp2 mb2 zbh1 bf16", 4),
    (MIXTURE, "dp2 tp2 ep2 mb2 zero2 bf16 full", 3),
    (MIXTURE, "pp2 dp2 ep2 mb2 v2 izb fp32", 4),
]


@pytest.mark.parametrize(
    ("model", "sentence", "micro_batches"), CASES, ids=[f"{c[1]} x{c[2]}" for c in CASES]
)
def test_the_parts_put_together_are_the_whole(
    model: dict[str, Any], sentence: str, micro_batches: int
) -> None:
    run = run_of(model, sentence, micro_batches)
    assert isinstance(run.layout, Layout)
    for place in {run.layout.pipeline // 4, run.layout.pipeline - 1}:
        parts, whole = both(run, place, micro_batches)
        assert parts.peak.total == whole.peak_bytes
        assert {k: v for k, v in parts.peak.bytes_by_owner.items() if v} == {
            owner: size for owner, size in whole.parts.items() if size
        }
        assert sum(parts.sums.flops.values()) == whole.flops
        # FSDP2 copies once more, or once less, by what another chunk of the process did before
        assert parts.sums.kernels == pytest.approx(whole.kernels, rel=1e-3)
        assert parts.sums.calls == Counter(message.axis for message in whole.messages)
        sent: Counter[str] = Counter()
        for message in whole.messages:
            sent[message.axis] += message.sent_bytes  # type: ignore[assignment]
        assert +parts.sums.sent_bytes == +sent


def test_a_short_list_shows_every_context_of_a_long_one() -> None:
    run = run_of(MODEL, "pp4 mb1 bf16", 64)
    layout = run.layout
    assert isinstance(layout, Layout)
    seen = trace(run, PROGRAM, 1, steps_of(layout, 1, 64, True))
    assert seen.micro_batches <= 6
    assert replay(steps_of(layout, 1, 64, True), seen, 4, 64).peak.total > 0


@pytest.mark.parametrize("place", [0, 3])
def test_memory_grows_by_what_a_micro_batch_keeps(place: int, tmp_path: Path) -> None:
    """GPipe holds all micro-batches: their activations and tokens, one as many as the other."""
    layout = Layout.model_validate("pp4 gpipe mb1 bf16")
    seen = trace(run_of(MODEL, str(layout), 8), PROGRAM, place, steps_of(layout, place, 8, True))
    peaks = []
    for count in (8, 16, 32):
        steps = steps_of(layout, place, count, True)
        peaks.append(replay(steps, seen, 4, count).peak.total)
    assert peaks[2] - peaks[1] == 2 * (peaks[1] - peaks[0]) > 0
