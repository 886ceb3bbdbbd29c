"""Positions of context ranks: complete, equal and balanced; and heads exchanged only if they go."""

from __future__ import annotations

import re
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.errors import LayoutError
from ridgeline.layout.context import ContextKind, context_kind, context_positions

kinds: st.SearchStrategy[ContextKind] = st.sampled_from(["heads", "ring"])
ranks = st.integers(1, 16)
small = st.integers(1, 64)


def every_rank(sequence: int, context: int, kind: ContextKind) -> list[list[int]]:
    held = [context_positions(sequence, context, rank, kind) for rank in range(context)]
    return [list(chain(*ranges)) for ranges in held]


@given(ranks, small, kinds)
def test_every_position_is_held_once_and_every_rank_holds_equally_many_in_order(
    context: int, length: int, kind: ContextKind
) -> None:
    sequence = 2 * context * length
    held = every_rank(sequence, context, kind)
    assert sorted(chain(*held)) == list(range(sequence))
    assert all(len(positions) == sequence // context for positions in held)
    assert all(positions == sorted(positions) for positions in held)


@given(ranks, small)
def test_every_rank_of_a_ring_attends_over_equally_many_tokens(context: int, length: int) -> None:
    held = every_rank(2 * context * length, context, "ring")
    work = {sum(position + 1 for position in positions) for positions in held}
    assert len(work) == 1


def test_a_ring_of_four_holds_its_slices_in_zigzag() -> None:
    held = every_rank(16, 4, "ring")
    assert held == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]


@given(ranks, st.integers(1, 1000), kinds)
def test_a_sequence_that_cannot_be_cut_is_refused_with_lengths_that_can(
    context: int, sequence: int, kind: ContextKind
) -> None:
    try:
        every_rank(sequence, context, kind)
    except LayoutError as error:
        assert sequence % (2 * context)
        lengths = [int(word) for word in re.findall(r"\d+", error.remedy)]
        assert lengths
        for length in lengths:
            assert abs(length - sequence) < 2 * context
            every_rank(length, context, kind)
    else:
        assert sequence % (context if kind == "heads" else 2 * context) == 0


def test_a_ring_says_why_it_needs_twice_as_many_slices() -> None:
    with pytest.raises(LayoutError) as caught:
        context_positions(36, 4, 0, "ring")
    assert caught.value.asked == "cp4 with sequences of 36 tokens"
    assert "2·cp" in caught.value.rule
    assert "36 is not a multiple of 8" in caught.value.rule
    assert caught.value.remedy == "a sequence of 32 or 40"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "context", "kind"),
    [
        (32, 32, 8, "heads"),
        (32, 8, 8, "heads"),
        (32, 8, 16, "heads"),  # each key/value head on two ranks
        (8, 1, 8, "heads"),
        (4, 1, 8, "ring"),  # more ranks than heads
        (12, 12, 8, "ring"),
        (12, 6, 4, "ring"),  # six key/value heads neither go into four parts nor four into six
    ],
)
def test_heads_are_exchanged_until_they_run_out(
    heads: int, kv_heads: int, context: int, kind: ContextKind
) -> None:
    assert context_kind(heads, kv_heads, context) == kind


@given(st.integers(1, 16), st.integers(1, 8), ranks)
def test_exchanged_heads_bring_each_rank_the_keys_of_its_queries(
    kv_heads: int, group: int, context: int
) -> None:
    heads = kv_heads * group
    if context_kind(heads, kv_heads, context) == "ring":
        return
    copies = max(1, context // kv_heads)
    sent = [head // copies for head in range(kv_heads * copies)]
    queries, keys = heads // context, len(sent) // context
    for rank in range(context):
        received = sent[rank * keys : (rank + 1) * keys]
        served = [received[query * keys // queries] for query in range(queries)]
        assert served == [(rank * queries + query) // group for query in range(queries)]
