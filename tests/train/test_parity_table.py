"""The table of layouts: each is the same model as one process, and the check can fail."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.train import faults

from ridgeline.cli import main
from ridgeline.errors import LaunchError, LayoutError, RidgelineError
from ridgeline.launch.pool import Pool
from ridgeline.run import Run
from ridgeline.train.parity import (
    USUAL,
    Compared,
    Difference,
    Parity,
    Tolerance,
    compare,
    parity,
)
from ridgeline.train.parity_text import table
from ridgeline.train.witness import Deviation, Seen, deviation

MakeRun = Callable[..., Run]
check = importlib.import_module("ridgeline.train.parity")  # `ridgeline.train` is the verb

LAYOUTS = (
    "dp2 mb2", "dp2 mb4", "dp4 mb1", "dp4 mb2",  # data parallel
    "dp1 mb8", "dp1 mb2", "dp1 mb1",  # accumulation over 1, 4 and 8 micro-batches; 2 in one process
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, make_tiny_run: MakeRun) -> Run:
    return make_tiny_run(tmp_path_factory.mktemp("parity"))


@pytest.fixture(scope="module")
def core(run: Run, pool: Pool) -> Parity:
    """The core table."""
    return parity(run, LAYOUTS, pool=pool)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=LAYOUTS)
def test_every_layout_is_the_model_of_one_process(core: Parity, index: int) -> None:
    compared = core.layouts[index]
    assert compared.equal, compared.first_difference
    assert compared.loss == pytest.approx(core.loss, rel=1e-5)
    assert compared.grad_norm == pytest.approx(core.grad_norm, rel=1e-4)
    assert compared.gradient_difference <= 1e-5


def test_other_sums_round_otherwise(core: Parity) -> None:
    """Else the layouts would not have been different ones."""
    assert len({each.gradient_difference for each in core.layouts}) > 2


def test_the_table_is_of_a_model_that_learns(core: Parity) -> None:
    assert len(core.loss) == len(core.grad_norm) == core.steps == 10
    assert core.learnt_nats == core.loss[0] - core.loss[-1] >= 0.5


def test_parity_leaves_the_runs_folder_alone(core: Parity, run: Run) -> None:
    assert core.equal
    assert not run.path.exists()


@pytest.fixture(scope="module")
def ragged(run: Run, pool: Pool) -> Parity:
    changing = faults.Changing(pool, everywhere=faults.ragged_targets)
    return parity(run, ("dp2 mb4", "dp4 mb1", "dp1 mb1"), pool=changing)


def test_ranks_that_hold_different_numbers_of_valid_tokens_agree(
    core: Parity, ragged: Parity
) -> None:
    assert ragged.equal, table(ragged)
    assert ragged.loss[0] != pytest.approx(core.loss[0], rel=1e-4)  # targets were left out


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"positions": "learned", "norm": "layernorm", "bias": True, "qkv_bias": True}},
        {"model": {"tied": True}},
        {"optimizer": {"clip_norm": 0.0}},
        {"schedule": {"ramp": {"start": 4, "increment": 4, "every_steps": 2}}},
    ],
    ids=["gpt", "tied", "no-clipping", "ramp"],
)
def test_other_models_and_schedules_agree(
    changes: dict[str, Any], pool: Pool, tiny_run: MakeRun
) -> None:
    found = parity(tiny_run(**changes), ("dp2 mb1",), 4, pool=pool)
    assert found.equal, table(found)


def test_bf16_agrees_within_what_its_eight_bits_explain(pool: Pool, tiny_run: MakeRun) -> None:
    found = parity(
        tiny_run(layout="mb4 bf16", optimizer={"lr": 5e-3}), ("dp2 mb1", "dp4 mb2"), pool=pool
    )
    assert found.equal, table(found)
    assert found.precision == "bf16"
    assert found.learnt_nats >= 0.5
    assert found.layouts[0].gradient_difference > 1e-5  # float32's tolerance would not do


SEEDED: list[tuple[faults.Changed, str, tuple[str, str | None]]] = [
    # the fault, a layout that has it, and what the table first shows: what, on which tensor
    (faults.accumulation_rescaled, "dp2 mb2", ("loss", None)),
    (faults.accumulation_rescaled, "dp1 mb2", ("loss", None)),
    (faults.mean_loss_of_each_rank, "dp2 mb4", ("loss", None)),
    (faults.data_of_one_rank_repeated, "dp2 mb4", ("loss", None)),
    (faults.one_gradient_dropped, "dp2 mb4", ("gradient", "blocks.0.attention.v.weight")),
    (faults.norm_counted_twice, "dp2 mb4", ("grad_norm", None)),
]


@pytest.mark.parametrize(
    ("fault", "layout", "shown"), SEEDED, ids=lambda each: getattr(each, "__name__", None)
)
def test_a_seeded_fault_turns_the_table_red(
    fault: faults.Changed, layout: str, shown: tuple[str, str | None], run: Run, pool: Pool
) -> None:
    changing = faults.Changing(pool, everywhere=faults.ragged_targets, fault=fault)
    found = parity(run, (layout,), 2, pool=changing)
    assert not found.equal
    first = found.layouts[0].first_difference
    assert first is not None
    assert (first.step, first.what, first.tensor) == (1, *shown)
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
    "tp8": "8",
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


def test_the_usual_layouts_are_compared_or_skipped_with_a_reason(run: Run, pool: Pool) -> None:
    found = parity(run.model_copy(update={"layout": "auto"}), steps=1, pool=pool)
    assert found.equal
    assert found.precision == "fp32"
    assert len(found.layouts) + len(found.skipped) == len(USUAL)
    named = [each.layout for each in found.layouts]
    assert {"dp2 mb2 fp32", "mb4 fp32"} <= set(named)
    assert all(why for _, why in found.skipped)
    assert "ep2" in " ".join(layout for layout, _ in found.skipped)  # it has no experts


# ---- the comparison itself, on numbers made up here

TOLERANCE = Tolerance(loss=1e-5, grad_norm=1e-4, gradient=1e-5)
ALONE = Seen([2.0, 1.0], [2.0, 0.5], {"w": Deviation(0.0, 0.4, 0.4)})


def beside(**changes: Any) -> Compared:
    """A layout of two ranks of which the second saw something else than the reference."""
    seen = dataclasses.replace(ALONE, **changes)
    return compare("dp2", ALONE, [ALONE, seen], TOLERANCE, clip_norm=1.0)


def test_rounding_is_no_difference() -> None:
    compared = beside(loss=[2.0, 1.000009], grad_norm=[2.0001, 0.5])
    assert compared.equal
    assert compared.loss_difference == pytest.approx(9e-6)
    assert compared.norm_difference == pytest.approx(5e-5)
    assert compared.gradient_difference == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": [2.0, 1.0001]}, Difference(2, "loss", None, 1, 1.0, 1.0001)),
        ({"loss": [math.nan, 1.0]}, Difference(1, "loss", None, 1, 2.0, math.nan)),
        ({"grad_norm": [2.0, math.inf]}, Difference(2, "grad_norm", None, 1, 0.5, math.inf)),
        (
            {"gradients": {"w": Deviation(2e-5, 0.4, 0.3)}},
            Difference(1, "gradient", "w", 1, 0.4, 0.3),
        ),
        # twice the norm, so half the gradient: the norm is to blame
        (
            {"grad_norm": [4.0, 0.5], "gradients": {"w": Deviation(0.5, 0.4, 0.2)}},
            Difference(1, "grad_norm", None, 1, 2.0, 4.0),
        ),
        # twice the norm and more than half of the gradient lost: the gradient is
        (
            {"grad_norm": [4.0, 0.5], "gradients": {"w": Deviation(0.9, 0.4, 0.04)}},
            Difference(1, "gradient", "w", 1, 0.4, 0.04),
        ),
    ],
    ids=["late", "nan", "inf", "gradient", "norm-to-blame", "gradient-to-blame"],
)
def test_the_first_difference_is_named(changes: dict[str, Any], expected: Difference) -> None:
    assert repr(beside(**changes).first_difference) == repr(expected)  # NaN equals nothing


def test_a_gradient_that_no_rank_has_is_missing() -> None:
    nothing = dataclasses.replace(ALONE, gradients={})
    compared = compare("pp2", ALONE, [nothing, nothing], TOLERANCE, clip_norm=1.0)
    assert compared.first_difference == Difference(1, "gradient", "w", None, 0.4, None)
    assert compared.gradient_difference == math.inf


def test_a_deviation_is_relative_to_the_largest_of_its_tensor() -> None:
    reference = torch.tensor([[4.0, -8.0], [0.0, 1.0]])
    moved = reference + torch.tensor([[0.0, 0.0], [0.2, 0.4]])
    found = deviation(moved, reference, 0.0)
    assert (found.size, found.reference, found.here) == pytest.approx((0.05, 1.0, 1.4))
    assert deviation(moved, reference, 0.5).size == 0
    assert deviation(moved, torch.zeros(2, 2), 0.0).size == math.inf
    assert deviation(moved * math.nan, reference, 0.5).size == math.inf
    assert deviation(moved, None, 0.5).reference is None
    assert deviation(moved, reference[0], 0.5).size == math.inf


# ---- the verb


def shape_of(value: Any) -> Any:
    """The keys and types of a JSON value; a list by its first element."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape_of(value[0])] if value else []
    return type(value).__name__


