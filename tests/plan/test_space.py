"""The space of layouts: complete, and the same arithmetic as `layout.arithmetic`."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ridgeline.errors import LayoutError
from ridgeline.layout.arithmetic import check
from ridgeline.layout.layout import Layout
from ridgeline.layout.schedules import chunks_per_rank
from ridgeline.model.catalogue import entry
from ridgeline.plan.space import divisors, shard_pairs, space


@pytest.mark.parametrize(("devices", "batch"), [(12, 24), (32, 96), (7, 14)])
def test_every_valid_layout_and_no_other_is_in_the_space(devices: int, batch: int) -> None:
    """Against a plain enumeration through Layout and check, for a model with 12 heads."""
    shape = entry("gpt2").shape
    found = {
        str(chunk.layout(row, "auto"))
        for chunk in space(shape, 1024, batch, devices).chunks()
        for row in range(chunk.count)
    }
    wanted = set()
    axes = itertools.product(divisors(devices), repeat=4)
    for dp, cp, tp, pp in (a for a in axes if np.prod(a) == devices):
        orders = [("1f1b", 1)] if pp == 1 else [
            *((s, 1) for s in ("1f1b", "gpipe", "zbh1")),
            *((s, v) for v in divisors(-(-12 // pp)) if v > 1 for s in ("1f1b", "izb")),
            *((s, 2) for s in ("zbv", "dualpipev")),
        ]  # fmt: skip
        for mb, (schedule, v) in itertools.product(range(1, 17), orders):
            base = f"dp{dp} cp{cp} tp{tp} pp{pp} mb{mb} v{v} {schedule}"
            try:
                check(Layout.model_validate(base), shape, 1024, batch, devices)
            except LayoutError:
                continue
            for (zero, group), again in itertools.product(
                shard_pairs(dp * cp), ("none", "selective", "full")
            ):
                word = f"zero{zero:.0f}" + (f"/{group:.0f}" if zero and group < dp * cp else "")
                wanted.add(str(Layout.model_validate(f"{base} {word} {again}")))
    assert found == wanted


def test_the_counts_are_those_of_the_rows() -> None:
    everything = space(entry("mixtral-8x7b").shape, 4096, 64, 16)
    rows = sum(chunk.count for chunk in everything.chunks())
    assert rows == everything.valid < everything.candidates
    experts = {float(e) for chunk in everything.chunks() for e in np.unique(chunk.expert)}
    assert experts == {1.0, 2.0, 4.0, 8.0}


def test_schedules_of_the_space_exist_as_lists_of_actions() -> None:
    for chunk in space(entry("gpt2").shape, 1024, 96, 24).chunks():
        for row in range(0, chunk.count, 97):
            layout = chunk.layout(row, "bf16")
            assert chunks_per_rank(layout.schedule, layout.interleave) == layout.interleave


def test_a_run_that_nothing_divides_has_an_empty_space() -> None:
    assert space(entry("gpt2").shape, 1024, 5, 13).valid == 0
