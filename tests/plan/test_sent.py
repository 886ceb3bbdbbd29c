"""Bytes sent by mesh axis, against arithmetic by hand and the schedules' own messages."""

from __future__ import annotations

from dataclasses import fields

import pytest

from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import pipeline_schedule
from ridgeline.ledger import SentBytes
from ridgeline.model.catalogue import entry
from ridgeline.plan.quantities import Layouts, task_of
from ridgeline.plan.question import physics, question
from ridgeline.plan.sent import sent


def sent_by(model: str, machine: str, sequence: int, batch: int, sentence: str) -> SentBytes:
    """The closed forms of one layout. `tests/rehearse` holds the count of single layouts."""
    asked = question(entry(model).shape, machine, sequence=sequence, batch_tokens=batch * sequence)
    found = sent(physics(asked)[0], Layouts.of([Layout.model_validate(sentence)]))
    return SentBytes(**{f"{f.name}_bytes": float(getattr(found, f.name)[0]) for f in fields(found)})


def test_every_axis_of_gpt3_by_hand() -> None:
    found = sent_by("gpt3-175b", "256xA100", 2048, 512, "dp4 tp8 pp8 mb2 v3 zero1 full")
    micro_batches, layers, hidden = 512 // (4 * 2), 96 // 8, 12288
    message = 2 * 2048 * hidden * 2  # two sequences in 16 bits
    # four gathers or scatters per layer in forward, recomputation and backward, ring of 8
    assert found.tensor_bytes == pytest.approx(layers * micro_batches * 3 * 4 * message * 7 / 8)
    # three chunks send their output on and their gradient back, each rank an eighth of it
    assert found.pipeline_bytes == pytest.approx(micro_batches * 3 * 2 * message / 8)
    parameters = layers * (12 * hidden**2 / 8 + 2 * hidden) + 50257 * hidden / 8
    # float32 gradients scattered, 16-bit weights gathered, ring of 4
    assert found.data_bytes == pytest.approx(parameters * (4 + 2) * 3 / 4)
    assert found.context_bytes == found.expert_bytes == 0


def test_zero_by_stage() -> None:
    """ZeRO-2 scatters, ZeRO-3 gathers twice as well, for each of 32 layers and 4 micro-batches."""
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    owned = 32 * layer + 2 * 32000 * 4096
    hand = {
        "dp8": 2 * 4 * owned * 7 / 8,
        "dp8 zero1": (4 + 2) * owned * 7 / 8,
        "dp8 zero2": 2 * owned * 7 / 8 + 4 * 32 * 4 * layer * 7 / 8,
        "dp8 zero3": 4 * 32 * (2 + 2 + 4) * layer * 7 / 8,
        # within pairs each micro-batch, then the halves all-reduced over four pairs
        "dp8 zero3/2": 4 * 32 * (2 + 2 + 4) * layer / 2 + 2 * 4 * owned / 2 * 3 / 4,
    }
    for sentence, expected in hand.items():
        assert sent_by("llama2-7b", "8xA100", 4096, 32, sentence).data_bytes == pytest.approx(
            expected
        )


def test_keys_and_values_go_round_once_forward_and_twice_back() -> None:
    found = sent_by("llama2-70b", "32xH100", 4096, 8, "dp2 cp4 tp4 zero1")
    turn = 4096 * 2 * 8 * 128 * 2 / 4 * 3 / 4  # 8 key-value heads of 128 over tp4, ring of 4
    assert found.context_bytes == pytest.approx(80 * 4 * 3 * turn)


def test_tokens_go_to_their_experts_and_back() -> None:
    found = sent_by("mixtral-8x7b", "8xH100", 4096, 16, "dp8 ep8 zero1")
    way = 4096 * 2 * 4096 * 2 * 7 / 8  # two experts per token, 16 bits, an eighth stays
    assert found.expert_bytes == pytest.approx(32 * 2 * 2 * 2 * way)
    # experts stand on one rank each: only what is not an expert is reduced
    common = 32 * (2 * 4096 * (4096 + 1024) + 8 * 4096 + 2 * 4096) + 2 * 32000 * 4096
    assert found.data_bytes == pytest.approx(common * (4 + 2) * 7 / 8)


@pytest.mark.parametrize(
    "words", ["1f1b", "1f1b v2", "1f1b v3", "gpipe", "zbh1", "izb v2", "zbv v2", "dualpipev v2"]
)
@pytest.mark.parametrize("pipeline", [2, 3, 4])
def test_messages_between_stages_are_those_of_the_action_lists(words: str, pipeline: int) -> None:
    layout = Layout.model_validate(f"pp{pipeline} {words}")
    micro_batches = 4 * pipeline
    schedule = pipeline_schedule(layout.schedule, pipeline, micro_batches, layout.interleave)
    rank_of = schedule.rank_of_chunk
    most = 0
    for rank, actions in enumerate(schedule.actions):
        count = 0
        for kind, chunk, _ in actions:
            other = {"F": chunk + 1, "B": chunk - 1, "I": chunk - 1}.get(kind, -1)
            count += 0 <= other < len(rank_of) and rank_of[other] != rank
        most = max(most, count)
    shape = entry("gpt3-175b").shape
    found = sent(task_of(shape, 2048, micro_batches), Layouts.of([layout]))
    assert found.pipeline[0] == pytest.approx(most * 2048 * 12288 * 2)