COMPARED = {
    "equal": "bool", "layout": "str", "loss": ["float"], "grad_norm": ["float"],
    "loss_difference": "float", "norm_difference": "float", "gradient_difference": "float",
    "first_difference": "NoneType",
}  # fmt: skip
DIFFERENCE = {
    "step": "int", "what": "str", "tensor": "str", "rank": "int", "reference": "float",
    "here": "float",
}  # fmt: skip
SCHEMA = {
    "run": "str", "steps": "int", "precision": "str",
    "tolerance": {"loss": "float", "grad_norm": "float", "gradient": "float"},
    "equal": "bool", "learnt_nats": "float",
    "reference": {"layout": "str", "loss": ["float"], "grad_norm": ["float"]},
    "layouts": [COMPARED],
    "skipped": [{"layout": "str", "why": "str"}],
}  # fmt: skip


def test_the_json_has_this_schema_and_only_finite_numbers(core: Parity) -> None:
    different = beside(gradients={"w": Deviation(math.inf, 0.4, math.nan)})
    found = dataclasses.replace(core, skipped=[("tp2", "not trained")])
    assert shape_of(found.json()) == SCHEMA
    found = dataclasses.replace(core, layouts=[different])
    told = json.loads(json.dumps(found.json(), allow_nan=False))
    assert shape_of(told["layouts"][0]["first_difference"]) == DIFFERENCE | {"here": "NoneType"}
    assert told["layouts"][0]["gradient_difference"] is None
    assert told["equal"] is False


