"""The table of layouts: each is the same model as one process, and the check can fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.train import faults, layouts

from ridgeline.errors import LaunchError, LayoutError, RidgelineError
from ridgeline.launch.pool import Pool
from ridgeline.layout.layout import Layout
from ridgeline.layout.stages import chunks_of
from ridgeline.run import Run
from ridgeline.train.parity import USUAL, Parity, What, parity
from ridgeline.train.parity_text import table

MakeRun = Callable[..., Run]

LAYOUTS = (
    "dp2 mb2", "dp4 mb1", "tp2 mb4", "tp4 mb8", "pp2 mb2", "pp4 mb2", "cp2 mb4", "cp4 mb8",
    "dp2 tp2 pp2 mb2", "dp2 pp4 mb1", "tp2 pp2 mb4 v2", "tp2 cp2 mb8", "dp2 cp2 mb2",
    "dp2 mb2 zero1", "dp2 mb2 zero2", "dp2 mb2 zero3", "dp4 mb1 zero3/2",
    "dp2 cp2 mb2 zero3 tp-cp-dp-pp",  # the ranks of an axis made of two do not ascend
    "pp2 mb2 gpipe", "pp2 mb4 v2", "pp2 mb2 zbh1", "pp2 mb4 v2 izb", "pp2 mb2 zbv",
    "pp2 mb2 dualpipev",
    "dp1 mb8", "dp1 mb2", "dp1 mb1",  # accumulation over 1, 4 and 8 micro-batches; 2 in one process
    "dp1 mb8 selective", "dp1 mb8 full",
)  # fmt: skip
EXPERT_LAYOUTS = (
    "dp2 ep2 mb2", "dp4 ep4 mb2", "dp2 ep2 tp2 pp2 mb2", "dp2 cp2 ep4 mb2 tp-cp-dp-pp",
    # recomputed within a block: the experts' own shards, and visits, some once and some twice
    "dp2 ep2 mb1 selective", "dp2 pp2 ep2 mb1 zbv full", "pp2 mb1 dualpipev full",
)  # fmt: skip
STEPS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_tiny_run: MakeRun) -> Run:
    return layouts.table_run(make_tiny_run, tmp_path_factory.mktemp("parity"), layouts.DENSE)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, make_tiny_run: MakeRun) -> Run:
    return layouts.table_run(make_tiny_run, tmp_path_factory.mktemp("parity"), layouts.MIXTURE)


@pytest.fixture(scope="module")
def core(run: Run, pool: Pool) -> Parity:
    """The core table."""
    return parity(run, LAYOUTS, STEPS, pool=pool)


@pytest.fixture(scope="module")
def of_experts(mixture: Run, pool: Pool) -> Parity:
    """The core table's layouts of a mixture of experts."""
    return parity(mixture, EXPERT_LAYOUTS, STEPS, pool=pool)


def agrees(found: Parity, index: int) -> None:
    compared = found.layouts[index]
    assert compared.equal, compared.first_difference
    assert compared.loss == pytest.approx(found.loss, rel=1e-5)
    assert compared.grad_norm == pytest.approx(found.grad_norm, rel=1e-4)
    assert compared.gradient_difference <= 1e-5


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=LAYOUTS)
def test_every_layout_is_the_model_of_one_process(core: Parity, index: int) -> None:
    agrees(core, index)


@pytest.mark.parametrize("index", range(len(EXPERT_LAYOUTS)), ids=EXPERT_LAYOUTS)
def test_experts_divided_are_the_experts_of_one_process(of_experts: Parity, index: int) -> None:
    agrees(of_experts, index)


def test_no_stage_of_these_pipelines_has_as_many_layers_as_all_others(run: Run) -> None:
    for sentence in ("pp2", "pp4", "pp2 v2"):
        chunks = chunks_of(Layout.model_validate(sentence), run.model, run.sequence)
        assert len({len(chunk.layers) for chunk in chunks}) > 1


def test_other_sums_round_otherwise(core: Parity) -> None:
    """Else the layouts would not have been different ones."""
    assert len({each.gradient_difference for each in core.layouts}) > 2


