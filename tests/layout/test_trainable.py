"""What the trainer refuses: each refusal with its rule, and a remedy that is not refused."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Layout
from ridgeline.layout.trainable import is_trainable, trainable
from ridgeline.model import catalogue
from ridgeline.model.shape import ExpertShape, ModelShape

SHAPE = ModelShape(
    name="a model", layers=8, hidden=64, heads=8, kv_heads=4, vocab=512, max_sequence=96,
    experts=ExpertShape(count=4, top_k=2, ffn_hidden=32),
)  # fmt: skip
SPLIT = ["zbh1", "izb v2", "zbv", "dualpipev"]

REFUSALS = [
    # layout, sequence: rule, remedy
    ("tp2 fp8", 64, "8 bits are not divided by tensor", "'tp2 bf16', or tp1"),
    ("dp2 ep2 tp2 etp2", 64, "every tensor rank holds whole ones", "'dp2 tp2 ep2'"),
    *((f"pp2 compile {split}", 64, "in two halves", "schedule 1f1b") for split in SPLIT),
    *((f"pp2 selective {split}", 64, "for one backward pass alone", "full") for split in SPLIT),
    ("pp2 gpipe v2", 64, "gpipe has one chunk per rank", "1f1b v2"),
    ("dp2 compile fp32", 64, "experts in bf16 alone", "'dp2 bf16 compile'"),
    ("cp2 tp4", 36, "cp·tp = 2·4 equal parts of a sequence: 36 is not a multiple of 8", "40"),
    ("cp3", 63, "63 is not a multiple of 6", "a sequence of 60 or 66"),
    ("pp16", 64, "each of the 16 chunks of its pipeline", "at most 8 chunks in all"),
    ("pp8 zbv", 64, "each of the 16 chunks of its pipeline", "at most 8 chunks in all"),
]


@pytest.mark.parametrize(("sentence", "sequence", "rule", "remedy"), REFUSALS)
def test_each_refusal_has_a_rule_and_a_remedy(
    sentence: str, sequence: int, rule: str, remedy: str
) -> None:
    layout = Layout.model_validate(sentence)
    with pytest.raises(LayoutError) as caught:
        trainable(layout, SHAPE, sequence)
    assert rule in caught.value.rule
    assert remedy in caught.value.remedy
    assert not is_trainable(layout, SHAPE, sequence)
    for other in re.findall(r"'([^']*)'", caught.value.remedy):
        trainable(Layout.model_validate(other), SHAPE, sequence)
    for length in re.findall(r"\b(\d\d)\b", caught.value.remedy * ("sequence of" in remedy)):
        trainable(layout, SHAPE, int(length))


def test_latent_attention_is_refused_by_the_models_name() -> None:
    shape = catalogue.entry("deepseek-v3").shape
    with pytest.raises(LayoutError, match="latent attention can be planned") as caught:
        trainable(Layout(), shape, 4096)
    assert shape.name in caught.value.asked


@pytest.mark.parametrize(
    "sentence",
    [
        "dp2 compile pp2 bf16", "pp2 compile gpipe", "pp2 v2 compile bf16", "compile zbh1",
        *(f"pp4 {split}" for split in SPLIT),
        "dp2 tp2 pp2 cp2 ep4 zero3 full bf16", "dp4 zero3/2 selective fp16", "cp8", "tp4 cp2",
    ],
)  # fmt: skip
def test_what_is_left_can_be_trained(sentence: str) -> None:
    trainable(Layout.model_validate(sentence), SHAPE, 96)
    assert is_trainable(Layout.model_validate(sentence), SHAPE, 96)


@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 9), st.integers(1, 60),
    st.sampled_from(["1f1b", "zbv", "izb"]), st.booleans(),
)  # fmt: skip
def test_whatever_is_asked_it_is_a_yes_or_a_layout_error(
    context: int, tensor: int, pipeline: int, sequence: int, schedule: str, compiled: bool
) -> None:
    layout = Layout.model_validate(
        f"cp{context} tp{tensor} pp{pipeline} {schedule}" + " compile" * compiled
    )
    if is_trainable(layout, SHAPE, sequence):
        assert sequence % (context * tensor) == 0
        assert pipeline * (2 if schedule == "zbv" and pipeline > 1 else 1) <= SHAPE.layers