def test_the_table_fits_100_columns_and_says_when_little_was_learnt(core: Parity) -> None:
    text = table(core).splitlines()
    assert max(map(len, text)) <= 100
    assert sum("equal" in line for line in text) == len(LAYOUTS)
    numbers = [line for line in text if line.startswith("    1 ")]
    assert all(f"{core.loss[0]:.7f}" in line for line in numbers)
    flat = dataclasses.replace(core, loss=[core.loss[0]] * 10)
    assert "less than 0.5" in table(flat)


@pytest.fixture
def type_parity(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Run,
    pool: Pool,
    tmp_path: Path,
) -> Callable[..., tuple[int, str]]:
    """Run `ridgeline parity` on the tiny run, in the tests' processes: (exit status, output)."""

    def typed(*words: str, fault: faults.Changed | None = None) -> tuple[int, str]:
        own = Pool.run
        changing = faults.Changing(pool, fault=fault)
        file = tmp_path / "run.toml"
        file.write_text(run.to_toml(), encoding="utf-8")
        monkeypatch.setattr("sys.argv", ["ridgeline", "parity", str(file), *words])
        with monkeypatch.context() as patched:
            patched.setattr(check, "Pool", lambda: changing)
            with pytest.raises(SystemExit) as left:
                main()
        assert Pool.run is own
        return int(left.value.code or 0), capsys.readouterr().out

    return typed


def test_the_verb_says_equal_and_exits_with_0(
    type_parity: Callable[..., tuple[int, str]],
) -> None:
    status, said = type_parity("--layouts", "dp2 mb2", "--steps", "2", "--seed", "3")
    assert status == 0
    assert "dp2 mb2 fp32" in said
    assert "equal" in said
    assert "less than 0.5" in said


def test_the_verb_exits_with_1_when_a_layout_differs(
    type_parity: Callable[..., tuple[int, str]],
) -> None:
    words = ("--layouts", "dp2 mb4", "--layouts", "dp1 mb8", "--steps", "2", "--json")
    status, said = type_parity(*words, fault=faults.data_of_one_rank_repeated)
    assert status == 1
    told = json.loads(said)
    assert told["equal"] is False
    assert [each["equal"] for each in told["layouts"]] == [False, True]
    assert told["layouts"][0]["first_difference"]["what"] == "loss"
    assert os.environ.get("RANK") is None  # the ranks' variables are the workers' alone