def test_the_table_is_of_a_model_that_learns(core: Parity) -> None:
    assert len(core.loss) == len(core.grad_norm) == core.steps == STEPS
    assert core.learnt_nats == core.loss[0] - core.loss[-1] >= 0.5


def test_the_table_of_experts_is_of_a_model_that_learns(of_experts: Parity) -> None:
    assert of_experts.learnt_nats >= 0.5


def test_parity_leaves_the_runs_folder_alone(core: Parity, run: Run) -> None:
    assert core.equal
    assert not run.path.exists()


@pytest.fixture(scope="module")
def ragged(run: Run, pool: Pool) -> Parity:
    changing = faults.Changing(pool, everywhere=faults.ragged_targets)
    return parity(run, ("dp2 mb4", "dp1 mb1", "dp2 tp2 pp2 mb2", "cp2 mb4"), STEPS, pool=changing)


def test_ranks_that_hold_different_numbers_of_valid_tokens_agree(
    core: Parity, ragged: Parity
) -> None:
    assert ragged.equal, table(ragged)
    assert ragged.loss[0] != pytest.approx(core.loss[0], rel=1e-4)  # targets were left out


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"clip_norm": 0.0}},
        {"schedule": {"ramp": {"start": 4, "increment": 4, "every_steps": 2}}},
    ],
    ids=["no-clipping", "ramp"],
)
def test_schedules_and_no_clipping_agree(
    changes: dict[str, Any], pool: Pool, tiny_run: MakeRun
) -> None:
    found = parity(tiny_run(**changes), ("dp2 mb1", "pp2 mb2"), 4, pool=pool)
    assert found.equal, table(found)


def test_bf16_agrees_within_what_its_eight_bits_explain(pool: Pool, tiny_run: MakeRun) -> None:
    run = tiny_run(layout="mb4 bf16", optimizer={"lr": 5e-3})
    found = parity(run, ("dp2 mb1", "tp2 mb4", "pp2 mb2"), pool=pool)
    assert found.equal, table(found)
    assert found.precision == "bf16"
    assert found.learnt_nats >= 0.5
    assert found.layouts[0].gradient_difference > 1e-5  # float32's tolerance would not do


SEEDED: list[tuple[faults.Changed, dict[str, Any], str, tuple[What, str | None]]] = [
    # the fault, a model and a layout that have it, and what the table first shows: what, on which
    # tensor
    (faults.norm_counted_twice_over_tensor, layouts.DENSE, "tp2 mb8", ("grad_norm", None)),
    (faults.tied_embedding_not_summed, layouts.GPT, "pp2 mb4",
     ("gradient", r"(embedding|head)\.weight")),
    (faults.accumulation_rescaled, layouts.DENSE, "dp2 mb2", ("loss", None)),
    (faults.accumulation_rescaled, layouts.DENSE, "dp1 mb2", ("loss", None)),
    (faults.mean_loss_of_each_rank, layouts.DENSE, "dp2 mb4", ("gradient", r".+")),
    (faults.experts_not_summed_over_tensor, layouts.MIXTURE, "tp2 mb8",
     ("gradient", r"blocks\.\d\.mlp\.(router|experts\..*)\.weight")),
    (faults.positions_from_0_on_every_rank, layouts.DENSE, "cp2 mb8",
     ("gradient", r"blocks\.\d\.attention\.[qk]\.weight")),
    (faults.data_of_one_rank_repeated, layouts.DENSE, "dp2 mb4", ("gradient", r".+")),
    (faults.gradients_of_a_stage_dropped, layouts.DENSE, "pp2 mb4",
     ("gradient", r"blocks\.[34]\..*|norm\.weight|head\.weight")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "model", "layout", "shown"), SEEDED, ids=lambda each: getattr(each, "__name__", None)
)
def test_a_seeded_fault_turns_the_table_red(
    fault: faults.Changed,
    model: dict[str, Any],
    layout: str,
    shown: tuple[What, str | None],
    make_tiny_run: MakeRun,
    tmp_path: Path,
    pool: Pool,
) -> None:
    run = layouts.table_run(make_tiny_run, tmp_path, model)
    changing = faults.Changing(pool, everywhere=faults.ragged_targets, fault=fault)
    found = parity(run, (layout,), 1, pool=changing)
    assert not found.equal
    first = found.layouts[0].first_difference
    assert first is not None
    what, tensor = shown
    assert (first.step, first.what) == (1, what), first
    assert re.fullmatch(tensor or "None", str(first.tensor)), first
    assert "DIFFERS at step 1" in table(found)


