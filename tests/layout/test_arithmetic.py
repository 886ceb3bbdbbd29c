"""The divisibility rules: what passes, and that each refusal names something that passes."""

from __future__ import annotations

import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ridgeline.errors import LayoutError
from ridgeline.layout.arithmetic import check
from ridgeline.layout.layout import Layout
from ridgeline.model.shape import ExpertShape, ModelShape

SHAPE = ModelShape(
    name="a model", layers=8, hidden=64, heads=8, kv_heads=4, ffn_hidden=96, vocab=512
)
EXPERTS = SHAPE.model_copy(update={"experts": ExpertShape(count=6, top_k=2, ffn_hidden=32)})

REFUSALS = [
    # layout, sequence, global batch, devices: rule, remedy
    ("dp2 tp4", 64, 8, 16, "2·1·4·1 = 8, not 16", "dp4"),
    ("dp3 mb4", 64, 32, 3, "3·4 = 12, and 32 = 2·12 + 8", "24 or 36, or dp2 mb1"),
    ("dp4", 64, 3, 4, "4·1 = 4, and 3 = 0·4 + 3", "a global batch of 4, or dp3 mb1"),
    ("tp3", 64, 8, 3, "attention heads: 8 is not a multiple of 3", "tp2"),
    ("tp8", 64, 8, 8, "key-value heads: 4 is not a multiple of 8", "tp4"),
    ("tp16", 64, 8, 16, "attention heads: 8 is not a multiple of 16", "tp4"),
    ("cp7 tp4", 60, 8, 28, "60 is not a multiple of 14", "a sequence of 56 or 70"),
    ("pp8 v2", 64, 8, 8, "pp·v = 16 chunks holds at least one of 8 layers", "at most 8"),
    ("pp4 v2", 64, 6, 4, "a multiple of pp", "v1, or 8 micro-batches"),
    ("dp8 ep4", 64, 8, 8, "ep divides the number of experts, 6", "ep3"),
]


@pytest.mark.parametrize(("sentence", "sequence", "batch", "devices", "rule", "remedy"), REFUSALS)
def test_each_rule_shows_its_arithmetic_and_the_nearest_choice(
    sentence: str, sequence: int, batch: int, devices: int, rule: str, remedy: str
) -> None:
    shape = EXPERTS if "ep" in sentence else SHAPE
    with pytest.raises(LayoutError) as caught:
        check(Layout.model_validate(sentence), shape, sequence, batch, devices)
    assert rule in caught.value.rule
    assert remedy in caught.value.remedy


def test_a_vocabulary_too_small_for_every_tensor_rank_is_refused() -> None:
    tiny = SHAPE.model_copy(update={"vocab": 5})
    with pytest.raises(LayoutError, match=r"5 - 2·3 leaves none") as raised:
        check(Layout.model_validate("tp4"), tiny, 64, 8)
    assert raised.value.remedy == "tp5"
    check(Layout.model_validate("tp4"), SHAPE.model_copy(update={"vocab": 7}), 64, 8)


def test_expert_parallel_without_experts_is_refused() -> None:
    with pytest.raises(LayoutError, match="number of experts, 1"):
        check(Layout.model_validate("dp2 ep2"), SHAPE, 64, 8)


@given(
    data=st.integers(1, 12),
    context=st.integers(1, 9),
    tensor=st.integers(1, 12),
    pipeline=st.integers(1, 10),
    expert=st.integers(1, 8),
    micro_batch=st.integers(1, 5),
    batch=st.integers(1, 200),
    sequence=st.integers(1, 128),
    devices=st.integers(1, 256),
)
def test_a_layout_that_a_refusal_names_passes_the_rule_that_refused(
    data: int,
    context: int,
    tensor: int,
    pipeline: int,
    expert: int,
    micro_batch: int,
    batch: int,
    sequence: int,
    devices: int,
) -> None:
    assume(data % expert == 0)
    layout = Layout(
        data=data,
        context=context,
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        micro_batch=micro_batch,
    )
    rules = []
    for _ in range(12):  # each pass obeys one remedy more; there are fewer rules than that
        try:
            check(layout, EXPERTS, sequence, batch, devices)
            return
        except LayoutError as error:
            assert error.rule not in rules, "obeying a remedy must lift its rule"
            rules.append(error.rule)
            remedy = error.remedy
        if numbers := re.match(r"a sequence of (\d+)", remedy):
            sequence = int(numbers[1])
        elif numbers := re.match(r"a global batch of (\d+)", remedy):
            batch = int(numbers[1])
        elif re.fullmatch(r"(dp|tp|ep)\d+", remedy):
            named = Layout.model_validate(remedy.replace("ep", "dp"))
            field = {"dp": "data", "tp": "tensor", "ep": "expert"}[remedy[:2]]
            size = named.tensor if field == "tensor" else named.data
            layout = layout.model_copy(update={field: size})
        else:  # a choice left to the reader, told in words
            assert re.search(r"pp·v of at most \d+|\d+ devices, or axes", remedy)
            return
    raise AssertionError(rules)
