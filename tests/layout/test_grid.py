"""The rank grid: ranks and places are one to one, for every order of the axes."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.layout.grid import GRID_AXES, RankGrid, expert_sizes, holders, shard_sizes
from ridgeline.layout.layout import Axis, Layout

ORDERS = list(itertools.permutations(get_args(Axis)))
sizes = st.integers(1, 5)
layouts = st.builds(
    Layout, data=sizes, context=sizes, tensor=sizes, pipeline=sizes, order=st.sampled_from(ORDERS)
)


def said(sentence: str) -> Layout:
    return Layout.model_validate(sentence)


@given(layouts)
def test_a_rank_has_one_place_and_a_place_one_rank(layout: Layout) -> None:
    grid = RankGrid(layout)
    places = [grid.place(rank) for rank in range(layout.world)]
    for rank, place in enumerate(places):
        assert place.keys() == set(get_args(Axis))
        assert all(0 <= at < getattr(layout, axis) for axis, at in place.items())
        assert grid.rank(**place) == rank
    assert len({tuple(sorted(place.items())) for place in places}) == layout.world


@given(layouts)
def test_ranks_are_listed_by_place_whatever_their_order(layout: Layout) -> None:
    grid = RankGrid(layout)
    listed = grid.ranks()
    assert sorted(listed) == list(range(layout.world))
    places = [tuple(grid.place(rank)[axis] for axis in GRID_AXES) for rank in listed]
    assert places == sorted(places)


@given(layouts)
def test_the_last_axis_of_the_order_has_the_neighbours(layout: Layout) -> None:
    innermost, grid = layout.order[-1], RankGrid(layout)
    group = [grid.rank(**{innermost: at}) for at in range(getattr(layout, innermost))]
    assert group == list(range(len(group)))


def test_the_default_order_worked_out_by_hand() -> None:
    # stride of tp 1, of cp 2, of dp 2·3, of pp 2·3·2
    grid = RankGrid(said("pp2 dp2 cp3 tp2"))
    assert grid.rank(pipeline=1, data=1, context=2, tensor=1) == 12 + 6 + 4 + 1
    assert grid.place(17) == {"pipeline": 1, "data": 0, "context": 2, "tensor": 1}
    assert grid.ranks() == list(range(24))
    assert RankGrid(said("pp2 dp2 tp-pp-dp-cp")).ranks() == [0, 1, 2, 3]
    assert RankGrid(said("pp2 dp2 dp-pp-cp-tp")).ranks() == [0, 2, 1, 3]


def test_who_sits_where_in_a_sentence_per_axis() -> None:
    assert RankGrid(said("dp6 tp8 pp64")).describe(node=8) == [
        "pp64 (pipeline): ranks 0 48 … 3024, … on 64 nodes",
        "dp6 (data): ranks 0 8 … 40, … on 6 nodes",
        "tp8 (tensor): ranks 0 1 … 7, … on 1 node",
    ]
    assert RankGrid(said("dp2 cp4 tp-cp-dp-pp")).describe() == [
        "cp4 (context): ranks 0 2 4 6, …",
        "dp2 (data): ranks 0 1, …",
    ]
    assert RankGrid(said("dp1")).describe() == []


@pytest.mark.parametrize(
    ("sentence", "copies_and_shards", "copies_and_experts"),
    [
        ("dp8", (8, 1), (8, 1)),
        ("dp8 zero1", (1, 8), (8, 1)),
        ("dp4 cp2 zero3", (1, 8), (8, 1)),
        ("dp8 zero3/2", (4, 2), (8, 1)),
        ("dp4 cp2 ep4 tp2", (8, 1), (2, 4)),
    ],
)
def test_how_data_and_context_divide(
    sentence: str, copies_and_shards: tuple[int, int], copies_and_experts: tuple[int, int]
) -> None:
    assert shard_sizes(said(sentence)) == copies_and_shards
    assert expert_sizes(said(sentence)) == copies_and_experts


@given(layouts, st.sampled_from([0, 1, 2, 3]))
def test_every_number_of_a_stage_has_as_many_holders_as_ranks_over_parts(
    layout: Layout, zero: int
) -> None:
    layout = layout.model_copy(update={"zero": zero})
    stage = layout.data * layout.context * layout.tensor
    copies, shards = shard_sizes(layout)
    assert holders(layout, [1]) == stage
    assert holders(layout, [shards]) == copies * layout.tensor
    assert holders(layout, [shards, layout.tensor]) == copies
