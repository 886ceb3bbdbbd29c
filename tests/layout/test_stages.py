"""Chunks of a pipeline: every layer once, and the costliest chunk as cheap as can be."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import LayoutError
from ridgeline.layout.layout import Layout
from ridgeline.layout.stages import balanced, chunks_of
from ridgeline.model.counts import flops_per_token
from ridgeline.model.shape import ModelShape

SHAPE = ModelShape(name="a model", layers=12, hidden=64, heads=4, vocab=4096, max_sequence=64)
SCHEDULES = st.sampled_from(["gpipe", "1f1b", "1f1b v2", "1f1b v3", "zbh1", "izb v2", "zbv"])


@given(st.integers(1, 8), SCHEDULES, st.integers(24, 60), st.integers(64, 100_000))
def test_every_layer_lies_in_one_chunk_in_order(
    pipeline: int, schedule: str, layers: int, vocab: int
) -> None:
    if pipeline == 1:
        schedule = schedule.partition(" ")[0]
    layout = Layout.model_validate(f"pp{pipeline} {schedule}")
    shape = SHAPE.model_copy(update={"layers": layers, "vocab": vocab})
    chunks = chunks_of(layout, shape, 64)
    per_rank = 2 if schedule == "zbv" else layout.interleave
    assert len(chunks) == (1 if pipeline == 1 else pipeline * per_rank)
    assert [layer for chunk in chunks for layer in chunk.layers] == list(range(layers))
    assert all(chunk.layers for chunk in chunks)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.first for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert [chunk.last for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def cheapest(layers: int, chunks: int, tail: float) -> float:
    """The costliest chunk of the best cut, by trying every one."""
    cuts = combinations(range(1, layers), chunks - 1)
    edges = [(0, *cut, layers) for cut in cuts]
    return min(max(*(b - a for a, b in pairwise(e[:-1])), e[-1] - e[-2] + tail) for e in edges)


@given(st.integers(2, 6), st.integers(0, 8), st.floats(0, 12))
def test_no_cut_has_a_cheaper_costliest_chunk(chunks: int, more: int, tail: float) -> None:
    counts = balanced(chunks + more, chunks, tail)
    assert sum(counts) == chunks + more
    assert min(counts) >= 1
    costs = [*counts[:-1], counts[-1] + tail]
    assert max(costs) == pytest.approx(cheapest(chunks + more, chunks, tail))


@given(st.integers(2, 8), st.integers(0, 40), st.floats(0, 12))
def test_chunks_before_the_last_are_even_and_the_first_is_not_the_longer(
    chunks: int, more: int, tail: float
) -> None:
    *before, _ = balanced(chunks + more, chunks, tail)
    assert max(before) - min(before) <= 1
    assert before == sorted(before)


def test_a_large_head_takes_layers_from_the_last_chunk() -> None:
    wide = SHAPE.model_copy(update={"vocab": 3072})
    forward = flops_per_token(wide, 64, "causal").forward
    assert 2 < forward.head * 12 / (forward.total - forward.head) < 4  # worth about three layers
    lengths = [len(c.layers) for c in chunks_of(Layout.model_validate("pp3"), wide, 64)]
    assert lengths == [5, 5, 2]
    even = SHAPE.model_copy(update={"vocab": 8})
    assert [len(c.layers) for c in chunks_of(Layout.model_validate("pp3"), even, 64)] == [4, 4, 4]


@pytest.mark.parametrize(("sentence", "chunks"), [("pp16", 16), ("pp4 v4", 16), ("pp8 zbv", 16)])
def test_more_chunks_than_layers_are_refused(sentence: str, chunks: int) -> None:
    with pytest.raises(LayoutError) as caught:
        chunks_of(Layout.model_validate(sentence), SHAPE, 64)
    assert f"each of the {chunks} chunks" in caught.value.rule
    assert "the model has 12" in caught.value.rule
    assert caught.value.remedy == "at most 12 chunks in all"
