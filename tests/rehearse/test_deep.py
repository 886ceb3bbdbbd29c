"""A stage of many layers, from a few of them."""

from __future__ import annotations

import pytest
from tests.rehearse.test_replay import MODEL, PROGRAM, run_of

from ridgeline.layout.layout import Layout
from ridgeline.layout.stages import chunks_of
from ridgeline.rehearse.deep import extrapolated
from ridgeline.rehearse.replay import replay
from ridgeline.rehearse.trace import fewer, trace
from ridgeline.train.pipeline import steps_of


@pytest.mark.parametrize("sentence", ["mb1 bf16", "tp2 dp2 zero3 mb1 full bf16"])
def test_layers_that_only_repeat_add_the_same_each(sentence: str) -> None:
    run = run_of(MODEL | {"layers": 13}, sentence, 2)
    layout = run.layout
    assert isinstance(layout, Layout)
    steps = steps_of(layout, 0, 2, True)
    whole = replay(steps, trace(run, PROGRAM, 0, steps), 1, 2)
    seen = extrapolated(13, lambda most: trace(run, PROGRAM, 0, steps, most))
    assert seen is not None
    line = replay(steps, seen, 1, 2)
    assert [moment.total for moment in line.timeline] == [m.total for m in whole.timeline]
    assert line.peak == whole.peak
    assert line.sums.flops == whole.sums.flops
    assert line.sums.sent_bytes == whole.sums.sent_bytes
    assert line.sums.kernels == pytest.approx(whole.sums.kernels, rel=1e-3)


def test_the_rarer_kind_of_layers_stays() -> None:
    mixture = MODEL | {
        "layers": 9,
        "experts": {"count": 4, "top_k": 2, "ffn_hidden": 32, "first_dense_layers": 2},
    }
    run = run_of(mixture, "mb1 bf16", 1)
    assert isinstance(run.layout, Layout)
    (whole,) = chunks_of(run.layout, run.model, run.sequence)
    assert list(fewer(whole, run.model, 3).layers) == [0, 1, 2, 3, 4]
    assert fewer(whole, run.model, None) == whole