def test_a_mean_of_each_rank_shows_only_where_ranks_hold_different_numbers(
    run: Run, pool: Pool
) -> None:
    changing = faults.Changing(pool, fault=faults.mean_loss_of_each_rank)
    assert parity(run, ("dp2 mb4",), 2, pool=changing).equal


def test_one_rank_with_another_loss_is_a_difference(run: Run, pool: Pool) -> None:
    changing = faults.Changing(pool, fault=faults.one_rank_reports_another_loss)
    found = parity(run, ("dp4 mb2",), 2, pool=changing)
    first = found.layouts[0].first_difference
    assert first is not None
    assert (first.step, first.what, first.rank) == (2, "loss", 3)
    assert found.layouts[0].loss == pytest.approx(found.loss, rel=1e-5)  # rank 0's


def test_a_rank_that_fails_is_named_with_its_layout(run: Run, pool: Pool) -> None:
    changing = faults.Changing(pool, fault=faults.rank_raises)
    with pytest.raises(LaunchError, match=r"layout 'dp2 mb2 fp32': rank 1 .*\n.*by nothing"):
        parity(run, ("dp2 mb2",), 2, pool=changing)


REFUSED = {
    "dp3 mb1": "dp·mb divides the global batch",
    "dp2 bf16": "bf16 is not fp32",
    "dp2 fp8": "fp8 is not fp32",
    "dp1024": "divides the global batch",
    "tp8": "tp divides the attention heads: 4 is not a multiple of 8",
    "pp8": "8 chunks holds at least one of 5 layers",
    "dp2 ep2": "ep divides the number of experts, 1",
    "pp2 mb4 zbv compile": "cannot do inside compiled blocks",
    "pp2 mb4 zbh1 selective": "recomputes selectively for one backward pass alone",
    "dq2": "a layout is words such as",
}


@pytest.mark.parametrize("layout", REFUSED)
def test_a_layout_that_cannot_be_is_refused_before_any_process_starts(
    layout: str, run: Run
) -> None:
    class NoPool(Pool):
        def run(self, *_: Any) -> list[Any]:
            raise AssertionError("a process was started")

    with pytest.raises(LayoutError) as raised:
        parity(run, ("dp2 mb1", layout), pool=NoPool())
    assert REFUSED[layout] in f"{raised.value}"
    assert raised.value.remedy


def test_a_precision_without_a_tolerance_is_refused(tiny_run: MakeRun) -> None:
    with pytest.raises(RidgelineError, match="fp32 and bf16"):
        parity(tiny_run(layout="mb4 fp16"))


def test_the_runs_own_layout_and_the_usual_ones_are_compared_or_skipped_with_a_reason(
    pool: Pool, tiny_run: MakeRun
) -> None:
    found = parity(tiny_run(layout="dp2 pp2 mb2 zero2"), steps=1, pool=pool)
    assert found.equal, table(found)
    assert found.precision == "fp32"
    assert len(found.layouts) + len(found.skipped) == len(USUAL) + 1
    named = [each.layout for each in found.layouts]
    assert named[0] == "dp2 pp2 mb2 zero2 fp32"
    assert "dp2 tp2 pp2 mb2 fp32" in named
    skipped = dict(found.skipped)
    assert "2 is not a multiple of 4" in skipped["tp4 mb2 fp32"]
    assert "ep" not in " ".join(named + list(skipped))  # it has no experts
