"""Every division of a run lowers a rank's peak of memory as the planner's formulas say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
from tests.rehearse.real import real_rank

from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.model.counts import parameters
from ridgeline.plan.program import Program
from ridgeline.plan.program_stages import stage_peaks
from ridgeline.plan.quantities import LOSS_CHUNK_TOKENS
from ridgeline.run import Run
from ridgeline.train.vocabulary import CHUNK_TOKENS

MakeRun = Callable[..., Run]
BATCH = 64
# CPU kernels of RMSNorm and SiLU keep float32 copies, which those of accelerators do not.
MODEL = {
    "layers": 8, "hidden": 256, "heads": 4, "kv_heads": 4, "ffn_hidden": 1024, "norm": "layernorm",
    "activation": "gelu",
}  # fmt: skip
PARTS = ("weights", "gradients", "optimizer", "activations", "temporary")


@dataclass(frozen=True)
class Measured:
    """Bytes of every rank, in the second step, and the planner's for the stage it is on."""

    run: Run
    peak: list[int]
    parts: list[Mapping[str, int]]
    planned: list[dict[str, float]]


@pytest.fixture(scope="module")
def measure(
    make_tiny_run: MakeRun, pool: Pool, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Measured]:
    """Measure a layout, once."""
    known: dict[str, Measured] = {}

    def measured(sentence: str) -> Measured:
        if sentence not in known:
            run = make_tiny_run(
                tmp_path_factory.mktemp("memory"), layout=sentence, model=MODEL,
                schedule={"global_batch": BATCH}, budget={"steps": 2},
            )  # fmt: skip
            layout = run.layout
            assert isinstance(layout, Layout)
            told = pool.run(real_rank, (run,), layout.world)
            stages = stage_peaks(Program(run.model, layout, run.sequence, BATCH))
            planned = [
                {name: float(stages[rank * layout.pipeline // layout.world][name])
                 for name in PARTS}
                for rank in range(layout.world)
            ]  # fmt: skip
            peaks, parts = [seen.peak_bytes for seen in told], [seen.parts for seen in told]
            known[sentence] = Measured(run, peaks, parts, planned)
        return known[sentence]

    return measured


LAYOUTS = (
    "mb16 bf16", "mb16 fp32", "mb16 selective bf16", "mb16 full bf16", "dp2 mb16 zero1 bf16",
    "dp2 mb16 zero2 bf16", "dp2 mb16 zero3 bf16", "tp2 mb16 bf16", "tp2 mb16 selective bf16",
    "pp2 mb16 bf16", "pp2 mb8 gpipe bf16",
)  # fmt: skip


@pytest.mark.parametrize("sentence", LAYOUTS)
def test_a_ranks_peak_is_what_the_formulas_say(
    sentence: str, measure: Callable[[str], Measured]
) -> None:
    found = measure(sentence)
    for peak, parts, planned in zip(found.peak, found.parts, found.planned, strict=True):
        assert peak == pytest.approx(sum(planned.values()), rel=0.02)
        for part in ("gradients", "optimizer"):
            assert parts[part] == pytest.approx(planned[part], rel=0.02)
        # ZeRO-3's peak is in the middle of a backward pass, where a layer's are gone already; and
        # after GPipe's first, where a micro-batch's are
        assert parts["activations"] == pytest.approx(planned["activations"], rel=0.15)
        if "full" not in sentence:
            assert parts.get("weights", 0) == pytest.approx(planned["weights"], rel=0.02)


def test_each_division_takes_away_what_its_closed_form_says(
    measure: Callable[[str], Measured],
) -> None:
    """Bytes per parameter of bf16 training: 2 gathered, 4 of gradient, 12 of master and moments.

    By arXiv:1910.02054, ZeRO-1 divides the last, ZeRO-2 the gradient too and ZeRO-3 all three.
    """
    whole = measure("mb16 bf16")
    count = parameters(whole.run.model).total
    states = {part: whole.parts[0][part] / count for part in ("weights", "gradients", "optimizer")}
    assert states == pytest.approx({"weights": 2, "gradients": 4, "optimizer": 12}, rel=0.001)

    def less(sentence: str) -> float:
        return (whole.peak[0] - max(measure(sentence).peak)) / count

    assert less("dp2 mb16 zero1 bf16") == pytest.approx(12 / 2, rel=0.1)
    # a layer's gradients are whole until they are reduced: an eighth of the model, 4 bytes each
    layer = 4 * measure("dp2 mb16 zero2 bf16").planned[0]["optimizer"] / 6 / count / 8
    assert less("dp2 mb16 zero2 bf16") == pytest.approx((12 + 4) / 2 - layer, rel=0.1)
    more = less("dp2 mb16 zero3 bf16") - less("dp2 mb16 zero2 bf16")
    assert 0 < more < 2  # two bytes, but for the layers that are gathered at a time


def test_recomputation_keeps_less_and_tensor_ranks_divide_it(
    measure: Callable[[str], Measured],
) -> None:
    kept = {
        sentence: measure(sentence).parts[0]["activations"]
        for sentence in ("mb16 bf16", "mb16 selective bf16", "mb16 full bf16", "tp2 mb16 bf16")
    }
    none, selective, full, divided = kept.values()
    # in units of the residual stream: 16 and a number per head and token, 10, and 1
    assert selective / none == pytest.approx(10 / 16, rel=0.1)
    assert full / none == pytest.approx(1 / 16, rel=0.2)
    assert divided / none == pytest.approx((16 + 2) / 2 / 16, rel=0.1)  # 2 are gathered: whole


def test_the_loss_has_as_many_tokens_in_float32_as_the_planner_says() -> None:
    assert LOSS_CHUNK_TOKENS == CHUNK_TOKENS
