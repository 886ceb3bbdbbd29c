"""The layout's sentence: both ways, in any order, and what it refuses."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import (
    AXIS_WORDS,
    EXAMPLE,
    Axis,
    Layout,
    Precision,
    Recompute,
    Schedule,
    words_of,
)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any layout that agrees with itself."""
    data, context = draw(st.integers(1, 64)), draw(st.integers(1, 8))
    replicas = data * context
    divisors = [size for size in range(1, replicas + 1) if replicas % size == 0]
    pipeline, zero = draw(st.integers(1, 16)), draw(st.integers(0, 3))
    return Layout(
        data=data,
        context=context,
        tensor=draw(st.integers(1, 16)),
        pipeline=pipeline,
        expert=draw(st.sampled_from(divisors)),
        expert_tensor=draw(st.integers(1, 4)),
        micro_batch=draw(st.integers(1, 32)),
        interleave=draw(st.integers(1, 4)) if pipeline > 1 else 1,
        schedule=draw(st.sampled_from(get_args(Schedule))),
        zero=zero,
        shard_group=draw(st.sampled_from([0, *divisors])) if zero else 0,
        recompute=draw(st.sampled_from(get_args(Recompute))),
        precision=draw(st.sampled_from(get_args(Precision))),
        order=tuple(draw(st.permutations(get_args(Axis)))),
    )


@given(layout=layouts(), seed=st.integers(0, 1000))
def test_the_sentence_reads_back_in_any_order_of_its_words(layout: Layout, seed: int) -> None:
    words = str(layout).split()
    random.Random(seed).shuffle(words)
    assert Layout.model_validate(" ".join(words)) == layout


@given(layout=layouts())
def test_a_field_is_in_the_sentence_exactly_when_it_is_not_the_default(layout: Layout) -> None:
    named = set(words_of(str(layout)))
    fields = Layout.model_fields
    changed = {name for name in fields if getattr(layout, name) != fields[name].default}
    assert named - {"data"} == changed - {"data"}
    assert ("data" in changed) <= ("data" in named)  # the empty sentence is said as dp1


def test_every_axis_order_is_one_word() -> None:
    layout = Layout.model_validate("tp-dp-cp-pp dp2")
    assert layout.order == ("tensor", "data", "context", "pipeline")
    assert str(layout) == "dp2 tp-dp-cp-pp"
    assert Layout.model_validate({"order": list(AXIS_WORDS)}).order == tuple(AXIS_WORDS)


def test_the_design_example_means_what_it_says() -> None:
    layout = Layout.model_validate(EXAMPLE)
    assert layout == Layout(
        data=48,
        tensor=8,
        pipeline=8,
        interleave=2,
        zero=1,
        recompute="selective",
        precision="bf16",
    )
    assert layout.world == 3072  # 48 · 1 · 8 · 8
    assert str(layout) == "dp48 tp8 pp8 v2 zero1 selective bf16"
    assert str(Layout()) == "dp1"


REFUSED = [
    # sentence, its rule, the choice that the remedy names, the sentence with that choice
    ("zero4", "a layout is words such as", "zero1", "zero1"),
    ("bf61", "a layout is words such as", "bf16", "bf16"),
    ("selectiv", "a layout is words such as", "selective", "selective"),
    ("pp-dp-cp", "a layout is words such as", "pp-dp-cp-tp", "pp-dp-cp-tp"),
    ("dp0", "sizes start at 1", "dp1", "dp1"),
    ("dp2 dp4", "each word once", EXAMPLE, EXAMPLE),
    ("bf16 fp32", "each word once", EXAMPLE, EXAMPLE),
    ("v2", "needs pp of 2 or more", "pp2 v2", "pp2 v2"),
    ("dp4 cp2 ep3", "4·2 = 8 is not a multiple of 3", "ep2", "dp4 cp2 ep2"),
    ("dp12 zero2/5", "divides dp·cp = 12", "zero2/4", "dp12 zero2/4"),
    ("dp-cp-pp-pp", "exactly once", "pp-dp-cp-tp", "pp-dp-cp-tp"),
]


@pytest.mark.parametrize(("sentence", "rule", "choice", "corrected"), REFUSED)
def test_what_is_refused_names_a_choice_that_works(
    sentence: str, rule: str, choice: str, corrected: str
) -> None:
    with pytest.raises(LayoutError) as caught:
        Layout.model_validate(sentence)
    assert rule in caught.value.rule
    assert choice in caught.value.remedy
    assert Layout.model_validate(corrected)


def test_a_shard_group_needs_sharding() -> None:
    with pytest.raises(LayoutError) as caught:
        Layout.model_validate({"data": 16, "shard_group": 8})
    assert caught.value.remedy == "zero3/8"
    assert Layout.model_validate("dp16 " + caught.value.remedy).shard_group == 8


@given(data=st.integers(1, 40), context=st.integers(1, 6), wanted=st.integers(2, 300))
def test_the_nearest_expert_and_shard_sizes_are_accepted(
    data: int, context: int, wanted: int
) -> None:
    base: dict[str, Any] = {"data": data, "context": context}
    for word, values in (
        ("ep", {"expert": wanted}),
        ("zero1/", {"zero": 1, "shard_group": wanted}),
    ):
        if data * context % wanted == 0:
            assert Layout.model_validate(base | values).world == data * context
            continue
        with pytest.raises(LayoutError) as caught:
            Layout.model_validate(base | values)
        assert caught.value.remedy.startswith(word)
        Layout.model_validate(f"dp{data} cp{context} {caught.value.remedy}")
