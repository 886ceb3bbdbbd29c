"""Slow ranks stand out from their peers, and only they."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.layout.layout import Layout
from ridgeline.train.stragglers import SHARE, Stragglers, slower


def named(sentence: str, *rows: list[float]) -> list[list[int]]:
    """Ranks named after each exchange."""
    stragglers = Stragglers(Layout.model_validate(sentence), None, None)
    return [[slow.rank for slow in stragglers.named_now(row)] for row in rows]


def test_a_rank_is_named_when_it_is_slow_twice_and_once_until_it_recovers() -> None:
    even, slow = [1.0, 1.01, 0.99, 1.0], [1.0, 1.01, 1.5, 1.0]
    rows = [even, slow, even, slow, slow, slow, even, slow, slow]
    assert named("dp4", *rows) == [[], [], [], [], [2], [], [], [], [2]]


def test_stages_that_have_more_to_do_are_no_stragglers() -> None:
    row = [1.0, 1.0, 3.0, 3.0]
    assert named("pp2 dp2", row, row) == [[], []]
    row = [1.0, 1.0, 3.0, 4.0]
    assert named("pp2 dp2", row, row) == [[], [3]]


def test_where_all_scatter_a_rank_must_be_far_out() -> None:
    assert not slower([1.0, 1.3, 0.7, 1.2, 0.8, 1.4], range(6))
    assert [each.rank for each in slower([1.0, 1.3, 0.7, 1.2, 0.8, 4.0], range(6))] == [5]


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.floats(1e-3, 1e3))
def test_never_a_majority_and_the_same_in_any_unit(busy_s: list[float], unit: float) -> None:
    peers = range(len(busy_s))
    found = slower(busy_s, peers)
    assert len(found) <= len(busy_s) / 2
    assert all(each.busy_s > (1 + SHARE) * each.median_s * (1 - 1e-9) for each in found)
    clear = [each for each in found if each.busy_s > 1e3 * each.median_s]
    scaled = {each.rank for each in slower([each * unit for each in busy_s], peers)}
    assert {each.rank for each in clear} <= scaled or len(scaled) >= len(clear)


def test_one_process_knows_of_no_others() -> None:
    stragglers = Stragglers(Layout.model_validate("dp1"), None, None)
    stragglers.step_begins()
    stragglers.step_ends()
    assert stragglers.exchange() is None
    assert named("dp1", [9.0], [9.0]) == [[], []]
    with pytest.raises(IndexError):
        named("dp2", [9.0])
